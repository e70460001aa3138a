"Odd but plausible data: no row is lost in silence, no picture is another split's."

import itertools
import json

import datasets
import pytest
from PIL import Image
from samples import add, jpeg, keys_of, write_shard

from mope_clip.data import load_pairs, stream_pairs
from mope_clip.data.pairs import load_labelled
from mope_clip.data.sources import Shards
from mope_clip.data.streams import Stream
from mope_clip.data.tables import rows_of_fields, rows_of_lines, told_in

RED, BLUE = (220, 20, 20), (20, 20, 220)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def photos(folder, n, colour=RED):
    for k in range(n):
        write(folder / f'{k}.jpg', jpeg(colour, (16, 16)))
    return folder


def rows_of(shard, skip=0):
    name, n = shard
    for k in range(skip, n):
        yield f'{name}/{k}', (name, k)


class Numbers(Shards):
    "Shards of (name, number of rows), whose rows are their own pairs"

    def __init__(self, *sizes, block=3):
        super().__init__([*enumerate(sizes)], rows_of, block=block)

    def pair(self, row):
        return row


# ---- streams


def test_an_empty_shard_ends_no_stream():
    some = Stream(Numbers(5, 5, 5, 5, 5, 5, 5, 0), 'some', epochs=20)
    assert len(list(some)) == 20 * 35
    for_ever = Stream(Numbers(5, 5, 5, 5, 5, 5, 5, 0), 'some')
    assert len(list(itertools.islice(for_ever, 2000))) == 2000


@pytest.mark.parametrize('epochs', [1, 3])
def test_lanes_of_unequal_length_go_on_in_their_order(epochs):
    def stream():
        return Stream(Numbers(1, 2, 30, 4, 9, 0), 'some', epochs=epochs)

    whole = list(stream())
    assert len(whole) == 46 * epochs
    for cut in range(0, len(whole) + 1, 3):
        first, then = stream(), stream()
        begun = list(itertools.islice(first, cut))
        then.load_state_dict(first.state_dict())
        assert begun + list(then) == whole, cut


def test_a_saved_place_is_of_its_block():
    first = Stream(Numbers(20, 20, block=10), 'some')
    list(itertools.islice(first, 7))
    other = Stream(Numbers(20, 20, block=5), 'some')
    with pytest.raises(ValueError, match=r'blocks of 10 rows.*use block=10'):
        other.load_state_dict(first.state_dict())


@pytest.mark.parametrize('variable', ['RANK', 'WORLD_SIZE'])
def test_an_empty_variable_of_a_launcher_is_none(variable, monkeypatch):
    monkeypatch.setenv(variable, '')
    stream = stream_pairs('openmoji', 'train')
    assert (stream.rank, stream.world) == (0, 1)


def test_a_rank_that_was_left_over_takes_nothing_away(monkeypatch):
    monkeypatch.setenv('RANK', '3')
    assert stream_pairs('openmoji', 'train').rank == 0


# ---- tables and their pictures


def colour_of(pair):
    red, _, blue = pair['image'].convert('RGB').getpixel((8, 8))
    return 'red' if red > blue else 'blue'


def test_a_split_has_the_pictures_of_its_own_folder(tmp_path):
    for split, colour in (('train', RED), ('test', BLUE)):
        photos(tmp_path / split / 'images', 2, colour)
        table = 'image,caption\n' + ''.join(f'{k}.jpg,{split} {k}\n' for k in range(2))
        write(tmp_path / split / 'captions.csv', table)
    assert {colour_of(pair) for pair in load_pairs(tmp_path, 'train')} == {'red'}
    assert {colour_of(pair) for pair in load_pairs(tmp_path, 'test')} == {'blue'}


def test_tables_of_splits_beside_folders_of_splits(tmp_path):
    for split, colour in (('train', RED), ('test', BLUE)):
        photos(tmp_path / split, 2, colour)
        write(tmp_path / f'{split}.csv', 'image,caption\n0.jpg,a\n1.jpg,b\n')
    assert {colour_of(pair) for pair in load_pairs(tmp_path, 'train')} == {'red'}
    assert {colour_of(pair) for pair in load_pairs(tmp_path, 'test')} == {'blue'}


def test_a_picture_of_two_splits_is_refused(tmp_path):
    photos(tmp_path / 'pictures', 2)
    for split in ('train', 'test'):
        write(tmp_path / f'{split}.csv', 'image,caption\n0.jpg,a\n1.jpg,b\n')
    with pytest.raises(ValueError, match=r'0\.jpg is named for two splits'):
        load_pairs(tmp_path, 'train')


def test_a_quote_that_is_not_closed_swallows_no_rows(tmp_path):
    lines = 'image\tcaption\n0.jpg\ta dog\n1.jpg\t"best photo ever\n2.jpg\ta cat\n'
    rows = rows_of_fields(tmp_path / 'a.tsv', lines)
    assert [row['caption'] for row in rows] == ['a dog', '"best photo ever', 'a cat']
    with pytest.raises(ValueError, match=r'follows line 2 is no row .* double those inside'):
        rows_of_fields(tmp_path / 'a.csv', lines.replace('\t', ','))


def test_lines_end_at_line_ends_alone(tmp_path):
    [row] = rows_of_fields(tmp_path / 'a.csv', 'image,caption\n0.jpg,a dog\u2028runs\n')
    assert row['caption'] == 'a dog\u2028runs'
    line = json.dumps(dict(image='0.jpg', caption='a\u2028b'), ensure_ascii=False)
    assert len(list(rows_of_lines(tmp_path / 'a.jsonl', line))) == 1


@pytest.mark.parametrize(
    'table',
    [
        '"image","caption"\n"0.jpg","a dog"\n',
        'sep=;\nimage;caption\n0.jpg;a dog\n',
        'image,caption\n"0.jpg","a dog"\n',
    ],
)
def test_headers_of_other_programs_are_read(table, tmp_path):
    photos(tmp_path, 1)
    write(tmp_path / 'captions.csv', table)
    assert load_pairs(tmp_path, 'train')[0]['captions'] == ['a dog']


def test_a_table_in_another_encoding_is_told_so(tmp_path):
    photos(tmp_path, 1)
    write(tmp_path / 'captions.csv', 'image,caption\n0.jpg,a dog\n'.encode('utf-16'))
    for place in (tmp_path, tmp_path / 'captions.csv'):
        with pytest.raises(ValueError, match='no text in UTF-8'):
            load_pairs(place, 'train')


@pytest.mark.parametrize(
    ('cell', 'captions'),
    [
        ("['a dog' 'a cat']", ['a dog', 'a cat']),
        ("['a dog'\n 'a cat']", ['a dog', 'a cat']),
        ('["a dog", "a cat"]', ['a dog', 'a cat']),
        (r'["a dog \ud83d\ude00"]', ['a dog 😀']),
        ('["a dog", null]', ['a dog']),
        ("['it\\'s', \"a 'b' c\"]", ["it's", "a 'b' c"]),
        ('[2]', ['[2]']),
        ('[a] dog [b]', ['[a] dog [b]']),
    ],
)
def test_a_list_written_into_a_cell_is_a_list(cell, captions):
    assert told_in(cell) == captions


@pytest.mark.parametrize(
    ('name', 'content'),
    [
        ('image_info_test2017.json', dict(images=[dict(id=1, file_name='0.jpg')])),
        ('ids.json', [1, 2, 3]),
        ('odd.json', dict(images=[], annotations=dict(a=1))),
    ],
)
def test_another_file_beside_a_table_is_passed_over(name, content, tmp_path):
    photos(tmp_path, 1)
    write(tmp_path / 'captions.csv', 'image,caption\n0.jpg,a dog\n')
    write(tmp_path / name, json.dumps(content))
    assert load_pairs(tmp_path, 'train')[0]['captions'] == ['a dog']


def test_rows_without_a_split_are_counted(tmp_path, capsys):
    photos(tmp_path, 12)
    splits = [None, 'train', 'test']
    lines = [json.dumps(dict(image=f'{k}.jpg', caption='a', split=splits[k % 3])) for k in range(9)]
    lines += [json.dumps(dict(image=f'{k}.jpg', caption='a')) for k in range(9, 12)]
    write(tmp_path / 'captions.jsonl', '\n'.join([*lines[9:], *lines[:9]]))
    assert load_pairs(tmp_path, 'test')['image_id'] == ['2.jpg', '5.jpg', '8.jpg']
    assert 'no split 6' in capsys.readouterr().out


def test_what_columns_say_is_used_or_refused(tmp_path):
    photos(tmp_path, 3)
    table = 'image,caption,alt,name\n' + ''.join(f'{k}.jpg,a,b,n{k}\n' for k in range(3))
    path = write(tmp_path / 'captions.csv', table)
    found = load_pairs(path, 'train', columns=dict(captions='alt', image_id='name'))
    assert set(found['image_id']) <= {'n0', 'n1', 'n2'} and found['captions'][0] == ['b']
    with pytest.raises(ValueError, match="say what 'caption' is"):
        load_pairs(path, 'train', columns=dict(caption='alt'))
    with pytest.raises(ValueError, match="no column 'nosuch': it has image, caption, alt, name"):
        load_pairs(path, 'train', columns=dict(image_id='nosuch'))


# ---- pictures with a text each


def test_pictures_below_links_are_there_and_hidden_ones_are_not(tmp_path, capsys):
    there = photos(tmp_path / 'elsewhere', 3)
    for k in range(2):
        write(there / f'{k}.txt', 'a dog')
    write(there / '._0.jpg', b'\x00\xff')
    write(there / '._0.txt', b'\x00\xff')
    (tmp_path / 'set').mkdir()
    (tmp_path / 'set' / 'train').symlink_to(there, target_is_directory=True)
    (there / 'round').symlink_to(tmp_path / 'set', target_is_directory=True)
    assert len(load_pairs(tmp_path / 'set', 'train')) == 2
    assert 'left out for having no .txt: 1' in capsys.readouterr().out


def test_a_text_that_names_a_picture_is_a_caption_and_no_table(tmp_path):
    photos(tmp_path, 2)
    for k in range(2):
        write(tmp_path / f'{k}.txt', 'picture, text')
    assert load_pairs(tmp_path, 'train')[0]['captions'] == ['picture, text']
    write(tmp_path / '1.txt', b'gr\xe4n')
    with pytest.raises(ValueError, match=r'1\.txt is no text in UTF-8'):
        load_pairs(tmp_path, 'train')


# ---- Parquet and sets that were saved


def a_set(n, each=1):
    pictures = [dict(bytes=jpeg((9 * k, 9, 9), (16, 16)), path='a.jpg') for k in range(n)]
    rows = dict(image=[p for p in pictures for _ in range(each)], caption=['a'] * n * each)
    return datasets.Dataset.from_dict(rows)


def test_a_picture_of_several_rows_is_in_no_two_splits(tmp_path):
    rows = a_set(20, each=3).cast_column('image', datasets.Image())
    rows.to_parquet(tmp_path / 'train.parquet')
    with pytest.raises(ValueError, match='several rows for one image'):
        load_pairs(tmp_path, 'train')


def test_bytes_in_parquet_are_pictures(tmp_path):
    a_set(20).to_parquet(tmp_path / 'records.parquet')  # nothing says that they are pictures
    only_bytes = [jpeg((9 * k, 9, 9), (16, 16)) for k in range(20)]
    plain = datasets.Dataset.from_dict(dict(image=only_bytes, caption=['a'] * 20))
    plain.to_parquet(tmp_path / 'bytes.parquet')
    for name in ('records', 'bytes'):
        found = load_pairs(tmp_path / f'{name}.parquet', 'train')
        assert isinstance(found[0]['image'], Image.Image)


def test_splits_have_the_usual_names_in_streams_too(tmp_path):
    columns = dict(image='image', captions='caption', image_id='nr')
    parts = {}
    for name, n in (('train', 10), ('restval', 20), ('dev', 5)):
        rows = a_set(n).cast_column('image', datasets.Image())
        parts[name] = rows.add_column('nr', [f'{name}{k}' for k in range(n)])
    datasets.DatasetDict(parts).save_to_disk(tmp_path / 'saved')
    place = tmp_path / 'saved'
    assert len(list(stream_pairs(place, 'train', columns=columns, epochs=1))) == len(
        load_pairs(place, 'train', columns=columns)
    )
    assert len(list(stream_pairs(place, 'validation', columns=columns, epochs=1))) == 5


# ---- shards


def test_several_folders_of_a_split_are_all_read(tmp_path):
    write_shard(tmp_path / 'train_a' / '0.tar', range(30))
    write_shard(tmp_path / 'train_b' / '0.tar', range(30, 60))
    loaded = [int(i) for s in ('train', 'validation', 'test') for i in ids(tmp_path, s)]
    assert sorted(loaded) == list(range(60))
    assert sorted(keys_of(stream_pairs(tmp_path, epochs=1))) == list(range(60))


def ids(place, split):
    return load_pairs(place, split)['image_id']


def test_img2datasets_folders_of_splits_stream_with_their_parquet(tmp_path):
    for split, keys in (('training', range(8)), ('valid', range(8, 12))):
        write_shard(tmp_path / split / '0.tar', keys)
        table = datasets.Dataset.from_dict(dict(url=['a'], caption=['b']))
        table.to_parquet(tmp_path / split / '0.parquet')
    assert sorted(keys_of(stream_pairs(tmp_path, epochs=1))) == list(range(8))
    assert sorted(keys_of(stream_pairs(tmp_path, 'validation', epochs=1))) == list(range(8, 12))


def test_a_column_of_splits_in_shards_is_refused(tmp_path):
    write_shard(tmp_path / '0.tar', range(4))
    for take in (load_pairs, stream_pairs):
        with pytest.raises(ValueError, match='splits of shards are folders'):
            take(tmp_path, 'train', columns=dict(split='json.split'))


def test_samples_without_a_caption_are_named_or_left_out(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / '0.tar', 'w') as tar:
        for k, caption in enumerate([b'', b'a dog', b'a cat']):
            add(tar, f'{k}.jpg', jpeg(RED, (16, 16)))
            add(tar, f'{k}.txt', caption)
    with pytest.raises(ValueError, match=r'0: no caption.*left out with skip_unreadable'):
        load_pairs(tmp_path, 'train')
    found = [i for s in ('train', 'validation', 'test') for i in _some(tmp_path, s)]
    assert sorted(found) == ['1', '2']


def _some(place, split):
    try:
        return load_pairs(place, split, skip_unreadable=True)['image_id']
    except ValueError:  # two samples need not be of every split
        return []


# ---- labelled images


def test_a_folder_of_classes_says_what_is_wrong(tmp_path):
    photos(tmp_path / 'cat', 2)
    assert len(load_labelled(tmp_path, 'test')) == 2  # a path as well as a text
    for split in ('tset', 'final'):
        with pytest.raises(ValueError, match=f'Unknown split {split!r}'):
            load_labelled(tmp_path, split)
    for n in (0, -1):
        with pytest.raises(ValueError, match='at least 1'):
            load_labelled(tmp_path, 'test', n)
        with pytest.raises(ValueError, match='at least 1'):
            load_labelled('concept', 'test', n)


def test_a_corpus_by_its_name_is_loaded_too(tmp_path, monkeypatch):
    monkeypatch.setenv('MOPE_CLIP_DATA', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='cc3m: fetch'):
        load_pairs('cc3m', 'train', 4)
    write_shard(tmp_path / 'cc3m' / '0.tar', range(20))
    assert len(load_pairs('cc3m', 'train', 4)) == 4
