"The command line as a process."
import sys

from conftest import run


def mope(*args, **kw): return run(sys.executable, '-m', 'mope_clip.cli', *args, **kw)


def test_help_names_every_command():
    text = mope('--help').stdout
    assert all(c in text for c in ('run', 'report', 'index', 'readme'))


def test_bad_parameter_is_refused_before_a_kernel_starts(tmp_path):
    r = mope('run', '20_finetune', '-p', 'keep_widht', '0.5', '-p', 'out_dir', tmp_path/'run')
    assert r.returncode == 1 and "did you mean 'keep_width'" in r.stderr and 'Traceback' not in r.stderr
    assert not (tmp_path/'run').exists()


def test_error_inside_a_notebook_is_one_sentence(tmp_path):
    r = mope('run', '20_finetune', '-p', 'keep_depth', '0', '-p', 'out_dir', tmp_path/'run')
    assert r.returncode == 1 and 'above 0 and at most 1, not 0' in r.stderr and 'Traceback' not in r.stderr


def test_generated_files_are_checked():
    assert mope('readme', '--check').returncode == 0
