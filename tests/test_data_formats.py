"The real data sets, in small files of exactly their formats, through the whole library."

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
from safetensors.torch import save_file
from samples import add, jpeg

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


def picture(k):
    "A JPEG file of a colour of its own"
    return jpeg((37 * k % 256, 59 * k % 256, 83 * k % 256), (32, 32))


def split_of(task, k):
    "12 images of test, 12 of validation, 16 of train: of COCO some of them are restval"
    if k < 12:
        return 'test'
    if k < 24:
        return 'val'
    return 'restval' if task == 'coco' and k % 2 else 'train'


def rows(task):
    "The rows of the Karpathy JSON, of five to seven sentences; one image has four"
    for k in range(40):
        split = split_of(task, k)
        said = [
            dict(
                raw=f'A {THINGS[k % 5]} number {k}, told {j} times. ',
                tokens=[],
                imgid=k,
                sentid=10 * k + j,
            )
            for j in range(4 if k == 3 else 5 + k % 3)
        ]
        where = dict(filename=f'{1000 + k}.jpg')
        if task == 'coco':
            folder = 'val2014' if split != 'train' else 'train2014'
            where = dict(filepath=folder, filename=f'COCO_{folder}_{k:012}.jpg', cocoid=k)
        ids = [sentence['sentid'] for sentence in said]
        yield dict(**where, imgid=k, split=split, sentids=ids, sentences=said)


def write_files(folder, task, listed):
    "As the set is distributed: pictures in folders, a JSON file beside them"
    for row in listed:
        path = folder / row.get('filepath', 'flickr30k-images') / row['filename']
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(row['imgid']))
    text = json.dumps(dict(images=listed, dataset=task))
    (folder / f'dataset_{task}.json').write_text(text, encoding='utf-8')


def write_parquet(folder, task, listed):
    "As copies on the hub have it: one split, whose rows name Karpathy's"
    table = dict(
        image=[dict(bytes=picture(row['imgid']), path=row['filename']) for row in listed],
        split=[row['split'] for row in listed],
    )
    if task == 'coco':
        table['sentences'] = [row['sentences'] for row in listed]
        table['cocoid'] = [row['imgid'] for row in listed]
    else:
        table['caption'] = [[said['raw'] for said in row['sentences']] for row in listed]
        table['img_id'] = [str(row['imgid']) for row in listed]
    (folder / 'data').mkdir(parents=True)
    data = datasets.Dataset.from_dict(table).cast_column('image', datasets.Image())
    data.to_parquet(str(folder / 'data' / 'test-00000-of-00001.parquet'))


@pytest.fixture(scope='module')
def corpora(tmp_path_factory):
    "Both sets twice: as Karpathy's files and as Parquet in the layout of the hub"
    base = tmp_path_factory.mktemp('corpora')
    for task in COLUMNS:
        listed = list(rows(task))
        write_files(base / task, task, listed)
        write_parquet(base / f'{task}-hub', task, listed)
    return base


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "A model of random weights and a configuration of its own, in open_clip's folder format"
    folder = tmp_path_factory.mktemp('model')
    config = dict(
        embed_dim=32,
        vision_cfg=dict(image_size=32, layers=2, width=32, head_width=8, patch_size=8),
        text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=4, layers=2),
    )
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / 'open_clip_model.safetensors')
    known = dict(model_cfg=config, preprocess_cfg=dict(mean=[0.5] * 3, std=[0.5] * 3))
    path = folder / 'open_clip_config.json'
    path.write_text(json.dumps(known), encoding='utf-8')
    return folder


@pytest.fixture(autouse=True)
def no_cache_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


def plain(data):
    "Everything that a set holds, in plain types"
    return [
        (row['image_id'], row['captions'], row['image'].convert('RGB').tobytes()) for row in data
    ]


@pytest.mark.parametrize('split, images', [('train', 16), ('validation', 12), ('test', 12)])
def test_the_hub_and_the_files_give_the_same_coco(corpora, split, images):
    files = load_pairs('coco', split, root=corpora / 'coco')
    hub = load_pairs('coco', split, root=corpora / 'coco-hub', columns=COLUMNS['coco'])
    assert plain(files) == plain(hub) and len(files) == images
    assert {len(told) for told in files['captions']} == ({4, 5} if split == 'test' else {5})


@pytest.mark.parametrize(
    'task, source', [('coco', 'files'), ('flickr30k', 'files'), ('flickr30k', 'hub')]
)
def test_main_job_from_real_formats(task, source, corpora, model, tmp_path):
    where = dict(data_root=corpora / task)
    if source == 'hub':
        where = dict(data_root=corpora / f'{task}-hub', data_columns=json.dumps(COLUMNS[task]))
    # with and without a fine-tuning of the teacher
    first = {}
    if source == 'hub' or task == 'coco':
        first = dict(finetuned='False', pairs_teacher=16)
    parameters = dict(task=task, model=model, out_dir=tmp_path / 'run', **where, **SMALL, **first)
    found = run(
        sys.executable,
        '-m',
        'papermill',
        ROOT / 'nbs' / '20_finetune.ipynb',
        tmp_path / 'out.ipynb',
        *[word for name, value in parameters.items() for word in ('-p', name, value)],
        cwd=tmp_path,
        HF_DATASETS_CACHE=str(tmp_path / 'cache'),
    )
    assert found.returncode == 0, found.stderr[-3000:]
    results = json.loads((tmp_path / 'run' / 'results.json').read_text(encoding='utf-8'))
    assert {row['task'] for row in results['rows']} == {task}
    assert results['rows'][-1]['stage'] == 'loaded from disk'
    said = (tmp_path / 'out.ipynb').read_text(encoding='utf-8')
    assert (f'to be fine-tuned on {task}' if first else 'taken as fine-tuned') in said
    assert (tmp_path / 'run' / 'teacher').is_dir() == bool(first)
    assert (
        f'{task} test: 12 images, 59 captions (1 images with fewer than five); none missing, '
        'none unreadable'
    ) in said
    assert 'not the Karpathy split' in said


def write_shards(folder, n=8, per=6):
    "Shards as img2dataset leaves them, one of them cut short and one picture broken"
    folder.mkdir(exist_ok=True)
    for shard in range(n):
        path = folder / f'{shard:05}.tar'
        with tarfile.open(path, 'w') as tar:
            for k in range(shard * per, shard * per + per):
                add(tar, f'{k:09}.jpg', picture(k)[: 300 if k == 9 else None])
                add(tar, f'{k:09}.txt', f'a {THINGS[k % 5]} number {k}'.encode())
                known = dict(key=f'{k:09}', status='success')
                add(tar, f'{k:09}.json', json.dumps(known).encode())
    path.write_bytes(path.read_bytes()[:12_000])
    return folder


def test_shards_from_elsewhere(tmp_path):
    shards = write_shards(tmp_path / 'shards')
    memory = fsspec.filesystem('memory')  # as any file system that fsspec knows: https, s3, hf
    for path in shards.glob('*.tar'):
        memory.pipe(f'/cc/{path.name}', path.read_bytes())
    near, far = (
        [pair['image_id'] for pair in stream_pairs(place, epochs=1, seed=1, workers=2)]
        for place in (str(shards), 'memory://cc/{00000..00007}.tar')
    )
    assert near == far and 40 < len(near) < 47


TRAIN = """
import json, os, sys, time, torch
torch.set_num_threads(1)
from mope_clip.clip import tiny_clip, weights_hash
from mope_clip.data import stream_pairs
from mope_clip.distill import train
def log(line):
    print(line, flush=True)
    if 'pairs' in line: time.sleep(float(sys.argv[3]))     # a window for the kill
stream = stream_pairs(sys.argv[1], seed=4, workers=2)
settings = dict(folder=sys.argv[2], every=10, log=log, batch=8, lr=1e-3)
clip = train(tiny_clip(), stream, 150*8, **settings).clip
print('HASH', weights_hash(clip))
"""


def test_killed_run_on_shards_ends_at_the_same_weights(tmp_path):
    shards = write_shards(tmp_path / 'shards')

    def command(name, pause):
        return [sys.executable, '-c', TRAIN, shards, tmp_path / name, str(pause)]

    straight = run(*command('a', 0), fresh=False).stdout
    piped = dict(stdout=subprocess.PIPE, text=True, cwd=ROOT)
    victim = subprocess.Popen(command('b', 0.3), **piped)
    for line in victim.stdout:
        if ' 640 of' in line:
            os.kill(victim.pid, signal.SIGKILL)
            break
    victim.wait()
    resumed = run(*command('b', 0), fresh=False).stdout
    assert 'resumed at step 50 of 150' in resumed
    for said in (straight, resumed):  # whoever trains is told which
        assert re.search(r'broken and passed over: .*000000009', said)
    assert re.search('HASH .*', resumed)[0] == re.search('HASH .*', straight)[0]


def test_ranks_of_the_environment_share_a_corpus(tmp_path, monkeypatch):
    shards = str(write_shards(tmp_path / 'shards'))

    def ids():
        return [pair['image_id'] for pair in stream_pairs(shards, epochs=1)]

    shares = []
    for rank in range(4):
        monkeypatch.setenv('RANK', str(rank))
        monkeypatch.setenv('WORLD_SIZE', '4')
        shares += ids()
    monkeypatch.delenv('RANK')
    monkeypatch.delenv('WORLD_SIZE')
    assert sorted(shares) == sorted(ids())  # no overlap, no loss


def test_zero_shot_on_a_folder_of_images(tmp_path, model):
    from mope_clip.clip import load_clip

    for c, name in enumerate(('red_fox', 'cat', 'dog', 'owl', 'bus', 'ship')):
        (tmp_path / 'test' / name).mkdir(parents=True)
        for k in range(3):
            (tmp_path / 'test' / name / f'{k}.jpg').write_bytes(picture(6 * c + k))
    pets, clip = load_labelled(str(tmp_path), 'test'), load_clip(str(model), device='cpu')
    names = pets.features['label'].names
    assert sorted(names)[-1] == 'ship' and len(pets) == 18
    ours = zero_shot(clip, pets, prompts_of(pets))
    weights = open_clip.build_zero_shot_classifier(
        clip.model,
        clip.tokenizer,
        [name.replace('_', ' ') for name in names],
        open_clip.OPENAI_IMAGENET_TEMPLATES,
    )
    images = torch.stack([clip.preprocess(image) for image in pets['image']])
    with torch.no_grad():
        features = torch.nn.functional.normalize(clip.model.encode_image(images), dim=-1)
        logits = features @ weights
    right = logits.gather(1, torch.tensor(pets['label'])[:, None])
    rank = (logits >= right).sum(1) - 1
    assert ours['top1'] == pytest.approx(100 * (rank < 1).float().mean().item())
    assert ours['top5'] == pytest.approx(100 * (rank < 5).float().mean().item())
