"""Records out of files of every kind and shape, and each way in which a file can be wrong, told in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.instructions.files import files_of, read_rows, split_of
from data.instructions.records import parse_columns, to_record
from data.instructions.splits import load_records, read_records
from runtime.errors import UserError
from runtime.settings.config import is_hub_records

ASKED, ANSWERED = "Which one?\u2028Say.", 'The cat, "it" is.\nYes 😀'
MESSAGES = (
    {"role": "user", "content": ASKED, "input": "a cat"},
    {"role": "assistant", "content": ANSWERED},
)
PLAIN = {"instruction": ASKED, "input": "a cat", "output": ANSWERED}


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path: Path, row: dict) -> None:
    """One row, by a library of the format's own."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    elif path.suffix == ".csv":
        import csv

        with path.open("w", newline="", encoding="utf-8-sig") as file:
            rows = csv.DictWriter(file, list(row))
            rows.writeheader(), rows.writerow(row)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 1, "data": [row]}))
    else:
        path.write_bytes(b"\xef\xbb\xbf" + lines([row]) + b"\n \n")


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_each_kind_of_file_gives_the_same_record(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs{kind}"
    write(path, PLAIN)
    (record,) = read_records([path], {})
    assert record.messages == MESSAGES
    assert record.where.startswith(str(path))
    assert record.answer == ANSWERED
    assert record.row == PLAIN


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"question": ASKED, "context": "a cat", "answer": ANSWERED}, "instruction=question, output=answer", MESSAGES),
        ({"instruction": ASKED, "context": "a cat", "response": ANSWERED}, "", MESSAGES),  # as Dolly has it
        ({"instruction": "a", "input": " ", "output": "b", "system": "s"}, "", ("s", "a", "b")),
        ({"instruction": "a", "input": None, "output": "b"}, "", ("a", "b")),
        ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"},
                            {"from": "gpt", "value": "b"}]}, "", ("s", "a", "b")),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}, "",
         ("a", "b")),
    ],
)  # fmt: skip
def test_columns_by_other_names_and_other_shapes(row: dict, columns: str, expected: tuple) -> None:
    found = to_record(row, "here", parse_columns(columns)).messages
    assert (found if expected is MESSAGES else tuple(m["content"] for m in found)) == expected


def test_a_prompt_with_its_completion_and_a_text_stay_as_they_are() -> None:
    record = to_record({"prompt": " a ", "completion": "b\n"}, "here", {})
    assert (record.messages, record.prompt, record.completion) == ((), " a ", "b\n")
    assert to_record({"text": "b", "other": 1}, "here", {}).completion == "b"


WRONG: dict[str, tuple[str, bytes, str]] = {
    "malformed": ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl line 2: no JSON in UTF-8: Expecting value"),
    "no object": ("a.jsonl", b'{"text": "a"}\n["b"]\n', 'a.jsonl line 2: must be an object in braces, and it is ["b"]'),
    "twice": ("a.jsonl", b'{"text": "a", "text": "b"}', "a.jsonl line 1: no JSON in UTF-8: a key is given twice"),
    "other bytes": ("a.jsonl", b'{"text": "\xe9"}', "a.jsonl line 1: no JSON in UTF-8"),
    "near miss": ("a.jsonl", lines([{"instuction": "a", "output": "b"}]),
                  "no column 'instruction'; did 'instuction' mean it? Then set COLUMNS=instruction=instuction"),
    "no columns": ("a.jsonl", lines([{"a": "b"}]), "no column 'instruction'; it has 'a', and a record has one of"),
    "half": ("a.jsonl", lines([{"prompt": "b"}]), "line 1: there is no column 'completion'"),
    "empty": ("a.jsonl", lines([{"instruction": "a", "output": " "}]), "a.jsonl line 1: output is empty"),
    "number": ("a.jsonl", lines([{"instruction": "a", "output": 3}]), "line 1: output must be text, and it is 3"),
    "surrogate": ("a.jsonl", b'{"text": "ab\\ud800"}', "line 1: text has half of a character (a lone surrogate) at 2"),
    "roles": ("a.jsonl", lines([{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}]),
              "a.jsonl line 1: message 2 is of the user, where the assistant's turn is"),
    "first": ("a.jsonl", lines([{"messages": [{"role": r, "content": "a"} for r in ("system", "assistant")]}]),
              "a.jsonl line 1: message 2 is of the assistant, where the user's turn is"),
    "last": ("a.jsonl", lines([{"messages": [{"role": "user", "content": "a"}]}]),
             "line 1: the last message must be the assistant's, which is what is learned"),
    "no role": ("a.jsonl", lines([{"messages": [{"role": "bot", "content": "a"}]}]),
                "line 1: message 1 has the role 'bot'; there are system, user, assistant"),
    "content": ("a.jsonl", lines([{"messages": [{"role": "user", "content": ["a"]}]}]), "1: content must be text"),
    "ragged": ("a.csv", b"instruction,output\na,b\n\nc,d,e\n", "line 4: it has 3 fields, and line 1 names 2 columns"),
    "encoding": ("a.csv", b"text,b\n" + b"a,b\n" * 9000 + b"\xe9,c\n", "it is not UTF-8 (invalid continuation byte)"),
    "semicolons": ("a.csv", b"instruction;output\na;b\n", "a.csv line 1: its columns must be separated by commas"),
    "quote": ("a.csv", b'text,b\n"a', "a.csv line 2: no CSV: unexpected end of data"),
    "same name": ("a.csv", b"text,text\na,b\n", "a.csv line 1: a column's name is there twice"),
    "lines in json": ("a.json", b'{"text": "a"}\n{"text": "b"}', "JSON lines need a name in .jsonl"),
    "no list": ("a.json", b'{"text": "a"}', "a.json: must hold one list of records"),
    "scalar": ("a.json", b"3", "a.json: must hold one list of records"),
    "in the list": ("a.json", b'[{"text": "a"}, 3]', "a.json record 2: must be an object in braces, and it is 3"),
    "parquet": ("a.parquet", b"PAR1", "a.parquet is no Parquet file"),
    "nothing": ("a.jsonl", b"\n\n", "a.jsonl has no records to train on"),
    "one": ("a.jsonl", lines([{"text": "a"}]), "leaves the validation split without a record: it has 1, of which"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_with_file_line_and_column(case: str, tmp_path: Path) -> None:
    name, content, told = WRONG[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_records(str(tmp_path / name), {}, 0.1)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(2**30)
    rows = read_rows(path)
    next(rows)
    with pytest.raises(UserError, match="a.jsonl line 2: it has more than 64 MB"):
        next(rows)


def test_splits_by_the_names_of_files_in_a_folder(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation", "test.final", "more"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"text": name}]))
    (tmp_path / "README.md").write_text("no record")
    found = load_records(str(tmp_path), {}, 0.5)
    assert [record.completion for record in found.train] == ["more", "train-00000-of-00002", "train-00001-of-00002"]
    assert [record.completion for record in found.validation] == ["validation"]
    assert [record.completion for record in found.test] == ["test.final"]
    both = f"{tmp_path / 'train-00000-of-00002.jsonl'} , {tmp_path / 'validation.jsonl'}"
    assert [len(paths) for paths in files_of(both).values()] == [1, 1, 0]
    assert split_of(Path("valid_1.csv")) == "validation"
    assert split_of(Path("trainees.csv")) == split_of(Path("latest.csv")) == "train"


@pytest.mark.parametrize(
    ("name", "is_it"),
    [("Owner/a", True), ("Owner/a:train_sft", True), ("Owner/a-1.5:main/train", True), ("Owner/a:", False),
     ("Owner/a:../b", False), ("Owner/a:b,c", False), ("Owner/a.jsonl:train", False), ("here/there:train", False)],
)  # fmt: skip
def test_which_names_can_only_be_the_hubs(name: str, is_it: bool, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here" / "there").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_hub_records(name) is is_it


def test_the_digest_is_of_what_is_learned(tmp_path: Path) -> None:
    def digest(rows: list[dict], name: str = "a.jsonl") -> str:
        (tmp_path / name).write_bytes(lines(rows))
        return load_records(str(tmp_path / name), {}, 0.5).sha256

    rows = [{"prompt": f"{i}", "completion": "b"} for i in range(20)]
    assert digest(rows) == digest([row | {"tone": "dry"} for row in rows], "b.jsonl")
    assert digest(rows) != digest(rows[:-1] + [{"prompt": "19", "completion": "c"}])


@pytest.mark.parametrize("text", ["instruction", "a=b", "output=a,output=b", "output="])
def test_columns_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match="is"):
        parse_columns(text)
