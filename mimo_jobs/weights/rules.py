"""The row arithmetic of a rule: which HF rows make which checkpoint rows."""

import itertools
from dataclasses import dataclass

from mimo_jobs.families.spec import BoundRule


@dataclass(frozen=True)
class Segment:
    """``count`` rows that lie together on both sides: rows of ``rule.stored[stored]`` and of ``rule.hf[hf]``."""

    stored: int
    stored_row: int
    hf: int
    hf_row: int
    count: int


def segments(rule: BoundRule) -> list[Segment]:
    """Every row of a rule, in checkpoint order, as maximal runs that are consecutive on both sides.

    Raises:
        AssertionError: the rule is no permutation of rows (a mistake in a family's file).
    """
    hf_starts = list(itertools.accumulate((t.rows for t in rule.hf), initial=0))
    stored_starts = list(itertools.accumulate((t.rows for t in rule.stored), initial=0))
    total = hf_starts[-1]
    width = {t.row_elements for t in (*rule.hf, *rule.stored)}
    assert len(width) == 1, (rule, "rows of different length")
    assert stored_starts[-1] == total, (rule, "row counts differ")
    at = 0
    for start, count in sorted(rule.pieces):
        assert start == at and count > 0, (rule, "pieces overlap or leave a gap")
        at += count
    assert at == total, (rule, "pieces do not cover the HF rows")

    found, position, h, s = [], 0, 0, 0
    for start, count in rule.pieces:
        while count:
            h = _containing(hf_starts, start)
            s = _containing(stored_starts, position)
            run = min(count, hf_starts[h + 1] - start, stored_starts[s + 1] - position)
            found.append(Segment(s, position - stored_starts[s], h, start - hf_starts[h], run))
            start, position, count = start + run, position + run, count - run
    return found


def stored_rows(all_segments: list[Segment], stored: int, first: int, stop: int) -> list[Segment]:
    """The segments of rows ``[first, stop)`` of one checkpoint tensor, cut to that range, in checkpoint order."""
    found = []
    for s in all_segments:
        if s.stored != stored:
            continue
        a, b = max(first, s.stored_row), min(stop, s.stored_row + s.count)
        if a < b:
            found.append(Segment(stored, a, s.hf, s.hf_row + a - s.stored_row, b - a))
    return found


def _containing(starts: list[int], row: int) -> int:
    return next(i for i in range(len(starts) - 1) if starts[i] <= row < starts[i + 1])
