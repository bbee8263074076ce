"""The models that look at every sample: the `[embed]` table of a recipe; teachers that look at what
a training stage shows are in its own table.

Not here: which samples their scores leave out (the dataset stage).
"""

from pydantic import Field

from evaclip_model.choices import Precision
from evaclip_model.config import Config
from evaclip_model.reading.config import SamplingConfig
from evaclip_model.training.config import TrainConfig
from tasks.artifacts.artifact import Stage

STAGE = Stage(
    "embed",
    1,
    tools=("torch", "pillow", "pyarrow"),
    ignores=("models",),  # their content is among the parents
)
# A crop is a part of an image: a teacher sees it at a size of its own.
_SHOWN = {*SamplingConfig.model_fields, "samples_seen", "epochs"} - {"image_px"}
_SHOWN |= {"caption_templates", "caption_separator"}
_OTHERS = {*TrainConfig.model_fields, *TrainConfig.RENAMED} - _SHOWN
TEACH = Stage("teach", 1, tools=STAGE.tools, ignores=tuple(_OTHERS))
"""Its artifact has files of reading/teacher_features.py, in the same folder."""
FEATURES = "features"
"""Folder of the artifact: `000000.parquet` a shard of the verification that is used, by its number.
Columns: place (in the shard, int32), uid, image and text (unit features, float16 lists of equal
length), similarity (float32: their product before they were rounded). Flawed samples have no row.
"""


class EmbedConfig(Config):
    models: tuple[str, ...] = Field(min_length=1)
    """What opens them, as `score` takes it: a saved model's folder, `models:/NAME@ALIAS`,
    `FILE:ARCHITECTURE`, `open_clip:NAME/WEIGHTS`. The first one's similarity is a sample's score.
    """
    precision: Precision = "fp32"
