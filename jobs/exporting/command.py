"""What `export.py` does: writes a run in a format, and pushes it where that is asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jobs.exporting.gguf import file as gguf_file
from jobs.exporting.gguf.adapter import export_adapter, template_of
from jobs.exporting.gguf.ollama import create_line, modelfile_of
from jobs.exporting.held_out import HeldOut, held_out_of
from jobs.exporting.hugging_face import adapter as hf_adapter
from jobs.exporting.hugging_face import folder as hf_folder
from jobs.exporting.onnx import folder as onnx_folder
from jobs.exporting.opening import Opened, find_finished, open_adapter, open_whole
from jobs.exporting.options import Options
from jobs.exporting.pushing import push_exported
from runtime.settings.sources import Resolved
from runtime.storage import folders


def opened_whole(options: Options) -> tuple[Opened, HeldOut]:
    """The run as one model, and what its loss is measured on."""
    opened = open_whole(options.root, options.run)
    return opened, held_out_of(opened, Path(options.data_dir), options.text)


def to_hugging_face(options: Options) -> list[str]:
    """Write a Hugging Face folder."""
    hf_folder.check_packages()
    told = hf_folder.export_folder(
        *opened_whole(options), Path(options.out), options.outtype, options.allow_loss, options.named
    )
    return [*told, f"transformers.AutoModelForCausalLM.from_pretrained({options.place!r}) reads it"]


def to_gguf(options: Options) -> list[str]:
    """Write a GGUF file and its Modelfile."""
    out = Path(options.out)
    kind = options.outtype or "f16"
    folders.check_free(modelfile_of(out))
    gguf_file.check_packages(kind)
    opened, held_out = opened_whole(options)
    told = gguf_file.export_file(opened, held_out, out, kind, options.tokenizer, options.allow_loss)
    ollama = f"For Ollama: ollama run hf.co/{options.push}" if options.push else create_line(opened, out)
    return [*told, ollama] if options.tokenizer else told


def to_gguf_lora(options: Options) -> list[str]:
    """Write an adapter's GGUF file and its Modelfile."""
    out = Path(options.out)
    for beside in (modelfile_of(out), template_of(out)):
        folders.check_free(beside)
    gguf_file.check_packages()
    opened = open_adapter(options.root, options.run, "gguf")
    told = export_adapter(opened, out, options.tokenizer)
    return [*told, create_line(opened, out)] if options.tokenizer else told


def to_peft(options: Options) -> list[str]:
    """Write an adapter's folder."""
    opened = open_adapter(options.root, options.run)
    told = hf_adapter.export_folder(opened, Path(options.out), options.reader == "vllm", options.named)
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


WRITERS: dict[str, Callable[[Options], list[str]]] = {
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


def run(given: Resolved) -> None:
    """What `export.py` does."""
    options = given.settings
    with tempfile.TemporaryDirectory() as folder:
        if options.push:
            options = for_the_hub(given, Path(folder))
        told = WRITERS[options.to](options)
        print("\n".join([f"{options.place}: {options.run}", *told]), flush=True)
        if options.push:
            print(push_exported(options.target, find_finished(options.root, options.run), Path(options.out)))
