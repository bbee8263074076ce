"""Settings that decide which samples a training stage sees, and as which pixels; part of
training/config.py's. What reading may cost is `ReadSettings` in reader.py."""

from typing import Literal, Self

from pydantic import Field, model_validator

from evaclip_model.config import Config


class SamplingConfig(Config):
    """Everything that a batch depends on besides its step and the shards."""

    image_px: int = Field(gt=0)
    """Side of the square training images, pixels; must be a multiple of the model's patch."""
    global_batch: int = Field(gt=1)
    """Image-text pairs in one optimizer step, over all ranks: each is contrasted with all."""
    source_weights: dict[str, float] = Field(default_factory=dict)
    """Source name -> share of the draws, any scale; empty: in proportion to their samples."""
    caption_weights: dict[str, float] = Field(default_factory=dict)
    """Name of captions (`stored` for those beside the images) -> share of the draws, any scale, one
    a sample; what a sample lacks is passed over. Empty: the stored ones alone."""
    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest area of the random crop, as a share of the image's."""
    decode: Literal["fast", "reference"] = "fast"
    """How images become pixels. "reference" is the authors' transform to the bit; "fast" takes less
    than half its time on JPEGs, within 2 levels of 255 of it, and is the same on all else."""
    sampling: Literal["exact", "resampled"] = "exact"
    """Order of a source. "exact" shows every sample once before any again; "resampled" draws whole
    shards with replacement, as the authors' runs did."""
    lanes: int = Field(default=16, gt=0)
    """Parallel data streams; ranks and their reading processes take whole ones where they can."""
    shuffle_buffer: int = Field(default=1000, gt=0)
    """Samples of one data stream and source that are shuffled together."""
    seed: int = Field(default=4096, ge=0)
    """Decides order, crops, masks and templates, each by the sample's position alone."""

    @model_validator(mode="after")
    def _streams_and_crops_fit(self) -> Self:
        if self.global_batch % self.lanes:
            raise ValueError(
                f"global_batch = {self.global_batch} must be a multiple of lanes = {self.lanes}"
            )
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale = [{low}, {high}] must rise and lie within 0 and 1")
        for name in ("source_weights", "caption_weights"):
            if any(weight <= 0 for weight in getattr(self, name).values()):
                raise ValueError(f"{name} must be above 0; leave out what is not to be drawn")
        return self
