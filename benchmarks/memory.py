"""Peak memory of a LoRA run over that of a full run, each in a fresh process.

python -m benchmarks.memory                          0.8M, 3.2M and 10.7M parameters, 4,096 and 1,024 tokens
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from benchmarks import peers
from benchmarks.contest import SIZES, close, parser, tell
from benchmarks.lora_step import make_step
from runtime.device import pick_machine
from runtime.errors import UserError, run_command

STEPS = 4


def peak(kind: str, size: str, tokens: int, device: str) -> int:
    """Bytes at the peak of a few steps less those before the model was built, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", kind, "--sizes", size]
    command += ["--tokens", str(tokens), "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"measuring {kind} at {size} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return int(done.stdout)


def child(kind: str, size: str, tokens: int, device: str) -> None:
    """What that process does: build, take the steps, print the bytes."""
    machine = pick_machine(device, "auto")
    before = machine.restart_peak_memory()
    step = make_step(peers.ours(SIZES[size], lora=kind == "lora"), machine, SIZES[size], tokens)
    for _ in range(STEPS):
        step()
    if before is None or (after := machine.peak_memory()) is None:
        raise UserError(f"this system does not tell how much memory {machine} takes")
    print(after - before)


def measure(size: str, tokens: int, rounds: int, device: str) -> dict:
    """The row of one size."""
    peaks = {kind: [peak(kind, size, tokens, device) for _ in range(rounds)] for kind in ("full", "lora")}
    ratios = [lora / full for lora, full in zip(peaks["lora"], peaks["full"], strict=True)]
    middle = {kind: statistics.median(values) for kind, values in peaks.items()}
    return {
        "what": f"{size}, {tokens} tokens: peak memory of LoRA / full ({middle['full'] / 1e6:.0f} MB)",
        "size": size,
        "tokens": tokens,
        "full_bytes": middle["full"],
        "lora_bytes": middle["lora"],
        "median": middle["lora"] / middle["full"],
        "min": min(ratios),
        "max": max(ratios),
        "goal": 0.75 if (size, tokens) == ("10.7M", 4096) else None,
    }


def main() -> None:
    """Run the command."""
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.8M", "3.2M", "10.7M"])
    flags.add_argument("--tokens", nargs="+", type=int, default=[4096, 1024])
    flags.add_argument("--child", choices=("full", "lora"), help=argparse.SUPPRESS)
    options = flags.parse_args()
    if options.child:
        return child(options.child, options.sizes[0], options.tokens[0], options.device)
    rows = []
    for size in options.sizes:
        for tokens in options.tokens:
            rows.append(measure(size, tokens, options.rounds, options.device))
            tell(rows[-1:])
    return close("memory", rows, options.record)


if __name__ == "__main__":
    run_command(main)
