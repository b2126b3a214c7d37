"""The other loaders, as their users write them. Runs alone under the peers' interpreter, without dist_mlpl.

python stream_peers.py versions                                       installed versions, as JSON
python stream_peers.py write TOOL SHARDS OUT CHUNK_BYTES              the samples of SHARDS/*.tar in the tool's format
python stream_peers.py run CONTESTANT DATA SIZE BATCH WORKERS WARMUP TIMED       images a second, as JSON

The last line on standard output is the answer. The samples' bytes are those of the tars; batches are uint8
(B, 3, SIZE, SIZE) and labels int8 (B, C) on the CPU, shuffled, endless or one epoch as the tool does it.
"""

from __future__ import annotations

import json
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "pillow", "numpy", "webdataset", "mosaicml-streaming", "litdata")
SCALE, RATIO = (0.25, 1.0), (3 / 4, 4 / 3)

Decode = Callable[[bytes], Any]  # a JPEG -> (3, size, size) uint8 tensor


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def samples(shards: str) -> Iterator[tuple[bytes, Any]]:
    """JPEG bytes and int8 labels (C,) of every sample of SHARDS/*.tar; SHARDS/manifest.json names the classes."""
    targets_of = target_reader(shards)
    for path in sorted(Path(shards).glob("*.tar")):
        jpeg = b""
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                if member.name.endswith(".jpg"):
                    jpeg = file.read()
                else:
                    yield jpeg, targets_of(json.loads(file.read()))


def target_reader(shards: str) -> Callable[[dict[str, Any]], Any]:
    """Labels of a sample's JSON record as (C,) int8: absent is -1, present +1."""
    import numpy as np

    classes = [entry["id"] for entry in json.loads((Path(shards) / "manifest.json").read_text())["classes"]]
    columns = {name: column for column, name in enumerate(classes)}

    def read(record: dict[str, Any]) -> Any:
        targets = np.full(len(columns), -1, dtype=np.int8)
        targets[[columns[name] for name in record["positives"]]] = 1
        return targets

    return read


def write_mosaicml(shards: str, out: str, chunk_bytes: int) -> None:
    """An MDS set; the image column is raw bytes, so that no encoder runs."""
    from streaming import MDSWriter  # type: ignore[import-not-found]

    first = next(samples(shards))
    columns = {"image": "bytes", "targets": f"ndarray:int8:{len(first[1])}"}
    with MDSWriter(out=out, columns=columns, size_limit=chunk_bytes) as writer:
        for jpeg, targets in samples(shards):
            writer.write({"image": jpeg, "targets": targets})


class _Samples:
    """`samples` for litdata's writer, which wants something picklable that it calls with each input."""

    def __init__(self, shards: str) -> None:
        self.shards = shards

    def __call__(self, _: int) -> Iterator[dict[str, Any]]:
        for jpeg, targets in samples(self.shards):
            yield {"image": jpeg, "targets": targets}


def write_litdata(shards: str, out: str, chunk_bytes: int) -> None:
    """A litdata set of chunks as large as the shards."""
    import litdata  # type: ignore[import-not-found]

    litdata.optimize(fn=_Samples(shards), inputs=[0], output_dir=out, chunk_bytes=chunk_bytes, num_workers=1)


def pil_decode(size: int) -> Decode:
    """Pillow, and torchvision's transforms on its images."""
    from PIL import Image
    from torchvision.transforms import v2

    augment = v2.Compose(
        [v2.RandomResizedCrop(size, SCALE, RATIO, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    return lambda jpeg: augment(Image.open(BytesIO(jpeg)).convert("RGB"))


def torchvision_decode(size: int) -> Decode:
    """torchvision's decoder, and its transforms on tensors."""
    import torch
    from torchvision import io
    from torchvision.transforms import v2

    augment = v2.Compose([v2.RandomResizedCrop(size, SCALE, RATIO, antialias=True), v2.RandomHorizontalFlip()])

    def decode(jpeg: bytes) -> Any:
        encoded = torch.frombuffer(bytearray(jpeg), dtype=torch.uint8)
        return augment(io.decode_jpeg(encoded, mode=io.ImageReadMode.RGB))

    return decode


def webdataset_loader(data: str, decode: Decode, batch: int, workers: int) -> Iterable[Any]:
    """Shuffled shards, a shuffle buffer of 1,000, batches made in the workers: the way its documentation shows.

    The buffer is full before the first sample, else it would fill, at two reads a sample, while time is taken.
    """
    import torch
    import webdataset as wds

    targets_of = target_reader(data)

    def decode_pair(pair: tuple[bytes, bytes]) -> tuple[Any, Any]:
        jpeg, record = pair
        return decode(jpeg), torch.from_numpy(targets_of(json.loads(record)))

    shards = sorted(str(path) for path in Path(data).glob("*.tar"))
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards))
        .repeat()
        .shuffle(1000, initial=1000)
        .to_tuple("jpg", "json")
        .map(decode_pair)
        .batched(batch, collation_fn=torch.utils.data.default_collate, partial=False)
    )
    return wds.WebLoader(dataset, batch_size=None, num_workers=workers)


def mosaicml_loader(data: str, decode: Decode, batch: int, workers: int) -> Iterable[Any]:
    """A StreamingDataset whose samples are decoded in __getitem__, and its own loader."""
    import torch
    from streaming import StreamingDataLoader, StreamingDataset

    class Photographs(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return decode(sample["image"]), torch.from_numpy(sample["targets"].copy())

    dataset = Photographs(local=data, shuffle=True, batch_size=batch)
    return StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, drop_last=True)


def litdata_loader(data: str, decode: Decode, batch: int, workers: int) -> Iterable[Any]:
    """A StreamingDataset whose samples are decoded in __getitem__, and its own loader."""
    import torch
    from litdata import StreamingDataLoader, StreamingDataset

    class Photographs(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return decode(sample["image"]), torch.as_tensor(sample["targets"])

    dataset = Photographs(data, shuffle=True, drop_last=True)
    return StreamingDataLoader(dataset, batch_size=batch, num_workers=workers, drop_last=True)


WRITERS = {"mosaicml": write_mosaicml, "litdata": write_litdata}
LOADERS = {"webdataset": webdataset_loader, "mosaicml": mosaicml_loader, "litdata": litdata_loader}
DECODERS = {"pil": pil_decode, "torchvision": torchvision_decode}


def speed(batches: Iterator[Any], *, batch: int, size: int, warmup: int, timed: int) -> dict[str, float]:
    """Images a second over `timed` batches that follow `warmup` others."""
    for _ in range(warmup):
        next(batches)
    began = time.perf_counter()
    for _ in range(timed):
        images, targets = next(batches)
    seconds = time.perf_counter() - began
    assert images.shape == (batch, 3, size, size), images.shape
    assert str(images.dtype) == "torch.uint8", images.dtype
    assert targets.shape[0] == batch, targets.shape
    assert str(targets.dtype) == "torch.int8", targets.dtype
    return {"images_per_second": timed * batch / seconds}


def run(contestant: str, data: str, size: int, batch: int, workers: int, warmup: int, timed: int) -> dict[str, float]:
    """One measurement of one contestant, `TOOL-DECODER`."""
    tool, decoder = contestant.split("-")
    loader = LOADERS[tool](data, DECODERS[decoder](size), batch, workers)
    return speed(iter(loader), batch=batch, size=size, warmup=warmup, timed=timed)


def main(arguments: list[str]) -> None:
    verb, rest = arguments[0], arguments[1:]
    if verb == "versions":
        answer: Any = versions()
    elif verb == "write":
        tool, shards, out, chunk_bytes = rest
        answer = WRITERS[tool](shards, out, int(chunk_bytes))
    else:
        contestant, data, *numbers = rest
        answer = run(contestant, data, *map(int, numbers))
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
