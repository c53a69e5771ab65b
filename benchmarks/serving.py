"""A load test of serve.py on this machine: many clients at once over several adapters, each answer compared with the
one to the same request alone, and the seconds that answers take.

python -m benchmarks.serving --record                     64 clients, 8 adapters of the default base, 4 requests each
python -m benchmarks.serving --clients 8 --adapters 2 --requests 1
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.contest import close, parser
from runtime.errors import UserError
from runtime.extras import needs_package
from runtime.processes.command import run_command

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The king shall not be spoken of in this house till all of them are gone, and "
STEPS = {"MAX_ITERS": "10", "EVAL_ITERS": "1", "WARMUP_ITERS": "1"}  # what was learned does not count here
ADAPTED = {"USE_LORA": "True", "DATASET": "folio"}


def train(folder: Path, adapters: int) -> None:
    """A base and so many adapters of it, each after a few steps."""
    runs = [{"RUN_NAME": "base"}]
    for i in range(adapters):
        runs.append(
            {"USE_LORA": "True", "BASE": "base", "RUN_NAME": f"adapter-{i}", "SEED": str(i), "DATASET": "folio"}
        )
    for run in tqdm(runs, desc="training", disable=not sys.stderr.isatty(), leave=False):
        environ = os.environ | STEPS | run | {"CHECKPOINTS_DIR": str(folder)}
        done = subprocess.run(
            [sys.executable, ROOT / "training.py"], env=environ, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"training {run['RUN_NAME']} failed: {done.stderr.strip().splitlines()[-1]}")


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[str]:
    """The base URL of a server of these runs."""
    words = [sys.executable, ROOT / "serve.py", "--run", "base", "--port", "0", "--checkpoints-dir", folder, *flags]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        for line in server.stderr:
            if found := re.search(r"(http://\S+/v1) is the base URL", line):
                yield found[1]
                return
        raise UserError("the server did not start")
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()


def requests_of(clients: int, each: int, adapters: int) -> list[list[dict[str, Any]]]:
    """What each client asks for, one after the other: prompts of 4 to 76 characters, 20 to 100 tokens."""
    return [
        [
            {
                "model": f"adapter-{(client + n) % adapters}",
                "prompt": PROMPT[: 4 + (7 * client + 13 * n) % 73],
                "max_tokens": 20 + (11 * client + 29 * n) % 81,
                "seed": each * client + n,
            }
            for n in range(each)
        ]
        for client in range(clients)
    ]


def percentile(seconds: Sequence[float], share: float) -> float:
    """The value below which this share of the values is."""
    return sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))]


def ask(client: Any, request: dict[str, Any]) -> tuple[str, float]:
    """The text of an answer, and the seconds that it took."""
    begun = time.perf_counter()
    text = client.completions.create(**request).choices[0].text
    return text, time.perf_counter() - begun


def _same(value: float) -> dict[str, float]:
    """One figure as the rows of records have theirs."""
    return {"median": value, "min": value, "max": value}


def measure(url: str, asked: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Answers under load and alone: how many differ, how long they took, and tokens a second."""
    with needs_package("openai", "test"):
        import openai
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=600)
    flat = [request for requests in asked for request in requests]
    told = tqdm(total=2 * len(flat), desc="answers", disable=not sys.stderr.isatty(), leave=False)

    def one(request: dict[str, Any]) -> tuple[str, float]:
        answer = ask(client, request)
        told.update()
        return answer

    begun = time.perf_counter()
    with ThreadPoolExecutor(len(asked)) as threads:
        loaded = [a for some in threads.map(lambda requests: [one(r) for r in requests], asked) for a in some]
    took = time.perf_counter() - begun
    alone = [one(request) for request in flat]
    told.close()
    tokens = sum(request["max_tokens"] for request in flat)
    differ = sum(a[0] != b[0] for a, b in zip(loaded, alone, strict=True))
    times = {"under load": [s for _, s in loaded], "alone": [s for _, s in alone]}
    return [
        {"what": f"{len(flat)} answers to {len(asked)} clients: texts that differ from those alone", **_same(differ)},
        {"what": "tokens a second, all clients together", **_same(round(tokens / took))},
        *(
            {"what": f"seconds of an answer {when}, 99 of 100 within {percentile(each, 0.99):.2f}"}
            | {"median": statistics.median(each), "min": min(each), "max": max(each)}
            for when, each in times.items()
        ),
    ]


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=1)
    for name, default in (("clients", 64), ("adapters", 8), ("requests", 4), ("at-once", 64)):
        flags.add_argument(f"--{name}", type=int, default=default)
    options = flags.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        train(Path(temporary), options.adapters)
        with serving(Path(temporary), "--at-once", str(options.at_once)) as url:
            rows = measure(url, requests_of(options.clients, options.requests, options.adapters))
    for row in rows:
        print(f"{row['what']:<72} {row['median']:>9,.6g}", flush=True)
    close("serving", rows, options.record)


if __name__ == "__main__":
    run_command(main)
