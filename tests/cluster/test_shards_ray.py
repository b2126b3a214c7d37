"""Claims about packing on a Ray cluster of two nodes: the bytes of one machine, whatever is lost on the way."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from dist_mlpl import storage, tasks
from dist_mlpl.cluster import cluster_at
from dist_mlpl.errors import DataError, RunError, ShardError
from dist_mlpl.tasks import map_tasks
from shards.extend import extend
from shards.repair import repair
from shards.verify import verify
from tests.support.packing import contents, packed, source_at, write_inputs

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def address(embedded_s3: object) -> Iterator[str]:
    """Two nodes of a CPU each, which know of the S3 server."""
    before = dict(os.environ)
    os.environ["RAY_AUTH_MODE"] = "disabled"  # it listens on this machine alone
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def joined(address: str) -> Iterator[str]:
    """The cluster, joined for a whole test: that takes seconds."""
    ray.init(address=address, log_to_driver=False)
    yield address
    ray.shutdown()


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "inputs")


def node_and_square(number: int) -> tuple[str, int]:
    return ray.get_runtime_context().get_node_id(), number**2


def die_once(marker: str, task: Callable[..., Any], *call: Any) -> Any:
    """A task whose worker dies at its end, the first time."""
    result = task(*call)
    if not os.path.exists(marker):
        Path(marker).touch()
        os._exit(1)
    return result


def fail(number: int) -> int:
    if number == 2:
        raise ShardError("broken", expected="whole", where=f"shard {number}", next_step="mend it")
    return number


def divide(number: int) -> float:
    return 1 / number


def always_die() -> None:
    os._exit(1)


def configuration() -> dict[str, Any]:
    return storage.configuration()


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "127.0.0.1:port", "[::1:6379"])
def test_an_address_without_a_cluster_is_refused_before_ray_is_asked(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("Ray would try for minutes"))
    with socket.socket() as probe:  # bound, and nobody listens
        probe.bind(("127.0.0.1", 0))
        found = address.format(probe.getsockname()[1])
        with pytest.raises(RunError, match="no Ray cluster"):
            list(map_tasks(fail, [(0,)], address=found))
        with pytest.raises(RunError, match="no Ray cluster") as caught, cluster_at(found, None):  # type: ignore[arg-type]
            pytest.fail("joined")
    assert found in caught.value.where


@pytest.mark.long
def test_tasks_run_on_all_nodes(address: str) -> None:
    found = dict(map_tasks(node_and_square, ((n,) for n in range(40)), address=address))
    assert {number: square for number, (_, square) in found.items()} == {n: n**2 for n in range(40)}
    assert len({node for node, _ in found.values()}) == 2
    assert not ray.is_initialized()


@pytest.mark.long
def test_errors_arrive_as_they_were_raised_and_storage_is_set_up_on_the_nodes(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(map_tasks(fail, [], address=address)) == []
    with pytest.raises(ShardError) as caught:
        list(map_tasks(fail, ((n,) for n in range(6)), address=address))
    assert (caught.value.found, caught.value.where) == ("broken", "shard 2")
    with pytest.raises(RunError, match="division by zero"):
        list(map_tasks(divide, [(0,)], address=address))
    monkeypatch.setattr(tasks, "_MAX_LOSSES", 0)
    with pytest.raises(RunError, match="a Ray task failed"):
        list(map_tasks(always_die, [()], address=address))
    before = storage.configuration()
    storage.configure_storage({"s3": {"anon": False}}, deadline_seconds=7.0)
    try:
        assert list(map_tasks(configuration, [()], address=address)) == [(0, storage.configuration())]
    finally:
        storage.configure_storage(**before)


def test_packing_growing_mending_and_verifying_on_a_cluster_that_loses_a_worker_give_the_bytes_of_one_process(
    joined: str, inputs: Path, tmp_path: Path, s3_bucket: str
) -> None:
    url, mapper = storage.join(s3_bucket, "out"), partial(map_tasks, address=joined)

    def losing(task: Callable[..., Any], calls: Iterable[tuple[Any, ...]], /) -> Iterator[tuple[int, Any]]:
        return mapper(partial(die_once, str(tmp_path / "died"), task), calls)

    local, remote = tmp_path / "local", packed(inputs, url, mapper=losing).manifest
    assert (tmp_path / "died").exists()
    assert packed(inputs, local).manifest.digest == remote.digest
    assert contents(url) == contents(str(local))
    storage.remove(storage.join(url, "train-000000.tar"))
    assert repair(url, source_at(str(inputs)), mapper=mapper).rewritten == ("train-000000.tar",)
    assert contents(url) == contents(str(local))
    assert verify(url, mapper=mapper).faults == ()
    assert extend(source_at(str(inputs)), url, mapper=mapper).num_added == 0
    with pytest.raises(DataError):
        packed(inputs, storage.join(s3_bucket, "out"), mapper=mapper, seed=9)
