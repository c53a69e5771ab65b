"""Adapter folder <-> Adapter, in PEFT's own format, so that either reads the other's files.

`adapter_config.json` says what it is; `adapter_model.safetensors` holds its tensors, with SHA-256 fingerprints of
base, tokenizer and data set in the metadata; `README.md` tells people. Only what was trained is in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from lora.adapter import SHARED, Adapter
from lora.attach import REGEX
from lora.card import CARD, card
from lora.config import LoRAConfig
from lora.variants.lora import LoRA
from lora.variants.registry import VARIANTS, checked
from runtime import storage
from runtime.checkpoint import fingerprint, pack, read_json, to_json, unpack
from runtime.errors import UsageError, UserError
from runtime.settings.config import HIGHEST_RANK

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# What PEFT may write into a config that changes what the tensors mean, and that nothing here understands.
FOREIGN = ("exclude_modules", "layers_to_transform", "layer_replication")
FOREIGN += ("fan_in_fan_out", "lora_bias", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora")
FOREIGN += ("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config")
# How PEFT may have made the matrices while it changed the base's weights, which are then not the ones of the base.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _peft_key(path: str, name: str, targeted: bool, names: Mapping[str, str]) -> str:
    """PEFT's name of a tensor; the bias of a linear it wraps stands under the layer inside the wrapper."""
    if name in names:
        return f"{PREFIX}{path}.{names[name]}"
    return f"{PREFIX}{path}.base_layer.{name}" if targeted else f"{PREFIX}{path}.{name}"


def whole_modules(tensors: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """The paths of the modules whose whole weight an adapter has a copy of."""
    return [path for path, group in tensors.items() if "weight" in group]


def _our_key(key: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Module path and tensor name for PEFT's name of a tensor, with or without an adapter's name in it."""
    key = key.removeprefix(PREFIX)
    for name, theirs in names.items():
        stem, _, weight = theirs.partition(".")
        if match := re.fullmatch(rf"(.+)\.{stem}(\.[^.]+)?" + (rf"\.{weight}" if weight else ""), key):
            return match[1], name
    path, _, name = key.rpartition(".")
    return re.sub(r"\.(base_layer|modules_to_save(\.[^.]+)?)$", "", path), name


def to_files(
    adapter: Adapter, notes: Mapping[str, str] | None = None, shared: nn.Module | None = None
) -> dict[str, bytes]:
    """The files of an adapter folder, ready to be committed.

    notes: what else its card tells. shared: what all its layers share, to be stored too, for whoever cannot make it.
    """
    config, variant = adapter.config, VARIANTS[adapter.config.variant]
    regex = config.targets.startswith(REGEX)
    about = {
        "peft_type": variant.peft_type,
        "task_type": None,
        "base_model_name_or_path": adapter.facts.get("base"),
        **{theirs: getattr(config, ours) for ours, theirs in variant.peft_fields.items()},
        "target_modules": config.targets.removeprefix(REGEX) if regex else adapter.target_modules(),
        "bias": config.bias,
        "modules_to_save": whole_modules(adapter.tensors) or None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        **variant.peft_flags,
        **variant.ranks_to_peft(config, adapter.targets()),
        **({"save_projection": shared is not None} if variant.peft_shared else {}),
    }
    targets = set(adapter.targets())
    tensors = {
        _peft_key(path, name, path in targets, variant.peft_names): tensor
        for path, group in adapter.tensors.items()
        for name, tensor in group.items()
    }
    if shared is not None:
        tensors |= {variant.peft_shared[name]: tensor for name, tensor in shared.named_buffers()}
    packed = pack(tensors, {"format": "pt"} | adapter.facts)
    return {CONFIG: to_json(about), TENSORS: packed, CARD: card(adapter, notes or {})}


def _foreign(about: dict) -> list[str]:
    """The settings that change what the tensors mean and are not understood here, by name."""
    given = {name: value for name in FOREIGN if (value := about.get(name)) not in (None, [], {}) and value is not False}
    if str(how := about.get("init_lora_weights")).lower().startswith(CHANGES_BASE):
        given["init_lora_weights"] = how
    return [f"{name}={value!r} is not supported" for name, value in given.items()]


def _unusable(about: dict, variant: type[LoRA], copied: list[str]) -> list[str]:
    """The settings whose values cannot be read, or do not go with the modules that are copied, by name."""
    problems, targets, saved = [], about.get("target_modules"), about.get("modules_to_save") or []
    for name in variant.peft_fields.values():
        if not _is_number(value := about.get(name, 0.0 if name.endswith("dropout") else None)):
            problems.append(f"{name} is {value!r}, which is no usable number")
    try:
        variant.ranks_from_peft(about)
    except (TypeError, ValueError, AttributeError) as error:
        problems.append(
            f"rank_pattern={about.get('rank_pattern')!r}, alpha_pattern={about.get('alpha_pattern')!r}: {error}"
        )
    named = isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    if not named and not _is_regex(targets):
        problems.append(f"target_modules is {targets!r}; only a list of module names or one expression can be read")
    if not isinstance(saved, list) or any(not any(f".{p}".endswith(f".{name}") for p in copied) for name in saved):
        problems.append(f"modules_to_save is {saved}; the file has whole weights of {', '.join(copied) or 'none'}")
    return problems


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 2**64


def _is_regex(text: object) -> bool:
    try:
        return isinstance(text, str) and text not in ("", "all-linear") and re.compile(text) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _variant(about: dict, where: str) -> str:
    """The variant whose config this is. Raises UserError where there is none."""
    kind, types = about.get("peft_type"), {variant.peft_type: variant for variant in VARIANTS.values()}
    if not isinstance(kind, str) or kind not in types:
        raise UserError(f"{where}: peft_type is {kind!r}; only {', '.join(types)} adapters can be read")
    for name, variant in VARIANTS.items():
        flags = variant.peft_flags.items()
        if variant.peft_type == kind and all(bool(about.get(flag)) == value for flag, value in flags):
            return name
    told = ", ".join(f"{flag}={about.get(flag)}" for flag in types[kind].peft_flags)
    raise UserError(f"{where}: no variant has {told}")


def _config(about: dict, copied: list[str], where: str) -> LoRAConfig:
    """Raises UserError that names everything that is not understood. copied: the modules with a whole weight."""
    name = _variant(about, where)
    variant = VARIANTS[name]
    if problems := _foreign(about) + _unusable(about, variant, copied):
        raise UserError(f"{where}: {'; '.join(problems)}")
    targets = about["target_modules"]
    fields = {
        "targets": REGEX + targets if isinstance(targets, str) else ",".join(targets),
        "variant": name,
        "bias": about.get("bias", "none"),
        "train_embeddings": bool(about.get("modules_to_save")),
        **{ours: about[theirs] for ours, theirs in variant.peft_fields.items() if theirs in about},
        **variant.ranks_from_peft(about),
    }
    try:
        config = LoRAConfig(**fields)
        checked(config)
        return config
    except UsageError as error:
        raise UserError(f"{where}: {error}") from None


def _tensors(flat: Mapping[str, Tensor], variant: type[LoRA], where: str) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        path, name = _our_key(key, variant.peft_names)
        if name in tensors.setdefault(path, {}):
            raise UserError(f"{where}/{TENSORS} holds several adapters: {key} is there under another name too")
        tensors[path][name] = tensor
    return tensors


def from_files(files: dict[str, bytes], where: str) -> Adapter:
    """The adapter that these files hold; `where` names them in messages.

    Raises UserError for a file that is missing or damaged, and for what cannot be represented here, by name.
    """
    if missing := [name for name in (CONFIG, TENSORS) if name not in files]:
        raise UserError(f"{where}: {missing[0]} is missing, so this is no adapter folder")
    about = read_json(files[CONFIG], f"{where}/{CONFIG}")
    variant = VARIANTS[_variant(about, f"{where}/{CONFIG}")]
    flat = unpack(files[TENSORS], f"{where}/{TENSORS}")
    shared = {name: flat.pop(key) for name, key in variant.peft_shared.items() if key in flat}
    tensors = _tensors(flat, variant, where)
    config = _config(about, whole_modules(tensors), f"{where}/{CONFIG}")
    header = json.loads(files[TENSORS][8 : 8 + int.from_bytes(files[TENSORS][:8], "little")])
    facts = {key: value for key, value in header.get("__metadata__", {}).items() if key != "format"}
    if shared:  # what counts is what was stored, whatever was noted of it
        facts[SHARED] = fingerprint(shared)
    largest = max((size for tensor in flat.values() for size in tensor.shape), default=0)
    largest = max(largest, HIGHEST_RANK)  # of what a variant took ranks away from, no tensor may be left that size
    if (rank := max(config.rank, *config.rank_pattern.values(), 0)) > largest:  # before anybody makes room for it
        raise UserError(f"{where}: a rank of {rank:,} is more than any tensor in {TENSORS} has")
    return Adapter(config, tensors, facts)


def save_adapter(folder: Path, adapter: Adapter) -> None:
    """Commit an adapter as a new folder. Raises UserError where it exists or cannot be written."""
    storage.commit_folder(folder, to_files(adapter))


def load_adapter(folder: Path) -> Adapter:
    """Read an adapter folder: ours is verified against its manifest, PEFT's has none.

    Raises UserError where something is missing, damaged or not understood.
    """
    with storage.plain_errors(folder, "read"):
        if (folder / storage.MANIFEST).exists():
            files = storage.read_folder(folder)
        else:
            files = {name: path.read_bytes() for name in (CONFIG, TENSORS) if (path := folder / name).is_file()}
    return from_files(files, str(folder))
