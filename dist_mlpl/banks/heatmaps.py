"""Owns class heatmaps of full images: read and written through a crop and flip, kept as u8 in a few slots per image.

Source: Verelst et al., WACV 2023, for the memory; the operators are ours and weight cells by exact area overlap:
nothing is interpolated, constant maps stay constant, and a crop of the whole image is the identity.
"""

from __future__ import annotations

from typing import ClassVar, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dist_mlpl import keyed
from dist_mlpl.banks.base import WritableBank
from dist_mlpl.banks.held import Column
from dist_mlpl.errors import BankError

EMPTY: Final = -1  # the class of a slot that holds none
UNSEEN: Final = 255  # the code of a cell that no crop has shown yet; NaN once decoded
_LEVELS: Final = 254.0  # the code of the value 1
_CHANCES: Final = 65536  # stochastic rounding draws 16 bits per cell
_ROUNDING: Final = 1e-5  # tolerance for float32 values just outside the unit interval


class CellGrid(NamedTuple):
    """The pixels that the G cells of a map cover, along one side of the image the model sees.

    The border between two cells lies half way between their centres; the outermost cells reach the image's border.
    """

    side: float  # S, pixels
    stride: float  # pixels from one centre to the next
    first: float  # pixels from the image's border to the first centre


def read_through_crop(
    heatmaps: Tensor, crop: Tensor, flipped: Tensor, size: int, *, grid: CellGrid | None = None
) -> Tensor:
    """Cut a view out of maps of full images: crop, mirror where `flipped`, average over the view's cells.

    Args:
        heatmaps: (B, M, W, W), float; NaN where nothing is known yet.
        crop: (B, 4), (left, top, width, height) as fractions of the full image, y down.
        flipped: (B,) bool, True where the crop is then mirrored left to right.
        size: G, cells along a side of the view.
        grid: what the view's cells cover; None: G equal cells.

    Returns:
        (B, M, G, G), in each cell the area-weighted mean of the known map cells it covers; NaN where less than half
        of it is known.

    Raises:
        BankError: a crop that is empty or reaches outside the image.
    """
    vertical, horizontal = _overlaps(crop, flipped, size, heatmaps.shape[-1], grid)
    rows, columns = (_normalised(part).to(heatmaps.dtype)[:, None] for part in (vertical, horizontal))  # (B, 1, G, W)
    is_unseen = heatmaps.isnan()
    read = rows @ heatmaps.masked_fill(is_unseen, 0.0) @ columns.mT
    if not bool(is_unseen.any()):
        return read
    share = rows @ (~is_unseen).to(heatmaps.dtype) @ columns.mT  # known share of each cell
    return torch.where(is_unseen.any(dim=(2, 3), keepdim=True), read / share, read).masked_fill(share < 0.5, torch.nan)


def write_through_crop(
    heatmaps: Tensor, evidence: Tensor, crop: Tensor, flipped: Tensor, momentum: float, *, grid: CellGrid | None = None
) -> Tensor:
    """Update maps of full images from a view: each covered cell moves towards what the view shows there.

    A cell moves by (1 - momentum) times the covered share of its area. A cell that was NaN takes what the view shows
    if at least half of it is covered, and stays NaN otherwise.

    Args:
        heatmaps: (B, M, W, W), float; NaN where nothing is known yet.
        evidence: (B, M, G, G), finite: the view's maps.
        crop, flipped, grid: see `read_through_crop`.
        momentum: weight of the old value in the running average, in [0, 1].

    Returns:
        (B, M, W, W), a new tensor.

    Raises:
        BankError: a crop that is empty or reaches outside the image; evidence that is not finite.
    """
    if not bool(evidence.isfinite().all()):
        raise BankError(
            "evidence that is not finite",
            expected="finite numbers, probabilities usually; nothing was written",
            where="write_through_crop",
            next_step="look for the NaN in the model's class maps; lower the learning rate",
        )
    G, W = evidence.shape[-1], heatmaps.shape[-1]
    vertical, horizontal = (part.mT for part in _overlaps(crop, flipped, G, W, grid))  # (B, W, G)
    rows, columns = (_normalised(part).to(heatmaps.dtype)[:, None] for part in (vertical, horizontal))
    shown = rows @ evidence.to(heatmaps.dtype) @ columns.mT  # (B, M, W, W)
    covered = (W * vertical.sum(2))[:, :, None] * (W * horizontal.sum(2))[:, None, :]
    covered = covered.clamp(max=1.0)[:, None].to(heatmaps.dtype)  # (B, 1, W, W) in [0, 1]
    moved = heatmaps + (1.0 - momentum) * covered * (shown - heatmaps)
    return torch.where(heatmaps.isnan() & (covered >= 0.5), shown, moved)


def visible_share(heatmaps: Tensor, crop: Tensor) -> Tensor:
    """The share of a class's evidence that a crop leaves in view: its strongest cell inside over its strongest of all.

    Args:
        heatmaps: (B, M, W, W) in [0, 1]; NaN where nothing is known yet.
        crop: see `read_through_crop`.

    Returns:
        (B, M) in [0, 1]. A cell counts as inside if at least half of its area is. 1 where no cell inside is known, or
        where all known evidence is 0.

    Raises:
        BankError: see `read_through_crop`.
    """
    W = heatmaps.shape[-1]
    vertical, horizontal = _overlaps(crop, torch.zeros(len(crop), dtype=torch.bool), 1, W, None)
    inside = (W * vertical[:, 0])[:, :, None] * (W * horizontal[:, 0])[:, None, :] >= 0.5  # (B, W, W)
    is_known = ~heatmaps.isnan()
    known = heatmaps.masked_fill(~is_known, 0.0)
    strongest, seen = known.amax(dim=(2, 3)), (known * inside[:, None]).amax(dim=(2, 3))
    is_told = (is_known & inside[:, None]).any(dim=(2, 3)) & (strongest > 0)
    return torch.where(is_told, seen / strongest, 1.0)


class Slots(NamedTuple):
    """What a heatmap bank holds of n images: M classes each, with their running scores and maps."""

    classes: Tensor  # (n, M) int64, EMPTY where a slot holds none
    scores: Tensor  # (n, M) float32 in [0, 1]
    heatmaps: Tensor  # (n, M, W, W) float32 in [0, 1], NaN where no crop has shown a cell yet
    visits: Tensor  # (n,) int64, how often the image was written


class HeatmapBank(WritableBank):
    """M slots per image: each holds one class, its f16 score and its u8 map of W x W cells, or is empty.

    A row of 32 slots with 14 x 14 cells takes 6,468 bytes. Maps are rounded stochastically, keyed by seed, image, visit
    and cell: a running average then converges, whereas rounding to nearest would stop it short.

    Args:
        name: the bank's name.
        num_samples: N of the train split.
        num_slots: M.
        map_size: W; 0: scores only, no maps.
        seed: the run's seed.
        folder: see `HeldRows`.
    """

    is_by_sample: ClassVar[bool] = True

    def __init__(
        self, name: str, num_samples: int, *, num_slots: int, map_size: int, seed: int, folder: str | None = None
    ) -> None:
        columns = {
            "classes": Column(dtype="i32", shape=(num_slots,), fill=EMPTY),
            "scores": Column(dtype="f16", shape=(num_slots,)),
            "heatmaps": Column(dtype="u8", shape=(num_slots, map_size, map_size)),
            "visits": Column(dtype="i32"),
        }
        super().__init__(name, num_samples, columns, folder=folder)
        self._key = keyed.key("heatmaps", seed)

    def read_slots(self, index: Tensor) -> Slots:
        """The slots of images (n,), on the CPU.

        Raises:
            BankError: see `Bank.read`.

        Collective: all ranks, see `Bank.read`.
        """
        rows = self.read(index)
        return Slots(
            rows["classes"].long(), rows["scores"].float(), decode_maps(rows["heatmaps"]), rows["visits"].long()
        )

    def write_slots(self, index: Tensor, slots: Slots) -> None:
        """Replace the slots of images (n,); `visits` counts this write too.

        If an image is in a step twice (a mixture with weights above 1), the later row of the highest rank stays.

        Raises:
            BankError: a map outside [0, 1], or any error of `WritableBank.write`, scores that are not finite included;
                on all ranks, and nothing is written.

        Collective: all ranks, see `WritableBank.write`.
        """
        index, visits, heatmaps = index.cpu(), slots.visits.cpu(), slots.heatmaps.cpu()
        values = {
            "classes": slots.classes.to(torch.int32),
            "scores": slots.scores,
            "heatmaps": encode_maps(heatmaps, keyed_rows(self._key, index, visits)),
            "visits": visits.to(torch.int32),
        }
        self._replace(index, values, None, self._map_error(heatmaps))

    def _map_error(self, heatmaps: Tensor) -> BankError | None:
        known = heatmaps[~heatmaps.isnan()]
        if not len(known) or (float(known.min()) >= -_ROUNDING and float(known.max()) <= 1.0 + _ROUNDING):
            return None
        return self._error(
            f"heatmaps from {float(known.min()):g} to {float(known.max()):g}",
            expected="probabilities in [0, 1], or NaN where no crop has shown a cell yet; nothing was written",
            next_step="hand in probabilities, not logits",
        )


def decode_maps(codes: Tensor) -> Tensor:
    """Decode u8 codes of any shape to float32 in [0, 1], NaN where UNSEEN."""
    return (codes / _LEVELS).masked_fill_(codes == UNSEEN, torch.nan)


def encode_maps(heatmaps: Tensor, chance: np.ndarray) -> Tensor:
    """Encode probabilities as u8, rounded up with the probability that makes the mean exact; NaN becomes UNSEEN.

    Args:
        heatmaps: (n, M, W, W) on the CPU, in [0, 1] or NaN.
        chance: (n,) uint64, a key for each row.

    Returns:
        Same shape, uint8. A value returned by `decode_maps` keeps its code.
    """
    num_cells = heatmaps[0].numel() if len(heatmaps) else 0
    is_unseen = heatmaps.isnan()
    known = heatmaps.masked_fill(is_unseen, 0.0)
    draws = np.arange(-(-num_cells // 4), dtype=np.uint64)  # four cells per 64-bit draw
    bits = keyed.hash_integers(0, chance[:, None] + draws).view(np.uint16)[:, :num_cells]
    # In whole numbers, so that a decoded value is encoded to the code it had.
    fine = (known.double() * (_LEVELS * _CHANCES)).round_().to(torch.int64)
    codes = (fine + torch.from_numpy(bits.astype(np.int64)).view(fine.shape)).div_(_CHANCES, rounding_mode="floor")
    return codes.clamp_(0, int(_LEVELS)).masked_fill_(is_unseen, UNSEEN).to(torch.uint8)


def keyed_rows(key: int, index: Tensor, visits: Tensor) -> np.ndarray:
    """(n,) uint64 keys, one for each pair of image and visit."""
    rows = keyed.hash_integers(key, index.numpy().astype(np.uint64))
    return keyed.hash_integers(key, rows + visits.numpy().astype(np.uint64))


def _overlaps(crop: Tensor, flipped: Tensor, G: int, W: int, grid: CellGrid | None) -> tuple[Tensor, Tensor]:
    """Overlaps of a view's cells with a map's, as fractions of the full image's side: (B, G, W) along y and along x.

    Raises:
        BankError: a crop that is empty or reaches outside the image.
    """
    crop = crop.double()
    left, top, width, height = crop.unbind(1)
    is_bad = ~((torch.minimum(left, top) >= -_ROUNDING) & (torch.minimum(width, height) > 0))
    is_bad |= ~(torch.maximum(left + width, top + height) <= 1 + _ROUNDING)
    if bool(is_bad.any()):
        raise BankError(
            f"crop {[round(x, 6) for x in crop[is_bad][0].tolist()]}",
            expected="(left, top, width, height) as fractions of the image, not empty and inside it",
            where=f"image {int(is_bad.nonzero()[0])} of the batch",
            next_step="hand in the batch's own `crop`, not corners and not pixels",
        )
    grid = grid or CellGrid(side=G, stride=1.0, first=0.5)
    inner = grid.first + grid.stride * (torch.arange(1, G, dtype=torch.float64, device=crop.device) - 0.5)
    ends = inner.new_tensor([0.0, grid.side])
    edges = torch.cat([ends[:1], inner.clamp(0.0, grid.side), ends[1:]])  # (G + 1,) pixels
    mirrored = torch.where(flipped.to(crop.device)[:, None], grid.side - edges, edges)  # (B, G + 1)
    borders = torch.arange(W + 1, dtype=torch.float64, device=crop.device) / W
    vertical = _shared(top[:, None] + height[:, None] * (edges / grid.side), borders)
    return vertical, _shared(left[:, None] + width[:, None] * (mirrored / grid.side), borders)


def _shared(edges: Tensor, borders: Tensor) -> Tensor:
    """(B, G, W) overlaps of the intervals between edges (B, G + 1), rising or falling, and between borders (W + 1,)."""
    low = torch.minimum(edges[:, :-1], edges[:, 1:])[:, :, None]
    high = torch.maximum(edges[:, :-1], edges[:, 1:])[:, :, None]
    return (torch.minimum(high, borders[1:]) - torch.maximum(low, borders[:-1])).clamp_(min=0.0)


def _normalised(lengths: Tensor) -> Tensor:
    """Scale rows to sum to 1; a row of zeros stays zero."""
    total = lengths.sum(dim=2, keepdim=True)
    return lengths / torch.where(total > 0, total, 1.0)
