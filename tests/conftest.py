"""Shared by the test files: tiny seeded models, their twins in `transformers`, a tiny tokenizer, pictures, samples."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # more threads slow down models of this size; several tests run at once
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # hides the GPUs from torch: the tests compare results of the CPU

import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common import ArgumentParser  # noqa: E402
from conversation import IMAGE_ID  # noqa: E402
from model import LLaMA, LLaMAConfig, LLaVA, Projection  # noqa: E402
from vision import VisionConfig, VisionTransformer  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"  # outside the repository; tests that read it are skipped if it is absent
VIT = VisionConfig(image_size=42, patch_size=14, width=128, layers=3)  # 2 heads, 9 patches
VOCAB = 97
torch.set_num_threads(1)
# A script's background job ignores SIGINT, and so would the processes that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


FUNCTIONS = {name: getattr(torch.nn.functional, name) for name in ("linear", "scaled_dot_product_attention")}


@pytest.fixture(autouse=True)
def functions_of_pytorch():
    """Each test starts with PyTorch's own functions: tools/fast_cpu.py replaces them when a command runs."""
    for name, function in FUNCTIONS.items():
        setattr(torch.nn.functional, name, function)


@pytest.fixture(scope="session")
def llama_tokenizer():
    """The real tokenizer of LLaMA."""
    path = SHARED / "llama_tokenizer.model"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A SentencePiece model of 340 pieces with LLaMA's settings, byte fallback included."""
    model = io.BytesIO()
    words = "A chat between a curious human and an assistant. ### Human: What? ### Assistant: A cat on a mat. ## #"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 20), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        split_digits=True, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture
def talker(run):
    """A Chat with the run of the test file."""
    return open_chat(run)


def open_chat(run, *flags):
    import chat

    parser = ArgumentParser()
    chat.add_arguments(parser)
    return chat.open_chat(parser.parse_args(["--model", str(run), "--max-new-tokens", "20", *flags]))


@pytest.fixture
def picture(tmp_path):
    Image.linear_gradient("L").resize((50, 40)).save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


def write_quiz(folder: Path, change: Callable[[dict], object], splits: dict, wide: Sequence[int] = ()) -> Path:
    """A ScienceQA folder of 26 problems of all categories, ids from 100; every third has a picture.

    change: called with the problems {id: problem} before they are written. splits: others than `test`, which has all.
    wide: the numbers of the problems whose picture is ten times as wide as high.
    """
    problems = {}
    for i in range(26):
        id = str(100 + i)
        problems[id] = dict(
            question="Which thing is at the left?", hint="blue is red" if i % 2 else "", answer=i % 2,
            choices=["red", "blue", "it lives here"][: 2 + i % 2], image="image.png" if i % 3 == 0 else None,
            split="test", grade=f"grade{i % 12 + 1}", lecture="Things have a colour.", solution="It is so.",
            subject=["natural science", "social science", "language science"][i % 3])  # fmt: skip
        if i % 3 == 0:
            (folder / f"images/test/{id}").mkdir(parents=True)
            picture = Image.linear_gradient("L").rotate(14 * i).resize((400 if i in wide else 40, 40))
            picture.save(folder / f"images/test/{id}/image.png")
    change(problems)
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": list(problems)} | splits))
    return folder


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fills a module so that an error in any parameter changes the output, and returns it.

    Matrices keep the scale of their input, gains lie around 1, and biases differ from 0.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            if p.ndim > 1:
                p.copy_(1.5 * noise / p[0].numel() ** 0.5)
            elif name.endswith("weight"):
                p.copy_(1 + 0.3 * noise)
            else:
                p.copy_(0.3 * noise)
    return module


def tiny_llama(n_kv_heads: int = 2, seed: int = 0) -> LLaMA:
    sizes = dict(dim=32, n_layers=2, n_heads=4, ffn_dim=56, vocab_size=VOCAB, norm_eps=1e-5, rope_theta=100.0)
    return randomize(LLaMA(LLaMAConfig(n_kv_heads=n_kv_heads, **sizes)), seed)


def tiny_vit(feature_layer: int = -2, seed: int = 0) -> VisionTransformer:
    return randomize(VisionTransformer(VIT, feature_layer), seed)


def tiny_llava(n_kv_heads: int = 2, seed: int = 0, stage: int = 2) -> LLaVA:
    llava = LLaVA(tiny_llama(n_kv_heads, seed), tiny_vit(seed=seed), randomize(Projection(VIT.width, 32), seed))
    llava.set_trainable(stage)
    return llava


# --- the same models in transformers

LLAMA_LAYER = {  # name in transformers -> name in LLaMA's release
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def in_transformers(llama: LLaMA, of=lambda p: p) -> dict[str, torch.Tensor]:
    """LLaMA's weights under the names and in the row order of transformers.

    of: maps each parameter to the tensor to return, for example to its gradient.
    """
    own = {name: of(p) for name, p in llama.named_parameters()}
    named = {"embed_tokens.weight": own["tok_embeddings.weight"], "norm.weight": own["norm.weight"]}
    for i in range(llama.config.n_layers):
        for theirs, ours in LLAMA_LAYER.items():
            weight = own[f"layers.{i}.{ours}.weight"]
            if ours in ("attention.wq", "attention.wk"):  # RoPE there turns halves, not pairs
                weight = weight.unflatten(0, (-1, llama.config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
            named[f"layers.{i}.{theirs}.weight"] = weight
    return named | {"lm_head.weight": own["output.weight"]}


def llama_twin_config(llama: LLaMA, longest: int = 256) -> transformers.LlamaConfig:
    c = llama.config
    return transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, intermediate_size=c.ffn_dim, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.norm_eps,
        max_position_embeddings=longest, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip


def load(module: torch.nn.Module, weights: dict) -> list[str]:
    """Copies weights into a module that has a parameter for each. Returns the names of its other parameters."""
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    missing, unexpected = module.load_state_dict(copies, strict=False)
    assert not unexpected, unexpected
    return missing


def llama_twin(llama: LLaMA) -> transformers.LlamaForCausalLM:
    twin = transformers.LlamaForCausalLM(llama_twin_config(llama)).eval()
    weights = in_transformers(llama)
    head = {"lm_head.weight": weights.pop("lm_head.weight")}
    assert not load(twin, {f"model.{name}": weight for name, weight in weights.items()} | head)
    return twin


def vit_twin(vit: VisionTransformer) -> transformers.CLIPVisionModel:
    """The twin has all blocks. Those above the feature layer are random: the features do not depend on them."""
    c = vit.config
    twin = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=c.width, intermediate_size=4 * c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        image_size=c.image_size, patch_size=c.patch_size, hidden_act="quick_gelu", projection_dim=c.width,
    )).eval()  # fmt: skip
    own = dict(vit.named_parameters())
    named = {
        "embeddings.class_embedding": own["class_embedding"], "embeddings.patch_embedding.weight": own["conv1.weight"],
        "embeddings.position_embedding.weight": own["positional_embedding"],
        "pre_layrnorm.weight": own["ln_pre.weight"], "pre_layrnorm.bias": own["ln_pre.bias"],
    }  # fmt: skip
    blocks = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
              "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
    for i in range(len(vit.transformer.resblocks)):
        for kind in ("weight", "bias"):
            block = f"transformer.resblocks.{i}."
            for theirs, ours in blocks.items():
                named[f"encoder.layers.{i}.{theirs}.{kind}"] = own[f"{block}{ours}.{kind}"]
            for part, weight in zip("qkv", own[f"{block}attn.in_proj_{kind}"].chunk(3)):
                named[f"encoder.layers.{i}.self_attn.{part}_proj.{kind}"] = weight
    inner = twin.vision_model if hasattr(twin, "vision_model") else twin  # absent in transformers 5
    load(inner, named)
    return twin


def llava_twin(llava: LLaVA, longest: int = 256) -> transformers.LlavaForConditionalGeneration:
    """The twin has one linear layer, W, as its projector. The last id of the vocabulary marks a patch there."""
    vision, text = vit_twin(llava.vision), llama_twin_config(llava.llama, longest)
    twin = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vision.config, text_config=text, image_token_id=text.vocab_size - 1,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )).eval()  # fmt: skip
    twin.model.vision_tower = vision
    twin.model.multi_modal_projector = torch.nn.Linear(llava.vision.config.width, text.hidden_size, bias=False)
    load(twin.model.multi_modal_projector, {"weight": llava.projector.weight})
    weights = in_transformers(llava.llama)
    load(twin.lm_head, {"weight": weights.pop("lm_head.weight")})
    assert not load(twin.model.language_model, weights)
    return twin


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The relative error in the Euclidean norm."""
    return ((ours - reference).norm() / reference.norm()).item()


# --- files


def write(path, value):
    """Writes text, or any other value as JSON."""
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


SCIENCEQA = {
    "1": dict(question="Which?  Say.", choices=["no", "yes"], answer=1, hint="", image="image.png", split="test",
              lecture="L1\nL2", solution="S."),
    "2": dict(question="Q", choices=["a", "b"], answer=0, hint="H", image=None, split="test", lecture="", solution=""),
}  # fmt: skip


@pytest.fixture
def scienceqa(tmp_path):
    """A ScienceQA folder of two problems, the first with a picture."""
    write(tmp_path / "problems.json", SCIENCEQA)
    write(tmp_path / "pid_splits.json", {"test": ["2", "1"], "train": []})
    (tmp_path / "images/test/1").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "images/test/1/image.png")
    return tmp_path


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """A colour picture with smooth shades, hard edges and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    picture = np.empty((height, width, 3))
    for channel in range(3):
        waves = sum(np.sin(rng.normal(0, 2.0**k) * x + rng.normal(0, 2.0**k) * y + k) / k for k in range(1, 8))
        picture[..., channel] = 128 + 60 * waves + rng.normal(0, 8, (height, width))
    for _ in range(6):
        left, top, size = rng.uniform(0, 1, 3)
        inside = (abs(x - left) < size / 6) & (abs(y - top) < size / 6)
        picture[inside] = rng.uniform(0, 255, 3)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **settings)
    return file.getvalue()


# --- samples


def sample(length: int, picture_at: int | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (T,) with 9 patches from `picture_at`, and green (T,): two runs, the second up to the end."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB - 1, (length,), generator=rng)
    green = torch.zeros(length, dtype=torch.bool)
    green[-4:] = green[-9:-6] = True
    if picture_at is not None:
        ids = torch.cat([ids[:picture_at], torch.full((VIT.n_patches,), IMAGE_ID), ids[picture_at:]])
        green = torch.cat([green[:picture_at], torch.zeros(VIT.n_patches, dtype=torch.bool), green[picture_at:]])
    ids[0] = 1
    return ids, green


def samples(n: int = 4) -> list:
    """n samples (ids, green, pixels (0 or 1, 3, size, size)) of different lengths; every fourth has no picture."""
    rng = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 256, (n, 1, 3, VIT.image_size, VIT.image_size), dtype=torch.uint8, generator=rng)
    places = [3, 9, None, 1]
    batch = []
    for i in range(n):
        picture_at = places[i % 4]
        ids, green = sample(12 + 5 * i % 17, picture_at, i)
        batch.append((ids, green, pixels[i, :0] if picture_at is None else pixels[i]))
    return batch


def stream(samples: list, system: Sequence[int] = ()) -> tuple[torch.Tensor, torch.Tensor, list[int], torch.Tensor]:
    """The arguments of `LLaVA.forward` for samples (ids, green, pixels) behind a system message of these ids."""
    ids, green, pixels = zip(*samples)
    system_ids = torch.tensor(system, dtype=torch.long)
    borders = list(accumulate([len(system), *map(len, ids)]))
    target = len(system) + torch.cat(green).nonzero().squeeze(1)
    return torch.cat([system_ids, *ids]), target, borders, torch.cat(pixels)


def generated(llava: LLaVA, *batch, stop: Sequence[list[int]] = (), **settings) -> list[list[int]]:
    """What `LLaVA.generate` answers, without the sequence of `stop` at the end of each answer."""

    def length_of_stop(ids: list[int]) -> int:
        return next((len(tokens) for tokens in stop if ids[-len(tokens) :] == tokens), 0)

    *_, found = llava.generate(*batch, lambda ids: length_of_stop(ids) > 0, **settings)
    return [ids[: len(ids) - length_of_stop(ids)] for ids in found]
