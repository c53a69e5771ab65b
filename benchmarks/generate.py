"""Generation with our cache against transformers' cached generate, on the same shapes; and many prompts by continuous
batching against batches that wait for their longest.

python -m benchmarks.generate                        0.8M and 10.7M parameters, one prompt and 32; 200 prompts
python -m benchmarks.generate --sizes 0.8M --rounds 3
python -m benchmarks.generate --sizes 0.8M --prompts 200
"""

from __future__ import annotations

import torch

from benchmarks import peers
from benchmarks.contest import SIZES, close, parser, ratio, take_turns, tell
from models.generation.continuous import Asked
from models.generation.per_row import AT_ONCE, generate_per_row
from models.generation.sampling import Sampling, generate
from runtime.device import pick_machine
from runtime.processes.command import run_command

GOALS = {("0.8M", 1): 4.0, ("10.7M", 1): 2.0, ("10.7M", 32): 2.0, ("0.8M", 200): 1.5}  # by size and prompts


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


def of_many_lengths(count: int, vocab_size: int, block_size: int) -> list[Asked]:
    """Prompts of 4 to 120 tokens, each with 20 to 100 new ones (with a context of 128, and in proportion)."""
    generator, part = torch.Generator().manual_seed(0), block_size / 128

    def between(low: int, high: int) -> int:
        return max(1, int(torch.randint(int(low * part), int(high * part) + 1, (), generator=generator)))

    lengths = [(between(4, 120), between(20, 100)) for _ in range(count)]
    prompts = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length, _ in lengths]
    return [Asked(prompt, new, seed) for seed, (prompt, (_, new)) in enumerate(zip(prompts, lengths, strict=True))]


def measure_many(size: str, prompts: int, rounds: int, device: str) -> list[dict]:
    """How many times as fast a list of prompts is continued by continuous batching as in batches, in which each text
    gets as many tokens as the longest one wants. Tokens that nobody wanted do not count."""
    auto, how = pick_machine(device, "auto"), Sampling(temperature=0.8)
    model, asked = peers.ours(SIZES[size], lora=False).to(auto.device), of_many_lengths(prompts, *SIZES[size][::4])
    wanted, most = sum(each.max_new_tokens for each in asked), max(each.max_new_tokens for each in asked)

    def in_batches() -> None:
        with auto.autocast():
            for some in (asked[i : i + AT_ONCE] for i in range(0, prompts, AT_ONCE)):
                generate(model, [each.prompt for each in some], most, how, [each.seed for each in some])

    def continuously() -> None:
        with auto.autocast():
            assert sum(len(made.tokens) for _, made in generate_per_row(model, asked, [{}] * prompts, how)) == wanted

    seconds = take_turns({"batches": in_batches, "continuous": continuously}, rounds, auto)
    what = f"{size}, {prompts} prompts of many lengths: batches' time / continuous"
    row = {"what": what, "size": size, "prompts": prompts} | ratio(seconds, "batches", "continuous")
    return [row | {"tokens_per_second": wanted / min(seconds["continuous"]), "goal": GOALS.get((size, prompts))}]


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.8M", "10.7M"])
    flags.add_argument("--prompts", nargs="+", type=int, choices=(1, 32, 200), default=[1, 32, 200])
    options = flags.parse_args()
    rows = []
    for size in options.sizes:
        for prompts in options.prompts:
            contest = measure if prompts < 200 else measure_many
            rows += (found := contest(size, prompts, options.rounds, options.device))
            tell(found)
    close("generate", rows, options.record)


if __name__ == "__main__":
    run_command(main)
