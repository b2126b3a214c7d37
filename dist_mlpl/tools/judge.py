"""Owns evaluating a finished or running run's newest commit, on any split and any number of ranks."""

from __future__ import annotations

from typing import Any

from dist_mlpl import comm, storage
from dist_mlpl.batch import RunLength
from dist_mlpl.build import build_cache, build_stream, open_samples
from dist_mlpl.chain import Commit, read_model, read_newest
from dist_mlpl.config import Config, read_run_config
from dist_mlpl.data.held_out import HELD_OUT
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.manifest import Manifest
from dist_mlpl.engine import Engine, EngineSettings, start
from dist_mlpl.errors import CheckpointError
from dist_mlpl.evaluate import evaluate
from dist_mlpl.methods.base import Method
from dist_mlpl.models.semantic import SemanticSettings
from dist_mlpl.world import World


def judge(
    run: str,
    *,
    split: str | None = None,
    manifest_url: str | None = None,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate the newest commit of a run from its model file alone.

    Args:
        run: URL of the run folder, RUN.
        split: split of the manifest; None for the run's own evaluation split.
        manifest_url: other shards with the same classes; None for the run's own.
        storage_options: fsspec keywords for remote URLs; runs do not save theirs.

    Returns:
        The metrics, with `split` and `step`.

    Raises:
        CheckpointError: no run, no commit, damaged files, or other classes.
        ManifestError: no such set or split.

    Collective: all ranks under torchrun; a single process without it.
    """
    storage.configure_storage(storage_options)
    config = read_run_config(run)
    world = start(inference_settings(config))
    commit = comm.on_first_rank(lambda: read_newest(run))  # read once for all ranks, as the run may still train
    data = config.data
    if manifest_url is not None:
        held = data.held_out_fraction if (split or data.eval_split) in (data.train_split, HELD_OUT) else None
        data = data.model_copy(update={"manifest": manifest_url, "unindexed": None, "held_out_fraction": held})
    (samples,) = open_samples(data, split or data.eval_split)
    engine = open_engine(run, config, commit, samples.manifest, world)
    cache = build_cache(data, samples, world)
    stream = build_stream(config, samples, cache, world, engine, train=False)
    try:
        judged = evaluate(engine, stream, LabelStore(samples).at(0), config.evaluation)
    finally:
        stream.close()
    return {**judged.metrics, "split": samples.split, "step": commit.step}


def inference_settings(config: Config) -> EngineSettings:
    """Settings of a plain engine that gives the same scores as the run's own engine."""
    return config.engine.model_copy(update={"kind": "plain", "batch_norm": "frozen", "compile": False})


def empty_method(config: Config, manifest: Manifest) -> Method:
    """The run's method, built without its initial weights and embeddings, since the model file holds them."""
    changes: dict[str, Any] = {"backbone": config.method.backbone.model_copy(update={"weights": None})}
    head = getattr(config.method, "head", None)
    if isinstance(head, SemanticSettings):
        changes["head"] = head.model_copy(update={"embeddings": None})
    method = config.method.model_copy(update=changes)
    return method.build(num_classes=manifest.num_classes, image_size=config.transform.size)


def open_engine(run: str, config: Config, commit: Commit, manifest: Manifest, world: World) -> Engine:
    """Open an engine with the model of a commit.

    Raises:
        CheckpointError: a damaged file, or a manifest with other classes.

    Collective: all ranks; weights are broadcast.
    """
    if manifest.classes_sha256 != commit.digests["classes"]:
        raise CheckpointError(
            f"a manifest of {manifest.num_classes} classes, digest {manifest.classes_sha256[:16]}...",
            expected=f"the run's class list, digest {str(commit.digests['classes'])[:16]}...",
            where=manifest.place,
            next_step="build or index the shards with the run's classes.csv",
        )
    engine = Engine(
        empty_method(config, manifest), inference_settings(config), config.optimizer, config.schedule,
        length=RunLength(1, 1), world=world,
        global_batch=config.global_batch, group_size=config.group_size, seed=config.seed,
    )  # fmt: skip
    engine.load_model(read_model(run, commit))
    return engine
