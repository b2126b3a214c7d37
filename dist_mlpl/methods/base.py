"""Owns the seam between a paper and the loop: what a method answers, and when."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from dist_mlpl import comm
from dist_mlpl.banks.base import Bank
from dist_mlpl.batch import Batch, Progress, StepOutput
from dist_mlpl.data.label_store import Labels
from dist_mlpl.labels import PRESENT, UNKNOWN
from dist_mlpl.methods.costs import Cost, Scale, bank_cost
from dist_mlpl.models.backbone import BackboneSettings, build_backbone
from dist_mlpl.models.classifier import Pooling
from dist_mlpl.settings import Location, Settings

HEATMAPS = "heatmaps"


class MethodSettings(Settings):
    """What every method can be told; each method's own settings add a literal `name` and its keys.

    Args:
        name: the method, a row of the method table.
        backbone: its trunk.
        pooling: of the feature map over its cells, `average` or `max`.
        dropout: probability of dropping a pooled feature before the classifier, in [0, 1).
        init_from: URL of a run whose model this one starts from.
    """

    needs_places: ClassVar[bool] = False  # it reads or writes maps through the crop: pixels must stay where they were

    name: str
    backbone: BackboneSettings
    pooling: Pooling = "average"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    init_from: Location | None = None

    def build(self, *, num_classes: int, image_size: int) -> Method:
        """The method, with random weights or the backbone's own; `weights_report` tells which.

        Args:
            num_classes: C.
            image_size: H = W in pixels.

        Raises:
            ConfigError: see `build_backbone`.
        """
        raise NotImplementedError


class Method(nn.Module):
    """One paper: model, losses and banks behind one `forward`.

    A step is `recall`, then `forward` for each micro-batch, then one `observe` after the update. Under ZeRO only
    `forward` may touch a parameter, and in it the same parameters must receive a gradient on every rank,
    whatever the batch holds: an empty term is a zero that stays connected to the graph, never a skipped branch.
    No parameter is 0-dimensional.

    Args:
        settings: of the method.
        num_classes: C.
        image_size: H = W in pixels.

    Attributes:
        backbone: the trunk; every other trainable parameter counts as head.
        weights_report: what became of the backbone's weights; whoever builds the method prints it.
        notes: what else a person should read once, when a run begins.
    """

    def __init__(self, settings: MethodSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone, self.weights_report = build_backbone(settings.backbone, image_size=image_size)
        self.notes: list[str] = []
        self._asked: frozenset[str] = frozenset()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Every trainable parameter once: `backbone`, and `head`, whose learning rate has its own multiplier."""
        groups: dict[str, list[nn.Parameter]] = {"backbone": [], "head": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["backbone" if name.startswith("backbone.") else "head"].append(parameter)
        return groups

    def begin_run(self, *, num_samples: int, epoch_samples: int, group_size: int, seed: int) -> None:
        """Learn what the run is made of and make banks, which take memory when they are first used.

        Called once, by the engine, on every rank. Nothing by default.

        Args:
            num_samples: N of the train split; sample indices are below it.
            epoch_samples: of an epoch, which is not N where sets are mixed with weights.
            group_size: consecutive images that may interact; every micro-batch holds whole groups.
            seed: of the run.
        """

    def read_labels(self, labels: Labels) -> None:
        """Learn what the training labels say as a whole, into buffers: they are saved with the model, so that a resumed
        run, `evaluate`, `relabel` and a run that starts from this one need no labels. Nothing by default.

        Called once on every rank, when a run begins from nothing, before weights are taken over from `init_from`.

        Args:
            labels: human labels of the train split, after the view, without beliefs; to be read in blocks.

        Collective: allowed, on all ranks alike.
        """

    def check_start(self, url: str, taken: Collection[str]) -> None:
        """Refuse to begin with part of another run's model where that part is not enough. Any part is by default.

        Args:
            url: the run, `init_from`.
            taken: names of the parameters and buffers that were taken over from it.

        Raises:
            CheckpointError: naming what is absent.
        """

    def begin_epoch(self, progress: Progress) -> None:
        """Prepare an epoch that starts from its beginning; may read and write banks. Nothing by default.

        Collective: allowed, on all ranks alike.
        """

    @torch.no_grad()
    def recall(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Read what the whole step needs, before any graph exists; may read banks, writes none.

        Args:
            batch: this rank's share of the global batch.
            progress: where the run stands before this step.

        Returns:
            Tensors by name, handed whole to `forward` for every micro-batch. Here `num_valid`, the valid images,
            and `num_known`, the known labels of `training_targets`, both over the global batch: (1,) float32.

        Collective: all ranks, one all-reduce of 8 bytes. Overriding methods call this one and add to it.
        """
        num_known = (training_targets(batch) != UNKNOWN).sum()
        counts = comm.reduce_sum(torch.stack([batch.valid.sum(), num_known]).float())  # (2,)
        return {"num_valid": counts[0:1], "num_known": counts[1:2]}

    def forward(self, batch: Batch, recalled: dict[str, Tensor] | None) -> StepOutput:
        """Run the model on a micro-batch and, when training, weigh its losses. Neither reads nor writes banks.

        The loss is a share, not a mean: `loss` and each term are this micro-batch's additive part of the global
        batch's loss. Summed over all micro-batches and ranks they are that loss, however the batch was cut. The engine
        undoes DeepSpeed's averaging. Rows whose `valid` is False add exactly 0.

        Losses are computed in float32 with autocast off; `logits` are float32 always.

        Args:
            batch: B rows of the step's batch.
            recalled: what `recall` gave for the step; None means inference, for which `images` alone are read.

        Returns:
            `loss`, which alone carries a graph; `terms`; `logits`; `extras` with `embedding` (B, D) always and what
            `asking` asks for. An extra named `METRIC` and more is a () share like a term, and is reported with them.
            Without `recalled` the loss is 0 and there are no terms and no metrics.

        Collective: at most one reduced, detached statistic.
        """
        raise NotImplementedError

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Learn from a finished step outside the gradient, once after its update; writes banks. Nothing by default.

        Args:
            batch: this rank's whole share of the step.
            output: of the whole step.

        Collective: allowed, on all ranks alike.
        """

    def banks(self) -> dict[str, Bank]:
        """The method's banks by name, for saving and loading. None by default."""
        return {}

    def costs(self, scale: Scale) -> list[Cost]:
        """What banks, and heads that work in training alone, will cost: `dist-mlpl plan` shows it. Asked after
        `begin_run`; touches no memory.

        By default every bank's rows, and the traffic of one row read and one written for each image of a step.

        Args:
            scale: of the run that is planned, which may have other ranks than this process.
        """
        return [bank_cost(name, bank, scale) for name, bank in self.banks().items()]

    def bank_sources(self) -> dict[str, str]:
        """Banks that a new run takes from another run's newest commit: RUN by the bank's name. None by default."""
        return {}

    @contextmanager
    def asking(self, *extras: str) -> Iterator[None]:
        """Have `forward` fill costly extras (`heatmaps`) while the block runs."""
        before, self._asked = self._asked, self._asked | frozenset(extras)
        try:
            yield
        finally:
            self._asked = before

    def is_asked(self, extra: str) -> bool:
        """True inside `asking(extra)`."""
        return extra in self._asked

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """One vector per image, in the mode (training or evaluation) the method is in.

        Args:
            images: (B, 3, H, W), normalised.

        Returns:
            (B, D) float32.

        Collective: under ZeRO-3, all ranks.
        """
        return self(images_alone(images, self.num_classes), None).extras["embedding"]

    @torch.no_grad()
    def explain(self, images: Tensor) -> Tensor:
        """Where each class is seen, in the mode (training or evaluation) the method is in.

        Args:
            images: (B, 3, H, W), normalised.

        Returns:
            (B, C, h, w) float32, evidence per cell; larger is more.

        Collective: under ZeRO-3, all ranks.
        """
        with self.asking(HEATMAPS):
            return self(images_alone(images, self.num_classes), None).extras[HEATMAPS]


def training_targets(batch: Batch) -> Tensor:
    """Human labels where known, this round's beliefs elsewhere, unknown on every row that is not valid.

    Returns:
        (B, C) int8 in {-1, 0, 1}.
    """
    targets = batch.targets
    if batch.pseudo_targets is not None:
        targets = torch.where(targets != UNKNOWN, targets, batch.pseudo_targets)  # a known label always wins
    return torch.where(batch.valid[:, None], targets, UNKNOWN)


def known_positives(batch: Batch) -> Tensor:
    """(B, C) bool: present by human label in a valid image."""
    return (batch.targets == PRESENT) & batch.valid[:, None]


def images_alone(images: Tensor, num_classes: int) -> Batch:
    """Images (B, 3, H, W) as a batch of which nothing else is known, for inference."""
    B, device = images.shape[0], images.device
    return Batch(
        images=images,
        targets=torch.zeros(B, num_classes, dtype=torch.int8, device=device),
        pseudo_targets=None,
        soft_targets=None,
        index=torch.full((B,), -1, device=device),
        crop=torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=device).repeat(B, 1),
        flipped=torch.zeros(B, dtype=torch.bool, device=device),
        valid=torch.ones(B, dtype=torch.bool, device=device),
    )


def step_output(logits: Tensor, terms: dict[str, Tensor], extras: dict[str, Any]) -> StepOutput:
    """The result of a forward: the loss is the sum of its terms, and it alone keeps the graph.

    Args:
        logits: (B, C).
        terms: () shares by name; empty for inference.
        extras: tensors or None by name; None is left out.
    """
    loss = sum(terms.values(), start=logits.new_zeros(()))
    return StepOutput(
        loss=loss,
        terms={name: term.detach() for name, term in terms.items()},
        logits=logits.detach(),
        extras={name: value.detach() for name, value in extras.items() if value is not None},
    )
