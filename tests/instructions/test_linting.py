"""Each rule on records that break it and records that do not; near-duplicates and cleaning against slow versions."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from data.instructions.files import files_of, read_rows
from data.instructions.records import Record, to_record
from data.instructions.splits import load_records
from data.jsonlines import LONGEST
from data.linting import private, texts
from data.linting.across import asked_of
from data.linting.cleaning import Cleaning, mended_row
from data.linting.forms import TARGETS, converted
from data.linting.lint import How, Report, lint
from data.linting.near import THRESHOLD, Signatures, runs_of
from data.linting.reading import tried
from data.linting.rules import RULES, answers, check, whole
from runtime.errors import UserError

TOKEN = "a1B2c3D4e5" * 5  # put together here, so that nobody takes a test for a leak
SECRETS = (
    "AKIA" + "IOSFODNN7ABCDEFG", "ghp_" + TOKEN[:36], "github_pat_" + TOKEN, "sk-proj-" + TOKEN, "hf_" + TOKEN[:34],
    "glpat-" + TOKEN[:20], "AIza" + TOKEN[:35], "xoxb-" + "123456789012-abcdef", "sk_live_" + TOKEN[:24],
    "npm_" + TOKEN[:36], "eyJ" + TOKEN[:20] + ".eyJ" + TOKEN[:20] + "." + TOKEN, "-----BEGIN RSA " + "PRIVATE KEY-----",
)  # fmt: skip
NUMBERS = (  # of nobody
    "In 1984 and 2024-2025, pages 1914-1918", "ISBN 978-3-16-148410-0 or 9780306406157", "4111 1111 1111 1112",
    "π is 3.14159265358979 and 2**64 is 18446744073709551616", "192.168.100.200, then 10.0.0.1", "x = +12 + 3456",
    "1,234,567,890 dollars, or $1 000 000 000", "write to me@example.com", "12:30:45 on 2024-11-26",
    "order 100-200-3000",
)  # fmt: skip
PERSONAL = (
    "jane.doe+news@mail.co.uk", "+49 30 1234567", "+1 (212) 736-5000", "call 212-736-5000.", "(212) 736-5000",
    "4111 1111 1111 1111", "4111111111111111", "5555-5555-5555-4444", "3782 822463 10005", "6011111111111117",
)  # fmt: skip


def said(output: str, instruction: str = "Name a colour", **others: object) -> dict:
    return {"instruction": instruction, "output": output, **others}


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def tones(**counts: int) -> list[dict]:
    return [said(f"{tone} {i}", f"{tone} {i}?", tone=tone) for tone, count in counts.items() for i in range(count)]


LONG = " ".join(["word"] * 29) + "."
STORY = [f"{random.Random(i).random():.6f}" for i in range(60)]
# Rule, files (or rows of one) that break it, and such that do not. Bytes are lines as they stand.
CASES: dict[str, tuple[list, list]] = {
    "not-a-record": (
        [b"{", b"[1]", b'"text"', {"instruction": "a", "outptu": "b"}, b'{"output": "a", "output": "b"}',
         {"output": 1}],
        [said("Blue."), {"text": "Blue."}, {"prompt": "a", "completion": "b"}, b"", said("a\u2028b")],
    ),
    "empty": (
        [said(""), said("  \n"), said(None), said("N/A"), said("..."), said("Blue", " "), {"text": "\t"},
         chat(("user", "a"), ("assistant", " "))],
        [said("0"), said("No"), said("?!"), said("A"), said("none of these"), chat(("system", ""), ("user", "a"),
         ("assistant", "b"))],
    ),
    "roles": (
        [chat(("user", "a"), ("tool", "b")), chat(("assistant", "a")), chat(("user", "a"), ("user", "b")),
         chat(("user", "a")), chat(("user", "a"), ("system", "b"), ("assistant", "c")),
         {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}],
        [chat(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
         {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
    ),
    "unicode": (
        [said("caf\ufffd"), said("a\x00b"), said("donâ€™t"), said("cafÃ©"), said("\x1b[31mred"), b'{"text": "\\ud83d"}',
         b'{"text": "\xe9"}', said("Blue", "what\ufffd")],
        [said("café, naïve, SÃO, “quotes” – 😀"), said("a\tb\r\n\nc"), said("a\u2028b"), said("日本語。한국어")],
    ),
    "several-tasks": (
        [said("a", "What is a cat? Where does it live?"), said("a", "Write a story about a cat. Summarize it."),
         said("a", "1. List three fruits.\n2. Explain why they are healthy."),
         said("a", "Summarize the text below and translate it into French.")],
        [said("a", "What is a cat?"), said("a", "Write a story about a cat and a dog. Make it short."),
         said("a", "Compare and contrast cats and dogs."), said("a", "Correct the text.", input="Who? Where? When?"),
         said("a", "Explain the law and give an example.")],
    ),
    "long-answer": ([said("word. " * 401)], [said("word. " * 400)]),
    "long-sentence": (
        [said(LONG), said("Short. " + LONG), chat(("user", "a"), ("assistant", LONG), ("user", "b"),
         ("assistant", "c"))],
        [said(LONG.removeprefix("word ")), said("Blue.", LONG), said(("word " * 20 + "\n") * 3),
         said(f"```\n{LONG}\n```"), said("word " * 20 + "then. " + "Word " * 20)],
    ),
    "boilerplate": (
        [said("As an AI language model, I cannot have a favourite."), said("I'm an AI, so I have none."),
         said("Blue. I hope this helps!"), said("Certainly! Blue."), said("Sure, here is a colour: blue."),
         said("Blue.\n\nLet me know if you need more."), said("It is not a substitute for medical advice."),
         said("I'm sorry, but I can't help with that."), said("As of my last knowledge update, it is blue."),
         said("As an artificial intelligence system, I cannot see colours.")],
        [said("Blue."), said("As an AI engineer, she builds robots."), said("Of course, prices are higher in winter."),
         said("Dear Sir, let me know if you are free.\n\nYours, Ann"), said("I'm sorry, I was late."),
         said("Blue.", "As an AI language model, what do you say?")],
    ),
    "url": (
        [said("See https://example.com/a."), said("At www.example.org"), said("[here](http://a.io)")],
        [said("Type http and wait"), said("`curl https://a.io`"), said("```\nGET http://a.io\n```"), said("a://b.c", "http://a.io")],
    ),
    "personal": (
        [*(said(text) for text in PERSONAL), said("a", "Write to bob@corp.io")], [said(text) for text in NUMBERS],
    ),
    "secret": (
        [said(f"The key is {secret} today") for secret in SECRETS],
        [said(text) for text in ("sk-learn-is-a-package", "AKIA is a prefix", "ghp_short", "a risk-assessment", TOKEN)],
    ),
    "context": ([said("word " * 1000)], [said("word " * 700)]),
    "unwritable": ([said("<s>")], [said("s")]),
    "duplicate": (
        [said("Blue."), said("Red."), said("Blue. ")],
        [said("Blue."), said("blue."), said("Blue.", "Name another colour")],
    ),
    "near-duplicate": (
        [said(" ".join(STORY)), said(" ".join([*STORY[:30], "moreover", *STORY[31:]]))],
        [said(" ".join(STORY)), said(" ".join(STORY[:30])), said(" ".join(reversed(STORY)))],
    ),
    "contradiction": (
        [said("Blue."), said("Red.", "name a  COLOUR")],
        [said("Blue."), said("Blue. "), said("Red.", "Name another colour"), said("Red.", input="of blood"),
         {"text": "a"}, {"text": "b"}],
    ),
    "leak": (
        [{"train.jsonl": [said("Blue.")], "validation.jsonl": [said("Red.", "name a colour")]},
         {"train.jsonl": [said(" ".join(STORY), "One")], "test.jsonl": [said(" ".join(STORY), "Two")]},
         {"train.jsonl": [{"text": "One."}], "dev.jsonl": [{"text": "One. "}]}],
        [{"train.jsonl": [said("Blue.")], "validation.jsonl": [said("Blue.", "Name another colour")]},
         {"train.jsonl": [said("Blue."), said("Blue.")], "test.jsonl": [said("Red.", "Another")]}],
    ),
    "unbalanced": ([*tones(dry=61, warm=10)], [*tones(dry=49, warm=10), *[said(f"{i}", f"{i}") for i in range(99)]]),
}  # fmt: skip


def refuse_s(record) -> int:
    """A measure of a base whose tokenizer has a special token."""
    if "<s>" in whole(record):
        raise UserError(f"{record.where}: a message has the special token '<s>'")
    return len(whole(record)) // 4


def write(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row, ensure_ascii=False).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def linted(place: Path, **others) -> Report:
    return lint(files_of(str(place)), How({}, 0.1, refuse_s, 1024, **others))


def in_folder(case: object, folder: Path) -> Report:
    """What linting finds in rows, or in the rows of several files."""
    folder.mkdir()
    for name, rows in case.items() if isinstance(case, dict) else [("rows.jsonl", case)]:
        write(folder / name, rows)
    return linted(folder)


TOGETHER = ("duplicate", "near-duplicate", "contradiction", "unbalanced")  # which only several records break


def test_every_rule_has_its_cases():
    assert CASES.keys() == RULES.keys()


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_finds_what_breaks_it_and_nothing_else(rule: str, tmp_path: Path) -> None:
    bad, good = CASES[rule]
    for i, case in enumerate(good if rule == "leak" else [good]):
        tally = in_folder(case, tmp_path / f"good{i}").tallies[rule]
        assert not tally.count, tally.examples()
    first = said("Good.", "Say good.")
    for i, case in enumerate([bad] if rule in TOGETHER else bad):
        rows = case if rule in TOGETHER or rule == "leak" else [first, case]
        tally = in_folder(rows, tmp_path / f"bad{i}").tallies[rule]
        assert tally.count == 1, case
        assert rule in TOGETHER or rule == "leak" or tally.examples()[0][0].endswith("line 2")


def test_linting_goes_on_after_what_is_no_record(tmp_path: Path) -> None:
    """A line that is too long, broken lines, and ragged lines of CSV: each is counted, and the rest is read."""
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        file.truncate(LONGEST + 100)
        file.seek(0, 2)
        file.write(b'\n{"text": "two"}\n{"text": \n')
    (tmp_path / "b.csv").write_text('prompt,completion\nthree,3\nonly\n\n"four\nlines",4\na,b,c\nfive,"5"x\nsix,6\n')
    (tmp_path / "c.json").write_text('[{"text": "seven"}, 8, {"text": "nine"}]')
    report = linted(tmp_path)
    assert (report.records, report.rows) == (7, 13)
    assert report.broken.keys() == {"not-a-record"}
    bad = [f"{where}: {row}" for path in sorted(tmp_path.iterdir()) for where, row in tried(path) if is_bad(row)]
    told = (
        "a.jsonl line 2: it has more than 64 MB", "a.jsonl line 4: no JSON in UTF-8: ", "b.csv line 3: it has 1 fields",
        "b.csv line 7: it has 3 fields, and line 1 names 2 columns", "b.csv line 8: no CSV: ",
        "c.json record 2: must be an object in braces, and it is 8",
    )  # fmt: skip
    assert len(bad) == len(told)
    assert all(part in line for line, part in zip(bad, told, strict=True)), bad


def is_bad(row: object) -> bool:
    return isinstance(row, UserError)


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.csv", b"prompt,completion\n" + b"a,b\n" * 5000 + b"c,d\xff\n", "it is not UTF-8"),
        ("a.csv", "prompt,completion\na,é\n".encode("utf-16"), "is not UTF-8"),
        ("a.csv", b"prompt;completion\na;b\n", "a.csv line 1: its columns must be separated by commas"),
        ("a.json", b'[{"text": "a"}', "a.json: no JSON in UTF-8"),
        ("a.json", b'{"a": 1}', "a.json: must hold one list of records"),
        ("a.jsonl", b"\n \n", "a.jsonl: it has no records"),
        ("a.parquet", b"PAR", "a.parquet is no Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(name: str, data: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        for _, row in tried(tmp_path / name):
            if isinstance(row, UserError):
                raise row
        linted(tmp_path)
    assert told in str(error.value)
    assert name in str(error.value)


def test_the_worst_come_first_and_a_record_counts_once(tmp_path: Path) -> None:
    rows = [said(" ".join(["word"] * n) + ". " + LONG) for n in (30, 50, 40, 35, 20)]
    tally = linted(write(tmp_path / "rows.jsonl", rows)).tallies["long-sentence"]
    assert tally.count == 5
    assert [(where.rpartition(" ")[2], what[:8]) for where, what in tally.examples()] == [
        ("2", "50 words"), ("3", "40 words"), ("4", "35 words"),
    ]  # fmt: skip


def test_rules_can_be_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [said("See https://a.io. I hope this helps!"), b"{"])
    assert linted(path).broken.keys() == {"not-a-record", "url", "boilerplate"}
    assert linted(path, ignored=frozenset({"url", "not-a-record"})).broken.keys() == {"boilerplate"}


def test_what_is_found_is_told_without_repeating_it(tmp_path: Path) -> None:
    private_texts = [*SECRETS[:-1], "jane.doe@mail.co.uk", "4111 1111 1111 1111"]
    report = linted(write(tmp_path / "rows.jsonl", [said(f"It is {text}.", text[:2]) for text in private_texts]))
    told = json.dumps([report.tallies[rule].examples() for rule in ("secret", "personal")])
    assert report.tallies["secret"].count == len(SECRETS) - 1
    assert not any(text[5:] in told for text in private_texts)


def test_a_card_number_has_a_checksum():
    """Each digit that is changed makes it none."""
    for number in ("4111111111111111", "378282246310005", "6011111111111117"):
        assert private.is_card(number)
        for i, digit in enumerate(number):
            for other in set("0123456789") - {digit}:
                assert not private.is_card(number[:i] + other + number[i + 1 :])


def test_addresses_are_those_that_their_pattern_finds_in_the_whole_text():
    draw, parts = random.Random(0), [*"@@@.-+_a1é ,\n", "a@b.com", "x" * 63, "y" * 64, "com", f"{'b' * 40}.", "é@x.org"]
    found = 0
    for _ in range(20_000):
        text = "".join(draw.choices(parts, k=draw.randrange(1, 14)))
        there = [match[0] for match in private.EMAIL.finditer(text)]
        assert private.personal(text) == [f"an e-mail address, {each[:4]}..." for each in there], text
        found += len(there)
    assert found > 5000


def jaccard(one: str, other: str) -> float:
    a, b = (set(runs_of(text).tolist()) for text in (one, other))
    return len(a & b) / len(a | b)


def test_near_duplicates_are_those_that_share_most_of_their_runs():
    """Against every pair: all that are clearly near an earlier text are found, and nothing that clearly is not."""
    draw, words = random.Random(0), [f"w{i}" for i in range(5000)]
    there: list[str] = []
    for _ in range(400):
        if there and draw.random() < 0.7:
            new = draw.choice(there).split()
            for _ in range(draw.randrange(9)):
                new[draw.randrange(len(new))] = draw.choice(words)
        else:
            new = draw.choices(words, k=draw.randrange(20, 120))
        there.append(" ".join(new))
    signatures = Signatures()
    for text in there:
        signatures.add(text)
    found = signatures.near()
    near, far = 0, 0
    for i, text in enumerate(there):
        shares = [jaccard(text, there[j]) for j in range(i) if j not in found]
        if max(shares, default=0) > THRESHOLD + 0.1:
            near += 1
            assert i in found
        if max(shares, default=0) < THRESHOLD - 0.12:
            far += 1
            assert i not in found
        if i in found:
            assert found[i][0] not in found
            assert abs(found[i][1] - jaccard(text, there[found[i][0]])) < 0.15
    assert near > 50
    assert far > 100


def test_near_duplicates_in_scripts_without_blanks():
    signatures = Signatures()
    text = "春天来了，花园里的花都开了，孩子们在草地上奔跑，老人们坐在长椅上晒太阳，小鸟在树上唱歌。"
    for each in (
        text,
        text.replace("小鸟", "小猫"),
        "今天的天气很好，我们一起去公园散步，然后在湖边吃午饭，下午回家看书。",
    ):
        signatures.add(each)
    assert signatures.near().keys() == {1}


# --- mending --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("As an AI language model, I have none. However, many like blue.", "Many like blue."),
        ("Certainly! Here's a list:\n\n1. Blue", "1. Blue"),
        ("Sure, here are two colours: blue and red.", "blue and red."),
        ("Blue. See [the guide](https://a.io/x) for more.", "Blue. See the guide for more."),
        ("Blue (https://a.io).", "Blue."),
        ("Blue. See [here](https://a.io).", "Blue."),
        ("Blue.\n\nSource: https://a.io/b?c=d#e", "Blue."),
        ("Go to https://a.io and press the key.", "Go to https://a.io and press the key."),
        ("https://a.io", "https://a.io"),
        ("Type `curl https://a.io`.", "Type `curl https://a.io`."),
        ("a \r\nb\t\n\n\n\nc\u2028d\ufeff  ", "a\nb\n\nc\nd"),
        ("    def f():\n        return 1", "def f():\n        return 1"),
        ("Blue. I hope this helps!", "Blue."),
        ("Dear Sir, let me know if you can.\nYours, Ann", "Dear Sir, let me know if you can.\nYours, Ann"),
    ],
)
def test_what_is_mended(before: str, after: str) -> None:
    (row,) = Cleaning({}).rows(iter([("here", said(before))]))
    assert row == said(after)
    assert list(Cleaning({}).rows(iter([("here", row)]))) == [row]  # and nothing is left to mend


def test_cleaning_counts_each_change_and_leaves_the_rest_alone():
    rows = [
        said("Certainly! Blue. ", tone="dry", n=1), said("Blue.", tone="warm"), said("As an AI, I cannot."),
        said("", "x"), {"question": "a"}, chat(("user", "a https://a.io "), ("assistant", "b (http://c.io)")),
    ]  # fmt: skip
    cleaning = Cleaning({})
    kept = list(cleaning.rows((f"line {i}", row) for i, row in enumerate(rows, 1)))
    assert kept == [said("Blue.", tone="dry", n=1), chat(("user", "a https://a.io"), ("assistant", "b"))]
    assert cleaning.changes == Counter(
        {"white space": 2, "boilerplate": 1, "url": 1, "hollow": 1, "duplicate": 1, "not-a-record": 2}
    )
    assert (cleaning.read, cleaning.kept) == (6, 2)
    assert str(cleaning.refused) == "line 4: output is empty"


def test_a_prompt_that_is_continued_keeps_the_blank_before_its_continuation():
    row = {"prompt": "The sky is \r\n\r\n\r\n\r\nnow ", "completion": " blue.  "}
    (found,) = Cleaning({}).rows(iter([("here", row)]))
    assert found == {"prompt": "The sky is\n\nnow ", "completion": " blue."}


def test_columns_keep_their_names():
    columns = {"instruction": "frage", "output": "antwort"}
    row = {"frage": "Farbe? ", "antwort": "Sure! Blau.", "output": "unread "}
    (found,) = Cleaning(columns).rows(iter([("here", row)]))
    assert found == {"frage": "Farbe?", "antwort": "Blau.", "output": "unread "}


# --- forms ----------------------------------------------------------------------------------------------------------

FORMS = {
    "instruction": {"instruction": "Name it", "input": "a cat", "output": "Tom"},
    "completion": {"prompt": "Name it\n\na cat", "completion": "Tom"},
    "messages": chat(("user", "Name it\n\na cat"), ("assistant", "Tom")),
    "sharegpt": {"conversations": [{"from": "human", "value": "Name it\n\na cat"}, {"from": "gpt", "value": "Tom"}]},
    "text": {"text": "### Instruction:\nName it\n\n### Input:\na cat\n\n### Response:\nTom"},
}


@pytest.mark.parametrize("source", [form for form in FORMS if form != "text"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_record_in_another_form_asks_and_answers_the_same(source: str, target: str) -> None:
    record = to_record(FORMS[source], "here", {})
    row = converted(record, target)
    if target == "text":
        assert "Name it" in row["text"] and row["text"].endswith("Tom")
        assert to_record(row, "here", {}).prompt == ""
        return
    again = to_record(row, "here", {})
    assert answers(again) == ["Tom"]
    assert asked_of(again).split() == ["Name", "it", "a", "cat"]
    if source == "instruction":
        assert row == FORMS[target]


@pytest.mark.parametrize(
    ("row", "target", "told"),
    [
        (chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")), "instruction", "it has 2 turns"),
        (chat(("system", "s"), ("user", "a"), ("assistant", "b")), "completion", "it has a system prompt"),
        ({"text": "a"}, "messages", "it has no prompt"),
    ],
)
def test_a_form_without_a_place_for_all_of_a_record_is_refused(row: dict, target: str, told: str) -> None:
    with pytest.raises(UserError, match=f"^here: {told}"):
        converted(to_record(row, "here", {}), target)


def test_sentences_end_at_stops_and_lines_and_not_at_abbreviations():
    text = "Ask Dr. Who, e.g. now. It is 3.5! Is it?  Yes\n1. One\n2. Two「はい。」そう。"
    assert "".join(texts.pieces(text)) == text
    assert [piece.strip() for piece in texts.pieces(text)] == [
        "Ask Dr. Who, e.g. now.", "It is 3.5!", "Is it?", "Yes", "1. One", "2. Two「はい。」", "そう。",
    ]  # fmt: skip


def test_what_training_holds_out_is_what_linting_takes_for_held_out(tmp_path: Path) -> None:
    """A near copy of a training record among those that training holds out is a leak."""
    rows = [said(" ".join(STORY) + f" {i}", f"Number {i}") for i in range(40)]
    path = write(tmp_path / "rows.jsonl", rows)
    held_out = {record.where for record in load_records(str(path), {}, 0.1).validation}
    report = linted(path)
    assert 0 < len(held_out) < 40
    assert report.tallies["leak"].count == len(held_out)
    assert {where for where, _ in report.tallies["leak"].examples()} <= held_out
    assert sum(1 for _ in read_rows(path)) == report.records


@pytest.mark.parametrize(
    "part", ["a", "1 ", "1-", "+1 ", "a@a.", "a@", "@", ".", "?", ". ", "\t", "(", "[](", "(http://a", "see ", "`",
             "`a ", "sk-a-", "eyJaaaaaaaaaaa.", "-----BEGIN ", "not be ", "as an ai ", "sure! here is ",
             "and write a b ", ".)", "。", "<s>", "[a", "( "],
)  # fmt: skip
def test_no_text_takes_long(part: str) -> None:
    """A rule whose time grew with the square of a text's length would take minutes here."""
    text = part * (100_000 // len(part)) + " http://a.b/c (http://a.b) \x01"
    record = Record("here", prompt=text, completion=text)
    began = time.perf_counter()
    list(check(record, RULES))
    mended_row(Record("here", completion=text, row={"text": text}), {}, Counter())
    assert time.perf_counter() - began < 5
