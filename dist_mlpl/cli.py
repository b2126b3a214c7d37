"""Owns the command line: one function per command, with no logic of its own.

Commands import what they need when they run, so that threads are set before torch loads, and `--help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from dist_mlpl.cli_labels import add_label_verbs
from dist_mlpl.cli_options import INTERRUPTED, AsJson, StorageOptions, parse_storage_options, print_json
from dist_mlpl.cli_shards import shards_app
from dist_mlpl.environment import installed_version, prepare_environment
from dist_mlpl.errors import MlplError, RunError

app = typer.Typer(
    name="dist-mlpl",
    help="Distributed training for multi-label image classification with partial labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Look at configs.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")
app.add_typer(config_app, name="config")

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML config, a path or URL.")]
RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, a path or URL.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key, say data.known_fraction=0.1.")
]


def main() -> None:
    """Run a command; typed errors become four lines on standard error and an exit code."""
    try:
        app(standalone_mode=True)
    except MlplError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: ", end="")
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        print(f"dist-mlpl {installed_version('dist-mlpl')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigPath,
    out: Annotated[str | None, typer.Option(help="Run folder, a path or URL; the same one resumes.")] = None,
    overrides: Overrides = None,
    local: Annotated[bool, typer.Option("--local", help="Without Ray: this process, or torchrun's ranks.")] = False,
    address: Annotated[str | None, typer.Option(help="Address of a running Ray cluster.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Commit and return after so many steps.")] = None,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change", help="Resume under a changed batch, schedule, length or other setting that may change."
        ),
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Trace a few steps now and then, into RUN/profile; says where time goes.")
    ] = False,
) -> None:
    """Train, or resume from the run folder's newest commit."""
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
        sys.exit(INTERRUPTED)


@app.command()
def evaluate(
    run: RunUrl,
    split: Annotated[str | None, typer.Option(help="Split of the manifest; the run's own by default.")] = None,
    manifest: Annotated[str | None, typer.Option(help="Other shards of the same classes.")] = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate the newest commit of a run."""
    prepare_environment(os.environ, num_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    from dist_mlpl.display import metrics_table
    from dist_mlpl.tools.judge import judge

    metrics = judge(run, split=split, manifest_url=manifest, storage_options=parse_storage_options(storage_options))
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json(metrics)
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

    report = prove(run, manifest_url=manifest, storage_options=parse_storage_options(storage_options))
    if as_json:
        epochs = [proof._asdict() for proof in report.epochs]
        print_json({"is_exact": not report.faults, "epochs": epochs, "faults": report.faults, "step": report.head.step})
    else:
        console = Console()
        for proof in report.epochs:
            commits = f"{proof.commits} {'commit' if proof.commits == 1 else 'commits'}"
            state = f"{proof.num_dropped} left for another epoch" if proof.is_finished else "still running"
            console.print(
                f"epoch {proof.epoch}: {proof.num_planned} positions, {proof.num_distinct} different samples, "
                f"{proof.num_bad} undecodable, {state}, {commits}",
                highlight=False,
            )
        for fault in report.faults:
            console.print(f"[red]{fault}[/]", highlight=False)
        verdict = "NOT exact" if report.faults else "exact: every planned position of every epoch once, in order"
        console.print(f"{verdict} (commit {report.head.step})", highlight=False)
    if report.faults:
        sys.exit(RunError.exit_code)


add_label_verbs(app)


@app.command()
def sweep(
    configs: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG...", help="YAML configs; their file names name the rows of the table."),
    ],
    out: Annotated[str, typer.Option(help="Folder or URL: RUN folders and the table; the same one goes on.")],
    known: Annotated[
        list[str] | None,
        typer.Option(metavar="KNOWN...", help="Known fractions, `single` or `all`; else what each config says."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each, seeds 0, 1, ...: of training and of the view.")] = 1,
    baseline: Annotated[str | None, typer.Option(help="Method that the others are compared with.")] = None,
    split_choices: Annotated[
        bool, typer.Option("--split-choices", help="Judge on a fifth of train, held out; the test split is not read.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side; they share the cores.")] = 1,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Make the missing runs of a sweep, and a table of means and spreads over seeds."""
    from dist_mlpl.display import work_bar
    from dist_mlpl.local import StopRequest
    from dist_mlpl.tools.sweep import is_known_word, plan_sweep
    from dist_mlpl.tools.sweep_page import sweep_tables
    from dist_mlpl.tools.sweep_queue import check_outcome, make_sweep
    from dist_mlpl.tools.sweep_table import rows_json, tabulate

    # In `--known 0.1 0.3`, typer passes 0.3 as a config.
    words = [*(known or []), *(word for word in configs if is_known_word(word))]
    paths = [word for word in configs if not is_known_word(word)]
    runs = plan_sweep(
        paths, out=out, known=words, num_seeds=seeds, overrides=overrides or [], is_choosing=split_choices
    )
    stop = StopRequest("stopping: each run commits; the same command goes on from there")
    stop.listen()
    with work_bar() as bar:
        outcome = make_sweep(
            runs, out=out, num_jobs=jobs, baseline=baseline, is_asked=lambda: stop.is_asked, tell=bar,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    rows = tabulate(outcome.results, baseline=baseline)
    if as_json:
        failed = [failure.run.name for failure in outcome.failures]
        print_json({"rows": rows_json(rows), "failed": failed, "num_left": outcome.num_left})
    else:
        console = Console()
        for table in sweep_tables(rows, baseline=baseline):
            console.print(table)
        page = f"; {out}/index.html" if outcome.results else ""
        console.print(f"{len(outcome.results)} of {len(runs)} runs{page}", highlight=False, soft_wrap=True)
    check_outcome(outcome, out)
    if outcome.num_left:
        sys.exit(INTERRUPTED)


@app.command()
def plan(
    config: ConfigPath,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the run.")] = 1,
    classes: Annotated[int | None, typer.Option(min=1, help="Instead of the data's.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Of the train split, instead of the data's.")] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show the memory, traffic and FLOPs of a run's trunk, heads and banks, without training."""
    prepare_environment(os.environ, num_ranks=1)
    from dist_mlpl.config import load_config
    from dist_mlpl.tools.plan import LARGEST, document, largest_line, make_plan, plan_table

    loaded = load_config(config, overrides=overrides)
    found = make_plan(loaded, num_ranks=ranks, num_classes=classes, num_samples=samples)
    largest = make_plan(loaded, num_ranks=ranks, num_classes=LARGEST, num_samples=samples)
    if as_json:
        print_json(document(found) | {"largest": document(largest)})
        return
    console = Console()
    console.print(plan_table(found))
    console.print(largest_line(largest), highlight=False, soft_wrap=True)


@app.command()
def pictures(
    run: RunUrl,
    sample: Annotated[
        list[int] | None, typer.Option(help="Draw heatmaps of this sample of the split; may repeat.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the heatmaps; the run's evaluation split by default.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Images drawn where --sample names none.")] = 4,
    num_tiles: Annotated[int, typer.Option(min=1, help="Classes, or lenders, an image.")] = 4,
    num_embedded: Annotated[int, typer.Option(min=2, help="Train images among which lenders are looked for.")] = 2048,
    manifest: Annotated[str | None, typer.Option(help="Where the run's shards are now, if they moved.")] = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Draw heatmaps of the model's classes, and labels that similar images could transfer, into RUN/pictures."""
    prepare_environment(os.environ, num_ranks=1)
    from dist_mlpl.tools.pictures import draw_pictures

    urls = draw_pictures(
        run, samples=sample, split=split, num_samples=num_samples, num_tiles=num_tiles, num_embedded=num_embedded,
        manifest_url=manifest, storage_options=parse_storage_options(storage_options),
    )  # fmt: skip
    print_json({"pictures": urls}) if as_json else print("\n".join(urls))


@app.command()
def demo(
    folder: Annotated[str, typer.Option(help="Where images, logs and the embedded bucket's copy go.")] = "runs/demo",
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs; the config's by default.")] = None,
) -> None:
    """Run the whole system on this machine: S3, shards, two Ray workers, a killed worker, recovery, the result."""
    prepare_environment(os.environ, num_ranks=2)
    from dist_mlpl.tools.demo import run_demo

    run_demo(folder, num_epochs=epochs)


@config_app.command("show")
def config_show(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved config, defaults included."""
    from dist_mlpl.config import load_config

    print(load_config(config, overrides=overrides).to_yaml(is_whole=True), end="")


@config_app.command("check")
def config_check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a config by itself and list what is wrong with it; `train` also looks at data, weights and run folder."""
    from dist_mlpl.config import load_config

    digest = load_config(config, overrides=overrides).digest[:16]
    print(f"valid, digest {digest}; not looked at: data, weights and the run folder, which `train` opens")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of configs, for editors."""
    from dist_mlpl.tools.schema import config_schema as schema

    print(json.dumps(schema(), indent=1))


if __name__ == "__main__":
    main()
