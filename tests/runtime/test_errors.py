"""How a command ends: one line on stderr and an exit status, never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import UsageError, UserError
from runtime.processes.command import LESS_MEMORY
from runtime.storage.folders import CorruptedError
from runtime.training.steps import NonFiniteError

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys, time
from runtime.errors import UsageError, UserError
from runtime.processes.command import run_command
def main():
    {body}
run_command(main)
"""


def start(body: str, stdout=subprocess.PIPE, **environ: str) -> subprocess.Popen:
    """A command whose main has this body, with Python's own buffering."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LC_", "LANG"))}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        cwd=ROOT,
        env=clean | environ,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )


def ended(body: str, **environ: str) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    with start(body, **environ) as process:
        out, err = process.communicate(timeout=30)
    return process.returncode, out.decode(), err.decode().replace("\r\n", "\n")


@pytest.mark.parametrize(
    ("body", "status", "err"),
    [
        ("print('done')", 0, ""),
        ("print('done'); raise UserError('the disk is full: free some')", 1, "error: the disk is full: free some\n"),
        ("print('done'); raise UsageError('SEED=x: a number')", 2, "error: SEED=x: a number\n"),
        ("print('done'); raise KeyboardInterrupt", 130, "\nstopped\n"),
        ("print('done'); raise MemoryError", 1, f"error: out of memory; {LESS_MEMORY}\n"),
        ("print('done'); import torch; torch.empty(2**45)", 1, f"error: out of memory; {LESS_MEMORY}\n"),
        ("print('done'); import torch; raise torch.OutOfMemoryError", 1, f"error: out of memory; {LESS_MEMORY}\n"),
        (
            "print('done'); raise UserError('a  b.txt\\n\\tis\\u2028corrupted\\x1b[2J')",
            1,
            "error: a  b.txt is corrupted [2J\n",
        ),
    ],
)
def test_how_a_command_ends(body, status, err):
    got, out, told = ended(body)
    assert (got, out.split()) == (status, ["done"]), "what was printed before is not lost"
    assert told == err


@pytest.mark.parametrize("body", ["raise ZeroDivisionError('a bug')", "open('a bug')"])
def test_what_is_no_fault_of_the_users_keeps_its_traceback(body):
    status, _, err = ended(body)
    assert status == 1 and "Traceback" in err and "a bug" in err


@pytest.mark.parametrize("environ", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}, {}])
def test_signs_that_a_console_cannot_show_are_no_error(environ):
    status, out, err = ended(r"print('\U0001f527 \xe9 \udcff'); raise UserError('caf\xe9 \u2260 \udcff')", **environ)
    assert (status, out.split(), err) == (1, ["🔧", "é", "?"], "error: café ≠ ?\n")


BROKEN = {
    "a long text": ("[print('x' * 1000, flush=True) for _ in range(1000)]", 141, ""),
    "a short text, written at the end": ("print('x')", 141, ""),
    "a short text before an error": ("print('x'); raise UserError('it failed')", 1, "error: it failed\n"),
}


@pytest.mark.parametrize(("body", "status", "err"), BROKEN.values(), ids=BROKEN)
def test_a_reader_that_goes_away_ends_a_command_quietly(body, status, err):
    read, write = os.pipe()
    with start(body, stdout=write) as process:
        os.close(write)
        os.close(read)
        told = process.communicate(timeout=30)[1].decode()
    assert (process.returncode, told) == (status, err)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
@pytest.mark.parametrize("body", ["print('x')", "print('x', flush=True)", "print('x' * 10**6)"])
def test_results_that_cannot_be_written_are_one_line(body):
    with Path("/dev/full").open("w") as full, start(body, stdout=full) as process:
        told = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 1 and told.startswith("error: could not write the results: ") and told.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise there")
def test_ctrl_c_is_one_word():
    with start("print('ready', flush=True); time.sleep(60)") as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=30)[1].decode()
    assert (process.returncode, told) == (130, "\nstopped\n")


def test_kinds_of_errors_and_their_status():
    assert (UserError.status, UsageError.status, CorruptedError.status, NonFiniteError.status) == (1, 2, 1, 1)
    assert all(issubclass(kind, UserError) for kind in (UsageError, CorruptedError, NonFiniteError))
    assert not issubclass(UserError, OSError | ValueError), "nothing that means one of these catches it"
