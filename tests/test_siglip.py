"SigLIP of Hugging Face: read as it is, pruned, and written where its shape is even."

import json
import re
import shutil
import sys
from contextlib import chdir

import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval
from conftest import run
from fastcore.test import test_close as check_close
from PIL import Image
from test_formats import batches, first_of_each_caption
from transformers import AutoModel, AutoProcessor, SiglipConfig, SiglipModel
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from zoo import WORDS, in_small, small_clip

from mope_clip.clip import load_clip, prune, save_open_clip, shape_of, weights_hash, whole_spec
from mope_clip.clip.siglip import cfg_from_siglip, from_siglip
from mope_clip.clip.timm import SiglipShape, know_siglip
from mope_clip.data import synth_pairs
from mope_clip.evaluate import cost, retrieval
from mope_clip.metrics import mope, mope_plain
from mope_clip.pruners import export_hf, export_open_clip, plan, trim_vocabulary

SAID = ['a red square', 'a blue square left of a red square']


def settings(act='gelu_pytorch_tanh', vision=(), text=()):
    "Of a small SigLIP"
    sizes = dict(num_hidden_layers=3, num_attention_heads=4, hidden_act=act)
    small = dict(hidden_size=32, intermediate_size=60, image_size=32, patch_size=8)
    words = len(WORDS.tokenizer.tokenizer)
    read = dict(hidden_size=24, intermediate_size=50, vocab_size=words)
    read |= dict(max_position_embeddings=12, projection_size=32)
    vision, text = {**sizes, **small, **dict(vision)}, {**sizes, **read, **dict(text)}
    return dict(model_type='siglip', vision_config=vision, text_config=text)


def theirs_of(config, seed=0):
    "Hugging Face's model with weights that matter everywhere"
    model = SiglipModel(SiglipConfig(**config)).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for name, p in model.named_parameters():
            wide = name.endswith('weight') and p.ndim > 1
            p.copy_(torch.randn(p.shape) * (0.2 if wide else 0.1) + ('norm.weight' in name))
        model.logit_bias.fill_(-3)
    return model


def write(folder, model, resample=3, words=True):
    "A folder as the hub has it"
    model.save_pretrained(folder)
    processor = SiglipImageProcessorPil(size=dict(height=32, width=32), resample=resample)
    processor.save_pretrained(folder)
    if words:
        WORDS.tokenizer.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp('siglip') / 'model', theirs_of(settings()))


@pytest.fixture(scope='module')
def clip(folder):
    return load_clip(folder, device='cpu')


def inputs(clip):
    "Two pictures and two captions"
    made = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 32, 32, generator=made), clip.tokenizer(SAID)


@torch.no_grad()
def same(theirs, clip, eps=1e-5):
    "Whether transformers and this library compute the same"
    pixels, ids = inputs(clip)
    out = theirs.eval()(pixel_values=pixels, input_ids=ids)
    check_close(out.image_embeds, clip.encode_image(pixels, True), eps=eps)
    check_close(out.text_embeds, clip.encode_text(ids, True), eps=eps)


def uneven(clip):
    "A layer less, another without heads, a pooler of half"
    spec = whole_spec(clip)
    del spec.vision[1]
    spec.vision[0]['heads'], spec.vision[3]['heads'] = [], [1, 3]
    spec.text[1]['neurons'] = [4, 7]
    return spec


# --- in


@pytest.mark.parametrize('act', ['gelu_pytorch_tanh', 'gelu'])
@pytest.mark.parametrize('resample, how', [(3, 'bicubic'), (2, 'bilinear')], ids=['1', '2'])
def test_a_folder_is_the_function_that_transformers_computes(act, resample, how, tmp_path):
    "SigLIP 2 resizes bilinearly, SigLIP bicubically; the class is one"
    theirs = theirs_of(settings(act))
    clip = load_clip(write(tmp_path / 'model', theirs, resample), device='cpu')
    same(theirs, clip)
    assert clip.logit_bias.item() == -3
    assert type(clip.contrastive_loss()).__name__ == 'SigLipLoss'
    assert shape_of(clip)['vision'] == [[4, 60]] * 3 + [[4, 60, 'pooler']]
    assert clip.config['preprocess_cfg']['interpolation'] == how
    picture = synth_pairs(1)['image'][0].resize((50, 41))
    processor = SiglipImageProcessorPil.from_pretrained(tmp_path / 'model')
    pixels = processor(picture, return_tensors='pt')['pixel_values'][0]
    check_close(clip.preprocess(picture), pixels, eps=1e-5)


def test_it_is_scored_exactly_and_pruned(clip):
    pairs = synth_pairs(6)
    table = mope(clip, pairs, groups=2)
    row = table[(table.tower == 'vision') & (table.layer == 3)].iloc[1]
    plain = mope_plain(clip, pairs, 'vision', 3, row.module, row['index'], row.neurons)
    assert row.score == pytest.approx(plain, abs=1e-4)
    small = prune(clip, uneven(clip))
    assert shape_of(small)['vision'] == [[0, 60], [4, 60], [2, 60, 'pooler']]
    assert cost(small)['params'] < cost(clip)['params']


def test_what_is_saved_is_read_bit_for_bit_in_a_new_process(clip, tmp_path):
    "Which has to make timm know the tower first"
    small = prune(clip, uneven(clip))
    small.save(tmp_path / 'saved')
    code = (
        'import sys, torch\n'
        'from mope_clip.clip import load_clip\n'
        "clip = load_clip('saved', device='cpu')\n"
        'pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n'
        f'found = clip.encode_image(pixels), clip.encode_text(clip.tokenizer({SAID}))\n'
        "torch.save(found, 'found.pt')\n"
    )
    r = run(sys.executable, '-c', code, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    pixels, ids = inputs(small)
    image, text = torch.load(tmp_path / 'found.pt')
    with torch.no_grad():
        assert torch.equal(image, small.encode_image(pixels))
        assert torch.equal(text, small.encode_text(ids))


def test_an_open_clip_folder_of_it_is_read_in_a_new_process(clip, tmp_path):
    save_open_clip(clip, tmp_path / 'teacher', torch.float32)
    code = (
        'from mope_clip.clip import load_clip, weights_hash\n'
        "print(weights_hash(load_clip('teacher', device='cpu')))\n"
    )
    r = run(sys.executable, '-c', code, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    assert r.stdout.split() == [weights_hash(clip)]


@pytest.mark.parametrize('said', [None, {}, dict(size=32), dict(size=None)])
def test_pictures_are_squashed_where_its_folder_does_not_say_how(said, folder, tmp_path):
    shutil.copytree(folder, tmp_path / 'model')
    file = tmp_path / 'model/preprocessor_config.json'
    file.unlink()
    if said is not None:
        file.write_text(json.dumps(said))
    told = load_clip(tmp_path / 'model', device='cpu').config['preprocess_cfg']
    assert told == dict(
        mean=[0.5] * 3, std=[0.5] * 3, interpolation='bicubic', resize_mode='squash'
    )


def test_clip_benchmark_takes_what_is_left_of_it(clip):
    pairs = synth_pairs(64)
    distinct = pairs.select(sorted(first_of_each_caption(pairs).values()))
    small = prune(clip, uneven(clip))
    rows = [
        (small.preprocess(image), said)
        for image, said in zip(distinct['image'], distinct['captions'], strict=True)
    ]
    theirs = zeroshot_retrieval.evaluate(
        small.model, batches(rows), small.tokenizer, 'cpu', amp=False, recall_k_list=[1, 5]
    )
    ours = retrieval(small, distinct)
    for k in (1, 5):
        check_close(100 * theirs[f'image_retrieval_recall@{k}'], ours[f'IR@{k}'], eps=1e-4)
        check_close(100 * theirs[f'text_retrieval_recall@{k}'], ours[f'TR@{k}'], eps=1e-4)


@pytest.mark.parametrize(
    'config, sentence',
    [
        (dict(model_type='siglip2'), 'pictures of any shape (NaFlex): take the model of the same'),
        (dict(model_type='clip'), "of a 'clip' model, not of a SiglipModel"),
        (settings('relu'), "vision hidden_act 'relu' (gelu_pytorch_tanh or gelu)"),
        (settings(vision=dict(layer_norm_eps=1e-5)), 'vision layer_norm_eps 1e-05 (1e-06)'),
        (settings(vision=dict(num_channels=1)), 'num_channels 1 (open_clip reads 3)'),
        (settings(vision=dict(image_size=[32, 48])), 'image_size [32, 48] (one number is needed)'),
        (settings(vision=dict(vision_use_head=False)), 'no pooler (vision_use_head false)'),
        (settings(text=dict(projection_size=16)), 'projection_size 16 (images have 32)'),
        (settings(text=dict(num_hidden_layers=9999)), '9,999 text layers (no CLIP has)'),
        (settings(text=dict(num_attention_heads=5)), 'text hidden_size 24 for 5 heads'),
        (settings(text=dict(vocab_size='many')), 'not one that SiglipModel accepts'),
    ],
)
def test_settings_without_a_word_for_them_are_refused_by_name(config, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        cfg_from_siglip(config)


def test_weights_of_another_size_are_refused_by_name():
    state = theirs_of(settings()).state_dict()
    with pytest.raises(ValueError, match=r'embedding.weight \(16, 32\) does not fit'):
        from_siglip(settings(vision=dict(image_size=40)), state)
    with pytest.raises(ValueError, match=r'not those of the configured .*: 32 missing'):
        from_siglip(settings(vision=dict(num_hidden_layers=5)), state)


def test_a_folder_without_words_or_for_any_shape_is_refused(tmp_path):
    write(tmp_path / 'mute', theirs_of(settings()), words=False)
    with pytest.raises(FileNotFoundError, match='has no tokenizer_config'):
        load_clip(tmp_path / 'mute')
    (tmp_path / 'mute/config.json').write_text('{"model_type": "siglip2"}')
    with pytest.raises(ValueError, match='NaFlex'):
        load_clip(tmp_path / 'mute')


@pytest.mark.parametrize('file', ['config.json', 'tokenizer_config.json'])
def test_code_of_a_folder_is_never_run(file, tmp_path):
    folder = write(tmp_path / 'model', theirs_of(settings()))
    told = json.loads((folder / file).read_text())
    told['auto_map'] = dict(AutoModel='evil.Model', AutoTokenizer=['evil.Words', None])
    (folder / file).write_text(json.dumps(told))
    (folder / 'evil.py').write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match='nothing is run from a model folder'):
        load_clip(folder)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize(
    'shape', [dict(layers=9999), dict(heads=5), dict(patch=64), dict(width=0), dict(neurons=10**6)]
)
def test_a_name_of_no_siglip_is_refused(shape):
    usual = dict(image=32, patch=8, width=32, layers=3, heads=4, neurons=60)
    with pytest.raises(ValueError, match='the vision tower of no SigLIP'):
        know_siglip(SiglipShape(**{**usual, **shape}).name)


# --- out


def planned(clip, **how):
    "An even plan of it, as a model"
    scores = mope(clip, synth_pairs(6), groups=6)
    return prune(clip, plan(scores, clip, **how, servable=True, log=lambda line: None))


@pytest.mark.parametrize('how', [dict(keep=0.5), dict(macs=0.6, keep_depth=0.67)])
def test_transformers_loads_what_is_planned_evenly(clip, how, tmp_path):
    small = planned(clip, **how)
    export_hf(small, tmp_path / 'model')
    model, info = SiglipModel.from_pretrained(tmp_path / 'model', output_loading_info=True)
    assert not any(info.values()), info
    assert type(AutoModel.from_pretrained(tmp_path / 'model')) is SiglipModel
    assert sum(p.numel() for p in model.parameters()) == cost(small)['params']
    same(model, small)
    again = load_clip(tmp_path / 'model', device='cpu')
    assert shape_of(again) == shape_of(small)
    same(model, again)


def test_its_processor_prepares_as_the_model_was_made_for(clip, tmp_path):
    export_hf(clip, tmp_path / 'model')
    pictures = [picture.resize((45, 33)) for picture in synth_pairs(2)['image']]
    processor = AutoProcessor.from_pretrained(tmp_path / 'model', backend='pil')
    found = processor(text=SAID, images=pictures, padding='max_length', return_tensors='pt')
    assert set(found) == {'input_ids', 'pixel_values'}, 'a mask would hide the padding'
    assert torch.equal(found['input_ids'], clip.tokenizer(SAID))
    pixels = torch.stack([clip.preprocess(picture) for picture in pictures])
    check_close(found['pixel_values'], pixels, eps=1e-5)


def test_the_folder_tells_that_padding_is_read(clip, tmp_path):
    "Without this, sentence-transformers pads a caption to the longest of its batch"
    export_hf(clip, tmp_path / 'model')
    told = json.loads((tmp_path / 'model/sentence_bert_config.json').read_text())
    assert told['processing_kwargs'] == dict(text=dict(padding='max_length'))
    assert json.loads((tmp_path / 'model/modules.json').read_text())[0]['path'] == ''
    export_hf(clip, tmp_path / 'model')  # it may be replaced


def test_fewer_words_go_there_too(clip, tmp_path):
    small = trim_vocabulary(clip, SAID, log=lambda line: None)
    export_hf(small, tmp_path / 'model')
    model = SiglipModel.from_pretrained(tmp_path / 'model')
    assert model.config.text_config.vocab_size == len(small.text.token_table)
    same(model, small)
    same(model, load_clip(tmp_path / 'model', device='cpu'))


@pytest.mark.parametrize(
    'name, acts',
    [
        ('ViT-B-16-SigLIP', ['gelu', 'gelu']),
        ('ViT-B-16-SigLIP2', ['gelu', 'gelu_pytorch_tanh']),
        ('ViT-gopt-16-SigLIP2-384', ['gelu_pytorch_tanh', 'gelu_pytorch_tanh']),
        ('ViT-SO400M-16-SigLIP-i18n-256', ['gelu_pytorch_tanh', 'gelu']),  # without projection
    ],
)
def test_open_clips_models_go_there_with_their_own_activation(name, acts, tmp_path):
    with in_small():
        clip = small_clip(name)
    clip.model.float()
    export_hf(clip, tmp_path / 'model')
    model = SiglipModel.from_pretrained(tmp_path / 'model')
    same(model, clip)
    config = model.config
    assert [config.vision_config.hidden_act, config.text_config.hidden_act] == acts
    check_close(model.logit_bias.item(), clip.logit_bias.item())


def test_what_is_uneven_is_refused_layer_by_layer(clip, tmp_path):
    small = prune(clip, uneven(clip))
    for pad in (False, True):
        with pytest.raises(ValueError, match=r'vision layer 2 has 2 of 4 heads.*servable=True'):
            export_hf(small, tmp_path / 'model', pad)
    assert not (tmp_path / 'model').exists()


def test_open_clip_is_not_given_what_it_could_not_load(clip, tmp_path):
    "In this process timm has learnt the name; in a user's it has not"
    with pytest.raises(ValueError, match='open_clip alone knows no vision tower of that name'):
        export_open_clip(clip, tmp_path / 'made')
    assert not (tmp_path / 'made').exists()
    export_open_clip(small_clip('ViT-B-32'), tmp_path / 'made')


@pytest.mark.parametrize(
    'name, sentence',
    [
        ('PE-Core-B-16', 'no_causal_mask|causal mask'),
        ('MobileCLIP2-L-14', 'timm_model_name'),
        ('ViT-B-16-SigLIP', 'not those of a SigLIP.*cls_token'),
    ],
)
def test_what_is_no_siglip_is_refused_by_name(name, sentence, tmp_path, monkeypatch):
    if name == 'ViT-B-16-SigLIP':  # with a class token
        usual = __import__('zoo').timm_options
        more = dict(class_token=True)
        monkeypatch.setattr('zoo.timm_options', lambda name: {**usual(name), **more})
    with in_small():
        clip = small_clip(name)
        clip.model.float()
        with pytest.raises(ValueError, match=sentence):
            export_hf(clip, tmp_path / 'model')


@torch.no_grad()
def test_the_lines_of_its_page_run(clip, tmp_path):
    export_hf(clip, tmp_path / 'model')
    page = (tmp_path / 'model/README.md').read_text()
    code = re.search(r'```python\n(.*?)```', page, re.DOTALL)[1]
    picture = synth_pairs(1)['image'][0].convert('RGB').resize((32, 32), Image.BICUBIC)
    names = dict(picture=picture)
    with chdir(tmp_path / 'model'):
        exec(code, names)
    image = clip.encode_image(clip.preprocess(picture)[None], True)
    words = clip.encode_text(clip.tokenizer(['a red square']), True)
    assert names['similar'].item() == pytest.approx((image @ words.T).item(), abs=1e-4)


@torch.no_grad()
def test_sentence_transformers_loads_it_too(clip, tmp_path):
    "Where it is installed; this library does not need it"
    theirs = pytest.importorskip('sentence_transformers')
    spec = whole_spec(clip)
    del spec.vision[1]
    small = prune(clip, spec)
    export_hf(small, tmp_path / 'model')
    model = theirs.SentenceTransformer(str(tmp_path / 'model'), device='cpu')
    pictures = synth_pairs(2)['image']
    found = torch.tensor(model.encode(pictures, normalize_embeddings=True))
    pixels = torch.stack([small.preprocess(picture) for picture in pictures])
    check_close(found, small.encode_image(pixels, True), eps=1e-2)
    found = torch.tensor(model.encode(SAID, normalize_embeddings=True))
    check_close(found, small.encode_text(small.tokenizer(SAID), True), eps=1e-5)
