"""The hook that closes a run which died, in MLflow too.

`python -m flows.reporting.crash_hook` is the same for whoever stops a worker and with it its hooks;
runs whose machine is gone are closed by the next run.
"""

from flows.config.profile import load_profile
from tasks.lineage.journal import JOURNALS
from tasks.lineage.mlflow_store import Tracking
from tasks.tracking import TrackingStore


def close_tracking(flow: object = None, flow_run: object = None, state: object = None) -> None:
    """Close in MLflow whatever died on this machine; Prefect calls it with these names."""
    profile = load_profile()
    store = TrackingStore.at(profile.mlflow_uri, experiment="")
    Tracking(store, profile.root.resolve() / JOURNALS).close_killed()


if __name__ == "__main__":
    close_tracking()
