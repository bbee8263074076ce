"""Every file of infra/ against what would read it: its specification, schema or linter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flows.config.profile import Profile
from tasks.process.cluster import Program, job_name, job_script
from tasks.process.launch import WORKER, read_hostfile

INFRA = Path(__file__).parents[2] / "infra"
KUBERNETES = INFRA / "kubernetes"
VERSION = "1.31"
"""Of Kubernetes: the oldest whose schemas have all that the manifests use."""
TOOLS = Path(sys.executable).parent
pytestmark = pytest.mark.slow


def passes(*command):
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def documents(text):
    return [one for one in yaml.safe_load_all(text) if one]


def filled_in(template):
    """A job of four machines with eight ranks each."""
    run = Path("/runs/train/0a1b2c")
    reads = (Path("/runs/initialise/3d/model"), Path("/runs/dataset/4e/shards.json"))
    program = Program(WORKER, run / "train.json", run / "train.log", reads)
    return job_script(template, program, ranks=8, nodes=4)


def as_kubernetes_takes_it(document, tmp_path):
    path = tmp_path / f"{document['kind']}.yaml"
    path.write_text(yaml.safe_dump(document))
    passes(TOOLS / "kubernetes-validate", "-k", VERSION, "--strict", path)


def unknown_keys(document, model, at=""):
    """Paths of what the model leaves out when it reads and writes a document."""
    if isinstance(document, dict):
        for key, value in document.items():
            if not isinstance(model, dict) or key not in model:
                yield f"{at}.{key}"
            else:
                yield from unknown_keys(value, model[key], f"{at}.{key}")
    elif isinstance(document, list):
        for number, value in enumerate(document):
            yield from unknown_keys(value, model[number], f"{at}[{number}]")


def as_its_model_takes_it(document, model):
    read = model.from_dict(document)
    assert list(unknown_keys(document, json.loads(read.to_json()))) == []


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_follow_the_specification(name, tmp_path):
    from compose_spec import PyCompose

    flat = tmp_path / name  # this reader knows neither anchors nor variables
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (INFRA / name).read_text())
    content = yaml.safe_load(text)
    content = {key: value for key, value in content.items() if not key.startswith("x-")}
    flat.write_text(yaml.dump(content, Dumper=WithoutAnchors))
    PyCompose.from_yaml(flat.read_text())


class WithoutAnchors(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


def test_what_compose_services_refer_to_is_there():
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    services = compose["services"]
    used = {"secrets": set(), "volumes": set(), "depends_on": set()}
    for service in services.values():
        for secret in service.get("secrets", []):
            used["secrets"].add(secret if isinstance(secret, str) else secret["source"])
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (INFRA / source).is_file()
            else:
                used["volumes"].add(source)
        used["depends_on"] |= set(service.get("depends_on", {}))
    assert used["secrets"] == set(compose["secrets"])
    assert used["volumes"] == set(compose["volumes"])
    assert used["depends_on"] <= set(services)
    waited_for = {
        name
        for service in services.values()
        for name, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_healthy"
    }
    assert all("healthcheck" in services[name] for name in waited_for)


def test_compose_publishes_on_loopback_alone_and_holds_no_secret():
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        image = service["image"]
        assert ":" in image and not image.endswith(":latest"), image
        for name, value in service.get("environment", {}).items():
            assert not re.search(r"PASSWORD$|SECRET|TOKEN|AUTH_STRING", name), name
            assert not re.search(r"://[^/@]*:[^/@]*@", str(value)), name
        assert "stop_grace_period" in service or service["restart"] == "on-failure"


def test_compose_builds_on_the_images_of_the_dockerfile_unless_others_are_named():
    args = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]["prefect"]["build"][
        "args"
    ]
    named = dict(re.findall(r"^ARG (\w+_IMAGE)=(\S+)$", (INFRA / "Dockerfile").read_text(), re.M))
    assert {name: f"${{{name}:-{image}}}" for name, image in named.items()}.items() <= args.items()
    assert len(named) == 2


def test_secrets_are_made_once_and_reach_a_command_by_their_names(tmp_path):
    folder = tmp_path / "secrets"
    for _ in range(2):
        passes(sys.executable, INFRA / "make_secrets.py", folder)
        made = {path.name: path.read_text() for path in folder.iterdir()}
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    assert set(made) == set(compose["secrets"])
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
    assert made["AWS_SECRET_ACCESS_KEY"] in made["s3.json"]
    shown = subprocess.run(
        [INFRA / "with-secrets.sh", "env"],
        env={"PATH": os.environ["PATH"], "SECRETS_FOLDER": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert f"PREFECT_API_AUTH_STRING={made['PREFECT_API_AUTH_STRING']}" in shown


def test_manifests_of_kubernetes_are_what_it_takes(tmp_path):
    for document in documents((KUBERNETES / "workers.yaml").read_text()):
        as_kubernetes_takes_it(document, tmp_path)
    for document in documents(filled_in(KUBERNETES / "train-job.yaml")):
        as_kubernetes_takes_it(document, tmp_path)


def test_jobsets_and_trainjobs_are_what_their_controllers_take(tmp_path):
    from kubeflow_trainer_api import models

    (jobset,) = documents(filled_in(KUBERNETES / "train-jobset.yaml"))
    as_its_model_takes_it(jobset, models.JobsetV1alpha2JobSet)
    (trainjob,) = documents(filled_in(KUBERNETES / "train-trainjob.yaml"))
    as_its_model_takes_it(trainjob, models.TrainerV1alpha1TrainJob)
    (runtime,) = documents((KUBERNETES / "training-runtime.yaml").read_text())
    as_its_model_takes_it(runtime, models.TrainerV1alpha1ClusterTrainingRuntime)
    assert trainjob["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    for spec in (jobset["spec"], runtime["spec"]["template"]["spec"]):
        for replicated in spec["replicatedJobs"]:
            job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}}
            as_kubernetes_takes_it({**job, "spec": replicated["template"]["spec"]}, tmp_path)


def test_a_whole_set_of_ranks_starts_again_and_finds_its_first():
    (jobset,) = documents(filled_in(KUBERNETES / "train-jobset.yaml"))
    (replicated,) = jobset["spec"]["replicatedJobs"]
    name, job = jobset["metadata"]["name"], replicated["template"]["spec"]
    assert jobset["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"
    assert job["completions"] == job["parallelism"] == 4 and job["backoffLimit"] == 0
    (container,) = job["template"]["spec"]["containers"]
    first = f"--master-addr={name}-{replicated['name']}-0-0.{name}"
    assert first in container["command"]
    assert len(f"{name}-{replicated['name']}-0-3") <= 63 and name == job_name(
        Path("/runs/train/0a1b2c")
    )


def test_a_flow_run_of_the_kubernetes_pool_is_a_job_that_kubernetes_takes(tmp_path):
    from prefect.utilities.templating import apply_values

    template = json.loads((INFRA / "work-pools" / "kubernetes.json").read_text())
    variables = template["variables"]["properties"]
    values = {name: one["default"] for name, one in variables.items() if one.get("default")}
    # Prefect's worker writes command and environment as lists, and a name, for each run.
    values |= {"gpus": 1, "name": "flow-run", "command": ["python", "-m", "prefect.engine"]}
    values |= {"env": [{"name": "PREFECT__FLOW_RUN_ID", "value": "x"}]}
    manifest = apply_values(template["job_configuration"]["job_manifest"], values)
    container = manifest["spec"]["template"]["spec"]["containers"][0]
    assert container["envFrom"][1] == {"secretRef": {"name": "evaclip-secrets"}}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    manifest["metadata"]["name"] = "flow-run-x"  # the validator wants one; Kubernetes makes it up
    as_kubernetes_takes_it(manifest, tmp_path)


def test_dockerfiles_scripts_and_yaml_pass_their_linters():
    images = Path(__file__).parent / "images"
    passes(TOOLS / "hadolint", INFRA / "Dockerfile", images / "Dockerfile")
    passes(TOOLS / "shellcheck", INFRA / "with-secrets.sh", *images.glob("*.sh"))
    sbatch = filled_in(INFRA / "slurm" / "train.sbatch")
    subprocess.run([TOOLS / "shellcheck", "-"], input=sbatch, text=True, check=True)
    rules = (
        "{extends: default, rules: {line-length: {max: 110}, document-start: disable, "
        "comments: {min-spaces-from-content: 1}, braces: {max-spaces-inside: 1}}}"
    )
    plain = [path for path in INFRA.glob("*.yaml")]
    plain += [KUBERNETES / "workers.yaml", KUBERNETES / "training-runtime.yaml"]
    passes(TOOLS / "yamllint", "--strict", "-d", rules, *plain)


@pytest.mark.parametrize("path", sorted((INFRA / "profiles").glob("*.env")), ids=lambda p: p.stem)
def test_profiles_are_settings_that_there_are(path, monkeypatch):
    known = {f"EVACLIP_{name.upper()}" for name in Profile.model_fields}
    given = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    names = {line.partition("=")[0] for line in given}
    assert {name for name in names if name.startswith("EVACLIP_")} <= known
    assert not any(re.search(r"PASSWORD|SECRET|AUTH_STRING", name) for name in names)
    for name in set(os.environ):
        if name.startswith(("EVACLIP_", "MLFLOW_")):
            monkeypatch.delenv(name)
    assert Profile(_env_file=path).root


def test_the_hostfile_is_one_that_the_launcher_reads():
    assert read_hostfile(INFRA / "hostfile.example") == {f"node-{n}": 8 for n in range(4)}
