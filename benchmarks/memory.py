"""Peak memory of steps, each in a fresh process: LoRA against full, what is made again, 4-bit bases.

python -m benchmarks.memory                          our own sizes: 0.8M to 85M parameters
python -m benchmarks.memory --base FOLDER            a pretrained base too, and transformers with PEFT on it
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import peers
from benchmarks.contest import SIZES, close, parser, tell
from benchmarks.peaks import peak_of, told_peak
from benchmarks.pretrained import ours, theirs
from jobs.comparing.timing import repeatable
from lora.attach import attach
from lora.config import LoRAConfig
from models.files import from_files, to_files
from runtime.device import pick_machine
from runtime.processes.command import run_command
from runtime.storage import folders
from runtime.storage.quantized import quantize

STEPS = 4


@dataclass(frozen=True)
class Case:
    """A training whose peak is measured. keeps: CHECKPOINT_ACTIVATIONS. form: QUANTIZE. base: a Hugging Face folder,
    trained in windows of at most 256 tokens; else one of our SIZES. peer: by transformers, PEFT and bitsandbytes."""

    size: str
    tokens: int
    kind: str
    keeps: str = "none"
    form: str = "none"
    base: str = ""
    peer: bool = False

    def __str__(self) -> str:
        parts = [self.kind, self.form if self.form != "none" else "", self.keeps if self.keeps != "none" else ""]
        return " ".join(filter(None, parts)) + (", by its peers" if self.peer else "")


FULL, LORA = (Case("10.7M", 4096, kind) for kind in ("full", "lora"))
LARGE = Case("85M", 1024, "full")
Row = tuple[Case, Case, float | None]  # one, as a share of the other, and the goal
ROWS: dict[str, list[Row]] = {
    "10.7M": [
        (replace(LORA, keeps="cheap"), FULL, 0.72),
        (LORA, FULL, None),
        (replace(LORA, keeps="cheap"), replace(FULL, keeps="cheap"), 0.85),
        (replace(LORA, keeps="block"), replace(FULL, keeps="block"), 0.85),
        (replace(LORA, keeps="block"), FULL, 0.45),
    ],
    "85M": [
        (replace(LARGE, kind="lora", form="nf4", keeps="block"), LARGE, 0.16),
        (replace(LARGE, kind="lora", keeps="cheap"), LARGE, None),
    ],
}


def rows_of_size(size: str) -> list[Row]:
    """The rows of one of our sizes."""
    tokens = (4096, 1024) if size != "tiny" else (64,)
    return ROWS.get(size) or [(Case(size, each, "lora", "cheap"), Case(size, each, "full"), None) for each in tokens]


def rows_of(base: str) -> list[Row]:
    """The rows of a pretrained base."""
    full, lora = (Case("", 1024, kind, base=base) for kind in ("full", "lora"))
    nf4, block = replace(lora, form="nf4"), replace(lora, keeps="block")
    return [
        (replace(lora, keeps="cheap"), full, 0.45),
        (replace(nf4, keeps="block"), block, 0.75),
        (replace(lora, keeps="cheap"), replace(lora, peer=True), 0.7),
        (replace(nf4, keeps="cheap"), replace(nf4, peer=True), 0.7),
        (replace(nf4, keeps="block"), replace(nf4, keeps="block", peer=True), 0.7),
    ]


def model_of(case: Case, folder: str) -> nn.Module:
    """What the case trains; the files of a base of its size are in the folder."""
    lora = case.kind == "lora"
    if case.peer:
        return theirs(Path(case.base), "bf16", lora, 0.05, case.form, case.keeps == "block")
    if case.base:
        model = ours(Path(case.base), "bf16", lora, 0.05, case.form)
    else:
        model = from_files(folders.read_folder(Path(folder)), folder, form=case.form)
        if lora:
            attach(model, LoRAConfig(8, 16, targets="all"))
    model.checkpoint_activations = case.keeps
    return model


def child(case: Case, folder: str) -> None:
    """What a fresh process does: build, take the steps, print the bytes. A tiny model before that loads what torch
    loads at its first step, and what the packages load."""
    machine = pick_machine("cpu" if not torch.cuda.is_available() else "cuda", "auto")
    step_of(peers.ours(SIZES["tiny"], lora=True), SIZES["tiny"][0], 16, 16, machine)()
    if case.form != "none":
        quantize(case.form, torch.zeros(64, 64), "").dense()
    if case.peer:
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        import transformers  # noqa: F401
    with told_peak(machine):
        model = model_of(case, folder)
        step = step_of(model, vocabulary_of(case), case.tokens, 256 if case.base else SIZES[case.size][-1], machine)
        for _ in range(STEPS):
            step()


def vocabulary_of(case: Case) -> int:
    """How many tokens there are."""
    return json.loads(Path(case.base, "config.json").read_bytes())["vocab_size"] if case.base else SIZES[case.size][0]


def step_of(model: nn.Module, vocabulary: int, tokens: int, context: int, machine: Any) -> Any:
    """A step of so many tokens, which are always the same."""
    torch.manual_seed(0)
    stepper = repeatable(model, torch.randint(vocabulary, (tokens // context, context + 1)), machine)
    return lambda: stepper.step(0)


def peak(case: Case) -> int:
    """Bytes at the peak of a few steps less those before the model was built."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent, "base")
        if not case.base:
            folders.commit_folder(folder, to_files(peers.ours(SIZES[case.size])))
        return peak_of(str(case), "benchmarks.memory", "--child", json.dumps(asdict(case)), str(folder))


def measure(one: Case, other: Case, goal: float | None, rounds: int, known: dict[Case, list[int]]) -> dict[str, Any]:
    """A row. known: the peaks that were measured already."""
    for case in (one, other):
        known[case] = known.get(case) or [peak(case) for _ in range(rounds)]
    ratios = [a / b for a, b in zip(known[one], known[other], strict=True)]
    bytes_ = [statistics.median(known[case]) for case in (one, other)]
    where = Path(one.base).name if one.base else one.size
    megabytes = [f"{round(value / 1e6):,}" for value in bytes_]
    return {
        "what": f"{where}, {one.tokens} tokens: {one} / {other} ({megabytes[0]} of {megabytes[1]} MB)",
        "one": asdict(replace(one, base=Path(one.base).name)),
        "other": asdict(replace(other, base=Path(other.base).name)),
        "one_bytes": bytes_[0],
        "other_bytes": bytes_[1],
        "median": bytes_[0] / bytes_[1],
        "min": min(ratios),
        "max": max(ratios),
        "goal": goal,
    }


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--base", default="", help="a Hugging Face folder")
    flags.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.8M", "3.2M", "10.7M", "85M"])
    flags.add_argument("--child", nargs=2, help="what a process of its own measures")
    options = flags.parse_args()
    if options.child:
        return child(Case(**json.loads(options.child[0])), options.child[1])
    rows, known = [], {}
    asked = [row for size in options.sizes for row in rows_of_size(size)]
    for one, other, goal in asked + (rows_of(options.base) if options.base else []):
        rows.append(measure(one, other, goal, options.rounds, known))
        tell(rows[-1:])
    return close("memory", rows, options.record)


if __name__ == "__main__":
    run_command(main)
