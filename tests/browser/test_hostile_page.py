"""A page of a stranger beside the two UIs in one browser: it reads nothing and starts nothing."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="`make test-browser` installs it")

from tests.browser.person import Person, person
from tests.infra.site import Site, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not shutil.which("chromedriver"), reason="needs `apt-get install chromium chromium-driver`"
    ),
]
PAGE = """<!doctype html><title>A stranger's page</title><script>
const tries = TRIES
async function attack() {
  const said = []
  for (const [url, body] of tries)
    for (const mode of ["cors", "no-cors"])
      for (const type of ["application/json", "text/plain"]) {
        const how = {method: body ? "POST" : "GET", mode, body, credentials: "include"}
        if (body) how.headers = {"Content-Type": type}
        try {
          const answer = await fetch(url, how)
          const text = answer.type == "opaque" ? "" : await answer.text()
          said.push(answer.ok ? "READ " + url + " " + text : "refused " + text)
        } catch (error) { said.push("refused") }
      }
  document.body.innerText = said.join("\\n") + "\\nover"
}
</script><body onload="attack()"></body>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("site")) as up:
        yield up


@pytest.fixture
def somebody(tmp_path: Path) -> Iterator[Person]:
    with person(tmp_path / "profile", tmp_path / "pictures") as one:
        yield one


def test_a_page_of_another_port_reads_nothing_and_starts_nothing(
    site: Site, somebody: Person
) -> None:
    somebody.visit(site.link_to_mlflow("models"))
    somebody.sees("Registered Models")
    somebody.visit(site.link_to_search)
    somebody.sees("nothing under", "is embedded")
    somebody.visit(site.link)
    somebody.sees("pipeline")
    deployment = site.ask("deployments/name/takedown/takedown")["id"]
    run = json.dumps({"parameters": {"file": "x"}, "state": {"type": "SCHEDULED"}})
    tries = [
        [f"{site.prefect}/api/deployments/filter", "{}"],
        [f"{site.prefect}/api/deployments/{deployment}/create_flow_run", run],
        [f"{site.mlflow}/ajax-api/2.0/mlflow/experiments/search?max_results=9", None],
        [f"{site.mlflow}/api/2.0/mlflow/experiments/create", '{"name": "theirs"}'],
        [f"{site.search}/?text=apple", None],
        [f"{site.search}/takedown", "token=x&uid=y"],
    ]

    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(PAGE.replace("TRIES", json.dumps(tries)).encode())

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        for host in ("127.0.0.1", "localhost"):
            somebody.visit(f"http://{host}:{stranger.server_port}/")
            said = somebody.sees("over")
            assert "READ" not in said and said.count("refused") >= len(tries)
        stranger.shutdown()
    assert site.ask("flow_runs/filter", {}) == []
    found = site.ask_mlflow("experiments/search?max_results=9")["experiments"]
    names = [one["name"] for one in found]
    assert "theirs" not in names
    somebody.visit(f"{site.mlflow}/#/models")  # the browser still knows its person
    somebody.sees("Registered Models")
