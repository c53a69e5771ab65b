"""The flags of `export.py`, and what of them goes together."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from jobs.exporting.kinds import BY_LLAMA_CPP, DENSE, IN_BLOCKS
from runtime.errors import UsageError
from runtime.hub.pushing import Target
from runtime.settings.config import FOLDER, HUB_NAME, CommonSettings
from runtime.settings.fields import setting
from runtime.settings.sources import Resolved
from runtime.start import command_line
from runtime.storage import folders

WHAT = {"group": "What to export", "env": False}
FORMATS = ("hf", "gguf", "gguf-lora", "peft", "onnx")
WHOLE = ("hf", "gguf", "onnx")
OF_FORMATS = {"outtype": WHOLE[:2], "text": WHOLE, "allow_loss": WHOLE, "reader": ("peft",)}
OF_FORMATS |= {"tokenizer": ("gguf", "gguf-lora")} | dict.fromkeys(("cache", "quantize"), ("onnx",))
SPELT = {"tokenizer": "no-tokenizer", "reader": "for", "cache": "no-cache"}
MORE_LOSS = 0.05  # nats a token that an export may cost, unless --allow-loss says otherwise
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
        choices=FORMATS, **WHAT,
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
        choices=(*DENSE, *IN_BLOCKS, *BY_LLAMA_CPP), **WHAT,
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


def check_flags(given: Resolved) -> None:
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
    if options.to == "hf" and options.outtype not in (None, *DENSE):
        raise UsageError(f"--outtype {options.outtype} is for --to gguf, not --to hf")
    if options.push and options.to == "gguf-lora":
        raise UsageError("--push takes an adapter with --to peft; one for llama.cpp is written with --out")
    if options.out and options.to.startswith("gguf") and Path(options.out).suffix != ".gguf":
        raise UsageError(f"--out {options.out}: the name of a GGUF file ends in .gguf")
    if options.out:
        folders.check_free(Path(options.out))
        folders.check_writable(Path(options.out).absolute().parent)
    if options.push:
        options.target.check()
