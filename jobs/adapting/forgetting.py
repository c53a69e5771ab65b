"""The forgetting meter: what an adapter gains on its own text and loses on the base's, from none of it to all."""

from __future__ import annotations

from pathlib import Path

from jobs.adapting.adapted import Adapted, held_out, texts_of
from lora.attach import using
from runtime import report
from runtime.device import Machine
from runtime.errors import UserError
from runtime.training.steps import evaluate

Curves = dict[str, list[float]]  # validation loss at each strength, by text


def texts_to_measure(adapted: Adapted, dataset: str) -> dict[str, str]:
    """The texts by the role they have: those of the adapter (or the one that is given), then the base's own."""
    own = [dataset] if dataset else texts_of(adapted.run)
    if not own:
        raise UserError(f"{adapted.run.name} does not tell what it was trained on; name the text with --dataset")
    roles = dict.fromkeys(own, "the adapter's")
    for text in texts_of(adapted.base.run):
        roles[text] = "the adapter's and the base's" if text in own else "the base's"
    return roles


def measure(
    adapted: Adapted, texts: list[str], strengths: list[float], batches: int, data_dir: Path, machine: Machine
) -> Curves:
    """Held-out loss on each text at each strength."""
    windows = {text: held_out(text, adapted.run, adapted.base, data_dir, batches) for text in texts}
    model = adapted.base.model
    adapted.adapter.attach_to(model, base_sha256=adapted.base.sha256)
    model.to(machine.device)
    losses: Curves = {text: [] for text in texts}
    for strength in strengths:
        with using(model, {"default": strength}):
            for text, batches_of_text in windows.items():
                losses[text].append(evaluate(model, batches_of_text, machine))
    return losses


def told(roles: dict[str, str], strengths: list[float], losses: Curves) -> str:
    """The curves as a table."""
    heads = ["strength", *(f"{Path(text).name} ({role})" for text, role in roles.items())]
    rows = [[f"{strength:g}", *(f"{losses[text][i]:.4f}" for text in roles)] for i, strength in enumerate(strengths)]
    return report.table([heads, *rows])
