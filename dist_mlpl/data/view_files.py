"""Owns the files of a view on disk: view.json, and one Arrow file per shard.

VIEW/view.json        how the view was drawn, and the digest of every file; written last
VIEW/INDEX.arrow      its changes to the shard whose index is INDEX.arrow: one row per label, in row-major order:
                      row int32, class uint16, and value int8 where the rule may replace labels; without that column
                      every listed label is hidden
"""

from __future__ import annotations

import json
import re
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError

from dist_mlpl import storage
from dist_mlpl.data.entries import Entries
from dist_mlpl.data.views import shard_digest, view_digest
from dist_mlpl.errors import ConfigError, ManifestError, ShardError
from dist_mlpl.labels import CODES, UNKNOWN
from dist_mlpl.settings import Settings

FORMAT = 1
FILE_NAME = "view.json"
FOLDER = "views"  # in the shards' folder

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_COLUMNS = (pa.field("row", pa.int32()), pa.field("class", pa.uint16()), pa.field("value", pa.int8()))


class ShardView(Settings):
    """A view's changes to one shard."""

    file: str = Field(pattern=r"^[\w-]+(\.[\w-]+)+$")
    num_hidden: int
    num_replaced: int
    digest: str  # `dist_mlpl.data.views.shard_digest` of its columns


class ViewDocument(Settings):
    """A view on disk: how and from what it was drawn, and its files.

    `url` (its folder) is set by `load_view` and is not part of the document.
    """

    format: Literal[1] = 1
    rule: str
    fraction: float | None  # share of known labels kept, as the rule defines it; None for rules without one
    seed: int
    flip_present: float | None  # probability that a present label becomes absent; None where the rule replaces none
    flip_absent: float | None
    split: str  # the one split that it changes
    num_samples: int
    num_known: int  # known labels before the view
    num_hidden: int
    num_replaced: int
    manifest_digest: str
    digest: str
    shards: tuple[ShardView, ...]  # in manifest order
    url: str = Field(default="", exclude=True)


class ViewFile(NamedTuple):
    """The content of one file of a view."""

    changes: Entries  # its values are what each label becomes
    has_values: bool  # whether the file has the column of values; without it, all values are 0 (hidden)
    num_known: int  # known labels of the shard before the view
    origin: str  # digest of what it was drawn from and how; an interrupted drawing resumes from files with its own

    @property
    def digest(self) -> str:
        """Digest of the columns; see `shard_digest`."""
        changes = self.changes
        return shard_digest(changes.rows, changes.classes, changes.values if self.has_values else None)


def view_url(manifest_url: str, view: str) -> str:
    """URL of a view's folder.

    Args:
        manifest_url: folder of the shards.
        view: a plain name, for a view in the shards' folder; or the URL of any other view, which contains a slash.

    Raises:
        ConfigError: neither.
    """
    if _NAME.fullmatch(view):
        return storage.join(manifest_url, FOLDER, view)
    if "/" not in view:
        raise ConfigError(
            f"view {view!r}",
            expected="a name of letters, digits, `.`, `_` and `-`, or a URL with a slash",
            where="the view's name",
            next_step="choose such a name",
        )
    return storage.absolute(view.removesuffix(f"/{FILE_NAME}"))


def load_view(url: str) -> ViewDocument:
    """Read and check view.json.

    Raises:
        ManifestError: missing, not of this format, or inconsistent.
        StorageError: it could not be read.
    """
    where = storage.join(url, FILE_NAME)

    def wrong(found: str, expected: str) -> ManifestError:
        return ManifestError(
            found, expected=expected, where=storage.shown(where), next_step="restore it, or remove it and draw it again"
        )

    try:
        content = storage.read_bytes(where)
    except FileNotFoundError as error:
        raise ManifestError(
            "no view",
            expected=f"{FILE_NAME}, which `dist-mlpl shards simulate` writes last",
            where=storage.shown(where),
            next_step="check data.view: the name of a view of these shards, or a URL with a slash; if drawing was "
            "interrupted, run it again",
        ) from error
    try:
        document = ViewDocument.model_validate(json.loads(content))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise wrong("; ".join(faults[:3]), f"a view of format {FORMAT}") from error
    except ValueError as error:
        raise wrong(f"not JSON: {error}", "a JSON object") from error
    digest = view_digest(shard.digest for shard in document.shards)
    if digest != document.digest:
        raise wrong(f"digest {document.digest}", f"{digest}, over its {len(document.shards)} shards")
    return document.model_copy(update={"url": url})


def write_view(document: ViewDocument, url: str) -> ViewDocument:
    """Write view.json; the caller has written every file that it lists.

    Returns:
        The document with its `url`.
    """
    content = (json.dumps(document.model_dump(mode="json"), indent=1) + "\n").encode()
    storage.write_bytes(storage.join(url, FILE_NAME), content)
    return document.model_copy(update={"url": url})


def encode_view_file(file: ViewFile) -> bytes:
    """Encode a file of a view as Arrow IPC, compressed since rows repeat."""
    columns = [pa.array(column) for column in file.changes][: 3 if file.has_values else 2]
    about = {"origin": file.origin, "digest": file.digest, "num_known": str(file.num_known)}
    schema = pa.schema(_COLUMNS[: len(columns)], metadata=about)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    return sink.getvalue().to_pybytes()


def decode_view_file(content: bytes, *, num_samples: int, num_classes: int, where: str) -> ViewFile:
    """Decode and check one file of a view.

    Args:
        content: bytes of the file.
        num_samples: samples of the shard; rows must be in [0, num_samples).
        num_classes: C; classes must be below it.
        where: the file's URL, for messages.

    Returns:
        The file, its changes in row-major order.

    Raises:
        ShardError: not Arrow, other columns, entries out of order or range, or a digest unlike that in its header.
    """

    def wrong(found: str, expected: str) -> ShardError:
        return ShardError(
            found,
            expected=expected,
            where=storage.shown(where),
            next_step="remove the view's view.json and draw it again: what is whole is kept",
        )

    try:
        table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise wrong(f"a view's file that does not read: {error}", "an Arrow IPC file") from error
    has_values = len(table.schema) == len(_COLUMNS)
    if list(table.schema) not in (list(_COLUMNS), list(_COLUMNS[:2])):
        raise wrong(f"columns {table.schema.names}", "row int32, class uint16, and value int8 or nothing")
    if any(column.null_count for column in table.columns):
        raise wrong("an empty cell", "a value in every cell")
    columns = [column.to_numpy() for column in table.columns]
    values = columns[2] if has_values else np.full(table.num_rows, UNKNOWN, dtype=np.int8)
    changes = Entries(columns[0], columns[1], values)
    if not (np.diff(changes.codes) > 0).all():
        raise wrong("entries that do not rise", "row-major order, none twice")
    rows, classes = changes.rows, changes.classes
    if len(rows) and not (rows[0] >= 0 and rows[-1] < num_samples and int(classes.max()) < num_classes):
        raise wrong("an entry outside the shard", f"rows in [0, {num_samples}), classes below {num_classes}")
    if not np.isin(values, CODES).all():
        raise wrong("a value that is no label", "-1, 0 or +1")
    about = {name.decode(): value.decode() for name, value in (table.schema.metadata or {}).items()}
    if not {"origin", "digest", "num_known"} <= set(about) or not about["num_known"].isdecimal():
        raise wrong(f"a header of {', '.join(about) or 'nothing'}", "origin, digest and num_known")
    file = ViewFile(changes, has_values, int(about["num_known"]), about["origin"])
    if about["digest"] != file.digest:
        raise wrong(f"digest {file.digest}", f"{about['digest']}, as its header says")
    return file
