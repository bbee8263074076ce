"""Commands about registered models: `pull`, `promote`, `rollback`. Not here: the registry
(tasks/register/model_versions.py), how an alias moves (tasks/register/promotion.py)."""

import getpass
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from evaclip_model.choices import Form
from evaclip_model.errors import InputError
from flows.config.profile import load_profile
from flows.promotion.promotion_events import announce_where_served
from flows.reporting.terminal import console, moving_bar

OPENED_BY: dict[Form, str] = {
    "native": "evaclip classify IMAGE LABEL… --model {folder}",
    "open_clip": "open_clip.create_model_from_pretrained('local-dir:{folder}')",
    "timm": "timm.create_model('local-dir:{folder}')",
    "transformers": "CLIPTextModelWithProjection.from_pretrained('{folder}')",
    "onnx": "onnxruntime.InferenceSession('{folder}/image.onnx')",
}
OPEN_CLIP_CONFIG = "open_clip_config.json"  # written where open_clip has the architecture by name


def pull(
    model: Annotated[str, Argument(metavar="MODEL", help="NAME@ALIAS or NAME/VERSION")],
    folder: Annotated[
        Path, Argument(metavar="FOLDER", help="where to put it; new, empty, or pulled before")
    ],
    form: Annotated[
        Form, Option("--as", help="whose form it gets; native (the default) is evaclip's own")
    ] = "native",
) -> None:
    """Fetch a registered model as a folder, for `evaclip` or another library."""
    from tasks.register.model_registry import pull_model  # imports mlflow

    profile = load_profile()
    with moving_bar(f"pull {model}") as report:
        places = profile.weight_places
        pulled = pull_model(profile.mlflow_uri, model, folder, form, report, places)
    opened = OPENED_BY[form].format(folder=pulled)
    if form == "open_clip" and not (pulled / OPEN_CLIP_CONFIG).is_file():
        opened = "open_clip's model around such an image tower; it has none of this one by name"
    console.print(f"{model} is in {pulled}; try: {opened}", soft_wrap=True)


def promote(
    model: Annotated[str, Argument(metavar="NAME/VERSION", help="as evaclip/7")],
    alias: Annotated[str, Option(help="alias that it takes over")] = "champion",
    force: Annotated[bool, Option("--force", help="whatever the gate said of it")] = False,
    reason: Annotated[str, Option(help="why; kept with the version; --force needs it")] = "",
) -> None:
    """Make a version champion: one that the gate would promote, or any with --force."""
    name, slash, number = model.removeprefix("models:/").rpartition("/")
    if not slash or not number.isdecimal():
        raise InputError(f"'{model}' is not a version: give NAME/VERSION, as evaclip/7")
    if force and not reason.strip():
        raise InputError("--force needs --reason TEXT: it is kept with the version")
    from tasks.register import promotion  # imports mlflow, as the next one does
    from tasks.register.model_versions import open_registry

    profile = load_profile()
    with open_registry(profile.mlflow_uri) as (store, _):
        standing = promotion.standing_of(store, name, int(number))
        if not force and standing.gate != "promote":
            said = f"said {standing.gate.upper()}" if standing.gate else "was not asked"
            raise InputError(
                f"the gate {said} of {name}/{number}: add --force --reason TEXT to make it "
                f"{alias} all the same"
            )
        before = promotion.champion_of(store, name, alias)
        who = getpass.getuser()
        moved = promotion.promote_version(
            store, name, alias, int(number), "force" if force else "command", who, reason
        )
    if moved:
        announce_where_served(name, int(number), before.version if before else None, alias)
    console.print(f"{name}/{number} {'is' if moved else 'was'} {alias}")


def rollback(
    name: Annotated[str, Argument(metavar="NAME", help="of the registered model")],
    to: Annotated[int | None, Option(metavar="VERSION", help="another one than the last")] = None,
    alias: Annotated[str, Option(help="alias that goes back")] = "champion",
    reason: Annotated[str, Option(help="why; kept with the version")] = "",
) -> None:
    """Make the previous champion the champion again."""
    from tasks.register.model_versions import open_registry
    from tasks.register.promotion import history, roll_back  # imports mlflow

    profile = load_profile()
    with open_registry(profile.mlflow_uri) as (store, _):
        before, now = roll_back(store, name, alias, to, getpass.getuser(), reason)
        moves = history(store, name, alias)
    announce_where_served(name, now, before, alias)
    console.print(f"{name}@{alias}: version {before} -> {now}")
    for move in moves:
        why = f": {move.why}" if move.why else ""
        text = f"  {move.at[:19]}  version {move.version}  {move.how} by {move.by}{why}"
        console.print(text, soft_wrap=True)
