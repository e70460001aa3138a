"Notebooks as a reader runs them: in JupyterLab, by Run All Cells, in a real browser."

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT
from test_page import browser

pytest.importorskip('jupyterlab', reason="JupyterLab is missing: pip install 'mope_clip[dev]'")
__all__ = ['browser']  # a fixture
TOKEN = 'a-token-of-the-test'
SHORT = dict(images_scored=8, images_evaluated=12, groups=2, pairs_width=16, pairs_depth=16)


@pytest.fixture(scope='module')
def clone(tmp_path_factory):
    "A clone in a folder whose name has a space and a letter beyond ASCII"
    root = tmp_path_factory.mktemp('lab') / 'my prüfung' / 'clone'
    shutil.copytree(ROOT / 'nbs', root / 'nbs')
    shutil.copytree(ROOT / 'mope_clip', root / 'mope_clip')
    shutil.copy(ROOT / 'settings.ini', root)
    (root / 'pyproject.toml').touch()
    (root / 'data').symlink_to(ROOT / 'data')
    return root


@pytest.fixture(scope='module')
def lab(clone):
    "JupyterLab on the loopback, started in a folder far above the notebooks"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    at = clone.parents[1]
    unwanted = 'IN_TEST', 'MOPE_CLIP_DATA', 'MOPE_CLIP_PROGRESS', 'PYTHONWARNINGS'
    env = {name: value for name, value in os.environ.items() if name not in unwanted}
    env |= dict(PYTHONPATH=str(clone), OMP_NUM_THREADS='1')
    for name in ('CONFIG_DIR', 'DATA_DIR', 'RUNTIME_DIR'):
        env[f'JUPYTER_{name}'] = str(at / name)
    options = [f'--port={port}', '--ip=127.0.0.1', '--no-browser', '--ServerApp.port_retries=0']
    options += [f'--IdentityProvider.token={TOKEN}', '--allow-root']
    options += ['--LabApp.news_url=None']  # nothing is asked of the network
    options += ['--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with open(at / 'lab.log', 'wb') as log:
        server = subprocess.Popen(
            [sys.executable, '-m', 'jupyterlab', *options], cwd=at, env=env, stdout=log, stderr=log
        )
    place = SimpleNamespace(url=f'http://127.0.0.1:{port}', root=at, clone=clone)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f'{place.url}/api?token={TOKEN}').close()
                break
            except OSError:
                assert server.poll() is None, (at / 'lab.log').read_text()
                time.sleep(0.1)
        yield place
    finally:
        server.terminate()
        server.wait(20)


class Open:
    "A notebook that is open in JupyterLab"

    def __init__(self, lab, browser, name):
        self.lab, self.said, self.name = lab, [], name
        self.path = lab.clone / 'nbs' / f'{name}.ipynb'
        self.page = browser.new_page(viewport=dict(width=1300, height=900))
        self.page.on('pageerror', lambda e: self.said.append(str(e)))
        inside = self.path.relative_to(lab.root).as_posix()
        self.page.goto(f'{lab.url}/lab/tree/{inside}?token={TOKEN}&reset')
        self.page.wait_for_selector('.jp-Notebook .jp-Cell')
        self.until(lambda: self.state() == 'idle')

    def state(self):
        "Of the kernel: 'idle', 'busy', 'starting'; None where there is none yet"
        with urllib.request.urlopen(f'{self.lab.url}/api/sessions?token={TOKEN}') as found:
            mine = [s for s in json.load(found) if s['name'] == self.path.name]
        return mine[0]['kernel']['execution_state'] if mine else None

    def until(self, holds, seconds=240):
        for _ in range(5 * seconds):
            if holds():
                return
            self.page.wait_for_timeout(200)
        raise AssertionError(f'{self.name}: {seconds} seconds have passed')

    def run_all(self):
        "By the menu, as a reader does"
        self.page.get_by_role('menuitem', name='Run', exact=True).click()
        self.page.get_by_role('menuitem', name='Run All Cells', exact=True).click()
        self.until(lambda: self.state() == 'busy')

    def finished(self):
        "The code cells of the notebook as it is saved after the last one has ended"
        states = []

        def is_still():
            states.append(self.state())
            return states[-4:] == ['idle'] * 4

        self.until(is_still)
        before = self.path.stat().st_mtime_ns
        self.page.keyboard.press('Control+s')
        self.until(lambda: self.path.stat().st_mtime_ns != before, 20)
        cells = json.loads(self.path.read_text(encoding='utf-8'))['cells']
        return [cell for cell in cells if cell['cell_type'] == 'code']

    def close(self):
        "Leave the page, and the memory of its kernel"
        with urllib.request.urlopen(f'{self.lab.url}/api/sessions?token={TOKEN}') as found:
            for session in json.load(found):
                url = f'{self.lab.url}/api/sessions/{session["id"]}?token={TOKEN}'
                urllib.request.urlopen(urllib.request.Request(url, method='DELETE')).close()
        self.page.close()


def check(cells):
    "Everything was run, and nothing shown is an error, a warning or what is left of a bar"
    for cell in cells:
        source = ''.join(cell['source'])
        assert cell['execution_count'], source
        for output in cell['outputs']:
            assert output['output_type'] != 'error', output
            assert output.get('name') != 'stderr', output
            data = output.get('data', {})
            html = ''.join(data.get('text/html', ''))
            assert '<progress' not in html and 'progress {' not in html, source
            said = html + ''.join(output.get('text', data.get('text/plain', '')))
            assert 'Warning' not in said and 'CUDA' not in said, said


@pytest.fixture
def opened(lab, browser):
    notebooks = []

    def open_(name):
        notebooks.append(Open(lab, browser, name))
        return notebooks[-1]

    yield open_
    for notebook in notebooks:
        assert notebook.said == []
        notebook.close()


@pytest.mark.parametrize('name', ['00_the_idea', '04e_mope'])
def test_a_lesson_is_run_from_top_to_bottom(name, opened):
    notebook = opened(name)
    notebook.run_all()
    cells = notebook.finished()
    check(cells)
    tables = [c for c in cells for o in c['outputs'] if 'text/html' in o.get('data', {})]
    assert tables and notebook.page.locator('.jp-OutputArea-output').count()
    here, there = ROOT / 'mope_clip', notebook.lab.clone / 'mope_clip'
    for path in here.rglob('*.py'):  # the last cell of a lesson exports it
        assert (there / path.relative_to(here)).read_bytes() == path.read_bytes(), path


def with_parameters(path, values):
    "Other values in the first code cell, as a reader types them"
    notebook = json.loads(path.read_text(encoding='utf-8'))
    cell = next(c for c in notebook['cells'] if 'parameters' in c['metadata'].get('tags', []))
    source = ''.join(cell['source'])
    for name, value in values.items():
        source, found = re.subn(rf'(?m)^({name}: \w+ =) \S+', rf'\1 {value!r}', source)
        assert found == 1, name
    cell['source'] = source
    path.write_text(json.dumps(notebook), encoding='utf-8')


def test_the_main_job_is_interrupted_and_run_again(clone, opened):
    declared = yaml.safe_load((ROOT / 'nbs' / '20_finetune.yaml').read_text(encoding='utf-8'))
    with_parameters(clone / 'nbs' / '20_finetune.ipynb', {**declared['smoke'], **SHORT})
    notebook = opened('20_finetune')
    notebook.run_all()
    notebook.until(lambda: notebook.page.get_by_text('modules to score').count())
    notebook.page.get_by_title('Interrupt the kernel').click()
    cells = notebook.finished()
    errors = [o['ename'] for c in cells for o in c['outputs'] if o['output_type'] == 'error']
    assert errors == ['KeyboardInterrupt']
    notebook.run_all()
    cells = notebook.finished()
    check(cells)
    shown = [''.join(o.get('data', {}).get('text/html', '')) for c in cells for o in c['outputs']]
    final = next(html for html in reversed(shown) if '<table' in html)
    assert 'width and depth' in final and 'MACs (M)' in final
    assert notebook.page.get_by_text('of its MACs').last.is_visible()
    out = clone / 'runs' / '20_finetune-openmoji'
    assert json.loads((out / 'results.json').read_text(encoding='utf-8'))['rows']
    assert [p.name for p in (clone / 'nbs').iterdir() if p.name == 'runs'] == []
