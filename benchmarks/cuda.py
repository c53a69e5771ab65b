"""Training steps on a CUDA GPU, all weights and LoRA, eager and compiled, beside nanoGPT's own step and PEFT.

python -m benchmarks.cuda --nanogpt DIR              the table, at 124M parameters; DIR holds nanoGPT's own model.py
python -m benchmarks.cuda --eager                    without what is compiled, which takes minutes to do
python -m benchmarks.cuda --device cpu --sizes tiny --rounds 1     a rehearsal where there is no GPU

All are of GPT-2's shape with a tied head, in bf16 under autocast, without dropout. A step is the forward and backward
pass, clipping and AdamW's update, on windows of random tokens that come from the host as in training. LoRA has rank 8
on all linears of the blocks.
"""

from __future__ import annotations

import gc
import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import peers
from benchmarks.contest import SIZES, close, parser, ratio, take_turns, tell
from benchmarks.peaks import row
from benchmarks.waits import row_of_waits
from data.corpora import Corpus
from data.text import TextData
from lora.attach import attach
from lora.config import LoRAConfig
from lora.optim import after_steps, extra_losses, make_optimizer
from models.config import ModelConfig
from models.transformer import Transformer
from runtime.console import say
from runtime.device import Machine, check_compiler, pick_machine
from runtime.errors import UserError
from runtime.processes.command import run_command
from runtime.progress import Patience
from runtime.training.steps import Schedule, Stepper

RATE, BETAS, DECAY = 1e-4, (0.9, 0.95), 0.1
STEPS = 5  # a turn, which nobody waits for before its end, as in training
TOKENS = 2**20  # of the random text
LORA = {"LoRA": False, "LoRA with embeddings": True}  # whether copies of the embeddings train with the adapter
PAIRS = (  # (one, other, goal at 124M where both are compiled)
    ("LoRA", "full", 0.75),
    ("LoRA with embeddings", "full", None),
    ("LoRA", "PEFT", None),
    ("full", "nanoGPT", None),
    ("LoRA", "nanoGPT", None),
)

Step = Callable[[int], None]  # called with the number of the step


@dataclass(frozen=True)
class Contest:
    """What all contestants of a size have in common."""

    size: str
    data: TextData
    machine: Machine
    nanogpt: ModuleType | None

    @property
    def what(self) -> str:
        """In words."""
        return f"{self.size}, {self.data.step_size} x {self.data.block_size}"

    def model(self, kind: str) -> nn.Module:
        """The model of a contestant that steps as ours does, with fresh weights."""
        vocab, width, heads, layers, context = size = SIZES[self.size]
        if kind == "PEFT":
            return peers.transformers_peft(size, tied=True).to(self.machine.device)
        config = ModelConfig(vocab, width, layers, heads, max_positions=context, tied_head=True)
        model = Transformer(config, device=self.machine.device)
        if kind in LORA:
            attach(model, LoRAConfig(8, 16, targets="all-linear", train_embeddings=LORA[kind]))
        return model

    def stepper(self, kind: str, compiled: bool) -> Stepper:
        """The steps that training takes, as `jobs/runs/job.py` makes them."""
        model = self.model(kind)
        own = {"extra_losses": extra_losses(model), "after_steps": after_steps(model, 1_000)}
        optimizer, schedule = make_optimizer(model, BETAS, DECAY), Schedule(RATE, RATE, 0, 1)
        return Stepper(model, optimizer, schedule, self.data.batch, self.machine, seed=0, compile=compiled, **own)

    def nanogpt_step(self, compiled: bool) -> Step:
        """nanoGPT's step, line by line as its train.py takes it in bf16, where its GradScaler does nothing."""
        vocab, width, heads, layers, context = SIZES[self.size]
        shape = {"vocab_size": vocab, "n_embd": width, "n_head": heads, "n_layer": layers, "block_size": context}
        device, config = self.machine.device, self.nanogpt.GPTConfig(**shape, bias=False, dropout=0.0)
        with redirect_stdout(StringIO()):  # it prints how many parameters it has
            model = self.nanogpt.GPT(config).to(device)
            optimizer = model.configure_optimizers(DECAY, RATE, BETAS, device.type)
        called = torch.compile(model) if compiled else model

        def get_batch(i: int) -> list[torch.Tensor]:
            batch = self.data.batch(i)
            both = [batch.tokens, batch.targets]
            return [t.pin_memory().to(device, non_blocking=True) if self.machine.is_cuda else t for t in both]

        following = [get_batch(0)]

        def step(i: int) -> None:
            X, Y = following.pop()
            with self.machine.autocast():
                _, loss = called(X, Y)
            following.append(get_batch(i + 1))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step


@dataclass(frozen=True)
class Contestant:
    """Steps that are compiled and warm. peak: bytes beyond those before it was built; waits: a row of them; both None
    where they were not measured."""

    take: Callable[[], None]  # the next turn
    peak: int | None = None
    waits: dict[str, Any] | None = None

    @classmethod
    def of(cls, contest: Contest, way: str, kind: str) -> Contestant:
        """Build one, and measure what needs no other."""
        gc.collect()
        machine, compiled, stepper = contest.machine, way == "compiled", None
        before = machine.restart_peak_memory()
        if kind == "nanoGPT":
            step = contest.nanogpt_step(compiled)
        else:
            stepper = contest.stepper(kind, compiled)
            step = stepper.step
        take = partial(turn, step, itertools.count())
        take()
        if not machine.is_cuda:
            return cls(take)
        machine.restart_peak_memory()  # to compile may have taken more
        take()
        peak = machine.peak_memory() - before
        ours, what = kind in ("full", *LORA), f"{contest.what}: {way} {kind}"
        waits = row_of_waits(what, take, STEPS, stepper) if ours else None
        return cls(take, peak, waits)


def turn(step: Step, numbers: Iterator[int]) -> None:
    """Take the next steps."""
    for _ in range(STEPS):
        step(next(numbers))


def measure(contest: Contest, ways: list[str], rounds: int) -> list[dict[str, Any]]:
    """The rows of one size: each contestant by itself, pairs of them, and waits."""
    torch.compiler.reset()  # a second size would be compiled for any size
    kinds = ["full", *LORA, "PEFT", *(["nanoGPT"] if contest.nanogpt else [])]
    ready, patience = {}, Patience(contest.what, "contestant")
    for way, kind in (asked := list(itertools.product(ways, kinds))):
        if way == "compiled":
            say(f"{contest.what}: compiling {kind}, which takes a minute or so")
        ready[f"{way} {kind}"] = Contestant.of(contest, way, kind)
        patience(len(ready), len(asked))
    seconds = take_turns({name: contestant.take for name, contestant in ready.items()}, rounds, contest.machine)
    pairs = [
        (f"{way} {one}", f"{way} {other}", goal if (way, contest.size) == ("compiled", "124M") else None)
        for way in ways
        for one, other, goal in PAIRS
    ] + [(f"compiled {kind}", f"eager {kind}", None) for kind in kinds]
    pairs = [pair for pair in pairs if ready.keys() >= {*pair[:2]}]
    rows = [alone(contest, name, seconds[name], contestant.peak) for name, contestant in ready.items()]
    for one, other, goal in pairs:
        rows.append({"what": f"{contest.what}: {one} / {other}"} | ratio(seconds, one, other) | {"goal": goal})
    for one, other, _ in pairs if contest.machine.is_cuda else ():
        rows.append(row(f"{contest.what}: peak memory, {one} / {other}", ready[one].peak / ready[other].peak, None))
    return rows + [contestant.waits for contestant in ready.values() if contestant.waits]


def alone(contest: Contest, name: str, seconds: list[float], peak: int | None) -> dict[str, Any]:
    """A row of the milliseconds of a step, with its tokens a second and its peak memory."""
    steps = [1e3 * each / STEPS for each in seconds]
    median = statistics.median(steps)
    speed, memory = 1e3 * contest.data.tokens_in_step / median, f", {peak / 1e6:,.0f} MB" if peak else ""
    told = {"what": f"{contest.what}: {name}, ms a step ({speed:,.0f} tokens/s{memory})"}
    told |= {"median": median, "min": min(steps), "max": max(steps)}
    return told | {"tokens_per_second": speed, "peak_bytes": peak}


def random_text(size: str, batch: int) -> TextData:
    """Windows of random tokens, as training takes them from a text."""
    vocab, *_, context = SIZES[size]
    tokens = np.random.Generator(np.random.Philox(0)).integers(0, vocab, TOKENS)
    return TextData(Corpus("random", "", ""), tokens, tokens, context, batch, batch, seed=0)


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=15)
    flags.add_argument("--sizes", nargs="+", choices=SIZES, default=["124M"])
    flags.add_argument("--batch", type=int, default=12, help="windows of a step")
    flags.add_argument("--nanogpt", type=Path, help="a folder with nanoGPT's own files")
    flags.add_argument("--eager", action="store_true", help="leave out what is compiled")
    options = flags.parse_args()
    machine, rows = pick_machine(options.device, "bf16"), []
    if not machine.is_cuda and (options.device != "cpu" or options.record):
        here = f"--device {options.device} takes the {machine.device.type} here, with torch {torch.__version__}"
        rehearsal = "--device cpu --sizes tiny --rounds 1 rehearses it without one, and keeps no figures"
        raise UserError(f"this needs a CUDA GPU, and {here}; {rehearsal}")
    if not options.eager:
        check_compiler(machine.device)
    nanogpt = peers.nanogpt(options.nanogpt) if options.nanogpt else None
    if not nanogpt:
        say("nanoGPT's own step is left out: --nanogpt DIR names a copy of its repository")
    if not machine.is_cuda:
        say("A rehearsal: peak memory and waits of the host are left out, and no figure here is one of a GPU")
    for size in options.sizes:
        contest = Contest(size, random_text(size, options.batch), machine, nanogpt)
        try:
            rows += (found := measure(contest, ["eager"] if options.eager else ["eager", "compiled"], options.rounds))
        except torch.OutOfMemoryError:
            raise UserError(f"{contest.what}: the GPU's memory is too small; lower --batch {options.batch}") from None
        tell(found)
    close("cuda", rows, options.record)


if __name__ == "__main__":
    run_command(main)
