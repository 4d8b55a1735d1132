"""Checks and times the GPU path on one NVIDIA GPU: numbers, speed, memory, waits, and whole runs of train.py.

    python -m bench.gpu                              # all sections; prints rows and writes bench/gpu.json
    python -m bench.gpu --only parity steps          # some sections
    python -m bench.gpu --tiny                       # a rehearsal at tiny sizes, which also runs on a CPU

    parity       losses, gradients, answers and the varlen kernel against fp32 on the CPU; the waits for the GPU
    runs         ddp, fsdp, resuming, evaluation and chat by their commands
    demo         the demo's stage 1 with its exam
    steps        training steps of a 7B and a 13B with ViT-L/14, and of transformers on the same samples
    generation   32 answers of a 7B and a 13B, and of transformers
    compile      the steps of a 7B with --compile

The models have random weights that are made on the GPU, so no checkpoint is needed. Each job runs in a process with a
time limit, and its error becomes a row of the output. The jobs of `parity` and `runs` share the GPU. Each other job has
it to itself.
"""

import argparse
import contextlib
import copy
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]
ON_GPU = torch.cuda.is_available()  # finds the GPU before conftest hides it from CUDA
with mock.patch.dict(os.environ):  # conftest's changes would reach the processes that start later
    import run
    from conftest import error, randomize

import checkpoint  # noqa: E402
import distributed  # noqa: E402
import model as model_file  # noqa: E402
import train  # noqa: E402
from common import ArgumentParser, run_command, write_json  # noqa: E402
from data import Batch  # noqa: E402
from demo.world import FOLDER, LLAMA, VISION, prepare  # noqa: E402
from model import CPU, LLaMA, LLaMAConfig, LLaVA, StreamAttention  # noqa: E402
from tools import plan  # noqa: E402
from vision import VisionConfig, VisionTransformer  # noqa: E402

GIB = 2**30
DEVICE = torch.device("cuda") if ON_GPU else CPU
TINY = "--tiny" in sys.argv
SMALL = LLaMAConfig(64, 2, 4, 4, 128)
SIZES = {"7B": SMALL, "13B": SMALL} if TINY else {"7B": LLaMAConfig(), "13B": LLaMAConfig(5120, 40, 40, 40, 13824)}
SMALL_VIT = VisionConfig(224, 14, 128, 3)
VIT = SMALL_VIT if TINY else VisionConfig()
CAPTIONS, CONVERSATIONS, PROMPTS = (6, 2, 3) if TINY else (48, 8, 32)  # of a step or a batch
NEW_TOKENS = 6 if TINY else 128
ROUNDS = 2 if TINY else 3  # timed steps, each on its own samples
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
Rows = Iterator[dict[str, Any]]


# --- measuring on the GPU, or without one in a rehearsal


def synchronize():
    if ON_GPU:
        torch.cuda.synchronize()


def seconds_of(function: Callable, *arguments) -> float:
    """The seconds until a call has returned and the GPU has done its work."""
    synchronize()
    began = time.perf_counter()
    function(*arguments)
    synchronize()
    return time.perf_counter() - began


def forget_peak():
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """The peak GiB since `forget_peak`: of the live tensors, and of the memory that PyTorch's allocator reserves."""
    if not ON_GPU:
        return dict(allocated=0.0, reserved=0.0)
    return dict(allocated=torch.cuda.max_memory_allocated() / GIB, reserved=torch.cuda.max_memory_reserved() / GIB)


def matmul_flops() -> float:
    """FLOP/s of a product of two random 8192 x 8192 matrices in bf16."""
    n = 256 if TINY else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * n**3 * 10 / seconds_of(lambda: [a @ b for _ in range(10)])


def waits_of(function: Callable, *arguments) -> Counter:
    """Counts how often each line makes the host wait for the GPU, as PyTorch's debug mode reports it."""
    if not ON_GPU:
        function(*arguments)
        return Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [w for w in caught if "called a synchronizing" in str(w.message)]
    return Counter(f"{Path(w.filename).name}:{w.lineno}" for w in found)


# --- models and samples


def made(build: Callable[[], torch.nn.Module], dtype: torch.dtype, seed: int) -> Any:
    """A module with random weights in `dtype`, made on the device."""
    with torch.device("meta"):
        module = build().to(dtype)
    module.to_empty(device=DEVICE)
    rng = torch.Generator(DEVICE).manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                p.normal_(0, p[0].numel() ** -0.5, generator=rng)
            else:
                p.fill_(1.0 if name.endswith("weight") else 0.0)
    return module


def make_llava(c: LLaMAConfig, stage: int, checkpoint_activations=False, compile=False) -> LLaVA:
    """The model that train.py would train in bf16, with random weights in place of its files."""
    args = argparse.Namespace(stage=stage, parallel="ddp", init_from=None, projector=None, llama="", vision="", seed=0,
                              checkpoint_activations=checkpoint_activations, compile=compile)  # fmt: skip
    llama = mock.patch("checkpoint.load_llama", lambda path, dtype: made(lambda: LLaMA(c), dtype, 1))
    vit = mock.patch("checkpoint.load_vision", lambda path, _, dtype: made(lambda: VisionTransformer(VIT), dtype, 2))
    with llama, vit:
        return train.starting_model(args, torch.bfloat16).to(DEVICE)


class Trainer:
    """A model and its optimizer. `step` takes a step as train.py's loop does in one process."""

    def __init__(self, model: LLaVA):
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = run.make_optimizer(self.parameters)

    def micro_batch(self, micro_batch: Batch, green: int) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            nll = self.model(*micro_batch.to(DEVICE))
        (nll / green).backward()
        return nll.detach()

    def step(self, micro_batches: list[Batch]):
        green = sum(int(micro_batch.green.sum()) for micro_batch in micro_batches)
        nll_sum = torch.zeros((), device=DEVICE)
        for micro_batch in micro_batches:
            nll_sum += self.micro_batch(micro_batch, green)
        distributed.clip_gradients(self.parameters, train.MAX_GRAD_NORM)
        nll_sum.item()  # waits for the GPU, as the loop does to log the loss
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def answer(llava: LLaVA, batch: Batch, n: int,
           has_ended: Callable = lambda ids: False) -> tuple[list[list[int]], list[float]]:  # fmt: skip
    """Answers of at most n tokens, and the moments at which the work begins and at which each token is there."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # as checkpoint.open_run
    weight = llava.projector.weight
    autocast = torch.autocast(weight.device.type, torch.bfloat16, enabled=weight.dtype == torch.bfloat16)
    synchronize()
    moments = [time.perf_counter()]
    with autocast, torch.inference_mode():
        ids, _, borders, pixels = batch.to(weight.device)
        for answers in llava.generate(ids, borders, pixels, has_ended, n):
            moments.append(time.perf_counter())
    return answers, moments


# --- parity: losses, gradients, answers, the varlen kernel


def parity() -> Rows:
    """Compares a small LLaVA on the GPU with fp32 on the CPU. The errors of bf16 on the CPU are those of rounding."""
    torch.set_num_threads(min(8, len(os.sched_getaffinity(0))))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for n_kv_heads in (8, 2):
        c = LLaMAConfig(64, 2, 8, n_kv_heads, 128) if TINY else LLaMAConfig(512, 4, 8, n_kv_heads, 1376)
        base = checkpoint.build(randomize(LLaMA(c), 0), randomize(VisionTransformer(SMALL_VIT), 1))
        for stage in (1, 2):
            kind = f"stage {stage}"
            [batch] = run.streams(run.make_work(kind, 5, 100 if stage == 2 else 0))
            exact = losses_and_gradients(base, stage, batch, CPU, torch.float32)
            for device, dtype in ((DEVICE, torch.float32), (DEVICE, torch.bfloat16), (CPU, torch.bfloat16)):
                found = losses_and_gradients(base, stage, batch, device, dtype)
                errors = {name: error(found[name], expected) for name, expected in exact.items()}
                worst = max(errors, key=lambda name: errors[name])
                yield dict(what=f"{kind} K={n_kv_heads} {device.type} {str(dtype)[6:]}", loss_error=errors["loss"],
                           gradient_error=errors[worst], worst=worst)  # fmt: skip
        yield answers_parity(base, n_kv_heads)
    for heads, n_kv_heads, hd in ((32, 32, 128), (32, 8, 128), (8, 8, 16)):
        yield from kernel_parity(heads, n_kv_heads, hd)


def losses_and_gradients(base: LLaVA, stage: int, batch: Batch, device: torch.device, dtype: torch.dtype) -> dict:
    """{name: in fp32 on the CPU} of the loss and of the gradient of every parameter that trains."""
    llava = copy.deepcopy(base)
    llava.set_trainable(stage)
    if dtype == torch.bfloat16:
        run.hold_frozen(llava, "bf16")
    llava.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        nll = llava(*batch.to(device))
    (nll / int(batch.green.sum())).backward()
    found = {name: p.grad.float().cpu() for name, p in llava.named_parameters() if p.grad is not None}
    assert len(found) == sum(p.requires_grad for p in llava.parameters())
    return found | {"loss": nll.detach().float().cpu().reshape(1)}


def answers_parity(base: LLaVA, n_kv_heads: int) -> dict:
    [batch] = run.streams(run.make_work("answers", 4))
    expected, same = [], {}
    for device, dtype in ((CPU, torch.float32), (DEVICE, torch.float32), (DEVICE, torch.bfloat16)):
        answers, _ = answer(copy.deepcopy(base).to(device, dtype), batch, 16)
        expected = expected or answers
        pairs = [(a, b) for one, other in zip(answers, expected) for a, b in zip(one, other)]
        same[f"{device.type}_{str(dtype)[6:]}"] = sum(a == b for a, b in pairs) / len(pairs)
    torch.backends.cuda.enable_cudnn_sdp(True)
    return dict(what=f"answers K={n_kv_heads}, share of equal tokens", **same)


def kernel_parity(heads: int, n_kv_heads: int, hd: int) -> Rows:
    """Compares the varlen kernel, and causal_attention on each sample, with causal_attention in fp32."""
    if TINY:
        heads, n_kv_heads = heads // 4, n_kv_heads // 4
    borders = [45, 351, 500, 1400, 1401, 1710]
    rng = torch.Generator().manual_seed(hd)
    shapes = [(borders[-1], n, hd) for n in (heads, n_kv_heads, n_kv_heads, heads)]
    given = [torch.randn(shape, generator=rng).bfloat16().to(DEVICE) for shape in shapes]

    def outcome(attend: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        """The output and the gradients of q, k and v."""
        q, k, v, dout = (t.to(dtype).requires_grad_() for t in given)
        out = attend(q, k, v)
        return [out.detach().float(), *[g.float() for g in torch.autograd.grad(out, (q, k, v), dout)]]

    def by_loop(q, k, v):
        with mock.patch.object(model_file, "varlen_attn", None):
            return StreamAttention(borders)(q, k, v)

    exact = outcome(by_loop, torch.float32)
    ways: dict[str, Callable] = {"kernel": StreamAttention(borders).by_varlen_kernel, "loop": by_loop}
    for name, attend in ways.items():
        what = f"{name} H={heads} K={n_kv_heads} hd={hd} bf16"
        try:
            found = outcome(attend, torch.bfloat16)
            times = [seconds_of(outcome, attend, torch.bfloat16) for _ in range(5)]
        except Exception as problem:
            yield dict(what=what, error=f"{type(problem).__name__}: {problem}"[:300])
            continue
        errors = [error(a, b) for a, b in zip(found, exact)]
        yield dict(what=what, **dict(zip(("out", "dq", "dk", "dv"), errors)), ms_both=1000 * min(times))


def waits() -> Rows:
    """Counts by line what makes the host wait: in a micro-batch, in a whole step, and in ten tokens."""
    c = SMALL if TINY else LLaMAConfig(n_layers=2)
    for stage in (1, 2):
        trainer = Trainer(make_llava(c, stage))
        micro_batches = run.streams(run.make_work(f"stage {stage}", 4), 600)
        trainer.step(micro_batches)  # the first step sets up the kernels
        one = waits_of(trainer.micro_batch, micro_batches[0], 100)
        whole = waits_of(trainer.step, micro_batches)
        yield dict(what=f"waits of stage {stage}", micro_batch=one.total(), step=whole.total(),
                   micro_batches=len(micro_batches), lines=dict(one | whole))  # fmt: skip
    [batch] = run.streams(run.make_work("answers", 4))
    llava = trainer.model.to(torch.bfloat16)
    few, many = (waits_of(answer, llava, batch, n) for n in (2, 12))
    found = many - few
    yield dict(what="waits of 10 tokens", tokens=found.total(), lines=dict(found))


# --- steps


def summary(works: list, times: list[float], flops: float, peak: float) -> dict:
    """times: the seconds of the step of each global batch."""
    n = sum(len(ids) - run.SYSTEM for samples, _ in works for ids, _ in samples)  # train.py's count of positions
    seconds = sum(times)
    return dict(ms_step=1000 * seconds / len(times), positions_s=round(n / seconds), mfu=flops / seconds / peak)


def steps(size: str, stage: int, limits: list[int], layers: int = 0, theirs: bool = False, compile: bool = False,
          checkpoint_activations: bool = False, n: int = 0) -> Rows:  # fmt: skip
    """Times training steps, and compares their peak of memory with the plan.

    limits: values of --micro-batch-tokens. layers: blocks of the LLaMA, where not all fit. n: samples of a step.
    theirs: transformers takes the same steps after this project.
    """
    c = replace(SIZES[size], n_layers=layers or SIZES[size].n_layers)
    kind, n, peak = f"stage {stage}", n or (CAPTIONS if stage == 1 else CONVERSATIONS), matmul_flops()
    samples, pixels = run.make_work(kind, n * ROUNDS)
    works = [(samples[i : i + n], pixels[i : i + n]) for i in range(0, n * ROUNDS, n)]
    flops = run.necessary_flops(c, kind, n * ROUNDS)
    yield dict(what="a product in bf16", tflops=peak / 1e12)
    name = f"{size} of {c.n_layers} blocks, {kind}"
    name += ", checkpointed" * checkpoint_activations + ", compiled" * compile
    trainer = Trainer(make_llava(c, stage, checkpoint_activations, compile))
    for limit in limits:
        forget_peak()
        try:
            split = [run.streams(work, limit) for work in works]
            first = seconds_of(trainer.step, split[0])
            times = [seconds_of(trainer.step, one) for one in split]
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad(set_to_none=True)
            yield dict(what=name, limit=limit, error="out of memory", **peaks())
            continue
        planned = plan.gpu_bytes(c, VIT, stage, "ddp", 1, "bf16", limit, checkpoint_activations)
        yield dict(what=name, limit=limit, micro_batches=sum(map(len, split)) / len(split), first_s=first,
                   **summary(works, times, flops, peak), **peaks(), planned=sum(planned.values()) / GIB)  # fmt: skip
    if theirs:
        llava = trainer.model
        [batch] = run.streams(works[0])
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
            loss = llava(*batch.to(DEVICE)).item() / int(batch.green.sum())
        del trainer
        yield their_steps(llava, kind, name, works, flops, peak, checkpoint_activations) | dict(loss_ours=loss)


def their_steps(llava: LLaVA, kind: str, name: str, works: list, flops: float, peak: float,
                checkpoint_activations: bool) -> dict:  # fmt: skip
    """Times the same steps of transformers, each on one padded batch."""
    with torch.device(DEVICE):
        theirs = run.Theirs(llava.requires_grad_(False), kind, works[0], precision="bf16")
    llava.to("meta")  # frees its memory
    if checkpoint_activations:
        theirs.model.train()
        theirs.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forget_peak()
    with torch.no_grad():
        loss = float(theirs.loss())
    attention = getattr(theirs.model.config, "_attn_implementation", "?")
    row = dict(what=f"{name}, transformers {attention}", loss=loss)
    times = []
    try:
        for work in (works[0], *works):
            with torch.device(DEVICE):
                theirs.take(work)
            times.append(seconds_of(run.step, theirs))
    except torch.OutOfMemoryError:
        return dict(**row, error="out of memory", **peaks())
    return dict(**row, first_s=times[0], **summary(works, times[1:], flops, peak), **peaks())


# --- generation


def generation(size: str) -> Rows:
    """Times answers of this project, many together and one alone, and then those of transformers."""
    llava = make_llava(SIZES[size], 1).to(torch.bfloat16).requires_grad_(False)
    weights = sum(p.numel() * p.element_size() for p in llava.llama.parameters())
    samples, pixels = run.make_work("answers", PROMPTS)
    for n in (1, PROMPTS):
        forget_peak()
        [batch] = run.streams((samples[:n], pixels[:n]))
        answer(llava, batch, 4)  # sets up the kernels
        _, moments = answer(llava, batch, NEW_TOKENS)
        per_token = (moments[-1] - moments[1]) / (len(moments) - 2)
        row = dict(what=f"{size}: {n} answers together", first_token_ms=1000 * (moments[1] - moments[0]),
                   ms_token=1000 * per_token, tokens_s=n * NEW_TOKENS / (moments[-1] - moments[0]), **peaks(),
                   weights_gib=weights / GIB)  # fmt: skip
        with contextlib.suppress(Exception):  # a row without a profile is better than none
            row |= profile(llava, batch, 8)
        yield row
    # The first token of each answer draws its length.
    answers, moments = answer(llava, batch, NEW_TOKENS, lambda ids: len(ids) >= 1 + ids[0] % NEW_TOKENS)
    lengths, seconds = list(map(len, answers)), moments[-1] - moments[0]
    yield dict(what=f"{size}: {PROMPTS} answers of many lengths", steps=len(moments) - 1, seconds=seconds,
               tokens_s=sum(lengths) / seconds, lengths=len(set(lengths)), **peaks())  # fmt: skip
    yield from their_generation(llava, size, samples, pixels)


def profile(llava: LLaVA, batch: Batch, tokens: int) -> dict:
    """Milliseconds of the GPU's work and number of kernels for each token after the first."""
    totals = []
    for n in (1 + tokens, 1):
        activities = [torch.profiler.ProfilerActivity.CUDA if ON_GPU else torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as found:
            answer(llava, batch, n)
            synchronize()
        events = [e for e in found.key_averages() if e.self_device_time_total > 0]
        totals.append((sum(e.self_device_time_total for e in events) / 1000, sum(e.count for e in events)))
    (ms, kernels), (ms_before, kernels_before) = totals
    return dict(gpu_ms_token=(ms - ms_before) / tokens, kernels_token=(kernels - kernels_before) / tokens)


def their_generation(llava: LLaVA, size: str, samples: list, pixels: torch.Tensor) -> Rows:
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        theirs = run.Theirs(llava, "answers", (samples, pixels), PROMPTS, "bf16")
    torch.set_default_dtype(torch.float32)
    llava.to("meta")  # frees its memory
    forget_peak()
    with mock.patch("run.MAX_NEW_TOKENS", 4):
        theirs.answers()  # sets up the kernels
    few = min(2, PROMPTS)
    for n, at_once, what in ((PROMPTS, PROMPTS, f"{PROMPTS} answers"), (few, 1, "one answer at a time")):
        theirs.at_once = at_once
        with torch.device(DEVICE):
            theirs.take((samples[:n], pixels[:n]))
        with mock.patch("run.MAX_NEW_TOKENS", NEW_TOKENS):
            seconds = seconds_of(theirs.answers)
        yield dict(what=f"{size}: {what}, transformers", tokens_s=n * NEW_TOKENS / seconds,
                   ms_token=1000 * seconds / NEW_TOKENS * at_once / n, **peaks())  # fmt: skip


# --- runs of the commands


def start_script(arguments, log: Path) -> subprocess.Popen:
    """Starts a script of this project, whose output goes into `log`."""
    with open(log, "wb") as file:
        return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=file,
                                stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "2"})  # fmt: skip


def command(*arguments, limit: float, log: Path) -> tuple[int, float]:
    """Runs a script of this project -> its exit status (-9 after the limit) and its seconds."""
    began = time.perf_counter()
    process = start_script(arguments, log)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = -9
        process.terminate()  # torchrun then ends its processes
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()
        process.wait()
    return status, time.perf_counter() - began


def tail(log: Path, n: int) -> str:
    """The last n characters of a log, in one line."""
    return " ".join(log.read_text(errors="replace").split())[-n:]


def losses_of(run_folder: Path) -> list[float]:
    path = run_folder / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.is_file() else []


def largest_difference(one: list[float], other: list[float]) -> float:
    """The largest relative difference of two lists; NaN if one is shorter or both are empty."""
    pairs = zip_longest(one, other, fillvalue=float("nan"))
    return max((abs(a / b - 1) for a, b in pairs), default=float("nan"))


def demo() -> Rows:
    """Trains the demo's stage 1 as a user does, with its exam."""
    with tempfile.TemporaryDirectory() as place:
        out, log = Path(place, "stage1"), Path(place, "log")
        short = ["--max-steps", 3] if TINY else []
        status, seconds = command("train.py", "--stage", 1, "--out", out, *short, limit=110, log=log)
        losses = losses_of(out)
        yield dict(what="demo, stage 1", status=status, seconds=seconds, steps=len(losses), loss=losses[-1:],
                   tail=tail(log, 700))  # fmt: skip


def runs() -> Rows:
    """Runs many commands at once, each for a few steps, and compares the losses of each training with another's."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-", ignore_cleanup_errors=True) as folder:
        yield from runs_in(Path(folder), time.monotonic() + 200)  # before the limit of the job


def runs_in(folder: Path, deadline: float) -> Rows:
    prepare()
    few = ["--max-steps", 3 if TINY else 12, "--log-every", 1, "--workers", 1]
    backbones = ["--llama", LLAMA, "--vision", VISION]
    given = [*few, *backbones, "--images", FOLDER / "images", "--data"]
    first = ["train.py", "--stage", 1, *given, FOLDER / "captions.json"]
    second = ["train.py", "--stage", 2, *given, FOLDER / "conversation.json", "--lr", 1e-3]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1]
    fp32, ddp, fsdp = ["--precision", "fp32"], ["--parallel", "ddp"], ["--parallel", "fsdp"]
    trainings: dict[str, tuple[str, list]] = {  # name: the training whose losses it should have, and its command
        "plain": ("plain", second),
        "again": ("plain", second),
        "ddp": ("plain", [*torchrun, *second, *ddp]),
        "fsdp": ("plain", [*torchrun, *second, *fsdp]),
        "fsdp_ckpt": ("plain", [*torchrun, *second, *fsdp, "--checkpoint-activations"]),
        "compiled": ("plain", [*second, "--compile"]),
        "exact1": ("plain", [*second, "--deterministic"]),
        "exact2": ("plain", [*second, "--deterministic"]),
        "resumed": ("plain", [*second, "--save-every", 2]),
        "fp32": ("plain", [*second, *fp32]),
        "fp32_ddp": ("fp32", [*torchrun, *second, *fp32, *ddp]),
        "fp32_fsdp": ("fp32", [*torchrun, *second, *fp32, *fsdp]),
        "fp32_compiled": ("fp32", [*second, *fp32, "--compile"]),
        "stage1_short": ("stage1_short", first),
        "fsdp_stage1": ("stage1_short", [*torchrun, *first, *fsdp]),
    }
    found: dict[str, tuple[int, float]] = {}  # of each command: its status and its seconds

    def left() -> float:
        return max(1.0, deadline - time.monotonic())

    def start(name: str, *arguments):
        found[name] = command(*arguments, limit=left(), log=folder / f"{name}.log")

    def training(name: str):
        arguments = [*trainings[name][1], "--out", folder / name]
        if name == "resumed":
            kill_after_a_saved_state(arguments)
        start(name, *arguments)

    def kill_after_a_saved_state(arguments: list):
        process = start_script(arguments, folder / "resumed.log")
        while process.poll() is None and left() > 1 and not (folder / "resumed/state.pth").is_file():
            time.sleep(0.005)
        process.kill()
        process.wait()
        found["killed_after"] = (len(losses_of(folder / "resumed")), 0.0)

    def quiz():
        out, data = folder / "scienceqa", ["--data", FOLDER / "scienceqa"]
        start("scienceqa", "train.py", "--stage", 2, "--task", "scienceqa", *few, *backbones, *data, "--out", out)
        start("evaluation", "eval_scienceqa.py", "--model", out, *data, "--split", "val", "--max-new-tokens", 8,
              "--batch-size", 64)  # fmt: skip
        picture = next((FOLDER / "images").glob("test-*.png"))
        start("chat", "chat.py", "--model", out, "--image", picture, "--prompt", "What is this?",
              "--max-new-tokens", 80)  # fmt: skip

    with ThreadPoolExecutor(len(trainings) + 1) as pool:
        threads = [pool.submit(quiz), *(pool.submit(training, name) for name in trainings)]
    for name, (status, seconds) in sorted(found.items()):
        row = dict(what=name, status=status, seconds=seconds)
        reference, _ = trainings.get(name, (name, []))
        if reference != name:
            losses, expected = losses_of(folder / name), losses_of(folder / reference)
            row |= dict(first=largest_difference(losses[:2], expected[:2]), all=largest_difference(losses, expected))
        if name != "killed_after" and (status or name in ("chat", "evaluation")):
            row["tail"] = tail(folder / f"{name}.log", 500)
        yield row
    for pair in (("plain", "again"), ("exact1", "exact2"), ("plain", "resumed")):
        one, other = (folder / name for name in pair)
        llama, W = (equal(one / name, other / name) for name in ("consolidated.00.pth", "projector.pth"))
        same = losses_of(one) == losses_of(other)
        yield dict(what=f"{' and '.join(pair)}: equal bits", weights=llama, W=W, losses=same)
    for thread in threads:
        thread.result()  # raises its error


def equal(one: Path, other: Path) -> bool | None:
    """True if two files hold the same tensors; None if one is absent."""
    if not one.is_file() or not other.is_file():
        return None
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    return all(torch.equal(a[key], b[key]) for key in a)


# --- jobs


@dataclass(frozen=True)
class Job:
    section: str
    function: Callable[..., Rows]
    settings: dict = field(default_factory=dict)
    limit: float = 60  # seconds
    environment: dict = field(default_factory=dict)
    alone: bool = True  # no other job runs at the same time


JOBS = {
    "runs": Job("runs", runs, limit=210, alone=False),
    "demo": Job("demo", demo, limit=120),
    "parity": Job("parity", parity, limit=90, alone=False),
    "waits": Job("parity", waits, limit=60, alone=False),
    "7B stage 1": Job("steps", steps, dict(size="7B", stage=1, limits=[4096, 8192, 16384], theirs=True)),
    "7B stage 2 checkpointed": Job("steps", steps, dict(size="7B", stage=2, limits=[8192], theirs=True,
                                                        checkpoint_activations=True)),
    "13B generation": Job("generation", generation, dict(size="13B"), 70),
    "13B stage 1": Job("steps", steps, dict(size="13B", stage=1, limits=[4096, 8192]), 40),
    "7B stage 2": Job("steps", steps, dict(size="7B", stage=2, limits=[1024, 2048], n=4), 45),
    "13B stage 1 expandable": Job("steps", steps, dict(size="13B", stage=1, limits=[8192]), 40, EXPANDABLE),
    "7B generation": Job("generation", generation, dict(size="7B")),
    "13B stage 2 in part": Job("steps", steps, dict(size="13B", stage=2, limits=[8192], layers=20,
                                                    checkpoint_activations=True), 45),
    "7B stage 1 compiled": Job("compile", steps, dict(size="7B", stage=1, limits=[8192, 16384], compile=True)),
    "7B stage 2 compiled": Job("compile", steps, dict(size="7B", stage=2, limits=[8192], checkpoint_activations=True,
                                                      compile=True)),
    "7B stage 2 expandable": Job("steps", steps, dict(size="7B", stage=2, limits=[1024, 2048], n=4), 45, EXPANDABLE),
    "7B stage 2 small": Job("steps", steps, dict(size="7B", stage=2, limits=[8192], n=2, theirs=True), 45),
}  # fmt: skip


def do(name: str):
    """Runs a job in its own process: imports, waits for a line of stdin, then prints a line of JSON for each row."""
    job = JOBS[name]
    run.VIT = VIT
    run.autocast = lambda precision: torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")
    if ON_GPU and "enable_gqa" not in (model_file.varlen_attn.__kwdefaults__ or {}):  # PyTorch 2.11
        kernel = model_file.varlen_attn
        model_file.varlen_attn = lambda *given, enable_gqa=False, **settings: kernel(*given, **settings)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as distributed.start_processes
    sys.stdin.readline()
    for row in job.function(**job.settings):
        print("ROW " + json.dumps(row, default=str), flush=True)
    os._exit(0)  # frees the GPU at once


class Process:
    """A job in its process. The constructor starts its imports, and `go` its work."""

    def __init__(self, name: str):
        self.name, self.job, self.rows = name, JOBS[name], []
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        command = [sys.executable, str(Path(__file__)), "--job", name] + ["--tiny"] * TINY
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                        text=True, errors="replace", cwd=ROOT, start_new_session=True,
                                        env=os.environ | self.job.environment)  # fmt: skip
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ROW "):
                self.add(json.loads(line[4:]))

    def add(self, row: dict):
        self.rows.append(dict(job=self.name) | row)
        print(f"{time.monotonic() - BEGAN:5.0f} s  {shown(self.rows[-1])}", flush=True)

    def go(self):
        self.began = time.monotonic()
        with contextlib.suppress(OSError):  # it has ended
            assert self.process.stdin is not None
            self.process.stdin.write("\n")
            self.process.stdin.flush()

    def end(self, limit: float):
        """Waits for the job's end, at most `limit` seconds since its start."""
        try:
            status = self.process.wait(max(1.0, limit - (time.monotonic() - self.began)))
        except subprocess.TimeoutExpired:
            status = None
            self.stop()
        self.reader.join(5)
        self.errors.seek(0)
        if status is None:
            self.add(dict(what="stopped", error=f"took longer than {limit:.0f} s"))
        elif status or not self.rows:
            self.add(dict(what="ended", error=f"status {status}: {' '.join(self.errors.read().split())[-600:]}"))

    def stop(self):
        """Ends all processes of the job."""
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal_number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)


def shown(row: dict) -> str:
    def cell(value) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return f"{row['job']} | {row['what']} | " + " ".join(
        f"{name}={cell(value)}" for name, value in row.items() if name not in ("job", "what"))  # fmt: skip


BEGAN = time.monotonic()


def main():
    parser = ArgumentParser(__doc__)
    sections = list(dict.fromkeys(job.section for job in JOBS.values()))
    add = parser.add_argument
    add("--only", nargs="+", metavar="SECTION", default=sections, help="sections, or names of jobs: " + "; ".join(JOBS))
    add("--tiny", action="store_true", help="a rehearsal at tiny sizes")
    add("--seconds", type=float, default=360, help="seconds after which no job starts or continues")
    add("--out", type=Path, default=Path(__file__).parent / "gpu.json", help="the JSON file to write")
    add("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        do(args.job)
        return
    names = [name for name, job in JOBS.items() if job.section in args.only or name in args.only]
    groups = [[name for name in names if not JOBS[name].alone], *([name] for name in names if JOBS[name].alone)]
    about = dict(gpu=torch.cuda.get_device_name() if ON_GPU else "none", torch=torch.__version__,
                 transformers=run.transformers.__version__, python=sys.version.split()[0], tiny=TINY)  # fmt: skip
    print(about, flush=True)

    def left() -> float:
        return args.seconds - (time.monotonic() - BEGAN)

    rows: list[dict] = []
    current = [Process(name) for name in groups[0]]
    for following in [*groups[1:], []]:
        for process in current:
            process.go()
        upcoming = [Process(name) for name in following] if left() > 25 else []  # imports while the current ones work
        for process in current:
            process.end(min(process.job.limit, left()))
            rows += process.rows
        write_json(args.out, dict(about=about, rows=rows))
        current = upcoming
    print("\n" + "\n".join(shown({name: value for name, value in row.items() if name != "tail"}) for row in rows))
    if skipped := [name for name in names if all(row["job"] != name for row in rows)]:
        print(f"skipped for lack of time: {', '.join(skipped)}")
    print(f"{time.monotonic() - BEGAN:.0f} s; {args.out} is written")


if __name__ == "__main__":
    run_command(main)
