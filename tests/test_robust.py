"The worst day of an operator: foreign code, foreign files, damage of every kind."

import errno
import io
import itertools
import json
import os
import re
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run, uneven_tiny
from PIL import Image
from samples import add, write_shard

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


# ---- pictures, text and names


def saved(picture, kind='PNG', **how):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **how)
    return buffer.getvalue()


def ramp(dtype, most, side=32):
    "Grey from black to white"
    return np.linspace(0, most, side * side).reshape(side, side).astype(dtype)


ODD_PICTURES = dict(
    grey_of_16_bits=saved(Image.fromarray(ramp(np.uint16, 65535))),
    tiff_of_16_bits=saved(Image.fromarray(ramp(np.uint16, 65535)), 'TIFF'),
    float_tiff=saved(Image.fromarray(ramp(np.float32, 1.0)), 'TIFF'),
    float_tiff_to_255=saved(Image.fromarray(ramp(np.float32, 255.0)), 'TIFF'),
    tiff_of_32_bits=saved(Image.fromarray(ramp(np.int32, 65535)), 'TIFF'),
)


@pytest.mark.parametrize('data', ODD_PICTURES.values(), ids=list(ODD_PICTURES))
def test_deep_grey_is_grey_for_whoever_reads_it(tiny, tmp_path, data):
    from mope_clip.data.columns import IMG2DATASET, as_pair

    plain = tiny.preprocess(Image.fromarray(ramp(np.float64, 255).round().astype(np.uint8)))
    of_stream = as_pair(dict(jpg=data, txt=b'a', __key__='1'), IMG2DATASET)['image']
    of_set = Image.open(io.BytesIO(data))
    for picture in (of_stream, of_set):
        assert (tiny.preprocess(picture) - plain).abs().max() < 0.02


def test_a_camera_held_sideways_gives_the_same_picture_to_scoring_and_to_training(tiny, tmp_path):
    from mope_clip.data import load_labelled
    from mope_clip.data.columns import IMG2DATASET, as_pair

    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.effect_noise((64, 48), 80).convert('RGB')
    data = saved(picture, 'JPEG', exif=exif)
    for name in ('a', 'b'):
        (tmp_path / 'test' / name).mkdir(parents=True)
        (tmp_path / 'test' / name / '1.jpg').write_bytes(data)
    streamed = as_pair(dict(jpg=data, txt=b'a', __key__='1'), IMG2DATASET)['image']
    loaded = load_labelled(str(tmp_path), 'test')[0]['image']
    assert streamed.size == loaded.size == (48, 64)
    assert torch.equal(tiny.preprocess(streamed), tiny.preprocess(loaded))
    assert torch.equal(tiny.preprocess(streamed), tiny.preprocess(Image.open(io.BytesIO(data))))


def test_ordinary_pictures_pass_untouched():
    from mope_clip.data.pictures import upright

    for mode in ('RGB', 'L', 'RGBA', 'P', 'CMYK', '1'):
        picture = Image.new(mode, (5, 4))
        assert upright(picture) is picture


@pytest.mark.parametrize('size', [(1, 1), (7, 7), (3, 500), (500, 7)])
def test_a_narrow_jpeg_is_readable(size):
    from mope_clip.data.pictures import unreadable

    assert unreadable(saved(Image.new('RGB', size), 'JPEG')) == ''


def test_no_picture_is_unreadable_and_no_traceback():
    from mope_clip.data.pictures import unreadable

    assert 'no picture' in unreadable(None) and 'no picture' in unreadable(dict(bytes=None))


LITTER = '.ipynb_checkpoints', '__MACOSX', '.Trash-0', '@eaDir', '$RECYCLE.BIN'


def test_what_tools_leave_in_an_image_folder_is_no_class(tmp_path):
    from mope_clip.data import load_labelled

    for name in ('cat', 'dog', *LITTER):
        (tmp_path / 'test' / name).mkdir(parents=True)
        for file in ('1.jpg', '._1.jpg'):
            (tmp_path / 'test' / name / file).write_bytes(saved(Image.new('RGB', (9, 9)), 'JPEG'))
    found = load_labelled(str(tmp_path), 'test')
    assert found.features['label'].names == ['cat', 'dog'] and len(found) == 2


def test_what_tools_leave_among_shards_and_in_them_is_no_sample(tmp_path):
    from mope_clip.data.sources import read_tar, shards_of

    shard = write_shard(tmp_path / '0.tar', range(3))
    (tmp_path / '._0.tar').write_bytes(b'resource fork')
    assert shards_of(str(tmp_path)) == shards_of(str(tmp_path / '*.tar')) == [str(shard)]
    with tarfile.open(shard, 'a') as tar:
        for name in ('._000000003.jpg', '__MACOSX/000000004.jpg', './.hidden/000000005.jpg'):
            add(tar, name, b'no picture')
    assert len(list(read_tar(str(shard)))) == 4  # './.hidden' is a folder of somebody


def test_no_file_is_opened_in_the_encoding_of_the_locale():
    import ast

    for path in (ROOT / 'mope_clip').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
            if name in ('read_text', 'write_text'):
                words = {word.arg for word in node.keywords}
                assert 'encoding' in words, f'{path}, line {node.lineno}'


def test_text_files_may_begin_with_a_byte_order_mark(tmp_path):
    from mope_clip.clip import read_spec, save_spec
    from mope_clip.data.columns import sentences

    mark = b'\xef\xbb\xbf'
    assert sentences(mark + 'ein Mädchen'.encode()) == ['ein Mädchen']
    spec = uneven_tiny().spec
    save_spec(spec, tmp_path / 'spec.json')
    file = tmp_path / 'spec.json'
    file.write_bytes(mark + file.read_bytes())
    assert read_spec(file) == spec


# ---- silently wrong numbers


def test_one_caption_without_a_list_is_a_caption_and_no_row_of_letters(tiny):
    from mope_clip.data import synth_pairs
    from mope_clip.evaluate import retrieval
    from mope_clip.metrics import mope
    from mope_clip.report.results import recall_rows

    pairs = synth_pairs(12, captions=1)
    bare = pairs.remove_columns('captions')
    bare = bare.add_column('captions', [captions[0] for captions in pairs['captions']])
    assert isinstance(bare[0]['captions'], str)
    assert retrieval(tiny, bare) == retrieval(tiny, pairs)
    assert recall_rows(tiny, bare).equals(recall_rows(tiny, pairs))
    few = dict(towers='text', modules='layer')
    assert mope(tiny, bare, **few).score.tolist() == mope(tiny, pairs, **few).score.tolist()


@pytest.mark.parametrize('value', [None, 3, [3], [None], {'a': 1}])
def test_captions_that_are_no_text_are_refused(value):
    from mope_clip.data.columns import as_captions

    with says(ValueError, 'Captions of an image are text'):
        as_captions(value)


def all_of(shard):
    "What is read of a shard: good samples, and reasons"
    from mope_clip.data.sources import read_tar

    found = [row for _, row in read_tar(str(shard))]
    return [row for row in found if isinstance(row, dict)], [
        str(row) for row in found if not isinstance(row, dict)
    ]


def test_a_shard_ends_as_tar_files_do(tmp_path):
    one = write_shard(tmp_path / '1.tar', range(30))
    two = write_shard(tmp_path / '2.tar', range(30, 40))
    assert all_of(one)[1] == []
    content = one.read_bytes()
    (tmp_path / 'joined.tar').write_bytes(content + two.read_bytes())
    (tmp_path / 'half.tar').write_bytes(
        content[: len(content) // 2] + bytes(len(content) - len(content) // 2)
    )
    with tarfile.open(one) as tar:
        place = tar.getmembers()[45].offset
    (tmp_path / 'zeroed.tar').write_bytes(content[:place] + bytes(512) + content[place + 512 :])
    for name, reason in (
        ('joined', 'something follows the end mark'),
        ('half', 'much of the shard is empty'),
        ('zeroed', 'something follows the end mark'),
    ):
        good, reasons = all_of(tmp_path / f'{name}.tar')
        assert len(good) < 40 and len(reasons) == 1 and reason in reasons[0], name


def test_samples_are_counted_against_what_img2dataset_wrote(tmp_path):
    shard = write_shard(tmp_path / '00000.tar', range(3))
    (tmp_path / '00000_stats.json').write_text('{"successes": 3}', encoding='utf-8')
    assert all_of(shard)[1] == []
    (tmp_path / '00000_stats.json').write_text('{"successes": 5}', encoding='utf-8')
    assert all_of(shard)[1] == ['3 samples, and 5 by 00000_stats.json']


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('epochs', [None, 1])
def test_a_corpus_without_one_sample_ends_in_a_sentence(tmp_path, workers, epochs):
    from mope_clip.data import stream_pairs

    for k in range(3):
        write_shard(tmp_path / f'{k}.tar', [])
    with says(ValueError, 'hold not one sample'):
        next(iter(stream_pairs(str(tmp_path), workers=workers, epochs=epochs)))


def test_an_empty_shard_among_others_is_passed_over(tmp_path):
    from mope_clip.data import stream_pairs

    write_shard(tmp_path / '0.tar', [])
    write_shard(tmp_path / '1.tar', range(4))
    stream = stream_pairs(str(tmp_path))
    assert len({pair['image_id'] for pair in itertools.islice(stream, 12)}) == 4


def test_a_range_of_a_hundred_million_shards_is_refused_at_once():
    from mope_clip.data.sources import shards_of

    with says(ValueError, 'names 100,000,000 shards'):
        shards_of('shards/{00000000..99999999}.tar')


@pytest.mark.parametrize(
    ('second', 'sentence'),
    [
        (dict(filename='1.jpg', cocoid=2), 'names the same image twice'),
        (dict(filename='2.jpg', cocoid=1), 'names the same cocoid twice'),
        (dict(filename='2.jpg', filepath=3), 'has an entry 1 without'),
        (dict(filename=2), 'has an entry 1 without'),
    ],
)
def test_a_karpathy_file_names_every_image_once(tmp_path, second, sentence):
    from mope_clip.data import load_pairs

    row = dict(split='test', filename='1.jpg', cocoid=1, sentences=[dict(raw='a dog')])
    (tmp_path / 'val2014').mkdir()
    for name in ('1.jpg', '2.jpg'):
        (tmp_path / 'val2014' / name).write_bytes(saved(Image.new('RGB', (9, 9)), 'JPEG'))
    file = tmp_path / 'dataset_coco.json'
    file.write_text(json.dumps(dict(images=[row, {**row, 'cocoid': 2, **second}])))
    with says(ValueError, sentence):
        load_pairs('coco', 'test', root=tmp_path)


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (dict(captions=['a', None]), 'row 1: the column captions has no value'),
        (dict(image_id=['1', None]), 'row 1: the column image_id has no value'),
        (dict(image=[None, None]), 'cannot be read'),
    ],
)
def test_empty_cells_of_a_table_are_said_by_their_row(tmp_path, change, sentence):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    from mope_clip.data import load_pairs
    from mope_clip.data.files import png

    picture = png(Image.new('RGB', (9, 9)))
    rows = dict(image=[picture] * 2, captions=['a', 'b'], image_id=['1', '2'])
    kinds = Features(image=ImageFeature(), captions=Value('string'), image_id=Value('string'))
    made = Dataset.from_dict({**rows, **change}, features=kinds)
    made.to_parquet(tmp_path / 'test.parquet')
    columns = dict(image='image', captions='captions', image_id='image_id')
    with says(ValueError, sentence):
        load_pairs(str(tmp_path), 'test', columns=columns)


@pytest.mark.parametrize('setting', ['lr', 'warmup', 'weight_decay', 'ema', 'diverged'])
@pytest.mark.parametrize('value', [float('inf'), float('nan')])
def test_a_recipe_takes_finite_numbers(setting, value):
    from mope_clip.distill.recipe import Recipe

    with pytest.raises(ValueError, match=setting):
        Recipe(pairs_seen=64, **{setting: value})


def test_a_logit_scale_that_overflows_is_said(tiny):
    from mope_clip.data import synth_pairs
    from mope_clip.metrics import mope

    clip = tiny.copy()
    with torch.no_grad():
        clip.logit_scale.fill_(80.0)
    with says(ValueError, 'The logit scale of the model is'):
        mope(clip, synth_pairs(8), z='soft_recall', towers='text', modules='layer')


def test_a_batch_larger_than_the_set_is_said(tiny):
    from mope_clip.data import synth_pairs
    from mope_clip.distill import train

    said = []
    train(tiny, synth_pairs(8), pairs_seen=16, batch=16, log=said.append)
    assert any('a batch of 16 is more than the 8 pairs' in line for line in said)


# ---- tables of scores and their stores


@pytest.fixture(scope='module')
def table(tiny):
    from mope_clip.metrics import random_scores

    return random_scores(tiny)


def with_rows(table, rows):
    "The table with other rows, and what it says of itself"
    rows.attrs = table.attrs
    return rows


def first_of(table, module):
    return table[table.module == module].index[0]


def damaged(table):
    "What may happen to a table on its way -> the damaged table and what is said of it"
    import pandas as pd

    head, group = first_of(table, 'head'), first_of(table, 'ffn')
    yield 'one head less', table.drop(index=head), 'lacks 1 of 4 heads of'
    yield 'one group less', table.drop(index=group), 'neurons of vision layer 0'
    less = table.drop(index=table[table.layer == 1].index)
    yield 'one layer less', less, 'scores no head of'
    yield 'a row twice', pd.concat([table, table.loc[[head]]]), 'rates 1 heads of'
    yield 'a group twice', pd.concat([table, table.loc[[group]]]), 'neurons of vision layer 0'
    yield 'all twice', pd.concat([table, table]), 'twice'
    yield 'text', table.assign(score=table.score.map(str)), 'score of the table holds no numbers'
    yield 'layers as text', table.assign(layer=table.layer.map(str)), 'layer of the table holds no'
    yield 'other layers', table.assign(layer=table.layer + 1), 'layer'
    yield 'another head', table.assign(index=table['index'] + 1), 'does not have (4)'
    yield 'infinite', table.assign(score=table.score.where(table.index != head, np.inf)), 'infinite'
    yield 'minus infinity', table.assign(score=-np.inf), 'infinite'
    yield 'no number', table.assign(score=np.nan), 'are NaN'
    yield 'another tower', table.assign(tower='audio'), "scores a tower 'audio'"
    yield 'another module', table.assign(module='heads'), "scores a module 'heads'"
    yield 'no neurons', table.assign(neurons=None), 'FFN groups without neurons'
    yield 'half a layer', table.assign(layer=table.layer + 0.5), 'no whole numbers'


def test_a_table_holds_exactly_the_modules_of_its_model(table):
    from mope_clip.pruners import plan_depth, plan_width

    plan_width(table, 0.5)
    plan_depth(table, 0.5)
    for what, rows, sentence in damaged(table):
        with pytest.raises(ValueError) as e:
            plan_width(with_rows(table, rows), 0.5)
        assert sentence in str(e.value), (what, str(e.value))
    layers = table[table.module == 'layer']
    for rows in (layers.iloc[1:], layers.iloc[[0, *range(len(layers))]]):
        with pytest.raises(ValueError):
            plan_depth(with_rows(table, rows), 0.5)


@pytest.mark.parametrize('shape', [3, dict(vision=3), dict(vision=[[1]]), dict(vision=[['a', 2]])])
def test_a_table_that_says_nonsense_of_its_model_is_refused(table, shape):
    from mope_clip.pruners import plan_width

    odd = table.copy()
    odd.attrs = dict(mope=dict(table.attrs['mope'], shape=shape))
    with pytest.raises(ValueError):
        plan_width(odd, 0.5)


def test_a_damaged_store_is_scored_again_to_the_same_table(tiny, tmp_path):
    import pandas as pd

    from mope_clip.data import synth_pairs
    from mope_clip.metrics import mope

    pairs, few = synth_pairs(6), dict(towers='text', groups=2)

    def scores():
        return mope(tiny, pairs, store=tmp_path, **few)

    first = scores()
    (folder,) = tmp_path.iterdir()
    layer, other = folder / 'text-0.parquet', folder / 'text-1.parquet'
    modules, z = folder / 'text-modules.json', folder / 'z_dense.json'
    whole = {path: path.read_bytes() for path in (layer, other, modules, z)}

    def rows_less():
        pd.read_parquet(layer).iloc[1:].to_parquet(layer)

    def infinite():
        pd.read_parquet(layer).assign(score=np.inf).to_parquet(layer)

    def fewer_layers():
        modules.write_text(json.dumps(json.loads(modules.read_bytes())[:1]), encoding='utf-8')

    damages = [
        rows_less,
        infinite,
        fewer_layers,
        lambda: layer.write_bytes(whole[other]),
        lambda: layer.write_bytes(whole[layer][:100]),
        lambda: modules.write_bytes(whole[modules][:20]),
        lambda: modules.write_text('[[0, 1, 2]]', encoding='utf-8'),
        lambda: modules.write_text('{}', encoding='utf-8'),
        lambda: z.write_bytes(b''),
        lambda: z.write_bytes(b'null'),
        lambda: z.write_bytes(b'[]'),
        lambda: z.write_bytes(b'NaN'),
    ]
    for damage in damages:
        damage()
        again = scores()
        assert again.drop(columns='neurons').equals(first.drop(columns='neurons'))
        assert [*again.neurons] == [*first.neurons] and again.attrs == first.attrs


# ---- full disks, stopped runs, two runs in one folder

FULL_DISK = """
import resource, sys, traceback
from pathlib import Path
import torch
from mope_clip.clip import save_open_clip, save_spec, tiny_clip
from mope_clip.distill.checkpoint import write_checkpoint
from mope_clip.metrics.engine import LayerInputs
from mope_clip.pruners import export_hf
place, clip = Path(sys.argv[1]), tiny_clip()
x = torch.rand(64, 3, 32, 32)
actions = dict(
    save=lambda: clip.save(place / 'save'),
    open_clip=lambda: save_open_clip(clip, place / 'open_clip'),
    hf=lambda: export_hf(clip, place / 'hf'),
    checkpoint=lambda: write_checkpoint(place, 'key', dict(step=1, x=torch.rand(9999))),
    spec=lambda: save_spec(clip.spec, place / 'spec.json'),
    mapped=lambda: LayerInputs(clip.tower('vision'), x, 64, limit=0),
)
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
for name, action in actions.items():
    try:
        action()
        print(name, 'was written')
    except OSError as e:
        print(name, 'OSError', str(e))
    except BaseException as e:
        print(name, type(e).__name__, str(e)[:200])
"""


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    found = run(sys.executable, '-W', 'ignore', '-c', FULL_DISK, tmp_path)
    lines = found.stdout.splitlines()
    assert len(lines) == 6, found.stdout + found.stderr[-2000:]
    for line in lines:
        assert 'OSError There is no room on the disk for' in line, line
    assert list(tmp_path.iterdir()) == []


def stops_at(line):
    def log(said):
        if line in said:
            raise KeyboardInterrupt

    return log


def test_a_run_that_was_interrupted_goes_on_from_its_checkpoint_and_says_so(tiny, tmp_path):
    from mope_clip.data import synth_pairs
    from mope_clip.distill import distill

    pairs, said = synth_pairs(16), []
    how = dict(pairs_seen=64, batch=8, checkpoint_every=2, every=4)
    student = uneven_tiny()
    before = weights_hash(student)
    whole = distill(student, tiny, pairs, folder=tmp_path / 'whole', log=said.append, **how)
    with pytest.raises(KeyboardInterrupt):
        distill(student, tiny, pairs, folder=tmp_path / 'cut', log=stops_at('32 of 64'), **how)
    assert weights_hash(student) == before  # a copy was trained
    said.clear()
    again = distill(student, tiny, pairs, folder=tmp_path / 'cut', log=said.append, **how)
    assert any(line.startswith('resumed at step 2 of 8, from') for line in said), said
    assert weights_hash(again.clip) == weights_hash(whole.clip)
    whole.clip.save(tmp_path / 'a')
    again.clip.save(tmp_path / 'b')
    for file in (tmp_path / 'a').iterdir():
        assert file.read_bytes() == (tmp_path / 'b' / file.name).read_bytes(), file.name


def test_a_finished_run_is_saved_like_one_that_just_ended(tiny, tmp_path):
    "Its tokenizer too, which remembers whether it was used"
    from mope_clip.data import synth_pairs
    from mope_clip.distill import train

    how = dict(pairs_seen=16, batch=8, folder=tmp_path / 'run', log=lambda line: None)
    for name in ('a', 'b'):
        train(tiny_clip(), synth_pairs(8), **how).clip.save(tmp_path / name)
    tiny_clip().save(tmp_path / 'unused')
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        texts = {(tmp_path / who / name).read_bytes() for who in ('a', 'b', 'unused')}
        assert len(texts) == 1, name


def test_of_two_runs_in_one_folder_the_second_waits_and_says_for_whom(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from mope_clip.data import locks

    monkeypatch.setattr(locks, 'PATIENCE', 0.1)
    said, order = [], []
    with ThreadPoolExecutor(1) as pool:
        with locks.at_work(tmp_path / 'run'):

            def second():
                with locks.at_work(tmp_path / 'run', said.append):
                    order.append('second')

            later = pool.submit(second)
            time.sleep(0.6)
            order.append('first')
        later.result(10)
    assert order == ['first', 'second']
    assert len(said) == 1 and f'process {os.getpid()} on' in said[0] and 'waits' in said[0]


def test_who_waits_for_other_processes_says_so_once(monkeypatch):
    from mope_clip.data import locks

    monkeypatch.setattr(locks, 'PATIENCE', 0.05)
    said = []
    waiting = locks.Patience('a store: others score', said.append)
    waiting.wait(True, 0.06)
    for _ in range(4):
        waiting.wait(False, 0.03)
    assert said == ['a store: others score: this run waits until that ends.']


def test_a_run_holds_its_folder_while_it_works(tiny, tmp_path):
    from filelock import FileLock, Timeout

    from mope_clip.data import synth_pairs
    from mope_clip.distill import train

    found = []

    def log(line):
        for lock in tmp_path.glob('.*.lock'):
            with pytest.raises(Timeout):
                FileLock(lock, is_singleton=False).acquire(timeout=0)
            found.append(lock)

    train(tiny, synth_pairs(8), pairs_seen=16, batch=8, folder=tmp_path, log=log)
    assert found
    with FileLock(found[0]).acquire(timeout=0):
        pass


KEEPING = 'score', 'distill', 'report', 'repair', 'search'


@pytest.mark.parametrize('name', [*KEEPING, 'lessons', 'export'])
def test_ctrl_c_is_one_sentence_that_says_what_is_kept(name, monkeypatch, capsys):
    from dataclasses import replace

    from mope_clip.cli.registry import COMMANDS, main

    def stopped(options):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, name, replace(COMMANDS[name], action=stopped))
    words = dict(export=['m', '--format', 'hf'], search=['m', '--scores', 's'], lessons=[])
    assert main([name, *words.get(name, ['m'])]) == 130
    said = capsys.readouterr().err
    assert said.startswith('mope: stopped. ') and said.count('\n') == 1
    assert ('the same command goes on' in said) == (name in KEEPING)
    assert ('Nothing was written' in said) == (name == 'export')


FULL = {
    'CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB.': (
        'of the GPU is full (20.00 GiB more were asked for)'
    ),
    'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`': 'of the GPU is',
    "[enforce fail] DefaultCPUAllocator: can't allocate memory": 'of this machine is full:',
    'cell 7 of 20_finetune raised OutOfMemoryError: CUDA out of memory.': 'of the GPU is full:',
    'cell 7 of 20_finetune raised MemoryError: ': 'of this machine is full:',
}
LESS = dict(
    score=['--batch', '--precision bf16', '--memory', 'Finished layers are kept'],
    repair=['--batch', '--memory', 'Maps that are solved are kept'],
    distill=['--micro', '--checkpoint-activations', 'The last checkpoint is kept'],
    evaluate=['--batch', 'Nothing was written'],
    run=['-p micro with a part', '-p precision bf16', '-p checkpoint_activations', 'are kept'],
    report=['-p micro', 'pieces are kept'],
    search=['a machine with more', 'Where the search stands is kept'],
)


@pytest.mark.parametrize('name', LESS)
@pytest.mark.parametrize('words', FULL)
def test_full_memory_is_one_sentence_that_says_what_to_lower(name, words, monkeypatch, capsys):
    from dataclasses import replace

    from mope_clip.cli.registry import COMMANDS, main

    def fill(options):
        raise torch.OutOfMemoryError(words) if words.startswith('CUDA out') else RuntimeError(words)

    monkeypatch.setitem(COMMANDS, name, replace(COMMANDS[name], action=fill))
    what = '20_finetune' if name in ('run', 'report') else 'm'
    assert main([name, what, *(['--scores', 's'] if name == 'search' else [])]) == 1
    said = capsys.readouterr().err
    assert said.startswith('mope: the memory ') and said.count('\n') == 1
    assert FULL[words] in said and all(part in said for part in LESS[name])


def no_memory_for_numpy(options):
    np.empty(1 << 60, dtype=np.uint8)


def no_memory_for_a_process(options):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def no_memory_without_a_word(options):
    raise MemoryError


@pytest.mark.parametrize(
    'fill', [no_memory_for_numpy, no_memory_for_a_process, no_memory_without_a_word]
)
def test_full_memory_of_this_machine_is_said_whatever_raises_it(fill, monkeypatch, capsys):
    from dataclasses import replace

    from mope_clip.cli.registry import COMMANDS, main

    monkeypatch.setitem(COMMANDS, 'score', replace(COMMANDS['score'], action=fill))
    assert main(['score', 'm']) == 1
    said = capsys.readouterr().err
    assert said.startswith('mope: the memory of this machine is full')
    assert ('(1.00 EiB more were asked for)' in said) == (fill is no_memory_for_numpy)


def test_of_many_reports_each_that_failed_is_named(monkeypatch, capsys):
    from dataclasses import replace

    from mope_clip.cli.registry import COMMANDS, main

    words = '2 failed: 46_cost (CUDA out of memory); 47_engine_cost (no such file).'

    def fail(options):
        raise RuntimeError(words)

    monkeypatch.setitem(COMMANDS, 'report', replace(COMMANDS['report'], action=fail))
    assert main(['report', '--all']) == 1
    assert capsys.readouterr().err == f'mope: {words}\n'


@pytest.mark.parametrize('command', ['evaluate', 'score'])
def test_a_place_that_cannot_be_written_is_said_before_the_work(command, tmp_path, capsys):
    from mope_clip.cli.registry import main

    (tmp_path / 'file').touch()
    for out, why in ((tmp_path, 'it is a folder'), (tmp_path / 'file' / 'x', 'cannot be written')):
        assert main([command, 'no-such-model', '--out', str(out)]) == 1
        said = capsys.readouterr().err
        assert why in said and said.count('\n') == 1, said


def test_numbers_are_printed_even_where_they_cannot_be_written(tmp_path, monkeypatch, capsys):
    from mope_clip.cli import pipeline
    from mope_clip.cli.registry import main
    from mope_clip.data import files

    uneven_tiny().save(tmp_path / 'm')

    def full(path, write):
        raise OSError('There is no room on the disk')

    monkeypatch.setattr(pipeline, 'numbers_of', lambda options, clip: dict(cost=dict(macs=7)))
    monkeypatch.setattr(files, 'write_atomic', full)
    assert main(['evaluate', str(tmp_path / 'm'), '--out', str(tmp_path / 'x.json')]) == 1
    found = capsys.readouterr()
    assert 'macs 7' in found.out and 'no room' in found.err


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '{"rows": []}', '{"rows": [3]}'])
def test_one_damaged_result_does_not_stop_the_index(toy_repo, capsys, text):
    from toy import write_results

    from mope_clip.report.readme import report_names, results_of
    from mope_clip.report.site import runs_table

    write_results(toy_repo / 'reports' / '20_good', '20_good')
    says_other(toy_repo / 'reports' / '21_bad', 'results.json', text)
    assert report_names(ran=True) == ['20_good']
    assert results_of('21_bad') is None and results_of('20_good')
    runs_table()
    said = capsys.readouterr().out
    assert said.count('21_bad') == 1 and 'damaged' in said


# ---- pages of somebody's notebook

HOSTILE = [
    '<img src=x onerror=alert(1)>',
    '<a href="javascript:alert(1)">x</a>',
    '<a href=" java\tscript:alert(1)">x</a>',
    '<a href="&#106;avascript:alert(1)">x</a>',
    '<a href="vbscript:x">x</a>',
    '<a href="data:text/html,<script>alert(1)</script>">x</a>',
    '<iframe src="https://example.org"></iframe>',
    '<iframe srcdoc="<script>alert(1)</script>"></iframe>',
    '<form action="https://example.org"><input name=q><button formaction="javascript:x">',
    '<meta http-equiv="refresh" content="0;url=https://example.org">',
    '<object data="x.swf"></object><embed src="x.swf">',
    '<base href="https://example.org/">',
    '<link rel=stylesheet href="https://example.org/x.css">',
    '<svg onload=alert(1)><script>alert(1)</script></svg>',
    '<math><mtext><a xlink:href="javascript:alert(1)">x</a></mtext></math>',
    '<math href="javascript:alert(1)">x</math>',
    '<p style="background: url(https://example.org)">x</p>',
    '<img src="https://example.org/x.png"><img src="//example.org/x.png">',
    '<img src="data:image/svg+xml;base64,AAAA" srcset="https://example.org/x.png 2x">',
    '<video src="https://example.org/x.mp4" autoplay></video>',
    '<!--><img src=x onerror=alert(1)>-->',
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>"></noscript>',
    '<textarea><img src=x onerror=alert(1)></textarea>',
    '<style>@import "https://example.org/x.css";</style>',
    '<table background="https://example.org/x.png"><tr><td>x</td></tr></table>',
    '<custom-element onclick="alert(1)">words</custom-element>',
]


@pytest.mark.parametrize('html', HOSTILE)
def test_nothing_runs_and_nothing_is_fetched_on_a_page(html):
    from bs4 import BeautifulSoup

    from mope_clip.report.clean import ATTRIBUTES, FORMULAS, TEXT, clean

    soup = BeautifulSoup(html, 'html.parser')
    clean(soup)
    again = BeautifulSoup(str(soup), 'html.parser')  # as a browser sees what was written
    for tag in again.find_all(True):
        assert tag.name in {*TEXT, *FORMULAS}
        assert not [name for name in tag.attrs if name.startswith('on')]
    said = str(soup).lower()
    for word in (
        'javascript:',
        'vbscript',
        'example.org',
        'data:text',
        'srcset',
        'svg+xml',
        '<!--',
    ):
        assert word not in said, said
    assert 'href' in ATTRIBUTES['a']


@pytest.mark.parametrize('kind', ['markdown', 'output'])
def test_a_rendered_notebook_is_clean_whatever_it_holds(toy_repo, kind):
    from toy import code, prose, write_notebook

    from mope_clip.report.render import render_lesson

    html = '\n\n'.join(HOSTILE)
    shown = dict(output_type='display_data', metadata={}, data={'text/html': html})
    cell = prose(html) if kind == 'markdown' else code('1', (), [shown])
    write_notebook(toy_repo / 'nbs' / '00a_toy.ipynb', prose('# A toy'), cell)
    page = render_lesson('00a_toy').lower()
    body = page[page.index('<main') :]
    for tag in ('<iframe', '<script', '<form', '<meta', '<object', '<base', '<svg', '<input'):
        assert tag not in body, tag
    assert 'onerror=' not in re.sub('&lt;.*?&gt;', '', body) and 'href="javascript' not in body


def test_names_of_files_are_text_on_the_page(toy_repo):
    from toy import prose, write_notebook, write_results

    from mope_clip.report.page import entries, provenance_html

    place = toy_repo / 'reports' / '80_toy'
    for folder in (toy_repo / 'nbs', place):
        write_notebook(folder / '80_toy.ipynb', prose('# A toy'))
    write_results(place, '80_toy')
    (place / '"><img src=x onerror=alert(1)>.csv').touch()
    odd = toy_repo / 'reports' / '<img src=x onerror=alert(1)>'
    write_results(odd, 'odd')
    (entry,) = entries()
    page = provenance_html(entry)
    assert '<img' not in page and '&lt;img' in page


def test_a_specification_of_many_keys_is_read_at_once(tmp_path):
    from mope_clip.clip import read_spec

    file = tmp_path / 'spec.json'
    keys = ', '.join(f'"{k}": 0' for k in range(20_000))
    file.write_text('{' + keys + '}', encoding='utf-8')
    started = time.time()
    with says(ValueError, 'not a specification of this library'):
        read_spec(file)
    assert time.time() - started < 2


def test_a_checkpoint_under_a_name_with_two_activations_is_noted(tiny, tmp_path):
    import open_clip

    cfg = json.loads(json.dumps(tiny.config['model_cfg']))
    for name in ('hf_tokenizer_name', 'tokenizer_kwargs'):
        cfg['text_cfg'].pop(name)
    for name in ('robust-tiny', 'robust-tiny-quickgelu', 'robust-plain'):
        (tmp_path / f'{name}.json').write_text(json.dumps(cfg), encoding='utf-8')
        open_clip.add_model_config(tmp_path / f'{name}.json')
    torch.save(tiny.model.state_dict(), tmp_path / 'w.pt')
    with pytest.warns(UserWarning, match='robust-tiny-quickgelu'):
        load_clip('robust-tiny', tmp_path / 'w.pt', device='cpu')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        load_clip('robust-plain', tmp_path / 'w.pt', device='cpu')


def test_a_folder_for_hugging_face_knows_clips_own_words(tmp_path):
    import open_clip
    from transformers import AutoTokenizer, CLIPModel

    from mope_clip.clip import build_clip
    from mope_clip.pruners import export_hf

    sizes = dict(width=32, layers=1)
    model_cfg = dict(
        embed_dim=16,
        vision_cfg=dict(image_size=32, patch_size=8, head_width=8, **sizes),
        text_cfg=dict(context_length=77, vocab_size=49408, heads=4, **sizes),
    )
    ours = build_clip(dict(name='own', model_cfg=model_cfg), open_clip.get_tokenizer('ViT-B-32'))
    export_hf(ours, tmp_path / 'hf')
    texts = ['a photo of a dog.', 'Two  CATS, playing!!', 'émigré 日本語', 'x' * 400]
    words = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    ids = words(texts, padding='max_length', truncation=True, return_tensors='pt').input_ids
    assert len({tuple(row) for row in ids.tolist()}) == 4
    theirs = CLIPModel.from_pretrained(tmp_path / 'hf').eval()
    with torch.no_grad():
        found = theirs.get_text_features(input_ids=ids)
        found = getattr(found, 'pooler_output', found)
        expected = ours.encode_text(ours.tokenizer(texts))
    assert (found - expected).abs().max() < 1e-5


def test_loading_says_nothing_on_the_terminal(tmp_path):
    uneven_tiny().save(tmp_path / 'm')
    code = 'import sys; from mope_clip.clip import load_clip; load_clip(sys.argv[1])'
    found = run(sys.executable, '-W', 'ignore', '-c', code, tmp_path / 'm')
    assert (found.returncode, found.stdout, found.stderr) == (0, '', '')


def test_every_promise_names_tests_that_exist():
    import ast

    text = (ROOT / 'tests' / 'PROMISES.md').read_text(encoding='utf-8')
    named = re.findall(r'`(test_\w+\.py)::(test_\w+)`', text)
    assert len(named) > 40
    known = {}
    for file, test in named:
        if file not in known:
            tree = ast.parse((ROOT / 'tests' / file).read_text(encoding='utf-8'))
            known[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert test in known[file], f'{file} has no {test}'
    rows = [line for line in text.splitlines() if line.startswith('| ') and '---' not in line]
    assert all('`test_' in row for row in rows if not row.startswith('| promise'))
