"""Owns the records of a build under way: the plan that it follows, which shards are done, who works on which.

OUT/build/plan.json        made exclusively: all builders of OUT follow one plan
OUT/build/STEM.json        made exclusively once shard STEM and its index lie in OUT
OUT/build/STEM.lease-0     who packs STEM, rewritten while they live; lease-1 takes over from it, and so on

Shards are a function of the plan and appear whole, so two builders that write the same one do no harm: leases only save
work. The folder goes when the manifest is written.
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
LEASE_SECONDS = 30.0  # a lease that did not change for so long, while it was watched, is nobody's
_BEAT_SECONDS = 5.0
_READERS = 16


class Held(NamedTuple):
    """A lease of somebody else."""

    generation: int
    content: bytes  # empty when it was just given up

    @property
    def is_dead(self) -> bool:
        """True when its holder was a process of this machine that is no more; others can only be watched."""
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
        """Make the plan of the builders of OUT this one, or join them.

        Args:
            about: what the plan is: JSON types, equal for equal plans.
            known: shards and indexes that may lie in OUT before a plan does.

        Returns:
            True when this call made it.

        Raises:
            ManifestError: others follow another plan, or OUT holds shards of neither.
        """
        there = storage.list_names(self.out)  # before the plan is looked for: what builders wrote comes after it
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
            if plan is None:  # its maker is done with it, as the shards will tell
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
        """False once some builder has finished."""
        return storage.exists(self._plan_url)

    def commit(self, stem: str, packed: PackedShard) -> None:
        """Note that a shard is done. The first note stays: another can only say the same."""
        entry = None if packed.entry is None else packed.entry.model_dump()
        document = {"entry": entry, "index_bytes": packed.index_bytes, "skipped": packed.skipped}
        content = json.dumps(document, ensure_ascii=False).encode()
        storage.create_exclusive(self._commit_url(stem), content, durable=False)

    def committed(self, stem: str) -> PackedShard | None:
        """What was noted of a shard, None when nothing readable was."""
        try:
            document = json.loads(storage.read_bytes(self._commit_url(stem)))
            entry = document["entry"]
            return PackedShard(
                None if entry is None else ShardEntry.model_validate(entry),
                document["index_bytes"],
                tuple(Skipped(*skipped) for skipped in document["skipped"]),
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # a machine that lost power may leave half a note
            return None

    def all_committed(self, stems: Collection[str]) -> dict[str, PackedShard]:
        """What was noted of these shards, where something was."""
        there = set(storage.list_names(self.folder))
        noted = [stem for stem in stems if f"{stem}.json" in there]
        with ThreadPoolExecutor(_READERS, "ledger") as pool:
            found = dict(zip(noted, pool.map(self.committed, noted), strict=True))
        return {stem: packed for stem, packed in found.items() if packed is not None}

    def forget(self, stem: str) -> None:
        """Take a note back: what it speaks of is not there."""
        storage.remove(self._commit_url(stem))

    def claim(self, stem: str, generation: int) -> Lease | Held:
        """Take a shard on, or learn who has.

        Args:
            stem: of the shard.
            generation: 0, or one more than that of a lease that is nobody's.
        """
        lease = Lease(self._lease_url(stem, generation))
        return lease if lease.take() else self.held(stem, generation)

    def held(self, stem: str, generation: int) -> Held:
        """A lease as it is now."""
        try:
            return Held(generation, storage.read_bytes(self._lease_url(stem, generation)))
        except FileNotFoundError:
            return Held(generation, b"")

    def close(self) -> None:
        """Remove all records."""
        storage.remove_folder(self.folder)

    def sweep(self, digest: str) -> None:
        """Remove what builders left who were killed after their end.

        Args:
            digest: of the manifest in OUT; the records of a build that extends this one stay.
        """
        plan = self._plan()
        if plan is None or plan.get("base") != digest:
            self.close()

    def _commit_url(self, stem: str) -> str:
        return storage.join(self.folder, f"{stem}.json")

    def _lease_url(self, stem: str, generation: int) -> str:
        return storage.join(self.folder, f"{stem}.lease-{generation}")


def _as_read(document: dict[str, Any]) -> dict[str, Any]:
    """JSON as it comes back: tuples as lists."""
    return dict(json.loads(json.dumps(document)))


class Lease:
    """The right to work on a shard, kept by a thread for as long as the block runs, and given up at its end."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._token = secrets.token_hex(8)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self) -> bool:
        """True when nobody had it."""
        return storage.create_exclusive(self._url, self._content(0), durable=False)

    def _content(self, beat: int) -> bytes:
        holder = {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid()), "token": self._token}
        return json.dumps({"holder": holder, "beat": beat}).encode()

    def _keep(self) -> None:
        beat = 0
        while not self._is_over.wait(_BEAT_SECONDS):
            beat += 1
            with contextlib.suppress(MlplError):  # others may then do this shard again, which does no harm
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
    """What tells the process numbers of this machine from others'; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process of this machine started, in ticks since boot; empty when it is no more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
