"""`evalsets`: the sets models are evaluated on: which there are, checking one, making one.

Covers: the arguments and printing.
Not here: the registry, reading and writing sets (tasks/evaluate).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.table import Table

from evaclip_model.errors import InputError
from flows.console.terminal import console, moving_bar
from tasks.evaluate.sets.set_registry import FOLDER, KnownSet, all_sets, find_set, nearest_set

if TYPE_CHECKING:
    from tasks.evaluate.sets.convert.shard_writer import Conversion

HELP = "evaluation sets: list, show, check, convert from images, videos, captions, torchvision, VOC"
SHOWN_PROBLEMS = 5

Handler = Callable[[argparse.Namespace], None]


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="action")
    _action(actions, "list", "the sets of the paper's tables, and which of them are here", _list)
    show = _action(actions, "show", "all that is known of one set", _show)
    show.add_argument("name")
    check = _action(actions, "check", "read a set, decode every image, say what is odd", _check)
    check.add_argument("folder", type=Path)
    _with_known(check)
    check.add_argument("--templates", default="", help="a source's name (the known set's first)")
    convert = actions.add_parser("convert", help="write a set from images, videos or captions")
    forms = convert.add_subparsers(required=True, metavar="form")
    _with_forms(forms)


def run(parsed: argparse.Namespace) -> None:
    parsed.action(parsed)


def _with_forms(forms: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    images = _action(forms, "imagefolder", "a folder of one folder of images a class", _imagefolder)
    images.add_argument("source", type=Path)
    _with_target(images)
    images.add_argument(
        "--order", choices=["text", "number"], default="text", help="of folders' names (text)"
    )
    vision = _action(forms, "torchvision", "a known set that torchvision has", _torchvision)
    vision.add_argument("name", help="of the set, as in `evalsets list`")
    vision.add_argument("source", type=Path, help="torchvision's root folder")
    _with_target(vision, known=False)
    vision.add_argument("--download", action="store_true", help="let torchvision fetch it")
    videos = _action(forms, "videos", "a folder of one folder of videos a class", _videos)
    videos.add_argument("source", type=Path)
    _with_target(videos)
    videos.add_argument("--list", type=Path, help="file that names the videos to take (all)")
    voc = _action(forms, "voc", "PASCAL VOC's test images: its boxes, or whole", _voc)
    voc.add_argument("source", type=Path, help="the folder VOCdevkit/VOC2007")
    _with_target(voc, known=False)
    voc.add_argument(
        "--whole", action="store_true", help="whole images with all their classes (boxes)"
    )
    captions = _action(forms, "captions", "images and a JSON file of Karpathy's form", _captions)
    captions.add_argument("listing", type=Path, help="dataset_coco.json, dataset_flickr30k.json")
    captions.add_argument("source", type=Path, help="folder of the images")
    captions.add_argument("folder", type=Path, help="where to write the set")
    captions.add_argument("--split", default="test", help="(test)")


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    handler: Handler,
) -> argparse.ArgumentParser:
    added = actions.add_parser(name, help=text, description=text)
    added.set_defaults(action=handler)
    return added


def _with_known(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--as", dest="known", metavar="NAME", help="the known set that this is")


def _with_target(parser: argparse.ArgumentParser, known: bool = True) -> None:
    parser.add_argument("folder", type=Path, help="where to write the set")
    if known:
        _with_known(parser)
    parser.add_argument(
        "--classnames", default="", metavar="FILE", help="or openai, clip_benchmark (their own)"
    )
    parser.add_argument(
        "--templates",
        default="",
        metavar="FILE",
        help="or openai, clip_benchmark, grammar, none (the known set's)",
    )


def _list(_: argparse.Namespace) -> None:
    table = Table("name", "set", "tables", "metric", "classes", "images", "here", box=None)
    for key, known in all_sets().items():
        images = f"{known.n:,}" if known.n else "?"
        here = "yes" if (Path(FOLDER) / known.wds).is_dir() else ""
        classes = str(known.classes or "")
        table.add_row(
            *(key, known.title, " ".join(known.tables), known.metric, classes, images, here)
        )
    console.print(table)


def _show(parsed: argparse.Namespace) -> None:
    known = _known(parsed.name)
    for what, value in known.model_dump(mode="json").items():
        values = value if isinstance(value, list) else [value]
        for number, one in enumerate(values):
            if one not in (None, ""):
                console.print(f"[bold]{'' if number else what:<14}[/] ", end="", soft_wrap=True)
                console.print(str(one), soft_wrap=True, markup=False)


def _check(parsed: argparse.Namespace) -> None:
    from tasks.evaluate.sets.check_set import check_set  # imports torch
    from tasks.evaluate.sets.published_layout import kind_of, open_set

    known = _known(parsed.known) if parsed.known else None
    templates = parsed.templates or (known.prompts[0] if known and known.prompts else "dataset")
    kind = kind_of(parsed.folder)
    name = known.key if known else parsed.folder.name
    evalset = open_set(name, parsed.folder, kind, templates, known=known)
    with moving_bar("check") as report:
        checked = check_set(evalset, report)
    for what, value in checked.facts():
        console.print(f"[bold]{what:<14}[/] ", end="")
        console.print(value, soft_wrap=True, markup=False)
    for oddity in checked.oddities():
        console.print(f"[yellow]![/] {oddity}", soft_wrap=True)
    if checked.unreadable:
        raise InputError(f"{parsed.folder} cannot be evaluated: every image has to be decodable")


def _imagefolder(parsed: argparse.Namespace) -> None:
    from tasks.evaluate.sets.convert.convert import Words, convert_imagefolder

    words = Words(_known_or_none(parsed), parsed.classnames, parsed.templates)
    with moving_bar("convert") as report:
        made = convert_imagefolder(parsed.source, parsed.folder, words, parsed.order, report)
    _say(made)


def _torchvision(parsed: argparse.Namespace) -> None:
    from tasks.evaluate.sets.convert.convert import Words, convert_torchvision

    known = _known(parsed.name)
    words = Words(known, parsed.classnames, parsed.templates)
    with moving_bar("convert") as report:
        made = convert_torchvision(
            known, parsed.source, parsed.folder, words, parsed.download, report
        )
    _say(made)


def _videos(parsed: argparse.Namespace) -> None:
    from tasks.evaluate.sets.convert.convert import Words, convert_videos

    words = Words(_known_or_none(parsed), parsed.classnames, parsed.templates)
    with moving_bar("convert") as report:
        made = convert_videos(parsed.source, parsed.folder, words, parsed.list, report)
    _say(made)


def _voc(parsed: argparse.Namespace) -> None:
    from tasks.evaluate.sets.convert.convert import Words, convert_voc

    words = Words(None, parsed.classnames, parsed.templates)
    kind: Literal["classification", "multilabel"] = (
        "multilabel" if parsed.whole else "classification"
    )
    with moving_bar("convert") as report:
        made = convert_voc(parsed.source, parsed.folder, words, kind, report)
    _say(made)


def _captions(parsed: argparse.Namespace) -> None:
    from tasks.evaluate.sets.convert.convert import convert_captions

    with moving_bar("convert") as report:
        made = convert_captions(parsed.listing, parsed.source, parsed.folder, parsed.split, report)
    _say(made)


def _say(made: Conversion) -> None:
    text = f"{made.images:,} images in {made.tars} tars: {made.folder}"
    console.print(f"[green]✓[/] {text}", soft_wrap=True)
    for what, listed, file in (
        ("gave no image", made.failures, "failures.txt"),
        ("were used, and are odd", made.remarks, "remarks.txt"),
    ):
        if listed:
            console.print(f"[yellow]![/] {len(listed):,} {what}, all in {made.folder / file}:")
            for source, reason in listed[:SHOWN_PROBLEMS]:
                console.print(f"  {source}: {reason}", soft_wrap=True, markup=False)


def _known_or_none(parsed: argparse.Namespace) -> KnownSet | None:
    return _known(parsed.known) if parsed.known else None


def _known(name: str) -> KnownSet:
    known = find_set(name)
    if known is None:
        raise InputError(f"no set is called '{name}'; {nearest_set(name)}")
    return known
