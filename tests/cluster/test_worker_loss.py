"""Claims about runs on Ray: with shards and run folder in object storage, a lost worker or driver changes nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from dist_mlpl import storage
from dist_mlpl.chain import read_chain, read_head
from dist_mlpl.progress import read_rows
from tests.support.runs import (
    assert_same_end,
    command,
    environment,
    run,
    run_command,
    tiny_config,
    tiny_shards,
    write_config,
)

pytestmark = pytest.mark.cluster


def ray_config(folder: Path, shards: str) -> str:
    sections = {"engine": {"kind": "deepspeed", "zero_stage": 1}, "cluster": {"num_workers": 2}, "num_epochs": 6}
    return write_config(folder / "run.yaml", tiny_config(shards, **sections))


@pytest.fixture(scope="module")
def bucket(embedded_s3: object) -> str:
    return embedded_s3.make_bucket("bucket-worker-loss")  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def undisturbed(bucket: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(config, run) of two ranks without Ray that nothing happened to: workers on Ray end with the same bits."""
    folder = tmp_path_factory.mktemp("ray")
    shards = tiny_shards(folder, out=storage.join(bucket, "shards"))
    config, out = ray_config(folder, shards), storage.join(bucket, "undisturbed")
    run("train", config, "--out", out, "--local", num_ranks=2)
    return config, out


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for_commit(out: str, step: int, child: subprocess.Popen[str]) -> int:
    """The step of the first commit seen at that step or later."""
    deadline = time.monotonic() + 240
    while (head := read_head(out)) is None or head.step < step:
        if child.poll() is not None or time.monotonic() > deadline:
            child.kill()
            raise AssertionError(f"no commit at step {step}: {child.communicate()[0]}")
        time.sleep(0.02)  # between looks at the condition
    return head.step


def test_a_lost_worker_is_replaced_a_lost_driver_takes_its_cluster_along_and_the_run_still_ends_bit_equal(
    undisturbed: tuple[str, str], bucket: str
) -> None:
    config, whole = undisturbed
    out = storage.join(bucket, "lost")
    child = start("train", config, "--out", out)
    committed = wait_for_commit(out, 4, child)
    begun = next(row for row in read_rows(out) if row["event"] == "start")
    os.kill(begun["processes"][1][1], signal.SIGKILL)
    wait_for_commit(out, committed + 4, child)  # the worker may have ended one more before it died
    child.kill()
    assert "resumes at" in child.communicate()[0]
    assert len({commit.attempt for commit in read_chain(out)}) == 2
    assert read_chain(out)[-1].epoch < 6
    run_command("train", config, "--out", out)
    assert len({commit.attempt for commit in read_chain(out)}) == 3
    assert_same_end(whole, out)
    assert json.loads(run("audit", out, "--json").stdout)["is_exact"]


@pytest.mark.long
def test_sigterm_to_the_driver_commits_and_stops_the_workers(undisturbed: tuple[str, str], bucket: str) -> None:
    config, _ = undisturbed
    out = storage.join(bucket, "stopped")
    child = start("train", config, "--out", out, "--set", "num_epochs=400")
    wait_for_commit(out, 2, child)
    child.send_signal(signal.SIGTERM)
    printed = child.communicate(timeout=120)[0]
    assert child.returncode == 130, printed
    assert "stopped and saved" in printed
    stopped = [row for row in read_rows(out) if row["event"] == "stopped"][-1]
    assert read_chain(out)[-1].step == stopped["step"]


@pytest.mark.long
def test_a_stop_is_heard_while_ray_waits_for_the_place_of_a_lost_node(
    undisturbed: tuple[str, str], bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = undisturbed
    out = storage.join(bucket, "lost-node")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the cluster listens on this machine alone
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1, node_ip_address="127.0.0.2")  # of another host: not the driver's raylet
    try:
        child = start("train", config, "--out", out, "--address", cluster.address, "--set", "num_epochs=400")
        wait_for_commit(out, 4, child)
        cluster.remove_node(node, allow_graceful=False)
        child.send_signal(signal.SIGTERM)
        printed = child.communicate(timeout=240)[0]
    finally:
        cluster.shutdown()
    assert child.returncode == 130, printed
    assert "stopped while no workers ran; the same command goes on from what is saved" in printed


def test_a_change_that_the_run_cannot_take_is_refused_before_any_worker_starts(undisturbed: tuple[str, str]) -> None:
    config, whole = undisturbed
    refused = run_command("train", config, "--out", whole, "--set", "seed=7", check=False)
    assert refused.returncode == 4
    assert "CheckpointError" in refused.stderr
    assert "seed: 0 -> 7" in refused.stderr


@pytest.mark.long
def test_an_error_that_a_restart_would_repeat_ends_the_run_as_it_is(undisturbed: tuple[str, str], bucket: str) -> None:
    config, _ = undisturbed
    out = storage.join(bucket, "not-finite")
    failed = run_command("train", config, "--out", out, "--set", "optimizer.learning_rate=1e30", check=False)
    assert failed.returncode == 4
    assert "RunError" in failed.stderr
    assert "not finite at step" in failed.stderr
