"""Owns a sweep: a list of runs over configs, known fractions and seeds, and the result of each."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from dist_mlpl import storage
from dist_mlpl.chain import read_head
from dist_mlpl.config import Config, check_resume, compare_configs, load_config, read_run_config, run_config_url
from dist_mlpl.data.held_out import HELD_OUT
from dist_mlpl.data.stream import DataSettings
from dist_mlpl.errors import ConfigError, MlplError
from dist_mlpl.tools.sweep_table import Result

HELD_OUT_FRACTION: Final = 0.2
# Settings of every run in a sweep unless overridden: one process needs no DeepSpeed, and the last epoch is always
# evaluated.
_SETTINGS: Final = ("engine.kind=plain", "evaluation.every_epochs=1000000")
_KNOWN_WORDS: Final = {  # values of --known besides fractions
    "single": ["data.known_rule=single_positive", "data.known_fraction=null"],
    "all": ["data.known_rule=bernoulli", "data.known_fraction=null"],
}


class PlannedRun(NamedTuple):
    """One run of a sweep.

    Args:
        method: file name of its config without the ending.
        known: how much of the labels is known, as a word; see `known_word`.
        seed: seed of training and of the view.
        folder: URL of the run folder, RUN.
        config: the resolved config.
        arguments: arguments of `dist-mlpl` that train or resume it.
    """

    method: str
    known: str
    seed: int
    folder: str
    config: Config
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of its folder."""
        return storage.name(self.folder)

    @property
    def command(self) -> str:
        """The command that makes this run alone, for display; without storage options, which may hold secrets."""
        shown = [part for part in self.arguments if not part.startswith("data.storage_options")]
        kept = [a for a, b in zip(shown, [*shown[1:], ""], strict=True) if (a, b) != ("--set", "--set")]
        return f"dist-mlpl {shlex.join(kept)}"


def plan_sweep(
    paths: Sequence[str],
    *,
    out: str,
    known: Sequence[str] = (),
    num_seeds: int = 1,
    overrides: Sequence[str] = (),
    is_choosing: bool = False,
) -> list[PlannedRun]:
    """All runs of a sweep, in the order they are made: all methods under one seed before the next seed.

    A seed draws the weights, the order and the view in the same way for every method, so that methods can be compared
    seed by seed. The evaluation split is read once, after the last epoch.

    Args:
        paths: paths or URLs of configs; their file names name the methods.
        out: folder or URL for the run folders.
        known: fractions in (0, 1], `single` for one positive label per image, or `all`; empty: as in each config.
        num_seeds: runs use seeds 0 to num_seeds - 1.
        overrides: `section.field=value` strings for every run.
        is_choosing: hold out a fifth of the train split and evaluate on it instead of the evaluation split.

    Raises:
        ConfigError: no config, two with one name, an invalid one, or a `known` that is none of the above.
    """
    methods = [storage.name(path).removesuffix(".yaml") for path in paths]
    twice = sorted({method for method in methods if methods.count(method) > 1})
    if twice or not paths:
        raise ConfigError(
            f"two configs named {', '.join(twice)}" if twice else "no config",
            expected="configs with file names of their own: these name the rows of the table",
            where="CONFIG",
            next_step="rename one of them, or sweep them into different folders",
        )
    common = list(_SETTINGS)
    if is_choosing:
        common += [f"data.held_out_fraction={HELD_OUT_FRACTION}", f"data.eval_split={HELD_OUT}"]
    common += overrides
    runs: list[PlannedRun] = []
    shares: list[str | None] = list(known) or [None]
    for seed in range(num_seeds):
        for one in shares:
            changes = [*common, *_known_overrides(one), f"seed={seed}", f"data.known_seed={seed}"]
            runs += [
                _plan_run(method, path, changes, seed=seed, out=out)
                for method, path in zip(methods, paths, strict=True)
            ]
    return runs


def _plan_run(method: str, path: str, changes: list[str], *, seed: int, out: str) -> PlannedRun:
    config = load_config(path, overrides=changes)
    known = known_word(config.data)
    folder = storage.join(out, f"{method}-{known}-{seed}")
    sets = [part for change in changes for part in ("--set", change)]
    arguments = ("train", path, "--out", folder, "--local", *sets)
    return PlannedRun(method, known, seed, folder, config.model_copy(update={"out": folder}), arguments)


def _known_overrides(known: str | None) -> list[str]:
    if known is None:
        return []
    if known in _KNOWN_WORDS:
        return _KNOWN_WORDS[known]
    if not is_known_word(known):
        raise ConfigError(
            f"--known {known}",
            expected="a fraction in (0, 1], `single` or `all`",
            where="--known",
            next_step="write it like --known 0.1 0.3 single",
        )
    return [f"data.known_fraction={known}"]


def is_known_word(text: str) -> bool:
    """Whether a word of the command line is a value of --known rather than a config."""
    try:
        return text in _KNOWN_WORDS or 0.0 < float(text) <= 1.0
    except ValueError:
        return False


def known_word(data: DataSettings) -> str:
    """How much of the labels a run may see, as a word for file names."""
    if data.view is not None:
        return storage.name(data.view)
    if data.known_rule == "single_positive":
        return "single"
    if data.known_fraction is None:
        return "all"
    rule = "" if data.known_rule == "bernoulli" else f"-{data.known_rule}"
    return f"{data.known_fraction:g}{rule}"


def epochs_done(run: PlannedRun) -> int:
    """Number of epochs that a run has committed."""
    head = read_head(run.folder)
    return 0 if head is None else min(head.epoch, run.config.num_epochs)


def check_folders(runs: Sequence[PlannedRun], out: str) -> None:
    """Refuse a sweep whose folder holds runs with other settings, whose results would not be this sweep's.

    Raises:
        ConfigError: there are some; nothing was read but their chains and configs.
    """
    found = {run.name: lines for run in runs if (lines := _other_settings(run))}
    if found:
        name, lines = next(iter(found.items()))
        raise ConfigError(
            f"{len(found)} of {len(runs)} runs are there with other settings; {name}: {'; '.join(lines)}",
            expected="the settings that the runs in this folder were made with",
            where=storage.shown(out),
            next_step="put the settings back, or sweep into another folder with --out",
        )


def _other_settings(run: PlannedRun) -> list[str]:
    """How a run's settings differ from those of the run in its folder; empty if nothing was trained there."""
    try:
        if read_head(run.folder) is None or not storage.exists(run_config_url(run.folder)):
            return []
        changes = compare_configs(read_run_config(run.folder), run.config)
    except MlplError:
        return []  # damaged: this run fails, and the others are made
    return [f"{name} {before!r} -> {after!r}" for name, before, after, kind in changes if kind != "free"]


def result_of(run: PlannedRun) -> Result | None:
    """The result of a finished run; None until its chain has reached the last epoch and it has been evaluated.

    Raises:
        CheckpointError: the folder holds a run with another config, or a damaged chain.
    """
    head = read_head(run.folder)
    if head is None:
        return None
    if storage.exists(run_config_url(run.folder)):
        check_resume(read_run_config(run.folder), run.config, allow_change=False)
    if head.epoch < run.config.num_epochs:
        return None
    try:
        content = storage.read_bytes(storage.join(run.folder, "evaluations", f"{head.name}.json"))
    except FileNotFoundError:
        return None
    record: dict[str, Any] = json.loads(content)
    numbers = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
    return Result(run.method, run.known, run.seed, str(record["split"]), numbers)
