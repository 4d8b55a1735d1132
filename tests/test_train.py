"""train.py: the schedule, what trains, that no way of cutting up a batch changes it, interruption, bad input.

The runs are real ones of the command line, on tiny random backbones written as raw checkpoints.
"""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import checkpoint
import data
import train
from conversation import UserError, load_tokenizer, system_ids
from demo import LLAMA as DEMO_LLAMA
from model import LLaMA, LLaMAConfig, LLaVA
from vision import VisionConfig, VisionTransformer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a tiny raw LLaMA (the demo's tokenizer), a tiny ViT, 30 captioned pictures of two lengths."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    sizes = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48)
    vocab_size = load_tokenizer(DEMO_LLAMA / "tokenizer.model").vocab_size()
    checkpoint.save_llama(LLaMA(LLaMAConfig(vocab_size=vocab_size, **sizes)), folder / "llama")
    (folder / "llama/tokenizer.model").write_bytes((DEMO_LLAMA / "tokenizer.model").read_bytes())
    vit = VisionTransformer(VisionConfig(image_size=32, patch_size=8, width=64, layers=2), feature_layer=-1)
    for p in vit.parameters():
        torch.nn.init.normal_(p, std=0.1)
    torch.save({f"visual.{name}": p for name, p in vit.state_dict().items()}, folder / "vit.pt")
    (folder / "images").mkdir()
    for i in range(30):
        Image.radial_gradient("L").rotate(12 * i).resize((40 + i, 50)).save(folder / f"images/{i}.png")
    records = [{"image": f"{i}.png", "caption": "a big red circle at the left" + " and more of it" * (i % 4)} for i in range(30)]
    (folder / "captions.json").write_text(json.dumps(records))
    return folder


def flags(inputs, out, **changes):
    given = dict(stage=1, llama=inputs / "llama", vision=inputs / "vit.pt", data=inputs / "captions.json",
                 images=inputs / "images", out=out, batch_size=8, epochs=1, workers=0) | changes  # fmt: skip
    return [str(x) for name, value in given.items() if value is not None for x in (f"--{name.replace('_', '-')}", value)]


def start(arguments, processes=0) -> subprocess.Popen:
    """Starts train.py as a user does; 0 processes: without torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return subprocess.Popen([sys.executable, *launcher, "train.py", *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip


def run(arguments, processes=0, expect=0) -> tuple[str, str]:
    """Runs it to its end -> what it wrote to stdout and to stderr."""
    process = start(arguments, processes)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == expect, stderr
    return stdout, stderr


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def in_process(arguments):
    """train.main() of these arguments, without its signal handlers left behind."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    argv, sys.argv = sys.argv, ["train.py", *arguments]
    try:
        train.main()
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- the schedule


def test_schedule_is_cosine_with_warmup():
    steps, peak = 200, 2e-3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    reference = transformers.get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=6, num_training_steps=steps)
    for step in range(steps):
        expected = reference.get_last_lr()[0]
        if step < 6:  # the reference spends its first step at a rate of 0; here the first is a sixth of the peak
            expected += peak / 6
        assert train.learning_rate(step, steps, peak, 0.03) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        reference.step()


# --- what trains, and how much


def test_stage_1_trains_w_and_changes_no_other_bit(inputs, tmp_path, monkeypatch):
    start, build = {}, checkpoint.build

    def build_and_remember(*args):
        start["model"] = build(*args)
        start["weights"] = {name: w.clone() for name, w in start["model"].state_dict().items()}
        return start["model"]

    monkeypatch.setattr(checkpoint, "build", build_and_remember)
    in_process(flags(inputs, tmp_path / "run", lr=0.01))
    after = start["model"].state_dict()
    assert [name for name in after if not torch.equal(after[name], start["weights"][name])] == ["projector.weight"]
    assert len(metrics(tmp_path / "run")) == 4  # 30 samples, 8 a step


def test_the_gradient_does_not_depend_on_how_a_global_batch_is_cut_up(inputs, tmp_path):
    """8 samples in one process, in two processes of 4, in micro-batches of one or two: after one step AdamW's first
    moment is a tenth of the (clipped) gradient."""
    results = {}
    for name, processes, tokens in (("one", 0, 10**6), ("micro", 0, 130), ("two", 2, 10**6), ("both", 2, 130), ("torchrun", 1, 10**6)):
        out = tmp_path / name
        run(flags(inputs, out, max_steps=1, micro_batch_tokens=tokens), processes)
        moment = checkpoint.load_state(out)["optimizer"]["state"][0]["exp_avg"]
        results[name] = (metrics(out)[0], moment, torch.load(out / "projector.pth", weights_only=True)["weight"])
    line, moment, weight = results.pop("one")
    assert moment.norm() > 0
    for other_line, other_moment, other_weight in results.values():
        for key in ("loss", "grad_norm", "green_tokens", "tokens", "lr"):
            assert other_line[key] == pytest.approx(line[key], rel=1e-5)
        assert (other_moment - moment).norm() < 1e-5 * moment.norm()
        torch.testing.assert_close(other_weight, weight, rtol=1e-4, atol=1e-5)


def test_training_lowers_the_loss_and_repeats_itself_by_seed(inputs, tmp_path):
    losses = {}
    for name, seed, workers in (("a", 0, 0), ("again", 0, 2), ("other", 1, 0)):
        in_process(flags(inputs, tmp_path / name, lr=0.1, seed=seed, max_steps=24) + ["--epochs", "6", "--workers", str(workers)])
        losses[name] = [line["loss"] for line in metrics(tmp_path / name)]
    assert losses["a"] == losses["again"] != losses["other"]
    assert sum(losses["a"][-6:]) < sum(losses["a"][:6])


def test_each_step_takes_the_logged_rate_no_weight_decay_and_clipped_gradients(inputs, tmp_path, monkeypatch):
    seen, step = [], torch.optim.AdamW.step

    def spy(self, *arguments):
        (group,) = self.param_groups
        norm = torch.cat([p.grad.flatten() for p in group["params"]]).norm().item()
        seen.append((group["lr"], group["weight_decay"], norm))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(train, "MAX_GRAD_NORM", 1e-3)
    in_process(flags(inputs, tmp_path, epochs=2, log_every=3))
    rates, decays, norms = zip(*seen)
    assert list(rates) == [train.learning_rate(t, 8, 2e-3, 0.03) for t in range(8)] and set(decays) == {0.0}
    assert norms == pytest.approx([1e-3] * 8, rel=1e-2)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 8] and [line["lr"] for line in lines] == [rates[i] for i in (2, 5, 7)]
    assert min(line["grad_norm"] for line in lines) > 2e-3  # the norm before clipping


def test_w_starts_from_noise_of_the_seed(inputs, tmp_path):
    noise = []
    for seed in (0, 0, 1):
        in_process(flags(inputs, tmp_path / f"{len(noise)}", max_steps=1, lr=0.0, seed=seed))
        noise.append(torch.load(tmp_path / f"{len(noise)}/projector.pth", weights_only=True)["weight"])
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])
    assert noise[0].std().item() == pytest.approx(64**-0.5, rel=0.1)  # 2048 draws: 6 standard errors


def test_bf16_autocast_is_near_fp32(inputs, tmp_path):
    for precision in ("bf16", "fp32"):
        in_process(flags(inputs, tmp_path / precision, precision=precision, max_steps=3))
    for a, b in zip(metrics(tmp_path / "bf16"), metrics(tmp_path / "fp32")):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_activation_checkpointing_changes_nothing(inputs, tmp_path):
    lines = {}
    for name in ("plain", "--checkpoint-activations"):
        in_process(flags(inputs, tmp_path / name.strip("-"), max_steps=2) + [name] * (name != "plain"))
        lines[name] = metrics(tmp_path / name.strip("-"))[1]
    assert lines["plain"]["loss"] == pytest.approx(lines["--checkpoint-activations"]["loss"], rel=1e-6)


# --- stage 2


@pytest.fixture(scope="module")
def chat(inputs, tmp_path_factory):
    """A finished stage-1 run and chat data: with a picture and without one, one turn and several."""
    folder = tmp_path_factory.mktemp("chat")
    in_process(flags(inputs, folder / "stage1", max_steps=2))
    samples = []
    for i in range(20):
        turns = ["<image>\nWhat is it?" if i % 3 else "What is it?", "It is red."] + ["And then?", "Nothing."] * (i % 4)
        talk = [{"from": who, "value": text} for who, text in zip(("human", "gpt") * len(turns), turns)]
        samples.append({"id": str(i), "conversations": talk} | ({"image": f"{i}.png"} if i % 3 else {}))
    (folder / "chat.json").write_text(json.dumps(samples))
    return folder


def stage_2(inputs, chat, out, **changes):
    return flags(inputs, out, **{"stage": 2, "llama": None, "vision": None, "init_from": chat / "stage1",
                                 "data": chat / "chat.json", "max_steps": 3, "lr": 1e-3, **changes})  # fmt: skip


def test_stage_2_trains_w_and_the_llama_and_leaves_the_vit(inputs, chat, tmp_path, monkeypatch):
    models, load_run = [], checkpoint.load_run
    monkeypatch.setattr(checkpoint, "load_run", lambda *args: models.append(load_run(*args)) or models[0])
    in_process(stage_2(inputs, chat, tmp_path / "run"))
    start, _, _ = load_run(chat / "stage1")
    end, _, config = load_run(tmp_path / "run")
    after = end.state_dict()
    for name, weight in start.state_dict().items():
        assert torch.equal(weight, after[name]) == name.startswith("vision."), name
        assert torch.equal(after[name], models[0][0].state_dict()[name]), name  # what was saved is what was trained
    assert config["stage"] == 2 and len(metrics(tmp_path / "run")) == 3


def test_stage_2_does_not_depend_on_how_a_batch_is_cut_up_text_only_samples_included(inputs, chat, tmp_path):
    lines = {}
    for name, processes, tokens, size in (("one", 0, 10**6, 6), ("micro", 0, 100, 6), ("two", 2, 100, 6),
                                          ("single", 0, 10**6, 1), ("idle", 2, 10**6, 1)):  # fmt: skip
        run(stage_2(inputs, chat, tmp_path / name, batch_size=size, micro_batch_tokens=tokens), processes)
        lines[name] = metrics(tmp_path / name)
    for one, other in (("one", "micro"), ("one", "two"), ("single", "idle")):
        for a, b in zip(lines[one], lines[other], strict=True):
            assert (b["loss"], b["grad_norm"]) == (pytest.approx(a["loss"], rel=1e-4), pytest.approx(a["grad_norm"], rel=1e-3))
            assert (b["green_tokens"], b["tokens"]) == (a["green_tokens"], a["tokens"])


def test_a_run_of_stage_2_is_a_raw_llama_again(inputs, chat, tmp_path):
    in_process(stage_2(inputs, chat, tmp_path / "one"))
    in_process(flags(inputs, tmp_path / "again", llama=tmp_path / "one", max_steps=1))
    in_process(stage_2(inputs, chat, tmp_path / "more", init_from=tmp_path / "one", max_steps=1))
    a, b = (checkpoint.load_llama(tmp_path / name).state_dict() for name in ("one", "more"))
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_chat_draws_the_types_uniformly_unless_told_otherwise(inputs, chat, tmp_path, monkeypatch):
    """The 2 samples of one file come as often as the 20 of another."""
    (tmp_path / "few.json").write_text(json.dumps(json.loads((chat / "chat.json").read_text())[:2]))
    seen, get = [], data.Examples.get
    monkeypatch.setattr(data.Examples, "get", lambda self, i, epoch: seen.append(int(i) < 20) or get(self, i, epoch))
    shares = {}
    for sampling in (None, "proportional"):
        seen.clear()
        both = stage_2(inputs, chat, tmp_path / str(sampling), data=chat / "chat.json", epochs=4, max_steps=None, sampling=sampling)
        both.insert(both.index(str(chat / "chat.json")) + 1, str(tmp_path / "few.json"))
        in_process(both)
        shares[sampling] = sum(seen) / len(seen)
    assert 0.3 < shares[None] < 0.7 and shares["proportional"] == pytest.approx(20 / 22, abs=0.02)


def test_scienceqa_is_trained_on_from_its_folder(inputs, chat, tmp_path, monkeypatch, capsys):
    """Problems with pictures, found without --images, and without; absent pictures are counted."""
    folder, problems = tmp_path / "quiz", {}
    for i in range(8):
        problems[str(i)] = dict(question="Which?", choices=["red", "blue"], answer=i % 2, hint="", lecture="So.", solution="It is.",
                                image="image.png" if i % 2 else None, split="train", grade="grade1", subject="x")  # fmt: skip
        if i in (1, 3, 5):
            (folder / f"images/train/{i}").mkdir(parents=True)
            (folder / f"images/train/{i}/image.png").write_bytes((inputs / f"images/{i}.png").read_bytes())
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": list(problems)}))
    arguments = stage_2(inputs, chat, tmp_path / "run", task="scienceqa", data=folder, images=None, max_steps=1)
    with pytest.raises(UserError, match="the pictures of 1 of 8 problems are absent"):
        in_process(arguments)
    pictures, forward = [], LLaVA.forward
    monkeypatch.setattr(LLaVA, "forward", lambda self, *batch: pictures.append(len(batch[3])) or forward(self, *batch))
    in_process([*arguments, "--missing-pictures-as-text"])
    assert pictures == [3] and "1 pictures are absent" in capsys.readouterr().out
    [line] = metrics(tmp_path / "run")
    answer = load_tokenizer(DEMO_LLAMA / "tokenizer.model").encode("So. It is. The answer is A.")
    assert line["green_tokens"] > 8 * len(answer)


def test_wrong_combinations_for_stage_2_are_refused(inputs, chat, tmp_path):
    for changes, message in (
        (dict(task="scienceqa"), "goes with --stage 2 --task scienceqa"),
        (dict(init_from=tmp_path), "no finished run"),
        (dict(llama=inputs / "llama"), "--init-from brings"),
    ):
        with pytest.raises(UserError, match=message):
            in_process(stage_2(inputs, chat, tmp_path / "x", **changes))


# --- the run directory


@pytest.mark.parametrize("processes, sign, then", [(0, signal.SIGINT, 0), (0, signal.SIGTERM, 2), (2, signal.SIGINT, 2)])
def test_an_interrupted_run_goes_on_to_the_same_end(inputs, tmp_path, processes, sign, then):
    arguments = flags(inputs, tmp_path / "whole", workers=1) + ["--epochs", "12"]
    run(arguments, processes)
    out = tmp_path / "broken"
    arguments[arguments.index("--out") + 1] = str(out)
    child = start(arguments, processes)
    while child.poll() is None and not ((out / "metrics.jsonl").is_file() and len(metrics(out)) >= 5):
        time.sleep(0.02)
    os.killpg(child.pid, sign)  # as a terminal or torchrun does: to all of them, workers included
    stderr = child.communicate(timeout=60)[1]
    assert child.returncode == (1 if processes else 128 + sign) and (processes or "Traceback" not in stderr), stderr
    done = len(metrics(out))
    assert 5 <= done < 48 and checkpoint.load_state(out)["step"] == done
    assert torch.load(out / "projector.pth", weights_only=True)["weight"].isfinite().all()
    run(arguments, then)
    expected, got = ([{k: v for k, v in line.items() if k != "seconds"} for line in metrics(o)] for o in (tmp_path / "whole", out))
    a, b = (torch.load(o / "projector.pth", weights_only=True)["weight"] for o in (tmp_path / "whole", out))
    if then == processes:
        assert got == expected and torch.equal(a, b)
    else:  # the same samples in the same order; sums are taken in another one
        assert got == [pytest.approx(line, rel=1e-4) for line in expected] and (a - b).norm() < 1e-4 * a.norm()


def test_a_killed_run_goes_on_from_its_last_state_to_the_same_end(inputs, tmp_path):
    arguments = flags(inputs, tmp_path / "whole", workers=1, save_every=3) + ["--epochs", "12"]
    run(arguments)
    out = tmp_path / "killed"
    arguments[arguments.index("--out") + 1] = str(out)
    child = start(arguments)
    while child.poll() is None and not ((out / "metrics.jsonl").is_file() and len(metrics(out)) >= 7):
        time.sleep(0.02)
    child.kill()
    child.communicate()
    step = checkpoint.load_state(out)["step"]
    assert 3 <= step <= len(metrics(out)) < 48 and step % 3 == 0 and not (out / "projector.pth").exists()
    run(arguments)
    expected, got = ([{k: v for k, v in line.items() if k != "seconds"} for line in metrics(o)] for o in (tmp_path / "whole", out))
    assert got == expected
    assert torch.equal(*(torch.load(o / "projector.pth", weights_only=True)["weight"] for o in (tmp_path / "whole", out)))


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(inputs, tmp_path):
    arguments = flags(inputs, tmp_path, max_steps=2)
    in_process(arguments)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    in_process(arguments)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    with pytest.raises(UserError, match="begun with --lr 0.002, now it is 0.5.*--no-resume"):
        in_process(arguments + ["--lr", "0.5"])
    for other in (["--batch-size", "4"], ["--seed", "1"], ["--precision", "bf16"]):
        with pytest.raises(UserError, match=f"begun with {other[0]}"):
            in_process(arguments + other)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    in_process(arguments + ["--lr", "0.5", "--no-resume"])
    assert metrics(tmp_path)[0]["lr"] == 0.5


def test_a_run_of_one_process_is_not_gone_on_with_as_fsdp_nor_lost(inputs, tmp_path):
    arguments = flags(inputs, tmp_path, max_steps=2, save_every=1)
    in_process(arguments)
    (tmp_path / "projector.pth").unlink()  # as if it had been killed before its end
    state = (tmp_path / "state/training.pth").read_bytes()
    stderr = run([*arguments, "--parallel", "fsdp"], 1, expect=1)[1]
    assert "was begun with --parallel ddp, now it is fsdp" in stderr
    assert (tmp_path / "state/training.pth").read_bytes() == state


def test_no_folder_that_is_not_a_run_is_written_to(inputs, tmp_path):
    (tmp_path / "config.json").write_text('{"mine": 1}')
    (tmp_path / "state").mkdir()
    (tmp_path / "state/thesis.txt").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for resume in ("--resume", "--no-resume"):
        with pytest.raises(UserError, match="is no run of train.py"):
            in_process(flags(inputs, tmp_path) + [resume])
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_run_that_lost_a_part_says_so_or_mends_it(inputs, tmp_path):
    arguments = flags(inputs, tmp_path, max_steps=2)
    in_process(arguments)
    W = (tmp_path / "projector.pth").read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    for step, old in ((2, None), (1, b"W of an earlier step")):  # as if killed between the two saves, or before the second
        (tmp_path / "config.json").write_text(json.dumps(config | {"step": step}))
        (tmp_path / "projector.pth").unlink() if old is None else (tmp_path / "projector.pth").write_bytes(old)
        in_process(arguments)
        assert (tmp_path / "projector.pth").read_bytes() == W
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("no metrics\n")
    in_process(arguments)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    state = checkpoint.load_state(tmp_path)
    checkpoint.save_state(tmp_path, state | {"trained": {"projector.weight": torch.zeros(3, 3)}}, 1)
    with pytest.raises(UserError, match="state: is of another model or damaged"):
        in_process(arguments)
    checkpoint.save_state(tmp_path, state | {"trained": {}}, 1)
    with pytest.raises(UserError, match="state: is of another model or damaged .*other parameters"):
        in_process(arguments)
    (tmp_path / "state/training.pth").unlink()
    with pytest.raises(UserError, match="no state/ to go on from"):
        in_process(arguments)
    assert (tmp_path / "projector.pth").read_bytes() == W


def test_other_data_under_the_same_name_is_other_settings(inputs, tmp_path):
    (tmp_path / "captions.json").write_bytes((inputs / "captions.json").read_bytes())
    arguments = flags(inputs, tmp_path / "run", data=tmp_path / "captions.json", max_steps=2)
    in_process(arguments)
    in_process(arguments + ["--data", str(tmp_path / "run/../captions.json")])  # another way to write the same
    (tmp_path / "captions.json").write_text(json.dumps(json.loads((inputs / "captions.json").read_text())[1:]))
    with pytest.raises(UserError, match="begun with --samples 30, now it is 29"):
        in_process(arguments)


def test_a_projector_can_be_started_from(inputs, tmp_path):
    W = torch.randn(32, 64)
    torch.save({"model.mm_projector.weight": W, "model.mm_projector.bias": torch.randn(32)}, tmp_path / "mm_projector.bin")
    in_process(flags(inputs, tmp_path / "run", max_steps=1, lr=0.0, projector=tmp_path / "mm_projector.bin"))
    saved = torch.load(tmp_path / "run/projector.pth", weights_only=True)
    assert torch.equal(saved["weight"], W) and "bias" in saved


# --- bad input: one line, a non-zero exit, nothing harmed


def break_input(inputs, tmp_path, what):
    """A copy of the flags with one thing broken -> (flags, what the error must say)."""
    bad = tmp_path / what
    if what == "no llama":
        return dict(llama=bad), f"{bad}"
    if what == "no vision":
        return dict(vision=bad), f"{bad}"
    if what == "no data":
        return dict(data=bad), f"{bad}: cannot be read"
    if what == "no images":
        return dict(images=bad), "--images"
    if what == "images not given":
        return dict(images=None), "--images missing"
    if what == "a picture folder as data":
        return dict(data=inputs / "images"), "a folder without problems.json"
    if what == "a damaged ViT":
        weights = torch.load(inputs / "vit.pt", weights_only=True)
        weights["visual.conv1.weight"] = weights["visual.conv1.weight"] * torch.nan
        torch.save(weights, bad)
        return dict(vision=bad), "step 1: loss nan"
    if what == "a truncated checkpoint":
        copy_llama(inputs, bad)
        weights = (bad / "consolidated.00.pth").read_bytes()
        (bad / "consolidated.00.pth").write_bytes(weights[: len(weights) // 2])
        return dict(llama=bad), "consolidated.00.pth"
    if what == "a pickle with code":
        bad.write_bytes(pickle.dumps(Bomb(str(tmp_path / "exploded"))))
        return dict(vision=bad), str(bad)
    if what == "a checkpoint with code":
        copy_llama(inputs, bad)
        torch.save({"norm.weight": Bomb(str(tmp_path / "exploded"))}, bad / "consolidated.00.pth")
        return dict(llama=bad), "consolidated.00.pth"
    if what == "another shape":
        copy_llama(inputs, bad)
        params = json.loads((bad / "params.json").read_text())
        (bad / "params.json").write_text(json.dumps({**params, "n_layers": 3}))
        return dict(llama=bad), "promises 3 layers, the weights hold 2"
    if what == "a tokenizer of another LLaMA":
        copy_llama(inputs, bad)
        small = LLaMA(LLaMAConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=4, ffn_dim=48, vocab_size=300))
        checkpoint.save_llama(small, bad)
        return dict(llama=bad), "pieces, the LLaMA beside it only 300"
    if what == "a projector of another shape":
        torch.save({"weight": torch.zeros(32, 48)}, bad)
        return dict(projector=bad), "48"
    if what == "bad JSON":
        bad.write_text('[{"image": "0.png",\n "caption" "x"}]')
        return dict(data=bad), "line 2, column 12"
    if what == "a picture that is not there":
        bad.write_text(json.dumps([{"id": "s7", "image": "gone.png", "caption": "x"}]))
        return dict(data=bad), "sample s7: picture gone.png"
    if what == "a broken picture":
        (tmp_path / "pics").mkdir()
        (tmp_path / "pics/x.png").write_bytes((inputs / "images/0.png").read_bytes()[:100])
        bad.write_text(json.dumps([{"id": "s8", "image": "x.png", "caption": "x"}]))
        return dict(data=bad, images=tmp_path / "pics"), "sample s8: picture x.png: not a readable picture"
    if what == "a picture bomb":
        with zipfile.ZipFile(tmp_path / "pics.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
            archive.writestr("x.png", header + __import__("zlib").crc32(header[12:]).to_bytes(4, "big") + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
        bad.write_text(json.dumps([{"id": "s9", "image": "x.png", "caption": "x"}]))
        return dict(data=bad, images=tmp_path / "pics.zip"), "sample s9: picture x.png: not a readable picture (DecompressionBomb"
    if what == "no green token":
        shortest = len(system_ids(load_tokenizer(inputs / "llama/tokenizer.model"))) + 16 + 2
        return dict(max_length=shortest), "no green token"
    if what == "no room for a picture":
        return dict(max_length=40), "--max-length 40"
    if what == "an out that is a file":
        bad.write_text("")
        return dict(out=bad), str(bad)
    raise AssertionError(what)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def copy_llama(inputs, to):
    to.mkdir()
    for path in (inputs / "llama").iterdir():
        (to / path.name).write_bytes(path.read_bytes())


BROKEN = ["no llama", "no vision", "no data", "no images", "images not given", "a picture folder as data", "a damaged ViT", "a truncated checkpoint", "a pickle with code",
          "a checkpoint with code", "another shape", "a tokenizer of another LLaMA", "a projector of another shape", "bad JSON", "a picture that is not there",
          "a broken picture", "a picture bomb", "no green token", "no room for a picture", "an out that is a file"]  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_bad_input_ends_in_one_clear_line(inputs, tmp_path, what):
    changes, message = break_input(inputs, tmp_path, what)
    arguments = flags(inputs, tmp_path / "run")
    for name, value in changes.items():
        arguments += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        if value is None:
            at = arguments.index(f"--{name}")
            del arguments[at : at + 2]
    with pytest.raises(UserError) as error:
        in_process(arguments)
    assert message in str(error.value) and "\n" not in str(error.value), error.value
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_middle_of_a_run_harms_nothing_written_and_is_one_line(inputs, tmp_path, workers):
    (tmp_path / "pics").mkdir()
    for path in (inputs / "images").iterdir():
        (tmp_path / "pics" / path.name).write_bytes(path.read_bytes())
    out = tmp_path / "run"
    arguments = flags(inputs, out) + ["--images", str(tmp_path / "pics"), "--save-every", "2", "--workers", str(workers)]
    victim = f"{data.order(range(30), epoch=0, seed=0)[24]}.png"  # the first sample of step 4
    (tmp_path / "pics" / victim).write_bytes(b"no picture")
    stderr = run(arguments, expect=1)[1]
    assert "Traceback" not in stderr and f"\nerror: step 4: sample {victim}: picture {victim}: not a readable" in stderr
    assert len(metrics(out)) == 3 and checkpoint.load_state(out)["step"] == 3
    (tmp_path / "pics" / victim).write_bytes((inputs / "images" / victim).read_bytes())
    run(arguments)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "x.json"], "--llama and --vision missing"),
        (["--images", "x"], "--images, --projector and --llama-base go with"),
        (["--batch-size", "0"], "--batch-size 0: must be 1 or more"),
        (["--lr", "-1"], "--lr -1.0: must be a number, 0 or more"),
        (["--warmup-ratio", "2"], "--warmup-ratio 2.0: must lie in 0..1"),
        (["--lr", "nan"], "--lr nan: must be a number"),
        (["--task", "chat"], "--task chat: is of stage 2"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message):
        train.parse_arguments(["--stage", "1", *arguments])


# --- to be looked at


def test_a_run_leaves_its_curves_and_none_fails_for_them(inputs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    arguments = flags(inputs, tmp_path, max_steps=2)
    in_process(arguments)
    assert Image.open(tmp_path / "loss.png").format == "PNG"
    for wrong in (ImportError("no matplotlib"), UserError("a full disk"), RuntimeError("a font")):

        def fail(run):
            raise wrong  # noqa: B023

        monkeypatch.setattr(train.plots, "loss_curves", fail)
        in_process([*arguments, "--no-resume"])
        assert not (tmp_path / "loss.png").exists()  # nor the curves of what was there before
        assert len(metrics(tmp_path)) == 2 and (tmp_path / "projector.pth").is_file()


def test_tensorboard_has_each_step_once_also_after_a_run_was_killed(inputs, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = flags(inputs, tmp_path, save_every=2, epochs=2) + ["--tensorboard"]
    in_process(arguments)  # 8 steps
    state = checkpoint.load_state(tmp_path)
    assert state["step"] == 8
    checkpoint.save_state(tmp_path, state, 5)  # as if killed after it had noted steps 6 to 8
    in_process(arguments)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    board, lines = EventAccumulator(str(tmp_path / "tensorboard")), metrics(tmp_path)
    board.Reload()
    assert sorted(board.Tags()["scalars"]) == sorted(lines[0].keys() - {"step"})
    assert [line["step"] for line in lines] == list(range(1, 9))
    for name in board.Tags()["scalars"]:
        got = [(event.step, event.value) for event in board.Scalars(name)]
        assert got == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    in_process([a for a in arguments if a != "--tensorboard"])  # it may change
    in_process([*arguments, "--no-resume", "--max-steps", "1"])
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("loss")] == [1]  # nothing of the run before


def test_tensorboard_is_missed_before_anything_is_computed(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    with pytest.raises(UserError, match="--tensorboard: .*pip install tensorboard"):
        in_process([*flags(inputs, tmp_path / "run"), "--tensorboard"])
    assert not (tmp_path / "run").exists()


# --- many processes, faults


def test_fsdp_is_ddp_with_less_memory_and_goes_on_with_any_number_of_processes(inputs, chat, tmp_path):
    given = dict(batch_size=6, micro_batch_tokens=150, max_steps=4)  # micro-batches of which the processes have unlike many
    for name, stage in (("stage2", stage_2(inputs, chat, tmp_path, **given)), ("stage1", flags(inputs, tmp_path, **given))):
        where = stage.index(str(tmp_path))
        for parallel, processes in (("ddp", 2), ("fsdp", 2)):
            stage[where] = str(tmp_path / name / parallel)
            run([*stage, "--parallel", parallel], processes)
        ddp, fsdp = (tmp_path / name / parallel for parallel in ("ddp", "fsdp"))
        for a, b in zip(metrics(ddp), metrics(fsdp), strict=True):
            assert (b["loss"], b["grad_norm"]) == (pytest.approx(a["loss"], rel=1e-4), pytest.approx(a["grad_norm"], rel=1e-3))
        (one, _, _), (other, _, _) = checkpoint.load_run(ddp), checkpoint.load_run(fsdp)
        for (key, p), q in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert (p - q).norm() <= 1e-4 * p.norm(), key
    for parallel in ("ddp", "fsdp"):
        run(stage_2(inputs, chat, tmp_path / f"bf16-{parallel}", max_steps=2, precision="bf16", parallel=parallel), 2)
    for a, b in zip(metrics(tmp_path / "bf16-ddp"), metrics(tmp_path / "bf16-fsdp")):
        assert b["loss"] == pytest.approx(a["loss"], rel=2e-3)
    # Killed after its second step, it goes on in one process to the same end.
    again = stage_2(inputs, chat, tmp_path / "again", **given) + ["--parallel", "fsdp", "--save-every", "1"]
    process = start(again, 2)
    deadline = time.time() + 100
    while time.time() < deadline and not list(tmp_path.glob("again/state/step-2/.metadata")):
        time.sleep(0.01)
    for pid in (process.pid, *workers_of(process)):
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert re.search("goes on after step [23] of 4", run(again, 1)[0])
    assert [line["step"] for line in metrics(tmp_path / "again")] == [1, 2, 3, 4]
    a, b = (checkpoint.load_llama(folder).state_dict() for folder in (tmp_path / "stage2/ddp", tmp_path / "again"))
    assert all((a[key] - b[key]).norm() <= 1e-4 * a[key].norm() for key in a)


def workers_of(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_no_code_in_a_sharded_state_runs(inputs, chat, tmp_path):
    arguments = stage_2(inputs, chat, tmp_path / "run", max_steps=1, epochs=1) + ["--parallel", "fsdp"]
    run(arguments, 1)
    [metadata] = tmp_path.glob("run/state/step-1/.metadata")
    whole = metadata.read_bytes()
    with_bytes = pickle.loads(whole)
    key = next(iter(with_bytes.state_dict_metadata))
    with_bytes.state_dict_metadata[key] = BytesStorageMetadata()  # PyTorch would unpickle what it stands for
    elsewhere = pickle.loads(whole)
    next(iter(elsewhere.storage_data.values())).relative_path = "../../../inputs/has no place here"
    for bad in (pickle.dumps(Bomb(tmp_path / "went_off")), whole[: len(whole) // 2], pickle.dumps(with_bytes),
                pickle.dumps(elsewhere)):  # fmt: skip
        metadata.write_bytes(bad)
        stderr = run(arguments, 1, expect=1)[1]
        assert "is of another model or damaged (" in stderr and not (tmp_path / "went_off").exists()
        assert "has no place" in stderr or len(bad) < len(whole)


def test_broken_pictures_are_left_out_up_to_a_number_the_same_on_every_process(inputs, tmp_path):
    """Training is what it would be without those samples."""
    (tmp_path / "images").mkdir()
    for picture in (inputs / "images").iterdir():
        (tmp_path / "images" / picture.name).write_bytes(b"broken" if picture.stem in "37" else picture.read_bytes())
    lines = {}
    for name, processes in (("one", 0), ("two", 2)):
        broken = flags(inputs, tmp_path / name, images=tmp_path / "images", max_bad_samples=2)
        stdout = run(broken, processes)[0]
        assert stdout.count("left out: sample 3.png") == 1 and "could not be read: 2; steps that were not taken: 0" in stdout
        lines[name] = metrics(tmp_path / name)
    for a, b in zip(lines["one"], lines["two"], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4) and a["green_tokens"] == b["green_tokens"]
    with pytest.raises(UserError, match="mend that .* and start the same again"):
        in_process(flags(inputs, tmp_path / "strict", images=tmp_path / "images", max_bad_samples=1))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"; and 5 more; mend that \(is --images right\?\)") as raised:
        in_process(flags(inputs, tmp_path / "absent", images=tmp_path / "none"))
    assert str(raised.value).count("it is not there") == 3


def test_steps_without_a_number_are_not_taken_and_counted(inputs, tmp_path, monkeypatch):
    forward, calls = LLaVA.forward, []

    def sick(self, *batch):
        nll, count = forward(self, *batch)
        calls.append(1)
        return (nll * float("nan") if len(calls) == 2 else nll), count

    monkeypatch.setattr(LLaVA, "forward", sick)
    in_process(flags(inputs, tmp_path / "run", max_bad_steps=1, max_steps=3))
    assert [line["loss"] is None for line in metrics(tmp_path / "run")] == [False, True, False]
    assert torch.isfinite(torch.load(tmp_path / "run/projector.pth")["weight"]).all()
    [bad] = [json.loads(line) for line in (tmp_path / "run/bad_steps.jsonl").read_text().splitlines()]
    assert bad["step"] == 2 and len(bad["ids"]) == 8
    calls.clear()
    with pytest.raises(UserError, match="step 2: loss nan"):
        in_process(flags(inputs, tmp_path / "strict", max_steps=3))


def test_two_runs_in_one_directory_are_refused(inputs, tmp_path):
    hold = f"import pathlib, train; lock = train.lock(pathlib.Path({str(tmp_path / 'run')!r})); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(UserError, match="another train.py is at work in it"):
        in_process(flags(inputs, tmp_path / "run", max_steps=1))
    other.communicate(b"\n")
    in_process(flags(inputs, tmp_path / "run", max_steps=1))


@pytest.mark.parametrize("victim", ["rank", "worker"])
def test_a_process_that_dies_ends_the_run_and_the_same_command_goes_on(inputs, tmp_path, victim):
    arguments = flags(inputs, tmp_path / "run", workers=1, save_every=1, epochs=20, batch_size=2)
    process = start(arguments, 2)
    deadline = time.time() + 100
    while time.time() < deadline and not list(tmp_path.glob("run/state/training.pth")):
        time.sleep(0.02)
    ranks = workers_of(process)
    assert len(ranks) == 2
    pid = ranks[1]
    if victim == "worker":  # the loader's process is the rank's child
        children = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
        pid = int(children[-1])
    os.kill(pid, signal.SIGKILL)
    began = time.time()
    said = process.communicate(timeout=100)[1]
    assert process.returncode != 0 and time.time() - began < 60
    if victim == "worker":
        assert "a process of --workers died" in said, said[-6000:]
    last = metrics(tmp_path / "run")[-1]["step"]
    stdout = run([*arguments, "--max-bad-steps", "0"], 2)[0]
    assert "goes on after step" in stdout and [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 301))
    assert last < 300
