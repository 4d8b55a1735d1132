"""Fuzzes every loader: mutated JSON, checkpoints, zips and pictures load or give one clear line, and do nothing else.

    python tests/fuzz.py --cases 20000
    python tests/fuzz.py --only 1234 --seed 0          # one case again, with its traceback

Each case damages one or two good files, blindly or knowing the format, and loads them. A finding is: an exception that
is no UserError (or, of a picture, ValueError); a message of several lines or without the file's name; a process that
died (-14: it hung); much time or memory; a file touched, a program started, a file opened that is not of the case.
"""

import argparse
import io
import json
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import test_checkpoint as made
import torch
import torch.distributed as dist
from conftest import ROOT, tiny_tokenizer
from PIL import Image
from test_data import SCIENCEQA
from tqdm import tqdm

import checkpoint
import data
import eval_scienceqa
from conversation import UserError, show, stop_ids, tokenize
from parallel import Replicas, Shards

MEMORY = {"pictures in a folder": 1500, "pictures in a zip": 700}  # MiB; else 256
READABLE = (sys.prefix, sys.base_prefix, str(ROOT), "/usr/lib", "/lib", "/proc", "/sys", "/etc/mime.types")  # Python's
ACTS = "os.(system|exec|posix_spawn|fork|r|mkdir|link|symlink|chmod|trunc)|subprocess|socket|shutil|ctypes.dlopen"
PICTURES = ["a.png", "b.jpg", "c.gif", "d.webp", "e.tiff", "f.bmp", "g.ppm"]
TOKENIZER = tiny_tokenizer.__wrapped__()
DID = []  # what was done: ("" or the path that was read, in words)


# --- the loaders: what is done with a folder of (once) good files


def read_examples(folder):
    for absent in ("keep", "text", "refuse"):
        examples = data.Examples([folder] if folder.name == "scienceqa" else folder.iterdir(), absent=absent)
        examples.types(), examples.describe()
        for example in map(examples.__getitem__, range(len(examples))):
            show(TOKENIZER, *tokenize(TOKENIZER, example.turns, 4 if example.image else 0))
            place = os.path.normpath(f"/there/{example.image}")
            assert place.startswith("/there/") and not {"\0", "\\"} & {*place}, f"{place!r} leads out"
    if folder.name == "scienceqa":
        eval_scienceqa.table(problems := examples.parts[0].records, eval_scienceqa.score(problems, {"1": "B"}))


def read_pictures(path):
    encode, errors = data.Encoder(TOKENIZER, 4, 28, data.Pictures(path), 2048), []
    for name in ("../../outside", "/etc/hostname", *PICTURES):
        try:
            pixels = encode(data.Example("1", ["<image>\nWhat?", "A cat."], name))[2]
            assert pixels.shape == (3, 28, 28) and name in PICTURES
        except ValueError as error:
            errors.append(str(error))
            assert not (fault := judge(str(error), name)), fault
    if errors[2:]:
        raise UserError(f"{path}: {errors[2]}")


def trained(way):  # -> a process that trains a single layer in one of the two ways; its optimizer
    share, layer = way.__new__(way), torch.nn.Linear(8, 8)
    share.model, share.step, share.trained = layer, None, dict(layer.named_parameters())
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 8)).sum().backward(), optimizer.step()
    return share, optimizer


def read_state(way, folder):
    state, (share, optimizer) = way.saved(folder), trained(way)
    try:
        share.load(folder, state, optimizer)
    except Exception as error:
        raise UserError(f"{folder}/state: is of another model ({checkpoint.reason(error)})") from None


LOADERS = {  # name -> folder, loader
    "conversations": ("chat", read_examples),
    "captions": ("captions", read_examples),
    "ScienceQA": ("scienceqa", read_examples),
    "predictions": ("predictions", lambda f: eval_scienceqa.read_predictions(f / "answers.json")),
    "pictures in a folder": ("pictures", read_pictures),
    "pictures in a zip": ("zip", lambda f: read_pictures(f / "images.zip")),
    "load_llama, raw": ("run/llama", lambda f: (checkpoint.load_llama(f), checkpoint.llama_config(f))),
    "load_llama, .bin": ("hf", checkpoint.load_llama),
    "load_llama, .safetensors": ("safe", checkpoint.load_llama),
    "load_vision, OpenAI": ("openai", lambda f: checkpoint.load_vision(f / "ViT.zip")),
    "load_vision, folder": ("clip", checkpoint.load_vision),
    "load_projector": ("projector", lambda f: [checkpoint.load_projector(path) for path in f.iterdir()]),
    "load_run, stage 1": ("run", lambda f: checkpoint.load_run(f / "run")),
    "load_run, stage 2": ("stage2", lambda f: checkpoint.load_run(f / "run")),
    "load_state": ("replicas", lambda f: read_state(Replicas, f)),
    "load_shards": ("shards", lambda f: read_state(Shards, f)),
    "load_tokenizer": ("tokenizer", lambda f: stop_ids(checkpoint.load_tokenizer(f / "tokenizer.model"))),
}


def make(case: Path):
    """The good files of every loader."""
    for folder in "captions chat openai pictures predictions projector scienceqa/images/test/1 tokenizer".split():
        (case / folder).mkdir(parents=True)
    llama = made.their_llama(4, vocab_size=340)
    made.write_raw(llama, case / "run/llama", 2)
    made.write_hf(llama, case / "hf", "bin index")
    made.write_hf(llama, case / "safe", "safetensors index")
    clip = made.their_clip(hidden_size=64, intermediate_size=256, num_attention_heads=1)
    clip.save_pretrained(case / "clip")
    weights = {k: w for k, w in made.in_openai_layout(clip).items() if ".2." not in k and ".3." not in k}
    made.write_torchscript(weights, case / "openai/ViT.zip")
    torch.save(weights, case / "run/vit.pt")
    torch.save({"weight": torch.ones(9, 9)}, case / "projector/W.old", _use_new_zipfile_serialization=False)
    torch.save({"model.mm_projector.weight": torch.ones(9, 9)}, case / "projector/projector.pth")
    exif, image = Image.Exif(), Image.radial_gradient("L").resize((20, 14))
    exif[274] = 6  # lies on its side
    image.save(case / "scienceqa/images/test/1/image.png")
    for name in PICTURES:
        image.convert("RGB").save(case / "pictures" / name, exif=exif, compression="tiff_lzw")
    shutil.make_archive(case / "zip/images", "zip", case / "pictures")
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A \u00fc cat."}]
    captions = [{"image": f"{i}.png", "caption": f"A cat, {i} \u00fc"} for i in range(5)]
    for name, content in {
        "chat/chat.json": [{"id": "1", "image": "1.png", "conversations": talk * 2},
                           {"id": 3, "conversations": [{"from": "human", "value": "Hi"}, talk[1]]}],
        "captions/list.json": captions, "captions/lines.jsonl": "\n".join(map(json.dumps, captions)).encode(),
        "scienceqa/problems.json": {id: SCIENCEQA[id] | {"subject": "x", "grade": "grade4"} for id in "12"},
        "scienceqa/pid_splits.json": {"train": ["2", "1"], "test": []},
        "predictions/answers.json": {"acc": 50.0, "outputs": {"1": "The answer is B.", "2": "B", "3": "A. cat"}},
        **{f"{place}/tokenizer.model": TOKENIZER.serialized_model_proto() for place in ("tokenizer", "run/llama")},
    }.items():  # fmt: skip
        (case / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    llava = checkpoint.build(checkpoint.load_llama(case / "run/llama"), checkpoint.load_vision(case / "run/vit.pt"))
    shutil.copytree(case / "run", case / "stage2")
    made.save(case / "run", llava, 1), made.save(case / "stage2", llava, 2)
    shutil.rmtree(case / "stage2/llama")
    dist.init_process_group("gloo", init_method=f"file://{case}/store", rank=0, world_size=1)
    for way in (Replicas, Shards):
        share, optimizer = trained(way)
        share.save(case / way.__name__.lower(), 7, optimizer)
    dist.destroy_process_group()


# --- mutations: (bytes, dice) -> bytes

NUMBERS = [0, 1, 2, 3, 64, -1, 255, 9999, 10_000, 30_000, 65535, 10**6, 2**24, 2**31, 2**32 - 1, 2**40, 2**63, 2**64]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000 + "]" * 100_000, "[" * 900 + "]" * 900,
       '{"a":' * 5000 + "1" + "}" * 5000, "[" * 3000, "00", "'a'", "-0.0", "\\ud800", '"\0"', "\ufeff"]  # fmt: skip
TEXTS = [*["../../outside", "../../../../outside", "/etc/hostname"] * 4, "", "\0", "a\0b", "..", "/dev/zero", "C:\\a",
         "a\nb", "\x1b[2J", "\ud800", "\u3000", "\u2028", "<image>", "\n<image>", "###", "</s>", "a" * 100_000, "meta",
         "grade\u00b2", "grade" + "9" * 5000, "y" * 300, "n/" * 3000, "layers.9999.a", "visual.layer1.0"]  # fmt: skip
HOSTILE = [*NUMBERS, *TEXTS, *["@RAW@"] * 5, None, True, 0.5, [], {}, [[]], {"a": 1}, [None], [1, "a"], {"": ""}]
NAMES = ["os system", "posix system", "builtins eval", "torch load", "__torch__ os.system", "torch FloatStorage",
         "builtins bytearray", "torch.distributed.checkpoint.metadata BytesStorageMetadata"]  # fmt: skip
TENSORS = [  # what may stand where a tensor t was
    lambda t: t[None], lambda t: t.T.clone(), lambda t: t.double(), lambda t: t.half(), lambda t: t.int(),
    lambda t: t.to(torch.complex64), lambda t: t.to(torch.float8_e4m3fn), lambda t: t * torch.nan, lambda t: (t, t),
    lambda t: t.to("meta"), lambda t: t.to_sparse(), lambda t: torch.ones(8, 8).to_sparse_csr(),
    lambda t: torch.ones(0, 64), lambda t: torch.ones(1).expand(10**6, 10**6), lambda t: torch.ones(()).expand(t.shape),
    lambda t: torch.empty(2**40, 0), lambda t: torch._neg_view(t.float()), lambda t: torch.nn.Parameter(t.float()),
    lambda t: torch.nested.nested_tensor([t[None]]), lambda t: torch.quantize_per_tensor(t.float(), 1, 0, torch.qint8)
]  # fmt: skip
BOMB = zlib.compress(bytes(8 * 10**8), wbits=-15)  # deflated
FORMATS = [  # of pictures: a mark; where after it are width, height and other numbers; how they are written
    (b"IHDR", (4, 8), ">I"), (b"\xff\xc0", (5, 7), ">H"), (b"GIF8", (6, 8), "<H"), (b",\0\0\0\0", (5, 7), "<H"),
    (b"VP8 ", (14, 16), "<H"), (b"BM", (18, 22, 10, 28, 30), "<I"), (b"\0\1\3\0", range(4, 150, 4), "<I"),
]  # fmt: skip


def blind(whole: bytes, dice) -> bytes:
    """Bits, bytes, chunks and ends, without a thought of what they mean."""
    out, near = bytearray(whole), dice.choice([len(whole), 64])
    for _ in range(dice.choice([1, 1, 2, 4, 16])):
        at, to, size = dice.randrange(near + 1), dice.randrange(len(out) + 1), dice.choice([1, 4, 8, 64, 1024])
        number = dice.choice(NUMBERS) % 2**32
        new, old = dice.choice([
            (bytes(byte ^ 1 << dice.randrange(8) for byte in out[at : at + 1]), 1), (dice.randbytes(1), 1),
            (struct.pack("<I", number), 4), (struct.pack(">I", number), 4), (struct.pack("<Q", number**2), 8),
            (out[to : to + size], 0), (out[to : to + size], size), (b"", size), (dice.randbytes(size), 0),
            (b"", dice.choice([size, size, len(out)])),
        ])  # fmt: skip
        out[at : at + old] = new
    return bytes(out)


def nodes(value) -> list:  # of (container, key), pictures' paths more often
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [node for key in keys for node in ([(value, key)] * 5 ** (key == "image") + nodes(value[key]))]


def json_edit(whole: bytes, dice) -> bytes:
    if whole[:1] not in b"[{":  # safetensors: a length, a JSON of so many bytes, the numbers
        size = 8 + int.from_bytes(whole[:8], "little")
        header = json_edit(whole[8:size], dice)
        return len(header).to_bytes(8, "little") + header + whole[size:]
    lines = b"}\n{" in whole
    root = [[json.loads(line) for line in whole.splitlines()] if lines else json.loads(whole)]
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        (box, key), (other, name), kind = *dice.choices(nodes(root), k=2), dice.randrange(7)
        if kind == 0 and box is not root:
            del box[key]
        elif kind == 1 and isinstance(box, dict):
            box[dice.choice(TEXTS)] = box.pop(key)
        else:
            values = [dice.choice(HOSTILE), dice.choice(HOSTILE), other[name], [box[key]], {"a": box[key]}]
            box[key] = json.loads(json.dumps(dice.choice(values)))  # a copy
    ascii, lines = dice.random() < 0.5, lines and isinstance(root[0], list)
    texts = [json.dumps(value, ensure_ascii=ascii) for value in (root[0] if lines else root[:1])]
    return "\n".join(texts).replace('"@RAW@"', dice.choice(RAW)).encode("utf-8", "surrogatepass")


def zip_edit(whole: bytes, dice) -> bytes:
    """Entries of other names, contents, pickles, methods; header fields that lie; an entry that is a bomb."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = [[info.filename, archive.read(info), info.compress_type] for info in archive.infolist()]
    pickles, kind = [entry for entry in entries if entry[0].endswith("/data.pkl")], dice.randrange(6)
    if pickles and dice.random() < 0.5:
        pickles[0][1], kind = pickle_edit(pickles[0][1], dice), -1
    entry, other = dice.choices(entries, k=2)
    if kind == 0:
        entry[0] = dice.choice(["", entry[0]]) + dice.choice(TEXTS)[:60_000].encode("utf-8", "replace").decode() + "x"
    elif kind == 1:
        entry[1:] = dice.choice([other[1], blind(entry[1], dice)]), dice.choice([0, 0, 8, 12, 14])
    elif kind == 2:
        entries = dice.sample(entries, len(entries) - dice.randrange(2)) + [other]  # a name twice, and perhaps one less
    elif kind == 3:
        entry[1:] = BOMB, 0  # stored, until its headers say otherwise
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, content, method in entries:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    out, name = bytearray(file.getvalue()), entry[0].encode()
    if kind == 3:
        for at in (out.index(BOMB) - len(name) - 22, out.rindex(name + b"PK") - 36):
            out[at], out[at + 14 : at + 18] = 8, struct.pack("<I", dice.choice([8 * 10**8, 8 * 10**8, 1000, 2**28]))
    for _ in range(dice.choice([1, 1, 2]) if kind > 3 else 0):
        sign, length = dice.choice([(b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22)])
        at = dice.choice([match.start() for match in re.finditer(sign, out)]) + dice.randrange(4, length, 2)
        size, old = dice.choice([2, 4]), int.from_bytes(out[at : at + 4], "little")
        out[at : at + size] = struct.pack("<Q", dice.choice([*NUMBERS, old + 1, old * 99]) % 2**64)[:size]
    return bytes(out)


def pickle_edit(whole: bytes, dice) -> bytes:
    """Opcodes left out, doubled, exchanged, with other arguments; calls of what must never be called."""
    whole = pickle.dumps(pickle.loads(whole), 2) if whole[1] > 2 else whole  # a saved share's description
    ops = list(pickletools.genops(whole))
    parts = [whole[start:end] for (_, _, start), end in zip(ops, [*(start for _, _, start in ops[1:]), len(whole)])]
    ints, texts, classes = ([i for i, (op, arg, _) in enumerate(ops) if re.search(kind, op.name) and arg is not None
       for _ in range(20 if "distcp" in str(arg) else 1)] for kind in ("INT|LONG", "BINUNICODE", "GLOBAL"))  # fmt: skip
    for _ in range(dice.choice([1, 1, 1, 2, 3, 5])):
        (i, j), kind, name = dice.choices(range(1, len(parts)), k=2), dice.randrange(8), dice.choice(NAMES).split()
        name, text = "{}\n{}\n".format(*name).encode(), dice.choice(TEXTS).encode("utf-8", "surrogatepass")
        if kind < 2:
            parts[i], parts[j] = dice.choice([(b"", parts[j]), (parts[i] * 2, parts[j]), (parts[j], parts[i])])
        elif kind < 6:
            new = (ints, b"\x8a\x09" + dice.choice(NUMBERS).to_bytes(9, "little", signed=True)), (classes, b"c" + name)
            places, new = dice.choice([*new, (texts, b"X" + struct.pack("<I", len(text)) + text)])
            parts[dice.choice(places or [1])] = new
        else:  # a call, the result of which is kept or dropped; 2**33 asks for much memory
            given = dice.choice([b"X\x0b\0\0\0touch PWNED", b"\x8a\x05\0\0\0\0\2"])
            calls = [b"c" + name + given + b"\x85R", b"(" + given + b"i" + name]
            parts[i] += dice.choice(calls) + dice.choice([b"0", b""])
    return b"".join(parts)


def tensor_edit(whole: bytes, dice) -> bytes:
    """Another tensor, another name, another kind of container: all that torch.save can write."""
    weights, file = torch.load(io.BytesIO(whole), weights_only=True), io.BytesIO()
    (box, key), kind = dice.choice(nodes(weights)), dice.randrange(6)
    if kind < 3:
        box[key] = dice.choice(TENSORS)(box[key] if isinstance(box[key], torch.Tensor) else torch.ones(8, 8))
    elif kind == 3:
        box[key] = dice.choice(HOSTILE)
    elif isinstance(box, dict):
        box[dice.choice([*TEXTS, 7, None, (1, 2), f"{key}.x"])] = box.pop(key) if kind == 4 else box[key]
    weights = dice.choice([weights] * 99 + [list(weights), tuple(weights.values()), {}, None, 3, torch.ones(3)])
    torch.save(weights, file, _use_new_zipfile_serialization=dice.random() < 0.9)
    return file.getvalue()


def picture_edit(whole: bytes, dice) -> bytes:
    out, (mark, offsets, form) = bytearray(whole), dice.choice([row for row in FORMATS if row[0] in whole])
    at, size = whole.index(mark) + dice.choice(offsets), struct.calcsize(form)
    out[at : at + size] = struct.pack(form, dice.choice(NUMBERS) % 256**size)
    if mark == b"IHDR":
        out[29:33] = struct.pack(">I", zlib.crc32(out[12:29]))
    return bytes(out)


WAYS = {  # the mutations that fit a file
    **dict.fromkeys((".json", ".jsonl", ".safetensors"), [json_edit] * 2), "": [pickle_edit] * 2,  # .metadata
    **dict.fromkeys((".zip", ".distcp"), [zip_edit]), **dict.fromkeys((".pt", ".pth", ".bin"), [zip_edit, tensor_edit]),
    ".old": [tensor_edit, pickle_edit], **dict.fromkeys([name[1:] for name in PICTURES[:-1]], [picture_edit]),
}  # fmt: skip


# --- a case, and what is found in it


def judge(message: str, name: str) -> str:
    """What is wrong with a message: it is one line that names the file, and no sign of it acts on the terminal."""
    text = "".join(c for c in message if not 0xD800 <= ord(c) < 0xE000)
    right = text.isprintable() and len(text) < 1000 and name in text
    return "" if right else f"message of several lines, or too long, or without the file's name: {message[:300]!r}"


def tree(root: Path) -> dict[str, int]:
    paths = [os.path.join(folder, file) for folder, _, files in os.walk(root) for file in ("", *files)]
    return {path: os.lstat(path).st_mtime_ns for path in paths}


def watch(event, arguments):
    """Python's audit hook: what a loader opens, and what else it does to the world."""
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, writes = os.path.abspath(os.fsdecode(arguments[0])), os.O_WRONLY | os.O_RDWR | os.O_CREAT
        DID.append(("" if (arguments[2] or 0) & writes else path, f"open {path}"))
    elif re.match(ACTS, event) and not (event == "ctypes.dlopen" and arguments[0] is None):
        DID.append(("", f"{event} {arguments!r:.100}"))


def one(i: int, seed: int, root: Path) -> tuple[str, str, str, int]:
    """Runs case i -> "loaded", "refused" or "finding", what was done, what was found, MiB that were taken."""
    dice, (name, (folder, load)) = random.Random(f"{seed} {i}"), list(LOADERS.items())[i % len(LOADERS)]
    folder, done, end, found = root / "case" / folder, [], "loaded", ""
    shutil.rmtree(folder)
    shutil.copytree(root / "good" / folder.relative_to(root / "case"), folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in dice.sample(files, min(len(files), dice.choice([1, 1, 1, 2]))):
        way = dice.choice([blind, *WAYS.get(path.suffix, []) * 2])
        path.write_bytes(way(path.read_bytes(), dice))
        done.append(f"{way.__name__} {path.relative_to(folder)}")
    before, began, low = tree(root), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    DID.clear(), signal.alarm(60)
    try:
        load(folder)
    except UserError as error:
        end, found = "refused", judge(str(error), "/" if "load_run" in name else str(folder))
    except BaseException:
        found = traceback.format_exc()
    readable = ("/" if "load_run" in name else f"{root}/case", *READABLE)  # the paths in a run are settings: anywhere
    did = [what for path, what in DID if not path.startswith(readable)]
    seconds, grown = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - low >> 10
    did += [f"touched {path}" for path, _ in before.items() ^ tree(root).items()]
    if did or seconds > 10 or grown > MEMORY.get(name, 256):
        found = f"took {seconds:.1f} s, {grown} MiB, did {str(did[:3])[:500]} {found}"
    return "finding" if found else end, ", ".join(done), found, grown


def results(cases, seed: int, root: Path):
    """Yields what `one` returns of each case. A child runs them, until one kills it or takes much memory."""
    while cases:
        get, put = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                os.chdir(root / "cwd")
                resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30,) * 2)  # so that the machine lives
                for standard in (1, 2) if len(cases) > 1 else ():  # libraries in C print what they like
                    os.dup2(os.open(os.devnull, os.O_WRONLY), standard)
                sys.addaudithook(watch)
                for i in cases:
                    os.write(put, f"{json.dumps(result := one(i, seed, root))}\n".encode())
                    if result[3] > 50:
                        os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(put)
        with open(get) as pipe:
            for line in pipe:
                yield json.loads(line)
                cases = cases[1:]
        if (status := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) and cases:
            yield "finding", "a replay tells", f"the process died: {status}", 0
            cases = cases[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="CASE", help="one case again")
    a = parser.parse_args()
    counts, cases = Counter(), range(a.cases) if a.only is None else [a.only]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        (root / "cwd").mkdir(), torch.manual_seed(0), make(root / "case")
        shutil.copytree(root / "case", root / "good")
        for folder, load in LOADERS.values():
            load(root / "case" / folder)  # they are good, and what is imported late is there
        for i, (end, done, found, _) in zip(tqdm(cases), results(cases, a.seed, root)):
            name = list(LOADERS)[i % len(LOADERS)]
            counts[name, end] += 1
            if found and counts[name, end] <= 5:
                tqdm.write(f"case {i}, {name} ({done}): {found}")
    for name in LOADERS:
        print(f"{name:28}", *(f"{counts[name, end]:8} {end}" for end in ("loaded", "refused", "finding")))
    raise SystemExit(any(end == "finding" for _, end in counts))


if __name__ == "__main__":
    main()
