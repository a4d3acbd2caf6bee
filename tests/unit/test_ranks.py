"""The tests' own tool: ranks answer in order, and a failure on one is the test's failure, at once."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankFailed, Ranks


def rank_sum(value: float) -> float:
    total = torch.tensor(value * (dist.get_rank() + 1))
    dist.all_reduce(total)
    return float(total) + dist.get_rank()


def fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one is broken")
    dist.barrier()


def die_on_one() -> None:
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def test_results_come_in_the_order_of_ranks(two_ranks: Ranks):
    assert two_ranks.run(rank_sum, 2.0) == [6.0, 7.0]


@pytest.mark.parametrize(("function", "said"), [(fail_on_one, "rank one is broken"), (die_on_one, "died")])
def test_a_failing_rank_fails_the_call_soon_and_the_next_call_works(function, said, two_ranks: Ranks):
    started = time.monotonic()
    with pytest.raises(RankFailed, match=said):
        two_ranks.run(function)
    assert time.monotonic() - started < 60
    assert two_ranks.run(rank_sum, 1.0) == [3.0, 4.0]
