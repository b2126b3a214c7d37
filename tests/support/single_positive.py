"""Owns which settings of the single-positive family tests run over: every loss once."""

from __future__ import annotations

from typing import Any

from dist_mlpl.batch import Progress

LATER = Progress(epoch=2, step=9, fraction=0.4)  # when thresholds, corrections and scores are in force

LOSSES: dict[str, dict[str, Any]] = {
    "an": {},
    "an_ls": {},
    "wan": {},
    "epr": {"expected_positives": 1.5},
    "role": {"expected_positives": 1.5},
    "en": {"expected_positives": 1.5},
    "em": {},
    "apl": {},
    "ll_r": {"large_fraction": 0.05},
    "ll_ct": {"large_fraction": 0.05},
    "ll_cp": {"large_fraction": 0.4},
    "splc": {},
    "hill": {},
}
