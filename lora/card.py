"""The model card of an adapter: a README.md for the Hugging Face hub and for people."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lora.adapter import Adapter
from lora.variants.registry import VARIANTS
from runtime.settings.config import is_hub_name

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


def _use(hub: str | None, place: str) -> list[str]:
    """How it is loaded. hub: the base's name on the hub, where it was fetched from there."""
    if not hub:
        return [
            "Its base has no name on the hub, and is known by its fingerprint. With its weights loaded into `model`,",
            f"`peft.PeftModel.from_pretrained(model, {place!r})` reads this adapter, and so does `adapters.py import`.",
        ]
    lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
    lines += [
        f"base = AutoModelForCausalLM.from_pretrained({hub!r})",
        f"model = PeftModel.from_pretrained(base, {place!r})",
    ]
    return ["```python", *lines, "```"]


def card(adapter: Adapter, notes: Mapping[str, str], place: str = "folder") -> bytes:
    """Return the card as bytes. notes: more rows of its table, by name, such as `command`. place: where the adapter
    lies, in the lines that load it."""
    base, path = adapter.metadata.get("base"), adapter.metadata.get("base_path", "")
    hub = path if is_hub_name(path) else None
    table = {**adapter.metadata, **_config_rows(adapter), **notes}
    rows = [f"| {name.replace('_', ' ')} | {_cell(text)} |" for name, text in table.items()]
    title = f"# LoRA adapter{f' for {base}' if base else ''}"
    lines = [*_front_matter(hub), "", title, "", *_use(hub, place), "", "| | |", "|---|---|", *rows]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")
