"""The model on the GPU of fake_cuda.py: one device per operation, the varlen kernel's arguments, waits of the host."""

import sys

import fake_cuda
import pytest
import torch
from conftest import error, samples, stream, tiny_llava


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="registers the device through libc10.so")
SYSTEM = [1, 20, 30, 40, 50, 60]


def prepared(stage: int, bf16: bool, n_kv_heads: int = 2):
    """As train.py loads it: the frozen parts in the compute dtype."""
    llava = tiny_llava(n_kv_heads, stage=stage)
    if bf16:
        llava.vision.bfloat16()
        if stage == 1:
            llava.llama.bfloat16()
    return llava


def to_gpu(ids, target, borders, pixels):
    return ids.cuda(), target.cuda(), borders, pixels.cuda()


def gradients(llava, batch, bf16: bool, device: str) -> dict[str, torch.Tensor]:
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        nll = llava(*batch)
    (nll / 20).backward()
    return {name: p.grad.cpu() for name, p in llava.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("n_kv_heads, checkpoint_activations", [(2, False), (4, True)])
def test_gradients_are_those_of_the_cpu_and_no_line_waits(stage, bf16, n_kv_heads, checkpoint_activations):
    batches = [stream(samples(5), SYSTEM), stream(samples(4)[2:3])]  # the second has no picture
    for batch in batches:
        exact = gradients(prepared(stage, False, n_kv_heads), batch, False, "cpu")
        usual = gradients(prepared(stage, bf16, n_kv_heads), batch, bf16, "cpu")
        with fake_cuda.gpu():
            llava = prepared(stage, bf16, n_kv_heads).to("cuda")
            llava.llama.checkpoint_activations = checkpoint_activations
            on_gpu = to_gpu(*batch)
            fake_cuda.waits.clear()
            found = gradients(llava, on_gpu, bf16, "cuda")
        print(dict(fake_cuda.waits), dict(fake_cuda.copies))
        for name in exact:
            assert error(found[name], exact[name]) <= max(2 * error(usual[name], exact[name]), 1e-5) or not exact[name].any()
        layers = llava.llama.config.n_layers
        assert fake_cuda.kernels["torch_attn._varlen_attn.default"] == bf16 * layers * (1 + checkpoint_activations)

