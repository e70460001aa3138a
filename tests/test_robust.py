"The worst day of an operator: foreign code, foreign files, damage of every kind."

import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import run, uneven_tiny

from mope_clip.clip import load_clip, tiny_clip, weights_hash
from mope_clip.clip.folders import save_open_clip, seal


def says(error: type, sentence: str):
    return pytest.raises(error, match=re.escape(sentence))


def change(file: Path, **settings):
    "Other settings in a file of JSON"
    content = json.loads(file.read_text(encoding='utf-8'))
    content.update(settings)
    file.write_text(json.dumps(content), encoding='utf-8')


@pytest.fixture(scope='module')
def tiny():
    return tiny_clip()


# ---- somebody else's code

EVIL = """
from pathlib import Path
Path({mark!r}).write_text('ran')
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""


def lay_code(folder: Path) -> Path:
    "A tokenizer that names a Python file of its folder; -> the file that shows that it ran"
    mark = folder.parent / 'ran'
    (folder / 'evil.py').write_text(EVIL.format(mark=str(mark)), encoding='utf-8')
    auto_map = dict(AutoTokenizer=['evil.Evil', 'evil.Evil'])
    change(folder / 'tokenizer_config.json', auto_map=auto_map, tokenizer_class='Evil')
    return mark


def write_open_clip(clip, folder: Path) -> Path:
    "The model as a folder of open_clip's; -> its configuration"
    save_open_clip(clip, folder)
    return folder / 'open_clip_config.json'


def with_tokenizer_settings(file: Path, **options):
    content = json.loads(file.read_text(encoding='utf-8'))
    content['model_cfg']['text_cfg']['tokenizer_kwargs'] = options
    file.write_text(json.dumps(content), encoding='utf-8')


@pytest.mark.parametrize('kind', ['ours', 'open_clip'])
def test_no_folder_runs_python_through_its_tokenizer(tiny, tmp_path, kind):
    folder = tmp_path / 'm'
    if kind == 'ours':
        tiny.save(folder)
    else:
        write_open_clip(tiny, folder)
    file = folder / ('config.json' if kind == 'ours' else 'open_clip_config.json')
    mark = lay_code(folder)
    with_tokenizer_settings(file, trust_remote_code=True)
    if kind == 'ours':
        seal(folder)
    with says(ValueError, 'trust_remote_code=True is none of'):
        load_clip(folder)
    with_tokenizer_settings(file)
    if kind == 'ours':
        seal(folder)
    with says(ValueError, 'auto_map'):
        load_clip(folder)
    assert not mark.exists()


@pytest.mark.parametrize('name', ['local-dir:{}', 'hf-hub:somebody/else', '{}', 'ViT-B-99', 3])
def test_a_folder_names_its_tokenizer_by_a_model_and_not_by_a_place(tmp_path, name):
    other = tmp_path / 'other'
    write_open_clip(tiny_clip(), other)
    mark = lay_code(other)
    clip = uneven_tiny()
    clip.tokenizer = None
    clip.config = dict(clip.config, tokenizer='ViT-B-32')
    clip.save(tmp_path / 'm')
    name = name.format(other) if isinstance(name, str) else name
    change(tmp_path / 'm' / 'config.json', tokenizer=name)
    seal(tmp_path / 'm')
    with says(ValueError, 'is that of no model of open_clip'):
        load_clip(tmp_path / 'm')
    assert not mark.exists()


@pytest.mark.parametrize('key', ['hf_model_name', 'timm_model_name'])
def test_a_tower_is_not_fetched_from_another_folder(tiny, tmp_path, key):
    file = write_open_clip(tiny, tmp_path / 'm')
    content = json.loads(file.read_text(encoding='utf-8'))
    content['model_cfg']['text_cfg'][key] = str(tmp_path)
    file.write_text(json.dumps(content), encoding='utf-8')
    with says(ValueError, 'a place on this disk'):
        load_clip(tmp_path / 'm')


def test_a_saved_folder_without_its_hash_is_refused_with_the_command_that_writes_it(tmp_path):
    clip = uneven_tiny()
    clip.save(tmp_path / 'm')
    file = tmp_path / 'm' / 'config.json'
    content = json.loads(file.read_text(encoding='utf-8'))
    content.pop('settings')
    file.write_text(json.dumps(content), encoding='utf-8')
    with pytest.raises(ValueError, match='seal') as e:
        load_clip(tmp_path / 'm')
    code = re.search(r'python -c "(.*)"', str(e.value))[1]
    exec(code)
    assert weights_hash(load_clip(tmp_path / 'm')) == weights_hash(clip)


@pytest.mark.parametrize('name', ['../out.safetensors', '/etc/passwd', 'sub/out.bin'])
def test_an_index_of_weights_reads_no_file_outside_its_folder(tmp_path, name):
    from mope_clip.clip.weights import read_weights

    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps(dict(weight_map=dict(logit_scale=name))), encoding='utf-8')
    with says(ValueError, 'outside its folder'):
        read_weights(tmp_path)


@pytest.mark.parametrize('map', [3, None, [], {}, dict(a=3), dict(a=None), dict(a='')])
def test_an_index_without_files_is_said(tmp_path, map):
    from mope_clip.clip.weights import read_weights

    index = tmp_path / 'model.safetensors.index.json'
    index.write_text(json.dumps(dict(weight_map=map)), encoding='utf-8')
    with says(ValueError, 'names no files of weights'):
        read_weights(tmp_path)


# ---- models that are not what their configuration says


@pytest.mark.parametrize('tower', ['vision_cfg', 'text_cfg'])
@pytest.mark.parametrize('kind', ['ours', 'open_clip'])
def test_thirteen_thousand_layers_are_refused_at_once(tiny, tmp_path, tower, kind):
    if kind == 'ours':
        tiny.save(tmp_path / 'm')
        file = tmp_path / 'm' / 'config.json'
    else:
        file = write_open_clip(tiny, tmp_path / 'm')
    content = json.loads(file.read_text(encoding='utf-8'))
    content['model_cfg'][tower]['layers'] = 13142
    file.write_text(json.dumps(content), encoding='utf-8')
    if kind == 'ours':
        seal(tmp_path / 'm')
    with says(ValueError, '13,142'):
        load_clip(tmp_path / 'm')


@pytest.mark.parametrize('setting', ['width', 'vocab_size', 'context_length'])
def test_sizes_are_held_against_the_weights_before_anything_is_built(tiny, tmp_path, setting):
    file = write_open_clip(tiny, tmp_path / 'm')
    content = json.loads(file.read_text(encoding='utf-8'))
    content['model_cfg']['text_cfg'][setting] = 2**40
    file.write_text(json.dumps(content), encoding='utf-8')
    with says(ValueError, 'do not fit its configuration'):
        load_clip(tmp_path / 'm')


def test_a_compiled_model_is_saved_as_what_it_is(tmp_path):
    clip = uneven_tiny()
    whole = weights_hash(clip)
    clip.model = torch.compile(clip.model)
    assert weights_hash(clip) == whole
    clip.save(tmp_path / 'm')
    assert weights_hash(load_clip(tmp_path / 'm')) == whole
    dense = tiny_clip()
    dense.model = torch.compile(dense.model)
    save_open_clip(dense, tmp_path / 'dense', torch.float32)
    assert weights_hash(load_clip(tmp_path / 'dense')) == weights_hash(dense)


def test_transformers_does_not_take_a_pruned_folder_for_a_clip_of_its_own(tmp_path):
    from transformers import AutoModel, CLIPModel

    uneven_tiny().save(tmp_path / 'm')
    for kind in (AutoModel, CLIPModel):
        with pytest.raises(Exception, match='mope_clip'):
            kind.from_pretrained(tmp_path / 'm')


# ---- somebody else's files


def says_other(folder, name, text='mine'):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding='utf-8')


@pytest.mark.parametrize(
    'files',
    [
        ['README.md', 'vocab.py'],
        ['README.md'],
        ['config.json'],
        ['config.json', 'README.md', 'model.safetensors'],
        ['open_clip_config.json'],
        ['made_by.json'],
    ],
)
def test_a_folder_that_only_looks_like_a_model_is_not_replaced(tiny, tmp_path, files):
    for name in files:
        says_other(tmp_path / 'project', name, '{"name": "a project of somebody"}')
    for save in (tiny.save, lambda folder: save_open_clip(tiny, folder)):
        with pytest.raises(ValueError, match='choose another folder'):
            save(tmp_path / 'project')
    assert sorted(path.name for path in (tmp_path / 'project').iterdir()) == sorted(files)


def test_every_kind_of_folder_that_this_library_writes_may_be_replaced_by_another(tiny, tmp_path):
    for save in (tiny.save, lambda folder: save_open_clip(tiny, folder)) * 2:
        save(tmp_path / 'm')
        assert weights_hash(load_clip(tmp_path / 'm'))


def test_the_embedded_teachers_may_be_trained_again():
    from mope_clip.data.files import data_dir, refuse_foreign

    for folder in data_dir().glob('teacher*'):
        if folder.is_dir():
            refuse_foreign(folder)


def test_a_file_that_comes_while_a_model_is_saved_is_kept(tmp_path):
    from mope_clip.data.files import write_folder

    folder = tmp_path / 'm'
    uneven_tiny().save(folder)
    before = (folder / 'config.json').read_bytes()
    with says(ValueError, 'holds notes.txt, which saving a model there would delete'):
        write_folder(folder, lambda new: says_other(folder, 'notes.txt'))
    assert (folder / 'notes.txt').read_text(encoding='utf-8') == 'mine'
    assert (folder / 'config.json').read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ['m']


def test_the_old_report_stays_until_the_new_one_is_whole(toy_repo, monkeypatch):
    from mope_clip.report import runner

    old = toy_repo / 'reports' / '20_toy'
    says_other(old, 'results.json', '{"provenance": {}}')
    says_other(toy_repo / 'runs', '20_toy.ipynb', 'no notebook at all')
    monkeypatch.setattr(runner, 'longest_run', lambda results: 0)
    with pytest.raises(ValueError):
        runner.store('20_toy', toy_repo / 'runs', old, 'full', 0.0)
    assert [path.name for path in old.iterdir()] == ['results.json']
    assert [path.name for path in old.parent.iterdir()] == ['20_toy']


@pytest.mark.parametrize('chosen', ['', 'mine'])
def test_a_run_with_other_parameters_is_not_overwritten_wherever_it_is(toy_repo, chosen):
    from mope_clip.report.parameters import run_dir

    out_dir = str(toy_repo / chosen) if chosen else ''
    done = run_dir('20_finetune', 'coco', out_dir) / 'results.json'
    done.write_text(json.dumps(dict(parameters=dict(keep=0.5, out_dir=out_dir))))
    run_dir('20_finetune', 'coco', out_dir, dict(keep=0.5, out_dir=out_dir))
    with says(ValueError, 'holds a finished run with keep 0.5'):
        run_dir('20_finetune', 'coco', out_dir, dict(keep=0.25, out_dir=out_dir))
    done.write_text('{')
    with says(ValueError, 'is no JSON'):
        run_dir('20_finetune', 'coco', out_dir, dict(keep=0.5, out_dir=out_dir))


# ---- what dead processes leave

KILLED = """
import os, signal, sys
from pathlib import Path
from mope_clip.data.files import write_atomic, write_folder
def dies(place):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == 'file':
    write_atomic(Path(sys.argv[2]), dies)
else:
    write_folder(Path(sys.argv[2]), dies)
"""


@pytest.mark.parametrize('kind', ['file', 'folder'])
def test_the_next_save_removes_what_killed_ones_left(tmp_path, kind):
    from mope_clip.data.files import write_atomic, write_folder
    from mope_clip.data.locks import GRACE

    place = tmp_path / 'm'
    run(sys.executable, '-c', KILLED, kind, place)
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and not place.exists()
    for path in left:
        os.utime(path, (0, time.time() - GRACE - 1))
    if kind == 'file':
        write_atomic(place, lambda file: file.write(b'whole'))
    else:
        write_folder(place, lambda new: says_other(new, 'config.json', '{}'))
    assert [path.name for path in tmp_path.iterdir()] == ['m']


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    from mope_clip.data.files import write_atomic

    def slow(file):
        (hidden,) = tmp_path.iterdir()
        os.utime(hidden, (0, 0))
        write_atomic(tmp_path / 'other', lambda other: other.write(b'quick'))
        file.write(b'slow')

    write_atomic(tmp_path / 'one', slow)
    texts = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert texts == dict(one=b'slow', other=b'quick')
