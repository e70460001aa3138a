"Runs that are cut off, taken up with another model, or asked for what cannot be: nothing is lost."

import copy

import pytest
import torch

from mope_clip.clip import build_clip, prune, small_config, tiny_clip, weights_hash, whole_spec
from mope_clip.data import load_pairs, stream_pairs, synth_pairs
from mope_clip.data.pairs import load_labelled
from mope_clip.data.streams import InTurn
from mope_clip.distill import distill, learned_masks, teacher_for, train
from mope_clip.distill.checkpoint import run_key
from mope_clip.distill.forward import CachedTeacher
from mope_clip.distill.losses import loss_weights
from mope_clip.distill.recipe import MACHINERY, Recipe, optimizers
from mope_clip.distill.teachers import made_by
from mope_clip.distill.watch import DivergenceCheck
from mope_clip.evaluate import latency, retrieval, spec_cost, zero_shot
from mope_clip.metrics import mope, score_by
from mope_clip.metrics.z import ScoringTask
from mope_clip.pruners import plan, repair, search
from mope_clip.pruners.candidates import Judge
from mope_clip.pruners.levels import Orders
from mope_clip.pruners.regression import RegressionSums, ridge

SHORT = dict(pairs_seen=48, batch=8)


@pytest.fixture(scope='module')
def clip():
    return tiny_clip()


@pytest.fixture(scope='module')
def pairs():
    return synth_pairs(40, 'train')


@pytest.fixture(scope='module')
def quick(clip):
    "The same weights with another activation"
    config = copy.deepcopy(clip.config)
    config['model_cfg']['quick_gelu'] = True
    other = build_clip(config, clip.tokenizer)
    other.model.load_state_dict(clip.model.state_dict())
    return other


def halved(clip):
    spec = whole_spec(clip)
    for layer in spec.vision.values():
        layer['neurons'] = layer['neurons'][::2]
    return prune(clip, spec)


def stop_after(points):
    "A log that interrupts a run behind so many points of its curve"
    lines = []

    def log(line):
        lines.append(line)
        if sum('pairs/s' in said for said in lines) == points:
            raise KeyboardInterrupt

    return lines, log


# ---- what is kept belongs to one model


def test_another_activation_is_another_model_wherever_something_is_kept(
    clip, quick, pairs, tmp_path
):
    assert weights_hash(clip) == weights_hash(quick)
    recipe = Recipe(**SHORT)
    assert run_key(clip, pairs, recipe) != run_key(quick, pairs, recipe)
    assert run_key(clip, pairs, recipe, clip) != run_key(clip, pairs, recipe, quick)
    first, second = (CachedTeacher(model, pairs, tmp_path / 'told') for model in (clip, quick))
    assert first.path != second.path
    for model in (clip, quick):
        kept = repair(halved(model), model, pairs, folder=tmp_path / 'maps')
        assert weights_hash(kept) == weights_hash(repair(halved(model), model, pairs))


def test_frozen_weights_and_other_pictures_are_another_run(clip, pairs):
    recipe, locked, other = Recipe(**SHORT), clip.copy(), clip.copy()
    locked.vision.requires_grad_(False)
    other.preprocess = copy.deepcopy(clip.preprocess)
    other.preprocess.transforms.append(torch.neg)
    keys = {run_key(model, pairs, recipe) for model in (clip, locked, other)}
    assert len(keys) == 3 and run_key(clip, pairs, recipe) in keys


def test_a_home_folder_is_found_again(clip, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    lines, log = stop_after(4)
    how = dict(SHORT, folder='~/run', every=1, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(clip, pairs, **how, log=log)
    assert len(list((tmp_path / 'run').glob('*.pt'))) == 2
    train(clip, pairs, **how, log=lines.append)
    assert any('resumed at step 3' in line for line in lines)
    CachedTeacher(clip, pairs, '~/told')
    assert list((tmp_path / 'told').glob('*.safetensors'))


# ---- streams belong to who passes them


@pytest.mark.parametrize('tasks', [['openmoji'], ['openmoji', 'openmoji-street']])
def test_a_stream_that_is_passed_again_goes_on_and_is_not_moved(clip, tasks, tmp_path):
    several = [stream_pairs(task, 'train') for task in tasks]
    stream = InTurn(several) if len(several) > 1 else several[0]
    recipe = Recipe(**SHORT)
    assert run_key(clip, stream, recipe) == run_key(clip, stream, recipe)
    place, how = stream.state_dict(), dict(SHORT, every=1, checkpoint_every=1)
    for step in (3, 4):  # cut off twice
        lines, log = stop_after(step)
        with pytest.raises(KeyboardInterrupt):
            train(clip, stream, **how, folder=tmp_path, log=log)
    assert any('resumed at step 2' in line for line in lines)
    cut = train(clip, stream, **how, folder=tmp_path, log=lines.append)
    assert stream.state_dict() == place
    straight = train(clip, stream, **how, log=lines.append)
    assert weights_hash(cut.clip) == weights_hash(straight.clip)


# ---- time, and what is known at the start


def test_seconds_before_a_kill_count(clip, pairs, tmp_path):
    _, log = stop_after(4)
    how = dict(SHORT, folder=tmp_path, checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(clip, pairs, **how, every=1, log=log)
    newest = max(tmp_path.glob('*.pt'))
    state = torch.load(newest, weights_only=True)
    state['spent'] = dict(seconds=1000.0, cpu_seconds=900.0)
    torch.save(state, newest)
    made = train(clip, pairs, **how, log=print)
    assert made.spent['train_seconds'] > 1000 and made.history[-1]['cpu_seconds'] > 900


@pytest.mark.parametrize('which', ['pairs', 'validation'])
def test_sets_that_are_no_pairs_are_refused_before_the_first_step(clip, pairs, which):
    mute = pairs.map(lambda row, k: dict(captions=row['captions'] if k else []), with_indices=True)
    for bad, why in (
        (pairs.remove_columns('captions'), 'not image and captions'),
        (pairs.select([]), 'is empty'),
        (mute, '1 of the 40 images .* have no caption'),
    ):
        given = dict(pairs=pairs) | {which: bad}
        with pytest.raises(ValueError, match=why):
            train(clip, **given, **SHORT)


def test_frozen_models_are_told_so_and_frozen_parts_learn_with_muon(pairs):
    frozen = tiny_clip()
    frozen.model.requires_grad_(False)
    with pytest.raises(ValueError, match='Nothing of the model is trainable'):
        train(frozen, pairs, **SHORT)
    for blocks in (True, False):  # alone, or all else
        part = tiny_clip()
        part.model.requires_grad_(not blocks)
        for tower in (part.vision, part.text):
            for block in tower.stages:
                block.requires_grad_(blocks)
        assert len(optimizers(part, Recipe(**SHORT, optimizer='muon'))) == 1 + blocks
        made = train(part, pairs, **SHORT, optimizer='muon', lr=1e-3, freeze_scale=True)
        assert weights_hash(made.clip) != weights_hash(part)


@pytest.mark.parametrize('weight', [float('nan'), float('inf')])
def test_weights_are_finite(weight):
    with pytest.raises(ValueError, match='weights are'):
        loss_weights(dict(itc=1.0, sim=weight))


def test_a_loss_below_zero_that_falls_has_not_diverged():
    check = DivergenceCheck(3.0)
    assert not any(check.update(-5.0 - k) for k in range(200))
    assert any(check.update(1e4) for _ in range(100))


def test_who_teaches_and_who_learns_are_on_one_device(clip, pairs):
    far = clip.copy()
    far.model.to('meta')
    for call in (lambda: distill(clip, far, pairs, **SHORT), lambda: repair(clip, far, pairs)):
        with pytest.raises(ValueError, match='student is on cpu and the teacher on meta'):
            call()


def test_each_process_has_a_card_that_is_there(monkeypatch):
    from mope_clip.clip.load import device_of

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setenv('LOCAL_RANK', '7')
    for asked in (None, 'cuda'):  # there is none here, as on a machine with fewer cards
        with pytest.raises(ValueError, match='cuda:7'):
            device_of(asked)
    monkeypatch.setattr('mope_clip.clip.load.check_device', lambda name: None)
    for rank, asked, found in (('1', 'cuda', 'cuda:1'), ('', None, 'cuda:0'), ('1', 'cpu', 'cpu')):
        monkeypatch.setenv('LOCAL_RANK', rank)
        assert device_of(asked) == found


def test_a_teacher_is_the_same_however_it_is_computed():
    options = dict.fromkeys(MACHINERY, 1)
    one, other = (made_by('openmoji', 'm', '', None, o) for o in ({}, options))
    assert one == other
    with pytest.raises(ValueError, match='no model that they are of'):
        teacher_for('openmoji', '', 'openai')


# ---- scores


def test_masks_take_what_the_other_metrics_take(clip, pairs):
    table = score_by('masks', clip, pairs, pairs_seen=64, batch=None)
    assert table.attrs['mope']['images'] == 40
    test = load_pairs('openmoji', 'test', 16)
    with pytest.raises(ValueError, match='test split'):
        learned_masks(clip, test, pairs_seen=32, batch=8)
    for wrong in (dict(batch=0), dict(groups=0), dict(towers=('visual',))):
        with pytest.raises(ValueError, match=r'at least 1|towers must be'):
            learned_masks(clip, pairs, pairs_seen=32, **wrong)


def test_a_layer_without_heads_is_no_less_by_that(clip, pairs):
    spec = whole_spec(clip)
    spec.vision[0]['heads'] = []
    scores = learned_masks(prune(clip, spec), pairs, pairs_seen=8, batch=8, lr=1e-9)
    layers = scores[(scores.module == 'layer') & (scores.tower == 'vision')].score
    assert layers.tolist() == pytest.approx([1, 1, 1], abs=1e-4)


@pytest.mark.parametrize('metric', ['taylor', 'activation', 'obs'])
def test_a_batch_of_none_is_refused(clip, pairs, metric):
    for batch in (0, -3):
        with pytest.raises(ValueError, match='batch is a whole number, at least 1'):
            score_by(metric, clip, pairs, batch=batch)


def test_pictures_that_are_dropped_at_random_leave_taylor_alone(pairs):
    config = small_config(vocab=40)
    config['model_cfg']['vision_cfg']['patch_dropout'] = 0.5
    random = build_clip(config, tiny_clip().tokenizer)
    random.model.train()
    one, other = (score_by('taylor', random, pairs) for _ in range(2))
    assert one.score.tolist() == other.score.tolist()


# ---- plans, repair, search


def test_servable_plans_of_layers_are_checked_too(clip):
    scores = score_by('random', clip, groups=4)
    uneven = prune(clip, plan(scores, clip, keep=0.5, log=None))
    table = score_by('random', uneven, groups=4)
    with pytest.raises(ValueError, match='lost heads'):
        plan(table, uneven, keep_depth=0.67, servable=True, log=None)
    for wrong in (dict(rank='bogus'), dict(multiples=(1, 0)), dict(multiples=8)):
        with pytest.raises(ValueError, match=r'rank is|multiples are'):
            plan(scores, clip, keep_depth=0.67, **wrong, log=None)
    made = plan(scores, clip, keep_depth=0.67, servable=True, log=None)
    assert made.provenance['plan']['servable']


def test_repair_holds_some_out_of_what_it_looks_at(clip, pairs):
    with pytest.raises(ValueError, match='at least 10 images, to hold some out, not 3'):
        repair(halved(clip), clip, pairs, images=3)
    with pytest.raises(ValueError, match='towers must be'):
        repair(halved(clip), clip, pairs, towers=('visual',))
    one = repair(halved(clip), clip, pairs, towers='vision')
    assert list(one.spec.provenance['repair']['towers']) == ['vision']


@pytest.mark.parametrize('strength', [0.0, 1e-300])
def test_inputs_that_repeat_each_other_are_solved_without_a_pull(strength):
    sums, x = RegressionSums(3, 2), torch.randn(50, 2, dtype=torch.float64)
    sums.add(torch.cat([x, x[:, :1]], 1), x)
    weight, _ = ridge(sums, torch.zeros(2, 3, dtype=torch.float64), strength)
    assert torch.allclose(weight[0, [0, 2]].sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize('strengths', [(), 0.1, (-1.0,)])
def test_strengths_are_numbers_of_at_least_zero(clip, pairs, strengths):
    with pytest.raises(ValueError, match='strengths are'):
        repair(halved(clip), clip, pairs, strengths=strengths)


def test_a_search_is_refused_before_it_begins(clip, pairs):
    scores = mope(clip, synth_pairs(12), z='soft_recall', groups=4)
    few = pairs.select(range(8))
    for wrong in (dict(calibration=few), dict(minutes=0), dict(strength=-1.0)):
        with pytest.raises(ValueError, match=r'at least 10 images|minutes must|strength must'):
            search(clip, scores, synth_pairs(24), macs=0.5, evaluations=4, **wrong)


def test_with_nothing_removed_a_candidate_is_the_teacher_with_a_bias_too(pairs):
    config = small_config(vocab=40)
    config['model_cfg']['text_cfg']['proj_bias'] = True
    config['model_cfg']['custom_text'] = True
    clip = build_clip(config, tiny_clip().tokenizer)
    bias = clip.text.final_map().bias
    torch.nn.init.normal_(bias, std=0.3)
    orders = Orders(clip, score_by('random', clip, groups=4))
    task = ScoringTask(clip, pairs, 'soft_recall')
    judge = Judge(clip, orders, dict(task.x), task)
    _, states = judge.evaluate(orders.full)
    found = torch.nn.functional.normalize(states['text'].features, dim=-1)
    assert (found * task.dense['text']).sum(1).min() > 0.9999


def test_a_vocabulary_that_lacks_its_end_costs_nothing_that_could_be(clip):
    spec = whole_spec(clip)
    spec.vocabulary = [0, 1, 2]
    with pytest.raises(ValueError, match='vocabulary'):
        spec_cost(clip, spec)


# ---- what is measured


def test_nothing_is_measured_on_nothing(clip):
    with pytest.raises(ValueError, match='the data set is empty'):
        retrieval(clip, synth_pairs(4).select([]))
    labelled = load_labelled('concept', 'test', 4)
    with pytest.raises(ValueError, match='the data set is empty'):
        zero_shot(clip, labelled.select([]))
    with pytest.raises(ValueError, match='batch is a number of images'):
        latency(clip, 0)
    assert 'vision_ms' in latency(clip, 1, 'vision', min_run_time=1e-3)
