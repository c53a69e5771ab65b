"""export.py --to peft: PEFT computes what the run does, with its patterns and with all scales folded for vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tiny_models import folder_of
from tiny_runs import LLAMA, call, lora_run, own_run

from jobs.generating.load import load

IDS = torch.arange(48).reshape(2, 24) * 7 % 90


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder_of("llama", tmp_path)
    return tmp_path


@torch.no_grad()
def with_peft(folder: str) -> torch.Tensor:
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    return peft.PeftModel.from_pretrained(base, folder).eval()(IDS).logits


@torch.no_grad()
def ours(name: str) -> torch.Tensor:
    return load(name, ".")[0](IDS)[0]


def test_as_it_is_and_folded(here, monkeypatch, capsys):
    lora_run(
        here, "run", "base", variant="rslora", rank_pattern={"o_proj": 2, "up_proj": 12}, alpha_pattern={"q_proj": 3}
    )
    for words in ((), ("--for", "vllm")):
        name = "-".join(("out", *words))
        status, out, err = call(monkeypatch, capsys, "run", "--to", "peft", *words, "--out", name)
        assert status == 0 and "the logits of the folder read back differ by" in out, err
        assert (here / name / "tokenizer.json").exists() and "rslora" in (here / name / "README.md").read_text()
        assert torch.allclose(with_peft(name), ours("run"), atol=1e-4)
        config = json.loads((here / name / "adapter_config.json").read_bytes())
        plain = not any(config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"))
        assert plain == (words != ()) and config["r"] == (12 if words else 8)


def test_what_is_refused(here, monkeypatch, capsys):
    own_run(here, "own", LLAMA)
    lora_run(here, "on-own", "own")
    lora_run(here, "embedded", "base", train_embeddings=True)
    lora_run(here, "dora", "base", variant="dora")
    for words, status, told in (
        (("base", "--out", "x"), 2, "base has no adapter; --to hf exports the whole model"),
        (("on-own", "--out", "x", "--for", "vllm"), 1, "which vLLM does not know; export base and adapter as one"),
        (("embedded", "--out", "x", "--for", "vllm"), 1, "train with LORA_TRAIN_EMBEDDINGS=False and LORA_BIAS=none"),
        (("dora", "--out", "x", "--for", "vllm"), 1, "LORA_VARIANT=dora changes more than vLLM reads"),
        (("dora", "--out", "x", "--outtype", "f16"), 2, "--outtype is for --to hf and gguf, not --to peft"),
        (("dora", "--out", "base"), 2, "base is there already"),
    ):
        got, out, err = call(monkeypatch, capsys, *words, "--to", "peft")
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert (got, out, len(errors)) == (status, "", 1) and told in errors[0], (words, err)
    assert not (here / "x").exists() and not list(here.glob(".tmp*"))
