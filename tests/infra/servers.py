"""Real servers for the time of a test, on loopback: PostgreSQL, and S3 by SeaweedFS.

PostgreSQL refuses to be root's, so as root it runs as the user `postgres`.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from evaclip_model.ports import find_free_port

SERVERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
START_S, END_S = 120.0, 40.0


def postgres_program(name):
    """A server program of PostgreSQL, which Debian keeps off the PATH; None without one."""
    return shutil.which(name, path=os.pathsep.join([*map(str, SERVERS[::-1]), os.environ["PATH"]]))


@contextmanager
def running(command, log, ready, env=None, user=None):
    """A process in a session of its own that answers before the block begins."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            user=user,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_S
        while not ready():
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, f"no answer: {log.read_text()[-3000:]}"
            time.sleep(0.2)
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def postgres(folder, databases, password):
    """A server with these databases for the user `evaclip`; yields its port."""
    folder.mkdir(parents=True)
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
        for above in folder.parents:  # pytest's folders are the tester's alone
            if above.stat().st_uid == os.geteuid() and above.is_relative_to("/tmp/"):
                above.chmod(above.stat().st_mode | 0o011)
    secret = folder / "password"
    secret.write_text(password)
    data, port = folder / "data", find_free_port()
    words = ["-D", data, "--username=evaclip", f"--pwfile={secret}", "--auth=scram-sha-256"]
    subprocess.run(
        [postgres_program("initdb"), *words], check=True, capture_output=True, user=user, cwd="/"
    )
    options = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""}
    settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    command = [postgres_program("postgres"), "-D", data, *settings]
    where = ["--host=127.0.0.1", f"--port={port}", "--username=evaclip"]
    env = {**os.environ, "PGPASSWORD": password}
    ready = [postgres_program("pg_isready"), *where]
    with running(
        command,
        folder.parent / "postgres.log",
        lambda: subprocess.run(ready, capture_output=True).returncode == 0,
        user=user,
    ):
        for database in databases:
            subprocess.run([postgres_program("createdb"), *where, database], check=True, env=env)
        yield port


@contextmanager
def s3(folder, access_key, secret_key):
    """A SeaweedFS with one identity; yields its address."""
    folder.mkdir(parents=True)
    key = {"accessKey": access_key, "secretKey": secret_key}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "evaclip", "credentials": [key], "actions": actions}
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    data = folder / "data"
    data.mkdir()
    # Each port brings one for gRPC, 10,000 higher.
    ports = [low_port() for _ in range(4)]
    names = ("master.port", "volume.port", "filer.port", "s3.port")
    options = [f"-{name}={port}" for name, port in zip(names, ports, strict=True)]
    weed = Path(sys.executable).with_name("weed")
    bound = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    bound += ["-volume.preStopSeconds=0", "-volume.max=20", "-master.volumeSizeLimitMB=64"]
    command = [weed, "server", f"-dir={data}", "-s3", f"-s3.config={config}", *bound, *options]
    with running(command, folder / "weed.log", lambda: listens(ports[-1])):
        yield f"http://127.0.0.1:{ports[-1]}"


def low_port():
    while (port := find_free_port()) > 50_000:
        continue
    return port


def listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
