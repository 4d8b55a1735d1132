"""Loads LLaMA, CLIP and W; saves and loads run directories and the state to resume from.

    load_llama, load_vision, load_projector     published weights -> modules (formats/ reads them)
    save_run, load_run, open_run                a run directory: all that is needed to use what was trained
    save_state, load_state                      all that is needed to continue training

Names and shapes must match exactly. Files are mapped into memory, so processes that load the same file share it. No
code that a file holds ever runs: `weights_only=True` everywhere.
"""

import contextlib
import dataclasses
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from sentencepiece import SentencePieceProcessor

from common import UserError, printable, read_json, reason, replacing, shorten, sync_folder, write_json
from conversation import load_tokenizer
from formats import huggingface, meta, openai
from formats.tensors import load_tensors
from model import LLaMA, LLaMAConfig, LLaVA, Projection
from vision import FEATURE_LAYER, VisionConfig, VisionTransformer

PROJECT = Path(__file__).resolve().parent
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SPARE_ROWS = 256  # some LLaMAs pad their vocabulary by up to this many rows, or add tokens to it


def assign(module: nn.Module, weights: dict[str, torch.Tensor], path, dtype: torch.dtype | None) -> Any:
    """Gives a module on the meta device (shapes without memory) its weights, in `dtype` (None: as they are)."""
    if others := [f"{name} {tensor.dtype}" for name, tensor in weights.items() if tensor.dtype not in FLOATS]:
        raise UserError(f"{path}: {shorten(others)}: expected float16 or wider; take weights that are not quantized")
    try:
        module.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        found = printable(" ".join(str(error).split())[:400])
        raise UserError(f"{path}: the weights are incomplete or of another model: {found}") from None
    return module.to(dtype)


# --- LLaMA


def load_llama(folder: str | Path, dtype: torch.dtype | None = torch.float32) -> LLaMA:
    """A LLaMA or Vicuna in `dtype` (None: its own): Meta's raw folder, a run of stage 2, or a Hugging Face folder.

    Its files may stay mapped: replace them by renaming, do not write into them. Raises UserError for other models.
    """
    folder, config = Path(folder), llama_config(folder)
    if (folder / "params.json").is_file():
        weights = meta.load_llama(folder)
    else:
        weights = huggingface.load_llama(folder, config.head_dim)
    if huggingface.is_delta(weights):
        raise UserError(f"{folder}: holds deltas over another LLaMA (its last norm is near 0); add them first: python "
                        f"-m tools.import_llava {folder} NEW_FOLDER --llama-base LLAMA")  # fmt: skip
    with torch.device("meta"):
        llama = LLaMA(config)
    return assign(llama, weights, folder, dtype)


def llama_config(folder: str | Path) -> LLaMAConfig:
    """The architecture, from params.json or config.json alone: the weights may be absent."""
    for name, form in (("params.json", meta), ("config.json", huggingface)):
        path = Path(folder, name)
        if path.is_file():
            return LLaMAConfig(**form.llama_config(read_json(path, dict), path))
    raise UserError(f"{folder}: holds no LLaMA; expected Meta's params.json or Hugging Face's config.json")


def save_llama(config: LLaMAConfig, weights: dict[str, torch.Tensor], folder: str | Path):
    """Writes Meta's raw format in one file: params.json and consolidated.00.pth."""
    with replacing(Path(folder) / "consolidated.00.pth") as file:
        torch.save(weights, file)
    write_json(Path(folder) / "params.json", meta.params_of(dataclasses.asdict(config)))


def tokenizer_path(folder: str | Path) -> Path:
    """The tokenizer.model of a LLaMA: in its folder, or one folder above it, as Meta's download has it."""
    inside, above = Path(folder, "tokenizer.model"), Path(folder, "../tokenizer.model")
    is_raw = Path(folder, "params.json").is_file()
    return above if is_raw and above.is_file() and not inside.is_file() else inside


def open_tokenizer(path: str | Path, c: LLaMAConfig) -> SentencePieceProcessor:
    """The tokenizer of a LLaMA. Raises UserError if its number of pieces does not fit the LLaMA's vocabulary."""
    sp = load_tokenizer(path)
    if not c.vocab_size - SPARE_ROWS <= sp.vocab_size() <= c.vocab_size:
        raise UserError(f"{path}: has {sp.vocab_size()} pieces, but the LLaMA's vocabulary has {c.vocab_size} rows; "
                        "use the tokenizer that came with the LLaMA")  # fmt: skip
    return sp


# --- CLIP, W, and the three parts together


def load_vision(path: str | Path, feature_layer: int = FEATURE_LAYER,
                dtype: torch.dtype | None = torch.float32) -> VisionTransformer:  # fmt: skip
    """CLIP's ViT up to `feature_layer` (-1: the last block) in `dtype`; the shapes of its weights give its sizes.

    path: OpenAI's archive ViT-L-14.pt, a torch.save of the same names, or a Hugging Face folder of CLIP.
    """
    path = Path(path)
    weights = huggingface.load_clip(path) if path.is_dir() else openai.load_clip(path)
    config = VisionConfig(**openai.vision_sizes(weights, path))
    if type(feature_layer) is not int or not -config.layers - 1 <= feature_layer <= -1:
        raise UserError(f"{path}: feature layer {feature_layer!r:.80}, expected -{config.layers + 1} to -1")
    with torch.device("meta"):
        vision = VisionTransformer(config, feature_layer)
    n_blocks = config.layers + 1 + feature_layer
    below = {name: tensor for name, tensor in weights.items() if openai.block_number(name) < n_blocks}
    return assign(vision, below, path, dtype)


def load_projector(path: str | Path) -> Projection:
    """W in float32, of our projector.pth {"weight": (dim, D)[, "bias"]} or the original's mm_projector.bin."""
    return projector_of(huggingface.load_projector(path), path)


def projector_of(weights: dict[str, torch.Tensor], path: str | Path) -> Projection:
    """W in float32, of its weights {"weight": (dim, D)[, "bias"]}."""
    if "weight" not in weights or weights["weight"].dim() != 2:
        raise UserError(f"{path}: its projector is not one matrix `weight` or `model.mm_projector.weight`; LLaVA-1.5 "
                        "and later have two layers and an activation: use LLaVA's first version")  # fmt: skip
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


def fingerprint(module: nn.Module) -> str:
    """A checksum of the first 1,024 values of every parameter: it reads little of a mapped file."""
    digest = hashlib.sha256()
    for p in module.parameters():
        digest.update(p.detach().flatten()[:1024].float().numpy().tobytes())
    return digest.hexdigest()


# --- run directories


def portable(path: str | Path, run: str | Path) -> str:
    """A path as a run directory records it: relative where both can move together, in this project or side by side."""
    path, run = Path(path).resolve(), Path(run).resolve()
    beside = path.is_relative_to(run.parent)
    in_project = path.is_relative_to(PROJECT) and run.is_relative_to(PROJECT)
    return os.path.relpath(path, run) if beside or in_project else str(path)


def checksum(path: str | Path, every_file: bool = False) -> str:
    """sha256 of a file, or of the files of a Hugging Face folder that are loaded.

    every_file: of all files of weights in the folder, as earlier versions recorded it.
    """
    digest, path, files = hashlib.sha256(), Path(path), [Path(path)]
    if path.is_dir():
        every = [file for file in path.iterdir() if file.suffix in (".bin", ".safetensors") and file.is_file()]
        files = [path / "config.json", *(every if every_file else huggingface.weight_files(path))]
    for file in sorted(files):
        try:
            with open(file, "rb") as content:
                while block := content.read(2**20):
                    digest.update(block)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({reason(error)}); is the path right?") from None
    return digest.hexdigest()


def save_run(run: str | Path, llama: LLaMAConfig, trained: dict[str, torch.Tensor], config: dict, vision: str | Path,
             tokenizer: str | Path):  # fmt: skip
    """Writes what `load_run` reads.

    trained: all parameters that trained, by LLaVA's names. config: JSON with "stage", "feature_layer", and in stage 1
    "llama", the path of the LLaMA. vision, tokenizer: paths.

    Everything is first written into a folder of its own, so a full disk harms nothing. While its files are then moved
    into the run, projector.pth is absent, and `load_run` refuses a run without it: old and new files never mix.
    """
    run, new = Path(run), Path(run) / ".new"
    W, llama_weights = ({name.removeprefix(part): tensor for name, tensor in trained.items() if name.startswith(part)}
                        for part in ("projector.", "llama."))  # fmt: skip
    shutil.rmtree(new, ignore_errors=True)
    try:
        if llama_weights:
            save_llama(llama, llama_weights, new)
            with replacing(new / "tokenizer.model") as file:
                file.write(Path(tokenizer).read_bytes())
        write_json(new / "vision.json", {"path": portable(vision, run), "sha256": checksum(vision),
                                         "feature_layer": config["feature_layer"]})  # fmt: skip
        write_json(new / "config.json", config)
        with replacing(new / "projector.pth") as file:
            torch.save(W, file)
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
    return next((name for name in names if not Path(run, name).is_file()), None)


def is_saved(run: str | Path, stage: int, step: int) -> bool:
    """True if a run directory holds the result of this step; a kill may have come before it was written."""
    return read_json(Path(run, "config.json"), dict).get("step") == step and not missing_file(run, stage)


def read_run(run: str | Path, trained_by: str = "torchrun train.py --stage 1", **expected) -> tuple[dict, Path, Path]:
    """config.json of a finished run, and the paths of its LLaMA and its ViT.

    trained_by: the command that makes such a run. expected: values that its config must have, such as stage=2.
    """
    run = Path(run)
    if not (run / "config.json").is_file():
        raise UserError(f"{run}: no run directory; train it first: {trained_by} --out {run}")
    config = read_json(run / "config.json", dict)
    if config.get("stage") not in (1, 2):
        raise UserError(f"{run}: not a run directory; to make one from a LLaVA: python -m tools.import_llava "
                        f"{run} RUN")  # fmt: skip
    for name, value in expected.items():
        if config.get(name) != value:
            raise UserError(f"{run / 'config.json'}: trained with {name} {config.get(name)!r:.80}, expected {value!r}; "
                            f"use a run of: {trained_by}")  # fmt: skip
    if name := missing_file(run, config["stage"]):
        raise UserError(f"{run / name}: missing, so the run is unfinished; train.py --out {run} finishes it")
    llama = run if config["stage"] == 2 else run / str(config.get("llama"))
    vision = run / str(read_json(run / "vision.json", dict).get("path"))
    for path, setting in ((llama, "'llama' in config.json"), (vision, "'path' in vision.json")):
        if not os.path.exists(path):
            raise UserError(f"{run}: {printable(os.path.normpath(path))[:500]} does not exist; move it back there, or "
                            f"correct {setting}")  # fmt: skip
    return config, llama, vision


def load_run(run: str | Path, dtype: torch.dtype | None = torch.float32,
             **expected) -> tuple[LLaVA, SentencePieceProcessor, dict]:  # fmt: skip
    """LLaVA, tokenizer and config.json of a run directory; W in float32, all else in `dtype` (None: as stored).

    expected: as in `read_run`. Raises UserError also if the frozen parts are not those that it was trained with.
    """
    run, (config, llama, vision) = Path(run), read_run(run, **expected)
    recorded = read_json(run / "vision.json", dict)
    vit = load_vision(vision, recorded.get("feature_layer"), dtype)
    if all(checksum(vision, every_file) != recorded.get("sha256") for every_file in (False, True)):
        raise UserError(f"{vision}: not the ViT that {run} was trained with (vision.json has another sha256); restore "
                        "that one or train again")  # fmt: skip
    try:
        llava = build(load_llama(llama, dtype), vit, load_projector(run / "projector.pth"))
    except UserError as error:
        raise UserError(f"{run}: {error}") from None
    return llava, open_tokenizer(tokenizer_path(llama), llava.llama.config), config


def has_bf16(device: torch.device) -> bool:
    """False for GPUs before Ampere, on which many operations in bf16 fail."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def open_run(run: str | Path, device: torch.device, trained_by: str, **expected) -> tuple:
    """A run directory for use: the frozen model, tokenizer, config, and the autocast context of its precision.

    A GPU without bf16 computes a run of bf16 in fp32.
    """
    model, sp, config = load_run(run, None, trained_by=trained_by, **expected)
    bf16 = config.get("precision") == "bf16" and has_bf16(device)
    model.to(device, torch.bfloat16 if bf16 else torch.float32).requires_grad_(False)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN would plan its attention anew for each length of the cache
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    return model, sp, config, autocast


# --- the state to resume from


def save_state(run: str | Path, state: dict, step: int):
    """Replaces RUN/state.pth. state: {"model", "optimizer"} of distributed.full_state."""
    with replacing(Path(run, "state.pth")) as file:
        torch.save(state | {"step": step}, file)


def load_state(run: str | Path) -> dict | None:
    """The state that `save_state` wrote, with its "step"; None if there is none. Raises UserError if it is damaged."""
    path = Path(run, "state.pth")
    if not path.exists():
        return None
    try:
        state = load_tensors(path)
    except UserError as error:
        raise UserError(f"{error}; or give --no-resume to start again") from None
    if not isinstance(state, dict) or not state.keys() >= {"step", "model", "optimizer"}:
        raise UserError(f"{path}: holds no training state; remove it, or give --no-resume to start again")
    return state
