"""Resumable state: trained tensors and buffers, optimizer, and how far the run is.

Batches, rates and dropout are functions of the step, so no generator has to be saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from runtime.storage.encoding import read_json, to_json
from runtime.storage.folders import CorruptedError, Files
from runtime.storage.tensors import TensorFile, pack, unpack
from runtime.training.steps import Stepper

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"


@dataclass
class State:
    """How far a run is. best: the lowest validation loss so far, reached after best_step steps; stale: evaluations
    since then; seconds: time spent in training steps."""

    step: int = 0
    best: float = float("inf")
    best_step: int = 0
    stale: int = 0
    seconds: float = 0.0


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _changing(model: nn.Module) -> dict[str, Tensor]:
    """What a step may change, by name: what trains, and the buffers that belong to a checkpoint."""
    trained, parameters = _trained(model), dict(model.named_parameters())
    return trained | {name: t for name, t in model.state_dict().items() if name not in parameters}


def to_files(stepper: Stepper, state: State) -> Files:
    """The files of a resumable step."""
    trained = _trained(stepper.model)
    moments = {
        f"{name}/{key}": torch.as_tensor(value)
        for name, p in trained.items()
        for key, value in stepper.optimizer.state.get(p, {}).items()
    }
    about = asdict(state) | {"scaler": stepper.scaler.state_dict()}
    return {WEIGHTS: pack(_changing(stepper.model)), OPTIMIZER: pack(moments), STATE: to_json(about)}


def restore(stepper: Stepper, files: Files, where: str) -> State:
    """Bring a fresh stepper to a resumable step.

    Raises CorruptedError for files that do not fit, before anything is touched.
    """
    for name in (STATE, WEIGHTS, OPTIMIZER):
        if name not in files:
            raise CorruptedError(f"{where}/{name} is missing")
    state, scaler = _read_state(stepper, read_json(files[STATE], f"{where}/{STATE}"), f"{where}/{STATE}")
    weights, changing = TensorFile(files[WEIGHTS], f"{where}/{WEIGHTS}"), _changing(stepper.model)
    if _described(weights.described) != _described(changing):
        raise CorruptedError(f"{where}/{WEIGHTS} holds other tensors than this run trains")
    saved = stepper.optimizer.state_dict()
    saved["state"] = _read_moments(stepper, unpack(files[OPTIMIZER], f"{where}/{OPTIMIZER}"), f"{where}/{OPTIMIZER}")
    with torch.no_grad():
        for name, tensor in changing.items():
            tensor.copy_(weights[name])
    stepper.optimizer.load_state_dict(saved)
    if scaler:  # none was saved where the run began on a machine that needs none
        stepper.scaler.load_state_dict(scaler)
    return state


def _described(tensors: Mapping[str, Tensor]) -> dict[str, tuple]:
    return {name: (t.dtype, t.shape) for name, t in tensors.items()}


def _is_size(value: float) -> bool:
    """Whether this is a number from 0 that arithmetic with floats can take; a loss that was never read is inf."""
    return 0 <= value < 2**63 or isinstance(value, float) and value >= 0


def _read_state(stepper: Stepper, about: dict, where: str) -> tuple[State, dict]:
    wanted, scaler = stepper.scaler.state_dict(), about.pop("scaler", None)
    if not isinstance(scaler, dict) or (wanted and scaler and scaler.keys() != wanted.keys()):
        raise CorruptedError(f"{where} is corrupted: scaler is {scaler!r}")
    for field in fields(State):
        value = about.get(field.name)
        if not (type(value) is int or type(value) is float and field.type == "float") or not _is_size(value):
            raise CorruptedError(f"{where} is corrupted: {field.name} is {value!r}")
    if unknown := about.keys() - asdict(State()).keys():
        raise CorruptedError(f"{where} is corrupted: it holds {', '.join(map(repr, unknown))}")
    return State(**about), scaler


def _read_moments(stepper: Stepper, tensors: dict[str, Tensor], where: str) -> dict[int, dict[str, Tensor]]:
    """The optimizer's own numbering of its parameters -> what it keeps of each; nothing where no gradient came yet."""
    order = {id(p): name for name, p in _trained(stepper.model).items()}
    moments: dict[str, dict[str, Tensor]] = {order[id(p)]: {} for p in stepper.parameters}
    shapes = {order[id(p)]: ((), p.shape) for p in stepper.parameters}
    for key, tensor in tensors.items():
        name, _, kind = key.partition("/")
        if name not in moments or tensor.shape not in shapes[name]:
            raise CorruptedError(f"{where} does not fit what this run trains: {key!r}")
        moments[name][kind] = tensor
    for group in stepper.optimizer.param_groups:
        names = [order[id(p)] for p in group["params"] if moments[order[id(p)]]]
        for name in names:
            if moments[name].keys() != moments[names[0]].keys():
                raise CorruptedError(f"{where} is incomplete: {name!r} and {names[0]!r} differ in what is kept of them")
    return dict(enumerate(moments.values()))
