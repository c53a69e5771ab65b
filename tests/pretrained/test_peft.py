"""Adapters of pretrained bases against PEFT, both ways: every family, variant, preset of targets and bias mode."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tiny_models import ONE_OF_EACH, folder_of

from jobs.adapting.making import import_folder
from jobs.runs.base import Base
from jobs.runs.job import to_adapter_files
from lora import peft_format
from lora.adapter import Adapter
from lora.attach import attach
from lora.config import LoRAConfig
from lora.merge import merged
from models.pretrained.families import family_with
from models.pretrained.source import Pretrained
from runtime.errors import UsageError, UserError
from runtime.storage import folders

IDX = torch.arange(80).reshape(2, 40) * 7 % 96
CONFIGS = {
    "lora": LoRAConfig(4, 8.0, targets="all-linear", train_embeddings=False),
    "rslora minimal": LoRAConfig(4, 8.0, targets="minimal", variant="rslora", train_embeddings=False),
    "dora standard": LoRAConfig(4, 8.0, targets="standard", variant="dora", train_embeddings=False),
    "vera": LoRAConfig(4, targets="o_proj", variant="vera", train_embeddings=False, seed=3),
    "o_proj alone": LoRAConfig(4, 8.0, targets="o_proj", train_embeddings=False),
    "patterns": LoRAConfig(
        4, 8.0, targets="o_proj,down_proj", train_embeddings=False,
        rank_pattern={"blocks.1.mlp.down_proj": 2}, alpha_pattern={"o_proj": 3.0},
    ),
    "one block": LoRAConfig(4, targets="re:blocks.1..*(o_proj|up_proj)", train_embeddings=False),
    "embeddings": LoRAConfig(4, targets="minimal"),
}  # fmt: skip


def opened(folder: Path) -> Base:
    return Base.of(Pretrained(folder))


def adapted(folder: Path, config: LoRAConfig) -> Base:
    """The base with an adapter none of whose tensors is at its initial value."""
    base = opened(folder)
    torch.manual_seed(1)
    attach(base.model, config)
    with torch.no_grad():
        for p in base.model.parameters():
            if p.requires_grad:
                p += 0.2 * torch.randn(p.shape)
    return base


def in_peft(base: Path, adapter: Path) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def write(base: Base, folder: Path) -> None:
    adapter = Adapter.from_model(base.model)
    shared = adapter.make_shared(base.tensors)
    folders.commit_folder(folder, to_adapter_files(adapter, base, {}, shared))


@pytest.mark.parametrize("case", ONE_OF_EACH)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_peft_computes_our_logits_and_we_read_what_we_wrote(name: str, case: str, tmp_path: Path) -> None:
    folder = folder_of(case, tmp_path)
    base = adapted(folder, CONFIGS[name])
    expected = base.model.eval()(IDX)[0]
    write(base, tmp_path / "adapter")
    model = in_peft(folder, tmp_path / "adapter")
    assert off(model(IDX).logits, expected) < 1e-5
    assert off(expected, opened(folder).model(IDX)[0]) > 1e-2
    again, fresh = peft_format.load_adapter(tmp_path / "adapter", family_with), opened(folder)
    again.attach_to(fresh.model, base_sha256=fresh.sha256)
    assert torch.equal(fresh.model.eval()(IDX)[0], expected)
    if not CONFIGS[name].train_embeddings:
        with merged(base.model):
            assert off(base.model(IDX)[0], expected) < 1e-5


GPT2_TARGETS = ("c_attn", "c_proj", "c_attn,c_proj,c_fc", "attn.c_proj", r"re:.*\.1\.mlp\.c_fc")
LLAMA_TARGETS = ("q_proj,v_proj", "all-linear", "gate_proj", r"re:.*layers\.0\.self_attn\.(q|o)_proj")


@pytest.mark.parametrize(
    ("case", "targets"),
    [("gpt2", targets) for targets in GPT2_TARGETS]
    + [(case, targets) for case in ("llama", "qwen2 tied") for targets in LLAMA_TARGETS]
    + [("llama", "q_proj,lm_head")],
)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "bias": "all"}, {"use_dora": True}], ids=str)
@torch.no_grad()
def test_what_peft_trained_is_read(case: str, targets: str, options: dict, tmp_path: Path) -> None:
    folder = folder_of(case, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    names = targets.removeprefix("re:") if targets.startswith("re:") else targets.split(",")
    names = "all-linear" if targets == "all-linear" else names
    pattern = {"rank_pattern": {"c_attn": 2, "q_proj": 2}} if not targets.startswith("re:") else {}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, task_type="CAUSAL_LM", **options, **pattern)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.2 * torch.randn(parameter.shape)
    model.eval().save_pretrained(tmp_path / "adapter")
    base = opened(folder)
    adapter = peft_format.load_adapter(tmp_path / "adapter", family_with)
    adapter.attach_to(base.model)
    assert off(base.model.eval()(IDX)[0], model(IDX).logits) < 1e-5
    other = opened(folder).model
    other.lm_head.weight[0] += 1
    if "lm_head" in targets:  # whose weight PEFT's file repeats
        with pytest.raises(UserError, match="the weight of lm_head in its file is not the base's"):
            adapter.attach_to(other)
    import_folder(tmp_path / "adapter", opened(folder), tmp_path / "runs" / "imported")
    told = json.loads((tmp_path / "runs" / "imported" / "adapter" / "adapter_config.json").read_bytes())
    assert told["fan_in_fan_out"] == (case == "gpt2")


def test_a_tied_head_may_have_no_adapter(tmp_path: Path) -> None:
    base = opened(folder_of("qwen2 tied", tmp_path))
    with pytest.raises(UsageError, match="'lm_head' cannot have an adapter in this model: its weight is the token emb"):
        attach(base.model, LoRAConfig(targets="lm_head"))
    attach(opened(folder_of("llama", tmp_path / "untied")).model, LoRAConfig(targets="lm_head"))
