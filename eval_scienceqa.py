"""ScienceQA: answers a split, finds the letters, scores by category.

    python eval_scienceqa.py                                   # runs/scienceqa on the demo's test split
    torchrun --nproc_per_node 8 eval_scienceqa.py --model runs/scienceqa-13b --data ScienceQA/data/scienceqa
    python eval_scienceqa.py --predictions answers.json --data ScienceQA/data/scienceqa      # only scores them

Template, prompt form, feature layer and picture size come from the run directory, and no flag contradicts them. An
interrupted evaluation continues where it stopped when the same command is given again.
"""

import argparse
import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import checkpoint
from common import (
    ArgumentParser,
    UserError,
    append_lines,
    number,
    progress_bar,
    read_json,
    replacing,
    run_command,
    write_json,
)
from conversation import TEMPLATE, answer_text, has_ended, tokenize
from data import SCIENCEQA_PROMPT, Encoder, Example, scienceqa_question
from distributed import by_process_0, gathered, processes
from formats.pictures import Pictures
from formats.records import LETTERS, read_records, read_scienceqa
from model import LLaVA

CATEGORIES = {  # the columns of the paper's table; a question counts in several
    "NAT": "natural science", "SOC": "social science", "LAN": "language science",
    "TXT": "with a text as context", "IMG": "with a picture as context", "NO": "without context",
    "G1-6": "grades 1 to 6", "G7-12": "grades 7 to 12", "Avg": "all questions",
}  # fmt: skip
GRADES = [f"grade{i}" for i in range(1, 13)]
TRAINED_BY = "torchrun train.py --stage 2 --task scienceqa"


# --- answers, in an evaluation that may be interrupted


def ask(model: LLaVA, encoder: Encoder, prompts: list[Example], *sampling) -> list[str]:
    """The answers to one batch of prompts, each of which ends with a human's turn. sampling: as in `generate`."""
    batch = encoder.stream([encoder.encode(prompt) for prompt in prompts])
    ids, _, borders, pixels = batch.to(model.projector.weight.device)
    *_, answers = model.generate(ids, borders, pixels, partial(has_ended, encoder.sp), *sampling)
    return [answer_text(encoder.sp, answer) for answer in answers]


def answer_all(answers: dict[str, str], prompts: list[Example], keep: Callable[[dict[str, str]], object],
               batch_size: int, rank: int, world_size: int, model: LLaVA, encoder: Encoder, *sampling):  # fmt: skip
    """Adds the model's answers to `answers`, {id: text}, which may hold some from before. All processes take part.

    The prompts are cut into the same batches whatever the number of processes, so the answers do not depend on it.
    keep: stores the answers of a batch, so that an interrupted run can continue.
    """
    # Similar lengths together, the longest first: a lack of memory shows at once.
    prompts = sorted(prompts, key=lambda p: len(tokenize(encoder.sp, p.turns, encoder.n_patches if p.image else 0)[0]),
                     reverse=True)  # fmt: skip
    batches = [prompts[i : i + batch_size] for i in range(0, len(prompts), batch_size)]
    if answers and rank == 0:
        print(f"{len(answers)} of {len(prompts)} questions were answered before; continuing with the others")
    remaining = [batch for batch in batches if not answers.keys() >= {prompt.id for prompt in batch}]
    own: dict[str, str] = {}
    for batch in progress_bar(remaining[rank::world_size], "answering", unit="batch"):
        try:
            texts = ask(model, encoder, batch, *sampling)
        except ValueError as error:
            raise UserError(f"{error}; download it again, or correct its path") from None
        new = {prompt.id: text for prompt, text in zip(batch, texts)}
        keep(new)
        own |= new
    for part in gathered([json.dumps(own)]):
        answers |= json.loads(part)


def answer_split(args: argparse.Namespace, problems: list[dict], rank: int, world_size: int,
                 device: torch.device) -> tuple[dict[str, str], str]:  # fmt: skip
    """The model's answers {id: text}, and a description of the model. All processes take part.

    Each batch adds a line [key, {id: text}] to args.partial, from which an interrupted evaluation continues.
    """
    if rank == 0:
        print(f"loading {args.model}")
    expected = dict(template=TEMPLATE, prompt=SCIENCEQA_PROMPT, stage=2)
    model, sp, config, autocast = checkpoint.open_run(args.model, device, TRAINED_BY, **expected)
    task = config.get("settings", {}).get("task", "an unknown task")
    if task != "scienceqa" and rank == 0:
        print(f"{args.model} was trained for {task}, not for ScienceQA; train one with: {TRAINED_BY}")
    encoder = Encoder(sp, model.vision.config.n_patches, model.vision.config.image_size, Pictures(args.data))
    prompts = [Example(p["id"], [scienceqa_question(p)], p["image_path"]) for p in problems]
    key = partial_key(args, prompts)
    answers = by_process_0(lambda: earlier_answers(args.partial, key))
    with autocast:
        answer_all(answers, prompts, lambda new: append_lines(args.partial, [json.dumps([key, new])]), args.batch_size,
                   rank, world_size, model, encoder, args.max_new_tokens)  # fmt: skip
    return answers, (f"{args.model}, trained for {task}: {TEMPLATE}, {SCIENCEQA_PROMPT}, ViT layer "
                     f"{model.vision.feature_layer}, pictures of {encoder.image_size} px")  # fmt: skip


def partial_key(args: argparse.Namespace, prompts: list[Example]) -> str:
    """A checksum of what the answers depend on. W identifies the model, because it changes in every training."""
    settings = [TEMPLATE, prompts, args.max_new_tokens, checkpoint.checksum(args.model / "projector.pth")]
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def earlier_answers(partial: Path, key: str) -> dict[str, str]:
    """The answers {id: text} of an interrupted evaluation with this key."""
    append_lines(partial, [""])  # creates the file, or ends a line that a kill cut off
    answers = {}
    for line in partial.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):  # an empty line, or one that was cut off
            key_of_line, answers_of_batch = json.loads(line)
            if key_of_line == key:
                answers |= answers_of_batch
    return answers


# --- the score


def letter(text: str, n_choices: int) -> int:
    """The index of the choice that an answer names; -1 if it names none, several, or one that is not offered.

    The rule is that of the original's eval_science_qa.py. The answer is a letter, or it starts with `B. `, or the
    regular expression below matches once; its full stop matches any character. The first release had the expression
    only, and chose at random where this function returns -1.

    >>> letter("It swims. The answer is B.", 4), letter("B", 4), letter("The answer is Apple.", 4), letter("E", 4)
    (1, 1, 0, -1)
    """
    start = re.match(r"([A-E])(\. |\Z)", text)
    letters = [start[1]] if start else re.findall("The answer is ([A-Z]).", text)
    index = LETTERS.index(letters[0]) if len(letters) == 1 else -1
    return index if index < n_choices else -1


def categories(problem: dict) -> list[str]:
    """The columns in which a problem of problems.json counts."""
    subject, grade, hint, image = (problem.get(name) for name in ("subject", "grade", "hint", "image"))
    belongs = {name: subject == CATEGORIES[name] for name in ("NAT", "SOC", "LAN")}
    belongs |= {"TXT": hint, "IMG": image, "NO": not hint and not image}
    belongs |= {"G1-6": grade in GRADES[:6], "G7-12": grade in GRADES[6:], "Avg": True}
    return [name for name in CATEGORIES if belongs[name]]


def score(problems: list[dict], outputs: dict[str, str]) -> dict:
    """The content of the JSON file, from the text of each answer. A problem without an answer counts as unparsed.

    scores: percent, None for a category without questions. results: the index of the chosen answer, or -1.
    """
    results = {p["id"]: letter(outputs.get(p["id"], ""), len(p["choices"])) for p in problems}
    right: dict[str, list[bool]] = {name: [] for name in CATEGORIES}
    for problem in problems:
        for name in categories(problem):
            right[name].append(results[problem["id"]] == problem["answer"])
    scores = {name: 100 * sum(column) / len(column) if column else None for name, column in right.items()}
    return dict(acc=scores["Avg"], correct=sum(right["Avg"]), count=len(problems),
                unparsed=sum(index < 0 for index in results.values()), scores=scores, results=results,
                outputs={id: outputs[id] for id in results if id in outputs})  # fmt: skip


def table(problems: list[dict], result: dict) -> str:
    count = Counter(name for problem in problems for name in categories(problem))
    percents = ["-" if value is None else f"{value:.2f}" for value in result["scores"].values()]
    rows = {"": CATEGORIES, "% right": percents, "questions": [count[name] for name in CATEGORIES]}
    lines = [f"{name:9}" + "".join(f"{cell:>8}" for cell in row) for name, row in rows.items()]
    unparsed, absent = result["unparsed"], result["count"] - len(result["outputs"])
    lines.append(f"{result['correct']} of {result['count']} right; {unparsed} unparsed: {unparsed - absent} answers "
                 f"name no offered choice, {absent} questions have no answer")  # fmt: skip
    lines.append("the unparsed count as wrong; letters are found by the rule of the original's eval_science_qa.py")
    return "\n".join(lines)


# --- the command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", type=Path, metavar="RUN", default=Path("runs/scienceqa"), help="a run directory of stage 2")
    add("--data", type=Path, metavar="DIR", help="ScienceQA's folder: problems.json, ... (default: the demo's)")
    add("--split", metavar="NAME", default="test", help="a split of pid_splits.json: test, val, minitest, ...")
    add("--batch-size", type=number(1), default=32, help="questions that a process answers at once")
    add("--max-new-tokens", type=number(1), default=1024, help="most tokens of an answer")
    add("--out", type=Path, metavar="FILE", help="the JSON file to write; the page goes beside it as .html "
        "(default: RUN/answers_SPLIT.json, or answers_SPLIT_swapped.json; PREDICTIONS_scored.json)")  # fmt: skip
    add("--missing-pictures-as-text", action="store_true", help="ask problems with absent pictures as text")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--predictions", type=Path, metavar="FILE", help="load no model, score these answers: {id: text}, an "
        "earlier --out, or the original's JSON lines")  # fmt: skip
    add("--swap-pictures", action="store_true", help="show each problem the picture of the next one that has one: "
        "answers that are still right do not depend on the picture")  # fmt: skip
    args = parser.parse_args(argv)
    default = args.model / f"answers_{args.split}{'_swapped' if args.swap_pictures else ''}.json"
    if args.predictions:
        default = args.predictions.with_name(f"{args.predictions.stem}_scored.json")
    args.out = args.out or default
    args.page, args.partial = args.out.with_suffix(".html"), args.out.with_name(f"{args.out.name}.partial")
    is_earlier = args.out.exists() and {"scores", "results"} <= read_json(args.out, dict).keys()
    if args.out == args.page or (not is_earlier and (args.out.exists() or args.page.exists())):
        raise UserError(f"--out {args.out}: must name an earlier evaluation, or a new .json beside which no .html lies")
    return args


def read_predictions(path: Path) -> dict[str, str]:
    """{id: text} of a file with that content, with {"outputs": {id: text}, ...}, or with the original's JSON lines."""
    records = read_records(path)
    if len(records) > 1 or "question_id" in records[0]:
        outputs: dict = {str(record.get("question_id")): record.get("text") for record in records}
    else:
        outputs = records[0]["outputs"] if isinstance(records[0].get("outputs"), dict) else records[0]
    for id, text in outputs.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: the answer to {id!r:.80} is {text!r:.60}; expected {{id: text}}, or a line with "
                            "question_id and text for each answer")  # fmt: skip
    return outputs


def evaluate(args: argparse.Namespace, rank: int, world_size: int, device: torch.device):
    if args.data is None:
        from demo.world import data_of, prepare

        by_process_0(prepare)
        _, args.data = data_of("scienceqa")
    as_text = args.missing_pictures_as_text or args.predictions
    problems, absent = read_scienceqa(args.data, args.split, "text" if as_text else "refuse")
    problems = list({p["id"]: p for p in problems}.values())  # a split may name a problem twice
    if args.swap_pictures:
        shown = [p for p in problems if p["image_path"]]
        for problem, path in zip(shown, [p["image_path"] for p in shown[1:] + shown[:1]]):
            problem["image_path"] = path
    if args.predictions:
        outputs = read_predictions(args.predictions)
        unknown = len(outputs.keys() - {p["id"] for p in problems})
        if unknown == len(outputs):
            raise UserError(f"{args.predictions}: holds no answer to a question of {args.data}, split {args.split}")
        about = f"{len(outputs)} answers of {args.predictions}, {unknown} of them to no question of this split"
    else:
        outputs, about = answer_split(args, problems, rank, world_size, device)
    if rank != 0:
        return
    about += ", each picture swapped for the next one" if args.swap_pictures else ""
    about += f"; {args.data}" + (f", {len(absent)} pictures absent" if absent else "")
    result, title = score(problems, outputs), f"ScienceQA, split {args.split}"
    print(f"\n{title}; {about}\n{table(problems, result)}")
    write_json(args.out, result)
    from tools.pages import evaluation_page

    with replacing(args.page) as file:
        file.write(evaluation_page(title, about, args.data, problems, result).encode())
    args.partial.unlink(missing_ok=True)
    print(f"{args.out} and {args.page} are written")


def main():
    args = parse_arguments()
    with processes() as (rank, world_size, device):
        evaluate(args, rank, world_size, device)


if __name__ == "__main__":
    run_command(main)
