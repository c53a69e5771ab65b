"""What transformers and PEFT make of a run on a pretrained base: the same greedy text as ours, from the same files.

python -m benchmarks.elsewhere --run pretrained-folio --merged pretrained-folio-merged
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from jobs.generating.load import load
from runtime.errors import UserError
from runtime.extras import needs_package
from runtime.processes.command import run_command
from runtime.report import indented


def text_of(model, tokenizer, prompt: str) -> str:
    """transformers' own greedy continuation."""
    ids = tokenizer(prompt, return_tensors="pt")
    found = model.float().eval().generate(**ids, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(found[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--run", required=True, help="a LoRA run on a pretrained base")
    flags.add_argument("--merged", required=True, help="the same, merged")
    flags.add_argument("--prompt", default="Enter Hamlet.")
    flags.add_argument("--checkpoints-dir", type=Path, default=Path("checkpoints"))
    options = flags.parse_args()
    with needs_package("transformers", "test"), needs_package("peft", "test"):
        import peft
        import transformers
    texts = {}
    for name, title in ((options.run, "ours, with the adapter"), (options.merged, "ours, merged")):
        model, _ = load(name, options.checkpoints_dir)
        texts[title] = model.generate_text(options.prompt, 40, greedy=True)
    adapter = options.checkpoints_dir / options.run / "adapter"
    merged = options.checkpoints_dir / options.merged / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(adapter)
    with_adapter = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    texts["PEFT, with the adapter"] = text_of(with_adapter, tokenizer, options.prompt)
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged)
    texts["transformers, merged"] = text_of(whole, transformers.AutoTokenizer.from_pretrained(merged), options.prompt)
    for title, text in texts.items():
        print(f"{title}:\n{indented(options.prompt + text)}")
    for ours, theirs in (
        ("ours, with the adapter", "PEFT, with the adapter"),
        ("ours, merged", "transformers, merged"),
    ):
        if texts[ours] != texts[theirs]:
            raise UserError(f"{theirs} writes another text than {ours}")
    print("PEFT and transformers write what ours does.")


if __name__ == "__main__":
    run_command(main)
