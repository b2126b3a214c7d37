"""Owns what the contestants of `bench_stream` read and run in: photographs, shards, the peers' sets and interpreter.

All of it lies in one folder (BENCH_DIR, default ~/.cache/dist-mlpl-bench) and is made once.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
from PIL import Image

from shards.build import build
from shards.sources.table import read_table

ROOT = Path(__file__).parents[2]
NUM_SHARDS = 16  # even, so that two workers of a loader that deals shards get as many each
REPEATS = 9  # of each photograph; 256 of them make 2,304 samples
LONGER_SIDE = {"640": None, "1024": 1024}  # pixels; None: the files as they are
_CHILD_SECONDS = 1800

# The decoders of the peers are of the same versions as ours.
BASE = [f"torch=={torch.__version__.split('+')[0]}", f"torchvision=={torchvision.__version__.split('+')[0]}"]
BASE += [f"pillow=={PIL.__version__}"]
TOOLS = {"webdataset": "webdataset==1.0.2", "mosaicml": "mosaicml-streaming==0.13.0", "litdata": "litdata==0.2.76"}
# Loaders whose workers each use one thread, and that ask nobody for news.
CHILD_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "LITDATA_DISABLE_VERSION_CHECK": "1"}


class ChildError(Exception):
    """A child process failed; the message is the last thing it said."""


def bench_folder() -> Path:
    """BENCH_DIR, or a folder in this user's cache."""
    return Path(os.environ.get("BENCH_DIR") or Path.home() / ".cache" / "dist-mlpl-bench")


def call(command: list[str], **environment: str) -> Any:
    """Run a child and return the JSON in its last line.

    Raises:
        ChildError: it failed, or took half an hour.
    """
    env = {**os.environ, **CHILD_ENVIRONMENT, **environment}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=_CHILD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise ChildError(f"no answer in {_CHILD_SECONDS} s") from error
    if done.returncode != 0:
        raise ChildError(_last_words(done))
    return json.loads(done.stdout.splitlines()[-1])


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line or line.startswith("ERROR")]
    return (errors or lines or [f"exit code {done.returncode}"])[-1][:300]


@dataclass(frozen=True)
class Photographs:
    """One set of JPEGs, packed for us and for WebDataset alike.

    Args:
        name: "640" or "1024", pixels of the longer side.
        folder: holds `shards`, which both read, and the peers' own sets.
    """

    name: str
    folder: Path

    @property
    def shards(self) -> Path:
        """The tars, their indexes and manifest.json; the split is `train`."""
        return self.folder / "shards"

    @property
    def num_samples(self) -> int:
        """N."""
        return int(json.loads((self.shards / "manifest.json").read_text())["splits"]["train"]["num_samples"])

    @property
    def shard_bytes(self) -> int:
        """Mean length of a tar."""
        split = json.loads((self.shards / "manifest.json").read_text())["splits"]["train"]
        return int(split["num_bytes"]) // len(split["shards"])


def photographs(name: str) -> Photographs:
    """The photographs of MLPL_TEST_DATA (default ../shared/data), at one of the two sizes.

    Raises:
        FileNotFoundError: they are not there.
    """
    data = Path(os.environ.get("MLPL_TEST_DATA") or ROOT.parent / "shared" / "data") / "coco256"
    made = Photographs(name, bench_folder() / f"photographs-{name}")
    note = made.folder / "made_by.txt"
    if note.exists() and note.read_text() == _maker():
        return made
    if not (data / "labels.csv").exists():
        raise FileNotFoundError(f"{data / 'labels.csv'}: set MLPL_TEST_DATA to the folder that holds coco256")
    images = made.folder / "images"
    shutil.rmtree(made.folder, ignore_errors=True)  # of other code, or of an interrupted run
    images.mkdir(parents=True)
    with open(data / "labels.csv", newline="") as labels, open(made.folder / "labels.csv", "w", newline="") as out:
        rows, written = list(csv.DictReader(labels)), csv.writer(out)
        written.writerow(("image", "labels"))
        for row in rows:
            first = images / f"0-{row['image']}"
            first.write_bytes(_enlarged((data / "images" / row["image"]).read_bytes(), LONGER_SIDE[name]))
            for repeat in range(REPEATS):
                file = f"{repeat}-{row['image']}"
                if repeat:
                    os.link(first, images / file)
                written.writerow((file, row["labels"]))
    source = read_table(str(images), str(made.folder / "labels.csv"), classes=str(data / "classes.csv"))
    num_bytes = sum(file.stat().st_size for file in images.iterdir())
    build(source, str(made.shards), target_shard_bytes=int(num_bytes / (NUM_SHARDS - 0.5)), workers=1)
    shutil.rmtree(images)
    note.write_text(_maker())
    return made


def _maker() -> str:
    """Digest of the code that makes a set: another build of the shards must not be measured."""
    files = [Path(__file__), *sorted((ROOT / "shards").rglob("*.py"))]
    files += [ROOT / "dist_mlpl" / "data" / name for name in ("manifest.py", "shard_index.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _enlarged(content: bytes, longer_side: int | None) -> bytes:
    """A JPEG with its longer side of that many pixels, quality 90, colour at half resolution (4:2:0)."""
    if longer_side is None:
        return content
    image = Image.open(BytesIO(content))
    factor = longer_side / max(image.size)
    larger = image.resize([round(side * factor) for side in image.size], Image.Resampling.BICUBIC)
    out = BytesIO()
    larger.save(out, "JPEG", quality=90, subsampling="4:2:0")
    return out.getvalue()


@dataclass
class Peers:
    """The other loaders, in an environment of their own.

    Args:
        python: its interpreter.
        versions: of the packages that matter there.
        failures: why a tool cannot run, by tool.
    """

    python: Path
    versions: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def call(self, *arguments: object) -> Any:
        """Run `stream_peers.py` there.

        Raises:
            ChildError: it failed.
        """
        rubbish = bench_folder() / "tmp"  # two of them leave locks and folders behind
        rubbish.mkdir(parents=True, exist_ok=True)
        script = str(ROOT / "tests" / "bench" / "stream_peers.py")
        return call([str(self.python), script, *map(str, arguments)], TMPDIR=str(rubbish))

    def data(self, tool: str, photos: Photographs) -> Path:
        """What a tool reads: the shards, or the set that its own writer makes of their samples, once.

        Raises:
            ChildError: the writer failed.
        """
        if tool == "webdataset":
            return photos.shards
        made = photos.folder / tool
        if not made.exists():
            unfinished = photos.folder / f"{tool}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            self.call("write", tool, photos.shards, unfinished, photos.shard_bytes)
            unfinished.rename(made)
        return made


def install_peers() -> Peers:
    """Make the peers' environment, or use the one that is there; what does not install is reported, not raised."""
    folder = bench_folder() / "peers"
    peers = Peers(folder / "bin" / "python")
    try:
        if not peers.python.exists():
            venv.create(folder, with_pip=True, clear=True)
    except subprocess.CalledProcessError as error:
        peers.failures = dict.fromkeys(TOOLS, f"no virtual environment in {folder}: {error}")
        return peers
    for tools, wanted in ((list(TOOLS), BASE), *(([tool], [package]) for tool, package in TOOLS.items())):
        if not _has(peers, wanted):
            fault = _install(peers, wanted)
            peers.failures.update({tool: fault for tool in tools if fault})
    peers.versions = peers.call("versions")
    return peers


def _has(peers: Peers, wanted: list[str]) -> bool:
    found = peers.call("versions")
    pairs = (package.split("==") for package in wanted)
    return all(found.get(name, "").split("+")[0] == version for name, version in pairs)


def _install(peers: Peers, packages: list[str]) -> str:
    """Empty, or why it failed."""
    print(f"installing {' '.join(packages)} into {peers.python.parents[1]}", file=sys.stderr, flush=True)
    command = [str(peers.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"not installed: {_last_words(done)}"
