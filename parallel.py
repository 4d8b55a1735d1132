"""How processes share the work: each holds the whole model (ddp), or each a share of every block (fsdp).

    Replicas    PyTorch's DistributedDataParallel: gradients are averaged. One process alone needs nothing of it.
    Shards      PyTorch's fully_shard: a block is whole only while it computes.

Both run a model, train it, save and load what it takes to train on, and hand out the whole model; train.py's loop
does not know which of them it has. Started by torchrun, processes are joined by `start_processes`.
"""

import dataclasses
import os
import pickle
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import checkpoint
from checkpoint import reason
from conversation import UserError
from cpu import keep_memory
from data import Batch
from model import LLaMA, LLaVA, Projection
from vision import VisionTransformer


def start_processes(sparing: bool = False) -> tuple[int, int, torch.device]:
    """-> rank, world size, device. Under torchrun its processes join: NCCL between GPUs, gloo between CPUs.

    sparing: memory counts for more than time, so none is kept (on CPUs).
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: process {local + 1} of this machine has no GPU, there are "
                            f"{torch.cuda.device_count()}; start as many processes")  # fmt: skip
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    else:
        if not sparing:
            keep_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            # One core is left to the workers and to what else runs: when threads outnumber the free cores, PyTorch's
            # wait for each other at every operation, and all becomes many times slower than with a thread less.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))
    if "RANK" in os.environ:
        on_gpu = device if device.type == "cuda" else None
        # While one process writes tens of GB the others wait: longer than NCCL's ten minutes.
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=2), device_id=on_gpu)
    return rank, world, device


def summed(*numbers: float, device: torch.device) -> list[float]:
    """Each number summed over all processes (float64: counts stay exact)."""
    total = torch.tensor(numbers, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def gathered(lines: list[str]) -> list[str]:
    """The lines of all processes, on all of them."""
    if not dist.is_initialized():
        return lines
    parts: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, lines)
    return sum(parts, [])


def by_process_0(do: Callable, rank: int) -> list[str]:
    """The lines that do() returns, or the UserError that it raises, on all processes; process 0 alone calls it."""
    lines = []
    if rank == 0:
        try:
            lines = ["", *(do() or [])]
        except UserError as error:
            lines = [str(error)]
    error, *lines = gathered(lines)
    if error:
        raise UserError(error)
    return lines


def from_outside(error: Exception) -> str | None:
    """What an error means that comes from the machine or another process, and not from files or from this code."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: lower --micro-batch-tokens, add --checkpoint-activations, see --plan"
    if isinstance(error, (ConnectionError, EOFError)) or re.search(r"DataLoader worker \(pid", str(error)):
        return "a process of --workers died, out of memory perhaps"
    if re.search("(closed|reset) by (remote )?peer|remote process exited", str(error)):  # gloo's words, and NCCL's
        return "another process of this run ended; its own message says why"
    return None


def leave(error: Exception, rank: int, world: int):
    """Ends this process because of an error; one among several at once, with the error printed, so that all end.

    An ordinary end would first take down the connections to the others, and can wait for ever if those wait for it.
    """
    if what := from_outside(error):
        error = UserError(f"{what} ({reason(error)}); the same command goes on from the last saved state")
    for bar in list(tqdm._instances):
        bar.close()  # the error gets a line of its own
    if world == 1:
        raise error
    line = f"error: {f'(process {rank}) ' * (rank > 0)}{error}\n" if isinstance(error, UserError) else None
    sys.stderr.write(line or "".join(traceback.format_exception(error)))
    sys.stderr.flush(), sys.stdout.flush()
    os._exit(1)


# --- the whole model in each process


class Replicas:
    def __init__(self, model: LLaVA, device: torch.device, precision: str):
        self.model, self.device = model.to(device), device
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.run: torch.nn.Module = model
        if dist.is_initialized():  # all processes have loaded the same: nothing to send around at the start
            self.run = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)

    def in_turn(self, batches: list[Batch], none: Batch):
        """The micro-batches of a step, each on the device; processes exchange gradients after the last alone."""
        for i, batch in enumerate(batches):
            last = i + 1 == len(batches)
            with self.run.no_sync() if isinstance(self.run, DistributedDataParallel) and not last else nullcontext():
                yield batch.to(self.device)

    def clip(self, limit: float) -> float:
        """Shortens the gradient to the norm `limit` -> the norm that it had."""
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), limit)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def whole(self) -> LLaVA | None:
        """What trains, whole, on process 0; None on the others. All take part."""
        return self.model if not dist.is_initialized() or dist.get_rank() == 0 else None

    @staticmethod
    def saved(run) -> dict | None:
        """What `load` goes on from, with its "step". None if nothing is saved. Raises UserError if it is damaged."""
        return checkpoint.load_state(run)

    def save(self, run, step: int, optimizer):
        """Replaces the state to train on from: whole or not at all."""
        if self.whole():
            trained = {name: p.detach() for name, p in self.trained.items()}
            checkpoint.save_state(run, dict(trained=trained, optimizer=optimizer.state_dict()), step)

    def load(self, run, state: dict, optimizer):
        """Raises nearly anything if the state is of another model, or damaged."""
        if state["trained"].keys() != self.trained.keys():
            raise ValueError("it has other parameters")
        self.model.load_state_dict(state["trained"], strict=False)
        optimizer.load_state_dict(state["optimizer"])


# --- a share of it in each


class Shards(Replicas):
    def __init__(self, model: LLaVA, device: torch.device, precision: str):
        """Leaves each process its share of every parameter, in fp32 where it trains; a block computes in `precision`.

        What is called by itself in `LLaVA.forward` is a unit of its own; the ViT, frozen and small, stays whole. One
        unit after another goes to the device and is shared: the whole model is never there.
        """
        self.model, self.run, self.step = model, model, -1  # the step of the state that is on the disk
        self.device, mesh, llama = device, init_device_mesh(device.type, (dist.get_world_size(),)), model.llama
        as_is = MixedPrecisionPolicy(None, torch.float32, cast_forward_inputs=False)  # the stream between blocks: fp32
        computing = as_is if precision == "fp32" else dataclasses.replace(as_is, param_dtype=torch.bfloat16)
        for unit in (*llama.layers, llama.output, llama.tok_embeddings, llama.norm):
            trains = next(unit.parameters()).requires_grad
            policy = as_is if unit in (llama.tok_embeddings, llama.norm) else computing
            fully_shard(unit.to(device, torch.float32 if trains else None), mesh=mesh, mp_policy=policy)
        model.vision.to(device), model.projector.to(device)
        fully_shard(model, mesh=mesh, mp_policy=as_is, ignored_params=set(model.vision.parameters()))
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def in_turn(self, batches: list[Batch], none: Batch):
        """All processes take part in every block of every micro-batch: `none` fills up where one has fewer.

        Gradients are exchanged after each, into the shares: to wait for the last would keep them whole until then.
        """
        most = torch.tensor(len(batches), device=self.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        for i in range(most):
            yield (batches[i] if i < len(batches) else none).to(self.device)

    def whole(self) -> LLaVA | None:
        """On the CPU; what is frozen has no memory. One parameter at a time is whole on the other processes."""
        first, parts = dist.get_rank() == 0, {}
        for name, p in self.trained.items():
            p = p.full_tensor() if isinstance(p, DTensor) else p
            if first:
                parts[name] = p.detach().cpu()
        if not first:
            return None
        c = self.model
        with torch.device("meta"):
            projector = Projection(c.vision.config.width, c.llama.config.dim, bias="projector.bias" in parts)
            model = LLaVA(LLaMA(c.llama.config), VisionTransformer(c.vision.config, c.vision.feature_layer), projector)
        model.load_state_dict(parts, assign=True, strict=False)
        return model

    @staticmethod
    def saved(run) -> dict | None:
        whole = [file.parent.name.removeprefix("step-") for file in Path(run, "state").glob("step-*/.metadata")]
        whole = [int(step) for step in whole if step.isdecimal()]
        return dict(step=max(whole)) if whole else None

    def save(self, run, step: int, optimizer):
        """run/state/step-N, each process writing its part.

        PyTorch writes the folder's .metadata last, by a rename: a folder with it is whole. Then the older ones go.
        """
        folder, options = Path(run) / "state" / f"step-{step}", StateDictOptions(ignore_frozen_params=True)
        if step == self.step:
            return  # it is there already, and not put at risk
        weights, state = get_state_dict(self.model, optimizer, options=options)
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a save that was killed
        dist.barrier()
        try:
            dcp.save(dict(trained=weights, moments=state["state"]), checkpoint_id=folder)
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)  # no process writes any more: room for what comes
            raise checkpoint.unwritten(folder, first(error)) from None
        self.step = step
        if dist.get_rank() == 0:
            for old in folder.parent.glob("step-*"):
                if old != folder:
                    (old / ".metadata").unlink(missing_ok=True)  # first: a folder with it is whole
                    shutil.rmtree(old, ignore_errors=True)

    def load(self, run, state: dict, optimizer):
        """The state may be of another number of processes."""
        options = StateDictOptions(ignore_frozen_params=True, strict=False)
        weights, moments = get_state_dict(self.model, optimizer, options=options)
        reader = PlainReader(Path(run) / "state" / f"step-{state['step']}")
        try:
            dcp.load(dict(trained=weights, moments=moments["state"]), storage_reader=reader)
        except (Exception, dcp.api.CheckpointException) as error:
            raise ValueError(reason(first(error))) from None
        set_state_dict(self.model, optimizer, model_state_dict=weights, optim_state_dict=moments, options=options)
        self.step = state["step"]


PARALLEL = {"ddp": Replicas, "fsdp": Shards}


def first(error: BaseException) -> BaseException:
    """The error itself, or the first of those that PyTorch gathers from the processes that save or load together."""
    return next(iter(error.failures.values()))[0] if isinstance(error, dcp.api.CheckpointException) else error


class PlainReader(dcp.FileSystemReader):
    """PyTorch's, but what it unpickles can hold nothing but its own descriptions of tensors."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if name in METADATA.get(module, ()):
                return super().find_class(module, name)
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a training state")

    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = self.Unpickler(file).load()
        if not all(re.fullmatch(r"[\w.]*\.distcp", place.relative_path) for place in metadata.storage_data.values()):
            raise pickle.UnpicklingError("it names a file that has no place in this folder")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


# What describes a state of tensors. Not there: BytesStorageMetadata, for which PyTorch would run a pickle of its own.
METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "StorageMeta", "TensorProperties", "MetadataIndex",
        "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"}, "torch": {"Size"}, "pathlib": {"PosixPath"},
}  # fmt: skip
