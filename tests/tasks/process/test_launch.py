"""How ranks are started: the command line and the environment."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from evaclip_model.errors import InputError
from tasks.process.cluster import CLUSTERS, Program, job_name, job_script
from tasks.process.launch import (
    count_gpus,
    deepspeed_command,
    default_ranks,
    external_command,
    iterate_starts,
    rank_environment,
    read_hostfile,
    start_command,
    torchrun_command,
)
from tasks.train.config import Launch
from tasks.train.train import Inputs, trainer_program

JOB = Path("/somewhere/0a1b/train.json")
INPUTS = Inputs(Path("/somewhere/model"), Path("/somewhere/shards.json"))
PROGRAM = trainer_program(JOB, INPUTS)
ENCODERS = PROGRAM._replace(module="tasks.embed.embed_shard")
WORKER = ["-m", "evaclip_model.training.worker", str(JOB)]


def test_one_rank_is_a_plain_process_and_more_are_torchruns():
    assert torchrun_command(PROGRAM, Launch(), 1) == [sys.executable, *WORKER]
    two = torchrun_command(PROGRAM, Launch(), 2)
    assert two[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=2" in two
    assert "--rdzv-conf=store_type=file" in two
    assert not any("endpoint" in word for word in two)
    assert two[-3:] == WORKER


def test_torchruns_of_several_machines_meet_where_they_are_told():
    three = Launch(launcher="torchrun", nodes=3, rendezvous="first:29400")
    words = torchrun_command(PROGRAM, three, 8)
    assert {"--nnodes=3", "--nproc-per-node=8", "--rdzv-endpoint=first:29400"} < set(words)
    assert "--rdzv-id=0a1b" in words
    assert not any("127.0.0.1" in word for word in words)


def test_the_deepspeed_launcher_adds_no_argument_and_needs_no_ssh_to_this_machine(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# first\nlocalhost slots=2 # both\n\n")
    words = deepspeed_command(PROGRAM, hosts, read_hostfile(hosts), 1234)
    assert words[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert {"--no_local_rank", "--no_ssh_check", "--master_addr=127.0.0.1"} < set(words)
    assert words[-3:] == ["--module", "evaclip_model.training.worker", str(JOB)]
    two = deepspeed_command(PROGRAM, hosts, {"a": 8, "b": 8}, 1234)
    assert "--no_ssh_check" not in two and not any("master_addr" in word for word in two)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("gpu1 slots=8\ngpu2 8\n", r"line 2: 'gpu2 8' must be `name slots=PROCESSES`"),
        ("gpu1 slots=8\ngpu1 slots=8\n", r"line 2: 'gpu1 slots=8' must be .* each name once"),
        ("gpu1 slots=0\n", r"line 1: 'gpu1 slots=0' must be"),
        ("# none yet\n", r"names no machine"),
    ],
)
def test_what_is_wrong_with_a_hostfile_is_said_by_its_line(tmp_path, text, complaint):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_hostfile(tmp_path / "hosts")


def test_what_a_launcher_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = Launch(launcher="deepspeed", hostfile=tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"the hostfile .*nowhere cannot be read \(No such"):
        start_command(missing, PROGRAM, 1)
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    two = Launch(launcher="deepspeed", hostfile=tmp_path / "hosts")
    with pytest.raises(InputError, match="EVACLIP_LAUNCHER=deepspeed needs the program 'pdsh'"):
        start_command(two, PROGRAM, 1)
    with pytest.raises(InputError, match="EVACLIP_LAUNCHER=slurm needs the program 'sbatch'"):
        start_command(Launch(launcher="slurm", ranks=8), PROGRAM, 8)
    with pytest.raises(InputError, match="EVACLIP_LAUNCHER=kubernetes needs the program 'kubectl'"):
        start_command(Launch(launcher="kubernetes", ranks=8), PROGRAM, 8)
    own = Launch(launcher="external", ranks=8, submit_command="qsub {job}")
    with pytest.raises(InputError, match="EVACLIP_LAUNCHER=external needs the program 'qsub'"):
        start_command(own, PROGRAM, 8)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"nodes": 2}, "say what starts them by EVACLIP_LAUNCHER"),
        ({"nodes": 2, "launcher": "torchrun"}, "needs EVACLIP_RENDEZVOUS=host:port"),
        ({"rendezvous": "first"}, "must be host:port"),
        ({"launcher": "deepspeed"}, "needs EVACLIP_HOSTFILE"),
        ({"launcher": "deepspeed", "hostfile": "h", "ranks": 2}, "leave EVACLIP_RANKS"),
        ({"launcher": "slurm"}, "needs EVACLIP_RANKS"),
        ({"launcher": "kubernetes"}, "needs EVACLIP_RANKS"),
        ({"launcher": "external", "ranks": 8}, "needs EVACLIP_SUBMIT_COMMAND"),
        ({"profile_steps": "20-10"}, "must be the first and the last step, as 100-110"),
        ({"profile_steps": "20"}, "must be the first and the last step, as 100-110"),
        ({"profile_steps": (20, 10)}, "must be the first and the last step, as 100-110"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(settings, complaint):
    with pytest.raises(ValidationError, match=re.escape(complaint)):
        Launch(**settings)


def test_a_command_of_the_users_own_has_its_places_filled_in():
    own = Launch(
        launcher="external", ranks=8, nodes=4, submit_command="run -n {nodes}x{ranks} 'a {job}'"
    )
    assert external_command(PROGRAM, own) == ["run", "-n", "4x8", f"a {JOB}"]
    wrong = own.model_copy(update={"submit_command": "run {gpus}"})
    with pytest.raises(
        InputError, match=r"not a command with the placeholders \{job\}.*\('gpus'\)"
    ):
        external_command(PROGRAM, wrong)


def script_of(kind, template=None, program=PROGRAM):
    return job_script(template or CLUSTERS[kind].template, program, ranks=8, nodes=4)


def test_the_slurm_job_has_a_task_for_each_gpu_and_time_to_save():
    lines = script_of("slurm").splitlines()
    assert lines[0] == "#!/bin/bash"
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert options == {
        f"--job-name={job_name(JOB.parent)}",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--output=/somewhere/0a1b/train.log",
        "--open-mode=append",
        "--signal=TERM@120",
        "--requeue",
    }
    assert lines[-1].split()[-4:] == [sys.executable, *WORKER]


def test_the_kubernetes_job_is_a_pod_for_each_machine_that_finds_the_first():
    service, job = yaml.safe_load_all(script_of("kubernetes"))
    name = job_name(JOB.parent)
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name) and len(name) < 60
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    assert service["metadata"]["name"] == job["metadata"]["name"] == name
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert set(job["spec"]) == {
        *("completions", "parallelism", "completionMode", "backoffLimit", "template")
    }
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 4
    pod = job["spec"]["template"]["spec"]
    assert (pod["subdomain"], pod["restartPolicy"]) == (name, "Never")
    (container,) = pod["containers"]
    assert all(isinstance(word, str) for word in container["command"])
    assert {"--nnodes=4", "--nproc-per-node=8", f"--master-addr={name}-0.{name}"} < set(
        container["command"]
    )
    assert container["command"][-3:] == WORKER
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"artifacts": "/somewhere", "shared-memory": "/dev/shm"}
    assert {volume["name"] for volume in pod["volumes"]} == set(mounted)


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_no_name_of_a_folder_becomes_a_command_or_a_setting(kind):
    job = Path("/some where/$(touch x): #1/0a1b/train.json")
    program = Program(PROGRAM.module, job, job.parent / "train.log", (job.parent,))
    text = job_script(CLUSTERS[kind].template, program, ranks=8, nodes=4)
    if kind == "slurm":
        assert shlex.split(text.splitlines()[-1])[-1] == str(job)
    else:
        pod = list(yaml.safe_load_all(text))[1]["spec"]["template"]["spec"]
        assert pod["containers"][0]["command"][-1] == str(job)


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_ranks_that_encode_are_started_by_the_same_templates(kind):
    module = script_of(kind, program=ENCODERS).replace("tasks.embed.embed_shard", WORKER[1])
    assert module == script_of(kind)


@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_ranks_on_cores_alone_ask_for_no_gpu(kind):
    asked = script_of(kind, program=ENCODERS._replace(on_gpus=False))
    assert ("#SBATCH --gpus" not in asked) if kind == "slurm" else ("nvidia.com/gpu: 0" in asked)
    assert "gpu" in script_of(kind)


def test_ranks_that_get_nowhere_and_left_no_log_are_given_up_in_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"^the ranks ended 3 times without another file$"):
        list(iterate_starts(lambda: [1], len, tmp_path))


def test_a_template_or_a_command_that_starts_training_whatever_is_asked_for_is_refused(tmp_path):
    template = tmp_path / "own.sbatch"
    template.write_text("srun python -m evaclip_model.training.worker {{ job }}\n")
    assert script_of("slurm", template)
    with pytest.raises(InputError, match=r"does not start tasks\.embed\.embed_shard: write \{\{ m"):
        script_of("slurm", template, ENCODERS)
    own = Launch(launcher="external", ranks=8, submit_command="run {job}")
    assert external_command(PROGRAM, own) == ["run", str(JOB)]
    with pytest.raises(InputError, match=r"has no place \{module\}.*EVACLIP_EVALUATE_HERE"):
        external_command(ENCODERS, own)


def test_a_template_that_cannot_be_filled_in_is_named(tmp_path):
    template = tmp_path / "own.sbatch"
    with pytest.raises(InputError, match=r"own\.sbatch cannot be used \(.*No such file"):
        script_of("slurm", template)
    template.write_text("srun {{ jobb }}\n")
    with pytest.raises(InputError, match=r"'jobb' is undefined\): it is filled in with \{\{ name"):
        script_of("slurm", template)


@pytest.mark.parametrize(
    ("kind", "said", "over"),
    [
        ("slurm", "", True),
        ("slurm", "PENDING\n", False),
        ("slurm", "COMPLETING\n", False),
        ("kubernetes", "", True),
        ("kubernetes", "Service  ", True),
        ("kubernetes", "List Service Job  ", False),
        ("kubernetes", "List Service Job  FailureTarget", False),
        ("kubernetes", "List Service Job  FailureTarget Failed", True),
        ("kubernetes", "List Service Job  SuccessCriteriaMet Complete", True),
        ("kubernetes", "JobSet  StartupPolicyCompleted ", False),
        ("kubernetes", "JobSet  Completed ", True),
        ("kubernetes", "TrainJob  Suspended ", False),
        ("kubernetes", "TrainJob  Suspended Complete ", True),
    ],
)
def test_whether_a_job_is_over_follows_from_what_the_cluster_says(kind, said, over):
    assert CLUSTERS[kind].is_over(said) is over


def test_jobs_of_one_artifact_under_two_roots_have_two_names():
    assert job_name(Path("/a/train/0a1b")) != job_name(Path("/b/train/0a1b"))
    assert job_name(Path("/a/train/0a1b")) == job_name(Path("/a/train/0a1b/"))
    assert re.fullmatch(r"evaclip-my-run-[0-9a-f]{8}", job_name(Path("/a/My_run_")))


def test_cores_are_shared_out_and_ranks_stay_on_loopback():
    store = Path("/private/store")
    two = rank_environment({"HOME": "/h", "OMP_NUM_THREADS": "7"}, ranks=2, cores=5, store=store)
    assert two["OMP_NUM_THREADS"] == "2"
    assert two["GLOO_SOCKET_IFNAME"] == "lo"
    assert two["HOME"] == "/h"
    assert two["NCCL_SOCKET_IFNAME"] == "lo"
    assert two["EVACLIP_RANK_STORE"] == "/private/store"
    assert rank_environment({}, ranks=4, cores=2, store=store)["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("cores", "gpus", "ranks"), [(1, 0, 1), (2, 0, 2), (64, 0, 2), (4, 1, 1), (4, 8, 8), (8, 7, 7)]
)
def test_ranks_nobody_chose_follow_the_machine(cores, gpus, ranks):
    assert default_ranks(cores, gpus) == ranks


def test_gpus_are_counted_as_they_are_visible(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert count_gpus(None, tmp_path) == 2
    assert count_gpus("0", tmp_path) == 1
    assert count_gpus("", tmp_path) == 0
    assert count_gpus("-1", tmp_path) == 0
