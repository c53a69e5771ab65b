"""Texts that nobody wrote to be read: a run comes to its result, or ends in one line that says what is wrong.

SOAK=1 measures memory on a line of 1 GB; otherwise on one of 16 MB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOAK = bool(os.environ.get("SOAK"))
LINE = 10**9 if SOAK else 16 * 10**6
MEMORY = 12  # times the file's size: the most that reading, tokenizing and caching a text may take

WORDS = b"To be, or not to be, that is the question:\n"
TEXTS = {
    "NUL": (b"to be\0 or not\0\0" * 40, ""),
    "only NUL": (bytes(3_000), ""),
    "lone surrogates": (WORDS * 20 + b"\xed\xa0\x80", "is not UTF-8 (byte 860"),
    "half a surrogate pair": (b"\xed\xb0\x80" + WORDS * 20, "is not UTF-8 (byte 0"),
    "overlong": (WORDS * 20 + b"\xc0\x80", "is not UTF-8"),
    "UTF-16": (WORDS.decode().encode("utf-16") * 20, "is not UTF-8"),
    "line separators": ("to be\u2028or\u2029not\u0085to\x0bbe\x0c\x1c".encode() * 40, ""),
    "byte-order mark": (b"\xef\xbb\xbf" + WORDS * 20, ""),
    "byte-order marks inside": ((b"\xef\xbb\xbf" + WORDS) * 20, ""),
    "CRLF": (WORDS.replace(b"\n", b"\r\n") * 20, ""),
    "CR": (WORDS.replace(b"\n", b"\r") * 20, ""),
    "empty": (b"", "is empty"),
    "only a mark": (b"\xef\xbb\xbf", "is empty"),
    "only blanks": (b" \t\r\n" * 500, "is empty"),
    "shorter than a block": (b"to be", "BLOCK_SIZE="),
    "no room to validate": (b"to be or not to be " * 3, "BLOCK_SIZE="),
    "all one character": (b"a" * 5_000, ""),
    "all one astral character": ("😀".encode() * 2_000, ""),
    "one long line": (b"to be or not to be " * 20_000, ""),
    "one long word": (b"abc" * 50_000, ""),
    "characters that combine": (("e" + "\u0301" * 30).encode() * 40, ""),
    "right to left, and controls": ("אבג\u202e\u200b\x1b[2J\x07\x7f".encode() * 60, ""),
    "many different characters": ("".join(map(chr, range(0x4E00, 0x9E00))).encode(), ""),
    "an end of text": (b"<|endoftext|>" * 200, ""),
}
TINY = ("--n-layer=1", "--n-embd=8", "--n-head=1", "--block-size=16", "--batch-size=2", "--max-iters=2")
TINY += ("--eval-iters=1", "--dtype=fp32", "--vocab-size=300", "--test-mode")

TRAIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import jobs.summaries.text, training
from runtime.processes.command import run_command
jobs.summaries.text.TEST_SAMPLE_CHARACTERS = 20
for i, flags in enumerate(json.loads(sys.argv[2])):
    sys.argv = ["training.py", *flags]
    try:
        run_command(training.main)
    except SystemExit as end:
        print(f"<end {end.code}>", file=sys.stderr, flush=True)
"""


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_a_run_on_any_text_ends_well_or_in_one_line(tmp_path, tokenizer):
    cases = []
    for i, (data, _) in enumerate(TEXTS.values()):
        (tmp_path / f"{i}.txt").write_bytes(data)
        cases.append([*TINY, f"--dataset={i}.txt", "--data-dir=data", f"--tokenizer={tokenizer}"])
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(ROOT), json.dumps(cases)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    parts = done.stderr.split("<end ")
    for i, (name, (_, wrong)) in enumerate(TEXTS.items()):
        errors = [line for line in parts[i].splitlines() if line.startswith("error: ")]
        status = int(parts[i + 1].split(">")[0])
        if tokenizer == "bpe" and errors and not wrong:
            wrong = "BLOCK_SIZE="  # where byte pairs make a few tokens of what repeats
        assert (status, len(errors)) == ((1, 1) if wrong else (0, 0)), (name, parts[i])
        assert not errors or wrong in errors[0], (name, errors)


MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from data.corpora import load_corpus
from data.text import tokens_of
from data.tokenizers import build_tokenizer
from runtime.device import Machine
machine = Machine(torch.device("cpu"), torch.float32)
build_tokenizer("char", "a", 0)
before = machine.restart_peak_memory()
corpus = load_corpus(sys.argv[2], Path("data"))
tokenizer = build_tokenizer("char", corpus.text, 0)
tokens = [tokens_of(text, tokenizer, Path("data")) for text in (corpus.train, corpus.validation)]
assert sum(map(len, tokens)) == len(corpus.train) + len(corpus.validation)
print(machine.peak_memory() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is Linux's to tell")
@pytest.mark.parametrize("start", [b"a", "😀".encode()], ids=["narrow", "wide"])
def test_a_giant_line_takes_a_bounded_multiple_of_its_size(tmp_path, start):
    """The file has a hole, which reads as NULs and takes no room; one wide character widens the whole text."""
    with (tmp_path / "line.txt").open("wb") as file:
        file.write(start)
        file.truncate(LINE)
    command = [sys.executable, "-c", MEASURE, str(ROOT), "./line.txt"]
    for cached in (False, True) if SOAK else (False,):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
        times = int(done.stdout) / LINE
        print(f"a line of {LINE:,} bytes{', from the cache' * cached}: {times:.1f} times its size")
        assert times <= MEMORY
