"""A person searches what is embedded, takes samples down, and a stranger's page gets nothing of it.

With PICTURES=FOLDER, what the person sees on the way is kept there.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest

pytest.importorskip("selenium", reason="`make test-browser` installs it")

from evaclip_model.create import create_model
from evaclip_model.model.model_config import ModelConfig
from evaclip_model.ports import find_free_port
from evaclip_model.weights.load import save_model
from flows.config.profile import Profile
from flows.config.recipe import load_recipe
from flows.graph.graph import draw_graph
from tasks.demo.demo import read_concepts, read_drawings
from tasks.progress import report_nothing
from tests.browser.person import Person, person
from tests.flows.command import CHECKOUT, environment
from tests.infra.site import wait_for
from tests.tasks.adopt.test_adopt import pack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not shutil.which("chromedriver"), reason="needs `apt-get install chromium chromium-driver`"
    ),
]
FRUIT = (
    *("grapes", "melon", "watermelon", "tangerine", "lemon", "banana", "pineapple", "mango"),
    *("red apple", "green apple", "pear", "peach", "cherries", "strawberry", "tomato", "coconut"),
)
SECRET = "me:secret"
ATTACK = "<img src=x onerror=\"document.title='theirs'\"><script>document.title='theirs'</script>"
RECIPE = """
name = "mine"
title = "Pictures"
[[adopt.sources]]
name = "animals"
files = "{folder}/animals"
[[adopt.sources]]
name = "fruit"
files = "{folder}/fruit"
[embed]
models = ["judge"]
[initialise]
model = "EVA02-CLIP-demo"
image_px = 32
[[train]]
name = "tune"
image_px = 32
global_batch = 32
samples_seen = 64
warmup_steps = 1
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawings of animals in a folder, of fruit in a shard with a stranger's words, embedded."""
    folder = tmp_path_factory.mktemp("search")
    drawings = read_drawings("twemoji")
    named = {one.name: one.key for one in read_concepts()}
    animals = [name for name in named if name.endswith(" face")][:40]
    (folder / "animals").mkdir()
    for name in animals:
        (folder / f"animals/{named[name]}.webp").write_bytes(drawings[named[name]])
        (folder / f"animals/{named[name]}.txt").write_text(name)
    fruit = [name for name in FRUIT if name in named]
    urls = [f"https://fruit.example/{named[name]}.webp" for name in fruit]
    captions = list(fruit)
    captions[0], urls[1] = ATTACK, "javascript:document.title='theirs'"
    pack(
        folder / "fruit/0.tar",
        [
            {
                "__key__": f"{number:05d}",
                "webp": drawings[named[name]],
                "txt": captions[number],
                "json": json.dumps({"uid": f"fruit-{number}", "url": urls[number]}),
            }
            for number, name in enumerate(fruit)
        ],
    )
    model = create_model(ModelConfig.load("EVA02-CLIP-demo").at_image_px(32), seed=5)
    save_model(model, folder / "judge")
    (folder / "mine.toml").write_text(RECIPE.format(folder=folder))
    with chdir(folder):  # where the model is named from
        recipe = load_recipe(str(folder / "mine.toml"), ())
        graph = draw_graph(recipe, folder / "runs", "sqlite:///none")
        for step in graph.data_steps:
            step.make_artifact(Profile(root=folder / "runs"), report_nothing)
    return folder / "runs"


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    """127.0.0.1:PORT of the page, served as `make up` serves it."""
    port = find_free_port()
    settings = {"PREFECT_API_AUTH_STRING": SECRET, "EVACLIP_WORKING_DIR": str(root.parent)}
    server = subprocess.Popen(
        [sys.executable, "-m", "flows.search.search_page", str(port)],
        cwd=CHECKOUT,
        env={**environment(root), **settings, "PYTHONPATH": str(CHECKOUT)},
    )

    def is_up() -> bool:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200
        except OSError:
            return False

    try:
        assert wait_for(is_up, 300)
        yield f"127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def somebody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    folder = tmp_path_factory.mktemp("browser")
    with person(folder / "profile", Path(os.environ.get("PICTURES", folder / "pictures"))) as one:
        yield one


def shown(somebody: Person) -> int:
    """Samples on the page whose picture the browser could draw."""
    script = "return [...document.images].filter(one => one.naturalWidth > 0).length"
    return int(str(somebody.runs(script)))


def test_from_a_text_to_a_dataset_version_without_what_was_found(
    address: str, root: Path, somebody: Person
) -> None:
    somebody.visit(f"http://{SECRET}@{address}/open")
    somebody.sees("56 samples that judge embedded")
    assert somebody.runs("return location.href") == f"http://{address}/"
    somebody.write(somebody.find("//input[@name='text']"), "a red apple")
    somebody.click("//button[.='Search']")
    somebody.sees("more like it")
    assert shown(somebody) == 24

    somebody.click("//select[@name='source']/option[.='fruit']")
    somebody.click("//button[.='Search']")
    page = somebody.sees("score", "onerror=", "javascript:document.title")  # as text alone
    assert "animals ·" not in page and page.count("fruit ·") == shown(somebody) == 16
    assert somebody.runs("return document.title") == "EVA-CLIP search"
    hrefs = somebody.runs("return [...document.links].map(one => one.protocol).join()")
    assert "javascript" not in str(hrefs)

    picture = root.parent / "mine.webp"
    apple = next(one.key for one in read_concepts() if one.name == "red apple")
    picture.write_bytes(read_drawings("twemoji")[apple])
    somebody.find("//input[@type='file']").send_keys(str(picture))
    somebody.click("//button[.='Search by picture']")
    somebody.sees("Like the picture")
    first = somebody.find("//article[1]")
    assert "red apple" in first.text and shown(somebody) == 25  # and the picture itself
    somebody.click("//article[1]//input")
    somebody.click("//article[2]//input")
    somebody.runs("scrollTo(0, 0)")
    somebody.picture("search-page")
    somebody.click("//article[1]//summary")
    (version,) = root.glob("dataset/*")
    somebody.sees(f"in dataset {version.name}", "fruit/0.tar")

    somebody.click("//button[starts-with(., 'Take down')]")
    somebody.sees(version.name, "would lose")
    assert [*root.glob("dataset/*")] == [version]
    somebody.click("//button[starts-with(., 'Make the version')]")
    somebody.sees(f"dataset     {version.name} -> ", "2 samples left out, 54 stay")
    (new,) = {*root.glob("dataset/*")} - {version}
    somebody.visit(f"http://{address}/?like=fruit-8&count=1")
    somebody.click("//summary")
    somebody.sees(f"left out of dataset {new.name} (takedown)")


PAGE = """<!doctype html><title>A stranger's page</title><script>
const search = "http://SEARCH"
async function attack() {
  const said = []
  for (const path of ["/", "/?text=apple", "/style.css", "/health", "/open"])
    for (const mode of ["cors", "no-cors"])
      try {
        const answer = await fetch(search + path, {mode, credentials: "include"})
        said.push(answer.type == "opaque" ? "opaque" : "READ " + await answer.text())
      } catch (error) { said.push("refused") }
  for (const path of ["/", "/takedown", "/takedown/confirmed"])
    for (const body of ["token=x&uid=fruit-3&digest=0123456789abcdef", new FormData()])
      try {
        const how = {method: "POST", mode: "no-cors", credentials: "include", body}
        said.push((await fetch(search + path, how)).type)
      } catch (error) { said.push("refused") }
  const frame = document.createElement("iframe")
  frame.src = search + "/?text=apple"
  document.body.append(frame)
  await new Promise(done => frame.onload = done)
  try { said.push("READ " + frame.contentDocument.body.innerText) } catch { said.push("refused") }
  const over = document.createElement("p")
  over.innerText = said.join("\\n") + "\\nover"
  document.body.append(over)
}
</script><body onload="attack()"><a href="http://SEARCH/?text=apple">a link</a>
<form method="post" action="http://SEARCH/takedown">
<input name="token" value="x"><input name="uid" value="fruit-3"><button>send</button></form>
</body>"""


def test_a_page_of_another_port_reads_nothing_and_starts_nothing(
    address: str, root: Path, somebody: Person
) -> None:
    somebody.visit(f"http://{SECRET}@{address}/open")  # from now on the browser adds the secret
    somebody.sees("samples that")
    before = {*root.glob("dataset/*"), *root.glob("takedowns/*")}

    class Stranger(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(PAGE.replace("SEARCH", address).encode())

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as stranger:
        threading.Thread(target=stranger.serve_forever, daemon=True).start()
        theirs = f"http://127.0.0.1:{stranger.server_port}/"
        somebody.visit(theirs)
        said = somebody.sees("over")
        assert "READ" not in said and said.count("refused") >= 6
        somebody.click("//button[.='send']")
        somebody.sees("the search answers its own pages alone")
        somebody.visit(theirs)
        somebody.sees("over")
        somebody.click("//a[.='a link']")
        page = somebody.sees("Another page links to a search here")
        assert "more like it" not in page
        stranger.shutdown()
    assert {*root.glob("dataset/*"), *root.glob("takedowns/*")} == before
    somebody.click("//a[@class='button']")  # a person may go on from there
    somebody.sees("more like it")
