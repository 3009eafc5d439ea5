"""Where a step's time goes, without stopping the device: CUDA events on a GPU, the clock on a CPU."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds by name. On a GPU spans are measured on the current stream and are read after the step has ended anyway."""

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available()
        self._spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}
        self._seconds: dict[str, float] = {}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time of a stretch to ``name``."""
        if not self._cuda:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._spans.setdefault(name, []).append((begin, end))

    def read(self) -> dict[str, float]:
        """Seconds by name since the last call; on a GPU everything recorded must have been synchronised with."""
        found, self._seconds = self._seconds, {}
        for name, pairs in self._spans.items():
            found[name] = found.get(name, 0.0) + sum(a.elapsed_time(b) for a, b in pairs) / 1000
        self._spans = {}
        return found
