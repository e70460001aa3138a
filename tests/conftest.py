"Shared by the tests: the root, one way to run a command, a grid of models, a toy repository."

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm

ROOT = Path(__file__).resolve().parent.parent


def run(*args, cwd=ROOT, timeout=600, fresh=True, **env):
    """Run a command without terminal and progress bars; returns its CompletedProcess

    fresh=False: a command of Python, which takes the libraries from a process that has imported
    them (`warm`), where the platform can; papermill then executes without a kernel.
    """
    clean = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'MOPE_CLIP_DATA')}
    env = {**clean, 'MOPE_CLIP_PROGRESS': '0', **env}
    if warm.CAN and not fresh:
        assert args[0] == sys.executable
        return warm.forked(args[1:], cwd, timeout, env)
    return subprocess.run(
        [str(a) for a in args],
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        env=env,
    )


@pytest.fixture
def root():
    return ROOT


GRID = dict(
    plain=({}, {}, {}),
    quick_gelu=({}, {}, dict(quick_gelu=True)),
    layer_scale=(dict(ls_init_value=0.3), dict(ls_init_value=0.3), {}),
    patch_dropout=(dict(patch_dropout=0.5), {}, {}),
    average_pool=(dict(pool_type='avg', final_ln_after_pool=True), {}, {}),
    average_pool_ln_first=(dict(pool_type='avg', no_ln_pre=True), {}, {}),
    first_pool=({}, dict(pool_type='first'), dict(custom_text=True)),
    last_pool=({}, dict(pool_type='last'), dict(custom_text=True)),
    eos_pool=({}, dict(pool_type='eos', eos_id=None), dict(custom_text=True)),
    not_causal=({}, dict(no_causal_mask=True, pool_type='last'), dict(custom_text=True)),
    not_causal_argmax=({}, dict(no_causal_mask=True), {}),
    linear_projection=({}, dict(proj_type='linear', proj_bias=True), dict(custom_text=True)),
    custom_blocks=(dict(block_type='custom'), dict(block_type='custom'), {}),
    custom_norms=(
        dict(block_type='custom', qk_norm=True, scale_heads=True, scale_attn=True),
        dict(block_type='custom', qk_norm=True, scale_heads=True, scale_attn=True),
        {},
    ),
)


def model_of(name):
    "A small random model of a grid entry, in float64, with the words of `synth_pairs`"
    import torch

    from mope_clip.clip import build_clip, tiny_clip

    vision, text, top = GRID[name]
    tiny = tiny_clip()
    config = copy.deepcopy(tiny.config)
    if text.get('pool_type') == 'eos':
        text = dict(text, eos_id=len(tiny.tokenizer.tokenizer) - 1)
    config['model_cfg']['vision_cfg'].update(vision)
    config['model_cfg']['text_cfg'].update(text)
    for k in ('hf_tokenizer_name', 'tokenizer_kwargs'):
        config['model_cfg']['text_cfg'].pop(k)
    config['model_cfg'].update(top)
    clip = build_clip(config, tiny.tokenizer, seed=1)
    with torch.no_grad():
        for n, p in clip.model.named_parameters():
            if p.ndim < 2 or 'scale' in n:
                p.add_(0.1 * torch.randn_like(p))  # so that biases, norms and scales matter
    clip.model.double()
    return clip


def uneven_tiny():
    "The tiny model with half of the heads of a layer, none of another, a layer less"
    from mope_clip.clip import PruneSpec, prune, tiny_clip

    tiny = tiny_clip()
    kept = dict(
        vision={0: dict(heads=[0, 2], neurons=range(0, 128, 4)), 2: dict(heads=[], neurons=[])},
        text={1: dict(heads=[3], neurons=range(64))},
    )
    return prune(tiny, PruneSpec(**kept, base=tiny.spec.base))


def custom_tiny(**text):
    "The tiny model in the other class of open_clip, with other options of the text tower"
    from mope_clip.clip import build_clip, tiny_clip

    tiny = tiny_clip()
    config = copy.deepcopy(tiny.config['model_cfg'])
    config['text_cfg'].update(text)
    return build_clip(dict(tiny.config, model_cfg=dict(config, custom_text=True)), tiny.tokenizer)


@pytest.fixture
def toy_repo(tmp_path, monkeypatch):
    "An empty repository in a temporary folder, which the library takes for its own"
    monkeypatch.setenv('MOPE_CLIP_DATA', str(tmp_path / 'data'))
    for folder in ('data', 'nbs', 'reports'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'settings.ini').write_text('[DEFAULT]\n', encoding='utf-8')
    return tmp_path
