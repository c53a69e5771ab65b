"""What is said of a run to whoever finds it elsewhere, which is nothing of the machine that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from jobs.adapting.adapted import texts_of
from runtime.settings.config import is_hub_records
from runtime.storage.encoding import read_json, to_json
from runtime.storage.folders import Files
from runtime.storage.runs import Run

CARD = "README.md"
TOLD_IN = ("config.json", "tokenizer_config.json")  # where transformers has written where a base was loaded from


def notes_of(run: Run) -> dict[str, str]:
    """How far a run came, as rows of a card; empty for one that was not trained here."""
    result = run.result
    if "best" not in result:
        return {}
    return {"steps": f"{result['best_step']:,}", "validation_loss": f"{result['best']:.4f}"}


def whole_card(run: Run, base_sha256: str, library: str, use: Sequence[str]) -> bytes:
    """The card of a whole model. run: what it was made of. use: the lines that load it."""
    base = run.metadata.get("base") or {}
    front = {"library_name": library, "pipeline_tag": "text-generation"}
    hub = base.get("hub") or run.metadata.get("hub")
    front |= {"base_model": hub} if hub else {}
    rows = {"run": run.name, "kind": run.kind, "base": hub or base.get("run", "")}
    if run.kind == "lora":
        rows |= {name: str(run.metadata["settings"].get(f"lora_{name}", "")) for name in ("rank", "alpha")}
    rows |= {"trained on": ", ".join(map(without_folders, texts_of(run)))}
    rows |= {"dataset sha256": run.metadata.get("dataset", {}).get("sha256", ""), "base sha256": base_sha256}
    rows |= {name.replace("_", " "): text for name, text in notes_of(run).items()}
    lines = ["---", *(f"{name}: {json.dumps(text)}" for name, text in front.items()), "---", "", f"# {run.name}", ""]
    lines += ["```", *use, "```", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {text} |" for name, text in rows.items() if text]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


def without_folders(dataset: str) -> str:
    """A DATASET by the names of its files alone."""
    return dataset if is_hub_records(dataset) else ", ".join(Path(part.strip()).name for part in dataset.split(","))


def without_paths(files: Files) -> Files:
    """The files of a folder, with no path of a machine in those that say where a base was loaded from."""
    cleaned = {}
    for name in files.keys() & set(TOLD_IN):
        values = read_json(files[name], name)
        kept = {
            key: value for key, value in values.items() if not (isinstance(value, str) and Path(value).is_absolute())
        }
        cleaned |= {name: to_json(kept)} if kept != values else {}
    return files | cleaned
