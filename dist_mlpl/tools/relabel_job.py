"""Owns making a round of labels in a separate job, during or after the run that will use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dist_mlpl import comm, storage
from dist_mlpl.build import build_cache, build_stream, build_view, open_samples
from dist_mlpl.chain import Commit, read_commit_at, read_head
from dist_mlpl.config import Config, check_config, read_run_config
from dist_mlpl.curriculum.schedule import USED_BY
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.overlays import RoundCommit
from dist_mlpl.documents import parse_yaml
from dist_mlpl.engine import start
from dist_mlpl.errors import CheckpointError, ConfigError
from dist_mlpl.rounds.relabel import relabel
from dist_mlpl.rounds.truth import measure, summary
from dist_mlpl.tools.judge import empty_method, inference_settings, open_engine


class Relabelled(NamedTuple):
    """A committed round and its metrics."""

    commit: RoundCommit
    metrics: dict[str, float]  # `summary`, and `measure` where a view hides labels


def job_config(run: str, overrides: Sequence[str], storage_options: dict[str, Any] | None) -> Config:
    """A run's config with a curriculum, for a relabelling job.

    Args:
        run: URL of the run folder, RUN.
        overrides: `KEY=VALUE` strings for the curriculum's section, such as `strategy=uncertainty`.
        storage_options: fsspec keywords for remote URLs; runs do not save theirs.

    Raises:
        CheckpointError: no run.
        ConfigError: no such key, a value out of range, no strategy.
    """
    storage.configure_storage(storage_options)
    config = read_run_config(run)
    section: dict[str, Any] = {} if config.curriculum is None else config.curriculum.model_dump(mode="json")
    own_strategy = section.get("strategy")
    changes: dict[str, Any] = {}
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(
                f"override {override!r}",
                expected="KEY=VALUE, a key of the curriculum",
                where="--set",
                next_step="write it like --set strategy=score_fraction --set fraction=0.5",
            )
        changes[name.removeprefix("curriculum.")] = parse_yaml(text, where=f"--set {override}")
    # Under another strategy, the settings of the run's own one do not apply.
    if changes.get("strategy", own_strategy) != own_strategy:
        section = {key: value for key, value in section.items() if key not in USED_BY}
    section |= changes
    if "strategy" not in section:
        raise ConfigError(
            "no strategy",
            expected="one in the run's config, or in --set",
            where="curriculum.strategy",
            next_step="name one, say --set strategy=score_threshold; `dist-mlpl config schema` lists them",
        )
    section = {"start_epoch": 1} | section
    document = config.model_dump(mode="json") | {"curriculum": section, "out": run}
    document["num_epochs"] = max(config.num_epochs, int(section["start_epoch"]) + 1)  # a job ignores the schedule
    document["data"]["storage_options"] = storage_options or {}
    document["engine"]["compile"] = False
    return check_config(document, where=f"the curriculum of {run}")


def relabel_run(
    config: Config,
    *,
    step: int | None = None,
    manifest_url: str | None = None,
    is_asked: Callable[[], bool] = lambda: False,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Relabelled | None:
    """Make the next round of a run from one of its commits; a running training switches to it at its next epoch.

    Args:
        config: from `job_config`.
        step: step of the commit whose model scores; None for the newest.
        manifest_url: where the run's shards are now, if they moved.
        is_asked, tell: see `make_round`.

    Returns:
        The round; None when a rank was asked to stop. The same call then resumes it.

    Raises:
        CheckpointError: no commit, damaged files, or shards or a view other than the run's.
        MlplError: see `relabel`.

    Collective: all ranks under torchrun or Ray; a single process without them.
    """
    storage.configure_storage(config.data.storage_options)
    assert config.curriculum is not None
    run, curriculum = config.run_folder, config.curriculum
    world = start(inference_settings(config))
    head = comm.on_first_rank(lambda: _commit(run, step))
    data = config.data if manifest_url is None else config.data.model_copy(update={"manifest": manifest_url})
    (samples,) = open_samples(data, data.train_split)
    store = LabelStore(samples, build_view(data, samples), run=run)
    _check_belongs(store, head)
    engine = open_engine(run, config, head, samples.manifest, world)
    cache = build_cache(data, samples, world)
    commit = relabel(
        run, head, curriculum, engine, store.at(0),
        open_stream=lambda: build_stream(config, samples, cache, world, engine, train=False),
        build=lambda: empty_method(config, samples.manifest),
        seed=config.seed, scored_with=config.scoring_digest, is_asked=is_asked, tell=tell,
    )  # fmt: skip
    if commit is None:
        return None
    truth = measure(run, commit, store.at(0)) if curriculum.measure_hidden else {}
    return Relabelled(commit, summary(commit) | truth)


def _commit(run: str, step: int | None) -> Commit:
    commit = read_head(run) if step is None else read_commit_at(run, step)
    if commit is None:
        raise CheckpointError(
            "no commit",
            expected="a run that has saved at least once",
            where=run,
            next_step="wait for the run's first commit",
        )
    return commit


def _check_belongs(store: LabelStore, head: Commit) -> None:
    own = {"manifest": store.samples.manifest.digest, "view": store.view_digest}
    differing = [name for name, digest in own.items() if head.digests.get(name) != digest]
    if differing:
        raise CheckpointError(
            f"another {' and '.join(differing)} than the run was trained on",
            expected="; ".join(f"{name} {str(head.digests.get(name))[:16]}" for name in own),
            where=storage.shown(store.samples.manifest.url),
            next_step="name the run's shards with --manifest",
        )
