"""serve.py and playground.py as processes, and runs for them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from command_line import ROOT, run

TINY = {"N_LAYER": "1", "N_HEAD": "2", "N_EMBD": "16", "BLOCK_SIZE": "128", "MAX_ITERS": "30", "TEST_MODE": "True"}
TEXT = ROOT / "tests" / "fixtures" / "text.txt"
LONG = "200000"  # tokens that take minutes


def clean_environment() -> dict[str, str]:
    """This process's, with no setting of ours."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("LORA_", "USE_LORA", "TEST_MODE", "SERVE_"))}


@contextmanager
def serving(
    folder: Path, *flags: str, command: str = "serve.py", **environ: str
) -> Iterator[tuple[str, subprocess.Popen]]:
    """The base URL of a server in a folder with runs, and its process."""
    port = () if "--port" in flags else ("--port", "0")
    server = subprocess.Popen(
        [sys.executable, ROOT / command, *port, *flags], cwd=folder, env=clean_environment() | environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        told = ""
        while not (found := re.search(r"(http://\S+/v1) is the base URL", told)):
            line = server.stdout.readline()
            assert line, f"the server ended: {told}"
            told += line
        yield found[1], server
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def train(folder: Path, *runs: dict[str, str]) -> None:
    """Train tiny runs in a folder, one after the other."""
    for environ in runs:
        done = run(folder, folder, "training.py", **(TINY | {"LORA_RANK": "4"} | environ))
        assert not done.returncode, done.stderr


def weather(folder: Path) -> str:
    """The name of a file of instructions that is put into the folder."""
    answers = ("a hat", "a coat", "boots", "a scarf")
    pairs = [{"instruction": f"What do I wear on day {i}?", "output": f"Wear {answers[i % 4]}."} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return "pairs.jsonl"
