"""formats/torchscript.py: the tensors of a real archive, and archives that are damaged or would run code."""

import os
import pickle
import random
import signal
import zipfile

import pytest
import torch

from formats import torchscript

TENSORS = {
    "visual.conv1.weight": torch.randn(4, 3, 2, 2).half(),
    "visual.transformer.resblocks.0.ln_1.bias": torch.randn(4).half(),
    "logit_scale": torch.tensor(4.5).half(),
    "vocab_size": torch.tensor(49408),
}


class Part(torch.nn.Module):
    def forward(self, x):
        return x


def write_torchscript(weights: dict, path):
    """A TorchScript archive whose modules hold the weights under their names: integers as buffers, floats in fp16."""
    root = Part()
    for name, tensor in weights.items():
        *owners, leaf = name.split(".")
        module = root
        for owner in owners:
            if not hasattr(module, owner):
                module.add_module(owner, Part())
            module = getattr(module, owner)
        if tensor.dtype == torch.int64:
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, torch.nn.Parameter(tensor.half()))
    torch.jit.save(torch.jit.trace(root, torch.ones(1), check_trace=False), path)


def write_archive(path, data: bytes, compression=zipfile.ZIP_STORED):
    """An archive with the given data.pkl and no tensors."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", data)


def test_tensors_of_a_real_archive(tmp_path, monkeypatch):
    write_torchscript(TENSORS, tmp_path / "vit.pt")
    assert isinstance(torch.jit.load(tmp_path / "vit.pt"), torch.jit.ScriptModule)
    monkeypatch.setattr(torch.jit, "load", None)
    tensors = torchscript.read(tmp_path / "vit.pt")
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


class Code:
    """Makes a folder when it is unpickled by `pickle.loads`."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_code_never_runs(tmp_path, protocol):
    data = pickle.dumps({"x": Code(tmp_path / "made")}, protocol=protocol)
    write_archive(tmp_path / "hostile.pt", data)
    with pytest.raises(pickle.UnpicklingError, match="GLOBAL posix.mkdir"):
        torchscript.read(tmp_path / "hostile.pt")
    assert not (tmp_path / "made").exists()
    pickle.loads(data)
    assert (tmp_path / "made").exists()  # a plain unpickler runs the code


def test_compressed_tensors_are_refused(tmp_path):
    write_archive(tmp_path / "bomb.pt", bytes(10**8), zipfile.ZIP_DEFLATED)  # 100 KB on the disk
    with pytest.raises(ValueError, match="data.pkl is compressed"):
        torchscript.read(tmp_path / "bomb.pt")


def test_shared_and_cyclic_modules_are_visited_once(tmp_path):
    module = b"c__torch__\nM\n)\x81}(X\x01\0\0\0a%sX\x01\0\0\0b%sub"  # {"a": ..., "b": ...}
    levels = [module % (b"h%c" % i, b"h%c" % i) + b"q%c" % (i + 1) for i in range(100)]  # each holds the last one twice
    write_archive(tmp_path / "doubling.pt", b"\x80\x02Nq\0" + b"".join(levels) + b".")
    cycle = b"\x80\x02c__torch__\nM\n)\x81q\0}X\x01\0\0\0ah\0sb."
    write_archive(tmp_path / "cycle.pt", cycle)

    def fail(*_):
        raise TimeoutError("the modules are visited for ever")

    handler = signal.signal(signal.SIGALRM, fail)
    signal.alarm(10)
    assert torchscript.read(tmp_path / "doubling.pt") == torchscript.read(tmp_path / "cycle.pt") == {}
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    write_torchscript(TENSORS, tmp_path / "vit.pt")
    with zipfile.ZipFile(tmp_path / "vit.pt") as good, zipfile.ZipFile(tmp_path / "short.pt", "w") as short:
        for name in good.namelist():
            data = good.read(name)
            short.writestr(name, data[:-2] if "/data/" in name and len(data) > 8 else data)
    with pytest.raises(ValueError, match="out of bounds"):
        torchscript.read(tmp_path / "short.pt")


def test_damaged_archives_raise_value_error_or_unpickling_error(tmp_path):
    write_torchscript(TENSORS, tmp_path / "vit.pt")
    good = (tmp_path / "vit.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "vit.pt") as archive:
        pickled = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
    (tmp_path / "damaged.pt").write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError):
        torchscript.read(tmp_path / "damaged.pt")
    rng = random.Random(0)
    n_errors = 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            start = rng.choice([pickled.header_offset, len(good) - 1500])  # data.pkl, or the zip's directory
            data[start + rng.randrange(1500)] = rng.randrange(256)
        (tmp_path / "damaged.pt").write_bytes(data)
        try:
            torchscript.read(tmp_path / "damaged.pt")
        except (ValueError, pickle.UnpicklingError):
            n_errors += 1
    assert n_errors > 50
