"""Owns the newest features of each class over all images and ranks, and the mean of their unit vectors beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from dist_mlpl.banks.base import DTYPES, NUM_SHARDS, Bank, Column
from dist_mlpl.banks.replica import Replica

SMALLEST_NORM: Final = 1e-9  # a feature shorter than this is divided by it
_ONE: Final = 2.0**40  # unit vectors are summed as whole numbers of 2**-40, so that sums never drift


class Ring(Bank):
    """The K newest features of each class, one row a class.

    A class lives on one rank whatever image its features came from. Columns: `features` (K, D); `scales` (K,) float64,
    1 / |feature|; `stamps` (K,) int64, the position that each was pushed with, -1 where there is none yet;
    `num_pushed` () int64, of which the next write position is the rest modulo K; `sums` (D,) int64, the filled
    entries' unit vectors in steps of 2**-40.

    The sum is kept by adding what comes and taking away what goes. In whole numbers that is exact: after any number of
    steps it equals the sum over the ring, and R ranks hold the bits that one rank holds.

    Source: SST (Chen et al., AAAI 2022), the bank of known positives' features; the mean of an image's cosines with
        K features is its product with the mean of their unit vectors.
    Differs: means are over the entries that are filled (the code divides by K); saved and restored (the code's is not).

    Args:
        name: of the bank.
        num_classes: C.
        capacity: K, at most 2**20.
        width: D.
        dtype: of stored features, `f32` or `f16`.
        folder: see `Bank`.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        capacity: int,
        width: int,
        *,
        dtype: Literal["f32", "f16"] = "f32",
        folder: str | None = None,
    ) -> None:
        columns = {
            "features": Column(dtype=dtype, shape=(capacity, width)),
            "scales": Column(dtype="f64", shape=(capacity,)),
            "stamps": Column(dtype="i64", shape=(capacity,), fill=-1),
            "num_pushed": Column(dtype="i64"),
            "sums": Column(dtype="i64", shape=(width,)),
        }
        super().__init__(name, num_classes, columns, folder=folder, num_shards=min(NUM_SHARDS, num_classes))
        self._capacity, self._width = capacity, width
        self._means = Replica(num_classes, [(torch.float32, (width,)), (torch.int64, ())])

    @torch.no_grad()
    def push(self, class_id: Tensor, features: Tensor, position: Tensor) -> None:
        """Take in features; the oldest go.

        What is pushed in one call is newer than all before it; within the call the order is that of positions over all
        ranks.

        Args:
            class_id: (n,) int64 in [0, C), n free on each rank.
            features: (n, D), any floating type and device.
            position: (n,) int64 >= 0, different for any two features of one class: a sample's place in the step, or
                its index.

        Raises:
            BankError: a class that is none, features that do not fit or are not finite; on all ranks, and nothing is
                taken in.

        Collective: all ranks, one uneven all-to-all of n rows of D numbers and 16 bytes.
        """
        class_id, position = class_id.cpu(), position.cpu()
        features = features.detach().cpu().to(DTYPES[self.spec.columns["features"].dtype])
        error = self._index_error(class_id) or self._feature_error(class_id, features, position, width=self._width)
        self._take(*self._send(class_id, [class_id, position, features], error))

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean unit vectors of all classes.

        Returns:
            (C, D) float32, the mean over a class's filled entries of feature / |feature|, zeros without entries; and
            (C,) int64, how many entries are filled. On the CPU, the bank's own tables: the next call changes them.

        Collective: all ranks; what was pushed to or loaded since the last call, D numbers and 16 bytes a class.
        """
        index = self._means.marked
        places = self._places(index)
        memory = self._memory()
        counts = memory["num_pushed"][places].clamp(max=self._capacity)
        sums = memory["sums"][places].double() / _ONE
        means, filled = self._means.share([(sums / counts.clamp(min=1)[:, None]).float(), counts])
        return means, filled

    def unpack(self, packed: Mapping[str, Tensor], wanted: Iterable[int]) -> None:
        """See `Bank`."""
        super().unpack(packed, wanted)
        self._means.mark(self.held_rows())

    def _take(self, class_id: Tensor, position: Tensor, features: Tensor) -> None:
        """Put features of own classes in their places."""
        if len(class_id) == 0:
            return
        order = torch.from_numpy(np.lexsort((position.numpy(), class_id.numpy())))  # by class, oldest first
        classes, sizes = class_id[order].unique_consecutive(return_counts=True)  # (u,)
        places = self._places(classes)
        memory = self._memory()
        # Of more than K features of a class the oldest are gone at once.
        is_kept = _from_last(sizes) < self._capacity
        rows = places.repeat_interleave(sizes)[is_kept]
        before = memory["num_pushed"][rows]
        slots = (before + _from_first(sizes)[is_kept]) % self._capacity
        arriving = features[order[is_kept]]
        scales = 1.0 / arriving.double().norm(dim=1).clamp(min=SMALLEST_NORM)
        is_full = slots < before  # slots fill in their order
        old = rows[is_full], slots[is_full]
        memory["sums"].index_add_(0, rows[is_full], -_whole(memory["features"][old], memory["scales"][old]))
        memory["sums"].index_add_(0, rows, _whole(arriving, scales))
        memory["features"][rows, slots] = arriving
        memory["scales"][rows, slots] = scales
        memory["stamps"][rows, slots] = position[order[is_kept]]
        memory["num_pushed"][places] += sizes
        self._mark(classes)
        self._means.mark(classes)


def _from_first(sizes: Tensor) -> Tensor:
    """Of runs of these sizes end to end, each entry's place in its run."""
    starts = sizes.cumsum(0) - sizes
    return torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)


def _from_last(sizes: Tensor) -> Tensor:
    """Of runs of these sizes end to end, how many entries follow each in its run."""
    return sizes.repeat_interleave(sizes) - 1 - _from_first(sizes)


def _whole(features: Tensor, scales: Tensor) -> Tensor:
    """Unit vectors (n, D) as whole numbers of 2**-40: the same ones whenever and wherever they are computed."""
    return (features.double() * scales[:, None] * _ONE).round().long()
