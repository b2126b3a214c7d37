"""Claims about EN + CL + SCL as a method: its terms against loops, and what it remembers of an image."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

import tests.support.methods as contract
from dist_mlpl.banks.heatmaps import EMPTY, HeatmapBank, Slots
from dist_mlpl.batch import Batch, Progress, StepOutput
from dist_mlpl.errors import BankError
from dist_mlpl.methods.base import HEATMAPS, Method
from dist_mlpl.methods.spatial_consistency import (
    EVICTED,
    HELD,
    cell_grid,
    classification_loss,
    logits_of_mean_probs,
    slot_shares,
)
from dist_mlpl.methods.table import METHODS
from tests.support.heatmaps import read_oracle, slots_oracle, write_oracle
from tests.support.losses import expected_negative_oracle
from tests.support.methods import CONTRACT, IMAGE_SIZE, NUM_CLASSES, random_batch, tiny_method
from tests.support.training import make_engine

pytestmark = pytest.mark.unit

FIRST, LATER = Progress(), Progress(epoch=2, step=9, fraction=0.1)  # half way up the ramp
K = 2.0


def method_with(**keys: Any) -> Method:
    return tiny_method("spatial_consistency", **({"expected_positives": K, "map_size": 6} | keys)).eval()


def cropped_batch(seed: int, *, known_fraction: float = 0.4) -> Batch:
    """12 images through crops and flips, of which three rows are not valid."""
    generator = torch.Generator().manual_seed(seed)
    batch = random_batch(12, seed=9, known_fraction=known_fraction)
    low = 0.5 * torch.rand(12, 2, generator=generator)
    size = 0.3 + torch.rand(12, 2, generator=generator) * (0.7 - low)
    valid = torch.ones(12, dtype=torch.bool)
    valid[[2, 7, 11]] = False
    crop = torch.cat([low, size], dim=1)
    crop[~valid] = 0.0  # whatever is there is not looked at
    index = torch.where(valid, (batch.index * 31 + 5) % 97, -1)
    flipped = torch.rand(12, generator=generator) < 0.5
    images = batch.images * torch.rand(12, 1, 1, 1, generator=generator) * 2
    return batch._replace(images=images, crop=crop, flipped=flipped, valid=valid, index=index)


def step(method: Method, batch: Batch, progress: Progress = LATER) -> StepOutput:
    """One step without an update."""
    output = method(batch, method.recall(batch, progress))
    method.observe(batch, output)
    return output


def remembered(method: Method, batch: Batch) -> Slots:
    return method.banks()["slots"].read_slots(batch.index[batch.valid])


def all_maps(method: Method, batch: Batch) -> Tensor:
    """(n, C, G, G) probabilities of every class in every cell, of the valid rows."""
    with torch.no_grad(), method.asking(HEATMAPS):
        return torch.sigmoid(method(batch, None).extras[HEATMAPS][batch.valid])


@pytest.mark.parametrize("progress", [contract.PROGRESS, LATER], ids=["first epoch", "third epoch"])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize(
    "keys",
    [
        {}, {"expected_positives": K, "num_slots": 2}, {"expected_positives": K, "faithful": True},
        {"expected_positives": K, "spatial_weight": 0.0}, {"pooling": "max", "dropout": 0.3, "consistency_weight": 0.0},
    ],
    ids=["defaults", "few slots", "faithful", "without maps", "without classes"],
)  # fmt: skip
def test_every_form_keeps_the_contract_with_a_memory_to_read(keys, check, progress, monkeypatch):
    monkeypatch.setattr(contract, "PROGRESS", progress)
    method = tiny_method("spatial_consistency", **keys)
    for seed in (20, 21, 22):
        step(method, random_batch(16, seed=seed), progress)
    check(method)


def mean_distance(pairs: list[tuple[float, float]]) -> float:
    return sum(abs(a - b) for a, b in pairs) / len(pairs) if pairs else 0.0


@pytest.mark.parametrize("num_slots", [NUM_CLASSES, 3])
def test_a_later_visits_terms_are_those_of_loops_over_what_was_remembered(num_slots):
    method = method_with(num_slots=num_slots, consistency_weight=0.7, spatial_weight=1.3, use_centres=False)
    for seed in range(3):
        step(method, cropped_batch(seed))
    batch = cropped_batch(7)
    before, valid = remembered(method, batch), batch.valid
    assert before.visits.unique().tolist() == [3]
    output = step(method, batch)
    maps, probs = all_maps(method, batch).double(), torch.sigmoid(output.logits[valid]).double()
    targets, crop, flipped = batch.targets[valid], batch.crop[valid], batch.flipped[valid]
    G = maps.shape[-1]
    held = slots_oracle(before, probs.float(), targets, margin=0.05)
    classes = cells = total = 0.0
    evicted = present = 0.0
    for row in range(len(probs)):
        mine = {int(c) for c in before.classes[row] if c != EMPTY and targets[row, c] != -1}
        positives = {c for c in range(NUM_CLASSES) if int(targets[row, c]) == 1}
        evicted += len(mine - held[row].keys()) / num_slots
        present += len(positives & held[row].keys()) / len(positives) if positives else 1.0
        own = {int(c): m for m, c in enumerate(before.classes[row]) if int(c) in held[row]}
        stay = {c: own[c] for c in own if held[row][c] is not None}
        classes += mean_distance([(float(probs[row, c]), float(before.scores[row, m])) for c, m in stay.items()])
        pairs, trust = [], torch.ones(NUM_CLASSES, dtype=torch.float64)
        for c, m in stay.items():
            heatmap = before.heatmaps[row, m].double()
            history = read_oracle(heatmap, crop[row], bool(flipped[row]), G)
            pairs += [
                (float(maps[row, c, a, b]), float(history[a, b]))
                for a in range(G) for b in range(G) if not math.isnan(float(history[a, b]))
            ]  # fmt: skip
            if int(targets[row, c]) == 1:
                _, inside = write_oracle(heatmap, torch.zeros(1, 1), crop[row], False, 0.0)
                seen = heatmap[(inside >= 0.5) & ~heatmap.isnan()]
                known = heatmap[~heatmap.isnan()]
                if len(seen) and float(known.max()) > 0:
                    trust[c] = min(1.0, float(seen.max() / known.max()) / 0.3)
        cells += mean_distance(pairs)
        ranking = torch.full((1, NUM_CLASSES), -1.0, dtype=torch.float64)
        for c, m in stay.items():
            ranking[0, c] = before.scores[row, m]
        x = output.logits[valid][row : row + 1].double()
        total += float(expected_negative_oracle(x, targets[row : row + 1], ranking, expected_positives=K))
        lost = (1 - trust) * torch.nn.functional.logsigmoid(x[0])
        total += float(lost[targets[row] == 1].sum())
    n = int(valid.sum())
    ramp = 0.1 / 0.2
    assert float(output.terms["classification"]) == pytest.approx(total / (n * NUM_CLASSES), rel=1e-5)
    assert float(output.terms["consistency"]) == pytest.approx(0.7 * ramp * classes / n, rel=1e-4)
    assert float(output.terms["spatial"]) == pytest.approx(1.3 * ramp * cells / n, rel=1e-4)
    assert float(output.extras[EVICTED]) == pytest.approx(evicted / n, rel=1e-5)
    assert float(output.extras[HELD]) == pytest.approx(present / n, rel=1e-5)


def test_what_tells_of_too_few_slots_counts_who_lost_one_and_what_is_present_without_one():
    targets = torch.tensor([[0, 0, 0, 0], [1, 0, -1, 0], [1, 1, 1, 1], [0, 0, 0, -1]], dtype=torch.int8)
    before = torch.tensor([[0, 1], [0, 2], [0, 1], [EMPTY, EMPTY]])
    after = torch.tensor([[3, 2], [0, 3], [0, 1], [1, EMPTY]])  # class 2 of the second image is known absent now
    nothing = torch.zeros(4, 2), torch.zeros(4, 2, 0, 0), torch.zeros(4)
    evicted, held = slot_shares(Slots(before, *nothing), Slots(after, *nothing), targets)
    assert float(evicted) == 2 / 2
    assert float(held) == 1 + 1 + 2 / 4 + 1


def test_a_step_reports_the_metrics_of_the_global_batch_however_it_is_cut():
    for micro_batch in (None, 4):
        method, batch = tiny_method("spatial_consistency", num_slots=1), random_batch(16, seed=0)
        batch = batch._replace(valid=torch.arange(16) != 3)
        output = make_engine("plain", method=method, micro_batch=micro_batch).train_step(
            batch, method.recall(batch, LATER), LATER
        )
        present = (batch.targets[batch.valid] == 1).sum(dim=1)
        assert output.extras[HELD] == pytest.approx(float((1 / present.clamp(min=1)).mean()))
        assert output.extras[EVICTED] == 0.0, "nobody to evict"
        assert sum(float(term) for term in output.terms.values()) == pytest.approx(float(output.loss), rel=1e-5)


def test_what_is_remembered_moves_by_the_momentum_through_the_crop():
    method = method_with(num_slots=NUM_CLASSES, use_centres=False)
    for seed in range(2):
        step(method, cropped_batch(seed))
    batch = cropped_batch(5)
    before, maps = remembered(method, batch), all_maps(method, batch).double()
    output = step(method, batch)
    after, valid = remembered(method, batch), batch.valid
    probs = torch.sigmoid(output.logits[valid])
    assert after.visits.tolist() == [3] * int(valid.sum())
    moved = 0
    for row, (crop, flipped) in enumerate(zip(batch.crop[valid], batch.flipped[valid], strict=True)):
        for m, c in enumerate(after.classes[row].tolist()):
            if c == EMPTY:
                continue
            label = int(batch.targets[valid][row, c])
            assert label != -1
            assert c == int(before.classes[row, m])
            mean = 0.8 * float(before.scores[row, m]) + 0.2 * float(probs[row, c])
            assert float(after.scores[row, m]) == pytest.approx(1.0 if label == 1 else mean, abs=2e-3)
            expected, _ = write_oracle(before.heatmaps[row, m], maps[row, c], crop, bool(flipped), 0.8)
            torch.testing.assert_close(
                after.heatmaps[row, m].double(), expected, rtol=0, atol=1.01 / 254, equal_nan=True
            )
            moved += 1
    assert moved > 20


def test_the_first_epoch_is_assume_negative_and_the_memory_is_written_in_it():
    method, batch = method_with(), cropped_batch(0)
    for visit in (1, 2):
        output = step(method, batch, FIRST)
        x, targets = output.logits[batch.valid].double(), batch.targets[batch.valid]
        total = expected_negative_oracle(x, targets, x, expected_positives=0.0)
        expected = float(total) / x.numel()
        if visit == 1:
            assert float(output.terms["classification"]) == pytest.approx(expected, rel=1e-5)
        assert float(output.terms["spatial"]) == float(output.terms["consistency"]) == 0.0
        assert remembered(method, batch).visits.unique().tolist() == [visit]


def test_a_label_counts_less_where_the_crop_hides_what_was_seen_of_it():
    """One class's evidence lies in the left half; a crop of the right half leaves a tenth of it in view."""
    method = method_with(consistency_weight=0.0, spatial_weight=1e-9, expected_positives=None)
    batch = random_batch(1, seed=0, known_fraction=0.0)
    batch.targets[0, 1] = 1
    heatmaps = torch.zeros(1, NUM_CLASSES, 6, 6)
    heatmaps[0, :, :, :3], heatmaps[0, :, :, 3:] = 0.9, 0.09
    slots = Slots(torch.arange(NUM_CLASSES)[None], torch.full((1, NUM_CLASSES), 0.5), heatmaps, torch.tensor([2]))
    method.banks()["slots"].write_slots(batch.index, slots)
    halves = {"left": [0.0, 0.0, 0.5, 1.0], "right": [0.5, 0.0, 0.5, 1.0]}
    losses = {}
    for name, box in halves.items():
        output = method(batch._replace(crop=torch.tensor([box])), method.recall(batch, LATER))
        losses[name] = float(output.terms["classification"]) * NUM_CLASSES
    present = -float(torch.nn.functional.logsigmoid(output.logits[0, 1]))
    assert losses["left"] - losses["right"] == pytest.approx((1 - 0.1 / 0.3) * present, rel=2e-2)
    early = slots._replace(visits=torch.tensor([1]))
    method.banks()["slots"].write_slots(batch.index, early)
    output = method(batch._replace(crop=torch.tensor([halves["right"]])), method.recall(batch, LATER))
    assert float(output.terms["classification"]) * NUM_CLASSES == pytest.approx(losses["left"], rel=1e-5)


@pytest.mark.parametrize("kind", ["all 14", "all -14", "all 40", "all -40", "one of 49", "ordinary"])
def test_the_logit_of_a_mean_probability_and_its_slope_are_exact_however_sure_the_cells_are(kind):
    maps = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    if kind == "one of 49":
        maps = maps - 14
        maps[..., 3, 4] = 14.0
    elif kind != "ordinary":
        maps = torch.full_like(maps, float(kind.split()[1]))
    cells = maps.double().requires_grad_()
    # 1 - p is the probability of -x: a difference from 1 would lose it
    expected = torch.sigmoid(cells).mean(dim=(2, 3)).log() - torch.sigmoid(-cells).mean(dim=(2, 3)).log()
    maps.requires_grad_()
    found = logits_of_mean_probs(maps)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6)
    for sign in (-1, 1):  # of a label that is present or absent
        (slope,) = torch.autograd.grad(F.softplus(sign * found).sum(), maps, retain_graph=True)
        (exact,) = torch.autograd.grad(F.softplus(sign * expected).sum(), cells, retain_graph=True)
        torch.testing.assert_close(slope.double(), exact, rtol=1e-4, atol=0.0)


def test_faithful_maps_start_at_zero_and_at_one_where_annotated_and_probabilities_are_pooled():
    method, batch = method_with(faithful=True, momentum=0.5, spatial_weight=1.0), cropped_batch(0)
    batch = batch._replace(crop=torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(12, 1), flipped=torch.zeros(12).bool())
    maps = all_maps(method, batch)
    output = step(method, batch, LATER)
    valid = batch.valid
    torch.testing.assert_close(torch.sigmoid(output.logits[valid]), maps.mean(dim=(2, 3)), rtol=1e-4, atol=1e-6)
    after = remembered(method, batch)
    targets = batch.targets[valid]
    start = (targets == 1).float()
    allowed = (targets != -1).sum()
    assert int((after.classes != EMPTY).sum()) == int(allowed)
    distance = total = 0.0
    for row in range(len(maps)):
        held = [c for c in after.classes[row].tolist() if c != EMPTY]
        distance += float((maps[row, held] - start[row, held, None, None]).abs().mean())
        for m, c in enumerate(after.classes[row].tolist()):
            if c != EMPTY:
                shown = torch.nn.functional.interpolate(maps[row, c][None, None], size=(12, 12))  # 4 and 6 divide 12
                shown = torch.nn.functional.avg_pool2d(shown, 2)[0, 0]
                expected = 0.5 * float(start[row, c]) + 0.5 * shown
                torch.testing.assert_close(after.heatmaps[row, m], expected, rtol=0, atol=1.01 / 254)
                total += 1
    assert total > 20
    assert float(output.terms["spatial"]) == pytest.approx(0.5 * distance / int(valid.sum()), rel=1e-4)


def test_memory_of_one_image_is_its_own_whoever_it_is_with():
    """The same images in another order, cut into micro-batches, leave the same bytes."""
    whole, cut = method_with(), method_with()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for seed in range(3):
        batch = cropped_batch(seed)
        step(whole, batch)
        shuffled = Batch._make(None if field is None else field[order] for field in batch)
        for start in (0, 4, 8):
            step(cut, shuffled.rows(start, start + 4))
    everything = torch.arange(100)
    rows = [method.banks()["slots"].read(everything) for method in (whole, cut)]
    for name in rows[0]:
        difference = (rows[0][name].float() - rows[1][name].float()).abs()
        assert float(difference.max()) <= (1 if name == "heatmaps" else 1e-3), name
        assert float((difference > 0).float().mean()) < 0.01, name


def test_a_crop_outside_the_image_is_refused_when_it_is_used():
    method, batch = method_with(), cropped_batch(0)
    batch.crop[0] = torch.tensor([0.5, 0.5, 0.6, 0.2])
    with pytest.raises(BankError, match="crop"):
        method(batch, method.recall(batch, LATER))


def test_residual_nets_look_half_a_cell_to_the_top_left_and_others_evenly():
    assert cell_grid("resnet50", 224, 7) == (224, 32.0, 0.5)
    assert cell_grid("resnet50", 225, 8) == (225, 32.0, 0.5)
    assert cell_grid("resnet_small", 64, 8) == (64, 8.0, 0.5)
    assert cell_grid("vit_b_16", 224, 14) is None
    method = method_with()
    (G,) = {method.explain(torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)).shape[-1]}
    assert method._grid(G) == (IMAGE_SIZE, IMAGE_SIZE / G, 0.5)


def test_a_cell_of_the_small_residual_net_answers_most_to_the_pixel_it_is_said_to_look_at():
    method = tiny_method("spatial_consistency", backbone={"name": "resnet_small"}).eval()
    images = torch.zeros(1, 3, 64, 64, requires_grad=True)
    torch.manual_seed(0)
    pull = torch.zeros(64, dtype=torch.float64)
    for _ in range(16):
        for parameter in method.backbone.parameters():
            if parameter.dim() == 4:
                torch.nn.init.normal_(parameter, std=0.1)
        noise = torch.randn(1, 3, 64, 64)
        feature_map = method.backbone(images + noise)
        (gradient,) = torch.autograd.grad((feature_map[:, :, 4, 4] * torch.randn(1, 128)).sum(), images)
        pull += gradient.double().pow(2).sum(dim=(0, 1, 2))
    centre = float((pull * (torch.arange(64) + 0.5)).sum() / pull.sum())
    assert abs(centre - (4 * 8 + 0.5)) < 2.0  # an even grid says 36


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"consistency_weight": 0.0, "spatial_weight": 0.0}, "no term"),
        ({"expected_positives": 31.4, "num_slots": 16}, "num_slots"),
        ({"momentum": 1.0}, "momentum"),
        ({"expected_positives": 0.4}, "expected_positives"),
        ({"expected_positives": 2.9, "faithful": True, "dropout": 0.5}, "faithful"),
        ({"expected_positives": 2.9, "faithful": True, "pooling": "max"}, "faithful"),
        ({"faithful": True, "num_slots": 5}, "num_slots set, but faithful"),
        ({"faithful": True, "trust_ratio": 0.9, "use_centres": False}, "trust_ratio, use_centres set, but faithful"),
        ({"spatial_weight": 0.0, "map_size": 28}, "map_size set, but without SCL"),
        ({"spatial_weight": 0.0, "trust_ratio": 0.9, "use_centres": False}, "trust_ratio, use_centres set, but"),
        ({"expected_positives": 2.9, "spatial_weight": 0.0, "consistency_weight": 0.0, "ramp_fraction": 0.7},
         "ramp_fraction set, but neither"),
        ({"heatmap_size": 14}, "heatmap_size"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(keys, word):
    with pytest.raises(ValidationError, match=word):
        METHODS["spatial_consistency"](backbone={"name": "resnet_small"}, **keys)


def test_faithful_has_a_slot_for_each_class_however_many_there_are():
    settings = METHODS["spatial_consistency"](
        backbone={"name": "resnet_small"}, expected_positives=36.4, faithful=True
    )  # fmt: skip
    method = settings.build(num_classes=40, image_size=32)
    method.begin_run(num_samples=2, epoch_samples=2, group_size=2, seed=0)
    bank = method.banks()["slots"]
    assert isinstance(bank, HeatmapBank)
    assert bank.read_slots(torch.tensor([0])).classes.shape == (1, 40)


def test_of_classes_without_a_told_slot_all_are_expected_absent() -> None:
    C, K = 6, 5  # one present, so four more are expected; but one class alone was seen before
    logits = torch.linspace(-1.0, 2.0, C)[None]
    targets = torch.tensor([[1, 0, 0, 0, 0, 0]], dtype=torch.int8)
    slots = Slots(torch.tensor([[3, EMPTY]]), torch.tensor([[0.7, 0.0]]), torch.zeros(1, 2, 0, 0), torch.tensor([1]))
    found = classification_loss(logits, targets, slots, slots.classes != EMPTY, torch.ones(1, 2), float(K))
    losses = torch.nn.functional.softplus(logits[0] * torch.tensor([-1.0] + [1.0] * (C - 1)))
    torch.testing.assert_close(found, losses[[0, 1, 2, 4, 5]].sum())
