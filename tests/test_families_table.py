"The table of families belongs to the installed open_clip, and says what is the case."

import open_clip
import pandas as pd
import pytest
from families_table import COLUMNS, OF_THE_NEXT, STAND_IN, TABLE, family, row, row_of_next, tags

ALL = pd.read_csv(TABLE, dtype=str, keep_default_na=False)
NEXT, TOLD = ALL[ALL.open_clip == STAND_IN], ALL[ALL.open_clip != STAND_IN]
FIRST = {}  # family -> its first tag
for name, tag in tags():
    FIRST.setdefault(family(name), (name, tag))


def test_the_table_is_of_this_open_clip_and_has_every_tag_once():
    assert set(TOLD.open_clip) == {open_clip.__version__}, 'run make families'
    assert list(TOLD.columns) == COLUMNS
    assert list(zip(TOLD.model, TOLD.tag, strict=True)) == tags()


def test_most_tags_are_whole_and_none_is_without_a_word():
    assert (TOLD.whole == 'yes').sum() >= 115
    assert not (TOLD.whole == 'no').any()
    for step in ('load', 'save', 'export'):
        assert (TOLD[step] == 'yes').all()
    refused = TOLD[TOLD.repair != 'yes']
    assert refused.repair.str.endswith('this model cannot be repaired.').all()
    assert set(refused.whole) == {'all but repair'}
    for tower in ('vision', 'text'):
        some = TOLD[~TOLD[tower].str.startswith('heads, neurons, layers')]
        assert some[tower].str.contains('nothing can be removed|normalises across all').all()


def check_row(told, found):
    "Whether a line of the table is what was found"
    found = {key: str(value) for key, value in found.items()}
    for column in set(found) - {'gmacs'}:
        assert found[column] == told[column], column
    if 'gmacs' in found:
        assert float(found['gmacs']) == pytest.approx(float(told.gmacs))


@pytest.mark.parametrize('kind', FIRST)
def test_a_tag_of_each_family_is_as_the_table_says(kind):
    name, tag = FIRST[kind]
    told = TOLD[(TOLD.model == name) & (TOLD.tag == tag)].iloc[0]
    check_row(told, row(name, tag, export=False))


def test_the_table_says_that_the_next_open_clip_is_a_stand_in():
    assert list(zip(NEXT.model, NEXT.tag, strict=True)) == list(OF_THE_NEXT)
    assert (NEXT[['whole', 'load', 'repair', 'save', 'export']] == 'yes').all(axis=None)
    name, tag = OF_THE_NEXT[0]
    check_row(NEXT.iloc[0], row_of_next(name, tag, export=False))


def test_the_lead_of_the_readme_counts_what_the_table_counts():
    page = (TABLE.parent.parent / 'README.md').read_text(encoding='utf-8')
    once = TOLD.assign(model=TOLD.model.str.removesuffix('-quickgelu'))
    once = once.drop_duplicates(['model', 'tag'])  # the same weights under two names
    whole = (once.whole == 'yes').sum()
    assert f'[{whole} of the {len(once)} pretrained ones](data/families.csv)' in page
