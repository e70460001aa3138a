"Shared by the tests: the repository's root, and one way to run a command."
import os, subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*args, cwd=ROOT, timeout=600, **env):
    "Run a command without terminal and progress bars; returns its CompletedProcess"
    clean = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'MOPE_CLIP_DATA')}
    return subprocess.run([str(a) for a in args], cwd=cwd, timeout=timeout, capture_output=True, text=True, env={**clean, 'MOPE_CLIP_PROGRESS': '0', **env})


@pytest.fixture
def root(): return ROOT
