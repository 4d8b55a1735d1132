"""Speeds up training and generation on CPUs from outside the model, in three ways.

    freed memory    glibc keeps freed memory in the process instead of returning it to the system after each step.
    oneDNN          On AMD processors with AVX-512, oneDNN replaces MKL in `torch.nn.functional.linear` for fp32.
    attention       In training in bf16, short sequences attend by two plain products, whose backward pass is faster.

MKL uses only AVX2 on AMD processors, half of their vector width; oneDNN, which PyTorch also contains, uses AVX-512.
Both compute the same sums in a different order. On Intel processors MKL is as fast in stage 1 and faster in stage 2.

`distributed.start_processes` calls `speed_up` once per process. The model stays plain PyTorch: it looks up `F.linear`
and `F.scaled_dot_product_attention` at each call, so the replacements take effect in every module.
"""

import ctypes
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from glibc's malloc.h
TORCH_LINEAR, TORCH_ATTENTION = F.linear, F.scaled_dot_product_attention
WIDE = 256  # the width of a LLaMA from which a training step in bf16 takes at most 0.6 times as long as in fp32, by AMX
SHORT = 512  # positions below which the products of `attention` in bf16 take less time than PyTorch's kernel


def speed_up(keep_memory: bool = True):
    """Applies these measures to this process, for as long as it lives. Calling it again changes nothing.

    keep_memory: False returns freed memory to the system, for models that need nearly all of it.
    """
    if keep_memory:
        keep_freed_memory()
    if prefers_onednn():
        F.linear = linear
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]


# --- memory


def keep_freed_memory():
    """Makes glibc keep freed memory for the next allocations. Each page that it returns costs a page fault later.

    The process then holds up to a sixth more than it needs at its peak. The user's own setting in the environment
    variable MALLOC_MMAP_THRESHOLD_ takes precedence.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    with suppress(OSError, AttributeError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        if not mallopt(M_MMAP_THRESHOLD, 2**30):  # blocks below this size come from the heap
            mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that an unpatched glibc accepts
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # the heap does not shrink


# --- products of matrices


def has_onednn() -> bool:
    """Whether oneDNN can use AVX-512 here."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def prefers_onednn() -> bool:
    return has_onednn() and is_amd()


def is_amd() -> bool:
    return "AuthenticAMD" in processor()


def has_bf16_units() -> bool:
    """Whether the processor multiplies matrices in bf16: by AMX, or by AVX-512's instructions for it."""
    return torch.backends.mkldnn.is_available() and any(flag in processor() for flag in ("amx_bf16", "avx512_bf16"))


def processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor()


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b of x (..., in), W (out, in) and b (out,), all fp32. x and W may have any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """y = x W^T + b, with the gradients dx = dy W, dW = dy^T x and db = the sum of dy over its rows."""

    @staticmethod
    def forward(ctx, x, weight, bias):  # (..., in), (out, in), (out,)
        trains_weight = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if trains_weight else None, weight)  # dW alone needs x
        return onednn_linear(x, weight, bias)  # (..., out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # (..., out)
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad
        rows = dy.flatten(0, -2)  # (N, out)
        dx = onednn_linear(dy, weight.T) if needs_dx else None  # (..., in)
        dw = onednn_linear(rows.T, x.flatten(0, -2).T) if needs_dw else None  # (out, in)
        db = rows.sum(0) if needs_db else None  # (out,)
        return dx, dw, db


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Replaces F.linear, with its parameters: input (..., in), weight (out, in), bias (out,) -> (..., out).

    PyTorch's own function handles everything that `suits_onednn` rejects.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not suits_onednn(input, weight, bias):
        return TORCH_LINEAR(input, weight, bias)
    return OneDNNLinear.apply(input, weight, bias)


def suits_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether all are fp32 tensors on the CPU, not empty, and fit. oneDNN's errors for others do not name the cause."""
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if type(tensor) not in (torch.Tensor, nn.Parameter) or not tensor.is_cpu or tensor.dtype != torch.float32:
            return False  # such as DTensor, a subclass
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1] or not x.numel():
        return False
    return bias is None or bias.shape == weight.shape[:1]


# --- attention


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
              dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
              **settings) -> torch.Tensor:  # fmt: skip
    """Replaces F.scaled_dot_product_attention: query (..., H, T, hd), key and value (..., K, T, hd) -> (..., H, T, hd).

    PyTorch's kernel needs no memory for the T x T scores, but its backward pass does not use the units for bf16.
    """
    trains = torch.is_grad_enabled() and query.requires_grad and query.is_cpu and query.dtype == torch.bfloat16
    only_causal = is_causal and attn_mask is None and dropout_p == 0
    if not (trains and only_causal and query.shape[-2] == key.shape[-2] < SHORT):
        return TORCH_ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **settings)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    groups = query.shape[-3] // key.shape[-3]  # query heads of a key head
    key, value = (t.repeat_interleave(groups, -3) if groups > 1 else t for t in (key, value))
    later = torch.full([query.shape[-2]] * 2, -torch.inf, dtype=query.dtype).triu(1)  # (T, T)
    scores = query * scale @ key.transpose(-2, -1) + later  # (..., H, T, T)
    return scores.softmax(-1) @ value
