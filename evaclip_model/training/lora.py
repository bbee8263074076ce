"""Low-rank updates of a model's projections (LoRA, arXiv 2106.09685), trained in place of all else.

torch's parametrisations hold them, because attention reads its weights instead of calling layers,
which adapter libraries replace: a weight is then what it was plus `up @ down`, wherever it is read,
and a saved model has the sum (weights/load.py).
"""

import re

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from evaclip_model.errors import InputError
from evaclip_model.model.clip import EvaClip
from evaclip_model.training.config import TrainConfig

_PROJECTION = re.compile(r"(?P<module>(visual|text)\..*blocks\.\d+\..*?)\.?(?P<leaf>\w*weight)")


class LowRankUpdate(nn.Module):
    """A weight [out, in] plus `scale * up @ down`, of up [out, rank] and down [rank, in]."""

    def __init__(self, weight: Tensor, rank: int, scale: float, random: torch.Generator) -> None:
        """Start without an effect: `up` is zero, `down` normal of variance 1 / in."""
        super().__init__()
        out, width = weight.shape
        self.scale = scale
        down = torch.randn(rank, width, generator=random) * width**-0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """[out, in] -> [out, in]."""
        return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def add_updates(model: EvaClip, config: TrainConfig) -> None:
    """Put an update on every projection that `config.lora` names and `config.freeze` does not.
    Raises InputError: one that is not there, none that is left, a rank that saves nothing."""
    lora = config.lora
    assert lora is not None, "the stage has the table"
    lora.require_projections(model.config)
    random = torch.Generator().manual_seed(config.seed)
    found = 0
    for name, parameter in list(model.named_parameters()):
        place = _PROJECTION.fullmatch(name)
        if place is None or parameter.ndim != 2 or not lora.is_named(name) or config.is_kept(name):
            continue
        if lora.rank >= min(parameter.shape):
            raise InputError(
                f"lora.rank = {lora.rank} is not below the sides of {name}, "
                f"{list(parameter.shape)}: give a lower one, or train the weight itself"
            )
        update = LowRankUpdate(parameter, lora.rank, lora.alpha / lora.rank, random)
        module = model.get_submodule(place["module"])
        parametrize.register_parametrization(module, place["leaf"], update)
        found += 1
    if not found:
        raise InputError("freeze leaves no projection of lora.on: take a part out of it")
