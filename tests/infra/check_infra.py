"""`make check-infra`: everything of infra/ that runs without a cluster, and what it found.

Covers: saying in one sentence what is missing, or installing it (`--install`, as root, by apt);
one S3 server for all tests that want one; a skipped test is a failure.
Not here: the tests.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from tests.infra.conftest import PROGRAMS as OF_DOCKER
from tests.infra.servers import postgres_program, s3
from tests.infra.slurm import PROGRAMS as OF_SLURM

DEBIAN = {
    "postgresql": lambda: postgres_program("initdb") and shutil.which("psql"),
    "slurmctld slurmd slurm-client munge": lambda: all(map(found, OF_SLURM)),
    "docker.io docker-compose debootstrap": lambda: all(map(found, OF_DOCKER)),
}
OF_S3 = ("tests/tasks/register/test_s3.py", "tests/tasks/adopt/test_s3_shards.py")
TESTS = ("tests/infra", *OF_S3, "tests/flows/test_root_at_url.py")
CHECKOUT = Path(__file__).parents[2]


def main(arguments):
    install = "--install" in arguments
    missing = [packages for packages, there in DEBIAN.items() if not there()]
    if missing and install and os.geteuid() == 0:
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run([*command, *" ".join(missing).split()], check=True, env=env)
    elif missing:
        packages = " ".join(missing)
        return stop(f"install the packages {packages} (as root: make check-infra INSTALL=1)")
    if os.geteuid() != 0:
        return stop("run it as root, in a container say: Slurm's daemon switches users")
    for module in ("compose_spec", "kubeflow_trainer_api", "boto3", "psycopg2"):
        if importlib.util.find_spec(module) is None:
            return stop(f"the package {module} is missing: run `make check-infra`, which gets it")
    keys = {"AWS_ACCESS_KEY_ID": "evaclip", "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-test"}
    started = time.monotonic()
    with TemporaryDirectory() as folder, s3(Path(folder) / "s3", *keys.values()) as url:
        env = {**os.environ, **keys, "EVACLIP_TEST_S3_URL": url, "OMP_NUM_THREADS": "1"}
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-v", "-rPs", "--tb=short"]
        # Setting up builds images, and taking down removes their files: minutes, of no test.
        command += [f"--junit-xml={report}", "-o", "timeout_func_only=true", *TESTS]
        status = subprocess.run(command, cwd=CHECKOUT, env=env).returncode
        skipped = ElementTree.parse(report).getroot().findall(".//skipped")
    print(f"check-infra: {time.monotonic() - started:.0f} s")
    return status or (stop(f"{len(skipped)} tests were skipped, see above") if skipped else 0)


def found(program):
    return shutil.which(program) or Path(f"/usr/sbin/{program}").is_file()


def stop(sentence):
    sys.stderr.write(f"check-infra: {sentence}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
