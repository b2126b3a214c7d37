"""Claims about the one label code: each converter against a loop over its convention, strangers refused by place."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from dist_mlpl.errors import LabelCodeError
from dist_mlpl.labels import check_codes, dense_targets, from_confidence, from_nan, from_one_zero

pytestmark = pytest.mark.unit

NAN = math.nan


def converted_by_loop(values: npt.NDArray, meaning: Callable[[float], int]) -> npt.NDArray[np.int8]:
    codes = np.empty(values.shape, dtype=np.int8)
    for place in np.ndindex(values.shape):
        codes[place] = meaning(float(values[place]))
    return codes


@pytest.mark.parametrize(
    ("convert", "alphabet", "meaning"),
    [
        (lambda v: from_one_zero(v, zero="absent"), [1, 0, -1], {1: 1, 0: -1, -1: 0}.__getitem__),
        (lambda v: from_one_zero(v, zero="unknown"), [1, 0, -1], {1: 1, 0: 0, -1: -1}.__getitem__),
        (from_nan, [1.0, 0.0, NAN], lambda value: 0 if math.isnan(value) else 1 if value else -1),
        (from_confidence, [1.0, 0.0], {1.0: 1, 0.0: -1}.__getitem__),
        (lambda v: check_codes(v, where="x"), [1, 0, -1], lambda value: int(value)),
    ],
)
def test_converters_give_what_a_loop_over_the_convention_gives(
    convert: Callable[[npt.NDArray], npt.NDArray], alphabet: list[float], meaning: Callable[[float], int]
) -> None:
    random = np.random.default_rng(0)
    for shape in ((), (0,), (7,), (5, 4), (2, 3, 4)):
        for _ in range(20):
            values = random.choice(np.array(alphabet), size=shape)
            codes = convert(values)
            assert codes.dtype == np.int8
            np.testing.assert_array_equal(codes, converted_by_loop(np.asarray(values), meaning))


@pytest.mark.parametrize(
    ("convert", "strangers"),
    [
        (lambda v: check_codes(v, where="the matrix"), [2.0, -2.0, 0.5, NAN]),
        (lambda v: from_one_zero(v, zero="absent", where="the matrix"), [2.0, 0.5, NAN]),
        (lambda v: from_nan(v, where="the matrix"), [-1.0, 0.5, 2.0, math.inf]),
        (lambda v: from_confidence(v, where="the matrix"), [-1.0, 0.9, NAN]),
    ],
)
def test_a_stranger_is_refused_by_value_and_place(
    convert: Callable[[npt.NDArray], npt.NDArray], strangers: list[float]
) -> None:
    for stranger in strangers:
        values = np.ones((4, 5))
        values[2, 3] = values[3, 1] = stranger
        with pytest.raises(LabelCodeError) as caught:
            convert(values)
        assert caught.value.found == f"label value {stranger!r} at (2, 3)"
        assert caught.value.where == "the matrix"


def test_values_that_int8_would_wrap_are_refused() -> None:
    with pytest.raises(LabelCodeError, match="255 at"):
        check_codes(np.array([255]), where="x")
    with pytest.raises(LabelCodeError, match="257 at"):
        check_codes(np.array([257]), where="x")


@pytest.mark.parametrize(("unlisted", "fill"), [("absent", -1), ("unknown", 0)])
def test_dense_targets_are_the_lists_spread_out(unlisted: str, fill: int) -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        num_rows, num_classes = int(random.integers(0, 6)), int(random.integers(1, 12))
        dense = np.full((num_rows, num_classes), fill, dtype=np.int8)
        positives, negatives = [], []
        for row in range(num_rows):
            draws = random.integers(0, 3, size=num_classes)
            positives.append(np.flatnonzero(draws == 1).astype(np.uint16))
            negatives.append(np.flatnonzero(draws == 2).astype(np.uint16))
            for column, draw in enumerate(draws):
                dense[row, column] = {0: fill, 1: 1, 2: -1}[int(draw)]
        found = dense_targets(positives, negatives, num_classes=num_classes, unlisted=unlisted)  # type: ignore[arg-type]
        assert found.dtype == np.int8
        np.testing.assert_array_equal(found, dense)


@pytest.mark.parametrize("class_id", [-1, 3, 400])
def test_a_class_that_is_not_there_is_refused_in_place_of_counting_from_the_last(class_id: int) -> None:
    lists = [np.array([1, class_id]), np.array([], dtype=np.int64)]
    for positives, negatives in ((lists, lists[::-1]), (lists[::-1], lists)):
        with pytest.raises(LabelCodeError, match=rf"class ids from .*{class_id}"):
            dense_targets(positives, negatives, num_classes=3, unlisted="unknown")


def test_presence_wins_where_an_id_is_in_both_lists() -> None:
    both = [np.array([1])]
    assert dense_targets(both, both, num_classes=3, unlisted="unknown").tolist() == [[0, 1, 0]]
