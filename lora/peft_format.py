"""Read and write adapter folders in PEFT's format.

`adapter_config.json` is PEFT's config, `adapter_model.safetensors` holds the trained tensors, with the SHA-256
fingerprints of base, tokenizer and data set in its metadata, and `README.md` is the card.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from lora.adapter import COPIES, SHARED, Adapter
from lora.attach import REGEX
from lora.card import CARD, card
from lora.config import LoRAConfig
from lora.variants.lora import LoRA
from lora.variants.registry import VARIANTS, variant_of
from runtime.errors import UsageError, UserError
from runtime.settings.config import HIGHEST_RANK
from runtime.storage import folders
from runtime.storage.encoding import read_json, to_json
from runtime.storage.tensors import TensorFile, fingerprint, pack

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
OF_BASE = ".base_layer.weight"  # PEFT repeats the base's own where the head or the embedding is a target
# Fields of PEFT's configs that change what the tensors mean, and that nothing here implements.
UNSUPPORTED = ("exclude_modules", "layers_to_transform", "layer_replication", "fan_in_fan_out", "lora_bias")
UNSUPPORTED += ("target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora", "alora_invocation_tokens")
UNSUPPORTED += ("arrow_config", "kasa_config", "monteclora_config")
# Initialisations with which PEFT changes the base's weights, so that the adapter does not fit the base as it was.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Names(Protocol):
    """What the modules of a pretrained model are called elsewhere."""

    def theirs(self, path: str) -> str:
        """Their name of the module at our path. Raises KeyError where they have none."""

    def ours(self, path: str) -> str:
        """Our path of their module. Raises KeyError where we have none."""

    def aliases(self) -> Mapping[str, tuple[str, ...]]:
        """The last one or two parts of their names, where they are not ours, and what of ours they stand for."""

    def is_transposed(self, path: str) -> bool:
        """Whether they store the weight of the linear at our path as (in, out)."""


def _peft_key(path: str, name: str, targeted: bool, names: Mapping[str, str]) -> str:
    """Return PEFT's name of a tensor. The bias of a targeted linear is that of the layer inside PEFT's wrapper."""
    if name in names:
        return f"{PREFIX}{path}.{names[name]}"
    return f"{PREFIX}{path}.base_layer.{name}" if targeted else f"{PREFIX}{path}.{name}"


def _split_key(key: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Return module path and tensor name for PEFT's name of a tensor, with or without an adapter's name in it."""
    key = key.removeprefix(PREFIX)
    for name, theirs in names.items():
        stem, _, weight = theirs.partition(".")
        if match := re.fullmatch(rf"(.+)\.{stem}(\.[^.]+)?" + (rf"\.{weight}" if weight else ""), key):
            return match[1], name
    path, _, name = key.rpartition(".")
    return re.sub(r"\.(base_layer|modules_to_save(\.[^.]+)?)$", "", path), name


def whole_modules(tensors: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Return the paths of the modules whose whole weight is among an adapter's tensors."""
    return [path for path, group in tensors.items() if "weight" in group]


def _their_targets(adapter: Adapter, names: Names) -> list[str]:
    """Return the names by which PEFT finds the adapted linears of a pretrained model, and no others."""
    paths, aliases, found = adapter.targets(), names.aliases(), {}
    adapted = {path.rpartition(".")[2] for path in paths}
    for name in paths if adapter.config.targets.startswith(REGEX) else adapter.target_modules():
        for path in (path for path in paths if f".{path}".endswith(f".{name}")):
            theirs = names.theirs(path)
            last = theirs.rpartition(".")[2]
            if name == path:
                found[theirs] = None
            elif "." in name or not {alias.rpartition(".")[2] for alias in aliases.get(last, ())} <= adapted:
                found[".".join(theirs.split(".")[-2:])] = None
            else:
                found[last] = None
    return list(found)


def _renamed(adapter: Adapter, names: Names) -> Adapter:
    """Return the adapter with the names that its modules have in the pretrained model."""
    config, paths = adapter.config, adapter.targets()
    patterns = {
        "rank_pattern": {names.theirs(path): r for path in paths if (r := config.rank_at(path)) != config.rank},
        "alpha_pattern": {names.theirs(path): a for path in paths if (a := config.alpha_at(path)) != config.alpha},
    }
    config = replace(config, targets=",".join(_their_targets(adapter, names)), **patterns)
    return replace(
        adapter, config=config, tensors={names.theirs(path): group for path, group in adapter.tensors.items()}
    )


def to_files(
    adapter: Adapter,
    notes: Mapping[str, str] | None = None,
    shared: nn.Module | None = None,
    names: Names | None = None,
    place: str = "folder",
) -> folders.Files:
    """Return the files of an adapter folder, by name.

    notes: more rows of its card. shared: from `Adapter.make_shared`, to store too, for readers that cannot make it.
    names: of the modules of a pretrained base, for which PEFT then reads the folder. place: where its card says that it
    lies.
    """
    transposed = names is not None and any(map(names.is_transposed, adapter.targets()))
    about = card(adapter, notes or {}, place)
    adapter = _renamed(adapter, names) if names else adapter
    config, variant = adapter.config, VARIANTS[adapter.config.variant]
    regex, targets = config.targets.startswith(REGEX), set(adapter.targets())
    peft_config = {
        "peft_type": variant.peft_type,
        "task_type": "CAUSAL_LM" if names else None,
        "base_model_name_or_path": adapter.metadata.get("base_path", adapter.metadata.get("base")),
        **{theirs: getattr(config, ours) for ours, theirs in variant.peft_fields.items()},
        "target_modules": config.targets.removeprefix(REGEX) if regex else adapter.target_modules(),
        "bias": config.bias,
        "modules_to_save": whole_modules(adapter.tensors) or None,
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        **variant.peft_flags,
        **variant.special_fields_to_peft(config, adapter.targets()),
        **({"save_projection": shared is not None} if variant.peft_shared else {}),
    }
    tensors = {
        _peft_key(path, name, path in targets, variant.peft_names): tensor
        for path, group in adapter.tensors.items()
        for name, tensor in group.items()
    }
    if shared is not None:
        tensors |= {variant.peft_shared[name]: tensor for name, tensor in shared.named_buffers()}
    packed = pack(tensors, {"format": "pt"} | adapter.metadata)
    return {CONFIG: to_json(peft_config), TENSORS: packed, CARD: about}


def _find_variant(peft_config: dict, where: str) -> str:
    """Return the name of the variant that this config describes. Raises UserError if there is none."""
    kind, types = peft_config.get("peft_type"), {variant.peft_type: variant for variant in VARIANTS.values()}
    if not isinstance(kind, str) or kind not in types:
        raise UserError(f"{where}: peft_type is {kind!r}; only {', '.join(types)} adapters can be read")
    for name, variant in VARIANTS.items():
        flags = variant.peft_flags.items()
        if variant.peft_type == kind and all(bool(peft_config.get(flag)) == value for flag, value in flags):
            return name
    flags = ", ".join(f"{flag}={peft_config.get(flag)}" for flag in types[kind].peft_flags)
    raise UserError(f"{where}: no variant has {flags}")


def _unsupported(peft_config: dict) -> list[str]:
    """Return a message for each setting that changes what the tensors mean and is not implemented here."""
    given = {name: peft_config.get(name) for name in UNSUPPORTED}
    found = {name: value for name, value in given.items() if value not in (None, [], {}) and value is not False}
    if str(init := peft_config.get("init_lora_weights")).lower().startswith(BASE_CHANGING_INITS):
        found["init_lora_weights"] = init
    return [f"{name}={value!r} is not supported" for name, value in found.items()]


def _unreadable(peft_config: dict, variant: type[LoRA], copied: list[str]) -> list[str]:
    """Return a message for each setting that cannot be read or contradicts the modules that the file has whole."""
    problems, targets, saved = [], peft_config.get("target_modules"), peft_config.get("modules_to_save") or []
    for name in variant.peft_fields.values():
        value = peft_config.get(name, 0.0 if name.endswith("dropout") else None)
        if type(value) not in (int, float) or not abs(value) < 2**64:
            problems.append(f"{name} is {value!r}, which is not a usable number")
    try:
        variant.special_fields_from_peft(peft_config)
    except (TypeError, ValueError, AttributeError) as error:
        patterns = (f"{name}={peft_config.get(name)!r}" for name in ("rank_pattern", "alpha_pattern"))
        problems.append(f"{', '.join(patterns)}: {error}")
    named = isinstance(targets, list) and targets and all(isinstance(name, str) for name in targets)
    if not named and not _is_regex(targets):
        problems.append(f"target_modules is {targets!r}; only a list of module names or one expression can be read")
    if not isinstance(saved, list) or any(not any(f".{p}".endswith(f".{name}") for p in copied) for name in saved):
        problems.append(f"modules_to_save is {saved!r}; the file has whole weights of {', '.join(copied) or 'none'}")
    return problems


def _is_regex(text: object) -> bool:
    try:
        return isinstance(text, str) and text not in ("", "all-linear") and re.compile(text) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _read_config(peft_config: dict, name: str, copied: list[str], where: str) -> LoRAConfig:
    """Return our config for PEFT's. name: of its variant. copied: the modules whose whole weight the file has.

    Raises UserError that names everything that cannot be read.
    """
    variant = VARIANTS[name]
    if problems := _unsupported(peft_config) + _unreadable(peft_config, variant, copied):
        raise UserError(f"{where}: {'; '.join(problems)}")
    targets = peft_config["target_modules"]
    fields = {
        "targets": REGEX + targets if isinstance(targets, str) else ",".join(targets),
        "variant": name,
        "bias": peft_config.get("bias", "none"),
        "train_embeddings": bool(peft_config.get("modules_to_save")),
        **{ours: peft_config[theirs] for ours, theirs in variant.peft_fields.items() if theirs in peft_config},
        **variant.special_fields_from_peft(peft_config),
    }
    try:
        config = LoRAConfig(**fields)
        variant_of(config)
        return config
    except UsageError as error:
        raise UserError(f"{where}: {error}") from None


def _by_module(flat: Mapping[str, Tensor], variant: type[LoRA], where: str) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        path, name = _split_key(key, variant.peft_names)
        if name in tensors.setdefault(path, {}):
            raise UserError(f"{where}/{TENSORS} holds several adapters: {key} is there under another name too")
        tensors[path][name] = tensor
    return tensors


def _ours(config: LoRAConfig, tensors: dict[str, dict[str, Tensor]], names: Names) -> tuple[LoRAConfig, dict]:
    """Return a config and tensors by module path, both in a pretrained model's names, in ours."""
    paths = {their: names.ours(their) for their in tensors}
    adapted = [their for their, group in tensors.items() if not group.keys() <= set(COPIES)]
    fields = {
        "rank_pattern": {paths[t]: r for t in adapted if (r := config.rank_at(t)) != config.rank},
        "alpha_pattern": {paths[t]: a for t in adapted if (a := config.alpha_at(t)) != config.alpha},
    }
    if config.targets.startswith(REGEX) or re.search(r"\.[0-9]+\.", config.targets):
        fields["targets"] = ",".join(paths[their] for their in adapted)
    return replace(config, **fields), {paths[their]: group for their, group in tensors.items()}


def from_files(
    files: folders.Files, where: str, names_for: Callable[[Iterable[str]], Names | None] = lambda paths: None
) -> Adapter:
    """Read an adapter from its files; `where` names them in messages. names_for(paths) returns the names of the
    pretrained model that has modules of these names; None where they are ours.

    Raises UserError for a file that is missing or corrupted, and names every setting that cannot be read.
    """
    if missing := [name for name in (CONFIG, TENSORS) if name not in files]:
        raise UserError(f"{where}: {missing[0]} is missing, so this is not an adapter folder")
    peft_config = read_json(files[CONFIG], f"{where}/{CONFIG}")
    name = _find_variant(peft_config, f"{where}/{CONFIG}")
    variant = VARIANTS[name]
    packed = TensorFile(files[TENSORS], f"{where}/{TENSORS}")
    flat = dict(packed)
    shared = {name: flat.pop(key) for name, key in variant.peft_shared.items() if key in flat}
    repeated = {key: flat.pop(key) for key in list(flat) if key.endswith(OF_BASE)}
    tensors = _by_module(flat, variant, where)
    names = names_for(tensors)
    if names and any(names.is_transposed(names.ours(path)) for path in tensors):
        peft_config["fan_in_fan_out"] = False  # which changes how the base lies, and not what A and B mean
    config = _read_config(peft_config, name, whole_modules(tensors), f"{where}/{CONFIG}")
    if names:
        config, tensors = _ours(config, tensors, names)
    of_base = {key.removeprefix(PREFIX).removesuffix(OF_BASE): W for key, W in repeated.items()}
    of_base = {names.ours(path) if names else path: W for path, W in of_base.items()}
    metadata = {key: value for key, value in packed.metadata.items() if key != "format"}
    if "base" not in metadata and isinstance(base := peft_config.get("base_model_name_or_path"), str):
        metadata["base_path"] = base  # PEFT's files tell it nowhere else
    if shared:  # the stored tensors count, whatever the metadata says of them
        metadata[SHARED] = fingerprint(shared)
    largest = max((size for tensor in flat.values() for size in tensor.shape), default=0)
    largest = max(largest, HIGHEST_RANK)  # a pruned file may have no tensor as large as the initial rank
    if (rank := max(config.rank, *config.rank_pattern.values(), 0)) > largest:  # before memory is allocated for it
        raise UserError(f"{where}: a rank of {rank:,} is more than any tensor in {TENSORS} has")
    return Adapter(config, tensors, metadata, of_base)


def save_adapter(folder: Path, adapter: Adapter) -> None:
    """Save an adapter as a new folder. Raises UserError where it exists or cannot be written."""
    folders.commit_folder(folder, to_files(adapter))


def load_adapter(folder: Path, names_for: Callable[[Iterable[str]], Names | None] = lambda paths: None) -> Adapter:
    """Read an adapter folder. Ours is verified against its manifest; PEFT's has none.

    Raises UserError where something is missing, corrupted or cannot be read.
    """
    with folders.plain_errors(folder, "read"):
        if (folder / folders.MANIFEST).exists():
            files = folders.read_folder(folder)
        else:
            paths = (folder / CONFIG, folder / TENSORS)
            files = {path.name: folders.read_content(path) for path in paths if path.is_file()}
    return from_files(files, str(folder), names_for)
