"""tools/import_llava.py: a finished LLaVA of each kind, and deltas, against transformers and against exact sums."""

import dataclasses
import json

import pytest
import torch
import transformers
from conftest import VIT, error, llama_twin, llama_twin_config, randomize, tiny_vit, vit_twin
from test_export import make_run

import checkpoint
from common import UserError
from model import LLaMA, LLaMAConfig, StreamAttention, position_ids
from tools import export
from tools.import_llava import import_llava
from vision import normalize

CONFIG = LLaMAConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=56, norm_eps=1e-5, rope_theta=100.0)
W, BIAS = torch.randn(32, VIT.width).half(), torch.randn(32).half()
CPU = torch.device("cpu")


def llama_for(sp, seed: int = 0, extra_rows: int = 1) -> LLaMA:
    return randomize(LLaMA(dataclasses.replace(CONFIG, vocab_size=sp.vocab_size() + extra_rows)), seed)


def write_huggingface(folder, llama: LLaMA, sp, more: dict | None = None, **settings):
    """A LLaMA's folder of transformers, with `more` weights and settings, in one pytorch_model.bin."""
    twin = llama_twin(llama).to(llama.norm.weight.dtype)
    twin.config.save_pretrained(folder)
    torch.save(twin.state_dict() | (more or {}), folder / "pytorch_model.bin")
    change_config(folder, **settings)
    (folder / "tokenizer.model").write_bytes(sp.serialized_model_proto())
    return folder


def change_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))


def write_original(folder, llama: LLaMA, sp, model_type="llava", **settings):
    """A LLaVA as originally released: a LLaMA's folder with W among the weights."""
    projector = {"model.mm_projector.weight": W, "model.mm_projector.bias": BIAS}
    return write_huggingface(folder, llama, sp, projector, model_type=model_type, mm_hidden_size=VIT.width, **settings)


def write_clip(folder):
    vit_twin(tiny_vit(-1)).save_pretrained(folder)
    return folder


def their_llava(llama: LLaMA, act="linear", bias=True) -> transformers.LlavaForConditionalGeneration:
    """A LLaVA of transformers with random weights and the sizes of `llama`. Pictures stand at its last id."""
    text = llama_twin_config(llama)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=vit_twin(tiny_vit()).config, text_config=text, image_token_id=text.vocab_size - 1,
        projector_hidden_act=act, vision_feature_layer=-2, multimodal_projector_bias=bias,
    ))  # fmt: skip
    return randomize(model.eval(), seed=1)


def write_llava(folder, theirs, sp, weights: dict | None = None):
    """A LLaVA's folder of transformers; weights: written in pytorch_model.bin, instead of the model's own files."""
    if weights is None:
        theirs.save_pretrained(folder, max_shard_size="300KB")
    else:
        theirs.config.save_pretrained(folder)
        torch.save(weights, folder / "pytorch_model.bin")
    (folder / "tokenizer.model").write_bytes(sp.serialized_model_proto())
    return folder


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# --- LLaVAs of transformers

OLD_NAMES = {  # of transformers before 4.52, from the names of today's modules
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


@pytest.mark.parametrize("names", ["on disk", "of the modules", "before 4.52"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_llava_of_transformers(tmp_path, tiny_tokenizer, names, bias):
    theirs = their_llava(llama_for(tiny_tokenizer), bias=bias)
    weights = None if names == "on disk" else theirs.state_dict()
    if names == "before 4.52":
        for new, old in OLD_NAMES.items():
            weights = {old + name.removeprefix(new) if name.startswith(new) else name: tensor
                       for name, tensor in weights.items()}  # fmt: skip
    folder = write_llava(tmp_path / "llava", theirs, tiny_tokenizer, weights)
    import_llava(folder, tmp_path / "run")
    folder.rename(tmp_path / "away")  # the run needs nothing of it
    model, _, config, _ = checkpoint.open_run(tmp_path / "run", CPU, "", stage=2, template="vicuna_v0")
    assert (model.projector.bias is not None) == bias
    assert config["precision"] == "fp32" and config["feature_layer"] == model.vision.feature_layer == -2
    pixels = torch.randint(0, 256, (1, 3, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.arange(3, 8), torch.full((9,), -1), torch.arange(8, 20)])
    image_id, borders = theirs.config.image_token_id, [0, len(ids)]
    with torch.no_grad():
        reference = theirs(input_ids=torch.where(ids < 0, image_id, ids)[None], pixel_values=normalize(pixels)).logits[0]
        x = model.llama(model.embed(ids, pixels), position_ids(borders), StreamAttention(borders))
        assert error(model.llama.logits(x), reference) < 1e-5


def test_a_run_directory_can_move_with_its_vit(tmp_path, tiny_tokenizer):
    folder = write_llava(tmp_path / "llava", their_llava(llama_for(tiny_tokenizer)), tiny_tokenizer)
    import_llava(folder, tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere/moved")
    checkpoint.load_run(tmp_path / "elsewhere/moved")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", [10**9, 50_000])
def test_an_export_is_imported_bit_for_bit(tmp_path, tiny_tokenizer, dtype, shard_size, monkeypatch):
    monkeypatch.setattr(export, "SHARD_SIZE", shard_size)
    run = make_run(tmp_path, tiny_tokenizer, bias=True, dtype=dtype)
    export.export(run, tmp_path / "hf")
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard_size == 50_000)
    import_llava(tmp_path / "hf", tmp_path / "again")
    before, after = (checkpoint.load_run(path, None)[0] for path in (run, tmp_path / "again"))
    for name, p in before.named_parameters():
        q = after.get_parameter(name)
        if name in ("llama.tok_embeddings.weight", "llama.output.weight"):
            q = q[:-1]  # the last row is that of <image>
        assert q.dtype == p.dtype and torch.equal(q, p), name
    assert after.vision.feature_layer == before.vision.feature_layer
    export.export(tmp_path / "again", tmp_path / "hf2")  # it has a spare row now, so the vocabulary stays as it is
    import_llava(tmp_path / "hf2", tmp_path / "third")
    for name in ("consolidated.00.pth", "projector.pth", "vision.pth"):
        assert (tmp_path / "third" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_projector_with_an_activation_is_refused(tmp_path, tiny_tokenizer):
    llama = llama_for(tiny_tokenizer)
    folder = write_llava(tmp_path / "llava", their_llava(llama, act="gelu"), tiny_tokenizer)
    with pytest.raises(UserError, match="LLaVA-1.5 and later"):
        import_llava(folder, tmp_path / "run")
    mlp = {"model.mm_projector.0.weight": W, "model.mm_projector.2.weight": torch.ones(32, 32)}
    folder = write_huggingface(tmp_path / "later", llama, tiny_tokenizer, mlp, model_type="llava_llama")
    with pytest.raises(UserError, match="LLaVA-1.5 and later"):
        import_llava(folder, tmp_path / "run", vision=write_clip(tmp_path / "clip"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, tensor, word", [
    ("linear_2.weight", torch.ones(32, 33), "linear_2.weight: copying"),
    ("linear_1.weight", torch.ones(()), "linear_1.weight: copying"),
    ("linear_1.bias", torch.ones(1), "linear_1.bias: copying"),
    ("linear_2.bias", None, "Missing key.*linear_2.bias"),
    ("linear_2.weight", torch.ones(32, 32).long(), "int64"),
])  # fmt: skip
def test_projectors_of_transformers_that_do_not_fit(tmp_path, tiny_tokenizer, name, tensor, word):
    theirs = their_llava(llama_for(tiny_tokenizer))
    weights = theirs.state_dict() | {f"model.multi_modal_projector.{name}": tensor}
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(UserError, match=word):
        import_llava(write_llava(tmp_path / "llava", theirs, tiny_tokenizer, weights), tmp_path / "run")


def test_a_vision_config_that_the_weights_contradict_is_refused(tmp_path, tiny_tokenizer):
    folder = write_llava(tmp_path / "llava", their_llava(llama_for(tiny_tokenizer)), tiny_tokenizer)
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    change_config(folder, vision_config=vision | {"image_size": 224})
    with pytest.raises(UserError, match="image_size is 224, but only 42 is supported"):
        import_llava(folder, tmp_path / "run")
    assert not list(tmp_path.glob("*run*"))  # nor a temporary folder


# --- LLaVAs of the original release


@pytest.mark.parametrize("model_type", ["llava", "llava_llama", "llama"])
def test_a_llava_of_the_original_release(tmp_path, tiny_tokenizer, model_type):
    llama = llama_for(tiny_tokenizer)
    folder = write_original(tmp_path / "llava", llama, tiny_tokenizer, model_type, mm_vision_select_layer=-2)
    import_llava(folder, tmp_path / "run", vision=write_clip(tmp_path / "clip"))
    model, _, _ = checkpoint.load_run(tmp_path / "run")
    assert same(model.llama, llama) and same(model.vision, tiny_vit())
    assert torch.equal(model.projector.weight, W.float()) and torch.equal(model.projector.bias, BIAS.float())
    with pytest.raises(UserError, match="has no ViT; .*--vision"):
        import_llava(folder, tmp_path / "other")


def test_a_llava_without_any_setting_of_its_own(tmp_path, tiny_tokenizer):
    """As in April 2023: only the names of the weights tell that it is one."""
    llama = llama_for(tiny_tokenizer)
    folder = write_huggingface(tmp_path / "llava", llama, tiny_tokenizer, {"model.mm_projector.weight": W})
    with pytest.raises(UserError, match="a finished LLaVA; .*tools.import_llava"):
        checkpoint.load_llama(folder)
    import_llava(folder, tmp_path / "run", vision=write_clip(tmp_path / "clip"))
    model, _, config = checkpoint.load_run(tmp_path / "run")
    assert same(model.llama, llama) and torch.equal(model.projector.weight, W.float())
    assert config["feature_layer"] == -1


@pytest.mark.parametrize("settings, layer", [
    ({}, -1), ({"mm_vision_select_layer": -2}, -2), ({"mm_vision_select_layer": -3}, -3),
])  # fmt: skip
def test_the_feature_layer_of_the_original_release(tmp_path, tiny_tokenizer, settings, layer):
    folder = write_original(tmp_path / "llava", llama_for(tiny_tokenizer), tiny_tokenizer, **settings)
    import_llava(folder, tmp_path / "run", vision=write_clip(tmp_path / "clip"))
    assert checkpoint.load_run(tmp_path / "run")[0].vision.feature_layer == layer


@pytest.mark.parametrize("settings, word", [
    ({"mm_vision_select_layer": [-2, -5]}, "the feature layer is \\[-2, -5\\], expected"),
    ({"mm_vision_select_layer": None}, "the feature layer is None, expected an integer"),
    ({"mm_vision_select_layer": -5}, "feature layer -5, expected -4 to -1"),
    ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
    ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy is 'full'"),
    ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres'"),
    ({"image_aspect_ratio": "pad"}, "image_aspect_ratio is 'pad': .*crops"),
    ({"model_type": "llava_mistral"}, "model_type is 'llava_mistral'"),
])  # fmt: skip
def test_other_llavas_are_refused(tmp_path, tiny_tokenizer, settings, word):
    folder = write_original(tmp_path / "llava", llama_for(tiny_tokenizer), tiny_tokenizer, **{"model_type": "llava", **settings})
    with pytest.raises(UserError, match=word):
        import_llava(folder, tmp_path / "run", vision=write_clip(tmp_path / "clip"))
    assert not list(tmp_path.glob("*run*"))


def test_what_the_training_did_otherwise_is_reported(tmp_path, tiny_tokenizer, capsys):
    folder = write_original(tmp_path / "llava", llama_for(tiny_tokenizer), tiny_tokenizer)
    clip = write_clip(tmp_path / "clip")
    import_llava(folder, tmp_path / "run", vision=clip)
    assert "was trained" not in capsys.readouterr().out
    change_config(folder, mm_use_im_start_end=True, image_aspect_ratio="square")
    import_llava(folder, tmp_path / "run2", vision=clip)
    printed = capsys.readouterr().out
    assert "<im_start>" in printed
    assert "vicuna_v0" in printed and f"python chat.py --model {tmp_path / 'run2'} --image PICTURE" in printed


# --- a LLaMA with a projector


@pytest.mark.parametrize("kind", ["huggingface", "raw"])
def test_a_llama_with_a_projector(tmp_path, tiny_tokenizer, kind):
    llama, folder, clip = llama_for(tiny_tokenizer), tmp_path / "vicuna", write_clip(tmp_path / "clip")
    write_huggingface(folder, llama, tiny_tokenizer)
    if kind == "raw":
        (folder / "config.json").unlink()
        checkpoint.save_llama(llama.config, {name: p.detach() for name, p in llama.named_parameters()}, folder)
    torch.save({"model.mm_projector.weight": W}, tmp_path / "mm_projector.bin")
    import_llava(folder, tmp_path / "run", vision=clip, projector=tmp_path / "mm_projector.bin")
    model, _, _ = checkpoint.load_run(tmp_path / "run")
    assert same(model.llama, llama) and same(model.vision, tiny_vit()) and torch.equal(model.projector.weight, W.float())
    with pytest.raises(UserError, match="has no projector; .*--projector"):
        import_llava(folder, tmp_path / "other", vision=clip)
    with pytest.raises(UserError, match="has no ViT; .*--vision"):
        import_llava(folder, tmp_path / "other", projector=tmp_path / "mm_projector.bin")
    torch.save({"weight": torch.ones(32, 3)}, tmp_path / "narrow.pth")
    with pytest.raises(UserError, match=r"projector's weight is \(32, 3\)"):
        import_llava(folder, tmp_path / "other", vision=clip, projector=tmp_path / "narrow.pth")
    assert not list(tmp_path.glob("*other*"))


def test_targets_and_runs_that_exist_are_refused(tmp_path, tiny_tokenizer):
    folder = write_original(tmp_path / "llava", llama_for(tiny_tokenizer), tiny_tokenizer)
    with pytest.raises(UserError, match="exists already"):
        import_llava(folder, folder)
    run = make_run(tmp_path, tiny_tokenizer)
    with pytest.raises(UserError, match=f"run directory already; .* chat.py --model {run}"):
        import_llava(run, tmp_path / "other")
    (tmp_path / "empty").mkdir()
    import_llava(folder, tmp_path / "empty", vision=write_clip(tmp_path / "clip"))


# --- deltas


def deltas_over(base: LLaMA, extra_rows: int) -> tuple[LLaMA, dict[str, torch.Tensor]]:
    """fp16 deltas with rows for added words -> the LLaMA that holds them, and the fp16 sums that they stand for."""
    rows = base.config.vocab_size + extra_rows
    llama = LLaMA(dataclasses.replace(base.config, vocab_size=rows)).half()
    sums = {}
    with torch.no_grad():
        for name, p in llama.named_parameters():
            p.copy_(0.01 * torch.randn_like(p))
            sums[name] = p.detach().clone()
            weight = base.get_parameter(name)
            sums[name][: len(weight)] = weight.half() + p[: len(weight)]
    return llama, sums


@pytest.fixture
def base(tmp_path, tiny_tokenizer):
    """A raw LLaMA folder, and the model."""
    llama = llama_for(tiny_tokenizer, seed=5, extra_rows=0)
    checkpoint.save_llama(llama.config, {name: p.detach() for name, p in llama.named_parameters()}, tmp_path / "base")
    (tmp_path / "base/tokenizer.model").write_bytes(tiny_tokenizer.serialized_model_proto())
    return tmp_path / "base", llama


@pytest.mark.parametrize("kind", ["raw", "huggingface"])
def test_deltas_over_a_llama_become_a_llama(tmp_path, tiny_tokenizer, base, kind, capsys):
    base, base_llama = base
    if kind == "huggingface":
        base = write_huggingface(tmp_path / "hf base", base_llama, tiny_tokenizer)
    deltas, sums = deltas_over(base_llama, 1)
    folder = write_huggingface(tmp_path / "vicuna", deltas, tiny_tokenizer)
    (folder / "tokenizer.model").unlink()  # then it is that of the base
    import_llava(folder, tmp_path / "out", base)
    llama = checkpoint.load_llama(tmp_path / "out", None)
    assert all(p.dtype == torch.float16 and torch.equal(p, sums[name]) for name, p in llama.named_parameters())
    files = {"params.json", "consolidated.00.pth", "tokenizer.model"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert f"train.py --stage 1 --llama {tmp_path / 'out'}" in capsys.readouterr().out


def test_the_base_may_lie_as_meta_publishes_it(tmp_path, tiny_tokenizer, base):
    base, base_llama = base
    base.rename(tmp_path / "7B")  # with tokenizer.model one folder above
    (tmp_path / "7B/tokenizer.model").rename(tmp_path / "tokenizer.model")
    folder = write_huggingface(tmp_path / "vicuna", deltas_over(base_llama, 1)[0], tiny_tokenizer)
    (folder / "tokenizer.model").unlink()
    import_llava(folder, tmp_path / "out", tmp_path / "7B")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tiny_tokenizer.serialized_model_proto()


def test_deltas_of_a_llava_become_a_run(tmp_path, tiny_tokenizer, base):
    deltas, sums = deltas_over(base[1], 3)
    folder = write_original(tmp_path / "llava", deltas, tiny_tokenizer)
    import_llava(folder, tmp_path / "run", base[0], vision=write_clip(tmp_path / "clip"))
    model, _, config = checkpoint.load_run(tmp_path / "run", None)
    assert all(torch.equal(p, sums[name]) for name, p in model.llama.named_parameters())
    assert torch.equal(model.projector.weight, W.float())  # W has no base: it is complete
    assert config["precision"] == "bf16"


def test_deltas_and_bases_that_do_not_fit_are_refused(tmp_path, tiny_tokenizer, base):
    base, base_llama = base
    before = (base / "consolidated.00.pth").read_bytes()
    deltas, _ = deltas_over(base_llama, 1)
    clip = write_clip(tmp_path / "clip")
    vicuna = write_huggingface(tmp_path / "vicuna", deltas, tiny_tokenizer)
    llava = write_original(tmp_path / "llava", deltas, tiny_tokenizer)
    complete = write_original(tmp_path / "complete", base_llama, tiny_tokenizer)
    with pytest.raises(UserError, match="holds deltas .* --llama-base"):
        import_llava(llava, tmp_path / "run", vision=clip)
    with pytest.raises(UserError, match="--llama-base alone"):
        import_llava(vicuna, tmp_path / "run")
    with pytest.raises(UserError, match="not deltas .* leave out --llama-base"):
        import_llava(complete, tmp_path / "run", base, vision=clip)
    with pytest.raises(UserError, match="Meta's raw format, but deltas come in Hugging Face's"):
        import_llava(base, tmp_path / "run", base)
    for changes, word in (({"n_layers": 1}, "2 layers, --llama-base has 1"), ({"dim": 64}, "use the LLaMA of the same size"),
                          ({"vocab_size": deltas.config.vocab_size + 1}, "tok_embeddings.weight")):  # fmt: skip
        other = LLaMA(dataclasses.replace(base_llama.config, **changes))
        checkpoint.save_llama(other.config, {name: p.detach() for name, p in other.named_parameters()}, tmp_path / "other")
        with pytest.raises(UserError, match=word):
            import_llava(vicuna, tmp_path / "run", tmp_path / "other")
    assert not list(tmp_path.glob("*run*"))
    assert (base / "consolidated.00.pth").read_bytes() == before


@pytest.mark.parametrize("kind", ["llava", "deltas"])
def test_train_py_names_this_tool_for_what_it_cannot_take(tmp_path, tiny_tokenizer, base, kind):
    if kind == "llava":
        folder = write_original(tmp_path / "llava", llama_for(tiny_tokenizer), tiny_tokenizer)
    else:
        folder = write_huggingface(tmp_path / "vicuna", deltas_over(base[1], 1)[0], tiny_tokenizer)
    with pytest.raises(UserError, match="python -m tools.import_llava"):
        checkpoint.load_llama(folder)
