"""JSON from files that may hold anything: every way to be wrong is a `UserError` that names the file."""

import json
from pathlib import Path
from typing import Any

from mimo_jobs.errors import UserError


def read_bytes(path: Path) -> bytes:
    """A regular file's contents. Raises `UserError` when it is missing, no regular file, or not readable."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def parse_object(raw: bytes, what: Path | str) -> dict[str, Any]:
    """A JSON object without duplicate names. Raises `UserError` naming ``what``."""
    try:
        value = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}: damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{what}: damaged: expected a JSON object, found {type(value).__name__}")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; see `parse_object`."""
    return parse_object(read_bytes(path), path)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [k for k, _ in pairs]
        twice = next(n for n in names if names.count(n) > 1)
        raise ValueError(f"{twice!r} is listed twice")
    return found
