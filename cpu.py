"""What makes a CPU fast: on AMD's, products by oneDNN; on all, memory that is not given back between steps.

`F.linear` of fp32 goes to MKL, which uses half the width of an AMD processor's vectors (AVX2); oneDNN, which comes
with PyTorch too, uses all of it (AVX-512). The sums are the same but for rounding. On Intel's, on GPUs, in bf16 and
under torch.compile a `Linear` is torch's own.
"""

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


def is_amd() -> bool:
    with suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return "AuthenticAMD" in platform.processor()  # not Linux


HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
ONEDNN = HAS_ONEDNN and is_amd()  # Intel's own MKL is as fast on Intel's in stage 1, and faster in stage 2


def keep_memory():
    """glibc returns large blocks to the system when they are freed, and every page of the next one costs a fault.

    What is kept may be a sixth more than is needed at once. MALLOC_MMAP_THRESHOLD_ in the environment overrides this.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with suppress(OSError, AttributeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: smaller blocks come from the heap,
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which does not shrink


def by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b of x (..., in), W (out, in), b (out,); x and W may be transposed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class LinearFunction(torch.autograd.Function):
    """y = x W^T + b, so dx = dy W, dW = dy^T x, db = dy summed."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # (..., in), (out, in), (out,)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return by_onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # (..., out)
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx = by_onednn(dy, weight.T) if of_x else None  # (..., in)
        dy = dy.flatten(0, -2)  # (N, out)
        dW = by_onednn(dy.T, x.flatten(0, -2).T) if of_weight else None  # (out, in)
        return dx, dW, dy.sum(0) if of_bias else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """F.linear: x (N..., in), weight (out, in), bias (out,) -> (N..., out)."""
    fp32 = x.is_cpu and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if ONEDNN and fp32 and x.numel() and not torch.compiler.is_compiling():  # oneDNN fails where there are no rows
        return LinearFunction.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)
