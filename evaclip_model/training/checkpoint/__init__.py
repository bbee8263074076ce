"""Training state on disk, addressed by parameter name, so that any number of ranks can take it up.

`step-N/` holds `shard-R.safetensors` of each rank that wrote it and `manifest.json`, which is
written last: where the manifest is, the checkpoint is whole. Its files are in form.py, folders and
object stores in places.py, saving in writing.py, taking up in reading.py, what all ranks decide
alike in agreement.py, the checkpoints of other programs in importing.py.
Not here: when to save (trainer.py); finished models (weights.py).
"""

from evaclip_model.training.checkpoint.checkpoint_format import MANIFEST, Progress, settings_of
from evaclip_model.training.checkpoint.read_checkpoint import (
    checkpoints,
    load_newest,
    stored_parameters,
)
from evaclip_model.training.checkpoint.write_checkpoint import CheckpointWriter, save_checkpoint

__all__ = [
    "MANIFEST",
    "CheckpointWriter",
    "Progress",
    "checkpoints",
    "load_newest",
    "save_checkpoint",
    "settings_of",
    "stored_parameters",
]
