"Notebooks are the source of truth: the library, the README and the indexes are what they say."

import json
import re
import shutil
import sys

import pytest
from conftest import ROOT, run

NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))


def test_library_is_what_the_notebooks_export(tmp_path):
    for name in ('nbs', 'mope_clip'):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'),
        )
    for name in ('settings.ini', 'setup.py', 'pyproject.toml'):
        shutil.copy(ROOT / name, tmp_path / name)
    for p in (tmp_path / 'mope_clip').rglob('*.py'):
        if p != tmp_path / 'mope_clip' / '__init__.py':
            p.unlink()  # so that a module without a notebook is noticed
    r = run(sys.executable, '-c', 'import nbdev; nbdev.nbdev_export()', cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-2000:]
    here, there = (
        {p.relative_to(d / 'mope_clip') for p in (d / 'mope_clip').rglob('*.py')}
        for d in (ROOT, tmp_path)
    )
    assert here == there
    for name in here:
        assert (ROOT / 'mope_clip' / name).read_text(encoding='utf-8') == (
            tmp_path / 'mope_clip' / name
        ).read_text(encoding='utf-8'), f'{name} is not what its notebook exports: run nbdev_export'


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    ids = [c.get('id') for c in nb['cells']]
    assert all(ids) and len(set(ids)) == len(ids), 'every cell needs an id of its own'
    assert not re.search(
        r'(?<![\w.])/(?:work|tmp|home|root|Users|mnt)/', path.read_text(encoding='utf-8')
    ), 'an absolute path of one machine'
    assert sum(len(json.dumps(c.get('outputs', []))) for c in nb['cells']) < 50_000 + 200_000 * (
        path.stem == 'index'
    ), 'outputs are too large'


def test_readme_and_report_index_are_generated():
    from mope_clip.report import write_index, write_page
    from mope_clip.report.readme import write_readme

    write_readme(check=True)
    write_index(check=True)
    write_page(check=True)


def test_conda_environment_has_the_same_pins():
    pins = [
        line
        for line in (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines()
        if line and not line.startswith('#')
    ]
    import yaml

    env = yaml.safe_load((ROOT / 'environment.yml').read_text(encoding='utf-8'))['dependencies']
    assert env[-1]['pip'] == [*pins, '-e .[all]']
