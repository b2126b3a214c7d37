"""Views on disk equal the rules' loops and the views in memory, whatever was interrupted, replaced or lost."""

from __future__ import annotations

import contextlib
import shutil
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from dist_mlpl.data import entries, stored_view, view_files
from dist_mlpl.data.entries import Entries
from dist_mlpl.data.label_store import LabelStore
from dist_mlpl.data.manifest import Manifest, load_manifest
from dist_mlpl.data.split_index import SplitIndex
from dist_mlpl.data.stored_view import StoredView
from dist_mlpl.data.view_files import ViewFile, encode_view_file, load_view, view_url
from dist_mlpl.data.views import View
from dist_mlpl.errors import ConfigError, ManifestError, ShardError, StorageError
from dist_mlpl.labels import Unlisted
from shards import simulate as simulating
from shards.simulate import simulate
from shards.view_rules import RULES, make_recipe
from tests.support import keyed_views as keyed
from tests.support import views as loops
from tests.support.label_sets import LabelSplit, label_split, write_label_set

pytestmark = pytest.mark.integration

Targets = npt.NDArray[np.int8]

ARGUMENTS: dict[str, dict[str, Any]] = {
    "bernoulli": {"fraction": 0.4},
    "dense_subset": {"fraction": 0.4},
    "exact_count": {"fraction": 0.4},
    "keyed_bernoulli": {"fraction": 0.4},
    "keyed_exact_count": {"fraction": 0.4},
    "noisy": {"flip_present": 0.3, "flip_absent": 0.1},
    "single_positive": {},
    "web": {},
}
PAPERS = ["bernoulli", "dense_subset", "exact_count", "single_positive"]


def oracle(rule: str, split: LabelSplit, seed: int) -> Targets:
    """What is seen of the source's labels, in source order."""
    source, rows = split.source, [row * 3 + 5 for row in range(len(split.source))]
    return {
        "bernoulli": lambda: loops.bernoulli(source, 0.4, seed),
        "dense_subset": lambda: loops.dense_subset(source, 0.4, seed),
        "exact_count": lambda: loops.exact_count(source, 40, seed),
        "keyed_bernoulli": lambda: keyed.keyed_bernoulli(source, rows, 0.4, seed),
        "keyed_exact_count": lambda: keyed.keyed_exact_count(source, rows, 40, seed),
        "noisy": lambda: keyed.noisy(source, rows, 0.3, 0.1, seed),
        "single_positive": lambda: loops.single_positive(source, seed),
        "web": lambda: keyed.web(source, rows, seed),
    }[rule]()


def make_set(
    folder: Path, *, unlisted: Unlisted = "unknown", num_samples: int = 120, num_classes: int = 13, seed: int = 1
) -> tuple[Manifest, LabelSplit]:
    """Random labels in seven shards, among them samples without any label and without positives; a test split too."""
    unknown = 0.0 if unlisted == "absent" else 0.6
    source = loops.random_targets(num_samples, num_classes, seed=seed, unknown=unknown, present=0.2)
    source[5] = -1
    if unlisted == "unknown":
        source[17] = 0
    train, test = label_split(source, num_shards=7, seed=seed), label_split(source[:20], num_shards=2)
    return write_label_set(folder, {"train": train, "test": test}, unlisted=unlisted), train


def seen_through(view: StoredView, index: SplitIndex) -> Targets:
    """All labels of the split through the view, in manifest order."""
    every = np.arange(index.num_samples)
    return view.apply(index.targets(every), every)


@pytest.mark.parametrize("unlisted", ["unknown", "absent"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_equals_its_loop_whatever_the_blocks(
    rule: str, unlisted: Unlisted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, split = make_set(tmp_path / "set", unlisted=unlisted)
    kept = oracle(rule, split, seed=3)[split.order]
    digest = keyed.digest(split.packed, kept, split.sizes, replaces=RULES[rule].replaces)
    for block in (1, 50, 1 << 20):
        monkeypatch.setattr(entries, "_BLOCK_ENTRIES", block)
        summary = simulate(manifest.url, name=f"blocks-{block}", rule=rule, seed=3, **ARGUMENTS[rule])
        assert summary.view.digest == digest
    index = SplitIndex(manifest, "train")
    view = StoredView(summary.view.url, index)
    np.testing.assert_array_equal(seen_through(view, index), kept)
    full = split.packed
    np.testing.assert_array_equal(view.hidden(np.arange(index.num_samples)), (full != 0) & (kept == 0))
    assert summary.view.num_known == np.count_nonzero(full)
    assert summary.view.num_hidden == np.count_nonzero((full != 0) & (kept == 0))
    assert summary.view.num_replaced == np.count_nonzero((full != kept) & (kept != 0))
    assert ((kept == 0) | (full != 0)).all(), "what is unknown stays unknown"


@pytest.mark.parametrize("unlisted", ["unknown", "absent"])
@pytest.mark.parametrize("rule", PAPERS)
def test_the_digest_is_that_of_the_view_in_memory_seed_and_all(rule: str, unlisted: Unlisted, tmp_path: Path) -> None:
    manifest, _ = make_set(tmp_path, unlisted=unlisted)
    index = SplitIndex(manifest, "train")
    fraction = ARGUMENTS[rule].get("fraction")
    memory = View(
        rule, fraction, None, shard_sizes=index.shard_sizes, source_rows=index.source_rows(),
        targets_of=index.targets_between, num_classes=manifest.num_classes,
    )  # fmt: skip
    stored = StoredView(simulate(manifest.url, name="v", rule=rule, fraction=fraction).view.url, index)
    assert stored.digest == memory.digest
    assert stored.document.num_hidden == memory.num_hidden
    some = np.array([7, 119, 7, 0, 64])
    labels = index.targets(some)
    np.testing.assert_array_equal(stored.apply(labels, some), memory.apply(labels, some))
    np.testing.assert_array_equal(stored.hidden(some), memory.hidden(some))
    np.testing.assert_array_equal(labels, index.targets(some), err_msg="the input was changed")


def test_single_entries_of_a_view_in_memory_are_those_of_its_rows() -> None:
    source = loops.random_targets(50, 21, seed=4)
    view = View(
        "bernoulli", 0.5, None, shard_sizes=[50], source_rows=np.arange(50, dtype=np.uint64),
        targets_of=lambda start, stop: source[start:stop], num_classes=21,
    )  # fmt: skip
    rows, columns = np.divmod(np.arange(50 * 21), 21)
    np.testing.assert_array_equal(
        view.hidden_entries(rows, columns.astype(np.uint16)).reshape(50, 21), view.hidden(np.arange(50))
    )


def test_a_run_sees_the_view_through_the_label_store(tmp_path: Path) -> None:
    manifest, split = make_set(tmp_path)
    index = SplitIndex(manifest, "train")
    view = StoredView(simulate(manifest.url, name="v", rule="web", seed=3).view.url, index)
    store = LabelStore(index, view)
    assert store.view_digest == view.digest
    some = np.array([3, 99, 50])
    np.testing.assert_array_equal(store.at(0).targets(some), oracle("web", split, 3)[split.order][some])


@pytest.mark.parametrize("rule", ["keyed_bernoulli", "keyed_exact_count"])
def test_smaller_fractions_of_the_keyed_rules_are_nested_in_larger_ones(rule: str, tmp_path: Path) -> None:
    manifest, _ = make_set(tmp_path)
    index = SplitIndex(manifest, "train")
    known = [
        seen_through(StoredView(simulate(manifest.url, name=f"r{percent}", rule=rule, fraction=percent / 100).view.url,
                                index), index) != 0
        for percent in range(10, 101, 30)
    ]  # fmt: skip
    for smaller, larger in pairwise(known):
        assert not (smaller & ~larger).any()
        assert larger.sum() > smaller.sum()
    assert (known[-1] == (index.targets_between(0, index.num_samples) != 0)).all()


def test_a_keyed_draw_changes_neither_with_the_packing_nor_with_what_else_is_in_the_set(tmp_path: Path) -> None:
    source = loops.random_targets(60, 9, seed=2)
    seen = []
    for number, part in enumerate((source, source[:35])):
        split = label_split(part, num_shards=3 + number, seed=number)
        manifest = write_label_set(tmp_path / str(number), {"train": split}, unlisted="unknown")
        index = SplitIndex(manifest, "train")
        through = seen_through(StoredView(
            simulate(manifest.url, name="v", rule="keyed_bernoulli", fraction=0.5).view.url, index), index
        )  # fmt: skip
        in_order = np.empty_like(through)
        in_order[split.order] = through
        seen.append(in_order[:35])
    np.testing.assert_array_equal(seen[0], seen[1])


def test_the_kept_share_is_the_fraction_and_the_flipped_shares_the_probabilities(tmp_path: Path) -> None:
    manifest, split = make_set(tmp_path, unlisted="absent", num_samples=2000, num_classes=40)
    kept = simulate(manifest.url, name="kept", rule="keyed_bernoulli", fraction=0.1).view
    spread = 4 * np.sqrt(80_000 * 0.1 * 0.9)
    assert abs(kept.num_known - kept.num_hidden - 8000) < spread
    index = SplitIndex(manifest, "train")
    noisy = StoredView(simulate(manifest.url, name="n", rule="noisy", flip_absent=0.1).view.url, index)
    through, full = seen_through(noisy, index), split.packed
    assert (through[full == 1] == 1).all()
    assert abs(np.count_nonzero(through != full) - 0.1 * np.count_nonzero(full == -1)) < spread


# Interrupted, repeated, lost


def test_an_interrupted_drawing_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = make_set(tmp_path / "set")
    whole = simulate(manifest.url, name="v", rule="keyed_bernoulli", fraction=0.3).view
    expected = {path.name: path.read_bytes() for path in Path(whole.url).iterdir()}
    shutil.rmtree(whole.url)
    write, written, lock = simulating.storage.write_bytes, [], threading.Lock()

    def fail_after_three(url: str, content: bytes) -> None:
        with lock:
            if len(written) == 3:
                raise StorageError("no room", expected="some", where=url, next_step="make some")
            written.append(url)
        write(url, content)

    with monkeypatch.context() as patch:
        patch.setattr(simulating.storage, "write_bytes", fail_after_three)
        with pytest.raises(StorageError, match="no room"):
            simulate(manifest.url, name="v", rule="keyed_bernoulli", fraction=0.3)
    with pytest.raises(ManifestError, match="interrupted"):
        load_view(whole.url)
    again = simulate(manifest.url, name="v", rule="keyed_bernoulli", fraction=0.3)
    assert (again.num_reused, again.was_complete) == (3, False)
    assert {path.name: path.read_bytes() for path in Path(whole.url).iterdir()} == expected
    once_more = simulate(manifest.url, name="v", rule="keyed_bernoulli", fraction=0.3)
    assert (once_more.num_reused, once_more.was_complete) == (7, True)
    assert once_more.view == again.view


@pytest.mark.parametrize("rule", ["bernoulli", "web"])
def test_files_of_another_rule_seed_or_damage_are_drawn_again(rule: str, tmp_path: Path) -> None:
    manifest, split = make_set(tmp_path)
    other = simulate(manifest.url, name="v", rule=rule, seed=8, **ARGUMENTS[rule]).view
    Path(other.url, "view.json").unlink()
    one = Path(other.url, other.shards[2].file)
    one.write_bytes(one.read_bytes()[:-30])
    summary = simulate(manifest.url, name="v", rule=rule, seed=3, **ARGUMENTS[rule])
    assert summary.num_reused == 0
    index = SplitIndex(manifest, "train")
    kept = oracle(rule, split, 3)[split.order]
    np.testing.assert_array_equal(seen_through(StoredView(summary.view.url, index), index), kept)


def test_a_lost_or_damaged_file_is_refused_when_read_and_healed_by_drawing_again(tmp_path: Path) -> None:
    manifest, _ = make_set(tmp_path)
    view = simulate(manifest.url, name="v", rule="bernoulli", fraction=0.5).view
    index, file = SplitIndex(manifest, "train"), Path(view.url, view.shards[1].file)
    sample = index.starts[1:2]
    content = file.read_bytes()
    for damaged in (None, content[: len(content) // 2], b"", Path(view.url, view.shards[0].file).read_bytes()):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        with pytest.raises(ShardError) as caught:
            StoredView(view.url, index).apply(index.targets(sample), sample)
        assert file.name in str(caught.value)
        healed = simulate(manifest.url, name="v", rule="bernoulli", fraction=0.5)
        assert (healed.num_reused, healed.view.digest) == (6, view.digest)
        assert file.read_bytes() == content


def test_another_view_of_that_name_is_refused_and_left_alone(tmp_path: Path) -> None:
    manifest, _ = make_set(tmp_path)
    view = simulate(manifest.url, name="v", rule="keyed_bernoulli", fraction=0.5).view
    content = Path(view.url, "view.json").read_bytes()
    for other in ({"rule": "keyed_bernoulli", "fraction": 0.4}, {"rule": "web"},
                  {"rule": "keyed_bernoulli", "fraction": 0.5, "seed": 1},
                  {"rule": "keyed_bernoulli", "fraction": 0.5, "split": "test"}):  # fmt: skip
        with pytest.raises(ManifestError, match="another view"):
            simulate(manifest.url, name="v", **other)
    assert Path(view.url, "view.json").read_bytes() == content


def test_two_drawings_at_once_under_one_name_leave_one_view_or_an_error_never_a_mixture(tmp_path: Path) -> None:
    manifest, split = make_set(tmp_path)

    def draw(seed: int) -> object:
        try:
            return simulate(manifest.url, name="v", rule="web", seed=seed)
        except ManifestError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(draw, (1, 2)))
    index = SplitIndex(manifest, "train")
    view = StoredView(view_url(manifest.url, "v"), index)
    with contextlib.suppress(ShardError):  # files of both: their digests are not those that view.json lists
        seen = seen_through(view, index)
        np.testing.assert_array_equal(seen, oracle("web", split, view.document.seed)[split.order])


def test_a_view_may_lie_elsewhere_and_in_a_bucket(tmp_path: Path, s3_bucket: str) -> None:
    manifest, _ = make_set(tmp_path / "set")
    index = SplitIndex(manifest, "train")
    digests = set()
    for place in ("here", str(tmp_path / "elsewhere"), f"{s3_bucket}/views/v"):
        view = simulate(manifest.url, name=place, rule="keyed_bernoulli", fraction=0.5).view
        digests.add(StoredView(view_url(manifest.url, place), index).digest)
        seen_through(StoredView(view.url, index), index)
    assert len(digests) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "set"]


def test_a_view_of_another_split_or_other_shards_is_refused(tmp_path: Path) -> None:
    manifest, _ = make_set(tmp_path / "one")
    other, _ = make_set(tmp_path / "two", seed=2)
    view = simulate(manifest.url, name="v", rule="web").view
    with pytest.raises(ManifestError, match="split 'train'"):
        StoredView(view.url, SplitIndex(manifest, "test"))
    with pytest.raises(ManifestError, match="of the manifest"):
        StoredView(view.url, SplitIndex(other, "train"))
    with pytest.raises(ManifestError, match="no view"):
        StoredView(view_url(manifest.url, "w"), SplitIndex(manifest, "train"))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda text: text[:-20], "not JSON"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "format"),
        (lambda text: text.replace('"seed": 0', '"seed": 0, "colour": "red"'), "colour"),
        (lambda text: text.replace('"digest": "', '"digest": "00', 1), "digest 00"),
    ],
)
def test_a_damaged_view_json_says_what_is_wrong(change: Any, found: str, tmp_path: Path) -> None:
    manifest, _ = make_set(tmp_path)
    file = Path(simulate(manifest.url, name="v", rule="web").view.url, "view.json")
    file.write_text(change(file.read_text()))
    with pytest.raises(ManifestError, match=found):
        load_view(str(file.parent))


def test_entries_out_of_order_range_or_code_are_refused() -> None:
    def entries_of(rows: list[int], classes: list[int], values: list[int]) -> Entries:
        return Entries(np.array(rows, np.int32), np.array(classes, np.uint16), np.array(values, np.int8))

    def decode(changes: Entries) -> ViewFile:
        content = encode_view_file(ViewFile(changes, True, 9, "x"))
        return view_files.decode_view_file(content, num_samples=3, num_classes=4, where="v.arrow")

    good = entries_of([0, 0, 2], [1, 3, 0], [0, 1, -1])
    assert decode(good).digest == ViewFile(good, True, 9, "x").digest
    for bad, found in (
        (entries_of([0, 0], [3, 1], [0, 0]), "rise"),
        (entries_of([1, 1], [3, 3], [0, 0]), "rise"),
        (entries_of([0, 3], [1, 1], [0, 0]), "outside"),
        (entries_of([-1, 2], [1, 1], [0, 0]), "outside"),
        (entries_of([0, 2], [1, 4], [0, 0]), "outside"),
        (entries_of([0, 2], [1, 3], [0, 2]), "no label"),
    ):
        with pytest.raises(ShardError, match=found):
            decode(bad)
    table = pa.table({"row": pa.array([0], pa.int64()), "class": pa.array([0], pa.uint16())})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ShardError, match="columns"):
        view_files.decode_view_file(sink.getvalue().to_pybytes(), num_samples=3, num_classes=4, where="v.arrow")


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"rule": "bernouli", "fraction": 0.5}, "'bernoulli'"),
        ({"rule": "bernoulli"}, "fraction None"),
        ({"rule": "bernoulli", "fraction": 0.0}, "fraction 0.0"),
        ({"rule": "keyed_bernoulli", "fraction": 1.5}, "fraction 1.5"),
        ({"rule": "web", "fraction": 0.5}, "fraction 0.5"),
        ({"rule": "noisy"}, "no probability"),
        ({"rule": "noisy", "flip_present": 1.5}, r"\[0, 1\]"),
        ({"rule": "web", "flip_absent": 0.5}, "rule noisy takes it"),
        ({"rule": "bernoulli", "fraction": 0.5, "seed": -1}, "seed -1"),
    ],
)
def test_what_a_rule_cannot_take_is_refused(arguments: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        make_recipe(**arguments)


def test_names_and_splits_that_cannot_be_are_refused(tmp_path: Path) -> None:
    manifest, _ = make_set(tmp_path)
    with pytest.raises(ConfigError, match="a name of letters"):
        simulate(manifest.url, name="my view", rule="web")
    with pytest.raises(ConfigError, match="a name of letters"):
        simulate(manifest.url, name="..", rule="web")
    with pytest.raises(ManifestError, match="'train'"):
        simulate(manifest.url, name="v", rule="web", split="trian")


def test_a_set_too_large_for_a_papers_stream_is_sent_to_the_keyed_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = make_set(tmp_path)
    monkeypatch.setattr("shards.view_rules.MAX_ENTRIES", 1000)
    for rule in ("bernoulli", "exact_count"):
        with pytest.raises(ConfigError, match=f"take rule keyed_{rule}"):
            simulate(manifest.url, name="v", rule=rule, fraction=0.5)
    for rule in sorted(set(RULES) - {"bernoulli", "exact_count"}):
        simulate(manifest.url, name=rule, rule=rule, **ARGUMENTS[rule])


# Memory


def sparse_set(folder: Path, *, num_shards: int, num_classes: int) -> Manifest:
    """150 samples a shard, about 8 known labels each."""
    generator = np.random.default_rng(0)
    source = np.zeros((150 * num_shards, num_classes), dtype=np.int8)
    rows = np.repeat(np.arange(len(source)), 8)
    source[rows, generator.integers(0, num_classes, len(rows))] = generator.choice([-1, 1], len(rows))
    split = LabelSplit(source, generator.permutation(len(source)), [150] * num_shards)
    return write_label_set(folder, {"train": split}, unlisted="unknown")


def peak_bytes(action: Any) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_drawing_by_key_holds_a_few_shards_labels_however_many_classes_or_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_mlpl.data.split_index.KEPT_INDEXES", 8)
    few = sparse_set(tmp_path / "few", num_shards=30, num_classes=9605)
    many = sparse_set(tmp_path / "many", num_shards=90, num_classes=9605)

    def draw(manifest: Manifest) -> int:
        return peak_bytes(lambda: simulate(manifest.url, name="v", rule="keyed_bernoulli", fraction=0.1))

    draw(few)  # what is imported and compiled once
    shutil.rmtree(view_url(few.url, "v"))
    listed = peak_bytes(lambda: load_manifest(many.url))  # 9,605 classes by id and name
    small, large = draw(few), draw(many)
    assert large < listed + (2 << 20), "dense labels of this set are 130 MB, its bits 16 MB"
    assert large < small + 60 * 4000, "a shard more costs its entries in view.json and manifest"


def test_a_view_read_shard_by_shard_keeps_no_more_than_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = sparse_set(tmp_path, num_shards=40, num_classes=500)
    index = SplitIndex(manifest, "train")
    url = simulate(manifest.url, name="v", rule="keyed_bernoulli", fraction=0.1).view.url
    expected = StoredView(url, index).hidden(np.arange(index.num_samples))
    monkeypatch.setattr(stored_view, "KEPT_BYTES", 20_000)
    view = StoredView(url, index)
    shown, every = [], np.arange(index.num_samples)
    for start in range(0, index.num_samples, 100):
        shown.append(view.hidden(every[start : start + 100]))
        assert 0 < view.kept_bytes <= 20_000
    np.testing.assert_array_equal(np.concatenate(shown), expected)


def test_many_threads_read_one_view_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = sparse_set(tmp_path, num_shards=20, num_classes=100)
    index = SplitIndex(load_manifest(manifest.url), "train")
    url = simulate(manifest.url, name="v", rule="keyed_bernoulli", fraction=0.5).view.url
    every = np.arange(index.num_samples)
    expected = StoredView(url, index).hidden(every)
    monkeypatch.setattr(stored_view, "KEPT_BYTES", 10_000)
    view = StoredView(url, index)
    orders = [np.random.default_rng(seed).permutation(every)[:100] for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for order, found in zip(orders, pool.map(view.hidden, orders), strict=True):
            np.testing.assert_array_equal(found, expected[order])
