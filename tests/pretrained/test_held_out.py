"""The loss that export.py prints: on what the run held out, on a text that is named, or else on what it would write."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_runs import LLAMA, TEXT, call, own_run
from torch.nn import functional as F

from data.corpora import load_corpus
from jobs.exporting.hugging_face.folder import whole_files
from jobs.exporting.opening import Opened
from jobs.generating.load import load

pytest.importorskip("transformers")
LONG = TEXT * 5


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(LONG)
    return tmp_path


def loss_of(text: str, length: int = 32) -> float:
    model, tokenizer = load("own", ".")
    ids = torch.tensor(tokenizer.encode(text))
    n = (len(ids) - 1) // length
    with torch.no_grad():
        logits = model(ids[: n * length].view(n, length))[0]
    return F.cross_entropy(logits.flatten(0, 1), ids[1 : n * length + 1]).item()


def exported(monkeypatch, capsys, out: str, *words: str) -> tuple[str, float, float]:
    """What the loss was measured on, the run's and transformers'."""
    status, told, err = call(monkeypatch, capsys, "own", "--to", "hf", "--out", out, "--data-dir", "cache", *words)
    assert status == 0, err
    line = r"Loss on (.+): (\S+) nats a token, and (\S+) in transformers"
    what, mine, theirs = re.search(line, told).groups()
    return what, float(mine), float(theirs)


def test_what_the_run_held_out_and_a_text_that_is_named(here, monkeypatch, capsys):
    corpus = load_corpus("text.txt", here)
    own_run(here, "own", LLAMA, texts=["text.txt"], dataset={"sha256": corpus.sha256})
    what, mine, theirs = exported(monkeypatch, capsys, "a")
    assert what == "what own held out of text" and mine == theirs == round(loss_of(corpus.validation), 4)
    what, mine, theirs = exported(monkeypatch, capsys, "b", "--text", "text.txt")
    assert what == "text.txt" and mine == theirs == round(loss_of(LONG), 4)


def test_what_is_gone_or_has_changed_is_said(here, monkeypatch, capsys):
    own_run(here, "own", LLAMA, texts=["text.txt"], dataset={"sha256": "another"})
    told = "what the run itself would write after random tokens (no held-out text: "
    what, mine, theirs = exported(monkeypatch, capsys, "a")
    assert what.startswith(f"{told}text.txt is not what it was when own was trained") and mine == theirs > 0
    (here / "text.txt").unlink()
    assert exported(monkeypatch, capsys, "b")[0].startswith(f"{told}text.txt: there is no such text file")


def test_a_loss_that_is_too_high_and_a_text_that_is_none(here, monkeypatch, capsys):
    own_run(here, "own", LLAMA)
    for words, told in (
        (("--text", "nowhere.txt"), "nowhere.txt: there is no such text file"),
        (("--to", "peft", "--text", "text.txt"), "--text is for --to hf, gguf and onnx, not --to peft"),
        (("--to", "peft", "--allow-loss", "1"), "--allow-loss is for --to hf, gguf and onnx, not --to peft"),
    ):
        status, _, err = call(monkeypatch, capsys, "own", "--to", "hf", "--out", "x", *words)
        assert status in (1, 2) and told in err
    monkeypatch.setattr("jobs.exporting.hugging_face.folder.LIMITS", {False: 1e3})

    def spoilt(opened: Opened, *how: object) -> tuple:
        opened.model.lm_head.weight.data.mul_(20)
        return whole_files(opened, *how)

    monkeypatch.setattr("jobs.exporting.hugging_face.folder.whole_files", spoilt)
    status, _, err = call(monkeypatch, capsys, "own", "--to", "hf", "--out", "x", "--text", "text.txt")
    assert status == 1 and "nats a token, " in err and "and up to 0.05 more passes; nothing was saved" in err, err
    assert not (here / "x").exists()
