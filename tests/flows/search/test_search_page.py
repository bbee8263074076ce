"""The search page over real shards: who may ask, what is found and shown, what a takedown does."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from flows.config.profile import Profile
from flows.search import search_page
from flows.search.search_page import make_app
from tasks.artifacts.artifact import Artifact
from tests.flows.test_adopted_recipe import Mine
from tests.flows.test_embedded_recipe import embedded, mine, model

__all__ = ["embedded", "mine", "model"]
PORT = 4300
OWN = f"http://127.0.0.1:{PORT}"
SECRET = ("me", "secret")


@pytest.fixture(scope="module")
def page(mine: Mine, embedded: dict[str, Artifact]) -> Iterator[TestClient]:
    app = make_app(Profile(root=mine.root), ":".join(SECRET), PORT)
    with TestClient(app, base_url=OWN) as client:
        client.auth = SECRET
        yield client


def uids_on(said: str) -> list[str]:
    return re.findall(r'name="uid" value="([^"]+)"', said)


def token_on(said: str) -> str:
    return re.search(r'name="token" value="([^"]+)"', said)[1]


@pytest.mark.parametrize(
    ("status", "path", "headers"),
    [
        (401, "/", {"authorization": "Basic bWU6d3Jvbmc="}),
        (401, "/?text=a", {"authorization": ""}),
        (421, "/", {"host": "evil.example"}),
        (421, "/", {"host": "127.0.0.1:80"}),
        (403, "/", {"origin": "http://127.0.0.1:8000"}),
        (403, "/?text=a", {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}),
        (403, "/", {"sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe"}),
        (403, "/health", {"sec-fetch-site": "cross-site"}),
        (200, "/health", {"authorization": ""}),
        (200, "/", {"origin": OWN, "sec-fetch-site": "same-origin"}),
        (400, "/?count=1000", {}),
        (400, "/?picture=AAAAA", {}),
        (400, "/?picture=AAAA", {}),
        (400, "/?like=nobody", {}),
    ],
)
def test_only_its_own_pages_with_the_secret_are_answered(
    page: TestClient, status: int, path: str, headers: dict[str, str]
) -> None:
    auth = None if "authorization" in headers else SECRET
    page.auth = auth
    answer = page.get(path, headers=headers)
    page.auth = SECRET
    assert answer.status_code == status, answer.text
    assert "script-src" not in (policy := answer.headers["content-security-policy"])
    assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy


def test_a_link_of_another_page_searches_nothing_by_itself(page: TestClient) -> None:
    foreign = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}
    said = page.get("/?text=a+red+apple", headers=foreign)
    assert said.status_code == 200 and 'href="/?text=a+red+apple"' in said.text
    assert uids_on(said.text) == [] and "Another page links" in said.text
    assert page.post("/takedown", headers=foreign).status_code == 403


def test_a_text_a_sample_and_a_picture_find_pictures_with_all_that_is_known(
    page: TestClient, mine: Mine, embedded: dict[str, Artifact]
) -> None:
    said = page.get("/?text=a+red+apple&count=7").text
    assert len(uids_on(said)) == 7 and said.count("data:image/webp;base64,") == 7
    like = uids_on(said)[3]
    again = page.get(f"/?like={like}").text
    assert uids_on(again)[0] == like and len(uids_on(again)) == 24
    assert f"dataset {embedded['dataset'].digest}" in again and f"{mine.folder}/shards" in again
    photos = page.get(f"/?like={like}&source=photos&count=99").text
    files = sorted((embedded["embed"].folder / "features").glob("*.parquet"))
    scores = pq.read_table(files[-1])["similarity"].to_pylist()
    assert len(uids_on(photos)) == len(scores)
    best = page.get(f"/?like={like}&source=photos&min_score={sorted(scores)[-3]}").text
    assert len(uids_on(best)) == 3
    picture = BytesIO()
    Image.new("RGB", (40, 30), "red").save(picture, "PNG")
    for content, status in ((picture.getvalue(), 200), (b"GIF89a nothing", 400)):
        files = {"file": ("<b>red.png", content)}
        found = page.post("/", files=files, data={"token": token_on(said)})
        assert found.status_code == status
        assert (len(uids_on(found.text)) == 24) == (status == 200)
        assert "<b>" not in found.text
    by_link = page.get("/", params={"picture": b64encode(picture.getvalue()).decode()}).text
    assert len(uids_on(by_link)) == 24 and 'name="picture" value="' in by_link


def test_an_upload_without_the_token_or_too_large_is_refused(
    page: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"file": ("a.png", b"x" * 100)}
    wrong = page.post("/", files=files, data={"token": "guessed"})
    assert wrong.status_code == 400 and "load its page again" in wrong.text
    monkeypatch.setattr(search_page, "MAX_UPLOAD_BYTES", 99)
    assert page.post("/", files=files, data={"token": "x"}).status_code == 413
    stream = iter([b"token=x"])
    assert page.post("/", content=stream).status_code == 413  # of unknown length


def test_what_is_ticked_is_listed_then_left_out_of_a_new_version(
    page: TestClient, mine: Mine, embedded: dict[str, Artifact]
) -> None:
    versions = {*mine.root.glob("dataset/*")}
    said = page.get("/?text=a+red+apple&count=100").text
    held = [
        uid
        for uid in uids_on(said)
        if f"in dataset {embedded['dataset'].digest}" in page_of(said, uid)
    ]
    chosen = {"token": token_on(said), "uid": held[:2]}
    planned = page.post("/takedown", data=chosen).text
    listed = Path(re.search(r"<code>(\S+/takedowns/\w+\.txt)</code>", planned)[1])
    assert listed.read_text().split() == sorted(held[:2])
    assert re.search(rf"{embedded['dataset'].digest}</code></td><td>45</td><td>2<", planned)
    assert {*mine.root.glob("dataset/*")} == versions, "nothing is made before it is confirmed"
    digest = {"digest": listed.stem}
    refused = page.post("/takedown/confirmed", data={"token": "guessed"} | digest)
    assert refused.status_code == 400
    done = page.post("/takedown/confirmed", data={"token": token_on(said)} | digest).text
    new = re.search(rf"{embedded['dataset'].digest} -&gt; (\w+): 2 samples left out", done)[1]
    assert (mine.root / "dataset" / new / "manifest.json").exists()
    after = page.get(f"/?like={held[0]}&count=1").text
    assert f"left out of dataset {new} (takedown)" in after
    assert page.post("/takedown", data={"token": token_on(said)}).status_code == 400
    two = {"token": token_on(said), "uid": [f"{held[2]}\n{held[3]}"]}
    said = page.post("/takedown", data=two)
    assert said.status_code == 400 and "cannot name one of these uids" in said.text


def page_of(said: str, uid: str) -> str:
    """What the page says of one sample."""
    return said.partition(f'value="{uid}"')[2].partition("</article>")[0]
