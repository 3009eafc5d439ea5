"""What a rank needs of each optimizer step, read ahead in worker processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimo_jobs.training.data.encode import Encoded, Encoder
from mimo_jobs.training.data.samples import BadSample
from mimo_jobs.training.data.sources import Source
from mimo_jobs.training.data.workers import in_order

Pixels = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Want:
    """What this rank needs of a row of the global batch.

    Args:
        row: number of the row in its step
        samples: indexes into the source; several in a packed row
        text: tokens and labels
        pixels: patches of the images
    """

    row: int
    samples: Sequence[int]
    text: bool = True
    pixels: bool = True


@dataclass
class Loaded:
    """A row as it was asked for; one entry a sample. With a problem both are None.

    Args:
        pixels: (float32[patches, features], int64[images, 3]) of each sample
        problem: id of the first bad sample and why it is bad
    """

    row: int
    samples: list[int]
    encoded: list[Encoded] | None = None
    pixels: list[Pixels] | None = None
    problem: str | None = None


class Loader:
    """Rows of optimizer steps, in order, made ahead by worker processes. A bad sample is a problem of its row, not an exception.

    Args:
        source: the data set
        encoder: makes samples of conversations
        rows: what this rank needs of a step; a pure function, asked ahead of time
        start_step: first step
        stop_step: step to end before; without it there is no end
        workers: processes; 0 works here
        prefetch: rows made ahead; never less than those of the first step, so that one step is read while another is computed
    """

    def __init__(
        self,
        source: Source,
        encoder: Encoder,
        rows: Callable[[int], Sequence[Want]],
        start_step: int = 0,
        stop_step: int | None = None,
        workers: int = 0,
        prefetch: int = 4,
    ) -> None:
        self._work, self._rows = _Work(source, encoder), rows
        self._start, self._stop = start_step, stop_step
        self._workers, self._prefetch = workers, prefetch
        self._steps: Iterator[list[Loaded]] | None = None

    def __iter__(self) -> Iterator[list[Loaded]]:
        """The rows of each step from ``start_step`` on; iterating again begins anew.

        Raises:
            RuntimeError: a defect; has the traceback of the worker and the sample's id.
        """
        self.close()
        self._steps = self._read()
        return self._steps

    def close(self) -> None:
        """End the workers."""
        if self._steps is not None:
            self._steps.close()  # pyright: ignore[reportAttributeAccessIssue]
            self._steps = None

    def _read(self) -> Iterator[list[Loaded]]:
        if self._stop is not None and self._start >= self._stop:
            return
        ahead = max(self._prefetch, len(self._rows(self._start)), 1)
        step: list[Loaded] = []
        results = in_order(self._work, self._tasks(), self._workers, ahead)
        try:
            for last, sent in results:
                if sent is not None:
                    step.append(_unpacked(sent))
                if last:
                    yield step
                    step = []
        finally:
            results.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _tasks(self) -> Iterator[tuple[bool, Want | None]]:
        """(whether it is the last of its step, want): a step of which nothing is needed still has a task."""
        step = self._start
        while self._stop is None or step < self._stop:
            wants = list(self._rows(step)) or [None]
            for place, want in enumerate(wants, 1):
                yield place == len(wants), want
            step += 1


@dataclass(frozen=True)
class _Work:
    """Runs in the workers."""

    source: Source
    encoder: Encoder

    def __call__(self, task: tuple[bool, Want | None]) -> tuple[bool, Any]:
        last, want = task
        return last, None if want is None else _packed(self.load(want))

    def load(self, want: Want) -> Loaded:
        done = Loaded(want.row, list(want.samples), [] if want.text else None, [] if want.pixels else None)
        for sample in want.samples:
            try:
                conversation = self.source.conversation(sample)
                if done.encoded is not None:
                    done.encoded.append(self.encoder.encode(conversation))
                if done.pixels is not None:
                    done.pixels.append(self.encoder.pixels(conversation))
            except BadSample as error:
                return Loaded(want.row, done.samples, problem=f"{self.source.id(sample)}: {error}")
            except Exception as error:
                error.add_note(f"at sample {self.source.id(sample)} (index {sample})")
                raise
        return done


def _packed(loaded: Loaded) -> tuple[Loaded, Tensor | None]:
    """Pixels of all samples in one tensor: each tensor that a worker sends costs a file descriptor."""
    if loaded.pixels is None:
        return loaded, None
    patches = torch.cat([values for values, _ in loaded.pixels]) if loaded.pixels else None
    pairs: Any = [(len(values), grid.numpy()) for values, grid in loaded.pixels]
    return Loaded(loaded.row, loaded.samples, loaded.encoded, pairs, loaded.problem), patches


def _unpacked(sent: tuple[Loaded, Tensor | None]) -> Loaded:
    loaded, patches = sent
    if loaded.pixels is not None and patches is not None:
        pairs: Any = loaded.pixels
        values = patches.split([count for count, _ in pairs])
        loaded.pixels = [(value, torch.from_numpy(grid)) for value, (_, grid) in zip(values, pairs, strict=True)]
    return loaded
