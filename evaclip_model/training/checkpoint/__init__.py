"""Training state on disk, addressed by parameter name, so that any number of ranks can take it up.

`step-N/` holds `shard-R.safetensors` of each rank that wrote it and `manifest.json`, which is
written last: where the manifest is, the checkpoint is whole. Folders and object stores are in
storage.py, saving in write_checkpoint.py, restoring in read_checkpoint.py, the agreement of all
ranks in consensus.py, the checkpoints of other programs in deepspeed_import.py.
Not here: the files' format (weights/checkpoint_format.py); when to save (training/trainer.py);
finished models (weights/).
"""

from evaclip_model.training.checkpoint.read_checkpoint import load_newest, settings_of
from evaclip_model.training.checkpoint.write_checkpoint import CheckpointWriter, save_checkpoint
from evaclip_model.weights.checkpoint_format import TrainingProgress

__all__ = [
    "CheckpointWriter",
    "TrainingProgress",
    "load_newest",
    "save_checkpoint",
    "settings_of",
]
