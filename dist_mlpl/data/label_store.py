"""Owns what a sample's labels are at a given round: human labels, minus what the run's view hides.

Human labels live in the shards and never change. A known label always wins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dist_mlpl.data.tars import AnySamples
from dist_mlpl.data.views import View


class Labels(NamedTuple):
    """The labels in force for one stretch of a run."""

    samples: AnySamples
    view: View | None

    def targets(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int8]:
        """What a method may see of these samples.

        Args:
            indices: (n,) int64 in [0, N).

        Returns:
            (n, C) int8; entries that the view hides are 0 (unknown).
        """
        targets = self.samples.targets(indices)
        return targets if self.view is None else self.view.apply(targets, indices)


class LabelStore:
    """Labels of one split by round.

    Args:
        samples: the split.
        view: what to hide, or None for all that people said.
    """

    def __init__(self, samples: AnySamples, view: View | None = None) -> None:
        self.samples = samples
        self._view = view

    @property
    def view_digest(self) -> str | None:
        """Digest of the view, part of every commit; None without one."""
        return None if self._view is None else self._view.digest

    def at(self, round_number: int) -> Labels:
        """Labels in force at a committed round; round 0 holds no beliefs.

        Raises:
            ValueError: a round this store does not hold.
        """
        if round_number != 0:
            raise ValueError(f"round {round_number} of a store that holds none")
        return Labels(self.samples, self._view)
