"""The Python of README.md runs as it stands there, and says what the run's own evaluation says."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_mlpl.chain import read_newest
from dist_mlpl.config import read_run_config
from dist_mlpl.data.fetch import Fetcher
from dist_mlpl.data.manifest import load_manifest
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.transform import Transform
from dist_mlpl.engine import start
from dist_mlpl.methods.base import images_alone
from dist_mlpl.tools.judge import inference_settings, open_engine
from tests.support.runs import REPOSITORY, run, tiny_config, tiny_shards, write_config

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", ["partial_bce", "sst"])
def test_the_model_of_a_run_answers_in_plain_pytorch(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    manifest = load_manifest(tiny_shards(tmp_path / "set"))
    method = {"name": name, "dropout": 0.0, "backbone": {"name": "resnet_small"}}
    config = write_config(tmp_path / "run.yaml", tiny_config(manifest.url) | {"method": method})
    run("train", config, "--local", "--out", str(tmp_path / "my-run"), "--max-steps", "2")
    index = SplitIndex(manifest, "test")
    fetcher = Fetcher(index)
    (content,) = fetcher.take(fetcher.begin(np.array([3])))
    fetcher.close()
    (tmp_path / "photo.jpg").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    said = [line.split() for line in capsys.readouterr().out.splitlines()]

    read = read_run_config("my-run")
    engine = open_engine("my-run", read, read_newest("my-run"), manifest, start(inference_settings(read)))
    transform = Transform(read.transform, seed=0, train=False)
    image = transform(content, epoch=0, position=0).image[None]
    logits = engine.predict(images_alone(transform.normalise(image), manifest.num_classes)).logits
    best = torch.sigmoid(logits[0]).topk(3)
    expected = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    assert said == [[manifest.classes[place].name, f"{value:.3f}"] for place, value in expected]
