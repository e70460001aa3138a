"Fewer words: kept texts are read as before, others in smaller pieces, and what is kept travels."

import copy
import json
import random
import sys

import open_clip
import pytest
import torch
from conftest import custom_tiny, run
from fastcore.test import test_close as check_close
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mope_clip.clip import (
    PruneSpec,
    both,
    build_clip,
    compose,
    load_clip,
    prune,
    read_spec,
    relative,
    save_spec,
    small_config,
    spec_hash,
    tiny_clip,
    weights_hash,
    whole_spec,
)
from mope_clip.clip.layouts import masked
from mope_clip.clip.tokens import alone
from mope_clip.clip.vocabulary import Needs
from mope_clip.data import synth_pairs
from mope_clip.distill import distill
from mope_clip.evaluate import cost, spec_cost
from mope_clip.pruners import export_hf, export_open_clip, trim_vocabulary
from mope_clip.pruners.vocabulary import share_changed, unseen_share, vocabulary_spec

CORPUS = [
    'A red square left of a blue circle.',
    "Two dogs' shadows on the beach, at 7 o'clock",
    'naïve café “quotes” & entities',
    'the photographer photographs photographic photographs',
    'internationalisation of the internet',
    '紅い四角 и синий круг',
    'aaaaaaaaaaaa bbbbbb abababab',
    '',
]
OTHERS = ['a turquoise zebra', 'Österreich 42', '🦓🦓', 'photogrammetry', '緑 жёлтый', 'x' * 50]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.set_grad_enabled(False):
        yield


# --- every kind of tokenizer


def learned(model, trainer, pre=None, normalizer=None, decoder=None):
    "A small tokenizer of some kind, learned from the texts of this page, as open_clip wraps it"
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre, normalizer or normalizers.NFC()
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.train_from_iterator([*CORPUS, *OTHERS, *WORDS] * 4, trainer)
    end = tokenizer.token_to_id('</s>')
    tokenizer.post_processor = TemplateProcessing(single='$A </s>', special_tokens=[('</s>', end)])
    tokenizer.add_tokens([AddedToken('<unused0>', normalized=False)])
    return wrapped(tokenizer)


def wrapped(tokenizer, context=16):
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token='<pad>', eos_token='</s>', unk_token='<unk>'
    )
    out = copy.copy(tiny_clip().tokenizer)
    out.tokenizer, out.context_length = fast, context
    return out


WORDS = [' '.join(own) for own in synth_pairs(16)['captions']]
SPECIAL = ['<pad>', '<unk>', '</s>']


def byte_level():
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return learned(models.BPE(), trainer, pre_tokenizers.ByteLevel(), decoder=decoders.ByteLevel())


def byte_fallback():
    "As Gemma's, which SigLIP 2 has"
    parts = [f'<0x{byte:02X}>' for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, *parts], show_progress=False
    )
    model = models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True)
    wrapper = learned(model, trainer, normalizer=normalizers.Replace(' ', '▁'))
    # bytes are pieces, not special tokens: a text cannot name them
    state = json.loads(wrapper.tokenizer.backend_tokenizer.to_str())
    state['added_tokens'] = [t for t in state['added_tokens'] if not t['content'].startswith('<0x')]
    return wrapped(Tokenizer.from_str(json.dumps(state)))


def unigram():
    "As T5's, which SigLIP has"
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token='<unk>', show_progress=False
    )
    return learned(models.Unigram(), trainer, pre_tokenizers.Metaspace())


def word_piece():
    "As BERT's"
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    return learned(models.WordPiece(unk_token='<unk>'), trainer, pre_tokenizers.Whitespace())


def own():
    return open_clip.get_tokenizer('ViT-B-32', context_length=16)


def own_canonical():
    return open_clip.tokenizer.SimpleTokenizer(context_length=16, clean='canonicalize')


CANONICAL = open_clip.tokenizer.get_clean_fn('canonicalize')
KINDS = [own, own_canonical, byte_level, byte_fallback, unigram, word_piece]


def clip_with(tokenizer, **text):
    "A small random model that reads with a tokenizer"
    size = getattr(tokenizer, 'vocab_size', None) or len(tokenizer.tokenizer)
    config = small_config(size, context=tokenizer.context_length)
    if hasattr(tokenizer, 'vocab_size'):
        for name in ('hf_tokenizer_name', 'tokenizer_kwargs'):
            config['model_cfg']['text_cfg'].pop(name)
    config['model_cfg']['text_cfg'].update(text)
    return build_clip(config, tokenizer)


@pytest.fixture(scope='module', params=KINDS, ids=lambda kind: kind.__name__)
def models_of_kind(request):
    "A model, and the same with the tokens of the corpus"
    tokenizer = request.param()
    pools = dict(pool_type='last', no_causal_mask=True)
    clip = clip_with(tokenizer, **({} if hasattr(tokenizer, 'vocab_size') else pools))
    if not hasattr(tokenizer, 'vocab_size'):
        config = copy.deepcopy(clip.config)
        config['model_cfg']['custom_text'] = True
        clip = build_clip(config, tokenizer)
    return clip, trim_vocabulary(clip, CORPUS, log=lambda said: None)


def test_texts_of_the_corpus_have_the_same_embeddings_bit_for_bit(models_of_kind):
    clip, small = models_of_kind
    assert len(small.text.token_table) < len(clip.text.token_table)
    before, after = clip.tokenizer(CORPUS), small.tokenizer(CORPUS)
    assert torch.equal(torch.tensor(small.spec.vocabulary)[after], before)
    assert torch.equal(small.encode_text(after), clip.encode_text(before))


def test_any_other_text_can_still_be_read(models_of_kind):
    clip, small = models_of_kind
    ids = small.tokenizer(OTHERS)
    assert ids.max() < len(small.text.token_table)
    assert small.encode_text(ids).isfinite().all()
    unknown = getattr(getattr(clip.tokenizer, 'tokenizer', None), 'unk_token_id', None)
    if unknown is not None:  # what was read before is still read, in smaller pieces
        now = small.tokenizer.tokenizer.unk_token_id
        before, after = clip.tokenizer(OTHERS) == unknown, ids == now
        assert not (after.any(1) & ~before.any(1)).any()


def test_the_order_of_tokens_stays(models_of_kind):
    clip, small = models_of_kind
    assert small.spec.vocabulary == sorted(small.spec.vocabulary)
    ends = small.tokenizer(OTHERS).max(1).values if hasattr(clip.tokenizer, 'bpe_ranks') else None
    if ends is not None:
        assert (ends == len(small.text.token_table) - 1).all(), 'the end token is the highest'


def test_the_file_alone_reads_as_the_model_does(models_of_kind, tmp_path):
    clip, small = models_of_kind
    for one in (clip, small):
        alone(one.tokenizer).save(str(tmp_path / 'tokenizer.json'))
        file = Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
        texts = [*CORPUS, *OTHERS, 'many words ' * 30]
        ids = one.tokenizer(texts).tolist()
        assert [file.encode(text).ids for text in texts] == ids


def test_a_saved_model_comes_back_with_its_words(models_of_kind, tmp_path):
    _, small = models_of_kind
    if getattr(small.tokenizer, 'clean_fn', None) is CANONICAL and hasattr(
        small.tokenizer, 'cache'
    ):
        with pytest.raises(ValueError, match='SimpleTokenizer cannot be saved with the model'):
            small.save(tmp_path / 'small')
        return
    small.save(tmp_path / 'small')
    back = load_clip(tmp_path / 'small', device='cpu')
    texts = [*CORPUS, *OTHERS]
    assert (back.spec, weights_hash(back)) == (small.spec, weights_hash(small))
    assert torch.equal(back.tokenizer(texts), small.tokenizer(texts))
    ids = back.tokenizer(texts)
    assert torch.equal(back.encode_text(ids), small.encode_text(ids))


def test_random_texts_of_kept_words_are_read_as_before(models_of_kind):
    clip, small = models_of_kind
    draw = random.Random(0)
    words = [word for text in CORPUS for word in text.split()]
    texts = [' '.join(draw.choices(words, k=6)) for _ in range(50)]
    # words of the corpus stand beside others here: where a tokenizer reads word by word, all stay
    if hasattr(clip.tokenizer, 'bpe_ranks'):
        assert share_changed(clip, small, texts) == 0


# --- what is always kept


def test_all_bytes_stay_so_that_every_text_is_read():
    needs = Needs(own())
    small = trim_vocabulary(clip_with(own()), ['a'], log=lambda said: None)
    assert len(small.spec.vocabulary) == len(needs.always) == 512 + 2
    every = ''.join(map(chr, range(32, 0x2000, 7)))
    assert small.tokenizer.encode(every)


def test_a_long_word_keeps_what_it_is_merged_from():
    tokenizer = own()
    needs = Needs(tokenizer)
    (token,) = tokenizer.encode('photographer')
    names = {tokenizer.decoder[i] for i in needs.of([token])}
    assert 'photographer</w>' in names and len(names) > 3
    assert all(name.replace('</w>', '') in 'photographer' for name in names)


def test_pooling_by_an_end_token_follows_its_number():
    tokenizer = tiny_clip().tokenizer
    end = tokenizer.tokenizer.eos_token_id
    clip = custom_tiny(pool_type='eos', eos_id=end)
    small = trim_vocabulary(clip, ['a red square'], log=lambda said: None)
    ids = small.tokenizer(['a red square'])
    assert small.text.end_id == len(small.text.token_table) - 1
    assert torch.equal(small.encode_text(ids), clip.encode_text(tokenizer(['a red square'])))


# --- the share of other texts


def test_the_share_is_what_leaving_one_out_gives():
    draw = random.Random(1)
    needed = [[set(draw.sample(range(24), 3)) for _ in range(1 + i % 3)] for i in range(8)]
    changed = []
    for i, texts in enumerate(needed):
        others = set().union(*(some for j, its in enumerate(needed) if j != i for some in its))
        changed += [bool(tokens - others) for tokens in texts]
    assert 0 < sum(changed) < len(changed)
    assert unseen_share(needed) == 100 * sum(changed) / len(changed)


def test_captions_of_a_picture_do_not_vouch_for_each_other():
    "They share its rare words: of other pictures nearly all texts will change"

    def captions(names):
        return [[f'{word} {name}' for word in ('a', 'one', 'the')] for name in names.split()]

    clip = clip_with(own())
    known = captions('zebra lemon violin castle rocket turtle candle bridge')
    others = captions('pepper anchor guitar island window spider helmet garden')
    small = trim_vocabulary(clip, known, log=print)
    told = small.spec.provenance['vocabulary']
    assert (told['texts'], told['pictures']) == (24, 8)
    assert abs(share_changed(clip, small, others) - told['unseen_changed']) < 20
    alone = trim_vocabulary(clip, [text for texts in known for text in texts], log=print)
    assert alone.spec.vocabulary == small.spec.vocabulary
    assert alone.spec.provenance['vocabulary']['unseen_changed'] == 0


def test_the_share_predicts_what_happens_to_unseen_captions():
    captions = [c for several in synth_pairs(64, captions=3)['captions'] for c in several]
    clip = clip_with(own())
    said = []
    small = trim_vocabulary(clip, captions[:60], log=said.append)
    told = small.spec.provenance['vocabulary']
    assert told['of'] == 49408 and told['kept'] == len(small.text.token_table)
    assert f'{told["unseen_changed"]:.1f} %' in said[0]
    assert share_changed(clip, small, captions[:60]) == 0
    assert abs(share_changed(clip, small, captions[60:]) - told['unseen_changed']) < 10
    assert share_changed(clip, small, ['a turquoise zebra', captions[0]]) == 50


# --- the specification


def test_a_vocabulary_is_a_list_in_the_file(tmp_path):
    spec = whole_spec(tiny_clip())
    old = spec_hash(spec)
    save_spec(spec, tmp_path / 'old.json')
    assert 'vocabulary' not in json.loads((tmp_path / 'old.json').read_text())
    assert read_spec(tmp_path / 'old.json') == spec
    spec.vocabulary = (11, 0, 1, 3)
    save_spec(spec, tmp_path / 'new.json')
    back = read_spec(tmp_path / 'new.json')
    assert back.vocabulary == [0, 1, 3, 11] and spec_hash(back) != old


def with_words(kept, like=None):
    spec = copy.deepcopy(like or whole_spec(tiny_clip()))
    spec.vocabulary = kept
    return spec.checked()


def test_vocabularies_are_composed_by_position():
    first, second = with_words([0, 1, 5, 9, 11]), with_words([0, 1, 3, 4])
    whole = with_words(None)
    assert compose(first, second).vocabulary == [0, 1, 9, 11]
    assert compose(first, whole).vocabulary == first.vocabulary
    assert compose(whole, first).vocabulary == first.vocabulary
    assert relative(first, compose(first, second)) == second
    assert relative(first, first).vocabulary is None
    assert relative(whole, first).vocabulary == first.vocabulary
    assert both(first, with_words([0, 5, 7])).vocabulary == [0, 5]
    assert both(first, whole).vocabulary == first.vocabulary
    with pytest.raises(ValueError, match='keeps tokens that the first has removed'):
        compose(first, with_words([0, 7]))
    for lost in (whole, with_words([2])):
        with pytest.raises(ValueError, match='keeps tokens that the model has lost already'):
            relative(first, lost)


def test_two_trims_are_one(tmp_path):
    clip = tiny_clip()
    first = trim_vocabulary(clip, ['a red square', 'a blue square'], log=lambda said: None)
    second = trim_vocabulary(first, ['a red square'], log=lambda said: None)
    at_once = trim_vocabulary(clip, ['a red square'], log=lambda said: None)
    assert second.spec.vocabulary == at_once.spec.vocabulary
    assert weights_hash(second) == weights_hash(at_once)
    said = ['a red square', 'a blue square']
    assert torch.equal(second.tokenizer(said), at_once.tokenizer(said))


def test_heads_may_go_after_words(tmp_path):
    clip = trim_vocabulary(tiny_clip(), ['a red square'], log=lambda said: None)
    spec = whole_spec(clip)
    spec.text[0]['heads'] = [1]
    small = prune(clip, spec)
    assert small.spec.vocabulary == clip.spec.vocabulary
    ids = small.tokenizer(['a red square'])
    zeroed = masked(clip, spec)
    check_close(small.encode_text(ids), zeroed.encode_text(ids), eps=1e-5)


def test_zeroed_rows_are_the_reference():
    tiny = tiny_clip()
    small = trim_vocabulary(tiny, ['a red square'], log=lambda said: None)
    zeroed = masked(tiny, small.spec)
    assert (zeroed.text.token_table.abs().sum(1) > 0).sum() == len(small.spec.vocabulary)
    ids = tiny.tokenizer(['a red square'])
    assert torch.equal(zeroed.encode_text(ids), tiny.encode_text(ids))


def test_the_cost_is_known_before():
    tiny = tiny_clip()
    small = trim_vocabulary(tiny, ['a red square'], log=lambda said: None)
    assert spec_cost(tiny, small.spec) == cost(small)
    saved = cost(tiny)['text_params'] - cost(small)['text_params']
    assert saved == 32 * (12 - len(small.spec.vocabulary))


def test_the_original_stays_as_it_was():
    tiny = tiny_clip()
    trim_vocabulary(tiny, ['a red square'], log=lambda said: None)
    assert weights_hash(tiny) == weights_hash(tiny_clip()) and tiny.spec.vocabulary is None
    assert torch.equal(tiny.tokenizer('a blue square'), tiny_clip().tokenizer('a blue square'))


# --- elsewhere


@pytest.mark.parametrize('make', [tiny_clip, lambda: clip_with(own())], ids=['words', 'own'])
def test_open_clip_and_transformers_load_fewer_words(make, tmp_path):
    from transformers import AutoTokenizer, CLIPModel

    clip, said = make(), ['a red square', 'a blue square left of a red square']
    small = trim_vocabulary(clip, said, log=lambda said: None)
    expected = clip.encode_text(clip.tokenizer(said))
    export_open_clip(small, tmp_path / 'open_clip')
    place = f'local-dir:{tmp_path}/open_clip'
    model, _, _ = open_clip.create_model_and_transforms(place, device='cpu')
    ids = open_clip.get_tokenizer(place)(said)
    check_close(model.eval().encode_text(ids), expected, eps=1e-5)
    export_hf(small, tmp_path / 'hf')
    theirs = CLIPModel.from_pretrained(tmp_path / 'hf').eval()
    tokens = AutoTokenizer.from_pretrained(tmp_path / 'hf')(said, padding=True, return_tensors='pt')
    features = theirs.get_text_features(**{k: v for k, v in tokens.items() if 'type' not in k})
    check_close(getattr(features, 'pooler_output', features), expected, eps=1e-5)
    for folder in ('open_clip', 'hf'):
        back = load_clip(tmp_path / folder, device='cpu')
        check_close(back.encode_text(back.tokenizer(said)), expected, eps=1e-5)


FRESH = """
import torch
from mope_clip.clip import load_clip
clip = load_clip('small', device='cpu')
print(clip.tokenizer(['a red square', 'a turquoise zebra']).tolist())
print(clip.encode_text(clip.tokenizer(['a red square'])).double().sum().item().hex())
"""


def test_another_process_reads_the_same(tmp_path):
    small = trim_vocabulary(clip_with(own()), ['a red square'], log=lambda said: None)
    small.save(tmp_path / 'small')
    done = run(sys.executable, '-c', FRESH, cwd=tmp_path, OMP_NUM_THREADS='1')
    assert done.returncode == 0, done.stderr[-2000:]
    ids, total = done.stdout.splitlines()
    assert json.loads(ids) == small.tokenizer(['a red square', 'a turquoise zebra']).tolist()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours = small.encode_text(small.tokenizer(['a red square'])).double().sum().item().hex()
    torch.set_num_threads(threads)
    assert total == ours


# --- bad input


@pytest.mark.parametrize(
    'kept, sentence',
    [
        ([0, 1, 3], r'lacks the end token \(id 11\), which every text needs: keep 11 too'),
        ([1, 3, 11], r'lacks the padding token \(id 0\)'),
        ([0, 1, 11, 12], 'keeps token 12, but the model has tokens 0 to 11'),
    ],
)
def test_a_vocabulary_that_no_text_can_be_read_with_is_refused(kept, sentence):
    with pytest.raises(ValueError, match=sentence):
        prune(tiny_clip(), with_words(kept))


@pytest.mark.parametrize(
    'kept, sentence',
    [
        ('abc', "must be a list of token ids, not 'abc'"),
        ([], 'leaves no token in the vocabulary'),
        ([1, 1, 2], 'keeps tokens twice: 1'),
        ([-1, 2], 'outside 0 to 2: -1'),
        ([0.5], 'the vocabulary: 0.5 is no index'),
    ],
)
def test_a_vocabulary_that_is_no_list_of_ids_is_refused(kept, sentence):
    with pytest.raises(ValueError, match=sentence):
        with_words(kept)


@pytest.mark.parametrize(
    'texts, sentence',
    [
        ('a red square', 'texts is one text: pass a list'),
        ([], 'There are no texts'),
        ([[]], 'There are no texts'),
        ([3], '3 is no text: pass a list of str'),
    ],
)
def test_texts_that_are_none_are_refused(texts, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        trim_vocabulary(tiny_clip(), texts)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match='has no tokenizer'):
        trim_vocabulary(build_clip(tiny_clip().config, None), ['a'])


def test_the_token_that_is_pooled_stays_whoever_knows_it():
    clip = custom_tiny(pool_type='eos', eos_id=7)
    assert 7 in vocabulary_spec(clip, ['a']).vocabulary
    clip.tokenizer = None
    with pytest.raises(ValueError, match=r'lacks the pooled token \(id 7\)'):
        prune(clip, with_words([0, 1, 11], whole_spec(clip)))


def test_ids_of_the_whole_vocabulary_are_refused_by_a_part():
    clip = tiny_clip()
    small = trim_vocabulary(clip, ['a'], log=lambda said: None)
    with pytest.raises(ValueError, match='has token 11, and the model knows 0 to 3: make the ids'):
        small.encode_text(clip.tokenizer(['a red square']))


def test_the_file_alone_cuts_the_side_that_the_model_does():
    tokenizer = word_piece()
    tokenizer.tokenizer.truncation_side = 'left'
    said = ' '.join(WORDS[:4])
    assert alone(tokenizer).encode(said).ids == tokenizer([said])[0].tolist()


def test_a_student_with_other_words_is_not_taught():
    tiny = tiny_clip()
    small = trim_vocabulary(tiny, ['a red square'], log=lambda said: None)
    with pytest.raises(ValueError, match='trim the vocabulary after the distillation'):
        distill(small, tiny, synth_pairs(8), pairs_seen=8, batch=8)


def test_old_specifications_load(root):
    "As a version without vocabularies wrote them"
    spec = whole_spec(tiny_clip())
    old = dict(vision=spec.vision, text=spec.text, base=spec.base, provenance={})
    assert PruneSpec(**json.loads(json.dumps(old))) == spec
