"""Processes that are forked from one that has imported the libraries: a second instead of ten.

`python warm.py` is the one that is forked. It imports libraries but nothing of mope_clip, reads
what to run from its standard input, a JSON object a line, and prints the exit code of each.
Tests about starting up, the environment of an import, signals, several processes, memory or
kernels want a fresh process instead.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CAN = sys.platform == 'linux'  # elsewhere the libraries do not take a fork well
CPU_SECONDS = 600  # a process that computes for longer has gone astray
LIBRARIES = (
    'torch open_clip transformers datasets pandas matplotlib.pyplot seaborn nbdev.test '
    'execnb.shell papermill scipy.stats'
).split()


# --- in the process that is forked


def run_notebook(path):
    "Every cell of a notebook in one shell, without a kernel; the traceback of the first that fails"
    from execnb.shell import CaptureShell

    shell = CaptureShell()
    cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']
    for number, cell in enumerate(cells):
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and (error := shell.run_cell(source).exception):
            print(f'{Path(path).name}, cell {number}:\n{source}\n', file=sys.stderr)
            traceback.print_exception(error)
            return 1
    return 0


def without_kernel():
    "Let papermill execute notebooks in a shell of this process"
    import nbformat
    from execnb.shell import CaptureShell, _out_nb
    from papermill.engines import Engine, papermill_engines

    class InShell(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, stdout_file=None, **other):
            shell = CaptureShell()
            for index, cell in enumerate(nb_man.nb.cells):
                nb_man.cell_start(cell, index)
                if cell.cell_type == 'code':
                    done = shell.run_cell(cell.source, store_history=True)
                    made = _out_nb(done, shell.display_formatter)
                    cell.outputs = [nbformat.from_dict(output) for output in made]
                    if stdout_file:
                        stdout_file.write(done.stdout)
                    if done.exception:
                        nb_man.cell_exception(cell, index, exception=done.exception)
                        break
                nb_man.cell_complete(cell, index)

    papermill_engines.register(None, InShell)
    papermill_engines.register('nbclient', InShell)


def become(cwd, env, streams, path):
    "Take the working directory, the environment and the streams of a fresh process"
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in enumerate((os.devnull, *streams)):
        given = os.open(name, os.O_RDWR)
        os.dup2(given, number)
        os.close(given)
    sys.stdout = open(1, 'w', encoding='utf-8', closefd=False)
    sys.stderr = open(2, 'w', encoding='utf-8', closefd=False, buffering=1)
    added = [place for place in env.get('PYTHONPATH', '').split(os.pathsep) if place]
    sys.path[:] = list(dict.fromkeys([cwd, *added, *path]))


def exit_code(work):
    "What the interpreter would make of it"
    try:
        return work()
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return e.code or 0
        print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    return 1


def child(asked, path):
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    become(asked['cwd'], asked['env'], asked['streams'], path)
    kind, name, *words = asked['words']
    sys.argv = [name, *words]

    def work():
        if kind == 'notebook':
            return run_notebook(name)
        without_kernel()
        if kind == '-c':
            sys.argv[0], main = '-c', types.ModuleType('__main__')
            sys.modules['__main__'] = main
            exec(compile(name, '<string>', 'exec'), vars(main))
        else:
            runpy.run_module(name, run_name='__main__', alter_sys=True)
        return 0

    code = exit_code(work)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def serve():
    path = [place for place in sys.path if Path(place or '.').resolve() != ROOT / 'tests']
    for name in LIBRARIES:
        importlib.import_module(name)
    assert not [name for name in sys.modules if name.startswith('mope_clip')]
    gc.collect()
    gc.freeze()  # so that the collector of a child leaves the pages that it shares alone
    for line in sys.stdin:
        if not (pid := os.fork()):
            code = 1
            try:
                code = child(json.loads(line), path)
            finally:
                os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


# --- in the tests

READ_AT_IMPORT = 'HF_', 'TORCH', 'TRANSFORMERS_', 'OMP_', 'MKL_'


def read_at_import(env):
    own = 'TORCHINDUCTOR_CACHE_DIR'  # PyTorch writes it itself, and reads it when it compiles
    return {k: v for k, v in env.items() if k.startswith(READ_AT_IMPORT) and k != own}


class Server:
    "The process that is forked"

    def __init__(self):
        clean = {k: v for k, v in os.environ.items() if k not in ('IN_TEST', 'PYTHONPATH')}
        self.read = read_at_import(clean)
        command, pipe = [sys.executable, '-W', 'ignore', __file__], subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=clean)
        atexit.register(self.end)

    def end(self):
        self.process.stdin.close()
        self.process.wait()

    def ask(self, **asked):
        self.process.stdin.write(json.dumps(asked).encode() + b'\n')
        self.process.stdin.flush()

    def answer(self, seconds, words):
        "A number that it says"
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise subprocess.TimeoutExpired(words, seconds)
        if not (line := self.process.stdout.readline()):
            raise RuntimeError('The process that is forked has ended.')
        return int(line)


@functools.cache
def server():
    "One for a process of pytest, started where a test needs it first"
    return Server()


def forked(words, cwd, timeout, env):
    "As `subprocess.run` of python with ['-m', module, ...], ['-c', code, ...]; ['notebook', path]"
    words = [str(word) for word in words]
    assert read_at_import(env) == server().read, 'read by libraries: this needs a fresh process'
    with tempfile.TemporaryDirectory() as place:
        streams = [str(Path(place) / name) for name in ('out', 'err')]
        for name in streams:
            Path(name).touch()
        server().ask(words=words, cwd=str(cwd), env=env, streams=streams)
        pid = server().answer(120, words)
        try:
            code = server().answer(timeout, words)
        except subprocess.TimeoutExpired:
            os.kill(pid, signal.SIGKILL)
            server().answer(120, words)
            raise
        said = [Path(name).read_text(encoding='utf-8', errors='replace') for name in streams]
    return subprocess.CompletedProcess(words, code, *said)


if __name__ == '__main__':
    serve()
