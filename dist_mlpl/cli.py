"""Owns the command line: one verb, one function, no logic of its own.

Verbs import what they need when they run: threads are set before torch loads, and `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from dist_mlpl.environment import prepare_environment
from dist_mlpl.errors import ConfigError, MlplError

app = typer.Typer(
    name="dist-mlpl",
    help="Distributed training for multi-label image classification with partial labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
shards_app = typer.Typer(help="Build and check WebDataset shards.", no_args_is_help=True)
config_app = typer.Typer(help="Look at configs.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")
app.add_typer(config_app, name="config")

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML config, a path or URL.")]
RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, a path or URL.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, say data.known_fraction=0.1.")
]
StorageOptions = Annotated[
    str | None, typer.Option("--storage-options", metavar="JSON", help="fsspec keywords; runs write none down.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def main() -> None:
    """Run a verb; typed errors become four lines on standard error and an exit code."""
    try:
        app(standalone_mode=True)
    except MlplError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _parsed(text: str | None) -> dict[str, Any] | None:
    """`--storage-options` as a dict.

    Raises:
        ConfigError: it is no JSON object.
    """
    if text is None:
        return None
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise ConfigError(
            f"--storage-options {text!r}",
            expected="a JSON object",
            where="--storage-options",
            next_step="""write it like '{"endpoint_url": "http://127.0.0.1:9000"}'""",
        )
    return options


def _print_json(document: dict[str, Any]) -> None:
    """One object; undefined numbers are null, for JSON has no NaN."""
    from dist_mlpl.progress import without_nan

    print(json.dumps(without_nan(document)))


@app.command()
def train(
    config: ConfigPath,
    out: Annotated[str | None, typer.Option(help="Run folder, a path or URL; the same one resumes.")] = None,
    overrides: Overrides = None,
    local: Annotated[bool, typer.Option("--local", help="Without Ray: this process, or torchrun's ranks.")] = False,
    address: Annotated[str | None, typer.Option(help="Address of a running Ray cluster.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Commit and return after so many steps.")] = None,
    allow_change: Annotated[
        bool, typer.Option("--allow-change", help="Resume under a changed batch, schedule or length.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps now and then, into RUN/profile; says where time goes.")
    ] = False,
) -> None:
    """Train, or go on where the run folder stands."""
    prepare_environment(os.environ, num_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    from dist_mlpl.config import load_config

    loaded = load_config(config, overrides=overrides, out=out)
    if local or "LOCAL_RANK" in os.environ:
        from dist_mlpl.local import train_here

        is_stopped = train_here(loaded, allow_change=allow_change, max_steps=max_steps, is_profiled=profile)
    else:
        from dist_mlpl.cluster import train_on_ray

        is_stopped = train_on_ray(
            loaded, address=address, allow_change=allow_change, max_steps=max_steps, is_profiled=profile
        )
    if is_stopped:
        sys.exit(130)


@app.command()
def evaluate(
    run: RunUrl,
    split: Annotated[str | None, typer.Option(help="Split of the manifest; the run's own by default.")] = None,
    manifest: Annotated[str | None, typer.Option(help="Other shards of the same classes.")] = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Judge the newest commit of a run."""
    prepare_environment(os.environ, num_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    from dist_mlpl.display import metrics_table
    from dist_mlpl.tools.judge import judge

    metrics = judge(run, split=split, manifest_url=manifest, storage_options=_parsed(storage_options))
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        _print_json(metrics)
        return
    numbers = {name: value for name, value in metrics.items() if name not in ("split", "step")}
    console = Console()
    console.print(f"{run}, step {metrics['step']}, split {metrics['split']}", highlight=False)
    console.print(metrics_table(numbers))


@app.command()
def audit(
    run: RunUrl,
    manifest: Annotated[str | None, typer.Option(help="Where the run's shards are now, if they moved.")] = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Prove from the commits that every planned sample was trained on once."""
    from dist_mlpl.tools.audit import audit as prove

    report = prove(run, manifest_url=manifest, storage_options=_parsed(storage_options))
    if as_json:
        epochs = [proof._asdict() for proof in report.epochs]
        _print_json(
            {"is_exact": not report.faults, "epochs": epochs, "faults": report.faults, "step": report.head.step}
        )
    else:
        console = Console()
        for proof in report.epochs:
            state = f"{proof.num_dropped} left for another epoch" if proof.is_finished else "still running"
            console.print(
                f"epoch {proof.epoch}: {proof.num_planned} positions, {proof.num_distinct} different samples, "
                f"{proof.num_bad} undecodable, {state}, {proof.commits} commits",
                highlight=False,
            )
        for fault in report.faults:
            console.print(f"[red]{fault}[/]", highlight=False)
        verdict = "NOT exact" if report.faults else "exact: every planned position of every epoch once, in order"
        console.print(f"{verdict} (commit {report.head.step})", highlight=False)
    if report.faults:
        sys.exit(4)


@app.command()
def demo(
    folder: Annotated[str, typer.Option(help="Where images, logs and the embedded bucket's copy go.")] = "runs/demo",
    epochs: Annotated[int | None, typer.Option(help="Epochs; the config's by default.")] = None,
) -> None:
    """The whole system on this machine: S3, shards, two Ray workers, a killed worker, recovery, the result."""
    prepare_environment(os.environ, num_ranks=2)
    from dist_mlpl.tools.demo import run_demo

    run_demo(folder, num_epochs=epochs)


@shards_app.command("build")
def shards_build(
    images: Annotated[str, typer.Option(help="Folder or URL that image names are relative to.")],
    labels: Annotated[str, typer.Option(help="CSV: image,labels or image,positives,negatives.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the shards.")],
    source: Annotated[str, typer.Option(help="What the data set is; `table` is CSV files.")] = "table",
    classes: Annotated[str | None, typer.Option(help="CSV whose first column fixes the class order.")] = None,
    splits: Annotated[str | None, typer.Option(help="CSV: image,split; without it all are train.")] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffle.")] = 0,
    target_shard_bytes: Annotated[int, typer.Option(help="Size a shard should have.")] = 256 << 20,
    workers: Annotated[int | None, typer.Option(help="Processes; one for each core by default.")] = None,
    max_bad_fraction: Annotated[float, typer.Option(help="Unreadable images tolerated.")] = 0.0,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode every image, or look at markers.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Pack images and labels into tars, their indexes and one manifest."""
    from dist_mlpl.errors import nearest_names
    from shards.build import build
    from shards.sources.table import read_table

    if source != "table":
        raise ConfigError(
            f"source {source!r}", expected=nearest_names(source, ["table"]), where="--source", next_step="use table"
        )
    with _bar() as on_progress:
        table = read_table(images, labels, classes=classes, splits=splits)
        summary = build(
            table, out, seed=seed, target_shard_bytes=target_shard_bytes, workers=workers,
            max_bad_fraction=max_bad_fraction, decode=decode, on_progress=on_progress,
        )  # fmt: skip
    manifest = summary.manifest
    splits_found = {
        name: {"num_samples": s.num_samples, "num_shards": len(s.shards), "megabytes": round(s.num_bytes / 1e6, 1)}
        for name, s in manifest.splits.items()
    }
    if as_json:
        _print_json(
            {"url": manifest.url, "digest": manifest.digest, "num_classes": manifest.num_classes,
             "splits": splits_found, "skipped": manifest.skipped, "was_complete": summary.was_complete}
        )  # fmt: skip
        return
    console = Console()
    for name, counts in splits_found.items():
        console.print(
            f"{name}: {counts['num_samples']} images, {counts['num_shards']} shards, {counts['megabytes']} MB",
            highlight=False,
        )
    for reason, count in manifest.skipped.items():
        console.print(f"[yellow]left out: {count} {reason} (listed in {manifest.url}/skipped.csv)[/]", highlight=False)
    state = "was complete already" if summary.was_complete else "written"
    console.print(
        f"{manifest.num_classes} classes; {manifest.url} {state}, digest {manifest.digest[:16]}", highlight=False
    )


@shards_app.command("index")
def shards_index(
    tars: Annotated[str, typer.Argument(metavar="URL", help="Folder of tars, or a pattern: 'train-{000..099}.tar'.")],
    out: Annotated[str | None, typer.Option(help="Folder or URL of the indexes; beside the tars by default.")] = None,
    classes: Annotated[str | None, typer.Option(help="CSV whose first column fixes the class order.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of all tars; by default a name up to its last `-`.")] = None,
    split_pattern: Annotated[
        str | None, typer.Option(help="Regular expression of the tars' names; its first group is the split.")
    ] = None,
    unlisted: Annotated[
        str | None, typer.Option(help="absent or unknown; by default unknown if some sample lists negatives.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Threads.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Index tars of other people's where they lie, by their headers."""
    from shards.index import index_tars

    with _bar() as on_progress:
        summary = index_tars(
            tars, out=out, classes=classes, split=split, split_pattern=split_pattern,
            unlisted=unlisted, workers=workers, on_progress=on_progress,
        )  # fmt: skip
    manifest = summary.manifest
    splits = {name: {"num_samples": s.num_samples, "num_tars": len(s.shards)} for name, s in manifest.splits.items()}
    if as_json:
        _print_json(
            {"url": manifest.url, "digest": manifest.digest, "num_classes": manifest.num_classes,
             "unlisted": manifest.unlisted, "splits": splits, "ignored": summary.ignored,
             "num_reused": summary.num_reused, "was_complete": summary.was_complete}
        )  # fmt: skip
        return
    console = Console()
    for name, counts in splits.items():
        console.print(f"{name}: {counts['num_samples']} images, {counts['num_tars']} tars", highlight=False)
    for kind, count in summary.ignored.items():
        console.print(f"[yellow]passed over: {count} of kind '{kind}'[/]", highlight=False)
    state = "was complete already" if summary.was_complete else "written"
    console.print(
        f"{manifest.num_classes} classes, those that a sample does not list are {manifest.unlisted}; "
        f"{manifest.url} {state}, digest {manifest.digest[:16]}",
        highlight=False,
    )


@shards_app.command("verify")
def shards_verify(
    url: Annotated[str, typer.Argument(help="Folder or URL of the shards.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; one for each core by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read everything again and compare it with the manifest."""
    from shards.verify import verify

    with _bar() as on_progress:
        report = verify(url, decode=decode, workers=workers, on_progress=on_progress)
    if as_json:
        _print_json(
            {"is_whole": not report.faults, "faults": [fault._asdict() for fault in report.faults],
             "num_without_digest": report.num_without_digest}
        )  # fmt: skip
    else:
        console = Console()
        for fault in report.faults:
            place = f"{fault.file} {fault.where}".strip()
            console.print(f"[red]{place}: {fault.found}; expected {fault.expected}[/]", highlight=False)
        num_samples = sum(split.num_samples for split in report.manifest.splits.values())
        verdict = (
            f"{len(report.faults)} faults" if report.faults else f"whole: {num_samples} samples as the manifest says"
        )
        console.print(verdict, highlight=False)
        if report.num_without_digest:
            console.print(
                f"[yellow]{report.num_without_digest} tars were indexed where they lie and their digests were never "
                "known: pixels that changed since go unseen[/]",
                highlight=False,
            )
    if report.faults:
        sys.exit(3)


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print a config as it resolves, defaults included."""
    from dist_mlpl.config import load_config

    print(load_config(config, overrides=overrides).to_yaml(is_whole=True), end="")


@config_app.command("check")
def config_check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config and say what is wrong with it."""
    from dist_mlpl.config import load_config

    print(f"valid, digest {load_config(config, overrides=overrides).digest[:16]}")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of configs, for editors."""
    from dist_mlpl.config import Config

    print(json.dumps(Config.model_json_schema(), indent=1))


def _bar() -> Any:
    """A bar on standard error for verbs that report (doing, done, total)."""
    from dist_mlpl.display import work_bar

    return work_bar()


if __name__ == "__main__":
    main()
