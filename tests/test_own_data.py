"A set of one's own is a task: every form in which people have pictures with captions."

import csv
import json
import re

import datasets
import pytest
from PIL import Image
from samples import add, jpeg, write_shard

from mope_clip.data import load_pairs, stream_pairs
from mope_clip.data.own import kind_of, name_of
from mope_clip.data.pairs import load_labelled
from mope_clip.data.splits import cut, split_named, splits_of
from mope_clip.data.tables import read_rows

N = 60
SPLITS = 'train', 'validation', 'test'


def names(n=N):
    return [f'{k}.jpg' for k in range(n)]


def told(name):
    "As many captions as the picture's number says: one, two or three"
    k = int(name.split('.')[0])
    return [f'photo {k}, said {j}' for j in range(1 + k % 3)]


def photos(folder, n=N):
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names(n)):
        (folder / name).write_bytes(jpeg((4 * k, 90, 90), (16, 16)))
    return folder


def write_csv(path, rows, mark=','):
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, rows[0], delimiter=mark)
        writer.writeheader()
        writer.writerows(rows)


def repeated(image='image', caption='caption', n=N):
    return [{image: name, caption: text} for name in names(n) for text in told(name)]


def csv_of_repeated_rows(folder):
    photos(folder)
    write_csv(folder / 'captions.csv', repeated('filepath', 'caption'))


def tsv_of_open_clip(folder):
    photos(folder / 'images')
    write_csv(folder / 'pairs.tsv', repeated('filepath', 'title'), '\t')


def csv_of_lists(folder):
    photos(folder)
    write_csv(folder / 'a.csv', [dict(image=name, captions=told(name)) for name in names()])


def json_lines(folder):
    photos(folder)
    lines = [json.dumps(dict(image=name, caption=told(name))) for name in names()]
    (folder / 'captions.jsonl').write_text('\n'.join(lines))


def image_folder(folder):
    photos(folder)
    lines = [json.dumps(dict(file_name=name, text=told(name))) for name in names()]
    (folder / 'metadata.jsonl').write_text('\n'.join(lines))


def kaggles_flickr(folder):
    photos(folder / 'flickr30k_images' / 'flickr30k_images')
    lines = ['image_name| comment_number| comment']
    lines += [f'{name}| {j}| {text}' for name in names() for j, text in enumerate(told(name))]
    (folder / 'results.csv').write_text('\n'.join([*lines, '0.jpg| 4   no bar, as in the file']))


def flickr8k(folder):
    photos(folder / 'Images')
    lines = [f'{name}#{j}\t{text}' for name in names() for j, text in enumerate(told(name))]
    (folder / 'Flickr8k.token.txt').write_text('\n'.join(lines))


def kaggles_flickr8k(folder):
    photos(folder / 'Images')
    write_csv(folder / 'captions.txt', repeated())


def files_of_img2dataset(folder):
    photos(folder / '00000')
    for name in names():
        (folder / '00000' / name).with_suffix('.txt').write_text('\n'.join(told(name)))
    rows = datasets.Dataset.from_dict(dict(url=names(), caption=[told(n)[0] for n in names()]))
    rows.to_parquet(folder / '00000.parquet')


def parquet_of_paths(folder):
    photos(folder / 'jpg')
    columns = dict(image=names(), caption=[told(name) for name in names()])
    datasets.Dataset.from_dict(columns).to_parquet(folder / 'table.parquet')


def set_with_pictures():
    pictures = [dict(bytes=jpeg((4 * k, 90, 90), (16, 16)), path=None) for k in range(N)]
    columns = dict(image=pictures, caption=[told(name) for name in names()], image_id=names())
    return datasets.Dataset.from_dict(columns).cast_column('image', datasets.Image())


def parquet_of_pictures(folder):
    folder.mkdir()
    set_with_pictures().to_parquet(folder / 'train-00000-of-00001.parquet')


def saved_to_disk(folder):
    set_with_pictures().save_to_disk(folder)


def shards(folder):
    import tarfile

    folder.mkdir()
    for shard in range(4):
        with tarfile.open(folder / f'{shard:05}.tar', 'w') as tar:
            for name in names()[shard::4]:
                add(tar, name, jpeg((9, 9, 9), (16, 16)))
                add(tar, name.replace('jpg', 'txt'), '\n'.join(told(name)).encode())
        rows = datasets.Dataset.from_dict(dict(url=['a'], caption=['b']))
        rows.to_parquet(folder / f'{shard:05}.parquet')  # as img2dataset does


def karpathys_json(folder):
    photos(folder / 'pics')
    entries = [
        dict(split='train', filename=name, sentences=[dict(raw=text) for text in told(name)])
        for name in names()
    ]
    (folder / 'dataset_mine.json').write_text(json.dumps(dict(images=entries)))


FORMS = (
    csv_of_repeated_rows,
    tsv_of_open_clip,
    csv_of_lists,
    json_lines,
    image_folder,
    kaggles_flickr,
    flickr8k,
    kaggles_flickr8k,
    files_of_img2dataset,
    parquet_of_paths,
    parquet_of_pictures,
    saved_to_disk,
    shards,
    karpathys_json,
)


@pytest.mark.parametrize('form', FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize('folder', ['photos', 'my [2019] {photos}'])
def test_a_folder_of_ones_own_is_a_task(form, folder, tmp_path):
    place = tmp_path / folder
    form(place)
    loaded = {split: load_pairs(str(place), split) for split in SPLITS}
    seen = [name.split('/')[-1] for data in loaded.values() for name in data['image_id']]
    expected = [name if '.' in seen[0] else name.split('.')[0] for name in names()]
    assert sorted(seen) == sorted(expected)
    assert all(len(data) > 1 for data in loaded.values())
    for data in loaded.values():
        for pair in data:
            assert pair['captions'] == told(pair['image_id'].split('/')[-1])
            assert pair['image'].size == (16, 16)
    trained = [pair['image_id'] for pair in stream_pairs(str(place), 'train', epochs=1)]
    assert sorted(trained) == sorted(loaded['train']['image_id'])


def test_a_column_names_the_split_and_what_is_lacking_is_cut_out_of_train(tmp_path):
    photos(tmp_path)
    rows = [
        dict(image=n, caption='a', split='dev' if k % 4 else 'train') for k, n in enumerate(names())
    ]
    write_csv(tmp_path / 'captions.csv', rows)
    place = str(tmp_path / 'captions.csv')
    assert len(load_pairs(place, 'validation')) == 45
    test, train = load_pairs(place, 'test'), load_pairs(place, 'train')
    assert len(test) + len(train) == 15
    assert len(test) > 0


def test_tables_are_of_the_splits_that_they_are_called_by(tmp_path):
    photos(tmp_path / 'pics')
    for split, part in (('train', names()[:40]), ('val', names()[40:50]), ('test', names()[50:])):
        write_csv(tmp_path / f'{split}.csv', [dict(image=n, caption='a') for n in part])
    sizes = [len(load_pairs(str(tmp_path), split)) for split in SPLITS]
    assert sizes == [40, 10, 10]
    write_csv(tmp_path / 'more.csv', [dict(image='0.jpg', caption='a')])
    with pytest.raises(ValueError, match='holds several tables'):
        load_pairs(str(tmp_path), 'train')


def test_columns_are_named_in_any_form(tmp_path):
    photos(tmp_path)
    write_csv(tmp_path / 'x.csv', repeated('where', 'alt'))
    with pytest.raises(ValueError, match='pictures and no captions'):
        load_pairs(str(tmp_path), 'train')
    with pytest.raises(ValueError, match='is no table of captions: it takes the columns image'):
        load_pairs(str(tmp_path / 'x.csv'), 'train')
    mapping = dict(image='where', captions='alt')
    for columns in (mapping, json.dumps(mapping)):
        assert len(load_pairs(str(tmp_path), 'train', columns=columns)) > 30
    shards(tmp_path / 'web')
    some = load_pairs(str(tmp_path / 'web'), 'test', columns=dict(captions='txt', image_id='txt'))
    assert some['image_id'][0].startswith("b'photo")


def test_an_image_stays_in_its_split_when_others_are_added():
    few, more = names(50), names(500)
    first = dict(zip(few, splits_of([''] * 50, few), strict=True))
    later = dict(zip(more, splits_of([''] * 500, more), strict=True))
    assert all(later[name] == split for name, split in first.items())
    counts = [list(later.values()).count(split) for split in SPLITS]
    assert counts[0] > 350
    assert min(counts) > 30
    assert splits_of(['test'] * 3, few[:3]) == ['test'] * 3, 'a set for testing is left whole'
    assert cut('a', ()) == 'train'


def test_splits_are_named_in_the_usual_words():
    words = ['val2017', 'dev', 'TEST', 'training', 'restval', 'photos', 'train-test', 'contest']
    expected = ['validation', 'validation', 'test', 'train', 'train', '', '', '']
    assert [split_named(word) for word in words] == expected


def test_a_corpus_without_splits_is_streamed_whole_where_no_split_is_asked_for(tmp_path):
    shards(tmp_path / 'web')
    assert len(list(stream_pairs(str(tmp_path / 'web'), epochs=1))) == N


def test_shards_go_on_at_the_same_pair_without_what_was_cut_out(tmp_path):
    shards(tmp_path / 'web')

    def stream():
        return stream_pairs(str(tmp_path / 'web'), 'train', epochs=1, block=3)

    first, again = stream(), stream()
    whole = [pair['image_id'] for pair in stream()]
    reader = iter(first)
    begun = [next(reader)['image_id'] for _ in range(11)]
    again.load_state_dict(first.state_dict())
    assert begun + [pair['image_id'] for pair in again] == whole


def test_folders_of_shards_are_splits_and_their_number_may_be_said(tmp_path):
    write_shard(tmp_path / 'train' / '0.tar', range(40))
    write_shard(tmp_path / 'test' / '0.tar', range(40, 50))
    for split in ('train', 'test'):
        (tmp_path / split / 'nshards.txt').write_text('1')
    assert len(load_pairs(str(tmp_path), 'test')) == 10
    sizes = [len(load_pairs(str(tmp_path), split)) for split in ('train', 'validation')]
    assert sum(sizes) == 40
    assert min(sizes) > 0
    assert len(list(stream_pairs(str(tmp_path), 'train', epochs=1))) == sizes[0]
    (tmp_path / 'test' / 'nshards.txt').write_text('3')
    with pytest.raises(FileNotFoundError, match='1 of 3 shards that nshards'):
        load_pairs(str(tmp_path), 'test')


def test_cocos_own_files_of_2017(tmp_path):
    photos(tmp_path / 'train2017', 40)
    for k in range(100, 110):
        (tmp_path / 'val2017').mkdir(exist_ok=True)
        (tmp_path / 'val2017' / f'{k}.jpg').write_bytes(jpeg((9, 9, 9), (16, 16)))
    (tmp_path / 'annotations').mkdir()
    for split, ks in (('train', range(40)), ('val', range(100, 110))):
        images = [dict(id=k, file_name=f'{k}.jpg') for k in ks]
        said = [dict(image_id=k, caption=text) for k in ks for text in told(f'{k}.jpg')]
        path = tmp_path / 'annotations' / f'captions_{split}2017.json'
        path.write_text(json.dumps(dict(images=images, annotations=said)))
        boxes = path.with_name(f'instances_{split}2017.json')
        boxes.write_text(json.dumps(dict(images=images, annotations=[dict(bbox=[1])])))
    sizes = [len(load_pairs(str(tmp_path), split)) for split in SPLITS]
    assert sizes[1] == 10
    assert sizes[0] + sizes[2] == 40
    with pytest.raises(FileNotFoundError, match=f"COCO's files of 2017: .* -p task {tmp_path}"):
        load_pairs('coco', 'test', root=tmp_path)


def test_a_known_task_whose_own_file_is_there_stays_that_task(tmp_path):
    photos(tmp_path / 'flickr30k-images')
    entries = [
        dict(split='test', filename=name, sentences=[dict(raw=text) for text in told(name)])
        for name in names()
    ]
    (tmp_path / 'dataset_flickr30k.json').write_text(json.dumps(dict(images=entries)))
    (tmp_path / 'runs').mkdir()
    rows = datasets.Dataset.from_dict(dict(score=[1.0]))
    rows.to_parquet(tmp_path / 'runs' / 'scores.parquet')
    rows.to_parquet(tmp_path / 'scores.parquet')
    assert len(load_pairs('flickr30k', 'test', root=tmp_path)) == N


@pytest.mark.parametrize(
    'make, why',
    [
        (lambda f: photos(f), '60 pictures and no captions: for retrieval put captions.csv'),
        (lambda f: [photos(f / c, 2) for c in 'ab'], 'one folder a class is for zero-shot'),
        (lambda f: (f / 'a.tar.gz').touch(), 'holds a.tar.gz: unpack it first'),
        (lambda f: (f / 'readme.md').touch(), 'holds no pictures and no captions'),
    ],
    ids=['pictures alone', 'classes', 'compressed', 'nothing'],
)
def test_what_is_no_set_of_pairs_is_named_for_what_it_is(make, why, tmp_path):
    make(tmp_path)
    with pytest.raises(ValueError, match=re.escape(why)):
        load_pairs(str(tmp_path), 'train')


def test_a_place_that_is_one_file_is_named_for_what_it_is(tmp_path):
    (tmp_path / 'a.tar.gz').touch()
    with pytest.raises(ValueError, match='is compressed: unpack it first'):
        load_pairs(str(tmp_path / 'a.tar.gz'), 'train')
    with pytest.raises(ValueError, match='is compressed'):
        stream_pairs(str(tmp_path / 'a.tar.gz'))
    (tmp_path / 'b.pdf').touch()
    with pytest.raises(ValueError, match='is no table of captions'):
        stream_pairs(str(tmp_path / 'b.pdf'))
    with pytest.raises(FileNotFoundError, match=r'nowhere/c\.csv does not exist'):
        load_pairs('nowhere/c.csv', 'train')


def test_a_table_says_which_line_or_picture_is_wrong(tmp_path):
    photos(tmp_path, 3)
    table = tmp_path / 'a.csv'
    table.write_text('image,caption\n0.jpg,a dog, running\n')
    with pytest.raises(ValueError, match='line 2 has more fields'):
        load_pairs(str(table), 'train')
    table.write_text('image,caption\nhttps://a.b/0.jpg,a dog\n')
    with pytest.raises(ValueError, match='names addresses and no files'):
        load_pairs(str(table), 'train')
    table.write_text('image,caption\n0.jpg,a dog\n7.jpg,a cat\n')
    with pytest.raises(FileNotFoundError, match=r'1 of 2 pictures are not in .*: 7\.jpg'):
        load_pairs(str(table), 'train')
    table.write_text('image,caption,split\n0.jpg,a dog,train\n0.jpg,a cat,test\n')
    with pytest.raises(ValueError, match='into two splits'):
        load_pairs(str(table), 'train')
    table.write_bytes('image,caption\n0.jpg,Bär\n'.encode('latin-1'))
    with pytest.raises(ValueError, match='no text in UTF-8'):
        load_pairs(str(table), 'train')
    (tmp_path / 'a.jsonl').write_text('{"image": "0.jpg", "caption": "a"}\n[1]\n')
    with pytest.raises(ValueError, match='line 2 is no JSON object'):
        load_pairs(str(tmp_path / 'a.jsonl'), 'train')


def test_a_table_is_read_in_quotes_with_marks_and_blanks(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text('\ufeffimage; caption\n"a b.jpg"; "one, two"\n', encoding='utf-8')
    assert read_rows(path) == [{'image': 'a b.jpg', 'caption': 'one, two'}]


def test_a_sample_with_dots_in_its_name_is_told_so(tmp_path):
    import tarfile

    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for k in range(3):
            add(tar, f'my.photo.{k}.jpg', jpeg((9, 9, 9), (16, 16)))
            add(tar, f'my.photo.{k}.txt', b'a')
    with pytest.raises(ValueError, match='the name of a sample ends at its first dot'):
        list(stream_pairs(str(tmp_path / 'a.tar'), epochs=1))


def test_imagenet_that_is_flat_or_a_part_is_named_for_what_it_is(tmp_path):
    (tmp_path / 'val').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'val' / 'ILSVRC2012_val_00000001.JPEG')
    with pytest.raises(FileNotFoundError, match='1 pictures and no class folders'):
        load_labelled('imagenet', 'validation', root=tmp_path)
    (tmp_path / 'val' / 'n01440764').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'val' / 'n01440764' / 'a.JPEG')
    with pytest.raises(ValueError, match='holds 1 class folders, and ImageNet has 1,000'):
        load_labelled('imagenet', 'validation', root=tmp_path)


def test_a_set_of_ones_own_has_a_name_of_its_own():
    places = {
        '/home/me/photos/': 'photos',
        '~/my photos': 'my-photos',
        'a/pets.csv': 'a-pets',
        'web/{0..9}.tar': 'web',
        'hf://me/art@v1': 'art',
        'x/coco': 'my-coco',
        'coco': 'coco',
        'openmoji': 'openmoji',
    }
    assert {place: name_of(place) for place in places} == places


def test_a_table_beside_it_is_no_damaged_tar(tmp_path):
    csv_of_repeated_rows(tmp_path / 'p')
    assert kind_of(tmp_path / 'p' / 'captions.csv') == 'table'
    assert next(iter(stream_pairs(str(tmp_path / 'p' / 'captions.csv'))))['captions']


def test_a_query_is_a_caption_that_its_picture_has():
    from mope_clip.report.figures import some_queries

    pairs = dict(captions=[['a'], ['b', 'c'], ['d', 'e', 'f'], 'g'])
    queries = some_queries(pairs)
    assert len(queries) == 6
    assert all(which < len(pairs['captions'][image]) for image, which in queries)


@pytest.mark.parametrize(
    'name', ['20_finetune', '52_where_it_matters', '54_gallery', '60_your_model']
)
def test_results_are_written_before_pictures_are_drawn(name):
    from mope_clip.report.templates import Template

    code = '\n'.join(Template(name).code)
    drawing = r'plot_retrieved\($|plot_answers\(|plot_found\(|\.imshow\('
    first = min(found.start() for found in re.finditer(drawing, code, re.MULTILINE))
    assert code.index('report.write()') < first


@pytest.mark.parametrize('spelling', ['{"image": "photo", "captions": "alt"}', 'a dict'])
def test_columns_are_a_parameter_of_a_notebook_in_any_spelling(spelling):
    from mope_clip.report.parameters import in_type

    mapping = dict(image='photo', captions='alt')
    value = in_type(mapping if spelling == 'a dict' else spelling, str)
    assert json.loads(value) == mapping


@pytest.fixture
def asked(tmp_path):
    "A folder of photos whose columns have to be named, a small model, and the options for both"
    from mope_clip.clip import tiny_clip

    tiny_clip().save(tmp_path / 'tiny')
    photos(tmp_path / 'pics')
    write_csv(tmp_path / 'pics' / 'x.csv', repeated('where', 'alt'))
    columns = json.dumps(dict(image='where', captions='alt'))
    return tmp_path, ['--task', tmp_path / 'pics', '--columns', columns]


def test_commands_take_a_folder_and_its_columns(asked, capsys):
    from mope_clip.cli import main

    folder, data = asked
    tiny = folder / 'tiny'
    scores = ['--metric', 'taylor', '--out', folder / 'scores.parquet']
    assert main(['score', tiny, *data, *scores]) == 0, capsys.readouterr().err
    assert main(['evaluate', tiny, *data, '--split', 'test']) == 0
    assert 'retrieval pics test: ' in capsys.readouterr().out
    training = ['--teacher', tiny, '--pairs-seen', '16', '--batch', '8', '--out', folder / 'out']
    assert main(['distill', tiny, *data, *training]) == 0, capsys.readouterr().err
    assert main(['repair', tiny, *data, '--teacher', tiny, '--out', folder / 'mended']) == 0


def test_commands_leave_out_what_cannot_be_read_where_they_are_asked_to(asked, capsys):
    from mope_clip.cli import main

    folder, data = asked
    for name in names():
        (folder / 'pics' / name).write_bytes(
            jpeg((9, 9, 9), (16, 16))[: 90 if name == '3.jpg' else None]
        )
    words = ['evaluate', folder / 'tiny', *data, '--split', 'train']
    assert main(words) == 1
    assert '3.jpg' in capsys.readouterr().err
    assert main([*words, '--skip-unreadable']) == 0


def test_a_place_given_to_a_run_is_meant_from_where_it_is_given(tmp_path, monkeypatch):
    from mope_clip.cli.notebooks import from_here

    (tmp_path / 'photos').mkdir()
    (tmp_path / 'coco').mkdir()
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path / 'photos')
    assert from_here('task', 'photos') == from_here('task', './photos/') == here
    assert from_here('tasks', ['photos', 'openmoji']) == [here, 'openmoji']
    same = [('task', 'coco'), ('task', 'hf://me/art'), ('model', 'ViT-B-32'), ('z', 'photos')]
    assert all(from_here(name, value) == value for name, value in same)
    (tmp_path / 'imagenet').mkdir()
    assert from_here('labelled_sets', ['photos', 'imagenet', 'gone']) == [here, 'imagenet', 'gone']
    for pattern in ('photos/*.tar', 'photos/{000..003}.tar', '{0..3}.tar'):
        assert from_here('corpora', [pattern]) == [str(tmp_path / pattern)]
    assert from_here('corpora', ['gone/{0..3}.tar']) == ['gone/{0..3}.tar']
    assert from_here('models', 'kept') == str(tmp_path / 'kept'), 'it will be made there'


def test_a_comparison_knows_the_columns_of_its_set():
    from mope_clip.report.comparison import Comparison, Material

    assert Material(Comparison()).data == dict(root=None)
    columns = '{"image": "photo"}'
    assert Material(Comparison(columns=columns)).data == dict(root=None, columns=columns)


def test_a_comparison_leaves_out_broken_pictures_where_it_is_told_to(tmp_path):
    from mope_clip.data import synth_pairs
    from mope_clip.report.comparison import Comparison, Material
    from mope_clip.report.templates import Template

    lines = ['image,caption,split']
    for k, pair in enumerate(synth_pairs(12)):
        pair['image'].save(tmp_path / f'{k}.png')
        lines.append(f'{k}.png,{pair["captions"][0]},{"test" if k < 6 else "train"}')
    (tmp_path / '2.png').write_bytes((tmp_path / '2.png').read_bytes()[:60])
    (tmp_path / 'captions.csv').write_text('\n'.join(lines), encoding='utf-8')
    given = dict(task=str(tmp_path), images_evaluated=6)
    with pytest.raises(ValueError, match='skip_unreadable'):
        Material(Comparison(**given)).tested()
    patient = Material(Comparison(**given, skip_unreadable=True))
    assert len(patient.tested()) == 5
    assert patient.train_pairs().max_broken == 1.0
    for name in ('20_finetune', '30_pretrain', '54_gallery', '60_your_model'):
        assert 'skip_unreadable' in Template(name).parameters, 'what the message advises is there'


def test_the_error_of_a_recall_of_100_is_zero_whatever_the_number_of_captions(monkeypatch):
    import torch

    from mope_clip.clip import tiny_clip
    from mope_clip.data import synth_pairs
    from mope_clip.report import results

    pairs = synth_pairs(6)
    pairs = pairs.map(lambda row, k: dict(captions=[f'{k}'] * (1 + k % 3)), with_indices=True)
    monkeypatch.setattr(results, 'encode_images', lambda clip, images: torch.eye(6))
    texts = torch.eye(6)[[int(text) for own in pairs['captions'] for text in own]]
    monkeypatch.setattr(results, 'encode_captions', lambda clip, captions: texts)
    measured = results.recall_rows(tiny_clip(), pairs)
    assert (measured.value == 100).all()
    assert measured.se.max() < 1e-4


@pytest.mark.parametrize('command', ['score', 'evaluate', 'distill', 'repair', 'search'])
def test_what_is_missing_on_disk_is_said_before_a_hub_is_asked(command, capsys, monkeypatch):
    from mope_clip.cli import main

    monkeypatch.setattr('mope_clip.clip.load_clip', lambda *a: pytest.fail('a hub was asked'))
    budget = ['--scores', 'none', '--macs', '0.5'] if command == 'search' else []
    where = ['--task', 'coco', '--data-root', '/no/such']
    assert main([command, 'hf-hub:owner/name', *where, *budget]) == 1
    assert 'coco needs its files, and /no/such does not exist' in capsys.readouterr().err


def test_a_cut_checkpoint_is_named_before_a_hub_is_asked(tmp_path, monkeypatch):
    import torch

    from mope_clip.clip import load_clip

    torch.save(dict(a=torch.zeros(999)), tmp_path / 'whole.pt')
    cut_file = tmp_path / 'cut.pt'
    cut_file.write_bytes((tmp_path / 'whole.pt').read_bytes()[:2000])
    monkeypatch.setattr('mope_clip.clip.load.build_clip', lambda *a: pytest.fail('built'))
    with pytest.raises(ValueError, match=r'cut\.pt cannot be read: it is damaged, truncated'):
        load_clip('xlm-roberta-base-ViT-B-32', str(cut_file))


def test_shards_in_a_folder_with_signs_in_its_name_are_a_pattern(tmp_path):
    folder = tmp_path / 'my [2019] {web}'
    shards(folder)
    for pattern in ('*.tar', '{00000..00003}.tar'):
        assert len(list(stream_pairs(f'{folder}/{pattern}', epochs=1))) == N
    assert len(list(stream_pairs(f'{folder}/00000.tar', epochs=1))) == N // 4


@pytest.mark.parametrize('kind', ['float16', 'bfloat16'])
def test_models_in_half_precision_are_scored_and_named_where_they_cannot_learn(kind):
    import torch

    from mope_clip.clip import prune, tiny_clip
    from mope_clip.data import synth_pairs
    from mope_clip.distill import distill
    from mope_clip.metrics import random_scores, taylor
    from mope_clip.pruners import plan_width, repair

    half, whole, pairs = tiny_clip(), tiny_clip(), synth_pairs(12, 'train')
    half.model.to(getattr(torch, kind))
    spec = plan_width(random_scores(half), keep=0.5)
    assert len(taylor(half, synth_pairs(6)))
    repair(prune(half, spec), half, pairs, images=12)
    cure = r"clip\.save\(folder, precision='fp32'\)"
    with pytest.raises(ValueError, match=f'The teacher is in half precision.*{cure}'):
        distill(prune(whole, spec), half, pairs, pairs_seen=8, batch=4)
    with pytest.raises(ValueError, match=f'The student is in half precision.*{cure}'):
        distill(prune(half, spec), whole, pairs, pairs_seen=8, batch=4)
    with pytest.raises(ValueError, match=f'bring both to one type.*{cure}'):
        repair(prune(whole, spec), half, pairs)
