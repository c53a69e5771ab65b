"""An adapter off its model and on again, through bytes and folders; what does not fit is refused as a whole."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lora import adapted, logits, randomise, same, state, tiny, trained

from lora.adapter import Adapter
from lora.attach import activate, active_adapters, adapter_names, attach, base_tensors, detach, target_names
from lora.card import CARD
from lora.files import CONFIG, TENSORS, from_files, load_adapter, save_adapter, to_files
from lora.variants import VARIANTS, LoRAConfig
from runtime.checkpoint import fingerprint
from runtime.errors import UsageError, UserError
from runtime.storage import DamagedError

CONFIGS = [
    LoRAConfig(4, 6.0, 0.25, targets, variant, bias, embeddings)
    for variant, targets, bias, embeddings in (
        ("lora", "minimal", "none", False), ("lora", "all", "all", True), ("lora", "standard", "lora_only", False),
        ("rslora", "all", "none", True), ("rslora", "q_proj, blocks.1.mlp.up_proj,", "all", False),
    )
]  # fmt: skip
CONFIG_OF_TEST = replace(CONFIGS[1], dropout=0.0)


def of(model: torch.nn.Module, name: str = "default") -> Adapter:
    return Adapter.of(model, name, base="base-x", base_sha256=fingerprint(base_tensors(model)), dataset="folio")


def example() -> tuple[torch.nn.Module, Adapter]:
    model = adapted(CONFIG_OF_TEST, bias=True)
    return model, of(model)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.variant}-{c.targets[:8]}-{c.bias}")
def test_an_adapter_comes_back_bit_for_bit(config: LoRAConfig, tmp_path: Path) -> None:
    bias = config.bias != "none"
    model = adapted(config, bias=bias)
    save_adapter(tmp_path / "adapter", of(model))
    loaded, fresh = load_adapter(tmp_path / "adapter"), tiny(bias=bias)
    random = torch.get_rng_state()
    loaded.put_on(fresh)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(logits(fresh.eval()), logits(model.eval()))
    assert same(state(fresh), state(model))
    assert set(trained(fresh)) == set(trained(model))
    assert loaded.facts == of(model).facts
    assert {"base", "base_sha256", "dataset"} == loaded.facts.keys()
    with safetensors.safe_open(tmp_path / "adapter" / TENSORS, "pt") as file:
        assert file.metadata() == loaded.facts | {"format": "pt"}
    for name in ("rank", "alpha", "dropout", "variant", "bias", "train_embeddings"):
        assert getattr(loaded.config, name) == getattr(config, name)
    with pytest.raises(UserError, match="could not save"):
        save_adapter(tmp_path / "adapter", loaded)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.variant}-{c.targets[:8]}-{c.bias}")
def test_the_file_holds_what_was_trained_and_nothing_else(config: LoRAConfig) -> None:
    model = adapted(config, bias=config.bias != "none")
    stored = safetensors.torch.load(to_files(of(model))[TENSORS])
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in trained(model).values())
    assert len(stored) == len(trained(model))
    names = json.loads(to_files(of(model))[CONFIG])["target_modules"]
    assert names == list(target_names(config.targets))
    assert all(names)
    assert all(key.startswith("base_model.model.") and "default" not in key for key in stored)


def test_an_adapter_is_a_copy_and_one_of_several_can_be_taken() -> None:
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
    adapter.put_on(fresh, "one")
    adapter.put_on(fresh, "two")
    assert (adapter_names(fresh), active_adapters(fresh)) == (["one", "two"], {"two": 1.0})
    assert torch.equal(logits(fresh), logits(model))
    detach(fresh, "one")
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(UsageError, match="must be new"):
        adapter.put_on(fresh, "two")


def refused(adapter: Adapter, model: torch.nn.Module) -> str:
    """The one message, after which the model is as it was."""
    before, training = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError) as error:
        adapter.put_on(model)
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


def test_all_that_does_not_fit_is_told_together() -> None:
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


def test_a_long_list_of_problems_is_cut_and_always_the_same() -> None:
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
    ("changes", "told"),
    [
        ({"n_embd": 64}, "not (4, 64)"),
        ({"n_layer": 3}, "blocks.2.attention.q_proj.A is missing"),
        ({"n_layer": 1}, "blocks.1.attention.q_proj.A is unexpected"),
        ({"vocab_size": 51}, "lm_head.B is (50, 4), not (51, 4)"),
        ({"block_size": 8}, "position_embedding.weight is (16, 32), not (8, 32)"),
        ({"bias": False}, "no biases"),
    ],
)
def test_a_model_of_another_shape_is_refused(changes: dict, told: str) -> None:
    _, adapter = example()
    unverified = Adapter(adapter.config, adapter.tensors, {})
    assert told in refused(unverified, tiny(**{"bias": True} | changes))


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_one_flipped_bit_in_a_folder_is_noticed(name: str, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", example()[1])
    path = tmp_path / "adapter" / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=f"{name} is damaged"):
        load_adapter(tmp_path / "adapter")
    path.unlink()
    with pytest.raises(DamagedError, match=name):
        load_adapter(tmp_path / "adapter")


def test_a_folder_without_a_manifest_is_read_as_it_is(tmp_path: Path) -> None:
    model, adapter = example()
    for name, data in to_files(adapter).items():
        (tmp_path / name).write_bytes(data)
    fresh = tiny(bias=True)
    load_adapter(tmp_path).put_on(fresh)
    assert torch.equal(logits(fresh), logits(model))
    (tmp_path / TENSORS).unlink()
    for folder, missing in ((tmp_path, TENSORS), (tmp_path / "nothing", CONFIG)):
        with pytest.raises(UserError, match=f"{missing} is missing, so this is no adapter folder"):
            load_adapter(folder)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_a_torn_tensor_file_is_damaged(cut: int) -> None:
    files = to_files(example()[1])
    with pytest.raises(DamagedError, match=rf"^here/{TENSORS} is not a whole safetensors file"):
        from_files(files | {TENSORS: files[TENSORS][:cut]}, "here")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe\xff", b"[" * 100_000])
def test_a_torn_config_is_damaged(data: bytes) -> None:
    with pytest.raises(DamagedError, match=rf"^here/{CONFIG} is damaged"):
        from_files(to_files(example()[1]) | {CONFIG: data}, "here")


FOREIGN = {
    "peft_type": "LOHA", "rank_pattern": {"q_proj": 0}, "alpha_pattern": {"q_proj": "2"}, "exclude_modules": "lm_head",
    "layers_to_transform": [0], "layer_replication": [[0, 1]], "fan_in_fan_out": True, "lora_bias": True,
    "target_parameters": ["x"], "trainable_token_indices": [1], "use_bdlora": {"nblocks": 2}, "use_qalora": True,
    "alora_invocation_tokens": [1, 2], "arrow_config": {"a": 1}, "kasa_config": {"a": 1}, "monteclora_config": {"a": 1},
    "init_lora_weights": "pissa", "target_modules": "all-linear", "modules_to_save": ["lm_head"],
    "bias": "some", "r": None, "lora_alpha": "16", "lora_dropout": [],
}  # fmt: skip
FOREIGN_VALUES = [*FOREIGN.items(), ("layers_to_transform", 0), ("init_lora_weights", "pissa_niter_4")]
FOREIGN_VALUES += [("init_lora_weights", kind) for kind in ("olora", "corda", "loftq", "lora_ga")]
FOREIGN_VALUES += [("r", 2.5), ("r", 0), ("r", True), ("lora_alpha", float("nan")), ("lora_dropout", 1.0)]
FOREIGN_VALUES += [("target_modules", None), ("target_modules", [1]), ("target_modules", []), ("modules_to_save", 3)]
FOREIGN_VALUES += [("target_modules", "(q_proj"), ("rank_pattern", {"(q": 2}), ("alpha_pattern", {"q": -1.0})]
FOREIGN_VALUES += [("rank_pattern", {"q": 1.5}), ("rank_pattern", [1])]


@pytest.mark.parametrize(("name", "value"), FOREIGN_VALUES, ids=str)
def test_what_cannot_be_represented_is_refused_by_name(name: str, value: object) -> None:
    files = to_files(example()[1])
    about = json.loads(files[CONFIG]) | {name: value}
    with pytest.raises(UserError) as error:
        from_files(files | {CONFIG: json.dumps(about).encode()}, "here")
    known_as = {"r": "lora_rank|r is", "bias": "lora_bias"}.get(name, name)
    assert re.match(rf"^here/{CONFIG}: .*({known_as})", str(error.value))


JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from([-1, 0, 3, 10**400, "lora", "all"]) | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
FILES = to_files(Adapter(LoRAConfig(), {"lm_head": {"A": torch.zeros(8, 4), "B": torch.zeros(4, 8)}}))


@settings(deadline=None)
@given(name=st.sampled_from([*json.loads(FILES[CONFIG]), *FOREIGN]), value=JSON)
def test_no_value_in_a_config_ends_in_anything_but_one_line(name: str, value: object) -> None:
    about = json.loads(FILES[CONFIG]) | {name: value}
    try:
        from_files(FILES | {CONFIG: json.dumps(about).encode()}, "here")
    except UserError as error:
        assert str(error).startswith(f"here/{CONFIG}: ")
        assert "\n" not in str(error)


def test_all_that_cannot_be_represented_is_told_together() -> None:
    files = to_files(example()[1])
    strange = {"layers_to_transform": [0], "use_qalora": True, "r": "8", "modules_to_save": ["lm_head"], "lora_bias": 1}
    with pytest.raises(UserError) as error:
        from_files(files | {CONFIG: json.dumps(json.loads(files[CONFIG]) | strange).encode()}, "here")
    assert all(name in str(error.value) for name in strange)


def test_the_card_tells_what_is_known_and_nothing_else() -> None:
    import yaml

    text = to_files(of(example()[0]), {"command": "python training.py --x 'a|b'"})[CARD].decode()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft", "base_model": "base-x", "tags": ["lora", "base_model:adapter:base-x"],
    }  # fmt: skip
    for row in ("| base sha256 | ", "| dataset | folio |", "| rank | 4 |", "| alpha | 6 |", "| targets | all |"):
        assert row in body
    assert "| command | python training.py --x 'a\\|b' |" in body and "steps" not in body
    bare = to_files(Adapter(CONFIG_OF_TEST, example()[1].tensors))[CARD].decode()
    assert "base_model" not in bare and "None" not in bare and "dataset" not in bare


@pytest.mark.parametrize("name", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_setting_that_is_missing_is_named(name: str) -> None:
    files = to_files(example()[1])
    about = json.loads(files[CONFIG])
    del about[name]
    with pytest.raises(UserError, match=rf"^here/{CONFIG}: {name} is "):
        from_files(files | {CONFIG: json.dumps(about).encode()}, "here")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scale_is_the_files(variant: str) -> None:
    config = LoRAConfig(rank=4, alpha=10.0, variant=variant, targets="lm_head", train_embeddings=False)
    adapter = from_files(to_files(of(adapted(config))), "here")
    model = tiny()
    adapter.put_on(model)
    assert model.lm_head.lora["default"].scale == {"rslora": 10 / 2, "vera": 1}.get(variant, 10 / 4)
