"""What several test files share: tiny seeded models, their twins in `transformers`, a tiny tokenizer, flat batches."""

import io
import signal
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from model import LLaMA, LLaMAConfig, LLaVA, Projection  # noqa: E402
from vision import VisionConfig, VisionTransformer  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"  # outside the repository: what needs it is skipped without it
VIT = VisionConfig(image_size=42, patch_size=14, width=128, layers=3)  # 2 heads, 9 patches
VOCAB = 97
torch.set_num_threads(1)  # the models here are too small for more
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # begun in the background of a script: what is started here would
    signal.signal(signal.SIGINT, signal.default_int_handler)  # be deaf to Ctrl-C


@pytest.fixture(scope="session")
def llama_tokenizer():
    """The real tokenizer of LLaMA."""
    path = SHARED / "llama_tokenizer.model"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A SentencePiece model with LLaMA's settings and byte fallback, of few pieces."""
    model = io.BytesIO()
    words = "A chat between a curious human and an assistant. ### Human: What? ### Assistant: A cat on a mat. ## #"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words] * 20), model_writer=model, vocab_size=340, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        split_digits=True, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights for which every part matters: matrices that keep the scale, gains around 1, biases that are seen."""
    dice = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=dice)
            gain = p.ndim == 1 and name.endswith("weight")
            p.copy_(1 + 0.3 * noise if gain else 0.3 * noise if p.ndim == 1 else 1.5 * noise / p[0].numel() ** 0.5)
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

LLAMA_LAYER = {  # a name in transformers -> LLaMA's own
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def in_transformers(llama: LLaMA, of=lambda p: p) -> dict[str, torch.Tensor]:
    """LLaMA's weights, or what `of` makes of each (its gradient), by their names and row order in transformers."""
    own = {name: of(p) for name, p in llama.named_parameters()}
    named = {"embed_tokens.weight": own["tok_embeddings.weight"], "norm.weight": own["norm.weight"]}
    for i in range(llama.config.n_layers):
        for theirs, ours in LLAMA_LAYER.items():
            weight = own[f"layers.{i}.{ours}.weight"]
            if ours in ("attention.wq", "attention.wk"):  # RoPE there turns halves, not adjacent pairs
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
    """Copies the weights in; no name may be unknown. Returns the names that were not among them."""
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
    """Its blocks above the feature layer are random: nothing may depend on them."""
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
    inner = twin.vision_model if hasattr(twin, "vision_model") else twin  # transformers 5 dropped the level
    load(inner, named)
    return twin


def llava_twin(llava: LLaVA, longest: int = 256) -> transformers.LlavaForConditionalGeneration:
    """Pictures stand at the last id there. Its projector is replaced by one linear layer, W."""
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
    """Relative, in the Euclidean norm."""
    return ((ours - reference).norm() / reference.norm()).item()


# --- samples


def sample(length: int, picture_at: int | None, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (T,) with 9 patches from `picture_at`, and green (T,): two runs, the second to the end."""
    dice = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB - 1, (length,), generator=dice)
    green = torch.zeros(length, dtype=torch.bool)
    green[-4:] = green[-9:-6] = True
    if picture_at is not None:
        ids = torch.cat([ids[:picture_at], torch.full((VIT.n_patches,), -1), ids[picture_at:]])
        green = torch.cat([green[:picture_at], torch.zeros(VIT.n_patches, dtype=torch.bool), green[picture_at:]])
    ids[0] = 1
    return ids, green


def samples(n: int = 4) -> list:
    """n samples (ids, green, pixels (0 or 1, 3, S, S)) of different lengths; every fourth has no picture."""
    dice = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 256, (n, 1, 3, VIT.image_size, VIT.image_size), dtype=torch.uint8, generator=dice)
    where = [3, 9, None, 1]
    return [sample(12 + 5 * i % 17, where[i % 4], i) + (pixels[i][: where[i % 4] is not None],) for i in range(n)]


def flat(samples: list) -> dict:
    """The samples as one flat batch, by the names of `LLaVA.forward`."""
    ids, green, pixels = zip(*samples)
    borders = torch.tensor([0] + [len(i) for i in ids]).cumsum(0).int()
    return dict(ids=torch.cat(ids), green=torch.cat(green), cu_seqlens=borders, pixels=torch.cat(pixels))
