"""Fuzzes every loader of files: JSON, checkpoints, zips, pictures, tokenizers, complete LLaVAs.

    python tests/fuzz.py --cases 20000
    python tests/fuzz.py --only 1234 --seed 0          # repeats one case and prints its traceback

Each case damages one or two valid files, with or without regard to their format, and loads them. The loader must either
load them or raise one UserError (for a picture: ValueError). A case is a finding if the loader raises another error; if
its message has several lines or does not name the file; if the process dies, hangs, or needs much time or memory; or if
the loader writes a file, starts a program, or opens a file that does not belong to the case. Linux only.
"""

import argparse
import faulthandler
import io
import json
import os
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import ROOT, SCIENCEQA, llama_twin, randomize, tiny_tokenizer, tiny_vit, vit_twin
from PIL import Image
from test_import_llava import llama_for, their_llava, write_llava, write_original
from test_torchscript import write_torchscript
from tqdm import tqdm

import checkpoint
import data
import distributed
import eval_scienceqa
from common import UserError, printable, reason
from conversation import show, system_ids, tokenize
from formats.pictures import Pictures
from formats.records import read_scienceqa
from model import LLaMA, LLaMAConfig
from tools.import_llava import import_llava
from vision import VisionConfig, VisionTransformer

CASES = 20_000
TIMEOUT = 60  # seconds of real time after which a loader is taken to hang
MAX_SECONDS = 10  # of processor time
MAX_MEMORY = {"pictures in a folder": 1500, "pictures in a zip": 700}  # MiB by which a loader may grow the process
DEFAULT_MEMORY = 256  # MiB, for the other loaders
CHILD_MEMORY = 8 * 2**30  # bytes: a larger allocation fails instead of exhausting the machine
RENEW_AFTER = 50  # MiB: a case that takes more is the last one of its process
MAX_LISTED = 5  # findings that are printed for each loader
PYTHON_FILES = (sys.prefix, sys.base_prefix, str(ROOT), "/usr/lib", "/lib", "/proc", "/sys", "/etc/mime.types")
EVENTS = "os.(system|exec|posix_spawn|fork|r|mkdir|link|symlink|chmod|trunc)|subprocess|socket|shutil|ctypes.dlopen"
PICTURES = ["a.png", "b.jpg", "c.gif", "d.webp", "e.tiff", "f.bmp", "g.ppm"]
TOKENIZER = tiny_tokenizer.__wrapped__()
LLAMA = LLaMAConfig(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, ffn_dim=176, vocab_size=TOKENIZER.vocab_size())
VISION = VisionConfig(image_size=42, patch_size=14, width=64, layers=2)


# --- the loaders: each reads a folder of files that were valid before they were damaged


def read_examples(folder: Path):
    for absent in ("keep", "text", "refuse"):
        paths = [folder] if folder.name == "scienceqa" else folder.iterdir()
        examples = data.Examples(paths, absent=absent)
        examples.types()
        examples.describe("uniform")
        for i in range(len(examples)):
            example = examples[i]
            show(TOKENIZER, *tokenize(TOKENIZER, example.turns, 4 if example.image else 0))
            place = os.path.normpath(f"/pictures/{example.image}")
            assert place.startswith("/pictures/") and not {"\0", "\\"} & {*place}, f"{place!r} leads out of the folder"
    if folder.name == "scienceqa":
        problems = read_scienceqa(folder, absent=absent)[0]
        eval_scienceqa.table(problems, eval_scienceqa.score(problems, {"1": "B"}))


def read_pictures(path: Path):
    encoder, errors = data.Encoder(TOKENIZER, 4, 28, Pictures(path), 2048), []
    for name in ("../../outside", "/etc/hostname", *PICTURES):
        try:
            sample = encoder.encode(data.Example("1", ["<image>\nWhat?", "A cat."], name))
            assert sample.pixels.shape == (3, 28, 28) and name in PICTURES
        except ValueError as error:
            errors.append(str(error))
            fault = fault_of_message(str(error), name)
            assert not fault, fault
    if len(errors) > 2:  # the first two names lead out of the folder
        raise UserError(f"{path}: {errors[2]}")


def trained_layer() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The smallest model whose optimizer has a state."""
    layer = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    return layer, optimizer


def read_state(folder: Path):
    """Restores a training state, with the same UserError as train.py."""
    state, (layer, optimizer) = checkpoint.load_state(folder), trained_layer()
    try:
        distributed.restore(layer, optimizer, state)
    except Exception as error:
        raise UserError(f"{folder / 'state.pth'}: belongs to another model or is damaged ({reason(error)})") from None


def read_llava(folder: Path):
    """Imports a LLaVA into a new run directory outside the case."""
    vision = folder / "vit.pt"
    import_llava(folder, folder.parent.parent / "target/run", vision=vision if vision.is_file() else None)


LOADERS = {  # name -> folder, loader
    "conversations": ("chat", read_examples),
    "captions": ("captions", read_examples),
    "ScienceQA": ("scienceqa", read_examples),
    "predictions": ("predictions", lambda folder: eval_scienceqa.read_predictions(folder / "answers.json")),
    "pictures in a folder": ("pictures", read_pictures),
    "pictures in a zip": ("zip", lambda folder: read_pictures(folder / "images.zip")),
    "load_llama, raw": ("run/llama", lambda folder: (checkpoint.load_llama(folder), checkpoint.llama_config(folder))),
    "load_llama, .bin": ("bin", checkpoint.load_llama),
    "load_llama, .safetensors": ("safetensors", checkpoint.load_llama),
    "load_vision, OpenAI": ("openai", lambda folder: checkpoint.load_vision(folder / "ViT.zip")),
    "load_vision, folder": ("clip", checkpoint.load_vision),
    "load_projector": ("projector", lambda folder: [checkpoint.load_projector(path) for path in folder.iterdir()]),
    "load_run, stage 1": ("run", lambda folder: checkpoint.load_run(folder / "run")),
    "load_run, stage 2": ("stage2", lambda folder: checkpoint.load_run(folder / "run")),
    "load_state": ("state", read_state),
    "load_tokenizer": ("tokenizer", lambda folder: system_ids(checkpoint.load_tokenizer(folder / "tokenizer.model"))),
    "import_llava, transformers": ("llava", read_llava),
    "import_llava, original": ("original", read_llava),
}


# --- valid files for all loaders


def write_files(case: Path):
    torch.manual_seed(0)
    for folder, _ in LOADERS.values():
        (case / folder).mkdir(parents=True, exist_ok=True)
    write_texts(case)
    write_pictures(case)
    llama, vision = randomize(LLaMA(LLAMA), 0), randomize(VisionTransformer(VISION, -1), 1)
    write_llamas(case, llama)
    write_visions(case, vision)
    write_runs(case)
    torch.save({"weight": torch.ones(9, 9)}, case / "projector/W.old", _use_new_zipfile_serialization=False)
    torch.save({"model.mm_projector.weight": torch.ones(9, 9)}, case / "projector/projector.pth")
    layer, optimizer = trained_layer()
    checkpoint.save_state(case / "state", distributed.full_state(layer, optimizer), step=7)
    llama = llama_for(TOKENIZER)
    write_llava(case / "llava", their_llava(llama), TOKENIZER)
    write_original(case / "original", llama, TOKENIZER)
    vit = {f"visual.{name}": p.detach() for name, p in tiny_vit(-1).named_parameters()}  # its width fits write_original
    torch.save(vit, case / "original/vit.pt")


def write_texts(case: Path):
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A \u00fc cat."}]
    captions = [{"image": f"{i}.png", "caption": f"A cat, {i} \u00fc"} for i in range(5)]
    problems = {id: problem | {"subject": "x", "grade": "grade4"} for id, problem in SCIENCEQA.items() if id in "12"}
    for name, content in {
        "chat/chat.json": [{"id": "1", "image": "1.png", "conversations": talk + [{"from": "human", "value": "Hi"}, talk[1]]},
                           {"id": 3, "conversations": [{"from": "human", "value": "Hi"}, talk[1]]}],
        "captions/list.json": captions,
        "scienceqa/problems.json": problems,
        "scienceqa/pid_splits.json": {"train": ["2", "1"], "test": []},
        "predictions/answers.json": {"acc": 50.0, "outputs": {"1": "The answer is B.", "2": "B", "3": "A. cat"}},
    }.items():  # fmt: skip
        (case / name).write_text(json.dumps(content))
    (case / "captions/lines.jsonl").write_text("\n".join(map(json.dumps, captions)))
    for folder in ("tokenizer", "run/llama"):
        (case / folder / "tokenizer.model").write_bytes(TOKENIZER.serialized_model_proto())


def write_pictures(case: Path):
    exif, image = Image.Exif(), Image.radial_gradient("L").resize((20, 14))
    exif[274] = 6  # the orientation: a quarter turn
    for name in PICTURES:
        image.convert("RGB").save(case / "pictures" / name, exif=exif, compression="tiff_lzw")
    shutil.make_archive(case / "zip/images", "zip", case / "pictures")
    (case / "scienceqa/images/test/1").mkdir(parents=True)
    image.save(case / "scienceqa/images/test/1/image.png")


def write_llamas(case: Path, llama: LLaMA):
    """Meta's raw format in two model-parallel files; Hugging Face's in two .bin files, and in .safetensors files."""
    weights = {name: p.detach() for name, p in llama.named_parameters()}
    raw = case / "run/llama"
    checkpoint.save_llama(LLAMA, weights, raw)
    for i in range(2):
        shard = {name: shard_of(name, weight, i, 2) for name, weight in weights.items()}
        torch.save(shard | {"rope.freqs": torch.ones(LLAMA.head_dim // 2)}, raw / f"consolidated.{i:02}.pth")
    twin = llama_twin(llama)
    twin.save_pretrained(case / "safetensors", max_shard_size="100KB")
    twin.config.save_pretrained(case / "bin")
    names, files = sorted(twin.state_dict()), ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    file_of = {name: files[i % 2] for i, name in enumerate(names)}
    for file in files:
        torch.save({name: twin.state_dict()[name] for name in names if file_of[name] == file}, case / "bin" / file)
    index = json.dumps({"metadata": {}, "weight_map": file_of})
    (case / "bin/pytorch_model.bin.index.json").write_text(index)


def shard_of(name: str, weight: torch.Tensor, i: int, n: int) -> torch.Tensor:
    """The part of a weight that file i of n holds, as fairscale's parallel layers divide it. Norms are not divided."""
    if weight.dim() == 1:
        return weight
    along = 1 if any(part in name for part in ("wo", "w2", "tok_embeddings")) else 0
    return weight.chunk(n, along)[i].clone()


def write_visions(case: Path, vision: VisionTransformer):
    weights = {f"visual.{name}": p.detach() for name, p in vision.named_parameters()}
    write_torchscript(weights | {"input_resolution": torch.tensor(42)}, case / "openai/ViT.zip")
    torch.save(weights, case / "run/vit.pt")
    vit_twin(vision).save_pretrained(case / "clip")


def write_runs(case: Path):
    """A run of stage 1, with the LLaMA and the ViT beside it, and one of stage 2, with the ViT."""
    llava = checkpoint.build(checkpoint.load_llama(case / "run/llama"), checkpoint.load_vision(case / "run/vit.pt"))
    shutil.copy(case / "run/vit.pt", case / "stage2/vit.pt")
    tokenizer = case / "run/llama/tokenizer.model"
    for stage, folder in ((1, case / "run"), (2, case / "stage2")):
        llava.set_trainable(stage)
        trained = {name: p.detach() for name, p in llava.named_parameters() if p.requires_grad}
        config = dict(stage=stage, feature_layer=llava.vision.feature_layer, llama="../llama")
        checkpoint.save_run(folder / "run", LLAMA, trained, config, folder / "vit.pt", tokenizer)


# --- damage: functions (content of a file, rng) -> other content


NUMBERS = [0, 1, 2, 3, 64, -1, 255, 9999, 10_000, 30_000, 65535, 10**6, 2**24, 2**31, 2**32 - 1, 2**40, 2**63, 2**64]
RAW_JSON = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "[" * 100_000 + "]" * 100_000, "[" * 900 + "]" * 900,
            '{"a":' * 5000 + "1" + "}" * 5000, "[" * 3000, "00", "'a'", "-0.0", "\\ud800", '"\0"', "\ufeff"]  # fmt: skip
RAW_MARK = "@RAW@"  # a string that a member of RAW_JSON replaces, quotes included
PATHS = ["../../outside", "../../../../outside", "/etc/hostname"]
TEXTS = [*PATHS * 4, "", "\0", "a\0b", "..", "/dev/zero", "C:\\a", "a\nb", "\x1b[2J", "\ud800", "\u3000", "\u2028",
         "<image>", "\n<image>", "###", "</s>", "a" * 100_000, "meta", "grade\u00b2", "grade" + "9" * 5000, "y" * 300,
         "n/" * 3000, "layers.9999.a", "visual.layer1.0"]  # fmt: skip
VALUES = [*NUMBERS, *TEXTS, *[RAW_MARK] * 5, None, True, 0.5, [], {}, [[]], {"a": 1}, [None], [1, "a"], {"": ""}]
GLOBALS = ["os system", "posix system", "builtins eval", "torch load", "__torch__ os.system", "torch FloatStorage",
           "builtins bytearray", "torch.distributed.checkpoint.metadata BytesStorageMetadata"]  # fmt: skip
TENSORS = [  # replacements of a tensor
    lambda t: t[None], lambda t: t.T.clone(), lambda t: t.double(), lambda t: t.half(), lambda t: t.int(),
    lambda t: t.to(torch.complex64), lambda t: t.to(torch.float8_e4m3fn), lambda t: t * torch.nan, lambda t: (t, t),
    lambda t: t.to("meta"), lambda t: t.to_sparse(), lambda t: torch.ones(8, 8).to_sparse_csr(),
    lambda t: torch.ones(0, 64), lambda t: torch.ones(1).expand(10**6, 10**6), lambda t: torch.ones(()).expand(t.shape),
    lambda t: torch.empty(2**40, 0), lambda t: torch._neg_view(t.float()), lambda t: torch.nn.Parameter(t.float()),
    lambda t: torch.nested.nested_tensor([t[None]]), lambda t: torch.quantize_per_tensor(t.float(), 1, 0, torch.qint8)
]  # fmt: skip
BOMB_SIZE = 8 * 10**8  # bytes, far over the limit of a picture
BOMB = zlib.compress(bytes(BOMB_SIZE), wbits=-15)  # deflated, as zips store it
ZIP_HEADERS = [(b"PK\1\2", 46), (b"PK\3\4", 30), (b"PK\5\6", 22)]  # signature and length: of the directory, a file, the end
PICTURE_HEADERS = [  # a mark, the offsets from it of the width, the height and other numbers, and the struct format of these
    (b"IHDR", (4, 8), ">I"), (b"\xff\xc0", (5, 7), ">H"), (b"GIF8", (6, 8), "<H"), (b",\0\0\0\0", (5, 7), "<H"),
    (b"VP8 ", (14, 16), "<H"), (b"BM", (18, 22, 10, 28, 30), "<I"), (b"\0\1\3\0", range(4, 150, 4), "<I"),
]  # fmt: skip


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Changes bits, bytes, numbers, chunks and the end, without regard to the format. Half of the time, in the header."""
    out, end = bytearray(content), rng.choice([len(content), 64])
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at, source, size = rng.randrange(end + 1), rng.randrange(len(out) + 1), rng.choice([1, 4, 8, 64, 1024])
        number = rng.choice(NUMBERS) % 2**32
        replacements = [  # the new bytes, and how many old ones they replace
            (bytes(byte ^ 1 << rng.randrange(8) for byte in out[at : at + 1]), 1),
            (rng.randbytes(1), 1),
            (struct.pack("<I", number), 4),
            (struct.pack(">I", number), 4),
            (struct.pack("<Q", number**2), 8),
            (out[source : source + size], 0),
            (out[source : source + size], size),
            (b"", size),
            (rng.randbytes(size), 0),
            (b"", rng.choice([size, size, len(out)])),
        ]
        new, old = rng.choice(replacements)
        out[at : at + old] = new
    return bytes(out)


def nodes(value) -> list[tuple]:
    """All places (container, key) below a JSON value or a dict of tensors. The paths of pictures come five times."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = []
    for key in keys:
        found += [(value, key)] * (5 if key == "image" else 1)
        found += nodes(value[key])
    return found


def edit_json(content: bytes, rng: random.Random) -> bytes:
    """Removes, renames and replaces parts of a JSON value, of JSON lines, or of a .safetensors header."""
    if content[:1] not in b"[{":  # .safetensors: the length of a JSON text, the text, the numbers
        end = 8 + int.from_bytes(content[:8], "little")
        header = edit_json(content[8:end], rng)
        return len(header).to_bytes(8, "little") + header + content[end:]
    has_lines = b"}\n{" in content
    root = [[json.loads(line) for line in content.splitlines()] if has_lines else json.loads(content)]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        (box, key), (other_box, other_key) = rng.choices(nodes(root), k=2)
        kind = rng.randrange(7)
        if kind == 0 and box is not root:
            del box[key]
        elif kind == 1 and isinstance(box, dict):
            box[rng.choice(TEXTS)] = box.pop(key)
        else:
            values = [rng.choice(VALUES), rng.choice(VALUES), other_box[other_key], [box[key]], {"a": box[key]}]
            box[key] = json.loads(json.dumps(rng.choice(values)))  # a copy: a value must not contain itself
    ascii, has_lines = rng.random() < 0.5, has_lines and isinstance(root[0], list)
    texts = [json.dumps(value, ensure_ascii=ascii) for value in (root[0] if has_lines else root[:1])]
    text = "\n".join(texts).replace(f'"{RAW_MARK}"', rng.choice(RAW_JSON))
    return text.encode("utf-8", "surrogatepass")


def edit_zip(content: bytes, rng: random.Random) -> bytes:
    """Renames, exchanges, repeats and compresses entries, damages one, hides a bomb in one, or falsifies headers."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [[info.filename, archive.read(info), info.compress_type] for info in archive.infolist()]
    pickles, kind = [entry for entry in entries if entry[0].endswith("/data.pkl")], rng.randrange(6)
    entry, other = rng.choices(entries, k=2)
    if pickles and rng.random() < 0.5:
        kind = -1
        pickles[0][1] = edit_pickle(pickles[0][1], rng)
    elif kind == 0:
        text = rng.choice(TEXTS)[:60_000].encode("utf-8", "replace").decode()
        entry[0] = rng.choice(["", entry[0]]) + text + "x"
    elif kind == 1:
        entry[1] = rng.choice([other[1], damage_bytes(entry[1], rng)])
        entry[2] = rng.choice([0, 0, 8, 12, 14])  # stored, deflated, bzip2, LZMA
    elif kind == 2:
        entries = rng.sample(entries, len(entries) - rng.randrange(2)) + [other]
    elif kind == 3:
        entry[1:] = BOMB, zipfile.ZIP_STORED  # the headers are changed below
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, part, method in entries:
            archive.writestr(zipfile.ZipInfo(name), part, method)
    out = bytearray(file.getvalue())
    if kind == 3:
        declare_deflated(out, entry[0].encode(), rng)
    if kind > 3:
        falsify_headers(out, rng)
    return bytes(out)


def declare_deflated(out: bytearray, name: bytes, rng: random.Random):
    """Makes both headers of the entry that contains BOMB say that it is deflated, and of some size."""
    size = struct.pack("<I", rng.choice([BOMB_SIZE, BOMB_SIZE, 1000, 2**28]))
    for at in (out.index(BOMB) - len(name) - 22, out.rindex(name + b"PK") - 36):  # of the compression method
        out[at] = zipfile.ZIP_DEFLATED
        out[at + 14 : at + 18] = size


def falsify_headers(out: bytearray, rng: random.Random):
    for _ in range(rng.choice([1, 1, 2])):
        signature, length = rng.choice(ZIP_HEADERS)
        start = rng.choice([match.start() for match in re.finditer(signature, out)])
        at, size = start + rng.randrange(4, length, 2), rng.choice([2, 4])
        old = int.from_bytes(out[at : at + 4], "little")
        number = rng.choice([*NUMBERS, old + 1, old * 99]) % 2**64
        out[at : at + size] = struct.pack("<Q", number)[:size]


def opcodes(content: bytes) -> list[tuple]:
    """(opcode, argument, position) of all pickles at the start of a file; older files of PyTorch hold several."""
    file, found = io.BytesIO(content), []
    while True:
        try:
            found += list(pickletools.genops(file))
        except Exception:  # what follows is not a pickle
            return found


def edit_pickle(content: bytes, rng: random.Random) -> bytes:
    """Removes, repeats, exchanges opcodes, changes their arguments, or adds calls that must never happen."""
    ops = opcodes(content)
    starts = [start for _, _, start in ops]
    parts = [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)])]

    def places(kind: str) -> list[int]:
        return [i for i, (op, argument, _) in enumerate(ops) if re.search(kind, op.name) and argument is not None]

    integers, strings, classes = (places(kind) for kind in ("INT|LONG", "BINUNICODE", "GLOBAL"))
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        (i, j), kind = rng.choices(range(1, len(parts)), k=2), rng.randrange(8)
        name = "{}\n{}\n".format(*rng.choice(GLOBALS).split()).encode()
        if kind < 2:
            parts[i], parts[j] = rng.choice([(b"", parts[j]), (parts[i] * 2, parts[j]), (parts[j], parts[i])])
        elif kind < 6:
            text = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
            indices, new = rng.choice([
                (integers, b"\x8a\x09" + rng.choice(NUMBERS).to_bytes(9, "little", signed=True)),
                (classes, b"c" + name),
                (strings, b"X" + struct.pack("<I", len(text)) + text),
            ])  # fmt: skip
            parts[rng.choice(indices or [1])] = new
        else:
            argument = rng.choice([b"X\x0b\0\0\0touch PWNED", b"\x8a\x05\0\0\0\0\2"])  # a command, or 2**33 bytes
            call = rng.choice([b"c" + name + argument + b"\x85R", b"(" + argument + b"i" + name])
            parts[i] += call + rng.choice([b"0", b""])  # the result is dropped or stays on the stack
    return b"".join(parts)


def edit_tensors(content: bytes, rng: random.Random) -> bytes:
    """Replaces or renames a value of a saved dict, or the dict itself, by anything that torch.save can write."""
    weights, file = torch.load(io.BytesIO(content), weights_only=True), io.BytesIO()
    (box, key), kind = rng.choice(nodes(weights)), rng.randrange(6)
    if kind < 3:
        tensor = box[key] if isinstance(box[key], torch.Tensor) else torch.ones(8, 8)
        box[key] = rng.choice(TENSORS)(tensor)
    elif kind == 3:
        box[key] = rng.choice(VALUES)
    elif isinstance(box, dict):
        new_key = rng.choice([*TEXTS, 7, None, (1, 2), f"{key}.x"])
        box[new_key] = box.pop(key) if kind == 4 else box[key]
    containers = [list(weights), tuple(weights.values()), {}, None, 3, torch.ones(3)]
    weights = rng.choice([weights] * 99 + containers)
    torch.save(weights, file, _use_new_zipfile_serialization=rng.random() < 0.9)
    return file.getvalue()


def edit_picture(content: bytes, rng: random.Random) -> bytes:
    """Changes the width, the height or another number of a picture's header."""
    headers = [header for header in PICTURE_HEADERS if header[0] in content]
    out, (mark, offsets, number_format) = bytearray(content), rng.choice(headers)
    at, size = content.index(mark) + rng.choice(offsets), struct.calcsize(number_format)
    out[at : at + size] = struct.pack(number_format, rng.choice(NUMBERS) % 256**size)
    if mark == b"IHDR":
        out[29:33] = struct.pack(">I", zlib.crc32(out[12:29]))
    return bytes(out)


EDITS = {  # suffix of a file -> what damages it with regard to its format
    ".json": [edit_json], ".jsonl": [edit_json], ".safetensors": [edit_json], ".zip": [edit_zip],
    ".pt": [edit_zip, edit_tensors], ".pth": [edit_zip, edit_tensors], ".bin": [edit_zip, edit_tensors],
    ".old": [edit_tensors, edit_pickle], **{Path(name).suffix: [edit_picture] for name in PICTURES[:-1]},
}  # fmt: skip


# --- what a loader does


@dataclass
class Act:
    """Something that Python's audit hook has seen."""

    path: str  # the file it concerns; "" = none
    writes: bool
    text: str


ACTS: list[Act] = []


def record_act(event: str, arguments: tuple):
    """The audit hook: records which files are opened, and every other act on files, processes and the network."""
    path = ""
    if arguments and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(arguments[0]))
    if event == "open" and path:
        writes = bool((arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        ACTS.append(Act(path, writes, f"open {path}"))
    elif re.match(EVENTS, event) and not (event == "ctypes.dlopen" and arguments[0] is None):
        ACTS.append(Act(path, True, f"{event} {arguments!r:.100}"))


def forbidden_acts(name: str, root: Path) -> list[str]:
    """The recorded acts that a loader must not do. A run directory may name a LLaMA and a ViT anywhere."""
    readable = "/" if "load_run" in name else (f"{root}/case", f"{root}/target", *PYTHON_FILES)
    found = []
    for act in ACTS:
        allowed = f"{root}/target" if act.writes else readable
        if not act.path.startswith(allowed) or not act.path:
            found.append(act.text)
    return found


def fault_of_message(message: str, name: str) -> str:
    """What is wrong with an error message; "" if it is one short printable line that names the file."""
    text = "".join(c for c in message if not 0xD800 <= ord(c) < 0xE000)  # lone surrogates print as "?"
    if printable(text) == text and len(text) < 1000 and name in text:
        return ""
    return f"message of several lines, or too long, or without the file's name: {message[:300]!r}"


def modification_times(root: Path) -> dict[str, int]:
    paths = [os.path.join(folder, file) for folder, _, files in os.walk(root) for file in ("", *files)]
    return {path: os.lstat(path).st_mtime_ns for path in paths}


# --- cases


@dataclass
class Outcome:
    end: str  # "loaded", "refused" or "finding"
    damage: str  # what was done to which files
    fault: str  # of a finding
    memory: int  # MiB by which the process grew


def damage_files(folder: Path, rng: random.Random) -> str:
    """Damages one or two files of a folder. Returns a description."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    done = []
    for path in rng.sample(files, min(len(files), rng.choice([1, 1, 1, 2]))):
        edit = rng.choice([damage_bytes, *EDITS.get(path.suffix, []) * 2])
        path.write_bytes(edit(path.read_bytes(), rng))
        done.append(f"{edit.__name__} {path.relative_to(folder)}")
    return ", ".join(done)


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # MiB


def run_case(i: int, seed: int, root: Path) -> Outcome:
    """Damages a copy of the valid files of loader i (modulo their number), loads them, and judges what happened."""
    rng = random.Random(f"{seed} {i}")
    name, (folder, load) = list(LOADERS.items())[i % len(LOADERS)]
    case = root / "case" / folder
    shutil.rmtree(case)
    shutil.copytree(root / "valid" / folder, case)
    shutil.rmtree(root / "target", ignore_errors=True)
    damage = damage_files(case, rng)
    before, began, memory = modification_times(root / "case"), time.process_time(), peak_memory()
    end, fault, unexpected = "loaded", "", None
    ACTS.clear()
    faulthandler.dump_traceback_later(TIMEOUT - 1)  # for --only: where a loader hangs
    signal.alarm(TIMEOUT)  # its signal ends the process
    try:
        load(case)
    except UserError as error:
        # An error of a run may name the LLaMA or the ViT, whose path the case may have changed.
        end, fault = "refused", fault_of_message(str(error), "/" if "load_run" in name else str(case))
    except BaseException as error:
        unexpected = error
    signal.alarm(0)
    faulthandler.cancel_dump_traceback_later()
    acts = forbidden_acts(name, root)
    seconds, memory = time.process_time() - began, peak_memory() - memory
    acts += [f"touched {path}" for path, _ in before.items() ^ modification_times(root / "case").items()]
    if unexpected:
        fault = "".join(traceback.format_exception(unexpected))  # opens files, so it comes after the judgement of the acts
    if acts or seconds > MAX_SECONDS or memory > MAX_MEMORY.get(name, DEFAULT_MEMORY):
        fault = f"took {seconds:.1f} s, {memory} MiB, did {str(acts[:3])[:500]} {fault}"
    return Outcome("finding" if fault else end, damage, fault, memory)


def run_child(cases: range, seed: int, root: Path, pipe: int):
    """Runs cases one by one and writes a line of JSON for each, until one has taken much memory. Never returns."""
    try:
        os.chdir(root / "cwd")
        resource.setrlimit(resource.RLIMIT_DATA, (CHILD_MEMORY, CHILD_MEMORY))
        if len(cases) > 1:
            for standard in (1, 2):  # hides what libraries in C print
                os.dup2(os.open(os.devnull, os.O_WRONLY), standard)
        shutil._use_fd_functions = False  # rmtree then removes files by absolute paths, which the audit hook can judge
        sys.addaudithook(record_act)
        for i in cases:
            outcome = run_case(i, seed, root)
            os.write(pipe, f"{json.dumps(vars(outcome))}\n".encode())
            if outcome.memory > RENEW_AFTER:
                os._exit(0)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def run_cases(cases: range, seed: int, root: Path) -> Iterator[Outcome]:
    """The outcome of each case. They run in a child process, which is replaced when it has died."""
    while cases:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            run_child(cases, seed, root, write_end)
        os.close(write_end)
        with open(read_end) as pipe:
            for line in pipe:
                yield Outcome(**json.loads(line))
                cases = cases[1:]
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status and cases:
            hung = " (it hung)" if status == -signal.SIGALRM else ""
            yield Outcome("finding", "--only tells", f"the process died: {status}{hung}", 0)
            cases = cases[1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, default=CASES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="CASE", help="run this case alone")
    a = parser.parse_args()
    counts, cases = Counter(), range(a.cases) if a.only is None else range(a.only, a.only + 1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder).resolve()
        (root / "cwd").mkdir()
        write_files(root / "case")
        shutil.copytree(root / "case", root / "valid")
        for name, load in LOADERS.values():  # all files are valid, and all late imports are done
            shutil.rmtree(root / "target", ignore_errors=True)
            load(root / "case" / name)
        for i, outcome in zip(tqdm(cases), run_cases(cases, a.seed, root)):
            name = list(LOADERS)[i % len(LOADERS)]
            counts[name, outcome.end] += 1
            if outcome.fault and counts[name, outcome.end] <= MAX_LISTED:
                tqdm.write(f"case {i}, {name} ({outcome.damage}): {outcome.fault}")
    for name in LOADERS:
        print(f"{name:28}", *(f"{counts[name, end]:8} {end}" for end in ("loaded", "refused", "finding")))
    raise SystemExit(any(end == "finding" for _, end in counts))


if __name__ == "__main__":
    main()
