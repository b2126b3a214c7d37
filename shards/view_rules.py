"""Owns how a view on disk is drawn: what each rule makes of a shard's known labels.

Three kinds of rules, by what their draws depend on:

  papers' own     bernoulli, exact_count: numpy's one stream over all N x C entries in source order, as published
                  benchmarks draw them. Only these masks compare with papers. At most MAX_ENTRIES entries.
  by sample       dense_subset, single_positive: the streams of the papers too, but over the N samples, at any size.
  by key          keyed_bernoulli, keyed_exact_count, noisy, web: a hash of (seed, source_row, class column), so any
                  shard can be drawn by itself, only its known labels cost anything, and what a label becomes changes
                  neither with the packing nor with what else is in the set. Nothing to compare with in papers.
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

# (manifest position of the shard's first sample, the shard, k known labels of whole rows) -> (k,) what they become
Draw = Callable[[int, ShardIndex, Entries], Targets]


class Rule(NamedTuple):
    """What a rule needs."""

    summary: str
    takes_fraction: bool
    is_keyed: bool = False
    replaces: bool = False  # labels may become their opposite, not only unknown
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
    """A rule and what it was told; made by `make_recipe`."""

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
    """Check a rule with what it takes.

    Args:
        rule: name in RULES.
        fraction: r in (0, 1], for the rules that take one.
        seed: None for the rule's customary one: 1 for exact_count, else 0.
        flip_present: for `noisy`, probability that a present label becomes absent, in [0, 1]; None is 0.
        flip_absent: the same of an absent label becoming present.

    Raises:
        ConfigError: naming what the rule takes.
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
    """The rule at work on a split.

    bernoulli and exact_count draw all they will ever draw here (N C / 8 bytes); dense_subset and single_positive take
    N numbers; the keyed rules nothing.

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
    """Keep each label whose draw is below the fraction: nested over fractions."""
    assert recipe.fraction is not None
    return _unless(~_happens(recipe.fraction, chances), entries)


def _keyed_exact_count(recipe: Recipe, chances: npt.NDArray[np.uint64], entries: Entries) -> Targets:
    """Of n known labels of an image, hide the floor((1 - r) n) of the highest draws: nested over fractions.

    An image that has labels keeps one at least, so of sparse labels more than the fraction stays.

    Differs: exact_count counts in C, known or not; the two agree in number where all is known.
    """
    assert recipe.fraction is not None
    rank = _ranks_within_rows(chances, entries.rows)
    sizes = np.diff(np.searchsorted(entries.rows, np.arange(entries.rows[0], entries.rows[-1] + 2)))
    kept = {size: size - num_dropped(recipe.fraction, size) for size in np.unique(sizes).tolist()}
    num_kept = np.array([kept[size] for size in sizes.tolist()])
    return _unless(rank >= num_kept[entries.rows - entries.rows[0]], entries)


def _noisy(recipe: Recipe, chances: npt.NDArray[np.uint64], entries: Entries) -> Targets:
    """Turn labels into their opposites.

    Source: Durand et al. 2019, the "noisy" strategy. Differs: how that paper corrupts is not known to us; here two
    probabilities say it, one for present labels, one for absent ones.
    """
    assert recipe.flip_present is not None
    assert recipe.flip_absent is not None
    present = entries.values == PRESENT
    flips = np.where(present, _happens(recipe.flip_present, chances), _happens(recipe.flip_absent, chances))
    return np.where(flips, -entries.values, entries.values).astype(np.int8)


def _web(recipe: Recipe, chances: npt.NDArray[np.uint64], entries: Entries) -> Targets:
    """As if each image had been found by a search for one of its classes, and nobody had looked for others.

    The positive of the lowest draw stays, the other positives become absent. An image without a positive would not
    have been found: it loses all its labels. What is unknown stays unknown, for whether absence would be a mistake
    there nobody knows.

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
    """Whether 53 bits of a hash, taken as a number in [0, 1), are below a probability: 1 is always, 0 never."""
    return (chances >> np.uint64(11)).astype(np.float64) * 2.0**-53 < probability


def _ranks_within_rows(chances: npt.NDArray[np.uint64], rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Place of each entry among its row's by ascending chance, (k,) from 0; rows ascend."""
    ranks = np.empty(len(rows), dtype=np.int64)
    ranks[np.lexsort((chances, rows))] = np.arange(len(rows)) - np.searchsorted(rows, rows)
    return ranks


def _counted_within_rows(mask: npt.NDArray[np.bool_], rows: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """How many of the mask its row holds up to each entry, that one included, (k,); rows ascend."""
    ends = np.concatenate([[0], np.cumsum(mask)])
    return ends[1:] - ends[np.searchsorted(rows, rows)]
