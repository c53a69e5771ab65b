"""Instruction tuning: our step against TRL's SFTTrainer with PEFT, on the same records, template, batches and dtype.

python -m pip install trl==1.16.0                                       the peer, which nothing else here needs
python -m benchmarks.instructions --base FOLDER [--data pairs.jsonl]    by default records of the Folio speller
python -m benchmarks.instructions --base FOLDER --only memory           the peak of each, in a process of its own
python -m benchmarks.instructions --base FOLDER --packing               packed rows against padded ones, both ours;
                                                                        FOLDER may be a run of ours
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.contest import close, parser, ratio, take_turns, tell
from benchmarks.peaks import peak_of, row, told_peak
from benchmarks.pretrained import ours, theirs, with_our_adapter
from data.instructions.tuning import InstructionData, Sizes
from data.tokenizers import Tokenizer
from jobs.runs.base import Base
from jobs.runs.source import read_source_records, template_for
from lora.optim import make_optimizer
from models.pretrained.source import find_source
from runtime.device import Machine, pick_machine
from runtime.processes.command import run_command
from runtime.settings.config import Settings
from runtime.training.steps import Schedule, Stepper

ROWS, RATE = 8, 5e-4
STEPS = 10  # of which the peak memory is measured


def load(
    base: Path, dataset: str, data_dir: Path, packed: bool, rows: int = ROWS, template: str = ""
) -> tuple[InstructionData, Tokenizer]:
    """Records as batches of rows of at most 512 tokens, or as many as the base takes."""
    opened = Base.of(find_source(Path("checkpoints"), str(base)))
    tokenizer, longest = opened.tokenizer, min(512, opened.model.config.max_positions)
    records = read_source_records(dataset, "", 0.1, data_dir).head(2000, 20)
    sizes, how = Sizes(longest, rows, rows, seed=0, packed=packed), replace(Settings(), template=template)
    return InstructionData.load(records, template_for(how, tokenizer), tokenizer, data_dir, sizes), tokenizer


def our_step(model: nn.Module, data: InstructionData, machine: Machine) -> Stepper:
    """Steps of AdamW at a constant rate."""
    optimizer = make_optimizer(model.to(machine.device), (0.9, 0.999), 0.0, 1.0)
    return Stepper(model, optimizer, Schedule(RATE, RATE, 0, 1), data.batch, machine, seed=0)


class TheirSteps:
    """What SFTTrainer does in a step, called one at a time on our batches."""

    def __init__(self, model: nn.Module, data: InstructionData, folder: str, machine: Machine) -> None:
        import datasets
        import trl

        rows = itertools.chain(*(data.order(0)[step] for step in range(len(data.order(0)))))
        encoded = [data.train[data.rows[i][0]] for i in rows]
        columns = {
            "input_ids": [each.ids.tolist() for each in encoded],
            "completion_mask": [each.said.astype(int).tolist() for each in encoded],
        }
        how = trl.SFTConfig(
            folder, per_device_train_batch_size=ROWS, learning_rate=RATE, lr_scheduler_type="constant", report_to=[],
            max_length=513, completion_only_loss=True, weight_decay=0.0, shuffle_dataset=False,
            use_cpu=machine.device.type == "cpu", dataloader_pin_memory=False, disable_tqdm=True, bf16=False, seed=0,
            gradient_checkpointing=False,
        )  # fmt: skip
        self.trainer = trl.SFTTrainer(
            model, args=how, train_dataset=datasets.Dataset.from_dict(columns), processing_class=self._tokenizer(model)
        )
        self.trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(self.trainer.train_dataset)
        self.batches = iter(self.trainer.get_train_dataloader())
        self.trainer.create_optimizer()
        self.model, self.loss = self.trainer.model.train(), 0.0

    @staticmethod
    def _tokenizer(model: nn.Module) -> Any:
        import transformers

        return transformers.AutoTokenizer.from_pretrained(model.config._name_or_path)

    def step(self) -> None:
        """Loss, gradients, clipping and update, as the trainer's loop has them."""
        batch = next(self.batches)
        counted = self.trainer._get_num_items_in_batch([batch], self.trainer.args.device)
        self.loss = self.trainer.training_step(self.model, batch, counted).item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.trainer.optimizer.step()
        self.model.zero_grad()


def measure_peer(base: Path, dataset: str, data_dir: Path, rounds: int, device: str) -> list[dict[str, Any]]:
    """Our step as a share of TRL's, and how far the losses of the same steps are apart."""
    found = []
    for dtype, goal in (("bf16", 0.75), ("fp32", 0.75)):
        machine, (data, _) = pick_machine(device, dtype), load(base, dataset, data_dir, False)
        mine, its = ours(base, dtype, True, 0.0), theirs(base, dtype, True, 0.0)
        with_our_adapter(mine, its)
        with tempfile.TemporaryDirectory() as folder:
            peer, stepper = TheirSteps(its.model, data, folder, machine), our_step(mine, data, machine)
            steps, losses = itertools.count(), {"ours": [], "theirs": []}

            def our_one(stepper=stepper, steps=steps, losses=losses) -> None:
                stepper.step(next(steps))
                losses["ours"].append(stepper.read_loss())

            def their_one(peer=peer, losses=losses) -> None:
                peer.step()
                losses["theirs"].append(peer.loss)

            seconds = take_turns({"ours": our_one, "theirs": their_one}, rounds, machine)
        apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
        what = f"LoRA step on records, {dtype}: ours / TRL's; losses apart by at most {apart:.1e}"
        found.append({"what": what} | ratio(seconds, "ours", "theirs") | {"goal": goal})
        tell(found[-1:])
    return found


def peak(base: Path, dataset: str, data_dir: Path, who: str) -> None:
    """Print how many bytes a fresh process needs at most for the model and some steps in bf16, beyond the packages and
    the records, which are the same for both."""
    import trl  # noqa: F401

    # The peer goes without what `pick_machine` asks of the allocator.
    machine = pick_machine("cpu", "bf16") if who == "ours" else Machine(torch.device("cpu"), torch.bfloat16)
    data, _ = load(base, dataset, data_dir, False)
    with told_peak(machine), tempfile.TemporaryDirectory() as folder:
        if who == "ours":
            stepper, steps = our_step(ours(base, "bf16", True, 0.0), data, machine), itertools.count()

            def take() -> None:
                stepper.step(next(steps))

        else:
            take = TheirSteps(theirs(base, "bf16", True, 0.0).model, data, folder, machine).step
        for _ in range(STEPS):
            take()


def measure_memory(base: Path, dataset: str, data_dir: Path) -> list[dict[str, Any]]:
    """Our peak memory as a share of TRL's."""
    words = ("benchmarks.instructions", "--base", str(base), "--data", dataset, "--data-dir", str(data_dir))
    mine, its = (peak_of(f"steps of {who}", *words, "--peak", who) for who in ("ours", "theirs"))
    what = f"peak memory of LoRA steps on records, bf16: {mine / 1e6:,.0f} MB, TRL's {its / 1e6:,.0f} MB"
    tell(found := [row(what, mine / its, 0.8)])
    return found


def measure_packing(
    base: Path, dataset: str, data_dir: Path, rounds: int, device: str, rows: int, template: str
) -> list[dict[str, Any]]:
    """Seconds a record in packed rows as a share of those in padded ones."""
    machine, contestants, each, counted = pick_machine(device, "bf16"), {}, {}, {}
    for name, packed in (("packed", True), ("padded", False)):
        data, _ = load(base, dataset, data_dir, packed, rows, template)
        each[name] = len(data.train) / data.steps_in_epoch
        counted[name] = sum(int(one.said[1:].sum()) for one in data.train) / len(data.train)
        stepper, steps = our_step(ours(base, "bf16", True, 0.0), data, machine), itertools.count()
        contestants[name] = partial(lambda stepper, steps: stepper.step(next(steps)), stepper, steps)
    seconds = take_turns(contestants, rounds, machine)
    seconds = {name: [s / each[name] for s in times] for name, times in seconds.items()}
    speeds = ", ".join(f"{name} {counted[name] / statistics.median(seconds[name]):,.0f}" for name in seconds)
    what = f"seconds a record, bf16, {rows} rows: packed ({each['packed']:.0f} records a step) / padded "
    what += f"({each['padded']:.0f}); tokens a second that count: {speeds}"
    tell(found := [{"what": what} | ratio(seconds, "packed", "padded")])
    return found


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--base", type=Path, required=True, help="a Hugging Face folder; packed rows: or a run")
    flags.add_argument("--data", default="folio-pairs", help="what DATASET takes")
    flags.add_argument("--data-dir", type=Path, default=Path(Settings().data_dir))
    flags.add_argument("--packing", action="store_true", help="packed rows against padded ones, not the peer")
    flags.add_argument("--rows", type=int, default=ROWS, help="of a step, where rows are packed")
    flags.add_argument("--template", default="", help="what TEMPLATE takes, where rows are packed")
    flags.add_argument("--only", nargs="+", choices=("steps", "memory"), default=["steps", "memory"])
    flags.add_argument("--peak", choices=("ours", "theirs"), help="what a process of its own measures")
    options = flags.parse_args()
    what, how = (options.base, options.data, options.data_dir), (options.rounds, options.device)
    if options.peak:
        peak(*what, options.peak)
    elif options.packing:
        close("packing", measure_packing(*what, *how, options.rows, options.template), options.record)
    else:
        rows = measure_peer(*what, *how) if "steps" in options.only else []
        rows += measure_memory(*what) if "memory" in options.only else []
        close("instructions", rows, options.record)


if __name__ == "__main__":
    run_command(main)
