"""robots.txt as RFC 9309 has it, and the manners at every hop of a redirect."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tasks.download.config import DownloadConfig
from tasks.download.fetch import Fetcher
from tasks.download.fetch_outcome import REFUSALS, Outcome
from tasks.download.politeness import MAX_RULES_BYTES, parse_rules


@pytest.mark.parametrize(
    ("rules", "path", "allowed"),
    [
        ("User-agent: *\nDisallow: /*.jpg$\n", "/x/y.jpg", False),
        ("User-agent: *\nDisallow: /*.jpg$\n", "/x/y.jpg?a", True),
        ("User-agent: *\nDisallow: /users/*/private\n", "/users/7/private/p.png", False),
        ("User-agent: *\nDisallow: /*?\n", "/p.png?x=1", False),
        ("User-agent: *\nDisallow: /p.png$\n", "/p.png", False),
        ("User-agent: *\nDisallow: /p.png$\n", "/p.png/q", True),
        ("User-agent: *\nDisallow: /a*a$\n", "/a", True),
        ("\ufeffUser-agent: *\nDisallow: /\n", "/p.png", False),
        ("User-agent: *\nDisallow: /\nAllow: /img/\n", "/img/p.png", True),
        ("User-agent: *\nAllow: /\nDisallow: /img/\n", "/img/p.png", False),
        ("User-agent: *\nAllow: /p\nDisallow: /p\n", "/p", True),
        ("User-agent: evaclip\nDisallow: /a/\n\nUser-agent: evaclip/1\nDisallow: /b/\n", "/b/", 0),
        ("User-agent: one\nUser-agent: evaclip\nDisallow: /\n", "/p", False),
        ("User-agent: *\nDisallow: /\n\nUser-agent: evaclip\nDisallow:\n", "/p", True),
        ("User-agent: *\n\nDisallow: /\n", "/p.png", False),
        ("User-agent: eva\nDisallow: /\n", "/p.png", True),
        ("User-agent: *\nDisallow: /b%C3%BCcher/\n", "/bücher/1.png", False),
        ("User-agent: *\nDisallow: /%7Eme/\n", "/~me/1.png", False),
        ("User-agent: *\nDisallow: /\n", "/robots.txt", True),
        ("nothing at all: \0\n<html>", "/p.png", True),
        ("User-agent: *\rDisallow: /\r", "/p.png", False),
        ("User-agent: *\nDisallow: /a%2Ab\n", "/a*b", False),
        ("User-agent: *\nDisallow: /a%2Ab\n", "/axb", True),
        ("User-agent: *\nDisallow: /a$b\n", "/a$b/c", False),
        ("User-agent: evaclip/2 (test)\nDisallow: /\n", "/p", False),
        ("User-agent: evaclip2\nDisallow: /\n", "/p", True),
        ("User-agent: *\nAllow: /\nContent-Usage: train-ai=n\n", "/p", False),
        ("User-agent: *\nContent-Usage: train-ai=n\nContent-Usage: /a/ train-ai=y\n", "/a/b", True),
        ("User-agent: *\nContent-Signal: search=yes, ai-train=no\n", "/p", False),
        ("User-agent: *\nContent-Signal: ai-train=yes\n", "/p", True),
        ("User-agent: *\nContent-Usage: pretrain-ai=n, train-ai=nearly\n", "/p", True),
    ],
)
def test_the_longest_matching_rule_of_our_groups_decides(rules, path, allowed) -> None:
    assert parse_rules(rules.encode(), "evaclip").allow(f"http://a.example{path}") == allowed


def test_half_a_rule_at_the_end_of_what_is_read_is_none() -> None:
    rules = b"User-agent: *\nDisallow: /\n" + b"#" * (MAX_RULES_BYTES - 37) + b"\nAllow: /public\n"
    assert rules[:MAX_RULES_BYTES].endswith(b"\nAllow: /pu")
    assert not parse_rules(rules, "evaclip").allow("http://a.example/pu")


def test_a_pattern_of_many_stars_costs_no_time() -> None:
    rules = parse_rules(b"User-agent: *\nDisallow: /" + b"*a" * 2000 + b"b\n", "evaclip")
    begin_s = time.process_time()
    assert rules.allow("http://a.example/" + "a" * 8000)
    assert time.process_time() - begin_s < 1


class _Target(http.server.BaseHTTPRequestHandler):
    now = most = 0
    lock = threading.Lock()

    def do_GET(self) -> None:
        if self.path == "/robots.txt":
            self.answer(b"User-agent: *\nDisallow: /private/\n")
            return
        if self.path == "/ai.txt":
            self.answer(b"User-Agent: *\nAllow: /\nDisallow: *.png\n")
            return
        with self.lock:
            _Target.now += 1
            _Target.most = max(_Target.most, _Target.now)
        time.sleep(0.2)
        with self.lock:
            _Target.now -= 1
        self.answer(b"image")

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Six hosts that redirect everything to one."""
    target = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Target)

    class Name(_Target):
        def do_GET(self) -> None:
            if self.path in ("/robots.txt", "/ai.txt"):
                self.answer(b"", 404)
                return
            location = f"http://127.0.0.1:{target.server_port}{self.path}"
            declined = {"X_Robots_Tag": "noai"} if "declined" in self.path else {}
            self.answer(b"", 302, Location=location, **declined)

    servers = [http.server.ThreadingHTTPServer((f"127.0.1.{n}", 0), Name) for n in range(1, 7)]
    for server in (target, *servers):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"http://{one.server_address[0]}:{one.server_port}" for one in servers]
    for server in (target, *servers):
        server.shutdown()
        server.server_close()


def test_slots_robots_and_opt_outs_hold_at_every_hop_of_a_redirect(names: list[str]) -> None:
    slots = {"host_connections": 2}
    settings = {"allowed_networks": ("127.0.0.0/8",), "retries": 0}
    fetcher = Fetcher(DownloadConfig(**settings, politeness=slots))
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda name: fetcher.fetch_image(f"{name}/a.jpg"), names))
    assert [body for body, _ in done] == [b"image"] * 6
    assert _Target.most == 2
    assert fetcher.fetch_image(f"{names[0]}/declined.jpg") == (None, REFUSALS[Outcome.OPTED_OUT])
    polite = Fetcher(DownloadConfig(**settings, politeness={**slots, "respect_robots": True}))
    assert polite.fetch_image(f"{names[0]}/private/b.jpg") == (None, REFUSALS[Outcome.ROBOTS_TXT])
    assert polite.fetch_image(f"{names[0]}/b.jpg") == (b"image", None)
    polite = Fetcher(DownloadConfig(**settings, politeness={**slots, "respect_ai_txt": True}))
    assert polite.fetch_image(f"{names[0]}/b.png") == (None, REFUSALS[Outcome.OPTED_OUT])
    assert polite.fetch_image(f"{names[0]}/b.jpg") == (b"image", None)
