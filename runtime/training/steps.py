"""One optimisation step, the schedule, and evaluation: what training and comparing share.

A step is a function of (settings, step number, weights): the batch, the learning rate and the dropout of step i
depend on nothing that happened before it, so a resumed run repeats an uninterrupted one bit for bit.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from runtime.device import Machine
from runtime.errors import UserError
from runtime.processes.pieces import whole
from runtime.processes.world import world
from runtime.training.batch import Batch
from runtime.training.reduction import REDUCTIONS


class NonFiniteError(UserError):
    """The loss or a gradient became infinite or not a number; no update was made with it.

    step: the number of the step whose batch it came from, or None where it came from no batch.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Schedule:
    """The learning rate of a step, counted from 0: linear warm-up, then down to `final`, by a `cosine` as in nanoGPT or
    in a straight line (`linear`), or not at all (`constant`)."""

    peak: float
    final: float
    warmup: int
    steps: int
    decay: str = "cosine"

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if self.decay == "constant":
            return self.peak
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1 - done if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (self.peak - self.final) * left


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """The seed of the dropout in one part of a step, unrelated to that of any other seed, step and part."""
    name = f"{seed}/{step}/{part}" if part else f"{seed}/{step}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


class Stepper:
    """Takes optimisation steps on a model: accumulate, clip, update, unless something is not finite.

    model(tokens, targets) -> (logits, mean loss over the targets that count, 0 where none does).
    optimizer: a fused one, as the others cannot skip an update without the host; parameter
    groups may carry `lr_scale`, a factor on the schedule.
    batch(step): all rows of a step, which are cut into `parts`, each with dropout of its own. The loss of a step is a
    sum over all its targets that count, divided by their number, however they are spread over the parts. Of several
    processes each takes some of the parts; `reduce` says how their gradients are added up (`reduction.py`).
    extra_losses() -> () each: terms of the loss beside the batch's, which `self.loss` leaves out.
    after_steps(step): called after each update, while the gradients are still there.
    lap(phase) is called after each `forward`, `backward` and `optimizer` phase, for whoever has a clock.
    """

    lap: Callable[[str], None] = staticmethod(lambda phase: None)

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        batch: Callable[[int], Batch],
        machine: Machine,
        *,
        seed: int,
        parts: int = 1,
        reduce: str = "exact",
        grad_clip: float = 1.0,
        compile: bool = False,
        extra_losses: Sequence[Callable[[], Tensor]] = (),
        after_steps: Sequence[Callable[[int], None]] = (),
    ) -> None:
        if not optimizer.defaults.get("fused"):
            raise ValueError(f"{type(optimizer).__name__} must be fused, or it would update with what is not finite")
        self.model, self.optimizer, self.schedule, self.batch, self.machine = model, optimizer, schedule, batch, machine
        self.seed, self.parts, self.grad_clip = seed, parts, grad_clip
        self.extra_losses, self.after_steps = extra_losses, after_steps
        self.scaler, self.mine = machine.scaler(), world().mine(parts)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.reduction = REDUCTIONS[reduce](self.parameters, world())
        # Wrappers around the model would change its names: only steps go through them.
        self.forward = self.reduction.wrap(model)
        if compile:
            self.forward = torch.compile(self.forward)
        self.loss = self.gradient_norm = torch.zeros((), device=machine.device)
        self.first_bad = torch.full((), math.inf, device=machine.device)

    def step(self, step: int) -> None:
        """Take step number `step`. `self.loss` is its mean loss, and `self.gradient_norm` what is clipped, both left on
        the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(step) * group.get("lr_scale", 1.0)
        if not self.model.training:  # walking through the modules takes 1 % of a small model's step
            self.model.train()
        self.loss = self.backward(self.batch(step), step)
        self.update(step)
        for after_step in self.after_steps:
            after_step(step)
        self.optimizer.zero_grad(set_to_none=True)
        self.lap("optimizer")

    def backward(self, batch: Batch, step: int = 0) -> Tensor:
        """Gradients of the mean loss over the whole batch, part by part, and of what is added; returns that mean."""
        parts = batch.cut(self.parts)
        counts = torch.stack([part.count() for part in parts]).to(self.machine.device, non_blocking=True)
        shares = counts / counts.sum().clamp(min=1)
        for i in self.mine:
            part = parts[i].to(self.machine.device)
            torch.manual_seed(step_seed(self.seed, step, i))
            with self.reduction.part(last=i == self.mine[-1]):
                with self.machine.autocast():
                    loss = self.forward(part.tokens, part.targets, **part.inputs())[1] * shares[i]
                self.lap("forward")
                self.reduction.backward(self.scaler.scale(loss), loss)
            self.lap("backward")
        loss = self.reduction.finish()
        for extra_loss in self.extra_losses:
            self.scaler.scale(extra_loss()).backward()
        self.lap("backward")
        return loss

    def update(self, step: int) -> None:
        """Clip and update. From the first step on that is not finite, the device itself skips every update."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.scaler.is_enabled():  # it skips what overflows, and lowers its scale: only the loss can end the run
            self._note(step, self.loss.isfinite())
            gradients[0] += torch.where(self.first_bad.isfinite(), math.nan, 0.0)
        self.scaler.unscale_(self.optimizer)
        norm = self.gradient_norm = whole(torch.nn.utils.get_total_norm(gradients))
        if self.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.grad_clip, norm)
        if not self.scaler.is_enabled():
            self._note(step, self.loss.isfinite() & norm.isfinite())
            self.optimizer.found_inf = self.first_bad.isfinite().float()  # fused optimizers then leave all as it was
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _note(self, step: int, finite: Tensor) -> None:
        self.first_bad = torch.where(finite, self.first_bad, self.first_bad.clamp(max=step))

    def make_state(self, parameters: Iterable[nn.Parameter]) -> None:
        """Let the optimizer make what it keeps of these parameters, as it is at first, by an update that is skipped."""
        for p in parameters:
            p.grad = torch.zeros_like(p)
        self.optimizer.found_inf = torch.ones((), device=self.machine.device)
        self.optimizer.step()
        del self.optimizer.found_inf  # which a scaler sets and deletes itself
        self.optimizer.zero_grad(set_to_none=True)

    def read_loss(self) -> float:
        """The last step's loss on the host, which waits for the device.

        Raises NonFiniteError when any step so far was not finite; the weights are those from before it.
        """
        loss, first_bad = torch.stack([self.loss, self.first_bad]).tolist()
        if math.isfinite(first_bad):
            raise NonFiniteError(
                f"the loss or a gradient is not finite at step {int(first_bad)}, so the run stopped before that "
                "update; lower LEARNING_RATE, or set DTYPE=fp32 if it was lower",
                int(first_bad),
            )
        return loss


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], machine: Machine) -> float:
    """Mean cross-entropy in nats over all targets that count, each process taking some of the batches. The model's mode
    is left as it was.

    Raises ValueError where there are none.
    """
    batches, training = list(batches), model.training
    losses = torch.zeros(len(batches), device=machine.device)
    model.eval()
    try:
        for i in world().mine_in_step(len(batches)):
            batch = batches[i or 0].to(machine.device)
            with machine.autocast():
                loss = model(batch.tokens, batch.targets, **batch.inputs())[1]
            if i is not None:
                losses[i] = loss
    finally:
        model.train(training)
    world().add_up(losses)  # to zeros, which changes none of them
    # Read all at once, as reading makes an accelerator wait; summed here in doubles, which MPS does not have.
    counts = torch.stack([batch.count() for batch in batches]).tolist() if batches else []
    if not any(counts):
        raise ValueError("there are no batches with a target to evaluate on")
    return sum(loss * count for loss, count in zip(losses.tolist(), counts, strict=True)) / sum(counts)
