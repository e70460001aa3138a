"What surrounds a run: kernels, homes, launchers, devices, folders, networks."

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from toy import code, prose, write_notebook

from mope_clip.clip import load_clip, tiny_clip
from mope_clip.data import files, network, parallel

# ---- kernels


def test_a_notebook_runs_in_this_python_whatever_kernels_are_installed(toy_repo, monkeypatch):
    from mope_clip.report.runner import run_notebook

    kernel = toy_repo / 'jupyter' / 'kernels' / 'python3'
    kernel.mkdir(parents=True)
    spec = dict(argv=['/bin/false'], display_name='another Python', language='python')
    (kernel / 'kernel.json').write_text(json.dumps(spec), encoding='utf-8')
    for variable in ('JUPYTER_PATH', 'JUPYTER_DATA_DIR'):
        monkeypatch.setenv(variable, str(toy_repo / 'jupyter'))
    cells = code("out_dir: str = ''  # where", ['parameters']), code('import sys\nsys.executable')
    write_notebook(toy_repo / 'nbs' / '10_where.ipynb', prose('# Where'), *cells)
    out = run_notebook('10_where', toy_repo / 'out.ipynb', {})
    assert sys.executable in out.read_text(encoding='utf-8')
    assert os.environ['JUPYTER_PATH'] == str(toy_repo / 'jupyter')


def test_a_variable_that_is_a_relative_path_means_this_folder_in_a_notebook(toy_repo, monkeypatch):
    from mope_clip.report.runner import this_python

    monkeypatch.chdir(toy_repo / 'nbs')
    monkeypatch.setenv('MOPE_CLIP_DATA', '../data')
    with this_python():
        assert Path(os.environ['MOPE_CLIP_DATA']).samefile(toy_repo / 'data')
        assert Path(os.environ['MOPE_CLIP_DATA']).is_absolute()
    assert os.environ['MOPE_CLIP_DATA'] == '../data'


# ---- homes


def test_a_cache_that_cannot_be_written_names_the_variable_that_moves_it(tmp_path, monkeypatch):
    (tmp_path / 'file').touch()  # a folder below a file cannot be made, not even by root
    monkeypatch.setenv('MOPE_CLIP_CACHE', str(tmp_path / 'file' / 'cache'))
    with pytest.raises(OSError, match=r'cannot be written.*set MOPE_CLIP_CACHE'):
        files.cache_dir()
    monkeypatch.delenv('MOPE_CLIP_CACHE')
    monkeypatch.setenv('MOPE_CLIP_DATA', str(tmp_path / 'none'))
    monkeypatch.setenv('HOME', str(tmp_path / 'file'))
    with pytest.raises(OSError, match='set MOPE_CLIP_CACHE'):
        files.cache_dir()


def test_a_read_only_cache_of_the_hub_names_its_variable(monkeypatch):
    from mope_clip.clip.load import why_not

    assert '$HF_HOME' in why_not(PermissionError(13, 'Permission denied', '/home/a'), '')
    assert why_not(OSError('gone'), 'the hub cannot be reached') == 'the hub cannot be reached'


# ---- launchers

WAIT = """
import torch
from mope_clip.data import parallel
parallel.SECONDS_OF_SILENCE = .3
parallel.processes(torch.device('cpu'))
"""


@pytest.mark.parametrize(
    'left', [dict(WORLD_SIZE='4'), dict(WORLD_SIZE='4', RANK='4'), dict(WORLD_SIZE='many')]
)
def test_what_a_launcher_left_over_is_said_at_once(left, monkeypatch):
    for name in parallel.OF_LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match='unset WORLD_SIZE') as e:
        parallel.processes(torch.device('cpu'))
    assert '\n' not in str(e.value)


def test_a_wait_for_processes_that_do_not_exist_is_not_silent():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    left = dict(WORLD_SIZE='2', RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    waiting = subprocess.Popen(
        [sys.executable, '-c', WAIT],
        env={**os.environ, 'PYTHONPATH': str(ROOT), **left},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = waiting.stderr.readline()
        assert line.startswith(f'waiting for 2 processes at 127.0.0.1:{port}, this is number 0')
        assert 'unset WORLD_SIZE' in line
    finally:
        waiting.kill()
        waiting.wait()


# ---- devices


@pytest.mark.parametrize('name', ['gpu', 'foo', 'cuda:99', 'meta', 'cpu:x', 'mps:7', 'xpu'])
def test_an_unknown_device_is_named_before_anything_is_read(name):
    with pytest.raises(ValueError, match=r'^device is ') as e:
        load_clip('no-such-model', device=name)
    assert '\n' not in str(e.value)


def test_a_device_without_float64_is_refused_before_anything_is_read(monkeypatch):
    empty = torch.empty

    def as_on_a_mac(*size, dtype=None, device=None):
        if dtype == torch.double:
            raise TypeError("MPS framework doesn't support float64")
        return empty(*size)

    monkeypatch.setattr(torch, 'empty', as_on_a_mac)
    with pytest.raises(ValueError, match=r"^device is 'mps', which lacks float64, .*: name 'cpu'"):
        load_clip('no-such-model', device='mps')


# ---- folders


def test_somebody_elses_project_is_not_written_into(tmp_path, monkeypatch):
    "A folder with settings.ini and data/ may be of another library that is made of notebooks"
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\nlib_name = theirs\n', encoding='utf-8')
    for folder in ('data', 'nbs'):
        (tmp_path / folder).mkdir()
    write_notebook(tmp_path / 'nbs' / '00_core.ipynb', prose('# Theirs'))
    (tmp_path / 'README.md').write_text('theirs', encoding='utf-8')
    site = tmp_path.parent / f'{tmp_path.name}-site'
    (site / 'lib').mkdir(parents=True)
    (site / 'lib' / 'mope_clip').symlink_to(ROOT / 'mope_clip')
    before = sorted(p.name for p in tmp_path.rglob('*'))
    main = (
        'import sys, pathlib; from mope_clip.data import files; '
        f'files._likely_roots = lambda: [pathlib.Path({str(tmp_path)!r})]; '  # as in a wheel
        'from mope_clip.cli import main; '
        "[print(main(line.split())) for line in ('readme', 'index', 'lessons', 'report --all', "
        "'run 20_finetune', 'report 20_finetune')]"
    )
    home = tmp_path.parent / f'{tmp_path.name}-home'
    made = run(sys.executable, '-c', main, cwd=tmp_path, HOME=home, PYTHONPATH=site / 'lib')
    assert made.stdout.split() == ['1'] * 6, made.stderr
    said = made.stderr.splitlines()
    assert len(said) == 6 and all('they come with the repository' in line for line in said), said
    assert sorted(p.name for p in tmp_path.rglob('*')) == before
    assert (tmp_path / 'README.md').read_text(encoding='utf-8') == 'theirs'


def test_no_list_of_choices_is_empty(toy_repo):
    from mope_clip.report.templates import Template

    with pytest.raises(ValueError, match='choose one of none, since nbs/ holds no template'):
        Template('20_finetune').check()


def test_a_teacher_below_data_is_found_wherever_the_data_folder_is(tmp_path, monkeypatch):
    tiny_clip().save(tmp_path / 'elsewhere' / 'teacher')
    monkeypatch.setenv('MOPE_CLIP_DATA', str(tmp_path / 'elsewhere'))
    monkeypatch.chdir(tmp_path)
    assert len(load_clip('data/teacher').text.blocks) == 2


# ---- networks


@pytest.fixture
def offline(monkeypatch):
    "A hub that nobody answers for, and as many pauses between attempts as there usually are"
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
    monkeypatch.setattr(network, 'is_reached', lambda host: False)


@pytest.mark.parametrize(
    'named', [('ViT-B-32', 'openai'), ('hf-hub:owner/name',), ('ViT-B-16-SigLIP', 'webli')]
)
def test_no_network_is_one_sentence_within_five_seconds(named, offline, capfd):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match='cannot be reached') as e:
        load_clip(*named)
    assert time.monotonic() - began < 5 and '\n' not in str(e.value)
    out, err = capfd.readouterr()
    assert (out, err) == ('', '')


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(network, 'SECONDS_TO_ANSWER', 0.1)
    monkeypatch.setattr(network.urllib.request, 'getproxies', dict)

    def never(*_):
        time.sleep(2)
        raise OSError

    monkeypatch.setattr(network.socket, 'create_connection', never)
    began = time.monotonic()
    assert not network.is_reached('huggingface.co')
    assert time.monotonic() - began < 1


def test_behind_a_proxy_the_libraries_find_out(monkeypatch):
    monkeypatch.setenv('https_proxy', 'http://127.0.0.1:9')
    assert network.is_reached('huggingface.co')


# ---- words


def test_pictures_and_texts_are_encoded_as_they_are():
    clip = tiny_clip()
    picture = Image.new('RGB', (50, 40), 'red')
    ready = clip.preprocess(picture)[None]
    for given in (picture, [picture], (picture,)):
        assert torch.equal(clip.encode_image(given), clip.encode_image(ready))
    ids = clip.tokenizer(['a red square'])
    for given in ('a red square', ['a red square']):
        assert torch.equal(clip.encode_text(given), clip.encode_text(ids))
    odd = (clip.encode_image, ['a.jpg']), (clip.encode_text, [3]), (clip.encode_text, [])
    for call, given in odd:
        with pytest.raises(TypeError, match='takes'):
            call(given)


def test_an_export_says_nothing_of_its_own_on_the_terminal(tmp_path, capfd):
    from mope_clip.pruners import export_hf

    export_hf(tiny_clip(), tmp_path / 'hf')
    assert capfd.readouterr().err == ''


def test_the_configuration_of_a_model_is_no_damaged_model(tmp_path):
    tiny_clip().save(tmp_path / 'm')
    with pytest.raises(ValueError, match='holds no weights: pass the folder of a model, /'):
        load_clip(str(tmp_path / 'm' / 'config.json'))
