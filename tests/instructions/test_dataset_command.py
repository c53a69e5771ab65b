"""dataset.py as a process, on files of three shapes: what is printed, drawn and written, and what is refused."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data.chat import own_template
from data.instructions.encoding import encode_record
from data.instructions.files import read_rows
from data.instructions.records import Record, to_record
from data.instructions.splits import load_records, read_records
from jobs.looking import histogram, progress
from tests.commands.command_line import ROOT
from tests.commands.command_line import run as run_in
from tests.pretrained.tiny_chats import CHATML, opened
from tests.pretrained.tiny_models import make, save

ANIMALS = ("cat", "dog", "cow", "owl", "bee", "hen", "pig", "ant", "fox", "emu")
TONES = ("dry", "warm")
GREEN = "\x1b[32m"
Run = Callable[..., subprocess.CompletedProcess]


def pairs() -> list[dict]:
    return [
        {"instruction": f"Where is the {a}?", "input": f"{a} and {b}", "output": f"By the {b}.", "tone": TONES[i % 2]}
        for a in ANIMALS for i, b in enumerate(ANIMALS) if a != b
    ]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A folder with 90 records as CSV, 10 chats as ShareGPT has them and 10 texts that are continued; and how to run
    dataset.py there."""
    with (tmp_path / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, list(pairs()[0]))
        rows.writeheader(), rows.writerows(pairs())
    turns = [
        [("human", f"A {a}?"), ("gpt", "Yes."), ("human", "And now?"), ("gpt", f"The {a}\u2028sat.")] for a in ANIMALS
    ]
    chats = [{"conversations": [{"from": who, "value": text} for who, text in chat]} for chat in turns]
    (tmp_path / "chats.json").write_text(json.dumps(chats, ensure_ascii=False), "utf-8")
    lines = [json.dumps({"prompt": f"The {a} sat on ", "completion": f"the {a[::-1]} mat"}) + "\n" for a in ANIMALS]
    (tmp_path / "texts.jsonl").write_text("".join(lines))

    def call(*words: str, **settings: str) -> subprocess.CompletedProcess:
        return run_in(tmp_path, tmp_path / "cache", "dataset.py", *words, **settings)

    return call


def good(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- look -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "records", "told"),
    [
        ("pairs.csv", 90, ("output       output", "warm 45, dry 45", "  │ ### Input:", "  ┃ By the ", "  ┃ ###")),
        ("chats.json", 10, ("conversations  messages", "  ┃ Yes.", "  │ And now?", "�sat.")),
        ("texts.jsonl", 10, ("prompt      prompt", "  │ The ", "  ┃ the ", " mat\n  ┃ ###")),
    ],
)
def test_look_shows_columns_lengths_and_records(name: str, records: int, told: tuple, run: Run, tmp_path: Path) -> None:
    out = good(run("look", name, "--batch-size", "4"))
    assert out.startswith(f"{name}: {records} records; tokens estimated as characters / 4")
    for part in told:
        assert part in out, out
    kept = len(load_records(str(tmp_path / name), {}, 0.1).train)
    assert f"An epoch: {-(-kept // 4)} steps of 4 records (BATCH_SIZE=4, GRADIENT_ACCUMULATION_STEPS=1; " in out
    assert f"; {records - kept} of {records} are held out)" in out
    assert out.count(" of them learned") == 3
    assert GREEN not in out
    picture = tmp_path / f"{Path(name).stem}-lengths.png"
    assert f"Picture: {picture.name}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_look_overwrites_no_picture_and_colours_what_is_learned(run: Run, tmp_path: Path) -> None:
    (tmp_path / "texts-lengths.png").write_text("mine")
    out = good(run("look", "texts.jsonl", "--color", "always"))
    assert "Picture: texts-lengths-2.png" in out
    assert (tmp_path / "texts-lengths.png").read_text() == "mine"
    coloured = [line for line in out.splitlines() if line.startswith(GREEN)]
    assert coloured
    assert all(line.startswith(f"{GREEN}  ┃ ") and line.endswith("\x1b[0m") for line in coloured)
    assert sum(" mat" in line for line in coloured) == 3
    assert not any("sat on" in line for line in coloured)
    done = run("look", "texts.jsonl", "--out", "texts-lengths.png")
    assert done.returncode == 2
    assert "nothing is overwritten" in done.stderr


def test_look_with_a_base_counts_its_tokens(run: Run, tmp_path: Path) -> None:
    save(make("llama", noise=0.02), tmp_path / "theirs")
    (tmp_path / "theirs" / "chat_template.jinja").write_text(CHATML)
    tokenizer = opened(tmp_path / "theirs")
    records = read_records([tmp_path / "chats.json"], {})
    lengths = [len(encode_record(record, own_template(tokenizer), tokenizer)) for record in records]
    out = good(run("look", "chats.json", "--base", "theirs"))
    assert "10 records; tokens of theirs\n" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("record ")]
    assert [int(number.replace(",", "")) for number in row[-2:]] == [max(lengths), sum(lengths)]
    assert "  │ Be kind.</s>" in out
    assert "  ┃ Yes.</s>" in out
    report = good(run("lint", "chats.json", "--base", "theirs", "--block-size", "50"))
    long = sum(length > 51 for length in lengths)
    assert f"context {long}" in " ".join(report.split())
    done = run("look", "chats.json", "--base", "theirs", "--block-size", "65")
    assert done.returncode == 2
    assert "BLOCK_SIZE=65: the base theirs takes at most 64 tokens" in done.stderr


def test_look_goes_on_after_rows_that_are_no_records(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"prompt": "a", "completoin": "b"}\n{\n{"text": "three"}\n')
    done = run("look", "bad.jsonl")
    assert "bad.jsonl: 2 records" in good(done)
    assert (
        "2 rows left out, the first: bad.jsonl line 2: there is no column 'completion'; did 'completoin'" in done.stderr
    )


def test_a_histogram_has_every_record_in_a_bar():
    lengths = [1] * 80 + [10] * 20 + [399, 100_000]
    bars = histogram.histogram(lengths, 300).splitlines()
    counts = [int(re.match(r" *(?:[\d,-]+|[\d,]+ or more)  +(\d+)", bar)[1]) for bar in bars]
    assert sum(counts) == len(lengths)
    assert bars[0].split()[:2] == ["0-49", "100"]
    assert bars[-1].split() == ["400", "or", "more", "1", "▏", "beyond", "the", "context"]
    assert histogram.histogram([11] * 3, 300).split() == ["11", "3", "█" * 40]


# --- lint -----------------------------------------------------------------------------------------------------------


def test_lint_counts_and_names_the_worst(run: Run, tmp_path: Path) -> None:
    rows = [
        {"instruction": "a", "output": "As an AI, I have none."}, {"instruction": "b", "outptu": "c"},
        {"instruction": "b", "output": "Mail bob@corp.io now."}, {"instruction": "A", "output": "See https://a.io"},
    ]  # fmt: skip
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = (tmp_path / "bad.jsonl").read_bytes()
    done = run("lint", "bad.jsonl", "--strict")
    assert done.returncode == 1
    counts = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[3:21]}
    broken = {"not-a-record", "boilerplate", "url", "personal", "contradiction"}
    assert {name for name, count in counts.items() if count != "0"} == broken
    assert done.stderr == f"error: bad.jsonl breaks 5 rules: {', '.join(sorted(broken, key=list(counts).index))}\n"
    assert "  bad.jsonl line 2: there is no column 'output'; did 'outptu' mean it?" in done.stdout
    assert "  bad.jsonl line 4: the prompt of bad.jsonl line 1, answer number 2" in done.stdout
    assert "bob@corp" not in done.stdout
    assert "clean bad.jsonl --out clean.jsonl" in done.stdout
    assert good(run("lint", "bad.jsonl")) == done.stdout  # the same, and no failure
    good(run("lint", "bad.jsonl", "--strict", "--ignore", ",".join(broken)))
    assert (tmp_path / "bad.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["pairs.csv", "chats.json", "texts.jsonl"])
def test_good_records_break_no_rule(name: str, run: Run) -> None:
    done = run("lint", name, "--strict", "--ignore", "near-duplicate,leak")
    assert good(done)
    assert "➡️" not in done.stdout


def test_lint_looks_at_a_field_for_its_balance(run: Run) -> None:
    assert "tone: warm 50.0%, dry 50.0%" in good(run("lint", "pairs.csv"))
    assert "output" not in good(run("lint", "pairs.csv")).splitlines()[-1]
    done = run("lint", "pairs.csv", "--persona-field", "tune")
    assert done.returncode == 2
    assert "--persona-field tune: pairs.csv line 2 has no such column; did you mean 'tone'?" in done.stderr
    assert "input has" in run("lint", "pairs.csv", "--persona-field", "input").stderr


# --- clean, split, convert ------------------------------------------------------------------------------------------


def test_clean_writes_what_lint_has_nothing_to_mend_in(run: Run, tmp_path: Path) -> None:
    rows = [{"instruction": f"{i}", "output": f"Sure! Number {i} (https://a.io/{i}). "} for i in range(5)] * 2
    (tmp_path / "rows.csv").write_text("".join(f"{r['instruction']},{r['output']}\n" for r in [
        {"instruction": "instruction", "output": "output"}, *rows]))  # fmt: skip
    before = (tmp_path / "rows.csv").read_bytes()
    out = good(run("clean", "rows.csv", "--out", "new/clean.parquet"))
    assert " ".join(out.split()) == (
        "rows.csv: 10 rows 5 white space mended (texts) 5 boilerplate taken out of answers (sentences) 5 URLs taken "
        "out of answers 5 left out: the same as an earlier one, white space aside (records) "
        "new/clean.parquet: 5 records"
    )
    found = [row for _, row in read_rows(tmp_path / "new/clean.parquet")]
    assert found == [{"instruction": f"{i}", "output": f"Number {i}."} for i in range(5)]
    assert (tmp_path / "rows.csv").read_bytes() == before
    again = run("clean", "rows.csv", "--out", "new/clean.parquet")
    assert again.returncode == 2
    assert (
        again.stderr == "error: new/clean.parquet is there already, and nothing is overwritten; choose another --out\n"
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["clean.parquet"]


def places(folder: Path, kind: str) -> dict[str, str]:
    """The split that each prompt is in."""
    files = {name: folder / f"{name}{kind}" for name in ("train", "validation", "test")}
    return {r.asked: name for name, path in files.items() for r in read_records([path], {})}


def test_split_keeps_every_record_on_its_side(run: Run, tmp_path: Path) -> None:
    out = good(run("split", "pairs.csv", "--out", "parts", "--test-size", "0.2", VAL_SIZE="0.2"))
    whole = read_records([tmp_path / "pairs.csv"], {})
    first = places(tmp_path / "parts", ".csv")
    assert len(first) == len(whole) == 90
    assert [line.split(": ")[0] for line in out.splitlines()] == [
        f"parts/{n}.csv" for n in ("train", "validation", "test")
    ]
    rows = [row for n in ("train", "validation", "test") for _, row in read_rows(tmp_path / f"parts/{n}.csv")]
    assert sorted(map(json.dumps, rows)) == sorted(json.dumps(record.row) for record in whole)
    held_out = load_records(str(tmp_path / "pairs.csv"), {}, 0.2).validation
    assert {asked for asked, name in first.items() if name == "validation"} == {record.asked for record in held_out}
    more = [json.dumps({**row, "input": row["input"] + "!"}) + "\n" for row in pairs()]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs()) + "".join(more))
    good(run("split", "more.jsonl", "--out", "again", "--test-size", "0.2", "--val-size", "0.2"))
    assert first.items() <= places(tmp_path / "again", ".jsonl").items()
    # What was split is a data set with splits, of which training holds nothing out.
    assert len(load_records(str(tmp_path / "again"), {}, 0.5).train) > 0.4 * 180
    assert "(train " in good(run("lint", "again"))


def test_split_that_would_leave_a_file_empty_leaves_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "one"}\n')
    before = sorted(tmp_path.iterdir())
    done = run("split", "one.jsonl", "--out", "parts")
    assert done.returncode == 1
    assert "one.jsonl: of 1 record none is in " in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def asks_and_answers(record: Record) -> tuple[list[str], str]:
    return [f"{m['content']} {m.get('input', '')}".strip() for m in record.messages[:-1]] or [
        record.prompt
    ], record.answer


def test_convert_keeps_what_is_asked_and_answered(run: Run, tmp_path: Path) -> None:
    """From CSV through every form and kind of file and back to CSV."""
    steps = (("sharegpt", "a.json"), ("messages", "b.parquet"), ("completion", "c.ndjson"), ("instruction", "d.csv"))
    source = "pairs.csv"
    for form, name in steps:
        assert good(run("convert", source, "--out", name, "--form", form)) == f"{name}: 90 records, as {form}\n"
        source = name
    rows = [row for _, row in read_rows(tmp_path / "d.csv")]
    assert rows == [
        {"instruction": f"{r['instruction']}\n\n{r['input']}", "input": "", "output": r["output"], "tone": r["tone"]}
        for r in pairs()
    ]
    before = [asks_and_answers(record) for record in read_records([tmp_path / "chats.json"], {})]
    good(run("convert", "chats.json", "--out", "m.jsonl", "--form", "messages"))
    assert [asks_and_answers(record) for record in read_records([tmp_path / "m.jsonl"], {})] == before


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_a_kind_of_file_into_another_keeps_each_row(kind: str, run: Run, tmp_path: Path) -> None:
    rows = [
        {"instruction": 'a, "b"\r\nc\rd', "output": "e\u2028f 😀", "tone": ""},
        {"instruction": "g", "output": " h\n", "tone": "dry"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good(run("convert", "rows.jsonl", "--out", f"new{kind}"))
    assert [row for _, row in read_rows(tmp_path / f"new{kind}")] == rows


def test_text_of_a_chat_is_as_a_model_is_given_it(run: Run, tmp_path: Path) -> None:
    done = run("convert", "pairs.csv", "--out", "t.jsonl", "--form", "text")
    good(done)
    assert "all is learned: the prompts too" in done.stderr
    _, row = next(read_rows(tmp_path / "t.jsonl"))
    text = "### Instruction:\nWhere is the cat?\n\n### Input:\ncat and dog\n\n### Response:\nBy the dog."
    assert row == {"text": text, "tone": "warm"}
    assert to_record(row, "here", {}).completion == text


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        ((), 2, "error: which command? There are: look, lint, clean, split, convert; --help tells of each"),
        (("lnt",), 2, "error: there is no command 'lnt'; did you mean lint?"),
        (("lint",), 2, "error: the following arguments are required: FILE"),
        (("lint", "none.jsonl"), 2, "error: none.jsonl: there is no such file"),
        (("lint", "pairs.csv,none.jsonl"), 2, "error: none.jsonl: there is no such file"),
        (("look", "shakespeare"), 2, "error: shakespeare: there is no such file"),
        (("lint", "pairs.txt"), 2, "error: pairs.txt: there is no such file"),
        (("lint", "pairs.csv", "--ignore", "urls"), 2, "error: --ignore urls: there is no such rule; did you mean"),
        (("lint", "pairs.csv", "--columns", "answer"), 2, "error: COLUMNS=answer: 'answer' is not like instruction="),
        (("lint", "pairs.csv", "--columns", "output=x"), 1, "error: pairs.csv line 2: there is no column 'x', which"),
        (("lint", "pairs.csv", "--base", "nobody"), 2, "error: there is no run 'nobody' in checkpoints"),
        (("clean", "pairs.csv"), 2, "error: the following arguments are required: --out"),
        (("clean", "pairs.csv", "--out", "pairs.csv"), 2, "error: pairs.csv is there already, and nothing"),
        (("clean", "pairs.csv", "--out", "x.txt"), 2, "error: --out x.txt: it must end in .jsonl, .ndjson, .json"),
        (("convert", "chats.json", "--out", "x.csv"), 1, "error: x.csv: conversations is a list, which CSV"),
        (("convert", "chats.json", "--out", "x.csv", "--form", "instruction"), 1,
         "error: chats.json record 1: it has 2 turns, and this form holds one"),
        (("convert", "pairs.csv", "--out", "x.csv", "--form", "alpaca"), 2, "error: --form alpaca (flag): must be"),
        (("convert", "bad.jsonl", "--out", "x.csv"), 1, "error: bad.jsonl line 2: no JSON in UTF-8"),
        (("convert", "empty.jsonl", "--out", "x.csv"), 1, "error: empty.jsonl: it has no records"),
        (("clean", "bad.jsonl", "--out", "no/file/x.jsonl", "--columns", "text=x"), 1, "error: bad.jsonl line 1: "),
        (("split", "pairs.csv", "--out", "x", "--test-size", "0.9"), 2, "error: VAL_SIZE=0.1 and --test-size 0.9"),
        (("split", "folder", "--out", "x"), 2, "error: folder has files of train and validation; name one at a time: "),
        (("split", "pairs.csv", "--out", "folder"), 2, "error: folder is there already, and nothing is overwritten"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line_and_leaves_nothing(
    words: tuple, status: int, told: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "folder").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "folder" / f"{name}.jsonl").write_text('{"text": "a"}\n')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = run(*words)
    assert done.returncode == status
    assert done.stderr.startswith(told)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("package", "words", "told"),
    [
        ("matplotlib", ("look", "texts.jsonl"), "No picture: pictures need matplotlib; get it with: "),
        ("datasketch", ("lint", "texts.jsonl"), "error: this needs the package datasketch, which is not installed"),
        ("pyarrow", ("convert", "texts.jsonl", "--out", "x.parquet"), "error: this needs the package pyarrow"),
    ],
)
def test_without_an_extra_one_line_says_how_to_get_it(
    package: str, words: tuple, told: str, run: Run, tmp_path: Path
) -> None:
    hidden = (
        "import importlib.abc, importlib.util, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "class Hidden(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {package!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        f"sys.argv = ['dataset.py', *{list(words)!r}]\n"
        f"runpy.run_path({str(ROOT / 'dataset.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", hidden], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.stderr.startswith(told), done.stderr
    assert "pip install -r" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode == (0 if package == "matplotlib" else 1)
    assert ("An epoch: " in done.stdout) == (package == "matplotlib")


def test_reading_that_takes_long_is_told(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0)
    assert list(progress.told(iter(range(3)))) == [0, 1, 2]
    assert capsys.readouterr().err == "0 rows read in 0 s ...\n"
    monkeypatch.setattr(progress, "PATIENCE", 60)
    assert list(progress.told(iter(range(3)))) == [0, 1, 2]
    assert capsys.readouterr().err == ""
