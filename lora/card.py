"""The model card of an adapter: a README.md for the Hugging Face hub and for people."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lora.adapter import Adapter
from lora.variants.registry import VARIANTS

CARD = "README.md"


def _front_matter(base: str | None) -> list[str]:
    tags = ["lora", *([f"base_model:adapter:{base}"] if base else [])]
    lines = ["---", "library_name: peft", *([f"base_model: {json.dumps(base)}"] if base else []), "tags:"]
    return [*lines, *(f"- {json.dumps(tag)}" for tag in tags), "---"]  # JSON's strings are YAML's


def _config_rows(adapter: Adapter) -> dict[str, str]:
    config, targets = adapter.config, adapter.targets()
    ranks = sorted({config.rank_at(path) for path in targets})
    alphas = sorted({config.alpha_at(path) for path in targets})
    sizes = {"rank": ", ".join(map(str, ranks)), "alpha": ", ".join(f"{alpha:g}" for alpha in alphas)}
    return {
        "variant": config.variant,
        **{name: text for name, text in sizes.items() if name not in VARIANTS[config.variant].ignored_fields},
        "dropout": f"{config.dropout:g}",
        "targets": config.targets,
        "biases": config.bias,
        "embeddings": "trained" if config.train_embeddings else "the base's",
        "parameters": f"{sum(tensor.numel() for tensor in adapter.named_tensors().values()):,}",
    }


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def card(adapter: Adapter, notes: Mapping[str, str]) -> bytes:
    """Return the card as bytes. notes: more rows of its table, by name, such as `command`."""
    base = adapter.metadata.get("base")
    table = {**adapter.metadata, **_config_rows(adapter), **notes}
    rows = [f"| {name.replace('_', ' ')} | {_cell(text)} |" for name, text in table.items()]
    use = [
        "Its base is a model of this repository, not one of the hub. With the base's weights loaded into `model`,",
        "`peft.PeftModel.from_pretrained(model, folder)` reads this folder, and so does `adapters.py import`.",
    ]
    title = f"# LoRA adapter{f' for {base}' if base else ''}"
    lines = [*_front_matter(base), "", title, "", *use, "", "| | |", "|---|---|", *rows]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")
