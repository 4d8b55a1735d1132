"""Records of data sets: the objects of a JSON file, and the problems of ScienceQA's folder."""

import json
import os
from pathlib import Path

from common import UserError, read_json, reason, shorten
from formats.pictures import check_inside

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the choices of a ScienceQA problem


def read_records(path: Path) -> list[dict]:
    """The objects of a JSON list or of JSON lines."""
    decoder, values, end = json.JSONDecoder(), [], 0
    try:
        text = path.read_bytes().decode("utf-8-sig")
        while end < len(text):
            if text[end].isspace():
                end += 1
            else:
                value, end = decoder.raw_decode(text, end)
                values.append(value)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({reason(error)}); is the path right?") from None
    records = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    if not records or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path}: expected a list of JSON objects, or one object a line")
    return records


def read_scienceqa(folder: Path, split: str = "train", absent: str = "refuse") -> tuple[list[dict], list[str]]:
    """The problems of a split in the order of pid_splits.json, and the paths of the pictures that are absent.

    A problem is the entry of problems.json with `id` and `image_path` added: the path below the folder, or None.
    absent: how to treat problems whose picture is absent: `refuse` them, `text` drops the picture, `keep` it.
    """
    path = folder / "problems.json"
    entries, splits = read_json(path, dict), read_json(folder / "pid_splits.json", dict)
    if not isinstance(splits.get(split), list) or not splits[split]:
        raise UserError(f"{folder}: pid_splits.json has no problems in split {split!r}; it has {shorten(splits)}")
    problems, absent_pictures = [], []
    for id in map(str, splits[split]):
        try:
            problem = check_problem(id, entries.get(id))
        except ValueError as error:
            raise UserError(f"{path}: problem {id!r:.80} of split {split!r}: {error}") from None
        image = problem["image_path"]
        if image and not os.path.isfile(folder / image):
            absent_pictures.append(image)
            problem["image_path"] = None if absent == "text" else image
        problems.append(problem)
    if absent_pictures and absent == "refuse":
        raise UserError(f"{folder}: {len(absent_pictures)} pictures are absent ({shorten(absent_pictures)}); "
                        "unpack them there, or use their problems as text with --missing-pictures-as-text")  # fmt: skip
    return problems, absent_pictures


def check_problem(id: str, entry: dict | None) -> dict:
    """A problem of problems.json with `id` and `image_path`; texts that are absent become "". Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError(f"its entry in problems.json is {entry!r:.80}, expected an object")
    problem = entry | {"id": id} | {key: entry.get(key) or "" for key in ("hint", "lecture", "solution", "image")}
    texts = [problem.get(key) for key in ("question", "split", "hint", "lecture", "solution", "image")]
    choices, answer = problem.get("choices"), problem.get("answer")
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in texts + choices):
        raise ValueError("its question, split, hint, lecture, solution, image and each of its choices must be strings")
    if type(answer) is not int or not 0 <= answer < len(choices) <= len(LETTERS):
        raise ValueError(f"`answer` is {answer!r:.80}; expected an index into its choices (at most {len(LETTERS)})")
    problem["image_path"] = None
    if problem["image"]:
        problem["image_path"] = f"images/{problem['split']}/{id}/{problem['image']}"
        check_inside(problem["image_path"])
    return problem
