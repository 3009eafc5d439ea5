"""Where a step's time goes, without stopping the device: CUDA events on a GPU, the clock on a CPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Seconds by name. On a GPU spans are measured on the current stream and are read once they are over."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        self._seconds: dict[str, float] = {}
        self._begun: dict[str, Any] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time of a stretch to ``name``."""
        begin = self._now()
        try:
            yield
        finally:
            self._add(name, begin)

    def start(self, name: str) -> None:
        """Begin a stretch that ends with `stop`, for what is no block of code; one at a time for each name."""
        self._begun[name] = self._now()

    def stop(self, name: str) -> None:
        """End the stretch that was begun, if one was."""
        if name in self._begun:
            self._add(name, self._begun.pop(name))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add(self, name: str, begin: Any) -> None:
        end = self._now()
        if self._cuda:
            self._spans.setdefault(name, []).append((begin, end))
        else:
            self._seconds[name] = self._seconds.get(name, 0.0) + end - begin

    def lap(self) -> Callable[[], dict[str, float]]:
        """Seconds by name since the last call, to be asked for once the device has come this far."""
        seconds, spans = self._seconds, self._spans
        self._seconds, self._spans = {}, {}

        def read() -> dict[str, float]:
            for name, pairs in spans.items():
                seconds[name] = seconds.get(name, 0.0) + sum(a.elapsed_time(b) for a, b in pairs) / 1000
            return seconds

        return read
