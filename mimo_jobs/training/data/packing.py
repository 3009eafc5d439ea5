"""Samples put together to sequences of bounded length."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

OPEN = 128  # sequences that are filled at a time: 97 % full for even lengths, 99 % for many short ones (tests)


def pack(lengths: Sequence[int], order: Iterable[int], max_length: int) -> list[list[int]]:
    """Best fit over the sequences that are open: the same result on every machine.

    Args:
        lengths: tokens of every sample; a negative one is bad and left out
        order: samples of one epoch in their order
        max_length: tokens of a sequence, at most

    Returns:
        For every sequence the samples in it, each sample of ``order`` exactly once.

    Raises:
        ValueError: a sample is longer than ``max_length``.
    """
    done: list[list[int]] = []
    open_: list[tuple[int, int]] = []  # (free tokens, number), ascending
    members: dict[int, list[int]] = {}
    for made, sample in enumerate(map(int, order)):
        length = int(lengths[sample])
        if length < 0:
            continue
        if length > max_length:
            raise ValueError(f"sample {sample} has {length} tokens, expected at most {max_length}")
        place = bisect_left(open_, (length, -1))
        if place < len(open_):
            free, number = open_.pop(place)
        else:
            free, number = max_length, made
            if len(open_) == OPEN:
                # the oldest, not the fullest: that would fill 1 % better, but let some samples wait until the end of the epoch
                oldest = min(range(OPEN), key=lambda i: open_[i][1])
                done.append(members.pop(open_.pop(oldest)[1]))
        members.setdefault(number, []).append(sample)
        if free == length:
            done.append(members.pop(number))
        else:
            insort(open_, (free - length, number))
    return done + [members[number] for number in sorted(members)]
