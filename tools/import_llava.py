"""Makes a run directory of a finished LLaVA, or a raw LLaMA folder of deltas over a LLaMA.

    python -m tools.import_llava LLaVA-13b-v0 runs/llava-13b --vision ViT-L-14.pt
    python -m tools.import_llava LLaVA-13b-delta-v0 runs/llava-13b --llama-base llama-13b --vision ViT-L-14.pt
    python -m tools.import_llava vicuna-13b-delta-v0 vicuna-13b-v0 --llama-base llama-13b

A run directory is for chat.py, eval_scienceqa.py and train.py --init-from, a raw LLaMA folder for train.py --llama.
LLAVA is a folder of the original release or of transformers, or, with --projector and --vision, a LLaMA's folder.
"""

import sys
from pathlib import Path

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python tools/import_llava.py`

import checkpoint
from common import ArgumentParser, UserError, read_json, replacing, run_command
from conversation import TEMPLATE
from data import SCIENCEQA_PROMPT
from formats import huggingface
from formats.openai import vision_sizes
from model import LLaMA, Projection
from tools.export import new_folder
from vision import FEATURE_LAYER, PREPROCESSING, VisionConfig, VisionTransformer

ORIGINAL_LAYER = -1  # feature layer of an original config.json without mm_vision_select_layer
TRANSFORMERS_LAYER = -2  # feature layer of a transformers config.json without vision_feature_layer


def import_llava(llava: str | Path, target: str | Path, base: str | Path | None = None,
                 vision: str | Path | None = None, projector: str | Path | None = None):  # fmt: skip
    """Writes `target`. The paths are the arguments of `main`. Raises UserError if a part of the model is missing."""
    folder, target = Path(llava), Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists already; name a new directory")
    if (folder / "projector.pth").is_file():
        raise UserError(f"{folder}: is a run directory already; use it: python chat.py --model {folder}")
    raw = (folder / "params.json").is_file()
    config = {} if raw else read_json(folder / "config.json", dict)
    parts = {} if raw else huggingface.llava_parts(huggingface.load_folder(folder), folder)
    is_llava = huggingface.is_llava(config) or bool(parts.get("projector"))
    only_llama = not is_llava and not projector and not vision and base is not None
    if not only_llama and not projector and not parts.get("projector"):
        raise UserError(f"{folder}: has no projector; give mm_projector.bin or projector.pth by --projector, or, for "
                        "deltas over a LLaMA, that LLaMA's folder by --llama-base alone")  # fmt: skip
    if not only_llama and not vision and not (parts.get("vision") and "vision_config" in config):
        raise UserError(f"{folder}: has no ViT; give OpenAI's ViT-L-14.pt or its Hugging Face folder by --vision")
    layer = feature_layer(config, is_llava, folder / "config.json")
    report_preprocessing(config, folder / "config.json")

    llama = load_raw(folder, base) if raw else load_huggingface(folder, config, parts["llama"], base)
    tokenizer = checkpoint.tokenizer_path(folder)
    if base and not tokenizer.is_file():  # some deltas come without one
        tokenizer = checkpoint.tokenizer_path(base)
    checkpoint.open_tokenizer(tokenizer, llama.config)
    with new_folder(target) as new:
        if only_llama:
            write_llama(llama, tokenizer, new)
        else:
            W = checkpoint.load_projector(projector) if projector else projector_of(parts["projector"], config, folder)
            vision = vision or write_vision(parts["vision"], config, folder, new)
            checkpoint.build(llama, checkpoint.load_vision(vision, layer, None), W)  # checks that the parts fit
            write_run(llama, W, layer, vision, tokenizer, folder, new)
    if only_llama:
        print(f"{target}: written. It is a LLaMA in Meta's raw format, the sum of base and deltas.\n"
              f"next: torchrun train.py --stage 1 --llama {target} --vision PATH --data FILE --images DIR")  # fmt: skip
    else:
        print(f"{target}: written. It is a run directory of stage 2. Its prompts use the template {TEMPLATE}, that of "
              "LLaVA's first release; a model trained with another template answers worse.\n"
              f"next: python chat.py --model {target} --image PICTURE")  # fmt: skip


# --- config.json


def feature_layer(config: dict, is_llava: bool, path: Path) -> int:
    """The layer of the ViT that the projector reads: config.json's, else the default of the code that wrote it."""
    layer = FEATURE_LAYER
    if "text_config" in config:
        layer = config.get("vision_feature_layer", TRANSFORMERS_LAYER)
    elif is_llava:
        layer = config.get("mm_vision_select_layer", ORIGINAL_LAYER)
    if type(layer) is not int:
        raise UserError(f"{path}: the feature layer is {layer!r:.80}, expected an integer")
    huggingface.require(
        path,
        vision_feature_select_strategy=(config.get("vision_feature_select_strategy", "default"), "default"),
        mm_vision_select_feature=(config.get("mm_vision_select_feature", "patch"), "patch"),
    )
    return layer


def report_preprocessing(config: dict, path: Path):
    """Prints how the model's prompts differed from this program's. Raises UserError if its pictures did."""
    if config.get("mm_use_im_start_end"):
        print(f"{path}: the model was trained with <im_start> and <im_end> around the picture; prompts here have none")
    if (shape := config.get("image_aspect_ratio") or "square") != "square":
        raise UserError(f"{path}: image_aspect_ratio is {shape!r:.80}: the model was trained on whole pictures, padded "
                        "or in tiles, but this program crops them to a square; take another LLaVA")  # fmt: skip


# --- the LLaMA


def load_raw(folder: Path, base: str | Path | None) -> LLaMA:
    if base:
        raise UserError(f"{folder}: is in Meta's raw format, but deltas come in Hugging Face's; leave out --llama-base")
    return checkpoint.load_llama(folder, None)


def load_huggingface(folder: Path, config: dict, weights: dict, base: str | Path | None) -> LLaMA:
    """A LLaMA in the dtype of its weights. base: the folder of the LLaMA that the weights are deltas over."""
    c = checkpoint.llama_config(folder)
    weights = huggingface.llama_to_raw(weights, c.head_dim, folder, huggingface.is_tied(config))
    with torch.device("meta"):
        llama = LLaMA(c)
    is_delta = huggingface.is_delta(weights)
    llama = checkpoint.assign(llama, weights, folder, None)
    if is_delta and not base:
        raise UserError(f"{folder}: holds deltas over another LLaMA (its last norm is near 0); give that LLaMA by "
                        "--llama-base")  # fmt: skip
    if base and not is_delta:
        raise UserError(f"{folder}: holds weights, not deltas (its last norm is not near 0); leave out --llama-base")
    if base:
        add_base(llama, checkpoint.load_llama(base, None), folder)
    return llama


@torch.no_grad()
def add_base(llama: LLaMA, base: LLaMA, folder: Path):
    """Adds the weights of `base` to a LLaMA of deltas, in place and in the deltas' dtype, as the original release does.

    Rows that only the deltas have belong to added words and are complete.
    """
    if llama.config.n_layers != base.config.n_layers:
        raise UserError(f"{folder}: holds deltas over a LLaMA of {llama.config.n_layers} layers, --llama-base has "
                        f"{base.config.n_layers}; use the LLaMA of the same size")  # fmt: skip
    for name, delta in llama.named_parameters():
        weight = base.get_parameter(name)
        added_rows = len(delta) - len(weight)
        if delta.shape[1:] != weight.shape[1:] or not 0 <= added_rows <= checkpoint.SPARE_ROWS:
            raise UserError(f"{folder}: {name} is {tuple(delta.shape)}, in --llama-base {tuple(weight.shape)}; use the "
                            "LLaMA of the same size")  # fmt: skip
        delta[: len(weight)] += weight.to(delta.dtype)


# --- the projector


def projector_of(weights: dict, config: dict, folder: Path) -> Projection:
    """W in float32, of one linear layer, or of transformers' two layers without an activation between them."""
    if "linear_1.weight" in weights and config.get("projector_hidden_act") == "linear":
        weights = merged(weights, folder)
    return checkpoint.projector_of(weights, folder)


@torch.no_grad()
def merged(weights: dict, folder: Path) -> dict[str, torch.Tensor]:
    """Two linear layers in a row as one: W_2 (W_1 z + b_1) + b_2 = (W_2 W_1) z + (W_2 b_1 + b_2)."""
    W_1, has_bias = weights["linear_1.weight"], "linear_1.bias" in weights
    dim, vision_dim = W_1.shape if W_1.dim() == 2 else (1, 1)  # `assign` refuses any other shape
    with torch.device("meta"):
        first, second = nn.Linear(vision_dim, dim, has_bias), nn.Linear(dim, dim, has_bias)
    checkpoint.assign(nn.ModuleDict({"linear_1": first, "linear_2": second}), weights, folder, torch.float32)
    product = {"weight": second.weight @ first.weight}  # (dim, vision_dim)
    if has_bias:
        product["bias"] = second(first.bias)  # (dim,)
    return product


# --- files


def write_vision(weights: dict, config: dict, folder: Path, new: Path) -> Path:
    """Writes the ViT of a transformers LLaVA, with all of its blocks, to vision.pth, under OpenAI's names."""
    weights = huggingface.clip_tower(config, weights, folder)
    with torch.device("meta"):
        vision = VisionTransformer(VisionConfig(**vision_sizes(weights, folder)), -1)
    checkpoint.assign(vision, weights, folder, None)
    with replacing(new / "vision.pth") as file:
        torch.save({f"visual.{name}": p.detach() for name, p in vision.named_parameters()}, file)
    return new / "vision.pth"


def write_llama(llama: LLaMA, tokenizer: Path, new: Path):
    checkpoint.save_llama(llama.config, {name: p.detach() for name, p in llama.named_parameters()}, new)
    with replacing(new / "tokenizer.model") as file:
        file.write(tokenizer.read_bytes())


def write_run(llama: LLaMA, W: Projection, layer: int, vision: str | Path, tokenizer: Path, folder: Path, new: Path):
    trained = {f"llama.{name}": p.detach() for name, p in llama.named_parameters()}
    trained |= {f"projector.{name}": p.detach() for name, p in W.named_parameters()}
    config = {
        "stage": 2,
        "settings": {"task": "chat"},
        "template": TEMPLATE,
        "prompt": SCIENCEQA_PROMPT,
        "feature_layer": layer,
        "preprocessing": PREPROCESSING,
        "precision": "fp32" if llama.norm.weight.dtype == torch.float32 else "bf16",
        "torch": torch.__version__,
        "imported_from": checkpoint.portable(folder, new),
    }
    checkpoint.save_run(new, llama.config, trained, config, vision, tokenizer)


def main():
    parser = ArgumentParser(__doc__, prog="python -m tools.import_llava")
    parser.add_argument("llava", metavar="LLAVA", help="the folder to read")
    parser.add_argument("target", metavar="RUN", help="the directory to write")
    parser.add_argument("--llama-base", metavar="DIR", help="the LLaMA that LLAVA holds deltas over")
    parser.add_argument("--vision", metavar="PATH", help="ViT-L-14.pt or its Hugging Face folder (default: LLAVA's)")
    parser.add_argument("--projector", metavar="FILE", help="mm_projector.bin or projector.pth (default: LLAVA's)")
    args = parser.parse_args()
    import_llava(args.llava, args.target, args.llama_base, args.vision, args.projector)


if __name__ == "__main__":
    run_command(main)
