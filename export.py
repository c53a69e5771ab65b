"""Take a run elsewhere: to transformers, to llama.cpp and Ollama, as an adapter to PEFT or vLLM, to ONNX.

python export.py lora-folio-r16 --to hf --out folio                     base and adapter as one Hugging Face folder
python export.py lora-folio-r16 --to gguf --out folio.gguf              as one file for llama.cpp, with a Modelfile
python export.py lora-folio-r16 --to gguf --out folio.gguf --outtype q8_0    in 8 bits
python export.py lora-folio-r16 --to peft --out folio-adapter           the adapter by itself, as PEFT reads it
python export.py lora-folio-r16 --to peft --for vllm --out folio-vllm   and as vLLM does
python export.py lora-folio-r16 --to onnx --out folio-onnx              as an ONNX graph with its cache
python export.py lora-folio-r16 --to onnx --out folio-int8 --quantize int8   in 8 bits

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
from jobs.exporting.held_out import MORE_LOSS, HeldOut, held_out_of
from jobs.exporting.onnx import folder as onnx_folder
from jobs.exporting.opening import Opened, find_finished, open_adapter, open_whole
from jobs.exporting.peft_folder import export_folder
from jobs.runs.preflight import check_writable
from runtime.errors import UsageError
from runtime.processes.command import run_command
from runtime.settings.config import FOLDER, CommonSettings, from_command_line
from runtime.settings.fields import setting
from runtime.settings.sources import Resolved

WHAT = {"group": "What to export", "env": False}
WHOLE = ("hf", "gguf", "onnx")
OF_FORMATS = {"outtype": WHOLE[:2], "text": WHOLE, "allow_loss": WHOLE, "tokenizer": ("gguf",), "reader": ("peft",)}
OF_FORMATS |= dict.fromkeys(("cache", "quantize"), ("onnx",))
SPELT = {"tokenizer": "no-tokenizer", "reader": "for", "cache": "no-cache"}
A_PATH = {"pattern": rf"|{FOLDER}", "path": True, **WHAT}


@dataclass(frozen=True, kw_only=True)
class Options(CommonSettings):
    """The flags of export.py."""

    run: str = setting(
        "", "A run, or the Hugging Face folder or hub name of a model", metavar="RUN",
        allowed="a run's name, a folder, or a name on the hub", **A_PATH,
    )  # fmt: skip
    to: str = setting("hf", "The format", choices=("hf", "gguf", "peft", "onnx"), **WHAT)
    out: str = setting("", "The new folder or file", required=True, allowed="a path", **A_PATH)
    outtype: str | None = setting(
        None, "For hf and gguf: what matrices are stored in; none keeps that of the run, or takes f16 for gguf",
        choices=gguf_file.TYPES, **WHAT,
    )  # fmt: skip
    tokenizer: bool = setting(True, "For gguf: with its tokenizer, or without for programs that pass token ids", **WHAT)
    reader: str = setting(
        "peft", "For peft, and spelt --for as well: vllm takes adapters of one rank and scale, without embeddings",
        also="for", choices=("peft", "vllm"), **WHAT,
    )  # fmt: skip

    cache: bool = setting(True, "For onnx: with keys and values as inputs and outputs, or without", **WHAT)
    quantize: str = setting("none", "For onnx: matrices in fp32, or in 8 bits", choices=("none", "int8"), **WHAT)
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
            flag = SPELT.get(name, name.replace("_", "-"))
            named = " and ".join(filter(None, (", ".join(formats[:-1]), formats[-1])))
            raise UsageError(f"--{flag} is for --to {named}, not --to {options.to}")
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


def to_gguf(options: Options) -> list[str]:
    """Write a GGUF file and its Modelfile."""
    out = Path(options.out)
    if out.suffix != ".gguf":
        raise UsageError(f"--out {out}: the name of a GGUF file ends in .gguf")
    check_free(gguf_file.modelfile_of(out))
    gguf_file.check_packages()
    return gguf_file.export_file(
        *opened_whole(options), out, options.outtype or "f16", options.tokenizer, options.allow_loss
    )


def to_peft(options: Options) -> list[str]:
    """Write an adapter's folder."""
    run = find_finished(options.root, options.run)
    if run.kind != "lora":
        raise UsageError(f"{run.name} has no adapter; --to hf exports the whole model")
    told = export_folder(open_adapter(options.root, run), Path(options.out), options.reader == "vllm")
    reads = f"vllm serve BASE --enable-lora --lora-modules {run.name}={options.out}"
    if options.reader == "peft":
        reads = f"peft.PeftModel.from_pretrained(model, {options.out!r}) reads it"
    return [told, reads]


def to_onnx(options: Options) -> list[str]:
    """Write a folder with an ONNX graph, and say how TensorRT would be asked, which is not done here."""
    onnx_folder.check_packages()
    out, int8 = Path(options.out), options.quantize == "int8"
    told = onnx_folder.export_folder(*opened_whole(options), out, options.cache, int8, options.allow_loss)
    reads = "TensorRT does not read int8 of this kind: export without --quantize for it"
    if not int8:
        reads = f"TensorRT, not run here: sh {out / onnx_folder.SCRIPT}"
    return [
        *told,
        f"onnxruntime.InferenceSession({str(out / onnx_folder.GRAPH)!r}) reads it",
        reads,
        "TensorRT-LLM, not run here, takes no ONNX but a folder of --to hf: trtllm-serve FOLDER, or trtllm-build "
        "--checkpoint_dir CONVERTED --output_dir ENGINE after its convert_checkpoint.py",
    ]


FORMATS: dict[str, Callable[[Options], list[str]]] = {
    "hf": to_hugging_face,
    "gguf": to_gguf,
    "peft": to_peft,
    "onnx": to_onnx,
}


def main() -> None:
    """Run the command."""
    given = from_command_line(Options, __doc__)
    check(given)
    options = given.settings
    told = FORMATS[options.to](options)
    print("\n".join([f"{options.out}: {options.run}", *told]))


if __name__ == "__main__":
    run_command(main)
