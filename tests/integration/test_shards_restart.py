"""Claims about builds that are killed, begun again, or run by several at once: the output is that of a quiet run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_mlpl import storage
from dist_mlpl.errors import DataError, ManifestError
from shards import assemble, work
from shards import ledger as ledger_module
from shards.ledger import Held, Lease, Ledger
from shards.processes import run_tasks
from tests.support.images import truncated
from tests.support.packing import NAMES, contents, packed, write_inputs
from tests.support.processes import call_forked

pytestmark = pytest.mark.integration

TARGET = 12_000  # more shards than the kills of a test


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("restart") / "inputs")


@pytest.fixture(scope="module")
def quiet(inputs: Path) -> dict[str, bytes]:
    """The output of a run that nothing happened to."""
    out = inputs.parent / "quiet"
    packed(inputs, out, target_shard_bytes=TARGET)
    return everything(out)


def everything(out: Path) -> dict[str, bytes]:
    """Every file in a folder, hidden ones too; a folder inside is an error."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def again(inputs: Path, out: Path, **options: Any) -> dict[str, bytes]:
    packed(inputs, out, **{"target_shard_bytes": TARGET, **options})
    return everything(out)


def count_calls(limit: float) -> list[int]:
    """Count calls of Python and C functions from now on, in all threads; at the limit, SIGKILL."""
    count = [0]

    def hook(frame: Any, event: str, argument: Any) -> None:
        count[0] += 1
        if count[0] >= limit:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(hook)
    sys.setprofile(hook)
    return count


def num_calls(function: Callable[[], Any]) -> int:
    """How many calls a function makes, counted in a child."""

    def run() -> int:
        count = count_calls(float("inf"))
        function()
        sys.setprofile(None)
        return count[0]

    return int(call_forked(run)[0])


def killed(function: Callable[[], Any], after: int) -> bool:
    """Run a function in a child that ends by SIGKILL after so many calls; False when it was over before."""

    def run() -> None:
        count_calls(after)
        function()
        os._exit(0)

    child = get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def kill_and_repeat(inputs: Path, out: Path, quiet: dict[str, bytes], seed: int) -> None:
    random = np.random.default_rng(seed)
    total = num_calls(lambda: packed(inputs, f"{out}-counted", target_shard_bytes=TARGET))
    kills = [
        killed(lambda: packed(inputs, out, target_shard_bytes=TARGET), int(random.integers(1, total)))
        for _ in range(int(random.integers(1, 5)))
    ]
    assert kills[0]
    assert again(inputs, out) == quiet


@pytest.mark.parametrize("seed", range(5))
def test_a_build_killed_anywhere_several_times_ends_with_the_same_bytes(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    kill_and_repeat(inputs, tmp_path / "out", quiet, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 140))
def test_a_build_killed_anywhere_several_times_ends_with_the_same_bytes_forty_times(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    kill_and_repeat(inputs, tmp_path / "out", quiet, seed)


def kill_after(inputs: Path, out: Path, num_shards: int) -> None:
    """A build that ends by SIGKILL when it has told of so many shards."""
    told = 0

    def tell(doing: str, *rest: int) -> None:
        nonlocal told
        told += doing == "packing"
        if told == num_shards:
            os.kill(os.getpid(), signal.SIGKILL)

    child = get_context("fork").Process(target=lambda: packed(inputs, out, target_shard_bytes=TARGET, on_progress=tell))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def stems_written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every shard that this process writes from now on."""
    written: list[str] = []
    write = work.write_shard

    def note(setting: Any, job: Any, *rest: Any) -> Any:
        written.append(job.stem)
        return write(setting, job, *rest)

    monkeypatch.setattr(work, "write_shard", note)
    return written


def test_what_is_done_is_not_done_again(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    kill_after(inputs, out, 3)
    done = {path.stem for path in (out / "build").glob("*-*.json")}
    assert len(done) == 3
    written = stems_written(monkeypatch)
    assert again(inputs, out) == quiet
    assert {*written, *done} == {Path(name).stem for name in quiet if name.endswith(".tar")}
    assert len(written) + len(done) == sum(name.endswith(".tar") for name in quiet)


@pytest.mark.parametrize("damage", ["short tar", "missing index", "half a record"])
def test_a_record_is_trusted_only_for_files_of_the_recorded_size(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    kill_after(inputs, out, 2)
    stem = min(path.stem for path in (out / "build").glob("*-*.json"))
    if damage == "short tar":
        os.truncate(out / f"{stem}.tar", 512)
    elif damage == "missing index":
        (out / f"{stem}.arrow").unlink()
    else:
        os.truncate(out / "build" / f"{stem}.json", 20)
    assert again(inputs, out) == quiet


def test_another_plan_is_refused_while_a_build_is_unfinished(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kill_after(inputs, out, 1)
    there = sorted(path.name for path in out.rglob("*"))
    with pytest.raises(ManifestError, match=r"unfinished build .*: seed 0 there, 5 here\n"):
        packed(inputs, out, target_shard_bytes=TARGET, seed=5)
    with pytest.raises(ManifestError, match=": decode False there, True here"):
        packed(inputs, out, target_shard_bytes=TARGET, decode=True)
    assert sorted(path.name for path in out.rglob("*")) == there


def refused(inputs: Path, out: Path, **options: Any) -> None:
    with pytest.raises(DataError, match="of 30 images cannot be packed so far"):
        packed(inputs, out, target_shard_bytes=TARGET, **options)


@pytest.mark.parametrize("size", ["another", "the same"])
def test_a_refused_build_goes_on_when_the_image_is_repaired(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = shutil.copytree(inputs, tmp_path / "inputs"), tmp_path / "out"
    bad = folder / "images" / NAMES[29]
    whole = bad.read_bytes()
    bad.write_bytes(truncated(whole) if size == "another" else bytes(len(whole)))
    refused(folder, out)
    done = {path.stem for path in (out / "build").glob("*-*.json")}
    stray = out / "val-000099.tar"  # of a builder that was killed before it recorded the shard
    stray.write_bytes(b"")
    bad.write_bytes(whole)
    written = stems_written(monkeypatch)
    if size == "the same":
        stray.unlink()  # nothing says that the plan is another
    assert again(folder, out) == quiet
    assert done - set(written), "shards without the repaired image stay, but for some that are cut elsewhere now"


def test_a_refused_build_goes_on_with_convert_and_what_it_packed(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = shutil.copytree(inputs, tmp_path / "inputs"), tmp_path / "out"
    bad = folder / "images" / NAMES[29]
    Image.open(io.BytesIO(bad.read_bytes())).save(bad, "PNG")
    refused(folder, out)
    done = {path.stem: path.read_bytes() for path in (out / "build").glob("*-*.json")}
    held = {stem for stem, record in done.items() if b"not a JPEG" not in record}
    assert len(done) == len(held) + 1
    quiet = again(folder, tmp_path / "quiet", convert=True)
    written = stems_written(monkeypatch)
    assert again(folder, out, convert=True) == quiet
    assert not held & set(written)
    refused(folder, out := tmp_path / "other")
    with pytest.raises(ManifestError, match="seed 0 there, 1 here"):
        packed(folder, out, target_shard_bytes=TARGET, convert=True, seed=1)


def test_labels_that_changed_do_not_go_on_with_what_was_packed_of_others(inputs: Path, tmp_path: Path) -> None:
    folder, out = shutil.copytree(inputs, tmp_path / "inputs"), tmp_path / "out"
    kill_after(folder, out, 2)
    lines = (folder / "labels.csv").read_text().splitlines(keepends=True)
    (folder / "labels.csv").write_text("".join(lines[:1] + lines[2:] + lines[1:2]))
    with pytest.raises(ManifestError, match="unfinished build of another data set") as caught:
        packed(folder, out, target_shard_bytes=TARGET)
    assert f"remove {out}/build and its tars and indexes in {out}" in caught.value.next_step


def with_a_broken_image(inputs: Path, tmp_path: Path) -> tuple[Path, Path, Path, bytes]:
    """A copy of the inputs, where to build, the image that is truncated there, and its whole bytes."""
    folder, out = shutil.copytree(inputs, tmp_path / "inputs"), tmp_path / "out"
    bad = folder / "images" / NAMES[29]
    whole = bad.read_bytes()
    bad.write_bytes(truncated(whole))
    return folder, out, bad, whole


def test_a_build_does_not_go_on_by_another_plan_while_another_builder_is_at_work(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path
) -> None:
    folder, out, bad, whole = with_a_broken_image(inputs, tmp_path)
    refused(folder, out)
    plan, lease = (out / "build" / "plan.json").read_bytes(), leased(out, "train-000001")
    bad.write_bytes(whole)
    with pytest.raises(ManifestError, match=r"another builder is at work: train-000001\.lease-0"):
        packed(folder, out, target_shard_bytes=TARGET)
    assert (out / "build" / "plan.json").read_bytes() == plan
    lease.unlink()
    assert again(folder, out) == quiet


def test_a_builder_stops_when_another_went_on_by_another_plan(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path
) -> None:
    folder, out, bad, whole = with_a_broken_image(inputs, tmp_path)
    again_there: list[str] = []

    def late(task: Callable[..., Any], calls: Iterable[tuple[Any, ...]], /) -> Iterator[tuple[int, Any]]:
        if not again_there:
            again_there.append("begun")
            bad.write_bytes(whole)
            kill_after(folder, out, 1)  # another builder takes over, and is at work
        yield from run_tasks(task, calls, 1)

    with pytest.raises(ManifestError, match="another builder went on with, by another plan"):
        packed(folder, out, target_shard_bytes=TARGET, max_bad_fraction=0.5, mapper=late)
    assert again(folder, out) == quiet


@pytest.mark.parametrize("seed", range(3))
def test_a_build_killed_while_it_changes_plans_ends_with_the_same_bytes(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    folder, out, bad, whole = with_a_broken_image(inputs, tmp_path)
    refused(folder, out)
    bad.write_bytes(whole)
    random, place = np.random.default_rng(seed), [0]

    def change_alone() -> None:
        """A build that ends before it packs."""
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(InterruptedError):
            patch.setattr(assemble, "pack_all", interrupted)
            packed(folder, out, target_shard_bytes=TARGET)

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise InterruptedError

    copy = shutil.copytree(out, tmp_path / "copy")
    place[0] = num_calls(change_alone)
    shutil.rmtree(out)
    copy.rename(out)
    for _ in range(3):
        killed(change_alone, int(random.integers(place[0] // 2, place[0])))
    assert again(folder, out) == quiet


def test_a_folder_with_shards_of_nobody_is_refused_untouched(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "other-000000.tar").write_bytes(b"precious")
    with pytest.raises(ManifestError, match=r"no manifest and no build: other-000000\.tar"):
        packed(inputs, out)
    assert everything(out) == {"other-000000.tar": b"precious"}


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_two_builders_on_one_output_share_the_work_and_end_alike(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, place: str, request: pytest.FixtureRequest
) -> None:
    out = str(tmp_path / "out") if place == "disk" else request.getfixturevalue("s3_bucket")
    barrier = get_context("fork").Barrier(2)

    def build_one() -> tuple[str, list[str]]:
        with pytest.MonkeyPatch.context() as patch:
            written = stems_written(patch)
            summary = packed(inputs, out, target_shard_bytes=TARGET, on_progress=meet)
            return summary.manifest.digest, written

    def meet(doing: str, done: int, total: int, num_bytes: int = 0) -> None:
        if (doing, done) == ("looking up images", total):
            barrier.wait(60)

    (one, first), (other, second) = call_forked(build_one, build_one)
    assert one == other == storage.sha256_of_bytes(quiet["manifest.json"])
    assert contents(out) == quiet
    num_shards = sum(name.endswith(".tar") for name in quiet)
    assert {*first, *second} == {Path(name).stem for name in quiet if name.endswith(".tar")}
    assert len(first) + len(second) <= num_shards + 2
    if place == "disk":
        assert everything(Path(out)) == quiet


def test_a_build_is_over_before_the_files_of_others_go(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, remove, found = tmp_path / "out", storage.remove_folder, []

    def watched(url: str) -> None:
        found.append(Ledger(str(out)).is_open)
        remove(url)

    monkeypatch.setattr(storage, "remove_folder", watched)
    packed(inputs, out, target_shard_bytes=TARGET)
    assert found == [False]
    assert everything(out) == quiet


def test_a_killed_command_takes_its_workers_along(inputs: Path, quiet: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = get_context("fork").Process(target=lambda: packed(inputs, out, target_shard_bytes=TARGET, workers=2))
    child.start()
    wait_until(lambda: any((out / "build").glob("*-*.json")) or child.exitcode is not None)
    workers = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(pid) == child.pid]
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    wait_until(lambda: not any(is_alive(pid) for pid in workers))
    assert again(inputs, out) == quiet


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "not within a minute"
        time.sleep(0.002)  # between looks at the condition


@pytest.fixture
def quick_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "LEASE_SECONDS", 0.3)
    monkeypatch.setattr(work, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(ledger_module, "_BEAT_SECONDS", 0.03)


def elsewhere(content: bytes) -> bytes:
    """A lease as a process of another machine writes it."""
    document = json.loads(content)
    document["holder"]["machine"] = "another"
    return json.dumps(document).encode()


def leased(out: Path, stem: str) -> Path:
    """A lease of a process of another machine that will not refresh it."""
    ledger = Ledger(str(out))
    lease = ledger.claim(stem, 0)
    assert isinstance(lease, Lease)
    path = out / "build" / f"{stem}.lease-0"
    path.write_bytes(elsewhere(path.read_bytes()))
    return path


def test_a_lease_that_nobody_refreshes_is_taken_over(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, quick_leases: None
) -> None:
    out = tmp_path / "out"
    for stem in ("train-000000", "train-000002"):
        leased(out, stem)
    assert again(inputs, out) == quiet


def test_a_lease_is_respected_for_as_long_as_it_is_refreshed(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, quick_leases: None
) -> None:
    out = tmp_path / "out"
    path = leased(out, "train-000001")
    is_over = threading.Event()
    beats = 0

    def refresh() -> None:
        nonlocal beats
        while not is_over.wait(0.02):
            beats += 1
            storage.write_bytes(str(path), json.dumps({"holder": {}, "beat": beats}).encode(), durable=False)

    holder, builder = threading.Thread(target=refresh), threading.Thread(target=again, args=(inputs, out))
    holder.start()
    builder.start()
    num_shards = sum(name.endswith(".tar") for name in quiet)
    wait_until(lambda: len(list((out / "build").glob("*-*.json"))) == num_shards - 1)
    seen = beats
    wait_until(lambda: beats > seen + 40)  # two times as long as a lease lasts
    assert not (out / "train-000001.tar").exists()
    is_over.set()
    holder.join()
    builder.join()
    assert everything(out) == quiet


def test_a_lease_that_is_given_up_is_taken_at_once_and_one_of_a_dead_process_too(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "LEASE_SECONDS", 1e9)
    out = tmp_path / "out"

    def claim() -> None:
        lease = Ledger(str(out)).claim("train-000001", 0)
        assert isinstance(lease, Lease)
        os.kill(os.getpid(), signal.SIGKILL)

    child = get_context("fork").Process(target=claim)
    child.start()
    child.join()
    held = Ledger(str(out)).held("train-000001", 0)
    assert held.is_dead
    lease = Ledger(str(out)).claim("train-000002", 0)
    assert isinstance(lease, Lease)
    assert not Ledger(str(out)).held("train-000002", 0).is_dead
    with lease:
        assert isinstance(Ledger(str(out)).claim("train-000002", 0), Held)
    assert again(inputs, out) == quiet


def test_a_builder_that_was_overtaken_finds_the_set_finished(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def late(task: Callable[..., Any], calls: Iterable[tuple[Any, ...]], /) -> Iterator[tuple[int, Any]]:
        assert again(inputs, out) == quiet
        yield from run_tasks(task, calls, 1)

    summary = packed(inputs, out, target_shard_bytes=TARGET, mapper=late)
    assert summary.manifest.digest == storage.sha256_of_bytes(quiet["manifest.json"])
    assert everything(out) == quiet


@pytest.mark.parametrize("name", ["manifest.json", "train-000001.tar", "train-000001.arrow", "skipped.csv"])
def test_a_builder_whose_unfinished_files_are_swept_away_by_one_that_finished_ends_as_that_did(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = shutil.copytree(inputs, tmp_path / "inputs")
    (folder / "images" / NAMES[4]).write_bytes(b"GIF89a")  # so that there is a skipped.csv
    out, replace = tmp_path / "out", os.replace
    overtaken: list[str] = []
    quiet = again(folder, tmp_path / "quiet", max_bad_fraction=0.1)

    def late(source: Any, target: Any) -> None:
        if Path(target).name == name and not overtaken:
            overtaken.append(name)
            lease = out / "build" / f"{Path(name).stem}.lease-0"
            lease.unlink(missing_ok=True)  # as if ours had gone stale
            assert again(folder, out, max_bad_fraction=0.1) == quiet
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    summary = packed(folder, out, target_shard_bytes=TARGET, max_bad_fraction=0.1)
    assert overtaken
    assert summary.manifest.digest == storage.sha256_of_bytes(quiet["manifest.json"])
    assert everything(out) == quiet


def test_records_of_a_build_that_was_killed_after_its_end_go_at_the_next_call(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    kill_after(inputs, out, 1)
    for name, content in quiet.items():
        (out / name).write_bytes(content)
    assert packed(inputs, out, target_shard_bytes=TARGET).was_complete
    assert everything(out) == quiet


def test_the_order_in_which_shards_are_packed_does_not_matter(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path
) -> None:
    def backwards(task: Callable[..., Any], calls: Iterable[tuple[Any, ...]], /) -> Iterator[tuple[int, Any]]:
        for number, call in reversed(list(enumerate(calls))):
            yield number, task(*call)

    assert again(inputs, tmp_path / "out", mapper=backwards) == quiet


def test_a_full_disk_ends_a_build_that_then_goes_on(
    inputs: Path, quiet: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from shards.pack import TarWriter

    write, out = TarWriter._write, tmp_path / "out"

    def fill(self: TarWriter, *parts: bytes) -> None:
        if self.num_bytes > 6_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(TarWriter, "_write", fill)
        with pytest.raises(DataError, match="found no room"):
            again(inputs, out)
    assert not list(out.glob("*.tar"))
    assert again(inputs, out) == quiet
