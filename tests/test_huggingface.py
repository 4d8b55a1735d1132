"""formats/huggingface.py: files, settings and names of Hugging Face's folders, both directions, against transformers."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from conftest import error, in_transformers, llama_twin, llama_twin_config, llava_twin, tiny_llama, tiny_llava, tiny_vit, vit_twin

import checkpoint
from common import UserError
from formats import huggingface
from model import LLaMAConfig, StreamAttention, position_ids

FOLDER = Path("folder")
PATH = FOLDER / "config.json"
HEAD_DIM = tiny_llama().config.head_dim


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- weight_files

SAFE_INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12"


def write_index(path, files):
    path.write_text(json.dumps({"weight_map": {f"tensor{i}": file for i, file in enumerate(files)}}))


def write_folder(folder, names: list[str], pointers: list[str] = ()):
    """Empty files of these names, indices of two parts each, and pointers of Git LFS."""
    for name in names:
        if name.endswith(".index.json"):
            ending = "safetensors" if name == SAFE_INDEX else "bin"
            write_index(folder / name, [f"b.{ending}", f"a.{ending}", f"b.{ending}"])
        else:
            (folder / name).touch()
    for name in pointers:
        (folder / name).write_bytes(LFS_POINTER)


@pytest.mark.parametrize("names, pointers, expected", [
    (["pytorch_model.bin"], [], ["pytorch_model.bin"]),
    (["model.safetensors", "pytorch_model.bin"], [], ["model.safetensors"]),
    ([SAFE_INDEX, "a.safetensors", "b.safetensors", "pytorch_model.bin"], [], ["a.safetensors", "b.safetensors"]),
    ([SAFE_INDEX, BIN_INDEX, "a.safetensors", "b.safetensors"], [], ["a.safetensors", "b.safetensors"]),
    ([SAFE_INDEX, BIN_INDEX, "a.bin", "b.bin", "a.safetensors"], [], ["a.bin", "b.bin"]),
    (["model.safetensors", BIN_INDEX], [], ["model.safetensors"]),
    (["model.safetensors"], ["pytorch_model.bin"], ["model.safetensors"]),
    (["pytorch_model.bin"], ["model.safetensors"], ["pytorch_model.bin"]),
    ([SAFE_INDEX, "a.safetensors", "pytorch_model.bin"], ["b.safetensors"], ["pytorch_model.bin"]),
    ([BIN_INDEX, "a.bin", "b.bin"], [SAFE_INDEX], ["a.bin", "b.bin"]),
])  # fmt: skip
def test_the_first_complete_set_counts(tmp_path, names, pointers, expected):
    write_folder(tmp_path, names, pointers)
    assert huggingface.weight_files(tmp_path) == [tmp_path / name for name in expected]


@pytest.mark.parametrize("names, pointers, words", [
    ([], [], ["model.safetensors", "pytorch_model.bin", "none of them"]),
    ([SAFE_INDEX, "a.safetensors"], [], [SAFE_INDEX, "parts b.safetensors"]),
    ([], ["model.safetensors"], ["Git LFS", "model.safetensors", "git lfs pull"]),
    ([SAFE_INDEX], ["a.safetensors", "pytorch_model.bin"], ["b.safetensors", "a.safetensors", "git lfs pull"]),
])  # fmt: skip
def test_incomplete_folders_name_what_is_missing(tmp_path, names, pointers, words):
    write_folder(tmp_path, names, pointers)
    with pytest.raises(UserError) as info:
        huggingface.weight_files(tmp_path)
    assert all(word in str(info.value) for word in [str(tmp_path), *words]), info.value


def test_what_is_left_of_another_download_does_not_count(tmp_path):
    """LLaMA and CLIP alike: an index of absent parts, an old index, and Git LFS pointers beside whole files."""
    for name, twin, load in (("llama", llama_twin(tiny_llama()), checkpoint.load_llama),
                             ("clip", vit_twin(tiny_vit(-1)), checkpoint.load_vision)):  # fmt: skip
        folder = tmp_path / name
        write_folder_of(twin, folder, "safetensors")
        write_index(folder / BIN_INDEX, ["absent.bin"])
        write_index(folder / SAFE_INDEX, ["absent.safetensors"])
        (folder / "pytorch_model.bin").write_bytes(LFS_POINTER)
        load(folder)
        folder = tmp_path / f"{name} in parts"
        write_folder_of(twin, folder, "safetensors index")
        write_index(folder / BIN_INDEX, ["absent.bin"])
        load(folder)


@pytest.mark.parametrize("place", [["a"], {}, None, 7, "", "a\0b", "a\nb", "../a.bin", "..", "/a", "\ud800"], ids=repr)
def test_an_index_names_only_files_of_its_folder(tmp_path, place):
    write_index(tmp_path / BIN_INDEX, [place])
    with pytest.raises(UserError, match="pytorch_model.bin.index.json: expected a weight_map"):
        huggingface.weight_files(tmp_path)


# --- LLaMA


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_llama_config_of_transformers(n_kv_heads):
    llama = tiny_llama(n_kv_heads)
    config = llama_twin_config(llama).to_dict()
    wanted = vars(llama.config)
    assert huggingface.llama_config(config, PATH) == wanted
    assert huggingface.llama_config({"model_type": "llava", "text_config": config}, PATH) == wanted
    assert huggingface.llama_config(config | {"model_type": "llava", "mm_hidden_size": 1024}, PATH) == wanted
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    assert huggingface.llama_config(old | {"rope_theta": 100.0, "rope_scaling": None}, PATH) == wanted
    assert huggingface.llama_config(config | {"rope_theta": 10000.0}, PATH) == wanted  # as transformers reads both
    assert huggingface.llama_config(old, PATH) == wanted | {"rope_theta": 10000.0}
    assert huggingface.llama_config(config | {"rms_norm_eps": None}, PATH) == wanted | {"norm_eps": 1e-6}


def test_a_text_config_may_leave_out_what_llama_7b_has():
    config = {"model_type": "llava", "text_config": {"num_hidden_layers": 40, "hidden_size": 5120,
              "num_attention_heads": 40, "intermediate_size": 13824, "rms_norm_eps": 1e-5}}  # fmt: skip
    fields = huggingface.llama_config(config, PATH)
    assert LLaMAConfig(**fields) == LLaMAConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, ffn_dim=13824,
                                                norm_eps=1e-5)  # fmt: skip


@pytest.mark.parametrize("changes, word", [
    ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ({"model_type": "llava_mistral", "mm_hidden_size": 1024}, "model_type is 'llava_mistral'"),
    ({"model_type": None}, "model_type is None"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"attention_bias": True}, "attention_bias is True"),
    ({"mlp_bias": True}, "mlp_bias is True"),
    ({"head_dim": 32}, "head_dim is 32, but only 8"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": None}, "rope_scaling is 'linear'"),
    ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "rope_scaling is 'llama3'"),
    ({"rope_scaling": "linear", "rope_parameters": None}, "rope_scaling is 'linear'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"hidden_size": "64"}, "hidden_size is '64'"),
    ({"hidden_size": -64}, "hidden_size is -64"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
    ({"num_attention_heads": 1.5}, "num_attention_heads is 1.5"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"text_config": []}, "text_config is \\[\\]"),
    ({"model_type": "m" * 5000}, "model_type is 'mmm"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_configs_of_other_models_are_refused(changes, word):
    config = llama_twin_config(tiny_llama()).to_dict() | changes
    with pytest.raises(UserError, match=f"folder/config.json: {word}") as info:
        huggingface.llama_config(config, PATH)
    assert len(str(info.value)) < 250


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_llama_names_and_row_order(n_kv_heads):
    llama = tiny_llama(n_kv_heads)
    raw = dict(llama.named_parameters())
    without_prefix = in_transformers(llama)
    lm_head = {"lm_head.weight": without_prefix.pop("lm_head.weight")}
    named = {f"model.{name}": weight for name, weight in without_prefix.items()} | lm_head
    assert same(huggingface.llama_to_raw(named, HEAD_DIM, PATH), raw)
    assert same(huggingface.llama_to_raw(without_prefix | lm_head, HEAD_DIM, PATH), raw)
    assert same(huggingface.llama_from_raw(raw, HEAD_DIM), named)


def test_buffers_are_dropped():
    named = huggingface.llama_from_raw(dict(tiny_llama().named_parameters()), HEAD_DIM)
    buffers = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq",
               "model.layers.1.self_attn.rotary_emb.cos_cached", "layers.1.self_attn.rotary_emb.sin_cached"]  # fmt: skip
    raw = huggingface.llama_to_raw(named | dict.fromkeys(buffers, torch.ones(4)), HEAD_DIM, PATH)
    assert raw.keys() == dict(tiny_llama().named_parameters()).keys()


@pytest.mark.parametrize("name", ["lm_head.weight_scale", "base_model.lm_head.weight", "model.layers.0.mlp.up_proj.bias",
                                  "model.layers.N.1.mlp.up_proj.weight", "model.mm_projector.weight"])  # fmt: skip
def test_unknown_names_are_refused(name):
    with pytest.raises(UserError, match=f"{PATH}: .*{name}"):
        huggingface.llama_to_raw({name: torch.ones(1)}, HEAD_DIM, PATH)


def test_a_tensor_under_two_names_is_refused():
    weights = {"model.norm.weight": torch.ones(32), "norm.weight": torch.ones(32)}
    with pytest.raises(UserError, match="norm.weight under two names"):
        huggingface.llama_to_raw(weights, HEAD_DIM, PATH)


@pytest.mark.parametrize("shape", [(), (32,), (33, 32)])
def test_rows_that_do_not_divide_into_heads_are_refused(shape):
    with pytest.raises(UserError, match=r"wk.weight is \(.*expected \(heads \* 8, dim\)"):
        huggingface.llama_to_raw({"model.layers.0.self_attn.k_proj.weight": torch.ones(shape)}, HEAD_DIM, PATH)


def test_tied_embeddings():
    embeddings = torch.randn(9, 32)
    weights = {"model.embed_tokens.weight": embeddings}
    assert huggingface.llama_to_raw(weights, HEAD_DIM, PATH).keys() == {"tok_embeddings.weight"}
    for tied in (weights, weights | {"lm_head.weight": embeddings.clone()}):
        raw = huggingface.llama_to_raw(tied, HEAD_DIM, PATH, tied=True)
        assert torch.equal(raw["output.weight"], embeddings)
    with pytest.raises(UserError, match="tie_word_embeddings, but lm_head.weight differs"):
        huggingface.llama_to_raw(weights | {"lm_head.weight": torch.ones(9, 32)}, HEAD_DIM, PATH, tied=True)


def write_folder_of(model, folder, kind: str):
    """kind: what holds the weights: "safetensors", "safetensors index", "bin" or "bin index"."""
    if kind.startswith("safetensors"):
        model.save_pretrained(folder, max_shard_size="20KB" if kind == "safetensors index" else "5GB")
        assert (folder / SAFE_INDEX).exists() == (kind == "safetensors index")
        return
    model.config.save_pretrained(folder)
    weights = model.state_dict()
    if kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
        return
    places = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        torch.save({name: weights[name] for name in weights if places[name] == file}, folder / file)
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def assert_same_logits(model, folder):
    """The LLaMA that `load_llama` reads computes the logits of the model of transformers."""
    ids = torch.arange(3, 20)
    llama = checkpoint.load_llama(folder)
    with torch.no_grad():
        x = llama(llama.tok_embeddings(ids), position_ids([0, len(ids)]), StreamAttention([0, len(ids)]))
        assert error(llama.logits(x), model(ids[None]).logits[0]) < 1e-5
    return llama


KINDS = ["safetensors", "safetensors index", "bin", "bin index"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_llama_folders_give_the_logits_of_transformers(tmp_path, kind, n_kv_heads):
    twin = llama_twin(tiny_llama(n_kv_heads))
    write_folder_of(twin, tmp_path, kind)
    assert_same_logits(twin, tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])  # without lm_head, and with both names for one memory
def test_tied_folders_give_the_logits_of_transformers(tmp_path, kind):
    config = llama_twin_config(tiny_llama())
    config.tie_word_embeddings = True
    twin = transformers.LlamaForCausalLM(config).eval()
    write_folder_of(twin, tmp_path, kind)
    llama = assert_same_logits(twin, tmp_path)
    with torch.no_grad():
        llama.output.weight.zero_()
    assert llama.tok_embeddings.weight.abs().sum() > 0  # the two matrices share no memory


# --- CLIP


def test_clip_config_of_transformers():
    sizes = {"width": 128, "layers": 3, "image_size": 42, "patch_size": 14}
    assert huggingface.clip_config(**sizes).items() <= vit_twin(tiny_vit()).config.to_dict().items()
    assert huggingface.clip_config(**huggingface.CLIP_BASE).items() <= transformers.CLIPVisionConfig().to_dict().items()


@pytest.mark.parametrize("part", ["vision", "clip", "llava"])
def test_vision_towers(part):
    vit = tiny_vit(-1)
    config, vision = vit_twin(vit).config.to_dict(), dict(vit_twin(vit).state_dict())
    config = {"vision": config, "clip": transformers.CLIPConfig(vision_config=config).to_dict(),
              "llava": {"model_type": "llava", "vision_config": config}}[part]  # fmt: skip
    assert same(huggingface.clip_tower(config, vision, FOLDER), dict(vit.named_parameters()))


@pytest.mark.parametrize("changes, word", [
    ({"model_type": "siglip_vision_model"}, "model_type is 'siglip_vision_model'"),
    ({"model_type": "llava"}, "model_type is 'llava'"),
    ({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}, "model_type is 'siglip"),
    ({"vision_config": 3}, "vision_config is 3"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"num_attention_heads": 4}, "num_attention_heads is 4, but only 2"),
    ({"num_attention_heads": None}, "num_attention_heads is 12, but only 2"),
    ({"hidden_size": 192}, "hidden_size is 192, but only 128"),
    ({"patch_size": 16}, "patch_size is 16, but only 14"),
    ({"intermediate_size": 3072}, "intermediate_size is 3072, but only 512"),
    ({"layer_norm_eps": 1e-6}, "layer_norm_eps is 1e-06"),
    ({"image_size": "large"}, "image_size is 'large'"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_vision_towers_of_other_makes_are_refused(changes, word):
    twin = vit_twin(tiny_vit())
    with pytest.raises(UserError, match=f"folder/config.json: {word}"):
        huggingface.clip_tower(twin.config.to_dict() | changes, twin.state_dict(), FOLDER)


def test_clip_names():
    vit = tiny_vit(-1)
    openai = dict(vit.named_parameters())
    clip = transformers.CLIPModel(transformers.CLIPConfig(
        vision_config=vit_twin(vit).config.to_dict(),
        text_config={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1},
    ))  # fmt: skip
    vision = vit_twin(vit).state_dict()
    bare = {name.removeprefix("vision_model."): weight for name, weight in vision.items()}
    clip.vision_model.load_state_dict(bare)
    ids = dict.fromkeys(("vision_model.embeddings.position_ids", "embeddings.position_ids"), torch.ones(1))
    assert same(huggingface.clip_to_openai(clip.state_dict() | ids, PATH), openai)
    assert same(huggingface.clip_to_openai(bare, PATH), openai)
    after = {name: weight for name, weight in bare.items() if name.startswith("post_layernorm.")}
    assert same(huggingface.clip_from_openai(openai) | after, bare)


def test_clip_weights_that_do_not_fit_are_refused():
    query, key = (f"vision_model.encoder.layers.0.self_attn.{part}_proj.bias" for part in "qk")
    value = key.replace("k_proj", "v_proj")
    for weights in ({query: torch.ones(4)}, {query: torch.ones(4), key: torch.ones(3), value: torch.ones(4)}):
        with pytest.raises(UserError, match="attn.q_proj_bias: k or v is missing or of another shape"):
            huggingface.clip_to_openai(weights, PATH)
    with pytest.raises(UserError, match="encoder.layers.0.layer_scale"):
        huggingface.clip_to_openai({"encoder.layers.0.layer_scale": torch.ones(4)}, PATH)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["clip_vision_model", "clip"])
def test_clip_folders_give_the_features_of_transformers(tmp_path, kind, model_type):
    model = vision = vit_twin(tiny_vit(-1))
    if model_type == "clip":
        model = transformers.CLIPModel(transformers.CLIPConfig(
            vision_config=vision.config.to_dict(),
            text_config={"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1},
        )).eval()  # fmt: skip
        vision = model.vision_model
    write_folder_of(model, tmp_path, kind)
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = vision(pixels, output_hidden_states=True).hidden_states
        for layer in (-1, -2, -4):
            features = checkpoint.load_vision(tmp_path, layer)(pixels)
            assert error(features, states[layer][:, 1:]) < 1e-5


# --- LLaVA


@pytest.mark.parametrize("config, expected", [
    ({"model_type": "llava"}, True),
    ({"model_type": "llava_llama", "mm_hidden_size": 1024}, True),
    ({"model_type": "llama", "mm_vision_select_layer": -2}, True),
    ({"model_type": "llama"}, False),
    ({"model_type": "llava_mistral", "mm_hidden_size": 1024}, False),
    ({"model_type": ["llava"]}, False),
    ({}, False),
])  # fmt: skip
def test_is_llava(config, expected):
    assert huggingface.is_llava(config) == expected


OLD_NAMES = {  # of transformers before 4.52, from the names of today's modules
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def test_parts_of_a_llava_of_transformers():
    llava = tiny_llava()
    weights = llava_twin(llava).state_dict()
    old = {}
    for name, weight in weights.items():
        prefix = next(prefix for prefix in OLD_NAMES if name.startswith(prefix))
        old[OLD_NAMES[prefix] + name.removeprefix(prefix)] = weight
    for names in (weights, old):
        parts = huggingface.llava_parts(names, PATH)
        assert same(parts["projector"], {"weight": llava.projector.weight})
        assert same(huggingface.llama_to_raw(parts["llama"], HEAD_DIM, PATH), dict(llava.llama.named_parameters()))
        vision = huggingface.clip_to_openai(parts["vision"], PATH)
        features = dict(llava.vision.named_parameters())  # without the block above the features
        assert same({name: vision[name] for name in features}, features)


def test_parts_of_a_llava_of_the_original_release():
    llama = huggingface.llama_from_raw(dict(tiny_llama().named_parameters()), HEAD_DIM)
    vision = huggingface.clip_from_openai(dict(tiny_vit(-1).named_parameters()))
    W = {"model.mm_projector.weight": torch.ones(32, 128), "model.mm_projector.bias": torch.ones(32)}
    tower = {f"model.vision_tower.vision_tower.vision_model.{name}": weight for name, weight in vision.items()}
    parts = huggingface.llava_parts(llama | W | tower, PATH)
    assert same(parts["llama"], llama)
    assert parts["projector"].keys() == {"weight", "bias"}
    assert same(huggingface.clip_to_openai(parts["vision"], PATH), dict(tiny_vit(-1).named_parameters()))
    with pytest.raises(UserError, match="multi_modal_projector.weight under two names"):
        huggingface.llava_parts(W | {"multi_modal_projector.weight": torch.ones(32, 128)}, PATH)
