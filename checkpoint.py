"""Published weights in, run directories and training state in and out.

    load_llama    Meta's raw folder (any number of model-parallel files) or a Hugging Face folder
    load_vision   OpenAI's CLIP archive (ViT-L-14.pt), a Hugging Face CLIP folder, or the demo's file
    load_projector, build       W, and the three parts put together
    save_run, load_run          a run directory: all that is needed to use what was trained
    save_state, load_state      what is needed to train on

Weights come in by tables, old name -> new name, None for what is knowingly dropped, and strictly: every name and
every shape is accounted for. Files are mapped into memory, not read, and converted one parameter at a time into a
model built without memory (on the "meta" device), so that the peak stays near the size of the weights.

What others wrote stays data: no pickled code ever runs. What we write appears whole or not at all.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import mmap
import os
import pickle
import re
import shutil
import warnings
import zipfile
from io import BytesIO
from pathlib import Path

import torch
import torch.nn as nn

from conversation import UserError, load_tokenizer
from model import LLaMA, LLaMAConfig, LLaVA, Projection
from vision import FEATURE_LAYER, HEAD_DIM, VisionConfig, VisionTransformer

# --- files: written whole or not at all, read without trust


@contextlib.contextmanager
def replacing(path):
    """A file to write. When the block ends well it becomes `path`; else it is removed and the old `path` is unharmed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # in the same folder: a rename is atomic only within a disk
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        free = shutil.disk_usage(path.parent).free // 2**20 if path.parent.is_dir() else 0
        reason = str(error).split("\n")[0][:150]
        raise UserError(f"{path}: not written ({reason}; {free} MiB free there); what was there before is unharmed") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder):
    """Makes renames in a folder last through a power cut."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_json(path, data):
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def read_json(path, kind=object):
    """kind: dict or list, if nothing else will do. Raises UserError with the position of what is not JSON."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not JSON at {place} ({error.msg}); is the file complete?") from None
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({str(error)[:100]})") from None
    if not isinstance(data, kind):
        raise UserError(f"{path}: holds a JSON {type(data).__name__}, expected a {kind.__name__}")
    return data


def save_tensors(path, data):
    """torch.save of tensors and plain Python values."""
    with replacing(path) as file:  # a file, not its name: the name would become part of the content
        torch.save(data, file)


def load_tensors(path):
    """What torch.save wrote, on the CPU and memory mapped; tensors and plain values only, no code is run.

    The mapping is private: writing into a tensor changes neither the file nor what other processes see.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: only a Git LFS pointer to the weights; get them with `git lfs pull`")
    zipped = head.startswith(b"PK\x03\x04")
    if zipped and not zipfile.is_zipfile(path):  # its table of contents is at its end
        raise UserError(f"{path}: truncated, {path.stat().st_size} bytes are there; copy or download it again")
    if not zipped and not head.startswith(b"\x80"):  # a bare pickle: PyTorch's format before 1.6
        raise UserError(f"{path}: not a PyTorch file (it begins with {head[:12]!r})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a TorchScript archive raises as well
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged pickles raise nearly anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(f"{path}: holds Python code or objects ({code[1]}), which are never loaded; "
                            "get the weights as plain tensors") from None  # fmt: skip
        reason = str(error).strip().split("\n")[0][:150]
        raise UserError(f"{path}: damaged, or not tensors ({type(error).__name__}: {reason}); copy it again") from None


class Holder:
    """Stands for every class that a TorchScript archive names: keeps the attributes, runs nothing."""

    attributes: dict = {}

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        self.attributes = state if isinstance(state, dict) else {}

    def tensors(self, prefix="") -> dict[str, torch.Tensor]:
        found, (attributes, self.attributes) = {}, (self.attributes, {})  # emptied: no object is visited twice
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, Holder):
                found |= value.tensors(f"{prefix}{name}.")
        return found


class TorchScriptReader(pickle.Unpickler):
    """Reads a TorchScript archive (a zip of `data.pkl`, each tensor's bytes, and code) for its tensors alone.

    torch.jit.load would compile the archive's code. Here a name in the pickle becomes a Holder, a dtype or
    `rebuild`; any other is refused. Tensors are slices of the mapped file.
    """

    DTYPES = {"HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
              "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32}  # fmt: skip

    def __init__(self, path):
        self.archive = zipfile.ZipFile(path)
        self.root = next(n for n in self.archive.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
        self.bytes = torch.UntypedStorage.from_file(str(path), False, os.path.getsize(path))  # private mapping
        start, stop = self.place("data.pkl")
        super().__init__(BytesIO(bytes(self.bytes[start:stop])))

    def place(self, name) -> tuple[int, int]:
        """Where an entry's bytes are in the archive: after its 30 bytes of header, its name and an extra field."""
        entry = self.archive.getinfo(self.root + name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"{name} is compressed")
        header = bytes(self.bytes[entry.header_offset : entry.header_offset + 30])
        start = entry.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
        return start, start + entry.file_size

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__" or module == "torch.jit._pickle" or name == "OrderedDict":
            return Holder
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid  # ("storage", dtype, key, device, numel)
        start, stop = self.place(f"data/{key}")
        return dtype, self.bytes[start:stop]

    def rebuild(self, storage, offset, size, stride, *_):
        dtype, data = storage
        return torch.empty(0, dtype=dtype).set_(data, offset, size, stride)


def load_weights(path) -> dict[str, torch.Tensor]:
    """Names and tensors of a PyTorch file, a TorchScript archive or a .safetensors file, memory mapped."""
    path = Path(path)
    torchscript = zipfile.is_zipfile(path) and any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist())
    if path.suffix == ".safetensors" or torchscript:
        try:
            if torchscript:
                return TorchScriptReader(path).load().tensors()
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        except ImportError:
            raise UserError(f"{path}: needs the package safetensors; pip install safetensors") from None
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error)[:150]}"
            raise UserError(f"{path}: truncated, damaged or not plain weights ({reason}); copy it again") from None
    weights = load_tensors(path)
    if not isinstance(weights, dict) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise UserError(f"{path}: expected names and tensors, as torch.save(model.state_dict()) writes them")
    return {str(name): tensor.detach() for name, tensor in weights.items()}


def checksum(path) -> str:
    """sha256 of a file, or of a Hugging Face folder's config.json and weights."""
    path, digest = Path(path), hashlib.sha256()
    inside = sorted(p for p in path.iterdir() if p.name == "config.json" or p.suffix in (".bin", ".safetensors"))\
        if path.is_dir() else [path]
    for part in inside:
        with open(part, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest() if path.is_dir() else b"")
    return digest.hexdigest()
