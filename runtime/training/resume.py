"""Resumable state: trained tensors and buffers, optimizer, and how far the run is.

Batches, rates and dropout are functions of the step, so no generator has to be saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor, nn

from runtime.errors import join_problems
from runtime.processes.pieces import write
from runtime.storage.encoding import read_json, to_json
from runtime.storage.folders import CorruptedError, Files
from runtime.storage.tensors import TensorFile, fingerprint, pack
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


def _kept(stepper: Stepper) -> dict[str, Tensor]:
    """What the optimizer keeps of each parameter, by the parameter's name and its own for it."""
    state, trained = stepper.optimizer.state, _trained(stepper.model).items()
    return {f"{name}/{key}": value for name, p in trained for key, value in state.get(p, {}).items()}


def to_files(stepper: Stepper, state: State) -> Files:
    """The files of a resumable step."""
    about = asdict(state) | {"scaler": stepper.scaler.state_dict()}
    return {WEIGHTS: pack(_changing(stepper.model)), OPTIMIZER: pack(_kept(stepper)), STATE: to_json(about)}


def digest(stepper: Stepper) -> str:
    """A fingerprint of everything that steps change, but for what the optimizer keeps."""
    return fingerprint(_changing(stepper.model))


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
    moments = TensorFile(files[OPTIMIZER], f"{where}/{OPTIMIZER}")
    kept = _make_state(stepper, moments)
    with torch.no_grad():
        for tensors, saved in ((changing, weights), (kept, moments)):
            for name, tensor in tensors.items():
                write(tensor, saved[name])
    if scaler:  # none was saved where the run began on a machine that needs none
        stepper.scaler.load_state_dict(scaler)
    return state


def _make_state(stepper: Stepper, moments: TensorFile) -> dict[str, Tensor]:
    """What the optimizer keeps, as it is at first, of the parameters that a file has something of; of the others no
    gradient came yet. Raises CorruptedError where the file holds other tensors than these."""
    trained = _trained(stepper.model)
    named = {key.partition("/")[0] for key in moments}
    stepper.make_state(p for name, p in trained.items() if name in named)
    kept = _kept(stepper)
    ours, theirs = _described(kept), _described(moments.described)
    if wrong := [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)]:
        stepper.optimizer.state.clear()
        raise CorruptedError(f"{moments.name} does not fit what this run trains: {join_problems(wrong, 3)!a}")
    return kept


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
