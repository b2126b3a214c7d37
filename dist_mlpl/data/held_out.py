"""Owns the part of a train split that a run holds out, so that choices are made without reading the test split.

Whole shards are held out (the sharding tool fills them in random order), so reading works as usual, and the part is
the same in every run over the set, whatever its seed.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from dist_mlpl import keyed, storage
from dist_mlpl.data.manifest import Manifest, Split, load_manifest
from dist_mlpl.data.mixture import load_sets
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stream import DataSettings
from dist_mlpl.data.views import LabelView
from dist_mlpl.errors import ConfigError
from dist_mlpl.labels import Targets

HELD_OUT: Final = "held_out"  # name of the held-out split
_MOST_OFF = 0.1  # relative deviation allowed from the fraction asked for


def run_manifest(data: DataSettings, url: str | None = None) -> Manifest:
    """The packed sets as a run sees them: with `data.held_out_fraction`, the held-out part is a split of its own.

    Args:
        data: `data` section of the run's config.
        url: where its shards are now, if they moved.

    Raises:
        ManifestError: no packed set at that place.
        ConfigError: see `hold_out`.
    """
    manifest = load_sets(url or data.manifest)
    if data.held_out_fraction is None or data.train_split not in manifest.splits:
        return manifest
    return hold_out(manifest, data.train_split, data.held_out_fraction)


def hold_out(manifest: Manifest, split: str, fraction: float) -> Manifest:
    """Move the first shards of a fixed permutation out of a split, as many as come nearest to the fraction.

    Args:
        manifest: a single set's manifest, not a mixture.
        split: name of the split to take from.
        fraction: share of its samples to hold out, in (0, 1).

    Returns:
        A manifest in memory with the remaining shards as `split` and the others as `held_out`, each in manifest order.
        Its digest covers the set's digest and the held-out files.

    Raises:
        ConfigError: whole shards cannot come within a tenth of the fraction or would take the whole split, or a split
            named `held_out` exists already.
    """
    shards = manifest.split(split).shards
    if HELD_OUT in manifest.splits:
        raise _refused(
            manifest, f"a split named {HELD_OUT!r}", "a set without one", "name it in data.eval_split as it is"
        )
    sizes = np.array(manifest.shard_sizes(split), dtype=np.int64)
    order = keyed.permutation(keyed.key("held out", split), len(shards))
    ends, wanted = np.cumsum(sizes[order]), fraction * float(sizes.sum())
    count = 1 + int(np.abs(ends - wanted).argmin())
    if abs(ends[count - 1] - wanted) > _MOST_OFF * wanted or count == len(shards):
        raise _refused(
            manifest,
            f"{len(shards)} shards of {split!r}: the nearest to {wanted:,.0f} samples that whole ones hold is "
            f"{ends[count - 1]:,}",
            f"shards small enough to hold out {fraction:g} of the samples",
            "build the set with a smaller --target-shard-bytes, or choose another fraction",
        )
    is_held = np.isin(np.arange(len(shards)), order[:count])
    kept, held = (Split.of(shards[place] for place in np.flatnonzero(is_held == side)) for side in (False, True))
    identity = repr([manifest.digest, split, [shard.file for shard in held.shards]])
    return manifest.model_copy(
        update={
            "splits": {**manifest.splits, split: kept, HELD_OUT: held},
            "digest": storage.sha256_of_bytes(identity.encode()),
        }
    )


def _refused(manifest: Manifest, found: str, expected: str, next_step: str) -> ConfigError:
    where = f"data.held_out_fraction, {storage.shown(manifest.url)}"
    return ConfigError(found, expected=expected, where=where, next_step=next_step)


def whole_split(part: SplitIndex) -> SplitIndex:
    """The whole packed split that a part was taken from.

    Raises:
        ManifestError: the manifest or the split is no longer there.
    """
    return SplitIndex(load_manifest(part.manifest.url), part.split)


class PartView:
    """A view of a whole split, addressed by the samples of a part: a label hidden in one is hidden in the other.

    Args:
        view: the view of the whole split.
        whole: the split as packed.
        part: a split of some of its shards.
    """

    def __init__(self, view: LabelView, whole: SplitIndex, part: SplitIndex) -> None:
        self._view, self._part = view, part
        starts = {shard.file: start for shard, start in zip(whole.shards, whole.starts[:-1].tolist(), strict=True)}
        own = np.array([starts[shard.file] for shard in part.shards], dtype=np.int64)
        self._offsets = own - part.starts[:-1]  # (S,) per shard, added to an index in the part gives that in the whole
        self.digest = storage.sha256_of_bytes(f"{view.digest} of {part.manifest.digest}".encode())

    def hidden(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which entries of the part's samples `indices` (n,) are known and hidden, (n, C) bool."""
        return self._view.hidden(self._in_whole(indices))

    def apply(self, targets: Targets, indices: npt.NDArray[np.int64]) -> Targets:
        """Human labels (n, C) of the part's samples `indices` (n,) as the view shows them: (n, C) int8, a new array."""
        return self._view.apply(targets, self._in_whole(indices))

    def _in_whole(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return indices + self._offsets[self._part.shard_of(indices)]
