"""AdaLoRA: which ranks stay, against PEFT's allocator and the paper's schedule, and what it adds to the loss."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from tiny_lora import IDX, TARGETS, adapted, batch, logits, stepper, tiny, trained, variants
from torch import Tensor

from lora.adapter import Adapter
from lora.attach import activate, attach, base_tensors
from lora.combine import combine, cosines, delta_size
from lora.config import LoRAConfig
from lora.merge import merged
from lora.optim import extra_losses
from lora.peft_format import from_files, to_files
from lora.variants.adalora import AdaLoRA, budget
from lora.variants.registry import variant_of
from runtime.errors import UsageError

TARGETED = "q_proj,up_proj,lm_head"
CONFIG = LoRAConfig(rank=4, alpha=6.0, variant="adalora", targets=TARGETED, target_rank=2, train_embeddings=False)
STEPS = 30  # of which ranks are taken away after 3 to 15


def kept(model: torch.nn.Module) -> dict[str, list[bool]]:
    return {path: entry.kept.tolist() for path, entry in variants(model).items()}


def ranks(model: torch.nn.Module) -> int:
    """How many ranks are left in all."""
    return sum(map(sum, kept(model).values()))


@pytest.mark.parametrize(
    ("done", "wanted"), [(0, 64), (10, 64), (20, 45), (30, 36), (40, 32), (49, 32), (50, 32), (51, 32), (100, 32)]
)
def test_the_budget_is_the_papers_cubic(done: int, wanted: int) -> None:
    """Of 100 steps from 64 ranks to 32, between 10 and 50: after 20 it is 32 + 32 * 0.75^3 = 45.5."""
    assert budget(done, 100, 64, 32) == wanted


def test_a_fresh_one_changes_nothing_and_has_two_thirds_of_its_rank_as_target() -> None:
    model = tiny()
    before = logits(model)
    attach(model, LoRAConfig(rank=12, alpha=6.0, variant="adalora"))
    assert torch.allclose(logits(model), before, atol=1e-6)
    for entry in variants(model).values():
        assert not entry.E.any() and entry.kept.all() and entry.scale == 0.5
        assert all(0.9 * 0.02 < matrix.std() < 1.1 * 0.02 for matrix in (entry.A, entry.B))
        assert AdaLoRA.target_rank(entry.config) == 8


class Twins:
    """One AdaLoRA of ours and one of PEFT, whose tensors and gradients are given the same values step by step."""

    def __init__(self) -> None:
        schedule = {"tinit": 3, "tfinal": 15, "total_step": STEPS}
        config = peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=TARGETED.split(","), lora_alpha=6, **schedule)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.theirs = peft.get_peft_model(tiny(), config)
        self.ours = tiny()
        attach(self.ours, CONFIG)
        self.allocator = self.theirs.base_model.rankallocator
        self.entries = variants(self.ours)
        self.scores: dict[str, Tensor] = {}

    def pairs(self) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        """Our tensors, each with PEFT's."""
        layers = {path: self.theirs.get_submodule(f"base_model.model.{path}") for path in self.entries}
        return [
            (getattr(entry, name), getattr(layers[path], f"lora_{name}")["default"])
            for path, entry in self.entries.items()
            for name in "ABE"
        ]

    @torch.no_grad()
    def step(self, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Move both alike, and let both measure and take away."""
        generator = torch.Generator().manual_seed(step)
        for mine, its in self.pairs():
            mine += 0.1 * torch.randn(mine.shape, generator=generator)
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.copy_(mine)
            its.grad = mine.grad.clone()
        honest = AdaLoRA.importance
        with monkeypatch.context() as patch:
            patch.setattr(AdaLoRA, "importance", lambda entry: self.scores.setdefault(id(entry), honest(entry)))
            self.scores.clear()
            AdaLoRA.after_step(list(self.entries.values()), step, STEPS)
        self.theirs.base_model.update_and_allocate(step + 1)

    def their_score(self, path: str) -> Tensor:
        """What PEFT holds each rank of a module to matter."""
        A, B, E = (self.allocator._element_score(f"{path}.lora_{name}.default") for name in "ABE")
        return E[:, 0] + A.mean(1) + B.mean(0)


def test_the_same_ranks_stay_as_with_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    twins, seen = Twins(), set()
    for step in range(14):  # at the last of its steps PEFT does not look at the gradients any more
        twins.step(step, monkeypatch)
        for path, entry in twins.entries.items():
            assert torch.allclose(twins.scores[id(entry)], twins.their_score(path), rtol=1e-5), (step, path)
        for mine, its in twins.pairs():
            assert torch.equal(mine, its), step
        pattern = twins.theirs.peft_config["default"].rank_pattern
        assert (pattern is None) == (step < 3)
        if pattern:
            assert {name.removesuffix(".lora_E.default"): list(k) for name, k in pattern.items()} == kept(twins.ours)
        seen.add(ranks(twins.ours))
    assert seen == {10 + int(10 * (1 - i / 12) ** 3) for i in range(12)}


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_the_average_rank_ends_at_the_target_and_stays_where_it_is(steps: int) -> None:
    model = tiny()
    attach(model, CONFIG)
    run, history = stepper(model, steps), []
    for step in range(steps):
        run.step(step)
        run.read_loss()
        history.append(kept(model))
        assert all(not entry.E[~entry.kept].any() and entry.E[entry.kept].all() for entry in variants(model).values())
    totals = [sum(map(sum, each.values())) for each in history]
    over = math.ceil(steps / 2)
    assert totals == sorted(totals, reverse=True)
    assert set(totals[over - 1 :]) == {2 * 5}
    assert all(each == history[over - 1] for each in history[over - 1 :])
    assert steps < 20 or (totals[:2] == [20, 20] and len({sum(each) for each in history[-1].values()}) > 1)


@pytest.mark.parametrize("name", ["A", "B", "E"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_gradients_that_overflow_leave_what_ranks_matter_finite(value: float, name: str) -> None:
    model = adapted(CONFIG)
    model(IDX, TARGETS)[1].backward()
    entry = variants(model)["lm_head"]
    before = entry.importance()
    getattr(entry, name).grad[:] = value
    for scores in (entry.importance(), entry.sensitivity, entry.uncertainty):
        assert scores.isfinite().all() and scores.any()
    assert before.isfinite().all()


def plain_term(model: torch.nn.Module) -> Tensor:
    """Half the mean distance of A A^T and B^T B from the identity."""
    matrices = [M for entry in variants(model).values() for M in (entry.A, entry.B.T)]
    return 0.5 * torch.stack([(M @ M.T - torch.eye(4)).square().sum().sqrt() for M in matrices]).mean()


def test_its_term_of_the_loss_is_the_formula_with_its_gradient() -> None:
    model = adapted(CONFIG).double()
    (term,) = extra_losses(model)
    tensors = [M for entry in variants(model).values() for M in (entry.A, entry.B)]
    assert torch.isclose(term(), plain_term(model), rtol=1e-12) and term() > 0.1
    for mine, its in zip(*(torch.autograd.grad(t, tensors) for t in (term(), plain_term(model))), strict=True):
        assert torch.allclose(mine, its, rtol=1e-10)
    with torch.no_grad():
        for entry in variants(model).values():
            torch.nn.init.orthogonal_(entry.A)
            torch.nn.init.orthogonal_(entry.B)
    assert term() < 1e-12
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(term(), tensors))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_learns_from_it_once_and_reports_the_loss_without_it(accumulation: int) -> None:
    model = adapted(CONFIG)
    plain = model(batch(0).tokens, batch(0).targets)[1]
    wanted = torch.autograd.grad(plain + plain_term(model), list(trained(model).values()))
    loss = stepper(model, STEPS, accumulation=accumulation).backward(batch(0))
    assert torch.isclose(loss, plain, rtol=1e-5)
    for (name, p), gradient in zip(trained(model).items(), wanted, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-3, atol=1e-5), name


def test_what_is_left_of_it_is_the_same_adapter() -> None:
    model = tiny()
    attach(model, CONFIG)
    run = stepper(model, 20)
    for step in range(12):
        run.step(step)
    expected = logits(model)
    assert ranks(model) == 10
    for entry in variants(model).values():
        saved = {name: tensor.clone() for name, tensor in entry.adapter_state().items()}
        assert saved["E"].shape == (entry.current_rank(), 1) and len(saved["A"]) == entry.current_rank()
        entry.load_adapter_state(saved)
        assert entry.kept.tolist() == [True] * len(saved["E"]) + [False] * (4 - len(saved["E"]))
    assert torch.allclose(logits(model), expected, atol=1e-6)
    with merged(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)


def test_one_with_ranks_that_differ_is_added_up_and_measured() -> None:
    base = {name: tensor.detach() for name, tensor in base_tensors(tiny()).items()}
    pruned, whole, both = adapted(CONFIG), adapted(replace(CONFIG, variant="lora", target_rank=None), 2), tiny()
    for path, left in (("lm_head", 0), ("blocks.0.attention.q_proj", 1)):
        entry = variants(pruned)[path]
        entry.kept[left:] = False
        entry.E.data[left:] = 0
    adapters = [Adapter.from_model(pruned), Adapter.from_model(whole)]
    for name, adapter in zip(("one", "two"), adapters, strict=True):
        adapter.attach_to(both, name)
    activate(both, {"one": 0.5, "two": -2.0})
    for method, rank in (("cat", None), ("linear", None), ("svd", 8)):
        model, made = tiny(), combine(adapters, (0.5, -2.0), base, method, rank)
        made.adapter.attach_to(model)
        assert torch.allclose(logits(model), logits(both), atol=1e-4) and made.error < 1e-6
    alone = combine(adapters[:1], (1.0,), base, "cat").adapter  # LoRA has no rank 0, so it is one of zeros
    assert len(alone.tensors["lm_head"]["A"]) == 1 and not alone.tensors["lm_head"]["B"].any()
    assert delta_size(adapters[0], "lm_head", base) == (0.0, 0.0, 0.0)
    assert delta_size(adapters[0], "blocks.0.attention.q_proj", base).effective_rank == pytest.approx(1)
    assert cosines(*adapters, base)["lm_head"] is None


WRONG = [{"target_rank": 5}, {"target_rank": 0}, {"target_rank": 2.5}, {"target_rank": True}, {"target_rank": "2"}]
WRONG += [{"rank_pattern": {"q_proj": 5}}, {"rank_pattern": {"q_proj": -1}}, {"alpha_pattern": {"q_proj": 2.0}}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_makes_no_sense_for_it_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(UsageError, match=rf"^(lora_)?{next(iter(wrong))}\b.*: ") as error:
        variant_of(LoRAConfig(rank=4, variant="adalora", **wrong))
    assert "\n" not in str(error.value)


def test_a_file_is_read_whose_first_rank_is_above_all_sizes_that_are_left() -> None:
    config = LoRAConfig(rank=100, variant="adalora", targets="lm_head", train_embeddings=False)
    model = adapted(config)
    entry = model.lm_head.lora["default"]
    with torch.no_grad():
        entry.kept[2:] = False
        entry.E[2:] = 0
    fresh = tiny()
    from_files(to_files(Adapter.from_model(model)), "here").attach_to(fresh)
    assert torch.allclose(logits(fresh), logits(model), atol=1e-6)
