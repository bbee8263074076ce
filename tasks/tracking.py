"""The MLflow store in which runs are tracked and models are registered, by its address.

Not here: what is logged (tasks/lineage), what is registered (tasks/register).
"""

from __future__ import annotations

import importlib
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from evaclip_model.errors import InputError
from tasks.redact import redact_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
_log = logging.getLogger(__name__)
_FROM_ENVIRONMENT_ONLY = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}
"""What MLflow reads from nowhere else; a value that is already set wins. By its own defaults it
keeps trying for about four minutes when a server is away."""
_IMPORTED_TOGETHER = (
    "mlflow",
    "mlflow.pyfunc",
    "mlflow.store.tracking.sqlalchemy_workspace_store",
    "mlflow.store.model_registry.sqlalchemy_workspace_store",
    "mlflow.store.workspace.utils",
    "mlflow.system_metrics.metrics.gpu_monitor",
)
_ANSWERED_NO = (
    *("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "INVALID_STATE"),
    *("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"),
)


@dataclass(frozen=True)
class TrackingStore:
    """An MLflow tracking store with its model registry."""

    uri: str
    """`sqlite:////absolute/path.db`, or `http(s)://host:port` of an MLflow server."""
    experiment: str

    @classmethod
    def at(cls, uri: str, experiment: str) -> TrackingStore:
        """The store at `uri`; a relative SQLite path is taken from the current folder. InputError:
        `uri` is neither an SQLite file nor an HTTP address, or holds a password, which would be
        logged and shown in many places."""
        if redact_text(uri) != uri:
            raise InputError(
                f"the tracking address '{redact_text(uri)}' holds a password: leave it out, and "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        if uri.startswith(SQLITE):
            return cls(SQLITE + str(Path(uri.removeprefix(SQLITE)).resolve()), experiment)
        if uri.startswith(("http://", "https://")):
            return cls(uri.rstrip("/"), experiment)
        raise InputError(
            f"'{uri}' is not a tracking address: give sqlite:///runs/mlflow.db or http://host:port"
        )

    @property
    def database(self) -> Path | None:
        """The SQLite file; None for a server."""
        return Path(self.uri.removeprefix(SQLITE)) if self.uri.startswith(SQLITE) else None

    def client(self) -> MlflowClient:
        """A client of this store alone; nothing global is set in MLflow."""
        import_mlflow()
        if self.database is not None and not self.database.exists():
            _make_database(self.database)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        except MlflowException as error:
            raise self.explain_error(error) from None

    @contextmanager
    def connect(self) -> Iterator[MlflowClient]:
        """A client for one block; InputError: the store does not answer, or refuses."""
        client = self.client()
        # after client(): it imports MLflow in the order that works
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        try:
            yield client
        except (MlflowException, RequestException) as error:
            raise self.explain_error(error) from error

    def experiment_id(self, client: MlflowClient) -> str:
        """The experiment's id, made when it is not there yet, restored when somebody deleted it."""
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            # A server decides where files go; MLflow's own default is the current folder.
            beside = self.database and (self.database.parent / "mlflow-artifacts").as_uri()
            made = find_answer(client.create_experiment, self.experiment, beside)
            if made is not None:
                return str(made)
            found = client.get_experiment_by_name(self.experiment)  # another process was first
        restore_experiment(client, found.experiment_id)
        return str(found.experiment_id)

    def try_out(self) -> str:
        """Write a run and a file of it, and read the file again; returns where files go. It is
        always the same run of the experiment, so that trying again leaves nothing new. InputError:
        the store or the place of its files does not take it."""
        name, text = "written.txt", uuid.uuid4().hex
        try:
            client = self.client()
            experiment = self.experiment_id(client)
            there = client.search_runs([experiment], max_results=1)
            run = there[0] if there else client.create_run(experiment, run_name="write test")
            client.log_text(run.info.run_id, text, name)
            with TemporaryDirectory() as folder:
                read = Path(client.download_artifacts(run.info.run_id, name, folder)).read_text()
            client.update_run(run.info.run_id, status="FINISHED")
        except InputError:
            raise
        except Exception as error:
            raise self.explain_error(error) from None
        if read != text:
            raise InputError(f"{run.info.artifact_uri} gives back other content than it was given")
        return str(run.info.artifact_uri)

    def explain_error(self, error: Exception) -> InputError:
        """The error that names a store which does not answer, refuses, or is of another MLflow."""
        said, store = " ".join(redact_text(str(error)).split()), f"the tracking store {self.uri}"
        if "database schema" in said:
            import mlflow

            return InputError(
                f"{store} has the schema of another version of MLflow than "
                f"{mlflow.__version__}, which is installed: install the version that it was made "
                f"with, or make a backup and run 'mlflow db upgrade {self.uri}'"
            )
        if getattr(error, "error_code", None) in ("UNAUTHENTICATED", "PERMISSION_DENIED"):
            return InputError(
                f"{store} does not let this user in ({said[:160]}): set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ask whoever runs it"
            )
        if is_refusal(error):
            return InputError(f"{store} refuses: {said[:300]}")
        return InputError(
            f"{store} does not answer ({said[:160]}): start it, or give another address, and run "
            "the same command again"
        )


def import_mlflow() -> None:
    """Import MLflow, quietly and whole, before a second thread uses it: its modules import each
    other in circles, and two threads in the middle of that see half-made modules."""
    for name, value in _FROM_ENVIRONMENT_ONLY.items():
        os.environ.setdefault(name, value)
    for name in _IMPORTED_TOGETHER:
        importlib.import_module(name)
    for noisy in ("mlflow.pyfunc", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # it raises what it logs


def restore_run(client: MlflowClient, run_id: str) -> bool:
    """Restore a run that somebody deleted, with its experiment; False for one that is gone for
    good."""
    run = find_answer(client.get_run, run_id)
    if run is None:
        return False
    restore_experiment(client, run.info.experiment_id)
    if client.get_run(run_id).info.lifecycle_stage == "deleted":
        client.restore_run(run_id)
        _log.warning("run %s was deleted in MLflow: it is restored", run_id)
    return True


def restore_experiment(client: MlflowClient, experiment: str) -> None:
    """Restore an experiment that somebody deleted: it keeps its name, and takes no runs."""
    found = client.get_experiment(experiment)
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(experiment)
        _log.warning("experiment '%s' was deleted in MLflow: it is restored", found.name)


def read_all_pages(search: Callable[..., Any], *query: str) -> list[Any]:
    """The results of an MLflow search, of all pages: one call answers one page."""
    page = search(*query)
    found = list(page)
    while page.token:
        page = search(*query, page_token=page.token)
        found += page
    return found


def find_answer(ask: Callable[..., Any], *about: object) -> Any:
    """The store's answer; None where it says that there is no such thing, or that it is there."""
    try:
        return ask(*about)
    except Exception as error:
        if not is_refusal(error):
            raise
        return None


def is_refusal(error: Exception) -> bool:
    """Tell whether the store answered no, so that asking again is of no use."""
    return getattr(error, "error_code", None) in _ANSWERED_NO


def is_answer(client: MlflowClient, error: Exception) -> bool:
    """Tell whether the store itself refused: a proxy before it says 404 while it is away."""
    if not is_refusal(error):
        return False
    client.search_experiments(max_results=1)  # raises when the store is away
    return True


def _make_database(path: Path) -> None:
    """Make an empty MLflow database beside its place and put it there whole: MLflow makes its
    tables one by one and cannot go on from half of them, which a killed process would leave."""
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: two threads of one process may both be first.
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        beside = Path(folder) / path.name
        uri = f"{SQLITE}{beside}"
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
        with suppress(FileExistsError):  # another was first; its database has runs by now
            path.hardlink_to(beside)
