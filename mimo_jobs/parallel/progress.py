"""progress.json, written by a thread: the disk it lies on may be far away, and nobody's work waits for it. Standard library only."""

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "progress.json"
REPORT_SECONDS = 0.2
END_SECONDS = 2.0


class ProgressFile:
    """The last state of a job, replaced whole at most every `REPORT_SECONDS`. States in between are left out."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._state: Mapping[str, Any] | None = None
        self._changed, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, state: Mapping[str, Any]) -> None:
        """Take a state to be written; returns at once."""
        with self._lock:
            self._state = state
            self._changed.set()
            if self._thread is None and not self._ended.is_set():
                self._thread = threading.Thread(target=self._work, name="progress", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Have the last state written, waiting no longer than `END_SECONDS` for it."""
        self._ended.set()
        self._changed.set()
        if self._thread is not None:
            self._thread.join(END_SECONDS)

    def _work(self) -> None:
        while not (self._ended.is_set() and self._state is None):
            self._changed.wait()
            with self._lock:
                state, self._state = self._state, None
                self._changed.clear()
            if state is not None:
                self._write(state)
            self._ended.wait(REPORT_SECONDS)

    def _write(self, state: Mapping[str, Any]) -> None:
        temporary = self.directory / f".{FILE}.tmp"
        with contextlib.suppress(OSError):
            temporary.write_text(json.dumps(state))
            os.replace(temporary, self.directory / FILE)
