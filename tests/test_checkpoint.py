"""checkpoint.py: published weights against transformers, strict names and shapes, saved states, run directories."""

import contextlib
import copy
import io
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import VIT, error, llama_twin, randomize, tiny_vit, vit_twin
from test_torchscript import write_torchscript

import checkpoint
from checkpoint import load_llama, load_projector, load_run, load_vision, save_llama, save_run
from common import UserError
from model import LLaMA, LLaMAConfig, LLaVA, Projection, StreamAttention, position_ids

VOCAB = 96  # rows that two or four model-parallel files share equally
IDS = torch.arange(3, 20)
CPU = torch.device("cpu")


@contextlib.contextmanager
def refused(path, *words):
    """Expects a UserError in one printable line that contains the path and the words. Yields the caught error."""
    with pytest.raises(UserError) as info:
        yield info
    message = str(info.value)
    assert message.isprintable()
    assert all(word in message for word in (str(path), *words)), message


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Whether two modules have the same parameters, bit for bit and of the same dtypes."""
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# --- LLaMA in its formats


def tiny_llama(n_kv_heads: int = 2) -> LLaMA:
    sizes = dict(dim=32, n_layers=2, n_heads=4, ffn_dim=56, vocab_size=VOCAB, norm_eps=1e-5, rope_theta=100.0)
    return randomize(LLaMA(LLaMAConfig(n_kv_heads=n_kv_heads, **sizes)), 0)


@torch.no_grad()
def logits(llama: LLaMA) -> torch.Tensor:
    borders = [0, len(IDS)]
    return llama.logits(llama(llama.tok_embeddings(IDS), position_ids(borders), StreamAttention(borders)))


@torch.no_grad()
def their_logits(llama: LLaMA) -> torch.Tensor:
    return llama_twin(llama)(IDS[None]).logits[0]


def write_raw(llama: LLaMA, folder: Path, n_shards: int = 1, **changes) -> Path:
    """Meta's folder, its matrices sliced as the parallel layers of fairscale slice them. changes: of params.json."""
    c = llama.config
    shards = [{"rope.freqs": torch.ones(c.head_dim // 2)} for _ in range(n_shards)]
    for name, weight in weights_of(llama).items():
        if weight.dim() == 1:
            pieces = [weight] * n_shards
        elif re.search("tok_embeddings|wo|w2", name):  # ParallelEmbedding and RowParallelLinear
            pieces = weight.chunk(n_shards, dim=1)
        else:  # ColumnParallelLinear
            pieces = weight.chunk(n_shards, dim=0)
        for shard, piece in zip(shards, pieces):
            shard[name] = piece.clone()
    params = {"dim": c.dim, "n_layers": c.n_layers, "n_heads": c.n_heads, "multiple_of": 8, "ffn_dim_multiplier": 0.66,
              "norm_eps": c.norm_eps, "vocab_size": c.vocab_size, "rope_theta": c.rope_theta}  # fmt: skip
    if c.n_kv_heads != c.n_heads:
        params["n_kv_heads"] = c.n_kv_heads
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params | changes))
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    return folder


def write_huggingface(llama: LLaMA, folder: Path, kind: str = "bin") -> Path:
    """A folder of transformers. kind: "bin", "bin index" or "safetensors index"."""
    twin = llama_twin(llama)
    if kind == "safetensors index":
        twin.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        return folder
    twin.config.save_pretrained(folder)
    weights = twin.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in files if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def check_llama(folder: Path, llama: LLaMA):
    """Asserts that a folder loads as `llama`, with the logits of transformers."""
    loaded = load_llama(folder)
    assert error(logits(loaded), their_logits(llama)) < 1e-5
    assert equal(loaded, llama)
    assert loaded.config == llama.config
    assert all(p.requires_grad and p.device == CPU for p in loaded.parameters())


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["bin", "bin index", "safetensors index"])
def test_every_hugging_face_folder_gives_the_logits_of_transformers(tmp_path, n_kv_heads, kind):
    llama = tiny_llama(n_kv_heads)
    check_llama(write_huggingface(llama, tmp_path / kind, kind), llama)


def test_tied_embeddings_become_two_matrices(tmp_path):
    llama = tiny_llama()
    with torch.no_grad():
        llama.output.weight.copy_(llama.tok_embeddings.weight)
    twin = llama_twin(llama)
    twin.config.tie_word_embeddings = True
    twin.config.save_pretrained(tmp_path)
    both = twin.state_dict()
    one = {name: weight for name, weight in both.items() if name != "lm_head.weight"}
    for weights in (one, both):
        torch.save(weights, tmp_path / "pytorch_model.bin")
        loaded = load_llama(tmp_path)
        assert error(logits(loaded), their_logits(llama)) < 1e-5
        with torch.no_grad():
            loaded.output.weight.zero_()
        assert torch.equal(loaded.tok_embeddings.weight, llama.tok_embeddings.weight)
    torch.save(both | {"lm_head.weight": torch.ones(VOCAB, 32)}, tmp_path / "pytorch_model.bin")
    with refused(tmp_path, "tie_word_embeddings", "lm_head.weight"):
        load_llama(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_shards", [1, 2])
def test_dtype(tmp_path, dtype, n_shards):
    half = tiny_llama().half()
    folder = write_raw(half, tmp_path / "raw", n_shards)
    assert equal(load_llama(folder, dtype), copy.deepcopy(half).to(dtype))
    assert equal(load_llama(folder, None), half)


def test_pytorchs_format_before_1_6(tmp_path):
    llama = tiny_llama()
    folder = write_raw(llama, tmp_path / "raw")
    weights = torch.load(folder / "consolidated.00.pth")
    torch.save(weights, folder / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    for dtype in (torch.float32, torch.float16):
        assert equal(load_llama(folder, dtype), copy.deepcopy(llama).to(dtype))


@pytest.mark.parametrize("zipped", [True, False])
def test_two_names_of_one_tensor_become_two_parameters(tmp_path, zipped):
    folder = write_raw(tiny_llama(), tmp_path / "raw")
    weights = torch.load(folder / "consolidated.00.pth")
    weights["output.weight"] = weights["tok_embeddings.weight"]
    torch.save(weights, folder / "consolidated.00.pth", _use_new_zipfile_serialization=zipped)
    llama = load_llama(folder)
    with torch.no_grad():
        llama.output.weight.zero_()
    assert torch.equal(llama.tok_embeddings.weight, weights["tok_embeddings.weight"])


def test_views_of_a_larger_tensor_are_loaded_and_saved_without_it(tmp_path):
    llama = tiny_llama()
    folder = write_raw(llama, tmp_path / "raw")
    weights = weights_of(llama)
    sizes = [weight.numel() for weight in weights.values()]
    large = torch.cat([weight.flatten() for weight in weights.values()] + [torch.zeros(10**6)])
    parts = large.split([*sizes, 10**6])
    views = {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts)}
    torch.save(views, folder / "consolidated.00.pth")
    loaded = load_llama(folder)
    assert equal(loaded, llama)
    save_llama(loaded.config, dict(loaded.named_parameters()), tmp_path / "saved")
    assert (tmp_path / "saved/consolidated.00.pth").stat().st_size < 4 * sum(sizes) + 20_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_saved_llamas_load_as_they_were(tmp_path, dtype):
    llama = load_llama(write_raw(tiny_llama(), tmp_path / "raw", 2), dtype)
    for _ in range(2):  # the second time over the file that `llama` is mapped from
        save_llama(llama.config, weights_of(llama), tmp_path / "saved")
        again = load_llama(tmp_path / "saved", None)
        assert equal(again, llama)
        assert again.config == llama.config
        llama = again


# --- strict names and shapes


@pytest.mark.parametrize("changes, word", [
    ({"vocab_size": 97}, "tok_embeddings.weight: copying a param with shape torch.Size([96, 32])"),
    ({"num_hidden_layers": 3}, 'Missing key(s) in state_dict: "layers.2'),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),  # refused before a model of that size is built
    ({"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, "5 heads"),
    ({"model_type": "mistral"}, "model_type"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_a_config_json_of_another_model_is_refused(tmp_path, changes, word):
    folder = write_huggingface(tiny_llama(), tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with refused(folder, word):
        load_llama(folder)


def write_changed(folder: Path, change) -> Path:
    """Meta's folder of two model-parallel files after change(weights of the first file, weights of the second)."""
    files = sorted(write_raw(tiny_llama(), folder, 2).glob("*.pth"))
    shards = [torch.load(file) for file in files]
    change(*shards)
    for file, shard in zip(files, shards):
        torch.save(shard, file)
    return folder


WQ, NORM = "layers.1.attention.wq.weight", "layers.0.ffn_norm.weight"
FAULTS = {  # name of a fault -> the change of two model-parallel files, and the words to expect
    "missing": (lambda a, b: (a.pop(WQ), b.pop(WQ)), ["Missing key", WQ]),
    "extra in both": (lambda a, b: [s.update({"wz.weight": torch.ones(1)}) for s in (a, b)], ["Unexpected key", "wz"]),
    "extra layer": (lambda a, b: [s.update({"layers.2.ffn_norm.weight": torch.ones(32)}) for s in (a, b)], ["Unexpected key", "layers.2"]),
    "many missing": (lambda a, b: [s.pop(k) for s in (a, b) for k in list(s) if "layers.1." in k], ["Missing key", "layers.1"]),
    "another shape in both": (lambda a, b: [s.update({WQ: torch.ones(16, 31)}) for s in (a, b)], [WQ, "[32, 31]"]),
    "scalars": (lambda a, b: [s.update({WQ: torch.tensor(1.0)}) for s in (a, b)], [WQ]),
    "float8": (lambda a, b: [s.update({NORM: s[NORM].to(torch.float8_e4m3fn)}) for s in (a, b)], [NORM, "float8"]),
    "integers in both": (lambda a, b: [s.update({WQ: s[WQ].int()}) for s in (a, b)], [WQ, "int32"]),
    "larger than its storage": (lambda a, b: a.update({WQ: torch.ones(1).expand(16, 32)}), [WQ, "storage"]),
    "a number for a name": (lambda a, b: [s.update({7: torch.ones(1)}) for s in (a, b)], ["7"]),
    "no tensor": (lambda a, b: a.update({WQ: [1.0]}), ["dict of tensors"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_name_and_shape_must_match(tmp_path, fault):
    change, words = FAULTS[fault]
    folder = write_changed(tmp_path / "raw", change)
    with refused(folder, *words):
        load_llama(folder)


def test_a_scalar_in_the_place_of_a_matrix_is_refused(tmp_path):
    folder = write_raw(tiny_llama(), tmp_path / "raw")
    weights = torch.load(folder / "consolidated.00.pth")
    for name in ("output.weight", "norm.weight"):
        torch.save(weights | {name: torch.tensor(1.0)}, folder / "consolidated.00.pth")
        with refused(folder, f"{name}: copying a param with shape torch.Size([])"):
            load_llama(folder)


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    folder = write_huggingface(tiny_llama(), tmp_path / "hf", "bin index")
    first, second = sorted(folder.glob("*.bin"))
    torch.save(torch.load(second) | torch.load(first), second)
    with refused(second, "earlier part"):
        load_llama(folder)


def test_absent_files_are_named(tmp_path):
    with refused(tmp_path / "absent", "params.json", "config.json"):
        load_llama(tmp_path / "absent")
    folder = write_huggingface(tiny_llama(), tmp_path / "hf", "bin index")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with refused(folder, "pytorch_model-00002-of-00002.bin"):
        load_llama(folder)


def test_a_finished_llava_and_deltas_are_refused_with_the_command_that_converts_them(tmp_path):
    llama = tiny_llama()
    folder = write_huggingface(llama, tmp_path / "llava")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llava", "mm_hidden_size": 128}))
    with refused(folder, "tools.import_llava"):
        load_llama(folder)
    folder = write_huggingface(llama, tmp_path / "delta")
    deltas = {name: 0.01 * weight for name, weight in torch.load(folder / "pytorch_model.bin").items()}
    torch.save(deltas, folder / "pytorch_model.bin")
    with refused(folder, "tools.import_llava", "--llama-base"):
        load_llama(folder)
    deltas = {name: 0.01 * p.detach() for name, p in llama.named_parameters()}
    checkpoint.save_llama(llama.config, deltas, tmp_path / "raw")
    with refused(tmp_path / "raw", "tools.import_llava", "--llama-base"):
        load_llama(tmp_path / "raw")


# --- CLIP in its formats


PIXELS = torch.randn(2, 3, VIT.image_size, VIT.image_size, generator=torch.Generator().manual_seed(0))


def their_features(vit, layer: int) -> torch.Tensor:
    with torch.no_grad():
        return vit_twin(vit)(PIXELS, output_hidden_states=True).hidden_states[layer][:, 1:]


def openai_weights(vit) -> dict[str, torch.Tensor]:
    """The state dict of OpenAI's CLIP. Only the names of its text tower are real."""
    vision = weights_of(vit) | {"proj": torch.randn(VIT.width, 32)}
    vision |= {f"ln_post.{kind}": torch.randn(VIT.width) for kind in ("weight", "bias")}
    text = ("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.weight",
            "transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0.ln_1.bias")  # fmt: skip
    weights = {f"visual.{name}": weight for name, weight in vision.items()} | {name: torch.randn(3, 2) for name in text}
    return weights | {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}


def their_clip(vit) -> transformers.CLIPModel:
    """A CLIP of transformers, text tower included, with the weights of a ViT."""
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
            "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    twin = vit_twin(vit)
    clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=twin.config.to_dict(), text_config=text))
    clip.vision_model.load_state_dict({k.removeprefix("vision_model."): v for k, v in twin.state_dict().items()})
    return clip


@pytest.mark.parametrize("kind", ["vision folder", "clip folder", "old clip folder", "state dict", "torchscript"])
def test_every_format_of_clip_gives_the_features_of_transformers(tmp_path, kind):
    vit, path = tiny_vit(-1), tmp_path / "clip"
    if kind == "torchscript":
        vit = vit.half().float()  # the archive is in float16
        write_torchscript(openai_weights(vit), path)
    elif kind == "state dict":
        torch.save(openai_weights(vit), path)
    elif kind == "vision folder":
        vit_twin(vit).save_pretrained(path)
    elif kind == "clip folder":
        their_clip(vit).save_pretrained(path)
    else:  # as published in 2021
        clip = their_clip(vit)
        clip.config.save_pretrained(path)
        ids = ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids")
        torch.save(clip.state_dict() | dict.fromkeys(ids, torch.ones(1)), path / "pytorch_model.bin")
    for layer in (-1, -2, -4):
        vision = load_vision(path, layer)
        assert len(vision.transformer.resblocks) == VIT.layers + 1 + layer
        assert {p.dtype for p in vision.parameters()} == {torch.float32}
        assert vision.config == VIT
        assert vision.feature_layer == layer
        assert error(vision(PIXELS).detach(), their_features(vit, layer)) < 1e-5
    assert load_vision(path).feature_layer == -2  # LLaVA's
    for layer in (0, -5):
        with refused(path, "feature layer"):
            load_vision(path, layer)


def test_other_vision_weights_are_refused(tmp_path):
    weights, path, top = openai_weights(tiny_vit(-1)), tmp_path / "vit.pt", "visual.transformer.resblocks.2"
    gap = {name.replace(".2.", ".3."): weight for name, weight in weights.items() if top in name}
    for changes, without, words in (
        (dict.fromkeys(("visual.layer1.0.conv1.weight", "visual.attnpool.k_proj.bias"), torch.ones(1)), "", ["ResNet"]),
        ({"visual.transformer.resblocks.1.ls_1": torch.ones(1)}, "", ["Unexpected key", "resblocks.1.ls_1"]),
        ({"visual.transformer.resblocks.99999.ln_1.bias": torch.ones(1)}, "", ["Unexpected key", "99999"]),
        ({}, "visual.ln_pre.bias", ["Missing key", "ln_pre.bias"]),
        ({}, "visual.transformer.resblocks.0.mlp.c_fc.bias", ["Missing key", "resblocks.0.mlp.c_fc.bias"]),
        ({"visual.ln_pre.bias": torch.ones(64)}, "", ["ln_pre.bias", "[64]", "[128]"]),
        ({"visual.positional_embedding": torch.ones(11, 128)}, "", ["no CLIP ViT"]),
        ({"visual.positional_embedding": torch.tensor(1.0)}, "", ["no CLIP ViT"]),
        ({"visual.conv1.weight": torch.ones(128, 3, 0, 0)}, "", ["no CLIP ViT", "(128, 3, 0, 0)"]),
        ({"visual.conv1.weight": torch.ones(100, 3, 14, 14)}, "", ["no CLIP ViT"]),
        (gap, top, ["blocks 0, 1, 3"]),
        ({"weight": torch.ones(2, 2)}, "visual", ["holds weight"]),
        ({"logit_bias": torch.ones(1)}, "", ["holds logit_bias"]),
        ({}, "visual", ["no CLIP ViT"]),
    ):
        others = {name: weight for name, weight in weights.items() if not without or without not in name}
        torch.save(others | changes, path)
        with refused(path, *words):
            load_vision(path)


def test_a_clip_folder_whose_config_does_not_fit_its_weights_is_refused(tmp_path):
    vit_twin(tiny_vit(-1)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for changes, word in (({"num_hidden_layers": 12}, "layers is 12"), ({"image_size": None}, "image_size is 224"),
                          ({"patch_size": 16}, "patch_size is 16"), ({"intermediate_size": 3072}, "intermediate_size"),
                          ({"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}, "hidden_size is 192"),
                          ({"hidden_act": "gelu"}, "hidden_act"), ({"model_type": "m" * 5000}, "'mmm")):  # fmt: skip
        path.write_text(json.dumps(config | changes))
        with refused(path, word) as info:
            load_vision(tmp_path)
        assert len(str(info.value)) < 500


# --- W


def test_projectors(tmp_path):
    W, bias = torch.randn(6, 4), torch.randn(6)
    published = {"model.mm_projector.weight": W.half(), "model.mm_projector.bias": bias.half()}
    torch.save(published, tmp_path / "mm_projector.bin")
    projector = load_projector(tmp_path / "mm_projector.bin")
    assert torch.equal(projector.weight, W.half().float())
    assert torch.equal(projector.bias, bias.half().float())
    Z_v = torch.randn(3, 4)
    expected = torch.nn.functional.linear(Z_v, W.half().float(), bias.half().float())
    torch.testing.assert_close(projector(Z_v), expected)
    torch.save({"weight": W.bfloat16()}, tmp_path / "projector.pth")
    projector = load_projector(tmp_path / "projector.pth")
    assert projector.bias is None
    assert torch.equal(projector.weight, W.bfloat16().float())


@pytest.mark.parametrize("prefix", ["", "model.", "model.model.", "module.model.", "base_model.model.model."])
def test_projectors_as_the_original_saves_them(tmp_path, prefix, capsys):
    W, path = torch.randn(6, 4), tmp_path / "mm_projector.bin"
    weights = {f"{prefix}mm_projector.weight": W, f"{prefix}mm_projector.bias": torch.ones(6)}
    for more in ({}, {f"{prefix or 'model.'}embed_tokens.weight": torch.ones(9, 6)}):
        torch.save(weights | more, path)
        projector = load_projector(path)
        assert torch.equal(projector.weight, W) and projector.bias.sum() == 6
        printed = capsys.readouterr().out
        assert printed.count("\n") == len(more) and all(name in printed for name in more)


@pytest.mark.parametrize("weights, word", [
    ({"model.mm_projector.0.weight": (6, 4), "model.mm_projector.2.weight": (6, 6)}, "two layers"),
    ({"0.weight": (6, 4), "2.weight": (6, 6)}, "two layers"),
    ({"weight": (6, 4), "bias": (4,)}, "bias: copying a param with shape torch.Size([4])"),
    ({"mm_projector.weight": (6, 4), "model.norm.weight": (6,)}, 'Unexpected key(s) in state_dict: "model.norm.weight"'),
    ({"weight": (6, 4), "scale": (1,)}, 'Unexpected key(s) in state_dict: "scale"'),
    ({"bias": (6,)}, "`weight`"),
    ({"weight": (6,)}, "`weight`"),
], ids=str)  # fmt: skip
def test_other_projectors_are_refused(tmp_path, weights, word):
    path = tmp_path / "projector.pth"
    torch.save({name: torch.ones(shape) for name, shape in weights.items()}, path)
    with refused(path, word):
        load_projector(path)


# --- the state to resume from


def in_child(function) -> int:
    """Calls a function in a forked process and returns the status that it exits with; 1 if it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def state_of(step: int, n: int = 3) -> dict:
    return {"model": {"w": torch.full((n,), float(step))}, "optimizer": {}}


def test_a_full_disk_leaves_the_old_state(tmp_path):
    """A limit on the size of files takes the place of a full disk: a write of torch.save fails in both."""
    checkpoint.save_state(tmp_path, state_of(1), 1)

    def save():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoint.save_state(tmp_path, state_of(2, 100_000), 2)
        except UserError as error:
            message = str(error)
            os._exit(0 if str(tmp_path / "state.pth") in message and "could not be written" in message else 2)

    assert in_child(save) == 0
    assert checkpoint.load_state(tmp_path)["step"] == 1
    assert os.listdir(tmp_path) == ["state.pth"]


def test_a_kill_while_the_state_is_saved_leaves_the_old_or_the_new_one(tmp_path):
    path, rng, steps = tmp_path / "state.pth", random.Random(1), set()
    checkpoint.save_state(tmp_path, state_of(0), 0)
    for _ in range(10):
        first = path.stat().st_mtime_ns
        pid = os.fork()
        if pid == 0:
            try:
                for step in range(1, 10**6):
                    checkpoint.save_state(tmp_path, state_of(step, 300_000), step)
            finally:
                os._exit(1)
        while path.stat().st_mtime_ns == first:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        state = checkpoint.load_state(tmp_path)
        assert (state["model"]["w"] == state["step"]).all()
        steps.add(state["step"])
    assert len(steps) > 1


def test_a_state_is_loaded_as_it_was_saved(tmp_path):
    assert checkpoint.load_state(tmp_path) is None
    w = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([w])
    w.sum().backward()
    optimizer.step()
    state = {"model": {"w": w.detach()}, "optimizer": optimizer.state_dict(), "more": [1, (2.5, None, "x", True)]}
    checkpoint.save_state(tmp_path, state, 7)
    again = checkpoint.load_state(tmp_path)
    assert again["step"] == 7
    assert again["more"] == state["more"]
    assert torch.equal(again["model"]["w"], w)
    moments, expected = again["optimizer"]["state"][0], optimizer.state_dict()["state"][0]
    assert all(torch.equal(moments[name], expected[name]) for name in expected)
    assert again["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("state", [
    [1, 2], torch.ones(1), {}, {"step": 1, "model": {}},
], ids=str)
def test_other_states_are_refused(tmp_path, state):
    torch.save(state, tmp_path / "state.pth")
    with refused(tmp_path / "state.pth", "--no-resume"):
        checkpoint.load_state(tmp_path)
    (tmp_path / "state.pth").write_bytes((tmp_path / "state.pth").read_bytes()[:-100])
    with refused(tmp_path / "state.pth", "--no-resume"):
        checkpoint.load_state(tmp_path)


# --- run directories


def write_parts(root: Path, sp) -> LLaVA:
    """Writes root/llama with its tokenizer and root/vit.pt, and returns the model of both with a random W."""
    torch.save(openai_weights(tiny_vit(-1)), root / "vit.pt")
    c = LLaMAConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=56, vocab_size=sp.vocab_size(), norm_eps=1e-5)
    llama = randomize(LLaMA(c), 0)
    save_llama(c, weights_of(llama), root / "llama")
    (root / "llama/tokenizer.model").write_bytes(sp.serialized_model_proto())
    return checkpoint.build(load_llama(root / "llama"), load_vision(root / "vit.pt"), seed=3)


@pytest.fixture
def parts(tmp_path, tiny_tokenizer):
    return tmp_path, write_parts(tmp_path, tiny_tokenizer)


def save(root: Path, model: LLaVA, stage: int, run: Path | str = "run", **settings):
    """Saves root/run as train.py does, with the frozen parts of root."""
    prefixes = ("projector.", "llama.")[:stage]
    trained = {name: weight for name, weight in weights_of(model).items() if name.startswith(prefixes)}
    run = root / run
    paths = {"llama": checkpoint.portable(root / "llama", run), "vision": checkpoint.portable(root / "vit.pt", run)}
    config = {"stage": stage, "template": "vicuna_v0", "feature_layer": model.vision.feature_layer, **paths, **settings}
    save_run(run, model.llama.config, trained, config, root / "vit.pt", root / "llama/tokenizer.model")
    return config


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_is_loaded_as_it_was_saved(parts, tiny_tokenizer, stage, monkeypatch):
    root, model = parts
    (root / "run/.new").mkdir(parents=True)
    (root / "run/.new/params.json").write_text("{}")  # a killed process left it behind
    monkeypatch.chdir(root)
    config = save(Path(), model, stage)  # with relative paths
    monkeypatch.chdir("/")
    again, sp, found = load_run(root / "run")
    assert equal(again, model)
    assert again.vision.feature_layer == model.vision.feature_layer
    assert sp.encode("A cat.") == tiny_tokenizer.encode("A cat.")
    assert found == config
    files = {"config.json", "vision.json", "projector.pth"}
    if stage == 2:
        files |= {"params.json", "consolidated.00.pth", "tokenizer.model"}
    before = {path.name: path.read_bytes() for path in (root / "run").iterdir()}
    assert before.keys() == files
    save(root, again, stage)  # over itself, and over the file that `again` is mapped from
    assert {path.name: path.read_bytes() for path in (root / "run").iterdir()} == before


def test_a_run_of_stage_2_needs_no_other_llama(parts):
    root, model = parts
    save(root, model, 2)
    shutil.rmtree(root / "llama")
    assert equal(load_run(root / "run", torch.bfloat16)[0].llama, copy.deepcopy(model.llama).bfloat16())
    assert equal(load_llama(root / "run"), model.llama)  # as --llama of another run


def test_dtypes_of_a_run(parts):
    root, model = parts
    model.llama.bfloat16()
    save(root, model, 2)
    for dtype, expected in ((None, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        found = load_run(root / "run", dtype)[0]
        assert {p.dtype for p in found.llama.parameters()} == {expected}
        assert found.projector.weight.dtype == torch.float32
        assert torch.equal(found.projector.weight, model.projector.weight)


# --- paths in run directories


@pytest.mark.parametrize("path, run, expected", [
    ("project/demo/vit.pt", "project/runs/a", "../../demo/vit.pt"),
    ("project/runs/b", "project/runs/a", "../b"),
    ("project/runs/a/vision.pth", "project/runs/a", "vision.pth"),
    ("work/vit.pt", "work/run", "../vit.pt"),
    ("work/weights/vit.pt", "work/run", "../weights/vit.pt"),
    ("elsewhere/vit.pt", "project/runs/a", None),
    ("project/demo/vit.pt", "work/run", None),
    ("project2/vit.pt", "project/runs/a", None),  # its name only starts like the project's
])  # fmt: skip
def test_paths_are_recorded_relative_to_a_run_that_can_move_with_them(tmp_path, monkeypatch, path, run, expected):
    monkeypatch.setattr(checkpoint, "PROJECT", tmp_path / "project")
    assert checkpoint.portable(tmp_path / path, tmp_path / run) == (expected or str(tmp_path / path))
    monkeypatch.chdir(tmp_path)
    assert checkpoint.portable(path, run) == (expected or str(tmp_path / path))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_copied_project_loads_its_own_runs(tmp_path, tiny_tokenizer, stage, monkeypatch):
    project = tmp_path / "project"
    (project / "demo").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "PROJECT", project)
    model = write_parts(project / "demo", tiny_tokenizer)
    save(project / "demo", model, stage, run=project / "runs/a")
    texts = [(project / "runs/a" / name).read_text() for name in ("config.json", "vision.json")]
    assert not any(str(tmp_path) in text for text in texts)
    shutil.copytree(project, tmp_path / "copy")
    shutil.rmtree(project)
    assert equal(load_run(tmp_path / "copy/runs/a")[0], model)
    assert checkpoint.read_run(tmp_path / "copy/runs/a")[2].resolve() == tmp_path / "copy/demo/vit.pt"
    (tmp_path / "runs").symlink_to(tmp_path / "copy/runs")  # a path relative to the real folder
    assert equal(load_run(tmp_path / "runs/a")[0], model)


def test_a_run_can_move_with_the_weights_beside_it(parts):
    root, model = parts
    save(root, model, 1)
    (root / "moved").mkdir()
    for name in ("run", "llama", "vit.pt"):
        (root / name).rename(root / "moved" / name)
    assert equal(load_run(root / "moved/run")[0], model)


def write_old_run(root: Path, model: LLaVA, stage: int, **settings) -> Path:
    """A run directory as earlier versions of this program wrote it: absolute paths, and the state in a folder."""
    run, vision, llama = root / "run", str(root / "vit.pt"), str(root / "llama")
    config = {"settings": {"stage": stage, "task": None, "llama": None, "llama_base": None, "vision": None,
                           "max_bad_steps": 0, "tensorboard": False, "name": "stage1", "demo": True},
              "stage": stage, "template": "vicuna_v0", "prompt": "QCM-LEA", "precision": "fp32", "feature_layer": -2,
              "preprocessing": "CLIP's: shorter side by bicubic, centre crop, mean and deviation",
              "torch": "2.13.0+cpu", "llama": llama, "vision": vision, "step": 600, **settings}  # fmt: skip
    texts = {"config.json": config,
             "vision.json": {"path": vision, "sha256": checkpoint.checksum(vision), "feature_layer": -2}}  # fmt: skip
    W = weights_of(model.projector)
    tensors = {"projector.pth": W, "state/training.pth": {"trained": W, "optimizer": {}, "step": 600}}
    if stage == 2:
        texts["params.json"] = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8,
                                "ffn_dim_multiplier": 56.5 / 85, "norm_eps": 1e-05,
                                "vocab_size": model.llama.config.vocab_size, "rope_theta": 10000.0}  # fmt: skip
        tensors["consolidated.00.pth"] = weights_of(model.llama)
    (run / "state").mkdir(parents=True)
    (run / ".lock").touch()
    (run / "metrics.jsonl").write_text('{"step": 600, "loss": 0.5}\n')
    for name, content in texts.items():
        (run / name).write_text(json.dumps(content, indent=2) + "\n")
    for name, content in tensors.items():
        with open(run / name, "wb") as file:
            torch.save(content, file)
    if stage == 2:
        shutil.copy(root / "llama/tokenizer.model", run)
    return run


@pytest.mark.parametrize("stage", [1, 2])
def test_runs_of_earlier_versions_load(parts, stage):
    root, model = parts
    run = write_old_run(root, model, stage)
    again, sp, config = load_run(run)
    assert equal(again, model)
    assert config["step"] == 600
    assert checkpoint.read_run(run) == (config, root / "llama" if stage == 1 else run, root / "vit.pt")
    again, _, config, _ = checkpoint.open_run(run, CPU, "train.py", template="vicuna_v0", stage=stage)
    assert equal(again, model)
    assert checkpoint.load_state(run) is None  # their training state is not continued


def test_a_run_of_an_earlier_version_over_deltas_names_the_remedy(parts):
    root, model = parts
    folder = write_huggingface(model.llama, root / "delta")
    deltas = {name: 0.01 * weight for name, weight in torch.load(folder / "pytorch_model.bin").items()}
    torch.save(deltas, folder / "pytorch_model.bin")
    run = write_old_run(root, model, 1, llama=str(folder), llama_base=str(root / "llama"))
    with refused(folder, "tools.import_llava", "--llama-base"):
        load_run(run)


# --- runs that are refused


def test_a_run_without_its_frozen_parts_is_refused(parts):
    root, model = parts
    save(root, model, 1)
    (root / "vit.pt").rename(root / "moved.pt")
    with refused(root / "run", "vit.pt does not exist", "'path' in vision.json"):
        load_run(root / "run")
    torch.save(openai_weights(tiny_vit(-1, seed=5)), root / "vit.pt")
    with refused(root / "run", "vit.pt", "sha256"):
        load_run(root / "run")
    vision = json.loads((root / "run/vision.json").read_text())
    (root / "run/vision.json").write_text(json.dumps(vision | {"path": str(root / "moved.pt")}))  # the remedy
    assert equal(load_run(root / "run")[0], model)
    (root / "llama").rename(root / "elsewhere")
    with refused(root / "run", "llama does not exist", "'llama' in config.json"):
        load_run(root / "run")


@pytest.mark.parametrize("name, changes", [
    ("vision.json", {"feature_layer": [1]}), ("vision.json", {"feature_layer": None}),
    ("vision.json", {"feature_layer": 7}), ("vision.json", {"path": 3}), ("vision.json", {"path": "/dev/zero"}),
    ("vision.json", {"path": "a" * 10_000}), ("vision.json", {"path": "\n\0"}), ("vision.json", {"sha256": None}),
    ("config.json", {"llama": ""}), ("config.json", {"llama": "a/" * 5000}), ("config.json", {"llama": [5]}),
    ("config.json", {"llama": None}), ("config.json", {"stage": {}}), ("config.json", {"stage": 3}),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_runs_with_hostile_settings_are_refused(parts, name, changes):
    root, model = parts
    save(root, model, 1)
    path = root / "run" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with refused("") as info:
        load_run(root / "run")
    assert len(str(info.value)) < 1000


def test_a_run_whose_parts_do_not_fit_together_is_refused(parts):
    root, model = parts
    save(root, model, 1)
    torch.save({"weight": torch.ones(64, 3)}, root / "run/projector.pth")
    with refused("projector's weight is (64, 3)", "32", "128"):
        load_run(root / "run")


def test_unfinished_runs_are_refused(parts):
    root, model = parts
    with refused(root / "absent", "no run directory", "train.py --stage 1"):
        load_run(root / "absent")
    for stage, names in ((1, ["config.json", "vision.json", "projector.pth"]),
                         (2, ["params.json", "consolidated.00.pth", "tokenizer.model"])):  # fmt: skip
        for name in names:
            save(root, model, stage)
            assert checkpoint.missing_file(root / "run", stage) is None
            (root / "run" / name).unlink()
            with refused(root / "run", "no run directory" if name == "config.json" else f"{name}: missing"):
                load_run(root / "run")
    save(root, model, 1)
    (root / "run/config.json").write_text("{}")
    with refused(root / "run", "not a run directory"):
        load_run(root / "run")


@pytest.mark.parametrize("name", ["replace", "fsync", "unlink"])
def test_a_process_that_dies_while_it_saves_a_run_never_mixes_old_and_new_files(parts, name):
    """Every call of a system function in turn is the last one that the process makes."""
    root, old = parts
    new = copy.deepcopy(old)
    with torch.no_grad():
        for p in [*new.llama.parameters(), *new.projector.parameters()]:
            p.add_(1)
    ends = set()
    for n in range(100):
        save(root, old, 2, written="old")

        def save_and_die():
            calls, real = [], getattr(os, name)

            def count(*arguments, **settings):
                if len(calls) == n:
                    os._exit(9)
                calls.append(name)
                return real(*arguments, **settings)

            setattr(os, name, count)
            save(root, new, 2, written="new")
            os._exit(0)

        status = in_child(save_and_die)
        assert status in (0, 9)
        try:
            model, _, config = load_run(root / "run")
            assert equal(model, old if config["written"] == "old" else new), n
            ends.add(config["written"])
        except UserError as error:
            assert "projector.pth: missing" in str(error)
            ends.add("refused")
        if status == 0:
            break
    assert status == 0
    assert ends == {"fsync": {"old", "new", "refused"}, "replace": {"old", "new", "refused"}, "unlink": {"old", "new"}}[name]


def test_open_run(parts):
    root, model = parts
    with refused(root / "absent", "no run directory", "train.py --stage 2 --out"):
        checkpoint.open_run(root / "absent", CPU, "train.py --stage 2")
    with refused(root / "llama", "no run directory"):
        checkpoint.open_run(root / "llama", CPU, "train.py --stage 2")
    config = save(root, model, 1, precision="bf16")
    with refused(root / "run/config.json", "stage 1", "expected 2", "train.py --stage 2"):
        checkpoint.open_run(root / "run", CPU, "train.py --stage 2", template="vicuna_v0", stage=2)
    with refused(root / "run/config.json", "template 'vicuna_v0'", "expected 'vicuna_v1'"):
        checkpoint.open_run(root / "run", CPU, "train.py --stage 2", template="vicuna_v1")
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        save(root, model, 1, precision=precision)
        found, sp, config, autocast = checkpoint.open_run(root / "run", CPU, "", template="vicuna_v0", stage=1)
        assert config["precision"] == precision
        assert not any(p.requires_grad for p in found.parameters())
        assert {p.dtype for p in [*found.llama.parameters(), *found.vision.parameters()]} == {dtype}
        assert equal(found.llama, copy.deepcopy(model.llama).to(dtype))
        with autocast:
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    (root / "run/config.json").write_text('{"model_type": "llava"}')
    with refused(root / "run", "tools.import_llava"):
        checkpoint.open_run(root / "run", CPU, "")


# --- the parts together


def test_a_tokenizer_of_another_llama_is_refused(parts, tiny_tokenizer):
    root, _ = parts
    path, pieces = root / "llama/tokenizer.model", tiny_tokenizer.vocab_size()
    for rows in (pieces, pieces + 1, pieces + checkpoint.SPARE_ROWS):
        assert checkpoint.open_tokenizer(path, LLaMAConfig(vocab_size=rows)).vocab_size() == pieces
    for rows in (pieces - 1, pieces + checkpoint.SPARE_ROWS + 1):
        with refused(path, f"{pieces} pieces", str(rows), "came with"):
            checkpoint.open_tokenizer(path, LLaMAConfig(vocab_size=rows))


def test_the_tokenizer_of_metas_download_lies_one_folder_above(tmp_path, tiny_tokenizer):
    folder, model = write_raw(tiny_llama(), tmp_path / "llama/7B"), tiny_tokenizer.serialized_model_proto()
    assert checkpoint.tokenizer_path(folder) == folder / "tokenizer.model"  # the place that an error names
    for path in (tmp_path / "llama/tokenizer.model", folder / "tokenizer.model"):
        path.write_bytes(model)
        assert checkpoint.tokenizer_path(folder).resolve() == path
    (folder / "tokenizer.model").unlink()
    (folder / "params.json").unlink()  # only Meta's folders have it there
    assert checkpoint.tokenizer_path(folder) == folder / "tokenizer.model"


def test_the_checksum_of_a_folder_covers_what_is_loaded(tmp_path):
    vit_twin(tiny_vit(-1)).save_pretrained(tmp_path)
    before = checkpoint.checksum(tmp_path)
    for name in ("README.md", "training_args.bin", "pytorch_model.bin"):
        (tmp_path / name).write_text("hello")
        assert checkpoint.checksum(tmp_path) == before
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"\x55")
    changed = checkpoint.checksum(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert len({before, changed, checkpoint.checksum(tmp_path)}) == 3


def test_a_run_that_recorded_the_checksum_of_every_file_loads(parts):
    root, model = parts
    save(root, model, 1)
    vit_twin(tiny_vit(-1)).save_pretrained(root / "clip")
    torch.save({}, root / "clip/training_args.bin")
    vision = {"path": "../clip", "sha256": checkpoint.checksum(root / "clip", every_file=True), "feature_layer": -2}
    assert vision["sha256"] != checkpoint.checksum(root / "clip")
    (root / "run/vision.json").write_text(json.dumps(vision))
    assert equal(load_run(root / "run")[0].vision, tiny_vit())
    (root / "clip/training_args.bin").unlink()
    with refused(root / "run", "sha256"):
        load_run(root / "run")


def test_build(parts):
    root, model = parts
    torch.manual_seed(99)
    rng_state = torch.get_rng_state()
    again = checkpoint.build(model.llama, model.vision, seed=3)
    assert torch.equal(again.projector.weight, model.projector.weight)
    assert torch.equal(torch.get_rng_state(), rng_state)  # the caller's random numbers continue as before
    assert not torch.equal(checkpoint.build(model.llama, model.vision, seed=4).projector.weight, model.projector.weight)
    W = Projection(128, 32)
    assert checkpoint.build(model.llama, model.vision, W).projector is W
    with pytest.raises(UserError, match=r"\(128, 32\).*dim is 32.*width 128"):
        checkpoint.build(model.llama, model.vision, Projection(32, 128))
