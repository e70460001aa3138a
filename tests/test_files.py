"Whole files and folders, progress, and processes, at their edges."

import hashlib
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, run
from PIL import Image

from mope_clip.clip import tiny_clip
from mope_clip.data import files, parallel, progress
from mope_clip.data.files import as_dataset, digest, png, write_atomic, write_folder

# files


def test_the_repository_is_found_by_both_of_its_marks(tmp_path, monkeypatch):
    monkeypatch.delenv('MOPE_CLIP_DATA', raising=False)
    (tmp_path / 'nbs').mkdir()
    settings = tmp_path / 'settings.ini'
    settings.write_text('[DEFAULT]\nlib_name = mope_clip\n', encoding='utf-8')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(files.data_dir.__globals__, '__file__', str(tmp_path / 'a' / 'b' / 'c.py'))
    assert files.data_dir() != tmp_path / 'data'  # one mark alone is not a repository
    (tmp_path / 'data').mkdir()
    monkeypatch.chdir(tmp_path / 'nbs')
    assert files.data_dir() == tmp_path / 'data'  # from a folder below
    settings.write_text('[DEFAULT]\nlib_name = another\n', encoding='utf-8')
    assert files.data_dir() != tmp_path / 'data'  # somebody else's
    monkeypatch.setenv('MOPE_CLIP_DATA', 'elsewhere')
    assert files.data_dir() == Path('elsewhere')


def test_the_cache_lies_beside_the_data_or_where_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.setenv('MOPE_CLIP_DATA', str(tmp_path))
    monkeypatch.delenv('MOPE_CLIP_CACHE', raising=False)
    assert files.cache_dir() == tmp_path / 'cache' and files.cache_dir().is_dir()
    monkeypatch.setenv('MOPE_CLIP_CACHE', str(tmp_path / 'some' / 'where'))
    assert files.cache_dir() == tmp_path / 'some' / 'where' and files.cache_dir().is_dir()


def dies(file):
    file.write(b'half of the ne')
    file.flush()
    raise KeyboardInterrupt


def test_a_writer_that_dies_leaves_the_old_file_or_none(tmp_path):
    path = tmp_path / 'new folder' / 'scores.bin'
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, dies)
    assert not path.exists()
    write_atomic(path, lambda file: file.write(b'old'))
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, dies)
    assert path.read_bytes() == b'old'
    assert [found.name for found in path.parent.iterdir()] == ['scores.bin']
    write_atomic(path, lambda file: file.write(b'new'))
    assert path.read_bytes() == b'new'


def two_files(text):
    "A writer of a folder with two files"

    def write(folder):
        (folder / 'config.json').write_text(json.dumps(dict(said=text)), encoding='utf-8')
        (folder / 'model.safetensors').write_text(text, encoding='utf-8')

    return write


def said_in(folder):
    return json.loads((folder / 'config.json').read_text(encoding='utf-8'))['said']


def breaks(folder):
    (folder / 'config.json').write_text('half', encoding='utf-8')
    raise OSError('the disk is full')


@pytest.mark.parametrize('can_exchange', [True, False])
def test_a_folder_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, '_exchange', lambda one, other: False)
    folder = tmp_path / 'models' / 'small'
    for text in ('first', 'second'):
        write_folder(folder, two_files(text))
        assert said_in(folder) == text
        assert (folder / 'model.safetensors').read_text(encoding='utf-8') == text
        with pytest.raises(OSError, match='the disk is full'):
            write_folder(folder, breaks)
        assert said_in(folder) == text
        assert [path.name for path in folder.parent.iterdir()] == ['small']  # nothing temporary


def test_a_folder_with_anything_but_a_model_is_never_replaced(tmp_path):
    folder = tmp_path / 'small'
    write_folder(folder, two_files('third'))
    (folder / 'thesis.txt').write_text('years', encoding='utf-8')
    (folder / 'photos').mkdir()
    sentence = 'small holds photos and 1 more, which saving a model there would delete'
    with pytest.raises(ValueError, match=sentence):
        write_folder(folder, two_files('fourth'))
    assert said_in(folder) == 'third'
    assert (folder / 'thesis.txt').read_text(encoding='utf-8') == 'years'
    with pytest.raises(ValueError, match=r'thesis\.txt'):
        files.refuse_foreign(folder / 'thesis.txt')  # a file


@pytest.mark.parametrize('name', ['my_adapter.safetensors', 'quantised.onnx', 'README.md'])
def test_what_a_user_adds_to_a_model_is_not_replaced(name, tmp_path):
    tiny_clip().save(tmp_path / 'small')
    tiny_clip(seed=1).save(tmp_path / 'small')  # a model is
    (tmp_path / 'small' / name).write_text('# What we found', encoding='utf-8')
    with pytest.raises(ValueError, match=f'small holds {name}, which saving a model there'):
        tiny_clip().save(tmp_path / 'small')
    assert (tmp_path / 'small' / name).read_text(encoding='utf-8') == '# What we found'


def test_refuse_raises_the_error_that_is_named():
    files.refuse([], 'nothing')
    with pytest.raises(ValueError, match=r'the cause: the cure\.'):
        files.refuse(['x'], 'the cause: the cure.')
    with pytest.raises(FileNotFoundError):
        files.refuse(True, 'gone', FileNotFoundError)


def test_the_first_line_of_an_error_ends_without_a_stop():
    assert files.first_line(OSError('no route.\nTry again.')) == 'OSError: no route'
    assert files.first_line(TimeoutError()) == 'TimeoutError'


def test_a_digest_depends_on_the_order_of_its_words_and_on_nothing_else():
    known = int(hashlib.sha256(b'pair/cat/1').hexdigest()[:16], 16)
    assert digest('pair', 'cat', 1) == known
    assert digest('a', 'b') != digest('b', 'a')


def test_a_data_set_without_rows_has_the_same_columns():
    picture = Image.effect_mandelbrot((32, 32), (-2, -2, 2, 2), 9).convert('RGB')
    full = as_dataset(dict(image=[png(picture)], name=['first']), 'image', 'test', name='string')
    empty = as_dataset(dict(image=[], name=[]), 'image', 'test', name='string')
    assert (full.column_names, str(full.split), full[0]['name']) == (
        ['image', 'name'],
        'test',
        'first',
    )
    assert full[0]['image'].convert('RGB').tobytes() == picture.tobytes()
    assert empty.features == full.features


# progress

LOOP = """
import sys, time
from mope_clip.data import progress as room
room.SECONDS_BETWEEN_LINES = .05
for k in room.progress(range(20), what='counting'):
    time.sleep(.01)
shown = room.Progress(3)
shown.advance(2)
shown.update(3, 'done')
shown.close()
for k in room.progress(range(20)):
    if k == 9: break
print('the result')
"""


def script(stderr, switch='1'):
    "Run the loop as a script, its result read from a pipe"
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'MOPE_CLIP_PROGRESS': switch, 'COLUMNS': '100'}
    found = subprocess.run(
        [sys.executable, '-c', LOOP],
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=env,
        timeout=120,
        check=True,
    )
    return found.stdout.decode(), (found.stderr or b'').decode()


LINE = r'\d+/20, \d+:\d\d:\d\d left(, counting)?'


def test_progress_in_a_pipe_is_lines_on_standard_error():
    out, err = script(subprocess.PIPE)
    assert out == 'the result\n'
    assert '\r' not in err and err.splitlines()
    assert all(re.fullmatch(LINE, line) for line in err.splitlines()), err


def test_progress_in_a_file_is_lines_without_carriage_returns(tmp_path):
    with open(tmp_path / 'log', 'wb') as file:
        out, _ = script(file)
    text = (tmp_path / 'log').read_bytes().decode()
    assert out == 'the result\n'
    assert '\r' not in text and re.fullmatch(LINE, text.splitlines()[0]), text


def test_progress_on_a_terminal_is_a_bar_and_the_result_stays_on_standard_output():
    ours, theirs = pty.openpty()
    out, _ = script(theirs)
    os.close(theirs)
    seen = b''
    try:
        while data := os.read(ours, 65536):
            seen += data
    except OSError:  # the terminal has closed
        pass
    os.close(ours)
    assert out == 'the result\n'
    assert '\r' in seen.decode() and '[20/20' in seen.decode() and 'counting' in seen.decode()
    *_, last = seen.decode().rstrip('\r\n').split('\r')
    assert not last.strip()  # the bar is gone, also after a loop that ended early


SLOW = """
import sys, time
from mope_clip.data import progress as room
room.SECONDS_BETWEEN_LINES = .2
shown = room.Progress(3, 'layers')
time.sleep(.5)
shown.close()
room.Progress(3, 'short').close()
patient = room.Progress(3, 'patient', patience=9)
patient.update(1)
time.sleep(.5)
"""


def test_work_whose_first_step_is_long_is_heard_all_the_same():
    found = run(sys.executable, '-c', SLOW, MOPE_CLIP_PROGRESS='1', PYTHONPATH=str(ROOT))
    assert found.stderr.splitlines() == ['0/3, layers']


def test_the_pace_is_that_of_this_run(monkeypatch, capsys):
    monkeypatch.setenv('MOPE_CLIP_PROGRESS', '1')
    monkeypatch.setattr(progress, 'SECONDS_BETWEEN_LINES', 0.0)
    now = [0.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    shown = progress.Progress(100, done=90)
    now[0] = 10.0
    shown.update(95)
    shown.close()
    assert '95/100, 0:00:10 left' in capsys.readouterr().err


def test_a_notebook_keeps_no_bar(monkeypatch):
    kept = []

    class Place:
        def update(self, data, raw):
            kept[:] = [data]

    def display(data, raw, display_id):
        kept.append(data)
        return Place()

    monkeypatch.setenv('MOPE_CLIP_PROGRESS', '1')
    monkeypatch.setattr('IPython.display.display', display)
    monkeypatch.setattr(progress, 'in_notebook', lambda: True)
    shown = progress.Progress(4, '<b>')
    shown.update(4)
    assert 'value="4" max="4"' in kept[0]['text/html'] and '&lt;b&gt;' in kept[0]['text/html']
    shown.close()
    assert kept == [{'text/plain': ''}]
    kept.clear()
    with closing(progress.progress(range(3))) as loop:
        next(loop)
        assert 'max="3"' in kept[0]['text/html']
    assert kept == [{'text/plain': ''}], 'also where a loop was interrupted'


REMARKS = """
import logging, sys, types, warnings
sys.modules['ipywidgets'] = None  # not installed
kernel = types.SimpleNamespace(config={'IPKernelApp': {}}, kernel=1)
sys.modules['IPython'] = types.ModuleType('IPython')
sys.modules['IPython'].get_ipython = lambda: kernel
import mope_clip.clip
from tqdm.auto import tqdm
import torch
logging.getLogger('torch.utils.cpp_extension').warning("No CUDA runtime is found, using %r", 'x')
logging.getLogger('torch.utils.cpp_extension').warning('something of use')
"""


def test_no_library_remarks_on_a_machine_without_fault():
    found = run(sys.executable, '-c', REMARKS, PYTHONPATH=str(ROOT))
    assert found.returncode == 0, found.stderr
    assert 'TqdmWarning' not in found.stderr and 'CUDA' not in found.stderr
    assert 'something of use' in found.stderr


def test_progress_is_silent_where_it_is_switched_off(monkeypatch):
    assert script(subprocess.PIPE, switch='0') == ('the result\n', '')
    work = [1, 2, 3]
    monkeypatch.setenv('MOPE_CLIP_PROGRESS', '0')
    assert progress.progress(work) is work
    assert files.progress is progress.progress and files.Progress is progress.Progress


def test_progress_needs_the_number_of_what_has_no_length(monkeypatch):
    monkeypatch.setenv('MOPE_CLIP_PROGRESS', '1')
    assert list(progress.progress(iter([1, 2, 3]), total=3)) == [1, 2, 3]
    assert list(progress.progress([])) == []
    with pytest.raises(TypeError, match=r'len\(\)'):
        progress.progress(iter([1]))


def test_of_several_processes_one_shows_progress(monkeypatch):
    monkeypatch.setenv('MOPE_CLIP_PROGRESS', '1')
    monkeypatch.setenv('RANK', '1')
    assert progress.where_shown() == 'log'  # a number that was left over
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert progress.where_shown() == 'nowhere'
    monkeypatch.setenv('RANK', '0')
    assert progress.where_shown() == 'log'


# processes


def test_one_process_gets_back_what_it_gives():
    alone = parallel.World()
    assert alone.main and not parallel.World(rank=1, size=2).main
    assert torch.equal(alone.mean(torch.ones(2)), torch.ones(2))
    assert (alone.largest(7), alone.share('x'), alone.collect('x')) == (7, 'x', ['x'])
    assert parallel.processes(torch.device('cpu')) == alone and not dist.is_initialized()


PARTING = """
import torch, torch.distributed as dist
from mope_clip.data.parallel import processes
world = processes(torch.device('cpu'))
assert world.size == 2 and world.main == (world.rank == 0)
assert world.collect(world.rank) == [0, 1] and world.share(world.rank) == 0
assert world.largest(world.rank) == 1 and world.mean(torch.tensor([float(world.rank)])) == .5
works = [dist.all_reduce(torch.ones(1000), async_op=True) for _ in range(8)]
[work.wait() for work in works]
world.collect(list(range(1000)))
"""


def test_two_processes_agree_and_end_by_themselves(tmp_path):
    (tmp_path / 'parting.py').write_text(PARTING, encoding='utf-8')
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    found = run(*launcher, tmp_path / 'parting.py', PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    assert found.returncode == 0, found.stderr[-3000:]


def test_a_bar_of_another_library_is_no_output_to_keep():
    "A widget has another identity every time it is rendered, and shows nothing without a kernel"
    from mope_clip.report.runner import is_noise

    widget = {'application/vnd.jupyter.widget-view+json': {}, 'text/plain': 'Writing: 0%|'}
    assert is_noise(dict(output_type='display_data', data=widget))
    assert not is_noise(dict(output_type='display_data', data={'text/plain': '42'}))
