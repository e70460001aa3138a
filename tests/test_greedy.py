"A search that takes one unit after the other away, and looks at few places to do so."

import pytest

from mope_clip.clip import prune, shape_of, tiny_clip
from mope_clip.data import synth_pairs
from mope_clip.evaluate import cost
from mope_clip.metrics import random_scores
from mope_clip.pruners.greedy import LazyGreedy, greedy_search
from mope_clip.pruners.levels import Orders, prices_of


@pytest.fixture(scope='module')
def clip():
    return tiny_clip()


@pytest.fixture(scope='module')
def scores(clip):
    return random_scores(clip, groups=4)


PAIRS = synth_pairs(40)


class Worth:
    "A judge of what each level of each place is worth"

    def __init__(self, of):
        self.of, self.states, self.asked = of, {}, 0

    def evaluate(self, levels):
        self.asked += 1
        return self.of(levels), {}


def plainly(orders, prices, judge, budget):
    "Greedy search as it is defined: every place is looked at before every step"
    levels = dict(orders.full)
    while prices.of(levels) > budget + 1e-9:
        now, best = judge.evaluate(levels)[0], None
        for place in sorted(levels):
            other = {**levels, place: levels[place] - 1}
            orders.keep_one_layer(other)
            saved = prices.of(levels) - prices.of(other)
            if levels[place] and saved > 0:
                missed = (now - judge.evaluate(other)[0]) / saved
                if best is None or missed < best[0]:
                    best = missed, other
        levels = best[1]
    return levels


@pytest.mark.parametrize('budget', [0.8, 0.5, 0.3])
def test_lazily_the_same_is_found_with_fewer_looks(clip, scores, budget):
    "Where what is lost only grows, which is when laziness is exact"
    orders = Orders(clip, scores)
    prices = prices_of(orders, 'macs', embeddings=True)
    weight = {place: 1 + k % 7 for k, place in enumerate(sorted(orders.full))}

    def worth(levels):
        return sum(weight[p] * (n / orders.full[p]) ** 0.5 for p, n in levels.items())

    lazy, plain = Worth(worth), Worth(worth)
    run = LazyGreedy(lazy, orders, prices)
    assert run.walk(budget) == plainly(orders, prices, plain, budget)
    assert run.evaluations == lazy.asked < plain.asked


def test_of_two_heads_that_say_the_same_one_stays(clip, scores):
    table = scores.assign(score=1.0)
    twins = {('vision', 1, 0), ('vision', 1, 1)}
    for row in table[table.module == 'head'].itertuples():
        if (row.tower, row.layer, row.index) in twins:
            table.loc[row.Index, 'score'] = 0.0
    orders = Orders(clip, table)

    def worth(levels):
        kept = set(orders.kept(levels, 'vision', 1)['heads'])
        return 100 * bool(kept & {0, 1}) + sum(levels.values())

    prices = prices_of(orders, 'macs', embeddings=True)
    levels = LazyGreedy(Worth(worth), orders, prices).walk(0.3)
    assert {0, 1} & set(orders.kept(levels, 'vision', 1)['heads'])


@pytest.mark.parametrize('budget', [dict(macs=0.5), dict(params=0.6)])
def test_what_is_found_is_within_the_budget_and_found_again(clip, scores, budget):
    quick = dict(fitted=16, judged=16, log=None)
    one, again = (greedy_search(clip, scores, PAIRS, **budget, **quick) for _ in range(2))
    assert one == again
    (kind, share) = next(iter(budget.items()))
    small, whole = cost(prune(clip, one)), cost(clip)
    assert small[kind] <= share * whole[kind]
    assert one.provenance['greedy'][kind] == share
    assert one.provenance['greedy']['share'] == pytest.approx(small[kind] / whole[kind], abs=0.01)


def test_every_tower_keeps_something(clip, scores):
    least = dict(fitted=16, judged=16, log=None)
    spec = greedy_search(clip, scores, PAIRS, macs=0.13, **least)
    assert all(shape_of(prune(clip, spec)).values())


def test_what_cannot_be_searched_is_one_sentence(clip, scores):
    with pytest.raises(ValueError, match='Give exactly one budget'):
        greedy_search(clip, scores, PAIRS, macs=0.5, params=0.5)
    with pytest.raises(ValueError, match='The smallest model has'):
        greedy_search(clip, scores, PAIRS, macs=0.001)
    with pytest.raises(ValueError, match='These scores are of a model with other weights'):
        greedy_search(tiny_clip(seed=3), scores, PAIRS, macs=0.5)
