"""The embedded default: a small world that is drawn, told and asked about, and its two tiny backbones.

A scene is one to three things, each of a size, colour, shape and place. Everything that the demo trains on is made
from scenes: pictures, captions, conversations of the paper's three types, and a science quiz in ScienceQA's format.
Training and held-out scenes are disjoint: which a scene is follows from a hash of all that is in it.

    python demo.py draw DIR       # the demo's data, as train.py would make it by itself
    python demo.py report [RUN]   # the figures of the demo's runs again
    python demo.py build          # the backbones in demo/ anew, from nothing: tokenizer, LLaMA, ViT
"""

import argparse
import functools
import io
import itertools
import json
import math
import random
import re
import shutil
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm, trange

import checkpoint
from conversation import IMAGE, IMAGE_ID, HelpForm, UserError, load_tokenizer, render, system_ids, tokenize
from data import LETTERS, REQUESTS, from_caption, from_scienceqa, options_line
from model import LLaMA, LLaMAConfig, flat_attention, positions
from vision import VisionConfig, VisionTransformer, normalize

RECIPE, SEED = "scenes4", 1  # change RECIPE with the world or the training; both are in the shipped files' names
SHIPPED = Path(__file__).parent / "demo"
LLAMA = SHIPPED / f"llama-{RECIPE}-seed{SEED}"
VISION = SHIPPED / f"vit-{RECIPE}-seed{SEED}.pt"
FOLDER = Path(__file__).parent / "runs" / "demo"  # where train.py lets `prepare` write the data

# --- the world

SIZES = ("big", "small")
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
RGB = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 210, 30),
       "purple": (150, 50, 170), "black": (25, 25, 25)}  # fmt: skip
PIXELS, PATCH = 48, 8  # 6x6 patches, so each of the 3x3 places is 2x2 of them


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


ATTRIBUTES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES}
Scene = tuple[Thing, ...]  # in reading order of their places; no two of the same place or the same name


def is_scene(things: Collection[Thing]) -> bool:
    return len({t.place for t in things}) == len({t.name for t in things}) == len(things)


def in_order(things: Iterable[Thing]) -> Scene:
    return tuple(sorted(things, key=lambda t: PLACES.index(t.place)))


def is_held_out(scene: Scene) -> bool:
    return zlib.crc32(repr(scene).encode()) % 8 == 0


def free(scene: Scene) -> list[str]:
    return [place for place in PLACES if place not in {t.place for t in scene}]


def draw_scene(dice: random.Random, held_out: bool = False, counts: Sequence[int] = (1, 2, 2, 3, 3)) -> Scene:
    while True:
        n = dice.choice(counts)
        scene = in_order(Thing(*map(dice.choice, ATTRIBUTES.values())) for _ in range(n))
        if is_scene(scene) and is_held_out(scene) == held_out:
            return scene


def draw_picture(scene: Scene, dice: random.Random) -> Image.Image:
    """The scene: each thing shifted, sized and shaded a little at random, on a pale ground."""
    Z = 4  # drawn larger, then averaged down: smooth edges
    ground = dice.randint(215, 250)
    image = Image.new("RGB", (PIXELS * Z, PIXELS * Z), tuple(ground + dice.randint(-5, 5) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    for thing in scene:
        row, column = divmod(PLACES.index(thing.place), 3)
        x, y = (Z * (16 * i + 8 + dice.uniform(-1, 1)) for i in (column, row))
        r = Z * ({"big": 6.8, "small": 4.5}[thing.size] + dice.uniform(-0.3, 0.3))
        fill = tuple(max(0, min(255, c + dice.randint(-12, 12))) for c in RGB[thing.colour])
        if thing.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill)
        elif thing.shape == "square":
            pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill)
        elif thing.shape == "triangle":
            pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill)
        else:
            pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill)
            pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill)
    return image.reduce(Z)


# --- what is said about a scene. Each takes the dice that choose among phrasings.


def listed(parts: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c" """
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def caption(scene: Scene, dice: random.Random) -> str:
    if dice.random() < 0.5:
        return listed([f"a {t.size} {t.name} at the {t.place}" for t in scene]) + "."
    return listed([f"at the {t.place} a {t.size} {t.name}" for t in scene]) + "."


def ask(scene: Scene, dice: random.Random) -> tuple[str, str]:
    """A question that has one short answer."""
    t = dice.choice(scene)
    kind = dice.choice(("colour", "shape", "size", "where", "what", "what", "count", "is there", "is there"))
    if kind == "colour":
        unique = [t for t in scene if sum(u.shape == t.shape for u in scene) == 1]
        if not unique:
            return ask(scene, dice)
        t = dice.choice(unique)
        question = dice.choice((f"What colour is the {t.shape}?", f"Which colour has the {t.shape}?"))
        return question, f"It is {t.colour}."
    if kind == "shape":
        unique = [t for t in scene if sum(u.colour == t.colour for u in scene) == 1]
        if not unique:
            return ask(scene, dice)
        t = dice.choice(unique)
        question = dice.choice((f"What shape is the {t.colour} thing?", f"Which shape has the {t.colour} thing?"))
        return question, f"It is a {t.shape}."
    if kind == "size":
        return dice.choice([f"How big is the {t.name}?", f"Is the {t.name} big or small?"]), f"It is {t.size}."
    if kind == "where":
        return dice.choice([f"Where is the {t.name}?", f"In which place is the {t.name}?"]), f"It is at the {t.place}."
    if kind == "what":
        place = t.place if dice.random() < 0.75 else dice.choice(PLACES)
        there = [t for t in scene if t.place == place]
        answer = f"A {there[0].size} {there[0].name}." if there else "Nothing is there."
        return dice.choice([f"What is at the {place}?", f"What do you see at the {place}?"]), answer
    if kind == "count":
        answer = f"There {'is' if len(scene) == 1 else 'are'} {NUMBERS[len(scene)]}."
        return dice.choice(["How many things are there?", "How many things do you see?"]), answer
    name = t.name if dice.random() < 0.5 else f"{dice.choice(COLOURS)} {dice.choice(SHAPES)}"
    answer = f"Yes, there is a {name}." if any(t.name == name for t in scene) else f"No, there is no {name}."
    return dice.choice([f"Is there a {name}?", f"Do you see a {name}?"]), answer


NUMBERS = ("no", "one", "two", "three")


def conversation(scene: Scene, dice: random.Random) -> list[str]:
    turns = dict(ask(scene, dice) for _ in range(dice.randint(3, 7)))
    return [message for turn in turns.items() for message in turn]


def detail(scene: Scene, dice: random.Random) -> list[str]:
    request = dice.choice(("Describe the picture in detail.", "What can be seen? Tell me everything.",
                           "Give a detailed description of this picture."))  # fmt: skip
    n = len(scene)
    answer = f"The picture shows {NUMBERS[n]} thing{'s' * (n > 1)} on a plain ground."
    for t in scene:
        answer += f" At the {t.place} there is a {t.shape}. It is {t.size} and {t.colour}."
    return [request, answer]


def reasoning(scene: Scene, dice: random.Random) -> list[str]:
    """A question whose answer says first what it is concluded from."""
    kinds = ["more"]
    x, y = ([PLACES.index(t.place) % 3 for t in scene], [PLACES.index(t.place) // 3 for t in scene])
    ends = [(side, line.index(most(line)))  # the sides that one thing alone is nearest to
            for side, line, most in (("left", x, min), ("right", x, max), ("top", y, min), ("bottom", y, max))
            if len(scene) > 1 and line.count(most(line)) == 1]  # fmt: skip
    kinds += ["first", "first"] * bool(ends)
    sizes = [t.size for t in scene]
    kinds += ["biggest"] * (sizes.count("big") == 1 and len(scene) > 1)
    kind = dice.choice(kinds)
    if kind == "first":
        side, i = dice.choice(ends)
        question = dice.choice((f"Coming from the {side}, which thing would I reach first, and why?",
                                f"Which thing is nearest to the {side} edge, and why?"))  # fmt: skip
        facts = listed([f"the {t.name} is at the {t.place}" for t in scene])
        return [question, f"{facts[0].upper()}{facts[1:]}. So nearest to the {side} edge is the {scene[i].name}."]
    if kind == "biggest":
        facts = listed([f"the {t.name} is {t.size}" for t in scene])
        biggest = scene[sizes.index("big")]
        question = dice.choice(("Which thing would be the heaviest, and why?", "Which thing is the biggest, and why?"))
        return [question, f"{facts[0].upper()}{facts[1:]}. So it is the {biggest.name}."]
    big, small = sizes.count("big"), sizes.count("small")
    verdict = "more are big" if big > small else "more are small" if small > big else "they are as many"
    question = dice.choice(("Are more things big or small, and why?", "Do big or small things prevail, and why?"))
    return [question, f"Big: {NUMBERS[big]}. Small: {NUMBERS[small]}. So {verdict}."]


# --- the science quiz. A problem is a record of ScienceQA's problems.json.

SUBJECTS = ("natural science", "social science", "language science")
CLASSES = {"dog": "mammal", "whale": "mammal", "horse": "mammal", "bat": "mammal", "eagle": "bird", "owl": "bird",
           "penguin": "bird", "duck": "bird", "trout": "fish", "shark": "fish", "salmon": "fish", "frog": "amphibian",
           "newt": "amphibian", "toad": "amphibian", "ant": "insect", "bee": "insect", "moth": "insect"}  # fmt: skip
CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Peru": "Lima",
            "Cuba": "Havana", "Norway": "Oslo", "Greece": "Athens", "Kenya": "Nairobi", "India": "Delhi",
            "China": "Beijing"}  # fmt: skip
WORDS = {"house": "noun", "river": "noun", "apple": "noun", "window": "noun", "sing": "verb", "jump": "verb",
         "write": "verb", "eat": "verb", "happy": "adjective", "cold": "adjective", "loud": "adjective",
         "soft": "adjective"}  # fmt: skip
NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Ida", "Max")
HABITATS = ("pond", "forest", "desert", "river", "cave", "meadow")
GOODS = ("bread", "apples", "shoes", "books", "milk", "hats")
TEXTS = ("poem", "letter", "story", "song", "speech", "diary")


def options(dice: random.Random, right: str, among: Iterable[str], most: int = 4) -> tuple[list[str], int]:
    """Two to `most` choices, one of them right -> choices, index of the right one."""
    wrong = [x for x in dict.fromkeys(among) if x != right]
    choices = [right] + dice.sample(wrong, min(len(wrong), dice.randint(1, most - 1)))
    dice.shuffle(choices)
    return choices, choices.index(right)


def quiz_picture(subject: str, scene: Scene, dice: random.Random) -> dict:
    t = dice.choice(scene)
    if subject == "natural science":
        wordings = f"What colour is the thing at the {t.place}?", f"Which colour has the thing at the {t.place}?"
        right, among, lecture = t.colour, COLOURS, "We see things by the light that they reflect."
        solution = f"The {t.shape} at the {t.place} is {t.colour}."
    elif subject == "social science":
        wordings = f"Look at the map. Where is the {t.name}?", f"In which part of the map is the {t.name}?"
        right, among, lecture = t.place, PLACES, "A map shows where things are."
        solution = f"The {t.name} is at the {t.place}."
    else:
        wordings = f"Which word names the thing at the {t.place}?", f"Which noun fits the thing at the {t.place}?"
        right, among, lecture = t.shape, SHAPES, "A noun names a thing."
        solution = f"At the {t.place} there is a {t.shape}."
    question = dice.choice(wordings)
    choices, answer = options(dice, right, among)
    hint = dice.choice(("", "", "The picture shows a few things."))
    return dict(question=question, choices=choices, answer=answer, hint=hint, lecture=lecture, solution=solution)


def quiz_text(subject: str, dice: random.Random, n: int = 3) -> list[dict]:
    """One hint of n facts, and n problems that it answers."""
    givers, gifts, fact, wordings, lecture = {
        "natural science": (tuple(CLASSES), HABITATS, "The {0} lives in the {1}.",
                            ("Where does the {0} live?", "What is the home of the {0}?"),
                            "A habitat is where an animal lives."),
        "social science": (NAMES, GOODS, "{0} sells {1}.", ("Who sells {1}?", "From whom can you buy {1}?"),
                           "A seller gives goods for money."),
        "language science": (NAMES, TEXTS, "{0} wrote a {1}.", ("What did {0} write?", "Which text is by {0}?"),
                             "An author writes a text."),
    }[subject]  # fmt: skip
    pairs = list(zip(dice.sample(givers, n), dice.sample(gifts, n)))
    hint = " ".join(fact.format(*pair) for pair in pairs)
    problems = []
    for pair in dice.sample(pairs, n):
        wording = dice.choice(wordings)
        asked_for = 0 if "{1}" in wording else 1  # the giver or the gift
        choices, answer = options(dice, pair[asked_for], [p[asked_for] for p in pairs], most=3)
        problems.append(dict(question=wording.format(*pair), choices=choices, answer=answer, hint=hint, lecture=lecture,
                             solution=(fact if asked_for else "You buy {1} from {0}.").format(*pair)))  # fmt: skip
    return problems


def quiz_fact(subject: str, dice: random.Random) -> dict:
    facts, lecture, wordings, solution = {
        "natural science": (CLASSES, "Animals are sorted into classes.",
                            ("What kind of animal is the {}?", "To which class belongs the {}?"),
                            "The {} is of the class {}."),
        "social science": (CAPITALS, "The capital is the seat of the government.",
                           ("What is the capital of {}?", "Which city governs {}?"), "The capital of {} is {}."),
        "language science": (WORDS, "Words are sorted by what they do.",
                             ("What kind of word is {}?", "Which part of speech is {}?"),
                             "The word {} is of the kind {}."),
    }[subject]  # fmt: skip
    asked = dice.choice(list(facts))
    choices, answer = options(dice, facts[asked], facts.values())
    question = dice.choice(wordings).format(asked)
    solution = solution.format(asked, facts[asked])
    return dict(question=question, choices=choices, answer=answer, hint="", lecture=lecture, solution=solution)


def quiz(dice: random.Random, held_out: bool = False) -> tuple[dict, Scene | None]:
    """A problem that needs its picture, its hint, or something learned before -> (record, scene or None)."""
    subject = dice.choice(SUBJECTS)
    kind, scene = dice.choice(("picture", "picture", "text", "fact")), None
    if kind == "picture":
        scene = draw_scene(dice, held_out)
        problem = quiz_picture(subject, scene, dice)
    else:
        problem = quiz_text(subject, dice)[0] if kind == "text" else quiz_fact(subject, dice)
    problem |= dict(image="image.png" if scene else None, task="closed choice", grade=f"grade{dice.randint(1, 12)}",
                    subject=subject, topic=subject.split()[0], category=kind, skill=f"{subject}: {kind}")  # fmt: skip
    return problem, scene


# --- the demo's data, in the published formats

CAPTIONED, HELD_OUT = 6400, 150  # pictures
QUIZ = dict(train=9000, val=200, test=600)  # problems
SETTINGS = {  # in place of the paper's: this model has a ten-thousandth of the parameters, and minutes
    "stage1": dict(epochs=3, batch_size=32, lr=5e-2),
    "chat": dict(epochs=1, batch_size=32, lr=1e-3),
    "scienceqa": dict(epochs=2, batch_size=32, lr=1e-3),
}


def data_of(name: str) -> tuple[list[Path], Path]:
    """What a run of this name (a key of SETTINGS) reads below FOLDER -> data files, folder of pictures."""
    if name == "scienceqa":
        return [FOLDER / "scienceqa"], FOLDER / "scienceqa"
    files = ["captions"] if name == "stage1" else ["conversation", "detail", "reasoning"]
    return [FOLDER / f"{file}.json" for file in files], FOLDER / "images"


def prepare(folder: Path, progress: bool = True) -> None:
    """Writes the demo's data under `folder`, unless it is there already:

        images/                        PNG files: train-*.png, test-*.png
        captions.json                  [{"image", "caption"}, ...]: what stage 1 trains on
        conversation.json, detail.json, reasoning.json     LLaVA JSON, on the same pictures: for the chatbot
        heldout.json                   scenes that none of these hold: [{"image", "scene", "caption", "questions"}, ...]
        scienceqa/                     problems.json, pid_splits.json, images/{split}/{id}/image.png
        recipe.json                    what all this was made by

    It is made under another name and renamed when complete. Raises UserError if `folder` holds anything else.
    """
    recipe = dict(recipe=RECIPE, seed=SEED, captioned=CAPTIONED, held_out=HELD_OUT, quiz=QUIZ)
    folder = Path(folder)
    if folder.exists():
        made_by = folder / "recipe.json"
        if made_by.is_file() and made_by.read_text() == json.dumps(recipe):
            return
        if not folder.is_dir() or (any(folder.iterdir()) and not made_by.is_file()):
            raise UserError(f"{folder}: is there already and is no data of the demo; name a new folder or remove it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    dice = random.Random(f"data {SEED}")

    files = dict(captions=[], conversation=[], detail=[], reasoning=[])
    total = CAPTIONED + HELD_OUT + sum(QUIZ.values())
    bar = tqdm(total=total, desc="drawing the demo", disable=not progress, mininterval=1)
    for i in range(CAPTIONED):
        scene, image = draw_scene(dice), f"train-{i:05}.png"
        draw_picture(scene, dice).save(partial / "images" / image)
        files["captions"].append({"image": image, "caption": caption(scene, dice)})
        for kind, talk in (("conversation", conversation), ("detail", detail), ("reasoning", reasoning)):
            turns = with_picture(talk(scene, dice), dice)
            messages = [{"from": who, "value": text} for who, text in zip(("human", "gpt") * len(turns), turns)]
            files[kind].append({"id": f"{kind}-{i:05}", "image": image, "conversations": messages})
        bar.update()
    held_out = {}
    while len(held_out) < HELD_OUT:
        held_out[draw_scene(dice, held_out=True)] = None
    files["heldout"] = []
    for i, scene in enumerate(held_out):
        image = f"test-{i:05}.png"
        draw_picture(scene, dice).save(partial / "images" / image)
        questions = dict(ask(scene, dice) for _ in range(6))
        questions = [{"question": question, "answer": answer} for question, answer in questions.items()]
        record = {"image": image, "scene": [vars(t) for t in scene], "caption": caption(scene, dice)}
        files["heldout"].append(record | {"questions": questions})
        bar.update()
    problems, splits = {}, {split: [] for split in QUIZ}
    for split, count in QUIZ.items():
        for _ in range(count):
            id = str(len(problems) + 1)
            problem, scene = quiz(dice, held_out=split != "train")
            problems[id] = problem | {"split": split}
            splits[split].append(id)
            if scene:
                place = partial / "scienceqa" / "images" / split / id
                place.mkdir(parents=True)
                draw_picture(scene, dice).save(place / "image.png")
            bar.update()
    bar.close()
    for name, records in files.items():
        (partial / f"{name}.json").write_text(json.dumps(records, indent=0))
    (partial / "scienceqa" / "problems.json").write_text(json.dumps(problems, indent=0))
    (partial / "scienceqa" / "pid_splits.json").write_text(json.dumps(splits))
    (partial / "recipe.json").write_text(json.dumps(recipe))
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)


# --- how much of a caption is right


@dataclass(frozen=True)
class HeldOut:
    """A scene that no training data holds: its picture, its true caption, and questions with their answers."""

    image: Path
    scene: Scene
    caption: str
    questions: list[tuple[str, str]]


def heldout(folder: Path) -> list[HeldOut]:
    """The held-out scenes of the data that `prepare` wrote under `folder`."""
    records = json.loads((Path(folder) / "heldout.json").read_text())
    return [
        HeldOut(Path(folder) / "images" / r["image"], tuple(Thing(**t) for t in r["scene"]), r["caption"],
                [(q["question"], q["answer"]) for q in r["questions"]])
        for r in records
    ]  # fmt: skip


def any_of(words: Iterable[str]) -> str:
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"  # the longest first: top-left before top


PHRASE = re.compile(
    rf"(?:at the {any_of(PLACES)} )?an? {any_of(SIZES)} {any_of(COLOURS)} {any_of(SHAPES)}(?: at the {any_of(PLACES)})?"
)


def read_caption(text: str) -> list[tuple]:
    """The things that a caption names -> (size, colour, shape, place or None) of each."""
    return [(size, colour, shape, after or before or None)
            for before, size, colour, shape, after in PHRASE.findall(text)]  # fmt: skip


def caption_score(text: str, scene: Scene) -> dict[str, float]:
    """How much of a scene a caption names right, per attribute, between 0 and 1.

    True and named things are paired so that most agrees. Things not named count as wrong, and so do things invented:
    each attribute's hits are divided by the larger of the two numbers.
    """
    named = read_caption(text)
    truth = [(t.size, t.colour, t.shape, t.place) for t in scene]
    n = max(len(named), len(truth))
    if len(named) > 6:  # a runaway caption: its first things stand for it, the others count as invented
        named = named[:6]
    short, long = sorted((named, truth), key=len)
    pairings = (list(zip(short, order)) for order in itertools.permutations(long, len(short)))
    best = max(([sum(a[k] == b[k] for a, b in pairs) for k in range(4)] for pairs in pairings), key=sum)
    return {attribute: hits / n for attribute, hits in zip(ATTRIBUTES, best)}


def caption_scores(captions: list[str], scenes: list[Scene]) -> dict[str, float]:
    """The mean of `caption_score` per attribute, and over the four as "all"."""
    scores = [caption_score(*pair) for pair in zip(captions, scenes, strict=True)]
    mean = {attribute: sum(s[attribute] for s in scores) / len(scores) for attribute in ATTRIBUTES}
    return mean | {"all": sum(mean.values()) / len(mean)}


def caption_report(before: list[str], after: list[str], swapped: list[str], held_out: list[HeldOut], samples=4) -> str:
    """What stage 1 prints at its end: a few captions before and after, and how much of them is right.

    before, after: captions of each held-out picture by the untrained and the trained W; swapped: by the trained W,
    but of another scene's picture (that of the next one in the list). Chance: the true captions of all the others.
    """
    scenes = [h.scene for h in held_out]
    truths = [h.caption for h in held_out]
    chance = [caption_scores(truths[i:] + truths[:i], scenes) for i in range(1, len(truths), 7)]
    rows = {
        "W untrained": caption_scores(before, scenes),
        "W trained": caption_scores(after, scenes),
        "W trained, another scene's picture": caption_scores(swapped, scenes),
        "chance: other scenes' true captions": {k: sum(c[k] for c in chance) / len(chance) for k in chance[0]},
    }
    lines = []
    for h, b, a in list(zip(held_out, before, after))[:samples]:
        lines += [h.image.name, f"  truth   {h.caption}", f"  before  {' '.join(b.split())[:100]}", f"  after   {a}"]
    lines += ["", f"{f'% named right, {len(scenes)} held-out scenes':46}  size  colour  shape  place    all"]
    for name, row in rows.items():
        lines.append(f"  {name:44}" + "".join(f"{100 * row[k]:{w}.1f}" for k, w in zip(row, (6, 8, 7, 7, 7))))
    return "\n".join(lines)


def chat_report(before: list[str], after: list[str], swapped: list[str], held_out: list[HeldOut], samples=6) -> str:
    """What stage 2 prints for the chat: a few questions, and the share of them answered with exactly the true answer.

    The three lists answer `exam("chat")`. Chance: how often another scene has the same answer to the same question.
    """
    asked = [(h.image.name, question, truth) for h in held_out for question, truth in h.questions[:ASKED]]
    same = {}  # question -> its true answers, for all the scenes
    for h in held_out:
        for question, truth in h.questions:
            same.setdefault(question, []).append(truth)
    pairs = [(truth, other) for _, question, truth in asked for other in without(same[question], truth)]
    rows = {name: [answer == truth for answer, (_, _, truth) in zip(answers, asked, strict=True)] for name, answers in
            (("before stage 2", before), ("after", after), ("after, another scene's picture", swapped))}  # fmt: skip
    rows["chance: other scenes' true answers"] = [truth == other for truth, other in pairs]
    shown = [(*about, a) for about, a in zip(asked, after)][:samples]
    lines = [f"{name}  {question}\n  truth {truth}  after {a}" for name, question, truth, a in shown]
    lines += ["", f"% of {len(asked)} questions about held-out scenes right"]
    return "\n".join(lines + [f"  {name:44}{100 * sum(row) / len(row):6.1f}" for name, row in rows.items()])


def without(answers: list[str], one: str) -> list[str]:
    """The answers less one that equals `one`."""
    rest = answers.copy()
    rest.remove(one)
    return rest


ASKED = 2  # questions about each held-out scene at the end of the chat's training


def exam(name: str, shift: int = 0) -> list[tuple[str, str]]:
    """What a run (a key of SETTINGS) is asked about the held-out scenes -> (human message, file of the picture).

    shift: how many scenes further on the picture comes from that is shown; 0 = it is the true one.
    """
    held_out = heldout(FOLDER)
    shown = held_out[shift:] + held_out[:shift]
    if name == "stage1":
        return [(f"{IMAGE}\n{REQUESTS[0]}", s.image.name) for s in shown]
    return [(f"{IMAGE}\n{q}", s.image.name) for h, s in zip(held_out, shown) for q, _ in h.questions[:ASKED]]


def quiz_report(scores: dict[str, dict]) -> str:
    """The science quiz by category: a line for each evaluation's scores, and what choosing at random would give."""
    from eval_scienceqa import CATEGORIES, categories  # which needs this file, but is read before it

    problems = checkpoint.read_json(FOLDER / "scienceqa" / "problems.json", dict).values()
    shares = {name: [100 / len(p["choices"]) for p in problems if p["split"] == "test" and name in categories(p)]
              for name in CATEGORIES}  # fmt: skip
    rows = scores | {"chance: a choice at random": {name: sum(s) / max(1, len(s)) for name, s in shares.items()}}
    lines = [f"{'% of the science quiz right':32}" + "".join(f"{name:>7}" for name in CATEGORIES)]
    for name, row in rows.items():
        lines.append(f"  {name:30}" + "".join(f"{'-' if v is None else format(v, '.1f'):>7}" for v in row.values()))
    return "\n".join(lines)


QUIZZED = ("answers_test.json", "answers_test_swapped.json")  # what eval_scienceqa.py leaves of the demo's quiz


def report(run: Path) -> str:
    """The figures of a run of the demo, from the answers that train.py and eval_scienceqa.py kept in its directory.

    Raises UserError if there are none.
    """
    if (run / "exam.json").is_file():
        kept = checkpoint.read_json(run / "exam.json", dict)
        write = {"stage1": caption_report, "chat": chat_report}[kept.pop("name")]
        return write(**kept, held_out=heldout(FOLDER))
    scores = {name: checkpoint.read_json(run / name, dict).get("scores") for name in QUIZZED if (run / name).is_file()}
    if not scores or None in scores.values():
        raise UserError(f"{run}: holds no answers of the demo; train it to its end (train.py without paths), and a run "
                        "of the quiz evaluate (eval_scienceqa.py)")  # fmt: skip
    return quiz_report(scores)


# --- text alone, which the LLaMA reads before: the scene told in words where a picture would stand


def in_words(scene: Scene, dice: random.Random) -> list[list[tuple[str, float]]]:
    """The scene as a disorderly run of words, some of them twice: the things in any order, each begun by its place.

    No sentence: what a picture's patches become through W will not be one either.
    """
    words = []
    for t in dice.sample(scene, len(scene)):
        words += ["blank"] * dice.choice((0, 0, 1, 2, 4))
        rest = [t.size, t.colour, t.shape]
        dice.shuffle(rest)
        rest += dice.choices([t.size, t.colour, t.shape, t.place], k=dice.randint(0, 4))
        words.append(t.place)
        for word in rest:
            words += ["blank"] * (dice.random() < 0.1) + [word]
    words += ["blank"] * dice.choice((0, 0, 1, 2, 4))
    return [[(word, 1.0)] for word in words]


SOUGHT = (*COLOURS, *SHAPES, *PLACES, *HABITATS, *NAMES, *GOODS, *TEXTS, *SIZES)  # what one can ask for
DECISIVE = (*SOUGHT, *NUMBERS, "Yes", "No", "Nothing", *LETTERS[:5])  # words that must be known, not just well put
KINDS = dict(caption=3, conversation=5, detail=1, reasoning=2, quiz=5, drill=6)  # what the LLaMA reads, and how often


def letters(dice: random.Random, most: int, questions: int = 1) -> list[str]:
    """Questions for the letter of one of 2 to `most` options."""
    words = dice.sample(SOUGHT, dice.randint(2, most))
    turns = [(f"Which is {words[i]}?", f"{words[i]}. The answer is {LETTERS[i]}.")
             for i in dice.choices(range(len(words)), k=questions)]  # fmt: skip
    return after(options_line(words), turns)


def facts(dice: random.Random, questions: int = 1) -> list[str]:
    """A text of the quiz and questions that it answers."""
    problems = quiz_text(dice.choice(SUBJECTS), dice)
    return after(problems[0]["hint"], [(p["question"], p["solution"]) for p in problems[:questions]])


def after(text: str, turns: list[tuple[str, str]]) -> list[str]:
    messages = [message for turn in turns for message in turn]
    return [f"{text}\n{messages[0]}", *messages[1:]]


def told(dice: random.Random) -> tuple[list[str], Scene | None]:
    """What the LLaMA practises on: a conversation (with `<image>` where the scene's words go) and its scene."""
    kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "drill":
        return (letters(dice, 4, 3) if dice.random() < 0.6 else facts(dice, 3)), None
    if kind == "quiz":
        problem, scene = quiz(dice)
        record = problem | dict(id="", image_path=problem["image"])
        return from_scienceqa(record, dice).turns, scene
    scene = draw_scene(dice)
    if kind == "caption":
        return from_caption({"image": "picture.png", "caption": caption(scene, dice)}, dice).turns, scene
    turns = dict(conversation=conversation, detail=detail, reasoning=reasoning)[kind](scene, dice)
    return with_picture(turns, dice), scene


def with_picture(turns: list[str], dice: random.Random) -> list[str]:
    """Eq. 2: the picture before or after the first question."""
    first = f"{IMAGE}\n{turns[0]}" if dice.random() < 0.5 else f"{turns[0]}\n{IMAGE}"
    return [first, *turns[1:]]


def in_chords(scene: Scene, dice: random.Random) -> list[list[tuple[str, float]]]:
    """The scene as positions that each sound several words at once -> (word, loudness) of each position.

    The positions of things and of empty places are shuffled among each other, so a chord must be understood by
    itself; in some, a faint word of another thing sounds too.
    """
    empty = free(scene)
    chords = [[("blank", dice.uniform(0.4, 1.2)), (place, dice.uniform(0, 1.2))]
              for place in dice.choices(empty, k=dice.randint(6, 24))]  # fmt: skip
    for t in scene:
        for _ in range(dice.randint(3, 6)):
            words = [word for word in vars(t).values() if dice.random() < 0.85] or [t.place]
            chords.append([(word, dice.uniform(0.4, 1.2)) for word in words])
    for chord in chords:
        if dice.random() < 0.3:
            chord.append((dice.choice(list(vars(dice.choice(scene)).values())), dice.uniform(0, 0.3)))
    return dice.sample(chords, len(chords))


def in_clear_chords(scene: Scene, dice: random.Random) -> list[list[tuple[str, float]]]:
    """The same, one position a thing: what the LLaMA begins with."""
    return [[(word, 1.0) for word in vars(t).values()] for t in dice.sample(scene, len(scene))]


def spell(sp, turns: list[str], telling: list[list[tuple[str, float]]]):
    """A conversation with its scene told exactly where a picture's patches would be; telling: its positions' chords.

    Returns ids (T, 5) and loudness (T, 5) of the words at each position (only a chord has more than one), green (T,).
    """
    ids, green = tokenize(sp, turns, len(telling))
    return *sounding(sp, ids, telling), green


def sounding(sp, ids, telling=()):
    """ids (T,) -> ids (T, 5), loudness (T, 5), with the chords of `telling` where ids holds IMAGE_ID."""
    chords, loudness = (np.zeros((len(ids), len(ATTRIBUTES) + 1), kind) for kind in (np.int64, np.float32))
    chords[:, 0], loudness[:, 0] = ids, 1
    for position, chord in zip(np.flatnonzero(np.asarray(ids) == IMAGE_ID), telling):
        for i, (word, loud) in enumerate(chord):
            chords[position, i], loudness[position, i] = sp.piece_to_id("\u2581" + word), loud
    return chords, loudness


# --- the LLaMA's lessons: one text each, in the form of `spell`; `share` of the lesson is over.
#
# Among all else that there is to learn, attention that looks things up does not form within thousands of steps. It
# forms within a minute or two when it is all that there is to learn, one kind after another, each built on the last.


def repeat(sp, dice: random.Random, share: float):
    """Pieces drawn at random, then the same again from any one of them on: to go on as it went on before."""
    drawn = dice.sample(range(N_BYTES, VOCAB), dice.randint(4, 10))
    first = dice.randrange(len(drawn))
    again = [(piece, i > 0 and piece != drawn[0]) for i, piece in enumerate(drawn[first:] + drawn[:first])]
    return bare(sp, [(piece, False) for piece in drawn] + again)


def retell(sp, dice: random.Random, share: float, n: int):
    """A text of n facts, then all that it says once more, in another order and other words: to find who does what."""
    problems = quiz_text(dice.choice(SUBJECTS), dice, n)
    pieces = [(piece, False) for piece in sp.encode(problems[0]["hint"])]
    for said in (sp.encode(p["solution"]) for p in problems):
        pieces += [(piece, i == len(said) - 2) for i, piece in enumerate(said)]  # green: its last word
    return bare(sp, pieces)


def bare(sp, pieces: list[tuple[int, bool]]):
    """Pieces and whether they are green, in the form of `spell`; no conversation, so without the system message."""
    ids, green = zip(*pieces)
    return *sounding(sp, ids), np.array(green)


def find_letters(sp, dice: random.Random, share: float):
    """To find the letter of an option, and, as practised before, who does what."""
    if dice.random() < 0.7:
        return spell(sp, letters(dice, 2 if share < 0.4 else 3 if share < 0.7 else 5), [])
    return spell(sp, facts(dice), [])


def find_things(sp, dice: random.Random, share: float):
    """To find the thing with an attribute, and, as practised before, letters, and who does what."""
    kind = dice.random()
    if kind > 0.7:
        return spell(sp, letters(dice, 5) if kind < 0.8 else facts(dice), [])
    scene, turns = draw_scene(dice, counts=(2,)), ["", ""]
    while not turns[1].startswith(("It is", "A ")):
        turns = with_picture(list(ask(scene, dice)), dice)
    return spell(sp, turns, in_clear_chords(scene, dice))


def read_all(sp, dice: random.Random, share: float):
    """All that is told of the world."""
    turns, scene = told(dice)
    return spell(sp, turns, (in_chords if dice.random() < 0.85 else in_words)(scene, dice) if scene else [])


# --- the recipe of the backbones

VOCAB, N_BYTES = 1024, 3 + 256  # the first pieces are <unk>, <s>, </s> and the bytes
LLAMA_SHAPE: dict[str, Any] = dict(dim=128, n_layers=4, n_heads=8, n_kv_heads=8, ffn_dim=352, vocab_size=VOCAB,
                                   norm_eps=1e-5)  # fmt: skip
LLAMA_TRAINING: tuple[tuple[str, dict[str, Any]], ...] = (  # in this order
    ("repeat", dict(text=repeat, steps=600, batch_size=64, lr=4e-3, bare=True, other_words=1.0)),
    ("facts", dict(text=functools.partial(retell, n=2), steps=300, batch_size=64, lr=4e-3, bare=True)),
    ("facts", dict(text=functools.partial(retell, n=3), steps=250, batch_size=64, lr=4e-3, bare=True)),
    ("letters", dict(text=find_letters, steps=400, batch_size=64, lr=2e-3)),
    ("scenes", dict(text=find_things, steps=450, batch_size=64, lr=4e-3)),
    ("all", dict(text=read_all, steps=3600, batch_size=32, lr=1e-3, other_words=0.1, cosine=True)),
)
MUON_LR = 5e-3
VIT_SHAPE = dict(image_size=PIXELS, patch_size=PATCH, width=128, layers=4)
VIT_TRAINING: dict[str, Any] = dict(steps=1000, batch_size=128, lr=1.5e-3)


def train_tokenizer(path: Path):
    """SentencePiece BPE with LLaMA's settings, on the text of the conversations."""
    dice = random.Random(f"tokenizer {SEED}")
    lines = []
    for _ in range(8000):
        turns, scene = told(dice)
        lines += "".join(text for text, _ in render(turns, scene is not None)).split("\n")  # a newline stays a byte
        lines += [" ".join(word for [(word, _)] in in_words(scene, dice))] if scene else []
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=VOCAB, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
        split_digits=True, user_defined_symbols=["###"] + ["\u2581" + p for p in PLACES if "-" in p],
        required_chars="".join(map(chr, range(33, 127))), minloglevel=2,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    sp = load_tokenizer(path)
    for word in [w for words in ATTRIBUTES.values() for w in words] + ["blank"]:
        assert sp.encode(word) == [sp.piece_to_id("\u2581" + word)] != [sp.unk_id()], f"{word} is not one piece"
    return sp


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate: warm-up over the first 5 %, then half a cosine down to 2 %."""
    return min(1, (step + 1) / (0.05 * steps)) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def padded_attention(cu_seqlens, n_layers: int, prefix=None) -> list:
    """`model.flat_attention`, as one product over a padded rectangle: faster for many short samples on a CPU."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    B, T, S = len(lengths), int(lengths.max()), len(prefix[0][0]) if prefix else 0
    at = (torch.arange(T) < lengths[:, None]).nonzero(as_tuple=True)  # row and column of each flat position
    hidden = torch.full((T, S + T), -1e4).triu(S + 1)

    def attend(layer, *qkv):  # (N, H, hd) each
        q, k, v = (t.new_zeros(B, T, *t.shape[1:]).index_put(at, t).transpose(1, 2) for t in qkv)  # (B, H, T, hd)
        if prefix:
            k, v = (torch.cat([p.transpose(0, 1).expand(B, -1, -1, -1), t], 2) for p, t in zip(prefix[layer], (k, v)))
        scores = (q / q.shape[-1] ** 0.5) @ k.transpose(2, 3) + hidden.to(q.dtype)  # (B, H, T, S+T)
        return (scores.softmax(-1, dtype=q.dtype) @ v).transpose(1, 2)[at]

    return [lambda *qkv, layer=layer: attend(layer, *qkv) for layer in range(n_layers)]


def new_llama() -> LLaMA:
    torch.manual_seed(SEED)
    llama = LLaMA(LLaMAConfig(**LLAMA_SHAPE))
    for name, p in llama.named_parameters():
        if p.dim() == 2:
            last = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(p, std=0.3 if "embeddings" in name else p.shape[1] ** -0.5 * (0.35 if last else 1))
    return llama


def optimizers_of(llama: LLaMA) -> tuple:
    """Muon for the matrices of the blocks, AdamW for what is no such matrix."""
    matrices = [p for p in llama.layers.parameters() if p.dim() == 2]
    others = [p for name, p in llama.named_parameters() if p.dim() != 2 or not name.startswith("layers.")]
    return (torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.05),
            torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0))  # fmt: skip


def train_llama(sp) -> LLaMA:
    """A LLaMA from noise, by the loss over green tokens, on text alone: no picture comes in, and no feature of one."""
    llama = new_llama()
    decisive = torch.zeros(VOCAB, dtype=torch.bool)
    decisive[[sp.piece_to_id("\u2581" + word) for word in DECISIVE]] = True
    system, n_layers = torch.tensor(system_ids(sp)), len(llama.layers)
    S, one = len(system), torch.tensor([0, len(system)], dtype=torch.int32)
    for name, how in LLAMA_TRAINING:
        muon, adamw = optimizers_of(llama)
        dice, bar, mean = random.Random(f"{name} {SEED}"), trange(how["steps"], desc=f"LLaMA, {name}", mininterval=2), 0
        for step in bar:
            samples = [how["text"](sp, dice, step / how["steps"]) for _ in range(how["batch_size"])]
            skip = 0 if how.get("bare") else S  # the system message
            parts = [[torch.from_numpy(part[skip:]) for part in sample] for sample in samples]
            ids, loudness, green = (torch.cat(part) for part in zip(*parts))  # (N, 5), (N, 5), (N,)
            cu_seqlens = torch.tensor([0] + [len(ids) for ids, _, _ in parts]).cumsum(0).int()
            is_target = green.nonzero().squeeze(1)
            targets = ids[is_target, 0]
            with torch.autocast("cpu", torch.bfloat16):
                prefix = []  # keys and values of the system message: the same for all samples, so computed once
                if skip:
                    llama(llama.tok_embeddings(system), positions(one), flat_attention(n_layers, one, keep=prefix))
                x = (llama.tok_embeddings(ids) * loudness[..., None]).sum(1)  # (N, dim)
                x = llama(x, positions(cu_seqlens, S), padded_attention(cu_seqlens, n_layers, prefix))
                logits = llama.logits(x[is_target - 1]).float()
            weights = torch.where(decisive[targets], 1.0, how.get("other_words", 0.0))
            loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
            share = schedule(step, how["steps"]) if how.get("cosine") else min(1, (step + 1) / 40)
            for optimizer, peak in ((muon, MUON_LR), (adamw, how["lr"])):
                optimizer.param_groups[0]["lr"] = peak * share
                optimizer.zero_grad()
            loss.backward()
            muon.step(), adamw.step()
            right = ((logits.argmax(-1) == targets) * weights).sum() / weights.sum()
            mean += (right.item() - mean) / min(step + 1, 20)
            bar.set_postfix(right=f"{mean:.3f}", refresh=False)
    return llama


def neighbours(scene: Scene, n: int, dice: random.Random) -> list[Scene]:
    """The scene and others that differ from it in one attribute of one thing: what a caption must tell apart."""
    family = [scene]
    while len(family) < n:
        i = dice.randrange(len(scene))
        attribute = dice.choices(list(ATTRIBUTES), (2, 2, 4, 1))[0]  # shapes are the hardest to see
        changed = replace(scene[i], **{attribute: dice.choice(ATTRIBUTES[attribute])})
        other = in_order([*scene[:i], changed, *scene[i + 1 :]])
        if is_scene(other) and not is_held_out(other) and other not in family:
            family.append(other)
    return family


def train_vit(sp, steps: int, batch_size: int, lr: float):
    """A ViT from noise by contrast of pictures and captions. The text encoder is thrown away.

    Two losses: CLIP's, between the class token and the caption, and one after FILIP's, between the patches of layer -2
    and the caption's phrases (a phrase is as near to a picture as to the four patches nearest to it, as many as a thing
    covers). The first alone leaves it open whether a patch tells what it shows. Batches are made of families of eight
    scenes that differ in one attribute.
    Returns the state dict under OpenAI's names, ln_post and proj included.
    """
    torch.manual_seed(SEED)
    dice = random.Random(f"vit {SEED}")
    width = VIT_SHAPE["width"]
    vit = VisionTransformer(VisionConfig(**VIT_SHAPE), feature_layer=-1)
    vit.ln_post = nn.LayerNorm(width)
    vit.proj = nn.Parameter(torch.randn(width, width) / width**0.5)
    for name, p in vit.named_parameters():
        if "embedding" in name:
            nn.init.normal_(p, std=0.5)
        elif p.dim() >= 2 and name != "proj":
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    text = LLaMA(LLaMAConfig(**LLAMA_SHAPE | dict(n_layers=2)))
    nn.init.normal_(text.tok_embeddings.weight, std=0.3)
    heads = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in ("patch", "phrase")})
    scales = nn.Parameter(torch.tensor([2.3, 2.3]))  # logarithms, as in CLIP
    parameters = [*vit.parameters(), *text.parameters(), *heads.parameters(), scales]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.05)
    outputs = []  # of the last two blocks, class token first
    for block in vit.transformer.resblocks[-2:]:
        block.register_forward_hook(lambda block, x, y: outputs.append(y))
    marks = [sp.encode("top" + mark)[1] for mark in (",", " and", ".")]  # what follows a phrase
    bar, mean = trange(steps, desc="ViT", mininterval=2), None
    for step in bar:
        counts = (1,) if step < 0.1 * steps else (1, 2, 2, 3, 3)
        scenes = [s for _ in range(batch_size // 8) for s in neighbours(draw_scene(dice, counts=counts), 8, dice)]
        pixels = torch.from_numpy(np.stack([np.asarray(draw_picture(s, dice)) for s in scenes])).permute(0, 3, 1, 2)
        captions = [sp.encode(f"{caption(s, dice)[:-1]} and nothing at the {dice.choice(free(s))}.") for s in scenes]
        ends = torch.tensor([id in marks for ids in captions for id in ids[1:] + [0]])  # of phrases: a mark follows
        cu_seqlens = torch.tensor([0] + [len(ids) for ids in captions]).cumsum(0).int()
        with torch.autocast("cpu", torch.bfloat16):
            vit(normalize(pixels))
            last, patches = outputs.pop()[:, 0], outputs.pop()[:, 1:]  # (B, D), (B, P, D)
            x = text.tok_embeddings(torch.tensor(sum(captions, [])))
            x = text.norm(text(x, positions(cu_seqlens), padded_attention(cu_seqlens, len(text.layers))))  # (N, D)
            u, v = F.normalize(vit.ln_post(last) @ vit.proj, dim=-1), F.normalize(x[cu_seqlens[1:].long() - 1], dim=-1)
            patches = F.normalize(heads["patch"](patches).flatten(0, 1), dim=-1)  # (B*P, D)
            phrases = F.normalize(heads["phrase"](x[ends]), dim=-1)  # (n phrases, D)
            near = (phrases @ patches.T).unflatten(1, (len(scenes), -1)).topk(4).values.mean(-1)  # (n, B)
            whole = u @ v.T  # (B, B)
        parts = torch.stack([n.float().mean(0) for n in near.split([len(s) + 1 for s in scenes])], 1)  # (B, B)
        pairs, loss = torch.arange(len(scenes)), torch.zeros(())
        for similar, scale in zip((whole.float(), parts), scales.exp().clamp(max=100)):
            loss = loss + (F.cross_entropy(scale * similar, pairs) + F.cross_entropy(scale * similar.T, pairs)) / 4
        optimizer.param_groups[0]["lr"] = rate = lr * schedule(step, steps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        right = [f"{(similar.argmax(1) == pairs).float().mean():.0%}" for similar in (whole, parts)]
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        bar.set_postfix(loss=f"{mean:.3f}", right="/".join(right), lr=f"{rate:.1e}", refresh=False)
    return {f"visual.{name}": p.detach() for name, p in vit.state_dict().items()}


def probe(vision: Path, n: int = 600) -> dict[str, float]:
    """How well linear maps read, from single patches of layer -2 alone, the thing that covers each patch.

    Least squares on the patches of n pictures, tested on n held-out ones -> share right, per attribute.
    """
    vit, dice = checkpoint.load_vision(vision), random.Random("probe")
    covers = [PLACES[i // 12 * 3 + i % 6 // 2] for i in range(36)]  # the place that each of the 6x6 patches is in
    found = []
    for held_out in (False, True):
        scenes = [draw_scene(dice, held_out) for _ in range(n)]
        pixels = torch.from_numpy(np.stack([np.asarray(draw_picture(s, dice)) for s in scenes])).permute(0, 3, 1, 2)
        with torch.no_grad():
            Z_v = vit(normalize(pixels)).flatten(0, 1)  # (n*P, D)
        things = [next((t for t in s if t.place == place), None) for s in scenes for place in covers]
        on = torch.tensor([t is not None for t in things])
        found.append((torch.cat([Z_v[on], torch.ones(int(on.sum()), 1)], 1), [t for t in things if t]))
    (X, train), (Y, test) = found
    right = {}
    for attribute, values in ATTRIBUTES.items():
        target, truth = (torch.tensor([values.index(getattr(t, attribute)) for t in ts]) for ts in (train, test))
        weights = torch.linalg.lstsq(X, torch.eye(len(values))[target]).solution
        right[attribute] = ((Y @ weights).argmax(1) == truth).float().mean().item()
    return right


def build(folder: Path):
    """Makes everything in demo/ from nothing, in `folder`."""
    llama_folder, vision = folder / LLAMA.name, folder / VISION.name
    llama_folder.mkdir(parents=True, exist_ok=True)
    sp = train_tokenizer(llama_folder / "tokenizer.model")
    weights = {name: p.half() for name, p in train_llama(sp).state_dict().items()}
    torch.save(weights, llama_folder / "consolidated.00.pth")
    shape = {k: LLAMA_SHAPE[k] for k in ("dim", "n_layers", "n_heads", "vocab_size", "norm_eps")} | dict(multiple_of=32)
    (llama_folder / "params.json").write_text(json.dumps(shape))
    torch.save({name: p.half() for name, p in train_vit(sp, **VIT_TRAINING).items()}, vision)
    print("layer -2, single patches, linear:", ", ".join(f"{k} {100 * v:.1f} %" for k, v in probe(vision).items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpForm)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("draw", help="write the demo's data", formatter_class=HelpForm)
    command.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    command = commands.add_parser("build", help="make the backbones anew", formatter_class=HelpForm)
    command.add_argument("--out", type=Path, default=SHIPPED, metavar="DIR", help="where")
    command = commands.add_parser("report", help="print the figures of the demo's runs again")
    command.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run directories (default: all in runs/)")
    arguments = parser.parse_args()
    if arguments.command == "draw":
        prepare(arguments.folder)
    elif arguments.command == "build":
        build(arguments.out)
    else:
        kept = [path.parent for name in ("exam.json", *QUIZZED) for path in Path("runs").glob(f"*/{name}")]
        of_demo = [run for run in kept if checkpoint.read_json(run / "config.json", dict)["settings"]["demo"]]
        if not (arguments.runs or of_demo):
            raise UserError("runs: holds no finished run of the demo; first: torchrun train.py --stage 1")
        for run in arguments.runs or sorted(set(of_demo)):
            print(f"--- {run}\n{report(run)}\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
