"""A finished LLaVA -> a run directory; a run directory -> a folder that Hugging Face `transformers` loads.

    python checkpoint.py import LLaVA-13b-v0 runs/llava-13b --vision ViT-L-14.pt
    python checkpoint.py export runs/chat FOLDER      # pip install safetensors tokenizers protobuf

What is exported, `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained` take as it is. The
names are those of checkpoint.py's tables, read from right to left. Three things have another form there: the projector
has two layers, so W is the first of them, the second changes nothing, and between them stands nothing; a picture's
positions hold a token `<image>`, for which the vocabulary grows by one row if it has none to spare; and the text is
tokenized by `tokenizers`, for which SentencePiece's pieces are written as merges.
"""

import argparse
import json
import os
import re
import shutil
from pathlib import Path

import torch

import checkpoint
from checkpoint import HF_CLIP, HF_CONFIG, HF_LLAMA
from conversation import IMAGE, STOP, SYSTEM, TEMPLATE, UserError, stop_ids
from data import SCIENCEQA_PROMPT
from model import LLaMA, LLaVA
from vision import MEAN, PREPROCESSING, STD, VisionTransformer

SHARD = 2 * 10**9  # bytes of a file of weights, which is put together in memory
NEEDS = "pip install safetensors tokenizers protobuf"
PROBES = (  # texts that the tokenizer for transformers must cut as SentencePiece does
    f"{SYSTEM}\n\n{STOP} Human: ",
    "\nWhat is at the top-left?\n### Assistant:",
    " It's 12,345 km: Zürich → 東京 🙂.\t \n\n###",
    "  two  spaces ####  ##\n",
    "a",
)

# conversation.render for transformers. A message is text, or a list of {"type": "image"} and {"type": "text", "text"},
# each on a line of its own. `plain` spaces out runs of three # or more: ##### -> # # # # #. What it cannot do: there, a
# message that spells <image>, <s> or </s> holds that token; here, the letters.
CHAT_TEMPLATE = """\
{%- macro plain(text) -%}
    {%- set text = text | replace('###', '#\\0#\\0#') | replace('\\0##', '\\0#\\0#') -%}
    {{- text | replace('\\0##', '\\0#\\0#') | replace('\\0', ' ') -}}
{%- endmacro -%}
{%- macro said(content) -%}
    {%- if content is string -%}
        {{- plain(content) -}}
    {%- else -%}
        {%- for part in content -%}
            {{- ('' if loop.first else '\\n') -}}
            {{- IMAGE if part.type == 'image' else plain(part.text) -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0].role == 'system' -%}
    {{- said(messages[0].content) -}}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {{- SYSTEM -}}
{%- endif -%}
{{- '\\n\\n' + STOP -}}
{%- for message in messages -%}
    {{- (' Human: ' if message.role == 'user' else ' Assistant: ') + said(message.content) + '\\n' + STOP -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- ' Assistant:' -}}
{%- endif -%}
"""


def import_llava(llava: str | Path, run: str | Path, base: str | Path | None = None, vision: str | Path | None = None,
                 projector: str | Path | None = None):  # fmt: skip
    """Writes a finished LLaVA as a run of stage 2. The paths: see `main`. Raises UserError if one is missing."""
    folder, run, kind = Path(llava), Path(run), checkpoint.kind_of(llava)
    if run.exists() and (not run.is_dir() or any(path.name[0] != "." and path != run / "vision.pth"
                                                 for path in run.iterdir())):  # fmt: skip
        raise UserError(f"{run}: is there already; name a new run directory")
    if (folder / "projector.pth").is_file():
        raise UserError(f"{folder}: is a run directory already; chat.py --model takes it as it is")
    if kind in (checkpoint.RAW, checkpoint.HF) and not projector:
        raise UserError(f"{folder}: is {kind}, so W is missing: give its mm_projector.bin by --projector")
    if kind != checkpoint.HF_LLAVA and not vision:
        raise UserError(f"{folder}: is {kind}, so the ViT is missing: give OpenAI's ViT-L-14.pt or its Hugging Face "
                        "folder by --vision")  # fmt: skip
    print(f"{folder}: {checkpoint.describe(folder)}")
    layer, W = checkpoint.feature_layer_of(folder), checkpoint.load_projector(projector or folder)
    llama = checkpoint.load_llama(folder, None, base)
    model = checkpoint.build(llama, checkpoint.load_vision(vision or folder, layer, None), W)
    checkpoint.open_tokenizer(folder / "tokenizer.model", llama)
    if not vision:  # among the LLaMA's weights, all of which a run would check each time that it is loaded
        whole, vision = checkpoint.load_vision(folder, -1, None), run / "vision.pth"
        checkpoint.save_tensors(vision, {f"visual.{name}": p.detach() for name, p in whole.named_parameters()})
    config = dict(
        settings={"task": "chat"}, template=TEMPLATE, prompt=SCIENCEQA_PROMPT, feature_layer=layer,
        precision="fp32" if llama.norm.weight.dtype == torch.float32 else "bf16", preprocessing=PREPROCESSING,
        torch=torch.__version__, vision=str(vision), llama=str(folder),
    )  # fmt: skip
    checkpoint.save_run(run, model, config, folder / "tokenizer.model", 2)
    print(f"{run}: written. It will be asked in the template {TEMPLATE}, that of LLaVA's first release; a later model "
          f"was trained in another.\npython chat.py --model {run} --image PICTURE")  # fmt: skip


def export(run: str | Path, folder: str | Path):
    """Writes the run as `transformers` reads it. Raises UserError if the folder is there or a package is not."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder}: is there already; name a new folder")
    try:
        import safetensors.torch  # noqa: F401  (better told now than after the loading)
        import tokenizers  # noqa: F401
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401
    except (ImportError, TypeError):  # protobuf's own complaint about an old version is a TypeError
        raise UserError(f"exporting needs other packages: {NEEDS}") from None
    model, sp, config = checkpoint.load_run(run, dtype=None)
    if config.get("template") != TEMPLATE:
        raise UserError(f"{run}: was trained with the template {config.get('template')!r:.80}, expected {TEMPLATE!r}")
    vision = checkpoint.read_json(Path(run) / "vision.json", dict)
    # transformers builds every block, even those above the features. What it has after them, LLaVA never reads.
    whole = checkpoint.load_vision(vision["path"], -1, None)
    image_id = sp.vocab_size()  # the first that no text has, which `tokenizers` gives to a token added to these
    files = {"tokenizer.json": for_tokenizers(sp, image_id)}
    files |= configs(model, whole, vision["feature_layer"], sp, image_id)
    new = folder.with_name(f".{folder.name}.new")  # the folder appears whole or not at all
    shutil.rmtree(new, ignore_errors=True)  # of an export that was killed
    try:
        write_weights(model, whole, image_id, new)
        for name, content in files.items():
            checkpoint.write_json(new / name, content)
        for name, data in {"chat_template.jinja": chat_template().encode(),
                           "tokenizer.model": sp.serialized_model_proto()}.items():  # fmt: skip
            with checkpoint.replacing(new / name) as file:
                file.write(data)
        os.rename(new, folder)
    except OSError as error:
        raise checkpoint.unwritten(folder, error) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    print(f"{folder}: written; LlavaForConditionalGeneration.from_pretrained and AutoProcessor.from_pretrained take it")


def chat_template() -> str:
    constants = dict(STOP=STOP, IMAGE=IMAGE, SYSTEM=SYSTEM)
    return "".join(f"{{%- set {name} = {value!r} -%}}\n" for name, value in constants.items()) + CHAT_TEMPLATE


# --- weights


def old_names(weights: dict[str, torch.Tensor], table: dict) -> dict[str, torch.Tensor]:
    """checkpoint.translate, from right to left: a tensor that several names on the left share is cut into as many."""
    found = {}
    for name, tensor in weights.items():
        olds = [was for old, new in table.items() if new and (was := checkpoint.renamed(name, new, old))]
        found |= dict(zip(olds, tensor.chunk(len(olds)), strict=True))
    return found


def llama_weights(llama: LLaMA, image_id: int) -> dict[str, torch.Tensor]:
    """By their names in transformers; with a row more, that of `<image>`, unless there is one at image_id."""
    c, weights = llama.config, {}
    for name, weight in llama.named_parameters():
        weight = weight.detach()
        if name.endswith((".wq.weight", ".wk.weight")):  # adjacent pairs -> halves: see checkpoint.load_hf_llama
            pairs = weight.reshape(-1, c.head_dim // 2, 2, c.dim)  # (heads, pairs, first or second of the pair, dim)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        if name == "tok_embeddings.weight" and image_id == c.vocab_size:
            weight = torch.cat([weight, torch.zeros_like(weight[:1])])  # never read: the picture stands there
        if name == "output.weight" and image_id == c.vocab_size:
            weight = torch.cat([weight, weight[:1]])  # never said: no likelier than <unk>, which comes first
        weights[name] = weight
    return old_names(weights, HF_LLAMA)


def vision_weights(vision: VisionTransformer) -> dict[str, torch.Tensor]:
    named = old_names({name: weight.detach() for name, weight in vision.named_parameters()}, HF_CLIP)
    width, like = vision.config.width, vision.ln_pre.weight
    after = {"weight": torch.ones(width, dtype=like.dtype), "bias": torch.zeros(width, dtype=like.dtype)}
    return named | {f"post_layernorm.{name}": weight for name, weight in after.items()}


def write_weights(model: LLaVA, vision: VisionTransformer, image_id: int, folder: Path):
    """model.safetensors, or parts of SHARD bytes with an index."""
    from safetensors.torch import save

    dim = model.llama.config.dim
    projector = {f"linear_1.{name}": weight.detach() for name, weight in model.projector.named_parameters()}
    projector["linear_2.weight"] = torch.eye(dim)
    if "linear_1.bias" in projector:
        projector["linear_2.bias"] = torch.zeros(dim)
    weights = {f"language_model.{name}": weight for name, weight in llama_weights(model.llama, image_id).items()}
    weights |= {f"vision_tower.vision_model.{name}": weight for name, weight in vision_weights(vision).items()}
    weights |= {f"multi_modal_projector.{name}": weight for name, weight in projector.items()}
    shards, room = [[]], SHARD
    for name, weight in weights.items():
        if shards[-1] and weight.nbytes > room:
            shards, room = [*shards, []], SHARD
        shards[-1].append(name)
        room -= weight.nbytes
    places = {}
    for i, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        places |= dict.fromkeys(names, file)
        with checkpoint.replacing(folder / file) as out:
            out.write(save({name: weights[name].contiguous() for name in names}, metadata={"format": "pt"}))
    if len(shards) > 1:
        total = sum(weight.nbytes for weight in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        checkpoint.write_json(folder / "model.safetensors.index.json", index)


# --- configuration


def configs(model: LLaVA, vision: VisionTransformer, feature_layer: int, sp, image_id: int) -> dict[str, dict]:
    """The JSON files beside the weights, by name."""
    c, v, stop = model.llama.config, vision.config, stop_ids(sp)
    llama = {theirs: getattr(c, ours) for theirs, ours in HF_CONFIG.items()}
    dtype = str(model.llama.norm.weight.dtype).removeprefix("torch.")
    bos, eos, unk = (sp.id_to_piece(id) for id in (sp.bos_id(), sp.eos_id(), sp.unk_id()))
    ids = dict(bos_token_id=sp.bos_id(), eos_token_id=sp.eos_id(), pad_token_id=sp.unk_id())
    rows = max(c.vocab_size, image_id + 1)
    text = llama | ids | dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=rows,
                              hidden_act="silu", attention_bias=False, mlp_bias=False, tie_word_embeddings=False,
                              max_position_embeddings=2048, torch_dtype=dtype)  # fmt: skip
    clip = dict(model_type="clip_vision_model", hidden_size=v.width, intermediate_size=4 * v.width,
                num_hidden_layers=v.layers, num_attention_heads=v.heads, image_size=v.image_size,
                patch_size=v.patch_size, hidden_act="quick_gelu", layer_norm_eps=1e-5, projection_dim=v.width,
                torch_dtype=dtype)  # fmt: skip
    # generate() stops at a token; where <STOP> is several, at a string, for which it needs `tokenizer=`.
    stops = {"eos_token_id": [sp.eos_id(), *stop]} if len(stop) == 1 else {"stop_strings": [f"\n{STOP}"]}
    size, steps = v.image_size, dict(do_resize=True, do_center_crop=True, do_rescale=True, do_normalize=True)
    pictures = steps | dict(image_processor_type="CLIPImageProcessor", do_convert_rgb=True, resample=3,
                            size={"shortest_edge": size}, crop_size={"height": size, "width": size},
                            rescale_factor=1 / 255, image_mean=MEAN, image_std=STD)  # fmt: skip
    return {
        "config.json": dict(
            model_type="llava", architectures=["LlavaForConditionalGeneration"], text_config=text, vision_config=clip,
            image_token_index=image_id, image_seq_length=v.n_patches, projector_hidden_act="linear",
            multimodal_projector_bias=model.projector.bias is not None, vision_feature_layer=feature_layer,
            vision_feature_select_strategy="default", tie_word_embeddings=False, torch_dtype=dtype,
        ),
        "generation_config.json": ids | stops | dict(do_sample=False, max_new_tokens=512, suppress_tokens=[image_id]),
        "preprocessor_config.json": pictures,
        "processor_config.json": dict(
            processor_class="LlavaProcessor", patch_size=v.patch_size, image_token=IMAGE,
            num_additional_image_tokens=1, vision_feature_select_strategy="default",
        ),
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast", processor_class="LlavaProcessor", bos_token=bos, eos_token=eos,
            unk_token=unk, pad_token=unk, padding_side="left", model_max_length=2048, add_bos_token=True,
            clean_up_tokenization_spaces=False, image_token=IMAGE,
        ),
    }  # fmt: skip


def for_tokenizers(sp, image_id: int) -> dict:
    """tokenizer.json. SentencePiece joins the two neighbours whose joint piece scores best: merges, in that order.

    Raises UserError if the result cuts any of PROBES otherwise than SentencePiece.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer

    proto = sentencepiece_model_pb2.ModelProto.FromString(sp.serialized_model_proto())
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    vocab = {piece.piece: id for id, piece in enumerate(proto.pieces)}
    if IMAGE in vocab or min(sp.bos_id(), sp.eos_id(), sp.unk_id()) < 0:
        raise UserError(f"the run's tokenizer has a piece {IMAGE}, or no <s>, </s> or <unk>: it is no LLaMA's")
    merges: list[tuple[str, str]] = []
    for piece in sorted(proto.pieces, key=lambda piece: -piece.score):
        if piece.type == kind.NORMAL:
            pairs = [(piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece))]
            pairs = [(left, right) for left, right in pairs if left in vocab and right in vocab]
            merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    uncut = sorted((p.piece for p in proto.pieces if p.type == kind.USER_DEFINED), key=len, reverse=True)
    split = {"type": "Split", "pattern": {"Regex": "|".join(map(re.escape, uncut))}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    unk, bos, eos = (sp.id_to_piece(id) for id in (sp.unk_id(), sp.bos_id(), sp.eos_id()))
    special = {unk: sp.unk_id(), bos: sp.bos_id(), eos: sp.eos_id(), IMAGE: image_id}
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": id, "type_id": i}} for i, id in enumerate("AB"))
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            dict(id=id, content=token, special=True, normalized=False, single_word=False, lstrip=False, rstrip=False)
            for token, id in special.items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": [  # of each text between special tokens
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ]},
        # What SentencePiece never cuts (user-defined pieces) is split off and, being in the vocabulary, left whole.
        "pre_tokenizer": split if uncut else None,
        "post_processor": {"type": "TemplateProcessing", "single": [start, a], "pair": [start, a, start, b],
                           "special_tokens": {bos: {"id": bos, "ids": [sp.bos_id()], "tokens": [bos]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {"type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": bool(uncut),
                  "vocab": vocab, "merges": [list(pair) for pair in merges]},
    }  # fmt: skip
    theirs = Tokenizer.from_str(json.dumps(tokenizer))
    for text in PROBES:
        if theirs.encode(text, add_special_tokens=False).ids != sp.encode(text):
            raise UserError(f"the run's tokenizer cannot be written for transformers: it cuts {text!r} otherwise")
    return tokenizer


# --- the command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="a finished LLaVA -> a run directory").add_argument
    add("llava", metavar="LLAVA", help="its folder: as originally released, of transformers, or a LLaMA's")
    add("run", metavar="RUN", help="the run directory to make: for chat.py, eval_scienceqa.py, train.py --init-from")
    add("--llama-base", metavar="DIR", help="the LLaMA that the folder holds deltas over, if it does")
    add("--vision", metavar="PATH", help="CLIP: OpenAI's ViT-L-14.pt or a Hugging Face folder (default: the LLaVA's)")
    add("--projector", metavar="FILE", help="mm_projector.bin or projector.pth (default: the LLaVA's)")
    add = commands.add_parser("export", help="a run directory -> a folder that transformers loads").add_argument
    add("run", metavar="RUN", help="a finished run of train.py, of either stage")
    add("folder", metavar="FOLDER", help="the folder to make")
    a = parser.parse_args()
    if a.command == "import":
        import_llava(a.llava, a.run, a.llama_base, a.vision, a.projector)
    else:
        export(a.run, a.folder)
