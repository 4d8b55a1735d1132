"""Reads the tensors of a TorchScript archive, such as OpenAI's ViT-L-14.pt, without running any of its code.

The archive is a zip file: `data.pkl` holds the modules and their attributes, `data/0`, `data/1`, ... hold the bytes of
the tensors, and `code/` holds programs. `torch.jit.load` would compile these programs; `read` never opens them.
"""

import io
import pickle
import zipfile
from pathlib import Path

import torch

from common import reason

DTYPES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}


def read(path: str | Path) -> dict[str, torch.Tensor]:
    """The parameters and buffers under their names in the archive: {"visual.conv1.weight": (1024, 3, 14, 14), ...}.

    Raises pickle.UnpicklingError if data.pkl names any other object, and ValueError if the archive is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return tensors_of(ArchiveUnpickler(archive).load())
    except (ValueError, pickle.UnpicklingError):
        raise
    except Exception as error:  # a damaged pickle raises nearly any exception
        raise ValueError(reason(error)) from None


class Module:
    """Replaces every class that the archive names. It stores the attributes and has no behaviour."""

    def __init__(self, *arguments):
        self.attributes = {}

    def __setstate__(self, attributes: dict):
        self.attributes = dict(attributes)


class ArchiveUnpickler(pickle.Unpickler):
    """Unpickles data.pkl. A name in it becomes a `Module`, a dtype or `rebuild_tensor`; all other names are refused."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive
        self.root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        self.storages = {}
        super().__init__(io.BytesIO(self.read_entry("data.pkl")))

    def read_entry(self, name: str) -> bytearray:
        entry = self.archive.getinfo(self.root + name)
        if entry.compress_type != zipfile.ZIP_STORED:  # PyTorch compresses only code/; other files may be zip bombs
            raise ValueError(f"{name} is compressed")
        return bytearray(self.archive.read(entry))

    def find_class(self, module: str, name: str):
        if module.split(".")[0] == "__torch__" or module == "torch.jit._pickle" or name == "OrderedDict":
            return Module
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return rebuild_tensor
        raise pickle.UnpicklingError(f"Unsupported GLOBAL {module}.{name}")

    def persistent_load(self, pid: tuple) -> torch.Tensor:
        """pid: ("storage", dtype, name of the entry, device, number of elements). Each storage is read once."""
        _, dtype, key, *_ = pid
        if (key, dtype) not in self.storages:
            self.storages[key, dtype] = torch.frombuffer(self.read_entry(f"data/{key}"), dtype=dtype)
        return self.storages[key, dtype]


def rebuild_tensor(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *_) -> torch.Tensor:
    return storage.as_strided(size, stride, offset)  # raises RuntimeError beyond the storage's end


def tensors_of(root) -> dict[str, torch.Tensor]:
    """Collects the tensors of a tree of modules under dotted names. Each module is visited once, so cycles end."""
    tensors, visited, stack = {}, set(), [("", root)]
    while stack:
        name, value = stack.pop()
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, Module) and id(value) not in visited:
            visited.add(id(value))
            prefix = f"{name}." if name else ""
            stack += [(f"{prefix}{key}", attribute) for key, attribute in value.attributes.items()]
    return tensors
