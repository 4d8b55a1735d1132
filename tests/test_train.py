"""train.py in one process: schedule, what trains, micro-batches, interruption, resuming, data workers, wrong input.

The runs are real ones of the command line, on tiny random backbones. tests/test_distributed.py has those of several
processes.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT
from PIL import Image

import checkpoint
import data
import train
from common import UserError
from conversation import load_tokenizer, system_ids
from demo.world import LLAMA as DEMO_LLAMA
from formats.pictures import Pictures
from model import LLaMA, LLaMAConfig, LLaVA
from tools import plots
from vision import VisionConfig, VisionTransformer

PATIENCE = 120  # seconds that a started process may take
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


# --- runs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with a tiny raw LLaMA that has the demo's tokenizer, a tiny ViT, and 30 captioned pictures."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    vocab_size = load_tokenizer(DEMO_LLAMA / "tokenizer.model").vocab_size()
    write_llama(folder / "llama", vocab_size)
    (folder / "llama/tokenizer.model").write_bytes((DEMO_LLAMA / "tokenizer.model").read_bytes())
    vit = VisionTransformer(VisionConfig(image_size=32, patch_size=8, width=64, layers=2), feature_layer=-1)
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    torch.save({f"visual.{name}": p for name, p in vit.state_dict().items()}, folder / "vit.pt")
    (folder / "images").mkdir()
    records = []
    for i in range(30):
        Image.radial_gradient("L").rotate(12 * i).resize((40 + i, 50)).save(folder / f"images/{i}.png")
        records.append({"image": f"{i}.png", "caption": "a big red circle at the left" + " and more of it" * (i % 4)})
    (folder / "captions.json").write_text(json.dumps(records))
    return folder


def write_llama(folder, vocab_size):
    config = LLaMAConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=vocab_size)
    checkpoint.save_llama(config, LLaMA(config).state_dict(), folder)


def flags(inputs, out, **changes) -> list[str]:
    """The arguments of a run of stage 1, 4 steps long; None leaves a flag out."""
    given = dict(stage=1, llama=inputs / "llama", vision=inputs / "vit.pt", data=inputs / "captions.json",
                 images=inputs / "images", out=out, batch_size=8, epochs=1, workers=0) | changes  # fmt: skip
    return [
        str(x) for name, value in given.items() if value is not None for x in (f"--{name.replace('_', '-')}", value)
    ]


@pytest.fixture(scope="session")
def chat(inputs, tmp_path_factory):
    """A finished run of stage 1, and conversations: with a picture and without one, of one turn and of several."""
    folder = tmp_path_factory.mktemp("chat")
    in_process(flags(inputs, folder / "stage1", max_steps=2))
    samples = []
    for i in range(20):
        turns = ["<image>\nWhat is it?" if i % 3 else "What is it?", "It is red."] + ["And then?", "Nothing."] * (i % 4)
        messages = [{"from": who, "value": text} for who, text in zip(("human", "gpt") * len(turns), turns)]
        samples.append({"id": str(i), "conversations": messages} | ({"image": f"{i}.png"} if i % 3 else {}))
    (folder / "chat.json").write_text(json.dumps(samples))
    return folder


def stage_2(inputs, chat, out, **changes) -> list[str]:
    """The arguments of a run of stage 2, 3 steps long, that starts from the run of `chat`."""
    return flags(inputs, out, **{"stage": 2, "llama": None, "vision": None, "init_from": chat / "stage1",
                                 "data": chat / "chat.json", "max_steps": 3, "lr": 1e-3, **changes})  # fmt: skip


def start(arguments, processes=0, patch="", wrapper=(), environment=None) -> subprocess.Popen:
    """Starts train.py in a session of its own.

    processes: of torchrun; 0 = without torchrun. patch: Python code that runs before the training, without torchrun.
    wrapper: words before the command. environment: variables to set.
    """
    command = ["train.py"]
    if patch:
        command = ["-c", f"import common, train\n{patch}\ncommon.run_command(train.main)"]
    elif processes:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "train.py"]
    command = [*wrapper, sys.executable, *command, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | (environment or {}), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Waits for the end of a started process -> its exit status, stdout and stderr. Fails if it hangs."""
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"train.py did not end within {PATIENCE} s: {stderr[-3000:]}")
    return process.returncode, stdout, stderr


def in_process(arguments, curves=False):
    """Calls train.main() with these arguments. It leaves no signal handler and no lock behind.

    curves: whether the run draws loss.png, which takes longer than these runs.
    """
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    handlers = [signal.getsignal(number) for number in numbers]
    draw = plots.loss_curves
    argv, sys.argv = sys.argv, ["train.py", *arguments]
    if not curves:
        plots.loss_curves = lambda run: None
    try:
        train.main()
    finally:
        sys.argv, plots.loss_curves = argv, draw
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/.lock"):
                    os.close(int(descriptor))


def in_fork(function) -> int:
    """Calls a function in a fork of this process, which may be killed -> the exit status. Fails if it hangs."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        pytest.fail(f"the run did not end within {PATIENCE} s")
    return process.exitcode


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def timeless(out) -> list[dict]:
    """The metrics of a run without the seconds, the only value in which equal runs differ."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in metrics(out)]


def W(out) -> torch.Tensor:
    return torch.load(out / "projector.pth", weights_only=True)["weight"]


def files(folder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call_after_step(monkeypatch, step, action):
    """Calls `action` when the line of this step has been appended to metrics.jsonl."""
    append_metrics = train.append_metrics

    def append_and_act(path, **values):
        append_metrics(path, **values)
        if values["step"] == step:
            action()

    monkeypatch.setattr(train, "append_metrics", append_and_act)


# --- the schedule


def test_schedule_is_cosine_with_warmup():
    steps, peak = 200, 2e-3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    reference = transformers.get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=6, num_training_steps=steps)
    for step in range(steps):
        expected = reference.get_last_lr()[0]
        if step < 6:  # the reference rises from 0, ours from a sixth of the peak
            expected += peak / 6
        assert train.learning_rate(step, steps, peak, 0.03) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        reference.step()


# --- stage 1


def test_stage_1_trains_w_and_changes_no_other_bit(inputs, tmp_path, monkeypatch):
    built, build = {}, checkpoint.build

    def build_and_record(*args):
        built["model"] = build(*args)
        built["weights"] = {name: w.clone() for name, w in built["model"].state_dict().items()}
        return built["model"]

    monkeypatch.setattr(checkpoint, "build", build_and_record)
    in_process(flags(inputs, tmp_path / "run", lr=0.01))
    after = built["model"].state_dict()
    assert [name for name in after if not torch.equal(after[name], built["weights"][name])] == ["projector.weight"]
    assert len(metrics(tmp_path / "run")) == 4  # 30 samples, 8 a step


def test_the_loss_falls_and_equal_seeds_give_equal_runs(inputs, tmp_path):
    for name, seed, workers in (("a", 0, 0), ("again", 0, 2), ("other", 1, 0)):
        in_process(flags(inputs, tmp_path / name, lr=0.1, seed=seed, workers=workers, epochs=6))
    assert timeless(tmp_path / "a") == timeless(tmp_path / "again") != timeless(tmp_path / "other")
    assert torch.equal(W(tmp_path / "a"), W(tmp_path / "again"))
    losses = [line["loss"] for line in metrics(tmp_path / "a")]
    assert len(losses) == 24 and sum(losses[-6:]) < sum(losses[:6])


def test_each_step_takes_the_logged_rate_no_weight_decay_and_clipped_gradients(inputs, tmp_path, monkeypatch):
    steps, step = [], torch.optim.AdamW.step

    def record(self, *arguments):
        (group,) = self.param_groups
        norm = torch.cat([p.grad.flatten() for p in group["params"]]).norm().item()
        steps.append((group["lr"], group["weight_decay"], norm))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e-3)
    in_process(flags(inputs, tmp_path, epochs=2, log_every=3))
    rates, decays, norms = zip(*steps)
    assert list(rates) == [train.learning_rate(t, 8, 2e-3, 0.03) for t in range(8)] and set(decays) == {0.0}
    assert norms == pytest.approx([1e-3] * 8, rel=1e-2)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 8] and [line["lr"] for line in lines] == [
        rates[i] for i in (2, 5, 7)
    ]
    assert min(line["grad_norm"] for line in lines) > 2e-3  # the norm before clipping


def test_the_seed_draws_the_first_w(inputs, tmp_path):
    noise = []
    for seed in (0, 0, 1):
        out = tmp_path / str(len(noise))
        in_process(flags(inputs, out, max_steps=1, lr=0.0, seed=seed))
        noise.append(W(out))
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    assert noise[0].std().item() == pytest.approx(64**-0.5, rel=0.1)  # 2048 draws: 6 standard errors


def test_training_can_start_from_a_published_projector(inputs, tmp_path):
    weight = torch.randn(32, 64)
    published = {"model.mm_projector.weight": weight, "model.mm_projector.bias": torch.randn(32)}
    torch.save(published, tmp_path / "mm_projector.bin")
    in_process(flags(inputs, tmp_path / "run", max_steps=1, lr=0.0, projector=tmp_path / "mm_projector.bin"))
    saved = torch.load(tmp_path / "run/projector.pth", weights_only=True)
    assert torch.equal(saved["weight"], weight) and "bias" in saved


def test_compiled_layers_fit_all_batches(inputs, tmp_path, monkeypatch):
    """Two graphs, of the norms and of the feed-forward layers, whatever the layer and the number of samples."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **kwargs: original(*args, **kwargs, backend="eager"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    settings = dict(micro_batch_tokens=150, batch_size=7, max_steps=4)
    in_process([*flags(inputs, tmp_path / "compiled", **settings), "--compile"])
    assert counters["unique_graphs"] == 2
    in_process(flags(inputs, tmp_path / "plain", **settings))
    assert counters["unique_graphs"] == 2
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("compiled", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_bf16_autocast_is_near_fp32(inputs, tmp_path):
    for precision in ("bf16", "fp32"):
        in_process(flags(inputs, tmp_path / precision, precision=precision, max_steps=3))
    for a, b in zip(metrics(tmp_path / "bf16"), metrics(tmp_path / "fp32"), strict=True):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.02)


# --- stage 2


def test_stage_2_trains_w_and_the_llama_but_not_the_vit(inputs, chat, tmp_path, monkeypatch):
    trained, load_run = [], checkpoint.load_run

    def load_and_record(*args):
        loaded = load_run(*args)
        trained.append(loaded[0])
        return loaded

    monkeypatch.setattr(checkpoint, "load_run", load_and_record)
    in_process(stage_2(inputs, chat, tmp_path / "run"))
    before, _, _ = load_run(chat / "stage1")
    after, _, config = load_run(tmp_path / "run")
    saved = after.state_dict()
    for name, weight in before.state_dict().items():
        assert torch.equal(weight, saved[name]) == name.startswith("vision."), name
        assert torch.equal(saved[name], trained[0].state_dict()[name]), name
    assert config["stage"] == 2 and len(metrics(tmp_path / "run")) == 3


def test_micro_batches_change_nothing(inputs, chat, tmp_path):
    """After one step AdamW's first moment is a tenth of the clipped gradient. Stage 2 has samples without a picture."""
    for name, command in (("stage 1", flags(inputs, None, max_steps=1)),
                          ("stage 2", stage_2(inputs, chat, None, batch_size=6, max_steps=1))):  # fmt: skip
        results = []
        for tokens in (10**6, 130, 1):  # all samples at once, a few, one
            out = tmp_path / f"{name}, {tokens}"
            in_process([*command, "--out", str(out), "--micro-batch-tokens", str(tokens)])
            optimizer = checkpoint.load_state(out)["optimizer"]["state"]
            moments = torch.cat([moments["exp_avg"].flatten() for moments in optimizer.values()])
            results.append((timeless(out), moments, W(out)))
        (lines, moments, weight), *others = results
        assert moments.norm() > 0
        for other_lines, other_moments, other_weight in others:
            assert other_lines == [pytest.approx(line, rel=1e-5) for line in lines]
            assert (other_moments - moments).norm() < 1e-5 * moments.norm()
            torch.testing.assert_close(other_weight, weight, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_nothing(inputs, chat, tmp_path):
    for name in ("--no-checkpoint-activations", "--checkpoint-activations"):
        in_process([*stage_2(inputs, chat, tmp_path / name, max_steps=2), name])
    a, b = (timeless(tmp_path / name) for name in ("--no-checkpoint-activations", "--checkpoint-activations"))
    assert a == [pytest.approx(line, rel=1e-6) for line in b]


def test_a_run_of_stage_2_serves_as_a_llama_and_as_a_start(inputs, chat, tmp_path):
    in_process(stage_2(inputs, chat, tmp_path / "one"))
    in_process(flags(inputs, tmp_path / "again", llama=tmp_path / "one", max_steps=1))
    in_process(stage_2(inputs, chat, tmp_path / "more", init_from=tmp_path / "one", max_steps=1))
    a, b = (checkpoint.load_llama(tmp_path / name).state_dict() for name in ("one", "more"))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_chat_draws_the_files_uniformly_by_default(inputs, chat, tmp_path, monkeypatch):
    """The 2 samples of one file come as often as the 20 of another. The bounds are 3.8 standard errors of 88 draws."""
    (tmp_path / "two.json").write_text(json.dumps(json.loads((chat / "chat.json").read_text())[:2]))
    drawn, get = [], data.Examples.get

    def record(self, i, epoch):
        drawn.append(int(i) < 20)
        return get(self, i, epoch)

    monkeypatch.setattr(data.Examples, "get", record)
    shares = {}
    for sampling in (None, "proportional"):
        drawn.clear()
        command = stage_2(inputs, chat, tmp_path / str(sampling), epochs=4, max_steps=None, sampling=sampling)
        in_process([*command, "--data", str(chat / "chat.json"), str(tmp_path / "two.json")])
        shares[sampling] = sum(drawn) / len(drawn)
    assert 0.3 < shares[None] < 0.7 and shares["proportional"] == pytest.approx(20 / 22, abs=0.02)


def test_scienceqa_trains_from_its_folder(inputs, chat, tmp_path, monkeypatch):
    """Its pictures need no --images. Problems whose picture is absent are refused, or used as text."""
    folder, problems = tmp_path / "quiz", {}
    for i in range(8):
        problems[str(i)] = dict(question="Which?", choices=["red", "blue"], answer=i % 2, hint="", lecture="So.",
                                solution="It is.", image="image.png" if i % 2 else None, split="train",
                                grade="grade1", subject="x")  # fmt: skip
        if i in (1, 3, 5):
            (folder / f"images/train/{i}").mkdir(parents=True)
            (folder / f"images/train/{i}/image.png").write_bytes((inputs / f"images/{i}.png").read_bytes())
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": list(problems)}))
    command = stage_2(inputs, chat, tmp_path / "run", task="scienceqa", data=folder, images=None, max_steps=1)
    with pytest.raises(UserError, match=r"1 .*absent \(images/train/7/image.png.*--missing-pictures-as-text"):
        in_process(command)
    pictures, forward = [], LLaVA.forward

    def record(self, ids, target, borders, pixels):
        pictures.append(len(pixels))
        return forward(self, ids, target, borders, pixels)

    monkeypatch.setattr(LLaVA, "forward", record)
    in_process([*command, "--missing-pictures-as-text"])
    assert pictures == [3]
    [line] = metrics(tmp_path / "run")
    answer = load_tokenizer(DEMO_LLAMA / "tokenizer.model").encode("So. It is. The answer is A.")
    assert line["green_tokens"] > 8 * len(answer)


def test_wrong_combinations_for_stage_2_are_refused(inputs, chat, tmp_path):
    for changes, message in (
        (dict(task="scienceqa"), "--data holds LLaVA conversations.*--task scienceqa"),
        (dict(init_from=tmp_path), "no run directory"),
        (dict(llama=inputs / "llama"), "--init-from takes"),
    ):
        with pytest.raises(UserError, match=message):
            in_process(stage_2(inputs, chat, tmp_path / "x", **changes))


# --- interruption


@pytest.fixture(scope="session")
def undisturbed(inputs, tmp_path_factory):
    """A run of 12 steps that nothing interrupts."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    in_process(flags(inputs, out, epochs=3, workers=1))
    return out


def assert_equal_runs(out, expected):
    assert timeless(out) == timeless(expected) and torch.equal(W(out), W(expected))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_is_saved_and_continues_bit_for_bit(inputs, undisturbed, tmp_path, number, monkeypatch, capsys):
    command = flags(inputs, tmp_path / "run", epochs=3, workers=1)
    with monkeypatch.context() as patch:
        call_after_step(patch, 5, lambda: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as end:
            in_process(command)
    assert end.value.code == 128 + number and "the same command continues" in capsys.readouterr().out
    assert checkpoint.load_state(tmp_path / "run")["step"] == len(metrics(tmp_path / "run")) == 5
    assert W(tmp_path / "run").isfinite().all()  # for use by evaluation and chat
    in_process(command)
    assert "continues after step 5 of 12" in capsys.readouterr().out
    assert_equal_runs(tmp_path / "run", undisturbed)


def test_a_second_ctrl_c_ends_a_run_at_once(inputs, tmp_path, monkeypatch):
    def press_twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    call_after_step(monkeypatch, 1, press_twice)
    with pytest.raises(KeyboardInterrupt):
        in_process(flags(inputs, tmp_path / "run"))
    assert not (tmp_path / "run/state.pth").exists()


def start_in_terminal(command) -> tuple[subprocess.Popen, int]:
    """Starts a command as a shell does, with a terminal of its own -> its process, and the terminal's other end."""
    terminal, inner = pty.openpty()
    code = ("import fcntl, os, signal, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # the tests may run under nohup
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, stdin=inner,
                               stdout=inner, stderr=inner)  # fmt: skip
    os.close(inner)
    return process, terminal


def hang_up(command, out) -> int:
    """Starts a training in a terminal, closes the terminal after some steps, and returns the exit status."""
    process, terminal = start_in_terminal(command)
    deadline = time.time() + PATIENCE
    while process.poll() is None and time.time() < deadline:
        if (out / "metrics.jsonl").is_file() and len(metrics(out)) >= 3:
            break
        if select.select([terminal], [], [], 0.02)[0]:
            os.read(terminal, 2**16)
    os.close(terminal)
    try:
        return process.wait(PATIENCE)
    finally:
        process.kill()


def test_a_closed_terminal_ends_a_run_with_its_state_saved(inputs, tmp_path):
    command = flags(inputs, tmp_path / "run", epochs=1000, workers=1)
    assert hang_up(["train.py", *command], tmp_path / "run") == 128 + signal.SIGHUP
    steps = len(metrics(tmp_path / "run"))
    assert 3 <= steps < 4000 and checkpoint.load_state(tmp_path / "run")["step"] == steps
    assert W(tmp_path / "run").isfinite().all()


def test_nohup_protects_a_run_from_a_closed_terminal(inputs, tmp_path, monkeypatch):
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        call_after_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
        in_process(flags(inputs, tmp_path / "run"))
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert len(metrics(tmp_path / "run")) == 4


def test_a_killed_run_continues_from_its_last_state_bit_for_bit(inputs, undisturbed, tmp_path):
    """Killed after step 7, with the state of step 6 and half a line of metrics on the disk."""
    out = tmp_path / "run"
    command = flags(inputs, out, epochs=3, workers=1, save_every=3)

    def train_and_die():
        with pytest.MonkeyPatch.context() as patch:
            call_after_step(patch, 7, lambda: os.kill(os.getpid(), signal.SIGKILL))
            in_process(command)

    assert in_fork(train_and_die) == -signal.SIGKILL
    assert checkpoint.load_state(out)["step"] == 6 and len(metrics(out)) == 7
    assert not (out / "projector.pth").exists()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "loss"')
    in_process(command)
    assert_equal_runs(out, undisturbed)


def test_the_first_nan_loss_ends_the_run_with_the_state_before_it(inputs, undisturbed, tmp_path, monkeypatch):
    forward, calls = LLaVA.forward, []

    def nan_in_step_6(self, *batch):
        calls.append(1)
        return forward(self, *batch) * (float("nan") if len(calls) == 6 else 1)

    command = flags(inputs, tmp_path / "run", epochs=3)
    with monkeypatch.context() as patch:
        patch.setattr(LLaVA, "forward", nan_in_step_6)
        with pytest.raises(UserError, match=r"^step 6: loss nan.*samples \d+.png, .* and 5 more.*lower --lr"):
            in_process(command)
    assert checkpoint.load_state(tmp_path / "run")["step"] == len(metrics(tmp_path / "run")) == 5
    in_process(command)
    assert_equal_runs(tmp_path / "run", undisturbed)


# --- the run directory


def test_a_finished_run_is_unchanged_by_its_command_and_other_settings_are_refused(inputs, tmp_path):
    command = flags(inputs, tmp_path, max_steps=2)
    in_process(command)
    before = files(tmp_path)
    in_process(command)
    assert files(tmp_path) == before
    for other in ("--lr 0.5", "--batch-size 4", "--seed 1", "--precision bf16", "--epochs 2", "--warmup-ratio 0.5"):
        with pytest.raises(UserError, match=f"began with {other.split()[0]} .*, now it is .*--no-resume"):
            in_process([*command, *other.split()])
    assert files(tmp_path) == before
    for other in ("--workers 1", "--log-every 2", "--save-every 7", "--micro-batch-tokens 99", "--max-bad-samples 2"):
        in_process([*command, *other.split()])
    assert files(tmp_path) == before
    in_process([*command, "--lr", "0.5", "--no-resume"])
    assert metrics(tmp_path)[0]["lr"] == 0.5


def test_no_folder_of_anything_else_is_written_to(inputs, tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    (tmp_path / "state.pth").write_text("mine")
    before = files(tmp_path)
    for resume in ("--resume", "--no-resume"):
        with pytest.raises(UserError, match="is not a run of train.py"):
            in_process([*flags(inputs, tmp_path), resume], curves=True)
    assert files(tmp_path) == before


@pytest.mark.parametrize("step, old", [(2, None), (1, b"W of an earlier step")])
def test_a_run_killed_between_its_last_two_saves_is_completed(inputs, tmp_path, step, old):
    """The state is of the last step; the weights for use are absent, or of the step where the run was interrupted."""
    command = flags(inputs, tmp_path, max_steps=2)
    in_process(command)
    expected = W(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"step": step}))
    if old is None:
        (tmp_path / "projector.pth").unlink()
    else:
        (tmp_path / "projector.pth").write_bytes(old)
    in_process(command)
    assert torch.equal(W(tmp_path), expected)


def test_the_state_is_saved_even_if_the_vit_has_vanished(inputs, tmp_path, monkeypatch):
    (tmp_path / "vit.pt").write_bytes((inputs / "vit.pt").read_bytes())
    command = flags(inputs, tmp_path / "run", vision=tmp_path / "vit.pt")
    with monkeypatch.context() as patch:
        call_after_step(patch, 4, (tmp_path / "vit.pt").unlink)
        with pytest.raises(UserError, match="vit.pt: cannot be read"):
            in_process(command)
    assert checkpoint.load_state(tmp_path / "run")["step"] == 4
    (tmp_path / "vit.pt").write_bytes((inputs / "vit.pt").read_bytes())
    in_process(command)
    assert len(metrics(tmp_path / "run")) == 4 and W(tmp_path / "run").isfinite().all()


def test_a_damaged_state_is_refused_in_one_line(inputs, tmp_path):
    command = flags(inputs, tmp_path, max_steps=2)
    in_process(command)
    projector, state = (tmp_path / "projector.pth").read_bytes(), checkpoint.load_state(tmp_path)
    for model in ({"projector.weight": torch.zeros(3, 3)}, {}, state["model"] | {"llama.norm.weight": torch.ones(32)}):
        checkpoint.save_state(tmp_path, state | {"model": model}, 1)
        with pytest.raises(UserError, match="state.pth: belongs to another model or is damaged .*--no-resume"):
            in_process(command)
    torch.save({"norm.weight": Bomb(str(tmp_path / "exploded"))}, tmp_path / "state.pth")
    with pytest.raises(UserError, match="state.pth: holds Python objects .*--no-resume"):
        in_process(command)
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "state.pth").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(UserError, match="state.pth: damaged, truncated"):
        in_process(command)
    (tmp_path / "state.pth").unlink()
    with pytest.raises(UserError, match="but no state.pth"):
        in_process(command)
    assert (tmp_path / "projector.pth").read_bytes() == projector


def change_record(path):
    path.write_text(path.read_text().replace("big red", "big blue", 1))


def change_norm(path):
    weights = torch.load(path / "consolidated.00.pth", weights_only=True)
    torch.save(weights | {"norm.weight": weights["norm.weight"] * 2}, path / "consolidated.00.pth")


def change_bias(path):
    weights = torch.load(path, weights_only=True)
    torch.save(weights | {"visual.ln_pre.bias": weights["visual.ln_pre.bias"] + 1}, path)


def change_output(path):
    weights = torch.load(path / "consolidated.00.pth", weights_only=True)
    torch.save(weights | {"output.weight": weights["output.weight"] * 2}, path / "consolidated.00.pth")


@pytest.mark.parametrize("flag, change", [("llama", change_output), ("data", change_record), ("llama", change_norm), ("vision", change_bias)])
def test_inputs_may_move_but_not_change(inputs, tmp_path, flag, change):
    for name in ("captions.json", "vit.pt", "images", "llama"):
        copy = shutil.copytree if (inputs / name).is_dir() else shutil.copy
        copy(inputs / name, tmp_path / name)
    command = flags(inputs, tmp_path / "run", max_steps=2)
    in_process(command)
    moved = {"data": tmp_path / "captions.json", "llama": tmp_path / "llama", "vision": tmp_path / "vit.pt"}
    command = flags(inputs, tmp_path / "run", max_steps=2, images=tmp_path / "images", **moved)
    in_process(command)
    change(moved[flag])
    with pytest.raises(UserError, match=f"began with other content of --{flag}"):
        in_process(command)


def test_a_disk_without_room_is_refused_before_the_training(inputs, tmp_path, monkeypatch):
    command, needed = flags(inputs, tmp_path), 28 * 32 * 64  # bytes, for W
    (tmp_path / ".state.pth.tmp").write_bytes(bytes(1000))  # of a killed run; the next state replaces it
    for free, enough in (needed - 1001, False), (needed - 1000, True):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        if enough:
            in_process(command)
        else:
            with pytest.raises(UserError, match="need 0.1 MiB, and there is room for 0.1"):
                in_process(command)
            assert not (tmp_path / "config.json").exists()


def test_only_one_process_trains_in_a_directory(inputs, tmp_path):
    def hold_lock():
        train.claim(tmp_path / "run")
        held.set()
        time.sleep(PATIENCE)

    fork = multiprocessing.get_context("fork")
    held, holder = fork.Event(), fork.Process(target=hold_lock, daemon=True)
    holder.start()
    assert held.wait(PATIENCE)
    with pytest.raises(UserError, match="another train.py .*run.* in it"):
        in_process(flags(inputs, tmp_path / "run", max_steps=1))
    holder.kill()
    holder.join()
    in_process(flags(inputs, tmp_path / "run", max_steps=1))


def test_a_refused_run_leaves_nothing_behind(inputs, tmp_path):
    command = flags(inputs, tmp_path / "run", max_steps=1, data=tmp_path / "absent.json")
    with pytest.raises(UserError, match="absent.json"):
        in_process(command)
    assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/.lock").write_text("mine")
    (tmp_path / "mine/text").write_text("mine")
    with pytest.raises(UserError, match="is not a run"):
        in_process(flags(inputs, tmp_path / "mine", max_steps=1))
    assert (tmp_path / "mine/.lock").read_text() == "mine"


def test_a_run_names_the_command_to_give_after_it(inputs, tmp_path, capsys):
    in_process(flags(inputs, tmp_path, max_steps=1))
    assert capsys.readouterr().out.endswith(f"next: torchrun train.py --stage 2 --init-from {tmp_path} --data ...\n")


def test_a_failed_plot_does_not_fail_the_run(inputs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    command = flags(inputs, tmp_path, max_steps=2)
    in_process(command, curves=True)
    assert Image.open(tmp_path / "loss.png").format == "PNG"
    for error in (ImportError("no matplotlib"), UserError("a full disk"), RuntimeError("a font")):

        def fail(run):
            raise error

        monkeypatch.setattr(plots, "loss_curves", fail)
        in_process([*command, "--no-resume"], curves=True)
        assert not (tmp_path / "loss.png").exists()  # the curves of the earlier run are gone too
        assert len(metrics(tmp_path)) == 2 and (tmp_path / "projector.pth").is_file()


# --- data workers


def test_a_stuck_data_worker_ends_the_run_in_one_line_with_its_state_saved(inputs, tmp_path):
    """Opening a FIFO blocks until another process writes into it."""
    images = copy_images(inputs, tmp_path / "images")
    blocked = images / f"{data.epoch_order(range(30), epoch=0, seed=0)[24]}.png"  # the first sample of step 4
    blocked.unlink()
    os.mkfifo(blocked)
    command = flags(inputs, tmp_path / "run", images=images, workers=2)
    status, _, stderr = finish(start(command, patch="import data\ndata.READ_TIMEOUT = 3"))
    assert status == 1 and re.search(r"\nerror: step 4: .*3 s.*\n$", stderr)
    assert stderr.count("error") == 1 and "Traceback" not in stderr
    assert len(metrics(tmp_path / "run")) == 3 and checkpoint.load_state(tmp_path / "run")["step"] == 3
    blocked.unlink()
    copy_images(inputs, images)
    in_process(command)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


def copy_images(inputs, folder) -> Path:
    folder.mkdir(exist_ok=True)
    for path in (inputs / "images").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_no_share_and_keep_the_order(inputs, workers):
    """Over several epochs, whose orders the workers ask for at the same time."""
    sp = load_tokenizer(inputs / "llama/tokenizer.model")
    encoder = data.Encoder(sp, 16, 32, Pictures(inputs / "images"))
    shares = data.Shares(data.Examples([inputs / "captions.json"]), encoder, 8, 0)
    expected = [shares[t].ids for t in range(40)]
    fresh = data.Shares(data.Examples([inputs / "captions.json"]), encoder, 8, 0)
    assert [share.ids for share in data.prefetched(fresh, range(40), workers)] == expected


def test_an_error_of_a_worker_reaches_the_training(inputs):
    class Broken:
        def __getitem__(self, t):
            raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        list(data.prefetched(Broken(), range(4), 2))


# --- wrong input ends in one line, with an exit status other than 0, and harms nothing


class Bomb:
    """An object whose unpickling makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def copy_llama(inputs, to):
    to.mkdir()
    for path in (inputs / "llama").iterdir():
        (to / path.name).write_bytes(path.read_bytes())


def damage_vit(inputs, bad):
    weights = torch.load(inputs / "vit.pt", weights_only=True)
    weights["visual.conv1.weight"] = weights["visual.conv1.weight"] * torch.nan
    torch.save(weights, bad)


def truncate_llama(inputs, bad):
    copy_llama(inputs, bad)
    weights = (bad / "consolidated.00.pth").read_bytes()
    (bad / "consolidated.00.pth").write_bytes(weights[: len(weights) // 2])


def put_code_into_vit(inputs, bad):
    bad.write_bytes(pickle.dumps(Bomb(str(bad.parent / "exploded"))))


def put_code_into_llama(inputs, bad):
    copy_llama(inputs, bad)
    torch.save({"norm.weight": Bomb(str(bad.parent / "exploded"))}, bad / "consolidated.00.pth")


def change_layers(inputs, bad):
    copy_llama(inputs, bad)
    params = json.loads((bad / "params.json").read_text())
    (bad / "params.json").write_text(json.dumps({**params, "n_layers": 3}))


def shrink_vocabulary(inputs, bad):
    copy_llama(inputs, bad)
    write_llama(bad, vocab_size=300)


def write_other_projector(inputs, bad):
    torch.save({"weight": torch.zeros(32, 48)}, bad)


def write_bad_json(inputs, bad):
    bad.write_text('[{"image": "0.png",\n "caption" "x"}]')


def write_texts_only(inputs, bad):
    messages = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]
    bad.write_text(json.dumps([{"id": "s6", "conversations": messages}]))


def name_absent_picture(inputs, bad):
    bad.write_text(json.dumps([{"id": "s7", "image": "gone.png", "caption": "x"}]))


def truncate_picture(inputs, bad):
    (bad.parent / "pictures").mkdir()
    (bad.parent / "pictures/x.png").write_bytes((inputs / "images/0.png").read_bytes()[:100])
    bad.write_text(json.dumps([{"id": "s8", "image": "x.png", "caption": "x"}]))


def write_picture_bomb(inputs, bad):
    """A PNG of 60000 x 60000 pixels in a few bytes."""
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    with zipfile.ZipFile(bad.parent / "pictures.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", header + zlib.crc32(header[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
    bad.write_text(json.dumps([{"id": "s9", "image": "x.png", "caption": "x"}]))


def write_empty_file(inputs, bad):
    bad.write_text("")


# What is broken: the function that breaks it, the changed flags, a pattern of the error. BAD is the path that the
# function gets, which is absent without a function.
BROKEN = {
    "no llama": (None, {"llama": "BAD"}, "BAD"),
    "no vision": (None, {"vision": "BAD"}, "BAD"),
    "no data": (None, {"data": "BAD"}, "BAD: cannot be read"),
    "no images": (None, {"images": "BAD"}, "BAD: neither a folder nor an intact zip .*--images"),
    "images not given": (None, {"images": None}, "--images missing"),
    "a folder of pictures as data": (None, {"data": "INPUTS/images"}, "problems.json: cannot be read"),
    "a damaged ViT": (damage_vit, {"vision": "BAD"}, "^step 1: loss nan"),
    "a truncated checkpoint": (truncate_llama, {"llama": "BAD"}, "BAD/consolidated.00.pth: damaged, truncated"),
    "a pickle with code": (put_code_into_vit, {"vision": "BAD"}, "BAD: .*"),
    "a checkpoint with code": (put_code_into_llama, {"llama": "BAD"}, "BAD/consolidated.00.pth: holds Python objects"),
    "another shape": (change_layers, {"llama": "BAD"}, "BAD: the weights are incomplete .*layers.2"),
    "a tokenizer of another LLaMA": (shrink_vocabulary, {"llama": "BAD"}, "tokenizer.model: .* pieces.*300"),
    "a projector of another shape": (write_other_projector, {"projector": "BAD"}, r"\(32, 48\).*width 64"),
    "bad JSON": (write_bad_json, {"data": "BAD"}, "BAD: cannot be read as JSON .*line 2 column 12"),
    "stage 1 without pictures": (write_texts_only, {"data": "BAD"}, "^--data: no sample has a picture"),
    "an absent picture": (name_absent_picture, {"data": "BAD"}, "^step 1: sample s7: picture gone.png: .*No such"),
    "a truncated picture": (truncate_picture, {"data": "BAD", "images": "FOLDER/pictures"},
                            "^step 1: sample s8: picture x.png: not a readable picture"),
    "a picture bomb": (write_picture_bomb, {"data": "BAD", "images": "FOLDER/pictures.zip"},
                       r"^step 1: sample s9: picture x.png: its pixels exceed the limit of 100000000"),
    "no green token": (None, {"max_length": "SHORT"}, "^step 1: .*no green token.*--max-length"),
    "no room for a picture": (None, {"max_length": 40}, "^--max-length 40: .*picture"),
    "an out that is a file": (write_empty_file, {"out": "BAD"}, "BAD: exists and is not a run of train.py"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_wrong_input_ends_in_one_line(inputs, tmp_path, what):
    spoil, changes, pattern = BROKEN[what]
    bad = tmp_path / what.replace(" ", "-")
    if spoil:
        spoil(inputs, bad)
    # The system message, the picture, and two tokens of the request.
    short = len(system_ids(load_tokenizer(inputs / "llama/tokenizer.model"))) + 16 + 2
    paths = {"BAD": str(bad), "INPUTS": str(inputs), "FOLDER": str(tmp_path), "SHORT": str(short)}
    for name, path in paths.items():
        changes = {flag: value and str(value).replace(name, path) for flag, value in changes.items()}
        pattern = pattern.replace(name, re.escape(path))
    with pytest.raises(UserError) as error:
        in_process(flags(inputs, **{"out": tmp_path / "run", **changes}))
    assert re.search(pattern, str(error.value)) and "\n" not in str(error.value), error.value
    assert len(str(error.value)) < 700 and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_middle_of_a_run_keeps_what_was_trained(inputs, tmp_path, workers, capsys):
    images, out = copy_images(inputs, tmp_path / "images"), tmp_path / "run"
    command = flags(inputs, out, images=images, workers=workers)
    damaged = f"{data.epoch_order(range(30), epoch=0, seed=0)[24]}.png"  # the first sample of step 4
    (images / damaged).write_bytes(b"no picture")
    with pytest.raises(
        UserError, match=f"^step 4: sample {damaged}: picture {damaged}: not a readable picture.*correct"
    ):
        in_process(command)
    assert len(metrics(out)) == 3 and checkpoint.load_state(out)["step"] == 3
    copy_images(inputs, images)
    in_process(command)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_gets_a_line_of_its_own_on_stderr(inputs, tmp_path, workers):
    """Also while the progress bar is shown and threads read pictures; the exit status is 1."""
    records = json.loads((inputs / "captions.json").read_text()) * 20
    (tmp_path / "captions.json").write_text(json.dumps([{"id": "s7", "image": "gone.png", "caption": "x"}, *records]))
    command = flags(inputs, tmp_path / "run", data=tmp_path / "captions.json", batch_size=601, workers=workers)
    status, stdout, stderr = finish(start(command))
    assert status == 1 and "Traceback" not in stderr and "error:" not in stdout
    assert re.search(r"(^|\n)error: step 1: sample s7: [^\n]*\n$", stderr)


def test_pictures_that_cannot_be_read_are_skipped_up_to_a_number(inputs, tmp_path, capsys):
    """The others train as they would without those samples."""
    images = copy_images(inputs, tmp_path / "images")
    for name in ("3.png", "7.png"):
        (images / name).write_bytes(b"broken")
    in_process(flags(inputs, tmp_path / "run", images=images, max_bad_samples=2))
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("skipped: sample 3.png") == 1 and "2 samples " in printed.out
    in_process(flags(inputs, tmp_path / "all"))
    tokens = {name: sum(line["tokens"] for line in metrics(tmp_path / name)) for name in ("run", "all")}
    assert tokens["run"] < tokens["all"] and [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    with pytest.raises(UserError, match="correct .* and give the same command again.*--max-bad-samples"):
        in_process(flags(inputs, tmp_path / "strict", images=images, max_bad_samples=1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"; and 5 more; correct .*\(is --images right\?\)") as raised:
        in_process(flags(inputs, tmp_path / "absent", images=tmp_path / "empty"))
    assert str(raised.value).count("No such file") == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "x.json"], "--llama and --vision missing"),
        (["--images", "x"], "--images and --projector go with"),
        (["--batch-size", "0"], "--batch-size: 0: expected a whole number of 1 or more"),
        (["--max-steps", "1.5"], "--max-steps: 1.5: expected a whole number of 1 or more"),
        (["--lr", "-1"], "--lr: -1: expected a number of 0.0 or more"),
        (["--warmup-ratio", "2"], "--warmup-ratio: 2: expected a number from 0.0 to 1.0"),
        (["--lr", "nan"], "--lr: nan: expected a number"),
        (["--lr", "inf"], "--lr: inf: expected a number"),
        (["--seed", "-1"], "--seed: -1: expected a whole number"),
        (["--seed", str(2**64)], "--seed: .*: expected a whole number"),
        (["--workers", "100000"], "--workers: 100000: expected a whole number from 0 to 256"),
        (["--batchsize", "3"], "unrecognized arguments: --batchsize"),
        (["--task", "chat"], "--task chat: belongs to stage 2"),
        (["--parallel", "fsdp"], "--parallel fsdp: .*torchrun"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(arguments, message, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match=message) as error:
        train.parse_arguments(["--stage", "1", *arguments])
    assert "\n" not in str(error.value)
