"Every data set, on disk and embedded, at its edges: what lessons show once is held in every case."

import io
import itertools
import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from samples import jpeg, keys_of, write_shard

from mope_clip.data import (
    about,
    corpora,
    folders,
    load_labelled,
    load_pairs,
    pairs,
    prompts_of,
    scene,
    stream_pairs,
    suites,
    synth_pairs,
)
from mope_clip.data.columns import IMG2DATASET, as_pair, pick, sentences
from mope_clip.data.corpora import KARPATHY, KarpathySet, load_karpathy
from mope_clip.data.facts import COLOURS
from mope_clip.data.files import as_dataset, png
from mope_clip.data.hub import is_hf, load_hf, open_hf
from mope_clip.data.scenes import SPLITS, TASKS, facts_of


@pytest.fixture(autouse=True)
def no_cache_outside(tmp_path_factory, monkeypatch):
    "Data sets read from files are not kept in the user's cache"
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path_factory.mktemp('cache'))


# columns


def test_a_column_is_a_name_an_alternative_a_field_or_a_function():
    row = {
        'sentences': [dict(raw='A man. ', sentid=1), dict(raw='Two.', sentid=2)],
        'caption': ['One.', ''],
        'img.id': 7,
        'json': b'{"captions": ["x", "y"], "n": {"id": 3}}',
    }
    assert sentences(pick(row, 'sentences.raw')) == ['A man.', 'Two.']
    assert sentences(pick(row, 'caption')) == ['One.']
    columns = 'img.id', 'json.captions', 'json.n.id', 'png;img.id', len
    assert [pick(row, column) for column in columns] == [7, ['x', 'y'], 3, 7, 4]
    with pytest.raises(KeyError, match='no jpg;png'):
        pick(row, 'jpg;png')


def test_captions_lose_the_blanks_around_them():
    assert (sentences(b'a dog \n'), sentences(' ')) == (['a dog'], [])


SAMPLE = dict(
    jpg=jpeg((3, 3, 99), (32, 32)),
    txt=b' a dog\n',
    json=b'{"captions": ["a dog", "a brown dog"], "cocoid": 7}',
    __key__='000000003',
)


def test_a_sample_of_a_shard_is_a_pair():
    pair = as_pair(SAMPLE, IMG2DATASET)
    assert (pair['image'].size, pair['captions']) == ((32, 32), ['a dog'])
    assert pair['image_id'] == '000000003'
    mapping = dict(image='jpg', captions='json.captions', image_id='json.cocoid')
    assert as_pair(SAMPLE, mapping)['captions'] == ['a dog', 'a brown dog']
    words = dict(IMG2DATASET, captions=lambda row: row['txt'].decode().split())
    assert as_pair(SAMPLE, words)['captions'] == ['a', 'dog']


@pytest.mark.parametrize(
    'changed, error, why',
    [
        (dict(jpg=jpeg(size=(99, 99), cut=-500)), OSError, 'runcated'),  # opens all the same
        (dict(jpg=SAMPLE['jpg'][: len(SAMPLE['jpg']) // 2]), OSError, 'runcated'),
        (dict(jpg=b''), OSError, 'cannot identify'),
        (dict(jpg=None), KeyError, 'no jpg'),
        (dict(txt=b' '), ValueError, 'no caption'),
    ],
    ids=['late', 'early', 'empty', 'absent', 'mute'],
)
def test_a_damaged_sample_says_what_is_wrong(changed, error, why):
    with pytest.raises(error, match=why):
        as_pair(dict(SAMPLE, **changed), IMG2DATASET)


# corpora


def test_what_is_known_of_a_set_is_kept_by_select():
    noted = as_dataset(dict(image=[], name=[]), 'image', 'test', name='string')
    assert about(noted) == {}
    noted.info.description = json.dumps(dict(task='coco', images=5000))
    assert about(noted.select([])) == dict(task='coco', images=5000)
    noted.info.description = 'A set of pictures.'
    assert about(noted) == {}


def test_a_picture_is_decoded_to_its_end_to_find_out_whether_it_is_whole():
    whole = jpeg(size=(320, 240))
    late = whole[: len(whole) * 9 // 10]
    assert corpora.unreadable(dict(bytes=whole, path=None)) == ''
    assert 'truncated' in corpora.unreadable(dict(bytes=late, path=None))
    assert 'cannot identify' in corpora.unreadable(dict(bytes=b'<html>404</html>', path=None))
    assert 'No such file' in corpora.unreadable('nowhere.jpg')
    assert 'No such file' in corpora.unreadable(dict(bytes=None, path='nowhere.jpg'))
    assert Image.open(io.BytesIO(late)).size == (320, 240)  # it opens all the same


def test_broken_pictures_are_named_and_their_names_are_few():
    whole = jpeg(size=(320, 240))
    images = [dict(bytes=data, path=None) for data in (whole, b'', whole[:3000], whole)]
    found = corpora.unreadable_of(images, list('abcd'))
    assert list(found) == ['b', 'c'] and 'truncated' in found['c']
    assert (corpora.few('abc'), corpora.few(range(8), 2)) == ('a, b, c', '0, 1 and 6 more')


def test_missing_files_are_told_with_where_to_get_them(tmp_path, monkeypatch):
    nowhere = tmp_path / 'coco'
    for part in (
        f'{nowhere} does not exist',
        'put dataset_coco.json (the Karpathy split, https://',
        'the folder train2014 + val2014 (the images',
        'train2014.zip, val2014.zip',
        '`-p data_root',
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(part)):
            corpora.karpathy_root('coco', nowhere)
    with pytest.raises(FileNotFoundError, match=r'the folder flickr30k-images [(]the images from'):
        corpora.karpathy_root('flickr30k', tmp_path / 'flickr30k')
    (nowhere / 'val2014').mkdir(parents=True)  # pictures, and no JSON
    lacks = 'does not hold dataset_coco.json and an image folder'
    with pytest.raises(FileNotFoundError, match=lacks):
        corpora.karpathy_root('coco', nowhere)
    (nowhere / 'dataset_coco.json').write_text('{}', encoding='utf-8')
    assert corpora.karpathy_root('coco', str(nowhere)) == nowhere
    monkeypatch.setenv('MOPE_CLIP_DATA', str(tmp_path))
    assert corpora.karpathy_root('coco', None) == nowhere


@pytest.mark.parametrize(
    'task, split, images, unreadable, splits, label',
    [
        ('coco', 'test', 5000, [], dict(test=5000), 'the Karpathy split'),
        ('flickr30k', 'validation', 1000, [], dict(val=1000), 'the Karpathy split'),
        ('coco', 'test', 250, [], dict(test=5000), 'the first 250 of the Karpathy split'),
        ('flickr30k', 'test', 5000, [], dict(test=5000), 'not the Karpathy split'),
        ('coco', 'test', 4999, ['a.jpg'], dict(test=5000), 'not the Karpathy split'),
        ('coco', 'train', 8, [], dict(train=8), ''),  # nothing is reported on train
        ('pets', 'test', 8, [], dict(test=8), ''),
    ],
)
def test_a_split_says_whether_published_numbers_are_of_it(
    task, split, images, unreadable, splits, label
):
    known = dict(task=task, split=split, images=images, unreadable=unreadable, splits=splits)
    assert corpora._label(known) == label


def test_what_loading_found_is_one_line():
    known = dict(task='coco', split='test', images=5000, captions=24990, fewer=4)
    known |= dict(unreadable=[], checked=True, label='the Karpathy split')
    known |= dict(splits=dict(train=82783, restval=30504, val=5000, test=5000))
    assert corpora._report(known) == (
        'coco test: 5,000 images, 24,990 captions (4 images with fewer than five); none missing, '
        'none unreadable; on disk: train 82,783, restval 30,504, val 5,000, test 5,000; '
        'the Karpathy split'
    )
    quick = corpora._report(dict(known, checked=False, label=''))
    assert quick.endswith(
        '; none missing, not decoded; on disk: train 82,783, restval 30,504, val 5,000, test 5,000'
    )


NAMES = {
    '1007129816.jpg': 'test',
    '36979.jpg': 'val',
    '65567.jpg': 'train',
    '134206.jpg': 'train',
}


@pytest.fixture
def flickr(tmp_path):
    "Flickr30K in miniature: an image that was never unpacked, one that was cut short"
    whole = jpeg(size=(320, 240))
    (tmp_path / 'images').mkdir()
    entries = []
    for name, split in NAMES.items():
        if split != 'val':
            data = whole[:5000] if name == '134206.jpg' else whole
            (tmp_path / 'images' / name).write_bytes(data)
        said = [dict(raw=f'A man in a hat, {k}.') for k in range(1 if split == 'test' else 6)]
        entries.append(dict(filename=name, split=split, sentences=said))
    write_entries(tmp_path, entries)
    return tmp_path, entries


def write_entries(folder, images, name='dataset_flickr30k.json', encoding='utf-8'):
    (folder / name).write_text(json.dumps(dict(images=images)), encoding=encoding)


def test_flickr30k_is_read_from_whichever_folder_has_the_picture(flickr):
    root, entries = flickr
    path = corpora._image_path(root, 'flickr30k', entries[0])
    assert path == root / 'images' / '1007129816.jpg'
    loaded = load_karpathy('flickr30k', 'test', None, root)
    assert (loaded['image_id'][0], loaded['captions'][0]) == (
        '1007129816.jpg',
        ['A man in a hat, 0.'],
    )
    assert loaded[0]['image'].size == (320, 240)
    assert (about(loaded)['fewer'], about(loaded)['label']) == (1, 'not the Karpathy split')


def test_missing_and_unreadable_pictures_are_named_or_left_out(flickr):
    root, _ = flickr
    missing = '1 of 1 validation images of flickr30k are missing: flickr30k-images/36979.jpg'
    with pytest.raises(FileNotFoundError, match=missing):
        load_karpathy('flickr30k', 'validation', None, root)
    cut = '1 of 2 train images of flickr30k cannot be read: 134206.jpg'
    with pytest.raises(ValueError, match=cut):
        load_karpathy('flickr30k', 'train', None, root)
    fewer = load_karpathy('flickr30k', 'train', None, root, skip_unreadable=True)
    assert list(fewer['image_id']) == ['65567.jpg']
    assert about(fewer)['unreadable'] == ['134206.jpg']
    later = load_karpathy('flickr30k', 'train', None, root, check=False)
    assert [len(texts) for texts in later['captions']] == [5, 5]  # found when it is needed


def test_a_karpathy_file_may_begin_with_a_byte_order_mark(flickr):
    root, entries = flickr
    write_entries(root, entries, encoding='utf-8-sig')
    assert len(load_karpathy('flickr30k', 'test', None, root)) == 1


def test_a_damaged_karpathy_file_is_told_by_its_entry(flickr):
    root, entries = flickr
    write_entries(root, entries[:1])
    with pytest.raises(ValueError, match='holds no image of the train split'):
        load_karpathy('flickr30k', 'train', None, root)
    (root / 'dataset_flickr30k.json').write_text('{"images": [', encoding='utf-8')
    with pytest.raises(ValueError, match='is not the Karpathy file'):
        load_karpathy('flickr30k', 'test', None, root)
    first, mute = entries[0], '1 of 1 test images of flickr30k have no caption (1007129816.jpg)'
    for images, why in (
        (3, 'is no list'),
        ([first, 'x'], 'has an entry 1 without'),
        ([dict(first, sentences=[dict(raw=None)])], 'has an entry 0 without'),
        ([dict(first, sentences=[])], mute),
    ):
        write_entries(root, images)
        with pytest.raises(ValueError, match=re.escape(why)):
            load_karpathy('flickr30k', 'test', None, root)


def test_a_set_of_karpathys_format_is_added_by_one_entry(flickr, monkeypatch):
    root, entries = flickr
    mine = KarpathySet('mine.json', ('images',), 'images', 'my own', test_size=1)
    monkeypatch.setitem(KARPATHY, 'mine', mine)
    write_entries(root, entries, 'mine.json')
    loaded = load_pairs('mine', 'test', root=root)
    assert about(loaded)['label'] == 'the Karpathy split'
    assert next(iter(stream_pairs('mine', 'test', root)))['image_id'] == '1007129816.jpg'


COCO = dict(
    test=['A man on a bike. ', 'Two.', 'Three.', 'Four.', 'Five.', 'Six.'],
    restval=['A cake.'],
    train=['A restaurant.'],
    val=['A child.'],
)


@pytest.fixture
def coco(tmp_path):
    "COCO in miniature, exactly as distributed"
    entries = []
    for cocoid, (split, said) in enumerate([*COCO.items(), ('test', ['A boy.', 'A screen.'])]):
        folder = 'train2014' if split == 'train' else 'val2014'
        name = f'COCO_{folder}_{cocoid:012}.jpg'
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_bytes(jpeg((40 * cocoid, 80, 120)))
        texts = [
            dict(raw=text, tokens=text.lower().split(), imgid=cocoid, sentid=k)
            for k, text in enumerate(said)
        ]
        row = dict(filepath=folder, filename=name, split=split, cocoid=cocoid, imgid=cocoid)
        entries.append(dict(row, sentids=list(range(len(said))), sentences=texts))
    write_entries(tmp_path, entries, 'dataset_coco.json')
    return tmp_path


def test_coco_trains_on_restval_too_and_keeps_five_captions(coco):
    loaded = {split: load_pairs('coco', split, root=coco) for split in SPLITS}
    ids = {split: list(data['image_id']) for split, data in loaded.items()}
    assert ids == dict(train=['1', '2'], validation=['3'], test=['0', '4'])
    assert list(loaded['test']['captions']) == [
        ['A man on a bike.', 'Two.', 'Three.', 'Four.', 'Five.'],
        ['A boy.', 'A screen.'],
    ]
    pixels = np.asarray(loaded['test'][1]['image']).astype(int)
    assert np.abs(pixels - (160, 80, 120)).max() <= 3  # JPEG is close
    assert loaded['test'][0]['image'].size == (64, 48)
    assert loaded['test'].features == load_pairs('openmoji', 'test', n=1).features
    assert list(load_pairs('coco', 'test', n=1, root=coco)['image_id']) == ['0']


# Hugging Face data sets


def tiny_set():
    columns = dict(image=[dict(bytes=jpeg((9, 9, 9)), path=None)] * 3, caption=[['a']] * 3)
    kinds = dict(caption=datasets.List(datasets.Value('string')), key='int64')
    return as_dataset(dict(columns, key=[1, 2, 3]), 'image', 'test', **kinds)


def test_a_set_is_opened_from_any_of_its_folders(tmp_path):
    tiny = tiny_set()
    tiny.save_to_disk(tmp_path / 'disk')
    datasets.DatasetDict(val=tiny).save_to_disk(tmp_path / 'dict')
    (tmp_path / 'parquet' / 'data').mkdir(parents=True)
    tiny.to_parquet(tmp_path / 'parquet' / 'data' / 'test-00000-of-00001.parquet')
    found = [
        {split: len(data) for split, data in open_hf(tmp_path / name).items()}
        for name in ('disk', 'dict', 'parquet')
    ]
    assert found == [dict(test=3), dict(val=3), dict(test=3)]
    streamed = open_hf(tmp_path / 'parquet', streaming=True)['test']
    assert [row['key'] for row in streamed] == [1, 2, 3]


def test_a_set_that_cannot_be_opened_is_told_in_a_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere does not exist'):
        open_hf(tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='cannot be opened as a Hugging Face data set'):
        open_hf(tmp_path / 'empty')


def test_a_revision_of_the_hub_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **k: dict(train=(a, k)))
    asked = open_hf('hf://owner/name@refs/convert/parquet')['train']
    assert asked == (('owner/name',), dict(streaming=False, revision='refs/convert/parquet'))


def test_a_place_is_a_hugging_face_set_by_its_name_or_its_files(tmp_path):
    places = 'hf://owner/name', 'hf://datasets/owner/name/{000..575}.tar', None, 'no/such'
    assert [is_hf(place) for place in places] == [True, False, False, False]
    (tmp_path / 'a.parquet').touch()
    assert is_hf(tmp_path)


FLICKR_ON_THE_HUB = dict(image='image', captions='caption', image_id='filename', split='split')


def flickr_table():
    "The layout of nlphuji/flickr30k: a column names the split"
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.List(datasets.Value('string')),
        sentids=datasets.List(datasets.Value('string')),
        split=datasets.Value('string'),
        img_id=datasets.Value('string'),
        filename=datasets.Value('string'),
    )
    rows = dict(
        image=[dict(bytes=jpeg((40 * k, 90, 90)), path=f'{k}.jpg') for k in range(5)],
        caption=[[f'Caption {j} of {k}. ' for j in range(5 + k % 2)] for k in range(5)],
        sentids=[['0']] * 5,
        split=['train', 'val', 'test', 'train', 'test'],
        img_id=[str(k) for k in range(5)],
        filename=[f'{k}.jpg' for k in range(5)],
    )
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def flickr_folder(tmp_path):
    flickr_table().to_parquet(tmp_path / 'TEST-00000-of-00001.parquet')
    return tmp_path


def test_a_column_may_name_the_split(flickr_folder):
    loaded = {
        split: load_hf('flickr30k', split, None, flickr_folder, FLICKR_ON_THE_HUB)
        for split in SPLITS
    }
    ids = {split: list(data['image_id']) for split, data in loaded.items()}
    assert ids == dict(train=['0.jpg', '3.jpg'], validation=['1.jpg'], test=['2.jpg', '4.jpg'])
    first_five = [f'Caption {j} of 1.' for j in range(5)]
    assert loaded['validation'][0]['captions'] == first_five
    pixels = np.asarray(loaded['test'][1]['image']).astype(int)
    assert np.abs(pixels - (160, 90, 90)).max() <= 3
    test = loaded['test']
    assert (test.column_names, str(test.split)) == (['image', 'captions', 'image_id'], 'test')
    known = about(loaded['validation'])
    assert (known['fewer'], known['captions']) == (0, 5)
    assert len(load_hf('flickr30k', 'train', 1, flickr_folder, FLICKR_ON_THE_HUB)) == 1
    assert about(test)['splits'] == dict(train=2, val=1, test=2)


@pytest.mark.parametrize(
    'columns, why',
    [
        (None, 'Say which is which: columns=dict(image=..., captions=..., image_id=...)'),
        (dict(FLICKR_ON_THE_HUB, captions='sentences'), "has no column 'sentences'"),
        (dict(FLICKR_ON_THE_HUB, image='filename'), "'filename' of"),
        (dict(FLICKR_ON_THE_HUB, image_id='sentids'), 'several rows for one image'),
    ],
    ids=['none', 'no such column', 'no pictures', 'a row a caption'],
)
def test_a_mapping_that_cannot_be_right_is_refused(columns, why, flickr_folder):
    with pytest.raises(ValueError, match=re.escape(why)):
        load_hf('flickr30k', 'test', None, flickr_folder, columns)


def test_nothing_is_fetched_before_the_columns_are_named():
    with pytest.raises(ValueError, match='before anything is fetched'):
        load_pairs('flickr30k', 'test', root='hf://nlphuji/flickr30k')


def test_records_of_sentences_in_splits_of_their_own(tmp_path):
    def record(row):
        said = [dict(raw=text) for text in row['caption']]
        return dict(sentences=said, cocoid=int(row['img_id']))

    table = flickr_table().map(record, remove_columns=['caption', 'sentids', 'split', 'img_id'])
    parts = dict(train=[0], restval=[1, 2], validation=[3], test=[4])
    parts = {name: table.select(rows) for name, rows in parts.items()}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / 'coco')
    records = dict(image='image', captions='sentences.raw', image_id='cocoid')
    loaded = {split: load_hf('coco', split, None, tmp_path / 'coco', records) for split in SPLITS}
    ids = {split: list(data['image_id']) for split, data in loaded.items()}
    assert ids == dict(train=['0', '1', '2'], validation=['3'], test=['4'])
    assert loaded['validation'][0]['captions'][4] == 'Caption 4 of 3.'
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / 'one')
    with pytest.raises(ValueError, match='holds no image of the test split: it has train'):
        load_hf('coco', 'test', None, tmp_path / 'one', records)


# labelled folders


def test_a_folder_without_splits_is_for_testing(tmp_path):
    base = tmp_path / 'pets'
    (base / 'sea_otter').mkdir(parents=True)
    assert folders._split_folder(base, 'test') == base
    with pytest.raises(FileNotFoundError, match='holds no folder for the validation split'):
        folders._split_folder(base, 'validation')
    (base / 'val').mkdir()
    assert folders._split_folder(base, 'validation') == base / 'val'
    with pytest.raises(FileNotFoundError, match='the test split'):
        folders._split_folder(base, 'test')
    with pytest.raises(FileNotFoundError, match='<root>/val/n01440764/'):
        folders._split_folder(tmp_path / 'imagenet', 'validation')


def test_class_folders_are_called_by_their_names_or_by_imagenets():
    base = Path('pets')
    assert folders._class_names(['cat', 'sea_otter'], base) == ['cat', 'sea otter']
    thousand = [f'n{k:08}' for k in range(1000)]
    assert folders._class_names(thousand, base)[:2] == ['tench', 'goldfish']
    with pytest.raises(ValueError, match='2 ImageNet synsets among 3 folders'):
        folders._class_names(['cat', 'n01440764', 'n01443537'], base)


@pytest.fixture
def pets(tmp_path):
    for name, k in (('cat', 0), ('cat', 1), ('cat', 2), ('sea_otter', 0)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f'{k}.JPEG').write_bytes(jpeg((60 * k, 0, 99)))
    (tmp_path / 'cat' / 'notes.txt').write_text('not a picture', encoding='utf-8')
    return tmp_path


def test_classes_come_in_turn(pets):
    loaded = load_labelled(str(pets), 'test')
    assert list(loaded['label']) == [0, 1, 0, 0]
    assert loaded.features['label'].names == ['cat', 'sea_otter']
    assert abs(np.asarray(loaded[3]['image'])[0, 0, 0].item() - 120) <= 3  # cat/2
    known = about(loaded)
    assert (known['classes'], len(known['templates'])) == (['cat', 'sea otter'], 80)
    assert known['templates'][0] == 'a bad photo of a {}.'
    assert list(load_labelled(str(pets), 'test', 2)['label']) == [0, 1]


def test_a_folder_with_broken_or_missing_images_is_refused(pets):
    with pytest.raises(ValueError, match='holds 2 class folders, and ImageNet has 1,000'):
        load_labelled('imagenet', 'test', root=pets)
    (pets / 'cat' / '1.JPEG').write_bytes(jpeg(size=(320, 240), cut=4000))
    with pytest.raises(ValueError, match=r'cannot be read: cat/1\.JPEG'):
        load_labelled(str(pets), 'test')
    good = load_labelled(str(pets), 'test', skip_unreadable=True)
    assert list(good['label']) == [0, 1, 0]
    (pets / 'dog').mkdir()
    with pytest.raises(FileNotFoundError, match=r'no image in 1 of 3 class folders \(dog\)'):
        load_labelled(str(pets), 'test')


def test_a_folder_without_class_folders_is_refused(tmp_path):
    (tmp_path / 'test').mkdir()
    with pytest.raises(FileNotFoundError, match='holds no class folders: put the images into'):
        load_labelled(str(tmp_path), 'test')


def test_imagenet_has_its_own_names_and_one_image_of_each_class_first(tmp_path):
    for k in range(1000):
        path = tmp_path / 'val' / f'n{k:08}' / 'a.png'
        path.parent.mkdir(parents=True)
        Image.new('RGB', (4, 4), (k % 256, k // 256, 0)).save(path)
    imagenet = load_labelled('imagenet', 'validation', root=tmp_path)
    assert (len(imagenet), imagenet[999]['label']) == (1000, 999)
    assert imagenet[999]['image'].getpixel((0, 0)) == (999 % 256, 3, 0)
    prompts = prompts_of(imagenet)
    assert (prompts.classes[0], prompts.classes[-1]) == ('tench', 'toilet paper')
    assert len(prompts.templates) == 80
    assert prompts.templates[0].format(prompts.classes[1]) == 'a bad photo of a goldfish.'
    with pytest.raises(FileNotFoundError, match='holds no folder for the test split'):
        load_labelled('imagenet', 'test', root=tmp_path)
    (tmp_path / 'val' / 'n00000999').rename(tmp_path / 'val' / 'toilet_paper')
    with pytest.raises(ValueError, match='names are known for all 1,000 together'):
        load_labelled(str(tmp_path), 'validation')


# labelled scenes


def test_the_label_of_a_ground_is_the_colour_of_its_pixels():
    colours = load_labelled('colour', 'test', n=10)
    assert list(colours['label']) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert colours.features['label'].names[:2] == ['red ground', 'orange ground']
    assert str(colours.split) == 'test'
    corners = [image.getpixel((0, 0)) for image in colours['image']]
    assert corners == [list(COLOURS.values())[k % 8] for k in range(10)]
    assert prompts_of(colours) == suites()['colour']
    known = about(colours)
    assert (known['suite'], known['task'], known['split']) == ('colour', 'openmoji', 'test')
    assert 'OpenMoji' in known['credit'] and 'templates' not in known


def test_the_label_of_a_count_is_the_number_of_things():
    forced = suites()['count'].fixed
    shown = [facts_of('openmoji', 'test', 10**9 + k, **fixed) for k, fixed in enumerate(forced)]
    assert [len(found['things']) for found in shown] == [1, 2, 3]


def test_an_unknown_suite_or_split_is_refused():
    with pytest.raises(ValueError, match="Unknown suite 'colours': choose one of concept, categ"):
        load_labelled('colours', 'test')
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        load_labelled('colour', 'dev')
    strange = datasets.ClassLabel(names=['cat', 'dog'])
    with pytest.raises(ValueError, match='pass a Suite'):
        prompts_of(as_dataset(dict(image=[], label=[]), 'image', 'test', label=strange))


# pairs


def test_an_unknown_task_is_answered_with_the_known_ones():
    known = ', '.join([*TASKS, *KARPATHY, 'cc3m'])
    with pytest.raises(ValueError, match=f"Unknown task 'cocoa': choose one of {known}[.]"):
        load_pairs('cocoa', 'test')
    with pytest.raises(ValueError, match="Unknown task 'cc4m'"):
        stream_pairs('cc4m')
    with pytest.raises(ValueError, match="Unknown split 'restval'"):
        load_pairs('coco', 'restval')
    with pytest.raises(ValueError, match='at least 1, not 0'):
        load_pairs('openmoji', 'test', n=0)
    with pytest.raises(ValueError, match='a mapping as JSON'):
        load_pairs('coco', 'test', columns='image=image')
    with pytest.raises(FileNotFoundError, match='no/such does not exist'):
        load_pairs('no/such', 'test', columns=FLICKR_ON_THE_HUB)


def test_coco_without_its_files_is_an_instruction(tmp_path):
    with pytest.raises(FileNotFoundError, match=f'coco needs its files, and {tmp_path} does not h'):
        load_pairs('coco', 'test', root=tmp_path)


def test_embedded_pairs_have_the_columns_of_every_task():
    found = load_pairs('openmoji', 'validation', n=4)
    assert (found.column_names, len(found)) == (['image', 'captions', 'image_id'], 4)
    assert str(found.split) == 'validation'


COLUMNS = dict(image='image', captions='sentences_raw', image_id='cocoid', split='split')


@pytest.fixture
def hub_folder(tmp_path):
    rows = dict(
        image=[png(Image.new('RGB', (8, 8), (40 * k, 80, 120))) for k in range(3)],
        sentences_raw=[[f'Picture {k}.'] for k in range(3)],
        cocoid=[391895, 522418, 184613],
        split=['test', 'restval', 'val'],
    )
    table = datasets.Dataset.from_dict(rows).cast_column('image', datasets.Image())
    for k in range(3):
        table.select([k]).to_parquet(tmp_path / f'train-{k:05}-of-00003.parquet')
    return tmp_path


def test_a_copy_from_the_hub_is_the_same_once_its_columns_are_named(hub_folder):
    loaded = {
        split: list(load_pairs('coco', split, root=hub_folder, columns=COLUMNS)['image_id'])
        for split in SPLITS
    }
    assert loaded == dict(train=['522418'], validation=['184613'], test=['391895'])
    unnamed = load_pairs(str(hub_folder), 'test', columns=json.dumps(COLUMNS))
    assert unnamed[0]['captions'] == ['Picture 0.']
    with pytest.raises(ValueError, match='with the columns'):
        load_pairs('coco', 'test', root=hub_folder)


def test_a_data_set_streams_once_its_columns_are_named(hub_folder):
    streamed = stream_pairs('coco', 'test', hub_folder, columns=COLUMNS, epochs=2)
    assert [pair['image_id'] for pair in streamed] == ['391895'] * 2
    place, mapping = str(hub_folder), {k: v for k, v in COLUMNS.items() if k != 'split'}
    with pytest.raises(ValueError, match='rows of several splits in one'):
        stream_pairs(place, columns=COLUMNS)  # test rows would be trained on
    streamed = stream_pairs(place, columns=mapping, epochs=1)
    assert sorted(keys_of(streamed)) == [184613, 391895, 522418]
    with pytest.raises(ValueError, match='say which columns are'):
        stream_pairs(place)
    with pytest.raises(ValueError, match='has no test split: it has train'):
        stream_pairs(place, 'test', columns=mapping)


def test_shards_of_several_splits_have_their_folders(tmp_path):
    write_shard(tmp_path / 'train' / '00000.tar', range(3))
    write_shard(tmp_path / 'val' / '00000.tar', [7])
    place = str(tmp_path)
    for split, folder in (('train', 'train'), ('validation', 'val')):
        source = pairs.corpus_source('web', split, place, None, 8)
        assert source.shards == [f'{place}/{folder}/00000.tar']
    mapped = pairs.corpus_source('web', 'train', place, dict(captions='json.caption'), 8)
    assert mapped.columns == dict(IMG2DATASET, captions='json.caption')
    with pytest.raises(FileNotFoundError, match='no folder for the test split'):
        pairs.corpus_source('web', 'test', place, None, 8)
    with pytest.raises(FileNotFoundError, match=r'cc3m: fetch Train_GCC-training\.tsv'):
        pairs.corpus_source('cc3m', 'train', f'{place}/cc3m', None, 8)


def test_a_corpus_of_the_data_folder_is_streamed_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('MOPE_CLIP_DATA', str(tmp_path))
    for k in range(4):
        write_shard(tmp_path / 'cc3m' / f'{k:05}.tar', range(5 * k, 5 * k + 5))
        stats = tmp_path / 'cc3m' / f'{k:05}_stats.json'
        stats.write_text(json.dumps(dict(count=9, successes=5)), encoding='utf-8')
    assert sorted(keys_of(stream_pairs('cc3m', epochs=1))) == list(range(20))
    said = 'cc3m train: 4 shards, 20 pairs by their _stats.json, 4 lanes'
    assert said in capsys.readouterr().out
    some = stream_pairs(f'{tmp_path}/cc3m/{{00001..00002}}.tar', epochs=1)
    assert sorted(keys_of(some)) == list(range(5, 15))
    with pytest.raises(FileNotFoundError, match='no folder for the validation split'):
        stream_pairs('cc3m', 'validation')
    stats.unlink()
    stream_pairs('cc3m')
    assert 'cc3m train: 4 shards, 4 lanes' in capsys.readouterr().out


def test_the_first_scene_is_named_by_start_which_means_nothing_to_other_tasks(hub_folder):
    stream = stream_pairs('openmoji', 'train', start=500)
    assert next(iter(stream))['image_id'] == 'openmoji/train/500'
    mapping = {k: v for k, v in COLUMNS.items() if k != 'split'}
    for task, split, root, columns in (
        ('coco', 'test', hub_folder, COLUMNS),
        (str(hub_folder), 'train', None, mapping),
    ):
        how = dict(root=root, columns=columns, epochs=1)
        begun = [keys_of(stream_pairs(task, split, start=start, **how)) for start in (0, 500)]
        assert begun[0] == begun[1]


def test_a_resumed_stream_of_scenes_goes_on_where_the_other_stopped():
    stream, resumed = (stream_pairs('openmoji', 'train') for _ in range(2))
    first = list(itertools.islice(stream, 3))
    assert [pair['image_id'] for pair in first] == [f'openmoji/train/{k}' for k in range(3)]
    assert first[2]['image'].tobytes() == scene('openmoji', 'train', 2).image.tobytes()
    resumed.load_state_dict(stream.state_dict())
    assert next(iter(resumed))['image_id'] == 'openmoji/train/3'


# coloured squares


def test_squares_have_the_colours_that_their_captions_say():
    rgb = dict(red=(220, 40, 40), green=(40, 180, 60), blue=(50, 80, 220), yellow=(240, 220, 60))
    synth = synth_pairs(16)
    assert (synth.column_names, len(synth)) == (['image', 'captions', 'image_id'], 16)
    assert synth[0]['image'].size == (32, 32)
    for pair in synth:
        told = re.match(r'a (\w+) square left of a (\w+) square', pair['captions'][0])
        left, right = told.groups()
        assert pair['captions'] == [
            f'a {left} square left of a {right} square',
            f'a {right} square right of a {left} square',
        ]
        pixels = np.asarray(pair['image'])
        row = pixels[18 if (pixels[18] != 235).any() else 8]  # through both squares
        ink = row[(row != 235).any(1)].tolist()
        assert ink == [list(rgb[left])] * 12 + [list(rgb[right])] * 12


def test_squares_are_deterministic_and_a_beginning_of_the_longer_set():
    longer = list(synth_pairs(16)['captions'])
    assert list(synth_pairs(4)['captions']) == longer[:4]
    assert list(synth_pairs(16, 'test')['captions']) != longer
    assert [len(told) for told in synth_pairs(2, captions=1)['captions']] == [1, 1]


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch):
    "Once for a set in memory and once for a stream; `datasets` would try for half a minute"
    monkeypatch.setattr('mope_clip.data.network.is_reached', lambda host: False)
    columns = dict(image='image', captions='caption', image_id='id')
    for load in (load_pairs, stream_pairs):
        with pytest.raises(FileNotFoundError, match='cannot be reached'):
            load('coco', 'test', root='hf://some/set', columns=columns)
