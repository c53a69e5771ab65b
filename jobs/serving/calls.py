"""What a request asks for, in tokens: prompts, how they are continued, and through which adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from data.chat import Template, own_template
from jobs.generating.prompts import Request, encode
from jobs.serving.bodies import RefusedError, messages_in
from jobs.serving.offers import Offer, Offers
from models.generation.choosing import Sampling
from models.generation.continuous import Asked
from runtime.errors import UserError

OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
TOKENS = 16  # of a completion where the request does not say, as OpenAI's


@dataclass(frozen=True)
class Call:
    """A request. prompts: as token ids. choices: texts for each prompt, whose seeds count up from `seed`. stops: texts
    that end one. streamed: told as it is made; usage: with the tokens counted at the end."""

    offer: Offer
    prompts: Sequence[list[int]]
    how: Sampling
    stops: Sequence[str]
    choices: int
    max_new_tokens: int
    seed: int
    streamed: bool
    usage: bool

    @classmethod
    def of(cls, body: Mapping[str, Any], offers: Offers, longest: int) -> Call:
        """From a body of `read_body`. longest: tokens that a text may have at most.

        Raises RefusedError for a model or an adapter that is not offered, and for prompts that cannot be read.
        """
        offer, chat = _offer(body, offers), "messages" in body
        prompts = _prompts(body, offer, offers)
        room = offers.base.model.config.max_positions
        if (most := max(map(len, prompts))) > room:
            message = f"the prompt has {most} tokens, and the model sees {room}"
            raise RefusedError(400, message, "messages" if chat else "prompt", "context_length_exceeded")
        tokens = body.get("max_completion_tokens", body.get("max_tokens"))
        stops, stream_options = body.get("stop", []), body.get("stream_options", {})
        return cls(
            offer=offer,
            prompts=prompts,
            how=replace(offer.how, **{name: body[name] for name in OF_SAMPLING if name in body}),
            stops=[*([stops] if isinstance(stops, str) else stops), *offer.ends],
            choices=body.get("n", 1),
            max_new_tokens=tokens or (min(longest, max(1, room - most)) if chat else min(longest, TOKENS)),
            seed=body["seed"],
            streamed=body.get("stream", False),
            usage=stream_options.get("include_usage", False),
        )

    def asked(self, watch: Callable[[int], Callable[[], Callable[[int], bool]]]) -> list[Asked]:
        """The texts, those of a prompt one after the other. watch: of each, by its number."""
        count = len(self.prompts) * self.choices
        return [
            Asked(self.prompts[i // self.choices], self.max_new_tokens, self.seed + i % self.choices, self.how,
                  watch(i), self.offer.strengths)
            for i in range(count)
        ]  # fmt: skip


def _offer(body: Mapping[str, Any], offers: Offers) -> Offer:
    """The model of a request, or the base with the adapters that it names. Raises RefusedError where there is none."""
    found = offers.models.get(body["model"])
    if found is None:
        there = f"there is no model {body['model'][:100]!r} here; there are {', '.join(offers.models)}"
        raise RefusedError(404, there, "model", "model_not_found")
    if (strengths := body.get("adapters")) is None:
        return found
    if found.strengths:
        raise RefusedError(400, f"adapters go with the base, {next(iter(offers.models))}, as model", "adapters")
    if unknown := strengths.keys() - offers.attached.keys():
        there = f"there is no adapter {min(unknown)[:100]!r} here; there are {', '.join(offers.attached) or 'none'}"
        raise RefusedError(400, there, "adapters")
    try:
        return replace(offers.of({name: float(strength) for name, strength in strengths.items()}), name=found.name)
    except UserError as error:
        raise RefusedError(400, str(error), "adapters") from None


def _template(offer: Offer, offers: Offers) -> Template:
    if found := offer.template or own_template(offers.base.tokenizer):
        return found
    raise RefusedError(400, f"{offer.name} has no chat template; ask /v1/completions to continue a text", "model")


def _prompts(body: Mapping[str, Any], offer: Offer, offers: Offers) -> list[list[int]]:
    """The prompts as token ids. Raises RefusedError for what the tokenizer or the template does not take."""
    if "messages" in body:
        param, template, requests = "messages", _template(offer, offers), [Request("", messages=messages_in(body))]
    else:
        texts = body["prompt"]
        param, template = "prompt", None
        requests = [Request(text) for text in ([texts] if isinstance(texts, str) else texts)]
    try:
        return [encode(offers.base.tokenizer, template, request) for request in requests]
    except UserError as error:
        raise RefusedError(400, str(error), param) from None
