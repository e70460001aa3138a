"Whatever a reader is fed ends as an error in one sentence: a bounded fuzz of all of them."

import copy
import json
import os
import shutil

import pytest
import torch
from conftest import uneven_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from samples import jpeg, write_shard

from mope_clip.clip import load_clip, read_spec, save_open_clip, save_spec, tiny_clip
from mope_clip.clip.folders import seal

FINE = ValueError, FileNotFoundError, OSError
BOUNDED = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)

ODD = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    13142,
    2**40,
    10**30,
    0.5,
    -0.0,
    float('nan'),
    float('inf'),
    '',
    'x',
    '\x00',
    '\ud800',
    '../..',
    'local-dir:/tmp',
    [],
    [3],
    [None],
    [[]],
    {},
    {'a': 1},
    {'0': None},
]


def places_in(value, here=()):
    "The path of every value in a document of JSON"
    yield here
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value[:3]) if isinstance(value, list) else items
    for key, inner in items:
        yield from places_in(inner, (*here, key))


def changed(document, place, what):
    "A copy with another value at a place, or without it ('gone'), or with one key more ('more')"
    made = copy.deepcopy(document)
    if not place:
        return made if what in ('gone', 'more') else what
    parent = made
    for key in place[:-1]:
        parent = parent[key]
    if what == 'gone':
        del parent[place[-1]]
    elif what == 'more' and isinstance(parent, dict):
        parent['odd'] = 1
    else:
        parent[place[-1]] = what
    return made


def documents(document):
    "Documents of JSON with one or two damages"
    places = list(places_in(document))
    damage = st.tuples(st.sampled_from(places), st.sampled_from([*ODD, 'gone', 'more']))

    def damaged(damages):
        made = document
        for place, what in damages:
            try:
                made = changed(made, place, what)
            except (KeyError, IndexError, TypeError):
                pass  # the first damage took the place of the second
        return json.dumps(made).encode()

    return st.lists(damage, min_size=1, max_size=2).map(damaged)


def torn(content):
    "Files that were cut, or in which some bytes are others"
    cut = st.integers(0, len(content)).map(lambda n: content[:n])
    place = st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255))

    def flipped(places):
        made = bytearray(content)
        for k, byte in places:
            made[k] = byte
        return bytes(made)

    return st.one_of(cut, st.lists(place, min_size=1, max_size=4).map(flipped))


def files(content):
    "A file of JSON, damaged as a document or as bytes"
    return st.one_of(documents(json.loads(content)), torn(content))


def ends_well(read):
    "Whether a reader reads, or says in one sentence why not"
    try:
        read()
    except FINE as e:
        assert len(str(e).strip().splitlines()) == 1, str(e)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('fuzz')


@pytest.fixture(scope='module')
def ours(place):
    uneven_tiny().save(place / 'ours')
    return place / 'ours'


@pytest.fixture(scope='module')
def open_clips(place):
    save_open_clip(tiny_clip(), place / 'open_clip', torch.float32)
    return place / 'open_clip'


@pytest.fixture(scope='module')
def hugging(place):
    from transformers import CLIPConfig, CLIPModel

    towers = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    text = dict(vocab_size=12, max_position_embeddings=12, eos_token_id=11, **towers)
    vision = dict(image_size=32, patch_size=8, **towers)
    config = CLIPConfig(projection_dim=16, text_config=text, vision_config=vision)
    CLIPModel(config).save_pretrained(place / 'hf')
    tiny_clip().tokenizer.save_pretrained(place / 'hf')
    prepared = dict(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    (place / 'hf' / 'preprocessor_config.json').write_text(json.dumps(prepared), encoding='utf-8')
    load_clip(place / 'hf')
    return place / 'hf'


def fuzzed(file, read, seal_it=False):
    "Damage a file again and again, and read; it is put back in the end"
    whole = file.read_bytes()

    @BOUNDED
    @given(files(whole))
    def damage(content):
        file.write_bytes(content)
        if seal_it:
            try:
                seal(file.parent)  # as if somebody vouched for it
            except (ValueError, AttributeError):
                pass
        ends_well(read)

    try:
        damage()
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize('name', ['config.json', 'tokenizer.json', 'tokenizer_config.json'])
def test_a_folder_of_ours(ours, name):
    fuzzed(ours / name, lambda: load_clip(ours))
    load_clip(ours)


def test_a_folder_of_ours_that_was_edited_and_sealed(ours):
    fuzzed(ours / 'config.json', lambda: load_clip(ours), seal_it=True)


@pytest.mark.parametrize('name', ['tokenizer.json', 'open_clip_config.json'])
def test_a_folder_of_open_clip(open_clips, name):
    fuzzed(open_clips / name, lambda: load_clip(open_clips))
    load_clip(open_clips)


@pytest.mark.parametrize('name', ['config.json', 'preprocessor_config.json'])
def test_a_folder_of_hugging_face(hugging, name):
    fuzzed(hugging / name, lambda: load_clip(hugging))
    load_clip(hugging)


@pytest.mark.parametrize('which', ['ours', 'open_clips', 'hugging'])
def test_files_of_weights(which, request):
    folder = request.getfixturevalue(which)
    (file,) = folder.glob('*.safetensors')
    whole = file.read_bytes()

    @BOUNDED
    @given(torn(whole[:2000]))
    def damage(start):
        file.write_bytes(start + whole[2000:])
        ends_well(lambda: load_clip(folder))

    try:
        damage()
    finally:
        file.write_bytes(whole)


def test_pickled_weights(place):
    from mope_clip.clip.weights import read_weights

    torch.save(tiny_clip().model.state_dict(), place / 'w.pt')
    whole = (place / 'w.pt').read_bytes()

    @BOUNDED
    @given(torn(whole))
    def damage(content):
        (place / 'w.pt').write_bytes(content)
        ends_well(lambda: read_weights(place / 'w.pt'))

    damage()


def test_an_index_of_weights(place):
    from mope_clip.clip.weights import read_weights

    folder = place / 'index'
    folder.mkdir()
    file = folder / 'model.safetensors.index.json'
    file.write_text(json.dumps(dict(metadata={}, weight_map=dict(a='1.bin'))), encoding='utf-8')
    fuzzed(file, lambda: read_weights(folder))


def test_specifications(place):
    file = place / 'spec.json'
    save_spec(uneven_tiny().spec, file)
    fuzzed(file, lambda: read_spec(file))
    read_spec(file)


def test_tables_of_scores(place):
    import numpy as np

    from mope_clip.metrics import random_scores
    from mope_clip.metrics.checked import read_table
    from mope_clip.pruners import plan_depth, plan_width

    table = random_scores(tiny_clip())
    table.to_parquet(place / 'scores.parquet')
    whole = (place / 'scores.parquet').read_bytes()
    odd = [None, np.nan, np.inf, 'x', -1, 99, 2**40, [], [None], {}]

    def planned(rows):
        rows.attrs = table.attrs
        plan_width(rows, 0.5)
        plan_depth(rows, 0.5)

    @BOUNDED
    @given(torn(whole))
    def bytes_changed(content):
        (place / 'scores.parquet').write_bytes(content)
        ends_well(lambda: plan_width(read_table(place / 'scores.parquet'), 0.5))

    @BOUNDED
    @given(st.sampled_from(list(table)), st.integers(0, len(table) - 1), st.sampled_from(odd))
    def cell_changed(column, row, value):
        rows = table.copy()
        rows[column] = rows[column].astype(object)
        rows.at[row, column] = value
        ends_well(lambda: planned(rows.infer_objects()))
        ends_well(lambda: planned(table.drop(columns=column)))

    bytes_changed()
    cell_changed()


def test_karpathy_files(place):
    from mope_clip.data import load_pairs

    (place / 'coco' / 'val2014').mkdir(parents=True)
    (place / 'coco' / 'val2014' / '1.jpg').write_bytes(jpeg('red'))
    row = dict(split='test', filename='1.jpg', filepath='val2014', cocoid=1)
    row['sentences'] = [dict(raw='a dog'), dict(raw='a brown dog')]
    file = place / 'coco' / 'dataset_coco.json'
    file.write_text(json.dumps(dict(images=[row], dataset='coco')), encoding='utf-8')
    fuzzed(file, lambda: load_pairs('coco', 'test', root=place / 'coco'))


def test_mappings_of_columns(place):
    from datasets import Dataset

    from mope_clip.data import load_pairs
    from mope_clip.data.files import as_pairs, png

    folder = place / 'table'
    folder.mkdir()
    pairs = as_pairs([png(Image.new('RGB', (9, 9)))], [['a dog']], ['1'], 'test')
    assert isinstance(pairs, Dataset)
    pairs.to_parquet(folder / 'test.parquet')
    columns = dict(image='image', captions='captions', image_id='image_id')

    @settings(BOUNDED, max_examples=15)
    @given(st.one_of(documents(columns), torn(json.dumps(columns).encode())))
    def damage(content):
        text = content.decode('utf-8', 'replace')
        ends_well(lambda: load_pairs(str(folder), 'test', columns=text))

    damage()


def test_shards(place):
    from mope_clip.data import stream_pairs

    file = write_shard(place / 'shards' / '0.tar', range(3))
    whole = file.read_bytes()

    @BOUNDED
    @given(torn(whole))
    def damage(content):
        file.write_bytes(content)
        ends_well(lambda: list(stream_pairs(str(file.parent), epochs=1, max_broken=1.0)))

    damage()


def test_pictures():
    from mope_clip.data.pictures import unreadable

    @BOUNDED
    @given(torn(jpeg()))
    def damage(content):
        assert isinstance(unreadable(content), str)

    damage()


@pytest.mark.parametrize(
    'text',
    ['', '{', '- 1', '3', 'null', 'smoke: 3', 'rules: 3', 'rules: {a: 3}', 'claims: [1]', 'a: *b'],
)
def test_yaml_files_of_templates(toy_repo, text):
    from toy import code, prose, write_notebook

    from mope_clip.report.templates import Template

    write_notebook(toy_repo / 'nbs' / '20_toy.ipynb', prose('# Toy'), code('x: int = 1'))
    (toy_repo / 'nbs' / '20_toy.yaml').write_text(text, encoding='utf-8')
    for ask in (
        lambda: Template('20_toy').rules,
        lambda: Template('20_toy').claims,
        lambda: Template('20_toy').scale('smoke'),
        lambda: Template('20_toy').scales,
    ):
        ends_well(ask)


@pytest.mark.parametrize('text', ['', '{', '- 1', '3: 4', 'a: {b: c}', '1: {claim: x}'])
def test_the_file_of_claims(toy_repo, text):
    from mope_clip.report.readme import paper_claims

    (toy_repo / 'nbs' / 'claims.yaml').write_text(text, encoding='utf-8')
    ends_well(paper_claims)


@pytest.mark.parametrize('name', [b'\xff\xfe', b'caf\xe9'])
def test_names_that_are_no_text_are_said(tmp_path, name):
    from mope_clip.data import load_labelled

    for folder in (b'good', name):
        inside = os.path.join(os.fsencode(tmp_path / 'test'), folder)
        os.makedirs(inside)
        with open(os.path.join(inside, b'1.jpg'), 'wb') as file:
            file.write(jpeg('red'))
    with pytest.raises(ValueError, match='names that are no text'):
        load_labelled(str(tmp_path), 'test')
    shutil.rmtree(os.fsencode(tmp_path))


@pytest.mark.parametrize('steps', [0, -1, 0.5, None, True])
def test_a_checkpoint_every_nothing_is_refused(steps):
    from mope_clip.distill.run import RunOptions

    with pytest.raises(ValueError, match='checkpoint_every is a number of steps'):
        RunOptions(checkpoint_every=steps)


@pytest.mark.parametrize('batch', [0, -1, 1.5, None, True])
def test_a_batch_of_nothing_is_refused(batch):
    from mope_clip.data import synth_pairs
    from mope_clip.evaluate import retrieval, zero_shot

    with pytest.raises(ValueError, match='batch is a number of items'):
        retrieval(tiny_clip(), synth_pairs(2), batch=batch)
    with pytest.raises(ValueError, match='no labels'):
        zero_shot(tiny_clip(), synth_pairs(2))
