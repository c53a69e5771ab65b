"""Whether a run fits into the memory that is free, and with which settings it would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from jobs.runs.base import block_size_for
from jobs.runs.footprint import Footprint, Plan, Shape, footprint, linears_of
from jobs.runs.job import check_quantize, config_for, lora_config
from models.files import shape_in
from runtime.console import say
from runtime.device import Machine
from runtime.errors import UsageError, UserError
from runtime.memory import free_memory
from runtime.processes.world import world
from runtime.report import size
from runtime.settings.config import EARLIER, Settings
from runtime.settings.sources import Resolved
from runtime.storage.runs import Run, all_runs
from runtime.training.reduction import check_parts

CLOSE, TOO_MUCH = 0.85, 1.15  # of what is free: a run that takes more is warned of, or refused
LARGEST_BATCH = 1024  # that BATCH_SIZE=auto takes
VOCABULARY = {"char": 96, "gpt2": 50257}  # tokens; a text with characters beyond ASCII has a few more


def plan_of(given: Resolved, machine: Machine, base: Run | None) -> Plan:
    """What decides how much memory the run takes. Of the base only config.json is read, and which dtype its weights
    have. Raises UsageError and UserError as `prepare` does for settings that do not fit the base."""
    settings = given.settings
    check_quantize(settings, machine)
    if base:
        shape = shape_of(base)
        positions = block_size_for(given, base, shape.config.max_positions)
    else:
        vocabulary = VOCABULARY.get(settings.tokenizer, settings.vocab_size)
        shape, positions = Shape(config_for(settings, vocabulary)), settings.block_size
    return Plan(
        shape,
        machine,
        lora_config(settings) if settings.use_lora else None,
        settings.batch_size or 1,
        positions,
        settings.gradient_accumulation_steps,
        settings.checkpoint_activations,
        settings.quantize,
        settings.dropout,
        settings.optimizer,
        settings.step_parts,
        settings.reduce,
        world().size,
        settings.shard,
    )


def shape_of(base: Run) -> Shape:
    """The shape of a base, before its weights are read."""
    config, stored, form, family = shape_in(base.artifact)
    return Shape(config, stored, form, family.aliases() if family else {})


def fitted(given: Resolved, machine: Machine, base: Run | None) -> Resolved:
    """The settings with BATCH_SIZE as a number, of a run that fits; one line tells its memory.

    Raises UserError, with the settings that would fit, for a run that does not, unless FORCE is set; where it is close
    one line warns.
    """
    plan, free = plan_with_batch(given, machine, base)
    found = footprint(plan)
    say(told(found, free))
    check_fits(plan, found, free, given.settings.force)
    settings = replace(given.settings, batch_size=plan.rows)
    check_parts(settings.parts_of_step, settings.rows_in_step, world().size, settings.reduce)
    return replace(given, settings=settings)


def plan_with_batch(given: Resolved, machine: Machine, base: Run | None) -> tuple[Plan, int | None]:
    """The plan of a run with BATCH_SIZE=auto as a number, and the bytes that are free; lines tell what that came to,
    and of a rank that is too high."""
    plan, free = plan_of(given, machine, base), free_memory(machine)
    if free is not None and not machine.is_cuda:  # the processes of a machine share its memory
        free //= world().launch.local_size
    if given.settings.batch_size is None:
        fits = known_batch(given.settings, plan) or largest_batch(plan, free)
        plan = replace(plan, rows=-world().highest(-fits))  # on each of several processes
        say(f"BATCH_SIZE=auto: {plan.rows}")
    for line in ranks_told(plan):
        say(line)
    return plan, free


def told(found: Footprint, free: int | None) -> str:
    """One line on a run's memory."""
    parts = {"weights": found.weights, "gradients": found.gradients, "optimizer": found.optimizer}
    parts |= {"kept for backward": found.activations.total()}
    named = ", ".join(f"{name} {size(count)}" for name, count in parts.items())
    return f"Memory: about {size(found.peak)} at the peak ({named}); {free_told(free)}"


def free_told(free: int | None) -> str:
    """How much is free, in words."""
    return "this system does not tell how much is free" if free is None else f"{size(free)} are free"


def check_fits(plan: Plan, found: Footprint, free: int | None, force: bool = False) -> None:
    """Raises UserError where a run takes more than TOO_MUCH of what is free; a line warns where it takes more than
    CLOSE."""
    if free is None or found.peak <= CLOSE * free:
        return
    needs = f"this run takes about {size(found.peak)} at its peak, and {size(free)} are free"
    if found.peak > TOO_MUCH * free and not force:
        raise UserError(f"{needs}; {what_fits(plan, free)}, and FORCE=True begins all the same")
    say(f"warning: {needs}; it may run out of memory")


def what_fits(plan: Plan, free: int) -> str:
    """The first settings with which a run fits, in words."""
    least = plan, footprint(plan)
    for cheaper in cheaper_plans(plan):
        found = footprint(cheaper)
        if found.peak <= CLOSE * free:
            return f"with {' '.join(changes(plan, cheaper))} it takes {size(found.peak)}"
        least = min(least, (cheaper, found), key=lambda each: each[1].peak)
    if least[0] is plan:
        return "no setting makes it smaller: it needs a smaller model, or fewer tokens in BLOCK_SIZE"
    with_all = f"with {' '.join(changes(plan, least[0]))} it still takes {size(least[1].peak)}"
    return f"{with_all}: it needs a smaller model, or fewer tokens in BLOCK_SIZE"


def cheaper_plans(plan: Plan) -> Iterator[Plan]:
    """The same run in less and less memory: by what is made again, in 4 bits, then with fewer rows at a time."""
    order = ("none", "cheap", "block")
    for keeps in order[order.index(plan.keeps) + 1 :]:
        plan = replace(plan, keeps=keeps)
        yield plan
    if plan.lora and plan.form == "none" and plan.machine.device.type != "mps":
        plan = replace(plan, quantize="nf4")
        yield plan
    if plan.processes > 1 and not plan.shard and plan.form == "none" and plan.optimizer in ("adamw", "muon"):
        plan = replace(plan, shard=True)
        yield plan
    if not plan.lora:  # the sums of parts' gradients are as large as the model
        plan = replace(plan, reduce="fast")
    if plan.parts:
        more = range(plan.parts + 1, plan.rows * plan.batches + 1)
        yield from (replace(plan, parts=parts) for parts in more if parts % plan.parts == 0)
        return
    rows = plan.rows
    for fewer in (rows // batches for batches in range(2, rows + 1) if rows % batches == 0):
        yield replace(plan, rows=fewer, batches=plan.batches * rows // fewer)


def changes(plan: Plan, other: Plan) -> list[str]:
    """The settings in which two plans differ, as one would write them."""
    found = {
        "CHECKPOINT_ACTIVATIONS": (plan.keeps, other.keeps),
        "QUANTIZE": (plan.quantize, other.quantize),
        "BATCH_SIZE": (plan.rows, other.rows),
        "GRADIENT_ACCUMULATION_STEPS": (plan.batches, other.batches),
        "STEP_PARTS": (plan.parts, other.parts),
        "SHARD": (plan.shard, other.shard),
        "REDUCE": (plan.reduce, other.reduce),
    }
    return [f"{name}={new}" for name, (old, new) in found.items() if new != old]


def largest_batch(plan: Plan, free: int | None) -> int:
    """The rows that BATCH_SIZE=auto takes: the largest power of two, up to LARGEST_BATCH, that fits. 1 where not even
    that fits, for what fits is told then. Raises UsageError where nobody tells how much is free."""
    if free is None:
        raise UsageError("BATCH_SIZE=auto: this system does not tell how much memory is free; give it a number")
    rows = LARGEST_BATCH
    while rows > 1 and footprint(replace(plan, rows=rows)).peak > CLOSE * free:
        rows //= 2
    return rows


def known_batch(settings: Settings, plan: Plan) -> int | None:
    """The batch size of the newest run that has these settings but for that: what BATCH_SIZE=auto came to when it
    began. None where there is none, or it is to be trained afresh."""
    resolved = {"batch_size", "max_iters", "warmup_iters", "block_size"}  # a run's own, which run.json has as numbers
    asked = settings.identity()
    for run in [] if settings.fresh else all_runs(Path(settings.checkpoints_dir), warn=False)[::-1]:
        theirs = EARLIER | run.metadata["settings"]
        same = all(theirs.get(name) == value for name, value in asked.items() if name not in resolved)
        if same and not run.aside and theirs.get("block_size") == plan.positions:
            return theirs.get("batch_size")
    return None


def ranks_told(plan: Plan) -> list[str]:
    """A line where the rank is more than linears make sense of."""
    linears = linears_of(plan.shape.model, plan) if plan.lora else {}
    adapted = {path.rpartition(".")[2]: linear for path, linear in linears.items() if linear.rank}
    above = {name: one for name, one in adapted.items() if one.rank > min(one.inputs, one.outputs)}
    larger = {name: one for name, one in adapted.items() if one.rank * (one.inputs + one.outputs) > one.count}
    for found, why in ((above, "can use"), (larger, "takes in fewer parameters than it has itself")):
        if found:
            name, one = min(found.items(), key=lambda item: min(item[1].inputs, item[1].outputs))
            most = min(one.inputs, one.outputs) if found is above else (one.count - 1) // (one.inputs + one.outputs)
            return [f"warning: LORA_RANK={one.rank} is more than {name} ({one.outputs} x {one.inputs}) {why}: {most}"]
    return []
