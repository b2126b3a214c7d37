"""Claims about `dist-mlpl plan` and `dist-mlpl pictures` as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from dist_mlpl.config import load_config
from dist_mlpl.tools.plan import make_plan
from tests.support.runs import run, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_shards(tmp_path_factory.mktemp("shards"))


def written(folder: Path, manifest: str, **method: object) -> str:
    return write_config(folder / "run.yaml", tiny_config(manifest, method={"dropout": 0.0, **method}))


def test_the_trunk_costs_what_its_layers_do(manifest: str, tmp_path: Path) -> None:
    """resnet_small at 16 pixels, by hand: 2 cin cout k^2 a cell of a convolution, three times, twice for the first."""
    plan = make_plan(load_config(written(tmp_path, manifest)), num_ranks=1)
    convolutions = [  # in, out, kernel, cells
        (3, 32, 9, 64), (32, 32, 9, 16), (32, 32, 9, 16), (32, 32, 1, 16), (32, 32, 9, 16), (32, 32, 9, 16),
        (32, 64, 9, 4), (64, 64, 9, 4), (32, 64, 1, 4), (64, 64, 9, 4), (64, 64, 9, 4),
        (64, 128, 9, 4), (128, 128, 9, 4), (64, 128, 1, 4), (128, 128, 9, 4), (128, 128, 9, 4),
    ]  # fmt: skip
    forward = [2 * a * b * k * cells for a, b, k, cells in convolutions]
    assert plan.trunk.flops == pytest.approx(3 * sum(forward) - forward[0])
    assert [cost.name for cost in plan.heads] == ["head"]
    assert plan.heads[0].flops == 3 * 2 * 128 * 5
    assert plan.heads[0].held_bytes == 4 * (128 * 5 + 5)
    assert plan.extras == []
    assert plan.scale.num_cells == 4
    assert plan.gradient_bytes == 0.0


def test_the_plan_of_many_classes_and_ranks_needs_no_memory_for_them(manifest: str, tmp_path: Path) -> None:
    path = written(tmp_path, manifest, name="single_positive", loss="role", expected_positives=1.5)
    found = run("plan", path, "--ranks", "2", "--classes", "601", "--samples", "9000000", "--json")
    plan = json.loads(found.stdout)
    (bank,) = plan["extras"]
    assert bank["held_bytes"] == 4_500_032 * (601 * 4 + 4)
    assert plan["largest"]["num_classes"] == 9605
    assert plan["largest"]["extras"][0]["held_bytes"] == 4_500_032 * (9605 * 4 + 4)
    assert plan["heads"][0]["held_bytes"] == 4 * (128 * 601 + 601)


def test_the_plan_is_a_table_for_people(manifest: str, tmp_path: Path) -> None:
    found = run("plan", written(tmp_path, manifest), "--ranks", "2")
    assert "backbone" in found.stdout
    assert "with 9,605 classes" in found.stdout
    assert "2 ranks" in found.stdout
    assert "forward and backward" in found.stdout
    assert "1 rank," in run("plan", written(tmp_path, manifest)).stdout


@pytest.mark.parametrize(
    ("engine", "optimizer", "gradients", "moments"),
    [
        ({"kind": "plain", "zero_stage": 2}, {}, 1.0, 2.0),
        ({"zero_stage": 0}, {}, 1.0, 2.0),
        ({"zero_stage": 1}, {}, 1.0, 0.5),
        ({"zero_stage": 2}, {"name": "sgd"}, 0.25, 0.25),
        ({"zero_stage": 2}, {"name": "sgd", "momentum": 0.0}, 0.25, 0.0),
    ],
)
def test_gradients_and_moments_are_counted_as_the_engine_holds_them(
    manifest: str, tmp_path: Path, engine: dict[str, object], optimizer: dict[str, object], gradients: float,
    moments: float,
) -> None:  # fmt: skip
    document = tiny_config(manifest, method={"dropout": 0.0}, global_batch=32)
    document |= {"engine": engine, "optimizer": optimizer}
    plan = make_plan(load_config(write_config(tmp_path / "run.yaml", document)), num_ranks=4)
    config = load_config(str(tmp_path / "run.yaml"))
    model = config.method.build(num_classes=5, image_size=16)
    trained = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert plan.gradients.held_bytes == gradients * trained
    assert plan.moments.held_bytes == moments * trained


def test_too_many_ranks_for_the_batch_are_refused(manifest: str, tmp_path: Path) -> None:
    found = run("plan", written(tmp_path, manifest), "--ranks", "64", check=False)
    assert found.returncode == 2
    assert "global_batch" in found.stderr


def test_pictures_are_drawn_where_the_run_is(manifest: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("train", written(tmp_path, manifest), "--local", "--out", str(out), "--max-steps", "2")
    found = run("pictures", str(out), "--num-samples", "3", "--num-tiles", "2", "--num-embedded", "50")
    paths = [Path(line) for line in found.stdout.split()]
    assert [path.name for path in paths] == ["heatmaps-test-00000002.png", "transfers-train-00000002.png"]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.width == 3 * 184  # the image and two tiles
    refused = run("pictures", str(out), "--sample", "400", check=False)
    assert refused.returncode == 2
    assert "[0, 40)" in refused.stderr
