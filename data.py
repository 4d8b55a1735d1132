"""Published data sets -> examples -> one stream, in an order that is a pure function of the seed.

`--data` names files and folders, which are recognised by their content:

    LLaVA JSON      [{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}, ...]
                    chat.json of CC3M-595K, llava_instruct_150k.json, conversation_58k.json, ...
    captions        [{"image", "caption"}, ...] as a JSON list or one object a line; a request is drawn for each
    ScienceQA       a folder with problems.json, pid_splits.json and images/{split}/{id}/image.png

All records are checked before training starts. They are then kept as JSON in one array of bytes, which the worker
processes share, and a record is parsed when its turn comes. Workers send numpy arrays through a pipe.
"""

import argparse
import json
import math
import os
import random
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from common import UserError, printable, read_json, reason, shorten
from conversation import IMAGE, IMAGE_ID, load_tokenizer, split_at_picture, system_ids, tokenize
from vision import open_picture, preprocess

REQUESTS = (  # section 4.2.1: a caption answers one of these, drawn at random
    "Say in a few words what this picture shows.",
    "Give a short caption for this picture.",
    "What is in this picture, briefly?",
    "Sum up this picture in one sentence.",
    "Write a brief description of the picture.",
    "Briefly, what can be seen here?",
    "Describe this picture in short.",
    "Name what the picture shows, without detail.",
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SCIENCEQA_PROMPT = "QCM-LEA"  # question, context, choices -> lecture, explanation, answer; recorded with the run
MAX_BYTES = 2**28  # of an encoded picture; a larger one may be a decompression bomb


@dataclass(frozen=True)
class Example:
    """One conversation: turns human, assistant, human, ...; with a picture, the first turn holds `<image>`."""

    id: str
    turns: list[str]
    image: str | None = None  # the picture's path below --images


# --- records -> examples. Each function raises ValueError with the fault of the record. Only captions draw from rng.


def from_llava(record: dict, rng: random.Random) -> Example:
    """{"id": 7, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]}
    -> Example("7", ["Hi", "Yes?"])"""
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise ValueError("it has no conversations")
    turns = []
    for message, role in zip(messages, ("human", "gpt") * len(messages)):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise ValueError(f'message {len(turns)} is not {{"from": "{role}", "value": text}}')
        if message.get("from") != role:
            raise ValueError(f"message {len(turns)} is from {message.get('from')!r:.80}; the roles must alternate")
        turns.append(message["value"])
    if len(turns) % 2 == 1:
        raise ValueError("its last message is the human's: it has no answer to learn")
    image = record.get("image")
    if image is not None:
        check_inside(image)
        split_at_picture(turns[0])
    return Example(str(record.get("id", "")), turns, image)


def from_caption(record: dict, rng: random.Random) -> Example:
    """{"image": "a.jpg", "caption": "A cat."} -> Example("a.jpg", ["<image>\\nDescribe ...", "A cat."], "a.jpg").

    rng draws the request, and whether the picture comes before or after it (Eq. 2).
    """
    image, caption = record.get("image"), record.get("caption")
    if not isinstance(image, str) or not isinstance(caption, str) or not caption.strip():
        raise ValueError('it is not {"image": path, "caption": text}')
    check_inside(image)
    request = rng.choice(REQUESTS)
    human = f"{IMAGE}\n{request}" if rng.random() < 0.5 else f"{request}\n{IMAGE}"
    return Example(str(record.get("id", image)), [human, caption.strip()], image)


def from_scienceqa(record: dict, rng: random.Random) -> Example:
    """A problem in the form QCM-LEA
    -> Example(id, ["{question}\\nContext: ...\\nOptions: (A) ...", "{lecture} {solution} The answer is B."])"""
    lecture, solution = (record[key].replace("\n", "\\n") for key in ("lecture", "solution"))  # spelled out
    answer = f"{lecture} {solution} The answer is {LETTERS[record['answer']]}.".replace("  ", " ").strip()
    return Example(record["id"], [scienceqa_question(record), answer], record["image_path"])


def scienceqa_question(record: dict) -> str:
    """X_instruct of a problem: question, context and choices, then the picture."""
    lines = [record["question"], f"Context: {record['hint'] or 'N/A'}", options_line(record["choices"])]
    question = "\n".join(lines).replace("  ", " ").strip()
    return f"{question}\n{IMAGE}" if record["image_path"] else question


def options_line(choices: list[str]) -> str:
    return "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))


def check_inside(name):
    """Raises ValueError unless a picture's path, which comes from a downloaded file, stays below its folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"its image {name!r:.80} is not a path")
    if "\\" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"its image {name!r:.80} leads out of the picture folder")


# --- data sets


class Records:
    """The checked records of one file, a JSON list or JSON lines. records[i] -> dict."""

    def __init__(self, path: Path):
        self.path, self.kind, encoded, rng = path, "", [], random.Random(0)
        silent = os.environ.get("RANK", "0") != "0"
        bar = tqdm(read_records(path), f"checking {path.name}", delay=1, leave=False, disable=silent)
        for i, record in enumerate(bar):
            try:
                self.kind = self.kind or recognise(record)
                KINDS[self.kind](record, rng)  # raises ValueError if the record is faulty
            except ValueError as error:
                name = printable(str(record.get("id", record.get("image", ""))))[:80]
                raise UserError(f"{path}: sample {i} (id {name}): {str(error)[:300]}; correct or remove it") from None
            encoded.append(json.dumps(record).encode())
        self.ends = np.cumsum([0] + [len(one) for one in encoded])  # (n+1,)
        self.text = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> dict:
        return json.loads(self.text[self.ends[i] : self.ends[i + 1]].tobytes())


def read_records(path: Path) -> list[dict]:
    """The objects of a JSON list, or of a file with one JSON object a line. A UserError names the line of a fault."""
    line, records = 0, []
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            for line, one in enumerate(text.split("\n")):
                if one.strip():
                    records.append(json.loads(one))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: bad JSON in line {line + error.lineno}, column {error.colno}: {error.msg}; expected "
                        "a list of samples, or one sample a line") from None  # fmt: skip
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({reason(error)}); is the path right?") from None
    if not records:
        raise UserError(f"{path}: holds no samples")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise UserError(f"{path}: sample {i} is not a JSON object; correct or remove it")
    return records


def recognise(record: dict) -> str:
    """A key of KINDS. Raises ValueError if the record is of no known data set."""
    if "conversations" in record:
        return "LLaVA conversations"
    if "caption" in record:
        return "captions"
    keys = shorten(map(repr, record)) or "none"
    raise ValueError(f"its keys are {keys}; expected `conversations` (LLaVA JSON) or `image` and `caption`; for "
                     "ScienceQA name the folder")  # fmt: skip


class ScienceQA:
    """The problems of one split, in the order of pid_splits.json.

    problems[i] is the entry of problems.json with `id` and `image_path` added: the path below the folder, or None.
    """

    kind = f"ScienceQA, {SCIENCEQA_PROMPT}"

    def __init__(self, folder: Path, split: str = "train", absent: str = "refuse"):
        """absent: how to treat problems whose picture is absent: `refuse` them, `text` drops the picture, `keep` it."""
        path = folder / "problems.json"
        if not path.is_file():
            raise UserError(f"{folder}: a folder without problems.json, so not ScienceQA's; other data are JSON files")
        problems, splits = read_json(path, dict), read_json(folder / "pid_splits.json", dict)
        if not isinstance(splits.get(split), list) or not splits[split]:
            raise UserError(f"{folder}: pid_splits.json has no problems in split {split!r}; it has {shorten(splits)}")
        self.path, self.records, self.missing = folder, [], []
        for id in splits[split]:
            if not isinstance(id, str) or id not in problems:
                raise UserError(f"{folder}: split {split} names problem {id!r:.80}, which problems.json does not hold")
            try:
                record = check_problem(id, problems[id])
            except ValueError as error:
                raise UserError(f"{path}: problem {printable(id)[:80]}: {error}") from None
            if record["image_path"] and not os.path.isfile(folder / record["image_path"]):
                self.missing.append(record["image_path"])
                if absent == "text":
                    record["image_path"] = None
            self.records.append(record)
        if self.missing and absent == "refuse":
            raise UserError(f"{folder}: {len(self.missing)} pictures are absent ({shorten(self.missing[:1])}, ...); "
                            "unpack them there, or give --missing-pictures-as-text to do without")  # fmt: skip

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        return self.records[i]


def check_problem(id: str, record: dict) -> dict:
    """A problem of problems.json with `id` and `image_path`; texts that are absent become "". Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError("expected a JSON object")
    record = {**record, "id": id, "image_path": None}
    for key in ("hint", "lecture", "solution", "image"):
        record[key] = record.get(key) or ""
    for key in ("question", "split", "hint", "lecture", "solution", "image"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"`{key}` is {record.get(key)!r:.80}; expected text")
    choices, answer = record.get("choices"), record.get("answer")
    if not isinstance(choices, list) or not 1 <= len(choices) <= 26 or not all(isinstance(c, str) for c in choices):
        raise ValueError(f"`choices` is {choices!r:.80}; expected a list of 1 to 26 texts")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"`answer` is {answer!r:.80}; expected an index into its {len(choices)} choices")
    if record["image"]:
        record["image_path"] = f"images/{record['split']}/{id}/{record['image']}"
        check_inside(record["image_path"])
    return record


KINDS = {"LLaVA conversations": from_llava, "captions": from_caption, ScienceQA.kind: from_scienceqa}


class Examples:
    """The examples of all the data sets that --data names, one data set after another."""

    def __init__(self, paths: list, seed: int = 0, split: str = "train", absent: str = "refuse"):
        self.seed = seed
        self.parts = [ScienceQA(path, split, absent) if path.is_dir() else Records(path) for path in map(Path, paths)]
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Example:
        return self.get(i, epoch=0)

    def get(self, i: int, epoch: int) -> Example:
        """Example i. Each epoch draws anew what is random in a caption; all processes draw the same."""
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        record = self.parts[part][i - self.starts[part]]
        return KINDS[self.parts[part].kind](record, random.Random(f"{self.seed} {epoch} {i}"))

    def types(self) -> np.ndarray:
        """(n,) int, the index of each sample's data set; the published 158K come as one file for each response type."""
        return np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts])

    def describe(self, sampling: str) -> list[str]:
        """One line for each data set: its size, kind, and share of the samples that are drawn."""
        shares = [1 / len(self.parts) if sampling == "uniform" else len(part) / len(self) for part in self.parts]
        lines = [f"{part.path}: {len(part):,} {part.kind}, {100 * share:.1f} % of the samples drawn"
                 for part, share in zip(self.parts, shares)]  # fmt: skip
        absent = sum(len(part.missing) for part in self.parts if isinstance(part, ScienceQA))
        return lines + ([f"{absent} pictures are absent; their problems are used without one"] if absent else [])


class Pictures:
    """Encoded pictures by name, from a folder or straight from a zip."""

    def __init__(self, path: str | Path):
        self.path, self.process = Path(path), 0  # 0: not opened
        if not self.path.exists():
            raise UserError(f"{path}: no such folder or zip of pictures (--images)")
        if not self.path.is_dir():
            try:
                self.archive()
            except (OSError, RuntimeError, ValueError, zipfile.BadZipFile) as error:
                raise UserError(f"{path}: neither a folder nor an intact zip ({reason(error)}); copy or download it "
                                "again (--images)") from None  # fmt: skip

    def __getstate__(self) -> dict:
        """Pickles the path alone: the process that receives it opens the zip itself."""
        return {"path": self.path, "process": 0}

    def archive(self) -> zipfile.ZipFile:
        """Each process opens the zip for itself: forked processes would share one position in the file."""
        if self.process != os.getpid():
            self.opened, self.process = zipfile.ZipFile(self.path), os.getpid()
        return self.opened

    def read(self, name: str) -> bytes:
        """Raises ValueError with the reason if the picture is absent, damaged or over MAX_BYTES."""
        check_inside(name)
        try:
            if self.path.is_dir():
                with open(self.path / name, "rb") as file:
                    content = file.read(MAX_BYTES + 1)
            else:
                entry = self.archive().getinfo(name)
                if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("it is neither stored nor deflated")  # zipfile bounds only these while it unpacks
                with self.archive().open(entry) as file:
                    content = file.read(MAX_BYTES + 1)
        except (KeyError, FileNotFoundError):
            raise ValueError(f"cannot be read from {self.path}: no such picture") from None
        except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"cannot be read from {self.path}: {reason(error)}") from None
        if len(content) > MAX_BYTES:
            raise ValueError(f"cannot be read from {self.path}: it has more than {MAX_BYTES} bytes")
        return content


def read_pixels(path: Path, size: int) -> torch.Tensor:
    """The pixels (1, 3, size, size) uint8 of a picture that the user names. Raises UserError."""
    try:
        return torch.from_numpy(preprocess(open_picture(path.read_bytes()), size)[None])
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


# --- examples -> one stream


@dataclass
class Batch:
    """A stream as model.py computes on it (see its header)."""

    ids: np.ndarray  # (N,) int64, IMAGE_ID at patches
    green: np.ndarray  # (N,) bool
    borders: list[int]  # B+1 of them: where the system message ends, and where each sample ends
    pixels: np.ndarray  # (pictures, 3, size, size) uint8

    def to(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor]:
        """The arguments of LLaVA.forward."""
        ids, green, pixels = (torch.from_numpy(a).to(device, non_blocking=True)
                              for a in (self.ids, self.green, self.pixels))  # fmt: skip
        return ids, green, self.borders, pixels


@dataclass
class Sample:
    """An example for one model, without the system message at its start."""

    ids: np.ndarray  # (T,) int64
    green: np.ndarray  # (T,) bool
    pixels: np.ndarray | None = None  # (3, size, size) uint8
    cut: bool = False  # to the maximum length


class Encoder:
    """Examples -> samples -> streams, for a model of this tokenizer and picture size."""

    def __init__(self, sp: SentencePieceProcessor, n_patches: int, image_size: int, pictures: Pictures | None = None,
                 max_length: int | None = None):  # fmt: skip
        """max_length: positions of a sample, system message included; None = no limit."""
        self.sp, self.n_patches, self.image_size = sp, n_patches, image_size
        self.pictures, self.max_length = pictures, max_length
        self.system = system_ids(sp)
        fixed = len(self.system) + n_patches
        if max_length is not None and max_length < fixed + 2:  # at least a token of a question and one of an answer
            raise UserError(f"--max-length {max_length}: the system message and a picture alone take {fixed}")

    def __call__(self, example: Example) -> Sample:
        """Tokenizes an example and reads its picture. Raises ValueError if the picture is absent or damaged.

        A sample over max_length loses its end. If max_length falls inside the picture, the sample ends before it.
        """
        ids, green = tokenize(self.sp, example.turns, self.n_patches if example.image else 0)
        assert ids[: len(self.system)].tolist() == self.system, "every sample starts with the system message"
        patches, end = np.flatnonzero(ids == IMAGE_ID), self.max_length or len(ids)
        cut = end < len(ids)
        if example.image and patches[0] < end <= patches[-1]:
            end = int(patches[0])
        pixels = None
        if example.image and patches[-1] < end:
            try:
                if self.pictures is None:
                    raise ValueError("give its folder or zip as --images")
                pixels = preprocess(open_picture(self.pictures.read(example.image)), self.image_size)
            except ValueError as error:
                name = f"sample {shorten([example.id])}: picture {shorten([example.image])}"
                raise ValueError(f"{name}: {error}") from None
        rest = slice(len(self.system), end)
        return Sample(ids[rest], green[rest], pixels, cut)

    def stream(self, samples: list[Sample]) -> Batch:
        """The system message once, then the samples. Without samples: one position that predicts nothing."""
        if not samples:
            samples = [Sample(np.array([self.sp.bos_id()]), np.array([False]))]
        pixels = [sample.pixels for sample in samples if sample.pixels is not None]
        size = self.image_size
        return Batch(
            ids=np.concatenate([np.array(self.system), *(sample.ids for sample in samples)]),
            green=np.concatenate([np.zeros(len(self.system), bool), *(sample.green for sample in samples)]),
            borders=np.cumsum([len(self.system)] + [len(sample.ids) for sample in samples]).tolist(),
            pixels=np.stack(pixels) if pixels else np.zeros((0, 3, size, size), np.uint8),
        )


def order(types: np.ndarray, epoch: int, seed: int, sampling: str = "proportional") -> np.ndarray:
    """The samples (n,) that an epoch shows, in order: a pure function of its arguments.

    types (n,) int: the response type of each sample. proportional: each sample once. uniform: each draw takes a type
    with equal probability, and within a type no sample comes again before all have come (section 4.2.2: the types are
    "uniformly sampled in training").
    """
    rng, n = np.random.default_rng([seed, epoch]), len(types)
    if sampling == "proportional":
        return rng.permutation(n)
    present = np.unique(types)
    drawn, samples = present[rng.integers(len(present), size=n)], np.empty(n, dtype=np.int64)
    for one in present:
        members, places = np.flatnonzero(types == one), np.flatnonzero(drawn == one)
        rounds = [rng.permutation(members) for _ in range(math.ceil(len(places) / len(members)))]
        if rounds:  # else the type was not drawn
            samples[places] = np.concatenate(rounds)[: len(places)]
    return samples


@dataclass
class Step:
    """One process's share of a global batch."""

    batches: list[Batch] = field(default_factory=list)  # micro-batches
    ids: list[str] = field(default_factory=list)  # of its samples
    errors: list[str] = field(default_factory=list)  # a line for each sample whose picture cannot be read
    green: int = 0  # number of green tokens
    tokens: int = 0  # number of positions
    cut: int = 0  # number of samples cut to the maximum length
    failure: str = ""  # why the data workers cannot continue


class Steps:
    """steps[t] -> this process's Step t. The global batch does not depend on the number of processes."""

    def __init__(self, examples: Examples, encode: Encoder, batch_size: int, seed: int, rank: int = 0, world: int = 1,
                 limit: int = 16384, sampling: str = "proportional"):  # fmt: skip
        """batch_size: samples of the global batch. limit: positions of a micro-batch, unless one sample has more."""
        self.examples, self.encode, self.batch_size, self.seed = examples, encode, batch_size, seed
        self.rank, self.world, self.limit, self.sampling = rank, world, limit, sampling
        self.per_epoch = math.ceil(len(examples) / batch_size)  # the last batch of an epoch may be smaller
        self.types, self.epoch = examples.types(), -1

    def __getitem__(self, t: int) -> Step:
        epoch, within = divmod(t, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.shuffled = epoch, order(self.types, epoch, self.seed, self.sampling)
        start = within * self.batch_size
        chosen = self.shuffled[start : start + self.batch_size]
        samples, ids, errors = [], [], []
        for i in chosen[self.rank :: self.world]:
            example = self.examples.get(int(i), epoch)
            ids.append(example.id)
            try:
                samples.append(self.encode(example))
            except ValueError as error:
                errors.append(str(error))
        return Step([self.encode.stream(group) for group in grouped(samples, self.limit)], ids, errors,
                    green=sum(int(sample.green.sum()) for sample in samples),
                    tokens=sum(len(sample.ids) for sample in samples),
                    cut=sum(sample.cut for sample in samples))  # fmt: skip


def grouped(samples: list[Sample], limit: int) -> list[list[Sample]]:
    """Cuts a list of samples into runs of at most `limit` positions, or of one sample."""
    groups, room = [], 0
    for sample in samples:
        if not groups or len(sample.ids) > room:
            groups.append([])
            room = limit
        groups[-1].append(sample)
        room -= len(sample.ids)
    return groups


# --- for the commands that show samples


def add_data_arguments(parser: argparse.ArgumentParser):
    """The flags that say which data and tokenizer to show."""
    add = parser.add_argument
    add("--data", nargs="+", metavar="PATH", help="LLaVA JSON, captions, or a ScienceQA folder (default: the demo's "
        "captions)")  # fmt: skip
    add("--split", default="train", help="of a ScienceQA folder: a name in its pid_splits.json")
    add("--tokenizer", metavar="FILE", help="tokenizer.model of a LLaMA (default: the demo's)")
    add("--patches", type=int, help="positions of a picture (default: the demo's; 256 with --tokenizer)")


def open_for_display(a: argparse.Namespace) -> tuple[SentencePieceProcessor, Examples, int]:
    """The tokenizer, the examples and the patches of a picture. Opens no picture."""
    from demo import world

    sp = load_tokenizer(a.tokenizer or world.LLAMA / "tokenizer.model")
    n_patches = 256 if a.tokenizer else world.N_PATCHES
    if a.patches is not None:
        n_patches = a.patches
    if not 1 <= n_patches <= 10_000:
        raise UserError(f"--patches {n_patches}: a picture takes 1 to 10000 positions")
    if a.data:
        return sp, Examples(a.data, split=a.split, absent="keep"), n_patches
    world.prepare()
    return sp, Examples([world.FOLDER / "captions.json"]), n_patches
