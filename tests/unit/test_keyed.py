"""Keyed chance is SplitMix64 to the bit, uniform, and unrelated between keys."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from dist_mlpl.keyed import hash_integers, key, permutation, uniform

pytestmark = pytest.mark.unit

MASK = (1 << 64) - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The published generator, one number at a time."""
    state, numbers = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        numbers.append(z ^ (z >> 31))
    return numbers


def counter(count: int) -> npt.NDArray[np.uint64]:
    return np.arange(count, dtype=np.uint64)


def test_the_oracle_gives_the_published_vector() -> None:
    assert splitmix64(1234567, 5) == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


@pytest.mark.parametrize("raw", [0, 1, 1234567, MASK])
def test_hashes_of_a_counter_are_the_splitmix64_stream_seeded_with_the_mixed_key(raw: int) -> None:
    assert hash_integers(raw, counter(100)).tolist() == splitmix64(splitmix64(raw, 1)[0], 100)


def test_known_answers_never_change() -> None:
    crop = key(7, 0, 12345, "crop")
    assert crop == 7136635821218016602
    assert (key(), key(0), key(1), key("a")) == (
        13020603013274838756,
        7754967453105325484,
        14325610461942741659,
        1841058181764691696,
    )
    assert key(-1, 2**100, "ünïcode") == 12227813254632642124
    assert hash_integers(crop, counter(3)).tolist() == [
        12383201374260523963,
        13192508956303870786,
        12836351247959225804,
    ]
    assert uniform(crop, 2).tolist() == [0.6712946916149372, 0.7151673435479565]
    assert permutation(crop, 10).tolist() == [8, 3, 7, 9, 5, 6, 4, 0, 2, 1]


def test_keys_tell_order_type_and_grouping_apart() -> None:
    keys = {
        key(1, 2), key(2, 1), key(12), key("12"), key("1", "2"), key("1", 2), key("i1;"), key("s1:1;"),
        key(1), key(1, ""), key("", 1), key(""), key(), key("ab", "c"), key("a", "bc"), key(-1),
    }  # fmt: skip
    assert len(keys) == 16


def test_a_numpy_integer_is_the_integer_it_holds() -> None:
    assert key(np.int64(5), np.uint8(3)) == key(5, 3)  # type: ignore[arg-type]


def test_a_part_that_is_neither_integer_nor_string_is_refused() -> None:
    with pytest.raises(TypeError):
        key(0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("raw", [-1, 1 << 64])
def test_a_key_outside_64_bits_is_refused(raw: int) -> None:
    with pytest.raises(OverflowError, match="outside"):
        uniform(raw, 1)


def test_hashing_keeps_shape_and_input_and_never_collides_under_one_key() -> None:
    values = np.arange(60_000, dtype=np.uint64).reshape(3, -1) << np.uint64(20)
    before = values.copy()
    hashed = hash_integers(key("collide"), values)
    assert hashed.shape == values.shape
    assert hashed.dtype == np.uint64
    np.testing.assert_array_equal(values, before)
    assert len(np.unique(hashed)) == values.size


def test_uniform_numbers_lie_in_the_unit_interval_and_a_longer_draw_begins_with_the_shorter() -> None:
    draws = uniform(key("prefix"), 10_000)
    assert draws.dtype == np.float64
    assert draws.min() >= 0.0
    assert draws.max() < 1.0
    np.testing.assert_array_equal(uniform(key("prefix"), 17), draws[:17])
    assert uniform(key("prefix"), 0).shape == (0,)


@pytest.mark.parametrize("seed", range(5))
def test_one_long_stream_is_uniform(seed: int) -> None:
    counts = np.histogram(uniform(key("stream", seed), 100_000), bins=100, range=(0, 1))[0]
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 148.2  # 0.999 quantile, 99 degrees of freedom


@pytest.mark.parametrize("place", [0, 1, 41])
def test_one_draw_from_each_of_many_neighbouring_keys_is_uniform(place: int) -> None:
    for make in (lambda n: key(0, n, "flip"), lambda n: n):
        draws = [uniform(make(n), place + 1)[place] for n in range(10_000)]
        counts = np.histogram(draws, bins=100, range=(0, 1))[0]
        assert ((counts - 100.0) ** 2 / 100.0).sum() < 148.2


def test_every_bit_is_set_half_of_the_time() -> None:
    hashed = hash_integers(key("bits"), counter(40_000))
    ones = np.array([((hashed >> np.uint64(bit)) & np.uint64(1)).sum() for bit in range(64)], dtype=np.float64)
    assert np.abs(ones - 20_000).max() < 4.5 * 100  # 100 is one standard deviation


def test_neighbouring_keys_and_neighbouring_numbers_are_uncorrelated() -> None:
    draws = np.stack([uniform(raw, 4_000) for raw in range(20)] + [uniform(key(0, n), 4_000) for n in range(20)])
    correlation = np.corrcoef(draws)  # (40, 40) between keys
    assert np.abs(correlation - np.eye(40)).max() < 5 / np.sqrt(4_000)
    for lag in (1, 2, 7):
        assert abs(np.corrcoef(draws[0, :-lag], draws[0, lag:])[0, 1]) < 5 / np.sqrt(4_000)


def test_neighbouring_keys_share_no_number() -> None:
    hashed = np.concatenate([hash_integers(raw, counter(1_000)) for raw in range(50)])
    assert len(np.unique(hashed)) == 50_000


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 64, 1000, 4096])
def test_a_permutation_is_a_bijection(n: int) -> None:
    for seed in range(5):
        order = permutation(key("order", seed), n)
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_a_permutation_is_the_order_of_the_hashes() -> None:
    hashed = hash_integers(key("order"), counter(50)).tolist()
    assert permutation(key("order"), 50).tolist() == sorted(range(50), key=hashed.__getitem__)


def test_different_keys_permute_differently() -> None:
    orders = {tuple(permutation(raw, 12).tolist()) for raw in range(500)}
    assert len(orders) == 500


def test_all_permutations_of_four_come_up_equally_often() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for n in range(6_000):
        order = tuple(permutation(key("four", n), 4).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    assert sum((count - 250.0) ** 2 / 250.0 for count in counts.values()) < 49.7  # 0.999 quantile, 23 degrees
