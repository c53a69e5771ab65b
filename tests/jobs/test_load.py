"""Trained runs from Python, as the README's first page shows it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.generating.load import load
from lora.attach import activate
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from runtime.errors import UserError
from tests.commands.command_line import run

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
RUNS = FIXTURES / "runs"
LOGITS = load_file(FIXTURES / "logits.safetensors")
IDX = torch.arange(32).view(2, 16) * 7 % 90


@pytest.mark.parametrize("name", LOGITS)
def test_a_run_is_loaded_with_its_adapter_and_its_tokenizer(name):
    model, tokenizer = load(name, RUNS, device="auto" if name == "base" else "cpu")
    with torch.no_grad():
        assert torch.allclose(model(IDX)[0], LOGITS[name], rtol=1e-5, atol=1e-5)
    ids = tokenizer.encode("O Romeo")
    assert type(ids) is list and all(type(token) is int for token in ids) and tokenizer.decode(ids) == "O Romeo"
    text = model.generate_text("O Romeo", max_new_tokens=20, seed=1)
    assert type(text) is str and text == model.generate_text("O Romeo", max_new_tokens=20, seed=1)
    assert text != model.generate_text("O Romeo", max_new_tokens=20, seed=2)
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_the_text_is_what_generate_py_prints(tmp_path, data_dir):
    flags = ("--run", "lora", "--prompt", "O Romeo", "--max-new-tokens", "40", "--checkpoints-dir", str(RUNS))
    printed = run(tmp_path, data_dir, "generate.py", *flags, "--seed", "7", "--dtype", "fp32").stdout
    model, _ = load(str(RUNS / "lora"))
    assert printed == f"O Romeo{model.generate_text('O Romeo', 40, seed=7)}\n"
    activate(model)
    assert model.generate_text("O Romeo", 40, seed=7) == load("base", RUNS)[0].generate_text("O Romeo", 40, seed=7)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")
def test_what_cannot_be_loaded_is_one_line():
    for call in (lambda: load("lora", RUNS, device="mps"), lambda: BigramLanguageModelLoRA(50, device="mps")):
        with pytest.raises(UserError, match="^device='mps' cannot be used here, with torch .*; 'cpu' can$") as error:
            call()
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="there is no run 'nobody' in"):
        load("nobody", RUNS)
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        BigramLanguageModelLoRA(50).generate_text("O")
