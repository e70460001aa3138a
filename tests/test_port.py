"What open_clip calls the attributes of its models is known in one part of the library alone."

import re

import pytest
from conftest import ROOT

NAMES = re.compile(
    r'\b(resblocks|c_fc|c_proj|out_proj|in_proj\w*|ln_1|ln_2|ln_attn|conv1|token_embedding'
    r'|text_projection)\b'
    r'|\.visual\b'
    r'|\battn_mask\b(?!=)'  # blocks take it as a keyword
)
LIBRARY = ROOT / 'mope_clip'
ROOMS = sorted(
    str(path.relative_to(LIBRARY))
    for path in LIBRARY.rglob('*.py')
    if path.name != '_modidx.py' and path.parent.name != 'clip'
)
# rooms that still name an attribute: none may join them
LEFT = {'distill/loop.py', 'distill/shard.py', 'report/pictures.py'}


@pytest.mark.parametrize('room', [room for room in ROOMS if room not in LEFT])
def test_a_room_outside_clip_names_no_attribute_of_open_clip(room):
    text = (LIBRARY / room).read_text(encoding='utf-8')
    found = [line.strip() for line in text.splitlines() if NAMES.search(line)]
    assert not found, 'ask the blocks and towers of mope_clip.clip instead'


def test_the_names_are_recognised():
    for line in ('b.mlp.c_fc.weight', 'a.in_proj_weight', 'clip.model.visual', 'net.attn_mask'):
        assert NAMES.search(line), line
    for line in ('block(x, attn_mask=mask)', 'text_params_no_embedding', 'the visual search'):
        assert not NAMES.search(line), line
