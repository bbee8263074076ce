"""The hook that closes a run which died, in MLflow too.

It closes the run in MLflow, too. `python -m flows.reporting.crash_hook` is the same for whoever
stops a worker and with it its hooks; runs whose machine is gone are closed by the next run.
"""

from typing import Any

from flows.config.profile import load_profile
from tasks.lineage.journal import JOURNALS
from tasks.lineage.mlflow_store import Tracking
from tasks.tracking import TrackingStore


def close_tracking(flow: object, flow_run: object, state: Any) -> None:
    """Close whatever died on this machine; called by Prefect, with these names."""
    close_killed()


def close_killed() -> None:
    """Close in MLflow whatever died on this machine."""
    profile = load_profile()
    store = TrackingStore.at(profile.mlflow_uri, experiment="")
    Tracking(store, profile.root.resolve() / JOURNALS).close_killed()


if __name__ == "__main__":
    close_killed()
