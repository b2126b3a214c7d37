"""Owns building the parts of a run from its config: samples, view, cache, stream, method.

Training, evaluation, relabelling jobs and pictures all build theirs here, so that they see the same data.
"""

from __future__ import annotations

import torch

from dist_mlpl import keyed
from dist_mlpl.config import Config
from dist_mlpl.data.cache import ExtentCache, cache_folder
from dist_mlpl.data.fetch import Fetcher, check_cache_limit
from dist_mlpl.data.held_out import PartView, run_manifest, whole_split
from dist_mlpl.data.manifest import Manifest
from dist_mlpl.data.order import EpochOrder
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stored_view import StoredView
from dist_mlpl.data.stream import DataSettings, Stream
from dist_mlpl.data.tar_stream import AnyStream, TarStream
from dist_mlpl.data.tars import AnySamples, TarSet, open_tars
from dist_mlpl.data.transform import Transform
from dist_mlpl.data.view_files import view_url
from dist_mlpl.data.views import LabelView, View
from dist_mlpl.engine import Engine
from dist_mlpl.errors import ConfigError
from dist_mlpl.methods.base import Method
from dist_mlpl.world import World


def open_samples(data: DataSettings, *splits: str) -> list[AnySamples]:
    """Open the samples of some splits, in the order named, by their index or as tars without one.

    Raises:
        MlplError: no such split, no manifest or no tars.
    """
    if data.unindexed is not None:
        return [open_tars(data.unindexed, split) for split in splits]
    manifest = run_manifest(data)
    return [SplitIndex(manifest, split) for split in splits]


def build_method(config: Config, manifest: Manifest) -> Method:
    """The run's method; its random weights are drawn under the run's seed."""
    torch.manual_seed(keyed.torch_seed("weights", config.seed))
    return config.method.build(num_classes=manifest.num_classes, image_size=config.transform.size)


def build_view(data: DataSettings, index: AnySamples) -> LabelView | None:
    """The view through which train labels are seen; None if all labels are visible.

    Raises:
        MlplError: a view on disk is missing or belongs to other shards, or the whole split of a held-out part is gone.
    """
    if isinstance(index, TarSet):
        return None
    if data.held_out_fraction is not None:  # drawn over the whole split, so that each sample keeps its labels
        whole = whole_split(index)
        view = build_view(data.model_copy(update={"held_out_fraction": None}), whole)
        return None if view is None else PartView(view, whole, index)
    if data.view is not None:
        return StoredView(view_url(index.manifest.url, data.view), index)
    if not data.is_view_asked:
        return None
    return View(
        data.known_rule,
        data.known_fraction,
        data.known_seed,
        shard_sizes=index.shard_sizes,
        source_rows=index.source_rows(),
        targets_of=index.targets_between,
        num_classes=index.manifest.num_classes,
    )


def build_cache(data: DataSettings, index: AnySamples, world: World) -> ExtentCache | None:
    """This node's cache of remote shards; None for local shards, tars without an index, or `data.cache_bytes` 0.

    Raises:
        ConfigError: no permission to write the cache folder.
    """
    if isinstance(index, TarSet) or data.cache_bytes == 0 or not index.is_remote:
        return None
    return ExtentCache(limit_bytes=data.cache_bytes, num_processes=world.local_size)


def check_cache(config: Config, index: SplitIndex, world: World, *, is_shrunk: bool = False) -> tuple[list[str], bool]:
    """Check data.cache_bytes against what the ranks of this node read at once.

    Args:
        config: the run's config.
        index: the split.
        world: this rank.
        is_shrunk: the run goes on with fewer ranks, of which each reads more lanes. A cache that is too small for that
            is then left out, so that lost nodes make a run slower and do not end it.

    Returns:
        Lines for the user: what this node's cache needs, and what would keep the whole split; none for local shards.
        And whether the cache is to be used.

    Raises:
        ConfigError: data.cache_bytes is too small.
    """
    data = config.data
    if not index.is_remote:
        return [], False
    if data.cache_bytes == 0:
        return ["no cache (data.cache_bytes 0): every sample is read from the store by itself, in every epoch"], False
    first = world.rank - world.local_rank
    lanes = epoch_order(config, index, 0).lanes_read(
        0, config.global_batch, ranks=range(first, first + world.local_size), size=world.size
    )
    try:
        least = check_cache_limit(data.cache_bytes, index, num_lanes=len(lanes), window_samples=data.window_samples)
    except ConfigError as error:
        if not is_shrunk:
            raise
        text = f"{error.found} is too small for {world.size} ranks, fewer than before: every sample is read by itself"
        return [f"{text}; a cache needs {error.expected}"], False
    return [
        f"cache {cache_folder()}: {data.cache_bytes:,} bytes; this node needs {least:,} for {len(lanes)} lanes, "
        f"{index.num_bytes * 8 // 7:,} would keep all of {index.split!r}"
    ], True


def build_stream(
    config: Config, samples: AnySamples, cache: ExtentCache | None, world: World, engine: Engine, *, train: bool
) -> AnyStream:
    """Open the batches of one split for this rank; the caller closes the stream.

    Args:
        config: the run's config.
        samples: the split, from `open_samples`.
        cache: this node's cache, from `build_cache`; None to read every remote sample singly.
        world: this rank.
        engine: its device is where batches go.
        train: crop, flip and augment; False for the evaluation transform.

    Returns:
        A `Stream`, or for tars without an index a `TarStream`.

    Raises:
        ConfigError: with `train`, fewer tars without an index than ranks.
    """
    transform = Transform(config.transform, seed=config.seed, train=train)
    if isinstance(samples, TarSet):
        return TarStream(
            samples,
            transform,
            world=world,
            seed=config.seed,
            num_workers=config.data.num_workers,
            device=engine.device,
            max_bad_fraction=config.data.max_bad_fraction,
        )
    return Stream(
        samples,
        Fetcher(samples, cache),
        transform,
        world=world,
        num_workers=config.data.num_workers,
        device=engine.device,
        max_bad_fraction=config.data.max_bad_fraction,
        decodes_on_device=config.data.decode_on == "gpu",
    )


def epoch_order(config: Config, samples: AnySamples, epoch: int) -> EpochOrder:
    """The order of one epoch of this run.

    Args:
        config: the run's config.
        samples: the train split.
        epoch: counted from 0.
    """
    return EpochOrder(
        samples.shard_sizes,
        seed=config.seed,
        epoch=epoch,
        num_lanes=config.data.num_lanes,
        window_samples=config.data.window_samples,
        group_size=config.group_size,
        parts=samples.parts,
    )
