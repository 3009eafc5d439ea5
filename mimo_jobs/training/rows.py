"""Which samples each row of each step holds: a pure function of the data, the seed and the settings, not of the layout."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Rows:
    """Samples of every row of every step.

    Attributes:
        epoch_rows: epoch -> its rows, each a list of sample indexes (one, unless packed); called once an epoch.
        global_batch_size: rows of a step.
        stop: rows of the whole run; rows after it are empty.
    """

    epoch_rows: Callable[[int], Sequence[Sequence[int]]]
    global_batch_size: int
    stop: int
    _starts: list[int] = field(default_factory=lambda: [0])
    _known: dict[int, Sequence[Sequence[int]]] = field(default_factory=dict)

    def of_step(self, step: int) -> list[list[int]]:
        """The rows of a step, counted from 0; those after the end of the run are empty."""
        first = step * self.global_batch_size
        return [self._row(p) if p < self.stop else [] for p in range(first, first + self.global_batch_size)]

    def _row(self, position: int) -> list[int]:
        while self._starts[-1] <= position:
            self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
        epoch = bisect_right(self._starts, position) - 1
        return list(self._epoch(epoch)[position - self._starts[epoch]])

    def _epoch(self, epoch: int) -> Sequence[Sequence[int]]:
        if epoch not in self._known:
            self._known = {e: r for e, r in self._known.items() if e >= epoch - 1}
            self._known[epoch] = self.epoch_rows(epoch)
            assert self._known[epoch], "an epoch without rows"
        return self._known[epoch]


def steps_and_stop(
    rows_of_epoch: Callable[[int], int], global_batch_size: int, steps: int | None, epochs: float
) -> tuple[int, int]:
    """Optimizer steps of a run, and after how many rows it stops.

    Args:
        rows_of_epoch: epoch -> its rows.
        steps: if given, so many full steps, whatever ``epochs`` says.
        epochs: may be a fraction; the last step holds what is left.
    """
    if steps is not None:
        return steps, steps * global_batch_size
    whole = int(epochs)
    stop = sum(map(rows_of_epoch, range(whole)))
    if epochs > whole:
        stop += max(1, round((epochs - whole) * rows_of_epoch(whole)))
    return -(-stop // global_batch_size), stop
