"""Our commands as processes that need not import torch: each is forked from a process that has.

A command by itself takes 3 seconds of a core before its first line runs, nearly all of them torch's import. `run` has
one process for each process of the tests that has imported other people's packages, none of ours, and started no
thread; it forks a child for each command, in the folder, environment and streams of that. How a command starts, and its
signals, are tested with processes of their own.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_server: list[subprocess.Popen] = []


def run(
    words: Sequence[Any], cwd: Path, env: Mapping[str, str], typed: str = "", timeout: int = 120
) -> subprocess.CompletedProcess:
    """Run a script of ours with its arguments: what subprocess.run gives with text that it captured."""
    words = [str(word) for word in words]
    if "PYTHONPATH" in env:  # which is read when Python starts
        return subprocess.run(
            [sys.executable, *words], cwd=cwd, env=env, capture_output=True, encoding="utf-8", input=typed,
            timeout=timeout, check=False,
        )  # fmt: skip
    with tempfile.TemporaryDirectory() as streams:
        (Path(streams) / "0").write_text(typed, "utf-8")
        about = {"words": words, "cwd": str(cwd), "env": dict(env), "streams": streams, "timeout": timeout}
        if not _server:
            _server.append(_started())
        print(json.dumps(about), file=_server[0].stdin, flush=True)
        status = json.loads(_server[0].stdout.readline())
        out, err = ((Path(streams) / name).read_text("utf-8", "replace") for name in "12")
    if status is None:
        raise subprocess.TimeoutExpired(words, timeout, out, err)
    return subprocess.CompletedProcess(words, status, out, err)


def _started() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    atexit.register(server.terminate)
    return server


def _serve() -> None:
    """Fork a child for each line of standard input, and print how it ended."""
    import numpy  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    from torch import _dynamo  # noqa: F401 - what the first optimizer would import

    for extra in ("matplotlib.backends.backend_agg", "datasketch"):  # the two that take long
        with suppress(ImportError):
            importlib.import_module(extra)
    gc.freeze()  # else a child's first collection looks at, and so copies, all that was imported
    for line in sys.stdin:
        about = json.loads(line)
        child = multiprocessing.get_context("fork").Process(target=_become, args=(about,))
        child.start()
        child.join(about["timeout"])
        ended = child.exitcode
        if ended is None:
            child.kill()
            child.join()
        print(json.dumps(ended), flush=True)


def _become(about: dict[str, Any]) -> None:
    """Be the command, in this process for good.

    It ends as processes of multiprocessing do: its threads have ended and its streams are flushed, but the packages are
    not taken apart object by object, which takes longer than most commands. That a command ends well where they are is
    seen by the tests that start processes of their own.
    """
    for fd in range(3):
        file = os.open(f"{about['streams']}/{fd}", os.O_RDWR | os.O_CREAT)
        os.dup2(file, fd)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(fd, mode, encoding="utf-8") for fd, mode in enumerate("rww"))
    os.chdir(about["cwd"])
    os.environ.clear()
    os.environ.update(about["env"])
    script, *_ = sys.argv = about["words"]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


if __name__ == "__main__":
    _serve()
