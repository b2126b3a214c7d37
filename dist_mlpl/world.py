"""Owns this process's place among the ranks: four integers, read from the environment in one place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dist_mlpl.errors import RankMismatchError


@dataclass(frozen=True, slots=True)
class World:
    """The place of this process among the ranks.

    Args:
        rank: 0 .. size-1 over all nodes.
        size: number of ranks, R.
        local_rank: 0 .. local_size-1 on this node.
        local_size: number of ranks on this node.

    Raises:
        RankMismatchError: values outside these ranges, or local_size above size.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise RankMismatchError(
                f"rank {self.rank} of {self.size}, local rank {self.local_rank} of {self.local_size}",
                expected="0 <= rank < size and 0 <= local_rank < local_size <= size",
                where="RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE in the environment",
                next_step="start the run with `dist-mlpl train`, torchrun, or unset these variables",
            )

    @property
    def is_first(self) -> bool:
        """True on rank 0, which writes shared files and prints for the user."""
        return self.rank == 0

    @classmethod
    def detect(cls, environment: Mapping[str, str] | None = None) -> World:
        """Read the variables that torchrun and Ray Train export; a lone process is rank 0 of 1.

        Raises:
            RankMismatchError: a value that is not an integer, or values that do not fit together.
        """
        env = os.environ if environment is None else environment

        def number(name: str, default: int) -> int:
            text = env.get(name, str(default))
            try:
                return int(text)
            except ValueError:
                raise RankMismatchError(
                    f"{name}={text!r}",
                    expected="an integer",
                    where=f"{name} in the environment",
                    next_step="start the run with `dist-mlpl train`, torchrun, or unset this variable",
                ) from None

        return cls(
            rank=number("RANK", 0),
            size=number("WORLD_SIZE", 1),
            local_rank=number("LOCAL_RANK", 0),
            local_size=number("LOCAL_WORLD_SIZE", 1),
        )
