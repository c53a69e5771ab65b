"""Generation with our cache against transformers' cached generate, on the same shapes.

python -m benchmarks.generate                        0.8M and 10.7M parameters, one prompt and 32
python -m benchmarks.generate --sizes 0.8M --rounds 3
"""

from __future__ import annotations

import torch

from benchmarks import peers
from benchmarks.contest import SIZES, close, parser, ratio, take_turns, tell
from models.generation.sampling import Sampling, generate
from runtime.device import pick_machine
from runtime.processes.command import run_command

GOALS = {("0.8M", 1): 4.0, ("10.7M", 1): 2.0, ("10.7M", 32): 2.0}  # by size and prompts


def measure(size: str, prompts: int, rounds: int, device: str) -> list[dict]:
    """How many times as fast as transformers we sample, without an adapter and with one."""
    auto, count = pick_machine(device, "auto"), SIZES[size][-1] // 2
    start = torch.randint(SIZES[size][0], (prompts, 4), generator=torch.Generator().manual_seed(0)).tolist()
    theirs = peers.transformers_gpt2(SIZES[size]).eval().to(auto.device)
    ours = {kind: peers.ours(SIZES[size], lora=kind == "lora").to(auto.device) for kind in ("plain", "lora")}

    def with_transformers() -> object:
        idx = torch.tensor(start, device=auto.device)
        return theirs.generate(idx, do_sample=True, top_k=0, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)

    def with_ours(model: torch.nn.Module) -> object:
        with auto.autocast():
            return generate(model, start, count, Sampling(), seed=0)

    calls = {kind: lambda model=model: with_ours(model) for kind, model in ours.items()}
    seconds = take_turns({"transformers": with_transformers, **calls}, rounds, auto)
    return [
        {"what": f"{size}, {prompts} prompts: transformers' time / {label}", "size": size, "prompts": prompts}
        | ratio(seconds, "transformers", kind)
        | {
            "tokens_per_second": prompts * count / min(seconds[kind]),
            "goal": GOALS.get((size, prompts)) if kind == "plain" else None,
        }
        for kind, label in (("plain", "ours"), ("lora", "ours with an adapter"))
    ]


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.8M", "10.7M"])
    options = flags.parse_args()
    rows = []
    for size in options.sizes:
        for prompts in (1, 32):
            rows += (found := measure(size, prompts, options.rounds, options.device))
            tell(found)
    close("generate", rows, options.record)


if __name__ == "__main__":
    run_command(main)
