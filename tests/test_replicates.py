"Several draws over the same held-out images, several teachers, and one interval for all luck."

import json

import numpy as np
import pytest


@pytest.fixture(scope='module')
def tiny():
    from mope_clip.clip import tiny_clip

    return tiny_clip()


def bench_of(tiny, folder, **changes):
    from mope_clip.report.bench import say_nothing
    from mope_clip.report.comparison import Comparison
    from mope_clip.report.roads import Bench

    few = dict(images_scored=6, images_evaluated=8, pairs=8, groups=2, batch=4, images_repaired=10)
    return Bench(Comparison(**{**few, **changes}), tiny, folder, say_nothing)


# ---------------------------------------------------------------- draws


def test_draws_are_disjoint_and_share_what_is_held_out(tiny, tmp_path):
    first = bench_of(tiny, tmp_path, draw=0, draws=2, images_chosen=10)
    second = first.other(draw=1)
    ids = [int(i.split('/')[-1]) for b in (first, second) for i in b.scored['image_id']]
    assert ids == list(range(1010, 1022))
    for b in (first, second):
        assert b.held_out['image_id'] == [f'openmoji/validation/{i}' for i in range(1000, 1010)]
    assert second.validation is first.validation, 'one set in memory for all draws'
    fewer = first.other(images_chosen=4)
    assert fewer.held_out['image_id'] == first.held_out['image_id'][:4]


def test_a_draw_beyond_the_images_there_are_is_refused(tiny, tmp_path):
    from mope_clip.data import synth_pairs

    bench = bench_of(tiny, tmp_path, draw=1, draws=2, images_chosen=10)
    bench.__dict__['validation'] = synth_pairs(20)
    with pytest.raises(ValueError, match='Draw 2 needs 1,022 validation images, and there are 20'):
        bench.scored  # noqa: B018


# ---------------------------------------------------------------- plans


def test_the_best_plan_by_ranks_is_chosen_on_held_out_images(tiny, tmp_path):
    from mope_clip.evaluate import cost

    bench = bench_of(tiny, tmp_path)
    table, macs = bench.scores(tiny, groups=2), cost(tiny)['macs']
    best = bench.best_by_ranks(table, dict(macs=0.6))
    assert cost(best.repaired)['macs'] <= 0.6 * macs
    each = bench.contributions(best.repaired, split='validation')['mean_recall']
    assert best.z == each.mean()
    only = bench.best_by_ranks(table, dict(macs=0.6), depths=(0.5,), ranks=('layer',))
    assert only.name == 'layer, 50% of the depth' and only.z <= best.z
    with pytest.raises(ValueError, match='No plan by ranks is within'):
        bench.best_by_ranks(table, dict(macs=0.001))


def test_a_walk_is_kept(tiny, tmp_path, monkeypatch):
    from mope_clip.report import bench as room

    bench = bench_of(tiny, tmp_path, images_scored=12)
    table = bench.scores(tiny, groups=2)
    found = bench.searched(table, dict(macs=0.6), evaluations=3)
    assert found.provenance['search']['seconds'] > 0
    monkeypatch.setattr(room, 'search', None)
    assert bench.searched(table, dict(macs=0.6), evaluations=3) == found
    with pytest.raises(TypeError):
        bench.searched(table, dict(macs=0.6), evaluations=4)


def test_a_walk_that_was_stopped_is_not_kept_and_goes_on(tiny, tmp_path, monkeypatch):
    from mope_clip.pruners.search import SearchRun

    bench, steps = bench_of(tiny, tmp_path / 'stopped', images_scored=12), []
    table = bench.scores(tiny, groups=2)
    whole = bench_of(tiny, tmp_path / 'whole', images_scored=12)
    whole = whole.searched(table, dict(macs=0.6), evaluations=60)
    one_look = SearchRun.one_look

    def stopped(self):
        steps.append(1)
        if len(steps) == 15:
            raise KeyboardInterrupt
        one_look(self)

    monkeypatch.setattr(SearchRun, 'one_look', stopped)
    with pytest.raises(KeyboardInterrupt, match='ask again and it goes on'):
        bench.searched(table, dict(macs=0.6), evaluations=60)
    found = bench.searched(table, dict(macs=0.6), evaluations=60)
    assert found.provenance['search']['evaluations'] == 60
    assert (found.vision, found.text) == (whole.vision, whole.text), 'as if never stopped'


# ---------------------------------------------------------------- from scratch, by courses


def test_the_courses_are_those_of_the_teacher():
    from mope_clip.report.bench import COURSES
    from mope_clip.report.templates import Template

    parameters = Template('10_teacher').parameters
    pairs = {name: parameters[f'pairs_{name}'].default for name in COURSES}
    for name, course in COURSES.items():
        assert course['share'] == pytest.approx(pairs[name] / sum(pairs.values()), abs=1e-3)
    code = '\n'.join(Template('10_teacher').code)
    for name, course in COURSES.items():
        said = code.split(f"    '{name}',\n")[1].split('\n)')[0]
        for key in ('batch', 'warmup'):
            assert f'{key}={course[key]},' in said, (name, key)
        assert f'lr={course["lr"]:g},'.replace('0.002', '2e-3').replace('0.001', '1e-3') in said


def test_a_model_is_taught_once(tiny, tmp_path):
    from mope_clip.clip import weights_hash
    from mope_clip.report.roads import from_scratch

    bench = bench_of(tiny, tmp_path, stage='pretrain', task='openmoji-corpus')
    new = from_scratch(tiny, seed=3)
    before = weights_hash(new)
    taught = bench.taught(new, 80, seed=3)
    assert weights_hash(new) == before != weights_hash(taught)
    assert weights_hash(bench.taught(new, 80, seed=3)) == weights_hash(taught)
    assert len(list((tmp_path / 'taught').glob('*.code.json'))) == 1


# ---------------------------------------------------------------- teachers


def test_another_teacher_is_made_once_and_kept(tiny, tmp_path, monkeypatch, capsys):
    from mope_clip.clip import save_open_clip
    from mope_clip.report import replicates

    calls = []

    def run_notebook(name, out, parameters):
        calls.append((name, parameters['seed']))
        home = replicates.teacher_home(parameters['seed'])
        assert parameters['data_out'] == str(home)
        save_open_clip(tiny, home / 'teacher-openmoji')
        (home / 'teachers.json').write_text(json.dumps({}), encoding='utf-8')

    monkeypatch.setenv('MOPE_CLIP_CACHE', str(tmp_path))
    monkeypatch.setattr(replicates, 'run_notebook', run_notebook)
    for _ in range(2):
        found = replicates.seeded_teacher(2, 'openmoji')
        said = tiny.tokenizer(['a red square'])
        assert found.encode_text(said).allclose(
            tiny.encode_text(said), atol=1e-2
        )  # kept in half precision
    assert calls == [('10_teacher', 2)]
    assert 'seed 2 are made now' in capsys.readouterr().out


def test_teachers_that_other_parameters_made_are_refused(tmp_path, monkeypatch):
    from mope_clip.report import replicates
    from mope_clip.report.templates import Template

    monkeypatch.setenv('MOPE_CLIP_CACHE', str(tmp_path))
    home = replicates.teacher_home(2)
    home.mkdir(parents=True)
    defaults = {name: p.default for name, p in Template('10_teacher').parameters.items()}
    made = dict(defaults, seed=2)
    del made['images_evaluated'], made['out_dir'], made['data_out'], made['retrain']
    for width, seed in ((made['width'], 2), (64, 2), (made['width'], 1)):
        record = dict(parameters=dict(made, width=width, seed=seed))
        (home / 'teachers.json').write_text(json.dumps(record), encoding='utf-8')
        if (width, seed) == (made['width'], 2):
            replicates.check_teachers(home, 2)
            continue
        with pytest.raises(ValueError, match=r'made with .*: delete that folder'):
            replicates.seeded_teacher(2, 'openmoji')


def test_other_teachers_of_other_tasks_are_refused_before_an_hour_is_spent(monkeypatch):
    from mope_clip.report import replicates

    monkeypatch.setattr(replicates, 'run_notebook', lambda *args: pytest.fail('trained'))
    with pytest.raises(ValueError, match='made for openmoji alone'):
        replicates.seeded_teacher(1, 'openmoji-street')


# ---------------------------------------------------------------- rates


@pytest.mark.parametrize(
    'rates, best, tried',
    [
        ([1, 2, 4], 2, [1, 2, 4]),
        ([1, 2, 4], 9, [1, 2, 4, 8, 16]),
        ([1, 2, 4], 0.8, [1, 2, 4, 0.5]),
        ([1, 2, 4], 0, [1, 2, 4, 0.5, 0.25]),
        ([1], 9, [1]),
    ],
)
def test_a_grid_grows_where_its_end_is_best(rates, best, tried):
    from mope_clip.report.replicates import over_rates

    rows = over_rates(lambda rate: dict(rate=rate, r1=-abs(rate - best)), rates)
    assert [row['rate'] for row in rows] == tried


@pytest.mark.parametrize('name', ['56_without_training', '70_verdict', '72_how_long'])
def test_at_paper_scale_coco_has_enough_validation_images(name):
    from mope_clip.report.comparison import FIRST_CHOSEN
    from mope_clip.report.templates import Template

    template = Template(name)
    given = {key: p.default for key, p in template.parameters.items()} | template.scale('paper')
    draws = given.get('draws', 1) * given.get('teachers', 1)
    needed = FIRST_CHOSEN + given['images_chosen'] + draws * given['images_scored']
    assert max(needed, 2 * given['images_scored'] * (draws == 1)) <= 5000


@pytest.mark.parametrize(
    'name, changed, said',
    [
        (
            '70_verdict',
            dict(sizes=['half width, 3/4 depth']),
            "must be one of 'half width', 'third",
        ),
        ('70_verdict', dict(depth_rivals=['fisher, across layers']), 'Parameter depth_rivals'),
        ('70_verdict', dict(depths=[]), 'length of depths is 0'),
        ('70_verdict', dict(macs=1.5), 'macs is 1.5, but must be between 0 and 1'),
        ('71_pretraining_verdict', dict(size='quarter of the parameters'), 'Parameter size is'),
    ],
)
def test_what_a_verdict_cannot_do_is_refused_at_once(name, changed, said, tmp_path):
    from mope_clip.report.code import recorder_on
    from mope_clip.report.templates import Template

    template = Template(name)
    known, cells = template.parameters, template.code
    given = {key: p.default for key, p in known.items()} | template.scale('smoke') | changed
    given |= dict(out_dir=str(tmp_path / 'run'), models=str(tmp_path / 'models'))
    space = {**given, '__annotations__': {key: p.kind for key, p in known.items()}}
    space['_ih'] = [template.parameters_cell]
    first = cells.index(template.parameters_cell) + 1
    try:
        with pytest.raises(ValueError, match=said):
            for cell in cells[first : first + 3]:  # the last of them checks
                exec(cell, space)
    finally:
        if recorder_on():
            recorder_on().stop()


# ---------------------------------------------------------------- replicates


def test_recalls_are_those_of_every_metric_by_itself(tiny, tmp_path):
    bench = bench_of(tiny, tmp_path)
    quick, slow = bench.recalls(tiny), bench.contributions(tiny)
    assert quick['R@1'] == pytest.approx((slow['TR@1'] + slow['IR@1']) / 2)
    assert quick['mean recall'] == pytest.approx(slow['mean_recall'])


def test_a_replicate_learns_from_scenes_of_its_own(tiny, tmp_path, monkeypatch):
    from mope_clip.report.roads import Bench

    seen = []
    recover = Bench.recover

    def noted(self, clip, pairs, seed, **more):
        seen.append(more['seen'])
        return recover(self, clip, pairs, seed, **more)

    monkeypatch.setattr(Bench, 'recover', noted)
    bench = bench_of(tiny, tmp_path, first_pair=1000)
    bench.compress('random', 'half width, 3/4 depth')
    assert seen == [1000, 1008]


def test_a_fresh_model_has_a_scale_of_its_own(tiny):
    import torch

    from mope_clip.report.roads import from_scratch

    taught = tiny.copy()
    with torch.no_grad():
        taught.model.logit_scale.fill_(3.5)
    assert from_scratch(taught).model.logit_scale == tiny.model.logit_scale
    assert from_scratch(taught, ('text',)).model.logit_scale == 3.5


def test_no_teacher_began_with_the_weights_of_a_model_from_scratch(tiny, tmp_path, monkeypatch):
    from mope_clip.report import roads

    bench, from_scratch, seeds = bench_of(tiny, tmp_path), roads.from_scratch, []

    def noted(clip, towers, seed):
        seeds.append(seed)
        return from_scratch(clip, towers, seed)

    def recover(clip, pairs_seen, seed, **more):
        seeds.append(seed)
        return type(bench).recover(bench, clip, pairs_seen, seed, **more)

    monkeypatch.setattr(roads, 'from_scratch', noted)
    monkeypatch.setattr(bench, 'recover', recover)
    bench.compress('scratch', 'half width', seed=3, times_scratch=1)
    assert seeds == [1003, 1003]


# ---------------------------------------------------------------- one interval


def test_images_alone_give_the_usual_interval():
    from mope_clip.report.replicates import replicated

    each = np.random.default_rng(0).normal(1, 5, 400)
    found = replicated(np.stack([[each] * 2] * 3))  # three teachers and two draws, all the same
    error = each.std(ddof=1) / 20
    assert found.found.value == pytest.approx(each.mean())
    assert found.found.high - found.found.value == pytest.approx(1.966 * error, rel=1e-3)
    assert (found.teachers, found.draws) == pytest.approx((0, 0), abs=1e-9)
    assert found.freedom == pytest.approx(399)


def test_teachers_alone_give_that_of_student():
    from scipy.stats import ttest_1samp

    from mope_clip.report.replicates import replicated

    means = np.array([0.5, 1.0, 2.1])
    found = replicated(np.broadcast_to(means[:, None, None], (3, 2, 50)))
    low, high = ttest_1samp(means, 0).confidence_interval()
    assert found.found == pytest.approx((1.2, low, high))
    assert found.images == pytest.approx(0, abs=1e-9)
    assert found.teachers == pytest.approx(means.std(ddof=1)) and found.freedom == pytest.approx(2)


def test_with_one_teacher_the_draws_decide():
    from scipy.stats import ttest_1samp

    from mope_clip.report.replicates import replicated

    draws = np.array([0.5, 1.0, 2.1, 0.2])
    found = replicated(np.broadcast_to(draws[None, :, None], (1, 4, 50)))
    low, high = ttest_1samp(draws, 0).confidence_interval()
    assert found.found == pytest.approx((0.95, low, high)) and np.isnan(found.teachers)


def test_teachers_that_agree_by_chance_do_not_hide_the_draws():
    from scipy.stats import t

    from mope_clip.report.replicates import replicated

    draws = np.array([[-1.0, 0.0, 1.0], [1.0, 0.0, -1.0]])  # both means are 0
    found = replicated(np.broadcast_to(draws[:, :, None], (2, 3, 50)))
    assert found.teachers == 0 and found.freedom == pytest.approx(4)
    assert found.found.high == pytest.approx(t.ppf(0.975, 4) * (1 / 6) ** 0.5)


def test_a_model_that_diverges_learns_again_at_a_lower_rate():
    from mope_clip.report.replicates import surviving

    asked, said = [], []

    def make(rate):
        asked.append(rate)
        if rate > 0.25:
            raise FloatingPointError('no number')
        return 'learned'

    assert surviving(make, 1.0, said.append) == 'learned' and asked == [1, 0.5, 0.25]
    assert len(said) == 2 and said[1].endswith('0.25 is tried.')
    with pytest.raises(FloatingPointError):
        surviving(make, 2.0, said.append)


def test_nothing_differs_where_nothing_does():
    from mope_clip.report.replicates import replicated

    assert replicated(np.zeros((3, 5, 10))).found == (0, 0, 0)


# ---------------------------------------------------------------- what a teacher has said


def taught_by(tiny, student, pairs, **settings):
    from mope_clip.clip import weights_hash
    from mope_clip.distill import distill

    made = distill(student, tiny, pairs, pairs_seen=12, batch=4, log=lambda _: None, **settings)
    return weights_hash(made.clip)


def half_of(tiny):
    from mope_clip.clip import prune
    from mope_clip.metrics import score_by
    from mope_clip.pruners import plan_width

    return prune(tiny, plan_width(score_by('magnitude', tiny, None, 0, groups=2), 0.5))


@pytest.mark.parametrize('weights', ['three', 'published'])  # without hidden states, and with
def test_a_remembered_teacher_teaches_the_same_bit_for_bit(tiny, monkeypatch, weights):
    from mope_clip.data import synth_pairs
    from mope_clip.distill.forward import Teacher
    from mope_clip.distill.losses import named_weights
    from mope_clip.report.replicates import remembered

    pairs, student = synth_pairs(12), half_of(tiny)
    settings = dict(weights=named_weights(weights, False))
    usual = taught_by(tiny, student, pairs, **settings)
    asked, ask = [], Teacher.__call__

    def count(self, *args, **options):
        asked.append(1)
        return ask(self, *args, **options)

    monkeypatch.setattr(Teacher, '__call__', count)
    with remembered():
        assert taught_by(tiny, student, pairs, **settings) == usual
        assert taught_by(tiny, student, pairs, **settings) == usual
        assert len(asked) == 3, 'three batches, each asked once for both recoveries'
        taught_by(tiny, student, pairs, seed=1, **settings)
        assert len(asked) == 6, 'another order is another batch'
    assert Teacher.__call__ is count, 'outside all is as it was'


def test_a_full_memory_keeps_what_it_has(tiny):
    import torch

    from mope_clip.distill.forward import Teacher
    from mope_clip.report.replicates import remembered

    ids, images = torch.tensor([[1, 2]]), torch.zeros(1, 3, 32, 32)
    with remembered(room=0):
        first, again = (Teacher(tiny)(images, ids) for _ in range(2))
    assert first['dist_image_features'] is not again['dist_image_features']


def test_who_is_told_again_depends_on_the_teacher_too(tiny):
    import torch

    from mope_clip.distill.forward import Teacher
    from mope_clip.report.code import Recorder
    from mope_clip.report.replicates import remembered

    ids, images = torch.tensor([[1, 2]]), torch.zeros(1, 3, 32, 32)
    with remembered():
        Teacher(tiny)(images, ids)
        with Recorder() as recorder:
            Teacher(tiny)(images, ids)
    assert 'mope_clip.distill.forward.Teacher.__call__' in recorder.functions()


def test_another_question_is_answered_anew(tiny):
    import torch

    from mope_clip.distill.forward import Teacher
    from mope_clip.report.replicates import remembered

    ids, images = torch.tensor([[1, 2]]), torch.zeros(1, 3, 32, 32)
    with remembered():
        first = Teacher(tiny)(images, ids)['dist_image_features']
        others = [
            Teacher(tiny)(images + 1, ids),
            Teacher(tiny)(images, ids + 1),
            Teacher(tiny)(images, ids, hidden=True),
            Teacher(tiny.copy())(images, ids),
        ]
        assert Teacher(tiny)(images, ids)['dist_image_features'] is first
    assert all(answer['dist_image_features'] is not first for answer in others)
