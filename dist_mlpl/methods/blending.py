"""Owns SARB and DSRB: unknown labels are completed by mixing in features of images or prototypes of the class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.base import Bank
from dist_mlpl.batch import Batch, Progress, StepOutput
from dist_mlpl.data.label_store import Labels
from dist_mlpl.kernels.semantic_attention import attention_notes
from dist_mlpl.labels import UNKNOWN
from dist_mlpl.losses.contrastive import contrastive_loss, num_contrasted
from dist_mlpl.methods.base import HEATMAPS, Method, MethodSettings, known_positives, step_output, training_targets
from dist_mlpl.methods.blends import (
    Blend,
    Coefficient,
    counted_bce,
    instance_blend,
    lendable,
    prototype_blend,
    quadrant,
)
from dist_mlpl.methods.costs import Cost, Scale
from dist_mlpl.methods.drawn_prototypes import NUM_QUADRANTS, DrawnPrototypes
from dist_mlpl.methods.unknown_loss import Named, pick, valid_index
from dist_mlpl.models.gated_graph import GatedGraphSettings
from dist_mlpl.models.label_counts import count_cooccurrence
from dist_mlpl.models.semantic import Decoupled, SemanticHead, SemanticSettings


class BlendingSettings(MethodSettings):
    """The settings of SARB and DSRB.

    The defaults of schedule, numbers of prototypes and classes, coefficients and weights are the reference code's, and
    so are the graph's steps and `head.attention_width`. Those of the rest of `head` are not: the code has
    `feature_width` 1024 with its BatchNorm, `pool` true, `head_width` 1024 and frozen GloVe vectors of width 300
    (`embeddings`). configs/dsrb_coco.yaml takes the head's sizes from configs/sst_coco.yaml, which has them as the code
    does; the vectors are a file of the user's.

    Args:
        head: attention and classifier.
        graph: the graph between classes.
        prototypes: `kmeans`: a class's prototypes are centres of its known positives' features (SARB); `quadrants`:
            their means by the quadrant of the map in which the class peaks; an image gets another quadrant's (DSRB).
        num_prototypes: prototypes per class, for `kmeans`.
        start_epoch: first epoch that blends, counted from 0.
        renew_every_epochs: epochs between renewals of the prototypes, from `start_epoch` on; until then every epoch but
            the first renews them.
        blended_classes: unknown labels per image that are mixed with prototypes in one step (topK).
        alpha, beta: initial share of the image's own feature, in mixtures with partners and with prototypes.
        instance_weight, prototype_weight: weights of the losses on these mixtures.
        contrastive_weight: lambda; its factor rho grows linearly from 0 to 1 over the first epoch.
        faithful: True: do as the reference code does where it differs; see `Blending`.
        bank_folder: local folder for the memory-mapped bank of prototypes; null: host memory.
    """

    name: Literal["blending"] = "blending"
    head: SemanticSettings = SemanticSettings()
    graph: GatedGraphSettings = GatedGraphSettings()
    prototypes: Literal["kmeans", "quadrants"] = "quadrants"
    num_prototypes: int = Field(10, ge=1)
    start_epoch: int = Field(5, ge=0)
    renew_every_epochs: int = Field(5, ge=1)
    blended_classes: int = Field(1, ge=1)
    alpha: float = Field(0.5, gt=0.0, lt=1.0)
    beta: float = Field(0.5, gt=0.0, lt=1.0)
    instance_weight: float = Field(1.0, ge=0.0)
    prototype_weight: float = Field(1.0, ge=0.0)
    contrastive_weight: float = Field(0.05, ge=0.0)
    faithful: bool = False
    bank_folder: str | None = None

    @model_validator(mode="after")
    def _refuse_what_the_prototypes_ignore(self) -> BlendingSettings:
        self.refuse_idle(("pooling", "dropout"), "attention and graph have none: leave it out")
        if self.prototypes == "quadrants":
            self.refuse_idle(("num_prototypes",), "quadrants are always four")
        return self

    def build(self, *, num_classes: int, image_size: int) -> Blending:
        return Blending(self, num_classes=num_classes, image_size=image_size)

    def is_renewing(self, epoch: int) -> bool:
        """True if an epoch begins with a renewal of the prototypes."""
        return epoch > 0 and (epoch <= self.start_epoch or (epoch - self.start_epoch) % self.renew_every_epochs == 0)


class Blending(Method):
    """Semantic-aware representation blending: a batch is classified unchanged and with its features mixed in two ways.

        f = decouple(backbone(image));  x, x1, x2 = classify(f), classify(f1), classify(f2)
        f1, y1 = f, y; where y is unknown and the partner's label is known present: alpha f + (1 - alpha) f_partner
        f2, y2 = f, y; at some unknown labels: beta f + (1 - beta) prototype
        L = BCE(x, y) + BCE(x1, y1) + BCE(x2, y2) + rho lambda L_cst(f, y)

    The label of a mixture is the share of its source in it. Each BCE is a mean over the global batch's known and mixed
    labels. Mixing begins at `start_epoch`; a class without prototypes is not mixed with prototypes.

    Source: SARB (Pu et al., AAAI 2022, arXiv 2203.02172), DSRB (Pu et al., ESWA 2024, arXiv 2205.13092), and their code
        for what the papers leave open.
    Differs, unless `faithful`:
        An image without enough unknown labels keeps its known ones (the code overwrites its first classes).
        alpha and beta stay strictly between 0 and 1 (at 1 the code's soft target is 0, unknown, and stays so).
        Soft targets are constants (the code's have a gradient, so alpha can lower the loss by changing the label).
        Every label draws its own k-means prototype (the code: one number for a whole step; with `faithful` one for each
            of an image's `blended_classes`, the same for all images).
        A quadrant's mean is that of its features (the code includes a row of zeros).
        A class peaks where its attention is largest (the code: where the attended map's sum over channels is).
        The graph and L_cst are those of `Sst`.
    Differs always:
        An image's partner is its mirror image in their group of images, not in a rank's batch.
        Prototypes are made from the training steps of the previous epoch (the code: from a pass in evaluation mode,
            DSRB's only over the first 100 positives of each class and quadrant). A renewal is one step of k-means that
            starts from the previous prototypes.
        DSRB's prototypes are summed over the cells, since mixtures are used only after that sum.
        Draws are keyed by seed, step and sample; prototypes and position are saved.

    Args:
        settings: the method's settings.
        num_classes: C.
        image_size: H = W in pixels.
    """

    def __init__(self, settings: BlendingSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__(settings, num_classes=num_classes, image_size=image_size)
        self.settings = settings
        self.head = SemanticHead(
            settings.head, settings.graph, num_features=self.backbone.num_features, num_classes=num_classes
        )
        self.alpha = Coefficient(settings.alpha, is_clamped=settings.faithful)
        self.beta = Coefficient(settings.beta, is_clamped=settings.faithful)

    def begin_run(self, *, num_samples: int, epoch_samples: int, group_size: int, seed: int) -> None:
        super().begin_run(num_samples=num_samples, epoch_samples=epoch_samples, group_size=group_size, seed=seed)
        self._epoch_samples, self._group_size, settings = epoch_samples, group_size, self.settings
        self._prototypes = DrawnPrototypes(
            settings.prototypes,
            num_classes=self.num_classes,
            num_prototypes=settings.num_prototypes,
            width=self.head.width,
            seed=seed,
            count=settings.blended_classes,
            faithful=settings.faithful,
            folder=settings.bank_folder,
        )

    def read_labels(self, labels: Labels) -> None:
        counts = count_cooccurrence(labels, labels.samples.num_samples, self.num_classes)
        self.notes += self.head.check_classes(labels.samples.manifest.class_ids) + attention_notes()
        self.head.set_cooccurrence(counts, is_biased=self.settings.faithful)

    def banks(self) -> dict[str, Bank]:
        return {self._prototypes.bank.name: self._prototypes.bank}

    def costs(self, scale: Scale) -> list[Cost]:
        """See `Method.costs`: the prototypes, and the two classifications of mixtures, which only training makes."""
        C, D, graph = self.num_classes, self.head.width, self.head.graph
        width = self.settings.head.head_width or D
        kept = C * ((graph.num_steps + 2) * D + width)  # numbers of one classification of an image
        messages, updates = (graph.num_steps * C * D * n for n in (2 * graph.num_neighbours, 9 * D))
        classified = C * width * (2 * D + 1)
        return [
            self._prototypes.cost(scale),
            # The backward pass recomputes the forward of updates.
            Cost("mixtures", kept_bytes=2 * 4.0 * kept, flops=2 * (6.0 * (messages + classified) + 8.0 * updates)),
        ]

    def begin_epoch(self, progress: Progress) -> None:
        """Renew the prototypes if they are due.

        Collective: all ranks, see `Prototypes.renew`.
        """
        super().begin_epoch(progress)
        if self.settings.is_renewing(progress.epoch):
            self._prototypes.bank.renew()

    @torch.no_grad()
    def recall(self, batch: Batch, progress: Progress) -> Named:
        """See `Method.recall`; adds what the whole step shares.

        `num_contrasted`, and once blending has begun `num_lent`, `num_drawn` and `num_overwritten`: (1,) float32 counts
        over the global batch, from which the losses' divisors follow. `ramp` rho and `is_gathering`, (1,) on the CPU.
        Once blending has begun, the result of `DrawnPrototypes.draw`.

        Collective: all ranks, two all-reduces of 8 and 4 bytes; of 8 and 16 once blending has begun.
        """
        settings, device, targets = self.settings, batch.valid.device, training_targets(batch)
        ramp = progress.samples_consumed / self._epoch_samples if progress.epoch == 0 else 1.0
        recalled = super().recall(batch, progress) | {
            "ramp": torch.tensor([ramp]),
            "is_gathering": torch.tensor([settings.is_renewing(progress.epoch + 1)]),
        }
        counts = {
            "num_contrasted": num_contrasted(
                targets, group_size=self._group_size, keep_negatives_alone=settings.faithful
            )
        }
        if progress.epoch >= settings.start_epoch:
            index, rows = valid_index(batch)
            drawn = self._prototypes.draw(index.cpu(), targets[rows].cpu(), progress.step)
            recalled |= {name: tensor.to(device) for name, tensor in drawn.items()}
            classes = recalled["drawn_classes"]  # (n, k)
            is_drawn = classes >= 0
            is_known = targets[rows].gather(1, classes.clamp(min=0)) != UNKNOWN
            counts["num_lent"], counts["num_drawn"] = self._lent(batch).sum(), is_drawn.sum()
            counts["num_overwritten"] = (is_drawn & is_known).sum()
        totals = comm.reduce_sum(torch.stack(list(counts.values())).float())
        return recalled | dict(zip(counts, totals.split(1), strict=True))

    def forward(self, batch: Batch, recalled: Named | None) -> StepOutput:
        is_located = recalled is not None and self.settings.prototypes == "quadrants"
        feature_map = self.backbone(batch.images)
        found = self.head.decouple(feature_map, with_attention=is_located or self.is_asked(HEATMAPS))
        f = found.class_features  # (B, C, D)
        heatmaps = found.attention if self.is_asked(HEATMAPS) else None
        extras = {"embedding": feature_map.mean(dim=(2, 3), dtype=f.dtype), HEATMAPS: heatmaps}
        if recalled is None:
            return step_output(self.head.classify(f), {}, extras)

        quadrants = quadrant_of(found, faithful=self.settings.faithful) if is_located else None
        with torch.autocast(f.device.type, enabled=False):
            blends = self._blends(f, quadrants, batch, recalled)
        x = self.head.classify(torch.cat([blend.features for blend in blends])).split(len(f))  # one call: gathered once
        with torch.autocast(f.device.type, enabled=False):
            terms = self._losses(x, f, blends, batch, recalled)
        if bool(recalled["is_gathering"]):
            rows, classes = known_positives(batch).nonzero(as_tuple=True)
            extras |= {"positive_class": classes, "positive_feature": f[rows, classes]}
            extras |= {"positive_index": batch.index[rows]}
            extras |= {} if quadrants is None else {"positive_quadrant": quadrants[rows, classes]}
        return step_output(x[0], terms, extras)

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Add the features of known positives to the prototypes' sums, if they are renewed after this epoch.

        Collective: all ranks, see `Prototypes.add`.
        """
        extras = output.extras
        if "positive_class" in extras:
            self._prototypes.add(
                extras["positive_class"],
                extras["positive_feature"],
                extras.get("positive_quadrant"),
                extras["positive_index"],
            )

    def _blends(self, f: Tensor, quadrants: Tensor | None, batch: Batch, recalled: Named) -> list[Blend]:
        """Return f (B, C, D) unchanged and, once blending has begun, mixed with partners and with prototypes."""
        faithful, y = self.settings.faithful, training_targets(batch)
        blends = [Blend(f, y, y != UNKNOWN)]
        if "drawn_index" in recalled:
            lent = self._lent(batch)
            blends.append(instance_blend(f, y, lent, self.alpha(f), group_size=self._group_size, faithful=faithful))
            valid = batch.valid.nonzero().squeeze(1)
            classes, prototypes, turn = (
                pick(recalled["drawn_index"], recalled[f"drawn_{part}"], batch.index[valid])
                for part in ("classes", "prototypes", "turn")
            )  # (n, k), (n, k, Q, D), (n, k)
            image, place = (classes >= 0).nonzero(as_tuple=True)  # (m,) each: an image and one of its draws
            rows, columns = valid[image], classes[image, place]
            slots = torch.zeros_like(rows)
            if quadrants is not None:
                slots = (quadrants[rows, columns] - turn[image, place]) % NUM_QUADRANTS  # never the image's own
            chosen = prototypes[image, place, slots]  # (m, D)
            blends.append(prototype_blend(f, y, rows, columns, chosen, self.beta(f), faithful=faithful))
        return blends

    def _losses(self, x: Sequence[Tensor], f: Tensor, blends: list[Blend], batch: Batch, recalled: Named) -> Named:
        """Compute shares of the global batch's loss, by term, from logits x (B, C) of each blend."""
        settings, alpha, beta = self.settings, self.alpha(f), self.beta(f)
        bce = [counted_bce(logits, blend.targets, blend.is_counted) for logits, blend in zip(x, blends, strict=True)]
        contrastive = contrastive_loss(
            f, training_targets(batch), group_size=self._group_size, keep_negatives_alone=settings.faithful
        )
        known = recalled["num_known"]
        if len(blends) == 1:  # the same parameters take part in every step
            instance, prototype = 0.0 * alpha.sum(), 0.0 * beta.sum()
        else:
            instance = bce[1] / self._num_counted(known, recalled["num_lent"], alpha)
            prototype = bce[2] / self._num_counted(known - recalled["num_overwritten"], recalled["num_drawn"], beta)
        return {
            "bce": bce[0] / known.clamp(min=1).squeeze(),
            "instance": settings.instance_weight * instance,
            "prototype": settings.prototype_weight * prototype,
            "contrastive": float(recalled["ramp"])
            * settings.contrastive_weight
            * contrastive
            / recalled["num_contrasted"].clamp(min=1).squeeze(),
        }

    def _lent(self, batch: Batch) -> Tensor:
        """(B, C) bool, True for labels that partners complete."""
        is_unknown = (training_targets(batch) == UNKNOWN) & batch.valid[:, None]
        return lendable(is_unknown, known_positives(batch), group_size=self._group_size)

    def _num_counted(self, num_known: Tensor, num_mixed: Tensor, share: Tensor) -> Tensor:
        """() number of entries that a BCE counts, at least 1; with `faithful` without those whose target is 0."""
        if self.settings.faithful:
            num_mixed = num_mixed * (share.detach() < 1)
        return (num_known + num_mixed).clamp(min=1).squeeze()


def quadrant_of(found: Decoupled, *, faithful: bool = False) -> Tensor:
    """(B, C) int64, the quadrant of the map in which each class's attention peaks.

    With `faithful`, as in the code, where sum_d a_cl F_ld peaks: more attention to a cell of negative sum lowers it.
    """
    assert found.attention is not None
    assert found.cell_sums is not None
    evidence = found.attention * found.cell_sums[:, None] if faithful else found.attention  # (B, C, h, w)
    height, width = evidence.shape[2:]
    return quadrant(evidence.flatten(2).argmax(dim=2), height=height, width=width)
