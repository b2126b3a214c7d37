"""Owns rings and prototypes as slow loops, and random updates of them; see `tests.support.banks`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_mlpl import comm, keyed
from dist_mlpl.banks.prototypes import Prototypes
from dist_mlpl.banks.ring import Ring

NUM_CLASSES, CAPACITY, WIDTH, NUM_PROTOTYPES, SEED = 37, 4, 6, 3, 11
LARGE = 50  # rows of an update from which on prototypes are renewed in its middle
_ONE = 2**29


class Given(NamedTuple):
    """Features that all ranks hand in together."""

    class_id: Tensor
    features: Tensor
    position: Tensor
    slot: Tensor

    def where(self, chosen: Tensor) -> Given:
        """Some of them."""
        return Given(*(column[chosen] for column in self))


def random_features(seed: int, num_rows: int) -> Given:
    """Classes drawn with repetition, three of them alone where the seed is odd; positions without."""
    generator = torch.Generator().manual_seed(seed)
    return Given(
        torch.randint(0, 3 if seed % 2 else NUM_CLASSES, (num_rows,), generator=generator),
        torch.randn(num_rows, WIDTH, generator=generator),
        torch.randperm(num_rows, generator=generator) + 1000 * seed,
        torch.randint(0, NUM_PROTOTYPES, (num_rows,), generator=generator),
    )


def own_part(given: Given) -> Given:
    """Unevenly many on each rank."""
    rows = [row for row in range(len(given.class_id)) if row * row % 7 % comm.world_size() == comm.rank()]
    return given.where(torch.tensor(rows, dtype=torch.int64))


def faulty_features(bank: Any, call: Callable[..., Any]) -> list[Callable[[bool], Any]]:
    """Classes that there are not, features that are not finite or do not fit.

    Args:
        bank: whose rows are classes.
        call: takes class ids, features and positions.
    """
    good = torch.tensor([0, 1]), torch.ones(2, WIDTH), torch.tensor([5, 6])
    wrong = [
        (torch.tensor([0, -1]), *good[1:]),
        (torch.tensor([bank.spec.num_rows, 0]), *good[1:]),
        *((good[0], torch.full((2, WIDTH), bad), good[2]) for bad in (math.nan, math.inf)),
        (good[0], torch.ones(2, WIDTH + 1), good[2]),
        (good[0], torch.ones(1, WIDTH), good[2]),
        (*good[:2], torch.tensor([5])),
    ]
    return [lambda is_faulty, bad=bad: call(*(bad if is_faulty else good)) for bad in wrong]  # type: ignore[misc]


# Rings ----------------------------------------------------------------------------------------------------------------


def make_ring(name: str, folder: str = "", **sizes: Any) -> Ring:
    """A ring of the suite, or one of another size."""
    found = {"num_classes": NUM_CLASSES, "capacity": CAPACITY, "width": WIDTH} | sizes
    return Ring(name, folder=folder or None, **found)


def update_ring(ring: Ring, seed: int, num_rows: int) -> None:
    """This rank's share of a push."""
    own = own_part(random_features(seed, num_rows))
    ring.push(own.class_id, own.features, own.position)


class SlowRing:
    """A list for each class."""

    def __init__(self, ring: Ring) -> None:
        self.pushed: list[list[tuple[np.ndarray, int]]] = [[] for _ in range(NUM_CLASSES)]
        self.tolerance = {"units": 64.0, "sums": 64.0 * CAPACITY}  # twice what float32 rounds off a unit vector

    def update(self, seed: int, num_rows: int) -> None:
        given = random_features(seed, num_rows)
        for row in given.position.argsort().tolist():
            feature = given.features[row].double().numpy()
            self.pushed[int(given.class_id[row])].append((feature, int(given.position[row])))

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """Of a ring that was never asked for its means."""
        found = {
            "units": np.zeros((NUM_CLASSES, CAPACITY, WIDTH)),
            "stamps": np.full((NUM_CLASSES, CAPACITY), -1.0),
            "num_pushed": np.array([float(len(own)) for own in self.pushed]),
            "sums": np.zeros((NUM_CLASSES, WIDTH)),
            "means": np.zeros((NUM_CLASSES, WIDTH)),
            "counts": np.zeros(NUM_CLASSES),
        }
        for c, own in enumerate(self.pushed):
            for number, (feature, position) in enumerate(own):
                if number >= len(own) - CAPACITY:
                    unit = np.round(feature / math.sqrt(sum(x * x for x in feature)) * _ONE)
                    found["units"][c, number % CAPACITY] = unit
                    found["stamps"][c, number % CAPACITY] = position
                    found["sums"][c] += unit
        return found

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """(C, D) mean unit vectors and (C,) filled entries."""
        means, counts = np.zeros((NUM_CLASSES, WIDTH)), np.zeros(NUM_CLASSES)
        for c, own in enumerate(self.pushed):
            newest = own[-CAPACITY:]
            counts[c] = len(newest)
            for feature, _ in newest:
                means[c] += feature / math.sqrt(sum(x * x for x in feature)) / len(newest)
        return means, counts


# Prototypes -----------------------------------------------------------------------------------------------------------


def make_prototypes(name: str, folder: str = "", **sizes: Any) -> Prototypes:
    """Prototypes of the suite, or of another size; the cosine where the name says so."""
    found = {"num_classes": NUM_CLASSES, "num_prototypes": NUM_PROTOTYPES, "width": WIDTH, "seed": SEED} | sizes
    return Prototypes(name, metric="cosine" if "cosine" in name else "euclidean", folder=folder or None, **found)


def update_prototypes(bank: Prototypes, seed: int, num_rows: int) -> None:
    """This rank's share of two additions, to slots where the name says so, and a renewal between large ones."""
    given = random_features(seed, num_rows)
    half = num_rows // 2
    for number, part in enumerate((given.where(torch.arange(half)), given.where(torch.arange(half, num_rows)))):
        own = own_part(part)
        slot = own.slot if "slots" in bank.name else None
        bank.add(own.class_id, own.features, slot=slot, position=own.position)
        if number == 0 and num_rows >= LARGE:
            bank.renew(momentum=momentum_of(seed))


def momentum_of(seed: int) -> float | None:
    return 0.25 if seed % 2 else None


def faulty_slots(bank: Prototypes) -> list[Callable[[bool], Any]]:
    """Slots that there are not, added to and asked for; what every rank holds it reads without the others."""
    good, classes = torch.tensor([0, 1]), torch.tensor([0, 1])
    wrong = [torch.tensor([0, -1]), torch.tensor([NUM_PROTOTYPES, 0]), torch.tensor([0])]
    adds = [
        lambda is_faulty, bad=bad: bank.add(
            classes, torch.ones(2, WIDTH), slot=bad if is_faulty else good, position=torch.tensor([5, 6])
        )
        for bad in wrong
    ]
    return [*adds, *(lambda is_faulty, bad=bad: bank.read(classes, bad) for bad in wrong)]


class SlowPrototypes:
    """Sums by class and slot, a feature at a time."""

    def __init__(self, bank: Prototypes) -> None:
        shape = NUM_CLASSES, NUM_PROTOTYPES, WIDTH
        self._is_cosine, self._has_slots = "cosine" in bank.name, "slots" in bank.name
        self.columns = {
            "prototypes": np.zeros(shape), "counts": np.zeros(shape[:2]), "sums": np.zeros(shape),
            "num_added": np.zeros(shape[:2]),
        }  # fmt: skip
        self.tolerance = {"sums": 1e-12, "prototypes": 1e-6}

    def update(self, seed: int, num_rows: int) -> None:
        given = random_features(seed, num_rows)
        half = num_rows // 2
        self._add(given.where(torch.arange(half)))
        if num_rows >= LARGE:
            self._renew(momentum_of(seed))
        self._add(given.where(torch.arange(half, num_rows)))

    def _add(self, given: Given) -> None:
        """Those that open slots first, as later ones are held against them; in the order of keyed positions."""
        sums, num_added, counts = (self.columns[name] for name in ("sums", "num_added", "counts"))
        hashes = keyed.hash_integers(keyed.key("prototypes", SEED), given.position.numpy().astype(np.uint64))
        ordered = [int(row) for row in np.argsort(hashes)]
        is_open = num_added + counts > 0
        left = []
        for row in ordered:
            c = int(given.class_id[row])
            empty = np.flatnonzero(~is_open[c])
            if self._has_slots:
                self._put(c, int(given.slot[row]), given.features[row])
            elif len(empty):
                self._put(c, int(empty[0]), given.features[row])
                is_open[c, empty[0]] = True
            else:
                left.append(row)
        centres = [[self._centre(c, p) for p in range(NUM_PROTOTYPES)] for c in range(NUM_CLASSES)]
        for row in left:
            c, x = int(given.class_id[row]), self._vector(given.features[row].double().numpy())
            far = [self._distance(x, centre) for centre in centres[c]]
            self._put(c, far.index(min(far)), given.features[row])
        assert sums is self.columns["sums"]

    def _put(self, c: int, p: int, feature: Tensor) -> None:
        self.columns["sums"][c, p] += self._vector(feature.double().numpy())
        self.columns["num_added"][c, p] += 1

    def _centre(self, c: int, p: int) -> np.ndarray | None:
        if self.columns["counts"][c, p] > 0:
            return self.columns["prototypes"][c, p].astype(np.float32).astype(np.float64)
        n = self.columns["num_added"][c, p]
        return self.columns["sums"][c, p] / n if n else None

    def _distance(self, x: np.ndarray, centre: np.ndarray | None) -> float:
        if centre is None:
            return math.inf
        if self._is_cosine:
            return -float(x @ centre) / math.sqrt(centre @ centre)
        return float(((x - centre) ** 2).sum())

    def _vector(self, x: np.ndarray) -> np.ndarray:
        return x / math.sqrt(float(x @ x)) if self._is_cosine else x

    def _renew(self, momentum: float | None) -> None:
        for c in range(NUM_CLASSES):
            sums, added = self.columns["sums"][c], self.columns["num_added"][c]
            total = added.sum()
            for p in range(NUM_PROTOTYPES) if total else ():
                new = self._vector(sums[p] / added[p] if added[p] else sums.sum(axis=0) / total)
                if momentum is not None and self.columns["counts"][c, p] > 0:
                    old = self.columns["prototypes"][c, p]
                    new = self._vector(momentum * old + (1 - momentum) * new)
                self.columns["prototypes"][c, p] = new
                self.columns["counts"][c, p] = added[p] or total
            self.columns["sums"][c], self.columns["num_added"][c] = 0, 0
