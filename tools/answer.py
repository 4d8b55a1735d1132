"""Answers a file of questions in the format of the original's evaluation, such as a benchmark.

    python chat.py --questions questions.jsonl --images images.zip --answers answers.jsonl
    torchrun --nproc_per_node 8 chat.py --model runs/chat-13b --questions ... --images ... --answers ...

A question is {"question_id", "image", "text"}, one a line or all in a JSON list; without "image" it is asked about no
picture. An answer is a line {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}. If questions bring
an "answer", the share of answers that equal it is printed.

Each batch of answers is appended to the file. The same command given again keeps them and asks the other questions. A
complete file has the order of the questions.
"""

import argparse
import contextlib
import json
import uuid
from pathlib import Path

import torch

import checkpoint
from chat import TRAINED_BY
from common import UserError, append_lines, write_lines
from conversation import IMAGE, TEMPLATE
from data import Encoder, Example
from distributed import by_process_0, processes
from eval_scienceqa import answer_all
from formats.pictures import Pictures, check_inside
from formats.records import read_records

ANSWER_KEYS = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}


def read_questions(path: Path) -> list[dict]:
    """The questions of a file. `text` loses the mark <image>, which some files have. Raises UserError."""
    questions = read_records(path)
    for i, question in enumerate(questions):
        id, text, image = (question.get(name) for name in ("question_id", "text", "image"))
        if not isinstance(id, (str, int)) or not isinstance(text, str) or not text.strip():
            raise UserError(f"{path}: question {i} is {json.dumps(question)[:200]}; expected question_id (a string or "
                            "an integer), text, and, with a picture, image")  # fmt: skip
        try:
            if image is not None:
                check_inside(image)
        except ValueError as error:
            raise UserError(f"{path}: question {i}: {error}") from None
        question["text"] = text.replace(IMAGE, "").strip()
    return questions


def earlier_answers(path: Path, questions: list[dict], model_id: str, metadata: dict) -> dict[str, str]:
    """{index of the question: text} of an answers file, which afterwards ends with a complete line.

    Raises UserError if the file holds anything but answers of this model with these settings to these questions.
    """
    indices = {(q["question_id"], q["text"]): str(i) for i, q in enumerate(questions)}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    intact, answers = [], {}
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that a kill cut off
            answer = json.loads(line)
            if not isinstance(answer, dict) or not ANSWER_KEYS <= answer.keys():
                raise UserError(f"{path}: exists and is not a file of answers; name another --answers")
            if answer["model_id"] != model_id or answer["metadata"] != metadata:
                raise UserError(f"{path}: holds answers of {answer['model_id']} with {answer['metadata']}; {model_id} "
                                f"is asked with {metadata}; name another --answers")  # fmt: skip
            index = indices.get((answer["question_id"], answer["prompt"]))
            if index is None:
                raise UserError(f"{path}: holds an answer to question {answer['question_id']!r}, which is not among "
                                "those of --questions; name another --answers")  # fmt: skip
            answers[index] = answer["text"]
            intact.append(line)
    if lines and not intact:
        raise UserError(f"{path}: exists and is not a file of answers; name another --answers")
    write_lines(path, intact)
    return answers


def plain(text) -> str:
    """Reduces an answer to what is compared: without white space around it, case, and a final full stop."""
    return str(text).strip().removesuffix(".").rstrip().casefold()


def answer_questions(args: argparse.Namespace):
    """chat.py with --questions: args are its arguments. All processes of torchrun take part."""
    if not args.questions:
        raise UserError("--answers and --images go with --questions; a conversation takes its picture as --image FILE")
    if not args.answers:
        raise UserError("--answers missing: name the file to write, such as answers.jsonl")
    if args.image:
        raise UserError("--image goes with one conversation; the pictures of --questions are those of --images")
    questions = read_questions(args.questions)
    if args.images is None and any(question.get("image") for question in questions):
        raise UserError("--images missing: the questions have pictures; give their folder or zip")
    with processes() as (rank, world_size, device):
        answer_with(args, questions, rank, world_size, device)


def answer_with(args: argparse.Namespace, questions: list[dict], rank: int, world_size: int, device: torch.device):
    if rank == 0:
        print(f"loading {args.model}")
    model, sp, _, autocast = checkpoint.open_run(args.model, device, TRAINED_BY, template=TEMPLATE)
    pictures = Pictures(args.images) if args.images else None
    encoder = Encoder(sp, model.vision.config.n_patches, model.vision.config.image_size, pictures)
    sampling = args.max_new_tokens, args.temperature, args.top_p, args.seed
    metadata = dict(zip(("max_new_tokens", "temperature", "top_p", "seed"), sampling))
    metadata["projector_sha256"] = checkpoint.checksum(args.model / "projector.pth")[:16]
    model_id = args.model.resolve().name

    def as_line(index: str, text: str) -> str:
        question = questions[int(index)]
        answer_id = uuid.uuid5(uuid.NAMESPACE_OID, f"{model_id} {metadata} {index}").hex  # the same each time
        return json.dumps({"question_id": question["question_id"], "prompt": question["text"], "text": text,
                           "answer_id": answer_id, "model_id": model_id, "metadata": metadata})  # fmt: skip

    def keep(answers: dict[str, str]):
        append_lines(args.answers, [as_line(*item) for item in answers.items()])

    prompts = []
    for i, question in enumerate(questions):
        image = question.get("image")
        prompts.append(Example(str(i), [f"{IMAGE}\n{question['text']}" if image else question["text"]], image))
    answers = by_process_0(lambda: earlier_answers(args.answers, questions, model_id, metadata))
    with autocast:
        answer_all(answers, prompts, keep, args.batch_size, rank, world_size, model, encoder, *sampling)
    if rank == 0:
        write_lines(args.answers, [as_line(str(i), answers[str(i)]) for i in range(len(questions))])
        print(f"{args.answers}: {len(questions)} answers of {args.model}")
        scored = [plain(q["answer"]) == plain(answers[str(i)]) for i, q in enumerate(questions) if "answer" in q]
        if scored:
            percent = 100 * sum(scored) / len(scored)
            print(f"{sum(scored)} of {len(scored)} answers ({percent:.2f} %) equal the question's own, apart from "
                  "case and a final full stop")  # fmt: skip
