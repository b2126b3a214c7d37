"""Owns class heatmaps of full images: read and written through a crop and a flip, kept as u8 in a few slots an image.

Source: Verelst et al., WACV 2023, for the memory; the operators are ours, exact overlaps of areas: nothing is sampled
between cells, constants stay as they are, and a crop of the whole image is the identity.
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
_LEVELS: Final = 254.0  # the code of 1
_CHANCES: Final = 65536  # stochastic rounding draws 16 bits a cell
_ROUNDING: Final = 1e-5  # by which float32 may leave the unit interval


class CellGrid(NamedTuple):
    """Where the G cells of a map look, along one side of the image the model sees.

    The border between two cells lies half way between their centres; the outermost cells reach the image's border.
    """

    side: float  # S, pixels
    stride: float  # pixels from one centre to the next
    first: float  # pixels from the image's border to the first centre


def read_through_crop(
    heatmaps: Tensor, crop: Tensor, flipped: Tensor, size: int, *, grid: CellGrid | None = None
) -> Tensor:
    """What maps of full images look like in a view of them: cut out, mirrored where `flipped`, averaged over cells.

    Args:
        heatmaps: (B, M, W, W), float; NaN where nothing is known yet.
        crop: (B, 4), (left, top, width, height) as fractions of the full image, y down.
        flipped: (B,) bool, mirrored left to right after the crop.
        size: G, cells along a side of the view.
        grid: where the view's cells look; None: S = G pixels, evenly.

    Returns:
        (B, M, G, G), each cell the mean over what it covers of the maps' known cells; NaN where less than half of it is
        known.

    Raises:
        BankError: a crop that is empty or reaches outside the image.
    """
    vertical, horizontal = _overlaps(crop, flipped, size, heatmaps.shape[-1], grid)
    rows, columns = (_normalised(part).to(heatmaps.dtype)[:, None] for part in (vertical, horizontal))  # (B, 1, G, W)
    is_unseen = heatmaps.isnan()
    read = rows @ heatmaps.masked_fill(is_unseen, 0.0) @ columns.mT
    if not bool(is_unseen.any()):
        return read
    share = rows @ (~is_unseen).to(heatmaps.dtype) @ columns.mT  # of each cell, known
    return torch.where(is_unseen.any(dim=(2, 3), keepdim=True), read / share, read).masked_fill(share < 0.5, torch.nan)


def write_through_crop(
    heatmaps: Tensor, evidence: Tensor, crop: Tensor, flipped: Tensor, momentum: float, *, grid: CellGrid | None = None
) -> Tensor:
    """Maps of full images after a view of them: each covered cell moves towards what the view shows there.

    A cell moves by 1 - momentum times the covered share of its area. One that was NaN takes what the view shows if at
    least half of it is covered, and stays NaN otherwise.

    Args:
        heatmaps: (B, M, W, W), float; NaN where nothing is known yet.
        evidence: (B, M, G, G), finite: the view's maps.
        crop, flipped, grid: see `read_through_crop`.
        momentum: of the running average, in [0, 1].

    Returns:
        (B, M, W, W), new memory.

    Raises:
        BankError: a crop as there; evidence that is not finite.
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
    """How much of a class's evidence a crop leaves in view: its strongest cell inside over its strongest of all.

    Args:
        heatmaps: (B, M, W, W) in [0, 1]; NaN where nothing is known yet.
        crop: see `read_through_crop`.

    Returns:
        (B, M) in [0, 1]. A cell is inside if at least half of it is; 1 where no cell inside, or no evidence, is known.

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
    """What a bank remembers of n images: M classes each, with their running scores and maps."""

    classes: Tensor  # (n, M) int64, EMPTY where a slot holds none
    scores: Tensor  # (n, M) float32 in [0, 1]
    heatmaps: Tensor  # (n, M, W, W) float32 in [0, 1], NaN where no crop has shown a cell yet
    visits: Tensor  # (n,) int64, times that the image was written


class HeatmapBank(WritableBank):
    """Slots an image: for C classes and W x W cells, min(M, C) classes with a score and a u8 map each.

    A row of 32 slots with 14 x 14 cells takes 6,468 bytes. Maps are rounded by chance keyed by seed, image, visit and
    cell: a running average then ends where it should, which nearest rounding would stop short of.

    Args:
        name: of the bank.
        num_samples: N of the train split.
        num_slots: M.
        map_size: W; 0 keeps scores alone.
        seed: of the run.
        folder: see `Bank`.
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
        """Slots of images (n,), on the CPU.

        Raises:
            BankError: see `Bank.read`.

        Collective: all ranks, see `Bank.read`.
        """
        rows = self.read(index)
        return Slots(
            rows["classes"].long(), rows["scores"].float(), decode_maps(rows["heatmaps"]), rows["visits"].long()
        )

    def write_slots(self, index: Tensor, slots: Slots) -> None:
        """Replace the slots of images (n,); `visits` is the count with this one.

        Of an image that is in a step twice, in a mixture with weights above 1, the later row of the higher rank stays.

        Raises:
            BankError: a map outside [0, 1]; see `WritableBank.write`, also for scores; on all ranks, and nothing
                is written.

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
    """u8 codes of any shape to float32 in [0, 1], NaN where UNSEEN."""
    return (codes / _LEVELS).masked_fill_(codes == UNSEEN, torch.nan)


def encode_maps(heatmaps: Tensor, chance: np.ndarray) -> Tensor:
    """Probabilities to u8 codes, rounded up with the probability that makes the mean exact; NaN to UNSEEN.

    Args:
        heatmaps: (n, M, W, W) on the CPU, in [0, 1] or NaN.
        chance: (n,) uint64, a key for each row.

    Returns:
        Same shape, uint8. A value that `decode_maps` gave keeps its code.
    """
    num_cells = heatmaps[0].numel() if len(heatmaps) else 0
    is_unseen = heatmaps.isnan()
    known = heatmaps.masked_fill(is_unseen, 0.0)
    draws = np.arange(-(-num_cells // 4), dtype=np.uint64)  # four cells to a draw of 64 bits
    bits = keyed.hash_integers(0, chance[:, None] + draws).view(np.uint16)[:, :num_cells]
    # Whole numbers, so that a code comes back as it was.
    fine = (known.double() * (_LEVELS * _CHANCES)).round_().to(torch.int64)
    codes = (fine + torch.from_numpy(bits.astype(np.int64)).view(fine.shape)).div_(_CHANCES, rounding_mode="floor")
    return codes.clamp_(0, int(_LEVELS)).masked_fill_(is_unseen, UNSEEN).to(torch.uint8)


def keyed_rows(key: int, index: Tensor, visits: Tensor) -> np.ndarray:
    """(n,) uint64 keys of images' visits."""
    rows = keyed.hash_integers(key, index.numpy().astype(np.uint64))
    return keyed.hash_integers(key, rows + visits.numpy().astype(np.uint64))


def _overlaps(crop: Tensor, flipped: Tensor, G: int, W: int, grid: CellGrid | None) -> tuple[Tensor, Tensor]:
    """Lengths that a view's cells share with a map's, as fractions of the full image: (B, G, W) along y and along x."""
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
    """(B, G, W) lengths that intervals between edges (B, G + 1), rising or falling, share with those of borders."""
    low = torch.minimum(edges[:, :-1], edges[:, 1:])[:, :, None]
    high = torch.maximum(edges[:, :-1], edges[:, 1:])[:, :, None]
    return (torch.minimum(high, borders[1:]) - torch.maximum(low, borders[:-1])).clamp_(min=0.0)


def _normalised(lengths: Tensor) -> Tensor:
    """Rows that sum to 1; a row of zeros stays one."""
    total = lengths.sum(dim=2, keepdim=True)
    return lengths / torch.where(total > 0, total, 1.0)
