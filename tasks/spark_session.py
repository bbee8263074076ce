"""The Spark session of a stage: on the cluster that the user named, or on this machine's loopback
alone. Spark's defaults would listen on all networks, with a page that can end jobs."""

import os
from pathlib import Path
from typing import Any

LOOPBACK = "127.0.0.1"


def spark_builder(name: str, cores: int | None = None) -> Any:
    """A builder of the session `name`; without a cluster, on `cores` cores of this machine or all.
    A cluster is named as for any Spark program: PYSPARK_SUBMIT_ARGS="--master spark://...", MASTER,
    or `spark.master` in the defaults of SPARK_CONF_DIR."""
    from pyspark.sql import SparkSession

    builder: Any = SparkSession.builder.appName(name)
    if _names_cluster():
        return builder
    here = {"spark.driver.host": LOOPBACK, "spark.driver.bindAddress": LOOPBACK}
    return builder.master(f"local[{cores or '*'}]").config(
        map={**here, "spark.ui.enabled": "false"}
    )


def _names_cluster() -> bool:
    if "--master" in os.environ.get("PYSPARK_SUBMIT_ARGS", "") or os.environ.get("MASTER"):
        return True
    defaults = Path(os.environ.get("SPARK_CONF_DIR") or "/nowhere") / "spark-defaults.conf"
    lines = defaults.read_text().splitlines() if defaults.is_file() else []
    return any(line.split()[:1] == ["spark.master"] for line in lines)
