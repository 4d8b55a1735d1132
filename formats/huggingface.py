"""LLaMA, CLIP and LLaVA as Hugging Face stores them: which files hold the weights, config.json, names and row order.

Only the functions under "files" read anything; all others are pure. "Raw" names are Meta's, such as
`layers.0.attention.wq.weight`. The names of CLIP's vision tower are OpenAI's without their prefix `visual.`, such as
`transformer.resblocks.0.ln_1.bias`.
"""

import re
from pathlib import Path

import torch

from common import UserError, is_process_0, read_json, reason, shorten
from formats.openai import HEAD_DIM, vision_sizes
from formats.tensors import LFS_POINTER, load_weights

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FRACTIONS = ("norm_eps", "rms_norm_eps", "rope_theta", "ffn_dim_multiplier")  # settings that need not be integers
DELTA_NORM = 0.1  # the weights of the last norm have a mean of about 1 or more in a LLaMA, and near 0 in deltas

# --- names: Hugging Face's -> raw or OpenAI's. N is the number of a layer.

LLAMA_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.N.input_layernorm.weight": "layers.N.attention_norm.weight",
    "model.layers.N.self_attn.q_proj.weight": "layers.N.attention.wq.weight",
    "model.layers.N.self_attn.k_proj.weight": "layers.N.attention.wk.weight",
    "model.layers.N.self_attn.v_proj.weight": "layers.N.attention.wv.weight",
    "model.layers.N.self_attn.o_proj.weight": "layers.N.attention.wo.weight",
    "model.layers.N.post_attention_layernorm.weight": "layers.N.ffn_norm.weight",
    "model.layers.N.mlp.gate_proj.weight": "layers.N.feed_forward.w1.weight",
    "model.layers.N.mlp.down_proj.weight": "layers.N.feed_forward.w2.weight",
    "model.layers.N.mlp.up_proj.weight": "layers.N.feed_forward.w3.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
LLAMA_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # computed, not loaded
LLAMA_FIELDS = {  # config.json -> LLaMAConfig
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads", "intermediate_size": "ffn_dim", "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps", "rope_theta": "rope_theta",
}  # fmt: skip
LLAMA_7B = {  # what a LLaVA's `text_config` may leave out
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 11008, "vocab_size": 32000, "rms_norm_eps": 1e-6,
}  # fmt: skip
CLIP_NAMES = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
}
CLIP_BLOCK = {  # each has a weight and a bias
    "encoder.layers.N.layer_norm1.": "transformer.resblocks.N.ln_1.",
    "encoder.layers.N.self_attn.q_proj.": "transformer.resblocks.N.attn.q_proj_",  # OpenAI concatenates q, k and v
    "encoder.layers.N.self_attn.k_proj.": "transformer.resblocks.N.attn.k_proj_",
    "encoder.layers.N.self_attn.v_proj.": "transformer.resblocks.N.attn.v_proj_",
    "encoder.layers.N.self_attn.out_proj.": "transformer.resblocks.N.attn.out_proj.",
    "encoder.layers.N.layer_norm2.": "transformer.resblocks.N.ln_2.",
    "encoder.layers.N.mlp.fc1.": "transformer.resblocks.N.mlp.c_fc.",
    "encoder.layers.N.mlp.fc2.": "transformer.resblocks.N.mlp.c_proj.",
}
for kind in ("weight", "bias"):
    CLIP_NAMES |= {name + kind: openai + kind for name, openai in CLIP_BLOCK.items()}
CLIP_UNUSED = (  # the text tower, and what follows the grid features
    "text_model.", "text_projection.", "visual_projection.", "logit_scale", "post_layernorm.",
    "embeddings.position_ids",
)  # fmt: skip
CLIP_BASE = {"width": 768, "layers": 12, "image_size": 224, "patch_size": 32}  # the sizes that transformers defaults to
LLAVA_PREFIXES = {  # prefix -> part of the model. The first prefix that fits is removed.
    "model.mm_projector.": "projector",  # the original release
    "multi_modal_projector.": "projector",  # files of transformers
    "model.multi_modal_projector.": "projector",  # modules of transformers
    "model.vision_tower.vision_tower.": "vision",
    "model.vision_tower.": "vision",
    "vision_tower.": "vision",
    "model.language_model.": "llama",
    "language_model.": "llama",
    "": "llama",
}


def rename(weights: dict, names: dict[str, str], path: Path | str) -> dict[str, torch.Tensor]:
    """The tensors under the names that the table `names` gives them.

    Raises UserError if a name is not in the table, or if two tensors get the same name.
    """
    renamed, unknown = {}, []
    for name, tensor in weights.items():
        parts = name.split(".")
        number = "".join(part for part in parts if part.isdecimal())
        pattern = ".".join("N" if part.isdecimal() else part for part in parts)
        if pattern not in names:
            unknown.append(name)
            continue
        new = names[pattern].replace("N", number)
        if new in renamed:
            raise duplicate(name, path)
        renamed[new] = tensor
    if unknown:
        raise UserError(f"{path}: holds tensors that this model does not have: {shorten(sorted(unknown))}; are these "
                        "the weights of another model?")  # fmt: skip
    return renamed


def duplicate(name: str, path: Path | str) -> UserError:
    return UserError(f"{path}: holds {shorten([name])} under two names; take the weights of one model")


# --- files


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    weights = {}
    for file in weight_files(folder):
        part = load_weights(file)
        if part.keys() & weights:
            raise UserError(f"{file}: {shorten(part.keys() & weights)} is in an earlier part too; download all parts "
                            "again")  # fmt: skip
        weights |= part
    return weights


def load_llama(folder: Path, head_dim: int) -> dict[str, torch.Tensor]:
    """A LLaMA's weights under their raw names. Raises UserError for a LLaVA."""
    config, weights = read_json(folder / "config.json", dict), load_folder(folder)
    if is_llava(config) or any("mm_projector." in name for name in weights):
        raise UserError(f"{folder}: a finished LLaVA; make a run directory of it first: python -m tools.import_llava "
                        f"{folder} RUN")  # fmt: skip
    return llama_to_raw(weights, head_dim, folder, is_tied(config))


def load_projector(path: str | Path) -> dict[str, torch.Tensor]:
    """The weights of W under their names in Projection: "weight" of "model.mm_projector.weight".

    The original saves the word embeddings beside W if it adds tokens around the picture; they are left out.
    """
    weights = load_weights(path)
    embeddings = [name for name in weights if name.endswith("embed_tokens.weight")]
    if embeddings and is_process_0():
        print(f"{path}: loads W without {shorten(embeddings)}, because this program adds no tokens")
    return {name.split("mm_projector.")[-1]: weights[name] for name in weights if name not in embeddings}


def load_clip(folder: Path) -> dict[str, torch.Tensor]:
    """A CLIP's vision tower under OpenAI's names."""
    return clip_tower(read_json(folder / "config.json", dict), load_folder(folder), folder)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: the first complete set of WEIGHTS, in the order of transformers.

    A set is incomplete if a file of it is absent or a Git LFS pointer. Raises UserError if no set is complete.
    """
    problems = []
    for name in WEIGHTS:
        if not (folder / name).is_file():
            continue
        names = [name]
        if name.endswith(".json") and not is_pointer(folder / name):
            names = files_of_index(folder / name)
        absent = [part for part in names if not (folder / part).is_file()]
        pointers = [part for part in names if part not in absent and is_pointer(folder / part)]
        if not absent and not pointers:
            return [folder / part for part in names]
        if absent:
            problems.append(f"{name}, but not its parts {shorten(absent)}")
        if pointers:
            problems.append(f"only Git LFS pointers in place of {shorten(pointers)} (`git lfs pull` fetches the files)")
    found = "; ".join(problems) or "none of them"
    raise UserError(f"{folder}: expected model.safetensors or pytorch_model.bin, or the .index.json of one and its "
                    f"parts; found {found}")  # fmt: skip


def is_pointer(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); is the path right?") from None


def files_of_index(path: Path) -> list[str]:
    """The file names in an index {"weight_map": {tensor: file}}. Raises UserError if one is not a plain name."""
    places = read_json(path, dict).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,199}", name) for name in names):
        raise UserError(f"{path}: expected a weight_map from tensors to files of this folder; download it again")
    return sorted(set(names))


# --- values of config.json and params.json


def positive(config: dict, keys, path: Path) -> list:
    """The values at `keys`. Raises UserError if one is not positive, is huge, or is a fraction but not in FRACTIONS."""
    for key in keys:
        kinds = (int, float) if key in FRACTIONS else int
        value = config.get(key)
        most = 1000 if key in ("n_layers", "num_hidden_layers") else 2**24
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most:
            raise UserError(f"{path}: {key} is {value!r:.80}, expected a positive number; take the published file")
    return [config[key] for key in keys]


def require(path: Path, **settings):
    """settings: name=(value, the only accepted value). Raises UserError if they differ."""
    for name, (value, accepted) in settings.items():
        if value != accepted:
            raise UserError(f"{path}: {name} is {value!r:.80}, but only {accepted!r} is supported; take other weights")


def part_config(config: dict, key: str, path: Path) -> dict:
    """The settings of one part of a model. Raises UserError if config[key] is not an object."""
    if not isinstance(config[key], dict):
        raise UserError(f"{path}: {key} is {config[key]!r:.80}, expected an object; take the published file")
    return config[key]


# --- LLaMA


def llama_config(config: dict, path: Path) -> dict:
    """config.json of a LLaMA or a LLaVA -> the fields of LLaMAConfig. Raises UserError for other architectures."""
    if "text_config" in config:
        config = LLAMA_7B | part_config(config, "text_config", path)
    elif is_llava(config):
        config = config | {"model_type": "llama"}
    config = {key: value for key, value in config.items() if value is not None}
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}  # of transformers 4, of transformers 5
    if not isinstance(rope, dict):
        rope = {"type": rope}
    config.setdefault("rms_norm_eps", 1e-6)  # the default of transformers
    config["rope_theta"] = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    require(path, model_type=(config.get("model_type"), "llama"))
    fields = dict(zip(LLAMA_FIELDS.values(), positive(config, LLAMA_FIELDS, path)))
    require_heads(fields, path)
    head_dim = fields["dim"] // fields["n_heads"]
    require(
        path,
        hidden_act=(config.get("hidden_act", "silu"), "silu"),
        attention_bias=(config.get("attention_bias", False), False),
        mlp_bias=(config.get("mlp_bias", False), False),
        head_dim=(config.get("head_dim", head_dim), head_dim),
        rope_scaling=(rope.get("rope_type", rope.get("type", "default")), "default"),
        quantization_config=(config.get("quantization_config"), None),
    )
    return fields


def require_heads(fields: dict, path: Path):
    """Raises UserError if `dim` does not divide into heads of even size, or the heads not into groups."""
    dim, n_heads, n_kv_heads = fields["dim"], fields["n_heads"], fields["n_kv_heads"]
    if dim % (2 * n_heads) or n_heads % n_kv_heads:
        raise UserError(f"{path}: dim {dim} does not divide into {n_heads} heads of even size, or these not into "
                        f"{n_kv_heads} groups; use the file as published")  # fmt: skip


def is_delta(raw: dict[str, torch.Tensor]) -> bool:
    """Whether weights under raw names are deltas over another LLaMA."""
    return bool(raw.get("norm.weight", torch.ones(1)).float().abs().mean() < DELTA_NORM)


def is_tied(config: dict) -> bool:
    """Whether the output matrix is the word embeddings; the weights then need no lm_head."""
    return config.get("text_config", config).get("tie_word_embeddings") is True


def llama_to_raw(weights: dict, head_dim: int, path: Path, tied: bool = False) -> dict[str, torch.Tensor]:
    """Hugging Face's names and row order -> Meta's. tied: `is_tied` of config.json.

    Raises UserError for a name that no LLaMA has.
    """
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith(LLAMA_BUFFERS)}
    without_prefix = {name.removeprefix("model."): raw for name, raw in LLAMA_NAMES.items()}
    raw = rename(weights, LLAMA_NAMES | without_prefix, path)
    for name, weight in raw.items():
        if name.endswith((".wq.weight", ".wk.weight")):
            if weight.dim() != 2 or head_dim < 2 or len(weight) % head_dim:
                raise UserError(f"{path}: {name} is {tuple(weight.shape)}, expected (heads * {head_dim}, dim); take "
                                "config.json and weights of one model")  # fmt: skip
            raw[name] = swap_pairs_and_halves(weight, 2, head_dim // 2)
    if tied and "tok_embeddings.weight" in raw:
        embeddings = raw["tok_embeddings.weight"]
        if not torch.equal(raw.get("output.weight", embeddings), embeddings):
            raise UserError(f"{path}: config.json says tie_word_embeddings, but lm_head.weight differs from "
                            "embed_tokens.weight; set it to false, or take other weights")  # fmt: skip
        raw["output.weight"] = embeddings.clone()  # this program trains the two matrices separately
    return raw


def llama_from_raw(weights: dict, head_dim: int) -> dict[str, torch.Tensor]:
    """The inverse of `llama_to_raw`."""
    named = rename(weights, {raw: name for name, raw in LLAMA_NAMES.items()}, "LLaMA")
    for name, weight in named.items():
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            named[name] = swap_pairs_and_halves(weight, head_dim // 2, 2)
    return named


def swap_pairs_and_halves(weight: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Reorders the rows of each head of q or k (heads * rows * columns, dim): a (rows, columns) grid is transposed.

    RoPE rotates pairs of rows. In Meta's order the two rows of a pair are adjacent. In Hugging Face's order the second
    row follows half a head after the first. rows=2 turns Hugging Face's order into Meta's, columns=2 the reverse.
    """
    grid = weight.unflatten(0, (-1, rows, columns))  # (heads, rows, columns, dim)
    return grid.transpose(1, 2).flatten(0, 2)  # (heads * columns * rows, dim)


# --- CLIP


def clip_config(width: int, layers: int, image_size: int, patch_size: int) -> dict:
    """The settings in config.json of a CLIP ViT of these sizes."""
    return {
        "hidden_size": width, "num_hidden_layers": layers, "image_size": image_size, "patch_size": patch_size,
        "num_attention_heads": width // HEAD_DIM, "intermediate_size": 4 * width, "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }  # fmt: skip


def clip_tower(config: dict, weights: dict, folder: Path) -> dict[str, torch.Tensor]:
    """The vision tower of a CLIP or a LLaVA under OpenAI's names. Raises UserError if config.json does not fit it."""
    path, model_type = folder / "config.json", config.get("model_type")
    if "vision_config" in config:
        config = part_config(config, "vision_config", path)
        if model_type != "clip":
            model_type = config.get("model_type")  # a LLaVA may have another vision tower
    if model_type not in ("clip", "clip_vision_model"):
        raise UserError(f"{path}: model_type is {model_type!r:.80}, expected 'clip' or 'clip_vision_model', as in the "
                        "Hugging Face folder of OpenAI's ViT-L-14.pt")  # fmt: skip
    given = clip_config(**CLIP_BASE) | {key: value for key, value in config.items() if value is not None}
    tower = clip_to_openai(weights, folder)
    fitting = clip_config(**vision_sizes(tower, folder))
    require(path, **{key: (given[key], value) for key, value in fitting.items()})
    return tower


def clip_to_openai(weights: dict, path: Path) -> dict[str, torch.Tensor]:
    """The vision tower of a CLIPModel or a CLIPVisionModel under OpenAI's names, without what follows its blocks."""
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if not name.removeprefix("vision_model.").startswith(CLIP_UNUSED)
    }
    with_prefix = {f"vision_model.{name}": openai for name, openai in CLIP_NAMES.items()}
    openai = rename(weights, CLIP_NAMES | with_prefix, path)
    for name in [name for name in openai if ".q_proj_" in name]:
        absent = torch.empty(())
        parts = [openai.pop(name.replace(".q_proj_", f".{part}_proj_"), absent) for part in "qkv"]
        if any(part.dim() == 0 or part.shape != parts[0].shape for part in parts):
            raise UserError(f"{path}: {name}: k or v is missing or of another shape; download the weights again")
        openai[name.replace(".q_proj_", ".in_proj_")] = torch.cat(parts)  # (3 * width, width) or (3 * width,)
    return openai


def clip_from_openai(weights: dict) -> dict[str, torch.Tensor]:
    """The inverse of `clip_to_openai`, without the prefix `vision_model.`."""
    split = {}
    for name, tensor in weights.items():
        pieces = tensor.chunk(3) if ".in_proj_" in name else [tensor]
        for part, piece in zip("qkv", pieces):
            split[name.replace(".in_proj_", f".{part}_proj_")] = piece
    return rename(split, {openai: name for name, openai in CLIP_NAMES.items()}, "CLIP")


# --- LLaVA


def is_llava(config: dict) -> bool:
    """Whether config.json is a LLaVA's. The folders of April 2023 say "llama" and have settings that start with mm_."""
    if config.get("model_type") == "llama":
        return any(key.startswith("mm_") for key in config)
    return config.get("model_type") in ("llava", "llava_llama")


def llava_parts(weights: dict, path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Splits a LLaVA -> {"llama": {...}, "vision": {...}, "projector": {...}}; a part without weights is empty.

    The names in a part are those of a LLaMA, a CLIP, and `weight` or `linear_1.weight`, as Hugging Face has them.
    """
    parts = {"llama": {}, "vision": {}, "projector": {}}
    for name, tensor in weights.items():
        prefix = next(prefix for prefix in LLAVA_PREFIXES if name.startswith(prefix))
        part = parts[LLAVA_PREFIXES[prefix]]
        if name.removeprefix(prefix) in part:
            raise duplicate(name, path)
        part[name.removeprefix(prefix)] = tensor
    return parts
