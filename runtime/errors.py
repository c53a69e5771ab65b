"""The errors that are a user's to fix: one line that says what, where and how to fix it, and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something in the run went wrong that a person can mend; the command exits with status 1."""

    status = 1


class UsageError(UserError):
    """A setting or an argument is wrong, so nothing was started; the command exits with status 2."""

    status = 2


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and exit: errors of the user's become one line on stderr, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        sys.exit(141)
    sys.exit(0)
