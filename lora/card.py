"""The card of an adapter: a README.md that the hub, and people, read. It says what is known, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lora.adapter import Adapter
from lora.config import LoRAConfig
from lora.variants.registry import VARIANTS

CARD = "README.md"


def _front_matter(base: str | None) -> list[str]:
    tags = ["lora", *([f"base_model:adapter:{base}"] if base else [])]
    lines = ["---", "library_name: peft", *([f"base_model: {json.dumps(base)}"] if base else []), "tags:"]
    return [*lines, *(f"- {json.dumps(tag)}" for tag in tags), "---"]  # JSON's strings are YAML's


def _made_of(adapter: Adapter) -> dict[str, str]:
    config: LoRAConfig = adapter.config
    ranks = sorted({config.rank_at(path) for path in adapter.targets()})
    alphas = sorted({config.alpha_at(path) for path in adapter.targets()})
    about = {"rank": ", ".join(map(str, ranks)), "alpha": ", ".join(f"{alpha:g}" for alpha in alphas)}
    count = sum(tensor.numel() for tensor in adapter.named_tensors().values())
    return {
        "variant": config.variant,
        **{name: text for name, text in about.items() if name not in VARIANTS[config.variant].unread},
        "dropout": f"{config.dropout:g}",
        "targets": config.targets,
        "biases": config.bias,
        "embeddings": "trained" if config.train_embeddings else "the base's",
        "parameters": f"{count:,}",
    }


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def card(adapter: Adapter, notes: Mapping[str, str]) -> bytes:
    """The card as bytes. notes: facts beside the adapter's own, such as `command`, by name."""
    base = adapter.facts.get("base")
    facts = {**adapter.facts, **_made_of(adapter), **notes}
    rows = [f"| {name.replace('_', ' ')} | {_cell(text)} |" for name, text in facts.items()]
    use = [
        "Its base is a model of this repository, not one of the hub. With the base's weights loaded into `model`,",
        "`peft.PeftModel.from_pretrained(model, folder)` reads this folder, and so does `adapters.py import`.",
    ]
    title = f"# LoRA adapter{f' for {base}' if base else ''}"
    lines = [*_front_matter(base), "", title, "", *use, "", "| | |", "|---|---|", *rows]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")
