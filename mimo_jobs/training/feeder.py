"""Steps of samples, read ahead: each rank reads what it needs, then all agree on what every sample is.

The agreement (`StepTable`) travels over gloo on the CPU, from a thread, steps before it is needed: lengths, image tokens, which
samples are bad. So all ranks leave out the same samples, and no size has to be asked of a device.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mimo_jobs.errors import UserError
from mimo_jobs.layout import IMAGES, LANGUAGE
from mimo_jobs.modeling.build import ENCODER, BuiltModel
from mimo_jobs.training.batches import (
    IGNORED,
    Microbatch,
    Shares,
    StepTable,
    images_inputs,
    language_inputs,
)
from mimo_jobs.training.config import Dataset
from mimo_jobs.training.data import Encoder, Loaded, Loader, Source, Want
from mimo_jobs.training.rows import Rows

_UNKNOWN = -(1 << 40)
_TOKENS, _IMAGE_TOKENS, _LESS_IMAGE_TOKENS, _LOSS_TOKENS, _PATCH_PAIRS, _BAD = range(6)
STEPS_AHEAD = 2
CLOSE_SECONDS = 5.0
ALL_BAD = 4  # samples from the beginning without a good one: the data set is not what it was taken for


class BadData(UserError):
    """The samples of a step, or too many before, forbid to go on; all ranks know it before the step."""


@dataclass(frozen=True)
class Step:
    """One optimizer step's input on this rank.

    Attributes:
        problems: id and reason of every sample that is left out, the same on all ranks.
    """

    number: int
    table: StepTable
    microbatches: list[Microbatch]
    problems: list[str]


class Feeder:
    """Steps in order; a context manager. Collective over the world: every rank makes its feeders in the same order.

    Args:
        rows: samples of every row.
        first, stop: steps, counted from 0.
    """

    def __init__(
        self, built: BuiltModel, source: Source, encoder: Encoder, rows: Rows, shares: Shares, settings: Dataset, first: int, stop: int
    ) -> None:  # fmt: skip
        self._built, self._source, self._rows, self._shares, self._settings = built, source, rows, shares, settings
        self._group: Any = dist.new_group(backend="gloo")
        self._first, self._stop = first, stop
        self._seen = self._good = 0
        self._loader = Loader(source, encoder, self._wants, first, stop, settings.workers, settings.prefetch)
        self._ready: queue.Queue[Step | BaseException | None] = queue.Queue(STEPS_AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._fill, daemon=True)

    def __enter__(self) -> "Feeder":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        deadline = time.monotonic() + CLOSE_SECONDS  # it may wait for a rank that left; it ends with the process then
        while self._thread.is_alive() and time.monotonic() < deadline:
            with_step = self._taken()
            self._thread.join(0.05 if with_step else 0.2)
        if not self._thread.is_alive():
            dist.destroy_process_group(self._group)  # each validation has its own

    def _taken(self) -> bool:
        try:
            self._ready.get_nowait()
        except queue.Empty:
            return False
        return True

    def __iter__(self) -> Iterator[Step]:
        """Steps as they get ready.

        Raises:
            BadData: a bad sample with ``dataset.on_bad=stop``, or no good one among the first; on every rank, at the same step.
        """
        while (found := self._ready.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found

    def _fill(self) -> None:
        try:
            for number, loaded in enumerate(self._loader, self._first):
                self._put(self._made(number, loaded))
                if self._closing.is_set():
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)
        finally:
            self._loader.close()

    def _put(self, value: Step | BaseException | None) -> None:
        while not self._closing.is_set():
            try:
                self._ready.put(value, timeout=0.2)
                return
            except queue.Full:
                continue

    def _wants(self, number: int) -> Sequence[Want]:
        """What this rank needs, a want for each sample: ``row`` is its position in the step."""
        text, pixels = self._own_rows(LANGUAGE), self._own_rows(IMAGES)
        wants, position = [], 0
        for row, samples in enumerate(self._rows.of_step(number)):
            for sample in samples:
                if row in text or row in pixels:
                    wants.append(Want(position, [sample], row in text, row in pixels))
                position += 1
        return wants

    def _own_rows(self, component: str) -> set[int]:
        if component not in self._built.groups:
            return set()
        replica = self._built.groups[component].dp.rank()
        rows = self._shares.language_rows if component == LANGUAGE else self._shares.images_rows
        return {r for m in range(self._shares.microbatches) for r in rows(m, replica)}

    def _made(self, number: int, loaded: list[Loaded]) -> Step:
        rows = self._rows.of_step(number)
        ids = [self._source.id(s) for row in rows for s in row]
        found = self._agreed(len(ids), loaded)
        own = {one.row: one.problem for one in loaded if one.problem}
        problems = self._problems(found, own, ids)
        bad = set(problems)
        positions = iter(range(len(ids)))
        good = [[p for _ in row if (p := next(positions)) not in bad] for row in rows]
        counts = found.clip(min=0)
        table = StepTable(
            good, ids, counts[:, _TOKENS], counts[:, _IMAGE_TOKENS], counts[:, _LOSS_TOKENS], counts[:, _PATCH_PAIRS], sorted(bad)
        )  # fmt: skip
        told = [problems[p] for p in sorted(problems)]
        if told and self._settings.on_bad == "stop":
            raise BadData(f"bad sample in step {number + 1}: {told[0]}; set dataset.on_bad=skip to go on without it")
        self._seen, self._good = self._seen + len(ids), self._good + sum(map(len, good))
        if told and not self._good and self._seen >= min(ALL_BAD, len(self._source), self._rows.stop):
            raise BadData(f"all of the first {self._seen} samples are bad, e.g. {told[0]}")
        return Step(number, table, self._microbatches(table, {one.row: one for one in loaded}), told)

    def _agreed(self, count: int, loaded: list[Loaded]) -> np.ndarray:
        """int64 (samples, 6) over all ranks; columns as named above, `_UNKNOWN` where nobody knows."""
        known = torch.full((count, 6), _UNKNOWN, dtype=torch.int64)
        merge = self._built.hf.vision_config.spatial_merge_size**2
        for one in loaded:
            if one.problem:
                known[one.row, _BAD] = 1
                continue
            images: Tensor | None = None
            if one.pixels is not None:
                images = one.pixels[0][1]
            if one.encoded is not None:
                sample = one.encoded[0]
                known[one.row, _TOKENS] = len(sample.input_ids)
                known[one.row, _LOSS_TOKENS] = int((sample.labels != IGNORED).sum())
                images = sample.image_grid_thw
            assert images is not None
            tokens = int(images.prod(-1).sum()) // merge if len(images) else 0
            known[one.row, _IMAGE_TOKENS], known[one.row, _LESS_IMAGE_TOKENS] = tokens, -tokens
            known[one.row, _PATCH_PAIRS] = int((images[:, 0] * (images[:, 1] * images[:, 2]) ** 2).sum())
        if count:
            dist.all_reduce(known, dist.ReduceOp.MAX, self._group)
        return known.numpy()

    def _problems(self, found: np.ndarray, own: dict[int, str], ids: list[str]) -> dict[int, str]:
        """Position -> what is wrong with the sample, on every rank; nothing is exchanged when all are good."""
        bad = {int(p) for p in np.flatnonzero(found[:, _BAD] > 0)}
        unequal = {int(p) for p in np.flatnonzero(found[:, _IMAGE_TOKENS] != -found[:, _LESS_IMAGE_TOKENS])} - bad
        problems = {p: f"{ids[p]}: the image tokens of the text do not match the images" for p in unequal}
        if bad:
            parts: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(parts, own, self._group)
            for part in reversed(parts):
                problems |= part
        return problems

    def _microbatches(self, table: StepTable, loaded: dict[int, Loaded]) -> list[Microbatch]:
        built, shares, made = self._built, self._shares, []
        encoded = {p: one.encoded[0] for p, one in loaded.items() if one.encoded}
        pixels = {p: one.pixels[0] for p, one in loaded.items() if one.pixels}
        config = built.configs[LANGUAGE]
        multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
        for m in range(shares.microbatches):
            images = None
            if IMAGES in built.groups:
                found = images_inputs(built.hf, table, shares, m, built.groups[IMAGES].dp.rank(), pixels)
                images = {IMAGES: {ENCODER: found}} if found is not None else None
            if LANGUAGE in built.groups:
                replica = built.groups[LANGUAGE].dp.rank()
                one = language_inputs(built.hf, table, shares, m, replica, encoded, multiple=multiple)
                one.inputs["modality_inputs"] = images
            else:
                one = Microbatch({"input_ids": None, "modality_inputs": images}, 1)
            made.append(one.pinned() if torch.cuda.is_available() else one)
        return made
