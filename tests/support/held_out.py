"""Owns which fraction a few small shards can hold out."""

from __future__ import annotations

import numpy as np

from dist_mlpl.data.held_out import hold_out
from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.errors import ConfigError


def possible_fraction(manifest: str) -> float:
    """The least from 0.2 on that whole shards of `train` come near enough to."""
    return next(fraction for fraction in np.arange(0.2, 0.8, 0.01).tolist() if _is_possible(manifest, fraction))


def _is_possible(manifest: str, fraction: float) -> bool:
    try:
        hold_out(load_manifest(manifest), "train", fraction)
    except ConfigError:
        return False
    return True
