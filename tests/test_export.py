"Exported towers where this library is not: another process, a compiler, the shape of a real CLIP."

import copy
import json
import os
import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import GRID, custom_tiny, model_of, run, uneven_tiny

from mope_clip.clip import TOWERS, PruneSpec, build_clip, prune, shape_of, tiny_clip, whole_spec
from mope_clip.data import synth_pairs
from mope_clip.pruners import export_hf, export_onnx, export_open_clip
from mope_clip.pruners.export import (
    as_served,
    check_installed,
    check_onnx,
    check_same,
    identity,
    onnx_program,
    probe,
    trace,
)


@pytest.fixture(scope='module')
def tiny():
    return tiny_clip()


@pytest.fixture(scope='module')
def small():
    return uneven_tiny()


@pytest.fixture(scope='module')
def inputs(tiny):
    "Six images and six captions, shorter than the context"
    pairs = synth_pairs(6)
    return dict(
        vision=torch.stack([tiny.preprocess(image) for image in pairs['image']]),
        text=tiny.tokenizer([captions[0] for captions in pairs['captions']]),
    )


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def close(some, others, atol=1e-5):
    np.testing.assert_allclose(np.asarray(some), np.asarray(others), rtol=0, atol=atol)


# --- in another process

ALONE = """
import sys
import numpy as np, onnxruntime, open_clip, torch
from transformers import CLIPModel

sys.modules['mope_clip'] = None  # importing it would be an error
x = np.load('x.npz')
images, ids = torch.from_numpy(x['images']), torch.from_numpy(x['ids'])


def check(form, image_features, text_features):
    for ours, theirs in (('image_features', image_features), ('text_features', text_features)):
        np.testing.assert_allclose(x[ours], np.asarray(theirs), atol=1e-5, err_msg=form)


def unit(f):
    return f / np.linalg.norm(f, axis=-1, keepdims=True)


def graph(tower, values):
    return unit(torch.export.load(f'{tower}.pt2').module()(values).numpy())


def session(tower, name):
    file = f'onnx/{tower}/model.onnx'
    return onnxruntime.InferenceSession(file).run(None, {name: x[tower]})[0]


with torch.no_grad():
    model, _, _ = open_clip.create_model_and_transforms('local-dir:open_clip')
    model.eval()
    check('open_clip', model.encode_image(images, True), model.encode_text(ids, True))
    out = CLIPModel.from_pretrained('hf').eval()(pixel_values=images, input_ids=ids)
    check('transformers', out.image_embeds, out.text_embeds)
    check('torch.export', graph('vision', images), graph('text', ids))
check('onnx', session('visual', 'image'), session('textual', 'text'))
print('all the same')
"""


def test_every_form_works_in_a_process_without_this_library(small, tmp_path):
    images, ids = probe(small, 'vision', 3), probe(small, 'text', 3)
    features = dict(
        image_features=small.encode_image(images, normalize=True).numpy(),
        text_features=small.encode_text(ids, normalize=True).numpy(),
    )
    served = dict(visual=images, textual=ids.int())
    np.savez(tmp_path / 'x.npz', images=images, ids=ids, **served, **features)
    export_open_clip(small, tmp_path / 'open_clip', pad=True)
    export_hf(small, tmp_path / 'hf', pad=True)
    export_onnx(small, tmp_path / 'onnx')
    for tower in TOWERS:
        torch.export.save(trace(small, tower), tmp_path / f'{tower}.pt2')
    r = run(sys.executable, '-c', ALONE, cwd=tmp_path, PYTHONPATH='')
    assert r.returncode == 0 and 'all the same' in r.stdout, r.stderr[-3000:]


COMPILE = """
import torch
from mope_clip.clip import TOWERS, load_clip
from mope_clip.pruners.export import probe

clip = load_clip('small', device='cpu')
with torch.no_grad():
    for t in TOWERS:
        tower, x = clip.tower(t), probe(clip, t, 5)
        compiled = torch.compile(tower, dynamic=True)
        for n in (2, 5):
            torch.testing.assert_close(compiled(x[:n]), tower(x[:n]), atol=1e-5, rtol=1e-4)
print('compiled')
"""


@pytest.mark.skipif(
    not any(shutil.which(c) for c in (os.environ.get('CXX') or 'g++', 'clang++')),
    reason='torch.compile needs a C++ compiler, and there is neither g++ nor clang++ here',
)
def test_compiled_towers_are_the_same(small, tmp_path):
    small.save(tmp_path / 'small')
    r = run(sys.executable, '-c', COMPILE, cwd=tmp_path, TORCHINDUCTOR_CACHE_DIR=tmp_path / 'cache')
    assert r.returncode == 0 and 'compiled' in r.stdout, r.stderr[-3000:]


# --- inputs to compare by, and the comparison


def test_probes_are_shaped_like_the_models_inputs(tiny):
    assert probe(tiny, 'vision', 2).shape == (2, 3, 32, 32)


def test_probes_are_repeatable(tiny):
    assert torch.equal(probe(tiny, 'text', 5), probe(tiny, 'text', 5))
    assert (probe(tiny, 'text', 5, seed=1) != probe(tiny, 'text', 5)).any()


def test_captions_end_once_at_different_places_and_are_padded_behind(tiny):
    captions, end = probe(tiny, 'text', 5), len(tiny.tokenizer.tokenizer) - 1
    assert (captions == end).sum(1).tolist() == [1] * 5
    assert not captions[torch.arange(12) > captions.argmax(1)[:, None]].any()
    assert len(set(captions.argmax(1).tolist())) > 2


def test_captions_of_a_model_that_looks_for_a_token_have_it(tiny):
    captions = probe(custom_tiny(pool_type='eos', eos_id=3), 'text', 5)
    assert (captions == 3).any(1).all()
    assert (captions < len(tiny.tokenizer.tokenizer) - 1).all()


def test_features_that_differ_by_rounding_are_the_same(small, inputs):
    features = small.encode_image(inputs['vision'])
    check_same('A copy', features + 1e-6, features)
    check_same('A copy', 1000 * (features + 1e-6), 1000 * features)


@pytest.mark.parametrize(
    'change, sentence',
    [
        (lambda f: f * 1.001, 'A file gives other features'),
        (lambda f: f * torch.nan, 'other features'),
        (lambda f: f[:1], 'differ by inf'),
    ],
)
def test_features_that_differ_are_refused(change, sentence, small, inputs):
    features = small.encode_image(inputs['vision'])
    with pytest.raises(ValueError, match=sentence):
        check_same('A file', change(features), features)


# --- as a graph


@pytest.mark.parametrize('tower', TOWERS)
def test_a_graph_takes_any_batch_and_keeps_its_bits_on_disk(tower, small, inputs, tmp_path):
    program, x = trace(small, tower), inputs[tower]
    torch.export.save(program, tmp_path / 'tower.pt2')
    graph, again = program.module(), torch.export.load(tmp_path / 'tower.pt2').module()
    for n in (1, 6):  # not the eight that were traced
        close(graph(x[:n]), small.tower(tower)(x[:n]))
        assert torch.equal(again(x[:n]), graph(x[:n]))


def test_a_causal_graph_takes_captions_of_any_length_that_holds_them(small, inputs):
    graph, ids = trace(small, 'text').module(), inputs['text']
    short = small.text.trim(ids).shape[1]
    assert short < 11
    for length in range(short, 13):
        close(graph(ids[:, :length]), small.encode_text(ids))


def test_a_graph_of_a_text_tower_that_sees_padding_has_one_length(inputs):
    seeing = custom_tiny(no_causal_mask=True)
    graph = trace(seeing, 'text').module()
    close(graph(inputs['text']), seeing.encode_text(inputs['text']))
    with pytest.raises(Exception, match='12'):
        graph(inputs['text'][:, :8])


def test_attention_is_one_call_in_a_graph(small):
    program = trace(small, 'text')
    assert any('attention' in str(node.target) for node in program.graph.nodes)


def test_a_tower_goes_to_torch_export_as_it_is(small, inputs):
    sizes = ({0: torch.export.Dim('batch')},)
    direct = torch.export.export(small.vision.eval(), (inputs['vision'][:2],), dynamic_shapes=sizes)
    close(direct.module()(inputs['vision']), small.vision(inputs['vision']))


# --- as ONNX


def test_a_file_says_how_pictures_and_cosines_are_scaled(tiny, small, inputs):
    told = identity(small)
    scale = small.model(inputs['vision'], inputs['text'])[2]
    assert told['logit_scale'] == pytest.approx(scale.item(), abs=1e-4)
    assert told['logit_bias'] is None and told['context_length'] == 12
    assert tuple(told['preprocess']['mean']) == (0.5,) * 3
    assert tuple(told['preprocess']['size']) == (32, 32)
    assert identity(tiny)['spec_hash'] != told['spec_hash']


def test_two_ways_to_a_model_have_one_hash(tiny, small):
    by_another_hand = PruneSpec(
        small.spec.vision, small.spec.text, small.spec.base, dict(by='another hand')
    )
    assert identity(prune(tiny, by_another_hand))['spec_hash'] == identity(small)['spec_hash']


@pytest.mark.parametrize('opset', [18, 23])
def test_a_file_of_another_model_is_found_out(opset, tiny, small, tmp_path):
    path = tmp_path / 'text.onnx'
    onnx_program(small, 'text', opset).save(path)
    check_onnx(small, 'text', path)
    with pytest.raises(ValueError, match=r'text\.onnx gives other features'):
        check_onnx(tiny, 'text', path)


def test_the_operator_leaves_nothing_to_cut_or_transpose(small):
    old, new = (
        [node.op_type for node in onnx_program(small, 'text', opset).model.graph]
        for opset in (18, 23)
    )
    assert (old.count('Attention'), new.count('Attention')) == (0, 1)
    assert 'Softmax' in old and not {'Softmax', 'Split', 'Transpose'} & set(new)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A folder for each of two opsets: {opset: {tower: path}}"
    folder, small = tmp_path_factory.mktemp('onnx'), uneven_tiny()
    return {opset: export_onnx(small, folder / str(opset), opset=opset) for opset in (18, 23)}


def test_a_folder_holds_the_towers_the_tokenizer_and_what_must_be_known(exported):
    folder = exported[18]['vision'].parent.parent
    files = [str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()]
    assert sorted(files) == [
        'README.md',
        'check.json',
        'config.json',
        'textual/model.onnx',
        'textual/tokenizer.json',
        'textual/tokenizer_config.json',
        'visual/model.onnx',
        'visual/preprocess_cfg.json',
    ]
    told = json.loads((folder / 'config.json').read_text())
    assert told['features'] == dict(vision=['image', 'embedding'], text=['text', 'embedding'])
    session = onnxruntime.InferenceSession(exported[18]['text'])
    meta = session.get_modelmeta().custom_metadata_map
    assert (meta['name'], meta['spec_hash']) == ('tiny', told['spec_hash'])
    assert json.loads(meta['preprocess'])['std'] == told['preprocess']['std']


def test_files_hold_the_small_tensors_and_no_trace_of_this_machine(exported, small):
    parameters = sum(p.numel() for p in small.vision.parameters())
    assert exported[18]['vision'].stat().st_size < 4 * parameters + 20_000
    for path in exported[18].values():
        text = path.read_bytes()
        assert b'forward' not in text and b'mope_clip' not in text


def test_files_with_operators_hold_each_weight_once(exported, small):
    old, new = (exported[opset]['vision'].stat().st_size for opset in (18, 23))
    projection = small.vision.blocks[0].head_weights()[0].parameter
    assert new < old + 4 * projection.numel()


@pytest.mark.parametrize('tower', TOWERS)
@pytest.mark.parametrize('opset', [18, 23])
def test_files_take_any_batch_and_trimmed_captions(opset, tower, exported, small, inputs):
    session = onnxruntime.InferenceSession(exported[opset][tower])
    net, name = small.tower(tower), session.get_inputs()[0].name
    for n in (1, 4, 6):
        for x in (inputs[tower][:n], net.trim(inputs[tower])[:n]):
            (found,) = session.run(None, {name: as_served(x).numpy()})
            close(found, F.normalize(net(x), dim=-1))


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(opset=17), 'opset is 17: the exporter writes 18 to 24'),
        (dict(towers=('image',)), "'vision', 'text' or both"),
        (dict(towers=()), "'vision', 'text' or both"),
    ],
)
def test_what_cannot_be_exported_is_refused(options, sentence, small, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        export_onnx(small, tmp_path / 'onnx', **options)


def average_pool():
    tiny = tiny_clip()
    config = copy.deepcopy(tiny.config)
    config['model_cfg']['vision_cfg'].update(pool_type='avg', final_ln_after_pool=True)
    return build_clip(config, tiny.tokenizer)


def padded_mask():
    "A text tower with a mask for each row"
    clip = custom_tiny(no_causal_mask=True, pad_id=0, pool_type='eos', eos_id=3)
    clip.text.net.use_pad_mask = True
    return clip


@pytest.mark.parametrize('opset', [18, 23])
@pytest.mark.parametrize(
    'make, tower',
    [
        (padded_mask, 'text'),
        (average_pool, 'vision'),
        (lambda: custom_tiny(pool_type='eos', eos_id=3), 'text'),
    ],
    ids=['padded_mask', 'average_pool', 'eos_pool'],
)
def test_options_of_open_clip_are_exported_and_checked(make, tower, opset, tmp_path):
    assert list(export_onnx(make(), tmp_path / 'a', towers=(tower,), opset=opset)) == [tower]


def test_a_failed_export_leaves_what_was_there(small, tmp_path, monkeypatch):
    def found_out(*args):
        raise ValueError('found out')

    (path,) = export_onnx(small, tmp_path / 'a', towers=('text',)).values()
    monkeypatch.setattr('mope_clip.pruners.deploy.check_onnx', found_out)
    with pytest.raises(ValueError, match='found out'):
        export_onnx(small, tmp_path / 'a', towers=('text',))
    assert [entry.name for entry in tmp_path.iterdir()] == ['a']
    check_onnx(small, 'text', path)


def test_a_missing_package_is_named_with_its_cure():
    sentence = r"no_such_package cannot be imported: pip install 'mope_clip\[export\]'"
    with pytest.raises(ImportError, match=sentence):
        check_installed('export', 'json', 'no_such_package')


def test_a_real_shape_goes_to_onnx(tmp_path):
    "ViT-B/32, unevenly pruned at random: the folder is checked in onnxruntime as it is written"
    config = open_clip.get_model_config('ViT-B-32')
    clip = build_clip(dict(name='ViT-B-32', model_cfg=config, preprocess_cfg={}), None)
    draw, spec = np.random.default_rng(0), whole_spec(clip)
    for layers in (spec.vision, spec.text):
        for layer, kept in list(layers.items()):
            for kind, most in (('heads', 5), ('neurons', 700)):
                count = draw.integers(0, most)
                kept[kind] = sorted(draw.choice(kept[kind], count, replace=False).tolist())
            if layer % 3 == 2:
                del layers[layer]
    small = prune(clip, spec)
    files = export_onnx(small, tmp_path / 'onnx')
    for tower in TOWERS:
        parameters = sum(p.numel() for p in small.tower(tower).parameters())
        assert files[tower].stat().st_size < 4.1 * parameters + 1e6
    assert json.loads((tmp_path / 'onnx/config.json').read_text())['context_length'] == 77


@pytest.mark.parametrize('name', GRID)
def test_attention_as_one_operator_is_the_same(name, tmp_path):
    "Opset 23 over the grid of architectures, unevenly pruned at random: checked as it is written"
    clip, draw = model_of(name), np.random.default_rng(0)
    spec = whole_spec(clip)
    for layers in (spec.vision, spec.text):
        for layer, kept in layers.items():
            heads = draw.choice(kept['heads'], draw.integers(layer > 0, 5), replace=False)
            neurons = kept['neurons'][: draw.integers(0, 60)]
            kept.update(heads=sorted(heads.tolist()), neurons=neurons)
    small = prune(clip, spec)
    for tower, path in export_onnx(small, tmp_path / 'onnx', opset=23).items():
        found = [node.op_type for node in onnx.load(path).graph.node]
        layers = sum(heads > 0 for heads, _ in shape_of(small)[tower])
        assert found.count('Attention') == layers, tower
        cut = layers if name == 'custom_norms' else 0
        assert found.count('Split') == cut, 'heads stay side by side, unless they are normed'
