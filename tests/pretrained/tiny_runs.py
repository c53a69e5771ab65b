"""Finished runs of tiny models, made without training, and export.py in this process, which saves starting another."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import export
from data.tokenizers import Tokenizer, build_tokenizer
from jobs.adapting.adapted import metadata_of_made, publish
from jobs.runs.base import Base
from jobs.runs.job import run_metadata, to_adapter_files, to_model_files
from lora.adapter import Adapter
from lora.attach import attach
from lora.config import LoRAConfig
from models.config import ModelConfig
from models.pretrained.source import find_source
from models.transformer import Transformer
from runtime.processes.command import run_command
from runtime.storage.runs import Run

TEXT = "Enter Hamlet, and the cat sat on the mat: 'tis 1623.\n" * 20
GPT = ModelConfig(96, n_embd=32, n_layer=2, n_head=4, max_positions=32)
ROTARY = replace(GPT, positions="rotary")
LLAMA = replace(GPT, norm="rms", positions="rotary", mlp="gated_silu", n_inner=64)


def noisy(model: Transformer, noise: float) -> None:
    """Weights that are all large enough to expose a mistake."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += noise * torch.randn(p.shape)


def own_run(root: Path, name: str, config: ModelConfig, tokenizer: Tokenizer | None = None, **more: Any) -> Run:
    """A base of ours; its tokenizer has 300 tokens unless another is given. more: what else its run.json says."""
    tokenizer = tokenizer or build_tokenizer("bpe", TEXT, 300)
    model = Transformer(replace(config, vocab_size=tokenizer.vocab_size))
    noisy(model, 0.1)
    settings = {"dataset": "letters", "test_mode": False}
    about = run_metadata("base", settings, model.config, None, tokenizer, texts=["letters"]) | more
    return publish(root / name, about, to_model_files(model, tokenizer, None), {})


def lora_run(root: Path, name: str, base: str | Path, template: str = "", **config: Any) -> Run:
    """A LoRA run on a base. template: how it was trained to chat."""
    opened = Base.of(find_source(root, str(base)))
    attach(opened.model, LoRAConfig(**{"targets": "all-linear", "train_embeddings": False} | config))
    noisy(opened.model, 0.05)
    adapter = Adapter.from_model(opened.model)
    about = metadata_of_made(root, "lora", opened, adapter, ["letters"], {"how": "test"})
    about |= {"template": template} if template else {}
    return publish(root / name, about, to_adapter_files(adapter, opened, {}), {})


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of export.py on runs in the current folder."""
    monkeypatch.setattr(sys, "argv", ["export.py", *words, "--checkpoints-dir", "."])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(export.main)
    return end.value.code, *capsys.readouterr()
