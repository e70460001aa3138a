"Shards and streams: order, places, damage, processes."

import itertools
import json
import re
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import datasets
import numpy as np
import pytest
import torch
from samples import add, jpeg, keys_of, write_shard

from mope_clip.data import (
    RETRIEVAL_TASKS,
)
from mope_clip.data.columns import IMG2DATASET
from mope_clip.data.sources import (
    Indexed,
    Lane,
    Place,
    Shards,
    ahead,
    hf_source,
    read_tar,
    scene_source,
    shards_of,
)
from mope_clip.data.streams import BrokenData, InTurn, Stream


@pytest.fixture(autouse=True)
def no_cache_outside(tmp_path_factory, monkeypatch):
    "Data sets read from files are not kept in the user's cache"
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))


# sources


def test_shards_are_named_by_a_folder_a_range_a_glob_or_a_file(tmp_path):
    for k in range(3):
        (tmp_path / f'{k:05}.tar').touch()
    (tmp_path / '00000_stats.json').touch()
    three = [f'{tmp_path}/{k:05}.tar' for k in range(3)]
    for pattern in (tmp_path, f'{tmp_path}/{{00000..00002}}.tar', f'{tmp_path}/*.tar'):
        assert shards_of(str(pattern)) == three
    assert shards_of(three[1]) == three[1:2]
    with pytest.raises(FileNotFoundError, match='names 5 shards, and 2 are not there'):
        shards_of(f'{tmp_path}/{{00000..00004}}.tar')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='holds no shard'):
        shards_of(f'{tmp_path}/empty')


def test_shards_elsewhere_are_named_by_url(monkeypatch):
    several = shards_of('memory://cc/{008..010}.tar')
    assert several == [f'memory://cc/{k}.tar' for k in ('008', '009', '010')]
    assert shards_of('memory://cc/0.tar') == ['memory://cc/0.tar']
    with pytest.raises(ValueError, match='cannot be read: Protocol not known'):
        shards_of('nowhere://cc/0.tar')
    missing = mock.Mock(side_effect=ImportError('aiohttp is missing'))
    monkeypatch.setattr('fsspec.get_filesystem_class', missing)
    advice = "aiohttp is missing (`pip install 'fsspec[http]'"
    with pytest.raises(ImportError, match=re.escape(advice)):
        shards_of('https://example.invalid/{0..9}.tar')


def test_samples_come_in_order_from_any_place_on(tmp_path):
    path = write_shard(tmp_path / '00000.tar', range(4))
    samples = list(read_tar(path))
    assert [sample['__key__'] for _, sample in samples] == [f'{k:09}' for k in range(4)]
    assert {*samples[2][1]} == {'jpg', 'txt', 'json', '__key__'}
    assert samples[2][1]['txt'] == b'picture 2'
    assert list(read_tar(path, skip=3)) == samples[3:]
    assert list(read_tar(path, skip=4)) == []


def test_damage_is_the_last_value_of_a_shard(tmp_path):
    path = write_shard(tmp_path / '00000.tar', range(4))
    raw = path.read_bytes()
    sample, end = raw.index(b'000000001.jpg'), raw.index(b'000000003.jpg')

    def damaged(data):
        path.write_bytes(data)
        *good, (name, error) = read_tar(str(path))
        keys = [found['__key__'][-1] for _, found in good]
        return keys, name.removeprefix(str(path)), type(error).__name__

    in_a_picture = damaged(raw[: 2 * sample + 700])
    assert in_a_picture == (['0', '1'], ', sample 2', 'ReadError')
    between_samples = damaged(raw[:end])
    assert between_samples == (['0', '1', '2'], ', sample 3', 'ReadError')
    bad_header = damaged(raw[:end] + b'x' * 512 + raw[end + 512 :])
    assert bad_header == (['0', '1', '2'], ', sample 3', 'ReadError')
    assert damaged(b'') == ([], ', sample 0', 'ReadError')
    path.unlink()
    [(_, error)] = read_tar(str(path))
    assert isinstance(error, FileNotFoundError)


def test_the_name_of_a_sample_ends_at_its_first_dot(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        add(tar, 'a/b.1.JPG', b'')
    expected = [(f'{tmp_path}/a.tar/a/b', {'1.jpg': b'', '__key__': 'a/b'})]
    assert list(read_tar(tmp_path / 'a.tar')) == expected


def test_work_ahead_keeps_the_order_and_is_not_further_ahead_than_asked():
    def slow_square(k):
        time.sleep(0.02 * (k == 0))
        return k * k

    with ThreadPoolExecutor(3) as pool:
        threaded = list(ahead(range(9), slow_square, pool))
    assert threaded == [(k, k * k) for k in range(9)] == list(ahead(range(9), slow_square))
    started = []
    with ThreadPoolExecutor(2) as pool:
        next(ahead(range(9), started.append, pool, depth=3))
    assert sorted(started) == [0, 1, 2, 3]


def values_in_turn(source, lanes, n, **settings):
    "The values of the first n rows of all lanes, one of each in turn"
    readers = [source.rows(Lane(k, lanes, **settings), Place()) for k in range(lanes)]
    rows = itertools.chain.from_iterable(itertools.zip_longest(*readers))
    return [row.value for row in itertools.islice(rows, n) if row]


def test_lanes_of_an_indexed_source_give_one_order_whatever_their_number():
    ten = Indexed(lambda i: dict(image_id=i), length=10)
    orders = [values_in_turn(ten, lanes, 30) for lanes in (1, 2, 5)]
    assert orders[0] == orders[1] == orders[2]
    for epoch in range(3):
        assert sorted(orders[0][10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert orders[0][:10] == np.random.default_rng([0, 0]).permutation(10).tolist()
    assert orders[0][:10] != orders[0][10:20]
    assert orders[0] != values_in_turn(ten, 1, 30, seed=1)
    endless = values_in_turn(Indexed(None, start=500), 4, 6)
    assert endless == [500, 501, 502, 503, 504, 505]
    row = next(ten.rows(Lane(1, 2), Place(row=3)))
    assert (row.value, row.place) == (orders[0][7], Place(row=4))


def seven_rows(shard, skip=0):
    "A stand-in for `read_tar`"
    for k in range(skip, 7):
        yield f'{shard}{k}', f'{shard}{k}'


LETTERS = Shards(list('abcdef'), seven_rows, block=4)


@pytest.mark.parametrize('lanes', [1, 2, 3])
def test_every_row_of_an_epoch_belongs_to_one_lane(lanes):
    every = sorted(f'{shard}{k}' for shard in 'abcdef' for k in range(7))
    assert sorted(values_in_turn(LETTERS, lanes, 999, epochs=1)) == every


def test_shards_and_the_rows_of_a_block_have_an_order_of_their_own_in_every_epoch():
    both = values_in_turn(LETTERS, 1, 84)
    epoch, later = both[:42], both[42:]
    assert [len({row[0] for row in epoch[k : k + 7]}) for k in range(0, 42, 7)] == [1] * 6
    assert [row[0] for row in epoch[::7]] != list('abcdef') and epoch[:4] != sorted(epoch[:4])
    assert sorted(row[1] for row in epoch[:4]) == list('0123')  # a block, then the next
    assert [row[0] for row in later[::7]] != [row[0] for row in epoch[::7]] and later != epoch

    def sixty_four(shard, skip=0):
        yield from ((k, k) for k in range(skip, 64))

    long = values_in_turn(Shards(['a'], sixty_four, block=32), 1, 64)
    assert [k - 32 for k in long[32:]] != long[:32]  # so has the next block


def test_a_lane_of_shards_goes_on_from_any_place_with_and_without_threads():
    lane = Lane(1, 2, seed=5)
    straight = list(itertools.islice(LETTERS.rows(lane, Place()), 50))
    for k in range(1, 49):
        again = LETTERS.rows(lane, straight[k - 1].place)
        assert list(itertools.islice(again, 50 - k)) == straight[k:]
    with ThreadPoolExecutor(2) as pool:
        threaded = LETTERS.rows(lane, Place(), pool)
        assert list(itertools.islice(threaded, 50)) == straight


# streams

LOST = {7, 33, 21}


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Twelve shards of five pairs: two pictures cut short, a caption missing, the last shard damaged"
    home = tmp_path_factory.mktemp('tiny')
    for shard in range(12):
        keys = range(5 * shard, 5 * shard + 5)
        path = write_shard(home / f'{shard:05}.tar', keys, cut={7, 33}, mute={21})
    path.write_bytes(path.read_bytes()[:5000])
    return Shards(shards_of(str(home)), block=3)


def stream_of(source, **settings):
    return Stream(source, 'tiny', **{'max_broken': 0.5, **settings})


def test_broken_samples_are_passed_over_and_named(tiny):
    once = stream_of(tiny, epochs=1)
    seen = keys_of(once)
    assert sorted(seen) == sorted({*range(56)} - LOST) and seen != sorted(seen)
    assert len(once.broken) == 4
    assert once.summary().startswith('tiny: 57 samples, 4 broken and passed over: ')
    found = '\n'.join(once.broken)
    for part in (
        '/00001.tar/000000007: OSError',
        '/00004.tar/000000021: KeyError',
        '/00006.tar/000000033: OSError',
        '/00011.tar, sample 1: ReadError',
    ):
        assert part in found


@pytest.mark.parametrize('stop', [1, 8, 57, 100])
def test_a_stream_goes_on_from_any_place_for_any_number_of_threads(tiny, stop):
    straight = keys_of(stream_of(tiny, seed=3), 150)  # almost three epochs
    assert keys_of(stream_of(tiny, seed=3, workers=3), 150) == straight
    assert keys_of(stream_of(tiny, seed=4), 150) != straight
    before, after, whole = (stream_of(tiny, seed=3, workers=workers) for workers in (3, 0, 0))
    assert keys_of(before, stop) == straight[:stop]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert keys_of(after, 150 - stop) == straight[stop:]
    assert after.state_dict()['rows'] == 150
    keys_of(whole, 150)
    assert after.state_dict() == whole.state_dict()  # and the same damage counted


def test_a_saved_place_is_six_numbers_a_lane(tiny):
    "The format of checkpoints that are there already"
    started = stream_of(tiny, seed=3, lanes=4)
    keys_of(started, 6)
    state = started.state_dict()
    assert set(state) == {'rows', 'lanes', 'broken', 'of', 'block'} and state['of'] == [12, 4, 3]
    assert list(state['lanes']) == ['0', '1', '2', '3']
    assert all(len(numbers) == 6 for numbers in state['lanes'].values())
    assert sum(numbers[4] for numbers in state['lanes'].values()) >= 6  # samples that were met


def test_a_run_goes_on_with_another_number_of_processes(tiny):
    one = keys_of(stream_of(tiny, seed=3, lanes=4), 160)
    two = [stream_of(tiny, seed=3, lanes=4, rank=rank, world=2) for rank in (0, 1)]
    halves = [keys_of(half, 60) for half in two]
    assert [k for both in zip(*halves, strict=True) for k in both] == one[:120]
    places = [half.state_dict() for half in two]
    for world in (1, 4):
        more = [stream_of(tiny, seed=3, lanes=4, rank=r, world=world) for r in range(world)]
        for part in more:
            part.load_state_dict(places)
        parts = [keys_of(part, 40 // world) for part in more]
        assert [k for ks in zip(*parts, strict=True) for k in ks] == one[120:]
    with pytest.raises(ValueError, match='pass the places of all processes'):
        more[0].load_state_dict(places[1])
    with pytest.raises(ValueError, match='use the same data and seed, and lanes=4'):
        stream_of(tiny, seed=3, lanes=6).load_state_dict(places)
    odd = stream_of(tiny, seed=3, lanes=4)
    keys_of(odd, 7)
    half = stream_of(tiny, seed=3, lanes=4, rank=0, world=2)
    with pytest.raises(ValueError, match='7 pairs cannot be divided among 2 processes'):
        half.load_state_dict(odd.state_dict())


def test_four_processes_share_an_epoch_without_overlap(tiny):
    parts = [stream_of(tiny, lanes=4, rank=r, world=4, epochs=1) for r in range(4)]
    every = [k for part in parts for k in keys_of(part)]
    assert sorted(every) == sorted({*range(56)} - LOST)


@pytest.mark.parametrize(
    'shards, world, lanes', [(12, 1, 8), (12, 3, 6), (5, 1, 5), (5, 2, 4), (16, 16, 16)]
)
def test_lanes_are_a_multiple_of_the_processes(shards, world, lanes):
    assert Stream(Shards([0] * shards), rank=0, world=world).lanes == lanes


def test_lanes_that_cannot_be_shared_are_refused(tiny):
    with pytest.raises(ValueError, match='4 lanes cannot be shared by 3 processes'):
        stream_of(tiny, lanes=4, world=3, rank=0)
    with pytest.raises(ValueError, match=r'at most the number of shards \(12\)'):
        stream_of(tiny, world=16, rank=0)
    with pytest.raises(TypeError, match='sead'):
        stream_of(tiny, sead=3)


@pytest.mark.parametrize('workers', [0, 2])
def test_a_data_loader_of_torch_deals_the_lanes_to_its_workers(tiny, workers):
    epoch = stream_of(tiny, lanes=4, epochs=1, work=lambda pair: pair['image_id'])
    loader = torch.utils.data.DataLoader(epoch, batch_size=None, num_workers=workers)
    assert sorted(map(int, loader)) == sorted({*range(56)} - LOST)


def test_too_much_damage_ends_a_stream(tiny):
    with pytest.raises(BrokenData, match=r'broken, more than max_broken=0\.01 allows'):
        keys_of(stream_of(tiny, max_broken=0.01), 500)
    mapped = Shards(tiny.shards, columns=dict(IMG2DATASET, captions='caption'))
    with pytest.raises(BrokenData, match='KeyError'):
        keys_of(Stream(mapped, 'tiny'), 1)
    two = Shards(tiny.shards[:2], columns=dict(IMG2DATASET, image='gif'))
    with pytest.raises(BrokenData, match='21 of 21'):  # a whole epoch in vain
        keys_of(Stream(two, 'two', lanes=1), 1)
    with pytest.raises(BrokenData, match='10 of 10'):
        keys_of(Stream(two, 'two', epochs=1, lanes=1), 1)


def test_a_fault_of_ours_is_not_damage(tiny):
    with pytest.raises(ZeroDivisionError):
        next(iter(stream_of(tiny, work=lambda pair: 1 / 0)))


def test_a_set_that_streams_is_read_like_shards(tmp_path):
    broken = {5}
    rows = dict(
        picture=[
            dict(bytes=jpeg((k, k, 99), (32, 32), 300 if k in broken else None), path=None)
            for k in range(24)
        ],
        said=[[f'picture {k}'] for k in range(24)],
        nr=list(range(24)),
    )
    kinds = dict(picture=datasets.Image(), said=datasets.List(datasets.Value('string')))
    features = datasets.Features(**kinds, nr=datasets.Value('int64'))
    table = datasets.Dataset.from_dict(rows, features=features)
    mapped = dict(image='picture', captions='said', image_id='nr')

    def streamed(data=None, **settings):
        data = data or table.to_iterable_dataset(num_shards=6)
        return Stream(hf_source(data, mapped, block=3), 'table', **settings)

    assert sorted(keys_of(streamed(epochs=1))) == sorted({*range(24)} - broken)
    source = streamed().source
    assert list(source.read(2, 1)) == list(source.read(2))[1:]
    straight, before, after = keys_of(streamed(seed=1), 60), streamed(seed=1, workers=2), None
    keys_of(before, 31)
    after = streamed(seed=1)
    after.load_state_dict(before.state_dict())
    assert keys_of(after, 29) == straight[31:]
    for k in range(6):
        table.shard(6, k).to_parquet(tmp_path / f'train-{k:05}-of-00006.parquet')
    files_of = dict(data_files=f'{tmp_path}/*.parquet', split='train', streaming=True)
    parquet = datasets.load_dataset('parquet', **files_of)
    assert keys_of(streamed(parquet, seed=1), 60) == straight


def test_processes_share_the_scenes_as_they_are_numbered():
    def ids(start=0, n=2, **settings):
        scenes = Stream(scene_source('openmoji', 'train', start), 'openmoji', **settings)
        return [int(pair['image_id'].split('/')[2]) for pair in itertools.islice(scenes, n)]

    assert ids(500, 3) == [500, 501, 502]
    assert [ids(rank=rank, world=2) for rank in (0, 1)] == [[0, 2], [1, 3]]


def test_streams_in_turn_go_on_with_the_one_whose_turn_it_is():
    def two():
        return InTurn([Stream(scene_source(task, 'train')) for task in RETRIEVAL_TASKS])

    mixed, again = two(), two()
    reader = iter(mixed)
    tasks = [next(reader)['image_id'].split('/')[0] for _ in range(3)]
    assert tasks == ['openmoji', 'openmoji-street', 'openmoji']
    again.load_state_dict(mixed.state_dict())
    after = [next(reader)['image_id'] for _ in range(3)]
    assert [pair['image_id'] for pair in itertools.islice(again, 3)] == after
    again.set_epoch(0)
    assert next(iter(again))['image_id'].split('/')[0] == 'openmoji'


def test_processes_share_every_one_of_the_streams_in_turn():
    def rows(name):
        return [dict(image=None, captions=['x'], image_id=f'{name}{i}') for i in range(40)]

    sets = {name: rows(name) for name in 'ab'}

    def share(rank, world):
        settings = dict(rank=rank, world=world, epochs=1)
        sources = {name: Indexed(found.__getitem__, 40) for name, found in sets.items()}
        return InTurn([Stream(source, name, **settings) for name, source in sources.items()])

    halves = [share(rank, 2) for rank in (0, 1)]
    seen = [{pair['image_id'] for pair in itertools.islice(half, 40)} for half in halves]
    assert len(seen[0] | seen[1]) == 80
    alone = share(0, 1)
    alone.load_state_dict([half.state_dict() for half in halves])  # where both stood


def test_streams_in_turn_tell_of_the_damage_of_each():
    def odd(i):
        return 1 / 0 if i == 3 else dict(image_id=f'a{i}')

    lame = Stream(Indexed(odd, 40), 'a', epochs=1, max_broken=0.5)
    sound = Stream(Indexed(lambda i: dict(image_id=f'b{i}'), 40), 'b')
    both = InTurn([lame, sound])
    assert len(list(itertools.islice(both, 60))) == 60
    assert 'ZeroDivisionError' in both.broken[0]
    assert 'a: ' in both.summary() and '; b: ' in both.summary()
