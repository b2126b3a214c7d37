"""Owns the search for the centre of its class nearest to a feature: in float32 where that is certain, or in float64."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_mlpl.banks.rows import Integers

SMALLEST_NORM: Final = 1e-9  # lower bound of the divisor when a vector is scaled to unit length

_OFF: Final = 2.0**-23  # bound on the relative error per term of a float32 product, in any order of summation


class Centres(NamedTuple):
    """P centres of each class, and values precomputed from them."""

    vectors: npt.NDArray[np.float32]  # (C, P, D)
    squares: npt.NDArray[np.float64]  # (C, P) their squared lengths
    is_repeated: npt.NDArray[np.bool_]  # (C, P) equal to an earlier centre of the class, so never the first nearest

    @classmethod
    def of(cls, vectors: npt.NDArray[np.float32]) -> Centres:
        """Precompute the fields for centres (C, P, D), once for many features."""
        squares = np.einsum("cpd,cpd->cp", vectors, vectors, dtype=np.float64)
        is_repeated = np.zeros(squares.shape, dtype=np.bool_)
        for number in range(1, squares.shape[1]):  # a class with few features fills slots with its mean
            first = (squares[:, :number] == squares[:, number, None]).argmax(axis=1)
            alike = np.flatnonzero(squares[np.arange(len(squares)), first] == squares[:, number])
            is_repeated[alike, number] = (vectors[alike, number] == vectors[alike, first[alike]]).all(axis=1)
        return cls(vectors, squares, is_repeated)


def roughly_nearest(
    features: npt.NDArray[np.float32], places: Integers, centres: Centres, *, is_cosine: bool
) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Find the nearest centre by products in float32.

    Args:
        features: (n, D); unit vectors if `is_cosine`.
        places: (n,) each feature's row in `centres`, equal ones side by side.
        centres: the centres of all classes.
        is_cosine: True: nearest is the largest cosine; False: the least Euclidean distance.

    Returns:
        (n,) number of the nearest in [0, P), and (n,) bool, True where it is certain, whatever the order of summation.
    """
    num_centres, width = centres.vectors.shape[1:]
    if num_centres == 1:
        return np.zeros(len(places), dtype=np.int64), np.ones(len(places), dtype=np.bool_)
    products = np.empty((len(places), num_centres), dtype=np.float32)
    squares, is_repeated = centres.squares[places], centres.is_repeated[places]
    reach = np.sqrt(squares)
    with np.errstate(over="ignore", invalid="ignore"):  # overflow in float32 makes the answer unsure
        for first, stop in pairwise(edges(places).tolist()):  # the features of one class
            np.matmul(features[first:stop], centres.vectors[places[first]].T, out=products[first:stop])
        # Upper bounds of the lengths: squares that float32 flushes to zero are below 1e-37.
        lengths = 1.01 * np.sqrt(np.einsum("nd,nd->n", features, features))[:, None] + 1e-18 * width
        off = (width + 8) * _OFF * lengths * reach
        if is_cosine:
            reach = reach.clip(min=SMALLEST_NORM)
            distances, off = -products / reach, off / reach
        else:
            distances, off = squares - 2.0 * products, 2.0 * off
        is_held = np.isfinite(distances).all(axis=1)
        distances[is_repeated] = np.inf
        two = np.partition(distances, 1, axis=1)[:, :2]
        is_sure = two[:, -1] - two[:, 0] > 2.0 * off.max(axis=1)
    return distances.argmin(axis=1), is_sure & is_held


def nearest_centre(vectors: Tensor, centres: Tensor, exists: Tensor, *, is_cosine: bool) -> Tensor:
    """Find the nearest centre in float64; of equally near ones the first.

    Args:
        vectors: (n, D) float64.
        centres: (n, P, D) float64, the candidates of each vector.
        exists: (n, P) bool, True where a candidate may be chosen.
        is_cosine: see `roughly_nearest`.

    Returns:
        (n,) int64 in [0, P).
    """
    if is_cosine:
        distances = -(centres * vectors[:, None]).sum(dim=2) / centres.norm(dim=2).clamp(min=SMALLEST_NORM)
    else:
        distances = (centres - vectors[:, None]).square().sum(dim=2)
    return distances.masked_fill(~exists, torch.inf).argmin(dim=1)


def edges(places: Integers) -> Integers:
    """(runs + 1,) the starts of runs of equal numbers, all >= 0, and the end of the last run."""
    return np.flatnonzero(np.diff(places, prepend=-1, append=-1))
