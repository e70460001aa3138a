"The next open_clip, whose blocks have an attention of their own: a stand-in passes what models do."

import pytest
import torch
from families_table import repaired
from next_open_clip import RELEASED, NextAttention, NextBlock, next_open_clip
from zoo import in_small, small_clip

from mope_clip.clip import load_clip, prune, whole_spec
from mope_clip.data import synth_pairs
from mope_clip.metrics import mope, mope_plain
from mope_clip.pruners import masked


@pytest.fixture(scope='module', params=['ViT-B-32', 'coca_ViT-B-32'])
def clip(request):
    "A small model that was made of the next blocks, float64"
    with next_open_clip(), in_small():
        return small_clip(request.param)


@pytest.fixture(scope='module')
def spec(clip):
    "A layer without heads, a layer less, every third neuron"
    spec = whole_spec(clip)
    spec.vision[0]['heads'], spec.text[1]['heads'] = [], [0, 3]
    for kept in (*spec.vision.values(), *spec.text.values()):
        kept['neurons'] = kept['neurons'][::3]
    del spec.vision[1]
    return spec


@torch.no_grad()
def features(clip, dtype=torch.float64):
    "Of two random images and captions"
    made = torch.Generator().manual_seed(0)
    images, ids = clip.vision.noise(2, made).to(dtype), clip.text.noise(2, made)
    return torch.cat([clip.encode_image(images, True), clip.encode_text(ids, True)])


@torch.no_grad()
def by_open_clip(clip):
    "The same by open_clip's own forward"
    made = torch.Generator().manual_seed(0)
    images, ids = clip.vision.noise(2, made).double(), clip.text.noise(2, made)
    return torch.cat([clip.model.encode_image(images, True), clip.model.encode_text(ids, True)])


def test_the_stand_in_has_the_released_blocks_names_and_function():
    new, old = NextBlock(32, 4).double().eval(), RELEASED(32, 4).double().eval()
    old.load_state_dict(new.state_dict(), strict=True)
    x, causal = torch.randn(2, 5, 32).double(), torch.full((5, 5), -torch.inf).triu(1)
    assert isinstance(new.attn, NextAttention) and not hasattr(new.attn, 'batch_first')
    for mask in (None, causal, causal.repeat(8, 1, 1)):
        torch.testing.assert_close(new(x, attn_mask=mask), old(x, attn_mask=mask))


def test_its_own_attention_breaks_where_heads_went():
    "So the attention has to be another, as it is in a model of ours"
    attention = NextAttention(32, 4)
    attention.num_heads = 2
    attention.out_proj = torch.nn.Linear(16, 32)
    with pytest.raises(RuntimeError):
        attention(torch.randn(2, 5, 32))


def test_towers_before_and_after_pruning_are_open_clips_own_functions(clip, spec):
    torch.testing.assert_close(features(clip), by_open_clip(clip))
    small = prune(clip, spec)
    torch.testing.assert_close(features(small), by_open_clip(small))
    torch.testing.assert_close(features(small), features(masked(clip, spec)))


def test_scores_are_what_their_definition_says(clip):
    pairs = synth_pairs(6)
    for row in mope(clip, pairs, groups=2).sample(4, random_state=0).itertuples():
        plain = mope_plain(clip, pairs, row.tower, row.layer, row.module, row.index, row.neurons)
        assert row.score == pytest.approx(plain, abs=1e-8)


def test_it_is_repaired(clip, spec):
    assert repaired(prune(clip, spec), clip) == 'yes'


def test_it_is_saved_and_read_by_the_next_and_by_the_released_open_clip(clip, spec, tmp_path):
    small = prune(clip, spec)
    small.model.float()
    small.save(tmp_path / 'model')
    with next_open_clip():
        later = load_clip(tmp_path / 'model', device='cpu')
    now = load_clip(tmp_path / 'model', device='cpu')
    for back in (later, now):
        assert torch.equal(features(back, torch.float32), features(small, torch.float32))
