"""A network that dies in a later pass, where nearly every URL failed before anyway."""

from __future__ import annotations

import socket
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaclip_model.errors import InputError
from tasks.download import watch_progress
from tasks.download.config import Crew, DownloadConfig
from tasks.download.download import download_images
from tasks.download.fetch_outcome import Outcome
from tasks.download.shards import HOSTS, FinishedShard, PlannedShard, silent_hosts
from tests.tasks.download.test_download import write_rows
from tests.tasks.download.web import serving

CONFIG = DownloadConfig(
    samples_per_shard=16,
    image_px=32,
    timeout_s=0.3,
    deadline_s=2.0,
    retries=0,
    passes=2,
    politeness={"pass_wait_s": 0},
    min_success_rate=0.1,
    allowed_networks=("127.0.0.1/32",),
)
GOOD, LATE = 16, 64


def silent_host() -> socket.socket:
    """Takes connections and never says a word."""
    return socket.create_server(("127.0.0.1", 0), backlog=256)


@pytest.mark.slow
def test_a_network_that_dies_in_the_second_pass_stops_it_early_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, out = tmp_path / "merged", tmp_path / "out"
    out.mkdir()
    tried: list[float] = []
    with silent_host() as late, serving() as web:
        port = late.getsockname()[1]
        urls = [web.url(f"ok/{number}.jpg") for number in range(GOOD)]
        urls += [f"http://127.0.0.1:{port}/ok/{number}.jpg" for number in range(LATE)]
        write_rows(merged / "laion2b" / "part-00000.parquet", "laion2b", urls)

        def cut_the_network(done: float, total: float, detail: str = "") -> None:
            if detail.startswith("pass 2:"):
                tried.append(done)
                if web.socket.fileno() >= 0:
                    # that few URLs would stop the first pass too, whose rows are not mixed here
                    monkeypatch.setattr(watch_progress, "COLLAPSE_URLS", 8)
                    monkeypatch.setattr(watch_progress, "COLLAPSE_S", 1.0)
                    web.shutdown()
                    web.server_close()

        with pytest.raises(InputError, match=r"network.* is down: .*1 hosts that gave images"):
            download_images(CONFIG, merged, out, Crew(1, 4), cut_the_network)
    assert max(tried) < LATE, "it went through the whole pass"
    assert list((out / "pass-2" / "shards").glob("*_stats.json")) == []
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("*_stats.json")}
    assert len(kept) == (GOOD + LATE) / CONFIG.samples_per_shard

    with serving(web.port), serving(port):
        made = download_images(CONFIG, merged, out, Crew(1, 8), lambda *_: None)
    assert made.counts["samples"] == GOOD + LATE
    assert made.counts["pass2.samples"] == LATE
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def finished(shards: Path, urls: dict[str, str]) -> list[FinishedShard]:
    """A finished shard whose table has these URLs with their statuses."""
    shards.mkdir()
    table = pa.table({"url": list(urls), "status": list(urls.values())})
    pq.write_table(table, shards / "000000.parquet")
    planned = PlannedShard(0, "laion2b", len(urls))
    return [FinishedShard(planned, Counter({Outcome.SUCCESS: 1}), 1, 0.0)]


def test_one_host_of_many_that_answers_proves_the_network(tmp_path: Path) -> None:
    with serving() as web:
        dead = {f"http://127.0.0.1:{port}/x.jpg": "success" for port in range(1, HOSTS)}
        shards = finished(tmp_path / "shards", dead | {web.url("missing"): "success"})
        assert silent_hosts(shards, tmp_path / "shards", CONFIG) == 0
        assert web.hits["/missing"] == 1, "a refusal is an answer"


def test_only_hosts_that_gave_images_are_asked(tmp_path: Path) -> None:
    with serving() as web:
        urls = {
            web.url("ok/1.jpg"): "failed_to_download",
            "http://127.0.0.1:1/a.jpg": "success",
            "http://127.0.0.1:1/b.jpg": "success",
        }
        shards = finished(tmp_path / "shards", urls)
        assert silent_hosts(shards, tmp_path / "shards", CONFIG) == 1
        assert web.hits.total() == 0


def test_without_a_single_image_nobody_can_be_asked(tmp_path: Path) -> None:
    shards = finished(tmp_path / "shards", {"http://127.0.0.1:1/a.jpg": "failed_to_download"})
    assert silent_hosts(shards, tmp_path / "shards", CONFIG) == 0
