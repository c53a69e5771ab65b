"""Every family against transformers: logits, generated tokens, and the files both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import CASES, ONE_OF_EACH, folder_of, make, save

from jobs.runs.base import Base
from models import files as model_files
from models.generation.choosing import Sampling
from models.generation.sampling import generate
from models.pretrained.source import Pretrained
from runtime.storage import folders

IDX = torch.arange(80).reshape(2, 40) * 7 % 96


def ours(folder: Path) -> Base:
    return Base.of(Pretrained(folder))


@torch.no_grad()
def theirs(model: torch.nn.Module, idx: torch.Tensor = IDX) -> torch.Tensor:
    return model(idx).logits


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    model = make(case)
    base = ours(save(model, tmp_path))
    assert off(base.model(IDX)[0], theirs(model)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers_cached_and_uncached(case: str, tmp_path: Path) -> None:
    model = make(case)
    base, how = ours(save(model, tmp_path)), Sampling(greedy=True)
    prompts = [[1, 5, 9, 20], [1, 77], [1, 30, 31, 32, 33, 34, 35]]
    rows = generate(base.model, prompts, 30, how, 0)
    for prompt, row in zip(prompts, rows, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=-1)
        assert row == expected[0].tolist()
        with torch.no_grad():
            uncached = base.model(torch.tensor([row[:-1]]))[0][0, len(prompt) - 1 :].argmax(-1)
        assert row[len(prompt) :] == uncached.tolist()


@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_what_is_written_is_read_by_transformers(case: str, tmp_path: Path) -> None:
    base = ours(folder_of(case, tmp_path))
    folders.commit_folder(tmp_path / "again", model_files.to_files(base.model, base.kept))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert off(theirs(again), base.model(IDX)[0]) < 1e-5
    assert ours(tmp_path / "again").sha256 == base.sha256


def test_shards_and_the_old_form_of_a_config_are_read_alike(tmp_path: Path) -> None:
    model = make("llama tied, llama3 rope")
    whole, shards = save(model, tmp_path / "whole"), save(model, tmp_path / "shards", max_shard_size="20kB")
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    values = json.loads((shards / "config.json").read_bytes())
    rope = values.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    values |= {"rope_theta": theta, "rope_scaling": {"type": rope.pop("rope_type"), **rope}}
    (shards / "config.json").write_text(json.dumps(values))
    one, other = ours(whole), ours(shards)
    assert one.sha256 == other.sha256
    assert one.model.config == other.model.config
