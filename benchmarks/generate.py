"""Generation with our cache against transformers' cached generate, on the same shapes; and many prompts by continuous
batching against batches that wait for their longest.

python -m benchmarks.generate                        0.8M and 10.7M parameters, one prompt and 32; 200 prompts
python -m benchmarks.generate --sizes 0.8M --rounds 3
python -m benchmarks.generate --sizes 0.8M --prompts 200
python -m benchmarks.generate --adapters 8                        32 prompts through 8 adapters, in one batch or in 8
"""

from __future__ import annotations

import torch

from benchmarks import peers
from benchmarks.contest import SIZES, close, parser, ratio, take_turns, tell
from lora.attach import activate, attach
from lora.config import LoRAConfig
from models.generation.continuous import Asked
from models.generation.per_row import AT_ONCE, SharedBatch, generate_per_row
from models.generation.sampling import Sampling, generate
from runtime.device import pick_machine
from runtime.processes.command import run_command

GOALS = {
    ("0.8M", 1): 4.0,
    ("10.7M", 1): 2.5,
    ("0.8M", 32): 2.5,
    ("10.7M", 32): 3.0,
    ("0.8M", 200): 1.5,
}  # by size and prompts
PROMPTS = 32  # over several adapters


def measure(size: str, prompts: int, rounds: int, device: str) -> list[dict]:
    """How many times as fast as transformers we sample, without an adapter and with one."""
    auto, count = pick_machine(device, "auto"), SIZES[size][-1] // 2
    start = torch.randint(SIZES[size][0], (prompts, 4), generator=torch.Generator().manual_seed(0)).tolist()
    theirs = peers.transformers_gpt2(SIZES[size]).eval().to(auto.device)
    ours = {kind: peers.ours(SIZES[size], lora=kind == "lora").to(auto.device) for kind in ("plain", "lora")}

    def with_transformers() -> object:
        idx = torch.tensor(start, device=auto.device)
        how = {"do_sample": True, "top_k": 0, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
        return theirs.generate(idx, attention_mask=torch.ones_like(idx), **how)

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
    prompts, how = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n, _ in lengths], Sampling(0.8)
    return [Asked(prompt, new, seed, how) for seed, (prompt, (_, new)) in enumerate(zip(prompts, lengths, strict=True))]


def measure_many(size: str, prompts: int, rounds: int, device: str) -> list[dict]:
    """How many times as fast a list of prompts is continued by continuous batching as in batches, in which each text
    gets as many tokens as the longest one wants. Tokens that nobody wanted do not count."""
    auto = pick_machine(device, "auto")
    model, asked = peers.ours(SIZES[size], lora=False).to(auto.device), of_many_lengths(prompts, *SIZES[size][::4])
    wanted, most = sum(each.max_new_tokens for each in asked), max(each.max_new_tokens for each in asked)

    def in_batches() -> None:
        with auto.autocast():
            for some in (asked[i : i + AT_ONCE] for i in range(0, prompts, AT_ONCE)):
                generate(model, [each.prompt for each in some], most, some[0].how, [each.seed for each in some])

    def continuously() -> None:
        with auto.autocast():
            assert sum(len(made.tokens) for _, made in generate_per_row(model, asked)) == wanted

    seconds = take_turns({"batches": in_batches, "continuous": continuously}, rounds, auto)
    what = f"{size}, {prompts} prompts of many lengths: batches' time / continuous"
    row = {"what": what, "size": size, "prompts": prompts} | ratio(seconds, "batches", "continuous")
    return [row | {"tokens_per_second": wanted / min(seconds["continuous"]), "goal": GOALS.get((size, prompts))}]


def measure_adapters(size: str, adapters: int, rounds: int, device: str) -> list[dict]:
    """How many times as fast prompts through adapters of rank 16 of their own, with trained embeddings, are continued
    in one batch as in a batch for each adapter."""
    auto, model = pick_machine(device, "auto"), peers.ours(SIZES[size], lora=False)
    for i in range(adapters):
        attach(model, LoRAConfig(rank=16, alpha=32), f"a{i}")
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    activate(model)
    model, count = model.to(auto.device), SIZES[size][-1] // 2
    start = torch.randint(SIZES[size][0], (PROMPTS, 4), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{f"a{i % adapters}": 1.0} for i in range(PROMPTS)]
    asked = [Asked(start[i], count, i, Sampling(0.8), adapters=row) for i, row in enumerate(rows)]
    alone = [SharedBatch((choice,), PROMPTS // adapters) for choice in rows[:adapters]]

    def call(batches: list[SharedBatch] | None) -> None:
        with auto.autocast():
            assert sum(len(made.tokens) for _, made in generate_per_row(model, asked, batches)) == PROMPTS * count

    seconds = take_turns({"groups": lambda: call(alone), "mixed": lambda: call(None)}, rounds, auto)
    what = f"{size}, {PROMPTS} prompts over {adapters} adapters: time by groups / in one batch"
    row = {"what": what, "size": size, "prompts": PROMPTS} | ratio(seconds, "groups", "mixed")
    return [row | {"tokens_per_second": PROMPTS * count / min(seconds["mixed"]), "goal": 2.0}]


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.8M", "10.7M"])
    flags.add_argument("--prompts", nargs="+", type=int, choices=(1, 32, 200), default=[1, 32, 200])
    flags.add_argument("--adapters", type=int, choices=(2, 4, 8, 16, 32))
    options = flags.parse_args()
    rows = []
    if options.adapters:
        for size in options.sizes:
            rows += (found := measure_adapters(size, options.adapters, options.rounds, options.device))
            tell(found)
    for size in () if options.adapters else options.sizes:
        for prompts in options.prompts:
            contest = measure if prompts < 200 else measure_many
            rows += (found := contest(size, prompts, options.rounds, options.device))
            tell(found)
    close("mixed_adapters" if options.adapters else "generate", rows, options.record)


if __name__ == "__main__":
    run_command(main)
