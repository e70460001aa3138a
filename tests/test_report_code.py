"Which code a run executed, and what makes a report stale: by mutation of a copy of the library."

import ast
import importlib
import shutil
import sys
import threading

import pytest
from conftest import ROOT

MODULES = {
    'units.py': 'SCALE = 2\nOTHER = 5\n\n\ndef unit():\n    return SCALE\n',
    'curves.py': """
"About curves"
from dataclasses import dataclass

from .units import SCALE, unit

LIMIT = 10


@dataclass
class Curve:
    "A curve"
    rate: float = 0.5

    def area(self, n: int) -> float:
        "Its area"
        def inner():
            return n * self.rate
        if n > LIMIT:
            raise ValueError(f'{n} is above {LIMIT}.')
        return inner() + SCALE


def total(n):
    "A sum, in a thread where n is even"
    refuse(n == 7, f'{n} is refused.')
    return sum(Curve().area(i) for i in range(n)) + unit()


def refuse(condition, sentence):
    if condition:
        raise ValueError(sentence)


def elsewhere():
    return 3
""",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    "A small library on disk, with a way to change it"
    folder = tmp_path / 'toy_library'
    folder.mkdir()
    (folder / '__init__.py').touch()
    for name, source in MODULES.items():
        (folder / name).write_text(source, encoding='utf-8')
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [m for m in sys.modules if m.startswith('toy_library')]:
        del sys.modules[name]
    return folder


def run(folder, f='total', n=3):
    "The record of a call"
    from mope_clip.report.code import Recorder

    curves = importlib.import_module('toy_library.curves')
    with Recorder(folder) as recorder:
        getattr(curves, f)(n)
    return recorder.functions()


def after(folder, record, file, old, new):
    "What of a record changed, after a change of a file"
    from mope_clip.report.code import Library, changed

    path = folder / file
    source = path.read_text(encoding='utf-8')
    assert old in source
    path.write_text(source.replace(old, new), encoding='utf-8')
    found = changed(record, Library(folder))
    path.write_text(source, encoding='utf-8')
    return {name.rpartition('toy_library.')[2] for name in found}


def test_what_was_entered_is_recorded_and_nothing_else(library):
    assert {name.removeprefix('toy_library.') for name in run(library)} == {
        'curves.total',
        'curves.refuse',
        'curves.Curve.area',
        'units.unit',
    }


@pytest.mark.parametrize(
    'file, old, new',
    [
        ('curves.py', 'is above {LIMIT}.', 'is too much: at most {LIMIT}.'),
        ('curves.py', "f'{n} is above {LIMIT}.'", "'Too much.'"),
        ('curves.py', "f'{n} is refused.'", "f'No {n} please.'"),
        ('curves.py', '"Its area"', '"The area under it"'),
        ('curves.py', '"Its area"\n', '\n'),
        ('curves.py', 'return 3', 'return 4'),
        ('curves.py', 'n: int', 'n'),
        ('curves.py', '"About curves"', '"About all curves"  # and their areas'),
        ('units.py', 'OTHER = 5', 'OTHER = 6'),
    ],
)
def test_words_and_what_was_not_executed_make_nothing_stale(library, file, old, new):
    assert after(library, run(library), file, old, new) == set()


@pytest.mark.parametrize(
    'file, old, new, stale',
    [
        ('curves.py', 'n * self.rate', 'n + self.rate', {'curves.Curve.area'}),
        ('curves.py', 'rate: float = 0.5', 'rate: float = 0.7', {'curves.Curve.area'}),
        ('curves.py', 'LIMIT = 10', 'LIMIT = 11', {'curves.Curve.area'}),
        ('curves.py', 'n == 7', 'n == 8', {'curves.total'}),
        ('curves.py', 'def refuse(', 'def refused(', {'curves.refuse'}),
        ('units.py', 'SCALE = 2', 'SCALE = 3', {'curves.Curve.area', 'units.unit'}),
        ('units.py', 'def unit', 'def one', {'units.unit'}),
    ],
)
def test_a_formula_a_constant_and_a_lost_function_make_stale(library, file, old, new, stale):
    found = after(library, run(library), file, old, new)
    # `total` reads the class by name, so its fields are part of what it does
    assert stale <= found <= stale | {'curves.total'}


def test_threads_are_watched_too(library):
    from mope_clip.report.code import Recorder

    curves = importlib.import_module('toy_library.curves')
    with Recorder(library) as recorder:
        thread = threading.Thread(target=curves.elsewhere)
        thread.start()
        thread.join()
    assert list(recorder.functions()) == ['toy_library.curves.elsewhere']


def test_no_line_is_traced(library):
    from mope_clip.report.code import Recorder

    recorder = Recorder(library)
    assert recorder.entered(sys._getframe(), 'call', None) is None


def test_where_another_tracer_listens_nothing_is_recorded(library):
    from mope_clip.report.code import Recorder

    calls = []

    def debugger(frame, event, arg):
        calls.append(event)

    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        with Recorder(library) as recorder:
            assert sys.gettrace() is debugger
            importlib.import_module('toy_library.curves').elsewhere()
        assert sys.gettrace() is debugger
    finally:
        sys.settrace(before)
    assert calls and recorder.functions() == {}


def test_nothing_is_recorded_while_a_clock_runs(library):
    from mope_clip.report.code import Recorder, untraced

    curves = importlib.import_module('toy_library.curves')
    with Recorder(library) as recorder:
        with untraced():
            assert sys.gettrace() is None and threading.gettrace() is None
            curves.elsewhere()
        curves.refuse(False, '')
    assert list(recorder.functions()) == ['toy_library.curves.refuse']
    assert sys.gettrace() is None


def test_a_clock_leaves_the_tracer_of_others_alone():
    from mope_clip.report.code import untraced

    def debugger(frame, event, arg):
        pass

    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        with untraced():
            assert sys.gettrace() is debugger
    finally:
        sys.settrace(before)


def test_a_recorder_inside_another_hands_on_what_it_saw(library):
    from mope_clip.report.code import Recorder

    curves = importlib.import_module('toy_library.curves')
    with Recorder(library) as outer:
        with Recorder(library) as inner:
            curves.elsewhere()
        curves.refuse(False, '')
    assert list(inner.functions()) == ['toy_library.curves.elsewhere']
    assert len(outer.functions()) == 2


FOUND = """
from functools import cache

from .units import SCALE


def look(n):
    return n + step()


def step():
    return 1


@cache
def table(n):
    return look(n)


def grown(n):
    return n * 3


SIDES = tuple(grown(n) for n in range(3))


def used(n):
    return table(n)


def sides(n):
    return SIDES[n]
"""


@pytest.fixture
def found(library):
    "The small library with a function that remembers, and a constant that an import computes"
    (library / 'found.py').write_text(FOUND, encoding='utf-8')
    return importlib.import_module('toy_library.found')


def test_what_a_function_remembered_is_part_of_whoever_reads_it(library, found):
    from mope_clip.report.code import Recorder

    found.used(3)  # before anybody looks
    with Recorder(library) as recorder:
        found.used(3)
    record = recorder.functions()
    assert list(record) == ['toy_library.found.used']
    assert after(library, record, 'found.py', 'n + step()', 'n - step()') == {'found.used'}
    assert after(library, record, 'found.py', 'return 1', 'return 2') == {'found.used'}
    assert after(library, record, 'found.py', 'n * 3', 'n * 4') == set()


def test_what_an_import_computed_is_part_of_whoever_reads_it(library, found):
    from mope_clip.report.code import Recorder

    with Recorder(library) as recorder:
        found.sides(2)
    record = recorder.functions()
    assert after(library, record, 'found.py', 'n * 3', 'n * 4') == {'found.sides'}
    assert after(library, record, 'found.py', 'n + step()', 'n - step()') == set()


def test_the_record_is_of_what_ran_and_not_of_what_lies_on_the_disk_at_its_end(library):
    from mope_clip.report.code import Library, Recorder, changed

    curves = importlib.import_module('toy_library.curves')
    path = library / 'curves.py'
    with Recorder(library) as recorder:
        curves.elsewhere()
        was = Library(library)
        path.write_text(MODULES['curves.py'].replace('return 3', 'return 4'), encoding='utf-8')
    record = recorder.functions()
    assert changed(record, was) == []
    assert changed(record, Library(library)) == ['toy_library.curves.elsewhere']


def test_names_are_written_down_once_something_is_kept_and_are_of_the_next_record_too(
    library, tmp_path, monkeypatch
):
    from mope_clip.report.code import Recorder

    monkeypatch.setattr('mope_clip.report.code.WRITERS', ('elsewhere',))
    curves, notes = importlib.import_module('toy_library.curves'), tmp_path / 'entered.txt'
    killed = Recorder(library, notes).start()
    curves.total(3)
    assert not notes.exists()  # whoever refuses bad input leaves nothing
    for thread in (threading.Thread(target=curves.elsewhere) for _ in range(2)):
        thread.start()
        thread.join()
    lines = notes.read_text(encoding='utf-8').split()  # as a process that is killed now leaves them
    killed.stop()
    assert len(set(lines)) == 5
    with Recorder(library, notes) as recorder:
        curves.refuse(False, '')
    assert set(recorder.functions()) == set(lines)
    assert all(recorder.functions().values())


# ---------------------------------------------------------------- the library itself


class Reworded(ast.NodeTransformer):
    "Another sentence in every error"

    def visit_Raise(self, node):
        if isinstance(node.exc, ast.Call):
            node.exc.args = [ast.Constant('Said in other words.')]
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == 'refuse':
            node.args[1:] = [ast.Constant('Said in other words.')]
        return node


class Recomputed(ast.NodeTransformer):
    "Another number wherever one stands in a return or an assignment"

    def visit_Constant(self, node):
        if type(node.value) in (int, float):
            return ast.Constant(node.value + 1)
        return node


@pytest.fixture
def copied(tmp_path):
    "A copy of the library, with a way to rewrite a function of it"
    folder = tmp_path / 'mope_clip'
    shutil.copytree(ROOT / 'mope_clip', folder, ignore=shutil.ignore_patterns('__pycache__'))

    def rewrite(function, transformer):
        module, path = library_of(folder).find(function)
        place = folder.parent.joinpath(*module.split('.'))
        file = place / '__init__.py' if place.is_dir() else place.with_suffix('.py')
        tree = ast.parse(file.read_text(encoding='utf-8'))
        nodes = [n for n in ast.walk(tree) if getattr(n, 'name', '') == path[-1]]
        assert nodes
        for node in nodes:
            transformer.visit(node)
        file.write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding='utf-8')
        return library_of(folder)

    return rewrite


def library_of(folder):
    from mope_clip.report.code import Library

    return Library(folder)


def refused_load():
    "The record of a run that loads COCO, as far as it comes without the files"
    from mope_clip.data import load_pairs
    from mope_clip.report.code import Recorder

    with Recorder() as recorder, pytest.raises(FileNotFoundError):
        load_pairs('coco', 'test', root='no/such/folder')
    return recorder.functions()


def test_rewording_an_error_of_load_karpathy_makes_nothing_stale(copied):
    from mope_clip.report.code import changed

    record = refused_load()
    (function,) = [name for name in record if name.endswith('.load_karpathy')]
    assert changed(record, copied(function, Reworded())) == []


def test_changing_a_formula_makes_stale_whoever_executed_it(copied):
    from mope_clip.clip import tiny_clip
    from mope_clip.data import synth_pairs
    from mope_clip.evaluate import retrieval
    from mope_clip.report.code import Recorder, changed

    with Recorder() as recorder:
        retrieval(tiny_clip(), synth_pairs(4))
    record = recorder.functions()
    (function,) = [name for name in record if name.endswith('.recalls')]
    assert changed(record, copied(function, Reworded())) == []
    assert function in changed(record, copied(function, Recomputed()))
    assert function not in refused_load()


def test_a_record_of_this_library_holds_as_long_as_it_stays():
    from mope_clip.report.code import changed

    record = refused_load()
    assert len(record) > 1 and all(record.values()) and changed(record) == []


def test_bars_and_locks_are_in_no_record(copied, tmp_path):
    from mope_clip.data.locks import at_work
    from mope_clip.data.progress import progress
    from mope_clip.report.code import AT_START, Recorder

    with Recorder() as recorder, at_work(tmp_path / 'piece'):
        list(progress(range(2)))
    assert recorder.functions() == {}
    walk = 'mope_clip.pruners.search.SearchRun.walk'  # which has a bar
    other = copied('mope_clip.data.progress.Progress', Recomputed())
    assert other.digest != AT_START.digest
    assert other.hash(walk) == AT_START.hash(walk) != ''


def test_a_scene_depends_on_its_ground_and_its_drawings():
    from mope_clip.report.code import AT_START

    code = AT_START.code('mope_clip.data.facts.draw_scene')
    assert 'def empty_ground(' in code and 'def _rasterise(' in code
    code = AT_START.code('mope_clip.data.scenes.scene')
    assert 'def _corpus_kinds(' in code and 'def street_captions(' not in code
