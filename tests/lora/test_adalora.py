"""AdaLoRA: the ranks it keeps, against PEFT's allocator and the paper's schedule, and its regulariser."""

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
    return {path: module.kept.tolist() for path, module in variants(model).items()}


def ranks(model: torch.nn.Module) -> int:
    """The total rank of all modules."""
    return sum(map(sum, kept(model).values()))


@pytest.mark.parametrize(
    ("done", "wanted"), [(0, 64), (10, 64), (20, 45), (30, 36), (40, 32), (49, 32), (50, 32), (51, 32), (100, 32)]
)
def test_the_budget_is_the_papers_cubic(done: int, wanted: int) -> None:
    """Of 100 steps from 64 ranks to 32, between 10 and 50: after 20 it is 32 + 32 * 0.75^3 = 45.5."""
    assert budget(done, 100, 64, 32) == wanted


def test_a_fresh_adapter_changes_no_output_and_targets_two_thirds_of_its_rank() -> None:
    model = tiny()
    before = logits(model)
    attach(model, LoRAConfig(rank=12, alpha=6.0, variant="adalora"))
    assert torch.allclose(logits(model), before, atol=1e-6)
    for module in variants(model).values():
        assert not module.E.any() and module.kept.all() and module.scale == 0.5
        assert all(0.9 * 0.02 < matrix.std() < 1.1 * 0.02 for matrix in (module.A, module.B))
        assert AdaLoRA.target_rank(module.config) == 8


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
        self.modules = variants(self.ours)
        self.scores: dict[str, Tensor] = {}

    def pairs(self) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        """Pairs of our tensor and PEFT's."""
        layers = {path: self.theirs.get_submodule(f"base_model.model.{path}") for path in self.modules}
        return [
            (getattr(module, name), getattr(layers[path], f"lora_{name}")["default"])
            for path, module in self.modules.items()
            for name in "ABE"
        ]

    @torch.no_grad()
    def step(self, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give both the same values and gradients, and let both update their ranks."""
        generator = torch.Generator().manual_seed(step)
        for mine, its in self.pairs():
            mine += 0.1 * torch.randn(mine.shape, generator=generator)
            mine.grad = torch.randn(mine.shape, generator=generator)
            its.copy_(mine)
            its.grad = mine.grad.clone()
        honest = AdaLoRA.importance
        with monkeypatch.context() as patch:
            patch.setattr(AdaLoRA, "importance", lambda module: self.scores.setdefault(id(module), honest(module)))
            self.scores.clear()
            AdaLoRA.after_step(list(self.modules.values()), step, STEPS)
        self.theirs.base_model.update_and_allocate(step + 1)

    def their_score(self, path: str) -> Tensor:
        """PEFT's importance of each rank of a module."""
        A, B, E = (self.allocator._element_score(f"{path}.lora_{name}.default") for name in "ABE")
        return E[:, 0] + A.mean(1) + B.mean(0)


def test_the_same_ranks_are_kept_as_with_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    twins, seen = Twins(), set()
    for step in range(14):  # at the last of its steps PEFT does not look at the gradients any more
        twins.step(step, monkeypatch)
        for path, module in twins.modules.items():
            assert torch.allclose(twins.scores[id(module)], twins.their_score(path), rtol=1e-5), (step, path)
        for mine, its in twins.pairs():
            assert torch.equal(mine, its), step
        pattern = twins.theirs.peft_config["default"].rank_pattern
        assert (pattern is None) == (step < 3)
        if pattern:
            assert {name.removesuffix(".lora_E.default"): list(k) for name, k in pattern.items()} == kept(twins.ours)
        seen.add(ranks(twins.ours))
    assert seen == {10 + int(10 * (1 - i / 12) ** 3) for i in range(12)}


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_the_average_rank_reaches_the_target_and_stays_there(steps: int) -> None:
    model = tiny()
    attach(model, CONFIG)
    run, history = stepper(model, steps), []
    for step in range(steps):
        run.step(step)
        run.read_loss()
        history.append(kept(model))
        assert all(not m.E[~m.kept].any() and m.E[m.kept].all() for m in variants(model).values())
    totals = [sum(map(sum, each.values())) for each in history]
    over = math.ceil(steps / 2)
    assert totals == sorted(totals, reverse=True)
    assert set(totals[over - 1 :]) == {2 * 5}
    assert all(each == history[over - 1] for each in history[over - 1 :])
    assert steps < 20 or (totals[:2] == [20, 20] and len({sum(each) for each in history[-1].values()}) > 1)


@pytest.mark.parametrize("name", ["A", "B", "E"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_importance_stays_finite_when_gradients_overflow(value: float, name: str) -> None:
    model = adapted(CONFIG)
    model(IDX, TARGETS)[1].backward()
    module = variants(model)["lm_head"]
    before = module.importance()
    getattr(module, name).grad[:] = value
    for scores in (module.importance(), module.sensitivity, module.uncertainty):
        assert scores.isfinite().all() and scores.any()
    assert before.isfinite().all()


def plain_term(model: torch.nn.Module) -> Tensor:
    """Half the mean distance of A A^T and B^T B from the identity."""
    matrices = [M for module in variants(model).values() for M in (module.A, module.B.T)]
    return 0.5 * torch.stack([(M @ M.T - torch.eye(4)).square().sum().sqrt() for M in matrices]).mean()


def test_the_regulariser_and_its_gradient_are_the_formulas() -> None:
    model = adapted(CONFIG).double()
    (term,) = extra_losses(model)
    tensors = [M for module in variants(model).values() for M in (module.A, module.B)]
    assert torch.isclose(term(), plain_term(model), rtol=1e-12) and term() > 0.1
    for mine, its in zip(*(torch.autograd.grad(t, tensors) for t in (term(), plain_term(model))), strict=True):
        assert torch.allclose(mine, its, rtol=1e-10)
    with torch.no_grad():
        for module in variants(model).values():
            torch.nn.init.orthogonal_(module.A)
            torch.nn.init.orthogonal_(module.B)
    assert term() < 1e-12
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(term(), tensors))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_adds_the_regulariser_once_and_reports_the_loss_without_it(accumulation: int) -> None:
    model = adapted(CONFIG)
    plain = model(batch(0).tokens, batch(0).targets)[1]
    wanted = torch.autograd.grad(plain + plain_term(model), list(trained(model).values()))
    loss = stepper(model, STEPS, parts=accumulation).backward(batch(0))
    assert torch.isclose(loss, plain, rtol=1e-5)
    for (name, p), gradient in zip(trained(model).items(), wanted, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-3, atol=1e-5), name


def test_a_pruned_adapter_round_trips() -> None:
    model = tiny()
    attach(model, CONFIG)
    run = stepper(model, 20)
    for step in range(12):
        run.step(step)
    expected = logits(model)
    assert ranks(model) == 10
    for module in variants(model).values():
        saved = {name: tensor.clone() for name, tensor in module.adapter_state().items()}
        assert saved["E"].shape == (module.current_rank(), 1) and len(saved["A"]) == module.current_rank()
        module.load_adapter_state(saved)
        assert module.kept.tolist() == [True] * len(saved["E"]) + [False] * (4 - len(saved["E"]))
    assert torch.allclose(logits(model), expected, atol=1e-6)
    with merged(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)


def test_adapters_with_different_ranks_are_combined_and_measured() -> None:
    base = {name: tensor.detach() for name, tensor in base_tensors(tiny()).items()}
    pruned, whole, both = adapted(CONFIG), adapted(replace(CONFIG, variant="lora", target_rank=None), 2), tiny()
    for path, left in (("lm_head", 0), ("blocks.0.attention.q_proj", 1)):
        module = variants(pruned)[path]
        module.kept[left:] = False
        module.E.data[left:] = 0
    adapters = [Adapter.from_model(pruned), Adapter.from_model(whole)]
    for name, adapter in zip(("one", "two"), adapters, strict=True):
        adapter.attach_to(both, name)
    activate(both, {"one": 0.5, "two": -2.0})
    for method, rank in (("cat", None), ("linear", None), ("svd", 8)):
        model, made = tiny(), combine(adapters, (0.5, -2.0), base, method, rank)
        made.adapter.attach_to(model)
        assert torch.allclose(logits(model), logits(both), atol=1e-4) and made.error < 1e-6
    single = combine(adapters[:1], (1.0,), base, "cat").adapter  # LoRA has no rank 0, so it is one of zeros
    assert len(single.tensors["lm_head"]["A"]) == 1 and not single.tensors["lm_head"]["B"].any()
    assert delta_size(adapters[0], "lm_head", base) == (0.0, 0.0, 0.0)
    assert delta_size(adapters[0], "blocks.0.attention.q_proj", base).effective_rank == pytest.approx(1)
    assert cosines(*adapters, base)["lm_head"] is None


WRONG = [{"target_rank": 5}, {"target_rank": 0}, {"target_rank": 2.5}, {"target_rank": True}, {"target_rank": "2"}]
WRONG += [{"rank_pattern": {"q_proj": 5}}, {"rank_pattern": {"q_proj": -1}}, {"alpha_pattern": {"q_proj": 2.0}}]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_invalid_configs_are_refused_by_name(wrong: dict) -> None:
    with pytest.raises(UsageError, match=rf"^(lora_)?{next(iter(wrong))}\b.*: ") as error:
        variant_of(LoRAConfig(rank=4, variant="adalora", **wrong))
    assert "\n" not in str(error.value)


def test_a_pruned_file_may_have_an_initial_rank_above_all_its_sizes() -> None:
    config = LoRAConfig(rank=100, variant="adalora", targets="lm_head", train_embeddings=False)
    model = adapted(config)
    module = model.lm_head.lora["default"]
    with torch.no_grad():
        module.kept[2:] = False
        module.E[2:] = 0
    fresh = tiny()
    from_files(to_files(Adapter.from_model(model)), "here").attach_to(fresh)
    assert torch.allclose(logits(fresh), logits(model), atol=1e-6)
