"The table of families belongs to the installed open_clip, and says what is the case."

import open_clip
import pandas as pd
import pytest
from families_table import COLUMNS, TABLE, family, row, tags

TOLD = pd.read_csv(TABLE, dtype=str, keep_default_na=False)
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
    assert (TOLD.load == 'yes').all() and (TOLD.save == 'yes').all()
    for tower in ('vision', 'text'):
        some = TOLD[~TOLD[tower].str.startswith('heads, neurons, layers')]
        assert some[tower].str.contains('nothing can be removed|normalises across all').all()


@pytest.mark.parametrize('kind', FIRST)
def test_a_tag_of_each_family_is_as_the_table_says(kind):
    name, tag = FIRST[kind]
    told = TOLD[(TOLD.model == name) & (TOLD.tag == tag)].iloc[0]
    found = {key: str(value) for key, value in row(name, tag, export=False).items()}
    for column in set(found) - {'gmacs'}:
        assert found[column] == told[column], column
    if 'gmacs' in found:
        assert float(found['gmacs']) == pytest.approx(float(told.gmacs))
