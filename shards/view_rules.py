"""Owns the rules of views on disk: how each rule changes a shard's known labels.

There are three kinds of rules, by what their draws depend on:

  by entry        bernoulli, exact_count: one numpy stream over all N x C entries in source order, as published
                  benchmarks draw them. Only these masks are comparable with papers. At most MAX_ENTRIES entries.
  by sample       dense_subset, single_positive: the papers' streams too, but over the N samples, at any size.
  by key          keyed_bernoulli, keyed_exact_count, noisy, web: a hash of (seed, source_row, class column), so any
                  shard can be drawn by itself, only its known labels cost anything, and the outcome for a label depends
                  neither on the packing nor on the rest of the set. There are no published masks to compare with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_mlpl.data.entries import Entries
from dist_mlpl.data.shard_index import ShardIndex
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.views import (
    DEFAULT_SEEDS,
    MAX_ENTRIES,
    View,
    dense_rows,
    num_dropped,
    single_positive_places,
    source_order,
)
from dist_mlpl.errors import ConfigError, nearest_names
from dist_mlpl.keyed import hash_integers, key
from dist_mlpl.labels import ABSENT, PRESENT, UNKNOWN, Targets

# (manifest position of the shard's first sample, the shard, k known labels of whole rows) -> (k,) their new values
Draw = Callable[[int, ShardIndex, Entries], Targets]


class Rule(NamedTuple):
    """A rule and the options it takes."""

    summary: str
    takes_fraction: bool
    is_keyed: bool = False
    replaces: bool = False  # whether labels may become their opposite, not only unknown
    takes_flips: bool = False


RULES: Final = {
    "bernoulli": Rule("every label is kept with probability FRACTION, by the stream that published masks use", True),
    "dense_subset": Rule("FRACTION of the images keep all their labels, the others none", True),
    "exact_count": Rule("every image keeps the same number of its C labels, by numpy's stream", True),
    "keyed_bernoulli": Rule("every label is kept with probability FRACTION, at any size", True, is_keyed=True),
    "keyed_exact_count": Rule("every image keeps FRACTION of its known labels, at any size", True, is_keyed=True),
    "noisy": Rule("labels become their opposite, by chance", False, is_keyed=True, replaces=True, takes_flips=True),
    "single_positive": Rule("every image keeps one positive", False),
    "web": Rule("every image keeps one positive, all else known becomes absent", False, is_keyed=True, replaces=True),
}


class Recipe(NamedTuple):
    """A rule with the values of its options; made by `make_recipe`."""

    rule: str
    fraction: float | None
    seed: int
    flip_present: float | None
    flip_absent: float | None


def make_recipe(
    rule: str,
    *,
    fraction: float | None = None,
    seed: int | None = None,
    flip_present: float | None = None,
    flip_absent: float | None = None,
) -> Recipe:
    """Check a rule and the values of its options.

    Args:
        rule: name in RULES.
        fraction: r in (0, 1], for the rules that take one.
        seed: None for the rule's customary one: 1 for exact_count, else 0.
        flip_present: for `noisy`, probability that a present label becomes absent, in [0, 1]; None is 0.
        flip_absent: likewise, probability that an absent label becomes present.

    Raises:
        ConfigError: the message names what the rule takes.
    """

    def wrong(found: str, expected: str, option: str) -> ConfigError:
        next_step = "correct the option, or choose another rule"
        return ConfigError(found, expected=expected, where=option, next_step=next_step)

    if rule not in RULES:
        raise wrong(f"unknown rule {rule!r}", nearest_names(rule, RULES), "--rule")
    if not RULES[rule].takes_fraction and fraction is not None:
        raise wrong(f"fraction {fraction} with rule {rule}", "none", "--fraction")
    if RULES[rule].takes_fraction and (fraction is None or not 0.0 < fraction <= 1.0):
        raise wrong(f"fraction {fraction} with rule {rule}", "a fraction in (0, 1]", "--fraction")
    flips = {"--flip-present": flip_present, "--flip-absent": flip_absent}
    for option, value in flips.items():
        if value is not None and not RULES[rule].takes_flips:
            raise wrong(f"{option} {value} with rule {rule}", "none; rule noisy takes it", option)
        if value is not None and not 0.0 <= value <= 1.0:
            raise wrong(f"{option} {value}", "a probability in [0, 1]", option)
    if RULES[rule].takes_flips:
        if not any(flips.values()):
            raise wrong("no probability of a flip", "one that is above 0", " or ".join(flips))
        flip_present, flip_absent = flip_present or 0.0, flip_absent or 0.0
    seed = DEFAULT_SEEDS.get(rule, 0) if seed is None else seed
    if not RULES[rule].is_keyed and not 0 <= seed < 1 << 32:
        raise wrong(f"seed {seed} with rule {rule}", "an integer in [0, 2**32), as numpy's generator takes", "--seed")
    return Recipe(rule, fraction, seed, flip_present, flip_absent)


def draw_of(recipe: Recipe, index: SplitIndex) -> Draw:
    """The function that draws a recipe's view of a split, shard by shard.

    bernoulli and exact_count make all their draws here (N C / 8 bytes of memory); dense_subset and single_positive keep
    N numbers; the keyed rules keep nothing.

    Raises:
        ConfigError: a set too large for the rule.
        ManifestError: source rows repeat.
    """
    if recipe.rule in ("bernoulli", "exact_count"):
        return _by_view(recipe, index)
    if recipe.rule == "dense_subset":
        return _by_dense_rows(recipe, index)
    if recipe.rule == "single_positive":
        return _by_places(recipe, index)
    keyed = {
        "keyed_bernoulli": _keyed_bernoulli,
        "keyed_exact_count": _keyed_exact_count,
        "noisy": _noisy,
        "web": _web,
    }[recipe.rule]
    salt = key("view", recipe.rule, recipe.seed)

    def draw(first: int, shard: ShardIndex, entries: Entries) -> Targets:
        places = shard.source_rows[entries.rows] << np.uint64(16) | entries.classes
        return keyed(recipe, hash_integers(salt, places), entries)

    return draw


def _by_view(recipe: Recipe, index: SplitIndex) -> Draw:
    num_classes = index.manifest.num_classes
    if index.num_samples * num_classes > MAX_ENTRIES:
        raise ConfigError(
            f"{index.num_samples:,} samples and {num_classes:,} classes with rule {recipe.rule}",
            expected=f"at most {MAX_ENTRIES:,} entries: the rule draws for each of them, known or not",
            where="--rule",
            next_step=f"take rule keyed_{recipe.rule}, which draws for known labels alone",
        )
    view = View(
        recipe.rule,
        recipe.fraction,
        recipe.seed,
        shard_sizes=index.shard_sizes,
        source_rows=index.source_rows(),
        targets_of=index.targets_between,
        num_classes=num_classes,
    )

    def draw(first: int, shard: ShardIndex, entries: Entries) -> Targets:
        return _unless(view.hidden_entries(first + entries.rows.astype(np.int64), entries.classes), entries)

    return draw


def _by_dense_rows(recipe: Recipe, index: SplitIndex) -> Draw:
    assert recipe.fraction is not None
    is_kept = dense_rows(recipe.fraction, recipe.seed, source_order(index.source_rows(), index.num_samples))

    def draw(first: int, shard: ShardIndex, entries: Entries) -> Targets:
        return _unless(~is_kept[first + entries.rows.astype(np.int64)], entries)

    return draw


def _by_places(recipe: Recipe, index: SplitIndex) -> Draw:
    counts = [np.diff(shard.positives.offsets) for shard in index.shard_indexes()]
    order = source_order(index.source_rows(), index.num_samples)
    kept = single_positive_places(recipe.seed, order, np.concatenate([np.empty(0, np.int64), *counts]))

    def draw(first: int, shard: ShardIndex, entries: Entries) -> Targets:
        positive = entries.values == PRESENT
        place = _counted_within_rows(positive, entries.rows) - 1
        return _unless(~(positive & (place == kept[first + entries.rows.astype(np.int64)])), entries)

    return draw


def _keyed_bernoulli(recipe: Recipe, chances: npt.NDArray[np.uint64], entries: Entries) -> Targets:
    """Keep each label whose draw is below the fraction; nested over fractions."""
    assert recipe.fraction is not None
    return _unless(~_happens(recipe.fraction, chances), entries)


def _keyed_exact_count(recipe: Recipe, chances: npt.NDArray[np.uint64], entries: Entries) -> Targets:
    """Hide the floor((1 - r) n) labels with the highest draws out of an image's n known ones; nested over fractions.

    An image with labels keeps at least one, so more than the fraction of sparse labels stays.

    Differs: exact_count hides floor((1 - r) C) entries, known or not; the numbers agree where all labels are known.
    """
    assert recipe.fraction is not None
    rank = _ranks_within_rows(chances, entries.rows)
    sizes = np.diff(np.searchsorted(entries.rows, np.arange(entries.rows[0], entries.rows[-1] + 2)))
    kept = {size: size - num_dropped(recipe.fraction, size) for size in np.unique(sizes).tolist()}
    num_kept = np.array([kept[size] for size in sizes.tolist()])
    return _unless(rank >= num_kept[entries.rows - entries.rows[0]], entries)


def _noisy(recipe: Recipe, chances: npt.NDArray[np.uint64], entries: Entries) -> Targets:
    """Flip labels to their opposites at random.

    Source: Durand et al. 2019, the "noisy" strategy. Differs: how that paper corrupts labels is not known to us; here
    there are two probabilities, one for present labels and one for absent ones.
    """
    assert recipe.flip_present is not None
    assert recipe.flip_absent is not None
    present = entries.values == PRESENT
    flips = np.where(present, _happens(recipe.flip_present, chances), _happens(recipe.flip_absent, chances))
    return np.where(flips, -entries.values, entries.values).astype(np.int8)


def _web(recipe: Recipe, chances: npt.NDArray[np.uint64], entries: Entries) -> Targets:
    """Label each image as if it had been found by a web search for one of its classes.

    The positive with the lowest draw stays, and all other known labels become absent. An image without a positive
    would not have been found, so it loses all its labels. Unknown labels stay unknown, since calling them absent might
    or might not be an error.

    Source: Durand et al. 2019, the "web" strategy.
    """
    positive = entries.values == PRESENT
    rank = _ranks_within_rows(np.where(positive, chances, np.iinfo(np.uint64).max), entries.rows)  # positives first
    found = np.zeros(int(entries.rows[-1]) + 1, dtype=bool)
    found[entries.rows[positive]] = True
    values = np.where(rank == 0, PRESENT, ABSENT)
    return np.where(found[entries.rows], values, UNKNOWN).astype(np.int8)


def _unless(hidden: npt.NDArray[np.bool_], entries: Entries) -> Targets:
    return np.where(hidden, np.int8(UNKNOWN), entries.values)


def _happens(probability: float, chances: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Whether a hash's upper 53 bits, as a number in [0, 1), are below a probability; 1 is always true, 0 never."""
    return (chances >> np.uint64(11)).astype(np.float64) * 2.0**-53 < probability


def _ranks_within_rows(chances: npt.NDArray[np.uint64], rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Rank of each entry within its row by ascending chance, (k,) int64 from 0; `rows` must ascend."""
    ranks = np.empty(len(rows), dtype=np.int64)
    ranks[np.lexsort((chances, rows))] = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return ranks


def _counted_within_rows(mask: npt.NDArray[np.bool_], rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Number of True entries within the row up to and including each entry, (k,) int64; `rows` must ascend."""
    ends = np.concatenate([[0], np.cumsum(mask)])
    return ends[1:] - ends[np.searchsorted(rows, rows)]
