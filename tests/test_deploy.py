"A folder that a server loads: layout, precision, the judgement, and nothing of ours at run time."

import ast
import copy
import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
from conftest import run, uneven_tiny
from PIL import Image, ImageOps
from tokenizers import Tokenizer

from mope_clip.clip import (
    TOWERS,
    build_clip,
    load_clip,
    save_open_clip,
    small_config,
    tiny_clip,
    weights_hash,
)
from mope_clip.clip.readme import prepared
from mope_clip.data import synth_pairs
from mope_clip.distill import distill, train
from mope_clip.pruners import export_hf, export_onnx, export_open_clip, trim_vocabulary
from mope_clip.pruners.deploy import search_example
from mope_clip.pruners.export import OnnxTower, as_served, identity, onnx_program, probe
from mope_clip.pruners.fidelity import compare_forms, judge, said_of, verdict
from mope_clip.pruners.weights import in_bytes, store_weights


def silent(said):
    "Nothing is printed"


@pytest.fixture(scope='module')
def small():
    return uneven_tiny()


@pytest.fixture(scope='module')
def pairs():
    return synth_pairs(24)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def copy_of(program):
    return torch.onnx.ONNXProgram(program.model.clone(), program.exported_program)


@pytest.fixture(scope='module', autouse=True)
def each_graph_is_made_once():
    "Export takes seconds: what two tests export alike is made once, and each gets a copy"
    kept = {}

    def once(clip, tower, opset, batch=None):
        known = json.dumps(identity(clip), sort_keys=True), str(clip.dtype), tower, opset, batch
        if known not in kept:
            kept[known] = onnx_program(clip, tower, opset, batch)
        return copy_of(kept[known])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mope_clip.pruners.deploy.onnx_program', once)
        yield


def with_own_words(**vision):
    "A small model with open_clip's own vocabulary"
    config = small_config(49408, context=16)
    for name in ('hf_tokenizer_name', 'tokenizer_kwargs'):
        config['model_cfg']['text_cfg'].pop(name)
    return build_clip(config, open_clip.get_tokenizer('ViT-B-32', context_length=16))


# --- where nothing of ours is

SERVER = """
import sys

ALLOWED = {'onnxruntime', 'tokenizers', 'PIL', 'numpy'}
# what these four import themselves
THEIRS = {'flatbuffers', 'google', 'packaging', 'sympy', 'mpmath', 'coloredlogs', 'humanfriendly'}


class Gate:
    "Refuses every module that is neither Python's own nor one of these"

    def find_spec(self, name, path=None, target=None):
        top = name.split('.')[0]
        if top not in sys.stdlib_module_names | ALLOWED | THEIRS and not top.startswith('_'):
            raise ImportError(f'{name} is not here')


sys.meta_path.insert(0, Gate())
for name in ('torch', 'mope_clip', 'open_clip', 'transformers', 'onnx'):
    try:
        __import__(name)
    except ImportError as e:
        assert 'is not here' in str(e)
    else:
        raise SystemExit(f'{name} can be imported')
"""


def example_of(folder):
    "The lines of Python on the page of a folder"
    return re.search(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL)[1]


def photos(folder, pairs):
    "A few pictures as files, of several shapes"
    (folder / 'photos').mkdir()
    for i, picture in enumerate(pairs['image'][:6]):
        shaped = picture.resize((40 + 7 * i, 61 - 5 * i))
        shaped.save(folder / 'photos' / f'{i}.png')


@pytest.mark.parametrize(
    'make, batch', [(uneven_tiny, None), (uneven_tiny, 3), (with_own_words, 1)]
)
def test_pictures_are_searched_with_four_packages_alone(make, batch, pairs, tmp_path):
    clip = make()
    export_onnx(clip, tmp_path / 'served', batch=batch, log=silent)
    photos(tmp_path / 'served', pairs)
    code = SERVER + example_of(tmp_path / 'served')
    r = run(sys.executable, '-c', code, cwd=tmp_path / 'served', PYTHONPATH='')
    assert r.returncode == 0, r.stderr[-2000:]
    found = dict(ast.literal_eval(r.stdout))
    words = clip.encode_text(clip.tokenizer(['a red square']), normalize=True)[0]
    for name, similar in found.items():
        picture = Image.open(tmp_path / 'served/photos' / name).convert('RGB')
        image = clip.encode_image(clip.preprocess(picture)[None], normalize=True)[0]
        assert similar == pytest.approx((image @ words).item(), abs=1e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True) and len(found) == 5


@pytest.mark.parametrize('mode', ['shortest', 'squash', 'longest'])
@pytest.mark.parametrize('shape', [(50, 83), (83, 50), (20, 31), (32, 32), (97, 96)])
def test_the_example_prepares_pictures_as_the_model_does(mode, shape, tmp_path):
    config = copy.deepcopy(tiny_clip().config)
    config['preprocess_cfg'].update(resize_mode=mode, interpolation='bilinear')
    clip = build_clip(config, tiny_clip().tokenizer)
    code = search_example(clip).split('def pixels')[1].split('paths =')[0]
    noise = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / 'a.png')
    cfg = json.loads(json.dumps(prepared(clip)))
    names = dict(np=np, Image=Image, ImageOps=ImageOps, cfg=cfg, side=32, how=Image.BILINEAR)
    exec('def pixels' + code, names)
    found = torch.from_numpy(names['pixels'](tmp_path / 'a.png'))
    torch.testing.assert_close(found, clip.preprocess(Image.fromarray(noise))[None])


def as_immich_does(folder, text):
    "How immich reads the textual folder: config.json, tokenizer_config.json, then one text"
    length = json.loads((folder / 'config.json').read_text())['text_cfg'].get('context_length', 77)
    settings = json.loads((folder / 'textual/tokenizer_config.json').read_text())
    tokenizer = Tokenizer.from_file(str(folder / 'textual/tokenizer.json'))
    pad = settings['pad_token']
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    session = onnxruntime.InferenceSession(str(folder / 'textual/model.onnx'))
    ids = np.array([tokenizer.encode(text).ids], dtype=np.int32)
    return session.run(None, dict(text=ids))[0][0]


@pytest.mark.parametrize('make', [uneven_tiny, with_own_words], ids=['words', 'own'])
def test_immich_reads_the_folder(make, tmp_path):
    clip, text = make(), 'a red square'
    export_onnx(clip, tmp_path / 'served', log=silent)
    exact = clip.encode_text(clip.tokenizer([text]), normalize=True)[0].numpy()
    np.testing.assert_allclose(as_immich_does(tmp_path / 'served', text), exact, atol=1e-5)
    told = json.loads((tmp_path / 'served/visual/preprocess_cfg.json').read_text())
    assert told['size'] == [32, 32] and {'mean', 'std', 'interpolation', 'resize_mode'} <= set(told)
    session = onnxruntime.InferenceSession(str(tmp_path / 'served/visual/model.onnx'))
    image = np.zeros((1, 3, 32, 32), np.float32)
    (found,) = session.run(None, dict(image=image))
    assert found.dtype == np.float32 and np.linalg.norm(found[0]) == pytest.approx(1, abs=1e-5)


def test_fewer_words_are_served_too(tmp_path):
    clip = with_own_words()
    trimmed = trim_vocabulary(clip, ['a red square'], log=silent)
    export_onnx(trimmed, tmp_path / 'served', weights='int8', log=silent)
    exact = clip.encode_text(clip.tokenizer(['a red square']), normalize=True)[0].numpy()
    assert as_immich_does(tmp_path / 'served', 'a red square') @ exact > 0.995
    size = (tmp_path / 'served/textual/model.onnx').stat().st_size
    assert size < 200_000
    told = json.loads((tmp_path / 'served/config.json').read_text())
    assert told['text_cfg']['vocab_size'] == len(trimmed.text.token_table)


def test_a_folder_to_deploy_is_replaced_and_no_other(small, tmp_path):
    export_onnx(small, tmp_path / 'served', towers=('text',), check=False)
    export_onnx(small, tmp_path / 'served', towers=('vision',), check=False)
    assert not (tmp_path / 'served/textual').exists()
    (tmp_path / 'served/visual/thesis.txt').touch()
    with pytest.raises(ValueError, match='holds visual, which saving a model there would delete'):
        export_onnx(small, tmp_path / 'served', check=False)


@pytest.mark.parametrize('write', [export_onnx, export_hf, export_open_clip])
def test_no_form_replaces_the_model_that_it_is_made_of(write, tmp_path):
    clip = tiny_clip()
    clip.save(tmp_path / 'saved')
    with pytest.raises(ValueError, match='saved holds a saved model, which would be lost'):
        write(clip, tmp_path / 'saved')
    assert weights_hash(load_clip(tmp_path / 'saved', device='cpu')) == weights_hash(clip)
    save_open_clip(clip, tmp_path / 'teacher')
    if write is export_open_clip:
        write(clip, tmp_path / 'teacher')
        (tmp_path / 'teacher/made_by.json').write_text('{}')
    with pytest.raises(ValueError, match='teacher holds a saved model'):
        write(clip, tmp_path / 'teacher')


def test_files_lie_where_they_are_said_to(small, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (file,) = export_onnx(small, '~/served', ('text',), check=False).values()
    assert file == tmp_path / 'served/textual/model.onnx' and file.is_file()


def test_large_weights_alone_stand_in_a_file_of_their_own(small, tmp_path, monkeypatch):
    towers = ('vision',)
    export_onnx(small, tmp_path / 'small', towers, check=False)
    assert not list((tmp_path / 'small').rglob('*.data'))
    limit = 'torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD'
    monkeypatch.setattr(limit, 1000)
    files = export_onnx(small, tmp_path / 'large', towers, log=silent)
    assert (tmp_path / 'large/visual/model.onnx.data').is_file()
    assert files['vision'].stat().st_size < (tmp_path / 'small/visual/model.onnx').stat().st_size
    export_onnx(small, tmp_path / 'large', ('text',), check=False)  # it may be replaced


# --- shapes


@pytest.mark.parametrize('tower', TOWERS)
def test_a_fixed_batch_is_one_shape(tower, small, tmp_path):
    files = export_onnx(small, tmp_path / 'served', towers=(tower,), batch=3, log=silent)
    (given,) = onnxruntime.InferenceSession(str(files[tower])).get_inputs()
    assert given.shape == ([3, 3, 32, 32] if tower == 'vision' else [3, 12])
    x = probe(small, tower, 7)
    exact = torch.nn.functional.normalize(small.tower(tower)(x), dim=-1)
    torch.testing.assert_close(OnnxTower(files[tower])(x), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize('batch', [0, -1, 1.5, True, 'many'])
def test_a_batch_of_none_is_refused(batch, small, tmp_path):
    with pytest.raises(ValueError, match='batch is a whole number from 1 on, or None for any'):
        export_onnx(small, tmp_path / 'served', batch=batch)
    assert not (tmp_path / 'served').exists()


# --- precision


def test_a_byte_is_at_most_half_a_step_off():
    w = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    w[:, 3] = 0
    q, s = in_bytes(w, axis=-1)
    assert q.dtype == np.int8 and s.shape == (1, 8) and np.abs(q).max() == 127
    assert (np.abs(q * s - w) <= s / 2 * 1.001).all() and (q[:, 3] == 0).all()


@pytest.fixture(scope='module')
def files(small, pairs, tmp_path_factory):
    "A folder for each precision"
    place = tmp_path_factory.mktemp('weights')
    return {
        weights: export_onnx(small, place / weights, weights=weights, pairs=pairs, log=silent)
        for weights in ('fp32', 'fp16', 'int8')
    }


def stored_as(path):
    "What kinds of numbers a file holds, with the number of elements of each"
    found = {}
    for tensor in onnx.load(path).graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        found[kind] = found.get(kind, 0) + int(np.prod(tensor.dims))
    return found


@pytest.mark.parametrize('tower', TOWERS)
def test_large_weights_are_stored_small_and_norms_are_not(tower, files):
    whole, half, byte = (stored_as(files[w][tower]) for w in ('fp32', 'fp16', 'int8'))
    assert 'FLOAT16' not in whole and 'INT8' not in whole
    assert half['FLOAT16'] == byte['INT8'] > 0.8 * whole['FLOAT']
    for path in (files['fp16'][tower], files['int8'][tower]):
        graph = onnx.load(path).graph
        # everything that is computed is single: nothing is cast to another type than this
        casts = [node for node in graph.node if node.op_type == 'Cast']
        assert {node.attribute[0].i for node in casts} <= {1, 7, 9}  # float, int64, bool
        stored = {t.name: t.data_type for t in graph.initializer}
        for node in graph.node:
            if node.op_type == 'LayerNormalization':
                assert all(stored.get(name, 1) == 1 for name in node.input)


@pytest.mark.parametrize('weights, least', [('fp16', 0.99999), ('int8', 0.999)])
def test_rounded_files_stay_close_and_say_how_close(weights, least, files, small, pairs):
    folder = files[weights]['vision'].parent.parent
    told = json.loads((folder / 'check.json').read_text())
    assert told['weights'] == weights and told['verdict'] == 'good' and not told['forced']
    assert told['items'] == dict(images=24, captions=48)
    assert min(told['cosine'][t]['lowest'] for t in TOWERS) > least
    assert set(told['recall']) == {'before', 'after', 'lost'}
    assert json.loads((folder / 'config.json').read_text())['weights'] == weights
    x = probe(small, 'vision', 4)
    exact = small.encode_image(x, normalize=True)
    assert (OnnxTower(files[weights]['vision'])(x) * exact).sum(1).min() > least


def test_real_weights_shrink_by_half_and_by_three_quarters(tmp_path):
    "Of a text tower with CLIP's width"
    text = dict(context_length=8, vocab_size=500, width=512, heads=8, layers=1)
    vision = dict(image_size=32, layers=1, width=64, patch_size=16)
    cfg = dict(embed_dim=512, vision_cfg=vision, text_cfg=text)
    clip = build_clip(dict(name='real', model_cfg=cfg), open_clip.get_tokenizer('ViT-B-32'))
    sizes, made = {}, onnx_program(clip, 'text', 18)
    for weights in ('fp32', 'fp16', 'int8'):
        program = copy_of(made)
        store_weights(program.model, weights)
        program.save(tmp_path / weights)
        sizes[weights] = (tmp_path / weights).stat().st_size
    assert sizes['fp16'] < 0.51 * sizes['fp32'] and sizes['int8'] < 0.26 * sizes['fp32']


@pytest.mark.parametrize('tower', TOWERS)
def test_a_later_opset_takes_bytes_too(tower, small, tmp_path):
    files = export_onnx(small, tmp_path / 'a', (tower,), opset=23, weights='int8', log=silent)
    assert json.loads((tmp_path / 'a/check.json').read_text())['verdict'] == 'good'
    assert OnnxTower(files[tower])(probe(small, tower, 2)).isfinite().all()


def test_a_half_model_is_exported_in_single_precision(small, tmp_path):
    half = small.copy()
    half.model.half()
    files = export_onnx(half, tmp_path / 'a', log=silent)
    x = probe(small, 'vision', 3)
    found = OnnxTower(files['vision'])(x)
    torch.testing.assert_close(found, small.encode_image(x, True), atol=5e-3, rtol=0)


# --- the judgement


def turned_by(clip, angle):
    "Forms of both towers whose embeddings are turned by an angle, each in its own direction"

    def form(tower):
        def embed(x):
            net = clip.encode_image if tower == 'vision' else clip.encode_text
            exact = net(x, normalize=True)
            noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(len(x)))
            noise -= (noise * exact).sum(1, keepdim=True) * exact
            noise /= noise.norm(dim=1, keepdim=True)
            return np.cos(angle) * exact + np.sin(angle) * noise

        return embed

    return {tower: form(tower) for tower in TOWERS}


@pytest.mark.parametrize(
    'cosine, said', [(0.996, 'good'), (0.994, 'noticeable'), (0.971, 'noticeable'), (0.969, 'too')]
)
def test_limits_of_the_cosine(cosine, said, small):
    found = compare_forms(small, turned_by(small, np.arccos(cosine)))
    assert found['cosine']['text']['mean'] == pytest.approx(cosine, abs=1e-4)
    assert verdict(found).startswith(said)


@pytest.mark.parametrize('lost, said', [(0.4, 'good'), (0.5, 'noticeable'), (3, 'too coarse')])
def test_limits_of_the_recall(lost, said, small):
    found = compare_forms(small, turned_by(small, 0))
    found['recall'] = dict(before={}, after={}, lost=lost)
    assert verdict(found) == said


def test_one_caption_of_an_image_may_be_a_string(small, pairs):
    own = [captions[0] for captions in pairs['captions']]
    one = pairs.remove_columns('captions').add_column('captions', own)
    found = compare_forms(small, turned_by(small, 0), one)
    assert found['items'] == dict(images=24, captions=24)


def test_a_model_that_was_being_trained_is_compared_as_it_is_used():
    config = copy.deepcopy(tiny_clip().config)
    config['model_cfg']['vision_cfg']['patch_dropout'] = 0.5
    clip = build_clip(config, tiny_clip().tokenizer)
    forms = turned_by(clip.copy(), 0)
    clip.model.train()
    assert compare_forms(clip, forms)['cosine']['vision']['lowest'] > 0.9999
    assert clip.model.training


def test_embeddings_that_are_no_numbers_are_too_coarse(small):
    forms = {tower: lambda x: torch.full((len(x), 32), torch.nan) for tower in TOWERS}
    assert verdict(compare_forms(small, forms)) == 'too coarse'


def test_a_noticeable_difference_is_a_warning(small):
    found = compare_forms(small, turned_by(small, np.arccos(0.99)))
    with pytest.warns(UserWarning, match='A file differs noticeably from the model'):
        assert judge(found, 'A file', log=silent)['verdict'] == 'noticeable'


def test_no_warning_where_nothing_shows(small):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        judge(compare_forms(small, turned_by(small, 0.01)), 'A file', log=silent)


def test_what_is_too_coarse_is_refused_unless_it_is_forced(small, tmp_path, monkeypatch):
    def steps(w, axis):
        s = np.abs(w).max() / 1.5
        return np.round(w / s).astype(np.int8), np.full((1,) * w.ndim, s, np.float32)

    monkeypatch.setattr('mope_clip.pruners.weights.in_bytes', steps)
    with pytest.raises(ValueError, match=r'is too coarse to be this model \(.*--force\)\.$'):
        export_onnx(small, tmp_path / 'a', ('text',), weights='int8', log=silent)
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match='differs noticeably'):
        export_onnx(small, tmp_path / 'a', ('text',), weights='int8', force=True, log=silent)
    told = json.loads((tmp_path / 'a/check.json').read_text())
    assert told['verdict'] == 'too coarse' and told['forced']


def test_without_pairs_it_says_that_it_was_noise(small, tmp_path):
    said = []
    export_onnx(small, tmp_path / 'a', ('text',), weights='fp16', log=said.append)
    assert 'on noise, since no pairs were given' in said[0]
    told = json.loads((tmp_path / 'a/check.json').read_text())
    assert told['items'] == 'noise' and told['recall'] is None


def test_recall_is_measured_as_everywhere(small, pairs):
    from mope_clip.evaluate import retrieval

    found = compare_forms(small, turned_by(small, 0.05), pairs)
    assert found['recall']['before'] == pytest.approx(retrieval(small, pairs))
    assert 'mean recall' in said_of(found)


# --- bad input


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(weights='int4'), "weights are fp32, fp16 or int8, not 'int4'"),
        (dict(pairs=[]), 'There are no pairs to compare the files on'),
        (dict(towers=()), "towers are 'vision', 'text' or both"),
    ],
)
def test_wrong_options_are_one_sentence(options, sentence, small, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        export_onnx(small, tmp_path / 'a', **options)
    assert not list(tmp_path.iterdir())


def test_captions_cannot_be_compared_without_a_tokenizer(pairs, tmp_path):
    with pytest.raises(ValueError, match='The model has no tokenizer'):
        export_onnx(build_clip(tiny_clip().config, None), tmp_path / 'a', pairs=pairs)


# --- half precision in a folder of ours


def test_half_precision_halves_the_folder_and_comes_back(small, tmp_path):
    small.save(tmp_path / 'single')
    small.save(tmp_path / 'half', precision='fp16')
    sizes = [(tmp_path / name / 'model.safetensors').stat().st_size for name in ('half', 'single')]
    assert sizes[0] < 0.6 * sizes[1]
    back = load_clip(tmp_path / 'half', device='cpu')
    assert back.dtype == torch.float16 and small.dtype == torch.float32
    x, ids = probe(small, 'vision', 4), probe(small, 'text', 4)
    for ours, theirs in (
        (back.encode_image(x, True), small.encode_image(x, True)),
        (back.encode_text(ids, True), small.encode_text(ids, True)),
    ):
        assert torch.cosine_similarity(ours.float(), theirs).min() > 0.9999
    back.save(tmp_path / 'again')
    assert weights_hash(load_clip(tmp_path / 'again', device='cpu')) == weights_hash(back)
    back.save(tmp_path / 'single-again', precision='fp32')
    assert load_clip(tmp_path / 'single-again', device='cpu').dtype == torch.float32


@pytest.mark.parametrize('who', ['student', 'teacher'])
def test_a_halved_model_does_not_learn_nor_teach(who, pairs):
    tiny = tiny_clip()
    half = tiny.copy()
    half.model.half()
    models = dict(student=tiny, teacher=tiny) | {who: half}
    with pytest.raises(ValueError, match=f'The {who} is in half precision, which is too coarse'):
        distill(**models, pairs=pairs, pairs_seen=8, batch=8)
    with pytest.raises(ValueError, match='The model is in half precision'):
        train(half, pairs, pairs_seen=8, batch=8)


def test_an_unknown_precision_is_refused(small, tmp_path):
    with pytest.raises(ValueError, match="precision is 'fp32' or 'fp16', not 'int8'"):
        small.save(tmp_path / 'a', precision='int8')


# --- pages


def even_tiny(own=False):
    return with_own_words() if own else tiny_clip()


@pytest.mark.parametrize(
    'form, own', [('ours', False), ('ours', True), ('open_clip', False), ('hf', True)]
)
def test_the_lines_of_every_page_run_and_the_tokenizer_works_alone(form, own, pairs, tmp_path):
    clip, folder = even_tiny(own), tmp_path / 'model'
    write = dict(
        ours=lambda: clip.save(folder),
        open_clip=lambda: export_open_clip(clip, folder),
        hf=lambda: export_hf(clip, folder),
    )
    write[form]()
    page, code = (folder / 'README.md').read_text(), example_of(folder)
    assert '**Pictures**: RGB; the shorter side to 32 pixels' in page and '(bicubic)' in page
    assert len(code.strip().splitlines()) == 5
    pairs['image'][0].save(tmp_path / 'a.png')
    lines = f'from PIL import Image\npicture = Image.open({str(tmp_path / "a.png")!r})\n{code}'
    lines, fresh = f'{lines}\nprint(similar.item())', form == 'open_clip'
    r = run(sys.executable, '-c', lines, cwd=folder, fresh=fresh)
    assert r.returncode == 0, r.stderr[-2000:]
    image = clip.encode_image(clip.preprocess(pairs['image'][0])[None], normalize=True)
    words = clip.encode_text(clip.tokenizer(['a red square']), normalize=True)
    assert float(r.stdout.split()[-1]) == pytest.approx((image @ words.T).item(), abs=1e-4)
    file = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    for text in ('a red square', '', 'a  Green\ncircle “left” of it ' * 5):
        assert file.encode(text).ids == clip.tokenizer([text])[0].tolist()


def test_a_page_says_what_a_file_cannot_hold():
    from mope_clip.clip.readme import preparation

    clip = tiny_clip()
    assert 'also' not in preparation(clip)
    clip.tokenizer.strip_sep_token = True
    assert 'the tokenizer of this model also sets the separator to 0' in preparation(clip)


def test_ids_are_served_with_32_bits():
    assert as_served(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.int32
    assert as_served(torch.zeros(1, 2)).dtype == torch.float32


def test_the_example_is_as_short_as_a_page_allows():
    lines = search_example(tiny_clip()).splitlines()
    code = [line for line in lines if line and not line.startswith(('import', 'from'))]
    assert len(code) <= 16 and max(map(len, lines)) <= 100


def test_no_path_of_this_machine_is_in_the_folder(files):
    for path in files['int8']['vision'].parent.parent.rglob('*'):
        if path.is_file():
            assert str(Path.home()).encode() not in path.read_bytes().replace(b'/root', b'')
            assert b'mope_clip/clip' not in path.read_bytes()
