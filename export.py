"""Take a run elsewhere: to transformers, to llama.cpp and Ollama, as an adapter to PEFT or vLLM, to ONNX.

python export.py lora-folio-r8 --to hf --out folio                      base and adapter as one Hugging Face folder
python export.py lora-pairs-r16 --to gguf --out pairs.gguf              as one file for llama.cpp, with a Modelfile
python export.py lora-pairs-r16 --to gguf --out pairs.gguf --outtype q8_0    in 8 bits
python export.py lora-pairs-r16 --to gguf-lora --out adapter.gguf       the adapter by itself, as llama.cpp reads it
python export.py lora-folio-r8 --to peft --out folio-adapter            and as PEFT reads it
python export.py lora-pairs-r16 --to peft --for vllm --out pairs-vllm   and vLLM, on a pretrained base
python export.py lora-folio-r8 --to onnx --out folio-onnx               as an ONNX graph with its cache
python export.py lora-folio-r8 --to onnx --out folio-int8 --quantize int8    in 8 bits
python export.py lora-folio-r8 --push user/folio                        to the Hugging Face hub: the adapter, or --to hf

The program that reads the format checks what was written before it gets its name; nothing is overwritten.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.adapting.adapted import check_free
from jobs.exporting import hugging_face
from jobs.exporting.gguf import file as gguf_file
from jobs.exporting.gguf.adapter import export_adapter, template_of
from jobs.exporting.gguf.ollama import create_line, modelfile_of
from jobs.exporting.held_out import MORE_LOSS, HeldOut, held_out_of
from jobs.exporting.onnx import folder as onnx_folder
from jobs.exporting.opening import Opened, find_finished, open_adapter, open_whole
from jobs.exporting.peft_folder import export_folder
from jobs.exporting.pushing import push_exported
from jobs.runs.preflight import check_writable
from runtime.errors import UsageError
from runtime.hub.pushing import Target
from runtime.processes.command import run_command
from runtime.settings.config import FOLDER, HUB_NAME, CommonSettings, from_command_line
from runtime.settings.fields import setting
from runtime.settings.sources import Resolved
from runtime.start import command_line

WHAT = {"group": "What to export", "env": False}
WHOLE = ("hf", "gguf", "onnx")
OF_FORMATS = {"outtype": WHOLE[:2], "text": WHOLE, "allow_loss": WHOLE, "reader": ("peft",)}
OF_FORMATS |= {"tokenizer": ("gguf", "gguf-lora")} | dict.fromkeys(("cache", "quantize"), ("onnx",))
SPELT = {"tokenizer": "no-tokenizer", "reader": "for", "cache": "no-cache"}
A_PATH = {"pattern": rf"|{FOLDER}", "path": True, **WHAT}


@dataclass(frozen=True, kw_only=True)
class Options(CommonSettings):
    """The flags of export.py."""

    run: str = setting(
        "", "A run, or the Hugging Face folder or hub name of a model", metavar="RUN",
        allowed="a run's name, a folder, or a name on the hub", **A_PATH,
    )  # fmt: skip
    to: str = setting(
        "hf", "The format; what is pushed of a LoRA run is its adapter, peft, unless this says otherwise",
        choices=("hf", "gguf", "gguf-lora", "peft", "onnx"), **WHAT,
    )  # fmt: skip
    out: str = setting(
        "", "The new folder or file; with --push it may be left out, and is a temporary one", allowed="a path", **A_PATH
    )
    push: str = setting(
        "", "Push it to this repository of yours on the Hugging Face hub, which is made if there is none",
        pattern=rf"|{HUB_NAME}", allowed="user/name", **WHAT,
    )  # fmt: skip
    public: bool = setting(False, "For --push: whether a repository that is made is for everybody to see", **WHAT)
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

    @property
    def place(self) -> str:
        """Where those who read the format find it."""
        return self.push or self.out

    @property
    def named(self) -> str:
        """The same as a card says it, which tells no folders of this machine."""
        return self.push or Path(self.out).name

    @property
    def target(self) -> Target:
        """Where it is pushed; the command that tries again takes a temporary place."""
        words = re.sub(r"\0--out(=|\0)[^\0]*", "", "\0".join(["", *sys.argv[1:]])).split("\0")[1:]
        return Target(self.push, not self.public, command_line("export.py", *words))


def check(given: Resolved) -> None:
    """Raises UsageError for flags of another format and where something is in the way, UserError where nothing can be
    written there or pushed: all before the first model is opened."""
    options = given.settings
    if not options.place:
        raise UsageError("where to? --out PATH writes it there, and --push USER/NAME to the Hugging Face hub")
    if given.explicit("public") and not options.push:
        raise UsageError("--public is for --push USER/NAME")
    for name, formats in OF_FORMATS.items():
        if given.explicit(name) and options.to not in formats:
            flag = SPELT.get(name, name.replace("_", "-"))
            named = " and ".join(filter(None, (", ".join(formats[:-1]), formats[-1])))
            raise UsageError(f"--{flag} is for --to {named}, not --to {options.to}")
    if options.to == "hf" and options.outtype not in (None, *hugging_face.DTYPES):
        raise UsageError(f"--outtype {options.outtype} is for --to gguf, not --to hf")
    if options.push and options.to == "gguf-lora":
        raise UsageError("--push takes an adapter with --to peft; one for llama.cpp is written with --out")
    if options.out:
        check_free(Path(options.out))
        check_writable(Path(options.out).absolute().parent)
    if options.push:
        options.target.check()


def opened_whole(options: Options) -> tuple[Opened, HeldOut]:
    """The run as one model, and what its loss is measured on."""
    opened = open_whole(options.root, options.run)
    return opened, held_out_of(opened, Path(options.data_dir), options.text)


def to_hugging_face(options: Options) -> list[str]:
    """Write a Hugging Face folder."""
    hugging_face.check_packages()
    told = hugging_face.export_folder(
        *opened_whole(options), Path(options.out), options.outtype, options.allow_loss, options.named
    )
    return [*told, f"transformers.AutoModelForCausalLM.from_pretrained({options.place!r}) reads it"]


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
    opened, held_out = opened_whole(options)
    told = gguf_file.export_file(opened, held_out, out, kind, options.tokenizer, options.allow_loss)
    ollama = f"For Ollama: ollama run hf.co/{options.push}" if options.push else create_line(opened, out)
    return [*told, ollama] if options.tokenizer else told


def to_gguf_lora(options: Options) -> list[str]:
    """Write an adapter's GGUF file and its Modelfile."""
    out = Path(options.out)
    check_gguf(out, modelfile_of(out), template_of(out))
    opened = open_adapter(options.root, options.run, "gguf")
    told = export_adapter(opened, out, options.tokenizer)
    return [*told, create_line(opened, out)] if options.tokenizer else told


def to_peft(options: Options) -> list[str]:
    """Write an adapter's folder."""
    opened = open_adapter(options.root, options.run)
    told = export_folder(opened, Path(options.out), options.reader == "vllm", options.named)
    reads = f"vllm serve BASE --enable-lora --lora-modules {opened.run.name}={options.place}"
    if options.reader == "peft":
        reads = f"peft.PeftModel.from_pretrained(model, {options.place!r}) reads it"
    return [told, reads]


def to_onnx(options: Options) -> list[str]:
    """Write a folder with an ONNX graph, and say how TensorRT would be asked, which is not done here."""
    onnx_folder.check_packages()
    place, int8 = Path(options.place), options.quantize == "int8"
    told = onnx_folder.export_folder(
        *opened_whole(options), Path(options.out), options.cache, int8, options.allow_loss, options.named
    )
    reads = "TensorRT does not read int8 of this kind: export without --quantize for it"
    if not int8:
        reads = f"TensorRT, not run here: sh {place / onnx_folder.SCRIPT}"
    return [
        *told,
        f"onnxruntime.InferenceSession({str(place / onnx_folder.GRAPH)!r}) reads it",
        reads,
        "TensorRT-LLM, not run here, takes no ONNX but a folder of --to hf: trtllm-serve FOLDER, or trtllm-build "
        "--checkpoint_dir CONVERTED --output_dir ENGINE after its convert_checkpoint.py",
    ]


FORMATS: dict[str, Callable[[Options], list[str]]] = {
    "hf": to_hugging_face,
    "gguf": to_gguf,
    "gguf-lora": to_gguf_lora,
    "peft": to_peft,
    "onnx": to_onnx,
}


def for_the_hub(given: Resolved, folder: Path) -> Options:
    """The options with what they leave open where something is pushed. folder: a temporary one."""
    options = given.settings
    run = find_finished(options.root, options.run)
    asked = given.explicit("to") or given.explicit("outtype")
    to = "peft" if run.kind == "lora" and not asked else options.to
    return replace(options, to=to, out=options.out or str(folder / (f"{run.name}.gguf" if to == "gguf" else run.name)))


def main() -> None:
    """Run the command."""
    given = from_command_line(Options, __doc__)
    check(given)
    options = given.settings
    with tempfile.TemporaryDirectory() as folder:
        if options.push:
            options = for_the_hub(given, Path(folder))
        told = FORMATS[options.to](options)
        print("\n".join([f"{options.place}: {options.run}", *told]), flush=True)
        if options.push:
            run = find_finished(options.root, options.run)
            print(push_exported(options.target, run, Path(options.out)))


if __name__ == "__main__":
    run_command(main)
