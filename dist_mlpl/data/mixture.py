"""Owns how several packed sets are mixed into one: their shards concatenated under one class list, a weight per set."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from dist_mlpl import storage
from dist_mlpl.data.manifest import Manifest, Split, load_manifest
from dist_mlpl.errors import ManifestError
from dist_mlpl.settings import Location, Settings


class MixedSet(Settings):
    """One set of a mixture."""

    manifest: Location  # folder or URL of its shards
    weight: float = Field(1.0, gt=0.0)  # how often an epoch gives each of its samples; see `order.epoch_length`


def load_sets(sets: str | Sequence[MixedSet]) -> Manifest:
    """Read what `data.manifest` names: one manifest, or several mixed into one; see `load_mixture`."""
    return load_manifest(sets) if isinstance(sets, str) else load_mixture(sets)


def load_mixture(sets: Sequence[MixedSet]) -> Manifest:
    """Read several manifests and mix them into one.

    Samples are addressed over the shards of the first set, then those of the second, and so on. A set that lacks a
    split adds nothing to it. Weights apply to training only, not to evaluation.

    Returns:
        A manifest in memory. Its digest covers the sets' digests and weights.

    Raises:
        ManifestError: the sets differ in their classes or in what an unlisted class means.
    """
    manifests = [load_manifest(one.manifest) for one in sets]
    first = manifests[0]
    for other in manifests[1:]:
        for name in ("classes_sha256", "unlisted"):
            if getattr(other, name) != getattr(first, name):
                raise ManifestError(
                    f"{name} {getattr(other, name)}",
                    expected=f"{getattr(first, name)}, as in {first.place}",
                    where=other.place,
                    next_step="pack the sets with one class list (`--mapping` renames, `--order` orders), or "
                    "train on one of them",
                )
    splits: dict[str, Split] = {}
    parts: dict[str, tuple[tuple[int, float], ...]] = {}
    for name in dict.fromkeys(split for manifest in manifests for split in manifest.splits):
        own = [
            [
                entry.model_copy(update={"folder": manifest.url, "tars": manifest.tars_url})
                for entry in (manifest.splits[name].shards if name in manifest.splits else ())
            ]
            for manifest in manifests
        ]
        splits[name] = Split.of([entry for entries in own for entry in entries])
        parts[name] = tuple((len(entries), one.weight) for entries, one in zip(own, sets, strict=True) if entries)
    are_decoded = all(manifest.packing is not None and manifest.packing.decode for manifest in manifests)
    identity = repr([(manifest.digest, one.weight) for manifest, one in zip(manifests, sets, strict=True)])
    return first.model_copy(
        update={
            "splits": splits,
            "parts": parts,
            "packing": first.packing if are_decoded else None,  # only claim decoded images if it holds for all sets
            "url": ", ".join(manifest.url for manifest in manifests),
            "digest": storage.sha256_of_bytes(identity.encode()),
        }
    )
