"""Defaults of libraries that a result or a promise rests on, and that no file of ours sets: a
release that moves one fails here by its name. What can be set is set where it is used.
"""

import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden" / "deepspeed_settings.json"
FLOWS = ("evaluate", "pipeline", "prepare", "retrain", "score", "train")


def defaults_of(function: Any) -> dict[str, Any]:
    return {name: one.default for name, one in inspect.signature(function).parameters.items()}


def test_torch_computes_as_it_did_when_the_figures_were_measured() -> None:
    import torch
    from torch.backends import cuda, cudnn

    assert torch.get_default_dtype() is torch.float32
    assert torch.get_float32_matmul_precision() == "highest"  # parity in fp32; trainings in fp32
    assert cudnn.allow_tf32 and not cuda.matmul.allow_tf32  # the patches' convolution alone
    assert cuda.matmul.allow_bf16_reduced_precision_reduction
    assert cuda.matmul.allow_fp16_reduced_precision_reduction
    assert cuda.flash_sdp_enabled() and cuda.mem_efficient_sdp_enabled()  # attention = "auto"
    assert cuda.cudnn_sdp_enabled() and cuda.math_sdp_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


def test_layers_and_resizing_have_the_reference_s_settings_by_torchs_defaults() -> None:
    import torch

    assert defaults_of(torch.nn.LayerNorm)["eps"] == 1e-5  # the text tower's
    resize = defaults_of(torch.nn.functional.interpolate)
    assert (resize["align_corners"], resize["antialias"]) == (None, False)  # of positions, bicubic
    compile_ = defaults_of(torch.compile)
    assert (compile_["mode"], compile_["dynamic"], compile_["backend"]) == (None, None, None)
    assert torch._dynamo.config.recompile_limit == 8  # fullgraph = True fails beyond it


def test_checkpointed_blocks_draw_the_same_random_numbers_again() -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    drawn = []

    def block(x: Any) -> Any:
        drawn.append(torch.rand(3))
        return x * drawn[-1]

    checkpoint(block, torch.ones(3, requires_grad=True), use_reentrant=False).sum().backward()
    assert len(drawn) == 2 and drawn[0].equal(drawn[1])


def test_torchrun_leaves_starting_ranks_again_to_us() -> None:
    from torch.distributed.run import get_args_parser

    assert get_args_parser().parse_args(["train.py"]).max_restarts == 0


def test_deepspeed_adds_to_our_settings_what_it_added_when_they_were_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    from evaclip_model.training.config import TrainConfig
    from evaclip_model.training.engine.deepspeed_config import deepspeed_config

    given = {"name": "x", "image_px": 4, "samples_seen": 96, "global_batch": 96}
    config = TrainConfig(**given, precision="bf16")  # type: ignore[arg-type]
    made = DeepSpeedConfig(deepspeed_config(config, ranks=1, parameters=1000))
    expected = json.loads(GOLDEN.read_text())

    def plain(value: Any) -> Any:
        fields = getattr(type(value), "model_fields", None)
        return {name: getattr(value, name) for name in fields} if fields else value

    found = {name: plain(getattr(made, name)) for name in expected}
    del found["zero_config"]["leaf_module"]  # names of others' models
    assert json.loads(json.dumps(found)) == expected


def test_prefect_neither_repeats_flows_and_steps_nor_pickles_their_results() -> None:
    from prefect.cache_policies import NO_CACHE
    from prefect.settings.models.flows import FlowsSettings
    from prefect.settings.models.results import ResultsSettings
    from prefect.tasks import Task

    from flows import pipeline

    assert FlowsSettings.model_fields["default_retries"].default == 0
    assert ResultsSettings.model_fields["persist_by_default"].default is False
    for name in FLOWS:
        flow = getattr(pipeline, name)
        assert (flow.retries, flow.persist_result) == (0, None)
        assert flow.should_validate_parameters and flow.timeout_seconds is None
    from flows.graph.runner import merge_chunk, run_step

    tasks: list[Task[..., Any]] = [run_step, merge_chunk]
    for task in tasks:
        assert task.persist_result is False and task.cache_policy == NO_CACHE
        assert task.retries == (2 if task is merge_chunk else 0)


def test_a_run_from_a_terminal_is_not_taken_for_dead_by_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.commands.run import temporary_server

    environment = {"PATH": os.environ["PATH"], "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    monkeypatch.setattr(os, "environ", environment)
    with temporary_server(tmp_path):
        every_s = int(environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    rules = yaml.safe_load((ROOT / "infra/automations.yaml").read_text())["automations"]
    within = [one["trigger"]["within"] for one in rules if one["name"] == "dead runs crash"]
    assert [3 * every_s < most for most in within] == [True]


@pytest.mark.parametrize(
    "file",
    [
        "flows/commands/run.py",
        "infra/up.toml",
        "infra/compose.yaml",
        "infra/profiles/kubernetes.env",
    ],
)
def test_a_run_asks_a_server_again_that_is_lame_for_a_moment(file: str) -> None:
    """By default the first 500 of a server under load ends the run."""
    from prefect.settings import PREFECT_CLIENT_RETRY_EXTRA_CODES, temporary_settings

    found = re.search(r"RETRY_EXTRA_CODES\W+([\d,]+)", (ROOT / file).read_text())
    assert found, file
    with temporary_settings({PREFECT_CLIENT_RETRY_EXTRA_CODES: found[1]}):
        assert PREFECT_CLIENT_RETRY_EXTRA_CODES.value() == {500, 504}


@pytest.mark.parametrize("file", ["flows/commands/run.py", "infra/up.toml", "infra/compose.yaml"])
def test_a_server_forgets_within_an_hour_what_a_run_says_every_minute(file: str) -> None:
    """By default it keeps a week of it: 20,000 heartbeats and as many reports of progress."""
    from prefect.client.orchestration._artifacts import client
    from prefect.settings.models.server.services import ServerServicesDBVacuumSettings

    (found,) = re.findall(r'\{("prefect.flow-run.heartbeat".*?)\}', (ROOT / file).read_text())
    kept = json.loads(f"{{{found}}}")
    read = ServerServicesDBVacuumSettings(event_retention_overrides=kept).event_retention_overrides
    assert {name: kept.total_seconds() for name, kept in read.items()} == {
        "prefect.flow-run.heartbeat": 3600,
        "prefect.artifact.updated": 3600,
    }
    assert '"prefect.artifact.updated"' in Path(client.__file__).read_text()


def test_mlflow_takes_as_much_at_once_as_we_send_it_and_truncates_as_we_say() -> None:
    from mlflow import environment_variables as settings
    from mlflow.utils import validation

    from tasks.lineage import stage_record
    from tasks.register import promotion

    assert stage_record.MAX_PARAM_CHARS <= validation.MAX_PARAM_VAL_LENGTH
    assert stage_record.MAX_TAG_CHARS <= validation.MAX_TAG_VAL_LENGTH
    assert stage_record.MAX_METRICS_PER_CALL <= validation.MAX_METRICS_PER_BATCH
    assert promotion.MAX_TAG_CHARS <= validation.MAX_MODEL_REGISTRY_TAG_VALUE_LENGTH
    assert not settings.MLFLOW_ENABLE_ASYNC_LOGGING.default  # the journal's cursor moves on answers
    assert not settings.MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.default  # ours go by the journal
    assert not settings.MLFLOW_TRACKING_INSECURE_TLS.default


def test_img2dataset_gets_everything_that_decides_an_image_or_its_default_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the net
    from img2dataset.main import download

    from tasks.download import download_worker
    from tasks.download.config import Crew, DownloadConfig

    given: dict[str, Any] = {}

    class Img2dataset:
        @staticmethod
        def download(**settings: Any) -> None:
            given.update(settings)

    monkeypatch.setattr(download_worker, "_adapted_img2dataset", lambda job: Img2dataset)
    places = {"inputs": tmp_path, "output": tmp_path, "counters": tmp_path}
    crew = Crew(processes=1, threads=1)
    job = {"config": DownloadConfig(), "crew": crew, "extra_columns": (), "first_number": 0}
    download_worker.run_download(download_worker.WorkerJob(**places, **job))
    defaults = defaults_of(download)
    assert given.keys() <= defaults.keys()
    assert {name: value for name, value in defaults.items() if name not in given} == {
        "upscale_interpolation": "lanczos",
        "downscale_interpolation": "area",
        "disable_all_reencoding": False,
        "max_shard_retry": 1,
        "subjob_size": 1000,  # of Spark's and Ray's jobs
        "bbox_col": None,
        "verify_hash": None,
        "wandb_project": "img2dataset",  # which is off
        # The fetching is ours (fetch.py), so that these decide nothing.
        **{"timeout": 10, "retries": 0},
        **{"user_agent_token": None, "disallowed_header_directives": None},
    }
