"""Owns the interface between a method and the training loop: what a method must provide, and when it is called."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, runtime_checkable

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


@runtime_checkable
class KeepsTensors(Protocol):
    """A part of a method with tensors that are not another run's to set."""

    def kept_at_start(self, found: Collection[str]) -> dict[str, str]:
        """See `Method.kept_at_start`; names are those inside the part."""
        ...


class MethodSettings(Settings):
    """The settings of every method; each method's own settings add a literal `name` and its keys.

    Args:
        name: the method, a row of the method table.
        backbone: its trunk.
        pooling: pooling over cells, `average`, `max` or `weldon`; see `PooledHead`.
        dropout: probability of dropping a pooled feature before the classifier, in [0, 1).
        init_from: URL of a run whose model this one starts from; null: none. What `Method.kept_at_start` names, such as
            the graph of this run's labels, is not taken over.
    """

    needs_places: ClassVar[bool] = False  # uses maps through the crop: no RandAugment or cutout

    name: str
    backbone: BackboneSettings
    pooling: Pooling = "average"
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    init_from: Location | None = None

    def build(self, *, num_classes: int, image_size: int) -> Method:
        """Build the method, with random weights or pretrained ones in the backbone; see its `weights_report`.

        Args:
            num_classes: C.
            image_size: H = W in pixels.

        Raises:
            ConfigError: see `build_backbone`; settings that do not fit the model.
            StorageError: see `build_backbone`.
        """
        raise NotImplementedError

    def refuse_idle(self, keys: Sequence[str], because: str) -> None:
        """Refuse keys that would silently do nothing; at their defaults they are never refused.

        Args:
            keys: the keys that are not read.
            because: why not, and what to do, for the message.

        Raises:
            ValueError: some of them are set.
        """
        fields = type(self).model_fields
        changed = [key for key in keys if getattr(self, key) != fields[key].default]
        if changed:
            raise ValueError(f"{', '.join(changed)} set, but {because}")


class Method(nn.Module):
    """One paper: model, losses and banks behind one `forward`.

    A step is `recall`, then `forward` for each micro-batch, then one `observe` after the update. Under ZeRO only
    `forward` may touch a parameter, and in it the same parameters must receive a gradient on every rank,
    whatever the batch holds: an empty term is a zero that stays connected to the graph, never a skipped branch.
    No parameter may be 0-dimensional.

    Args:
        settings: the method's settings.
        num_classes: C.
        image_size: H = W in pixels.

    Attributes:
        backbone: the trunk; every other trainable parameter counts as head.
        weights_report: what was loaded into the backbone; whoever builds the method prints it.
        notes: messages to show the user once, when a run begins.
    """

    def __init__(self, settings: MethodSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone, self.weights_report = build_backbone(settings.backbone, image_size=image_size)
        self.notes: list[str] = []
        self._asked: frozenset[str] = frozenset()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Group every trainable parameter: `backbone`, and `head`, whose learning rate has its own multiplier."""
        groups: dict[str, list[nn.Parameter]] = {"backbone": [], "head": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups["backbone" if name.startswith("backbone.") else "head"].append(parameter)
        return groups

    def begin_run(self, *, num_samples: int, epoch_samples: int, group_size: int, seed: int) -> None:
        """Take note of the run's sizes and make banks, whose memory is allocated when they are first used.

        Called once, by the engine, on every rank. Does nothing by default.

        Args:
            num_samples: N of the train split; sample indices are below it.
            epoch_samples: samples of an epoch, which differs from N if data sets are mixed with weights.
            group_size: number of consecutive images that may interact; every micro-batch holds whole groups.
            seed: the run's seed.
        """

    def read_labels(self, labels: Labels) -> None:
        """Compute statistics of all training labels, and keep them in buffers. Does nothing by default.

        Buffers are saved with the model, so that a resumed run, `evaluate`, `relabel` and a run that starts from this
        one need no labels. Called once on every rank, when a new run begins, before weights are loaded from
        `init_from`; a part whose statistics that must not replace has a `kept_at_start`.

        Args:
            labels: human labels of the train split, after the view, without pseudo-labels; read them in blocks.

        Collective: allowed, on all ranks alike.
        """

    def kept_at_start(self, found: Collection[str]) -> dict[str, str]:
        """The tensors that a run starting from another run's model (`init_from`) keeps as they are, and why.

        Those of the method's parts that have a `kept_at_start` of their own: what this run's labels and files say, and
        weights whose meaning the other run does not have.

        Args:
            found: names of the other model's parameters and buffers, without those that have another shape here.

        Returns:
            For each name a few words that say what the tensor is; names that are not in `found` are allowed.
        """
        kept: dict[str, str] = {}
        for part, module in self.named_modules():
            if isinstance(module, KeepsTensors) and module is not self:
                inside = {name.removeprefix(f"{part}.") for name in found if name.startswith(f"{part}.")}
                kept |= {f"{part}.{name}": reason for name, reason in module.kept_at_start(inside).items()}
        return kept

    def check_start(self, url: str, taken: Collection[str]) -> None:
        """Check that enough of another run's model was loaded to start from. By default any part is enough.

        Args:
            url: the run, `init_from`.
            taken: names of the parameters and buffers that were loaded from it.

        Raises:
            CheckpointError: tensors that the method needs are missing; the message has the first.
        """

    def begin_epoch(self, progress: Progress) -> None:
        """Prepare an epoch; called when it starts from its beginning. May read and write banks. Nothing by default.

        Collective: allowed, on all ranks alike.
        """

    @torch.no_grad()
    def recall(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Compute what the whole step needs, before any graph exists; may read banks but not write them.

        Args:
            batch: this rank's share of the global batch.
            progress: where the run stands before this step.

        Returns:
            Tensors by name, passed whole to `forward` for every micro-batch. Here `num_valid`, the number of valid
            images, and `num_known`, that of known labels in `training_targets`, over the global batch: (1,) float32.

        Collective: all ranks, one all-reduce of 8 bytes. Overriding methods call this one and add to its result.
        """
        num_known = (training_targets(batch) != UNKNOWN).sum()
        counts = comm.reduce_sum(torch.stack([batch.valid.sum(), num_known]).float())  # (2,)
        return {"num_valid": counts[0:1], "num_known": counts[1:2]}

    def forward(self, batch: Batch, recalled: dict[str, Tensor] | None) -> StepOutput:
        """Run the model on a micro-batch and, when training, compute its losses. Neither reads nor writes banks.

        The loss is a share, not a mean: `loss` and each term are this micro-batch's additive part of the global
        batch's loss. Summed over all micro-batches and ranks they are that loss, however the batch was split. The
        engine undoes DeepSpeed's averaging. Rows whose `valid` is False add exactly 0.

        Losses are computed in float32 with autocast off; `logits` are always float32.

        Args:
            batch: B rows of the step's batch.
            recalled: what `recall` returned for the step; None: inference, which reads only `images`.

        Returns:
            `loss`, the only part with a graph; `terms`; `logits`; `extras`, always with `embedding` (B, D), and with
            the extras requested by `asking`. An extra whose name begins with `METRIC` is a () share like a term, and is
            reported with them. Without `recalled` the loss is 0 and there are no terms and no metrics.

        Collective: at most one reduced, detached statistic.
        """
        raise NotImplementedError

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Write banks after a finished step; called once, after its update. Does nothing by default.

        Args:
            batch: this rank's whole share of the step.
            output: the output of the whole step, see `Engine.train_step`.

        Collective: allowed, on all ranks alike.
        """

    def banks(self) -> dict[str, Bank]:
        """The method's banks by name, for saving and loading. None by default."""
        return {}

    def costs(self, scale: Scale) -> list[Cost]:
        """Estimate the costs of banks, and of heads used only in training, for `dist-mlpl plan`.

        Called after `begin_run`; allocates no bank. By default every bank's rows, and the traffic of one row read and
        one written for each image of a step.

        Args:
            scale: the sizes of the planned run, which may have another number of ranks than this process.
        """
        return [bank_cost(name, bank, scale) for name, bank in self.banks().items()]

    def bank_sources(self) -> dict[str, str]:
        """The banks that a new run loads from another run's newest commit: that run by bank name. None by default."""
        return {}

    @contextmanager
    def asking(self, *extras: str) -> Iterator[None]:
        """Make `forward` also return costly extras (`heatmaps`) inside the block."""
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
        """Compute one vector per image, in the mode (training or evaluation) the method is in.

        Args:
            images: (B, 3, H, W), normalised.

        Returns:
            (B, D) float32.

        Collective: under ZeRO-3, all ranks.
        """
        return self(images_alone(images, self.num_classes), None).extras["embedding"]

    @torch.no_grad()
    def explain(self, images: Tensor) -> Tensor:
        """Compute heatmaps of each class, in the mode (training or evaluation) the method is in.

        Args:
            images: (B, 3, H, W), normalised.

        Returns:
            (B, C, h, w) float32, evidence per cell; a larger value is more evidence.

        Collective: under ZeRO-3, all ranks.
        """
        with self.asking(HEATMAPS):
            return self(images_alone(images, self.num_classes), None).extras[HEATMAPS]


def training_targets(batch: Batch) -> Tensor:
    """Combine human labels where known with this round's pseudo-labels elsewhere; invalid rows are all unknown.

    Returns:
        (B, C) int8 in {-1, 0, 1}.
    """
    targets = batch.targets
    if batch.pseudo_targets is not None:
        targets = torch.where(targets != UNKNOWN, targets, batch.pseudo_targets)  # a human label has priority
    return torch.where(batch.valid[:, None], targets, UNKNOWN)


def known_positives(batch: Batch) -> Tensor:
    """(B, C) bool, True where a human label is present and the image is valid."""
    return (batch.targets == PRESENT) & batch.valid[:, None]


def images_alone(images: Tensor, num_classes: int) -> Batch:
    """Make a batch for inference from images (B, 3, H, W): all labels unknown, all rows valid, no indices."""
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
    """Make the result of a forward: the loss is the sum of its terms, and the only part with a graph.

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
