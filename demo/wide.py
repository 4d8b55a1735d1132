"""More of the world than the demo shows, for its backbones: pictures for the ViT and questions for the LLaMA.

Things have any position, four ranges of size, three styles, twelve colours and fourteen named shapes. They are turned,
partly hidden by each other, and stand on plain, graded and noisy grounds. So stage 2 can teach more of a user's own
pictures and words. The conversations of the demo itself (world.py) stay with four shapes in nine places.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from demo import world
from demo.world import ABSENT, CELL, PATCH, PIXELS, PLACES, Thing, a, in_order, is_scene, shade

SIZES = ("tiny", "small", "big", "huge")
STYLES = ("filled", "outlined", "striped")
RGB = world.RGB | {"white": (250, 250, 250), "grey": (130, 130, 130), "orange": (245, 140, 20), "brown": (125, 75, 35),
                   "pink": (250, 150, 190), "teal": (20, 150, 150)}  # fmt: skip
COLOURS = tuple(RGB)
RADIUS = {"tiny": (2.0, 3.4), "small": (3.6, 5.6), "big": (5.8, 9.5), "huge": (10.0, 20.0)}  # pixels, from, to

OVERSAMPLING = 3
CANVAS = PIXELS * OVERSAMPLING
PATCHES_ACROSS = PIXELS // PATCH
FORM = 8  # a thing's form is a picture of FORM x FORM of its filled outline, framed by the square around its circle
COVERED = 0.25  # the share of a patch that a thing has to cover; a thing that covers no patch so far takes its best one

Point = tuple[float, float]  # x to the right, y downwards


def regular(n: int, inner: float = 1.0) -> list[Point]:
    """n corners on a circle of radius 1, the first at the top; every second one on a circle of radius `inner`."""
    corners = []
    for i in range(n):
        angle, r = math.radians(360 * i / n - 90), inner if i % 2 else 1
        corners.append((r * math.cos(angle), r * math.sin(angle)))
    return corners


def heart() -> list[Point]:
    angles = [2 * math.pi * i / 28 for i in range(28)]
    return [(math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
            for t in angles]  # fmt: skip


def moon() -> list[Point]:
    """The part of a disc left of a second disc."""
    outer = [math.radians(40 + 280 * i / 16) for i in range(17)]
    inner = [math.radians(305 - 250 * i / 12) for i in range(13)]
    points = [(math.cos(t), math.sin(t)) for t in outer]
    return points + [(0.35 + 0.75 * math.cos(t), 0.78 * math.sin(t)) for t in inner]


CIRCLE = regular(28)
OUTLINES: dict[str, list[Point]] = {
    "circle": CIRCLE,
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "cross": [(-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3), (0.3, 1), (-0.3, 1), (-0.3, 0.3),
              (-1, 0.3), (-1, -0.3), (-0.3, -0.3)],
    "rectangle": [(-1, -0.5), (1, -0.5), (1, 0.5), (-1, 0.5)],
    "star": regular(10, inner=0.42),
    "ring": CIRCLE,  # and a hole
    "heart": heart(),
    "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
    "oval": [(x, 0.6 * y) for x, y in CIRCLE],
    "pentagon": regular(5),
    "hexagon": regular(6),
    "arrow": [(-1, -0.25), (0.1, -0.25), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.25), (-1, 0.25)],
    "moon": moon(),
}  # fmt: skip
RANDOM_SHAPES = ("blob", "sign")  # a random polygon, a few random strokes
SHAPES = (*OUTLINES, *RANDOM_SHAPES)
UPRIGHT, TURN = 0.8, 20  # the share of things that are turned by no more than so many degrees
RING_HOLE = 0.55  # of its radius
ATTRIBUTES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES, "style": STYLES}
READ = ("size", "colour", "shape", "style")  # the attributes that a patch of the ViT learns to read


@dataclass(frozen=True)
class WideThing(Thing):
    style: str

    @property
    def description(self) -> str:
        return f"{self.size} {self.style} {self.name}"


WideScene = tuple[WideThing, ...]  # in the order of PLACES; places and names are unique


def draw_scene(rng: random.Random, counts: Sequence[int] = (1, 2, 2, 3, 3, 4), nouns: float = 0.0) -> WideScene:
    """counts: the numbers of things to choose from, with equal probability.

    nouns: the share of scenes whose things are those of ABSENT, for texts without a picture.
    """
    shapes = ABSENT if rng.random() < nouns else SHAPES
    n = rng.choice(counts)
    few = rng.random() < 0.4  # colours and shapes that repeat: something to count and to compare
    colours = rng.sample(COLOURS, 2) if few else COLOURS
    shapes = rng.sample(shapes, 3) if few else shapes
    while True:
        things = []
        for _ in range(n):
            (size,) = rng.choices(SIZES, (1, 2, 3, 2))
            (style,) = rng.choices(STYLES, (3, 1, 1))
            colour, shape, place = (rng.choice(values) for values in (colours, shapes, PLACES))
            things.append(WideThing(size, colour, shape, place, style))
        if is_scene(things):
            return in_order(things)


# --- pictures


class Shown(NamedTuple):
    """What each patch of a picture shows, for the loss that makes a patch represent its thing's form."""

    thing: np.ndarray  # (P,) int64, the index of the topmost thing that covers enough of the patch; -1: none
    forms: np.ndarray  # (things, FORM * FORM) float32, 0..1
    boxes: np.ndarray  # (things, 3) float32: centre x and y, and radius, in pixels
    fills: np.ndarray  # (things, 3) float32: red, green, blue in 0..1
    words: np.ndarray  # (things, len(READ)) int64: the index of each of its words in ATTRIBUTES


def draw_picture(scene: Sequence[WideThing], rng: random.Random) -> tuple[Image.Image, Shown]:
    """An RGB image of PIXELS x PIXELS. Position, radius and shade are random within their words' ranges."""
    fills = [shade(RGB[t.colour], 18, rng) for t in scene]
    image = ground(fills, rng)
    thing = np.full(PATCHES_ACROSS**2, -1)
    forms, boxes = np.zeros((len(scene), FORM * FORM), np.float32), np.zeros((len(scene), 3), np.float32)
    order = sorted(range(len(scene)), key=lambda i: -SIZES.index(scene[i].size))  # a larger thing lies below
    for i in order:
        t = scene[i]
        row, column = divmod(PLACES.index(t.place), 3)
        r = rng.uniform(*RADIUS[t.size])
        x, y = (min(PIXELS - 0.6 * r, max(0.6 * r, CELL * (cell + rng.random()))) for cell in (column, row))
        turn = rng.uniform(-TURN, TURN) if rng.random() < UPRIGHT else rng.uniform(0, 360)
        lines = [[rotated(point, math.radians(turn)) for point in line] for line in draw_lines(t.shape, rng)]
        mask = Image.new("L", (CANVAS, CANVAS))
        on_canvas = moved(lines, OVERSAMPLING * x, OVERSAMPLING * y, OVERSAMPLING * r)
        draw_form(ImageDraw.Draw(mask), t.shape, on_canvas, OVERSAMPLING * r)
        covered = np.asarray(mask.reduce(PATCH * OVERSAMPLING), np.float32).ravel() / 255
        thing[(covered > 0) & (covered >= min(COVERED, covered.max()))] = i
        if t.style != "filled":
            draw_style(mask, t, on_canvas, OVERSAMPLING * r, rng)
        image.paste(fills[i], (0, 0), mask)
        form = Image.new("L", (4 * FORM, 4 * FORM))
        draw_form(ImageDraw.Draw(form), t.shape, moved(lines, 2 * FORM, 2 * FORM, 2 * FORM), 2 * FORM)
        forms[i] = np.asarray(form.reduce(4), np.float32).ravel() / 255
        boxes[i] = x, y, r
    image = image.reduce(OVERSAMPLING)
    if rng.random() < 0.3:
        image = with_noise(image, rng)
    words = [[ATTRIBUTES[name].index(getattr(t, name)) for name in READ] for t in scene]
    return image, Shown(thing, forms, boxes, np.array(fills, np.float32) / 255, np.array(words))


def ground(fills: list[tuple[int, ...]], rng: random.Random) -> Image.Image:
    """The empty canvas: pale, of any colour, or graded between four; it differs from each of the fills."""
    kind = rng.choice(("pale", "pale", "pale", "any", "graded"))
    while True:
        if kind == "pale":
            brightness = rng.randint(200, 255)
            corners = [shade([brightness] * 3, 8, rng)] * 4
        else:
            corners = [tuple(rng.randint(0, 255) for _ in range(3))] * 4
        if kind == "graded":
            corners = [shade(corners[0], 60, rng) for _ in range(4)]
        if kind == "pale" and any(min(fill) > 200 for fill in fills):
            kind = "any"  # a white thing
        elif all(sum(abs(f - g) for f, g in zip(fill, corner)) > 140 for fill in fills for corner in corners):
            break
    if kind != "graded":
        return Image.new("RGB", (CANVAS, CANVAS), corners[0])
    four = Image.fromarray(np.array(corners, np.uint8).reshape(2, 2, 3))
    return four.resize((CANVAS, CANVAS), Image.Resampling.BILINEAR)


def with_noise(image: Image.Image, rng: random.Random) -> Image.Image:
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(3, 16), (PIXELS, PIXELS, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def rotated(point: Point, angle: float) -> Point:
    x, y = point
    return x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)


def moved(lines: list[list[Point]], x: float, y: float, r: float) -> list[list[Point]]:
    """The lines around (x, y), r times as large."""
    return [[(x + r * u, y + r * v) for u, v in line] for line in lines]


def draw_lines(shape: str, rng: random.Random) -> list[list[Point]]:
    """The outline of a shape, then its holes; or the strokes of a sign."""
    if shape == "sign":
        return [[(rng.uniform(-0.9, 0.9), rng.uniform(-0.9, 0.9)) for _ in range(rng.randint(2, 3))]
                for _ in range(rng.randint(1, 3))]  # fmt: skip
    if shape == "blob":
        radii = [rng.uniform(0.35, 1) for _ in range(rng.randint(3, 9))]
        return [[(x * r, y * r) for (x, y), r in zip(regular(len(radii)), radii)]]
    outline = OUTLINES[shape]
    return [outline, *moved([outline], 0, 0, RING_HOLE)] if shape == "ring" else [outline]


def draw_form(pen: ImageDraw.ImageDraw, shape: str, lines: list[list[Point]], r: float):
    """Fills the outline of a thing of radius r without its holes, or draws the strokes of a sign."""
    if shape == "sign":
        for line in lines:
            pen.line(line, fill=255, width=max(2, round(0.35 * r)), joint="curve")
        return
    outline, *holes = lines
    pen.polygon(outline, fill=255)
    for hole in holes:
        pen.polygon(hole, fill=0)


def draw_style(mask: Image.Image, t: WideThing, lines: list[list[Point]], r: float, rng: random.Random):
    """Reduces a filled form to its outline or to stripes. The outline of a sign is a thinner stroke."""
    pen = ImageDraw.Draw(mask)
    if t.style == "outlined":
        mask.paste(0, (0, 0, *mask.size))
        for line in lines:
            closed = line if t.shape == "sign" else [*line, *line[:2]]
            pen.line(closed, fill=255, width=max(3, round(0.22 * r)), joint="curve")
        return
    angle, gap = rng.uniform(0, math.pi), max(4.0, 0.45 * r)
    along, across = (math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))
    x, y = lines[0][0]
    for k in range(-6, 7):
        middle = x + k * gap * across[0], y + k * gap * across[1]
        ends = [(middle[0] + s * 3 * r * along[0], middle[1] + s * 3 * r * along[1]) for s in (-1, 1)]
        pen.line(ends, fill=0, width=max(2, round(gap * 0.4)))


# --- texts, for the LLaMA: questions with short answers, as in other people's data

BRIEFLY = ("Answer the question using a single word or phrase.", "Answer briefly.")
NUMBER_WORDS = ("zero", "one", "two", "three", "four")
SIDES = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # rows, columns


class Asked(NamedTuple):
    question: str
    word: str  # the answer in one or two words
    sentence: str


def conversation(scene: WideScene, rng: random.Random) -> list[str]:
    """One to five questions, all answered in one style: as "red", as "Red.", or as "It is red."

    The spelling and the form of the places' names are the same throughout: colour or color, top-left or top left.
    """
    style = rng.choice(("word", "word", "capital", "sentence"))
    hint = f"\n{rng.choice(BRIEFLY)}" if style == "word" and rng.random() < 0.4 else ""
    digits, american, hyphens = rng.random() < 0.4, rng.random() < 0.5, rng.random() < 0.5
    messages: list[str] = []
    for _ in range(rng.randint(1, 5)):
        asked = Asked(*(respelled(text, american, hyphens) for text in draw_question(scene, rng)))
        if asked.question + hint in messages[::2]:
            continue
        word = str(NUMBER_WORDS.index(asked.word)) if digits and asked.word in NUMBER_WORDS else asked.word
        answer = {"word": word, "capital": f"{word[0].upper()}{word[1:]}.", "sentence": asked.sentence}[style]
        messages += [asked.question + hint, answer]
    return messages


def respelled(text: str, american: bool, hyphens: bool) -> str:
    if american:
        text = text.replace("colour", "color").replace("grey", "gray").replace("centre", "center")
    if not hyphens:
        for place in PLACES:
            text = text.replace(place, place.replace("-", " "))
    return text


def draw_question(scene: WideScene, rng: random.Random) -> Asked:
    kinds = {ask_attribute: 5, ask_what: 2, ask_count: 2, ask_yes_or_no: 4, ask_choice: 4, ask_relation: 2,
             ask_comparison: 2}  # fmt: skip
    (asks,) = rng.choices(list(kinds), list(kinds.values()))
    return asks(scene, rng) or ask_attribute(scene, rng)


def reference(t: WideThing, scene: WideScene, rng: random.Random) -> str:
    """The shape of t if no other thing has it, else its name."""
    return t.shape if rng.random() < 0.8 and sum(u.shape == t.shape for u in scene) == 1 else t.name


def ask_attribute(scene: WideScene, rng: random.Random) -> Asked:
    t = rng.choice(scene)
    name, kind = reference(t, scene, rng), rng.choice(("colour", "colour", "shape", "size", "style", "where"))
    if kind == "shape":
        if sum(u.colour == t.colour for u in scene) > 1:
            return ask_where(t, name, rng)
        questions = f"What shape is the {t.colour} thing?", f"What is the {t.colour} object?", f"What is {t.colour}?"
        return Asked(rng.choice(questions), t.shape, f"It is {a(t.shape)}.")
    if kind == "colour":
        if name == t.name:
            return ask_where(t, name, rng)
        questions = f"What colour is the {name}?", f"What is the colour of the {name}?", f"Which colour is the {name}?"
        return Asked(rng.choice(questions), t.colour, f"The {name} is {t.colour}.")
    if kind == "size":
        return Asked(rng.choice((f"How big is the {name}?", f"What size is the {name}?")), t.size, f"It is {t.size}.")
    if kind == "style":
        return Asked(f"Is the {name} filled, outlined or striped?", t.style, f"It is {t.style}.")
    return ask_where(t, name, rng)


def ask_where(t: WideThing, name: str, rng: random.Random) -> Asked:
    questions = f"Where is the {name}?", f"In which part of the picture is the {name}?"
    return Asked(rng.choice(questions), t.place, f"It is at the {t.place}.")


def ask_what(scene: WideScene, rng: random.Random) -> Asked:
    place = rng.choice([*PLACES, *(t.place for t in scene for _ in range(3))])
    t = next((t for t in scene if t.place == place), None)
    attribute = rng.choice(("thing", "shape", "colour"))
    if t is None or attribute == "thing":
        question = rng.choice((f"What is at the {place}?", f"What do you see at the {place}?"))
        return Asked(question, t.name if t else "nothing", f"{a(t.name).capitalize()}." if t else "Nothing is there.")
    questions = f"What {attribute} is the thing at the {place}?", f"Which {attribute} is at the {place}?"
    value = getattr(t, attribute)
    return Asked(rng.choice(questions), value, f"It is {a(value) if attribute == 'shape' else value}.")


def plural(shape: str) -> str:
    if shape == "person":
        return "people"
    return "fish" if shape == "fish" else f"{shape}es" if shape.endswith(("s", "x")) else f"{shape}s"


def ask_count(scene: WideScene, rng: random.Random) -> Asked:
    t = rng.choice(scene)
    shape, colour = (t.shape, t.colour) if rng.random() < 0.75 else (rng.choice(SHAPES), rng.choice(COLOURS))
    noun = rng.choice(("things", "objects", "shapes"))
    what, n = rng.choice((
        (noun, len(scene)),
        (plural(shape), sum(u.shape == shape for u in scene)),
        (f"{colour} {noun}", sum(u.colour == colour for u in scene)),
    ))  # fmt: skip
    questions = [f"How many {what} {end}?" for end in ("are there", "do you see", "are in the picture")]
    if what == f"{colour} {noun}":
        questions.append(f"How many {noun} are {colour}?")
    sentence = f"There {'is' if n == 1 else 'are'} {NUMBER_WORDS[n] if n else 'none'}."
    return Asked(rng.choice(questions), NUMBER_WORDS[n], sentence)


def yes_or_no(question: str, truth: bool, yes: str, no: str) -> Asked:
    return Asked(question, "yes" if truth else "no", f"Yes, {yes}." if truth else f"No, {no}.")


def ask_yes_or_no(scene: WideScene, rng: random.Random) -> Asked:
    t, kind = rng.choice(scene), rng.choice(("shape", "colour", "name", "is", "is", "at"))
    right = rng.random() < 0.5
    name = reference(t, scene, rng)
    if kind == "is" and name != t.name:
        colour = t.colour if right else rng.choice(COLOURS)
        return yes_or_no(f"Is the {name} {colour}?", colour == t.colour, f"it is {colour}", f"it is {t.colour}")
    if kind in ("is", "at"):
        place = t.place if right else rng.choice(PLACES)
        question = f"Is the {name} at the {place}?"
        return yes_or_no(question, place == t.place, f"it is at the {place}", f"it is at the {t.place}")
    shape = t.shape if right else rng.choice((rng.choice(SHAPES), rng.choice(ABSENT)))
    colour = t.colour if rng.random() < (0.9 if right else 0.5) else rng.choice(COLOURS)
    if kind == "colour":
        colour = t.colour if right else rng.choice(COLOURS)
        found = any(u.colour == colour for u in scene)
        questions = f"Is there {a(colour)} thing?", f"Is there anything {colour}?", f"Is anything {colour}?"
        return yes_or_no(rng.choice(questions), found,
                         f"there is {a(colour)} thing", f"nothing is {colour}")  # fmt: skip
    what = shape if kind == "shape" else f"{colour} {shape}"
    found = any(what in (u.shape, u.name) for u in scene)
    questions = f"Is there {a(what)}?", f"Is there {a(what)} in the picture?", f"Do you see {a(what)}?"
    return yes_or_no(rng.choice(questions), found, f"there is {a(what)}", f"I see no {what}")


def ask_choice(scene: WideScene, rng: random.Random) -> Asked:
    """Asks which of two words is true of a thing: colours, halves of the picture, or relations to another thing.

    Asks where a thing is if none of these fits it.
    """
    t, u = rng.choice(scene), rng.choice(scene)
    name, other = reference(t, scene, rng), reference(u, scene, rng)
    (down, right), kind = steps_between(u, t), rng.choice(("colour", "half", "sideways", "upwards", "size"))
    if kind == "colour" and name != t.name:
        colours = rng.sample([t.colour, rng.choice([colour for colour in COLOURS if colour != t.colour])], 2)
        return Asked(f"Is the {name} {' or '.join(colours)}?", t.colour, f"It is {t.colour}.")
    if kind == "sideways" and right:
        word = "left" if right < 0 else "right"
        return Asked(f"Is the {name} to the left or to the right of the {other}?", word, f"It is to the {word} of it.")
    if kind == "upwards" and down:
        word = "above" if down < 0 else "below"
        return Asked(f"Is the {name} above or below the {other}?", word, f"It is {word} it.")
    if kind == "size" and t.size != u.size:
        word = "bigger" if SIZES.index(t.size) > SIZES.index(u.size) else "smaller"
        return Asked(f"Is the {name} bigger or smaller than the {other}?", word, f"It is {word}.")
    for halves in rng.sample((("left", "right"), ("top", "bottom")), 2):
        for half in halves:
            if half in t.place.split("-"):
                question = f"Is the {name} in the {halves[0]} half or in the {halves[1]} half?"
                return Asked(question, half, f"It is in the {half} half.")
    return ask_where(t, name, rng)


def steps_between(t: WideThing, u: WideThing) -> tuple[int, int]:
    """Rows down and columns to the right from t to u."""
    (row, column), (row_of_u, column_of_u) = (divmod(PLACES.index(v.place), 3) for v in (t, u))
    return row_of_u - row, column_of_u - column


def ask_relation(scene: WideScene, rng: random.Random) -> Asked | None:
    """Whether a thing is on a side of another, or which thing is."""
    if len(scene) < 2:
        return None
    t, u = rng.sample(scene, 2)
    side, (down, right) = rng.choice(list(SIDES.items()))

    def is_there(v: WideThing) -> bool:
        rows, columns = steps_between(u, v)
        return rows * down + columns * right > 0

    name, other = reference(t, scene, rng), reference(u, scene, rng)
    found = [v for v in scene if is_there(v)]
    if len(found) == 1 and rng.random() < 0.5:
        return Asked(f"What is {side} the {other}?", found[0].name, f"The {found[0].name} is {side} it.")
    return yes_or_no(f"Is the {name} {side} the {other}?", t in found, "it is", "it is not")


def ask_comparison(scene: WideScene, rng: random.Random) -> Asked | None:
    if len(scene) < 2:
        return None
    t, u = rng.sample(scene, 2)
    name, other = reference(t, scene, rng), reference(u, scene, rng)
    larger = SIZES.index(t.size) - SIZES.index(u.size)
    kind = rng.choice(("bigger", "which", "same colour", "same size", "more"))
    if kind == "which" and larger:
        word = rng.choice(("bigger", "smaller"))
        winner = name if (larger > 0) == (word == "bigger") else other
        return Asked(f"Which is {word}, the {name} or the {other}?", winner, f"The {winner} is {word}.")
    if kind == "same colour":
        question, same = f"Do the {name} and the {other} have the same colour?", t.colour == u.colour
        return yes_or_no(question, same, "they do", "they do not")
    if kind == "same size":
        return yes_or_no(f"Are the {name} and the {other} the same size?", larger == 0, "they are", "they are not")
    if kind == "more" and t.colour != u.colour:
        more = sum(v.colour == t.colour for v in scene) > sum(v.colour == u.colour for v in scene)
        question = f"Are there more {t.colour} things than {u.colour} things?"
        return yes_or_no(question, more, "there are", "there are not")
    word = rng.choice(("bigger", "smaller"))
    truth = larger > 0 if word == "bigger" else larger < 0
    return yes_or_no(f"Is the {name} {word} than the {other}?", truth, "it is", "it is not")
