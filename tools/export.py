"""Writes a run directory as a folder that Hugging Face's `transformers` reads.

    python -m tools.export runs/chat FOLDER      # needs: pip install safetensors tokenizers protobuf

`LlavaForConditionalGeneration.from_pretrained(FOLDER)` and `AutoProcessor.from_pretrained(FOLDER)` give the logits and
the greedy answers of the run. Three parts have another form there:

    projector    transformers has two linear layers: the first is W, the second the identity
    picture      its positions hold a token `<image>`; the vocabulary grows by one row if it has none to spare
    tokenizer    `tokenizers` applies merges in the order of a list, SentencePiece by the scores of the pieces
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python tools/export.py`

import checkpoint
from common import ArgumentParser, UserError, replacing, run_command, write_error, write_json
from conversation import IMAGE, STOP, SYSTEM, TEMPLATE
from formats import huggingface
from model import LLaMA, LLaVA
from vision import MEAN, STD, VisionTransformer

SHARD_SIZE = 2 * 10**9  # bytes of a file of weights; each file is assembled in memory
PACKAGES = "pip install safetensors tokenizers protobuf"
PROBES = (  # texts that tokenizer.json must tokenize as SentencePiece does
    f"{SYSTEM}\n\n{STOP} Human: ",
    "\nWhat is at the top-left?\n### Assistant:",
    " It's 12,345 km: Zürich → 東京 🙂.\t \n\n###",
    "  two  spaces ####  ##\n",
    "a",
)
SPACE = "\u2581"  # SentencePiece's letter for a space

# `conversation.render` in Jinja. A message is a string, or a list of {"type": "image"} and {"type": "text", "text": ""}
# that fill a line each. The macro `escape` is `conversation.escape`: ##### -> # # # # #. One difference remains: if a
# message spells <image>, <s> or </s>, transformers reads a token there, and this program reads text.
CHAT_TEMPLATE = """\
{%- macro escape(text) -%}
    {%- set text = text | replace('###', '#\\0#\\0#') | replace('\\0##', '\\0#\\0#') -%}
    {{- text | replace('\\0##', '\\0#\\0#') | replace('\\0', ' ') -}}
{%- endmacro -%}
{%- macro write(content) -%}
    {%- if content is string -%}
        {{- escape(content) -}}
    {%- else -%}
        {%- for part in content -%}
            {{- ('' if loop.first else '\\n') -}}
            {{- IMAGE if part.type == 'image' else escape(part.text) -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0].role == 'system' -%}
    {{- write(messages[0].content) -}}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {{- SYSTEM -}}
{%- endif -%}
{{- '\\n\\n' + STOP -}}
{%- for message in messages -%}
    {{- (' Human: ' if message.role == 'user' else ' Assistant: ') + write(message.content) + '\\n' + STOP -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ' Assistant:' -}}
{%- endif -%}
"""


def export(run: str | Path, folder: str | Path):
    """Writes `folder`. Raises UserError if it exists, if a package is missing, or if the run has another template."""
    run, folder = Path(run), Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: exists already; name a new folder")
    check_packages()
    model, sp, config = checkpoint.load_run(run, None)
    if config.get("template") != TEMPLATE:
        raise UserError(f"{run}: was trained with the template {config.get('template')!r:.80}, expected {TEMPLATE!r}")
    # transformers builds all blocks of the ViT, also those above the feature layer.
    vision = checkpoint.load_vision(checkpoint.read_run(run)[2], -1, None)
    image_id = sp.vocab_size()  # the first id that no piece has
    files = {
        "config.json": model_config(model, vision, sp, image_id),
        "generation_config.json": generation_config(sp, image_id),
        "preprocessor_config.json": preprocessor_config(vision.config.image_size),
        "processor_config.json": processor_config(vision.config.patch_size),
        "tokenizer_config.json": tokenizer_config(sp),
        "tokenizer.json": tokenizer_json(sp, image_id),
    }
    with new_folder(folder) as new:
        write_weights(model, vision, image_id, new)
        for name, content in files.items():
            write_json(new / name, content)
        with replacing(new / "chat_template.jinja") as file:
            file.write(chat_template().encode())
        with replacing(new / "tokenizer.model") as file:
            file.write(sp.serialized_model_proto())
    print(f"{folder}: written\nnext: LlavaForConditionalGeneration.from_pretrained({str(folder)!r}), "
          f"AutoProcessor.from_pretrained({str(folder)!r})")  # fmt: skip


def check_packages():
    """Raises UserError now, not after the model has been loaded."""
    try:
        import safetensors.torch  # noqa: F401
        import tokenizers  # noqa: F401
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401
    except (ImportError, TypeError):  # an old protobuf raises TypeError
        raise UserError(f"the export needs other packages: {PACKAGES}") from None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Makes a temporary folder, which is renamed to `folder` if the block ends without an error, and else removed."""
    target = folder.resolve()
    new = target.with_name(f".{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)  # an earlier process may have been killed
    try:
        new.mkdir(parents=True)
        yield new
        os.replace(new, target)
    except OSError as error:
        raise write_error(folder, error) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


# --- weights


def llama_weights(llama: LLaMA, image_id: int) -> dict[str, torch.Tensor]:
    """The LLaMA's weights by their names in transformers. They get a row for `<image>` if the vocabulary lacks one."""
    weights = {name: p.detach() for name, p in llama.named_parameters()}
    if image_id == llama.config.vocab_size:
        embeddings, output = weights["tok_embeddings.weight"], weights["output.weight"]
        # The embedding of <image> is never read. Its logit is that of <unk>, so greedy decoding never picks it.
        weights["tok_embeddings.weight"] = torch.cat([embeddings, torch.zeros_like(embeddings[:1])])
        weights["output.weight"] = torch.cat([output, output[:1]])
    return huggingface.llama_from_raw(weights, llama.config.head_dim)


def vision_weights(vision: VisionTransformer) -> dict[str, torch.Tensor]:
    weights = huggingface.clip_from_openai({name: p.detach() for name, p in vision.named_parameters()})
    like = vision.ln_pre.weight  # (width,)
    unused = {"post_layernorm.weight": torch.ones_like(like), "post_layernorm.bias": torch.zeros_like(like)}
    return weights | {name: tensor.detach() for name, tensor in unused.items()}


def projector_weights(model: LLaVA) -> dict[str, torch.Tensor]:
    dim = model.llama.config.dim
    weights = {f"linear_1.{name}": p.detach() for name, p in model.projector.named_parameters()}
    weights["linear_2.weight"] = torch.eye(dim)
    if model.projector.bias is not None:
        weights["linear_2.bias"] = torch.zeros(dim)
    return weights


def write_weights(model: LLaVA, vision: VisionTransformer, image_id: int, folder: Path):
    """Writes model.safetensors, or files of at most SHARD_SIZE bytes (or one tensor) and their index."""
    from safetensors.torch import save

    weights = {f"language_model.{name}": tensor for name, tensor in llama_weights(model.llama, image_id).items()}
    weights |= {f"vision_tower.vision_model.{name}": tensor for name, tensor in vision_weights(vision).items()}
    weights |= {f"multi_modal_projector.{name}": tensor for name, tensor in projector_weights(model).items()}
    shards, free = [[]], SHARD_SIZE
    for name, tensor in weights.items():
        if shards[-1] and tensor.nbytes > free:
            shards.append([])
            free = SHARD_SIZE
        shards[-1].append(name)
        free -= tensor.nbytes
    places = {}
    for i, names in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(names, name)
        with replacing(folder / name) as file:
            file.write(save({name: weights[name].contiguous() for name in names}, metadata={"format": "pt"}))
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


# --- settings


def special_ids(sp) -> dict[str, int]:
    return {"bos_token_id": sp.bos_id(), "eos_token_id": sp.eos_id(), "pad_token_id": sp.unk_id()}


def model_config(model: LLaVA, vision: VisionTransformer, sp, image_id: int) -> dict:
    """config.json: the architecture."""
    c, v = model.llama.config, vision.config
    dtype = str(model.llama.norm.weight.dtype).removeprefix("torch.")
    text = {name: getattr(c, field) for name, field in huggingface.LLAMA_FIELDS.items()} | special_ids(sp) | {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": max(c.vocab_size, image_id + 1),
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        "max_position_embeddings": 2048, "torch_dtype": dtype,
    }  # fmt: skip
    clip = huggingface.clip_config(**dataclasses.asdict(v)) | {
        "model_type": "clip_vision_model", "projection_dim": v.width, "torch_dtype": dtype,
    }  # fmt: skip
    return {
        "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "text_config": text,
        "vision_config": clip, "image_token_index": image_id, "image_seq_length": v.n_patches,
        "projector_hidden_act": "linear", "multimodal_projector_bias": model.projector.bias is not None,
        "vision_feature_layer": model.vision.feature_layer, "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False, "torch_dtype": dtype,
    }  # fmt: skip


def generation_config(sp, image_id: int) -> dict:
    """How `generate` ends: at a token, or, where <STOP> is several tokens, at a string (which needs `tokenizer=`)."""
    line = sp.encode(f"\n{STOP}", return_type="offset_mapping")
    stop = [id for id, (begin, _) in zip(line["ids"], line["offsets"]) if begin >= 1]  # `###` at the start of a line
    ends = {"eos_token_id": [sp.eos_id(), *stop]} if len(stop) == 1 else {"stop_strings": [f"\n{STOP}"]}
    return special_ids(sp) | ends | {"do_sample": False, "max_new_tokens": 512, "suppress_tokens": [image_id]}


def preprocessor_config(image_size: int) -> dict:
    """What `vision.preprocess` and `vision.normalize` do, as settings of CLIPImageProcessor."""
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "size": {"shortest_edge": image_size}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": MEAN, "image_std": STD,
    }  # fmt: skip


def processor_config(patch_size: int) -> dict:
    return {
        "processor_class": "LlavaProcessor", "patch_size": patch_size, "image_token": IMAGE,
        "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default",
    }  # fmt: skip


# --- text


def chat_template() -> str:
    constants = {"STOP": STOP, "IMAGE": IMAGE, "SYSTEM": SYSTEM}
    return "".join(f"{{%- set {name} = {value!r} -%}}\n" for name, value in constants.items()) + CHAT_TEMPLATE


def tokenizer_config(sp) -> dict:
    bos, eos, unk = (sp.id_to_piece(id) for id in (sp.bos_id(), sp.eos_id(), sp.unk_id()))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor", "bos_token": bos,
        "eos_token": eos, "unk_token": unk, "pad_token": unk, "padding_side": "left", "model_max_length": 2048,
        "add_bos_token": True, "clean_up_tokenization_spaces": False, "image_token": IMAGE,
    }  # fmt: skip


def tokenizer_json(sp, image_id: int) -> dict:
    """SentencePiece's BPE model in the format of `tokenizers`.

    Raises UserError if a special token is missing, or if it tokenizes one of PROBES differently from SentencePiece.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer

    proto = sentencepiece_model_pb2.ModelProto.FromString(sp.serialized_model_proto())
    pieces = proto.pieces
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    vocab = {piece.piece: id for id, piece in enumerate(pieces)}
    if IMAGE in vocab or min(sp.bos_id(), sp.eos_id(), sp.unk_id()) < 0:
        raise UserError(f"the run's tokenizer is not a LLaMA's: it has a piece {IMAGE}, or no <s>, </s> or <unk>")
    unk, bos, eos = (sp.id_to_piece(id) for id in (sp.unk_id(), sp.bos_id(), sp.eos_id()))
    special = {unk: sp.unk_id(), bos: sp.bos_id(), eos: sp.eos_id(), IMAGE: image_id}
    # SentencePiece never splits a user-defined piece: they are split off first and then found in the vocabulary.
    unsplit = sorted((p.piece for p in pieces if p.type == kinds.USER_DEFINED), key=len, reverse=True)
    split = {"type": "Split", "pattern": {"Regex": "|".join(map(re.escape, unsplit))}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": id, "content": token, "special": True, "normalized": False, "single_word": False, "lstrip": False,
             "rstrip": False}
            for token, id in special.items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": [  # of the texts between special tokens
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        ]},
        "pre_tokenizer": split if unsplit else None,
        "post_processor": start_with(bos, sp.bos_id()),
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": bool(unsplit),
                  "vocab": vocab, "merges": merges([p for p in pieces if p.type == kinds.NORMAL], vocab)},
    }  # fmt: skip
    theirs = Tokenizer.from_str(json.dumps(tokenizer))
    for text in PROBES:
        if theirs.encode(text, add_special_tokens=False).ids != sp.encode(text):
            raise UserError(f"`tokenizers` cannot reproduce the run's tokenizer: it splits {text!r} differently")
    return tokenizer


def merges(pieces: list, vocab: dict[str, int]) -> list[list[str]]:
    """All pairs of pieces that join to a piece, the best piece first, as SentencePiece joins them."""
    found = []
    for piece in sorted(pieces, key=lambda piece: -piece.score):
        pairs = [[piece.piece[:i], piece.piece[i:]] for i in range(1, len(piece.piece))]
        pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        found += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return found


def start_with(bos: str, bos_id: int) -> dict:
    """The post-processor that puts BOS before each text."""
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": id, "type_id": i}} for i, id in enumerate("AB"))
    return {"type": "TemplateProcessing", "single": [start, a], "pair": [start, a, start, b],
            "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}}  # fmt: skip


def main():
    parser = ArgumentParser(__doc__, prog="python -m tools.export")
    parser.add_argument("run", metavar="RUN", help="a finished run of train.py, of either stage")
    parser.add_argument("folder", metavar="FOLDER", help="the folder to write")
    args = parser.parse_args()
    export(args.run, args.folder)


if __name__ == "__main__":
    run_command(main)
