"""The memory that a run is told to take before it begins, against what its steps take.

python -m benchmarks.estimates                          our own sizes, and shapes of pretrained models, random weights
python -m benchmarks.estimates --only 10.7M Llama-1B
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.contest import SIZES, close, parser, tell
from jobs.comparing.timing import repeatable
from jobs.runs.footprint import Plan, Shape, footprint
from lora.attach import attach
from lora.config import LoRAConfig
from models.config import ModelConfig
from models.transformer import Transformer
from runtime.device import Machine, pick_machine
from runtime.processes.command import run_command
from runtime.storage.quantized import quantize

STEPS = 3
LLAMA = {"norm": "rms", "positions": "rotary", "mlp": "gated_silu"}
PRETRAINED = {
    "SmolLM2-135M": ModelConfig(49152, 576, 30, 9, 3, n_inner=1536, max_positions=8192, tied_head=True, **LLAMA),
    "Llama-1B": ModelConfig(128256, 2048, 16, 32, 8, n_inner=8192, max_positions=8192, tied_head=True, **LLAMA),
    "Llama-7B": ModelConfig(32000, 4096, 32, 32, n_inner=11008, max_positions=4096, **LLAMA),
}
TOKENS = {  # of a step, in rows of so many positions
    "tiny": ([64], 16),
    "10.7M": ([4096, 65536], 256),
    "85M": ([1024, 16384], 256),
    "SmolLM2-135M": ([1024, 8192], 512),
    "Llama-1B": ([1024, 8192], 1024),
    "Llama-7B": ([1024], 1024),
}


def plans_of(name: str, machine: Machine) -> Iterator[Plan]:
    """What is measured of a model: all weights, LoRA and LoRA on nf4, with each CHECKPOINT_ACTIVATIONS. Of one of 7B,
    LoRA alone."""
    if name in PRETRAINED:
        shape = Shape(PRETRAINED[name], torch.bfloat16)
        lora = LoRAConfig(16, 32, 0.05, targets="all-linear", train_embeddings=False)
    else:
        vocabulary, width, heads, layers, context = SIZES[name]
        shape, lora = Shape(ModelConfig(vocabulary, width, layers, heads, max_positions=context)), LoRAConfig(8, 16)
    counts, positions = TOKENS[name]
    for tokens in counts:
        plan = Plan(shape, machine, lora, tokens // positions, positions)
        for each in (replace(plan, lora=None), plan, replace(plan, quantize="nf4")):
            if each.lora or name != "Llama-7B":
                yield from (replace(each, keeps=keeps) for keeps in ("none", "cheap", "block"))


def built(plan: Plan) -> Transformer:
    """The model that a plan is about, with fresh weights."""
    model = Transformer(plan.shape.config, plan.dropout, plan.machine.device).to(plan.stored)
    for name in model.linears_of_blocks() if plan.form != "none" else ():
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.weight = nn.Parameter(quantize(plan.form, layer.weight, name), requires_grad=False)
    if plan.lora:
        attach(model, plan.lora)
    model.checkpoint_activations = plan.keeps
    return model.train()


def peak_of_steps(plan: Plan) -> int:
    """The most bytes that are held in some steps, beyond those before the model was built. On CUDA what libraries take
    for themselves at their first product counts too."""
    gc.collect()
    if plan.machine.is_cuda:
        torch.cuda.empty_cache()
        torch._C._cuda_clearCublasWorkspaces()
    before, model = plan.machine.restart_peak_memory(), built(plan)
    rows = torch.randint(plan.shape.config.vocab_size, (plan.rows, plan.positions + 1))
    stepper = repeatable(model, rows, plan.machine)
    plan.machine.restart_peak_memory()
    for step in range(STEPS):
        stepper.step(step)
    stepper.read_loss()
    return plan.machine.peak_memory() - before


def measure(name: str, plan: Plan) -> dict[str, Any]:
    """The estimate as a share of the peak."""
    told, found = footprint(plan).peak, peak_of_steps(plan)
    kind = "full" if plan.lora is None else "lora nf4" if plan.form == "nf4" else "lora"
    what = f"{name}, {plan.rows * plan.positions:,} tokens, {kind}, {plan.keeps}: "
    what += f"{told / 1e6:,.0f} MB told, {found / 1e6:,.0f} MB taken"
    share = told / max(found, 10**6)
    return {"what": what, "median": share, "min": share, "max": share, "told": told, "taken": found}


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=1)
    flags.add_argument("--only", nargs="+", choices=TOKENS, default=[name for name in TOKENS if name != "tiny"])
    options, rows = flags.parse_args(), []
    machine = pick_machine(options.device, "bf16")
    for name in options.only:
        for plan in plans_of(name, machine):
            rows.append(measure(name, plan))
            tell(rows[-1:])
    close("estimates", rows, options.record)


if __name__ == "__main__":
    run_command(main)
