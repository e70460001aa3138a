"A model on the hub: the card, and the real client against a small server on the same machine."

import base64
import hashlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import run, uneven_tiny
from huggingface_hub import ModelCard

from mope_clip.clip import tiny_clip, weights_hash
from mope_clip.evaluate import cost
from mope_clip.pruners import from_pretrained, push_to_hub
from mope_clip.pruners.hub import model_card


@pytest.fixture(scope='module')
def small():
    return uneven_tiny()


# --- the card


def test_a_card_says_what_is_saved_and_how_to_load(small):
    card = model_card(small, dict(mean_recall=12.345, pairs=64), where='me/small')
    now, before = (cost(clip)['vision_macs'] for clip in (small, tiny_clip()))
    for line in (
        'library_name: mope_clip',
        'pipeline_tag: zero-shot-image-classification',
        "clip = from_pretrained('me/small')",
        '| mean_recall | 12.35 |',
        '| pairs | 64 |',
        f'| MACs of an image | {before:,} | {now:,} | {now / before:.0%} |',
    ):
        assert line in card, line
    assert ModelCard(card).data.to_dict()['tags'] == ['clip', 'pruning', 'mope-clip']


def test_a_card_links_to_a_base_on_the_hub_alone(small):
    assert 'base_model' not in model_card(small)
    linked = small.copy()
    linked.config = dict(small.config, name='hf-hub:owner/base')
    assert 'base_model: owner/base' in model_card(linked)


def test_a_card_without_results_has_no_table_of_them(small):
    assert 'metric' not in model_card(small)


# --- up and down, with a folder as the hub


def broken(*args, **kwargs):
    raise OSError('No route to host.\nand much more')


@pytest.fixture
def hub(small, tmp_path):
    "A folder that a model was pushed to; `hub.made`: the repositories that were asked for"
    made = []

    def create(self, repo_id, private, exist_ok):
        made.append((repo_id, private))

    def upload(self, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, tmp_path / repo_id)
        return mock.Mock(commit_url=f'hub/{repo_id}')

    with (
        mock.patch('huggingface_hub.HfApi.create_repo', create),
        mock.patch('huggingface_hub.HfApi.upload_folder', upload),
    ):
        kept = tmp_path / 'kept'
        address = push_to_hub(small, 'me/small', results=dict(mean_recall=1.0), folder=kept)
    return mock.Mock(made=made, address=address, folder=tmp_path)


def test_a_repository_is_private_unless_asked_otherwise(hub):
    assert hub.address == 'hub/me/small' and hub.made == [('me/small', True)]


def test_the_card_goes_with_the_model(hub, small):
    card = Path(hub.folder, 'me/small/README.md').read_text()
    assert card == model_card(small, dict(mean_recall=1.0), 'me/small')


def test_what_comes_back_is_the_same_model(hub, small):
    def download(repo_id, **options):
        return str(hub.folder / repo_id)

    with mock.patch('huggingface_hub.snapshot_download', download):
        back = from_pretrained('me/small', device='cpu')
    assert (weights_hash(back), back.spec) == (weights_hash(small), small.spec)
    ids = small.text.noise(3)
    with torch.no_grad():
        assert torch.equal(back.encode_text(ids), small.encode_text(ids))


def test_a_folder_is_read_as_it_is(hub, small):
    kept = from_pretrained(str(hub.folder / 'kept'), device='cpu')
    assert weights_hash(kept) == weights_hash(small)


def test_without_a_network_cause_and_cure_are_one_sentence(small):
    sentence = r'me/small was not uploaded \(OSError: No route to host\): check'
    with mock.patch('huggingface_hub.HfApi.create_repo', broken):
        with pytest.raises(RuntimeError, match=sentence):
            push_to_hub(small, 'me/small')
    sentence = r'not found on the hub \(OSError: No route to host\): check'
    answers = mock.patch('mope_clip.data.network.is_reached', return_value=True)
    with answers, mock.patch('huggingface_hub.snapshot_download', broken):
        with pytest.raises(FileNotFoundError, match=sentence):
            from_pretrained('me/small')


# --- the real client


class Hub(BaseHTTPRequestHandler):
    "As much of the hub as a folder needs to go up and come back: `server.repos`, `server.seen`"

    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        "Nothing is logged"

    def answer(self, body=b'', code=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in dict(headers, Content_Length=len(body)).items():
            self.send_header(name.replace('_', '-'), str(value))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    @property
    def url(self):
        return f'http://127.0.0.1:{self.server.server_port}'

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        path = self.path.split('?')[0]
        if self.headers.get('Authorization') != 'Bearer a-token':
            self.answer(dict(error='Invalid username or password.'), 401)
        elif path == '/api/repos/create':
            self.create(json.loads(data))
        elif path == '/api/validate-yaml':
            self.server.seen.append(json.loads(data)['content'])
            self.answer(dict(errors=[], warnings=[]))
        elif path.split('/')[5] == 'preupload':
            how = dict(uploadMode='regular', shouldIgnore=False)
            files = [dict(how, path=file['path']) for file in json.loads(data)['files']]
            self.answer(dict(files=files))
        else:
            self.commit('/'.join(path.split('/')[3:5]), data)

    def create(self, asked):
        name = f'{asked["organization"]}/{asked["name"]}'
        self.server.seen.append(asked)
        self.server.repos.setdefault(name, {})
        self.answer(dict(url=f'{self.url}/{name}', id=name))

    def commit(self, name, data):
        for line in map(json.loads, data.splitlines()):
            if line['key'] == 'file':
                file = line['value']
                self.server.repos[name][file['path']] = base64.b64decode(file['content'])
        commit = 'a' * 40
        address = f'{self.url}/{name}/commit/{commit}'
        self.answer(dict(success=True, commitUrl=address, commitOid=commit))

    def do_GET(self):
        parts = self.path.split('?')[0].strip('/').split('/')
        if parts[:2] == ['api', 'models']:
            self.describe('/'.join(parts[2:4]), 'tree' in parts)
        elif 'resolve' not in parts:
            self.answer(dict(error='Not found'), 404)
        else:
            self.server.seen.append(parts[-1])
            file = self.server.repos['/'.join(parts[:2])][parts[-1]]
            tag = hashlib.sha1(file).hexdigest()
            self.answer(file, ETag=f'"{tag}"', X_Repo_Commit='a' * 40)

    def describe(self, name, tree):
        files = self.server.repos.get(name)
        if files is None:
            self.answer(dict(error='Repository not found'), 404, X_Error_Code='RepoNotFound')
        elif tree:
            listed = [
                dict(type='file', path=path, size=len(file), oid=hashlib.sha1(file).hexdigest())
                for path, file in files.items()
            ]
            self.answer(listed)
        else:
            siblings = [dict(rfilename=path) for path in files]
            self.answer(dict(id=name, sha='a' * 40, siblings=siblings))

    do_HEAD = do_GET


PUSH = """
from mope_clip.clip import load_clip
from mope_clip.pruners import push_to_hub

clip = load_clip('small', device='cpu')
print(push_to_hub(clip, 'me/small', token='a-token', results=dict(mean_recall=12.5)))
"""
PULL = """
from mope_clip.clip import weights_hash
from mope_clip.pruners import from_pretrained, push_to_hub

back = from_pretrained('me/small', device='cpu')
print(weights_hash(back))
wrong = (
    lambda: from_pretrained('me/none'),
    lambda: push_to_hub(back, 'me/small', token='stolen'),
)
for call in wrong:
    try:
        call()
    except (FileNotFoundError, RuntimeError) as e:
        print(type(e).__name__, e)
"""


@pytest.fixture
def server():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.repos, server.seen = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_real_client_takes_a_model_to_a_hub_and_back(small, server, tmp_path):
    env = dict(
        HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}',
        HF_HOME=str(tmp_path / 'home'),
        NO_PROXY='127.0.0.1',
        HF_TOKEN='',
    )
    small.save(tmp_path / 'small')
    pushed = run(sys.executable, '-c', PUSH, cwd=tmp_path, **env)
    assert pushed.returncode == 0 and 'me/small/commit/' in pushed.stdout, pushed.stderr[-3000:]
    asked, card = server.seen[:2]
    assert asked['visibility'] == 'private'
    assert 'pipeline_tag: zero-shot-image-classification' in card
    assert '| mean_recall | 12.50 |' in card
    server.repos['me/small']['setup.py'] = b'raise SystemExit("code of a stranger")'
    server.seen.clear()
    pulled = run(sys.executable, '-c', PULL, cwd=tmp_path, **env)
    assert pulled.returncode == 0, pulled.stderr[-3000:]
    found, no_model, no_token = pulled.stdout.splitlines()
    assert found == weights_hash(small)
    assert 'model.safetensors' in server.seen
    assert 'setup.py' not in server.seen, 'what may be code is not asked for'
    missing = 'FileNotFoundError me/none is no folder and was not found on the hub ('
    assert no_model.startswith(missing + 'RepositoryNotFoundError: 404')
    assert no_token.startswith('RuntimeError me/small was not uploaded (')
