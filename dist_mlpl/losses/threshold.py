"""Owns the exact k-th largest of values spread over ranks: found by counting, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]  # sums a tensor over ranks; may do so in place

_DIGIT_BITS = 16
_NUM_DIGITS = 2**_DIGIT_BITS
_CHUNK = 2**18  # values at a time
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def kth_largest(values: Tensor, k: int, *, reduce: Reduce | None = None) -> Tensor:
    """Find the k-th largest of all ranks' values; equal ones are counted separately.

    Args:
        values: (n,) float32 or float64 without NaN, this rank's; n is free and may be 0.
        k: >= 0, the same on every rank.
        reduce: sums an integer tensor over ranks; None for one rank.

    Returns:
        () of the same type and on the same device: `values >= it` holds for the k largest and for all that equal the
        k-th. Infinity for k = 0; minus infinity when there are fewer than k.

    Collective: through `reduce`, on all ranks: 512 KiB for each 16 bits of the type; nothing for k = 0.
    """
    if k <= 0:
        return values.new_tensor(float("inf"))
    found, width = 0, torch.iinfo(_BITS[values.dtype]).bits
    for shift in range(width - _DIGIT_BITS, -1, -_DIGIT_BITS):
        counts = _count_digits(values, shift, found, width).flip(0)  # largest digit first
        if reduce is not None:
            counts = reduce(counts)
        num_from_top = counts.cumsum(0)
        if int(num_from_top[-1]) < k:
            return values.new_tensor(float("-inf"))
        place = int((num_from_top < k).sum())
        k -= int(num_from_top[place] - counts[place])
        found = (found << _DIGIT_BITS) | (_NUM_DIGITS - 1 - place)
    return _value_of(found, values)


def _count_digits(values: Tensor, shift: int, found: int, width: int) -> Tensor:
    """(_NUM_DIGITS,) how often each digit occurs at bit `shift` of the ordered bits that begin with `found`."""
    num_found_bits = width - shift - _DIGIT_BITS
    counts = torch.zeros(_NUM_DIGITS, dtype=torch.int64, device=values.device)
    for chunk in values.split(_CHUNK):
        bits = _ordered_bits(chunk)
        if num_found_bits > 0:
            bits = bits[((bits >> (shift + _DIGIT_BITS)) & ((1 << num_found_bits) - 1)) == found]
        counts += torch.bincount((bits >> shift) & (_NUM_DIGITS - 1), minlength=_NUM_DIGITS)
    return counts


def _ordered_bits(values: Tensor) -> Tensor:
    """(n,) integers that, read as unsigned, have the order of the values."""
    bits = (values + 0.0).view(_BITS[values.dtype])  # + 0.0 makes minus zero equal to zero
    return _flip_negative(bits) ^ torch.iinfo(bits.dtype).min


def _value_of(unsigned: int, like: Tensor) -> Tensor:
    """() the value whose ordered bits are `unsigned`, of the type of `like`."""
    dtype = _BITS[like.dtype]
    signed = torch.tensor([unsigned + torch.iinfo(dtype).min], dtype=dtype, device=like.device)
    return _flip_negative(signed).view(like.dtype)[0]


def _flip_negative(bits: Tensor) -> Tensor:
    """Turn floats' bits into signed integers of the same order, and back: of negatives flip all bits but the sign."""
    limits = torch.iinfo(bits.dtype)
    return bits ^ ((bits >> (limits.bits - 1)) & limits.max)
