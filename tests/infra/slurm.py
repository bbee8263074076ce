"""A real Slurm of one machine, for as long as a test needs it: controller, node, authentication.

Needs Debian's slurmctld, slurmd, slurm-client and munge, and root: slurmd switches users.
"""

import os
import shutil
import signal
import socket
import subprocess
import time

from evaclip_model.ports import find_free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "munged")
ENDS_S = 30.0


class Slurm:
    """Its daemons run until `close`; programs find it by SLURM_CONF."""

    def __init__(self, folder, cores, gpus):
        self.folder, self._started = folder, []
        self.conf = folder / "slurm.conf"
        folder.mkdir(parents=True)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        self._authenticate()
        self._write_conf(cores, gpus)
        os.environ["SLURM_CONF"] = str(self.conf)
        self._start("slurmctld", "-D", "-f", self.conf)
        self._start("slurmd", "-D", "-f", self.conf)
        self._await(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T"))

    def close(self):
        if (self.folder / "spool").is_dir():
            self.run("scancel", "--user=root")
            self._await(lambda: not self.run("squeue", "--noheader"))
        for daemon in reversed(self._started):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(ENDS_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        os.environ.pop("SLURM_CONF", None)

    def run(self, *command):
        ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        return ended.stdout.strip()

    def job(self, number):
        """What the controller knows of a job, ended ones too for an hour."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _authenticate(self):
        folder = self.folder / "munge"
        folder.mkdir(mode=0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self.socket = folder / "socket"
        names = {"socket": self.socket, "key-file": key, "pid-file": folder / "pid"}
        names |= {"log-file": folder / "log", "seed-file": folder / "seed"}
        options = [f"--{name}={path}" for name, path in names.items()]
        self._start("munged", "--foreground", "--force", *options)
        self._await(self.socket.exists)

    def _write_conf(self, cores, gpus):
        host, folder = socket.gethostname(), self.folder
        devices = f"/dev/tty[1-{gpus}]"  # any device files will do
        (folder / "gres.conf").write_text(f"Name=gpu File={devices}\n")
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        self.conf.write_text(
            f"""\
ClusterName=evaclip
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={find_free_port()}
SlurmdPort={find_free_port()}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={self.socket}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=gpu Nodes={host} Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes={host} PriorityTier=10 PreemptMode=OFF
"""
        )

    def _start(self, program, *options):
        path = shutil.which(program) or f"/usr/sbin/{program}"
        with (self.folder / f"{program}.out").open("ab") as log:
            words = [path, *map(str, options)]
            self._started.append(
                subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
            )

    def _await(self, condition, within_s=60.0):
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"Slurm does not start: see {self.folder}"
            time.sleep(0.2)
