"""Owns keyed random numbers: pure functions of a key, the same on every machine and with every version of numpy.

numpy keeps the streams of `Generator` stable only within a release, so the arithmetic is our own: a key is a
hash of what the draw is for (seed, epoch, position, purpose), and SplitMix64 turns (key, counter) into bits.
"""

from __future__ import annotations

import hashlib
import operator
from typing import Final

import numpy as np
import numpy.typing as npt

_MASK: Final = (1 << 64) - 1
# SplitMix64's increment and multipliers, and the same as arrays: numpy wraps arrays silently, scalars with a warning.
_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_GAMMA_64, _FIRST_64, _SECOND_64 = (np.uint64(value) for value in (_GAMMA, _FIRST, _SECOND))
_SHIFT_30, _SHIFT_27, _SHIFT_31, _SHIFT_11 = (np.uint64(value) for value in (30, 27, 31, 11))
_TO_UNIT: Final = 2.0**-53  # the 53 high bits fill a float64's significand


def key(*parts: int | str) -> int:
    """Hash what a draw is for into its key.

    Args:
        parts: integers of any size and sign, and strings, for example (seed, epoch, position, "crop"). Order matters;
            1 and "1" differ; no two sequences of parts have the same encoding before hashing.

    Returns:
        An integer in [0, 2**64).

    Raises:
        TypeError: a part is neither an integer nor a string.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"s{len(part)}:{part};" if isinstance(part, str) else f"i{operator.index(part)};"
        digest.update(text.encode())
    return int.from_bytes(digest.digest(), "little")


def hash_integers(key: int, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hash every value under a key; for one key the map is a bijection, so different values never collide.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014), SplitMix64.
    Differs: the stream of a key starts at the mixed key, so keys k and k + 1 share nothing.

    Args:
        key: in [0, 2**64).
        values: (..., n) uint64, at least one dimension.

    Returns:
        Same shape, uint64, uniform over all 64 bits.

    Raises:
        OverflowError: a key outside [0, 2**64).
    """
    bits = np.asarray(values, dtype=np.uint64) * _GAMMA_64
    bits += np.uint64((_mix(key) + _GAMMA) & _MASK)
    bits ^= bits >> _SHIFT_30
    bits *= _FIRST_64
    bits ^= bits >> _SHIFT_27
    bits *= _SECOND_64
    bits ^= bits >> _SHIFT_31
    return bits


def uniform(key: int, count: int) -> npt.NDArray[np.float64]:
    """Draw `count` numbers; a longer draw under the same key begins with the shorter one.

    Returns:
        (count,) float64, uniform in [0, 1): multiples of 2**-53.
    """
    return uniform_of(key, np.arange(count, dtype=np.uint64))


def uniform_of(key: int, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """Draw a number for every value; equal values get equal numbers, whatever stands beside them.

    Args:
        key: in [0, 2**64).
        values: (..., n) uint64, at least one dimension.

    Returns:
        Same shape, float64, uniform in [0, 1): multiples of 2**-53.
    """
    return (hash_integers(key, values) >> _SHIFT_11).astype(np.float64) * _TO_UNIT


def torch_seed(*parts: int | str) -> int:
    """A key as a seed for torch's generators, which take it as a signed integer: in [0, 2**63)."""
    return key(*parts) & (_MASK >> 1)


def permutation(key: int, n: int) -> npt.NDArray[np.int64]:
    """Permute 0 .. n-1 by sorting their hashes; equal ones would keep their order.

    Returns:
        (n,) int64, a bijection of 0 .. n-1.
    """
    order = np.argsort(hash_integers(key, np.arange(n, dtype=np.uint64)), kind="stable")
    return order.astype(np.int64, copy=False)


def _mix(key: int) -> int:
    """Do one SplitMix64 step on a plain integer; like np.uint64, raise OverflowError outside [0, 2**64)."""
    if not 0 <= key <= _MASK:
        raise OverflowError(f"key {key} is outside [0, 2**64); make keys with dist_mlpl.keyed.key")
    bits = (key + _GAMMA) & _MASK
    bits = ((bits ^ (bits >> 30)) * _FIRST) & _MASK
    bits = ((bits ^ (bits >> 27)) * _SECOND) & _MASK
    return bits ^ (bits >> 31)
