"""Owns the meaning of rows in Open Images' label files: human verifications, machine labels, boxes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from dist_mlpl.errors import nearest_names
from shards.sources.csv_blocks import Block, Wrong
from shards.sources.image_ids import COLUMN, IdPlaces, read_rows, wrong_id
from shards.sources.label_entries import CROWD_BIT, PRESENT_BIT, Entries, machine_claims, pack
from shards.sources.openimages_classes import MID, MID_MEANING

_TYPES = {
    "Source": pa.dictionary(pa.int32(), pa.string()),  # few distinct values in many rows
    "LabelName": pa.dictionary(pa.int32(), pa.string()),
    "Confidence": pa.float64(),
}


@dataclass(frozen=True, slots=True)
class LabelKind:
    """One kind of label file.

    Args:
        option: the source's option that names the files.
        what: what the files hold, for messages.
        sources: allowed values of the column Source, with their claim bits; 0 for professionals.
        columns: columns read besides the id. Without Confidence every row means present.
        is_graded: whether confidences may be any number in [0, 1]; otherwise only 0 or 1.
    """

    option: str
    what: str
    sources: Mapping[str, int]
    columns: tuple[str, ...] = tuple(_TYPES)
    is_graded: bool = False

    def check(self, cells: Mapping[str, str]) -> Wrong | None:
        """The fault in a row; None if it is valid."""
        source, mid, confidence = (cells[column] for column in _TYPES)
        if wrong := wrong_id(cells):
            return wrong
        if source not in self.sources:
            return Wrong(f"source {source!r}", f"in {self.what}, {nearest_names(source, self.sources)}")
        if not MID.fullmatch(mid):
            return Wrong(f"class {mid!r}", MID_MEANING)
        if "Confidence" not in self.columns or self._is_allowed(np.array(_number(confidence))).all():
            return None
        expected = "a number in [0, 1]" if self.is_graded else "1 (verified present) or 0 (verified absent)"
        return Wrong(f"confidence {confidence!r}", expected)

    def claims(
        self, source_bits: npt.NDArray[np.uint8], confidences: npt.NDArray[np.float64] | None
    ) -> npt.NDArray[np.integer] | None:
        """Claims of (n,) rows for `pack`; None if a confidence is out of range."""
        if confidences is None:
            return source_bits | np.uint8(PRESENT_BIT)
        if not self._is_allowed(confidences).all():
            return None
        if self.is_graded:
            return machine_claims(confidences)
        return source_bits | np.where(confidences == 1, np.uint8(PRESENT_BIT), np.uint8(0))

    def _is_allowed(self, confidences: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        if self.is_graded:
            return (confidences >= 0) & (confidences <= 1)
        return (confidences == 0) | (confidences == 1)


HUMAN = LabelKind("human", "human labels", {"verification": 0, "crowdsource-verification": CROWD_BIT, "human": 0})
MACHINE = LabelKind("machine", "machine labels", {"machine": 0}, is_graded=True)
BOXES = LabelKind(
    "boxes",
    "boxes",
    dict.fromkeys(("xclick", "activemil", "verification", "freeform", "human"), 0),
    columns=("Source", "LabelName"),
)


class ReadLabels(NamedTuple):
    """The labels of a block."""

    entries: Entries
    num_rows: int
    dropped: Counter[str]  # number of rows that became no entry, by reason
    strangers: set[str]  # MIDs that are not in the class list


class LabelReader:
    """Reads the blocks of one kind of label file, on any thread.

    Args:
        kind: kind of the file.
        images: positions of all images.
        mids: MIDs of the classes, in column order.
        min_confidence: graded labels below it are dropped, in [0, 1].
    """

    def __init__(self, kind: LabelKind, images: IdPlaces, mids: Sequence[str], *, min_confidence: float) -> None:
        self._kind, self._images, self._mids = kind, images, pa.array(mids, pa.string())
        self._min_confidence = min_confidence if kind.is_graded else 0.0

    def __call__(self, block: Block) -> ReadLabels:
        """Read the labels of a block.

        Raises:
            DataError: an invalid row; the message names its line.
        """
        kind = self._kind
        table, image_ids = read_rows(block, {column: _TYPES[column] for column in kind.columns}, kind.check)
        sources, source_codes = _coded(table["Source"])
        mids, mid_codes = _coded(table["LabelName"])
        if not set(sources.to_pylist()) <= kind.sources.keys():
            raise block.fault(kind.check, "an unknown source")
        column_of_mid = pc.fill_null(pc.index_in(mids, self._mids), -1).to_numpy(zero_copy_only=False)
        strangers = set(mids.filter(pa.array(column_of_mid < 0)).to_pylist())
        if not all(map(MID.fullmatch, strangers)):
            raise block.fault(kind.check, "a class that is no MID")
        confidences = table["Confidence"].to_numpy() if "Confidence" in kind.columns else None
        bits = np.array([kind.sources[source] for source in sources.to_pylist()], dtype=np.uint8)
        claims = kind.claims(bits[source_codes], confidences)
        if claims is None:
            raise block.fault(kind.check, "a confidence out of range")
        columns = column_of_mid.astype(np.int64)[mid_codes]
        rows = self._images.find(image_ids.ids)[image_ids.runs]
        is_sure = np.ones(len(rows), dtype=bool) if confidences is None else confidences >= self._min_confidence
        keep = (columns >= 0) & (rows >= 0) & is_sure
        dropped = {
            "unknown_class": columns < 0,
            "image_not_listed": (columns >= 0) & (rows < 0),
            "below_min_confidence": (columns >= 0) & (rows >= 0) & ~is_sure,
        }
        counts = Counter({f"{kind.option}_{reason}": int(which.sum()) for reason, which in dropped.items()})
        return ReadLabels(pack(rows[keep], columns[keep], claims[keep]), len(rows), counts, strangers)


def read_ids(block: Block, kind: LabelKind) -> npt.NDArray[np.uint64]:
    """Read the distinct ids of a block of labels, ascending.

    Raises:
        DataError: an invalid id; the message names its line.
    """
    return np.unique(read_rows(block, {}, kind.check)[1].ids)


def needed_columns(kind: LabelKind) -> tuple[str, ...]:
    """Columns that a file must have."""
    return (COLUMN, *kind.columns)


def _coded(column: pa.ChunkedArray) -> tuple[pa.StringArray, npt.NDArray[np.int32]]:
    """Distinct texts of a column, and the position of each row's text among them, (n,) int32."""
    array = pa.concat_arrays(column.unify_dictionaries().chunks)
    return array.dictionary, array.indices.to_numpy()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
