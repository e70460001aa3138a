"The command line as a process."

import json
import sys

import pytest
from conftest import run


def mope(*args, **kw):
    return run(sys.executable, '-m', 'mope_clip.cli', *args, **kw)


def test_help_names_every_command():
    text = mope('--help').stdout
    assert all(
        c in text
        for c in (
            'score',
            'prune',
            'distill',
            'evaluate',
            'export',
            'run',
            'report',
            'index',
            'readme',
        )
    )


def test_bad_parameter_is_refused_before_a_kernel_starts(tmp_path):
    r = mope('run', '20_finetune', '-p', 'keep_widht', '0.5', '-p', 'out_dir', tmp_path / 'run')
    assert (
        r.returncode == 1
        and "did you mean 'keep_width'" in r.stderr
        and 'Traceback' not in r.stderr
    )
    assert not (tmp_path / 'run').exists()


def test_error_inside_a_notebook_is_one_sentence(tmp_path):
    r = mope('run', '20_finetune', '-p', 'keep_depth', '0', '-p', 'out_dir', tmp_path / 'run')
    assert (
        r.returncode == 1
        and 'above 0 and at most 1, not 0' in r.stderr
        and 'Traceback' not in r.stderr
    )


def test_generated_files_are_checked():
    assert mope('readme', '--check').returncode == 0


def test_the_pipeline_from_end_to_end(tmp_path):
    "Each command writes what the next one reads; what is finished is not done again"
    import pandas as pd

    from mope_clip.clip import load_clip, tiny_clip
    from mope_clip.evaluate import cost

    tiny_clip().save(tmp_path / 'tiny')
    few = '--images', 12

    def do(*args):
        r = mope(*args, cwd=tmp_path)
        assert r.returncode == 0, r.stderr[-2000:]
        return r.stdout

    said = do('score', 'tiny', *few, '--groups', 4, '--out', 'scores.parquet')
    assert '45 modules scored by mope' in said
    table = pd.read_parquet(tmp_path / 'scores.parquet')
    assert (
        len(table) == 5 * (4 + 4 + 1)
        and table.attrs['mope']['split'] == 'validation'
        and table.attrs['mope']['images'] == 12
    )
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / 'scores').rglob('*.parquet')}
    do('score', 'tiny', *few, '--groups', 4, '--out', 'scores.parquet')  # taken from the store
    assert before and before == {
        f: f.stat().st_mtime_ns for f in (tmp_path / 'scores').rglob('*.parquet')
    }
    dry = do(
        'prune',
        'tiny',
        '--scores',
        'scores.parquet',
        '--macs',
        0.5,
        '--rank',
        'global',
        '--dry-run',
    )
    assert 'nothing was removed' in dry and not (tmp_path / 'pruned').exists()
    wet = do(
        'prune',
        'tiny',
        '--scores',
        'scores.parquet',
        '--macs',
        0.5,
        '--rank',
        'global',
        '--out',
        'small',
    )
    assert dry.splitlines()[:3] == wet.splitlines()[:3]
    dense, small = load_clip(str(tmp_path / 'tiny')), load_clip(str(tmp_path / 'small'))
    assert cost(small)['macs'] <= 0.5 * cost(dense)['macs'] + cost(dense)['macs'] * 0.001
    do(
        'distill',
        'small',
        '--teacher',
        'tiny',
        '--pairs-seen',
        32,
        '--batch',
        16,
        '--out',
        'student',
    )
    assert 'resumed at step 2 of 2' in do(
        'distill',
        'small',
        '--teacher',
        'tiny',
        '--pairs-seen',
        32,
        '--batch',
        16,
        '--out',
        'student',
    )
    said = do('evaluate', 'student', *few, '--suites', 'colour', '--out', 'numbers.json')
    numbers = json.loads((tmp_path / 'numbers.json').read_text())
    assert (
        'mean_recall' in said
        and numbers['cost']['macs'] == cost(small)['macs']
        and 'top1' in numbers['zero-shot colour test']
    )
    assert 'by hand' not in said
    do('export', 'student', '--format', 'open_clip', '--pad', '--out', 'plain')
    assert (tmp_path / 'plain' / 'open_clip_config.json').is_file()


@pytest.mark.parametrize(
    'args, sentence',
    [
        (('score', 'no/such'), 'There is no folder no/such'),
        (
            ('prune', 'tiny', '--scores', 'none.parquet', '--keep', '.5'),
            'There is no table none.parquet',
        ),
        (('prune', 'tiny', '--spec', 'none.json'), 'There is no file none.json'),
        (('evaluate', 'tiny', '--task', 'flicker'), "Unknown task 'flicker'"),
        (('export', 'tiny', '--format', 'onnx', '--pad'), '--pad is for open_clip and hf'),
    ],
)
def test_bad_arguments_are_one_sentence(args, sentence, tmp_path):
    from mope_clip.clip import tiny_clip

    if args[1] == 'tiny':
        tiny_clip().save(tmp_path / 'tiny')
    r = mope(*args, cwd=tmp_path)
    assert r.returncode == 1 and sentence in r.stderr and r.stderr.count('\n') == 1, r.stderr
