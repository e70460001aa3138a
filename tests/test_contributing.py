"What CONTRIBUTING.md shows: each addition is made in a copy of the repository, counted and used."

import ast
import json
import re
import shutil
import sys
from dataclasses import dataclass, field

import jupytext
import nbformat
import pytest
from conftest import ROOT, run
from samples import jpeg
from toy import KERNEL

from mope_clip.data.files import cache_dir

FILES = {
    'A metric': 2,
    'A loss': 2,
    'A data set': 1,
    'A model family': 2,
    'An embedded task': 2,
    'A report': 2,
}
PLACE = re.compile(r'(In|New,) `(?P<file>\S+)`(, below `(?P<name>\w+)`|, at the end)?:')
BLOCK = re.compile(r'(?P<before>[^\n]*)\n\n```\w+\n(?P<code>.*?)```', re.DOTALL)
SMALLER = (
    '-p tower text -p images_scored 8 -p images_evaluated 16 -p pairs_width 16 -p pairs_depth 16'
)


@dataclass
class Addition:
    "What a section of the page shows"

    blocks: list = field(default_factory=list)  # of (file, name below which it goes or '', code)
    uses: str = ''  # code that uses it
    commands: list = field(default_factory=list)  # of `mope`


def read_page() -> dict:
    "Title of a section -> `Addition`"
    page, found = (ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8'), {}
    for section in page.split('\n### ')[1:]:
        title, text = section.split('\n', 1)
        made = found[title] = Addition(commands=re.findall(r'(?m)^    mope (.+)$', text))
        for block in BLOCK.finditer(text):
            place = PLACE.fullmatch(block['before'])
            if place:
                made.blocks.append((place['file'], place['name'] or '', block['code']))
            else:
                made.uses += block['code']
    return found


ADDITIONS = read_page()


def end_of(name: str, code: str) -> int:
    "The last line of the statement that defines a name; 0 where none does"
    for node in ast.parse(code).body:
        targets = getattr(node, 'targets', [getattr(node, 'target', node)])
        names = [getattr(target, 'id', getattr(target, 'name', '')) for target in targets]
        if name in names:
            return node.end_lineno
    return 0


def put_into_notebook(path, name, code):
    "Cells behind the one that defines a name, or a notebook of its own"
    cells = jupytext.reads(code if '# %%' in code else f'# %%\n{code}', 'py:percent').cells
    if not name:
        return nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), path)
    notebook = nbformat.read(path, 4)
    sources = [cell.source if cell.cell_type == 'code' else '' for cell in notebook.cells]
    [place] = [k for k, source in enumerate(sources) if end_of(name, source)]
    notebook.cells[place + 1 : place + 1] = cells
    nbformat.write(notebook, path)


def put(path, name, code):
    "Do what the line above a block says"
    if path.suffix == '.ipynb':
        return put_into_notebook(path, name, code)
    old = path.read_text(encoding='utf-8') if path.is_file() else ''
    lines = old.splitlines(keepends=True)
    place = end_of(name, old) if name else len(lines)
    assert not name or place, f'{path} does not define {name}'
    gap = '\n\n' if old and not name else ''
    path.write_text(''.join([*lines[:place], gap, code, *lines[place:]]), encoding='utf-8')


def contents(root) -> dict:
    "Everything that is written by hand"
    files = [path for name in ('nbs', 'tests', 'data') for path in (root / name).rglob('*.*')]
    kept = [path for path in files if path.is_file() and '__pycache__' not in path.parts]
    return {str(path.relative_to(root)): path.read_bytes() for path in kept}


def write_flickr8k(root):
    "Flickr8k in miniature, where it is looked for"
    pictures = root / 'data' / 'flickr8k' / 'Flicker8k_Dataset'
    pictures.mkdir(parents=True)
    (pictures / '1.jpg').write_bytes(jpeg())
    said = [dict(raw='A dog runs.'), dict(raw='A brown dog.')]
    entry = dict(filename='1.jpg', split='test', sentences=said)
    text = json.dumps(dict(images=[entry]))
    pictures.with_name('dataset_flickr8k.json').write_text(text, encoding='utf-8')


# what each section leaves behind, in the names of its own code
PROOFS = {
    'A metric': """
from mope_clip.clip import shape_of
assert shape_of(small)['vision'] == [[2, 64]] * 3
""",
    'A loss': """
assert training.history[-1]['within_loss'] > 0 and 'sim_loss' not in training.history[-1]
""",
    'A data set': """
from mope_clip.data.corpora import about, karpathy_root
assert flickr8k[0]['captions'] == ['A dog runs.', 'A brown dog.']
assert about(flickr8k)['label'] == 'not the Karpathy split'
try:
    karpathy_root('flickr8k', 'elsewhere')
except FileNotFoundError as e:
    assert 'Flicker8k_Dataset' in str(e)
""",
    'A model family': """
from test_clip import CONFIG, Clip, gated_model
gated = Clip(gated_model(), None, None, CONFIG)
half = prune(gated, plan_width(score_by('magnitude', gated), keep=0.5))
assert half.vision.blocks[0].mlp.c_gate.weight.shape == (64, 32)
assert half.encode_image(torch.randn(2, 3, 32, 32)).shape == (2, 32)
""",
    'An embedded task': """
assert scenes[7]['image_id'] == 'openmoji-pairs/validation/7' and scores.score.notna().all()
plan_width(scores)
""",
}
USE = """
import json, sys, traceback
from pathlib import Path

import pytest, torch

sys.path.insert(0, 'tests')
asked, names, wrong = json.loads(Path('asked.json').read_text()), dict(torch=torch), {}
for title, code in asked['code'].items():
    try:
        exec(compile(code, title, 'exec'), names)
    except Exception:
        wrong[title] = traceback.format_exc()
if pytest.main(['-q', '-p', 'no:cacheprovider', '-k', asked['tests'], *asked['files']]):
    wrong['tests'] = 'see above'
from mope_clip.cli import main
for command in asked['commands']:
    if main(command.split()):
        wrong[command] = 'see above'
Path('wrong.json').write_text(json.dumps(wrong))
"""


def ask(root):
    "Write down what is to be executed in the copy"
    blocks = [block for made in ADDITIONS.values() for block in made.blocks]
    files = sorted({file for file, _, _ in blocks if file.startswith('tests/')})
    tests = re.findall(r'def (test_\w+)', ''.join(code for _, _, code in blocks))
    tests.append('test_scenes_are_the_same_on_every_machine')
    commands = [c for made in ADDITIONS.values() for c in made.commands if '--scale smoke' in c]
    commands = [f'{c} {SMALLER}' if '20_finetune' in c else f'{c} -p metric l1' for c in commands]
    code = {title: made.uses + PROOFS.get(title, '') for title, made in ADDITIONS.items()}
    asked = dict(code=code, files=files, tests=' or '.join(tests), commands=commands)
    (root / 'asked.json').write_text(json.dumps(asked), encoding='utf-8')
    (root / 'use.py').write_text(USE, encoding='utf-8')


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    "A copy of the repository with all additions, exported; and which files each of them touched"
    root, touched = tmp_path_factory.mktemp('copy'), {}
    ignored = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for name in ('nbs', 'mope_clip', 'tests'):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    for name in ('settings.ini', 'setup.py', 'pyproject.toml'):
        shutil.copy(ROOT / name, root / name)
    (root / 'data').mkdir()
    for name in ('teacher', 'teacher-openmoji'):
        (root / 'data' / name).symlink_to(ROOT / 'data' / name)
    for title, addition in ADDITIONS.items():
        before = contents(root)
        for file, name, code in addition.blocks:
            put(root / file, name, code)
        after = contents(root)
        touched[title] = {file for file in after if after[file] != before.get(file)}
    made = run(sys.executable, '-c', 'import nbdev; nbdev.nbdev_export()', cwd=root)
    assert made.returncode == 0, made.stderr[-2000:]
    return root, touched


@pytest.fixture(scope='module')
def used(copy):
    "The copy after all was used in one process: title, command or 'tests' -> what went wrong"
    root, _ = copy
    write_flickr8k(root)
    ask(root)
    places = dict(PYTHONPATH=str(root), MOPE_CLIP_DATA=str(root / 'data'))
    places['MOPE_CLIP_CACHE'] = str(cache_dir())
    made = run(sys.executable, '-W', 'ignore', 'use.py', cwd=root, **places)
    assert (root / 'wrong.json').is_file(), made.stdout[-2000:] + made.stderr[-2000:]
    wrong = json.loads((root / 'wrong.json').read_text(encoding='utf-8'))
    return root, wrong, made.stdout[-2000:] + made.stderr[-2000:]


@pytest.mark.parametrize('title', FILES)
def test_an_addition_touches_so_few_files(copy, title):
    _, touched = copy
    assert len(touched[title]) == FILES[title], touched[title]


def test_the_page_shows_no_other_additions(copy):
    _, touched = copy
    assert list(touched) == list(FILES)


def test_what_is_shown_is_formatted_and_checked(copy):
    root, touched = copy
    files = [file for several in touched.values() for file in several if '.yaml' not in file]
    for command in (['format', '--check'], ['check']):
        r = run(sys.executable, '-m', 'ruff', *command, *files, cwd=root)
        assert r.returncode == 0, r.stdout[-3000:]


@pytest.mark.parametrize('title', FILES)
def test_an_addition_works(used, title):
    _, wrong, _ = used
    assert title not in wrong, wrong[title]


def test_the_tests_of_all_additions_pass(used):
    _, wrong, said = used
    assert 'tests' not in wrong, said


def test_the_metric_is_a_parameter_of_the_main_job_and_of_the_new_report(used):
    root, wrong, said = used
    assert not [name for name in wrong if name.startswith('report')], said
    for name in ('20_finetune', '55_heads'):
        [path] = root.glob(f'runs/{name}-smoke-*/report/results.json')  # of these parameters
        results = json.loads(path.read_text(encoding='utf-8'))
        assert results['parameters']['metric'] == 'l1' and len(results['claims']) == 1
    assert (path.parent / 'heads.png').is_file() and (path.parent / 'heads.csv').is_file()
