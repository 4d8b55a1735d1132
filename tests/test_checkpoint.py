"""checkpoint.py: published formats against `transformers`, strictness, memory, hostile files, writes that fail."""

import argparse
import copy
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import ROOT, error, randomize
from torch.distributed.checkpoint.api import CheckpointException

import checkpoint
import convert
import parallel
import train
from checkpoint import load_llama, load_projector, load_run, load_vision, save_llama, save_run
from conversation import UserError
from model import LLaMA, LLaMAConfig, LLaVA, Projection, flat_attention, positions
from vision import VisionConfig, normalize

IDS = torch.arange(3, 20)


def refused(path, *words):
    """`with refused(path, ...)`: a UserError of one line that names the path and has the words."""

    class Check:
        def __enter__(self):
            self.raises = pytest.raises(UserError)
            self.info = self.raises.__enter__()
            return self

        def __exit__(self, *how):
            assert self.raises.__exit__(*how)
            message = str(self.info.value)
            assert message.isprintable() and str(path) in message, message
            assert all(word in message for word in words), message
            return True

    return Check()


@torch.no_grad()
def logits(llama: LLaMA) -> torch.Tensor:
    borders = torch.tensor([0, len(IDS)], dtype=torch.int32)
    attend = flat_attention(len(llama.layers), borders)
    return llama.logits(llama(llama.tok_embeddings(IDS), positions(borders), attend))


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# --- LLaMA in its formats, all made from a random model of transformers


def their_llama(n_kv_heads: int, **changes) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(**{
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": n_kv_heads, "rms_norm_eps": 1e-5, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, **changes,
    })  # fmt: skip
    model = randomize(transformers.LlamaForCausalLM(config).eval(), seed=n_kv_heads)
    model.reference = model(IDS[None]).logits[0].detach()
    return model


@pytest.fixture(scope="module", params=[8, 4], ids=["8 kv heads", "4 kv heads"])
def theirs(request):
    return their_llama(request.param)


RAW_NAMES = {"self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
             "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
             "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "lm_head": "output",
             "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings"}  # fmt: skip


def write_raw(theirs, folder: Path, n_shards: int = 1, dtype=torch.float32, **changes) -> Path:
    """Meta's folder with the weights of a transformers model, cut as fairscale's parallel layers cut them."""
    c, hd = theirs.config, theirs.config.head_dim
    shards = [{"rope.freqs": torch.ones(hd // 2)} for _ in range(n_shards)]
    for name, weight in theirs.state_dict().items():
        name, weight = name.removeprefix("model."), weight.to(dtype)
        if "q_proj" in name or "k_proj" in name:  # row i of a head's first half and row i of its second are a pair
            pairs = [(head + i, head + hd // 2 + i) for head in range(0, len(weight), hd) for i in range(hd // 2)]
            weight = weight[[row for pair in pairs for row in pair]]
        for old, new in RAW_NAMES.items():
            name = name.replace(old, new)
        if weight.dim() == 1:
            pieces = [weight] * n_shards
        else:  # RowParallelLinear and ParallelEmbedding cut the inputs
            pieces = weight.chunk(n_shards, dim=1 if any(part in name for part in ("wo", "w2", "tok_emb")) else 0)
        for shard, piece in zip(shards, pieces):
            shard[name] = piece.clone()
    params = {"dim": c.hidden_size, "n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads,
              "multiple_of": 16, "norm_eps": c.rms_norm_eps, "vocab_size": -1, "rope_theta": 500.0}  # fmt: skip
    if c.num_key_value_heads != c.num_attention_heads:
        params["n_kv_heads"] = c.num_key_value_heads
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params | changes))
    for i, shard in enumerate(shards):
        torch.save(shard, folder / f"consolidated.{i:02}.pth")
    return folder


def write_hf(theirs, folder: Path, kind: str) -> Path:
    """kind: "bin", "bin index" or "safetensors index"."""
    if kind == "safetensors index":
        theirs.save_pretrained(folder, max_shard_size="100KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        return folder
    theirs.config.save_pretrained(folder)
    weights = theirs.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    names = sorted(weights)
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    files = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def test_every_format_gives_the_logits_of_transformers(theirs, tmp_path):
    loaded = [load_llama(write_raw(theirs, tmp_path / f"raw{n}", n)) for n in (1, 2, 4)]
    for kind in ("bin", "bin index", "safetensors index"):
        loaded.append(load_llama(write_hf(theirs, tmp_path / kind, kind)))
    for llama in loaded:
        assert error(logits(llama), theirs.reference) < 1e-5
        assert equal(llama, loaded[0])
        assert llama.config == loaded[0].config
    assert loaded[0].config.n_kv_heads == theirs.config.num_key_value_heads
    assert all(p.requires_grad and p.device.type == "cpu" for llama in loaded for p in llama.parameters())


def test_rope_theta_where_older_configs_have_it(tmp_path):
    theirs = their_llama(8)
    folder = write_hf(theirs, tmp_path / "hf", "bin")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_theta": 10000.0}
    for changes in ({"rope_theta": 500.0}, {"rope_theta": 500.0, "rope_scaling": None}, both):
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert error(logits(load_llama(folder)), theirs.reference) < 1e-5
        again = transformers.LlamaForCausalLM.from_pretrained(folder)
        assert error(again(IDS[None]).logits[0].detach(), theirs.reference) < 1e-5  # it reads them alike


def test_views_of_one_memory_are_not_saved_with_all_of_it(theirs, tmp_path):
    folder = write_raw(theirs, tmp_path / "raw")
    weights, before = torch.load(folder / "consolidated.00.pth"), load_llama(folder)
    flat = torch.cat([w.flatten() for w in weights.values()] + [torch.zeros(10**6)])  # the end belongs to nobody
    sizes = [w.numel() for w in weights.values()] + [10**6]
    views = {name: part.view(w.shape) for (name, w), part in zip(weights.items(), flat.split(sizes))}
    checkpoint.save_tensors(folder / "consolidated.00.pth", views)  # not into the file that `before` is mapped from
    again = load_llama(folder)
    assert equal(again, before)
    save_llama(again, tmp_path / "saved")
    assert (tmp_path / "saved/consolidated.00.pth").stat().st_size < 4 * sum(sizes[:-1]) + 20_000


def test_tied_embeddings_become_two_matrices(tmp_path):
    theirs = their_llama(8, tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path / "safetensors")
    theirs.config.save_pretrained(tmp_path / "bin")
    torch.save(theirs.state_dict(), tmp_path / "bin/pytorch_model.bin")  # both names, one memory
    for kind in ("safetensors", "bin"):
        llama = load_llama(tmp_path / kind)
        assert error(logits(llama), theirs.reference) < 1e-5
        with torch.no_grad():
            llama.output.weight.zero_()
        assert llama.tok_embeddings.weight.abs().sum() > 0
    torch.save(theirs.state_dict() | {"lm_head.weight": torch.ones(96, 64)}, tmp_path / "bin/pytorch_model.bin")
    with refused(tmp_path / "bin", "tie_word_embeddings", "lm_head.weight"):
        load_llama(tmp_path / "bin")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype(theirs, tmp_path, dtype):
    half = copy.deepcopy(theirs).half()
    for n_shards in (1, 2):
        llama = load_llama(write_raw(half, tmp_path / f"{n_shards}", n_shards, torch.float16), dtype)
        weight = half.state_dict()["model.layers.1.mlp.down_proj.weight"]
        assert torch.equal(llama.layers[1].feed_forward.w2.weight, weight.to(dtype))
        assert {p.dtype for p in llama.parameters()} == {dtype}


def test_training_in_place_leaves_the_file_alone(theirs, tmp_path):
    folder = write_raw(theirs, tmp_path / "raw")
    before = (folder / "consolidated.00.pth").read_bytes()
    llama = load_llama(folder)
    with torch.no_grad():
        for p in llama.parameters():
            p.add_(1)
    assert (folder / "consolidated.00.pth").read_bytes() == before
    assert not torch.equal(load_llama(folder).output.weight, llama.output.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_save_llama_round_trip(theirs, tmp_path, dtype):
    llama = load_llama(write_raw(theirs, tmp_path / "raw", 2), dtype)
    save_llama(llama, tmp_path / "again")
    again = load_llama(tmp_path / "again", dtype)
    assert equal(again, llama) and again.config == llama.config
    save_llama(again, tmp_path / "again")  # over the files that its memory is mapped from
    assert equal(load_llama(tmp_path / "again", dtype), llama)
    save_llama(llama, tmp_path / "half", torch.float16)
    assert equal(load_llama(tmp_path / "half", torch.float16), copy.deepcopy(llama).half())


@pytest.mark.parametrize("dim, ffn_dim", [
    (4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (8192, 28672), (64, 172), (32, 56), (64, 49), (64, 7),
])  # fmt: skip
def test_params_json_gives_ffn_dim_by_the_published_formula(tmp_path, dim, ffn_dim):
    config = LLaMAConfig(dim=dim, n_layers=0, n_heads=2, n_kv_heads=1, ffn_dim=ffn_dim, vocab_size=3)
    save_llama(LLaMA(config), tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    hidden_dim = 4 * dim  # from here on as in Meta's model.py
    hidden_dim = int(2 * hidden_dim / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden_dim = int(params["ffn_dim_multiplier"] * hidden_dim)
    hidden_dim = params["multiple_of"] * ((hidden_dim + params["multiple_of"] - 1) // params["multiple_of"])
    assert hidden_dim == ffn_dim
    if ffn_dim in (11008, 13824, 17920, 22016):  # as published for 7B to 65B
        assert params["multiple_of"] == 256 and "ffn_dim_multiplier" not in params
    published = "dim n_layers n_heads n_kv_heads multiple_of ffn_dim_multiplier norm_eps vocab_size rope_theta"
    assert params.keys() <= set(published.split())


# --- strictness


@pytest.mark.parametrize("changes, word", [
    ({"model_type": "mistral"}, "model_type"),
    ({"model_type": None}, "model_type"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"head_dim": 32}, "head_dim"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None}, "rope_scaling"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_scaling"),
    ({"rope_scaling": "linear", "rope_parameters": None}, "rope_scaling"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": None}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"num_attention_heads": 7, "head_dim": None}, "7 heads"),
    ({"num_hidden_layers": 3}, "3 layers"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"vocab_size": 97}, "tok_embeddings.weight (96, 64) float32 instead of (97, 64)"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_hf_configs_of_other_models_are_refused(tmp_path, changes, word):
    folder = write_hf(their_llama(8), tmp_path / "hf", "bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with refused(folder, word):
        load_llama(folder)


@pytest.mark.parametrize("changes, word", [
    ({"use_scaled_rope": True}, "use_scaled_rope"),
    ({"dim": -64}, "dim"),
    ({"dim": True}, "dim"),
    ({"dim": 128}, "(64, 64) float32 instead of (128, 128)"),
    ({"multiple_of": 256}, "instead of (256, 64)"),
    ({"multiple_of": 0}, "multiple_of"),
    ({"n_heads": 10**9}, "n_heads"),
    ({"n_layers": 1}, "1 layers"),
    ({"n_layers": 10**7}, "layers"),
    ({"n_kv_heads": 2}, "wk.weight"),
    ({"norm_eps": "small"}, "norm_eps"),
    ({"vocab_size": 97}, "(97, 64)"),
    ({"ffn_dim_multiplier": 0}, "ffn_dim_multiplier"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_params_that_do_not_fit_are_refused(tmp_path, changes, word):
    folder = write_raw(their_llama(8), tmp_path / "raw", **changes)
    with refused(folder, word):
        load_llama(folder)


def broken_shards(name):
    """What to do to the list of two shards, and the words to expect."""
    wq, norm = "layers.1.attention.wq.weight", "layers.0.ffn_norm.weight"
    return {
        "missing": (lambda a, b: (a.pop(wq), b.pop(wq)), ["missing", wq]),
        "missing in one": (lambda a, b: b.pop(wq), ["wrong", wq, "(32, 64)", "(64, 64)"]),
        "extra": (lambda a, b: a.update({"layers.0.attention.wz.weight": torch.ones(1)}), ["unexpected", "wz"]),
        "extra layer": (lambda a, b: a.update({"layers.2.attention.wq.weight": torch.ones(1)}), ["3"]),
        "many missing": (lambda a, b: [s.pop(k) for s in (a, b) for k in list(s) if ".1.feed" in k], ["w3"]),
        "mis-shaped": (lambda a, b: a.update({wq: torch.ones(32, 63)}), ["wrong", wq, "(32, 63)", "(32, 64)"]),
        "transposed": (lambda a, b: a.update({wq: torch.ones(64, 32)}), ["wrong", wq]),
        "unequal norms": (lambda a, b: b.update({norm: torch.zeros(64)}), [norm, "differs"]),
        "float8": (lambda a, b: [s.update({norm: s[norm].to(torch.float8_e4m3fn)}) for s in (a, b)], [norm, "float8"]),
        "integers": (lambda a, b: a.update({wq: torch.ones(32, 64, dtype=torch.int8)}), ["wrong", wq, "int8"]),
        "claims more than its bytes": (lambda a, b: a.update({wq: torch.ones(1).expand(32, 64)}), [wq, "the file"]),
        "not a name": (lambda a, b: a.update({7: torch.ones(1)}), ["unexpected", "7"]),
        "not a tensor": (lambda a, b: a.update({wq: [1.0]}), ["dict of tensors"]),
    }[name]


@pytest.mark.parametrize("name", ["missing", "missing in one", "extra", "extra layer", "many missing", "mis-shaped",
                                  "transposed", "unequal norms", "float8", "integers", "claims more than its bytes",
                                  "not a name", "not a tensor"])  # fmt: skip
def test_every_name_and_shape_is_accounted_for(tmp_path, name):
    folder = write_raw(their_llama(8), tmp_path / "raw", 2)
    files = sorted(folder.glob("*.pth"))
    shards = [torch.load(file) for file in files]
    change, words = broken_shards(name)
    change(*shards)
    for file, shard in zip(files, shards):
        torch.save(shard, file)
    with refused(folder, *words):
        load_llama(folder)


def test_a_single_file_agrees_with_itself(tmp_path):
    """A NaN equals nothing, not even itself."""
    folder = write_raw(their_llama(8), tmp_path / "raw")
    weights = torch.load(folder / "consolidated.00.pth")
    weights["norm.weight"][3] = float("nan")
    torch.save(weights, folder / "consolidated.00.pth")
    assert load_llama(folder).norm.weight.isnan().sum() == 1


def test_a_tensor_in_two_parts_is_refused(tmp_path):
    folder = write_hf(their_llama(8), tmp_path / "hf", "bin index")
    second = folder / "pytorch_model-00002-of-00002.bin"
    torch.save(torch.load(second) | torch.load(folder / "pytorch_model-00001-of-00002.bin"), second)
    with refused(second, "lm_head.weight", "earlier part"):
        load_llama(folder)


def test_absent_files_are_named(tmp_path):
    theirs = their_llama(8)
    with refused(tmp_path / "nothing", "params.json", "config.json"):
        load_llama(tmp_path / "nothing")
    folder = write_raw(theirs, tmp_path / "raw", 2)
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    with refused(folder, "consolidated.02.pth"):
        load_llama(folder)
    (folder / "consolidated.02.pth").unlink()
    with refused(folder, "not complete", "(32, 64) float32 instead of (64, 64)", "and 13 more"):  # half of the model
        params = json.loads((folder / "params.json").read_text()) | {"vocab_size": 96}
        (folder / "params.json").write_text(json.dumps(params))
        load_llama(folder)
    (folder / "consolidated.00.pth").unlink()
    with refused(folder, "none"):
        load_llama(folder)
    folder = write_hf(theirs, tmp_path / "hf", "bin index")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with refused(folder / "pytorch_model-00002-of-00002.bin", "No such file"):
        load_llama(folder)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "../raw/consolidated.00.pth"}}')
    with refused(folder / "pytorch_model.bin.index.json", "weight_map"):
        load_llama(folder)
    (folder / "pytorch_model.bin.index.json").unlink()
    with refused(folder, "pytorch_model.bin"):
        load_llama(folder)


def test_hf_names_are_matched_whole(tmp_path):
    folder = write_hf(their_llama(8), tmp_path / "hf", "bin")
    weights = torch.load(folder / "pytorch_model.bin")
    for name in ("lm_head.weight_scale", "base_model.lm_head.weight", "model.layers.0.mlp.up_proj.bias"):
        torch.save(weights | {name: torch.ones(1)}, folder / "pytorch_model.bin")
        with refused(folder, name):
            load_llama(folder)


def test_without_safetensors_the_remedy_is_named(tmp_path, monkeypatch):
    folder = write_hf(their_llama(8), tmp_path / "hf", "safetensors index")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with refused(folder / "model-00001", "pip install safetensors"):
        load_llama(folder)


# --- memory


def test_peak_memory_is_that_of_the_weights(tmp_path):
    """Peak resident memory above the start's, all weights touched, in a process of its own; 1.15 is the promise."""
    script = """
        import gc, re, sys, torch, checkpoint
        from model import LLaMA, LLaMAConfig
        from pathlib import Path
        torch.set_num_threads(1)
        folder, config = Path(sys.argv[1]), LLaMAConfig(768, 16, 12, 12, 2048, 1000)
        with torch.device("meta"):
            sizes = {name: p.shape for name, p in LLaMA(config).named_parameters()}
        weights = {name: torch.full(size, 0.5, dtype=torch.float16) for name, size in sizes.items()}
        total = sum(w.nbytes for w in weights.values())
        (folder / "1").mkdir(), (folder / "2").mkdir()
        params = '{"dim": 768, "n_layers": 16, "n_heads": 12, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}'
        for n in (1, 2):
            (folder / str(n) / "params.json").write_text(params)
            for i in range(n):
                dim = checkpoint.parts_dim
                shard = {k: w if dim(k) is None else w.chunk(n, dim(k))[i].clone() for k, w in weights.items()}
                torch.save(shard, folder / f"{n}/consolidated.{i:02}.pth")
        del weights, shard
        gc.collect()

        def memory(key):
            return 1024 * int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

        checkpoint.load_llama(folder / "1").norm  # warm: what the first load of all takes once
        for n, dtype in ((1, torch.float16), (2, torch.float16), (1, torch.float32), (2, torch.bfloat16)):
            gc.collect()
            open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
            start = memory("VmRSS")
            llama = checkpoint.load_llama(folder / str(n), dtype)
            if (n, dtype) == (1, torch.float16):
                print("untouched", total, (memory("VmHWM") - start) / total)
            for p in llama.parameters():
                p.view(torch.int16).max()
            print(n, str(dtype), total, (memory("VmHWM") - start) / (total * dtype.itemsize / 2))
            del llama, p
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("measured through /proc of Linux")
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    # Matrices of this size would come from malloc's heap, which it gives back late; real ones never do.
    env = os.environ | {"PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    lines = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.splitlines()
    print("\n".join(lines))
    assert len(lines) == 5
    for line in lines:
        total, ratio = line.split()[-2:]
        least, most = (0, 0.05) if "untouched" in line else (0.9, 1.15)  # mapped alone, nothing has been read
        assert int(total) > 200e6 and least <= float(ratio) <= most, line


# --- CLIP in its formats, all made from a random model of transformers


def their_clip(**changes) -> transformers.CLIPModel:
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 2,
              "image_size": 42, "patch_size": 14, **changes}  # fmt: skip
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
            "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=32)
    clip = transformers.CLIPModel(config).eval()
    randomize(clip.vision_model, seed=5)
    return clip


PIXELS = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def their_features(clip, layer: int = -2) -> torch.Tensor:
    return clip.vision_model(PIXELS, output_hidden_states=True).hidden_states[layer][:, 1:]


def in_openai_layout(clip) -> dict[str, torch.Tensor]:
    """The state dict of OpenAI's CLIP, text tower and all (of its names; its shapes do not matter)."""
    w = {k.removeprefix("vision_model."): v for k, v in clip.state_dict().items() if k.startswith("vision_model.")}
    out = {"class_embedding": w["embeddings.class_embedding"], "conv1.weight": w["embeddings.patch_embedding.weight"],
           "positional_embedding": w["embeddings.position_embedding.weight"], "proj": torch.randn(128, 32)}  # fmt: skip
    for kind in ("weight", "bias"):
        out[f"ln_pre.{kind}"], out[f"ln_post.{kind}"] = w[f"pre_layrnorm.{kind}"], w[f"post_layernorm.{kind}"]
        for i in range(4):
            old, new = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            out[f"{new}.attn.in_proj_{kind}"] = torch.cat([w[f"{old}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
            for a, b in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                         ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                out[f"{new}.{b}.{kind}"] = w[f"{old}.{a}.{kind}"]
    text = ("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight", "ln_final.weight",
            "transformer.resblocks.0.attn.in_proj_weight", "transformer.resblocks.0.ln_1.bias")  # fmt: skip
    out = {f"visual.{name}": tensor for name, tensor in out.items()} | {name: torch.randn(3, 2) for name in text}
    return out | {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}


def write_torchscript(weights: dict, path: Path):
    """A real TorchScript archive whose modules hold the weights under their names."""

    class Part(torch.nn.Module):
        def forward(self, x):
            return x

    root = Part()
    for name, tensor in weights.items():
        *owners, leaf = name.split(".")
        module = root
        for owner in owners:
            if not hasattr(module, owner):
                module.add_module(owner, Part())
            module = getattr(module, owner)
        module.register_buffer(leaf, tensor) if tensor.dtype == torch.int64 else module.register_parameter(
            leaf, torch.nn.Parameter(tensor.half()))  # fmt: skip
    torch.jit.save(torch.jit.trace(root, torch.ones(1), check_trace=False), path)


@pytest.mark.parametrize("kind", ["vision folder", "clip folder", "old clip folder", "state dict", "torchscript"])
def test_every_clip_gives_the_features_of_transformers(tmp_path, kind, monkeypatch):
    clip, path = their_clip(), tmp_path / "clip"
    if kind == "torchscript":
        clip = clip.half().float()  # the archive is in fp16
        write_torchscript(in_openai_layout(clip), path)
        assert isinstance(torch.jit.load(path), torch.jit.ScriptModule)
        monkeypatch.setattr(torch.jit, "load", None)
    elif kind == "state dict":
        torch.save(in_openai_layout(clip), path)
    elif kind == "clip folder":
        clip.save_pretrained(path)
    elif kind == "vision folder":
        config = clip.config.vision_config
        vision = transformers.CLIPVisionModel(config).eval()
        theirs = clip.vision_model.state_dict()
        vision.load_state_dict({name: theirs[name.removeprefix("vision_model.")] for name in vision.state_dict()})
        vision.save_pretrained(path)
    else:  # as published in 2021
        clip.config.save_pretrained(path)
        ids = dict.fromkeys(
            ("vision_model.embeddings.position_ids", "text_model.embeddings.position_ids"), torch.ones(1)
        )
        torch.save(clip.state_dict() | ids, path / "pytorch_model.bin")
    for layer in (-1, -2, -5):
        vision = load_vision(path, layer)
        assert len(vision.transformer.resblocks) == 5 + layer
        assert {p.dtype for p in vision.parameters()} == {torch.float32}
        assert error(vision(PIXELS).detach(), their_features(clip, layer)) < 1e-5
    assert error(load_vision(path)(PIXELS).detach(), their_features(clip, -2)) < 1e-5  # LLaVA's default
    assert vision.config == VisionConfig(image_size=42, patch_size=14, width=128, layers=4)
    for layer in (0, -6):
        with refused(path, "feature layer"):
            load_vision(path, layer)


def test_a_long_setting_is_not_shown_whole(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "m" * 5000}))
    with refused(tmp_path / "config.json", "model_type is 'mmm") as check:
        load_vision(tmp_path)
    assert len(str(check.info.value)) < 1000


def test_other_clips_are_refused(tmp_path):
    weights = in_openai_layout(their_clip())

    def write(name, changes, without=()):
        torch.save({k: v for k, v in (weights | changes).items() if k not in without}, tmp_path / name)
        return tmp_path / name

    path = write(
        "resnet", dict.fromkeys(("visual.layer1.0.conv1.weight", "visual.attnpool.k_proj.bias"), torch.ones(1))
    )
    with refused(path, "ResNet", "ViT-L-14.pt"):
        load_vision(path)
    path = write("extra", {"visual.transformer.resblocks.1.ls_1": torch.ones(1)})
    with refused(path, "unexpected", "resblocks.1.ls_1"):
        load_vision(path)
    path = write("unknown", {"logit_bias": torch.ones(1)})
    with refused(path, "logit_bias"):
        load_vision(path)
    path = write("missing", {}, without=["visual.ln_pre.bias", "visual.transformer.resblocks.0.mlp.c_fc.bias"])
    with refused(path, "missing: ln_pre.bias, transformer.resblocks.0.mlp.c_fc.bias"):
        load_vision(path)
    path = write("square", {"visual.positional_embedding": torch.ones(11, 128)})
    with refused(path, "no CLIP ViT"):
        load_vision(path)
    path = write("empty", {"visual.conv1.weight": torch.ones(128, 3, 0, 0)})
    with refused(path, "no CLIP ViT", "(128, 3, 0, 0)"):
        load_vision(path)
    top = "visual.transformer.resblocks.3"  # above the features: read by no one, but of another model
    for changes, without in (({f"{top}.ls_1": torch.ones(1)}, []), ({f"{top}.ln_1.bias": torch.ones(64)}, []),
                             ({}, [f"{top}.mlp.c_fc.bias"])):  # fmt: skip
        path = write("top", changes, without)
        with refused(path, "transformer.resblocks.3 is not like block 0"):
            load_vision(path)
    path = write("gap", {name.replace(".3.", ".4."): weights[name] for name in weights if top in name},
                 [name for name in weights if top in name])  # fmt: skip
    with refused(path, "transformer.resblocks.3 is not like block 0"):
        load_vision(path)
    their_clip().save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder/config.json").read_text())
    for changes in ({"num_hidden_layers": 12}, {"image_size": 224}, {"patch_size": 16}, {"intermediate_size": 3072},
                    {"hidden_size": 192, "num_attention_heads": 3}):  # fmt: skip
        config_path = tmp_path / "folder/config.json"
        config_path.write_text(json.dumps(config | {"vision_config": config["vision_config"] | changes}))
        with refused(config_path, next(iter(changes)), "the weights beside it have"):
            load_vision(tmp_path / "folder")
    torch.save({"weight": torch.ones(2, 2)}, tmp_path / "w.pth")
    with refused(tmp_path / "w.pth", "no place for: weight"):
        load_vision(tmp_path / "w.pth")
    for changes, word in (({"hidden_act": "gelu"}, "hidden_act"), ({"num_attention_heads": 4}, "num_attention_heads"),
                          ({"layer_norm_eps": 1e-6}, "layer_norm_eps")):  # fmt: skip
        their_clip(**changes).save_pretrained(tmp_path / word)
        with refused(tmp_path / word / "config.json", word):
            load_vision(tmp_path / word)


# --- W


def test_projectors(tmp_path):
    W, b = torch.randn(6, 4), torch.randn(6)
    theirs = {"model.mm_projector.weight": W.half(), "model.mm_projector.bias": b.half()}
    torch.save(theirs, tmp_path / "mm_projector.bin")
    projector = load_projector(tmp_path / "mm_projector.bin")
    assert torch.equal(projector.weight, W.half().float()) and torch.equal(projector.bias, b.half().float())
    z = torch.randn(3, 4)
    assert torch.allclose(projector(z), torch.nn.functional.linear(z, W.half().float(), b.half().float()), atol=1e-6)
    checkpoint.save_projector(projector, tmp_path / "projector.pth")
    assert equal(load_projector(tmp_path / "projector.pth"), projector)
    plain = Projection(4, 6).bfloat16()
    checkpoint.save_projector(plain, tmp_path / "projector.pth")
    again = load_projector(tmp_path / "projector.pth")
    assert again.bias is None and again.weight.dtype == torch.float32
    assert torch.equal(again.weight, plain.weight.float())
    saved = torch.load(tmp_path / "projector.pth")
    assert saved.keys() == {"weight"} and saved["weight"].dtype == torch.float32
    torch.save({"model.mm_projector.0.weight": W, "model.mm_projector.2.weight": W}, tmp_path / "mlp.bin")
    with refused(tmp_path / "mlp.bin", "two layers"):
        load_projector(tmp_path / "mlp.bin")
    torch.save({"weight": W, "bias": torch.ones(4)}, tmp_path / "bias.pth")
    with refused(tmp_path / "bias.pth", "bias (4,)"):
        load_projector(tmp_path / "bias.pth")


# --- deltas, and a finished LLaVA


@pytest.mark.parametrize("base", ["raw", "bin"])
def test_deltas_are_added_to_their_base(tmp_path, base):
    before, after = their_llama(8), their_llama(8)
    folder = write_raw(before, tmp_path / "base") if base == "raw" else write_hf(before, tmp_path / "base", "bin")
    delta = {name: (0.01 * torch.randn_like(weight)).half() for name, weight in before.state_dict().items()}
    total = {name: (weight.half() + delta[name]).float() for name, weight in before.state_dict().items()}
    after.load_state_dict(total)
    words = {"model.embed_tokens.weight": torch.randn(3, 64).half(), "lm_head.weight": torch.randn(3, 64).half()}
    write_hf(before, tmp_path / "delta", "bin")  # v0 has words that its base has not: their rows are whole
    torch.save(delta | {name: torch.cat([delta[name], more]) for name, more in words.items()},
               tmp_path / "delta/pytorch_model.bin")  # fmt: skip
    config = json.loads((tmp_path / "delta/config.json").read_text())
    (tmp_path / "delta/config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    llama = load_llama(tmp_path / "delta", None, folder)
    wanted = load_llama(write_hf(after, tmp_path / "after", "bin"))
    for name, weight in wanted.named_parameters():
        got = llama.get_parameter(name)
        assert got.dtype == torch.float16 and torch.equal(got[: len(weight)].float(), weight), name
    assert torch.equal(llama.output.weight[96:], words["lm_head.weight"])
    assert torch.equal(llama.tok_embeddings.weight[96:], words["model.embed_tokens.weight"])
    with refused(tmp_path / "delta", "deltas", "--llama-base"):
        load_llama(tmp_path / "delta")
    with refused(tmp_path / "after", "not deltas", "--llama-base"):
        load_llama(tmp_path / "after", None, folder)
    with refused(folder, "--llama-base"):
        load_llama(folder, None, tmp_path / "after")
    write_raw(their_llama(8, num_hidden_layers=1), tmp_path / "shallow")
    with refused(tmp_path / "delta", "other layers", "layers.1."):
        load_llama(tmp_path / "delta", None, tmp_path / "shallow")
    write_raw(their_llama(8, vocab_size=100), tmp_path / "wide")
    with refused(tmp_path / "delta", "(99, 64)", "(100, 64)"):
        load_llama(tmp_path / "delta", None, tmp_path / "wide")


def write_first_llava(theirs, folder: Path, **projector) -> Path:
    """As the original release: a LLaMA's folder with the projector among the weights."""
    write_hf(theirs, folder, "bin")
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save(weights | {f"model.mm_projector.{name}": weight for name, weight in projector.items()},
               folder / "pytorch_model.bin")  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    more = {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_hidden_size": 128,
            "mm_vision_select_layer": -2, "mm_use_im_start_end": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | more))
    return folder


def test_a_llava_of_the_original_release(theirs, tmp_path):
    W, b = torch.randn(64, 128), torch.randn(64)
    folder = write_first_llava(theirs, tmp_path / "llava", weight=W.half(), bias=b.half())
    assert checkpoint.kind_of(folder) == checkpoint.FIRST_LLAVA and "<im_start>" in checkpoint.describe(folder)
    assert checkpoint.llama_config(folder).dim == 64
    assert error(logits(load_llama(folder)), theirs.reference) < 1e-5
    projector = load_projector(folder)
    assert torch.equal(projector.weight, W.half().float()) and torch.equal(projector.bias, b.half().float())
    with refused(folder / "config.json", "ViT-L-14.pt"):
        load_vision(folder)
    later = write_first_llava(theirs, tmp_path / "later", **{"0.weight": W, "2.weight": torch.randn(64, 64)})
    with refused(later, "two layers", "first version"):
        load_projector(later)
    with refused(write_hf(theirs, tmp_path / "vicuna", "bin"), "`model.mm_projector.weight`"):
        load_projector(tmp_path / "vicuna")


def their_llava(theirs, act="linear", bias=True) -> transformers.LlavaForConditionalGeneration:
    llava = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=their_clip().config.vision_config, text_config=theirs.config, image_token_id=95,
        projector_hidden_act=act, vision_feature_layer=-2, multimodal_projector_bias=bias,
    )).eval()  # fmt: skip
    randomize(llava, seed=1)
    return llava


@pytest.mark.parametrize("names", ["on disk", "of the modules", "before 4.52"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_llava_of_transformers(theirs, tmp_path, names, bias):
    llava, folder = their_llava(theirs, bias=bias), tmp_path / "llava"
    if names == "on disk":
        llava.save_pretrained(folder, max_shard_size="300KB")
    elif names == "of the modules":
        llava.config.save_pretrained(folder)
        torch.save(llava.state_dict(), folder / "pytorch_model.bin")
    else:
        llava.config.save_pretrained(folder)
        olds = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.",
                "model.vision_tower.": "vision_tower.vision_model.", "model.multi": "multi"}  # fmt: skip
        weights = {}
        for name, weight in llava.state_dict().items():
            start = next(start for start in olds if name.startswith(start))
            weights[olds[start] + name.removeprefix(start)] = weight
        torch.save(weights, folder / "pytorch_model.bin")
        config = json.loads((folder / "config.json").read_text())  # what is as in LLaMA-7B is left out of old ones
        config["text_config"] = {k: v for k, v in config["text_config"].items() if v != 32000}
        (folder / "config.json").write_text(json.dumps(config))
    assert checkpoint.kind_of(folder) == checkpoint.HF_LLAVA
    ours = checkpoint.build(load_llama(folder), load_vision(folder), load_projector(folder))
    assert (ours.projector.bias is not None) == bias
    pixels = torch.randint(0, 256, (1, 3, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids, borders = torch.cat([IDS[:5], torch.full((9,), -1), IDS[5:]]), torch.tensor([0, 26], dtype=torch.int32)
    with torch.no_grad():
        reference = llava(input_ids=torch.where(ids < 0, 95, ids)[None], pixel_values=normalize(pixels)).logits[0]
        x = ours.llama(ours.embed(ids, pixels), positions(borders), flat_attention(2, borders))
        assert error(ours.llama.logits(x), reference) < 1e-5


def test_a_llava_with_two_layers_between_is_refused(theirs, tmp_path):
    their_llava(theirs, act="gelu").save_pretrained(tmp_path)
    with refused(tmp_path, "two layers", "first version"):
        load_projector(tmp_path)


def test_projectors_of_transformers_that_do_not_fit(theirs, tmp_path):
    llava = their_llava(theirs)
    llava.config.save_pretrained(tmp_path)
    weights, name = llava.state_dict(), "model.multi_modal_projector"
    for changes, word in (({f"{name}.linear_2.weight": torch.ones(64, 65)}, "linear_2.weight"),
                          ({f"{name}.linear_1.weight": torch.ones(())}, "linear_1.weight"),
                          ({f"{name}.linear_1.bias": torch.ones(1)}, "linear_1.bias"),
                          ({f"{name}.linear_2.bias": None}, "missing: linear_2.bias"),
                          ({f"{name}.linear_2.weight": torch.ones(64, 64).long()}, "int64"),
                          ({"multi_modal_projector.linear_1.bias": torch.ones(64)}, "under two names")):  # fmt: skip
        changed = {key: tensor for key, tensor in (weights | changes).items() if tensor is not None}
        torch.save(changed, tmp_path / "pytorch_model.bin")
        with refused(tmp_path, word):
            load_projector(tmp_path)


def test_the_layer_that_a_llava_was_trained_on(theirs, tmp_path):
    folder = write_first_llava(theirs, tmp_path / "llava", weight=torch.randn(64, 128))
    config = json.loads((folder / "config.json").read_text())
    for changes, layer in (({}, -2), ({"mm_vision_select_layer": -1}, -1), ({"vision_feature_layer": -3}, -3)):
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert checkpoint.feature_layer_of(folder) == layer
    for changes in ({"vision_feature_layer": [-2, -5]}, {"mm_vision_select_feature": "cls_patch"},
                    {"vision_feature_select_strategy": "full"}):  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | changes))
        with refused(folder / "config.json", *changes):
            checkpoint.feature_layer_of(folder)
    assert checkpoint.feature_layer_of(write_raw(theirs, tmp_path / "raw")) == -2


def test_import(theirs, tmp_path, tiny_tokenizer, capsys):
    """Each kind of a finished LLaVA becomes a run directory of the same numbers."""
    theirs, root = their_llama(8, vocab_size=tiny_tokenizer.vocab_size() + 1), tmp_path
    clip = their_clip()
    clip.save_pretrained(root / "clip")
    W = torch.randn(64, 128)
    torch.save({"model.mm_projector.weight": W}, root / "mm_projector.bin")
    first = write_first_llava(theirs, root / "first", weight=W)
    vicuna = write_hf(theirs, root / "vicuna", "bin")
    llava = their_llava(theirs, bias=False)
    llava.save_pretrained(root / "hf")
    for folder in (first, vicuna, root / "hf"):
        (folder / "tokenizer.model").write_bytes(tiny_tokenizer.serialized_model_proto())
    convert.import_llava(first, root / "run-first", vision=root / "clip")
    convert.import_llava(vicuna, root / "run-vicuna", vision=root / "clip", projector=root / "mm_projector.bin")
    convert.import_llava(root / "hf", root / "run-hf")
    assert "<im_start>" in capsys.readouterr().out
    assert equal(load_run(root / "run-hf")[0].llama, load_llama(root / "hf"))
    assert equal(load_run(root / "run-hf")[0].vision, load_vision(root / "hf"))
    runs = {name: checkpoint.open_run(root / f"run-{name}", torch.device("cpu"), "", template="vicuna_v0", stage=2)
            for name in ("first", "vicuna", "hf")}  # fmt: skip
    assert equal(runs["first"][1], runs["vicuna"][1]) and torch.equal(runs["first"][1].projector.weight, W)
    shutil.rmtree(root / "hf")  # of that nothing more is needed
    again = checkpoint.load_run(root / "run-hf")[0]
    assert equal(again, runs["hf"][1])
    with refused(root / "run-hf", "already"):
        convert.import_llava(first, root / "run-hf")
    with refused(vicuna, "--projector"):
        convert.import_llava(vicuna, root / "other", vision=root / "clip")
    with refused(first, "--vision"):
        convert.import_llava(first, root / "other")
    assert not (root / "other").exists()


# --- files that are damaged, hostile or something else


class Code:
    """Unpickled with trust, it would leave a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_pickled_code_never_runs(tmp_path):
    mark, weights = tmp_path / "mark", in_openai_layout(their_clip())
    torch.save({"weight": Code(mark)}, tmp_path / "zip.pth")
    torch.save({"weight": Code(mark)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"weight": Code(mark)}, protocol=2))
    write_torchscript(weights, tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "script.pt") as archive, zipfile.ZipFile(tmp_path / "hostile.pt", "w") as hostile:
        for name in archive.namelist():
            data = archive.read(name) if not name.endswith("/data.pkl") else pickle.dumps({"x": Code(mark)}, protocol=2)
            hostile.writestr(name, data)
    for name in ("zip.pth", "old.pth", "bare.pth", "hostile.pt"):
        with refused(tmp_path / name, "mkdir", "never loaded"):
            load_vision(tmp_path / name)
    for protocol in (4, 5):  # which PyTorch warns of, and does not read
        (tmp_path / "bare.pth").write_bytes(pickle.dumps({"weight": Code(mark)}, protocol=protocol))
        with warnings.catch_warnings(), refused(tmp_path / "bare.pth", "Unsupported operand", "never loaded"):
            warnings.simplefilter("error")
            load_vision(tmp_path / "bare.pth")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:  # 100 MB of 100 KB
        bomb.writestr("x/constants.pkl", b"")
        bomb.writestr("x/data.pkl", bytes(10**8))
    with refused(tmp_path / "bomb.pt", "compressed"):
        load_vision(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "laughs.pt", "w") as laughs:  # an object that holds twice what holds twice what ...
        laughs.writestr("x/constants.pkl", b"")
        doubled = b"c__torch__\nM\n)\x81}(X\x01\0\0\0a%sX\x01\0\0\0b%sub"
        levels = b"".join(doubled % (b"h%c" % i, b"h%c" % i) + b"q%c" % (i + 1) for i in range(100))
        laughs.writestr("x/data.pkl", b"\x80\x02Nq\0" + levels + b".")
    signal.alarm(10)
    with refused(tmp_path / "laughs.pt", "no CLIP ViT"):
        load_vision(tmp_path / "laughs.pt")
    signal.alarm(0)
    assert not mark.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert mark.exists()  # it would have


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "projector.pth"
    torch.save({"weight": torch.randn(64, 64)}, path)
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with refused(path, "again"):
            load_projector(path)
    for data, word in ((b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "git lfs pull"),
                       (b"<!DOCTYPE html><html>", "<!DOCTYPE"), (b"\x80\x02garbage", "damaged")):  # fmt: skip
        path.write_bytes(data)
        with refused(path, word):
            load_projector(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/picture.jpg", b"jpeg")
    with refused(path, "not weights"):
        load_projector(path)
    with refused(tmp_path / "nothing.pth", "No such file"):
        load_projector(tmp_path / "nothing.pth")
    with refused(tmp_path, "pytorch_model.bin"):
        load_projector(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save({"a": torch.ones(9)})[:-1])
    with refused(tmp_path / "model.safetensors", "damaged"):
        load_projector(tmp_path / "model.safetensors")


def test_messages_of_damaged_files_are_one_printable_line(tmp_path):
    path = tmp_path / "projector.pth"
    torch.save({"weight": torch.ones(3, 3)}, path)
    path.write_bytes(path.read_bytes().replace(b"little", b"\x1b[2J\r\n"))
    with refused(path, "endianness", "\ufffd[2J"):
        load_projector(path)


@pytest.mark.parametrize("kind", ["nested", "sparse", "meta"])
def test_tensors_of_other_kinds_are_refused(tmp_path, kind):
    w = torch.ones(3, 3)
    other = {"nested": torch.nested.nested_tensor([w, w[:2]]), "sparse": w.to_sparse(), "meta": w.to("meta")}[kind]
    torch.save({"weight": other}, tmp_path / "projector.pth")
    with refused(tmp_path / "projector.pth", "weight", "dense tensors"):
        load_projector(tmp_path / "projector.pth")


def test_zips_that_unpack_to_more_than_they_are_long_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(1000, 1000)}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name), zipfile.ZIP_DEFLATED)
    with refused(tmp_path / "bomb.pth", "compressed or overlap"):
        load_projector(tmp_path / "bomb.pth")


@pytest.mark.parametrize("place", [["a"], {}, None, 7, "", "a\0b", "a\nb", "../a.bin", "\ud800"], ids=repr)
def test_an_index_that_names_no_files_of_its_folder_is_refused(tmp_path, place):
    folder = write_hf(their_llama(8), tmp_path / "hf", "bin index")
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
    with refused(index, "weight_map"):
        load_llama(folder)


def test_pytorch_format_before_1_6(theirs, tmp_path):
    new, old = write_raw(theirs, tmp_path / "new"), write_raw(theirs, tmp_path / "old")
    shared = torch.load(new / "consolidated.00.pth")
    shared["output.weight"] = shared["tok_embeddings.weight"]  # one memory, which must be read twice
    torch.save(shared, new / "consolidated.00.pth")
    torch.save(shared, old / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    for dtype in (torch.float32, torch.float16):
        assert equal(load_llama(old, dtype), load_llama(new, dtype))


def test_mutated_files_give_an_error_or_load(tmp_path):
    write_torchscript(in_openai_layout(their_clip()), tmp_path / "script.pt")
    torch.save(in_openai_layout(their_clip()), tmp_path / "state.pt")
    dice, ends = random.Random(0), {"loaded": 0, "refused": 0}
    for name in ("script.pt", "state.pt"):
        whole = (tmp_path / name).read_bytes()
        with zipfile.ZipFile(tmp_path / name) as archive:
            pickled = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
        for _ in range(60):  # damage where it is read: in the pickle, in the table of contents
            data = bytearray(whole)
            for _ in range(dice.randint(1, 8)):
                where = dice.choice([pickled.header_offset, len(whole) - 4000])
                data[where + dice.randrange(4000)] = dice.randrange(256)
            (tmp_path / "mutated.pt").write_bytes(data)
            try:
                load_vision(tmp_path / "mutated.pt")
                ends["loaded"] += 1
            except UserError as error:
                assert str(tmp_path / "mutated.pt") in str(error)
                ends["refused"] += 1
    assert ends["refused"] > 60, ends


def test_json_errors_have_their_position(tmp_path):
    path = tmp_path / "params.json"
    path.write_text('{"dim": 64,\n "n_layers": }')
    with refused(path, "line 2, column 14", "Expecting value"):
        load_llama(tmp_path)
    path.write_text("[1, 2]")
    with refused(path, "JSON list", "expected a JSON object"):
        load_llama(tmp_path)
    path.write_bytes(b'{"dim": "\xff"}')
    with refused(path, "JSON"):
        load_llama(tmp_path)
    path.write_text("[" * 100000)
    with refused(path, "JSON"):
        load_llama(tmp_path)


# --- written whole or not at all


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pth"
    checkpoint.save_tensors(path, {"weight": torch.ones(3)})
    checkpoint.write_json(tmp_path / "x.json", {"a": "ü"})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": "ü"}

    class Stop(BaseException):
        pass

    full = OSError(28, "No space left on device")
    for place, exception, seen in (("fsync", full, UserError), ("replace", full, UserError), ("fsync", Stop(), Stop)):
        with monkeypatch.context() as patch:
            patch.setattr(os, place, Mock(side_effect=exception))
            with pytest.raises(seen) as info:
                checkpoint.save_tensors(path, {"weight": torch.zeros(3)})
            if seen is UserError:
                assert str(path) in str(info.value) and "No space left" in str(info.value)
            with pytest.raises(seen):
                checkpoint.write_json(tmp_path / "x.json", {})
        assert torch.equal(torch.load(path)["weight"], torch.ones(3))
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": "ü"}
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.pth"]
    with pytest.raises(TypeError):
        checkpoint.write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": "ü"}
    with refused("/dev/null/x.pth", "could not be written"):
        checkpoint.save_tensors("/dev/null/x.pth", {})


def test_a_full_disk_leaves_the_old_file(tmp_path):
    """The system's limit on a file's size stands in for the disk: torch.save meets the same failing write."""
    path = tmp_path / "state/training.pth"
    checkpoint.save_state(tmp_path, {"trained": {"w": torch.ones(3)}, "optimizer": {}}, 1)
    pid = os.fork()
    if pid == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            checkpoint.save_state(tmp_path, {"w": torch.ones(100_000)}, 2)
            os._exit(1)
        except UserError as error:
            os._exit(0 if str(path) in str(error) else 2)
        except BaseException:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert checkpoint.load_state(tmp_path)["step"] == 1
    assert os.listdir(tmp_path / "state") == ["training.pth"]


def test_a_full_disk_is_said_in_few_words_whoever_meets_it():
    full = OSError(28, "No space left on device")
    shared = CheckpointException("write", {1: (full, traceback.extract_stack())})  # of process 1
    assert checkpoint.reason(parallel.first(full)) == checkpoint.reason(parallel.first(shared)) == "No space left on device"
    writer = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")
    assert checkpoint.reason(writer) == "No space left?"


def test_killed_while_saving_the_state_is_an_old_or_a_new_one(tmp_path):
    dice, seen = random.Random(1), set()
    for _ in range(12):
        pid = os.fork()
        if pid == 0:
            try:
                for step in range(10**6):
                    trained = {"w": torch.full((300_000,), float(step))}
                    checkpoint.save_state(tmp_path, {"trained": trained, "optimizer": {}}, step)
            finally:
                os._exit(1)
        time.sleep(dice.uniform(0.01, 0.08))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        state = checkpoint.load_state(tmp_path)
        if state is not None:
            assert (state["trained"]["w"] == state["step"]).all()
            seen.add(state["step"])
    assert len(seen) > 1


def test_state_round_trip(tmp_path):
    assert checkpoint.load_state(tmp_path) is None
    w = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([w])
    w.sum().backward()
    optimizer.step()
    state = {"trained": {"w": w}, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    checkpoint.save_state(tmp_path, state | {"b": [1, (2.5, None, "x", True)]}, 7)
    again = checkpoint.load_state(tmp_path)
    assert again["step"] == 7 and again["b"] == [1, (2.5, None, "x", True)] and torch.equal(again["trained"]["w"], w)
    assert torch.equal(again["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert torch.equal(again["rng"], torch.get_rng_state())
    with pytest.raises(AssertionError):
        checkpoint.save_state(tmp_path, {"loss": np.float64(1)}, 8)  # could be saved, but not loaded
    assert checkpoint.load_state(tmp_path)["step"] == 7


@pytest.mark.parametrize("state", [
    [1, 2], torch.ones(1), {}, {"step": 1, "trained": {}}, {"step": "1", "trained": {}, "optimizer": {}},
    {"step": 1, "trained": [], "optimizer": {}}, {"step": 1, "trained": {}, "optimizer": None},
], ids=str)  # fmt: skip
def test_a_state_that_is_none(tmp_path, state):
    checkpoint.save_tensors(tmp_path / "state/training.pth", state)
    with refused(tmp_path / "state/training.pth", "step, trained, optimizer", "remove it", "--no-resume"):
        checkpoint.load_state(tmp_path)


# --- run directories


def test_a_state_of_no_step_is_none(tmp_path):
    for name in ("step-x", "step--1", "step-\u00b2", "step-3"):
        (tmp_path / "state" / name).mkdir(parents=True)
        (tmp_path / "state" / name / ".metadata").touch()
    assert parallel.Shards.saved(tmp_path) == {"step": 3}
    checkpoint.save_state(tmp_path, {"trained": {}, "optimizer": {}}, -1)
    with refused(tmp_path / "state/training.pth", "remove it"):
        checkpoint.load_state(tmp_path)


@pytest.fixture
def parts(tmp_path, tiny_tokenizer):
    """Folders of a LLaMA with its tokenizer and of a ViT, and what they make together."""
    llama = write_raw(their_llama(4, vocab_size=tiny_tokenizer.vocab_size()), tmp_path / "llama")
    (llama / "tokenizer.model").write_bytes(tiny_tokenizer.serialized_model_proto())
    torch.save(in_openai_layout(their_clip()), tmp_path / "vit.pt")
    return tmp_path, checkpoint.build(load_llama(llama), load_vision(tmp_path / "vit.pt"), seed=3)


def save(root, llava, stage, template="vicuna_v0"):
    config = {"vision": str(root / "vit.pt"), "llama": str(root / "llama"), "template": template}
    save_run(root / "run", llava, config, root / "llama/tokenizer.model", stage)


@pytest.mark.parametrize("stage", [1, 2])
def test_run_round_trip(parts, tiny_tokenizer, stage, monkeypatch):
    root, llava = parts
    (root / "run/.new").mkdir(parents=True)
    (root / "run/.new/params.json").write_text("{}")  # left by a save that was killed
    monkeypatch.chdir(root)
    save(Path(), llava, stage)  # relative paths
    monkeypatch.chdir("/")
    again, tokenizer, config = load_run(root / "run")
    assert equal(again, llava) and again.vision.feature_layer == llava.vision.feature_layer
    assert tokenizer.encode("A cat.") == tiny_tokenizer.encode("A cat.")
    paths = {"vision": str(root / "vit.pt"), "llama": str(root / "llama")}
    assert config == {**paths, "template": "vicuna_v0", "stage": stage}
    files = {"config.json", "vision.json", "projector.pth"}
    more = {"params.json", "consolidated.00.pth", "tokenizer.model"} if stage == 2 else set()
    assert {p.name for p in (root / "run").iterdir()} == files | more
    before = {p.name: p.read_bytes() for p in (root / "run").iterdir()}
    save(root, again, stage)  # over itself, and to the same bytes
    assert {p.name: p.read_bytes() for p in (root / "run").iterdir()} == before
    if stage == 2:
        shutil.rmtree(root / "llama")
        assert equal(load_run(root / "run", torch.bfloat16)[0].llama, copy.deepcopy(llava.llama).bfloat16())
        assert equal(load_llama(root / "run"), llava.llama)  # as --llama of another run


def test_run_with_another_vit_or_llama_is_refused(parts):
    root, llava = parts
    save(root, llava, 1)
    (root / "vit.pt").rename(root / "moved.pt")
    with refused(root / "run/vision.json", str(root / "vit.pt"), "not there any more", "'path'"):
        load_run(root / "run")
    torch.save(in_openai_layout(their_clip()) | {"visual.proj": torch.ones(1)}, root / "vit.pt")
    with refused(root / "vit.pt", "sha256", str(root / "run")):
        load_run(root / "run")
    vision = json.loads((root / "run/vision.json").read_text())
    (root / "run/vision.json").write_text(json.dumps(vision | {"path": str(root / "moved.pt")}))  # the remedy works
    assert equal(load_run(root / "run")[0], llava)
    (root / "llama").rename(root / "elsewhere")
    with refused(root / "run/config.json", str(root / "llama"), "'llama'"):
        load_run(root / "run")


@pytest.mark.parametrize("name, changes", [
    ("vision.json", {"feature_layer": [1]}), ("vision.json", {"feature_layer": None}), ("vision.json", {"path": 3}),
    ("vision.json", {"path": "/dev/zero"}), ("vision.json", {"path": "a" * 10_000}), ("vision.json", {"path": "\n\0"}),
    ("config.json", {"llama": ""}), ("config.json", {"llama": "a/" * 5000}), ("config.json", {"stage": {}}),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_runs_with_hostile_settings_are_refused(parts, name, changes):
    root, llava = parts
    save(root, llava, 1)
    path = root / "run" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with refused(root / "run", name) as check:
        load_run(root / "run")
    assert len(str(check.info.value)) < 1000


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_over_deltas(parts, stage):
    """Of stage 1 it needs the base again; of stage 2 it has all of the LLaMA, and nothing begun from it asks for one."""
    root, llava = parts
    write_hf(their_llama(4, vocab_size=llava.llama.config.vocab_size), root / "delta", "bin")
    zero = {name: torch.zeros_like(weight) for name, weight in torch.load(root / "delta/pytorch_model.bin").items()}
    torch.save(zero, root / "delta/pytorch_model.bin")
    shutil.copy(root / "llama/tokenizer.model", root / "delta/tokenizer.model")
    paths = {"vision": str(root / "vit.pt"), "llama": str(root / "delta"), "llama_base": str(root / "llama")}
    save_run(root / "run", llava, paths, root / "llama/tokenizer.model", stage)
    assert equal(load_run(root / "run")[0], llava)
    begun = argparse.Namespace(init_from=root / "run", stage=1, parallel="ddp")
    assert train.start_model(begun, torch.float32)[2].get("llama_base") == (paths["llama_base"] if stage == 1 else None)
    (root / "llama").rename(root / "away")
    if stage == 2:
        return load_run(root / "run")
    with refused(root / "run/config.json", "'llama_base'"):
        load_run(root / "run")
    config = json.loads((root / "run/config.json").read_text())
    (root / "run/config.json").write_text(json.dumps(config | {"llama_base": [5]}))
    with refused(root / "run/config.json", "'llama_base'"):
        load_run(root / "run")


def test_a_run_whose_parts_do_not_fit_is_named(parts):
    root, llava = parts
    save(root, llava, 1)
    torch.save({"weight": torch.ones(64, 3)}, root / "run/projector.pth")
    with refused(root / "run", "the projector's weight is (64, 3)"):
        load_run(root / "run")


def test_a_tokenizer_of_another_llama_is_refused(parts, tiny_tokenizer):
    root, llava = parts
    path, pieces = root / "llama/tokenizer.model", tiny_tokenizer.vocab_size()
    for rows, words in ((pieces - 1, "only"), (pieces, None), (pieces + 256, None), (pieces + 257, "only")):
        llama = Mock(config=LLaMAConfig(vocab_size=rows))
        if words is None:
            assert checkpoint.open_tokenizer(path, llama).vocab_size() == pieces
        else:
            with refused(path, words, str(rows), str(pieces), "came with it"):
                checkpoint.open_tokenizer(path, llama)


def test_unfinished_runs_are_refused(parts):
    root, llava = parts
    with refused(root / "nothing", "no finished run"):
        load_run(root / "nothing")
    for name in ("config.json", "vision.json", "projector.pth"):
        save(root, llava, 1)
        (root / "run" / name).unlink()
        with refused(root / "run" / name if name != "config.json" else root / "run", "no finished run"):
            load_run(root / "run")
    save(root, llava, 1)
    (root / "run/config.json").write_text("{}")
    with refused(root / "run", "config.json"):
        load_run(root / "run")


def test_a_save_stopped_anywhere_never_mixes_old_and_new(parts, monkeypatch):
    root, old = parts
    new = copy.deepcopy(old)
    with torch.no_grad():
        for p in [*new.llama.parameters(), *new.projector.parameters()]:
            p.add_(1)
    ends = []
    for name, stop in [(name, n) for name in ("replace", "fsync", "unlink") for n in range(40)]:
        save(root, old, 2, "old")
        calls, real = [0], getattr(os, name)

        def failing(*arguments, **settings):
            calls[0] += 1
            if calls[0] > stop:
                raise KeyboardInterrupt
            return real(*arguments, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            try:
                save(root, new, 2, "new")
            except KeyboardInterrupt:
                pass
        assert not (root / "run/.new").exists() or name == "unlink"
        try:
            found, _, config = load_run(root / "run")
            assert equal(found, old if config["template"] == "old" else new), (name, stop)
            ends.append(config["template"])
        except UserError as error:
            assert "no finished run" in str(error)
            ends.append("refused")
        if calls[0] <= stop:
            break
    assert {"old", "new", "refused"} == set(ends), ends


def test_checksum_of_a_folder_sees_its_weights(tmp_path):
    their_clip().save_pretrained(tmp_path / "clip")
    before = checkpoint.checksum(tmp_path / "clip")
    (tmp_path / "clip/README.md").write_text("hello")
    assert checkpoint.checksum(tmp_path / "clip") == before
    with open(tmp_path / "clip/model.safetensors", "r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"\x55")
    changed = checkpoint.checksum(tmp_path / "clip")
    (tmp_path / "clip/config.json").write_text("{}")
    assert len({before, changed, checkpoint.checksum(tmp_path / "clip")}) == 3


# --- the three parts together


def test_build(parts):
    root, llava = parts
    torch.manual_seed(99)
    dice = torch.get_rng_state()
    again = checkpoint.build(llava.llama, llava.vision, seed=3)
    assert isinstance(again, LLaVA) and torch.equal(again.projector.weight, llava.projector.weight)
    assert torch.equal(torch.get_rng_state(), dice)  # the caller's dice are not touched
    assert not torch.equal(checkpoint.build(llava.llama, llava.vision, seed=4).projector.weight, llava.projector.weight)
    W = Projection(128, 64)
    assert checkpoint.build(llava.llama, llava.vision, W).projector is W
    with pytest.raises(UserError, match=r"\(128, 64\).*dim is 64.*width 128"):
        checkpoint.build(llava.llama, llava.vision, Projection(64, 128))
