"""What saving memory costs: steps that make again what they do not keep, and steps on 4-bit bases, in time and in loss.

python -m benchmarks.levers                          our own sizes
python -m benchmarks.levers --base FOLDER            a pretrained base too, beside transformers, PEFT and bitsandbytes
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.contest import SIZES, close, parser, ratio, take_turns, tell
from benchmarks.memory import FULL, LARGE, LORA, Case, Row, model_of, step_of, vocabulary_of
from benchmarks.pretrained import ours, theirs
from data.corpora import load_corpus
from data.text import tokens_of, validation_windows
from jobs.runs.base import Base
from models.files import to_files
from models.pretrained.source import Pretrained
from runtime.device import pick_machine
from runtime.processes.command import run_command
from runtime.settings.config import Settings
from runtime.storage import folders
from runtime.training.steps import evaluate

LARGE_LORA = replace(LARGE, kind="lora", keeps="cheap")
ROWS: dict[str, list[Row]] = {
    "10.7M": [
        (replace(LORA, keeps="cheap"), LORA, 1.1),
        (replace(LORA, keeps="block"), LORA, None),
        (replace(FULL, keeps="cheap"), FULL, None),
    ],
    "85M": [
        (replace(LARGE_LORA, form="nf4"), LARGE_LORA, 1.05),
        (replace(LARGE_LORA, form="nf4", keeps="block"), LARGE, None),
    ],
}
HELD_OUT = 8  # batches of windows


def rows_of_size(size: str) -> list[Row]:
    """The rows of one of our sizes."""
    tokens = (4096, 1024) if size != "tiny" else (64,)
    return ROWS.get(size) or [(Case(size, each, "lora", "cheap"), Case(size, each, "lora"), 1.1) for each in tokens]


def rows_of(base: str) -> list[Row]:
    """The rows of a pretrained base."""
    lora = Case("", 1024, "lora", "cheap", base=base)
    nf4 = replace(lora, form="nf4")
    return [
        (replace(lora, keeps="none"), lora, None),
        (nf4, lora, 1.05),
        (nf4, replace(nf4, peer=True), 0.8),
        (lora, replace(lora, peer=True), 0.8),
    ]


def measure(one: Case, other: Case, goal: float | None, rounds: int) -> dict[str, Any]:
    """How long a step takes of the other's."""
    machine, steps = pick_machine("auto", "auto"), {}
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "base")
        if not one.base:
            folders.commit_folder(folder, to_files(peers.ours(SIZES[one.size])))
        for case in (one, other):
            context = 256 if case.base else SIZES[case.size][-1]
            steps[str(case)] = step_of(model_of(case, str(folder)), vocabulary_of(case), case.tokens, context, machine)
    where = Path(one.base).name if one.base else one.size
    what = f"{where}, {one.tokens} tokens: a step of {one} / {other}"
    return {"what": what} | ratio(take_turns(steps, rounds, machine), str(one), str(other)) | {"goal": goal}


def measure_loss(base: Path, data_dir: Path) -> list[dict[str, Any]]:
    """What nf4 adds to the loss on held-out text, ours and that of transformers with bitsandbytes."""
    machine = pick_machine("auto", "auto")
    tokens = tokens_of(load_corpus("folio", data_dir).validation, Base.of(Pretrained(base)).tokenizer, data_dir)
    windows, found = validation_windows(tokens, 256, 4, HELD_OUT), {}
    for form in ("none", "nf4"):
        for who, make in (("ours", ours), ("theirs", theirs)):
            model = make(base, "bf16", True, 0.0, form).to(machine.device)
            found[who, form] = evaluate(model, windows, machine)
            del model
    added = {who: found[who, "nf4"] - found[who, "none"] for who in ("ours", "theirs")}
    apart = abs(added["ours"] - added["theirs"])
    told = ", ".join(f"{who} {found[who, 'none']:.4f} and {found[who, 'nf4']:.4f}" for who in added)
    what = f"held-out loss in bf16 and nf4: {told}; what nf4 adds is apart by"
    return [{"what": what, "median": apart, "min": apart, "max": apart, "goal": 0.02, "added": added["ours"]}]


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--base", default="", help="a Hugging Face folder")
    flags.add_argument("--data-dir", type=Path, default=Path(Settings().data_dir))
    flags.add_argument("--sizes", nargs="*", choices=SIZES, default=["0.8M", "3.2M", "10.7M", "85M"])
    options, rows = flags.parse_args(), []
    torch.manual_seed(0)
    asked = [row for size in options.sizes for row in rows_of_size(size)]
    for row in asked + (rows_of(options.base) if options.base else []):
        rows.append(measure(*row, options.rounds))
        tell(rows[-1:])
    if options.base:
        rows += (found := measure_loss(Path(options.base), options.data_dir))
        tell(found)
    close("levers", rows, options.record)


if __name__ == "__main__":
    run_command(main)
