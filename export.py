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

import runtime.start  # before all that may be missing
from jobs.exporting.options import Options, check_flags
from runtime.processes.command import run_command
from runtime.settings.config import from_command_line


def main() -> None:
    """Run the command."""
    given = from_command_line(Options, __doc__)
    check_flags(given)
    with runtime.start.importing():
        from jobs.exporting.command import run
    run(given)


if __name__ == "__main__":
    run_command(main)
