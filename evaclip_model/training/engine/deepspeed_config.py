"""DeepSpeed's configuration, as a pure function of a training stage's settings. Imports neither
torch nor DeepSpeed.

Source: the authors' published commands (ZeRO stage 1, fp16 with a dynamic loss scale, norm 5).
"""

from typing import Any

from evaclip_model.training.config import TrainConfig

LARGEST_BUCKET = 200_000_000
"""Gradient elements reduced together at most."""
MIN_LOSS_SCALE = 1
"""Lowest factor on fp16's loss; scaling cannot mend a gradient that overflows there."""


def deepspeed_config(
    config: TrainConfig, ranks: int, parameters: int, *, accumulates: bool = False
) -> dict[str, Any]:
    """DeepSpeed's configuration, ready for JSON; `parameters` is the model's size. A rank's share
    of the global batch is one micro-batch to DeepSpeed even when it comes in parts (`accumulates`),
    which are added up in fp32: the contrastive loss is not a sum over parts."""
    share = -(-config.global_batch // ranks)
    settings: dict[str, Any] = {
        "train_batch_size": share * ranks,  # DeepSpeed only compares it with the shares
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero_stage,
            # Both would move parameters away from where the map to their fp32 masters says.
            "round_robin_gradients": False,
            "parameter_alignment": False,
            # DeepSpeed allocates as much in every step, however small the model is.
            "reduce_bucket_size": min(parameters, LARGEST_BUCKET),
        },
        # 0 switches it off; without the key DeepSpeed 0.19 clips at 1.
        "gradient_clipping": config.grad_clip_norm or 0.0,
    }
    if config.precision == "bf16":
        # A gradient that is not finite never gets as far as DeepSpeed's step (engine.py).
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
    if config.precision == "fp16":
        settings["fp16"] = {
            "enabled": True,
            "loss_scale": 0,  # which means dynamic
            "initial_scale_power": 16,
            "loss_scale_window": 1000,
            "hysteresis": 2,
            "min_loss_scale": MIN_LOSS_SCALE,
        }
        # Stage 0 would divide the sum over ranks, which overflows where no rank's gradient does.
        settings["prescale_gradients"] = config.zero_stage == 0
    # Stage 0 has no such buffer: there the engine keeps the sum itself.
    if accumulates and config.precision != "fp32" and config.zero_stage > 0:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
