"""One step: its rate, its dropout, its gradient over parts, and what it does when something is not finite."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_steps import BAD_GRADIENT, BAD_LOSS, CPU, LENGTH, ROWS, Fp16, Tiny, adamw, batch, pair, same, stepper, weights
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.device import Machine
from runtime.training.batch import IGNORED, Batch, mean_cross_entropy
from runtime.training.steps import NonFiniteError, Schedule, Stepper, evaluate, step_seed

MACHINES = [CPU, Fp16(CPU.device, CPU.dtype)]


def nanogpt(it: int, peak: float, final: float, warmup: int, steps: int) -> float:
    """The learning rate as nanoGPT's train.py has it."""
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    if it > steps:
        return final
    ratio = (it - warmup) / (steps - warmup)
    return final + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (peak - final)


# --- the schedule and the seeds -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(1, 1000), st.floats(1e-6, 1), st.floats(0, 1), st.data())
def test_the_rate_is_nanogpts(warmup, more, peak, share, data):
    steps, final = warmup + more, peak * share
    it = data.draw(st.integers(0, steps + 10))
    assert Schedule(peak, final, warmup, steps)(it) == pytest.approx(nanogpt(it, peak, final, warmup, steps), rel=1e-12)


def test_the_rate_rises_from_above_zero_to_the_peak_and_falls_to_the_final_rate():
    rate = Schedule(peak=1.0, final=0.1, warmup=4, steps=10)
    assert [rate(i) for i in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in pairwise(rate(i) for i in range(4, 11)))
    assert rate(7) == pytest.approx(0.55) and rate(10) == rate(11) == rate(10**6) == 0.1


def test_the_rate_can_fall_in_a_straight_line_or_stay():
    rates = {decay: [Schedule(1.0, 0.1, 4, 13, decay)(i) for i in range(16)] for decay in ("linear", "constant")}
    assert rates["linear"][4:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1])
    assert rates["constant"][4:] == [1.0] * 12 and rates["constant"][:4] == rates["linear"][:4]


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (5, 5)])
def test_a_run_as_short_as_its_warm_up_has_rates_too(warmup, steps):
    rates = [Schedule(1.0, 0.0, warmup, steps)(i) for i in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_no_two_steps_of_any_seed_share_their_dropout():
    seeds = {step_seed(seed, step) for seed in (0, 1, 12, 123, 2**63) for step in range(2000)}
    assert len(seeds) == 5 * 2000 and all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed % 2**32 for seed in seeds}) > 5 * 2000 - 5, "what torch's CPU generator takes of a seed"
    assert step_seed(1, 23) != step_seed(12, 3) and step_seed(1, 2) == step_seed(1, 2)


# --- a step ---------------------------------------------------------------------------------------------------------


def gradients(accumulation: int, rows: int) -> tuple[dict[str, Tensor], Tensor]:
    one = stepper(Tiny(dropout=0.0), parts=accumulation)
    one.model.train()
    loss = one.backward(batch(0, rows))
    return {name: p.grad for name, p in one.model.named_parameters() if p.grad is not None}, loss


@pytest.mark.parametrize(("accumulation", "rows"), [(2, 6), (3, 6), (6, 6), (3, 7), (4, 6), (8, 3)])
def test_parts_add_up_to_the_gradient_and_loss_of_the_whole_batch(accumulation, rows):
    (whole, loss), (parts, parts_loss) = gradients(1, rows), gradients(accumulation, rows)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(parts_loss, loss)
    torch.testing.assert_close(loss, Tiny(dropout=0.0)(*pair(0, rows))[1])
    assert "frozen" not in whole and not loss.requires_grad


def test_parts_are_as_many_as_were_asked_for_and_share_no_graph():
    sizes, one = [], stepper(parts=3)
    one.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    one.step(0)
    assert sizes == [ROWS // 3] * 3


def step_of(gradient_norm: float, grad_clip: float) -> float:
    """How far one step of plain descent at rate 1 goes when the gradient is that long."""
    model = torch.nn.Linear(4, 1, bias=False)
    model.weight.data.zero_()
    direction = F.normalize(torch.arange(1.0, 5.0), dim=0) * gradient_norm
    model.forward = lambda x, _: (None, (model.weight[0] * direction).sum() * x.float().mean())
    one = Stepper(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0, fused=True),
        Schedule(1.0, 1.0, 0, 10),
        lambda _: Batch(torch.ones(4, 2), torch.ones(4, 2)),
        CPU,
        seed=0,
        parts=2,
        grad_clip=grad_clip,
    )
    one.step(0)
    torch.testing.assert_close(F.normalize(-model.weight[0], dim=0), F.normalize(direction, dim=0))
    return model.weight.norm().item()


def test_a_long_gradient_is_clipped_and_a_short_one_is_not():
    assert step_of(50.0, grad_clip=1.0) == pytest.approx(1.0, rel=1e-4)
    assert step_of(50.0, grad_clip=20.0) == pytest.approx(20.0, rel=1e-4)
    assert step_of(0.5, grad_clip=1.0) == pytest.approx(0.5, rel=1e-4)
    assert step_of(50.0, grad_clip=0.0) == pytest.approx(50.0, rel=1e-4)


def test_each_group_has_the_schedules_rate_times_its_own_factor():
    model = Tiny()
    optimizer = adamw(model)
    optimizer.param_groups[1]["lr_scale"] = 16.0
    one = stepper(model, optimizer, schedule=Schedule(1e-3, 0.0, 2, 10))
    for step in range(5):
        one.step(step)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([one.schedule(step), 16 * one.schedule(step)])


def test_the_batch_is_asked_for_by_the_number_of_the_step_alone():
    asked = []
    one = stepper(batch=lambda step: asked.append(step) or batch(step))
    for step in (0, 7, 3):
        one.step(step)
    assert asked == [0, 7, 3]


def test_a_step_leaves_the_model_training_no_gradient_and_its_loss():
    one = stepper(Tiny(dropout=0.0))
    one.model.eval()
    expected = one.model(*pair(0))[1].item()
    one.step(0)
    assert one.model.training and all(p.grad is None for p in one.parameters)
    assert one.read_loss() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(one.model.frozen, Tiny().frozen)


def test_dropout_is_a_function_of_seed_and_step_alone():
    def after(seed: int, step: int, disturb: bool) -> dict[str, Tensor]:
        one = stepper(Tiny(), seed=seed, parts=2)
        if disturb:
            one.model(*pair(3))
            torch.manual_seed(99)
            torch.rand(1000)
        one.step(step)
        return weights(one)

    assert same(after(5, 3, disturb=False), after(5, 3, disturb=True))
    assert not same(after(5, 3, disturb=False), after(6, 3, disturb=False))


def test_parts_of_a_batch_do_not_share_their_dropout():
    seen, one = [], stepper(parts=2, batch=lambda _: Batch(*(torch.cat([t, t]) for t in pair(0, 3))))
    one.model.dropout.register_forward_hook(lambda *args: seen.append(args[2] == 0))
    one.step(0)
    assert len(seen) == 2 and not torch.equal(*seen)


class NoReading(TorchDispatchMode):
    """Refuses what would make the host wait for an accelerator."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value was read from the device"
        return function(*args, **(kwargs or {}))


class Unwatched(Tiny):
    """A tiny model that does not look for bad tokens, which would read them."""

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.norm(self.embedding(x)))
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("machine", MACHINES, ids=["plain", "scaler"])
def test_a_step_never_waits_for_the_device(machine):
    one = stepper(Unwatched(), machine=machine, parts=2)
    with NoReading():
        one.step(0)
        one.step(1)
        evaluate(one.model, [batch(0), batch(1)], machine)
    with pytest.raises(AssertionError, match="was read"), NoReading():
        float(one.loss)


# --- targets that do not count --------------------------------------------------------------------------------------

MASKS = {
    "none": lambda row, column: False,
    "some": lambda row, column: (row + 2 * column) % 3 == 0,
    "prompts of rows": lambda row, column: column < row % LENGTH,
    "a whole part": lambda row, column: row < 3,
    "all but one": lambda row, column: (row, column) != (4, 1),
    "all": lambda row, column: True,
}


def masked(step: int, mask: str) -> Batch:
    """The batch of a step, of which the mask's targets do not count."""
    x, targets = pair(step)
    targets = targets.clone()
    for row, column in itertools.product(range(ROWS), range(LENGTH)):
        if MASKS[mask](row, column):
            targets[row, column] = IGNORED
    return Batch(x, targets)


def slow_losses(mask: str, steps: int) -> list[float]:
    """Losses of some steps in float64, each summed token by token over the whole step, with AdamW as published."""
    model, found, moments = Tiny(dropout=0.0).double(), [], {}
    for step in range(steps):
        x, targets = masked(step, mask).tokens, masked(step, mask).targets
        log_p = model.head(model.norm(model.embedding(x) + model.frozen)).log_softmax(-1)
        terms = [-log_p[i, j, targets[i, j]] for i in range(ROWS) for j in range(LENGTH) if targets[i, j] >= 0]
        loss = sum(terms) / len(terms) if terms else 0 * log_p.sum()
        found.append(loss.item())
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, parameters)
        shrink = min(1.0, 1.0 / (sum((g**2).sum() for g in grads).sqrt().item() + 1e-6))
        for p, g in zip(parameters, (g * shrink for g in grads), strict=True):
            m, v = moments.get(p, (0.0, 0.0))
            m, v = moments[p] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            p.data -= Schedule(1e-2, 1e-3, 2, 10)(step) * update
    return found


@pytest.mark.parametrize("mask", MASKS)
def test_the_loss_is_a_mean_over_what_counts_in_the_whole_step_however_it_is_cut(mask):
    expected = slow_losses(mask, 4)
    for accumulation in (1, 2, 3, 4, 6):
        one = stepper(Tiny(dropout=0.0).double(), parts=accumulation, batch=lambda step: masked(step, mask))
        for step, loss in enumerate(expected):
            one.step(step)
            assert one.read_loss() == pytest.approx(loss, rel=1e-6), (accumulation, step)


def test_an_evaluation_weighs_batches_by_what_counts_in_them():
    model, masks = Tiny(dropout=0.0), ["none", "some", "all but one", "all"]
    batches = [masked(step, mask) for step, mask in enumerate(masks)]
    x, targets = torch.cat([each.tokens for each in batches]), torch.cat([each.targets for each in batches])
    assert evaluate(model, batches, CPU) == pytest.approx(model(x, targets)[1].item(), rel=1e-6)
    with pytest.raises(ValueError, match="no batches with a target"):
        evaluate(model, [masked(0, "all")], CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_all_targets_count_the_loss_is_pytorchs_bit_for_bit(dtype):
    logits = torch.randn(5, 33, 97, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    targets = torch.randint(97, (5, 33), generator=torch.Generator().manual_seed(2))
    ours, theirs = mean_cross_entropy(logits, targets), F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))
    nothing = mean_cross_entropy(logits, torch.full_like(targets, IGNORED))
    assert nothing == 0 and not torch.autograd.grad(nothing, logits)[0].any()


def test_packed_batches_reach_the_model_whole_or_not_at_all():
    x, targets = pair(0)
    one = stepper(Tiny(), parts=2, batch=lambda _: Batch(x, targets, positions=x, segments=targets))
    with pytest.raises(TypeError, match="positions"):
        one.step(0)
    seen = []
    one.forward = lambda *tensors, **more: seen.append((*tensors, *more.values())) or one.model(*tensors)
    one.step(0)
    for tensor, parts in zip((x, targets, x, targets), zip(*seen, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), tensor)


# --- what is not finite ---------------------------------------------------------------------------------------------


def spoilt(bad: int, *steps: int):
    """Batches of which those of these steps have a bad token."""

    def spoilt_batch(step: int):
        found = batch(step)
        if step in steps:
            found.tokens[0, 0] = bad
        return found

    return spoilt_batch


@pytest.mark.parametrize("machine", MACHINES, ids=["plain", "scaler"])
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_from_the_first_bad_loss_on_nothing_changes_any_more(machine, first, accumulation):
    one = stepper(batch=spoilt(BAD_LOSS, first, first + 3), machine=machine, parts=accumulation)
    for step in range(first):
        one.step(step)
        assert math.isfinite(one.read_loss())
    before = weights(one)
    for step in range(first, first + 5):
        one.step(step)
        after = weights(one)
        assert same(before, {name: after[name] for name in before}), f"step {step} changed something"
        assert not any(after[name].any() for name in after.keys() - before.keys()), "fresh state is all zeros"
    with pytest.raises(NonFiniteError, match=rf"not finite at step {first},.*LEARNING_RATE") as caught:
        one.read_loss()
    assert caught.value.status == 1 and str(caught.value).isprintable()


@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_bad_gradient_behind_a_finite_loss_is_caught_as_well(grad_clip):
    one = stepper(batch=spoilt(BAD_GRADIENT, 2), grad_clip=grad_clip)
    for step in range(2):
        one.step(step)
    before = weights(one)
    for step in range(2, 5):
        one.step(step)
        assert one.loss.isfinite() and same(before, weights(one))
    with pytest.raises(NonFiniteError, match="gradient is not finite at step 2"):
        one.read_loss()


def test_a_scaler_skips_an_overflow_lowers_its_scale_and_goes_on():
    one = stepper(batch=spoilt(BAD_GRADIENT, 1), machine=MACHINES[1])
    one.step(0)
    before, scale = weights(one), one.scaler.get_scale()
    one.step(1)
    assert same(before, weights(one)) and one.scaler.get_scale() == scale / 2
    assert math.isfinite(one.read_loss())
    one.step(2)
    assert not same(before, weights(one)) and math.isfinite(one.read_loss())


def test_a_scaler_changes_no_step():
    plain, scaled = (stepper(machine=machine, parts=2) for machine in MACHINES)
    for step in range(4):
        plain.step(step)
        scaled.step(step)
        assert plain.read_loss() == scaled.read_loss()
    torch.testing.assert_close(weights(plain), weights(scaled))


def test_an_optimizer_that_could_not_skip_an_update_is_refused():
    model = Tiny()
    with pytest.raises(ValueError, match="fused"):
        stepper(model, torch.optim.SGD(model.parameters(), lr=1.0))


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_the_mean_is_over_tokens_also_where_the_last_batch_is_smaller():
    model = Tiny()
    pairs = [pair(0, 6), pair(1, 6), pair(2, 1)]
    batches = [Batch(*each) for each in pairs]
    model.eval()
    x, targets = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    whole = model(x, targets)[1].item()
    assert evaluate(model, batches, CPU) == pytest.approx(whole, rel=1e-6)
    assert evaluate(model, iter(batches), CPU) == pytest.approx(whole, rel=1e-6)
    assert abs(whole - sum(model(*each)[1].item() for each in pairs) / 3) > 1e-3, "the plain mean is another"


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_disturbs_nothing(training):
    model = Tiny()
    model(*pair(0))[1].backward()
    graphs = []
    model.register_forward_hook(lambda *args: graphs.append(args[2][1].requires_grad))
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.train(training)
    torch.manual_seed(3)
    first = evaluate(model, [batch(1)], CPU)
    after = torch.rand(5)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(5)), "it took no random numbers"
    assert evaluate(model, [batch(1)], CPU) == first, "it had no dropout"
    assert model.training is training and torch.is_grad_enabled() and graphs == [False, False]
    assert all(p.grad is grads[name] for name, p in model.named_parameters())


def test_the_mode_is_restored_after_an_error_too():
    model = Tiny()
    with pytest.raises(ZeroDivisionError):
        evaluate(model, (1 / 0 for _ in range(1)), CPU)
    assert model.training


def test_no_batches_have_no_mean():
    with pytest.raises(ValueError, match="no batches"):
        evaluate(Tiny(), [], CPU)


class NoDoubles(TorchDispatchMode):
    """A device without float64, as MPS is."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert not (isinstance(result, Tensor) and result.dtype == torch.float64), f"{function} made a double"
        return result


def test_an_evaluation_needs_no_doubles_on_the_device():
    model = Tiny()
    with NoDoubles():
        evaluate(model, [batch(0), batch(1, 2)], CPU)


def test_steps_and_evaluation_compute_in_the_machines_dtype():
    seen = []
    one = stepper(machine=Machine(CPU.device, torch.bfloat16))
    one.model.head.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    one.step(0)
    evaluate(one.model, [batch(0)], one.machine)
    assert seen == [torch.bfloat16] * 2 and all(p.dtype == torch.float32 for p in one.parameters)
