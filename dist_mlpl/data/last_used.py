"""Owns values that are made when first asked for, of which those used last are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class LastUsed(Generic[K, V]):
    """Values by key; those that were not used for longest go when all together are more than a limit.

    Safe from many threads. Values of different keys are made side by side; of one key, by one thread at a time.

    Args:
        make: the value of a key. What it raises reaches the caller, and nothing is kept.
        limit: of the sum of `cost` over the values kept. One value is kept whatever it costs.
        cost: of a value, in the unit of `limit`; by default they are counted.
    """

    def __init__(self, make: Callable[[K], V], *, limit: int, cost: Callable[[V], int] = lambda _: 1) -> None:
        self._make, self._limit, self._cost = make, limit, cost
        self._values: OrderedDict[K, V] = OrderedDict()  # the last used last
        self._total = 0
        self._lock = threading.Lock()
        self._making: dict[K, threading.Lock] = {}

    def __len__(self) -> int:
        """Values that are kept now."""
        return len(self._values)

    @property
    def total_cost(self) -> int:
        """Of the values that are kept now."""
        return self._total

    def __getitem__(self, key: K) -> V:
        """The value of a key, made if it is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:  # made by another thread meanwhile
                    return self._values[key]
            value = self._make(key)
            with self._lock:
                self._values[key] = value
                self._total += self._cost(value)
                while self._total > self._limit and len(self._values) > 1:
                    self._total -= self._cost(self._values.popitem(last=False)[1])
                self._making.pop(key, None)
        return value
