"""Exceptions a user sees, each printed as one screen without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user can mend: names the file or field, the bound, the value and the way out. Exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """A wrong command line, recipe field or layout: known before anything ran. Exit code 2."""

    exit_code = 2


class JobFailed(UserError):
    """A job (or another of its ranks) failed; message and exit code are those of the first error of the first failing rank."""

    def __init__(self, message: str, exit_code: int = UserError.exit_code) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest candidate, or ``""`` when none is near."""
    near = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
