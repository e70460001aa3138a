"Plans keep what they say, within the budget; removal is exact, and what is left can learn."

import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run
from open_clip.loss import ClipLoss

import mope_clip.pruners.budget as budget_room
from mope_clip.clip import (
    TOWERS,
    PruneSpec,
    compose,
    keep_count,
    prune,
    relative,
    tiny_clip,
    whole_spec,
)
from mope_clip.data import synth_pairs
from mope_clip.evaluate import cost, images_of, spec_cost
from mope_clip.metrics import kept_probability, mope, random_scores
from mope_clip.pruners import masked, mope_set, plan, plan_depth, plan_width, stepwise
from mope_clip.pruners.budget import price_in
from mope_clip.pruners.plan import nearest_multiple


def quiet(text):
    "A log that says nothing"


@pytest.fixture(scope='module')
def clip():
    return tiny_clip()


@pytest.fixture(scope='module')
def pairs():
    return synth_pairs(16)


@pytest.fixture(scope='module')
def scores(clip):
    return random_scores(clip, seed=0, groups=4)


@pytest.fixture(scope='module')
def some(clip):
    return random_scores(clip, seed=1, groups=4)


def hand_table(heads, groups, layers=()):
    "A table of the vision tower of a small model from lists of scores by layer"
    rows = []
    for layer, of_heads in enumerate(heads):
        rows += [('vision', 'head', layer, i, None, score) for i, score in enumerate(of_heads)]
    for layer, of_groups in enumerate(groups):
        for i, score in enumerate(of_groups):
            rows.append(('vision', 'ffn', layer, i, [2 * i, 2 * i + 1], score))
    rows += [('vision', 'layer', layer, 0, None, score) for layer, score in enumerate(layers)]
    table = pd.DataFrame(rows, columns=['tower', 'module', 'layer', 'index', 'neurons', 'score'])
    shape = dict(vision=[[4, 4]] * 2, text=[[3, 2]])
    table.attrs['mope'] = dict(metric='by hand', shape=shape)
    return table


def by_hand():
    "Layer 0 has the better heads, layer 1 the better groups"
    return hand_table(heads=[[9, 8, 7, 6], [1, 4, 3, 2]], groups=[[1, 2], [5, 4]])


def kept_of(spec):
    return [(kept['heads'], kept['neurons']) for kept in spec.vision.values()]


def head_counts(spec):
    return {t: [len(kept['heads']) for kept in getattr(spec, t).values()] for t in TOWERS}


# --- counts


def test_half_of_an_odd_number_is_rounded_up():
    assert [keep_count(n, 0.5) for n in (4, 5, 6, 7)] == [2, 3, 3, 4]
    assert [round(n * 0.5) for n in (4, 5, 6, 7)] == [2, 2, 3, 4]  # what it would be otherwise


def test_rounding_never_empties():
    shares = (0.05, 0.0625, 0.1875, 0.3125, 0.9375, 1)
    assert [keep_count(8, share) for share in shares] == [1, 1, 2, 3, 8, 8]


@pytest.mark.parametrize('wrong', [0, -0.5, 1.01, float('nan'), True])
def test_a_fraction_is_above_0_and_at_most_1(wrong):
    with pytest.raises(ValueError, match='above 0 and at most 1'):
        keep_count(8, wrong)


def test_the_nearest_multiple_is_half_up_and_never_none_of_some():
    found = [nearest_multiple(n, 4, 10) for n in (0, 1, 4, 5, 6, 9, 10)]
    assert found == [0, 4, 4, 4, 8, 8, 10]


# --- width


def test_every_layer_keeps_the_same_count():
    assert kept_of(plan_width(by_hand(), 0.5)) == [([0, 1], [2, 3]), ([1, 2], [0, 1])]


def test_all_layers_of_a_tower_compete():
    found = kept_of(plan_width(by_hand(), 0.5, rank='global'))
    assert found == [([0, 1, 2], [2, 3]), ([1], [0, 1])]


def test_the_floor_wins_over_the_budget():
    found = kept_of(plan_width(by_hand(), 0.5, rank='global', floor=2))
    assert found == [([0, 1], [0, 1, 2, 3]), ([1, 2], [0, 1, 2, 3])]


def test_without_a_floor_a_layer_may_lose_all():
    found = kept_of(plan_width(by_hand(), 0.5, rank='global', floor=0))
    assert found == [([0, 1, 2, 3], []), ([], [0, 1, 2, 3])]


def test_keeping_all_changes_nothing():
    assert kept_of(plan_width(by_hand(), 1)) == [([0, 1, 2, 3], [0, 1, 2, 3])] * 2


def test_equal_scores_keep_the_first():
    level = hand_table([[5] * 4] * 2, [[5] * 2] * 2)
    assert kept_of(plan_width(level, 0.5)) == [([0, 1], [0, 1])] * 2


def test_a_tower_without_scores_stays_whole():
    assert plan_width(by_hand(), 0.5).text == {0: dict(heads=[0, 1, 2], neurons=[0, 1])}


def test_a_specification_remembers_where_it_came_from():
    assert plan_width(by_hand(), 0.5).provenance == dict(metric='by hand')


def test_the_order_of_the_rows_is_nothing():
    table = by_hand()
    assert plan_width(table.sample(frac=1, random_state=0), 0.5) == plan_width(table, 0.5)


def test_a_column_of_probabilities_changes_no_plan():
    table = by_hand()
    table['p_kept'] = list(range(len(table)))
    assert kept_of(plan_width(table, 0.5)) == kept_of(plan_width(by_hand(), 0.5))


def test_probabilities_of_being_kept_stand_beside_a_plan(clip, pairs):
    table = mope(clip, pairs, 'text', ('head',), z='contrastive', diffs=True)
    assert kept_probability(table, 0.5).between(0, 1).all()


@pytest.mark.parametrize(
    'rank, floor, multiples, expected',
    [
        ('layer', 1, (3, 1), [([0, 1, 2], [2, 3]), ([1, 2, 3], [0, 1])]),
        ('layer', 1, (1, 3), [([0, 1], [1, 2, 3]), ([1, 2], [0, 1, 3])]),
    ],
)
def test_counts_are_rounded_with_the_next_best(rank, floor, multiples, expected):
    table = by_hand()
    table['neurons'] = [group and group[::-1] for group in table.neurons]  # the better one first
    assert kept_of(plan_width(table, 0.5, rank, floor, multiples)) == expected


def test_rounding_leaves_nothing_where_nothing_stays():
    assert kept_of(plan_width(by_hand(), 0.5, 'global', 0, multiples=(1, 3)))[0][1] == []


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(keep=0), 'not 0'),
        (dict(rank='tower'), "'layer' or 'global', not 'tower'"),
        (dict(floor=-1), 'at least 0, not -1'),
        (dict(floor=True), 'at least 0, not True'),
        (dict(multiples=(1, 2, 3)), 'multiples are two whole numbers'),
        (dict(multiples=8), r'multiples are two whole numbers, .* not \(8,\)'),
        (dict(multiples=(0, 1)), 'at least 1, not 0'),
    ],
)
def test_options_that_mean_nothing_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan_width(by_hand(), **options)


def test_a_table_without_heads_is_refused():
    table = by_hand()
    with pytest.raises(ValueError, match='scores no head of the vision tower'):
        plan_width(table[table.module == 'ffn'], 0.5)


def test_a_table_without_groups_is_refused():
    table = by_hand()
    with pytest.raises(ValueError, match="modules that include 'ffn'"):
        plan_width(table[table.module == 'head'], 0.5)


def test_a_table_without_a_layers_heads_is_refused():
    table = by_hand()
    cut = table[~((table.module == 'head') & (table.layer == 1))]
    with pytest.raises(ValueError, match='scores no head of vision layer 1'):
        plan_width(cut, 0.5)


def test_a_table_with_nan_is_refused():
    table = by_hand()
    table['score'] = table.score.astype(float)
    table.loc[0, 'score'] = np.nan
    with pytest.raises(ValueError, match='1 scores of the table are NaN'):
        plan_width(table, 0.5)


def test_a_table_that_does_not_say_what_it_scores_is_refused():
    table = by_hand()
    table.attrs = {}
    with pytest.raises(ValueError, match="attrs\\['mope'\\] is gone"):
        plan_width(table, 0.5)


def test_a_model_without_heads_in_a_tower_can_be_planned(clip):
    spec = whole_spec(clip)
    for kept in spec.text.values():
        kept['heads'] = []
    headless = prune(clip, spec)
    found = plan_width(random_scores(headless, groups=4), 0.5)
    assert head_counts(found) == dict(vision=[2, 2, 2], text=[0, 0])


def test_both_readings_keep_as_many_heads(scores):
    even, uneven = (head_counts(plan_width(scores, 0.5, rank)) for rank in ('layer', 'global'))
    assert even == dict(vision=[2, 2, 2], text=[2, 2])
    assert even != uneven
    for tower in TOWERS:
        assert sum(even[tower]) == sum(uneven[tower])
        assert min(uneven[tower]) >= 1


def test_each_kind_and_tower_may_have_a_fraction_of_its_own(scores):
    keep = {'head': {'vision': 0.25, 'text': 1.0}, 'ffn': {'vision': 0.5, 'text': 1.0}}
    assert head_counts(plan_width(scores, keep)) == dict(vision=[1, 1, 1], text=[4, 4])


# --- depth


@pytest.mark.parametrize('keep, layers', [(0.01, [1]), (0.5, [1]), (0.75, [0, 1]), (1, [0, 1])])
def test_the_best_layers_stay_in_their_order(keep, layers):
    table = hand_table([[0] * 4] * 2, [[0] * 2] * 2, layers=[3, 8])
    assert list(plan_depth(table, keep).vision) == layers


def test_a_layer_that_stays_is_whole_and_an_unscored_tower_too():
    spec = plan_depth(hand_table([[0] * 4] * 2, [[0] * 2] * 2, layers=[3, 8]), 0.5)
    assert spec.vision[1] == dict(heads=[0, 1, 2, 3], neurons=[0, 1, 2, 3])
    assert list(spec.text) == [0]


def test_the_worst_layer_goes_first(scores):
    rows = scores[(scores.module == 'layer') & (scores.tower == 'vision')]
    order = rows.sort_values('score').layer.tolist()
    assert list(plan_depth(scores, 0.5).vision) == sorted(order[1:])


def test_depth_without_scores_of_layers_is_refused():
    with pytest.raises(ValueError, match="modules that include 'layer'"):
        plan_depth(by_hand(), 0.5)


def test_depth_of_more_than_all_is_refused():
    with pytest.raises(ValueError, match='not 2'):
        plan_depth(hand_table([[0] * 4] * 2, [[0] * 2] * 2, layers=[3, 8]), 2)


# --- removal


def random_spec(clip, seed):
    "Any part of each layer, nothing included; each layer but the last of a tower may go"
    draw, spec = np.random.default_rng(seed), whole_spec(clip)
    for layers in (spec.vision, spec.text):
        for layer in list(layers)[:-1]:
            if draw.random() < 0.3:
                del layers[layer]
        for kept in layers.values():
            for kind, units in kept.items():
                count = draw.integers(len(units) + 1)
                kept[kind] = sorted(draw.choice(units, count, replace=False).tolist())
    return spec


@pytest.fixture(scope='module')
def batch(clip, pairs):
    "Images and token ids"
    ids = clip.tokenizer([captions[0] for captions in pairs['captions']])
    return images_of(clip, pairs['image']), ids


@torch.no_grad()
def embeddings(clip, batch):
    images, ids = batch
    return clip.encode_image(images), clip.encode_text(ids)


def close(some, others, eps=1e-5):
    return all(torch.allclose(a, b, rtol=0, atol=eps) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize('seed', range(6))
def test_removing_is_zeroing_in_a_smaller_model(seed, clip, batch):
    spec = random_spec(clip, seed)
    small, same_size = prune(clip, spec), masked(clip, spec)
    assert close(embeddings(small, batch), embeddings(same_size, batch))
    for left, dense in zip(embeddings(small, batch), embeddings(clip, batch), strict=True):
        assert (left - dense).abs().max() > 1e-2  # something was removed
    assert cost(same_size) == cost(clip)
    assert cost(small)['params'] < cost(clip)['params']
    assert cost(small)['macs'] < cost(clip)['macs']


def test_keeping_all_is_the_same_function(clip, batch):
    assert close(embeddings(prune(clip, whole_spec(clip)), batch), embeddings(clip, batch))


def test_what_goes_follows_from_the_shapes(clip, scores):
    half = prune(clip, plan_width(scores, 0.5))
    width, head, layers = 32, 8, 3 + 2
    gone = layers * (2 * (4 * head * width + 3 * head) + 64 * (2 * width + 1))
    assert cost(clip)['params'] - cost(half)['params'] == gone


def test_all_that_is_left_learns_and_the_original_stays(clip, scores, batch):
    images, ids = batch
    before, half = embeddings(clip, batch), prune(clip, plan_width(scores, 0.5))
    features = half.encode_image(images, True), half.encode_text(ids, True)
    ClipLoss()(*features, half.logit_scale.exp()).backward()
    for name, parameter in half.model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    for tower in TOWERS:
        for block in half.tower(tower).blocks:
            assert (block.heads, block.neurons) == (2, 64)
            slices = [*block.head_weights(), *block.neuron_weights()]
            for part in (part for part in slices if part.parameter.ndim == 2):
                rows = part.parameter.grad.movedim(part.axis, 0)
                each = rows.reshape(part.bands, part.units, part.size, -1).abs().amax((2, 3))
                assert (each > 0).all(), 'queries, keys and values of each head'
    assert all(parameter.grad is None for parameter in clip.model.parameters())
    with torch.no_grad():
        for parameter in half.model.parameters():
            parameter -= 0.1 * parameter.grad
    assert all(map(torch.equal, embeddings(clip, batch), before))


def test_width_then_depth_is_one_specification_of_the_original(clip, pairs, batch):
    wide = plan_width(mope(clip, pairs, groups=4, z='contrastive'), keep=0.5, rank='global')
    narrow = prune(clip, wide)
    deep = plan_depth(mope(narrow, pairs, modules=('layer',), z='contrastive'), keep=0.5)
    final = prune(narrow, deep)
    whole_layers = {t: [head_counts(wide)[t][layer] for layer in getattr(deep, t)] for t in TOWERS}
    assert head_counts(deep) == whole_layers
    one = compose(wide, deep)
    assert (final.spec.vision, final.spec.text) == (one.vision, one.text)
    for tower in TOWERS:
        for layer, kept in getattr(final.spec, tower).items():
            assert kept == getattr(wide, tower)[layer]  # indices of the original
    assert close(embeddings(final, batch), embeddings(prune(clip, one), batch), eps=1e-6)
    assert close(embeddings(final, batch), embeddings(masked(clip, one), batch))
    assert [len(final.tower(t).blocks) for t in TOWERS] == [2, 1]


# --- budgets


@pytest.mark.parametrize('rank', ['layer', 'global'])
@pytest.mark.parametrize('kind, share', [('params', 0.6), ('macs', 0.5)])
def test_a_plan_is_the_widest_that_fits(kind, share, rank, clip, some):
    def of_towers(costs):
        return sum(costs[f'{tower}_{kind}'] for tower in TOWERS)

    spec = plan(some, clip, **{kind: share}, rank=rank, log=quiet)
    limit, got = share * of_towers(cost(clip)), of_towers(cost(prune(clip, spec)))
    costs = {
        of_towers(spec_cost(clip, plan_width(some, keep / 200, rank))) for keep in range(1, 201)
    }
    assert got == max(price for price in costs if price <= limit)


def test_a_budget_of_all_keeps_all(clip, some):
    assert plan(some, clip, params=1.0, log=quiet).vision == whole_spec(clip).vision


def test_token_embeddings_may_be_left_out_of_the_count(clip, some):
    half = plan_width(some, 0.5)
    costs = spec_cost(clip, half)
    exact = costs['vision_params'] + costs['text_params_no_embedding']
    assert plan(some, clip, params=exact, embeddings=False, log=quiet).vision == half.vision
    assert plan(some, clip, params=exact, log=quiet).vision != half.vision


def test_layers_go_first_and_counts_are_multiples(clip, some):
    spec = plan(
        some, clip, macs=0.4, keep_depth=0.67, rank='global', floor=0, multiples=(1, 16), log=quiet
    )
    assert [len(spec.vision), len(spec.text)] == [2, 1]
    assert all(len(kept['neurons']) % 16 == 0 for kept in spec.vision.values())


def test_a_plan_says_the_fraction_that_it_found(clip, some):
    spec = plan(some, clip, macs=0.5, rank='global', log=quiet)
    share = spec.provenance['plan']['share']
    assert plan_width(some, share, 'global').vision == spec.vision


def test_a_budget_in_milliseconds_follows_the_clock(clip, some, monkeypatch):
    def macs_clock(model, batch):
        return {f'{tower}_ms': cost(model)[f'{tower}_macs'] / 1e6 for tower in TOWERS}

    by_count = plan(some, clip, macs=0.5, rank='global', log=quiet)
    monkeypatch.setattr(budget_room, 'measured', macs_clock)
    by_clock = plan(some, clip, latency=0.5, rank='global', log=quiet)
    assert (by_clock.vision, by_clock.text) == (by_count.vision, by_count.text)


def test_the_real_clock_counts_milliseconds(clip):
    assert price_in('latency', clip, ['vision'], batch=2)(whole_spec(clip)) > 0


@pytest.mark.parametrize(
    'budgets, sentence',
    [
        (dict(), 'exactly one budget of keep, params, macs, latency, not none'),
        (dict(params=0.5, macs=0.5), 'exactly one budget'),
        (dict(macs=-1), 'above 0, not -1'),
        (dict(macs=True), 'above 0, not True'),
        (dict(params=0.01), 'smallest model of this table'),
        (dict(macs=0.5, keep_depth=0), 'not 0'),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused(budgets, sentence, clip, some):
    with pytest.raises(ValueError, match=sentence):
        plan(some, clip, **budgets)


def test_a_table_of_another_model_is_refused_before_any_search(clip, some):
    smaller = prune(clip, plan_depth(some, 0.5))
    with pytest.raises(ValueError, match='is of a model with 3 vision layers'):
        plan(some, smaller, macs=0.5)


def test_a_budget_speaks_of_the_towers_that_are_scored(clip, some):
    spec = plan(some[some.tower == 'vision'], clip, params=0.5, log=quiet)
    assert spec.text == whole_spec(clip).text
    assert cost(prune(clip, spec))['vision_params'] <= 0.5 * cost(clip)['vision_params']


def test_a_plan_says_what_it_will_cost(clip, some):
    said = []
    plan(some, clip, keep=0.5, log=said.append)
    first, _, last = said[0].splitlines()
    assert first.startswith('vision: 3 of 3 layers, 6 of 12 heads, 192 of 384 neurons; ')
    assert last.startswith('in all: ') and last.endswith('multiply-accumulates')


# --- step by step


@pytest.fixture(scope='module')
def few():
    return synth_pairs(16, captions=2)


def test_a_set_of_one_head_costs_what_mope_says(clip, few):
    single = mope(clip, few, 'vision', ('head',), z='contrastive')
    whole = whole_spec(clip)
    lost = {**whole.vision, 1: dict(heads=[0, 1, 3], neurons=list(range(128)))}
    found = mope_set(clip, few, [PruneSpec(lost, whole.text, whole.base)], 'contrastive')
    alone = single[(single.layer == 1) & (single['index'] == 2)].score.item()
    assert found.score.item() == pytest.approx(alone, abs=1e-3)
    assert found.attrs['mope']['metric'] == 'set'


def test_no_sets_are_refused(clip, few):
    with pytest.raises(ValueError, match='There are no sets to score'):
        mope_set(clip, few, [])


def test_sets_are_not_scored_on_the_test_split(clip):
    with pytest.raises(ValueError, match='score on validation pairs'):
        mope_set(clip, synth_pairs(8, 'test'), [whole_spec(clip)])


def test_many_steps_end_at_the_counts_of_one(clip, few):
    found = stepwise(clip, few, 0.5, 0.25, groups=4, z='contrastive')
    assert [len(kept['heads']) for kept in found.vision.values()] == [2] * 3
    assert [len(kept['neurons']) for kept in found.text.values()] == [64] * 2
    same = {layer: dict(heads=[0, 1], neurons=list(range(64))) for layer in range(3)}
    assert relative(found, found).vision == same


def test_layers_go_one_by_one(clip, few):
    greedy = stepwise(clip, few, 0.6, depth=True, z='contrastive')
    assert [len(greedy.vision), len(greedy.text)] == [2, 1]


def test_a_step_of_more_than_all_is_refused(clip, few):
    with pytest.raises(ValueError, match='step is the fraction'):
        stepwise(clip, few, 0.5, 1.5)


# --- the front doors

DOORS = """
import importlib
for room in ('pruners.plan', 'metrics.mope', 'evaluate.zero_shot', 'evaluate.latency'):
    importlib.import_module('mope_clip.' + room)
    part, name = room.split('.')
    function = getattr(importlib.import_module('mope_clip.' + part), name)
    assert callable(function) and function.__name__ == name, room
from mope_clip.pruners import plan
from mope_clip.pruners.plan import plan_width
assert callable(plan) and callable(plan_width)
print('functions')
"""


def test_a_name_is_the_function_also_after_its_room_was_imported():
    r = run(sys.executable, '-c', DOORS)
    assert r.stdout == 'functions\n', r.stderr[-2000:]
