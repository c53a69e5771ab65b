"""The commands of docs/instructions.md, from a CSV file to a judged adapter, on a tiny base for the real one."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

from tests import warm
from tests.pretrained.tiny_chats import CHATML
from tests.pretrained.tiny_models import make, save

ROOT = Path(__file__).resolve().parents[2]
REAL = "HuggingFaceTB/SmolLM2-135M-Instruct"
KEPT = ("PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS", "XDG_CACHE_HOME")
QUICK = {"DEVICE": "cpu", "DATA_DIR": "cache", "BLOCK_SIZE": "64", "EPOCHS": "0.2", "HF_HUB_OFFLINE": "1"}


def commands() -> list[str]:
    """The lines of the page's shell blocks, but for those that install packages."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "instructions.md").read_text("utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "pip install" not in line]


def test_the_walk_of_the_page(tmp_path: Path) -> None:
    save(make("llama", noise=0.02), tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").write_text(CHATML)
    shutil.copy(ROOT / "tests" / "fixtures" / "weather.csv", tmp_path / "pairs.csv")
    environment = {key: value for key, value in os.environ.items() if key in KEPT} | QUICK
    told, ran = {}, []
    for line in commands():
        if line.startswith("export "):
            name, _, value = line.removeprefix("export ").partition("=")
            environment[name] = value
        elif line.startswith("python "):
            command, *words = shlex.split(line.replace(REAL, "./base").removeprefix("python "))
            words += ("--limit", "4") if command == "evaluate.py" else ()
            words += ("--max-new-tokens", "8") if command in ("evaluate.py", "generate.py") else ()
            done = warm.run([ROOT / command, *words], tmp_path, environment, typed="Hot?\n")
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            ran.append(command)
            told[line] = done.stdout + done.stderr
    assert {"dataset.py", "training.py", "generate.py", "evaluate.py"} <= set(ran)
    lint = next(text for line, text in told.items() if " lint " in line)
    for fault in ("boilerplate         1", "duplicate           2", "contradiction       1", "personal            1"):
        assert fault in lint
    assert "Verdict: on 4 prompts" in next(text for line, text in told.items() if "evaluate.py" in line)
