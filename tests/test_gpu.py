"""The GPU of fake_cuda.py: gradients, answers and runs are those of a CPU, and few lines wait for it.

Each operation also has to find its tensors on one device, and the varlen kernel arguments that it accepts.
"""

import contextlib
import json
import os
import sys
from unittest import mock

import fake_cuda
import pytest
import torch
from conftest import error, generated, open_chat, samples, stream, tiny_llava
from test_model import SYSTEM, prompt_stream, prompts
from test_train import chat, flags, in_process, inputs, metrics, stage_2  # noqa: F401

import distributed
from model import KVCache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="registers the device in Linux's build of PyTorch")
VARLEN = "torch_attn._varlen_attn.default"
CUDA = torch.device("cuda")


def gradients(stage: int, n_kv_heads: int, batch: tuple, bf16: bool, checkpoint_activations=False, device="cpu") -> dict:
    """The gradient of each parameter that trains. As in train.py, the frozen parts have the compute dtype."""
    llava = tiny_llava(n_kv_heads, stage=stage)
    llava.llama.checkpoint_activations = checkpoint_activations
    if bf16:
        llava.vision.bfloat16()
        if stage == 1:
            llava.llama.bfloat16()
    llava.to(device)
    batch = [t if isinstance(t, list) else t.to(device) for t in batch]
    fake_cuda.waits.clear()
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        nll = llava(*batch)
    (nll / 20).backward()
    assert dict(fake_cuda.waits) == {}
    assert fake_cuda.copies.total() <= 3, "the position ids, and once for all layers the borders of q and of k"
    return {name: p.grad.cpu() for name, p in llava.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("n_kv_heads, checkpoint_activations", [(2, False), (4, True)])
def test_gradients_are_those_of_a_cpu_and_no_line_waits(stage, bf16, n_kv_heads, checkpoint_activations):
    for batch in (stream(samples(5), SYSTEM), stream(samples(4)[2:3])):  # the second has no picture
        exact = gradients(stage, n_kv_heads, batch, bf16=False)
        rounded = gradients(stage, n_kv_heads, batch, bf16)
        with fake_cuda.gpu():
            found = gradients(stage, n_kv_heads, batch, bf16, checkpoint_activations, "cuda")
        assert fake_cuda.kernels[VARLEN] == bf16 * 2 * (1 + checkpoint_activations)
        for name, expected in exact.items():
            if expected.any():
                assert error(found[name], expected) <= max(2 * error(rounded[name], expected), 1e-5), name
            else:
                assert not found[name].any(), name


def test_answers_are_those_of_a_cpu_and_a_token_waits_once(monkeypatch):
    monkeypatch.setattr(KVCache, "ROOM", 5)
    ids, borders, pixels = prompt_stream(prompts(), SYSTEM)
    [*expected] = generated(tiny_llava(), ids, borders, pixels, max_new_tokens=12)
    stop = expected[1][3:5]  # ends the answers at different steps
    ended = generated(tiny_llava(), ids, borders, pixels, stop=[stop], max_new_tokens=12)
    with fake_cuda.gpu():
        llava, batch = tiny_llava().to(CUDA), (ids.to(CUDA), borders, pixels.to(CUDA))
        fake_cuda.waits.clear()
        assert generated(llava, *batch, max_new_tokens=12) == expected
        [(line, times)] = fake_cuda.waits.items()
        assert "choose(self.llama.logits(x)" in line and times == 12
        assert generated(llava, *batch, stop=[stop], max_new_tokens=12) == ended
        with torch.autocast("cuda", torch.bfloat16):
            assert len(generated(llava, *batch, max_new_tokens=3, temperature=1.0, top_p=0.9)) == 4
        assert fake_cuda.kernels[VARLEN] == 2


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_of_training_waits_for_its_gradient_norm_and_its_loss(inputs, chat, tmp_path, stage):  # noqa: F811
    found = []
    for steps in (1, 2):
        settings = dict(out=tmp_path / f"run{steps}", max_steps=steps, micro_batch_tokens=150)
        command = flags(inputs, **settings) if stage == 1 else stage_2(inputs, chat, **settings)
        with fake_cuda.gpu():
            in_process(command)
        found.append(dict(fake_cuda.waits))
    one, two = found
    of_a_step = {line: times - one.get(line, 0) for line, times in two.items() if times > one.get(line, 0)}
    assert sorted((line.split(":")[0], times) for line, times in of_a_step.items()) == [("distributed.py", 1), ("train.py", 1)]
    in_process([*command, "--out", str(tmp_path / "cpu"), "--precision", "bf16"])
    assert [line["loss"] for line in metrics(tmp_path / "run2")] == pytest.approx(
        [line["loss"] for line in metrics(tmp_path / "cpu")], rel=0.01)  # fmt: skip


def test_a_chat_answers(inputs, tmp_path, picture):  # noqa: F811
    in_process(flags(inputs, tmp_path / "run", max_steps=1, precision="fp32"))
    answers = []
    for place in (contextlib.nullcontext(), fake_cuda.gpu()):
        with place:
            talker = open_chat(tmp_path / "run")
            talker.look(picture)
            answers.append([talker.ask(question) for question in ("What is it?", "And then?")])
    assert answers[0] == answers[1]
    assert talker.model.projector.weight.is_cuda and not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("capability, precision", [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_gpus_before_ampere_train_in_fp32(inputs, tmp_path, monkeypatch, capability, precision):  # noqa: F811
    with fake_cuda.gpu():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        in_process(flags(inputs, tmp_path / "run", max_steps=1))
    assert json.loads((tmp_path / "run/config.json").read_text())["precision"] == precision
    assert bool(fake_cuda.kernels[VARLEN]) == (precision == "bf16")


def test_a_run_of_bf16_answers_in_fp32_on_a_gpu_before_ampere(inputs, tmp_path, monkeypatch, picture):  # noqa: F811
    in_process(flags(inputs, tmp_path / "run", max_steps=1, precision="bf16"))
    with fake_cuda.gpu():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        talker = open_chat(tmp_path / "run")
        talker.look(picture)
        assert "".join(talker.ask("What is it?"))
    assert {p.dtype for p in talker.model.parameters()} == {torch.float32}
    assert not fake_cuda.kernels[VARLEN]


@pytest.mark.parametrize("given, expected", [
    ({}, "expandable_segments:True"),
    ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, "backend:cudaMallocAsync"),
    ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, None),
])  # fmt: skip
def test_the_allocator_grows_its_segments_unless_the_user_says_otherwise(given, expected):
    absent = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    with mock.patch.dict(os.environ, absent | given, clear=True), fake_cuda.gpu():
        distributed.start_processes()
        assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


def test_a_deterministic_run_asks_pytorch_and_cublas_for_it(inputs, tmp_path):  # noqa: F811
    with mock.patch.dict(os.environ), fake_cuda.gpu():
        try:
            in_process(flags(inputs, tmp_path / "run", max_steps=1) + ["--deterministic"])
            assert torch.are_deterministic_algorithms_enabled()
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        finally:
            torch.use_deterministic_algorithms(False)


def test_the_fake_finds_what_a_gpu_would_refuse_or_wait_for():
    with fake_cuda.gpu():
        x = torch.ones(3, device="cuda")
        with pytest.raises(fake_cuda.WrongDevice):
            x + torch.ones(3)
        assert (x + torch.tensor(1.0)).is_cuda
        fake_cuda.waits.clear()
        for use in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: x[torch.tensor([0])],
                    lambda: x.cpu(), lambda: torch.ones(2).to("cuda"), lambda: torch.tensor([1], device="cuda"),
                    lambda: torch.ones(2).to("cuda", non_blocking=True), lambda: bool(x.any())):  # fmt: skip
            before = fake_cuda.waits.total()
            use()
            assert fake_cuda.waits.total() > before
        before = fake_cuda.waits.total()
        torch.ones(2).pin_memory().to("cuda", non_blocking=True)
        torch.arange(3, device="cuda") + x
        assert fake_cuda.waits.total() == before
