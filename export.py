"""Take a run elsewhere: a folder that transformers reads, a file for llama.cpp and Ollama, an adapter for PEFT or vLLM.

python export.py lora-folio-r16 --to hf --out folio                     base and adapter as one Hugging Face folder
python export.py lora-folio-r16 --to gguf --out folio.gguf              as one file for llama.cpp, with a Modelfile
python export.py lora-folio-r16 --to gguf --out folio.gguf --outtype q8_0    in 8 bits
python export.py lora-folio-r16 --to gguf-lora --out adapter.gguf       the adapter by itself, as llama.cpp reads it
python export.py lora-folio-r16 --to peft --out folio-adapter           and as PEFT reads it
python export.py lora-folio-r16 --to peft --for vllm --out folio-vllm   and vLLM

Whoever reads the format computes with what was written before it gets its name; nothing is overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.adapting.adapted import check_free
from jobs.exporting import hugging_face
from jobs.exporting.gguf import file as gguf_file
from jobs.exporting.gguf.adapter import export_adapter, template_of
from jobs.exporting.gguf.ollama import modelfile_of
from jobs.exporting.held_out import MORE_LOSS, HeldOut, held_out_of
from jobs.exporting.opening import Opened, open_adapter, open_whole
from jobs.exporting.peft_folder import export_folder
from jobs.runs.preflight import check_writable
from runtime.errors import UsageError
from runtime.processes.command import run_command
from runtime.settings.config import FOLDER, CommonSettings, from_command_line
from runtime.settings.fields import setting
from runtime.settings.sources import Resolved

WHAT = {"group": "What to export", "env": False}
WHOLE = ("hf", "gguf")
OF_FORMATS = {
    "outtype": WHOLE, "text": WHOLE, "allow_loss": WHOLE, "tokenizer": ("gguf", "gguf-lora"), "reader": ("peft",),
}  # fmt: skip
A_PATH = {"pattern": rf"|{FOLDER}", "path": True, **WHAT}


@dataclass(frozen=True, kw_only=True)
class Options(CommonSettings):
    """The flags of export.py."""

    run: str = setting(
        "", "A run, or the Hugging Face folder or hub name of a model", metavar="RUN",
        allowed="a run's name, a folder, or a name on the hub", **A_PATH,
    )  # fmt: skip
    to: str = setting("hf", "The format", choices=("hf", "gguf", "gguf-lora", "peft"), **WHAT)
    out: str = setting("", "The new folder or file", required=True, allowed="a path", **A_PATH)
    outtype: str | None = setting(
        None, "For hf and gguf: what matrices are stored in; none keeps that of the run, or takes f16 for gguf",
        choices=gguf_file.TYPES, **WHAT,
    )  # fmt: skip
    tokenizer: bool = setting(
        True, "For gguf and gguf-lora: with its tokenizer, or without for programs that pass token ids", **WHAT
    )
    reader: str = setting(
        "peft", "For peft, and spelt --for as well: vllm takes adapters of one rank and scale, without embeddings",
        also="for", choices=("peft", "vllm"), **WHAT,
    )  # fmt: skip

    text: str = setting(
        "",
        "A corpus or a text file to measure the loss on; empty takes what the run held out",
        allowed="a path",
        **A_PATH,
    )
    allow_loss: float = setting(MORE_LOSS, "Nats a token by which the loss may be higher", low=0.0, **WHAT)

    @property
    def root(self) -> Path:
        """The folder of the runs."""
        return Path(self.checkpoints_dir)


def check(given: Resolved) -> None:
    """Raises UsageError for flags of another format and where something is in the way, UserError where nothing can be
    written there: all before the first model is opened."""
    options = given.settings
    for name, formats in OF_FORMATS.items():
        if given.explicit(name) and options.to not in formats:
            flag = {"tokenizer": "no-tokenizer", "reader": "for"}.get(name, name.replace("_", "-"))
            raise UsageError(f"--{flag} is for --to {' and '.join(formats)}, not --to {options.to}")
    if options.to == "hf" and options.outtype not in (None, *hugging_face.DTYPES):
        raise UsageError(f"--outtype {options.outtype} is for --to gguf, not --to hf")
    check_free(Path(options.out))
    check_writable(Path(options.out).absolute().parent)


def opened_whole(options: Options) -> tuple[Opened, HeldOut]:
    """The run as one model, and what its loss is measured on."""
    opened = open_whole(options.root, options.run)
    return opened, held_out_of(opened, Path(options.data_dir), options.text)


def to_hugging_face(options: Options) -> list[str]:
    """Write a Hugging Face folder."""
    hugging_face.check_packages()
    told = hugging_face.export_folder(*opened_whole(options), Path(options.out), options.outtype, options.allow_loss)
    return [*told, f"transformers.AutoModelForCausalLM.from_pretrained({options.out!r}) reads it"]


def check_gguf(out: Path, *others: Path, kind: str = "f32") -> None:
    """Raises UsageError for a name that is none of a GGUF file and where one of the others is taken, UserError where
    what writes it is not installed."""
    if out.suffix != ".gguf":
        raise UsageError(f"--out {out}: the name of a GGUF file ends in .gguf")
    for other in others:
        check_free(other)
    gguf_file.check_packages(kind)


def to_gguf(options: Options) -> list[str]:
    """Write a GGUF file and its Modelfile."""
    out = Path(options.out)
    kind = options.outtype or "f16"
    check_gguf(out, modelfile_of(out), kind=kind)
    return gguf_file.export_file(*opened_whole(options), out, kind, options.tokenizer, options.allow_loss)


def to_gguf_lora(options: Options) -> list[str]:
    """Write an adapter's GGUF file and its Modelfile."""
    out = Path(options.out)
    check_gguf(out, modelfile_of(out), template_of(out))
    return export_adapter(open_adapter(options.root, options.run, "gguf"), out, options.tokenizer)


def to_peft(options: Options) -> list[str]:
    """Write an adapter's folder."""
    opened = open_adapter(options.root, options.run)
    told = export_folder(opened, Path(options.out), options.reader == "vllm")
    reads = f"vllm serve BASE --enable-lora --lora-modules {opened.run.name}={options.out}"
    if options.reader == "peft":
        reads = f"peft.PeftModel.from_pretrained(model, {options.out!r}) reads it"
    return [told, reads]


FORMATS: dict[str, Callable[[Options], list[str]]] = {
    "hf": to_hugging_face, "gguf": to_gguf, "gguf-lora": to_gguf_lora, "peft": to_peft,
}  # fmt: skip


def main() -> None:
    """Run the command."""
    given = from_command_line(Options, __doc__)
    check(given)
    options = given.settings
    told = FORMATS[options.to](options)
    print("\n".join([f"{options.out}: {options.run}", *told]))


if __name__ == "__main__":
    run_command(main)
