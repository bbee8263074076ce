"""The loopback web over real HTTP: every fault, and the server's life and death."""

import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from evaclip_model.errors import InputError
from tasks.demo.config import DemoConfig
from tasks.demo.demo import Web, read_concepts, read_drawings, read_web, serve_pictures, split_path
from tests.tasks.demo.plan_metadata import WORKING, plan_rows

KEY = "1f34e"
APPLE = read_drawings("noto")[KEY]
CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def origin():
    with Web(0, read_web(), drip_s=3.0) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_drawing_is_served_as_committed(origin):
    with urlopen(f"{origin}/img/noto/{KEY}.webp") as answer:
        assert answer.headers["Content-Type"] == "image/webp"
        assert answer.read() == APPLE


def test_a_moved_drawing_is_found_by_following_the_redirect(origin):
    with urlopen(f"{origin}/moved/noto/{KEY}.webp") as answer:
        assert answer.url == f"{origin}/img/noto/{KEY}.webp"
        assert answer.read() == APPLE


@pytest.mark.parametrize(
    ("path", "status"),
    [(f"gone/noto/{KEY}", 404), (f"busy/noto/{KEY}", 503), ("img/noto/1", 404), ("x/noto/1", 404)],
)
def test_what_cannot_be_had_says_so(origin, path, status):
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{origin}/{path}.webp")
    assert refused.value.code == status


def test_a_redirect_loop_never_ends(origin):
    with pytest.raises(HTTPError, match="infinite loop"):
        urlopen(f"{origin}/loop/noto/{KEY}.webp")


def test_a_page_comes_instead_of_a_picture(origin):
    with urlopen(f"{origin}/page/noto/{KEY}.webp") as answer:
        assert answer.headers["Content-Type"] == "text/html"
        assert answer.read().startswith(b"<!doctype html>")


def test_a_broken_file_is_complete_as_http_but_half_a_picture(origin):
    with urlopen(f"{origin}/broken/noto/{KEY}.webp") as answer:
        assert answer.read() == APPLE[: len(APPLE) // 2]


def test_a_cut_connection_delivers_less_than_it_promised(origin):
    with (
        urlopen(f"{origin}/cut/noto/{KEY}.webp") as answer,
        pytest.raises(http.client.IncompleteRead),
    ):
        answer.read()


def test_a_slow_drawing_passes_every_read_but_takes_long_altogether(origin):
    started = time.monotonic()
    with urlopen(f"{origin}/slow/noto/{KEY}.webp", timeout=1.5) as answer:
        assert answer.read() == APPLE
    assert time.monotonic() - started > 2.5


def test_an_opt_out_is_said_in_the_header(origin):
    with urlopen(f"{origin}/optout/noto/{KEY}.webp") as answer:
        assert "noai" in answer.headers["X-Robots-Tag"]


@pytest.mark.parametrize(
    "target",
    [
        "/img/noto/1f34e.webp?alt=b#c",
        "/img/./noto/1f34e.%77ebp",
        "http://127.0.0.1:1/img/noto/1f34e.webp",
    ],
)
def test_spellings_of_a_path_lead_to_the_same_drawing(target):
    assert split_path(target) == ("img", "noto/1f34e.webp")


def test_nothing_outside_the_drawings_is_served(origin):
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{origin}/img/noto/../../../concepts.json")
    assert refused.value.code == 404


def test_rows_that_should_work_do_and_damaged_rows_do_not(origin):
    port = int(origin.rpartition(":")[2])
    rows = plan_rows("coyo700m", read_concepts(), port)
    seen = set()
    for row in rows:
        if row.kind in seen or row.kind not in {"sound", "moved", "unencoded", "gone", "busy"}:
            continue
        seen.add(row.kind)
        url = quote(row.url, safe=":/?=&")
        if row.kind in {"sound", "unencoded", *WORKING}:
            with urlopen(url) as answer:
                assert answer.read()
        else:
            with pytest.raises(HTTPError):
                urlopen(url)
    assert len(seen) == 5


def test_the_server_runs_for_the_length_of_the_block():
    port = find_free_port()
    with (
        serve_pictures(DemoConfig(port=port)),
        urlopen(f"http://127.0.0.1:{port}/img/noto/{KEY}.webp") as answer,
    ):
        assert answer.read() == APPLE
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), timeout=1)


def test_a_port_in_use_is_one_clear_sentence():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(InputError, match=f"port {port} is in use"),
            serve_pictures(DemoConfig(port=port)),
        ):
            pass
        alone = subprocess.run(
            [sys.executable, "-m", "tasks.demo.demo", "--port", str(port)],
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
        )
    assert alone.returncode != 0
    assert alone.stderr.startswith(f"port {port} is in use")
    assert "Traceback" not in alone.stderr


def test_the_server_dies_with_a_caller_that_is_killed():
    port = find_free_port()
    caller = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import time\n"
            "from tasks.demo.config import DemoConfig\n"
            "from tasks.demo.demo import serve_pictures\n"
            f"with serve_pictures(DemoConfig(port={port})):\n"
            "    print('up', flush=True)\n"
            "    time.sleep(60)\n",
        ],
        cwd=CHECKOUT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert caller.stdout.readline() == "up\n"
    socket.create_connection(("127.0.0.1", port), timeout=1).close()
    os.kill(caller.pid, signal.SIGKILL)
    caller.wait()
    caller.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("the server outlived its caller")
