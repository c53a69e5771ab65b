"""A base as files: bit for bit there and back, and refused as a whole where it does not fit."""

from __future__ import annotations

import json
import re

import pytest
import torch

from lora.attach import attach
from lora.config import LoRAConfig
from models.config import ModelConfig
from models.files import CONFIG, config_from, from_files, load_weights, to_files
from models.stored import WEIGHTS
from models.transformer import Transformer
from runtime.errors import UserError
from runtime.storage.folders import CorruptedError
from runtime.storage.tensors import pack, unpack
from tests.tiny import tiny

IDX = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("changes", [{}, {"bias": True, "n_head": 8}, {"block_size": 7, "n_layer": 1}], ids=str)
def test_a_base_comes_back_bit_for_bit(changes: dict) -> None:
    model = tiny(**changes)
    loaded = from_files(to_files(model), "here", dropout=0.25)
    assert loaded.config == model.config
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in loaded.state_dict().items())
    assert torch.equal(loaded.eval()(IDX)[0], model(IDX)[0])
    assert loaded.blocks[0].dropout == loaded.dropout == loaded.blocks[0].attention.dropout == 0.25
    assert all(p.requires_grad for p in loaded.parameters())


def test_an_attached_adapter_is_not_in_the_files() -> None:
    model = tiny()
    before = to_files(model)
    attach(model, LoRAConfig())
    assert to_files(model) == before


def test_all_that_does_not_fit_is_told_together_and_nothing_is_changed() -> None:
    model = tiny()
    files, before = to_files(model), {key: t.clone() for key, t in model.state_dict().items()}
    tensors = unpack(files[WEIGHTS], WEIGHTS)
    del tensors["lm_head.weight"], tensors["blocks.1.norm_2.weight"]
    tensors |= {"extra": torch.zeros(1), "position_embedding.weight": torch.zeros(17, 32)}
    tensors["token_embedding.weight"] = torch.ones(50, 32)
    problems = [
        "blocks.1.norm_2.weight is missing",
        "extra is unexpected",
        "lm_head.weight is missing",
        "position_embedding.weight is (17, 32), not (16, 32)",
    ]
    expected = re.escape(f"here/{WEIGHTS} does not fit its {CONFIG}: {'; '.join(problems)}")
    with pytest.raises(UserError, match=f"^{expected}$"):
        load_weights(model, files | {WEIGHTS: pack(tensors)}, "here")
    assert all(torch.equal(t, model.state_dict()[key]) for key, t in before.items())
    with pytest.raises(UserError, match=f"^{expected}$"):
        from_files(files | {WEIGHTS: pack(tensors)}, "here")


def test_a_long_list_of_problems_says_that_it_is_cut() -> None:
    model = tiny()
    with pytest.raises(UserError) as error:
        load_weights(model, to_files(model) | {WEIGHTS: pack({"extra": torch.zeros(1)})}, "here")
    assert str(error.value).count(" is missing") == 8
    assert str(error.value).endswith(f"; and {len(model.state_dict()) + 1 - 8} more")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": None}, {"n_embd": "32"}, {"n_layer": 2.0}, {"bias": 0}, {"n_head": True}, {"norm": "batch"},
        {"n_head": 0}, {"n_head": 5}, {"vocab_size": -1}, {"block_size": 0}, {"n_layer": 0}, {"n_embd": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_shape_that_makes_no_sense_is_damage(change: dict) -> None:
    files = to_files(tiny())
    about = json.loads(files[CONFIG]) | change
    with pytest.raises(CorruptedError, match=f"^here/{CONFIG} is corrupted: "):
        from_files(files | {CONFIG: json.dumps(about).encode()}, "here")


def test_a_config_of_another_version() -> None:
    files = to_files(tiny())
    values = json.loads(files[CONFIG])
    old = {name: values[name] for name in ("vocab_size", "n_embd", "n_head", "n_layer", "bias")}
    old["block_size"] = values["max_positions"]
    assert from_files(files | {CONFIG: json.dumps(old).encode()}, "here").config == ModelConfig.from_dict(values)
    newer = json.dumps(values | {"experts": 8}).encode()
    with pytest.raises(UserError, match=f"^here/{CONFIG}: this version does not know 'experts'; a newer one wrote it$"):
        from_files(files | {CONFIG: newer}, "here")


OPTIONS = [
    {"norm": "rms"}, {"positions": "rotary"}, {"mlp": "gated_silu"}, {"n_kv_head": 1}, {"head_dim": 8}, {"n_inner": 8},
    {"norm_eps": 1e-6}, {"positions": "rotary", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"qkv_bias": True}, {"qk_norm": True}, {"tied_head": True}, {"mlp": "gelu_tanh"}, {"fused_qkv": True},
    {"bias": True, "head_bias": False},
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_a_model_with_any_option_is_saved_and_read(option: dict) -> None:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_dict({"vocab_size": 50, "n_embd": 32, "max_positions": 16} | option))
    again = from_files(to_files(model), "here")
    assert again.config == model.config == ModelConfig.from_dict(model.config.as_dict())
    idx = torch.arange(24).reshape(2, 12) * 7 % 50
    assert torch.equal(again(idx)[0], model(idx)[0])


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff", b'{"n_embd": 50}'])
def test_a_torn_config_is_corrupted(data: bytes) -> None:
    with pytest.raises(CorruptedError, match=f"^here/{CONFIG} is corrupted"):
        config_from(to_files(tiny()) | {CONFIG: data}, "here")


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_torn_weights_are_corrupted(cut: int) -> None:
    files = to_files(tiny())
    with pytest.raises(CorruptedError, match=f"^here/{WEIGHTS} is not a whole safetensors file"):
        from_files(files | {WEIGHTS: bytes(files[WEIGHTS])[:cut]}, "here")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_told(name: str) -> None:
    files = to_files(tiny())
    del files[name]
    with pytest.raises(UserError, match=f"^here holds no model: {CONFIG} and {WEIGHTS} are needed"):
        from_files(files, "here")


def test_a_tied_model_is_not_saved_yet() -> None:
    model = tiny()
    model.lm_head.weight = model.token_embedding.weight
    with pytest.raises(UserError, match="^lm_head and token_embedding share one weight"):
        to_files(model)


def test_two_names_of_one_field_are_refused() -> None:
    files = to_files(tiny())
    both = json.dumps(json.loads(files[CONFIG]) | {"block_size": 8}).encode()
    with pytest.raises(CorruptedError, match="block_size and max_positions are both there"):
        from_files(files | {CONFIG: both}, "here")
