"""Proves and times the GPU path on one NVIDIA GPU: numbers, speed, memory, waits, and whole runs of train.py.

    python -m bench.gpu                              # all sections; prints rows and writes bench/gpu.json
    python -m bench.gpu --only parity steps          # some sections
    python -m bench.gpu --tiny                       # a rehearsal at tiny sizes, also on a CPU

    parity       losses, gradients, answers and the varlen kernel against fp32 on the CPU
    runs         ddp, fsdp, resuming, evaluation and chat by the command lines
    demo         the demo's stage 1 with its exam
    steps        training steps of a 7B and a 13B with ViT-L/14, and of transformers on the same samples
    generation   32 answers of a 7B and a 13B, and of transformers
    compile      the steps of a 7B with --compile

The models have random weights that are made on the GPU, so no checkpoint is needed. Each job is a process with a time
limit of its own, and its error is a row as well. Jobs of `parity` and `runs` share the GPU; all others are alone on it.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
ON_GPU = torch.cuda.is_available()  # starts the driver, before conftest hides the GPUs from processes that start later
import run  # noqa: E402
from conftest import error, randomize  # noqa: E402

import checkpoint  # noqa: E402
import distributed  # noqa: E402
import model as model_file  # noqa: E402
import train  # noqa: E402
from common import ArgumentParser, run_command, write_json  # noqa: E402
from conversation import load_tokenizer  # noqa: E402
from data import Encoder, Sample, grouped  # noqa: E402
from demo.world import FOLDER, LLAMA, VISION, prepare  # noqa: E402
from model import LLaMA, LLaMAConfig, LLaVA, StreamAttention  # noqa: E402
from tools import plan  # noqa: E402
from vision import VisionConfig, VisionTransformer  # noqa: E402

if VISIBLE is None:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE

GIB = 2**30
CPU = torch.device("cpu")
DEVICE = torch.device("cuda") if ON_GPU else CPU
TINY = "--tiny" in sys.argv
SMALL = LLaMAConfig(64, 2, 4, 4, 128)
SIZES = {  # the LLaMA; its number of blocks is given by the job where not all fit
    "7B": SMALL if TINY else LLaMAConfig(),
    "13B": SMALL if TINY else LLaMAConfig(5120, 40, 40, 40, 13824),
}
VIT = VisionConfig(224, 14, 128, 3) if TINY else VisionConfig()
CAPTIONS, CONVERSATIONS, PROMPTS = (6, 2, 3) if TINY else (48, 8, 32)
NEW_TOKENS = 6 if TINY else 128
ROUNDS = 2 if TINY else 3  # timed steps, each with other samples
EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
Rows = Iterator[dict[str, Any]]


# --- the GPU, or its absence in a rehearsal


def synchronize():
    if ON_GPU:
        torch.cuda.synchronize()


def seconds_of(function: Callable, *arguments) -> float:
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
    """GiB at the peak since `forget_peak`: of live tensors, and of what PyTorch's allocator holds for them."""
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
    """How often each line made the host wait for the GPU, as PyTorch's own debug mode reports it."""
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
    """What train.py trains in bf16, by its own function; only the files are replaced by random weights."""
    args = argparse.Namespace(stage=stage, parallel="ddp", init_from=None, projector=None, llama="", vision="", seed=0,
                              checkpoint_activations=checkpoint_activations, compile=compile)  # fmt: skip
    llama = mock.patch("checkpoint.load_llama", lambda path, dtype: made(lambda: LLaMA(c), dtype, 1))
    vit = mock.patch("checkpoint.load_vision", lambda path, _, dtype: made(lambda: VisionTransformer(VIT), dtype, 2))
    with llama, vit:
        return train.starting_model(args, torch.bfloat16).to(DEVICE)


def make_encoder() -> Encoder:
    encoder = Encoder(load_tokenizer(LLAMA / "tokenizer.model"), VIT.n_patches, VIT.image_size)
    encoder.system = []  # `streams` sets it
    return encoder


def streams(encoder: Encoder, work: tuple[list, torch.Tensor], limit: int) -> list:
    """Work of run.py, (ids, green) and pixels of each sample, as the micro-batches of train.py."""
    samples, pixels = work
    encoder.system = samples[0][0][: run.SYSTEM].tolist()
    parts = []
    for (ids, green), picture in zip(samples, pixels):
        green = torch.zeros(len(ids), dtype=torch.bool) if green is None else green
        parts.append(Sample(ids[run.SYSTEM :].numpy(), green[run.SYSTEM :].numpy(), picture.numpy()))
    return [encoder.stream(group) for group in grouped(parts, limit)]


def batches_of(kind: str, n: int, rounds: int) -> list[tuple[list, torch.Tensor]]:
    """The work of `rounds` global batches of n samples each, all different."""
    samples, pixels = run.make_work(kind, n * rounds)
    return [(samples[i : i + n], pixels[i : i + n]) for i in range(0, n * rounds, n)]


def positions(work: tuple[list, torch.Tensor]) -> int:
    """As train.py counts them: the system message does not count."""
    return sum(len(ids) - run.SYSTEM for ids, _ in work[0])


@dataclass
class Trainer:
    """A model and its optimizer; `step` is the step of train.py's loop."""

    model: LLaVA
    parameters: list = field(default_factory=list)

    def __post_init__(self):
        self.net = distributed.distribute(self.model, "ddp", DEVICE, torch.bfloat16)
        self.parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, weight_decay=0.0, fused=True)

    def micro_batch(self, micro_batch, green: int) -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            nll = self.net(*micro_batch.to(DEVICE))
        (nll / green).backward()
        return nll.detach()

    def step(self, micro_batches: list) -> float:
        green = sum(int(micro_batch.green.sum()) for micro_batch in micro_batches)
        nll_sum = torch.zeros((), device=DEVICE)
        for micro_batch in micro_batches:
            nll_sum += self.micro_batch(micro_batch, green)
        distributed.clip_gradients(self.parameters, train.MAX_GRAD_NORM)
        loss = float(distributed.exchanged([nll_sum.item()], DEVICE).sum()) / green
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


# --- parity: loss, gradients, answers


def parity(**_) -> Rows:
    """A small LLaVA on the GPU against fp32 on the CPU; the errors of bf16 on the CPU are the yardstick of rounding."""
    torch.set_num_threads(min(8, len(os.sched_getaffinity(0))))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    encoder = make_encoder()
    for n_kv_heads in (8, 2):
        c = LLaMAConfig(64, 2, 8, n_kv_heads, 128) if TINY else LLaMAConfig(512, 4, 8, n_kv_heads, 1376)
        with mock.patch(f"{__name__}.VIT", VisionConfig(224, 14, 128, 3)):
            base = checkpoint.build(randomize(LLaMA(c), 0), randomize(VisionTransformer(VIT), 1))
        for stage in (1, 2):
            kind = f"stage {stage}"
            [batch] = streams(encoder, run.make_work(kind, 5, 100 if stage == 2 else 0), 10**6)
            exact = losses_and_gradients(base, stage, batch, CPU, torch.float32)
            for device, dtype in ((DEVICE, torch.float32), (DEVICE, torch.bfloat16), (CPU, torch.bfloat16)):
                found = losses_and_gradients(base, stage, batch, device, dtype)
                errors = {name: error(found[name], expected) for name, expected in exact.items()}
                worst = max(errors, key=lambda name: errors[name])
                yield dict(what=f"{kind} K={n_kv_heads} {device.type} {str(dtype)[6:]}", loss_error=errors["loss"],
                           gradient_error=errors[worst], worst=worst)  # fmt: skip
        yield answers_parity(encoder, base, n_kv_heads)
    for heads, n_kv_heads, hd in ((32, 32, 128), (32, 8, 128), (8, 8, 16)):
        yield from kernel_parity(heads, n_kv_heads, hd)


def losses_and_gradients(base: LLaVA, stage: int, batch, device: torch.device, dtype: torch.dtype) -> dict:
    """{name: fp32 on the CPU} of the loss and of the gradient of every parameter that trains."""
    llava = checkpoint.build(LLaMA(base.llama.config), VisionTransformer(base.vision.config))
    llava.load_state_dict(base.state_dict())
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


def answers_parity(encoder: Encoder, base: LLaVA, n_kv_heads: int) -> dict:
    [batch] = streams(encoder, run.make_work("answers", 4), 10**6)
    base.requires_grad_(False)
    expected, same = [], {}
    for device, dtype in ((CPU, torch.float32), (DEVICE, torch.float32), (DEVICE, torch.bfloat16)):
        llava = checkpoint.build(LLaMA(base.llama.config), VisionTransformer(base.vision.config))
        llava.load_state_dict(base.state_dict())
        llava.to(device, dtype).requires_grad_(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16), torch.inference_mode():
            ids, _, borders, pixels = batch.to(device)
            *_, answers = llava.generate(ids, borders, pixels, lambda ids: False, 16)
        torch.backends.cuda.enable_cudnn_sdp(True)
        expected = expected or answers
        pairs = [(a, b) for one, other in zip(answers, expected) for a, b in zip(one, other)]
        same[f"{device.type}_{str(dtype)[6:]}"] = sum(a == b for a, b in pairs) / len(pairs)
    return dict(what=f"answers K={n_kv_heads}, share of equal tokens", **same)


def kernel_parity(heads: int, n_kv_heads: int, hd: int) -> Rows:
    """The varlen kernel, and causal_attention sample by sample, against the latter in fp32."""
    if TINY:
        heads, n_kv_heads = heads // 4, n_kv_heads // 4
    borders = [45, 351, 500, 1400, 1401, 1710]
    rng = torch.Generator().manual_seed(hd)
    shapes = [(borders[-1], n, hd) for n in (heads, n_kv_heads, n_kv_heads, heads)]
    given = [torch.randn(shape, generator=rng).bfloat16().to(DEVICE) for shape in shapes]

    def outcome(attend: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
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


def waits(**_) -> Rows:
    """What makes the host wait, by line: in a micro-batch, in the rest of a step, and in a token."""
    encoder = make_encoder()
    c = SMALL if TINY else LLaMAConfig(n_layers=2)
    for stage in (1, 2):
        trainer = Trainer(make_llava(c, stage))
        [work] = batches_of(f"stage {stage}", 4, 1)
        micro_batches = streams(encoder, work, 600)
        trainer.step(micro_batches)  # the first step sets up the kernels
        one = waits_of(trainer.micro_batch, micro_batches[0], 100)
        whole = waits_of(trainer.step, micro_batches)
        yield dict(what=f"waits of stage {stage}", micro_batch=one.total(), step=whole.total(),
                   micro_batches=len(micro_batches), lines=dict(one | whole))  # fmt: skip
    [batch] = streams(encoder, run.make_work("answers", 4), 10**6)
    llava = trainer.model.requires_grad_(False)
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.inference_mode():
        ids, _, borders, pixels = batch.to(DEVICE)
        steps = llava.generate(ids, borders, pixels, lambda ids: False, 40)
        next(steps), next(steps)
        found = waits_of(lambda: [next(steps) for _ in range(10)])
    yield dict(what="waits of 10 tokens", tokens=found.total(), lines=dict(found))


# --- steps


def summary(works: list, times: list[float], flops: float, peak: float) -> dict:
    """times: the seconds of the step of each global batch."""
    n = sum(map(positions, works))
    seconds = sum(times)
    return dict(ms_step=1000 * seconds / len(times), positions_s=round(n / seconds), mfu=flops / seconds / peak)


def planned(c: LLaMAConfig, stage: int, limit: int, checkpoint_activations: bool) -> float:
    sizes = plan.gpu_bytes(c, VIT, stage, "ddp", 1, "bf16", limit, checkpoint_activations)
    return sum(sizes.values()) / GIB


def steps(size: str, stage: int, limits: list[int], layers: int = 0, theirs: bool = False, compile: bool = False,
          checkpoint_activations: bool = False, n: int = 0) -> Rows:  # fmt: skip
    """limits: values of --micro-batch-tokens. n: samples of a step. theirs: transformers takes the same steps after."""
    c = SIZES[size]
    layers = layers if layers and not TINY else c.n_layers
    c = LLaMAConfig(c.dim, layers, c.n_heads, c.n_kv_heads, c.ffn_dim)
    kind, n = f"stage {stage}", n or (CAPTIONS if stage == 1 else CONVERSATIONS)
    works, encoder, peak = batches_of(kind, n, ROUNDS), make_encoder(), matmul_flops()
    flops = run.necessary_flops(c, kind, n * ROUNDS)
    yield dict(what="a product in bf16", tflops=peak / 1e12)
    name = f"{size} of {c.n_layers} blocks, {kind}"
    for flag in ("checkpointed",) * checkpoint_activations + ("compiled",) * compile:
        name += f", {flag}"
    trainer = Trainer(make_llava(c, stage, checkpoint_activations, compile))
    for limit in limits:
        forget_peak()
        try:
            split = [streams(encoder, work, limit) for work in works]
            first = seconds_of(trainer.step, split[0])
            times = [seconds_of(trainer.step, one) for one in split]
        except torch.OutOfMemoryError:
            trainer.optimizer.zero_grad(set_to_none=True)
            yield dict(what=name, limit=limit, error="out of memory", **peaks())
            continue
        yield dict(what=name, limit=limit, micro_batches=sum(map(len, split)) / len(split), first_s=first,
                   **summary(works, times, flops, peak), **peaks(),
                   planned=planned(c, stage, limit, checkpoint_activations))  # fmt: skip
    if theirs:
        llava = trainer.model
        [batch] = streams(encoder, works[0], 10**6)
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
            loss = llava(*batch.to(DEVICE)).item() / int(batch.green.sum())
        del trainer
        yield their_steps(llava, kind, name, works, flops, peak, checkpoint_activations) | dict(loss_ours=loss)


def their_steps(llava: LLaVA, kind: str, name: str, works: list, flops: float, peak: float,
                checkpoint_activations: bool) -> dict:  # fmt: skip
    """The same steps of transformers, on one padded batch each."""
    llava.requires_grad_(False)
    sides: list[run.Theirs] = []
    with torch.device(DEVICE):
        for work in works:
            samples, pixels = work
            on_device = [(ids.to(DEVICE), green.to(DEVICE)) for ids, green in samples], pixels.to(DEVICE)
            if not sides:
                sides.append(run.Theirs(llava, kind, on_device, precision="bf16"))
                llava.to("meta")  # frees it
                continue
            with mock.patch("run.llava_twin", lambda *_: sides[0].model):
                sides.append(run.Theirs(llava, kind, on_device, precision="bf16"))
            sides[-1].trained, sides[-1].optimizer = sides[0].trained, sides[0].optimizer
    if checkpoint_activations:
        sides[0].model.train()
        sides[0].model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forget_peak()
    with torch.no_grad():
        loss = float(sides[0].loss())
    try:
        first = seconds_of(run.step, sides[0])
        times = [seconds_of(run.step, side) for side in sides]
    except torch.OutOfMemoryError:
        return dict(what=f"{name}, transformers", error="out of memory", **peaks())
    attention = getattr(sides[0].model.config, "_attn_implementation", "?")
    return dict(what=f"{name}, transformers {attention}", first_s=first, **summary(works, times, flops, peak),
                **peaks(), loss=loss)  # fmt: skip


# --- generation


def generation(size: str, theirs: bool = True) -> Rows:
    c, encoder = SIZES[size], make_encoder()
    llava = make_llava(c, 1).to(torch.bfloat16).requires_grad_(False)
    torch.backends.cuda.enable_cudnn_sdp(False)  # as checkpoint.open_run
    weights = sum(p.numel() * p.element_size() for p in llava.llama.parameters())
    samples, pixels = run.make_work("answers", PROMPTS)
    for n in (PROMPTS, 1):
        forget_peak()
        [batch] = streams(encoder, (samples[:n], pixels[:n]), 10**6)
        answer(llava, batch, 4)
        moments = answer(llava, batch, NEW_TOKENS)
        per_token = (moments[-1] - moments[1]) / (len(moments) - 2)
        row = dict(what=f"{size}: {n} answers together", first_token_ms=1000 * (moments[1] - moments[0]),
                   ms_token=1000 * per_token, tokens_s=n * NEW_TOKENS / (moments[-1] - moments[0]), **peaks(),
                   weights_gib=weights / GIB)  # fmt: skip
        with contextlib.suppress(Exception):
            row |= profile(llava, batch, 8)
        yield row
    [batch] = streams(encoder, (samples, pixels), 10**6)
    lengths: list[int] = []

    def has_ended(ids: list[int]) -> bool:
        """Ends each answer at a length that its first token draws."""
        if ends := len(ids) >= 1 + ids[0] % NEW_TOKENS:
            lengths.append(len(ids))
        return ends

    moments = answer(llava, batch, NEW_TOKENS, has_ended)
    seconds = moments[-1] - moments[0]
    yield dict(what=f"{size}: {PROMPTS} answers of many lengths", steps=len(moments) - 1, seconds=seconds,
               tokens_s=sum(lengths) / seconds, lengths=len(set(lengths)), **peaks())  # fmt: skip
    if theirs:
        yield from their_generation(llava, size, samples, pixels)


def answer(llava: LLaVA, batch, n: int, has_ended: Callable = lambda ids: False) -> list[float]:
    """The moments at which the work begins and at which each token is there."""
    synchronize()
    moments = [time.perf_counter()]
    with torch.autocast(DEVICE.type, torch.bfloat16), torch.inference_mode():
        ids, _, borders, pixels = batch.to(DEVICE)
        for _ in llava.generate(ids, borders, pixels, has_ended, n):
            moments.append(time.perf_counter())
    return moments


def profile(llava: LLaVA, batch, tokens: int) -> dict:
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
    on_device = [(ids.to(DEVICE), green) for ids, green in samples], pixels.to(DEVICE)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        theirs = run.Theirs(llava, "answers", on_device, PROMPTS, "bf16")
    torch.set_default_dtype(torch.float32)
    llava.to("meta")  # frees it
    with mock.patch("run.MAX_NEW_TOKENS", NEW_TOKENS):
        forget_peak()
        with mock.patch("run.MAX_NEW_TOKENS", 4):
            theirs.answers()
        seconds = seconds_of(theirs.answers)
        yield dict(what=f"{size}: {PROMPTS} answers, transformers", tokens_s=PROMPTS * NEW_TOKENS / seconds,
                   ms_token=1000 * seconds / NEW_TOKENS, **peaks())  # fmt: skip
        theirs.at_once = 1
        few = min(2, PROMPTS)
        theirs.ids, theirs.mask, theirs.pixels = theirs.ids[:few], theirs.mask[:few], theirs.pixels[:few]
        seconds = seconds_of(theirs.answers)
        yield dict(what=f"{size}: one answer at a time, transformers", tokens_s=few * NEW_TOKENS / seconds,
                   ms_token=1000 * seconds / NEW_TOKENS / few, **peaks())  # fmt: skip


# --- runs of the command lines


ALIVE: list[subprocess.Popen] = []


def command(*arguments, limit: float, log: Path) -> tuple[int, float]:
    """Runs a script of this project -> its exit status (-9 after the limit) and its seconds."""
    began = time.perf_counter()
    with open(log, "wb") as file:
        process = start_script(arguments, file)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        status = -9
        end_process(process)
    return status, time.perf_counter() - began


def start_script(arguments, file) -> subprocess.Popen:
    ALIVE.append(subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=file,
                                  stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "2"}))  # fmt: skip
    return ALIVE[-1]


def end_process(process: subprocess.Popen):
    process.terminate()  # torchrun then ends its processes
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    process.kill()
    process.wait()


def tail(log: Path, n: int = 300) -> str:
    return " ".join(log.read_text(errors="replace").replace("\r", "\n").split())[-n:]


def losses_of(run_folder: Path) -> list[float]:
    path = run_folder / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in path.read_text().splitlines()] if path.is_file() else []


def largest_difference(one: list[float], other: list[float]) -> float:
    pairs = zip_longest(one, other, fillvalue=float("nan"))
    return max((abs(a / b - 1) for a, b in pairs), default=float("nan"))


def runs(seconds: float = 200, **_) -> Rows:
    """Many commands at once, each for a few steps."""
    folder = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    try:
        yield from runs_in(folder, time.monotonic() + seconds)
    finally:
        for process in ALIVE:
            if process.poll() is None:
                end_process(process)
        shutil.rmtree(folder, ignore_errors=True)


def demo(**_) -> Rows:
    """The demo's stage 1, as a user runs it, with its exam."""
    with tempfile.TemporaryDirectory() as place:
        out, log = Path(place, "stage1"), Path(place, "log")
        short = ["--max-steps", 3] if TINY else []
        status, seconds = command("train.py", "--stage", 1, "--out", out, *short, limit=110, log=log)
        losses = losses_of(out)
        yield dict(what="demo, stage 1", status=status, seconds=seconds, steps=len(losses), loss=losses[-1:],
                   tail=tail(log, 700))  # fmt: skip


def runs_in(folder: Path, deadline: float) -> Rows:
    def left() -> float:
        return max(1.0, deadline - time.monotonic())

    prepare()
    few = ["--max-steps", 3 if TINY else 12, "--log-every", 1, "--workers", 1]
    data = ["--data", FOLDER / "conversation.json", "--images", FOLDER / "images"]
    backbones = ["--llama", LLAMA, "--vision", VISION]
    captions = ["--data", FOLDER / "captions.json", "--images", FOLDER / "images"]
    first = ["train.py", "--stage", 1, *backbones, *captions, *few]
    second = ["train.py", "--stage", 2, *backbones, *data, *few, "--lr", 1e-3]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1]
    found: dict[str, tuple[int, float]] = {}

    def start(name: str, *arguments):
        found[name] = command(*arguments, limit=left(), log=folder / f"{name}.log")

    def out(name: str) -> list:
        return ["--out", folder / name]

    def killed_and_continued():
        """Kills a run after a saved state and continues it."""
        arguments = [*second, *out("resumed"), "--save-every", 2]
        log = folder / "resumed.log"
        with open(log, "wb") as file:
            process = start_script(arguments, file)
        while process.poll() is None and left() > 1 and not (folder / "resumed/state.pth").is_file():
            time.sleep(0.005)
        process.kill()
        process.wait()
        found["killed_after"] = (len(losses_of(folder / "resumed")), 0.0)
        start("resumed", *arguments)

    def quiz():
        data = ["--data", FOLDER / "scienceqa"]
        start("scienceqa", *second[:3], *backbones, "--task", "scienceqa", *data, *few, *out("scienceqa"))
        start("evaluation", "eval_scienceqa.py", "--model", folder / "scienceqa", *data, "--split", "val",
              "--max-new-tokens", 8, "--batch-size", 64)  # fmt: skip
        picture = next((FOLDER / "images").glob("test-*.png"))
        start("chat", "chat.py", "--model", folder / "scienceqa", "--image", picture, "--prompt", "What is this?",
              "--max-new-tokens", 80)  # fmt: skip

    deterministic = ["--deterministic"] if "--deterministic" in (ROOT / "train.py").read_text() else []
    work = [killed_and_continued, quiz]
    fp32 = ["--precision", "fp32"]
    for name, arguments in {
        "plain": [*second, *out("plain")],
        "again": [*second, *out("again")],
        "ddp": [*torchrun, *second, *out("ddp"), "--parallel", "ddp"],
        "fsdp": [*torchrun, *second, *out("fsdp"), "--parallel", "fsdp"],
        "fsdp_ckpt": [*torchrun, *second, *out("fsdp_ckpt"), "--parallel", "fsdp", "--checkpoint-activations"],
        "fp32": [*second, *out("fp32"), *fp32],
        "fp32_ddp": [*torchrun, *second, *out("fp32_ddp"), *fp32, "--parallel", "ddp"],
        "fp32_fsdp": [*torchrun, *second, *out("fp32_fsdp"), *fp32, "--parallel", "fsdp"],
        "fp32_compiled": [*second, *out("fp32_compiled"), *fp32, "--compile"],
        "fsdp_stage1": [*torchrun, *first, *out("fsdp_stage1"), "--parallel", "fsdp"],
        "stage1_short": [*first, *out("stage1_short")],
        "compiled": [*second, *out("compiled"), "--compile"],
        "exact1": [*second, *out("exact1"), *deterministic],
        "exact2": [*second, *out("exact2"), *deterministic],
    }.items():
        work.append(lambda name=name, arguments=arguments: start(name, *arguments))  # type: ignore[misc]
    threads = [threading.Thread(target=one, daemon=True) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    plain = losses_of(folder / "plain")
    for name in sorted(found):
        status, seconds = found[name]
        row = dict(what=name, status=status, seconds=seconds)
        if (folder / name).is_dir() and name not in ("plain", "scienceqa", "stage1_short"):
            reference = plain
            if name.endswith("stage1"):
                reference = losses_of(folder / "stage1_short")
            elif name.startswith("fp32_"):
                reference = losses_of(folder / "fp32")
            losses = losses_of(folder / name)
            row |= dict(first=largest_difference(losses[:2], reference[:2]), all=largest_difference(losses, reference))
        log = folder / f"{name}.log"
        if log.is_file() and (status or name in ("chat", "evaluation")):
            row["tail"] = tail(log, 500)
        yield row
    for one, other in (("plain", "again"), ("exact1", "exact2"), ("plain", "resumed")):
        llama, W = (equal(folder, one, other, name) for name in ("consolidated.00.pth", "projector.pth"))
        yield dict(what=f"{one} and {other}: equal bits", deterministic=bool(deterministic), weights=llama, W=W,
                   losses=losses_of(folder / one) == losses_of(folder / other))  # fmt: skip


def equal(folder: Path, one: str, other: str, name: str) -> bool | None:
    pair = [folder / side / name for side in (one, other)]
    if not all(path.is_file() for path in pair):
        return None
    a, b = (torch.load(path, weights_only=True) for path in pair)
    return all(torch.equal(a[key], b[key]) for key in a)


# --- jobs


@dataclass(frozen=True)
class Job:
    section: str
    function: Callable[..., Rows]
    settings: dict = field(default_factory=dict)
    limit: float = 60  # seconds
    environment: dict = field(default_factory=dict)
    alone: bool = True


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
    """The process of a job: imports, waits for a line, then prints a line of JSON for each row."""
    job = JOBS[name]
    run.VIT = VIT
    run.autocast = lambda precision: torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")
    if ON_GPU and "enable_gqa" not in (model_file.varlen_attn.__kwdefaults__ or {}):  # PyTorch 2.11
        kernel = model_file.varlen_attn
        model_file.varlen_attn = lambda *given, enable_gqa=False, **settings: kernel(*given, **settings)
    print("READY", flush=True)
    sys.stdin.readline()
    if ON_GPU and job.function is not parity:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as distributed.start_processes
    try:
        for row in job.function(**job.settings):
            print("ROW " + json.dumps(row, default=str), flush=True)
    except Exception as problem:
        lines = traceback.format_exc().splitlines()
        where = [line.strip() for line in lines if "File" in line][-4:]
        row = dict(what=name, error=f"{type(problem).__name__}: {problem}"[:600], where=where)
        print("ROW " + json.dumps(row), flush=True)
    sys.stdout.flush()
    os._exit(0)  # frees the GPU at once


class Process:
    """A job in its process. The constructor starts the imports; `go` starts the work."""

    def __init__(self, name: str):
        self.name, self.job, self.rows = name, JOBS[name], []
        command = [sys.executable, str(Path(__file__)), "--job", name] + ["--tiny"] * TINY
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True, errors="replace", cwd=ROOT, start_new_session=True,
                                        env=os.environ | self.job.environment)  # fmt: skip
        self.errors: list[str] = []
        self.readers = [threading.Thread(target=reader, daemon=True) for reader in (self.read, self.read_errors)]
        for reader in self.readers:
            reader.start()

    def read(self):
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ROW "):
                self.add(json.loads(line[4:]))

    def read_errors(self):
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.errors = [*self.errors[-20:], line.rstrip()]

    def add(self, row: dict):
        self.rows.append(dict(job=self.name) | row)
        print(f"{time.monotonic() - BEGAN:5.0f} s  {shown(self.rows[-1])}", flush=True)

    def go(self):
        self.began = time.monotonic()
        with contextlib.suppress(OSError):
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
        for reader in self.readers:
            reader.join(5)
        if status is None:
            self.add(dict(what="stopped", error=f"took longer than {limit:.0f} s"))
        elif status or not self.rows:
            self.add(dict(what="ended", error=f"status {status}: {' | '.join(self.errors)[-600:]}"))

    def stop(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM if self.job.function is runs else signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


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
    add("--only", nargs="+", metavar="SECTION", default=sections, help="sections, or jobs by name: " + "; ".join(JOBS))
    add("--tiny", action="store_true", help="tiny sizes, for a rehearsal")
    add("--seconds", type=float, default=360, help="no job starts or continues after this time")
    add("--out", type=Path, default=Path(__file__).parent / "gpu.json", help="the JSON file to write")
    add("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        do(args.job)
        return
    names = [name for name, job in JOBS.items() if job.section in args.only or name in args.only]
    about = dict(gpu=torch.cuda.get_device_name() if ON_GPU else "none", torch=torch.__version__,
                 transformers=run.transformers.__version__, python=sys.version.split()[0], tiny=TINY)  # fmt: skip
    print(about, flush=True)
    rows: list[dict] = []

    def left() -> float:
        return args.seconds - (time.monotonic() - BEGAN)

    def save(done: list[Process]):
        rows[:] = [row for process in done for row in process.rows]
        write_json(args.out, dict(about=about, rows=rows))

    done = [Process(name) for name in names if not JOBS[name].alone]
    alone = [name for name in names if JOBS[name].alone]
    for process in done:
        process.go()
    upcoming = Process(alone[0]) if alone else None
    for process in done:
        process.end(min(process.job.limit, left()))
    for i, name in enumerate(alone):
        assert upcoming is not None
        process, upcoming = upcoming, Process(alone[i + 1]) if i + 1 < len(alone) and left() > 25 else None
        process.go()
        process.end(min(process.job.limit, left()))
        done.append(process)
        save(done)
        if upcoming is None:
            break
    save(done)
    print("\n" + "\n".join(shown({name: value for name, value in row.items() if name != "tail"}) for row in rows))
    if skipped := [name for name in alone if all(process.name != name for process in done)]:
        print(f"skipped for lack of time: {', '.join(skipped)}")
    print(f"{time.monotonic() - BEGAN:.0f} s; {args.out} is written")


if __name__ == "__main__":
    run_command(main)
