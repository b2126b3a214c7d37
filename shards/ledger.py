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
import secrets
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from dist_mlpl import storage
from dist_mlpl.data.manifest import ShardEntry
from dist_mlpl.errors import ManifestError, MlplError
from shards.pack import PackedShard, Skipped
from shards.plan import differences

FOLDER = "build"
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
        self._plan_url = storage.join(self.folder, "plan.json")

    def begin(self, about: dict[str, Any], *, known: Collection[str]) -> bool:
        """Record this plan for all builders of OUT, or join builders that follow it.

        Args:
            about: description of the plan in JSON types, equal for equal plans.
            known: shards and indexes that may be in OUT before a plan is.

        Returns:
            True when this call recorded the plan, False when it joined.

        Raises:
            ManifestError: others follow another plan, or OUT holds shards of no plan and no manifest.
        """
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
            content = (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode()
            if storage.create_exclusive(self._plan_url, content):
                return True
            plan = self._plan()
            if plan is None:  # its builder has finished meanwhile, which packing will notice
                return False
        ours = _as_read(about)
        if plan != ours:
            raise ManifestError(
                f"an unfinished build of another data set or with other options: {differences(plan, ours)}",
                expected="one plan for all that is written into a folder",
                where=storage.shown(self._plan_url),
                next_step="finish that build with its own inputs and options, give another --out, or empty this one",
            )
        return False

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

    def commit(self, stem: str, packed: PackedShard) -> None:
        """Record that a shard is done. The first record stays, as any other would be equal."""
        entry = None if packed.entry is None else packed.entry.model_dump()
        document = {"entry": entry, "index_bytes": packed.index_bytes, "skipped": packed.skipped}
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
