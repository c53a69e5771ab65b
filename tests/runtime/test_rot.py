"""Files that rot: a flipped bit at every byte and a cut at every length end in a named error or the save before.

SOAK=1 damages every byte; otherwise at most MOST places of each file, spread evenly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_steps import stepper

from data.tokenizers import build_tokenizer
from models import files as model_files
from models.config import ModelConfig
from models.transformer import Transformer
from runtime.storage import folders
from runtime.storage.encoding import to_sealed_json
from runtime.storage.folders import CorruptedError
from runtime.storage.runs import Run, claim, open_run
from runtime.training.metrics import MetricsLog, read_metrics
from runtime.training.resume import State, to_files

MOST = 10**9 if os.environ.get("SOAK") else 300
ABOUT = {"kind": "base", "identity": "0123456789ab"}
ABOUT |= {"settings": {"test_mode": False, "dataset": "folio", "learning_rate": 1e-3}}
SAVED = {
    "step": ("weights.safetensors", "optimizer.safetensors", "state.json", folders.MANIFEST),
    "best": ("model.safetensors", "config.json", "tokenizer.json", folders.MANIFEST),
}
PARTS = [(prefix, name) for prefix, names in SAVED.items() for name in names]


def damages(good: bytes) -> Iterator[bytes]:
    """The bytes with one bit flipped, or cut, at each place; which bit it is changes from byte to byte."""
    for i in range(0, len(good), max(1, len(good) // MOST)):
        yield good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :]
        yield good[:i]


def product(seed: int) -> dict[str, bytes]:
    torch.manual_seed(seed)
    tokenizer = build_tokenizer("char", "to be", 0)
    config = ModelConfig(tokenizer.vocab_size, n_embd=8, max_positions=8, n_head=1, n_layer=1, bias=False)
    return model_files.to_files(Transformer(config)) | {"tokenizer.json": tokenizer.dumps()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """A run that has saved twice, with the real contents of its saves."""
    run, steps = claim(tmp_path_factory.mktemp("runs"), "base-x", "", ABOUT, fresh=False), stepper()
    for step in (1, 2):
        steps.step(step)
        run.save("step", step, to_files(steps, State(step=step, best=1.5)), keep=2)
        run.save("best", step, product(step), keep=2)
    return run


def each_damage(path: Path) -> Iterator[int]:
    """Damage a file in every way, one after the other, and restore it at the end; counts them."""
    good, count = path.read_bytes(), 0
    try:
        for count, bad in enumerate(damages(good), 1):
            path.write_bytes(bad)
            yield count
    finally:
        path.write_bytes(good)
    print(f"{path.name}: {len(good)} bytes, {count} damages, all noticed or harmless")


@pytest.mark.parametrize(("prefix", "name"), PARTS, ids=lambda part: part)
def test_a_run_falls_back_to_the_save_before_or_has_lost_nothing(run, prefix, name, capsys):
    one, two = (folders.read_folder(run.folder / f"{prefix}-00000{step}") for step in (1, 2))
    harmless = 0
    for _ in each_damage(run.folder / f"{prefix}-000002" / name):
        got, told = run.newest(prefix), capsys.readouterr().err
        if got == (2, two) and not told:
            harmless += 1
        else:
            assert got == (1, one)
            assert told.count("\n") == 1 and f"{prefix}-000002" in told and "falling back" in told
    assert harmless == 0 or name == folders.MANIFEST and harmless < 10, "only blanks between its entries change nothing"


@pytest.mark.parametrize("name", SAVED["best"])
def test_a_finished_run_is_refused_by_name_or_has_lost_nothing(run, tmp_path, name):
    product = folders.read_folder(run.folder / "best-000002")
    folders.commit_folder(tmp_path / "model", product)
    done = Run(tmp_path, ABOUT)
    for _ in each_damage(tmp_path / "model" / name):
        try:
            assert done.read() == product and name == folders.MANIFEST
        except CorruptedError as error:
            assert name in str(error) and str(error).isprintable()


@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_what_a_run_says_of_itself_is_refused_or_right(run, name):
    path, result = run.folder / "result.json", {"val_loss": 1.5, "seconds": 12.25}
    path.write_bytes(to_sealed_json(result))
    refused = 0
    for count in each_damage(run.folder / name):  # noqa: B007 - the last one is used
        try:
            said, right = (open_run(run.folder).metadata, ABOUT) if name == "run.json" else (run.result, result)
            assert {key: said.get(key) for key in right} == right, "a checksum whose name has rotted checks nothing"
            assert len(said) <= len(right) + 1
        except CorruptedError as error:
            refused += 1
            assert name in str(error) and str(error).isprintable()
    assert refused > 0.9 * count
    path.unlink()


def test_a_corrupted_log_is_told_and_costs_nothing_else(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in range(1, 6):
        log.add(step, loss=step / 8)
    log.flush()
    lines, told = read_metrics(path), 0
    for _ in each_damage(path):
        got, err = read_metrics(path), capsys.readouterr().err
        told += "corrupted line(s) left out" in err
        assert len([line for line in got if line in lines]) >= len(got) - 1, "the other lines are as they were"
        again = MetricsLog(path, 5)
        assert len(got) == 5 or capsys.readouterr().err, "whatever is missing is told when the run goes on"
        again.add(10, loss=1.0)
        again.flush()
        capsys.readouterr()
        assert read_metrics(path)[-1] == {"step": 10, "loss": 1.0} and not capsys.readouterr().err
    assert told
