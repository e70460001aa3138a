"The optimal brain surgeon against solving each regression anew."

import pytest
import torch

from mope_clip.clip import tiny_clip
from mope_clip.data import synth_pairs
from mope_clip.metrics import METRICS, obs
from mope_clip.metrics.elimination import Spread, eliminate, spreads


@pytest.fixture(scope='module')
def rows():
    "Inputs of a map that depend on one another, about zero"
    mixed = torch.randn(400, 6).double() @ torch.randn(6, 6).double()
    return mixed - mixed.mean(0)


@pytest.fixture(scope='module')
def weight():
    return torch.randn(4, 6).double()


def error_without(rows, weight, gone) -> float:
    "Mean squared error of the output where the inputs that stay are solved again"
    kept = [k for k in range(rows.shape[1]) if k not in gone]
    target = rows @ weight.T
    solved = torch.linalg.lstsq(rows[:, kept], target).solution
    return (rows[:, kept] @ solved - target).square().sum(1).mean().item()


def covariance(rows):
    return rows.T @ rows / len(rows)


def test_each_step_takes_the_unit_whose_absence_costs_least(rows, weight):
    error = eliminate(covariance(rows), weight, damping=1e-12)
    order, gone = error.argsort().tolist(), []
    for unit in order[:-1]:
        costs = {k: error_without(rows, weight, [*gone, k]) for k in range(6) if k not in gone}
        assert min(costs, key=costs.get) == unit
        gone.append(unit)
        assert error[unit].item() == pytest.approx(costs[unit], rel=1e-6)
    everything = (rows @ weight.T).square().sum(1).mean()
    assert error.max().item() == pytest.approx(everything.item(), rel=1e-6)


def test_heads_go_as_wholes(rows, weight):
    error = eliminate(covariance(rows), weight, size=2, damping=1e-12)
    first = error.argmin().item()
    costs = [error_without(rows, weight, [2 * k, 2 * k + 1]) for k in range(3)]
    assert first == min(range(3), key=costs.__getitem__)
    assert error[first].item() == pytest.approx(costs[first], rel=1e-6)


def test_of_two_that_say_the_same_the_first_to_go_is_missed_by_none(rows, weight):
    twice = torch.cat([rows, rows[:, :1]], 1)
    more = torch.cat([weight, weight[:, :1]], 1)
    error = eliminate(covariance(twice), more, damping=1e-9)
    twins = sorted(error[[0, 6]].tolist())
    assert twins[0] < 1e-6 < 1e-3 < twins[1]


def test_several_at_a_time_give_nearly_the_same_order(rows):
    wide = torch.randn(300, 64).double() * torch.linspace(0.1, 3, 64)
    weight = torch.randn(8, 64).double()
    one, some = (eliminate(covariance(wide), weight, rounds=n) for n in (64, 16))
    kept = [set(error.argsort(descending=True)[:32].tolist()) for error in (one, some)]
    assert len(kept[0] & kept[1]) >= 28


def test_a_spread_is_a_covariance_whatever_the_batches(rows):
    whole, parts = Spread(), Spread()
    whole.add(rows + 100)
    for few in (rows + 100).split(37):
        parts.add(few)
    expected = (rows.T @ rows / len(rows)).double()
    for spread in (whole, parts):
        torch.testing.assert_close(spread.covariance(), expected, rtol=1e-4, atol=1e-4)


def test_padding_is_no_token():
    clip = tiny_clip()
    ids = clip.tokenizer(['a red square', 'a much longer caption about a blue square'])
    short = spreads(clip.text, ids[:1], 8)[0].neurons
    both = spreads(clip.text, ids, 8)[0].neurons
    lengths = clip.text.lengths(ids).tolist()
    assert short.n == lengths[0] and both.n == sum(lengths)


def test_the_metric_is_a_table_like_all_others():
    clip, pairs = tiny_clip(), synth_pairs(16)
    table = obs(clip, pairs, groups=4)
    assert METRICS['obs'].needs_pairs
    assert (table.score >= 0).all() and set(table.module) == {'head', 'ffn', 'layer'}
    again = obs(clip, pairs, groups=4, batch=5)
    torch.testing.assert_close(
        torch.tensor(table.score), torch.tensor(again.score), rtol=1e-3, atol=1e-7
    )
    pairs = synth_pairs(16, 'test')
    with pytest.raises(ValueError, match='test'):
        obs(clip, pairs)
