"Other layouts of the same function: zeros in the place of what went, towers that become graphs."

import pytest
import torch
import torch.nn as nn
from conftest import GRID, custom_tiny, model_of, uneven_tiny

from mope_clip.clip import TOWERS, prune, shape_of, tiny_clip, whole_spec
from mope_clip.clip.blocks import Slices
from mope_clip.clip.layouts import even, masked, traceable


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


class OneParameter:
    "As much of a block as filling it needs: one parameter of heads"

    def __init__(self, values, units, **layout):
        self.parameter = nn.Parameter(values, requires_grad=False)
        self.slices = [Slices(self.parameter, 'in', units, **layout)]

    def head_weights(self):
        return self.slices

    def neuron_weights(self):
        return []


def filled(values, units, wide, wide_units, **layout):
    "What stands in the wide parameter after it took over the narrow one"
    from mope_clip.clip.blocks import Block

    target = OneParameter(torch.full(wide, 9.0), wide_units, **layout)
    Block.fill_from(target, OneParameter(values, units, **layout))
    return target.parameter


def test_zeros_stand_behind_what_is_there_in_each_band():
    found = filled(torch.tensor([1.0, 2, 3]), 1, (6,), 2, bands=3)
    assert found.tolist() == [1, 0, 2, 0, 3, 0]


def test_columns_are_filled_as_rows_are():
    assert filled(torch.ones(2, 1), 1, (2, 3), 3, axis=1).tolist() == [[1, 0, 0], [1, 0, 0]]


def test_nothing_leaves_only_zeros():
    assert torch.equal(filled(torch.ones(0, 2), 0, (3, 2), 1, bands=3), torch.zeros(3, 2))


@pytest.mark.parametrize('name', GRID)
def test_an_even_model_is_the_same_function(name):
    clip = model_of(name)
    spec = whole_spec(clip)
    for layer, kept in spec.vision.items():
        kept.update(heads=kept['heads'][: 3 - layer], neurons=kept['neurons'][: 10 + layer])
    spec.text[0].update(heads=[], neurons=[])
    small = prune(clip, spec)
    dense = even(small)
    for tower in TOWERS:
        x = clip.tower(tower).noise(3, torch.Generator().manual_seed(0))
        x = x.double() if tower == 'vision' else x
        whole = small.tower(tower)(x)
        x = x.float() if tower == 'vision' else x
        assert (dense.tower(tower)(x) - whole).abs().max() < 1e-4 * whole.abs().max(), tower
    assert len({tuple(layer) for layer in shape_of(dense)['vision']}) == 1


def test_a_masked_model_is_as_large_as_before():
    tiny, small = tiny_clip(), uneven_tiny()
    zeroed = masked(tiny, small.spec)
    x = tiny.vision.noise(2)
    torch.testing.assert_close(zeroed.vision(x), small.vision(x), atol=1e-5, rtol=0)
    assert shape_of(zeroed) == shape_of(tiny)


@pytest.mark.parametrize('make', [uneven_tiny, custom_tiny])
def test_a_traceable_tower_is_a_copy(make):
    clip = make()
    before = clip.text.net.attn_mask.shape
    tower = traceable(clip, 'text', operators=True)
    x = clip.text.noise(3)
    torch.testing.assert_close(tower(x), clip.text(x), atol=1e-5, rtol=0)
    assert clip.text.net.attn_mask.shape == before and tower.net.attn_mask.shape != before
    assert hasattr(clip.model, 'visual') and not hasattr(tower.net, 'visual')
    assert not any(p.requires_grad for p in traceable(clip, 'text').parameters())


def test_a_tower_whose_captions_are_never_cut_keeps_its_mask():
    clip = custom_tiny(no_causal_mask=True)
    assert not clip.text.trims and traceable(clip, 'text').net.attn_mask is None


@pytest.mark.parametrize(
    'name, trims',
    [
        ('plain', True),
        ('first_pool', True),
        ('eos_pool', True),
        ('last_pool', False),
        ('not_causal_argmax', False),
    ],
)
def test_captions_are_cut_under_a_causal_mask_up_to_the_pooled_token(name, trims):
    assert model_of(name).text.trims is trims


def test_blocks_with_scales_or_norms_of_their_heads_keep_their_attention():
    clip = model_of('custom_norms')
    tower = traceable(clip, 'vision', operators=True)
    kinds = {type(block.attn).__name__ for block in tower.blocks}
    assert kinds == {'SlimAttention'}
