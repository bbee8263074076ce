"""A rank's place from Slurm's variables."""

import pytest

from evaclip_model.training.worker import first_host, place_from_slurm

STEP = {
    "SLURM_JOB_ID": "70123",
    "SLURM_JOB_NODELIST": "gpu[01-02]",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[01-02]",
}


def test_a_task_of_srun_has_its_place():
    assert place_from_slurm(STEP) == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "gpu01",
        "MASTER_PORT": "22123",
    }


def test_a_meeting_point_that_is_set_stays():
    place = place_from_slurm({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (place["MASTER_ADDR"], place["MASTER_PORT"]) == ("10.0.0.1", "1234")


def test_another_launchers_ranks_and_the_shell_of_a_batch_job_are_left_alone():
    assert place_from_slurm({**STEP, "RANK": "0"}) == {}
    shell = {name: value for name, value in STEP.items() if "STEP" not in name}
    assert place_from_slurm({**shell, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}) == {}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu001", "gpu001"),
        ("gpu001,gpu007", "gpu001"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("gpu[7,9-11]", "gpu7"),
        ("rack[0-1]node[02-03].hpc,x", "rack0node02.hpc"),
    ],
)
def test_the_first_machine_of_a_node_list(nodes, first):
    assert first_host(nodes) == first
