"""Owns prototypes of each class over all images and ranks: exact means of features by slot, or centres of k-means."""

from __future__ import annotations

from itertools import pairwise
from typing import Final, Literal, overload

import numpy as np
import torch
from torch import Tensor

from dist_mlpl import keyed
from dist_mlpl.banks.base import INTEGER, NUM_SHARDS, Bank, Column
from dist_mlpl.banks.replica import Replica
from dist_mlpl.errors import BankError

Metric = Literal["euclidean", "cosine"]

_SMALLEST_NORM: Final = 1e-9
_NEAREST: Final = -1  # the slot of a feature that goes to the nearest centre
_BLOCK_NUMBERS: Final = 1 << 16  # of centres held against features at once: half a megabyte, which caches hold
_SHARED_BYTES: Final = 1 << 24  # of the whole table, sent at once


class Prototypes(Bank):
    """P prototypes of each class, one row a class; what is added becomes prototypes at `renew`.

    Columns: `prototypes` (P, D); `counts` (P,) int64, features behind each, 0 for a class that has none yet; `sums`
    (P, D) float64 and `num_added` (P,) int64 of what was added since.

    Features go to a given slot, or to the nearest centre of their class. While a class has no prototypes, the first P
    features each open a slot and later ones go to the nearest running mean: k-means of mini-batches, a batch being one
    `add`. Once it has prototypes, these are the centres, and a renewal is one step of Lloyd's over all that was added.
    A class's features are added in an order that seed and positions fix, in float64, on the one rank that owns it:
    any number of ranks makes the same bits.

    Source: SARB (Pu et al., AAAI 2022) for centres of known positives; DSRB (Pu et al., ESWA 2024) for means by slot;
        Sculley, WWW 2010, for mini-batches; Dhillon and Modha, Machine Learning 2001, for the cosine.
    Differs: no pass of its own over the data set; features are gathered while training goes on. A class with fewer
        features than slots fills the others with its mean (the codes crash).

    Args:
        name: of the bank.
        num_classes: C.
        num_prototypes: P.
        width: D.
        seed: of the run; decides which of a step's features open slots.
        metric: `euclidean`, or `cosine`: unit vectors are summed, nearest is the largest cosine, prototypes are unit
            vectors.
        folder: see `Bank`.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        num_prototypes: int,
        width: int,
        *,
        seed: int,
        metric: Metric = "euclidean",
        folder: str | None = None,
    ) -> None:
        columns = {
            "prototypes": Column(dtype="f32", shape=(num_prototypes, width)),
            "counts": Column(dtype="i64", shape=(num_prototypes,)),
            "sums": Column(dtype="f64", shape=(num_prototypes, width)),
            "num_added": Column(dtype="i64", shape=(num_prototypes,)),
        }
        super().__init__(name, num_classes, columns, folder=folder, num_shards=min(NUM_SHARDS, num_classes))
        self._num_prototypes, self._width, self._metric = num_prototypes, width, metric
        self._key = keyed.key("prototypes", seed)
        self._table = Replica(num_classes, [(torch.float32, (num_prototypes, width)), (torch.int64, (num_prototypes,))])
        self._norms: np.ndarray | None = None  # squared, of the prototypes of own classes

    @property
    def table_bytes(self) -> int:
        """Of the prototypes and counts that every rank holds."""
        return self.spec.num_rows * self._num_prototypes * (4 * self._width + 8)

    # Gathering -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def add(self, class_id: Tensor, features: Tensor, *, slot: Tensor | None = None, position: Tensor) -> None:
        """Add features to the sums of their slots.

        Args:
            class_id: (n,) int64 in [0, C), n free on each rank.
            features: (n, D), any floating type and device.
            slot: (n,) int64 in [0, P); None: the nearest centre of the class.
            position: (n,) int64, different for any two features of one class: a sample's place in the step, or its
                index.

        Raises:
            BankError: a class or slot that is none, features that do not fit or are not finite; on all ranks, and
                nothing is added.

        Collective: all ranks, one `comm.exchange` of n rows of D float32 and 24 bytes.
        """
        class_id, position = class_id.cpu(), position.cpu()
        features = features.detach().cpu().float()
        error = self._index_error(class_id) or self._feature_error(class_id, features, position, width=self._width)
        slots = torch.full_like(class_id, _NEAREST) if slot is None else slot.cpu()
        if slot is not None:
            error = error or self._slot_error(class_id, slots)
        kinds = [INTEGER, INTEGER, INTEGER, (torch.float32, (self._width,))]
        class_id, slots, position, features = self._send(class_id, [class_id, slots, position, features], kinds, error)
        if len(class_id) == 0:
            return
        hashes = keyed.hash_integers(self._key, position.numpy().astype(np.uint64))  # neighbours may look alike
        order = torch.from_numpy(np.lexsort((hashes, class_id.numpy())))
        class_id, slots = class_id[order], slots[order]
        vectors = self._vectors(features.index_select(0, order).double())
        places = self._places(class_id)
        if slot is None:
            self._add_to_nearest(places, vectors)
        else:
            self._add_to(places, slots, vectors)
        self._mark(class_id)

    def _add_to(self, places: Tensor, slots: Tensor, vectors: Tensor) -> None:
        """Add to sums, in the order given."""
        memory = self._memory()
        flat = places * self._num_prototypes + slots
        memory["sums"].view(-1, self._width).index_add_(0, flat, vectors)
        memory["num_added"].view(-1).index_add_(0, flat, torch.ones_like(flat))

    def _add_to_nearest(self, places: Tensor, vectors: Tensor) -> None:
        """Open empty slots of classes without prototypes, then add the rest to the nearest centres.

        Args:
            places: (n,) local rows, those of a class side by side.
            vectors: (n, D) float64.
        """
        memory = self._memory()
        is_empty = (memory["num_added"][places] == 0) & (memory["counts"][places] == 0)  # (n, P)
        _, sizes = places.unique_consecutive(return_counts=True)
        rank_in_class = torch.arange(len(places)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        opens = rank_in_class < is_empty.sum(dim=1)
        empty_first = is_empty.int().argsort(dim=1, descending=True, stable=True)  # (n, P)
        slots = empty_first.gather(1, rank_in_class.clamp(max=self._num_prototypes - 1)[:, None]).squeeze(1)
        self._add_to(places[opens], slots[opens], vectors[opens])
        rest, left = places[~opens], vectors[~opens]
        self._add_to(rest, self._nearest(rest, left), left)

    def _nearest(self, places: Tensor, vectors: Tensor) -> Tensor:
        """(n,) slot of the nearest centre; of equally near ones the first.

        Products in float32 decide where they leave no doubt: so no bit of the answer hangs on how they are summed.
        """
        found, is_sure = self._roughly_nearest(places, vectors)
        doubtful = (~is_sure).nonzero().squeeze(1)
        for part in doubtful.split(max(1, _BLOCK_NUMBERS // (self._num_prototypes * self._width))):
            found[part] = self._distances(places[part], vectors[part]).argmin(dim=1)
        return found

    def _roughly_nearest(self, places: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) slot of the nearest prototype by products in float32, and (n,) bool where it is that beyond doubt."""
        memory, rows = self._memory(), places.numpy()
        centres, given = memory["prototypes"].numpy(), vectors.float().numpy()
        if self._norms is None:
            self._norms = np.einsum("cpd,cpd->cp", centres, centres, dtype=np.float64)
        products = np.empty((len(rows), self._num_prototypes), dtype=np.float32)
        edges = np.flatnonzero(np.diff(rows, prepend=-1, append=-1)).tolist()
        norms, lengths = self._norms[rows], vectors.norm(dim=1).numpy()[:, None]
        reach = np.sqrt(norms)
        with np.errstate(over="ignore", invalid="ignore"):  # what float32 cannot hold leaves doubt
            for first, stop in pairwise(edges):  # the features of one class
                np.matmul(given[first:stop], centres[rows[first]].T, out=products[first:stop])
            off = (self._width + 8) * 2.0**-23 * lengths * reach  # by which a product may be wrong, in whatever order
            if self._metric == "cosine":
                reach = reach.clip(min=_SMALLEST_NORM)
                distances, off = -products / reach, off / reach
            else:
                distances, off = norms - 2.0 * products, 2.0 * off
            two = np.partition(distances, min(1, self._num_prototypes - 1), axis=1)[:, :2]
            is_sure = two[:, -1] - two[:, 0] > 2.0 * off.max(axis=1)
        is_sure &= np.isfinite(distances).all(axis=1) & (memory["counts"].numpy()[rows] > 0).all(axis=1)
        return torch.from_numpy(distances.argmin(axis=1)), torch.from_numpy(is_sure)

    def _distances(self, places: Tensor, vectors: Tensor) -> Tensor:
        """(n, P) of what decides which centre is near; infinite where a slot has no centre."""
        memory = self._memory()
        counts, num_added = memory["counts"][places], memory["num_added"][places]  # (n, P)
        centres = memory["prototypes"][places].double()  # (n, P, D)
        is_new = (counts == 0).any(dim=1)
        centres[is_new] = memory["sums"][places[is_new]] / num_added[is_new].clamp(min=1)[..., None]
        if self._metric == "cosine":
            norms = centres.norm(dim=2).clamp(min=_SMALLEST_NORM)
            distances = -(centres * vectors[:, None]).sum(dim=2) / norms
        else:
            distances = (centres - vectors[:, None]).square().sum(dim=2)
        return distances.masked_fill((counts == 0) & (num_added == 0), torch.inf)

    def _vectors(self, vectors: Tensor) -> Tensor:
        """Unit vectors under the cosine."""
        if self._metric == "euclidean":
            return vectors
        return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=_SMALLEST_NORM)

    # Renewing and reading --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def renew(self, *, momentum: float | None = None) -> None:
        """Make prototypes of what was added since the last renewal, and begin anew.

        A slot to which nothing was added takes the mean of all that was added to its class. A class to which nothing
        was added keeps what it has.

        Args:
            momentum: in [0, 1), share of the old prototype in the new one where there is an old one; None: nothing.

        Collective: all ranks; P D numbers and 8 P bytes for each class renewed, to every rank.
        """
        memory = self._memory()
        rows = (memory["num_added"] > 0).any(dim=1).nonzero().squeeze(1)
        for part in rows.split(max(1, _BLOCK_NUMBERS // (self._num_prototypes * self._width))):
            added, sums = memory["num_added"][part], memory["sums"][part]  # (u, P), (u, P, D)
            total = added.sum(dim=1, keepdim=True)
            whole = sums.sum(dim=1, keepdim=True) / total[..., None]
            new = torch.where((added > 0)[..., None], sums / added.clamp(min=1)[..., None], whole)
            new = self._vectors(new)
            if momentum is not None:
                old = memory["prototypes"][part].double()
                is_old = (memory["counts"][part] > 0)[..., None]
                new = self._vectors(torch.where(is_old, momentum * old + (1.0 - momentum) * new, new))
            memory["prototypes"][part] = new.float()
            memory["counts"][part] = torch.where(added > 0, added, total)
            memory["sums"][part] = 0.0
            memory["num_added"][part] = 0
        classes = self.held_rows()[rows]
        self._mark(classes)
        self._share(classes)

    def _share(self, classes: Tensor) -> None:
        """Let all ranks know the prototypes of own classes, a block at a time.

        Collective: all ranks.
        """
        self._norms = None
        for part in classes.tensor_split(-(-self.table_bytes // _SHARED_BYTES)):
            places = self._places(part)
            rows = [self._memory()[name].index_select(0, places) for name in ("prototypes", "counts")]
            self._table.share(part, rows)

    def counts(self) -> Tensor:
        """Features behind each prototype.

        Returns:
            (C, P) int64 on the CPU; all 0 for a class that has no prototypes, none 0 for the others. A slot filled with
            its class's mean counts the class. The bank's own table: a renewal changes it.
        """
        return self._table.columns[1]

    @overload
    def read(self, index: Tensor) -> dict[str, Tensor]: ...

    @overload
    def read(self, index: Tensor, slot: Tensor) -> Tensor: ...

    def read(self, index: Tensor, slot: Tensor | None = None) -> dict[str, Tensor] | Tensor:
        """Prototypes; zeros of classes that have none. Every rank holds all: nothing moves.

        Without slots, whole rows from their owners: see `Bank`.

        Args:
            index: (n,) int64 class ids in [0, C), n free on each rank.
            slot: (n,) int64 in [0, P).

        Returns:
            (n, D) float32 on the CPU, in the order asked for.

        Raises:
            BankError: a class or slot that is none.
        """
        if slot is None:
            return super().read(index)
        index, slot = index.cpu(), slot.cpu()
        error = self._index_error(index) or self._slot_error(index, slot)
        if error is not None:
            raise error
        return self._table.columns[0].view(-1, self._width).index_select(0, index * self._num_prototypes + slot)

    def table(self) -> tuple[Tensor, Tensor]:
        """(C, P, D) float32 and (C, P) int64 `counts`, on the CPU, copies."""
        prototypes, counts = self._table.columns
        return prototypes.clone(), counts.clone()

    def mark_loaded(self) -> None:
        """See `Bank`.

        Collective: all ranks, as `renew` for all classes.
        """
        super().mark_loaded()
        self._share(self.held_rows())

    # Faults ----------------------------------------------------------------------------------------------------------

    def _slot_error(self, class_id: Tensor, slot: Tensor) -> BankError | None:
        if tuple(slot.shape) != tuple(class_id.shape):
            return self._error(
                f"slots {tuple(slot.shape)} for {len(class_id)} classes",
                expected="as many slots as classes",
                next_step="hand in one slot for each class id",
            )
        is_outside = (slot < 0) | (slot >= self._num_prototypes)
        if not bool(is_outside.any()):
            return None
        return self._error(
            f"slot {int(slot[is_outside][0])}",
            expected=f"a slot in [0, {self._num_prototypes})",
            next_step="this is a fault of the method: keep the log and report it",
        )
