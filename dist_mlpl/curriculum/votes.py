"""Owns the votes of similar images on unknown labels: embeddings of a stretch of one shard, known labels, votes."""

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
        rows: (n,) int64, rows of a shard, or sample indices of the split.
        classes: (n,) uint16, class columns.
        values: (n,) int8, -1 or +1.
    """

    rows: npt.NDArray[np.int64]
    classes: npt.NDArray[np.uint16]
    values: npt.NDArray[np.int8]


class Embedded(NamedTuple):
    """Embeddings and known labels of a stretch of a shard, from the scoring pass.

    Args:
        rows: (n,) int64, rows of the shard whose images could be decoded.
        embeddings: (n, D) float16.
        known: their known labels, by row of the shard.
    """

    rows: npt.NDArray[np.int64]
    embeddings: npt.NDArray[np.float16]
    known: Known


class EmbeddedMaker:
    """Makes a stretch from its blocks, in order.

    Args:
        first_row: row of the shard at which the stretch begins.
    """

    def __init__(self, *, first_row: int) -> None:
        self._next_row = first_row
        self._blocks: list[Embedded] = []

    def add(
        self, embeddings: npt.NDArray[np.float16], targets: Targets, valid: npt.NDArray[np.bool_], num_rows: int
    ) -> None:
        """Add the next block.

        Args:
            embeddings: (B, D) float16.
            targets: (B, C) int8, human labels as the run sees them.
            valid: (B,) bool, False for padding and undecodable images.
            num_rows: number of rows before the padding.
        """
        rows, classes = np.nonzero(np.where(valid[:, None], targets, UNKNOWN))
        known = Known(rows + self._next_row, classes.astype(np.uint16), targets[rows, classes])
        self._blocks.append(Embedded(np.flatnonzero(valid) + self._next_row, embeddings[valid], known))
        self._next_row += num_rows

    def embedded(self) -> Embedded:
        """The stretch; call this once all its blocks have been added."""
        rows, embeddings, known = zip(*self._blocks, strict=True)
        return Embedded(np.concatenate(rows), np.concatenate(embeddings), join_known(list(known)))


def join_known(parts: list[Known]) -> Known:
    """Concatenate lists of known labels."""
    nothing = Known(np.empty(0, np.int64), np.empty(0, np.uint16), np.empty(0, np.int8))
    return Known(*(np.concatenate(column) for column in zip(nothing, *parts, strict=True)))  # type: ignore[arg-type]


def encode_embedded(embedded: Embedded, *, origin: str) -> bytes:
    """Encode a stretch as the bytes of a file; equal stretches give equal bytes.

    Args:
        embedded: the stretch.
        origin: hexadecimal digest of the round's plan.
    """
    arrays = {f"known_{name}": column for name, column in embedded.known._asdict().items()}
    arrays |= {"rows": embedded.rows, "embeddings": embedded.embeddings}
    arrays["origin"] = np.frombuffer(bytes.fromhex(origin), dtype=np.uint8)
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def decode_embedded(content: bytes, *, origin: str, where: str) -> Embedded:
    """Decode a stretch.

    Args:
        content: bytes of the file.
        origin: hexadecimal digest of the round's plan.
        where: the file's URL, for messages.

    Raises:
        CheckpointError: the file is damaged, or was made from another plan.
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
        self._starts = np.searchsorted(known.rows[order], np.arange(num_samples + 1))  # first entry of each sample
        self._num_classes = num_classes

    def scores(self, neighbours: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Logits of presence from the votes of similar images: log((p + 1) / (a + 1)) for p present, a absent votes.

        The logit is 0 without votes; its sigmoid is Laplace's (p + 1) / (p + a + 2).

        Args:
            neighbours: (B, k) int64 sample indices, -1 for none.

        Returns:
            (B, C) float64.
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
