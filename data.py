"""Published data sets -> examples -> one stream, in an order that is a pure function of the seed.

`--data` names files and folders, which are recognised by their content:

    LLaVA JSON      [{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}, ...]
                    chat.json of CC3M-595K, llava_instruct_150k.json, conversation_58k.json, ...
    captions        [{"image", "caption"}, ...] as a JSON list or one object a line; a request is drawn for each
    ScienceQA       a folder with problems.json, pid_splits.json and images/{split}/{id}/image.png

formats/records.py reads these files and formats/pictures.py the pictures; this file turns each record into an example.
All records are checked before training starts. Threads compute the streams ahead of the training.
"""

import collections
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

from common import UserError, printable, progress_bar, shorten
from conversation import IMAGE, IMAGE_ID, split_at_picture, system_ids, tokenize
from formats.pictures import Pictures, check_inside, open_picture
from formats.records import LETTERS, read_records, read_scienceqa
from model import to_device
from vision import preprocess

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
SCIENCEQA_PROMPT = "QCM-LEA"  # question, context, choices -> lecture, explanation, answer; recorded with the run
READ_TIMEOUT = 300  # seconds that the pictures of a share may take


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
        if not isinstance(message, dict) or message.get("from") != role or not isinstance(message.get("value"), str):
            raise ValueError(f'message {len(turns)} is {message!r:.80}; expected {{"from": "{role}", "value": text}}')
        turns.append(message["value"].replace("\r\n", "\n"))
    if len(turns) % 2 == 1:
        raise ValueError("its last message is from the human, so it has no answer to learn")
    image, marks = record.get("image"), sum(turn.count(IMAGE) for turn in turns)
    if image is not None:
        check_inside(image)
        split_at_picture(turns[0])
        if marks > 1:
            raise ValueError(f"it has {marks} marks {IMAGE}, but a sample has one picture")
    elif IMAGE in turns[0]:
        keys = shorten(repr(key) for key in record if "image" in key.lower() and key != "image")
        hint = f"; give its picture as one path under 'image', not under {keys}" if keys else ""
        raise ValueError(f"its first message has {IMAGE}, but it has no 'image'{hint}")
    return Example(str(record.get("id", "")), turns, image)


def from_caption(record: dict, rng: random.Random) -> Example:
    """{"image": "a.jpg", "caption": "A cat."} -> Example("a.jpg", ["<image>\\nDescribe ...", "A cat."], "a.jpg").

    rng draws the request, and whether the picture comes before or after it (Eq. 2).
    """
    image, caption = record.get("image"), record.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"its keys are {shorten(map(repr, record)) or 'none'}; expected `conversations`, or `image` "
                         "and a text `caption`; for ScienceQA, give the folder")  # fmt: skip
    check_inside(image)
    request = rng.choice(REQUESTS)
    human = f"{IMAGE}\n{request}" if rng.random() < 0.5 else f"{request}\n{IMAGE}"
    return Example(str(record.get("id", image)), [human, caption.strip()], image)


def from_scienceqa(record: dict, rng: random.Random) -> Example:
    """A problem in the form QCM-LEA
    -> Example(id, ["{question}\\nContext: ...\\nOptions: (A) ...", "{lecture} {solution} The answer is B."])"""
    answer = f"{record['lecture']} {record['solution']} The answer is {LETTERS[record['answer']]}."
    turns = [scienceqa_question(record), answer.replace("  ", " ").strip()]
    return Example(record["id"], turns, record["image_path"])


def scienceqa_question(record: dict) -> str:
    """X_instruct of a problem: question, context and choices, then the picture."""
    lines = [record["question"], f"Context: {record['hint'] or 'N/A'}", options_line(record["choices"])]
    question = "\n".join(lines).replace("  ", " ").strip()
    return f"{question}\n{IMAGE}" if record["image_path"] else question


def options_line(choices: list[str]) -> str:
    return "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))


# --- data sets


def check_records(path: Path, records: list[dict]) -> str:
    """The kind of the records, a key of KINDS. Raises UserError for the first that is faulty."""
    kind = "LLaVA conversations" if "conversations" in records[0] else "captions"
    rng = random.Random(0)
    bar = progress_bar(records, f"checking {path.name}", delay=1, leave=False)
    for i, record in enumerate(bar):
        try:
            KINDS[kind](record, rng)
        except ValueError as error:
            name = printable(str(record.get("id", record.get("image", ""))))[:80]
            raise UserError(f"{path}: sample {i} (id {name}): {str(error)[:300]}; correct or remove it") from None
    return kind


KINDS = {"LLaVA conversations": from_llava, "captions": from_caption, "ScienceQA": from_scienceqa}


class Examples:
    """The examples of all the data sets that --data names, one data set after another.

    The records are kept as JSON in one array of bytes: as dicts, 600,000 of them take several times the memory.
    """

    def __init__(self, paths: Iterable[str | Path], seed: int = 0, split: str = "train", absent: str = "refuse"):
        self.paths, self.seed = [Path(path) for path in paths], seed
        self.kinds, self.absent_pictures, self.n_pictures, encoded, starts = [], [], 0, [], [0]
        for path in self.paths:
            if path.is_dir():
                kind, key = "ScienceQA", "image_path"
                records, absent_pictures = read_scienceqa(path, split, absent)
                self.absent_pictures += absent_pictures
            else:
                records = read_records(path)
                kind, key = check_records(path, records), "image"
            self.kinds.append(kind)
            self.n_pictures += sum(bool(record.get(key)) for record in records)
            encoded += [json.dumps([kind, record]).encode() for record in records]
            starts.append(len(encoded))
        self.starts = np.array(starts)  # of the data sets
        self.ends = np.cumsum([0] + [len(one) for one in encoded])  # (n+1,), in bytes
        self.encoded = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self):
        return int(self.starts[-1])

    def get(self, i: int, epoch: int = 0) -> Example:
        """Example i. Each epoch draws anew what is random in a caption; all processes draw the same."""
        kind, record = json.loads(self.encoded[self.ends[i] : self.ends[i + 1]].tobytes())
        return KINDS[kind](record, random.Random(f"{self.seed} {epoch} {i}"))

    __getitem__ = get

    def checksum(self) -> str:
        return hashlib.sha256(self.encoded.data).hexdigest()

    def types(self) -> np.ndarray:
        """(n,) int, the index of each sample's data set; the published 158K come as one file for each response type."""
        return np.repeat(np.arange(len(self.paths)), np.diff(self.starts))

    def describe(self, sampling: str) -> list[str]:
        """One line for each data set: its size, kind, and share of the samples that are drawn."""
        lines = []
        for path, kind, n in zip(self.paths, self.kinds, np.diff(self.starts)):
            share = 1 / len(self.paths) if sampling == "uniform" else n / len(self)
            lines.append(f"{path}: {n:,} {kind}, {100 * share:.1f} % of the samples drawn")
        if self.absent_pictures:
            lines.append(f"{len(self.absent_pictures)} pictures are absent; their problems are used without them")
        return lines


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
        arrays = self.ids, np.flatnonzero(self.green), self.pixels
        ids, target, pixels = (to_device(torch.from_numpy(array), device) for array in arrays)
        return ids, target, self.borders, pixels


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
            raise UserError(f"--max-length {max_length}: the system message and a picture take {fixed}; give "
                            f"{fixed + 2} or more")  # fmt: skip

    def encode(self, example: Example) -> Sample:
        """Tokenizes an example and reads its picture. Raises ValueError if the picture is absent or damaged.

        A sample over max_length loses its end. If max_length falls inside the picture, the sample ends before it.
        """
        ids, green = tokenize(self.sp, example.turns, self.n_patches if example.image else 0)
        assert ids[: len(self.system)].tolist() == self.system, "every sample starts with the system message"
        end, pixels = min(len(ids), self.max_length or len(ids)), None
        n_patches = int((ids[:end] == IMAGE_ID).sum())
        if n_patches < self.n_patches:  # no picture, or a part of one
            end -= n_patches
        elif example.image:
            assert self.pictures, "without --images, train.py refuses examples with pictures"
            try:
                pixels = preprocess(open_picture(self.pictures.read(example.image)), self.image_size)
            except ValueError as error:
                name = f"sample {shorten([example.id])}: picture {shorten([example.image])}"
                raise ValueError(f"{name}: {error}") from None
        rest = slice(len(self.system), end)
        return Sample(ids[rest], green[rest], pixels, cut=end < len(ids))

    def stream(self, samples: list[Sample]) -> Batch:
        """The system message once, then the samples. Without samples: one position that predicts nothing."""
        system = Sample(np.array(self.system), np.zeros(len(self.system), bool))
        parts = [system, *(samples or [Sample(np.array([self.sp.bos_id()]), np.array([False]))])]
        pixels = [part.pixels for part in parts if part.pixels is not None]
        return Batch(
            ids=np.concatenate([part.ids for part in parts]),
            green=np.concatenate([part.green for part in parts]),
            borders=np.cumsum([len(part.ids) for part in parts]).tolist(),
            pixels=np.array(pixels, np.uint8).reshape(-1, 3, self.image_size, self.image_size),
        )


def epoch_order(types: np.ndarray, epoch: int, seed: int, sampling: str = "proportional") -> np.ndarray:
    """The samples (n,) that an epoch shows, in order: a pure function of its arguments.

    types (n,) int: the response type of each sample, from 0. proportional: each sample once. uniform: each draw takes
    a type with equal probability, and within a type every sample is drawn once before any is drawn twice (section
    4.2.2: the types are "uniformly sampled in training").
    """
    rng, n = np.random.default_rng([seed, epoch]), len(types)
    if sampling == "proportional":
        return rng.permutation(n)
    n_types = types.max() + 1
    drawn, samples = rng.integers(n_types, size=n), np.empty(n, dtype=np.int64)
    for one in range(n_types):
        members, places = np.flatnonzero(types == one), np.flatnonzero(drawn == one)
        rounds = [rng.permutation(members) for _ in range(math.ceil(len(places) / len(members)))]
        if rounds:  # else the type was not drawn
            samples[places] = np.concatenate(rounds)[: len(places)]
    return samples


@dataclass
class Share:
    """What one process computes of a global batch."""

    micro_batches: list[Batch] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)  # of its samples
    errors: list[str] = field(default_factory=list)  # a line for each sample whose picture cannot be read
    green: int = 0  # number of green tokens
    tokens: int = 0  # number of positions, without the system message
    cut: int = 0  # number of samples cut to the maximum length
    failure: str = ""  # why it could not be computed


class Shares:
    """shares[t] -> this process's share of global batch t, which does not depend on the number of processes."""

    def __init__(self, examples: Examples, encoder: Encoder, batch_size: int, seed: int, rank: int = 0,
                 world_size: int = 1, limit: int = 16384, sampling: str = "proportional"):  # fmt: skip
        """batch_size: samples of the global batch. limit: positions of a micro-batch, unless one sample has more."""
        self.examples, self.encoder, self.batch_size = examples, encoder, batch_size
        self.rank, self.world_size, self.limit = rank, world_size, limit
        self.per_epoch = math.ceil(len(examples) / batch_size)  # the last batch of an epoch may be smaller
        # Threads may read the end of an epoch and the start of the next one at the same time.
        types = examples.types()
        self.order = functools.lru_cache(maxsize=2)(lambda epoch: epoch_order(types, epoch, seed, sampling))

    def __getitem__(self, t: int) -> Share:
        epoch, within = divmod(t, self.per_epoch)
        start = within * self.batch_size
        chosen = self.order(epoch)[start : start + self.batch_size]
        samples, share = [], Share()
        for i in chosen[self.rank :: self.world_size].tolist():
            example = self.examples.get(i, epoch)
            share.ids.append(example.id)
            try:
                samples.append(self.encoder.encode(example))
            except ValueError as error:
                share.errors.append(str(error))
        share.micro_batches = [self.encoder.stream(group) for group in grouped(samples, self.limit)]
        share.green = sum(int(sample.green.sum()) for sample in samples)
        share.tokens = sum(len(sample.ids) for sample in samples)
        share.cut = sum(sample.cut for sample in samples)
        return share


def grouped(samples: list[Sample], limit: int) -> list[list[Sample]]:
    """Sorts samples by length and cuts them into groups of at most `limit` positions, or of one sample."""
    groups, room = [], 0
    for sample in sorted(samples, key=lambda s: len(s.ids)):  # StreamAttention computes equal lengths together
        if not groups or len(sample.ids) > room:
            groups.append([])
            room = limit
        groups[-1].append(sample)
        room -= len(sample.ids)
    return groups


# --- reading ahead of the training


def prefetched(shares: Shares, order: range, workers: int) -> Iterator[Share]:
    """Computes shares[t] for each t of `order`, in threads ahead of the training; workers=0: when its turn comes.

    Threads suffice, because Pillow decodes and resizes without Python's lock. If a share takes longer than
    READ_TIMEOUT, it holds the failure instead, so that the run can be saved before it ends.
    """
    if workers == 0:
        yield from (shares[t] for t in order)
        return
    pool, upcoming, pending = ThreadPool(workers), iter(order), collections.deque()
    try:
        for _ in order:
            for t in itertools.islice(upcoming, 2 * workers - len(pending)):
                pending.append(pool.apply_async(shares.__getitem__, [t]))
            try:
                share = pending.popleft().get(READ_TIMEOUT)
            except multiprocessing.TimeoutError:
                share = Share(failure=f"its pictures could not be read within {READ_TIMEOUT} s; is the disk reachable? "
                              "The same command continues from here")  # fmt: skip
            yield share
    finally:
        for result in pending:
            result.wait(1)  # second; a process that ends while its threads decode pictures is aborted
        pool.terminate()
