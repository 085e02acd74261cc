"""bf16 on processors that have no bf16 of their own.

There torch computes a bf16 convolution 40 times and a bf16 matrix product 6 times slower than in float32 (torch 2.15.0,
AVX2, two cores: 1.3 and 10 GFLOP/s against 57 and 58). So the operands are rounded to bf16 as autocast rounds them,
multiplied in float32, and the answer is rounded to bf16: the same numbers but for the order of sums.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

HALF = torch.bfloat16


def is_native() -> bool:
    """Whether this processor multiplies bf16 itself."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def speed_up_half(network: nn.Module, device: torch.device) -> None:
    """Let linear layers and convolutions of a network compute so whenever autocast asks for bf16.

    Nothing changes on an accelerator or a processor with bf16. To be called before adapters are attached, alike in
    training and sampling, which then agree to the bit.
    """
    if device.type != "cpu" or is_native():
        return
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.forward = partial(_forward, module, module.forward)  # type: ignore[method-assign]


def _forward(module: Any, original: Any, given: torch.Tensor) -> torch.Tensor:
    half = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == HALF
    if not half:
        answer: torch.Tensor = original(given)
        return answer
    geometry = None
    if isinstance(module, nn.Conv2d):
        geometry = (module.stride, module.padding, module.dilation, module.groups)
    rounded: torch.Tensor = _Rounded.apply(given, module.weight, module.bias, geometry)
    return rounded


class _Rounded(torch.autograd.Function):
    """Operands and answer in bf16, sums in float32; gradients alike.

    The backward pass keeps what torch's own would: rows only for a weight that learns, and the weight itself.
    """

    @staticmethod
    def forward(ctx: Any, given: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, geometry: Any) -> Any:
        rows = given.to(HALF)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        ctx.geometry, ctx.biased, ctx.shape = geometry, bias is not None, given.shape
        ctx.dtypes = given.dtype, weight.dtype, None if bias is None else bias.dtype
        factors = weight.to(HALF).float()
        added = None if bias is None else bias.to(HALF).float()
        with torch.autocast("cpu", enabled=False):
            if geometry is None:
                return F.linear(rows.float(), factors, added).to(HALF)
            return F.conv2d(rows.float(), factors, added, *geometry).to(HALF)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = gradients[0].float()
        rows, weight = ctx.saved_tensors
        factors = weight.to(HALF).float()
        rows = gradient.new_empty(1).expand(ctx.shape) if rows is None else rows.float()  # only its shape is asked for
        wanted = [*ctx.needs_input_grad[:2], ctx.biased and ctx.needs_input_grad[2]]
        with torch.autocast("cpu", enabled=False):
            if ctx.geometry is None:
                flat = gradient.flatten(0, -2)
                found = (
                    gradient @ factors if wanted[0] else None,
                    flat.T @ rows.flatten(0, -2) if wanted[1] else None,
                    flat.sum(0) if wanted[2] else None,
                )
            else:
                stride, padding, dilation, groups = ctx.geometry
                found = torch.ops.aten.convolution_backward(
                    gradient, rows, factors, None, stride, padding, dilation, False, [0, 0], groups, wanted
                )
        cast = [
            None if value is None or not want else value.to(HALF).to(dtype)
            for value, want, dtype in zip(found, wanted, ctx.dtypes, strict=True)
        ]
        return (*cast, None)
