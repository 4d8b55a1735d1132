"""Published data sets -> examples -> one flat batch, in an order that is seeded and can be entered anywhere.

What `--data` may name is recognised by its content:

    LLaVA JSON      [{"id", "image"?, "conversations": [{"from": "human"|"gpt", "value"}, ...]}, ...]
                    chat.json of CC3M-595K, llava_instruct_150k.json, conversation_58k.json, ...
    captions        [{"image", "caption"}, ...] as a JSON list or one object a line; expanded naively on the fly
    a ScienceQA     folder with problems.json, pid_splits.json and images/{split}/{id}/image.png

A file is read once, to check every record and to note where it lies; afterwards a record is parsed when its turn
comes. So 595K samples are an array of offsets, shared by all worker processes, and not millions of Python objects. So
are the entries of a zip of pictures.
"""

import argparse
import contextlib
import io
import json
import lzma
import os
import random
import struct
import zipfile
import zlib
from array import array
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor

from checkpoint import load_vision, read_json
from conversation import IMAGE, STOP, UserError, load_tokenizer, split_at_picture, stop_ids, surface, tokenize
from model import LLaVA, Prefix
from vision import open_picture, preprocess

REQUESTS = (  # the naive expansion of a caption asks one of these at random
    "Say in a few words what this picture shows.",
    "Give a short caption for this picture.",
    "What is in this picture, briefly?",
    "Sum up this picture in one sentence.",
    "Write a brief description of the picture.",
    "Briefly, what can be seen here?",
    "Describe this picture in short.",
    "Name what the picture shows, without detail.",
)
OFTEN = 0.005  # a request for a description is shared by this part of the samples; a reasoning question is not
LLAVA, CAPTIONS = "LLaVA conversations", "captions"  # the kinds of a file of records
INDEX = 1  # the version of what is kept of a file of records; another counts as none
LARGE = 2**24  # bytes: a smaller file of records is read in a second, and nothing is kept of it
MAX_BYTES = 2**28  # of an encoded picture: beyond, it is taken for a bomb
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError)  # what a zip may raise, and more
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SCIENCEQA_PROMPT = "QCM-LEA"  # question, context, options -> lecture, explanation, answer; recorded with the run


@dataclass(frozen=True)
class Example:
    """One conversation: turns human, assistant, human, ...; with a picture, `<image>` stands in the first."""

    id: str
    turns: list[str]
    image: str | None = None  # where the picture is, below --images


# --- records -> examples. Each raises ValueError that says what is wrong with the record.


def from_llava(record: dict, dice: random.Random) -> Example:
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
            raise ValueError(f"message {len(turns)} is from {message.get('from')!r}; the roles must alternate")
        turns.append(message["value"])
    if len(turns) % 2 == 1:
        raise ValueError("its last message is the human's: no answer to learn")
    image = record.get("image")
    if image is not None:
        check_inside(image)
        split_at_picture(turns[0])
    return Example(str(record.get("id", "")), turns, image)


def from_caption(record: dict, dice: random.Random) -> Example:
    """{"image": "a.jpg", "caption": "A cat."} -> Example("a.jpg", ["<image>\\nDescribe ...", "A cat."], "a.jpg"),
    the request and the picture's place before or after it drawn with `dice` (Eq. 2)."""
    image, caption = record.get("image"), record.get("caption")
    if not isinstance(image, str) or not isinstance(caption, str) or not caption.strip():
        raise ValueError('it is not {"image": path, "caption": text}')
    check_inside(image)
    request = dice.choice(REQUESTS)
    human = f"{IMAGE}\n{request}" if dice.random() < 0.5 else f"{request}\n{IMAGE}"
    return Example(str(record.get("id", image)), [human, caption.strip()], image)


def from_scienceqa(record: dict, dice: random.Random) -> Example:
    """A problem in the form QCM-LEA
    -> Example(id, ["{question}\\nContext: ...\\nOptions: (A) ...", "{lecture} {solution} The answer is B."])"""
    letter = LETTERS[record["answer"]]
    lecture, solution = (record[key].replace("\n", "\\n") for key in ("lecture", "solution"))
    answer = f"{lecture} {solution} The answer is {letter}.".replace("  ", " ").strip()
    return Example(record["id"], [scienceqa_question(record), answer], record["image_path"])


def scienceqa_question(record: dict) -> str:
    """X_instruct of a problem: question, context and options, and the picture after them."""
    lines = [record["question"], f"Context: {record['hint'] or 'N/A'}", options_line(record["choices"])]
    return "\n".join(lines).replace("  ", " ").strip() + (f"\n{IMAGE}" if record["image_path"] else "")


def options_line(choices: list[str]) -> str:
    return "Options: " + " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices))


def short(name: str) -> str:
    """A name from a file, for a message: not long, and no character of it acts on the terminal."""
    return repr(name)[1:-1][:80]


def check_inside(name):
    """A picture's path is data from outside: it must not lead out of its folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"its image {name!r:.80} is not a path")
    if "\\" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"its image {name!r:.80} leads out of the picture folder")


# --- files of records


class Pieces:
    """Pieces of a file, read by any number of processes.

    Not a map: its pages would count as memory of every process. Not seek and read: forked processes share the place.
    """

    def __init__(self, path: Path):
        self.path, self.file = path, open(path, "rb", buffering=0)
        self.size = os.fstat(self.file.fileno()).st_size

    def read(self, start: int, length: int) -> bytes:
        """Raises EOFError if the file does not have so many."""
        if not 0 <= start <= start + length <= self.size:
            raise EOFError(f"no {length} bytes at {start}, the file has {self.size}")
        return os.pread(self.file.fileno(), length, start)

    def __reduce__(self):  # opened again in a process that is not forked
        return Pieces, (self.path,)


class Records:
    """The records of one JSON list or JSON-lines file, by their offsets. records[i] -> dict.

    The index of a large file is kept beside it, as .NAME.index.npz, and used while its size and times are the same.
    """

    def __init__(self, path: Path):
        self.path, kept = path, path.with_name(f".{path.name}.index.npz")
        try:
            self.file, stat = Pieces(path), path.stat()
            version = [INDEX, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            if stat.st_size < LARGE or not self.load_index(kept, version):
                self.make_index()
                if stat.st_size >= LARGE:
                    self.save_index(kept, version)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); is the path right?") from None

    def load_index(self, kept: Path, version: list[int]) -> bool:
        """False if there is none, or none that is whole and of just this file."""
        try:
            with np.load(kept, allow_pickle=False) as arrays:  # a zip, with checksums
                if arrays["version"].tolist() != version:
                    return False
                self.kind, self.index = str(arrays["kind"]), arrays["index"]
            places = self.index[:, :2].ravel()
            right = self.kind in (LLAVA, CAPTIONS) and self.index.dtype == np.int64 and self.index.shape[1] == 4
            return bool(right and 0 <= places.min() and places.max() <= version[1] and (np.diff(places) >= 0).all())
        except Exception:  # damaged files raise nearly anything
            return False

    def save_index(self, kept: Path, version: list[int]):
        """Where that cannot be, in a folder of others perhaps, the whole file is read again at the next start."""
        own = kept.with_suffix(f".{os.getpid()}")  # the processes of a run write theirs at the same time
        with contextlib.suppress(OSError):
            with open(own, "wb") as file:
                np.savez(file, version=version, kind=self.kind, index=self.index)
            own.replace(kept)
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)

    def make_index(self):
        """Reads and checks the whole file. Raises UserError."""
        path, raw = self.path, self.path.read_bytes()
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text (byte {error.start}); expected JSON") from None
        # Latin-1 makes one character of each byte, so that the decoder's positions are offsets into the file.
        text = raw.decode("latin-1")
        del raw
        skip = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]  # (text, position) -> the whitespace there
        at = skip(text, 3 if text.startswith("\xef\xbb\xbf") else 0).end()
        as_list = text[at : at + 1] == "["
        decoder, dice, rows, self.kind = json.JSONDecoder(), random.Random(0), array("q"), ""
        if as_list:
            at = skip(text, at + 1).end()
        try:
            while at < len(text) and not (as_list and text[at] == "]"):
                record = None
                record, end = decoder.raw_decode(text, at)
                if not (spelled := text[at:end]).isascii():
                    record = json.loads(spelled.encode("latin-1"))  # as it will be read
                if not isinstance(record, dict):
                    raise ValueError("it is not a JSON object")
                self.kind = self.kind or recognise(record)
                example = KINDS[self.kind](record, dice)
                question = zlib.crc32(example.turns[0].replace(IMAGE, "").strip().encode("utf-8", "replace"))
                rows.extend((at, end, len(example.turns), question))
                at = skip(text, end).end()
                if as_list and text[at : at + 1] not in (",", "]"):
                    raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
                if as_list and text[at] == ",":
                    at = skip(text, at + 1).end()
            if as_list and at >= len(text):
                raise json.JSONDecodeError("The list is not closed", text, at)
            if as_list and skip(text, at + 1).end() < len(text):
                raise json.JSONDecodeError("Extra data", text, skip(text, at + 1).end())
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: bad JSON in line {error.lineno}, column {error.colno}: {error.msg}; expected a list of "
                "samples, or one sample a line"
            ) from None
        except (ValueError, RecursionError) as error:
            name = record.get("id", record.get("image", "")) if isinstance(record, dict) else ""
            name = f" (id {short(str(name))})" if name else ""
            raise UserError(f"{path}: sample {len(rows) // 4}{name}: {str(error)[:300]}; mend or remove it") from None
        if not rows:
            raise UserError(f"{path}: holds no samples")
        self.index = np.array(rows).reshape(-1, 4)  # (n, 4) int64: bytes from, to; number of turns; the question's CRC

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i: int) -> dict:
        start, end = self.index[i, :2].tolist()
        try:
            record = json.loads(self.file.read(start, end - start))
        except (ValueError, EOFError):
            record = None
        if not isinstance(record, dict):
            raise ValueError(f"{self.path}: sample {i} is not where it was; the file has changed, start again")
        return record


def recognise(record: dict) -> str:
    if "conversations" in record:
        return LLAVA
    if "caption" in record:
        return CAPTIONS
    raise ValueError(
        f"its keys are {', '.join(map(repr, list(record)[:8])) or 'none'}; expected `conversations` (LLaVA JSON) or "
        "`image` and `caption`; for ScienceQA give the folder"
    )


class ScienceQA:
    """The problems of one split, in the order of pid_splits.json; records[i] is problems.json's entry with `id` and
    `image_path` (below the folder; None without a picture) added."""

    kind = f"ScienceQA, {SCIENCEQA_PROMPT}"

    def __init__(self, folder: Path, split: str = "train", absent: str = "refuse"):
        """absent: what becomes of problems whose picture is not there: `refuse` all, `text` (no picture), or `keep`."""
        if not (folder / "problems.json").is_file():
            raise UserError(f"{folder}: a folder without problems.json, so not ScienceQA's; for conversations or "
                            "captions give their JSON file")  # fmt: skip
        problems, splits = (read_json(folder / name, dict) for name in ("problems.json", "pid_splits.json"))
        if not isinstance(splits.get(split), list):
            names = ", ".join(map(short, [*splits][:9]))
            raise UserError(f"{folder / 'pid_splits.json'}: has no split {split!r}; it has {names}")
        self.records, missing = [], []
        for id in splits[split]:
            if not isinstance(id, str) or id not in problems:
                raise UserError(f"{folder}: split {split} names problem {id!r:.80}, which problems.json does not hold")
            record = check_problem(id, problems[id], folder / "problems.json")
            if record["image"]:
                path = f"images/{record['split']}/{id}/{record['image']}"
                try:
                    check_inside(path)
                except ValueError as error:
                    raise UserError(f"{folder / 'problems.json'}: problem {short(id)}: {error}") from None
                is_there = os.path.isfile(folder / path)  # of a name that is too long as well: False
                missing += [] if is_there else [id]
                if is_there or absent == "keep":
                    record["image_path"] = path
            self.records.append(record)
        if not self.records:
            raise UserError(f"{folder}: split {split} is empty")
        if missing and absent == "refuse":
            raise UserError(
                f"{folder}: the pictures of {len(missing)} of {len(self.records)} problems are absent (the first is "
                f"{short(missing[0])}: images/{short(problems[missing[0]]['split'])}/{short(missing[0])}/); unpack "
                "ScienceQA's pictures there, or give --missing-pictures-as-text to ask those problems without one"
            )
        self.missing = missing

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i: int) -> dict:
        return self.records[i]


def check_problem(id: str, record: dict, path: Path) -> dict:
    """A problem of problems.json with its `id` and an empty `image_path`; absent texts become empty ones."""

    def refuse(reason):
        raise UserError(f"{path}: problem {short(id)}: {reason}")

    if not isinstance(record, dict):
        refuse("expected a JSON object")
    record = {**record, "id": id, "image_path": None}
    for key, kind in dict(question=str, choices=list, answer=int, split=str).items():
        if not isinstance(record.get(key), kind) or isinstance(record[key], bool):
            refuse(f"`{key}` is {record.get(key)!r:.80}; expected {kind.__name__}")
    for key in ("hint", "lecture", "solution", "image"):
        if not isinstance(record.setdefault(key, None) or "", str):
            refuse(f"`{key}` is {record[key]!r:.80}; expected text")
        record[key] = record[key] or ""
    if not 1 <= len(record["choices"]) <= len(LETTERS) or not all(isinstance(c, str) for c in record["choices"]):
        refuse(f"`choices` must be 1 to {len(LETTERS)} texts")
    if not 0 <= record["answer"] < len(record["choices"]):
        refuse(f"answer {record['answer']!r:.80} is beyond its {len(record['choices'])} choices")
    return record


KINDS = {LLAVA: from_llava, CAPTIONS: from_caption, ScienceQA.kind: from_scienceqa}


class Examples:
    """The examples of all the data sets that --data names, one after another."""

    def __init__(self, paths: list, seed: int = 0, split: str = "train", absent: str = "refuse"):
        self.seed = seed
        self.parts: list[ScienceQA | Records] = []
        for path in map(Path, paths):
            if path.is_dir():
                self.parts.append(ScienceQA(path, split, absent))
            else:
                self.parts.append(Records(path))
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])

    def __len__(self):
        return int(self.starts[-1])

    def __getitem__(self, i: int) -> Example:
        return self.get(i, epoch=0)

    def get(self, i: int, epoch: int) -> Example:
        """What is drawn at random for a caption is drawn anew in each epoch, and the same in every process."""
        part = int(np.searchsorted(self.starts, i, side="right")) - 1
        record = self.parts[part][i - self.starts[part]]
        return KINDS[self.parts[part].kind](record, random.Random(f"{self.seed} {epoch} {i}"))

    def types(self) -> np.ndarray:
        """The response type of each sample (n,): its file's number if there are several; within one file of
        conversations 0 several turns (conversation), 1 a request that recurs often (detailed description), 2 a
        question of its own (complex reasoning)."""
        if len(self.parts) > 1 or not isinstance(self.parts[0], Records):
            return np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts])
        turns, questions = self.parts[0].index[:, 2:].T
        _, inverse, counts = np.unique(questions, return_inverse=True, return_counts=True)
        recurs = counts[inverse] >= max(2, OFTEN * len(questions))
        return np.where(turns > 2, 0, np.where(recurs, 1, 2))

    def describe(self) -> str:
        return ", ".join(f"{len(part):,} {part.kind}" for part in self.parts)


class Zip:
    """The entries of a zip of any size, by name.

    zipfile makes an object of each entry, half a kilobyte, in each process. Here an entry is a hash of its name and the
    place of its record in the zip's directory, 20 bytes; zipfile is given a zip of the one entry that is asked for.
    """

    def __init__(self, path: Path):
        """Raises as zipfile does, or struct.error or EOFError, if the directory is damaged."""
        self.file, hashes, places = Pieces(path), array("I"), array("q")
        tail = self.file.read(max(0, self.file.size - 2**17), min(2**17, self.file.size))
        end = tail.rfind(b"PK\5\6")  # the end record: where the directory is; zip64 has one more, of 8-byte numbers
        length, offset = struct.unpack_from("<12x2L", tail, end)
        if tail[max(0, end - 76) :].startswith(b"PK\6\6"):
            end -= 76
            length, offset = struct.unpack_from("<40x2Q", tail, end)
        at = self.file.size - len(tail) + end - length
        self.shift = at - offset  # of all offsets, where something was put before the zip
        if at < 0:
            raise zipfile.BadZipFile(f"{length} bytes of directory in a file of {self.file.size}")
        with open(path, "rb") as file:
            file.seek(at)
            while length > 0:
                magic, flags, *sizes = struct.unpack("<4s4xH18x3H12x", file.read(46))
                if magic != b"PK\1\2":
                    raise zipfile.BadZipFile(f"no directory record at byte {at}")
                name = file.read(sizes[0]).decode("utf-8" if flags & 0x800 else "cp437")
                file.read(sizes[1] + sizes[2])
                hashes.append(zlib.crc32(name.encode()))
                places.extend((at, size := 46 + sum(sizes)))
                at, length = at + size, length - size
        order = np.argsort(hashes, kind="stable")
        self.hashes, self.places = np.array(hashes)[order], np.array(places).reshape(-1, 2)[order]  # (n,), (n, 2)

    def read(self, name: str) -> bytes:
        """Raises KeyError if there is no such entry, or as zipfile does of a damaged or encrypted one."""
        hash = np.uint32(zlib.crc32(name.encode("utf-8", "replace")))
        first, last = np.searchsorted(self.hashes, hash), np.searchsorted(self.hashes, hash, "right")
        for start, length in self.places[first:last][::-1].tolist():  # of equal names the last counts
            record = self.file.read(start, length)
            (entry,) = self.alone(record).infolist()
            if entry.filename == name:
                break
        else:
            raise KeyError(name)
        if max(entry.file_size, entry.compress_size) > MAX_BYTES:
            raise OSError(f"{entry.file_size} bytes are over the limit of {MAX_BYTES}")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise OSError("it is neither stored nor deflated")  # the others unpack without a bound
        start = entry.header_offset + self.shift
        sizes = struct.unpack("<26x2H", self.file.read(start, 30))  # of the name and what is between it and the data
        local = self.file.read(start, 30 + sum(sizes) + entry.compress_size)
        with self.alone(record[:42] + bytes(4) + record[46:], local).open(name) as file:  # its offset is now 0
            return file.read(entry.file_size + 1)  # to the end: its CRC counts; no more: it may be a bomb

    @staticmethod
    def alone(record: bytes, local: bytes = b"") -> zipfile.ZipFile:
        """The zip of one entry: its header and data, its directory record, the end record."""
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(record), len(local), 0)
        return zipfile.ZipFile(io.BytesIO(local + record + end))


class Pictures:
    """Encoded pictures by name, from a folder or straight from a zip."""

    def __init__(self, path: str | Path):
        self.path, self.zip = Path(path), None
        if not self.path.exists():
            raise UserError(f"{path}: no such folder or zip of pictures (--images)")
        if not self.path.is_dir():
            if not zipfile.is_zipfile(self.path):
                raise UserError(f"{path}: neither a folder nor a zip (--images)")
            try:
                self.zip = Zip(self.path)
            except (*DAMAGED, OSError, ValueError) as error:
                raise UserError(f"{path}: its directory is damaged ({error}); copy or download the zip again (--images)"
                                ) from None  # fmt: skip

    def read(self, name: str) -> bytes:
        """Raises ValueError if there is no such picture."""
        check_inside(name)
        try:
            if self.zip:
                return self.zip.read(name)
            if (size := (self.path / name).stat().st_size) > MAX_BYTES:
                raise OSError(f"{size} bytes are over the limit of {MAX_BYTES}")
            return (self.path / name).read_bytes()
        except (*DAMAGED, KeyError, OSError, RuntimeError, ValueError) as error:
            reason = "it is not there" if isinstance(error, (KeyError, FileNotFoundError)) else str(error)[:200]
            raise ValueError(f"cannot be read from {self.path}: {reason}") from None


def read_pixels(path: Path, size: int) -> torch.Tensor:
    """(1, 3, size, size) uint8 of a picture that the user names. Raises UserError if it is none."""
    try:
        return preprocess(open_picture(path.read_bytes()), size)[None]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


# --- examples -> a flat batch


@dataclass
class Batch:
    """The flat batch that model.py computes on (see its header)."""

    ids: torch.Tensor  # (N,) int64, IMAGE_ID at patches
    green: torch.Tensor  # (N,) bool
    cu_seqlens: torch.Tensor  # (B+1,) int32
    pixels: torch.Tensor  # (pictures, 3, S, S) uint8

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(t.to(device, non_blocking=True) for t in self.__dict__.values()))


@dataclass
class Encoder:
    """Turns an example into what a model of this tokenizer and picture size reads."""

    sp: SentencePieceProcessor
    n_patches: int
    image_size: int
    pictures: Pictures | None
    max_length: int
    prefix: list[int] = field(default_factory=list)  # ids that the model has read before: left off every sample

    def __call__(self, example: Example) -> tuple[np.ndarray, np.ndarray, torch.Tensor | None, bool]:
        """-> ids (T,), green (T,), pixels (3, S, S) or None, whether it was cut to max_length.

        A sample is cut at its end, never inside a picture: then the whole picture goes, and what follows it.
        Raises ValueError if the picture is missing or broken.
        """
        ids, green = tokenize(self.sp, example.turns, self.n_patches if example.image else 0)
        patches = np.flatnonzero(ids < 0)
        cut, end = len(ids) > self.max_length, self.max_length
        if len(patches) and patches[0] < end <= patches[-1]:
            end = int(patches[0])
        ids, green = ids[:end], green[:end]
        pixels = None
        if example.image and len(patches) and patches[-1] < end:
            try:
                if self.pictures is None:
                    raise ValueError("give its folder or zip as --images")
                pixels = preprocess(open_picture(self.pictures.read(example.image)), self.image_size)
            except ValueError as error:
                raise ValueError(f"sample {short(example.id)}: picture {short(example.image)}: {error}") from None
        assert ids[: len(self.prefix)].tolist() == self.prefix, "every sample starts with the system message"
        return ids[len(self.prefix) :], green[len(self.prefix) :], pixels, cut

    def flatten(self, samples: list) -> Batch:
        """[(ids, green, pixels or None, ...)] -> Batch. No sample at all is one of a single position, nothing green."""
        samples = samples or [(np.zeros(1, np.int64), np.zeros(1, bool), None)]
        pixels = [s[2] for s in samples if s[2] is not None]
        return Batch(
            torch.from_numpy(np.concatenate([s[0] for s in samples])),
            torch.from_numpy(np.concatenate([s[1] for s in samples])),
            torch.tensor([0] + [len(s[0]) for s in samples]).cumsum(0).int(),
            torch.stack(pixels) if pixels else torch.zeros(0, 3, self.image_size, self.image_size, dtype=torch.uint8),
        )


def order(types: np.ndarray, epoch: int, seed: int, sampling: str = "proportional") -> np.ndarray:
    """Which samples an epoch shows, in order; it depends on nothing but its arguments.

    types: (n,) int, the response type of each sample. n samples are shown, whatever the sampling:
    proportional: each once. uniform: each draw is of each type with equal probability, and within a type none comes
    again before all have come (section 4.2.2: the types are "uniformly sampled in training").
    """
    dice, n = np.random.default_rng([seed, epoch]), len(types)
    if sampling == "proportional":
        return dice.permutation(n)
    kinds = np.unique(types)
    drawn, samples = kinds[dice.integers(len(kinds), size=n)], np.empty(n, dtype=np.int64)
    for kind in kinds:
        members, places = np.flatnonzero(types == kind), np.flatnonzero(drawn == kind)
        rounds = [dice.permutation(members) for _ in range(-(-len(places) // len(members)))]
        samples[places] = np.concatenate([members[:0], *rounds])[: len(places)]
    return samples


@dataclass
class Step:
    """One process's share of a global batch."""

    batches: list[Batch]  # micro-batches; at least one
    ids: list[str]  # of the samples
    cut: int  # how many were cut to max_length
    errors: list[str]  # one line for each sample that could not be read


class Steps(torch.utils.data.Dataset):
    """steps[t] is what this process computes in step t. The global batch does not depend on the number of processes."""

    def __init__(self, examples: Examples, encode: Encoder, batch_size: int, seed: int, rank: int = 0, world: int = 1,
                 limit: int = 16384, sampling: str = "proportional"):  # fmt: skip
        """batch_size: samples of the global batch; limit: tokens of a micro-batch (one sample may exceed it)."""
        self.examples, self.encode, self.batch_size, self.seed = examples, encode, batch_size, seed
        self.rank, self.world, self.limit = rank, world, limit
        self.per_epoch = -(-len(examples) // batch_size)  # the last batch of an epoch may be smaller
        self.types, self.sampling, self.epoch = examples.types(), sampling, -1

    def __getitem__(self, t: int) -> Step:
        epoch, within = divmod(t, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, order(self.types, epoch, self.seed, self.sampling)
        chosen = self.order[within * self.batch_size :][: self.batch_size]
        step, samples, room = Step([], [], 0, []), [], 0
        for i in chosen[self.rank :: self.world]:
            try:
                example = self.examples.get(int(i), epoch)
                step.ids.append(example.id)
                sample = self.encode(example)
            except ValueError as error:
                step.errors.append(str(error))
                continue
            step.cut += sample[3]
            if samples and len(sample[0]) > room:
                step.batches.append(self.encode.flatten(samples))
                samples = []
            if not samples:
                room = self.limit
            samples.append(sample)
            room -= len(sample[0])
        step.batches.append(self.encode.flatten(samples))
        return step


@torch.no_grad()
def ask(model: LLaVA, encode: Encoder, prompts: list[Example], prefix: Prefix | None = None, max_new_tokens: int = 64,
        batch_size: int = 32) -> list[str]:  # fmt: skip
    """The model's greedy answers to prompts (each ending with a human's turn), `batch_size` at a time."""
    device, stop, texts = model.projector.weight.device, stop_ids(encode.sp), []
    for i in range(0, len(prompts), batch_size):
        batch = encode.flatten([encode(prompt) for prompt in prompts[i : i + batch_size]]).to(device)
        answers = model.answers(batch.ids, batch.cu_seqlens, batch.pixels, stop, max_new_tokens, prefix=prefix)
        texts += [surface(encode.sp, answer).partition(STOP)[0].strip() for answer in answers]  # in whatever pieces
    return texts


# --- for the command lines


def add_data_arguments(parser: argparse.ArgumentParser):
    """The flags by which conversation.py finds data and a tokenizer; none of them: the demo."""
    parser.add_argument("--data", nargs="+", metavar="PATH", help="LLaVA JSON, captions, or a ScienceQA folder "
                        "(default: the demo's captions)")  # fmt: skip
    parser.add_argument("--images", metavar="PATH", help="folder or zip of the data's pictures, for --html")
    parser.add_argument("--split", default="train", help="of a ScienceQA folder: a name in its pid_splits.json")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.model of a LLaMA (default: the demo's)")
    parser.add_argument("--patches", type=int, help="positions that a picture takes (default: the demo's; 256 "
                        "with --tokenizer)")  # fmt: skip


def open_for_display(arguments: argparse.Namespace) -> tuple[SentencePieceProcessor, Examples, int]:
    """-> tokenizer, examples, patches a picture, for `python conversation.py`. No picture is opened."""
    import demo  # which needs nothing of this file, but is read after it

    sp = load_tokenizer(arguments.tokenizer or demo.LLAMA / "tokenizer.model")
    n_patches = arguments.patches
    if n_patches is None:
        n_patches = 256 if arguments.tokenizer else load_vision(demo.VISION).config.n_patches
    if not 1 <= n_patches <= 10_000:
        raise UserError(f"--patches {n_patches}: a picture takes 1 to 10000 positions")
    if arguments.data:
        return sp, Examples(arguments.data, split=arguments.split, absent="keep"), n_patches
    demo.prepare(demo.FOLDER)
    return sp, Examples([demo.FOLDER / "captions.json"]), n_patches


def pictures_for_display(arguments, examples: Examples) -> Pictures | None:
    """The pictures of what `open_for_display` opened; None if no flag says where they are."""
    import demo

    if arguments.images or not arguments.data:
        return Pictures(arguments.images or demo.FOLDER / "images")
    return Pictures(arguments.data[0]) if isinstance(examples.parts[0], ScienceQA) else None
