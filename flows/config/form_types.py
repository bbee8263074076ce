"""Types of a flow's form, whose rules the server checks before a run.

Prefect stores each rule as JSON Schema with the deployment, so recipes that are added later are
known to the form after the next `make up`.
"""

from typing import Annotated

from pydantic import Field

from flows.config.recipe_loader import recipe_names

# A browser's regular expressions refuse most of what re.escape would write.
_NAMES = "|".join(name.replace(".", "[.]") for name in recipe_names())
RecipeName = Annotated[str, Field(pattern=rf"^({_NAMES}|.+[.]toml)$")]
"""One of the project's recipes, or the path of a .toml file as the worker sees it."""
# No address with an "@": the server keeps parameters in clear, a password too.
_NO_PASSWORD = "([^@]*|([^:]|:[^/]|:/[^/])*)"
_OVERRIDE = rf"^[A-Za-z_][\w-]*([.][\w-]+)*={_NO_PASSWORD}$"
Overrides = tuple[Annotated[str, Field(pattern=_OVERRIDE)], ...]
"""Changes to a recipe, each `table.key=value`; none with a password in an address."""
