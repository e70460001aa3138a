"Two processes equal one, with pieces and slices; what is killed or damaged ends at the same bits."

import os
import random
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

from mope_clip.clip import prune, tiny_clip, weights_hash, whole_spec
from mope_clip.data import synth_pairs
from mope_clip.data.parallel import processes
from mope_clip.distill import train
from mope_clip.distill.batches import Batches
from mope_clip.distill.loop import fit, training_step
from mope_clip.distill.recipe import Recipe
from mope_clip.distill.run import Run

STEPS, BATCH = 12, 12
ALONE = dict(OMP_NUM_THREADS='1', MOPE_CLIP_PROGRESS='0')  # a thread for each process
PATIENCE = 900  # seconds that a process may take, on a machine that is busy

MODES = dict(
    copies={},
    pieces=dict(micro=3),
    slices=dict(shard=True),
    averaged_pieces_of_slices_with_trained_scale=dict(
        shard=True, micro=3, checkpoint_activations=True, ema=0.9, freeze_scale=False
    ),
    averaged_with_trained_scale=dict(ema=0.9, freeze_scale=False),
    without_hidden=dict(weights=dict(itc=1.0, sim=1.0, feat=1000.0)),
    muon=dict(optimizer='muon'),
    hidden_alone=dict(weights=dict(hidn=1.0)),
)
MACHINERY = 'micro', 'shard', 'checkpoint_activations'
SINGLE = 'copies', 'pieces', 'slices'
WENT_ON = 'copies', 'averaged_pieces_of_slices_with_trained_scale', 'muon'


def quiet(line):
    "A log that nobody reads"


def models(dtype=torch.float64):
    "A student without a layer, the heads of another and the neurons of a third, and its teacher"
    teacher = tiny_clip(1)
    spec = whole_spec(teacher)
    del spec.vision[1]
    spec.text[0]['heads'], spec.vision[2]['neurons'], spec.vision[0]['heads'] = [], [], [0, 3]
    student = prune(teacher, spec)
    with torch.no_grad():
        for p in student.model.parameters():
            p.mul_(1.1)
    for clip in (teacher, student):
        clip.model.to(dtype)
    return student, teacher


def pairs():
    "Forty pairs, a few with longer captions, so that the processes' longest captions differ"

    def shorten(row, i):
        whole = i % 7 == 0
        return dict(captions=[c if whole else ' '.join(c.split()[:2]) for c in row['captions']])

    return synth_pairs(40).map(shorten, with_indices=True)


def stream():
    return pairs().to_iterable_dataset()


def recipe(steps=STEPS, **how):
    settings = dict(pairs_seen=steps * BATCH, batch=BATCH, lr=1e-3, freeze_scale=True)
    return Recipe(**{**settings, **how})


def full(x):
    return (x.full_tensor() if hasattr(x, 'full_tensor') else x).detach().clone()


def weights(clip):
    return {name: p.detach().clone() for name, p in clip.model.named_parameters()}


def trained(data=pairs, folder=None, log=quiet, **how):
    "Weights and losses of a run in float64"
    student, teacher = models()
    options = dict(folder=folder, every=5, log=log, checkpoint_every=4)
    made = fit(student, data(), recipe(**how), teacher, **options)
    return weights(made.clip), [row['loss'] for row in made.history]


@cache
def trained_alone(mode):
    "Weights and losses of a mode in one process, computed the plain way"
    return trained(**{name: x for name, x in MODES[mode].items() if name not in MACHINERY})


def first_step(**how):
    "Losses and gradients of one step in single precision"
    student, teacher = models(torch.float32)
    r = Run(student, pairs(), recipe(**how), teacher)
    feed = iter(r.batches)
    losses = training_step(r, feed)
    feed.close()
    named = r.work.model.named_parameters()
    gradients = {name: full(p.grad) for name, p in named if p.grad is not None}
    r.close()
    return losses, gradients


def contrastive():
    "Weights, curve and log of a run without a teacher"
    clip, said = tiny_clip(), []
    clip.model.double()
    options = dict(validation=pairs(), every=4, log=said.append)
    made = train(clip, pairs(), STEPS * BATCH, batch=BATCH, lr=1e-3, **options)
    return weights(made.clip), [row['mean_recall'] for row in made.history], said


def drop_newest(folder):
    "As if the run had been cut off before its last checkpoint"
    *_, last = sorted(Path(folder).glob('*.pt'))
    last.unlink()


def cut_off_and_resumed(out, mode, world):
    "A run of two processes that is left without its end, and one of one process that goes on"
    trained(folder=f'{out}/two-{mode}', **MODES[mode])
    world.share(None)
    if world.main:
        drop_newest(f'{out}/two-{mode}')
    said = []
    return trained(folder=f'{out}/one-{mode}', log=said.append, **MODES[mode]), said


def refusal(world):
    "What is said where the processes start from other weights"
    try:
        fit(tiny_clip(world.rank), pairs(), recipe(), log=quiet)
    except ValueError as e:
        return str(e)
    return ''


def ranks_job(out):
    "What each of two processes does; the main one writes what it found"
    world = processes(torch.device('cpu'))
    assert world.size == 2
    found = {mode: trained(**how) for mode, how in MODES.items()}
    found |= {f'first {mode}': first_step(**MODES[mode]) for mode in SINGLE}
    found['stream'] = trained(stream, workers=2)
    found |= {f'went on {mode}': cut_off_and_resumed(out, mode, world) for mode in WENT_ON}
    *found['contrastive'], said = contrastive()
    found['said'] = world.collect(said)
    feed = iter(Batches(tiny_clip(), pairs(), BATCH, world=world))
    found['split'] = world.collect([next(feed).places.tolist() for _ in range(7)])
    first, second = world.collect(found['copies'][0])
    found['alike'] = all(torch.equal(first[name], second[name]) for name in first)
    found['refused'] = refusal(world)
    if world.main:
        torch.save(found, f'{out}/found.pt')


def failing_job(out):
    "The second process fails in the middle"
    clip, calls = tiny_clip(), []
    clean = clip.preprocess

    def preprocess(im):
        calls.append(1)
        if os.environ['RANK'] == '1' and len(calls) > 20:
            raise OSError('damaged picture')
        return clean(im)

    clip.preprocess = preprocess
    train(clip, pairs(), BATCH * 1000, batch=BATCH, log=quiet)


def killed_job(out):
    "A run with a checkpoint every third step; says each step, and the hash of what it ends with"

    def say(line):
        print(line, flush=True)

    student, teacher = models(torch.float32)
    options = dict(folder=out, every=1, checkpoint_every=3, log=say)
    made = fit(student, synth_pairs(40), recipe(60, ema=0.9, workers=2), teacher, **options)
    say(f'hash {weights_hash(made.clip)}')


def torchrun(job, out):
    launcher = '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2'
    apart = dict(ACCELERATE_USE_CPU='true', CUDA_VISIBLE_DEVICES='')
    command = sys.executable, '-W', 'ignore', *launcher, __file__, job, out
    return run(*command, timeout=PATIENCE, **ALONE, **apart)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    "As in the other processes: what is compared is computed alike, and nobody waits for a core"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def two(tmp_path_factory, one_thread):
    "The folder of two processes, and what they found"
    out = tmp_path_factory.mktemp('two')
    for mode in WENT_ON:
        trained(folder=out / f'one-{mode}', **MODES[mode])
        drop_newest(out / f'one-{mode}')
    r = torchrun('ranks_job', out)
    assert r.returncode == 0, r.stderr[-3000:]
    return out, torch.load(out / 'found.pt', weights_only=True)


def close(one, other, eps):
    assert set(one) == set(other)
    for name in one:
        if one[name].numel():
            apart = (one[name] - other[name]).abs().max()
            assert apart <= eps, (name, apart)


@pytest.mark.parametrize('mode', MODES)
def test_two_processes_equal_one_after_a_dozen_steps(two, mode):
    (there, losses), (here, expected) = two[1][mode], trained_alone(mode)
    close(there, here, 1e-8)
    assert losses == pytest.approx(expected, abs=1e-8)
    start = weights(models()[0])
    moved = [(here[name] - p).abs().max().item() for name, p in start.items() if p.numel()]
    assert max(moved) > 1e-4, 'something was learned'


@pytest.mark.parametrize('mode', SINGLE)
def test_losses_and_gradients_in_single_precision(two, mode):
    (losses, gradients), (expected, here) = two[1][f'first {mode}'], first_step()
    assert losses == pytest.approx(expected, rel=1e-5)
    largest = max(gradient.abs().max() for gradient in here.values() if gradient.numel())
    close(gradients, here, 1e-5 * largest)


def test_the_processes_end_alike(two):
    assert two[1]['alike']


def test_one_of_the_processes_talks_and_watches(two):
    found, (here, curve, _) = two[1], contrastive()
    there, recalls = found['contrastive']
    close(there, here, 1e-8)
    # squares of one colour tie but for the last bit
    assert recalls == pytest.approx(curve, abs=3) and len(recalls) == 3
    said, silent = found['said']
    assert len(said) == 3 and 'recall' in said[0] and silent == []


def test_processes_that_do_not_start_alike_are_refused(two):
    assert 'do not start from the same weights' in two[1]['refused']


def test_data_are_split_without_overlap_or_loss(two):
    feed = iter(Batches(tiny_clip(), pairs(), BATCH))
    for first, second in zip(*two[1]['split'], strict=True):
        whole = next(feed).places.tolist()
        assert whole[0::2] == first and whole[1::2] == second


def test_a_stream_is_learned_from_as_by_one_process(two):
    (there, _), (here, _) = two[1]['stream'], trained(stream)
    close(there, here, 1e-8)


@pytest.mark.parametrize('mode', WENT_ON)
def test_a_run_goes_on_with_another_number_of_processes(two, mode):
    out, found = two
    straight, losses = trained_alone(mode)
    how = {name: x for name, x in MODES[mode].items() if name not in MACHINERY}
    lines = []
    two_then_one = trained(folder=out / f'two-{mode}', log=lines.append, **how)
    one_then_two, said = found[f'went on {mode}']
    for (went_on, curve), log in ((one_then_two, said), (two_then_one, lines)):
        assert log[0].startswith('resumed at step 8 of 12, from ')
        close(went_on, straight, 1e-8)
        assert curve == pytest.approx(losses, abs=1e-8)


def test_an_error_in_one_process_ends_both(tmp_path):
    r = torchrun('failing_job', tmp_path)
    assert r.returncode != 0 and 'damaged picture' in r.stderr


def started(folder):
    "The job that will be killed, under way"
    command = [sys.executable, '-W', 'ignore', __file__, 'killed_job', str(folder)]
    env = {**os.environ, **ALONE}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=env)


def killed_after(process, lines, seconds):
    "The first line of a job that is killed some lines and a moment later"
    first, *_ = [process.stdout.readline() for _ in range(lines)]
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return first


def test_killed_at_any_moment_it_ends_at_the_same_bits(tmp_path):
    straight = started(tmp_path / 'straight').communicate(timeout=PATIENCE)[0]
    chance = random.Random(0)
    firsts = [
        killed_after(started(tmp_path / 'cut'), chance.randrange(6, 16), chance.random() / 10)
        for _ in range(2)
    ]
    assert [line.startswith('resumed at step') for line in firsts] == [False, True]
    newest = max((tmp_path / 'cut').glob('*.pt'))
    newest.write_bytes(newest.read_bytes()[:-999])  # and the newest is damaged
    said = started(tmp_path / 'cut').communicate(timeout=PATIENCE)[0]
    assert 'is damaged' in said and 'resumed at step' in said
    assert said.split('hash ')[1] == straight.split('hash ')[1]


if __name__ == '__main__':
    globals()[sys.argv[1]](sys.argv[2])
