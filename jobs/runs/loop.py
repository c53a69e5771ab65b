"""The training loop of one run: steps, and what is due after each: reading the loss, evaluating, saving."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress

from jobs.runs.job import Job
from jobs.runs.postmortem import with_batch
from runtime.errors import UserError
from runtime.interrupt import InterruptedRunError, Interruption
from runtime.processes.world import LostProcessError, world
from runtime.progress import Progress
from runtime.storage.runs import Run, say
from runtime.tracking.tracking import Tracking
from runtime.training import resume
from runtime.training.metrics import MetricsLog
from runtime.training.steps import NonFiniteError, Stepper

# Is asked with the step and the validation loss whether the run is to be stopped there: why, or "".
Watch = Callable[[int, float], str]


class PrunedRunError(UserError):
    """Whoever watched the run had it stopped; all it did is saved."""


class Training:
    """The steps of one run that are left to do, and the clock, log and progress that go with them."""

    def __init__(
        self,
        job: Job,
        run: Run,
        stepper: Stepper,
        on_best: Callable[[int, float], None] = lambda step, loss: None,
        tracking: Tracking | None = None,
        watch: Watch | None = None,
    ) -> None:
        """on_best: is told the step and the loss of the best weights so far, when they have been saved.
        tracking: gets the figures of each step that is read. watch: is asked after each evaluation but the last."""
        self.job, self.run, self.stepper, self.state, self.on_best = job, run, stepper, resume.State(), on_best
        if saved := run.newest("step"):
            self.state = resume.restore(stepper, saved[1], f"{run.folder}/step-{saved[0]:06d}")
            say(f"Going on with {run.name} after step {self.state.step} of {job.settings.max_iters}")
        self.check_replicas()
        self.log = MetricsLog(run.folder / "metrics.jsonl", self.state.step, writes=world().leads)
        self.tracking = tracking or Tracking((), run.folder)
        self.tracking.begin(self.state.step)
        self.watch, self.why_stop = watch, ""
        every = job.settings.log_interval
        self.progress = Progress(run.name, job.settings.max_iters, self.state.step, every_steps=every)
        self.first, self.before = self.state.step, self.state.seconds
        self.clock = time.perf_counter()

    def all_steps(self) -> resume.State:
        """Step until the last one, or until patience ends. However it ends, the log is whole up to there."""
        try:
            # Ctrl-C comes twice where torchrun runs: from the terminal, and from torchrun.
            with Interruption(repeats=world().size > 1) as interruption:
                while self.state.step < self.job.settings.max_iters and not self.impatient:
                    self.one_step()
                    asked = interruption.asked or world().abandoned
                    if (self.host_waits or world().size == 1) and (asked := world().highest(asked)):
                        self.stop(asked)
                    if self.why_stop:
                        self.prune()
        except KeyboardInterrupt:
            say(f"\nStopped at step {self.state.step}; {self.goes_on()}")
            raise
        except OSError:  # nobody reads what is printed any more, as where a terminal was closed
            self.save_now()
            raise
        except NonFiniteError as error:
            found = with_batch(error, self.job, self.run, self.stepper)
            world().barrier()  # torchrun ends all processes as soon as one has failed
            raise found from None
        except (LostProcessError, RuntimeError) as error:
            if lost := world().lost(error):
                raise LostProcessError(f"{lost}, at step {self.state.step + 1}; {self.goes_on()}") from None
            raise
        finally:
            self.log.close()
            with suppress(OSError):
                self.progress.close()
        return self.state

    def goes_on(self) -> str:
        """Where the same command goes on with the run, in words."""
        saved = self.run.saved("step")
        return f"the same command goes on {f'after step {saved[-1][0]}' if saved else 'from the beginning'}"

    def stop(self, number: int) -> None:
        """Save the step just taken, as a signal asks to stop. Raises InterruptedRunError."""
        self.save_now()
        world().barrier()
        raise InterruptedRunError(
            f"stopped after step {self.state.step}, which is saved; the same command goes on there", number
        )

    def prune(self) -> None:
        """Save the step just taken. Raises PrunedRunError."""
        self.save_now()
        raise PrunedRunError(
            f"{self.run.name} is stopped after step {self.state.step}, which is saved: {self.why_stop}"
        )

    def save_now(self) -> None:
        """Commit the step just taken, unless it is saved already."""
        self.stepper.read_loss()
        if [step for step, _ in self.run.saved("step")][-1:] != [self.state.step]:
            self.save()

    def one_step(self) -> None:
        """A step, and whatever is due after it: reading the loss, evaluating, saving."""
        s, state = self.job.settings, self.state
        self.stepper.step(state.step)
        state.step += 1
        last = state.step == s.max_iters
        evaluating, saving = (last or state.step % every == 0 for every in (s.eval_interval, s.save_interval))
        telling = s.log_interval and state.step % s.log_interval == 0
        if evaluating or saving or telling or self.host_waits:
            self.read()
        paused = time.perf_counter()
        if evaluating:
            self.evaluate()
        self.tracking.send()
        if saving or self.impatient:
            self.save()
        self.clock += time.perf_counter() - paused  # speeds are those of training alone

    @property
    def host_waits(self) -> bool:
        """Whether the loss of this step is read, for which an accelerator is waited for, and so only now and then; then
        processes also ask each other whether one was told to stop."""
        return self.job.machine.device.type == "cpu" or self.state.step % 10 == 0

    @property
    def impatient(self) -> bool:
        """Whether the loss has not improved for PATIENCE evaluations."""
        return 0 < self.job.settings.patience <= self.state.stale

    def read(self) -> None:
        """Fetch the loss from the device, log it and show it. Raises NonFiniteError where a step went wrong."""
        loss, state = self.stepper.read_loss(), self.state
        state.seconds = self.before + time.perf_counter() - self.clock
        speed = self.job.data.tokens_in_step * (state.step - self.first) / (state.seconds - self.before)
        rate = self.stepper.schedule(state.step - 1)
        figures = {"loss": loss, "lr": rate, "seconds": round(state.seconds, 3), "tokens_per_second": round(speed)}
        self.log.add(state.step, **figures)
        self.track(figures)
        told = {"lr": f"{rate:.3g}"} if self.job.settings.log_interval else {}
        self.progress.update(state.step, loss=f"{loss:.3f}", **told, **{"tokens/s": f"{speed:,.0f}"})

    def track(self, figures: dict[str, float]) -> None:
        """Hand figures of this step to the trackers, where there are some, and with them what only these are told."""
        if not self.tracking.active:
            return
        groups = self.stepper.optimizer.param_groups
        scales = sorted({group.get("lr_scale", 1.0) for group in groups} - {1.0})
        more = {f"lr_times_{scale:g}": scale * figures["lr"] for scale in scales}
        more |= {"gradient_norm": self.stepper.gradient_norm.item(), "peak_memory": self.job.machine.peak_memory()}
        self.tracking.add(self.state.step, **figures, **more)

    def evaluate(self) -> None:
        """Compute the validation loss, and save the artifact whenever the loss is the lowest so far."""
        value, state = self.job.evaluate(self.job.settings.eval_iters), self.state
        if not math.isfinite(value):
            raise NonFiniteError(f"the validation loss is {value} after step {state.step}; lower LEARNING_RATE")
        self.log.add(state.step, val_loss=value)
        self.tracking.add(state.step, val_loss=value)
        self.progress.update(state.step, val=f"{value:.3f}")
        if value < state.best:
            state.best, state.best_step, state.stale = value, state.step, 0
            files = self.job.artifact_files(steps=f"{state.step:,}", validation_loss=f"{value:.4f}")
            self.run.save("best", state.step, files, keep=1)
            self.on_best(state.step, value)
        else:
            state.stale += 1
        if self.watch and state.step < self.job.settings.max_iters:
            self.why_stop = self.watch(state.step, value)

    def check_replicas(self) -> None:
        """Raises UsageError where the processes are not at the same step with the same weights."""
        if world().size > 1 and not self.job.in_pieces:
            world().check_same({"step": self.state.step, "weights": resume.digest(self.stepper)})

    def save(self) -> None:
        """Commit a resumable step."""
        self.check_replicas()
        self.log.flush()
        self.tracking.flush()
        files = resume.to_files(self.stepper, self.state)
        self.run.save("step", self.state.step, files, self.job.settings.keep_checkpoints)
