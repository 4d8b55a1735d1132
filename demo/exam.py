"""The exam of the demo: questions about held-out scenes, the share of right answers, and the tables that report it.

A run of stage 1 captions every held-out scene. A chatbot answers three questions about each, in one conversation that
holds its own earlier answers. Each is asked before and after its training, and then with the pictures swapped, which
shows how much a model can guess.

    python -m demo.exam               # prints the tables of all finished runs of the demo in runs/
    python -m demo.exam runs/chat     # of one run
"""

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python demo/exam.py`

from checkpoint import build, load_llama, load_run, load_vision, open_run
from common import ArgumentParser, UserError, is_process_0, progress_bar, read_json, run_command, write_json
from conversation import IMAGE
from data import REQUESTS, Encoder, Example
from demo import world
from demo.world import ATTRIBUTES, COLOURS, PLACES, SHAPES, SIZES, Scene, Thing
from eval_scienceqa import CATEGORIES, ask, categories
from formats.pictures import Pictures
from model import LLaVA

BATCH_SIZE = 75  # questions that the model answers at once
MAX_NEW_TOKENS = 80  # of an answer
MAX_NAMED = 6  # the score tries all pairings of the first things that a caption names, up to this number
QUIZ_FILES = ("answers_test.json", "answers_test_swapped.json")  # eval_scienceqa.py writes them into a run of the quiz
COLUMN_WIDTHS = {"size": 6, "colour": 8, "shape": 7, "place": 7, "all": 7}  # of the table about captions


@dataclass(frozen=True)
class HeldOut:
    """A scene that no training data shows, with its picture, a true caption, and a conversation."""

    image: Path
    scene: Scene
    caption: str
    questions: list[tuple[str, str]]


def read_held_out(folder: Path) -> list[HeldOut]:
    """The held-out scenes of the data that `world.prepare` wrote into `folder`."""
    held_out = []
    for record in read_json(folder / "heldout.json", list):
        scene = tuple(Thing(**thing) for thing in record["scene"])
        questions = [(q["question"], q["answer"]) for q in record["questions"]]
        held_out.append(HeldOut(folder / "images" / record["image"], scene, record["caption"], questions))
    return held_out


def conversations(name: str, held_out: list[HeldOut], shift: int = 0) -> list[tuple[str, list[str]]]:
    """(picture, questions) of each scene for a run with this name, "stage1" or "chat".

    shift: each question shows the picture of the scene that follows `shift` places later; 0 = its own picture.
    """
    return [(shown.image.name, [REQUESTS[0]] if name == "stage1" else [question for question, _ in scene.questions])
            for scene, shown in zip(held_out, held_out[shift:] + held_out[:shift])]  # fmt: skip


def answer(model: LLaVA, encoder: Encoder, asked: list[tuple[str, list[str]]], progress: Callable) -> list[str]:
    """The model's answers, conversation after conversation. Each question comes after the model's own answers.

    asked: (picture, questions) of each conversation, all with the same number of questions. progress: is called with
    the number of new answers after each batch.
    """
    chats = [Example(image, [], image) for image, _ in asked]
    for turn in range(len(asked[0][1])):
        for chat, (_, questions) in zip(chats, asked):
            chat.turns.append(questions[turn] if turn else f"{IMAGE}\n{questions[0]}")
        for i in range(0, len(chats), BATCH_SIZE):
            batch = chats[i : i + BATCH_SIZE]
            for chat, text in zip(batch, ask(model, encoder, batch, MAX_NEW_TOKENS)):
                chat.turns.append(text)
            progress(len(batch))
    return [text for chat in chats for text in chat.turns[1::2]]


# --- the score of a caption


def any_of(words: Iterable[str]) -> str:
    """A group that matches one of the words. The longest come first: `top-left` before `top`."""
    return "(" + "|".join(sorted(words, key=len, reverse=True)) + ")"


PHRASE = re.compile(
    rf"(?:at the {any_of(PLACES)} )?an? {any_of(SIZES)} {any_of(COLOURS)} {any_of(SHAPES)}(?: at the {any_of(PLACES)})?"
)


def read_caption(text: str) -> list[tuple]:
    """(size, colour, shape, place or None) of each thing that a caption names."""
    return [(size, colour, shape, after or before or None)
            for before, size, colour, shape, after in PHRASE.findall(text)]  # fmt: skip


def caption_score(text: str, scene: Scene) -> dict[str, float]:
    """The share of a scene's attributes that a caption names right, between 0 and 1.

    Compares named and true things in the pairing with the most hits. Divides the hits of each attribute by the larger
    of the two numbers of things, so a missing thing and an invented one both count as wrong.
    """
    named = read_caption(text)
    truth: list[tuple] = [(t.size, t.colour, t.shape, t.place) for t in scene]
    n = max(len(named), len(truth))
    fewer, more = named[:MAX_NAMED], truth
    if len(fewer) > len(more):
        fewer, more = more, fewer
    best = [0] * len(ATTRIBUTES)
    for arrangement in itertools.permutations(more, len(fewer)):
        pairs = list(zip(fewer, arrangement))
        hits = [sum(a[i] == b[i] for a, b in pairs) for i in range(len(ATTRIBUTES))]
        if sum(hits) > sum(best):
            best = hits
    return {attribute: hits / n for attribute, hits in zip(ATTRIBUTES, best)}


def mean_caption_score(captions: list[str], scenes: list[Scene]) -> dict[str, float]:
    """The mean of `caption_score` over scenes, for each attribute, and under "all" over the four attributes."""
    scores = [caption_score(text, scene) for text, scene in zip(captions, scenes, strict=True)]
    mean = {attribute: sum(s[attribute] for s in scores) / len(scores) for attribute in ATTRIBUTES}
    return mean | {"all": sum(mean.values()) / len(mean)}


# --- the reports


def caption_report(before: list[str], after: list[str], swapped: list[str], held_out: list[HeldOut],
                   n_samples: int = 4) -> str:  # fmt: skip
    """The table for stage 1, below a few captions.

    before, after: captions of each held-out picture by the untrained and the trained W. swapped: captions by the
    trained W of the next scene's picture. The row of chance scores true captions of other scenes.
    """
    scenes = [h.scene for h in held_out]
    truths = [h.caption for h in held_out]
    # Every seventh shift is enough for the mean.
    chance = [mean_caption_score(truths[i:] + truths[:i], scenes) for i in range(1, len(truths), 7)]
    rows = {
        "W untrained": mean_caption_score(before, scenes),
        "W trained": mean_caption_score(after, scenes),
        "W trained, another scene's picture": mean_caption_score(swapped, scenes),
        "chance: other scenes' true captions": {k: sum(c[k] for c in chance) / len(chance) for k in COLUMN_WIDTHS},
    }
    lines = []
    for h, untrained, trained in list(zip(held_out, before, after))[:n_samples]:
        untrained = " ".join(untrained.split())[:100]
        lines += [h.image.name, f"  truth   {h.caption}", f"  before  {untrained}", f"  after   {trained}"]
    lines += ["", f"{f'% named right, {len(scenes)} held-out scenes':46}  size  colour  shape  place    all"]
    for name, row in rows.items():
        cells = [f"{100 * row[column]:{width}.1f}" for column, width in COLUMN_WIDTHS.items()]
        lines.append(f"  {name:44}" + "".join(cells))
    return "\n".join(lines)


def chat_report(before: list[str], after: list[str], swapped: list[str], held_out: list[HeldOut],
                n_samples: int = 6) -> str:  # fmt: skip
    """The table for the chatbot, below a few answers. An answer is right if it equals the true one.

    before, after, swapped: answers to the conversations of all scenes. The row of chance compares the true answers of
    different scenes to the same question, so questions that many scenes share dominate it.
    """
    asked = [(h.image.name, question, truth) for h in held_out for question, truth in h.questions]
    true_answers = {}  # of all scenes, by question
    for h in held_out:
        for question, truth in h.questions:
            true_answers.setdefault(question, []).append(truth)
    chance = []
    for _, question, truth in asked:
        others = true_answers[question].copy()
        others.remove(truth)  # this scene's own
        chance += [other == truth for other in others]
    answers = {"before stage 2": before, "after": after, "after, another scene's picture": swapped}
    rows = {name: [text == truth for text, (_, _, truth) in zip(texts, asked, strict=True)]
            for name, texts in answers.items()}  # fmt: skip
    rows["chance: other scenes' true answers"] = chance
    lines = []
    for (image, question, truth), text in list(zip(asked, after))[:n_samples]:
        lines.append(f"{image}  {question}\n  truth {truth}  after {text}")
    lines += ["", f"% of {len(asked)} questions about held-out scenes right"]
    for name, right in rows.items():
        lines.append(f"  {name:44}{100 * sum(right) / max(1, len(right)):6.1f}")
    for turn in range(world.QUESTIONS):
        right = rows["after"][turn :: world.QUESTIONS]
        lines.append(f"  {f'after, question {turn + 1}':44}{100 * sum(right) / len(right):6.1f}")
    return "\n".join(lines)


def quiz_report(scores: dict[str, dict]) -> str:
    """The table for the quiz: one row for each evaluation's scores, by category, and one for random choices."""
    problems = read_json(world.FOLDER / "scienceqa" / "problems.json", dict).values()
    chance = {}
    for name in CATEGORIES:
        shares = [100 / len(p["choices"]) for p in problems if p["split"] == "test" and name in categories(p)]
        chance[name] = sum(shares) / max(1, len(shares))
    lines = [f"{'% of the science quiz right':32}" + "".join(f"{name:>7}" for name in CATEGORIES)]
    for name, row in {**scores, "chance: a choice at random": chance}.items():
        cells = ["-" if value is None else f"{value:.1f}" for value in row.values()]
        lines.append(f"  {name:30}" + "".join(f"{cell:>7}" for cell in cells))
    return "\n".join(lines)


def report(run: Path) -> str:
    """The table of a run of the demo, from the answers in its directory. Raises UserError if it holds no answers."""
    if (run / "exam.json").is_file():
        answers = read_json(run / "exam.json", dict)
        write = {"stage1": caption_report, "chat": chat_report}[answers["name"]]
        return write(answers["before"], answers["after"], answers["swapped"], read_held_out(world.FOLDER))
    scores = {name: read_json(run / name, dict).get("scores") for name in QUIZ_FILES if (run / name).is_file()}
    if not scores or None in scores.values():
        raise UserError(f"{run}: holds no answers of the demo; train it to its end (train.py without paths), and for "
                        "the quiz run eval_scienceqa.py")  # fmt: skip
    return quiz_report(scores)


# --- for train.py


def model_before(args: argparse.Namespace, dtype: torch.dtype) -> LLaVA:
    """The model that the run started from. `build` draws the same untrained W from the same seed."""
    if args.init_from:
        return load_run(args.init_from, dtype)[0]
    return build(load_llama(world.LLAMA, dtype), load_vision(world.VISION, dtype=dtype), seed=args.seed)


def finish(args: argparse.Namespace):
    """Examines a finished run of the demo with train.py's arguments: writes exam.json and prints its table.

    Only process 0 works; in the others it returns at once. The quiz has its own program, eval_scienceqa.py.
    """
    if not is_process_0():
        return
    if args.name == "scienceqa":
        return
    print(f"the exam: {world.EXAM[args.name]}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained, sp, config, autocast = open_run(args.out, device, "torchrun train.py")
    dtype = torch.bfloat16 if config["precision"] == "bf16" else torch.float32
    untrained = model_before(args, dtype).to(device)
    vit = trained.vision.config
    encoder = Encoder(sp, vit.n_patches, vit.image_size, Pictures(world.FOLDER / "images"), args.max_length)
    held_out = read_held_out(world.FOLDER)
    asked = conversations(args.name, held_out)
    swapped = conversations(args.name, held_out, shift=1)
    answers: dict = {"name": args.name}
    total = 3 * sum(len(questions) for _, questions in asked)
    with progress_bar(total=total, desc="exam", unit="answer") as bar, autocast:
        answers["before"] = answer(untrained, encoder, asked, bar.update)
        answers["after"] = answer(trained, encoder, asked, bar.update)
        answers["swapped"] = answer(trained, encoder, swapped, bar.update)
    write_json(args.out / "exam.json", answers)
    print("\n" + report(args.out))


def is_examined(run: Path) -> bool:
    """True if a run of the demo has answers. eval_scienceqa.py gives those to other data the same names."""
    answered = any((run / name).is_file() for name in ("exam.json", *QUIZ_FILES))
    if not answered or not (run / "config.json").is_file():
        return False
    settings = read_json(run / "config.json", dict).get("settings")
    return isinstance(settings, dict) and bool(settings.get("demo"))


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run directories (default: all in runs/)")
    runs = parser.parse_args().runs or sorted(filter(is_examined, Path("runs").glob("*")))
    if not runs:
        raise UserError("runs: holds no finished run of the demo; first: torchrun train.py --stage 1")
    world.prepare()  # the reports read the held-out scenes
    for run in runs:
        print(f"--- {run}\n{report(run)}\n")


if __name__ == "__main__":
    run_command(main)
