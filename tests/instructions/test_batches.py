"""Batches of records: padded or packed, each a function of seed and step, and the same loss however they are cut."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from data.chat import GUIDE, Template
from data.instructions.encoding import Encoded
from data.instructions.packing import batch_of, pack
from data.instructions.records import Record
from data.instructions.splits import Records, hold_out
from data.instructions.tuning import InstructionData, Sizes, fit
from lora.attach import attach
from lora.config import LoRAConfig
from lora.optim import make_optimizer
from models.config import ModelConfig
from models.transformer import Transformer
from runtime.device import pick_machine
from runtime.training.batch import IGNORED
from runtime.training.steps import Schedule, Stepper

VOCABULARY = 70_000  # ids that need uint32, and as uint16 would hide a target of -100


def encoded(count: int, longest: int, seed: int = 0, vocabulary: int = 50, dtype: type = np.uint16) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        length = int(rng.integers(3, longest + 1))
        asked = int(rng.integers(1, length))
        found.append(Encoded(rng.integers(0, vocabulary, length).astype(dtype), np.arange(length) >= asked))
    return found


def data(found: list[Encoded], **changes) -> InstructionData:
    records = [Record(str(i), completion=str(i)) for i in range(len(found))]
    sizes = Sizes(**{"block_size": 64, "batch_size": 4, "step_size": 6, "seed": 3} | changes)
    return InstructionData(Records("some", records, records[:9], []), Template(GUIDE, ()), found, found[:9], sizes)


def models() -> dict[str, Transformer]:
    sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "max_positions": 300}
    kinds = {"gpt": {}, "llama": {"norm": "rms", "positions": "rotary", "mlp": "gated_silu", "n_kv_head": 2}}
    found = {}
    for name, changes in kinds.items():
        torch.manual_seed(0)
        found[name] = Transformer(ModelConfig(**sizes, **changes))
        with torch.no_grad():
            for p in found[name].parameters():
                p += 0.2 * torch.randn(p.shape)
    return found


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("longest", [20, 150])
def test_packed_records_do_not_see_each_other(name: str, longest: int) -> None:
    """Two blocks of queries where rows are long."""
    model, found = models()[name], encoded(12, longest)
    rows = pack([len(each) - 1 for each in found], 2 * longest)
    assert max(map(len, rows)) > 1
    losses, gradients = [], []
    for packed, chosen in ((True, rows), (False, [(i,) for i in range(len(found))])):
        batch = batch_of(chosen, found, all_count=False, packed=packed)
        model.zero_grad()
        logits, loss = model(batch.tokens, batch.targets, **batch.inputs())
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        if packed:
            for y, row in enumerate(rows):
                x = 0
                for i in row:
                    alone = model(torch.from_numpy(found[i].ids[:-1].astype(np.int64))[None])[0][0]
                    assert torch.allclose(logits[y, x : x + len(alone)], alone, atol=2e-5 * alone.abs().max().item())
                    x += len(alone)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(*gradients, atol=1e-5 * gradients[0].abs().max().item())


def test_packed_rows_by_blocks_and_by_the_fused_kernel_agree(monkeypatch) -> None:
    """The CPU's blocks against scaled_dot_product_attention, which other devices take."""
    import models.attention as attention

    model, found = models()["llama"], encoded(12, 20)
    batch = batch_of(pack([len(each) - 1 for each in found], 60), found, False, True)
    by_blocks = model(batch.tokens, batch.targets, **batch.inputs())[1]
    monkeypatch.setattr(attention, "LONGEST_BY_BLOCKS", 0)
    assert model(batch.tokens, batch.targets, **batch.inputs())[1].item() == pytest.approx(by_blocks.item(), rel=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_rows_hold_each_record_once_and_none_is_too_long(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 100) for _ in range(rng.choice([1, 7, 400]))]
    rows = pack(lengths, 100)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    used = [sum(lengths[i] for i in row) for row in rows]
    assert max(used) <= 100
    assert len(rows) <= max(1, 1.25 * sum(lengths) / 100 + 1)  # 11/9 of the fewest that would do, and one
    with pytest.raises(ValueError, match="101 positions does not fit into 100"):
        pack([101], 100)


@pytest.mark.parametrize("packed", [False, True])
def test_an_epoch_is_every_record_once_in_an_order_of_its_own(packed: bool) -> None:
    found = encoded(50, 30)
    one, other = data(found, packed=packed), data(found, packed=packed)
    steps, orders = one.steps_in_epoch, []
    for epoch in (0, 1):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch, again = one.batch(step), other.batch(step)
            assert all(
                torch.equal(a, b) for a, b in zip(batch._tensors().values(), again._tensors().values(), strict=True)
            )
            assert len(batch.tokens) <= 6
            seen += [one.rows[i] for i in one.order(epoch)[step - epoch * steps]]
        assert sorted(i for row in seen for i in row) == list(range(50))
        orders.append(seen)
    assert orders[0] != orders[1]
    assert data(found, packed=packed, seed=4).order(0)[0].tolist() != one.order(0)[0].tolist()


def test_records_of_similar_length_go_together() -> None:
    found = encoded(600, 60)
    grouped = data(found)
    padded = sum(grouped.batch(step).tokens.numel() for step in range(grouped.steps_in_epoch))
    real = sum(len(each) - 1 for each in found)
    assert real / padded > 0.9
    alone = sum(6 * (max(len(each) for each in found[i : i + 6]) - 1) for i in range(0, 600, 6))
    assert real / alone < 0.7


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("all_count", [False, True])
def test_targets_are_the_tokens_that_follow_where_they_are_said(all_count: bool, dtype: type) -> None:
    found = encoded(5, 12, vocabulary=60_000 if dtype is np.uint16 else VOCABULARY, dtype=dtype)
    batch = batch_of([(0, 3), (1,), (2, 4)], found, all_count, packed=True)
    for y, row in enumerate([(0, 3), (1,), (2, 4)]):
        tokens, targets, x = batch.tokens[y].tolist(), batch.targets[y].tolist(), 0
        for i in row:
            ids = found[i].ids.tolist()
            for k in range(len(ids) - 1):
                assert tokens[x] == ids[k]
                assert targets[x] == (ids[k + 1] if all_count or found[i].said[k + 1] else IGNORED)
                assert batch.positions[y, x] == k
                x += 1
        assert all(target == IGNORED for target in targets[x:])


@pytest.mark.parametrize("packed", [False, True])
def test_a_step_has_the_same_loss_however_it_is_cut(packed: bool) -> None:
    found, losses = data(encoded(40, 30), packed=packed, step_size=6), []
    for parts in (1, 2, 3, 6):
        model = models()["gpt"]
        attach(model, LoRAConfig(2))
        optimizer, machine = make_optimizer(model, (0.9, 0.99), 0.0), pick_machine("cpu", "fp32")
        stepper = Stepper(
            model, optimizer, Schedule(1e-3, 0, 0, 9), found.batch, machine, seed=0, parts=parts, grad_clip=0
        )
        model.train()
        loss = stepper.backward(found.batch(2)).item()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        losses.append((loss, gradient))
    for loss, gradient in losses[1:]:
        assert loss == pytest.approx(losses[0][0], rel=1e-6)
        assert torch.allclose(gradient, losses[0][1], atol=1e-6 * gradient.abs().max().item())


def test_validation_takes_all_or_spreads_a_few() -> None:
    found = data(encoded(9, 30), batch_size=2)
    assert sum(len(batch.tokens) for batch in found.validation(None)) == 9
    few = found.validation(2)
    assert [len(batch.tokens) for batch in few] == [2, 2]
    assert all(batch.positions is None for batch in few)


@pytest.mark.parametrize("skip", [False, True])
def test_what_is_too_long_is_cut_or_left_out_and_told(skip: bool, capsys) -> None:
    asked = [(5, 2), (30, 2), (30, 20), (9, 1)]  # tokens, and of these before the answer
    found = [Encoded(np.arange(n, dtype=np.uint16), np.arange(n) >= a) for n, a in asked]
    records = [Record(f"file line {i}", completion="x") for i in range(1, 5)]
    kept = fit(records, found, Sizes(10, 2, 2, 0, skip_long=skip))
    told = capsys.readouterr().err
    assert [(r.where[-1], len(each)) for r, each in kept] == (
        [("1", 5), ("4", 9)] if skip else [("1", 5), ("2", 11), ("4", 9)]
    )
    assert ("1 of 4 records have more than BLOCK_SIZE=10 tokens, and are cut at the end" in told) == (not skip)
    assert ("2 records with more" if skip else "1 record with more") in told
    assert f"the first file line {2 if skip else 3}" in told


def test_a_record_keeps_its_side_when_others_come_and_duplicates_never_straddle() -> None:
    rng = random.Random(0)
    records = [Record(str(i), prompt=f"question {rng.randint(0, 300)}", completion=str(i)) for i in range(1000)]
    train, held_out = hold_out(records[:500], 0.2)
    more_train, more_held_out = hold_out(records, 0.2)
    assert {r.where for r in train} <= {r.where for r in more_train}
    assert {r.where for r in held_out} <= {r.where for r in more_held_out}
    assert not {r.prompt for r in more_train} & {r.prompt for r in more_held_out}
    assert 120 < len(more_held_out) < 280
