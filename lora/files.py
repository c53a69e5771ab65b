"""Adapter folder <-> Adapter, in PEFT's own format, so that either reads the other's files.

`adapter_config.json` says what it is; `adapter_model.safetensors` holds its tensors, with SHA-256 fingerprints of
base, tokenizer and data set in the metadata. Only what was trained is in it.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from lora.adapter import Adapter
from lora.attach import target_names
from lora.variants import VARIANTS, LoRAConfig
from runtime import storage
from runtime.checkpoint import pack, read_json, to_json, unpack
from runtime.errors import UsageError, UserError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDINGS = ["token_embedding", "position_embedding"]
# What PEFT may write into a config that changes what the tensors mean, and that nothing here understands.
FOREIGN = ("rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layer_replication")
FOREIGN += ("fan_in_fan_out", "lora_bias", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora")
FOREIGN += ("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config")
# How PEFT may have made the matrices while it changed the base's weights, which are then not the ones of the base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _peft_key(path: str, name: str, targeted: bool) -> str:
    """PEFT's name of a tensor; the bias of a linear it wraps stands under the layer inside the wrapper."""
    if name in ("A", "B"):
        return f"{PREFIX}{path}.lora_{name}.weight"
    return f"{PREFIX}{path}.base_layer.{name}" if targeted else f"{PREFIX}{path}.{name}"


def _our_key(key: str) -> tuple[str, str]:
    """Module path and tensor name for PEFT's name of a tensor."""
    key = key.removeprefix(PREFIX)
    for name in ("A", "B"):
        if key.endswith(f".lora_{name}.weight"):
            return key.removesuffix(f".lora_{name}.weight"), name
    path, _, name = key.rpartition(".")
    return path.removesuffix(".base_layer"), name


def to_files(adapter: Adapter) -> dict[str, bytes]:
    """The files of an adapter folder, ready to be committed."""
    config = adapter.config
    about = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.facts.get("base"),
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": list(target_names(config.targets)),
        "bias": config.bias,
        "modules_to_save": EMBEDDINGS if config.train_embeddings else None,
        **VARIANTS[config.variant].peft_flags,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {
        _peft_key(path, name, "A" in group): tensor
        for path, group in adapter.tensors.items()
        for name, tensor in group.items()
    }
    return {CONFIG: to_json(about), TENSORS: pack(tensors, {"format": "pt"} | adapter.facts)}


def _refuse_foreign(about: dict, where: str) -> None:
    """Raises UserError for settings that change what the tensors mean, by name."""
    if about.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {about.get('peft_type')!r}; only LORA adapters can be read")
    given = {name: value for name in FOREIGN if (value := about.get(name)) not in (None, [], {}) and value is not False}
    if str(how := about.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        given["init_lora_weights"] = how
    if given:
        strange = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise UserError(f"{where}: {strange} is not supported")


def _variant(about: dict, where: str) -> str:
    for name, variant in VARIANTS.items():
        if all(bool(about.get(flag)) == value for flag, value in variant.peft_flags.items()):
            return name
    raise UserError(
        f"{where}: no variant here has use_rslora={about.get('use_rslora')}, use_dora={about.get('use_dora')}"
    )


def _number(about: dict, name: str, where: str) -> float:
    value = about.get(name, 0.0 if name == "lora_dropout" else None)
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise UserError(f"{where}: {name} is {value!r}, which is no usable number")
    return value


def _config(about: dict, where: str) -> LoRAConfig:
    _refuse_foreign(about, where)
    targets, saved = about.get("target_modules"), about.get("modules_to_save") or []
    if not targets or not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise UserError(f"{where}: target_modules is {targets!r}; only a list of module names can be read")
    if not isinstance(saved, list) or sorted(map(str, saved)) not in ([], sorted(EMBEDDINGS)):
        raise UserError(f"{where}: modules_to_save is {saved}; only both embeddings, or nothing, can be read")
    try:
        return LoRAConfig(
            rank=_number(about, "r", where),
            alpha=float(_number(about, "lora_alpha", where)),
            dropout=float(_number(about, "lora_dropout", where)),
            targets=",".join(targets),
            variant=_variant(about, where),
            bias=about.get("bias", "none"),
            train_embeddings=bool(saved),
        )
    except UsageError as error:
        raise UserError(f"{where}: {error}") from None


def from_files(files: dict[str, bytes], where: str) -> Adapter:
    """The adapter that these files hold; `where` names them in messages.

    Raises UserError for a file that is missing or damaged, and for what cannot be represented here, by name.
    """
    if missing := [name for name in (CONFIG, TENSORS) if name not in files]:
        raise UserError(f"{where}: {missing[0]} is missing, so this is no adapter folder")
    about = read_json(files[CONFIG], f"{where}/{CONFIG}")
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in unpack(files[TENSORS], f"{where}/{TENSORS}").items():
        path, name = _our_key(key)
        tensors.setdefault(path, {})[name] = tensor
    header = json.loads(files[TENSORS][8 : 8 + int.from_bytes(files[TENSORS][:8], "little")])
    facts = {key: value for key, value in header.get("__metadata__", {}).items() if key != "format"}
    return Adapter(_config(about, f"{where}/{CONFIG}"), tensors, facts)


def save_adapter(folder: Path, adapter: Adapter) -> None:
    """Commit an adapter as a new folder. Raises UserError where it exists or cannot be written."""
    storage.commit_folder(folder, to_files(adapter))


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter folder: ours is verified against its manifest, PEFT's has none.

    Raises UserError where something is missing, damaged or not understood.
    """
    if (folder / storage.MANIFEST).exists():
        return from_files(storage.read_folder(folder), str(folder))
    return from_files(
        {name: path.read_bytes() for name in (CONFIG, TENSORS) if (path := folder / name).is_file()}, str(folder)
    )
