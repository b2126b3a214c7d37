"""Owns the records of a build in progress: the plan that it follows, which shards are done, who works on which.

OUT/build/plan.json        created exclusively: all builders of OUT follow one plan
OUT/build/STEM.json        created exclusively once shard STEM and its index are in OUT
OUT/build/STEM.lease-0     who packs STEM, rewritten while they live; lease-1 takes over from it, and so on

Shards are a function of the plan and appear atomically, so two builders that write the same one do no harm: leases only
save work. The folder is removed when the manifest is written.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from dist_mlpl import storage
from dist_mlpl.data.manifest import ShardEntry, manifest_url
from dist_mlpl.errors import ManifestError, MlplError
from shards.pack import PackedShard, Skipped
from shards.plan import differences

FOLDER = "build"
_PLAN = "plan.json"
_CHANGING = "changing"  # in plan.json while the plan is replaced
_FINISH = "manifest"  # the lease of the builder that writes the manifest
_SHARD_FILE = re.compile(r"[\w-]+-\d{6,}\.(tar|arrow)")
LEASE_SECONDS = 30.0  # a lease that does not change for this long while being watched has expired
_BEAT_SECONDS = 5.0
_READERS = 16


class Held(NamedTuple):
    """A lease held by another builder."""

    generation: int
    content: bytes  # empty if it was just released

    @property
    def is_dead(self) -> bool:
        """Whether its holder was a process of this machine that has ended; other holders can only be watched."""
        try:
            holder = json.loads(self.content)["holder"]
            machine, pid, started = holder["machine"], holder["pid"], holder["started"]
        except (ValueError, KeyError, TypeError):
            return False
        return bool(machine) and machine == _machine() and _started(pid) != started


class Ledger:
    """The records in OUT/build.

    Args:
        out: folder or URL of the shards.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        self.folder = storage.join(out, FOLDER)
        self._plan_url = storage.join(self.folder, _PLAN)
        self.plan_digest = ""  # of the plan that `begin` recorded or joined

    def begin(
        self, about: dict[str, Any], *, known: Collection[str], keeps: Callable[[str, PackedShard], bool]
    ) -> bool:
        """Record this plan for all builders of OUT, or join builders that follow it.

        Args:
            about: description of the plan in JSON types, equal for equal plans.
            known: shards and indexes that may be in OUT before a plan is.
            keeps: whether a shard of this stem that was packed by another plan of the same records is as this plan
                would pack it.

        Returns:
            True when this call recorded the plan, False when it joined, or went on with a build whose image files have
            changed in size since or that was begun without `convert`.

        Raises:
            ManifestError: others follow another plan, or OUT holds shards of no plan and no manifest.
        """
        ours, content = _as_read(about), _content(about)
        self.plan_digest = _digest(ours)
        there = storage.list_names(self.out)  # listed before reading the plan, as builders write shards after it
        plan = self._plan()
        if plan is None:
            strange = [name for name in there if name.endswith((".tar", ".arrow")) and name not in known]
            if strange:
                raise ManifestError(
                    f"{len(strange)} shards and indexes of no manifest and no build: {', '.join(strange[:3])}",
                    expected="a folder without other shards",
                    where=storage.shown(self.out),
                    next_step="give another --out, or remove them",
                )
            storage.check_exclusive_create(self.folder)
            if storage.create_exclusive(self._plan_url, content):
                return True
            plan = self._plan()
            if plan is None:  # its builder has finished meanwhile, which packing will notice
                return False
        if plan != ours and _may_follow(plan, ours):
            self._take_over(plan, about, known, keeps)
        elif plan != ours:
            out = storage.shown(self.out)
            raise ManifestError(
                f"an unfinished build of another data set or with other options: {differences(plan, ours)}",
                expected="one plan for all that is written into a folder",
                where=storage.shown(self._plan_url),
                next_step="finish that build with its own inputs and options; give another --out; or, to give that "
                f"build up, remove {out}/{FOLDER} and its tars and indexes in {out}",
            )
        return False

    def _take_over(
        self,
        plan: dict[str, Any],
        about: dict[str, Any],
        known: Collection[str],
        keeps: Callable[[str, PackedShard], bool],
    ) -> None:
        """Replace the plan of an unfinished build, and remove the shards that do not hold under the new one.

        Builders look for leases after they have changed the plan, and at the plan after they have taken a lease: none
        writes by the old plan after this, as that would replace shards of the new one. A call that is killed here is
        finished by the next.

        Raises:
            ManifestError: another builder is at work, or has finished the set.
        """
        storage.write_bytes(self._plan_url, _content({**about, _CHANGING: True}))
        if running := [name for name, held in self._leases() if held.content and not held.is_dead]:
            storage.write_bytes(self._plan_url, _content(plan))
            raise ManifestError(
                f"image files that changed, or --convert, while another builder is at work: {running[0]}",
                expected="no other builder while a build goes on by another plan",
                where=storage.shown(self.folder),
                next_step="wait until it has ended, or end it; if it did on another machine, remove its *.lease-* here",
            )
        if self._manifest_digest() != about["base"]:
            raise ManifestError(
                "a set that another builder has finished meanwhile",
                expected="an unfinished build",
                where=storage.shown(self.out),
                next_step="run the same command again",
            )
        noted = {name.removesuffix(".json") for name in storage.list_names(self.folder) if name.endswith(".json")}
        packed = self.all_committed(noted - {_PLAN.removesuffix(".json")})
        kept = {stem for stem, shard in packed.items() if keeps(stem, shard)}
        for name in storage.list_names(self.out):
            stem = name.rpartition(".")[0]
            if _SHARD_FILE.fullmatch(name) and name not in known and stem not in kept:
                storage.remove(storage.join(self.out, name))
        for stem in noted - kept - {_PLAN.removesuffix(".json")}:
            self.forget(stem)
        storage.write_bytes(self._plan_url, _content(about))

    def _leases(self) -> Iterator[tuple[str, Held]]:
        """Every lease, by name."""
        for name in storage.list_names(self.folder):
            stem, sign, generation = name.rpartition(".lease-")
            if sign and generation.isdecimal():
                yield name, self.held(stem, int(generation))

    def _manifest_digest(self) -> str:
        """Digest of the manifest in OUT; empty without one."""
        try:
            return storage.sha256_of_bytes(storage.read_bytes(manifest_url(self.out)))
        except FileNotFoundError:
            return ""

    def _plan(self) -> dict[str, Any] | None:
        try:
            plan = json.loads(storage.read_bytes(self._plan_url))
        except FileNotFoundError:
            return None
        except ValueError:
            plan = None
        return plan if isinstance(plan, dict) else {}

    @property
    def is_open(self) -> bool:
        """Whether the build is still in progress; False once some builder has finished."""
        return storage.exists(self._plan_url)

    def is_open_for(self, plan_digest: str) -> bool:
        """Whether the build is still in progress; False once some builder has finished.

        Args:
            plan_digest: `plan_digest` of the caller's plan.

        Raises:
            ManifestError: it goes on by another plan.
        """
        plan = self._plan()
        if plan is not None and _digest(plan) != plan_digest:
            raise ManifestError(
                "a build that another builder went on with, by another plan",
                expected="the plan that this builder began with",
                where=storage.shown(self._plan_url),
                next_step="leave it to the other, or run the same command again when it has ended",
            )
        return plan is not None

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Hold a lease while the set is finished, so that the plan stays.

        Raises:
            ManifestError: the build goes on by another plan.
        """
        lease, generation = self.claim(_FINISH, 0), 0
        while isinstance(lease, Held) and lease.is_dead:
            generation += 1
            lease = self.claim(_FINISH, generation)
        with contextlib.nullcontext() if isinstance(lease, Held) else lease:  # another builder of the plan has it
            self.is_open_for(self.plan_digest)
            yield

    def commit(self, stem: str, packed: PackedShard) -> None:
        """Record that a shard is done. The first record stays, as any other would be equal."""
        entry = None if packed.entry is None else packed.entry.model_dump()
        document = {**packed._asdict(), "entry": entry}
        content = json.dumps(document, ensure_ascii=False).encode()
        storage.create_exclusive(self._commit_url(stem), content, durable=False)

    def committed(self, stem: str) -> PackedShard | None:
        """The record of a finished shard; None if there is none that can be read."""
        try:
            document = json.loads(storage.read_bytes(self._commit_url(stem)))
            entry = document["entry"]
            return PackedShard(
                None if entry is None else ShardEntry.model_validate(entry),
                document["index_bytes"],
                tuple(Skipped(*skipped) for skipped in document["skipped"]),
                document["inputs"],
                document["num_oriented"],
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # a power loss may leave half a record
            return None

    def all_committed(self, stems: Collection[str]) -> dict[str, PackedShard]:
        """The records of those of these shards that are finished."""
        there = set(storage.list_names(self.folder))
        noted = [stem for stem in stems if f"{stem}.json" in there]
        with ThreadPoolExecutor(_READERS, "ledger") as pool:
            found = dict(zip(noted, pool.map(self.committed, noted), strict=True))
        return {stem: packed for stem, packed in found.items() if packed is not None}

    def forget(self, stem: str) -> None:
        """Delete the record of a shard whose files are not there."""
        storage.remove(self._commit_url(stem))

    def claim(self, stem: str, generation: int) -> Lease | Held:
        """Take a lease on a shard, or return the lease that another builder holds.

        Args:
            stem: the shard's stem.
            generation: 0, or one more than that of an expired lease.
        """
        lease = Lease(self._lease_url(stem, generation))
        return lease if lease.take() else self.held(stem, generation)

    def held(self, stem: str, generation: int) -> Held:
        """Read the present state of a lease."""
        try:
            return Held(generation, storage.read_bytes(self._lease_url(stem, generation)))
        except FileNotFoundError:
            return Held(generation, b"")

    def close(self) -> None:
        """Remove all records, the plan first: builders whose temporary files vanish then see why (`is_open`)."""
        storage.remove(self._plan_url)
        storage.remove_folder(self.folder)

    def sweep(self, digest: str) -> None:
        """Remove records left by builders that were killed after the manifest was written.

        Args:
            digest: digest of the manifest in OUT; the records of a build that extends it are kept.
        """
        plan = self._plan()
        if plan is None or plan.get("base") != digest:
            self.close()

    def _commit_url(self, stem: str) -> str:
        return storage.join(self.folder, f"{stem}.json")

    def _lease_url(self, stem: str, generation: int) -> str:
        return storage.join(self.folder, f"{stem}.lease-{generation}")


def _digest(plan: dict[str, Any]) -> str:
    return storage.sha256_of_bytes(json.dumps(plan, sort_keys=True).encode())


def _content(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()


def _may_follow(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether a build by one plan may go on by another: the same records, packed the same way, but for `convert`."""

    def compared(plan: dict[str, Any]) -> dict[str, Any]:
        packing = plan.get("packing")
        packing = {**packing, "convert": None} if isinstance(packing, dict) else packing
        return {**plan, "digest": None, _CHANGING: None, "packing": packing, "pillow": None}

    def of(plan: dict[str, Any], name: str) -> Any:
        return plan.get("packing", {}).get(name) if name == "convert" else plan.get(name)

    if compared(there) != compared(here) or (of(there, "convert") and not of(here, "convert")):
        return False
    return of(there, "pillow") in ("", of(here, "pillow"))  # empty: no image was made anew so far


def _as_read(document: dict[str, Any]) -> dict[str, Any]:
    """A document after a round trip through JSON, which turns tuples into lists."""
    return dict(json.loads(json.dumps(document)))


class Lease:
    """The right to work on a shard: a thread renews it while the `with` block runs, and it is released at the end."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._token = secrets.token_hex(8)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self) -> bool:
        """Take the lease; returns False if another builder holds it."""
        return storage.create_exclusive(self._url, self._content(0), durable=False)

    def _content(self, beat: int) -> bytes:
        holder = {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid()), "token": self._token}
        return json.dumps({"holder": holder, "beat": beat}).encode()

    def _keep(self) -> None:
        beat = 0
        while not self._is_over.wait(_BEAT_SECONDS):
            beat += 1
            with contextlib.suppress(MlplError):  # others may then repack this shard, which does no harm
                storage.write_bytes(self._url, self._content(beat), durable=False)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()
        storage.remove(self._url)


@functools.cache
def _machine() -> str:
    """An identifier of this machine's process id space; empty where the system has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Start time of a process of this machine, in ticks since boot; empty if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
