"""What `--dry-run` prints of a run's memory."""

from __future__ import annotations

from dataclasses import replace

from jobs.runs.footprint import Footprint, Plan, footprint
from lora.config import LoRAConfig
from runtime.report import size, table


def summary_of_memory(plan: Plan, found: Footprint, free: str) -> str:
    """Parameters, files and memory of a run, and the same model trained whole, with LoRA, and with LoRA in 4 bits."""
    config, machine = plan.shape.config, plan.machine
    parts = f"{plan.parts or plan.batches} x " if plan.rows_at_once < plan.rows * plan.batches else ""
    kept = ", ".join(f"{name} {size(count)}" for name, count in found.activations.most_common() if count)
    lines = [
        f"🧮 {config.n_layer} blocks, {config.n_embd} wide, a vocabulary of {config.vocab_size:,}, on {machine}",
        f"   A step: {parts}{plan.rows_at_once} rows of {plan.positions} tokens",
        f"   Parameters: {found.parameters:,}, of which {found.trained:,} train",
        *([f"   Adapter file: {size(found.adapter)}"] if plan.lora else []),
        f"   Weights: {size(found.weights)}",
        f"   Gradients: {size(found.gradients)}",
        f"   Optimizer state ({plan.optimizer}): {size(found.optimizer)}",
        f"   Activations (CHECKPOINT_ACTIVATIONS={plan.keeps}): {size(found.activations.total())} ({kept})",
        f"   Peak: about {size(found.peak)}; {free}",
    ]
    return "\n".join([*lines, "", ways_to_train(plan)])


def ways_to_train(plan: Plan) -> str:
    """Weights, gradients and AdamW's moments of a model that is trained whole, with LoRA, and with LoRA in 4 bits."""
    lora = replace(plan, lora=plan.lora or LoRAConfig(), optimizer="adamw", quantize="none")
    whole = replace(lora, lora=None, shape=replace(lora.shape, form="none"))
    ways = {"all weights": whole, "LoRA": lora}
    if plan.shape.form == "none":
        ways["LoRA, nf4"] = replace(lora, quantize="nf4")
    found = [footprint(way) for way in ways.values()]
    rows = {
        "weights": [each.weights for each in found],
        "gradients": [each.gradients for each in found],
        "AdamW": [each.optimizer for each in found],
        "total": [each.weights + each.gradients + each.optimizer for each in found],
    }
    return table([["beside activations", *ways], *([name, *map(size, row)] for name, row in rows.items())])
