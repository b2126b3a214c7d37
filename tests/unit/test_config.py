"""Claims about the config: read, merged, overridden, refused with the right name, compared on resume."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_mlpl.cli_options import parse_storage_options
from dist_mlpl.config import (
    Config,
    check_config,
    check_resume,
    compare_configs,
    load_config,
    read_run_config,
    with_absolute_paths,
)
from dist_mlpl.data.stream import DataSettings
from dist_mlpl.documents import parse_yaml
from dist_mlpl.errors import CheckpointError, ConfigError
from dist_mlpl.models.semantic import SemanticSettings
from dist_mlpl.settings import with_locations

pytestmark = pytest.mark.unit

BASE: dict[str, Any] = {
    "num_epochs": 4,
    "global_batch": 32,
    "data": {"manifest": "shards", "num_lanes": 8},
    "transform": {"size": 32, "scale": [0.3, 0.9]},
    "method": {"name": "partial_bce", "backbone": {"name": "resnet_small"}},
}


def written(path: Path, document: dict[str, Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document))
    return str(path)


def with_(**changes: Any) -> Config:
    """BASE with dotted keys (dots written as `__`) replaced."""
    document = yaml.safe_load(yaml.safe_dump(BASE))
    for name, value in changes.items():
        *sections, last = name.split("__")
        place = document
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return check_config(document, where="test")


def refusal(document: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_config(document, where="test.yaml")
    return caught.value


def test_a_config_survives_its_own_yaml(tmp_path: Path) -> None:
    config = load_config(written(tmp_path / "a.yaml", BASE), out="runs/x")
    (tmp_path / "b.yaml").write_text(config.to_yaml())
    again = load_config(str(tmp_path / "b.yaml"))
    assert again == config
    assert again.digest == config.digest
    assert (config.run_folder, config.num_epochs, config.data.num_lanes) == ("runs/x", 4, 8)


def test_equal_settings_have_equal_digests_and_others_do_not() -> None:
    assert with_().digest == with_(seed=0).digest
    assert len({with_().digest, with_(seed=1).digest, with_(transform__size=64).digest}) == 3


def test_extends_merges_maps_deeply_and_replaces_the_rest(tmp_path: Path) -> None:
    written(tmp_path / "base" / "grand.yaml", BASE)
    written(tmp_path / "base" / "parent.yaml", {"extends": "grand.yaml", "num_epochs": 9, "data": {"num_workers": 5}})
    child = {"extends": "../base/parent.yaml", "transform": {"scale": [0.5, 1.0]}, "data": {"num_lanes": 2}}
    config = load_config(written(tmp_path / "child" / "c.yaml", child))
    assert (config.num_epochs, config.global_batch) == (9, 32)
    assert (config.data.manifest, config.data.num_workers, config.data.num_lanes) == ("shards", 5, 2)
    assert config.transform.scale == (0.5, 1.0)
    assert config.transform.size == 32


def test_extends_is_found_beside_the_file_wherever_the_process_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "configs" / "a.yaml", BASE)
    written(tmp_path / "configs" / "b.yaml", {"extends": "a.yaml", "seed": 5})
    written(tmp_path / "c.yaml", {"extends": str(tmp_path / "configs" / "a.yaml"), "seed": 6})
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/b.yaml").seed == 5
    monkeypatch.chdir(tmp_path / "configs")
    assert load_config("b.yaml").seed == 5
    assert load_config("../c.yaml").seed == 6


@pytest.mark.parametrize("parent", ["a.yaml", "../configs/a.yaml"])
def test_configs_that_extend_each_other_are_refused(tmp_path: Path, parent: str) -> None:
    written(tmp_path / "configs" / "b.yaml", {"extends": parent})
    path = written(tmp_path / "configs" / "a.yaml", {"extends": "b.yaml"})
    with pytest.raises(ConfigError, match="extend each other") as caught:
        load_config(path)
    assert "a.yaml" in caught.value.found
    assert "b.yaml" in caught.value.found


def test_a_missing_file_is_named_with_the_one_that_asked_for_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no config at"):
        load_config(str(tmp_path / "nothing.yaml"))
    path = written(tmp_path / "a.yaml", {"extends": "gone.yaml"})
    with pytest.raises(ConfigError, match=r"gone\.yaml") as caught:
        load_config(path)
    assert path in caught.value.where


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\t- x"])
def test_a_file_that_is_no_yaml_is_a_config_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "a.yaml"))
    assert caught.value.expected == "YAML"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "an empty file"), ("# only a comment", "an empty file"), ("- 1\n- 2", "a list"), ("7", "a single value"),
     ("image,label\n1.jpg,bird\n", "text, not settings")],
)  # fmt: skip
def test_a_file_without_keys_is_a_config_error(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "a.yaml"))
    assert (caught.value.found, caught.value.expected) == (found, "keys and values")


def test_a_file_that_is_no_text_is_a_config_error_as_a_config_and_as_a_run_s_own(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"seed: 1\nout: \xff\n")
    with pytest.raises(ConfigError, match="no UTF-8 text, at byte 14 of 15"):
        load_config(str(tmp_path / "config.yaml"))
    with pytest.raises(ConfigError, match="no UTF-8 text"):
        read_run_config(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nnum_epochs: 3\nseed: 2\n", "line 3, column 1: key 'seed' again; line 1 gives it already"),
        ("data: {manifest: a, num_lanes: 1, manifest: b}", "line 1, column 35: key 'manifest' again; line 1"),
    ],
)
def test_a_key_given_twice_is_refused_with_both_lines(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, where="test")
    assert caught.value.found.startswith(says)


def test_keys_that_yaml_merges_in_may_be_given_again() -> None:
    text = "a: {b: &x {k: 1, l: 2}}\nc: {<<: *x, k: 3}\nd: {<<: *x, k: 4}\n"
    assert parse_yaml(text, where="test") == {
        "a": {"b": {"k": 1, "l": 2}}, "c": {"k": 3, "l": 2}, "d": {"k": 4, "l": 2},
    }  # fmt: skip


def test_another_method_than_the_base_s_inherits_what_all_methods_have_and_nothing_else(tmp_path: Path) -> None:
    method = {"name": "partial_bce", "normalization": "masked_mean", "dropout": 0.2,
              "backbone": {"name": "resnet_small", "freeze": ["conv1"]}}  # fmt: skip
    written(tmp_path / "base.yaml", BASE | {"method": method})
    written(tmp_path / "other.yaml", {"extends": "base.yaml", "method": {"name": "csl", "backbone": {"drop": 0.0}}})
    found = load_config(str(tmp_path / "other.yaml")).method
    assert (found.name, found.dropout, found.backbone.freeze) == ("csl", 0.2, ("conv1",))
    same = written(tmp_path / "same.yaml", {"extends": "base.yaml", "method": {"name": "partial_bce", "dropout": 0.1}})
    assert load_config(same).method.model_dump()["normalization"] == "masked_mean"
    again = {"extends": "other.yaml", "method": {"name": "partial_bce"}}
    assert load_config(written(tmp_path / "again.yaml", again)).method.model_dump()["normalization"] == "durand"


def test_another_method_by_an_override_leaves_the_file_s_own_keys_behind_wherever_it_stands(tmp_path: Path) -> None:
    method = {"name": "partial_bce", "normalization": "masked_mean", "dropout": 0.2,
              "backbone": {"name": "resnet_small", "freeze": ["conv1"]}}  # fmt: skip
    path = written(tmp_path / "a.yaml", BASE | {"method": method})
    for overrides in (["method.name=csl", "method.top_k=3"], ["method.top_k=3", "method.name=csl"]):
        found = load_config(path, overrides=overrides).method
        assert found.model_dump()["top_k"] == 3
        assert (found.name, found.dropout, found.backbone.freeze) == ("csl", 0.2, ("conv1",))
    same = load_config(path, overrides=["method.name=partial_bce"]).method
    assert same.model_dump()["normalization"] == "masked_mean"
    with pytest.raises(ConfigError, match="normalization"):
        load_config(path, overrides=["method.name=csl", "method.normalization=durand"])


def test_a_wrong_key_is_blamed_on_the_file_that_holds_it(tmp_path: Path) -> None:
    base = written(tmp_path / "base.yaml", BASE | {"optimizer": {"learning_rat": 1}})
    child = written(tmp_path / "child.yaml", {"extends": "base.yaml", "sed": 1})
    with pytest.raises(ConfigError) as caught:
        load_config(child, overrides=["data.num_lane=3"])
    lines = {line.split(":")[0].strip(): line for line in caught.value.found.splitlines()[1:]}
    assert lines["optimizer.learning_rat"].endswith(f"(from {base})")
    assert lines["data.num_lane"].endswith("(from --set)")
    assert "(from" not in lines["sed"]


@pytest.mark.parametrize("parent", [["base.yaml"], {"a": 1}, 3])
def test_extends_that_is_no_path_is_refused(tmp_path: Path, parent: Any) -> None:
    with pytest.raises(ConfigError, match="`extends` that is no path"):
        load_config(written(tmp_path / "a.yaml", {"extends": parent}))


def test_what_needs_no_data_is_checked_with_the_config() -> None:
    found = refusal({**BASE, "global_batch": 12}).found
    assert "global_batch 12 is no multiple of group_size 8: set global_batch to 16" in found
    found = refusal({**BASE, "method": {"name": "partial_bce", "backbone": {"name": "resnet51"}}}).found
    assert "method.backbone.name: no backbone 'resnet51'; nearest: " in found
    assert "'resnet50'" in found


def test_another_program_s_config_is_no_run(tmp_path: Path) -> None:
    for text in ("model: gpt\nlayers: 3\n", "", "- 1\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=r"a config\.yaml that no run wrote") as caught:
            read_run_config(str(tmp_path))
        assert caught.value.next_step == "choose another folder"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1E5", 1e5), ("-2e+3", -2e3), ("1.5e6", 1.5e6), ("2.0e-3", 2e-3), ("7", 7), ("0.5", 0.5),
        ("true", True), ("null", None), ("[1, 2e1]", [1, 20.0]), ("e5", "e5"), ("3e", "3e"), ("0x1f", 31),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text: str, value: Any) -> None:
    found = parse_yaml(text, where="test")
    assert found == value
    assert type(found) is type(value)


def test_reading_numbers_so_leaves_the_yaml_library_as_it_was() -> None:
    assert yaml.safe_load("3e-4") == "3e-4"


def test_overrides_reach_any_depth_and_come_after_extends(tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", BASE)
    overrides = [
        "optimizer.learning_rate=3e-4",
        "schedule.warmup_samples=1.5e3",
        "method.backbone.drop=0.25",
        "method.alpha=-1",
        "method.beta=2",
        "transform.scale=[0.5, 0.6]",
        "transform.mean=null",
        "transform.std=null",
        "data.storage_options={endpoint_url: 'http://x', anon: true}",
        "data.manifest=s3://bucket/a=b",
        "num_epochs=7",
        "num_epochs=8",
    ]
    config = load_config(path, overrides=overrides)
    assert config.optimizer.learning_rate == 3e-4
    assert config.schedule.warmup_samples == 1500
    assert config.method.backbone.drop == 0.25
    assert config.transform.scale == (0.5, 0.6)
    assert config.transform.mean is None
    assert config.data.storage_options == {"endpoint_url": "http://x", "anon": True}
    assert config.data.manifest == "s3://bucket/a=b"
    assert config.num_epochs == 8


def test_an_override_without_a_value_and_one_of_an_unknown_key_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.yaml", BASE)
    with pytest.raises(ConfigError, match="override 'seed'"):
        load_config(path, overrides=["seed"])
    with pytest.raises(ConfigError, match="num_epochs"):
        load_config(path, overrides=["num_epoch=3"])
    with pytest.raises(ConfigError, match="seed"):
        load_config(path, overrides=["seed.x=3"])


def test_out_is_asked_for_when_it_is_needed() -> None:
    with pytest.raises(ConfigError, match="no run folder") as caught:
        _ = with_().run_folder
    assert "--out" in caught.value.next_step


@pytest.mark.parametrize(
    ("place", "wrong", "nearest"),
    [
        ([], "num_epoch", "num_epochs"),
        (["data"], "num_worker", "num_workers"),
        (["transform"], "colour_jitter", "color_jitter"),
        (["transform", "rand_augment"], "magnitud", "magnitude"),
        (["method"], "normalisation", "normalization"),
        (["method", "backbone"], "weight", "weights"),
        (["optimizer"], "learningrate", "learning_rate"),
        (["engine"], "zerostage", "zero_stage"),
        (["evaluation"], "topk", "top_k"),
        (["cluster"], "num_worker", "num_workers"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_at_every_depth(place: list[str], wrong: str, nearest: str) -> None:
    document: dict[str, Any] = yaml.safe_load(yaml.safe_dump(BASE))
    inner = document
    for section in place:
        inner = inner.setdefault(section, {})
    inner[wrong] = 1
    found = refusal(document).found
    assert found.startswith("1 setting is wrong:")
    assert f" {'.'.join([*place, wrong])}: no such key; " in found, "the key as it stands in the file"
    assert repr(nearest) in found.split("no such key; ")[1]


def test_every_wrong_setting_is_listed_at_once() -> None:
    found = refusal({**BASE, "num_epochs": 0, "sed": 1, "data": {"manifest": "x", "num_lanes": "many"}}).found
    assert found.startswith("3 settings are wrong:")
    assert "num_epochs: " in found
    assert "(found 0)" in found
    assert "'seed'" in found
    assert "data.num_lanes" in found


def test_what_must_be_given_is_named() -> None:
    found = refusal({}).found
    for name in ("num_epochs", "global_batch", "data", "method"):
        assert f"{name}: " in found


def test_an_unknown_method_and_a_missing_one_are_met_with_the_names_there_are() -> None:
    for method in ({"name": "partial_bec"}, {}):
        found = refusal({**BASE, "method": {**method, "backbone": {"name": "resnet_small"}}}).found
        assert "method.name" in found
        assert "'partial_bce'" in found


@pytest.mark.parametrize("hides", [{"transform__cutout": 0.2}, {"transform__rand_augment": {"num_ops": 1}}])
def test_a_method_that_remembers_places_refuses_what_moves_or_hides_them_unrecorded(hides: dict[str, Any]) -> None:
    method = {"name": "spatial_consistency", "backbone": {"name": "resnet_small"}}
    assert with_(method=method).method.needs_places
    with pytest.raises(ConfigError, match="remembers where things are seen"):
        with_(method=method, **hides)
    with_(**hides)


@pytest.mark.parametrize("num_workers", [0, -1, [3, 1], [0, 2], [1, 2, 3]])
def test_a_number_of_workers_that_cannot_be_is_refused(num_workers: Any) -> None:
    assert "num_workers" in str(refusal({**BASE, "cluster": {"num_workers": num_workers}}))


UNINDEXED = {"tars": {"train": "tars/train", "test": "tars/test"}, "classes": "classes.csv", "epoch_samples": 640}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "give one of data.manifest and data.unindexed"),
        ({"manifest": "shards", "unindexed": UNINDEXED}, "give one of data.manifest and data.unindexed"),
        ({"unindexed": UNINDEXED, "known_fraction": 0.1}, "known_fraction and known_rule need tars with an index"),
        ({"unindexed": UNINDEXED, "known_rule": "single_positive"}, "`dist-mlpl shards index`"),
        ({"unindexed": UNINDEXED, "decode_on": "gpu"}, "decode_on gpu needs tars with an index"),
        ({"unindexed": {**UNINDEXED, "epoch_sample": 1}}, "data.unindexed.epoch_sample: no such key; "),
        ({"unindexed": {"tars": {"train": "tars"}}}, "data.unindexed.classes: Field required"),
        ({"unindexed": {**UNINDEXED, "shuffle_buffer": 0}}, "data.unindexed.shuffle_buffer"),
    ],
)
def test_a_run_reads_tars_by_a_manifest_or_as_they_are_and_its_message_tells_no_secret(
    data: dict[str, Any], says: str
) -> None:
    found = refusal({**BASE, "data": {**data, "storage_options": {"secret": "of-the-store"}}}).found
    assert says in found
    assert "of-the-store" not in found


def test_settings_never_change_after_they_are_read() -> None:
    config = with_()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


FREE = {
    "out": "x", "engine__micro_batch": 4, "engine__kind": "plain", "engine__zero_stage": 1, "data__num_workers": 7,
    "data__cache_bytes": 1 << 40, "data__manifest": "s3://elsewhere",
    "data__max_bad_fraction": 0.5, "cluster__num_workers": 5, "cluster__max_failures": 9, "save_every_steps": 3,
    "evaluation__top_k": 5,
}  # fmt: skip
ALLOWED = {
    "global_batch": 64, "num_epochs": 5, "schedule__warmup_samples": 100, "optimizer__learning_rate": 0.5,
    "transform__size": 64, "method__dropout": 0.5, "engine__precision": "bf16",
}  # fmt: skip
REFUSED = {
    "seed": 1, "group_size": 4, "data__num_lanes": 9, "data__window_samples": 7, "data__known_fraction": 0.5,
    "data__known_seed": 3, "data__train_split": "val", "data__held_out_fraction": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("allow_change", [False, True])
def test_free_settings_may_change_on_resume_and_are_told(allow_change: bool) -> None:
    for name, value in FREE.items():
        old, new = with_(), with_(**{name: value})
        assert {kind for *_, kind in compare_configs(old, new)} == {"free"}, name
        (line, *_) = check_resume(old, new, allow_change=allow_change)
        assert line.startswith(name.replace("__", "."))
        assert " -> " in line


def test_tars_without_an_index_may_lie_elsewhere_on_resume_but_their_labels_and_epochs_never_change() -> None:
    def over_tars(**changes: Any) -> Config:
        return with_(data={"unindexed": {**UNINDEXED, **changes}})

    old = over_tars()
    free = over_tars(tars={"train": "s3://bucket/train", "test": "s3://bucket/test"}, classes="s3://bucket/c.csv")
    assert {kind for *_, kind in compare_configs(old, free)} == {"free"}
    assert {kind for *_, kind in compare_configs(old, over_tars(shuffle_buffer=7))} == {"allowed"}
    for new in (over_tars(epoch_samples=64), over_tars(unlisted="unknown"), with_(data={"manifest": "shards"})):
        assert "refused" in {kind for *_, kind in compare_configs(old, new)}


def test_some_settings_change_on_resume_only_when_the_change_is_meant() -> None:
    for name, value in ALLOWED.items():
        old, new = with_(), with_(**{name: value})
        assert {kind for *_, kind in compare_configs(old, new)} == {"allowed"}, name
        with pytest.raises(CheckpointError, match=name.replace("__", r"\.")) as caught:
            check_resume(old, new, allow_change=False)
        assert "--allow-change" in caught.value.next_step
        assert len(check_resume(old, new, allow_change=True)) == 1


def test_what_makes_the_order_and_the_labels_never_changes_within_a_run() -> None:
    for name, value in REFUSED.items():
        old, new = with_(), with_(**{name: value})
        assert {kind for *_, kind in compare_configs(old, new)} == {"refused"}, name
        for allow_change in (False, True):
            with pytest.raises(CheckpointError, match=name.replace("__", r"\.")) as caught:
                check_resume(old, new, allow_change=allow_change)
            assert "--allow-change" not in caught.value.next_step


def test_all_refused_differences_are_listed_and_nothing_differs_from_itself() -> None:
    old, new = with_(), with_(seed=1, data__num_lanes=2, global_batch=64, out="x")
    with pytest.raises(CheckpointError) as caught:
        check_resume(old, new, allow_change=True)
    assert "seed: 0 -> 1" in caught.value.found
    assert "data.num_lanes: 8 -> 2" in caught.value.found
    assert check_resume(old, old, allow_change=False) == []


def test_every_config_that_ships_is_good() -> None:
    paths = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        load_config(str(path))


def test_every_path_of_a_config_is_made_absolute_and_nothing_else() -> None:
    document = {
        "out": "run", "num_epochs": 4, "global_batch": 8, "keep_checkpoints": 1,
        "data": {"manifest": [{"manifest": "one"}, {"manifest": "s3://two"}]},
        "method": {
            "name": "csl", "prior_from": "prior", "prior_threshold": 0.5, "init_from": "begun",
            "backbone": {"name": "resnet_small"},
        },
        "curriculum": {"strategy": "ensemble", "checkpoints": 1, "runs": ["member@4"], "threshold": 1.0},
    }  # fmt: skip
    config = with_locations(check_config(document, where="test"), lambda text: f"<{text}>")
    changed = {
        "method": {"prior_from": "<prior>", "init_from": "<begun>"},
        "curriculum": {"runs": ["<member@4>"]},
    }
    found, before = config.model_dump(mode="json"), check_config(document, where="test").model_dump(mode="json")
    assert [one["manifest"] for one in found["data"]["manifest"]] == ["<one>", "<s3://two>"]
    for section in ("method", "curriculum"):
        assert found[section] == before[section] | changed[section]
    assert found["out"] == "<run>"
    assert str(found).count("<") == 6
    tars = {"tars": {"train": "a/{0..1}.tar"}, "classes": "c.csv", "epoch_samples": 8}
    data = with_locations(DataSettings(unindexed=tars), lambda text: f"<{text}>")
    assert data.unindexed is not None
    assert (data.unindexed.tars, data.unindexed.classes) == ({"train": "<a/{0..1}.tar>"}, "<c.csv>")
    assert data.manifest == ""
    assert with_locations(SemanticSettings(embeddings="e.npy"), str.upper).embeddings == "E.NPY"


@pytest.mark.parametrize(("view", "expected"), [("k10", "k10"), ("./views/k10", "/here/views/k10")])
def test_a_view_by_path_is_made_absolute_for_workers_and_one_by_name_stays(
    view: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = {"out": "run", "num_epochs": 1, "global_batch": 8, "data": {"manifest": "set", "view": view},
                "method": {"name": "partial_bce", "backbone": {"name": "resnet_small"}}}  # fmt: skip
    found = with_absolute_paths(check_config(document, where="test")).data
    assert (found.view, found.manifest) == (expected.replace("/here", str(tmp_path)), f"{tmp_path}/set")


def test_a_path_is_the_same_relative_or_absolute_when_a_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    method = {"name": "partial_bce", "backbone": {"name": "resnet_small"}, "init_from": "main"}
    document = {"out": "run", "num_epochs": 1, "global_batch": 8, "data": {"manifest": "set"}, "method": method}
    config = check_config(document, where="test")
    assert compare_configs(with_absolute_paths(config), config) == []  # Ray's driver writes the first
    elsewhere = check_config(document | {"method": method | {"init_from": "other"}}, where="test")
    assert [change[0] for change in compare_configs(config, elsewhere)] == ["method.init_from"]


@pytest.mark.parametrize("name", ["sst", "blending"])
def test_dropout_where_a_method_has_none_is_refused(name: str) -> None:
    method = {"name": name, "backbone": {"name": "resnet_small"}, "dropout": 0.5}
    document = {"num_epochs": 1, "global_batch": 8, "data": {"manifest": "set"}, "method": method}
    with pytest.raises(ConfigError, match="dropout set"):
        check_config(document, where="test")


@pytest.mark.parametrize(
    ("text", "says"), [("{'key': 'XYZZY'}", "no JSON: Expecting .* at character 2 of 16"), ('["XYZZY"]', "no object")]
)
def test_storage_options_that_are_refused_are_not_printed(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        parse_storage_options(text)
    assert "XYZZY" not in str(refused.value)


@pytest.mark.parametrize("override", ["data.storage_options={secret: XYZZY", "data.storage_options=XYZZY"])
def test_a_wrong_override_of_the_store_does_not_show_its_secrets(override: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE))
    with pytest.raises(ConfigError, match="storage_options") as refused:
        load_config(str(tmp_path / "run.yaml"), overrides=[override])
    assert "XYZZY" not in "".join(traceback.format_exception(refused.value))


def test_a_yaml_error_says_where_and_not_what_the_line_holds(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 0\ndata: {storage_options: {secret: XYZZY}")
    with pytest.raises(ConfigError, match="line 2, column 40: expected") as refused:
        load_config(str(tmp_path / "run.yaml"))
    assert "XYZZY" not in "".join(traceback.format_exception(refused.value))
