"A smaller model in other libraries' hands: open_clip, clip_benchmark, transformers, their folders."

import copy
from pathlib import Path

import open_clip
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from conftest import custom_tiny, uneven_tiny
from datasets import ClassLabel
from fastcore.test import test_close as check_close
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor

from mope_clip.clip import PruneSpec, build_clip, prune, shape_of, tiny_clip, whole_spec
from mope_clip.data import synth_pairs
from mope_clip.data.scenes import Suite
from mope_clip.evaluate import retrieval, zero_shot
from mope_clip.pruners import export_hf, export_open_clip
from mope_clip.pruners.formats import not_plain, plain


@pytest.fixture(scope='module')
def tiny():
    return tiny_clip()


@pytest.fixture(scope='module')
def small():
    return uneven_tiny()


@pytest.fixture(scope='module')
def pairs():
    return synth_pairs(64)


@pytest.fixture(scope='module')
def images(tiny, pairs):
    return torch.stack([tiny.preprocess(image) for image in pairs['image'][:6]])


@pytest.fixture(scope='module')
def ids(tiny, pairs):
    return tiny.tokenizer([captions[0] for captions in pairs['captions'][:6]])


@pytest.fixture(scope='module')
def shallow(tiny):
    "A layer less in each tower"
    spec = whole_spec(tiny)
    del spec.vision[1], spec.text[0]
    return prune(tiny, spec)


@pytest.fixture(scope='module')
def narrow(tiny):
    "One smaller size of the FFN in each tower"
    spec = whole_spec(tiny)
    for tower, every in (('vision', 3), ('text', 2)):
        for kept in getattr(spec, tower).values():
            kept['neurons'] = list(range(0, 128, every))
    return prune(tiny, spec)


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def same(some, others, images, ids, eps=1e-5):
    "Whether two models compute the same"
    check_close(some.encode_image(images), others.encode_image(images), eps=eps)
    check_close(some.encode_text(ids), others.encode_text(ids), eps=eps)
    return True


# --- as open_clip's own


def test_open_clips_forward_runs_on_a_smaller_model(small, images, ids, no_gradients):
    assert isinstance(small.model, open_clip.CLIP)
    image_features, text_features, scale = small.model(images, ids)
    check_close(image_features, small.encode_image(images, normalize=True), eps=1e-6)
    check_close(text_features, small.encode_text(ids, normalize=True), eps=1e-6)
    assert torch.equal(scale, small.logit_scale.exp())


def test_blocks_may_be_asked_for_by_number(small, images, ids, no_gradients):
    found = small.model.forward_intermediates(images, ids)
    assert len(found['image_intermediates']) == 2


def test_open_clips_classifier_takes_the_model_or_the_clip(small, no_gradients):
    colours, templates = ['red', 'green', 'blue', 'yellow'], ['a {} square', '{}']
    of_model, of_clip = (
        open_clip.build_zero_shot_classifier(model, small.tokenizer, colours, templates)
        for model in (small.model, small)
    )
    assert of_model.shape == (32, 4)
    check_close(of_model, of_clip, eps=1e-6)


def batches(rows):
    "A loader as clip_benchmark has it: images in one tensor, captions as lists"
    return DataLoader(
        rows,
        batch_size=4,
        collate_fn=lambda batch: (torch.stack([x for x, _ in batch]), [y for _, y in batch]),
    )


def first_of_each_caption(pairs):
    "Caption -> the first picture that has it: a picture for each pair of colours"
    captions = [own[0] for own in pairs['captions']]
    return {caption: captions.index(caption) for caption in captions}


def test_clip_benchmarks_retrieval_agrees_where_nothing_ties(tiny, small, pairs):
    distinct = pairs.select(sorted(first_of_each_caption(pairs).values()))
    said = {caption for own in distinct['captions'] for caption in own}
    assert len(distinct) >= 12 and len(said) == 2 * len(distinct)
    ours = retrieval(small, distinct)
    rows = [
        (tiny.preprocess(image), own)
        for image, own in zip(distinct['image'], distinct['captions'], strict=True)
    ]
    for model in (small.model, small):
        theirs = zeroshot_retrieval.evaluate(
            model, batches(rows), small.tokenizer, 'cpu', amp=False, recall_k_list=[1, 5, 10]
        )
        for k in (1, 5, 10):
            for ours_name, name in (('TR', 'text'), ('IR', 'image')):
                found = 100 * theirs[f'{name}_retrieval_recall@{k}']
                check_close(found, ours[f'{ours_name}@{k}'], eps=1e-4)
    assert 0 < ours['TR@5'] < 100  # a comparison that means something


def test_clip_benchmarks_classification_agrees(tiny, small, pairs):
    "By the two functions that its `evaluate` is made of: as a whole NumPy no longer lets it pass"
    names = list(first_of_each_caption(pairs))
    labels = [names.index(own[0]) for own in pairs['captions']]
    labelled = pairs.add_column('label', labels).cast_column('label', ClassLabel(names=names))
    templates = ['{}', 'a picture of {}']
    ours = zero_shot(small, labelled, Suite(tuple(names), (), tuple(templates)))
    rows = [
        (tiny.preprocess(image), label) for image, label in zip(pairs['image'], labels, strict=True)
    ]
    theirs = [template.replace('{}', '{c}') for template in templates]
    for model in (small.model, small):
        matrix = zeroshot_classification.zero_shot_classifier(
            model, small.tokenizer, names, theirs, 'cpu', amp=False
        )
        logits, target = zeroshot_classification.run_classification(
            model, matrix, DataLoader(rows, 16), 'cpu', amp=False
        )
        for k in (1, 5):
            hits = (logits.topk(k).indices == target[:, None]).any(1).float()
            check_close(100 * hits.mean(), ours[f'top{k}'], eps=1e-4)
    assert 0 < ours['top5'] < 100


def test_open_clip_trains_it_with_and_without_checkpointing(small, images, ids):
    "All that is left has a gradient, but for the norm in front of a layer without heads"
    found = []
    for checkpointing in (False, True):
        model = small.copy().model.train()
        model.set_grad_checkpointing(checkpointing)
        open_clip.ClipLoss()(*model(images, ids)).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.numel()})
    plainly, checkpointed = found
    unused = [name for name, gradient in plainly.items() if gradient is None]
    norm = 'visual.transformer.resblocks.1.ln_1'
    assert unused == [f'{norm}.weight', f'{norm}.bias']
    for name in set(plainly) - set(unused):
        check_close(plainly[name], checkpointed[name], eps=1e-6)


# --- what fits


def test_removed_layers_and_one_size_of_the_ffn_fit(tiny, shallow, narrow):
    for clip in (tiny, shallow, narrow, prune(shallow, whole_spec(shallow))):
        assert not_plain(clip) == []
    assert shape_of(narrow)['vision'] == [[4, 43]] * 3


def test_what_does_not_fit_is_named_layer_by_layer(small):
    assert not_plain(small) == [
        'vision layer 0 has 2 of 4 heads',
        'vision layer 1 has 0 of 4 heads',
        'the vision layers have 32, 0 neurons',
        'text layer 0 has 1 of 4 heads',
    ]


def test_a_plain_model_computes_the_same(shallow, narrow, images, ids, no_gradients):
    assert same(plain(shallow), shallow, images, ids) and same(plain(narrow), narrow, images, ids)


def test_gaps_are_filled_with_zeros_to_the_largest_layer(small, images, ids, no_gradients):
    padded = plain(small, pad=True)
    assert shape_of(padded) == dict(vision=[[4, 32]] * 2, text=[[4, 64]])
    assert same(padded, small, images, ids)
    wide, narrow = padded.vision.blocks[0], small.vision.blocks[0]
    rows = wide.head_weights()[0].parameter.view(3, 4, 8, 32)  # of queries, keys and values
    assert rows[:, 2:].abs().max() == 0 and rows[:, :2].abs().amax((1, 2, 3)).all()
    assert torch.equal(rows[:, :2], narrow.head_weights()[0].parameter.view(3, 2, 8, 32))


def test_a_layer_without_heads_keeps_its_output_bias(small):
    wide, narrow = plain(small, pad=True).vision.blocks[1], small.vision.blocks[1]
    assert torch.equal(wide.output_maps()['head'].bias, narrow.output_maps()['head'].bias)


def test_the_other_class_of_open_clip_is_filled_too(small, images, ids, no_gradients):
    kept = PruneSpec(small.spec.vision, small.spec.text, small.spec.base)
    clip = prune(custom_tiny(), kept)
    assert same(plain(clip, pad=True), clip, images, ids)


def test_a_plain_model_is_computed_in_single_precision(small, ids, no_gradients):
    half = small.copy()
    half.model.half()
    check_close(plain(half, pad=True).encode_text(ids), small.encode_text(ids), eps=1e-2)


def test_an_uneven_model_is_refused_without_padding(small):
    with pytest.raises(ValueError, match='vision layer 1 has 0 of 4 heads'):
        plain(small)


def test_a_configuration_that_says_what_the_model_is_not_is_found_out(tiny):
    other = tiny.copy()
    other.config = dict(tiny.config, model_cfg=dict(tiny.config['model_cfg'], quick_gelu=True))
    with pytest.raises(ValueError, match='The plain vision tower gives other features'):
        plain(other)


# --- folders


@pytest.fixture(params=['shallow', 'narrow', 'uneven'])
def exported(request, shallow, narrow, small):
    "A model, and whether it needs padding"
    return dict(shallow=(shallow, False), narrow=(narrow, False), uneven=(small, True))[
        request.param
    ]


def test_open_clip_alone_loads_its_folder(exported, pairs, images, ids, tmp_path, no_gradients):
    clip, pad = exported
    export_open_clip(clip, tmp_path / 'model', pad)
    place = f'local-dir:{tmp_path}/model'
    model, _, preprocess = open_clip.create_model_and_transforms(place, device='cpu')
    assert same(model.eval(), clip, images, ids)
    said = 'a red square'
    assert torch.equal(open_clip.get_tokenizer(place)(said), clip.tokenizer(said))
    assert torch.equal(preprocess(pairs['image'][0]), images[0])
    parameters, own = (sum(p.numel() for p in m.parameters()) for m in (model, clip.model))
    assert parameters > own if pad else parameters == own


def test_transformers_loads_its_folder(exported, pairs, images, tmp_path, no_gradients):
    clip, pad = exported
    export_hf(clip, tmp_path / 'model', pad)
    model, info = CLIPModel.from_pretrained(tmp_path / 'model', output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, nothing left over
    said = ['a red square', 'a blue square left of a red square']
    inputs = CLIPProcessor.from_pretrained(tmp_path / 'model')(
        text=said, images=pairs['image'][:6], padding=True, return_tensors='pt'
    )
    check_close(inputs['pixel_values'], images, eps=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'model')
    padded = tokenizer(said, padding='max_length', return_tensors='pt')['input_ids']
    assert torch.equal(padded, clip.tokenizer(said))
    theirs = model.eval()(**inputs)
    check_close(theirs.image_embeds, clip.encode_image(images, normalize=True), eps=1e-5)
    ours = clip.encode_text(clip.tokenizer(said), normalize=True)
    check_close(theirs.text_embeds, ours, eps=1e-5)
    logits = clip.logit_scale.exp() * theirs.image_embeds @ theirs.text_embeds.T
    check_close(theirs.logits_per_image, logits, eps=1e-4)
    assert sorted(path.name for path in Path(tmp_path, 'model').iterdir()) == [
        'README.md',
        'config.json',
        'model.safetensors',
        'preprocessor_config.json',
        'tokenizer.json',
        'tokenizer_config.json',
    ]


def test_a_padded_folder_says_the_largest_sizes(small, tmp_path):
    export_hf(small, tmp_path / 'model', pad=True)
    config = CLIPModel.from_pretrained(tmp_path / 'model').config
    assert config.vision_config.intermediate_size == 32
    assert config.text_config.num_hidden_layers == 1


@pytest.mark.parametrize('write', [export_open_clip, export_hf])
def test_a_refused_export_leaves_no_folder(write, small, tmp_path):
    with pytest.raises(ValueError, match='pass pad=True'):
        write(small, tmp_path / 'refused')
    assert not (tmp_path / 'refused').exists()


def test_what_transformers_has_no_word_for_is_named(tiny, tmp_path):
    config = copy.deepcopy(tiny.config)
    config['model_cfg']['vision_cfg'].update(pool_type='avg', final_ln_after_pool=True)
    average = build_clip(config, tiny.tokenizer)
    with pytest.raises(ValueError, match='cannot express this model: vision_cfg'):
        export_hf(average, tmp_path / 'refused')
    assert not (tmp_path / 'refused').exists()
