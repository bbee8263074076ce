"""What follows from all ranks' rows, alike everywhere."""

import math

import pytest
import torch

from evaclip_model.training.monitoring.metrics import RankRow, RankStats, gather_stats, is_straggler


def row(**changes):
    calm = {"loss": 2.0, "image_to_text_accuracy": 0.5, "text_to_image_accuracy": 0.5}
    calm |= {"text_tokens": 20.0, "finite": 1.0, "stop": 0.0, "save_failed": 0.0}
    return {**calm, "data_wait_s": 0.1, "forward_s": 0.4, **changes}


def together(*rows):
    return RankStats(tuple(RankRow(**row) for row in rows))


def test_one_rank_alone_hears_itself():
    heard = gather_stats(RankRow(**row(loss=torch.tensor(2.5))), torch.device("cpu"))
    assert heard == together(row(loss=2.5))


def test_the_slow_rank_is_named_whether_its_disk_or_its_gpu_is_slow():
    for slow in ({"data_wait_s": 0.6}, {"forward_s": 0.9}):
        rank, slowest, median = together(row(), row(), row(**slow), row()).slowest
        assert rank == 2
        assert (slowest, median) == (pytest.approx(1.0), pytest.approx(0.5))
        assert is_straggler(slowest, median)
    assert not is_straggler(0.7, 0.5)


def test_what_one_rank_says_all_know():
    heard = together(row(), row(loss=math.nan, finite=0.0), row(stop=1.0))
    assert heard.bad_ranks == (1,)
    assert heard.stop
    assert not heard.save_failed
    assert math.isnan(heard.means["loss"])
    assert heard.means["text_tokens"] == 20
