"""How a command runs and ends, in one process or as one of many: its errors become one line, never a traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtime import console
from runtime.errors import UsageError, UserError
from runtime.processes.launch import launch_of
from runtime.start import open_closed_streams, raise_on_ctrl_c

if TYPE_CHECKING:
    from runtime.processes.world import World

LESS_MEMORY = "lower BATCH_SIZE and raise GRADIENT_ACCUMULATION_STEPS by the same factor, or make the model smaller"


def run_command(main: Callable[[], None], many: bool = False) -> None:
    """Run a command's `main` and exit: errors of the user's become one line on stderr, whichever process has them.

    many: whether it can work as several processes. Then the first of them speaks, and all end together.
    """
    open_closed_streams()
    raise_on_ctrl_c()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    world: list[World] = []
    try:
        status, message = _outcome(lambda: _run(main, many, world))
    except Exception:  # a bug: its traceback says more than the others, which lose this process, would
        if world and world[0].speaks():
            world[0].said()
        raise
    if world and status:
        message = _told_once(world[0], message)
    for stream, text in ((sys.stdout, ""), (sys.stderr, message)):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # what is left in it cannot be written at exit either, where Python would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if world:
        world[0].said()
        os._exit(status)  # what gloo's threads still hold may abort a process that ends as usual, after all is done
    sys.exit(status)


def _run(main: Callable[[], None], many: bool, joined: list[World]) -> None:
    """Run `main`, after the other processes have been found where there are some."""
    if launch_of(os.environ).size == 1:
        main()
        return
    from runtime.processes.world import connect  # torch takes a second, which not every command needs

    world = connect()
    joined.append(world)
    if not world.leads:
        console.silence()
    if not many:
        raise UsageError(f"{sys.argv[0]} works as one process: start it without torchrun")
    try:
        main()
    except SystemExit as ending:  # as --help does
        if ending.code:
            raise
    except Exception as error:
        if lost := world.lost(error):
            raise lost from None
        raise
    world.leave()


def _told_once(world: World, message: str) -> str:
    """The message where this process is the first that has one, "" on the others, which wait until it is said."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends to all as soon as one has failed
    return message if world.speaks() else ""


def _outcome(main: Callable[[], None]) -> tuple[int, str]:
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        line = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", str(error))  # a file's name may hold anything
        return error.status, f"{error.label}{line}\n"
    except KeyboardInterrupt:
        return 130, "\nstopped\n"
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        return 141, ""
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):  # a disk that is full or failing is no bug
            raise
        verb = "write" if error.errno == errno.ENOSPC else "read or write"
        return 1, f"error: could not {verb} {error.filename or 'the results'}: {error.strerror}\n"
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return 1, f"error: out of memory; {LESS_MEMORY}\n"
    return 0, ""


def _is_out_of_memory(error: Exception) -> bool:
    """Whether there is no room, in Python's words, an accelerator's or those of torch on the CPU."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "DefaultCPUAllocator" in str(error)
