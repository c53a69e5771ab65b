"""A run that goes on from saved files is the run that was never interrupted; files that do not fit are refused."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from tiny_steps import CPU, Fp16, Tiny, adamw, batch, same, stepper, weights

from runtime.device import Machine
from runtime.storage import folders
from runtime.storage.folders import CorruptedError
from runtime.storage.tensors import pack, unpack
from runtime.training.resume import OPTIMIZER, STATE, WEIGHTS, State, restore, to_files
from runtime.training.steps import Stepper

WHERE = "checkpoints/base/step-000003"


def steps(one: Stepper, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        one.step(step)
        losses.append(one.read_loss())
    return losses


def fresh(seed: int = 0, **changes) -> Stepper:
    """A stepper that has not taken a step, on a model of its own."""
    return stepper(Tiny(seed), parts=2, batch=lambda step: batch(step, rows=7), **changes)


MACHINES = {"fp32": CPU, "bf16": Machine(CPU.device, torch.bfloat16), "scaler": Fp16(CPU.device, torch.float32)}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize("n", [0, 1, 4])
def test_n_steps_resumed_for_n_more_are_2n_steps_bit_for_bit(tmp_path, machine, n):
    whole = fresh(machine=machine)
    losses = steps(whole, 0, 2 * n + 2)
    cut = fresh(machine=machine)
    first = steps(cut, 0, n)
    folders.commit_folder(tmp_path / "step", to_files(cut, State(step=n)))
    torch.manual_seed(12345)
    again = fresh(seed=99, machine=machine)
    again.model.load_state_dict(Tiny().state_dict())  # what is frozen comes from the base
    state = restore(again, folders.read_folder(tmp_path / "step"), WHERE)
    assert state == State(step=n) and same(weights(cut), weights(again))
    assert first + steps(again, n, 2 * n + 2) == losses
    assert same(weights(whole), weights(again)) and whole.scaler.state_dict() == again.scaler.state_dict()


def test_resuming_many_times_is_no_different():
    whole = fresh()
    losses = steps(whole, 0, 6)
    one, seen = fresh(), []
    for step in range(6):
        files = to_files(one, State(step=step))
        one = fresh()
        restore(one, files, WHERE)
        seen += steps(one, step, step + 1)
    assert seen == losses and same(weights(whole), weights(one))


def test_saving_disturbs_nothing():
    whole, saving = fresh(), fresh()
    steps(whole, 0, 4)
    steps(saving, 0, 2)
    for data in to_files(saving, State(step=2)).values():
        bytes(data)
    steps(saving, 2, 4)
    assert same(weights(whole), weights(saving))


def test_only_what_trains_is_saved():
    one = fresh()
    steps(one, 0, 1)
    files = to_files(one, State())
    trained = {name for name, p in one.model.named_parameters() if p.requires_grad}
    assert unpack(files[WEIGHTS], "").keys() == trained == {name for name, _ in Tiny().named_parameters()} - {"frozen"}
    assert {key.partition("/")[0] for key in unpack(files[OPTIMIZER], "")} == trained
    assert files.keys() == {WEIGHTS, OPTIMIZER, STATE}


def test_parameters_are_matched_by_name_and_not_by_their_place():
    model = Tiny()
    ordered, reverse = adamw(model), Tiny()
    one = stepper(model, ordered)
    steps(one, 0, 2)
    groups = [{"params": group["params"][::-1]} for group in adamw(reverse).param_groups]
    other = stepper(reverse, torch.optim.AdamW(groups, fused=True, weight_decay=0.0))
    restore(other, to_files(one, State(step=2)), WHERE)
    steps(one, 2, 4)
    steps(other, 2, 4)
    assert all(torch.equal(p, dict(other.model.named_parameters())[name]) for name, p in one.model.named_parameters())


def test_a_parameter_that_had_no_gradient_yet_has_no_state_and_needs_none():
    one, other = fresh(), fresh()
    for each in (one, other):
        each.model.spare = torch.nn.Parameter(torch.ones(2))
        each.optimizer.add_param_group({"params": [each.model.spare]})
        each.parameters.append(each.model.spare)
    steps(one, 0, 2)
    restore(other, to_files(one, State(step=2)), WHERE)
    assert same(weights(one), weights(other)) and not other.optimizer.state[other.model.spare]
    assert steps(one, 2, 4) == steps(other, 2, 4)


@pytest.mark.parametrize(
    "state",
    [
        State(),
        State(7, 1.5, 6, 1, 12.25),
        State(10**9, math.inf, 0, 10**6, 1e300),
        State(3, 1.0000000000000002, 2, 0, 0),
    ],
)
def test_the_state_survives_exactly(state):
    one = fresh()
    assert restore(fresh(), to_files(one, state), WHERE) == state


def test_a_run_may_move_between_a_machine_with_a_scaler_and_one_without():
    for source, target in ((CPU, MACHINES["scaler"]), (MACHINES["scaler"], CPU)):
        one, other = fresh(machine=source), fresh(machine=target)
        steps(one, 0, 2)
        restore(other, to_files(one, State(step=2)), WHERE)
        assert same(weights(one), weights(other))
        steps(other, 2, 3)


# --- files that do not fit ------------------------------------------------------------------------------------------


def changed(name: str, edit):
    """A change to one file of a resumable step: of its tensors or its JSON object, in place."""

    def change(files: dict[str, bytes]) -> None:
        value = json.loads(files[name]) if name == STATE else unpack(files[name], "")
        edit(value)
        files[name] = json.dumps(value).encode() if name == STATE else pack(value)

    return change


def set_to(**values):
    return lambda about: about.update(values)


def reshaped(key: str):
    return lambda tensors: tensors.update({key: tensors[key][:-1]})


def renamed(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


BAD = {
    "no weights": (WEIGHTS, lambda files: files.pop(WEIGHTS)),
    "no optimizer": (OPTIMIZER, lambda files: files.pop(OPTIMIZER)),
    "no state": (STATE, lambda files: files.pop(STATE)),
    "no files": (STATE, lambda files: files.clear()),
    "weights cut short": (WEIGHTS, lambda files: files.update({WEIGHTS: bytes(files[WEIGHTS])[:-1]})),
    "optimizer cut short": (OPTIMIZER, lambda files: files.update({OPTIMIZER: bytes(files[OPTIMIZER])[:9]})),
    "state cut short": (STATE, lambda files: files.update({STATE: files[STATE][:-4]})),
    "a weight missing": (WEIGHTS, changed(WEIGHTS, lambda tensors: tensors.pop("head.bias"))),
    "a weight more": (WEIGHTS, changed(WEIGHTS, set_to(frozen=torch.zeros(8)))),
    "a weight of another shape": (WEIGHTS, changed(WEIGHTS, reshaped("head.weight"))),
    "a weight of another dtype": (WEIGHTS, changed(WEIGHTS, lambda t: t.update({"head.bias": t["head.bias"].half()}))),
    "a weight of another name": (WEIGHTS, changed(WEIGHTS, renamed("norm.bias", "norm.b"))),
    "a moment of another shape": (OPTIMIZER, changed(OPTIMIZER, reshaped("norm.bias/exp_avg"))),
    "a moment of nothing": (OPTIMIZER, changed(OPTIMIZER, renamed("norm.bias/step", "norm.b/step"))),
    "a moment missing": (OPTIMIZER, changed(OPTIMIZER, lambda tensors: tensors.pop("norm.bias/exp_avg"))),
    "a moment without a name": (OPTIMIZER, changed(OPTIMIZER, set_to(step=torch.tensor(1.0)))),
    "a list": (STATE, lambda files: files.update({STATE: b"[]"})),
    "no scaler": (STATE, changed(STATE, lambda about: about.pop("scaler"))),
    "a strange scaler": (STATE, changed(STATE, set_to(scaler=[1]))),
    "no step": (STATE, changed(STATE, lambda about: about.pop("step"))),
    "a key more": (STATE, changed(STATE, set_to(patience=3))),
    "a step in words": (STATE, changed(STATE, set_to(step="three"))),
    "half a step": (STATE, changed(STATE, set_to(step=2.5))),
    "a step before the first": (STATE, changed(STATE, set_to(step=-1))),
    "a best of nothing": (STATE, changed(STATE, set_to(best=None))),
}


@pytest.mark.parametrize(("file", "change"), BAD.values(), ids=BAD)
def test_files_that_do_not_fit_are_refused_before_anything_is_touched(file, change):
    one = fresh()
    steps(one, 0, 3)
    files = to_files(one, State(step=3))
    other = fresh(seed=1)
    before = weights(other)
    change(files)
    with pytest.raises(CorruptedError) as caught:
        restore(other, files, WHERE)
    assert str(caught.value).startswith(f"{WHERE}/{file}") and str(caught.value).isprintable()
    assert same(before, weights(other))
    assert steps(other, 0, 2) == steps(fresh(seed=1), 0, 2), "it can still start from the beginning"


def test_a_strange_scaler_is_refused_where_there_is_one():
    one = fresh(machine=MACHINES["scaler"])
    files = to_files(one, State())
    changed(STATE, set_to(scaler={"scale": 2.0}))(files)
    before = weights(one)
    with pytest.raises(CorruptedError, match="scaler"):
        restore(one, files, WHERE)
    assert same(before, weights(one))


def test_the_state_is_what_the_file_says_it_is():
    about = json.loads(to_files(fresh(), State(step=3, best=1.5))[STATE])
    assert about == asdict(State(step=3, best=1.5)) | {"scaler": {}}
