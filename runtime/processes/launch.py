"""Which process this is of how many, as `torchrun` tells it in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import UsageError

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = NEEDED[:4]


@dataclass(frozen=True)
class Launch:
    """rank: the number of this process among `size`; local_rank: among the `local_size` on this machine; restart: how
    often torchrun has started them anew; torchrun: whether it did start them, and keeps what they tell each other."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restart: int = 0
    torchrun: bool = False


def launch_of(environ: Mapping[str, str]) -> Launch:
    """The launch that an environment tells of. Raises UsageError where it tells of one only in part.

    WORLD_SIZE=1 alone, as some clusters set it, is a process by itself.
    """
    given = [name for name in NEEDED if environ.get(name)]
    if "RANK" not in given and environ.get("WORLD_SIZE") in (None, "", "1"):
        return Launch()
    fix = "start several processes with torchrun, or unset RANK and WORLD_SIZE for one"
    if missing := [name for name in NEEDED if name not in given]:
        there = " and ".join(name for name in ("RANK", "WORLD_SIZE") if name in given)
        verb = "are" if " and " in there else "is"
        raise UsageError(f"{there} {verb} set in the environment, but not {', '.join(missing)}; {fix}")
    numbers = {name: environ[name] for name in (*NUMBERS, "MASTER_PORT")}
    if wrong := [f"{name}={value!r}" for name, value in numbers.items() if not value.isdecimal()]:
        raise UsageError(f"{', '.join(wrong)} in the environment is no number; {fix}")
    rank, size, local_rank, local_size = (int(environ[name]) for name in NUMBERS)
    if rank >= size:
        raise UsageError(f"RANK={rank} in the environment must be less than WORLD_SIZE={size}; {fix}")
    restarts, torchrun = environ.get("TORCHELASTIC_RESTART_COUNT", "0"), "TORCHELASTIC_RUN_ID" in environ
    return Launch(rank, size, local_rank, local_size, int(restarts) if restarts.isdecimal() else 0, torchrun)
