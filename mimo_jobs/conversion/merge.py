"""An adapter added to the weights while they stream: ``W + scale * B @ A``, rows at a time, rounded once. No torch.

Under DoRA each row of the sum is then given its magnitude for norm.
Each rank merges the rows that it writes, so nothing is gathered and memory stays at a few tiles of rows.
"""

import math
from functools import lru_cache
from typing import Any

from mimo_jobs.checkpoint import torch_dist
from mimo_jobs.checkpoint.peft_dir import PARTS, WEIGHTS_NAME, PeftAdapter
from mimo_jobs.conversion.rows import RowReader
from mimo_jobs.weights import transfer
from mimo_jobs.weights.adapters import WEIGHT, scale_of
from mimo_jobs.weights.dtypes import cast_to, itemsize
from mimo_jobs.weights.rules import Segment

# Rows of an HF tensor that are computed at once, from a multiple of TILE: the same products of the same shape in every
# layout, so that every layout writes the same bits. 64 rows of 17408 columns are 4.5 MB of fp32.
TILE = 64


class Merger:
    """Adds one adapter to rows of the weights it is of; shared by the threads of a rank."""

    def __init__(self, adapter: PeftAdapter, files: transfer.Files) -> None:
        self._adapter, self._fd = adapter, files.reader(adapter.directory / WEIGHTS_NAME)
        self._scale = scale_of(adapter)
        self._a = lru_cache(maxsize=8)(self._read_a)

    def write_rows(
        self, rows: RowReader, stored: torch_dist.StoredTensor, row_elements: int, run: Segment, name: str, dtype: str,
        target: int, offset: int, moved: transfer.Moved,
    ) -> None:  # fmt: skip
        """Rows of a checkpoint tensor to rows of a merged HF tensor.

        Args:
            rows: of the checkpoint; ``stored``: its tensor; ``run``: which of its rows.
            name: of the HF tensor; ``dtype``: to write it in; ``offset``: of its first row in the file ``target``.
            moved: told the bytes read of the checkpoint.
        """
        import numpy as np

        module, wide = name.removesuffix(WEIGHT), "F64" if "F64" in (stored.dtype, dtype) else "F32"
        first, stop = run.hf_row, run.hf_row + run.count
        for row in _tiles(first, stop):
            end = min(stop, row - row % TILE + TILE)
            at = run.stored_row + row - first
            values, done = np.empty((end - row) * row_elements, _numpy(wide)), 0
            for block in rows.blocks(stored, row_elements, at, at + end - row):
                part = np.frombuffer(block, _numpy(stored.dtype))
                values[done : done + len(part)] = part
                done += len(part)
                moved(len(block))
            total = values.reshape(end - row, row_elements) + self._update(module, row, end, _numpy(wide))
            if self._adapter.dora:
                total *= self._magnitudes(module, row, end, _numpy(wide)) / np.linalg.norm(total, axis=1, keepdims=True)
            merged = memoryview(total.view(np.uint8)).cast("B")
            cast = cast_to(wide, dtype)
            raw = cast(merged) if cast else merged
            transfer.write_full(target, raw, offset + row * row_elements * itemsize(dtype))

    def _update(self, module: str, row: int, stop: int, dtype: Any) -> Any:
        """``scale * B @ A`` of rows [row, stop), which lie in one tile."""
        start = row - row % TILE
        b = self._rows(f"{module}.lora_B", start, min(TILE, self._shape(module)[0] - start), dtype)
        return (b @ self._a(module, dtype))[row - start : stop - start] * dtype(self._scale)

    def _magnitudes(self, module: str, row: int, stop: int, dtype: Any) -> Any:
        return self._rows(f"{module}.{PARTS[2]}", row, stop - row, dtype)

    def _shape(self, module: str) -> tuple[int, ...]:
        return self._adapter.tensors[f"{module}.lora_B"].shape

    def _read_a(self, module: str, dtype: Any) -> Any:
        return self._rows(f"{module}.lora_A", 0, self._adapter.rank, dtype)

    def _rows(self, tensor: str, row: int, count: int, dtype: Any) -> Any:
        import numpy as np

        info = self._adapter.tensors[tensor]
        columns = math.prod(info.shape[1:])
        width = columns * itemsize(info.dtype)
        raw = memoryview(bytearray(count * width))
        transfer.read_full(self._fd, raw, info.offset + row * width)
        return np.frombuffer(raw, _numpy(info.dtype)).astype(dtype).reshape(count, columns)


def _tiles(first: int, stop: int) -> list[int]:
    """Where ``[first, stop)`` is cut: at ``first``, then at every multiple of `TILE`."""
    return [first, *range(first - first % TILE + TILE, stop, TILE)]


def _numpy(dtype: str) -> Any:
    import ml_dtypes
    import numpy as np

    return {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}[dtype]


def merged_names(adapter: PeftAdapter | None) -> set[str]:
    """HF tensors that an adapter changes."""
    return {module + WEIGHT for module in adapter.modules} if adapter else set()


def adapter_summary(adapter: PeftAdapter, digest: str) -> dict[str, Any]:
    """What a certificate says of a merged adapter."""
    return {
        "path": str(adapter.directory), "digest": digest, "rank": adapter.rank, "alpha": adapter.alpha,
        "scale": scale_of(adapter), "modules": len(adapter.modules), "base_model": adapter.base_model,
    }  # fmt: skip
