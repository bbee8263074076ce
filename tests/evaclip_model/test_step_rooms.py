"""How far a reader has to walk to follow one training step."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.evaclip_model.trainer_runs import job_of

TRACER = Path(__file__).with_name("step_tracer.py")
MOST_FILES, MOST_FILES_OF_TRAINING, MOST_FILES_WITH_READER = 20, 10, 24
AS_THE_DEMO = {
    "patch_dropout": 0.5,
    "crop_scale": [0.5, 1.0],
    "caption_separator": " ",
    "caption_templates": ["{}", "an emoji of {}"],
    "samples_seen": 4 * 24,
}


def test_a_training_step_passes_through_few_files(tiny_data, tmp_path):
    job = job_of(tiny_data, tmp_path / "run", engine="torch", **AS_THE_DEMO)
    ran = subprocess.run(
        [sys.executable, TRACER, job], capture_output=True, text=True, env=dict(os.environ)
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    own, with_reader = json.loads(ran.stdout)
    assert "training/trainer.py" in own
    of_training = [file for file in own if file.startswith("training/")]
    assert len(of_training) <= MOST_FILES_OF_TRAINING, of_training
    assert len(own) <= MOST_FILES, own
    assert len(with_reader) <= MOST_FILES_WITH_READER, with_reader
