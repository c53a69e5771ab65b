"""Training steps on several processes against one: speed, what travels between them, memory.

python -m benchmarks.scaling                         10.7M parameters, 2 processes of 1 thread
python -m benchmarks.scaling --processes 2 4         4 processes too
python -m benchmarks.scaling --dtypes bf16 fp32      in both dtypes, which takes about four times as long
python -m benchmarks.scaling --table                 what is recorded, as the table of docs/scaling.md

All cases take turns in every round, as each has processes of its own that wait. A ratio is the median of the rounds'
own. With more than one process a step is cut into as many parts as there are processes, and with one into as many as
with the fewest: the same step.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.contest import SIZES, close, parser, tell
from benchmarks.workers import WAYS, Group, Training, asked
from runtime.device import pick_machine
from runtime.errors import UserError
from runtime.processes.command import run_command

RECORD = Path(__file__).with_name("results") / "scaling.json"
KINDS = {  # name: (kind and optimizer of a Training, goal against 1 process of 1 thread, against 1 of 2 threads)
    "full, AdamW": ("full", "adamw", 1.65, 0.98),
    "full, Muon": ("full", "muon", 1.65, 0.98),
    "LoRA": ("lora", "adamw", 1.9, 0.98),
    "LoRA, embeddings frozen": ("frozen", "adamw", 1.9, 0.98),
}
STEPS = 4  # a turn; the first after another team has had its own is slower
LENGTHS = [4**n for n in range(13)]  # of vectors, fp32: 4 bytes to 67 MB


class Team(NamedTuple):
    """So many processes of so many threads."""

    processes: int
    threads: int

    def __str__(self) -> str:
        return f"{self.processes}x{self.threads}"


@dataclass(frozen=True)
class Case:
    """Steps of one kind by one team, in one of WAYS."""

    name: str
    team: Team
    training: Training

    def __str__(self) -> str:
        way = f" {self.training.way}" if self.team.processes > 1 else ""
        return f"{where(self.training)}: {self.name}, {self.team}{way}"


def where(training: Training) -> str:
    """The size, tokens and dtype of a step, in words."""
    return f"{training.size}, {training.tokens} tokens, {training.dtype}"


def cases_of(name: str, size: str, tokens: int, dtype: str, processes: list[int], device: str) -> list[Case]:
    """The cases of a kind. Threads are counted on CPUs only, where one process may have as many as all others."""
    kind, optimizer, *_ = KINDS[name]
    cpu = pick_machine(device, "auto").device.type == "cpu"
    alone = [Team(1, threads) for threads in ([1, *processes] if cpu else [1])]
    plain = Training(kind, optimizer, "exact", min(processes), size, tokens, dtype)
    found = [Case(name, team, plain) for team in alone]
    for count, way in itertools.product(processes, WAYS):
        found.append(Case(name, Team(count, 1), replace(plain, parts=count, way=way)))
    return found


def wire_bytes() -> int | None:
    """Bytes that this machine has sent to itself so far, with what TCP adds; None where the system does not tell."""
    path = Path("/proc/net/dev")
    found = re.search(r"^\s*lo:\s*(.*)", path.read_text(), re.M) if path.exists() else None
    return int(found[1].split()[8]) if found else None


def place(case: Case) -> tuple[Team, bool]:
    """Which group takes the steps of a case: those with a model in pieces have processes of their own, as these give
    memory back at once."""
    return case.team, case.training.way == "sharded"


def take_turns(cases: list[Case], groups: dict[tuple[Team, bool], Group], rounds: int) -> dict[Case, dict[str, list]]:
    """What each case measured, a list of the rounds' each; the first round warms up and does not count."""
    found = {case: defaultdict(list) for case in cases}
    for i in tqdm(range(rounds + 1), desc="rounds", disable=not sys.stderr.isatty(), leave=False):
        for case in cases:
            group, training, before = groups[place(case)], asked(case.training), wire_bytes()
            told = group.ask("steps", training=training, count=STEPS if i else 1)
            if before is not None:
                told["wire"] = (wire_bytes() - before) / STEPS / case.team.processes
            if case.team.processes > 1 and case.training.way == "exact":
                told["reduction"] = group.ask("reduction", training=training)
            for name, value in told.items() if i else ():
                found[case][name].append(value)
    return found


def row(what: str, measured: list[float], goal: float | None = None, **about: Any) -> dict[str, Any]:
    """A row of a median and the range of what it is the median of."""
    found = {"what": what, "median": statistics.median(measured), "min": min(measured), "max": max(measured)}
    return found | about | {"goal": goal}


def ratio(what: str, one: dict[str, list], other: dict[str, list], goal: float | None, **about: Any) -> dict[str, Any]:
    """How many times as fast as the other one is."""
    return row(what, [b / a for a, b in zip(one["seconds"], other["seconds"], strict=True)], goal, **about)


def formula(processes: int, weights: int) -> float:
    """Bytes that a process sends in a step: 2 (n - 1) / n of 4 bytes for each weight that trains, and for the loss."""
    return 2 * (processes - 1) / processes * 4 * (weights + 1)


def speeds(found: dict[Case, dict[str, list]]) -> list[dict[str, Any]]:
    """A row a case: tokens a second, and beside it the reduction's seconds and the bytes of a step."""
    rows = []
    for case, measured in found.items():
        training = case.training
        about = {"name": case.name, "team": str(case.team), "way": training.way, "dtype": training.dtype}
        about |= {"seconds": statistics.median(measured["seconds"]), "weights": measured["weights"][0]}
        if case.team.processes > 1:
            about["formula_bytes"] = formula(case.team.processes, measured["weights"][0])
            about["sent_bytes"] = max(measured["sent"]) if training.way == "exact" else None  # DDP does not count them
            about["wire_bytes"] = statistics.median(measured["wire"]) if measured["wire"] else None
            about["reduction_seconds"] = statistics.median(measured["reduction"]) if measured["reduction"] else None
        values = [training.tokens / seconds for seconds in measured["seconds"]]
        rows.append(row(f"{case}: tokens a second", values, **about))
    return rows


def ratios(found: dict[Case, dict[str, list]]) -> list[dict[str, Any]]:
    """How many times as fast several processes are as one, and LoRA as full; what they send, against the formula."""
    rows = []
    by = {(case.training.dtype, case.name, str(case.team), case.training.way): case for case in found}
    for case in found:
        dtype, count, way = case.training.dtype, case.team.processes, case.training.way
        place, (_, _, *goals) = f"{where(case.training)}: {case.name}", KINDS[case.name]
        if full := by.get((dtype, "full, AdamW", str(case.team), way)) if case.name.startswith("LoRA") else None:
            rows.append(ratio(f"{case}: a step's time / that of full, AdamW", found[full], found[case], None))
        if count == 1:
            continue
        for team, goal in zip((Team(1, 1), Team(1, count)), goals, strict=True):
            if other := by.get((dtype, case.name, str(team), "exact")):
                goal = goal if (way, count, case.training.size) == ("exact", 2, "10.7M") else None
                about = {"name": case.name, "team": str(case.team), "way": way, "dtype": dtype, "against": str(team)}
                rows.append(ratio(f"{place}, {case.team} {way} / {team}", found[case], found[other], goal, **about))
        if way == "exact" and "Muon" not in case.name:  # which sends the matrices that it has made orthogonal too
            shares = [sent / formula(count, found[case]["weights"][0]) for sent in found[case]["sent"]]
            rows.append(row(f"{place}, {case.team}: bytes sent / the formula", shares))
            if full and case.name.endswith("frozen"):
                times = [b / a for a, b in zip(found[case]["sent"], found[full]["sent"], strict=True)]
                rows.append(row(f"{place}, {case.team}: full's bytes / LoRA's", times, 50))
    return rows


def peaks(cases: list[Case], device: str) -> list[dict[str, Any]]:
    """The megabytes that a process of each case holds at most, in fresh processes of a thread, beyond what it held
    before."""
    rows = []
    for case in tqdm(
        [case for case in cases if case.team.threads == 1], desc="memory", disable=not sys.stderr.isatty(), leave=False
    ):
        with Group(*case.team, device) as group:
            group.ask("steps", training=asked(case.training), count=2)
            held = group.ask("peak")
        if held is not None:
            about = {"name": case.name, "team": str(case.team), "way": case.training.way, "dtype": case.training.dtype}
            rows.append(row(f"{case}: MB a process", [held / 1e6], **about, peak=True))
    return rows


def pieces(dtype: str, device: str) -> list[Case]:
    """Cases in which weights take more than activations, of which only the memory is measured: one process, and 2 and 4
    with a model in pieces."""
    names = [name for name in KINDS if KINDS[name][1] == "adamw"][:2]
    cases = [case for name in names for case in cases_of(name, "85M", 1024, dtype, [2, 4], device)]
    alone = [case for case in cases if case.team == Team(1, 1)]
    return alone + [case for case in cases if case.training.way == "sharded"]


def sweep(groups: dict[tuple[Team, bool], Group], lengths: list[int]) -> list[dict[str, Any]]:
    """How long vectors of each length take to be added up over processes, which `scaling_model` fits."""
    rows = []
    for (team, sharded), group in groups.items():
        for told in group.ask("sweep", lengths=lengths) if team.processes > 1 and not sharded else ():
            values, way = told["values"], told["way"]
            what = f"adding up {values:,} values over {team.processes} processes, {way}: ms"
            times = [1e3 * seconds for seconds in told["all"]]
            rows.append(row(what, times, processes=team.processes, way=way, values=values, seconds=told["seconds"]))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The recorded speeds, reductions and memory as Markdown."""
    by = {(r["dtype"], r["name"], r["team"], r["way"]): r for r in rows if "seconds" in r and "team" in r}
    against = {(r["dtype"], r["name"], r["team"], r["way"], r["against"]): r for r in rows if "against" in r}
    size = {r["what"].partition(",")[0] for r in by.values()}
    of_size = [r for r in rows if r.get("peak") and r["what"].partition(",")[0] in size]
    held = {(r["dtype"], r["name"], r["team"], r["way"]): r["median"] for r in of_size}
    lines = [
        "| steps of | processes x threads, reduction | tokens/s | of 1x1 | of 1 process with as many threads "
        "| adding up, ms | MB sent a step | peak MB a process |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, speed in by.items():
        dtype, name, team, way = key
        several = "formula_bytes" in speed
        cells = [f"{name}, {dtype}", f"{team}, {way}" if several else team, f"{speed['median']:,.0f}"]
        for other in ("1x1", f"1x{team.split('x')[0]}"):
            found = against.get((*key, other))
            cells.append(f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})" if found else "")
        reduction = speed.get("reduction_seconds")
        cells.append(f"{1e3 * reduction:.1f}" if reduction else "")
        sent = speed.get("sent_bytes") or speed.get("wire_bytes") or speed.get("formula_bytes")
        cells.append(f"{sent / 1e6:.2f}" if several else "")
        cells.append(f"{held[key]:,.0f}" if key in held else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def recorded() -> list[dict[str, Any]]:
    """The rows that are recorded. Raises UserError where there are none."""
    if not RECORD.exists():
        raise UserError("nothing is recorded yet: python -m benchmarks.scaling --record")
    return json.loads(RECORD.read_bytes())["rows"]


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    flags.add_argument("--size", choices=SIZES, default="10.7M")
    flags.add_argument("--tokens", type=int, default=4096)
    flags.add_argument("--dtypes", nargs="+", choices=("auto", "fp32", "bf16"), default=["auto"])
    flags.add_argument("--processes", nargs="+", type=int, choices=(2, 4, 8), default=[2])
    flags.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="of the vectors that are added up")
    flags.add_argument("--table", action="store_true", help="print what is recorded as Markdown, and measure nothing")
    options = flags.parse_args()
    if options.table:
        print(table(recorded()))
        return
    dtypes = [str(pick_machine(options.device, dtype)).split(", ")[-1] for dtype in options.dtypes]
    shape = options.size, options.tokens
    cases = [
        case
        for dtype, name in itertools.product(dict.fromkeys(dtypes), options.kinds)
        for case in cases_of(name, *shape, dtype, sorted(options.processes), options.device)
    ]
    with ExitStack() as stack:
        places = dict.fromkeys(map(place, cases))
        groups = {one: stack.enter_context(Group(*one[0], options.device)) for one in places}
        found = take_turns(cases, groups, options.rounds)
        tell(rows := speeds(found))
        rows += (more := ratios(found) + sweep(groups, options.lengths))
        tell(more)
    if options.size != "tiny":
        cases += pieces(dtypes[0], options.device)
    rows += (more := peaks(cases, options.device))
    tell(more)
    close("scaling", rows, options.record)


if __name__ == "__main__":
    run_command(main)
