"""Owns the prototypes used in blending: gathered from known positives, and drawn for unknown labels."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
import torch
from torch import Tensor

from dist_mlpl import keyed
from dist_mlpl.banks.prototypes import Prototypes
from dist_mlpl.banks.rows import NUMBER_BYTES
from dist_mlpl.labels import UNKNOWN
from dist_mlpl.methods.costs import Cost, Scale, bank_cost, exchange_bytes
from dist_mlpl.methods.unknown_loss import Named

PROTOTYPES: Final = "prototypes"
NUM_QUADRANTS: Final = 4
Kind = Literal["kmeans", "quadrants"]


class DrawnPrototypes:
    """The bank `prototypes`: what is added to it, and which of its prototypes an image is given.

    Args:
        kind: `kmeans` or `quadrants`.
        num_classes: C.
        num_prototypes: P, for kmeans only.
        width: D.
        seed: the run's seed.
        count: k, labels of an image that are mixed with prototypes in one step.
        faithful: see `Blending`.
        folder: see `HeldRows`.
    """

    def __init__(
        self,
        kind: Kind,
        *,
        num_classes: int,
        num_prototypes: int,
        width: int,
        seed: int,
        count: int,
        faithful: bool,
        folder: str | None,
    ) -> None:
        self._kind, self._num_prototypes, self._width = kind, num_prototypes, width
        self._seed, self._count, self._faithful = seed, count, faithful
        # The code's quadrant means include a row of zeros that its class means do not. A fifth slot counts the whole
        # class, so that a quadrant can be told from an empty one, which is filled with the class's mean.
        num_slots = num_prototypes if kind == "kmeans" else NUM_QUADRANTS + faithful
        self.bank = Prototypes(PROTOTYPES, num_classes, num_slots, width, seed=seed, folder=folder)

    def add(self, class_id: Tensor, features: Tensor, quadrants: Tensor | None, index: Tensor) -> None:
        """Add the known positives of a step.

        Args:
            class_id: (n,) int64.
            features: (n, D).
            quadrants: (n,) int64 in [0, 4), where the class peaks; None for kmeans.
            index: (n,) int64, indices of the samples.

        Collective: all ranks, see `Prototypes.add`; called twice for quadrants with `faithful`.
        """
        self.bank.add(class_id, features, slot=quadrants, position=index)
        if quadrants is not None and self._faithful:
            self.bank.add(class_id, features, slot=torch.full_like(quadrants, NUM_QUADRANTS), position=index)

    def draw(self, index: Tensor, targets: Tensor, step: int) -> Named:
        """Draw labels of images to be mixed, and a prototype for each.

        Args:
            index: (n,) int64, indices of the samples, ascending; on the CPU, like all tensors here.
            targets: (n, C) int8 in {-1, 0, 1}.
            step: number of the step in the run.

        Returns:
            `drawn_index` (n,), `index` itself; `drawn_classes` (n, k) int64, -1 for none; `drawn_prototypes`
            (n, k, Q, D), the one drawn (kmeans, Q = 1) or those of the four quadrants, of which the forward takes the
            class's own quadrant less `drawn_turn` (n, k) in {1, 2, 3}, modulo 4 (kmeans: 0, not used).
        """
        counts = self.bank.counts()  # (C, P)
        exists = counts.sum(dim=1) > 0
        candidates = (targets == UNKNOWN) & exists
        key = keyed.key("blended classes", self._seed, step)
        classes = draw_classes(candidates, index, key, count=self._count, fills_up=self._faithful)  # (n, k)
        classes = torch.where(exists[classes], classes, -1)
        key = keyed.key("blended prototypes", self._seed, step)
        if self._kind == "kmeans":
            owner = torch.zeros_like(index) if self._faithful else index
            slots = draw_numbers(owner, key, count=classes.shape[1], num_values=self._num_prototypes)[..., None]
            turn = torch.zeros_like(classes)
        else:
            slots = torch.arange(NUM_QUADRANTS).expand(*classes.shape, -1)  # (n, k, 4)
            turn = 1 + draw_numbers(index, key, count=classes.shape[1], num_values=NUM_QUADRANTS - 1)
        rows = classes[..., None].expand_as(slots)
        is_drawn = rows >= 0
        found = torch.zeros(*slots.shape, self._width)
        found[is_drawn] = self.bank.read(rows[is_drawn], slots[is_drawn])
        if self._faithful and self._kind == "quadrants":
            found *= quadrant_shrinkage(counts)[rows, slots, None]
        return {"drawn_index": index, "drawn_classes": classes, "drawn_prototypes": found, "drawn_turn": turn}

    def cost(self, scale: Scale) -> Cost:
        """Estimate the cost of a step that adds known positives, without what a renewal sends once per epoch."""
        num_times = 2 if self._faithful and self._kind == "quadrants" else 1
        num_positives, row_bytes = scale.share_images * scale.num_positives, 24 + 4 * self._width
        sent = exchange_bytes(num_positives, row_bytes, scale.world_size, is_expected=True)
        sent = num_times * (sent + (scale.world_size - 1) * NUMBER_BYTES)  # the announced counts
        rows = bank_cost(PROTOTYPES, self.bank, scale, reads=0, writes=0)
        return rows._replace(held_bytes=rows.held_bytes + self.bank.table_bytes, sent_bytes=sent)


def quadrant_shrinkage(counts: Tensor) -> Tensor:
    """The factor by which the code's row of zeros shrinks a quadrant's mean: n / (n + 1); 1 for the class's mean.

    Args:
        counts: (C, 5) int64, of the quadrants and, last, of the class. A quadrant with n features counts n; an empty
            one, which holds the class's mean, counts the features of all five slots.

    Returns:
        (C, 4) float32.
    """
    of_quadrant, of_class = counts[:, :-1].float(), counts[:, -1:].float()
    return torch.where(of_quadrant <= of_class, of_quadrant / (of_quadrant + 1), 1.0)


def draw_classes(candidates: Tensor, index: Tensor, key: int, *, count: int, fills_up: bool = False) -> Tensor:
    """Draw classes of each image among its candidates, without replacement.

    Args:
        candidates: (n, C) bool.
        index: (n,) int64, indices of the samples; the draw depends only on it, the key and the candidates.
        key: see `keyed.key`.
        count: k.
        fills_up: True: if there are fewer candidates, add the first other classes, as the code does.

    Returns:
        (n, min(k, C)) int64; -1 where there are no more candidates, unless `fills_up`.
    """
    num_classes = candidates.shape[1]
    classes = torch.arange(num_classes)
    numbers = _hashed(key, index[:, None] * num_classes + classes).double()  # whole, so exact
    best, chosen = torch.where(candidates, numbers, -1.0 - classes).topk(min(count, num_classes), dim=1)
    return chosen if fills_up else torch.where(best >= 0, chosen, -1)


def draw_numbers(index: Tensor, key: int, *, count: int, num_values: int) -> Tensor:
    """Draw (n, count) int64, uniform in [0, num_values), that depend only on sample indices (n,) int64 and the key."""
    return _hashed(key, index[:, None] * count + torch.arange(count)) % num_values


def _hashed(key: int, values: Tensor) -> Tensor:
    """Hash int64 values of any shape to int64, uniform in [0, 2**53)."""
    bits = keyed.hash_integers(key, values.numpy().astype(np.uint64)) >> np.uint64(11)
    return torch.from_numpy(bits.astype(np.int64))
