"""The Modelfile beside a GGUF file, from which Ollama makes a model."""

from __future__ import annotations

from pathlib import Path

from jobs.exporting.gguf.vocabulary import Vocabulary
from jobs.exporting.opening import Opened
from runtime.storage.folders import write_file


def modelfile_of(out: Path) -> Path:
    """Where the Modelfile of a GGUF file lies."""
    return out.with_suffix(".Modelfile")


def write_modelfile(out: Path, opened: Opened, vocabulary: Vocabulary, base: str = "") -> None:
    """Write what `ollama create` reads. base: the file of the base, where `out` is an adapter's.

    A chat template is in the GGUF file of a model; without one a prompt is passed on as it is.
    """
    lines = [f"FROM ./{base}", f"ADAPTER ./{out.name}"] if base else [f"FROM ./{out.name}"]
    lines.append(f"PARAMETER num_ctx {opened.model.config.max_positions}")
    if opened.template is None:
        lines.append('TEMPLATE "{{ .Prompt }}"')
    stops = [i for i in opened.base.tokenizer.stop_ids if i < len(vocabulary.tokens)]  # some configs name others
    lines += [f'PARAMETER stop "{vocabulary.tokens[i]}"' for i in stops]
    write_file(modelfile_of(out), ("\n".join(lines) + "\n").encode())


def create_line(opened: Opened, out: Path) -> str:
    """The command that reads the Modelfile of a GGUF file."""
    return f"For Ollama: ollama create {opened.run.name.lower()} -f {modelfile_of(out)}"
