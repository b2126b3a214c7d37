"""Counts of a packed set equal counts by loops over its labels, in bounded memory, and are shown without damage."""

from __future__ import annotations

import json
import re
import tracemalloc
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console

from dist_mlpl.data import entries
from dist_mlpl.data.manifest import Manifest
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stored_view import StoredView
from dist_mlpl.errors import ConfigError, ManifestError, StorageError
from dist_mlpl.labels import Unlisted
from shards import pairs, sample
from shards.pairs import Pairs
from shards.report import counted, size_text, stats_page, stats_tables
from shards.sample import choose, every, header_size
from shards.simulate import simulate
from shards.stats import SplitStatistics, stats, stats_document
from tests.support import views as loops
from tests.support.images import tiny_jpeg
from tests.support.keyed_views import Targets
from tests.support.label_sets import LabelSplit, label_split, write_label_set

pytestmark = pytest.mark.integration

NUM_CLASSES = 9


def make_set(
    folder: Path, *, unlisted: Unlisted = "unknown", num_samples: int = 60, num_classes: int = NUM_CLASSES
) -> tuple[Manifest, dict[str, LabelSplit]]:
    """Two splits of random labels; no image lies in the shards."""
    splits = {}
    for seed, (name, size) in enumerate({"train": num_samples, "val": num_samples // 3}.items()):
        unknown = 0.0 if unlisted == "absent" else 0.4
        source = loops.random_targets(size, num_classes, seed=seed, unknown=unknown, present=0.3)
        source[:, 7] = np.where(source[:, 7] == 1, -1, source[:, 7])  # a class that is never present
        source[4] = -1 if unlisted == "absent" else 0
        splits[name] = label_split(source, num_shards=5, seed=seed)
    return write_label_set(folder, splits, unlisted=unlisted), splits


def pairs_by_loops(targets: Targets) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    """both, first present and second known, second present and first known, known; of pairs with any of the first."""
    found = {}
    for a, b in combinations(range(targets.shape[1]), 2):
        both = first = second = known = 0
        for row in targets:
            if row[a] and row[b]:
                known += 1
                first += row[a] == 1
                second += row[b] == 1
                both += row[a] == 1 and row[b] == 1
        if both:
            found[a, b] = (both, first, second, known)
    return found


def as_dict(found: Pairs) -> dict[tuple[int, int], tuple[int, int, int, int]]:
    columns = (found.both, found.first_known, found.second_known, found.known)
    numbers = zip(*(column.tolist() for column in columns), strict=True)
    return dict(zip(zip(found.first.tolist(), found.second.tolist(), strict=True), numbers, strict=True))


def assert_counts(split: SplitStatistics, targets: Targets) -> None:
    for column in range(targets.shape[1]):
        assert split.positives[column] == sum(int(row[column] == 1) for row in targets)
        assert split.negatives[column] == sum(int(row[column] == -1) for row in targets)
    for histogram, codes in ((split.positives_per_image, (1,)), (split.known_per_image, (1, -1))):
        sizes = [sum(int(label) in codes for label in row) for row in targets]
        assert histogram.tolist() == [sizes.count(size) for size in range(max(sizes) + 1)]
    assert split.num_known == sum(int(label != 0) for row in targets for label in row)
    assert split.density == split.num_known / targets.size
    assert as_dict(split.pairs) == pairs_by_loops(targets)
    known = sum(any(row[a] and row[b] for row in targets) for a, b in combinations(range(targets.shape[1]), 2))
    assert split.pairs.num_known == known


@pytest.mark.parametrize("dense_gain", [0, 100, 10**9])  # pairs by themselves, either, by products
@pytest.mark.parametrize("unlisted", ["unknown", "absent"])
def test_counts_equal_loops_whichever_way_pairs_are_counted(
    unlisted: Unlisted, dense_gain: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_DENSE_GAIN", dense_gain)
    monkeypatch.setattr(entries, "_BLOCK_ENTRIES", 40)
    manifest, splits = make_set(tmp_path, unlisted=unlisted)
    found = stats(manifest.url, sample=0)
    assert list(found.splits) == ["train", "val"]
    for name, split in found.splits.items():
        assert_counts(split, splits[name].source)
        assert (split.num_samples, split.num_shards) == (len(splits[name].source), 5)
        assert split.machine is None


@pytest.mark.parametrize("rule", ["keyed_bernoulli", "web"])
@pytest.mark.parametrize("unlisted", ["unknown", "absent"])
def test_a_view_changes_the_counts_of_its_split_alone(unlisted: Unlisted, rule: str, tmp_path: Path) -> None:
    manifest, splits = make_set(tmp_path, unlisted=unlisted)
    fraction = 0.5 if rule == "keyed_bernoulli" else None
    view = simulate(manifest.url, name="v", rule=rule, fraction=fraction).view
    every_one = np.arange(60)
    through = StoredView(view.url, SplitIndex(manifest, "train")).apply(splits["train"].packed, every_one)
    for found in (stats(manifest.url, view="v", sample=0), stats(manifest.url, view=view.url, sample=0)):
        assert_counts(found.splits["train"], through)
        assert_counts(found.splits["val"], splits["val"].source)
        assert found.view is not None
        assert found.view.digest == view.digest


def test_a_view_of_another_set_or_none_is_refused(tmp_path: Path) -> None:
    manifest, _ = make_set(tmp_path / "one")
    other, _ = make_set(tmp_path / "two", num_samples=30)
    view = simulate(other.url, name="v", rule="web").view
    for name in ("v", view.url):
        with pytest.raises(ManifestError):
            stats(manifest.url, view=name, sample=0)
    with pytest.raises(ConfigError, match="sample -1"):
        stats(manifest.url, sample=-1)


def test_of_too_many_classes_those_with_the_most_positives_are_paired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, splits = make_set(tmp_path)
    monkeypatch.setattr(pairs, "MAX_BYTES", 8 * 4**2)
    split = stats(manifest.url, sample=0).splits["train"]
    source = splits["train"].source
    kept = np.sort(np.argsort(-(source == 1).sum(axis=0), kind="stable")[:4])
    assert split.pairs.classes.tolist() == kept.tolist()
    expected = {pair: counts for pair, counts in pairs_by_loops(source).items() if set(pair) <= set(kept.tolist())}
    assert as_dict(split.pairs) == expected
    assert split.positives.tolist() == (source == 1).sum(axis=0).tolist()


def test_conditionals_are_unbiased_under_partial_labels_where_plain_ratios_are_not(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    first = generator.random(8000) < 0.4
    second = generator.random(8000) < np.where(first, 0.6, 0.1)
    source = np.where(np.stack([first, second], axis=1), 1, -1).astype(np.int8)
    manifest = write_label_set(tmp_path, {"train": label_split(source, num_shards=3)}, unlisted="absent")
    simulate(manifest.url, name="v", rule="keyed_bernoulli", fraction=0.2)
    split = stats(manifest.url, view="v", sample=0).splits["train"]
    given = split.pairs.both[0] / split.pairs.first_known[0]
    plain = split.pairs.both[0] / split.positives[0]
    num_seen = 8000 * 0.4 * 0.2 * 0.2
    assert abs(given - 0.6) < 4 * np.sqrt(0.6 * 0.4 / num_seen)
    assert plain < 0.2
    truth = 0.4 * 0.6 / (0.4 * (0.4 * 0.6 + 0.6 * 0.1))
    assert split.pairs.lift(split.rate)[0] == pytest.approx(truth, rel=0.25)


def test_machine_labels_are_counted_by_class_and_confidence(tmp_path: Path) -> None:
    source = loops.random_targets(40, 6, seed=3)
    confidences = np.random.default_rng(0).uniform(0.5, 1.0, source.shape).astype(np.float16)
    confidences[source != 0] = 0
    confidences[0, 0], source[0, 0] = 1.0, 0
    split = label_split(source, num_shards=3)._replace(machine=confidences)
    manifest = write_label_set(tmp_path, {"train": split}, unlisted="unknown")
    found = stats(manifest.url, sample=0).splits["train"]
    assert found.machine is not None
    assert found.confidences is not None
    assert found.machine.tolist() == (confidences > 0).sum(axis=0).tolist()
    given = confidences[confidences > 0].astype(float)
    bins = [int(((given >= b / 20) & (given < (b + 1) / 20)).sum()) for b in range(20)]
    bins[-1] += int((given == 1.0).sum())
    assert found.confidences.tolist() == bins
    assert_counts(found, source)  # what a machine says is not known


# Images


def with_comment(content: bytes, num_bytes: int) -> bytes:
    """The JPEG with comments of so many bytes before its frame header."""
    comments = b""
    while len(comments) < num_bytes:
        comments += b"\xff\xfe\xff\xff" + b"x" * 65533
    return content[:2] + comments + content[2:]


def bomb(content: bytes) -> bytes:
    """The JPEG with a header that claims 60,000 x 60,000 pixels."""
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + (60_000).to_bytes(2, "big") * 2 + content[place + 4 :]


def image_set(folder: Path, images: list[bytes]) -> Manifest:
    source = loops.random_targets(len(images), 3, seed=0)
    split = label_split(source, num_shards=2)._replace(images=images)
    return write_label_set(folder, {"train": split}, unlisted="unknown")


def test_sizes_come_from_headers_read_by_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(20 + i, 90 - i) for i in range(12)]
    images = [tiny_jpeg(i, height=h, width=w) + b"\x00" * 30_000 for i, (h, w) in enumerate(shapes)]
    images[3] = with_comment(images[3], 200_000)
    images[5] = b"\xff\xd8\xff" + b"\x00" * 50_000
    images[8] = bomb(images[8])
    images[9] = b"GIF89a"
    manifest = image_set(tmp_path, images)
    read, read_bytes = [], sample.storage.read_bytes
    monkeypatch.setattr(sample.storage, "read_bytes", lambda *args: read.append(args) or read_bytes(*args))
    found = stats(manifest.url, sample=100).splits["train"]
    good = sorted((w, h) for i, (h, w) in enumerate(shapes) if i not in (5, 8, 9))
    assert sorted(map(tuple, found.sizes.tolist())) == good
    assert found.num_unreadable == 3
    lengths = [end - start for url, start, end in (args for args in read if len(args) == 3)]
    whole = [len(images[i]) for i in (3, 5, 8)]  # whose beginning shows no header that may be
    assert sorted(lengths) == sorted([min(len(image), 16 << 10) for image in images] + whole)


def test_the_histogram_of_bytes_counts_every_image(tmp_path: Path) -> None:
    images = [tiny_jpeg(0)[:2].ljust(length, b"x") for length in (2, 3, 4, 5, 6, 7, 8, 1000, 1024, 1 << 20)]
    found = stats(image_set(tmp_path, images).url, sample=0).splits["train"].bytes_per_image
    expected = np.zeros(64, dtype=int)
    for image in images:
        expected[int(np.floor(2 * np.log2(len(image))))] += 1
    assert found.tolist() == expected.tolist()


def test_a_missing_shard_is_said_to_be_missing(tmp_path: Path) -> None:
    manifest, _ = make_set(tmp_path)
    with pytest.raises(StorageError, match="shard not found"):
        stats(manifest.url, sample=10)


def test_a_header_is_read_without_the_rest_of_the_image() -> None:
    content = tiny_jpeg(1, height=33, width=44)
    assert header_size(content) == header_size(content[:640]) == (44, 33)
    assert header_size(content[:100]) == header_size(b"") == header_size(bomb(content)) == (0, 0)


def test_a_smaller_choice_is_part_of_a_larger_one_and_does_not_depend_on_how_candidates_come() -> None:
    whole = choose(every(5000), 40, seed=3, split="train")
    parts = [part for part in np.array_split(np.arange(5000), 37)]
    assert choose(iter(parts), 40, seed=3, split="train").tolist() == whole.tolist()
    assert set(choose(every(5000), 7, seed=3, split="train")) < set(whole)
    assert choose(every(5000), 40, seed=4, split="train").tolist() != whole.tolist()
    assert choose(every(5), 40, seed=3, split="train").tolist() == [0, 1, 2, 3, 4]
    often = np.bincount(np.concatenate([choose(every(20), 5, seed=seed, split="x") for seed in range(2000)]))
    assert ((often - 500.0) ** 2 / (2000 * 0.25 * 0.75)).sum() < 50  # every sample alike: 20 squares of a unit normal


# Memory


def test_nine_thousand_classes_take_the_counts_of_their_pairs_and_little_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_mlpl.data.split_index.KEPT_INDEXES", 4)
    generator, num_classes = np.random.default_rng(0), 9605

    def peak(num_shards: int) -> int:
        source = np.zeros((100 * num_shards, num_classes), dtype=np.int8)
        rows = np.repeat(np.arange(len(source)), 8)
        source[rows, generator.integers(0, num_classes, len(rows))] = generator.choice([-1, 1], len(rows))
        split = LabelSplit(source, np.arange(len(source)), [100] * num_shards)
        manifest = write_label_set(tmp_path / str(num_shards), {"train": split}, unlisted="unknown")
        del source, split
        tracemalloc.start()
        try:
            found = stats(manifest.url, sample=0).splits["train"]
            assert found.num_known > 0
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    counts = 2 * num_classes * (num_classes - 1) * 4
    small, large = peak(10), peak(40)
    assert large < counts + (32 << 20), "sixteen bytes a pair; dense labels of the larger set are 38 MB"
    assert large < small + (1 << 20)


# Shown


class Balanced(HTMLParser):
    """Every tag that opens, closes in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def hostile_set(folder: Path) -> Manifest:
    names = ["<script>alert(1)</script>", "a & b", "[red]bold[/]", "é" * 80, "cat", "cat", '"', "never", "9"]
    source = loops.random_targets(50, NUM_CLASSES, seed=1, unknown=0.5)
    source[:, 7] = 0
    machine = np.where(source == 0, 0.75, 0).astype(np.float16)
    images = [tiny_jpeg(i) for i in range(50)]
    split = label_split(source, num_shards=3)._replace(images=images, machine=machine)
    few = label_split(np.zeros((3, NUM_CLASSES), np.int8), num_shards=2)._replace(images=images[:3])
    return write_label_set(folder, {"train": split, "empty": few}, unlisted="unknown", names=names)


def test_the_page_is_whole_loads_nothing_and_shows_names_as_they_are(tmp_path: Path) -> None:
    manifest = hostile_set(tmp_path)
    simulate(manifest.url, name="v", rule="noisy", flip_absent=0.5)
    for view in (None, "v"):
        page = stats_page(stats(manifest.url, view=view))
        reader = Balanced()
        reader.feed(page)
        assert reader.open == []
        assert "script" not in reader.seen
        assert "cat (/m/0004)" in page, "two classes of one name are told apart"
        assert not re.search(r"""(src|href)=|url\(|@import""", page)
        drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
        assert len(drawings) > 8
        for drawing in drawings:
            root = ElementTree.fromstring(drawing)
            assert "NaN" not in drawing
            assert "inf" not in drawing
            width = float(root.attrib["width"])
            for shape in root.iter("{http://www.w3.org/2000/svg}rect"):
                assert -0.1 <= float(shape.attrib["x"]) <= width
                assert float(shape.attrib["width"]) >= 0
                assert float(shape.attrib["height"]) >= 0
    assert "seen through the view v" in page


def test_the_document_is_json_and_says_what_was_counted(tmp_path: Path) -> None:
    manifest = hostile_set(tmp_path)
    found = stats(manifest.url)
    document = json.loads(json.dumps(stats_document(found), allow_nan=False))
    train = document["splits"]["train"]
    assert train["positives"] == found.splits["train"].positives.tolist()
    assert [sum(row) for row in zip(train["positives"], train["negatives"], train["unknown"], strict=True)] == [50] * 9
    assert train["image_sizes"]["width"]["median"] == 16
    assert train["machine"][7] == 50
    best = train["pairs"]["top"][0]
    assert best["both"] == max(found.splits["train"].pairs.both)
    assert document["splits"]["empty"]["pairs"]["top"] == []


def test_the_tables_of_a_terminal_take_brackets_for_what_they_are(tmp_path: Path) -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in stats_tables(stats(hostile_set(tmp_path).url)):
        console.print(table)
    text = console.export_text()
    assert "[red]bold[/]" in text
    assert "empty" in text


def test_the_tables_of_a_terminal_lose_nothing_at_80_columns(tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    found = stats(hostile_set(tmp_path).url)
    for table in stats_tables(found):
        console.print(table)
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("é") >= 80, "a long name is folded, not cut"
    for word in ("present an image", "without any known", "classes never present", "together", "lift"):
        assert word in text
    assert f"{int(found.splits['train'].positives.sum()):,}" in text


@pytest.mark.parametrize("num_classes", [1, 2])
def test_a_set_of_one_or_two_classes_can_be_shown(num_classes: int, tmp_path: Path) -> None:
    source: npt.NDArray[np.int8] = np.ones((4, num_classes), dtype=np.int8)
    manifest = write_label_set(tmp_path, {"train": label_split(source, num_shards=1)}, unlisted="absent")
    found = stats(manifest.url, sample=0)
    assert_counts(found.splits["train"], source)
    assert stats_page(found).count("<svg") >= 4


def test_counts_and_sizes_are_told_in_words() -> None:
    assert [counted(number, "shard") for number in (0, 1, 2000)] == ["0 shards", "1 shard", "2,000 shards"]
    assert counted(3, "class") == "3 classes"
    sizes = [0, 999, 1000, 71_680, 999_949, 999_950, 26_300_000, 999_949_999, 999_950_000, 2_700_000_000_000]
    told = ["0 B", "999 B", "1.0 kB", "71.7 kB", "999.9 kB", "1.0 MB", "26.3 MB", "999.9 MB", "1.0 GB", "2,700.0 GB"]
    assert [size_text(size) for size in sizes] == told
