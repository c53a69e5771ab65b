"""A base's folder <-> the model: `config.json` with its config, `model.safetensors` with its weights.

Both are ours or a family's (`models/pretrained/families.py`); `config.json` tells which.
"""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora.attach import base_tensors
from models.config import ModelConfig
from models.pretrained.families import Family, config_of, family_of
from models.stored import EMBEDDING, HEAD, INDEX, WEIGHTS, StoredTensors
from models.transformer import Transformer
from runtime.errors import UserError, join_problems
from runtime.processes.pieces import write
from runtime.storage.encoding import read_json, to_json
from runtime.storage.folders import CorruptedError, Files, plain_errors, read_content
from runtime.storage.quantized import Quantized, config_of_form, quantize
from runtime.storage.tensors import NAMES as DTYPE_NAMES
from runtime.storage.tensors import LazyTensors, TensorFile, described_of, differences, fingerprint, pack

CONFIG = "config.json"
KEPT = (CONFIG, "generation_config.json")  # what a model that is made from a pretrained one has of its files


def read_values(files: Files, where: str) -> dict[str, Any]:
    """What config.json says. Raises UserError where it or the weights are missing."""
    if CONFIG not in files or not {WEIGHTS, INDEX} & set(files):
        raise UserError(f"{where} holds no model: {CONFIG} and {WEIGHTS} are needed")
    return read_json(files[CONFIG], f"{where}/{CONFIG}")


def family_in(files: Files, where: str) -> Family | None:
    """The family in whose format these files are; None for ours."""
    return family_of(read_values(files, where), f"{where}/{CONFIG}")


def config_from(files: Files, where: str) -> ModelConfig:
    """The config of the model that these files hold. Raises UserError where it is missing or makes no sense."""
    return config_in(read_values(files, where), f"{where}/{CONFIG}")


def config_in(values: Mapping[str, Any], name: str) -> ModelConfig:
    """The config that a config.json stands for; `name` is its path. Raises UserError where it makes no sense."""
    if family := family_of(values, name):
        return config_of(family, values, name)
    try:
        return ModelConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except (ValueError, TypeError) as error:
        raise CorruptedError(f"{name} is corrupted: {error}") from None


def shape_in(folder: Path) -> tuple[ModelConfig, torch.dtype, str, Family | None]:
    """The config of a model in a folder, the dtype of its weights, the form of its matrices (nf4, int8 or none) and its
    family, from config.json and the headers of files of weights, where there are any.

    Raises UserError where it is missing or makes no sense.
    """
    path = folder / CONFIG
    with plain_errors(path, "read"):
        values = read_json(path.read_bytes(), str(path))
    config, about = config_in(values, str(path)), values.get("quantization_config") or {}
    form = "nf4" if about.get("load_in_4bit") else "int8" if about.get("load_in_8bit") else "none"
    return config, _stored_dtype(folder, values, form), form, family_of(values, str(path))


def _stored_dtype(folder: Path, values: Mapping[str, Any], form: str) -> torch.dtype:
    """The dtype of most weights in a folder; what config.json says where there are none, or some in 4 or 8 bits."""
    named = str(values.get("torch_dtype") or values.get("dtype") or "float32")
    said = getattr(torch, named, None)
    for path in sorted(folder.glob("model*.safetensors")) if form == "none" else ():
        dtypes = Counter()
        for tensor in TensorFile(read_content(path), str(path)).described.values():
            dtypes[tensor.dtype] += tensor.numel()
        return dtypes.most_common(1)[0][0] if dtypes else torch.float32
    return said if isinstance(said, torch.dtype) else torch.float32


def to_files(model: Transformer, like: Files | None = None, tensors: Mapping[str, Tensor] | None = None) -> Files:
    """The model's base as files, ready to be committed; adapters are not in it.

    like: files of the base that it was made from, whose format and config it keeps; without any they are ours. tensors:
    what is written instead of the model's own, by its names, as with its adapters merged. Raises UserError for a head
    that is tied against the config.
    """
    tensors = base_tensors(model) if tensors is None else tensors
    tied = model.lm_head.weight is model.token_embedding.weight
    if tied != model.config.tied_head:
        shared = "share one weight" if tied else "have two weights"
        raise UserError(f"lm_head and token_embedding {shared}, and the model's config has tied_head={not tied}")
    described = {name: tensor for name, tensor in described_of(tensors).items() if not (tied and name == HEAD)}
    values = read_json(like[CONFIG], CONFIG) if like else {}
    if not (family := family_of(values, CONFIG) if values else None):
        return {CONFIG: to_json(model.config.as_dict()), WEIGHTS: pack(_file_tensors(described, tensors, None))}
    of_weights = ("dtype", "torch_dtype", "quantization_config")
    values = {name: value for name, value in values.items() if name not in of_weights}
    values["torch_dtype"] = str(described[EMBEDDING].dtype).removeprefix("torch.")
    if (form := _form_among(described.values())) != "none":
        values["quantization_config"] = config_of_form(form, values["torch_dtype"])
    return {**like, CONFIG: to_json(values), WEIGHTS: pack(_file_tensors(described, tensors, family), {"format": "pt"})}


def form_of(model: Transformer) -> str:
    """The form in which the matrices inside the blocks are stored: nf4, int8, or none of these."""
    return _form_among(model.parameters())


def _form_among(tensors: Iterable[Tensor]) -> str:
    return next((tensor.form for tensor in tensors if isinstance(tensor, Quantized)), "none")


def dequantize(model: Transformer) -> None:
    """Make matrices in 4 or 8 bits dense ones, with the values that they have."""
    for name, p in list(model.named_parameters()):
        if isinstance(p, Quantized):
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, torch.nn.Parameter(p.dense(), requires_grad=False))


def _file_tensors(described: Mapping[str, Tensor], tensors: Mapping[str, Tensor], family: Family | None) -> LazyTensors:
    """The tensors that are described, by the names that they have in a file of this family's."""
    theirs, make = {}, {}
    for name, tensor in described.items():
        path, _, leaf = name.rpartition(".")
        place = family.theirs(path) if family else path
        if isinstance(tensor, Quantized):
            parts = {f"{place}.{part}": values for part, values in tensor.parts.items()}
            theirs |= parts
            make |= {part: partial(parts.get, part) for part in parts}
        else:
            transposed = bool(family) and leaf == "weight" and family.is_transposed(path)
            theirs[f"{place}.{leaf}"] = tensor.t() if transposed else tensor
            make[f"{place}.{leaf}"] = partial(_made, tensors, name, transposed)
    return LazyTensors(theirs, make)


def _made(tensors: Mapping[str, Tensor], name: str, transposed: bool) -> Tensor:
    return tensors[name].t() if transposed else tensors[name]


def load_weights(model: Transformer, files: Files, where: str) -> None:
    """Copy a base's weights into a model without adapters.

    Raises UserError that names what is missing, unexpected or misshapen, all together, before the model is touched.
    """
    tensors = stored_tensors(files, where, model.config)
    _check_fit(model, tensors, where)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            write(parameter, tensors[name])


def stored_tensors(files: Files, where: str, config: ModelConfig) -> StoredTensors:
    """The tensors that these files hold, by our names."""
    return StoredTensors(files, where, family_in(files, where), config.tied_head)


def stored_fingerprint(files: Files, where: str) -> str:
    """The fingerprint of the base that these files hold, read one tensor at a time."""
    config = config_from(files, where)
    tensors = stored_tensors(files, where, config)
    return fingerprint(ChainMap({HEAD: tensors[EMBEDDING]} if config.tied_head else {}, tensors))


def _check_size(config: ModelConfig, tensors: StoredTensors, where: str) -> None:
    """Raises CorruptedError for a config that needs more weights than there are, before anybody makes room for them."""
    positions = config.max_positions if config.positions == "learned" else 0
    least = (config.vocab_size + positions) * config.n_embd
    if least > sum(tensor.numel() for tensor in tensors.described.values()) or config.n_layer > len(tensors):
        raise CorruptedError(f"{where}/{WEIGHTS} holds fewer weights than {CONFIG} needs")


def _check_fit(model: Transformer, tensors: StoredTensors, where: str) -> None:
    """Raises UserError for tensors that are not the model's, by the names that they have in the file."""

    def stored(name: str) -> str:
        path, _, leaf = name.rpartition(".")
        return f"{tensors.family.theirs(path)}.{leaf}" if tensors.family and name in wanted else name

    wanted = dict(model.named_parameters())
    if problems := differences(
        {stored(name): p for name, p in wanted.items()}, {stored(name): t for name, t in tensors.described.items()}
    ):
        raise UserError(f"{where}/{WEIGHTS} does not fit its {CONFIG}: {join_problems(sorted(problems))}")
    for name, tensor in tensors.described.items():
        if not tensor.dtype.is_floating_point:
            raise UserError(f"{where}: {stored(name)} is stored as {DTYPE_NAMES[tensor.dtype]}, which is not supported")


def from_files(
    files: Files, where: str, dropout: float = 0.0, dtype: torch.dtype | None = torch.float32, form: str = "none"
) -> Transformer:
    """The model that these files hold, on the CPU, with no adapter, in a dtype, or None for the files' own.

    form: nf4 or int8 for the matrices inside the blocks, which are then quantised one at a time; where they are stored
    in one of these, they keep it. Raises UserError where they are stored in another.
    """
    config = config_from(files, where)
    tensors = stored_tensors(files, where, config)
    _check_size(config, tensors, where)
    model = Transformer(config, dropout, "meta")  # nothing is drawn that would be overwritten
    _check_fit(model, tensors, where)
    forms = _forms(model, tensors, where, form)
    for names in model.weights_of_one_input():
        for name, values in _read_together(tensors, names, dtype, forms, where).items():
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, torch.nn.Parameter(values, values.is_floating_point()))
    model.tie_head()
    return model


def _forms(model: Transformer, tensors: StoredTensors, where: str, form: str) -> dict[str, str]:
    """The form of each matrix that is to have one. Raises UserError where it is stored in another."""
    if form == "none":
        return tensors.forms
    if other := next((stored for stored in tensors.forms.values() if stored != form), None):
        raise UserError(f"{where} is stored in {other}, which cannot become {form}; leave QUANTIZE out")
    return tensors.forms | dict.fromkeys(model.linears_of_blocks(), form)


def _read_together(
    tensors: StoredTensors, names: list[str], dtype: torch.dtype | None, forms: Mapping[str, str], where: str
) -> dict[str, Tensor]:
    """Weights that have one input, in a dtype or the files' own: where it is one, they are together in memory, so that
    one matmul serves them uncopied; quantised ones are alone."""
    described = [tensors.described[name] for name in names]
    dtypes = {dtype or tensor.dtype for tensor in described}
    if forms.keys() & set(names):
        return {name: _quantized(tensors[name], dtype, forms[name], f"{where}: {name}") for name in names}
    if len(dtypes) == 1:
        whole = torch.empty(sum(map(len, described)), *described[0].shape[1:], dtype=dtypes.pop())
        parts = whole.split([len(tensor) for tensor in described])
    else:
        parts = [torch.empty(tensor.shape, dtype=dtype or tensor.dtype) for tensor in described]
    for name, part in zip(names, parts, strict=True):
        tensors.read_into(name, part)
    return dict(zip(names, parts, strict=True))


def _quantized(W: Tensor, dtype: torch.dtype | None, form: str, name: str) -> Quantized:
    return W if isinstance(W, Quantized) else quantize(form, W.to(dtype or W.dtype), name)
