"""Owns samples from tars without an index: webdataset's own reader over our storage, from front to back.

`dist-mlpl shards index` makes an index of the same tars in minutes; LIMITS lists what is impossible without one.
"""

from __future__ import annotations

import copy
import io
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from pydantic import Field
from webdataset import filters, tariterators

from dist_mlpl import storage
from dist_mlpl.data.manifest import ClassEntry, Manifest, SourceEntry, classes_digest
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.tar_members import (
    IMAGE_ENDINGS,
    LABEL_ENDINGS,
    MAX_PADDING_BYTES,
    class_columns,
    expand_tars,
    is_padding,
    missing_labels,
    read_classes,
    read_labels,
    refuse_compressed,
    split_name,
)
from dist_mlpl.environment import installed_version
from dist_mlpl.errors import ConfigError, DataError, MlplError, ShardError, nearest_names
from dist_mlpl.labels import Unlisted, dense_targets
from dist_mlpl.settings import Location, Settings

LIMITS: Final = (
    "tars without an index: `dist-mlpl shards index` lifts all that follows",
    "an epoch is data.unindexed.epoch_samples images, not each image once: a rank through with its tars deals anew",
    "a resume, or another number of ranks, begins new tars from a fresh permutation: no exactly-once across it",
    "samples mix within data.unindexed.shuffle_buffer of one rank's tars, so tars sorted by class stay sorted by class",
    "nothing is cached: data.cache_bytes, num_lanes and window_samples do nothing",
    "no views, no overlays, no memory of single samples, no audit: an image's index is its place in the epoch",
    "a tar with a damaged header in its last 10 kB looks like a shorter tar",
)


class TarSettings(Settings):
    """Tars that are read without an index."""

    tars: dict[str, Location]  # by split: a folder or a pattern like s3://b/train-{000000..000099}.tar
    classes: Location  # CSV whose first column lists the class ids in order
    epoch_samples: int = Field(ge=1)  # images in an epoch, over all ranks
    shuffle_buffer: int = Field(1000, ge=1)  # encoded images in each rank's shuffle buffer
    unlisted: Unlisted | None = None  # meaning of a class that a sample does not list; null: absent, negatives refused


@dataclass(frozen=True)
class TarSet:
    """The tars of one split; the counterpart of `SplitIndex` for tars without an index.

    Args:
        split: name of the split.
        urls: URLs of its tars, in the order of the pattern.
        manifest: made in memory, with classes and no shards. Its digest covers the classes, the tars' names and
            `unlisted`, since the contents of the tars are unknown.
        settings: from the config.
    """

    split: str
    urls: tuple[str, ...]
    manifest: Manifest
    settings: TarSettings

    @property
    def num_samples(self) -> int:
        """Images in an epoch, N; the number of images in the tars is unknown."""
        return self.settings.epoch_samples

    @property
    def epoch_samples(self) -> int:
        """Samples in a training epoch, N."""
        return self.num_samples

    @property
    def parts(self) -> None:
        """Always None: tars without an index cannot be mixed."""
        return None

    @property
    def shard_sizes(self) -> list[int]:
        """One shard of N samples: an order over it deals positions in the epoch to ranks, not samples."""
        return [self.num_samples]

    def targets(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        """Refuse to give labels by index, which only `SplitIndex` can.

        Raises:
            DataError: always.
        """
        raise DataError(
            "labels asked for by index", expected="tars with an index: without one, labels come with the images",
            where="data.unindexed", next_step="run `dist-mlpl shards index` and set data.manifest to what it wrote",
        )  # fmt: skip


AnySamples = SplitIndex | TarSet  # one split, with an index or without


def open_tars(settings: TarSettings, split: str) -> TarSet:
    """Find the tars of a split and read the list of classes; no tar is opened.

    Raises:
        ConfigError: no such split.
        DataError: no tar, or classes that do not read.
        StorageError: the storage failed.
    """
    if split not in settings.tars:
        raise ConfigError(
            f"no split named {split!r}", expected=nearest_names(split, settings.tars), where="data.unindexed.tars",
            next_step="correct the split's name, or name its tars",
        )  # fmt: skip
    urls = tuple(expand_tars(settings.tars[split]))
    classes = tuple(ClassEntry(id=name, name=name) for name in read_classes(settings.classes))
    manifest = Manifest(
        version=installed_version("dist-mlpl"),
        classes=classes,
        classes_sha256=classes_digest(classes),
        unlisted=settings.unlisted or "absent",
        splits={},
        source=SourceEntry(name="tars without an index", arguments={}, digest=""),
        packing=None,
        url=settings.classes,
    )
    names = tuple(storage.name(url) for url in urls)
    digest = storage.sha256_of_bytes(repr((names, manifest.class_ids, settings.unlisted)).encode())
    return TarSet(split, urls, manifest.model_copy(update={"digest": digest}), settings)


def check_num_tars(tars: TarSet, *, world_size: int) -> None:
    """Refuse to train when some rank would have no tar to read.

    Raises:
        ConfigError: fewer tars than ranks.
    """
    if len(tars.urls) < world_size:
        raise ConfigError(
            f"{len(tars.urls)} tars for {world_size} ranks", expected="a tar for each rank at least",
            where="data.unindexed.tars",
            next_step="use fewer ranks, or run `dist-mlpl shards index`: then ranks share the tars by sample",
        )  # fmt: skip


class TarSample(NamedTuple):
    """One sample as stored in its tar."""

    name: str  # `tar: key`
    image: bytes
    targets: npt.NDArray[np.int8]  # (C,): -1 absent, 0 unknown, +1 present


def read_tar(url: str, tars: TarSet, ignored: Counter[str]) -> Iterator[TarSample]:
    """Every sample of one tar in tar order, read once from front to back.

    Args:
        url: URL of the tar.
        tars: gives the classes and the meaning of unlisted ones.
        ignored: counter of members that belong to no sample, by kind; this call adds to it.

    Raises:
        ShardError: not a tar, compressed, truncated, damaged, without a JPEG, or a sample with two images or with two
            members of one name.
        DataError: an image without labels, unreadable labels, an unknown class, or negatives while
            `data.unindexed.unlisted` is null.
        StorageError: the tar is missing, or the storage failed.
    """
    place, num_samples = storage.shown(url), 0
    columns = {name: column for column, name in enumerate(tars.manifest.class_ids)}

    def is_wanted(member: str) -> bool:
        name = split_name(member)
        if name is None or name[1] not in IMAGE_ENDINGS + LABEL_ENDINGS:
            ignored["other member"] += 1
            return False
        return True

    try:
        with cast(io.BufferedReader, storage.open_read(url)) as stream:
            refuse_compressed(stream.peek(8)[:8], place)
            _check_end(url, place)
            files = tariterators.tar_file_expander(iter([{"url": url, "stream": stream}]), select_files=is_wanted)
            for members in tariterators.group_by_keys(files):
                found = _sample(members, columns, tars, f"{place}: {members['__key__']}")
                if found is None:
                    ignored["labels without a JPEG"] += 1
                    continue
                num_samples += 1
                yield found
            is_whole = is_padding(stream.read(MAX_PADDING_BYTES + 1))
    except FileNotFoundError as error:
        raise storage.missing(url, what="the tar", next_step="correct the pattern, or restore the tar") from error
    except MlplError as error:
        raise copy.copy(error) from error  # webdataset appends to the arguments of errors that pass through it
    except (tarfile.TarError, ValueError) as error:
        raise _fault(f"a tar that does not read: {str(error.args[0]).split(' @ ')[0]}", place) from error
    if not is_whole:
        raise _fault("a damaged header: the tar does not end where it seems to", place)
    if not num_samples:
        raise _fault("no JPEG inside", place)


def _check_end(url: str, place: str) -> None:
    """Refuse a truncated tar, which a front-to-back reader would take for a shorter one."""
    num_bytes = storage.size(url)
    end = storage.read_bytes(url, max(0, num_bytes - tarfile.BLOCKSIZE), num_bytes)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise _fault(f"{num_bytes:,} bytes without the end mark of a tar", place)


def _sample(members: dict[str, bytes], columns: dict[str, int], tars: TarSet, where: str) -> TarSample | None:
    images = [members[ending] for ending in IMAGE_ENDINGS if ending in members]
    if not images:
        return None
    if len(images) > 1:
        raise _fault("two images of one key", where)
    found = (read_labels(ending, members[ending], where) for ending in LABEL_ENDINGS if ending in members)
    labels = next((one for one in found if one is not None), None)
    if labels is None:
        raise missing_labels(where)
    if labels.negatives and tars.settings.unlisted is None:
        raise DataError(
            "a sample that lists negatives", expected="to be told what a class in neither list means", where=where,
            next_step="set data.unindexed.unlisted to unknown (usual where negatives are listed) or to absent",
        )  # fmt: skip
    sides = [[np.array(side, dtype=np.int64)] for side in class_columns(labels, columns, where)]
    targets = dense_targets(*sides, num_classes=len(columns), unlisted=tars.manifest.unlisted)
    return TarSample(where, images[0], targets[0])


def _fault(found: str, where: str) -> ShardError:
    return ShardError(
        found, expected="a whole plain tar with members KEY.jpg and their labels", where=where,
        next_step="fetch or write the tar again, or leave it out of the pattern",
    )  # fmt: skip


def mixed(samples: Iterator[TarSample], *, shuffle_buffer: int, key: int) -> Iterator[TarSample]:
    """Shuffle samples through a buffer.

    Args:
        samples: finite or not.
        shuffle_buffer: size of the buffer in samples, at least 1; 1 keeps the order.
        key: key of the random draws.
    """
    shuffle = filters.shuffle(shuffle_buffer, initial=shuffle_buffer, rng=random.Random(key))
    yield from shuffle(samples)
