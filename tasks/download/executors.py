"""Ways to spread the downloading processes: on this machine, by Spark, or by Ray.

Covers: the choice, and refusing one that cannot work here before anything is begun.
Not here: the processes themselves (download_worker.py); how they are started is img2dataset's.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Literal

from evaclip_model.errors import InputError

Distributor = Literal["multiprocessing", "pyspark", "ray"]


def require_distributor(name: Distributor) -> None:
    """Make sure that `name` can be used; img2dataset ends silently, having done nothing, if not.

    Raises:
        InputError: its package, or Spark's Java, is missing.
    """
    if name != "multiprocessing" and find_spec(name) is None:
        raise InputError(
            f"the download distributor '{name}' needs the package {name}, which is not installed: "
            f"pip install {name}, or use 'multiprocessing'"
        )
    if name == "pyspark" and not (os.environ.get("JAVA_HOME") or shutil.which("java")):
        raise InputError(
            "the download distributor 'pyspark' needs Java 17, but neither JAVA_HOME is set nor "
            "is there a java on the PATH: install it, or use 'multiprocessing'"
        )
