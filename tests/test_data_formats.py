"The real data sets, in small files of exactly their formats: from disk or from a server through the whole library."

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile

import datasets
import fsspec
import open_clip
import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from safetensors.torch import save_file

from mope_clip.data import load_labelled, load_pairs, prompts_of, stream_pairs
from mope_clip.evaluate import zero_shot

THINGS = 'dog', 'cat', 'bus', 'cake', 'kite'
COLUMNS = dict(
    coco=dict(image='image', captions='sentences.raw', image_id='cocoid', split='split'),
    flickr30k=dict(image='image', captions='caption', image_id='img_id', split='split'),
)
SMALL = dict(
    images_scored=8, images_evaluated=12, pairs_width=16, pairs_depth=16, batch=8, groups=4
)


def jpeg(k, side=32):
    b = io.BytesIO()
    Image.new('RGB', (side, side), (37 * k % 256, 59 * k % 256, 83 * k % 256)).save(b, 'JPEG')
    return b.getvalue()


def rows(task):
    "The rows of the Karpathy JSON: 12 test, 12 validation, 16 train (COCO: some of them restval), of five to seven sentences; one image has four"
    for k in range(40):
        split = (
            'test'
            if k < 12
            else 'val'
            if k < 24
            else 'restval'
            if task == 'coco' and k % 2
            else 'train'
        )
        said = [
            dict(
                raw=f'A {THINGS[k % 5]} number {k}, told {j} times. ',
                tokens=[],
                imgid=k,
                sentid=10 * k + j,
            )
            for j in range(4 if k == 3 else 5 + k % 3)
        ]
        folder = 'val2014' if split != 'train' else 'train2014'
        where = (
            dict(filepath=folder, filename=f'COCO_{folder}_{k:012}.jpg', cocoid=k)
            if task == 'coco'
            else dict(filename=f'{1000 + k}.jpg')
        )
        yield dict(
            **where, imgid=k, split=split, sentids=[s['sentid'] for s in said], sentences=said
        )


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
    "Both sets twice: as Karpathy's files and as Parquet in the layout of the hub"
    base = tmp_path_factory.mktemp('corpora')
    for task in COLUMNS:
        listed = list(rows(task))
        for r in listed:
            path = base / task / r.get('filepath', 'flickr30k-images') / r['filename']
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(r['imgid']))
        (base / task / f'dataset_{task}.json').write_text(
            json.dumps(dict(images=listed, dataset=task))
        )
        table = dict(
            image=[dict(bytes=jpeg(r['imgid']), path=r['filename']) for r in listed],
            split=[r['split'] for r in listed],
        )
        table |= (
            dict(sentences=[r['sentences'] for r in listed], cocoid=[r['imgid'] for r in listed])
            if task == 'coco'
            else dict(
                caption=[[s['raw'] for s in r['sentences']] for r in listed],
                img_id=[str(r['imgid']) for r in listed],
            )
        )
        (base / f'{task}-hub' / 'data').mkdir(parents=True)
        datasets.Dataset.from_dict(table).cast_column('image', datasets.Image()).to_parquet(
            str(base / f'{task}-hub' / 'data' / 'test-00000-of-00001.parquet')
        )
    return base


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "An open_clip model from a configuration of its own, random weights, open_clip's own vocabulary, in open_clip's folder format"
    folder = tmp_path_factory.mktemp('model')
    config = dict(
        embed_dim=32,
        vision_cfg=dict(image_size=32, layers=2, width=32, head_width=8, patch_size=8),
        text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=4, layers=2),
    )
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / 'open_clip_model.safetensors')
    (folder / 'open_clip_config.json').write_text(
        json.dumps(dict(model_cfg=config, preprocess_cfg=dict(mean=[0.5] * 3, std=[0.5] * 3)))
    )
    return folder


@pytest.fixture(autouse=True)
def no_cache_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


def same(a, b):
    return [(r['image_id'], r['captions'], r['image'].convert('RGB').tobytes()) for r in a] == [
        (r['image_id'], r['captions'], r['image'].convert('RGB').tobytes()) for r in b
    ]


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_the_hub_and_the_files_give_the_same_coco(corpora, split):
    files, hub = (
        load_pairs('coco', split, root=corpora / 'coco'),
        load_pairs('coco', split, root=corpora / 'coco-hub', columns=COLUMNS['coco']),
    )
    assert same(files, hub) and len(files) == dict(train=16, validation=12, test=12)[split]
    assert {len(c) for c in files['captions']} == ({4, 5} if split == 'test' else {5})


@pytest.mark.parametrize(
    'task, source', [('coco', 'files'), ('flickr30k', 'files'), ('flickr30k', 'hub')]
)
def test_main_job_from_real_formats(task, source, corpora, model, tmp_path):
    where = (
        dict(data_root=corpora / task)
        if source == 'files'
        else dict(data_root=corpora / f'{task}-hub', data_columns=json.dumps(COLUMNS[task]))
    )
    first = (
        dict(finetuned='False', pairs_teacher=16) if source == 'hub' or task == 'coco' else {}
    )  # with and without a fine-tuning of the teacher
    parameters = dict(task=task, model=model, out_dir=tmp_path / 'run', **where, **SMALL, **first)
    r = run(
        sys.executable,
        '-m',
        'papermill',
        ROOT / 'nbs' / '20_finetune.ipynb',
        tmp_path / 'out.ipynb',
        *[x for k, v in parameters.items() for x in ('-p', k, v)],
        cwd=tmp_path,
        HF_DATASETS_CACHE=str(tmp_path / 'cache'),
    )
    assert r.returncode == 0, r.stderr[-3000:]
    found = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert {row['task'] for row in found['rows']} == {task} and [
        *dict.fromkeys(row['stage'] for row in found['rows'])
    ][-1] == 'loaded from disk'
    said = (tmp_path / 'out.ipynb').read_text()
    assert (f'to be fine-tuned on {task}' if first else 'taken as fine-tuned') in said and (
        tmp_path / 'run' / 'teacher'
    ).is_dir() == bool(first)
    assert (
        f'{task} test: 12 images, 59 captions (1 images with fewer than five); none missing, none unreadable'
        in said
        and 'not the Karpathy split' in said
    )


def write_shards(folder, n=8, per=6):
    "Shards as img2dataset leaves them, one of them cut short and one picture broken"
    folder.mkdir(exist_ok=True)
    for s in range(n):
        with tarfile.open(folder / f'{s:05}.tar', 'w') as tar:
            for k in range(s * per, s * per + per):
                for ext, data in (
                    ('jpg', jpeg(k)[: 300 if k == 9 else None]),
                    ('txt', f'a {THINGS[k % 5]} number {k}'.encode()),
                    ('json', json.dumps(dict(key=f'{k:09}', status='success')).encode()),
                ):
                    info = tarfile.TarInfo(f'{k:09}.{ext}')
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    last = folder / f'{n - 1:05}.tar'
    last.write_bytes(last.read_bytes()[:12_000])
    return folder


def test_shards_from_elsewhere(tmp_path):
    shards, memory = (
        write_shards(tmp_path / 'shards'),
        fsspec.filesystem('memory'),
    )  # any file system that fsspec knows: https, s3, hf
    for path in shards.glob('*.tar'):
        memory.pipe(f'/cc/{path.name}', path.read_bytes())
    near, far = (
        [p['image_id'] for p in stream_pairs(place, epochs=1, seed=1, workers=2)]
        for place in (str(shards), 'memory://cc/{00000..00007}.tar')
    )
    assert near == far and 40 < len(near) < 47


TRAIN = """
import json, os, sys, time
from mope_clip.clip import tiny_clip, weights_hash
from mope_clip.data import stream_pairs
from mope_clip.distill import train
def log(line):
    print(line, flush=True)
    if 'pairs' in line: time.sleep(float(sys.argv[3]))     # a window for the kill
clip = train(tiny_clip(), stream_pairs(sys.argv[1], seed=4, workers=2), 150*8, folder=sys.argv[2], every=10, log=log, batch=8, lr=1e-3).clip
print('HASH', weights_hash(clip))
"""


def test_killed_run_on_shards_ends_at_the_same_weights(tmp_path):
    shards = write_shards(tmp_path / 'shards')

    def start(name, pause):
        return subprocess.Popen(
            [sys.executable, '-c', TRAIN, shards, tmp_path / name, str(pause)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        )

    straight = start('a', 0).communicate(timeout=300)[0]
    victim = start('b', 0.3)
    for line in victim.stdout:
        if ' 640 of' in line:
            os.kill(victim.pid, signal.SIGKILL)
            break
    victim.wait()
    resumed = start('b', 0).communicate(timeout=300)[0]
    assert 'resumed at step 50 of 150' in resumed
    assert all(
        re.search(r'broken and passed over: .*000000009', said) for said in (straight, resumed)
    )  # whoever trains is told which
    assert re.search('HASH .*', resumed)[0] == re.search('HASH .*', straight)[0]


def test_ranks_of_the_environment_share_a_corpus(tmp_path, monkeypatch):
    shards, seen = str(write_shards(tmp_path / 'shards')), []
    for rank in range(4):
        monkeypatch.setenv('RANK', str(rank))
        monkeypatch.setenv('WORLD_SIZE', '4')
        seen.append({p['image_id'] for p in stream_pairs(shards, epochs=1)})
    monkeypatch.delenv('RANK')
    monkeypatch.delenv('WORLD_SIZE')
    assert sum(map(len, seen)) == len(set.union(*seen)) and set.union(*seen) == {
        p['image_id'] for p in stream_pairs(shards, epochs=1)
    }


def test_zero_shot_on_a_folder_of_images(tmp_path, model):
    from mope_clip.clip import load_clip

    for c, name in enumerate(('red_fox', 'cat', 'dog', 'owl', 'bus', 'ship')):
        (tmp_path / 'test' / name).mkdir(parents=True)
        for k in range(3):
            (tmp_path / 'test' / name / f'{k}.jpg').write_bytes(jpeg(6 * c + k))
    pets, clip = load_labelled(str(tmp_path), 'test'), load_clip(str(model), device='cpu')
    assert sorted(pets.features['label'].names)[-1] == 'ship' and len(pets) == 18
    ours, prompts = zero_shot(clip, pets, prompts_of(pets)), prompts_of(pets)
    weights = open_clip.build_zero_shot_classifier(
        clip.model,
        clip.tokenizer,
        [n.replace('_', ' ') for n in pets.features['label'].names],
        open_clip.OPENAI_IMAGENET_TEMPLATES,
    )
    with torch.no_grad():
        logits = (
            torch.nn.functional.normalize(
                clip.model.encode_image(torch.stack([clip.preprocess(im) for im in pets['image']])),
                dim=-1,
            )
            @ weights
        )
    rank = (logits >= logits.gather(1, torch.tensor(pets['label'])[:, None])).sum(1) - 1
    assert ours['top1'] == pytest.approx(100 * (rank < 1).float().mean().item()) and ours[
        'top5'
    ] == pytest.approx(100 * (rank < 5).float().mean().item())
