"""evaluate.py on a tiny base and what was tuned on it: its figures against those of other commands, what it refuses."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import evaluate
import generate
from data.instructions.records import Record
from data.instructions.spelling import score as spelling_score
from jobs.generating.load import load
from jobs.judging.rendering import shown
from jobs.judging.scores import faithfulness
from jobs.runs.source import load_source
from jobs.training import train as training
from runtime.processes.command import run_command
from runtime.settings.config import Settings
from runtime.settings.sources import Resolved
from runtime.storage.runs import open_run
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
NAMES, ANIMALS = ("Anna", "Ben", "Clara", "David", "Emma"), ("cats", "dogs", "owls", "bees")
FAST = {"test_mode": True, "device": "cpu", "dtype": "fp32", "seed": 1}
HELD_OUT = 16  # of the 140 pairs
BRIEF = ("--max-new-tokens", "20", "--device", "cpu", "--dtype", "fp32")


def train(**values) -> None:
    training.train(Resolved(Settings.from_dict(FAST | values), dict.fromkeys(map(str.upper, values), "test")))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`base`, trained on text; `tuned`, its adapter for records, and `full`, all of its weights tuned on the same."""
    root, draw = tmp_path_factory.mktemp("evaluate"), random.Random(1)
    (root / "text.txt").write_text(
        "".join(
            f"It is {draw.choice(NAMES)} who has {draw.randint(2, 99)} {draw.choice(ANIMALS)}.\n" for _ in range(900)
        )
    )
    asked = [(name, kind, n) for name in NAMES for kind in ANIMALS for n in range(5, 12)]
    rows = [
        {"instruction": "Who has them?", "input": f"On the hill {name} has {n} {kind}.", "output": f"{name} has {n}."}
        for name, kind, n in asked
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "folder").mkdir()
    for name, some in (("train", rows[:100]), ("validation", rows[100:110]), ("test", rows[110:117])):
        (root / "folder" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        train(dataset="text.txt", run_name="base", block_size=128, max_iters=40)
        train(dataset="pairs.jsonl", run_name="tuned", base="base", use_lora=True, max_iters=30, learning_rate=0.01)
        train(dataset="folder", run_name="full", base="base", max_iters=10)
    return root


@pytest.fixture
def command(root: Path, monkeypatch, capsys):
    """A command of ours in this process: (status, stdout, stderr)."""
    monkeypatch.chdir(root)
    capsys.readouterr()

    def call(*words: str, of=evaluate) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{of.__name__}.py", *words])
        with pytest.raises(SystemExit) as end:
            run_command(of.main)
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def judged(command, tmp_path: Path):
    """The report on a run, as it is in report.json."""

    def call(*words: str) -> dict:
        status, _, err = command(*words, *BRIEF, "--out", str(tmp_path / "out"))
        assert status == 0, err
        found = json.loads((tmp_path / "out" / "report.json").read_bytes())
        shutil.rmtree(tmp_path / "out")
        return found

    return call


def rules(report: dict) -> dict[str, dict]:
    return {row["name"]: row for row in report["rules"]}


def held_out(root: Path) -> list[Record]:
    return load_source(Settings.from_dict({"dataset": str(root / "pairs.jsonl"), "test_mode": True})).validation


@pytest.fixture(scope="module")
def done(root: Path) -> subprocess.CompletedProcess:
    """evaluate.py on the tuned run, as a process, with its report in `report`."""
    done = warm.run([ROOT / "evaluate.py", "tuned", *BRIEF, "--out", "report"], root, os.environ)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def report(root: Path, done) -> dict:
    return json.loads((root / "report" / "report.json").read_bytes())


def test_terminal_markdown_and_json_have_the_same_figures(root: Path, done, report: dict) -> None:
    assert done.stderr.startswith(f"Asking tuned and its base {HELD_OUT} prompts, on cpu, fp32")
    lines = done.stdout.splitlines()
    assert lines[-2:] == [f"Verdict: {report['verdict']}", "Files: report"]
    text = (root / "report" / "report.md").read_text("utf-8")
    assert text.startswith("# tuned beside its base base\n") and f"**Verdict: {report['verdict']}.**" in text
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    assert table[0] == ["rule", "wanted", "base", "run", "run against base", "n", "how it is measured"]
    assert len(table) == 2 + len(report["rules"]) > 20
    for row, cells in zip(report["rules"], table[2:], strict=True):
        assert cells[0].rstrip(" ↑↓") == f"{row['group']}: {row['name']}"
        assert cells[1:4] == [shown(row, column, interval=True) for column in ("wanted", "base", "run")]
        assert cells[3].startswith(shown(row, "run")) and int(cells[5]) == row["run"]["n"] and cells[6] == row["rule"]
        (line,) = [line for line in lines if re.match(rf"  [↑↓ ] {row['name']}  ", line)]
        assert all(shown(row, column) in line for column in ("wanted", "base", "run"))
        if "outcome" in row:
            assert f"{row['outcome']} ({row['better_on']} : {row['worse_on']})" == cells[4] and cells[4] in line
    assert all(note in text and note in " ".join(done.stdout.split()) for note in report["notes"])
    assert "cannot tell whether an answer is true" in report["notes"][-1]


def test_losses_are_those_that_training_came_to(root: Path, report: dict) -> None:
    found, result = rules(report), open_run(root / "checkpoints" / "tuned").result
    assert found["loss of wanted answers"]["run"]["value"] == pytest.approx(result["val_loss"], rel=1e-4)
    assert found["loss of wanted answers"]["base"]["value"] == pytest.approx(result["base_val_loss"], rel=1e-4)
    forgetting = found["loss on the base's text"]
    base_loss = open_run(root / "checkpoints" / "base").result["val_loss"]
    assert forgetting["base"]["value"] == pytest.approx(base_loss, rel=1e-3)
    assert forgetting["run"]["value"] > base_loss + 0.1 and forgetting["outcome"] == "worse"
    assert (
        found["loss on training records"]["run"]["n"] == 100 and found["loss of wanted answers"]["run"]["n"] == HELD_OUT
    )


def test_the_answers_are_those_that_the_run_gives_and_their_scores_make_the_figures(
    root: Path, report: dict, command
) -> None:
    lines = [json.loads(line) for line in (root / "report" / "answers.jsonl").read_text("utf-8").splitlines()]
    asked = held_out(root)
    assert [line["where"].rpartition("/")[2] for line in lines] == [r.where.rpartition("/")[2] for r in asked]
    assert [line["wanted"] for line in lines] == [record.answer for record in asked]
    for line in (lines[0], lines[-1]):
        question, given = line["asked"].split("\n\n")
        words = ("--run=tuned", "--instruction", question, "--input", given, "--greedy", *BRIEF)
        assert command(*words, of=generate)[1] == line["run"] + "\n"
        assert command(*words, "--adapter=tuned=0", of=generate)[1] == line["base"] + "\n"
    for name, row in rules(report).items():
        scores = [line["scores"]["run"].get(name) for line in lines]
        if row["group"] not in ("Loss", "Forgetting") and name not in ("perplexity", "words right"):
            counted = [score for score in scores if score is not None]
            assert row["run"]["value"] == pytest.approx(sum(counted) / len(counted))
    spelled = spelling_score([line["run"] for line in lines], [line["wanted"] for line in lines])
    assert rules(report)["words right"]["run"]["value"] == pytest.approx(spelled.words)
    assert rules(report)["exact match"]["run"]["value"] == spelled.lines
    worst = [line["scores"]["run"]["chrF"] for line in report["worst"]]
    others = [
        line["scores"]["run"]["chrF"] for line in lines if line["where"] not in {w["where"] for w in report["worst"]}
    ]
    assert (
        worst == sorted(worst) and len(worst) <= 10 and all(line["run"] != line["wanted"] for line in report["worst"])
    )
    assert max(worst) <= min(others, default=1.0)


def test_perplexity_is_under_the_base_and_cut_off_what_has_no_end(root: Path, report: dict) -> None:
    model, tokenizer = load("base", root / "checkpoints")
    lines = [json.loads(line) for line in (root / "report" / "answers.jsonl").read_text("utf-8").splitlines()]
    for column in ("base", "run"):
        for line in lines:
            question, given = line["asked"].split("\n\n")
            prompt = f"### Instruction:\n{question}\n\n### Input:\n{given}\n\n### Response:\n"
            before, ids = len(tokenizer.encode(prompt)), torch.tensor(tokenizer.encode(prompt + line[column]))
            with torch.no_grad():
                each = F.cross_entropy(model(ids[None, :-1])[0][0], ids[1:], reduction="none")
            expected = each[before - 1 :].mean().item() if line[column] else None
            assert line["scores"][column]["perplexity"] == pytest.approx(expected, rel=1e-3)
            assert line["scores"][column]["cut off"] == (len(line[column]) == 20)  # a token is a character


def test_an_adapter_at_strength_0_is_the_base(judged) -> None:
    report = judged("tuned", "--strength", "0")
    assert all(row["base"] == row["run"] for row in report["rules"])
    assert {row["outcome"] for row in report["rules"] if row["better"]} == {"equal"}
    assert "better than the base on 0 of" in report["verdict"]


def test_base_and_run_draw_the_same_numbers_when_they_sample(judged) -> None:
    sampled = ("tuned", "--temperature", "0.9", "--limit", "4", "--strength", "0")
    first, again, other = judged(*sampled), judged(*sampled), judged(*sampled, "--seed", "2")
    assert first == again and first["worst"] != other["worst"]
    assert all(answer["base"] == answer["run"] for answer in first["worst"])
    assert first["how"]["temperature"] == 0.9 and not first["how"]["greedy"]


def test_a_fully_tuned_run_is_beside_its_base_and_asked_its_test_records(judged, root: Path) -> None:
    report = judged("full")
    assert (report["run"], report["base"]) == ("full", "base")
    assert report["data"] == {"what": "test records of folder", "prompts": 7, "of": 7}
    assert rules(report)["loss of wanted answers"]["outcome"] == "better"
    assert not any("validation records" in note for note in report["notes"])
    alone = judged("base", "--data", "folder/test.jsonl")
    for name in ("perplexity", "loss of wanted answers"):
        assert rules(alone)[name]["run"] == rules(report)[name]["base"]
    assert rules(alone)["perplexity"]["wanted"] == rules(report)["perplexity"]["wanted"]
    (root / "checkpoints" / "base").rename(root / "elsewhere")
    try:
        alone = judged("full")
    finally:
        (root / "elsewhere").rename(root / "checkpoints" / "base")
    assert alone["base"] is None and "no base to compare" in alone["verdict"]
    assert any("Its base is not beside it: the base of full is gone" in note for note in alone["notes"])
    assert not any("base" in row for row in alone["rules"]) and "perplexity" not in rules(alone)
    assert rules(alone)["loss of wanted answers"]["run"] == rules(report)["loss of wanted answers"]["run"]


def test_a_base_by_itself_is_asked_what_is_given(judged) -> None:
    report = judged("base", "--data", "folder", "--limit", "5")
    assert report["base"] is None and report["data"]["prompts"] == 5 and report["data"]["of"] == 117
    assert "perplexity" in rules(report) and "answered by heart" not in rules(report)
    assert any("### Instruction" in note for note in report["notes"])
    assert any("was not trained on records" in note for note in report["notes"])


def test_prompts_that_were_trained_on_are_told(judged) -> None:
    report = judged("tuned", "--data", "pairs.jsonl", "--limit", "0")
    known = 140 - HELD_OUT
    assert any(note.startswith(f"{known} of the 140 prompts are among those") for note in report["notes"])


def test_records_that_have_changed_since_are_told(judged, root: Path) -> None:
    path = root / "pairs.jsonl"
    before = path.read_text()
    try:
        path.write_text(before.replace("Anna", "Bella"))
        report = judged("tuned", "--limit", "2")
    finally:
        path.write_text(before)
    assert any("not what it was when the run was trained" in note for note in report["notes"])


def test_forgetting_is_measured_on_a_text_that_is_given(judged, tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text("It is Anna who has 5 owls.\n")
    forgetting = rules(judged("tuned", "--limit", "1", "--base-text", str(path)))["loss on the base's text"]
    assert forgetting["run"]["n"] == 1 and "own.txt" in forgetting["rule"]


def test_nothing_is_written_unless_it_is_asked_for(command, root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if root / "data" not in path.parents}
    status, out, err = command("tuned", "--limit", "1", *BRIEF)
    assert status == 0, err
    assert out.splitlines()[-1].startswith("Verdict: on 1 prompt ")
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if root / "data" not in path.parents}
    assert after == before


REFUSED = [
    ((), 2, "the following arguments are required: RUN"),
    (("nobody",), 2, "there is no run 'nobody' in checkpoints; runs there: base, tuned, full"),
    (("base",), 2, "base was not trained on records; say with --data FILE what to ask it"),
    (("base", "--strength", "1"), 2, "--strength 1 is of an adapter, and base has none"),
    (("tuned", "--strength", "half"), 2, "--strength half (flag): must be a number"),
    (("tuned", "--data", "nowhere.jsonl"), 2, "nowhere.jsonl: there is no such file"),
    (("tuned", "--data", "text.txt"), 2, "--data text.txt: give a file of records"),
    (("tuned", "--data", "bad.jsonl"), 1, "bad.jsonl line 2: no JSON in UTF-8"),
    (("tuned", "--data", "texts.jsonl"), 1, "none of them has a prompt"),
    (("tuned", "--data", "strange.jsonl"), 1, "strange.jsonl line 1: the tokenizer has no 'é'"),
    (("tuned", "--data", "pairs.jsonl", "--columns", "output=answer"), 1, "there is no column 'answer'"),
    (("tuned", "--data", "pairs.jsonl", "--columns", "answer"), 2, "--columns answer: 'answer' is not like"),
    (("tuned", "--columns", "output=answer"), 2, "--columns are those of --data, which is not given"),
    (("tuned", "--out", "folder"), 2, "folder is there already, and nothing is overwritten"),
    (("tuned", "--base-text", "nowhere.txt"), 2, "nowhere.txt: there is no such text file"),
    (("tuned", "--base-text", "shakespear"), 2, "shakespear: no such corpus; did you mean shakespeare?"),
    (("tuned", "--base-text", "strange.txt"), 1, "strange.txt: the tokenizer has no 'é'"),
    (("tuned", "--word-list", "nowhere"), 2, "nowhere: there is no such file or folder"),
    (("tuned", "--short", "100"), 2, "--short 100 must be less than --medium 100"),
    (("tuned", "--limit", "-1"), 2, "--limit -1 (flag): must be a whole number"),
    (("tuned", "--top-p", "0"), 2, "--top-p 0 (flag): must be a number above 0"),
    (("tuned", "--greedy"), 2, "--greedy is not a flag"),
]


@pytest.mark.parametrize(("words", "status", "told"), REFUSED, ids=[told for *_, told in REFUSED])
def test_what_cannot_be_is_one_line(command, root: Path, words: tuple[str, ...], status: int, told: str) -> None:
    (root / "bad.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a"\n')
    (root / "texts.jsonl").write_text('{"text": "It is so."}\n')
    (root / "strange.jsonl").write_text('{"instruction": "Où? é", "output": "b"}\n', "utf-8")
    (root / "strange.txt").write_text("é\n" * 99, "utf-8")
    found, out, err = command(*words)
    assert (found, out) == (status, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ") and told in line


@pytest.mark.parametrize(("package", "module"), [("rouge_score", "rouge_scorer"), ("sacrebleu", "metrics")])
def test_a_missing_package_is_told_with_what_installs_it(command, monkeypatch, package: str, module: str) -> None:
    monkeypatch.setitem(sys.modules, f"{package}.{module}", None)
    for score in (faithfulness._rouge, faithfulness._chrf):
        score.cache_clear()
    status, out, err = command("tuned")
    assert (status, out) == (1, "")
    assert err.startswith(f"error: this needs the package {package}, which is not installed; get it with: ")
    assert err.endswith("requirements-instructions.txt\n")
