"The main job through papermill, as a reader runs it, and what it does with bad input."

import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run

SMOKE = yaml.safe_load((ROOT / 'nbs' / '20_finetune.yaml').read_text(encoding='utf-8'))['smoke']


def papermill(out, cwd=ROOT, fresh=True, **parameters):
    "Bare papermill on the template"
    return run(
        sys.executable,
        '-m',
        'papermill',
        ROOT / 'nbs' / '20_finetune.ipynb',
        out,
        *[x for k, v in parameters.items() for x in ('-p', k, v)],
        cwd=cwd,
        fresh=fresh,
    )


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A smoke run from another working directory"
    tmp = tmp_path_factory.mktemp('job')
    r = papermill(tmp / 'out.ipynb', cwd=tmp, out_dir=tmp / 'run', **SMOKE)
    assert r.returncode == 0, r.stderr[-3000:]
    return tmp / 'run'


def test_results_are_whole(finished):
    r = json.loads((finished / 'results.json').read_text(encoding='utf-8'))
    assert set(r) == {
        'schema',
        'name',
        'scale',
        'parameters',
        'rows',
        'cost',
        'claims',
        'provenance',
    }
    assert [*dict.fromkeys(row['stage'] for row in r['rows'])] == [
        'teacher',
        'width pruned',
        'width repaired',
        'width recovered',
        'depth pruned',
        'depth repaired',
        'depth recovered',
        'loaded from disk',
    ]
    assert len(r['rows']) == 8 * 7 and all(
        0 <= row['value'] <= 100 and row['split'] == 'test' for row in r['rows']
    )
    made = {'commit', 'template_hash', 'functions', 'versions', 'wall_time', 'peak_memory', 'data'}
    assert made <= set(r['provenance'])
    assert set(r['provenance']['data']) == {'test', 'scored', 'calibration', 'sprites'}
    sizes = {row['stage']: row['size'] for row in r['rows']}
    assert sizes['teacher'] > sizes['width pruned'] > sizes['depth pruned']


def test_what_was_executed_is_in_the_record(finished):
    functions = json.loads((finished / 'results.json').read_text(encoding='utf-8'))['provenance'][
        'functions'
    ]
    words = 'score', 'plan_width', 'plan_depth', 'prune', 'distill', 'retriev', 'encode', 'Loss'
    for word in words:
        assert any(word in name for name in functions), f'nothing of {word} was recorded'
    assert not any(name.endswith(('.magnitude', '.zero_shot')) for name in functions)


def test_small_model_from_disk_in_a_new_process(finished):
    code = f"""
from mope_clip.clip import load_clip, shape_of
from mope_clip.data import load_pairs
from mope_clip.evaluate import retrieval
clip = load_clip({str(finished / 'model')!r}, device='cpu')
pairs = load_pairs('openmoji', 'test', {SMOKE['images_evaluated']})
print(retrieval(clip, pairs)['mean_recall'], shape_of(clip))
"""
    r = run(sys.executable, '-W', 'ignore', '-c', code)
    value, shape = r.stdout.strip().split(' ', 1)
    rows = json.loads((finished / 'results.json').read_text(encoding='utf-8'))['rows']
    assert float(value) == next(
        x['value']
        for x in rows
        if x['stage'] == 'loaded from disk' and x['metric'] == 'mean_recall'
    )
    assert shape == "{'vision': " + str([[3, 384]] * 6) + ", 'text': " + str([[3, 384]] * 5) + '}'


BAD = dict(
    unknown_name=(
        dict(kepp_width=0.5),
        "Unknown parameter 'kepp_width', did you mean 'keep_width'",
    ),
    wrong_type=(dict(groups='many'), 'groups must be of type int'),
    unknown_task=(dict(task='imagenet'), "Unknown task 'imagenet'"),
    rate=(dict(lr=-1.0), 'lr is a learning rate above 0'),
    less_than_a_batch=(dict(pairs_depth=4), 'pairs_seen is 4, less than one batch of 64'),
    too_few_to_repair=(dict(images_repaired=5), 'Repair needs at least 10 images, not 5'),
    keep_out_of_range=(dict(keep_width=1.5), 'above 0 and at most 1, not 1.5'),
    coco_without_data=(dict(task='coco'), 'dataset_coco.json'),
    data_root_missing=(
        dict(task='flickr30k', data_root='no/such/folder'),
        'no/such/folder does not exist',
    ),
    unwritable_out_dir=(dict(out_dir=str(ROOT / 'README.md' / 'x')), 'cannot be written'),
    teacher_without_weights=(dict(model='empty'), 'no weights'),
)


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_sentence_and_nothing_half_written(case, tmp_path):
    parameters, sentence = BAD[case]
    if case == 'teacher_without_weights':
        (tmp_path / 'empty').mkdir()
        (tmp_path / 'empty' / 'open_clip_config.json').write_text(
            (ROOT / 'data' / 'teacher' / 'open_clip_config.json').read_text(encoding='utf-8')
        )
        parameters = dict(model=tmp_path / 'empty')
    out = parameters.get('out_dir', str(tmp_path / 'run'))
    in_a_kernel = case == 'wrong_type'  # once is enough for what papermill does with an error
    r = papermill(tmp_path / 'out.ipynb', fresh=in_a_kernel, **{'out_dir': out, **parameters})
    assert r.returncode != 0
    last = r.stderr.strip().splitlines()[-1]
    assert sentence in last and last.startswith(('ValueError: ', 'FileNotFoundError: ')), r.stderr[
        -1500:
    ]
    assert not Path(out).is_dir() or not any(Path(out).iterdir())
