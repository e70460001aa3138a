"The house: parts in order, imports one way, open_clip's names in one part, pages in one form."

import ast
import json
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run

PARTS = 'data', 'clip', 'evaluate', 'metrics', 'pruners', 'distill', 'report', 'cli'
PUBLIC = dict(
    data='load_pairs stream_pairs load_labelled scene synth_pairs',
    clip='load_clip PruneSpec prune tiny_clip whole_spec Clip',
    evaluate='retrieval zero_shot cost',
    metrics='mope mope_plain magnitude taylor random_scores fisher activation unimodal every_other',
    pruners='plan_width plan_depth plan search repair prune',
    distill='distill train learned_masks',
    report='Report',
)
# names of attributes of open_clip, timm and Hugging Face, which the port hides
FOREIGN = re.compile(
    r'\b(resblocks|c_fc|c_proj|out_proj|in_proj_weight|in_proj_bias|ln_1|ln_2|ln_attn|conv1|'
    r'token_embedding|text_projection|trunk|norm1|norm2)\b|\.visual\b'
)


def rooms() -> dict:
    "Name of each room -> its source"
    found = {}
    for path in sorted((ROOT / 'mope_clip').rglob('*.py')):
        name = '.'.join(path.relative_to(ROOT / 'mope_clip').with_suffix('').parts)
        if name not in ('__init__', '_modidx'):
            found[name] = path.read_text(encoding='utf-8')
    return found


def imports_of(name: str, source: str):
    "(room, name) of everything that a room imports from this library, lazily or not"
    package = name.split('.')[:-1]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        module = '.'.join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            yield module, alias.name


@pytest.mark.parametrize('name, source', rooms().items(), ids=list(rooms()))
def test_a_room_imports_only_from_parts_to_its_left(name, source):
    mine = PARTS.index(name.split('.')[0])
    for module, imported in imports_of(name, source):
        part = module.split('.')[0]
        assert PARTS.index(part) <= mine, f'{name} imports {imported} from {module}'
        assert not imported.startswith('_'), f'{name} imports {imported} from {module}'


@pytest.mark.parametrize('name, source', rooms().items(), ids=list(rooms()))
def test_names_of_open_clip_live_in_clip_alone(name, source):
    if name.split('.')[0] == 'clip':
        return
    found = FOREIGN.findall(source)
    assert not FOREIGN.search(source), f'{name} names {found[:3]}: use the port of clip.blocks'


@pytest.mark.parametrize('name, source', rooms().items(), ids=list(rooms()))
def test_a_room_holds_one_idea(name, source):
    assert len(source.splitlines()) <= 450, f'{name} is long: it holds two ideas'


def test_public_names_are_importable_and_stay_functions():
    "Also after the room of the same name was imported, in a new process"
    lines = []
    for part, names in PUBLIC.items():
        lines.append(f'from mope_clip.{part} import {", ".join(names.split())}')
        lines.append(f'import mope_clip.{part}')
    lines += [
        'import mope_clip.metrics.mope, mope_clip.pruners.plan, mope_clip.evaluate.zero_shot',
        'import mope_clip.pruners.repair, mope_clip.pruners.search',
        'for f in (mope_clip.metrics.mope, mope_clip.pruners.plan, mope_clip.evaluate.zero_shot):',
        '    assert callable(f), f',
        'assert callable(mope_clip.pruners.repair) and callable(mope_clip.pruners.search)',
    ]
    r = run(sys.executable, '-W', 'ignore', '-c', '\n'.join(lines))
    assert r.returncode == 0, r.stderr[-2000:]


def test_formatted_and_checked():
    for command in (['format', '--check'], ['check']):
        r = run(sys.executable, '-m', 'ruff', *command, '.', timeout=120)
        assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-500:]


LESSONS = sorted(p for p in (ROOT / 'nbs').glob('0*.ipynb'))


@pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)
def test_a_lesson_says_what_it_teaches(path: Path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    first = next(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    assert first.startswith('# ') and '\n> ' in first
    for word in ('**Learn**', '**Time**', '**Needs**', '**Next**'):
        assert word in first, f'{path.name} does not say {word}'


NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_notebooks_lead_somewhere(path: Path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(cell['source']) for cell in cells)
    for link in re.findall(r'\]\(([\w./-]+\.(?:ipynb|md|svg))\)', text):
        assert (path.parent / link).is_file(), f'{path.name} links to {link}'


@pytest.mark.parametrize('name', ['README.md', 'CONTRIBUTING.md', 'data/README.md'])
def test_pages_of_the_repository_link_to_what_is_there(name):
    page = ROOT / name
    for link in re.findall(r'\]\(([\w.~-]*[./][\w./-]*)\)', page.read_text(encoding='utf-8')):
        assert (page.parent / link).exists(), f'{name} links to {link}'
