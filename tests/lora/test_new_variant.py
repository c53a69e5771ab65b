"""A variant defined in this file works like the built-in ones: it needs a class and an entry in a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from tiny_lora import adapted, batch, logits, same, state, stepper, tiny, trained, variants
from torch import Tensor

from lora.adapter import Adapter
from lora.attach import activate, attach, base_tensors, detach
from lora.card import CARD
from lora.combine import combine, cosines, delta_size
from lora.config import LoRAConfig
from lora.merge import merged
from lora.peft_format import CONFIG, load_adapter, save_adapter
from lora.variants.lora import LoRA
from lora.variants.registry import VARIANTS, variant_of
from runtime.errors import UsageError
from runtime.training import resume
from runtime.training.steps import Stepper


class Toy(LoRA):
    """W' = W + scale diag(gain) B A, with a gain (out,) that is pulled to 1 and clamped to a falling bound."""

    shapes: ClassVar[dict] = LoRA.shapes | {"gain": ("out",)}
    peft_type: ClassVar[str] = "TOY"
    peft_flags: ClassVar[dict] = {}
    peft_names: ClassVar[dict] = LoRA.peft_names | {"gain": "toy_gain"}

    def make_tensors(self):
        super().make_tensors()
        self.gain = torch.nn.Parameter(torch.ones(self.out_features))
        self.register_buffer("bound", torch.tensor(2.0))

    @classmethod
    def problems(cls, config):
        return ["lora_rank=13: is unlucky"] if config.rank == 13 else []

    def low_rank_factors(self):
        return self.gain[:, None] * self.B, self.A

    @staticmethod
    def extra_loss(modules: list[Toy]) -> Tensor:
        return 0.1 * sum((module.gain - 1).square().sum() for module in modules)

    @staticmethod
    @torch.no_grad()
    def after_step(modules: list[Toy], step: int, steps: int) -> None:
        for module in modules:
            module.bound.mul_(1 - 0.5 * (step + 1) / steps * module.gain.grad.norm().clamp(max=1))
            module.gain.clamp_(max=module.bound)


STEPS = 6


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "toy", Toy)


def config(variant: str = "toy") -> LoRAConfig:
    return LoRAConfig(rank=4, alpha=6.0, variant=variant, rank_pattern={} if variant == "vera" else {"q_proj": 2})


def run(variant: str, steps: int = STEPS, seed: int = 1) -> Stepper:
    """Train a tiny base with a fresh adapter for the first `steps` of `STEPS` steps."""
    model = tiny()
    torch.manual_seed(seed)
    attach(model, config(variant))
    made = stepper(model, STEPS)
    for step in range(steps):
        made.step(step)
        made.read_loss()
    return made


def test_it_trains_with_its_extra_loss_and_its_hook() -> None:
    model, before = tiny(), logits(tiny())
    attach(model, config())
    assert torch.equal(logits(model), before)
    plain = model(batch(0).tokens, batch(0).targets)[1]
    terms = 0.1 * sum((module.gain - 1).square().sum() for module in variants(model).values())
    wanted = torch.autograd.grad(plain + terms, list(trained(model).values()))
    steps, start = stepper(model, STEPS), state(model)
    assert torch.isclose(steps.backward(batch(0)), plain, rtol=1e-5)
    for (name, p), gradient in zip(trained(model).items(), wanted, strict=True):
        assert torch.allclose(p.grad, gradient, rtol=1e-3, atol=1e-6), name
    steps.optimizer.zero_grad()
    for step in range(STEPS):
        steps.step(step)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    bounds = {name for name in start if name.endswith(".bound")}
    assert moved == set(trained(model)) | bounds and len(bounds) == 13
    assert all((module.gain <= module.bound).all() for module in variants(model).values())


def test_it_is_saved_loaded_and_merged(tmp_path: Path) -> None:
    model = run("toy").model
    expected = logits(model)
    save_adapter(tmp_path / "toy", Adapter.from_model(model))
    peft_config = json.loads((tmp_path / "toy" / CONFIG).read_bytes())
    assert peft_config["peft_type"] == "TOY" and peft_config["rank_pattern"] == {"q_proj": 2}
    assert "| variant | toy |" in (tmp_path / "toy" / CARD).read_text("utf-8")
    fresh = tiny()
    load_adapter(tmp_path / "toy").attach_to(fresh)
    assert torch.equal(logits(fresh), expected)
    with merged(model):
        assert torch.allclose(logits(model), expected, atol=1e-5)
    detach(model, "default")
    assert torch.equal(logits(model), logits(tiny()))


@pytest.mark.parametrize("saved", [2, 4])  # while AdaLoRA takes ranks away, and when it has done
@pytest.mark.parametrize("variant", [*VARIANTS, "toy"])
def test_a_resumed_run_ends_with_the_same_bits(variant: str, saved: int) -> None:
    files = resume.to_files(run(variant, saved), resume.State(step=saved))
    again = run(variant, 0, seed=2)
    assert resume.restore(again, files, "here").step == saved
    for step in range(saved, STEPS):
        again.step(step)
    assert same(state(again.model), state(run(variant).model))


def test_it_is_combined_by_its_low_rank_factors() -> None:
    one, two = (Adapter.from_model(adapted(config(), seed)) for seed in (1, 2))
    base = {name: tensor.detach() for name, tensor in base_tensors(tiny()).items()}
    both = tiny()
    one.attach_to(both, "one")
    two.attach_to(both, "two")
    activate(both, {"one": 0.5, "two": -2.0})
    for method in ("cat", "linear"):
        made, model = combine([one, two], (0.5, -2.0), base, method).adapter, tiny()
        made.attach_to(model)
        assert made.config.variant == "lora" and torch.allclose(logits(model), logits(both), atol=1e-4)
    assert delta_size(one, "lm_head", base).effective_rank > 1 and -1 < cosines(one, two, base)["lm_head"] < 1


def test_configs_that_it_refuses_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"^lora_rank=13: is unlucky$"):
        variant_of(LoRAConfig(rank=13, variant="toy"))
    with pytest.raises(UsageError, match=r"^lora_variant='tom': must be one of lora, .*, toy$"):
        variant_of(LoRAConfig(variant="tom"))
