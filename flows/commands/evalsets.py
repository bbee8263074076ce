"""Commands about evaluation sets: `evalsets list`, `show`, `check`, `convert FORM`. Not here: the
registry (tasks/evaluate/sets/set_registry.py), reading and checking sets
(tasks/evaluate/sets/published_layout.py), writing them (tasks/evaluate/sets/convert)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.table import Table
from typer import Argument, Option, Typer

from evaclip_model.errors import InputError
from flows.reporting.terminal import console, moving_bar
from tasks.evaluate.sets import set_registry
from tasks.evaluate.sets.class_order import Words

if TYPE_CHECKING:
    from tasks.evaluate.sets.convert.shard_writer import Conversion

SHOWN_PROBLEMS = 5
CAPTION_FILES = "Karpathy's, COCO's or BLIP's .json, Flickr's .token, a table"
Source = Annotated[Path, Argument(metavar="SOURCE")]
Images = Annotated[Path, Argument(metavar="SOURCE", help="folder of the images")]
Name = Annotated[str, Argument(metavar="NAME")]
Target = Annotated[Path, Argument(metavar="FOLDER", help="where to write the set")]
Known = Annotated[str, Option("--as", metavar="NAME", help="the known set that this is")]
Classnames = Annotated[str, Option(metavar="FILE", help="or openai, clip_benchmark (their own)")]
Templates = Annotated[
    str, Option(metavar="FILE", help="or openai, clip_benchmark, grammar, none (the known set's)")
]
Column = Annotated[str, Option(metavar="NAME", help="(told by its name)")]
Order = Annotated[
    Literal["", "text", "number"], Option(help="of classes that are numbers (by number)")
]
First = Annotated[
    Literal["", "0", "1"], Option(help="number of the first class (told from the numbers)")
]

evalsets = Typer(
    help="Evaluation sets: list, show, check, convert from images, tables, videos, captions, "
    "questions, torchvision, VOC."
)
convert = Typer(help="Write a set from images, tables, videos, captions or questions.")
evalsets.add_typer(convert, name="convert")


@evalsets.command("list")
def list_sets() -> None:
    """List the sets of the paper's tables, and which of them are here."""
    table = Table("name", "set", "tables", "metric", "classes", "images", "here", box=None)
    for key, known in set_registry.all_sets().items():
        images = f"{known.n:,}" if known.n else "?"
        here = "yes" if set_registry.find_set_folder(known, Path(set_registry.FOLDER)) else ""
        about = (known.title, " ".join(known.tables), known.metric, str(known.classes or ""))
        table.add_row(key, *about, images, here)
    console.print(table)


@evalsets.command("show")
def show_set(name: Name) -> None:
    """Show all that is known of one set."""
    for what, value in _find_known(name).model_dump(mode="json").items():
        values = value if isinstance(value, list) else [value]
        for number, one in enumerate(values):
            if one not in (None, ""):
                _print_marked(f"{'' if number else what:<14}", "bold", str(one))


@evalsets.command("check")
def check(
    folder: Annotated[Path, Argument(metavar="FOLDER")],
    known_as: Known = "",
    templates: Annotated[str, Option(help="a source's name (the known set's first)")] = "",
) -> None:
    """Read a set, decode every image, say what is odd."""
    from tasks.evaluate.sets import published_layout as layout

    known = _find_known(known_as) if known_as else None
    templates = templates or (known.prompts[0] if known and known.prompts else "dataset")
    name = known.key if known else folder.name
    evalset = layout.open_set(name, folder, layout.kind_of(folder), templates, known=known)
    with moving_bar("check") as report:
        unreadable = layout.check_set(evalset, report)
    for what, value in layout.list_facts(evalset):
        _print_marked(f"{what:<14}", "bold", value)
    for oddity in layout.list_oddities(evalset, unreadable):
        _print_marked("!", "yellow", oddity)
    if unreadable:
        raise InputError(f"{folder} cannot be evaluated: every image has to be decodable")


@convert.command("imagefolder")
def convert_imagefolder(
    source: Source,
    folder: Target,
    known_as: Known = "",
    classnames: Classnames = "",
    templates: Templates = "",
    order: Order = "",
    first: First = "",
) -> None:
    """Convert a folder of one folder of images a class."""
    from tasks.evaluate.sets.convert.convert import convert_imagefolder

    words = _make_words(known_as, classnames, templates, order, first)
    _run_conversion(partial(convert_imagefolder, source, folder, words))


@convert.command("table")
def convert_table(
    listing: Annotated[
        Path, Argument(metavar="LISTING", help=".csv, .tsv, .jsonl, .parquet or .txt")
    ],
    source: Annotated[Path, Argument(metavar="SOURCE", help="folder that its paths lie in")],
    folder: Target,
    known_as: Known = "",
    classnames: Classnames = "",
    templates: Templates = "",
    order: Order = "",
    first: First = "",
    path_column: Column = "",
    label_column: Column = "",
    multilabel: Annotated[
        bool, Option("--multilabel", help="an image may have several labels, or none")
    ] = False,
    split: Annotated[str, Option(help="rows to take, by the column 'split' (all)")] = "",
) -> None:
    """Convert images, and a table of their paths and labels."""
    from tasks.evaluate.sets.convert.convert import convert_table

    words = _make_words(known_as, classnames, templates, order, first)
    given = (listing, source, folder, words, (path_column, label_column), multilabel, split)
    _run_conversion(partial(convert_table, *given))


@convert.command("torchvision")
def convert_torchvision(
    name: Annotated[str, Argument(metavar="NAME", help="of the set, as in `evalsets list`")],
    source: Annotated[Path, Argument(metavar="SOURCE", help="torchvision's root folder")],
    folder: Target,
    classnames: Classnames = "",
    templates: Templates = "",
    download: Annotated[bool, Option("--download", help="let torchvision fetch it")] = False,
    split: Annotated[str, Option(help="torchvision's name of it (the one evaluated)")] = "",
) -> None:
    """Convert a known set that torchvision has."""
    from tasks.evaluate.sets.convert.convert import convert_torchvision

    known = _find_known(name)
    words = Words(known, classnames, templates)
    _run_conversion(partial(convert_torchvision, known, source, folder, words, download, split))


@convert.command("videos")
def convert_videos(
    source: Source,
    folder: Target,
    known_as: Known = "",
    classnames: Classnames = "",
    templates: Templates = "",
    listing: Annotated[
        Path | None, Option("--list", help="the videos to take, and their classes (all)")
    ] = None,
    order: Order = "",
    first: First = "",
) -> None:
    """Convert videos: in one folder a class, or anywhere with a list of their classes."""
    from tasks.evaluate.sets.convert.convert import convert_videos

    words = _make_words(known_as, classnames, templates, order, first)
    _run_conversion(partial(convert_videos, source, folder, words, listing))


@convert.command("voc")
def convert_voc(
    source: Annotated[Path, Argument(metavar="SOURCE", help="the folder VOCdevkit/VOC2007")],
    folder: Target,
    classnames: Classnames = "",
    templates: Templates = "",
    whole: Annotated[
        bool, Option("--whole", help="whole images with all their classes (boxes)")
    ] = False,
) -> None:
    """Convert PASCAL VOC's test images: its boxes, or whole."""
    from tasks.evaluate.sets.convert.convert import convert_voc

    words = Words(None, classnames, templates)
    _run_conversion(partial(convert_voc, source, folder, words, whole))


@convert.command("captions")
def convert_captions(
    listing: Annotated[Path, Argument(metavar="LISTING", help=CAPTION_FILES)],
    source: Images,
    folder: Target,
    split: Annotated[str, Option(help="of Karpathy's file")] = "test",
) -> None:
    """Convert images and a file of their captions."""
    from tasks.evaluate.sets.convert.convert import convert_captions

    _run_conversion(partial(convert_captions, listing, source, folder, split))


@convert.command("choice")
def convert_choice(
    listing: Annotated[
        Path, Argument(metavar="LISTING", help="SugarCrepe's, Winoground's or WinoGAViL's")
    ],
    source: Images,
    folder: Target,
) -> None:
    """Convert questions: which of a few texts, or images, belong together."""
    from tasks.evaluate.sets.convert.convert import convert_choice

    _run_conversion(partial(convert_choice, listing, source, folder))


def _make_words(
    known_as: str, classnames: str, templates: str, order: Order, first: First
) -> Words:
    known = _find_known(known_as) if known_as else None
    return Words(known, classnames, templates, order, int(first) if first else None)


def _run_conversion(convert_set: Callable[..., Conversion]) -> None:
    """Convert with a bar (`convert_set` takes `report`), then print what was made."""
    from tasks.evaluate.sets.published_layout import some_names

    with moving_bar("convert") as report:
        made = convert_set(report=report)
    again = " (made again: its sources or settings had changed)" if made.again else ""
    say = partial(console.print, soft_wrap=True)
    text = f"{made.images:,} images in {made.tars} tars: {made.folder}{again}"
    _print_marked("✓", "green", text)
    if made.classnames:
        say(f"  {len(made.classnames):,} classes: {some_names(made.classnames)}")
    if made.questions:
        say(f"  {made.questions:,} questions")
    for remark in made.about_names:
        _print_marked("!", "yellow", remark)
    for reason, count in made.left_out().items():
        say(f"  {count:,} left out: {reason}")
    for what, listed, file in (
        ("gave no image", made.failures, "failures.txt"),
        ("were used, and are odd", made.remarks, "remarks.txt"),
    ):
        if listed:
            text = f"{len(listed):,} {what}, all in {made.folder / file}:"
            _print_marked("!", "yellow", text)
            for source, reason in listed[:SHOWN_PROBLEMS]:
                say(f"  {source}: {reason}")


def _print_marked(mark: str, style: str, text: str) -> None:
    console.print(mark, style=style, end=" ")
    console.print(text, soft_wrap=True)


def _find_known(name: str) -> set_registry.KnownSet:
    known = set_registry.find_set(name)
    if known is None:
        raise InputError(f"no set is called '{name}'; {set_registry.nearest_set(name)}")
    return known
