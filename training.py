"""Train a small GPT on all its weights, or adapt a trained one with LoRA.

python training.py                          train a base on Shakespeare
USE_LORA=True python training.py            adapt it to the First Folio's spelling (or: python training.py --use-lora)
BASE=base-shakespeare python training.py    fine-tune all its weights on the Folio instead
TEST_MODE=True python training.py           any of these as a quick run
"""

from __future__ import annotations

import math
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path

from jobs.base import base_settings, find_base
from jobs.job import Job, prepare, unread, unread_names
from jobs.postmortem import with_batch
from jobs.result import bits_per_character, sample, tell_next, tell_result, tell_samples
from jobs.selfcheck import Names, digests, self_check
from lora.adapter import Adapter
from lora.attach import using
from runtime import report, resume
from runtime.checkpoint import Run, RunLock, claim
from runtime.config import Settings, from_command_line
from runtime.console import say
from runtime.device import pick_machine
from runtime.errors import run_command
from runtime.interrupt import InterruptedRunError, Interruption
from runtime.metrics import MetricsLog, Progress
from runtime.sources import Resolved, describe
from runtime.steps import NonFiniteError, Stepper


class Training:
    """The steps of one run that are left to do, and the clock, log and progress that go with them."""

    def __init__(self, job: Job, run: Run, stepper: Stepper) -> None:
        self.job, self.run, self.stepper, self.state = job, run, stepper, resume.State()
        if saved := run.newest("step"):
            self.state = resume.restore(stepper, saved[1], f"{run.folder}/step-{saved[0]:06d}")
            say(f"Going on with {run.name} after step {self.state.step} of {job.settings.max_iters}")
        self.log = MetricsLog(run.folder / "metrics.jsonl", self.state.step)
        self.progress = Progress(run.name, job.settings.max_iters, self.state.step)
        self.first, self.before = self.state.step, self.state.seconds
        self.clock = time.perf_counter()

    def all_steps(self) -> resume.State:
        """Step until the last one, or until patience ends. However it ends, the log is whole up to there."""
        try:
            with Interruption() as interruption:
                while self.state.step < self.job.settings.max_iters and not self.impatient:
                    self.one_step()
                    if interruption.asked:
                        self.stop(interruption.asked)
        except KeyboardInterrupt:
            saved = self.run.saved("step")
            where = f"after step {saved[-1][0]}" if saved else "from the beginning"
            say(f"\nStopped at step {self.state.step}; the same command goes on {where}")
            raise
        except NonFiniteError as error:
            raise with_batch(error, self.job, self.run, self.stepper) from None
        finally:
            self.log.close()
            self.progress.close()
        return self.state

    def stop(self, number: int) -> None:
        """Save the step just taken, as a signal asks to stop. Raises InterruptedRunError."""
        self.stepper.read_loss()
        if [step for step, _ in self.run.saved("step")][-1:] != [self.state.step]:
            self.save()
        raise InterruptedRunError(
            f"stopped after step {self.state.step}, which is saved; the same command goes on there", number
        )

    def one_step(self) -> None:
        """A step, and whatever is due after it: reading the loss, evaluating, saving."""
        s, state = self.job.settings, self.state
        reading = 1 if self.job.machine.device.type == "cpu" else 10  # to read the loss, an accelerator is waited for
        self.stepper.step(state.step)
        state.step += 1
        last = state.step == s.max_iters
        evaluating, saving = (last or state.step % every == 0 for every in (s.eval_interval, s.save_interval))
        if evaluating or saving or state.step % reading == 0:
            self.read()
        paused = time.perf_counter()
        if evaluating:
            self.evaluate()
        if saving or self.impatient:
            self.save()
        self.clock += time.perf_counter() - paused  # speeds are those of training alone

    @property
    def impatient(self) -> bool:
        """Whether the loss has not improved for PATIENCE evaluations."""
        return 0 < self.job.settings.patience <= self.state.stale

    def read(self) -> None:
        """Fetch the loss from the device and tell it. Raises NonFiniteError where a step went wrong."""
        loss, state = self.stepper.read_loss(), self.state
        state.seconds = self.before + time.perf_counter() - self.clock
        speed = self.job.tokens_per_step * (state.step - self.first) / (state.seconds - self.before)
        rate = self.stepper.schedule(state.step - 1)
        self.log.add(state.step, loss=loss, lr=rate, seconds=round(state.seconds, 3), tokens_per_second=round(speed))
        self.progress.update(state.step, loss=f"{loss:.3f}", **{"tokens/s": f"{speed:,.0f}"})

    def evaluate(self) -> None:
        """Score held-out text, and save what the run is for whenever that is better than ever."""
        value, state = self.job.evaluate(self.job.settings.eval_iters), self.state
        if not math.isfinite(value):
            raise NonFiniteError(f"the validation loss is {value} after step {state.step}; lower LEARNING_RATE")
        self.log.add(state.step, val_loss=value)
        self.progress.update(state.step, val=f"{value:.3f}")
        if value < state.best:
            state.best, state.best_step, state.stale = value, state.step, 0
            files = self.job.product_files(steps=f"{state.step:,}", validation_loss=f"{value:.4f}")
            self.run.save("best", state.step, files, keep=1)
        else:
            state.stale += 1

    def save(self) -> None:
        """Commit a resumable step."""
        self.log.flush()
        self.run.save(
            "step", self.state.step, resume.to_files(self.stepper, self.state), self.job.settings.keep_checkpoints
        )


def finish(job: Job, run: Run, state: resume.State, start: Names) -> None:
    """Check what was trained, score and sample the best weights, publish them, and tell what the run came to."""
    peak_memory = job.machine.peak_memory()
    if job.kind == "lora":
        self_check(job, run, state, start)
    say("Scoring the whole held-out text, and sampling ...")
    job.load_product(run.read(), str(run.folder))
    result = asdict(state) | {"val_loss": job.evaluate(), "peak_memory": peak_memory}
    result["tokens_per_second"] = state.step * job.tokens_per_step / state.seconds
    result["bits_per_character"] = bits_per_character(job, result["val_loss"])
    samples = {"Sample": sample(job)}
    if job.kind == "lora":
        with using(job.model):
            result["base_val_loss"] = job.evaluate()
            samples = {"Sample with the adapter": samples["Sample"], "Sample without it": sample(job)}
    run.publish(result)
    tell_result(job, run, result)
    tell_samples(job, samples)
    tell_next(job, run)


def train(given: Resolved) -> Run:
    """One run, from its settings to its published files; an identical finished run is left alone."""
    settings = given.settings
    machine = pick_machine(settings.device, settings.dtype)
    for line in (*describe(given), *unread(given), *machine.notes):
        say(line)
    base = find_base(settings) if settings.adapting else None
    if settings.adapting and not base:
        say(f"There is no trained base in {settings.checkpoints_dir} yet, and LoRA adapts one: training it first")
        base = train(base_settings(given))
    job = prepare(given, machine, base)
    start = digests(Adapter.of(job.model)) if job.kind == "lora" else {}
    stepper = job.stepper()
    run = claim(Path(settings.checkpoints_dir), job.plain_name, settings.run_name, job.about(), settings.fresh)
    if run.finished:
        tell_finished(run)
        return run
    print(report.banner(settings, unread_names(settings)))
    if base:
        print(f"   Base: {base.name}, text: {job.corpus.name}")
    print(report.statistics(job.model.get_parameter_info(), settings.use_lora), flush=True)
    with RunLock(run):
        finish(job, run, Training(job, run, stepper).all_steps(), start)
    return run


def tell_finished(run: Run) -> None:
    """Say that there is nothing to do, and how to do it all the same."""
    flags = shlex.join([*(word for word in sys.argv[1:] if word != "--fresh"), "--fresh"])
    print(f"{run.name} is finished already, with these settings: {run.product}")
    print(f"➡️  To train it afresh, in the same environment: python training.py {flags}")


def main() -> None:
    """Run the command."""
    train(from_command_line(Settings, __doc__))


if __name__ == "__main__":
    run_command(main)
