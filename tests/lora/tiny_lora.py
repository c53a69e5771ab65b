"""A tiny base, adapters of every variant on it, and the plain equation that they must equal."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lora.attach import activate, adaptable_layers, adapter_parameters, attach
from lora.config import LoRAConfig
from lora.optim import after_steps, extra_losses, make_optimizer
from lora.variants.lora import LoRA
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from runtime.device import Machine
from runtime.training.batch import Batch
from runtime.training.steps import Schedule, Stepper
from tests.tiny import tiny

IDX = torch.arange(24).reshape(2, 12) * 7 % 50
TARGETS = torch.arange(24).reshape(2, 12) * 11 % 50


def adapted(config: LoRAConfig, seed: int = 1, name: str = "default", **base) -> BigramLanguageModelLoRA:
    """A tiny base with one adapter, none of whose tensors is at its initial value."""
    model = tiny(**base)
    torch.manual_seed(seed)
    attach(model, config, name)
    randomise(model, seed)
    return model


def randomise(model: BigramLanguageModelLoRA, seed: int = 1, size: float = 0.1) -> None:
    """Add noise to every tensor of the active adapters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += size * torch.randn(p.shape, generator=generator, dtype=torch.float32)


def trained(model: BigramLanguageModelLoRA) -> dict[str, Tensor]:
    """The trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def variants(model: torch.nn.Module) -> dict[str, LoRA]:
    """The active adapter's module on each linear that it adapts, by the linear's path."""
    found = ((path, module) for path, layer in adaptable_layers(model).items() for module in layer.active_modules())
    return {path: module for path, module in found if isinstance(module, LoRA)}


def batch(step: int) -> Batch:
    """Random tokens of a step, and their successors."""
    tokens = torch.randint(0, 50, (4, 13), generator=torch.Generator().manual_seed(step))
    return Batch(tokens[:, :-1], tokens[:, 1:])


def stepper(model: BigramLanguageModelLoRA, steps: int, **options) -> Stepper:
    """A stepper for a run of `steps` steps on the active adapters, with their extra losses and hooks."""
    cpu = Machine(torch.device("cpu"), torch.float32)
    optimizer = options.pop("optimizer", None) or make_optimizer(model, (0.9, 0.95), 0.0)
    added = {"extra_losses": extra_losses(model), "after_steps": after_steps(model, steps)} | options
    return Stepper(model, optimizer, Schedule(0.02, 0.02, 0, steps), batch, cpu, seed=3, **added)


def projections(config: LoRAConfig, widest_in: int, widest_out: int) -> tuple[Tensor, Tensor]:
    """VeRA's shared matrices: uniform within sqrt(6 / fan-in), A drawn before B, from one seed."""
    generator = torch.Generator().manual_seed(config.seed)
    shapes = (config.rank, widest_in), (widest_out, config.rank)
    bounds = [math.sqrt(2) * math.sqrt(3) / math.sqrt(fan_in) for _, fan_in in shapes]
    draw = [torch.empty(shape).uniform_(-b, b, generator=generator) for shape, b in zip(shapes, bounds, strict=True)]
    return draw[0], draw[1]


def plain_weights(model: BigramLanguageModelLoRA, config: LoRAConfig, name: str = "default") -> dict[str, Tensor]:
    """The effective weights by the plain equation, differentiable: W + scale B A or W + scale B E A,
    each row scaled to its magnitude if there is one; W + b B d A with VeRA's shared matrices; or the copy."""
    scale = config.alpha / (math.sqrt(config.rank) if config.variant == "rslora" else config.rank)
    shared = [
        (m.in_features, m.out_features)
        for module in model.modules()
        for m in getattr(module, "lora", {}).values()
        if isinstance(m, LoRA)
    ]
    everything, marker = dict(model.named_parameters()), f".lora.{name}."
    own = adapter_parameters(model)
    weights = {key: p for key, p in everything.items() if p not in own}
    for key, p in everything.items():
        path, _, tensor = key.partition(marker)
        if tensor == "B":
            E = everything.get(f"{path}{marker}E", torch.ones(1, 1, dtype=p.dtype))
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + scale * p @ (E * everything[f"{path}{marker}A"])
        elif tensor == "b":
            A, B = projections(config, *map(max, zip(*shared, strict=True)))
            W, d = weights[f"{path}.weight"], everything[f"{path}{marker}d"]
            update = B[: len(W)].to(p.dtype) @ (d[:, None] * A[:, : W.shape[1]].to(p.dtype))
            weights[f"{path}.weight"] = W + p[:, None] * update
        elif tensor in ("weight", "bias"):
            weights[f"{path}.{tensor}"] = p
    for key, p in everything.items():
        path, _, tensor = key.partition(marker)
        if tensor == "magnitude":
            V = weights[f"{path}.weight"]
            weights[f"{path}.weight"] = p[:, None] * V / V.detach().square().sum(1, keepdim=True).sqrt()
    return weights


def state(model: BigramLanguageModelLoRA) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return {key: t.clone() for key, t in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys in the same order, and the same values bit for bit."""
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def logits(model: BigramLanguageModelLoRA, idx: Tensor = IDX) -> Tensor:
    """Logits, computed without gradients."""
    with torch.no_grad():
        return model(idx)[0]


EVERYTHING = LoRAConfig(rank=4, alpha=6.0, targets="all", bias="all")
SOME = LoRAConfig(rank=2, alpha=3.0, targets="minimal", variant="rslora")


def two_adapters() -> BigramLanguageModelLoRA:
    """`one` on all linears, biases and embeddings; `two` on some linears and the embeddings; both active."""
    model = adapted(EVERYTHING, name="one", bias=True)
    torch.manual_seed(2)
    attach(model, SOME, "two")
    randomise(model, 2)
    activate(model, "one", "two")
    return model
