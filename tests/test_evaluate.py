"How numbers are measured: recall, zero-shot accuracy, cost, time, memory."

import copy
import importlib
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_retrieval
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from open_clip_train import zero_shot as open_clip_zero_shot
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark.utils.common import set_torch_threads
from torch.utils.flop_counter import FlopCounterMode

import mope_clip.evaluate.recall as recall_room
from mope_clip.clip import TOWERS, PruneSpec, build_clip, prune, shape_of, tiny_clip, whole_spec
from mope_clip.clip.spec import full_spec
from mope_clip.data import synth_pairs
from mope_clip.data.scenes import Suite
from mope_clip.evaluate import (
    cost,
    encode,
    encode_captions,
    encode_images,
    images_of,
    latency,
    memory_of,
    owners,
    peak_memory,
    ranks,
    recalls,
    retrieval,
    spec_cost,
    timed,
    tower_macs,
    zero_shot,
)
from mope_clip.evaluate.cost import module_costs
from mope_clip.evaluate.latency import sample_input
from mope_clip.evaluate.recall import RECALLS, similarities


@pytest.fixture(scope='module')
def clip():
    return tiny_clip()


@pytest.fixture(scope='module')
def pairs():
    return synth_pairs(4, captions=3)


@pytest.fixture(scope='module')
def inputs(clip, pairs):
    "Images and token ids, by tower"
    captions = [caption for own in pairs['captions'] for caption in own]
    return dict(vision=images_of(clip, pairs['image']), text=clip.tokenizer(captions))


def close(some, others, atol):
    np.testing.assert_allclose(np.asarray(some), np.asarray(others), rtol=0, atol=atol)


# --- features


def test_images_are_one_tensor(inputs):
    assert inputs['vision'].shape == (4, 3, 32, 32)


def test_no_images_are_refused(clip):
    with pytest.raises(ValueError, match='There are no images'):
        images_of(clip, [])


@pytest.mark.parametrize('tower', TOWERS)
def test_neither_batch_nor_neighbours_change_an_embedding(tower, clip, inputs):
    x = inputs[tower]
    features = encode(clip, tower, x, batch=4)
    alone = torch.cat([encode(clip, tower, x[i : i + 1]) for i in range(len(x))])
    close(features, alone, atol=1e-6)
    close(features.norm(dim=1), torch.ones(len(x)), atol=1e-6)
    assert features.shape == (len(x), 32)


def test_trimmed_captions_have_open_clips_own_features(clip, inputs):
    ids = inputs['text']
    assert sorted(set(ids.argmax(1).tolist())) == [3, 8]  # of four and of nine tokens
    with torch.no_grad():
        untrimmed = clip.model.encode_text(ids, normalize=True)
    close(encode(clip, 'text', ids, batch=4), untrimmed, atol=1e-6)


def test_pictures_are_prepared_batch_by_batch(clip, pairs, inputs):
    close(
        encode_images(clip, pairs['image'], 3), encode(clip, 'vision', inputs['vision']), atol=1e-6
    )


def test_equal_captions_tie_exactly(clip):
    features = encode_captions(clip, [['a red square', 'a blue square'], ['a red square']])
    assert torch.equal(features[0], features[2])


# --- ranks

SIMS = torch.tensor(
    [
        [9.0, 1, 2, 3, 0, 0, 0, 0],
        [5.0, 8, 6, 2, 7, 0, 0, 0],
        [0.0, 0, 0, 4, 4, 1, 0, 0],
        [0.0, 0, 0, 0, 5, 6, 3, 8],
    ]
)
OWNER = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])


def test_ranks_of_four_images_by_hand():
    of_images, of_captions = ranks(torch.eye(4), SIMS.T, OWNER)
    assert of_images.tolist() == [0, 2, 1, 0]  # image 1: 8 and 7 beat its 6; image 2: the tie
    # caption 3: images 0 and 2 beat it; caption 4: images 1 and 3
    assert of_captions.tolist() == [0, 1, 0, 2, 2, 1, 0, 0]


@pytest.fixture
def problem():
    "Seven images and twenty-one captions at random, three of each image"
    generator = torch.Generator().manual_seed(0)
    images, captions = (torch.randn(n, 5, generator=generator) for n in (7, 21))
    return images, captions, torch.arange(7).repeat_interleave(3)


def test_counting_is_sorting_where_nothing_ties(problem):
    images, captions, own = problem
    of_images, of_captions = ranks(*problem)
    sims = images @ captions.T
    best_first = sims.argsort(1, descending=True)
    wrong_before = [
        (own[order] == image).int().argmax().item() for image, order in enumerate(best_first)
    ]
    assert of_images.tolist() == wrong_before
    order = sims.argsort(0, descending=True)
    places = [(order[:, j] == own[j]).int().argmax().item() for j in range(21)]
    assert of_captions.tolist() == places
    assert of_images.sum() > 0 and of_captions.sum() > 0  # the problem is not trivial


def collapsed(n, m, width=5):
    "Features of a model that maps everything to one point"
    point = F.normalize(torch.randn(1, width, generator=torch.Generator().manual_seed(1)))
    return point.expand(n, width), point.expand(m, width)


def test_a_collapsed_model_has_the_last_place_for_all(problem):
    of_images, of_captions = ranks(*collapsed(7, 21), problem[2])
    assert of_images.tolist() == [18] * 7 and of_captions.tolist() == [6] * 21


@pytest.mark.parametrize('block', [42, 35, 1])
@pytest.mark.parametrize('shuffled', [False, True])
def test_how_many_blocks_there_are_does_not_show(block, shuffled, problem, monkeypatch):
    images, captions, own = problem
    if shuffled:  # captions in any order, and image 0 has none
        own = torch.randint(1, 7, (21,), generator=torch.Generator().manual_seed(2))
    whole = ranks(images, captions, own)
    monkeypatch.setattr(recall_room, 'SIMILARITIES_AT_ONCE', block)
    assert all(map(torch.equal, ranks(images, captions, own), whole))
    of_one_point, _ = ranks(*collapsed(7, 21), problem[2])
    assert of_one_point.tolist() == [18] * 7  # ties across blocks too
    assert all(sims.numel() <= max(block, 21) for _, sims in similarities(images, captions))


def test_an_image_without_captions_is_never_found(problem):
    images, captions, _ = problem
    own = torch.randint(1, 7, (21,), generator=torch.Generator().manual_seed(2))
    assert ranks(images, captions, own)[0][0].item() == 21


@pytest.mark.parametrize('broken', [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(broken, problem):
    images, captions, own = problem
    with pytest.raises(ValueError, match='NaN or infinite'):
        ranks(images, torch.full_like(captions, broken), own)


def test_one_wrong_caption_spoils_one_rank_in_each_direction():
    captions = torch.eye(4)[[0, 0, 2, 3]]  # caption 1 describes image 1 but looks like image 0
    of_images, of_captions = ranks(torch.eye(4), captions, torch.arange(4))
    assert of_images.tolist() == [1, 3, 0, 0] and of_captions.tolist() == [0, 3, 0, 0]


def test_saying_the_same_about_everything_finds_nothing():
    of_images, _ = ranks(torch.ones(4, 1), torch.ones(4, 1), torch.arange(4))
    assert of_images.tolist() == [3] * 4


# --- recall


def test_recall_is_the_share_of_small_ranks():
    found = recalls(*ranks(torch.eye(4), SIMS.T, OWNER))
    half, all_of_them = dict.fromkeys(('TR@1', 'IR@1'), 50), dict.fromkeys(RECALLS, 100)
    assert found == {**all_of_them, **half, 'mean_recall': 500 / 6}
    assert tuple(found)[:6] == RECALLS


def test_rank_k_minus_one_is_in_and_rank_k_is_out():
    edge = recalls(torch.tensor([0, 1, 4, 5, 9, 10]), torch.tensor([10]))
    close([edge[name] for name in RECALLS], [100 / 6, 50, 500 / 6, 0, 0, 0], atol=1e-4)


def by_clip_benchmark(image_features, text_features, each, batch=3):
    "clip_benchmark's six recalls, per cent; every image has `each` captions"
    model = SimpleNamespace(encode_image=lambda x: x, encode_text=lambda x: x)
    captions = text_features.view(-1, each, text_features.shape[1])
    loader = list(zip(image_features.split(batch), captions.split(batch), strict=True))
    with patch.object(zeroshot_retrieval, 'tqdm', iter):  # no progress bar
        found = zeroshot_retrieval.evaluate(
            model, loader, torch.stack, 'cpu', amp=False, recall_k_list=[1, 5, 10]
        )
    names = dict(TR='text', IR='image')
    return {name: 100 * found[f'{names[name[:2]]}_retrieval_recall@{name[3:]}'] for name in RECALLS}


def test_clip_benchmark_finds_the_same_where_nothing_ties():
    generator = torch.Generator().manual_seed(0)
    images, captions = (torch.randn(n, 16, generator=generator) for n in (40, 120))
    captions += 0.2 * images.repeat_interleave(3, 0)  # they resemble their image a little
    features = F.normalize(images), F.normalize(captions)
    ours = recalls(*ranks(*features, torch.arange(40).repeat_interleave(3)))
    assert by_clip_benchmark(*features, 3) == {name: ours[name] for name in RECALLS}
    assert 0 < ours['TR@1'] < ours['TR@5'] < ours['TR@10'] < 100


def test_a_collapsed_model_is_lucky_elsewhere_and_finds_nothing_here():
    features = collapsed(40, 120, 16)
    lucky = by_clip_benchmark(*features, 3)
    assert lucky['IR@10'] > 0 and lucky['TR@10'] > 0
    ours = recalls(*ranks(*features, torch.arange(40).repeat_interleave(3)))
    assert set(ours.values()) == {0}


def test_images_have_different_numbers_of_captions():
    assert owners([['a', 'b'], ['c'], ['d', 'e', 'f']]).tolist() == [0, 0, 1, 2, 2, 2]


def test_retrieval_of_a_model_counts_what_plain_loops_count(clip, pairs, inputs):
    found = retrieval(clip, pairs)
    images, captions = (encode(clip, tower, inputs[tower]) for tower in TOWERS)
    sims, own = images @ captions.T, owners(pairs['captions'])
    hits = [max(sims[i, own == i]) > max(sims[i, own != i]) for i in range(4)]
    assert found['TR@1'] == pytest.approx(100 * sum(map(int, hits)) / 4, abs=1e-4)
    assert set(found) == {*RECALLS, 'mean_recall'}


def test_the_batch_has_no_influence_on_retrieval(clip, pairs):
    assert retrieval(clip, pairs) == retrieval(clip, pairs, batch=3)


# --- zero-shot accuracy


class Palette:
    "A model whose mind can be read: it sees the mean colour, and knows the names of three"

    device, words = torch.device('cpu'), ('red', 'green', 'blue')
    logit_scale, text = torch.tensor(1.0), property(lambda self: self)

    def lengths(self, ids):
        return torch.ones(len(ids))

    def preprocess(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def tokenizer(self, texts):
        return torch.tensor([[text.split().count(word) for word in self.words] for text in texts])

    def encode_image(self, x):
        return x.mean((2, 3))

    def encode_text(self, ids):
        return ids.float()


def coloured(colours, labels, names):
    "Labelled pictures of one colour each"
    return Dataset.from_dict(
        dict(image=[Image.new('RGB', (8, 8), colour) for colour in colours], label=labels),
        features=Features(image=ImageFeature(), label=ClassLabel(names=list(names))),
    )


RGB = Suite(classes=('red', 'green', 'blue'), fixed=({},) * 3, templates=('{}', 'a {} square'))


def test_an_orange_green_and_a_grey_picture_are_missed():
    "Orange looks red; grey ties with all classes, which counts against the model"
    five = coloured(['red', 'lime', 'navy', 'orange', 'grey'], [0, 1, 2, 1, 0], RGB.classes)
    assert zero_shot(Palette(), five, RGB)['top1'] == pytest.approx(60)
    assert zero_shot(Palette(), five.select(range(3)), RGB)['top1'] == pytest.approx(100)


def test_top_5_of_three_classes_would_say_nothing():
    assert set(zero_shot(Palette(), coloured(['red'], [0], RGB.classes), RGB)) == {'top1'}


@pytest.mark.parametrize('templates, top1', [(('red {}',), 0), (('red {}', '{}', '{}'), 100)])
def test_one_odd_prompt_among_good_ones_does_little_harm(templates, top1):
    orange = coloured(['orange'], [0], RGB.classes)
    assert zero_shot(Palette(), orange, RGB._replace(templates=templates)) == {'top1': top1}


SIX = Suite(
    ('red', 'green', 'blue', 'yellow', 'square', 'left'),
    ({},) * 6,
    ('{}', 'a {} square', '{} of a square'),
)


@pytest.fixture
def shown():
    colours = ['red', 'green', 'blue', 'yellow', 'black', 'white', 'pink', 'navy']
    return coloured(colours, [0, 1, 2, 3, 4, 5, 0, 2], SIX.classes)


@torch.no_grad()
def test_zero_shot_counts_what_plain_loops_count(clip, shown):
    def unit(v):
        return v / v.norm()

    def prompt(text):
        return unit(clip.encode_text(clip.tokenizer(text))[0])

    weights = [
        unit(sum(prompt(template.format(name)) for template in SIX.templates))
        for name in SIX.classes
    ]
    places = []
    for row in shown:
        image = unit(clip.encode_image(clip.preprocess(row['image'])[None])[0])
        scores = [(image @ weight).item() for weight in weights]
        places.append(sorted(scores, reverse=True).index(scores[row['label']]))
    for name, value in zero_shot(clip, shown, SIX).items():
        k = int(name.removeprefix('top'))
        assert value == pytest.approx(100 * sum(place < k for place in places) / 8, abs=1e-4)


@torch.no_grad()
def test_zero_shot_counts_what_open_clip_counts(clip, shown):
    matrix = open_clip.build_zero_shot_classifier(
        clip.model, clip.tokenizer, SIX.classes, SIX.templates
    )
    loader = [
        (images_of(clip, part['image']), torch.tensor(part['label']))
        for part in (shown[:5], shown[5:])
    ]
    args = SimpleNamespace(device='cpu', precision='fp32', batch_size=5)
    # open_clip turns an array of one element into a number, which NumPy no longer allows
    with (
        patch.object(open_clip_zero_shot, 'tqdm', lambda x, **_: x),
        patch.object(torch.Tensor, 'numpy', torch.Tensor.item),
    ):
        theirs = open_clip_zero_shot.run(clip.model, matrix, loader, args)
    ours = list(zero_shot(clip, shown, SIX).values())
    close(ours, [100 * value for value in theirs], atol=1e-4)


# --- multiply-accumulates


def counted_macs(clip, tower, x, kernel=SDPBackend.MATH):
    "What PyTorch counts, in multiply-accumulates; all tokens of the last block too"
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(kernel), counter:
        clip.tower(tower)(x, hidden=True)
    return counter.get_total_flops() // 2


def half_of(clip):
    spec = full_spec(clip.spec.base)
    for kept in spec.vision.values():
        kept.update(heads=[0, 1], neurons=list(range(64)))
    return spec


def uneven_of(clip):
    spec = full_spec(clip.spec.base)
    spec.vision[1]['heads'] = [2]
    spec.vision[2]['neurons'] = [0, 1, 2]
    spec.text[0].update(heads=[], neurons=[7])
    spec.text[1]['neurons'] = []
    return spec


def shallow_of(clip):
    spec = full_spec(clip.spec.base)
    spec.vision = {1: dict(heads=[], neurons=[5]), 2: dict(heads=[0, 3], neurons=[])}
    del spec.text[0]
    return spec


SPECS = dict(whole=whole_spec, half=half_of, uneven=uneven_of, shallow=shallow_of)


@pytest.mark.parametrize('spec', SPECS)
def test_the_formula_is_what_pytorch_counts(spec, clip, inputs):
    model = prune(clip, SPECS[spec](clip))
    images, ids = inputs['vision'][:1], inputs['text'][:1]
    assert tower_macs(model, 'vision') == counted_macs(model, 'vision', images)
    assert tower_macs(model, 'text') == counted_macs(model, 'text', ids)
    assert tower_macs(model, 'text', tokens=9) == counted_macs(model, 'text', ids[:, :9])


def test_the_formula_by_hand(clip):
    layer = 4 * 17 * 32 * 32 + 2 * 17 * 17 * 32 + 2 * 17 * 32 * 128
    assert tower_macs(clip, 'vision') == 3 * layer + 16 * 3 * 8 * 8 * 32 + 32 * 32


def test_a_fused_kernel_counts_as_nothing(clip, inputs):
    both_products = 3 * 2 * 17 * 17 * 32
    fused = counted_macs(clip, 'vision', inputs['vision'][:1], SDPBackend.FLASH_ATTENTION)
    assert tower_macs(clip, 'vision') - fused == both_products


# open_clip's docs/model_profile.csv, in its gflops: image, text, both
PROFILE = {
    'ViT-B-32': (8.82, 5.96, 14.78),
    'ViT-B-16': (35.13, 5.96, 41.09),
    'ViT-L-14': (162.03, 13.3, 175.33),
    'ViT-L-14-336': (381.92, 13.3, 395.22),
}


def only_shapes(name):
    "A model of open_clip without its weights"
    config = dict(name=name, model_cfg=open_clip.get_model_config(name), preprocess_cfg={})
    with torch.device('meta'):
        return build_clip(config, None)


@pytest.mark.parametrize('name', PROFILE)
def test_open_clip_publishes_twice_our_count(name):
    found = cost(only_shapes(name))
    keys = 'vision_macs', 'text_macs', 'macs'
    assert tuple(round(2 * found[key] / 1e9, 2) for key in keys) == PROFILE[name]


@pytest.mark.parametrize(
    'name, millions', [('ViT-L-14', [303.97, 123.65, 85.7]), ('ViT-B-16', [86.19, 63.43, 38.13])]
)
def test_parameters_are_those_that_papers_print(name, millions):
    found = cost(only_shapes(name))
    keys = 'vision_params', 'text_params', 'text_params_no_embedding'
    assert [round(found[key] / 1e6, 2) for key in keys] == millions


@pytest.mark.parametrize('name', ['ViT-B-32', 'ViT-L-14-336'])
def test_pytorch_counts_large_models_by_their_shapes(name):
    clip = only_shapes(name)
    pixels = torch.empty(1, 3, *clip.vision.image_size, device='meta')
    assert counted_macs(clip, 'vision', pixels) == cost(clip)['vision_macs']


# --- parameters


def test_parameters_are_the_sums_of_the_shapes(clip):
    found, words = cost(clip), len(clip.text.token_table)
    # attention, its biases, FFN, its biases, two norms
    layer = 4 * 32 * 32 + 4 * 32 + 2 * 128 * 32 + 128 + 32 + 4 * 32
    # stem, positions, class, norms, projection
    around = 3 * 8 * 8 * 32 + 17 * 32 + 32 + 4 * 32 + 32 * 32
    assert found['vision_params'] == 3 * layer + around
    assert found['text_params'] == 2 * layer + words * 32 + 12 * 32 + 2 * 32 + 32 * 32
    assert found['text_params'] - found['text_params_no_embedding'] == words * 32


def test_every_parameter_is_counted_once(clip):
    found = cost(clip)
    assert found['params'] == sum(p.numel() for p in clip.model.parameters())
    assert found['params'] == found['vision_params'] + found['text_params'] + 1  # temperature


def test_pruning_one_tower_leaves_the_cost_of_the_other(clip):
    slim, whole = cost(prune(clip, half_of(clip))), cost(clip)
    saved = 3 * (2 * (4 * 8 * 32 + 3 * 8) + 64 * (2 * 32 + 1))
    assert whole['vision_params'] - slim['vision_params'] == saved
    assert slim['text_macs'] == whole['text_macs']


def test_a_head_and_a_neuron_have_a_price():
    first = module_costs(only_shapes('ViT-B-16'), 'vision')[0]
    assert first == dict(
        head=dict(params=4 * 64 * 768 + 3 * 64, macs=4 * 197 * 768 * 64 + 2 * 197 * 197 * 64),
        neuron=dict(params=2 * 768 + 1, macs=2 * 197 * 768),
        rest=dict(params=6 * 768, macs=0),
    )


@pytest.mark.parametrize('tower, worth', [('vision', (128, 144)), ('text', (128, 138))])
def test_a_head_is_worth_so_many_neurons(tower, worth):
    first = module_costs(only_shapes('ViT-B-16'), tower)[0]
    units = 'params', 'macs'
    assert tuple(round(first['head'][unit] / first['neuron'][unit]) for unit in units) == worth


# --- before it is applied


def custom_blocks(clip, **options):
    "The tiny model with open_clip's custom blocks in its vision tower"
    config = copy.deepcopy(clip.config)
    config['model_cfg']['vision_cfg'].update(block_type='custom', **options)
    return build_clip(config, clip.tokenizer)


def scaled_without_biases(clip):
    "A scale for each head, norms of their own, and no biases, as some models have it"
    norms = dict(qk_norm=True, scale_heads=True, scale_attn=True)
    scaled = custom_blocks(clip, ls_init_value=0.1, **norms)
    for block in scaled.vision.blocks:
        block.attn.in_proj_bias = None
    return scaled


@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('make', [lambda clip: clip, scaled_without_biases])
def test_what_is_asked_is_what_pruning_gives(make, spec, clip):
    model = make(clip)
    wanted = SPECS[spec](clip)
    assert spec_cost(model, wanted) == cost(prune(model, wanted))


def test_a_model_that_was_pruned_before_can_be_asked(clip):
    twice = prune(clip, uneven_of(clip))
    again = whole_spec(twice)
    del again.vision[0]
    again.text[1]['heads'] = [1]
    assert spec_cost(twice, again) == cost(prune(twice, again))


def test_asking_refuses_what_pruning_refuses(clip):
    with pytest.raises(ValueError, match='does not have'):
        spec_cost(prune(clip, uneven_of(clip)), half_of(clip))
    with pytest.raises(ValueError, match='scale_fc'):
        spec_cost(custom_blocks(clip, scale_fc=True), half_of(clip))


def test_more_that_stays_costs_more():
    large = only_shapes('ViT-L-14')

    def evenly(keep):
        kept = {
            tower: {
                layer: dict(heads=range(round(keep * heads)), neurons=range(round(keep * neurons)))
                for layer, (heads, neurons) in enumerate(layers)
            }
            for tower, layers in shape_of(large).items()
        }
        return PruneSpec(**kept, base=large.spec.base)

    curve = pd.DataFrame([spec_cost(large, evenly(keep)) for keep in np.linspace(0.1, 1, 10)])
    assert (curve.diff().dropna() > 0).all().all()
    assert curve.iloc[-1].to_dict() == cost(large)


# --- time


def test_functions_are_timed_in_turn():
    seen = []
    calls = dict(a=lambda: seen.append('a'), b=lambda: seen.append('b'))
    with set_torch_threads(2):
        found = timed(calls, min_run_time=1e-3, rounds=3)
    turns = [one for one, other in zip(seen, [*seen[1:], ''], strict=True) if one != other]
    assert ''.join(turns) == 'ababab'
    assert set(found) == {'a', 'b'} and found['a'].task_spec.num_threads == 2
    assert len(found['a'].times) >= 3 and found['a'].median > 0


def test_a_batch_of_full_length_goes_through_each_tower(clip):
    seen = []

    def note(module, args, output):
        seen.append(tuple(output.shape))

    hooks = [clip.tower(t).blocks[0].register_forward_hook(note) for t in TOWERS]
    found = latency(clip, batch=2, min_run_time=0.01)
    for hook in hooks:
        hook.remove()
    assert set(seen) == {(2, 17, 32), (2, 12, 32)}  # captions of twelve tokens
    assert len(seen) > 4  # more than one pass a tower
    for tower in TOWERS:
        assert found[f'{tower}_per_second'] * found[f'{tower}_ms'] == pytest.approx(2000)
        assert found[f'{tower}_iqr_ms'] >= 0


def test_one_tower_can_be_timed_alone(clip):
    found = latency(clip, 1, ('text',), 0.01)
    assert set(found) == {'batch', 'threads', 'text_ms', 'text_iqr_ms', 'text_per_second'}


def test_several_batches_are_a_table_of_several_calls(clip):
    table = pd.DataFrame([latency(clip, n, min_run_time=0.01) for n in (1, 4)]).set_index('batch')
    assert table.shape == (2, 7)


def test_noise_has_the_shape_and_type_of_a_batch(clip):
    assert sample_input(clip, 'vision', 3).shape == (3, 3, 32, 32)
    assert sample_input(clip, 'text', 3).dtype == torch.long


# --- memory


@pytest.mark.parametrize('megabytes', [64, 16])
def test_what_a_call_holds_for_a_moment_is_seen(megabytes):
    used, how = memory_of(lambda: torch.ones(megabytes, 2**18).sum())
    assert used is None or abs(used - megabytes * 2**20) < 4 * 2**20, (used, how)


def test_where_the_system_cannot_tell_the_reason_is_given(tmp_path, monkeypatch):
    room = importlib.import_module('mope_clip.evaluate.latency')  # not the function
    monkeypatch.setattr(room, 'PROC', tmp_path / 'none')
    used, why = memory_of(lambda: None)
    assert used is None and 'clear_refs of Linux cannot be written' in why


def peak_of(clip, layers, batch):
    "Peak memory of a wide vision tower of so many layers"
    config = copy.deepcopy(clip.config)
    config['model_cfg']['vision_cfg'].update(width=128, image_size=64, layers=layers)
    return peak_memory(build_clip(config, clip.tokenizer), batch, ('vision',))


def test_a_tower_holds_the_stream_and_one_layer_at_a_time(clip):
    "Of the last layer one token alone is computed, so two layers are the fewest to compare"
    two, seven, twice = (peak_of(clip, *size) for size in ((2, 256), (7, 256), (7, 512)))
    assert set(two) == {'batch', 'vision_bytes', 'measured'}
    if two['vision_bytes'] is None:
        pytest.skip(two['measured'])
    stream_and_neurons = 4 * 256 * 65 * (128 + 512)
    assert two['vision_bytes'] > stream_and_neurons
    assert seven['vision_bytes'] < 2 * two['vision_bytes']
    assert twice['vision_bytes'] > 1.2 * seven['vision_bytes']
