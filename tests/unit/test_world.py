"""Claims about a rank's place: what the environment says is taken whole or refused with a plain message."""

from __future__ import annotations

import pytest

from dist_mlpl.errors import RankMismatchError
from dist_mlpl.world import World

pytestmark = pytest.mark.unit


def test_a_lone_process_is_rank_0_of_1() -> None:
    assert World.detect({}) == World() == World(rank=0, size=1, local_rank=0, local_size=1)
    assert World().is_first


def test_the_variables_of_torchrun_and_ray_are_read() -> None:
    place = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert World.detect(place) == World(rank=5, size=8, local_rank=1, local_size=4)
    assert not World.detect(place).is_first


def test_the_environment_of_this_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert World.detect() == World(rank=1, size=2)


@pytest.mark.parametrize(
    ("rank", "size", "local_rank", "local_size"),
    [(1, 1, 0, 1), (-1, 1, 0, 1), (0, 0, 0, 0), (0, 2, 1, 1), (0, 2, -1, 1), (0, 2, 0, 3), (3, 2, 0, 1)],
)
def test_places_outside_the_world_are_refused(rank: int, size: int, local_rank: int, local_size: int) -> None:
    with pytest.raises(RankMismatchError, match=f"rank {rank} of {size}"):
        World(rank, size, local_rank, local_size)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_named(name: str) -> None:
    with pytest.raises(RankMismatchError, match=f"{name}='two'"):
        World.detect({name: "two"})
