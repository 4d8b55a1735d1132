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
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from common import HelpFormatter, UserError, append_lines, read_json, replacing, run_command, write_json
from conversation import STOP, TEMPLATE, stop_ids, surface, tokenize
from data import LETTERS, SCIENCEQA_PROMPT, Encoder, Example, Pictures, ScienceQA, scienceqa_question
from distributed import by_process_0, gathered, processes
from model import LLaVA

CATEGORIES = {  # the columns of the paper's table; a question counts in several
    "NAT": "natural science", "SOC": "social science", "LAN": "language science",
    "TXT": "with a text as context", "IMG": "with a picture as context", "NO": "without context",
    "G1-6": "grades 1 to 6", "G7-12": "grades 7 to 12", "Avg": "all questions",
}  # fmt: skip
TRAINED_BY = "torchrun train.py --stage 2 --task scienceqa"


# --- answers


def ask(model: LLaVA, encode: Encoder, prompts: list[Example], max_new_tokens: int = 64, batch_size: int = 32,
        progress: Callable[[int], None] | None = None) -> list[str]:  # fmt: skip
    """The model's greedy answers to prompts, each ending with a human's turn, `batch_size` at a time.

    progress: called with the number of prompts after each batch.
    """
    device, stop, answers = model.projector.weight.device, stop_ids(encode.sp), []
    for i in range(0, len(prompts), batch_size):
        batch = encode.stream([encode(prompt) for prompt in prompts[i : i + batch_size]])
        ids, _, borders, pixels = batch.to(device)
        for answer in model.answers(ids, borders, pixels, stop, max_new_tokens):
            text, _, _ = surface(encode.sp, answer).partition(STOP)  # which may be spelled in other pieces
            answers.append(text.strip())
        if progress:
            progress(len(borders) - 1)
    return answers


# --- the score


def letter(text: str, n_choices: int) -> int:
    """The index of the choice that an answer names; -1 if it names none, several, or one that is not offered.

    As the original scores: the whole answer is a letter, or it begins `B. `, or it says once `The answer is B.`

    >>> letter("It swims. The answer is B.", 4), letter("B", 4), letter("B. A fish.", 4), letter("The answer is E.", 4)
    (1, 1, 1, -1)
    """
    found = re.fullmatch(r"\s*([A-Z])\s*", text) or re.match(r"\s*([A-Z])\. ", text)
    letters = [found[1]] if found else re.findall(r"The answer is ([A-Z])\.", text)
    index = LETTERS.index(letters[0]) if len(letters) == 1 else -1
    return index if index < n_choices else -1


def categories(problem: dict) -> list[str]:
    """The columns in which a problem of problems.json counts."""
    names = [name for name in ("NAT", "SOC", "LAN") if CATEGORIES[name] == problem.get("subject")]
    if problem["hint"]:
        names.append("TXT")
    if problem["image"]:
        names.append("IMG")
    if not problem["hint"] and not problem["image"]:
        names.append("NO")
    grade = re.fullmatch(r"grade(\d{1,2})", str(problem.get("grade")))
    if grade and 1 <= int(grade[1]) <= 12:
        names.append("G1-6" if int(grade[1]) <= 6 else "G7-12")
    return [*names, "Avg"]


def score(problems: list[dict], outputs: dict[str, str]) -> dict:
    """The content of the JSON file, from the text of each answer. A problem without an answer counts as unparsed.

    scores: percent, None for a category without questions. results: the index of the chosen answer, or -1.
    """
    results = {p["id"]: letter(outputs[p["id"]], len(p["choices"])) if p["id"] in outputs else -1 for p in problems}
    correct, count = dict.fromkeys(CATEGORIES, 0), dict.fromkeys(CATEGORIES, 0)
    for problem in problems:
        for name in categories(problem):
            count[name] += 1
            correct[name] += results[problem["id"]] == problem["answer"]
    scores = {name: 100 * correct[name] / count[name] if count[name] else None for name in CATEGORIES}
    unparsed = sum(index < 0 for index in results.values())
    return dict(acc=scores["Avg"], correct=correct["Avg"], count=count["Avg"], unparsed=unparsed, scores=scores,
                results=results, outputs={id: outputs[id] for id in results if id in outputs})  # fmt: skip


def table(problems: list[dict], result: dict) -> str:
    count = {name: sum(name in categories(p) for p in problems) for name in CATEGORIES}
    percents = ["-" if value is None else f"{value:.2f}" for value in result["scores"].values()]
    rows = [["", *CATEGORIES], ["% right", *percents], ["questions", *map(str, count.values())]]
    lines = [f"{row[0]:9}" + "".join(f"{cell:>8}" for cell in row[1:]) for row in rows]
    lines.append(f"{result['correct']} of {result['count']} right; {result['unparsed']} unparsed (they name no choice, "
                 "or several, and count as wrong)")  # fmt: skip
    if absent := result["count"] - len(result["outputs"]):
        lines.append(f"{absent} questions have no answer and count as unparsed")
    return "\n".join(lines)


def read_predictions(path: Path) -> dict[str, str]:
    """{id: text}, or the file that this program or the original wrote: {"outputs": {id: text}, ...}."""
    predictions = read_json(path, dict)
    outputs = predictions["outputs"] if isinstance(predictions.get("outputs"), dict) else predictions
    for id, text in outputs.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: the answer to {id!r:.80} is {json.dumps(text)[:60]}; expected its text (the file "
                            'is {id: text}, or {"outputs": {id: text}})')  # fmt: skip
    return {id: text.encode("utf-8", "replace").decode() for id, text in outputs.items()}  # no lone surrogates


# --- an evaluation, which may be interrupted


def answer(a: argparse.Namespace, problems: list[dict], rank: int, world: int,
           device: torch.device) -> tuple[dict[str, str], str]:  # fmt: skip
    """The model's answers {id: text}, and a description of the model. All processes take part.

    The split is cut into the same batches whatever the number of processes, so the answers do not depend on it.
    """
    expected = dict(template=TEMPLATE, prompt=SCIENCEQA_PROMPT, stage=2)
    config, model, sp, autocast = checkpoint.open_run(a.model, device, TRAINED_BY, **expected)
    encode = Encoder(sp, model.vision.config.n_patches, model.vision.config.image_size, Pictures(a.data))
    prompts = [Example(p["id"], [scienceqa_question(p)], p["image_path"]) for p in problems]
    lengths = {p.id: len(tokenize(sp, p.turns, encode.n_patches if p.image else 0)[0]) for p in prompts}
    prompts.sort(key=lambda p: (-lengths[p.id], p.id))  # similar lengths together, the longest first

    parts = f"{a.out.stem}.{fingerprint(a, problems)}.part"  # the start of the names of the processes' files
    own = a.out.with_name(f"{parts}{rank}.jsonl")
    append_lines(own, [""])  # ends a line that a kill cut off; fails now if the file cannot be written
    outputs = by_process_0(lambda: earlier_answers(a.out.parent, parts))
    if outputs and rank == 0:
        print(f"{len(outputs)} of {len(problems)} questions were answered before; continuing with the others")
    batches = [prompts[i : i + a.batch_size] for i in range(0, len(prompts), a.batch_size)]
    batches = [todo for batch in batches if (todo := [p for p in batch if p.id not in outputs])]
    lines, bar = [], tqdm(total=len(problems), initial=len(outputs), unit="question", disable=rank != 0)
    with autocast, torch.inference_mode():
        for i in range(rank, len(batches), world):
            try:
                texts = ask(model, encode, batches[i], a.max_new_tokens, a.batch_size)
            except ValueError as error:
                raise UserError(f"{a.data}: {error}; download it again") from None
            except torch.OutOfMemoryError:
                raise UserError(f"out of memory with {len(batches[i])} questions at once; lower --batch-size") from None
            new = [json.dumps([p.id, text]) for p, text in zip(batches[i], texts)]
            append_lines(own, new)
            lines += new
            bar.update(sum(map(len, batches[i : i + world])))  # the other processes are about as far
    bar.close()
    outputs |= dict(json.loads(line) for line in gathered(lines))
    task = config.get("settings", {}).get("task", "an unknown task")
    return outputs, (f"trained for {task}: {TEMPLATE}, {SCIENCEQA_PROMPT}, ViT layer {model.vision.feature_layer}, "
                     f"pictures of {encode.image_size} px")  # fmt: skip


def fingerprint(a: argparse.Namespace, problems: list[dict]) -> str:
    """A checksum of what the answers depend on. W stands for the model, all of which trained together with it."""
    asked = [[p["id"], scienceqa_question(p), p["image_path"]] for p in problems]
    parts = [a.max_new_tokens, asked, checkpoint.checksum(a.model / "projector.pth")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def earlier_answers(folder: Path, parts: str) -> dict[str, str]:
    """The answers {id: text} that the processes of an interrupted evaluation left in files that start with `parts`."""
    outputs = {}
    for path in (path for path in folder.iterdir() if path.name.startswith(parts)):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a line that was cut off
                outputs.update([json.loads(line)])
    return outputs


# --- the command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, metavar="RUN", default=Path("runs/scienceqa"), help="a run directory of stage 2")
    add("--data", type=Path, metavar="DIR", help="ScienceQA's folder: problems.json, ... (default: the demo's)")
    add("--split", metavar="NAME", default="test", help="of pid_splits.json: test, val, minitest, ...")
    add("--batch-size", type=int, default=32, help="questions that a process answers at once")
    add("--max-new-tokens", type=int, default=1024, help="tokens after which an answer is cut")
    add("--out", type=Path, metavar="FILE", help="the JSON to write, beside it the page, .html "
        "(default: RUN/answers_SPLIT.json, or answers_SPLIT_swapped.json; PREDICTIONS_scored.json)")  # fmt: skip
    add("--predictions", type=Path, metavar="FILE", help="score these answers, {id: text} as JSON; loads no model")
    add("--missing-pictures-as-text", action="store_true", help="ask problems without their absent pictures")
    add("--swap-pictures", action="store_true", help="show each problem the picture of the next one that has one: the "
        "share that is still right did not need to be seen")  # fmt: skip
    a = parser.parse_args(argv)
    if a.batch_size < 1 or a.max_new_tokens < 1:
        raise UserError("--batch-size and --max-new-tokens must be 1 or more")
    if a.predictions and a.swap_pictures:
        raise UserError("--swap-pictures asks a model, --predictions loads none; leave one out")
    if a.data and not a.data.is_dir():
        raise UserError(f"{a.data}: no such folder; --data takes ScienceQA's (problems.json, pid_splits.json, images/)")
    if a.out is None and a.predictions:
        a.out = a.predictions.with_name(a.predictions.stem + "_scored.json")
    name = "answers_" + re.sub("[^A-Za-z0-9_-]", "_", a.split) + ("_swapped" if a.swap_pictures else "")
    a.out = a.out or a.model / f"{name}.json"
    if a.out.suffix == ".html" or a.out.is_dir():
        raise UserError(f"--out {a.out}: must name the JSON file; the page is written beside it as .html")
    if a.predictions and a.out.resolve() == a.predictions.resolve():
        raise UserError(f"--out {a.out}: the file of --predictions; name another")
    refuse_to_overwrite(a.out)
    return a


def refuse_to_overwrite(out: Path):
    """Raises UserError unless --out is new, or an earlier evaluation and its page."""
    earlier = out.exists() and {"scores", "results"} <= read_json(out, dict).keys()
    for path in (out, out.with_suffix(".html")):
        if path.exists() and not earlier:
            raise UserError(f"{path}: exists and is no earlier evaluation; give another --out")


def swap_pictures(problems: list[dict]):
    """Gives each problem with a picture the picture of the next one."""
    shown = [p for p in problems if p["image_path"]]
    paths = [p["image_path"] for p in shown]
    for problem, path in zip(shown, paths[1:] + paths[:1]):
        problem["image_path"] = path


def evaluate(a: argparse.Namespace, rank: int, world: int, device: torch.device):
    if a.data is None:
        from demo.world import FOLDER, prepare

        by_process_0(prepare)
        a.data = FOLDER / "scienceqa"
    split = ScienceQA(a.data, a.split, "text" if a.missing_pictures_as_text or a.predictions else "refuse")
    problems = list({p["id"]: p for p in split.records}.values())  # a split may name a problem twice
    if a.swap_pictures:
        swap_pictures(problems)
    if a.predictions:
        outputs, about = read_predictions(a.predictions), f"answers of {a.predictions}"
        unknown = outputs.keys() - {p["id"] for p in problems}
        if unknown and rank == 0:
            print(f"{len(unknown)} answers are not to questions of split {a.split}; they do not count")
    else:
        if split.missing and rank == 0:
            print(f"{len(split.missing)} pictures are absent; their problems are asked without one")
        outputs, about = answer(a, problems, rank, world, device)
        about = f"{a.model}, {about}" + (", each picture swapped for the next one" if a.swap_pictures else "")
    if rank != 0:
        return
    result, title = score(problems, outputs), f"ScienceQA, split {a.split}"
    about += f"; {a.data}" + (f", {len(split.missing)} pictures absent" if split.missing else "")
    print(f"\n{title}; {about}\n{table(problems, result)}")
    write_json(a.out, result)
    from tools.pages import evaluation_page

    with replacing(a.out.with_suffix(".html")) as file:
        file.write(evaluation_page(title, about, a.data, problems, result).encode())
    for path in [] if a.predictions else a.out.parent.iterdir():
        if re.fullmatch(re.escape(a.out.stem) + r"\.[0-9a-f]{16}\.part\d+\.jsonl", path.name):
            path.unlink()
    print(f"{a.out} and {a.out.with_suffix('.html')} are written")


def main():
    a = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun turns Ctrl-C into SIGTERM
    with processes() as (rank, world, device):
        try:
            evaluate(a, rank, world, device)
        except KeyboardInterrupt:
            if rank == 0:
                print(f"\nstopped; the answers so far are beside {a.out}, and the same command continues from them")
            raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    run_command(main)
