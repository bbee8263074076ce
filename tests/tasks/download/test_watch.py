"""The line that people see, and when a run is stopped."""

from __future__ import annotations

from collections import Counter

import pytest

from tasks.download.fetch_outcome import Outcome
from tasks.download.watch_progress import CounterReader, OutcomeCounter, Progress, Watch


def progress(fetched_bytes: int = 0, **counts: int) -> Progress:
    return Progress(
        Counter({Outcome(word): number for word, number in counts.items()}), fetched_bytes
    )


def test_the_line_says_how_far_how_fast_and_how_long() -> None:
    watch = Watch(1_000, 100_000, 0.3)
    watch.take_progress(0.0, progress())
    watch.take_progress(10.0, progress(success=900, not_found=100, fetched_bytes=25_000_000))
    assert watch.progress_line() == "900 fetched (90.0%), 25 MB, 100 URLs/s, 00:16:20 left"
    assert watch.rows_done == 2_000
    assert watch.progress_figures() == {
        "urls_per_s": 100,
        "success_rate": 0.9,
        "fetched_bytes": 25e6,
    }


def test_the_speed_is_that_of_the_last_minute() -> None:
    watch = Watch(0, 10**6, 0.3)
    for second in range(0, 200, 5):
        watch.take_progress(float(second), progress(success=second * 10))
    for second in range(200, 300, 5):
        watch.take_progress(float(second), progress(success=2_000 + (second - 200) * 50))
    assert ", 50 URLs/s," in watch.progress_line()


@pytest.mark.parametrize("word", ["dns", "connection", "timeout"])
def test_a_network_that_goes_down_is_told_from_dead_links(word: str) -> None:
    watch = Watch(0, 10**6, 0.3)
    watch.take_progress(0.0, progress(success=50_000, not_found=5_000))
    watch.take_progress(3.0, progress(success=50_010, not_found=5_000, **{word: 190}))
    assert watch.network_down() is None, "too short a time to be sure"
    watch.take_progress(6.0, progress(success=50_010, not_found=5_000, **{word: 290}))
    message = watch.network_down()
    assert message is not None
    assert message.startswith("the network or its name service is down: 290 of the last 300 URLs")
    assert f"(290 {word})" in message
    assert watch.list_dead() is None


def test_dead_links_do_not_look_like_a_dead_network() -> None:
    watch = Watch(0, 10**6, 0.3)
    watch.take_progress(0.0, progress())
    watch.take_progress(60.0, progress(success=100, not_found=1_500, dns=800, forbidden=300))
    assert watch.network_down() is None
    message = watch.list_dead()
    assert message is not None
    assert message.startswith("only 100 of 2,700 URLs gave an image, less than min_success_rate")
    assert "1,500 not_found, 800 dns, 300 forbidden" in message


def test_a_run_that_does_well_goes_on() -> None:
    watch = Watch(0, 10**6, 0.3)
    for second in range(100):
        watch.take_progress(float(second), progress(success=30 * second, timeout=60 * second))
    assert (watch.network_down(), watch.list_dead()) == (None, None)


def test_counters_are_summed_over_shards_and_finished_ones_are_read_once(tmp_path) -> None:
    reader = CounterReader(tmp_path)
    with OutcomeCounter(tmp_path, 3) as running:
        with OutcomeCounter(tmp_path, 4) as done:
            done.count_outcome(Outcome.SUCCESS, 100)
            done.count_outcome(Outcome.TIMEOUT, 0)
        running.count_outcome(Outcome.SUCCESS, 50)
        for _ in range(2):
            seen = reader.read_counts()
            assert seen.counts == {Outcome.SUCCESS: 2, Outcome.TIMEOUT: 1}
            assert seen.fetched_bytes == 150
            assert len(seen.busy) == 1
        assert reader.take_finished() == [4]
        assert [file.name for file in tmp_path.iterdir()] == ["3.counts"]
    assert reader.read_counts().busy == frozenset()
    assert reader.take_finished() == [3]
