"""A base's folder <-> the model: `config.json` with its shape, `model.safetensors` with its weights."""

from __future__ import annotations

from dataclasses import asdict, fields

import torch
from torch import Tensor, nn

from lora.attach import base_tensors
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA, ModelShape
from runtime.encoding import differences, pack, read_json, to_json, unpack
from runtime.errors import UserError, join_problems
from runtime.storage import DamagedError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def to_files(model: BigramLanguageModelLoRA) -> dict[str, bytes]:
    """The model's base as files, ready to be committed; adapters are not in it."""
    return {CONFIG: to_json(asdict(model.shape)), WEIGHTS: pack(base_tensors(model))}


def shape_from(files: dict[str, bytes], where: str) -> ModelShape:
    """The shape of the model that these files hold. Raises UserError where it is missing or makes no sense."""
    if CONFIG not in files or WEIGHTS not in files:
        raise UserError(f"{where} holds no model: {CONFIG} and {WEIGHTS} are needed")
    about = read_json(files[CONFIG], f"{where}/{CONFIG}")
    kinds = {field.name: bool if field.name == "bias" else int for field in fields(ModelShape)}
    if about.keys() != kinds.keys() or any(type(about[name]) is not kind for name, kind in kinds.items()):
        raise DamagedError(f"{where}/{CONFIG} is damaged: it should hold {', '.join(kinds)}")
    shape = ModelShape(**about)
    if any(about[name] < 1 for name, kind in kinds.items() if kind is int) or shape.n_embd % shape.n_head:
        raise DamagedError(f"{where}/{CONFIG} is damaged: no model has the shape {about}")
    return shape


def _check_size(shape: ModelShape, tensors: dict[str, Tensor], where: str) -> None:
    """Raises DamagedError for a shape that needs more weights than there are, before anybody makes room for them."""
    least = (shape.vocab_size + shape.block_size) * shape.n_embd
    if least > sum(tensor.numel() for tensor in tensors.values()) or shape.n_layer > len(tensors):
        raise DamagedError(f"{where}/{WEIGHTS} holds fewer weights than the shape in {CONFIG} needs")


def load_weights(model: nn.Module, files: dict[str, bytes], where: str) -> None:
    """Copy a base's weights into a model without adapters.

    Raises UserError that names what is missing, unexpected or misshapen, all together, before the model is touched.
    """
    _copy(model, unpack(files[WEIGHTS], f"{where}/{WEIGHTS}"), where)


def _copy(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    wanted = dict(model.named_parameters())
    if problems := differences(wanted, tensors):
        raise UserError(f"{where}/{WEIGHTS} does not fit its {CONFIG}: {join_problems(sorted(problems))}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def from_files(files: dict[str, bytes], where: str, dropout: float = 0.0) -> BigramLanguageModelLoRA:
    """The model that these files hold, on the CPU, with no adapter."""
    shape, tensors = shape_from(files, where), unpack(files[WEIGHTS], f"{where}/{WEIGHTS}")
    _check_size(shape, tensors, where)
    model = BigramLanguageModelLoRA.from_shape(shape, dropout)
    _copy(model, tensors, where)
    return model
