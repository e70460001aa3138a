"""Model families in small, behind the port: each is scored, pruned, saved and counted exactly.

A family is one configuration of open_clip with random weights, shrunk by `zoo`.
"""

import copy
from unittest import mock

import open_clip
import pandas as pd
import pytest
import torch
import transformers
import zoo as zoo_room
from timm.models.vision_transformer import ParallelScalingBlock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import WORDS, in_small, small_clip, small_config, timm_options

from mope_clip.clip import (
    TOWERS,
    PruneSpec,
    both,
    build_clip,
    compare,
    compose,
    draw_spec,
    load_clip,
    prune,
    relative,
    save_open_clip,
    shape_of,
    whole_spec,
)
from mope_clip.clip.model import class_of
from mope_clip.clip.whole import at_hand
from mope_clip.data import synth_pairs
from mope_clip.distill import distill, learned_masks
from mope_clip.evaluate import cost, latency, spec_cost
from mope_clip.metrics import activation, fisher, magnitude, mope, mope_plain, random_scores, taylor
from mope_clip.metrics.engine import LayerInputs, features_without
from mope_clip.metrics.mope import without_module
from mope_clip.metrics.z import ScoringTask
from mope_clip.pruners import (
    export_hf,
    export_onnx,
    export_open_clip,
    masked,
    plan,
    plan_depth,
    plan_width,
    stepwise,
    trim_vocabulary,
)
from mope_clip.pruners.formats import not_plain
from mope_clip.pruners.hub import model_card
from mope_clip.pruners.servable import check_servable

WITH_POOLER = ('ViT-B-16-SigLIP', 'PE-Core-B-16', 'PE-Core-bigG-14-448')
CUT = (  # heads, neurons and layers may go
    *WITH_POOLER,
    'ViT-SO400M-16-SigLIP-i18n-256',  # an odd number of neurons, no text projection
    'ViT-B-16-SigLIP2',
    'MobileCLIP-B',
    'MobileCLIP2-L-14',
    'ViTamin-S',
    'EVA01-g-14',
    'EVA02-E-14',
    'ViT-L-14-CLIPA',
    'coca_ViT-B-32',
)
LAYERS_ONLY = ('EVA02-B-16',)
ONE_TOWER = dict(  # the tower that stays whole, and its class
    RN50=('vision', 'ModifiedResNet'),
    convnext_base=('vision', 'ConvNeXt'),
    **{'MobileCLIP-S1': ('vision', 'FastVit')},
    **{'roberta-ViT-B-32': ('text', 'HFTextEncoder')},
    **{'nllb-clip-base-siglip': ('text', 'HFTextEncoder')},
)


@pytest.fixture(scope='module')
def zoo():
    "Small models by name, made once; inside, no hub is asked"
    made, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # several are slower where everything is this small

    def get(name):
        if name not in made:
            made[name] = small_clip(name)
        return made[name]

    with in_small():
        yield get
    torch.set_num_threads(threads)


def theirs(clip, tower, x):
    "open_clip's own forward, normalised"
    encode = clip.model.encode_image if tower == 'vision' else clip.model.encode_text
    with torch.no_grad():
        return torch.nn.functional.normalize(encode(x), dim=-1)


@torch.no_grad()
def embeddings(clip, n=3):
    "Features of random images and captions"
    generator = torch.Generator().manual_seed(0)
    images = clip.vision.noise(n, generator).to(clip.dtype)
    return clip.encode_image(images), clip.encode_text(clip.text.noise(n, generator))


def near(ours, others, by=1e-9):
    for x, y in zip(ours, others, strict=True):
        assert (x - y).abs().max() <= by * max(1, y.abs().max())


def uneven(clip):
    "A layer without heads, one without neurons, one gone; half of a pooler"
    spec = whole_spec(clip)
    for tower in TOWERS:
        kept, blocks = getattr(spec, tower), len(clip.tower(tower).blocks)
        if not blocks:
            continue
        kept[0] = dict(heads=[], neurons=kept[0]['neurons'][::3])
        kept[blocks - 1] = dict(heads=kept[blocks - 1]['heads'][1::2], neurons=[])
        if blocks > 2:
            del kept[1]
        if blocks in kept:
            kept[blocks] = {unit: indices[1::2] for unit, indices in kept[blocks].items()}
    return spec


def layers_alone(clip):
    "Only layers go"
    spec = whole_spec(clip)
    del spec.vision[1], spec.text[0]
    return spec


# ---- exact towers


@pytest.mark.parametrize('name', [*CUT, *LAYERS_ONLY, *ONE_TOWER])
def test_the_towers_are_open_clips_own_functions(zoo, name):
    clip = zoo(name)
    images, ids = clip.vision.noise(3).double(), clip.text.noise(3)
    ours = clip.encode_image(images, True), clip.encode_text(ids, True)
    near(ours, (theirs(clip, 'vision', images), theirs(clip, 'text', ids)))


@pytest.mark.parametrize('name', [*CUT, *LAYERS_ONLY])
def test_the_hidden_states_are_the_outputs_of_all_blocks(zoo, name):
    clip = zoo(name)
    images = clip.vision.noise(2).double()
    features, states = clip.vision(images, hidden=True)
    near([features], [clip.vision(images)])
    assert len(states) == len(clip.vision.blocks)
    assert states[-1].shape == (2, clip.vision.tokens, clip.vision.width)


@pytest.mark.parametrize('name', CUT)
def test_removed_equals_masked_with_uneven_heads(zoo, name):
    clip = zoo(name)
    spec = uneven(clip)
    small = prune(clip, spec)
    near(embeddings(small), embeddings(masked(clip, spec)))
    x = dict(vision=small.vision.noise(2).double(), text=small.text.noise(2))
    ours = small.encode_image(x['vision'], True), small.encode_text(x['text'], True)
    near(ours, [theirs(small, tower, x[tower]) for tower in TOWERS])  # open_clip's forward runs on
    step = whole_spec(small)  # and it can be cut again
    step.vision[0]['neurons'] = step.vision[0]['neurons'][::2]
    again = prune(small, step)
    near(embeddings(again), embeddings(prune(clip, compose(spec, step))), by=0)
    assert relative(small.spec, again.spec) == step


@pytest.mark.parametrize('name', LAYERS_ONLY)
def test_where_norms_span_units_layers_go_and_units_are_refused_by_name(zoo, name):
    clip = zoo(name)
    spec = layers_alone(clip)
    near(embeddings(prune(clip, spec)), embeddings(masked(clip, spec)))
    pairs = synth_pairs(6)
    single = clip.copy()
    single.model.float()
    assert set(mope(single, pairs, modules='layer').layer) == {0, 1, 2}
    for module, word in dict(head='scale_attn_inner', ffn='scale_mlp').items():
        with pytest.raises(ValueError, match=word):
            mope(single, pairs, towers='vision', modules=module)
    fewer = whole_spec(clip)
    fewer.vision[0]['heads'] = [1]
    with pytest.raises(ValueError, match='scale_attn_inner'):
        prune(clip, fewer)


@pytest.mark.parametrize('name', CUT)
def test_gradients_after_removal_are_those_of_the_masked_model(zoo, name):
    clip = zoo(name)
    spec = uneven(clip)
    small, same_size = prune(clip, spec), masked(clip, spec)
    images, ids = clip.vision.noise(4).double(), clip.text.noise(4)
    for c in (small, same_size):
        loss, bias = c.contrastive_loss(), {}
        if c.logit_bias is not None:
            bias = dict(logit_bias=c.logit_bias)
        features = c.encode_image(images, True), c.encode_text(ids, True)
        loss(*features, c.logit_scale.exp(), **bias).backward()
    with torch.no_grad():
        for p in same_size.model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    cut = dict(prune(same_size, spec).model.named_parameters())
    for key, p in small.model.named_parameters():
        got = torch.zeros_like(p) if p.grad is None else p.grad
        if p.numel():
            assert (got - cut[key]).abs().max() <= 1e-9 * max(1, cut[key].abs().max()), key


# ---- scores


@pytest.mark.parametrize('name', CUT)
def test_the_engine_equals_real_removal_at_every_stage(zoo, name):
    clip = zoo(name)
    task = ScoringTask(clip, synth_pairs(6))
    for tower in TOWERS:
        net = prune(clip, whole_spec(clip)).tower(tower)
        inputs = LayerInputs(net, task.x[tower], 4)
        x = task.x[tower]
        x = x.double() if tower == 'vision' else x
        for layer, stage in enumerate(net.stages):
            groups = [list(range(0, stage.neurons, 3)), [1]]
            wanted = [('head', 1), ('ffn', 0), *([] if stage.is_pooler else [('layer', 0)])]
            for (module, index), found in features_without(inputs, layer, wanted, groups).items():
                smaller = without_module(clip, tower, layer, module, index, groups[0])
                near([found], [theirs(smaller, tower, x)])
                assert (found - task.dense[tower]).abs().max() > 1e-7, 'it does something'


@pytest.mark.parametrize('name', ['ViT-B-16-SigLIP', 'PE-Core-B-16', 'EVA02-E-14', 'ViTamin-S'])
def test_scores_equal_their_definition(zoo, name):
    clip, pairs = zoo(name), synth_pairs(8)
    table = mope(clip, pairs, groups=2, z='contrastive')
    for row in table.sample(6, random_state=1).itertuples():
        plain = mope_plain(
            clip, pairs, row.tower, row.layer, row.module, row.index, row.neurons, 'contrastive'
        )
        assert row.score == pytest.approx(plain, abs=1e-8)


@pytest.mark.parametrize('name', WITH_POOLER)
def test_a_pooler_is_scored_and_pruned_behind_the_layers_and_never_goes(zoo, name):
    clip, pairs = zoo(name), synth_pairs(8)
    table = mope(clip, pairs, groups=2)
    behind = len(clip.vision.blocks)
    of_pooler = table[(table.tower == 'vision') & (table.layer == behind)]
    assert set(of_pooler.module) == {'head', 'ffn'}
    assert len(of_pooler) == clip.vision.pooler.heads + 2
    row = of_pooler.iloc[0]
    plain = mope_plain(clip, pairs, 'vision', behind, 'head', row['index'])
    assert row.score == pytest.approx(plain, abs=1e-9)
    half, shallow = plan_width(table, 0.5), plan_depth(table, 0.4)
    assert len(half.vision[behind]['heads']) == clip.vision.pooler.heads // 2
    assert shallow.vision[behind] == whole_spec(clip).vision[behind]
    assert len(shallow.layers('vision')) == 1
    small = prune(clip, both(half, shallow))
    assert shape_of(small)['vision'][-1][2] == 'pooler' and len(small.vision.blocks) == 1
    near(embeddings(small), embeddings(masked(clip, both(half, shallow))))
    depth = mope(small, pairs, modules='layer')
    assert not (depth.layer == len(small.vision.blocks)).any()
    fits = plan(table, clip, macs=0.6, log=lambda line: None)
    assert spec_cost(clip, fits)['macs'] <= 0.6 * cost(clip)['macs']


@pytest.mark.parametrize('name', ['ViT-B-16-SigLIP', 'EVA01-g-14'])
@pytest.mark.parametrize('metric', [magnitude, taylor, fisher, activation, random_scores])
def test_every_metric_rates_every_stage(zoo, name, metric):
    clip = zoo(name).copy()
    clip.model.float()
    pairs = () if metric in (magnitude, random_scores) else (synth_pairs(8),)
    table = metric(clip, *pairs, groups=2)
    for tower in TOWERS:
        rows = table[table.tower == tower]
        net = clip.tower(tower)
        heads = rows[rows.module == 'head'].groupby('layer').size()
        assert heads.tolist() == [stage.heads for stage in net.stages]
        assert (rows.module == 'layer').sum() == len(net.blocks)
    assert table.score.notna().all()
    assert len(plan_width(table, 0.5).vision) == len(clip.vision.stages)


# ---- what SigLIP's text tower reads


def test_a_bidirectional_caption_attends_its_padding_and_is_not_cut(zoo):
    text = zoo('ViT-B-16-SigLIP').text
    ids = text.noise(3)
    assert not text.trims and text.trim(ids).shape == ids.shape
    assert text.lengths(ids).tolist() == [12] * 3
    other = ids.clone()
    other[ids == 0] = 5  # other padding is another caption
    padded = (ids == 0).any(1)
    changed = (text(ids) - text(other)).abs().amax(1) > 1e-6
    assert padded.any() and changed[padded].all()


# ---- what it costs


def flops(tower, x):
    "Multiply-accumulates that PyTorch counts"
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        tower(x, hidden=True)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize('name', [*CUT, *LAYERS_ONLY, *ONE_TOWER])
def test_costs_are_what_pytorch_counts(zoo, name):
    clip = zoo(name)
    specs = [whole_spec(clip)] if name in LAYERS_ONLY else [whole_spec(clip), uneven(clip)]
    for spec in specs:
        small = prune(clip, spec)
        small.model.requires_grad_(False)
        told = cost(small)
        assert told == spec_cost(clip, spec)
        assert told['params'] == sum(p.numel() for p in small.model.parameters())
        counted = flops(small.vision, small.vision.noise(1).double())
        assert told['vision_macs'] == counted
        if not small.text.kept_whole:
            assert told['text_macs'] == flops(small.text, small.text.noise(1))


# ---- files


@pytest.mark.parametrize('name', [*CUT, *LAYERS_ONLY, *ONE_TOWER])
def test_a_pruned_model_is_saved_and_read_bit_for_bit(zoo, name, tmp_path):
    clip = zoo(name)
    spec = layers_alone(clip) if name in LAYERS_ONLY else uneven(clip)
    small = prune(clip, spec)
    small.model.float()
    small.save(tmp_path / 'saved')
    back = load_clip(tmp_path / 'saved', device='cpu')
    assert back.spec == small.spec and shape_of(back) == shape_of(small)
    near(embeddings(back), embeddings(small), by=0)


@pytest.mark.parametrize('name', [*CUT, *LAYERS_ONLY, *ONE_TOWER])
def test_a_checkpoint_of_open_clip_is_read_by_its_name(zoo, name, tmp_path, monkeypatch):
    config = small_config(name)
    monkeypatch.setattr(open_clip, 'get_model_config', lambda name: config['model_cfg'])
    monkeypatch.setattr(open_clip, 'get_tokenizer', lambda name, **options: WORDS.tokenizer)
    with at_hand(config['model_cfg'], None) as cfg:
        cfg.pop('custom_text', None)
        model = class_of(config['model_cfg'])(**cfg).eval()
    state = {f'module.{key}': x for key, x in model.state_dict().items()}
    torch.save(dict(epoch=3, state_dict=state), tmp_path / 'epoch_3.pt')
    clip = load_clip(name, tmp_path / 'epoch_3.pt', device='cpu')
    own = clip.model.state_dict()
    left_out = {key for key in model.state_dict() if key.startswith('text_decoder.')}
    assert set(own) == set(model.state_dict()) - left_out
    assert all(torch.equal(own[key], x) for key, x in model.state_dict().items() if key in own)


def test_a_text_tower_of_hugging_face_is_read_without_asking_the_hub(zoo, tmp_path):
    clip = zoo('roberta-ViT-B-32').copy()
    clip.model.float()
    clip.save(tmp_path / 'saved')
    read = transformers.AutoConfig.from_pretrained
    asked = []

    def watched(place, *args, **options):
        asked.append(place)
        return read(place, *args, **options)

    with mock.patch.object(transformers.AutoConfig, 'from_pretrained', watched):
        back = load_clip(tmp_path / 'saved', device='cpu')
    assert asked and not [place for place in asked if 'roberta' in str(place)]
    near(embeddings(back), embeddings(clip), by=0)


def short_roberta():
    "A text tower of Hugging Face that reads 20 tokens"
    config = small_config('roberta-ViT-B-32')
    config['model_cfg']['text_cfg']['context_length'] = 20
    return build_clip(config, WORDS.tokenizer)


def test_a_text_tower_of_hugging_face_reads_as_many_tokens_as_configured(zoo, tmp_path):
    clip, longer = short_roberta(), zoo('roberta-ViT-B-32')
    for each in (clip, clip.copy()):
        assert each.text.noise(2).shape == (2, 20) and longer.text.tokens == 77
    assert cost(clip)['text_macs'] < cost(longer)['text_macs'] / 3
    export_onnx(clip, tmp_path / 'onnx', ('text',))  # checked in onnxruntime
    assert '20 tokens' in (tmp_path / 'onnx/README.md').read_text()


def test_a_card_of_a_text_tower_of_hugging_face_counts_it_on_both_sides(zoo):
    macs = cost(short_roberta())['text_macs']
    assert f'| {macs:,} | {macs:,} | 100% |' in model_card(short_roberta())


def test_a_text_tower_of_hugging_face_loses_no_words(zoo):
    clip = zoo('roberta-ViT-B-32')
    spec = whole_spec(clip)
    spec.vocabulary = [0, 1, 2]
    for trim in (lambda: trim_vocabulary(clip, ['a']), lambda: prune(clip, spec)):
        with pytest.raises(ValueError, match='is a HFTextEncoder, which keeps all of its tokens'):
            trim()


@pytest.mark.parametrize('options', [dict(), dict(embed_dim=64, num_heads=16)])
@pytest.mark.parametrize('name', ['PE-Core-B-16', 'PE-Core-bigG-14-448'])
def test_a_pooler_of_another_size_is_no_loss(zoo, name, options, tmp_path, monkeypatch):
    clip = variant(monkeypatch, name, options, {})
    clip.model.float()
    check_servable(clip, 'layer')
    assert not_plain(clip) == []
    export_open_clip(clip, tmp_path / 'whole')
    spec = whole_spec(clip)
    spec.vision[3]['heads'] = spec.vision[3]['heads'][1:]
    small = prune(clip, spec)
    assert not_plain(small) == ['vision layer 3 has 7 of 8 heads']
    with pytest.raises(ValueError, match='The vision tower has lost heads'):
        check_servable(small, 'layer')


def test_what_a_format_cannot_hold_is_said(zoo, tmp_path):
    siglip = zoo('ViT-B-16-SigLIP').copy()
    siglip.model.float()
    export_open_clip(siglip, tmp_path / 'whole')  # nothing has gone
    model, _, _ = open_clip.create_model_and_transforms(f'local-dir:{tmp_path / "whole"}')
    images = siglip.vision.noise(2)
    near([model.encode_image(images)], [siglip.encode_image(images)], by=1e-6)
    with pytest.raises(ValueError, match='heads'):
        export_open_clip(prune(siglip, uneven(siglip)), tmp_path / 'cut')
    with pytest.raises(ValueError, match='one of timm'):
        export_open_clip(prune(siglip, uneven(siglip)), tmp_path / 'cut', pad=True)
    mobile = zoo('MobileCLIP2-L-14').copy()
    mobile.model.float()
    with pytest.raises(ValueError, match='timm_model_name'):
        export_hf(mobile, tmp_path / 'hf')
    coca = zoo('coca_ViT-B-32')
    with pytest.raises(ValueError, match='decoder'):
        save_open_clip(coca, tmp_path / 'coca')


def test_a_specification_without_a_pooler_is_read_as_before():
    base = {tower: dict(layers=2, heads=2, neurons=4) for tower in TOWERS}
    kept = {1: dict(heads=[0], neurons=[1, 2])}
    spec = PruneSpec(kept, kept, base)
    assert spec.vision == kept and spec.layers('vision') == [1]
    with_pooler = copy.deepcopy(base)
    with_pooler['vision']['pooler'] = dict(heads=2, neurons=3)
    assert PruneSpec(kept, kept, with_pooler).vision[2] == dict(heads=[0, 1], neurons=[0, 1, 2])
    with pytest.raises(ValueError, match='leaves no layer in the vision tower'):
        PruneSpec({2: dict(heads=[0], neurons=[])}, kept, with_pooler)
    with pytest.raises(ValueError, match='vision layer 2 keeps heads outside 0 to 1: 2'):
        PruneSpec({**kept, 2: dict(heads=[2], neurons=[])}, kept, with_pooler)


def test_a_specification_of_another_pooler_is_refused_by_name(zoo):
    clip = zoo('ViT-B-16-SigLIP')
    spec = whole_spec(prune(clip, uneven(clip)))
    plain = whole_spec(clip)
    base = copy.deepcopy(plain.base)
    base['vision']['pooler'] = dict(heads=2, neurons=64)
    spec = PruneSpec({0: plain.vision[0]}, plain.text, base)
    with pytest.raises(ValueError, match=r'pooler: 2 heads and 64 neurons there, 4 .* here'):
        prune(clip, spec)


@pytest.mark.parametrize('name', ['ViT-B-16-SigLIP', 'PE-Core-B-16', 'MobileCLIP-B', 'EVA02-E-14'])
def test_a_pruned_model_is_exported_as_a_graph(zoo, name, tmp_path):
    small = prune(zoo(name), uneven(zoo(name)))
    small.model.float()
    assert set(export_onnx(small, tmp_path / 'onnx')) == set(TOWERS)  # checked in onnxruntime


# ---- one tower alone


@pytest.mark.parametrize('name', ONE_TOWER)
def test_a_tower_without_blocks_stays_whole_and_is_refused_by_name(zoo, name):
    clip, pairs = zoo(name).copy(), synth_pairs(8)
    clip.model.float()
    whole, kind = ONE_TOWER[name]
    other = {'vision': 'text', 'text': 'vision'}[whole]
    for ask in (mope, taylor, activation):
        with pytest.raises(ValueError, match=kind):
            ask(clip, pairs)
    with pytest.raises(ValueError, match=kind):
        random_scores(clip)
    table = mope(clip, pairs, towers=other, groups=2)
    assert set(table.tower) == {other}
    small = prune(clip, plan_width(table, 0.5))
    assert shape_of(small)[whole] == []
    assert cost(small)['macs'] < cost(clip)['macs']
    kept = small.tower(whole).state_dict()
    assert all(torch.equal(kept[key], x) for key, x in clip.tower(whole).state_dict().items())
    assert kind in repr(small)


def test_coca_generates_no_captions(zoo):
    clip = zoo('coca_ViT-B-32')
    assert not any('decoder' in key for key in clip.model.state_dict())
    with pytest.raises(ValueError, match='Captions cannot be generated'):
        clip.model(clip.vision.noise(1).double(), clip.text.noise(1))


# ---- learning


def test_distillation_lowers_the_sigmoid_loss_and_moves_its_bias(zoo):
    teacher = zoo('ViT-B-16-SigLIP').copy()
    teacher.model.float()
    spec = whole_spec(teacher)
    spec.vision[3]['heads'] = [0]  # the pooler has lost heads
    spec.vision[1]['heads'] = []
    student, pairs = prune(teacher, spec), synth_pairs(64)
    assert type(student.contrastive_loss()).__name__ == 'SigLipLoss'
    losses = []
    done = distill(
        student,
        teacher,
        pairs,
        pairs_seen=640,
        batch=32,
        weights=dict(itc=1.0, hidn=1.0),
        freeze_scale=False,
        log=losses.append,
    )
    learned = done.clip
    assert shape_of(learned) == shape_of(student)
    assert loss_of(learned, pairs) < loss_of(student, pairs)
    assert learned.logit_bias.item() != student.logit_bias.item()


@torch.no_grad()
def loss_of(clip, pairs):
    "The model's own loss over all pairs at once"
    task = ScoringTask(clip, pairs)
    n = len(pairs)
    first = task.caption[torch.tensor([(task.owner == i).nonzero()[0, 0] for i in range(n)])]
    features = task.dense['vision'], task.dense['text'][first]
    loss = clip.contrastive_loss()
    return loss(*features, clip.logit_scale.exp(), logit_bias=clip.logit_bias).item()


# ---- what timm can be asked for

PLAIN = dict(scale_mlp=False, scale_attn_inner=False)
VARIANTS = dict(  # a configuration, options of timm, options of open_clip's vision tower
    registers=('ViT-B-16-SigLIP', dict(class_token=True, reg_tokens=2), {}),
    registers_and_token=('MobileCLIP2-L-14', dict(reg_tokens=2, no_embed_class=True), {}),
    qk_norm=('MobileCLIP2-L-14', dict(qk_norm=True), {}),
    layer_scale=('MobileCLIP2-L-14', dict(init_values=0.3), {}),
    images_of_any_size=('ViT-B-16-SigLIP', dict(dynamic_img_size=True), {}),
    average=('MobileCLIP2-L-14', {}, dict(timm_pool='avg')),
    most=('MobileCLIP2-L-14', {}, dict(timm_pool='max')),
    linear_head=('MobileCLIP2-L-14', {}, dict(timm_proj='linear', timm_proj_bias=True)),
    mlp_head=('MobileCLIP2-L-14', {}, dict(timm_proj='mlp')),
    swiglu=('EVA02-B-16', dict(scale_mlp=False, scale_attn_inner=False), {}),
    swiglu_split=(
        'EVA02-B-16',
        dict(scale_mlp=False, scale_attn_inner=False, swiglu_align_to=8),
        {},
    ),
    rope_norms=('PE-Core-B-16', dict(qk_norm=True, init_values=0.3), {}),
    rope_token=('PE-Core-B-16', dict(global_pool='token'), dict(timm_pool='token')),
)


def variant(monkeypatch, name, options, vision):
    "A small model whose tower of timm has other options"
    usual, config = timm_options, small_config(name)
    monkeypatch.setattr(zoo_room, 'timm_options', lambda name: {**usual(name), **options})
    config['model_cfg']['vision_cfg'] |= vision
    monkeypatch.setattr(zoo_room, 'small_config', lambda name: config)
    return small_clip(name)


@pytest.mark.parametrize('which', VARIANTS)
def test_options_of_timm_are_exact_too(zoo, which, monkeypatch):
    clip = variant(monkeypatch, *VARIANTS[which])
    images = clip.vision.noise(3).double()
    before = theirs(clip, 'vision', images)
    near([clip.encode_image(images, True)], [before])
    spec = uneven(clip)
    small = prune(clip, spec)
    near(embeddings(small), embeddings(masked(clip, spec)))
    near([small.encode_image(images, True)], [theirs(small, 'vision', images)])
    small.model.requires_grad_(False)
    assert cost(small)['vision_macs'] == flops(small.vision, images[:1])
    net = prune(clip, whole_spec(clip)).vision
    inputs = LayerInputs(net, images, 2)
    for layer in range(len(net.stages)):
        found = features_without(inputs, layer, [('head', 1), ('ffn', 0)], [[0, 3]])
        for (module, index), features in found.items():
            smaller = without_module(clip, 'vision', layer, module, index, [0, 3])
            near([features], [theirs(smaller, 'vision', images)])


REFUSED = dict(
    shared_keys=('PE-Core-B-16', dict(qkv_fused=False, num_kv_heads=2), {}, 'several heads share'),
    mixed_rope=('PE-Core-B-16', dict(rope_type='mixed'), {}, 'rotary positions'),
    rope_of_any_size=(
        'PE-Core-B-16',
        dict(dynamic_img_size=True),
        {},
        'rotary positions that differ',
    ),
    patch_dropout=('PE-Core-B-16', {}, dict(patch_dropout=0.5), 'patch dropout beside rotary'),
    differential=('MobileCLIP2-L-14', dict(attn_layer='diff'), {}, 'DiffAttention'),
    refined=('ViT-B-16-SigLIP', dict(global_pool='prr'), dict(timm_pool='prr'), "pooling by 'prr'"),
    parallel=('MobileCLIP2-L-14', dict(block_fn=ParallelScalingBlock), {}, 'ParallelScalingBlock'),
    no_bias=('MobileCLIP2-L-14', dict(proj_bias=False), {}, 'projections without bias'),
)


@pytest.mark.parametrize('which', REFUSED)
def test_what_of_timm_is_not_known_is_refused_by_name(zoo, which, monkeypatch):
    *options, word = REFUSED[which]
    with pytest.raises(ValueError, match=word):
        variant(monkeypatch, *options)


# ---- tables, stores and clocks


def test_a_table_of_a_tower_with_a_pooler_goes_through_a_store_and_a_file(zoo, tmp_path):
    clip, pairs = zoo('ViT-B-16-SigLIP').copy(), synth_pairs(8)
    clip.model.float()
    table = mope(clip, pairs, groups=2, store=tmp_path / 'store')
    again = mope(clip, pairs, groups=2, store=tmp_path / 'store')
    pd.testing.assert_frame_equal(table, again)
    table.to_parquet(tmp_path / 'scores.parquet')
    read = pd.read_parquet(tmp_path / 'scores.parquet')
    assert plan_width(read, 0.5) == plan_width(table, 0.5)
    together = mope(clip, pairs, groups=2, together=True)
    assert set(together[together.module == 'ffn'].query("tower == 'vision'").layer) == {0, 1, 2, 3}


@pytest.mark.parametrize('name', ['ViT-B-16-SigLIP', 'coca_ViT-B-32', 'RN50', 'roberta-ViT-B-32'])
def test_every_tower_is_timed(zoo, name):
    clip = zoo(name).copy()
    clip.model.float()
    told = latency(clip, batch=2, min_run_time=0.01)
    assert told['vision_ms'] > 0 and told['text_ms'] > 0
    assert clip.text.noise(1).shape[1] == clip.text.context


def test_stepwise_planning_and_masks_reach_the_pooler(zoo):
    clip, pairs = zoo('ViT-B-16-SigLIP').copy(), synth_pairs(8)
    clip.model.float()
    spec = stepwise(clip, pairs, keep=0.5, step=0.25, groups=4)
    assert len(spec.vision[3]['heads']) == 2 and len(spec.layers('vision')) == 3
    table = learned_masks(clip, synth_pairs(32), pairs_seen=64, batch=16, groups=2)
    assert (table.query("tower == 'vision' and layer == 3").module == 'head').sum() == 4
    assert draw_spec(spec) and set(compare(spec, whole_spec(clip)).module) == {
        'head',
        'neuron',
        'layer',
    }


# ---- bad input


@pytest.mark.parametrize(
    'name, tag, its', [('ViT-B-16-SigLIP', 'laion9b', 'webli'), ('RN50', 'webli', 'openai')]
)
def test_an_unknown_tag_and_one_of_another_architecture_are_answered_with_its_own(name, tag, its):
    with pytest.raises(FileNotFoundError) as told:
        load_clip(name, tag, device='cpu')
    assert f'{tag!r} is neither a file nor a tag of {name}; its tags are {its}' in str(told.value)


@pytest.mark.parametrize(
    'of, name', [('ViT-B-16-SigLIP', 'ViT-L-14-CLIPA'), ('MobileCLIP-B', 'PE-Core-B-16')]
)
def test_weights_of_another_family_are_one_sentence(zoo, of, name, tmp_path, monkeypatch):
    other, config = zoo(of).model.state_dict(), small_config(name)
    torch.save(dict(state_dict=other), tmp_path / 'epoch_3.pt')
    monkeypatch.setattr(open_clip, 'get_model_config', lambda name: config['model_cfg'])
    monkeypatch.setattr(open_clip, 'get_tokenizer', lambda name, **options: WORDS.tokenizer)
    with pytest.raises(ValueError) as told:
        load_clip(name, tmp_path / 'epoch_3.pt', device='cpu')
    sentence = str(told.value)
    assert sentence.startswith(f'The weights are not those of {name}: ')
    assert 'missing (' in sentence and 'superfluous (' in sentence and '\n' not in sentence
