"""Claims about heatmaps in memory: what crops and flips read and write, what bytes keep, and who holds a slot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dist_mlpl.banks.heatmaps import (
    EMPTY,
    CellGrid,
    HeatmapBank,
    Slots,
    decode_maps,
    encode_maps,
    keyed_rows,
    read_through_crop,
    visible_share,
    write_through_crop,
)
from dist_mlpl.banks.slots import renew_slots
from dist_mlpl.errors import BankError
from tests.support.heatmaps import read_oracle, slots_oracle, write_oracle

pytestmark = pytest.mark.unit

WHOLE = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
PRINTED = torch.tensor(
    [[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8], [0.0, 0.1, 0.0, 0.1], [0.9, 0.8, 0.7, 0.6]], dtype=torch.float64
)
RESNET = CellGrid(side=64, stride=8.0, first=0.5)


def crops(count: int, generator: torch.Generator) -> Tensor:
    """(count, 4) boxes inside the image, of any place and shape."""
    low = torch.rand(count, 2, generator=generator) * 0.8
    size = 0.02 + torch.rand(count, 2, generator=generator) * (0.98 - low)
    return torch.cat([low, size], dim=1)


def flags(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) < 0.5


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Geometry ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "flipped", "expected"),
    [
        ((0.25, 0.0, 0.5, 0.5), False, [[0.2, 0.3], [0.6, 0.7]]),
        ((0.25, 0.0, 0.5, 0.5), True, [[0.3, 0.2], [0.7, 0.6]]),
        ((0.2, 0.1, 0.6, 0.5), False, [[0.343333, 0.476667], [0.383333, 0.436667]]),
    ],
)
def test_reading_gives_the_printed_vectors(box, flipped, expected):
    crop = torch.tensor([box], dtype=torch.float64)
    read = read_through_crop(PRINTED[None, None], crop, torch.tensor([flipped]), 2)
    torch.testing.assert_close(read[0, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_writing_gives_the_printed_vectors():
    crop, flipped = torch.tensor([[0.2, 0.1, 0.6, 0.5]], dtype=torch.float64), torch.tensor([True])
    zeros, ones = torch.zeros(1, 1, 4, 4, dtype=torch.float64), torch.ones(1, 1, 2, 2, dtype=torch.float64)
    covered = write_through_crop(zeros, ones, crop, flipped, 0.0)[0, 0]
    expected = [[0.12, 0.6, 0.6, 0.12], [0.2, 1, 1, 0.2], [0.08, 0.4, 0.4, 0.08], [0, 0, 0, 0]]
    torch.testing.assert_close(covered, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
    evidence = torch.tensor([[[[1.0, 0.0], [0.5, 0.25]]]], dtype=torch.float64)
    moved = write_through_crop(zeros, evidence, crop, flipped, 0.0)[0, 0]
    shown = torch.where(covered > 0, moved / covered, 0.0)
    expected = [[0, 0, 1, 1], [0.15, 0.15, 0.7, 0.7], [0.25, 0.25, 0.5, 0.5], [0, 0, 0, 0]]
    torch.testing.assert_close(shown, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid", [None, RESNET], ids=["even", "residual"])
@pytest.mark.parametrize(("W", "G"), [(4, 3), (7, 7), (5, 8)])
def test_random_crops_and_flips_read_and_write_what_loops_over_rectangles_do(W, G, grid):
    generator = seeded(W * G)
    crop, flipped = crops(6, generator), flags(6, generator)
    grid = grid and grid._replace(side=8 * G)
    heatmaps = torch.rand(6, 2, W, W, generator=generator, dtype=torch.float64)
    heatmaps[1::2][torch.rand(3, 2, W, W, generator=generator) < 0.4] = torch.nan
    evidence = torch.rand(6, 2, G, G, generator=generator, dtype=torch.float64)
    read = read_through_crop(heatmaps, crop, flipped, G, grid=grid)
    written = write_through_crop(heatmaps, evidence, crop, flipped, 0.7, grid=grid)
    for b in range(6):
        for m in range(2):
            expected = read_oracle(heatmaps[b, m], crop[b], bool(flipped[b]), G, grid)
            torch.testing.assert_close(read[b, m], expected, rtol=0, atol=1e-10, equal_nan=True)
            expected, _ = write_oracle(heatmaps[b, m], evidence[b, m], crop[b], bool(flipped[b]), 0.7, grid)
            torch.testing.assert_close(written[b, m], expected, rtol=0, atol=1e-10, equal_nan=True)


@given(seed=st.integers(0, 10**6), W=st.integers(1, 16), G=st.integers(1, 16))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_constants_stay_the_covered_area_is_the_crops_and_means_stay_between_extremes(seed, W, G):
    generator = seeded(seed)
    crop, flipped = crops(4, generator), flags(4, generator)
    constant = torch.full((4, 1, W, W), 0.3, dtype=torch.float64)
    read = read_through_crop(constant, crop, flipped, G)
    torch.testing.assert_close(read, torch.full_like(read, 0.3), rtol=0, atol=1e-12)
    same = torch.full((4, 1, G, G), 0.3, dtype=torch.float64)
    torch.testing.assert_close(write_through_crop(constant, same, crop, flipped, 0.5), constant, rtol=0, atol=1e-12)
    covered = write_through_crop(torch.zeros_like(constant), torch.ones_like(same), crop, flipped, 0.0)
    area = (crop[:, 2].double() * crop[:, 3].double())[:, None]
    torch.testing.assert_close(covered.sum(dim=(2, 3)) / W**2, area, rtol=0, atol=1e-12)
    heatmaps = torch.rand(4, 1, W, W, generator=generator, dtype=torch.float64)
    read = read_through_crop(heatmaps, crop, flipped, G)
    assert bool((read <= heatmaps.amax(dim=(2, 3), keepdim=True) + 1e-12).all())
    assert bool((read >= heatmaps.amin(dim=(2, 3), keepdim=True) - 1e-12).all())


@given(seed=st.integers(0, 10**6), W=st.integers(1, 16))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_flip_mirrors_what_is_read_and_undoes_itself_on_writing(seed, W):
    generator = seeded(seed)
    crop = crops(4, generator)
    no, yes = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    heatmaps = torch.rand(4, 2, W, W, generator=generator, dtype=torch.float64)
    plain, mirrored = (read_through_crop(heatmaps, crop, flipped, 5) for flipped in (no, yes))
    torch.testing.assert_close(mirrored, plain.flip(-1), rtol=0, atol=1e-12)
    written = write_through_crop(heatmaps, plain, crop, no, 0.4)
    torch.testing.assert_close(
        write_through_crop(heatmaps, plain.flip(-1), crop, yes, 0.4), written, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("W", [1, 3, 7, 14, 28])
def test_a_crop_of_everything_is_the_identity_to_the_bit(W):
    heatmaps = torch.rand(2, 3, W, W, generator=seeded(W))
    crop, flipped = WHOLE.repeat(2, 1), torch.tensor([False, True])
    read = read_through_crop(heatmaps, crop, flipped, W)
    assert torch.equal(read[0], heatmaps[0])
    assert torch.equal(read[1], heatmaps[1].flip(-1))
    nothing = torch.full_like(heatmaps, torch.nan)
    assert torch.equal(write_through_crop(nothing, read, crop, flipped, 0.8), heatmaps)


def test_a_view_and_its_mirror_image_agree_only_where_cells_look():
    """A spot of light seen by cells centred on pixels 0, 8, .. of 64: what the two views write meets in one place."""
    spot = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    spot[0, 0, 29:36, 29:36] = 1.0
    both = torch.tensor([False, True])
    seen = read_through_crop(spot.repeat(2, 1, 1, 1), WHOLE.repeat(2, 1), both, 8, grid=RESNET)
    column = torch.arange(64, dtype=torch.float64)

    def apart(grid: CellGrid | None) -> float:
        nothing = torch.full((2, 1, 64, 64), torch.nan, dtype=torch.float64)
        maps = write_through_crop(nothing, seen, WHOLE.repeat(2, 1), both, 0.8, grid=grid)
        centres = (maps.sum(2)[:, 0] * column).sum(1) / maps.sum(dim=(1, 2, 3))
        return float((centres[0] - centres[1]).abs())

    assert apart(None) > 6.0  # pixels: almost a cell
    assert apart(RESNET) < 1.0


def test_first_writes_fill_what_they_cover_by_half_and_leave_the_rest_unknown():
    nothing = torch.full((1, 1, 4, 4), torch.nan)
    crop = torch.tensor([[0.0, 0.0, 0.625, 0.6]])  # half of the third column, 0.4 of the third row
    written = write_through_crop(nothing, torch.full((1, 1, 2, 2), 0.7), crop, torch.tensor([False]), 0.8)[0, 0]
    assert torch.equal(written.isnan(), torch.tensor([[0, 0, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]).bool())
    torch.testing.assert_close(written[:2, :3], torch.full((2, 3), 0.7))
    read = read_through_crop(written[None, None], WHOLE, torch.tensor([False]), 2)[0, 0]
    assert read.isnan().tolist() == [[False, False], [True, True]]  # the second cell is known by half


def test_after_many_crops_the_memory_is_the_field_that_was_shown():
    generator = seeded(0)
    centres = {W: (torch.arange(W) + 0.5) / W for W in (7, 56)}
    smooth = {W: 0.5 + 0.4 * torch.sin(3 * a)[:, None] * torch.cos(2 * a) for W, a in centres.items()}
    memory = torch.full((1, 1, 7, 7), torch.nan, dtype=torch.float64)
    fine = smooth[56].double()[None, None]
    for _ in range(40):
        crop, flipped = crops(1, generator), flags(1, generator)
        memory = write_through_crop(memory, read_through_crop(fine, crop, flipped, 7), crop, flipped, 0.8)
    assert float((memory - smooth[7]).abs().nanmean()) < 0.02


@pytest.mark.parametrize(
    "crop",
    [
        (-0.1, 0.0, 0.5, 0.5), (0.0, -0.01, 0.5, 0.5), (0.6, 0.0, 0.5, 0.5), (0.0, 0.5, 0.5, 0.51),
        (0.2, 0.2, 0.0, 0.5), (0.2, 0.2, 0.5, -0.1), (float("nan"), 0.0, 0.5, 0.5),
        (0.0, 0.0, float("inf"), 0.5), (0, 0, 64, 64),
    ],
)  # fmt: skip
def test_a_crop_outside_the_image_is_refused_by_number(crop):
    maps, flipped = torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.bool)
    both = torch.cat([WHOLE, torch.tensor([crop])])
    for use in (
        lambda: read_through_crop(maps, both, flipped, 2),
        lambda: write_through_crop(maps, torch.rand(2, 1, 2, 2), both, flipped, 0.8),
        lambda: visible_share(maps, both),
    ):
        with pytest.raises(BankError, match="crop") as caught:
            use()
        assert "image 1" in caught.value.where


def test_a_crop_that_leaves_the_image_by_rounding_is_taken():
    left = torch.tensor(1 / 3)
    crop = torch.stack([left, left, torch.tensor(1.0) - left + 1e-7, torch.tensor(2 / 3)])[None]
    inside = torch.stack([left, left, torch.tensor(2 / 3), torch.tensor(2 / 3)])[None]
    maps, flipped = torch.rand(1, 1, 4, 4), torch.tensor([False])
    torch.testing.assert_close(read_through_crop(maps, crop, flipped, 2), read_through_crop(maps, inside, flipped, 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_evidence_that_is_not_finite_is_refused(bad):
    evidence = torch.rand(1, 1, 2, 2)
    evidence[0, 0, 1, 0] = bad
    with pytest.raises(BankError, match="not finite"):
        write_through_crop(torch.rand(1, 1, 4, 4), evidence, WHOLE, torch.tensor([False]), 0.8)


def test_what_a_crop_leaves_in_view_is_its_strongest_cell_over_the_strongest_of_all():
    heatmaps = torch.zeros(1, 4, 4, 4)
    heatmaps[0, 0, 0, 0], heatmaps[0, 0, 3, 3] = 0.8, 0.2
    heatmaps[0, 1] = torch.nan
    heatmaps[0, 2, 3, 3] = torch.nan
    heatmaps[0, 2, 0, 0] = 0.5
    crop = torch.tensor([[0.6, 0.6, 0.4, 0.4]])  # 0.6 of the third column and row, all of the fourth
    assert visible_share(heatmaps, crop).tolist() == [[0.25, 1.0, 0.0, 1.0]]
    assert visible_share(heatmaps[:, :1], WHOLE).tolist() == [[1.0]]


# Bytes ---------------------------------------------------------------------------------------------------------------


def chance(count: int, visit: int) -> np.ndarray:
    return keyed_rows(7, torch.arange(count), torch.full((count,), visit))


@pytest.mark.parametrize("target", [0.60, 0.05])
def test_a_running_average_kept_in_bytes_ends_where_it_should(target):
    """1,000 cells, 400 updates, momentum 0.8: nearest rounding ends at 0.592 and 0.043."""
    codes = torch.zeros(1000, 1, 1, 1, dtype=torch.uint8)
    crop, flipped = WHOLE.repeat(1000, 1), torch.zeros(1000, dtype=torch.bool)
    evidence = torch.full((1000, 1, 1, 1), target)
    for visit in range(400):
        moved = write_through_crop(decode_maps(codes), evidence, crop, flipped, 0.8)
        codes = encode_maps(moved, chance(1000, visit))
    assert abs(float(decode_maps(codes).mean()) - target) < 0.005


def test_every_code_comes_back_as_it_was_whatever_is_drawn():
    codes = torch.arange(256).to(torch.uint8).repeat(64, 1).view(64, 1, 16, 16)
    assert torch.equal(encode_maps(decode_maps(codes), chance(64, 3)), codes)


def test_rounding_is_fair_and_keyed_by_image_visit_and_cell():
    value = torch.full((400, 2, 4, 4), 100.25 / 254)
    codes = encode_maps(value, chance(400, 1))
    assert set(codes.unique().tolist()) == {100, 101}
    assert float(codes.float().mean()) == pytest.approx(100.25, abs=0.02)
    assert torch.equal(encode_maps(value, chance(400, 1)), codes)
    assert torch.equal(encode_maps(value[5:9], chance(400, 1)[5:9]), codes[5:9])
    assert not torch.equal(encode_maps(value, chance(400, 2)), codes)
    assert len({tuple(row.flatten().tolist()) for row in codes}) > 390


def test_a_row_of_32_slots_of_14_x_14_cells_takes_less_than_6_5_kb():
    bank = HeatmapBank("slots", 2048, num_slots=32, map_size=14, seed=0)
    assert bank.shard_bytes(0) / 2 == 6468


def test_slots_come_back_as_they_were_written_but_for_rounding():
    bank = HeatmapBank("slots", 100, num_slots=3, map_size=4, seed=0)
    before = bank.read_slots(torch.tensor([5]))
    assert before.classes.tolist() == [[EMPTY] * 3]
    assert before.visits.tolist() == [0]
    heatmaps = torch.rand(2, 3, 4, 4, generator=seeded(0))
    heatmaps[0, 1] = torch.nan
    slots = Slots(torch.tensor([[4, 2, EMPTY], [0, 1, 9]]), torch.rand(2, 3), heatmaps, torch.tensor([1, 3]))
    bank.write_slots(torch.tensor([7, 99]), slots)
    read = bank.read_slots(torch.tensor([99, 7]))
    assert torch.equal(read.classes, slots.classes.flip(0))
    assert torch.equal(read.visits, slots.visits.flip(0))
    torch.testing.assert_close(read.scores, slots.scores.flip(0), rtol=0, atol=1e-3)
    torch.testing.assert_close(read.heatmaps, heatmaps.flip(0), rtol=0, atol=1 / 254, equal_nan=True)


def test_no_nan_enters_as_a_score_and_no_logit_as_a_map():
    bank = HeatmapBank("slots", 100, num_slots=2, map_size=2, seed=0)
    good = Slots(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), torch.rand(1, 2, 2, 2), torch.tensor([1]))
    maps = [good.heatmaps - 3.0, good.heatmaps + 1.1, torch.full_like(good.heatmaps, torch.inf)]
    wrong = [good._replace(heatmaps=bad) for bad in maps]
    for bad in (*wrong, good._replace(scores=torch.tensor([[0.5, torch.nan]]))):
        with pytest.raises(BankError, match=r"heatmaps from|not finite"):
            bank.write_slots(torch.tensor([3]), bad)
    assert bank.read_slots(torch.tensor([3])).visits.tolist() == [0]


def test_writing_no_images_changes_nothing():
    bank = HeatmapBank("slots", 100, num_slots=2, map_size=3, seed=0)
    written = bank.read_slots(torch.tensor([1]))._replace(visits=torch.tensor([1]))
    bank.write_slots(torch.tensor([1]), written)
    empty = bank.read_slots(torch.empty(0, dtype=torch.int64))
    assert empty.heatmaps.shape == (0, 2, 3, 3)
    bank.write_slots(torch.empty(0, dtype=torch.int64), empty)
    assert bank.read_slots(torch.arange(100)).visits.tolist() == [0, 1, *[0] * 98]


def test_scores_without_maps_are_read_back():
    bank = HeatmapBank("slots", 100, num_slots=2, map_size=0, seed=0)
    given = Slots(torch.tensor([[5, EMPTY]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 0, 0), torch.tensor([3]))
    bank.write_slots(torch.tensor([1]), given)
    for found, expected in zip(bank.read_slots(torch.tensor([1])), given, strict=True):
        torch.testing.assert_close(found, expected)


# Slots ---------------------------------------------------------------------------------------------------------------


def random_slots(n: int, M: int, C: int, generator: torch.Generator) -> Slots:
    classes = torch.stack([torch.randperm(C, generator=generator)[:M] for _ in range(n)])
    classes = classes.masked_fill(torch.rand(n, M, generator=generator) < 0.3, EMPTY)
    scores = torch.rand(n, M, generator=generator)
    return Slots(classes, scores, torch.rand(n, M, 2, 2, generator=generator), torch.ones(n, dtype=torch.int64))


@given(seed=st.integers(0, 10**6), C=st.integers(1, 12), slots_wanted=st.integers(1, 12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_slots_go_to_whom_a_slow_reading_of_the_policy_gives_them(seed, C, slots_wanted):
    generator, M = seeded(seed), min(C, slots_wanted)
    before = random_slots(5, M, C, generator)
    probs = torch.rand(5, C, generator=generator)
    targets = torch.randint(-1, 2, (5, C), generator=generator).to(torch.int8)
    after = renew_slots(before, probs, targets, margin=0.05)
    expected = slots_oracle(before, probs, targets, margin=0.05)
    for row in range(5):
        held = {int(c): m for m, c in enumerate(after.classes[row]) if c != EMPTY}
        assert held.keys() == expected[row].keys()
        for c, m in held.items():
            if expected[row][c] is None:
                assert float(after.scores[row, m]) == float(probs[row, c])
                assert bool(after.heatmaps[row, m].isnan().all())
            else:
                assert before.classes[row, m] == c  # who stays keeps its place
                assert float(after.scores[row, m]) == expected[row][c]
                assert torch.equal(after.heatmaps[row, m], before.heatmaps[row, m])


def test_an_annotated_class_is_never_moved_out_and_an_absent_one_leaves_at_once():
    nothing = Slots(torch.full((1, 2), EMPTY), torch.zeros(1, 2), torch.full((1, 2, 1, 1), torch.nan), torch.zeros(1))
    targets = torch.tensor([[1, 0, 0, 0]], dtype=torch.int8)
    slots = renew_slots(nothing, torch.tensor([[0.0, 0.2, 0.1, 0.0]]), targets, margin=0.05)
    assert set(slots.classes[0].tolist()) == {0, 1}
    slots = renew_slots(slots, torch.tensor([[0.0, 0.2, 0.24, 0.9]]), targets, margin=0.05)
    assert set(slots.classes[0].tolist()) == {0, 3}
    slots = renew_slots(slots, torch.tensor([[0.0, 0.94, 0.0, 0.9]]), targets, margin=0.05)
    assert set(slots.classes[0].tolist()) == {0, 3}  # 0.94 does not exceed 0.9 by the margin
    slots = renew_slots(slots, torch.tensor([[0.0, 0.1, 0.0, 0.9]]), targets.masked_fill(targets == 0, -1), margin=0.05)
    assert sorted(slots.classes[0].tolist()) == [EMPTY, 0]
