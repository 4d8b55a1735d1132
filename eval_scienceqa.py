"""ScienceQA: answers a split, finds the letters, scores by category, and writes a page to look at.

    python eval_scienceqa.py                                   # runs/scienceqa on the demo's test split
    torchrun --nproc_per_node 8 eval_scienceqa.py --model runs/scienceqa-13b --data ScienceQA/data/scienceqa
    python eval_scienceqa.py --predictions answers.json --data ScienceQA/data/scienceqa      # score only: no model

Template, prompt form, feature layer and the pictures' size are those that the run was trained with: they are read
from its directory, and no flag contradicts them. Interrupted, the same command goes on where it stopped.
"""

import argparse
import base64
import contextlib
import hashlib
import html
import json
import re
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import demo
from conversation import TEMPLATE, HelpForm, UserError, system_ids, tokenize
from data import LETTERS, SCIENCEQA_PROMPT, Encoder, Example, Pictures, ScienceQA, ask, scienceqa_question
from parallel import by_process_0, gathered, leave, start_processes
from vision import as_link, open_picture

CATEGORIES = {  # the columns of the paper's table; a question stands in several
    "NAT": "natural science", "SOC": "social science", "LAN": "language science",
    "TXT": "with a text as context", "IMG": "with a picture as context", "NO": "without context",
    "G1-6": "grades 1 to 6", "G7-12": "grades 7 to 12", "Avg": "all questions",
}  # fmt: skip
PAGE = Path(__file__).parent / "report.html"
NO_LIMIT = 10**9  # of positions: a question is never cut
TRAINED_BY = "torchrun train.py --stage 2 --task scienceqa"


# --- the score


def letter(text: str, n_choices: int) -> int:
    """The choice that an answer names, as an index; -1 if it names none, several, or one that is not offered.

    As the original scores: the whole answer is a letter; or it begins `B. `; or it says once `The answer is B.`

    >>> letter("It swims. The answer is B.", 4), letter("B", 4), letter("B. A fish.", 4), letter("The answer is E.", 4)
    (1, 1, 1, -1)
    """
    found = re.fullmatch(r"\s*([A-Z])\s*", text) or re.match(r"\s*([A-Z])\. ", text)
    letters = [found[1]] if found else re.findall(r"The answer is ([A-Z])\.", text)
    index = LETTERS.index(letters[0]) if len(letters) == 1 else -1
    return index if index < n_choices else -1


def categories(problem: dict) -> list[str]:
    """The columns that a problem of problems.json counts in."""
    subjects = [name for name in ("NAT", "SOC", "LAN") if CATEGORIES[name] == problem.get("subject")]
    context = ["TXT"] * bool(problem["hint"]) + ["IMG"] * bool(problem["image"])
    grade = re.fullmatch(r"grade(\d{1,2})", str(problem.get("grade")))
    grade = int(grade[1]) if grade else 0
    grades = ["G1-6"] * (1 <= grade <= 6) + ["G7-12"] * (7 <= grade <= 12)
    return subjects + (context or ["NO"]) + grades + ["Avg"]


def score(problems: list[dict], outputs: dict[str, str]) -> dict:
    """What is written as JSON, from the text of each answer; a problem without one counts as unparsed.

    scores are percents, None where a category has no question; results are the indices of the choices, or -1.
    """
    results = {p["id"]: letter(outputs[p["id"]], len(p["choices"])) if p["id"] in outputs else -1 for p in problems}
    right, asked = dict.fromkeys(CATEGORIES, 0), dict.fromkeys(CATEGORIES, 0)
    for problem in problems:
        for name in categories(problem):
            asked[name] += 1
            right[name] += results[problem["id"]] == problem["answer"]
    scores = {name: 100 * right[name] / asked[name] if asked[name] else None for name in CATEGORIES}
    unparsed = sum(index < 0 for index in results.values())
    return dict(acc=scores["Avg"], correct=right["Avg"], count=asked["Avg"], unparsed=unparsed, scores=scores,
                results=results, outputs={id: outputs[id] for id in results if id in outputs})  # fmt: skip


def table(problems: list[dict], result: dict) -> str:
    asked = {name: sum(name in categories(p) for p in problems) for name in CATEGORIES}
    percents = ["-" if value is None else f"{value:.2f}" for value in result["scores"].values()]
    rows = [["", *CATEGORIES], ["% right", *percents], ["questions", *map(str, asked.values())]]
    lines = [f"{row[0]:9}" + "".join(f"{cell:>8}" for cell in row[1:]) for row in rows]
    lines.append(f"{result['correct']} of {result['count']} right; {result['unparsed']} unparsed (they name no choice, "
                 "or several, and count as wrong)")  # fmt: skip
    if absent := result["count"] - len(result["outputs"]):
        lines.append(f"{absent} of the questions have no answer at all; they count as unparsed")
    return "\n".join(lines)


def read_predictions(path: Path) -> dict[str, str]:
    """{id: text}, or what this file or the original wrote: {"outputs": {id: text}, ...}."""
    predictions = checkpoint.read_json(path, dict)
    outputs = predictions["outputs"] if isinstance(predictions.get("outputs"), dict) else predictions
    for id, text in outputs.items():
        if not isinstance(text, str):
            raise UserError(f"{path}: the answer to {id!r:.80} is {json.dumps(text)[:60]}; expected its text (the file "
                            'is {id: text}, or {"outputs": {id: text}})')  # fmt: skip
    return {id: text.encode("utf-8", "replace").decode() for id, text in outputs.items()}  # no lone surrogates


# --- the answers


def refuse_to_overwrite(out: Path):
    """Only the files of an earlier evaluation may be written over."""
    page_alone = out.with_suffix(".html").exists() and not out.exists()
    if page_alone or out.exists() and not {"scores", "results"} <= checkpoint.read_json(out, dict).keys():
        name = out.with_suffix(".html") if page_alone else out
        raise UserError(f"{name}: is there already and is no earlier evaluation; give another --out")


def fingerprint(a: argparse.Namespace, problems: list[dict]) -> str:
    """A checksum of all that the answers depend on. Raises UserError if a picture cannot be read."""
    digest, pictures, bad = hashlib.sha256(f"{a.max_new_tokens}".encode()), Pictures(a.data), []
    for problem in problems:
        digest.update(json.dumps([problem["id"], scienceqa_question(problem)]).encode())
        try:
            if problem["image_path"]:
                data = pictures.read(problem["image_path"])
                open_picture(data)
                digest.update(hashlib.sha256(data).digest())
        except ValueError as error:
            bad.append(f"problem {problem['id']}: {problem['image_path']}: {error}")
    if bad:
        raise UserError(f"{a.data}: {len(bad)} pictures cannot be read; {bad[0]}; get them anew")
    for path in sorted(a.model.iterdir()):
        if path.name in ("config.json", "vision.json", "tokenizer.model") or path.suffix == ".pth":
            digest.update(checkpoint.checksum(path).encode())
    return digest.hexdigest()[:16]


def part_files(out: Path, key: str = "") -> list[Path]:
    """Where the processes write their answers as they come: out's name, then the fingerprint and the process."""
    name = re.compile(re.escape(out.stem) + rf"\.{key or '[0-9a-f]+'}\.part[0-9]+\.jsonl")
    return [path for path in sorted(out.parent.iterdir()) if name.fullmatch(path.name)]


def keep(path: Path, lines: list[str]):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            print("", *lines, sep="\n", file=file)  # the first line break ends half a line of a process that was killed
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another --out") from None


def answer(a: argparse.Namespace, problems: list[dict], rank: int, world: int,
           device: torch.device) -> tuple[dict[str, str], str]:  # fmt: skip
    """The model's answers -> {id: text}, and what it was trained for and sees with. All processes take part.

    The split is cut into the same batches however many processes share them, so that they say the same.
    """
    kind = dict(template=TEMPLATE, prompt=SCIENCEQA_PROMPT, stage=2)
    config, model, sp, autocast = checkpoint.open_run(a.model, device, TRAINED_BY, **kind)

    def answered_before() -> list[str]:
        key = fingerprint(a, problems)
        keep(a.out.with_name(f"{a.out.stem}.{key}.part0.jsonl"), [])  # better fail now than after the first batch
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in part_files(a.out, key)]
        return [key, *"\n".join(texts).splitlines()]

    key, *before = by_process_0(answered_before, rank)
    outputs = {}
    for line in before:
        with contextlib.suppress(ValueError):  # half a line
            outputs.update([json.loads(line)])
    if outputs and rank == 0:
        print(f"{len(outputs)} of {len(problems)} questions were answered before; going on with the others")

    n_patches, size, prefix_ids = model.vision.config.n_patches, model.vision.config.image_size, system_ids(sp)
    encode = Encoder(sp, n_patches, size, Pictures(a.data), NO_LIMIT, prefix_ids)
    prompts = [Example(p["id"], [scienceqa_question(p)], p["image_path"]) for p in problems]
    lengths = {p.id: len(tokenize(sp, p.turns, n_patches if p.image else 0)[0]) for p in prompts}
    prompts.sort(key=lambda p: (-lengths[p.id], p.id))  # alike lengths side by side; what takes most memory comes first
    batches = [prompts[i : i + a.batch_size] for i in range(0, len(prompts), a.batch_size)]
    batches = [todo for batch in batches if (todo := [p for p in batch if p.id not in outputs])]
    n, began, said = sum(map(len, batches)), time.time(), []
    bar = tqdm(total=len(problems), initial=len(outputs), unit="question", desc="answering", disable=rank != 0)
    with autocast, torch.inference_mode():
        prefix = model.read_prefix(torch.tensor(prefix_ids, device=device))
        for i in range(rank, len(batches), world):
            try:
                texts = ask(model, encode, batches[i], prefix, a.max_new_tokens, a.batch_size)
            except ValueError as error:
                raise UserError(str(error)) from None
            except torch.cuda.OutOfMemoryError:
                raise UserError(f"out of memory with {len(batches[i])} questions at once; lower --batch-size") from None
            new = [json.dumps([p.id, text]) for p, text in zip(batches[i], texts)]
            keep(a.out.with_name(f"{a.out.stem}.{key}.part{rank}.jsonl"), new)
            said += new
            bar.update(sum(map(len, batches[i : i + world])))  # the other processes are about as far
    bar.close()
    outputs.update(json.loads(line) for line in gathered(said))
    if n and rank == 0:
        seconds = time.time() - began
        print(f"{n} questions in {seconds:.1f} s: {n / seconds:.1f} questions/s, {a.batch_size} at a time")
    task = config.get("settings", {}).get("task", "an unknown task")
    about = f"trained for {task}: {TEMPLATE}, {SCIENCEQA_PROMPT}, ViT layer {model.vision.feature_layer}"
    return outputs, f"{about}, pictures of {size} px"


# --- the page


def picture_uri(path: Path) -> str | None:
    """A picture as the text of a link to itself; None if it cannot be read."""
    try:
        return as_link(open_picture(path.read_bytes()))
    except (OSError, ValueError):
        return None


def page(title: str, about: str, folder: Path, problems: list[dict], result: dict) -> str:
    """All that is to be seen, in one HTML file. What comes from data is JSON in it, which its script shows as text."""
    questions = []
    for p in problems:
        image = p["image_path"] and picture_uri(folder / p["image_path"])
        questions.append({name: p[name] for name in ("id", "question", "hint", "choices", "answer")} | dict(
            chosen=result["results"][p["id"]], said=result["outputs"].get(p["id"]), categories=categories(p),
            image=image, absent=bool(p["image"] and not image),
            reference=f"{p['lecture']}\n\n{p['solution']}".strip()))  # fmt: skip
    columns = [dict(name=n, meaning=CATEGORIES[n], score=result["scores"][n],
                    count=sum(n in q["categories"] for q in questions)) for n in CATEGORIES]  # fmt: skip
    data = json.dumps(dict(columns=columns, questions=questions)).replace("<", "\\u003c")  # cannot close its element
    head, tail = PAGE.read_text(encoding="utf-8").split("{{data}}")
    script = tail.partition("<script>")[2].partition("</script>")[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # the browser runs no other script
    for mark, text in (("{{script}}", allowed), ("{{title}}", html.escape(title)), ("{{about}}", html.escape(about))):
        head = head.replace(mark, text)
    return head + data + tail


# --- the command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpForm)
    add = parser.add_argument
    add("--model", type=Path, metavar="RUN", default=Path("runs/scienceqa"), help="a run directory of stage 2")
    add("--data", type=Path, metavar="DIR", help="ScienceQA's folder: problems.json, ... (default: the demo's)")
    add("--split", metavar="NAME", default="test", help="of pid_splits.json: test, val, minitest, ...")
    add("--batch-size", type=int, default=32, help="questions that a process answers at once")
    add("--max-new-tokens", type=int, default=1024, help="an answer is cut after so many")
    add("--out", type=Path, metavar="FILE", help="the JSON to write, and next to it the page, .html "
        "(default: RUN/answers_SPLIT.json, or answers_SPLIT_swapped.json; PREDICTIONS_scored.json)")  # fmt: skip
    add("--predictions", type=Path, metavar="FILE", help="score these answers, {id: text} as JSON; no model is loaded")
    add("--missing-pictures-as-text", action="store_true", help="ask problems without their picture where it is absent")
    add("--swap-pictures", action="store_true", help="show each problem the picture of the next one that has one: what "
        "is right even so was not seen")  # fmt: skip
    a = parser.parse_args(argv)
    if a.batch_size < 1 or a.max_new_tokens < 1:
        raise UserError("--batch-size and --max-new-tokens must be 1 or more")
    if a.predictions and a.swap_pictures:
        raise UserError("--swap-pictures asks a model, --predictions loads none; leave one out")
    if a.out is None and a.predictions:
        a.out = a.predictions.with_name(a.predictions.stem + "_scored.json")
    name = "answers_" + re.sub("[^A-Za-z0-9_-]", "_", a.split) + "_swapped" * a.swap_pictures
    a.out = a.out or a.model / f"{name}.json"
    if a.out.suffix == ".html" or a.out.is_dir():
        raise UserError(f"--out {a.out}: must name the JSON file; the page goes next to it as .html")
    if a.predictions and a.out.resolve() == a.predictions.resolve():
        raise UserError(f"--out {a.out}: is the file of --predictions; name another")
    return a


def evaluate(a: argparse.Namespace, rank: int, world: int, device: torch.device):
    if a.data is None:
        a.data = demo.FOLDER / "scienceqa"
        by_process_0(lambda: demo.prepare(demo.FOLDER), rank)
    elif not a.data.is_dir():
        raise UserError(f"{a.data}: no such folder; --data takes ScienceQA's (problems.json, pid_splits.json, images/)")
    refuse_to_overwrite(a.out)
    split = ScienceQA(a.data, a.split, "text" if a.missing_pictures_as_text or a.predictions else "refuse")
    problems = list({p["id"]: p for p in split.records}.values())
    if split.missing and rank == 0 and not a.predictions:
        print(f"{len(split.missing)} pictures are absent; those problems are asked without one")
    if a.swap_pictures:
        seen = [p for p in problems if p["image_path"]]
        for problem, path in zip(seen, [p["image_path"] for p in seen[1:] + seen[:1]]):
            problem["image_path"] = path
    if a.predictions:
        outputs, about = read_predictions(a.predictions), f"answers of {a.predictions}"
        strangers = len(outputs.keys() - {p["id"] for p in problems})
        if strangers and rank == 0:
            print(f"{strangers} of the answers are not to questions of split {a.split} and are left out")
    else:
        outputs, about = answer(a, problems, rank, world, device)
        about = f"{a.model}, {about}" + ", each picture swapped for the next one" * a.swap_pictures
    if rank != 0:
        return
    result, title = score(problems, outputs), f"ScienceQA, split {a.split}"
    about += f"; {a.data}" + (f", {len(split.missing)} pictures absent" if split.missing else "")
    print(f"\n{title}; {about}\n{table(problems, result)}")
    checkpoint.write_json(a.out, result)
    with checkpoint.replacing(a.out.with_suffix(".html")) as file:
        file.write(page(title, about, a.data, problems, result).encode())
    if not a.predictions:
        for path in part_files(a.out):
            path.unlink(missing_ok=True)
    print(f"{a.out} and {a.out.with_suffix('.html')} are written")


def main():
    a = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # torchrun passes Ctrl-C on as this
    rank, world, device = start_processes()
    try:
        evaluate(a, rank, world, device)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"\nstopped; the answers so far are kept next to {a.out}, the same command goes on from there")
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        leave(error, rank, world)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
