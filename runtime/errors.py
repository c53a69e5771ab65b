"""The errors that are a user's to fix: one line that says what, where and how to fix it, and an exit status."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence

from runtime.start import open_closed_streams, raise_on_ctrl_c


class UserError(Exception):
    """Something in the run went wrong that a person can mend; the command exits with status 1."""

    status = 1
    label = "error: "


class UsageError(UserError):
    """A setting or an argument is wrong, so nothing was started; the command exits with status 2."""

    status = 2


def join_problems(problems: Sequence[str], limit: int = 8) -> str:
    """Join problems into one line that lists at most `limit` of them."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return f"{'; '.join(problems[:limit])}{more}"


LESS_MEMORY = "lower BATCH_SIZE and raise GRADIENT_ACCUMULATION_STEPS by the same factor, or make the model smaller"


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and exit: errors of the user's become one line on stderr, never a traceback."""
    open_closed_streams()
    raise_on_ctrl_c()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    status, message = _outcome(main)
    for stream, text in ((sys.stdout, ""), (sys.stderr, message)):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # what is left in it cannot be written at exit either, where Python would complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


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
