"""Owns exact search for the most similar images: one embedding per image, spread over ranks; queries go to all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Literal

import torch
from torch import Tensor

from dist_mlpl import comm
from dist_mlpl.banks.keyed import KeyedBank
from dist_mlpl.banks.nearest import SMALLEST_NORM
from dist_mlpl.banks.rows import Integers, as_bytes, from_bytes
from dist_mlpl.errors import MlplError

NOBODY: Final = -1  # the index of a neighbour where there are fewer than were asked for

_QUERIES: Final = 1024  # queries of all ranks answered at once
_BLOCK: Final = 8192  # embeddings multiplied with the queries at once; 32 MB of cosines
_TILE: Final = 16  # cosines in a group; a group is looked at only if its largest can count
_MORE: Final = 32  # candidates kept beyond k before cosines are computed exactly
_EXACT_NUMBERS: Final = 1 << 16  # float64 numbers of embeddings at once on the CPU: half a megabyte, which caches hold
_UNSURE_NUMBERS: Final = 1 << 24  # numbers at once: of candidates' cosines, or float64 of embeddings on an accelerator


class Neighbours(KeyedBank):
    """A keyed bank of embeddings (N, D) that finds, for any embedding, the k images with the largest cosine.

    A cosine is the sum in float64 of the products of unit vectors in float32, rounded to float32; of equal ones the
    lower sample index comes first. So the answer is exact, and the same on any number of ranks.

    Args:
        name: the bank's name.
        num_samples: N of the split.
        width: D.
        dtype: type of the stored embeddings, `f32` or `f16`.
        folder: see `HeldRows`.
    """

    def __init__(
        self,
        name: str,
        num_samples: int,
        width: int,
        *,
        dtype: Literal["f32", "f16"] = "f32",
        folder: str | None = None,
    ) -> None:
        super().__init__(name, num_samples, (width,), dtype, folder=folder)
        self._width = width
        self._ready: tuple[Tensor, Tensor] | None = None  # unit vectors and sample indices, by index

    @torch.no_grad()
    def search(self, queries: Tensor, k: int, *, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Find the k most similar of all images whose embedding was written, an image that is itself a query included.

        Args:
            queries: (q, D) any floating type, q free on each rank.
            k: at least 1.
            device: does the products and holds the rank's unit vectors, n_r D float32, until rows are written; None:
                the CPU. Its float32 products must be float32 (no TF32).

        Returns:
            (q, k) float32 cosines, falling, and (q, k) int64 sample indices, on the CPU; -inf and NOBODY where there
            are fewer than k images.

        Raises:
            BankError: queries that are not (q, D) or not finite, or an error of `write` about rows that waited; on all
                ranks.

        Collective: all ranks; first `flush`; then each query goes to every rank, 4 D bytes, and 12 k bytes come back
        from each.
        """
        self.flush()
        queries = queries.detach().cpu()
        sizes = self._sizes(queries)
        own = unit_vectors(queries)
        step = max(1, _QUERIES // comm.world_size())
        found = []
        for first in range(0, max(sizes), step):
            counts = [min(max(size - first, 0), step) for size in sizes]
            asked = comm.gather_rows(own[first : first + step])
            room = comm.Room(counts, [counts[comm.rank()]] * comm.world_size())
            answers, _ = comm.exchange(as_bytes(self._own_nearest(asked, k, device)), counts, expected=room)
            kinds = [(torch.float32, (k,)), (torch.int64, (k,))]
            found.append(_merged(*from_bytes(answers, kinds), num_parts=comm.world_size()))
        nothing = torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
        scores, index = (torch.cat(parts) for parts in zip(nothing, *found, strict=True))
        return scores, index

    def unpack(self, packed: Mapping[str, Tensor], wanted: Iterable[int]) -> None:
        """See `HeldRows.unpack`."""
        super().unpack(packed, wanted)
        self._ready = None

    def _mark(self, index: Integers) -> None:
        super()._mark(index)
        self._ready = None

    def _sizes(self, queries: Tensor) -> list[int]:
        """Number of queries of each rank.

        Raises:
            BankError: queries that are not (q, D) or not finite; on all ranks.

        Collective: all ranks, one gather.
        """
        error: MlplError | None = None
        if queries.ndim != 2 or queries.shape[1] != self._width or not bool(queries.isfinite().all()):
            is_shaped = queries.ndim == 2 and queries.shape[1] == self._width
            error = self._error(
                "a query that is not finite" if is_shaped else f"queries {tuple(queries.shape)}",
                expected=f"(q, {self._width}) finite numbers",
                next_step="hand in embeddings of the model that wrote the bank; leave out images that did not decode",
            )
        number = torch.tensor([-1 if error is not None else len(queries)])
        sizes: list[int] = comm.gather_rows(number).tolist()
        if min(sizes) < 0:
            comm.raise_first(error)
        return sizes

    def _own_nearest(self, queries: Tensor, k: int, device: torch.device | None) -> list[Tensor]:
        """(q, k) cosines and (q, k) sample indices of the nearest images that this rank holds, on the CPU."""
        units, index = self._units(device or torch.device("cpu"))
        scores, places = nearest_rows(units, queries.to(units.device), k)
        is_somebody = places >= 0
        found = torch.full_like(places, NOBODY)
        found[is_somebody] = index[places[is_somebody]]
        return [scores.cpu(), found.cpu()]

    def _units(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Unit vectors (n, D) of this rank's written rows, and their sample indices (n,), rising."""
        if self._ready is None or self._ready[0].device != device:
            memory, held = self._memory(), self.held_rows()
            written = (memory["stamps"] >= 0).nonzero().squeeze(1)
            index, order = held[written].sort()
            units = torch.empty(len(index), self._width, device=device)
            for part, places in zip(units.split(_BLOCK), written[order].split(_BLOCK), strict=True):
                part.copy_(unit_vectors(memory["rows"][places]))
            self._ready = units, index.to(device)
        return self._ready


def unit_vectors(vectors: Tensor) -> Tensor:
    """(n, D) float32 vectors scaled to length 1, computed in float64; zero stays zero."""
    return torch.cat(
        [
            (part.double() / part.double().norm(dim=1, keepdim=True).clamp(min=SMALLEST_NORM)).float()
            for part in vectors.split(_BLOCK)
        ]
    )


def nearest_rows(units: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k rows with the largest cosine, exactly; of equal ones the lower rows first.

    Products in float32 find somewhat more than k candidates, whose cosines are then computed exactly. If the k-th does
    not exceed the largest that any other row can have, given the error bound of float32 products, the search is
    repeated with more candidates.

    Args:
        units: (n, D) float32 unit vectors, on any device.
        queries: (q, D) likewise, on the same device.
        k: at least 1.

    Returns:
        (q, k) float32 cosines, falling, and (q, k) int64 rows; -inf and -1 beyond the n-th.
    """
    scores = queries.new_full((len(queries), k), -torch.inf)
    places = torch.full_like(scores, -1, dtype=torch.int64)
    off = (units.shape[1] + 8) * 2.0**-23  # error bound of products summed in any order, and of rounding to float32
    kept = min(len(units), k + _MORE + k // 4)
    todo = torch.arange(len(queries) if kept else 0, device=queries.device)
    while len(todo):
        unsure = []
        for part in todo.split(max(1, _UNSURE_NUMBERS // kept)):
            found, least = _rough_nearest(units, queries[part], kept)
            found, _ = found.sort(dim=1)
            cosines = _cosines(units, queries[part], found)
            order = cosines.argsort(dim=1, descending=True, stable=True)[:, :k]
            best = cosines.gather(1, order)
            scores[part, : best.shape[1]], places[part, : best.shape[1]] = best, found.gather(1, order)
            if kept < len(units):
                unsure.append(part[best[:, -1] <= least + off])
        todo = torch.cat(unsure) if unsure else todo[:0]
        kept = min(len(units), 4 * kept)
    return scores, places


def _rough_nearest(units: Tensor, queries: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """(q, kept) rows of the largest products in float32, in any order, and (q,) the least of these; kept <= n."""
    best = queries.new_full((len(queries), kept), -torch.inf)
    places = torch.zeros_like(best, dtype=torch.int64)
    least = best[:, 0]
    for first in range(0, len(units), _BLOCK):
        scores, columns = _hits(queries @ units[first : first + _BLOCK].T, least)
        best, chosen = torch.cat([best, scores], dim=1).topk(kept, dim=1, sorted=False)
        places = torch.cat([places, columns + first], dim=1).gather(1, chosen)
        least = best.amin(dim=1)
    return places, least


def _hits(scores: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Keep those groups of a block's columns that have a score above a query's least.

    A group is _TILE columns spaced evenly over the block, so that its maximum is found fast.

    Args:
        scores: (q, block).
        least: (q,) the least score that each query keeps so far.

    Returns:
        (q, m) scores and (q, m) their columns, m the most that any query has; -inf where a query has fewer.
    """
    num_queries, size = scores.shape
    num_groups = -(-size // _TILE)
    if size % _TILE:
        scores = torch.nn.functional.pad(scores, (0, num_groups * _TILE - size), value=-torch.inf)
    groups = scores.view(num_queries, _TILE, num_groups)
    query, group = (groups.amax(dim=1) > least[:, None]).nonzero(as_tuple=True)
    counts = torch.bincount(query, minlength=num_queries)
    place = torch.arange(len(query), device=scores.device) - (counts.cumsum(0) - counts)[query]
    shape = num_queries, int(counts.max()), _TILE
    found = scores.new_full(shape, -torch.inf)
    found[query, place] = groups[query, :, group]
    columns = torch.zeros(shape, dtype=torch.int64, device=scores.device)
    columns[query, place] = group[:, None] + num_groups * torch.arange(_TILE, device=scores.device)
    return found.flatten(1), columns.flatten(1)


def _cosines(units: Tensor, queries: Tensor, places: Tensor) -> Tensor:
    """(q, m) cosines of each query with m rows, summed in float64."""
    at_once = _EXACT_NUMBERS if units.device.type == "cpu" else _UNSURE_NUMBERS  # elsewhere launches cost more
    pairs = max(1, at_once // units.shape[1])
    step, width = max(1, pairs // places.shape[1]), min(pairs, places.shape[1])
    cosines = torch.empty(places.shape, device=places.device)
    for first in range(0, len(places), step):
        own = queries[first : first + step, None].double()
        for start in range(0, places.shape[1], width):
            part = slice(first, first + step), slice(start, start + width)
            cosines[part] = units[places[part]].double().mul_(own).sum(dim=2).float()
    return cosines


def _merged(scores: Tensor, index: Tensor, *, num_parts: int) -> tuple[Tensor, Tensor]:
    """Merge the answers of all ranks to each query into the k best.

    Args:
        scores, index: (R * q, k), one rank's answers after another's.
        num_parts: R.

    Returns:
        (q, k) each.
    """
    k = scores.shape[1]
    by_query = [part.view(num_parts, -1, k).transpose(0, 1).flatten(1) for part in (scores, index)]  # (q, R k)
    by_index = by_query[1].argsort(dim=1)
    ordered = by_query[0].gather(1, by_index)
    best = ordered.argsort(dim=1, descending=True, stable=True)[:, :k]
    return ordered.gather(1, best), by_query[1].gather(1, by_index.gather(1, best))
