"From the whole model down to a budget, with few looks, and the walk that goes on from there."

import json

import pytest

from mope_clip.clip import prune, shape_of, tiny_clip
from mope_clip.data import synth_pairs
from mope_clip.evaluate import cost
from mope_clip.metrics import random_scores
from mope_clip.pruners import search
from mope_clip.pruners.descent import Descent
from mope_clip.pruners.levels import Orders, prices_of


@pytest.fixture(scope='module')
def clip():
    return tiny_clip()


@pytest.fixture(scope='module')
def scores(clip):
    return random_scores(clip, groups=4)


PAIRS = synth_pairs(40)


def descended(judge, orders, prices, budget, units=1, cut=lambda descent: descent):
    "A descent that ended; `cut`: what happens to it after every look"
    descent = Descent(judge, orders, prices, units)
    descent.begin()
    while prices.of(descent.levels) > budget + 1e-9 and descent.queue:
        descent.one_look()
        descent = cut(descent)
    return descent


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
    descent = descended(lazy, orders, prices, budget)
    assert descent.levels == plainly(orders, prices, plain, budget)
    assert descent.evaluations == lazy.asked < plain.asked
    assert descent.fitness == worth(descent.levels)


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
    levels = descended(Worth(worth), orders, prices, 0.3).levels
    assert {0, 1} & set(orders.kept(levels, 'vision', 1)['heads'])


def concave(orders):
    weight = {place: 1 + k % 7 for k, place in enumerate(sorted(orders.full))}
    return lambda levels: sum(weight[p] * (n / orders.full[p]) ** 0.5 for p, n in levels.items())


def test_a_descent_that_was_cut_off_everywhere_ends_the_same(clip, scores):
    orders = Orders(clip, scores)
    prices = prices_of(orders, 'macs', embeddings=True)

    def cut(descent):
        again = Descent(Worth(concave(orders)), orders, prices)
        again.restore(json.loads(json.dumps(descent.state())))
        return again

    whole = descended(Worth(concave(orders)), orders, prices, 0.4)
    pieces = descended(Worth(concave(orders)), orders, prices, 0.4, cut=cut)
    assert pieces.state() == whole.state()


def test_larger_steps_look_less_and_none_goes_below_zero(clip, scores):
    orders = Orders(clip, scores)
    prices = prices_of(orders, 'macs', embeddings=True)
    fine, coarse = (
        descended(Worth(concave(orders)), orders, prices, 0.3, units=units) for units in (1, 3)
    )
    assert coarse.evaluations < fine.evaluations and min(coarse.levels.values()) >= 0
    assert prices.of(coarse.levels) <= 0.3 + 1e-9


def test_in_a_hurry_it_ends_within_the_budget_without_a_look(clip, scores):
    orders = Orders(clip, scores)
    prices = prices_of(orders, 'macs', embeddings=True)
    judge = Worth(concave(orders))
    descent = Descent(judge, orders, prices)
    descent.begin()
    for _ in orders.full:
        descent.one_look()
    asked = judge.asked
    descent.hurry(0.4)
    assert prices.of(descent.levels) <= 0.4 + 1e-9 and judge.asked == asked
    assert len({n / orders.full[p] for p, n in descent.levels.items()}) > 2, 'not one place alone'


def test_where_no_layer_may_go_none_is_emptied(clip, scores):
    orders = Orders(clip, scores)
    descent = Descent(
        Worth(concave(orders)), orders, prices_of(orders, 'macs', embeddings=True), empties=False
    )
    descent.begin()
    while descent.queue:
        descent.one_look()
    assert not any(orders.is_empty(descent.levels, t, k) for t, k, _ in descent.levels)


ENOUGH = dict(evaluations=60, fitted=16, judged=16, log=None)


@pytest.mark.parametrize('budget', [dict(macs=0.5), dict(params=0.6)])
def test_a_search_with_a_descent_is_within_the_budget_and_found_again(clip, scores, budget):
    one, again = (search(clip, scores, PAIRS, **budget, **ENOUGH) for _ in range(2))
    assert one == again
    (kind, share) = next(iter(budget.items()))
    assert cost(prune(clip, one))[kind] <= share * cost(clip)[kind] + 1
    found = one.provenance['search']
    assert found['fitness'] >= max(found['starts'].values()) and 'descent' in found['starts']
    assert found['evaluations'] == 60


def test_without_a_descent_where_ranks_are_asked_for_or_candidates_are_few(clip, scores):
    by_ranks = dict(ENOUGH, start='ranks')
    for how in (by_ranks, dict(ENOUGH, evaluations=6), dict(ENOUGH, evaluations=0)):
        found = search(clip, scores, PAIRS, macs=0.5, **how).provenance['search']
        assert 'descent' not in found['starts'] and found['evaluations'] == how['evaluations']
    with pytest.raises(ValueError, match='start must be one of'):
        search(clip, scores, PAIRS, macs=0.5, start='top')


def test_a_search_killed_in_its_descent_goes_on(clip, scores, tmp_path, monkeypatch):
    from mope_clip.pruners.candidates import Judge

    whole = search(clip, scores, PAIRS, macs=0.5, **ENOUGH)
    evaluate, calls = Judge.evaluate, []

    def killed(self, levels):
        calls.append(1)
        if len(calls) == 25:
            raise RuntimeError('killed')
        return evaluate(self, levels)

    monkeypatch.setattr(Judge, 'evaluate', killed)
    with pytest.raises(RuntimeError):
        search(clip, scores, PAIRS, macs=0.5, folder=tmp_path, **ENOUGH)
    (kept,) = tmp_path.glob('search-*.json')
    cut = json.loads(kept.read_text(encoding='utf-8'))
    assert cut['descent'], 'it was under way'
    again = search(clip, scores, PAIRS, macs=0.5, folder=tmp_path, **ENOUGH)
    assert (again.vision, again.text) == (whole.vision, whole.text)
    assert again.provenance['search']['evaluations'] == 60
    assert json.loads(kept.read_text(encoding='utf-8'))['seconds'] > cut['seconds'] > 0


def test_stopped_in_its_descent_it_takes_what_is_best_within_the_budget(clip, scores, monkeypatch):
    from mope_clip.pruners.search import SearchRun

    one_look, looks, lines = SearchRun.one_look, [], []

    def stopped(self):
        looks.append(1)
        if len(looks) == 15:
            raise KeyboardInterrupt
        one_look(self)

    monkeypatch.setattr(SearchRun, 'one_look', stopped)
    spec = search(clip, scores, PAIRS, macs=0.5, **dict(ENOUGH, log=lines.append))
    assert any('the best so far is taken' in line for line in lines)
    assert cost(prune(clip, spec))['macs'] <= 0.5 * cost(clip)['macs'] + 1


def test_every_tower_keeps_something(clip, scores):
    spec = search(clip, scores, PAIRS, macs=0.13, **ENOUGH)
    assert all(shape_of(prune(clip, spec)).values())


def test_a_descent_that_cannot_reach_the_budget_is_not_taken(clip, scores):
    "Without layers in the table none may be emptied, and the rest of each costs more than this"
    table = scores[scores.module != 'layer']
    table.attrs.update(scores.attrs)
    spec = search(clip, table, PAIRS, macs=0.3, **ENOUGH)
    assert cost(prune(clip, spec))['macs'] <= 0.3 * cost(clip)['macs'] + 1


def test_where_nothing_is_left_to_go_a_look_ends_the_descent(clip, scores):
    "A judge that likes small models best, so that only the budget speaks against the descent"
    import random

    from mope_clip.pruners.moves import Moves
    from mope_clip.pruners.search import SearchRun, SearchSettings

    orders = Orders(clip, scores)
    prices = prices_of(orders, 'macs', embeddings=True)
    least = prices.of(Moves(orders, prices, 1.0).smallest())
    moves = Moves(orders, prices, least + 1e-3, depth=0.0)
    run = SearchRun(Worth(lambda levels: 1.0), moves, random.Random(0), SearchSettings(100), print)
    run.begin({})
    run.judge.of = lambda levels: 50.0 - moves.prices.of(levels)
    run.prepare_descent()
    while run.descent:
        run.one_look()
    assert moves.fits(run.at.levels) and run.at.fitness == 1.0
