"""What makes a CPU fast: products by oneDNN, and memory that is not given back between steps.

`F.linear` of fp32 goes to MKL, which uses half the width of an AMD processor's vectors (AVX2); oneDNN, which comes
with PyTorch too, uses all of it (AVX-512). The sums are the same but for rounding. On GPUs, in bf16, where there is no
AVX-512 and under torch.compile a `Linear` is torch's own.
"""

import ctypes
from contextlib import suppress

import torch
import torch.nn as nn
import torch.nn.functional as F

ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def keep_memory():
    """glibc returns large blocks to the system when they are freed, and every page of the next one costs a fault."""
    with suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: smaller blocks come from the heap,
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which does not shrink


def by_onednn(x, weight, bias=None):
    """x W^T + b of x (..., in), weight (out, in) of any strides, bias (out,)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Product(torch.autograd.Function):
    """y = x W^T + b, so dx = dy W, dW = dy^T x, db = dy summed."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):  # (..., out)
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = by_onednn(dy, weight.T) if needs_x else None
        dy = dy.flatten(0, -2)
        d_weight = by_onednn(dy.T, x.flatten(0, -2).T) if needs_weight else None
        return dx, d_weight, dy.sum(0) if needs_bias else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear: x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    fp32 = x.is_cpu and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if ONEDNN and fp32 and x.numel() and not torch.compiler.is_compiling():  # oneDNN fails on zero rows
        return Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x):
        return linear(x, self.weight, self.bias)
