"""How processes share the training: ddp gives each process the whole model, fsdp a share of every block.

torchrun starts the processes and `processes` joins them: NCCL between GPUs, gloo between CPUs. One process without
torchrun runs the same code. Both ways save one full training state, which any number of processes of either kind loads.
"""

import contextlib
import dataclasses
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import has_bf16
from common import UserError, reason
from model import LLaVA, to_device

TIMEOUT = timedelta(hours=2)  # the others wait while process 0 writes tens of GB; NCCL's default is ten minutes
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


# --- processes


@contextlib.contextmanager
def processes(deterministic: bool = False) -> Iterator[tuple[int, int, torch.device]]:
    """Joins the processes that torchrun started; yields rank, world size and device. An error ends all processes.

    deterministic: GPUs compute the same bits in every run; CPUs do so anyway.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)
    rank, world_size, device = start_processes()
    try:
        yield rank, world_size, device
        if dist.is_initialized():
            dist.barrier()  # no process closes connections that another one still uses
    except (SystemExit, KeyboardInterrupt) as end:  # an interrupted run
        if world_size == 1:
            raise
        exit_now(getattr(end, "code", 128 + signal.SIGINT))
    except Exception as error:
        for bar in list(tqdm._instances):
            bar.close()  # the error gets a line of its own
        if not isinstance(error, UserError) and (cause := outside_cause(error)):
            error = UserError(f"{cause} ({reason(error)}); the same command continues from the last saved state")
        if world_size == 1:
            raise error
        line = f"error: {f'(process {rank}) ' if rank else ''}{error}\n"
        sys.stderr.write(line if isinstance(error, UserError) else "".join(traceback.format_exception(error)))
        exit_now(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def exit_now(status):
    """Ends one of several processes. An ordinary exit would first close connections, and may wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start_processes() -> tuple[int, int, torch.device]:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: process {local_rank + 1} of this machine has no GPU; start at most "
                            f"{torch.cuda.device_count()}")  # fmt: skip
        device = torch.device("cuda", local_rank)
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
            # Micro-batches of many lengths leave gaps in the allocator's memory that no other one fits.
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        from tools import fast_cpu

        fast_cpu.speed_up()
        if "OMP_NUM_THREADS" not in os.environ:
            # PyTorch's threads wait for each other at every operation, so they must not outnumber the cores.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // local_world))
    if "RANK" in os.environ:
        if absent := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(f"RANK is set, but not {' and '.join(absent)}; start with torchrun, or unset RANK")
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT, device_id=device if on_gpu else None)
    return rank, world_size, device


def default_precision(device: torch.device, dim: int) -> str:
    """"bf16" or "fp32", whichever computes faster a LLaMA of this width."""
    if device.type == "cuda":
        return "bf16" if has_bf16(device) else "fp32"
    from tools import fast_cpu

    return "bf16" if fast_cpu.has_bf16_units() and dim >= fast_cpu.WIDE else "fp32"


def outside_cause(error: Exception) -> str | None:
    """Names the cause of an error that comes from the machine or from another process; None for any other error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: lower --micro-batch-tokens (train.py) or --batch-size (eval_scienceqa.py)"
    if re.search("(closed|reset) by (remote )?peer|remote process exited", str(error)):  # gloo's words, and NCCL's
        return "another process of this run ended; its own message has the reason"
    return None


# --- values of all processes


def exchanged(numbers: Iterable[float], device: torch.device) -> torch.Tensor:
    """n numbers of each process -> (world_size, n) float64 on the CPU, the same in all processes."""
    own = torch.tensor([*numbers], dtype=torch.float64)
    if not dist.is_initialized():
        return own[None]
    own = to_device(own, device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).cpu()


def gathered(lines: list[str]) -> list[str]:
    """The lines of all processes, in all of them."""
    if not dist.is_initialized():
        return lines
    parts: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, lines)
    return sum(parts, [])


def by_process_0(function: Callable):
    """Calls the function in process 0 and returns its value, or raises its UserError, in all processes."""
    outcome: list = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


# --- the model


def distribute(model: LLaVA, how: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Places the model on the devices -> the module that the training loop calls. how: "ddp" or "fsdp"."""
    if how == "fsdp":
        return shard(model, device, dtype)
    model.to(device)
    if not dist.is_initialized():
        return model
    # Every process has loaded the same weights, so none are sent around at the start.
    return DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)


def shard(model: LLaVA, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """FSDP: each process holds a share of every parameter, in float32 if it trains; blocks compute in `dtype`.

    FSDP shards the modules that `forward` calls one by one; the ViT is small and frozen, so every process keeps all of
    it. One module after another moves to the device and is sharded, so the device never holds the whole model.
    """
    llama = model.llama
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # Norms, embeddings, the residuals between blocks and the sums of gradients stay float32.
    float32 = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32, cast_forward_inputs=False)
    compute = dataclasses.replace(float32, param_dtype=None if dtype == torch.float32 else dtype)
    for module in (*llama.layers, llama.output, llama.tok_embeddings, llama.norm):
        trains = next(module.parameters()).requires_grad
        policy = float32 if module in (llama.tok_embeddings, llama.norm) else compute
        module.to(device).to(torch.float32 if trains else None)  # a GPU converts faster than a CPU
        fully_shard(module, mesh=mesh, mp_policy=policy)
    model.vision.to(device)
    model.projector.to(device)
    fully_shard(model, mesh=mesh, mp_policy=float32, ignored_params=set(model.vision.parameters()))
    return model


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> float:
    """Scales the gradient down to the norm `limit` if it is longer -> the norm before that."""
    norm = nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def full_state(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """{"model", "optimizer"}: all that trains, by the names of LLaVA's parameters, on the CPU of process 0.

    All processes take part; the others get empty parts.
    """
    model, moments = get_state_dict(net, optimizer, options=FULL_STATE)
    return {"model": model, "optimizer": moments}


def restore(net: nn.Module, optimizer: torch.optim.Optimizer, state: dict):
    """Loads what `full_state` returned. Raises various errors if it is of another model."""
    trained = {name.removeprefix("module.") for name, p in net.named_parameters() if p.requires_grad}
    if state["model"].keys() != trained:
        raise ValueError("it has other parameters")
    options = dataclasses.replace(FULL_STATE, strict=False)  # the frozen parameters are absent
    set_state_dict(net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                   options=options)  # fmt: skip
