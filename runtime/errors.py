"""The errors that are a user's to fix: one line that says what, where and how to fix it, and an exit status."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something went wrong that a person can mend, as files that cannot be used; the command exits with status 1."""

    status = 1
    label = "error: "


class UsageError(UserError):
    """A setting or an argument is wrong, or names what is not there, so nothing was started; the command exits with
    status 2."""

    status = 2


def join_problems(problems: Sequence[str], limit: int = 8) -> str:
    """Join problems into one line that lists at most `limit` of them."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return f"{'; '.join(problems[:limit])}{more}"
