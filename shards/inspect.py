"""Owns inspecting images with their labels: a contact sheet, as a PNG or an HTML page."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import numpy as np

from dist_mlpl import storage
from dist_mlpl.data.manifest import Manifest, load_manifest
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stored_view import StoredView
from dist_mlpl.data.view_files import view_url
from dist_mlpl.errors import ConfigError, DataError, nearest_names
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN, Targets
from shards.sample import Indices, choose, every, read_images
from shards.sheet import COLOURS, FAINT, INK, Cell, Label, Title, draw_sheet, sheet_page, thumbnail

MAX_IMAGES = 400  # most images on a sheet
ENDINGS = (".png", ".html")


@dataclass(frozen=True, slots=True)
class SheetSummary:
    """A summary of the sheet drawn.

    Args:
        out: path or URL of the sheet.
        num_shown: number of images on it.
        num_unreadable: number of these that do not decode.
        size: width and height of the PNG in pixels; (0, 0) for a page.
    """

    out: str
    num_shown: int
    num_unreadable: int
    size: tuple[int, int]


def inspect(
    url: str,
    *,
    out: str,
    sample: int = 24,
    split: str | None = None,
    class_id: str | None = None,
    is_absent: bool = False,
    known_only: bool = False,
    view: str | None = None,
    seed: int = 0,
) -> SheetSummary:
    """Draw a sheet of some images and their labels: present ones green, absent ones red, machine labels violet.

    Unknown labels are left out; so are absent ones where every unlisted class is absent. The choice of images depends
    only on seed, split and the conditions. Images are shown as stored, as training sees them.

    Args:
        url: folder of the shards.
        out: path or URL ending in .png or .html.
        sample: number of images, 1 to MAX_IMAGES.
        split: split of the set; None for `train`, or the first split if there is no `train`.
        class_id: only images in which this class is present; an id, or a name that no other class has.
        is_absent: with `class_id`, only images in which it is known to be absent instead.
        known_only: only images with a known label.
        view: name or URL of a view on disk to see labels through.
        seed: seed of the choice.

    Raises:
        ConfigError: an argument out of range, or no such class.
        DataError: no image meets the conditions.
        ManifestError, ShardError, StorageError: the set or view is missing or damaged, or the sheet cannot be written.
    """
    _check_arguments(out, sample, class_id, is_absent)
    manifest = load_manifest(url)
    name = split or ("train" if "train" in manifest.splits else next(iter(manifest.splits)))
    index = SplitIndex(manifest, name)
    through = None if view is None else StoredView(view_url(manifest.url, view), index)
    column = None if class_id is None else _column(manifest, class_id)
    if column is None and not known_only:
        candidates = every(index.num_samples)
    else:
        candidates = _matching(index, through, column, ABSENT if is_absent else PRESENT)
    chosen = choose(candidates, sample, seed=seed, split=name)
    if not len(chosen):
        raise DataError(
            "no such image",
            expected="at least one",
            where=f"split {name!r} of {storage.shown(manifest.url)}",
            next_step="ask for another split or class, or leave out --known-only or the view",
        )
    cells = list(_cells(index, through, chosen, column))
    title = _title(index, len(cells), column, is_absent, view)
    return _write(out, title, cells)


def _check_arguments(out: str, sample: int, class_id: str | None, is_absent: bool) -> None:
    def wrong(found: str, expected: str, option: str) -> ConfigError:
        return ConfigError(found, expected=expected, where=option, next_step="correct the option")

    if not out.endswith(ENDINGS):
        raise wrong(f"a sheet {out!r}", "a name ending in .png or .html", "--out")
    if not 1 <= sample <= MAX_IMAGES:
        raise wrong(f"sample {sample}", f"1 to {MAX_IMAGES} images", "--sample")
    if is_absent and class_id is None:
        raise wrong("--absent without a class", "--class ID beside it", "--absent")


def _column(manifest: Manifest, class_id: str) -> int:
    """Column of a class by its id, or by its name if it is unique."""
    ids = list(manifest.class_ids)
    if class_id in ids:
        return ids.index(class_id)
    columns = [column for column, entry in enumerate(manifest.classes) if entry.name == class_id]
    if len(columns) == 1:
        return columns[0]
    if columns:
        found, expected = f"the name {class_id!r} of {len(columns)} classes", ", ".join(ids[c] for c in columns[:5])
    else:
        known = {*ids, *(entry.name for entry in manifest.classes)}
        found, expected = f"no class {class_id!r}", nearest_names(class_id, known)
    raise ConfigError(found, expected=expected, where="--class", next_step="name a class by its id")


def _matching(index: SplitIndex, view: StoredView | None, column: int | None, value: int) -> Iterator[Indices]:
    """Samples whose label of a class has a value; without a class, those with any known label. Yields parts."""
    manifest, step = index.manifest, max(1, (1 << 22) // index.manifest.num_classes)
    for shard, table in enumerate(index.shard_indexes()):
        for first in range(0, table.num_samples, step):
            rows = np.arange(first, min(first + step, table.num_samples))
            if column is not None and view is None and not (manifest.unlisted == "absent" and value == ABSENT):
                lists = table.positives if value == PRESENT else table.negatives
                places, classes = lists.entries(rows)
                some = rows[np.unique(places[classes == column])]
            else:
                targets = _targets(index, view, rows + index.starts[shard])
                some = rows[(targets != UNKNOWN).any(axis=1) if column is None else targets[:, column] == value]
            yield some + index.starts[shard]


def _targets(index: SplitIndex, view: StoredView | None, indices: Indices) -> Targets:
    targets = index.targets(indices)
    return targets if view is None else view.apply(targets, indices)


def _cells(index: SplitIndex, view: StoredView | None, chosen: Indices, column: int | None) -> Iterator[Cell]:
    """The images in order with their labels by name, the requested class first."""
    manifest = index.manifest
    shows_absent = _shows_absent(manifest, view is not None)
    for sample, content in zip(chosen, read_images(index, chosen), strict=True):
        ((shard, row),) = index.rows(chosen[chosen == sample])
        table = index.shard_index(shard)
        targets = _targets(index, view, np.array([sample]))[0]
        columns = [*np.flatnonzero(targets == PRESENT)]
        columns += [c for c in np.flatnonzero(targets == ABSENT) if shows_absent or c == column]
        columns.sort(key=lambda c: c != column)
        labels = [Label(manifest.classes[c].name, int(targets[c])) for c in columns]
        machine, confidences = table.machine_of(row)
        labels += [
            Label(manifest.classes[c].name, UNKNOWN, f"{confidence:.2f}")
            for c, confidence in zip(machine.tolist(), confidences.tolist(), strict=True)
        ]
        yield Cell(unquote(table.keys[row].as_py()), thumbnail(content), labels)


def _shows_absent(manifest: Manifest, has_view: bool) -> bool:
    """Whether to show absent labels: they were verified, or a view has made other labels unknown."""
    return manifest.unlisted == "unknown" or has_view


def _title(index: SplitIndex, num_shown: int, column: int | None, is_absent: bool, view: str | None) -> Title:
    manifest = index.manifest
    words = f"{storage.name(manifest.url.rstrip('/'))}, {index.split} ({index.num_samples:,} images): {num_shown} shown"
    if column is not None:
        words += f" with {manifest.classes[column].name} {'absent' if is_absent else 'present'}"
    if view is not None:
        words += f", seen through {view}"
    parts = [(words, INK), ("present", COLOURS[PRESENT])]
    if _shows_absent(manifest, view is not None):
        parts.append(("absent", COLOURS[ABSENT]))
    else:
        parts.append(("all others are absent", FAINT))
    if index.shard_index(0).machine is not None:
        parts.append(("present by a machine's guess", COLOURS[UNKNOWN]))
    return parts


def _write(out: str, title: Title, cells: Sequence[Cell]) -> SheetSummary:
    size = (0, 0)
    if out.endswith(".png"):
        sheet = draw_sheet(title, cells)
        size, target = sheet.size, io.BytesIO()
        sheet.save(target, "PNG")
        content = target.getvalue()
    else:
        content = sheet_page(title, cells).encode()
    url = storage.absolute(out)
    storage.write_bytes(url, content)
    return SheetSummary(url, len(cells), sum(cell.picture is None for cell in cells), size)
