"""Token lengths of all samples, measured once and kept on disk: what packing needs to know before the first step."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np
import platformdirs

from mimo_jobs.training.data.encode import Encoder
from mimo_jobs.training.data.samples import BadSample
from mimo_jobs.training.data.sources import Source
from mimo_jobs.training.data.workers import in_order

BLOCK = 1024  # samples of a file in the cache


@dataclass(frozen=True)
class Lengths:
    """Lengths of the samples from ``start`` on.

    Args:
        values: int64[samples], tokens; -1 of a bad sample
        reasons: of every bad sample (index into the source), with its id
    """

    start: int
    values: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        return self.start + len(self.values)

    @staticmethod
    def join(parts: Sequence["Lengths"]) -> "Lengths":
        """Neighbouring slices (one or more), in any order, as one.

        Raises:
            ValueError: there is a gap or an overlap.
        """
        parts = sorted(parts, key=lambda part: (part.start, part.stop))
        for one, other in pairwise(parts):
            if one.stop != other.start:
                raise ValueError(f"lengths end at sample {one.stop}, the next ones start at {other.start}")
        reasons = {index: reason for part in parts for index, reason in part.reasons.items()}
        return Lengths(parts[0].start, np.concatenate([part.values for part in parts]), reasons)


def share(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """The slice [start, stop) of ``count`` samples that a rank measures: whole blocks of the cache where there are enough."""
    block = BLOCK if count >= BLOCK * ranks else 1
    blocks = -(-count // block)
    return min(count, blocks * rank // ranks * block), min(count, blocks * (rank + 1) // ranks * block)


def measure(
    source: Source,
    encoder: Encoder,
    start: int = 0,
    stop: int | None = None,
    workers: int = 0,
    cache: Path | None = None,
) -> Lengths:
    """Lengths of the samples [start, stop); headers of images are read, pixels are not.

    Args:
        cache: directory for lengths that are known; the user's cache directory without it. Blocks that a slice holds whole
            are kept. Images that change under an unchanged data file are not noticed.
    """
    stop = len(source) if stop is None else min(stop, len(source))
    key = blake2b(f"{source.fingerprint} {encoder.fingerprint} {len(source)}".encode(), digest_size=16).hexdigest()
    directory = (cache or Path(platformdirs.user_cache_dir("mimo_jobs"), "lengths")) / key
    cuts = sorted({start, stop, *range(-(-start // BLOCK) * BLOCK, stop, BLOCK)})
    known = {a: _read(directory, a, b) for a, b in pairwise(cuts)}
    missing = [(a, b) for a, b in pairwise(cuts) if known[a] is None]
    results = in_order(_Measure(source, encoder), (i for a, b in missing for i in range(a, b)), workers, 64)
    for a, b in missing:
        known[a] = found = _collect(results, a, b)
        whole = a % BLOCK == 0 and b == min(a + BLOCK, len(source))
        if whole and not found.reasons:  # what is bad may be put right
            _write(directory, found)
    return Lengths.join([Lengths(start, np.empty(0, np.int64)), *(part for part in known.values() if part is not None)])


@dataclass(frozen=True)
class _Measure:
    """Runs in the workers."""

    source: Source
    encoder: Encoder

    def __call__(self, index: int) -> int | str:
        try:
            return len(self.encoder.encode(self.source.conversation(index)).input_ids)
        except BadSample as error:
            return f"{self.source.id(index)}: {error}"
        except Exception as error:
            error.add_note(f"at sample {self.source.id(index)} (index {index})")
            raise


def _collect(results: Iterator[int | str], start: int, stop: int) -> Lengths:
    found = [next(results) for _ in range(start, stop)]
    values = np.array([one if isinstance(one, int) else -1 for one in found], np.int64)
    return Lengths(start, values, {start + i: one for i, one in enumerate(found) if isinstance(one, str)})


def _file(directory: Path, start: int, stop: int) -> Path:
    return directory / f"{start:012d}-{stop:012d}.json"


def _read(directory: Path, start: int, stop: int) -> Lengths | None:
    """A block of the cache, or None when it is missing or damaged: then it is measured again."""
    try:
        values = np.array(json.loads(_file(directory, start, stop).read_text()), np.int64)
    except (OSError, ValueError, TypeError, OverflowError):
        return None
    return Lengths(start, values) if values.shape == (stop - start,) else None


def _write(directory: Path, lengths: Lengths) -> None:
    """Atomically, as ranks share the directory. A cache that cannot be written is no reason to stop."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".tmp", delete=False) as file:
            json.dump(lengths.values.tolist(), file)
        os.replace(file.name, _file(directory, lengths.start, lengths.stop))
    except OSError:
        return
