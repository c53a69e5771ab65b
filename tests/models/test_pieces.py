"""A window that is read in pieces is what it is read whole, and other rows get their tokens in between."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from jobs.serving.engine import Engine
from lora.attach import attach
from lora.config import LoRAConfig
from lora.mixing import mixing
from models import attention
from models.config import ModelConfig
from models.generation import cache as caches
from models.generation.cache import KVCache
from models.generation.choosing import Sampling
from models.generation.continuous import Asked, Batch, Row, continue_all
from models.generation.sampling import generate, read
from models.transformer import Transformer
from runtime.device import Machine
from tests.tiny import tiny

WILD = Sampling(temperature=1.5, top_k=20, top_p=0.95, repetition_penalty=1.2)
SIZES = {"vocab_size": 50, "n_embd": 32, "n_head": 4, "n_layer": 2, "max_positions": 40}
LLAMA = {"norm": "rms", "positions": "rotary", "mlp": "gated_silu", "n_inner": 48, "n_kv_head": 2, "qk_norm": True}
CPU = torch.device("cpu")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(7 * i + 3 * seed + i * i) % 50 for i in range(length)]


@pytest.fixture
def by_fours(monkeypatch) -> None:
    """Pieces of 4 positions."""
    monkeypatch.setattr(caches, "PIECE", 4)


@pytest.mark.parametrize(("low", "most"), [(False, 1e-5), (True, 0.03)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [{"bias": True}, LLAMA], ids=["gpt", "llama"])
def test_pieces_are_what_whole_windows_are(shape: dict, low: bool, most: float, monkeypatch) -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES | shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn(p.shape)
    rows = [prompt_of(length, length) for length in (1, 7, 8, 9, 23, 39, 40, 52)]
    monkeypatch.setattr(attention, "BLOCK", 3)  # so that pieces have more than one, and other ones than windows have
    found = []
    for piece in (40, 7):
        monkeypatch.setattr(caches, "PIECE", piece)
        texts, cache, logits = [list(row) for row in rows], KVCache(2, 40, CPU), []
        with torch.autocast("cpu", enabled=low):
            for _ in range(4):
                logits.append(read(model, cache, texts).float())
                texts = [[*row, len(row) % 50] for row in texts]
        found.append(torch.stack(logits))
    assert (found[0] - found[1]).abs().max() <= most * found[0].std()


def made_in(batch: Batch, arrivals: dict[int, list[Row]]) -> dict:
    """The texts of rows that arrive before the n-th pass, by their numbers."""
    found, passes = {}, 0
    while any(batch.rows) or passes <= max(arrivals):
        free = (place for place, row in enumerate(batch.rows) if row is None)
        new = dict(zip(free, arrivals.get(passes, []), strict=False))
        found |= {row.number: made for row, made in batch.choose(batch.advance(new), True) if made}
        passes += 1
    return found


@pytest.mark.usefixtures("by_fours")
def test_a_text_has_the_same_bits_whatever_is_read_or_made_beside_it() -> None:
    model, names = tiny(noise=0.3, bias=True).eval(), ["one", "two"]
    for seed, name in enumerate(names):
        attach(model, LoRAConfig(rank=4, bias="all"), name)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    asked = [
        Asked(prompt_of(length, n), 30, n, WILD, adapters=dict.fromkeys(names[: n % 3], 1.0))
        for n, length in enumerate((14, 2, 15, 16, 3, 30))
    ]
    rows = [Row(n, each) for n, each in enumerate(asked)]
    with mixing(model, names) as mix:
        together = made_in(Batch(model, 6, mix, pieces=1), {0: rows[:2], 1: rows[2:4], 7: rows[4:]})
        alone = [dict(continue_all(model, [each], 6, mix, scored=True))[0] for each in asked]
    assert [together[n] for n in range(6)] == alone


@pytest.mark.usefixtures("by_fours")
def test_other_rows_get_tokens_between_the_pieces_of_a_long_prompt() -> None:
    model, passes = tiny(), []
    model.register_forward_pre_hook(lambda _, args: passes.append(tuple(args[0].shape)))
    batch = Batch(model.eval(), 3, pieces=1)
    short, long = Row(0, Asked([1, 2], 20, 0)), [Row(n, Asked(prompt_of(14), 1, n)) for n in (1, 2)]
    assert made_in(batch, {0: [short], 1: long}).keys() == {0, 1, 2}
    pieces = [(1, 4), (1, 4), (1, 4), (1, 2)]
    between = [each for piece in pieces * 2 for each in ((3, 1), piece)]
    assert passes[: 1 + len(between)] == [(1, 2), *between]
    # The window that moves after 16 tokens, to its newer 9, is read in pieces too.
    assert [shape for shape in passes if shape[1] > 1 or shape[0] == 1] == [(1, 2), *pieces * 2, *[(1, 4)] * 2, (1, 1)]


def idle(engine: Engine) -> bool:
    with engine.changed:
        return engine.busy == (0, 0)


@pytest.mark.usefixtures("by_fours")
def test_a_served_text_is_the_one_that_generate_makes_and_who_goes_away_while_being_read_makes_room() -> None:
    model, found, passes = tiny(noise=0.3), {}, []
    asked = [Asked(prompt_of(length, n), 24, n, WILD) for n, length in enumerate((14, 1, 15, 5, 29))]
    expected = [generate(model, [each.prompt], 24, WILD, each.seed)[0][len(each.prompt) :] for each in asked]
    with Engine(model, [], Machine(CPU, torch.float32), 2, 10) as engine:

        def leave(_, args) -> None:
            passes.append(args[0].shape[1])
            if passes.count(4) == 2:
                engine.cancel(tickets[1:])

        hook = model.register_forward_pre_hook(leave)
        with engine.changed:  # so that it is not cancelled before it has its ticket
            two = Asked([1, 2], 10, 0), Asked(prompt_of(16), 500, 0)
            tickets = engine.submit([(each, partial(found.setdefault, each.max_new_tokens)) for each in two])
        while not (engine.failure or idle(engine)):
            time.sleep(0.001)
        hook.remove()
        engine.submit([(each, partial(found.setdefault, n)) for n, each in enumerate(asked)])
    assert passes.count(4) == 2 and len(found.pop(10).tokens) == 10 and found.keys() == set(range(5))
    assert [found[n].tokens for n in range(5)] == expected
