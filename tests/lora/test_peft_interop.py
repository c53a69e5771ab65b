"""The real PEFT reads our adapter folders and we read its: the same logits either way."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from tiny_lora import IDX, TARGETS, adapted, logits, randomise, tiny

from lora.adapter import Adapter
from lora.files import TENSORS, load_adapter, save_adapter
from lora.variants import VARIANTS, LoRAConfig
from runtime.errors import UserError

CASES = list(itertools.product(("lora", "rslora", "dora"), ("none", "all", "lora_only"), (False, True)))
EMBEDDINGS = ["token_embedding", "position_embedding"]


@pytest.fixture(autouse=True)
def no_warnings_of_models_that_are_not_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(("variant", "bias", "embeddings"), CASES)
def test_peft_reads_our_folder(variant: str, bias: str, embeddings: bool, tmp_path: Path) -> None:
    base = {"bias": bias != "none"}
    config = LoRAConfig(
        rank=4, alpha=6.0, targets="standard" if bias == "lora_only" else "all",
        variant=variant, bias=bias, train_embeddings=embeddings,
    )  # fmt: skip
    ours = adapted(config, **base)
    save_adapter(tmp_path / "adapter", Adapter.of(ours))
    theirs = peft.PeftModel.from_pretrained(tiny(**base), tmp_path / "adapter")
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-5)
    assert not torch.allclose(logits(theirs), logits(tiny(**base)), atol=1e-2)


def train_with_peft(base: dict, **options) -> peft.PeftModel:
    """A PEFT model whose trained tensors all moved, by a step and a push."""
    torch.manual_seed(3)
    options = {"target_modules": ["q_proj", "up_proj", "lm_head"]} | options
    config = peft.LoraConfig(r=4, lora_alpha=6, **options)
    model = peft.get_peft_model(tiny(**base), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDX, TARGETS)[1].backward()
    optimizer.step()
    randomise(model)
    return model


@pytest.mark.parametrize(("variant", "bias", "embeddings"), CASES)
def test_we_read_what_peft_saved(variant: str, bias: str, embeddings: bool, tmp_path: Path) -> None:
    base = {"bias": bias != "none"}
    flags = VARIANTS[variant].peft_flags
    theirs = train_with_peft(base, **flags, bias=bias, modules_to_save=EMBEDDINGS if embeddings else None)
    theirs.save_pretrained(tmp_path)
    ours = tiny(**base)
    load_adapter(tmp_path).put_on(ours)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert not torch.allclose(logits(ours), logits(tiny(**base)), atol=1e-2)


PATTERNS = [
    {"rank_pattern": {"q_proj": 2, "blocks.1.mlp.up_proj": 6}, "alpha_pattern": {r".*\.1\..*": 9, "lm_head": 1}},
    {"rank_pattern": {"^lm_head": 3, "head": 5}, "alpha_pattern": {"up_proj": 0.5}, "use_rslora": True},
    {"target_modules": r"blocks\.\d\.(attention\.[qk]|mlp\.up)_proj"},
    {"target_modules": ".*o_proj", "bias": "lora_only", "rank_pattern": {"blocks.0.attention.o_proj": 1}},
]


@pytest.mark.parametrize("options", PATTERNS, ids=["patterns", "rslora", "regex", "regex-bias"])
def test_patterns_of_ranks_alphas_and_targets_go_both_ways(options: dict, tmp_path: Path) -> None:
    base = {"bias": "bias" in options}
    theirs = train_with_peft(base, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny(**base)
    load_adapter(tmp_path / "theirs").put_on(ours)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    save_adapter(tmp_path / "ours", Adapter.of(ours))
    again = peft.PeftModel.from_pretrained(tiny(**base), tmp_path / "ours")
    assert torch.allclose(logits(again), logits(ours), atol=1e-5)
    assert not torch.allclose(logits(ours), logits(tiny(**base)), atol=1e-2)


def test_keys_that_carry_the_adapters_name_are_understood(tmp_path: Path) -> None:
    theirs = train_with_peft({}, modules_to_save=EMBEDDINGS)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / TENSORS
    plain = safetensors.torch.load_file(path)

    def renamed(adapter: str) -> dict[str, torch.Tensor]:
        named = {re.sub(r"\.lora_([AB])\.weight", rf".lora_\1.{adapter}.weight", key): t for key, t in plain.items()}
        return {
            re.sub(r"embedding\.weight", f"embedding.modules_to_save.{adapter}.weight", k): t for k, t in named.items()
        }

    safetensors.torch.save_file(renamed("default"), path)
    ours = tiny()
    load_adapter(tmp_path).put_on(ours)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    safetensors.torch.save_file(renamed("one") | {k: t.clone() for k, t in renamed("two").items()}, path)
    with pytest.raises(UserError, match="holds several adapters"):
        load_adapter(tmp_path)


FOREIGN = [{"layers_to_transform": [0]}, {"use_dora": True, "use_rslora": True}, {"init_lora_weights": "olora"}]


@pytest.mark.parametrize("options", FOREIGN, ids=str)
def test_what_we_cannot_compute_is_refused_by_name(options: dict, tmp_path: Path) -> None:
    train_with_peft({}, **options).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=next(iter(options))):
        load_adapter(tmp_path)


def test_a_peft_model_trains_over_our_layers_as_over_torchs() -> None:
    """No path of the model may go round a linear that someone else has wrapped."""
    model = train_with_peft({})
    model.zero_grad()
    model(IDX, TARGETS)[1].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * (2 * 2 + 1)
    assert all(gradient.any() for gradient in gradients.values())
