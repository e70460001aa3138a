"Two processes equal one, with pieces and with slices; what is killed or damaged goes on to the same bits."

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

from mope_clip.clip import prune, tiny_clip, weights_hash, whole_spec
from mope_clip.data import synth_pairs
from mope_clip.data.parallel import processes
from mope_clip.distill import train
from mope_clip.distill.batches import Batches
from mope_clip.distill.loop import Recipe, Run, advance, fit

MODES = dict(
    copies={},
    pieces=dict(micro=3),
    slices=dict(shard=True),
    pieces_of_slices=dict(shard=True, micro=3, checkpoint_activations=True),
    averaged=dict(ema=0.9),
    averaged_slices=dict(shard=True, ema=0.9, micro=3),
    trained_scale=dict(freeze_scale=False),
    trained_scale_in_slices=dict(freeze_scale=False, shard=True, micro=2),
    without_hidden=dict(weights=(1.0, 1.0, 1000.0, 0.0)),
    muon=dict(optimizer='muon'),
    hidden_alone=dict(weights=(0.0, 0.0, 0.0, 1.0)),
)


WENT_ON = 'copies', 'averaged_slices', 'muon'


def models(dtype=torch.float64):
    "A teacher, and a student without a layer, without the heads of another and the neurons of a third"
    teacher = tiny_clip(1)
    spec = whole_spec(teacher)
    del spec.vision[1]
    spec.text[0]['heads'], spec.vision[2]['neurons'], spec.vision[0]['heads'] = [], [], [0, 3]
    student = prune(teacher, spec)
    with torch.no_grad():
        for p in student.model.parameters():
            p.mul_(1.1)
    for c in (teacher, student):
        c.model.to(dtype)
    return student, teacher


def pairs():
    "Forty pairs of which a few have longer captions, so that the processes' longest captions differ"
    return synth_pairs(40).map(
        lambda row, i: dict(
            captions=[c if i % 7 == 0 else ' '.join(c.split()[:2]) for c in row['captions']]
        ),
        with_indices=True,
    )


def stream():
    return pairs().to_iterable_dataset()


def recipe(steps=20, **how):
    return Recipe(**{**dict(pairs_seen=steps * 12, batch=12, lr=1e-3, freeze_scale=True), **how})


def full(x):
    return (x.full_tensor() if hasattr(x, 'full_tensor') else x).detach().clone()


def weights(clip):
    return {n: p.detach().clone() for n, p in clip.model.named_parameters()}


def trained(data=pairs, steps=20, folder=None, log=lambda line: None, **how):
    "Weights and losses of a run in float64"
    student, teacher = models()
    fit(
        student, data(), recipe(steps, **how), teacher, folder, every=5, log=log, checkpoint_every=4
    )
    return weights(student), [h['loss'] for h in student.history]


def first_step(**how):
    "Losses and gradients of one step in single precision"
    student, teacher = models(torch.float32)
    r = Run(student, pairs(), recipe(**how), teacher)
    feed = iter(r.batches)
    losses = advance(r, feed)
    feed.close()
    grads = {n: full(p.grad) for n, p in r.work.model.named_parameters() if p.grad is not None}
    r.close()
    return losses, grads


def drop_newest(folder):
    "As if the run had been cut off before its last checkpoint"
    *_, last = sorted(Path(folder).glob('*.pt'))
    last.unlink()


def contrastive(**how):
    clip = tiny_clip()
    clip.model.double()
    said = []
    train(
        clip,
        pairs(),
        12 * 12,
        validation=pairs(),
        every=4,
        log=said.append,
        batch=12,
        lr=1e-3,
        **how,
    )
    return weights(clip), [h['mean_recall'] for h in clip.history], said


def ranks_job(out):
    "What each of two processes does; the main one writes what it found"
    assert os.environ['WORLD_SIZE'] == '2'
    world = processes(torch.device('cpu'))
    assert world.size == 2
    found = dict(size=world.size)
    for name, how in MODES.items():
        found[name] = trained(**how)
    for name in ('copies', 'pieces', 'slices'):
        found[f'first {name}'] = first_step(**MODES[name])
    found['stream'] = trained(stream, workers=2)
    for name in WENT_ON:
        trained(steps=12, folder=f'{out}/two-{name}', **MODES[name])
        world.share(None)
        if world.main:
            drop_newest(f'{out}/two-{name}')
        said = []
        found[f'went on {name}'] = (
            trained(steps=12, folder=f'{out}/one-{name}', log=said.append, **MODES[name]),
            said,
        )
    *recall, said = contrastive()
    found['contrastive'], found['said'] = recall, world.collect(said)
    feed = iter(Batches(tiny_clip(), pairs(), 12, world=world))
    found['split'] = world.collect([next(feed)[2].tolist() for _ in range(7)])
    every = world.collect(found['copies'][0])
    found['alike'] = all(torch.equal(every[0][n], every[1][n]) for n in every[0])
    clip = tiny_clip(world.rank)  # not the same weights
    try:
        fit(clip, pairs(), recipe(), log=lambda line: None)
        found['refused'] = ''
    except ValueError as e:
        found['refused'] = str(e)
    if world.main:
        torch.save(found, f'{out}/found.pt')


def failing_job(out):
    "The second process fails in the middle"
    clip = tiny_clip()
    clean, calls = clip.preprocess, []

    def preprocess(im):
        calls.append(1)
        if os.environ['RANK'] == '1' and len(calls) > 20:
            raise OSError('damaged picture')
        return clean(im)

    clip.preprocess = preprocess
    train(clip, pairs(), 12 * 1000, batch=12, log=lambda line: None)


def killed_job(out):
    "A run with a checkpoint every third step; says when it has begun"
    student, teacher = models(torch.float32)
    fit(
        student,
        synth_pairs(40),
        recipe(60, ema=0.9, workers=2),
        teacher,
        out,
        every=1,
        checkpoint_every=3,
        log=lambda line: print(line, flush=True),
    )
    print('hash', weights_hash(student), flush=True)


def torchrun(job, out, timeout=300):
    return run(
        sys.executable,
        '-W',
        'ignore',
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node=2',
        __file__,
        job,
        out,
        timeout=timeout,
        ACCELERATE_USE_CPU='true',
        CUDA_VISIBLE_DEVICES='',
        OMP_NUM_THREADS='1',
    )


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "What two processes found"
    out = tmp_path_factory.mktemp('two')
    for name in WENT_ON:
        trained(steps=12, folder=out / f'one-{name}', **MODES[name])
        drop_newest(out / f'one-{name}')
    r = torchrun('ranks_job', out)
    assert r.returncode == 0, r.stderr[-3000:]
    return out, torch.load(out / 'found.pt', weights_only=True)


def close(a, b, eps):
    assert set(a) == set(b)
    for n in a:
        assert (a[n] - b[n]).abs().max() <= eps if a[n].numel() else True, (
            n,
            (a[n] - b[n]).abs().max(),
        )


@pytest.mark.parametrize('mode', MODES)
def test_two_processes_equal_one_after_twenty_steps(two, mode):
    (there, losses), (here, expected) = (
        two[1][mode],
        trained(
            **{
                k: v
                for k, v in MODES[mode].items()
                if k not in ('micro', 'shard', 'checkpoint_activations')
            }
        ),
    )
    close(there, here, 1e-8)
    assert losses == pytest.approx(expected, abs=1e-8)
    start, _ = models()
    assert (
        max((here[n] - p).abs().max().item() for n, p in weights(start).items() if p.numel()) > 1e-4
    ), 'something was learned'


@pytest.mark.parametrize('mode', ['copies', 'pieces', 'slices'])
def test_losses_and_gradients_in_single_precision(two, mode):
    (losses, grads), (expected, here) = two[1][f'first {mode}'], first_step()
    assert losses == pytest.approx(expected, rel=1e-5)
    largest = max(g.abs().max() for g in here.values() if g.numel())
    close(grads, here, 1e-5 * largest)


def test_the_processes_end_alike_and_one_of_them_talks(two):
    _, found = two
    assert found['size'] == 2 and found['alike']
    there, here = found['contrastive'], contrastive()
    close(there[0], here[0], 1e-8)
    assert (
        there[1] == pytest.approx(here[1], abs=3) and len(there[1]) == 3
    )  # squares of one colour tie but for the last bit
    assert len(found['said'][0]) == 3 and found['said'][1] == [] and 'recall' in found['said'][0][0]
    assert 'do not start from the same weights' in found['refused']


def test_data_are_split_without_overlap_or_loss(two):
    feed = iter(Batches(tiny_clip(), pairs(), 12))
    for a, b in zip(*two[1]['split']):
        whole = next(feed)[2].tolist()
        assert whole[0::2] == a and whole[1::2] == b
    (there, _), (here, _) = two[1]['stream'], trained(stream)
    close(there, here, 1e-8)


@pytest.mark.parametrize('mode', WENT_ON)
def test_a_run_goes_on_with_another_number_of_processes(two, mode):
    out, found = two
    how = {k: v for k, v in MODES[mode].items() if k in ('ema', 'optimizer')}
    straight, losses = trained(steps=12, **how)
    (went_on, there), said = found[f'went on {mode}']  # one process, then two
    assert said[0] == 'resumed at step 8 of 12'
    close(went_on, straight, 1e-8)
    assert there == pytest.approx(losses, abs=1e-8)
    lines = []
    back, here = trained(
        steps=12, folder=out / f'two-{mode}', log=lines.append, **how
    )  # two processes, then one
    assert lines[0] == 'resumed at step 8 of 12'
    close(back, straight, 1e-8)
    assert here == pytest.approx(losses, abs=1e-8)


def test_an_error_in_one_process_ends_both(tmp_path):
    r = torchrun('failing_job', tmp_path, timeout=120)
    assert r.returncode != 0 and 'damaged picture' in r.stderr


def test_killed_at_any_moment_it_ends_at_the_same_bits(tmp_path):
    def start(folder):
        return subprocess.Popen(
            [sys.executable, '-W', 'ignore', __file__, 'killed_job', str(tmp_path / folder)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, 'MOPE_CLIP_PROGRESS': '0', 'OMP_NUM_THREADS': '1'},
        )

    straight = start('straight').communicate(timeout=120)[0].split('hash ')[1]
    rng, resumed = random.Random(time.time_ns()), 0
    for k in range(3):
        p = start('cut')
        lines = [p.stdout.readline() for _ in range(rng.randrange(6, 16))]  # some steps later
        time.sleep(rng.random() * 0.1)
        p.send_signal(signal.SIGKILL)
        p.wait()
        resumed += lines[0].startswith('resumed at step')
        assert p.returncode == -signal.SIGKILL
    for old in sorted((tmp_path / 'cut').glob('*.pt'))[-1:]:
        old.write_bytes(old.read_bytes()[:-999])  # and the newest is damaged
    said = start('cut').communicate(timeout=120)[0]
    assert 'is damaged' in said and resumed == 2 and said.split('hash ')[1] == straight


if __name__ == '__main__':
    globals()[sys.argv[1]](sys.argv[2])
