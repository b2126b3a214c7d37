"""Owns one evaluation: a padded pass over a split, with scores merged over ranks."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
from pydantic import Field

from dist_mlpl import comm
from dist_mlpl.data.label_store import Labels
from dist_mlpl.data.tar_stream import AnyStream
from dist_mlpl.engine import Engine
from dist_mlpl.metrics import Evaluation, Scores
from dist_mlpl.settings import Settings

log = logging.getLogger(__name__)


class EvaluationSettings(Settings):
    """When the model is evaluated, and how scores become decisions."""

    every_epochs: int = Field(1, gt=0)  # the last epoch is always evaluated
    top_k: int = Field(3, gt=0)  # classes per image in the _top metrics
    groups: int | None = Field(None, gt=0)  # also report mAP of this many groups of classes, rarest first
    thresholds: float = Field(0.5, gt=0.0, lt=1.0)  # probability threshold for calling a class present


class Judged(NamedTuple):
    """The result of an evaluation."""

    evaluation: Evaluation
    metrics: dict[str, float]  # the summary, with `num_undecodable`


def evaluate(engine: Engine, stream: AnyStream, labels: Labels, settings: EvaluationSettings) -> Judged:
    """Score every image of a split once; the metrics are the same on any number of ranks.

    BatchNorm statistics are averaged over ranks first, so that all ranks evaluate one model. Over tars without an
    index, the last bits of the logits do depend on the number of ranks.

    Args:
        engine: holds the model.
        stream: over the split, with the evaluation transform.
        labels: labels to score against; over tars without an index, only their class list is used.
        settings: thresholds and groups.

    Returns:
        The evaluation and its metrics, the same on every rank. Undecodable images are logged and counted in
        `num_undecodable`; they do not enter other metrics.

    Raises:
        ShardError, DataError, StorageError: the images could not be read.

    Collective: all ranks; see `Scores.merge`.
    """
    engine.average_buffers()
    threshold = math.log(settings.thresholds / (1.0 - settings.thresholds))
    scores = Scores(labels.samples.manifest.num_classes, top_k=settings.top_k, threshold=threshold)
    num_undecodable = torch.zeros(1, dtype=torch.int64)
    for batch in stream.evaluation_batches(labels):
        output = engine.predict(batch)
        scores.add(output.logits, batch.targets, batch.index, batch.valid)
        num_undecodable += ((batch.index >= 0) & ~batch.valid).sum().cpu()
    for bad in stream.take_consumed().bad:
        log.warning("not evaluated: %s: %s", bad.name, bad.reason)
    evaluation = scores.merge()
    metrics = evaluation.metrics()
    metrics["num_undecodable"] = float(comm.reduce_sum(num_undecodable))
    if settings.groups is not None:
        num_annotations = evaluation.counts.present + evaluation.counts.absent
        groups = evaluation.by_group(num_annotations, num_groups=settings.groups)
        metrics |= {f"mAP_group{number}": value for number, value in enumerate(groups, start=1)}
    return Judged(evaluation, metrics)
