"""Loads LLaMA, CLIP and W; saves and loads run directories and the state to resume from.

    load_llama, load_vision, load_projector     published weights -> modules (Hugging Face's by formats/huggingface.py)
    save_run, load_run, open_run                a run directory: all that is needed to use what was trained
    save_state, load_state                      all that is needed to continue training

Names and shapes must match exactly. Files are mapped into memory, so processes that load the same file share it. No
code that a file holds ever runs: `weights_only=True` everywhere.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from sentencepiece import SentencePieceProcessor

from common import UserError, printable, read_json, reason, replacing, shorten, sync_folder, write_json
from conversation import load_tokenizer
from formats import huggingface, meta
from formats.tensors import load_tensors, load_weights
from model import LLaMA, LLaMAConfig, LLaVA, Projection
from vision import FEATURE_LAYER, HEAD_DIM, VisionConfig, VisionTransformer

PROJECT = Path(__file__).resolve().parent
TEXT_TOWER = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale",
              "input_resolution", "context_length", "vocab_size")  # of OpenAI's CLIP: not needed  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SPARE_ROWS = 256  # some LLaMAs pad their vocabulary by up to this many rows, or add tokens to it


def assign(module: nn.Module, weights: dict[str, torch.Tensor], path, dtype: torch.dtype | None) -> Any:
    """Gives a module on the meta device (shapes without memory) its weights, in `dtype` (None: as they are)."""
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    faults = [f"{name} is missing" for name in shapes.keys() - weights]
    faults += [f"{name} is unexpected" for name in weights.keys() - shapes]
    for name in shapes.keys() & weights:
        shape, found = tuple(weights[name].shape), weights[name].dtype
        if shape != shapes[name] or found not in FLOATS:
            faults.append(f"{name} is {shape} {found} instead of {shapes[name]} float16 or wider")
    if faults:
        raise UserError(f"{path}: the weights are incomplete or of another model: {shorten(sorted(faults))}")
    # Each parameter must own its memory: one that shares it would change, or be saved, with another.
    storages = [tensor.untyped_storage() for tensor in weights.values()]
    owners = Counter(storage.data_ptr() for storage in storages)
    for (name, tensor), storage in zip(weights.items(), storages):
        if owners[storage.data_ptr()] > 1 or tensor.nbytes < storage.nbytes() or not tensor.is_contiguous():
            weights[name] = tensor.clone(memory_format=torch.contiguous_format)
    module.load_state_dict(weights, strict=True, assign=True)
    return module.to(dtype)


def checksum(path: str | Path) -> str:
    """sha256 of a file, or of a Hugging Face folder: of its config.json and all files of weights."""
    digest, path, files = hashlib.sha256(), Path(path), [Path(path)]
    if path.is_dir():
        files = [path / "config.json", *(file for file in path.iterdir() if file.suffix in (".bin", ".safetensors"))]
    for file in sorted(files):
        try:
            with open(file, "rb") as content:
                while block := content.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({reason(error)}); is the path right?") from None
    return digest.hexdigest()


# --- LLaMA


def load_llama(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> LLaMA:
    """A LLaMA or Vicuna in `dtype` (None: its own): Meta's raw folder, a run of stage 2, or a Hugging Face folder.

    Its files may stay mapped: replace them by renaming, do not write into them. Raises UserError for other models.
    """
    folder = Path(folder)
    if (folder / "params.json").is_file():
        weights = meta.merge([load_weights(file) for file in meta.weight_files(folder)], folder)
        config = llama_config(folder, weights.get("output.weight", torch.empty(0)).shape[:1].numel())  # rows, or 0
    else:
        config, given = llama_config(folder), read_json(folder / "config.json", dict)
        if huggingface.is_llava(given):
            raise UserError(f"{folder}: a finished LLaVA; make a run directory of it first: python -m "
                            f"tools.import_llava {folder} RUN")  # fmt: skip
        tied = huggingface.is_tied(given)
        weights = huggingface.llama_to_raw(load_folder(folder), config.head_dim, folder, tied)
    if weights.get("norm.weight", torch.ones(1)).float().abs().mean() < 0.1:  # about 1 or more in every LLaMA
        raise UserError(f"{folder}: holds deltas over another LLaMA (its last norm is near 0); add them first: python "
                        f"-m tools.import_llava {folder} NEW_FOLDER --llama-base LLAMA")  # fmt: skip
    n_layers = len({name.split(".")[1] for name in weights if name.startswith("layers.")})
    if n_layers != config.n_layers:
        raise UserError(f"{folder}: the weights have {n_layers} layers, its JSON has {config.n_layers}; get both again")
    with torch.device("meta"):
        llama = LLaMA(config)
    return assign(llama, weights, folder, dtype)


def llama_config(folder: str | Path, vocab_size: int | None = None) -> LLaMAConfig:
    """The architecture, from params.json or config.json alone: the weights may be absent.

    vocab_size: stands for a vocab_size of -1 in params.json; None = the size of the tokenizer beside it.
    """
    folder = Path(folder)
    path = folder / "params.json"
    if path.is_file():
        params = read_json(path, dict)
        if params.get("vocab_size", -1) == -1 and not vocab_size:
            vocab_size = load_tokenizer(folder / "tokenizer.model").vocab_size()
        config = LLaMAConfig(**meta.llama_config(params, vocab_size, path))
    else:
        path = folder / "config.json"
        if not path.is_file():
            raise UserError(f"{folder}: no LLaMA there: expected params.json and consolidated.00.pth (Meta's raw "
                            "folder), or config.json and its weights (Hugging Face)")  # fmt: skip
        config = LLaMAConfig(**huggingface.llama_config(read_json(path, dict), path))
    if config.dim % config.n_heads or config.head_dim % 2 or config.n_heads % config.n_kv_heads:
        raise UserError(f"{path}: dim {config.dim} does not divide into {config.n_heads} heads of even size, or these "
                        f"not into {config.n_kv_heads} groups; use the file as published")  # fmt: skip
    return config


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, by their names there."""
    weights = {}
    for file in huggingface.weight_files(folder):
        part = load_weights(file)
        if part.keys() & weights:
            raise UserError(f"{file}: {shorten(part.keys() & weights)} is in an earlier part too; download all parts "
                            "again")  # fmt: skip
        weights |= part
    return weights


def save_llama(config: LLaMAConfig, weights: dict[str, torch.Tensor], folder: str | Path):
    """Writes Meta's raw format in one file: params.json and consolidated.00.pth."""
    with replacing(Path(folder) / "consolidated.00.pth") as file:
        torch.save(weights, file)
    write_json(Path(folder) / "params.json", meta.params_of(dataclasses.asdict(config)))


def open_tokenizer(path: str | Path, c: LLaMAConfig) -> SentencePieceProcessor:
    """The tokenizer of a LLaMA. Raises UserError if its number of pieces does not fit the LLaMA's vocabulary."""
    sp = load_tokenizer(path)
    if not c.vocab_size - SPARE_ROWS <= sp.vocab_size() <= c.vocab_size:
        raise UserError(f"{path}: has {sp.vocab_size()} pieces, the LLaMA a vocabulary of {c.vocab_size} (up to "
                        f"{SPARE_ROWS} of them spare); use the tokenizer that came with the LLaMA")  # fmt: skip
    return sp


# --- CLIP


def load_vision(path: str | Path, feature_layer: int = FEATURE_LAYER,
                dtype: torch.dtype | None = torch.float32) -> VisionTransformer:  # fmt: skip
    """CLIP's ViT up to `feature_layer` (-1: the last block) in `dtype`; the shapes of its weights give its sizes.

    path: OpenAI's archive ViT-L-14.pt, a torch.save of the same names, or a Hugging Face folder of CLIP.
    """
    path, given = Path(path), {}
    if path.is_dir():
        given = huggingface.clip_config(read_json(path / "config.json", dict), path / "config.json")
        weights = huggingface.clip_to_openai(load_folder(path), path)
    else:
        clip = load_weights(path)
        if unknown := [name for name in clip if not name.startswith(("visual.", *TEXT_TOWER))]:
            raise UserError(f"{path}: holds {shorten(unknown)}, which OpenAI's CLIP does not have; use its ViT-L-14.pt")
        weights = {name.removeprefix("visual."): clip[name] for name in clip if name.startswith("visual.")}
    if any(name.startswith("layer1.") for name in weights):
        raise UserError(f"{path}: a ResNet CLIP, which has no patches; use a ViT, such as ViT-L-14.pt")
    config = vision_config(weights, path)
    for key, value in given.items():
        if value != getattr(config, key):
            raise UserError(f"{path / 'config.json'}: {key} is {value}, the weights have {getattr(config, key)}; "
                            "download both again")  # fmt: skip
    if not -config.layers - 1 <= feature_layer <= -1:
        raise UserError(f"{path}: feature layer {feature_layer}, expected -{config.layers + 1} to -1")
    with torch.device("meta"):
        vision = VisionTransformer(config, feature_layer)
    n_blocks = config.layers + 1 + feature_layer
    unused = {name for name in weights if block_number(name) >= n_blocks} | {"ln_post.weight", "ln_post.bias", "proj"}
    return assign(vision, {name: weights[name] for name in weights.keys() - unused}, path, dtype)


def vision_config(weights: dict[str, torch.Tensor], path: Path) -> VisionConfig:
    conv1, embedding = (weights.get(name, torch.empty(0)) for name in ("conv1.weight", "positional_embedding"))
    grid = math.isqrt(max(0, embedding.shape[:1].numel() - 1))
    square = embedding.dim() == 2 and grid > 0 and grid**2 == len(embedding) - 1
    if conv1.dim() != 4 or 0 in conv1.shape or len(conv1) % HEAD_DIM or not square:
        raise UserError(f"{path}: holds no CLIP ViT (conv1.weight {tuple(conv1.shape)}, positional_embedding "
                        f"{tuple(embedding.shape)}); use OpenAI's ViT-L-14.pt or its Hugging Face folder")  # fmt: skip
    width, _, _, patch = conv1.shape
    blocks = {block_number(name) for name in weights} - {-1}
    if blocks != set(range(len(blocks))):
        raise UserError(f"{path}: incomplete: it has the blocks {shorten(sorted(blocks))}; download it again")
    return VisionConfig(grid * patch, patch, width, len(blocks))


def block_number(name: str) -> int:
    """The number of the block to which a parameter belongs; -1 if to none."""
    match = re.match(r"transformer\.resblocks\.([0-9]{1,4})\.", name)
    return int(match[1]) if match else -1


# --- W, and the three parts together


def load_projector(path: str | Path) -> Projection:
    """W in float32, of our projector.pth {"weight": (dim, D)[, "bias"]} or the original's mm_projector.bin."""
    weights = {name.removeprefix("model.mm_projector."): tensor for name, tensor in load_weights(path).items()}
    if any(re.fullmatch(r"[02]\.weight", name) for name in weights):
        raise UserError(f"{path}: its projector has two layers (LLaVA-1.5 and later); this model has one matrix, W: "
                        "use LLaVA's first version")  # fmt: skip
    if "weight" not in weights or weights["weight"].dim() != 2:
        raise UserError(f"{path}: expected the matrix of one linear layer, `weight` or `model.mm_projector.weight`")
    dim, vision_dim = weights["weight"].shape
    with torch.device("meta"):
        projector = Projection(vision_dim, dim, bias="bias" in weights)
    return assign(projector, weights, path, torch.float32)


def build(llama: LLaMA, vision: VisionTransformer, projector: Projection | None = None, seed: int = 0) -> LLaVA:
    """LLaVA of its three parts. Without a projector, W is noise drawn from `seed`."""
    dim, width = llama.config.dim, vision.config.width
    if projector is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = Projection(width, dim)
    if projector.weight.shape != (dim, width):
        raise UserError(f"the projector's weight is {tuple(projector.weight.shape)}, but the LLaMA's dim is {dim} and "
                        f"the ViT's width {width}; use the projector that was trained with these two")  # fmt: skip
    return LLaVA(llama, vision, projector)


# --- run directories


def portable(path: str | Path, run: str | Path) -> str:
    """A path as a run directory records it.

    It is relative to the run where both lie in this project, or where the path lies beside the run: then they can move
    together. Elsewhere it is absolute.
    """
    path, run = Path(path).resolve(), Path(run).resolve()
    beside = path.is_relative_to(run.parent)
    in_project = path.is_relative_to(PROJECT) and run.is_relative_to(PROJECT)
    return os.path.relpath(path, run) if beside or in_project else str(path)


def save_run(run: str | Path, llama: LLaMAConfig, trained: dict[str, torch.Tensor], config: dict, vision: str | Path,
             tokenizer: str | Path):  # fmt: skip
    """Writes what `load_run` reads.

    trained: all parameters that trained, by LLaVA's names. config: JSON with "stage", "feature_layer", and in stage 1
    "llama", the path of the LLaMA. vision, tokenizer: paths.

    Everything is first written into a folder of its own, so a full disk harms nothing. While its files are then moved
    into the run, projector.pth is absent, and `load_run` refuses a run without it: old and new files never mix.
    """
    run, new = Path(run), Path(run) / ".new"
    parts = {part: {name.removeprefix(part): tensor for name, tensor in trained.items() if name.startswith(part)}
             for part in ("llama.", "projector.")}  # fmt: skip
    shutil.rmtree(new, ignore_errors=True)
    try:
        if parts["llama."]:
            save_llama(llama, parts["llama."], new)
            with replacing(new / "tokenizer.model") as file:
                file.write(Path(tokenizer).read_bytes())
        write_json(new / "vision.json", {"path": portable(vision, run), "sha256": checksum(vision),
                                         "feature_layer": config["feature_layer"]})  # fmt: skip
        write_json(new / "config.json", config)
        with replacing(new / "projector.pth") as file:
            torch.save(parts["projector."], file)
        (run / "projector.pth").unlink(missing_ok=True)
        sync_folder(run)
        for file in sorted(new.iterdir(), key=lambda file: file.name == "projector.pth"):  # which comes last
            os.replace(file, run / file.name)
        sync_folder(run)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def missing_file(run: str | Path, stage: int | None) -> str | None:
    """The first file of a finished run of this stage that is absent; None if the run is finished."""
    names = ["vision.json", "projector.pth"]
    if stage == 2:
        names += ["params.json", "consolidated.00.pth", "tokenizer.model"]
    return next((name for name in names if not (Path(run) / name).is_file()), None)


def llama_path(run: str | Path, config: dict) -> Path:
    """The folder of a run's LLaMA: in stage 2 the run itself."""
    return Path(run) if config.get("stage") == 2 else Path(run, str(config.get("llama")))


def vision_path(run: str | Path) -> Path:
    return Path(run, str(read_json(Path(run) / "vision.json", dict).get("path")))


def load_run(run: str | Path, dtype: torch.dtype | None = torch.float32) -> tuple[LLaVA, SentencePieceProcessor, dict]:
    """LLaVA, tokenizer and config.json of a run directory; W in float32, all else in `dtype` (None: as stored).

    Raises UserError if the run is unfinished, or if its frozen parts are absent or not those that it was trained with.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: no finished run; train it first (the demo's: torchrun train.py --stage 1)")
    config = read_json(run / "config.json", dict)
    if name := missing_file(run, config.get("stage")):
        raise UserError(f"{run / name}: missing, so the run is unfinished; train.py --out {run} finishes it")
    recorded, kinds = read_json(run / "vision.json", dict), {"path": str, "sha256": str, "feature_layer": int}
    if config.get("stage") not in (1, 2) or not all(isinstance(recorded.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{run}: config.json has no stage, or vision.json lacks {', '.join(kinds)}; train it again")
    llama, vision = llama_path(run, config), vision_path(run)
    for name, key, path in (("vision.json", "path", vision), ("config.json", "llama", llama)):
        if not (os.path.isfile(path) or os.path.isdir(path)):  # and no device file, which would never end
            raise UserError(f"{run / name}: {printable(str(path))[:500]} does not exist; move it back, or set {key!r} "
                            "in this file to its new place")  # fmt: skip
    if checksum(vision) != recorded["sha256"]:
        raise UserError(f"{vision}: not the ViT that {run} was trained with (vision.json has another sha256); restore "
                        "that one or train again")  # fmt: skip
    try:
        llava = build(load_llama(llama, dtype), load_vision(vision, recorded["feature_layer"], dtype),
                      load_projector(run / "projector.pth"))  # fmt: skip
    except UserError as error:
        raise UserError(f"{run}: {error}") from None
    return llava, open_tokenizer(llama / "tokenizer.model", llava.llama.config), config


def open_run(run: str | Path, device: torch.device, trained_by: str, **expected) -> tuple:
    """A run directory for use: config, frozen model, tokenizer, and the autocast context of its precision.

    trained_by: the command that makes such a run. expected: values that its config must have, such as stage=2.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        raise UserError(f"{run}: no run directory; train it first: {trained_by} --out {run}")
    config = read_json(path, dict)
    if "template" not in config:
        raise UserError(f"{run}: not a run directory; if it is a LLaVA's folder, make one of it: python -m "
                        f"tools.import_llava {run} RUN")  # fmt: skip
    for name, value in expected.items():
        if config.get(name) != value:
            raise UserError(f"{path}: trained with {name} {config.get(name)!r:.80}, expected {value!r}; use a run of: "
                            f"{trained_by}")  # fmt: skip
    bf16 = config.get("precision") == "bf16"
    model, sp, _ = load_run(run, torch.bfloat16 if bf16 else torch.float32)
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    return config, model.to(device).requires_grad_(False), sp, autocast


# --- the state to resume from


def save_state(run: str | Path, state: dict, step: int):
    """Replaces RUN/state.pth. state: {"model", "optimizer"} of distributed.full_state."""
    with replacing(Path(run) / "state.pth") as file:
        torch.save(state | {"step": step}, file)


def load_state(run: str | Path) -> dict | None:
    """The state that `save_state` wrote, with its "step"; None if there is none. Raises UserError if it is damaged."""
    path = Path(run) / "state.pth"
    if not path.exists():
        return None
    try:
        state = load_tensors(path)
    except UserError as error:
        raise UserError(f"{error}; or give --no-resume to start again") from None
    kinds = {"step": int, "model": dict, "optimizer": dict}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path}: holds no training state; remove it, or give --no-resume to start again")
    return state
