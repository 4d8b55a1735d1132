"""formats/tensors.py: files that are damaged or hostile are refused, and weights are mapped into memory."""

import pickle
import random
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import tiny_vit
from test_checkpoint import equal, openai_weights, refused, tiny_llama, write_huggingface, write_raw
from test_torchscript import Code, write_torchscript

from checkpoint import load_llama, load_projector, load_state, load_vision
from common import UserError
from formats.tensors import load_weights

# --- files that are refused


def test_without_safetensors_the_remedy_is_named(tmp_path, monkeypatch):
    folder = write_huggingface(tiny_llama(), tmp_path / "hf", "safetensors index")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with refused(folder / "model-00001", "pip install safetensors"):
        load_llama(folder)


def test_code_in_a_file_never_runs(tmp_path):
    made = tmp_path / "made"
    torch.save({"weight": Code(made)}, tmp_path / "zip.pth")
    torch.save({"weight": Code(made)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"weight": Code(made)}, protocol=2))
    write_torchscript(openai_weights(tiny_vit(-1)), tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "script.pt") as archive, zipfile.ZipFile(tmp_path / "hostile.pt", "w") as hostile:
        for name in archive.namelist():
            code = pickle.dumps({"x": Code(made)}, protocol=2)
            hostile.writestr(name, code if name.endswith("/data.pkl") else archive.read(name))
    for name in ("zip.pth", "old.pth", "bare.pth", "hostile.pt"):
        with refused(tmp_path / name, "posix.mkdir", "never loaded"):
            load_vision(tmp_path / name)
    for protocol in (4, 5):  # PyTorch warns about these protocols, and the warning is not shown
        (tmp_path / "bare.pth").write_bytes(pickle.dumps({"weight": Code(made)}, protocol=protocol))
        with warnings.catch_warnings(record=True) as shown, refused(tmp_path / "bare.pth"):
            load_vision(tmp_path / "bare.pth")
        assert not shown
    (tmp_path / "state.pth").write_bytes((tmp_path / "zip.pth").read_bytes())
    with refused(tmp_path / "state.pth", "never loaded"):
        load_state(tmp_path)
    assert not made.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert made.exists()  # a plain unpickler runs the code


def test_damaged_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "projector.pth"
    torch.save({"weight": torch.randn(64, 64)}, path)
    good = path.read_bytes()
    for size in (0, 3, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:size])
        with refused(path, "again"):
            load_projector(path)
    for content, word in ((b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "git lfs pull"),
                          (b"<!DOCTYPE html><html>", "<!DOCTYPE"), (b"\x80\x02garbage", "damaged")):  # fmt: skip
        path.write_bytes(content)
        with refused(path, word):
            load_projector(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/picture.jpg", b"jpeg")
    with refused(path, "not a file of weights"):
        load_projector(path)
    with refused(tmp_path / "absent.pth", "No such file"):
        load_projector(tmp_path / "absent.pth")
    with refused(tmp_path, "Is a directory"):
        load_projector(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(safetensors.torch.save({"weight": torch.ones(9, 9)})[:-1])
    with refused(tmp_path / "x.safetensors", "damaged"):
        load_projector(tmp_path / "x.safetensors")


def test_text_of_a_damaged_file_cannot_act_on_the_terminal(tmp_path):
    path = tmp_path / "projector.pth"
    torch.save({"weight": torch.ones(3, 3)}, path)
    path.write_bytes(path.read_bytes().replace(b"little", b"\x1b[2J\r\n"))
    with refused(path, "endianness", "\ufffd[2J"):
        load_projector(path)
    torch.save({"\x1b[2J\n": torch.ones(3, 3), "weight": torch.ones(3, 3)}, path)
    with refused(path, "Unexpected key", "\ufffd[2J"):
        load_projector(path)


def test_a_module_instead_of_its_weights_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with refused(path, "torch.nn.modules.linear.Linear", "plain dict of tensors") as info:
        load_projector(path)
    assert len(str(info.value)) < 400


@pytest.mark.parametrize("kind", ["torchscript", "state dict"])
def test_files_damaged_anywhere_are_refused_or_loaded(tmp_path, kind):
    path, vit = tmp_path / "vit.pt", tiny_vit(-1)
    if kind == "torchscript":
        write_torchscript(openai_weights(vit), path)
    else:
        torch.save(openai_weights(vit), path)
    good, rng, n_refused = path.read_bytes(), random.Random(0), 0
    with zipfile.ZipFile(path) as archive:
        pickled = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    for _ in range(40):
        damaged = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            start = rng.choice([pickled.header_offset, len(good) - 4000])  # damages the pickle or the zip's directory
            damaged[start + rng.randrange(4000)] = rng.randrange(256)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            load_vision(tmp_path / "damaged.pt")
        except UserError as error:
            assert str(tmp_path / "damaged.pt") in str(error)
            assert str(error).isprintable()
            n_refused += 1
    assert n_refused > 15


# --- tensors that are not dense, or larger than their storage


@pytest.mark.parametrize("kind", ["nested", "sparse", "meta"])
def test_tensors_that_are_not_dense_are_refused(tmp_path, kind):
    w = torch.ones(3, 3)
    tensor = {"nested": torch.nested.nested_tensor([w, w[:2]]), "sparse": w.to_sparse(), "meta": w.to("meta")}[kind]
    torch.save({"weight": tensor}, tmp_path / "projector.pth")
    with refused(tmp_path / "projector.pth", "weight", "dense"):
        load_projector(tmp_path / "projector.pth")


@pytest.mark.parametrize("old", [False, True])
def test_a_tensor_that_claims_more_than_its_storage_is_refused(tmp_path, old):
    """A file of 1 KB may claim a tensor of any size. Converting it to another dtype would take all that memory."""
    path, storage = tmp_path / "bomb.pth", torch.ones(4)
    for size, stride in (((10**9, 10**9), (0, 0)), ((4, 2), (1, 0)), ((3, 3), (1, 0)), ((5,), (0,)), ((2, 4), (0, 1))):
        torch.save({"weight": storage.as_strided(size, stride)}, path, _use_new_zipfile_serialization=not old)
        assert path.stat().st_size < 5000
        with refused(path, "weight", "larger than its storage"):
            load_weights(path)
    torch.save({"weight": storage.as_strided((2, 2), (1, 2))}, path, _use_new_zipfile_serialization=not old)
    assert load_weights(path)["weight"].shape == (2, 2)


def test_a_tensor_of_a_torchscript_archive_that_claims_more_than_its_storage_is_refused(tmp_path):
    weights = openai_weights(tiny_vit(-1))
    write_torchscript(weights | {"visual.class_embedding": torch.ones(1)}, tmp_path / "script.pt")
    root = torch.jit.load(tmp_path / "script.pt")
    root.visual.class_embedding.data = torch.ones(1).half().expand(10**9)
    torch.jit.save(root, tmp_path / "bomb.pt")
    assert (tmp_path / "bomb.pt").stat().st_size < 2 * (tmp_path / "script.pt").stat().st_size
    with refused(tmp_path / "bomb.pt", "visual.class_embedding", "larger than its storage"):
        load_vision(tmp_path / "bomb.pt")


def test_compressed_archives_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(1000, 1000)}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for name in good.namelist():
            bomb.writestr(name, good.read(name), zipfile.ZIP_DEFLATED)
    with refused(tmp_path / "bomb.pth"):
        load_weights(tmp_path / "bomb.pth")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:  # takes 100 KB on disk
        bomb.writestr("x/constants.pkl", b"")
        bomb.writestr("x/data.pkl", bytes(10**8))
    with refused(tmp_path / "bomb.pt", "compressed"):
        load_vision(tmp_path / "bomb.pt")


# --- memory


def test_training_in_place_does_not_change_the_file(tmp_path):
    folder = write_raw(tiny_llama(), tmp_path / "raw")
    before = (folder / "consolidated.00.pth").read_bytes()
    llama = load_llama(folder)
    with torch.no_grad():
        for p in llama.parameters():
            p.add_(1)
    assert (folder / "consolidated.00.pth").read_bytes() == before
    assert equal(load_llama(folder), tiny_llama())


def test_weights_stay_mapped_files(tmp_path):
    """Pages of a private mapping that nobody writes belong to the file, so processes share them."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("finds mappings through /proc of Linux")
    file = write_raw(tiny_llama().half(), tmp_path / "raw") / "consolidated.00.pth"

    def in_file(p: torch.Tensor) -> bool:
        """Whether the memory of a tensor is a private mapping of the file."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, flags, _, _, _, *path = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            if start <= p.data_ptr() < end:
                return path == [str(file)] and flags.endswith("p")
        return False

    for dtype in (None, torch.float16):
        assert all(in_file(p) for p in load_llama(file.parent, dtype).parameters())
    assert not any(in_file(p) for p in load_llama(file.parent, torch.float32).parameters())
