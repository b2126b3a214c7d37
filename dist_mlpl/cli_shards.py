"""Owns the commands of `dist-mlpl shards`: one function per command, with no logic of its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from dist_mlpl.cli_options import AsJson, StorageOptions, parse_storage_options, print_json
from dist_mlpl.errors import ConfigError

if TYPE_CHECKING:
    from dist_mlpl.data.manifest import Manifest
    from shards.processes import Mapper
    from shards.sources.base import Source

shards_app = typer.Typer(help="Build, check and look at WebDataset shards.", no_args_is_help=True)

ShardsUrl = Annotated[str, typer.Argument(metavar="URL", help="Folder or URL of the shards.")]
SourceName = Annotated[str, typer.Option("--source", help="Kind of the data set; `shards sources` lists them.")]
Images = Annotated[str | None, typer.Option(help="Folder or URL that image names are relative to.")]
Labels = Annotated[str | None, typer.Option(help="Short for --option labels=FILE.")]
Classes = Annotated[str | None, typer.Option(help="Short for --option classes=FILE.")]
Splits = Annotated[str | None, typer.Option(help="Short for --option splits=FILE.")]
SourceOptions = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Of the source; as often as needed.")
]
Mapping = Annotated[str | None, typer.Option(help="CSV id,new_id[,new_name]: leave out, rename, merge classes.")]
Order = Annotated[str | None, typer.Option(help="File with a class a line: the columns in order.")]
Others = Annotated[str, typer.Option(help="Classes that --mapping lacks: refuse, drop or keep.")]
Workers = Annotated[int | None, typer.Option(help="Processes of this machine; one for each core by default.")]
RayAddress = Annotated[str | None, typer.Option(help="Work as tasks of the Ray cluster there, instead of --workers.")]
MaxBadFraction = Annotated[float, typer.Option(help="Images that may be left out because they are unfit.")]


@shards_app.command("sources")
def shards_sources(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One of them, with its options.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the kinds of data sets that can be packed, and their options."""
    from shards.sources.options import list_options
    from shards.sources.registry import SOURCES, find_source

    kinds = SOURCES if name is None else {name: find_source(name)}
    options = {kind: list_options(found.settings) for kind, found in kinds.items()}
    if as_json:
        listed = {kind: [option._asdict() for option in options[kind]] for kind in kinds}
        print_json({kind: {"summary": found.summary, "options": listed[kind]} for kind, found in kinds.items()})
        return
    console = Console()
    for kind, found in kinds.items():
        console.print(f"[bold]{kind}[/]  {found.summary}", highlight=False)
        for option in options[kind]:
            state = "needed" if option.default is None else f"default {option.default!r}" if option.default else ""
            text = f"  {option.key}={option.values}  {option.about}{f' ({state})' if state else ''}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)


@shards_app.command("build")
def shards_build(
    out: Annotated[str, typer.Option(help="Folder or URL of the shards.")],
    source: SourceName = "table",
    images: Images = None,
    labels: Labels = None,
    classes: Classes = None,
    splits: Splits = None,
    options: SourceOptions = None,
    mapping: Mapping = None,
    order: Order = None,
    others: Others = "refuse",
    seed: Annotated[int, typer.Option(help="Of the shuffle.")] = 0,
    target_shard_bytes: Annotated[int, typer.Option(help="Size a shard should have.")] = 256 << 20,
    max_side: Annotated[int | None, typer.Option(help="Resize larger images to this side, in pixels.")] = None,
    quality: Annotated[int, typer.Option(help="JPEG quality of images that are resized, turned or converted.")] = 90,
    convert: Annotated[bool, typer.Option("--convert", help="Make JPEGs of PNG, TIFF, BMP and WebP images.")] = False,
    decode: Annotated[
        bool, typer.Option("--decode/--no-decode", help="Decode every image, or look at markers.")
    ] = True,
    max_bad_fraction: MaxBadFraction = 0.0,
    workers: Workers = None,
    ray_address: RayAddress = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Pack images and labels into tars, indexes and one manifest; run again to resume."""
    from shards.build import build

    began, mapper = time.monotonic(), _mapper(ray_address, workers, storage_options)
    with _bar() as on_progress:
        data = _source(source, [images, labels, classes, splits], options, mapping, order, others)
        summary = build(
            data, out, seed=seed, target_shard_bytes=target_shard_bytes, max_side=max_side, quality=quality,
            convert=convert, decode=decode, max_bad_fraction=max_bad_fraction, workers=workers, mapper=mapper,
            on_progress=on_progress,
        )  # fmt: skip
    state = "was complete already, checked" if summary.was_complete else "written"
    _show_set(summary.manifest, state, as_json, began, notes=summary.notes, was_complete=summary.was_complete)


@shards_app.command("extend")
def shards_extend(
    url: ShardsUrl,
    source: SourceName = "table",
    images: Images = None,
    labels: Labels = None,
    classes: Classes = None,
    splits: Splits = None,
    options: SourceOptions = None,
    mapping: Mapping = None,
    order: Order = None,
    others: Others = "refuse",
    max_bad_fraction: MaxBadFraction = 0.0,
    workers: Workers = None,
    ray_address: RayAddress = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Add images that a packed set lacks, as new shards after the existing ones."""
    from shards.extend import extend
    from shards.report import counted

    began, mapper = time.monotonic(), _mapper(ray_address, workers, storage_options)
    with _bar() as on_progress:
        data = _source(source, [images, labels, classes, splits], options, mapping, order, others)
        summary = extend(
            data, url, max_bad_fraction=max_bad_fraction, workers=workers, mapper=mapper, on_progress=on_progress
        )
    added = f"extended by {counted(summary.num_added, 'image')}"
    state = added if summary.num_added else "had all that can be packed of it, checked"
    _show_set(summary.manifest, state, as_json, began, num_added=summary.num_added)


@shards_app.command("repair")
def shards_repair(
    url: ShardsUrl,
    source: SourceName = "table",
    images: Images = None,
    labels: Labels = None,
    classes: Classes = None,
    splits: Splits = None,
    options: SourceOptions = None,
    mapping: Mapping = None,
    order: Order = None,
    others: Others = "refuse",
    workers: Workers = None,
    ray_address: RayAddress = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Verify a packed set, and repack damaged or missing shards from the source, to the same bytes."""
    from shards.repair import repair
    from shards.report import counted

    mapper = _mapper(ray_address, workers, storage_options)
    with _bar() as on_progress:
        data = _source(source, [images, labels, classes, splits], options, mapping, order, others)
        summary = repair(url, data, workers=workers, mapper=mapper, on_progress=on_progress)
    if as_json:
        faults = [fault._asdict() for fault in summary.faults]
        print_json({"is_whole": not summary.faults, "rewritten": list(summary.rewritten), "faults": faults})
    else:
        console = Console()
        for file in summary.rewritten:
            console.print(f"packed again: {file}", highlight=False)
        _print_faults(console, summary.faults)
        left = f"{counted(len(summary.faults), 'fault')} left"
        console.print(left if summary.faults else "whole", highlight=False)
    if summary.faults:
        sys.exit(3)


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
    """Index existing tars in place, by their headers."""
    from shards.index import index_tars
    from shards.report import counted

    with _bar() as on_progress:
        summary = index_tars(
            tars, out=out, classes=classes, split=split, split_pattern=split_pattern,
            unlisted=unlisted, workers=workers, on_progress=on_progress,
        )  # fmt: skip
    manifest = summary.manifest
    splits = {name: {"num_samples": s.num_samples, "num_tars": len(s.shards)} for name, s in manifest.splits.items()}
    if as_json:
        print_json(
            {"url": manifest.url, "digest": manifest.digest, "num_classes": manifest.num_classes,
             "unlisted": manifest.unlisted, "splits": splits, "ignored": summary.ignored,
             "num_reused": summary.num_reused, "was_complete": summary.was_complete}
        )  # fmt: skip
        return
    console = Console()
    for name, counts in splits.items():
        sizes = f"{counted(counts['num_samples'], 'image')}, {counted(counts['num_tars'], 'tar')}"
        console.print(f"{name}: {sizes}", highlight=False)
    for kind, count in summary.ignored.items():
        console.print(f"[yellow]passed over: {count} of kind '{kind}'[/]", highlight=False)
    state = "was complete already" if summary.was_complete else "written"
    console.print(
        f"{counted(manifest.num_classes, 'class')}, those that a sample does not list are {manifest.unlisted}; "
        f"{manifest.url} {state}, digest {manifest.digest[:16]}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


@shards_app.command("verify")
def shards_verify(
    url: ShardsUrl,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image too.")] = False,
    workers: Workers = None,
    ray_address: RayAddress = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Read a whole set again and compare it with the manifest."""
    from shards.report import counted
    from shards.verify import verify

    mapper = _mapper(ray_address, workers, storage_options)
    with _bar() as on_progress:
        report = verify(url, decode=decode, workers=workers, mapper=mapper, on_progress=on_progress)
    if as_json:
        print_json(
            {"is_whole": not report.faults, "faults": [fault._asdict() for fault in report.faults],
             "num_without_digest": report.num_without_digest}
        )  # fmt: skip
    else:
        console = Console()
        _print_faults(console, report.faults)
        num_samples = sum(split.num_samples for split in report.manifest.splits.values())
        whole = f"whole: {counted(num_samples, 'sample')} as the manifest says"
        console.print(counted(len(report.faults), "fault") if report.faults else whole, highlight=False)
        if report.num_without_digest:
            one = report.num_without_digest == 1
            were = (
                "was indexed where it lies and its digest was" if one else "were indexed where they lie; digests were"
            )
            console.print(
                f"[yellow]{counted(report.num_without_digest, 'tar')} {were} never known: pixels that changed since go "
                "unseen[/]",
                highlight=False,
            )
    if report.faults:
        sys.exit(3)


def _mapper(ray_address: str | None, workers: int | None, storage_options: str | None) -> Mapper | None:
    """Configure storage, and make the mapper for --ray-address; None for processes of this machine.

    Raises:
        ConfigError: both --workers and --ray-address, or invalid storage options.
    """
    from dist_mlpl import storage

    storage.configure_storage(parse_storage_options(storage_options))
    if ray_address is None:
        return None
    if workers is not None:
        raise ConfigError(
            f"--workers {workers} with --ray-address", expected="one of the two", where="--ray-address",
            next_step="leave --workers out: tasks take a CPU of the cluster each",
        )  # fmt: skip
    from dist_mlpl.tasks import map_tasks

    return partial(map_tasks, address=ray_address)


def _source(
    name: str,
    shorthands: list[str | None],
    options: list[str] | None,
    mapping: str | None,
    order: str | None,
    others: Any,
) -> Source:
    """Read the data set that the options describe, and map its classes.

    Raises:
        ConfigError: an option that is not KEY=VALUE, or is given twice; see `read_source`.
        DataError: see `read_source`.
    """
    from shards.sources.mapping import map_classes
    from shards.sources.registry import read_source

    given = dict(zip(("images", "labels", "classes", "splits"), shorthands, strict=True))
    texts = {key: text for key, text in given.items() if text is not None}
    for option in options or ():
        key, sign, value = option.partition("=")
        if not sign or key in texts:
            found = "twice" if sign else "without a value"
            raise ConfigError(
                f"option {option!r} {found}", expected="KEY=VALUE, every key once", where="--option",
                next_step="correct the option",
            )  # fmt: skip
        texts[key] = value
    source = read_source(name, texts)
    return map_classes(source, mapping, order=order, others=others) if mapping or order else source


def _show_set(
    manifest: Manifest, state: str, as_json: bool, began: float, *, notes: Sequence[str] = (), **told: Any
) -> None:
    """Print a set's size and URL, and the notes on it."""
    from shards.report import counted, size_text

    splits = {
        name: {"num_samples": s.num_samples, "num_shards": len(s.shards), "num_bytes": s.num_bytes,
               "megabytes": round(s.num_bytes / 1e6, 1)}
        for name, s in manifest.splits.items()
    }  # fmt: skip
    seconds = time.monotonic() - began
    if as_json:
        print_json(
            {"url": manifest.url, "digest": manifest.digest, "num_classes": manifest.num_classes, "splits": splits,
             "skipped": manifest.skipped, "notes": list(notes), "seconds": round(seconds, 1), **told}
        )  # fmt: skip
        return
    console = Console()
    for name, part in manifest.splits.items():
        sizes = (counted(part.num_samples, "image"), counted(len(part.shards), "shard"), size_text(part.num_bytes))
        console.print(f"{name}: {', '.join(sizes)}", highlight=False)
    for reason, count in manifest.skipped.items():
        console.print(f"[yellow]left out: {count} {reason} (listed in {manifest.url}/skipped.csv)[/]", highlight=False)
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{counted(manifest.num_classes, 'class')}; {manifest.url} {state} in {seconds:.0f} s, "
        f"digest {manifest.digest[:16]}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _print_faults(console: Console, faults: Any) -> None:
    for fault in faults:
        place = f"{fault.file} {fault.where}".strip()
        line = f"{place}: {fault.found}; expected {fault.expected}"
        console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)


def _bar() -> Any:
    """A progress bar on standard error; its callback takes (doing, done, total[, bytes])."""
    from dist_mlpl.display import work_bar

    return work_bar()


@shards_app.command("stats")
def shards_stats(
    url: ShardsUrl,
    view: Annotated[str | None, typer.Option(help="Name or URL of a view to see its split through.")] = None,
    sample: Annotated[int, typer.Option(help="Images of each split whose header is read for its size.")] = 2000,
    html: Annotated[str | None, typer.Option(help="Write a page with charts there, a path or URL.")] = None,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Count labels by class, image and pair, and image sizes."""
    from dist_mlpl import storage
    from shards.report import stats_page, stats_tables
    from shards.stats import stats, stats_document

    storage.configure_storage(parse_storage_options(storage_options))
    with _bar() as on_progress:
        statistics = stats(url, view=view, sample=sample, on_progress=on_progress)
    if html is not None:
        storage.write_bytes(storage.absolute(html), stats_page(statistics).encode())
    if as_json:
        print_json(stats_document(statistics))
        return
    console = Console()
    for table in stats_tables(statistics):
        console.print(table)
    if html is not None:
        console.print(f"charts and every class: {html}", highlight=False)


@shards_app.command("inspect")
def shards_inspect(
    url: ShardsUrl,
    out: Annotated[str, typer.Option(help="The sheet: a path or URL ending in .png or .html.")],
    sample: Annotated[int, typer.Option(help="Images, at most 400.")] = 24,
    split: Annotated[str | None, typer.Option(help="Split; train by default.")] = None,
    class_id: Annotated[str | None, typer.Option("--class", help="Only images with this class, by id or name.")] = None,
    absent: Annotated[bool, typer.Option("--absent", help="With --class: images where it is known absent.")] = False,
    known_only: Annotated[bool, typer.Option("--known-only", help="Only images with a known label.")] = False,
    view: Annotated[str | None, typer.Option(help="Name or URL of a view to see labels through.")] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of images.")] = 0,
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Draw a sheet of images with their labels: present green, absent red, unknown left out."""
    from dataclasses import asdict

    from dist_mlpl import storage
    from shards.inspect import inspect
    from shards.report import counted

    storage.configure_storage(parse_storage_options(storage_options))
    sheet = inspect(
        url, out=out, sample=sample, split=split, class_id=class_id, is_absent=absent, known_only=known_only,
        view=view, seed=seed,
    )  # fmt: skip
    if as_json:
        print_json(asdict(sheet))
        return
    unreadable = f", {sheet.num_unreadable} of them not decodable" if sheet.num_unreadable else ""
    shown = counted(sheet.num_shown, "image")
    Console().print(f"{shown}{unreadable}: {sheet.out}", highlight=False, soft_wrap=True)


@shards_app.command("rules")
def shards_rules(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="One of them.")] = None,
) -> None:
    """List the rules of `shards simulate`."""
    from dist_mlpl.errors import nearest_names
    from shards.view_rules import RULES

    if name is not None and name not in RULES:
        raise ConfigError(
            f"unknown rule {name!r}", expected=nearest_names(name, RULES), where="NAME", next_step="correct the name"
        )
    console = Console(highlight=False, soft_wrap=True)
    for key in RULES if name is None else [name]:
        rule = RULES[key]
        options = (
            "; needs --fraction" * rule.takes_fraction + "; takes --flip-present, --flip-absent" * rule.takes_flips
        )
        console.print(f"[bold]{key}[/]  {rule.summary}{options if name else ''}")


@shards_app.command("simulate")
def shards_simulate(
    url: ShardsUrl,
    rule: Annotated[str, typer.Option(help="What happens to labels; `shards rules` lists them.")],
    name: Annotated[str, typer.Option(help="Of the view, for data.view; a URL with a slash keeps it elsewhere.")],
    fraction: Annotated[float | None, typer.Option(help="Of known labels that stay, in (0, 1].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the draws; the rule's customary one by default.")] = None,
    flip_present: Annotated[float | None, typer.Option(help="noisy: chance that present becomes absent.")] = None,
    flip_absent: Annotated[float | None, typer.Option(help="noisy: chance that absent becomes present.")] = None,
    split: Annotated[str, typer.Option(help="Whose labels are hidden or replaced.")] = "train",
    storage_options: StorageOptions = None,
    as_json: AsJson = False,
) -> None:
    """Draw a partial, noisy or web-like labelling, and write it as a view; the shards are not changed."""
    from dist_mlpl import storage
    from shards.simulate import simulate

    storage.configure_storage(parse_storage_options(storage_options))
    with _bar() as on_progress:
        summary = simulate(
            url, name=name, rule=rule, fraction=fraction, seed=seed, flip_present=flip_present,
            flip_absent=flip_absent, split=split, on_progress=on_progress,
        )  # fmt: skip
    view = summary.view
    if as_json:
        about = {"url": view.url, "num_reused": summary.num_reused, "was_complete": summary.was_complete}
        print_json({**view.model_dump(mode="json", exclude={"shards"}), **about})
        return
    kept = view.num_known - view.num_hidden
    replaced = f", {view.num_replaced:,} of them replaced" if view.num_replaced else ""
    state = "was complete already" if summary.was_complete else "written"
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{split}: {kept:,} of {view.num_known:,} known labels stay{replaced}")
    console.print(f"{view.url} {state}, digest {view.digest[:16]}; to train on it: data.view={name}")
