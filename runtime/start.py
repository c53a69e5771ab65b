"""Imported first by every command: what must hold while the heavy packages are still being imported."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "tiktoken", "rustbpe", "dotenv", "tqdm", "safetensors", "filelock")


def open_closed_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr (as daemons and pythonw are) empty ones.

    The numbers 0 to 2 are taken too: the next file to be opened would get one, and with it whatever a library prints.
    """
    while os.name != "nt" and (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    if os.name != "nt":
        os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process


def end_on_ctrl_c() -> None:
    """Let Ctrl-C end the process at once and without a traceback, until `run_command` takes over."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as it is after `&`
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def raise_on_ctrl_c() -> None:
    """Undo `end_on_ctrl_c`: Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def importing() -> Iterator[None]:
    """For imports that take a second, as torch's, which --help and a wrong flag need not wait for. Meanwhile Ctrl-C
    ends the process at once."""
    end_on_ctrl_c()
    yield
    raise_on_ctrl_c()


def python_command() -> str:
    """What to type for the interpreter that runs this: `python` where that is the one, else its path."""
    path = Path(sys.executable)
    if shutil.which("python") == sys.executable:
        return "python"
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return subprocess.list2cmdline([str(path)]) if os.name == "nt" else shlex.quote(str(path))


def command_line(script: str, *words: str) -> str:
    """A command of ours as it can be typed here and now: with this interpreter, from this folder, on the same runs."""
    given, runs = sys.argv[1:], []
    for i, word in enumerate(given):
        if word.replace("_", "-").startswith("--checkpoints-dir") and word not in words:
            runs = [word] if "=" in word else given[i : i + 2]
    words = (script if Path.cwd() == ROOT else str(ROOT / script), *words, *runs)
    return f"{python_command()} {subprocess.list2cmdline(words) if os.name == 'nt' else shlex.join(words)}"


def install_line(requirements: str) -> str:
    """The command that installs what one of our requirements files lists."""
    path = requirements if Path.cwd() == ROOT else str(ROOT / requirements)
    return f"{python_command()} -m pip install -r {shlex.quote(path)}"


def check_packages() -> None:
    """Exit with one line where a package is missing."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        sys.exit(f"error: not installed for this Python: {', '.join(missing)}; try: {install_line('requirements.txt')}")


_main = getattr(sys.modules["__main__"], "__file__", None)
if _main and Path(_main).resolve().parent == ROOT:  # one of our commands is what runs
    open_closed_streams()
    end_on_ctrl_c()
    check_packages()
