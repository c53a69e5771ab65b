"""Judge a run's answers by rules, beside those of its base: a scorecard, the worst answers, and a verdict.

python evaluate.py lora-pairs-r16                        on the run's own held-out records
python evaluate.py lora-pairs-r16 --data test.jsonl      on the records of a file
python evaluate.py lora-pairs-r16 --temperature 0.3      sampled instead of greedy
python evaluate.py lora-pairs-r16 --out report           report.json, report.md and answers.jsonl as well
torchrun --nproc-per-node 2 evaluate.py lora-pairs-r16   the same, by two processes
python evaluate.py HuggingFaceTB/SmolLM2-135M-Instruct --data test.jsonl      a model by itself

Base and run get the same prompts, seeds and settings. Rules cannot tell whether an answer is true or helpful.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import runtime.start  # noqa: F401 - before what takes seconds to import
from jobs.adapting.adapted import check_free
from jobs.judging import report
from jobs.judging.judge import How, judge
from jobs.judging.material import Asked, Wish, gather
from jobs.judging.rendering import plain
from jobs.judging.rules import Limits
from jobs.judging.scores.faithfulness import check_packages
from jobs.judging.scores.fluency import Scaffolding
from jobs.judging.scores.safety import LISTED, read_word_list
from jobs.judging.sides import Opened, open_sides
from jobs.runs.preflight import check_writable
from models.generation.choosing import Sampling
from runtime.console import say
from runtime.device import Machine, pick_machine
from runtime.errors import UsageError
from runtime.processes.alike import check_alike, check_read_alike
from runtime.processes.command import run_command
from runtime.processes.world import world
from runtime.settings.config import FOLDER, ProcessSettings, from_command_line
from runtime.settings.fields import setting
from runtime.storage.folders import commit_folder

WHAT, HOW, RULES = ({"group": title, "env": False} for title in ("What to judge", "Sampling", "Rules"))
A_PATH = {"pattern": rf"|{FOLDER}", "path": True, "allowed": "a path", **WHAT}


@dataclass(frozen=True, kw_only=True)
class Options(ProcessSettings):
    """The flags of evaluate.py."""

    run: str = setting(
        "", "A run, or the Hugging Face folder or hub name of a model", metavar="RUN",
        **A_PATH | {"pattern": FOLDER, "allowed": "a run's name, a folder, or a name on the hub"},
    )  # fmt: skip
    data: str = setting("", "Records to ask, as DATASET names them; empty takes those that the run held out", **A_PATH)
    columns: str | None = setting(
        None, "Columns of --data that have other names, as instruction=question; none takes the run's", **WHAT
    )
    limit: int = setting(100, "Prompts at most, spread evenly; 0 takes all", low=0, high=10**6, **WHAT)
    base_text: str = setting(
        "", "A corpus or a text file to measure forgetting on; empty takes the text that the base was trained on",
        **A_PATH,
    )  # fmt: skip
    strength: float | None = setting(None, "Strength of a LoRA run's adapter; none is 1", low=-100, high=100, **WHAT)
    out: str = setting("", "A new folder for report.json, report.md and answers.jsonl", **A_PATH)

    max_new_tokens: int = setting(256, "Tokens of an answer at most", low=1, high=10**6, **HOW)
    temperature: float = setting(
        0.0, "Logits are divided by this; 0 takes the likeliest token, 0.2 to 0.4 is usual for instructions", low=0,
        high=100, **HOW,
    )  # fmt: skip
    top_k: int | None = setting(40, "With a temperature, choose among this many likeliest tokens", low=1, **HOW)
    top_p: float | None = setting(
        0.9, "With a temperature, choose among the likeliest tokens that reach this probability", low=0, low_open=True,
        high=1, **HOW,
    )  # fmt: skip

    tolerance: float = setting(
        25.0, "How far off the wanted length an answer may be, in per cent", low=0, high=1000, **RULES
    )
    short: int = setting(25, "Words of a short answer at most", low=1, high=10**6, **RULES)
    medium: int = setting(100, "Words of a medium answer at most", low=1, high=10**6, **RULES)
    word_list: str = setting(
        "", "A file of words and phrases, one a line, that no answer should have; empty takes a few profane ones",
        **A_PATH | RULES,
    )  # fmt: skip


def check(options: Options) -> None:
    """Raises UsageError for flags that contradict one another, UserError where the report could not be written and
    where a package is missing: all before the first model is opened."""
    if options.short >= options.medium:
        raise UsageError(f"--short {options.short} must be less than --medium {options.medium}")
    if options.columns and not options.data:
        raise UsageError("--columns are those of --data, which is not given")
    if options.out:
        world().first(lambda: check_out(Path(options.out)))
    check_packages()


def check_out(folder: Path) -> None:
    """Raises UsageError or UserError where no new folder can be made there."""
    check_free(folder)
    check_writable(folder.absolute().parent)


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


def main() -> None:
    """Run the command."""
    options = from_command_line(Options, __doc__).settings
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
        world().first(lambda: commit_folder(Path(options.out), report.files(told, findings, records)))
    print(plain(told))
    if options.out:
        print(f"Files: {options.out}")


if __name__ == "__main__":
    run_command(main, many=True)
