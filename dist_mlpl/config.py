"""Owns the config of a run: all settings in one class, checked before any work starts, compared on resume."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from dist_mlpl import storage
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.data.stream import DataSettings
from dist_mlpl.data.transform import TransformSettings
from dist_mlpl.documents import Layer, decoded, merged, parse_yaml, read_layers, set_value, source_of, without_own_keys
from dist_mlpl.engine import EngineSettings
from dist_mlpl.errors import CheckpointError, ConfigError, nearest_names
from dist_mlpl.evaluate import EvaluationSettings
from dist_mlpl.methods.table import METHODS, AnyMethodSettings
from dist_mlpl.models.backbone import backbone_names
from dist_mlpl.optimizer import OptimizerSettings, ScheduleSettings
from dist_mlpl.settings import Location, Settings, with_locations


class ClusterSettings(Settings):
    """The workers of a run on Ray, and the cluster that they run on."""

    num_workers: int | tuple[int, int] = 1  # number of ranks, or [fewest, most] to follow the cluster's size
    use_gpu: bool = False  # a GPU for each rank
    cpus_per_worker: float = Field(1.0, gt=0.0)  # CPUs that Ray sets aside for each rank
    max_failures: int = Field(3, ge=-1)  # how many lost worker groups the run survives; -1: any number
    # address of a running Ray cluster (`auto` on one of its nodes); null: RAY_ADDRESS, else a local one
    address: str | None = None

    @model_validator(mode="after")
    def _check_workers(self) -> ClusterSettings:
        fewest, most = self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)
        if not 1 <= fewest <= most:
            raise ValueError(f"num_workers {self.num_workers}: at least 1, or [fewest, most] in this order")
        return self


class Config(Settings):
    """The config of one run."""

    seed: int = 0  # of weights, order, augmentation and dropout
    out: Location | None = None  # the run folder, a path or URL; `--out` on the command line
    num_epochs: int = Field(gt=0)  # passes over the train split
    global_batch: int = Field(gt=0)  # samples per update, over all ranks
    save_every_steps: int | None = Field(None, gt=0)  # in addition to the save at each epoch's end
    keep_checkpoints: int = Field(3, gt=0)  # newest checkpoints whose model and optimiser are kept; commits all stay
    group_size: int = Field(8, gt=0)  # number of consecutive positions that stay on one rank and may interact
    data: DataSettings  # which images are read, and which of their labels a run may see
    transform: TransformSettings = TransformSettings()  # how images are cropped, augmented and normalised
    method: AnyMethodSettings  # the paper: model, loss and memory, chosen by `name`
    optimizer: OptimizerSettings = OptimizerSettings()  # the update rule
    schedule: ScheduleSettings = ScheduleSettings()  # the learning rate over the run
    engine: EngineSettings = EngineSettings()  # how a step is computed
    curriculum: CurriculumSettings | None = None  # null: no relabelling by the run itself
    evaluation: EvaluationSettings = EvaluationSettings()  # when the model is evaluated, and how
    cluster: ClusterSettings = ClusterSettings()  # the ranks on Ray; without Ray it is left alone

    @model_validator(mode="after")
    def _check_curriculum(self) -> Config:
        if self.curriculum is None:
            return self
        if self.curriculum.start_epoch >= self.num_epochs:
            raise ValueError(
                f"curriculum.start_epoch {self.curriculum.start_epoch} lies beyond the run's last epoch, "
                f"{self.num_epochs - 1}"
            )
        if self.data.unindexed is not None:
            raise ValueError("curriculum: needs tars with an index: run `dist-mlpl shards index`")
        if self.curriculum.strategy == "ensemble" and self.curriculum.checkpoints > self.keep_checkpoints:
            raise ValueError(f"curriculum.checkpoints {self.curriculum.checkpoints} needs as many keep_checkpoints")
        if self.curriculum.strategy == "uncertainty" and self.engine.compile:
            raise ValueError("curriculum.strategy uncertainty does not work with engine.compile, which fixes dropout")
        return self

    @model_validator(mode="after")
    def _check_batch(self) -> Config:
        if self.global_batch % self.group_size:
            nearest = max(1, round(self.global_batch / self.group_size)) * self.group_size
            raise ValueError(
                f"global_batch {self.global_batch} is no multiple of group_size {self.group_size}: "
                f"set global_batch to {nearest}"
            )
        return self

    @model_validator(mode="after")
    def _check_backbone(self) -> Config:
        name = self.method.backbone.name
        if name not in backbone_names():
            raise ValueError(f"method.backbone.name: no backbone {name!r}; {nearest_names(name, backbone_names())}")
        return self

    @model_validator(mode="after")
    def _check_places(self) -> Config:
        if self.method.needs_places and (self.transform.rand_augment is not None or self.transform.cutout):
            raise ValueError(
                f"method {self.method.name} remembers where things are seen: leave out transform.rand_augment and "
                "transform.cutout, which move or hide them unrecorded"
            )
        return self

    @property
    def run_folder(self) -> str:
        """`out`, which must be set.

        Raises:
            ConfigError: it is null.
        """
        if self.out is None:
            raise ConfigError(
                "no run folder",
                expected="a path or URL for checkpoints, metrics and logs",
                where="out",
                next_step="add `--out DIR_OR_URL` or set `out:` in the config",
            )
        return storage.absolute(self.out) if self.out.startswith("file:") else self.out

    @property
    def digest(self) -> str:
        """sha256 of the resolved config as canonical JSON, without `data.storage_options`."""
        return storage.sha256_of_bytes(json.dumps(self._public(), sort_keys=True).encode())

    @property
    def scoring_digest(self) -> str:
        """sha256 of what scores depend on besides the weights: method, transform, decoder and precision."""
        method = self.method.model_dump(mode="json", exclude={"init_from": True, "backbone": {"weights"}})
        transform = self.transform.model_dump(mode="json")
        settings = [method, transform, self.data.decode_on, self.engine.precision]
        return storage.sha256_of_bytes(json.dumps(settings, sort_keys=True).encode())

    def to_yaml(self, *, is_whole: bool = False) -> str:
        """The resolved config as YAML; with `data.storage_options`, which may hold secrets, only if `is_whole`."""
        return yaml.safe_dump(self.model_dump(mode="json") if is_whole else self._public(), sort_keys=False)

    def _public(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"data": {"storage_options"}})


def load_config(path: str, *, overrides: list[str] | None = None, out: str | None = None) -> Config:
    """Read a YAML config, follow its `extends`, apply overrides, and check the result.

    Args:
        path: local path or URL.
        overrides: `section.field=value` strings, with values parsed as YAML. One that names another method leaves the
            file's keys of its own method behind, as `extends` does.
        out: replaces `out` unless None.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (nearest names), a value is out of range.
    """
    layers, changes = read_layers(path), Layer("--set", {})
    values: list[tuple[list[str], Any]] = []
    for override in overrides or []:
        name, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(
                f"override {override!r}",
                expected="section.field=value",
                where="--set",
                next_step="write it like --set optimizer.learning_rate=3e-4",
            )
        values.append((name.split("."), parse_yaml(text, where=f"--set {name}")))
        set_value(changes.document, *values[-1])
    document = without_own_keys(merged(layers), changes.document)
    for place, value in values:  # a map that is set replaces the file's whole
        set_value(document, place, value)
    if out is not None:
        document["out"] = out
    return check_config(document, where=path, layers=[changes, *layers])


def check_config(document: dict[str, Any], *, where: str, layers: Sequence[Layer] = ()) -> Config:
    """Validate a document and turn pydantic's findings into one message.

    Args:
        document: the config as plain dicts.
        where: the file, for messages.
        layers: what the document was merged from, nearest first; a message names the layer that a wrong key is from.

    Raises:
        ConfigError: the message lists every wrong key.
    """
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        lines = [_explain(finding) + _from(finding, layers, where) for finding in error.errors()]
        count = "1 setting is" if len(lines) == 1 else f"{len(lines)} settings are"
        raise ConfigError(
            f"{count} wrong:\n    " + "\n    ".join(lines),
            expected="keys and values as `dist-mlpl config schema` lists them",
            where=where,
            next_step="correct the lines above",
        ) from None  # pydantic's error contains all values, including secrets


def _key(finding: Any) -> list[str]:
    """Path of the key that a finding of pydantic's is about, as it stands in a file."""
    place = [str(part) for part in finding["loc"]]
    return place[:1] + place[2:] if place[:1] == ["method"] and place[1:2] and place[1] in METHODS else place


def _from(finding: Any, layers: Sequence[Layer], where: str) -> str:
    """Where a wrong key comes from, if not from the file that the message names anyway."""
    key = _key(finding)
    source = source_of(layers, key) if key else None
    return "" if source in (None, where) or source == os.path.normpath(where) else f" (from {source})"


def _explain(finding: Any) -> str:
    place = [str(part) for part in finding["loc"]]
    name = ".".join(_key(finding))
    if finding["type"] == "extra_forbidden":
        valid = _fields_at(place[:-1])
        return f"{name}: no such key; {nearest_names(place[-1], valid)}"
    if finding["type"] == "union_tag_invalid":
        context = finding["ctx"]
        valid = [tag.strip().strip("'") for tag in context["expected_tags"].split(",")]
        return f"{name}.name: no method {context['tag']!r}; {nearest_names(context['tag'], valid)}"
    if finding["type"] == "union_tag_not_found":
        return f"{name}.name: missing; {nearest_names('', METHODS)}"
    # Whole sections are not shown: they are long, and `data` may hold secrets.
    is_shown = finding["type"] != "missing" and not isinstance(finding["input"], dict) and not _under(name, _SECRET)
    given = f" (found {finding['input']!r})" if is_shown else ""
    text = f"{finding['msg'].removeprefix('Value error, ')}{given}"
    return f"{name}: {text}" if name else text  # errors about the whole config name its keys themselves


def _fields_at(place: list[str]) -> list[str]:
    """Field names of the settings class at a path; in a tagged union, pydantic's path holds the tag that chooses it."""
    model: type[BaseModel] = Config
    for part in place:
        field = model.model_fields.get(part)
        candidates = [] if field is None else models_in(field.annotation)
        if len(candidates) == 1:
            model = candidates[0]
        elif candidates:
            names = place[place.index(part) + 1 : place.index(part) + 2]
            model = next((c for c in candidates if names == [c.model_fields["name"].default]), candidates[0])
    return list(model.model_fields)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes in a key's type, such as those of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in models_in(part)]


def with_absolute_paths(config: Config) -> Config:
    """Make local paths absolute, since workers start in other folders."""
    config = with_locations(config, storage.absolute)
    backbone = config.method.backbone
    if backbone.weights is not None and "/" in backbone.weights:  # a file, as torchvision's weight names have no slash
        backbone = backbone.model_copy(update={"weights": storage.absolute(backbone.weights)})
    data = config.data
    if data.view is not None and "/" in data.view:  # a folder, as names of the set's own views have no slash
        data = data.model_copy(update={"view": storage.absolute(data.view)})
    method = config.method.model_copy(update={"backbone": backbone})
    return config.model_copy(update={"method": method, "data": data})


# Keys that a resumed run may change freely, and keys that it may never change. All others need --allow-change.
_FREE = ("out", "cluster", "engine.kind", "engine.zero_stage", "engine.micro_batch", "engine.compile", "data.manifest",
         "data.view", "data.unindexed.tars", "data.unindexed.classes", "data.cache_bytes", "data.num_workers",
         "data.max_bad_fraction", "method.bank_folder",
         "save_every_steps", "keep_checkpoints", "evaluation", "curriculum.measure_hidden")  # fmt: skip
_NEVER = ("seed", "group_size", "data.num_lanes", "data.window_samples", "data.known_fraction", "data.known_rule",
          "data.known_seed", "data.held_out_fraction", "data.train_split", "data.unindexed.epoch_samples",
          "data.unindexed.unlisted", "method.name")  # fmt: skip

_SECRET = ("data.storage_options",)  # never saved, so it cannot be compared

Change = Literal["free", "allowed", "refused"]


def compare_configs(old: Config, new: Config) -> list[tuple[str, Any, Any, Change]]:
    """The differences between the config of a run and the one it is resumed under.

    Returns:
        (key, old value, new value, how the change is treated) of each differing key; `allowed` changes need
        --allow-change. Relative paths are resolved from the current folder, since Ray runs store absolute ones.
    """
    before, after = (_flat(with_absolute_paths(config).model_dump(mode="json")) for config in (old, new))
    changes: list[tuple[str, Any, Any, Change]] = []
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name) and not _under(name, _SECRET):
            kind: Change = "free" if _under(name, _FREE) else "refused" if _under(name, _NEVER) else "allowed"
            changes.append((name, before.get(name), after.get(name), kind))
    return changes


def check_resume(old: Config, new: Config, *, allow_change: bool) -> list[str]:
    """Refuse to resume under a config that would silently make it another run.

    The manifest is compared by its digest in the commit, and so are the names of tars without an index and their
    classes; their location may change.

    Returns:
        Lines that say what changed, for the log.

    Raises:
        CheckpointError: the message lists the changes that are refused, or that need --allow-change.
    """
    changes = compare_configs(old, new)
    lines = [f"{name}: {before!r} -> {after!r}" for name, before, after, _ in changes]
    never = [line for line, change in zip(lines, changes, strict=True) if change[3] == "refused"]
    asked = [line for line, change in zip(lines, changes, strict=True) if change[3] == "allowed"]
    if never:
        raise CheckpointError(
            "the config differs from the run's: " + "; ".join(never),
            expected="the same order, labels and method; these can never change within a run",
            where="RUN/config.yaml",
            next_step="put the old values back, or start a new run folder",
        )
    if asked and not allow_change:
        raise CheckpointError(
            "the config differs from the run's: " + "; ".join(asked),
            expected="the same settings, unless the change is meant",
            where="RUN/config.yaml",
            next_step="put the old values back, add --allow-change, or start a new run folder",
        )
    return lines


def run_config_url(run: str) -> str:
    """URL of a run's config."""
    return storage.join(run, "config.yaml")


def read_run_config(run: str) -> Config:
    """Read the config under which a run was last started.

    Raises:
        CheckpointError: no run there, or another program's config.yaml.
        ConfigError: the config is damaged.
    """
    url = run_config_url(run)
    try:
        document = _run_document(run)
    except FileNotFoundError:
        raise CheckpointError(
            "no run folder there",
            expected="config.yaml and commits/",
            where=run,
            next_step="check the path; `dist-mlpl train CONFIG --out RUN` starts a run",
        ) from None
    return check_config(document, where=url)


def check_run_folder(run: str) -> None:
    """Refuse a folder with a config.yaml of another program, which a new run would overwrite.

    Raises:
        CheckpointError: there is one.
        ConfigError: it is not YAML.
    """
    with contextlib.suppress(FileNotFoundError):
        _run_document(run)


def _run_document(run: str) -> dict[str, Any]:
    url = run_config_url(run)
    document = parse_yaml(decoded(storage.read_bytes(url), where=url), where=url)
    required = {name for name, field in Config.model_fields.items() if field.is_required()}
    if not isinstance(document, dict) or not required <= document.keys():
        raise CheckpointError(
            "a config.yaml that no run wrote",
            expected="a run folder, or for a new run a folder without a config.yaml",
            where=run,
            next_step="choose another folder",
        )
    return document


def _flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _under(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)
