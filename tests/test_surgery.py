"""Removed equals masked, before and after a step of training.

For every architecture of the grid, and random uneven specifications.
"""

import numpy as np
import pytest
import torch
from conftest import GRID, model_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss

from mope_clip.clip import TOWERS, PruneSpec, compose, prune, relative, shape_of, whole_spec
from mope_clip.data import synth_pairs
from mope_clip.evaluate import cost, images_of, spec_cost
from mope_clip.pruners import masked


def subset(draw, n):
    "Some of n places, in order"
    order = np.random.default_rng(draw(st.integers(0, 2**31))).permutation(n)
    return sorted(order[: draw(st.integers(0, n))].tolist())


@st.composite
def specs(draw, shape):
    "Any part of each layer, nothing included, of any layers but none"
    out = {}
    for t, layers in shape.items():
        stay = draw(st.sets(st.integers(0, len(layers) - 1), min_size=1))
        out[t] = {
            k: dict(heads=subset(draw, layers[k][0]), neurons=subset(draw, layers[k][1]))
            for k in stay
        }
    return PruneSpec(**out, base=whole_spec(shape).base)


@pytest.fixture(scope='module')
def pairs():
    return synth_pairs(6)


def batch(clip, pairs):
    "Images and token ids, in the type of the model"
    return images_of(clip, pairs['image']), clip.tokenizer([cs[0] for cs in pairs['captions']])


def learn(clip, images, ids):
    "Gradients of the contrastive loss, from none"
    clip.model.zero_grad(set_to_none=True)
    ClipLoss()(
        clip.encode_image(images, True), clip.encode_text(ids, True), clip.logit_scale.exp()
    ).backward()


def as_weights(clip):
    "A copy whose weights are the gradients: what is cut from it is the gradient of what is left"
    out = clip.copy()
    with torch.no_grad():
        for p, q in zip(out.model.parameters(), clip.model.parameters(), strict=True):
            p.copy_(torch.zeros_like(p) if q.grad is None else q.grad)
    return out


@torch.no_grad()
def embeddings(clip, images, ids):
    return clip.encode_image(images), clip.encode_text(ids)


def close(a, b):
    "To 1e-5 in single precision, to 1e-9 in double"
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= (1e-5 if x.dtype == torch.float32 else 1e-9) * max(
            1, y.abs().max()
        ), (x - y).abs().max()


@pytest.mark.parametrize('name', GRID)
@settings(
    max_examples=4,
    phases=[Phase.generate],
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_removed_equals_masked_before_and_after_a_step(name, pairs, data):
    clip = model_of(name)
    spec = data.draw(specs(shape_of(clip)))
    single = clip.copy()
    single.model.float()
    close(
        embeddings(prune(single, spec), *batch(single, pairs)),
        embeddings(masked(single, spec), *batch(single, pairs)),
    )
    # a step multiplies rounding, so the rest is in double precision
    images, ids = batch(clip, pairs)
    before = embeddings(clip, images, ids)
    small, same_size = prune(clip, spec), masked(clip, spec)
    close(embeddings(small, images, ids), embeddings(same_size, images, ids))
    close(
        embeddings(small, images, ids),
        (small.model.encode_image(images), small.model.encode_text(ids)),
    )  # and open_clip's own forward runs on it
    assert cost(small) == spec_cost(clip, spec)
    for c in (small, same_size):
        learn(c, images, ids)
    cut = prune(as_weights(same_size), spec)
    for (n, p), g in zip(small.model.named_parameters(), cut.model.parameters(), strict=True):
        got = torch.zeros_like(p) if p.grad is None else p.grad
        assert (got - g).abs().max() <= 1e-9 * max(1, g.abs().max()) if g.numel() else True, n
    with torch.no_grad():
        for c in (small, same_size):
            for p in c.model.parameters():
                p -= 0.05 * (0 if p.grad is None else p.grad)
    close(embeddings(small, images, ids), embeddings(masked(same_size, spec), images, ids))
    for a, b in zip(embeddings(clip, images, ids), before, strict=True):
        assert torch.equal(a, b)  # the original is as it was


@pytest.mark.parametrize('name', ['plain', 'custom_norms', 'average_pool'])
def test_gradients_flow_to_all_that_is_left(name, pairs):
    clip = model_of(name)
    spec = whole_spec(clip)
    for layers in (spec.vision, spec.text):
        for layer, kept in layers.items():
            kept['heads'], kept['neurons'] = kept['heads'][layer % 2 :: 2], kept['neurons'][::3]
    small = prune(clip, spec)
    learn(small, *batch(small, pairs))
    for n, p in small.model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, n


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_two_steps_are_one_specification(data):
    shape = dict(vision=[[4, 16]] * 3, text=[[2, 8]] * 2)
    first = data.draw(specs(shape))
    left = {
        t: [[len(k['heads']), len(k['neurons'])] for k in getattr(first, t).values()]
        for t in TOWERS
    }
    second = data.draw(specs(left))
    both = compose(first, second)
    assert relative(first, both) == second
    assert all(
        set(v) <= set(getattr(first, t)[layer][k])
        for t in TOWERS
        for layer, kept in getattr(both, t).items()
        for k, v in kept.items()
    )
