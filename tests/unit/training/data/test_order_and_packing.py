"""Laws of the order of samples and of packing."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jobs.training.data import Order, pack


@given(st.integers(1, 60), st.integers(0, 2**63), st.booleans())
def test_every_sample_once_an_epoch(count, seed, shuffle):
    order = Order(count, seed, shuffle)
    for epoch in range(3):
        assert sorted(order.epoch(epoch)) == list(range(count))


@given(st.integers(1, 60), st.integers(0, 1000), st.lists(st.integers(0, 9), max_size=20))
def test_an_epoch_is_the_same_whichever_was_asked_for_before(count, seed, epochs):
    order = Order(count, seed, True)
    assert [order.epoch(e).tolist() for e in epochs] == [Order(count, seed, True).epoch(e).tolist() for e in epochs]


def test_epochs_and_seeds_differ_and_the_permutation_is_fixed_for_good():
    assert Order(10, 7, True).epoch(0).tolist() == [6, 3, 4, 9, 0, 2, 8, 7, 5, 1]
    assert Order(100, 7, True).epoch(0).tolist() != Order(100, 7, True).epoch(1).tolist()
    assert Order(100, 7, True).epoch(0).tolist() != Order(100, 8, True).epoch(0).tolist()
    assert Order(5, 7, False).epoch(3).tolist() == list(range(5))
    with pytest.raises(ValueError, match="at least one"):
        Order(0, 0, True)


@given(st.lists(st.integers(-1, 50).filter(bool), max_size=300), st.randoms(use_true_random=False))
def test_packing_conserves_samples_and_keeps_the_bound(lengths, shuffle):
    order = list(range(len(lengths)))
    shuffle.shuffle(order)
    packed = pack(lengths, order, 50)
    assert sorted(i for row in packed for i in row) == [i for i, n in enumerate(lengths) if n >= 0]
    assert all(0 < sum(lengths[i] for i in row) <= 50 for row in packed)
    assert packed == pack(lengths, iter(order), 50)


def test_packing_fills_well_and_stays_near_the_order():
    draw = random.Random(0)
    many = [min(4096, int(draw.lognormvariate(6, 0.8)) + 1) for _ in range(20000)]
    even = [draw.randint(1, 4096) for _ in range(20000)]
    for lengths, full in ((many, 0.99), (even, 0.965)):
        packed = pack(lengths, range(len(lengths)), 4096)
        assert sum(lengths) / (len(packed) * 4096) > full
        middles = [sum(row) / len(row) / len(lengths) - place / len(packed) for place, row in enumerate(packed)]
        assert max(map(abs, middles)) < 0.06


def test_a_sample_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="sample 1 has 9 tokens, expected at most 8"):
        pack([3, 9], [0, 1], 8)
