"""Formats what a run prints on stdout: its banner, parameter counts, sizes, tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from runtime.settings.config import Settings


def banner(settings: Settings, unread: Collection[str]) -> str:
    """One line on what kind of run this is, and for LoRA its settings without those that its variant does not read."""
    if settings.use_lora:
        names = [name for name in ("rank", "alpha", "dropout") if f"lora_{name}" not in unread]
        told = ", ".join(f"{name}: {getattr(settings, f'lora_{name}')}" for name in names)
        return f"🔧 Using LoRA for efficient fine-tuning\n   LoRA {told}"
    return "🔧 Fine-tuning all weights of a base" if settings.base else "🔧 Training all weights of a new base"


def statistics(info: Mapping[str, float], use_lora: bool) -> str:
    """Counts of parameters by group, which add up to the total; `info` is the model's `get_parameter_info()`."""
    lines = ["📊 Parameter Statistics:", f"   Total parameters: {info['total']:,}"]
    if not use_lora:
        return "\n".join([*lines, f"   Trainable: {info['trainable']:,}", f"   Frozen: {info['frozen']:,}"])
    share = 100 * info["trainable"] / info["total"]
    lines += [
        f"   Trainable (LoRA): {info['lora']:,}",
        f"   Trainable (embeddings): {info['embedding']:,}",
        f"   Frozen (base): {info['frozen']:,}",
        f"   LoRA percentage: {info['lora_percentage']:.2f}%",
        f"   💰 Cost savings: Training only {share:.2f}% of parameters!",
    ]
    if info["embedding"] > info["lora"]:
        lines.append("   The embeddings outweigh the adapters; LORA_TRAIN_EMBEDDINGS=False leaves them frozen")
    return "\n".join(lines)


def size(count: int | None) -> str:
    """Bytes in words."""
    if count is None:
        return "not available"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def indented(text: str, most: int = 400) -> str:
    """The beginning of a text, set off from what is around it."""
    text = text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " ..."
    return "\n".join(f"   | {line}" for line in text.strip("\n").split("\n"))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns, the first row being the heads: words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numeric = [any(cell[:1] in "0123456789+-" for cell in column[1:] if cell) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in rows
    )
