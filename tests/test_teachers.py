"The committed teachers are open_clip models, small, and worth compressing."

import open_clip
import pytest
import torch
from conftest import ROOT

from mope_clip.clip import load_clip
from mope_clip.data import load_labelled, load_pairs, suites
from mope_clip.evaluate import retrieval, zero_shot

TEACHERS = ['teacher', 'teacher-openmoji']


@pytest.mark.parametrize('name', TEACHERS)
def test_open_clip_alone_loads_it(name):
    folder = ROOT / 'data' / name
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 15_000_000
    model, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{folder}')
    tokenizer = open_clip.get_tokenizer(f'local-dir:{folder}')
    ours, pairs = load_clip(str(folder), device='cpu'), load_pairs('openmoji', 'validation', 4)
    images, ids = (
        torch.stack([preprocess(im) for im in pairs['image']]),
        tokenizer([cs[0] for cs in pairs['captions']]),
    )
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(images), ours.encode_image(images), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            model.encode_text(ids), ours.encode_text(ids), atol=1e-5, rtol=1e-5
        )
    assert len(model.visual.transformer.resblocks) >= 8 and len(model.transformer.resblocks) >= 6
    assert ids.max() == len(tokenizer.tokenizer) - 1, 'the end token has the highest id'


def test_fine_tuned_teacher_retrieves():
    "Far above chance on a few validation images; the numbers of record are in reports/"
    assert (
        retrieval(
            load_clip(str(ROOT / 'data' / 'teacher-openmoji'), device='cpu'),
            load_pairs('openmoji', 'validation', 100),
        )['mean_recall']
        > 80
    )


@pytest.mark.parametrize('suite', list(suites()))
def test_zero_shot_teacher_is_above_chance(suite):
    n = 1000  # as in the report: position and relation are well above chance, not far above it
    top1, chance = (
        zero_shot(
            load_clip(str(ROOT / 'data' / 'teacher'), device='cpu'),
            load_labelled(suite, 'validation', n),
        )['top1'],
        100 / len(suites()[suite].classes),
    )
    assert top1 > chance + 3 * (chance * (100 - chance) / n) ** 0.5
