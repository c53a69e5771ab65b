"""Unsupported or invalid values in the config of an adapter folder give one line that names them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_lora import EVERYTHING, adapted

from lora.adapter import Adapter
from lora.attach import adapter_names
from lora.config import LoRAConfig
from lora.layers.linear import LoRALinear
from lora.peft_format import CONFIG, from_files, to_files
from lora.variants.registry import VARIANTS
from runtime.errors import UserError

FILES = to_files(Adapter.from_model(adapted(EVERYTHING, bias=True)))
UNSUPPORTED = {
    "peft_type": "LOHA", "rank_pattern": {"q_proj": 0}, "alpha_pattern": {"q_proj": "2"}, "exclude_modules": "lm_head",
    "layers_to_transform": [0], "layer_replication": [[0, 1]], "fan_in_fan_out": True, "lora_bias": True,
    "target_parameters": ["x"], "trainable_token_indices": [1], "use_bdlora": {"nblocks": 2}, "use_qalora": True,
    "alora_invocation_tokens": [1, 2], "arrow_config": {"a": 1}, "kasa_config": {"a": 1}, "monteclora_config": {"a": 1},
    "init_lora_weights": "pissa", "target_modules": "all-linear", "modules_to_save": ["lm_head"],
    "bias": "some", "r": None, "lora_alpha": "16", "lora_dropout": [],
}  # fmt: skip
UNSUPPORTED_VALUES = [*UNSUPPORTED.items(), ("layers_to_transform", 0), ("init_lora_weights", "pissa_niter_4")]
UNSUPPORTED_VALUES += [("init_lora_weights", kind) for kind in ("olora", "corda", "loftq", "lora_ga")]
UNSUPPORTED_VALUES += [("r", 2.5), ("r", 0), ("r", True), ("lora_alpha", float("nan")), ("lora_dropout", 1.0)]
UNSUPPORTED_VALUES += [("target_modules", value) for value in (None, [1], [])] + [("modules_to_save", 3)]
UNSUPPORTED_VALUES += [("target_modules", "(q_proj"), ("rank_pattern", {"(q": 2}), ("alpha_pattern", {"q": -1.0})]
UNSUPPORTED_VALUES += [("rank_pattern", {"q": 1.5}), ("rank_pattern", [1]), ("alpha_pattern", {"q": 10**400})]


@pytest.mark.parametrize(("name", "value"), UNSUPPORTED_VALUES, ids=str)
def test_unsupported_settings_are_refused_by_name(name: str, value: object) -> None:
    files = FILES
    peft_config = json.loads(files[CONFIG]) | {name: value}
    with pytest.raises(UserError) as error:
        from_files(files | {CONFIG: json.dumps(peft_config).encode()}, "here")
    known_as = {"r": "lora_rank|r is", "bias": "lora_bias"}.get(name, name)
    assert re.match(rf"^here/{CONFIG}: .*({known_as})", str(error.value))


def small_files(variant: str) -> dict[str, bytes]:
    """An adapter of rank 8 on one square linear."""
    config, sizes = LoRAConfig(variant=variant, targets="lm_head"), {"rank": 8, "in": 4, "out": 4}
    tensors = {k: torch.ones([sizes.get(n, n) for n in shape]) for k, shape in VARIANTS[variant].shapes.items()}
    return to_files(Adapter(config, {"lm_head": tensors}), shared=VARIANTS[variant].make_shared(config, [(4, 4)]))


SMALL = {variant: small_files(variant) for variant in VARIANTS}
NAMES = sorted({name for files in SMALL.values() for name in json.loads(files[CONFIG])} | UNSUPPORTED.keys())
JSON = st.recursive(
    st.none() | st.booleans() | st.sampled_from([-1, 0, 3, 2**40, 2**63, 10**400, "lora", "all", "vera_only"])
    | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["lm_head", "lm_head.lora_E"]) | st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(variant=st.sampled_from(list(VARIANTS)), name=st.sampled_from(NAMES), value=JSON)
@example(variant="lora", name="modules_to_save", value="\n")
def test_any_value_in_a_config_gives_an_adapter_or_one_line(variant: str, name: str, value: object) -> None:
    peft_config = json.loads(SMALL[variant][CONFIG]) | {name: value}
    model = torch.nn.ModuleDict({"lm_head": LoRALinear(4, 4)})
    try:
        adapter = from_files(SMALL[variant] | {CONFIG: json.dumps(peft_config).encode()}, "here")
    except UserError as error:
        assert str(error).startswith((f"here/{CONFIG}: ", "here: a rank of "))
        assert "\n" not in str(error)
        return
    try:
        adapter.attach_to(model)
    except UserError as error:
        assert "\n" not in str(error) and not adapter_names(model)


OF_VARIANTS = [("adalora", "rank_pattern", {"lm_head.lora_E": wrong}) for wrong in ([1, 0], 3, None, "true", [[True]])]
OF_VARIANTS += [("adalora", "rank_pattern", wrong) for wrong in ([True], "lm_head", {"lm_head.lora_E": [True] * 9})]
OF_VARIANTS += [("adalora", "target_r", wrong) for wrong in (0, 9, 2.5, "2", [])]
OF_VARIANTS += [("adalora", "init_r", wrong) for wrong in (0, 2.5, None, "8", True)]
OF_VARIANTS += [("vera", "projection_prng_key", wrong) for wrong in (2.5, "7", None, True, 2**63, 10**400)]
OF_VARIANTS += [("vera", "bias", "some"), ("vera", "r", 0), ("vera", "vera_dropout", 1.0)]
OURS = {"target_r": "lora_target_rank", "init_r": "init_r|lora_rank", "r": "lora_rank", "bias": "lora_bias"}
OURS |= {"projection_prng_key": "projection_prng_key|seed", "vera_dropout": "lora_dropout"}


@pytest.mark.parametrize(("variant", "name", "value"), OF_VARIANTS, ids=str)
def test_invalid_values_of_a_variant_are_refused_by_name(variant: str, name: str, value: object) -> None:
    peft_config = json.loads(SMALL[variant][CONFIG]) | {name: value}
    with pytest.raises(UserError, match=rf"^here/{CONFIG}: .*({OURS.get(name, name)})") as error:
        from_files(SMALL[variant] | {CONFIG: json.dumps(peft_config).encode()}, "here")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["LOHA", "vera", "", None, ["LORA"], {"LORA": 1}, 7])
def test_an_unknown_peft_type_is_refused_by_name(kind: object) -> None:
    peft_config = json.loads(SMALL["lora"][CONFIG]) | {"peft_type": kind}
    with pytest.raises(UserError) as error:
        from_files(SMALL["lora"] | {CONFIG: json.dumps(peft_config).encode()}, "here")
    expected = f"here/{CONFIG}: peft_type is {kind!r}; only LORA, VERA, ADALORA adapters can be read"
    assert str(error.value) == expected


def test_all_unsupported_settings_are_reported_together() -> None:
    files = FILES
    strange = {"layers_to_transform": [0], "use_qalora": True, "r": "8", "modules_to_save": ["lm_head"], "lora_bias": 1}
    with pytest.raises(UserError) as error:
        from_files(files | {CONFIG: json.dumps(json.loads(files[CONFIG]) | strange).encode()}, "here")
    assert all(name in str(error.value) for name in strange)


@pytest.mark.parametrize("name", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_a_missing_setting_is_named(name: str) -> None:
    files = FILES
    peft_config = json.loads(files[CONFIG])
    del peft_config[name]
    with pytest.raises(UserError, match=rf"^here/{CONFIG}: {name} is "):
        from_files(files | {CONFIG: json.dumps(peft_config).encode()}, "here")
