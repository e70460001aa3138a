"A CLIP, its blocks and towers, and the specification of what is left: edge cases and refusals."

import re
from copy import deepcopy
from dataclasses import asdict

import numpy as np
import open_clip
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

from mope_clip.clip import (
    TOWERS,
    Clip,
    PruneSpec,
    both,
    build_clip,
    compare,
    compose,
    draw_spec,
    keep_count,
    prune,
    read_spec,
    relative,
    save_spec,
    shape_of,
    spec_hash,
    weights_hash,
    whole_spec,
)
from mope_clip.clip.attention import SlimAttention
from mope_clip.clip.blocks import empty_linear, take
from mope_clip.clip.families import NativeBlock, towers_of
from mope_clip.clip.model import base_of
from mope_clip.clip.spec import full_spec

BASE = {t: dict(layers=n, heads=4, neurons=128) for t, n in (('vision', 3), ('text', 2))}
KEPT = dict(heads=[0], neurons=[0])
MODEL_CFG = dict(
    embed_dim=32,
    vision_cfg=dict(image_size=32, layers=3, width=32, head_width=8, patch_size=8),
    text_cfg=dict(context_length=12, vocab_size=12, width=32, heads=4, layers=2),
)
CONFIG = dict(
    name='test',
    model_cfg=MODEL_CFG,
    tokenizer='ViT-B-32',
    preprocess_cfg=dict(
        mean=[0.5] * 3, std=[0.3] * 3, interpolation='bicubic', resize_mode='shortest'
    ),
)
IDS = torch.tensor([[2, 3, 11] + [0] * 9, [2, 5, 6, 9, 11] + [0] * 7])
CAUSAL = torch.full((5, 5), -torch.inf).triu(1)


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


def shuffled(module):
    "The module with random numbers everywhere: biases of zero would hide a mistake"
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    return module.eval()


# ---- specifications


def a_spec(**changes):
    "A specification that keeps little of each tower"
    parts = dict(vision={0: KEPT}, text={0: KEPT}, base=BASE)
    return PruneSpec(**{**parts, **changes})


def test_layers_and_indices_come_into_one_order_whatever_they_were_written_as():
    vision = {'2': dict(heads=[3, 0], neurons=[5]), '0': dict(heads=[], neurons=[])}
    spec = a_spec(vision=vision)
    assert list(spec.vision) == [0, 2]
    assert spec.vision[2]['heads'] == [0, 3]


@pytest.mark.parametrize(
    ('vision', 'sentence'),
    [
        ({0: dict(heads=[1, 1], neurons=[0])}, 'layer 0 keeps heads twice: 1'),
        ({0: dict(heads=[0], neurons=[128])}, 'outside 0 to 127: 128'),
        ({0: dict(heads=[-1, 2], neurons=[])}, 'keeps heads outside 0 to 3: -1'),
        ({0: dict(heads=[0])}, "exactly 'heads' and 'neurons', not ['heads']"),
        ({0: [0, 1]}, "exactly 'heads' and 'neurons', not [0, 1]"),
        ({3: KEPT}, 'keeps vision layer 3, but the base has layers 0 to 2'),
        ({0: dict(heads=[0.5], neurons=[])}, '0.5 is no index'),
        ({0: dict(heads=[True], neurons=[])}, 'True is no index'),
        ({'first': KEPT}, "'first' is no index"),
        ({0: dict(heads='01', neurons=[])}, "heads must be a list of indices, not '01'"),
        ({0: dict(heads=None, neurons=[])}, 'must be a list'),
        ({0: dict(heads=[float('inf')], neurons=[])}, 'inf is no index'),
        ({1: KEPT, '1': KEPT}, 'vision layer twice'),
        ({}, 'no layer in the vision tower'),
        ([0], 'no layer in the vision tower'),
    ],
)
def test_a_specification_that_cannot_be_is_refused(vision, sentence):
    with says(ValueError, sentence):
        a_spec(vision=vision)


def test_a_base_must_say_the_size_of_both_towers():
    with says(ValueError, 'base of both towers'):
        a_spec(base=dict(vision=BASE['vision']))
    with says(ValueError, "numbers 'layers', 'heads' and 'neurons'"):
        a_spec(base=dict(BASE, text=dict(layers=2)))
    with says(ValueError, "numbers 'layers', 'heads' and 'neurons'"):
        a_spec(base=dict(BASE, text=dict(layers=2.0, heads=4, neurons=128)))


def test_provenance_is_a_dict_that_json_can_hold():
    with says(ValueError, 'provenance of a specification is a dict'):
        a_spec(provenance=None)
    assert a_spec(provenance=dict(keep=np.float32(0.5))).provenance == dict(keep=0.5)
    assert a_spec(provenance=dict(at=ROOT)).provenance == dict(at=str(ROOT))
    given = dict(metric='mope')
    assert a_spec(provenance=given).provenance is given


def test_keep_count_rounds_half_up_and_keeps_one():
    asked = ((5, 0.5), (6, 0.25), (25, 0.58), (8, 0.01), (8, 1))
    assert [keep_count(n, keep) for n, keep in asked] == [3, 2, 15, 1, 8]
    for keep in (1.5, 0, True):
        with says(ValueError, f'at most 1, not {keep}'):
            keep_count(4, keep)


LITTLE = {tower: dict(layers=2, heads=4, neurons=8) for tower in TOWERS}


def in_both(layers, base=LITTLE):
    "A specification with the same layers in both towers"
    return PruneSpec(**{tower: layers for tower in TOWERS}, base=base)


HALF = {1: dict(heads=[1, 3], neurons=[0, 2, 4])}


def steps():
    "A specification without a text layer, and one of the model that it leaves"
    first = full_spec(LITTLE)
    first.text.pop(0)
    second = PruneSpec(
        vision={0: dict(heads=[3], neurons=[1, 2])},
        text={0: dict(heads=[0, 2], neurons=[7])},
        base={**LITTLE, 'text': {**LITTLE['text'], 'layers': 1}},
    )
    return first, second


def test_compose_looks_positions_up_in_the_first_specification():
    first, second = steps()
    assert compose(first, second).text == {1: dict(heads=[0, 2], neurons=[7])}
    half = in_both(HALF)
    assert compose(full_spec(LITTLE), half) == half
    left = {tower: dict(layers=1, heads=2, neurons=3) for tower in TOWERS}
    last = in_both({0: dict(heads=[1], neurons=[2])}, left)
    assert compose(half, last).vision == {1: dict(heads=[3], neurons=[4])}


def test_compose_refuses_a_second_specification_of_the_base():
    half = in_both(HALF)
    with says(ValueError, "the first leaves {'layers': 1, 'heads': 2, 'neurons': 3}"):
        compose(half, half)


def test_compose_refuses_what_an_uneven_layer_has_lost():
    uneven = {0: dict(heads=[0], neurons=[0, 1]), 1: dict(heads=[0, 1, 2], neurons=[0])}
    first = in_both(uneven)
    shape = {tower: dict(layers=2, heads=3, neurons=2) for tower in TOWERS}
    with says(ValueError, 'something of the vision tower that the first has removed'):
        compose(first, in_both({0: dict(heads=[2], neurons=[0])}, shape))


def test_relative_undoes_compose_and_says_the_shape_in_between():
    first, second = steps()
    whole = compose(first, second)
    step = relative(first, whole)
    assert compose(first, step) == whole
    assert step.text == second.text
    assert step.base['text'] == dict(layers=1, heads=4, neurons=8)
    with says(ValueError, 'has lost already'):
        relative(whole, first)


def test_both_keeps_what_both_keep_in_either_order():
    narrow = in_both({layer: dict(heads=[0, 3], neurons=[1]) for layer in range(2)})
    shallow = full_spec(LITTLE)
    del shallow.vision[0], shallow.text[1]
    assert both(narrow, shallow).vision == {1: narrow.vision[1]}
    assert both(narrow, shallow) == both(shallow, narrow)


def test_both_refuses_a_tower_without_layers_and_other_bases():
    one, other = in_both({0: KEPT}), in_both({1: KEPT})
    with says(ValueError, 'no layer in the vision tower'):
        both(one, other)
    with says(ValueError, 'different bases'):
        both(one, a_spec())


def test_a_saved_specification_comes_back_equal(tmp_path):
    first, second = steps()
    for spec in (a_spec(), compose(first, second), full_spec(BASE)):
        save_spec(spec, tmp_path / 'spec.json')
        assert read_spec(tmp_path / 'spec.json') == spec


def test_a_changed_specification_is_checked_when_it_is_saved(tmp_path):
    spec = full_spec(BASE)
    spec.vision[0]['heads'] = [4]
    with says(ValueError, 'keeps heads outside 0 to 3: 4'):
        save_spec(spec, tmp_path / 'spec.json')


@pytest.mark.parametrize(
    ('old', 'new', 'sentence'),
    [
        ('"format": 1', '"format": 2', 'has format 2'),
        ('PruneSpec', 'Scores', 'not a specification'),
        ('"format"', '"alpha": 1, "format"', "'alpha'"),
        ('"heads": [0]', '"heads": [9]', 'spec.json: vision layer 0 keeps heads outside 0 to 3: 9'),
        ('"format"', '"format": 1, "format"', "'format' stands in it twice"),
        ('"provenance": {}', '"provenance": {', 'damaged'),
        ('"provenance": {}', '"provenance": 1', 'spec.json: The provenance'),
    ],
)
def test_files_that_are_no_specification_are_told_apart(old, new, sentence, tmp_path):
    save_spec(a_spec(), tmp_path / 'spec.json')
    text = (tmp_path / 'spec.json').read_text(encoding='utf-8')
    assert old in text
    (tmp_path / 'spec.json').write_text(text.replace(old, new), encoding='utf-8')
    with says(ValueError, sentence):
        read_spec(tmp_path / 'spec.json')


def test_a_file_that_is_not_there_and_one_that_is_no_text_are_said(tmp_path):
    with says(FileNotFoundError, 'There is no file'):
        read_spec(tmp_path / 'other.json')
    (tmp_path / 'noise.json').write_bytes(b'\xff\xfe\x00noise')
    with says(ValueError, 'damaged or of another kind'):
        read_spec(tmp_path / 'noise.json')
    (tmp_path / 'list.json').write_text('[]', encoding='utf-8')
    with says(ValueError, 'not a specification of this library'):
        read_spec(tmp_path / 'list.json')


def test_the_hash_of_a_specification_leaves_provenance_out():
    assert spec_hash(a_spec()) == spec_hash(a_spec(provenance=dict(metric='another')))
    assert spec_hash(a_spec()) != spec_hash(full_spec(BASE))


def test_a_specification_of_the_version_before_this_form_reads_to_the_same_hash(tmp_path):
    file = ROOT / 'tests' / 'golden' / 'spec.json'
    spec = read_spec(file)
    assert spec_hash(spec) == '2743095e0968a275'
    save_spec(spec, tmp_path / 'spec.json')
    assert (tmp_path / 'spec.json').read_bytes() == file.read_bytes()


def test_compare_counts_what_both_keep():
    narrow = in_both({layer: dict(heads=[0, 3], neurons=[1]) for layer in range(2)})
    table = compare(in_both(HALF), narrow).set_index(['tower', 'module'])
    assert table.loc[('vision', 'head'), ['first', 'second', 'both']].tolist() == [2, 4, 1]
    assert table.jaccard['vision', 'head'] == 1 / 5
    assert compare(narrow, narrow).jaccard.tolist() == [1] * 6
    with says(ValueError, 'different bases'):
        compare(narrow, a_spec())


def test_a_picture_shows_the_heads_and_the_number_of_neurons_that_stay():
    spec = PruneSpec(
        vision={0: dict(heads=[3], neurons=[1, 2])},
        text={1: dict(heads=[0, 2], neurons=[7])},
        base=LITTLE,
    )
    vision, _, text, bars = draw_spec(spec).axes
    assert [len(ax.collections[-1].get_offsets()) for ax in (vision, text)] == [1, 2]
    assert [bar.get_width() for bar in bars.patches] == [1]
    headless = in_both(
        {0: dict(heads=[], neurons=[0])}, {t: {**LITTLE[t], 'heads': 0} for t in TOWERS}
    )
    assert not draw_spec(headless).axes[0].collections


# ---- blocks


def test_take_picks_one_token_of_each_row():
    rows = torch.arange(12).view(2, 3, 2)
    assert take(rows, torch.tensor([2, 0])).tolist() == [[[4, 5]], [[6, 7]]]


def test_a_linear_layer_without_inputs_is_made_without_a_warning(recwarn):
    layer = empty_linear(0, 5)
    assert layer.weight.shape == (5, 0) and layer.bias.shape == (5,)
    assert not recwarn.list


def test_a_mask_of_each_row_is_the_mask_of_that_row():
    attention = SlimAttention.around(shuffled(nn.MultiheadAttention(32, 4, batch_first=True)))
    x = torch.randn(2, 5, 32)
    per_row = torch.stack([CAUSAL, torch.zeros(5, 5)]).repeat_interleave(4, 0)
    near(attention(x, per_row), torch.cat([attention(x[:1], CAUSAL), attention(x[1:])]))


def test_attention_without_heads_is_its_bias():
    attention = SlimAttention(32, heads=0, head_dim=8)
    nn.init.ones_(attention.out_proj.bias)
    x = torch.randn(2, 5, 32)
    assert torch.equal(attention(x), torch.ones(2, 5, 32))
    assert torch.equal(attention(x, pick=torch.tensor([4, 1])), torch.ones(2, 1, 32))


def old_block(**options):
    "A block of open_clip with random numbers everywhere"
    kind = open_clip.transformer.ResidualAttentionBlock
    if options:
        kind = open_clip.transformer.CustomResidualAttentionBlock
    return shuffled(kind(32, 4, **options))


def test_a_block_takes_its_mask_where_open_clip_passes_it():
    old, x = old_block(), torch.randn(2, 5, 32)
    expected, names = old(x, attn_mask=CAUSAL), set(old.state_dict())
    block = NativeBlock(old)
    near(block(x, None, None, CAUSAL), expected)
    assert set(block.state_dict()) == names


def test_a_block_is_its_two_halves():
    block, x = NativeBlock(old_block()), torch.randn(2, 5, 32)
    half = block.after_attention(x, CAUSAL)
    assert torch.equal(block(x, attn_mask=CAUSAL), block.after_ffn(half))


def test_a_slim_block_has_smaller_tensors_on_storage_of_its_own():
    block = NativeBlock(old_block())
    small = block.slim([0, 3], range(0, 128, 2))
    assert small.attn.in_proj_weight.shape == (3 * 2 * 8, 32)
    assert small.attn.out_proj.weight.shape == (32, 2 * 8)
    assert small.mlp.c_fc.weight.shape == (64, 32)
    assert all(p.untyped_storage().nbytes() == 4 * p.numel() for p in small.parameters())
    ours = {p.data_ptr() for p in small.parameters()}
    assert not ours & {p.data_ptr() for p in block.parameters()}


def test_a_block_that_lost_all_has_two_norms_and_two_biases():
    bare = NativeBlock(old_block()).slim([], [])
    assert sum(p.numel() for p in bare.parameters()) == 4 * 32 + 2 * 32


def test_a_block_without_heads_keeps_its_ffn():
    block, x = NativeBlock(old_block()), torch.randn(2, 5, 32)
    y = x + block.attn.out_proj.bias
    near(block.slim([], range(128))(x), y + block.mlp(block.ln_2(y)))


def test_norms_of_queries_and_scales_of_heads_survive_a_cut():
    options = dict(qk_norm=True, scale_heads=True, scale_attn=True)
    old, x = old_block(**options), torch.randn(2, 5, 32)
    expected, block = old(x, attn_mask=CAUSAL), NativeBlock(old)
    near(block.slim(range(4), range(128))(x, attn_mask=CAUSAL), expected)
    two_heads = block.slim([1, 3], range(128))
    block.attn.head_scale[[0, 2]] = 0
    near(two_heads(x, attn_mask=CAUSAL), block(x, attn_mask=CAUSAL))


def test_a_block_cut_twice_is_the_block_cut_at_once():
    block = NativeBlock(old_block())
    again = block.slim([0, 3], range(0, 128, 2)).slim([1], [3]).state_dict()
    at_once = block.slim([3], [6]).state_dict()
    assert all(torch.equal(again[name], x) for name, x in at_once.items())


def test_a_norm_across_what_would_go_is_refused_and_across_the_rest_is_not():
    inner, ffn = (
        NativeBlock(old_block(**{name: True})) for name in ('scale_attn_inner', 'scale_fc')
    )
    inner.check_width(heads=4, neurons=7)
    with says(ValueError, 'scale_attn_inner'):
        inner.check_width(heads=3, neurons=128)
    ffn.check_width(heads=0, neurons=128)
    with says(ValueError, 'scale_fc'):
        ffn.check_width(heads=4, neurons=127)


# ---- towers


def variant(tower, **options):
    "An open_clip model whose one tower has other options"
    changed = {**deepcopy(MODEL_CFG), f'{tower}_cfg': {**MODEL_CFG[f'{tower}_cfg'], **options}}
    return open_clip.CustomTextCLIP(**changed).eval()


@pytest.mark.parametrize(
    ('tower', 'options', 'sentence'),
    [
        ('vision', dict(attentional_pool='parallel'), 'vision tower pools by two poolers'),
        ('vision', dict(scaled_cosine_attn=True), 'scaled_cosine_attn is not supported'),
    ],
)
def test_a_tower_of_another_kind_is_refused_by_name(tower, options, sentence):
    with says(ValueError, sentence):
        towers_of(variant(tower, **options))


def unit(x):
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize('kind', [open_clip.CustomTextCLIP, open_clip.CLIP])
def test_towers_are_the_functions_of_open_clip_for_either_class(kind):
    model, images = kind(**deepcopy(MODEL_CFG)).eval(), torch.randn(2, 3, 32, 32)
    inputs = dict(vision=images, text=IDS)
    expected = dict(
        vision=model.encode_image(images, normalize=True),
        text=model.encode_text(IDS, normalize=True),
    )
    for name, tower in towers_of(model).items():
        for seen in (inputs[name], tower.trim(inputs[name])):
            near(unit(tower(seen)), expected[name], by=1e-6)


@pytest.fixture
def towers():
    return towers_of(open_clip.CLIP(**deepcopy(MODEL_CFG)).eval())


def test_a_tower_says_its_size_and_gives_its_hidden_states(towers):
    vision = towers['vision']
    assert (vision.width, vision.tokens, len(vision.blocks)) == (32, (32 // 8) ** 2 + 1, 3)
    embedding, outputs = vision(torch.randn(2, 3, 32, 32), hidden=True)
    assert [tuple(x.shape) for x in outputs] == [(2, 17, 32)] * 3
    assert torch.equal(vision.pool(outputs[-1]), embedding)


def test_the_last_block_computes_the_pooled_token_alone(towers):
    vision, images = towers['vision'], torch.randn(2, 3, 32, 32)
    vision.blocks[-1] = vision.blocks[-1].slim([0, 2, 3], range(0, 128, 2))
    near(vision(images), vision(images, hidden=True)[0], by=1e-6)
    seen = []
    layer = vision.blocks[-1].mlp.c_fc
    layer.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    vision(images)
    vision(images, hidden=True)
    assert seen == [1, 17]


def test_captions_are_cut_behind_their_end_which_changes_nothing(towers):
    text = towers['text']
    assert text.lengths(IDS).tolist() == [3, 5]
    assert torch.equal(text.trim(IDS), IDS[:, :5])
    near(unit(text(text.trim(IDS))), unit(text(IDS)), by=1e-6)
    noisy = IDS.clone()
    noisy[0, 3:] = 7  # other padding behind the end token
    near(text(noisy)[0], text(IDS)[0], by=1e-6)


def test_images_are_never_trimmed(towers):
    images = torch.randn(2, 3, 32, 32)
    assert towers['vision'].trim(images) is images


def test_the_pooled_token_is_all_that_pooling_reads(towers):
    for name, inputs in dict(vision=torch.randn(2, 3, 32, 32), text=IDS).items():
        tower = towers[name]
        embedding, outputs = tower(inputs, hidden=True)
        last = outputs[-1]
        near(tower.pool(take(last, tower.picked(last, inputs)), inputs), embedding, by=1e-6)


def test_nothing_is_trimmed_where_every_token_sees_the_padding():
    text = towers_of(variant('text', no_causal_mask=True))['text']
    noisy = IDS.clone()
    noisy[0, 3:] = 7
    assert text.trim(IDS).shape == IDS.shape
    assert (text(noisy)[0] - text(IDS)[0]).abs().max() > 1e-3


# ---- models


@pytest.fixture
def clip():
    return build_clip(CONFIG, None)


def cut(clip):
    "Two heads of a layer and half of its neurons, no heads of another, a layer less"
    return PruneSpec(
        vision={0: dict(heads=[1, 3], neurons=range(64)), 2: dict(heads=[], neurons=range(128))},
        text=full_spec(clip.spec.base).text,
        base=clip.spec.base,
    )


def count(clip):
    return sum(p.numel() for p in clip.model.parameters())


def test_a_clip_computes_what_its_model_computes(clip):
    images = torch.randn(2, 3, 32, 32)
    near(clip.encode_image(images), clip.model.encode_image(images), by=1e-6)
    theirs = clip.model.encode_text(IDS, normalize=True)
    near(clip.encode_text(IDS, normalize=True), theirs, by=1e-6)


def test_a_clip_made_of_a_model_of_open_clip_knows_all_of_it():
    model = open_clip.CLIP(**deepcopy(MODEL_CFG)).eval()
    clip = Clip(model, None, None, CONFIG)
    assert clip.spec == full_spec(BASE)
    assert base_of(shape_of(clip)['text']) == dict(layers=2, heads=4, neurons=128)


def test_a_copy_shares_nothing(clip):
    twin = clip.copy()
    twin.vision.blocks[0].mlp.c_fc.weight.zero_()
    assert clip.vision.blocks[0].mlp.c_fc.weight.any()
    assert not twin.model.visual.transformer.resblocks[0].mlp.c_fc.weight.any()


def test_pruning_makes_every_tensor_smaller_and_leaves_the_original(clip):
    small = prune(clip, cut(clip))
    width, head_dim = 32, 8
    head, neuron = 4 * head_dim * width + 3 * head_dim, 2 * width + 1
    layer = 4 * head + 128 * neuron + 6 * width
    assert count(clip) - count(small) == layer + (2 * head + 64 * neuron) + 4 * head
    stored = sum(p.untyped_storage().nbytes() for p in small.model.parameters())
    assert stored == 4 * count(small)
    assert clip.spec == full_spec(BASE) and small.spec == cut(clip)
    assert small.encode_image(torch.randn(2, 3, 32, 32)).shape == (2, 32)


def test_keeping_everything_keeps_the_function(clip):
    images, same = torch.randn(2, 3, 32, 32), prune(clip, full_spec(BASE))
    near(same.encode_image(images, normalize=True), clip.encode_image(images, normalize=True))


def test_the_shape_of_an_uneven_model_is_a_pair_a_layer(clip):
    small = prune(clip, cut(clip))
    assert shape_of(small)['vision'] == [[2, 64], [0, 128]]
    assert whole_spec(small).vision[1] == dict(heads=[], neurons=list(range(128)))
    assert compose(small.spec, whole_spec(small)).vision == small.spec.vision


def test_width_then_depth_is_one_pruning_to_the_bit(clip):
    small = prune(clip, cut(clip))
    depth = whole_spec(small)
    del depth.vision[0], depth.text[1]
    two_steps, one_step = prune(small, depth), prune(clip, compose(small.spec, depth))
    assert two_steps.spec == one_step.spec and list(two_steps.spec.vision) == [2]
    ours, theirs = two_steps.model.state_dict(), one_step.model.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], x) for name, x in theirs.items())
    assert torch.equal(two_steps.encode_text(IDS), one_step.encode_text(IDS))
    assert weights_hash(two_steps) == weights_hash(one_step)


def test_a_specification_of_another_model_is_refused(clip):
    small = prune(clip, cut(clip))
    with says(ValueError, 'of a model with 3 vision layers of 4 heads and 128 neurons'):
        prune(small, cut(clip))
    asked = whole_spec(small)
    asked.vision[1]['heads'] = [0]
    with says(ValueError, 'of vision layer 1 that this model does not have'):
        prune(small, asked)


def test_a_specification_changed_after_it_was_made_is_checked_again(clip):
    spec = whole_spec(clip)
    spec.vision[0]['heads'] = [-1]
    with says(ValueError, 'keeps heads outside 0 to 3'):
        prune(clip, spec)


def test_the_hash_of_weights_sees_the_smallest_change(clip):
    nudged = clip.copy()
    nudged.logit_scale.copy_(torch.nextafter(nudged.logit_scale, torch.tensor(9.0)))
    assert len(weights_hash(clip)) == 16
    assert weights_hash(nudged) != weights_hash(clip) == weights_hash(clip.copy())


def test_building_a_model_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, second = build_clip(CONFIG, None), build_clip(CONFIG, None, seed=0)
    other = build_clip(CONFIG, None, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights_hash(first) == weights_hash(second) != weights_hash(other)
    assert first.spec == full_spec(BASE) and not first.model.training


def test_custom_text_chooses_open_clips_other_class():
    clip = build_clip(dict(CONFIG, model_cfg=dict(MODEL_CFG, custom_text=True)), None)
    assert type(clip.model) is open_clip.CustomTextCLIP
    images = torch.randn(2, 3, 32, 32)
    near(unit(clip.vision(images)), clip.model.encode_image(images, normalize=True), by=1e-6)
    near(unit(clip.text(IDS)), clip.model.encode_text(IDS, normalize=True), by=1e-6)


def test_preprocessing_follows_the_configuration(clip):
    grey = clip.preprocess(Image.new('RGB', (80, 60), (128, 128, 128)))
    assert grey.shape == (3, 32, 32)
    near(grey, torch.full((3, 32, 32), (128 / 255 - 0.5) / 0.3), by=1e-3)


def test_a_specification_is_data(clip):
    assert PruneSpec(**asdict(cut(clip))) == cut(clip)
