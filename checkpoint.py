"""Published weights in (by name tables, strictly); run directories and training state in and out.

    load_llama                  Meta's raw folder, of any number of model-parallel files, a Hugging Face folder, deltas
                                over either, or a finished LLaVA, of the original release or of transformers
    load_vision                 OpenAI's CLIP archive (ViT-L-14.pt), a Hugging Face CLIP folder, or the demo's file
    load_projector, build       W, and the three parts put together
    save_run, load_run          a run directory: all that is needed to use what was trained; open_run also checks it
    save_state, load_state      all that is needed to train on (of a model that processes share: parallel.py)

Files are mapped into memory (but TorchScript's, such as OpenAI's archive, and PyTorch's before 1.6 are read whole) and
converted one parameter at a time into a model built without memory (on the "meta" device), so the peak stays near the
size of the weights. What others wrote stays data: no pickled code ever runs. What is written here appears whole or not
at all.

    python checkpoint.py import LLAVA RUN     # a finished LLaVA -> a run directory, to be asked or trained on here
    python checkpoint.py export RUN FOLDER    # a run directory -> a folder that transformers loads (both: convert.py)
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn as nn
from sentencepiece import SentencePieceProcessor

from conversation import UserError, load_tokenizer, visible
from model import LLaMA, LLaMAConfig, LLaVA, Projection
from vision import FEATURE_LAYER, HEAD_DIM, VisionConfig, VisionTransformer

# --- names: old -> new, None = knowingly dropped. N is a layer's number, * any rest of a name; the first row that fits
# counts. Rows with the same new name are parts of one tensor, in this order.

RAW_LLAMA = {
    "rope.freqs": None,  # RoPE's angles are computed
    "layers.N.attention.inner_attention.rope.freqs": None,
    "*": "*",
}
HF_LLAMA = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.N.input_layernorm.weight": "layers.N.attention_norm.weight",
    "model.layers.N.self_attn.q_proj.weight": "layers.N.attention.wq.weight",
    "model.layers.N.self_attn.k_proj.weight": "layers.N.attention.wk.weight",
    "model.layers.N.self_attn.v_proj.weight": "layers.N.attention.wv.weight",
    "model.layers.N.self_attn.o_proj.weight": "layers.N.attention.wo.weight",
    "model.layers.N.self_attn.rotary_emb.inv_freq": None,
    "model.layers.N.post_attention_layernorm.weight": "layers.N.ffn_norm.weight",
    "model.layers.N.mlp.gate_proj.weight": "layers.N.feed_forward.w1.weight",
    "model.layers.N.mlp.down_proj.weight": "layers.N.feed_forward.w2.weight",
    "model.layers.N.mlp.up_proj.weight": "layers.N.feed_forward.w3.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
OPENAI_CLIP = {
    "visual.ln_post.*": None,  # what comes after the grid features
    "visual.proj": None,
    "visual.*": "*",
    "transformer.*": None,  # the text tower, down to the end
    "token_embedding.weight": None,
    "positional_embedding": None,
    "ln_final.*": None,
    "text_projection": None,
    "logit_scale": None,
    "input_resolution": None,
    "context_length": None,
    "vocab_size": None,
}
HF_CLIP = {  # after the prefix `vision_model.`, which transformers 5 leaves off
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.position_ids": None,
    "pre_layrnorm.*": "ln_pre.*",
    "encoder.layers.N.layer_norm1.*": "transformer.resblocks.N.ln_1.*",
    "encoder.layers.N.self_attn.q_proj.*": "transformer.resblocks.N.attn.in_proj_*",
    "encoder.layers.N.self_attn.k_proj.*": "transformer.resblocks.N.attn.in_proj_*",
    "encoder.layers.N.self_attn.v_proj.*": "transformer.resblocks.N.attn.in_proj_*",
    "encoder.layers.N.self_attn.out_proj.*": "transformer.resblocks.N.attn.out_proj.*",
    "encoder.layers.N.layer_norm2.*": "transformer.resblocks.N.ln_2.*",
    "encoder.layers.N.mlp.fc1.*": "transformer.resblocks.N.mlp.c_fc.*",
    "encoder.layers.N.mlp.fc2.*": "transformer.resblocks.N.mlp.c_proj.*",
    "post_layernorm.*": None,
    "visual_projection.weight": None,
    "text_model.*": None,
    "text_projection.weight": None,
    "logit_scale": None,
}
PROJECTOR = {"model.mm_projector.*": "*", "*": "*"}  # the original's mm_projector.bin, our projector.pth
LLAVA = {  # a finished LLaVA's parts, as the original release, files of transformers, and its modules name them
    "model.mm_projector.*": "projector.*",
    "multi_modal_projector.*": "projector.*",
    "model.multi_modal_projector.*": "projector.*",
    "vision_tower.*": "vision.*",
    "model.vision_tower.*": "vision.*",
    "language_model.*": "llama.*",
    "model.language_model.*": "llama.model.*",
    "*": "llama.*",
}

# The parts of a tensor are concatenated along dim 0, but model-parallel files hold slices of these matrices' inputs
# (dim 1) and equal copies of the norms (None).
PARTS_DIM = {"wo": 1, "w2": 1, "tok_embeddings": 1, "attention_norm": None, "ffn_norm": None, "norm": None}
# Settings of params.json (all that LLaMA 1 and 2 have), and Hugging Face's names of what LLaMAConfig holds.
PARAMS = {"dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size",
          "rope_theta"}  # fmt: skip
HF_CONFIG = {
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads", "intermediate_size": "ffn_dim", "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta",
}  # fmt: skip
RAW, HF = "a LLaMA in Meta's raw format", "a LLaMA of Hugging Face"  # what a --llama folder may be
FIRST_LLAVA, HF_LLAVA = "a LLaVA as originally released", "a LLaVA of transformers"
SPARE_ROWS = 256  # of a LLaMA beyond its tokenizer's pieces, at most: some pad 32,000 rows, or add tokens to them


# --- files


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write. If the block ends well it becomes `path`, else it is removed and the old `path` is unharmed."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # in the same folder: only within a disk is a rename atomic
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the content is on the disk before the name is
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        raise unwritten(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def unwritten(path: Path, error: BaseException) -> UserError:
    free = shutil.disk_usage(path.parent).free // 2**20 if path.parent.is_dir() else 0
    return UserError(f"{path}: could not be written ({reason(error)}; {free} MiB are free there), what was there "
                     "before is unharmed; make room or choose another place")  # fmt: skip


def sync_folder(folder):
    """Makes the renames in a folder outlast a power cut."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def reason(error: BaseException) -> str:
    """In a few words of one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    text = re.sub(r"Weights only load failed.*WeightsUnpickler error:\s*", "", text, flags=re.DOTALL)  # PyTorch's essay
    text = re.sub(r".*inline_container.*unexpected pos.*", "No space left?", text)  # its words for a full disk
    return visible(text.split("\n")[0])[:150]


def write_json(path: str | Path, data):
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def read_json(path: str | Path, kind: type = object) -> Any:
    """kind: dict or list, where nothing else will do. Raises UserError with the position of what is not JSON."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: not JSON at {place} ({error.msg}); is the file complete?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({reason(error)}); is the path right?") from None
    if not isinstance(data, kind):
        names = {dict: "object", list: "list", str: "text", bool: "true or false", type(None): "null"}
        raise UserError(f"{path}: holds a JSON {names.get(type(data), 'number')}, expected a JSON {names[kind]}")
    return data


def save_tensors(path: str | Path, data):
    """torch.save of tensors and plain Python values."""
    with replacing(path) as file:  # a file, not its name: torch.save would write the temporary name into the content
        torch.save(data, file)


def load_tensors(path: str | Path) -> Any:
    """What torch.save wrote (or the tensors of a .safetensors file), on the CPU, memory mapped.

    Tensors and plain values only: no code runs, whatever the file holds. The mapping is private: a write into a
    tensor changes neither the file nor what other processes see of it. TorchScript and PyTorch before 1.6: read whole.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); is the path right?") from None
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: only a Git LFS pointer to the file; fetch the file itself with `git lfs pull`")
    zipped = head.startswith(b"PK\x03\x04")
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}
        if zipped:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            stored = [entry.file_size for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
            script = any(entry.filename.endswith("/constants.pkl") for entry in entries)
            if sum(stored) > os.path.getsize(path) or len(stored) < len(entries) and not script:
                raise ValueError("its parts are compressed or overlap")  # PyTorch's never: a zip bomb
            if script:
                return TorchScriptReader(path).load().tensors()
        if not zipped and not head.startswith(b"\x80"):  # a bare pickle is PyTorch's format before 1.6
            raise ValueError(f"it begins with {head[:12]!r}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, of pickle protocols: what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except ImportError:
        raise UserError(f"{path}: to read it, pip install safetensors") from None
    except zipfile.BadZipFile:  # its table of contents is at its end
        raise UserError(f"{path}: truncated at {os.path.getsize(path)} bytes; copy or download it again") from None
    except Exception as error:  # damaged files raise nearly anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(f"{path}: holds Python objects ({visible(code[1])[:120]}), which could run code and are "
                            "never loaded; get its weights as a plain dict of tensors") from None  # fmt: skip
        raise UserError(f"{path}: damaged or not weights ({reason(error)}; code and objects are never loaded); copy or "
                        "download it again") from None  # fmt: skip


class Holder:
    """Stands for every class that a TorchScript archive names: keeps the attributes, runs nothing."""

    attributes = {}

    def __init__(self, *_):
        pass

    def __setstate__(self, attributes: dict):
        self.attributes = attributes

    def tensors(self, prefix: str = "") -> dict[str, torch.Tensor]:
        found, attributes = {}, self.attributes
        self.attributes = {}  # nothing is visited twice, so a loop of references ends
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor):
                found[prefix + name] = value
            elif isinstance(value, Holder):
                found |= value.tensors(f"{prefix}{name}.")
        return found


class TorchScriptReader(pickle.Unpickler):
    """Reads a TorchScript archive (a zip of data.pkl, a file per tensor, and code) for its tensors alone.

    torch.jit.load would compile and run code of the archive. Here a name in the pickle can only become a Holder, a
    dtype or `rebuild`; any other is refused.
    """

    DTYPES = {"HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "FloatStorage": torch.float32,
              "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32}  # fmt: skip

    def __init__(self, path):
        self.archive = zipfile.ZipFile(path)
        self.root = next(name for name in self.archive.namelist() if name.endswith("/data.pkl"))[: -len("data.pkl")]
        self.storages = {}
        super().__init__(io.BytesIO(self.read("data.pkl")))

    def read(self, name) -> bytearray:
        entry = self.archive.getinfo(self.root + name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")  # PyTorch never does, but the code: a zip bomb
        return bytearray(self.archive.read(entry))

    def find_class(self, module, name):
        if module.split(".")[0] == "__torch__" or module == "torch.jit._pickle" or name == "OrderedDict":
            return Holder
        if module == "torch" and name in self.DTYPES:
            return self.DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.rebuild
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    def persistent_load(self, pid):
        _, dtype, key, *_ = pid  # ("storage", dtype, key, device, numel)
        if (key, dtype) not in self.storages:  # read once, however often it is named
            storage = torch.frombuffer(self.read(f"data/{key}"), dtype=dtype).clone()  # memory of PyTorch's own
            self.storages[key, dtype] = storage
        return self.storages[key, dtype]

    def rebuild(self, data, offset, size, stride, *_):
        return data.as_strided(size, stride, offset)  # checks the bounds


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    weights = load_tensors(path)
    if not isinstance(weights, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
        raise UserError(f"{path}: expected a dict of tensors, as torch.save(model.state_dict(), ...) writes it")
    if odd := [str(name) for name, tensor in weights.items() if not ordinary(tensor)]:
        raise UserError(f"{path}: {few(odd)}: not stored as plain numbers, or claims more of them than the file holds; "
                        "get the weights as a plain dict of dense tensors")  # fmt: skip
    return {str(name): tensor.detach() for name, tensor in weights.items()}


def ordinary(tensor: torch.Tensor) -> bool:
    """Dense numbers in memory: a few bytes of pickle can claim any size (stride 0), or be another kind of tensor."""
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a Hugging Face folder: of the one file, or of those that the index names."""
    for name in ("pytorch_model.bin", "model.safetensors"):
        index, files = folder / f"{name}.index.json", [name]
        if index.is_file():
            places = read_json(index, dict).get("weight_map")
            files = list(places.values()) if isinstance(places, dict) else [""]
            if not all(isinstance(f, str) and re.fullmatch(r"[\w.-]{1,200}", f) and f == Path(f).name for f in files):
                raise UserError(f"{index}: expected a weight_map from names to files of this folder")
            files = sorted(set(files))
        elif not (folder / name).is_file():
            continue
        weights = {}
        for file in files:
            part = load_weights(folder / file)
            if part.keys() & weights:
                raise UserError(f"{folder / file}: {few(part.keys() & weights)} is in an earlier part too; download "
                                "all parts again, from one model")  # fmt: skip
            weights |= part
        return weights
    raise UserError(f"{folder}: expected pytorch_model.bin or model.safetensors, or the index JSON of its parts")


def checksum(path: str | Path) -> str:
    """sha256 of a file, or of a Hugging Face folder: of its config.json and weights, in the order of their names."""
    digest, path = hashlib.sha256(), Path(path)
    for part in sorted(path.iterdir()) if path.is_dir() else [path]:
        if part == path or part.name == "config.json" or part.suffix in (".bin", ".safetensors"):
            try:
                with open(part, "rb") as file:
                    while block := file.read(2**20):
                        digest.update(block)
            except OSError as error:
                raise UserError(f"{part}: cannot be read ({reason(error)}); is the path right?") from None
    return digest.hexdigest()


# --- named tensors -> a model's parameters


def translate(weights: dict, table: dict, path) -> dict[str, list[torch.Tensor]]:
    """{new name: its parts, in the table's order}. Raises UserError on a name that the table does not have."""
    parts, unknown = {}, dict(weights)
    for old, new in table.items():
        for name, now in [(name, now) for name in unknown if (now := renamed(name, old, new or "")) is not None]:
            tensor = unknown.pop(name)
            if new is not None:
                parts.setdefault(now, []).append(tensor)
    if unknown:
        raise UserError(f"{path}: holds what this model has no place for: {few(unknown)}; is it another model?")
    return parts


def renamed(name: str, old: str, new: str) -> str | None:
    """`name`, which is of the pattern `old`, after the pattern `new`; None if it is not of `old`.

    >>> renamed("model.layers.7.mlp.up_proj.weight", "model.layers.N.mlp.up_proj.*", "layers.N.feed_forward.w3.*")
    'layers.7.feed_forward.w3.weight'
    """
    pattern = re.escape(old).replace(r"\.N\.", r"\.(?P<N>[0-9]{1,4})\.").replace(r"\*", "(?P<rest>.*)")
    match = re.fullmatch(pattern, name)
    return match and match.expand(new.replace(".N.", r".\g<N>.").replace("*", r"\g<rest>"))


def few(things) -> str:
    things = [repr(thing)[1:-1][:120] for thing in sorted(things)]  # names from a file: of any length, with any sign
    return ", ".join(things[:3]) + (f" and {len(things) - 3} more" if len(things) > 3 else "")


def parts_dim(name: str) -> int | None:
    return PARTS_DIM.get(name.split(".")[-2:][0], 0)


@torch.no_grad()
def fill(model: nn.Module, parts: dict, dtype, path, finish=lambda name, tensor: tensor):
    """Gives each parameter of a model on the meta device its tensor, in `dtype` (None: as it is).

    parts: from `translate`. finish(name, tensor) -> tensor: a last rearrangement.

    A tensor that needs no conversion stays mapped: processes that load the same file share it until they write.
    Raises UserError unless names and shapes are just those of the model.
    """
    parameters, wrong = dict(model.named_parameters()), []
    for name in parameters.keys() & parts:
        shape: list[float] = list(parameters[name].shape)
        dim = parts_dim(name)
        if dim is not None:
            shape[dim] /= len(parts[name])
        for tensor in parts[name]:
            if list(tensor.shape) != shape or not tensor.is_floating_point() or tensor.itemsize == 1:  # float8
                came = f"{tuple(tensor.shape)} {str(tensor.dtype)[6:]}"
                wrong += [f"{name} {came} instead of ({', '.join(f'{n:g}' for n in shape)}) float16 or wider"]
    problems = {"missing": parameters.keys() - parts, "unexpected": parts.keys() - parameters, "wrong": set(wrong)}
    if any(problems.values()):
        text = "; ".join(f"{kind}: {few(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{path}: the weights are not complete or of another model; {text}")

    taken = set()
    for name in parameters:
        pieces, dim, (owner, _, leaf) = parts.pop(name), parts_dim(name), name.rpartition(".")
        if dim is None and not all(torch.equal(piece, pieces[0]) for piece in pieces[1:]):
            raise UserError(f"{path}: {name} differs between the model-parallel files; are all of the same model?")
        tensor = pieces[0] if dim is None or len(pieces) == 1 else torch.cat(pieces, dim)
        tensor = finish(name, tensor)
        tensor = tensor.to(dtype or tensor.dtype).contiguous()
        # Two parameters must not be one memory (tied embeddings), nor a part of a larger one (it would be saved too).
        if tensor.data_ptr() in taken or tensor.nbytes != tensor.untyped_storage().nbytes():
            tensor = tensor.clone()
        taken.add(tensor.data_ptr())
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
        for piece in pieces:
            if piece.data_ptr() != tensor.data_ptr():
                forget_pages(piece)


def forget_pages(tensor):
    """A mapped tensor has been read: gives its memory back, which else counts as ours. (The file still has it.)"""
    mapped = not tensor.untyped_storage().resizable()  # memory from the heap is
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # of the whole pages inside it
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if mapped and length > 0 and tensor.is_contiguous() and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


# --- LLaMA


def kind_of(folder: str | Path) -> str:
    """What a --llama folder is: RAW, HF, FIRST_LLAVA or HF_LLAVA. Raises UserError if it is none of them."""
    folder = Path(folder)
    if (folder / "params.json").is_file():
        return RAW
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no LLaMA there: expected params.json and consolidated.00.pth (Meta's raw folder) "
                        "or config.json and pytorch_model*.bin or model*.safetensors (Hugging Face)")  # fmt: skip
    config = read_json(folder / "config.json", dict)
    if config.get("model_type") not in ("llava", "llava_llama"):
        return HF  # or of another model, which `hf_config` refuses
    return HF_LLAVA if "text_config" in config else FIRST_LLAVA


def describe(folder: str | Path) -> str:
    """What a --llama folder is, in words."""
    kind = kind_of(folder)
    if kind == FIRST_LLAVA and read_json(Path(folder) / "config.json", dict).get("mm_use_im_start_end"):
        kind += "; it was trained with <im_start> and <im_end> around the picture, which are not put there here"
    return kind


def feature_layer_of(folder: str | Path) -> int:
    """The ViT's layer that the W of a --llama folder was trained on, if it is a LLaVA's; else LLaVA's default."""
    path = Path(folder) / "config.json"
    if kind_of(folder) not in (FIRST_LLAVA, HF_LLAVA):
        return FEATURE_LAYER
    config = read_json(path, dict)
    layer = config.get("vision_feature_layer", config.get("mm_vision_select_layer", FEATURE_LAYER))
    check_only(
        path,
        vision_feature_layer=(layer if type(layer) is int else None, layer),
        vision_feature_select_strategy=(config.get("vision_feature_select_strategy", "default"), "default"),
        mm_vision_select_feature=(config.get("mm_vision_select_feature", "patch"), "patch"),
    )
    return layer


def load_llama(folder: str | Path, dtype: torch.dtype | None = torch.float32,
               base: str | Path | None = None) -> LLaMA:  # fmt: skip
    """A LLaMA or Vicuna in `dtype` (None: its own), of any folder that `kind_of` knows (a stage-2 run is a raw one).

    base: the LLaMA's folder that the folder holds deltas over, as Vicuna and LLaVA were first released.
    On a CPU its files may stay mapped: replace them by renaming, as everything here does, not by writing into them.
    Raises UserError if it is another architecture, or holds a tensor that this model has no place for.
    """
    folder = Path(folder)
    if kind_of(folder) != RAW:
        return load_hf_llama(folder, dtype, dict(load_llama(base, None).named_parameters()) if base else None)
    if base:
        raise UserError(f"{folder}: is {RAW}, deltas come in Hugging Face's; leave out --llama-base")
    return load_raw_llama(folder, dtype)


def llama_config(folder: str | Path) -> LLaMAConfig:
    """The architecture alone, of params.json or config.json; no weights are read, and none need be there."""
    folder = Path(folder)
    if kind_of(folder) != RAW:
        return hf_config(folder / "config.json")[0]
    path, tokenizer = folder / "params.json", folder / "tokenizer.model"
    rows = load_tokenizer(tokenizer).vocab_size() if tokenizer.exists() else 32000
    return raw_config(read_json(path, dict), path, rows)


def load_raw_llama(folder: Path, dtype) -> LLaMA:
    path = folder / "params.json"
    given = read_json(path, dict)
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files or [file.name for file in files] != [f"consolidated.{i:02}.pth" for i in range(len(files))]:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{folder}: expected consolidated.00.pth, .01.pth, ... without a gap; found {found}")
    parts = {}
    for file in files:
        for name, pieces in translate(load_weights(file), RAW_LLAMA, file).items():
            parts.setdefault(name, []).extend(pieces)
    rows = sum(piece.shape[:1].numel() for piece in parts.get("output.weight", []))
    return build_llama(raw_config(given, path, rows), parts, dtype, path)


def raw_config(given: dict, path: Path, rows: int) -> LLaMAConfig:
    """Of params.json. rows: the vocabulary's size where that says -1, "as many as the tokenizer has"."""
    if given.keys() - PARAMS:
        raise UserError(f"{path}: {few(given.keys() - PARAMS)} is not in LLaMA 1 or 2; take one of these")
    params = {"n_kv_heads": given.get("n_heads"), "ffn_dim_multiplier": 1, "rope_theta": 10000.0, "vocab_size": -1}
    params |= {key: value for key, value in given.items() if value is not None}
    if params["vocab_size"] == -1:
        params["vocab_size"] = rows
    params["ffn_dim"] = ffn_width(*numbers(params, ("dim", "multiple_of", "ffn_dim_multiplier"), path))
    names = [field.name for field in dataclasses.fields(LLaMAConfig)]
    return LLaMAConfig(*numbers(params, names, path))


def ffn_width(dim: int, multiple_of: int, multiplier: float = 1) -> int:
    """LLaMA's formula: SwiGLU has three matrices for the usual two, so 2/3 of the usual 4 dim, rounded up."""
    return multiple_of * math.ceil(int(multiplier * int(2 * 4 * dim / 3)) / multiple_of)


def hf_config(path: Path) -> tuple[LLaMAConfig, bool]:
    """Of config.json; and whether the output is the word embeddings."""
    given, kind = read_json(path, dict), kind_of(path.parent)
    if kind == HF_LLAVA:  # what is as in LLaMA-7B may be left out there
        inner = given["text_config"] if isinstance(given["text_config"], dict) else {}
        given = {theirs: getattr(LLaMAConfig, ours) for theirs, ours in HF_CONFIG.items()}
        given |= {"num_key_value_heads": None} | inner  # as many as heads
    rope = given.get("rope_scaling") or given.get("rope_parameters") or {}  # transformers 4, transformers 5
    rope = rope if isinstance(rope, dict) else {"type": rope}
    config = {"num_key_value_heads": given.get("num_attention_heads"), "rope_theta": 10000.0} | rope
    config |= {key: value for key, value in given.items() if value is not None and key not in rope}  # its theta wins
    if kind != FIRST_LLAVA:
        check_only(path, model_type=(given.get("model_type"), "llama"))
    c = LLaMAConfig(**dict(zip(HF_CONFIG.values(), numbers(config, HF_CONFIG, path))))
    check_only(
        path,
        hidden_act=(config.get("hidden_act", "silu"), "silu"),
        attention_bias=(config.get("attention_bias", False), False),
        mlp_bias=(config.get("mlp_bias", False), False),
        head_dim=(config.get("head_dim", c.head_dim), c.head_dim),
        rope_scaling=(rope.get("rope_type", rope.get("type", "default")), "default"),
        quantization_config=(config.get("quantization_config"), None),
    )
    return c, config.get("tie_word_embeddings") is True


def hf_parts(folder: Path, part: str) -> dict[str, torch.Tensor]:
    """The weights of the `llama`, the `vision` tower or the `projector` in a Hugging Face folder."""
    parts = translate(load_folder(folder), LLAVA, folder)
    if twice := [name for name, tensors in parts.items() if len(tensors) > 1]:
        raise UserError(f"{folder}: holds {few(twice)} under two names; get the weights of one model")
    return {name.removeprefix(f"{part}."): tensor for name, (tensor,) in parts.items() if name.startswith(f"{part}.")}


def load_hf_llama(folder: Path, dtype, base: dict | None = None) -> LLaMA:
    """base: the parameters to which those in the folder are deltas."""
    path = folder / "config.json"
    c, tied = hf_config(path)
    weights = load_folder(folder) if kind_of(folder) == HF else hf_parts(folder, "llama")
    parts = translate(weights, HF_LLAMA, folder)
    if tied and "tok_embeddings.weight" in parts:
        words = parts["tok_embeddings.weight"]
        if not all(torch.equal(tensor, words[0]) for tensor in parts.get("output.weight", [])):
            raise UserError(f"{path}: tie_word_embeddings is true, but lm_head.weight is not embed_tokens.weight; set "
                            "it to false if the model was trained so, or take other weights")  # fmt: skip
        parts["output.weight"] = list(words)
    gain = parts.get("norm.weight", [torch.ones(1)])[0].float().abs().mean()  # of the last norm: over 1 in any LLaMA
    if gain < 0.1 and not base:
        raise UserError(f"{folder}: holds deltas over another LLaMA's weights (its last norm is near 0); name that "
                        "LLaMA's folder by --llama-base")  # fmt: skip
    if gain >= 0.1 and base:
        raise UserError(f"{folder}: holds weights, not deltas (its last norm is not near 0); leave out --llama-base")
    if base and base.keys() != parts.keys():
        raise UserError(f"{folder}: holds deltas of a model with other layers than --llama-base has: "
                        f"{few(base.keys() ^ parts.keys())}; take the LLaMA of the same size")  # fmt: skip

    def finish(name, tensor):
        if name.endswith((".wq.weight", ".wk.weight")):
            # RoPE turns pairs of rows of each head of q and k. Meta's pairs are adjacent; Hugging Face's lie half a
            # head apart, its converter having moved the rows to 0 2 4 ... 1 3 5 ...: here they move back.
            halves = tensor.reshape(-1, 2, c.head_dim // 2, c.dim)  # (heads, first or second of the pair, pairs, dim)
            tensor = halves.transpose(1, 2).reshape(tensor.shape)  # (heads * hd, dim)
        return plus(tensor, base[name], f"{folder}: {name}") if base else tensor

    return build_llama(c, parts, dtype, path, finish)


def plus(delta: torch.Tensor, weight: torch.Tensor, name: str) -> torch.Tensor:
    """In the delta's dtype, as the original release adds them; rows that only the delta has (new words) are whole."""
    if delta.shape[1:] != weight.shape[1:] or not 0 <= len(delta) - len(weight) <= SPARE_ROWS:
        raise UserError(f"{name} is {tuple(delta.shape)}, in --llama-base {tuple(weight.shape)}; take the LLaMA of the "
                        "same size")  # fmt: skip
    total = delta.clone()
    total[: len(weight)] += weight.to(delta.dtype)
    forget_pages(weight)
    return total


def numbers(config: dict, keys, path) -> list:
    """The values at `keys`, checked to be positive numbers, and integers but for the few that may have a fraction."""
    for key in keys:
        kind = (int, float) if key in ("norm_eps", "rms_norm_eps", "rope_theta", "ffn_dim_multiplier") else int
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < 2**24:
            raise UserError(f"{path}: {key} is {repr(value)[:80]}, expected a positive number; take the published file")
    return [config[key] for key in keys]


def check_only(path, has="this model has only", **settings):
    """settings: name=(value, the only value that the model here, or what `has` says, has)."""
    for key, (value, only) in settings.items():
        if value != only:
            raise UserError(f"{path}: {key} is {repr(value)[:80]}, {has} {only!r}; take other weights")


def build_llama(c: LLaMAConfig, parts: dict, dtype, path, *how) -> LLaMA:
    if c.dim % c.n_heads or c.head_dim % 2 or c.n_heads % c.n_kv_heads:
        raise UserError(f"{path}: dim {c.dim} does not divide into {c.n_heads} heads of even size, or these not into "
                        f"{c.n_kv_heads} groups; take the file as published")  # fmt: skip
    n_layers = len({name.split(".")[1] for name in parts if name.startswith("layers.")})
    if n_layers != c.n_layers:
        raise UserError(f"{path}: promises {c.n_layers} layers, the weights hold {n_layers}; are all files there?")
    with torch.device("meta"):
        llama = LLaMA(c)
    fill(llama, parts, dtype, path.parent, *how)
    return llama


def save_llama(llama: LLaMA, folder: str | Path, dtype: torch.dtype | None = None):
    """Writes Meta's raw format, in one file of any size: params.json, consolidated.00.pth in `dtype` (None: as is)."""
    c = llama.config
    params: dict[str, float] = {"dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads}
    if c.n_kv_heads != c.n_heads:
        params["n_kv_heads"] = c.n_kv_heads
    # The format has no ffn_dim: find the multiple that the formula rounds up to it, or else a multiplier too.
    multiples = [m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if c.ffn_dim % m == 0]
    exact = [m for m in multiples if ffn_width(c.dim, m) == c.ffn_dim]
    params["multiple_of"] = (exact or multiples)[0]
    if not exact:
        params["ffn_dim_multiplier"] = (c.ffn_dim + 0.5) / ffn_width(c.dim, 1)  # + 0.5: the formula cuts to integers
    params |= {"norm_eps": c.norm_eps, "vocab_size": c.vocab_size, "rope_theta": c.rope_theta}
    weights = {name: p.detach().to(dtype or p.dtype) for name, p in llama.named_parameters()}
    save_tensors(Path(folder) / "consolidated.00.pth", weights)
    write_json(Path(folder) / "params.json", params)


# --- CLIP


def load_vision(path: str | Path, feature_layer: int = FEATURE_LAYER,
                dtype: torch.dtype | None = torch.float32) -> VisionTransformer:  # fmt: skip
    """CLIP's ViT up to `feature_layer` (-1: the last block), in `dtype`; its architecture is read off the shapes.

    path: OpenAI's archive ViT-L-14.pt, a torch.save of the same names (`visual.*`; the demo's), or a Hugging Face
    folder of a CLIPModel, a CLIPVisionModel or a LLaVA with one. Raises UserError for others.
    """
    path = Path(path)
    if path.is_dir():
        whole = read_json(path / "config.json", dict)
        config = whole.get("vision_config", whole)
        kind = whole.get("model_type")
        if kind == "llava" and isinstance(config, dict):
            kind = config.get("model_type")
        if kind not in ("clip", "clip_vision_model") or not isinstance(config, dict):
            raise UserError(f"{path / 'config.json'}: model_type is {kind!r:.80}, expected 'clip' or "
                            "'clip_vision_model'; such as OpenAI's ViT-L-14.pt or its Hugging Face folder")  # fmt: skip
        (width,) = numbers({"hidden_size": 768} | config, ["hidden_size"], path / "config.json")  # defaults: ViT-B's
        check_only(
            path / "config.json",
            hidden_act=(config.get("hidden_act", "quick_gelu"), "quick_gelu"),
            num_attention_heads=(config.get("num_attention_heads", 12), width // HEAD_DIM),
            layer_norm_eps=(config.get("layer_norm_eps", 1e-5), 1e-5),
        )
        weights = hf_parts(path, "vision") if whole.get("model_type") == "llava" else load_folder(path)
        weights = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()}
        parts = translate(weights, HF_CLIP, path)
    else:
        parts = translate(load_weights(path), OPENAI_CLIP, path)
    if any(name.startswith(("attnpool.", "layer1.")) for name in parts):
        raise UserError(f"{path}: a ResNet CLIP, which has no patches to look at; take a ViT, such as ViT-L-14.pt")
    blocks = {}  # number -> {name within the block: shapes of its parts}
    for name, pieces in parts.items():
        if match := re.match(r"transformer\.resblocks\.([0-9]{1,4})\.(.*)", name):
            blocks.setdefault(int(match[1]), {})[match[2]] = [piece.shape for piece in pieces]
    conv1, embedding = (parts.get(name, [torch.empty(0)])[0] for name in ("conv1.weight", "positional_embedding"))
    patches = len(embedding) - 1 if embedding.dim() == 2 else 0
    grid = math.isqrt(max(0, patches))
    square = grid > 0 and grid**2 == patches
    if conv1.dim() != 4 or 0 in conv1.shape or len(conv1) % HEAD_DIM or not square:
        raise UserError(f"{path}: no CLIP ViT in it (conv1.weight {tuple(conv1.shape)}, positional_embedding "
                        f"{tuple(embedding.shape)}); take OpenAI's ViT-L-14.pt or its Hugging Face folder")  # fmt: skip

    (width, _, _, patch), layers = conv1.shape, len(blocks)
    if path.is_dir():
        has = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
               "image_size": grid * patch, "patch_size": patch}  # fmt: skip
        given = {key: (config.get(key, value), value) for key, value in has.items()}
        check_only(path / "config.json", "the weights beside it have", **given)
    if not -layers - 1 <= feature_layer <= -1:
        raise UserError(f"{path}: feature layer {feature_layer}, expected -1 (the last of {layers}) to {-layers - 1}")
    with torch.device("meta"):
        vision = VisionTransformer(VisionConfig(grid * patch, patch, width, layers), feature_layer)
    for i in blocks:
        for name in blocks[i] if i > layers + feature_layer else ():  # above the features
            parts.pop(f"transformer.resblocks.{i}.{name}", None)
    fill(vision, parts, dtype, path)
    unlike = [f"transformer.resblocks.{i}" for i in range(layers) if blocks.get(i) != blocks.get(0)]
    if unlike:  # what `fill` has not seen, or a gap
        raise UserError(f"{path}: the weights are not complete or of another model; {few(unlike)} is not like block 0; "
                        "download it again")  # fmt: skip
    return vision


# --- W, and the three parts together


def load_projector(path: str | Path) -> Projection:
    """W in fp32, of a projector.pth {"weight": (dim, vision_dim)[, "bias"]}, an mm_projector.bin, or a LLaVA's folder.

    Raises UserError if there is none, or one of two layers (LLaVA-1.5).
    """
    path = Path(path)
    parts = translate(hf_parts(path, "projector") if path.is_dir() else load_weights(path), PROJECTOR, path)
    if "linear_1.weight" in parts and path.is_dir():  # transformers has two layers, with what stands here between them
        if read_json(path / "config.json", dict).get("projector_hidden_act") == "linear":  # nothing: they are one
            W1, bias = parts["linear_1.weight"][0], "linear_1.bias" in parts
            dim, vision_dim = W1.shape if W1.dim() == 2 else (1, 1)  # which `fill` refuses
            with torch.device("meta"):
                first, second = nn.Linear(vision_dim, dim, bias), nn.Linear(dim, dim, bias)
            fill(nn.ModuleDict({"linear_1": first, "linear_2": second}), parts, torch.float32, path)
            parts = {"weight": [(second.weight @ first.weight).detach()]}
            parts |= {"bias": [second(first.bias).detach()]} if bias else {}
    if any(re.fullmatch(r"(0|2|linear_1|linear_2)\.weight", name) for name in parts):
        raise UserError(f"{path}: its projector has two layers (LLaVA-1.5 and later); here it is one matrix, W: take "
                        "LLaVA's first version")  # fmt: skip
    if "weight" not in parts or parts["weight"][0].dim() != 2:
        raise UserError(f"{path}: expected the matrix of one linear layer, `weight` or `model.mm_projector.weight`")
    dim, vision_dim = parts["weight"][0].shape
    with torch.device("meta"):
        projector = Projection(vision_dim, dim, bias="bias" in parts)
    fill(projector, parts, torch.float32, path)
    return projector


def save_projector(projector: Projection, path: str | Path):
    save_tensors(path, {name: p.detach().float().cpu() for name, p in projector.named_parameters()})


def build(llama: LLaMA, vision: VisionTransformer, projector: Projection | None = None, seed: int = 0) -> LLaVA:
    """LLaVA of its parts; without a projector W is noise drawn from `seed`. Raises UserError if widths do not fit."""
    dim, width = llama.config.dim, vision.config.width
    if projector is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = Projection(width, dim)
    if projector.weight.shape != (dim, width):
        raise UserError(f"the projector's weight is {tuple(projector.weight.shape)}, but the LLaMA's dim is {dim} and "
                        f"the ViT's width {width}; take the projector that was trained with these two")  # fmt: skip
    return LLaVA(llama, vision, projector)


# --- run directories


def save_run(run: str | Path, llava: LLaVA, config: dict, tokenizer_path: str | Path, stage: int,
             dtype: torch.dtype | None = None):  # fmt: skip
    """Writes what `load_run` reads.

    config: any JSON; must hold "vision" and in stage 1 "llama", the paths that these came from (kept as absolute ones;
    and "llama_base", if "llama" holds deltas).
    dtype: of a stage-2 LLaMA in its file; None: as it is.

    Everything is first written whole beside its place: a full disk harms nothing. While the files then move into
    place, projector.pth is away until all others are there, and without it `load_run` refuses: old and new never mix.
    """
    run, new = Path(run), Path(run) / ".new"
    shutil.rmtree(new, ignore_errors=True)  # of a save that was killed
    paths = {k: str(Path(config[k]).resolve()) for k in ("vision", "llama", "llama_base") if k in config}
    config = config | {"stage": stage} | paths
    vision = {"path": config["vision"], "sha256": checksum(config["vision"])}
    try:
        if stage == 2:
            save_llama(llava.llama, new, dtype)
            with replacing(new / "tokenizer.model") as file:
                file.write(Path(tokenizer_path).read_bytes())
        write_json(new / "vision.json", vision | {"feature_layer": llava.vision.feature_layer})
        save_projector(llava.projector, new / "projector.pth")
        write_json(new / "config.json", config)
        (run / "projector.pth").unlink(missing_ok=True)
        sync_folder(run)
        for file in sorted(new.iterdir(), key=lambda file: file.name == "projector.pth"):
            os.replace(file, run / file.name)
        sync_folder(run)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_run(run: str | Path, dtype: torch.dtype | None = torch.float32) -> tuple[LLaVA, SentencePieceProcessor, dict]:
    """-> LLaVA, tokenizer and config of a run directory; W is fp32, the rest in `dtype`.

    Raises UserError if the run is not finished, or its ViT (or, in stage 1, its LLaMA) is not where it was or another.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: no finished run is there; first train it (the demo's: torchrun train.py --stage 1)")
    config = read_json(run / "config.json", dict)
    if name := lacks(run, config.get("stage")):
        raise UserError(f"{run / name}: is not there: no finished run; train.py --out {run} ends it")
    vision = read_json(run / "vision.json", dict)
    kinds = {"path": str, "sha256": str, "feature_layer": int}
    if config.get("stage") not in (1, 2) or not all(isinstance(vision.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{run}: config.json has no stage, or vision.json no path, sha256, feature_layer; train again")
    llama_path, base = llama_of(run, config), config.get("llama_base") if config["stage"] == 1 else None
    inputs = [("vision.json", "path", Path(vision["path"])), ("config.json", "llama", llama_path)]
    inputs += [("config.json", "llama_base", Path(str(base)))] if base else []
    for name, key, path in inputs:
        if not (os.path.isfile(path) or os.path.isdir(path)):  # and no device, which never ends
            raise UserError(f"{run / name}: {visible(str(path))[:500]} is not there any more; put it back, or set "
                            f"{key!r} in this file to where it is now")  # fmt: skip
    if checksum(vision["path"]) != vision["sha256"]:
        raise UserError(f"{vision['path']}: not the ViT that {run} was trained with (vision.json has another sha256); "
                        "put that one back, or train again")  # fmt: skip
    llama = load_llama(llama_path, dtype, base)
    vit, projector = load_vision(vision["path"], vision["feature_layer"], dtype), load_projector(run / "projector.pth")
    try:
        llava = build(llama, vit, projector)
    except UserError as error:
        raise UserError(f"{run}: {error}") from None
    return llava, open_tokenizer(llama_path / "tokenizer.model", llava.llama), config


def lacks(run: str | Path, stage: int | None) -> str | None:
    """The first of the files that a finished run of this stage has, and this one has not."""
    names = ["vision.json", "projector.pth"] + ["params.json", "consolidated.00.pth", "tokenizer.model"] * (stage == 2)
    return next((name for name in names if not (Path(run) / name).is_file()), None)


def llama_of(run: str | Path, config: dict) -> Path:
    """Where the LLaMA of a run with this config is: in stage 2 in its own directory."""
    return Path(run) if config.get("stage") == 2 else Path(str(config.get("llama") or None))


def open_run(run: str | Path, device: torch.device, trained_by: str, **must_be) -> tuple:
    """A run directory, for use -> config, model, tokenizer, the context to compute in (its precision).

    trained_by: the command that makes such a run; must_be: what its config must say, such as stage=2.
    Raises UserError if it says anything else, and as `load_run`.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        raise UserError(f"{run}: no run is there; first train it: {trained_by} --out {run}")
    config = read_json(path, dict)
    if "template" not in config:
        raise UserError(f"{run}: is no run directory; if it is a LLaVA's folder, make one of it: python checkpoint.py "
                        f"import {run} RUN")  # fmt: skip
    for name, value in must_be.items():
        if config.get(name) != value:
            raise UserError(f"{path}: trained with {name} {config.get(name)!r:.80}, here it must be {value!r}; take a "
                            f"run of: {trained_by}")  # fmt: skip
    bf16 = config.get("precision") == "bf16"
    model, sp, _ = load_run(run, torch.bfloat16 if bf16 else torch.float32)
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    return config, model.to(device).requires_grad_(False), sp, autocast


def open_tokenizer(path: str | Path, llama: LLaMA) -> SentencePieceProcessor:
    """The SentencePiece model of a LLaMA. Raises UserError if it has more pieces than the LLaMA rows, or far fewer."""
    sp = load_tokenizer(path)
    pieces, rows = sp.vocab_size(), llama.config.vocab_size
    if pieces > rows:
        raise UserError(f"{path}: has {pieces} pieces, the LLaMA beside it only {rows}; take the tokenizer that came "
                        "with it")  # fmt: skip
    if pieces < rows - SPARE_ROWS:
        raise UserError(f"{path}: has only {pieces} pieces, the LLaMA beside it {rows} (up to {SPARE_ROWS} more may be "
                        "padding or added tokens); take the tokenizer that came with it")  # fmt: skip
    return sp


# --- training state


def save_state(run: str | Path, state: dict, step: int):
    """Replaces run/state/training.pth, whole or not at all. state: tensors and plain Python values, nested."""
    assert plain(state), "weights_only could not load it again: only tensors, dict, list, tuple, str, numbers, None"
    save_tensors(Path(run) / "state" / "training.pth", state | {"step": step})


def plain(value) -> bool:
    if isinstance(value, dict):
        return all(map(plain, value.keys())) and all(map(plain, value.values()))
    if type(value) in (list, tuple):
        return all(map(plain, value))
    return isinstance(value, torch.Tensor) or type(value) in (str, int, float, bool, type(None))


def load_state(run: str | Path) -> dict | None:
    """What was given to `save_state`, with its "step". None if there is none yet. Raises UserError on all else."""
    path = Path(run) / "state" / "training.pth"
    if not path.exists():
        return None
    try:
        state, kinds = load_tensors(path), {"step": int, "trained": dict, "optimizer": dict}
    except UserError as error:
        raise UserError(f"{error}; or remove it, or --no-resume to begin anew") from None
    sound = isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in kinds.items())
    if not sound or state["step"] < 0:
        raise UserError(f"{path}: expected {', '.join(kinds)}, as train.py saves them; remove it, or --no-resume to "
                        "begin anew")  # fmt: skip
    return state


if __name__ == "__main__":
    from conversation import run_command
    from convert import main  # which imports this file

    run_command(main)
