"""What heatmaps in memory cost an image on one CPU thread: geometry, bytes, rows, against a trunk's own step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from dist_mlpl.banks.heatmaps import (
    HeatmapBank,
    Slots,
    decode_maps,
    encode_maps,
    keyed_rows,
    read_through_crop,
    write_through_crop,
)
from dist_mlpl.banks.slots import renew_slots
from dist_mlpl.models.backbone import BackboneSettings, build_backbone

B, ROUNDS = 64, 7
SHAPES = ((32, 14, 7, 601), (32, 14, 14, 9605), (80, 28, 14, 80))  # M slots, W and G cells, C classes


def milliseconds(work: Callable[[], object]) -> float:
    """Processor time an image, the median of some rounds."""
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return 1e3 * statistics.median(times) / B


def costs(M: int, W: int, G: int, C: int) -> list[str]:
    """Bytes of a row, and milliseconds an image of each part and of all."""
    generator = torch.Generator().manual_seed(0)
    crop = torch.cat([0.5 * torch.rand(B, 2, generator=generator), torch.full((B, 2), 0.5)], dim=1)
    flipped, index, visits = torch.rand(B, generator=generator) < 0.5, torch.arange(B) * 13, torch.full((B,), 3)
    bank = HeatmapBank("slots", 4096, num_slots=M, map_size=W, seed=0)
    classes = torch.stack([torch.randperm(C, generator=generator)[:M] for _ in range(B)])
    heatmaps = torch.rand(B, M, W, W, generator=generator)
    heatmaps[torch.rand(B, M, W, W, generator=generator) < 0.1] = torch.nan
    slots = Slots(classes, torch.rand(B, M, generator=generator), heatmaps, visits)
    evidence, probs = torch.rand(B, M, G, G, generator=generator), torch.rand(B, C, generator=generator)
    targets = torch.zeros(B, C, dtype=torch.int8)
    times = [
        milliseconds(lambda: read_through_crop(heatmaps, crop, flipped, G)),
        milliseconds(lambda: write_through_crop(heatmaps, evidence, crop, flipped, 0.8)),
        milliseconds(lambda: decode_maps(encode_maps(heatmaps, keyed_rows(0, index, visits)))),
        milliseconds(lambda: renew_slots(slots, probs, targets, margin=0.05)),
        milliseconds(lambda: bank.write(index, bank.read(index))),
    ]
    num_bytes = sum(column.num_bytes for column in bank.spec.columns.values())
    return [f"{num_bytes:,}", *(f"{t:.3f}" for t in (*times, sum(times)))]


def main() -> None:
    torch.set_num_threads(1)
    names = ("bytes", "read ms", "write ms", "round ms", "slots ms", "bank ms", "all ms")
    print(f"{'M, W, G, C':28}" + "".join(f"{name:>10}" for name in names))
    for M, W, G, C in SHAPES:
        print(f"{f'{M}, {W} x {W}, {G} x {G}, {C:,}':28}" + "".join(f"{text:>10}" for text in costs(M, W, G, C)))
    trunk, _ = build_backbone(BackboneSettings(name="resnet50"), image_size=224)
    images = torch.randn(4, 3, 224, 224)
    step = milliseconds(lambda: trunk(images).sum().backward()) * B / len(images)
    print(f"for comparison, ResNet-50 at 224 pixels, forward and backward: {step:.0f} ms an image")


if __name__ == "__main__":
    main()
