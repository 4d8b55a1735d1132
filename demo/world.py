"""The demo's world: scenes, their pictures, captions, conversations and a science quiz. Everything derives from a seed.

A scene holds one to three things, each with a size, colour, shape and place. A hash of the scene decides whether it is
held out, so no held-out scene is in the training data. Without paths, train.py trains on this data and starts from the
two backbones beside this file.

    python -m demo.world DIR      # draws the data into DIR; train.py draws it into runs/demo when it needs it
"""

import argparse
import json
import os
import random
import shutil
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python demo/world.py`

from common import ArgumentParser, UserError, is_process_0, progress_bar, run_command, write_error
from conversation import IMAGE

# A change of the world or of build.py needs a new RECIPE: the names of the backbones' files contain it.
RECIPE, SEED = "scenes6", 1
LLAMA = Path(__file__).parent / f"llama-{RECIPE}-seed{SEED}"
VISION = Path(__file__).parent / f"vit-{RECIPE}-seed{SEED}.pt"
CHAT = Path(__file__).parent / "chat"  # a chatbot that the demo's commands trained; build.py copies it
SCENE = Path(__file__).parent / "scene.png"  # a held-out scene, which chat.py shows
FOLDER = Path(__file__).parent.parent / "runs" / "demo"  # the data

CAPTIONED, HELD_OUT = 6400, 150  # pictures
QUIZ = dict(train=9000, val=200, test=600)  # problems of each split
SETTINGS = {  # override the paper's: this model is ten thousand times smaller and trains for minutes
    "stage1": dict(epochs=2, batch_size=16, lr=5e-2),
    "chat": dict(epochs=1, lr=1e-3),
    "scienceqa": dict(epochs=2, lr=1e-3),
}

EXAM = {  # what train.py prints after a run, by the run's name; exam.py computes it
    "stage1": f"the untrained and the trained W caption {HELD_OUT} scenes that no training data shows",
    "chat": f"the model before and after the training answers questions about {HELD_OUT} scenes that no training shows",
}

SIZES = ("big", "small")
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom", "bottom-right")
ATTRIBUTES = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES}
NUMBERS = ("none", "one", "two", "three")
KINDS = ("conversation", "detail", "reasoning")  # of turns, and of the chat's data files
FREQUENCIES = (8, 1, 1)  # of the kinds of turns within a conversation
# Things that this world does not have.
ABSENT = ("dog", "cat", "bird", "horse", "car", "bus", "tree", "house", "person", "boat", "ball", "cup", "book",
          "chair", "flower", "fish", "shoe", "table", "apple", "clock", "bridge", "cloud", "lamp", "train")
QUESTIONS = 3  # in the conversation about a held-out scene

PIXELS = 48  # of a picture, in each direction
PATCH = 8  # pixels of a patch of the ViT beside this file, in each direction
N_PATCHES = (PIXELS // PATCH) ** 2
CELL = PIXELS // 3  # pixels of one of the 3 x 3 places
OVERSAMPLING = 4  # pictures are drawn larger by this factor, then averaged down for smooth edges
RADIUS = {"big": 6.8, "small": 4.5}  # pixels
RGB = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "yellow": (240, 210, 30),
       "purple": (150, 50, 170), "black": (25, 25, 25)}  # fmt: skip

# What the demo's models can be asked, by the --task of train.py; stage 1 has none.
KNOWN = "It knows big and small circles, squares, triangles and crosses in red, green, blue, yellow, purple and black."
TOPICS = {
    None: f"{KNOWN}\nWhatever it is asked, it writes a caption.",
    "chat": f"{KNOWN}\nAsk: What is at the right? Where is the red cross? How many things are there? "
            "Describe the picture in detail.",
    "scienceqa": "It answers the questions of the demo's quiz, which eval_scienceqa.py asks.",
}  # fmt: skip

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

# Problems about a text, by subject: two lists of words, a fact about a word of each, questions, and the lecture.
TEXT_PROBLEMS = {
    "natural science": (tuple(CLASSES), HABITATS, "The {0} lives in the {1}.",
                        ("Where does the {0} live?", "What is the home of the {0}?"),
                        "A habitat is where an animal lives."),
    "social science": (NAMES, GOODS, "{0} sells {1}.", ("Who sells {1}?", "From whom can you buy {1}?"),
                       "A seller gives goods for money."),
    "language science": (NAMES, TEXTS, "{0} wrote a {1}.", ("What did {0} write?", "Which text is by {0}?"),
                         "An author writes a text."),
}  # fmt: skip
# Problems about general knowledge, by subject: answers by their word, questions, the solution (of the word, the
# answer, and the answer with its article), and the lecture.
FACT_PROBLEMS = {
    "natural science": (CLASSES, ("What kind of animal is the {}?", "Which class does the {} belong to?"),
                        "The {0} is {2}.", "Animals are sorted into classes."),
    "social science": (CAPITALS, ("What is the capital of {}?", "Which city governs {}?"),
                       "The capital of {} is {}.", "The capital is the seat of the government."),
    "language science": (WORDS, ("What kind of word is {}?", "Which part of speech is {}?"),
                         "The word {0} is {2}.", "Words are sorted by what they do."),
}  # fmt: skip


# --- scenes and their pictures


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str
    place: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def description(self) -> str:
        return f"{self.size} {self.name}"


AnyThing = TypeVar("AnyThing", bound=Thing)  # Thing, or wide.py's
Scene = tuple[Thing, ...]  # in the order of PLACES; places and names are unique


def is_scene(things: Collection[Thing]) -> bool:
    return len({t.place for t in things}) == len({t.name for t in things}) == len(things)


def in_order(things: Iterable[AnyThing]) -> tuple[AnyThing, ...]:
    return tuple(sorted(things, key=lambda t: PLACES.index(t.place)))


def is_held_out(scene: Scene) -> bool:
    """True for one scene in eight."""
    return zlib.crc32(repr(scene).encode()) % 8 == 0


def empty_places(scene: Scene) -> list[str]:
    taken = {t.place for t in scene}
    return [place for place in PLACES if place not in taken]


def draw_scene(rng: random.Random, held_out: bool = False, counts: Sequence[int] = (1, 2, 2, 3, 3)) -> Scene:
    """counts: the numbers of things to choose from, with equal probability."""
    while True:
        n = rng.choice(counts)
        scene = in_order(Thing(*(rng.choice(values) for values in ATTRIBUTES.values())) for _ in range(n))
        if is_scene(scene) and is_held_out(scene) == held_out:
            return scene


def draw_picture(scene: Scene, rng: random.Random) -> Image.Image:
    """An RGB image of PIXELS x PIXELS on a pale ground. Position, radius and shade of each thing vary a little."""
    brightness = rng.randint(215, 250)
    ground = shade([brightness] * 3, 5, rng)
    image = Image.new("RGB", (PIXELS * OVERSAMPLING, PIXELS * OVERSAMPLING), ground)
    pen = ImageDraw.Draw(image)
    for thing in scene:
        row, column = divmod(PLACES.index(thing.place), 3)
        x = OVERSAMPLING * (CELL * column + CELL / 2 + rng.uniform(-1, 1))
        y = OVERSAMPLING * (CELL * row + CELL / 2 + rng.uniform(-1, 1))
        r = OVERSAMPLING * (RADIUS[thing.size] + rng.uniform(-0.3, 0.3))
        draw_shape(pen, thing.shape, x, y, r, shade(RGB[thing.colour], 12, rng))
    return image.reduce(OVERSAMPLING)


def shade(colour: Sequence[int], most: int, rng: random.Random) -> tuple[int, ...]:
    """A colour like the given one: each channel differs by at most `most`, within 0..255."""
    return tuple(max(0, min(255, channel + rng.randint(-most, most))) for channel in colour)


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, ...]):
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill)
    elif shape == "square":
        pen.rectangle((x - 0.9 * r, y - 0.9 * r, x + 0.9 * r, y + 0.9 * r), fill)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)], fill)
    else:
        pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill)
        pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill)


# --- texts about a scene: a caption, and three kinds of turns of a conversation (section 3). rng chooses the wording.


class Turn(NamedTuple):
    question: str
    answer: str
    it: Thing | None = None  # the thing that "it" means in the next question


def a(words: str) -> str:
    """"red circle" -> "a red circle", "owl" -> "an owl" """
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def enumerate_words(parts: list[str]) -> str:
    """["a", "b", "c"] -> "a, b and c" """
    if len(parts) == 1:
        return parts[0]
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return enumerate_words([f"a {t.description} at the {t.place}" for t in scene]) + "."
    return enumerate_words([f"at the {t.place} a {t.description}" for t in scene]) + "."


def short_question(scene: Scene, rng: random.Random) -> Turn:
    """A question with one short answer."""
    frequencies = {"colour or shape": 2, "size": 1, "where": 1, "what": 2, "count": 1, "exists": 2, "absent": 1}
    (kind,) = rng.choices(list(frequencies), list(frequencies.values()))
    t = rng.choice(scene)
    if kind == "colour or shape":
        return attribute_question(scene, rng)
    if kind == "size":
        return Turn(rng.choice((f"How big is the {t.name}?", f"Is the {t.name} big or small?")), f"It is {t.size}.", t)
    if kind == "where":
        questions = f"Where is the {t.name}?", f"In which part of the picture is the {t.name}?"
        return Turn(rng.choice(questions), f"It is at the {t.place}.", t)
    if kind == "what":
        place = t.place if rng.random() < 0.75 else rng.choice(PLACES)
        question = rng.choice((f"What is at the {place}?", f"What do you see at the {place}?"))
        found = next((u for u in scene if u.place == place), None)
        return Turn(question, f"A {found.description}." if found else "Nothing is there.", found)
    if kind == "count":
        question = rng.choice(("How many things are there?", "How many things do you see?"))
        return Turn(question, f"There {'is' if len(scene) == 1 else 'are'} {NUMBERS[len(scene)]}.")
    if kind == "exists":
        name = t.name if rng.random() < 0.5 else absent_name(scene, rng)
        found = next((u for u in scene if u.name == name), None)
        question = rng.choice((f"Is there {a(name)}?", f"Do you see {a(name)}?"))
        return Turn(question, f"Yes, there is {a(name)}." if found else f"No, I see no {name}.", found)
    name = absent_name(scene, rng)
    questions = [f"Where is the {name}?", f"How big is the {name}?"]
    if name in ABSENT:
        questions.append(f"What {spelling(rng)} is the {name}?")
    return Turn(rng.choice(questions), f"I see no {name}.")


def spelling(rng: random.Random) -> str:
    return "colour" if rng.random() < 0.75 else "color"


def attribute_question(scene: Scene, rng: random.Random) -> Turn:
    """Asks for the colour of a thing that its shape identifies, or the reverse; else draws another short question."""
    asked, given = rng.choice((("colour", "shape"), ("shape", "colour")))
    values = [getattr(t, given) for t in scene]
    unique = [t for t in scene if values.count(getattr(t, given)) == 1]
    if not unique:
        return short_question(scene, rng)
    t = rng.choice(unique)
    if asked == "colour":
        questions = f"What {spelling(rng)} is the {t.shape}?", f"What is the {spelling(rng)} of the {t.shape}?"
        return Turn(rng.choice(questions), f"It is {t.colour}.", t)
    questions = f"What shape is the {t.colour} thing?", f"What is the shape of the {t.colour} thing?"
    return Turn(rng.choice(questions), f"It is a {t.shape}.", t)


def absent_name(scene: Scene, rng: random.Random) -> str:
    """What the scene does not show: a thing of the world, or one that the world does not have."""
    while True:
        name = rng.choice((f"{rng.choice(COLOURS)} {rng.choice(SHAPES)}", rng.choice(ABSENT)))
        if all(name != t.name for t in scene):
            return name


def follow_up(t: Thing, rng: random.Random) -> Turn:
    """A question about the thing that the turn before named."""
    kind = rng.choice(("colour", "shape", "size", "where", "yes or no"))
    if kind == "yes or no":
        colour = t.colour if rng.random() < 0.5 else rng.choice(COLOURS)
        return Turn(f"Is it {colour}?", f"Yes, it is {colour}." if colour == t.colour else f"No, it is {t.colour}.", t)
    question, answer = {
        "colour": (f"What {spelling(rng)} is it?", f"It is {t.colour}."),
        "shape": ("What shape is it?", f"It is a {t.shape}."),
        "size": (rng.choice(("How big is it?", "Is it big or small?")), f"It is {t.size}."),
        "where": ("Where is it?", f"It is at the {t.place}."),
    }[kind]
    if rng.random() < 0.3:
        question = f"And {question[0].lower()}{question[1:]}"
    return Turn(question, answer, t)


def detail(scene: Scene, rng: random.Random) -> Turn:
    request = rng.choice(("Describe the picture in detail.", "What can you see? Tell me everything.",
                          "Give a detailed description of this picture."))  # fmt: skip
    things = f"{NUMBERS[len(scene)]} {'thing' if len(scene) == 1 else 'things'}"
    answer = f"The picture shows {things} on a plain background."
    for t in scene:
        answer += f" At the {t.place} there is a {t.shape}. It is {t.size} and {t.colour}."
    return Turn(request, answer)


def nearest_to_sides(scene: Scene) -> list[tuple[str, Thing]]:
    """(side, thing) of each side that one thing is nearer to than all the others."""
    columns = [PLACES.index(t.place) % 3 for t in scene]
    rows = [PLACES.index(t.place) // 3 for t in scene]
    nearest = []
    if len(scene) > 1:
        for side, line, extreme in (("left", columns, min), ("right", columns, max),
                                    ("top", rows, min), ("bottom", rows, max)):  # fmt: skip
            if line.count(extreme(line)) == 1:
                nearest.append((side, scene[line.index(extreme(line))]))
    return nearest


def reasoning(scene: Scene, rng: random.Random) -> Turn:
    """A question, and an answer that lists the facts before its conclusion."""
    nearest = nearest_to_sides(scene)
    sizes = [t.size for t in scene]
    big, small = sizes.count("big"), sizes.count("small")
    kinds = ["more"]
    if nearest:
        kinds += ["nearest", "nearest"]
    if big == 1 and len(scene) > 1:
        kinds.append("biggest")
    kind = rng.choice(kinds)
    thing = None
    if kind == "nearest":
        side, thing = rng.choice(nearest)
        questions = (f"Coming from the {side}, which thing would I reach first, and why?",
                     f"Which thing is nearest to the {side} edge, and why?")  # fmt: skip
        facts = enumerate_words([f"the {t.name} is at the {t.place}" for t in scene])
        conclusion = f"So the {thing.name} is nearest to the {side} edge."
    elif kind == "biggest":
        thing = scene[sizes.index("big")]
        questions = "Which thing would be the heaviest, and why?", "Which thing is the biggest, and why?"
        facts = enumerate_words([f"the {t.name} is {t.size}" for t in scene])
        conclusion = f"So it is the {thing.name}."
    else:
        questions = "Are more things big or small, and why?", "Are there more big things or small things, and why?"
        facts = f"Big: {NUMBERS[big]}. Small: {NUMBERS[small]}"
        verdict = "more are big" if big > small else "more are small" if small > big else "there are as many of each"
        conclusion = f"So {verdict}."
    return Turn(rng.choice(questions), f"{facts[0].upper()}{facts[1:]}. {conclusion}", thing)


def draw_kinds(kind: str, rng: random.Random) -> list[str]:
    """Draws the kinds of a conversation's turns, `kind` among them: 3 to 5 if it is "conversation", else 1 to 3.

    So a user may ask for a description or a reason at any point of a chat.
    """
    others = rng.randint(2, 4) if kind == "conversation" else rng.randint(0, 2)
    kinds = [kind, *rng.choices(KINDS, FREQUENCIES, k=others)]
    rng.shuffle(kinds)
    return kinds


def conversation(scene: Scene, kinds: Iterable[str], rng: random.Random) -> list[Turn]:
    """Draws one turn for each of `kinds`, and omits repetitions.

    If the turn before names a thing, a short question refers to it with probability 1/2.
    """
    turns: list[Turn] = []
    for kind in kinds:
        it = turns[-1].it if turns else None
        if kind != "conversation":
            turn = detail(scene, rng) if kind == "detail" else reasoning(scene, rng)
        else:
            turn = follow_up(it, rng) if it and rng.random() < 0.5 else short_question(scene, rng)
        if turn not in turns:
            turns.append(turn)
    return turns


def messages_of(turns: Iterable[Turn]) -> list[str]:
    return [message for turn in turns for message in (turn.question, turn.answer)]


def with_picture(messages: list[str], rng: random.Random) -> list[str]:
    """Puts the picture before or after the first question (Eq. 2)."""
    first = f"{IMAGE}\n{messages[0]}" if rng.random() < 0.5 else f"{messages[0]}\n{IMAGE}"
    return [first, *messages[1:]]


# --- the science quiz: problems in the format of ScienceQA's problems.json


def options(rng: random.Random, right: str, candidates: Iterable[str], most: int = 4) -> tuple[list[str], int]:
    """Two to `most` shuffled choices, one of them right, and the index of the right one."""
    wrong = [word for word in dict.fromkeys(candidates) if word != right]
    n_wrong = min(len(wrong), rng.randint(1, most - 1))
    choices = [right] + rng.sample(wrong, n_wrong)
    rng.shuffle(choices)
    return choices, choices.index(right)


def picture_problem(subject: str, scene: Scene, rng: random.Random) -> dict:
    t = rng.choice(scene)
    if subject == "natural science":
        questions = f"What colour is the thing at the {t.place}?", f"What colour do you see at the {t.place}?"
        right, candidates, lecture = t.colour, COLOURS, "We see things by the light that they reflect."
        solution = f"The {t.shape} at the {t.place} is {t.colour}."
    elif subject == "social science":
        questions = f"Look at the map. Where is the {t.name}?", f"In which part of the map is the {t.name}?"
        right, candidates, lecture = t.place, PLACES, "A map shows where things are."
        solution = f"The {t.name} is at the {t.place}."
    else:
        questions = f"Which word names the thing at the {t.place}?", f"Which noun names the thing at the {t.place}?"
        right, candidates, lecture = t.shape, SHAPES, "A noun names a thing."
        solution = f"At the {t.place} there is a {t.shape}."
    question = rng.choice(questions)
    choices, answer = options(rng, right, candidates)
    hint = rng.choice(("", "", "The picture shows a few things."))
    return dict(question=question, choices=choices, answer=answer, hint=hint, lecture=lecture, solution=solution)


def text_problems(subject: str, rng: random.Random, n: int = 3) -> list[dict]:
    """n problems with one hint, a text of n facts that answers them all."""
    firsts, seconds, fact, questions, lecture = TEXT_PROBLEMS[subject]
    pairs = list(zip(rng.sample(firsts, n), rng.sample(seconds, n)))
    hint = " ".join(fact.format(*pair) for pair in pairs)
    problems = []
    for pair in rng.sample(pairs, n):
        question = rng.choice(questions)
        if "{1}" in question:  # names the second word and asks for the first
            asked, solution = 0, "You buy {1} from {0}."
        else:
            asked, solution = 1, fact
        choices, answer = options(rng, pair[asked], [p[asked] for p in pairs], most=3)
        problems.append(dict(question=question.format(*pair), choices=choices, answer=answer, hint=hint,
                             lecture=lecture, solution=solution.format(*pair)))  # fmt: skip
    return problems


def fact_problem(subject: str, rng: random.Random) -> dict:
    answers, questions, solution, lecture = FACT_PROBLEMS[subject]
    word = rng.choice(list(answers))
    choices, answer = options(rng, answers[word], answers.values())
    question = rng.choice(questions).format(word)
    solution = solution.format(word, answers[word], a(answers[word]))
    return dict(question=question, choices=choices, answer=answer, hint="", lecture=lecture, solution=solution)


def quiz_problem(rng: random.Random, held_out: bool = False) -> tuple[dict, Scene | None]:
    """A problem that needs its picture, its hint or general knowledge, and the scene of its picture."""
    subject = rng.choice(SUBJECTS)
    kind = rng.choice(("picture", "picture", "text", "fact"))
    scene = None
    if kind == "picture":
        scene = draw_scene(rng, held_out)
        problem = picture_problem(subject, scene, rng)
    elif kind == "text":
        problem = text_problems(subject, rng)[0]
    else:
        problem = fact_problem(subject, rng)
    problem |= dict(image="image.png" if scene else None, task="closed choice", grade=f"grade{rng.randint(1, 12)}",
                    subject=subject, topic=subject.split()[0], category=kind, skill=f"{subject}: {kind}")  # fmt: skip
    return problem, scene


# --- the data in the published formats


def data_of(name: str) -> tuple[list[Path], Path]:
    """The data files and the folder of pictures, in FOLDER, of a run with this name (a key of SETTINGS)."""
    folder = Path(os.path.relpath(FOLDER))  # shorter to print
    if name == "scienceqa":
        return [folder / "scienceqa"], folder / "scienceqa"
    files = ["captions"] if name == "stage1" else KINDS
    return [folder / f"{file}.json" for file in files], folder / "images"


def prepare(folder: Path | None = None):
    """Draws the data into `folder` (default: FOLDER), unless it already holds the data of this recipe:

        captions.json                  [{"image", "caption"}, ...], for stage 1
        conversation.json, detail.json, reasoning.json     LLaVA JSON about the same pictures, for the chatbot
        heldout.json                   held-out scenes: [{"image", "scene", "caption", "questions"}, ...]; the questions
                                       make a conversation
        images/                        train-*.png of the files above, test-*.png of heldout.json
        scienceqa/                     problems.json, pid_splits.json, images/{split}/{id}/image.png
        recipe.json                    the constants that the data depends on

    The folder appears under its name only when it is complete. Raises UserError if `folder` holds other files, or if
    the data cannot be written.
    """
    folder = Path(folder or FOLDER)
    recipe = json.dumps(dict(recipe=RECIPE, seed=SEED, captioned=CAPTIONED, held_out=HELD_OUT, quiz=QUIZ))
    if folder.exists():
        drawn = folder / "recipe.json"
        if drawn.is_file() and drawn.read_text(encoding="utf-8") == recipe:
            return
        if not folder.is_dir() or (any(folder.iterdir()) and not drawn.is_file()):
            raise UserError(f"{folder}: exists and holds no data of the demo; name a new folder, or move this one away")
    partial = folder.with_name(folder.name + ".partial")
    rng = random.Random(f"data {SEED}")
    total = CAPTIONED + HELD_OUT + sum(QUIZ.values())
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "images").mkdir(parents=True)
        with progress_bar(total=total, desc="drawing the demo's data") as bar:
            write_training_data(partial, rng, bar.update)
            write_held_out(partial, rng, bar.update)
            write_quiz(partial / "scienceqa", rng, bar.update)
        (partial / "recipe.json").write_text(recipe, encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise write_error(folder, error) from None


def write_training_data(folder: Path, rng: random.Random, progress: Callable[[], object]):
    """CAPTIONED pictures, each with a caption and one conversation of each kind."""
    records = {name: [] for name in ("captions", *KINDS)}
    for i in range(CAPTIONED):
        scene, image = draw_scene(rng), f"train-{i:05}.png"
        draw_picture(scene, rng).save(folder / "images" / image)
        records["captions"].append({"image": image, "caption": caption(scene, rng)})
        for kind in KINDS:
            messages = with_picture(messages_of(conversation(scene, draw_kinds(kind, rng), rng)), rng)
            roles = ("human", "gpt") * len(messages)
            values = [{"from": role, "value": text} for role, text in zip(roles, messages)]
            records[kind].append({"id": f"{kind}-{i:05}", "image": image, "conversations": values})
        progress()
    for name, rows in records.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=0), encoding="utf-8")


def write_held_out(folder: Path, rng: random.Random, progress: Callable[[], object]):
    """HELD_OUT different scenes, each with its picture, a caption and a conversation of QUESTIONS turns."""
    scenes = {}  # a dict keeps their order
    while len(scenes) < HELD_OUT:
        scenes[draw_scene(rng, held_out=True)] = None
    records = []
    for i, scene in enumerate(scenes):
        image = f"test-{i:05}.png"
        draw_picture(scene, rng).save(folder / "images" / image)
        turns: list[Turn] = []
        while len(turns) < QUESTIONS:
            turns = conversation(scene, rng.choices(KINDS, FREQUENCIES, k=QUESTIONS), rng)
        questions = [{"question": turn.question, "answer": turn.answer} for turn in turns]
        things = [vars(t) for t in scene]
        records.append({"image": image, "scene": things, "caption": caption(scene, rng), "questions": questions})
        progress()
    (folder / "heldout.json").write_text(json.dumps(records, indent=0), encoding="utf-8")


def write_quiz(folder: Path, rng: random.Random, progress: Callable[[], object]):
    """The splits of QUIZ as a ScienceQA folder. Only the training split shows scenes that are not held out."""
    folder.mkdir()
    problems, splits = {}, {split: [] for split in QUIZ}
    for split, count in QUIZ.items():
        for _ in range(count):
            id = str(len(problems) + 1)
            problem, scene = quiz_problem(rng, held_out=split != "train")
            problems[id] = problem | {"split": split}
            splits[split].append(id)
            if scene:
                path = folder / "images" / split / id / "image.png"
                path.parent.mkdir(parents=True)
                draw_picture(scene, rng).save(path)
            progress()
    (folder / "problems.json").write_text(json.dumps(problems, indent=0), encoding="utf-8")
    (folder / "pid_splits.json").write_text(json.dumps(splits), encoding="utf-8")


# --- for chat.py and train.py


def default_run() -> Path:
    """The run that a chat takes without --model: runs/chat, or if it is absent the chatbot beside this file."""
    run = Path("runs/chat")
    if run.exists() or not CHAT.exists():
        return run
    shipped = Path(os.path.relpath(CHAT))
    if is_process_0():
        print(f"{run} is absent; this is {shipped}, trained on the demo; to train one: torchrun train.py "
              "--stage 1, then --stage 2", file=sys.stderr)  # fmt: skip
    return shipped


def begin(args: argparse.Namespace):
    """Completes the arguments of train.py for a run of the demo. Process 0 draws the data if it is missing.

    args.name is a key of SETTINGS; args.init_from is a run directory, None, or "none" for stage 2 without stage 1.
    """
    from distributed import by_process_0

    if args.stage == 2 and args.init_from is None:
        args.init_from = "runs/stage1"
    if args.init_from in (None, "none"):
        args.llama, args.vision, args.init_from = LLAMA, VISION, None
    args.data, args.images = data_of(args.name)
    overridden = {name: value for name, value in SETTINGS[args.name].items() if getattr(args, name) is None}
    for name, value in overridden.items():
        setattr(args, name, value)
    if overridden and is_process_0():
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in overridden.items())
        print(f"demo: {flags} override the paper's settings, which are for a larger model")
    by_process_0(prepare)
    if args.name in EXAM and is_process_0():
        print(f"demo: after the last step, {EXAM[args.name]}")


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder for the data")
    prepare(parser.parse_args().folder)


if __name__ == "__main__":
    run_command(main)
