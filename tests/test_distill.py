"Distillation: each loss by its formula, batches that can be gone on with, what is refused by name."

import importlib.util
import io
import json
import os
import random
from dataclasses import asdict, fields, replace

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from conftest import model_of
from open_clip.loss import DistillClipLoss, SigLipLoss

from mope_clip.clip import (
    build_clip,
    prune,
    save_open_clip,
    small_config,
    tiny_clip,
    weights_hash,
    whole_spec,
)
from mope_clip.data import synth_pairs
from mope_clip.data.locks import MARK
from mope_clip.data.parallel import World
from mope_clip.distill import distill, embedded_teacher, learned_masks, teacher_for, train
from mope_clip.distill.batches import Batches, choose_caption
from mope_clip.distill.checkpoint import (
    random_state,
    read_checkpoint,
    run_key,
    set_random_state,
    write_checkpoint,
)
from mope_clip.distill.forward import CachedTeacher, Forward, Teacher
from mope_clip.distill.loop import fit, optimizer_step, training_step
from mope_clip.distill.losses import (
    LOSSES,
    PUBLISHED,
    FeatLoss,
    HiddenLoss,
    LossContext,
    MopeLoss,
    SimLoss,
    loss_weights,
    matched_layers,
)
from mope_clip.distill.masks import gated
from mope_clip.distill.recipe import (
    STAGES,
    Recipe,
    WeightAverage,
    learning_rate,
    optimizers,
    set_learning_rate,
    settings_that_matter,
)
from mope_clip.distill.run import Run, RunOptions
from mope_clip.distill.shard import clip_gradients, get_state, set_state, unreached, wrap
from mope_clip.distill.step import Step, drawn_from
from mope_clip.distill.teachers import finetune_teacher, task_settings
from mope_clip.distill.watch import (
    DivergenceCheck,
    TextProgress,
    TrainingProgress,
    training_progress,
)
from mope_clip.evaluate import encode_images, retrieval
from mope_clip.metrics import random_scores
from mope_clip.pruners import masked, plan_width

ALL_TERMS = ['contrastive_loss', 'sim_loss', 'feat_loss', 'hidden_loss']


def quiet(line):
    "A log that nobody reads"


def without_layer(clip, place):
    "A copy without one vision layer, counted by position"
    spec = whole_spec(clip)
    del spec.vision[place]
    return prune(clip, spec)


def embeddings(n, width=4, seed=0):
    "Four sets of random embeddings (n, width), normalised"
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, width, generator=generator), dim=-1) for _ in range(4)]


def model_outputs(n=3, width=4):
    "What a loss is given of a student and its teacher"
    image, text, dist_image, dist_text = embeddings(n, width)
    return dict(
        image_features=image,
        text_features=text,
        logit_scale=torch.tensor(10.0),
        dist_image_features=dist_image,
        dist_text_features=dist_text,
        dist_logit_scale=torch.tensor(20.0),
    )


def distance(one, other):
    "The largest difference between two models' weights"
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs if a.numel())


# -- losses


def test_similarity_loss_is_its_formula():
    outputs = model_outputs()
    image, text, dist_image, dist_text = (x.numpy() for x in embeddings(3))
    S, T = 10 * image @ text.T, 20 * dist_image @ dist_text.T

    def cross_entropy(S, T):
        soft_s, soft_t = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (S, T))
        return -(soft_t * np.log(soft_s)).sum(1).mean()

    expected = (cross_entropy(S, T) + cross_entropy(S.T, T.T)) / 2
    assert SimLoss()(**outputs)['sim_loss'].item() == pytest.approx(expected, rel=1e-5)


def test_nothing_is_left_to_learn_where_similarities_agree():
    outputs = model_outputs()
    image = outputs['dist_image_features'].clone().requires_grad_()
    outputs |= dict(
        image_features=image,
        text_features=outputs['dist_text_features'],
        logit_scale=outputs['dist_logit_scale'],
    )
    SimLoss()(**outputs)['sim_loss'].backward()
    torch.testing.assert_close(image.grad, torch.zeros(3, 4), atol=1e-5, rtol=0)


def test_similarity_loss_is_the_second_half_of_that_of_open_clip():
    outputs = model_outputs()
    theirs = DistillClipLoss()(**outputs, output_dict=True)['distill_loss']
    assert SimLoss()(**outputs)['sim_loss'].item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize('loss', [SimLoss(), FeatLoss()])
def test_without_the_flag_a_loss_is_a_tensor_as_in_open_clip(loss):
    outputs = model_outputs()
    assert loss(**outputs, output_dict=False) == next(iter(loss(**outputs).values()))


def test_the_mean_over_processes_is_the_loss_of_the_whole_batch(monkeypatch):
    image, text, dist_image, dist_text = embeddings(6)
    whole = SimLoss()(image, text, 10.0, dist_image, dist_text, 20.0)['sim_loss']

    def of_process(rank):
        own = slice(3 * rank, 3 * rank + 3)

        def gather(some_images, some_texts, *_):
            is_student = torch.equal(some_images, image[own])
            return (image, text) if is_student else (dist_image, dist_text)

        monkeypatch.setattr('mope_clip.distill.losses.gather_features', gather)
        loss = SimLoss(rank, 2)
        return loss(image[own], text[own], 10.0, dist_image[own], dist_text[own], 20.0)['sim_loss']

    first, second = of_process(0), of_process(1)
    torch.testing.assert_close((first + second) / 2, whole)
    assert abs(first - second) > 1e-3, 'only the mean is right'


def feat(image, text, dist_image, dist_text):
    return FeatLoss()(image, text, 1.0, dist_image, dist_text, 1.0)['feat_loss'].item()


def test_embedding_loss_is_the_mean_squared_error_summed_over_the_towers():
    one = torch.eye(4)
    turned = one.roll(1, 0)  # orthogonal: a squared distance of 2, over 4 elements
    assert feat(one, one, one, one) == 0
    assert feat(turned, one, one, one) == feat(one, turned, one, one) == 2 / 4
    opposite = embeddings(2, 768)[0]
    assert feat(opposite, one, -opposite, one) == pytest.approx(4 / 768)


def test_embedding_loss_of_halves_is_in_the_mean_that_of_the_whole():
    sets = embeddings(6)
    halves = [feat(*(x[own] for x in sets)) for own in (slice(0, 3), slice(3, 6))]
    assert sum(halves) / 2 == pytest.approx(feat(*sets))


TEACHER_HIDDEN = [torch.full((1, 2, 3), float(layer)) for layer in range(3)]
STUDENT_HIDDEN = [TEACHER_HIDDEN[0], TEACHER_HIDDEN[2]]


def test_hidden_states_weigh_nothing_unless_the_published_losses_are_asked_for():
    from mope_clip.distill.losses import named_weights

    assert Recipe(64).weights == dict(itc=1, sim=1, feat=1000)
    assert Recipe(64, weights=PUBLISHED).weights == dict(itc=1, sim=1, feat=1000, hidn=1)
    for repaired in (True, False):
        assert named_weights('published', repaired) == PUBLISHED
        assert named_weights('three', repaired)['hidn'] == 0
        assert named_weights('auto', repaired)['hidn'] == (not repaired)
    with pytest.raises(ValueError, match="losses are auto, three or published, not 'all'"):
        named_weights('all', True)


def test_hidden_loss_is_summed_over_layers_and_towers():
    of_vision = HiddenLoss(dict(vision=[0, 2], text=[]))
    further = [state + 3 for state in STUDENT_HIDDEN]
    assert of_vision(STUDENT_HIDDEN, [], TEACHER_HIDDEN, [], output_dict=False) == 0
    assert of_vision(further, [], TEACHER_HIDDEN, [], output_dict=False) == 2 * 9
    both = HiddenLoss(dict(vision=[0, 2], text=[1]))
    text = [TEACHER_HIDDEN[2]]
    assert both(STUDENT_HIDDEN, text, TEACHER_HIDDEN, TEACHER_HIDDEN, output_dict=False) == 1


def test_hidden_loss_needs_a_partner_for_each_layer():
    with pytest.raises(ValueError):
        HiddenLoss(dict(vision=[0, 2], text=[1]))(STUDENT_HIDDEN, [], TEACHER_HIDDEN, [])


def test_layers_are_matched_by_the_index_of_the_base():
    tiny = tiny_clip()
    once = without_layer(tiny, 0)
    twice = without_layer(once, 0)
    assert matched_layers(without_layer(tiny, 1), tiny) == dict(vision=[0, 2], text=[0, 1])
    assert matched_layers(twice, tiny)['vision'] == [2]
    assert matched_layers(twice, once)['vision'] == [1]


def test_a_teacher_that_lacks_layers_is_refused():
    tiny = tiny_clip()
    with pytest.raises(ValueError, match=r'lacks layers that the student has \(vision 1\)'):
        matched_layers(tiny, without_layer(tiny, 1))


def deeper_clip():
    "A model of another base than `tiny_clip`"
    tokenizer = tiny_clip().tokenizer
    config = small_config(len(tokenizer.tokenizer), layers=(4, 2), context=12)
    return build_clip(config, tokenizer)


def test_a_teacher_of_another_base_is_refused():
    with pytest.raises(ValueError, match='not of the same base model'):
        matched_layers(tiny_clip(), deeper_clip())


def all_outputs():
    hidden = dict(
        image_hidden=STUDENT_HIDDEN,
        text_hidden=[TEACHER_HIDDEN[0]] * 2,
        dist_image_hidden=TEACHER_HIDDEN,
        dist_text_hidden=TEACHER_HIDDEN,
    )
    return model_outputs() | hidden


def mope_loss(**weights):
    tiny = tiny_clip()
    context = LossContext(without_layer(tiny, 1), tiny)
    return MopeLoss(context, weights) if weights else MopeLoss(context)


def test_the_losses_are_weighted_and_their_sum_is_the_loss():
    outputs, terms = all_outputs(), mope_loss()(**all_outputs())
    assert list(terms) == ALL_TERMS
    theirs = DistillClipLoss()(**model_outputs(), output_dict=True)
    assert terms['contrastive_loss'] == theirs['contrastive_loss']
    sets = [outputs[name] for name in outputs if name.endswith('features')]
    assert terms['feat_loss'].item() == pytest.approx(1000 * feat(*sets), rel=1e-5)
    assert mope_loss()(**outputs, output_dict=False) == sum(terms.values())


def test_a_loss_without_a_weight_is_left_out():
    whole = mope_loss()(**all_outputs())
    some = mope_loss(feat=500.0, itc=2.0, sim=0.0)(**all_outputs())
    assert list(some) == ['contrastive_loss', 'feat_loss']
    torch.testing.assert_close(some['contrastive_loss'], 2 * whole['contrastive_loss'])
    torch.testing.assert_close(some['feat_loss'], whole['feat_loss'] / 2)


def test_the_contrastive_loss_needs_no_teacher():
    alone = MopeLoss(LossContext(tiny_clip()), dict(itc=1.0))
    student = {name: x for name, x in model_outputs().items() if not name.startswith('dist_')}
    assert list(alone(**student)) == ['contrastive_loss']


def test_a_loss_of_open_clip_can_be_added(monkeypatch):
    monkeypatch.setitem(LOSSES, 'theirs', lambda run: DistillClipLoss())
    terms = mope_loss(theirs=2.0)(**all_outputs())
    expected = DistillClipLoss()(**model_outputs(), output_dict=True)
    assert terms == {name: 2 * value for name, value in expected.items()}


def test_four_numbers_are_weights_in_the_first_order():
    assert loss_weights([1, 0, 500, 0]) == dict(itc=1.0, feat=500.0)
    assert list(loss_weights(dict(hidn=1, itc=1))) == ['itc', 'hidn'], 'one order'


@pytest.mark.parametrize(
    ('weights', 'said'),
    [
        ((1, 1), 'four numbers'),
        ((0, 0, 0, 0), 'not all 0'),
        ((1, 1, -1, 1), 'none below 0'),
        (dict(itc=0.0), 'not all 0'),
        (dict(itc='1'), 'numbers'),
        (dict(itc=True), 'numbers'),
        (dict(), 'not all 0'),
        (0.9, 'weights are several numbers'),
        (dict(itc=1, hidden=1), "no loss 'hidden': weights are of itc, sim, feat, hidn"),
    ],
)
def test_weights_that_cannot_be_right_are_refused(weights, said):
    with pytest.raises(ValueError, match=said):
        Recipe(pairs_seen=64, weights=weights)


# -- many processes


class Features(nn.Module):
    "A forward without normalisation"

    def __init__(self, clip):
        super().__init__()
        self.model, self.encode = clip.model, (clip.encode_image, clip.encode_text)

    def forward(self, images, ids):
        return dict(
            image_features=self.encode[0](images),
            text_features=self.encode[1](ids),
            logit_scale=self.model.logit_scale.exp(),
        )


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def headless_clip():
    "A model without the heads of one vision layer"
    tiny = tiny_clip()
    spec = whole_spec(tiny)
    spec.vision[1]['heads'] = []
    return prune(tiny, spec)


def test_parameters_that_no_loss_reaches_are_found():
    tiny, headless = tiny_clip(), headless_clip()
    assert unreached(Features(tiny), tiny) == []
    names = {id(p): name for name, p in headless.model.named_parameters()}
    found = [names[id(p)].split('.1.')[1] for p in unreached(Features(headless), headless)]
    projections = ['attn.in_proj_weight', 'attn.in_proj_bias', 'attn.out_proj.weight']
    assert found == ['ln_1.weight', 'ln_1.bias', *projections]


def test_a_gradient_is_scaled_only_where_it_is_too_large():
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    for largest, norm in ((1.0, 5.0), (9.0, 1.0)):
        assert clip_gradients([model.weight], largest, World()).item() == pytest.approx(norm)
        torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_copies_and_slices_have_the_gradients_of_one_process(group_of_one):
    images, ids = torch.rand(2, 3, 32, 32), tiny_clip().tokenizer(['a red square', 'a blue one'])

    def norms(shard=None):
        clip = tiny_clip()
        run = Features(clip)
        if shard is not None:
            run = wrap(run, clip, World(0, 2), shard)
        out = run(images, ids)
        (out['logit_scale'] * out['image_features'] @ out['text_features'].T).sum().backward()
        params = list(clip.model.parameters())
        return [clip_gradients(params, largest, World()).item() for largest in (0.1, 1e9)]

    plain, copies, slices = norms(), norms(shard=False), norms(shard=True)
    assert copies == pytest.approx(plain, rel=1e-5) and slices == pytest.approx(plain, rel=1e-4)
    assert plain[1] == pytest.approx(0.1, rel=1e-3)


def test_a_whole_state_is_given_to_another_model():
    def stepped(clip):
        adamw = torch.optim.AdamW(clip.model.parameters(), lr=1e-3)
        out = Features(clip)(torch.rand(2, 3, 32, 32), clip.tokenizer(['a fox', 'a cat']))
        sum(x.sum() for x in out.values()).backward()
        adamw.step()
        return adamw

    one, other = tiny_clip(), tiny_clip(1)
    adamw, fresh = stepped(one), torch.optim.AdamW(other.model.parameters(), lr=1.0)
    weights, moments = get_state(one.model, [adamw])
    set_state(other.model, [fresh], weights, moments, World())
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(adamw.state[a]['exp_avg'], fresh.state[b]['exp_avg'])
    assert fresh.param_groups[0]['lr'] == 1e-3
    assert 'visual.proj' in moments['state'], 'filed by name'


# -- batches


@pytest.fixture(scope='module')
def ten():
    return synth_pairs(10)


@pytest.fixture(scope='module')
def tiny():
    return tiny_clip()


def same(batch, other):
    return all(map(torch.equal, batch, other))


def batches_of(clip, pairs, n, state=None, **how):
    "`n` batches of four from a state on"
    feed = Batches(clip, pairs, batch=4, **how)
    if state:
        feed.load_state_dicts([state])
    running = iter(feed)
    made = [next(running) for _ in range(n)]
    running.close()
    return made


def test_the_caption_is_named_by_seed_and_position():
    def drawn(seed):
        return ''.join('abc'[choose_caption(list('abc'), seed, k)] for k in range(8))

    assert (drawn(0), drawn(1)) == ('baaaaccb', 'cbbbbbca')


def test_a_batch_is_pixels_and_the_tokens_of_the_captions_that_were_drawn(tiny, ten):
    (batch,) = batches_of(tiny, ten, 1)
    assert batch.images.shape == (4, 3, 32, 32) and batch.ids.shape == (4, 12)
    captions = [ten[i]['captions'][k] for i, k in batch.places.tolist()]
    assert torch.equal(batch.ids, tiny.tokenizer(captions))


def test_each_picture_comes_once_an_epoch_and_in_another_order_the_next_time(tiny, ten):
    seen = torch.cat([batch.places[:, 0] for batch in batches_of(tiny, ten, 5)]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


@pytest.mark.parametrize('streaming', [False, True])
@pytest.mark.parametrize('workers', [0, 3])
def test_batches_go_on_from_a_state_with_any_number_of_threads(tiny, ten, streaming, workers):
    def pairs():
        return ten.to_iterable_dataset() if streaming else ten

    feed = Batches(tiny, pairs(), batch=4)
    running = iter(feed)
    next(running)
    state = feed.state_dict()
    assert state['position'] == 4
    later = [next(running) for _ in range(4)]  # into the second epoch
    again = batches_of(tiny, pairs(), 4, state, workers=workers)
    assert all(map(same, later, again))


@pytest.mark.parametrize('streaming', [False, True])
def test_processes_get_their_own_pairs_of_every_batch(tiny, ten, streaming):
    def pairs():
        return ten.to_iterable_dataset() if streaming else ten

    whole = batches_of(tiny, pairs(), 4)
    for rank in (0, 1):
        own = batches_of(tiny, pairs(), 4, world=World(rank, 2))
        assert all(
            same(half, [x[rank::2] for x in full]) for half, full in zip(own, whole, strict=True)
        )


class Half:
    "A stream that knows which half of the pairs is its process's"

    def __init__(self, pairs, rank):
        self.pairs, self.rank, self.world, self.at = pairs, rank, 2, 0

    def __iter__(self):
        while True:
            at, self.at = self.at, self.at + 1
            yield self.pairs[(2 * at + self.rank) % len(self.pairs)]

    def state_dict(self):
        return self.at

    def set_epoch(self, epoch):
        self.at = 0

    def load_state_dict(self, states):
        self.at = states[self.rank]


@pytest.mark.parametrize('rank', [0, 1])
def test_a_stream_that_is_shared_already_is_taken_as_it_comes(tiny, ten, rank):
    whole = [batch.ids for batch in batches_of(tiny, ten.to_iterable_dataset(), 3)]
    own = batches_of(tiny, Half(ten, rank), 3, world=World(rank, 2))
    expected = torch.cat([ids[rank::2] for ids in whole])
    assert torch.equal(torch.cat([batch.ids for batch in own]), expected)


def test_a_shared_stream_goes_on_from_the_states_of_all_processes(tiny, ten):
    whole = [batch.ids for batch in batches_of(tiny, ten.to_iterable_dataset(), 3)]
    feed = Batches(tiny, Half(ten, 1), batch=4, world=World(1, 2))
    feed.load_state_dicts([dict(position=4, epoch=0, stream=2)] * 2)
    assert torch.equal(next(iter(feed)).ids, whole[1][1::2])


class Nothing:
    "A stream all of whose shards have failed"

    def __iter__(self):
        return iter(())

    def set_epoch(self, epoch):
        pass


def test_what_gives_no_pairs_is_refused(tiny, ten):
    with pytest.raises(ValueError, match='is empty'):
        Batches(tiny, ten.select([]), batch=4)
    with pytest.raises(ValueError, match='gave nothing'):
        next(iter(Batches(tiny, Nothing(), batch=4)))


def test_a_batch_that_cannot_be_shared_equally_is_refused(tiny, ten):
    with pytest.raises(ValueError, match='a multiple of 3'):
        Batches(tiny, ten, batch=4, world=World(0, 3))


# -- a forward


@pytest.fixture(scope='module')
def batch(tiny, ten):
    return next(iter(Batches(tiny, ten, batch=4)))


def gradients_of(clip):
    return {n: p.grad.clone() for n, p in clip.model.named_parameters() if p.grad is not None}


def test_a_forward_is_what_the_towers_compute(tiny, batch):
    with torch.no_grad():
        full = Forward(tiny, hidden=True)(batch.images, batch.ids)
        plain = Forward(tiny)(batch.images, batch.ids)
        last = F.normalize(tiny.vision.pool(full['image_hidden'][-1]), dim=-1)
    assert list(plain) == ['image_features', 'text_features', 'logit_scale']
    torch.testing.assert_close(plain['image_features'], full['image_features'])
    torch.testing.assert_close(last, full['image_features'])
    torch.testing.assert_close(full['image_features'].norm(dim=-1), torch.ones(4))
    assert full['logit_scale'] == tiny.logit_scale.exp()


def test_a_forward_has_the_parameters_of_the_model_once(tiny):
    names = {name.removeprefix('model.') for name, _ in Forward(tiny).named_parameters()}
    assert names == {name for name, _ in tiny.model.named_parameters()}


def test_activations_that_are_computed_again_give_the_same_gradients(batch):
    def gradients(recompute):
        clip = tiny_clip()
        out = Forward(clip, True, recompute)(batch.images, batch.ids)
        states = [*out['image_hidden'], *out['text_hidden']]
        similar = (out['image_features'] @ out['text_features'].T).exp().sum()
        (sum((state**2).mean() for state in states) + similar).backward()
        return gradients_of(clip)

    full, again = gradients(False), gradients(True)
    for name in full:
        torch.testing.assert_close(full[name], again[name], atol=1e-6, rtol=1e-5)


@pytest.fixture
def cached(tmp_path, ten):
    "A cached teacher, and what it said"
    said = []
    return CachedTeacher(tiny_clip(1), ten, tmp_path, log=said.append), said


def test_a_cached_teacher_says_what_the_teacher_says(cached, batch):
    fresh, kept = Teacher(tiny_clip(1))(batch.images, batch.ids), cached[0](batch.places)
    assert set(fresh) == set(kept)
    for name in fresh:
        torch.testing.assert_close(fresh[name], kept[name], atol=1e-6, rtol=0)


def test_embeddings_are_made_once(cached, tmp_path, ten):
    teacher, said = cached
    assert len(said) == 1
    assert CachedTeacher(tiny_clip(1), ten, tmp_path, log=said.append).path == teacher.path
    assert len(said) == 1


def test_embeddings_of_another_teacher_or_of_other_data_are_never_taken(
    cached, tmp_path, tiny, ten
):
    def turned(row):
        "The first picture of the data set turned, its name and captions as they were"
        first = row['image_id'] == ten[0]['image_id']
        return dict(image=row['image'].rotate(90)) if first else row

    others = (tiny, ten), (tiny_clip(1), ten.select(range(9))), (tiny_clip(1), ten.map(turned))
    paths = {CachedTeacher(*other, tmp_path, log=quiet).path for other in others}
    assert len({cached[0].path, *paths}) == 4


def test_what_a_teacher_says_of_a_stream_cannot_be_kept(ten):
    with pytest.raises(ValueError, match='leave out cache'):
        CachedTeacher(tiny_clip(1), ten.to_iterable_dataset(), '.')


# -- a step


def parties(dtype=torch.float64, drop=True):
    "A student that lacks a layer and differs from its teacher, and the teacher"
    teacher = tiny_clip(1)
    student = without_layer(teacher, 1) if drop else teacher.copy()
    with torch.no_grad():
        for p in student.model.parameters():
            p.mul_(1.1)
    for clip in (student, teacher):
        clip.model.to(dtype)
    return student, teacher


def stepped(micro=0, dtype=torch.float64, recompute=False):
    "Losses and gradients of a batch of ten"
    student, teacher = parties(dtype)
    student.model.train()
    images, ids, _ = next(iter(Batches(student, synth_pairs(10), batch=10)))
    forward = Forward(student, checkpoint_activations=recompute)
    step = Step(forward, MopeLoss(LossContext(student, teacher)), Teacher(teacher), micro)
    terms = step(images.to(dtype), student.text.trim(ids))
    return {name: value.item() for name, value in terms.items()}, gradients_of(student)


def far(one, other):
    "The largest relative difference of two sets of gradients"
    assert set(one) == set(other)
    return max(((one[n] - other[n]).abs().max() / (1e-3 + one[n].abs().max())).item() for n in one)


@pytest.fixture(scope='module')
def whole_step():
    return stepped()


@pytest.mark.parametrize('micro', [5, 4, 1])  # with 4 the last piece has two pairs
def test_pieces_have_the_losses_and_gradients_of_the_whole_batch(whole_step, micro):
    terms, gradients = stepped(micro)
    assert list(terms) == ALL_TERMS and terms == pytest.approx(whole_step[0], abs=1e-10)
    assert 'logit_scale' in gradients and far(whole_step[1], gradients) < 1e-10


def test_pieces_agree_in_single_precision_and_with_activations_computed_again(whole_step):
    single = torch.float32
    assert far(stepped(dtype=single)[1], stepped(4, dtype=single)[1]) < 1e-5
    assert far(whole_step[1], stepped(4, recompute=True)[1]) < 1e-10


def test_gradients_are_those_of_plain_autograd_and_not_of_losses_added_up(whole_step):
    def by_hand(size):
        student, teacher = parties()
        images, ids, _ = next(iter(Batches(student, synth_pairs(10), batch=10)))
        images, ids = images.double(), student.text.trim(ids)
        loss, ask = MopeLoss(LossContext(student, teacher)), Teacher(teacher)
        for some, words in zip(images.split(size), ids.split(size), strict=True):
            outputs = Forward(student, True)(some, words)
            total = loss(**outputs, **ask(some, words, hidden=True), output_dict=False)
            (total * len(some) / 10).backward()
        return gradients_of(student)

    assert far(by_hand(10), whole_step[1]) < 1e-10
    assert far(by_hand(5), whole_step[1]) > 1e-2


def test_a_model_with_a_bias_learns_by_the_sigmoid_loss_in_pieces_as_in_one(ten):
    config = tiny_clip().config
    config = dict(config, model_cfg=dict(config['model_cfg'], init_logit_bias=-10.0))

    def stepped(micro):
        student, teacher = (build_clip(config, tiny_clip().tokenizer, seed) for seed in (0, 1))
        for clip in (student, teacher):
            clip.model.double()
        images, ids, _ = next(iter(Batches(student, ten, batch=10)))
        loss = MopeLoss(LossContext(student, teacher))
        step = Step(Forward(student), loss, Teacher(teacher), micro)
        terms = step(images.double(), student.text.trim(ids))
        return {name: x.item() for name, x in terms.items()}, gradients_of(student)

    (terms, whole), (in_pieces, pieces) = stepped(0), stepped(4)
    assert list(terms) == ALL_TERMS and in_pieces == pytest.approx(terms, abs=1e-10)
    assert whole['logit_bias'].abs() > 0 and far(whole, pieces) < 1e-10
    clip = build_clip(config, tiny_clip().tokenizer, 0)
    images, ids, _ = next(iter(Batches(clip, ten, batch=10)))
    features = clip.encode_image(images, True), clip.encode_text(ids, True)
    expected = SigLipLoss()(*features, clip.logit_scale.exp(), clip.logit_bias).item()
    assert terms['contrastive_loss'] == pytest.approx(expected, rel=1e-4)


def test_with_the_scale_the_bias_is_frozen_or_trained(ten):
    config = tiny_clip().config
    config = dict(config, model_cfg=dict(config['model_cfg'], init_logit_bias=-10.0))
    clip = build_clip(config, tiny_clip().tokenizer, 0)
    for frozen in (True, False):
        recipe = Recipe(pairs_seen=16, batch=8, freeze_scale=frozen)
        made = fit(clip, ten, recipe, log=quiet)
        assert (made.clip.logit_bias == clip.logit_bias) == frozen


def test_random_numbers_are_named_and_those_outside_untouched():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    with drawn_from(7):
        inside = torch.rand(9)
    assert torch.equal(torch.rand(1), expected)
    with drawn_from(7):
        assert torch.equal(torch.rand(9), inside)


def test_both_forwards_of_a_piece_see_the_same_patches(ten):
    config = tiny_clip().config
    vision = dict(config['model_cfg']['vision_cfg'], patch_dropout=0.5)
    config = dict(config, model_cfg=dict(config['model_cfg'], vision_cfg=vision))
    student, seen = build_clip(config, tiny_clip().tokenizer, 1), []
    student.model.train()
    student.vision.blocks[0].register_forward_pre_hook(
        lambda block, inputs: seen.append(inputs[0].detach().sum((1, 2)))
    )
    images, ids, _ = next(iter(Batches(student, ten, batch=10)))
    step = Step(Forward(student), MopeLoss(LossContext(student), dict(itc=1.0)), micro=4)
    step(images, ids, key=(3, 1))
    assert all(map(torch.equal, seen[:3], seen[3:]))
    step(images, ids, key=(3, 2))
    assert not torch.equal(seen[6], seen[0]), 'another step, other patches'


def test_losses_in_half_precision_are_near_and_stay_in_single(batch):
    def terms(precision):
        student, teacher = parties(torch.float32)
        loss = MopeLoss(LossContext(student, teacher))
        step = Step(Forward(student), loss, Teacher(teacher), precision=precision)
        return step(batch.images, batch.ids)

    full, half = terms('fp32'), terms('bf16')
    assert all(value.dtype == torch.float32 for value in half.values())
    for name in ('contrastive_loss', 'sim_loss'):
        assert 0 < abs(full[name] / half[name] - 1) < 0.02


# -- the recipe


@pytest.mark.parametrize(
    ('wrong', 'said'),
    [
        (dict(pairs_seen=63), 'less than one batch of 64'),
        (dict(batch=0), 'at least 1, not 0'),
        (dict(lr=0.0), 'above 0, not 0.0'),
        (dict(optimizer='sgd'), "not 'sgd'"),
        (dict(warmup=1.0), 'below 1, not 1.0'),
        (dict(final=2.0), 'from 0 to 1'),
        (dict(betas=(0.9,)), 'two numbers'),
        (dict(ema=1.0), 'below 1, not 1.0'),
        (dict(precision='fp16'), 'bf16 does not'),
        (dict(batch='16'), "batch is a whole number, not '16'"),
        (dict(micro=2.5), 'whole number'),
        (dict(seed=-1), 'at least 0, not -1'),
        (dict(lr='1e-3'), 'lr is a number'),
        (dict(betas=0.9), 'betas are several'),
        (dict(diverged=0.5), 'above 1, or 0'),
        (dict(micro=-1), 'counts'),
        (dict(clip_norm=0), 'clip_norm above 0'),
        (dict(shard=True, optimizer='muon'), 'whole matrices'),
    ],
)
def test_a_setting_that_cannot_be_right_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**{'pairs_seen': 64, **wrong})


def test_a_setting_that_does_not_exist_is_no_setting():
    with pytest.raises(TypeError, match='learning_rate'):
        Recipe(pairs_seen=64, learning_rate=1e-3)


def test_what_decides_the_result_is_told_from_how_it_is_computed():
    recipe = Recipe(pairs_seen=6400)
    that_matter = settings_that_matter(recipe)
    assert settings_that_matter(replace(recipe, micro=8, workers=2)) == that_matter
    assert settings_that_matter(replace(recipe, ema=0.9)) != that_matter
    assert json.loads(json.dumps(asdict(recipe)))['weights'] == recipe.weights


def test_the_stages_are_settings_of_a_recipe():
    known = {setting.name for setting in fields(Recipe)}
    for settings in STAGES.values():
        assert set(settings) <= known and settings['freeze_scale']


def test_the_rate_warms_up_and_falls_along_a_cosine():
    recipe = Recipe(pairs_seen=6400, lr=1e-3, warmup=0.1)  # 100 steps, ten of them warm-up
    rates = [learning_rate(recipe, step) for step in (0, 4, 9, 10, 55, 100)]
    assert rates == pytest.approx([1e-4, 5e-4, 1e-3, 1e-3, 5e-4, 0.0], abs=1e-9)
    assert learning_rate(replace(recipe, final=0.2), 100) == pytest.approx(2e-4)
    assert learning_rate(replace(recipe, warmup=0.0), 0) == pytest.approx(1e-3)


SHAPES = [
    'plain',
    'custom_blocks',
    'custom_norms',
    'layer_scale',
    'first_pool',
    'linear_projection',
]


@pytest.mark.parametrize('shape', SHAPES)
def test_parameters_are_grouped_as_by_their_names_in_open_clip(shape):
    clip = model_of(shape)
    assert isinstance(clip.model, open_clip.CLIP | open_clip.CustomTextCLIP)
    named = dict(clip.model.named_parameters())
    plain = [n for n, p in named.items() if p.ndim == 1 or (p.ndim and 'embedding' in n)]
    blocks = [n for n, p in named.items() if p.ndim == 2 and 'resblocks' in n]
    rest = [n for n in named if n not in (*plain, *blocks, 'logit_scale')]
    names = {id(p): name for name, p in named.items()}

    def groups(optimizer):
        return [[names[id(p)] for p in group['params']] for group in optimizer.param_groups]

    muon, adamw = optimizers(clip, Recipe(pairs_seen=64, optimizer='muon'))
    assert groups(muon) == [blocks]
    assert groups(adamw) == [rest, plain, ['logit_scale']]
    (alone,) = optimizers(clip, Recipe(pairs_seen=64))
    decayed = [n for n in named if n in (*blocks, *rest)]
    assert groups(alone) == [decayed, plain, ['logit_scale']]
    assert [group['weight_decay'] for group in alone.param_groups] == [0.1, 0.0, 0.0]


def test_beside_muon_adamw_takes_half_of_the_rate(tiny):
    both = optimizers(tiny, Recipe(pairs_seen=64, optimizer='muon'))
    assert len(both[0].param_groups[0]['params']) == 4 * (3 + 2)
    set_learning_rate(both, 0.02)
    rates = [group['lr'] for optimizer in both for group in optimizer.param_groups]
    assert rates == [0.02, 0.01, 0.01, 0.01]


MUON = (3.4445, -4.775, 2.0315), 5, 1e-7  # coefficients, steps and least norm, of torch.optim.Muon


def pytorchs_iteration():
    "The function of PyTorch's own module, whatever stands in its place here"
    spec = importlib.util.find_spec('torch.optim._muon')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._zeropower_via_newtonschulz


@pytest.mark.parametrize('shape', [(48, 16), (16, 48), (32, 32)])
def test_muon_in_single_precision_is_muon(shape):
    from mope_clip.distill.recipe import single_on_cpu

    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = single_on_cpu(None)(matrix, *MUON)
    in_half = pytorchs_iteration()(matrix, *MUON)
    assert in_half.dtype == torch.bfloat16
    assert exact.shape == matrix.shape
    assert (exact - in_half.float()).norm() < 0.03 * exact.norm()
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ exact @ v.T  # the iteration moves singular values alone
    assert (inside - inside.diag().diag()).abs().max() < 1e-4


def test_what_lies_elsewhere_than_on_the_cpu_is_left_to_pytorch():
    from mope_clip.distill.recipe import single_on_cpu

    asked = []
    ours = single_on_cpu(lambda *args: asked.append(args))
    ours(torch.zeros(2, 3, device='meta'), *MUON)
    ours(torch.ones(2, 3), *MUON)
    assert [args[0].device.type for args in asked] == ['meta']


def test_a_processor_without_half_precision_gets_muon_in_single():
    placed = torch.optim._muon._zeropower_via_newtonschulz
    has_half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (placed.__module__ == 'mope_clip.distill.recipe') != has_half


def test_a_frozen_parameter_is_in_no_group():
    frozen = tiny_clip()
    frozen.logit_scale.requires_grad_(False)
    (adamw,) = optimizers(frozen, Recipe(pairs_seen=64))
    trained = sum(len(group['params']) for group in adamw.param_groups)
    assert trained == len(list(frozen.model.parameters())) - 1


def test_averaged_weights_follow_their_formula_and_are_shown_for_a_while():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = WeightAverage(model, 0.9)
    model.weight.data.fill_(1.0)
    average.update(1)  # a decay of 2/11
    for step in range(100, 103):
        average.update(step)
    expected = pytest.approx(1 - 2 / 11 * 0.9**3)
    with average.shown():
        assert model.weight.item() == expected
    assert model.weight.item() == 1.0 and average.averages[0].item() == expected
    average.restart()
    assert average.averages[0].item() == 1.0
    assert WeightAverage(model, 0.0).averages == []


# -- checkpoints


def test_a_run_is_named_by_what_decides_its_result(tiny, ten):
    recipe = Recipe(pairs_seen=64)
    key = run_key(tiny, ten, recipe)
    assert run_key(tiny_clip(), synth_pairs(10), replace(recipe, micro=8, workers=2)) == key
    others = [
        run_key(tiny_clip(1), ten, recipe),
        run_key(tiny, ten, replace(recipe, lr=2e-3)),
        run_key(tiny, ten, replace(recipe, weights=dict(itc=1.0))),
        run_key(tiny, ten.skip(1), recipe),
        run_key(tiny, ten, recipe, tiny_clip(1)),
        run_key(tiny, synth_pairs(11), recipe),  # begins alike
        run_key(tiny, synth_pairs(10, captions=1), recipe),
    ]
    assert len({key, *others}) == 8


def test_there_may_be_no_checkpoint(tmp_path):
    assert read_checkpoint(tmp_path, 'run') is None


def test_two_checkpoints_are_kept_and_what_killed_writers_left_is_dropped(tmp_path):
    killed = tmp_path / f'.run-000000004.pt{MARK}12345678'
    killed.write_text('of a writer that was killed')
    os.utime(killed, (0, 0))
    for step in (1, 2, 3):
        newest = write_checkpoint(tmp_path, 'run', dict(step=step, random=random_state()))
    assert len(list(tmp_path.iterdir())) == 2
    found = read_checkpoint(tmp_path, 'run')
    assert (found.state['step'], found.path) == (3, newest)
    set_random_state(found.state['random'])
    drawn = random.random(), np.random.rand(), torch.rand(1)
    set_random_state(found.state['random'])
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn


@pytest.mark.parametrize('damage', ['cut off', 'empty', 'one byte changed'])
def test_instead_of_a_damaged_checkpoint_the_one_before_is_taken(tmp_path, damage):
    for step in (1, 2):
        content = dict(step=step, weights=torch.full((999,), float(step)))
        newest = write_checkpoint(tmp_path, 'run', content)
    whole, said = newest.read_bytes(), []
    at = whole.index(torch.full((9,), 2.0).numpy().tobytes())
    damaged = {
        'cut off': whole[: len(whole) // 2],
        'empty': b'',
        'one byte changed': whole[:at] + b'?' + whole[at + 1 :],
    }
    newest.write_bytes(damaged[damage])
    assert read_checkpoint(tmp_path, 'run', said.append).state['step'] == 1
    assert 'is damaged' in said[0] and newest.name in said[0]
    assert damage != 'one byte changed' or 'checksum' in said[0]


# -- what is watched


@pytest.mark.parametrize(
    ('losses', 'factor'),
    [
        ([1.0] * 100 + [9.0] + [1.0] * 100, 3.0),  # a bad batch
        ([1.0] * 100 + [2.5] * 500, 3.0),  # worse, but not thrice as bad
        ([0.01] * 100 + [0.09] * 500, 3.0),  # close to zero
        ([1.0] * 100 + [5.0] * 500, 0.0),  # switched off
    ],
)
def test_a_rise_that_is_no_divergence_stops_nothing(losses, factor):
    check = DivergenceCheck(factor)
    assert not any([check.update(loss) for loss in losses])


def test_a_loss_that_stays_high_stops_the_run_after_its_patience():
    check = DivergenceCheck(3.0)
    stopped = [check.update(loss) for loss in [1.0] * 100 + [5.0] * 100].index(True)
    assert 150 < stopped < 175


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(out, seconds_a_step, monkeypatch):
    "What is written of a run of 30 steps"
    now = [1000.0]
    monkeypatch.setattr('mope_clip.distill.watch.time.time', lambda: now[0])
    progress = TextProgress(range(30), out)
    for step in progress:
        now[0] += seconds_a_step
        progress.report(dict(loss=1.0, sim_loss=1 / (step + 1)), 50.0)
    return out.getvalue()


def test_a_file_gets_a_line_at_once_and_then_every_ten_seconds(monkeypatch):
    text = shown(io.StringIO(), 1.0, monkeypatch)
    assert '\r' not in text and '\x1b' not in text
    lines = text.splitlines()
    assert [line.split('  ')[0] for line in lines] == [f'step {k} of 30' for k in (0, 10, 20, 30)]
    assert lines[1] == 'step 10 of 30  loss 1.000  sim 0.100  50 pairs/s  0.3 min left'


def test_a_slow_run_speaks_after_each_step(monkeypatch):
    assert len(shown(io.StringIO(), 60.0, monkeypatch).splitlines()) == 31


def test_a_terminal_gets_one_line_that_is_drawn_over_and_cleared(monkeypatch):
    text = shown(Terminal(), 1.0, monkeypatch)
    assert '\n' not in text and text.count('\r') == 32 and text.endswith('\r\x1b[K')


def test_a_line_of_the_log_counts_as_a_sign_of_life(monkeypatch):
    out, now = io.StringIO(), [0.0]
    monkeypatch.setattr('mope_clip.distill.watch.time.time', lambda: now[0])
    progress = TextProgress(range(3), out)
    for _ in progress:
        now[0] += 9.0
        progress.report({}, 1.0)
        progress.pause()
    assert len(out.getvalue().splitlines()) == 1, 'the first line alone'


def test_progress_is_switched_off_by_the_environment_and_in_other_processes(monkeypatch):
    monkeypatch.setenv('MOPE_CLIP_PROGRESS', '1')
    assert type(training_progress(range(3))) is TextProgress
    assert type(training_progress(range(3), main=False)) is TrainingProgress
    monkeypatch.setenv('MOPE_CLIP_PROGRESS', '0')
    progress = training_progress(range(3))
    assert type(progress) is TrainingProgress and list(progress) == [0, 1, 2]


# -- the loop

RECIPE = Recipe(pairs_seen=96, batch=8, lr=1e-3, weights=PUBLISHED)  # 12 steps


@pytest.fixture(scope='module')
def twenty():
    return synth_pairs(20)


@pytest.fixture(scope='module')
def teacher():
    return tiny_clip(1)


@pytest.fixture(scope='module')
def fitted(twenty, teacher):
    return fit(tiny_clip(), twenty, RECIPE, teacher, log=quiet)


def tried(pairs, teacher, cache=None, **settings):
    return fit(tiny_clip(), pairs, replace(RECIPE, **settings), teacher, log=quiet, cache=cache)


def test_a_run_freezes_what_no_loss_reaches_and_says_so_of_the_result_no_more(teacher, ten):
    student = without_layer(teacher, 1)
    spec = whole_spec(student)
    spec.text[0]['heads'] = []
    student = prune(student, spec)
    run = Run(student, ten, replace(RECIPE, freeze_scale=True), teacher)
    assert run.clip.model.training and not teacher.model.training
    frozen = [name for name, p in run.clip.model.named_parameters() if not p.requires_grad]
    ends = ['ln_1.weight', 'ln_1.bias', 'in_proj_weight', 'in_proj_bias', 'out_proj.weight']
    assert frozen[0] == 'logit_scale' and all(map(str.endswith, frozen[1:], ends))
    assert len(frozen) == 1 + len(ends)
    run.close()
    assert not run.clip.model.training
    assert all(p.requires_grad and p.grad is None for p in run.clip.model.parameters())


def test_the_student_that_is_passed_stays_as_it_was(fitted, twenty, teacher):
    student = tiny_clip()
    student.model.visual.proj.requires_grad_(False)
    student.model.train()
    made = fit(student, twenty, RECIPE, teacher, log=quiet)
    assert weights_hash(student) == weights_hash(tiny_clip()) != weights_hash(made.clip)
    assert student.model.training and not made.clip.model.training
    frozen = [n for n, p in made.clip.model.named_parameters() if not p.requires_grad]
    assert frozen == ['visual.proj']
    again = fit(tiny_clip(), twenty, RECIPE, teacher, log=quiet)
    assert weights_hash(again.clip) == weights_hash(fitted.clip), 'a second run starts anew'


def test_a_training_says_what_was_spent(fitted):
    last = fitted.history[-1]
    assert fitted.spent == dict(pairs_seen=96, train_seconds=last['seconds'])
    assert repr(fitted).startswith('Training(96 pairs in ') and 'Clip(tiny' in repr(fitted)


def test_a_step_leaves_the_weights_to_the_optimizer_step(twenty):
    run = Run(tiny_clip(), twenty, RECIPE)
    feed = iter(run.batches)
    before, losses = weights_hash(run.clip), training_step(run, feed)
    feed.close()
    assert list(losses) == ['loss', 'contrastive_loss'] and weights_hash(run.clip) == before
    norm = sum((p.grad**2).sum() for p in run.clip.model.parameters()) ** 0.5
    assert norm.item() == pytest.approx(1.0, abs=1e-4), 'the clipped gradient'
    optimizer_step(run)
    assert weights_hash(run.clip) != before and run.step == 1
    rate = run.optimizers[0].param_groups[0]['lr']
    assert rate == pytest.approx(learning_rate(RECIPE, 0), abs=1e-12)


def test_a_step_stops_where_the_loss_is_no_number_or_has_diverged(twenty):
    run = Run(tiny_clip(), twenty, RECIPE)
    feed = iter(run.batches)
    run.clip.model.visual.proj.data[0, 0] = float('nan')
    with pytest.raises(FloatingPointError, match='at step 0: lower the learning rate'):
        training_step(run, feed)
    run.clip.model.visual.proj.data[0, 0] = 0.0
    run.saved = 'run-1.pt'
    run.divergence = DivergenceCheck(0.5, mean=0.0, best=-9.0, steps_above=49)
    with pytest.raises(FloatingPointError, match=r'has diverged at step 0.*run-1\.pt'):
        training_step(run, feed)
    feed.close()


def power_cut(after):
    "A log that fails at its line number `after`"
    lines = []

    def log(line):
        lines.append(line)
        if len(lines) == after:
            raise OSError('power cut')

    return log


def shaky(folder, log, recipe, pairs, teacher):
    "A run whose pictures are shifted by chance"
    clip = tiny_clip()
    clean = clip.preprocess
    clip.preprocess = lambda im: clean(im) + random.random() / 10 + np.random.rand() / 10
    random.seed(0)
    np.random.seed(0)
    options = dict(folder=folder, every=4, checkpoint_every=3, log=log)
    return fit(clip, pairs, recipe, teacher, **options)


def divergence_in(folder):
    key = next(folder.glob('*.pt')).name.split('-')[0]
    return read_checkpoint(folder, key).state['divergence']


@pytest.mark.parametrize('how', [{}, dict(ema=0.9, micro=3)], ids=['plain', 'averaged pieces'])
def test_a_run_that_was_cut_off_ends_at_the_same_bits(tmp_path, twenty, teacher, how):
    recipe, there, here = replace(RECIPE, **how), tmp_path / 'straight', tmp_path / 'cut'
    straight = shaky(there, quiet, recipe, twenty, teacher)
    with pytest.raises(OSError, match='power cut'):
        shaky(here, power_cut(after=2), recipe, twenty, teacher)
    said = []
    resumed = shaky(here, said.append, recipe, twenty, teacher)
    assert said[0].startswith('resumed at step 6 of 12, from ') and said[0].endswith('6.pt')
    assert weights_hash(resumed.clip) == weights_hash(straight.clip) != weights_hash(tiny_clip())
    points = [[(row['step'], row['loss']) for row in x.history] for x in (straight, resumed)]
    assert points[0] == points[1] and [row['pairs'] for row in resumed.history] == [32, 64, 96]
    assert divergence_in(there) == divergence_in(here)
    names = [path.name.split('-')[1] for path in sorted(here.glob('*.pt'))]
    assert names == ['000000009.pt', '000000012.pt']
    said.clear()
    finished = shaky(here, said.append, recipe, twenty, teacher)
    assert len(said) == 1 and 'resumed at step 12 of 12' in said[0], 'a finished run costs nothing'
    assert weights_hash(finished.clip) == weights_hash(straight.clip)


@pytest.mark.parametrize(
    ('options', 'kept'),
    [
        (dict(checkpoint_every=5), [10, 12]),
        (dict(checkpoint_every=1000), [12]),
        (dict(checkpoint_every=1000, checkpoint_seconds=0.0), [11, 12]),
    ],
)
def test_a_checkpoint_is_due_by_steps_or_by_time(tmp_path, twenty, options, kept):
    fit(tiny_clip(), twenty, RECIPE, folder=tmp_path, log=quiet, **options)
    assert [int(path.stem.split('-')[1]) for path in sorted(tmp_path.glob('*.pt'))] == kept


def test_nothing_is_kept_while_the_loss_is_above_its_limit(tmp_path, twenty, monkeypatch):
    def above(check, loss):
        check.steps_above = 1

    monkeypatch.setattr(DivergenceCheck, 'update', above)
    fit(tiny_clip(), twenty, RECIPE, folder=tmp_path, log=quiet, checkpoint_every=5)
    kept = [int(path.stem.split('-')[1]) for path in tmp_path.glob('*.pt')]
    assert kept == [12], 'the end alone'


def test_threads_change_no_bit_and_pieces_the_last_digits(fitted, twenty, teacher):
    assert weights_hash(tried(twenty, teacher, workers=2).clip) == weights_hash(fitted.clip)
    assert 0 < distance(tried(twenty, teacher, micro=3).clip, fitted.clip) < 1e-3
    again = tried(twenty, teacher, checkpoint_activations=True)
    assert distance(again.clip, fitted.clip) < 1e-6
    assert distance(tried(twenty, teacher, ema=0.9).clip, fitted.clip) > 1e-5


def test_a_cache_changes_the_curve_by_rounding_alone(twenty, teacher, tmp_path):
    features = dict(weights=dict(itc=1.0, sim=1.0, feat=1000.0))
    kept = tried(twenty, teacher, cache=tmp_path, **features)
    fresh = tried(twenty, teacher, **features)
    assert kept.history[-1]['loss'] == pytest.approx(fresh.history[-1]['loss'], abs=1e-3)
    assert distance(kept.clip, fresh.clip) < 5e-3  # which AdamW enlarges


def test_a_cache_excludes_hidden_states_and_needs_a_teacher(ten, teacher, tmp_path):
    with pytest.raises(ValueError, match='set the weight of L_hidn to 0'):
        Run(tiny_clip(), ten, RECIPE, teacher, RunOptions(cache=tmp_path))
    with pytest.raises(ValueError, match='there is none'):
        train(tiny_clip(), ten, 64, cache=tmp_path)


def test_a_model_of_double_precision_is_trained_in_it(twenty):
    double = tiny_clip()
    double.model.double()
    made = fit(double, twenty, RECIPE, log=quiet)
    assert made.clip.logit_scale.dtype == torch.float64


def test_a_model_without_heads_in_a_layer_is_trained_as_it_is(twenty, teacher):
    spec = whole_spec(teacher)
    spec.vision[1]['heads'], spec.text[0]['neurons'] = [], []
    hollow = prune(teacher, spec)
    made = fit(hollow, twenty, RECIPE, teacher, log=quiet)
    gains = [clip.vision.blocks[1].ln_1.weight for clip in (hollow, made.clip)]
    assert torch.equal(*gains) and made.history[-1]['loss'] > 0


def test_no_checkpoint_holds_what_is_no_number(tmp_path, twenty):
    clip, seen = tiny_clip(), []
    clean = clip.preprocess

    def poison(im):
        seen.append(1)
        return clean(im) * (float('nan') if len(seen) > 60 else 1.0)  # in the eighth batch

    clip.preprocess = poison
    with pytest.raises(FloatingPointError, match=r'-000000006\.pt'):
        fit(clip, twenty, RECIPE, folder=tmp_path, checkpoint_every=3, log=quiet)
    states = [torch.load(path, weights_only=True)['weights'] for path in tmp_path.glob('*.pt')]
    assert states and all(x.isfinite().all() for state in states for x in state.values())


def test_a_rate_that_is_far_too_high_is_named_as_the_cause(tmp_path, twenty):
    recipe = replace(RECIPE, lr=1e30, warmup=0.0)
    with pytest.raises(FloatingPointError, match='lower the learning rate'):
        fit(tiny_clip(), twenty, recipe, folder=tmp_path, checkpoint_every=1, log=quiet)


def test_a_frozen_scale_and_a_frozen_tower_stay_as_they_were(twenty):
    still = tiny_clip()
    still.model.logit_scale.data.fill_(5.0)  # beyond the limit
    still.model.visual.requires_grad_(False)
    made = fit(still, twenty, Recipe(pairs_seen=16, batch=8, freeze_scale=True), log=quiet)
    before, after = still.model.state_dict(), made.clip.model.state_dict()
    assert made.clip.logit_scale.item() == 5.0
    equal = {name: torch.equal(before[name], after[name]) for name in before}
    assert all(same for name, same in equal.items() if name.startswith('visual.'))
    assert not all(equal.values())


def test_a_model_of_which_nothing_is_trainable_is_refused(twenty):
    still = tiny_clip()
    still.model.requires_grad_(False)
    with pytest.raises(ValueError, match='Nothing of the model is trainable'):
        fit(still, twenty, replace(RECIPE, freeze_scale=True), log=quiet)


# -- learned masks


def test_gates_are_the_masks_of_a_specification(tiny, ten):
    model = gated(tiny)
    trainable = {
        n.rsplit('.')[-1] for n, p in model.clip.model.named_parameters() if p.requires_grad
    }
    assert trainable == {'zeta'}
    images = ten['image']
    torch.testing.assert_close(
        encode_images(model.clip, images), encode_images(tiny, images), atol=1e-6, rtol=0
    )
    spec = plan_width(random_scores(tiny), 0.5)
    with torch.no_grad():
        for (tower, layer), gates in model.gates.items():
            kept = getattr(spec, tower)[layer]
            for gate, indices in ((gates.heads, kept['heads']), (gates.neurons, kept['neurons'])):
                gate.zeta.copy_(torch.zeros_like(gate.zeta).index_fill(0, torch.tensor(indices), 1))
    torch.testing.assert_close(
        encode_images(model.clip, images),
        encode_images(masked(tiny, spec), images),
        atol=1e-5,
        rtol=0,
    )


def test_learned_masks_are_a_table_and_leave_the_model_alone(tiny, ten):
    options = dict(groups=2, pairs_seen=64, batch=8)
    table, again = (learned_masks(tiny, ten, **options) for _ in range(2))
    assert set(table.module) == {'head', 'ffn', 'layer'}
    assert table.score.between(0, 1.5).all() and table.score.nunique() > 4
    assert table.score.tolist() == again.score.tolist()
    assert weights_hash(tiny) == weights_hash(tiny_clip())
    hard = learned_masks(tiny, ten, **{**options, 'pairs_seen': 480}, pull=1.0)
    assert 0 <= hard.score.min() and hard.score.mean() < table.score.mean()


def test_a_search_of_less_than_a_batch_is_refused(tiny, ten):
    with pytest.raises(ValueError, match='less than one batch'):
        learned_masks(tiny, ten, pairs_seen=4)


# -- teachers


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A data folder with the tiny model as zero-shot teacher, and squares for every task"
    asked = []

    def squares(task, split='train', **where):
        asked.append((task, split, where))
        return synth_pairs(16)

    monkeypatch.setattr('mope_clip.distill.teachers.stream_pairs', squares)
    monkeypatch.setenv('MOPE_CLIP_DATA', str(tmp_path))
    save_open_clip(tiny_clip(), tmp_path / 'teacher')
    return tmp_path, asked


SHORT = dict(pairs_seen=16, batch=8, log=quiet)


def test_a_teacher_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('MOPE_CLIP_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='set MOPE_CLIP_DATA'):
        embedded_teacher()
    with pytest.raises(FileNotFoundError, match='teacher-openmoji is not in'):
        embedded_teacher('openmoji')


def test_a_teacher_is_kept_in_half_precision_and_returned_as_reloaded(home):
    folder, said = home[0] / 'teacher-openmoji', []
    tuned = finetune_teacher('openmoji', folder, **{**SHORT, 'log': said.append})
    assert 'goes on from' in said[0] and list(home[0].glob('teacher-openmoji-run/*.pt'))
    assert weights_hash(embedded_teacher('openmoji')) == weights_hash(tuned.clip)
    assert weights_hash(tuned.clip) != weights_hash(embedded_teacher())
    state = tuned.clip.model.state_dict().values()
    assert all(torch.equal(x, x.half().float()) for x in state if x.is_floating_point())
    assert [row['pairs'] for row in tuned.history] == [16]


def test_any_model_is_fine_tuned_on_any_task(home):
    folder, asked = home
    data = dict(root='images')
    finetune_teacher('coco', folder / 'coco', str(folder / 'teacher'), data=data, **SHORT)
    assert asked == [('coco', 'train', data)]
    record = json.loads((folder / 'coco' / 'made_by.json').read_text())
    assert record['root'] == 'images' and record['pairs_seen'] == 16 and record['lr'] == 1e-5


def test_what_a_teacher_is_made_from_and_for_how_long_must_be_said(home):
    with pytest.raises(ValueError, match='Which model is to be fine-tuned on coco'):
        finetune_teacher('coco', home[0] / 'coco')
    with pytest.raises(ValueError, match='Pass pairs_seen='):
        finetune_teacher('coco', home[0] / 'coco', str(home[0] / 'teacher'))


def test_settings_of_a_task_are_settings_of_a_recipe():
    assert 'pairs_seen' not in task_settings('coco')
    assert task_settings('coco')['lr'] < task_settings('openmoji')['lr']
    for task in ('openmoji', 'coco'):
        Recipe(**{'pairs_seen': 1000, **task_settings(task)})


def test_the_log_says_which_teacher_it_is(home):
    folder, said = home
    said = []
    zero_shot = teacher_for('coco', log=said.append)
    named = teacher_for('coco', str(folder / 'teacher'), log=said.append)
    with pytest.raises(FileNotFoundError, match='teacher-openmoji'):
        teacher_for('openmoji', log=said.append)
    expected = 'has never seen coco', 'taken as fine-tuned', 'fine-tuned on openmoji'
    assert all(words in line for words, line in zip(expected, said, strict=True))
    hashes = {weights_hash(clip) for clip in (zero_shot, named, embedded_teacher())}
    assert len(hashes) == 1


def test_a_named_teacher_is_trained_once_and_never_taken_for_another(home):
    folder = home[0]
    options = dict(SHORT, folder=folder / 'coco')
    first, found = (teacher_for('coco', str(folder / 'teacher'), **options) for _ in range(2))
    assert weights_hash(first) == weights_hash(found) != weights_hash(embedded_teacher())
    odd = r'made otherwise \(pairs_seen 16 and not 32\): choose another out_dir'
    with pytest.raises(ValueError, match=odd):
        teacher_for('coco', str(folder / 'teacher'), **{**options, 'pairs_seen': 32})


# -- the front door


@pytest.fixture(scope='module')
def squares():
    return synth_pairs(32, 'train')


@pytest.fixture(scope='module')
def watched():
    return synth_pairs(16, captions=1)


@pytest.fixture(scope='module')
def trained(squares, watched):
    settings = dict(batch=16, lr=3e-3, every=10, log=quiet)
    return train(tiny_clip(), squares, 640, validation=watched, **settings)


@pytest.fixture(scope='module')
def pruned(trained):
    return prune(trained.clip, plan_width(random_scores(trained.clip), keep=0.5))


def test_a_teacher_learns_and_its_curve_is_kept(trained, watched):
    history = trained.history
    assert [row['pairs'] for row in history] == [160, 320, 480, 640]
    names = {'step', 'pairs', 'lr', 'loss', 'contrastive_loss', 'mean_recall'}
    assert names <= set(history[-1]) and history[-1]['loss'] < history[0]['loss']
    assert history[-1]['mean_recall'] == retrieval(trained.clip, watched)['mean_recall']
    assert history[-1]['mean_recall'] > retrieval(tiny_clip(), watched)['mean_recall'] + 10


def test_averaged_weights_are_what_is_watched_and_returned(trained, squares, watched):
    settings = dict(batch=16, lr=3e-3, ema=0.9, log=quiet)
    averaged = train(tiny_clip(), squares, 640, validation=watched, **settings)
    last = averaged.history[-1]
    assert last['mean_recall'] == retrieval(averaged.clip, watched)['mean_recall']
    assert last['loss'] == trained.history[-1]['loss'], 'the same run'
    assert weights_hash(averaged.clip) != weights_hash(trained.clip), 'another set of weights'


def test_a_copy_of_the_teacher_has_nothing_to_learn(trained, ten):
    teacher = trained.clip
    images, ids, _ = next(iter(Batches(teacher, ten, batch=4)))
    with torch.no_grad():
        outputs = Forward(teacher.copy(), True)(images, ids)
        taught = Teacher(teacher)(images, ids, hidden=True)
    terms = MopeLoss(LossContext(teacher, teacher))(**outputs, **taught)
    assert list(terms) == ALL_TERMS and terms['feat_loss'] == terms['hidden_loss'] == 0


def test_a_pruned_model_comes_back_to_its_teacher(trained, pruned, squares):
    made = distill(
        pruned, trained.clip, squares, pairs_seen=480, batch=16, lr=3e-3, every=5, log=quiet
    )
    first, last = made.history[0], made.history[-1]
    assert last['pairs'] == 480 and last['feat_loss'] < 0.5 * first['feat_loss']
    assert last['loss'] < 0.5 * first['loss']
    assert made.clip.logit_scale.item() == pruned.logit_scale.item()
    assert [block.heads for block in made.clip.vision.blocks] == [2, 2, 2]


def test_with_a_cache_the_run_is_the_same(trained, pruned, squares, tmp_path):
    def recovered(**how):
        student, teacher = pruned.copy(), trained.clip.copy()
        for clip in (student, teacher):
            clip.model.double()  # AdamW enlarges rounding where a gradient is next to nothing
        weights = dict(itc=1, sim=1, feat=1000)
        settings = dict(pairs_seen=64, batch=16, weights=weights, log=quiet)
        return distill(student, teacher, squares, **settings, **how)

    kept, fresh = recovered(cache=tmp_path), recovered()
    assert 'hidden_loss' not in fresh.history[-1]
    assert distance(kept.clip, fresh.clip) < 1e-5


@pytest.mark.parametrize(
    ('settings', 'error', 'said'),
    [
        (dict(stage='both'), ValueError, "not 'both'"),
        (dict(temperature=2.0), TypeError, 'temperature'),
        (dict(cache='.', weights=PUBLISHED), ValueError, 'leave out cache'),
        (dict(weights=dict(hidden=1.0)), ValueError, "no loss 'hidden'"),
    ],
)
def test_what_cannot_be_right_is_refused_before_the_first_step(
    trained, pruned, ten, settings, error, said
):
    with pytest.raises(error, match=said):
        distill(pruned, trained.clip, ten, **settings)


def test_a_teacher_from_which_the_student_was_not_made_is_refused(pruned, ten):
    with pytest.raises(ValueError, match='not of the same base model'):
        distill(pruned, deeper_clip(), ten)


def test_training_refuses_unknown_settings_and_too_small_a_budget(ten):
    with pytest.raises(TypeError, match='epochs'):
        train(tiny_clip(), ten, 64, epochs=3)
    with pytest.raises(ValueError, match='less than one batch'):
        train(tiny_clip(), ten, 8)
