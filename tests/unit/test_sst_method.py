"""Claims about SST as a method: its terms and transferred labels are the loop's, its schedule follows the position."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dist_mlpl import run
from dist_mlpl.batch import Progress
from dist_mlpl.errors import ConfigError
from dist_mlpl.methods.sst import Sst, SstSettings, likely_beside, mean_similarity
from dist_mlpl.models.cooccurrence import Pairs
from tests.support.methods import NUM_CLASSES, random_batch, tiny_method
from tests.support.semantic import LabelsOf, cosine, random_labels
from tests.support.sst import sst_oracle
from tests.support.training import make_engine

pytestmark = pytest.mark.unit

SMALL = {
    "head": {"embedding_width": 4, "attention_width": 6},
    "pairs": {"class_width": 5, "pair_width": 6},
    "ring_capacity": 6,
}
GROUP_SIZE = 8


class LabelsOfClasses(LabelsOf):
    """With what a run's labels say of themselves."""

    class samples:  # noqa: N801
        num_samples = 60

        class manifest:  # noqa: N801
            class_ids = tuple("abcde")


def tiny_sst(**keys: object) -> Sst:
    method = tiny_method("sst", **(SMALL | keys))
    assert isinstance(method, Sst)
    method.read_labels(LabelsOfClasses(random_labels(60, NUM_CLASSES, seed=0)))  # type: ignore[arg-type]
    with torch.no_grad():
        method.pair_head.pair_weight *= 30  # as after training: pairs differ
    return method.eval()


def test_a_run_notes_class_vectors_of_unknown_order_and_refuses_those_of_another(tmp_path):
    np.save(tmp_path / "vectors.npy", np.zeros((NUM_CLASSES, 4)))
    head = {"embeddings": str(tmp_path / "vectors.npy"), "attention_width": 6}
    (note,) = tiny_sst(head=head).notes
    assert "unchecked" in note
    (tmp_path / "vectors.classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert tiny_sst(head=head).notes == []
    (tmp_path / "vectors.classes.txt").write_text("a\nb\nc\ne\nd\n")
    with pytest.raises(ConfigError, match="row 3 is class 'e', and 2 of 5 rows differ"):
        tiny_sst(head=head)


def filled_ring(method: Sst, per_class: int, batch_features: torch.Tensor) -> dict[int, list[torch.Tensor]]:
    """Push features near those of the batch, so that some similarities pass a threshold; class 4 gets none."""
    generator = torch.Generator().manual_seed(3)
    ring: dict[int, list[torch.Tensor]] = {}
    for place in range(per_class):
        for c in range(NUM_CLASSES - 1):
            feature = batch_features[place % len(batch_features), c]
            ring.setdefault(c, []).append(feature + 0.2 * torch.randn(feature.shape, generator=generator))
    for c, features in ring.items():
        method._ring.push(torch.full((per_class,), c), torch.stack(features), torch.arange(per_class))
    method._ring.means()  # the next call's are over all that was pushed before this one
    return {c: features[-method.settings.ring_capacity :] for c, features in ring.items()}


@pytest.mark.parametrize("form", [{}, {"faithful": True}, {"normalization": "masked_mean"}], ids=str)
@pytest.mark.parametrize("num_neighbours", [None, 2])
@pytest.mark.parametrize("position", [(0, 25), (1, 0), (5, 40), (30, 0)])
def test_terms_and_transferred_labels_are_those_of_the_loop(monkeypatch, form, num_neighbours, position):
    thresholds = {"threshold": 0.6, "threshold_step": 0.01, "threshold_floor": 0.5}
    method = tiny_sst(**form, **thresholds, pairs=SMALL["pairs"] | {"num_neighbours": num_neighbours})
    batch = random_batch(2 * GROUP_SIZE, seed=1)
    with torch.no_grad():
        features = method.head.decouple(method.backbone(batch.images)).class_features
    ring = filled_ring(method, 4, features)
    epoch, consumed = position
    progress = Progress(epoch=epoch, samples_consumed=consumed)
    ramp = consumed / 100 if epoch == 0 else 1.0
    expected = sst_oracle(method, batch, ring, epoch=epoch, ramp=ramp, group_size=GROUP_SIZE)

    believed = []
    monkeypatch.setattr(Sst, "_bce", spied(Sst._bce, believed))
    output = method(batch, method.recall(batch, progress))
    assert {name: float(term) for name, term in output.terms.items()} == pytest.approx(
        expected.terms, rel=1e-5, abs=1e-6
    )
    assert torch.equal(believed[0][1], expected.y_intra)
    assert torch.equal(believed[0][2], expected.y_inter)
    if epoch >= 5 and num_neighbours is None:
        assert bool((expected.y_intra != batch.targets).any())
        assert bool((expected.y_inter != batch.targets).any())


def spied(function, calls):
    def wrapped(self, x, targets, *rest):
        calls.append(targets)
        return function(self, x, targets, *rest)

    return wrapped


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"faithful": True, "normalization": "masked_mean"}, "normalization set, but with faithful"),
        ({"pooling": "max"}, "pooling set, but attention and graph have none"),
        ({"pooling": {"name": "weldon"}, "dropout": 0.5}, "pooling, dropout set, but"),
        ({"threshold": 0.5}, "threshold 0.5 is below threshold_floor 0.75"),
    ],
)
def test_keys_that_would_do_nothing_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        tiny_sst(**keys)


def test_theta_at_the_start_epoch_is_the_threshold_however_low():
    settings = SstSettings(backbone={"name": "resnet_small_gn"}, threshold=0.5, threshold_floor=0.5)
    assert [settings.threshold_at(epoch) for epoch in (5, 9)] == [0.5, 0.5]


def test_threshold_and_ramp_follow_the_position_alone():
    settings = SstSettings(backbone={"name": "resnet_small_gn"})
    assert settings.threshold_at(4) == math.inf
    assert [round(settings.threshold_at(epoch), 3) for epoch in (5, 6, 12, 13, 19)] == [0.95, 0.925, 0.775, 0.75, 0.75]
    method, batch = tiny_sst(), random_batch(8, seed=0)
    ramps = [
        float(method.recall(batch, Progress(epoch=e, samples_consumed=n))["ramp"])
        for e, n in ((0, 0), (0, 30), (1, 30))
    ]
    assert ramps == pytest.approx([0.0, 0.3, 1.0])


def test_a_known_label_is_never_changed_and_only_presence_is_transferred(monkeypatch):
    for seed in range(5):
        batch = random_batch(16, seed=seed)
        _, *transferred = supervised(monkeypatch, tiny_sst(threshold=0.001, threshold_floor=0.001), batch)
        for targets in transferred:
            changed = targets != batch.targets
            assert bool(changed.any())
            assert bool((batch.targets[changed] == 0).all())
            assert bool((targets[changed] == 1).all())


def test_rows_that_are_not_valid_get_no_labels(monkeypatch):
    valid = torch.arange(16) % 3 != 0
    batch = random_batch(16, seed=0)._replace(valid=valid)
    for targets in supervised(monkeypatch, tiny_sst(threshold=0.001, threshold_floor=0.001), batch):
        assert not targets[~valid].any()


def supervised(monkeypatch, method, batch):
    """What the three BCE terms of a late step are about."""
    calls = []
    with torch.no_grad():
        features = method.head.decouple(method.backbone(batch.images)).class_features
    filled_ring(method, 4, features)
    with monkeypatch.context() as patch:
        patch.setattr(Sst, "_bce", spied(Sst._bce, calls))
        method(batch, method.recall(batch, Progress(epoch=9)))
    return calls[0]


def test_the_ring_holds_the_features_of_known_positives():
    method, batch = tiny_sst(ring_capacity=50), random_batch(16, seed=2)
    batch = batch._replace(pseudo_targets=torch.ones_like(batch.targets))  # what a round believes stays out
    output = method(batch, method.recall(batch, Progress()))
    method.observe(batch, output)
    method._ring.means()
    means, counts = method._ring.means()
    features = method.head.decouple(method.backbone(batch.images)).class_features.detach()
    assert counts.tolist() == (batch.targets == 1).sum(dim=0).tolist()
    for c in range(NUM_CLASSES):
        unit = torch.nn.functional.normalize(features[batch.targets[:, c] == 1, c], dim=1)
        if len(unit):
            torch.testing.assert_close(means[c], unit.mean(dim=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_mean_similarity_is_the_mean_of_cosines(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    features, bank = (
        torch.randn(4, 3, 8, generator=generator).to(dtype),
        torch.randn(3, 5, 8, generator=generator).to(dtype),
    )
    found = mean_similarity(features, torch.nn.functional.normalize(bank, dim=2).mean(dim=1))
    expected = [[sum(cosine(f, k) for k in bank[c]) / 5 for c, f in enumerate(image)] for image in features]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype), rtol=tolerance, atol=tolerance)


def test_likelihood_beside_known_positives_is_their_mean():
    targets = torch.tensor([[1, 0, 1, -1], [0, 0, 1, 0]], dtype=torch.int8)
    first, second = torch.tensor([0, 1, 0]), torch.tensor([1, 2, 2])
    pairs = Pairs(torch.tensor([0, 0, 1]), first, second, torch.zeros(3, dtype=torch.int64))
    logits = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64)
    p = logits.sigmoid()
    expected = torch.zeros(2, 4, dtype=torch.float64)
    expected[0, 1], expected[1, 0] = (p[0] + p[1]) / 2, p[2]
    torch.testing.assert_close(likely_beside(logits, pairs, targets), expected)


def test_what_labels_say_is_in_the_model_state_and_needs_no_labels_again():
    method = tiny_sst(pairs=SMALL["pairs"] | {"num_neighbours": 2}, graph={"num_neighbours": 3})
    fresh = tiny_method(
        "sst", **(SMALL | {"pairs": SMALL["pairs"] | {"num_neighbours": 2}}), graph={"num_neighbours": 3}
    )
    fresh.load_state_dict(method.state_dict())
    batch = random_batch(8, seed=3)
    assert torch.equal(fresh.eval()(batch, None).logits, method(batch, None).logits)
    assert not torch.equal(method.head.graph.neighbours[:, 1], torch.arange(NUM_CLASSES))


def test_human_labels_are_read_block_by_block_and_unseen_classes_stay_alone():
    labels = LabelsOfClasses(np.zeros((60, NUM_CLASSES), dtype=np.int8))
    method = tiny_method("sst", **SMALL)
    method.read_labels(labels)  # type: ignore[arg-type]
    assert torch.equal(method.head.graph.adjacency, torch.eye(NUM_CLASSES))


def started_from(other: Sst, own: Sst, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, torch.Tensor]]:
    """Start a run of `own` from the model of `other`; what the user is told, and the tensors it then has."""
    tensors = {name: t.detach().clone() for name, t in (*other.named_parameters(), *other.named_buffers())}
    monkeypatch.setattr(run, "read_newest", lambda url: None)
    monkeypatch.setattr(run, "read_model", lambda url, commit: tensors)
    note = run.start_from("runs/other", make_engine("plain", method=own))
    return note, dict((*own.named_parameters(), *own.named_buffers()))


@pytest.mark.parametrize("num_neighbours", [None, 2])
def test_a_run_that_starts_from_another_keeps_the_graph_of_its_own_labels(num_neighbours, monkeypatch):
    keys = {part: SMALL.get(part, {}) | {"num_neighbours": num_neighbours} for part in ("graph", "pairs")}
    other, own = tiny_sst(**keys, faithful=True), tiny_sst(**keys)
    labels = random_labels(60, NUM_CLASSES, seed=1, known=0.9)
    other.read_labels(LabelsOfClasses(labels))  # type: ignore[arg-type]
    graph = {f"head.graph.{name}": buffer.clone() for name, buffer in own.head.graph.named_buffers()}
    note, tensors = started_from(other, own, monkeypatch)
    for name, buffer in graph.items():
        assert torch.equal(tensors[name], buffer)
        assert f"kept: {name}, the graph of this run's labels" in note
    theirs = dict((*other.named_parameters(), *other.named_buffers()))
    assert not all(torch.equal(theirs[name], buffer) for name, buffer in graph.items())
    for name in theirs.keys() - graph.keys():  # among them, the pairs' weights and whose they are
        assert torch.equal(tensors[name], theirs[name]), name
    assert ("pair_head.neighbours" in theirs) == (num_neighbours is not None)
    assert f"{len(theirs) - len(graph)} of {len(theirs)} tensors taken over" in note


def test_a_run_that_names_class_vectors_keeps_them_whatever_it_starts_from(tmp_path, monkeypatch):
    np.save(tmp_path / "vectors.npy", np.full((NUM_CLASSES, 4), 7.0, dtype=np.float32))
    of_file = {"embeddings": str(tmp_path / "vectors.npy"), "attention_width": 6}
    note, tensors = started_from(tiny_sst(), tiny_sst(head=of_file), monkeypatch)
    assert torch.equal(tensors["head.decoupling.embeddings"], torch.full((NUM_CLASSES, 4), 7.0))
    assert "head.decoupling.embeddings, the vectors in" in note
    _, learned = started_from(tiny_sst(head=of_file), tiny_sst(), monkeypatch)  # vectors to learn start from any
    assert torch.equal(learned["head.decoupling.embeddings"], torch.full((NUM_CLASSES, 4), 7.0))


def test_weights_of_pairs_are_taken_over_only_with_the_neighbours_they_belong_to(monkeypatch):
    """Of 5 classes, 2 neighbours a class and every pair alike have 10 rows."""
    every, near = (tiny_sst(pairs=SMALL["pairs"] | {"num_neighbours": number}) for number in (None, 2))
    for other, own in ((every, near), (near, every)):
        assert other.pair_head.pair_weight.shape == own.pair_head.pair_weight.shape
        own_head = {name: tensor.clone() for name, tensor in own.pair_head.state_dict().items()}
        note, _ = started_from(other, own, monkeypatch)
        assert "kept: pair_head.pair_weight, weights of other pairs than there" in note
        for name in ("pair_weight", "pair_bias", "neighbours"):
            assert name not in own_head or torch.equal(own.pair_head.state_dict()[name], own_head[name])
