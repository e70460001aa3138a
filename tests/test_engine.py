"""The engine equals brute force through open_clip's own forward.

Over a grid of architectures; several processes equal one; the killed resume.
"""

import copy
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
import torch.nn as nn
from conftest import GRID, ROOT, model_of, run

from mope_clip.clip import TOWERS, prune, tiny_clip, whole_spec
from mope_clip.data import synth_pairs
from mope_clip.metrics import mope
from mope_clip.metrics.engine import LayerInputs, features_without
from mope_clip.metrics.z import ScoringTask, contributions


def encode(model, tower, x):
    "open_clip's own forward"
    with torch.inference_mode():
        return (model.encode_image if tower == 'vision' else model.encode_text)(x, normalize=True)


def resblocks(model, tower):
    return (
        model.visual if tower == 'vision' else getattr(model, 'text', model)
    ).transformer.resblocks


def without(model, tower, layer, module, index, neurons):
    "The stupid witness: zero what a module writes, or replace it by the identity"
    model = copy.deepcopy(model)
    b = resblocks(model, tower)[layer]
    dh = b.attn.head_dim
    with torch.no_grad():
        if module == 'head':
            b.attn.out_proj.weight[:, index * dh : (index + 1) * dh] = 0
        elif module == 'ffn':
            b.mlp.c_proj.weight[:, neurons] = 0
        elif module == 'layer':

            class Same(nn.Module):
                def forward(self, q_x, k_x=None, v_x=None, attn_mask=None):
                    return q_x

                def get_weight_dtype(self):
                    return torch.float64

            resblocks(model, tower)[layer] = Same()
        elif module == 'attn':
            b.ls_1 = Zero()
        else:
            b.ls_2 = Zero()
    return model


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize('name', GRID)
def test_engine_equals_brute_force(name):
    clip, pairs = model_of(name), synth_pairs(10, captions=3)
    task, slim = ScoringTask(clip, pairs), prune(clip, whole_spec(clip))
    groups = [list(range(0, 50)), list(range(50, 128))]
    wanted = [('head', 1), ('ffn', 1), ('layer', 0), ('attn', 0), ('mlp', 0)]
    for t in TOWERS:
        dense = encode(clip.model, t, task.x[t])
        inputs = LayerInputs(slim.tower(t), task.x[t], 4, 'cpu')
        for layer in range(len(slim.tower(t).blocks)):
            feats = features_without(inputs, layer, wanted, groups)
            for (m, i), f in feats.items():
                neurons = groups[i] if m == 'ffn' else None
                brute = encode(without(clip.model, t, layer, m, i, neurons), t, task.x[t])
                assert (f - brute).abs().max() < 1e-10, (t, layer, m, i)
                first_token = t == 'text' and clip.text.pool_type == 'first'
                if m == 'head' and layer == 0 and not first_token:
                    assert (f - dense).abs().max() > 1e-6, 'the head does something'


@pytest.mark.parametrize('z', ['mean_recall', 'IR@1', 'contrastive', 'soft_recall'])
def test_scores_equal_brute_force_in_float64(z):
    clip, pairs = model_of('plain'), synth_pairs(12, captions=3)
    table, task = (
        mope(clip, pairs, groups=4, z=z, modules=('head', 'ffn', 'layer', 'attn', 'mlp')),
        ScoringTask(clip, pairs, z),
    )
    dense = {t: encode(clip.model, t, task.x[t]) for t in TOWERS}

    def z_of(f):
        parts = contributions(z, f['vision'], f['text'][task.caption], task.owner, task.scale)
        return parts.mean().item()

    for r in table.sample(25, random_state=0).itertuples():
        model = without(clip.model, r.tower, r.layer, r.module, r.index, r.neurons)
        assert r.score == pytest.approx(
            z_of(dense) - z_of({**dense, r.tower: encode(model, r.tower, task.x[r.tower])}),
            abs=1e-9,
        )


REFUSED = dict(
    scaled_cosine=(dict(block_type='custom', scaled_cosine_attn=True), {}, 'scaled_cosine_attn'),
    scale_attn_inner=(dict(block_type='custom', scale_attn_inner=True), {}, 'scale_attn_inner'),
    scale_fc=({}, dict(block_type='custom', scale_fc=True), 'scale_fc'),
)


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(name):
    vision, text, word = REFUSED[name]
    GRID[name] = (vision, text, {})
    try:
        with pytest.raises(ValueError, match=word):
            mope(model_of(name), synth_pairs(6))
    finally:
        del GRID[name]


def test_norms_across_heads_and_neurons_allow_layers():
    GRID['inner'] = (dict(block_type='custom', scale_attn_inner=True, scale_fc=True), {}, {})
    clip = model_of('inner')
    del GRID['inner']
    clip.model.float()
    assert len(mope(clip, synth_pairs(6), modules=('layer', 'attn', 'mlp'))) == 3 * 5


WORKER = """
import os, sys
# in one piece: the lines of two processes share a pipe
def say(line): os.write(1, (line + '\\n').encode())
from mope_clip.clip import tiny_clip
from mope_clip.data import synth_pairs
from mope_clip.metrics import mope
import importlib; M = importlib.import_module("mope_clip.metrics.mope")
if len(sys.argv) > 2:   # slow enough to be killed in the middle, and to share
    import time
    one = M.features_without
    def slow(*a, **k): time.sleep(float(sys.argv[2])); say('layer'); return one(*a, **k)
    M.features_without = slow
mope(tiny_clip(), synth_pairs(24, captions=3), groups=4, store=sys.argv[1])
say('finished')
"""


def start(store, *args):
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', WORKER, store, *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, 'MOPE_CLIP_PROGRESS': '0', 'OMP_NUM_THREADS': '1'},
    )


def scores(store=None):
    return mope(tiny_clip(), synth_pairs(24, captions=3), groups=4, store=store)


def test_two_processes_share_and_give_the_same_table(tmp_path):
    both = [start(tmp_path, 0.8), start(tmp_path, 0.8)]
    said = [p.communicate(timeout=120)[0].split() for p in both]
    assert all(s[-1] == 'finished' for s in said)
    assert sum(s.count('layer') for s in said) == 5, 'every layer was scored once'
    assert min(s.count('layer') for s in said) >= 1, 'both worked'
    pd.testing.assert_frame_equal(scores(tmp_path), scores(), check_like=False)


def test_two_ranks_of_torchrun_share_and_give_the_same_table(tmp_path):
    "No collectives: the ranks claim layers from the store"
    # `accelerate launch --cpu` silently starts one process, so the workers say that they are two
    (tmp_path / 'worker.py').write_text(
        WORKER.replace(
            'if len',
            "assert os.environ['WORLD_SIZE'] == '2'\nsay('rank ' + os.environ['RANK'])\nif len",
            1,
        )
    )
    r = run(
        sys.executable,
        '-W',
        'ignore',
        '-m',
        'torch.distributed.run',
        '--nproc_per_node=2',
        tmp_path / 'worker.py',
        tmp_path / 'store',
        0.5,
        ACCELERATE_USE_CPU='true',
        OMP_NUM_THREADS='1',
        timeout=200,
    )
    said = r.stdout.split()
    assert said.count('rank') == 2 and {'0', '1'} <= set(said) and said.count('finished') == 2, (
        r.stderr[-2000:]
    )
    assert said.count('layer') == 5, 'every layer was scored once'
    pd.testing.assert_frame_equal(scores(tmp_path / 'store'), scores())


def test_killed_process_loses_its_layer_only(tmp_path):
    p = start(tmp_path, 0.6)
    for _ in range(2):
        p.stdout.readline()
    time.sleep(0.2)
    p.send_signal(signal.SIGKILL)
    p.wait()
    done = len(list(tmp_path.glob('*/*-?.parquet')))
    assert 1 <= done < 5
    again = start(tmp_path, 0)
    assert again.communicate(timeout=120)[0].split().count('layer') == 5 - done
    pd.testing.assert_frame_equal(scores(tmp_path), scores())


def test_finished_batches_of_a_layer_are_not_computed_again(tmp_path, monkeypatch):
    "Killed inside a layer: what was finished is read back, the rest computed"
    import mope_clip.metrics.engine as E

    clip, pairs = tiny_clip(), synth_pairs(24)
    task, slim = ScoringTask(clip, pairs), prune(clip, whole_spec(clip))
    wanted, calls = [('head', 0), ('head', 1)], []

    def new():
        return LayerInputs(slim.vision, task.x['vision'], 8, 'cpu')

    whole = features_without(new(), 0, wanted, [])
    finish = E.finish

    def dies(*a):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return finish(*a)

    monkeypatch.setattr(E, 'finish', dies)
    with pytest.raises(KeyboardInterrupt):
        features_without(new(), 0, wanted, [], parts=tmp_path)
    calls.clear()
    monkeypatch.setattr(E, 'finish', lambda *a: (calls.append(1), finish(*a))[1])
    again = features_without(new(), 0, wanted, [], parts=tmp_path)
    assert len(calls) == 4, 'one batch of three was finished'
    assert all(torch.equal(whole[w], again[w]) for w in wanted)


def test_ranks_of_a_large_gallery_take_less_than_a_gibibyte():
    "5,000 images x 25,000 captions at width 512, beyond the embeddings, as the system sees it"
    code = """
import re, torch
from pathlib import Path
from mope_clip.evaluate.recall import ranks
from mope_clip.metrics.z import contributions
# not getrusage: its peak starts at that of the process this one was started by
peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])
im, tx = (torch.nn.functional.normalize(torch.randn(n, 512), dim=1) for n in (5000, 25000))
owner = torch.arange(5000).repeat_interleave(5)
small = ranks(im[:10], tx[:50], owner[:50]); start = peak()
ranks(im, tx, owner); print((peak() - start)/2**20)
contributions('contrastive', im, tx, owner); print((peak() - start)/2**20)
"""
    r = run(sys.executable, '-W', 'ignore', '-c', code)
    hard, smooth = map(float, r.stdout.split())
    assert 0.01 < hard < 1 and smooth < 1, (hard, smooth)
