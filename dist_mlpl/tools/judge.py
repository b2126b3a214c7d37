"""Owns the evaluation of a finished or running run: its newest commit, on any split, on any number of ranks."""

from __future__ import annotations

from typing import Any

from dist_mlpl import storage
from dist_mlpl.batch import RunLength
from dist_mlpl.chain import read_chain, read_model
from dist_mlpl.config import read_run_config
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.engine import Engine, start
from dist_mlpl.errors import CheckpointError
from dist_mlpl.evaluate import evaluate
from dist_mlpl.train import build_cache, build_stream, open_samples


def judge(
    run: str,
    *,
    split: str | None = None,
    manifest_url: str | None = None,
    storage_options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate the newest commit of a run from its model file alone.

    Args:
        run: RUN.
        split: of the manifest; None for the run's own evaluation split.
        manifest_url: shards of the same classes; None for the run's own.
        storage_options: fsspec keywords of remote URLs; runs do not write theirs down.

    Returns:
        The metrics, with `split` and `step`.

    Raises:
        CheckpointError: no run, no commit, damaged files, or other classes.

    Collective: all ranks, under torchrun; alone without it.
    """
    storage.configure_storage(storage_options)
    config = read_run_config(run)
    settings = config.engine.model_copy(update={"kind": "plain", "batch_norm": "frozen", "compile": False})
    world = start(settings)
    commit = read_chain(run)[-1]
    data = config.data
    if manifest_url is not None:
        data = data.model_copy(update={"manifest": manifest_url, "unindexed": None})
    (samples,) = open_samples(data, split or data.eval_split)
    manifest = samples.manifest
    if manifest.classes_sha256 != commit.digests["classes"]:
        raise CheckpointError(
            f"a manifest of {manifest.num_classes} classes, digest {manifest.classes_sha256[:16]}...",
            expected=f"the run's class list, digest {str(commit.digests['classes'])[:16]}...",
            where=manifest.url,
            next_step="build or index the shards with the run's classes.csv",
        )
    method = config.method.model_copy(
        update={"backbone": config.method.backbone.model_copy(update={"weights": None})}
    ).build(num_classes=manifest.num_classes, image_size=config.transform.size)
    engine = Engine(
        method, settings, config.optimizer, config.schedule, length=RunLength(1, 1), world=world,
        global_batch=config.global_batch, group_size=config.group_size, seed=config.seed,
    )  # fmt: skip
    engine.load_model(read_model(run, commit))
    cache = build_cache(data, samples, world)
    stream = build_stream(config, samples, cache, world, engine, train=False)
    try:
        judged = evaluate(engine, stream, LabelStore(samples).at(0), config.evaluation)
    finally:
        stream.close()
    return {**judged.metrics, "split": samples.split, "step": commit.step}
