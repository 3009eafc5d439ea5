"""A range of the elements of an array as blocks of it."""

import math
import random

import numpy as np
import pytest

from mimo_jobs.training.moments import blocks


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (5, 1), (1, 6), (4, 1, 3), (2, 3, 4), (2, 1, 3, 2, 2)])
def test_blocks_hold_the_elements_of_the_range_once_and_in_order(shape: tuple[int, ...]) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for start in range(numbers.size + 1):
        for stop in range(start, numbers.size + 1):
            found = blocks(shape, start, stop)
            cut = [numbers[tuple(slice(o, o + s) for o, s in zip(*block, strict=True))].ravel() for block in found]
            assert np.array_equal(np.concatenate([[], *cut]), np.arange(start, stop)), (shape, start, stop)
            assert len(found) <= 2 * len(shape) - 1


def test_a_range_of_a_big_weight_is_a_few_blocks() -> None:
    chosen = random.Random(0)
    for _ in range(100):
        start, stop = sorted(chosen.sample(range(248_320 * 5_120), 2))
        found = blocks((248_320, 5_120), start, stop)
        assert sum(math.prod(size) for _, size in found) == stop - start and len(found) <= 3
