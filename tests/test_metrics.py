"What modules are worth: Z by hand, the engine against brute force, stores, the rivals, resolution."

import sys
import tempfile
from itertools import chain
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image
from open_clip.loss import ClipLoss

from mope_clip.clip import TOWERS, keep_count, prune, tiny_clip, weights_hash, whole_spec
from mope_clip.data import suites, synth_pairs
from mope_clip.evaluate import encode, images_of, owners, ranks, recalls, retrieval, zero_shot
from mope_clip.metrics import (
    HITS,
    METRICS,
    MODULES,
    ScoringTask,
    activation,
    competitions,
    contributions,
    every_other,
    fisher,
    kept_probability,
    magnitude,
    mope,
    mope_plain,
    random_scores,
    resolved,
    score_by,
    taylor,
    unimodal,
)
from mope_clip.metrics.engine import (
    LayerInputs,
    ablations,
    block_macs,
    features_without,
    layer_macs,
    tokens_of,
)
from mope_clip.metrics.mope import (
    macs_of_layers,
    modules_of,
    preview,
    ranks_together,
    score_all,
)
from mope_clip.metrics.table import COLUMNS, check_scoring, neuron_groups

KEYS = ['tower', 'module', 'layer', 'index']
NAMES = (
    'mope',
    'unimodal',
    'taylor',
    'fisher',
    'activation',
    'obs',
    'magnitude',
    'every_other',
    'random',
)


@pytest.fixture(scope='module')
def clip():
    return tiny_clip()


@pytest.fixture(scope='module')
def pairs():
    return synth_pairs(32)


@pytest.fixture(scope='module')
def captions(pairs):
    return [caption for own in pairs['captions'] for caption in own]


@pytest.fixture(scope='module')
def inputs(clip, pairs, captions):
    "Images and token ids of all captions, by tower"
    return dict(vision=images_of(clip, pairs['image']), text=clip.tokenizer(captions))


@pytest.fixture(scope='module')
def labelled(pairs):
    "The same squares, labelled in turn by four of the eight colours of an embedded suite"
    names = list(suites()['colour'].classes)
    columns = Features(image=Image(), label=ClassLabel(names=names))
    images = list(pairs['image'])
    return Dataset.from_dict(dict(image=images, label=[0, 2, 3, 4] * 8), features=columns)


def close(some, others, atol):
    np.testing.assert_allclose(np.asarray(some), np.asarray(others), rtol=0, atol=atol)


# --- Z by hand

ONE_EACH = torch.arange(4)
# caption 1 belongs to image 1 but looks like image 0: a tie counts against the model
FOUR = torch.eye(4), torch.eye(4)[[0, 0, 2, 3]]


@pytest.mark.parametrize(
    'z, points',
    [
        ('TR@1', [0, 0, 100, 100]),
        ('IR@1', [100, 0, 100, 100]),
        ('TR@5', [100] * 4),
        ('mean_recall', [500 / 6, 400 / 6, 100, 100]),
    ],
)
def test_what_four_images_contribute_by_hand(z, points):
    close(contributions(z, *FOUR, ONE_EACH), points, atol=1e-9)


def random_features(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def test_the_mean_of_contributions_is_the_recall_that_is_reported():
    images, captions = random_features(20, 8), random_features(50, 8, seed=1)
    extra = torch.randint(20, (30,), generator=torch.Generator().manual_seed(2))
    uneven = torch.cat([torch.arange(20), extra]).sort().values
    each = torch.bincount(uneven)
    assert each.min() == 1 and each.max() > 3
    found = recalls(*ranks(images, captions, uneven))
    assert set(HITS) == set(found)
    for z in HITS:
        mean = contributions(z, images, captions, uneven).mean().item()
        assert mean == pytest.approx(found[z], abs=1e-4)


def test_contrastive_is_open_clips_loss_with_the_sign_turned():
    images, captions = random_features(2, 6, 8)
    mean = contributions('contrastive', images, captions, torch.arange(6), scale=10.0).mean()
    loss = ClipLoss()(images, captions, torch.tensor(10.0))
    assert mean.item() == pytest.approx(-100 * loss.item(), abs=1e-3)


RIGHT = np.exp(2) / (np.exp(2) + 1)  # two orthogonal pairs at scale 2: logits 2 and 0


@pytest.mark.parametrize(
    'z, by_hand', [('contrastive', 100 * np.log(RIGHT)), ('soft_recall', 100 * RIGHT)]
)
def test_smooth_z_of_two_pairs_by_hand(z, by_hand):
    found = contributions(z, torch.eye(2), torch.eye(2), torch.arange(2), scale=2.0)
    close(found, [by_hand] * 2, atol=1e-6)


@pytest.mark.parametrize('z', ['contrastive', 'soft_recall'])
def test_saying_the_same_twice_changes_nothing(z):
    images, captions = random_features(2, 6, 8)
    own, twice = torch.arange(6), torch.arange(6).repeat_interleave(2)
    once = contributions(z, images, captions, own, scale=10.0)
    again = contributions(z, images, captions.repeat_interleave(2, 0), twice, scale=10.0)
    close(again, once, atol=1e-9)


def test_large_galleries_are_taken_in_blocks():
    images, captions = random_features(2, 3000, 8).double()
    assert 3000 > 2**23 // 3000  # more than one block
    logits = 10 * images @ captions.T
    both = (logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()) * 50
    found = contributions('contrastive', images, captions, torch.arange(3000), scale=10.0)
    close(found, both, atol=1e-6)


def test_a_hit_appears_at_once_and_a_likelihood_rises_all_along():
    hit, smooth = [], []
    for share in np.linspace(0, 1, 22):
        wanders = torch.eye(4)
        wanders[0] = F.normalize(torch.tensor([share, 1 - share, 0, 0]), dim=0)
        features = wanders, torch.eye(4), ONE_EACH
        hit.append(contributions('TR@1', *features)[0].item())
        smooth.append(contributions('contrastive', *features, scale=5.0)[0].item())
    assert hit == [0.0] * 11 + [100.0] * 11
    assert (np.diff(smooth) > 0).all()


def test_a_function_gives_a_value_an_image_or_one_for_all():
    found = contributions(lambda images, captions: (images * captions).sum(1), *FOUR, ONE_EACH)
    assert found.tolist() == [1, 0, 1, 1]
    assert contributions(lambda images, captions: 7.0, *FOUR, ONE_EACH).tolist() == [7]


def test_an_unknown_z_is_refused_with_the_list():
    with pytest.raises(ValueError, match='choose one of mean_recall, TR@1'):
        contributions('recall', *FOUR, ONE_EACH)


# --- a task


def test_a_task_encodes_equal_captions_once(clip, pairs, captions):
    task = ScoringTask(clip, pairs)
    assert len(captions) == 64 and len(task.x['text']) == len(set(captions)) < 64
    assert torch.equal(task.x['text'][task.caption], clip.tokenizer(captions))


def test_z_of_the_whole_model_is_what_retrieval_reports(clip, pairs):
    mean = ScoringTask(clip, pairs).base.mean().item()
    assert mean == pytest.approx(retrieval(clip, pairs)['mean_recall'], abs=1e-4)


@pytest.mark.parametrize('tower', TOWERS)
def test_what_is_unchanged_loses_nothing_and_what_is_silent_all(tower, clip, pairs):
    task = ScoringTask(clip, pairs)
    assert task.drop(tower, task.dense[tower]).tolist() == [0] * 32
    silent = torch.zeros_like(task.dense[tower])  # all tie: the worst rank
    assert task.drop(tower, silent).tolist() == task.base.tolist()


def test_labelled_images_make_accuracy_a_z(clip, labelled):
    by_class = ScoringTask(clip, labelled, 'zero_shot')
    accuracy = zero_shot(clip, labelled)['top1']
    assert by_class.base.mean().item() == pytest.approx(accuracy, abs=1e-4)
    assert set(by_class.base.tolist()) == {0, 100}


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(z='zero_shot'), 'needs labelled images'),
        (dict(precision='fp8'), "precision is 'fp32', 'bf16' or 'fp16', not 'fp8'"),
        (dict(batch=0), 'at least 1, not 0'),
    ],
)
def test_what_no_task_can_be_made_of_is_refused(options, sentence, clip, pairs):
    with pytest.raises(ValueError, match=sentence):
        ScoringTask(clip, pairs, **options)


def test_labelled_images_alone_have_no_recall(clip, labelled):
    with pytest.raises(ValueError, match='needs image-text pairs'):
        ScoringTask(clip, labelled)


def test_a_model_in_training_mode_is_refused(clip, pairs):
    learning = clip.copy()
    learning.model.train()
    with pytest.raises(ValueError, match='training mode'):
        ScoringTask(learning, pairs)


# --- what may be scored


def test_towers_and_modules_are_one_name_or_several(pairs):
    assert check_scoring(pairs, TOWERS, MODULES) == (TOWERS, MODULES)
    assert check_scoring(pairs, 'text', 'attn') == (('text',), ('attn',))


def test_the_test_split_is_scored_by_those_who_insist():
    test_pairs = synth_pairs(8, 'test')
    with pytest.raises(ValueError, match='score on validation pairs'):
        check_scoring(test_pairs, TOWERS, MODULES)
    assert check_scoring(test_pairs, TOWERS, MODULES, allow_test=True)[0] == TOWERS


@pytest.mark.parametrize(
    'n, towers, modules, sentence',
    [
        (8, ('audio',), MODULES, 'towers must be among'),
        (8, TOWERS, ('head', 'neuron'), 'not head, neuron'),
        (8, TOWERS, (), 'not empty'),
        (1, TOWERS, MODULES, 'at least 2 are needed, not 1'),
    ],
)
def test_what_cannot_be_scored_is_refused(n, towers, modules, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_scoring(synth_pairs(n), towers, modules)


def test_pairs_are_a_data_set():
    with pytest.raises(ValueError, match='not a list'):
        check_scoring([], TOWERS, MODULES)


def test_images_without_a_caption_are_refused(pairs):
    mute = pairs.map(lambda row, i: dict(captions=row['captions'] if i else []), with_indices=True)
    with pytest.raises(ValueError, match='1 of 32 images have no caption'):
        check_scoring(mute, TOWERS, MODULES)


# --- candidates


def test_neurons_are_cut_in_their_order():
    importance = torch.tensor([0.1, 0.9, 0.3, 0.8, 0.2, 0.7])
    order = importance.argsort(descending=True)
    assert neuron_groups(order, 3) == [[1, 3], [5, 2], [4, 0]]
    assert neuron_groups(torch.arange(6), 2) == [[0, 1, 2], [3, 4, 5]]


def test_the_first_groups_are_one_larger_where_neurons_do_not_divide():
    parts = neuron_groups(torch.randperm(10, generator=torch.Generator().manual_seed(0)), 4)
    assert [len(part) for part in parts] == [3, 3, 2, 2]
    assert sorted(chain(*parts)) == list(range(10))


@pytest.mark.parametrize('groups, sentence', [(7, 'between 1 and the 6 neurons'), (0, 'not 0')])
def test_groups_are_no_more_than_neurons(groups, sentence):
    with pytest.raises(ValueError, match=sentence):
        neuron_groups(torch.arange(6), groups)


@pytest.fixture(scope='module')
def todo(clip, pairs):
    return modules_of(clip, pairs, groups=4)


def test_each_layer_lists_heads_then_groups_then_itself(todo):
    assert list(todo) == [('vision', 0), ('vision', 1), ('vision', 2), ('text', 0), ('text', 1)]
    heads, groups = ([(kind, i) for i in range(4)] for kind in ('head', 'ffn'))
    assert todo['text', 1][0] == [*heads, *groups, ('layer', 0)]


def test_rewired_groups_are_no_slices_of_the_same_neurons(clip, pairs, todo):
    rewired = todo['text', 1][1]
    slices = modules_of(clip, pairs, groups=4, rewire=False)['text', 1][1]
    assert slices == [list(range(i, i + 32)) for i in (0, 32, 64, 96)]
    assert rewired != slices and sorted(chain(*rewired)) == list(range(128))


def test_layers_of_one_tower_alone(clip, pairs):
    found = modules_of(clip, pairs, ('text',), ('layer',))
    assert found == {('text', layer): ([('layer', 0)], []) for layer in (0, 1)}


def test_groups_are_a_whole_number(clip, pairs):
    with pytest.raises(ValueError, match=r'groups is a whole number, not 2\.5'):
        modules_of(clip, pairs, groups=2.5)


def test_a_rank_of_all_layers_is_one_candidate(clip, pairs, todo):
    at_once = ranks_together(todo)
    wanted, splits = at_once['text', 'all']
    assert wanted == [('ffn', group) for group in range(4)]
    assert splits == {layer: todo['text', layer][1] for layer in (0, 1)}
    assert at_once['text', 1][0] == [*(('head', i) for i in range(4)), ('layer', 0)]
    groups_alone = ranks_together(modules_of(clip, pairs, modules=('ffn',), groups=4))
    assert list(groups_alone) == [('vision', 'all'), ('text', 'all')]


def test_the_bar_counts_what_the_preview_counts(clip, pairs, todo, monkeypatch):
    "Each layer moves it by its share of the seconds that were foretold"
    seen = []

    class Shown:
        shown = 'log'

        def __init__(self, total, what):
            assert total == 100

        def update(self, done):
            seen.append(done)

        def close(self):
            seen.append('closed')

    room = sys.modules['mope_clip.metrics.mope']  # the name is the function's
    monkeypatch.setattr(room, 'Progress', Shown)
    monkeypatch.setattr(room, 'seconds_per_mac', lambda *_: 1.0)
    task = ScoringTask(clip, pairs)
    macs = macs_of_layers(task, todo)
    score_all(task, todo)
    *steps, last, closed = seen
    assert (last, closed) == (100, 'closed') and steps == sorted(steps)
    first = macs[next(iter(todo))] / sum(macs.values())
    batches = -(-len(pairs) // task.items_at_once('vision'))
    assert abs(steps[batches - 1] - 100 * first) <= 1


def test_a_preview_counts_what_is_saved(clip, pairs, todo):
    task = ScoringTask(clip, pairs)
    found = preview(task, todo)
    assert found['modules'] == 5 * (4 + 4 + 1)
    assert found['brute_macs'] == 45 * found['dense_macs']
    assert found['dense_macs'] < found['engine_macs'] < found['brute_macs'] / 2
    assert found['seconds'] > 0
    layers = preview(task, modules_of(clip, pairs, modules=('layer',)))
    assert layers['engine_macs'] < found['engine_macs'] / 3


# --- the engine, layer by layer


@pytest.fixture(scope='module')
def stream(clip, inputs):
    "The input of the first vision block"
    with torch.no_grad():
        return clip.vision.embed(inputs['vision'][:12])[0]


GROUPS = [list(range(0, 100)), list(range(100, 128))]


@torch.no_grad()
def test_a_layer_without_each_of_its_modules(clip, stream):
    block, wanted = clip.vision.blocks[0], [('head', 2), ('ffn', 1), ('layer', 0)]
    found = dict(ablations(block, stream, None, wanted, GROUPS))
    close(found['dense', 0], block(stream), atol=1e-5)
    zeroed = clip.copy().vision.blocks[0]
    zeroed.attn.out_proj.weight[:, 16:24] = 0  # head 2, of width 8
    close(found['head', 2], zeroed(stream), atol=1e-5)
    assert torch.equal(found['layer', 0], stream)
    assert (found['ffn', 1] - found['dense', 0]).abs().max() > 1e-4


@torch.no_grad()
def test_one_token_of_a_layer_is_computed_alone(clip, stream):
    block, first = clip.vision.blocks[0], torch.zeros(len(stream), dtype=torch.long)
    whole = dict(ablations(block, stream, None, [('head', 2)], GROUPS))['head', 2]
    one = dict(ablations(block, stream, None, [('head', 2)], GROUPS, first))['head', 2]
    assert one.shape == (12, 1, 32)
    close(one, whole[:, :1], atol=1e-5)


def test_captions_are_taken_in_order_of_length(clip):
    captions = [caption for own in synth_pairs(12, captions=3)['captions'] for caption in own]
    ids = clip.tokenizer(captions)
    kept = LayerInputs(clip.text, ids, 8)
    lengths = [part[2].shape[1] for part in kept.parts]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] <= ids.shape[1]
    assert torch.equal(kept.restore(kept.order.float()), torch.arange(len(ids)).float())


def test_memory_and_file_hold_the_same(clip, inputs):
    here, mapped = (LayerInputs(clip.text, inputs['text'], 8, limit=limit) for limit in (4e9, 0))
    assert mapped.folder and not here.folder
    for some, others in zip(here.parts, mapped.parts, strict=True):
        assert torch.equal(some[0], others[0])


def test_features_without_a_head_are_those_of_a_zeroed_model(clip, inputs):
    images = inputs['vision'][:12]
    kept = LayerInputs(clip.vision, images, 5)
    for layer in range(3):
        found = features_without(kept, layer, [('head', 1), ('layer', 0)], [])['head', 1]
        witness = clip.copy()
        with torch.no_grad():
            witness.vision.blocks[layer].attn.out_proj.weight[:, 8:16] = 0
        close(found, encode(witness, 'vision', images), atol=1e-5)
        if layer == 0:
            assert (found - encode(clip, 'vision', images)).abs().max() > 1e-3


def test_what_comes_later_is_computed_again(clip):
    tower = clip.vision
    by_layer = [layer_macs(tower, layer, [('head', 0)], tower.tokens, 8) for layer in range(3)]
    assert by_layer[0] > by_layer[1] > by_layer[2]
    dense = sum(block_macs(tower.blocks[0], 17))
    assert layer_macs(tower, 0, [], tower.tokens, 8) == dense  # nothing is wanted


def test_tokens_of_an_item_are_counted(clip, inputs):
    assert tokens_of(clip.vision, inputs['vision']) == 17
    mean = clip.text.lengths(inputs['text']).float().mean().item()
    assert tokens_of(clip.text, inputs['text'], 1) == pytest.approx(mean, abs=1e-5)


# --- the engine against brute force


def without(model, tower, module, layer, index, neurons):
    "A copy of `model` in which one module is zeroed, or its layer skipped"
    copy = model.copy()
    block = copy.tower(tower).blocks[layer]
    head, proj = block.attn.out_proj, block.mlp.c_proj
    with torch.no_grad():
        if module == 'head':
            head.weight[:, index * block.head_dim : (index + 1) * block.head_dim] = 0
        if module == 'ffn':
            proj.weight[:, list(neurons)] = 0
        for linear in {'attn': [head], 'mlp': [proj]}.get(module, []):
            linear.weight.zero_()
            linear.bias.zero_()
    if module == 'layer':
        del copy.tower(tower).blocks[layer]
    return copy


class Witness:
    "Features and contributions by encoding everything again"

    def __init__(self, inputs, owner):
        self.inputs, self.owner = inputs, owner

    def features(self, model):
        return tuple(encode(model, tower, self.inputs[tower]) for tower in TOWERS)

    def by_image(self, model):
        scale = model.logit_scale.exp().item()
        return contributions('contrastive', *self.features(model), self.owner, scale).numpy()

    def drop(self, model, row):
        smaller = without(model, *(getattr(row, name) for name in [*KEYS, 'neurons']))
        return self.by_image(model) - self.by_image(smaller)


@pytest.fixture(scope='module')
def witness(inputs, pairs):
    return Witness(inputs, owners(pairs['captions']))


@pytest.fixture(scope='module')
def table(clip, pairs):
    return mope(clip, pairs, modules=MODULES, groups=4, z='contrastive')


def check_rows(model, table, witness):
    "Scores and standard errors of every row, computed the long way"
    n = len(witness.inputs['vision'])
    for row in table.itertuples(index=False):
        difference = witness.drop(model, row)
        assert row.score == pytest.approx(difference.mean(), abs=1e-3)
        assert row.se == pytest.approx(difference.std(ddof=1) / np.sqrt(n), abs=1e-3)
        assert row.n == n


def test_every_row_is_what_brute_force_finds(clip, table, witness):
    assert list(table.columns) == COLUMNS
    assert len(table) == (3 + 2) * (4 + 4 + 3)  # heads, groups; layer, attn, mlp
    check_rows(clip, table, witness)
    assert table.score.abs().max() > 1  # there was something to compare


@pytest.fixture(scope='module')
def uneven(clip):
    "Different numbers of heads in each layer, and one layer without any"
    spec = whole_spec(clip)
    spec.vision[0]['heads'], spec.vision[1]['heads'] = [0, 3], []
    spec.text[1]['neurons'] = list(range(40))
    return prune(clip, spec)


def test_every_row_of_a_model_that_was_pruned_before(uneven, pairs, witness):
    found = mope(uneven, pairs, modules=MODULES, groups=4, z='contrastive')
    heads = found[found.module == 'head'].groupby(['tower', 'layer']).size().to_dict()
    assert heads == {('text', 0): 4, ('text', 1): 4, ('vision', 0): 2, ('vision', 2): 4}
    assert len(found) == 2 + 0 + 4 + 4 * 2 + 5 * (4 + 3)  # heads; groups, layer, attn, mlp
    check_rows(uneven, found, witness)


def apart(some, others):
    "How far the features of two models are apart, both towers taken together"
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


def test_the_features_themselves_are_those_of_brute_force(clip, pairs, table, witness):
    seen = []

    def keep(images, captions):
        seen.append((images, captions))
        return images.sum(1)

    kept = mope(clip, pairs, modules=MODULES, groups=4, z=keep)
    assert len(seen) == len(kept) + 1
    whole = witness.features(clip)
    rows = [tuple(getattr(row, name) for name in [*KEYS, 'neurons']) for row in table.itertuples()]
    truths = [witness.features(without(clip, *row)) for row in rows]
    assert max(min(apart(truth, features) for features in seen) for truth in truths) < 1e-5
    assert min(apart(truth, whole) for truth in truths) > 1e-3  # each module does something
    hard = mope(clip, pairs, modules=MODULES, groups=4)
    dense = hard.attrs['mope']['z_dense']
    from_features = sorted(
        contributions('mean_recall', *features, witness.owner).mean().item() for features in seen
    )
    close(sorted([dense, *(dense - hard.score)]), from_features, atol=1e-9)


def test_the_plain_definition_gives_the_same(clip, pairs, table):
    row = table.query("tower == 'text' and module == 'ffn' and layer == 1").iloc[2]
    where = dict(module='ffn', layer=1, neurons=row.neurons)
    found = mope_plain(clip, pairs, 'text', z='contrastive', **where)
    assert found == pytest.approx(row.score, abs=1e-3)


def test_z_of_the_whole_model_stands_in_the_table(clip, pairs):
    found = mope(clip, pairs, 'text', 'layer').attrs['mope']['z_dense']
    assert found == pytest.approx(retrieval(clip, pairs)['mean_recall'], abs=1e-4)


@pytest.mark.parametrize('how', [dict(batch=7), dict(memory=0)])
def test_batch_and_memory_are_a_matter_of_speed_alone(how, clip, pairs, table):
    found = mope(clip, pairs, modules=MODULES, groups=4, z='contrastive', **how)
    close(found.score, table.score, atol=1e-3)


def test_a_tower_scored_alone_has_the_rows_of_both(clip, pairs, table):
    alone = mope(clip, pairs, 'text', modules=('head', 'layer'), z='contrastive')
    of_both = table[(table.tower == 'text') & table.module.isin(['head', 'layer'])]
    assert alone[KEYS].values.tolist() == of_both[KEYS].values.tolist()
    close(alone.score, of_both.score, atol=1e-3)


def test_noise_of_half_precision_is_small_beside_the_scores(clip, pairs):
    half, reference = (
        mope(clip, pairs, groups=4, z='contrastive', precision=precision).score
        for precision in ('bf16', 'fp32')
    )
    assert (half - reference).abs().median() < 0.1 * reference.std()
    assert half.corr(reference) > 0.98


def test_differences_of_each_image_are_handed_out(clip, pairs, table, witness):
    drops = mope(clip, pairs, 'text', modules=('head',), z='contrastive', diffs=True)
    close(np.stack(drops.diffs).mean(1), drops.score, atol=1e-9)
    first = next(table[(table.tower == 'text') & (table.module == 'head')].itertuples())
    close(drops.diffs[0], witness.drop(clip, first), atol=0.01)


def test_the_cost_is_said_before_the_work(clip, pairs):
    said = []
    mope(clip, pairs, 'text', modules=('head',), z='contrastive', log=said.append)
    assert len(said) == 1 and said[0].startswith('8 modules')


def test_a_table_says_that_it_was_scored_on_the_test_split(clip, table):
    test_pairs = synth_pairs(8, 'test')
    with pytest.raises(ValueError, match='score on validation pairs'):
        mope(clip, test_pairs)
    found = mope(clip, test_pairs, 'text', modules=('layer',), allow_test=True).attrs['mope']
    assert found['scored_on_test'] and found['split'] == 'test'
    assert not table.attrs['mope']['scored_on_test']


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(precision='int8'), "not 'int8'"),
        (dict(z=lambda images, captions: 0.0, store='scores'), 'pass z by its name'),
        (dict(towers='vison'), 'towers must be among vision, text, not vison'),
    ],
)
def test_what_mope_cannot_do_is_refused(options, sentence, clip, pairs):
    with pytest.raises(ValueError, match=sentence):
        mope(clip, pairs, **options)


def test_a_rank_group_goes_from_every_layer_at_once(clip, pairs, todo, witness):
    options = dict(modules=('ffn',), groups=4, z='contrastive', together=True)
    found = mope(clip, pairs, 'text', **options)
    assert found.groupby('index').score.nunique().tolist() == [1] * 4
    assert len(found) == 2 * 4
    gone = clip.copy()
    with torch.no_grad():
        for layer in (0, 1):
            gone.text.blocks[layer].mlp.c_proj.weight[:, todo['text', layer][1][2]] = 0
    lost = witness.by_image(clip) - witness.by_image(gone)
    score = found[found['index'] == 2].score.iloc[0]
    assert score == pytest.approx(lost.mean(), abs=1e-3)


def test_a_layers_score_is_the_accuracy_that_is_lost(clip, labelled):
    rows = mope(clip, labelled, 'vision', modules=('layer',), z='zero_shot')
    whole = zero_shot(clip, labelled)['top1']
    for row in rows.itertuples(index=False):
        smaller = without(clip, 'vision', 'layer', row.layer, 0, None)
        left = zero_shot(smaller, labelled)['top1']
        assert row.score == pytest.approx(whole - left, abs=1e-4)


# --- a store


@pytest.fixture
def scored(clip, pairs):
    "A function that scores with a store in a folder of its own"
    with tempfile.TemporaryDirectory() as folder:

        def score(model=clip, pairs=pairs, towers=TOWERS, z='contrastive'):
            return mope(model, pairs, towers, groups=4, store=folder, z=z)

        score.folder = Path(folder)
        yield score


def test_a_killed_run_goes_on_and_reads_what_is_finished(scored, clip, pairs):
    first = scored()
    files = sorted(scored.folder.rglob('*.parquet'))
    assert len(files) == 3 + 2  # one a layer
    marked = pd.read_parquet(files[0])  # a score that no model can have
    marked.assign(score=marked.score + 1e6).to_parquet(files[0])
    files[-1].unlink()  # as if the run had been killed before it
    again = scored()
    assert (again.score > 1e5).sum() == len(marked)  # the marked layer was read,
    close(again.score - 1e6 * (again.score > 1e5), first.score, atol=1e-3)  # no other differs,
    assert files[-1].is_file()  # and the missing layer was made again
    close(first.score, mope(clip, pairs, groups=4, z='contrastive').score, atol=1e-3)


def test_another_model_z_or_data_set_never_sees_these_scores(scored, clip):
    scored()
    for file in scored.folder.rglob('*.parquet'):
        rows = pd.read_parquet(file)
        rows.assign(score=rows.score + 1e6).to_parquet(file)
    nudged = clip.copy()
    with torch.no_grad():
        nudged.model.text_projection[0, 0] += 1e-3
    assert (scored(nudged).score < 1e5).all()
    assert (scored(z='IR@1').score < 1e5).all()
    assert (scored(pairs=synth_pairs(31)).score < 1e5).all()
    assert len(list(scored.folder.iterdir())) == 4


def test_one_tower_takes_its_rows_from_the_table_of_both(scored):
    both = scored()
    alone = scored(towers='text')
    assert alone.score.tolist() == both[both.tower == 'text'].score.tolist()
    assert set(alone.tower) == {'text'} and len(scored()) == len(both)


def test_what_made_a_table_travels_in_its_file(clip, pairs, tmp_path):
    hard = mope(clip, pairs, modules=MODULES, groups=4)
    hard.to_parquet(tmp_path / 'scores.parquet')
    back = pd.read_parquet(tmp_path / 'scores.parquet')
    assert back.attrs['mope'] == hard.attrs['mope']
    assert back.attrs['mope']['model'] == weights_hash(clip)
    assert back.score.tolist() == hard.score.tolist()
    group = hard.module == 'ffn'
    assert [list(neurons) for neurons in back.neurons[group]] == list(hard.neurons[group])
    assert back.neurons[~group].isna().all()
    one_layer = back.neurons[group & (back.tower == 'text') & (back.layer == 1)]
    assert sum(one_layer.map(len)) == 128


# --- a model that learned


@pytest.fixture(scope='module')
def learned(clip, inputs):
    "A copy trained for a moment on the squares"
    student, loss = clip.copy(), ClipLoss()
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=3e-3)
    for step in range(60):
        optimizer.zero_grad()
        images = student.encode_image(inputs['vision'], True)
        captions = student.encode_text(inputs['text'][step % 2 :: 2], True)
        loss(images, captions, student.logit_scale.exp()).backward()
        optimizer.step()
    return student


@pytest.fixture(scope='module')
def smooth(learned, pairs):
    return mope(learned, pairs, groups=4, z='contrastive')


def test_a_whole_first_layer_matters_more_than_any_of_its_heads(clip, learned, pairs, smooth):
    before, after = (retrieval(model, pairs)['mean_recall'] for model in (clip, learned))
    assert after > before + 20
    for tower in TOWERS:
        rows = smooth[(smooth.layer == 0) & (smooth.tower == tower)]
        heads = rows[rows.module == 'head'].score
        assert rows[rows.module == 'layer'].score.item() > heads.max()


def test_the_first_group_of_neurons_is_what_the_ffn_is_needed_for(smooth):
    by_group = smooth[smooth.module == 'ffn'].groupby('index').score.mean()
    assert by_group[0] > by_group[1:].max()


def test_the_standard_error_is_that_of_resampling_and_pairing_makes_it_small(
    learned, smooth, witness
):
    row = next(smooth[(smooth.tower == 'text') & (smooth.module == 'head')].itertuples())
    whole, drop = witness.by_image(learned), witness.drop(learned, row)
    n = len(drop)
    resampled = drop[np.random.default_rng(0).integers(n, size=(4000, n))].mean(1).std()
    assert resampled / row.se == pytest.approx(np.sqrt((n - 1) / n), abs=0.06)
    assert row.se < np.sqrt((whole.var(ddof=1) + (whole - drop).var(ddof=1)) / n)


def test_thirty_two_images_leave_some_ranks_undecided(learned, pairs):
    found = mope(learned, pairs, 'text', modules=('head', 'ffn'), groups=4)
    low, high = found.score - 1.96 * found.se, found.score + 1.96 * found.se
    undecided = (low < 0) & (high > 0)
    assert undecided.any() and not undecided.all()


# --- magnitude and chance


def test_magnitude_is_a_norm_over_the_weights_that_leave(clip):
    found, block = magnitude(clip, groups=128), clip.vision.blocks[1]  # one neuron a group
    rows = found[(found.tower == 'vision') & (found.layer == 1)]
    qkv = block.attn.in_proj_weight.view(3, 4, 8, 32)[:, 2].reshape(-1)  # of head 2
    out = block.attn.out_proj.weight[:, 16:24].reshape(-1)
    head = torch.cat([qkv, out]).norm().item()
    assert rows[rows.module == 'head'].score.iloc[2] == pytest.approx(head, abs=1e-4)
    neurons = rows[rows.module == 'ffn']
    norms = {row.neurons[0]: row.score for row in neurons.itertuples()}
    both = torch.cat([block.mlp.c_fc.weight[5], block.mlp.c_proj.weight[:, 5]])
    assert norms[5] == pytest.approx(both.norm().item(), abs=1e-4)
    assert neurons.score.tolist() == sorted(norms.values(), reverse=True)  # the largest first
    layer = torch.cat([p.reshape(-1) for p in block.parameters()]).norm().item()
    assert rows[rows.module == 'layer'].score.item() == pytest.approx(layer, abs=1e-3)


def test_magnitude_is_blind_to_what_a_weight_is_for(clip, inputs):
    louder = clip.copy()
    attention = louder.vision.blocks[1].attn
    with torch.no_grad():
        for parameter in (attention.in_proj_weight, attention.in_proj_bias):
            parameter[:32] *= 10
            parameter[32:64] /= 10
    images = inputs['vision']
    close(encode(louder, 'vision', images), encode(clip, 'vision', images), atol=1e-5)
    before, after = magnitude(clip, groups=128), magnitude(louder, groups=128)
    heads = (before.tower == 'vision') & (before.layer == 1) & (before.module == 'head')
    assert (after.score[heads] > 3 * before.score[heads]).all()


def test_magnitude_refuses_a_misspelt_tower(clip):
    with pytest.raises(ValueError, match='towers must be among vision, text, not vison'):
        magnitude(clip, 'vison')


def test_chance_has_a_seed_and_the_modules_of_mope(clip, smooth):
    found = random_scores(clip, seed=0, groups=4)
    assert found.score.tolist() == random_scores(clip, seed=0, groups=4).score.tolist()
    assert (found.score != random_scores(clip, seed=1, groups=4).score).all()
    assert found.score.between(0, 1).all() and found.attrs['mope']['seed'] == 0
    assert found.se.isna().all() and (found.n == 0).all()
    assert len(found.merge(smooth, on=KEYS)) == len(found)


# --- gradients


@pytest.fixture(scope='module')
def loss_of(clip, pairs):
    "The contrastive loss of a model on the first captions"
    ids = clip.tokenizer([own[0] for own in pairs['captions']])

    def loss(model, images):
        features = model.encode_image(images, True), model.encode_text(ids, True)
        return ClipLoss()(*features, model.logit_scale.exp())

    return loss


@pytest.fixture(scope='module')
def products(clip, inputs, loss_of):
    "Weight times gradient of the second text block, by name"
    block = clip.text.blocks[1]
    weights = dict(
        fc=block.mlp.c_fc.weight,
        fc_bias=block.mlp.c_fc.bias,
        proj=block.mlp.c_proj.weight,
        qkv=block.attn.in_proj_weight,
        qkv_bias=block.attn.in_proj_bias,
        out=block.attn.out_proj.weight,
    )
    gradients = torch.autograd.grad(loss_of(clip, inputs['vision']), list(weights.values()))
    pairs = zip(weights.items(), gradients, strict=True)
    return {name: (weight * gradient).detach() for (name, weight), gradient in pairs}


NEURON, HEAD = 5, slice(2 * 8, 3 * 8)  # neuron 5; the rows of head 2, of width 8


def rows_of(table):
    return table[(table.tower == 'text') & (table.layer == 1)]


def of_neuron(table, neuron=NEURON):
    return next(row.score for row in rows_of(table).itertuples() if row.neurons == [neuron])


def of_head(table, head=2):
    rows = rows_of(table)
    return rows[rows.module == 'head'].score.iloc[head]


def test_taylor_scores_are_sums_of_weight_times_gradient(clip, pairs, products):
    found = taylor(clip, pairs, groups=128)
    into = (products['fc'][NEURON].sum() + products['fc_bias'][NEURON]).abs()
    neuron = into + products['proj'][:, NEURON].sum().abs()
    assert of_neuron(found) == pytest.approx(neuron.item(), abs=1e-6)
    qkv, bias = products['qkv'].view(3, 32, 32)[:, HEAD], products['qkv_bias'].view(3, 32)[:, HEAD]
    head = (qkv.sum() + bias.sum()).abs() + products['out'][:, HEAD].sum().abs()
    assert of_head(found) == pytest.approx(head.item(), abs=1e-6)
    rows = rows_of(found)
    parts = rows[rows.module != 'layer'].score.sum()
    assert rows[rows.module == 'layer'].score.item() == pytest.approx(parts, abs=1e-5)


def test_weight_times_gradient_is_the_derivative_as_a_weight_is_scaled(
    clip, inputs, loss_of, products
):
    exact, step = clip.copy(), 1e-3
    exact.model.double()
    column = exact.text.blocks[1].mlp.c_proj.weight.data[:, NEURON]

    def scaled(factor):
        column.mul_(factor)
        loss = loss_of(exact, inputs['vision'].double()).item()
        column.div_(factor)
        return loss

    slope = (scaled(1 + step) - scaled(1 - step)) / (2 * step)
    assert slope == pytest.approx(products['proj'][:, NEURON].sum().item(), abs=1e-6)


def test_fisher_of_one_batch_is_the_square_of_the_sum(clip, pairs, products):
    at_once = fisher(clip, pairs, groups=128, pairs_each=32)
    neuron, head = products['proj'][:, NEURON].sum(), products['out'][:, HEAD].sum()
    assert of_neuron(at_once) == pytest.approx(neuron.item() ** 2, abs=1e-8)
    assert of_head(at_once) == pytest.approx(head.item() ** 2, abs=1e-8)
    in_eights = fisher(clip, pairs, groups=128, pairs_each=8)
    assert (at_once.score >= 0).all() and of_head(in_eights) != of_head(at_once)


# --- activations, one modality, position


@pytest.fixture(scope='module')
def loud(clip):
    "Neuron 7 writes twice as much, neuron 9 has large weights and never fires"
    copy = clip.copy()
    mlp = copy.vision.blocks[0].mlp
    with torch.no_grad():
        mlp.c_proj.weight[:, 7] *= 2
        mlp.c_fc.weight[9] *= 100
        mlp.c_fc.bias[9] = -1e6  # GELU of a very negative number is 0
    return copy


def first_neurons(table):
    "Scores of the neurons of the first vision layer"
    rows = table[(table.tower == 'vision') & (table.module == 'ffn') & (table.layer == 0)]
    return {row.neurons[0]: row.score for row in rows.itertuples()}


def test_activation_is_root_mean_square_times_the_output_norm(clip, loud, pairs, inputs):
    block = loud.vision.blocks[0]
    with torch.no_grad():
        stream = loud.vision.embed(inputs['vision'])[0]
        fired = block.hidden(block.after_attention(stream))[..., 7]
    norm = block.mlp.c_proj.weight[:, 7].norm().item()
    before, after = (first_neurons(activation(model, pairs, groups=128)) for model in (clip, loud))
    assert after[7] == pytest.approx(fired.square().mean().sqrt().item() * norm, abs=1e-5)
    assert after[7] == pytest.approx(2 * before[7], abs=1e-5)


def test_a_neuron_that_never_fires_is_worth_nothing_but_to_magnitude(clip, loud, pairs):
    assert first_neurons(activation(loud, pairs, groups=128))[9] == 0
    before, after = (first_neurons(magnitude(model, groups=128)) for model in (clip, loud))
    assert after[9] > 10 * before[9]


def test_unimodal_is_how_far_a_towers_own_embeddings_move(clip, pairs):
    few = pairs.select(range(12))
    found = unimodal(clip, few, groups=4)
    row = found[(found.tower == 'vision') & (found.module == 'layer')].iloc[0]
    task, spec = ScoringTask(clip, few), whole_spec(clip)
    del spec.vision[0]
    left = encode(prune(clip, spec), 'vision', task.x['vision'])
    moved = 100 * (1 - (left * task.dense['vision']).sum(1)).mean().item()
    assert row.score == pytest.approx(moved, abs=1e-3)


def test_every_other_layer_comes_first(clip):
    rows = every_other(clip).query("tower == 'vision' and module == 'layer'")
    assert rows.score.tolist() == [1, 0, 1]


@pytest.mark.parametrize('metric', [fisher, activation])
def test_scores_of_gradients_and_activations_are_sizes(metric, clip, pairs):
    found = metric(clip, pairs.select(range(12)), groups=4)
    assert list(found.columns) == COLUMNS
    assert (found.score >= 0).all() and found.score.nunique() > 30


# --- a comparison is one parameter


def test_a_metric_says_whether_it_looks_at_pairs():
    blind = {name for name in NAMES if not METRICS[name].needs_pairs}
    assert blind == {'magnitude', 'every_other', 'random'}
    assert METRICS['mope'].function is mope and METRICS['random'].function is random_scores


@pytest.fixture(scope='module')
def tables(learned, pairs):
    return {name: score_by(name, learned, pairs, groups=4, z='contrastive') for name in NAMES}


def test_every_metric_fills_the_same_columns_for_the_same_modules(tables, smooth):
    modules = smooth[KEYS].sort_values(KEYS).values.tolist()
    for name, found in tables.items():
        assert list(found.columns) == COLUMNS and found.attrs['mope']['metric'] == name
        assert found[KEYS].sort_values(KEYS).values.tolist() == modules


def test_options_that_a_metric_has_not_are_left_out(tables, learned):
    direct = magnitude(learned, groups=4)
    assert tables['magnitude'].score.tolist() == direct.score.tolist()
    assert tables['mope'].attrs['mope']['z'] == 'contrastive'


@pytest.mark.parametrize('name', ['mope', 'unimodal', 'taylor', 'activation'])
def test_the_batch_may_be_left_to_the_metric(name, clip, pairs):
    few = pairs.select(range(8))
    left, given = (score_by(name, clip, few, groups=2, batch=batch) for batch in (None, 64))
    assert left.score.tolist() == given.score.tolist()


def test_an_unknown_metric_or_option_is_refused_with_the_list(clip, pairs):
    with pytest.raises(ValueError, match='choose one of mope, '):
        score_by('hessian', clip)
    with pytest.raises(ValueError, match='No metric has an option group:'):
        score_by('taylor', clip, pairs, group=4)


@pytest.mark.parametrize('name', NAMES)
def test_every_metric_takes_a_model_that_was_pruned_before(name, uneven, pairs):
    found = score_by(name, uneven, pairs, groups=4)
    assert found.score.notna().all()
    gone = (found.tower == 'vision') & (found.layer == 1) & (found.module == 'head')
    assert not gone.any()


def test_metrics_that_share_the_engine_mostly_share_the_order(tables):
    heads = {
        name: found[found.module == 'head'].set_index(KEYS).score for name, found in tables.items()
    }
    agreement = pd.concat(heads, axis=1).rank().corr()
    assert agreement.loc['mope', 'unimodal'] > 0.5
    assert list(agreement.columns) == list(NAMES)


# --- resolution


def test_heads_compete_in_their_layer_or_across_layers(clip):
    found = random_scores(clip, groups=4)
    assert competitions(found).nunique() == 2 * 5 + 2
    assert competitions(found, 'global').nunique() == 6  # heads, groups and layers of two towers


def two_heads(*diffs):
    of_two = dict(tower='text', module='head', layer=0, index=[0, 1], score=2.0, se=1.0)
    return pd.DataFrame({**of_two, 'diffs': list(diffs)})


def test_a_tie_is_decided_by_lot():
    found = kept_probability(two_heads(np.array([1.0, 3.0]), np.array([2.0, 2.0])), 0.5, 'layer')
    assert found.iloc[0] == pytest.approx(0.5, abs=0.06)
    assert found.sum() == pytest.approx(1.0)
    nothing = two_heads(np.zeros(2), np.zeros(2))
    found = kept_probability(nothing, 0.5, draws=20_000)
    assert found.iloc[0] == pytest.approx(0.5, abs=0.02)


def test_without_differences_scores_are_drawn_from_their_errors():
    table = two_heads(None, None).drop(columns='diffs').assign(score=[9.0, 1.0], se=0.1)
    assert kept_probability(table, 0.5).tolist() == [1.0, 0.0]


def test_a_module_is_decided_where_its_side_is_likely():
    assert resolved(pd.Series([1.0, 0.95, 0.5, 0.05])) == 0.75


def test_probabilities_add_up_to_the_budget(clip):
    found = mope(clip, synth_pairs(24, captions=3), groups=4, z='contrastive', diffs=True)
    found['p_kept'] = kept_probability(found, 0.5)
    competition = competitions(found)
    places = [keep_count(len(rows), 0.5) for _, rows in found.groupby(competition)]
    close(found.groupby(competition).p_kept.sum(), places, atol=1e-9)


def test_an_unknown_rank_is_refused(clip):
    with pytest.raises(ValueError, match="'layer' or 'global', not 'tower'"):
        competitions(random_scores(clip, groups=4), 'tower')
