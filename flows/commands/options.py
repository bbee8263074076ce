"""Arguments that several commands share: the recipe, changes to it, the GPUs, a registry alias.

Not here: how their values are read (flows/config/recipe_loader.py, flows/config/gpu_spec.py).
"""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

RecipeName = Annotated[
    str, Argument(metavar="RECIPE", help="name of a recipe, or path of a .toml file")
]
Overrides = Annotated[
    list[str],
    Option(
        *("--set", "-s"),
        metavar="table.key=value",
        default_factory=list,
        show_default=False,
        help="change one setting of the recipe; may be given again",
    ),
]
Gpus = Annotated[
    list[str],
    Option(
        metavar="16xA100-40GB@2.5",
        default_factory=list,
        show_default=False,
        help="plan training on these GPUs, @ the price of one's hour; may be given again "
        "(the recipe's published ones)",
    ),
]
Utilisation = Annotated[
    float | None,
    Option(
        metavar="SHARE",
        help="share of the GPUs' peak that you expect, recomputed FLOPs counted too (what the "
        "paper's Table 6 reached)",
    ),
]
