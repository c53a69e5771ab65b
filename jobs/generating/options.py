"""The flags of `generate.py`, and what of them goes together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UsageError
from runtime.settings.config import ProcessSettings
from runtime.settings.fields import setting
from runtime.settings.sources import Resolved
from runtime.storage import folders

PLAIN = {"temperature": 0.8}  # how tokens are drawn where nobody says otherwise
TUNED = {"temperature": 0.3, "top_p": 0.9, "top_k": 40}  # the same of a run that was tuned on instructions

WHAT, HOW = ({"group": title, "env": False} for title in ("What to continue", "Sampling"))


@dataclass(frozen=True, kw_only=True)
class Options(ProcessSettings):
    """The flags of generate.py."""

    run: str = setting("", "The run to sample from; empty takes the newest", path=True, **WHAT)
    adapter: tuple[str, ...] = setting(
        (), "A LoRA run's name, name=STRENGTH, or none; may be repeated; without it, the run's own", **WHAT
    )
    prompt: tuple[str, ...] = setting(("\n",), "Text to continue; may be repeated", **WHAT)
    prompts: str = setting(
        "",
        'A file of lines {"prompt": "...", "adapter": "...", "max_new_tokens": 50}, of which all but the prompt may be '
        "left out; prints such lines",
        path=True,
        **WHAT,
    )
    out: str = setting(
        "",
        "Where the lines of --prompts are written, in the order of the prompts; until all are there they are in "
        "FILE.partial, each with its number as soon as it is finished. After a kill the same command goes on",
        path=True,
        **WHAT,
    )
    instruction: str = setting("", "What a run that was tuned on instructions is asked to do", **WHAT)
    input: str = setting("", "What --instruction is to be done with", **WHAT)
    chat: bool = setting(False, "Talk to the model, which needs a chat template; a line is a message", **WHAT)
    system: str = setting("", "The system prompt of --chat", **WHAT)
    stop: tuple[str, ...] = setting((), "A text that ends what is generated; may be repeated", **WHAT)
    num_samples: int = setting(1, "Continuations of each prompt", low=1, high=10_000, **WHAT)
    max_new_tokens: int = setting(500, "Tokens to add, where a line of --prompts does not say it", low=1, **WHAT)
    temperature: float = setting(
        PLAIN["temperature"],
        "Logits are divided by this: lower is safer, higher more surprising, 0 as --greedy; of a run that was tuned on "
        "instructions 0.3, with --top-k 40 and --top-p 0.9",
        low=0,
        high=100,
        **HOW,
    )
    top_k: int | None = setting(None, "Choose among this many likeliest tokens", low=1, **HOW)
    top_p: float | None = setting(
        None, "Choose among the likeliest tokens that reach this probability", low=0, low_open=True, high=1, **HOW
    )
    min_p: float | None = setting(
        None, "Choose among tokens that are at least this times as likely as the likeliest", low=0, high=1, **HOW
    )
    repetition_penalty: float = setting(
        1.0, "Above 1, tokens that are in the window become less likely", low=0, low_open=True, high=100, **HOW
    )
    greedy: bool = setting(False, "Always take the likeliest token", **HOW)
    best_of: int = setting(
        1, "Draw this many texts, and keep the one whose tokens are the likeliest on average", low=1, high=10_000, **HOW
    )
    beams: int | None = setting(
        None, "Search with this many beams for the likeliest text, as transformers does; nothing is drawn",
        low=2, high=1_000, **HOW,
    )  # fmt: skip


DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "greedy", "best_of", "num_samples")


def check_strategy(given: Resolved) -> None:
    """Raises UsageError for ways to make a text that do not go together."""
    options = given.settings
    if options.chat and (options.beams or options.best_of > 1):
        raise UsageError("--chat prints an answer while it is made, and goes with no --beams and no --best-of")
    if options.beams and (drawing := [name.replace("_", "-") for name in DRAWING if given.explicit(name)]):
        raise UsageError(f"--beams finds the likeliest text without chance, so --{drawing[0]} has no meaning with it")


def check_sources(given: Resolved) -> None:
    """Raises UsageError where a text comes from two places or one that is not there, and for flags of another one."""
    options = given.settings
    if options.prompts and given.explicit("prompt"):
        raise UsageError("--prompt and --prompts are both given; put all prompts into the file")
    if options.chat and (options.prompts or given.explicit("prompt") or given.explicit("num_samples")):
        raise UsageError("--chat takes its messages from the terminal, and goes with no prompts and no --num-samples")
    if options.system and not (options.chat or options.instruction):
        raise UsageError("--system is the system prompt of a chat, and goes with --chat or --instruction")
    if options.instruction and (options.chat or options.prompts or given.explicit("prompt")):
        raise UsageError("--instruction is a prompt by itself, and goes with no --prompt, --prompts or --chat")
    if options.input and not options.instruction:
        raise UsageError("--input is what an instruction is to be done with, and goes with --instruction")
    if options.out and not options.prompts:
        raise UsageError("--out is for what follows the prompts of a file, and goes with --prompts")
    if options.prompts:
        folders.check_there(Path(options.prompts))
