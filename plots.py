"""Two pictures of a run, for which matplotlib must be there (an optional extra: pip install matplotlib).

    python plots.py loss runs/stage1                           # how training went -> runs/stage1/loss.png
    python plots.py attention --image PICTURE --prompt TEXT    # where each word of an answer looks -> attention.png

Where a word looks is what the position before its first piece, which predicts that piece, attends to: the softmax of
q kᵀ / √hd of its query over all positions up to its own, averaged over heads. The figure shows the patches' part.
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

import checkpoint
import demo
from conversation import (
    IMAGE,
    IMAGE_ID,
    STOP,
    TEMPLATE,
    HelpForm,
    UserError,
    readable,
    run_command,
    stop_ids,
    surface,
    tokenize,
)
from data import REQUESTS, read_pixels
from model import flat_attention, positions

TRAINED_BY = "torchrun train.py --stage 2"
CURVES = {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm, before clipping", "speed": "tokens/s"}
COLUMNS = 6  # panels side by side


@contextlib.contextmanager
def drawing(path: Path):
    """A figure to draw on, then written as PNG: no pyplot, so nothing global and no display is needed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures are drawn by a package that is missing: pip install matplotlib") from None
    figure = Figure(layout="constrained")
    yield figure
    with checkpoint.replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


# --- how training went


def loss_curves(run: Path) -> Path:
    """Draws RUN/metrics.jsonl as RUN/loss.png. Raises UserError if there is nothing to draw."""
    path, lines = run / "metrics.jsonl", []
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name the directory of a run of train.py") from None
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, ArithmeticError, RecursionError):  # half a line, say
            line = json.loads(line) | {}
            line["speed"] = line["tokens"] / line["seconds"]
            lines.append([float("nan" if line[name] is None else line[name]) for name in ("step", *CURVES)])
    if not lines:
        raise UserError(f"{path}: holds no step yet")
    steps, *curves = np.array(lines).T
    with drawing(run / "loss.png") as figure:
        figure.set_size_inches(10, 6)
        window = 1 + 2 * (len(steps) // 100)  # odd: as many steps before as after
        mean_of = f": pale, each step; dark, the mean of {window} around it" if window > 1 else ""
        figure.suptitle(f"{run}{mean_of}", parse_math=False)
        for axes, (name, title), y in zip(figure.subplots(2, 2, sharex=True).flat, CURVES.items(), curves):
            mean = np.convolve(y, np.ones(window) / window, "valid")
            axes.plot(steps, y, color="tab:blue", alpha=0.3, linewidth=0.8)
            axes.plot(steps[window // 2 :][: len(mean)], mean, color="tab:blue", linewidth=1.6)
            axes.set_title(title)
            axes.set_yscale("log" if name in ("loss", "grad_norm") else "linear")
            axes.grid(alpha=0.25)
        for axes in figure.axes[2:]:
            axes.set_xlabel("step")
    return run / "loss.png"


# --- where each word of an answer looks


@torch.no_grad()
def attention_weights(model, ids: torch.Tensor, pixels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """How much the positions `rows` (R,) of one sample attend to each of its positions.

    ids (N,), pixels: as in `LLaVA.embed`. Returns (layers, H, R, N) float32: each row sums to 1, what is ahead has 0.
    """
    weights = []
    ahead = torch.arange(len(ids), device=ids.device) > rows[:, None]  # (R, N)

    def watched(attend, q, k, v):  # (N, H, hd), (N, K, hd), (N, K, hd)
        k_of_heads = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (N, H, hd)
        with torch.autocast(q.device.type, enabled=False):  # which would make bf16 of the scores again
            scores = q[rows].transpose(0, 1).float() @ k_of_heads.permute(1, 2, 0).float()  # (H, R, N)
            weights.append((scores / math.sqrt(q.shape[-1])).masked_fill(ahead, -math.inf).softmax(-1))
        return attend(q, k, v)

    borders = torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device)
    attend = [partial(watched, layer) for layer in flat_attention(len(model.llama.layers), borders)]
    model.llama(model.embed(ids, pixels), positions(borders), attend)
    return torch.stack(weights)


def words_of(sp, said: list[int]) -> list[tuple[str, int]]:
    """Pieces joined to words -> (word, index of its first piece).

    >>> words_of(sp, sp.encode("a red cross."))     # spelled ▁a ▁red ▁cr oss .
    [('a', 0), ('red', 1), ('cross.', 2)]
    """
    starts = [i for i, id in enumerate(said) if i == 0 or sp.id_to_piece(id).startswith("\u2581")]
    return [(readable(surface(sp, said[a:b]).strip()), a) for a, b in zip(starts, [*starts[1:], len(said)])]


def look(model, sp, pixels: torch.Tensor, prompt: str, max_new_tokens: int) -> list[tuple[str, torch.Tensor]]:
    """Asks about a picture, pixels (1, 3, size, size) -> each word of the answer, its weights (layers, P) on patches.

    A layer's weights sum to the share of its attention that is on the picture.
    """
    ids = torch.from_numpy(tokenize(sp, [f"{IMAGE}\n{prompt}"], model.vision.config.n_patches)[0]).to(pixels.device)
    borders = torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device)
    [said] = model.answers(ids, borders, pixels, stop_ids(sp), max_new_tokens)
    while STOP in surface(sp, said):  # spelled in other pieces
        said.pop()
    words = words_of(sp, said)
    rows = torch.tensor([len(ids) + first - 1 for _, first in words], dtype=torch.long, device=ids.device)
    weights = attention_weights(model, torch.cat([ids, ids.new_tensor(said)]), pixels, rows).mean(1)  # (layers, R, N)
    on_patches = weights[:, :, : len(ids)][:, :, ids == IMAGE_ID]  # (layers, R, P)
    return [(word, on_patches[:, i].cpu()) for i, (word, _) in enumerate(words)]


def attention_figure(a):
    a.prompt = a.prompt.encode("utf-8", "replace").decode()  # bytes that were no text
    if a.image is None:
        demo.prepare(demo.FOLDER)
        a.image = demo.heldout(demo.FOLDER)[0].image
    with drawing(a.out) as figure:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        _, model, sp, autocast = checkpoint.open_run(a.model, device, TRAINED_BY, template=TEMPLATE)
        n_layers = len(model.llama.layers)
        if a.layer is not None and not 1 <= a.layer <= n_layers:
            raise UserError(f"--layer {a.layer}: the LLaMA of {a.model} has layers 1 to {n_layers}")
        pixels = read_pixels(a.image, model.vision.config.image_size)  # (1, 3, size, size)
        with autocast:
            words = look(model, sp, pixels.to(device), a.prompt, a.max_new_tokens)
        n = math.isqrt(model.vision.config.n_patches)
        seen = pixels[0].permute(1, 2, 0).numpy()  # (size, size, 3)
        columns = min(COLUMNS, 1 + len(words))
        rows = math.ceil((1 + len(words)) / columns)
        figure.set_size_inches(2 * columns, 2.3 * rows + 0.4)
        figure.suptitle(readable(a.prompt), parse_math=False)
        for panel in range(1 + len(words)):
            axes = figure.add_subplot(rows, columns, 1 + panel, xticks=[], yticks=[])
            axes.imshow(seen.mean(-1) if panel else seen, extent=(0, n, n, 0), cmap="gray", vmin=0, vmax=255)
            if panel:
                word, weights = words[panel - 1]
                weights = weights.mean(0) if a.layer is None else weights[a.layer - 1]  # (P,)
                axes.set_title(f"{word}  {weights.sum():.0%}", parse_math=False)
                axes.imshow(weights.view(n, n).numpy(), extent=(0, n, n, 0), cmap="magma", alpha=0.7, vmin=0)
    print(" ".join(word for word, _ in words))
    print(f"{a.out} shows where each word looks; the percentage is the share of its attention that is on the picture")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    what = "loss, learning rate, gradient norm and speed of each step, as RUN/loss.png"
    add = kinds.add_parser("loss", help=what).add_argument
    add("run", type=Path, metavar="RUN", help="a run directory of train.py")
    what = "which patches each word of an answer looks at"
    add = kinds.add_parser("attention", help=what, formatter_class=HelpForm).add_argument
    add("--model", type=Path, metavar="RUN", default=Path("runs/chat"), help="a run directory")
    add("--image", type=Path, metavar="FILE", help="what to ask about (default: the demo's first held-out scene)")
    add("--prompt", metavar="TEXT", default=REQUESTS[0], help="what to ask")
    add("--layer", type=int, help="whose attention, from 1 (default: the mean of all)")
    add("--max-new-tokens", type=int, default=64, help="an answer is cut after so many")
    add("--out", type=Path, metavar="FILE", default=Path("attention.png"), help="the PNG to write")
    a = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # an answer may hold any character
    if a.kind == "attention" and a.out.suffix.lower() != ".png":
        raise UserError(f"--out {a.out}: must name a file that ends in .png")
    if a.kind == "attention" and a.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {a.max_new_tokens}: must be 1 or more")
    if a.kind == "loss":
        print(loss_curves(a.run))
    else:
        attention_figure(a)


if __name__ == "__main__":
    run_command(main)
