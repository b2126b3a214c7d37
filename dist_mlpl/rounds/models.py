"""Owns which models score a round: the present one, earlier commits of its run, newest commits of other runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.batch import Batch, StepOutput
from dist_mlpl.chain import Commit, read_commit, read_head, read_model
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.data.overlays import RoundModel, newest_round, read_round
from dist_mlpl.engine import Engine
from dist_mlpl.errors import CheckpointError
from dist_mlpl.methods.base import Method

Predict = Callable[[Batch], Tensor]  # logits (B, C) of a block, no gradient; embeddings (B, D) where images vote


class Model(NamedTuple):
    """One of the models that score."""

    record: RoundModel
    predict: Predict


def model_record(commit: Commit) -> RoundModel:
    """A commit's model as a round's plan names it."""
    sha256 = next(file.sha256 for file in commit.files if file.path.endswith("/model.safetensors"))
    return RoundModel(step=commit.step, sha256=sha256)


def is_made(run: str, settings: CurriculumSettings, head: Commit, *, scored_with: str) -> int:
    """The newest round if these settings made it from this commit, else 0: a round need not be made twice.

    Args:
        run: RUN.
        settings: of the curriculum.
        head: the commit whose model would score.
        scored_with: digest of what else scores depend on.
    """
    number = newest_round(run)
    if number == 0:
        return 0
    made = read_round(run, number)
    mine = (settings.strategy, settings.parameters, model_record(head), scored_with)
    return number if (made.strategy, made.parameters, *made.models[:1], made.scored_with) == mine else 0


def scoring_models(
    run: str, head: Commit, settings: CurriculumSettings, engine: Engine, build: Callable[[], Method]
) -> list[Model]:
    """The models of a round, the present one first.

    Args:
        run: RUN.
        head: the commit whose model the engine holds.
        settings: of the curriculum; an ensemble takes `checkpoints` commits of the run, or as many as there are, and
            the `runs`.
        engine: holds the present model.
        build: makes an empty method like the engine's.

    Raises:
        CheckpointError: a member is missing, pruned, of other classes or of another model; an ensemble of one.

    Collective: all ranks, of an ensemble; one broadcast of commits.
    """

    def predict(batch: Batch) -> Tensor:
        output = engine.predict(batch)
        return output.extras["embedding"] if settings.strategy == "neighbours" else output.logits

    models = [Model(model_record(head), predict)]
    if settings.strategy != "ensemble":
        return models

    def find() -> list[tuple[str, Commit]]:
        members: list[tuple[str, Commit]] = []
        earlier = head
        while len(members) < settings.checkpoints - 1 and earlier.parent is not None:
            earlier = read_commit(run, earlier.parent)
            members.append((run, earlier))
        return members + [_member(text) for text in settings.runs]

    members = comm.on_first_rank(find)  # one list for all ranks: a member may still train
    if not members:
        raise CheckpointError(
            f"an ensemble of one model: step {head.step} is the only commit of the run",
            expected="two models at least",
            where="curriculum.checkpoints, curriculum.runs",
            next_step="start the curriculum later, save more often, or name other runs",
        )
    for url, commit in members:
        if commit.digests["classes"] != head.digests["classes"]:
            raise _incompatible(url, commit, "classes that differ from this run's")
        models.append(Model(model_record(commit), _loaded(url, commit, engine, build())))
    return models


def _member(text: str) -> tuple[str, Commit]:
    """`RUN` or `RUN@STEP`."""
    url, separator, step = text.rpartition("@")
    commit = read_commit(url, int(step)) if separator and step.isdecimal() else read_head(text)
    if commit is None:
        raise CheckpointError(
            "no commit",
            expected="a run that has saved, as RUN or RUN@STEP",
            where=f"curriculum.runs: {text}",
            next_step="check the path",
        )
    return (url if separator and step.isdecimal() else text), commit


def _loaded(url: str, commit: Commit, engine: Engine, method: Method) -> Predict:
    model = read_model(url, commit)
    own = {name: tensor.shape for name, tensor in (*method.named_parameters(), *method.named_buffers())}
    found = {name: tensor.shape for name, tensor in model.items()}
    differing = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
    if differing:
        raise _incompatible(url, commit, f"{len(differing)} tensors that this run's has not, first {differing[0]!r}")
    with torch.no_grad():
        for name, tensor in (*method.named_parameters(), *method.named_buffers()):
            tensor.copy_(model[name])
    method.to(engine.device).eval()
    use_bfloat16 = engine.settings.precision == "bf16"

    def predict(batch: Batch) -> Tensor:
        with torch.no_grad(), torch.autocast(engine.device.type, torch.bfloat16, enabled=use_bfloat16):
            output: StepOutput = method(batch, None)
        return output.logits

    return predict


def _incompatible(url: str, commit: Commit, found: str) -> CheckpointError:
    return CheckpointError(
        f"a member of the ensemble with {found}",
        expected="models of one method over one list of classes",
        where=f"{url}, commit {commit.step}",
        next_step="name runs of the same method and manifest in curriculum.runs",
    )
