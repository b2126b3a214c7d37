"""Claims about the semantic head: decoupling, gated graph and classifier equal what the papers print."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_mlpl.errors import ConfigError, StorageError
from dist_mlpl.models import recompute
from dist_mlpl.models.gated_graph import GatedGraph, GatedGraphSettings
from dist_mlpl.models.semantic import SemanticDecoupling, SemanticHead, SemanticSettings
from tests.support.memory import most_bytes
from tests.support.semantic import (
    LabelsOf,
    adjacency_oracle,
    as_pairs,
    counts_oracle,
    gated_graph_oracle,
    materialised_decoupling,
    random_gated_graph,
    random_labels,
)

pytestmark = pytest.mark.unit

SMALL = {"embedding_width": 5, "attention_width": 12}


def random_decoupling(num_classes: int = 9, num_features: int = 8) -> SemanticDecoupling:
    torch.manual_seed(0)
    return SemanticDecoupling(SemanticSettings(**SMALL), num_features, num_classes)


def random_map(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_decoupling_equals_the_form_that_builds_everything_in_value_and_gradient(dtype, tolerance):
    decoupling, feature_map = random_decoupling().to(dtype), random_map(3, 8, 4, 5, dtype=dtype).requires_grad_()
    found = decoupling(feature_map, with_attention=True)
    features, attention = materialised_decoupling(decoupling, feature_map)
    torch.testing.assert_close(found.class_features, features, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.attention.flatten(2), attention, rtol=tolerance, atol=tolerance)
    slope = random_map(3, 9, 8, dtype=dtype)
    inputs = [feature_map, *decoupling.parameters()]
    ours = torch.autograd.grad(found.class_features, inputs, slope)
    printed = torch.autograd.grad(features, inputs, slope)
    torch.testing.assert_close(ours, printed, rtol=10 * tolerance, atol=10 * tolerance)


def test_attention_over_the_cells_and_their_sums_come_when_asked_for():
    feature_map = random_map(2, 8, 3, 5)
    found = random_decoupling()(feature_map, with_attention=True)
    assert found.attention.shape == (2, 9, 3, 5)
    torch.testing.assert_close(found.attention.sum(dim=(2, 3)), torch.ones(2, 9))
    torch.testing.assert_close(found.cell_sums, feature_map.sum(dim=1))
    assert random_decoupling()(feature_map)[1:] == (None, None)


def test_reduction_and_pooling_change_the_shape_as_they_say():
    settings = SemanticSettings(**SMALL, feature_width=6, pool=True)
    decoupling = SemanticDecoupling(settings, 8, 4)
    found = decoupling(random_map(2, 8, 6, 6), with_attention=True)
    assert decoupling.width == 6
    assert found.class_features.shape == (2, 4, 6)
    assert found.attention.shape == (2, 4, 3, 3)
    assert found.cell_sums.shape == (2, 3, 3)


@pytest.mark.parametrize("entries", [1, 60, 2**18])
@pytest.mark.parametrize("num_neighbours", [None, 1, 4])
def test_the_graph_equals_the_printed_equations_however_nodes_are_cut(monkeypatch, num_neighbours, entries):
    monkeypatch.setattr(recompute, "_CPU_ENTRIES", entries)
    graph, table = random_gated_graph(8, 5, num_neighbours=num_neighbours)
    features = random_map(2, 8, 5)
    torch.testing.assert_close(
        graph(features), gated_graph_oracle(graph, table.float(), features), rtol=1e-5, atol=1e-5
    )
    graph, features = graph.double(), features.double().requires_grad_()
    with torch.no_grad():  # the weights are float32 numbers, in the oracle's table too
        table = table.float().double()
    found, expected = graph(features), gated_graph_oracle(graph, table, features)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    inputs, slope = [features, *graph.parameters()], random_map(2, 8, 5, dtype=torch.float64)
    ours, printed = (torch.autograd.grad(output, inputs, slope) for output in (found, expected))
    torch.testing.assert_close(ours, printed, rtol=1e-9, atol=1e-10)


def test_all_neighbours_as_a_list_are_the_whole_table():
    dense, _ = random_gated_graph(8, 5)
    sparse, table = random_gated_graph(8, 5, num_neighbours=7)
    sparse.load_state_dict(dense.state_dict() | {k: v for k, v in sparse.state_dict().items() if "weight" not in k},
                           strict=False)  # fmt: skip
    features = random_map(3, 8, 5)
    torch.testing.assert_close(
        sparse(features), gated_graph_oracle(dense, table.float(), features), rtol=1e-5, atol=1e-5
    )


def test_a_class_never_seen_hears_itself_alone_and_no_logit_is_nan():
    graph, table = random_gated_graph(6, 4)
    assert torch.equal(graph.adjacency[5], torch.eye(6)[5])
    assert torch.equal(table[5].float(), torch.eye(6)[5])
    assert bool(graph(random_map(1, 6, 4)).isfinite().all())
    lonely = GatedGraph(GatedGraphSettings(), 4, 6)
    assert torch.equal(lonely.adjacency, torch.eye(6))


def test_co_occurrence_is_not_biased_by_the_share_of_known_labels():
    full = np.ones((4000, 2), dtype=np.int8)
    full[::2, 1] = -1  # class 1 is in half of the images, class 0 in all
    hidden = np.random.default_rng(0).random(full.shape) < 0.9
    graph = GatedGraph(GatedGraphSettings(), 4, 2)
    labels = np.where(hidden, 0, full).astype(np.int8)
    graph.set_cooccurrence(counts_of(labels))
    assert float(graph.adjacency[0, 1]) == pytest.approx(0.5, abs=0.15)
    graph.set_cooccurrence(counts_of(labels), is_biased=True)
    assert float(graph.adjacency[0, 1]) == pytest.approx(0.05, abs=0.02)


def counts_of(matrix):
    from dist_mlpl.models.label_counts import count_cooccurrence

    return count_cooccurrence(LabelsOf(matrix), *matrix.shape)


@pytest.mark.parametrize("most_dense", [1024, 0])
def test_counts_are_those_of_a_loop_over_images_and_labels_are_read_in_blocks(monkeypatch, most_dense):
    from dist_mlpl.models import label_counts

    monkeypatch.setattr(label_counts, "_MOST_DENSE", most_dense)
    monkeypatch.setattr(label_counts, "_BLOCK_SAMPLES", 16)
    monkeypatch.setattr(label_counts, "_PENDING", 50)
    for seed, known in enumerate((0.0, 0.1, 0.5, 1.0)):
        matrix = random_labels(90, 7, seed=seed, known=known)
        labels = LabelsOf(matrix)
        assert as_pairs(label_counts.count_cooccurrence(labels, 90, 7)) == counts_oracle(matrix)
        assert labels.most_read == 16


def test_neighbours_are_the_classes_most_often_seen_together():
    for is_biased in (False, True):
        matrix = random_labels(80, 9, seed=3)
        neighbours, weights = counts_of(matrix).neighbours(4, with_self=True, is_biased=is_biased)
        expected = adjacency_oracle(matrix, 4, is_biased=is_biased)
        table = torch.zeros(9, 9).index_put(
            (torch.arange(9)[:, None].expand(-1, 4), neighbours), weights, accumulate=True
        )
        torch.testing.assert_close(table, expected.float())


def test_logits_need_no_concatenation():
    torch.manual_seed(0)
    head = SemanticHead(SemanticSettings(**SMALL, head_width=7), GatedGraphSettings(), num_features=8, num_classes=5)
    features = random_map(3, 5, 8)
    propagated, classifier = head.graph(features), head.classifier
    joint = torch.tanh(torch.cat([propagated, features], dim=2) @ classifier.joint_weight.T + classifier.joint_bias)
    expected = (joint * classifier.class_weight).sum(dim=2) + classifier.class_bias
    torch.testing.assert_close(head.classify(features), expected)


@pytest.mark.parametrize("shortcut", ["average", "max"])
def test_the_shortcut_is_a_plain_classifier_past_attention_and_graph(shortcut):
    torch.manual_seed(0)
    settings = SemanticSettings(**SMALL, shortcut=shortcut)
    head = SemanticHead(settings, GatedGraphSettings(), num_features=8, num_classes=5)
    feature_map = random_map(3, 8, 4, 4)
    features = head.decouple(feature_map).class_features
    attended, _ = materialised_decoupling(head.decoupling, feature_map)
    pooled = feature_map.mean(dim=(2, 3)) if shortcut == "average" else feature_map.amax(dim=(2, 3))
    torch.testing.assert_close(features, attended + pooled[:, None])
    before = head.classify(features)  # nothing of it yet: its weights start at 0
    torch.nn.init.normal_(head.classifier.shortcut_weight)
    added = (features * head.classifier.shortcut_weight).sum(dim=2)
    torch.testing.assert_close(head.classify(features), before + added)


def test_class_vectors_come_from_a_file_and_stay_as_they_are(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(4, 6))
    np.save(tmp_path / "vectors.npy", vectors)
    safetensors.numpy.save_file({"vectors": vectors.astype(np.float32)}, tmp_path / "vectors.safetensors")
    for name in ("vectors.npy", "vectors.safetensors"):
        decoupling = SemanticDecoupling(SemanticSettings(embeddings=str(tmp_path / name), attention_width=3), 8, 4)
        torch.testing.assert_close(decoupling.embeddings, torch.from_numpy(vectors).float())
        assert "embeddings" not in dict(decoupling.named_parameters())
        assert "embeddings" in decoupling.state_dict()


def test_rows_in_another_order_than_the_classes_are_refused_and_an_unknown_order_is_said(tmp_path):
    def with_file(name: str) -> SemanticDecoupling:
        return SemanticDecoupling(SemanticSettings(embeddings=str(tmp_path / name), attention_width=3), 8, 4)

    vectors = np.zeros((4, 6), dtype=np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    safetensors.numpy.save_file({"vectors": vectors}, tmp_path / "vectors.safetensors")
    for name, way_out in (("vectors.npy", "vectors.classes.txt"), ("vectors.safetensors", "metadata")):
        (note,) = with_file(name).check_classes(("a", "b", "c", "d"))
        assert name in note
        assert "unchecked" in note
        assert way_out in note

    metadata = {"classes": json.dumps(["a", "b", "c", "d"])}
    safetensors.numpy.save_file({"vectors": vectors}, tmp_path / "vectors.safetensors", metadata=metadata)
    (tmp_path / "vectors.classes.txt").write_text("a\nb\nc\nd\n")
    for name in ("vectors.npy", "vectors.safetensors"):
        assert with_file(name).check_classes(("a", "b", "c", "d")) == []
        with pytest.raises(ConfigError, match="row 1 is class 'b', and 2 of 4 rows differ"):
            with_file(name).check_classes(("a", "c", "b", "d"))
    (tmp_path / "vectors.classes.txt").write_text("a\nb\nc")
    with pytest.raises(ConfigError, match="3 class ids with it"):
        with_file("vectors.npy")
    assert SemanticDecoupling(SemanticSettings(), 8, 4).check_classes(("a", "b", "c", "d")) == []


@pytest.mark.parametrize(
    ("array", "width", "message"),
    [
        (np.zeros((3, 6)), None, "3 class vectors"),
        (np.zeros((4, 6)), 5, "width 6"),
        (np.zeros((4,)), None, "shape"),
        (np.full((4, 6), np.nan), None, "not finite"),
        (np.array([["a"] * 6] * 4), None, "an array of"),
        (np.array([[None] * 6] * 4), None, "not a file of class vectors"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, array, width, message):
    np.save(tmp_path / "vectors.npy", array)
    settings = SemanticSettings(embeddings=str(tmp_path / "vectors.npy"), embedding_width=width)
    with pytest.raises(ConfigError, match=message):
        SemanticDecoupling(settings, 8, 4)


def test_a_file_that_is_none_or_absent_is_refused(tmp_path):
    (tmp_path / "vectors.npy").write_bytes(b"no numbers")
    (tmp_path / "vectors.safetensors").write_bytes(b"no numbers")
    for name in ("vectors.npy", "vectors.safetensors"):
        with pytest.raises(ConfigError, match="not a file of class vectors"):
            SemanticDecoupling(SemanticSettings(embeddings=str(tmp_path / name)), 8, 4)
    with pytest.raises(StorageError, match="class embeddings"):
        SemanticDecoupling(SemanticSettings(embeddings=str(tmp_path / "absent.npy")), 8, 4)


def test_under_bfloat16_the_backward_pass_keeps_no_casts_of_blocks_that_are_done(monkeypatch):
    graph = GatedGraph(GatedGraphSettings(num_neighbours=4), 192, 64)
    features = torch.randn(2, 64, 192, requires_grad=True)

    def peak(num_classes: int) -> int:
        """In blocks of so many classes."""
        monkeypatch.setattr(recompute, "_CPU_ENTRIES", num_classes * 2 * 192)
        with torch.autocast("cpu", torch.bfloat16):
            total = graph(features).sum()
        return most_bytes(total.backward)

    assert peak(1) < peak(16)


def test_the_slope_of_a_product_of_many_blocks_writes_no_more_than_that_of_one(monkeypatch):
    rows = torch.randn(2, 256, 16, requires_grad=True)
    weight = torch.randn(256, 16, requires_grad=True)

    class Written(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            Written.total += out.numel() if isinstance(out, torch.Tensor) else 0
            return out

    def written(num_classes: int) -> int:
        """Numbers that the backward pass makes, in blocks of so many classes."""
        monkeypatch.setattr(recompute, "_CPU_ENTRIES", num_classes * 2 * 16)
        product = recompute.inner_products(rows, weight)
        torch.testing.assert_close(product, torch.einsum("bcn,cn->bc", rows, weight))
        Written.total = 0
        with Written():
            torch.autograd.grad(product.sum(), [rows, weight])
        return Written.total

    assert written(1) < 2 * written(256)
