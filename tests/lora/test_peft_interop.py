"""PEFT reads our adapter folders and we read PEFT's, with the same logits either way."""

from __future__ import annotations

import itertools
import json
import re
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from tiny_lora import IDX, TARGETS, adapted, logits, randomise, tiny, variants

from lora.adapter import SHARED, Adapter
from lora.attach import base_tensors
from lora.config import LoRAConfig
from lora.peft_format import CONFIG, TENSORS, load_adapter, to_files
from lora.variants.registry import VARIANTS
from runtime.errors import UserError
from runtime.storage import folders

CASES = list(itertools.product(VARIANTS, ("none", "all", "lora_only"), (False, True)))
EMBEDDINGS = ["token_embedding", "position_embedding"]
NEAR = 2e-5  # AdaLoRA of PEFT divides by rank + 1e-5
Model = torch.nn.Module


@pytest.fixture(autouse=True)
def no_warnings_of_models_that_are_not_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_same(one: Model, other: Model, **base) -> None:
    """Both compute the same, and not what the base computes."""
    assert torch.allclose(logits(one), logits(other), atol=NEAR)
    assert not torch.allclose(logits(one), logits(tiny(**base)), atol=1e-2)


def read_by_peft(ours: Model, folder: Path, shared: bool = False, **base) -> Model:
    """A PEFT model with our adapter, loaded from a folder that we saved."""
    adapter = Adapter.from_model(ours)
    with_it = adapter.make_shared(base_tensors(ours)) if shared else None
    folders.commit_folder(folder, to_files(adapter, shared=with_it))
    return peft.PeftModel.from_pretrained(tiny(**base), folder)


def read_by_us(theirs: Model, folder: Path, **base) -> Model:
    """Our model with PEFT's adapter, loaded from a folder that PEFT saved."""
    theirs.save_pretrained(folder)
    ours = tiny(**base)
    load_adapter(folder).attach_to(ours)
    return ours


@pytest.mark.parametrize(("variant", "bias", "embeddings"), CASES)
def test_peft_reads_our_folder(variant: str, bias: str, embeddings: bool, tmp_path: Path) -> None:
    base = {"bias": bias != "none"}
    config = LoRAConfig(
        rank=4, alpha=6.0, targets="standard" if bias == "lora_only" else "all",
        variant=variant, bias=bias, train_embeddings=embeddings, seed=5,
    )  # fmt: skip
    ours = adapted(config, **base)
    check_same(read_by_peft(ours, tmp_path / "adapter", **base), ours, **base)


CONFIGS = {"LORA": peft.LoraConfig, "VERA": peft.VeraConfig, "ADALORA": peft.AdaLoraConfig}
SCHEDULE = {"target_r": 2, "tinit": 1, "tfinal": 3, "total_step": 10}


def peft_config(variant: str, bias: str = "none", **options) -> peft.PeftConfig:
    """PEFT's config of one of our variants, at rank 4."""
    ours = VARIANTS[variant]
    names, values = ours.peft_fields, {"rank": 4, "alpha": 6, "seed": 5}
    given = {names[name]: value for name, value in values.items() if name in names} | ours.peft_flags
    more = SCHEDULE if variant == "adalora" else {}
    bias = bias.replace("lora", "vera") if variant == "vera" else bias
    targets = {"target_modules": ["q_proj", "up_proj", "lm_head"]}
    return CONFIGS[ours.peft_type](**given | more | targets | {"bias": bias} | options)


def train_with_peft(base: dict, variant: str = "lora", **options) -> peft.PeftModel:
    """A PEFT model all of whose adapter tensors have changed."""
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny(**base), peft_config(variant, **options))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDX, TARGETS)[1].backward()
    optimizer.step()
    randomise(model)
    return model


@pytest.mark.parametrize(("variant", "bias", "embeddings"), CASES)
def test_we_read_adapters_that_peft_saved(variant: str, bias: str, embeddings: bool, tmp_path: Path) -> None:
    base = {"bias": bias != "none"}
    theirs = train_with_peft(base, variant, bias=bias, modules_to_save=EMBEDDINGS if embeddings else None)
    check_same(read_by_us(theirs, tmp_path, **base), theirs, **base)


@pytest.mark.parametrize("stored", [False, True])
def test_veras_projections_round_trip_stored_or_not(stored: bool, tmp_path: Path) -> None:
    theirs = train_with_peft({}, "vera", save_projection=stored)
    ours = read_by_us(theirs, tmp_path / "theirs")
    check_same(ours, theirs)
    check_same(read_by_peft(ours, tmp_path / "ours", shared=stored), ours)
    for folder in ("theirs", "ours"):
        keys = safetensors.torch.load_file(tmp_path / folder / TENSORS).keys()
        assert ({"base_model.vera_A", "base_model.vera_B"} <= keys) == stored
        assert any("vera_A" in key for key in keys) == stored
        assert json.loads((tmp_path / folder / CONFIG).read_bytes())["save_projection"] == stored
    metadata = [load_adapter(tmp_path / folder).metadata.get(SHARED) for folder in ("theirs", "ours")]
    assert metadata == [
        Adapter.from_model(ours).metadata[SHARED] if stored else None,
        Adapter.from_model(ours).metadata[SHARED],
    ]


def pruned_by_peft(steps: int = 9) -> peft.PeftModel:
    """An AdaLoRA model that PEFT has pruned until one module had no rank left."""
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny(), peft_config("adalora"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(steps):
        model(IDX, TARGETS)[1].backward()
        model.get_submodule("base_model.model.blocks.1.mlp.up_proj").lora_E["default"].grad.mul_(1e-9)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def test_we_read_adapters_that_peft_pruned(tmp_path: Path) -> None:
    theirs = pruned_by_peft()
    ours = read_by_us(theirs, tmp_path)
    check_same(ours, theirs)
    ranks = {path: module.rank for path, module in variants(ours).items()}
    assert ranks["blocks.1.mlp.up_proj"] == 0
    assert len(set(ranks.values())) > 2 and sum(ranks.values()) == 2 * len(ranks)
    check_same(read_by_peft(ours, tmp_path / "again"), theirs)


def prune(model: Model, ranks: dict[str, int]) -> None:
    """Prune the modules at these paths to their last ranks, as many as given."""
    with torch.no_grad():
        for path, module in variants(model).items():
            if path in ranks:
                module.kept.copy_(torch.arange(module.rank) >= module.rank - ranks[path])
                module.E.mul_(module.kept[:, None])


@pytest.mark.parametrize("pattern", [{}, {"q_proj": 3, "lm_head": 3}], ids=["one-rank", "patterns"])
def test_peft_reads_adapters_that_we_pruned(pattern: dict, tmp_path: Path) -> None:
    ours = adapted(LoRAConfig(rank=4, alpha=6.0, variant="adalora", rank_pattern=pattern))
    left = {"lm_head": 2, "blocks.0.attention.q_proj": 0, "blocks.1.mlp.up_proj": 1, "blocks.1.mlp.down_proj": 4}
    prune(ours, left)
    adapter = Adapter.from_model(ours)
    assert {path: len(adapter.tensors[path]["E"]) for path in left} == left
    assert {path: adapter.config.rank_at(path) for path in left} == left
    check_same(read_by_peft(ours, tmp_path / "ours"), ours)
    again = tiny()
    load_adapter(tmp_path / "ours").attach_to(again)
    check_same(again, ours)
    again(IDX, TARGETS)[1].backward()
    assert again.blocks[1].mlp.up_proj.lora["default"].E.grad.all()


PATTERNS = [
    {"rank_pattern": {"q_proj": 2, "blocks.1.mlp.up_proj": 6}, "alpha_pattern": {r".*\.1\..*": 9, "lm_head": 1}},
    {"rank_pattern": {"^lm_head": 3, "head": 5}, "alpha_pattern": {"up_proj": 0.5}, "use_rslora": True},
    {"target_modules": r"blocks\.\d\.(attention\.[qk]|mlp\.up)_proj"},
    {"target_modules": ".*o_proj", "bias": "lora_only", "rank_pattern": {"blocks.0.attention.o_proj": 1}},
]


@pytest.mark.parametrize("options", PATTERNS, ids=["patterns", "rslora", "regex", "regex-bias"])
def test_patterns_of_ranks_alphas_and_targets_round_trip(options: dict, tmp_path: Path) -> None:
    base = {"bias": "bias" in options}
    theirs = train_with_peft(base, **options)
    ours = read_by_us(theirs, tmp_path / "theirs", **base)
    check_same(ours, theirs, **base)
    check_same(read_by_peft(ours, tmp_path / "ours", **base), ours, **base)


def test_keys_with_the_adapters_name_are_read(tmp_path: Path) -> None:
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
    load_adapter(tmp_path).attach_to(ours)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    safetensors.torch.save_file(renamed("one") | {k: t.clone() for k, t in renamed("two").items()}, path)
    with pytest.raises(UserError, match="holds several adapters"):
        load_adapter(tmp_path)


UNSUPPORTED = [{"layers_to_transform": [0]}, {"use_dora": True, "use_rslora": True}, {"init_lora_weights": "olora"}]


@pytest.mark.parametrize("options", UNSUPPORTED, ids=str)
def test_unsupported_peft_adapters_are_refused_by_name(options: dict, tmp_path: Path) -> None:
    train_with_peft({}, **options).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=next(iter(options))):
        load_adapter(tmp_path)


def test_peft_trains_on_our_layers_as_on_torchs() -> None:
    """The model must call every linear that PEFT has wrapped."""
    model = train_with_peft({})
    model.zero_grad()
    model(IDX, TARGETS)[1].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * (2 * 2 + 1)
    assert all(gradient.any() for gradient in gradients.values())
