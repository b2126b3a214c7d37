"""Claims about values that are kept while they are used: a bound, the oldest use goes, one making at a time."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import pytest

from dist_mlpl.data.last_used import LastUsed

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("seed", range(20))
def test_what_is_made_and_kept_is_what_a_plain_list_of_uses_says(seed: int) -> None:
    draw = random.Random(seed)
    limit, costs = draw.randint(1, 30), [draw.randint(0, 12) for _ in range(10)]
    made: list[int] = []
    cache = LastUsed(lambda key: made.append(key) or (key, costs[key]), limit=limit, cost=lambda value: value[1])
    uses: OrderedDict[int, None] = OrderedDict()
    for _ in range(300):
        key = draw.randrange(10)
        before = len(made)
        assert cache[key] == (key, costs[key])
        assert len(made) - before == (key not in uses)
        uses[key] = None
        uses.move_to_end(key)
        while sum(costs[kept] for kept in uses) > limit and len(uses) > 1:
            uses.popitem(last=False)
        assert (len(cache), cache.total_cost) == (len(uses), sum(costs[kept] for kept in uses))


def test_a_value_costlier_than_the_limit_is_kept_alone() -> None:
    cache = LastUsed(lambda key: key, limit=5, cost=lambda value: value)
    assert [cache[3], cache[9], len(cache), cache.total_cost] == [3, 9, 1, 9]


def test_threads_that_ask_for_one_key_make_it_once_and_other_keys_are_made_meanwhile() -> None:
    made: list[str] = []
    is_begun, may_end = threading.Event(), threading.Event()

    def make(key: str) -> str:
        made.append(key)
        if key == "slow":
            is_begun.set()
            assert may_end.wait(60)
        return key.upper()

    cache = LastUsed(make, limit=8)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(cache.__getitem__, "slow") for _ in range(3)]
        assert is_begun.wait(60)
        assert cache["quick"] == "QUICK"
        may_end.set()
        assert [future.result(60) for future in waiting] == ["SLOW"] * 3
    assert sorted(made) == ["quick", "slow"]


def test_a_making_that_fails_is_raised_kept_out_and_tried_again() -> None:
    answers = iter([ValueError("broken"), "whole"])

    def make(_: int) -> str:
        answer = next(answers)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    cache = LastUsed(make, limit=8)
    with pytest.raises(ValueError, match="broken"):
        cache[0]
    assert (len(cache), cache[0]) == (0, "whole")
