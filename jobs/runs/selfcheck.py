"""What must hold when a LoRA run ends, before it is said to have succeeded: else nothing is published.

The base is what it was, in memory and on disk. Every tensor of the adapter moved, as far as it had to. Everything is
finite. What was saved is what was trained, and computes the same when it is read back: a fresh base from disk has the
loss of the run's own model without the adapter, and with the adapter from disk it has the loss with it.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from jobs.runs.base import load_trained
from jobs.runs.job import Job, to_device
from lora import peft_format as adapter_files
from lora.adapter import Adapter
from lora.attach import adaptable_layers, base_tensors, using
from lora.variants.lora import LoRA
from models.files import stored_fingerprint
from models.pretrained.families import family_with
from models.transformer import Transformer
from runtime.errors import UserError, join_problems
from runtime.processes.pieces import own, whole
from runtime.storage import folders
from runtime.storage.runs import Run
from runtime.storage.tensors import differences, fingerprint
from runtime.training.resume import State
from runtime.training.steps import evaluate

FEW = 1  # batches of held-out text
SAME = 1e-4  # relative difference of losses; matmuls may sum in another order where memory lies elsewhere

Names = dict[str, str]  # <module path>.<tensor> -> fingerprint


def digests(adapter: Adapter) -> Names:
    """A fingerprint of each tensor. Of the adapter as a job is prepared it is the start of the run, also where the run
    goes on from a saved step: the A matrices come from the seed, the copies from the base."""
    return {name: fingerprint({name: t}) for name, t in adapter.named_tensors().items()}


def self_check(job: Job, run: Run, state: State, start: Names) -> folders.Files:
    """Check a LoRA run that has taken its last step; `start` are the digests of its adapter before the first.

    Returns the files of its best adapter, as they were read. Raises UserError that says which check failed.
    """
    try:
        check_finite(job)
        fresh, files, adapter = read_back(job, run)
        moving = must_have_moved(job.model, state.best_step, job.settings.block_size)
        if still := moving & unmoved(start, digests(adapter)):
            rate = f"LEARNING_RATE={job.settings.learning_rate} (too low?)"
            raise UserError(f"training with {rate} has not moved {join_problems(sorted(still))}")
        check_saved(job, adapter, state)
        check_losses(job, fresh, adapter)
    except UserError as error:
        raise UserError(f"the self-check of {run.name} failed, and nothing is published: {error}") from None
    return files


def check_finite(job: Job) -> None:
    """Raises UserError where the model in memory is not finite."""
    for name, p in job.model.named_parameters():
        if not own(p).isfinite().all():
            raise UserError(f"{name} has values that are not finite")


def read_back(job: Job, run: Run) -> tuple[Transformer, folders.Files, Adapter]:
    """The base, and the files and the adapter of the run's best weights, from disk.

    Raises UserError where the base in memory or on disk is another than the run began with, or the adapter is gone.
    """
    if not (saved := run.saved("best")):
        raise UserError("the best weights that it saved are gone")
    fresh, _ = load_trained(job.base.run, job.settings.quantize)
    memory, disk = (base_tensors(model) for model in (job.model, fresh))
    if differences(memory, disk) or not all(torch.equal(whole(t).cpu(), disk[name]) for name, t in memory.items()):
        if stored_fingerprint(job.base.run.read(), "") == job.base.sha256:  # not asked where both are equal
            raise UserError("the base's weights changed, which must never be")
        raise UserError(f"the base in {job.base.run.artifact} is no longer the one that this run began with")
    folder = saved[-1][1]
    files = folders.read_folder(folder)
    adapter = adapter_files.from_files(files, str(folder), family_with)
    return fresh, files, adapter


def unmoved(start: Names, now: Names) -> set[str]:
    """The tensors that are what they were."""
    return {name for name, digest in now.items() if start.get(name) == digest}


def must_have_moved(model: nn.Module, steps: int, block_size: int) -> set[str]:
    """The tensors that so many steps on windows of this size cannot have left as they were: all that have a gradient.

    While B is zero, A has none, so after one step only B and the copies of embeddings and biases must have moved. Two
    tensors never have one: what is added to all scores of a query changes no attention, as the bias of k_proj is, and
    with one position there is nothing to weigh, so with BLOCK_SIZE=1 q_proj and k_proj have no effect.
    """
    idle = ("q_proj", "k_proj") if block_size == 1 else ()
    found = set()
    for path, layer in adaptable_layers(model).items():
        name = path.rpartition(".")[2]
        for module in layer.active_modules():
            soon = {module.copy_of("weight"), module.copy_of("bias")}
            soon |= set(module.lora_plus_parameters()) if isinstance(module, LoRA) else set()
            for key, p in module.named_parameters():
                effect = name not in idle and (name, key) != ("k_proj", "bias")
                if p.requires_grad and effect and (steps > 1 or p in soon):
                    found.add(f"{path}.{key}")
    return found


def check_saved(job: Job, adapter: Adapter, state: State) -> None:
    """Raises UserError where the adapter on disk has other tensors than the one in memory or, where no step came after
    it, other values. (A GPU that passes a step again after a stop may differ in last bits from what it saved then.)"""
    exact = state.best_step == state.step and job.machine.device.type == "cpu"
    here, there = Adapter.from_model(job.model).named_tensors(), adapter.named_tensors()
    if wrong := sorted(here.keys() ^ there.keys()):
        side = "on disk" if wrong[0] in here else "in memory"
        raise UserError(f"{wrong[0]} is missing {side}")
    for name, tensor in there.items():
        if exact and not torch.equal(tensor, here[name]):  # which other shapes are not either
            raise UserError(f"{name} on disk is not what was trained")


def check_losses(job: Job, fresh: Transformer, adapter: Adapter) -> None:
    """Raises UserError where a fresh base, without and with the adapter from disk, computes something else than the
    run's own model with the same values in the adapter that it trained; these stay in it."""
    few = job.data.validation(FEW)
    adapter.attach_to(fresh, base_sha256=job.base.sha256)
    to_device(fresh, job.settings, job.machine)
    with using(job.model), using(fresh):
        without, expected = (evaluate(model, few, job.machine) for model in (job.model, fresh))
    if not math.isclose(without, expected, rel_tol=SAME):
        raise UserError(f"without its adapter the model has loss {without:.6f}, and its base {expected:.6f}")
    for path, tensors in adapter.tensors.items():
        job.model.get_submodule(path).lora["default"].load_adapter_state(tensors)
    loss, expected = (evaluate(model, few, job.machine) for model in (fresh, job.model))
    if not math.isclose(loss, expected, rel_tol=SAME):
        raise UserError(f"read back from disk, the adapter has loss {loss:.6f}, and in the run itself {expected:.6f}")
