"Exported models where this library is not: another process, a compiler, a hub, the shape of a real CLIP."

import base64
import hashlib
import json
import os
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import onnx
import open_clip
import pytest
import torch
from conftest import GRID, model_of, run

from mope_clip.clip import (
    TOWERS,
    PruneSpec,
    build_clip,
    prune,
    shape_of,
    tiny_clip,
    weights_hash,
    whole_spec,
)
from mope_clip.pruners import export_onnx
from mope_clip.pruners.export import probe, to_hf, to_open_clip, trace


@pytest.fixture(scope='module')
def small():
    "Half of the heads of a layer, none of another, a layer less"
    tiny = tiny_clip()
    return prune(
        tiny,
        PruneSpec(
            vision={0: dict(heads=[0, 2], neurons=range(0, 128, 4)), 2: dict(heads=[], neurons=[])},
            text={1: dict(heads=[3], neurons=range(64))},
            base=tiny.spec.base,
        ),
    )


ALONE = """
import sys, numpy as np, onnxruntime, open_clip, torch
from transformers import CLIPModel
sys.modules['mope_clip'] = None                                           # importing it would be an error
x = np.load('x.npz')
images, ids = torch.from_numpy(x['images']), torch.from_numpy(x['ids'])
def check(form, image_features, text_features):
    for ours, theirs in ((x['image_features'], image_features), (x['text_features'], text_features)): np.testing.assert_allclose(ours, np.asarray(theirs), atol=1e-5, err_msg=form)
unit = lambda f: f/np.linalg.norm(f, axis=-1, keepdims=True)
with torch.no_grad():
    model, _, _ = open_clip.create_model_and_transforms('local-dir:open_clip')
    check('open_clip', model.eval().encode_image(images, normalize=True), model.encode_text(ids, normalize=True))
    out = CLIPModel.from_pretrained('hf').eval()(pixel_values=images, input_ids=ids)
    check('transformers', out.image_embeds, out.text_embeds)
    check('torch.export', *(unit(torch.export.load(f'{t}.pt2').module()(v).numpy()) for t, v in (('vision', images), ('text', ids))))
check('onnx', *(unit(onnxruntime.InferenceSession(f'onnx/{t}.onnx').run(None, {n: x[n]})[0]) for t, n in (('vision', 'images'), ('text', 'ids'))))
print('all the same')
"""


def test_every_form_works_in_a_process_without_this_library(small, tmp_path):
    images, ids = probe(small, 'vision', 3), probe(small, 'text', 3)
    with torch.no_grad():
        f = dict(
            image_features=small.encode_image(images, normalize=True).numpy(),
            text_features=small.encode_text(ids, normalize=True).numpy(),
        )
    np.savez(tmp_path / 'x.npz', images=images, ids=ids, **f)
    to_open_clip(small, tmp_path / 'open_clip', pad=True)
    to_hf(small, tmp_path / 'hf', pad=True)
    export_onnx(small, tmp_path / 'onnx')
    for t in TOWERS:
        torch.export.save(trace(small, t), tmp_path / f'{t}.pt2')
    r = run(sys.executable, '-c', ALONE, cwd=tmp_path, PYTHONPATH='')
    assert r.returncode == 0 and 'all the same' in r.stdout, r.stderr[-3000:]


COMPILE = """
import torch
from mope_clip.clip import load_clip
from mope_clip.clip import TOWERS
from mope_clip.pruners.export import probe
clip = load_clip('small', device='cpu')
with torch.no_grad():
    for t in TOWERS:
        compiled, x = torch.compile(clip.tower(t), dynamic=True), probe(clip, t, 5)
        for n in (2, 5): torch.testing.assert_close(compiled(x[:n]), clip.tower(t)(x[:n]), atol=1e-5, rtol=1e-4)
print('compiled')
"""


@pytest.mark.skipif(
    not any(shutil.which(c) for c in (os.environ.get('CXX') or 'g++', 'clang++')),
    reason='torch.compile needs a C++ compiler, and there is neither g++ nor clang++ here',
)
def test_compiled_towers_are_the_same(small, tmp_path):
    small.save(tmp_path / 'small')
    r = run(sys.executable, '-c', COMPILE, cwd=tmp_path, TORCHINDUCTOR_CACHE_DIR=tmp_path / 'cache')
    assert r.returncode == 0 and 'compiled' in r.stdout, r.stderr[-3000:]


def test_a_real_shape_goes_to_onnx(tmp_path):
    "ViT-B/32, unevenly pruned at random: the folder is checked in onnxruntime as it is written"
    clip, r = (
        build_clip(
            dict(
                name='ViT-B-32', model_cfg=open_clip.get_model_config('ViT-B-32'), preprocess_cfg={}
            ),
            None,
        ),
        np.random.default_rng(0),
    )
    spec = whole_spec(clip)
    for t in TOWERS:
        for l, kept in list(getattr(spec, t).items()):
            for k, most in (('heads', 5), ('neurons', 700)):
                kept[k] = sorted(r.choice(kept[k], r.integers(0, most), replace=False).tolist())
            if l % 3 == 2:
                del getattr(spec, t)[l]
    small = prune(clip, spec)
    files = export_onnx(small, tmp_path / 'onnx')
    for t in TOWERS:
        assert (
            files[t].stat().st_size
            < 4.1 * sum(p.numel() for p in small.tower(t).parameters()) + 1e6
        )
    assert json.loads((tmp_path / 'onnx/config.json').read_text())['context_length'] == 77


@pytest.mark.parametrize('name', GRID)
def test_attention_as_one_operator_is_the_same(name, tmp_path):
    "Opset 23 over the grid of architectures, unevenly pruned at random: the folder is checked in onnxruntime as it is written"
    clip, r = model_of(name), np.random.default_rng(0)
    spec = whole_spec(clip)
    for t in TOWERS:
        for l, kept in getattr(spec, t).items():
            kept.update(
                heads=sorted(r.choice(kept['heads'], r.integers(l > 0, 5), replace=False).tolist()),
                neurons=kept['neurons'][: r.integers(0, 60)],
            )
    small = prune(clip, spec)
    for t, path in export_onnx(small, tmp_path / 'onnx', opset=23).items():
        found = [n.op_type for n in onnx.load(path).graph.node]
        layers = sum(h > 0 for h, _ in shape_of(small)[t])
        assert found.count('Attention') == layers, t
        assert found.count('Split') == (layers if name == 'custom_norms' else 0), (
            'heads stay side by side, unless they are normed'
        )


class Hub(BaseHTTPRequestHandler):
    "As much of the Hugging Face hub as uploading a folder and reading it back need; files in `server.repos`, requests in `server.seen`"

    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def answer(self, body=b'', code=200, **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for k, v in dict(headers, Content_Length=len(body)).items():
            self.send_header(k.replace('_', '-'), str(v))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def do_POST(self):
        data, path = (
            self.rfile.read(int(self.headers.get('Content-Length') or 0)),
            self.path.split('?')[0],
        )
        repos, (_, api, what, *rest) = self.server.repos, path.split('/')
        url = f'http://127.0.0.1:{self.server.server_port}'
        if self.headers.get('Authorization') != 'Bearer a-token':
            return self.answer(dict(error='Invalid username or password.'), 401)
        if path == '/api/repos/create':
            d = json.loads(data)
            name = f'{d["organization"]}/{d["name"]}'
            self.server.seen.append(d)
            repos.setdefault(name, {})
            return self.answer(dict(url=f'{url}/{name}', id=name))
        if path == '/api/validate-yaml':
            self.server.seen.append(json.loads(data)['content'])
            return self.answer(dict(errors=[], warnings=[]))
        name, action = '/'.join(rest[:2]), rest[2]
        if action == 'preupload':
            return self.answer(
                dict(
                    files=[
                        dict(path=f['path'], uploadMode='regular', shouldIgnore=False)
                        for f in json.loads(data)['files']
                    ]
                )
            )
        for o in map(json.loads, data.splitlines()):
            if o['key'] == 'file':
                repos[name][o['value']['path']] = base64.b64decode(o['value']['content'])
        self.answer(
            dict(success=True, commitUrl=f'{url}/{name}/commit/{"a" * 40}', commitOid='a' * 40)
        )

    def do_GET(self):
        repos, parts = self.server.repos, self.path.split('?')[0].strip('/').split('/')
        if parts[:2] == ['api', 'models']:
            files = repos.get('/'.join(parts[2:4]))
            if files is None:
                return self.answer(
                    dict(error='Repository not found'), 404, X_Error_Code='RepoNotFound'
                )
            if 'tree' in parts:
                return self.answer(
                    [
                        dict(type='file', path=k, size=len(v), oid=hashlib.sha1(v).hexdigest())
                        for k, v in files.items()
                    ]
                )
            return self.answer(
                dict(
                    id='/'.join(parts[2:4]),
                    sha='a' * 40,
                    siblings=[dict(rfilename=k) for k in files],
                )
            )
        if 'resolve' not in parts:
            return self.answer(dict(error='Not found'), 404)
        self.server.seen.append(parts[-1])
        v = repos['/'.join(parts[:2])][parts[-1]]
        self.answer(v, ETag=f'"{hashlib.sha1(v).hexdigest()}"', X_Repo_Commit='a' * 40)

    do_HEAD = do_GET


PUSH = """
from mope_clip.clip import load_clip
from mope_clip.pruners.export import push_to_hub
print(push_to_hub(load_clip('small', device='cpu'), 'me/small', token='a-token', results=dict(mean_recall=12.5)))
"""
PULL = """
from mope_clip.clip import weights_hash
from mope_clip.pruners.export import from_pretrained, push_to_hub
back = from_pretrained('me/small', device='cpu')
print(weights_hash(back))
for wrong in (lambda: from_pretrained('me/none'), lambda: push_to_hub(back, 'me/small', token='stolen')):
    try: wrong()
    except (FileNotFoundError, RuntimeError) as e: print(type(e).__name__, e)
"""


def test_the_real_client_takes_a_model_to_a_hub_and_back(small, tmp_path):
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.repos, server.seen = {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = dict(
        HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}',
        HF_HOME=tmp_path / 'home',
        NO_PROXY='127.0.0.1',
        HF_TOKEN='',
    )
    try:
        small.save(tmp_path / 'small')
        pushed = run(
            sys.executable, '-c', PUSH, cwd=tmp_path, **{k: str(v) for k, v in env.items()}
        )
        assert pushed.returncode == 0 and 'me/small/commit/' in pushed.stdout, pushed.stderr[-3000:]
        assert (
            server.seen[0]['visibility'] == 'private'
            and 'pipeline_tag: zero-shot-image-classification' in server.seen[1]
            and '| mean_recall | 12.50 |' in server.seen[1]
        )
        server.repos['me/small']['setup.py'] = b'raise SystemExit("code of a stranger")'
        server.seen.clear()
        pulled = run(
            sys.executable, '-c', PULL, cwd=tmp_path, **{k: str(v) for k, v in env.items()}
        )
    finally:
        server.shutdown()
        server.server_close()
    lines = pulled.stdout.splitlines()
    assert pulled.returncode == 0 and lines[0] == weights_hash(small), pulled.stderr[-3000:]
    assert 'model.safetensors' in server.seen and 'setup.py' not in server.seen, (
        'what may be code is not asked for'
    )
    assert lines[1].startswith(
        'FileNotFoundError me/none is no folder and was not found on the hub (RepositoryNotFoundError: 404'
    )
    assert lines[2].startswith('RuntimeError me/small was not uploaded (') and len(lines) == 3
