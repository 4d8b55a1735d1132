"""Times this project against Hugging Face `transformers`, or against another checkout of itself, on this machine.

    python bench/run.py                                # all rows; prints a table and writes bench/results.json
    python bench/run.py --sizes middle --rounds 9 --precision fp32 bf16
    python bench/run.py --before ../other-checkout     # instead of transformers

Both sides have the same weights, samples and precision and compute with all cores. In bf16 both compute under autocast
and hold their frozen parts in bf16, as train.py does. Each side runs in a process of its own. The two processes take
turns, so that changes of the machine's speed affect both. Times are medians over the rounds. Memory is the peak of a
process while it works, less the memory of its imports.

`transformers` runs as its users run it: `LlavaForConditionalGeneration` (with one matrix as its projector, as in the
first LLaVA) on a padded batch with labels, with SDPA attention. It answers by `generate`, one prompt at a time as LLaVA
does, or in left-padded batches of 8. Before the timing, the losses, gradients and answers of both sides are compared.
Loading is timed against `torch.load` and `load_state_dict`.
"""

import argparse
import ctypes
import functools
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import llava_twin, randomize  # noqa: E402

import checkpoint  # noqa: E402
from common import ArgumentParser, UserError, run_command, write_json  # noqa: E402
from conversation import load_tokenizer  # noqa: E402
from data import Batch, Encoder, Sample, grouped  # noqa: E402
from demo.world import LLAMA  # noqa: E402
from model import CPU, LLaMA, LLaMAConfig  # noqa: E402
from tools.fast_cpu import speed_up  # noqa: E402
from vision import VisionConfig, VisionTransformer, normalize  # noqa: E402

GIB = 2**30
VOCAB, SYSTEM, QUESTION, MAX_NEW_TOKENS = 32000, 45, 12, 64  # in pieces; the others in tokens
VIT = VisionConfig(image_size=224, patch_size=14, width=384, layers=6)  # 256 patches
SIZES = {  # the LLaMA; the samples of a step in stage 1 and in stage 2
    "small": (LLaMAConfig(256, 4, 4, 4, 688), 16, 8),
    "middle": (LLaMAConfig(512, 8, 8, 8, 1376), 8, 4),
    "large": (LLaMAConfig(1024, 12, 16, 16, 2752), 4, 2),
    "7B, 1 layer": (LLaMAConfig(4096, 1), 2, 1),
    "7B, 2 layers": (LLaMAConfig(4096, 2), 2, 1),
}
WORK = ("stage 1", "stage 2", "answers", "loading")
LOADED = LLaMAConfig(2048, 8, 16, 16, 5504)  # 1 GB in fp16
MAX_ERROR = 1e-4  # relative, of the loss and of gradients against transformers
RESET_PEAK = "5"  # in /proc/self/clear_refs, this resets the peak of the resident memory (man 5 proc)


# --- the work: samples (ids, green), with one picture each


def random_text(n: int, rng: torch.Generator) -> torch.Tensor:
    return torch.randint(3, VOCAB - 1, (n,), generator=rng)


def picture_ids() -> torch.Tensor:
    return torch.full((VIT.n_patches,), -1)


def caption(rng, system):
    """A sample of stage 1: the system message, a question and a picture in either order, a short answer."""
    question = random_text(QUESTION, rng)
    answer = random_text(int(torch.randint(8, 31, (), generator=rng)), rng)
    middle = [question, picture_ids()]
    if torch.rand((), generator=rng) < 0.5:
        middle.reverse()
    ids = torch.cat([system, *middle, answer])
    return ids, torch.arange(len(ids)) >= len(ids) - len(answer)


def conversation(rng, system, n):
    """A sample of stage 2: a picture, then several turns of 60 to 900 tokens (or n) in all, 55 % of them green."""
    n = n or int(torch.randint(60, 901, (), generator=rng))
    turn = torch.arange(120) >= 54
    turns = torch.cat([turn] * (n // 120 + 1))[:n]
    ids = torch.cat([system, picture_ids(), random_text(n, rng)])
    return ids, torch.cat([torch.zeros(SYSTEM + VIT.n_patches, dtype=torch.bool), turns])


def prompt(rng, system):
    """A prompt: a picture and a text of 20 to 200 tokens, none of them green."""
    n = int(torch.randint(20, 201, (), generator=rng))
    ids = torch.cat([system, picture_ids(), random_text(n, rng)])
    return ids, torch.zeros(len(ids), dtype=torch.bool)


def make_work(kind: str, n: int, length: int = 0) -> tuple[list, torch.Tensor]:
    """n samples (ids (T,), green (T,)), all with the same system message, and pixels (n, 3, 224, 224).

    length: tokens of text of each sample of stage 2; 0 = random.
    """
    rng = torch.Generator().manual_seed(len(kind))
    system = random_text(SYSTEM, rng)
    draw: dict[str, Callable] = {
        "stage 1": caption,
        "stage 2": functools.partial(conversation, n=length),
        "answers": prompt,
    }
    samples = [draw[kind](rng, system) for _ in range(n)]
    return samples, torch.randint(0, 256, (n, 3, 224, 224), dtype=torch.uint8, generator=rng)


def streams(work: tuple[list, torch.Tensor], limit: int = 0) -> list[Batch]:
    """The work as train.py's micro-batches of at most `limit` positions; 0 = as one stream, in the order given."""
    samples, pixels = work
    encoder = Encoder(load_tokenizer(LLAMA / "tokenizer.model"), VIT.n_patches, VIT.image_size)
    encoder.system = samples[0][0][:SYSTEM].tolist()  # make_work's own, instead of the tokenizer's
    parts = [Sample(ids[SYSTEM:].numpy(), green[SYSTEM:].numpy(), picture.numpy())
             for (ids, green), picture in zip(samples, pixels)]  # fmt: skip
    return [encoder.stream(group) for group in (grouped(parts, limit) if limit else [parts])]


def make_model(c: LLaMAConfig):
    return checkpoint.build(randomize(LLaMA(c), 0), randomize(VisionTransformer(VIT), 1))


# --- the two sides


def make_optimizer(trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)  # as in train.py


def autocast(precision: str):
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")


def hold_frozen(model: torch.nn.Module, precision: str):
    """Converts the frozen parameters to bf16, if that is the precision."""
    if precision == "bf16":
        for p in model.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()


class Ours:
    """Runs this project on one stream."""

    def __init__(self, llava, kind: str, work, precision: str = "fp32"):
        self.model, self.kind, self.autocast = llava, kind, autocast(precision)
        [batch] = streams(work, limit=0 if kind == "answers" else sys.maxsize)
        self.ids, self.target, self.borders, self.pixels = batch.to(CPU)
        if kind == "answers":
            hold_frozen(llava.requires_grad_(False), precision)
            return
        llava.set_trainable(int(kind[-1]))
        hold_frozen(llava, precision)
        self.trained = [p for p in llava.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.trained)

    def loss(self):
        with self.autocast:
            nll = self.model(self.ids, self.target, self.borders, self.pixels)
        return nll / len(self.target)

    def gradients(self) -> list[torch.Tensor]:
        """The gradients of W, and in stage 2 of two matrices of the LLaMA."""
        llama, found = self.model.llama, [self.model.projector.weight]
        if self.kind == "stage 2":
            found += [llama.layers[0].feed_forward.w2.weight, llama.output.weight]
        return [p.grad for p in found]

    def answers(self) -> list[list[int]]:
        with self.autocast:
            *_, answers = self.model.generate(self.ids, self.borders, self.pixels, lambda ids: False, MAX_NEW_TOKENS)
        return answers


class Theirs:
    """Runs transformers on a padded batch. at_once: the number of prompts that it answers together."""

    def __init__(self, llava, kind: str, work, at_once: int = 1, precision: str = "fp32"):
        self.kind, self.at_once, self.autocast = kind, at_once, autocast(precision)
        self.model = llava_twin(llava, 4096)
        self.take(work)
        self.model.requires_grad_(kind == "stage 2")
        self.model.model.vision_tower.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(kind != "answers")
        hold_frozen(self.model, precision)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.trained:
            self.optimizer = make_optimizer(self.trained)

    def take(self, work):
        """Pads the samples of `work`, which the next calls compute. Prompts are padded on the left."""
        samples, pixels = work
        shape = len(samples), max(len(ids) for ids, _ in samples)
        self.ids, self.mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        self.labels = torch.full(shape, -100)
        for i, (ids, green) in enumerate(samples):
            row = slice(-len(ids), None) if self.kind == "answers" else slice(0, len(ids))
            ids = torch.where(ids < 0, VOCAB - 1, ids)  # llava_twin's id of pictures
            self.ids[i, row], self.mask[i, row], self.labels[i, row] = ids, 1, torch.where(green, ids, -100)
        self.pixels = pixels.to(self.ids.device)

    def loss(self):
        with self.autocast:
            return self.model(
                input_ids=self.ids, attention_mask=self.mask, pixel_values=normalize(self.pixels), labels=self.labels
            ).loss

    def gradients(self) -> list[torch.Tensor]:
        """The gradients of the same parameters as `Ours.gradients`."""
        model, found = self.model.model, [self.model.model.multi_modal_projector.weight]
        if self.kind == "stage 2":
            found += [model.language_model.layers[0].mlp.down_proj.weight, self.model.lm_head.weight]
        return [p.grad for p in found]

    @torch.no_grad()
    def answers(self) -> list[list[int]]:
        answers = []
        for i in range(0, len(self.ids), self.at_once):
            rows = slice(i, i + self.at_once)
            first = int(self.mask[rows].argmax(1).min())  # drops the padding that all these rows share
            ids, mask = self.ids[rows, first:], self.mask[rows, first:]
            with self.autocast:
                out = self.model.generate(
                    input_ids=ids, attention_mask=mask, pixel_values=normalize(self.pixels[rows]), do_sample=False,
                    max_new_tokens=MAX_NEW_TOKENS, min_new_tokens=MAX_NEW_TOKENS, pad_token_id=0,
                )  # fmt: skip
            answers += out[:, ids.shape[1] :].tolist()
        return answers


def step(side):
    """Takes one step of training, as in train.py."""
    side.loss().backward()
    torch.nn.utils.clip_grad_norm_(side.trained, 1.0)
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)


# --- measuring


def timed(function) -> float:
    """The seconds of a call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def peak_matmul(multiply, n: int = 2048) -> float:
    """FLOP/s of the fastest of 15 fp32 products of n x n matrices."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    with torch.no_grad():
        return 2 * n**3 / min(timed(lambda: multiply(a, b)) for _ in range(15))


def necessary_flops(c: LLaMAConfig, kind: str, n: int) -> float:
    """FLOPs that every implementation of a training step needs.

    It counts no padding, logits at green positions only, and no gradients of frozen weights. In stage 1 it counts no
    backward pass at the positions before the picture, and in the last layer only what the green tokens depend on.
    Attention at green positions, and after the picture, counts as an average share of all attention.
    """
    samples, _ = make_work(kind, n)
    dim, kv, D, P = c.dim, c.n_kv_heads * c.head_dim, VIT.width, VIT.n_patches
    keys = 2 * dim * 2 * kv  # wk and wv, per position
    block = keys + 2 * (2 * dim * dim + 3 * dim * c.ffn_dim)  # all matrices of a block, per position
    total = 0
    for ids, green in samples:
        T, M, first = len(ids) - SYSTEM, int(green.sum()), int((ids < 0).nonzero()[0]) - SYSTEM
        back = T - first if kind == "stage 1" else T  # positions in the backward pass
        pairs = SYSTEM * T + T * (T + 1) / 2  # of a query and a key
        attention = 2 * 2 * dim * pairs
        forward = (c.n_layers - 1) * (block * T + attention) + keys * T + (block - keys) * M + attention * M / T
        logits = 2 * dim * c.vocab_size * M
        backward = (c.n_layers - 1) * (block * back + 2 * attention * back / T) + keys * back + (block - keys) * M
        backward += 2 * attention * M / T
        weights = forward - (c.n_layers - 1 + M / T) * attention + logits if kind == "stage 2" else 0
        projector = 2 * 2 * P * D * dim  # W's output, and W's gradient
        vit = (VIT.layers - 1) * ((P + 1) * 2 * 12 * D * D + 4 * D * (P + 1) ** 2) + P * 2 * 3 * VIT.patch_size**2 * D
        total += forward + backward + weights + 2 * logits + projector + vit
    if kind == "stage 2":  # the system message, constant in stage 1; in the last layer only its keys and values count
        total += 3 * SYSTEM * ((c.n_layers - 1) * (block + 2 * dim * (SYSTEM + 1)) + keys)
    return total


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes. ru_maxrss would include the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


class Worker:
    """Runs one side of a comparison in a process of its own, with the bench/run.py of its checkout.

    The protocol is the same in all checkouts: --alone SIDE SIZE KIND N AT_ONCE LENGTH starts the process, where SIDE is
    "ours", "theirs", "ours bf16" or "theirs bf16". For each line that it reads, the process does one piece of work and
    answers with a line "seconds peak_bytes".
    """

    def __init__(self, checkout: Path, *arguments):
        """arguments: those of `alone`."""
        self.command = [sys.executable, str(checkout / "bench/run.py"), "--alone", *map(str, arguments)]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> tuple[float, float]:
        """Does the work once -> its seconds, and the peak of the process in bytes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            seconds, peak = self.process.stdout.readline().split()
        except (OSError, ValueError):  # a closed pipe, or no answer
            raise UserError(f"{self.command[1]}: its process ended; see its own message") from None
        return float(seconds), float(peak)

    def close(self):
        self.process.communicate()


def alone(side: str, size: str, kind: str, n: int, at_once: int, length: int):
    """Runs the process of a `Worker`, which computes a training step, or all answers, for each line of stdin."""
    side, _, precision = side.partition(" ")
    if side == "ours":
        speed_up()  # as train.py does
    before = peak_memory()
    llava, work = make_model(SIZES[size][0]), make_work(kind, n, length)
    if side == "ours":
        one: Ours | Theirs = Ours(llava, kind, work, precision)
    else:
        one = Theirs(llava, kind, work, at_once, precision)
    del llava
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # returns the memory that building the models has freed, which speed_up keeps
    Path("/proc/self/clear_refs").write_text(RESET_PEAK)  # the peak of the building does not count
    for _ in sys.stdin:
        seconds = timed(one.answers if kind == "answers" else functools.partial(step, one))
        print(seconds, peak_memory() - before, flush=True)


# {name of a column: (the checkout that runs it, the side of that checkout)}
Sides = dict[str, tuple[Path, str]]


def in_turn(sides: Sides, size: str, kind: str, n: int, rounds: int, at_once: int = 1, length: int = 0) -> dict:
    """Lets both sides do the same work in turn -> {name: seconds of each round, "memory": the peak bytes of each}."""
    workers: dict[str, Worker] = {}
    results: dict[str, list] = {name: [] for name in sides}
    for i in range(rounds):
        for name in reversed(sides) if i % 2 else sides:
            if name not in workers:
                checkout, side = sides[name]
                workers[name] = Worker(checkout, side, size, kind, n, at_once, length)
                workers[name]()  # the first time is slower
            results[name].append(workers[name]())
            if size.startswith("7B"):  # the memory may not suffice for two at a time
                workers.pop(name).close()
    for worker in workers.values():
        worker.close()
    row: dict[str, list] = {name: [seconds for seconds, _ in pairs] for name, pairs in results.items()}
    return row | {"memory": [pairs[-1][1] for pairs in results.values()]}


# --- rows of the table


def largest_error(size: str, kind: str, n: int) -> float:
    """The largest relative error of our loss and gradients against those of transformers. Asserts that it is small."""
    llava, work = make_model(SIZES[size][0]), make_work(kind, n)
    ours, theirs = Ours(llava, kind, work), Theirs(llava, kind, work)
    losses = [side.loss() for side in (ours, theirs)]
    for loss in losses:
        loss.backward()
    errors = [abs(1 - losses[0].item() / losses[1].item())]
    pairs = zip(ours.gradients(), theirs.gradients(), strict=True)
    errors += [((a - b).norm() / b.norm()).item() for a, b in pairs]
    assert max(errors) < MAX_ERROR, errors
    return max(errors)


def compare_training(sides: Sides, size: str, kind: str, rounds: int) -> dict:
    c, *batch = SIZES[size]
    n = batch[int(kind[-1]) - 1]
    against = "padded step" if "theirs" in sides else "before"
    row = dict(size=size, work=kind, against=against, samples=n, flops=necessary_flops(c, kind, n))
    if sides.get("theirs") == (ROOT, "theirs"):  # in fp32
        row["error"] = largest_error(size, kind, n)
        gc.collect()
    return row | in_turn(sides, size, kind, n, rounds)


def compare_answers(sides: Sides, size: str, at_once: int, rounds: int, prompts: int = 32) -> dict:
    """at_once: prompts that transformers answers together. This project answers all of them together."""
    row: dict = dict(size=size, work=f"{prompts} answers", against="before")
    if "theirs" in sides:
        llava, work = make_model(SIZES[size][0]), make_work("answers", prompts)
        ours, theirs = Ours(llava, "answers", work), Theirs(llava, "answers", work, at_once)
        same = sum(a == b for a, b in zip(ours.answers(), theirs.answers(), strict=True))
        row |= dict(against=f"generate, {at_once} at a time", same=same)
    return row | in_turn(sides, size, "answers", prompts, rounds, at_once)


LOAD = """
import sys, time
from pathlib import Path

sys.path.insert(0, {checkout!r})
import torch

import checkpoint
from model import LLaMA, LLaMAConfig


def peak_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


before, began = peak_memory(), time.perf_counter()
if {side!r} == "ours":
    llama = checkpoint.load_llama({folder!r}, {dtype})
else:
    llama = LLaMA(LLaMAConfig({config})).to({dtype})
    llama.load_state_dict(torch.load(Path({folder!r}) / "consolidated.00.pth", weights_only=True))
sum(p.sum() for p in llama.parameters())  # reads every page
print(time.perf_counter() - began, peak_memory() - before)
"""


def compare_loading(sides: Sides, dtype: torch.dtype, rounds: int) -> dict:
    """Loads a raw fp16 checkpoint of 1 GB and converts it to `dtype`."""
    with tempfile.TemporaryDirectory() as folder:
        weights = {name: p.detach().half() for name, p in LLaMA(LOADED).named_parameters()}
        checkpoint.save_llama(LOADED, weights, folder)
        del weights
        size = (Path(folder) / "consolidated.00.pth").stat().st_size
        results: dict[str, list] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, (checkout, side) in sides.items():
                config = ", ".join(map(str, astuple(LOADED)))
                code = LOAD.format(checkout=str(checkout), side=side, folder=folder, config=config, dtype=dtype)
                process = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
                results[name].append([float(number) for number in process.stdout.split()])
    method = "load_state_dict" if "theirs" in sides else "before"
    row: dict = dict(size=f"{size / 1e9:.2f} GB", work="loading", against=f"{method}, to {str(dtype)[6:]}")
    row |= {name: [seconds for seconds, _ in pairs] for name, pairs in results.items()}
    return row | {"memory": [max(peak for _, peak in pairs) for pairs in results.values()]}


def per_added_layer(sides: Sides, rows: list[dict], kind: str) -> dict | None:
    """The difference between the rows of a 7B with 2 layers and with 1; None unless both exist."""
    pair = [row for row in rows if row["size"].startswith("7B") and row["work"] == kind]
    if len(pair) < 2:
        return None
    medians = [[statistics.median(row[name]) for name in sides] for row in pair]
    seconds = {name: [two - one] for name, one, two in zip(sides, *medians)}
    return dict(size="7B", work=kind, against="per added layer", flops=pair[1]["flops"] - pair[0]["flops"]) | seconds


# --- the table


def format_row(row: dict, sides: Sequence[str], peak: float) -> str:
    """A line with medians, ratios, and the share of the machine's best FLOP/s (`peak`) that this project reaches."""
    ours, other = (statistics.median(row[name]) for name in sides)
    text = f"{row['size']:13} {row['work']:11} {row['against']:28} {ours:8.3f} {other:8.3f} {other / ours:7.2f} x"
    if "memory" in row:
        memory_ours, memory_other = row["memory"]
        text += f" {memory_ours / GIB:7.2f} {memory_other / GIB:7.2f} {memory_ours / memory_other:6.2f}"
    else:
        text += " " * 23
    text += f" {100 * row['flops'] / ours / peak:5.0f} %" if "flops" in row else " " * 8
    ranges = " / ".join(f"{min(row[name]):.3g}-{max(row[name]):.3g}" for name in sides)
    return f"{text}   {ranges}"


def heading(sides: Sequence[str]) -> str:
    ours, other = sides
    return (f"{'size':13} {'work':11} {'against':28} {f'{ours}, s':>8} {other:>8} {'faster':>9} {'GiB':>7} {other:>7} "
            f"{'ratio':>6} {'peak':>7}   range of seconds: {ours} / {other}")  # fmt: skip


def sides_in(precision: str, before: Path | None) -> Sides:
    suffix = " bf16" if precision == "bf16" else ""
    other = {"before": (before.resolve(), f"ours{suffix}")} if before else {"theirs": (ROOT, f"theirs{suffix}")}
    return {"ours": (ROOT, f"ours{suffix}"), **other}


def measure_rows(a: argparse.Namespace, sides: Sides):
    """Yields each row when it is measured."""
    rows = []
    for size in a.sizes:
        rounds = min(a.rounds, 3) if size.startswith("7B") else a.rounds
        for kind in ("stage 1", "stage 2"):
            if kind in a.work:
                rows.append(compare_training(sides, size, kind, rounds))
                yield rows[-1]
        if "answers" in a.work and size == "middle":
            for at_once in (1, 8) if "theirs" in sides else (1,):
                yield compare_answers(sides, size, at_once, min(a.rounds, 3))
    if "loading" in a.work and sides["ours"] == (ROOT, "ours"):  # it does not depend on the precision of training
        for dtype in (torch.float16, torch.float32):
            yield compare_loading(sides, dtype, min(a.rounds, 5))
    for kind in ("stage 1", "stage 2"):
        row = per_added_layer(sides, rows, kind)
        if row:
            yield row


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="SIZE", help="sizes of the LLaMA: "
        + "; ".join(SIZES))  # fmt: skip
    add("--work", nargs="+", choices=WORK, default=list(WORK), metavar="WORK", help="what to time: " + "; ".join(WORK))
    add("--rounds", type=int, default=7, help="turns of each side; a time is the median over them")
    add("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="of both sides; a table for each")
    add("--before", type=Path, metavar="DIR", help="time this checkout of the project instead of transformers")
    add("--out", type=Path, default=Path(__file__).parent / "results.json", help="the JSON file to write")
    add("--alone", nargs=6, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if a.alone:
        side, size, kind, *numbers = a.alone
        alone(side, size, kind, *map(int, numbers))
        return
    if a.before and not (a.before / "bench/run.py").is_file():
        raise UserError(f"--before {a.before}: holds no bench/run.py; give the root of another checkout")
    torch_peak = peak_matmul(torch.matmul)
    speed_up(keep_memory=False)  # F.linear may now be faster than torch.matmul
    peak = max(torch_peak, peak_matmul(F.linear))
    about = dict(machine=platform.processor() or platform.machine(), threads=torch.get_num_threads(),
                 torch=torch.__version__, transformers=transformers.__version__, peak_flops=peak,
                 torch_matmul_flops=torch_peak, before=a.before and str(a.before))  # fmt: skip
    print(f"{about['threads']} threads, {peak / 1e9:.0f} GFLOP/s in the fastest fp32 product of matrices "
          f"({torch_peak / 1e9:.0f} in torch.matmul); torch {torch.__version__}, transformers "
          f"{transformers.__version__}")  # fmt: skip
    rows = []
    for precision in a.precision:
        sides = sides_in(precision, a.before)
        print(f"\n{precision}\n{heading(list(sides))}", flush=True)
        for row in measure_rows(a, sides):
            rows.append(row | {"precision": precision})
            print(format_row(row, list(sides), peak), flush=True)
    write_json(a.out, dict(about=about, rows=rows))


if __name__ == "__main__":
    run_command(main)
