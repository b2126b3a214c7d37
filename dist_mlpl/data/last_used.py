"""Owns a least-recently-used cache whose values are made on first use, bounded by their total cost."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LastUsed(Generic[K, V]):
    """A cache of values by key; the least recently used are evicted when their total cost exceeds a limit.

    Safe to use from many threads. Different keys' values are made concurrently, one key's by one thread at a time.

    Args:
        make: makes the value of a key. Its exceptions reach the caller, and nothing is kept.
        limit: most that the costs of all kept values may sum to. One value is kept whatever it costs.
        cost: cost of a value, in the unit of `limit`; 1 by default, so that `limit` counts values.
    """

    def __init__(self, make: Callable[[K], V], *, limit: int, cost: Callable[[V], int] = lambda _: 1) -> None:
        self._make, self._limit, self._cost = make, limit, cost
        self._values: OrderedDict[K, V] = OrderedDict()  # most recently used last
        self._total = 0
        self._lock = threading.Lock()
        self._making: dict[K, threading.Lock] = {}

    def __len__(self) -> int:
        """Number of values kept now."""
        return len(self._values)

    @property
    def total_cost(self) -> int:
        """Sum of the costs of the values kept now."""
        return self._total

    def __getitem__(self, key: K) -> V:
        """The value of a key; made first if it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:  # made by another thread meanwhile
                    self._values.move_to_end(key)
                    return self._values[key]
            value = self._make(key)
            with self._lock:
                if key in self._values:  # went and was made again, while this thread waited for its turn
                    self._total -= self._cost(self._values.pop(key))
                self._values[key] = value
                self._total += self._cost(value)
                while self._total > self._limit and len(self._values) > 1:
                    self._total -= self._cost(self._values.popitem(last=False)[1])
                self._making.pop(key, None)
        return value
