"""Cached generation is generation without a cache over the same window; filters; seeds; modes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora.attach import activate, active_adapters, attach
from lora.config import LoRAConfig
from lora.merge import cached_weights
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.generation import per_row, sampling
from models.generation.choosing import Sampling, choose
from models.generation.continuous import Asked
from models.generation.per_row import generate_per_row
from models.generation.sampling import generate, stream, window_start
from runtime.errors import UsageError
from tests.tiny import tiny as tiny_base

WILD = Sampling(temperature=1.5, top_k=20, top_p=0.95, repetition_penalty=1.2)


tiny = partial(tiny_base, noise=0.3)  # with more noise a token depends on all before it


def prompts_of(lengths: list[int]) -> list[list[int]]:
    return [[(7 * i + 3 * row) % 50 for i in range(length)] for row, length in enumerate(lengths)]


@torch.no_grad()
def without_cache(model: BigramLanguageModelLoRA, prompts: list[list[int]], n: int, how: Sampling, seed: int):
    """The definition: each token from a whole pass over its window."""
    rows, generator = [list(prompt) for prompt in prompts], torch.Generator().manual_seed(seed)
    for _ in range(n):
        windows = [row[window_start(len(row), model.config.max_positions) :] for row in rows]
        logits = torch.stack([model(torch.tensor([window]))[0][0, -1] for window in windows])
        for row, token in zip(rows, choose(logits, windows, how, generator), strict=True):
            row.append(token)
    return rows


CASES = [  # block size, lengths of the prompts, steps: more than three moves of the window each
    (16, [1, 7, 16, 17, 40], 48),
    (16, [9], 48),
    (16, [16, 16], 40),
    (7, [2, 7, 8, 30], 24),
    (3, [1, 2, 3, 4, 5], 10),
    (2, [1, 2, 3], 8),
    (1, [1, 2, 5], 6),
]


@pytest.mark.parametrize("how", [WILD, Sampling(greedy=True, repetition_penalty=1.3)], ids=["sampled", "greedy"])
@pytest.mark.parametrize(("block_size", "lengths", "steps"), CASES)
def test_cached_is_what_a_whole_pass_over_the_window_gives(
    block_size: int, lengths: list[int], steps: int, how: Sampling
) -> None:
    model, prompts = tiny(block_size=block_size), prompts_of(lengths)
    first, last = (window_start(n, block_size) for n in (max(lengths), max(lengths) + steps))
    assert last - first > 3 * (block_size // 2)
    found = generate(model, prompts, steps, how, seed=5)
    assert found == without_cache(model, prompts, steps, how, seed=5)
    assert [row[: len(prompt)] for row, prompt in zip(found, prompts, strict=True)] == prompts
    assert prompts == prompts_of(lengths)
    assert len({tuple(row[-5:]) for row in found}) == len(found) or block_size < 3  # the rows are not all alike


def test_a_window_is_read_whole_only_when_it_moves() -> None:
    model, widths = tiny(), []
    model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    generate(model, prompts_of([16]), 20, Sampling(), 0)
    assert [width for width in widths if width > 1] == [16, 9, 9, 9]


@pytest.mark.parametrize("bias", ["none", "all"])
def test_generation_goes_through_the_active_adapter(bias: str) -> None:
    model, prompts = tiny(bias=bias != "none"), prompts_of([3, 16, 20])
    plain = generate(model, prompts, 30, WILD, 5)
    attach(model, LoRAConfig(rank=4, dropout=0.5, bias=bias))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape)
    adapted = generate(model, prompts, 30, WILD, 5)
    assert adapted == without_cache(model.eval(), prompts, 30, WILD, 5)
    assert adapted != plain


def test_cached_generation_works_under_autocast() -> None:
    model = tiny().requires_grad_(False)
    with torch.autocast("cpu"):
        rows = generate(model, prompts_of([3, 16, 20]), 30, WILD, 5)
    assert [len(row) for row in rows] == [33, 46, 50]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    model, prompts, how = tiny(), prompts_of([2, 9, 16, 30]), Sampling(greedy=True, repetition_penalty=1.5)
    together = generate(model, prompts, 30, how, 0)
    for prompt, row in zip(prompts, together, strict=True):
        assert generate(model, [prompt], 30, how, 0) == [row]


@settings(deadline=None)
@given(block_size=st.integers(1, 70), n=st.integers(1, 400))
def test_windows_are_never_too_long_and_move_by_half_a_block(block_size: int, n: int) -> None:
    start, after, half = window_start(n, block_size), window_start(n + 1, block_size), max(1, block_size // 2)
    assert 1 <= n - start <= block_size
    assert after - start in (0, half)
    assert start % half == 0
    assert (start == 0) == (n <= block_size)
    if after != start:
        assert n - start == block_size  # it moves only when it is full


def per_row_texts(model, prompts, adapters, count: int, how: Sampling, seeds, tell=lambda n: None) -> list[list[int]]:
    rows = zip(prompts, seeds, adapters, strict=True)
    asked = [Asked(prompt, count, seed, how, adapters=strengths) for prompt, seed, strengths in rows]
    found = dict(generate_per_row(model, asked, tell=tell))
    return [found[i].tokens for i in range(len(asked))]


def test_seeds_and_the_global_generator() -> None:
    model, prompt = tiny(), prompts_of([4])
    torch.manual_seed(1)
    before = torch.get_rng_state()
    texts = [generate(model, prompt, 20, Sampling(), seed) for seed in (1, 1, 2)]
    by_method = model.generate(torch.tensor(prompt), 20, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert texts[0] == texts[1] == by_method.tolist()
    assert texts[0] != texts[2]
    unseeded = [model.generate(torch.tensor(prompt), 20) for _ in range(2)]
    assert not torch.equal(*unseeded)
    torch.manual_seed(1)
    assert torch.equal(model.generate(torch.tensor(prompt), 20), unseeded[0])


@pytest.mark.parametrize(("B", "T", "n"), [(1, 1, 5), (3, 4, 20), (2, 30, 3), (2, 3, 0)])
def test_generate_appends_to_token_ids(B: int, T: int, n: int) -> None:
    idx = torch.tensor(prompts_of([T] * B))
    out = tiny().generate(idx, n, seed=0, temperature=0.7, top_k=5)
    assert (out.shape, out.dtype) == ((B, T + n), torch.long)
    assert torch.equal(out[:, :T], idx)
    assert out.max() < 50


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_restored_whatever_happens(training: bool) -> None:
    model, prompts = tiny(dropout=0.5).train(training), prompts_of([4])
    tokens = stream(model, prompts, 10, Sampling(), 0)
    next(tokens)
    assert not model.blocks[0].training
    tokens.close()
    assert all(module.training == training for module in model.modules())
    generate(model, prompts, 2, Sampling(), 0)
    assert all(module.training == training for module in model.modules())
    with pytest.raises(IndexError):
        generate(model, [[50]], 2, Sampling(), 0)
    assert all(module.training == training for module in model.modules())
    assert generate(model, prompts, 20, WILD, 0) == generate(tiny(), prompts, 20, WILD, 0)  # without dropout


def test_generation_leaves_no_graph_and_trains_nothing() -> None:
    model = tiny()
    generate(model, prompts_of([20, 3]), 5, Sampling(), 0)
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("prompts", [[[]], [[1], []]])
def test_an_empty_prompt_is_refused(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        generate(tiny(), prompts, 3, Sampling(), 0)


def draw(logits: torch.Tensor, how: Sampling, seen: list[list[int]] | None = None, draws: int = 1) -> list[int]:
    """Tokens drawn from one row of logits."""
    rows = logits.expand(draws, -1)
    return choose(rows, (seen or [[]]) * draws, how, torch.Generator().manual_seed(0))


LOGITS = torch.tensor([0.5, 3.0, -1.0, 2.0, 1.0, -4.0])


NARROW = [
    Sampling(greedy=True),
    Sampling(temperature=0.0),
    Sampling(top_k=1),
    Sampling(top_p=1e-9),
    Sampling(temperature=1e-4),
]


@pytest.mark.parametrize("how", [*NARROW, Sampling(3.0, top_k=1)], ids=str)
def test_narrow_sampling_is_greedy(how: Sampling) -> None:
    assert set(draw(LOGITS, how, draws=200)) == {1}
    model, prompts = tiny(), prompts_of([3, 20])
    assert generate(model, prompts, 20, how, 1) == generate(model, prompts, 20, Sampling(greedy=True), 2)


@pytest.mark.parametrize(
    ("how", "kept"),
    [
        (Sampling(), {0, 1, 2, 3, 4, 5}),
        (Sampling(top_k=3), {1, 3, 4}),
        (Sampling(top_k=6), {0, 1, 2, 3, 4, 5}),
        (Sampling(top_k=1000), {0, 1, 2, 3, 4, 5}),
        (Sampling(top_p=0.6), {1}),
        (Sampling(top_p=0.65), {1, 3}),  # the likeliest has 0.62 of it
        (Sampling(top_p=0.9), {1, 3, 4}),
        (Sampling(top_p=1.0), {0, 1, 2, 3, 4, 5}),
        (Sampling(min_p=0.0), {0, 1, 2, 3, 4, 5}),
        (Sampling(min_p=0.1), {1, 3, 4}),  # e^-2 = 0.14 of the likeliest, and e^-2.5 = 0.08
        (Sampling(min_p=1.0), {1}),
        (Sampling(top_k=2, min_p=0.1), {1, 3}),
        (Sampling(top_k=3, top_p=0.7), {1, 3}),  # of what top_k left, the likeliest has 0.67
    ],
    ids=str,
)
def test_draws_follow_the_probabilities_of_what_the_filters_keep(how: Sampling, kept: set[int]) -> None:
    counts = torch.bincount(torch.tensor(draw(LOGITS, how, draws=20_000)), minlength=6) / 20_000
    hidden = torch.tensor([token not in kept for token in range(6)])
    assert torch.allclose(counts, LOGITS.masked_fill(hidden, -math.inf).softmax(-1), atol=0.015)
    assert not counts[hidden].any()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    counts = torch.bincount(torch.tensor(draw(LOGITS, Sampling(temperature), draws=20_000)), minlength=6) / 20_000
    assert torch.allclose(counts, (LOGITS / temperature).softmax(-1), atol=0.015)


def test_the_repetition_penalty_divides_or_multiplies_what_was_seen() -> None:
    seen, penalised = [1, 1, 2, 0], torch.tensor([0.5 / 2, 3.0 / 2, -1.0 * 2, 2.0, 1.0, -4.0])
    drawn = draw(LOGITS, Sampling(repetition_penalty=2.0), [seen], draws=3000)
    counts = torch.bincount(torch.tensor(drawn), minlength=6) / 3000
    assert torch.allclose(counts, penalised.softmax(-1), atol=0.03)
    assert draw(LOGITS, Sampling(greedy=True, repetition_penalty=2.0), [seen]) == [3]
    assert torch.equal(LOGITS, torch.tensor([0.5, 3.0, -1.0, 2.0, 1.0, -4.0]))


def test_rows_are_penalised_for_what_they_saw_themselves() -> None:
    how = Sampling(greedy=True, repetition_penalty=100.0)
    assert choose(LOGITS.expand(3, -1), [[1], [1, 3], []], how, torch.Generator()) == [3, 4, 1]


NONSENSE = [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_k": -1}]
NONSENSE += [{"top_p": 0.0}, {"top_p": -0.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": -1.0}]
NONSENSE += [{"min_p": -0.1}, {"min_p": 1.5}, {"min_p": math.nan}]


@pytest.mark.parametrize("options", NONSENSE, ids=str)
def test_options_that_make_no_sense_are_refused_by_name(options: dict) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"^{name}={value}: must be "):
        tiny().generate(torch.zeros(1, 1, dtype=torch.long), 1, **options)


def test_the_settings_can_be_combined() -> None:
    model = tiny()
    for top_k, top_p, penalty in itertools.product((None, 3), (None, 0.5), (1.0, 1.3)):
        how = Sampling(0.8, top_k, top_p, penalty)
        assert generate(model, prompts_of([3, 20]), 6, how, 1) == without_cache(model, prompts_of([3, 20]), 6, how, 1)


def test_a_suspended_stream_keeps_its_text_and_does_not_disturb_training() -> None:
    model, prompts = tiny().requires_grad_(True), prompts_of([5])
    whole = generate(model, prompts, 20, WILD, 5)[0][5:]
    idx = torch.arange(12)[None]
    expected = torch.autograd.grad(model(idx, idx)[1], list(model.parameters()))
    tokens = stream(model, prompts, 20, WILD, 5)
    found = [next(tokens)[0] for _ in range(10)]
    for mine, its in zip(torch.autograd.grad(model(idx, idx)[1], list(model.parameters())), expected, strict=True):
        assert torch.equal(mine, its)
    found += [row[0] for row in tokens]
    assert found == whole
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert generate(model, prompts, 20, WILD, 5)[0][5:] != whole


def test_another_adapter_counts_at_once_also_while_text_streams() -> None:
    model, prompts, how = tiny(), prompts_of([5]), Sampling(greedy=True)
    plain = generate(model, prompts, 12, how, 0)[0][5:]
    attach(model, LoRAConfig(rank=4, train_embeddings=False))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    assert generate(model, prompts, 12, how, 0)[0][5:] != plain
    tokens = stream(model, prompts, 12, how, 0)
    next(tokens)
    activate(model)
    with torch.no_grad():
        bare = model(torch.tensor(prompts))[0]
        activate(model, "default")
        assert not torch.equal(model(torch.tensor(prompts))[0], bare)
    tokens.close()


def test_a_stop_token_ends_its_row_and_changes_no_other() -> None:
    model, prompts, seeds = tiny(), prompts_of([3, 5, 9, 4]), [1, 2, 3, 4]
    whole = [list(row) for row in zip(*stream(model, prompts, 24, WILD, seeds), strict=True)]
    stop = whole[0][10]
    how = dataclasses.replace(WILD, stop_ids=(stop,))
    expected = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert len({len(row) for row in expected}) > 1
    found = generate(model, prompts, 24, how, seeds)
    assert [row[len(prompt) :] for row, prompt in zip(found, prompts, strict=True)] == expected
    assert per_row_texts(model, prompts, [{}] * 4, 24, how, seeds) == expected
    (alone,) = generate(model, prompts[:1], 24, how, seeds[:1])
    assert alone[3:] == expected[0]
    options = {"temperature": 1.5, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2, "stop_ids": (stop,)}
    tensor = model.generate(torch.tensor(prompts_of([5, 5])), 24, seed=1, **options)
    rows = [row[: row.index(stop, 5)] if stop in row[5:] else row for row in tensor.tolist()]
    assert rows == generate(model, prompts_of([5, 5]), 24, how, 1)


def test_narrow_models_generate_in_fp32_on_the_cpu_and_wide_ones_in_the_callers_dtype(monkeypatch) -> None:
    model, seen = tiny(), []
    model.lm_head.register_forward_hook(lambda _, __, y: seen.append(y.dtype))
    for narrow in (33, 32):
        monkeypatch.setattr(sampling, "NARROW", narrow)
        with torch.autocast("cpu"):
            generate(model, prompts_of([5]), 2, WILD, 5)
    assert seen == [torch.float32] * 2 + [torch.bfloat16] * 2


@pytest.mark.parametrize(
    ("rows", "narrow", "used"), [(1, 0, [True, False]), (2, 0, [True, True]), (2, 999, [False] * 2)]
)
def test_onednn_is_left_out_for_one_token_and_for_narrow_models(monkeypatch, rows, narrow, used) -> None:
    monkeypatch.setattr(sampling, "NARROW", narrow)
    model, seen = tiny(), []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.mkldnn.enabled))
    generate(model, prompts_of([3] * rows), 2, Sampling(), 0)
    assert seen == used and torch.backends.mkldnn.enabled
    with pytest.raises(IndexError):
        generate(model, [[999]], 1, Sampling(), 0)
    assert torch.backends.mkldnn.enabled


def test_effective_weights_are_made_once_also_for_inputs_in_another_dtype() -> None:
    model = tiny()
    attach(model, LoRAConfig(rank=4))
    layer, x = model.blocks[0].mlp.up_proj, torch.randn(1, 2, 32)
    with torch.inference_mode(), cached_weights(model), torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        made = layer.cache[(layer,)]
        layer(x)
        assert layer.cache[(layer,)] is made


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("rank", [0, 4])
def test_a_token_without_onednn_has_the_logits_that_it_has_with_it(rank: int, monkeypatch) -> None:
    monkeypatch.setattr(sampling, "NARROW", 0)
    model = tiny().bfloat16()
    if rank:
        attach(model, LoRAConfig(rank=rank))
        for module in model.modules():
            if hasattr(module, "B"):
                torch.nn.init.normal_(module.B, std=0.1)
    found, used = [], []
    model.register_forward_pre_hook(lambda *_: used.append(torch.backends.mkldnn.enabled))
    for rows in (1, 2):  # one is read without it, two with it
        cache = sampling.KVCache(model.config.n_layer, model.config.max_positions, torch.device("cpu"))
        with torch.inference_mode(), cached_weights(model.eval()), torch.autocast("cpu", torch.bfloat16):
            sampling.read(model, cache, [[3, 1, 4]] * rows)
            found.append(sampling.read(model, cache, [[3, 1, 4, 1]] * rows)[0].float())
    assert used == [True, False, True, True]
    assert (found[0] - found[1]).norm() / found[1].norm() < 0.02


def test_with_a_seed_a_row_the_text_of_a_row_is_what_it_is_alone() -> None:
    model, prompts, seeds = tiny(), prompts_of([2, 9, 16, 30, 9]), [5, 6, 5, 7, 5]
    together = generate(model, prompts, 30, WILD, seeds)
    for prompt, seed, row in zip(prompts, seeds, together, strict=True):
        assert generate(model, [prompt], 30, WILD, seed) == generate(model, [prompt], 30, WILD, [seed]) == [row]
    assert generate(model, prompts[:1] * 2, 30, WILD, 5)[1] != together[0]  # one seed for all rows draws on
    with pytest.raises(ValueError, match="shorter"):
        generate(model, prompts, 2, WILD, seeds[:2])


def with_two_adapters(rank: int = 4) -> BigramLanguageModelLoRA:
    """Adapters `one`, on all linears with embeddings and biases, and `two`, on some linears; none is active."""
    model = tiny(bias=True)
    for seed, (name, config) in enumerate(TWO.items()):
        attach(model, dataclasses.replace(config, rank=rank), name)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.15 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    activate(model)
    return model


TWO = {"one": LoRAConfig(bias="all"), "two": LoRAConfig(targets="minimal", train_embeddings=False)}
MIXED = [{"one": 1.0}, {}, {"two": 1.0}, {"one": 1.0}, {"one": 0.5, "two": 2.0}, {}]


@pytest.mark.parametrize("at_once", [2, 64])
def test_rows_with_adapters_of_their_own_have_the_texts_that_each_has_alone(at_once: int, monkeypatch) -> None:
    model, told = with_two_adapters(), []
    monkeypatch.setattr(per_row, "AT_ONCE", at_once)
    prompts, seeds = prompts_of([3, 16, 9, 3, 20, 5]), [1, 2, 1, 2, 1, 2]
    mixed = MIXED[:5] + [{"one": 1.0}]
    activate(model, "two")
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    found = per_row_texts(model, prompts, mixed, 25, WILD, seeds, told.append)
    assert sum(told) == 6 * 25 and max(told) == min(6, at_once)
    assert active_adapters(model) == {"two": 1.0}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == training
    for prompt, strengths, seed, row in zip(prompts, mixed, seeds, found, strict=True):
        activate(model, strengths)
        assert generate(model, [prompt], 25, WILD, seed)[0][len(prompt) :] == row
    with pytest.raises(UsageError, match="no adapter 'three'"):
        per_row_texts(model, prompts[:1], [{"three": 1.0}], 2, WILD, [1])


@pytest.mark.parametrize("rank", [1, 4, 6])
def test_a_text_in_a_shared_batch_has_the_same_bits_whatever_is_beside_it(rank: int) -> None:
    model, seeds = with_two_adapters(rank), range(24)
    prompts, choices = prompts_of([3 + 5 * i % 17 for i in seeds]), [MIXED[i % 6] for i in seeds]
    rows = zip(prompts, seeds, choices, strict=True)
    asked = [Asked(prompt, 20, seed, WILD, adapters=strengths) for prompt, seed, strengths in rows]
    batches = per_row.shared_batches(choices)
    whole = dict(generate_per_row(model, asked, batches, scored=True))
    for some in (asked[:1], asked[5:6], asked[1::2], asked[:20:3]):
        found = dict(generate_per_row(model, some, batches, scored=True))
        assert [found[i] for i in range(len(some))] == [whole[asked.index(each)] for each in some]
