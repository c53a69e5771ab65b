"""How soon nanoGPT's CPU result is reached: our whole process against nanoGPT's own, on tinyshakespeare.

python -m benchmarks.time_to_loss --nanogpt DIR      DIR holds nanoGPT's own files: train.py, config/, data/

nanoGPT's README has the recipe for a CPU: 4 layers, 4 heads, 128 wide, 64 positions, 2,000 steps of 12 windows, with
which it reports a validation loss of 1.88. Ours has the same shapes, with rotary positions, and reaches that loss over
the whole validation text in fewer steps. Both are timed from the start of the process to its end, in turn.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.contest import close, parser, tell
from benchmarks.runs import ROOT
from data.corpora import load_corpus
from runtime.errors import UserError
from runtime.processes.command import run_command

LOSS, GOAL = 1.88, 7.0
SHAPE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
RECIPE = {"device": "cpu", "compile": False, "eval_iters": 20, "log_interval": 100, "batch_size": 12, "dropout": 0.0}
RECIPE |= {"max_iters": 2000, "lr_decay_iters": 2000}
OURS = {"max_iters": 220, "batch_size": 24, "learning_rate": 8e-3, "warmup_iters": 20, "eval_interval": 220}


def prepare_nanogpt(folder: Path, data_dir: Path) -> None:
    """Its own data files, made by its own script from our text. Raises UserError where one is missing."""
    data = folder / "data" / "shakespeare_char"
    for path in (folder / "train.py", folder / "config" / "train_shakespeare_char.py", data / "prepare.py"):
        if not path.is_file():
            raise UserError(f"--nanogpt {folder}: {path} is missing; it must be a copy of nanoGPT's repository")
    if not (data / "train.bin").exists():
        load_corpus("tinyshakespeare", data_dir)
        shutil.copy(data_dir / "tinyshakespeare.txt", data / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=data, check=True, stdout=subprocess.DEVNULL)


def timed(command: list[str], folder: Path) -> float:
    """Seconds from a command's start to its end. Raises UserError where it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise UserError(f"{' '.join(command[1:3])} failed: {last}")
    return time.perf_counter() - start


def run_nanogpt(folder: Path) -> float:
    """Seconds of nanoGPT's whole run."""
    with tempfile.TemporaryDirectory() as out:
        flags = [f"--{name}={value}" for name, value in (SHAPE | RECIPE | {"out_dir": out}).items()]
        return timed([sys.executable, "train.py", "config/train_shakespeare_char.py", *flags], folder)


def run_ours(data_dir: Path, seed: int) -> tuple[float, float]:
    """Seconds of our whole run, and the loss that it reached over the whole validation text."""
    with tempfile.TemporaryDirectory() as out:
        values = SHAPE | OURS | {"dataset": "tinyshakespeare", "device": "cpu", "seed": seed, "run_name": "run"}
        values |= {"checkpoints_dir": out, "data_dir": str(data_dir.resolve())}
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
        seconds = timed([sys.executable, str(ROOT / "training.py"), *flags], Path(out))
        return seconds, json.loads((Path(out) / "run" / "result.json").read_bytes())["val_loss"]


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--nanogpt", type=Path, required=True, help="a folder with nanoGPT's own files")
    flags.add_argument("--data-dir", type=Path, default=Path("data") / "cache")
    options = flags.parse_args()
    prepare_nanogpt(options.nanogpt, options.data_dir)
    run_ours(options.data_dir, 0)  # makes the cache of tokens, as nanoGPT's script did
    theirs, ours, losses = [], [], []
    for i in range(options.rounds):
        theirs.append(run_nanogpt(options.nanogpt))
        seconds, loss = run_ours(options.data_dir, 1337 + i)
        ours.append(seconds)
        losses.append(loss)
        print(f"nanoGPT {theirs[-1]:.1f} s, ours {seconds:.1f} s with loss {loss:.4f}", flush=True)
    if statistics.median(losses) > LOSS:
        raise UserError(f"the median loss is {statistics.median(losses):.4f}, which is not yet {LOSS}")
    rounds = [a / b for a, b in zip(theirs, ours, strict=True)]
    what = f"tinyshakespeare to {LOSS}: nanoGPT's whole process / ours"
    row = {"what": what, "median": statistics.median(rounds), "min": min(rounds), "max": max(rounds), "goal": GOAL}
    tell([row])
    seconds = {"nanogpt_seconds": statistics.median(theirs), "our_seconds": statistics.median(ours)}
    close("time_to_loss", [row | seconds | {"losses": losses}], options.record)


if __name__ == "__main__":
    run_command(main)
