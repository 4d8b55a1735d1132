"""Selects the concept-balanced subset of CC3M (appendix) and expands it naively into chat.json, for stage 1.

    python -m tools.prepare_cc3m --data cc3m --out cc3m-595k                      # a folder that img2dataset wrote
    python -m tools.prepare_cc3m --data Train_GCC-training.tsv --out cc3m-595k    # Google's file; its pictures are
                                                                                  # in LLaVA-CC3M-Pretrain-595K

The concepts of a caption are its noun phrases. Phrases in fewer than 3 captions are skipped. For each of the others,
from the rarest to the most frequent, the captions that contain it are added to the subset, or a random 100 of them if
there are more. The paper selects about 595K of 3.3M captions this way. A frequent phrase can still occur in more than
100 selected captions, because captions are also selected for the rarer phrases they contain.

The captions are read twice. The first pass stores a digest of 8 bytes for each phrase of a caption, and no caption,
unless the input is a JSON file. The result depends neither on Python's hash seed nor on the number of processes.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import sys
import tarfile
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python tools/prepare_cc3m.py`

from common import (
    ArgumentParser,
    UserError,
    number,
    printable,
    progress_bar,
    read_json,
    reason,
    replacing,
    run_command,
)
from data import check_records, from_caption
from formats.pictures import MAX_BYTES, Pictures
from formats.records import read_records
from tools.plots import drawing

TSV, FILES, TARS, JSON = "Google's TSV", "img2dataset's files", "img2dataset's tars", "captions in JSON"
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_CAPTION = 1000  # characters of a caption in which phrases are searched
MOST_FREQUENT = 10  # phrases listed in the report
SPACY_MODEL = "en_core_web_sm"
FUNCTION_WORDS = frozenset(
    "a an the this that these those some any no each every all both another other such what which whose who whom "
    "where when why how i me my you your he him his she her it its we us our they them their someone something "
    "everyone in on at by for from to of with without into onto over under above below near behind between through "
    "during before after against along around across among beside off out up down inside outside toward towards upon "
    "within as like than and or but nor so if because while until since though although not is are was were be been "
    "being am has have had do does did can could will would shall should may might must there here then just very too "
    "also only".split()
)
VERBS = frozenset(  # the most frequent verbs of captions; --phrases simple knows no others
    "wearing holding standing sitting walking running looking playing riding using making taking showing working "
    "going talking eating drinking smiling posing performing attending arriving speaking coming getting lying flying "
    "waiting watching dancing driving arrives attends performs poses plays walks sits stands looks holds wears shows "
    "runs takes makes goes comes gets speaks celebrates seen taken made used covered filled surrounded".split()
)
WORD = re.compile(r"['’]s\b|[^\W_]+(?:['’.-][^\W_]+)*|[^\w\s]")  # a possessive, a word, or a punctuation mark
TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError)  # what tarfile raises on damaged files

Caption = tuple[dict, Callable[[], bytes] | None]  # {"id", "image", "caption"}; reads the picture, or None
Sample = tuple[str, dict[str, Callable[[], bytes]]]  # name without a suffix; suffix -> reads the file with that suffix
PhraseFinder = Callable[[Iterable[str]], Iterator[list[str]]]  # texts -> the noun phrases of each


# --- reading captions


class Source(NamedTuple):
    """Captions on disk. read(skipped) iterates over them and counts in `skipped` what it omits, by the reason."""

    path: Path
    kind: str
    read: Callable[[Counter], Iterator[Caption]]


def open_captions(path: Path) -> Source:
    """Recognises the four kinds of input by their content."""
    if path.is_dir():
        tars, shards = sorted(path.glob("*.tar")), sorted(p for p in path.glob("[0-9]*") if p.is_dir())
        if bool(tars) == bool(shards):
            raise UserError(f"{path}: expected the output of img2dataset, either folders (00000/) or tars (00000.tar)")
        if tars:
            return Source(path, TARS, lambda skipped: read_samples(tar_samples(tars), path, skipped))
        return Source(path, FILES, lambda skipped: read_samples(folder_samples(path, shards), path, skipped))
    try:
        with open(path, "rb") as file:
            head = file.read(200).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); is the path right?") from None
    if not re.match(rb"\s*(\[\s*)?\{", head):
        return Source(path, TSV, partial(read_tsv, path))
    records = read_records(path)
    kind = check_records(path, records)
    if kind != "captions":
        raise UserError(f'{path}: holds {kind}, expected captions: {{"image", "caption"}}')
    return Source(path, JSON, lambda skipped: ((record, None) for record in records))


def read_tsv(path: Path, skipped: Counter) -> Iterator[Caption]:
    """Reads lines `caption<TAB>url`. The picture of line i, from 0, is GCC_train_{i}.jpg, as in LLaVA's 595K.

    A first line that holds the words `caption<TAB>url` is a heading, as img2dataset requires it, and is not counted.
    """
    with open(path, "rb") as file:
        has_heading = file.readline().split() == [b"caption", b"url"]
        if not has_heading:
            file.seek(0)
        for i, line in enumerate(file):
            try:
                caption, _url = line.decode().split("\t", 1) if line.strip() else ("", "")
            except ValueError:
                raise UserError(f"{path}: line {i + 1 + has_heading} is not caption<TAB>url in UTF-8, as each line of "
                                "Train_GCC-training.tsv is; download the file again") from None  # fmt: skip
            if caption.strip():
                yield {"id": f"GCC_train_{i:09}", "image": f"GCC_train_{i:09}.jpg", "caption": caption}, None
            else:
                skipped["without a caption"] += 1


def read_samples(samples: Iterable[Sample], path: Path, skipped: Counter) -> Iterator[Caption]:
    """Reads the samples of img2dataset, in which .txt holds the caption and .json the caption, the status and more.

    The path of the picture is the name of its file; paths inside a .json are ignored.
    """
    for name, files in samples:
        try:
            metadata = dict(json.loads(files[".json"]())) if ".json" in files else {}
            if metadata.get("caption") is None and ".txt" in files:
                metadata["caption"] = files[".txt"]().decode()
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: {printable(name)}: its .json or .txt is damaged ({reason(error)}); correct or "
                            "remove it") from None  # fmt: skip
        caption = metadata.get("caption")
        suffix = next((suffix for suffix in PICTURE_SUFFIXES if suffix in files), None)
        if metadata.get("status", "success") != "success":
            skipped["not downloaded"] += 1
        elif not isinstance(caption, str) or not caption.strip():
            skipped["without a caption"] += 1
        elif suffix is None:
            skipped["without a picture"] += 1
        else:
            yield {"id": PurePosixPath(name).name, "image": name + suffix, "caption": caption}, files[suffix]


def stem_and_suffix(path: str) -> tuple[str, str]:
    """"00000/000000003.jpg" -> "000000003", ".jpg"."""
    stem, dot, suffix = PurePosixPath(path).name.partition(".")
    return stem, dot + suffix


def folder_samples(path: Path, shards: list[Path]) -> Iterator[Sample]:
    pictures = Pictures(path)
    for shard in shards:
        for stem, names in itertools.groupby(sorted(os.listdir(shard)), lambda name: stem_and_suffix(name)[0]):
            yield f"{shard.name}/{stem}", {
                stem_and_suffix(name)[1]: partial(pictures.read, f"{shard.name}/{name}") for name in names
            }


def tar_samples(paths: list[Path]) -> Iterator[Sample]:
    for path in paths:
        try:
            with tarfile.open(path, "r:") as tar:
                for stem, members in itertools.groupby(tar_members(tar), lambda m: stem_and_suffix(m.name)[0]):
                    yield stem, {stem_and_suffix(m.name)[1]: partial(read_member, tar, m, path) for m in members}
        except TAR_ERRORS as error:
            raise damaged_tar(path, error) from None


def tar_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The files of a tar. Raises ReadError if a header is damaged.

    tarfile itself takes a damaged header for the end of the tar, or follows it backwards and never ends.
    """
    previous = -1
    for member in tar:
        if member.offset <= previous or member.size < 0:
            raise tarfile.ReadError("a header is damaged")
        previous = member.offset
        if member.isfile():
            yield member
    with open(str(tar.name), "rb") as file:
        file.seek(tar.offset)
        if file.read(512) != bytes(512):  # the block of zeros that marks the end
            raise tarfile.ReadError("the end is missing")


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> bytes:
    try:
        if member.size > MAX_BYTES:
            raise OSError(f"{member.name} has {member.size} bytes, over the limit of {MAX_BYTES}")
        return tar.extractfile(member).read()  # type: ignore[union-attr]  # None only for what is not a file
    except TAR_ERRORS as error:
        raise damaged_tar(path, error) from None


def damaged_tar(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path}: damaged, or not an uncompressed tar ({reason(error)}); download it again or move it "
                     "out of the folder")  # fmt: skip


# --- noun phrases. Each method: number of processes -> its description for the report, and a PhraseFinder.


def spacy_phrases(processes: int) -> tuple[str, PhraseFinder]:
    """spaCy's noun chunks in lower case, without leading function words and punctuation."""
    try:
        import spacy

        nlp = spacy.load(SPACY_MODEL, exclude=["ner", "lemmatizer"])
    except (ImportError, OSError):
        raise UserError(f"--phrases spacy needs `pip install spacy` and `python -m spacy download {SPACY_MODEL}`; "
                        "--phrases simple needs neither, but is an approximation") from None  # fmt: skip

    def normalize(chunk) -> str:
        words = chunk.text.lower().split()
        return " ".join(itertools.dropwhile(lambda word: word in FUNCTION_WORDS or not word[0].isalnum(), words))

    def find(texts):
        for doc in nlp.pipe(texts, n_process=processes, batch_size=256):
            yield [phrase for phrase in map(normalize, doc.noun_chunks) if phrase]

    return f"spaCy {spacy.__version__}, {SPACY_MODEL} {nlp.meta['version']}", find


def simple_phrases(processes: int) -> tuple[str, PhraseFinder]:
    """Approximates noun phrases by the longest runs of words without a function word, a verb of VERBS or punctuation.

    Other verbs and adverbs remain in the phrases ("dog chases cat" is one phrase), so there are more and rarer ones.

    "a man wearing the red hat of his father 's friend" -> ["man", "red hat", "father", "friend"]
    """

    def belongs(word: str) -> bool:
        return word[0].isalnum() and word not in FUNCTION_WORDS and word not in VERBS

    def find(texts):
        for text in texts:
            runs = itertools.groupby(WORD.findall(text.lower()), belongs)
            yield [" ".join(run) for is_phrase, run in runs if is_phrase]

    return "runs of words between function words, common verbs and punctuation (an approximation)", find


PHRASES = {"spacy": spacy_phrases, "simple": simple_phrases}


def digest(phrase: str) -> bytes:
    return hashlib.blake2b(phrase.encode(), digest_size=8).digest()


def searchable(record: dict) -> str:
    """The part of a caption in which phrases are searched. Lone surrogates, which UTF-8 cannot encode, become "?"."""
    return record["caption"][:MAX_CAPTION].encode("utf-8", "replace").decode()


# --- the subset


class Concepts(NamedTuple):
    """P noun phrases of n captions. The captions that contain phrase p are captions[starts[p] : starts[p + 1]]."""

    digests: np.ndarray  # (P,) uint64
    starts: np.ndarray  # (P+1,) int64
    captions: np.ndarray  # (M,) int32
    n_captions: int


def read_concepts(source: Source, find_phrases: PhraseFinder) -> tuple[Concepts, Counter]:
    """The first pass over the captions. Also returns how many records were skipped, by the reason."""
    digests, per_caption, skipped = bytearray(), array("H"), Counter()
    texts = (searchable(record) for record, _ in source.read(skipped))
    for phrases in progress_bar(find_phrases(texts), "noun phrases", unit=" captions", unit_scale=True):
        different = set(phrases)
        per_caption.append(len(different))
        digests += b"".join(map(digest, different))
    if not digests:
        reasons = "".join(f"; {count} records skipped: {why}" for why, count in skipped.items())
        raise UserError(f"{source.path}: no noun phrase in its {len(per_caption)} captions{reasons}")
    return group_by_phrase(np.frombuffer(digests, "<u8"), np.frombuffer(per_caption, "H")), skipped


def group_by_phrase(digests: np.ndarray, per_caption: np.ndarray) -> Concepts:
    """Turns the phrases of each caption into the captions of each phrase.

    digests (M,) uint64: the different phrases of caption 0, then those of caption 1, ...
    per_caption (n,): how many of them belong to each caption.
    """
    owners = np.repeat(np.arange(len(per_caption), dtype=np.int32), per_caption)  # (M,)
    order = np.argsort(digests, kind="stable")
    digests = digests[order]
    is_first = np.append(True, digests[1:] != digests[:-1])  # (M,)
    starts = np.flatnonzero(is_first)  # (P,)
    return Concepts(digests[starts], np.append(starts, len(digests)), owners[order], len(per_caption))


def select_balanced(concepts: Concepts, at_least: int, at_most: int, seed: int) -> np.ndarray:
    """Which captions are selected, (n,) bool.

    For each phrase in `at_least` captions or more, from the rarest on, selects all its captions, or a random `at_most`
    of them. Captions that other phrases have already selected are not counted, so the number of captions that a phrase
    adds does not depend on the order.
    """
    rng = np.random.default_rng(seed)
    counts = np.diff(concepts.starts)  # (P,)
    selected = np.zeros(concepts.n_captions, dtype=bool)
    n_skipped = np.count_nonzero(counts < at_least)
    for p in np.argsort(counts, kind="stable")[n_skipped:]:
        holders = concepts.captions[concepts.starts[p] : concepts.starts[p + 1]]
        selected[holders if len(holders) <= at_most else rng.choice(holders, at_most, replace=False)] = True
    return selected


# --- writing the subset


def expand(record: dict, rng: random.Random) -> bytes:
    """A record of chat.json: a random request, with the picture before or after it, and the caption (Eq. 2)."""
    example = from_caption(record, rng)
    turns = [{"from": role, "value": turn} for role, turn in zip(("human", "gpt"), example.turns)]
    return json.dumps({"id": example.id, "image": example.image, "conversations": turns}).encode()


def write_subset(source: Source, selected: np.ndarray, seed: int, chat: BinaryIO, archive: zipfile.ZipFile | None,
                 examples: set[int]) -> list[str]:  # fmt: skip
    """The second pass over the captions: writes the selected ones to `chat`, and their pictures to `archive`, if given.

    examples: indices of captions whose text is returned, selected or not.
    Raises UserError if the number of captions has changed since the first pass.
    """
    n, texts = len(selected), []
    i, separator = -1, b"[\n"
    captions = progress_bar(source.read(Counter()), "chat.json", n, unit=" captions", unit_scale=True)
    for i, (record, read_picture) in enumerate(captions):
        if i in examples:
            texts.append(searchable(record))
        if i >= n or not selected[i]:
            continue
        try:
            chat.write(separator + expand(record, random.Random(f"{seed} {i}")))
            if archive is not None:
                add_picture(archive, record["image"], read_picture(), source.path)
        except ValueError as error:  # the name of the picture leads out of the folder, or is not text
            raise UserError(f"{source.path}: caption {i}: {printable(str(error))[:200]}; rename its picture") from None
        separator = b",\n"
    if i + 1 != n:
        raise UserError(f"{source.path}: held {n} captions in the first pass and {i + 1} in the second; start again")
    chat.write(b"\n]\n")
    return texts


def add_picture(archive: zipfile.ZipFile, name: str, picture: bytes, path: Path):
    if name in archive.NameToInfo:
        raise UserError(f"{path}: two pictures are named {printable(name)}, but img2dataset repeats no name; does the "
                        "folder hold the tars of two data sets?")  # fmt: skip
    archive.writestr(zipfile.ZipInfo(name), picture)


# --- the report


def phrase_counts(concepts: Concepts, selected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many captions contain each phrase, before and after the selection: (P,) int64 each."""
    after = np.add.reduceat(selected[concepts.captions], concepts.starts[:-1], dtype=np.int64)
    return np.diff(concepts.starts), after


def histogram(before: np.ndarray, after: np.ndarray, at_least: int) -> list[dict]:
    """How many phrases are in 1 to 2 captions, in 3 to 9, 10 to 99, 100 to 999, ..."""
    powers = [10**k for k in range(1, len(str(before.max())) + 1)]
    edges = sorted({1, at_least, *powers})
    before, after = (np.histogram(counts, edges)[0].tolist() for counts in (before, after))
    return [dict(captions=f"{low:,} to {high - 1:,}", before=b, after=a)
            for low, high, b, a in zip(edges, edges[1:], before, after)]  # fmt: skip


def table(report: dict) -> str:
    rows = [("captions", report["captions"]), ("different noun phrases", report["phrases"])]
    rows += [(f"  in {row['captions']} captions", row) for row in report["histogram"]]
    rows += [(f'"{printable(row["phrase"])[:38]}"', row) for row in report["most_frequent"]]
    lines = [f"{'':42}{'before':>12}{'after':>12}"]
    lines += [f"{name:42}{row['before']:>12,}{row['after']:>12,}" for name, row in rows]
    return "\n".join(lines + [f"skipped, {why}: {count:,}" for why, count in report["skipped"].items()])


def draw(path: Path, before: np.ndarray, after: np.ndarray):
    """Draws how many captions contain a phrase, by the phrase's rank. Prints a line if matplotlib is missing."""
    path.unlink(missing_ok=True)  # of an earlier run
    try:
        with drawing(path) as figure:
            figure.set_size_inches(6, 4)
            axes = figure.subplots()
            for name, counts in dict(before=before, after=after).items():
                counts = np.sort(counts[counts > 0])[::-1]
                ranks = np.unique(np.geomspace(1, len(counts), 1000).astype(int))
                axes.loglog(ranks, counts[ranks - 1], label=f"{name}: {len(counts):,} noun phrases")
            axes.set(xlabel="rank of the noun phrase", ylabel="captions that contain it")
            axes.legend()
    except UserError as error:
        print(f"{path} was not drawn: {error}")


# --- the command line


def prepare(args: argparse.Namespace):
    check_out(args.out)
    source = open_captions(args.data)
    phrases_by, find_phrases = PHRASES[args.phrases](args.processes)
    print(f"{args.data}: {source.kind}; noun phrases: {phrases_by}", flush=True)

    concepts, skipped = read_concepts(source, find_phrases)
    n = concepts.n_captions
    selected = select_balanced(concepts, args.at_least, args.at_most, args.seed)  # (n,)
    if not selected.any():
        raise UserError(f"{args.data}: no noun phrase is in {args.at_least} of its {n} captions; lower --at-least")
    before, after = phrase_counts(concepts, selected)  # (P,) each
    frequent = np.argsort(-before, kind="stable")[:MOST_FREQUENT]
    # Only digests are stored, so the frequent phrases are found again in the first caption that contains each.
    first_captions = set(concepts.captions[concepts.starts[frequent]].tolist())

    with contextlib.ExitStack() as stack:  # closes the files in reverse order: report.json gets its name last
        report_file = stack.enter_context(replacing(args.out / "report.json"))
        chat = stack.enter_context(replacing(args.out / "chat.json"))
        archive = None
        if source.kind == TARS:
            archive = zipfile.ZipFile(stack.enter_context(replacing(args.out / "images.zip")), "w")
            stack.enter_context(archive)
        texts = write_subset(source, selected, args.seed, chat, archive, first_captions)
        names = {digest(phrase): phrase for phrases in find_phrases(texts) for phrase in phrases}
        most_frequent = [
            dict(phrase=names.get(concepts.digests[p].tobytes(), "?"), before=int(before[p]), after=int(after[p]))
            for p in frequent
        ]
        report = dict(
            data=str(args.data), kind=source.kind, phrases_by=phrases_by, at_least=args.at_least, at_most=args.at_most,
            seed=args.seed, skipped=skipped, captions=dict(before=n, after=int(selected.sum())),
            phrases=dict(before=len(before), after=int(np.count_nonzero(after))),
            histogram=histogram(before, after, args.at_least), most_frequent=most_frequent,
        )  # fmt: skip
        report_file.write(json.dumps(report, indent=2).encode() + b"\n")
    if source.kind != TARS:
        (args.out / "images.zip").unlink(missing_ok=True)  # of an earlier run
    draw(args.out / "report.png", before, after)
    images = {TARS: args.out / "images.zip", FILES: args.data}.get(source.kind, "PICTURES")
    print(f"{table(report)}\nfor train.py: --data {args.out / 'chat.json'} --images {images}")


def check_out(out: Path):
    """Refuses to overwrite anything but the output of this command."""
    if not out.exists():
        return
    try:
        if out.is_dir() and all(path.name.startswith(".") for path in out.iterdir()):  # temporary files of a killed run
            return
    except OSError as error:
        raise UserError(f"{out}: cannot be read ({reason(error)}); choose another --out") from None
    report = out / "report.json"
    if not report.is_file() or not {"phrases_by", "histogram"} <= read_json(report, dict).keys():
        raise UserError(f"{out}: already exists and was not written by tools.prepare_cc3m; choose another --out")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, prog="python -m tools.prepare_cc3m")
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="PATH", help="Train_GCC-training.tsv, a folder that img2dataset "
        "wrote (files or webdataset), or captions as JSON")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write: chat.json, a report, and for tars "
        "also images.zip")  # fmt: skip
    add("--phrases", choices=PHRASES, default="spacy", help="how noun phrases are found; simple is an approximation")
    add("--processes", type=number(1), default=1, help="number of processes that run spaCy")
    add("--at-least", type=number(1), default=3, help="phrases in fewer captions are skipped")
    add("--at-most", type=number(1), default=100, help="captions that are selected for one phrase")
    add("--seed", type=number(0), default=0, help="seed of the random selection and of the requests")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # phrases may hold any character
    run_command(lambda: prepare(parse_arguments()))
