"""Owns the commands about beliefs: `relabel`, which makes a round of labels, and `labels`, which inspects rounds."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dist_mlpl.cli_options import INTERRUPTED, AsJson, StorageOptions, parse_storage_options, print_json
from dist_mlpl.environment import prepare_environment

if TYPE_CHECKING:
    from dist_mlpl.tools.label_rounds import Round

labels_app = typer.Typer(help="Look at a run's rounds of labels, and go back.", no_args_is_help=True)

RunUrl = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, a path or URL.")]
ManifestUrl = Annotated[str | None, typer.Option("--manifest", help="Where the run's shards are now, if they moved.")]
RoundNumber = Annotated[int | None, typer.Option("--round", help="A committed round; the newest by default.")]


def add_label_verbs(app: typer.Typer) -> None:
    """Add `relabel` and `labels` to the command line."""
    app.command()(relabel)
    app.add_typer(labels_app, name="labels")


def relabel(
    run: RunUrl,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A key of the curriculum, say strategy=score_fraction."),
    ] = None,
    step: Annotated[int | None, typer.Option(min=0, help="Commit whose model scores; the newest by default.")] = None,
    manifest: ManifestUrl = None,
    local: Annotated[bool, typer.Option("--local", help="Without Ray: this process, or torchrun's ranks.")] = False,
    address: Annotated[str | None, typer.Option(help="Address of a running Ray cluster.")] = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Make the next round of labels from a run's model; a running training switches to it at its next epoch."""
    prepare_environment(os.environ, num_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    from dist_mlpl.display import round_line
    from dist_mlpl.tools.relabel_job import job_config

    config = job_config(run, overrides or [], parse_storage_options(storage_options))
    if local or "LOCAL_RANK" in os.environ:
        from dist_mlpl.local import relabel_here

        made = relabel_here(config, step=step, manifest_url=manifest)
    else:
        from dist_mlpl.cluster import relabel_on_ray

        made = relabel_on_ray(config, step=step, manifest_url=manifest, address=address)
    if made is None:
        sys.exit(INTERRUPTED)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print_json({"round": made.commit.round, "sha256": made.commit.sha256, **made.metrics})
        return
    Console().print(round_line({"round": made.commit.round, **made.metrics}), highlight=False, soft_wrap=True)


@labels_app.command("log")
def labels_log(run: RunUrl, storage_options: StorageOptions = None, as_json: AsJson = False) -> None:
    """List all rounds: how and when each was made, its numbers of labels, and its precision on hidden labels."""
    from dist_mlpl import storage
    from dist_mlpl.tools.label_rounds import rounds_of

    storage.configure_storage(parse_storage_options(storage_options))
    rounds = rounds_of(run)
    if as_json:
        print_json({"rounds": [one._asdict() for one in rounds]})
        return
    console = Console()
    for one in rounds:
        _print_round(console, one)
    if not rounds:
        console.print("no round yet: `dist-mlpl relabel RUN` makes one, a config with `curriculum:` makes them all")


@labels_app.command("show")
def labels_show(
    run: RunUrl,
    number: RoundNumber = None,
    sample: Annotated[
        list[int] | None, typer.Option(help="Draw this sample, its place in the train split; may repeat.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="A .png for the picture; in RUN/pictures by default.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes listed, those with the most beliefs.")] = 20,
    manifest: ManifestUrl = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Show a round's labels by class, or draw samples with their known labels and beliefs."""
    from dist_mlpl import storage
    from dist_mlpl.config import read_run_config
    from dist_mlpl.tools.label_rounds import class_counts, committed, open_split, rounds_of, truth_of

    storage.configure_storage(parse_storage_options(storage_options))
    commit, index = committed(run, number), open_split(run, manifest)
    if sample:
        from dist_mlpl.tools.label_picture import draw_samples

        url = draw_samples(run, read_run_config(run), commit, index, sample, out=out)
        print_json({"picture": url}) if as_json else print(url)
        return
    found = class_counts(run, commit, index)
    columns = ("present", "absent", "proposed")
    truth = truth_of(run, commit, index)
    if as_json:
        document = commit.model_dump(mode="json", exclude={"files"}) | {"metrics": truth}
        by_class = zip(found.class_ids, found.counts.tolist(), strict=True)
        print_json(document | {"classes": {name: dict(zip(columns, row, strict=True)) for name, row in by_class}})
        return
    console = Console()
    one = next(one for one in rounds_of(run) if one.number == commit.round)
    _print_round(console, one._replace(metrics=one.metrics | truth))
    given = [f"{name}={value}" for name, value in (commit.parameters | commit.decided).items() if value is not None]
    console.print("  " + "  ".join(given), highlight=False, markup=False, soft_wrap=True)
    console.print(_class_table(found.names, found.counts, columns, top))


@labels_app.command("diff")
def labels_diff(
    run: RunUrl,
    first: Annotated[int, typer.Argument(help="A committed round.")],
    second: Annotated[int, typer.Argument(help="A later one.")],
    top: Annotated[int, typer.Option(min=1, help="Classes listed, those that changed most.")] = 20,
    manifest: ManifestUrl = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Show how beliefs changed between two rounds: added, removed, flipped."""
    from dist_mlpl import storage
    from dist_mlpl.tools.label_rounds import DIFFERENCES, committed, differences, open_split

    storage.configure_storage(parse_storage_options(storage_options))
    found = differences(run, committed(run, first), committed(run, second), open_split(run, manifest))
    totals = dict(zip(DIFFERENCES, found.counts.sum(axis=0).tolist(), strict=True))
    if as_json:
        by_class = zip(found.class_ids, found.counts.tolist(), strict=True)
        classes = {name: dict(zip(DIFFERENCES, row, strict=True)) for name, row in by_class}
        print_json({**totals, "classes": classes})
        return
    changed = found.counts[:, :-1]
    console = Console()
    console.print("  ".join(f"{name} {count:,}" for name, count in totals.items()), highlight=False, soft_wrap=True)
    console.print(_class_table(found.names, changed, DIFFERENCES[:-1], top))


@labels_app.command("rollback")
def labels_rollback(
    run: RunUrl,
    to: Annotated[
        int | None, typer.Option(min=0, help="Round to restore, 0 for no beliefs; else the one before.")
    ] = None,
    storage_options: StorageOptions = None,
) -> None:
    """Drop an unfinished round, else restore an earlier one as a new round."""
    from dist_mlpl import storage
    from dist_mlpl.tools.label_rounds import roll_back

    storage.configure_storage(parse_storage_options(storage_options))
    print(roll_back(run, to))


def _print_round(console: Console, one: Round) -> None:
    from dist_mlpl.display import round_line

    made = f"{one.strategy} by the model of step {one.step}" if one.restores is None else f"restores {one.restores}"
    moment = "" if one.committed_at is None else f", {one.committed_at}"
    console.print(f"{one.state}: {made}, after round {one.parent}{moment}", highlight=False, soft_wrap=True)
    line = round_line({"round": one.number, **one.metrics}) if one.metrics else f"labels of round {one.number}"
    console.print(f"  {line}", highlight=False, soft_wrap=True)


def _class_table(names: list[str], counts: Any, columns: Sequence[str], top: int) -> Table:
    """A table of (C, k) counts with one row per class, largest sums first, at most `top` rows."""
    table = Table()
    table.add_column("class", overflow="fold")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    order = sorted(range(len(names)), key=lambda place: -int(counts[place].sum()))
    for place in order[:top]:
        table.add_row(names[place], *(f"{count:,}" for count in counts[place].tolist()))
    return table
