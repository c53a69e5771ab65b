"""A base's folder <-> the model: `config.json` with its config, `model.safetensors` with its weights."""

from __future__ import annotations

import torch
from torch import nn

from lora.attach import base_tensors
from models.bigram_lm_v2_lora import BigramLanguageModelLoRA
from models.config import ModelConfig
from runtime.errors import UserError, join_problems
from runtime.storage.encoding import read_json, to_json
from runtime.storage.folders import CorruptedError, Files
from runtime.storage.tensors import TensorFile, differences, pack

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def to_files(model: BigramLanguageModelLoRA) -> Files:
    """The model's base as files, ready to be committed; adapters are not in it. Raises UserError for a tied head."""
    if model.lm_head.weight is model.token_embedding.weight:
        raise UserError("lm_head and token_embedding share one weight, which cannot be saved yet; give the head a copy")
    return {CONFIG: to_json(model.config.as_dict()), WEIGHTS: pack(base_tensors(model))}


def config_from(files: Files, where: str) -> ModelConfig:
    """The config of the model that these files hold. Raises UserError where it is missing or makes no sense."""
    if CONFIG not in files or WEIGHTS not in files:
        raise UserError(f"{where} holds no model: {CONFIG} and {WEIGHTS} are needed")
    values = read_json(files[CONFIG], f"{where}/{CONFIG}")
    try:
        return ModelConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{where}/{CONFIG}: {error}") from None
    except (ValueError, TypeError) as error:
        raise CorruptedError(f"{where}/{CONFIG} is corrupted: {error}") from None


def _check_size(config: ModelConfig, tensors: TensorFile, where: str) -> None:
    """Raises CorruptedError for a config that needs more weights than there are, before anybody makes room for them."""
    least = (config.vocab_size + config.max_positions) * config.n_embd
    if least > sum(tensor.numel() for tensor in tensors.described.values()) or config.n_layer > len(tensors):
        raise CorruptedError(f"{where}/{WEIGHTS} holds fewer weights than {CONFIG} needs")


def load_weights(model: nn.Module, files: Files, where: str) -> None:
    """Copy a base's weights into a model without adapters.

    Raises UserError that names what is missing, unexpected or misshapen, all together, before the model is touched.
    """
    tensors = TensorFile(files[WEIGHTS], f"{where}/{WEIGHTS}")
    _check_fit(model, tensors, where)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def _check_fit(model: nn.Module, tensors: TensorFile, where: str) -> None:
    if problems := differences(dict(model.named_parameters()), tensors.described):
        raise UserError(f"{where}/{WEIGHTS} does not fit its {CONFIG}: {join_problems(sorted(problems))}")


def from_files(files: Files, where: str, dropout: float = 0.0) -> BigramLanguageModelLoRA:
    """The model that these files hold, on the CPU, with no adapter."""
    config, tensors = config_from(files, where), TensorFile(files[WEIGHTS], f"{where}/{WEIGHTS}")
    _check_size(config, tensors, where)
    model = BigramLanguageModelLoRA.from_config(config, dropout, "meta")  # nothing is drawn that would be overwritten
    _check_fit(model, tensors, where)
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in tensors.items()}, assign=True)
    return model
