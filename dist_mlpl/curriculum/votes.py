"""Owns what similar images say about unknown labels: embeddings of a stretch of one shard, known labels, votes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from dist_mlpl.curriculum.parts import unusable
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN, Targets


class Known(NamedTuple):
    """Known labels, sparse, in any order.

    Args:
        rows: (n,) int64, of a shard or sample indices of the split.
        classes: (n,) uint16.
        values: (n,) int8, -1 or +1.
    """

    rows: npt.NDArray[np.int64]
    classes: npt.NDArray[np.uint16]
    values: npt.NDArray[np.int8]


class Embedded(NamedTuple):
    """A stretch of a shard as the scoring pass saw it.

    Args:
        rows: (n,) int64 of the shard, the images that could be decoded.
        embeddings: (n, D) float16.
        known: their known labels, by row of the shard.
    """

    rows: npt.NDArray[np.int64]
    embeddings: npt.NDArray[np.float16]
    known: Known


class EmbeddedMaker:
    """Makes a stretch from its blocks, in order.

    Args:
        first_row: of the stretch in its shard.
    """

    def __init__(self, *, first_row: int) -> None:
        self._next_row = first_row
        self._blocks: list[Embedded] = []

    def add(
        self, embeddings: npt.NDArray[np.float16], targets: Targets, valid: npt.NDArray[np.bool_], num_rows: int
    ) -> None:
        """One block.

        Args:
            embeddings: (B, D).
            targets: (B, C) int8, human labels as the run sees them.
            valid: (B,), False for padding and undecodable images.
            num_rows: rows that are no padding; they come first.
        """
        rows, classes = np.nonzero(np.where(valid[:, None], targets, UNKNOWN))
        known = Known(rows + self._next_row, classes.astype(np.uint16), targets[rows, classes])
        self._blocks.append(Embedded(np.flatnonzero(valid) + self._next_row, embeddings[valid], known))
        self._next_row += num_rows

    def embedded(self) -> Embedded:
        """The stretch, once all its blocks were added."""
        rows, embeddings, known = zip(*self._blocks, strict=True)
        return Embedded(np.concatenate(rows), np.concatenate(embeddings), join_known(list(known)))


def join_known(parts: list[Known]) -> Known:
    """Lists end to end."""
    nothing = Known(np.empty(0, np.int64), np.empty(0, np.uint16), np.empty(0, np.int8))
    return Known(*(np.concatenate(column) for column in zip(nothing, *parts, strict=True)))  # type: ignore[arg-type]


def encode_embedded(embedded: Embedded, *, origin: str) -> bytes:
    """A stretch as a file; equal ones give equal bytes.

    Args:
        embedded: to write.
        origin: digest of the round's plan, hexadecimal.
    """
    arrays = {f"known_{name}": column for name, column in embedded.known._asdict().items()}
    arrays |= {"rows": embedded.rows, "embeddings": embedded.embeddings}
    arrays["origin"] = np.frombuffer(bytes.fromhex(origin), dtype=np.uint8)
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def decode_embedded(content: bytes, *, origin: str, where: str) -> Embedded:
    """Read a stretch.

    Raises:
        CheckpointError: it does not read, or was made from another plan.
    """
    try:
        arrays = safetensors.numpy.load(content)
        made_from = arrays["origin"].tobytes().hex()
        known = Known(*(arrays[f"known_{name}"] for name in Known._fields))
        embedded = Embedded(arrays["rows"], arrays["embeddings"], known)
    except (SafetensorError, KeyError, ValueError) as error:
        raise unusable(f"embeddings that do not read: {error}", where) from error
    if made_from != origin:
        raise unusable(f"embeddings of the plan {made_from[:16]}...", where)
    return embedded


class Voters:
    """The known labels of a split, image by image.

    Args:
        known: by sample index, in any order.
        num_samples: N.
        num_classes: C.
    """

    def __init__(self, known: Known, *, num_samples: int, num_classes: int) -> None:
        order = np.lexsort((known.classes, known.rows))
        self._classes, self._values = known.classes[order], known.values[order]
        self._starts = np.searchsorted(known.rows[order], np.arange(num_samples + 1))  # of each sample's own
        self._num_classes = num_classes

    def scores(self, neighbours: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Logits of presence by the votes of similar images: log (p + 1) / (a + 1) of p present and a absent ones.

        Without votes that is 0, and sigmoid of it is Laplace's (p + 1) / (p + a + 2).

        Args:
            neighbours: (B, k) sample indices, -1 for nobody.

        Returns:
            (B, C).
        """
        query, column = np.nonzero(neighbours >= 0)
        voter = neighbours[query, column]
        lengths = self._starts[voter + 1] - self._starts[voter]
        ends = np.cumsum(lengths)
        entry = np.arange(int(lengths.sum())) + np.repeat(self._starts[voter] - (ends - lengths), lengths)
        cells = np.repeat(query, lengths) * self._num_classes + self._classes[entry]
        present, absent = (
            np.bincount(cells[self._values[entry] == value], minlength=len(neighbours) * self._num_classes)
            for value in (PRESENT, ABSENT)
        )
        return np.log((present + 1) / (absent + 1)).reshape(len(neighbours), self._num_classes)
