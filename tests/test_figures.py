"Plots and pictures show what they say, and are saved with their numbers."

import numpy as np
import pandas as pd
import pytest
import torch

plt = pytest.importorskip('matplotlib.pyplot', reason="pip install 'mope_clip[dev]'")


@pytest.fixture(scope='module')
def tiny():
    from mope_clip.clip import tiny_clip

    return tiny_clip()


@pytest.fixture(scope='module')
def pairs():
    from mope_clip.data import synth_pairs

    return synth_pairs(6, captions=3)


@pytest.fixture(scope='module')
def scores(tiny):
    from mope_clip.data import synth_pairs
    from mope_clip.metrics import mope

    return mope(tiny, synth_pairs(16), towers='vision', modules=('head', 'layer'))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def test_a_figure_is_saved_with_its_numbers(tmp_path):
    from mope_clip.report.figures import save_figure, theme

    theme()
    assert plt.rcParams['figure.dpi'] == 80
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([1, 2], [3.0, 4.5])
    numbers = pd.DataFrame(dict(pairs=[1, 2], loss=[3.0, 4.5]))
    save_figure(fig, tmp_path, 'curve', numbers)
    save_figure(fig, tmp_path, 'bare')
    files = ['bare.png', 'curve.csv', 'curve.png', 'curve.svg']
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    assert '<dc:date>' not in (tmp_path / 'curve.svg').read_text(encoding='utf-8')
    assert (tmp_path / 'curve.png').read_bytes()[:4] == b'\x89PNG'
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / 'curve.csv'), numbers)


def test_a_table_is_saved_for_a_paper_and_for_a_program(tmp_path):
    from mope_clip.report.figures import save_table

    index = pd.Index(['half & half', 'all'], name='size')
    kept = pd.DataFrame({'kept (%)': [97.25, float('nan')], 'a_b': [3, 4]}, index=index)
    save_table(kept, tmp_path, 'kept', digits=1)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / 'kept.csv', index_col=0), kept)
    latex = (tmp_path / 'kept.tex').read_text(encoding='utf-8')
    for part in ('\\toprule', 'half \\& half & 97.2 & 3', 'kept (\\%)', 'all &  & 4', 'a\\_b'):
        assert part in latex
    save_table(kept, tmp_path, 'bare', index=False)
    assert 'all' not in (tmp_path / 'bare.tex').read_text(encoding='utf-8')


def test_heat_maps_show_every_score(scores):
    from mope_clip.report.figures import plot_scores

    heads, layers = plot_scores(scores).axes[:2]
    assert [heads.get_title(), layers.get_title()] == ['vision: heads', 'vision: layers']
    drawn = heads.collections[0].get_array().reshape(3, 4)  # three layers of four heads
    table = scores[scores.module == 'head'].score.to_numpy().reshape(3, 4)
    np.testing.assert_allclose(drawn, table)
    written = [f'{s:.1f}' for s in scores[scores.module == 'layer'].score]
    assert [t.get_text() for t in layers.texts] == written


def test_scores_in_order_have_intervals_of_two_errors(scores):
    from mope_clip.report.figures import plot_scores_with_errors

    heads = scores[scores.module == 'head']
    (ax,) = plot_scores_with_errors(heads).axes
    ranked = heads.sort_values('score')
    drawn = np.asarray(ax.lines[0].get_ydata(), dtype=float)
    np.testing.assert_allclose(drawn, ranked.score.astype(float))
    ends = [segment[:, 1] for segment in ax.collections[0].get_segments()]
    widths = [float(high - low) for low, high in ends]
    np.testing.assert_allclose(widths, 4 * ranked.se.astype(float))
    assert len(ends) == 12


def test_a_curve_has_losses_and_recall_against_pairs():
    from mope_clip.report.figures import plot_curve

    history = [
        dict(pairs=64 * k, contrastive_loss=2 / k, sim_loss=1 / k, loss=3 / k, mean_recall=20.0 * k)
        for k in (1, 2, 3)
    ]
    losses, recall = plot_curve(history, 'a toy').axes
    assert [line.get_label() for line in losses.lines] == ['contrastive_loss', 'sim_loss']
    assert losses.get_yscale() == 'log'
    assert list(losses.lines[0].get_xdata()) == [64, 128, 192]
    np.testing.assert_allclose(losses.lines[0].get_ydata(), [2, 1, 2 / 3])
    assert list(recall.lines[0].get_ydata()) == [20, 40, 60]
    unwatched = [{k: v for k, v in h.items() if k != 'mean_recall'} for h in history]
    assert len(plot_curve(unwatched).axes[1].lines) == 0


def framed(ax):
    return bool(ax.images) and all(s.get_visible() for s in ax.spines.values())


def test_the_frame_is_where_the_right_picture_ranks(tiny):
    from mope_clip.data import synth_pairs
    from mope_clip.evaluate import encode, encode_images
    from mope_clip.report.figures import plot_retrieved

    gallery = synth_pairs(4)
    axes = plot_retrieved({'tiny': tiny}, gallery, [(0, 0), (2, 1)], k=4).axes
    rows = [axes[:5], axes[5:]]
    assert [sum(map(framed, r)) for r in rows] == [1, 1]
    caption = encode(tiny, 'text', tiny.tokenizer([gallery[2]['captions'][1]]))[0]
    similar = encode_images(tiny, gallery['image']) @ caption
    order = similar.argsort(descending=True).tolist()
    assert [framed(ax) for ax in rows[1][1:]] == [i == 2 for i in order]


# ---------------------------------------------------------------- attention


@pytest.fixture(scope='module')
def slim(tiny):
    from mope_clip.clip import prune, whole_spec

    return prune(tiny, whole_spec(tiny))


@pytest.fixture(scope='module')
def inputs(tiny, pairs):
    from mope_clip.evaluate import images_of

    ids = tiny.tokenizer([c for captions in pairs['captions'] for c in captions])
    return dict(vision=images_of(tiny, pairs['image']), text=ids)


def close(a, b, eps=1e-6):
    torch.testing.assert_close(a, b, atol=eps, rtol=0)


@pytest.mark.parametrize('tower', ['vision', 'text'])
@torch.no_grad()
def test_attention_weights_are_those_of_the_model(slim, inputs, tower):
    from mope_clip.report.pictures import attention_weights

    net = slim.tower(tower)
    (x, mask), block = net.embed(inputs[tower]), net.blocks[0]
    weights, (_, _, values) = attention_weights(block, x, mask), block.qkv(x)
    close(weights.sum(-1), torch.ones(weights.shape[:3]))
    heads = (weights @ values).transpose(1, 2).flatten(2)
    close(heads, block.attend(x, mask), 1e-5)
    pick = net.picked(x, inputs[tower])
    of_picked = attention_weights(block, x, mask, pick)[:, :, 0]
    close(of_picked, weights[torch.arange(len(x)), :, pick])
    if tower == 'text':
        assert weights.triu(1).abs().max() == 0, 'no word attends to a later one'
        repeated = mask.expand(len(x) * block.heads, *mask.shape)
        close(attention_weights(block, x, repeated, pick)[:, :, 0], of_picked)


@torch.no_grad()
def test_a_layer_without_heads_has_no_weights(tiny, slim, inputs):
    from mope_clip.clip import prune, whole_spec
    from mope_clip.report.pictures import attention_weights

    bare = whole_spec(tiny)
    bare.text[0]['heads'] = []
    x, mask = slim.text.embed(inputs['text'])
    assert attention_weights(prune(tiny, bare).text.blocks[0], x, mask).shape[1] == 0


@torch.no_grad()
def test_the_row_of_the_pooled_token_is_drawn_in_every_layer(tiny, slim, inputs):
    from mope_clip.clip import prune, whole_spec
    from mope_clip.report.pictures import attention_weights, pooled_attention

    images, ids = inputs['vision'], inputs['text']
    maps = pooled_attention(tiny, 'vision', images, batch=4)
    assert [m.shape for m in maps] == [(6, 4, 17)] * 3  # 16 patches and the class token
    close(maps[0], pooled_attention(tiny, 'vision', images)[0])
    stream = slim.vision(images, hidden=True)[1][1]
    close(maps[2][0], attention_weights(slim.vision.blocks[2], stream)[0, :, 0], 1e-5)
    x, mask = slim.text(ids, hidden=True)[1][0], slim.text.embed(ids)[1]
    read = attention_weights(slim.text.blocks[1], x, mask, ids.argmax(1))[:, :, 0]
    close(pooled_attention(tiny, 'text', ids)[1], read, 1e-5)
    spec = whole_spec(tiny)
    spec.vision.pop(1)
    spec.vision[2]['heads'] = [3]
    left = pooled_attention(prune(tiny, spec), 'vision', images)
    assert [m.shape[1] for m in left] == [4, 1]


def test_a_tower_that_averages_its_tokens_has_no_map(inputs):
    from mope_clip.clip import tiny_clip
    from mope_clip.report.pictures import pooled_attention

    mean = tiny_clip()
    mean.model.visual.pool_type = 'avg'
    with pytest.raises(ValueError, match='pools all tokens'):
        pooled_attention(mean, 'vision', inputs['vision'])


@torch.no_grad()
def test_rollout_multiplies_the_layers_in_their_order(tiny, slim, inputs):
    from mope_clip.clip import prune, whole_spec
    from mope_clip.report.pictures import attention_weights, pooled_attention, rollout

    images, ids = inputs['vision'], inputs['text']
    flow = rollout(tiny, 'vision', images, batch=4)
    close(flow.sum(1), torch.ones(6))
    close(flow, rollout(tiny, 'vision', images))
    one = whole_spec(tiny)
    for layer in (1, 2):
        one.vision.pop(layer)
    first, alone = prune(tiny, one), torch.eye(17)[0]
    mean = pooled_attention(first, 'vision', images)[0].mean(1)
    close(rollout(first, 'vision', images), (mean + alone) / 2)  # of one layer
    one.vision[0]['heads'] = []
    assert rollout(prune(tiny, one), 'vision', images)[3].tolist() == alone.tolist()
    (x, mask), end, eye = slim.text.embed(ids), ids.argmax(1), torch.eye(12)
    streams = x, slim.text(ids, hidden=True)[1][0]
    below, above = (
        (attention_weights(block, y, mask).mean(1) + eye) / 2
        for block, y in zip(slim.text.blocks, streams, strict=True)
    )
    close(rollout(tiny, 'text', ids), (above @ below)[torch.arange(18), end])


def test_a_patch_map_lies_as_the_picture_does(tiny, inputs):
    from mope_clip.report.pictures import patch_map, pooled_attention

    maps = pooled_attention(tiny, 'vision', inputs['vision'])
    grid = patch_map(tiny, maps[0])
    assert grid.shape == (6, 4, 4, 4)
    assert torch.equal(grid[0, 1].flatten(), maps[0][0, 1, 1:])
    close(grid.sum((-1, -2)) + maps[0][..., 0], torch.ones(6, 4))


def test_a_map_is_drawn_on_its_own_scale(pairs):
    from mope_clip.report.pictures import show_map

    weights = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    _, ax = plt.subplots()
    show_map(ax, pairs[0]['image'], weights, 'layer 0, head 0')
    drawn = ax.get_images()[1].get_array()
    assert drawn.shape == (4, 4) and ax.get_title() == 'layer 0, head 0'
    np.testing.assert_allclose([drawn.min(), drawn.max()], [0, 1])
    assert int(drawn.argmax()) == int(weights.argmax())


def test_words_are_those_of_the_tokenizer_up_to_the_pooled_one(tiny, pairs, inputs):
    from open_clip.tokenizer import SimpleTokenizer

    from mope_clip.clip import tiny_clip
    from mope_clip.report.pictures import words

    ids = inputs['text']
    said = words(tiny, ids[0])
    assert len(said) == int(ids[0].argmax()) + 1
    assert pairs[0]['captions'][0].split()[1] in said
    other = tiny_clip()
    other.tokenizer = SimpleTokenizer(context_length=12)
    own = words(other, other.tokenizer(['a red square'])[0])
    assert own == ['<s>', 'a', 'red', 'square', '</s>']


# ---------------------------------------------------------------- what each caption finds


def test_what_is_found_is_what_recall_counts(tiny, pairs):
    from mope_clip.data import synth_pairs
    from mope_clip.evaluate import retrieval
    from mope_clip.report.pictures import Found

    found = Found(tiny, pairs)
    share = 100 * found.right.float().mean().item()
    assert share == pytest.approx(retrieval(tiny, pairs)['IR@1'], abs=1e-4)
    assert torch.equal(found.right, found.margin > 0)
    assert found.nth.tolist() == [0, 1, 2] * 6
    assert found.owner.tolist() == [i for i in range(6) for _ in range(3)]
    for caption in range(18):
        is_first = found.top(caption, 1)[0] == found.owner[caption].item()
        assert is_first == (found.rank[caption].item() == 0)
    more = Found(tiny, synth_pairs(24, captions=3))
    assert torch.equal(more.right, more.rank == 0) and torch.equal(more.right, more.margin > 0)
    assert (more.rank == 1).any()
    similar = found.captions[4] @ found.images.T
    best_wrong = max(s for i, s in enumerate(similar) if i != 1)
    close(found.margin[4], similar[1] - best_wrong)
    before = sum(int(s >= similar[1]) for i, s in enumerate(similar) if i != 1)
    assert found.rank[4].item() == before


def test_an_interval_of_captions_is_one_over_images():
    from mope_clip.report.pictures import over_images

    owner, rng = np.arange(100).repeat(5), np.random.default_rng(0)
    alike = rng.normal(50, 10, 100).repeat(5)  # captions of an image are worth the same
    all_of = np.ones(500, dtype=bool)
    mean = over_images(alike, owner, all_of)
    assert mean.value == pytest.approx(alike.mean())
    assert 3 < mean.high - mean.low < 5  # 2 x 1.96 x 10/sqrt(100): captions would say 1.8
    half = np.arange(500) % 5 < 2
    paired = over_images(alike + 3 * half, owner, half, ~half)
    np.testing.assert_allclose(paired, [3, 3, 3], atol=1e-9)  # what images differ in cancels
    assert over_images(alike, owner, owner == 7)[0] == alike[35]
    assert np.isnan(over_images(alike, owner, ~all_of)).all()


def test_facts_come_from_the_name_of_a_picture(pairs):
    from mope_clip.data import load_pairs
    from mope_clip.report.pictures import CAPTION_KINDS, scene_facts

    scenes = load_pairs('openmoji', 'validation', 4).select([1, 3])
    facts = scene_facts(scenes)
    assert len(facts) == 2 and scene_facts(pairs) is None
    for fact, captions in zip(facts, scenes['captions'], strict=True):
        said = dict(zip(CAPTION_KINDS, captions, strict=True))
        assert all(fact['things'][0]['noun'].lower() in c.lower() for c in captions)
        assert fact['ground'][0] in said['on what']
        assert fact['things'][0]['size'] in said['how large']
        assert said['how many'].startswith('Exactly')


def test_a_head_is_really_removed(tiny, pairs):
    from mope_clip.clip import prune, whole_spec
    from mope_clip.pruners import masked
    from mope_clip.report.pictures import Found, without_head

    spec = without_head(tiny, 'vision', 1, 2)
    assert spec.vision[1]['heads'] == [0, 1, 3] and spec.text == whole_spec(tiny).text
    removed, off = (Found(f(tiny, spec), pairs).images for f in (prune, masked))
    close(removed, off, 1e-5)


def test_the_right_picture_is_framed_for_every_model(tiny, pairs):
    from mope_clip.clip import prune
    from mope_clip.report.pictures import Asked, Found, plot_found, without_head

    found, rows = Found(tiny, pairs), []
    for head in (0, 1):
        spare = Found(prune(tiny, without_head(tiny, 'vision', 0, head)), pairs)
        hits = {'whole': found.top(0, 3), 'without': spare.top(0, 3)}
        rows.append(Asked(f'without head {head}\n{pairs[0]["captions"][0]}', 0, hits))
    fig = plot_found(rows, pairs)
    assert len(fig.axes) == 2 * (1 + 6)
    expected = sum(hits.count(0) for r in rows for hits in r.found.values())
    assert sum(map(framed, fig.axes)) == expected


def test_milliseconds_are_measured_with_the_recorder_off(tiny, monkeypatch):
    import sys

    from mope_clip.report import figures
    from mope_clip.report.code import Recorder

    seen = []

    def latency(clip, batch):
        seen.append(sys.gettrace())
        return dict(vision_ms=1.0, text_ms=2.0)

    monkeypatch.setattr(figures, 'latency', latency)
    with Recorder():
        table = figures.size_table({'tiny': tiny}, batch=4)
    assert seen == [None] and table['text ms (batch 4)']['tiny'] == 2.0
