"""LLaMA as Meta releases it: params.json, and consolidated.NN.pth, one file for each model-parallel process."""

import math
from pathlib import Path

import torch

from common import UserError, printable, shorten
from formats.huggingface import positive, require_heads
from formats.tensors import load_weights

FIELDS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "norm_eps", "rope_theta")  # as in LLaMAConfig
FORMULA = ("multiple_of", "ffn_dim_multiplier")  # from which ffn_dim is computed
DEFAULTS = {  # of LLaMA 1 and 2; their params.json may say -1 for vocab_size
    "multiple_of": 256, "ffn_dim_multiplier": 1, "norm_eps": 1e-5, "rope_theta": 10000.0, "vocab_size": 32000,
}  # fmt: skip
IGNORED = ("max_seq_len", "max_batch_size", "model_parallel_size")  # they do not change the model
# The files hold slices of each matrix along dim 0, but of these matrices along dim 1, and equal copies of the norms.
SLICED_ALONG_1 = ("wo", "w2", "tok_embeddings")


def weight_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files or [file.name for file in files] != [f"consolidated.{i:02}.pth" for i in range(len(files))]:
        raise UserError(f"{folder}: expected consolidated.00.pth, .01.pth, ... without a gap; found "
                        f"{shorten(file.name for file in files) or 'none'}")  # fmt: skip
    return files


def load_llama(folder: Path) -> dict[str, torch.Tensor]:
    return merge([load_weights(file) for file in weight_files(folder)], folder)


def merge(shards: list[dict[str, torch.Tensor]], path: Path) -> dict[str, torch.Tensor]:
    """Joins the slices of the model-parallel files; drops RoPE's frequencies, which the model computes."""
    weights = {}
    for name in dict.fromkeys(name for shard in shards for name in shard if not name.endswith("rope.freqs")):
        parts = [shard[name] for shard in shards if name in shard]
        norm = parts[0].dim() < 2
        alike = len(parts) == len(shards) and len({(part.shape, part.dtype) for part in parts}) == 1
        if not alike or (norm and not all(torch.equal(part.float(), parts[0].float()) for part in parts[1:])):
            raise UserError(f"{path}: {printable(name)[:120]} differs between the files; are they of one model?")
        along = 1 if name.split(".")[-2:][0] in SLICED_ALONG_1 else 0
        weights[name] = parts[0] if norm or len(parts) == 1 else torch.cat(parts, along)
    return weights


def ffn_width(dim: int, multiple_of: int, multiplier: float = 1) -> int:
    """LLaMA's formula: SwiGLU has three matrices instead of two, so 2/3 of the usual 4 dim, rounded up."""
    return multiple_of * math.ceil(int(multiplier * int(2 * 4 * dim / 3)) / multiple_of)


def llama_config(params: dict, path: Path) -> dict:
    """params.json -> the fields of LLaMAConfig."""
    params = {key: value for key, value in params.items() if value is not None and value is not False}
    if unknown := params.keys() - {*FIELDS, *FORMULA, *IGNORED}:
        raise UserError(f"{path}: {shorten(unknown)}: not a setting of LLaMA 1 or 2; use one of these")
    given = DEFAULTS | {"n_kv_heads": params.get("n_heads")} | params
    if given["vocab_size"] == -1:
        given["vocab_size"] = DEFAULTS["vocab_size"]
    fields = dict(zip(FIELDS, positive(given, FIELDS, path)))
    require_heads(fields, path)
    return fields | {"ffn_dim": ffn_width(fields["dim"], *positive(given, FORMULA, path))}


def params_of(config: dict) -> dict:
    """The fields of LLaMAConfig -> params.json.

    It has no ffn_dim: `multiple_of` is what the formula rounds up to a multiple of, and a multiplier does the rest.
    """
    dim, ffn_dim = config["dim"], config["ffn_dim"]
    multiples = [m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if ffn_dim % m == 0]
    exact = [m for m in multiples if ffn_width(dim, m) == ffn_dim]
    params = {name: config[name] for name in FIELDS} | {"multiple_of": (exact or multiples)[0]}
    if not exact:
        params["ffn_dim_multiplier"] = (ffn_dim + 0.5) / ffn_width(dim, 1)  # + 0.5: the formula truncates
    return params
