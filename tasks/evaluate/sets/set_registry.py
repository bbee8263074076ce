"""The evaluation sets of the paper's Tables 1-4, as data.

Sizes and splits are those that reproduce the paper, where any do; "split not stated" marks the
sets whose images the paper neither names nor betrays by its figures.
"""

import difflib
import functools
import json
from pathlib import Path
from typing import Literal

from evaclip_model.config import Config
from evaclip_model.errors import InputError

Kind = Literal["classification", "multilabel", "retrieval", "choice"]
CLASS_KINDS: tuple[Kind, ...] = ("classification", "multilabel")
"""Kinds of sets with class names and prompts."""
PaperMetric = Literal["top1", "kinetics_mean", "map", "retrieval", "choice", "real_top1"]
NameSource = Literal["dataset", "openai", "clip_benchmark"]
PromptSource = Literal["dataset", "openai", "clip_benchmark", "grammar"]

PAPER, DATACOMP = "paper", "datacomp38"
GROUPS = (PAPER, DATACOMP)
"""Names that stand for many sets: the 33 of the paper's tables, the 38 of DataComp."""
FOLDER = "evaluation"
"""Folder in which a recipe looks for a known set, unless it says otherwise."""
_FILE = Path(__file__).with_name("registry.json")


class TorchvisionSet(Config):
    """The way from a class of `torchvision.datasets` to one of the paper's sets."""

    dataset: str
    arguments: tuple[tuple[str, str | bool | int], ...] = ()
    """Of its class, besides `root`."""
    names: Literal["classes", "categories", "openai", "clip_benchmark", "digits"] = "classes"
    """Its attribute with the class names, or the source that has them."""
    spaces: str = ""
    """Characters in its names that stand for a space."""
    reads_files: bool = False
    """True: it takes a `loader`, so that image files are copied, not decoded and written again."""
    relabel: tuple[int, ...] = ()
    """Label here of each of its labels; none where they are the same."""
    downloads: bool = True
    """True: its class still takes `download`."""


class KnownSet(Config):
    key: str
    title: str
    tables: tuple[str, ...]
    """Tables of the paper that have it: "1b", "2", "3", "4"; none of a variant."""
    column: str
    """Its column in those tables; "" where there are several, or none."""
    kind: Kind = "classification"
    metric: PaperMetric = "top1"
    """The paper's metric of this set; `kinetics_mean` is the mean of top-1 and top-5."""
    classes: int | None = None
    n: int | None = None
    """Images of the set that reproduces the paper; None where nobody can know."""
    n_note: str = ""
    """Origin of these images, or the reason why their number is not known."""
    captions: int | None = None
    split: str
    split_stated: bool = True
    """True: the paper says which images, or its figures agree with others' on these."""
    names: tuple[NameSource, ...] = ("dataset",)
    """Sources of its class names, and below of its prompt templates; the first is the usual one."""
    prompts: tuple[PromptSource, ...] = ("dataset",)
    templates: int | None = None
    names_from: str = ""
    wheel_names: str | None = None
    """Key of its class names in the distribution clip-benchmark; of its templates, below."""
    wheel_prompts: str | None = None
    subset_of: str | None = None
    """Set that it has some classes of; its labels count those only."""
    torchvision: TorchvisionSet | None = None
    wds: str
    """Name of its folder where it is published in the webdataset layout."""
    licence: str
    """Terms as generally understood; read them before use."""
    obtain: str
    datacomp: str = ""
    """Figure of it that DataComp averages; "" of a set that is none of its 38."""
    tolerance: float | None = None
    """Points within which a figure counts as reproduced; None: nothing is known to compare with."""
    traps: tuple[str, ...] = ()


@functools.cache
def all_sets() -> dict[str, KnownSet]:
    """Every known set by its key, in the order of the paper's columns, variants last."""
    entries = [KnownSet.model_validate(entry) for entry in json.loads(_FILE.read_text())]
    return {entry.key: entry for entry in entries}


def known_sets() -> dict[str, KnownSet]:
    """The 33 sets of the paper by their keys, in the order of its columns."""
    return {key: known for key, known in all_sets().items() if known.tables}


def sets_of_group(name: str) -> tuple[str, ...]:
    """The sets that a name of `GROUPS` stands for; none of another name."""
    if name == DATACOMP:
        return tuple(key for key, known in all_sets().items() if known.datacomp)
    return tuple(known_sets()) if name == PAPER else ()


def find_set(key: str) -> KnownSet | None:
    return all_sets().get(key)


def find_set_folder(known: KnownSet, data: Path) -> Path | None:
    """The folder in `data` that holds a known set, by the names under which it is published:
    CLIP_benchmark's first, then DataComp's `wds_NAME_test`, with `vtab-` before the name or
    without; the key alone does as well. Raises InputError: two of other names could be meant."""
    found = [data / name for name in _published_names(known) if (data / name).is_dir()]
    if len(found) > 1 and found[0].name != known.wds:
        raise InputError(
            f"set '{known.key}' could be {found[0]} or {found[1]}: name one, as "
            f"{known.key}={found[0]}"
        )
    return found[0] if found else None


def find_published_set(folder: Path) -> KnownSet | None:
    """The known set that a folder of this name holds."""
    sets = all_sets().values()
    return next((one for one in sets if folder.name in _published_names(one)[:-1]), None)


def _published_names(known: KnownSet) -> tuple[str, ...]:
    """Names of its folder, the usual one first, its key last."""
    name = known.wds.removeprefix("wds_").removeprefix("vtab-")
    others = [f"wds_{group}{name}{end}" for group in ("vtab-", "") for end in ("", "_test")]
    return tuple(dict.fromkeys([known.wds, f"{known.wds}_test", *others, known.key]))


def nearest_set(key: str) -> str:
    """A hint for a name that is not known: the nearest, or all."""
    near = difflib.get_close_matches(key, all_sets(), n=1)
    return f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(all_sets())}"
