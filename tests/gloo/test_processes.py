"""The multi-process helper itself: results in order, the failing rank's traceback, no rank left behind."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.gloo.processes import RankFailed, run_ranks

pytestmark = pytest.mark.gloo


def test_results_come_in_rank_order() -> None:
    assert run_ranks(2, _sum_and_rank, 10) == [(21, 0), (21, 1)]


def test_the_failing_rank_is_named_with_its_traceback_and_ends_the_others() -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1: .*\n(.*\n)*.*_fail_on_one(.*\n)*ValueError: of no use"):
        run_ranks(2, _fail_on_one)
    assert time.monotonic() - started < 20


def test_ranks_that_hang_are_ended() -> None:
    with pytest.raises(RankFailed, match=r"ranks \[0, 1\] did not finish in 2 s"):
        run_ranks(2, _hang, timeout_s=2)


def _sum_and_rank(start: int) -> tuple[int, int]:
    value = torch.tensor(start + dist.get_rank())
    dist.all_reduce(value)
    return int(value), dist.get_rank()


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("of no use")
    _hang()


def _hang() -> None:
    time.sleep(60)
