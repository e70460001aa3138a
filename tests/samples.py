"Pictures and shards in small, for the tests of the data."

import io
import itertools
import json
import tarfile

from PIL import Image


def jpeg(colour=None, size=(64, 48), cut=None):
    "A JPEG file of one colour, or of noise; `cut` leaves so many bytes"
    buffer = io.BytesIO()
    if colour is None:
        Image.effect_noise(size, 40).convert('RGB').save(buffer, 'JPEG')
    else:
        Image.new('RGB', size, colour).save(buffer, 'JPEG', quality=95)
    return buffer.getvalue()[:cut]


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_shard(path, keys, cut=(), mute=()):
    "A shard in img2dataset's layout; some pictures cut short, some without a caption"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for k in keys:
            data = jpeg((k * 7 % 256, k * 13 % 256, 99), (32, 32))
            add(tar, f'{k:09}.jpg', data[: len(data) // 2] if k in cut else data)
            if k not in mute:
                add(tar, f'{k:09}.txt', f'picture {k}'.encode())
            add(tar, f'{k:09}.json', json.dumps(dict(key=f'{k:09}', status='success')).encode())
    return path


def keys_of(found, n=None):
    "The ids of the first pairs, as numbers"
    return [int(pair['image_id']) for pair in itertools.islice(found, n)]
