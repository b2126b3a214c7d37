"""Owns the files of relabelling rounds: a run's beliefs about labels that are unknown to it.

RUN/rounds/000003/plan.json              what the round is made from; created exclusively, so a number is one round
RUN/rounds/000003/parts/                 scores of finished pieces of shards, while the round is being made
RUN/rounds/000003/train-000000.arrow     beliefs about shard 0 of the split, one row per belief, in row-major order
RUN/rounds/000003/commit.json            makes the round exist; created exclusively, after the files that it lists

Nothing in them depends on time, host or number of ranks. A committed round never changes.
"""

from __future__ import annotations

import json
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import ValidationError

from dist_mlpl import storage
from dist_mlpl.errors import CheckpointError
from dist_mlpl.labels import CODES, UNKNOWN
from dist_mlpl.settings import Settings

FORMAT: Final = 1
FOLDER: Final = "rounds"
PREDICTED, KEPT = 1, 2  # source of a belief: this round's models, or the previous round (`curriculum.cumulative`)

_CLASS_BITS = 16  # class columns are uint16
_SCHEMA = pa.schema(
    [
        ("row", pa.int32()),
        ("class", pa.uint16()),
        ("value", pa.int8()),
        ("soft", pa.float16()),
        ("score", pa.float16()),
        ("source", pa.uint8()),
    ]
)


class Overlay(NamedTuple):
    """k beliefs about one shard, in row-major order, each (row, class) at most once.

    Args:
        rows: (k,) int32, row of the shard.
        classes: (k,) uint16, class column.
        values: (k,) int8: -1 absent, +1 present; 0 means proposed by this round and not believed yet.
        scores: (k,) float16, the mean logit behind the belief; its sign is the label proposed.
        sources: (k,) uint8, PREDICTED or KEPT.
        soft: (k,) float16 in [0, 1], probability of presence; None in a round without soft labels.
    """

    rows: npt.NDArray[np.int32]
    classes: npt.NDArray[np.uint16]
    values: npt.NDArray[np.int8]
    scores: npt.NDArray[np.float16]
    sources: npt.NDArray[np.uint8]
    soft: npt.NDArray[np.float16] | None = None

    @property
    def codes(self) -> npt.NDArray[np.int64]:
        """(k,) int64, one number per (row, class), ascending."""
        return codes_of(self.rows, self.classes)

    @property
    def signs(self) -> npt.NDArray[np.int8]:
        """(k,) int8, the label that each entry proposes, -1 or +1, believed or not."""
        return np.where(self.scores >= 0, np.int8(1), np.int8(-1))

    def where(self, chosen: npt.NDArray[Any] | slice) -> Overlay:
        """The entries selected by a (k,) mask, a slice, or ascending positions."""
        return Overlay._make(None if column is None else column[chosen] for column in self)

    @property
    def believed(self) -> Overlay:
        """The entries in force, without those only proposed."""
        return self.where(self.values != UNKNOWN)

    @classmethod
    def empty(cls, *, has_soft: bool = False) -> Overlay:
        """An overlay without beliefs."""
        soft = np.empty(0, np.float16) if has_soft else None
        columns = np.empty(0, np.int32), np.empty(0, np.uint16), np.empty(0, np.int8)
        return cls(*columns, np.empty(0, np.float16), np.empty(0, np.uint8), soft)


def codes_of(rows: npt.NDArray[Any], classes: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(k,) int64, one number per (row, class) of a shard, ascending in row-major order."""
    return rows.astype(np.int64) << _CLASS_BITS | classes


class OverlayFile(Settings):
    """One file of a round."""

    path: str  # below RUN/rounds; in an earlier round's folder if that round was restored
    num_bytes: int
    sha256: str
    num_present: int  # beliefs
    num_absent: int
    num_proposed: int  # proposals not believed yet


class RoundModel(Settings):
    """One of the models that score a round."""

    step: int  # step of its commit
    sha256: str  # digest of its model.safetensors


class RoundPlan(Settings):
    """The inputs of a round: equal plans give equal rounds."""

    format: Literal[1] = FORMAT
    round: int  # 1 for the first
    parent: int  # the previous round; 0 for none
    split: str
    manifest_digest: str
    view_digest: str | None
    strategy: str
    parameters: dict[str, Any]
    models: tuple[RoundModel, ...]
    scored_with: str  # digest of what else scores depend on; see `Config.scoring_digest`
    seed: int


class RoundCommit(RoundPlan):
    """The record that makes a round exist."""

    restores: int | None = None  # the round whose files are in force again, for one made by `labels rollback`
    counts: dict[str, int]
    decided: dict[str, float]  # numbers computed from the data, such as a global threshold
    has_soft: bool
    files: tuple[OverlayFile, ...]  # one per shard in manifest order; empty in a round without beliefs
    sha256: str = ""  # digest of commit.json; set by `read_round`, not part of the document


def round_url(run: str, number: int, *names: str) -> str:
    """URL of a round's folder, or of something in it."""
    return storage.join(run, FOLDER, f"{number:06d}", *names)


def overlay_name(split: str, shard: int) -> str:
    """File name of the beliefs about one shard.

    Args:
        split: name of the split.
        shard: number of the shard in the split, from 0.
    """
    return f"{split}-{shard:06d}.arrow"


def round_numbers(run: str) -> list[int]:
    """Numbers of all rounds begun, committed or not, ascending."""
    return sorted(int(name) for name in storage.list_names(storage.join(run, FOLDER)) if name.isdecimal())


def newest_round(run: str) -> int:
    """Number of the newest committed round, 0 for none."""
    begun = reversed(round_numbers(run))
    return next((number for number in begun if storage.exists(round_url(run, number, "commit.json"))), 0)


def unfinished_round(run: str) -> int | None:
    """Number of the round that is being made or was interrupted; None if there is none."""
    begun = round_numbers(run)
    return begun[-1] if begun and begun[-1] > newest_round(run) else None


def read_round(run: str, number: int) -> RoundCommit:
    """Read the commit of a round.

    Raises:
        CheckpointError: missing, damaged or of another format.
    """
    url = round_url(run, number, "commit.json")
    try:
        content = storage.read_bytes(url)
        document = RoundCommit.model_validate_json(content)
    except (FileNotFoundError, ValidationError) as error:
        raise CheckpointError(
            f"round {number} of labels cannot be read: {type(error).__name__}",
            expected=f"a committed round of format {FORMAT}",
            where=storage.shown(url),
            next_step="restore RUN/rounds; `dist-mlpl labels log RUN` lists the rounds that are there",
        ) from error
    return document.model_copy(update={"sha256": storage.sha256_of_bytes(content)})


def read_plan(run: str, number: int) -> RoundPlan:
    """Read the plan of a round, committed or not.

    Raises:
        CheckpointError: missing or damaged.
    """
    url = round_url(run, number, "plan.json")
    try:
        return RoundPlan.model_validate_json(storage.read_bytes(url))
    except (FileNotFoundError, ValidationError) as error:
        raise CheckpointError(
            f"the plan of round {number} cannot be read: {type(error).__name__}",
            expected="plan.json, which is written first",
            where=storage.shown(url),
            next_step="`dist-mlpl labels rollback RUN` drops a round that was never finished",
        ) from error


def round_chain(run: str, number: int) -> list[RoundCommit]:
    """A committed round and its ancestors, newest first.

    Raises:
        CheckpointError: one of them is missing.
    """
    chain = []
    while number > 0:
        chain.append(read_round(run, number))
        number = chain[-1].parent
    return chain


def document_bytes(document: Settings) -> bytes:
    """A plan or a commit as the bytes of its file."""
    return (json.dumps(document.model_dump(mode="json", exclude={"sha256"}), indent=1) + "\n").encode()


def encode_overlay(overlay: Overlay) -> bytes:
    """Encode beliefs as an Arrow IPC file, compressed since rows repeat; equal beliefs give equal bytes."""
    soft = pa.nulls(len(overlay.rows), pa.float16()) if overlay.soft is None else pa.array(overlay.soft)
    arrays = [pa.array(column) for column in overlay[:-1]]
    columns = [*arrays[:3], soft, *arrays[3:]]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _SCHEMA, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
    return sink.getvalue().to_pybytes()


def decode_overlay(content: bytes, *, num_samples: int, num_classes: int, has_soft: bool, where: str) -> Overlay:
    """Decode and check the beliefs about a shard.

    Args:
        content: bytes of the file.
        num_samples, num_classes: size of the shard; an entry outside is refused.
        has_soft: whether every entry has a soft label; otherwise none may.
        where: the file's URL, for messages.

    Raises:
        CheckpointError: not Arrow, other columns, or entries out of order or range.
    """

    def wrong(found: str, expected: str) -> CheckpointError:
        return CheckpointError(
            found, expected=expected, where=storage.shown(where),
            next_step="restore the file, or take up an earlier round: `dist-mlpl labels rollback RUN`",
        )  # fmt: skip

    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise wrong(f"an overlay that does not read: {error}", "an Arrow IPC file") from error
    if table.schema != _SCHEMA:
        raise wrong(f"columns {table.schema.names}", f"columns {_SCHEMA.names}")
    num_empty = {name: table.column(name).null_count for name in table.schema.names}
    if num_empty.pop("soft") != (0 if has_soft else table.num_rows) or any(num_empty.values()):
        raise wrong("an empty cell", "a value in every cell, but in `soft` where the round has none")
    column = {name: table.column(name).to_numpy() for name in _SCHEMA.names if name != "soft" or has_soft}
    overlay = Overlay(
        column["row"], column["class"], column["value"], column["score"], column["source"], column.get("soft")
    )
    rows, classes = overlay.rows, overlay.classes
    if not (np.diff(overlay.codes) > 0).all():
        raise wrong("entries that do not rise", "row-major order, none twice")
    if len(rows) and not (rows[0] >= 0 and rows[-1] < num_samples and int(classes.max()) < num_classes):
        raise wrong("an entry outside the shard", f"rows in [0, {num_samples}), classes below {num_classes}")
    if not np.isin(overlay.values, CODES).all():
        raise wrong("a value that is no label", "-1, 0 or +1")
    if overlay.soft is not None and not ((overlay.soft >= 0) & (overlay.soft <= 1)).all():
        raise wrong("a soft label outside [0, 1]", "a probability")
    return overlay


def read_overlay(run: str, commit: RoundCommit, shard: int, *, num_samples: int, num_classes: int) -> Overlay:
    """Read the beliefs of a round about one shard; empty in a round without files.

    Args:
        run: URL of the run folder, RUN.
        commit: the round's commit.
        shard: number of the shard in the split, from 0.
        num_samples: samples of that shard.
        num_classes: C.

    Returns:
        k beliefs, those only proposed included; see `Overlay`.

    Raises:
        CheckpointError: the file is missing, damaged, or not the one that was committed.
        StorageError: it could not be read.
    """
    if not commit.files:
        return Overlay.empty(has_soft=commit.has_soft)
    file = commit.files[shard]
    where = storage.join(run, FOLDER, file.path)
    try:
        content = storage.read_bytes(where)
    except FileNotFoundError:
        content = b""
    if len(content) != file.num_bytes or storage.sha256_of_bytes(content) != file.sha256:
        raise CheckpointError(
            f"{file.path} of round {commit.round} is missing or damaged ({len(content)} bytes)",
            expected=f"{file.num_bytes} bytes of sha256 {file.sha256[:16]}...",
            where=storage.shown(where),
            next_step="restore the file, or take up an earlier round: `dist-mlpl labels rollback RUN`",
        )
    return decode_overlay(
        content, num_samples=num_samples, num_classes=num_classes, has_soft=commit.has_soft, where=where
    )
