"""A pretrained base: ours against transformers and PEFT, on the same files, batch, targets and dtype.

python -m benchmarks.pretrained --base FOLDER        steps, generation, memory: 4 x 256 tokens, rank 16, all linears
python -m benchmarks.pretrained --base FOLDER --only steps
python -m benchmarks.pretrained --base FOLDER --only reading      long prompts, whole and in pieces; on the CPU
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.contest import close, parser, ratio, take_turns, tell
from benchmarks.peaks import peak_of, row, told_peak
from jobs.comparing.timing import repeatable
from jobs.runs.base import Base
from lora.attach import attach
from lora.config import LoRAConfig
from lora.merge import cached_weights
from models.generation.cache import PIECE, KVCache
from models.generation.choosing import Sampling
from models.generation.continuous import Asked, Batch, Row
from models.generation.sampling import generate, read_windows
from models.pretrained.families import family_with
from models.pretrained.source import Pretrained, find_source
from runtime.device import pick_machine
from runtime.processes.command import run_command

RANK, ALPHA = 16, 32
WAITS = {"a piece at a time": 1, "at once": sys.maxsize}
STEP_GOALS = {("lora", "bf16"): 0.75, ("lora", "fp32"): 0.75, ("full", "bf16"): 0.9, ("full", "fp32"): 0.9}


class WithLoss(nn.Module):
    """A model of transformers', called as ours is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens, targets):
        logits = self.model(tokens).logits
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def hidden_matrices(self):
        return []


def ours(base: Path, dtype: str, lora: bool, dropout: float, form: str = "none") -> nn.Module:
    """Our model of the base; its weights as they are stored where they are frozen, else in fp32."""
    model = Base.of(find_source(Path("checkpoints"), str(base)), form=form).model
    if dtype == "fp32" or not lora:
        model.float()
    if lora:
        torch.manual_seed(0)
        attach(model, LoRAConfig(RANK, ALPHA, dropout, "all-linear", train_embeddings=False))
    return model


def theirs(
    base: Path, dtype: str, lora: bool, dropout: float, form: str = "none", checkpoints: bool = False
) -> nn.Module:
    """transformers' model of the base, with PEFT's adapter where `lora` is on. Trained whole, its weights are in fp32
    under autocast, as ours are: weights in bf16 would lose most of what they learn. form: nf4, by bitsandbytes, as
    PEFT's guide has it. checkpoints: whether its blocks are run again for the backward pass."""
    import peft
    import transformers

    stored = torch.bfloat16 if dtype == "bf16" and lora else torch.float32
    how: dict[str, Any] = {"dtype": stored}
    if form == "nf4":
        nested = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": stored}
        how["quantization_config"] = transformers.BitsAndBytesConfig(load_in_4bit=True, **nested)
        how["device_map"] = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **how)
    if form == "nf4":
        model = peft.prepare_model_for_kbit_training(
            model, checkpoints, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    elif checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if lora:
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
    return WithLoss(model)


def with_our_adapter(mine: nn.Module, its: nn.Module) -> None:
    """Give PEFT's model our A matrices, so that both have the same losses."""
    for name, module in its.named_modules():
        if hasattr(module, "lora_A"):
            path = family_with([place := name.removeprefix("model.base_model.model.")]).ours(place)
            module.lora_A["default"].weight.data.copy_(mine.get_submodule(path).lora["default"].A.data)


def random_rows(vocabulary: int, rows: int, length: int) -> torch.Tensor:
    """Token ids (rows, length)."""
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))


def measure_steps(base: Path, rounds: int, device: str) -> list[dict[str, Any]]:
    """Our step as a share of theirs."""
    found = []
    cases = [("lora", "bf16", 0.05), ("lora", "bf16", 0.0), ("lora", "fp32", 0.0), ("full", "bf16", 0.0)]
    for kind, dtype, dropout in cases:
        machine, lora = pick_machine(device, dtype), kind == "lora"
        models = {"ours": ours(base, dtype, lora, dropout), "theirs": theirs(base, dtype, lora, dropout)}
        rows = random_rows(models["ours"].config.vocab_size, 4, 257)
        steppers = {name: repeatable(model, rows, machine) for name, model in models.items()}
        if lora and not dropout:
            with_our_adapter(models["ours"], models["theirs"])
        seconds = take_turns({name: partial(s.step, 0) for name, s in steppers.items()}, rounds, machine)
        losses = [stepper.read_loss() for stepper in steppers.values()]
        shown = f"; losses after {rounds + 1} steps {losses[0]:.4f} and {losses[1]:.4f}" if lora and not dropout else ""
        what = f"{kind} step, {dtype}, dropout {dropout:g}{shown}"
        found.append({"what": what} | ratio(seconds, "ours", "theirs") | {"goal": STEP_GOALS[kind, dtype]})
        tell(found[-1:])
    return found


def measure_generation(base: Path, rounds: int, device: str) -> list[dict[str, Any]]:
    """How many times as fast as transformers' cached generate we are, greedily, in bf16."""
    import transformers

    machine = pick_machine(device, "bf16")
    mine = Base.of(Pretrained(base)).model.requires_grad_(False).to(machine.device)
    its = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(machine.device).eval()
    its.generation_config.eos_token_id = None
    found = []
    for rows, new, goal in ((1, 100, 1.3), (16, 60, 1.5)):
        prompts = random_rows(mine.config.vocab_size, rows, 32)

        def ours_(prompts=prompts, new=new) -> None:
            with machine.autocast():
                generate(mine, prompts.tolist(), new, Sampling(greedy=True), 0)

        def theirs_(prompts=prompts, new=new) -> None:
            with torch.no_grad():
                its.generate(prompts.to(machine.device), max_new_tokens=new, do_sample=False)

        seconds = take_turns({"ours": ours_, "theirs": theirs_}, rounds, machine)
        what = f"generation, {rows} prompts, {new} tokens: times transformers' speed"
        found.append({"what": what} | ratio(seconds, "theirs", "ours") | {"goal": goal})
        tell(found[-1:])
    return found


def longest_wait(model: nn.Module, prompt: list[int], pieces: int) -> float:
    """Seconds that 3 texts wait for a token at most while so many pieces of a prompt are read at a time."""
    batch, waits = Batch(model, 4, pieces=pieces), []
    new = {place: Row(place, Asked(prompt[:8], 2**20, place)) for place in range(3)}
    for _ in range(4):
        list(batch.choose(batch.advance(new), False))
        new = {}
    new = {3: Row(3, Asked(prompt, 8, 0))}
    while new or batch.rows[3]:
        begun = time.perf_counter()
        list(batch.choose(batch.advance(new), False))
        waits.append(time.perf_counter() - begun)
        new = {}
    return max(waits)


def measure_reading(base: Path, rounds: int, device: str) -> list[dict[str, Any]]:
    """What reading a prompt in pieces takes of reading it in one pass, and how long others wait meanwhile; in bf16."""
    machine, found = pick_machine(device, "bf16"), []
    if machine.device.type != "cpu":  # which alone reads in pieces
        return found
    model = Base.of(Pretrained(base)).model.requires_grad_(False).eval()
    for length in (1024, 2000):
        (prompt,) = random_rows(model.config.vocab_size, 1, length).tolist()

        def read(piece: int, prompt=prompt) -> None:
            cache = KVCache(model.config.n_layer, model.config.max_positions, machine.device)
            cache.piece = piece
            with torch.inference_mode(), machine.autocast():
                read_windows(model, cache, [prompt])

        with cached_weights(model), machine.autocast():
            seconds = take_turns({"pieces": partial(read, PIECE), "whole": partial(read, length)}, rounds, machine)
            waits = {name: [longest_wait(model, prompt, n) for _ in range(rounds)] for name, n in WAITS.items()}
        found.append(
            {"what": f"a prompt of {length:,} tokens: time in pieces / whole"} | ratio(seconds, "pieces", "whole")
        )
        for name, each in waits.items():
            spread = {"median": statistics.median(each), "min": min(each), "max": max(each)}
            found.append({"what": f"a prompt of {length:,} tokens, {name}: longest wait of others, seconds"} | spread)
        tell(found[-3:])
    return found


def peak(base: Path, who: str, what: str) -> None:
    """Print how many bytes a fresh process needs at most, beyond what its packages take: to load, or for 3 steps."""
    import peft  # noqa: F401
    import transformers  # noqa: F401

    machine = pick_machine("cpu", "bf16")
    F.linear(torch.ones(8, 8).bfloat16(), torch.ones(8, 8).bfloat16())
    make: Callable[..., nn.Module] = ours if who == "ours" else theirs
    with told_peak(machine):
        if what == "load":
            Base.of(Pretrained(base)) if who == "ours" else theirs(base, "bf16", True, 0.0)
        else:
            model = make(base, "bf16", what == "lora", 0.05)
            stepper = repeatable(model, random_rows(49000, 4, 257) % _vocabulary(base), machine)
            for _ in range(3):
                stepper.step(0)


def _vocabulary(base: Path) -> int:
    return json.loads((base / "config.json").read_bytes())["vocab_size"]


def measure_memory(base: Path, rounds: int, device: str) -> list[dict[str, Any]]:
    """Peak memory of ours as a share of theirs, and of loading as a share of the files."""

    def measured(who: str, what: str) -> int:
        return peak_of(f"{what} of {who}", "benchmarks.pretrained", "--base", str(base), "--peak", who, what)

    found = []
    for what, goal in (("lora", 0.8), ("full", 0.8)):
        mine, its = measured("ours", what), measured("theirs", what)
        name = f"peak memory of a {what} step, bf16: {mine / 1e6:,.0f} MB, theirs {its / 1e6:,.0f} MB"
        found.append(row(name, mine / its, goal))
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    found.append(row("peak memory of loading / the files", measured("ours", "load") / size, 1.15))
    tell(found)
    return found


MEASURES = {
    "steps": measure_steps, "generation": measure_generation, "reading": measure_reading, "memory": measure_memory,
}  # fmt: skip


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=7)
    flags.add_argument("--base", type=Path, required=True, help="a Hugging Face folder")
    flags.add_argument("--only", nargs="+", choices=MEASURES, default=list(MEASURES))
    flags.add_argument("--peak", nargs=2, help="what a process of its own measures")
    options = flags.parse_args()
    if options.peak:
        peak(options.base, *options.peak)
        return
    rows = [row for name in options.only for row in MEASURES[name](options.base, options.rounds, options.device)]
    close("pretrained", rows, options.record)


if __name__ == "__main__":
    run_command(main)
