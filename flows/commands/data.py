"""Commands about data: `trace`, `lineage`, `takedown`, `prune`, `sources inspect`. Not here: the
answers (flows/audit/sample_trace.py, flows/graph/ancestry.py, flows/audit/leftovers.py,
tasks/merge/merge_plan.py)."""

from collections import Counter
from pathlib import Path
from typing import Annotated

from rich.table import Table
from typer import Argument, Option, Typer

from evaclip_model.errors import InputError
from flows.config.profile import load_profile
from flows.reporting.terminal import console, moving_bar
from tasks.progress import format_bytes

sources = Typer(help="Look at metadata files before they become a source.")


def trace(
    url: Annotated[
        str | None, Option(help="address of the image; http or https does not matter")
    ] = None,
    uid: Annotated[
        str | None, Option(help="the sample's uid, as shards and the index have it")
    ] = None,
    sha256: Annotated[
        str | None, Option(help="of the image file, as downloaded or as stored")
    ] = None,
) -> None:
    """Say where one sample came from, where it is, and what was made of it."""
    if [url, uid, sha256].count(None) != 2:
        raise InputError("give one of --url, --uid and --sha256")
    from flows.audit import sample_trace  # imports duckdb

    root = load_profile().root.resolve()
    found = sample_trace.trace_sample(url=url, uid=uid, sha256=sha256, root=root)
    for number, one in enumerate(found):
        lines = [*([""] if number else []), *sample_trace.describe_traces(one, root)]
        console.print("\n".join(lines), soft_wrap=True)
    if not found:
        raise InputError(f"no sample under {root} has that; what was never stored is not in shards")


def find(
    text: Annotated[
        str, Argument(metavar="TEXT", help="words that describe what the pictures show")
    ] = "",
    image: Annotated[Path | None, Option(help="a picture; what looks like it is found")] = None,
    like: Annotated[str, Option(metavar="UID", help="what looks like this sample is found")] = "",
    top: Annotated[int, Option(min=1, max=1000, help="samples to show")] = 10,
    source: Annotated[str, Option(help="of this source alone")] = "",
    min_score: Annotated[float, Option(help="likeness of its own image and caption")] = -1.0,
    max_score: Annotated[float, Option(help="likewise, the largest")] = 1.0,
    exact: Annotated[bool, Option("--exact", help="look at every sample, not by an index")] = False,
    model: Annotated[
        str, Option(help="the model whose features are searched; by default the last that embedded")
    ] = "",
) -> None:
    """Find samples by what they show, among those that a stage `embed` has looked at."""
    if [bool(text), image is not None, bool(like)].count(True) != 1:
        raise InputError("give one of a TEXT, --image and --like")
    from flows.audit.sample_search import SampleSearch  # imports torch
    from tasks.embed.search import Wanted

    with moving_bar("index") as report:
        search = SampleSearch(load_profile(), model, None if exact else report)
    if source and source not in search.sources:
        known = f"{search.model} embedded {', '.join(search.sources)}"
        raise InputError(f"there is nothing of source '{source}': {known}")
    try:
        picture = image.read_bytes() if image else b""
    except OSError as error:
        raise InputError(f"{image} cannot be read: {error}") from None
    query = search.feature_of(text, like, picture)
    for one in search.find_samples(query, Wanted(top, source, min_score, max_score, exact)):
        row, caption = one.row, one.pair.caption if one.pair else ""
        title = f"{one.hit.likeness:6.3f}  {row['uid']}  {row['source']}  score {one.hit.score:.3f}"
        console.print(title, soft_wrap=True)
        versions = (
            f"{'left out of' if reason else 'in'} dataset {digest}{f' ({reason})' * bool(reason)}"
            for digest, reason in one.versions.items()
        )
        for line in (caption, row["url"], f"{one.shard} {row['key']}", *versions):
            if line:
                console.print(f"        {line}", soft_wrap=True)


def lineage(
    what: Annotated[
        str,
        Argument(
            metavar="WHAT",
            help="NAME@ALIAS or NAME/VERSION of a model, a digest of anything made, or a source's "
            "name",
        ),
    ],
    alias: Annotated[str, Option(help="whose last holder a model is compared with")] = "champion",
) -> None:
    """Say what a model was made from, or what was made of a dataset or a source."""
    from flows.graph import ancestry  # imports mlflow, as the next ones do
    from tasks.register.model_versions import describe_version, find_predecessor, is_address

    profile = load_profile()
    if is_address(what):
        version = describe_version(profile.mlflow_uri, what)
        before = find_predecessor(profile.mlflow_uri, version, alias)
        lines = ancestry.version_tree(version, before)
    else:
        lines = ancestry.data_trees(profile, what)
    console.print("\n".join(lines), soft_wrap=True)


def takedown(
    file: Annotated[Path, Argument(metavar="FILE", help="URLs, uids or SHA-256s, one a line")],
) -> None:
    """Make new dataset versions without some samples; name the models that have seen them."""
    from flows.audit import sample_trace  # imports duckdb

    root = load_profile().root.resolve()
    done = sample_trace.take_down(file, root)
    lines = [line for one in done for line in sample_trace.describe_replacement(one, root)]
    lines += sample_trace.describe_unmatched(file, root)
    end = f'the next run leaves them out with [dataset] takedowns = ["{file}"] in the recipe'
    lines.append(end if done else f"no dataset version under {root} holds any of these samples")
    console.print("\n".join(lines), soft_wrap=True)


def prune(
    days: Annotated[float, Option(min=0, help="what was written to since then stays")] = 7,
    yes: Annotated[bool, Option("--yes", help="remove it; without it, only say what")] = False,
) -> None:
    """Say what nothing needs any more, how much it is and why; with --yes remove it."""
    from flows.audit.leftovers import find_leftovers, remove_leftovers  # imports mlflow

    profile = load_profile()
    root = profile.root.resolve()
    found = find_leftovers(profile, days)
    for one in found:
        what = f"{one.path.relative_to(root)}{', but for its manifest' * one.is_manifest_kept}"
        console.print(f"{format_bytes(one.bytes):>9}  {what}: {one.why}", soft_wrap=True)
    if yes:
        with moving_bar("prune") as report:
            remove_leftovers(root, found, report)
    total = format_bytes(sum(one.bytes for one in found))
    end = "removed" if yes else "remove it with --yes" if found else "nothing to remove"
    console.print(f"{len(found):,} leftovers, {total}: {end}")


@sources.command("inspect")
def inspect_source(
    files: Annotated[str, Argument(metavar="PATH", help="a file, a glob, or a URL with wildcards")],
    read: Annotated[int, Option(help="files to read for shares")] = 4,
) -> None:
    """Say what metadata files hold, before they become a source."""
    from tasks.adopt.adopt import inspect_source as inspect_adoptable
    from tasks.merge.config import why_refused
    from tasks.merge.merge_plan import inspect_files  # imports duckdb

    if (withdrawn := why_refused(files)) is not None:
        raise InputError(withdrawn)
    if adoptable := inspect_adoptable(files, read):
        several, left = f"{adoptable.files:,} files", adoptable.left
        part = f"{adoptable.read_files:,} of {several}" if adoptable.is_cut_short else "all files"
        console.print(files, style="bold", end=": ")
        console.print(f"form '{adoptable.form}', {several}")
        console.print(f"{left.pairs:,} images with captions in {part}")
        _print_left_out(left.reasons, left.first)
        console.print("fit for [[adopt.sources]]" if left.pairs else "no image with a caption")
        return
    found = inspect_files(files, read)
    console.print(files, style="bold", end=": ")
    rows = "" if found.rows is None else f", {found.rows:,} rows"
    console.print(f"{found.files:,} files{rows}")
    console.print(f"columns over {found.read_rows:,} rows of {found.read_files} files:")
    table = Table("column", "type", "plays", "missing", box=None, pad_edge=False)
    for column in found.columns:
        missing = f"{column.null_share:.1%}"
        table.add_row(column.name, column.kind, column.part or "", missing)
    console.print(table)
    _print_left_out(found.bad_lines, found.first_bad_line)
    console.print(found.problem or "fit for a source", style="yellow" if found.problem else None)


def _print_left_out(reasons: Counter[str], first: str) -> None:
    for reason, count in reasons.most_common():
        console.print(f"{count:,} would be left out: {reason}")
    if first:
        console.print(f"the first is {first}", soft_wrap=True)
