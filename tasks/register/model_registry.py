"""A trained model as a version of a registered model: loadable anywhere, traceable to its rows.

Covers: uploading, the version with its tags, its description and its lineage, the alias of a
candidate.
Not here: what is uploaded, weights too large for it (model_package.py), pulling it back
(pull_model.py), whether it replaces the version in use (gate.py, promotion.py).

Killed at any moment, the next call finds what is there by its tags and goes on from it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from evaclip_model.files import write_atomically
from tasks.artifacts.artifact import MANIFEST, Address, Artifact, Made, sha256_of
from tasks.artifacts.provenance import LINEAGE, Lineage, lineage_of
from tasks.progress import Report, report_nothing
from tasks.register.config import COPIED, REGISTERED, LargeWeights, RegisterConfig
from tasks.register.model_package import pack_model, reference_to, version_description
from tasks.register.promotion import DIGEST_TAG, WEIGHTS_TAG
from tasks.tracking import TrackingStore, is_refusal, read_all_pages, restore_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_STEPS = 4


def register_model(
    config: RegisterConfig,
    trained: Artifact,
    evaluated: Artifact,
    store: TrackingStore,
    root: Path,
    out: Path,
    run_id: str | None = None,
    report: Report = report_nothing,
    large: LargeWeights = COPIED,
) -> Made:
    """Register `trained` under the config's name as a candidate, write `registered.json`.

    Args:
        config: name and aliases.
        trained: the artifact whose folder `model/` is registered.
        evaluated: its evaluation; its figures become tags of the version.
        store: the tracking store whose registry takes it.
        root: root of the artifacts, to find the ancestors whose digests become tags.
        out: folder of this stage's artifact.
        run_id: MLflow run that made the model, when it is known; the version links to it.
        report: called at every step.
        large: what becomes of weights too large for the registry.

    Raises:
        InputError: the store does not answer, or does not take the weights.
    """
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    folder = trained.folder / "model"
    lineage = lineage_of([evaluated, trained], root)
    tags = version_tags(trained, evaluated, lineage)
    try:
        client = store.client()
        report(0, _STEPS, "looking for the same model")
        if run_id is not None and not restore_run(client, run_id):
            run_id = None  # gone for good: the model is of no run
        version = _find_version(client, config.model_name, tags)
        if version is None:
            packer = _Packer(folder, out / "packed", large, lineage.to_json(), report)
            model_id = _logged_model(client, store, config, packer, tags, run_id)
            report(3, _STEPS, f"registering {config.model_name}")
            version = _create_version(client, store, config.model_name, model_id, run_id, tags)
        client.set_registered_model_alias(
            config.model_name, config.candidate_alias, version.version
        )
    except (MlflowException, RequestException) as error:
        raise store.away(error) from error
    finally:
        shutil.rmtree(out / "packed", ignore_errors=True)
    registered = {
        "name": config.model_name,
        "version": int(version.version),
        "alias": config.candidate_alias,
        "uri": f"models:/{config.model_name}/{version.version}",
        "tracking_uri": store.uri,
    }
    write_atomically(out / LINEAGE, lineage.to_json())
    write_atomically(out / REGISTERED, json.dumps(registered, indent=1) + "\n")
    report(_STEPS, _STEPS, f"{config.model_name} version {version.version} is there")
    return Made({"version": int(version.version)}, (out / REGISTERED, out / LINEAGE))


def forget_if_gone(address: Address, store: TrackingStore) -> None:
    """Unfinish a registration whose version the registry no longer has, so that it is made again.

    An alias that somebody moved since is left where it is.

    Raises:
        InputError: the store does not answer.
    """
    from mlflow.exceptions import MlflowException

    if not address.is_finished:
        return
    registered = json.loads((address.folder / REGISTERED).read_text())
    try:
        store.client().get_model_version(registered["name"], str(registered["version"]))
    except MlflowException as error:
        if not is_refusal(error):
            raise store.away(error) from error
        (address.folder / MANIFEST).unlink()


def version_tags(trained: Artifact, evaluated: Artifact, lineage: Lineage) -> dict[str, str]:
    """Tags of a version: what it is, what it was made from, and how well it does."""
    return {
        DIGEST_TAG: trained.digest,
        WEIGHTS_TAG: sha256_of(trained.folder / "model" / "model.safetensors"),
        **{
            f"{DIGEST_TAG}.{label}": digest
            for label, digest in sorted(lineage.unique_labels().items())
        },
        **{f"evaluation.{name}": f"{value:g}" for name, value in evaluated.counts.items()},
    }


def _same_tags_filter(tags: dict[str, str]) -> str:
    return " and ".join(f"tags.`{name}` = '{tags[name]}'" for name in (DIGEST_TAG, WEIGHTS_TAG))


def _find_version(client: MlflowClient, name: str, tags: dict[str, str]) -> ModelVersion | None:
    """The version of these very weights, made from this very chain."""
    for version in read_all_pages(client.search_model_versions, f"name = '{name}'"):
        if all(version.tags.get(tag) == tags[tag] for tag in (DIGEST_TAG, WEIGHTS_TAG)):
            return version
    return None


def _create_version(
    client: MlflowClient,
    store: TrackingStore,
    name: str,
    model_id: str,
    run_id: str | None,
    tags: dict[str, str],
) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = client.get_logged_model(model_id).artifact_location
    # A server wants the id, to check that the source belongs to it. MLflow's own SQLite store would
    # look the id up in whatever store the process has as its global one.
    checked_id = model_id if store.database is None else None
    version = client.create_model_version(
        name, source, run_id=run_id, tags=tags, model_id=checked_id
    )
    return client.update_model_version(
        name, version.version, version_description(name, version.version)
    )


@dataclass(frozen=True)
class _Packer:
    """Packs one model, when it turns out that it has to be."""

    model: Path
    packed: Path
    large: LargeWeights
    lineage: str
    report: Report

    def pack_model(self, weights_sha256: str, model_id: str, run_id: str | None) -> Path:
        """The packed model's folder."""
        self.report(1, _STEPS, "packing the model")
        reference = reference_to(self.model, weights_sha256, self.large)
        ids = {"model_id": model_id, "run_id": run_id}
        pack_model(self.model, self.packed, reference=reference, lineage=self.lineage, **ids)
        return self.packed / "model"


def _logged_model(
    client: MlflowClient,
    store: TrackingStore,
    config: RegisterConfig,
    packer: _Packer,
    tags: dict[str, str],
    run_id: str | None,
) -> str:
    """Upload the packed model; returns MLflow's id of it. One that is complete is used again."""
    from mlflow.entities import LoggedModelOutput

    experiment = store.experiment_id(client)
    for logged in client.search_logged_models([experiment], _same_tags_filter(tags)):
        if str(logged.status) == "READY":
            return str(logged.model_id)
        client.delete_logged_model(logged.model_id)
    logged = client.create_logged_model(
        experiment, config.model_name, source_run_id=run_id, tags=tags, model_type="zero-shot"
    )
    folder = packer.pack_model(tags[WEIGHTS_TAG], logged.model_id, run_id)
    packer.report(2, _STEPS, "uploading the model")
    client.log_model_artifacts(logged.model_id, str(folder))
    if run_id is not None:
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)
