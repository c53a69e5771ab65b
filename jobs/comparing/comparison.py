"""Full fine-tuning against LoRA, paired: the same base, the same batches, steps taken in turn."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.text import tokens_of, validation_windows
from jobs.adapting.adapted import load_text
from jobs.comparing.memory import peak_memory
from jobs.runs.job import Job, prepare
from lora.attach import activate
from runtime.console import say
from runtime.device import Machine
from runtime.errors import UserError
from runtime.progress import Progress
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from runtime.storage.runs import Run
from runtime.training.batch import Batch
from runtime.training.steps import Stepper, evaluate

PHASES = ("forward", "backward", "optimizer")


@dataclass
class Method:
    """One way to adapt the base, with the clocks and losses of its run.

    seconds: by phase, one value a step. curve: (steps, seconds of training so far, validation loss).
    """

    label: str
    job: Job
    stepper: Stepper
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    def step(self, step: int) -> None:
        """One step, its phases timed with the device waited for."""
        spent, machine = dict.fromkeys(PHASES, 0.0), self.job.machine
        machine.synchronize()
        last = time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal last
            machine.synchronize()
            now = time.perf_counter()
            spent[phase] += now - last
            last = now

        self.stepper.lap = lap
        self.stepper.step(step)
        for phase, values in self.seconds.items():
            values.append(spent[phase])

    def evaluate(self, step: int) -> float:
        """Held-out loss after so many steps, put on the curve. Raises NonFiniteError where a step went wrong."""
        if step:
            self.stepper.read_loss()
        loss = self.job.evaluate(self.job.settings.eval_iters)
        self.curve.append((step, sum(map(sum, self.seconds.values())), loss))
        return loss

    def loss_after(self, seconds: float) -> float:
        """Validation loss after so many seconds of training, between the points of the curve in a straight line."""
        before = self.curve[0]
        for point in self.curve[1:]:
            if point[1] >= seconds:
                share = (seconds - before[1]) / max(point[1] - before[1], 1e-9)
                return before[2] + share * (point[2] - before[2])
            before = point
        return before[2]


def make_method(label: str, given: dict[str, Any], machine: Machine, base: Run) -> Method:
    """A method with these settings beside their defaults, ready for its first step."""
    settings = Settings.from_dict(given | {"base": str(base.folder.resolve())})
    job = prepare(Resolved(settings, {name.upper(): "compare.py" for name in given}), machine, base)
    return Method(label, job, job.stepper())


def base_windows(job: Job, base: Run) -> list[Batch]:
    """Held-out text of the base's own corpus, on which forgetting is measured, in windows as long as the job's; none
    where nobody knows what the base was trained on, as with a pretrained one.

    Raises UserError where that text is gone.
    """
    if not base.metadata["settings"]["dataset"]:
        return []
    data_dir, limits = Path(job.settings.data_dir), (job.settings.batch_size, job.settings.eval_iters)
    try:
        text = load_text(base.metadata["settings"]["dataset"], base, data_dir).validation
        tokens = tokens_of(text, job.tokenizer, data_dir)
        return validation_windows(tokens, min(job.settings.block_size, len(tokens) - 1), *limits)
    except UserError as error:
        raise UserError(f"forgetting is measured on the text of the base {base.name}: {error}") from error


def untouched(method: Method, windows: list[Batch]) -> float:
    """Loss of the base itself on these windows, through a method that has not taken a step yet."""
    if method.job.kind != "lora":
        return evaluate(method.job.model, windows, method.job.machine)
    activate(method.job.model)
    loss = evaluate(method.job.model, windows, method.job.machine)
    activate(method.job.model, "default")
    return loss


def row(method: Method, equal_seconds: float, forgetting: tuple[float | None, float | None]) -> dict[str, Any]:
    """What one seed shows of a method."""
    info = method.job.model.get_parameter_info()
    return {
        "method": method.label,
        "adapter": info["lora"],
        "embeddings": info["embedding"] if method.job.kind == "lora" else 0,
        "trainable": info["trainable"],
        "trainable_percent": 100 * info["trainable"] / info["total"],
        "seconds": method.seconds,
        "tokens_per_step": method.job.data.tokens_in_step,
        "file_bytes": sum(map(len, method.job.artifact_files().values())),
        "learning_rate": method.job.settings.learning_rate,
        "loss_before": method.curve[0][2],
        "loss_at_equal_steps": method.curve[-1][2],
        "loss_at_equal_seconds": method.loss_after(equal_seconds),
        "base_text_loss_before": forgetting[0],
        "base_text_loss_after": forgetting[1],
        "curve": method.curve,
    }


def take_steps(methods: list[Method]) -> None:
    """All steps of all methods, a step each in turn, so that what disturbs the machine disturbs all alike."""
    s = methods[0].job.settings
    progress = Progress("compare", s.max_iters, 0, every_steps=s.log_interval)
    for method in methods:
        method.evaluate(0)
    for step in range(s.max_iters):
        for method in methods:
            method.step(step)
        done = step + 1
        if done % s.eval_interval == 0 or done == s.max_iters:
            losses = {method.label: f"{method.evaluate(done):.3f}" for method in methods}
            progress.update(done, **losses)
        progress.update(done)
    progress.close()


def compare(methods: list[Method], base: Run, machine: Machine) -> list[dict[str, Any]]:
    """Run the comparison with one seed; one row of results a method, without peak memory."""
    windows = base_windows(methods[0].job, base)
    before = untouched(methods[0], windows) if windows else None
    take_steps(methods)
    seconds = min(method.curve[-1][1] for method in methods)
    after = [evaluate(method.job.model, windows, machine) if windows else None for method in methods]
    return [row(method, seconds, (before, loss)) for method, loss in zip(methods, after, strict=True)]


def with_memory(rows: list[dict[str, Any]], methods: list[Method], machine: Machine) -> list[dict[str, Any]]:
    """The rows with the peak memory of each method, where it can be measured."""
    say("Measuring memory, a fresh process for each method ...")
    peaks = [None if machine.device.type == "mps" else peak_memory(method.job.settings) for method in methods]
    return [row | {"peak_memory": peak} for row, peak in zip(rows, peaks, strict=True)]
