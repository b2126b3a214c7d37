"""A sweep's table holds the numbers that its definition gives by hand, and says of which it has none."""

from __future__ import annotations

import csv
import io
import math

import pytest

from dist_mlpl.tools.sweep_page import sweep_page, sweep_tables
from dist_mlpl.tools.sweep_table import LEGEND, Difference, Result, Row, results_csv, rows_json, table_csv, tabulate

pytestmark = pytest.mark.unit

MAP = {("an", 0): 0.60, ("an", 1): 0.64, ("an", 2): 0.68, ("mean", 0): 0.65, ("mean", 1): 0.67, ("mean", 2): 0.75}


def result(method: str, seed: int, *, known: str = "0.1", **metrics: float) -> Result:
    return Result(method, known, seed, "test", metrics)


def results() -> list[Result]:
    return [result(method, seed, mAP=value, OF1=value / 2) for (method, seed), value in MAP.items()]


def row_of(rows: list[Row], method: str, known: str = "0.1") -> Row:
    (row,) = [row for row in rows if (row.method, row.known) == (method, known)]
    return row


def test_mean_and_deviation_are_those_worked_out_by_hand() -> None:
    rows = tabulate(results())
    assert row_of(rows, "an").spreads["mAP"] == pytest.approx((0.64, 0.04))
    assert row_of(rows, "mean").spreads["mAP"] == pytest.approx((0.69, math.sqrt((0.04**2 + 0.02**2 + 0.06**2) / 2)))
    assert row_of(rows, "an").num_seeds == 3
    assert set(row_of(rows, "an").spreads) == {"mAP", "OF1"}


def test_differences_are_taken_seed_by_seed_with_the_standard_error_of_their_mean() -> None:
    difference = row_of(tabulate(results(), baseline="an"), "mean").differences["mAP"]
    # 0.05, 0.03, 0.07: mean 0.05, deviation 0.02, over the root of three seeds
    assert difference == pytest.approx((0.05, 0.02 / math.sqrt(3), 3))
    assert difference.verdict == "higher"


def test_the_baseline_has_no_difference_to_itself() -> None:
    assert row_of(tabulate(results(), baseline="an"), "an").differences == {}
    assert all(row.differences == {} for row in tabulate(results()))


def test_only_seeds_that_both_methods_have_are_compared() -> None:
    some = [one for one in results() if (one.method, one.seed) not in {("an", 0), ("mean", 2)}]
    difference = row_of(tabulate(some, baseline="an"), "mean").differences["mAP"]
    assert difference.num_seeds == 1
    assert difference.mean == pytest.approx(0.03)
    assert math.isnan(difference.error)
    assert difference.verdict == ""
    apart = [one for one in results() if (one.method == "an") == (one.seed == 0)]
    assert row_of(tabulate(apart, baseline="an"), "mean").differences == {}


@pytest.mark.parametrize(
    ("mean", "error", "verdict"),
    [(0.03, 0.01, "higher"), (-0.03, 0.01, "lower"), (0.02, 0.01, "level"), (0.0, 0.0, "level"), (1e-9, 0.0, "higher")],
)
def test_a_difference_counts_beyond_two_standard_errors_over_three_seeds(
    mean: float, error: float, verdict: str
) -> None:
    assert Difference(mean, error, 3).verdict == verdict
    assert Difference(mean, error, 2).verdict == ""


def test_the_terminal_and_the_page_say_what_higher_and_lower_mean() -> None:
    rows = tabulate(results(), baseline="an")
    (table,) = sweep_tables(rows, baseline="an")
    assert table.caption == LEGEND
    assert LEGEND[1:] in sweep_page(rows, results(), title="t", baseline="an")
    (table,) = sweep_tables(tabulate(results()), baseline=None)
    assert table.caption is None, "without a baseline there is no verdict"


def test_fractions_are_compared_within_themselves_and_come_in_their_order() -> None:
    more = [*results(), result("mean", 0, known="0.5", mAP=0.9), result("an", 0, known="0.5", mAP=0.8)]
    rows = tabulate(more, baseline="an")
    assert [(row.known, row.method) for row in rows] == [
        ("0.1", "an"), ("0.1", "mean"), ("0.5", "mean"), ("0.5", "an"),
    ]  # fmt: skip
    assert row_of(rows, "mean", "0.5").differences["mAP"].mean == pytest.approx(0.1)


def test_a_run_made_twice_counts_once() -> None:
    assert row_of(tabulate([*results(), result("an", 0, mAP=0.60, OF1=0.3)]), "an").num_seeds == 3


def test_the_csv_files_hold_the_unrounded_numbers() -> None:
    (line,) = [line for line in csv.DictReader(io.StringIO(results_csv(results()))) if line["seed"] == "2"][:1]
    assert (line["method"], float(line["mAP"]), line["CF1"]) == ("an", 0.68, "")
    rows = tabulate(results(), baseline="an")
    lines = {line["method"]: line for line in csv.DictReader(io.StringIO(table_csv(rows)))}
    assert float(lines["mean"]["mAP_difference_error"]) == row_of(rows, "mean").differences["mAP"].error
    assert lines["mean"]["mAP_verdict"] == "higher"
    assert lines["an"]["mAP_difference"] == ""


def test_json_has_no_nan() -> None:
    (row,) = rows_json(tabulate([result("an", 0, mAP=0.5)]))
    assert row["mAP"] == {"mean": 0.5, "deviation": None}


def test_the_page_holds_every_method_and_number_and_loads_nothing() -> None:
    rows = tabulate([*results(), result("a<b", 0, mAP=0.1)], baseline="an")
    page = sweep_page(rows, [*results(), result("a<b", 0, mAP=0.1)], title="t", baseline="an")
    assert "a&lt;b" in page
    assert "a<b" not in page
    assert "0.690 ± 0.053" in page
    assert "+0.050 ± 0.012" in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert page.count("<circle") == 7 + 6  # a dot a run and chart; the one without OF1 has none there


def test_the_terminal_has_one_table_for_each_fraction() -> None:
    tables = sweep_tables(tabulate([*results(), result("an", 0, known="0.5", mAP=0.8)], baseline="an"), baseline="an")
    assert [table.row_count for table in tables] == [2, 1]
