"""The product of every linear layer, by the faster of torch's CPU libraries; names, shapes and
gradients are torch's.

torch multiplies float32 matrices on a CPU with MKL, whose kernels for processors of other makers
use half of their vector width; oneDNN, which torch carries too, uses all of it: 250 against 120
GFLOP/s on an AMD processor (BENCHMARKS.md). Both round float32 sums, in another order.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class Linear(nn.Linear):
    """`torch.nn.Linear` with the product of this module."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in], weight [out, in], bias [out] or none -> [..., out]."""
    takes_onednn = (
        not is_traced()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0  # oneDNN has no product of nothing
        and _HAS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
    )
    if not takes_onednn:
        return F.linear(x, weight, bias)
    out: Tensor = _OneDnnLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def is_traced() -> bool:
    """Return whether an exporter is recording: it needs plain operators, and sizes from shapes."""
    return (
        torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    )


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _compute_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        rows = gradient.flatten(0, -2)  # [all but the last, out]
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _compute_product(gradient, weight.t(), None) if for_x else None,
            _compute_product(rows.t(), x.flatten(0, -2).t(), None) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _multiply_on_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


# A compiler would look into the product and ask for weights packed for inference.
_opaque_multiply = torch.library.custom_op("evaclip::multiply", mutates_args=())(_multiply_on_cpu)


@_opaque_multiply.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _compute_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    multiply = _opaque_multiply if torch.compiler.is_compiling() else _multiply_on_cpu
    return multiply(x, weight, bias)
