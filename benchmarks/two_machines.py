"""One run on two machines, for which this one stands in, against the same run by one process: the same weights.

python -m benchmarks.two_machines                    `make two-machines`
python -m benchmarks.two_machines --loopback         without namespaces, as where they are not allowed

Two torchrun agents start two processes each. On Linux each agent is in a network namespace of its own, which reaches
the other through a virtual cable alone; `unshare -r` makes them without root where the system allows that. They share
the folder of runs, and each has texts of its own.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.same_losses import losses
from benchmarks.workers import ROOT, free_port
from runtime.errors import UserError
from runtime.processes.command import run_command
from runtime.processes.launch import NEEDED

SECONDS = 300
TEXT = "To be, or not to be, that is the question. Whether 'tis nobler in the mind to suffer.\n"
SETTINGS = "--test-mode --max-iters 20 --eval-interval 10 --save-interval 10 --device cpu --dropout 0.1"
PARTS, MACHINES, EACH = 4, 2, 2  # parts of a step, machines, processes of a machine
FIRST, SECOND, CABLE, PORT = "10.77.0.1", "10.77.0.2", "machine", 29500
# Runs in a namespace of its own. $1 and $2: the commands of the two machines. The second waits until its end of the
# cable is there, and both ends have addresses.
NAMESPACES = f"""
set -e
trap 'kill $first $second 2> /dev/null || true' EXIT TERM INT
ip link set lo up
unshare --net sh -c 'until ip address show {CABLE} 2>&1 | grep -q {SECOND}; do sleep 0.05; done; exec sh -c "$0"' "$2" &
second=$!
until [ "$(readlink /proc/$second/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add {CABLE} type veth peer name other
ip link set other netns $second
ip address add {FIRST}/24 dev {CABLE}
ip link set {CABLE} up
nsenter --target $second --net sh -c 'ip link set lo up; ip link set other name {CABLE}; ip link set {CABLE} up
ip address add {SECOND}/24 dev {CABLE}'
sh -c "$1" &
first=$!
wait $first
wait $second
"""


def training(folder: Path, where: str, texts: str, text: Path, *before: str) -> list[str]:
    """A command that trains in `where` of the folder, with its cache in `texts` of it. before: what starts it."""
    words = [*before, "training.py", *SETTINGS.split(), f"--step-parts={PARTS}", f"--dataset={text}"]
    return [*words, f"--checkpoints-dir={folder / where}", f"--data-dir={folder / texts}", "--run-name=run"]


def agent(folder: Path, text: Path, machine: int, address: str, port: int) -> list[str]:
    """The torchrun line of one machine."""
    nodes = [f"--nnodes={MACHINES}", f"--node-rank={machine}", f"--nproc-per-node={EACH}"]
    meeting = [f"--master-addr={address}", f"--master-port={port}"]
    run = [sys.executable, "-m", "torch.distributed.run", *nodes, *meeting]
    return training(folder, "several", f"texts-{machine}", text, *run)


def namespaces_work() -> bool:
    """Whether this system lets us make two network namespaces with a cable between them."""
    made = "ip link add machine type veth peer name other && unshare --net true"
    try:
        done = subprocess.run(["unshare", "-rn", "sh", "-c", made], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def train_on_two(folder: Path, text: Path, apart: bool, environ: dict[str, str]) -> None:
    """Train on both machines at once. Raises UserError where one fails."""
    if apart:
        environ = environ | {"GLOO_SOCKET_IFNAME": CABLE}
        lines = ["exec " + shlex.join(agent(folder, text, machine, FIRST, PORT)) for machine in range(MACHINES)]
        commands = [["unshare", "-rn", "sh", "-c", NAMESPACES, "sh", *lines]]
    else:
        port = free_port()
        commands = [agent(folder, text, machine, "127.0.0.1", port) for machine in range(MACHINES)]
    processes = [subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL) for command in commands]
    try:
        statuses = [process.wait(SECONDS) for process in processes]
    except subprocess.TimeoutExpired:
        raise UserError(f"the two machines have not finished within {SECONDS} seconds") from None
    finally:
        for process in processes:
            process.terminate()
    if any(statuses):
        raise UserError(f"training on two machines ended with exit status {max(statuses)}; its messages are above")


def main() -> None:
    """Run the command."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--loopback", action="store_true", help="both machines on this one's own network")
    options = flags.parse_args()
    apart = not options.loopback and namespaces_work()
    environ = {name: value for name, value in os.environ.items() if name not in NEEDED}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    with tempfile.TemporaryDirectory() as parent:
        folder, text = Path(parent), Path(parent, "text.txt")
        text.write_text("".join(f"{i} {TEXT}" for i in range(400)), "utf-8")
        alone = training(folder, "alone", "texts", text, sys.executable)
        if subprocess.run(alone, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, check=False).returncode:
            raise UserError("training with one process failed; its messages are above")
        train_on_two(folder, text, apart, environ)
        runs = [folder / where / "run" for where in ("alone", "several")]
        first, second = ((run / "model" / "model.safetensors").read_bytes() for run in runs)
        if first != second or losses(runs[0]) != losses(runs[1]):
            raise UserError("two machines do not train the weights that one process trains")
    through = "two network namespaces" if apart else "the loopback interface"
    told = "the losses and weights of one process, bit for bit"
    print(f"{MACHINES} machines of {EACH} processes, through {through}: {told}")


if __name__ == "__main__":
    run_command(main)
