"""tools/fast_cpu.py: oneDNN's products and gradients are PyTorch's, and everything but fp32 on a CPU stays PyTorch's."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import distributed
from tools import fast_cpu

TORCH_LINEAR, TORCH_ATTENTION = F.linear, F.scaled_dot_product_attention


@pytest.fixture
def onednn(monkeypatch):
    """Applies the replacement on any processor with AVX-512, and removes it after the test."""
    if not fast_cpu.has_onednn():
        pytest.skip("needs a CPU with AVX-512, and oneDNN")
    monkeypatch.setattr(fast_cpu, "prefers_onednn", lambda: True)
    fast_cpu.speed_up(keep_memory=False)


@pytest.fixture
def no_onednn(onednn, monkeypatch):
    """The replacement is in place, but fails when it uses oneDNN."""
    monkeypatch.delattr(fast_cpu, "OneDNNLinear")


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs_and_gradients_are_pytorchs(shape, bias, monkeypatch):
    torch.manual_seed(0)
    layer = nn.Linear(24, 33, bias=bias)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(*shape[:-1], 33)
    inputs = (x, *layer.parameters())
    expected = TORCH_LINEAR(x, layer.weight, layer.bias)
    expected_gradients = torch.autograd.grad(expected, inputs, dy)
    monkeypatch.delattr(fast_cpu, "TORCH_LINEAR")  # oneDNN computes everything below
    y = layer(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), expected_gradients)


@pytest.mark.usefixtures("onednn")
def test_inputs_of_any_strides():
    torch.manual_seed(0)
    x, weight = torch.randn(24, 9, 4).transpose(0, 2)[:, ::2], torch.randn(24, 33).T
    torch.testing.assert_close(F.linear(input=x, weight=weight), TORCH_LINEAR(x, weight))
    dy = torch.ones(()).expand(3, 33)  # the gradient of a sum has strides of 0
    x = torch.randn(3, 24, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(F.linear(x, weight), x, dy)[0], dy @ weight)


@pytest.mark.usefixtures("onednn")
def test_a_frozen_layer_stores_no_input_for_the_backward_pass():
    layer, stored = nn.Linear(24, 33).requires_grad_(False), []

    def store(tensor):
        stored.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
        layer(torch.randn(7, 24, requires_grad=True))
    assert [tensor.shape for tensor in stored] == [(33, 24)]


@pytest.mark.usefixtures("no_onednn")
def test_other_dtypes_devices_and_modes_stay_pytorchs():
    x, layer = torch.randn(5, 24), nn.Linear(24, 33)
    with pytest.raises(NameError):
        layer(x)  # this call alone would use oneDNN
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.compile(layer, backend="eager")(x).shape == (5, 33)
    assert nn.Linear(24, 33, device="meta")(x.to("meta")).shape == (5, 33)
    for dtype in (torch.bfloat16, torch.float64):
        assert layer.to(dtype)(x.to(dtype)).dtype == dtype


@pytest.mark.usefixtures("no_onednn")
def test_shapes_that_onednn_cannot_handle_stay_pytorchs():
    layer = nn.Linear(24, 33)
    x = torch.randn(0, 24, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 33)
    y.sum().backward()
    assert layer.weight.grad.shape == (33, 24) and not layer.weight.grad.any()
    assert layer(torch.randn(24)).shape == (33,)
    assert F.linear(torch.randn(5, 24), torch.randn(24)).shape == (5,)
    for weight, bias in (((33, 23), (33,)), ((33, 24), (32,))):
        with pytest.raises(RuntimeError) as refused:
            F.linear(torch.randn(5, 24), torch.randn(weight), torch.randn(bias))
        with pytest.raises(RuntimeError) as expected:
            TORCH_LINEAR(torch.randn(5, 24), torch.randn(weight), torch.randn(bias))
        assert str(refused.value) == str(expected.value)


@pytest.mark.usefixtures("no_onednn")
def test_subclasses_of_tensors_stay_pytorchs():
    class Subclass(torch.Tensor):
        pass

    assert type(F.linear(torch.randn(5, 24).as_subclass(Subclass), torch.randn(33, 24))) is Subclass


@pytest.mark.usefixtures("onednn")
def test_speed_up_may_be_called_twice():
    installed = F.linear
    assert installed is fast_cpu.linear and fast_cpu.TORCH_LINEAR is TORCH_LINEAR
    fast_cpu.speed_up(keep_memory=False)
    assert F.linear is installed


def test_other_processors_keep_pytorchs_function(monkeypatch):
    monkeypatch.setattr(fast_cpu, "is_amd", lambda: False)
    fast_cpu.speed_up(keep_memory=False)
    assert F.linear is TORCH_LINEAR


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("keep_memory, variable, stays", [(True, None, True), (True, "65536", False), (False, None, False)])
def test_freed_memory_stays_with_the_process(keep_memory, variable, stays):
    """variable: the user's MALLOC_MMAP_THRESHOLD_, which takes precedence."""
    code = f"""
import torch
from tools.fast_cpu import speed_up

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) // 1024

speed_up(keep_memory={keep_memory})
before = resident()
x = torch.ones(50_000_000)
del x
print(resident() - before)
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if variable:
        env["MALLOC_MMAP_THRESHOLD_"] = variable
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    assert (int(process.stdout) > 180) == stays  # MiB, of the 190 that were freed


# --- attention


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("key_heads, scale", [(4, None), (2, None), (4, 0.125)])
def test_short_bf16_attention_that_trains_is_two_products(autocast, key_heads, scale, monkeypatch):
    """Its output and gradients are near those of PyTorch's kernel in fp32, and another kernel is not asked."""
    torch.manual_seed(0)
    exact = [torch.randn(2, heads, 40, 16).bfloat16().float().requires_grad_() for heads in (4, key_heads, key_heads)]
    rounded = [t.detach().bfloat16().requires_grad_() for t in exact]
    dy = torch.randn(2, 4, 40, 16).bfloat16()
    settings = dict(is_causal=True, scale=scale, enable_gqa=key_heads < 4)
    expected = TORCH_ATTENTION(*exact, **settings)
    gradients = torch.autograd.grad(expected, exact, dy.float())
    monkeypatch.setattr(fast_cpu, "TORCH_ATTENTION", None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = fast_cpu.attention(*rounded, **settings)
    for got, true in zip((y, *torch.autograd.grad(y, rounded, dy)), (expected, *gradients)):
        assert got.dtype == torch.bfloat16
        assert (got - true).norm() < 0.01 * true.norm()


@pytest.mark.parametrize("what", ["fp32", "long", "frozen", "no_grad", "dropout"])
def test_other_attention_is_pytorchs(what, monkeypatch):
    torch.manual_seed(0)
    length, dtype = (fast_cpu.SHORT if what == "long" else 40), (torch.float32 if what == "fp32" else torch.bfloat16)
    tensors = [torch.randn(1, 2, length, 16, dtype=dtype, requires_grad=what != "frozen") for _ in range(3)]
    asked = []
    monkeypatch.setattr(fast_cpu, "TORCH_ATTENTION", lambda q, k, v, *_, **__: asked.append((q, k, v)))
    with torch.set_grad_enabled(what != "no_grad"):
        fast_cpu.attention(*tensors, dropout_p=0.1 if what == "dropout" else 0.0, is_causal=True)
    assert all(a is b for a, b in zip(asked[0], tensors))


def test_bf16_is_the_default_of_wide_models_on_processors_with_units_for_it(monkeypatch):
    cpu = torch.device("cpu")
    for flags, wide, narrow in (("amx_bf16", "bf16", "fp32"), ("avx512_bf16", "bf16", "fp32"), ("avx2", "fp32", "fp32")):
        monkeypatch.setattr(fast_cpu, "processor", lambda flags=flags: f"flags: {flags}")
        assert distributed.default_precision(cpu, fast_cpu.WIDE) == wide
        assert distributed.default_precision(cpu, fast_cpu.WIDE - 1) == narrow
