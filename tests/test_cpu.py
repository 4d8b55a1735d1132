import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cpu

ROOT = Path(__file__).parent.parent


@pytest.fixture
def onednn(monkeypatch):
    """As on a processor of AMD's, whosever this one is."""
    if not cpu.HAS_ONEDNN:
        pytest.skip("needs a CPU with AVX-512, and oneDNN")
    monkeypatch.setattr(cpu, "ONEDNN", True)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_gradients_are_those_of_torch(shape, bias, monkeypatch):
    torch.manual_seed(0)
    layer, x = cpu.Linear(24, 33, bias=bias), torch.randn(shape, requires_grad=True)
    inputs, dy = (x, *layer.parameters()), torch.randn(*shape[:-1], 33)
    reference = F.linear(x, layer.weight, layer.bias)
    wanted = torch.autograd.grad(reference, inputs, dy)
    monkeypatch.delattr(F, "linear")  # the layer must not need it
    y = layer(x)
    torch.testing.assert_close(y, reference)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), wanted)


@pytest.mark.usefixtures("onednn")
def test_inputs_of_any_strides():
    torch.manual_seed(0)
    x, weight = torch.randn(24, 9, 4).transpose(0, 2)[:, ::2], torch.randn(24, 33).T
    torch.testing.assert_close(cpu.linear(x, weight), F.linear(x, weight))
    assert cpu.linear(torch.randn(0, 24), weight).shape == (0, 33)
    one = torch.ones(()).expand(3, 33)  # the gradient of a sum
    x = torch.randn(3, 24, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(cpu.linear(x, weight), x, one)[0], one @ weight)


@pytest.mark.usefixtures("onednn")
def test_a_frozen_layer_keeps_no_input():
    layer, kept = cpu.Linear(24, 33).requires_grad_(False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(7, 24, requires_grad=True))
    assert [t.shape for t in kept] == [(33, 24)]


def test_what_is_not_fp32_on_a_cpu_stays_torchs(monkeypatch):
    monkeypatch.setattr(cpu, "ONEDNN", True)
    monkeypatch.delattr(cpu, "by_onednn")
    x, layer = torch.randn(5, 24), cpu.Linear(24, 33)
    with pytest.raises(NameError):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.compile(layer, backend="eager")(x).shape == (5, 33)
    for dtype in (torch.bfloat16, torch.float64):
        assert layer.to(dtype)(x.to(dtype)).dtype == dtype
    assert cpu.Linear(24, 33, device="meta")(x.to("meta")).shape == (5, 33)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("chosen", [False, True])
def test_memory_that_is_freed_stays_with_the_process(chosen):
    code = """
import ctypes, torch, cpu
cpu.keep_memory()
held = lambda: int(next(x for x in open("/proc/self/status") if x.startswith("VmRSS")).split()[1]) // 1024
before, x = held(), torch.ones(50_000_000)
del x
print(held() - before)
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    env |= {"MALLOC_MMAP_THRESHOLD_": "65536"} if chosen else {}  # unless the user wants it otherwise
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=env)
    assert (int(found.stdout) > 180) != chosen  # MiB of its 190
