"""CC3M -> stage 1's data: the concept-balanced subset (section 4.1) and its naive expansion into chat.json.

    python prepare_cc3m.py --data cc3m --out cc3m-595k                        # a folder that img2dataset wrote
    python prepare_cc3m.py --data Train_GCC-training.tsv --out cc3m-595k      # Google's file: for the pictures that
                                                                              # LLaVA-CC3M-Pretrain-595K published
A caption's concepts are its noun phrases. Those in fewer than 3 captions are left out. From the rarest of the others
on, the captions that hold a phrase are added; of more than 100, a random 100. Of the paper's 3.3M about 595K remained.
Frequent phrases still come more than 100 times, for they stand beside rare ones, but no longer drown them.

The captions are read twice and never held: of a phrase in a caption 8 bytes are kept, a hash. So neither Python's hash
seed nor the number of processes changes the result.
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
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from checkpoint import read_json, reason, replacing
from conversation import HelpForm, UserError, run_command, visible
from data import CAPTIONS, MAX_BYTES, Pictures, Records, from_caption
from plots import drawing

TSV, FILES, TARS, JSON = "Google's TSV", "img2dataset's files", "img2dataset's tars", "captions in JSON"
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")  # of pictures
LONGEST = 1000  # characters of a caption in which phrases are looked for
MODEL = "en_core_web_sm"  # spaCy's
FUNCTION_WORDS = frozenset(
    "a an the this that these those some any no each every all both another other such what which whose who whom "
    "where when why how i me my you your he him his she her it its we us our they them their someone something "
    "everyone in on at by for from to of with without into onto over under above below near behind between through "
    "during before after against along around across among beside off out up down inside outside toward towards upon "
    "within as like than and or but nor so if because while until since though although not is are was were be been "
    "being am has have had do does did can could will would shall should may might must there here then just very too "
    "also only".split()
)
VERBS = frozenset(  # the commonest in captions, and all that --phrases simple knows of verbs
    "wearing holding standing sitting walking running looking playing riding using making taking showing working "
    "going talking eating drinking smiling posing performing attending arriving speaking coming getting lying flying "
    "waiting watching dancing driving arrives attends performs poses plays walks sits stands looks holds wears shows "
    "runs takes makes goes comes gets speaks celebrates seen taken made used covered filled surrounded".split()
)
WORD = re.compile(r"['’]s\b|[^\W_]+(?:['’.-][^\W_]+)*|[^\w\s]")


# --- captions in. A reader yields ({"id", "image", "caption"}, a function that reads the picture or None), and counts
#     what it leaves out, and why, in `skipped`.


def open_captions(path: Path):
    """Recognises captions by their content -> what they are, and their reader, which may be called again."""
    if path.is_dir():
        tars, shards = sorted(path.glob("*.tar")), sorted(p for p in path.glob("[0-9]*") if p.is_dir())
        if bool(tars) == bool(shards):
            raise UserError(f"{path}: expected what img2dataset writes, either folders (00000/) or tars (00000.tar)")
        if tars:
            return TARS, lambda skipped: read_samples(in_tars(tars), path, skipped)
        return FILES, lambda skipped: read_samples(in_folders(path, shards), path, skipped)
    try:
        with open(path, "rb") as file:
            head = file.read(200).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); is the path right?") from None
    if not re.match(rb"\s*(\[\s*)?\{", head):
        return TSV, partial(read_tsv, path)
    records = Records(path)
    if records.kind != CAPTIONS:
        raise UserError(f'{path}: holds {records.kind}, expected captions: {{"image", "caption"}}')
    return JSON, lambda skipped: read_records(records)


def read_records(records: Records):
    try:
        for i in range(len(records)):
            yield records[i], None
    except ValueError as error:  # the file was changed
        raise UserError(str(error)) from None


def read_tsv(path: Path, skipped: Counter):
    """Lines `caption<TAB>url`. The picture of line i, from 0, is GCC_train_{i}.jpg, as LLaVA's 595K name it; a heading
    `caption<TAB>url`, which img2dataset wants, is not counted."""
    with open(path, "rb") as file:
        heading = file.readline().split() == [b"caption", b"url"]
        if not heading:
            file.seek(0)
        for i, line in enumerate(file):
            try:
                caption, _url = line.decode().split("\t", 1) if line.strip() else ("", "")
            except ValueError:
                raise UserError(f"{path}: line {i + 1 + heading} is not caption<TAB>url in UTF-8, as each line of "
                                "Train_GCC-training.tsv is; get the file anew") from None  # fmt: skip
            if caption.strip():
                yield {"id": f"GCC_train_{i:09}", "image": f"GCC_train_{i:09}.jpg", "caption": caption}, None
            else:
                skipped["without a caption"] += 1


def read_samples(samples, path: Path, skipped: Counter):
    """samples: (name, {ending: a function that reads the file of that name and ending}). img2dataset's .txt is the
    caption, its .json the caption, the status and more. No path is taken from a .json."""
    for name, parts in samples:
        try:
            about = dict(json.loads(parts[".json"]())) if ".json" in parts else {}
            if about.get("caption") is None and ".txt" in parts:
                about["caption"] = parts[".txt"]().decode()
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: {visible(name)}: its .json or .txt is damaged ({visible(str(error))[:200]}); "
                            "mend or remove it") from None  # fmt: skip
        caption, ending = about.get("caption"), next((ending for ending in ENDINGS if ending in parts), None)
        if about.get("status", "success") != "success":
            skipped["not downloaded"] += 1
        elif not isinstance(caption, str) or not caption.strip():
            skipped["without a caption"] += 1
        elif not ending:
            skipped["without a picture"] += 1
        else:
            yield {"id": PurePosixPath(name).name, "image": name + ending, "caption": caption}, parts[ending]


def in_folders(path: Path, shards: list[Path]):
    pictures = Pictures(path)
    for shard in shards:
        for key, names in itertools.groupby(sorted(os.listdir(shard)), lambda name: name.partition(".")[0]):
            yield f"{shard.name}/{key}", {n[len(key) :]: partial(pictures.read, f"{shard.name}/{n}") for n in names}


def in_tars(paths: list[Path]):
    def damaged(error):
        return UserError(f"{path}: damaged, or no uncompressed tar ({visible(str(error))[:200]}); get it anew or move "
                         "it away")  # fmt: skip

    def read(member: tarfile.TarInfo) -> bytes:
        try:
            if member.size > MAX_BYTES:
                raise OSError(f"{member.name} has {member.size} bytes, over the limit of {MAX_BYTES}")
            return tar.extractfile(member).read()  # type: ignore[union-attr]  # of a file: never None
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise damaged(error) from None

    def members(tar: tarfile.TarFile):
        """tarfile takes a damaged header for the end; or it may send it back, for ever."""
        last = -1
        for member in tar:
            if member.offset <= last or member.size < 0:
                raise tarfile.ReadError("a header is damaged")
            last = member.offset
            if member.isfile():
                yield member
        with open(path, "rb") as file:
            file.seek(tar.offset)
            if file.read(512) != bytes(512):  # the mark of the end
                raise tarfile.ReadError("it ends too early")

    def key(member):
        return PurePosixPath(member.name).name.partition(".")[0]

    for path in paths:
        try:
            with tarfile.open(path, "r:") as tar:
                for name, parts in itertools.groupby(members(tar), key):
                    yield name, {PurePosixPath(m.name).name[len(name) :]: partial(read, m) for m in parts}
        except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
            raise damaged(error) from None


# --- noun phrases. Each way: the number of processes -> its name for the report, and texts -> the phrases of each.


def with_spacy(processes: int):
    """spaCy's noun chunks in lower case, without articles and signs at their start; a pronoun alone is none."""
    try:
        import spacy

        nlp = spacy.load(MODEL, exclude=["ner", "lemmatizer"])
    except (ImportError, OSError):
        raise UserError(f"--phrases spacy needs `pip install spacy` and `python -m spacy download {MODEL}`; without "
                        "them, --phrases simple is an approximation") from None  # fmt: skip

    def normal(chunk):
        words = chunk.text.lower().split()
        return " ".join(itertools.dropwhile(lambda w: w in FUNCTION_WORDS or not w[0].isalnum(), words))

    def phrases_of(texts):
        for doc in nlp.pipe(texts, n_process=processes, batch_size=256):
            yield [phrase for phrase in map(normal, doc.noun_chunks) if phrase]

    return f"spaCy {spacy.__version__}, {MODEL} {nlp.meta['version']}", phrases_of


def simply(processes: int):
    """An approximation: the longest runs of words with no function word, common verb or punctuation between them. Other
    verbs and adverbs end up in phrases ("dog chases cat" is one), so there are more phrases, and rarer ones.

    "a man wearing the red hat of his father 's friend" -> ["man", "red hat", "father", "friend"]
    """

    def phrases_of(texts):
        for text in texts:
            runs = itertools.groupby(
                WORD.findall(text.lower()), lambda w: w[0].isalnum() and w not in FUNCTION_WORDS and w not in VERBS
            )
            yield [" ".join(run) for within, run in runs if within]

    return "runs of words between function words, common verbs and punctuation (an approximation)", phrases_of


PHRASES = {"spacy": with_spacy, "simple": simply}


def digest(phrase: str) -> bytes:
    return hashlib.blake2b(phrase.encode(), digest_size=8).digest()


# --- the subset


def by_phrase(hashes: np.ndarray, per_caption: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Turns the phrases of each caption into the captions of each phrase.

    hashes (M,): the phrases of caption 0, each once, then of caption 1, ...; per_caption (n,): how many each has.
    Returns the hashes of the phrases (P,), starts (P+1,) and captions (M,): those that hold phrase p are
    captions[starts[p] : starts[p + 1]].
    """
    owners = np.repeat(np.arange(len(per_caption), dtype=np.int32), per_caption)  # (M,)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))  # (P,)
    return hashes[starts], np.append(starts, len(hashes)), owners[order]


def balanced(starts: np.ndarray, captions: np.ndarray, n: int, least: int, most: int, seed: int) -> np.ndarray:
    """Which of n captions are taken (n,) bool: of each phrase in `least` captions or more, the rarest first, all of
    them, or a random `most`. What other phrases have brought in is not counted, so the order changes no number that
    matters: the result is the union."""
    counts, taken, dice = np.diff(starts), np.zeros(n, dtype=bool), np.random.default_rng(seed)
    for p in np.argsort(counts, kind="stable")[np.count_nonzero(counts < least) :]:
        holding = captions[starts[p] : starts[p + 1]]
        taken[holding if len(holding) <= most else dice.choice(holding, most, replace=False)] = True
    return taken


def expanded(record: dict, dice: random.Random) -> bytes:
    """A record of chat.json: a request drawn at random, the picture before or after it, and the caption (Eq. 2)."""
    example = from_caption(record, dice)
    turns = [{"from": role, "value": turn} for role, turn in zip(("human", "gpt"), example.turns)]
    return json.dumps({"id": example.id, "image": example.image, "conversations": turns}).encode()


# --- the report


def histogram(before: np.ndarray, after: np.ndarray, least: int) -> list[dict]:
    """How many phrases are in 1 to 2 captions, in 3 to 9, 10 to 99, 100 to 999, ..."""
    edges = sorted({1, least, *(10**k for k in range(1, len(str(before.max())) + 1))})
    before, after = (np.histogram(counts, edges)[0].tolist() for counts in (before, after))
    return [dict(captions=f"{low:,} to {high - 1:,}", before=b, after=a)
            for low, high, b, a in zip(edges, edges[1:], before, after)]  # fmt: skip


def table(report: dict) -> str:
    rows = [("captions", report["captions"]), ("different noun phrases", report["phrases"])]
    rows += [(f"  in {row['captions']} captions", row) for row in report["histogram"]]
    rows += [(f'"{visible(row["phrase"])[:38]}"', row) for row in report["most_frequent"]]
    lines = [f"{'':42}{'before':>12}{'after':>12}"]
    lines += [f"{name:42}{row['before']:>12,}{row['after']:>12,}" for name, row in rows]
    return "\n".join(lines + [f"skipped, {why}: {count:,}" for why, count in report["skipped"].items()])


def draw(path: Path, before: np.ndarray, after: np.ndarray):
    """How many captions hold a phrase, by the phrase's rank."""
    path.unlink(missing_ok=True)  # an earlier one's
    try:
        with drawing(path) as figure:
            figure.set_size_inches(6, 4)
            axes = figure.subplots()
            for name, counts in dict(before=before, after=after).items():
                counts = np.sort(counts[counts > 0])[::-1]
                ranks = np.unique(np.geomspace(1, len(counts), 1000).astype(int))
                axes.loglog(ranks, counts[ranks - 1], label=f"{name}: {len(counts):,} noun phrases")
            axes.set(xlabel="rank of the noun phrase", ylabel="captions that hold it")
            axes.legend()
    except UserError as error:
        print(f"no {path}: {error}")


# --- the command line


def refuse_to_overwrite(out: Path):
    """Only what this file wrote may be written over. (Names with a dot: what is left of a run that was killed.)"""
    if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
        report = out / "report.json"
        if not report.is_file() or not {"phrases_by", "histogram"} <= read_json(report, dict).keys():
            raise UserError(f"{out}: is there already and is no output of prepare_cc3m.py; give another --out")


def prepare(a):
    for name in ("at_least", "at_most", "processes"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: must be 1 or more")
    if a.seed < 0:
        raise UserError(f"--seed {a.seed}: must be 0 or more")
    try:
        refuse_to_overwrite(a.out)
    except OSError as error:
        raise UserError(f"{a.out}: cannot be read ({reason(error)}); give another --out") from None
    kind, read = open_captions(a.data)
    phrases_by, phrases_of = PHRASES[a.phrases](a.processes)
    print(f"{a.data}: {kind}; noun phrases: {phrases_by}", flush=True)

    def text(record):
        return record["caption"][:LONGEST].encode("utf-8", "replace").decode()  # no half characters

    hashes, per_caption, skipped = bytearray(), array("H"), Counter()
    texts = (text(record) for record, _ in read(skipped))
    for phrases in tqdm(phrases_of(texts), "noun phrases", unit=" captions", unit_scale=True):
        phrases = set(phrases)
        per_caption.append(len(phrases))
        hashes += b"".join(map(digest, phrases))
    n = len(per_caption)
    if not hashes:
        raise UserError(f"{a.data}: no noun phrase in its {n} captions ({skipped.total()} were skipped)")
    keys, starts, captions = by_phrase(np.frombuffer(hashes, "<u8"), np.frombuffer(per_caption, "H"))
    del hashes
    taken = balanced(starts, captions, n, a.at_least, a.at_most, a.seed)  # (n,)
    if not taken.any():
        raise UserError(f"{a.data}: no noun phrase is in {a.at_least} of its {n} captions; lower --at-least")
    before, after = np.diff(starts), np.add.reduceat(taken[captions], starts[:-1], dtype=np.int64)  # (P,)
    frequent = np.argsort(-before, kind="stable")[:10]
    to_spell, spelled = set(captions[starts[frequent]].tolist()), []  # a caption that holds each, its text

    with contextlib.ExitStack() as stack:  # the files get their names at the end, report.json last
        report_file, chat = (stack.enter_context(replacing(a.out / name)) for name in ("report.json", "chat.json"))
        if kind == TARS:
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(replacing(a.out / "images.zip")), "w"))
        i, separator = -1, b"[\n"
        for i, (record, picture) in enumerate(tqdm(read(Counter()), "chat.json", n, unit=" captions", unit_scale=True)):
            if i in to_spell:
                spelled.append(text(record))
            if i >= n or not taken[i]:
                continue
            try:
                chat.write(separator + expanded(record, random.Random(f"{a.seed} {i}")))
                if kind == TARS:
                    if (image := record["image"]) in archive.NameToInfo:
                        raise UserError(f"{a.data}: two pictures are named {visible(image)}, but img2dataset repeats "
                                        "no name; are tars of two data sets there?")  # fmt: skip
                    archive.writestr(zipfile.ZipInfo(image), picture())
            except ValueError as error:  # a name that leads out of the folder, or is no text
                raise UserError(f"{a.data}: caption {i}: {visible(str(error))[:200]}; rename it") from None
            separator = b",\n"
        if i + 1 != n:
            raise UserError(f"{a.data}: had {n} captions and then {i + 1}; it has changed meanwhile, start again")
        chat.write(b"\n]\n")
        names = {digest(phrase): phrase for phrases in phrases_of(spelled) for phrase in phrases}
        report = dict(
            data=str(a.data), kind=kind, phrases_by=phrases_by, at_least=a.at_least, at_most=a.at_most, seed=a.seed,
            skipped=skipped, captions=dict(before=n, after=int(taken.sum())),
            phrases=dict(before=len(before), after=int(np.count_nonzero(after))),
            histogram=histogram(before, after, a.at_least),
            most_frequent=[dict(phrase=names.get(keys[p].tobytes(), "?"), before=int(before[p]), after=int(after[p]))
                           for p in frequent],
        )  # fmt: skip
        report_file.write(json.dumps(report, indent=2).encode() + b"\n")
    if kind != TARS:
        (a.out / "images.zip").unlink(missing_ok=True)  # an earlier one's
    draw(a.out / "report.png", before, after)
    print(f"{table(report)}\nfor train.py: --data {a.out / 'chat.json'} --images",
          {TARS: a.out / "images.zip", FILES: a.data}.get(kind, "the pictures"))  # fmt: skip


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpForm)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="PATH", help="Train_GCC-training.tsv, a folder that img2dataset "
        "wrote (files or webdataset), or captions as JSON")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help="folder for chat.json, a report, and images.zip of tars")
    add("--phrases", choices=PHRASES, default="spacy", help="finds noun phrases; simple is an approximation")
    add("--processes", type=int, default=1, help="of spaCy")
    add("--at-least", type=int, default=3, help="captions of a phrase; a rarer one is left out")
    add("--at-most", type=int, default=100, help="captions that are drawn for a phrase")
    add("--seed", type=int, default=0, help="of what is drawn")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # phrases may hold any character
    run_command(lambda: prepare(parse_arguments()))
