"""Continuous batching: each text is what it is alone, whatever is beside it, and no place of the batch stays empty."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models.generation import beams
from models.generation.choosing import Sampling, choose
from models.generation.continuous import Asked, continue_all
from models.generation.sampling import generate, window_start
from tests.tiny import tiny

WILD = Sampling(temperature=1.5, top_k=20, top_p=0.95, repetition_penalty=1.2)
ASKED = [Asked([(7 * i + 3 * n) % 50 for i in range(1 + 7 * n % 40)], 3 + 11 * n % 50, n) for n in range(17)]


def with_how(asked: list[Asked], how: Sampling) -> list[Asked]:
    return [replace(each, how=how) for each in asked]


WILDLY = with_how(ASKED, WILD)


def alone(model, asked: Asked, how: Sampling) -> list[int]:
    return generate(model, [asked.prompt], asked.max_new_tokens, how, asked.seed)[0][len(asked.prompt) :]


@pytest.mark.parametrize("how", [WILD, Sampling(greedy=True)], ids=["sampled", "greedy"])
def test_each_text_is_what_it_is_alone(how: Sampling) -> None:
    model = tiny(noise=0.3)
    expected = [alone(model, each, how) for each in ASKED]
    for places in (1, 3, 17, 20):
        found = dict(continue_all(model, with_how(ASKED, how), places))
        assert [found[i].tokens for i in range(len(ASKED))] == expected, places


def test_a_text_has_the_same_bits_whatever_is_beside_it() -> None:
    model = tiny(noise=0.3)
    together, some = (dict(continue_all(model, asked, 4, scored=True)) for asked in (WILDLY, WILDLY[3::2]))
    assert [some[i] for i in range(len(some))] == [together[i] for i in range(3, len(ASKED), 2)]


def test_a_row_that_has_finished_makes_room() -> None:
    model, passes = tiny(), []
    model.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape))
    asked = [Asked([1, 2], count, 0) for count in (10, 1, 4, 2, 3)]
    told: list[int] = []
    order = [number for number, _ in continue_all(model, asked, 2, tell=told.append)]
    assert sum(told) == 20 and len(told) == 10  # 10 and 4 + 3 + 2 + 1
    assert order[:2] == [2, 4] and set(order) == set(range(5))
    assert [shape for shape in passes if shape[1] > 1] == [(1, 2)] * 5


def test_stop_tokens_and_texts_that_end_free_their_place() -> None:
    model = tiny(noise=0.3)
    whole = alone(model, ASKED[10], WILD)
    stop, told = whole[5], []
    how = Sampling(1.5, 20, 0.95, 1.2, stop_ids=(stop,))
    found = dict(continue_all(model, with_how(ASKED, how), 3, tell=told.append))
    assert [found[i].tokens for i in range(len(ASKED))] == [alone(model, each, how) for each in ASKED]
    assert found[10].tokens == whole[: whole.index(stop)] and sum(told) == sum(each.max_new_tokens for each in ASKED)
    watched = replace(WILDLY[10], watch=lambda: lambda token: token == stop)
    ((_, made),) = continue_all(model, [watched], 1)
    assert made.tokens == whole[: whole.index(stop) + 1]


@torch.no_grad()
def test_the_likelihood_is_that_of_passes_without_a_cache() -> None:
    model, stop = tiny(noise=0.3).eval(), 7
    how = Sampling(1.5, 20, stop_ids=(stop,))
    for number, made in continue_all(model, with_how(ASKED, how), 4, scored=True):
        asked, sums, ended = ASKED[number], [], len(made.tokens) < ASKED[number].max_new_tokens
        text = list(asked.prompt)
        for token in [*made.tokens, *[stop] * ended]:
            window = text[window_start(len(text), 16) :]
            sums.append(float(model(torch.tensor([window]))[0][0, -1].log_softmax(-1)[token]))
            text.append(token)
        assert math.isclose(made.log_likelihood, sum(sums) / len(sums), rel_tol=1e-5)


def test_the_mode_comes_back_and_an_empty_prompt_is_refused() -> None:
    model = tiny().train()
    texts = continue_all(model, WILDLY[:3], 2)
    next(texts)
    assert not model.training
    texts.close()
    assert model.training
    with pytest.raises(ValueError, match="at least one token"):
        next(continue_all(model, [Asked([], 2, 0)], 2))


def test_beam_search_past_the_context_is_beam_search_without_a_cache(monkeypatch) -> None:
    model = tiny(noise=0.3)
    found = [beams.beam_search(model, prompt, 4, 40, (7,)) for prompt in ([1, 2], list(range(14)), list(range(30)))]

    def whole_passes(model, cache, rows):
        windows = [row[window_start(len(row), 16) :] for row in rows]
        return torch.cat([model(torch.tensor([window]))[0][:, -1] for window in windows]).detach()

    monkeypatch.setattr(beams, "read", whole_passes)
    monkeypatch.setattr(beams, "_follow", lambda cache, origins: None)
    for made, prompt in zip(found, ([1, 2], list(range(14)), list(range(30))), strict=True):
        expected = beams.beam_search(model, prompt, 4, 40, (7,))
        assert made.tokens == expected.tokens and math.isclose(
            made.log_likelihood, expected.log_likelihood, rel_tol=1e-5
        )
    assert any(len(made.tokens) > 16 for made in found)


def test_min_p_keeps_what_transformers_keeps() -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(200, 40, generator=torch.Generator().manual_seed(0)) * 3
    for min_p in (0.02, 0.1, 0.7):
        theirs = transformers.MinPLogitsWarper(min_p)(None, logits / 1.3)
        drawn = choose(logits, [[]] * 200, Sampling(1.3, min_p=min_p), torch.Generator().manual_seed(1))
        expected = choose(theirs, [[]] * 200, Sampling(), torch.Generator().manual_seed(1))
        assert drawn == expected
