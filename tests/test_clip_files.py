"A CLIP from files and to files: weights, names of other libraries, folders, tags, tokenizers."

import argparse
import json
import math
import os
import re
import sys
import warnings
from copy import deepcopy
from dataclasses import asdict
from unittest.mock import patch

import numpy as np
import open_clip
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, run
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mope_clip.clip import (
    Clip,
    PruneSpec,
    build_clip,
    load_clip,
    prune,
    save_open_clip,
    shape_of,
    small_config,
    tiny_clip,
    weights_hash,
    whole_spec,
    word_tokenizer,
)
from mope_clip.clip.convert import (
    all_hf_names,
    cfg_from_hf,
    config_of,
    from_hf,
    from_tinyclip,
    hf_names,
    mlp_ratio,
    parse_hf,
    preprocess_from_hf,
)
from mope_clip.clip.folders import FORMAT, NOT_FOR_OTHERS, load_tokenizer, seal
from mope_clip.clip.load import named_config
from mope_clip.clip.spec import full_spec
from mope_clip.clip.to_hugging_face import hf_config_and_weights, plain_cfg, preprocess_to_hf
from mope_clip.clip.weights import (
    HF_WEIGHTS,
    TINYCLIP,
    check_weights,
    layout,
    load_strict,
    read_weights,
    shapes_of,
    tower_sizes,
    unwrap,
    weight_files,
)
from mope_clip.data import synth_pairs

SMALL = dict(
    embed_dim=32,
    vision_cfg=dict(image_size=32, layers=2, width=48, head_width=16, patch_size=8, mlp_ratio=2.0),
    text_cfg=dict(context_length=12, vocab_size=50, width=32, heads=4, layers=1, mlp_ratio=3.0),
)


@pytest.fixture(autouse=True)
def nothing_is_learnt():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def says(error, sentence):
    "`pytest.raises` for a part of the sentence, which is no pattern"
    return pytest.raises(error, match=re.escape(sentence))


def near(found, expected, by=1e-5):
    torch.testing.assert_close(found, expected, atol=by, rtol=0)


def equal(ours, theirs):
    "Whether two state dicts are the same to the bit"
    return set(ours) == set(theirs) and all(torch.equal(ours[n], x) for n, x in theirs.items())


def random_model(cfg, kind=open_clip.CLIP):
    "An open_clip model in which no two weights are equal, so that no mistake can hide"
    model = kind(**deepcopy(cfg)).eval()
    for p in model.parameters():
        p.copy_(torch.randn(p.shape) * 0.2)
    return model


@pytest.fixture
def model():
    return random_model(SMALL)


@pytest.fixture
def weights(model):
    return model.state_dict()


# ---- reading files


class Evil:
    "Makes a folder when it is unpickled"

    def __init__(self, at):
        self.at = at

    def __reduce__(self):
        return os.mkdir, (str(self.at),)


def test_marks_of_wrappers_go_as_whole_parts_wherever_they_stand():
    wrapped = {
        'module._orig_mod.visual.proj': 1,
        '_orig_mod.module.logit_scale': 2,
        '_image_encoder.module.visual.conv1.weight': 3,
    }
    bare = {'visual.proj': 1, 'logit_scale': 2, '_image_encoder.visual.conv1.weight': 3}
    assert unwrap(wrapped) == bare
    assert unwrap({'modules.x': 1, 'a.module_b': 2}) == {'modules.x': 1, 'a.module_b': 2}
    with says(ValueError, 'same name'):
        unwrap({'module.a': 1, 'a': 2})


def test_code_in_a_file_is_named_and_never_runs(tmp_path, weights):
    torch.save(dict(state_dict=weights, hook=Evil(tmp_path / 'ran')), tmp_path / 'evil.pt')
    torch.save(nn.Linear(2, 2), tmp_path / 'module.pt')
    with says(ValueError, 'evil.pt cannot be read: it holds a pickled posix.mkdir, which could'):
        read_weights(tmp_path / 'evil.pt')
    with says(ValueError, 'holds a pickled torch.nn.modules.linear.Linear'):
        read_weights(tmp_path / 'module.pt')
    assert not (tmp_path / 'ran').exists()


def test_a_torchscript_archive_is_code_too(tmp_path):
    with warnings.catch_warnings(action='ignore'):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / 'script.pt')
        with says(ValueError, "TorchScript archive, which is code: for OpenAI's weights pass"):
            read_weights(tmp_path / 'script.pt')


@pytest.mark.parametrize('kind', ['pt', 'safetensors'])
def test_a_damaged_file_is_said_by_name(kind, tmp_path, weights):
    torch.save(weights, tmp_path / 'whole.pt')
    save_file(weights, tmp_path / 'whole.safetensors')
    whole = (tmp_path / f'whole.{kind}').read_bytes()
    contents = dict(
        cut=whole[: len(whole) // 2],
        empty=b'',
        noise=np.random.default_rng(0).bytes(999),
        lfs=b'version https://git-lfs.github.com/spec/v1\n',
    )
    for name, content in contents.items():
        (tmp_path / f'{name}.{kind}').write_bytes(content)
        with says(ValueError, f'{name}.{kind} cannot be read: it is damaged, truncated or no file'):
            read_weights(tmp_path / f'{name}.{kind}')


def test_a_file_without_weights_says_what_it_holds(tmp_path):
    torch.save(dict(epoch=3, optimizer={}), tmp_path / 'none.pt')
    torch.save(3, tmp_path / 'number.pt')
    torch.save({}, tmp_path / 'empty.pt')
    with says(ValueError, 'none.pt holds no weights but epoch, optimizer'):
        read_weights(tmp_path / 'none.pt')
    with says(ValueError, 'holds no weights but one int'):
        read_weights(tmp_path / 'number.pt')
    with says(ValueError, 'holds no weights but nothing'):
        read_weights(tmp_path / 'empty.pt')


def test_the_systems_own_errors_pass_through(tmp_path, weights):
    torch.save(weights, tmp_path / 'whole.pt')
    refused = patch('torch.load', side_effect=PermissionError('not yours'))
    with refused, says(PermissionError, 'not yours'):
        read_weights(tmp_path / 'whole.pt')


def test_the_files_of_a_folder_are_found_in_the_order_of_transformers(tmp_path):
    index = dict(weight_map=dict(a='2.bin', b='1.bin', c='2.bin'))
    (tmp_path / HF_WEIGHTS[3]).write_text(json.dumps(index), encoding='utf-8')
    with says(FileNotFoundError, f'1.bin is missing, although {HF_WEIGHTS[3]} names it'):
        weight_files(tmp_path)
    for name in ('1.bin', '2.bin'):
        (tmp_path / name).touch()
    assert [file.name for file in weight_files(tmp_path)] == ['1.bin', '2.bin']
    (tmp_path / HF_WEIGHTS[0]).touch()
    assert [file.name for file in weight_files(tmp_path)] == [HF_WEIGHTS[0]]
    assert weight_files(tmp_path / '2.bin') == [tmp_path / '2.bin']


def test_nothing_to_read_is_said(tmp_path):
    for nothing in (tmp_path / 'nothing.pt', tmp_path / 'nowhere', tmp_path):
        with says(FileNotFoundError, 'There are no weights at'):
            weight_files(nothing)
    with says(FileNotFoundError, 'a folder with model.safetensors'):
        read_weights(tmp_path)


def trained_checkpoint(weights):
    "What open_clip's trainer saves after a step"
    trained = random_model(SMALL)
    adam = torch.optim.AdamW(trained.parameters())
    for p in trained.parameters():
        p.grad = torch.ones_like(p)
    adam.step()
    return dict(
        epoch=3,
        name='run',
        state_dict={f'module.{name}': x for name, x in weights.items()},
        optimizer=adam.state_dict(),
        scaler=dict(scale=65536.0),
    )


def test_a_checkpoint_gives_its_weights_without_the_optimiser(tmp_path, weights):
    torch.save(trained_checkpoint(weights), tmp_path / 'epoch_3.pt')
    back = read_weights(tmp_path / 'epoch_3.pt')
    assert equal(back, weights)
    size = sum(x.numel() * x.element_size() for x in back.values())
    assert (tmp_path / 'epoch_3.pt').stat().st_size > 2.9 * size


def test_every_container_of_trainers_is_opened(tmp_path, weights):
    compiled = {f'_orig_mod.{name}': x for name, x in weights.items()}
    for content in (dict(model=weights), dict(epoch=1, model_state_dict=compiled), weights):
        torch.save(content, tmp_path / 'model.pt')
        assert equal(read_weights(tmp_path / 'model.pt'), weights)


def test_options_of_tinyclip_are_read_along(tmp_path, weights):
    content = dict(state_dict=weights, args=argparse.Namespace(lr=1))
    torch.save(content, tmp_path / 'model.pt')
    assert equal(read_weights(tmp_path / 'model.pt'), weights)


def test_parameters_are_read_as_tensors(tmp_path, model):
    torch.save(dict(model.named_parameters()), tmp_path / 'parameters.pt')
    read = read_weights(tmp_path / 'parameters.pt')
    assert not any(x.requires_grad for x in read.values())


def test_files_from_before_torch_had_zip_archives_are_read(tmp_path, weights):
    torch.save(weights, tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
    assert equal(read_weights(str(tmp_path / 'old.pt')), weights)


def test_shards_are_read_as_one(tmp_path, weights):
    shards = 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'
    names = sorted(weights)
    for i, shard in enumerate(shards):
        save_file({name: weights[name] for name in names[i::2]}, tmp_path / shard)
    places = dict(weight_map={name: shards[i % 2] for i, name in enumerate(names)})
    (tmp_path / HF_WEIGHTS[1]).write_text(json.dumps(places), encoding='utf-8')
    assert equal(read_weights(tmp_path), weights)


# ---- weights that fit


def test_layouts_are_told_apart_by_names(weights):
    custom = open_clip.CustomTextCLIP(**deepcopy(SMALL)).state_dict()
    assert [layout(weights), layout(custom)] == ['open_clip', 'open_clip_custom']
    assert layout({'text_model.final_layer_norm.bias': 0}) == 'hf'
    assert {layout({f'{part}.visual.proj': 0}) for part in TINYCLIP} == {'tinyclip'}
    with says(ValueError, 'no weights of a CLIP (layer1.weight'):
        layout({'layer1.weight': 0})
    with says(ValueError, 'accepted are'):
        layout({name: x for name, x in weights.items() if name.startswith('visual.')})


def test_constants_of_old_files_are_dropped(weights):
    shapes = {name: x.shape for name, x in weights.items()}
    old = {'text_model.embeddings.position_ids': torch.arange(12)[None]}
    check_weights({**weights, **old, 'vocab_size': torch.tensor(50)}, shapes, 'the model')
    check_weights(weights, dict.fromkeys(weights), 'names alone')


def test_differences_are_counted_and_the_first_is_shown(weights):
    shapes = {name: x.shape for name, x in weights.items()}
    more = {**weights, 'visual.ln_pre.gamma': torch.ones(3)}
    less = {name: x for name, x in weights.items() if not name.startswith('ln_final')}
    other = {**weights, 'visual.proj': torch.ones(48, 31)}
    for state, sentence in (
        (more, 'not those of the model: 1 superfluous (visual.ln_pre.gamma).'),
        (less, '2 missing (ln_final.weight, ...)'),
        (other, '1 of another shape (visual.proj (48, 31), not (48, 32))'),
    ):
        with says(ValueError, sentence):
            check_weights(state, shapes, 'the model')


def test_shapes_of_a_configuration_need_no_weights(weights):
    assert shapes_of(SMALL) == {name: tuple(x.shape) for name, x in weights.items()}
    assert shapes_of(dict(SMALL, custom_text=True)) == shapes_of(SMALL)
    large = shapes_of(open_clip.get_model_config('ViT-L-14'))
    assert sum(map(math.prod, large.values())) == 427_616_513


def test_either_class_takes_the_weights_of_the_other(model, weights):
    weights = deepcopy(weights)
    custom = open_clip.CustomTextCLIP(**deepcopy(SMALL)).eval()
    load_strict(custom, {**weights, 'logit_scale': weights['logit_scale'][None]}, 'small')
    other = open_clip.CLIP(**deepcopy(SMALL)).eval()
    load_strict(other, custom.state_dict(), 'small')
    assert equal(other.state_dict(), weights)
    ids = torch.randint(3, 50, (3, 12))
    near(model.encode_text(ids), custom.encode_text(ids))


def test_another_size_is_an_error_and_never_resized(model, weights):
    wider = dict(SMALL, vision_cfg={**SMALL['vision_cfg'], 'image_size': 64})
    sentence = 'wider: 1 of another shape (visual.positional_embedding (17, 48), not (65, 48))'
    with says(ValueError, sentence):
        load_strict(open_clip.CLIP(**deepcopy(wider)), weights, 'wider')
    shorter = dict(SMALL, vision_cfg={**SMALL['vision_cfg'], 'layers': 1})
    with says(ValueError, 'superfluous (visual.transformer.resblocks.1.'):
        load_strict(open_clip.CLIP(**deepcopy(shorter)), weights, 'shorter')
    with says(ValueError, 'have the names of hf, not of open_clip'):
        load_strict(model, {'vision_model.x': 0, 'text_model.y': 1}, 'small')


def test_sizes_of_towers_are_read_from_their_tensors(weights):
    vision, text = (dict(width=w, layers=n, neurons=96) for w, n in ((48, 2), (32, 1)))
    assert tower_sizes(weights) == dict(vision=vision, text=text)


def without(state, start):
    return {name: x for name, x in state.items() if not name.startswith(start)}


def test_towers_without_one_size_are_refused(weights):
    block = 'visual.transformer.resblocks'
    for state, sentence in (
        (
            {**weights, f'{block}.1.mlp.c_fc.weight': torch.ones(90, 48)},
            'vision tower has FFNs of different sizes ([96, 90] neurons)',
        ),
        (
            {**weights, 'transformer.resblocks.0.attn.out_proj.weight': torch.ones(32, 24)},
            'text tower has lost heads (widths of the attention [24], of the stream 32)',
        ),
        (without(weights, f'{block}.0.attn'), 'layer that is not whole'),
        (
            {**weights, f'{block}.0.ls_1.gamma': torch.ones(48)},
            'superfluous (visual.transformer.resblocks.0.ls_1.gamma)',
        ),
        ({'visual.layer1.0.conv1.weight': torch.ones(1)}, 'not ResNet, TinyViT'),
        (without(weights, 'transformer.'), 'text tower has no layers'),
    ):
        with says(ValueError, sentence):
            tower_sizes(state)


# ---- Hugging Face's words


def hf_config(act='quick_gelu', eos=2, vision=None, text=None):
    "A small CLIP in which no two sizes agree by chance; bos_token_id is not used"
    return dict(
        model_type='clip',
        projection_dim=24,
        text_config=dict(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=10,
            hidden_act=act,
            eos_token_id=eos,
            bos_token_id=None,
            **(text or {}),
        ),
        vision_config=dict(
            hidden_size=48,
            intermediate_size=70,
            num_hidden_layers=1,
            num_attention_heads=3,
            image_size=32,
            patch_size=8,
            hidden_act=act,
            **(vision or {}),
        ),
    )


def hf_model(config):
    "The same random numbers in every such model: its settings alone make it another function"
    model, generator = CLIPModel(CLIPConfig(**deepcopy(config))).eval(), torch.Generator()
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=generator.manual_seed(p.numel())) * 0.2)
    return model


def test_every_tensor_has_one_name_in_each_vocabulary(weights):
    theirs = hf_model(hf_config()).state_dict()
    names = all_hf_names(hf_names(vision=1, text=2))
    assert sorted(names) == sorted(theirs)
    assert len(set(names)) == len(theirs)
    assert set(hf_names(vision=2, text=1)) == set(weights)


def test_no_neuron_is_lost_to_a_ratio():
    sizes = [(width, n) for width in range(1, 1100, 7) for n in range(1, 5 * width, 11)]
    assert all(int(width * mlp_ratio(width, n)) == n for width, n in sizes)
    assert any(int(width * (n / width)) != n for width, n in sizes)  # the quotient alone would
    assert mlp_ratio(768, 3072) == 4.0


def test_settings_are_read_as_transformers_reads_them():
    assert parse_hf(dict(model_type='clip')).vision_config.patch_size == 32
    vision = dict(hidden_size=256, num_attention_heads=4)
    old = dict(
        model_type='clip',
        text_config_dict=None,
        vision_config=vision,
        vision_config_dict=dict(patch_size=16),
        torch_dtype='float32',
        transformers_version='4.16.0.dev0',
    )
    parsed = parse_hf(old).vision_config
    # the second one wins, defaults included
    assert (parsed.hidden_size, parsed.patch_size) == (768, 16)
    assert old['vision_config'] == dict(hidden_size=256, num_attention_heads=4)


@pytest.mark.parametrize(
    ('config', 'sentence'),
    [
        (dict(model_type='blip'), "of a 'blip' model"),
        (dict(model_type='clip_text_model'), 'single towers'),
        (hf_config('relu'), "hidden_act 'relu'"),
        (hf_config(eos=[2, 3]), 'eos_token_id [2, 3]'),
        (hf_config(vision=dict(num_channels=1)), 'num_channels 1'),
        ({**hf_config(), 'vision_config': dict(hidden_act='gelu')}, 'has one for both'),
        (
            {**hf_config(), 'vision_config': dict(image_size=[32, 48])},
            'image_size [32, 48] (one number',
        ),
        (
            {**hf_config(), 'vision_config': dict(hidden_size=33)},
            'not a multiple of the number of attention heads',
        ),
    ],
)
def test_settings_that_open_clip_has_no_word_for_are_refused_by_name(config, sentence):
    with says(ValueError, sentence):
        parse_hf(config)


def test_settings_are_said_in_open_clips_words():
    cfg = cfg_from_hf(hf_config('gelu', eos=39))
    vision, text = cfg['vision_cfg'], cfg['text_cfg']
    assert (cfg['embed_dim'], cfg['quick_gelu']) == (24, False)
    assert (vision['head_width'], text['heads']) == (16, 4)
    assert [int(t['width'] * t['mlp_ratio']) for t in (vision, text)] == [70, 37]
    assert (text['pool_type'], text['eos_id']) == ('eos', 39)
    assert cfg_from_hf(hf_config())['text_cfg']['pool_type'] == 'argmax'
    other = cfg_from_hf(hf_config(text=dict(layer_norm_eps=1e-3)))
    assert other['text_cfg']['norm_kwargs'] == dict(eps=1e-3) and 'norm_kwargs' not in text


def test_settings_without_a_word_are_those_of_the_first_clip():
    found, known = (
        cfg_from_hf(dict(model_type='clip')),
        open_clip.get_model_config('ViT-B-32-quickgelu'),
    )
    for tower in ('vision_cfg', 'text_cfg'):
        assert {name: found[tower][name] for name in known[tower]} == known[tower]


HF_IDS = torch.tensor(
    [
        [7, 2, 45, 39, 0, 0, 0, 0, 0, 0],
        [3, 39, 49, 39, 39, 39, 39, 39, 39, 39],
        [2, 9, 8, 7, 6, 5, 4, 3, 41, 39],
    ]
)


def test_a_converted_model_is_the_same_function_whatever_its_settings():
    pixels, texts = torch.randn(3, 3, 32, 32, dtype=torch.float64), []
    for act in ('quick_gelu', 'gelu'):
        for eos in (2, 39):
            for eps in (1e-5, 1e-2):
                towers = dict(vision=dict(layer_norm_eps=eps), text=dict(layer_norm_eps=eps / 10))
                config = hf_config(act, eos, **towers)
                theirs = hf_model(config).double()
                converted = from_hf(config, theirs.state_dict())
                ours = open_clip.CLIP(**deepcopy(converted.config)).double().eval()
                load_strict(ours, converted.weights, 'converted')
                out = theirs(input_ids=HF_IDS, pixel_values=pixels)
                image, text, scale = ours(pixels, HF_IDS)
                near(image, out.image_embeds, by=1e-10)
                near(text, out.text_embeds, by=1e-10)
                near(scale * image @ text.T, out.logits_per_image, by=1e-10)
                texts.append(text)
    pairs = [(a, b) for i, a in enumerate(texts) for b in texts[:i]]
    assert min((a - b).abs().max() for a, b in pairs) > 1e-4  # each of the eight is another


def test_a_converted_model_behind_the_view_of_the_library():
    config = hf_config('gelu', 39)
    theirs = hf_model(config)
    source = theirs.state_dict()
    old = {'text_model.embeddings.position_ids': torch.arange(10)[None]}
    converted = from_hf(config, {**source, **old})
    settings = dict(name='converted', model_cfg=converted.config, preprocess_cfg={})
    clip = build_clip(settings, None)
    load_strict(clip.model, converted.weights, 'converted')
    pixels = torch.randn(3, 3, 32, 32)
    out = theirs(input_ids=HF_IDS, pixel_values=pixels)
    near(clip.encode_text(HF_IDS, normalize=True), out.text_embeds)
    near(clip.encode_image(pixels, normalize=True), out.image_embeds)
    numbers = [sum(x.numel() for x in state.values()) for state in (converted.weights, source)]
    assert numbers[0] == numbers[1]
    assert all(x.is_contiguous() for x in converted.weights.values())  # as files want them


def test_weights_that_are_not_those_configured_are_refused():
    config = hf_config('gelu', 39)
    source = hf_model(config).state_dict()
    for state, sentence in (
        (
            {name: x for name, x in source.items() if 'vision' not in name},
            'missing (vision_model.embeddings.class_embedding, ...)',
        ),
        ({**source, 'logit_bias': torch.zeros(1)}, '1 superfluous (logit_bias)'),
        (
            {**source, 'text_projection.weight': torch.zeros(23, 32)},
            '1 of another shape (text_projection (32, 23), not (32, 24))',
        ),
    ):
        with says(ValueError, sentence):
            from_hf(config, state)
    config['text_config']['num_hidden_layers'] = 1
    with says(ValueError, 'superfluous (text_model.encoder.layers.1.'):
        from_hf(config, source)


# ---- to Hugging Face


def plain(**options):
    return plain_cfg({**SMALL, **options})


def test_plain_options_pass():
    assert plain()['vision'].width == 48
    plain(quick_gelu=True, custom_text=True)


@pytest.mark.parametrize(
    ('tower', 'options'),
    [
        ('text', dict(no_causal_mask=True)),
        ('text', dict(pool_type='last')),
        ('text', dict(pool_type='eos')),
        ('text', dict(proj_bias=True)),
        ('text', dict(norm_kwargs=dict(elementwise_affine=False))),
        ('vision', dict(no_ln_pre=True)),
        ('vision', dict(pool_type='avg')),
        ('vision', dict(ls_init_value=0.1)),
        ('vision', dict(scale_attn=True)),
        ('vision', dict(image_size=(32, 64))),
        ('vision', dict(layers=[3, 4, 6, 3])),
    ],
)
def test_options_that_hugging_face_has_no_word_for_are_refused_by_name(tower, options):
    name = next(iter(options))
    with says(ValueError, f'cannot express this model: {tower}_cfg {name}='):
        plain(**{f'{tower}_cfg': {**SMALL[f'{tower}_cfg'], **options}})


def test_options_of_the_whole_model_are_refused_too():
    with says(ValueError, 'init_logit_bias=-10'):
        plain(init_logit_bias=-10)


def is_plain(name):
    try:
        return bool(plain_cfg(open_clip.get_model_config(name)))
    except (ValueError, TypeError):
        return False


def test_of_open_clips_architectures_the_plain_ones_pass():
    passed = {name for name in open_clip.list_models() if is_plain(name)}
    assert {'ViT-B-32', 'ViT-L-14-336-quickgelu', 'ViT-H-14', 'ViT-bigG-14'} <= passed
    others = 'RN50x4 coca_ViT-L-14 ViT-B-16-SigLIP roberta-ViT-B-32 convnext_base EVA02-B-16'
    assert not set(others.split()) & passed


@pytest.mark.parametrize('act', ['quick_gelu', 'gelu'])
@pytest.mark.parametrize('eos', [2, 39])
def test_there_and_back_is_the_same_to_the_bit(act, eos):
    config = hf_config(act, eos, vision=dict(layer_norm_eps=1e-3))
    source = hf_model(config).state_dict()
    back = hf_config_and_weights(*from_hf(config, source))
    assert equal(back.weights, source)
    for tower in ('text_config', 'vision_config'):
        found = {name: back.config[tower][name] for name in config[tower]}
        assert found == config[tower]


def memory_of(state):
    return {x.untyped_storage().data_ptr() for x in state.values()}


def test_both_classes_go_over_and_share_nothing(weights):
    custom = random_model(SMALL, open_clip.CustomTextCLIP).state_dict()
    config, ours = hf_config_and_weights(SMALL, weights)
    _, theirs = hf_config_and_weights(dict(SMALL, custom_text=True), custom)
    assert list(ours) == list(theirs)
    assert config['vision_config']['intermediate_size'] == 96
    assert not memory_of(ours) & memory_of(weights)


def test_a_model_pooled_at_the_arg_max_says_two_whatever_its_eos_id(weights):
    cfg = dict(SMALL, text_cfg=SMALL['text_cfg'] | dict(eos_id=9))
    row = {**weights, 'logit_scale': weights['logit_scale'][None]}
    config, state = hf_config_and_weights(cfg, row)
    assert (config['text_config']['eos_token_id'], state['logit_scale'].shape) == (2, ())


def test_a_pruned_model_with_even_layers_is_a_clipmodel(tmp_path):
    tiny = tiny_clip()
    spec = whole_spec(tiny)
    del spec.vision[1]
    for layer in spec.text.values():
        layer['neurons'] = range(0, 128, 2)
    small = prune(tiny, spec)
    config, state = hf_config_and_weights(small.config['model_cfg'], small.model.state_dict())
    sizes = config['vision_config']['num_hidden_layers'], config['text_config']['intermediate_size']
    assert sizes == (2, 64)
    (tmp_path / 'config.json').write_text(json.dumps(config), encoding='utf-8')
    save_file(state, tmp_path / 'model.safetensors', metadata=dict(format='pt'))
    theirs = CLIPModel.from_pretrained(tmp_path).eval()
    assert equal(from_hf(config, read_weights(tmp_path)).weights, small.model.state_dict())
    ids = tiny.tokenizer(['a red square', 'two blue circles'])
    pixels = torch.randn(2, 3, 32, 32)
    out = theirs(input_ids=ids, pixel_values=pixels)
    near(out.text_embeds, small.encode_text(ids, normalize=True))
    near(out.image_embeds, small.encode_image(pixels, normalize=True))


@pytest.mark.parametrize(
    ('kept', 'sentence'),
    [
        (lambda layer: dict(heads=range(3), neurons=range(128)), 'vision tower has lost heads'),
        (
            lambda layer: dict(heads=range(4), neurons=range(100 + layer)),
            'FFNs of different sizes ([100, 101, 102]',
        ),
    ],
)
def test_uneven_models_have_no_place_at_hugging_face(kept, sentence):
    tiny = tiny_clip()
    spec = whole_spec(tiny)
    spec.vision = {layer: kept(layer) for layer in range(3)}
    small = prune(tiny, spec)
    with says(ValueError, sentence):
        hf_config_and_weights(small.config['model_cfg'], small.model.state_dict())


# ---- pixels


def test_old_and_short_preparations_are_read():
    old = preprocess_from_hf(dict(size=224, crop_size=224, resample=3, do_normalize=True), 224)
    assert old['resize_mode'] == 'shortest'
    assert old['mean'] == list(open_clip.OPENAI_DATASET_MEAN)
    assert preprocess_from_hf(dict(do_normalize=False), 32)['std'] == [1.0, 1.0, 1.0]
    square = dict(size=dict(height=32, width=32), do_center_crop=False, resample=2)
    assert preprocess_from_hf(square, 32)['resize_mode'] == 'squash'


@pytest.mark.parametrize(
    ('config', 'sentence'),
    [
        (dict(size=dict(shortest_edge=36)), "size {'shortest_edge': 36}"),
        (dict(crop_size=28), 'crop_size 28'),
        (dict(do_center_crop=False), 'the model reads 32 pixels'),
        (dict(resample=1), 'resample 1'),
        (dict(do_rescale=False), 'do_rescale false'),
        (dict(do_resize=False), 'do_resize false'),
        (dict(rescale_factor=1 / 127.5), 'rescale_factor'),
    ],
)
def test_preparations_that_open_clip_would_do_otherwise_are_refused(config, sentence):
    with says(ValueError, sentence):
        preprocess_from_hf(config, 32)


PREPARATIONS = (
    dict(
        mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4], interpolation='bicubic', resize_mode='shortest'
    ),
    dict(mean=[0.0] * 3, std=[1.0] * 3, interpolation='bilinear', resize_mode='squash'),
)


@pytest.mark.parametrize('ours', PREPARATIONS)
def test_a_picture_has_the_same_pixels_in_both_libraries(ours):
    noise = np.random.default_rng(0).integers(0, 255, (50, 83, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((97, 61))
    theirs = preprocess_to_hf(ours, 32)
    assert preprocess_from_hf(theirs, 32) == ours
    settings = open_clip.transform.PreprocessCfg(size=32, **ours)
    prepared = open_clip.transform.image_transform_v2(settings, is_train=False)(picture)
    processor = CLIPImageProcessorPil(**theirs)
    near(processor(picture, return_tensors='pt')['pixel_values'][0], prepared)


def test_resizing_to_the_longest_side_has_no_word_at_hugging_face():
    with says(ValueError, "no resize_mode 'longest'"):
        preprocess_to_hf(dict(resize_mode='longest'), 32)


# ---- TinyCLIP

WIDE = dict(
    embed_dim=40,
    quick_gelu=False,
    vision_cfg=dict(
        image_size=48, patch_size=16, head_width=64, width=128, layers=2, mlp_ratio=4.0
    ),
    text_cfg=dict(context_length=9, vocab_size=50, heads=1, width=64, layers=1, mlp_ratio=4.0),
)


@pytest.fixture
def wide():
    return random_model(WIDE).state_dict()


def tinyclip_names(state, mark='module.'):
    "The names that TinyCLIP writes, with the marks of its wrappers"
    parts = dict(visual='_image_encoder', logit_scale='_logit_scale')
    first = {name: name.split('.')[0] for name in state}
    return {
        f'{parts.get(first[name], "_text_encoder")}.{mark}{name}': x for name, x in state.items()
    }


def test_a_configuration_is_read_from_weights(wide, weights):
    assert config_of(wide) == WIDE
    assert config_of(wide, quick_gelu=True) == dict(WIDE, quick_gelu=True)
    # it has four heads: 16 was said, and nothing contradicts it
    assert config_of(weights, head_width=16)['text_cfg']['heads'] == 2


@pytest.mark.parametrize('name', ['ViT-B-32', 'ViT-L-14-336'])
def test_configurations_of_well_known_models_are_read_from_their_shapes(name):
    known = open_clip.get_model_config(name)
    shapes = shapes_of(known)
    found = config_of({n: torch.empty(s, device='meta') for n, s in shapes.items()})
    for tower in ('vision_cfg', 'text_cfg'):
        assert {n: found[tower][n] for n in known[tower]} == known[tower]


def test_weights_that_have_no_plain_configuration_are_refused(wide, weights):
    with says(ValueError, 'vision tower is 48 wide, which is no multiple of the head width 64'):
        config_of(weights)
    with says(ValueError, '10 positions of patches are not a square'):
        config_of({**wide, 'visual.positional_embedding': torch.ones(11, 128)})
    with says(ValueError, 'of another shape (ln_final.weight (63,), not (64,))'):
        config_of({**wide, 'ln_final.weight': torch.ones(63)})


def tinyclip_checkpoint(state):
    "The layout of TinyCLIP's trainer: options, one optimiser for each of three parts, a scaler"
    adam = torch.optim.AdamW([nn.Parameter(torch.ones(2))]).state_dict()
    return dict(
        args=argparse.Namespace(model='made by this test', lr=1e-4),
        epoch=24,
        iter_in_epoch=7,
        num_batches=8,
        samples_per_epoch=8,
        name='run',
        state_dict=tinyclip_names(state),
        optimizer=[adam] * 3,
        scaler=dict(scale=65536.0),
    )


def test_a_checkpoint_of_tinyclip_says_its_shape(wide, tmp_path):
    torch.save(tinyclip_checkpoint(wide), tmp_path / 'tinyclip.pt')
    read = read_weights(tmp_path / 'tinyclip.pt')
    assert layout(read) == 'tinyclip'
    converted = from_tinyclip(read)
    assert converted.config == WIDE and equal(converted.weights, wide)
    ours = open_clip.CLIP(**deepcopy(converted.config)).eval()
    load_strict(ours, converted.weights, 'TinyCLIP')
    assert equal(ours.state_dict(), wide)


def test_what_shapes_do_not_tell_can_be_said(wide):
    cfg = from_tinyclip(tinyclip_names(wide), head_width=32, quick_gelu=True).config
    said = cfg['vision_cfg']['head_width'], cfg['text_cfg']['heads'], cfg['quick_gelu']
    assert said == (32, 2, True)


def test_masks_and_marks_in_tinyclips_names_make_no_difference(wide):
    masked = {**tinyclip_names(wide), '_text_encoder.module.attn_mask': torch.ones(9, 9)}
    assert set(from_tinyclip(masked).weights) == set(wide)
    for mark in ('', 'module.module.'):
        assert from_tinyclip(tinyclip_names(wide, mark)).config == WIDE


def renamed(state, old, new):
    return {name.replace(old, new): x for name, x in state.items()}


def test_uneven_checkpoints_of_tinyclip_are_refused(wide):
    made, block = tinyclip_names(wide), 'visual.transformer.resblocks'
    for state, sentence in (
        (
            {**made, '_image_encoder.module.l0_module.heads_loga': torch.ones(2, 2)},
            'automatic weight inheritance (_image_encoder.l0_module.heads_loga',
        ),
        (
            renamed(made, '_image_encoder.module', 'image_encoder_without_ddp'),
            'only the manual (uniform) ones are read',
        ),
        (
            tinyclip_names({**wide, f'{block}.1.mlp.c_fc.weight': torch.ones(500, 128)}),
            'FFNs of different sizes ([512, 500] neurons)',
        ),
        (
            tinyclip_names({**wide, f'{block}.0.attn.out_proj.weight': torch.ones(128, 64)}),
            'vision tower has lost heads',
        ),
        (renamed(made, 'visual.', 'visual.layer1.'), 'not ResNet, TinyViT or other timm towers'),
    ):
        with says(ValueError, sentence):
            from_tinyclip(state)


# ---- tokenizers and small models


def test_words_plurals_and_ends_are_tokens():
    tokenizer = word_tokenizer(
        ['A red square.', 'two red squares', 'a star-shaped thing'], context=6
    )

    def words(text):
        return tokenizer.tokenizer.convert_ids_to_tokens(tokenizer(text)[0])

    assert words('Red squares!') == ['red', 'square', 's', '<end>', '<pad>', '<pad>']
    assert words('a star-shaped zebra') == ['a', 'star-shaped', '<unk>', '<end>', '<pad>', '<pad>']
    assert words('a a a a a a a a') == ['a'] * 5 + ['<end>']  # cut, but it still ends
    vocabulary = tokenizer.tokenizer.get_vocab()
    assert (vocabulary['<pad>'], vocabulary['<end>']) == (0, len(vocabulary) - 1)
    assert 'squares' not in vocabulary
    assert tokenizer(['a', 'two red things']).argmax(1).tolist() == [1, 4]


def test_a_small_configuration_says_every_size():
    sizes = dict(width=48, layers=(2, 1), heads=6, image=24, patch=8, context=5)
    clip = build_clip(small_config(vocab=10, **sizes), None)
    assert shape_of(clip) == dict(vision=[[6, 192]] * 2, text=[[6, 192]])
    assert (clip.vision.tokens, clip.text.tokens) == (3 * 3 + 1, 5)
    assert clip.vision.blocks[0].head_dim == clip.text.blocks[0].head_dim == 8


@pytest.fixture
def tiny():
    return tiny_clip()


@pytest.fixture
def pairs():
    return synth_pairs(4)


def pixels_of(clip, pairs):
    return torch.stack([clip.preprocess(picture) for picture in pairs['image']])


def tokens_of(clip, pairs):
    return clip.tokenizer([caption for captions in pairs['captions'] for caption in captions])


def test_the_tiny_model_is_the_same_every_time_and_complete(tiny, pairs):
    assert weights_hash(tiny) == weights_hash(tiny_clip()) != weights_hash(tiny_clip(seed=1))
    pixels, tokens = pixels_of(tiny, pairs), tokens_of(tiny, pairs)
    assert tiny.encode_image(pixels).shape == (4, 32)
    assert tiny.encode_text(tokens).shape == (8, 32)
    assert tiny.text.trim(tokens).shape[1] < tokens.shape[1]
    for ours, theirs in (
        (tiny.encode_image(pixels, True), tiny.model.encode_image(pixels, True)),
        (tiny.encode_text(tokens, True), tiny.model.encode_text(tokens, True)),
    ):
        near(ours, theirs, by=1e-6)


# ---- our own folders


def cut(clip):
    "An uneven part of the tiny model"
    return PruneSpec(
        vision={0: dict(heads=[0, 2], neurons=range(0, 128, 4)), 2: dict(heads=[], neurons=[5])},
        text={1: dict(heads=[3], neurons=range(64))},
        base=clip.spec.base,
        provenance=dict(by='hand'),
    )


@pytest.fixture
def small(tiny):
    return prune(tiny, cut(tiny))


def test_a_saved_model_comes_back_bit_for_bit_with_its_words(small, tiny, pairs, tmp_path):
    pixels, tokens = pixels_of(tiny, pairs), tokens_of(tiny, pairs)
    small.save(tmp_path / 'a')
    back = load_clip(f'{tmp_path}/a', device='cpu')
    assert back.spec == cut(tiny) and weights_hash(back) == weights_hash(small)
    assert torch.equal(back.tokenizer(['red squares']), tiny.tokenizer(['red squares']))
    assert torch.equal(back.encode_text(tokens), small.encode_text(tokens))
    for n in (4, 1, 2):  # of one image too, where other kernels are used
        again = load_clip(f'{tmp_path}/a', device='cpu')
        assert torch.equal(again.encode_image(pixels[:n]), small.encode_image(pixels[:n]))


def test_a_loaded_model_is_pruned_again_and_still_refers_to_its_base(small, tiny, tmp_path):
    small.save(tmp_path / 'a')
    back = load_clip(tmp_path / 'a', device='cpu')
    depth = whole_spec(back)
    del depth.vision[1]
    prune(back, depth).save(tmp_path / 'b')
    assert load_clip(tmp_path / 'b', device='cpu').spec.vision == {0: cut(tiny).vision[0]}


def test_a_folder_holds_the_small_tensors_the_base_and_a_card(small, tmp_path):
    small.save(tmp_path / 'small')
    names = 'README.md config.json model.safetensors tokenizer.json tokenizer_config.json'
    assert sorted(file.name for file in (tmp_path / 'small').iterdir()) == names.split()
    stored = json.loads((tmp_path / 'small' / 'config.json').read_text(encoding='utf-8'))
    assert stored['model_cfg'] == small.config['model_cfg']
    assert PruneSpec(**stored['spec']) == small.spec
    assert repr(small) in (tmp_path / 'small' / 'README.md').read_text(encoding='utf-8')
    numbers = sum(p.numel() for p in small.model.parameters())
    assert (tmp_path / 'small' / 'model.safetensors').stat().st_size < 4 * numbers + 10_000


def named(clip):
    "The same model with a vocabulary that is named, not saved"
    clip.tokenizer = None
    clip.config = dict(clip.config, tokenizer='ViT-B-32')
    return clip


def test_a_folder_without_a_tokenizer_of_its_own_is_three_files(small, tmp_path):
    named(small).save(tmp_path / 'm')
    names = sorted(file.name for file in (tmp_path / 'm').iterdir())
    assert names == ['README.md', 'config.json', 'model.safetensors']


def test_open_clips_own_vocabulary_is_named_where_it_is_used(small, tmp_path):
    small.tokenizer = open_clip.SimpleTokenizer()
    small.save(tmp_path / 'm')
    stored = json.loads((tmp_path / 'm' / 'config.json').read_text(encoding='utf-8'))
    assert stored['tokenizer'] == 'ViT-B-32'


def with_own_words(**text):
    "A small model with open_clip's own vocabulary, cleaned as its configuration says"
    config = small_config(49408, context=12)
    config['model_cfg']['text_cfg'].pop('hf_tokenizer_name')
    config['model_cfg']['text_cfg']['tokenizer_kwargs'] = text
    return build_clip(config, open_clip.SimpleTokenizer(context_length=12, **text))


@pytest.mark.parametrize('write', [Clip.save, save_open_clip])
def test_open_clips_own_vocabulary_is_cleaned_as_before(write, tmp_path):
    clip, said = with_own_words(clean='canonicalize'), ['a "red", Square!', "It's_one."]
    for name in ('once', 'twice'):
        write(clip, tmp_path / name)
        back = load_clip(tmp_path / name, device='cpu')
        assert torch.equal(back.tokenizer(said), clip.tokenizer(said))
        clip = back
    clip.save(tmp_path / 'saved')
    assert torch.equal(load_clip(tmp_path / 'saved').tokenizer(said), clip.tokenizer(said))


@pytest.mark.parametrize('write', [Clip.save, save_open_clip])
@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(clean='whitespace'), "another cleaning, 'lower': put dict(clean='whitespace')"),
        (dict(reduction_mask='simple'), 'drops words of long texts'),
    ],
)
def test_open_clips_own_vocabulary_is_refused_where_it_would_not_come_back(
    write, options, sentence, tmp_path
):
    clip = with_own_words()
    clip.tokenizer = open_clip.SimpleTokenizer(context_length=12, **options)
    with says(ValueError, sentence):
        write(clip, tmp_path / 'm')
    assert not (tmp_path / 'm').exists()


def test_a_tokenizer_that_cannot_be_saved_is_refused(small, tmp_path):
    small.tokenizer = lambda texts: None
    with says(ValueError, 'A function cannot be saved with the model'):
        small.save(tmp_path / 'm')
    assert not (tmp_path / 'm').exists()


@pytest.fixture
def saved(small, tmp_path):
    named(small).save(tmp_path / 'm')
    return tmp_path / 'm'


def settings_of(folder):
    return json.loads((folder / 'config.json').read_text(encoding='utf-8'))


def write_settings(folder, settings):
    (folder / 'config.json').write_text(json.dumps(settings), encoding='utf-8')


FULL = asdict(full_spec(tiny_clip().spec.base))


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        (dict(library='other'), 'not a model of this library'),
        (dict(format=FORMAT + 1), f'this version reads {FORMAT}'),
        # would load, and embed otherwise
        (dict(preprocess_cfg=dict(mean=[0.0] * 3)), 'configuration or the tokenizer'),
        # a folder whose settings somebody vouched for
        (
            dict(settings=None, spec={**FULL, 'vision': {'0': dict(heads=[7], neurons=[])}}),
            'keeps heads outside 0 to 3',
        ),
        (dict(settings=None, spec=FULL), 'The weights are not those of'),
        (dict(settings=None, spec={**FULL, 'odd': 1}), 'is damaged or was edited'),
        (dict(model_cfg=None), "lacks ['model_cfg']"),
    ],
)
def test_an_edited_configuration_is_refused(saved, changes, sentence):
    settings = {**settings_of(saved), **changes}
    write_settings(saved, {name: x for name, x in settings.items() if x is not None})
    if not settings.get('settings', True):
        seal(saved)  # what is said behind the hash
    with says(ValueError, sentence):
        load_clip(saved)


def test_damaged_weights_are_refused(saved):
    file = saved / 'model.safetensors'
    whole = file.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    for content, sentence in (
        (whole[:-10], 'model.safetensors cannot be read'),
        (b'not a model', 'model.safetensors cannot be read'),
        (flipped, 'their hash differs'),
    ):
        file.write_bytes(content)
        with says(ValueError, sentence):
            load_clip(saved)
    file.unlink()
    with says(FileNotFoundError, 'no model.safetensors'):
        load_clip(saved)


def test_a_configuration_that_is_no_dictionary_of_json_is_refused(saved):
    file = saved / 'config.json'
    file.write_text(file.read_text(encoding='utf-8')[:-30], encoding='utf-8')
    with says(ValueError, 'is no JSON'):
        load_clip(saved)
    file.write_text('[1]', encoding='utf-8')
    with says(ValueError, 'holds no settings but a list'):
        load_clip(saved)


def test_a_damaged_tokenizer_is_refused(small, tmp_path):
    small.save(tmp_path / 'm')
    words = tmp_path / 'm' / 'tokenizer.json'
    words.write_text(words.read_text(encoding='utf-8')[:-9], encoding='utf-8')
    with says(ValueError, 'configuration or the tokenizer'):
        load_clip(tmp_path / 'm', device='cpu')
    with says(ValueError, 'its files are damaged or incomplete'):
        load_tokenizer(tmp_path / 'm', small.config)
    with says(FileNotFoundError, 'has no tokenizer_config.json and names none of open_clip'):
        load_tokenizer(tmp_path, small.config)


FOREIGN = """
import sys
from mope_clip.clip import load_clip, read_spec, save_open_clip, save_spec
from mope_clip.clip import tiny_clip, word_tokenizer
clip = tiny_clip()
clip.config['name'] = 'größer als 小さい'
clip.tokenizer = word_tokenizer(['ein grünes Gemälde', '赤い 猫'], context=12)
clip.save('model')
save_open_clip(clip, 'dense')
save_spec(clip.spec, 'spec.json')
assert read_spec('spec.json') == clip.spec
for folder in ('model', 'dense'):
    back = load_clip(folder, device='cpu')
    assert back.tokenizer(['赤い Gemälde']).equal(clip.tokenizer(['赤い Gemälde'])), folder
assert load_clip('model', device='cpu').config['name'] == clip.config['name']
"""


def test_folders_hold_utf8_whatever_the_locale(tmp_path):
    plain = dict(LC_ALL='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0', PYTHONPATH=str(ROOT))
    (tmp_path / 'foreign.py').write_text(FOREIGN, encoding='utf-8')
    done = run(sys.executable, '-W', 'ignore', 'foreign.py', cwd=tmp_path, **plain)
    assert done.returncode == 0, done.stderr[-2000:]
    card = (tmp_path / 'model' / 'README.md').read_text(encoding='utf-8')
    assert 'Clip(größer als 小さい;' in card


# ---- models of the version before this form

GOLDEN = ROOT / 'tests' / 'golden'
FEATURES = json.loads((GOLDEN / 'features.json').read_text(encoding='utf-8'))


# a processor sums in an order of its own: its features, of about 2, differ by a few roundings
@pytest.mark.parametrize(('dtype', 'by'), [('float32', 1e-5), ('bfloat16', 5e-2)])
def test_older_models_load_to_the_same_weights_and_features(dtype, by, pairs):
    known = FEATURES[dtype]
    clip = load_clip(GOLDEN / f'model-{dtype}', device='cpu')
    assert weights_hash(clip) == known['weights']
    ids = clip.tokenizer([captions[0] for captions in pairs['captions']])
    near(clip.encode_image(pixels_of(clip, pairs)).float(), torch.tensor(known['image']), by)
    near(clip.encode_text(ids).float(), torch.tensor(known['text']), by)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_older_models_are_saved_again_to_the_same_weights_and_ids(dtype, tmp_path):
    folder = GOLDEN / f'model-{dtype}'
    clip = load_clip(folder, device='cpu')
    clip.save(tmp_path / 'again')
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(file.name for file in (tmp_path / 'again').iterdir())
    weights = 'model.safetensors'
    assert (tmp_path / 'again' / weights).read_bytes() == (folder / weights).read_bytes()
    before, after = (
        json.loads((f / 'config.json').read_text()) for f in (folder, tmp_path / 'again')
    )
    # tokenizer.json pads by itself since then
    assert before.pop('settings') != after.pop('settings')
    assert {**before, **NOT_FOR_OTHERS} == after
    again = load_clip(tmp_path / 'again', device='cpu')
    said = ['a red square', 'a  green\ncircle ' * 9]
    assert torch.equal(again.tokenizer(said), clip.tokenizer(said))
    again.save(tmp_path / 'twice')
    for name in names:
        once, twice = ((tmp_path / place / name).read_bytes() for place in ('again', 'twice'))
        assert once == twice, name


# ---- folders of other libraries


def test_a_dense_folder_is_open_clips_own_to_the_bit(tiny, tmp_path):
    for dtype in (torch.float16, torch.float32):
        save_open_clip(tiny, tmp_path / 'dense', dtype)  # the second replaces the first
        theirs, _, _ = open_clip.create_model_and_transforms(
            f'local-dir:{tmp_path}/dense', device='cpu'
        )
        stored = {name: x.to(dtype).float() for name, x in tiny.model.state_dict().items()}
        assert equal(theirs.state_dict(), stored)
    assert [file.name for file in tmp_path.iterdir()] == ['dense']  # nothing temporary is left
    tokenizer = ['tokenizer.json', 'tokenizer_config.json']
    files = sorted(file.name for file in (tmp_path / 'dense').iterdir())
    weights = 'open_clip_model.safetensors'
    assert files == ['README.md', 'open_clip_config.json', weights, *tokenizer]


def test_open_clip_alone_loads_a_dense_folder_to_the_same_function(tiny, pairs, tmp_path):
    save_open_clip(tiny, tmp_path / 'teacher')
    place, caption = f'local-dir:{tmp_path}/teacher', 'a red square left of a blue square'
    model, _, preprocess = open_clip.create_model_and_transforms(place, device='cpu')
    assert torch.equal(open_clip.get_tokenizer(place)(caption), tiny.tokenizer(caption))
    assert torch.equal(preprocess(pairs['image'][0]), tiny.preprocess(pairs['image'][0]))
    pixels = pixels_of(tiny, pairs)
    theirs, exact = model.eval().encode_image(pixels, True), tiny.encode_image(pixels, True)
    near(theirs, exact, by=5e-3)  # weights in float16
    ours = load_clip(tmp_path / 'teacher', device='cpu')
    assert equal(ours.model.state_dict(), model.state_dict()) and ours.spec == tiny.spec
    near(ours.encode_image(pixels), model.encode_image(pixels), by=1e-6)
    (tmp_path / 'teacher' / 'open_clip_model.safetensors').unlink()
    with says(FileNotFoundError, 'open_clip_model.safetensors'):
        load_clip(tmp_path / 'teacher')


def test_a_pruned_model_has_no_place_in_open_clips_format(small, tmp_path):
    with says(ValueError, 'no room for a pruned model'):
        save_open_clip(small, tmp_path / 'dense')


@pytest.mark.parametrize('prepared', [None, dict(antialias=True, mean=None, std=[0.5] * 3)])
def test_a_preparation_that_open_clip_passes_over_is_saved_without(prepared, tiny, pairs, tmp_path):
    save_open_clip(tiny, tmp_path / 'm')
    file = tmp_path / 'm/open_clip_config.json'
    settings = json.loads(file.read_text(encoding='utf-8'))
    settings.pop('preprocess_cfg')
    if prepared:
        settings['preprocess_cfg'] = prepared
    file.write_text(json.dumps(settings), encoding='utf-8')
    clip = load_clip(tmp_path / 'm', device='cpu')
    picture = pairs['image'][0]
    for write in (save_open_clip, Clip.save):
        write(clip, tmp_path / write.__name__)
        back = load_clip(tmp_path / write.__name__, device='cpu')
        assert torch.equal(back.preprocess(picture), clip.preprocess(picture))


def test_weights_of_several_types_are_refused_by_name(tiny):
    half = tiny.copy().model
    open_clip.model.convert_weights_to_lp(half)
    with says(ValueError, 'weights of several types (float16, float32)'):
        Clip(half, tiny.preprocess, tiny.tokenizer, tiny.config)


def test_folders_that_hold_no_model_or_no_weights_are_refused(tiny, tmp_path):
    with says(FileNotFoundError, 'no open_clip_config.json'):
        load_clip(tmp_path)
    write_settings(tmp_path, dict(model_type='blip'))
    with says(ValueError, 'of a blip model'):
        load_clip(tmp_path)
    settings = {name: tiny.config[name] for name in ('model_cfg', 'preprocess_cfg')}
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(settings), encoding='utf-8')
    with says(FileNotFoundError, 'no weights (open_clip_model.safetensors)'):
        load_clip(tmp_path)
    with says(FileNotFoundError, 'no weights'):
        load_clip(f'local-dir:{tmp_path}')
    (tmp_path / 'open_clip_model.safetensors').write_bytes(b'half of a file')
    with says(ValueError, 'damaged or were cut off'):
        load_clip(tmp_path)


@pytest.fixture
def hf_folder(tmp_path):
    "A small `CLIPModel` saved without words, and the model"
    towers = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    text = dict(vocab_size=12, intermediate_size=48, max_position_embeddings=12, eos_token_id=2)
    vision = dict(intermediate_size=64, image_size=32, patch_size=8)
    config = CLIPConfig(
        projection_dim=16, text_config={**towers, **text}, vision_config={**towers, **vision}
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path / 'hf')
    return tmp_path / 'hf', model


def test_a_folder_of_hugging_face_needs_its_words(hf_folder):
    with says(FileNotFoundError, 'copy the tokenizer there'):
        load_clip(hf_folder[0])


def test_a_folder_of_hugging_face_is_the_same_function_from_disk_and_from_the_hub(hf_folder):
    folder, theirs = hf_folder
    word_tokenizer(['a b c'], context=12).tokenizer.save_pretrained(folder)
    ours = load_clip(folder, device='cpu')
    images = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[2, 3, 11] + [0] * 9, [2, 5, 6, 9, 11] + [0] * 7])
    out = theirs(pixel_values=images, input_ids=ids)
    near(ours.encode_image(images, normalize=True), out.image_embeds)
    near(ours.encode_text(ids, normalize=True), out.text_embeds)
    with patch('huggingface_hub.snapshot_download', lambda repo, **kw: str(folder)):
        again = load_clip('hf-hub:somebody/hf', device='cpu')
    assert weights_hash(again) == weights_hash(ours)


def test_older_models_of_the_hub_are_fetched_as_pickles(hf_folder, tmp_path):
    asked = []

    def download(repo, allow_patterns, **options):
        asked.append(allow_patterns)
        return str(tmp_path)

    with patch('huggingface_hub.snapshot_download', download), says(FileNotFoundError, 'no config'):
        load_clip('hf-hub:somebody/old', device='cpu')
    assert ['*.bin' in patterns for patterns in asked] == [False, True]


def test_a_hub_that_cannot_be_reached_is_said():
    with (
        patch('mope_clip.data.network.is_reached', return_value=True),
        patch('huggingface_hub.snapshot_download', side_effect=OSError('no network')),
        says(FileNotFoundError, 'not found on the hub (OSError: no network): check'),
    ):
        load_clip('hf-hub:somebody/model')


# ---- names and tags


def test_a_request_that_would_end_in_random_weights_is_refused():
    with says(ValueError, 'openai'):
        load_clip('ViT-B-32')  # its tags are listed
    with says(ValueError, "Unknown model 'ViT-B-33'"):
        load_clip('ViT-B-33', pretrained='openai')
    with says(FileNotFoundError, 'There is no folder'):
        load_clip('local-dir:no/such')
    with says(FileNotFoundError, 'hf-hub:owner/name'):
        load_clip('no/such')
    with says(FileNotFoundError, 'neither a file nor a tag of ViT-B-32; its tags are openai'):
        load_clip('ViT-B-32', 'epoch_3.pt')


def test_weights_that_would_not_be_read_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_open_clip(tiny, tmp_path / 'ViT-B-32')
    for name in (tmp_path / 'ViT-B-32', 'ViT-B-32', 'local-dir:ViT-B-32', 'hf-hub:some/body'):
        with says(ValueError, "pretrained='openai' would not be read: leave pretrained out"):
            load_clip(name, 'openai')
    assert load_clip('ViT-B-32', '', device='cpu').config['name'] == 'ViT-B-32'


def test_a_gpu_that_is_not_there_is_said_before_anything_is_read():
    with (
        patch('torch.cuda.is_available', return_value=False),
        says(ValueError, 'device is cuda:1, but PyTorch sees no GPU here'),
    ):
        load_clip('no/such', device='cuda:1')


def test_a_tag_knows_its_activation_and_pixels():
    openai = named_config('ViT-B-32', 'openai')
    assert openai['model_cfg']['quick_gelu'] is True
    laion = named_config('ViT-B-32', 'laion2b_s34b_b79k')
    assert not laion['model_cfg'].get('quick_gelu', False)
    mean = named_config('ViT-L-14', 'openai')['preprocess_cfg'].get('mean')
    assert mean in (None, open_clip.OPENAI_DATASET_MEAN)


def test_a_tag_without_a_network_says_what_to_do():
    with (
        patch('mope_clip.data.network.is_reached', return_value=True),
        patch('open_clip.create_model_and_transforms', side_effect=OSError('no network')),
        says(FileNotFoundError, 'The weights openai of ViT-B-32 could not be had (OSError: no net'),
    ):
        load_clip('ViT-B-32', 'openai', device='cpu')


def test_a_training_checkpoint_is_loaded_by_the_name_of_its_architecture(tiny, tmp_path):
    cfg = deepcopy(tiny.config['model_cfg'])
    for name in ('hf_tokenizer_name', 'tokenizer_kwargs'):
        cfg['text_cfg'].pop(name)
    (tmp_path / 'test-tiny.json').write_text(json.dumps(cfg), encoding='utf-8')
    open_clip.add_model_config(tmp_path / 'test-tiny.json')
    state = {f'module.{name}': x for name, x in tiny.model.state_dict().items()}
    checkpoint = dict(epoch=3, name='run', state_dict=state, optimizer=dict(state={}))
    torch.save(checkpoint, tmp_path / 'epoch_3.pt')
    trained = load_clip('test-tiny', tmp_path / 'epoch_3.pt', device='cpu')
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(trained.encode_image(images), tiny.encode_image(images))
    assert trained.config['name'] == 'test-tiny'
    with says(ValueError, 'ViT-B-32'):
        load_clip('ViT-B-32', tmp_path / 'epoch_3.pt')


def test_a_file_of_tinyclip_needs_no_name(tmp_path):
    cfg = dict(
        embed_dim=64,
        vision_cfg=dict(image_size=32, layers=2, width=64, patch_size=8),
        text_cfg=dict(context_length=12, vocab_size=12, width=64, heads=1, layers=1),
    )
    wide = random_model(cfg)
    torch.save(dict(state_dict=tinyclip_names(wide.state_dict())), tmp_path / 'tinyclip.pt')
    ours = load_clip(tmp_path / 'tinyclip.pt', device='cpu')
    images = torch.randn(2, 3, 32, 32)
    assert equal(ours.model.state_dict(), wide.state_dict())
    near(ours.encode_image(images), wide.encode_image(images))
    torch.save(wide.state_dict(), tmp_path / 'bare.pt')
    with says(ValueError, 'pass the open_clip name'):
        load_clip(tmp_path / 'bare.pt')
