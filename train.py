"""Trains LLaVA: what trains in which stage, the schedule, and the one loop (section 4.2 of the paper).

    torchrun train.py --stage 1                       # W alone, on captioned pictures; without paths: the demo
    torchrun train.py --stage 2                       # W and the LLaMA, as a chatbot; starts from runs/stage1
    torchrun train.py --stage 2 --task scienceqa      # W and the LLaMA, on ScienceQA
    torchrun --nproc_per_node 8 train.py --stage 1 \\
        --llama vicuna-13b-v0 --vision ViT-L-14.pt --data chat.json --images images.zip

`python train.py` does the same in one process. The loss of a global batch is the negative log likelihood of its green
tokens, summed over all micro-batches and processes and divided once by their number (Eq. 3).

distributed.py connects the processes: `by_process_0` calls a function in process 0 and returns its value in all,
`exchanged` collects numbers of all processes, and `gathered` lines.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import stat
import time
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
import distributed
from common import (
    ArgumentParser,
    UserError,
    append_lines,
    is_process_0,
    number,
    progress_bar,
    read_json,
    reason,
    run_command,
    shorten,
    write_json,
    write_lines,
)
from conversation import TEMPLATE
from data import SCIENCEQA_PROMPT, Encoder, Examples, Share, Shares, prefetched
from distributed import by_process_0
from formats.pictures import Pictures
from model import FeedForward, LLaVA, RMSNorm
from vision import FEATURE_LAYER, PREPROCESSING

PAPER = {  # section 4.2: the settings of each run of the paper
    "stage1": dict(epochs=1, batch_size=128, lr=2e-3, sampling="proportional"),
    "chat": dict(epochs=3, batch_size=32, lr=2e-5, sampling="uniform"),
    "scienceqa": dict(epochs=12, batch_size=32, lr=2e-5, sampling="proportional"),
}
NEXT = {  # the command to give after a run
    "stage1": "torchrun train.py --stage 2 --init-from {out}",
    "chat": "python chat.py --model {out}",
    "scienceqa": "python eval_scienceqa.py --model {out}",
}
MAX_GRAD_NORM = 1.0
MAY_CHANGE = {  # flags that may differ when a run continues; what the paths of the inputs hold is compared instead
    "llama", "vision", "projector", "init_from", "data", "images", "max_length", "max_bad_samples", "workers",
    "micro_batch_tokens", "parallel", "checkpoint_activations", "deterministic", "save_every", "log_every",
}  # fmt: skip
STATE_BYTES, WEIGHT_BYTES = 12, 4  # of a parameter that trains: itself and AdamW's two moments, in float32; itself


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Cosine schedule: rises linearly to `peak` over the warm-up, then falls along half a cosine to near 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# --- what training starts from


def starting_model(args: argparse.Namespace, dtype: torch.dtype) -> LLaVA:
    """Frozen parts are held in the compute dtype, what trains in float32 (for fsdp as stored: sharding casts it)."""
    llama_dtype: torch.dtype | None = dtype
    if args.stage == 2:
        llama_dtype = None if args.parallel == "fsdp" else torch.float32
    if args.init_from:
        model, _, _ = checkpoint.load_run(args.init_from, llama_dtype)
        model.vision.to(dtype)
    else:
        projector = checkpoint.load_projector(args.projector) if args.projector else None
        vit = checkpoint.load_vision(args.vision, FEATURE_LAYER, dtype)
        model = checkpoint.build(checkpoint.load_llama(args.llama, llama_dtype), vit, projector, args.seed)
    model.set_trainable(args.stage)
    model.llama.checkpoint_activations = args.checkpoint_activations
    if args.compile:  # the attention would compile anew for each number of samples, and its RoPE not at all
        for module in model.llama.layers.modules():
            if isinstance(module, (RMSNorm, FeedForward)):
                module.compile(dynamic=True)
    return model


def open_examples(args: argparse.Namespace) -> tuple[Examples, Pictures | None]:
    examples = Examples(args.data, args.seed, absent="text" if args.missing_pictures_as_text else "refuse")
    is_quiz = args.name == "scienceqa"
    if is_quiz != ("ScienceQA" in examples.kinds) or (is_quiz and len(args.data) > 1):
        raise UserError(f"--data holds {shorten(examples.kinds)}; --stage 2 --task scienceqa takes one ScienceQA "
                        "folder and nothing else, other runs take none")  # fmt: skip
    images = args.images or (args.data[0] if is_quiz else None)
    if not images and examples.n_pictures:
        raise UserError("--images missing: the samples have pictures; give their folder or zip")
    if args.stage == 1 and not examples.n_pictures:
        raise UserError("--data: no sample has a picture, and stage 1 trains W on pictures only")
    return examples, Pictures(images) if images else None


def run_config(args: argparse.Namespace, model: LLaVA, examples: Examples) -> dict:
    """config.json: every flag, the content of the inputs, and what evaluation and chat must agree with."""
    settings = {name: value for name, value in vars(args).items() if name not in ("resume", "out", "name")}
    for name in ("llama", "vision", "projector", "init_from", "images"):
        settings[name] = settings[name] and checkpoint.portable(settings[name], args.out)
    settings["data"] = [checkpoint.portable(path, args.out) for path in args.data]
    contents = {"data": examples.checksum(), "llama": checkpoint.fingerprint(model.llama),
                "vision": checkpoint.fingerprint(model.vision)}  # fmt: skip
    return dict(settings=settings, contents=contents, stage=args.stage, template=TEMPLATE, prompt=SCIENCEQA_PROMPT,
                precision=args.precision, feature_layer=model.vision.feature_layer, preprocessing=PREPROCESSING,
                torch=torch.__version__, llama=settings["llama"], vision=settings["vision"])  # fmt: skip


# --- the loop


def fault_in(share: Share, green: int, bad: int, failed: int, allowed: int) -> str | None:
    """Why this step cannot be taken, the same in all processes, or None.

    green, bad, failed: green tokens, bad samples and failures of all processes. allowed: bad samples to skip,
    whose errors are printed.
    """
    if failed:
        return distributed.gathered([share.failure] if share.failure else [])[0]
    errors = distributed.gathered(share.errors) if bad else []
    if bad > allowed:
        more = f"; and {bad - 3} more" if bad > 3 else ""
        return (f"{'; '.join(errors[:3])}{more}; correct them (is --images right?) and give the same command again, or "
                "let --max-bad-samples skip some")  # fmt: skip
    if not green:
        why = "no picture of its samples can be read" if bad else "every answer lies beyond --max-length; raise it"
        return f"its batch has no green token (samples {shorten(distributed.gathered(share.ids))}): {why}"
    if is_process_0():
        for error in errors:
            tqdm.write(f"skipped: {error}")
    return None


def train(args: argparse.Namespace, earlier: dict, rank: int, world_size: int, device: torch.device):
    say = tqdm.write if rank == 0 else lambda *_: None  # unlike print, it does not write into the bar
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32

    # The data, and the model of which the stage trains a part.
    examples, pictures = open_examples(args)
    say("\n".join([*examples.describe(args.sampling), "loading the model"]))
    model = starting_model(args, dtype)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{trained:,} parameters train, the others are frozen; {args.precision} on {world_size} x {device.type}")

    # shares[t]: the samples of global batch t that this process computes.
    sp = checkpoint.open_tokenizer(checkpoint.tokenizer_path(args.llama), model.llama.config)
    encoder = Encoder(sp, model.vision.config.n_patches, model.vision.config.image_size, pictures, args.max_length)
    shares = Shares(examples, encoder, args.batch_size, args.seed, rank, world_size, args.micro_batch_tokens,
                    args.sampling)  # fmt: skip
    total = min(args.epochs * shares.per_epoch, args.max_steps or math.inf)

    # The run directory, new or continued; the model on the devices; the optimizer of what trains.
    config = run_config(args, model, examples)
    by_process_0(lambda: check_room(args.out, trained))
    state = enter_run(args, config, earlier)
    net = distributed.distribute(model, args.parallel, device, dtype)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0, fused=True)
    t = start = resume(args.out, state, net, optimizer) if state else 0  # t: steps taken
    say(f"{args.out}: " + (f"continues after step {start} of {total}" if start else f"{total} steps"))

    def save(for_use: bool):
        """Saves the state after step t and, for use by evaluation and chat, the parameters that train."""
        say(f"{args.out}: saving step {t}")
        full = distributed.full_state(net, optimizer)
        by_process_0(lambda: checkpoint.save_state(args.out, full, t))
        if for_use:
            by_process_0(lambda: checkpoint.save_run(args.out, model.llama.config, full["model"], config | {"step": t},
                                                     args.vision, checkpoint.tokenizer_path(args.llama)))  # fmt: skip

    interrupt, failure, bad_samples, cut_samples, began = Interrupt(), None, 0, 0, time.time()
    bar = progress_bar(total=total, initial=start, unit="step", desc=f"stage {args.stage}", smoothing=0.1)
    for share in prefetched(shares, range(start, total), args.workers):
        # One exchange tells all processes what they must agree on.
        everyone = distributed.exchanged((share.green, share.tokens, share.cut, len(share.errors), bool(share.failure),
                                          interrupt.received, len(share.micro_batches)), device)  # (world_size, 7)
        green, tokens, cut, bad, failed, signals, _ = (int(n) for n in everyone.sum(0))
        n_micro_batches = int(everyone[:, -1].max())
        failure = fault_in(share, green, bad, failed, args.max_bad_samples - bad_samples)
        if signals or failure:
            break
        bad_samples, cut_samples = bad_samples + bad, cut_samples + cut

        lr = learning_rate(t, total, args.lr, args.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr

        nll_sum = torch.zeros((), device=device)
        empty = [encoder.stream([])] * (n_micro_batches - len(share.micro_batches))  # all processes compute as many
        for i, micro_batch in enumerate(share.micro_batches + empty):
            net.require_backward_grad_sync = i + 1 == n_micro_batches  # DDP averages gradients after the last one only
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                nll = net(*micro_batch.to(device))
            (nll * world_size / green).backward()  # Eq. 3, a global mean; DDP and FSDP divide by world_size
            nll_sum += nll.detach()
        grad_norm = distributed.clip_gradients(parameters, MAX_GRAD_NORM)  # waits for the GPU
        loss = float(distributed.exchanged([nll_sum.item()], device).sum()) / green
        if not math.isfinite(loss + grad_norm):
            ids = shorten(distributed.gathered(share.ids))
            failure = f"loss {loss}, gradient norm {grad_norm} (samples {ids}); lower --lr, or are the weights damaged?"
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        t += 1
        seconds, began = time.time() - began, time.time()
        bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{tokens / seconds:,.0f}", refresh=False)
        bar.update()
        if rank == 0 and (t % args.log_every == 0 or t == total):
            append_metrics(args.out / "metrics.jsonl", step=t, loss=loss, lr=lr, grad_norm=grad_norm,
                           green_tokens=green, tokens=tokens, seconds=round(seconds, 4))  # fmt: skip
        if args.save_every and t % args.save_every == 0 and t < total:
            save(for_use=False)
    bar.close()
    if t and not by_process_0(lambda: checkpoint.is_saved(args.out, args.stage, t)):
        save(for_use=True)
    interrupt.release()
    say(f"{args.out}: {t} of {total} steps done; {bad_samples} samples skipped, {cut_samples} cut to --max-length")
    if failure:
        raise UserError(f"step {t + 1}: {failure}")
    if t < total:
        say("stopped; the same command continues from here")
        raise SystemExit(128 + (interrupt.received or signal.SIGTERM))


# --- the run directory


def claim(out: Path) -> dict:
    """Reserves a run directory until this process ends -> the config.json of the run in it, {} in a new directory.

    Refuses any other directory, and one in which another process trains.
    """
    config = read_json(out / "config.json", dict) if (out / "config.json").is_file() else {}
    is_new = not out.exists() or (out.is_dir() and all(path.name.startswith(".") for path in out.iterdir()))
    if not is_new and not isinstance(config.get("settings"), dict):
        raise UserError(f"{out}: exists and is not a run of train.py; give another --out")
    append_lines(out / ".lock", [])  # creates the directory too
    try:
        import fcntl

        fcntl.lockf(os.open(out / ".lock", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)  # never closed
    except (BlockingIOError, PermissionError):
        raise UserError(f"{out}: another train.py runs in it; wait for it, or give another --out") from None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks
    return config


def enter_run(args: argparse.Namespace, config: dict, earlier: dict) -> dict | None:
    """The state from which the run in --out continues; None after writing a new run's config.json.

    earlier: the config.json of the run in it. Refuses to continue with other settings or inputs.
    """
    state = checkpoint.load_state(args.out) if args.resume else None
    if state is None:
        by_process_0(lambda: start_run(args, config))
        return None
    for name, value in config["settings"].items():
        before = earlier["settings"].get(name, value)
        if name not in MAY_CHANGE and before != value:
            raise UserError(f"{args.out}: began with --{name.replace('_', '-')} {before}, now it is {value}; give the "
                            "same settings, or another --out, or --no-resume to start again")  # fmt: skip
    for name, value in config["contents"].items():
        if earlier.get("contents", {}).get(name) != value:
            raise UserError(f"{args.out}: began with other content of --{name}, or with a version that did not "
                            "record it; give the same, or another --out, or --no-resume to start again")  # fmt: skip
    return state


def start_run(args: argparse.Namespace, config: dict):
    """Writes config.json and removes what an earlier run left, which --no-resume allows."""
    if args.resume and any((args.out / name).exists() for name in ("projector.pth", "state")):
        raise UserError(f"{args.out}: holds a trained W, or a state of an earlier version, but no state.pth; give "
                        "another --out, or --no-resume to train it again")  # fmt: skip
    for name in ("projector.pth", "state.pth", "metrics.jsonl", "exam.json", "loss.png"):
        (args.out / name).unlink(missing_ok=True)
    shutil.rmtree(args.out / "state", ignore_errors=True)  # of an earlier version
    write_json(args.out / "config.json", config)


def check_room(out: Path, trained: int):
    """Raises UserError unless the disk has room for two states, one of which replaces the other, and the weights."""
    needed = (2 * STATE_BYTES + WEIGHT_BYTES) * trained
    room = shutil.disk_usage(out).free + sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if room < needed:
        raise UserError(f"{out}: its state and weights need {needed / 2**20:,.1f} MiB, and there is room for "
                        f"{room / 2**20:,.1f}; free some space or give another --out")  # fmt: skip


def resume(out: Path, state: dict, net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores model and optimizer, and drops the metrics of the steps to repeat -> the number of steps taken."""
    try:
        distributed.restore(net, optimizer, state)
    except Exception as error:  # a damaged state raises nearly any error
        if distributed.outside_cause(error):
            raise
        raise UserError(f"{out / 'state.pth'}: belongs to another model or is damaged ({reason(error)}); restore "
                        "what the run began with, or give --no-resume to start again") from None  # fmt: skip
    by_process_0(lambda: drop_metrics_after(out / "metrics.jsonl", state["step"]))
    return state["step"]


def drop_metrics_after(path: Path, step: int):
    """Removes the lines of later steps, and a line that was cut off when the run was killed."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                lines.append(line)
    write_lines(path, lines)


def append_metrics(path: Path, **values):
    append_lines(path, [json.dumps(values)])


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end the run after the current step, with its state saved."""

    def __init__(self):
        self.received = 0  # the number of the signal
        codes = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
        handlers = {code: signal.getsignal(code) for code in codes}
        # nohup ignores SIGHUP, which then stays ignored; a script's background job ignores SIGINT, which does not
        self.handlers = {code: old for code, old in handlers.items() if code == signal.SIGINT or old != signal.SIG_IGN}
        for code in self.handlers:
            signal.signal(code, self.request)

    def request(self, code, frame):
        if self.received and code == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C ends the process at once
        self.received = code
        if code not in (signal.SIGINT, signal.SIGTERM):
            for stream in (1, 2):
                if not stat.S_ISREG(os.fstat(stream).st_mode):  # a closed terminal, to which printing would raise
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    def release(self):
        for code, handler in self.handlers.items():
            signal.signal(code, handler)


# --- the command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    def paper(name: str) -> str:
        return "default: " + ", ".join(f"{run} {settings[name]}" for run, settings in PAPER.items()) + "; demo: its own"

    parser = ArgumentParser(__doc__)
    add = parser.add_argument_group("what trains").add_argument
    add("--stage", type=int, choices=(1, 2), required=True, help="1 trains W; 2 trains W and the LLaMA")
    add("--task", choices=("chat", "scienceqa"), help="what stage 2 trains: chatbot or ScienceQA (default: chat)")
    add = parser.add_argument_group("inputs (without any: the demo)").add_argument
    add("--llama", metavar="DIR", help="LLaMA or Vicuna: Meta's raw folder, a Hugging Face folder, or a run of stage 2")
    add("--vision", metavar="PATH", help="CLIP: OpenAI's ViT-L-14.pt or a Hugging Face folder")
    add("--projector", metavar="FILE", help="the W to start from: projector.pth or mm_projector.bin (default: noise)")
    add("--init-from", metavar="RUN", help="take the LLaMA, ViT and W of this run; `none`: W starts as noise, the "
        "paper's ablation (default in stage 2 of the demo: runs/stage1)")  # fmt: skip
    add("--data", nargs="+", metavar="PATH", help="LLaVA JSON (chat.json of CC3M-595K, llava_instruct_150k.json or its "
        "three parts), captions, or a ScienceQA folder")  # fmt: skip
    add("--images", metavar="PATH", help="folder or zip that holds the data's pictures")
    add("--missing-pictures-as-text", action="store_true", help="use ScienceQA problems with absent pictures as text")
    add = parser.add_argument_group("the run").add_argument
    add("--out", metavar="DIR", help="run directory (default: runs/stage1, runs/chat or runs/scienceqa)")
    add("--epochs", type=number(1), help=f"passes over the data ({paper('epochs')})")
    add("--batch-size", type=number(1), help=f"samples per step, over all processes ({paper('batch_size')})")
    add("--micro-batch-tokens", type=number(1), default=16384, help="most positions that a process computes at once")
    add("--lr", type=number(0.0), help=f"peak learning rate ({paper('lr')})")
    add("--warmup-ratio", type=number(0.0, 1.0), default=0.03, help="share of steps in which the learning rate rises")
    add("--max-length", type=number(1), default=2048, help="most positions of a sample; longer samples lose their end")
    add("--max-steps", type=number(1), help="stop after this many steps (default: after --epochs)")
    add("--seed", type=number(0), default=0, help="seed of W's noise, sample order and requests for captions")
    add("--sampling", choices=("uniform", "proportional"), help="draw each file of --data equally often, or each "
        f"sample once an epoch ({paper('sampling')})")  # fmt: skip
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="each process holds the whole model (ddp) or a "
        "share of its parameters, gradients and optimizer state (fsdp)")  # fmt: skip
    add("--precision", choices=("bf16", "fp32"), help="dtype of matrix products (default: bf16 on GPUs since Ampere, "
        "and on CPUs with units for it if the LLaMA is wide enough; else fp32, which is TF32 on GPUs)")  # fmt: skip
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue the run in --out")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the LLaMA's norms and "
        "feed-forward layers")  # fmt: skip
    add("--deterministic", action=argparse.BooleanOptionalAction, default=False, help="the same bits in every run on "
        "GPUs too, which takes longer")  # fmt: skip
    add("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
        help="recompute each block in the backward pass: less memory, more time")  # fmt: skip
    add("--save-every", type=number(0), default=500, help="steps between saved states; 0 = at the end only")
    add("--max-bad-samples", type=number(0), default=0, help="samples to skip, at most, whose picture cannot be read")
    add("--log-every", type=number(1), default=1, help="steps between lines of metrics.jsonl")
    add("--workers", type=number(0, 256), default=2, help="threads that read pictures ahead of the training; 0 = none")
    args = parser.parse_args(argv)

    if args.stage == 1 and args.task:
        raise UserError(f"--task {args.task}: belongs to stage 2; stage 1 trains on captions")
    if args.parallel == "fsdp" and "RANK" not in os.environ:
        raise UserError("--parallel fsdp: shares the model between processes; start it with torchrun")
    args.name = "stage1" if args.stage == 1 else args.task or "chat"
    args.task = None if args.stage == 1 else args.name
    args.out = Path(args.out or f"runs/{args.name}")
    args.demo = not (args.llama or args.vision or args.data)
    if not args.demo:
        check_inputs(args)
    elif args.images or args.projector:
        raise UserError("--images and --projector go with --llama, --vision and --data; the demo brings its own")
    return args


def check_inputs(args: argparse.Namespace):
    if args.init_from == "none":
        args.init_from = None
    needed = ("data",) if args.init_from else ("llama", "vision", "data")
    if missing := [f"--{name}" for name in needed if not getattr(args, name)]:
        raise UserError(f"{' and '.join(missing)} missing: give --llama, --vision and --data, or --init-from and "
                        "--data, or none of them for the demo")  # fmt: skip
    if args.init_from and (args.llama or args.vision or args.projector):
        raise UserError("--init-from takes the LLaMA, the ViT and W of that run; leave out --llama, --vision and "
                        "--projector")  # fmt: skip


def run(args: argparse.Namespace, rank: int, world_size: int, device: torch.device):
    """Trains; a run of the demo gets its data and settings before it, and is examined after it."""
    if args.demo:
        from demo.world import begin

        begin(args)
    for name, value in PAPER[args.name].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.init_from:
        _, args.llama, args.vision = checkpoint.read_run(args.init_from)
    if args.precision is None:
        args.precision = distributed.default_precision(device, checkpoint.llama_config(args.llama).dim)
    earlier = by_process_0(lambda: claim(args.out))
    try:
        train(args, earlier, rank, world_size, device)
    finally:
        with contextlib.suppress(Exception):  # the run succeeds even if its curves cannot be drawn
            from tools.plots import loss_curves

            if rank == 0 and (args.out / "config.json").exists():
                loss_curves(args.out)
            elif rank == 0:  # refused before it began
                (args.out / ".lock").unlink()
                args.out.rmdir()
    if args.demo:
        from demo.exam import finish

        finish(args)
    if rank == 0:
        more = "" if args.demo or args.name == "chat" else " --data ..."
        print(f"next: {NEXT[args.name].format(out=args.out)}{more}")


def main():
    args = parse_arguments()
    with distributed.processes(args.deterministic) as (rank, world_size, device):
        run(args, rank, world_size, device)


if __name__ == "__main__":
    run_command(main)
