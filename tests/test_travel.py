"Compressed models come back in a new process bit for bit, and a save that is killed loses nothing."

import contextlib
import io
import os
import signal
import subprocess
import sys
import time

import torch
from conftest import ROOT, run

from mope_clip.clip import load_clip, prune, tiny_clip, weights_hash, whole_spec

EMBED = """
import sys, hashlib, torch
from mope_clip.clip import load_clip
from mope_clip.data import synth_pairs
from mope_clip.evaluate import images_of
clip, pairs = load_clip(sys.argv[1], device='cpu'), synth_pairs(8)
with torch.inference_mode():
    x, ids = images_of(clip, pairs['image']), clip.tokenizer([cs[0] for cs in pairs['captions']])
    for n in (1, 8):   # single items run on other kernels
        for f in (clip.encode_image(x[:n]), clip.encode_text(ids[:n])):
            print(hashlib.sha256(f.float().numpy().tobytes()).hexdigest(), tuple(f.shape), f.dtype)
"""


def uneven(dtype=torch.float32):
    "A model with a layer without heads, one without neurons, and a layer gone in each tower"
    clip = tiny_clip()
    clip.model.to(dtype)
    spec = whole_spec(clip)
    spec.vision[0]['heads'], spec.vision[1]['neurons'] = [], []
    spec.text[1]['heads'], spec.text[1]['neurons'] = [1, 3], list(range(5, 90))
    del spec.vision[2], spec.text[0]
    return prune(clip, spec)


def embed(folder):
    r = run(sys.executable, '-W', 'ignore', '-c', EMBED, folder)
    assert r.returncode == 0, r.stderr[-2000:]
    return r.stdout


def embed_here(clip):
    "The same of a model in memory, on as many threads"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(EMBED.replace("load_clip(sys.argv[1], device='cpu')", 'CLIP'), dict(CLIP=clip))
    return out.getvalue()


def test_bit_equal_in_a_new_process(tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        small = uneven(dtype)
        small.save(tmp_path / 'm')
        first = embed(tmp_path / 'm')
        assert first == embed(tmp_path / 'm') and first == embed_here(small), (
            'what was saved, and what came back'
        )
        clip = load_clip(str(tmp_path / 'm'), device='cpu')
        assert (
            {p.dtype for p in clip.model.parameters()} == {dtype}
            and weights_hash(clip) == weights_hash(small)
            and clip.spec == small.spec
        )
        clip.save(tmp_path / 'again')
        assert embed(tmp_path / 'again') == first
        for name in ('config.json', 'model.safetensors'):
            assert (tmp_path / 'm' / name).read_bytes() == (tmp_path / 'again' / name).read_bytes()
        assert not [
            p
            for p in (tmp_path / 'm').iterdir()
            if p.suffix in ('.pt', '.pth', '.bin', '.pkl', '.py')
        ]


SAVE_OVER = """
import sys
from mope_clip.clip import tiny_clip
a, b = tiny_clip(1), tiny_clip(2)
a.save(sys.argv[1]); print('ready', flush=True)
while True:
    for clip in (b, a): clip.save(sys.argv[1])
"""


def test_killed_saves_leave_a_whole_folder(tmp_path):
    expected = {weights_hash(tiny_clip(s)) for s in (1, 2)}
    for k in range(4):
        p = subprocess.Popen(
            [sys.executable, '-W', 'ignore', '-c', SAVE_OVER, str(tmp_path / 'm')],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert p.stdout.readline() == 'ready\n'
        time.sleep(0.05 + 0.037 * k)
        os.kill(p.pid, signal.SIGKILL)
        p.wait()
        folders = [
            tmp_path / 'm',
            *tmp_path.glob('.m-old-*/old'),
        ]  # between two renames the old folder stands aside
        assert (
            weights_hash(load_clip(str(next(f for f in folders if f.is_dir())), device='cpu'))
            in expected
        )


def test_specification_of_one_checkpoint_goes_to_another(tmp_path):
    small = uneven()
    other = prune(tiny_clip(7), small.spec)
    assert other.spec == small.spec and weights_hash(other) != weights_hash(small)
    assert [p.shape for p in other.model.parameters()] == [
        p.shape for p in small.model.parameters()
    ]
