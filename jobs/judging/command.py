"""What `evaluate.py` does: base and run answer, and rules judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.judging import report
from jobs.judging.judge import How, judge
from jobs.judging.material import Asked, Wish, gather
from jobs.judging.options import Options
from jobs.judging.rendering import plain
from jobs.judging.rules import Limits
from jobs.judging.scores.faithfulness import check_packages
from jobs.judging.scores.fluency import Scaffolding
from jobs.judging.scores.safety import LISTED, read_word_list
from jobs.judging.sides import Opened, open_sides
from models.generation.choosing import Sampling
from runtime.console import say
from runtime.device import Machine, pick_machine
from runtime.processes.alike import check_alike, check_read_alike
from runtime.processes.world import world
from runtime.storage import folders


def check(options: Options) -> None:
    """Raises UserError where the report could not be written and where a package is missing: before the first model is
    opened."""
    if options.out:
        world().first(lambda: check_out(Path(options.out)))
    check_packages()


def check_out(folder: Path) -> None:
    """Raises UsageError or UserError where no new folder can be made there."""
    folders.check_free(folder)
    folders.check_writable(folder.absolute().parent)


def sampling(options: Options) -> Sampling:
    """How tokens are chosen: greedily unless there is a temperature."""
    if not options.temperature:
        return Sampling(greedy=True)
    return Sampling(options.temperature, options.top_k, options.top_p)


def about(options: Options, opened: Opened, asked: Asked, machine: Machine) -> dict[str, Any]:
    """What the report says of the models, the prompts and how they were answered."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "strength")
    how = {"greedy": not options.temperature} | {name: getattr(options, name) for name in names}
    data = {"what": asked.what, "prompts": len(asked), "of": asked.of}
    base = opened.base.name if opened.base else None
    return {"run": opened.run.name, "base": base, "data": data, "how": how | {"machine": str(machine)}}


def run(options: Options) -> None:
    """What `evaluate.py` does."""
    machine = pick_machine(options.device, options.dtype)
    world().join(options.collective_timeout, machine.device)
    check_alike(options.as_dict(), str(machine))
    check(options)
    phrases = read_word_list(Path(options.word_list)) if options.word_list else LISTED
    wish = Wish(options.data, options.columns, options.limit, options.base_text, Path(options.data_dir))
    with world().machine_by_machine():
        opened = open_sides(Path(options.checkpoints_dir), options.run, options.strength, machine)
        material = gather(opened, wish)
    check_read_alike(prompts=[(r.asked, r.answer) for r in material.asked.records], run=opened.run.metadata)
    say(f"Asking {opened.run.name}{' and its base' * bool(opened.base)} {len(material.asked)} prompts, on {machine}")
    limits = Limits(
        options.tolerance, (options.short, options.medium), phrases, Scaffolding.of(opened.template),
        options.max_new_tokens,
    )  # fmt: skip
    findings = judge(opened, material, How(sampling(options), options.max_new_tokens, options.seed, machine), limits)
    records, notes = material.asked.records, [*opened.notes, *material.notes]
    told = report.to_report(about(options, opened, material.asked, machine), findings, records, notes)
    if options.out:
        world().first(lambda: folders.commit_folder(Path(options.out), report.files(told, findings, records)))
    print(plain(told))
    if options.out:
        print(f"Files: {options.out}")
