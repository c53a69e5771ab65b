"""How a step is cut into parts, shared by processes and added up, without starting any.

The processes are threads here, which hand tensors to each other where the real ones send them; `sums_of_processes.py`
has the real ones do the same.
"""

from __future__ import annotations

import queue
import re
import threading
from itertools import product

import pytest
import torch
from balanced import bytes_sent, tree_sum
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import UsageError
from runtime.processes import world as world_module
from runtime.processes.launch import Launch, launch_of
from runtime.processes.world import World
from runtime.training.batch import IGNORED, Batch
from runtime.training.reduction import TreeSum, check_parts
from runtime.training.steps import step_seed

EPSILON = 2.0**-24
SHAPES = ((3,), (2, 2), ())


def rows(count: int, seed: int = 0) -> list[list[torch.Tensor]]:
    """Rows of tensors of very different sizes, so that another order of adding them up gives other bits."""
    torch.manual_seed(seed)
    return [[torch.randn(shape) * 10.0 ** (i % 5) for shape in SHAPES] for i in range(count)]


def summed(given_rows: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    tree = TreeSum()
    for row in given_rows:
        tree.add([t.clone() for t in row])
    return tree.total()


@pytest.mark.parametrize("count", [*range(1, 18), 31, 64, 100])
def test_rows_are_added_up_in_a_balanced_tree(count):
    given_rows = rows(count, count)
    for i, found in enumerate(summed(given_rows)):
        terms = [row[i] for row in given_rows]
        assert torch.equal(found, tree_sum(terms))
        exact, sizes = torch.stack(terms).double().sum(0), torch.stack(terms).double().abs().sum(0)
        roundings = max(1, (count - 1).bit_length()) * EPSILON * 1.01  # one a level, and what comes of their products
        assert ((found.double() - exact).abs() <= roundings * sizes).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 1000))
def test_processes_that_add_up_their_own_rows_and_then_their_sums_get_the_bits_of_one(processes, each, seed):
    processes, each = 1 << processes, 1 << each
    given_rows = rows(processes * each, seed)
    sums = [summed(given_rows[i * each : (i + 1) * each]) for i in range(processes)]
    for one, many in zip(summed(given_rows), summed(sums), strict=True):
        assert torch.equal(one, many)


def test_a_tree_is_empty_again_after_its_total_and_holds_few_rows_until_then():
    tree = TreeSum()
    for i, row in enumerate(rows(100), 1):
        tree.add(row)
        assert len(tree.sums) == i.bit_count()
    tree.total()
    assert not tree.sums


class Threads:
    """Stands in for torch.distributed, between threads that each have a number."""

    P2POp, isend, irecv = staticmethod(lambda *way: way), "send", "receive"

    def __init__(self, size: int) -> None:
        self.size, self.mine = size, threading.local()
        self.ways = {pair: queue.Queue() for pair in product(range(size), repeat=2)}

    def batch_isend_irecv(self, ways: list[tuple]) -> list:
        for way, tensor, other in ways:
            if way == "send":
                self.ways[self.mine.rank, other].put(tensor.clone())
        for way, tensor, other in ways:
            if way == "receive":
                tensor.copy_(self.ways[other, self.mine.rank].get(timeout=10))
        return []

    def run(self, work) -> list:
        """What `work` returns for each process."""
        results = {}

        def one(rank: int) -> None:
            self.mine.rank = rank
            results[rank] = work(World(Launch(rank, self.size, rank, self.size)))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return [results[rank] for rank in range(self.size)]


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("length", [0, 1, 5, 16, 37, 1000])
def test_all_processes_get_the_same_sum_and_send_what_a_ring_would(monkeypatch, size, length):
    torch.manual_seed(length)
    vectors = [torch.randn(length) * 10.0 ** (i % 5) for i in range(size)]
    threads = Threads(size)
    monkeypatch.setattr(world_module, "dist", threads)

    def add_up(world: World) -> tuple[torch.Tensor, int]:
        return world.add_up_in_order(vectors[world.rank].clone()), world.sent

    for found, sent in threads.run(add_up):
        assert torch.equal(found, tree_sum(vectors))
        halves = 2 * (size.bit_length() - 1)  # exchanges, each of half a vector, rounded to a number of 4 bytes
        assert abs(sent - bytes_sent(length, size)) <= 4 * halves
        if length % size == 0:
            assert sent == bytes_sent(length, size)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20))
def test_things_in_a_row_are_shared_without_gaps_and_equally(count, size):
    shares = [World(Launch(rank, size)).mine(count) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert count % size or len({len(share) for share in shares}) == 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 16), st.booleans())
def test_a_batch_is_cut_into_parts_that_together_count_what_it_counts(count, parts, packed):
    tokens = torch.arange(count * 3).view(count, 3)
    more = {"positions": tokens + 1, "segments": tokens + 2} if packed else {}
    whole = Batch(tokens, torch.where(tokens % 4 == 0, IGNORED, tokens), **more)
    cut = whole.cut(parts)
    assert len(cut) == parts and sum(int(part.count()) for part in cut) == int(whole.count())
    assert all(len(part.tokens) for part in cut), "a model cannot take an empty part"
    real = cut[: min(count, parts)]
    assert max(len(part.tokens) for part in real) - min(len(part.tokens) for part in real) <= 1
    for name in ("tokens", "targets", *more):
        assert torch.equal(torch.cat([getattr(part, name) for part in real]), getattr(whole, name))
    for part in cut[count:]:
        assert torch.equal(part.tokens, tokens[:1]) and part.inputs().keys() == more.keys()


def test_no_two_parts_share_their_dropout():
    seeds = {step_seed(seed, step, part) for seed in (0, 1, 12) for step in range(200) for part in range(16)}
    assert len(seeds) == 3 * 200 * 16 and all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(1, 2) == step_seed(1, 2, 0)


FOUR = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
FOUR |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
HALF = "start several processes with torchrun, or unset RANK and WORLD_SIZE for one"


@pytest.mark.parametrize(
    ("environ", "launch"),
    [
        ({}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "", "WORLD_SIZE": ""}, Launch()),
        ({"LOCAL_RANK": "3", "MASTER_PORT": "29500"}, Launch()),
        (FOUR, Launch(1, 4, 1, 2)),
        (FOUR | {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_RUN_ID": "none"}, Launch(1, 4, 1, 2, 2, True)),
        (FOUR | {"TORCHELASTIC_RESTART_COUNT": "none"}, Launch(1, 4, 1, 2)),
        (FOUR | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, Launch(0, 1, 0, 1)),
    ],
)
def test_the_environment_tells_which_process_this_is(environ, launch):
    assert launch_of(environ) == launch


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"RANK": "0"}, "RANK is set in the environment, but not WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, "
                        f"MASTER_ADDR, MASTER_PORT; {HALF}"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set in the environment, but not RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, "
                              f"MASTER_ADDR, MASTER_PORT; {HALF}"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK and WORLD_SIZE are set in the environment, but not LOCAL_RANK, "
                                           f"LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT; {HALF}"),
        (FOUR | {"LOCAL_RANK": ""}, "RANK and WORLD_SIZE are set in the environment, but not LOCAL_RANK; " + HALF),
        (FOUR | {"RANK": "-1"}, f"RANK='-1' in the environment is no number; {HALF}"),
        (FOUR | {"WORLD_SIZE": "two", "MASTER_PORT": "1e4"},
         f"WORLD_SIZE='two', MASTER_PORT='1e4' in the environment is no number; {HALF}"),
        (FOUR | {"RANK": "4"}, f"RANK=4 in the environment must be less than WORLD_SIZE=4; {HALF}"),
        (FOUR | {"RANK": "0", "WORLD_SIZE": "0"}, f"RANK=0 in the environment must be less than WORLD_SIZE=0; {HALF}"),
    ],
)  # fmt: skip
def test_an_environment_that_tells_of_processes_only_in_part_is_refused(environ, told):
    with pytest.raises(UsageError) as error:
        launch_of(environ)
    assert str(error.value) == told


@pytest.mark.parametrize("sign", ["²", "٣", "①"])
def test_what_only_looks_like_a_number_is_refused(sign):
    try:
        assert launch_of(FOUR | {"RANK": sign}).rank == int(sign)
    except UsageError as error:
        assert "is no number" in str(error)


@pytest.mark.parametrize(
    ("parts", "rows_", "processes", "reduce", "told"),
    [
        (1, 16, 2, "exact", "2 processes share the parts of a step equally, and STEP_PARTS=1 (by default "
                            "GRADIENT_ACCUMULATION_STEPS): set STEP_PARTS=2"),
        (1, 2, 4, "exact", "4 processes share the parts of a step equally, and STEP_PARTS=1 (by default "
                           "GRADIENT_ACCUMULATION_STEPS): set STEP_PARTS=4 and BATCH_SIZE to 4 or more"),
        (5, 16, 3, "fast", "3 processes share the parts of a step equally, and STEP_PARTS=5 (by default "
                           "GRADIENT_ACCUMULATION_STEPS): set STEP_PARTS=6"),
        (6, 16, 2, "exact", "REDUCE=exact needs STEP_PARTS to be 2, 4, 8, ..., and it is 6: set STEP_PARTS=8"),
        (4, 16, 3, "exact", "REDUCE=exact works with 2, 4, 8, ... processes, and there are 3: start 2 or 4, or set "
                            "REDUCE=fast and STEP_PARTS=6"),
        (6, 16, 3, "exact", "REDUCE=exact works with 2, 4, 8, ... processes, and there are 3: start 2 or 4, or set "
                            "REDUCE=fast"),
        (8, 4, 1, "exact", "a step has 4 rows (BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS), which cannot be cut into "
                           "STEP_PARTS=8"),
    ],
)  # fmt: skip
def test_parts_that_processes_cannot_share_are_refused(parts, rows_, processes, reduce, told):
    with pytest.raises(UsageError) as error:
        check_parts(parts, rows_, processes, reduce)
    assert str(error.value) == told


def advice(told: str) -> dict[str, str]:
    """The values of settings, and the number of processes, that a line says would do."""
    found = dict(re.findall(r"(STEP_PARTS|REDUCE|BATCH_SIZE)(?:=| to )(\w+)", told.partition(": ")[2]))
    if fewer := re.search(r"start (\d+) or", told):
        found["processes"] = fewer[1]
    return found


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70) | st.none(), st.integers(1, 17), st.sampled_from(["exact", "fast"]))
def test_what_a_refusal_says_to_set_is_taken(parts, count, processes, reduce):
    try:
        check_parts(parts, count, processes, reduce)
    except UsageError as error:
        told = str(error)
    else:
        assert processes == 1 or parts % processes == 0
        return
    if count and parts > count:
        return
    found = advice(told)
    assert found, told
    if "STEP_PARTS" in found or "REDUCE" in found:
        rows_ = max(count or 0, int(found.get("BATCH_SIZE", 0))) or None
        check_parts(int(found.get("STEP_PARTS", parts)), rows_, processes, found.get("REDUCE", reduce))
    if "processes" in found and parts.bit_count() == 1 and parts % int(found["processes"]) == 0:
        check_parts(parts, count, int(found["processes"]), reduce)
