"""Owns reading the commit chain: one small record per checkpoint, which names its parent and its files.

The chain alone says where a run stands: at the commit of the highest step. `checkpoint.py` writes it.
"""

from __future__ import annotations

import platform
import re

import safetensors.torch
from pydantic import Field, ValidationError
from torch import Tensor

from dist_mlpl import storage
from dist_mlpl.banks.held import BankSpec
from dist_mlpl.environment import installed_version
from dist_mlpl.errors import CheckpointError
from dist_mlpl.settings import Settings

FORMAT = 2
_READABLE = (1, 2)  # format 1 has no banks
_RECORD = re.compile(r"\d+\.json")


class CommitFile(Settings):
    """One file of a checkpoint."""

    path: str  # below RUN
    num_bytes: int
    sha256: str


class BankPart(Settings):
    """One file of a bank, and which of its shards are current."""

    path: str  # below RUN, in the checkpoint that changed these shards
    shards: list[tuple[int, int]]  # ranges [first, stop) of virtual shards; others in the file are outdated


class BankRecord(Settings):
    """A saved bank; rows of shards that no part holds were never written."""

    spec: BankSpec
    parts: list[BankPart]


class RunIdentity(Settings):
    """A run's setup as its commits record it; `check_identity` compares all but the batch and the config."""

    global_batch: int
    num_lanes: int
    window_samples: int
    group_size: int
    digests: dict[str, str | None]  # of config, classes, manifest, view


class Commit(Settings):
    """The record that makes a checkpoint exist."""

    format: int
    step: int
    epoch: int
    samples_consumed: int
    round: int
    parent: int | None  # step of the previous commit; None for the first
    attempt: str
    global_batch: int
    num_lanes: int
    window_samples: int
    group_size: int
    world_size: int
    digests: dict[str, str | None]
    versions: dict[str, str]
    metrics: dict[str, float]
    bad_samples: list[tuple[int, str, str]]  # (index, name, reason) of samples undecodable since the parent
    files: list[CommitFile]  # all files it needs; those of banks may lie in folders of earlier checkpoints
    banks: dict[str, BankRecord] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """The step as written in file names."""
        return f"{self.step:08d}"


def commit_url(out: str, step: int) -> str:
    """URL of the commit of a step."""
    return storage.join(out, "commits", f"{step:08d}.json")


def numbered_records(folder: str) -> list[int]:
    """Numbers of the files NUMBER.json in a folder, ascending; other files are ignored."""
    return sorted(int(name.removesuffix(".json")) for name in storage.list_names(folder) if _RECORD.fullmatch(name))


def read_head(out: str) -> Commit | None:
    """Read the commit of the highest step; None in a new run folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    steps = numbered_records(storage.join(out, "commits"))
    return read_commit(out, steps[-1]) if steps else None


def read_commit(out: str, step: int) -> Commit:
    """Read the commit of a step.

    Raises:
        CheckpointError: missing, not JSON or of another format.
    """
    url = commit_url(out, step)
    try:
        commit = Commit.model_validate_json(storage.read_bytes(url))
    except (FileNotFoundError, ValidationError) as error:
        raise _unreadable(type(error).__name__, url) from error
    if commit.format not in _READABLE:
        raise _unreadable(f"format {commit.format}", url)
    return commit


def read_commit_at(out: str, step: int) -> Commit:
    """Read the commit of a step that a person named.

    Raises:
        CheckpointError: no commit there, with the steps that have one; or see `read_commit`.
    """
    steps = numbered_records(storage.join(out, "commits"))
    if step not in steps:
        near = ", ".join(map(str, sorted(sorted(steps, key=lambda other: abs(other - step))[:6])))
        raise CheckpointError(
            f"no commit at step {step}",
            expected=f"one of the {len(steps)}, the nearest: {near}" if steps else "a commit",
            where=storage.shown(storage.join(out, "commits")),
            next_step="name one of these" if steps else "wait for the run's first commit",
        )
    return read_commit(out, step)


def _unreadable(why: str, url: str) -> CheckpointError:
    return CheckpointError(
        f"a commit of the chain cannot be read: {why}",
        expected=f"a commit record of format {' or '.join(map(str, _READABLE))}",
        where=url,
        next_step="restore the file; if it is the newest commit, move it away to go on from the one before",
    )


def read_newest(out: str) -> Commit:
    """Read the commit of the highest step, which must exist.

    Raises:
        CheckpointError: no commit at all, or it cannot be read.
    """
    commit = read_head(out)
    if commit is None:
        raise CheckpointError(
            "no commit",
            expected="a run that has saved at least once",
            where=storage.join(out, "commits"),
            next_step="check the path; `dist-mlpl train CONFIG --out RUN` starts a run",
        )
    return commit


def read_chain(out: str) -> list[Commit]:
    """Read the commits that led to the head, first to last.

    Raises:
        CheckpointError: no commit at all, or a parent is missing.
    """
    chain = [read_newest(out)]
    while chain[-1].parent is not None:
        chain.append(read_commit(out, chain[-1].parent))
    return chain[::-1]


def read_file(out: str, commit: Commit, name: str) -> bytes:
    """Read one file of a checkpoint and verify its digest.

    Args:
        out: URL of the run folder, RUN.
        commit: the checkpoint's commit.
        name: file name in its folder, or path below RUN.

    Raises:
        CheckpointError: missing, or not the bytes that the commit lists.
    """
    entry = next((f for f in commit.files if f"/{f.path}".endswith(f"/{name}")), None)
    where = storage.join(out, entry.path if entry else name)
    try:
        content = storage.read_bytes(where) if entry else b""
    except FileNotFoundError:
        content = b""
    if entry is None or len(content) != entry.num_bytes or storage.sha256_of_bytes(content) != entry.sha256:
        raise CheckpointError(
            f"{name} of commit {commit.step} is missing or damaged ({len(content)} bytes)",
            expected=f"{entry.num_bytes} bytes of sha256 {entry.sha256[:16]}..." if entry else "a file of that name",
            where=where,
            next_step="models of old commits are pruned (keep_checkpoints); if this is the newest, move "
            f"RUN/commits/{commit.name}.json away to go on from the commit before it",
        )
    return content


def read_model(out: str, commit: Commit) -> dict[str, Tensor]:
    """Read parameters and buffers by name: all that evaluation and export need.

    Raises:
        CheckpointError: the model was pruned or is damaged.
    """
    return safetensors.torch.load(read_file(out, commit, "model.safetensors"))


def check_identity(identity: RunIdentity, commit: Commit, *, out: str) -> None:
    """Refuse to resume on other classes, shards, labels or order.

    `config.check_resume` compares `global_batch` and the other keys of the config, as it knows which may change.

    Raises:
        CheckpointError: the message lists every difference.
    """
    differing = [
        f"{name}: {getattr(commit, name)} in the run, {getattr(identity, name)} now"
        for name in ("num_lanes", "window_samples", "group_size")
        if getattr(commit, name) != getattr(identity, name)
    ]
    differing += [
        f"{name}: {commit.digests.get(name)} in the run, {identity.digests.get(name)} now"
        for name in ("classes", "manifest", "view")
        if commit.digests.get(name) != identity.digests.get(name)
    ]
    if differing:
        raise CheckpointError(
            "the data set or its order has changed since the run was saved: " + "; ".join(differing),
            expected="the classes, manifest, view and order that the run began with",
            where=storage.join(out, "commits", f"{commit.name}.json"),
            next_step="resume on the same shards and settings, or start a new run folder",
        )


def versions() -> dict[str, str]:
    """Versions of Python and of the main packages, by name."""
    names = ("dist-mlpl", "torch", "torchvision", "deepspeed", "ray", "numpy")
    return {"python": platform.python_version()} | {name: installed_version(name) for name in names}
