"""Owns pictures of a run's model: heatmaps of its classes, and images whose known labels could be transferred."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dist_mlpl import storage
from dist_mlpl.build import build_stream, build_view, open_samples
from dist_mlpl.chain import Commit, read_newest
from dist_mlpl.config import Config, read_run_config
from dist_mlpl.data.fetch import Fetcher
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stream import Stream
from dist_mlpl.data.transform import Transform
from dist_mlpl.engine import Engine, start
from dist_mlpl.errors import ConfigError
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN, Targets
from dist_mlpl.methods.base import HEATMAPS, images_alone
from dist_mlpl.tools.drawing import BAD, FAINT, GOOD, PLAIN, Line, above, heated, in_a_row, opened, stacked
from dist_mlpl.tools.judge import inference_settings, open_engine

_SIDE: Final = 176  # side of a tile's image in pixels
_MOST_NAMES: Final = 6  # most class names below an image
_HEATMAP_LEGEND: Final = (
    "Left: the image as the model sees it, its place in the split, and the classes that people call present. Right: "
    "the classes that the model finds likeliest, with their probabilities.",
    "Colours on an image: where the class was seen, from dark blue at the lowest evidence to yellow at the highest, "
    "each on the scale given below it. Evidence is the head's score of a cell; its unit depends on the method.",
    "green name: people call the class present. red: absent. black: nobody said.",
)
_TRANSFER_LEGEND: Final = (
    "Left: a train image, and the classes that the run is told it shows. Right: the images whose embeddings are "
    "nearest, with the cosine, and the classes that they could give: told of them, and not of the image on the left.",
    "green name: the label that the run's view hides agrees. red: it says absent. black: there is none.",
)

Indices = npt.NDArray[np.int64]


class Loan(NamedTuple):
    """An image, and another one whose known labels could complete it."""

    sample: int
    lender: int
    similarity: float  # cosine of the two embeddings


def draw_pictures(
    run: str,
    *,
    samples: Sequence[int] | None = None,
    split: str | None = None,
    num_samples: int = 4,
    num_tiles: int = 4,
    num_embedded: int = 2048,
    manifest_url: str | None = None,
    storage_options: dict[str, Any] | None = None,
) -> list[str]:
    """Draw what the model of a run's newest commit sees, into RUN/pictures.

    `heatmaps-...png` shows images with the heatmaps of their likeliest classes. `transfers-...png`, only if the run has
    a view, shows images of the train split, each with its nearest images by embedding among the first `num_embedded`,
    and the labels that these know to be present and it does not know; green where the hidden label agrees.

    Args:
        run: URL of the run folder, RUN.
        samples: samples of the split to draw heatmaps of; None for the first ones.
        split: split of the heatmaps; None for the run's evaluation split.
        num_samples: number of images drawn (heatmaps only if `samples` is None).
        num_tiles: number of classes, or of nearest images (lenders), per image.
        num_embedded: number of train images among which lenders are searched.
        manifest_url: where the run's shards are now, if they moved.
        storage_options: fsspec keywords for remote URLs.

    Returns:
        URLs of the pictures.

    Raises:
        ConfigError: no such sample, or tars without an index.
        CheckpointError: no run, no commit, or damaged files.
    """
    storage.configure_storage(storage_options)
    config = read_run_config(run)
    if manifest_url is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"manifest": manifest_url})})
    world = start(inference_settings(config))
    commit = read_newest(run)
    train, judged = _opened(config, split or config.data.eval_split)
    engine = open_engine(run, config, commit, train.manifest, world)
    chosen = np.array(range(min(num_samples, judged.num_samples)) if samples is None else samples, dtype=np.int64)
    _check(chosen, judged)
    sheets = {f"heatmaps-{judged.split}": _heatmap_sheet(engine, config, judged, chosen, num_tiles)}
    if _told_through_a_view(config):
        loans = _nearest(engine, config, train, num_embedded, num_samples, num_tiles)
        sheets[f"transfers-{train.split}"] = _transfer_sheet(config, train, loans)
    return [_save(run, commit, name, content) for name, content in sheets.items()]


def _opened(config: Config, split: str) -> tuple[SplitIndex, SplitIndex]:
    """Open the train split and the split to draw; both must have an index."""
    train, judged = open_samples(config.data, config.data.train_split, split)
    if isinstance(train, SplitIndex) and isinstance(judged, SplitIndex):
        return train, judged
    raise ConfigError(
        "tars without an index",
        expected="indexed shards: pictures are of single samples",
        where="data.unindexed",
        next_step="run `dist-mlpl shards index` first",
    )


def _check(chosen: Indices, index: SplitIndex) -> None:
    for sample in chosen[(chosen < 0) | (chosen >= index.num_samples)].tolist():
        raise ConfigError(
            f"sample {sample}",
            expected=f"a number in [0, {index.num_samples}), a sample's place in split {index.split!r}",
            where="--sample",
            next_step="choose one of these",
        )


def _told_through_a_view(config: Config) -> bool:
    return config.data.view is not None or config.data.is_view_asked


def _save(run: str, commit: Commit, name: str, content: bytes) -> str:
    url = storage.join(run, "pictures", f"{name}-{commit.step:08d}.png")
    storage.write_bytes(url, content)
    return url


# Heatmaps -------------------------------------------------------------------------------------------------------------


def _heatmap_sheet(engine: Engine, config: Config, index: SplitIndex, chosen: Indices, num_tiles: int) -> bytes:
    """Draw one row per image: the image as the model sees it, then its likeliest classes."""
    transform = Transform(config.transform, seed=config.seed, train=False)
    seen = [transform(content, epoch=0, position=0).image for content in _contents(index, chosen)]
    images = transform.normalise(torch.stack(seen).to(engine.device))
    with engine.method.asking(HEATMAPS):
        output = engine.predict(images_alone(images, engine.method.num_classes))
    probs, heatmaps = output.logits.sigmoid().cpu(), output.extras[HEATMAPS].float().cpu()
    targets, names = index.targets(chosen), _names(index)
    rows = []
    for place, sample in enumerate(chosen.tolist()):
        picture = Image.fromarray(seen[place].permute(1, 2, 0).contiguous().numpy()).resize((_SIDE, _SIDE))
        told = _listed("", [(names[c], PLAIN) for c in np.flatnonzero(targets[place] == PRESENT)])
        tiles = [above(picture, [(f"{index.split} {sample}", FAINT), *told], side=_SIDE)]
        for column in probs[place].topk(min(num_tiles, len(names))).indices.tolist():
            evidence = heatmaps[place, column].numpy()
            color = {PRESENT: GOOD, ABSENT: BAD, UNKNOWN: PLAIN}[int(targets[place, column])]
            lines: list[Line] = [
                (f"{names[column]}  {float(probs[place, column]):.2f}", color),
                (f"evidence {evidence.min():.2g} to {evidence.max():.2g}", FAINT),
            ]
            tiles.append(above(heated(picture, evidence), lines, side=_SIDE))
        rows.append(in_a_row(tiles))
    return stacked(rows, _HEATMAP_LEGEND)


# Transfers ------------------------------------------------------------------------------------------------------------


def _nearest(
    engine: Engine, config: Config, index: SplitIndex, num_embedded: int, num_samples: int, num_lenders: int
) -> list[Loan]:
    """Find the nearest images of the first `num_samples` ones by cosine of embeddings, without undecodable images."""
    stream = build_stream(config, index, None, engine.world, engine, train=False)
    assert isinstance(stream, Stream)
    try:
        labels = LabelStore(index).at(0)
        batches = stream.span_batches(labels, [(0, min(num_embedded, index.num_samples))], num_blocks=0)
        found = [(engine.predict(batch).extras["embedding"][batch.valid].cpu(), batch.index[batch.valid].cpu())
                 for batch in batches]  # fmt: skip
    finally:
        stream.close()
    units = torch.nn.functional.normalize(torch.cat([embedding for embedding, _ in found]), dim=1)  # (n, D)
    samples = torch.cat([numbers for _, numbers in found])  # (n,)
    similarity: Tensor = units[:num_samples] @ units.T
    similarity.fill_diagonal_(-torch.inf)
    best = similarity.topk(min(num_lenders, len(units) - 1))
    return [
        Loan(int(samples[row]), int(samples[column]), float(value))
        for row in range(len(similarity))
        for value, column in zip(best.values[row].tolist(), best.indices[row].tolist(), strict=True)
    ]


def _transfer_sheet(config: Config, index: SplitIndex, loans: Sequence[Loan]) -> bytes:
    """Draw one row per image: the image, then its lenders with the labels that they could give."""
    involved = np.unique([number for loan in loans for number in loan[:2]]).astype(np.int64)
    pictures = dict(zip(involved.tolist(), map(opened, _contents(index, involved)), strict=True))
    store = LabelStore(index, build_view(config.data, index)).at(0)
    told: dict[int, Targets] = dict(zip(involved.tolist(), store.targets(involved), strict=True))
    truth: dict[int, Targets] = dict(zip(involved.tolist(), index.targets(involved), strict=True))
    names, rows = _names(index), []
    for sample in dict.fromkeys(loan.sample for loan in loans):
        known = [(names[c], PLAIN) for c in np.flatnonzero(told[sample] == PRESENT)]
        head: list[Line] = [(f"{index.split} {sample}: known", FAINT), *_listed("nothing present", known)]
        tiles = [above(pictures[sample], head, side=_SIDE)]
        for loan in (loan for loan in loans if loan.sample == sample):
            given = np.flatnonzero((told[loan.lender] == PRESENT) & (told[sample] == UNKNOWN))
            lent = [(names[c], _color(int(truth[sample][c]))) for c in given]
            lines: list[Line] = [
                (f"{loan.lender}: cosine {loan.similarity:.3f}", FAINT),
                *_listed("gives nothing", lent),
            ]
            tiles.append(above(pictures[loan.lender], lines, side=_SIDE))
        rows.append(in_a_row(tiles))
    return stacked(rows, _TRANSFER_LEGEND)


def _color(hidden: int) -> tuple[int, int, int]:
    """Colour of a label that would be given, by the human label that the view hides."""
    return {PRESENT: GOOD, ABSENT: BAD, UNKNOWN: PLAIN}[hidden]


def _listed(nothing: str, entries: list[Line]) -> list[Line]:
    """The first few lines, and how many more there are; `nothing` if there are none."""
    if not entries:
        return [(nothing, FAINT)]
    more = len(entries) - _MOST_NAMES
    return [*entries[:_MOST_NAMES], *([(f"and {more} more", FAINT)] if more > 0 else [])]


def _contents(index: SplitIndex, chosen: Indices) -> Iterator[bytes]:
    """The JPEG bytes of some samples, in order."""
    fetcher = Fetcher(index)
    try:
        yield from fetcher.take(fetcher.begin(chosen))
    finally:
        fetcher.close()


def _names(index: SplitIndex) -> list[str]:
    return [entry.name for entry in index.manifest.classes]
