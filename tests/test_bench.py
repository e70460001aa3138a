"The models of a comparison: made once, kept, found again, and made anew when their code changes."

import json
from pathlib import Path

import numpy as np
import pytest

FEW = dict(images_scored=6, images_evaluated=8, pairs=8, groups=2, batch=4)


@pytest.fixture(scope='module')
def tiny():
    from mope_clip.clip import tiny_clip

    return tiny_clip()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('bench')


def bench_of(tiny, folder, **changes):
    from mope_clip.report.bench import say_nothing
    from mope_clip.report.comparison import Comparison
    from mope_clip.report.roads import Bench

    return Bench(Comparison(**{**FEW, **changes}), tiny, folder, say_nothing)


@pytest.fixture(scope='module')
def bench(tiny, folder):
    return bench_of(tiny, folder)


@pytest.fixture(scope='module')
def half(tiny, bench):
    from mope_clip.clip import prune
    from mope_clip.pruners import plan_width

    return prune(tiny, plan_width(bench.scores(tiny, 'mope', groups=2), 0.5))


def kept(bench, kind, ending):
    return len(list((bench.kept.folder / kind).glob(f'*{ending}')))


def test_validation_pairs_come_in_two_halves(bench):
    assert [len(bench.scored), len(bench.held_out)] == [6, 6]
    assert not set(bench.scored['image_id']) & set(bench.held_out['image_id'])
    assert {str(x.split) for x in (bench.scored, bench.held_out)} == {'validation'}
    assert bench.tested('openmoji', 'validation')['image_id'] == bench.held_out['image_id']


def test_a_second_recovery_begins_behind_the_scenes_of_the_first(bench):
    from mope_clip.report.comparison import unseen_scenes

    assert [next(iter(bench.train_pairs(seen)))['image_id'] for seen in (0, 501)] == [
        'openmoji/train/0',
        'openmoji/train/1000',
    ]
    for seen in (0, 1, 499, 500, 501, 5120, 10240):
        assert unseen_scenes('openmoji', seen) == -(-seen // 500) * 500
        assert unseen_scenes('flickr30k', seen) == 0


def test_each_corpus_of_the_pretraining_stage_begins_behind_its_share():
    import math

    from mope_clip.report.comparison import CORPORA, unseen_scenes

    for seen in (0, 1, 1500, 1501, 10240, 20480):
        share = math.ceil(seen / len(CORPORA))
        old = -(-seen // len(CORPORA) // 500) * 500
        assert unseen_scenes('openmoji-corpus', share) == old


def test_a_folder_that_cannot_be_written_is_refused(tiny, tmp_path):
    from mope_clip.report.roads import Bench

    (tmp_path / 'a file').touch()
    with pytest.raises(ValueError, match=r'folder of models .* cannot be written'):
        Bench(teacher=tiny, folder=tmp_path / 'a file' / 'models')


def test_places_differ_by_what_is_made(tiny, bench, folder):
    assert bench.place('x', tiny, 1) == bench_of(tiny, folder).place('x', tiny, 1)
    places = [bench.place('x', tiny, what) for what in (1, 2)]
    places.append(bench_of(tiny, folder, task='openmoji-street').place('x', tiny, 1))
    assert len(set(places)) == 3


def test_a_table_is_kept_and_comes_back_as_it_was(tiny, tmp_path):
    b = bench_of(tiny, tmp_path)
    first, again = (b.scores(tiny, 'mope', groups=2) for _ in range(2))
    assert first.score.tolist() == again.score.tolist()
    assert again.attrs['mope']['z'] == 'mean_recall' and again.attrs['mope']['seconds'] > 0
    b.scores(tiny, 'random', seed=1)
    b.scores(tiny, 'masks', pairs_seen=8, batch=4)
    assert kept(b, 'scores', '.parquet') == 3
    assert not list((tmp_path / 'scores').glob('*.run')), 'what was half done is gone'


def test_what_other_code_made_is_made_anew(tiny, tmp_path):
    b = bench_of(tiny, tmp_path)
    b.scores(tiny, 'random', seed=1)
    (record,) = (tmp_path / 'scores').glob('*.code.json')
    functions = json.loads(record.read_text(encoding='utf-8'))
    assert 'mope_clip.metrics.table.score_by' in functions
    (table,) = (tmp_path / 'scores').glob('*.parquet')
    made = table.stat().st_mtime_ns
    b.scores(tiny, 'random', seed=1)
    assert table.stat().st_mtime_ns == made
    record.write_text(
        json.dumps({**functions, 'mope_clip.metrics.table.score_by': 'other'}), encoding='utf-8'
    )
    b.scores(tiny, 'random', seed=1)
    assert (
        table.stat().st_mtime_ns > made
        and json.loads(record.read_text(encoding='utf-8')) == functions
    )


def test_a_piece_that_was_killed_before_it_was_kept_owes_its_numbers_to_both_attempts(tmp_path):
    from mope_clip.data import synth_pairs
    from mope_clip.data.files import write_atomic
    from mope_clip.report.comparison import Kept

    kept, attempts = Kept(tmp_path), []
    place = kept.place('texts', 'one')

    def make(work):
        if not (work / 'half').is_file():  # the second attempt finds it
            synth_pairs(2)
            write_atomic(work / 'half', lambda file: file.write(b'half'))
        return 'a sentence'

    def save(text, place):
        attempts.append(text)
        if len(attempts) == 1:
            raise SystemExit('killed')
        place.write_text(text, encoding='utf-8')

    with pytest.raises(SystemExit):
        kept.take(place, make, save, Path.read_text)
    assert kept.take(place, make, save, Path.read_text) == 'a sentence'
    assert any(name.endswith('.synth_pairs') for name in kept.code(place))
    assert not list(tmp_path.rglob('*.run'))


def test_what_is_half_replaced_has_no_record(tmp_path):
    from mope_clip.data import synth_pairs
    from mope_clip.report.comparison import Kept

    kept = Kept(tmp_path)
    place = kept.place('texts', 'one')

    def made(save):
        return kept.take(place, lambda work: synth_pairs(2), save, str)

    def killed(pairs, place):
        place.write_text('half', encoding='utf-8')
        raise SystemExit('killed')

    made(lambda pairs, place: place.touch())
    record = place.with_suffix('.code.json')
    other = dict.fromkeys(json.loads(record.read_text(encoding='utf-8')), 'other')
    record.write_text(json.dumps(other), encoding='utf-8')
    with pytest.raises(SystemExit):
        made(killed)
    assert not record.exists()


def test_two_reports_make_a_piece_once_and_a_piece_may_need_another(tmp_path):
    import threading
    import time

    from mope_clip.data import synth_pairs
    from mope_clip.report.comparison import Kept

    calls, took, begun, kept = [], [], threading.Event(), Kept(tmp_path)

    def save(text, place):
        place.write_text(text, encoding='utf-8')

    def inner(work):
        calls.append('inner')
        begun.set()
        time.sleep(0.3)
        return str(len(synth_pairs(2)))

    def outer(work):
        calls.append('outer')
        return kept.take(kept.place('inner', 1), inner, save, Path.read_text)

    def report():
        took.append(kept.take(kept.place('outer', 1), outer, save, Path.read_text))

    threads = [threading.Thread(target=report) for _ in range(2)]
    for thread in threads:
        thread.start()
        assert begun.wait(20)
    for thread in threads:
        thread.join(20)
    assert took == ['2', '2'] and calls == ['outer', 'inner']


def test_a_name_tells_other_pictures_and_sentences_apart():
    from mope_clip.data import synth_pairs
    from mope_clip.report.bench import all_of

    pairs = synth_pairs(6)
    columns = dict(pairs.to_dict(), image=list(pairs['image']))
    images = [*columns['image'][:5], columns['image'][0]]  # only the last one is another
    said = [*columns['captions'][:5], ['another sentence']]
    repainted, retold = (
        pairs.from_dict({**columns, **changed}, features=pairs.features)
        for changed in (dict(image=images), dict(captions=said))
    )
    assert all_of(pairs) == all_of(synth_pairs(6)) == all_of(pairs)
    assert len({all_of(p) for p in (pairs, synth_pairs(5), repainted, retold)}) == 4


def test_what_learns_is_named_by_what_it_learns_from(tiny, tmp_path, monkeypatch):
    from mope_clip.report import bench as room

    b, names = bench_of(tiny, tmp_path), []
    monkeypatch.setattr(b.kept, 'take', lambda place, *how: names.append(place))
    for told in (b.learned_from, ['other pairs']):
        b.loaded[b.task, b.stage, 'learned from'] = told
        monkeypatch.setattr(room, 'told_of', lambda stream, told=told: told)
        b.recover(tiny, 8)
        b.scores(tiny, 'masks')
        b.taught(tiny, 80)
    assert len(set(names)) == 6
    assert b.learned_from == ['other pairs'] != bench_of(tiny, tmp_path).learned_from


def test_who_takes_what_is_kept_owes_its_numbers_to_the_same_code(tiny, tmp_path):
    from mope_clip.report.code import Recorder

    b = bench_of(tiny, tmp_path)
    b.scores(tiny, 'mope', groups=2)
    with Recorder() as recorder:
        b.scores(tiny, 'mope', groups=2)
    assert 'mope_clip.metrics.mope.mope' in recorder.functions()


def test_a_recovery_is_kept_whole(bench, half):
    from mope_clip.clip import weights_hash

    small, same, other = (bench.recover(half, 8, seed=seed) for seed in (1, 1, 2))
    assert weights_hash(small.clip) == weights_hash(same.clip)
    assert len({weights_hash(c) for c in (small.clip, other.clip, half)}) == 3
    assert small.history == same.history and small.clip.spec == half.spec
    assert not list(bench.kept.folder.rglob('*.pt')), 'checkpoints are dropped'


def test_alone_a_model_learns_without_the_teacher(bench, half):
    assert 'feat_loss' not in bench.recover(half, 8, alone=True).history[-1]


def test_the_smallest_size_is_a_share_of_the_parameters(tiny, bench):
    from mope_clip.clip import both, prune
    from mope_clip.pruners import plan, plan_depth, plan_width
    from mope_clip.report.bench import say_nothing, tower_params

    table = bench.scores(tiny, 'mope', groups=2)
    budget = dict(params=0.4, keep_depth=0.5, embeddings=False, log=say_nothing)
    spec = plan(table, tiny, **budget)
    assert tower_params(prune(tiny, spec)) <= 0.4 * tower_params(tiny) < tower_params(tiny)
    wide = plan_width(table, spec.provenance['plan']['share'])
    assert both(wide, plan_depth(table, 0.5)).vision == spec.vision


def test_every_method_takes_the_same_road(tiny, bench):
    from mope_clip.report.bench import tower_params

    deep = bench.compress('mope', 'half width, 3/4 depth')
    wide = bench.compress('mope', 'half width')
    assert (deep.spent['pairs_seen'], wide.spent['pairs_seen']) == (16, 8)
    assert tower_params(deep.clip) <= tower_params(wide.clip) < tower_params(tiny)
    assert [len(c.spec.vision) for c in (tiny, wide.clip, deep.clip)] == [3, 3, 2]
    made = kept(bench, 'models', '.code.json')
    bench.compress('mope', 'half width, 3/4 depth')
    assert kept(bench, 'models', '.code.json') == made, 'nothing is made twice'


def test_who_competes_is_a_parameter_of_mope_alone(tiny, bench):
    from mope_clip.clip import prune
    from mope_clip.pruners import plan_width

    names = 'mope', 'random', 'magnitude', 'magnitude, across layers'
    across = {m: bench.compress(m, 'half width', rank='global').clip.spec for m in names}
    options = dict(groups=2, z='mean_recall', towers=['vision', 'text'])
    table = bench.scores(tiny, 'mope', **options)
    planned = {r: prune(tiny, plan_width(table, 0.5, r)).spec for r in ('layer', 'global')}
    assert across['mope'].vision == planned['global'].vision != planned['layer'].vision
    assert across['magnitude'].vision != across['magnitude, across layers'].vision

    def heads(spec):
        return {len(k['heads']) for k in spec.vision.values()}

    assert heads(across['random']) == heads(planned['layer'])


def test_one_tower_alone_leaves_the_other_as_it_is(tiny, bench):
    eye = bench.compress('random', 'half width', tower='vision').clip
    assert eye.spec.text == tiny.spec.text and eye.spec.vision != tiny.spec.vision


def test_methods_and_sizes_of_another_name_are_refused(bench):
    with pytest.raises(ValueError, match="method is 'mask', but must be one of"):
        bench.compress('mask', 'half width')
    with pytest.raises(ValueError, match="size is 'tiny', but must be one of"):
        bench.compress('mope', 'tiny')


def test_an_encoder_of_ones_own_begins_with_random_weights(tiny, bench):
    from mope_clip.clip import weights_hash
    from mope_clip.report.roads import from_scratch

    new = from_scratch(tiny, ('vision',), 1)
    ids = tiny.tokenizer(['a red square'])
    np.testing.assert_allclose(new.encode_text(ids).detach(), tiny.encode_text(ids).detach())
    assert weights_hash(new) != weights_hash(tiny)
    made = bench.compress('scratch', 'half width', times_scratch=1)
    assert made.spent['pairs_seen'] == 16


def test_the_pretraining_stage_recovers_once(tiny, folder):
    pre = bench_of(tiny, folder, stage='pretrain')
    once = pre.compress('magnitude', 'half width, 3/4 depth')
    assert once.spent['pairs_seen'] == 16


def test_contributions_are_what_recall_and_accuracy_are_means_of(tiny, bench, half):
    from mope_clip.data import suites
    from mope_clip.evaluate import retrieval, zero_shot
    from mope_clip.metrics import HITS

    small = bench.recover(half, 8, seed=1)
    found = bench.contributions(small)
    assert set(found) == set(HITS) and {len(v) for v in found.values()} == {8}
    recall = retrieval(small.clip, bench.tested('openmoji'))['mean_recall']
    assert found['mean_recall'].mean() == pytest.approx(recall, abs=1e-4)
    suite = next(iter(suites()))
    accuracy = zero_shot(small.clip, bench.tested(suite))['top1']
    assert bench.contributions(small, suite)['top1'].mean() == pytest.approx(accuracy, abs=1e-4)


def test_rows_say_what_was_measured_and_what_it_cost(bench):
    from mope_clip.evaluate import retrieval
    from mope_clip.metrics import HITS

    deep = bench.compress('mope', 'half width, 3/4 depth')
    rows = bench.rows(deep, 'mope', 'half width, 3/4 depth')
    measured = {r['metric']: r['value'] for r in rows if r['metric'] in HITS}
    recall = retrieval(deep.clip, bench.tested())['mean_recall']
    assert measured['mean_recall'] == pytest.approx(recall, abs=1e-4)
    costs = {r['metric'] for r in rows} - set(HITS)
    assert costs == {'macs', 'tower_params', *deep.spent}
    assert {r['split'] for r in rows if r['metric'] in HITS} == {'test'}


def test_an_interval_is_paired_over_images_and_seeds():
    from mope_clip.report.comparison import interval

    rng = np.random.default_rng(0)
    hard = rng.normal(50, 20, 400)
    better = [hard + 3 + rng.normal(0, 5, 400) for _ in range(5)]
    value, low, high = paired = interval(better, hard)
    assert 2.5 < low < value < high < 3.5 and paired.low == low
    alone = interval(better)
    assert alone.high - alone.low > 3 * (high - low)  # unpaired it is the images' own spread
    share = interval(better, hard, share=True).value
    assert share == pytest.approx(100 * np.mean(better) / hard.mean())
    assert interval(hard, hard).value == 0


def test_a_report_sets_its_bench_up_by_its_parameters(tiny, toy_repo, monkeypatch):
    from toy import code, write_notebook

    from mope_clip.report import Report

    cell = "task: str = 'openmoji'\nimages_scored: int = 6\nmodels: str = ''\nlr: float = 1e-3"
    write_notebook(toy_repo / 'nbs' / '90_toy.ipynb', code(cell, ['parameters']))
    space = dict(task='openmoji', images_scored=6, models=str(toy_repo / 'm'), lr=0.5)
    kinds = dict(task=str, images_scored=int, models=str, lr=float)
    report = Report({**space, '__annotations__': kinds, '_ih': ['', cell]})
    report.recorder.stop()
    b = report.bench(teacher=tiny, points=5)
    assert (b.shared.images_scored, b.shared.lr, b.shared.points) == (6, 0.5, 5)
    assert b.kept.folder == Path(space['models'])
