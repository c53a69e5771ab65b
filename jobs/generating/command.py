"""What `generate.py` does: one text as it is made, a chat, or the texts of a file."""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from data.chat import Template, template_of
from data.instructions.records import asking
from data.tokenizers import Tokenizer
from jobs.generating.chatting import chat
from jobs.generating.choice import Choice, choose, in_words, parse_adapters
from jobs.generating.options import TUNED, Options
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
from runtime.processes.world import world
from runtime.progress import Patience
from runtime.settings.sources import Resolved


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
    """The prompts, each as often as it is to be continued. Raises UsageError for several processes where no file is
    to be shared out."""
    options = given.settings
    if world().size > 1 and not options.prompts:
        raise UsageError(
            "several processes share out a file of --prompts: give one, or start generate.py without torchrun"
        )
    found = read_requests(Path(options.prompts)) if options.prompts else [Request(text) for text in options.prompt]
    if options.instruction:
        system = [{"role": "system", "content": options.system}] if options.system else []
        found = [Request("", messages=(*system, *asking(options.instruction, options.input)))]
    return [request for request in found for _ in range(options.num_samples)]


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


def run(given: Resolved) -> None:
    """What `generate.py` does."""
    options, machine = given.settings, pick_machine(given.settings.device, given.settings.dtype)
    requests = what_to_continue(given)
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
