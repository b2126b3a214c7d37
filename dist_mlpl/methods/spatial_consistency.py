"""Owns EN + CL + SCL: expected negatives, and predictions and class maps compared with an image's own earlier ones."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from dist_mlpl.banks.base import Bank
from dist_mlpl.banks.heatmaps import (
    EMPTY,
    CellGrid,
    HeatmapBank,
    Slots,
    read_through_crop,
    visible_share,
    write_through_crop,
)
from dist_mlpl.banks.slots import renew_slots
from dist_mlpl.batch import METRIC, Batch, Progress, StepOutput
from dist_mlpl.labels import ABSENT, PRESENT
from dist_mlpl.losses.consistency import consistency_loss, spatial_consistency_loss
from dist_mlpl.losses.rowwise import NEVER, precise
from dist_mlpl.losses.single_positive import expected_negative_loss, num_expected_positives
from dist_mlpl.methods.base import HEATMAPS, Method, MethodSettings, step_output, training_targets
from dist_mlpl.methods.costs import Cost, Scale
from dist_mlpl.methods.unknown_loss import pick, valid_index
from dist_mlpl.models.class_maps import SlotHead

SLOTS: Final = "slots"  # the bank's name, and the prefix of its columns in `recalled` and extras
EVICTED: Final = f"{METRIC}slots_evicted_fraction"
HELD: Final = f"{METRIC}present_in_slots_fraction"
_PADDED = ("resnet", "resnext", "wide_resnet")  # strided layers of odd width, padded on both sides


class SpatialConsistencySettings(MethodSettings):
    """The weights of the three terms, and the memory they share.

    The paper's own numbers are not known; the defaults are starting values. Weights near 1 stop learning while the
    averages lag behind: for an unlikely class the gradient of L1, p (1 - p), nearly cancels that of cross-entropy, p.

    Args:
        expected_positives: EN: K, expected positives of an image; VOC 1.5, COCO 2.9, NUS-WIDE 1.9, CUB 31.4. Null: no
            EN, every unknown label is taken as absent (AN).
        consistency_weight: gamma, weight of CL; 0: without the term.
        spatial_weight: beta, weight of SCL; 0: without the term and the maps.
        warmup_epochs: number of first epochs with AN only; the memory is written from the start.
        ramp_fraction: share of the run, from its start, over which the weights of CL and SCL rise from 0; 0: no ramp.
            During `warmup_epochs` they are 0, so that after a long warm-up they start in the middle of the ramp.
        momentum: mu of the running averages of scores and maps.
        num_slots: M, classes remembered per image; at most C. Too few if a run reports that present labels have no slot
            (`present_in_slots_fraction` below 1) or that classes go on evicting one another.
        map_size: W, cells along a side of a remembered map of the full image.
        slot_margin: by how much a class must exceed the least likely remembered one to take its slot.
        trust_ratio: r_0: an annotated class counts in full while the view shows at least this share of the strongest
            evidence remembered for it, and in proportion below; from an image's third visit on. 0: always in full.
        use_centres: True: use the true centres of a residual net's cells, about half a cell to the top left of an even
            grid's.
        faithful: True: the re-implementation's form; see `SpatialConsistency`.
        bank_folder: local folder for the memory-mapped bank; null: host memory.
    """

    needs_places: ClassVar[bool] = True

    name: Literal["spatial_consistency"] = "spatial_consistency"
    expected_positives: float | None = Field(None, ge=0.5)
    consistency_weight: float = Field(0.1, ge=0.0)
    spatial_weight: float = Field(0.1, ge=0.0)
    warmup_epochs: int = Field(1, ge=0)
    ramp_fraction: float = Field(0.2, ge=0.0, le=1.0)
    momentum: float = Field(0.8, ge=0.0, lt=1.0)
    num_slots: int = Field(32, ge=1)
    map_size: int = Field(14, ge=1)
    slot_margin: float = Field(0.05, ge=0.0, lt=1.0)
    trust_ratio: float = Field(0.3, ge=0.0, le=1.0)
    use_centres: bool = True
    faithful: bool = False
    bank_folder: str | None = None

    @model_validator(mode="after")
    def _check_together(self) -> SpatialConsistencySettings:
        if self.expected_positives is None and self.consistency_weight == self.spatial_weight == 0.0:
            raise ValueError("no term is left: set expected_positives, consistency_weight or spatial_weight, or take "
                             "method single_positive with loss an")  # fmt: skip
        num_expected = 0 if self.expected_positives is None else num_expected_positives(self.expected_positives)
        if self.faithful:
            because = "with faithful an image's probability is the mean of its cells': leave it out"
            self.refuse_idle(("dropout", "pooling"), because)
            because = "faithful has slots for all classes, an even grid, and labels that count in full: leave it out"
            self.refuse_idle(("num_slots", "trust_ratio", "use_centres"), because)
        if self.spatial_weight == 0.0:
            self.refuse_idle(("map_size", "trust_ratio", "use_centres"), "without SCL there are no maps: leave it out")
        if self.consistency_weight == self.spatial_weight == 0.0:
            self.refuse_idle(("ramp_fraction",), "neither CL nor SCL has a weight that could rise: leave it out")
        if num_expected > self.num_slots and not self.faithful:
            raise ValueError(f"expected_positives {self.expected_positives:g} needs as many num_slots: classes outside "
                             "the slots are taken for absent")  # fmt: skip
        return self

    def build(self, *, num_classes: int, image_size: int) -> SpatialConsistency:
        return SpatialConsistency(self, num_classes=num_classes, image_size=image_size)


class SpatialConsistency(Method):
    """EN, CL and SCL on a fully convolutional head; losses are means over the valid images of the global batch.

    The bank `slots` holds, for each image, the running score and running map of its classes annotated present and of
    its likeliest unknown ones. A step reads it before it writes it.

    Source: Verelst et al., WACV 2023. No code is known; the rule of the expected negatives, weights and schedule are
        reconstructions.
    Differs: maps and scores of M classes per image, not of all: classes outside the slots are expected absent, and have
        no consistency terms. Cells never seen have no part; if a crop hides an annotated class, its label counts less
        in EN (CL still pulls it to 1).
    Faithful: closer to a third party's re-implementation: slots for all classes; maps that start at 0, or at 1
        for classes annotated present (its own start differs), so that SCL pulls unknown classes down until the average
        has forgotten the start; an image's probability is the mean of its cells' probabilities; an even grid; labels
        count in full. Its maps of 28 x 28 cells need `map_size: 28`.
    """

    def __init__(self, settings: SpatialConsistencySettings, *, num_classes: int, image_size: int) -> None:
        super().__init__(settings, num_classes=num_classes, image_size=image_size)
        self.settings, self._image_size = settings, image_size
        self._num_slots = num_classes if settings.faithful else min(settings.num_slots, num_classes)
        self._map_size = settings.map_size if settings.spatial_weight > 0 else 0
        self._use_trust = settings.trust_ratio > 0 and self._map_size > 0 and not settings.faithful
        self.head = SlotHead(
            self.backbone.num_features, num_classes, dropout=settings.dropout, pooling=settings.pooling
        )

    def begin_run(self, *, num_samples: int, epoch_samples: int, group_size: int, seed: int) -> None:
        super().begin_run(num_samples=num_samples, epoch_samples=epoch_samples, group_size=group_size, seed=seed)
        self._bank = HeatmapBank(
            SLOTS, num_samples, num_slots=self._num_slots, map_size=self._map_size, seed=seed,
            folder=self.settings.bank_folder,
        )  # fmt: skip

    def banks(self) -> dict[str, Bank]:
        return {SLOTS: self._bank}

    def costs(self, scale: Scale) -> list[Cost]:
        """See `Method.costs`; adds the class maps, which only training computes."""
        if not self._map_size:
            return super().costs(scale)
        M, width, L = self._num_slots, self.backbone.num_features, scale.num_cells
        maps = Cost("class maps", kept_bytes=4.0 * M * (width + L), flops=6.0 * M * width * L)
        return [*super().costs(scale), maps]

    @torch.no_grad()
    def recall(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """See `Method.recall`; adds the slots of the valid images, and the current K and ramp.

        Collective: all ranks, one all-reduce of 8 bytes and a read of the bank.
        """
        settings = self.settings
        recalled = super().recall(batch, progress)
        index, _ = valid_index(batch)
        slots = self._bank.read_slots(index)
        recalled |= {f"{SLOTS}/{name}": part.to(index.device) for name, part in slots._asdict().items()}
        is_warm = progress.epoch >= settings.warmup_epochs
        ramp = min(1.0, progress.fraction / settings.ramp_fraction) if settings.ramp_fraction > 0 else 1.0
        return recalled | {
            "remembered": index,
            "num_expected": torch.tensor([(settings.expected_positives or 0.0) if is_warm else 0.0]),
            "ramp": torch.tensor([ramp if is_warm else 0.0]),
        }

    def forward(self, batch: Batch, recalled: dict[str, Tensor] | None) -> StepOutput:
        feature_map = self.backbone(batch.images)
        is_asked, is_faithful = self.is_asked(HEATMAPS), self.settings.faithful
        head = self.head(feature_map, with_heatmaps=is_asked or is_faithful)
        logits = logits_of_mean_probs(head.heatmaps) if is_faithful and head.heatmaps is not None else head.logits
        extras: dict[str, Any] = {"embedding": head.embedding, HEATMAPS: head.heatmaps if is_asked else None}
        if recalled is None:
            return step_output(logits, {}, extras)
        valid = batch.valid
        x = logits[valid]
        before = Slots(*(pick(recalled["remembered"], recalled[f"{SLOTS}/{name}"], batch.index[valid])
                         for name in Slots._fields))  # fmt: skip
        slots = self._renewed(before, x.detach(), batch.targets[valid])
        classes = slots.classes.clamp(min=0)
        map_logits = self.head.class_maps(feature_map[valid], classes) if self._map_size else None
        with torch.autocast(logits.device.type, enabled=False):
            is_told = (slots.classes == before.classes) & (slots.classes != EMPTY)
            terms = self._terms(x, map_logits, batch, recalled, slots, is_told)
        probs = torch.sigmoid(x.detach()).gather(1, classes)
        mean = torch.lerp(probs, slots.scores, self.settings.momentum)
        extras |= {f"{SLOTS}/{name}": part for name, part in slots._replace(scores=mean)._asdict().items()}
        if map_logits is not None:
            extras[f"{SLOTS}/evidence"] = torch.sigmoid(map_logits.detach())
        num_valid = recalled["num_valid"].clamp(min=1).squeeze()
        evicted, held = slot_shares(before, slots, batch.targets[valid])
        extras |= {EVICTED: evicted / num_valid, HELD: held / num_valid}
        return step_output(logits, terms, extras)

    def observe(self, batch: Batch, output: StepOutput) -> None:
        super().observe(batch, output)
        valid = batch.valid
        slots = Slots(*(output.extras[f"{SLOTS}/{name}"] for name in Slots._fields))
        heatmaps = slots.heatmaps
        if self._map_size:
            evidence = output.extras[f"{SLOTS}/evidence"]
            heatmaps = write_through_crop(
                heatmaps, evidence, batch.crop[valid], batch.flipped[valid], self.settings.momentum,
                grid=self._grid(evidence.shape[-1]),
            )  # fmt: skip
        held = slots.classes.clamp(min=0)
        is_annotated = (batch.targets[valid].gather(1, held) == PRESENT) & (slots.classes != EMPTY)
        scores = slots.scores.masked_fill(is_annotated, 1.0).masked_fill(slots.classes == EMPTY, 0.0)
        self._bank.write_slots(
            batch.index[valid], slots._replace(scores=scores, heatmaps=heatmaps, visits=slots.visits + 1)
        )

    def _renewed(self, before: Slots, logits: Tensor, targets: Tensor) -> Slots:
        """Renew the slots by the newest predictions, see `renew_slots`; with `faithful`, fill in initial maps."""
        slots = renew_slots(before, torch.sigmoid(logits), targets, margin=self.settings.slot_margin)
        if not self.settings.faithful:
            return slots
        start = (targets.gather(1, slots.classes.clamp(min=0)) == PRESENT).to(slots.heatmaps.dtype)
        is_new = slots.heatmaps.isnan() & (slots.classes != EMPTY)[:, :, None, None]
        return slots._replace(heatmaps=torch.where(is_new, start[:, :, None, None], slots.heatmaps))

    def _terms(
        self,
        x: Tensor,
        map_logits: Tensor | None,
        batch: Batch,
        recalled: dict[str, Tensor],
        slots: Slots,
        is_told: Tensor,
    ) -> dict[str, Tensor]:
        """Compute this micro-batch's shares of the terms, by name.

        Args:
            x: (n, C) logits of the valid rows.
            map_logits: (n, M, G, G) maps of the slots' classes; None without maps.
            batch: B rows, n of them valid.
            recalled: see `recall`.
            slots: the slots of the valid rows, renewed.
            is_told: (n, M) bool, slots that have a history.
        """
        settings, valid = self.settings, batch.valid
        num_valid, ramp = recalled["num_valid"].clamp(min=1).squeeze(), recalled["ramp"].to(x.device).squeeze()
        trust = torch.ones_like(slots.scores)
        terms = {}
        if map_logits is not None:
            crop, flipped, G = batch.crop[valid], batch.flipped[valid], map_logits.shape[-1]
            history = read_through_crop(slots.heatmaps, crop, flipped, G, grid=self._grid(G))
            share = spatial_consistency_loss(map_logits, history) / num_valid
            terms["spatial"] = settings.spatial_weight * ramp * share
            if self._use_trust:
                shown = (visible_share(slots.heatmaps, crop) / settings.trust_ratio).clamp(max=1.0)
                trust = torch.where(slots.visits[:, None] >= 2, shown, trust)
        if settings.consistency_weight > 0:
            share = consistency_loss(x.gather(1, slots.classes.clamp(min=0)), slots.scores, is_told) / num_valid
            terms["consistency"] = settings.consistency_weight * ramp * share
        num_expected = float(recalled["num_expected"])
        loss = classification_loss(x, training_targets(batch)[valid], slots, is_told, trust, num_expected)
        return {"classification": loss / (num_valid * self.num_classes)} | terms

    def _grid(self, num_cells: int) -> CellGrid | None:
        """The grid of the trunk's cells, `num_cells` along a side; None for an even grid."""
        if not self.settings.use_centres or self.settings.faithful:
            return None
        return cell_grid(self.settings.backbone.name, self._image_size, num_cells)


def slot_shares(before: Slots, slots: Slots, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the metrics that tell whether M slots per image are too few.

    Args:
        before, slots: the slots of n images, as remembered and as renewed.
        targets: (n, C) int8 in {-1, 0, 1}, human labels.

    Returns:
        () each, sums over images: of the share of slots that another class took from one still allowed to hold it, and
        of the share of present labels that have a slot, 1 for an image without present labels.
    """
    is_held = (before.classes != EMPTY) & (targets.gather(1, before.classes.clamp(min=0)) != ABSENT)
    is_evicted = is_held & (slots.classes != before.classes)
    has_slot = (targets.gather(1, slots.classes.clamp(min=0)) == PRESENT) & (slots.classes != EMPTY)
    num_present = (targets == PRESENT).sum(dim=1)
    held = torch.where(num_present > 0, has_slot.sum(dim=1) / num_present, 1.0)
    return is_evicted.float().mean(dim=1).sum(), held.sum()


def classification_loss(
    logits: Tensor, targets: Tensor, slots: Slots, is_told: Tensor, trust: Tensor, num_expected: float
) -> Tensor:
    """Compute EN with unknown labels ranked by the slots' scores and present labels weighted by trust.

    Args:
        logits: (n, C).
        targets: (n, C) int8 in {-1, 0, 1}.
        slots: M for each image.
        is_told: (n, M) bool, slots with a history. An image without any is ranked by its own logits.
        trust: (n, M) in [0, 1], weight of a slot's class if it is present; other present labels count in full.
        num_expected: K; 0: AN.

    Returns:
        () sum over images and classes.
    """
    held, probs = slots.classes.clamp(min=0), torch.sigmoid(logits.detach())
    ranking = torch.full_like(probs, NEVER)  # a class without a slot is expected absent
    ranking = ranking.scatter_reduce(1, held, slots.scores.masked_fill(~is_told, NEVER), "amax")
    ranking = torch.where(is_told.any(dim=1, keepdim=True), ranking, probs)
    total = expected_negative_loss(logits, targets, ranking, expected_positives=num_expected)
    doubt = 1.0 - trust.masked_fill(slots.classes == EMPTY, 1.0)
    doubts = torch.zeros_like(probs).scatter_reduce(1, held, doubt, "amax")  # (n, C)
    return total + (doubts * F.logsigmoid(logits) * (targets == PRESENT)).sum()  # removes the doubted part of -log p


def logits_of_mean_probs(map_logits: Tensor) -> Tensor:
    """Compute the logits of the mean over cells of the maps' probabilities.

    log(sum p) - log(sum (1 - p)), from logarithms of p and 1 - p, so that neither the value nor its slope saturates.

    Args:
        map_logits: (B, C, h, w), any floating type; computed in float32, or float64 if given so.

    Returns:
        (B, C).
    """
    cells = map_logits.to(precise(map_logits)).flatten(2)
    return F.logsigmoid(cells).logsumexp(dim=2) - F.logsigmoid(-cells).logsumexp(dim=2)


def cell_grid(backbone: str, image_size: int, num_cells: int) -> CellGrid | None:
    """The grid of a trunk's cells along a side of the image; None for an even grid.

    In a residual net each strided layer is padded equally on both sides, so that cell a is centred on pixel a * stride,
    not on the centre of the a-th of G equal parts: a view and its mirror image disagree by almost a cell.

    Args:
        backbone: the trunk's name.
        image_size: S, pixels.
        num_cells: G, cells along a side; the stride is the power of two nearest to S / G on a logarithmic scale.
    """
    if not backbone.startswith(_PADDED):
        return None
    return CellGrid(side=image_size, stride=2.0 ** round(math.log2(image_size / num_cells)), first=0.5)
