"""What a run needs to go on exactly where it was: trained tensors, optimizer, and a small state.

Batches, rates and dropout are functions of the step, so no generator has to be saved.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
from torch import nn

from runtime.checkpoint import pack, read_json, to_json, unpack
from runtime.steps import Stepper
from runtime.storage import DamagedError

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


def to_files(stepper: Stepper, state: State) -> dict[str, bytes]:
    """The files of a resumable step."""
    trained = _trained(stepper.model)
    moments = {
        f"{name}/{key}": torch.as_tensor(value)
        for name, p in trained.items()
        for key, value in stepper.optimizer.state.get(p, {}).items()
    }
    about = asdict(state) | {"scaler": stepper.scaler.state_dict()}
    return {WEIGHTS: pack(dict(trained)), OPTIMIZER: pack(moments), STATE: to_json(about)}


def restore(stepper: Stepper, files: dict[str, bytes], where: str) -> State:
    """Bring a fresh stepper to a resumable step. Raises DamagedError for files that do not fit."""
    about = read_json(files[STATE], f"{where}/{STATE}")
    weights, moments = (unpack(files[name], f"{where}/{name}") for name in (WEIGHTS, OPTIMIZER))
    trained = _trained(stepper.model)
    if weights.keys() != trained.keys() or any(weights[name].shape != p.shape for name, p in trained.items()):
        raise DamagedError(f"{where}/{WEIGHTS} holds other tensors than this run trains")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(weights[name])
    saved = stepper.optimizer.state_dict()
    order = {id(p): name for name, p in trained.items()}
    for index, p in enumerate(stepper.parameters):
        start = f"{order[id(p)]}/"
        saved["state"][index] = {key.removeprefix(start): t for key, t in moments.items() if key.startswith(start)}
    stepper.optimizer.load_state_dict(saved)
    stepper.scaler.load_state_dict(about.pop("scaler"))
    if about.keys() != {field.name for field in fields(State)}:
        raise DamagedError(f"{where}/{STATE} is damaged: it holds {', '.join(about)}")
    return State(**about)
