"""Print text from a trained run, with or without its adapter.

python generate.py                                        the newest run, from an empty line
python generate.py --run lora-folio-r8 --prompt "O Romeo"
python generate.py --run lora-folio-r8 --adapter none     the same base without its adapter
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tokenizers import Tokenizer
from jobs.job import load_trained
from lora import files as adapter_files
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.sampling import Sampling, stream
from runtime.checkpoint import Run, all_runs, find_run, say
from runtime.config import Machine, from_command_line
from runtime.device import pick_machine
from runtime.errors import UsageError, UserError, run_command
from runtime.fields import setting

WHAT, HOW = "What to continue", "How to sample"


@dataclass(frozen=True, kw_only=True)
class Options(Machine):
    """The flags of generate.py."""

    run: str = setting("", "The run to sample from; empty takes the newest", group=WHAT, env=False)
    adapter: str = setting("", "A LoRA run's name, or none; empty takes the run's own", group=WHAT, env=False)
    prompt: tuple[str, ...] = setting(("\n",), "Text to continue; may be given several times", group=WHAT, env=False)
    num_samples: int = setting(1, "Continuations of each prompt", group=WHAT, low=1, high=10_000, env=False)
    max_new_tokens: int = setting(500, "Tokens to add", group=WHAT, low=1, env=False)
    temperature: float = setting(
        0.8, "Above 1 wilder, below 1 tamer", group=HOW, low=0, low_open=True, high=100, env=False
    )
    top_k: int | None = setting(None, "Choose among this many likeliest tokens", group=HOW, low=1, env=False)
    top_p: float | None = setting(
        None,
        "Choose among the likeliest that reach this probability",
        group=HOW,
        low=0,
        low_open=True,
        high=1,
        env=False,
    )
    repetition_penalty: float = setting(
        1.0, "Above 1, makes tokens in the window less likely", group=HOW, low=0, low_open=True, high=100, env=False
    )
    greedy: bool = setting(False, "Always take the likeliest token", group=HOW, env=False)


def choose_runs(options: Options) -> tuple[Run, Run | None]:
    """The run with the base's weights, and the LoRA run on top of it or None."""
    root = Path(options.checkpoints_dir)
    if not options.run and not (runs := all_runs(root)):
        raise UserError(f"there is no run in {root} yet; train one with: python training.py")
    run = find_run(root, options.run) if options.run else runs[-1]
    lora = run if run.kind == "lora" else None
    if options.adapter == "none":
        lora = None
    elif options.adapter:
        lora = find_run(root, options.adapter)
        if lora.kind != "lora":
            raise UsageError(f"--adapter {options.adapter} is not a LoRA run; use --run for it")
    base = find_run(root, run.about["base"]["run"]) if run.kind == "lora" else run
    return base, lora


def load(base: Run, lora: Run | None) -> tuple[BigramLanguageModelLoRA, Tokenizer]:
    """The base's model, with the adapter of the LoRA run attached, and the base's tokenizer."""
    model, tokenizer = load_trained(base)
    if lora:
        adapter_files.from_files(lora.read(), str(lora.folder)).put_on(model)
    return model.requires_grad_(False), tokenizer


def encode(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt as token ids, at least one."""
    return tokenizer.encode(prompt or "\n").tolist()


def print_streaming(tokenizer: Tokenizer, prompt: str, tokens: Sequence[Sequence[int]]) -> None:
    """Print one continuation as it is made."""
    decoder = tokenizer.stream()
    print(prompt, end="", flush=True)
    for (token,) in tokens:
        print(decoder.feed(token), end="", flush=True)
    print(decoder.flush())


def print_batch(tokenizer: Tokenizer, prompts: list[str], tokens: Sequence[Sequence[int]]) -> None:
    """Print several continuations, each whole when all are done."""
    columns = list(tokens)
    for row, prompt in enumerate(prompts):
        print(f"{'' if row == 0 else '-' * 40 + chr(10)}{prompt}{tokenizer.decode([step[row] for step in columns])}")


def main() -> None:
    """Run the command."""
    options = from_command_line(Options, __doc__).settings
    machine = pick_machine(options.device, options.dtype)
    base, lora = choose_runs(options)
    model, tokenizer = load(base, lora)
    say(f"From {base.name}{f' with the adapter of {lora.name}' if lora else ''}, on {machine}, seed {options.seed}")
    prompts = [prompt for prompt in options.prompt for _ in range(options.num_samples)]
    how = Sampling(options.temperature, options.top_k, options.top_p, options.repetition_penalty, options.greedy)
    with machine.autocast():
        model.to(machine.device)
        tokens = stream(model, [encode(tokenizer, p) for p in prompts], options.max_new_tokens, how, options.seed)
        if len(prompts) == 1:
            print_streaming(tokenizer, prompts[0], tokens)
        else:
            print_batch(tokenizer, prompts, tokens)


if __name__ == "__main__":
    run_command(main)
