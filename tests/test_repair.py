"Repair and search: exact, the same however they are run, and never on what is reported."

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GRID, ROOT, model_of
from hypothesis import given, settings
from hypothesis import strategies as st
from zoo import in_small, small_clip

from mope_clip.clip import (
    TOWERS,
    load_clip,
    prune,
    save_spec,
    shape_of,
    tiny_clip,
    weights_hash,
    whole_spec,
)
from mope_clip.data import synth_pairs
from mope_clip.evaluate import cost
from mope_clip.metrics import mope, random_scores
from mope_clip.pruners import draw_repair, plan, repair, search
from mope_clip.pruners.levels import Orders, prices_of
from mope_clip.pruners.moves import Moves
from mope_clip.pruners.regression import RegressionSums, ridge, solve
from mope_clip.pruners.search import SearchSettings

ONES = dict(images=40)


@pytest.fixture(scope='module')
def teacher():
    return tiny_clip()


@pytest.fixture(scope='module')
def pairs():
    return synth_pairs(60, 'train')


def uneven(clip):
    "Half of the heads, half of the neurons, nothing in one layer, a layer less"
    spec = whole_spec(clip)
    for tower in TOWERS:
        layers = getattr(spec, tower)
        for layer, kept in layers.items():
            kept['heads'] = kept['heads'][: len(kept['heads']) // 2]
            kept['neurons'] = kept['neurons'][layer % 2 :: 2]
        first, *others = layers
        layers[first]['heads'] = []
        if len(others) > 1:
            del layers[others[0]]
    return spec


@pytest.fixture(scope='module')
def student(teacher):
    return prune(teacher, uneven(teacher))


def embeddings(clip, n=20):
    "Of images and captions that repair has not seen"
    pairs = synth_pairs(n, 'validation')
    images = torch.stack([clip.preprocess(image) for image in pairs['image']]).to(clip.dtype)
    ids = clip.tokenizer([captions[0] for captions in pairs['captions']])
    with torch.no_grad():
        return clip.encode_image(images), clip.encode_text(ids)


def far(a, b):
    "How far embeddings are from those of another model, as a share of their size"
    return [
        ((x - y).norm() / y.norm()).item()
        for x, y in zip(embeddings(a), embeddings(b), strict=True)
    ]


def same(a, b):
    return weights_hash(a) == weights_hash(b)


# --- regression


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_without_a_pull_it_is_least_squares(seed, inputs, outputs):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(40, inputs, generator=generator, dtype=torch.double)
    r = torch.randn(40, outputs, generator=generator, dtype=torch.double)
    sums = RegressionSums(inputs, outputs)
    for part in (slice(0, 7), slice(7, 40)):
        sums.add(h[part], r[part])
    weight, bias = ridge(sums, torch.zeros(outputs, inputs, dtype=torch.double), 1e-12)
    wanted = torch.linalg.lstsq(torch.cat([h, torch.ones(40, 1)], 1), r).solution
    assert torch.allclose(torch.cat([weight.T, bias[None]]), wanted, atol=1e-6)
    left = (h @ weight.T + bias - r).square().sum()
    assert sums.error(weight, bias) == pytest.approx(left.item(), rel=1e-9)


def test_nothing_is_solved_for_nothing_kept():
    sums = RegressionSums(0, 3)
    sums.add(torch.zeros(5, 0), torch.arange(15.0).view(5, 3))
    weight, bias = ridge(sums, torch.zeros(3, 0).double(), 0.01)
    assert weight.shape == (3, 0) and torch.equal(bias, torch.tensor([6.0, 7, 8]).double())


def test_old_weights_stay_where_none_is_better_on_held_out_items():
    h = torch.randn(6, 4, dtype=torch.double)
    true = torch.randn(2, 4, dtype=torch.double)
    fit, held = RegressionSums(4, 2), RegressionSums(4, 2)
    fit.add(h[:3], torch.randn(3, 2, dtype=torch.double))  # says nothing about the rest
    held.add(h[3:], h[3:] @ true.T)
    found = solve(fit, held, (true, torch.zeros(2)))
    assert found.strength is None and torch.equal(found.weight, true)
    assert found.after == found.before < 1e-12


# --- a model


def test_nothing_removed_stays_as_it_is(teacher, pairs):
    whole = prune(teacher, whole_spec(teacher))
    assert same(repair(whole, teacher, pairs, **ONES), whole)


def test_a_whole_block_that_is_solved_again_is_itself(teacher, pairs):
    "Where only the last block lost a head, all before it are those of the teacher"
    spec = whole_spec(teacher)
    spec.vision[2]['heads'] = [0, 1, 2]
    mended = repair(prune(teacher, spec), teacher, pairs, **ONES)
    for layer in (0, 1):
        for part in ('head', 'ffn'):
            ours = mended.vision.blocks[layer].output_maps()[part].weight
            theirs = teacher.vision.blocks[layer].output_maps()[part].weight
            assert (ours - theirs).abs().max() < 1e-6


def test_removed_neurons_that_never_change_are_made_up_for_exactly(teacher, pairs):
    clip = teacher.copy()
    block = clip.text.blocks[0]
    removed = [3, 40, 77]
    with torch.no_grad():
        for part in block.neuron_weights():
            if part.side == 'in':  # no input, and a constant output
                shape = part.parameter.movedim(part.axis, 0)
                shape[part.lines(removed)] = 0.0 if part.parameter.ndim > 1 else 1.5
    spec = whole_spec(clip)
    spec.text[0]['neurons'] = [n for n in spec.text[0]['neurons'] if n not in removed]
    student = prune(clip, spec)
    mended = repair(student, clip, pairs, strengths=(0.01,), **ONES)
    assert far(student, clip)[1] > 1e-3 and far(mended, clip)[1] < 1e-4


def test_it_brings_an_uneven_student_near_its_teacher(teacher, student, pairs):
    mended = repair(student, teacher, pairs)
    for before, after in zip(far(student, teacher), far(mended, teacher), strict=True):
        assert after < 0.5 * before
    for records in mended.spec.provenance['repair']['towers'].values():
        assert all(record['after'] <= record['before'] for record in records)
        assert records[-1]['part'] == 'projection' and records[-1]['layer'] is None
    assert shape_of(mended) == shape_of(student)


@pytest.mark.parametrize('name', [name for name in GRID if name != 'custom_norms'])
def test_every_architecture_of_the_grid_is_repaired(name):
    clip = model_of(name)
    student = prune(clip, uneven(clip))
    mended = repair(student, clip, synth_pairs(40, 'train'))
    for before, after in zip(far(student, clip), far(mended, clip), strict=True):
        assert after < before
    assert mended.dtype == clip.dtype


@pytest.mark.parametrize(
    'name', ['ViT-B-16-SigLIP', 'PE-Core-B-16', 'MobileCLIP-B', 'ViTamin-S', 'coca_ViT-B-32']
)
def test_families_and_their_poolers_are_repaired_and_searched(name):
    with in_small():
        clip = small_clip(name)
    student, few = prune(clip, uneven_stages(clip)), synth_pairs(24, 'train')
    mended = repair(student, clip, few)
    for before, after in zip(far(student, clip), far(mended, clip), strict=True):
        assert after < before
    spec = search(
        clip, random_scores(clip, groups=2), few, macs=0.7, evaluations=4, fitted=10, log=None
    )
    assert shape_of(repair(prune(clip, spec), clip, few))


def uneven_stages(clip):
    "The second half of heads and neurons, where both can go; blocks and poolers alike"
    spec = whole_spec(clip)
    for tower in TOWERS:
        for layer, kept in getattr(spec, tower).items():
            if clip.tower(tower).stages[layer].heads:
                kept['heads'] = kept['heads'][: max(1, len(kept['heads']) // 2)]
            kept['neurons'] = kept['neurons'][::2]
    return spec


def test_what_no_linear_map_makes_up_for_is_refused_by_name():
    clip = model_of('custom_norms')
    with pytest.raises(ValueError, match='scale_attn normalises what attention writes'):
        repair(prune(clip, uneven(clip)), clip, synth_pairs(40, 'train'))


# --- however it is run


def test_student_and_teacher_stay_as_they_were(teacher, student, pairs):
    teacher.model.train()
    try:
        before = weights_hash(student), weights_hash(teacher), student.model.training
        repair(student, teacher, pairs, **ONES)
        after = weights_hash(student), weights_hash(teacher), student.model.training
        assert before == after and teacher.model.training
        assert 'repair' not in student.spec.provenance
    finally:
        teacher.model.eval()


def test_the_size_of_batches_and_memory_change_nothing(teacher, student, pairs):
    whole = repair(student, teacher, pairs, batch=64)
    for how in (dict(batch=7), dict(memory=0), dict(batch=7, memory=0)):
        other = repair(student, teacher, pairs, **how)
        assert max(far(other, whole)) < 1e-4, how


def test_a_part_of_the_tokens_is_drawn_item_by_item(teacher, student, pairs):
    few = dict(rows=600)
    one, other = (repair(student, teacher, pairs, batch=b, **few) for b in (64, 7))
    assert max(far(one, other)) < 1e-3
    assert not same(one, repair(student, teacher, pairs, batch=64))
    for before, after in zip(far(student, teacher), far(one, teacher), strict=True):
        assert after < before


def test_a_killed_repair_goes_on_at_its_map(teacher, student, pairs, tmp_path, monkeypatch):
    from mope_clip.pruners.streams import TowerRepair

    whole, solve_map, calls = repair(student, teacher, pairs), TowerRepair.replace, []

    def counted(self, *rows):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return solve_map(self, *rows)

    monkeypatch.setattr(TowerRepair, 'replace', counted)
    with pytest.raises(KeyboardInterrupt):
        repair(student, teacher, pairs, folder=tmp_path)
    calls[:] = [1] * 10
    again = repair(student, teacher, pairs, folder=tmp_path)
    maps = sum(len(r) - 1 for r in whole.spec.provenance['repair']['towers'].values())
    assert same(again, whole) and len(calls) - 10 == maps - 3
    assert again.spec.provenance['repair']['towers'] == whole.spec.provenance['repair']['towers']


def test_a_damaged_file_is_solved_again(teacher, student, pairs, tmp_path):
    whole = repair(student, teacher, pairs, folder=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert same(repair(student, teacher, pairs, folder=tmp_path), whole)


def test_half_precision_keeps_its_type(teacher, student, pairs):
    for dtype in (torch.bfloat16, torch.float16):
        big, small = teacher.copy(), student.copy()
        big.model.to(dtype), small.model.to(dtype)
        mended = repair(small, big, pairs)
        assert mended.dtype == dtype
        for before, after in zip(far(small, big), far(mended, big), strict=True):
            assert after < before


def test_it_is_saved_and_loaded_bit_for_bit(teacher, student, pairs, tmp_path):
    mended = repair(student, teacher, pairs, **ONES)
    mended.save(tmp_path / 'mended')
    save_spec(mended.spec, tmp_path / 'spec.json')
    back = load_clip(str(tmp_path / 'mended'), device='cpu')
    assert same(back, mended)
    assert back.spec.provenance['repair']['items'] == dict(vision=40, text=80)
    assert json.loads((tmp_path / 'spec.json').read_text(encoding='utf-8'))


WORKER = """
import sys
from mope_clip.clip import prune, read_spec, tiny_clip
from mope_clip.data import synth_pairs
from mope_clip.data.parallel import processes
from mope_clip.pruners import repair
teacher = tiny_clip()
student = prune(teacher, read_spec(sys.argv[1]))
mended = repair(student, teacher, synth_pairs(60, 'train'))
assert mended.spec.provenance['repair']['processes'] == 2
if processes(teacher.device).main:
    mended.save(sys.argv[2])
"""


def test_two_processes_share_the_sums(teacher, student, pairs, tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER, encoding='utf-8')
    save_spec(student.spec, tmp_path / 'spec.json')
    words = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    words += [str(tmp_path / name) for name in ('worker.py', 'spec.json', 'mended')]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (tmp_path / 'mended').is_dir(), done.stderr[-2000:]
    both = load_clip(str(tmp_path / 'mended'), device='cpu')
    assert max(far(both, repair(student, teacher, pairs))) < 1e-4


def test_options_of_the_ablation_do_what_they_say(teacher, student, pairs):
    made = {
        name: repair(student, teacher, pairs, **how)
        for name, how in dict(
            all={},
            projection=dict(projection=False),
            pooled=dict(pooled_only=True),
            branch=dict(aim='branch'),
            local=dict(aim='block by block'),
        ).items()
    }
    assert len({weights_hash(clip) for clip in made.values()}) == 5
    kept = {name: clip.text.final_map() for name, clip in made.items()}
    whole = student.text.final_map()
    assert torch.equal(kept['projection'], whole) and not torch.equal(kept['all'], whole)


def test_what_it_did_is_drawn(teacher, student, pairs):
    fig = draw_repair(repair(student, teacher, pairs, **ONES))
    assert [ax.get_title() for ax in fig.axes] == list(TOWERS)
    with pytest.raises(ValueError, match='was not repaired'):
        draw_repair(student)


# --- what cannot be repaired


def test_what_is_wrong_is_one_sentence(teacher, student, pairs):
    other = tiny_clip()
    with torch.no_grad():
        next(other.model.parameters()).fill_(float('nan'))
    shallow = whole_spec(teacher)
    del shallow.text[1]
    half = teacher.copy()
    half.model.half()
    mute = synth_pairs(20, 'train').map(lambda row: {'captions': []})
    wrong = {
        'are the test split': (student, teacher, synth_pairs(20, 'test')),
        'are the test split,': (student, teacher, synth_pairs(20, 'final')),
        'at least 10 images': (student, teacher, synth_pairs(8, 'train')),
        'have no caption': (student, teacher, mute),
        'needs image-text pairs': (student, teacher, [1, 2, 3]),
        'NaN or infinite': (student, other, pairs),
        'lacks layers that the student has': (student, prune(teacher, shallow), pairs),
        'not of the same base': (student, other_base(), pairs),
        'bring both to one type': (student, half, pairs),
    }
    for said, given_wrong in wrong.items():
        with pytest.raises(ValueError, match=said):
            repair(*given_wrong)
    for setting in (dict(aim='nowhere'), dict(images=0), dict(held_out=1), dict(captions=-1)):
        with pytest.raises(ValueError, match=next(iter(setting))):
            repair(student, teacher, pairs, **setting)


def other_base():
    with in_small():
        return small_clip('MobileCLIP-B')


def test_pairs_of_unknown_split_are_taken_with_a_note(teacher, student):
    lines, unknown = [], synth_pairs(40, 'train').select(range(40))
    if getattr(unknown, 'split', None) is not None:
        unknown._split = None
    repair(student, teacher, unknown, log=lines.append)
    assert any('split of these pairs is not known' in line for line in lines)


# --- search


@pytest.fixture(scope='module')
def scores(teacher, pairs):
    return mope(teacher, pairs, groups=4, z='soft_recall', log=None)


QUICK = dict(evaluations=12, fitted=20, judged=20, log=None)


@pytest.mark.parametrize(
    'budget', [dict(macs=0.5), dict(params=0.5), dict(macs=900_000), dict(latency=0.7)]
)
def test_no_search_goes_beyond_its_budget(teacher, scores, pairs, budget):
    spec = search(teacher, scores, pairs, **budget, **QUICK)
    small, ((kind, size),) = prune(teacher, spec), budget.items()
    if kind != 'latency':
        limit = size * cost(teacher)[kind] if size <= 1 else size
        # the scale of the logits is nobody's
        assert cost(small)[kind] <= limit + 1
    assert spec.provenance['search']['budget'] == budget
    assert spec.provenance['search']['share'] <= 1


def test_prices_are_costs(teacher, scores):
    orders, rng = Orders(teacher, scores), np.random.default_rng(0)
    for kind in ('macs', 'params'):
        prices = prices_of(orders, kind, embeddings=True)
        for _ in range(10):
            levels = {place: int(rng.integers(1, n + 1)) for place, n in orders.full.items()}
            levels['text', 1, 'head'] = levels['text', 1, 'ffn'] = 0
            small = prune(teacher, orders.spec(levels))
            whole = sum(cost(teacher)[f'{tower}_{kind}'] for tower in TOWERS)
            ours = sum(cost(small)[f'{tower}_{kind}'] for tower in TOWERS)
            assert prices.of(levels) == pytest.approx(ours / whole, abs=1e-9)


def test_steps_stay_within_the_budget_and_move_everything(teacher, scores):
    import random

    orders = Orders(teacher, scores)
    prices, rng = prices_of(orders, 'macs', embeddings=True), random.Random(0)
    levels = {place: n // 2 for place, n in orders.full.items()}
    budget, seen = prices.of(levels), set()
    moves = Moves(orders, prices, budget, depth=0.1)
    for _ in range(200):
        levels = moves.step(levels, rng)
        assert prices.of(levels) <= budget + 1e-9
        assert all(any(levels[t, k, m] for (u, k, m) in levels if u == t) for t in TOWERS)
        seen |= {(place, n) for place, n in levels.items()}
    assert len({place for place, n in seen if n == 0}) > 5
    assert len(seen) > 2 * len(levels)


def test_the_same_seed_finds_the_same_and_another_does_not(teacher, scores, pairs):
    one, again, other = (
        search(teacher, scores, pairs, macs=0.5, seed=seed, **QUICK) for seed in (0, 0, 1)
    )
    assert one == again
    assert (one.vision, one.text) != (other.vision, other.text)


def test_a_search_that_went_on_equals_one_that_was_not_stopped(
    teacher, scores, pairs, tmp_path, monkeypatch
):
    from mope_clip.pruners.candidates import Judge

    whole = search(teacher, scores, pairs, macs=0.5, **QUICK)
    evaluate, calls = Judge.evaluate, []

    def killed(self, levels):
        calls.append(1)
        if len(calls) == 11:
            raise RuntimeError('killed')
        return evaluate(self, levels)

    monkeypatch.setattr(Judge, 'evaluate', killed)
    with pytest.raises(RuntimeError):
        search(teacher, scores, pairs, macs=0.5, folder=tmp_path, **QUICK)
    again = search(teacher, scores, pairs, macs=0.5, folder=tmp_path, **QUICK)
    assert (again.vision, again.text) == (whole.vision, whole.text)
    assert again.provenance['search']['evaluations'] == 12


def test_a_search_that_is_interrupted_takes_the_best_so_far(teacher, scores, pairs, monkeypatch):
    from mope_clip.pruners.search import SearchRun

    one_step, lines = SearchRun.one_step, []

    def stopped(self):
        if self.at.evaluations == 5:
            raise KeyboardInterrupt
        one_step(self)

    monkeypatch.setattr(SearchRun, 'one_step', stopped)
    quick = dict(QUICK, log=lines.append)
    spec = search(teacher, scores, pairs, macs=0.5, **quick)
    assert spec.provenance['search']['evaluations'] == 5
    assert any('the best so far is taken' in line for line in lines)


def test_a_walk_finds_what_no_rank_can():
    "A planted task: of two heads that say the same one must stay, and each alone costs nothing"
    import random

    from mope_clip.pruners.search import SearchRun, Walk

    clip = tiny_clip()
    scores = random_scores(clip, groups=4)
    twins = [('vision', 1, 0), ('vision', 1, 1)]
    value = dict.fromkeys(
        [(r.tower, r.layer, r.index) for r in scores.itertuples() if r.module == 'head'], 1.0
    )
    value.update(dict.fromkeys(twins, 0.0))  # what a ranking sees of them
    heads = scores.module == 'head'
    scores.loc[heads, 'score'] = [
        value[r.tower, r.layer, r.index] for r in scores[heads].itertuples()
    ]
    orders = Orders(clip, scores)
    prices = prices_of(orders, 'macs', embeddings=True)

    class Task:
        "Heads are worth a point each, and one of the twins is worth ten"

        def __init__(self):
            self.orders, self.states = orders, {}

        def evaluate(self, levels):
            kept = {
                (tower, layer, head)
                for tower, layer, module in levels
                if module == 'head'
                for head in orders.kept(levels, tower, layer)['heads']
            }
            worth = sum(value[head] for head in kept) + 10 * bool(kept & set(twins))
            return worth + 0.01 * sum(levels.values()), {}

    start = {place: max(1, n // 4) for place, n in orders.full.items()}
    assert prices.of(start) < 0.45 and orders.kept(start, 'vision', 1)['heads'] == [2]
    moves = Moves(orders, prices, 0.45)
    run = SearchRun(Task(), moves, random.Random(0), SearchSettings(300), print)
    run.at = Walk(start, Task().evaluate(start)[0])
    run.walk()
    left = set(orders.kept(run.at.levels, 'vision', 1)['heads'])
    assert left & {0, 1}


@pytest.mark.parametrize('budget', [dict(macs=0.5), dict(params=0.6), dict(latency=0.9)])
def test_a_servable_search_leaves_all_heads_and_even_layers(teacher, scores, pairs, budget):
    spec = search(teacher, scores, pairs, servable=True, **budget, **QUICK)
    small = prune(teacher, spec)
    for tower, sizes in shape_of(small).items():
        assert len({tuple(size) for size in sizes}) == 1
        assert sizes[0][0] == shape_of(teacher)[tower][0][0] and sizes[0][1] > 0
    assert spec.provenance['search']['servable']
    assert spec.provenance['search']['share'] <= 1.01 * next(iter(budget.values()))


def test_what_a_server_has_no_place_for_starts_no_servable_search(teacher, pairs):
    headless = whole_spec(teacher)
    headless.text[1]['heads'] = [0]
    small = prune(teacher, headless)
    scores = random_scores(small, groups=4)
    with pytest.raises(ValueError, match='has lost heads'):
        search(small, scores, pairs, macs=0.5, servable=True, log=None)


def test_what_cannot_be_searched_is_one_sentence(teacher, scores, pairs, student):
    none = scores[scores.module != 'head']
    none.attrs.update(scores.attrs)
    bare = scores.copy()
    bare.attrs.clear()
    wrong = [
        ('exactly one budget', (teacher, scores, pairs), {}),
        ('exactly one budget', (teacher, scores, pairs), dict(macs=0.5, params=0.5)),
        ('must be above 0', (teacher, scores, pairs), dict(macs=0)),
        ('must be above 0', (teacher, scores, pairs), dict(macs=True)),
        ('must be above 0', (teacher, scores, pairs), dict(params=float('nan'))),
        ('The smallest model has', (teacher, scores, pairs), dict(macs=0.01)),
        ('count without embeddings', (teacher, scores, pairs), dict(params=0.02)),
        ('of a model with other weights', (student, scores, pairs), dict(macs=0.5)),
        ('does not say what it scores', (teacher, bare, pairs), dict(macs=0.5)),
        ('lacks heads or groups', (teacher, none, pairs), dict(macs=0.5)),
        ('test split', (teacher, scores, synth_pairs(30, 'test')), dict(macs=0.5)),
        (
            'test split',
            (teacher, scores, pairs),
            dict(macs=0.5, calibration=synth_pairs(30, 'test')),
        ),
        ('at least 20 images', (teacher, scores, synth_pairs(8, 'validation')), dict(macs=0.5)),
    ]
    for said, words, options in wrong:
        with pytest.raises(ValueError, match=said):
            search(*words, **options, log=None)


def test_a_table_without_layers_empties_none_and_says_so(teacher, pairs):
    lines = []
    scores = mope(teacher, pairs, groups=4, modules=('head', 'ffn'), z='soft_recall', log=None)
    spec = search(teacher, scores, pairs, macs=0.5, **dict(QUICK, log=lines.append))
    assert sum('no layers, so no layer is emptied' in line for line in lines) == 1
    assert [len(layers) for layers in shape_of(prune(teacher, spec)).values()] == [3, 2]


def test_a_search_starts_no_worse_than_the_best_plan_by_ranks(teacher, scores, pairs):
    spec = search(teacher, scores, pairs, macs=0.5, **QUICK)
    found = spec.provenance['search']
    assert found['fitness'] >= max(found['starts'].values())
    assert [z for _, z in found['history']] == sorted(z for _, z in found['history'])
    assert plan(scores, teacher, macs=0.5, log=None).base == spec.base


def test_a_student_with_fewer_words_is_refused(teacher, student, pairs):
    from mope_clip.pruners import trim_vocabulary

    fewer = trim_vocabulary(student, ['a red square'])
    with pytest.raises(ValueError, match='repair first, then trim'):
        repair(fewer, teacher, pairs)


def test_captions_that_are_one_string_are_captions(teacher, student, pairs):
    one = pairs.map(lambda row: {'only': row['captions'][0]}, remove_columns='captions')
    one = one.rename_column('only', 'captions')
    lists = pairs.map(lambda row: {'captions': row['captions'][:1]})
    made = [repair(student, teacher, given, captions=1) for given in (one, lists)]
    assert same(*made)


def test_sums_that_are_not_finite_end_in_a_sentence(teacher, student, pairs):
    "Half precision overflows in a hidden layer; every weight is finite"
    big, small = teacher.copy(), student.copy()
    for clip in (big, small):
        clip.model.half()
        with torch.no_grad():
            for part in clip.vision.blocks[0].neuron_weights():
                if part.side == 'in':
                    part.parameter.fill_(60_000.0)
    with pytest.raises(ValueError, match='Activations are NaN or infinite'):
        repair(small, big, pairs)


def test_a_search_refuses_what_are_no_pairs(teacher, scores, pairs):
    with pytest.raises(ValueError, match='Search needs image-text pairs'):
        search(teacher, scores, [1, 2], macs=0.5, log=None)
    with pytest.raises(ValueError, match='Search needs image-text pairs'):
        search(teacher, scores, pairs, macs=0.5, calibration=[3], log=None)
