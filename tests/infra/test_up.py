"""What `make up` and `make down` do before and after their servers."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest

from evaclip_model.ports import find_free_port


@pytest.fixture(scope="module")
def up() -> ModuleType:
    path = Path(__file__).parents[2] / "infra" / "up.py"
    spec = importlib.util.spec_from_file_location("infra_up", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_port_in_use_is_one_sentence_and_nothing_is_started(
    up: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        options = ["--root", str(tmp_path), "--prefect-port", "0", "--search-port", "0"]
        options += ["--mlflow-port", str(port)]
        assert up.main(["up", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"port {port}, which mlflow needs, cannot") and said.count("\n") == 1
    assert up.main(["up", "--root", str(tmp_path), "--prefect-port", "99999"]) == 2
    assert "port 99999, which prefect needs, cannot be opened" in capsys.readouterr().err
    assert list((tmp_path / "services").glob("*.log")) == []


def test_settings_come_from_the_file_that_the_flows_read_too(
    up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {"EVACLIP_MLFLOW_PORT": "5001"})
    (tmp_path / ".env").write_text("# mine\nEVACLIP_ROOT='there'\nEVACLIP_MLFLOW_PORT=5002\n")
    assert up.main(["down"]) == 0
    assert (tmp_path / "there" / "services").is_dir()
    assert os.environ == {"EVACLIP_ROOT": "there", "EVACLIP_MLFLOW_PORT": "5001"}


def test_the_secret_is_made_once_for_its_user_alone_and_never_half_written(
    up: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "prefect-auth"
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(os, "link", Mock(side_effect=KeyboardInterrupt))
        up.secret_in(place)
    assert list(tmp_path.iterdir()) == []
    secret = up.secret_in(place)
    assert secret.startswith("evaclip:") and len(secret) > 40
    assert place.stat().st_mode & 0o777 == 0o600
    assert up.secret_in(place) == secret
    assert list(tmp_path.iterdir()) == [place]


def test_down_without_servers_does_nothing(up: ModuleType, tmp_path: Path) -> None:
    assert up.main(["down", "--root", str(tmp_path)]) == 0


def test_down_leaves_a_program_alone_that_got_the_pid_of_a_dead_server(
    up: ModuleType, tmp_path: Path
) -> None:
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    services = tmp_path / "services"
    services.mkdir()
    noted = {"pid": bystander.pid, "started": "12345", "url": None}
    (services / "worker-gpu.json").write_text(json.dumps(noted))
    try:
        assert up.main(["down", "--root", str(tmp_path)]) == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_down_ends_a_service_with_everything_in_its_session(up: ModuleType, tmp_path: Path) -> None:
    # What a worker looks like: a child in a group of its own, which ignores SIGTERM.
    child = (
        "import signal, time; signal.signal(15, signal.SIG_IGN)\n"
        "print('up', flush=True); time.sleep(60)"
    )
    script = (
        "import os, subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], process_group=0)\n"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", script], start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    assert leader.stdout is not None
    said = {leader.stdout.readline().strip(), leader.stdout.readline().strip()}
    left = int((said - {"up"}).pop())
    services = tmp_path / "services"
    services.mkdir()
    noted = {"pid": leader.pid, "started": up.started_at(leader.pid), "url": None}
    (services / "worker-gpu.json").write_text(json.dumps(noted))
    assert up.main(["down", "--root", str(tmp_path)]) == 0
    leader.wait(10)
    assert not up.started_at(left)
    with pytest.raises(ProcessLookupError):
        os.kill(leader.pid, 0)


def test_up_names_every_champions_page_and_every_recipes_runs(
    up: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        "registered-models/search?max_results=100": {
            "registered_models": [
                {"name": "mine", "aliases": [{"alias": "champion", "version": "7"}]},
                {"name": "bare"},
            ]
        },
        "experiments/search": {
            "experiments": [
                {"name": "demo", "experiment_id": "3"},
                {"name": "Default", "experiment_id": "0"},
            ]
        },
    }
    monkeypatch.setattr(up, "ask", lambda url, *_: answers[url.partition("mlflow/")[2]])
    assert list(up.pages_of_models("http://127.0.0.1:5000", "me:secret")) == [
        ("mine@champion", "models/mine/versions/7"),
        ("runs of demo", "experiments/3/runs?workflowType=machine_learning"),
    ]


def test_a_server_that_is_late_is_asked_again_and_one_that_is_silent_is_one_sentence(
    up: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up, "ANSWER_S", 3)
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(1) as pool:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        asked = pool.submit(up.ask, url, "me:secret")
        listening.accept()[0].close()
        late, _ = listening.accept()
        late.recv(4096)
        late.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")
        late.close()
        assert asked.result() == []
        with pytest.raises(up.UserError, match=f"no answer to {url}: .*timed out"):
            up.ask(url, "me:secret")


def test_the_search_page_asks_for_the_secret_of_the_others(
    up: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = find_free_port()
    options = Namespace(root=str(tmp_path), prefect_port=0, mlflow_port=0, search_port=port)
    settings, (_, _, search, *_) = up.services(options)
    page, secret = f"http://127.0.0.1:{port}/", settings["PREFECT_API_AUTH_STRING"]
    search.up()
    try:
        assert capsys.readouterr().out == f"search        is up http://127.0.0.1:{port}\n"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(page)
        asked = urllib.request.Request(page, headers={"Authorization": f"Basic {up.basic(secret)}"})
        with pytest.raises(urllib.error.HTTPError, match="400") as nothing:
            urllib.request.urlopen(asked)
        assert f"nothing under {tmp_path} is embedded" in nothing.value.read().decode()
    finally:
        search.down()
    assert search.pid() is None
