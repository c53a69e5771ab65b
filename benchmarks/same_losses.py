"""The same runs with this code and with that of an earlier revision: losses and weights must be equal, bit for bit.

python -m benchmarks.same_losses REVISION
python -m benchmarks.same_losses REVISION --only lora dora
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from runtime.errors import UserError
from runtime.processes.command import run_command
from runtime.settings.config import EARLIER
from runtime.storage.content import sha256
from runtime.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
ALL = "--test-mode --batch-size 4 --max-iters 20 --eval-interval 10 --save-interval 10"
ADAPT = "--dataset milton --use-lora"
RUNS = {  # name: flags beside ALL; a run comes after its base
    "base": "--dtype fp32",
    "base-bf16": "--dtype bf16",
    "base-bias": "--dtype fp32 --bias --dropout 0.1",
    "base-bpe": "--dtype fp32 --tokenizer bpe --vocab-size 300",
    "accumulation": "--dtype fp32 --gradient-accumulation-steps 2",
    "full": "--dtype fp32 --base base --dataset milton",
    "lora": f"{ADAPT} --dtype fp32 --base base",
    "lora-bf16": f"{ADAPT} --dtype bf16 --base base-bf16",
    "lora-bias": f"{ADAPT} --dtype fp32 --base base-bias --lora-bias all --lora-dropout 0.1",
    "lora-bpe": f"{ADAPT} --dtype fp32 --base base-bpe --lora-targets standard --no-lora-train-embeddings",
    "rslora": f"{ADAPT} --dtype fp32 --base base --lora-variant rslora",
    "dora": f"{ADAPT} --dtype fp32 --base base-bias --lora-variant dora",
    "vera": f"{ADAPT} --dtype fp32 --base base --lora-variant vera",
    "adalora": f"{ADAPT} --dtype fp32 --base base --lora-variant adalora",
}
INEXACT = {"accumulation"}  # the parts of a step may be summed in another order


def train(checkout: Path, folder: Path, names: list[str]) -> None:
    """Train these runs in `folder` with the code of a checkout. Raises UserError where one fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("LORA_", "USE_LORA", "BASE"))}
    clean |= {name.upper(): value for name, value in EARLIER.items()}  # which an earlier revision ignores
    for name in names:
        flags = f"{ALL} {RUNS[name]} --run-name {name} --checkpoints-dir runs".split()
        command = [sys.executable, str(checkout / "training.py"), *flags]
        environ = clean | {"OMP_NUM_THREADS": "1", "DATA_DIR": str(cache()), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, encoding="utf-8", check=False)
        if done.returncode:
            raise UserError(f"{name} failed with the code in {checkout}: {done.stderr.strip().splitlines()[-1]}")


def cache() -> Path:
    """The folder of the corpora, the same for both."""
    return Path(os.environ.get("DATA_DIR", ROOT / "data" / "cache")).absolute()


def losses(run: Path) -> list[tuple]:
    """Training and validation losses by step."""
    return [(line["step"], line.get("loss"), line.get("val_loss")) for line in read_metrics(run / "metrics.jsonl")]


def weights(run: Path) -> str:
    """SHA-256 of the tensors that the run published, without the metadata before them."""
    (file,) = (path for name in ("model", "adapter") for path in (run / name).glob("*.safetensors"))
    data = file.read_bytes()
    return sha256(data[8 + int.from_bytes(data[:8], "little") :])


def differences(here: Path, there: Path, exact: bool) -> list[str]:
    """What differs between two folders of one run, in words."""
    mine, theirs = losses(here), losses(there)
    if exact:
        wrong = next((step for (step, *a), (_, *b) in zip(mine, theirs, strict=False) if a != b), None)
        found = [f"losses differ from step {wrong} on"] if wrong is not None or len(mine) != len(theirs) else []
        return found + (["weights differ"] if weights(here) != weights(there) else [])
    pairs = [(x, y) for a, b in zip(mine, theirs, strict=True) for x, y in zip(a, b, strict=True) if x is not None]
    most = max(abs(x - y) for x, y in pairs)
    return [] if most < 1e-3 else [f"losses differ by up to {most:.1e}"]


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("revision", help="a git revision of this repository")
    flags.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), help="runs to compare, and their bases")
    options = flags.parse_args()
    bases = {name for only in options.only for name in RUNS if f"--base {name} " in f"{RUNS[only]} "}
    names = [name for name in RUNS if name in bases or name in options.only]
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        there, new, old = (Path(temporary) / name for name in ("checkout", "new", "old"))
        git = ["git", "-C", str(ROOT), "worktree"]
        if subprocess.run([*git, "add", "--quiet", "--detach", str(there), options.revision], check=False).returncode:
            raise UserError(f"git cannot check out revision {options.revision}; its message is above")
        try:
            for name in names:
                for checkout, folder in ((ROOT, new), (there, old)):
                    folder.mkdir(exist_ok=True)
                    train(checkout, folder, [name])
                found = differences(new / "runs" / name, old / "runs" / name, name not in INEXACT)
                equal = "equal" if name not in INEXACT else "equal within 1e-3"
                print(f"{name:<14} {'; '.join(found) or equal}", flush=True)
                failed += bool(found)
        finally:
            subprocess.run([*git, "remove", "--force", str(there)], check=False)
    if failed:
        raise UserError(f"{failed} of {len(names)} runs differ from revision {options.revision}")


if __name__ == "__main__":
    run_command(main)
