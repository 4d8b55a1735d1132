"""Plots the training curves of a run, writes them for TensorBoard, and shows where each word of an answer looks.

    python -m tools.plots loss runs/stage1                           # -> runs/stage1/loss.png
    python -m tools.plots attention --image PICTURE --prompt TEXT    # -> attention.png
    python -m tools.plots tensorboard runs/stage1                    # -> runs/stage1/tensorboard

The PNGs need matplotlib, the last command needs tensorboard.

The logits at one position predict the next token. So a word "looks" where the position before its first token attends:
the figure shows softmax(q kᵀ / √hd) of that position's query, averaged over the heads, at the patches of the picture.
"""

import argparse
import contextlib
import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python tools/plots.py`

import checkpoint
from chat import TRAINED_BY
from common import ArgumentParser, UserError, number, printable, reason, replacing, run_command, write_error
from conversation import IMAGE, IMAGE_ID, TEMPLATE, has_ended, surface, tokenize
from data import REQUESTS
from demo import world
from model import LLaVA, StreamAttention, position_ids
from vision import load_pixels

METRICS = ("step", "loss", "lr", "grad_norm", "tokens", "seconds")  # every complete line of metrics.jsonl has these
CURVES = {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm before clipping", "speed": "tokens/s"}
COLUMNS = 6  # panels in a row


@contextlib.contextmanager
def drawing(path: Path):
    """Yields a matplotlib figure and writes it as a PNG. It needs no display: it does not use pyplot."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed; install it with: pip install matplotlib") from None
    figure = Figure(layout="constrained")
    yield figure
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


# --- training curves


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The complete lines of RUN/metrics.jsonl, each with its `speed` in tokens/s; a null becomes NaN.

    Raises UserError if there is no such line.
    """
    path = run / "metrics.jsonl"
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}; give the run directory of a training") from None
    lines = []
    for line in text.splitlines():
        # A process that is killed leaves an incomplete line.
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
            metrics = {name: math.nan if value is None else float(value) for name, value in json.loads(line).items()}
            metrics["speed"] = metrics["tokens"] / metrics["seconds"]
            if metrics.keys() >= set(METRICS) and math.isfinite(metrics["step"]):
                lines.append(metrics)
    if not lines:
        raise UserError(f"{path}: has no complete line; let the run finish its first step")
    return lines


def loss_curves(run: Path) -> Path:
    """Draws loss, learning rate, gradient norm and speed of each step as RUN/loss.png. Raises UserError."""
    lines = read_metrics(run)
    steps = [line["step"] for line in lines]
    window = 1 + 2 * (len(lines) // 100)  # odd, so that the mean is centred on a step
    title = printable(str(run))
    if window > 1:
        title += f": each step (light) and the mean of the {window} steps around it (dark)"
    with drawing(run / "loss.png") as figure:
        figure.set_size_inches(10, 6)
        figure.suptitle(title, parse_math=False)
        for axes, (name, label) in zip(figure.subplots(2, 2, sharex=True).flat, CURVES.items()):
            y = np.array([line[name] for line in lines])
            mean = np.convolve(y, np.ones(window) / window, "valid")
            axes.plot(steps, y, color="tab:blue", alpha=0.3, linewidth=0.8)
            axes.plot(steps[window // 2 :][: len(mean)], mean, color="tab:blue", linewidth=1.6)
            axes.set_title(label)
            axes.set_yscale("log" if name in ("loss", "grad_norm") else "linear")
            axes.grid(alpha=0.25)
        for axes in figure.axes[2:]:
            axes.set_xlabel("step")
    return run / "loss.png"


def write_tensorboard(run: Path) -> Path:
    """Writes the metrics of each step as RUN/tensorboard; replaces its earlier event files. Raises UserError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("tensorboard is not installed; install it with: pip install tensorboard") from None
    lines = read_metrics(run)
    folder = run / "tensorboard"
    try:
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        with SummaryWriter(folder) as writer:
            for line in lines:
                for name, value in line.items():
                    if name != "step" and not math.isnan(value):
                        writer.add_scalar(name, value, int(line["step"]))
    except OSError as error:
        raise write_error(folder, error) from None
    return folder


# --- where each word of an answer looks


class WatchedAttention(StreamAttention):
    """The attention of one sample, which also records how much each of `rows` (R,) attends to each position.

    weights: one float32 tensor (H, R, N) per layer. Each row sums to 1 and is 0 at later positions.
    """

    def __init__(self, n_positions: int, rows: torch.Tensor):
        super().__init__([0, n_positions])
        self.rows = rows
        self.weights: list[torch.Tensor] = []

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = 0) -> torch.Tensor:
        key_heads = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (N, H, hd)
        later = torch.arange(len(k), device=k.device) > self.rows[:, None]  # (R, N)
        with torch.autocast(q.device.type, enabled=False):  # autocast would compute the scores in bf16
            scores = q[self.rows].transpose(0, 1).float() @ key_heads.permute(1, 2, 0).float()  # (H, R, N)
            scores = scores / math.sqrt(q.shape[-1])
            self.weights.append(scores.masked_fill(later, -math.inf).softmax(-1))
        return super().__call__(q, k, v, layer)


@torch.no_grad()
def attention_weights(model: LLaVA, ids: torch.Tensor, pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """How much the positions `rows` (R,) of one sample attend to each position, (layers, H, R, N) float32.

    ids (N,) and pixels as in `LLaVA.embed`.
    """
    attend = WatchedAttention(len(ids), rows)
    model.llama(model.embed(ids, pixels), position_ids([0, len(ids)], ids.device), attend)
    return torch.stack(attend.weights)


def split_words(sp, ids: list[int]) -> list[tuple[str, int]]:
    """Joins the pieces of an answer to words -> (word, index of its first piece).

    >>> split_words(sp, sp.encode("a red cross."))     # the pieces are ▁a ▁red ▁cr oss .
    [('a', 0), ('red', 1), ('cross.', 2)]
    """
    starts = [i for i, id in enumerate(ids) if i == 0 or sp.id_to_piece(id).startswith("\u2581")]
    ends = [*starts[1:], len(ids)]
    return [(printable(surface(sp, ids[start:end]).strip()), start) for start, end in zip(starts, ends)]


def look(model: LLaVA, sp, pixels: torch.Tensor, prompt: str, max_new_tokens: int) -> list[tuple[str, torch.Tensor]]:
    """Asks about a picture -> each word of the answer and its weights (layers, P) on the patches.

    pixels: (1, 3, size, size) uint8. The weights of a layer sum to the share of its attention that is on the picture.
    """
    prompt_ids, _ = tokenize(sp, [f"{IMAGE}\n{prompt}"], model.vision.config.n_patches)
    ids = torch.from_numpy(prompt_ids).to(pixels.device)
    *_, [answer] = model.generate(ids, [0, len(ids)], pixels, partial(has_ended, sp), max_new_tokens)
    while answer and has_ended(sp, answer):
        answer.pop()
    words = split_words(sp, answer)
    rows = torch.tensor([len(ids) + first - 1 for _, first in words], dtype=torch.long, device=ids.device)
    ids = torch.cat([ids, ids.new_tensor(answer)])
    weights = attention_weights(model, ids, pixels, rows).mean(1)  # (layers, R, N), the mean of the heads
    on_patches = weights[:, :, ids == IMAGE_ID].cpu()  # (layers, R, P)
    return [(word, on_patches[:, i]) for i, (word, _) in enumerate(words)]


def draw_attention(figure, prompt: str, pixels: torch.Tensor, words: list[tuple[str, torch.Tensor]]):
    """Draws the picture, then one panel per word, all on one scale, from transparent (0) to red (the largest weight).

    pixels: (1, 3, size, size) uint8; each word has weights (P,).
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import PercentFormatter

    picture = pixels[0].permute(1, 2, 0).numpy()  # (size, size, 3)
    grey = picture.mean(-1)
    columns = min(COLUMNS, 1 + len(words))
    rows = math.ceil((1 + len(words)) / columns)
    figure.set_size_inches(2 * columns + 1, 2.3 * rows + 0.6)
    figure.suptitle(f"{printable(prompt)}\neach word of the answer, and its attention to the whole picture",
                    parse_math=False)  # fmt: skip
    colours = LinearSegmentedColormap.from_list("attention", [(0.85, 0.1, 0.05, alpha) for alpha in (0, 1)])
    largest = max((float(weights.max()) for _, weights in words), default=1.0)
    figure.add_subplot(rows, columns, 1, xticks=[], yticks=[]).imshow(picture)
    for i, (word, weights) in enumerate(words):
        n = math.isqrt(len(weights))  # patches a side
        axes = figure.add_subplot(rows, columns, 2 + i, xticks=[], yticks=[])
        axes.set_title(f"{word}  {weights.sum():.0%}", parse_math=False)
        axes.imshow(grey, extent=(0, n, n, 0), cmap="gray", vmin=-128, vmax=255)  # paler than the picture
        drawn = axes.imshow(weights.view(n, n).numpy(), extent=(0, n, n, 0), cmap=colours, vmin=0, vmax=largest)
    if words:
        legend = figure.colorbar(drawn, ax=figure.axes, format=PercentFormatter(1, decimals=0), shrink=0.6, aspect=30)
        legend.set_label("attention of a word to one patch")


def attention_figure(args: argparse.Namespace):
    """The `attention` command: asks the run of --model about --image and writes the figure to --out."""
    if args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: must name a file that ends in .png")
    args.image = args.image or world.SCENE
    args.model = args.model or world.default_run()
    with drawing(args.out) as figure:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, sp, _, autocast = checkpoint.open_run(args.model, device, TRAINED_BY, template=TEMPLATE)
        n_layers = model.llama.config.n_layers
        if args.layer is not None and not 1 <= args.layer <= n_layers:
            raise UserError(f"--layer {args.layer}: the LLaMA of {args.model} has layers 1 to {n_layers}")
        pixels = load_pixels(args.image, model.vision.config.image_size)  # (1, 3, size, size)
        with autocast:
            words = look(model, sp, pixels.to(device), args.prompt, args.max_new_tokens)
        if args.layer is None:
            words = [(word, weights.mean(0)) for word, weights in words]
        else:
            words = [(word, weights[args.layer - 1]) for word, weights in words]
        draw_attention(figure, args.prompt, pixels, words)
    print(" ".join(word for word, _ in words))
    print(f"{args.out} shows where each word looks; the percentage is its attention to the whole picture")


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="python -m tools.plots")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, purpose in (("loss", "draw loss, learning rate, gradient norm and speed as RUN/loss.png"),
                             ("tensorboard", "write metrics.jsonl as RUN/tensorboard")):  # fmt: skip
        add = commands.add_parser(command, help=purpose).add_argument
        add("run", type=Path, metavar="RUN", help="a run directory of train.py")
    purpose = "draw which patches each word of an answer looks at"
    add = commands.add_parser("attention", help=purpose).add_argument
    add("--model", type=Path, metavar="RUN", help="a run directory (default: runs/chat, or the chatbot in demo/)")
    add("--image", type=Path, metavar="FILE", help="the picture to show (default: a held-out scene of the demo)")
    add("--prompt", metavar="TEXT", default=REQUESTS[0], help="the question")
    add("--layer", type=number(1), help="show the attention of this layer, from 1 (default: the mean of all layers)")
    add("--max-new-tokens", type=number(1), default=64, help="most tokens of the answer")
    add("--out", type=Path, metavar="FILE", default=Path("attention.png"), help="the PNG to write")
    return parser.parse_args()


def main():
    args = parse_arguments()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # for terminals without UTF-8
    if args.command == "loss":
        print(loss_curves(args.run))
    elif args.command == "tensorboard":
        print(write_tensorboard(args.run))
    else:
        attention_figure(args)


if __name__ == "__main__":
    run_command(main)
