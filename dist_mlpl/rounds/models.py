"""Owns which models score a round: the present one, earlier commits of its run, and commits of other runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.batch import Batch, StepOutput
from dist_mlpl.chain import Commit, read_commit, read_commit_at, read_head, read_model
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.data.overlays import RoundModel, newest_round, read_round
from dist_mlpl.engine import Engine
from dist_mlpl.errors import CheckpointError
from dist_mlpl.methods.base import Method

Predict = Callable[[Batch], Tensor]  # a block's logits (B, C) without gradient; embeddings (B, D) under neighbours


class Model(NamedTuple):
    """One of the models that score a round."""

    record: RoundModel
    predict: Predict


def model_record(commit: Commit) -> RoundModel:
    """A commit's model as a round's plan lists it."""
    sha256 = next(file.sha256 for file in commit.files if file.path.endswith("/model.safetensors"))
    return RoundModel(step=commit.step, sha256=sha256)


def is_made(run: str, settings: CurriculumSettings, models: Sequence[RoundModel], *, scored_with: str) -> int:
    """Number of the newest round if it was made with these settings and models, else 0: no round is made twice.

    Args:
        run: URL of the run folder, RUN.
        settings: the curriculum's settings.
        models: the models that would score, the present one first.
        scored_with: `Config.scoring_digest`.
    """
    number = newest_round(run)
    if number == 0:
        return 0
    made = read_round(run, number)
    mine = (settings.strategy, settings.parameters, tuple(models), scored_with)
    return number if (made.strategy, made.parameters, made.models, made.scored_with) == mine else 0


def find_members(run: str, head: Commit, settings: CurriculumSettings) -> list[tuple[str, Commit]]:
    """Find the models of a round, the present one first.

    Rank 0 looks for all, since other runs may still be training and write commits.

    Args:
        run: URL of the run folder, RUN.
        head: the commit whose model the engine holds.
        settings: the curriculum's settings; an ensemble takes up to `checkpoints` commits of the run, and the `runs`.

    Returns:
        (RUN, commit) of each model.

    Raises:
        CheckpointError: a member is missing or has other classes, or the ensemble has one member.

    Collective: all ranks, one broadcast of commits.
    """
    return comm.on_first_rank(lambda: _members(run, head, settings))


def _members(run: str, head: Commit, settings: CurriculumSettings) -> list[tuple[str, Commit]]:
    members = [(run, head)]
    if settings.strategy != "ensemble":
        return members
    earlier = head
    while len(members) < settings.checkpoints and earlier.parent is not None:
        earlier = read_commit(run, earlier.parent)
        members.append((run, earlier))
    members += [_member(text) for text in settings.runs]
    if len(members) == 1:
        raise CheckpointError(
            f"an ensemble of one model: step {head.step} is the only commit of the run",
            expected="two models at least",
            where="curriculum.checkpoints, curriculum.runs",
            next_step="start the curriculum later, save more often, or name other runs",
        )
    for url, commit in members:
        if commit.digests["classes"] != head.digests["classes"]:
            raise _incompatible(url, commit, "classes that differ from this run's")
    return members


def load_models(
    members: Sequence[tuple[str, Commit]], settings: CurriculumSettings, engine: Engine, build: Callable[[], Method]
) -> list[Model]:
    """Load the models of a round, the present one first.

    Args:
        members: from `find_members`.
        settings: the curriculum's settings.
        engine: holds the present model.
        build: makes a new method like the engine's, whose tensors will be overwritten.

    Raises:
        CheckpointError: a member was pruned or is damaged, or its tensors differ from this method's.
    """

    def predict(batch: Batch) -> Tensor:
        output = engine.predict(batch)
        return output.extras["embedding"] if settings.strategy == "neighbours" else output.logits

    head, *others = members
    loaded = [Model(model_record(commit), _loaded(url, commit, engine, build())) for url, commit in others]
    return [Model(model_record(head[1]), predict), *loaded]


def _member(text: str) -> tuple[str, Commit]:
    """Read the member that `RUN` or `RUN@STEP` names: (RUN, commit)."""
    url, separator, step = text.rpartition("@")
    commit = read_commit_at(url, int(step)) if separator and step.isdecimal() else read_head(text)
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
