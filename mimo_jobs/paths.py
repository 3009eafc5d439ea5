"""Where the submit side keeps its records, and how it reads paths. Standard library only."""

import os
import re
import secrets
import time
from pathlib import Path

HUB_DATA = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # as datasets.load_dataset takes it: owner/name, or name alone
DATA_FILES = (".jsonl", ".ndjson", ".json", ".parquet", ".tar")


def home() -> Path:
    """``$MIMO_JOBS_HOME``, else ``$XDG_STATE_HOME/mimo_jobs``, else ``~/.local/state/mimo_jobs``."""
    given = os.environ.get("MIMO_JOBS_HOME")
    if given:
        return Path(given).expanduser().absolute()
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser().absolute() / "mimo_jobs"


def new_id(name: str) -> str:
    """A run's name: sorts by time, unique, safe in a shell and in a URL."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def absolute(text: str) -> str:
    """An absolute path with ``~`` expanded; symbolic links are kept as the user wrote them."""
    return os.path.abspath(os.path.expanduser(text))


def data_ref(text: str) -> str:
    """A data set: a local path made absolute, or a hub id as it is."""
    place = absolute(text)
    if os.path.exists(place) or text.lower().endswith(DATA_FILES) or not HUB_DATA.fullmatch(text):
        return place
    return text
