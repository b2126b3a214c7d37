"""Owns the picture of known labels and beliefs about single images."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from dist_mlpl import storage
from dist_mlpl.build import build_view
from dist_mlpl.config import Config
from dist_mlpl.data.fetch import Fetcher
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.overlays import Overlay, RoundCommit, read_overlay
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.errors import ConfigError
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN
from dist_mlpl.tools.drawing import BAD, FAINT, GOOD, PLAIN, Line, beside, opened, stacked

_SIDE: Final = 256  # longer side of an image in pixels
_WIDTH: Final = 420  # width of the text beside it in pixels

_MOST_LINES: Final = 8  # most labels shown of one kind, the strongest first


class _Labelled(NamedTuple):
    """What is known and believed about one image."""

    name: str
    told: np.ndarray  # (C,) int8, human labels as the run sees them
    hidden: np.ndarray  # (C,) int8, human labels that its view hides; 0 elsewhere
    believed: Overlay  # beliefs about this sample


def draw_samples(
    run: str, config: Config, commit: RoundCommit, index: SplitIndex, samples: list[int], *, out: str | None = None
) -> str:
    """Draw a PNG with a row per sample: the image, human labels, beliefs with scores, and whether hidden labels agree.

    Args:
        run: URL of the run folder, RUN.
        config: the run's config.
        commit: the round's commit.
        index: the train split.
        samples: sample indices in [0, N).
        out: path or URL of the picture, ending in .png; None for one in RUN/pictures.

    Returns:
        URL of the picture.

    Raises:
        ConfigError: no such sample, or an `out` with another ending.
        CheckpointError: a file of the round is missing or damaged.
    """
    if out is not None and not out.endswith(".png"):
        raise ConfigError(
            f"a picture {out!r}", expected="a name ending in .png", where="--out", next_step="correct the option"
        )
    for sample in samples:
        if not 0 <= sample < index.num_samples:
            raise ConfigError(
                f"sample {sample}",
                expected=f"a number in [0, {index.num_samples}), a sample's place in split {index.split!r}",
                where="--sample",
                next_step="choose one of these",
            )
    store = LabelStore(index, build_view(config.data, index), run=run)
    fetcher = Fetcher(index)
    try:
        images = list(fetcher.take(fetcher.begin(np.array(samples, dtype=np.int64))))
    finally:
        fetcher.close()
    rows = [
        beside(opened(image), _lines(_labelled(run, commit, store, index, sample), index), side=_SIDE, width=_WIDTH)
        for image, sample in zip(images, samples, strict=True)
    ]
    name = "-".join(map(str, samples[:8]))
    url = out or storage.join(run, "pictures", f"labels-{commit.round:06d}-{index.split}-{name}.png")
    legend = (
        f"Samples of split {index.split}, with their labels in round {commit.round}. people: what the run is told. "
        "model: what it believes, with its score, a logit: above 0 for present, below for absent.",
        "green, right: a label that the run's view hides agrees. red, wrong: it does not. black: there is none.",
    )
    storage.write_bytes(url, stacked(rows, legend))
    return url


def _labelled(run: str, commit: RoundCommit, store: LabelStore, index: SplitIndex, sample: int) -> _Labelled:
    where = np.array([sample])
    human, told = index.targets(where)[0], store.at(0).targets(where)[0]
    ((shard, row),) = index.rows(where)
    entry = index.shards[shard]
    overlay = read_overlay(run, commit, shard, num_samples=entry.num_samples, num_classes=len(human))
    own = overlay.where(slice(*np.searchsorted(overlay.rows, [row, row + 1])))
    hidden = np.where(told == UNKNOWN, human, UNKNOWN)
    return _Labelled(f"{sample}  {index.name(sample)}", told, hidden, own)


def _lines(labelled: _Labelled, index: SplitIndex) -> list[Line]:
    names = [entry.name for entry in index.manifest.classes]
    lines: list[Line] = [(labelled.name, FAINT)]
    for value, text in ((PRESENT, "people: present"), (ABSENT, "people: absent")):
        classes = np.flatnonzero(labelled.told == value)
        lines += _listed(text, [(names[c], PLAIN) for c in classes])
    beliefs = labelled.believed
    order = np.argsort(-np.abs(beliefs.scores.astype(np.float64)), kind="stable")
    for value, text in ((PRESENT, "model: present"), (ABSENT, "model: absent"), (UNKNOWN, "model: only proposed")):
        chosen = [place for place in order if beliefs.values[place] == value]
        found = []
        for place in chosen:
            column = int(beliefs.classes[place])
            truth, sign = labelled.hidden[column], 1 if beliefs.scores[place] >= 0 else -1
            color = PLAIN if truth == UNKNOWN else GOOD if truth == sign else BAD
            mark = "" if truth == UNKNOWN else "  right" if truth == sign else "  wrong"
            found.append((f"{names[column]}  {float(beliefs.scores[place]):+.2f}{mark}", color))
        lines += _listed(text, found)
    return lines


def _listed(title: str, entries: list[Line]) -> list[Line]:
    if not entries:
        return []
    shown = [("   " + text, color) for text, color in entries[:_MOST_LINES]]
    more = len(entries) - len(shown)
    return [(title, FAINT), *shown, *([(f"   and {more} more", FAINT)] if more else [])]
