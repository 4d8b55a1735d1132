"""Draws three small data sets with other libraries than the demo, and scores runs on them, to test the backbones.

    python -m bench.elsewhere DIR                                 # draws markers, glyphs and svg; about 30 seconds
    python train.py --stage 2 --init-from runs/stage1 --data DIR/svg/train.json --images DIR/svg/images \\
        --epochs 6 --batch-size 16 --lr 1e-3 --out runs/svg       # trains on one of them
    python -m bench.elsewhere DIR --ask runs/svg --set svg        # % right by kind of question

The pictures show one to four things: markers of a plot, symbols of a font (both by matplotlib), or SVG elements (by
resvg). Each set holds train.json (LLaVA JSON), images/, heldout.jsonl (a line for each question, with its answer) and
swapped.jsonl, the same questions with the picture of another scene. Things do not overlap, and a question compares only
clearly different things, so that the picture decides each answer. No training picture holds the same combination of
names and colours as a held-out one.
"""

import argparse
import io
import json
import math
import random
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor

import checkpoint
from common import ArgumentParser, UserError, progress_bar, run_command, write_json, write_lines
from conversation import IMAGE, TEMPLATE
from data import Encoder, Example
from distributed import processes
from eval_scienceqa import answer_all
from formats.pictures import Pictures
from formats.records import read_records

TRAINING, HELD_OUT = 4000, 400  # pictures of a set
PIXELS = 48, 96  # least and most, of a picture's side
RADIUS = 0.14, 0.24  # least and most, of the circle around a thing, in sides of the picture
OUTLINED = 0.17  # least radius of a thing that is drawn as an outline
CONTRAST = 155  # least distance between the RGB values of a thing and of the ground
APART, BIGGER = 0.2, 1.35  # least difference of positions, and least ratio of sizes, that a question compares
KINDS = ("colour", "shape", "count", "yes/no", "where", "size")
BATCH_SIZE, MAX_NEW_TOKENS = 64, 16

COLOURS = {  # CSS names of each colour's shades
    "red": ("red", "crimson"), "green": ("green", "limegreen"), "blue": ("blue", "royalblue"),
    "yellow": ("yellow", "gold"), "orange": ("darkorange",), "purple": ("purple", "darkviolet"),
    "pink": ("hotpink", "lightpink"), "brown": ("saddlebrown",), "black": ("black",), "white": ("white",),
    "grey": ("gray",),
}  # fmt: skip
GROUNDS = (("white", "whitesmoke", "ivory", "lavender", "honeydew", "lightgray", "lightcyan", "linen"),
           ("midnightblue", "darkslategray", "black", "dimgray"))  # fmt: skip
MARKERS = {"circle": "o", "square": "s", "triangle": "^v<>", "diamond": "Dd", "star": "*", "plus": "P+", "cross": "Xx",
           "pentagon": "p"}  # fmt: skip
GLYPHS = {"heart": "♥", "star": "★", "arrow": "➔", "sun": "☀", "umbrella": "☂", "spade": "♠", "club": "♣", "note": "♫",
          "check": "✔", "flag": "⚑", "plane": "✈", "cloud": "☁"}  # fmt: skip
ELEMENTS = {  # in a circle of radius 1
    "circle": '<circle r="0.95"/>',
    "oval": '<ellipse rx="1" ry="0.5"/>',
    "square": '<rect x="-0.7" y="-0.7" width="1.4" height="1.4"/>',
    "rectangle": '<rect x="-0.9" y="-0.4" width="1.8" height="0.8"/>',
    "triangle": '<polygon points="0,-1 0.87,0.5 -0.87,0.5"/>',
    "star": '<polygon points="0,-1 0.27,-0.37 0.95,-0.31 0.43,0.14 0.59,0.81 0,0.45 -0.59,0.81 -0.43,0.14 -0.95,-0.31 '
            '-0.27,-0.37"/>',
    "line": '<line x1="-1" x2="1"/>',
    "semicircle": '<path d="M-0.9 0.4 A0.9 0.9 0 0 1 0.9 0.4 Z"/>',
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    name: str
    colour: str
    shade: str  # a CSS name
    x: float  # of its centre, in sides of the picture from the top left
    y: float
    r: float

    @property
    def full_name(self) -> str:
        return f"{self.colour} {self.name}"


def is_held_out(things: list[Thing]) -> bool:
    """True for one combination of names and colours in eight."""
    return zlib.crc32(" ".join(sorted(t.full_name for t in things)).encode()) % 8 == 0


def draw_scene(names: list[str], rng: random.Random, held_out: bool) -> tuple[list[Thing], list[str]]:
    """One to four things of different full names that do not touch, and one or more similar grounds for them.

    Things after the first often share its colour or its name.
    """
    n = rng.randint(1, 4)
    while True:
        things: list[Thing] = []
        for _ in range(20):
            name, colour, r = rng.choice(names), rng.choice(list(COLOURS)), rng.uniform(*RADIUS)
            if things and rng.random() < 0.4:
                name = things[0].name
            elif things and rng.random() < 0.4:
                colour = things[0].colour
            x, y = rng.uniform(r, 1 - r), rng.uniform(r, 1 - r)
            if len(things) < n and all(math.dist((x, y), (t.x, t.y)) > 1.05 * (r + t.r) for t in things):
                things.append(Thing(name, colour, rng.choice(COLOURS[colour]), x, y, r))
        if len({t.full_name for t in things}) == n and is_held_out(things) == held_out:
            grounds = [ground for ground in rng.choice(GROUNDS) if all(contrast(ground, t.shade) for t in things)]
            if grounds:
                return things, grounds


def contrast(a: str, b: str) -> bool:
    return math.dist(ImageColor.getrgb(a), ImageColor.getrgb(b)) >= CONTRAST


# --- pictures: each `with_...` returns `draw`, a function from things to a picture


def with_matplotlib(artist: Callable) -> Callable:
    """artist(thing, rng) draws one thing on a figure of 1 x 1 inch."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed; install it with: pip install matplotlib") from None
    figure = Figure(figsize=(1, 1))
    canvas = FigureCanvasAgg(figure)

    def draw(things: list[Thing], grounds: list[str], pixels: int, rng: random.Random) -> Image.Image:
        figure.clear()
        figure.set(dpi=pixels, facecolor=rng.choice(grounds))
        for thing in things:
            figure.add_artist(artist(thing, rng))
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")

    return draw


def marker_artist(thing: Thing, rng: random.Random):
    from matplotlib.lines import Line2D
    from matplotlib.markers import MarkerStyle

    marker = MarkerStyle(rng.choice(MARKERS[thing.name]), joinstyle="round")  # type: ignore[arg-type]
    radius = np.hypot(*np.transpose(marker.get_path().transformed(marker.get_transform()).vertices)).max()
    points = 72 * 2 * thing.r
    is_outline = marker.is_filled() and thing.r > OUTLINED and rng.random() < 0.3
    width = points * (0.12 if is_outline else 0.2 if not marker.is_filled() else 0)
    face = "none" if is_outline else thing.shade
    return Line2D([thing.x], [1 - thing.y], marker=marker, markersize=(points - width) / (2 * radius),
                  markerfacecolor=face, markeredgecolor=thing.shade, markeredgewidth=width)  # fmt: skip


def glyph_artist(thing: Thing, rng: random.Random):
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.textpath import TextPath
    from matplotlib.transforms import Affine2D

    path = TextPath((0, 0), GLYPHS[thing.name], size=1, prop=FontProperties(family="DejaVu Sans"))
    centred = path.vertices - np.mean(path.get_extents().get_points(), axis=0)
    place = Affine2D().scale(thing.r / np.hypot(*centred.T).max()).rotate_deg(rng.uniform(-15, 15))
    outline = Path(place.translate(thing.x, 1 - thing.y).transform(centred), path.codes)
    return PathPatch(outline, color=thing.shade, linewidth=0)


def with_resvg() -> Callable:
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise UserError("resvg is not installed; install it with: pip install resvg-py") from None

    def draw(things: list[Thing], grounds: list[str], pixels: int, rng: random.Random) -> Image.Image:
        text = svg_text(things, grounds, pixels, rng)
        return Image.open(io.BytesIO(svg_to_bytes(svg_string=text, skip_system_fonts=True))).convert("RGB")

    return draw


def svg_text(things: list[Thing], grounds: list[str], pixels: int, rng: random.Random) -> str:
    """An SVG of things that are filled, filled and edged, or outlined, on a ground with a gradient."""
    stops = f'<stop stop-color="{rng.choice(grounds)}"/><stop offset="1" stop-color="{rng.choice(grounds)}"/>'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{pixels}" height="{pixels}" viewBox="0 0 1 1">',
             f'<linearGradient id="ground" x2="{rng.random():.2f}" y2="1">{stops}</linearGradient>',
             '<rect width="1" height="1" fill="url(#ground)"/>']  # fmt: skip
    for t in things:
        degrees = rng.uniform(-10, 10) if t.name == "square" else rng.uniform(0, 360)
        fill, stroke, width = t.shade, "none", 0.0
        if t.name == "line" or (t.r > OUTLINED and rng.random() < 0.3):
            fill, stroke, width = "none", t.shade, 0.3
        elif t.colour != "black" and rng.random() < 0.3:
            stroke, width = "black", 0.1
        lines.append(f'<g transform="translate({t.x:.3f} {t.y:.3f}) rotate({degrees:.0f}) '
                     f'scale({t.r * (1 - width / 2):.3f})" fill="{fill}" stroke="{stroke}" stroke-width="{width}" '
                     f'stroke-linejoin="round">{ELEMENTS[t.name]}</g>')  # fmt: skip
    return "\n".join([*lines, "</svg>"])


SETS: dict[str, tuple[dict[str, str], str, Callable]] = {  # names, their common noun, and what makes `draw`
    "markers": (MARKERS, "marker", lambda: with_matplotlib(marker_artist)),
    "glyphs": (GLYPHS, "symbol", lambda: with_matplotlib(glyph_artist)),
    "svg": (ELEMENTS, "shape", with_resvg),
}


# --- questions


def all_questions(things: list[Thing], names: list[str], noun: str, rng: random.Random) -> Iterator[tuple]:
    """Yields all questions that the things allow, as (kind, question, answer). rng draws the yes/no questions."""
    shown, colours = [t.name for t in things], [t.colour for t in things]
    full_names = [t.full_name for t in things]
    short = {t: t.name if shown.count(t.name) == 1 else t.full_name for t in things}
    yield "count", f"How many {noun}s are there?", len(things)
    colour = rng.choice([*dict.fromkeys(colours), rng.choice(list(COLOURS))])
    yield "count", f"How many {noun}s are {colour}?", colours.count(colour)
    for t in things:
        absent = [full for full in (f"{t.colour} {rng.choice(names)}", f"{rng.choice(list(COLOURS))} {t.name}")
                  if full not in full_names]  # fmt: skip
        if absent:
            full, answer = rng.choice([(t.full_name, "yes"), (rng.choice(absent), "no")])
            yield "yes/no", f"Is there a{'n' * (full[0] in 'aeiou')} {full}?", answer
        if shown.count(t.name) == 1:
            yield "colour", f"What colour is the {t.name}?", t.colour
            other = rng.choice([colour for colour in [*colours, *COLOURS] if colour != t.colour])
            colour, answer = rng.choice([(t.colour, "yes"), (other, "no")])
            yield "yes/no", f"Is the {t.name} {colour}?", answer
        if colours.count(t.colour) == 1:
            yield "shape", f"What is the {t.colour} {noun}?", t.name
        if abs(t.x - 0.5) > APART / 2:
            yield "where", f"Is the {short[t]} on the left or on the right?", "left" if t.x < 0.5 else "right"
        if abs(t.y - 0.5) > APART / 2:
            yield "where", f"Is the {short[t]} at the top or at the bottom?", "top" if t.y < 0.5 else "bottom"
        for u in things:
            if abs(t.x - u.x) > APART:
                yield "where", f"Is the {short[t]} left or right of the {short[u]}?", "left" if t.x < u.x else "right"
            if abs(t.y - u.y) > APART:
                answer = "above" if t.y < u.y else "below"
                yield "where", f"Is the {short[t]} above or below the {short[u]}?", answer
            if t.name == u.name and max(t.r / u.r, u.r / t.r) > BIGGER:
                answer = "bigger" if t.r > u.r else "smaller"
                yield "size", f"Is the {short[t]} bigger or smaller than the {short[u]}?", answer


def questions(things: list[Thing], names: list[str], noun: str, rng: random.Random) -> list[tuple[str, str, str]]:
    """Draws one question of each kind, and two about places, as (kind, question, answer) in random order."""
    found = list(all_questions(things, names, noun, rng))
    chosen = {}  # by question, so that none is drawn twice
    for kind in (*KINDS, "where"):
        if of_kind := [q for q in found if q[0] == kind and q[1] not in chosen]:
            _, question, answer = rng.choice(of_kind)
            chosen[question] = kind, question, str(answer)
    return rng.sample(list(chosen.values()), len(chosen))


# --- data sets


def draw_set(folder: Path, name: str):
    """Writes the set `name` into a folder, where it replaces an earlier one. Each call writes the same files."""
    marks, noun, drawer = SETS[name]
    names, draw, rng = list(marks), drawer(), random.Random(f"elsewhere {name}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records, asked = [], []  # asked: the held-out questions
    for i in progress_bar(range(TRAINING + HELD_OUT), f"drawing {name}", unit="picture"):
        held_out = i >= TRAINING
        (things, grounds), image = draw_scene(names, rng, held_out), f"{i:04}.png"
        draw(things, grounds, rng.randint(*PIXELS), rng).save(folder / "images" / image)
        found = questions(things, names, noun, rng)
        if held_out:
            asked += [dict(image=image, category=kind, text=text, answer=answer) for kind, text, answer in found]
        else:
            turns = [message for _, *turn in found for message in turn]
            turns[0] = f"{IMAGE}\n{turns[0]}"
            messages = [{"from": role, "value": text} for role, text in zip(("human", "gpt") * len(found), turns)]
            records.append({"id": f"{name}-{i:04}", "image": image, "conversations": messages})
    asked = [dict(question_id=i, **question) for i, question in enumerate(asked)]
    images = list(dict.fromkeys(question["image"] for question in asked))
    another = dict(zip(images, images[1:] + images[:1]))
    swapped = [question | {"image": another[question["image"]]} for question in asked]
    write_json(folder / "train.json", records)
    for file_name, rows in (("heldout.jsonl", asked), ("swapped.jsonl", swapped)):
        write_lines(folder / file_name, list(map(json.dumps, rows)))


def print_tables(run: Path, folders: list[Path]):
    """Asks a run the questions of each set and prints the set's table. All processes of torchrun take part."""
    with processes() as (rank, world_size, device):
        model, sp, _, autocast = checkpoint.open_run(run, device, "torchrun train.py --stage 2", template=TEMPLATE)
        vit = model.vision.config
        for folder in folders:
            encoder = Encoder(sp, vit.n_patches, vit.image_size, Pictures(folder / "images"))
            rows, swapped = (read_records(folder / file) for file in ("heldout.jsonl", "swapped.jsonl"))
            asked = enumerate(rows + swapped)
            prompts = [Example(str(i), [f"{IMAGE}\n{row['text']}"], row["image"]) for i, row in asked]
            texts: dict[str, str] = {}
            with autocast:
                answer_all(texts, prompts, lambda _: None, BATCH_SIZE, rank, world_size, model, encoder, MAX_NEW_TOKENS)
            answers = [texts[prompt.id] for prompt in prompts]
            columns = {"true pictures": answers[: len(rows)], "swapped": answers[len(rows) :],
                       "commonest answer": commonest(rows)}  # fmt: skip
            if rank == 0:
                print(f"{folder.name}, answered by {run}\n{table(rows, columns)}\n")


def commonest(rows: list[dict]) -> list[str]:
    """Gives each question the most frequent answer among all questions of its form."""
    words = {word for names, _, _ in SETS.values() for word in names} | COLOURS.keys()
    forms = [re.sub(rf"\b({'|'.join(words)})\b", "", row["text"]) for row in rows]
    counts: dict[str, Counter] = {form: Counter() for form in forms}
    for form, row in zip(forms, rows):
        counts[form][row["answer"]] += 1
    return [counts[form].most_common(1)[0][0] for form in forms]


def table(rows: list[dict], columns: dict[str, list[str]]) -> str:
    """Formats the % of answers that equal the true one exactly, in a row for each kind of question."""
    lines = [f"{'% right':10}{'questions':>10}" + "".join(f"{name:>18}" for name in columns)]
    for kind in (*KINDS, "all"):
        chosen = [i for i, row in enumerate(rows) if kind in ("all", row["category"])]
        right = [sum(texts[i] == rows[i]["answer"] for i in chosen) for texts in columns.values()]
        lines.append(f"{kind:10}{len(chosen):10}" + "".join(f"{100 * n / max(1, len(chosen)):18.1f}" for n in right))
    return "\n".join(lines)


def main():
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="the folder of the sets: DIR/markers, DIR/glyphs, DIR/svg")
    add("--set", choices=SETS, help="draw or ask this set only (default: all)")
    add("--ask", type=Path, metavar="RUN", help="draw nothing; put the held-out questions to this run of stage 2")
    args: argparse.Namespace = parser.parse_args()
    names = [args.set] if args.set else list(SETS)
    if args.ask:
        print_tables(args.ask, [args.folder / name for name in names])
        return
    for name in names:
        draw_set(args.folder / name, name)


if __name__ == "__main__":
    run_command(main)
