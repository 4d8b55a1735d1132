"""This project beside Hugging Face `transformers`: the same weights and samples, in turn, on this machine.

    python bench/run.py                       # all; prints the table, writes bench/results.json
    python bench/run.py --sizes middle --rounds 9

Theirs is what a user would write: `LlavaForConditionalGeneration` (its projector one matrix, as in LLaVA 1), a padded
batch with labels, SDPA attention; answers by `generate`, one prompt at a time as the original does, or left-padded
batches of 8. Both compute in fp32 with all cores; loss and gradients are compared before anything is timed. Then each
has a fresh process of its own, and they work in turn. Times are medians of the rounds; memory is the peak of either's
process while it works, less its imports. Loading is compared with `torch.load` and `load_state_dict` instead.
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
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import llava_twin, randomize  # noqa: E402

import checkpoint  # noqa: E402
import cpu  # noqa: E402
from conversation import HelpForm  # noqa: E402
from data import Batch  # noqa: E402
from model import LLaMA, LLaMAConfig  # noqa: E402
from plan import GIB  # noqa: E402
from vision import VisionConfig, VisionTransformer, normalize  # noqa: E402

VOCAB, SYSTEM, QUESTION, MAX_NEW = 32000, 45, 12, 64
VIT = VisionConfig(image_size=224, patch_size=14, width=384, layers=6)  # 256 patches
SIZES = {  # of the LLaMA; samples of a step in stage 1, in stage 2
    "small": (LLaMAConfig(256, 4, 4, 4, 688), 16, 8),
    "middle": (LLaMAConfig(512, 8, 8, 8, 1376), 8, 4),
    "large": (LLaMAConfig(1024, 12, 16, 16, 2752), 4, 2),
    "7B, 1 layer": (LLaMAConfig(4096, 1), 2, 1),
    "7B, 2 layers": (LLaMAConfig(4096, 2), 2, 1),
}


# --- the work: samples (ids, green), a picture each


def text(n: int, dice) -> torch.Tensor:
    return torch.randint(3, VOCAB - 1, (n,), generator=dice)


def caption(dice, system):
    """Stage 1: system message, question and picture in either order, a short answer."""
    picture, question = torch.full((VIT.n_patches,), -1), text(QUESTION, dice)
    answer = text(int(torch.randint(8, 31, (), generator=dice)), dice)
    middle = [picture, question] if torch.rand((), generator=dice) < 0.5 else [question, picture]
    ids = torch.cat([system, *middle, answer])
    return ids, torch.arange(len(ids)) >= len(ids) - len(answer)


def conversation(dice, system, n):
    """Stage 2: several turns of 60 to 900 tokens in all, 55 % of them green, the picture first."""
    n = n or int(torch.randint(60, 901, (), generator=dice))
    turns = torch.cat([torch.arange(120) >= 54] * (n // 120 + 1))[:n]
    ids = torch.cat([system, torch.full((VIT.n_patches,), -1), text(n, dice)])
    return ids, torch.cat([torch.zeros(SYSTEM + VIT.n_patches, dtype=torch.bool), turns])


def prompt(dice, system):
    n = int(torch.randint(20, 201, (), generator=dice))
    return torch.cat([system, torch.full((VIT.n_patches,), -1), text(n, dice)]), None


def work(kind: str, n: int, length: int = 0) -> tuple[torch.Tensor, list, torch.Tensor]:
    """-> ids of the system message, samples (ids (T,), green (T,)), pixels (n, 3, 224, 224).

    length: of the text of each sample of stage 2, instead of any.
    """
    dice = torch.Generator().manual_seed(len(kind))
    system = text(SYSTEM, dice)
    draws: dict[str, Callable] = {"stage 1": caption, "stage 2": functools.partial(conversation, n=length),
                                  "answers": prompt}  # fmt: skip
    samples = [draws[kind](dice, system) for _ in range(n)]
    return system, samples, torch.randint(0, 256, (n, 3, 224, 224), dtype=torch.uint8, generator=dice)


# --- ours


def make(c: LLaMAConfig):
    return checkpoint.build(randomize(LLaMA(c), 0), randomize(VisionTransformer(VIT), 1))


class Ours:
    def __init__(self, llava, kind: str, task):
        self.model, self.kind = llava, kind
        system, samples, pixels = task
        ids = [ids[SYSTEM:] for ids, _ in samples]
        borders = torch.tensor([0] + [len(i) for i in ids]).cumsum(0).int()
        green = torch.cat([torch.zeros(len(i), dtype=torch.bool) if g is None else g[SYSTEM:]
                           for i, (_, g) in zip(ids, samples)])  # fmt: skip
        self.batch, self.prefix = Batch(torch.cat(ids), green, borders, pixels), system
        if kind == "answers":
            llava.requires_grad_(False)
        else:
            self.trained = llava.set_trainable(int(kind[-1]))
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)
        if kind != "stage 2":  # read once a run
            with torch.no_grad():
                self.prefix = llava.read_prefix(system)

    def loss(self):
        b = self.batch
        nll, green = self.model(b.ids, b.green, b.cu_seqlens, b.pixels, self.prefix)
        return nll / green

    def gradients(self):
        return {name: self.model.get_parameter(name).grad for name in ("projector.weight", *self.also())}

    def also(self):
        return ("llama.layers.0.feed_forward.w2.weight", "llama.output.weight") if self.kind == "stage 2" else ()

    def answers(self):
        b = self.batch
        return self.model.answers(b.ids, b.cu_seqlens, b.pixels, (), MAX_NEW, prefix=self.prefix)


# --- theirs


class Theirs:
    def __init__(self, llava, kind: str, task, at_once: int = 1):
        self.kind, self.at_once = kind, at_once
        self.model = llava_twin(llava, 4096)
        _, samples, self.pixels = task
        n = len(samples)
        longest = max(len(ids) for ids, _ in samples)
        self.ids, self.mask = torch.zeros(n, longest, dtype=torch.long), torch.zeros(n, longest, dtype=torch.long)
        self.labels = torch.full((n, longest), -100)
        for i, (ids, green) in enumerate(samples):
            row = slice(longest - len(ids), longest) if green is None else slice(0, len(ids))  # prompts end together
            ids = torch.where(ids < 0, VOCAB - 1, ids)
            self.ids[i, row], self.mask[i, row] = ids, 1
            if green is not None:
                self.labels[i, row] = torch.where(green, ids, -100)
        self.model.requires_grad_(kind == "stage 2")
        self.model.model.vision_tower.requires_grad_(False)
        self.model.model.multi_modal_projector.requires_grad_(kind != "answers")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if self.trained:
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)

    def pictures(self, rows=slice(None)):
        return normalize(self.pixels[rows])

    def loss(self):
        return self.model(input_ids=self.ids, attention_mask=self.mask, pixel_values=self.pictures(),
                          labels=self.labels).loss  # fmt: skip

    def gradients(self):
        model = self.model.model
        found = {"projector.weight": model.multi_modal_projector.weight.grad}
        if self.kind == "stage 2":
            found["llama.layers.0.feed_forward.w2.weight"] = model.language_model.layers[0].mlp.down_proj.weight.grad
            found["llama.output.weight"] = self.model.lm_head.weight.grad
        return found

    @torch.no_grad()
    def answers(self):
        said = []
        for i in range(0, len(self.ids), self.at_once):
            rows = slice(i, i + self.at_once)
            first = int(self.mask[rows].argmax(1).min())  # no padding that all rows have
            ids, mask = self.ids[rows, first:], self.mask[rows, first:]
            out = self.model.generate(input_ids=ids, attention_mask=mask, pixel_values=self.pictures(rows),
                                      do_sample=False, max_new_tokens=MAX_NEW, min_new_tokens=MAX_NEW,
                                      pad_token_id=0)  # fmt: skip
            said += out[:, ids.shape[1] :].tolist()
        return said


# --- measuring


def step(side):
    """One step of training, as in train.py."""
    side.loss().backward()
    torch.nn.utils.clip_grad_norm_(side.trained, 1.0)
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=True)


def timed(do) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def peak_matmul(multiply, n: int = 2048) -> float:
    """FLOP/s of the best of a few fp32 matmuls."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    with torch.no_grad():
        return 2 * n**3 / min(timed(lambda: multiply(a, b)) for _ in range(15))


def necessary(c: LLaMAConfig, kind: str, n: int) -> float:
    """FLOPs of a step that cannot be left out: no padding, logits at green positions only, no gradients of what is
    frozen, in stage 1 nothing backward before the picture, in the last layer only what a green token needs (of whose
    attention, and of what is before the picture, the mean is taken)."""
    _, samples, _ = work(kind, n)
    dim, kv, D, P = c.dim, c.n_kv_heads * c.head_dim, VIT.width, VIT.n_patches
    keys = 2 * dim * 2 * kv  # per position
    block = keys + 2 * (2 * dim * dim + 3 * dim * c.ffn_dim)
    total = 0
    for ids, green in samples:
        T, M, first = len(ids) - SYSTEM, int(green.sum()), int((ids < 0).nonzero()[0]) - SYSTEM
        back = T - first if kind == "stage 1" else T  # positions that a gradient reaches
        seen = SYSTEM * T + T * (T + 1) / 2  # pairs of a query and a key
        attention = 2 * 2 * dim * seen
        forward = (c.n_layers - 1) * (block * T + attention) + keys * T + (block - keys) * M + attention * M / T
        words = 2 * dim * c.vocab_size * M
        backward = (c.n_layers - 1) * (block * back + 2 * attention * back / T) + keys * back + (block - keys) * M
        backward += 2 * attention * M / T
        weights = forward - (c.n_layers - 1 + M / T) * attention + words if kind == "stage 2" else 0
        projector = 2 * 2 * P * D * dim  # W: forward, and its gradient
        vit = (VIT.layers - 1) * ((P + 1) * 2 * 12 * D * D + 4 * D * (P + 1) ** 2) + P * 2 * 3 * VIT.patch_size**2 * D
        total += forward + backward + weights + 2 * words + projector + vit
    if kind == "stage 2":  # the system message is read with each batch: of the last layer, its keys and values
        total += 3 * SYSTEM * ((c.n_layers - 1) * (block + 2 * dim * (SYSTEM + 1)) + keys)
    return total


def high_water() -> int:
    """The most bytes that this process has held. (Not ru_maxrss, which a process has from the one that started it.)"""
    return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])


class Side:
    """`ours` or `theirs` in a process of its own, as its users would have it; it works when called."""

    def __init__(self, *arguments):
        """arguments: of `alone`."""
        command = [sys.executable, str(ROOT / "bench/run.py"), "--alone", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> tuple[float, float]:
        """-> seconds of one piece of the work, peak bytes so far."""
        print(file=self.process.stdin, flush=True)
        assert self.process.stdout is not None
        seconds, peak = self.process.stdout.readline().split()
        return float(seconds), float(peak)


def alone(side: str, size: str, kind: str, n: int, at_once: int, length: int):
    """What a `Side` starts: a step (or all the answers) for each line that it is given."""
    if side == "ours":
        cpu.keep_memory()  # as train.py does
    before = high_water()
    llava, task = make(SIZES[size][0]), work(kind, n, length)
    one = Ours(llava, kind, task) if side == "ours" else Theirs(llava, kind, task, at_once)
    del llava
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the building has freed goes back to the system, which `ours` had forbidden
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: the work is measured, not the building
    for _ in sys.stdin:
        seconds = timed(one.answers if kind == "answers" else functools.partial(step, one))
        print(seconds, high_water() - before, flush=True)


def in_turn(size: str, kind: str, n: int, rounds: int, at_once: int = 1, length: int = 0) -> dict:
    """-> seconds of each round of ours and theirs, and the peak bytes of each."""
    sides, found = {}, {"ours": [], "theirs": []}
    for i in range(rounds):
        for name in ("theirs", "ours") if i % 2 else ("ours", "theirs"):
            if not (side := sides.pop(name, None)):
                side = Side(name, size, kind, n, at_once, length)
                side()  # warm
            found[name].append(side())
            if size.startswith("7B"):
                side.process.communicate()  # there may be no room for both
            else:
                sides[name] = side
    for side in sides.values():
        side.process.communicate()
    return {name: [seconds for seconds, _ in pairs] for name, pairs in found.items()} | dict(
        memory=[pairs[-1][1] for pairs in found.values()])  # fmt: skip


def compare(size: str, kind: str, rounds: int) -> dict:
    """One row: training."""
    c, *batch = SIZES[size]
    n = batch[int(kind[-1]) - 1]
    llava, task = make(c), work(kind, n)
    ours, theirs = Ours(llava, kind, task), Theirs(llava, kind, task)
    losses = [side.loss() for side in (ours, theirs)]
    for loss in losses:
        loss.backward()
    errors = [abs(1 - losses[0].item() / losses[1].item())]
    pairs = zip(ours.gradients().values(), theirs.gradients().values(), strict=True)
    errors += [((a - b).norm() / b.norm()).item() for a, b in pairs]
    assert max(errors) < 1e-4, errors
    del ours, theirs, llava, loss, losses, pairs
    gc.collect()  # there may be no room for three
    return dict(size=size, work=kind, against="padded step", samples=n, error=max(errors), flops=necessary(c, kind, n),
                **in_turn(size, kind, n, rounds))  # fmt: skip


def compare_answers(size: str, at_once: int, rounds: int, prompts: int = 32) -> dict:
    llava, task = make(SIZES[size][0]), work("answers", prompts)
    ours, theirs = Ours(llava, "answers", task), Theirs(llava, "answers", task, at_once)
    same = sum(a == b for a, b in zip(ours.answers(), theirs.answers()))
    return dict(size=size, work=f"{prompts} answers", against=f"generate, {at_once} at a time", same=same,
                **in_turn(size, "answers", prompts, rounds, at_once))  # fmt: skip


LOAD = """
import sys, time; sys.path[:0] = [{root!r}, {root!r} + "/bench"]
import torch, checkpoint; from run import high_water; from model import LLaMA, LLaMAConfig; from pathlib import Path
before, began = high_water(), time.perf_counter()
if {side!r} == "ours":
    llama = checkpoint.load_llama({folder!r}, {dtype})
else:
    llama = LLaMA(LLaMAConfig({config})).to({dtype})
    llama.load_state_dict(torch.load(Path({folder!r}) / "consolidated.00.pth", weights_only=True))
sum(p.sum() for p in llama.parameters())  # every page is read
print(time.perf_counter() - began, high_water() - before)
"""


def compare_loading(dtype: torch.dtype, rounds: int) -> dict:
    """A raw fp16 checkpoint of 1 GB, to `dtype`."""
    c = LLaMAConfig(2048, 8, 16, 16, 5504)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_llama(LLaMA(c), folder, torch.float16)
        size = (Path(folder) / "consolidated.00.pth").stat().st_size
        found = {"ours": [], "theirs": []}
        for _ in range(rounds):
            for side, results in found.items():
                code = LOAD.format(root=str(ROOT), side=side, folder=folder, config=str(astuple(c)[:5])[1:-1],
                                   dtype=dtype)  # fmt: skip
                said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
                results.append([float(x) for x in said.split()])
    return dict(size=f"{size / 1e9:.2f} GB", work="loading", against=f"load_state_dict, to {str(dtype)[6:]}",
                **{side: [r[0] for r in results] for side, results in found.items()},
                memory=[max(r[1] for r in results) for results in found.values()])  # fmt: skip


# --- the table


def line(row: dict, peak: float) -> str:
    a, b = (statistics.median(row[side]) for side in ("ours", "theirs"))
    spread = "{:.3g}-{:.3g} / {:.3g}-{:.3g}".format(*(f(row[s]) for s in ("ours", "theirs") for f in (min, max)))
    text = f"{row['size']:13} {row['work']:11} {row['against']:28} {a:8.3f} {b:8.3f} {b / a:7.2f} x"
    held = row.get("memory")
    text += f" {held[0] / GIB:7.2f} {held[1] / GIB:7.2f} {held[0] / held[1]:6.2f}" if held else " " * 23
    return text + (f" {100 * row['flops'] / a / peak:5.0f} %" if "flops" in row else " " * 8) + f"   {spread}"


HEAD = (f"{'size':13} {'work':11} {'against':28} {'ours, s':>8} {'theirs':>8} {'faster':>9} {'GiB':>7} {'theirs':>7} "
        f"{'ratio':>6} {'peak':>7}   range of seconds: ours / theirs")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpForm)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), metavar="SIZE",
                        help="of the LLaMA: " + "; ".join(SIZES))  # fmt: skip
    parser.add_argument("--work", nargs="+", choices=("stage 1", "stage 2", "answers", "loading"),
                        default=["stage 1", "stage 2", "answers", "loading"], help="what is timed")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side; the times are their medians")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results.json", help="the JSON to write")
    parser.add_argument("--alone", nargs=6, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if a.alone:
        return alone(*a.alone[:3], *map(int, a.alone[3:]))
    own, rows = peak_matmul(torch.matmul), []
    peak = max(own, peak_matmul(cpu.linear))  # what this machine can do
    about = dict(machine=platform.processor() or platform.machine(), threads=torch.get_num_threads(),
                 torch=torch.__version__, transformers=transformers.__version__, peak_flops=peak,
                 torch_matmul_flops=own)  # fmt: skip
    print(f"{about['threads']} threads, {peak / 1e9:.0f} GFLOP/s in the best matmul ({own / 1e9:.0f} in torch's own); "
          f"torch {torch.__version__}, transformers {transformers.__version__}\n{HEAD}", flush=True)  # fmt: skip

    def add(row):
        rows.append(row)
        print(line(row, peak), flush=True)

    for size in a.sizes:
        for kind in ("stage 1", "stage 2"):
            if kind in a.work:
                add(compare(size, kind, a.rounds if not size.startswith("7B") else min(a.rounds, 3)))
        if "answers" in a.work and size == "middle":
            for at_once in (1, 8):
                add(compare_answers(size, at_once, min(a.rounds, 3)))
    if "loading" in a.work:
        for dtype in (torch.float16, torch.float32):
            add(compare_loading(dtype, 5))
    for kind in ("stage 1", "stage 2"):
        seven = [row for row in rows if row["size"].startswith("7B") and row["work"] == kind]
        if len(seven) == 2:
            a_, b_ = (statistics.median(seven[1][s]) - statistics.median(seven[0][s]) for s in ("ours", "theirs"))
            add(dict(size="7B", work=kind, against="per added layer", ours=[a_], theirs=[b_],
                     flops=seven[1]["flops"] - seven[0]["flops"]))  # fmt: skip
    checkpoint.write_json(a.out, dict(about=about, rows=rows))


if __name__ == "__main__":
    main()
