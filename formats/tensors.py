"""One file of tensors -> {name: tensor}: torch.save's, safetensors, or a TorchScript archive. No code in it runs."""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from common import UserError, printable, reason
from formats import torchscript

LFS_POINTER = b"version https://git-lfs"


def load_tensors(path: str | Path) -> Any:
    """Tensors and plain values, on the CPU, mapped into memory. Raises UserError.

    The mapping is private: writing into a tensor changes neither the file nor what other processes read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); is the path right?") from None
    if head.startswith(LFS_POINTER):
        raise UserError(f"{path}: a Git LFS pointer instead of the file; fetch the file with `git lfs pull`")
    try:
        return read(path, head)
    except ImportError:
        raise UserError(f"{path}: reading it needs another package: pip install safetensors") from None
    except Exception as error:  # damaged files raise nearly any error
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(f"{path}: holds Python objects ({printable(code[1])[:120]}), which could run code and are "
                            "never loaded; save its weights as a plain dict of tensors") from None  # fmt: skip
        raise UserError(f"{path}: damaged, truncated or not a file of weights ({reason(error)}); copy or download it "
                        "again") from None  # fmt: skip


def read(path: Path, head: bytes) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    zipped = head.startswith(b"PK\x03\x04")
    if not zipped and not head.startswith(b"\x80"):  # the first byte of a pickle, PyTorch's format before 1.6
        raise ValueError(f"it starts with {head[:12]!r}")
    if zipped:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            return torchscript.read(path)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it holds compressed data")  # PyTorch writes none; unpacking it could fill the memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about pickle protocols
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The named tensors of a file, each contiguous and in memory of its own.

    Tensors that share memory would change together. Raises UserError unless each is dense and no larger than its
    storage: a few bytes of a pickle can claim a tensor of any size, with stride 0.
    """
    weights = load_tensors(path)
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UserError(f"{path}: expected a dict of tensors, as torch.save(model.state_dict(), ...) writes it")
    owned, taken = {}, set()
    for name, tensor in weights.items():
        dense = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not dense or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {printable(str(name))[:120]} is not dense or is larger than its storage; "
                            "save the weights as a plain dict of dense tensors")  # fmt: skip
        storage = tensor.untyped_storage()
        if storage.data_ptr() in taken or tensor.nbytes < storage.nbytes() or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(storage.data_ptr())
        owned[str(name)] = tensor.detach()
    return owned
