"""Rows of checkpoint tensors, wherever the chunks that hold them lie."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

from mimo_jobs.checkpoint import torch_dist
from mimo_jobs.errors import UserError
from mimo_jobs.weights import transfer
from mimo_jobs.weights.dtypes import itemsize


class RowReader:
    """Finds rows in a checkpoint directory; shared by the threads of a rank."""

    def __init__(self, source: Path, files: transfer.Files) -> None:
        self._source, self._files = source, files
        self._offsets: dict[torch_dist.Chunk, int] = {}

    def spans(
        self, stored: torch_dist.StoredTensor, row_elements: int, first: int, stop: int
    ) -> Iterator[tuple[int, int, list[transfer.Part]]]:
        """Rows ``[first, stop)`` as (row, next row, parts), each span made of the same chunks throughout.

        Raises:
            UserError: the chunks do not cover a row exactly once, or a file is damaged.
        """
        hits = [c for c in stored.chunks if c.offsets[0] < stop and first < c.offsets[0] + c.sizes[0]]
        ends = (e for c in hits for e in (c.offsets[0], c.offsets[0] + c.sizes[0]))
        cuts = sorted({first, stop, *(e for e in ends if first < e < stop)})
        size = itemsize(stored.dtype)
        for a, b in itertools.pairwise(cuts):
            parts, covered = [], 0
            for chunk in hits:
                if covered < row_elements and chunk.offsets[0] <= a and b <= chunk.offsets[0] + chunk.sizes[0]:
                    width = math.prod(chunk.sizes[1:])
                    left = chunk.offsets[1] if width != row_elements else 0
                    fd, at = self._place(stored, chunk)
                    parts.append((fd, at + (a - chunk.offsets[0]) * width * size, left * size, (left + width) * size))
                    covered += width
            if covered != row_elements:
                raise UserError(
                    f"{self._source}: {stored.key}: rows {a} to {b} are not covered by the checkpoint's chunks exactly once"
                )
            yield a, b, parts

    def blocks(self, stored: torch_dist.StoredTensor, row_elements: int, first: int, stop: int) -> Iterator[memoryview]:
        """The bytes of whole rows, in blocks of this thread's buffer."""
        for a, b, parts in self.spans(stored, row_elements, first, stop):
            yield from transfer.joined_rows(parts, row_elements * itemsize(stored.dtype), b - a)

    def _place(self, stored: torch_dist.StoredTensor, chunk: torch_dist.Chunk) -> tuple[int, int]:
        path = self._source / chunk.file
        fd = self._files.reader(path)
        if chunk not in self._offsets:
            self._offsets[chunk] = torch_dist.data_offset(fd, path, stored, chunk)
        return fd, self._offsets[chunk]
