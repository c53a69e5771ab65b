"""The engine behind serve.py: whoever waits is told how it ends."""

from __future__ import annotations

import threading

import pytest
import torch

from jobs.serving.engine import Engine, FailedError, FullError
from models.generation.continuous import Asked
from runtime.device import Machine
from tests.tiny import tiny

CPU = Machine(torch.device("cpu"), torch.float32)


class Waiting:
    """What the engine tells of texts."""

    def __init__(self) -> None:
        self.told, self.all = [], threading.Semaphore(0)

    def done(self, made) -> None:
        self.told.append(made)
        self.all.release()

    def wait(self, count: int) -> None:
        for _ in range(count):
            assert self.all.acquire(timeout=20)


def test_all_that_has_begun_is_finished_at_the_end() -> None:
    waiting, engine = Waiting(), Engine(tiny(), [], CPU, 2, 10)
    with engine:
        engine.submit([(Asked([1], 20, i), waiting.done) for i in range(7)])
    assert sorted(len(made.tokens) for made in waiting.told) == [20] * 7
    with pytest.raises(FailedError):
        engine.submit([(Asked([1], 20, 0), waiting.done)])


def test_what_is_cancelled_is_not_made_and_makes_room() -> None:
    waiting, passes, model = Waiting(), [], tiny()
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    with Engine(model, [], CPU, 1, 1) as engine:
        tickets = engine.submit([(Asked([1], 10**6, 0), waiting.done), (Asked([1], 10**6, 1), waiting.done)])
        with pytest.raises(FullError):
            engine.submit([(Asked([1], 1, 2), waiting.done)])
        engine.cancel(tickets)
        for _ in range(1000):
            try:
                engine.submit([(Asked([1], 3, 2), waiting.done)])
                break
            except FullError:
                threading.Event().wait(0.01)
        waiting.wait(1)
    assert [len(made.tokens) for made in waiting.told] == [3] and len(passes) < 10**5


def test_where_it_fails_all_are_told_and_nobody_waits_for_ever() -> None:
    waiting, model, failed = Waiting(), tiny(), threading.Event()

    def fail(*_) -> None:
        raise RuntimeError("no memory")

    model.blocks[1].register_forward_pre_hook(fail)
    with Engine(model, [], CPU, 2, 10, failed.set) as engine:
        engine.submit([(Asked([1], 5, i), waiting.done) for i in range(5)])
        waiting.wait(5)
        assert failed.wait(20)
        with pytest.raises(FailedError):
            engine.submit([(Asked([1], 5, 0), waiting.done)])
    assert waiting.told == [None] * 5 and str(engine.failure) == "no memory"
