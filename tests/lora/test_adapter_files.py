"""Adapters round-trip through files and folders; one that does not fit is refused before the model changes."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny_lora import adapted, logits, randomise, same, state, tiny, trained

from lora.adapter import Adapter
from lora.attach import activate, active_adapters, adapter_names, attach, base_tensors, detach, target_names
from lora.card import CARD
from lora.config import LoRAConfig
from lora.peft_format import CONFIG, TENSORS, from_files, load_adapter, save_adapter, to_files
from lora.variants.registry import VARIANTS
from runtime.errors import UsageError, UserError
from runtime.storage.folders import CorruptedError
from runtime.storage.tensors import fingerprint

CONFIGS = [
    LoRAConfig(4, 6.0, 0.25, targets, variant, bias, embeddings)
    for variant, targets, bias, embeddings in (
        ("lora", "minimal", "none", False), ("lora", "all", "all", True), ("lora", "standard", "lora_only", False),
        ("rslora", "all", "none", True), ("rslora", "q_proj, blocks.1.mlp.up_proj,", "all", False),
    )
]  # fmt: skip
CONFIG_OF_TEST = replace(CONFIGS[1], dropout=0.0)


def of(model: torch.nn.Module, name: str = "default") -> Adapter:
    return Adapter.from_model(model, name, base="base-x", base_sha256=fingerprint(base_tensors(model)), dataset="folio")


def example() -> tuple[torch.nn.Module, Adapter]:
    model = adapted(CONFIG_OF_TEST, bias=True)
    return model, of(model)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.variant}-{c.targets[:8]}-{c.bias}")
def test_an_adapter_round_trips_bit_for_bit(config: LoRAConfig, tmp_path: Path) -> None:
    bias = config.bias != "none"
    model = adapted(config, bias=bias)
    save_adapter(tmp_path / "adapter", of(model))
    loaded, fresh = load_adapter(tmp_path / "adapter"), tiny(bias=bias)
    random = torch.get_rng_state()
    loaded.attach_to(fresh)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))
    assert same(state(fresh), state(model))
    assert set(trained(fresh)) == set(trained(model))
    assert loaded.metadata == of(model).metadata
    assert {"base", "base_sha256", "dataset"} == loaded.metadata.keys()
    with safetensors.safe_open(tmp_path / "adapter" / TENSORS, "pt") as file:
        assert file.metadata() == loaded.metadata | {"format": "pt"}
    for name in ("rank", "alpha", "dropout", "variant", "bias", "train_embeddings"):
        assert getattr(loaded.config, name) == getattr(config, name)
    with pytest.raises(UserError, match="could not save"):
        save_adapter(tmp_path / "adapter", loaded)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.variant}-{c.targets[:8]}-{c.bias}")
def test_the_file_holds_only_the_trained_tensors(config: LoRAConfig) -> None:
    model = adapted(config, bias=config.bias != "none")
    stored = safetensors.torch.load(bytes(to_files(of(model))[TENSORS]))
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in trained(model).values())
    assert len(stored) == len(trained(model))
    names = json.loads(to_files(of(model))[CONFIG])["target_modules"]
    assert names == list(target_names(config.targets, model.lora_presets))
    assert all(names)
    assert all(key.startswith("base_model.model.") and "default" not in key for key in stored)


def test_from_model_copies_one_of_several_adapters() -> None:
    model = adapted(LoRAConfig(targets="minimal"), name="one")
    attach(model, LoRAConfig(rank=2, targets="k_proj", train_embeddings=False), "two")
    activate(model)
    one, two = of(model, "one"), of(model, "two")
    assert (one.config.rank, two.config.rank) == (8, 2)
    assert {path.rpartition(".")[2] for path in two.tensors} == {"k_proj"}
    expected = two.tensors["blocks.0.attention.k_proj"]["A"].clone()
    activate(model, "two")
    randomise(model)
    assert torch.equal(two.tensors["blocks.0.attention.k_proj"]["A"], expected)
    with pytest.raises(UsageError, match="no adapter 'three' is attached; attached: one, two"):
        of(model, "three")


def test_several_adapters_share_a_model() -> None:
    model, adapter = example()
    fresh = tiny(bias=True)
    adapter.attach_to(fresh, "one")
    adapter.attach_to(fresh, "two")
    assert (adapter_names(fresh), active_adapters(fresh)) == (["one", "two"], {"two": 1.0})
    assert torch.equal(logits(fresh), logits(model))
    detach(fresh, "one")
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(UsageError, match="must be new"):
        adapter.attach_to(fresh, "two")


def refused(adapter: Adapter, model: torch.nn.Module) -> str:
    """The message of the refusal, after which the model is unchanged."""
    before, training = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError) as error:
        adapter.attach_to(model)
    assert same(state(model), before)
    assert [p.requires_grad for p in model.parameters()] == training
    assert (adapter_names(model), active_adapters(model)) == ([], {})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_base_that_differs_in_the_last_bit_is_refused() -> None:
    model, adapter = example()
    other = tiny(bias=True)
    with torch.no_grad():
        weight = other.blocks[1].mlp.down_proj.weight
        weight[3, 4] = torch.nextafter(weight[3, 4], torch.tensor(torch.inf))
    message = refused(adapter, other)
    ours, theirs = fingerprint(base_tensors(model))[:12], fingerprint(base_tensors(other))[:12]
    assert message.endswith(f"it was trained on base-x with weights {ours}, not {theirs}")


def test_all_mismatches_are_reported_together() -> None:
    _, adapter = example()
    tensors = copy.deepcopy(adapter.tensors)
    del tensors["blocks.0.attention.q_proj"]["A"]
    tensors["blocks.0.attention.q_proj"]["C"] = torch.zeros(2)
    tensors["blocks.7.mlp"] = {"A": torch.zeros(4, 32)}
    tensors["lm_head"]["B"] = torch.zeros(50, 3)
    tensors["token_embedding"]["weight"][7, 3] = torch.nan
    tensors["norm"]["bias"][0] = -torch.inf
    message = refused(Adapter(adapter.config, tensors, {"base_sha256": "f" * 64}), tiny(bias=True))
    assert "trained on another base with weights ffffffffffff, not" in message
    for problem in (
        "blocks.0.attention.q_proj.A is missing",
        "blocks.0.attention.q_proj.C is unexpected",
        "blocks.7.mlp.A is unexpected",
        "lm_head.B is (50, 3), not (50, 4)",
        "token_embedding.weight has values that are not finite",
        "norm.bias has values that are not finite",
    ):
        assert problem in message
    assert message.count("; ") == 6


def test_a_long_list_of_problems_is_truncated_and_deterministic() -> None:
    _, adapter = example()
    empty = Adapter(adapter.config, {}, {})
    message = refused(empty, tiny(bias=True))
    total = sum(len(group) for group in adapter.tensors.values())
    assert message.count(" is missing") == 8
    assert message.endswith(f"; and {total - 8} more")
    assert re.findall(r"(\S+) is missing", message) == sorted(
        f"{path}.{key}" for path, group in adapter.tensors.items() for key in group
    )[:8]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 64}, "not (4, 64)"),
        ({"n_layer": 3}, "blocks.2.attention.q_proj.A is missing"),
        ({"n_layer": 1}, "blocks.1.attention.q_proj.A is unexpected"),
        ({"vocab_size": 51}, "lm_head.B is (50, 4), not (51, 4)"),
        ({"block_size": 8}, "position_embedding.weight is (16, 32), not (8, 32)"),
        ({"bias": False}, "no biases"),
    ],
)
def test_a_model_of_another_shape_is_refused(changes: dict, message: str) -> None:
    _, adapter = example()
    unverified = Adapter(adapter.config, adapter.tensors, {})
    assert message in refused(unverified, tiny(**{"bias": True} | changes))


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_one_flipped_bit_in_a_folder_is_noticed(name: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", example()[1])
    path = tmp_path / "adapter" / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptedError, match=f"{name} is corrupted"):
        load_adapter(tmp_path / "adapter")
    path.unlink()
    with pytest.raises(CorruptedError, match=name):
        load_adapter(tmp_path / "adapter")


def test_a_folder_without_a_manifest_is_read_as_it_is(tmp_path: Path) -> None:
    model, adapter = example()
    for name, data in to_files(adapter).items():
        (tmp_path / name).write_bytes(bytes(data))
    fresh = tiny(bias=True)
    load_adapter(tmp_path).attach_to(fresh)
    assert torch.equal(logits(fresh), logits(model))
    (tmp_path / TENSORS).unlink()
    for folder, missing in ((tmp_path, TENSORS), (tmp_path / "nothing", CONFIG)):
        with pytest.raises(UserError, match=f"{missing} is missing, so this is not an adapter folder"):
            load_adapter(folder)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_a_truncated_tensor_file_is_refused(cut: int) -> None:
    files = to_files(example()[1])
    with pytest.raises(CorruptedError, match=rf"^here/{TENSORS} is not a whole safetensors file"):
        from_files(files | {TENSORS: bytes(files[TENSORS])[:cut]}, "here")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe\xff", b"[" * 100_000])
def test_a_corrupted_config_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptedError, match=rf"^here/{CONFIG} is corrupted"):
        from_files(to_files(example()[1]) | {CONFIG: data}, "here")


def test_the_card_states_only_what_is_known() -> None:
    import yaml

    text = to_files(of(example()[0]), {"command": "python training.py --x 'a|b'"})[CARD].decode()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft", "tags": ["lora"],
    }  # fmt: skip
    for row in ("| base sha256 | ", "| dataset | folio |", "| rank | 4 |", "| alpha | 6 |", "| targets | all |"):
        assert row in body
    assert "| command | python training.py --x 'a\\|b' |" in body and "steps" not in body
    bare = to_files(Adapter(CONFIG_OF_TEST, example()[1].tensors))[CARD].decode()
    assert "base_model" not in bare and "None" not in bare and "dataset" not in bare


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scale_comes_from_the_file(variant: str) -> None:
    config = LoRAConfig(rank=4, alpha=10.0, variant=variant, targets="lm_head", train_embeddings=False)
    adapter = from_files(to_files(of(adapted(config))), "here")
    model = tiny()
    adapter.attach_to(model)
    assert model.lm_head.lora["default"].scale == {"rslora": 10 / 2, "vera": 1}.get(variant, 10 / 4)
