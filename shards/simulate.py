"""Owns drawing views on disk: shard by shard, in bounded memory, resuming where an interrupted drawing stopped."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np

from dist_mlpl import storage
from dist_mlpl.data.entries import Entries, known_entries
from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.view_files import (
    FILE_NAME,
    ShardView,
    ViewDocument,
    ViewFile,
    decode_view_file,
    encode_view_file,
    load_view,
    view_url,
    write_view,
)
from dist_mlpl.data.views import view_digest
from dist_mlpl.errors import ManifestError, ShardError
from dist_mlpl.labels import UNKNOWN
from shards.pack import OnProgress
from shards.view_rules import RULES, Draw, Recipe, draw_of, make_recipe

T = TypeVar("T")

_SHARDS_AT_ONCE = 8  # shards in memory at once; each takes about 30 bytes per known label


@dataclass(frozen=True, slots=True)
class SimulateSummary:
    """The result of drawing a view.

    Args:
        view: as written, with its `url`.
        num_reused: number of shards with intact files that had been drawn by the same rule from the same labels.
        was_complete: True when the whole view existed and nothing was written.
    """

    view: ViewDocument
    num_reused: int
    was_complete: bool


def simulate(
    url: str,
    *,
    name: str,
    rule: str,
    fraction: float | None = None,
    seed: int | None = None,
    flip_present: float | None = None,
    flip_absent: float | None = None,
    split: str = "train",
    on_progress: OnProgress | None = None,
) -> SimulateSummary:
    """Draw a partial, noisy or web-like labelling of a packed split and write it as a view; see `shards.view_rules`.

    Labels in the shards do not change. The view's digest equals that of `dist_mlpl.data.views.View` for the rules that
    it has. Memory: eight shards' labels, and what the rule itself needs (see `draw_of`).

    Args:
        url: folder of the shards.
        name: name of the view, kept in the shards' folder under `views/`; or a URL with a slash, to keep it elsewhere.
        rule: how labels are hidden or replaced, a name in `RULES`.
        fraction: share of known labels that stay, in (0, 1], for the rules that take one.
        seed: seed of the draws; None for the rule's customary one.
        flip_present, flip_absent: probabilities in [0, 1], for rule `noisy`.
        split: split whose labels are changed.
        on_progress: called after each shard.

    Raises:
        ConfigError: an unknown rule, a value that does not fit it, or a set too large for it.
        ManifestError: no such set or split, or another view of that name.
        ShardError: an index is damaged.
        StorageError: reading or writing failed.
    """
    recipe = make_recipe(rule, fraction=fraction, seed=seed, flip_present=flip_present, flip_absent=flip_absent)
    manifest = load_manifest(url)
    index = SplitIndex(manifest, split)
    where = view_url(manifest.url, name)
    existing = _existing(where, recipe, index)
    settled = _reusable(where, recipe, index)
    num_reused = len(settled)
    if missing := [shard for shard in range(len(index.shards)) if shard not in settled]:
        settled |= _draw_missing(where, recipe, index, missing, on_progress or (lambda *_: None))
    if existing is not None and not missing:
        return SimulateSummary(existing, num_reused=num_reused, was_complete=True)
    document = _document(recipe, index, [settled[shard] for shard in range(len(index.shards))])
    return SimulateSummary(write_view(document, where), num_reused=num_reused, was_complete=False)


class _Settled(NamedTuple):
    """A shard whose file has been written."""

    entry: ShardView
    num_known: int


def _existing(where: str, recipe: Recipe, index: SplitIndex) -> ViewDocument | None:
    """The view already at that place; None without one.

    Raises:
        ManifestError: it was drawn differently or from other labels, or is damaged.
    """
    if not storage.exists(storage.join(where, FILE_NAME)):
        return None
    view = load_view(where)
    found = Recipe(*(getattr(view, name) for name in Recipe._fields))
    if (found, view.split, view.manifest_digest) != (recipe, index.split, index.manifest.digest):
        raise ManifestError(
            f"another view: {_described(found)}, of split {view.split} of manifest {view.manifest_digest[:16]}...",
            expected=f"none, or that of {_described(recipe)}, of split {index.split} of "
            f"{index.manifest.digest[:16]}...",
            where=storage.shown(storage.join(where, FILE_NAME)),
            next_step="choose another name: runs may depend on a view that is there",
        )
    return view


def _described(recipe: Recipe) -> str:
    return ", ".join(f"{name} {value}" for name, value in recipe._asdict().items() if value is not None)


def _origin(recipe: Recipe, index: SplitIndex, shard: int) -> str:
    """Digest of everything that a shard's file depends on."""
    manifest = index.manifest
    parts = [list(recipe), manifest.classes_sha256, manifest.unlisted, index.shards[shard].index_sha256]
    if not RULES[recipe.rule].is_keyed:  # such a rule depends on all other shards too
        parts += [manifest.digest, index.split]
    return storage.sha256_of_bytes(json.dumps(parts).encode())


def _reusable(where: str, recipe: Recipe, index: SplitIndex) -> dict[int, _Settled]:
    """Shards with intact files that were drawn by the same recipe from the same labels."""
    there = set(storage.list_names(where))

    def look(shard: int) -> tuple[int, _Settled | None]:
        entry = index.shards[shard]
        url = storage.join(where, entry.index)
        try:
            content = storage.read_bytes(url)
            num_classes = index.manifest.num_classes
            file = decode_view_file(content, num_samples=entry.num_samples, num_classes=num_classes, where=url)
        except (FileNotFoundError, ShardError):
            return shard, None  # draw it again
        return shard, _settled(entry.index, file) if file.origin == _origin(recipe, index, shard) else None

    wanted = (shard for shard, entry in enumerate(index.shards) if entry.index in there)
    return {shard: settled for shard, settled in _threaded(look, wanted) if settled is not None}


def _draw_missing(
    where: str, recipe: Recipe, index: SplitIndex, missing: Sequence[int], tell: OnProgress
) -> dict[int, _Settled]:
    """Draw and write the files of some shards."""
    draw = draw_of(recipe, index)
    total, done = sum(index.shards[shard].num_samples for shard in missing), 0
    settled = {}

    def settle(shard: int) -> tuple[int, _Settled]:
        return shard, _draw_shard(where, recipe, index, shard, draw)

    for shard, found in _threaded(settle, missing):
        settled[shard] = found
        done += index.shards[shard].num_samples
        tell("drawing", done, total)
    return settled


def _draw_shard(where: str, recipe: Recipe, index: SplitIndex, shard: int, draw: Draw) -> _Settled:
    table, manifest = index.shard_index(shard), index.manifest
    changed, num_known = [], 0
    for known in known_entries(table, num_classes=manifest.num_classes, unlisted=manifest.unlisted):
        if len(known.rows):
            become = draw(int(index.starts[shard]), table, known)
            changed.append(known._replace(values=become).where(become != known.values))
            num_known += len(known.rows)
    replaces = RULES[recipe.rule].replaces
    file = ViewFile(Entries.join(changed), replaces, num_known, _origin(recipe, index, shard))
    name = index.shards[shard].index
    storage.write_bytes(storage.join(where, name), encode_view_file(file))
    return _settled(name, file)


def _settled(name: str, file: ViewFile) -> _Settled:
    num_hidden = int(np.count_nonzero(file.changes.values == UNKNOWN))
    num_replaced = len(file.changes.rows) - num_hidden
    entry = ShardView(file=name, num_hidden=num_hidden, num_replaced=num_replaced, digest=file.digest)
    return _Settled(entry, file.num_known)


def _document(recipe: Recipe, index: SplitIndex, settled: Sequence[_Settled]) -> ViewDocument:
    shards = tuple(part.entry for part in settled)
    return ViewDocument(
        **recipe._asdict(),
        split=index.split,
        num_samples=index.num_samples,
        num_known=sum(part.num_known for part in settled),
        num_hidden=sum(shard.num_hidden for shard in shards),
        num_replaced=sum(shard.num_replaced for shard in shards),
        manifest_digest=index.manifest.digest,
        digest=view_digest(shard.digest for shard in shards),
        shards=shards,
    )


def _threaded(task: Callable[[int], T], shards: Iterable[int]) -> Iterator[T]:
    """Run a task on shards in threads; results are in order, and few shards are in memory at once."""
    with ThreadPoolExecutor(_SHARDS_AT_ONCE, "view") as pool:
        rest = iter(shards)
        jobs = deque(pool.submit(task, shard) for shard in islice(rest, 2 * _SHARDS_AT_ONCE))
        while jobs:
            yield jobs.popleft().result()
            jobs.extend(pool.submit(task, shard) for shard in islice(rest, 1))
