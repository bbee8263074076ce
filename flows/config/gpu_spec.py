"""GPUs as a person writes them: how many, which, their memory, and what an hour of one costs."""

import re
from dataclasses import dataclass
from typing import Self

from evaclip_model.errors import InputError
from evaclip_model.training.cost import BF16_PEAKS, peak_flops

_FORM = re.compile(r"(?i)(\d+)x([a-z]+\d+\w*(?: [a-z]+)?)-(\d+)GB(?:@(\d+(?:\.\d+)?))?")


@dataclass(frozen=True)
class Machines:
    """A number of equal GPUs."""

    count: int
    gpu: str
    """Name, as `peak_flops` knows it."""
    memory_gb: int
    """Of one, as it is sold: an "80GB" GPU has 80."""
    price: float | None = None
    """Of one for an hour, in whatever currency it was given."""

    @classmethod
    def parse_spec(cls, text: str) -> Self:
        """Read COUNTxGPU-MEMORYGB[@PRICE], like `16xA100-40GB@2.5`."""
        found = _FORM.fullmatch(text.strip())
        if not found or int(found[1]) == 0:
            raise InputError(
                f"'{text}' names no GPUs: write COUNTxGPU-MEMORYGB, and @PRICE of one GPU's hour "
                "where it matters, like 16xA100-40GB@2.5"
            )
        if peak_flops(found[2]) is None:
            known = ", ".join(BF16_PEAKS)
            raise InputError(f"GPU '{found[2]}' has no known peak rate; there are: {known}")
        price = None if found[4] is None else float(found[4])
        return cls(int(found[1]), found[2], int(found[3]), price)

    def __str__(self) -> str:
        return f"{self.count} x {self.gpu} {self.memory_gb} GB"
