"""tools/plan.py: its counts equal those of the model and of autograd, and its table is printed without any weights."""

import json
import sys

import pytest
import torch

from checkpoint import build, llama_config
from common import UserError
from model import LLaMA, LLaMAConfig, StreamAttention, position_ids
from tools import plan
from vision import VisionConfig, VisionTransformer

SMALL = LLaMAConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, ffn_dim=160, vocab_size=320)
VIT = VisionConfig(image_size=32, patch_size=8, width=128, layers=4)
LLAMA_13B = dict(dim=5120, multiple_of=256, n_heads=40, n_layers=40, norm_eps=1e-6, vocab_size=-1)  # params.json


def test_parameters_are_counted_exactly():
    n = plan.count_parameters(SMALL, VIT)
    with torch.device("meta"):
        model = build(LLaMA(SMALL), VisionTransformer(VIT))
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count == dict(llama=n.llama, vision=n.vision, projector=n.projector)
    assert n.block == sum(p.numel() for p in model.llama.layers[0].parameters())
    assert n.embeddings == model.llama.output.weight.numel() == model.llama.tok_embeddings.weight.numel()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_activations_are_those_that_autograd_saves(stage, precision, checkpoint_activations):
    bf16 = precision == "bf16"
    N = 256
    torch.manual_seed(0)
    llama = LLaMA(SMALL).requires_grad_(stage == 2)
    llama.checkpoint_activations = checkpoint_activations
    if stage == 1 and bf16:
        llama.bfloat16()
    matrices = [p for p in llama.parameters() if p.dim() == 2]
    weight_shapes = {p.shape for p in llama.parameters()} | {p.T.shape for p in matrices}
    saved = {}

    turns = (N, 1, SMALL.head_dim // 2)  # of RoPE: one tensor for all layers

    def record(t):
        if t.shape not in weight_shapes | {turns}:  # neither a weight nor autocast's copy of one
            saved[t.untyped_storage().data_ptr()] = t  # holding the tensor keeps its address from being reused
        return t

    x = torch.randn(N, SMALL.dim, dtype=llama.norm.weight.dtype, requires_grad=True)
    borders = [0, N]  # of more samples the CPU's attention would save copies, the kernel for GPUs does not
    with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t), torch.autocast("cpu", torch.bfloat16, bf16):
        llama(x, position_ids(borders), StreamAttention(borders))
    per_position = sum(t.untyped_storage().nbytes() for t in saved.values()) / N / SMALL.n_layers
    if checkpoint_activations:
        assert per_position == pytest.approx(SMALL.dim * (2 if stage == 1 and bf16 else 4), rel=0.05)
    else:
        assert per_position == pytest.approx(plan.saved_by_block(SMALL, stage, bf16), rel=0.05)


def test_fsdp_divides_the_state_by_the_number_of_gpus():
    one, two, eight = (plan.gpu_bytes(SMALL, VIT, 2, "fsdp", n, "bf16", 100, True) for n in (1, 2, 8))
    for name in ("gradients", "AdamW"):
        assert one[name] == 2 * two[name] == 8 * eight[name] > 0
    assert one["activations"] == eight["activations"]
    ddp = plan.gpu_bytes(SMALL, VIT, 2, "ddp", 8, "bf16", 100, True)
    assert ddp["gradients"] == one["gradients"] and ddp["AdamW"] == 2 * ddp["gradients"]


@pytest.fixture
def command(tmp_path, capsys, monkeypatch):
    """`python -m tools.plan` -> the lines that it prints."""

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
        plan.main()
        return capsys.readouterr().out.splitlines()

    return run


def test_plan_of_13b_from_params_json_alone(tmp_path, command):
    path = tmp_path / "params.json"
    path.write_text(json.dumps(LLAMA_13B))
    lines = command("--llama", tmp_path, "--gpus", 8, "--gpu-memory", 80, "--micro-batch-tokens", 4096)
    assert "13.02 G parameters, ViT of 0.29 G, W of 5.2 M; bf16, 8 GPUs of 80 GiB" in lines[0]
    rows = {line[:39].strip(): line.split() for line in lines[4:12]}
    assert len(rows) == 8
    # As published in the README.
    assert rows["stage 1 ddp"][3:] == "24.8 0.0 0.0 0.0 25.4 50.3 yes 8,192".split()
    assert rows["stage 2 fsdp"][3:] == "6.6 6.1 12.1 5.4 46.0 76.2 no 2,048".split()
    assert rows["stage 2 ddp"][-2:] == ["no", "none"]
    assert rows["stage 2 fsdp --checkpoint-activations"][-2:] == ["yes", "32,768"]
    assert len(lines) == 14 and "process 0 also needs 145.5 GiB of host memory" in lines[13]

    rows = command("--llama", tmp_path, "--gpu-memory", 9)[4:12]
    assert all(row.split()[-2] == "no" for row in rows)
    assert len(command("--llama", tmp_path, "--stage", 1)) == 8
    assert len(command("--llama", tmp_path, "--stage", 2)) == 10


def test_plan_of_a_hugging_face_folder(tmp_path, command):
    config = dict(model_type="llama", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                  intermediate_size=160, vocab_size=320, rms_norm_eps=1e-6)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert llama_config(tmp_path) == SMALL
    assert command("--llama", tmp_path)[0].startswith("LLaMA of 0.00 G parameters, ViT of 0.29 G")


def test_plan_of_the_demo_by_default(command):
    assert command()[0].startswith("LLaMA of 0.00 G parameters, ViT of 0.00 G, W of 0.0 M")


def test_mistakes_end_in_one_line(tmp_path, command):
    with pytest.raises(UserError, match="--gpus: 0: expected a whole number of 1 or more"):
        command("--gpus", 0)
    with pytest.raises(UserError, match="holds no LLaMA"):
        command("--llama", tmp_path)
