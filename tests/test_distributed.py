"""distributed.py: several processes train as one does, by ddp and by fsdp; a process that dies or is interrupted.

One start of torchrun, in the fixture `pairs`, makes most of the runs of two processes one after another.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_llava
from test_train import (ENVIRONMENT, PATIENCE, W, call_after_step, chat, copy_images, finish, flags,  # noqa: F401
                        hang_up, in_process, inputs, metrics, stage_2, timeless)  # fmt: skip

import checkpoint
import distributed
from common import UserError
from conversation import load_tokenizer
from data import Encoder, Examples, Shares
from formats.pictures import Pictures

# Trains with each list of arguments of runs.json: continues a copy of an earlier run if one is named, and stops after a
# step if one is given. Then calls the functions that exchange values, and writes what they return.
SEVERAL_RUNS = f"""
import json, os, shutil, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import distributed, train
from common import UserError
from tools import plots

plots.loss_curves = lambda run: None
append_metrics, last_step = train.append_metrics, None

def append_and_stop(path, **values):
    append_metrics(path, **values)
    if values["step"] == last_step:
        os.kill(os.getpid(), signal.SIGTERM)

def fail():
    raise UserError("of process 0")

train.append_metrics = append_and_stop
folder = sys.argv[1]
with distributed.processes() as (rank, world_size, device):
    for arguments, earlier, last_step in json.load(open(folder + "/runs.json")):
        a = train.parse_arguments(arguments)
        if earlier:
            distributed.by_process_0(lambda: shutil.copytree(f"{{folder}}/{{earlier}}", a.out))
        try:
            train.run(a, rank, world_size, device)
        except SystemExit:
            pass
    values = dict(rank=rank, world=world_size)
    values["exchanged"] = distributed.exchanged([rank, 10 * rank + 0.5], device).tolist()
    values["gathered"] = distributed.gathered([f"line {{rank}}"] * (rank + 1))
    values["by_process_0"] = distributed.by_process_0(lambda: f"made by {{rank}}")
    try:
        distributed.by_process_0(fail)
    except UserError as error:
        values["error"] = str(error)
    json.dump(values, open(f"{{folder}}/values{{rank}}.json", "w"))
"""
# train.py, with steps long enough to be interrupted in the middle of a run.
SLOW = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import common, train

append_metrics = train.append_metrics

def append_and_wait(path, **values):
    append_metrics(path, **values)
    time.sleep(0.2)

train.append_metrics = append_and_wait
common.run_command(train.main)
"""
UNEQUAL = dict(
    batch_size=6, micro_batch_tokens=90, max_steps=4
)  # the processes have different numbers of micro-batches


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def start(command) -> subprocess.Popen:
    """Starts `python` with these words in a session of its own."""
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip


def stopped_after(step, arguments):
    """Trains in this process until SIGTERM comes after the step."""
    with pytest.MonkeyPatch.context() as patch:
        call_after_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            in_process(arguments)


@pytest.fixture(scope="session")
def pairs(inputs, chat, tmp_path_factory):  # noqa: F811
    """A folder of runs. `one-` runs are of one process without torchrun, all others of two processes."""
    folder = tmp_path_factory.mktemp("pairs")
    broken = copy_images(inputs, folder / "broken")
    for name in ("3.png", "7.png"):
        (broken / name).write_bytes(b"broken")
    commands = {
        "stage1": flags(inputs, None, **UNEQUAL),
        "stage2": stage_2(inputs, chat, None, **UNEQUAL),
        "single": stage_2(inputs, chat, None, batch_size=1, max_steps=3),
        "bf16": stage_2(inputs, chat, None, precision="bf16", max_steps=2),
        "broken": flags(inputs, None, images=broken, max_bad_samples=2),
    }

    def command(kind, name):
        return [*commands[kind], "--out", str(folder / name)]

    for kind in commands:
        in_process(command(kind, f"one-{kind}"))
    stopped_after(2, command("stage2", "one-half"))
    runs = []
    for how in ("ddp", "fsdp"):
        for kind in commands:
            runs.append(([*command(kind, f"{how}-{kind}"), "--parallel", how], None, None))
        runs.append(([*command("stage2", f"{how}-half"), "--parallel", how], None, 2))
    runs.append(
        ([*command("stage2", "fsdp-checkpointed"), "--parallel", "fsdp", "--checkpoint-activations"], None, None)
    )
    for half in ("one", "ddp", "fsdp"):
        for how in ("ddp", "fsdp"):
            runs.append(([*command("stage2", f"{half}-then-{how}"), "--parallel", how], f"{half}-half", None))
    (folder / "runs.json").write_text(json.dumps(runs))
    (folder / "several_runs.py").write_text(SEVERAL_RUNS)
    status, stdout, stderr = finish(start([*torchrun(2), str(folder / "several_runs.py"), str(folder)]))
    assert status == 0, stderr
    (folder / "printed").write_text(stdout + stderr)
    for half in ("ddp", "fsdp"):
        shutil.copytree(folder / f"{half}-half", folder / f"{half}-then-one")
        in_process(command("stage2", f"{half}-then-one"))
    return folder


def assert_near(run, expected, loss=1e-4, weights=1e-4):
    """Equal but for the order in which sums are taken. Tolerances are relative."""
    for a, b in zip(metrics(run), metrics(expected), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=loss)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * loss)
        for name in ("step", "lr", "green_tokens", "tokens"):
            assert a[name] == b[name]
    for (name, p), q in zip(parameters(run).items(), parameters(expected).values(), strict=True):
        assert (p - q).norm() <= weights * q.norm(), name


def parameters(run) -> dict[str, torch.Tensor]:
    """All parameters that evaluation and chat would use."""
    model, _, _ = checkpoint.load_run(run)
    return model.state_dict()


# --- two processes are as one


@pytest.mark.parametrize("kind", ["stage1", "stage2", "single", "broken"])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_train_as_one(pairs, how, kind):
    """Also if one of them has fewer micro-batches, or no sample at all (`single`), or skips a picture (`broken`)."""
    assert_near(pairs / f"{how}-{kind}", pairs / f"one-{kind}")


def test_processes_had_different_numbers_of_micro_batches(inputs):  # noqa: F811
    """A condition of the test above."""
    encoder = Encoder(load_tokenizer(inputs / "llama/tokenizer.model"), 16, 32, Pictures(inputs / "images"))
    examples, limit = Examples([inputs / "captions.json"]), UNEQUAL["micro_batch_tokens"]
    shares = [Shares(examples, encoder, UNEQUAL["batch_size"], 0, rank, 2, limit) for rank in (0, 1)]
    numbers = [[len(steps[t].micro_batches) for steps in shares] for t in range(4)]
    assert any(a != b for a, b in numbers) and max(map(max, numbers)) > 1, numbers


def test_fsdp_changes_nothing_in_bf16_nor_with_activation_checkpointing(pairs):
    for how in ("ddp", "fsdp"):
        assert_near(pairs / f"{how}-bf16", pairs / "one-bf16", loss=2e-3, weights=2e-2)
    assert_near(pairs / "fsdp-checkpointed", pairs / "one-stage2")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_an_interrupted_run_of_two_processes_continues_bit_for_bit(pairs, how):
    half, run, expected = (pairs / f"{how}-{name}" for name in ("half", f"then-{how}", "stage2"))
    assert len(metrics(half)) == checkpoint.load_state(half)["step"] == 2
    assert timeless(run) == timeless(expected)
    weights = parameters(expected)
    assert all(torch.equal(p, weights[name]) for name, p in parameters(run).items())


@pytest.mark.parametrize(
    "name", ["one-then-ddp", "one-then-fsdp", "ddp-then-fsdp", "ddp-then-one", "fsdp-then-ddp", "fsdp-then-one"]
)
def test_any_processes_continue_the_state_of_any_others(pairs, name):
    assert_near(pairs / name, pairs / "one-stage2")


def test_the_state_is_the_same_file_for_ddp_and_fsdp(pairs):
    """Full tensors by the names of LLaVA's parameters, without those that are frozen."""
    states = {how: checkpoint.load_state(pairs / f"{how}-half") for how in ("one", "ddp", "fsdp")}
    names = [f"llama.{name}" for name in checkpoint.load_llama(pairs / "one-half").state_dict()]
    for state in states.values():
        assert sorted(state["model"]) == sorted([*names, "projector.weight"])
        for name, tensor in state["model"].items():
            assert type(tensor) is torch.Tensor and tensor.shape == states["one"]["model"][name].shape


def test_each_message_is_printed_once(pairs):
    printed = (pairs / "printed").read_text()
    for how in ("ddp", "fsdp"):
        assert printed.count(f"{how}-broken: 4 steps") == 1
    assert printed.count("skipped: sample 3.png") == printed.count("skipped: sample 7.png") == 2  # by ddp and by fsdp


def test_processes_exchange_values(pairs):
    for rank in (0, 1):
        assert json.loads((pairs / f"values{rank}.json").read_text()) == dict(
            rank=rank, world=2, exchanged=[[0, 0.5], [1, 10.5]], gathered=["line 0", "line 1", "line 1"],
            by_process_0="made by 0", error="of process 0")  # fmt: skip


def test_fsdp_in_one_process_of_torchrun_continues_a_run_of_ddp(inputs, pairs, tmp_path):  # noqa: F811
    shutil.copytree(pairs / "one-half", tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())["settings"]
    command = stage_2(inputs, Path(config["init_from"]).parent, tmp_path / "run", **UNEQUAL, parallel="fsdp")
    status, stdout, stderr = finish(start([*torchrun(1), "train.py", *command]))
    assert status == 0, stderr
    assert "continues after step 2 of 4" in stdout
    assert_near(tmp_path / "run", pairs / "one-stage2")


def test_rank_without_torchrun_is_refused(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="RANK is set, but not WORLD_SIZE and MASTER_ADDR.*torchrun"):
        with distributed.processes():
            pass


# --- interruption and faults


@pytest.fixture
def slow(inputs, tmp_path):  # noqa: F811
    """A run of 12 steps of two processes, of 0.2 s each: the words after `python`, train.py's arguments, --out."""
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = flags(inputs, tmp_path / "run", epochs=3, workers=1)
    return [*torchrun(2), str(tmp_path / "slow.py"), *arguments], arguments, tmp_path / "run"


def assert_saved_and_complete(inputs, arguments, out, tmp_path):  # noqa: F811
    """The run ended in the middle with all its steps saved, and one process continues it to the end of any other."""
    steps = len(metrics(out))
    assert 3 <= steps < 12 and checkpoint.load_state(out)["step"] == steps
    assert W(out).isfinite().all()
    in_process(arguments)
    in_process([*arguments, "--out", str(tmp_path / "undisturbed")])
    assert_near(out, tmp_path / "undisturbed")


def wait_for_steps(out, n):
    deadline = time.time() + PATIENCE
    while not ((out / "metrics.jsonl").is_file() and len(metrics(out)) >= n):
        assert time.time() < deadline, f"{out}: no {n} steps within {PATIENCE} s"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    found = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return sorted(map(int, found.split()))


def test_ctrl_c_under_torchrun_saves_the_state(inputs, slow, tmp_path):  # noqa: F811
    command, arguments, out = slow
    process = start(command)
    wait_for_steps(out, 3)
    os.killpg(process.pid, signal.SIGINT)
    status, stdout, _ = finish(process)
    assert status != 0 and stdout.count("the same command continues") == 1
    assert_saved_and_complete(inputs, arguments, out, tmp_path)


def test_a_closed_terminal_under_torchrun_saves_the_state(inputs, slow, tmp_path):  # noqa: F811
    command, arguments, out = slow
    assert hang_up(command, out) != 0
    assert_saved_and_complete(inputs, arguments, out, tmp_path)


def test_a_killed_process_ends_the_others(inputs, slow, tmp_path):  # noqa: F811
    command, arguments, out = slow
    process = start([*command, "--save-every", "1"])
    wait_for_steps(out, 3)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    began = time.time()
    status, _, stderr = finish(process)
    assert status != 0 and time.time() - began < 60, stderr
    step = checkpoint.load_state(out)["step"]
    assert 2 <= step <= len(metrics(out)) < 12
    in_process(arguments)
    in_process([*arguments, "--out", str(tmp_path / "undisturbed")])
    assert_near(out, tmp_path / "undisturbed")


@pytest.mark.parametrize("error, printed", [("UserError('a mistake')", "\nerror: (process 1) a mistake\n"),
                                            ("ValueError('a bug')", "\nValueError: a bug\n")])  # fmt: skip
def test_an_error_of_one_of_several_processes_ends_it_at_once(error, printed):
    """With one line for a user's mistake, a traceback for any other error, and no wait for the other processes.

    The line is its own, after that of a progress bar.
    """
    code = f"""
import distributed
from common import UserError
from tqdm import tqdm
distributed.start_processes = lambda: (1, 2, None)
distributed.dist.is_initialized = lambda: print("the connections are closed in order")
with distributed.processes():
    bar = tqdm(total=2)
    raise {error}"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1 and done.stdout == "" and done.stderr.endswith(printed)
    assert ("Traceback" in done.stderr) == ("ValueError" in error)


# --- one process


def test_one_process_exchanges_values_with_itself():
    assert distributed.exchanged([1, 2.5], torch.device("cpu")).tolist() == [[1, 2.5]]
    assert distributed.gathered(["a", "b"]) == ["a", "b"]
    assert distributed.by_process_0(lambda: 7) == 7

    def fail():
        raise UserError("a mistake")

    with pytest.raises(UserError, match="^a mistake$"):
        distributed.by_process_0(fail)


def test_processes_of_a_machine_share_its_cores(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    for cores, processes, expected in ((8, 1, 8), (8, 4, 2), (1, 1, 1), (1, 2, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores))
        assert distributed.start_processes() == (0, 1, torch.device("cpu"))
        assert threads.pop() == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    distributed.start_processes()
    assert threads == []


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--nproc_per_node: process 3 .*at most 2"):
        distributed.start_processes()


def test_errors_from_outside_name_their_cause():
    for error, cause in (
        (torch.OutOfMemoryError("CUDA out of memory"), "GPU's memory is full.*--micro-batch-tokens"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"), "another process"),
        (RuntimeError("Connection closed by peer [127.0.0.1]:1"), "another process"),
        (RuntimeError("NCCL error: remote process exited or there was a network error"), "another process"),
    ):
        assert re.search(cause, distributed.outside_cause(error))
    for error in (RuntimeError("shapes do not match"), KeyError("weight")):
        assert distributed.outside_cause(error) is None


def test_a_mistake_of_the_user_is_reported_in_its_own_words():
    """Even if it contains the words of an error from outside."""
    with pytest.raises(UserError, match="^a.json: Connection reset by peer$"):
        with distributed.processes():
            raise UserError("a.json: Connection reset by peer")


def test_clipping_scales_a_long_gradient_only():
    p = torch.nn.Parameter(torch.zeros(2))
    for gradient, norm, clipped in (([3.0, 4.0], 5.0, [0.6, 0.8]), ([0.3, 0.4], 0.5, [0.3, 0.4])):
        p.grad = torch.tensor(gradient)
        assert distributed.clip_gradients([p], 1.0) == pytest.approx(norm)
        assert p.grad.tolist() == pytest.approx(clipped, rel=1e-4)
    p.grad = torch.tensor([math.nan, 1.0])
    assert math.isnan(distributed.clip_gradients([p], 1.0))


def test_full_state_restores_model_and_optimizer():
    def trained(seed, steps):
        model = tiny_llava(seed=seed, stage=1)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(steps):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return model, optimizer

    model, optimizer = trained(0, steps=3)
    state = distributed.full_state(model, optimizer)
    assert list(state["model"]) == ["projector.weight"]
    other, other_optimizer = trained(1, steps=0)
    frozen = {name: p.clone() for name, p in other.state_dict().items() if name != "projector.weight"}
    distributed.restore(other, other_optimizer, state)
    assert torch.equal(other.projector.weight, model.projector.weight)
    assert all(torch.equal(other.state_dict()[name], p) for name, p in frozen.items())
    (expected,), (moments,) = optimizer.state.values(), other_optimizer.state.values()
    assert all(torch.equal(moments[name], expected[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
    with pytest.raises(ValueError, match="other parameters"):
        distributed.restore(other, other_optimizer, state | {"model": {}})
