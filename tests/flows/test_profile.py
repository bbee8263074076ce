"""Settings of the environment that say where and how training is started."""

from pathlib import Path

import pytest

from evaclip_model.errors import InputError
from evaclip_model.reading.urls import find_working_copy
from flows.audit.leftovers import find_leftovers
from flows.config.profile import load_profile
from flows.planning.run_plan import check_tracking_place
from tasks.train.config import Launch


@pytest.fixture
def profile_of(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # no .env

    def load(**settings):
        for name, value in settings.items():
            monkeypatch.setenv(f"EVACLIP_{name.upper()}", value)
        return load_profile()

    return load


def test_a_home_folder_in_a_file_that_no_shell_reads_is_found(profile_of, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("EVACLIP_ROOT", raising=False)
    (tmp_path / ".env").write_text("EVACLIP_ROOT=~/runs\n")
    assert profile_of().root == tmp_path / "home/runs"


def test_what_starts_training_is_read_from_the_environment(profile_of):
    profile = profile_of(
        launcher="slurm",
        ranks="8",
        nodes="4",
        micro_batch="512",
        train_engine="deepspeed",
        watchdog_s="600",
        tensorboard="true",
        compile="true",
        profile_steps="100-110",
        job_template="own.sbatch",
    )
    assert profile.launch == Launch(
        launcher="slurm",
        ranks=8,
        nodes=4,
        micro_batch=512,
        train_engine="deepspeed",
        watchdog_s=600,
        tensorboard=True,
        compile=True,
        profile_steps=(100, 110),
        job_template=Path("own.sbatch"),
    )


def test_without_settings_this_machine_is_used(profile_of):
    assert profile_of().launch == Launch()
    assert profile_of().machine.launch.is_local


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (False, 8, 4, "cuda")),
        ({"evaluate_ranks": "6"}, (False, 6, 4, "cuda")),
        ({"evaluate_gpus": "0"}, (False, 8, 4, "cpu")),
        ({"evaluate_here": "true", "evaluate_gpus": "2"}, (True, 0, 1, "cuda")),
    ],
)
def test_what_encodes_starts_as_training_does_unless_it_stays_here(profile_of, settings, expected):
    machine = profile_of(launcher="slurm", ranks="8", nodes="4", **settings).machine
    launch = machine.launch
    assert (launch.is_local, launch.ranks, launch.nodes, machine.device) == expected


def test_what_verifies_starts_by_settings_of_its_own(profile_of):
    assert profile_of(launcher="slurm", ranks="8").verify_launch.is_local
    profile = profile_of(verify_launcher="slurm", verify_ranks="64")
    assert (profile.launch.ranks, profile.verify_launch.ranks) == (8, 64)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"launcher": "slurm"}, r"^EVACLIP_LAUNCHER=slurm needs EVACLIP_RANKS"),
        ({"launcher": "slurmm"}, r"^environment setting EVACLIP_LAUNCHER should be 'auto'"),
        ({"nodes": "0"}, r"^environment setting EVACLIP_NODES should be greater than 0, got '0'"),
        ({"profile_steps": "7"}, r"setting EVACLIP_PROFILE_STEPS must be .* as 100-110, got 7"),
        ({"verify_nodes": "2"}, r"^EVACLIP_VERIFY_NODES is above 1: .* by EVACLIP_VERIFY_LAUNCHER"),
        ({"verify_ranks": "x"}, r"^environment setting EVACLIP_VERIFY_RANKS should be a valid int"),
        ({"rendezvous": "first"}, r"setting EVACLIP_RENDEZVOUS must be host:port, got 'first'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(profile_of, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        profile_of(**settings)


def test_a_root_at_a_url_has_a_working_copy_here_and_its_checkpoints_there(profile_of, tmp_path):
    url = f"file://{tmp_path}/store"
    profile = profile_of(root=f"{url}/", root_cache=str(tmp_path / "cache"), root_url="elsewhere")
    assert (profile.root_url, profile.root.parent) == (url, tmp_path / "cache")
    assert find_working_copy(str(profile.root / "train"))[:2] == (str(profile.root), url)
    assert profile.launch.checkpoint_url == f"{url}/checkpoints"
    assert profile.large_weights.place == f"{url}/weights"
    assert [one.what for one in check_tracking_place(profile)] == ["tracking"]
    assert profile_of(root=str(tmp_path / "runs")).root_url == ""


def test_a_root_at_a_url_refuses_what_needs_a_folder(profile_of, tmp_path):
    url = f"file://{tmp_path}/store"
    with pytest.raises(InputError, match=r"EVACLIP_ROOT is memory://runs, which ends with each"):
        profile_of(root="memory://runs")
    with pytest.raises(InputError, match=r"EVACLIP_LAUNCHER or .* set EVACLIP_ROOT_CACHE"):
        profile_of(root=url, launcher="slurm", ranks="8")
    profile = profile_of(root=url, launcher="slurm", ranks="8", root_cache=str(tmp_path / "shared"))
    with pytest.raises(InputError, match=r"^prune works on a root that is a folder"):
        find_leftovers(profile, days=0)
