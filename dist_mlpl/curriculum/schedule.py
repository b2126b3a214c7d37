"""Owns the settings of a curriculum, and the epochs in which its rounds are due."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field, model_validator

from dist_mlpl.errors import ConfigError
from dist_mlpl.settings import Location, Settings

Strategy = Literal[
    "score_threshold", "score_fraction", "positive_only", "ensemble", "uncertainty", "class_precision", "neighbours"
]  # fmt: skip

MAX_ENTRIES: Final = 1_000_000_000  # most beliefs that a round may hold: 10 GB on disk before compression
MAX_SCORE: Final = 65504.0  # scores are float16

# Keys that affect a round only under some strategies, by key.
USED_BY: Final[dict[str, tuple[str, ...]]] = {
    "threshold": ("score_threshold", "positive_only", "ensemble", "neighbours"),
    "fraction": ("score_fraction",),
    "checkpoints": ("ensemble",),
    "runs": ("ensemble",),
    "max_variance": ("uncertainty",),
    "num_passes": ("uncertainty",),
    "precision": ("class_precision",),
    "min_known": ("class_precision",),
    "num_neighbours": ("neighbours",),
}
# Keys that do not affect a round's content: when it is due, what is only reported, and which models score (a plan
# lists those by digest).
_NOT_DECIDING: Final = {
    "strategy", "start_epoch", "every_epochs", "num_rounds", "measure_hidden", "checkpoints", "runs",
}  # fmt: skip
_DEFAULT_THRESHOLDS: Final = {"score_threshold": 2.0, "positive_only": 5.0, "ensemble": 2.0, "neighbours": 2.0}


class CurriculumSettings(Settings):
    """When a run asks its own model about unknown labels, and which answers it believes.

    A score x is the model's logit (its mean over models or passes) for an unknown label. The answer is present for
    x >= 0, absent for x < 0; it is believed under

      score_threshold  x >= threshold, or x < -threshold (0 believes every answer: the paper's "2 steps")
      score_fraction   the `fraction` of all unknown labels of the split with the largest |x|
      positive_only    x >= threshold
      ensemble         as score_threshold, with x the mean over several models
      uncertainty      variance of x over passes with dropout <= max_variance; with `flips`, the mean of the variances
                       of an image and of its mirror image, each over `num_passes` passes
      class_precision  x beyond a threshold of each class and sign: the lowest at which a share `precision` of such
                       answers about the class's known labels is right
      neighbours       as score_threshold, with x = log((p + 1) / (a + 1)), where p of the most similar images are known
                       to show the class and a are known not to

    Similarity is the cosine of the images' embeddings from the scoring pass, in float16.

    Source: Durand et al., CVPR 2019: the first five strategies, and thresholds 2 and 5 and the fraction 0.8 as others
        quote them; 0.3 and the ensemble's 2 are from memory. The numbers of passes and checkpoints, the first epoch,
        class_precision and neighbours are our own choices.
    """

    strategy: Strategy  # the rule by which answers are believed
    start_epoch: int = Field(1, ge=1)  # the first round comes before this epoch (0 is the first of a run)
    every_epochs: int | None = Field(None, ge=1)  # epochs between rounds; null: one round only
    num_rounds: int | None = Field(None, ge=1)  # most rounds; null: no limit

    threshold: float | None = Field(None, ge=0.0, le=MAX_SCORE)  # in logits; null: 2, for positive_only 5
    fraction: float = Field(0.8, gt=0.0, le=1.0)  # share of the unknown labels that score_fraction believes
    checkpoints: int = Field(3, ge=1)  # newest checkpoints of this run, the present model among them
    runs: tuple[Location, ...] = ()  # further members: RUN for its newest commit, RUN@STEP for that of a step
    max_variance: float = Field(0.3, gt=0.0, le=MAX_SCORE)  # in squared logits
    num_passes: int = Field(20, ge=2)  # forward passes with dropout, over which uncertainty takes the variance
    precision: float = Field(0.95, gt=0.5, le=1.0)  # share of right answers that class_precision asks for
    min_known: int = Field(20, ge=1)  # a class with fewer answers about known labels uses the threshold of all classes
    num_neighbours: int = Field(100, ge=1)  # number of most similar images whose known labels vote

    flips: bool = False  # average the scores of each image and its mirror image (under neighbours, their embeddings)
    keep_soft: bool = False  # keep sigmoid(x) beside each belief, as `soft_targets`
    cumulative: bool = False  # beliefs stay in later rounds; otherwise every round starts from human labels
    agree_rounds: int = Field(1, ge=1)  # believe what this many consecutive rounds proposed, this one included
    max_per_image: int | None = Field(None, ge=1)  # most beliefs of each sign per image; the strongest stay
    max_per_class: int | None = Field(None, ge=1)  # most beliefs of each sign per class; the strongest new ones stay
    # most beliefs of a sign in a class, as a multiple of the number expected from its share among the class's known
    # labels, and, where those are few, among all classes' (`caps.class_limits`)
    prior_quota: float | None = Field(None, gt=0.0)
    measure_hidden: bool = True  # compare beliefs with labels that a view hides; reported, never used

    @property
    def logit_threshold(self) -> float:
        """`threshold` in logits, or the strategy's default; 0 for strategies without one."""
        return _DEFAULT_THRESHOLDS.get(self.strategy, 0.0) if self.threshold is None else self.threshold

    @property
    def parameters(self) -> dict[str, Any]:
        """The settings that decide a round, besides the strategy's name and the models."""
        unused = {key for key, strategies in USED_BY.items() if self.strategy not in strategies}
        found = self.model_dump(mode="json", exclude=_NOT_DECIDING | unused)
        return found | ({"threshold": self.logit_threshold} if "threshold" in found else {})

    @property
    def num_signs(self) -> int:
        """2 if both present and absent labels may be believed, 1 if only present ones."""
        return 1 if self.strategy == "positive_only" else 2

    @property
    def has_class_caps(self) -> bool:
        """Whether the number of beliefs per class is limited."""
        return self.max_per_class is not None or self.prior_quota is not None

    @model_validator(mode="after")
    def _check(self) -> CurriculumSettings:
        fields = type(self).model_fields
        for key, strategies in USED_BY.items():
            if self.strategy not in strategies and getattr(self, key) != fields[key].default:
                raise ValueError(f"{key} is set, but {self.strategy} does not use it: {', '.join(strategies)} would")
        if self.strategy == "ensemble" and self.checkpoints + len(self.runs) < 2:
            raise ValueError("an ensemble of one model: raise `checkpoints`, or name other `runs`")
        if self.strategy == "neighbours" and self.logit_threshold == 0.0:
            raise ValueError("threshold 0 under neighbours: labels about which nobody votes would be believed present")
        if self.num_rounds is not None and self.num_rounds > 1 and self.every_epochs is None:
            raise ValueError(f"num_rounds {self.num_rounds} needs every_epochs")
        return self


def is_due(settings: CurriculumSettings, epoch: int) -> bool:
    """Whether a round is due before the first step of an epoch.

    Args:
        settings: the run's curriculum.
        epoch: number of epochs finished, which is the number of the next epoch.
    """
    since = epoch - settings.start_epoch
    if settings.every_epochs is None or since <= 0:
        return since == 0
    number, rest = divmod(since, settings.every_epochs)
    return rest == 0 and (settings.num_rounds is None or number < settings.num_rounds)


def check_bounded(settings: CurriculumSettings, *, num_samples: int, num_classes: int) -> None:
    """Refuse a round that could fill the disk: with 9 million images and 9,605 classes most labels are unknown.

    Args:
        settings: the run's curriculum.
        num_samples: N.
        num_classes: C.

    Raises:
        ConfigError: more than MAX_ENTRIES beliefs are possible.
    """
    most_an_image = num_classes
    if settings.max_per_image is not None:
        most_an_image = min(num_classes, settings.num_signs * settings.max_per_image)
    if num_samples * most_an_image > MAX_ENTRIES:
        least = MAX_ENTRIES // (num_samples * settings.num_signs)
        raise ConfigError(
            f"up to {num_samples * most_an_image:,} beliefs of {num_samples:,} samples and {num_classes:,} classes",
            expected=f"at most {MAX_ENTRIES:,}",
            where="curriculum.max_per_image",
            next_step=f"set curriculum.max_per_image to {max(1, least)} or less: the strongest of an image stay",
        )
