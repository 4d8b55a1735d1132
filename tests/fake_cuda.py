"""A GPU without a GPU: tensors that report the device cuda:0 and compute on the CPU.

PyTorch's C++ code sees a tensor on cuda:0, so autograd and autocast treat it as one (autocast has other lists for CUDA
than for CPUs). Each operation below them passes through `compute`, which

    - raises WrongDevice if tensors of the CPU and of the GPU meet, where a GPU would,
    - counts in `waits`, by line of the project, what makes the host wait until the GPU has finished its work,
    - counts in `copies` the copies from the host's pinned memory, which do not wait, and
    - replaces the kernel of varlen_attn by an explicit softmax that checks the arguments as the kernel's caller does.

It says nothing about speed, about memory, or about the rounding of a GPU's kernels.
"""

import collections
import contextlib
import ctypes
import math
import traceback
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
import torch.nn.attention.varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).parent.parent
ATEN = torch.ops.aten
COPIES = (ATEN._to_copy.default, ATEN.copy_.default)
INDEXING = (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default)
# Their results have a size, or are numbers, that only the GPU knows.
WAITING = (ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default,
           ATEN.masked_scatter_backward.default, ATEN.repeat_interleave.Tensor, ATEN.equal.default)  # fmt: skip

waits: collections.Counter = collections.Counter()
copies: collections.Counter = collections.Counter()
kernels: collections.Counter = collections.Counter()
pinned: set[int] = set()  # the addresses of pinned memory


class WrongDevice(RuntimeError):
    pass


def place() -> str:
    """The line of the project that is running, or the backward pass."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path == Path(__file__) and frame.name == "backward":
            return "backward"
        if path.parent == ROOT and frame.name != "to_device":
            return f"{path.name}:{frame.lineno} {frame.line}"
    return "test"


# --- the tensor


class Cuda(torch.Tensor):
    """A tensor on cuda:0; `memory` holds its values on the CPU."""

    memory: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, memory):
        made = torch.Tensor._make_wrapper_subclass(cls, memory.shape, strides=memory.stride(), dtype=memory.dtype,
                                                   storage_offset=memory.storage_offset(), device="cuda:0")  # fmt: skip
        made.memory = memory
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    def __repr__(self, **_):
        return f"Cuda({self.memory})"

    def tolist(self):
        return self.detach().cpu().tolist()

    def backward(self):
        """Does the work of PyTorch's engine, which would ask the GPU for its streams."""
        backward(self)


class OnGPU(TorchDispatchMode):
    """Catches the operations without a tensor on the GPU: torch.arange(..., device="cuda"), copies from the CPU."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def compute(operation, args: tuple, kwargs: dict):
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    from_gpu = any(isinstance(t, Cuda) for t in given)
    to_gpu = torch.device(kwargs["device"]).type == "cuda" if kwargs.get("device") else from_gpu
    if operation in COPIES:
        source = given[-1]
        from_gpu = isinstance(source, Cuda)
        to_gpu = to_gpu if operation == ATEN._to_copy.default else isinstance(args[0], Cuda)
        if from_gpu != to_gpu:
            may_run_on = kwargs.get("non_blocking") or args[2:] == (True,)
            if to_gpu and may_run_on and source.untyped_storage().data_ptr() in pinned:
                copies[place()] += 1
            else:
                waits[f"{place()}: a copy {'to' if to_gpu else 'from'} the GPU"] += 1
    elif from_gpu:
        check_devices(operation, args, given)
    if operation in WAITING and from_gpu:
        waits[f"{place()}: {operation}"] += 1
    kernels[str(operation)] += to_gpu

    plain_args, plain = tree_map_only(Cuda, lambda t: t.memory, (args, kwargs))
    if plain.get("device"):
        plain["device"] = torch.device("cpu")
    out = KERNELS.get(str(operation), operation)(*plain_args, **plain)
    written = [result for result in operation._schema.returns if result.alias_info and result.alias_info.is_write]
    if written:
        return args[0] if len(written) == 1 else args[: len(written)]
    return tree_map_only(torch.Tensor, lambda t: Cuda(t.resolve_conj()), out) if to_gpu else out


def check_devices(operation, args: tuple, given: list):
    """A GPU accepts from the CPU only numbers, and indices, for which it waits."""
    indices = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)] if operation in INDEXING else []
    strays = [t for t in given if not isinstance(t, Cuda) and t.dim()]
    if any(all(t is not index for index in indices) for t in strays):
        raise WrongDevice(f"{operation}: tensors on cuda:0 and on the CPU, at {place()}")
    if strays or any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        waits[f"{place()}: {operation} with {'indices of the CPU' if strays else 'a mask'}"] += 1


def backward(loss: torch.Tensor):
    root = loss.grad_fn
    uses, seen, todo = collections.Counter(), {root}, [root]
    while todo:
        for node, _ in todo.pop().next_functions:
            uses[node] += 1  # a node runs after all that give it a gradient
            if node is not None and node not in seen:
                seen.add(node)
                todo.append(node)
    grads, ready = {root: {0: torch.ones_like(loss)}}, [root]
    graph = mock.patch.object(torch._C, "_current_graph_task_id", lambda: id(loss))  # activation checkpointing asks
    with torch.no_grad(), graph:
        while ready:
            node = ready.pop()
            given = grads.pop(node, {})
            call = node if callable(node) else node.apply
            out = call(*[given.get(i) for i in range(len(node._input_metadata))]) if given else None
            out = out if isinstance(out, tuple) else (out,) * len(node.next_functions)
            for (following, i), grad in zip(node.next_functions, out):
                if following is None:
                    continue
                if grad is not None:
                    expected = following._input_metadata[i]
                    if grad.device != expected.device:
                        raise WrongDevice(f"{node}: its gradient is on {grad.device}, not on {expected.device}")
                    grad = grad.sum_to_size(list(expected.shape)).to(expected.dtype)  # as PyTorch's engine
                    sums = grads.setdefault(following, {})
                    sums[i] = sums[i] + grad if i in sums else grad
                uses[following] -= 1
                if not uses[following]:
                    ready.append(following)


# --- the kernel of varlen_attn


def check_varlen(q, k, v, ends_q, ends_k, max_q, max_k, window):
    """The checks of mha_varlen_fwd in PyTorch's flash_api.cpp, and what the kernel takes for granted."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.float16, torch.bfloat16)
    assert ends_q.dtype == ends_k.dtype == torch.int32 and ends_q.is_contiguous() and ends_k.is_contiguous()
    assert q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and q.shape[1] % k.shape[1] == 0
    assert len(ends_q) == len(ends_k) > 1 and ends_q[0] == ends_k[0] == 0
    assert ends_q[-1] == len(q) and ends_k[-1] == len(k) == len(v), "no gradient reaches the other rows"
    assert max_q >= ends_q.diff().max() and max_k >= ends_k.diff().max()
    assert list(window) == [-1, 0], "causal"
    for t in (q, k, v):  # the kernel reads 16 bytes at once
        assert t.stride(-1) == 1 and all(stride * t.itemsize % 16 == 0 for stride in t.stride()[:-1])
        assert t.storage_offset() * t.itemsize % 16 == 0


def attention(q, k, v, ends_q, ends_k, dout=None):
    """Aligns the last query of a sample with its last key: q (Nq, H, hd), k and v (Nk, K, hd) -> (Nq, H, hd).

    With the gradient dout of that, returns the gradients of q, k and v.
    """
    out, dq, dk, dv = (torch.empty_like(t, dtype=torch.float32) for t in (q, q, k, v))
    groups, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    for (a, b), (c, d) in zip(pairwise(ends_q.tolist()), pairwise(ends_k.tolist())):
        queries = q[a:b].transpose(0, 1).float()  # (H, T, hd)
        keys, values = (t[c:d].repeat_interleave(groups, 1).transpose(0, 1).float() for t in (k, v))  # (H, T', hd)
        later = torch.arange(d - c) > torch.arange(b - a)[:, None] + (d - c) - (b - a)
        p = (queries @ keys.transpose(1, 2) * scale).masked_fill(later, -math.inf).softmax(-1)  # (H, T, T')
        out[a:b] = (p @ values).transpose(0, 1)
        if dout is not None:
            do = dout[a:b].transpose(0, 1).float()
            dp = do @ values.transpose(1, 2)
            ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
            dq[a:b] = (ds @ keys).transpose(0, 1)
            dk[c:d] = (ds.transpose(1, 2) @ queries).unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
            dv[c:d] = (p.transpose(1, 2) @ do).unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return out.to(q.dtype) if dout is None else tuple(grad.to(q.dtype) for grad in (dq, dk, dv))


def varlen_forward(q, k, v, ends_q, ends_k, max_q, max_k, is_causal=False, scale=None, window=None, *_, **__):
    check_varlen(q, k, v, ends_q, ends_k, max_q, max_k, window)
    no_sums = q.new_zeros(q.shape[1], len(q), dtype=torch.float32)
    return attention(q, k, v, ends_q, ends_k), no_sums, torch.zeros(2, dtype=torch.uint64)


def varlen_backward(dout, q, k, v, out, sums, ends_q, ends_k, max_q, max_k, is_causal, rng, scale=None, window=None):
    check_varlen(q, k, v, ends_q, ends_k, max_q, max_k, window)
    assert dout.dtype == q.dtype and dout.stride(-1) == 1
    return attention(q, k, v, ends_q, ends_k, dout)


def varlen_attn(*tensors, enable_gqa: bool = False, **settings):
    """PyTorch's function. That of PyTorch 2.11 takes grouped queries without the flag."""
    function = torch.nn.attention.varlen.varlen_attn
    flag = {"enable_gqa": enable_gqa} if "enable_gqa" in function.__kwdefaults__ else {}
    return function(*tensors, **flag, **settings)


def rms_norm_backward(dout, x, shape, scale, weight, wanted):
    """The gradient of F.rms_norm without a weight. Some builds of PyTorch have it for GPUs only."""
    assert weight is None and len(shape) == 1
    y = x * scale
    return scale * (dout - y * (dout * y).mean(-1, keepdim=True)), None


KERNELS = {"torch_attn._varlen_attn.default": varlen_forward,
           "torch_attn._varlen_attn_backward.default": varlen_backward,
           "aten._fused_rms_norm_backward.default": rms_norm_backward}  # fmt: skip


# --- the machine


def register_guard():
    """Makes C++ accept the device. A build without CUDA has no guard for it: registers one whose methods return 0,
    which says that there are no GPUs. PyTorch then replaces it by its own guard that does nothing."""
    if torch.version.cuda is None:
        method = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(lambda this: 0)
        methods = (ctypes.c_void_p * 64)(*[ctypes.cast(method, ctypes.c_void_p).value] * 64)
        guard = (ctypes.c_void_p * 1)(ctypes.addressof(methods))
        library = ctypes.CDLL(Path(torch.__file__).parent / "lib/libc10.so")
        register = library._ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE
        register.argtypes, register.restype = [ctypes.c_int8, ctypes.c_void_p], None
        register(1, ctypes.addressof(guard))  # 1: CUDA
        kept.append((method, methods, guard))
    torch._C._ensureCUDADeviceGuardSet()


kept: list = []


def pin_memory(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    pinned.add(t.untyped_storage().data_ptr())
    return t


@contextlib.contextmanager
def gpu():
    """Lets Python see one GPU, of compute capability 9.0."""
    if not kept:
        register_guard()
    lifts_on_cpu = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        for name, value in dict(is_available=True, _lazy_init=None, device_count=1, set_device=None,
                                is_bf16_supported=True, get_device_capability=(9, 0),
                                is_current_stream_capturing=False).items():  # fmt: skip
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, value=value: value))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", pin_memory))
        stack.enter_context(mock.patch("model.varlen_attn", varlen_attn))
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") copies from the CPU
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to makes new parameters
        try:
            for counter in (waits, copies, kernels, pinned):
                counter.clear()
            with OnGPU():
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts_on_cpu)
            torch.__future__.set_overwrite_module_params_on_conversion(False)
