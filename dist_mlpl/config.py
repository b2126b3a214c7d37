"""Owns the config of a run: all settings in one class, read from YAML and checked before any work starts."""

from __future__ import annotations

import json
import os
import re
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from dist_mlpl import storage
from dist_mlpl.curriculum.schedule import CurriculumSettings
from dist_mlpl.data.stream import DataSettings
from dist_mlpl.data.transform import TransformSettings
from dist_mlpl.engine import EngineSettings
from dist_mlpl.errors import CheckpointError, ConfigError, nearest_names
from dist_mlpl.evaluate import EvaluationSettings
from dist_mlpl.methods.table import METHODS, AnyMethodSettings
from dist_mlpl.optimizer import OptimizerSettings, ScheduleSettings
from dist_mlpl.settings import Location, Settings, with_locations


class ClusterSettings(Settings):
    """The workers of a run on Ray, and the cluster that they run on."""

    num_workers: int | tuple[int, int] = 1  # number of ranks, or [fewest, most] to follow the cluster's size
    use_gpu: bool = False
    cpus_per_worker: float = Field(1.0, gt=0.0)
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

    seed: int = 0
    out: Location | None = None  # the run folder, a path or URL; `--out` on the command line
    num_epochs: int = Field(gt=0)
    global_batch: int = Field(gt=0)  # samples per update, over all ranks
    save_every_steps: int | None = Field(None, gt=0)  # in addition to the save at each epoch's end
    keep_checkpoints: int = Field(3, gt=0)  # newest checkpoints whose model and optimiser are kept; commits all stay
    group_size: int = Field(8, gt=0)  # number of consecutive positions that stay on one rank and may interact
    data: DataSettings
    transform: TransformSettings = TransformSettings()
    method: AnyMethodSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    engine: EngineSettings = EngineSettings()
    curriculum: CurriculumSettings | None = None  # null: no relabelling by the run itself
    evaluation: EvaluationSettings = EvaluationSettings()
    cluster: ClusterSettings = ClusterSettings()

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
        return self.out

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
        overrides: `section.field=value` strings, with values parsed as YAML.
        out: replaces `out` unless None.

    Raises:
        ConfigError: the file is missing or not YAML, a key is unknown (nearest names), a value is out of range.
    """
    document = _read_document(path if storage.is_remote(path) else os.path.normpath(path), seen=())
    for override in overrides or []:
        name, separator, text = override.partition("=")
        if not separator:
            raise ConfigError(
                f"override {override!r}",
                expected="section.field=value",
                where="--set",
                next_step="write it like --set optimizer.learning_rate=3e-4",
            )
        _set(document, name.split("."), parse_yaml(text, where=f"--set {name}"))
    if out is not None:
        document["out"] = out
    return check_config(document, where=path)


def check_config(document: dict[str, Any], *, where: str) -> Config:
    """Validate a document and turn pydantic's findings into one message.

    Args:
        document: the config as plain dicts.
        where: the file, for messages.

    Raises:
        ConfigError: the message lists every wrong key.
    """
    try:
        return Config.model_validate(document)
    except ValidationError as error:
        lines = [_explain(finding) for finding in error.errors()]
        count = "1 setting is" if len(lines) == 1 else f"{len(lines)} settings are"
        raise ConfigError(
            f"{count} wrong:\n    " + "\n    ".join(lines),
            expected="keys and values as `dist-mlpl config schema` lists them",
            where=where,
            next_step="correct the lines above",
        ) from None  # pydantic's error contains all values, including secrets


def _explain(finding: Any) -> str:
    place = [str(part) for part in finding["loc"]]
    name = ".".join(place[:1] + place[2:] if place[:1] == ["method"] and place[1:2] and place[1] in METHODS else place)
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
        candidates = [] if field is None else _models_in(field.annotation)
        if len(candidates) == 1:
            model = candidates[0]
        elif candidates:
            names = place[place.index(part) + 1 : place.index(part) + 2]
            model = next((c for c in candidates if names == [c.model_fields["name"].default]), candidates[0])
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _read_document(path: str, *, seen: tuple[str, ...]) -> dict[str, Any]:
    if path in seen:
        raise ConfigError(
            "configs that extend each other: " + " -> ".join([*seen, path]),
            expected="a chain of `extends` with an end",
            where="extends",
            next_step="remove one of them",
        )
    try:
        text = storage.read_bytes(path).decode()
    except FileNotFoundError:
        raise ConfigError(
            f"no config at {path!r}",
            expected="a YAML file",
            where=f"extends of {seen[-1]}" if seen else "CONFIG",
            next_step="check the path; configs/ holds examples",
        ) from None
    document = parse_yaml(text, where=path)
    if not isinstance(document, dict):
        raise ConfigError(
            f"a {type(document).__name__}", expected="keys and values", where=path, next_step="see configs/ucm.yaml"
        )
    parent = document.pop("extends", None)
    if parent is None:
        return document
    folder = path.rsplit("/", 1)[0] if "/" in path else "."
    base = parent if storage.is_remote(parent) or parent.startswith("/") else storage.join(folder, parent)
    if not storage.is_remote(base):
        base = os.path.normpath(base)  # one name per file, else a cycle through `..` would go unnoticed
    return _merged(_read_document(base, seen=(*seen, path)), document)


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:  # its text repeats the line, which may hold secrets
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(
            f"{place}{problem or 'text that cannot be read'}", expected="YAML", where=where,
            next_step="correct the file, or the option",
        ) from None  # fmt: skip


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 3e-4 and 1.5e6 as numbers; YAML 1.1 takes them as strings (no dot, no sign)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two documents: dicts deeply, everything else replaced by `over`."""
    merged = dict(base)
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            merged[name] = _merged(merged[name], value)
        else:
            merged[name] = value
    return merged


def _set(document: dict[str, Any], place: list[str], value: Any) -> None:
    for part in place[:-1]:
        inner = document.get(part)
        if not isinstance(inner, dict):
            inner = document[part] = {}
        document = inner
    document[place[-1]] = value


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
        CheckpointError: no run there.
        ConfigError: the config is damaged.
    """
    url = run_config_url(run)
    try:
        return check_config(parse_yaml(storage.read_bytes(url).decode(), where=url), where=url)
    except FileNotFoundError:
        raise CheckpointError(
            "no run folder there",
            expected="config.yaml and commits/",
            where=run,
            next_step="check the path; `dist-mlpl train CONFIG --out RUN` starts a run",
        ) from None


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
