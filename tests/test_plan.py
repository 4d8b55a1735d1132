import json

import pytest
import torch

import plan
import train
from checkpoint import build, llama_config
from conversation import UserError
from model import LLaMA, LLaMAConfig, flat_attention, positions
from vision import VisionConfig, VisionTransformer

SMALL = LLaMAConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=160, vocab_size=320)
VIT = VisionConfig(image_size=32, patch_size=8, width=128, layers=4)


def test_every_parameter_is_counted():
    block, words, W, vit = plan.sizes(SMALL, VIT)
    with torch.device("meta"):
        model = build(LLaMA(SMALL), VisionTransformer(VIT))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count == dict(llama=3 * block + 2 * words + SMALL.dim, vision=vit, projector=W)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_what_blocks_keep_is_what_autograd_saves(stage, precision, again):
    bf16, N = precision == "bf16", 256
    torch.manual_seed(0)
    llama = LLaMA(SMALL).requires_grad_(stage == 2)
    llama.checkpoint_activations = again
    if stage == 1 and bf16:
        llama.bfloat16()
    constant = {p.shape for p in llama.parameters()} | {p.T.shape for p in llama.parameters() if p.dim() == 2}
    saved = {}

    def note(t):
        if t.shape not in constant:  # weights, and autocast's copies of them
            saved[t.untyped_storage().data_ptr()] = t  # the tensor lives on, so that no other gets its place
        return t

    x = torch.randn(N, SMALL.dim, dtype=llama.norm.weight.dtype, requires_grad=True)
    cu_seqlens = torch.tensor([0, 100, N], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16, bf16):
        llama(x, positions(cu_seqlens), flat_attention(SMALL.n_layers, cu_seqlens))
    found = sum(t.untyped_storage().nbytes() for t in saved.values()) / N / SMALL.n_layers
    if again:
        assert found == pytest.approx(SMALL.dim * (2 if stage == 1 and bf16 else 4), rel=0.05)
    else:
        assert found == pytest.approx(plan.kept(SMALL, stage, bf16), rel=0.05)


def test_shares_fall_with_the_number_of_gpus():
    one, two, eight = (plan.plan(SMALL, VIT, 2, "fsdp", n, "bf16", 100, True) for n in (1, 2, 8))
    for name in ("gradients", "AdamW"):
        assert one[name] == 2 * two[name] == 8 * eight[name] > 0
    assert one["activations"] == eight["activations"]
    ddp = plan.plan(SMALL, VIT, 2, "ddp", 8, "bf16", 100, True)
    assert ddp["gradients"] == one["gradients"] and ddp["AdamW"] == 2 * ddp["gradients"]


def test_the_plan_of_a_folder_without_weights(tmp_path, capsys, monkeypatch):
    meta = dict(dim=5120, multiple_of=256, n_heads=40, n_layers=40, norm_eps=1e-6, vocab_size=-1)
    (tmp_path / "params.json").write_text(json.dumps(meta))
    assert llama_config(tmp_path) == LLaMAConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, ffn_dim=13824)

    def say(*flags):
        monkeypatch.setattr("sys.argv", ["train.py", "--plan", "--llama", str(tmp_path), *flags])
        train.main()
        return capsys.readouterr().out

    said = say("--gpus", "8", "--gpu-memory", "80")
    assert "13.02 G parameters" in said and len(said.splitlines()) == 12
    rows = {line[:39].strip(): line.split() for line in said.splitlines()[4:]}
    assert rows["stage 2 ddp"][-2:] == ["no", "none"] and rows["stage 2 fsdp --checkpoint-activations"][-2] == "yes"
    assert rows["stage 1 ddp --checkpoint-activations"][-2] == "yes"
    assert all(row.split()[-2] == "no" for row in say("--gpu-memory", "10").splitlines()[4:])
    assert len(say("--stage", "2").splitlines()) == 8
    with pytest.raises(UserError, match="--gpus 0: must be 1 or more"):
        say("--gpus", "0")
    (tmp_path / "params.json").unlink()
    with pytest.raises(UserError, match="no LLaMA there"):
        say()


def test_hugging_face_folders_too(tmp_path):
    config = dict(model_type="llama", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                  intermediate_size=160, vocab_size=320, rms_norm_eps=1e-6)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert llama_config(tmp_path) == SMALL
