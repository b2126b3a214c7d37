"""Owns SST: known labels complete unknown ones inside an image (IST) and from other images (CST)."""

from __future__ import annotations

import math
from typing import Final, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.ring import Ring
from dist_mlpl.batch import Batch, Progress, StepOutput
from dist_mlpl.data.label_store import Labels
from dist_mlpl.kernels.semantic_attention import attention_notes
from dist_mlpl.labels import PRESENT, UNKNOWN
from dist_mlpl.losses.contrastive import contrastive_loss, num_contrasted
from dist_mlpl.losses.cooccurrence import cooccurrence_loss
from dist_mlpl.losses.partial_bce import image_mean_bce, masked_mean_bce
from dist_mlpl.methods.base import HEATMAPS, Method, MethodSettings, known_positives, step_output, training_targets
from dist_mlpl.methods.costs import Cost, Scale, bank_cost, exchange_bytes, pair_counts
from dist_mlpl.models.cooccurrence import PairHead, Pairs, PairSettings
from dist_mlpl.models.gated_graph import GatedGraphSettings
from dist_mlpl.models.label_counts import count_cooccurrence
from dist_mlpl.models.semantic import SemanticHead, SemanticSettings

RING: Final = "positives"
_EPSILON: Final = 1e-9  # lower bound of a feature's length when it is divided by it


class SstSettings(MethodSettings):
    """SST's models, losses and schedule.

    The defaults of `ring_capacity` and the schedule, thresholds and weights are the reference code's, and so are the
    graph's steps, `pairs`' widths and `head.attention_width`. Those of the rest of `head` are not: the code has
    `feature_width` 1024 with its BatchNorm, `pool` true, `head_width` 1024 and frozen GloVe vectors of width 300
    (`embeddings`); nor is `normalization`, where the code has one mean over all labels, as with `faithful`.
    configs/sst_coco.yaml sets the head's sizes as the code has them; the vectors are a file of the user's.

    Args:
        head: attention and classifier.
        graph: the graph between classes.
        pairs: the head that predicts which classes are present together.
        ring_capacity: K, features kept per class.
        start_epoch: first epoch with transferred labels, counted from 0.
        threshold: theta at `start_epoch`, the score from which an unknown label is taken as present.
        threshold_step: by how much theta falls with each further epoch.
        threshold_floor: the lowest value of theta.
        intra_weight, inter_weight: w1 and w2, weights of the losses on labels transferred inside an image and from
            other images.
        pair_loss_weight: lambda1, weight of the pair head's loss.
        contrastive_weight: lambda2, weight of the contrastive loss.
        normalization: of BCE: `image_mean`, the mean over images of the mean over their labels; `masked_mean`, the sum
            over labels divided by the number of known ones in the global batch.
        faithful: True: do as the reference code does where it differs; see `Sst`.
        bank_folder: local folder for the memory-mapped ring; null: host memory.
    """

    name: Literal["sst"] = "sst"
    head: SemanticSettings = SemanticSettings()
    graph: GatedGraphSettings = GatedGraphSettings()
    pairs: PairSettings = PairSettings()
    ring_capacity: int = Field(100, ge=1, le=1 << 20)
    start_epoch: int = Field(5, ge=0)
    threshold: float = Field(0.95, gt=0.0, le=1.0)
    threshold_step: float = Field(0.025, ge=0.0)
    threshold_floor: float = Field(0.75, gt=0.0, le=1.0)
    intra_weight: float = Field(1.0, ge=0.0)
    inter_weight: float = Field(1.0, ge=0.0)
    pair_loss_weight: float = Field(10.0, ge=0.0)
    contrastive_weight: float = Field(0.05, ge=0.0)
    normalization: Literal["image_mean", "masked_mean"] = "image_mean"
    faithful: bool = False
    bank_folder: str | None = None

    @model_validator(mode="after")
    def _refuse_what_the_code_ignores(self) -> SstSettings:
        self.refuse_idle(("pooling", "dropout"), "attention and graph have none: leave it out")
        if self.faithful:
            self.refuse_idle(("normalization",), "with faithful it is the code's: leave one of them out")
        if self.threshold < self.threshold_floor:
            raise ValueError(f"threshold {self.threshold:g} is below threshold_floor {self.threshold_floor:g}, which "
                             "theta never passes: lower the floor too")  # fmt: skip
        return self

    def build(self, *, num_classes: int, image_size: int) -> Sst:
        return Sst(self, num_classes=num_classes, image_size=image_size)

    def threshold_at(self, epoch: int) -> float:
        """theta in the given epoch; infinity before `start_epoch`."""
        if epoch < self.start_epoch:
            return math.inf
        return max(self.threshold_floor, self.threshold - self.threshold_step * (epoch - self.start_epoch))


class Sst(Method):
    """Structured semantic transfer.

        x = classify(f);  f = decouple(backbone(image))
        L = BCE(x, y) + w1 BCE(x, yI) + w2 BCE(x, yC) + rho (lambda1 L_ist + lambda2 L_cst)

    yI and yC are y where it is known, and present where a score of an unknown label reaches theta: for yI the
    probability of the class given those known present in the image, for yC the similarity of the image's feature to the
    class's known positives in the ring. rho grows linearly from 0 to 1 over the first epoch.

    Source: Chen et al., AAAI 2022 (arXiv 2112.10941), and its code for what the paper leaves open.
    Differs, unless `faithful`:
        A_ij counts only images where j is known (the code's is too small by a factor r at a share r of known labels).
        L_ist is over pairs with both labels known (the code counts a pair with an unknown label as not together).
        The mean similarity is over the ring's filled entries (the code always divides by K).
        A group of images without a pair of positives has no part in L_cst (the code counts all its other pairs).
        BCE is the paper's as we recall it, a mean over images of means over their labels (the code's is one mean over
            all labels; with `faithful` transferred labels are counted over a micro-batch on all ranks).
            `normalization: masked_mean` is close to the code's: transferred labels add to the sum, not to the count.
    Differs always:
        Classes never seen have rows of the identity in A (NaN in the code).
        The ring is read before the step and written after it, and its means are one step late (the code writes first).
        L_cst is over groups of images, and its random draw is replaced by its expected value.
        Thresholds and ramp are functions of the position, and the ring is saved: a resumed run continues unchanged.
    """

    def __init__(self, settings: SstSettings, *, num_classes: int, image_size: int) -> None:
        super().__init__(settings, num_classes=num_classes, image_size=image_size)
        self.settings = settings
        self.head = SemanticHead(
            settings.head, settings.graph, num_features=self.backbone.num_features, num_classes=num_classes
        )
        self.pair_head = PairHead(settings.pairs, self.head.width, num_classes)

    def begin_run(self, *, num_samples: int, epoch_samples: int, group_size: int, seed: int) -> None:
        super().begin_run(num_samples=num_samples, epoch_samples=epoch_samples, group_size=group_size, seed=seed)
        self._epoch_samples, self._group_size = epoch_samples, group_size
        settings = self.settings
        self._ring = Ring(
            RING, self.num_classes, settings.ring_capacity, self.head.width, folder=settings.bank_folder
        )  # fmt: skip

    def read_labels(self, labels: Labels) -> None:
        counts = count_cooccurrence(labels, labels.samples.num_samples, self.num_classes)
        self.notes += self.head.check_classes(labels.samples.manifest.class_ids) + attention_notes()
        self.head.set_cooccurrence(counts, is_biased=self.settings.faithful)
        self.pair_head.set_cooccurrence(counts)

    def banks(self) -> dict[str, Bank]:
        return {RING: self._ring}

    def costs(self, scale: Scale) -> list[Cost]:
        """See `Method.costs`: the ring with its means on every rank, and the pair head, which only training uses."""
        C, D, R, pairs = self.num_classes, self.head.width, scale.world_size, self.settings.pairs
        ring = bank_cost(RING, self._ring, scale, reads=0, writes=0)
        num_rows = scale.share_images * scale.num_positives + scale.num_touched_classes  # R times a share of 1 / R
        sent = exchange_bytes(num_rows, self._ring.record_bytes, R, is_expected=True)
        sent += (R - 1) * self._ring.note_bytes
        num_pairs, num_ends = pair_counts(
            scale.targets, self.pair_head.num_neighbours, trains_all=self.settings.faithful
        )  # fmt: skip
        kept = num_ends * (D + pairs.class_width + pairs.pair_width)
        products = num_ends * pairs.class_width * (D + pairs.pair_width) + num_pairs * pairs.pair_width
        return [
            ring._replace(held_bytes=ring.held_bytes + C * (4 * D + 8), sent_bytes=sent),
            Cost("pairs", kept_bytes=4.0 * kept + 24.0 * num_pairs, flops=6.0 * products),
        ]

    @torch.no_grad()
    def recall(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """See `Method.recall`; adds what the whole step shares.

        `num_pairs` and `num_contrasted`, (1,) int64 over the global batch; `ring_means` (C, D) and `ring_counts` (C,);
        `threshold` theta and `ramp` rho, (1,) on the CPU.

        Collective: all ranks; all-reduces of 8 and 16 bytes, and `Ring.means`.
        """
        targets = training_targets(batch)
        contrasted = num_contrasted(
            targets, group_size=self._group_size, keep_negatives_alone=self.settings.faithful
        )  # fmt: skip
        own = torch.stack([contrasted.new_tensor(len(self._trained_pairs(targets, batch.valid).slot)), contrasted])
        num_pairs, contrasted = comm.reduce_sum(own).split(1)
        means, counts = self._ring.means(known_positives(batch).nonzero()[:, 1], device=batch.valid.device)
        ramp = progress.samples_consumed / self._epoch_samples if progress.epoch == 0 else 1.0
        return super().recall(batch, progress) | {
            "num_pairs": num_pairs,
            "num_contrasted": contrasted,
            "ring_means": means,
            "ring_counts": counts,
            "threshold": torch.tensor([self.settings.threshold_at(progress.epoch)]),
            "ramp": torch.tensor([ramp]),
        }

    def forward(self, batch: Batch, recalled: dict[str, Tensor] | None) -> StepOutput:
        feature_map = self.backbone(batch.images)
        found = self.head.decouple(feature_map, with_attention=self.is_asked(HEATMAPS))
        f, x = found.class_features, self.head.classify(found.class_features)  # (B, C, D), (B, C)
        extras = {"embedding": feature_map.mean(dim=(2, 3), dtype=f.dtype), HEATMAPS: found.attention}
        if recalled is None:
            return step_output(x, {}, extras)

        settings, y = self.settings, training_targets(batch)
        is_open = (y == UNKNOWN) & batch.valid[:, None]
        trained, asked = self._trained_pairs(y, batch.valid), self.pair_head.pairs(y == PRESENT, is_open)
        pair_logits = self.pair_head(f, trained.joined(asked))  # one call: ZeRO-3 gathers its weights once
        with torch.autocast(x.device.type, enabled=False):
            of_trained, of_asked = pair_logits.split([len(trained.slot), len(asked.slot)])
            ramp, theta = float(recalled["ramp"]), float(recalled["threshold"])
            y_intra = torch.where(is_open & (likely_beside(of_asked, asked, y) >= theta), PRESENT, y)
            y_inter = torch.where(is_open & (self._similarity(f, recalled) >= theta), PRESENT, y)
            bce, bce_intra, bce_inter = self._bce(x, [y, y_intra, y_inter], batch, recalled)
            is_transferring = theta != math.inf  # g_e
            terms = {
                "bce": bce,
                "bce_intra": is_transferring * settings.intra_weight * bce_intra,
                "bce_inter": is_transferring * settings.inter_weight * bce_inter,
                "intra": ramp * settings.pair_loss_weight * self._pair_loss(of_trained, trained, y, recalled),
                "inter": ramp * settings.contrastive_weight * self._contrastive_loss(f, y, recalled),
            }
        rows, classes = known_positives(batch).nonzero(as_tuple=True)
        positives = {"ring_class": classes, "ring_feature": f[rows, classes], "ring_position": batch.index[rows]}
        return step_output(x, terms, extras | positives)

    def observe(self, batch: Batch, output: StepOutput) -> None:
        """Push the features of known positives into the ring, in the order of sample indices.

        Collective: all ranks, see `Ring.push`: nothing moves.
        """
        extras = output.extras
        self._ring.push(extras["ring_class"], extras["ring_feature"], extras["ring_position"])

    def _trained_pairs(self, y: Tensor, valid: Tensor) -> Pairs:
        """The pairs that the pair head learns from."""
        is_in = valid[:, None].expand_as(y) if self.settings.faithful else y != UNKNOWN
        return self.pair_head.pairs(is_in, is_in)

    def _pair_loss(self, logits: Tensor, pairs: Pairs, y: Tensor, recalled: dict[str, Tensor]) -> Tensor:
        """() this micro-batch's share of L_ist, a mean over the pairs of the global batch."""
        is_together = (y[pairs.image, pairs.first] == PRESENT) & (y[pairs.image, pairs.second] == PRESENT)
        return cooccurrence_loss(logits, is_together) / recalled["num_pairs"].clamp(min=1).squeeze()

    def _contrastive_loss(self, f: Tensor, y: Tensor, recalled: dict[str, Tensor]) -> Tensor:
        """() this micro-batch's share of L_cst, a mean over the contrasted pairs of the global batch."""
        faithful = self.settings.faithful
        total = contrastive_loss(f, y, group_size=self._group_size, keep_negatives_alone=faithful)
        return total / recalled["num_contrasted"].clamp(min=1).squeeze()

    def _similarity(self, f: Tensor, recalled: dict[str, Tensor]) -> Tensor:
        """(B, C) mean cosine of each feature with those of its class in the ring; 0 where there are none."""
        similarity = mean_similarity(f.detach(), recalled["ring_means"])
        if self.settings.faithful:
            similarity = similarity * (recalled["ring_counts"] / self.settings.ring_capacity)
        return similarity

    def _bce(self, x: Tensor, targets: list[Tensor], batch: Batch, recalled: dict[str, Tensor]) -> list[Tensor]:
        """() each, this micro-batch's shares of the global batch's BCE on y, yI and yC, (B, C) each.

        Collective: with `faithful`, one all-reduce of 16 bytes, as the number of transferred labels is not known
        before.
        """
        num_valid, num_known = (recalled[name].clamp(min=1).squeeze() for name in ("num_valid", "num_known"))
        if not self.settings.faithful and self.settings.normalization == "image_mean":
            return [image_mean_bce(x, y) * (len(y) / num_valid) for y in targets]  # divides by padding too
        own = torch.stack([(y != UNKNOWN).sum() for y in targets] + [batch.valid.sum()]).float()  # (4,)
        share = own / num_known
        if self.settings.faithful:
            over_ranks = comm.reduce_sum(own.clone()).clamp(min=1)
            share[1:] = (own / over_ranks * (over_ranks[3] / num_valid))[1:]
        return [masked_mean_bce(x, y) * part for y, part in zip(targets, share, strict=False)]


def likely_beside(logits: Tensor, pairs: Pairs, targets: Tensor) -> Tensor:
    """The probability of each class given the classes known present in its image: r of IST.

    Args:
        logits: (M,) from the pair head, for pairs of a class known present and another; a missing pair counts as
            probability 0.
        pairs: the pairs of `logits`; the present class may be first or second.
        targets: (B, C) int8 in {-1, 0, 1}.

    Returns:
        (B, C) in [0, 1], a constant: the mean over the image's classes known present; 0 where there are none.

    Source: SST's IST, and its code.
    """
    receiver = torch.where(targets[pairs.image, pairs.second] == PRESENT, pairs.first, pairs.second)
    total = torch.zeros(targets.shape, dtype=logits.dtype, device=logits.device)
    total.index_put_((pairs.image, receiver), logits.detach().sigmoid(), accumulate=True)
    return total / (targets == PRESENT).sum(dim=1, keepdim=True).clamp(min=1)


def mean_similarity(class_features: Tensor, means: Tensor) -> Tensor:
    """The mean cosine of a feature with those of its class in the ring: its unit vector times the mean of theirs.

    Args:
        class_features: (B, C, D).
        means: (C, D), mean unit vectors, zeros for an empty class.

    Returns:
        (B, C) in [-1, 1].

    Source: SST's CST; equal to rounding.
    """
    lengths = torch.linalg.vector_norm(class_features, dim=-1).clamp(min=_EPSILON)
    return torch.einsum("bcd,cd->bc", class_features, means.to(class_features.dtype)) / lengths
