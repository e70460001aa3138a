"Every notebook is executed, each in a process of its own with a limit."

import json
import shutil
import sys

import pytest
import warm
from conftest import ROOT, run

from mope_clip.data.files import cache_dir

NBS = ROOT / 'nbs'
LIBRARY = sorted(p.stem for p in NBS.glob('*.ipynb') if p.name[:1] not in '123456789')
TEMPLATES = sorted(p.stem for p in NBS.glob('[1-9]*.ipynb'))
IN_A_KERNEL = 'index', '00_the_idea', '04e_mope'  # the others are the same cells, without a server
NBCONVERT = '-m jupyter nbconvert --to notebook --execute --ExecutePreprocessor.timeout=500'.split()


def in_a_kernel(name, folder):
    words = [*NBCONVERT, '--output-dir', folder, NBS / f'{name}.ipynb']
    return run(sys.executable, *words, IN_TEST='1')


@pytest.mark.parametrize('name', IN_A_KERNEL)
def test_library_notebook_runs_in_a_kernel(name, tmp_path):
    r = in_a_kernel(name, tmp_path)
    assert r.returncode == 0, r.stderr[-3000:]


@pytest.mark.parametrize('name', [name for name in LIBRARY if name not in IN_A_KERNEL])
def test_library_notebook_runs(name, tmp_path):
    if not warm.CAN:
        r = in_a_kernel(name, tmp_path)
    else:
        known = dict(IN_TEST='1', PYTHONPATH=str(ROOT))
        words = sys.executable, 'notebook', NBS / f'{name}.ipynb'
        r = run(*words, cwd=NBS, fresh=False, **known)
    assert r.returncode == 0, r.stderr[-3000:]


def test_a_cell_that_fails_is_shown_with_its_traceback(tmp_path):
    import nbformat.v4 as v4

    cells = [v4.new_markdown_cell('# Two'), v4.new_code_cell('x = 0'), v4.new_code_cell('1 / x')]
    path = tmp_path / 'broken.ipynb'
    path.write_text(json.dumps(v4.new_notebook(cells=cells)), encoding='utf-8')
    if not warm.CAN:
        pytest.skip('notebooks run in a kernel here')
    r = run(sys.executable, 'notebook', path, cwd=tmp_path, fresh=False)
    assert r.returncode == 1 and r.stderr.startswith('broken.ipynb, cell 2:\n1 / x\n')
    assert r.stderr.endswith('ZeroDivisionError: division by zero\n')


@pytest.mark.parametrize('name', TEMPLATES)
def test_template_has_smoke_sizes_and_one_parameters_cell(name):
    cells = json.loads((ROOT / 'nbs' / f'{name}.ipynb').read_text())['cells']
    assert sum('parameters' in c['metadata'].get('tags', []) for c in cells) == 1
    assert 'smoke:' in (ROOT / 'nbs' / f'{name}.yaml').read_text()
    assert not any(c.get('outputs') for c in cells), 'templates keep no outputs'


def test_teacher_notebook_trains_and_resumes(tmp_path):
    import yaml

    smoke = yaml.safe_load((ROOT / 'nbs' / '10_teacher.yaml').read_text())['smoke']
    args = [
        x
        for k, v in {
            **smoke,
            'out_dir': str(tmp_path / 'out'),
            'data_out': str(tmp_path / 'data'),
        }.items()
        for x in ('-p', k, v)
    ]
    r = run(
        sys.executable,
        '-m',
        'papermill',
        ROOT / 'nbs' / '10_teacher.ipynb',
        tmp_path / '10.ipynb',
        *args,
        cwd=tmp_path,
    )
    assert r.returncode == 0, r.stderr[-3000:]
    first = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert {row['stage'] for row in first['rows']} >= {'zero-shot', 'fine-tuned'}
    import open_clip

    model, _, _ = open_clip.create_model_and_transforms(
        f'local-dir:{tmp_path / "data" / "teacher"}'
    )
    assert model.visual.transformer.width == smoke['width']
    again = run(
        sys.executable,
        '-m',
        'papermill',
        ROOT / 'nbs' / '10_teacher.ipynb',
        tmp_path / 'again.ipynb',
        *args,
        cwd=tmp_path,
        fresh=False,
    )
    assert (
        again.returncode == 0 and 'not trained again' in (tmp_path / 'again.ipynb').read_text()
    ), again.stderr[-3000:]
    assert json.loads((tmp_path / 'out' / 'results.json').read_text())['rows'] == first['rows']


@pytest.fixture(scope='module')
def shallow(tmp_path_factory):
    "The repository's notebooks with narrow teachers of three layers a tower: where its data is"
    from mope_clip.clip import TOWERS, load_clip, prune, whole_spec
    from mope_clip.pruners import export_open_clip

    root = tmp_path_factory.mktemp('repository')
    for name in ('nbs', 'reports', 'settings.ini'):
        (root / name).symlink_to(ROOT / name)
    (root / 'data').mkdir()
    for path in (ROOT / 'data').iterdir():
        if path.is_file():
            shutil.copy(path, root / 'data')
    for name in ('teacher', 'teacher-openmoji'):
        clip = load_clip(str(ROOT / 'data' / name), device='cpu')
        spec = whole_spec(clip)
        for tower in TOWERS:
            layers = getattr(spec, tower)
            for layer in [*layers][3:]:
                del layers[layer]
            for kept in layers.values():
                kept['neurons'] = range(96)
        export_open_clip(prune(clip, spec), root / 'data' / name)
    return root / 'data'


@pytest.mark.parametrize('name', [n for n in TEMPLATES if n > '21' and n != '60_your_model'])
def test_table_or_figure_notebook_runs_at_smoke_size(name, tmp_path, shallow):
    import yaml

    smoke = {
        **yaml.safe_load((ROOT / 'nbs' / f'{name}.yaml').read_text())['smoke'],
        'out_dir': str(tmp_path / 'out'),
    }
    (tmp_path / 'smoke.yaml').write_text(yaml.safe_dump(smoke))
    r = run(
        sys.executable,
        '-m',
        'papermill',
        ROOT / 'nbs' / f'{name}.ipynb',
        tmp_path / f'{name}.ipynb',
        '-f',
        tmp_path / 'smoke.yaml',
        cwd=tmp_path,
        fresh=name == '54_gallery',  # one of them in a kernel
        MOPE_CLIP_DATA=str(shallow),
        MOPE_CLIP_CACHE=str(cache_dir()),
    )
    assert r.returncode == 0, r.stderr[-3000:]
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['claims'] and all(
        {'id', 'kind', 'claim', 'verdict', 'value', 'rule', 'text', 'n'} <= set(c)
        for c in results['claims']
    )


def test_your_model_runs_on_a_folder_of_photos(tmp_path):
    "Squares as somebody's photos, with one to three captions each, and a small model as theirs"
    import yaml

    from mope_clip.clip import tiny_clip
    from mope_clip.data import synth_pairs

    tiny_clip().save(tmp_path / 'tiny')
    photos = tmp_path / 'my photos [2026]'
    photos.mkdir()
    lines = ['filepath,caption']
    for k, pair in enumerate(synth_pairs(150, captions=3)):
        pair['image'].save(photos / f'{k}.jpg')
        lines += [f'{k}.jpg,{caption}' for caption in pair['captions'][: 1 + k % 3]]
    (photos / 'captions.csv').write_text('\n'.join(lines), encoding='utf-8')
    smoke = yaml.safe_load((ROOT / 'nbs' / '60_your_model.yaml').read_text())['smoke']
    given = dict(smoke, task=photos.name, model='tiny', queries='["red and blue"]', out_dir='out')
    words = [word for name, value in given.items() for word in ('-p', name, value)]
    r = run(sys.executable, '-m', 'mope_clip.cli', 'run', '60_your_model', *words, cwd=tmp_path)
    assert r.returncode == 0, r.stderr[-3000:]
    assert '% of the mean recall is left with' in r.stdout
    results = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert results['claims'] == []
    assert {row['task'] for row in results['rows']} == {'my-photos-2026'}
    assert {row['stage'] for row in results['rows']} >= {'whole model', 'searched, repaired'}
    made = {path.name for path in (tmp_path / 'out').iterdir()}
    assert made >= {'model', 'deploy', 'heads.csv', 'answers.png', 'intervals.png', 'models.csv'}


WRONG = [
    ('30_pretrain', dict(images_repaired=5), 'Repair needs at least 10 images, not 5'),
    ('30_pretrain', dict(precision='fp8'), "precision is 'auto', 'fp32' or 'bf16', not 'fp8'"),
    ('30_pretrain', dict(lr_scratch=-1.0), 'lr is a learning rate above 0, not -1.0'),
    ('30_pretrain', dict(tasks=['a/pets', 'b/pets']), 'labelled sets are called pets'),
    ('30_pretrain', dict(labelled_sets=['colour', 'my/colour']), 'sets are called colour'),
    ('60_your_model', dict(images_repaired=5), 'Repair needs at least 10 images, not 5'),
    ('60_your_model', dict(macs=1.5), 'above 0 and below 1, not 1.5'),
    ('60_your_model', dict(queries=['a cat', 5]), 'texts to search for, not 5'),
]


@pytest.mark.parametrize('name, given, sentence', WRONG)
def test_what_is_wrong_is_said_before_a_model_is_loaded(name, given, sentence, tmp_path):
    import yaml

    (tmp_path / 'given.yaml').write_text(yaml.safe_dump(dict(given, model='no-such-model')))
    words = [ROOT / 'nbs' / f'{name}.ipynb', tmp_path / 'out.ipynb', '-f', tmp_path / 'given.yaml']
    place = '-p', 'out_dir', tmp_path / 'out'
    r = run(sys.executable, '-m', 'papermill', *words, *place, cwd=tmp_path, fresh=False)
    assert r.returncode != 0
    assert sentence in r.stderr.strip().splitlines()[-1], r.stderr[-1500:]


def test_a_folder_of_ones_own_is_a_labelled_set_of_the_pretraining_stage(tmp_path):
    import yaml
    from PIL import Image

    from mope_clip.clip import tiny_clip

    tiny_clip().save(tmp_path / 'tiny')
    for name, colour in (('cat', 'red'), ('dog', 'blue')):
        (tmp_path / 'my' / 'pets' / name).mkdir(parents=True)
        for k in range(2):
            Image.new('RGB', (40, 40), colour).save(tmp_path / 'my' / 'pets' / name / f'{k}.png')
    sizes = dict(images_scored=8, images_watched=8, images_evaluated=4, pairs_distil=8, batch=8)
    given = dict(sizes, batch_scratch=8, times_scratch=1, metric='magnitude', repair=False)
    given |= dict(model=str(tmp_path / 'tiny'), tasks=['openmoji'], corpora=['openmoji-corpus'])
    given |= dict(labelled_sets=[str(tmp_path / 'my' / 'pets')], out_dir=str(tmp_path / 'out'))
    (tmp_path / 'given.yaml').write_text(yaml.safe_dump(given))
    words = [NBS / '30_pretrain.ipynb', tmp_path / '30.ipynb', '-f', tmp_path / 'given.yaml']
    r = run(sys.executable, '-m', 'papermill', *words, cwd=tmp_path, fresh=False)
    assert r.returncode == 0, r.stderr[-3000:]
    rows = json.loads((tmp_path / 'out' / 'results.json').read_text())['rows']
    assert {row['task'] for row in rows} == {'openmoji', 'pets'}
