"""Print text from a trained run, with or without its adapter, or with several.

python generate.py                                        the newest run, from an empty line
python generate.py --run lora-folio-r8 --prompt "O Romeo"
python generate.py --run lora-folio-r8 --adapter none     the same base without its adapter
python generate.py --adapter lora-folio-r8=0.5            half of what the adapter adds
python generate.py --adapter lora-folio-r8 --adapter lora-milton-r8       the sum of what both add
python generate.py --prompts prompts.jsonl                lines {"prompt": "O Romeo", "adapter": "lora-folio-r8"}
python generate.py --prompts prompts.jsonl --out answers.jsonl            written as they come; a kill loses none
torchrun --nproc-per-node 2 -- generate.py --prompts prompts.jsonl        the same, by two processes
python generate.py --prompt "O Romeo" --best-of 8         of 8 texts that are drawn, the likeliest
python generate.py --prompt "O Romeo" --beams 4           the likeliest text that 4 beams find; nothing is drawn
python generate.py --run HuggingFaceTB/SmolLM2-135M-Instruct --chat       talk to a model that has a chat template
python generate.py --instruction "Rewrite in First Folio spelling." --input "O for a muse of fire"
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime.start  # noqa: F401 - before what takes seconds to import
from data.chat import Template, template_of
from data.instructions.records import asking
from data.tokenizers import Tokenizer
from jobs.generating.chatting import chat
from jobs.generating.choice import TUNED, Choice, choose, in_words, parse_adapters
from jobs.generating.prompts import Request, encode, read_requests
from jobs.generating.results import results_in
from jobs.generating.stopping import StopAt
from jobs.generating.texts import Strategy, Wanted, Writer
from lora.attach import using
from models.generation.choosing import Sampling
from models.generation.sampling import stream
from runtime.console import say
from runtime.device import pick_machine
from runtime.errors import UsageError
from runtime.processes.alike import check_alike, check_read_alike
from runtime.processes.command import run_command
from runtime.processes.world import world
from runtime.progress import Patience
from runtime.settings.config import ProcessSettings, from_command_line
from runtime.settings.fields import setting
from runtime.settings.sources import Resolved

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
        0.8,
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
        1, "Draw so many texts, and keep the one whose tokens are the likeliest on average", low=1, high=10_000, **HOW
    )
    beams: int | None = setting(
        None, "Search with so many beams for the likeliest text, as transformers does; nothing is drawn",
        low=2, high=1_000, **HOW,
    )  # fmt: skip


def print_streaming(tokenizer: Tokenizer, tokens: Generator[list[int | None]], stops: Sequence[str]) -> str:
    """Print one continuation as it is made; returns it."""
    decoder, until, told = tokenizer.stream(), StopAt(stops), ""

    def tell(text: str) -> None:
        nonlocal told
        told += text
        print(text, end="", flush=True)

    for (token,) in tokens:
        tell(until.feed(decoder.feed(token)))
        if until.ended:
            break
    tokens.close()
    tell("" if until.ended else until.feed(decoder.flush()) + until.flush())
    print()
    return told


def print_batch(requests: Sequence[Request], texts: Sequence[str]) -> None:
    """Print several continuations for people."""
    print(("-" * 40 + "\n").join(f"{r.prompt}{text}\n" for r, text in zip(requests, texts, strict=True)), end="")


def as_line(choice: Choice, request: Request) -> dict[str, Any]:
    """What a JSON line says of a request."""
    adapter = in_words(choice.default if request.adapters is None else request.adapters)
    asked = {"messages": request.messages} if request.messages else {"prompt": request.prompt}
    return asked | {"adapter": adapter}


def what_to_continue(given: Resolved) -> list[Request]:
    """The prompts, each as often as it is to be continued. Raises UsageError where there are two sources of them, and
    for several processes where no file is to be shared out."""
    options = given.settings
    if world().size > 1 and not options.prompts:
        raise UsageError(
            "several processes share out a file of --prompts: give one, or start generate.py without torchrun"
        )
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
    found = read_requests(Path(options.prompts)) if options.prompts else [Request(text) for text in options.prompt]
    if options.instruction:
        system = [{"role": "system", "content": options.system}] if options.system else []
        found = [Request("", messages=(*system, *asking(options.instruction, options.input)))]
    return [request for request in found for _ in range(options.num_samples)]


DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "greedy", "best_of", "num_samples")


def check_strategy(given: Resolved) -> None:
    """Raises UsageError for ways to make a text that do not go together."""
    options = given.settings
    if options.chat and (options.beams or options.best_of > 1):
        raise UsageError("--chat prints an answer while it is made, and goes with no --beams and no --best-of")
    if options.beams and (drawing := [name.replace("_", "-") for name in DRAWING if given.explicit(name)]):
        raise UsageError(f"--beams finds the likeliest text without chance, so --{drawing[0]} has no meaning with it")


def strategy(given: Resolved, choice: Choice, ends: Sequence[str]) -> Strategy:
    """How texts are made: for a run that was tuned on instructions, as the guides say unless told otherwise.

    ends: texts that end one.
    """
    options = given.settings
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "greedy")
    told = {name: getattr(options, name) for name in names if given.explicit(name) or not choice.tuned}
    how = Sampling(**(TUNED if choice.tuned else {}) | told, stop_ids=choice.base.tokenizer.stop_ids)
    return Strategy(how, options.best_of, options.beams, [*options.stop, *ends])


def texts_wanted(options: Options, choice: Choice, requests: Sequence[Request], prompts: list) -> list[Wanted]:
    """What is to be made. Texts of a prompt differ in their seed, and none depends on what is beside it."""
    return [
        Wanted(
            prompt,
            choice.on_model(request.adapters),
            request.max_new_tokens or options.max_new_tokens,
            options.seed + i % options.num_samples * options.best_of,
        )
        for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
    ]


def print_at_once(writer: Writer, room: int, wanted: Wanted, template: Template | None, chat_of: str | None) -> None:
    """Print one text while it is made, or the answers of a chat. chat_of: the chat's system prompt, None for a text;
    room: for the tokens of a chat."""
    strategy = writer.strategy

    def answer(prompt: list[int]) -> str:
        tokens = stream(writer.model, [prompt], wanted.max_new_tokens, strategy.how, [wanted.seed])
        return print_streaming(writer.tokenizer, tokens, strategy.stops)

    with using(writer.model, wanted.adapters):
        if chat_of is None:
            answer(list(wanted.prompt))
        else:
            chat(writer.tokenizer, template, chat_of, room, answer)


def main() -> None:
    """Run the command."""
    given = from_command_line(Options, __doc__)
    options, machine = given.settings, pick_machine(given.settings.device, given.settings.dtype)
    requests = what_to_continue(given)
    check_strategy(given)
    world().join(options.collective_timeout, machine.device)
    check_alike(options.as_dict(), str(machine))
    adapters = parse_adapters(options.adapter) if options.adapter else None
    named = [name for request in requests for name in request.adapters or ()]
    with world().machine_by_machine():
        choice = choose(Path(options.checkpoints_dir), options.run, adapters, named)
    model, tokenizer = choice.base.model.requires_grad_(False).to(machine.device), choice.base.tokenizer
    with_adapters = f" with {in_words(choice.default)}" if choice.default else ""
    say(f"From {choice.base.run.name}{with_adapters}, on {machine}, seed {options.seed}")
    template = choice.template or template_of(tokenizer) if options.chat or options.instruction else choice.template
    prompts = [[] if options.chat else encode(tokenizer, template, request) for request in requests]
    check_read_alike(prompts=prompts, base=choice.base.sha256)
    ends = [template.end] if choice.tuned and not tokenizer.stop_ids else []
    writer, wanted = (
        Writer(model, tokenizer, strategy(given, choice, ends)),
        texts_wanted(options, choice, requests, prompts),
    )
    with machine.autocast():
        if len(requests) == 1 and not (options.prompts or options.beams or options.best_of > 1):
            if not options.chat:
                print(requests[0].prompt, end="", flush=True)
            room = model.config.max_positions - min(options.max_new_tokens, model.config.max_positions // 2)
            print_at_once(writer, room, wanted[0], template, options.system if options.chat else None)
            return
        about = writer.fingerprint(wanted, choice.base.sha256, machine.dtype) if options.out else ""
        lines = [as_line(choice, request) for request in requests]
        with results_in(options.out, about, lambda i, text: lines[i] | {"text": text}) as results:
            texts = writer.in_order(wanted, results, Patience("generate", "token"))
            results.finish(texts)
    if options.out:
        say(f"Written to {options.out}")
    elif options.prompts:
        for line, text in zip(lines, texts, strict=True):
            print(json.dumps(line | {"text": text}, ensure_ascii=False))
    else:
        print_batch(requests, texts)


if __name__ == "__main__":
    run_command(main, many=True)
