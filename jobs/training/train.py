"""One run, from its settings to its published files."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

from jobs.exporting.pushing import Pushing
from jobs.runs import fitting
from jobs.runs.base import base_settings, find_base
from jobs.runs.job import Job, check_quantize, check_shard, identity, prepare, unread, unread_names
from jobs.runs.loop import Training, Watch
from jobs.runs.preflight import preflight
from jobs.runs.selfcheck import Names, digests, self_check
from jobs.summaries.result import print_result
from jobs.summaries.summary import summary_of
from jobs.summaries.tracked import track_end, tracking_of
from lora.adapter import Adapter
from lora.attach import using
from lora.optim import check_optimizer
from runtime import report
from runtime.console import say
from runtime.device import Machine, pick_machine
from runtime.errors import UserError
from runtime.processes.alike import check_alike
from runtime.processes.world import world
from runtime.settings.config import EARLIER, SHAPE, Settings, has_records
from runtime.settings.fields import format_value, settings_of
from runtime.settings.sources import Resolved, describe
from runtime.start import command_line
from runtime.storage.runs import Run, RunLock, WatchedRun, claim, open_run
from runtime.tracking.tracking import Tracking, check_trackers
from runtime.training import resume
from runtime.training.reduction import check_parts


def finish(job: Job, run: Run, state: resume.State, start: Names, tracking: Tracking) -> None:
    """Check what was trained, score and sample the best weights, publish them, and print a summary."""
    peak_memory = job.machine.peak_memory()
    world().barrier()  # what the first process saved, the others read
    files = self_check(job, run, state, start) if job.kind == "lora" else run.read()
    say("Scoring the whole held-out text, and sampling ...")
    job.load_artifact(files, str(run.folder))
    result = asdict(state) | {"val_loss": job.evaluate(), "peak_memory": peak_memory}
    result["tokens_per_second"] = state.step * job.data.tokens_in_step / state.seconds
    summary = summary_of(job)
    result |= summary.figures(result["val_loss"])
    sample = summary.sample if not job.settings.shard else lambda: None  # a model in pieces takes too long to speak
    samples = {"": sample()}
    if job.kind == "lora":
        with using(job.model):
            result["base_val_loss"] = job.evaluate()
            samples = {"with the adapter": samples[""], "without it": sample()}
    if not job.settings.shard:
        result["samples"] = summary.told(samples)
    world().barrier()  # nobody reads any more what is now moved
    run.publish(result)
    world().barrier()
    track_end(tracking, run, samples)
    print_result(job, run, result)
    if job.settings.shard:
        print(f"➡️  To see what it says: {command_line('generate.py', '--run', run.name)}")
    else:
        summary.print(result["samples"])


def begin(given: Resolved, told: bool = True) -> tuple[Machine, Run | None]:
    """Say what was chosen, where it is to be told; the machine, and the base where there is one. Raises UsageError for
    what cannot be, before anything is trained."""
    settings = given.settings
    machine = pick_machine(settings.device, settings.dtype)
    world().join(settings.collective_timeout, machine.device)
    check_alike(settings.as_dict(), str(machine))
    check_parts(settings.parts_of_step, settings.rows_in_step, world().size, settings.reduce)
    for line in (*(describe(given) if told else ()), *unread(given), *machine.notes):
        say(line)
    check_optimizer(settings.optimizer, machine.device)
    check_quantize(settings, machine)
    check_shard(settings, machine)
    world().first(lambda: check_trackers(settings.trackers))
    world().first(Pushing(settings).check)
    if not settings.adapting:
        return machine, None
    with world().machine_by_machine():
        return machine, find_base(settings, [n for n in SHAPE if given.explicit(n)])


def train(given: Resolved, pushing: Pushing | None = None, watch: Watch | None = None) -> Run:
    """One run, from its settings to its published files; an identical finished run is left alone.

    watch: what `Training` asks after each evaluation; a run that is watched is one of many, so its settings are not
    told. Raises PrunedRunError where it stops the run.
    """
    settings, (machine, base) = given.settings, begin(given, told=watch is None)
    if settings.adapting and not base:
        say(f"There is no trained base in {settings.checkpoints_dir} yet, and LoRA adapts one: training it first")
        base = train(base_settings(given))
    given = fitting.fitted(given, machine, base)
    with world().machine_by_machine():
        job = prepare(given, machine, base)
    start = digests(Adapter.from_model(job.model)) if job.kind == "lora" else {}
    stepper = job.stepper()
    run = claimed(job)
    if run.finished:
        print_finished(run)
        return run
    with world().holding(RunLock(run.folder)):
        world().first(lambda: preflight(job, run))
        say_why_another(run, job.plain_name)
        print(report.banner(settings, unread_names(settings)))
        if base:
            print(f"   Base: {base.name}, {'records' if has_records(settings.dataset) else 'text'}: {job.data.name}")
        print(report.statistics(job.model.get_parameter_info(), settings.use_lora), flush=True)
        on_best = partial((pushing or Pushing(settings)).save, job, run)
        with tracking_of(job, run) as tracking:
            training = Training(job, run, stepper, on_best, tracking, watch)
            finish(job, run, training.all_steps(), start, tracking)
    return run


def claimed(job: Job) -> Run:
    """The folder of the run, which the first process claims and writes."""
    settings, root = job.settings, Path(job.settings.checkpoints_dir)
    about = job.metadata()
    names = (job.plain_name, settings.run_name)
    if world().size == 1:
        return claim(root, *names, about, settings.fresh, identity)
    name = world().first(lambda: claim(root, *names, about, settings.fresh, identity).name)
    if not (run := open_run(root / name)):
        raise UserError(
            f"process {world().rank} sees no {root / name}, which the first has made: several processes need a "
            "CHECKPOINTS_DIR that all machines share"
        )
    return run if world().leads else WatchedRun(run.folder, run.metadata)


def print_finished(run: Run) -> None:
    """Say that there is nothing to do, and how to do it all the same."""
    print(f"{run.name} is finished already, with these settings: {run.artifact}")
    words = [*(word for word in sys.argv[1:] if word != "--fresh"), "--fresh"]
    print(f"➡️  To train it afresh, in the same environment: {command_line('training.py', *words)}")


def say_why_another(run: Run, plain_name: str) -> None:
    """Say which settings differ where a run of the plain name has others, and how to train its weights further."""
    other = open_run(run.folder.with_name(plain_name))
    if other is None or other.folder == run.folder or run.metadata["settings"].get("run_name"):
        return
    theirs, mine = EARLIER | other.metadata["settings"], run.metadata["settings"]
    rows = [row for row in settings_of(Settings) if row.identity and row.name in theirs]
    rows = [row for row in rows if theirs[row.name] != mine[row.name]]
    differing = ", ".join(f"{row.variable}={format_value(theirs[row.name])}" for row in rows) or "another text or base"
    say(f"{plain_name} was trained with {differing}, so this is another run, {run.name}, which begins anew")
    if other.kind != "lora" and other.finished and any(row.name == "max_iters" for row in rows):
        again = command_line("training.py", "--base", plain_name, "--dataset", mine["dataset"])
        say(f"(its learning rate has fallen to MIN_LR by then; to train its weights further: {again})")
