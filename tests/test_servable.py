"Models for stock servers: planned evenly, loaded by transformers as they are."

import pytest
import torch
from conftest import uneven_tiny
from fastcore.test import test_close as check_close
from transformers import AutoModel, CLIPModel, CLIPProcessor

from mope_clip.clip import TOWERS, prune, shape_of, tiny_clip
from mope_clip.data import synth_pairs
from mope_clip.evaluate import cost
from mope_clip.metrics import random_scores
from mope_clip.pruners import export_hf, plan, trim_vocabulary
from mope_clip.pruners.formats import not_plain
from mope_clip.pruners.servable import even_shares, plan_even


def silent(said):
    "Nothing is printed"


@pytest.fixture(scope='module')
def tiny():
    return tiny_clip()


@pytest.fixture(scope='module')
def scores(tiny):
    "A table with groups of unequal sizes: 128 neurons in 6"
    return random_scores(tiny, groups=6)


@pytest.mark.parametrize('keep', [0.01, 0.1, 0.37, 0.5, 0.99, 1.0])
def test_layers_of_a_tower_keep_as_many_neurons(keep, tiny, scores):
    spec = plan(scores, tiny, keep=keep, servable=True, log=silent)
    for tower in TOWERS:
        kept = getattr(spec, tower).values()
        assert len({len(layer['neurons']) for layer in kept}) == 1
        assert all(layer['heads'] == [0, 1, 2, 3] for layer in kept)
    assert not not_plain(prune(tiny, spec))


@pytest.mark.parametrize('budget', [dict(macs=0.7), dict(params=0.7), dict(macs=0.6)])
@pytest.mark.parametrize('more', [{}, dict(keep_depth=0.67), dict(multiples=(1, 16))])
def test_a_budget_is_kept_and_used(budget, more, tiny, scores):
    spec = plan(scores, tiny, **budget, **more, servable=True, log=silent)
    small = prune(tiny, spec)
    ((kind, share),) = budget.items()
    limit = share * cost(tiny)[kind]
    assert cost(small)[kind] <= limit and not not_plain(small)
    assert spec.provenance['plan']['servable'] is True
    step = more.get('multiples', (1, 1))[1]
    wider = [
        prune(tiny, plan_even(scores, (layer['neurons'] + step) / 128, step))
        for layer in [dict(neurons=shape_of(small)['text'][0][1])]
        if not more.get('keep_depth')
    ]
    assert all(cost(clip)[kind] > limit for clip in wider)


def test_the_best_neurons_of_each_layer_stay(tiny, scores):
    spec = plan_even(scores, 0.25)
    rows = scores[(scores.tower == 'text') & (scores.module == 'ffn') & (scores.layer == 1)]
    best = rows.sort_values('score', ascending=False).neurons.iloc[0]
    assert set(best) <= set(spec.text[1]['neurons']) and len(spec.text[1]['neurons']) == 32


def test_every_number_of_neurons_is_tried(scores):
    shares = even_shares(scores, 32)
    assert [round(share * 128) for share in shares] == [32, 64, 96, 128]


def test_a_plan_that_is_not_asked_for_says_nothing(tiny, scores):
    spec = plan(scores, tiny, keep=0.5, log=silent)
    assert 'servable' not in spec.provenance['plan']


@pytest.mark.parametrize('rank', ['global'])
def test_ranks_across_layers_are_uneven(rank, tiny, scores):
    with pytest.raises(ValueError, match="leave rank at 'layer'"):
        plan(scores, tiny, keep=0.5, rank=rank, servable=True, log=silent)


def test_a_model_that_is_uneven_already_is_refused():
    small = uneven_tiny()
    with pytest.raises(ValueError, match='The vision tower has lost heads'):
        plan(random_scores(small, groups=2), small, keep=0.5, servable=True, log=silent)


def test_neurons_of_another_number_are_refused(tiny, scores):
    spec = plan_even(scores)
    spec.text[0]['neurons'] = spec.text[0]['neurons'][:5]
    small = prune(tiny, spec)
    with pytest.raises(ValueError, match='the text tower have 5 and 64 neurons'):
        plan(random_scores(small, groups=2), small, keep=0.5, servable=True, log=silent)


@pytest.mark.parametrize('words', [False, True])
def test_transformers_loads_the_smaller_model_as_it_is(words, tiny, scores, tmp_path):
    "Half the neurons, two of three layers, and perhaps a part of the words"
    spec = plan(scores, tiny, macs=0.6, keep_depth=0.67, servable=True, log=silent)
    small, said = prune(tiny, spec), ['a red square', 'a blue square left of a red square']
    if words:
        small = trim_vocabulary(small, said, log=silent)
    export_hf(small, tmp_path / 'model')
    model, info = CLIPModel.from_pretrained(tmp_path / 'model', output_loading_info=True)
    assert (
        not any(info.values()) and type(AutoModel.from_pretrained(tmp_path / 'model')) is CLIPModel
    )
    assert sum(p.numel() for p in model.parameters()) == cost(small)['params']
    pictures = list(synth_pairs(3)['image'])
    inputs = CLIPProcessor.from_pretrained(tmp_path / 'model')(
        text=said, images=pictures, padding=True, return_tensors='pt'
    )
    with torch.no_grad():
        theirs = model.eval()(**inputs)
        images = torch.stack([small.preprocess(picture) for picture in pictures])
        check_close(theirs.image_embeds, small.encode_image(images, True), eps=1e-5)
        ours = small.encode_text(small.tokenizer(said), normalize=True)
        check_close(theirs.text_embeds, ours, eps=1e-5)


def test_sentence_transformers_loads_it_too(tiny, scores, tmp_path):
    "Where it is installed; this library does not need it"
    theirs = pytest.importorskip('sentence_transformers')
    small = prune(tiny, plan(scores, tiny, macs=0.6, servable=True, log=silent))
    export_hf(small, tmp_path / 'model')
    model = theirs.SentenceTransformer(str(tmp_path / 'model'), device='cpu')
    said = ['a red square', 'a blue square left of a red square']
    with torch.no_grad():
        found = torch.tensor(model.encode(said, normalize_embeddings=True))
        check_close(found, small.encode_text(small.tokenizer(said), normalize=True), eps=1e-5)
