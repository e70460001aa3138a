"""What holds on the CPU holds on a card: `pytest -m gpu` where there is one.

The same tests run on the CPU, so that they are known to work before a card is lent.
"""

from contextlib import suppress

import pytest
import torch
from conftest import run
from zoo import in_small, small_clip

from mope_clip.cli import main, pipeline, without_training
from mope_clip.clip import load_clip, prune, tiny_clip, weights_hash
from mope_clip.data import synth_pairs
from mope_clip.distill import distill
from mope_clip.evaluate import retrieval
from mope_clip.metrics import mope, mope_plain, obs
from mope_clip.pruners import plan, plan_width, repair, search

NO_CARD = pytest.mark.skipif(not torch.cuda.is_available(), reason='there is no CUDA device')
DEVICES = ['cpu', pytest.param('cuda', marks=[pytest.mark.gpu, NO_CARD])]
PAIRS = synth_pairs(24)
FAMILIES = (
    'ViT-B-32',
    'ViT-B-16-SigLIP',
    'EVA02-B-16',
    'MobileCLIP-B',
    'PE-Core-B-16',
    'coca_ViT-B-32',
)


def on(device: str, clip):
    copy = clip.copy()
    copy.model.to(device)
    return copy


@pytest.fixture(scope='module')
def tiny():
    return tiny_clip()


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def close(one, other, eps):
    assert (one.detach().cpu().double() - other.detach().cpu().double()).abs().max() <= eps


def test_exact_scores_are_those_of_one_removal_after_the_other(tiny, device):
    here = mope(on(device, tiny), PAIRS, z='soft_recall', groups=2)
    rows = here[here.module != 'ffn'].iloc[::3]
    plain = [
        mope_plain(tiny, PAIRS, row.tower, row.layer, row.module, row['index'], z='soft_recall')
        for _, row in rows.iterrows()
    ]
    assert rows.score.to_numpy() == pytest.approx(plain, abs=1e-3)
    assert obs(on(device, tiny), PAIRS, groups=2).score.to_numpy() == pytest.approx(
        obs(tiny, PAIRS, groups=2).score.to_numpy(), rel=1e-3, abs=1e-6
    )


def test_what_is_removed_there_is_what_is_removed_here(tiny, device):
    spec = plan_width(mope(tiny, PAIRS, groups=2), 0.5)
    here, there = prune(tiny, spec), prune(on(device, tiny), spec)
    ids = tiny.tokenizer(PAIRS['captions'][0])
    assert there.device.type == device
    close(there.encode_text(ids.to(device)), here.encode_text(ids), 1e-4)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    close(there.encode_image(images.to(device)), here.encode_image(images), 1e-4)


def test_repair_gives_the_same_weights(tiny, device):
    spec = plan_width(mope(tiny, PAIRS, groups=2), 0.5)
    quiet = dict(images=20, log=None)
    here = repair(prune(tiny, spec), tiny, PAIRS, **quiet)
    teacher = on(device, tiny)
    there = repair(prune(teacher, spec), teacher, PAIRS, **quiet)
    expected = here.model.state_dict()
    for name, x in there.model.state_dict().items():
        if x.numel():
            close(x, expected[name], 1e-3 * max(1.0, expected[name].abs().max().item()))


def test_search_walks_there_too(tiny, device):
    teacher = on(device, tiny)
    scores = mope(teacher, PAIRS, groups=2)
    spec = search(teacher, scores, PAIRS, macs=0.6, evaluations=3, log=None)
    assert prune(teacher, spec).device.type == device


def learned(tiny, device, **settings):
    teacher = on(device, tiny)
    student = prune(
        teacher, plan(mope(tiny, PAIRS, groups=2), tiny, macs=0.6, log=lambda line: None)
    )
    run = dict(pairs_seen=32, batch=8, every=4, log=lambda line: None)
    return distill(student, teacher, PAIRS, **run, **settings)


def test_recovery_learns_the_same(tiny, device):
    "Four steps in single precision; losses agree, and so do weights to what rounding adds up to"
    there, here = (learned(tiny, where, precision='fp32') for where in (device, 'cpu'))
    losses = [[point['loss'] for point in made.history] for made in (there, here)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert there.clip.device.type == device


def test_recovery_in_half_precision_is_near(tiny, device):
    half, whole = (learned(tiny, device, precision=p) for p in ('bf16', 'fp32'))
    assert half.history[-1]['loss'] == pytest.approx(whole.history[-1]['loss'], rel=0.05)
    assert half.clip.dtype == torch.float32, 'the weights stay what they were'


def test_batches_come_from_threads(tiny, device):
    alone, ahead = (learned(tiny, device, precision='fp32', workers=n) for n in (0, 2))
    assert weights_hash(alone.clip) == weights_hash(ahead.clip)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_models_of_half_precision_embed(tiny, device, dtype):
    clip = on(device, tiny)
    clip.model.to(dtype)
    whole, half = retrieval(tiny, PAIRS), retrieval(clip, PAIRS)
    assert abs(whole['mean_recall'] - half['mean_recall']) < 15


def test_it_is_saved_and_comes_back(tiny, device, tmp_path):
    clip = on(device, tiny)
    clip.save(tmp_path / 'saved')
    back = load_clip(str(tmp_path / 'saved'), device=device)
    assert weights_hash(back) == weights_hash(tiny) and back.device.type == device


@pytest.mark.parametrize('name', FAMILIES)
def test_families_compute_alike(name, device):
    with in_small():
        clip = small_clip(name)  # in double precision, so that nothing but an error differs
        there = on(device, clip)
    ids = clip.tokenizer(PAIRS['captions'][0])
    made = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32, generator=made, dtype=torch.float64)
    with torch.no_grad():
        close(there.encode_text(ids.to(device)), clip.encode_text(ids), 1e-8)
        close(there.encode_image(pixels.to(device)), clip.encode_image(pixels), 1e-8)


@pytest.fixture(scope='module')
def job(tiny, tmp_path_factory):
    "What the commands read: a model, its half, and a table of pairs"
    folder = tmp_path_factory.mktemp('job')
    tiny.save(folder / 'whole')
    prune(tiny, plan_width(mope(tiny, PAIRS, groups=2), 0.5)).save(folder / 'half')
    synth_pairs(200).to_parquet(folder / 'pairs.parquet')
    return folder


def words_of(command, job, device, out):
    "A command on that job"
    words = [command, job / ('whole' if command == 'score' else 'half'), '--device', device]
    words += ['--task', job / 'pairs.parquet', '--out', out]
    if command != 'score':
        words += ['--teacher', job / 'whole']
    if command == 'distill':
        words += ['--pairs-seen', 32, '--batch', 8]
    return [str(word) for word in words]


COMMANDS = 'score', 'repair', 'distill'


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_run_there(command, job, device, tmp_path, capsys):
    assert main(words_of(command, job, device, tmp_path / 'out')) == 0, capsys.readouterr().err
    assert (tmp_path / 'out').exists()


def fill():
    "Hold all that is reserved of a card, and let nothing more be had"
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    held = []
    for size in (1 << 22, 1 << 16, 512):
        with suppress(torch.OutOfMemoryError):
            while True:
                held.append(torch.empty(size, dtype=torch.uint8, device='cuda'))
    return held


@pytest.mark.gpu
@NO_CARD
@pytest.mark.parametrize('command', COMMANDS)
def test_a_full_card_is_one_sentence(command, job, tmp_path, monkeypatch, capsys):
    loaded, held = pipeline.load_named, []

    def load_and_fill(options):
        clip = loaded(options)
        held.append(fill())
        return clip

    for module in (pipeline, without_training):
        monkeypatch.setattr(module, 'load_named', load_and_fill)
    try:
        code = main(words_of(command, job, 'cuda', tmp_path / 'out'))
    finally:
        held.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
    said = capsys.readouterr().err
    assert code == 1 and said.startswith('mope: the memory of the GPU is full'), said
    assert '--batch' in said and 'the same command goes on' in said


SHARED = """
import torch
from mope_clip.clip import tiny_clip
from mope_clip.data import synth_pairs
from mope_clip.data.parallel import processes
from mope_clip.metrics import mope

clip = tiny_clip()
clip.model.cuda()
table = mope(clip, synth_pairs(24), groups=2, store={store!r})
world = processes(clip.device)
if world.main:
    table.to_parquet({out!r})
world.share(None)
"""


@pytest.mark.gpu
@NO_CARD
def test_two_processes_share_a_card(tiny, tmp_path):
    import sys

    import pandas as pd

    out = tmp_path / 'scores.parquet'
    script = tmp_path / 'job.py'
    script.write_text(SHARED.format(store=str(tmp_path / 'store'), out=str(out)), encoding='utf-8')
    launcher = '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'
    r = run(sys.executable, *launcher, script)
    assert r.returncode == 0, r.stderr[-3000:]
    alone = mope(on('cuda', tiny), PAIRS, groups=2)
    assert pd.read_parquet(out).score.to_numpy() == pytest.approx(alone.score.to_numpy(), abs=1e-3)
