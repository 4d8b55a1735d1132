"""Fuzzes every loader: mutated JSON, checkpoints, zips and pictures load or give one clear line, and do nothing else.

    python tests/fuzz.py --cases 20000
    python tests/fuzz.py --only 1234          # one case again, alone, with its traceback

Good files are made once; each case damages one or two of them, blindly (bits, chunks, lengths) or knowing the format
(hostile JSON values, zip fields that lie, pickle opcodes and `os.system`, tensors of other kinds, huge dimensions), and
loads them in a child process. A finding is: an exception that is no UserError (or, of a picture, ValueError); a message
of several lines or without the file's name; a process that died; more than 10 s or too much memory; a file touched, a
program started, or a file opened that is not of the case. Exit status 1 if there is any.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import pickletools
import random
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections import Counter
from functools import cache
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import test_checkpoint as made
from test_data import SCIENCEQA

import checkpoint
import data
import demo
import eval_scienceqa
from conversation import UserError, load_tokenizer, show, stop_ids, tokenize
from model import LLaMAConfig
from parallel import Shards

ROOT = Path(__file__).parent.parent
SECONDS, MESSAGE = 10, 1000  # of the processor's time; characters
MEMORY = Counter({"pictures in a folder": 1500, "pictures in a zip": 700})  # MiB, else 256
SYSTEM = [
    sys.prefix,
    sys.base_prefix,
    str(ROOT),
    "/usr/lib",
    "/lib",
    "/proc",
    "/sys",
    "/etc/mime.types",
]  # Python's own
ACTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.", "os.remove", "os.rename",
        "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate", "shutil.",
        "ctypes.dlopen")  # fmt: skip
OURS = (".git", ".venv", "__pycache__", ".ruff_cache", ".pytest_cache", "runs")


# --- the loaders: what is done with a folder of (once) good files


class Optimizer(torch.optim.AdamW):
    """Of one layer, as train.py has it when it goes on."""

    def __init__(self):
        self.model = torch.nn.Linear(8, 8)
        super().__init__(self.model.parameters())
        self.model(torch.ones(1, 8)).sum().backward()
        self.step()


class Part(Shards):
    """Saves and loads like a process among several; one layer, not shared."""

    def __init__(self, model):
        self.model = model


def read_examples(folder, dice):
    examples = data.Examples([dice.choice(sorted(folder.iterdir()))] if folder.name == "records" else [folder],
        absent=dice.choice(
        ["refuse", "text", "keep"]))  # fmt: skip
    examples.types(), examples.describe()
    for i in range(len(examples)):
        example = examples.get(i, epoch=1)
        show(tokenizer(), *tokenize(tokenizer(), example.turns, 4 if example.image else 0))
        if example.image:
            data.check_inside(example.image)
    if folder.name == "scienceqa":
        problems = list({p["id"]: p for p in examples.parts[0].records}.values())
        eval_scienceqa.table(problems, eval_scienceqa.score(problems, {"1": "B"}))


@cache
def tokenizer():
    return load_tokenizer(demo.LLAMA / "tokenizer.model")


def read_pictures(path, dice):
    pictures = data.Pictures(path / "images.zip" if path.name == "zip" else path)
    encode = data.Encoder(tokenizer(), 4, 28, pictures, 2048)
    errors = []
    for name in PICTURES:
        try:
            pixels = encode(data.Example("1", ["<image>\nWhat?", "A cat."], name))[2]
            assert pixels.shape == (3, 28, 28)
        except ValueError as error:
            judge(str(error), name)
            errors.append(str(error))
    if errors:
        raise UserError(f"{path}: {errors[0]}")


def read_state(folder, dice):
    """As train.py does."""
    state = checkpoint.load_state(folder)
    if state is None or "trained" not in state:
        return
    optimizer = Optimizer()
    try:
        optimizer.model.load_state_dict(state["trained"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise UserError(f"{folder}/state: is of another model ({checkpoint.reason(error)})") from None


def read_shards(folder, dice):
    optimizer = Optimizer()
    try:
        Part(optimizer.model).load(folder, Shards.saved(folder), optimizer)
    except ValueError as error:
        raise UserError(f"{folder}/state: {error}") from None


def read_tokenizer(folder, dice):
    sp = checkpoint.open_tokenizer(folder / "tokenizer.model", argparse.Namespace(config=LLaMAConfig(vocab_size=500)))
    stop_ids(sp)
    show(sp, *tokenize(sp, ["<image>\nWhat is it?", "A cat ### on a mat \U0001f600."], 4))


LOADERS = {  # name -> weight, folder, loader
    "Examples of JSON": (4, "records", read_examples),
    "ScienceQA": (3, "scienceqa", read_examples),
    "predictions": (1, "predictions", lambda f, dice: eval_scienceqa.read_predictions(f / "answers.json")),
    "pictures in a folder": (3, "pictures", read_pictures),
    "pictures in a zip": (2, "zip", read_pictures),
    "load_llama, raw": (2, "raw", lambda f, dice: checkpoint.load_llama(f)),
    "load_llama, .bin": (2, "hf", lambda f, dice: checkpoint.load_llama(f)),
    "load_llama, .safetensors": (1, "safe", lambda f, dice: checkpoint.load_llama(f)),
    "load_vision, OpenAI": (2, "openai", lambda f, dice: checkpoint.load_vision(f / "ViT.pt")),
    "load_vision, .pt": (1, "state-dict", lambda f, dice: checkpoint.load_vision(f / "vit.pt")),
    "load_vision, folder": (1, "clip", lambda f, dice: checkpoint.load_vision(f)),
    "load_projector": (2, "projector", lambda f, dice: checkpoint.load_projector(dice.choice(sorted(f.iterdir())))),
    "load_run, stage 1": (2, "run1", lambda f, dice: checkpoint.load_run(f / "run")),
    "load_run, stage 2": (2, "run2", lambda f, dice: checkpoint.load_run(f / "run")),
    "load_state": (2, "trained", read_state),
    "load_shards": (1, "shards", read_shards),
    "load_tokenizer": (1, "tokenizer", read_tokenizer),
}
PICTURES = ["a.png", "b.png", "c.jpg", "d.gif", "e.webp", "f.tiff", "g.tiff", "h.bmp", "i.ppm"]


def picture(name: str, size=(20, 14), mode="RGB") -> bytes:
    file, image = io.BytesIO(), Image.radial_gradient("L").resize(size).convert("P" if name == "b.png" else mode)
    exif = Image.Exif()
    exif[274] = 6
    more = dict(compression="tiff_lzw" if name[0] == "f" else "tiff_deflate") if name.endswith("tiff") else {}
    more |= dict(exif=exif) if name[-4:] in (".png", ".jpg", "webp") else {}
    image.save(file, {"jpg": "JPEG"}.get(name.split(".")[1], name.split(".")[1].upper()), **more)
    return file.getvalue()


def make(case: Path):
    """The good files of every loader."""
    llama, clip = made.their_llama(4), made.their_clip(hidden_size=64, intermediate_size=256, num_attention_heads=1)
    weights = made.in_openai_layout(clip)
    weights = {name: tensor for name, tensor in weights.items() if ".2." not in name and ".3." not in name}
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A \u00fc cat."}]
    records = [{"id": str(i), "image": f"{i}.png", "conversations": talk * (1 + i % 2)} for i in range(4)]
    records[1] = records[3] = {"id": 3, "conversations": [{**m, "value": m["value"][3:]} for m in talk]}
    captions = [{"image": f"{i}.png", "caption": f"A cat, {i} \u00fc"} for i in range(5)]
    problem = {**SCIENCEQA["1"], "subject": "natural science", "grade": "grade4"}
    for name, value in {
        "records/chat.json": records, "records/captions.json": captions, "scienceqa/problems.json": {**SCIENCEQA,
            "1": problem},
        "scienceqa/pid_splits.json": {"train": ["2", "1"], "test": []},
        "predictions/answers.json": {"acc": 50.0, "outputs": {"1": "The answer is B.", "2": "B", "3": "A. cat"}},
    }.items():  # fmt: skip
        (case / name).parent.mkdir(parents=True, exist_ok=True)
        (case / name).write_text(json.dumps(value, ensure_ascii="answers" in name))
    (case / "records/captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
    (case / "scienceqa/images/test/1").mkdir(parents=True)
    (case / "scienceqa/images/test/1/image.png").write_bytes(picture("a.png"))
    for folder in ("pictures", "zip", "openai", "state-dict", "projector", "tokenizer", "shards/state"):
        (case / folder).mkdir(parents=True)
    with zipfile.ZipFile(case / "zip/images.zip", "w") as archive:
        for i, name in enumerate(PICTURES):
            (case / "pictures" / name).write_bytes(picture(name))
            archive.writestr(name, picture(name), (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2])
    made.write_raw(llama, case / "raw", 2)
    made.write_hf(llama, case / "hf", "bin index")
    made.write_hf(llama, case / "safe", "safetensors index")
    made.write_torchscript(weights, case / "openai/ViT.pt")
    torch.save(weights, case / "state-dict/vit.pt")
    clip.save_pretrained(case / "clip")
    torch.save({"weight": torch.randn(64, 64)}, case / "projector/projector.pth")
    torch.save({"model.mm_projector.weight": torch.randn(64, 64), "model.mm_projector.bias": torch.ones(64)},
               case / "projector/old.bin", _use_new_zipfile_serialization=False)  # fmt: skip
    write_tokenizer(case / "tokenizer/tokenizer.model", 340, "nmt_nfkc")
    for stage in (1, 2):
        root = case / f"run{stage}"
        made.write_raw(made.their_llama(4, vocab_size=340), root / "llama")
        write_tokenizer(root / "llama/tokenizer.model", 340, "identity")
        torch.save(weights, root / "vit.pt")
        llava = checkpoint.build(checkpoint.load_llama(root / "llama"), checkpoint.load_vision(root / "vit.pt"))
        made.save(root, llava, stage)
    (case / "run2/llama").rename(case / "not-needed")
    optimizer = Optimizer()
    state = dict(trained=optimizer.model.state_dict(), optimizer=optimizer.state_dict())
    checkpoint.save_state(case / "trained", state, 7)
    dist.init_process_group("gloo", init_method=f"file://{case.parent}/store", rank=0, world_size=1)
    Part(optimizer.model).save(case / "shards", 7, optimizer)
    dist.destroy_process_group()


def write_tokenizer(path: Path, size: int, normalization: str):
    model = io.BytesIO()
    words = "A chat between a curious human and an assistant. ### Human: What? ### Assistant: A cat on a mat. ## #"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 20), model_writer=model, vocab_size=size, model_type="bpe", byte_fallback=True,
        normalization_rule_name=normalization, remove_extra_whitespaces=False, minloglevel=2)  # fmt: skip
    path.write_bytes(model.getvalue())


# --- mutations: (bytes, dice) -> bytes

NUMBERS = [
    0,
    1,
    2,
    7,
    -1,
    -2,
    255,
    256,
    65535,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**63 - 1,
    2**63,
    2**64,
]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000 + "]" * 100_000,
    '{"a":' * 5000 + "1" + "}" * 5000,
       "[" * 450 + "]" * 450, "[" * 900 + "]" * 900, "[" * 3000, "00", "'a'", "1e-400", "-0.0", "\\ud800", '"\0"',
       "\ufeff"]  # fmt: skip
TEXTS = ["", " ", "\0", "a\0b", "../../canary", "..", ".", "/etc/hostname", "/dev/zero", "C:\\a", "a/../../b", "a\nb",
    "\x1b[2J", "\ud800",
         "\udfff\ud800", "\u00a0", "\u3000", "\u2028", "<image>", "<image>\n", "\n<image>", "###", "</s>",
         "a" * 100_000, "n/" * 3000, "%s%n",
         "CON", "\U0001f600", "grade" + "9" * 5000, "grade\u00b2", "grade\u0663", "y" * 300, "__proto__", "-1", "1e5",
         "human", "gpt"]  # fmt: skip


def blind(whole: bytes, dice) -> bytes:
    """Bits, bytes, chunks and ends, without a thought of what they mean."""
    out, n = bytearray(whole), max(1, len(whole))
    near = dice.choice([n, 64, 512])  # the whole, or a region
    start = dice.choice([0, max(0, n - near), dice.randrange(n)])
    for _ in range(dice.choice([1, 1, 2, 4, 16])):
        at, to, size = (min(len(out), start + dice.randrange(near)) for _ in range(3))
        size, kind = dice.choice([1, 2, 4, 8, 64, 1024]), dice.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << dice.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = dice.randrange(256)
        elif kind == 2:
            number, order = dice.choice(NUMBERS) % 2 ** (8 * min(size, 8)), dice.choice(["little", "big"])
            out[at : at + min(size, 8)] = number.to_bytes(min(size, 8), order)
        elif kind == 3:
            out[at:at] = out[to : to + size]  # a chunk twice
        elif kind == 4:
            out[at : at + size] = out[to : to + size]  # a splice
        elif kind == 5:
            del out[at : at + size]
        elif kind == 6 and dice.random() < 0.3:
            del out[at:]
        elif kind == 7:
            out[at:at] = bytes(size) if dice.random() < 0.5 else dice.randbytes(size)
    return bytes(out)


def hostile(dice):
    """A JSON value; those that json.dumps could not write become a mark, replaced later."""
    number = dice.choice(NUMBERS) * dice.choice([1, 1, 1, -1, 0.5])
    return dice.choice([number, f"@RAW{dice.randrange(len(RAW))}@", dice.choice(TEXTS), dice.choice(TEXTS), None, True,
        False, [], {}, [[]],
                        {"a": 1}, [None], [1, "a"], {"": ""}, 0.1])  # fmt: skip


def nodes(value, found):
    """(container, key) of every value in a JSON."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        nodes(value[key], found)
    return found


def json_edit(whole: bytes, dice) -> bytes:
    lines = (
        [json.loads(line) for line in whole.split(b"\n")]
        if b"\n{" in whole and whole[:1] == b"{" and b"\n  " not in whole
        else None
    )
    value = {"": lines or json.loads(whole)}
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        places = nodes(value, [])
        (box, key), (other, name) = dice.choice(places), dice.choice(places)
        kind = dice.randrange(8)
        if kind < 4:
            box[key] = hostile(dice)
        elif kind == 4 and box is not value:
            del box[key]
        elif kind == 5 and isinstance(box, dict) and box is not value:
            new = hostile(dice)
            box[new if isinstance(new, str) else str(new)] = box.pop(key)
        elif kind == 6:
            box[key] = json.loads(json.dumps(other[name]))
        elif kind == 7:
            box[key] = [box[key]] if dice.random() < 0.5 else {"a": box[key]}
    value, ascii = value.get("", 1), dice.random() < 0.5
    if lines and isinstance(value, list):
        text = dice.choice(["\n", "\n\n", "\r\n", " "]).join(json.dumps(record, ensure_ascii=ascii) for record in value)
    else:
        text = json.dumps(value, ensure_ascii=ascii, indent=dice.choice([None, 1]))
    for i, raw in enumerate(RAW):
        text = text.replace(f'"@RAW{i}@"', raw).replace(f"@RAW{i}@", raw[:20].replace('"', ""))
    return text.encode(dice.choice(["utf-8"] * 9 + ["utf-16"]), "surrogatepass")


def packed(entries, dice=None) -> bytes:
    """A zip of (name, bytes, method), its data on multiples of 64 as PyTorch has it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive, contextlib.suppress(UserWarning):
        for name, content, method in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            pad = -(archive.fp.tell() + 30 + len(name.encode("utf-8", "replace")) + 4) % 64
            info.extra = b"FB" + struct.pack("<H", pad) + bytes(pad)
            archive.writestr(info, content)
    return file.getvalue()


def unpacked(whole: bytes):
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return [[entry.filename, archive.read(entry), entry.compress_type] for entry in archive.infolist()]


@cache
def zeros(method: int) -> bytes:
    """A bomb: 800 MB that take 800 KB or less."""
    return packed([("bomb", bytes(800 * 10**6), method)])


def zip_edit(whole: bytes, dice) -> bytes:
    kind = dice.randrange(6)
    if kind < 3:  # fields that lie, in any of the headers
        out = bytearray(whole)
        for _ in range(dice.choice([1, 1, 2, 3])):
            sign, fields = dice.choice([(b"PK\1\2", [4, 6, 8, 10, 16, 20, 24, 28, 30, 32, 34, 36, 38, 42]), (b"PK\5\6",
                [4, 6, 8, 10, 12, 16, 20]),
                                        (b"PK\3\4", [4, 6, 8, 14, 18, 22, 26, 28])])  # fmt: skip
            places = (
                [i for i in range(len(out) - 3) if out[i : i + 4] == sign] if len(out) < 10**5 else [out.find(sign)]
            )
            field, size = dice.choice(fields), dice.choice([2, 4])
            at = (dice.choice(places) if places else 0) + field
            old = int.from_bytes(out[at : at + size], "little")
            new = dice.choice([*NUMBERS, old + 1, old - 1, old * 1000, 1, 9, 12, 14, 99]) % 2 ** (8 * size)
            out[at : at + size] = new.to_bytes(size, "little")
        return bytes(out)
    entries = unpacked(whole)
    entry = dice.choice(entries)
    if kind == 3:  # a bomb in an entry's place, which may claim to be small
        method = dice.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
        bomb = bytearray(zeros(method))
        with zipfile.ZipFile(io.BytesIO(bomb)) as archive:
            info = archive.infolist()[0]
        start = 30 + 4 + int.from_bytes(bomb[28:30], "little")
        content = bytes(bomb[start : start + info.compress_size])
        mark = dice.randbytes(8)
        out = bytearray(packed([[n, mark * (len(content) // 8) + mark[: len(content) % 8] if n == entry[0] else c,
            m if n != entry[0] else 0]
                                for n, c, m in entries]))  # fmt: skip
        at = out.find(mark)
        out[at : at + len(content)] = content
        claim = dice.choice([info.file_size, 1000, len(content), 2**28, 2**32 - 2])
        name = entry[0].encode()
        for sign, fields in ((b"PK\1\2", (10, 16, 24, 46)), (b"PK\3\4", (8, 14, 22, 30))):
            i = -1
            while (i := out.find(sign, i + 1)) >= 0:
                if out[i + fields[3] : i + fields[3] + len(name)] == name:
                    out[i + fields[0] : i + fields[0] + 2] = method.to_bytes(2, "little")
                    out[i + fields[1] : i + fields[1] + 4] = info.CRC.to_bytes(4, "little")
                    out[i + fields[2] : i + fields[2] + 4] = claim.to_bytes(4, "little")
        return bytes(out)
    for _ in range(dice.choice([1, 1, 2, 3])):
        entry = dice.choice(entries)
        kind = dice.randrange(6)
        if kind == 0:
            text = dice.choice(TEXTS)[:60_000].encode("utf-8", "replace").decode()
            entry[0] = dice.choice([text or "x", entry[0] + text, text + "/" + entry[0]])
        elif kind == 1 and len(entries) > 1:
            entries.remove(entry)
        elif kind == 2:
            entries.append(list(entry))  # a name twice
        elif kind == 3:
            entry[2] = dice.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])
        elif kind == 4:
            entry[1] = dice.choice(entries)[1]
        else:
            entry[1] = blind(entry[1], dice)
    return packed(entries)


def pickle_edit(whole: bytes, dice) -> bytes:
    """Opcodes left out, doubled, exchanged, with other arguments; calls of what must never be called."""
    ops = list(pickletools.genops(whole))
    ends = [pos for _, _, pos in ops[1:]] + [len(whole)]
    parts = [whole[pos:end] for (op, _, pos), end in zip(ops, ends) if op.name != "FRAME"]
    ops = [op for op in ops if op[0].name != "FRAME"]
    command = f"touch {os.path.dirname(os.getcwd())}/PWNED".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    calls = [(b"os", b"system"), (b"posix", b"system"), (b"builtins", b"eval"), (b"builtins", b"exec"), (b"subprocess",
        b"getoutput"),
             (b"os", b"mkdir"), (b"torch", b"load"), (b"builtins", b"open"), (b"__torch__", b"os.system"), (b"pathlib",
             b"PosixPath")]  # fmt: skip
    names = [b"torch FloatStorage", b"torch HalfStorage", b"torch._utils _rebuild_sparse_tensor",
        b"torch._utils _rebuild_qtensor",
             b"torch._utils _rebuild_meta_tensor_no_storage", b"torch._utils _rebuild_parameter",
             b"torch._utils _rebuild_nested_tensor",
             b"torch._tensor _rebuild_from_type_v2", b"builtins bytearray", b"builtins set",
             b"collections OrderedDict", b"torch Tensor", b"torch Size",
             b"torch float64", b"torch.serialization _get_layout",
             b"torch.distributed.checkpoint.metadata BytesStorageMetadata",
             b"__torch__ x", b"torch device"]  # fmt: skip
    for _ in range(dice.choice([1, 1, 1, 2, 3, 5])):
        i, j, kind = dice.randrange(len(parts)), dice.randrange(len(parts)), dice.randrange(10)
        ints = [
            k for k, (op, arg, _) in enumerate(ops) if isinstance(arg, int) and "INT" in op.name or "LONG" in op.name
        ]
        texts = [k for k, (op, _, _) in enumerate(ops) if op.name in ("BINUNICODE", "SHORT_BINUNICODE")]
        globals = [k for k, (op, _, _) in enumerate(ops) if op.name == "GLOBAL"]
        if kind == 0:
            parts[i] = b""
        elif kind == 1:
            parts[i] += parts[i]
        elif kind == 2:
            parts[i], parts[j] = parts[j], parts[i]
        elif kind in (3, 4, 5) and ints:
            number = dice.choice([*NUMBERS, 3, 64, 128, 10**6, 10**9]).to_bytes(9, "little", signed=True)
            parts[dice.choice(ints)] = b"\x8a\x09" + number
        elif kind == 6 and texts:
            new = dice.choice([*TEXTS, "1", "cuda", "meta", "0", "../0"]).encode("utf-8", "surrogatepass")
            parts[dice.choice(texts)] = b"X" + struct.pack("<I", len(new)) + new
        elif kind == 7 and globals:
            parts[dice.choice(globals)] = b"c" + dice.choice(names).replace(b" ", b"\n") + b"\n"
        elif kind == 8 and i:
            module, name = dice.choice(calls)
            if dice.random() < 0.5:
                parts[i] += b"c" + module + b"\n" + name + b"\n" + text + b"\x85R" + dice.choice([b"0", b""])
            else:
                parts[i] += text[:0] + b"(" + text + b"i" + module + b"\n" + name + b"\n" + dice.choice([b"0", b""])
        elif kind == 9 and globals:  # a huge call of something harmless
            parts[i] += (
                b"c" + dice.choice(names).replace(b" ", b"\n") + b"\n\x8a\x05\0\0\0\0\2\x85R" + dice.choice([b"0", b""])
            )
    return b"".join(parts)


def in_zip_edit(whole: bytes, dice) -> bytes:
    """The pickle in a checkpoint."""
    entries = unpacked(whole)
    for entry in entries:
        if entry[0].endswith("/data.pkl"):
            entry[1] = pickle_edit(entry[1], dice)
    return packed(entries)


def other_tensor(dice, t: torch.Tensor):
    n, t = (
        dice.choice([0, 1, 3, 64]),
        t if checkpoint.ordinary(t) and not t.is_quantized and max(t.shape, default=0) < 10**6 else torch.ones(8, 8),
    )
    with torch.random.fork_rng(devices=[]):
        return dice.choice([
            lambda: torch.tensor(1.0), lambda: torch.empty(0), lambda: torch.empty(0, 64), lambda: torch.ones(n, 64),
            lambda: torch.ones(3, n, 2, 1),
            lambda: t.T if t.dim() == 2 else t[None], lambda: t.double(), lambda: t.half(), lambda: t.to(torch.int32),
            lambda: t.bool(),
            lambda: t.to(torch.complex64), lambda: t.to(torch.float8_e4m3fn), lambda: t.to_sparse(),
            lambda: t.to("meta"),
            lambda: t.to_sparse_csr() if t.dim() == 2 else t, lambda: torch.ones(1).expand(10**6, 10**6),
            lambda: torch.tensor(1.0).expand(t.shape),
            lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            lambda: torch.nn.Parameter(t.float()), lambda: t * float("nan"), lambda: None, lambda: "text", lambda: 1.5,
            lambda: [t], lambda: {"a": t},
            lambda: (t, t), lambda: torch.empty(2**40, 0), lambda: torch._neg_view(t),
        ])()  # fmt: skip


def tensor_edit(whole: bytes, dice) -> bytes:
    """Other tensors, other names, other kinds of containers: all that torch.save can write."""
    weights = torch.load(io.BytesIO(whole), weights_only=True)
    for _ in range(dice.choice([1, 1, 2])):
        box, key = weights, dice.choice(list(weights))
        while isinstance(box[key], (dict, list)) and box[key] and dice.random() < 0.9:
            box = box[key]
            key = dice.choice(list(box)) if isinstance(box, dict) else dice.randrange(len(box))
        kind, value = dice.randrange(6), box[key]
        if kind < 3:
            box[key] = other_tensor(dice, value if isinstance(value, torch.Tensor) else torch.ones(8, 8))
        elif kind == 3:
            value = hostile(dice)
            box[key] = (
                value
                if isinstance(value, (int, float)) and -(2**63) <= value < 2**63
                else value
                if isinstance(value, (str, list, dict))
                else 0
            )
        elif kind == 4 and isinstance(box, dict) and len(box) > 1:
            box[
                dice.choice(
                    [
                        *TEXTS,
                        7,
                        None,
                        (1, 2),
                        0.5,
                        "layers.9999.a",
                        "transformer.resblocks.77.x",
                        "visual.layer1.0",
                        f"{key}.x",
                    ]
                )
            ] = box.pop(key)
        elif kind == 5 and isinstance(box, dict):
            box[dice.choice([7, "x", "layers.1.x", "rope.freqs", "visual.proj"])] = box[key]
    if dice.random() < 0.05:
        weights = dice.choice([list(weights), tuple(weights.values()), {}, [], None, 3, "x", torch.ones(3)])
    file = io.BytesIO()
    torch.save(weights, file, _use_new_zipfile_serialization=dice.random() < 0.9)
    return file.getvalue()


def safetensors_edit(whole: bytes, dice) -> bytes:
    size = int.from_bytes(whole[:8], "little")
    header = json_edit(whole[8 : 8 + size].strip(), dice)
    return len(header).to_bytes(8, "little") + header + whole[8 + size :]


def metadata_edit(whole: bytes, dice) -> bytes:
    """What describes a shared state: other files, places, lengths, shapes."""
    metadata = pickle.loads(whole)
    for info in metadata.storage_data.values():
        if dice.random() < 0.5:
            name, value = dice.choice([("relative_path", dice.choice([*TEXTS, *["../../../../canary.txt",
                "/etc/hostname"] * 20])), ("offset", dice.choice(NUMBERS)),
                                       ("length", dice.choice(NUMBERS)), ("transform_descriptors", ["zstd",
                                       7])])  # fmt: skip
            setattr(info, name, value)
    for entry in metadata.state_dict_metadata.values():
        if dice.random() < 0.3:
            huge = torch.Size([dice.choice([0, 3, 2**40]), 8])
            entry.size = huge
            entry.chunks[0].sizes = huge
    return pickle_edit(pickle.dumps(metadata, 2), dice) if dice.random() < 0.3 else pickle.dumps(metadata, 2)


def protobuf_edit(whole: bytes, dice) -> bytes:
    """Fields of a SentencePiece model left out, doubled, moved, changed inside."""
    fields, at = [], 0
    while at < len(whole):  # every field of its top level is (tag, length, bytes)
        start, at, size, shift = at, at + 1, 0, 0
        while True:
            size |= (whole[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if whole[at - 1] < 128:
                break
        fields.append((whole[start : start + 1], whole[at : at + size]))
        at += size
    for _ in range(dice.choice([1, 1, 2, 8])):
        i, j, kind = dice.choice([dice.randrange(len(fields)), -1, -2]), dice.randrange(len(fields)), dice.randrange(5)
        if kind == 0 and len(fields) > 3:
            del fields[i]
        elif kind == 1:
            fields.insert(j, fields[i])
        elif kind == 2:
            fields[i], fields[j] = fields[j], fields[i]
        else:
            fields[i] = fields[i][0], blind(fields[i][1], dice)
    out = b""
    for tag, content in fields:
        size, length = len(content), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        out += tag + length + bytes([size]) + content
    return out


def png(chunks) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind,
        body in chunks)  # fmt: skip


@cache
def bombs() -> list[bytes]:
    """Pictures that are what they say: as large as is allowed, larger, or long and thin."""
    thin, header = zlib.compress(bytes(2 * 10**6)), struct.Struct(">IIBBBBB").pack
    square, row = zlib.compress(bytes(10_001 * 10_000)), zlib.compress(bytes(10**8 + 1))
    sizes = ((10_000, 10_000, square), (1, 10**6, thin), (10**6, 1, thin), (20_000, 20_000, square), (10**8, 1, row))
    found = [png([(b"IHDR", header(w, h, 8, 0, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]) for w, h, body in sizes]
    for kind in (b"zTXt", b"iCCP"):
        text = kind, b"a\0\0" + zlib.compress(bytes(10**8))
        found.append(png([(b"IHDR", header(9, 9, 8, 0, 0, 0, 0)), text, (b"IDAT", thin), (b"IEND", b"")]))
    found += [picture("e.webp", (8000, 8000)), picture("g.tiff", (9000, 9000), "RGBA")]
    found.append(picture("d.gif", (9999, 9999), "L"))
    return found


def picture_edit(whole: bytes, dice) -> bytes:
    """Dimensions, chunks and directories of the formats."""
    if dice.random() < 0.01:
        return dice.choice(bombs())
    size = dice.choice([0, 1, 3, 255, 9999, 10_000, 30_000, 65_535, 2**20, 2**31 - 1, 2**32 - 1])
    out = bytearray(whole)
    if whole.startswith(b"\x89PNG"):
        chunks, at = [], 8
        while at < len(whole):
            length = int.from_bytes(whole[at : at + 4], "big")
            chunks.append([whole[at + 4 : at + 8], whole[at + 8 : at + 8 + length]])
            at += 12 + length
        for _ in range(dice.choice([1, 1, 2])):
            chunk, kind = dice.choice(chunks), dice.randrange(5)
            if kind == 0:
                at, head = dice.choice([0, 4]), bytearray(chunks[0][1])
                head[at : at + 4] = struct.pack(">I", size)
                chunks[0][1] = bytes(head)
            elif kind == 1:
                chunk[1] = blind(chunk[1], dice)
            elif kind == 2:
                chunk[0] = dice.choice(
                    [
                        b"IDAT",
                        b"PLTE",
                        b"tRNS",
                        b"acTL",
                        b"fcTL",
                        b"fdAT",
                        b"eXIf",
                        b"iTXt",
                        b"zTXt",
                        b"iCCP",
                        b"IHDR",
                        b"XXXX",
                    ]
                )
            elif kind == 3:
                chunks.insert(dice.randrange(len(chunks)), list(chunk))
            else:
                chunks.remove(chunk) if len(chunks) > 1 else None
        return png(chunks)
    if whole.startswith(b"GIF8"):
        at = dice.choice([6, 8, whole.find(b",") + 5, whole.find(b",") + 7])
        out[at : at + 2] = struct.pack("<H", size % 65536)
    elif whole.startswith(b"BM"):
        out[(at := dice.choice([2, 10, 14, 18, 22, 28, 30, 34, 46])) : at + 4] = struct.pack("<I", size)
    elif whole.startswith(b"RIFF"):
        out[(at := dice.choice([4, 16, 20, 24, 27, 30, 34, 38])) : at + 3] = struct.pack("<I", size)[:3]
    elif whole.startswith(b"P6"):
        return (
            b"P%d %d %d %d\n" % (dice.randrange(1, 8), size, dice.choice([1, 14, size]), dice.choice([255, size]))
            + whole[13:]
        )
    elif whole.startswith(b"\xff\xd8"):
        at = max(whole.find(b"\xff\xc0"), 0)
        out[(at := at + dice.choice([2, 4, 5, 7, 9, 10])) : at + 2] = struct.pack(">H", size % 65536)
    elif whole.startswith((b"II", b"MM")):
        at = int.from_bytes(whole[4:8], "little")
        entries = int.from_bytes(whole[at : at + 2], "little")
        at += 2 + 12 * dice.randrange(max(1, entries)) + dice.choice([0, 2, 4, 8, 8, 8])
        out[at : at + 4] = struct.pack("<I", size)
    return bytes(out) if dice.random() < 0.7 else blind(bytes(out), dice)


def mutate(path: Path, whole: bytes, dice) -> tuple[str, bytes]:
    """-> the mutation's name, the damaged bytes."""
    ways = [blind]
    if path.suffix in (".json", ".jsonl"):
        ways += [json_edit] * 4
    elif path.suffix == ".safetensors":
        ways += [safetensors_edit] * 2
    elif path.name == "tokenizer.model":
        ways += [protobuf_edit] * 2
    elif path.name == ".metadata":
        ways += [pickle_edit] * 2 + [metadata_edit] * 2
    elif path.suffix[1:] in ("png", "jpg", "gif", "webp", "tiff", "bmp", "ppm"):
        ways += [picture_edit] * 2
    elif whole.startswith(b"PK"):
        ways += [zip_edit] * 2
        if path.suffix != ".zip":
            ways += [in_zip_edit] * 2
            ways += [tensor_edit] * 2 if b"constants.pkl" not in whole and path.suffix != ".distcp" else []
    if dice.random() < 0.005:
        return "empty", b""
    way = dice.choice(ways)
    return way.__name__, way(whole, dice)


# --- a case, and what is found in it


class Finding(Exception):
    pass


def judge(message: str, name: str):
    """A message is one line that names the file, and no sign of it acts on the terminal."""
    text = "".join(c for c in message if not 0xD800 <= ord(c) < 0xE000)
    if not text.isprintable() or len(text) > MESSAGE or name not in text:
        why = (
            "of several lines or with control characters"
            if not text.isprintable()
            else "too long"
            if len(text) > MESSAGE
            else "unnamed"
        )
        raise Finding(f"message {why}: {message[:300]!r}")


def tree(*roots: Path) -> dict:
    """What is below the roots, and since when; caches and Git's own left out."""
    found, below = {}, list(map(str, roots))
    while below:
        with os.scandir(below.pop()) as entries:
            for entry in entries:
                if entry.name in OURS:
                    continue
                stat = entry.stat(follow_symlinks=False)
                found[entry.path] = stat.st_mtime_ns, stat.st_size, stat.st_ino
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
    return found


class Watch:
    """Python's audit hook: what a loader opens, and what else it does to the world."""

    on, allowed, seen = False, (), []

    def __call__(self, event, arguments):
        if not self.on:
            return
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            path, mode, flags = os.path.abspath(os.fsdecode(arguments[0])), arguments[1] or "", arguments[2] or 0
            writes = set(mode) & set("wax+") if mode else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes or not path.startswith(self.allowed):
                self.seen.append(f"open {path} {mode}")
        elif event.startswith(ACTS) and not (event == "ctypes.dlopen" and arguments[0] is None):
            self.seen.append(f"{event} {arguments!r:.100}")


WATCH = Watch()


def one(i: int, seed: int, root: Path, good: dict, verbose=False) -> list:
    """Runs case i -> [loader, "loaded", "refused" or "finding", what was done, what was found]."""
    dice = random.Random(f"{seed} {i}")
    name = dice.choices(list(LOADERS), [weight for weight, _, _ in LOADERS.values()])[0]
    _, folder, load = LOADERS[name]
    folder = root / "case" / folder
    files = [path for path in good if folder in path.parents]
    changed, done = dice.sample(files, min(len(files), dice.choice([1, 1, 1, 2]))), []
    damaged = {}
    for path in changed:
        try:
            way, damaged[path] = mutate(path, good[path], dice)
        except Exception as error:
            return [name, "finding", "", f"the mutation itself failed: {error!r:.200}"]
        done.append(f"{way} {path.relative_to(folder)}")
    for path, content in damaged.items():
        path.unlink()  # it may be mapped: never written into
        path.write_bytes(content)
        if verbose:
            print(f"{path}: {len(good[path])} -> {len(content)} bytes, {'; '.join(done)}")
    before, began = tree(root), time.process_time()
    anywhere = name.startswith("load_run")  # its paths are settings
    WATCH.allowed, WATCH.seen = tuple([""] if anywhere else [str(root / "case"), *SYSTEM]), []
    end, found = "loaded", ""
    try:
        WATCH.on = True
        try:
            load(folder, dice)
        finally:
            WATCH.on = False
    except UserError as error:
        end = "refused"
        try:
            judge(str(error), str(folder))
        except Finding as finding:
            found = str(finding)
    except BaseException as error:
        if verbose:
            traceback.print_exc()
        frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).parent == ROOT]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        found = f"{type(error).__name__} at {place}: {str(error)[:200]}"
    seconds = time.process_time() - began
    if seconds > SECONDS:
        found = found or f"took {seconds:.0f} s"
    after = tree(root)
    if after != before:
        found = f"files touched: {sorted(p for p in before.keys() | after.keys() if before.get(p) != after.get(p))[:3]}"
    if WATCH.seen:
        found = f"did: {WATCH.seen[:3]}"
    for path in after.keys() - before.keys():
        with contextlib.suppress(OSError):
            os.unlink(path)
    for path in changed:
        path.unlink()
        path.write_bytes(good[path])
    return [name, "finding" if found else end, "; ".join(done), found]


def child(cases: list[int], seed: int, root: Path, good: dict, pipe: int):
    """Runs cases, a line of JSON each, before and after; ends early once one has taken much memory."""
    os.chdir(root / "cwd")
    sys.addaudithook(WATCH)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1), os.dup2(null, 2)  # libraries in C print what they like
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + 6 * 2**30,) * 2)  # whatever happens, the machine lives
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    low = peak()
    for i in cases:
        os.write(pipe, f"{json.dumps([i])}\n".encode())
        line, grown = one(i, seed, root, good), peak() - low
        if grown > (MEMORY[line[0]] or 256):
            line[1], line[3] = "finding", line[3] or f"took {grown} MiB"
        os.write(pipe, f"{json.dumps([i, *line])}\n".encode())
        if grown > 100:
            break
    os._exit(0)


def in_child(cases: list[int], *given):
    """Yields (case, line) for the cases that a child got through, the last with a finding if it died or hung."""
    get, put = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(get)
        try:
            child(cases, *given, put)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(put)
    buffer, running, ended = b"", None, False
    while True:
        ready, _, _ = select.select([get], [], [], 6 * SECONDS)
        block = os.read(get, 2**16) if ready else b""
        if not block:
            ended = bool(ready)
            break
        *lines, buffer = (buffer + block).split(b"\n")
        for line in map(json.loads, lines):
            running = line[0] if len(line) == 1 else None
            if running is None:
                yield line[0], line[1:]
    if not ended:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(get)
    if running is not None:
        how = (
            f"died ({signal.Signals(-status).name if status < 0 else status})" if ended else f"hung for {6 * SECONDS} s"
        )
        dice = random.Random(f"{given[0]} {running}")
        name = dice.choices(list(LOADERS), [weight for weight, _, _ in LOADERS.values()])[0]
        yield running, [name, "finding", "?", f"the process {how}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="CASE", help="one case again, in this process")
    parser.add_argument("--show", type=int, default=40, help="kinds of findings printed")
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary).resolve()
        for name in ("case", "cwd", "canary"):
            (root / name).mkdir()
        for place in (root / "canary.txt", root / "case/canary.txt", root / "canary/canary.txt"):
            place.write_text("untouched")
        pid = os.fork()  # PyTorch's threads, which writing the good files starts, end with this process
        if pid == 0:
            try:
                make(root / "case")
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == 0, "the good files could not be made"
        good = {path: path.read_bytes() for path in sorted((root / "case").rglob("*")) if path.is_file()}
        for _, folder, load in LOADERS.values():
            load(root / "case" / folder, random.Random(0))  # they are good, and what is imported late is there
        zeros(zipfile.ZIP_DEFLATED), zeros(zipfile.ZIP_BZIP2), zeros(zipfile.ZIP_LZMA), bombs()
        if a.only is not None:
            os.chdir(root / "cwd")
            return print(*one(a.only, a.seed, root, good, verbose=True), sep="\n")
        counts, kinds, examples = Counter(), Counter(), {}
        todo, bar, repository = list(range(a.cases)), tqdm(total=a.cases, unit="case"), tree(ROOT)
        while todo:
            batch, done = todo[:500], 0
            for i, (name, end, how, found) in in_child(batch, a.seed, root, good):
                done = batch.index(i) + 1
                counts[name, end] += 1
                if found:
                    kind = name, found.split(": ")[0]
                    kinds[kind] += 1
                    examples.setdefault(kind, f"case {i}, {name} ({how}): {found}")
                bar.update()
            assert done, "no case could be run"
            del todo[:done]
            for path, content in good.items():  # of a child that died
                if not path.is_file() or path.read_bytes() != content:
                    path.unlink(missing_ok=True)
                    path.write_bytes(content)
            if tree(ROOT) != repository:
                changed = {p for p, stat in tree(ROOT).items() if repository.get(p) != stat}
                kinds["any", "repository"] += 1
                examples["any", "repository"] = f"cases {batch[0]} to {batch[done - 1]} touched {sorted(changed)[:5]}"
                repository = tree(ROOT)
        bar.close()
    for kind, n in kinds.most_common(a.show):
        print(f"{n} x {examples[kind]}")
    print(f"\n{'loader':28}{'cases':>8}{'loaded':>8}{'refused':>9}{'findings':>10}")
    for name in [*LOADERS, "all"]:
        row = [sum(n for (which, end), n in counts.items() if name in (which, "all") and end in ends)
               for ends in (("loaded", "refused", "finding"), ("loaded",), ("refused",), ("finding",))]  # fmt: skip
        print(f"{name:28}{row[0]:8}{row[1]:8}{row[2]:9}{row[3]:10}")
    raise SystemExit(bool(kinds))


if __name__ == "__main__":
    main()
