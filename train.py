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
import multiprocessing
import os
import shutil
import signal
import stat
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from common import (
    HelpFormatter,
    UserError,
    append_lines,
    read_json,
    reason,
    replacing,
    run_command,
    shorten,
    write_error,
    write_json,
)
from conversation import TEMPLATE
from data import SCIENCEQA_PROMPT, Encoder, Examples, Pictures, ScienceQA, Step, Steps
from distributed import (
    by_process_0,
    clip_gradients,
    distribute,
    exchanged,
    full_state,
    gathered,
    outside_cause,
    processes,
    restore,
)
from model import LLaVA
from vision import FEATURE_LAYER, PREPROCESSING

PAPER = {  # section 4.2: the settings of each run of the paper
    "stage1": dict(epochs=1, batch_size=128, lr=2e-3, sampling="proportional"),
    "chat": dict(epochs=3, batch_size=32, lr=2e-5, sampling="uniform"),
    "scienceqa": dict(epochs=12, batch_size=32, lr=2e-5, sampling="proportional"),
}
MAX_GRAD_NORM = 1.0
WORKER_TIMEOUT = 300  # seconds that a data worker may take for a step
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
MAY_CHANGE = {"checkpoint_activations", "images", "log_every", "max_bad_samples", "max_length", "micro_batch_tokens",
              "parallel", "save_every", "workers"}  # flags that may differ when a run continues  # fmt: skip


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float) -> float:
    """Cosine schedule: rises linearly to `peak` over the warm-up, then falls along half a cosine to near 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# --- the run directory


def settings_in(out: Path) -> dict | None:
    """The settings with which the run in a directory began; None if it is new. Refuses any other directory."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: a file, not a run directory; give another --out")
    if not out.is_dir() or all(entry.name.startswith(".") for entry in out.iterdir()):
        return None
    path = out / "config.json"
    settings = read_json(path, dict).get("settings") if path.is_file() else None
    if not isinstance(settings, dict):
        raise UserError(f"{out}: exists and is not a run of train.py; give another --out")
    return settings


def lock(out: Path):
    """Reserves a run directory for this process until it ends. Raises UserError if another process has it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)  # a number, which no garbage collection closes
    except OSError as error:
        raise write_error(out, error) from None
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{out}: another train.py runs in it; wait for it, or give another --out") from None
    except (ImportError, OSError):
        pass  # Windows, or a file system without locks


def enter_run(a: argparse.Namespace, config: dict) -> dict | None:
    """Returns the state that the run in --out continues from, or None after starting the directory anew.

    Refuses to continue a run with other settings, and to overwrite a finished one that has no state.
    """
    by_process_0(lambda: lock(a.out))
    begun = by_process_0(lambda: settings_in(a.out))
    state = checkpoint.load_state(a.out) if a.resume else None
    if state:
        for name, value in config["settings"].items():
            if name not in MAY_CHANGE and begun.get(name, value) != value:
                raise UserError(f"{a.out}: began with --{name.replace('_', '-')} {begun.get(name)}, now it is {value}; "
                                "continue with the same settings, or give another --out, or --no-resume to start "
                                "again")  # fmt: skip
    elif a.resume and any((a.out / name).exists() for name in ("projector.pth", "state")):
        raise UserError(f"{a.out}: holds a trained W, or a state of an earlier version, but no state.pth to continue "
                        "from; give another --out, or --no-resume to train it again")  # fmt: skip
    else:
        by_process_0(lambda: start_run(a.out, config))
    return state


def start_run(out: Path, config: dict):
    """Removes what an earlier run left and writes config.json."""
    for name in ("projector.pth", "state.pth", "exam.json", "loss.png"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "state", ignore_errors=True)  # of an earlier version
    write_json(out / "config.json", config)
    with replacing(out / "metrics.jsonl"):
        pass


def is_saved(out: Path, stage: int, step: int) -> bool:
    """True if the run directory holds the result of this step; a kill may have come before it was written."""
    return read_json(out / "config.json", dict).get("step") == step and not checkpoint.missing_file(out, stage)


def resume(out: Path, state: dict, net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restores model and optimizer, and drops the metrics of the steps to repeat -> the number of steps taken."""
    try:
        restore(net, optimizer, state)
    except Exception as error:  # a damaged state raises nearly any error
        if outside_cause(error):
            raise
        raise UserError(f"{out / 'state.pth'}: of another model or damaged ({reason(error)}); restore what the run "
                        "began with, or give --no-resume to start again") from None  # fmt: skip
    by_process_0(lambda: drop_metrics_after(out / "metrics.jsonl", state["step"]))
    return state["step"]


def drop_metrics_after(path: Path, step: int):
    """Removes the lines of later steps, and a line that was cut off when the run was killed."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
    with replacing(path) as file:
        file.write("".join(lines).encode())


def append_metrics(path: Path, **values):
    append_lines(path, [json.dumps(values)])


# --- signals


class Interrupt:
    """Ctrl-C, SIGTERM and SIGHUP (a closed terminal) end the run after the current step, with its state saved."""

    received = 0  # the number of the signal

    def __init__(self):
        for number in SIGNALS:
            nohup = number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN
            if not nohup:
                signal.signal(number, self.request)

    def request(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C ends the process at once
        self.received = number
        if number == getattr(signal, "SIGHUP", None):
            for stream in (1, 2):
                if not stat.S_ISREG(os.fstat(stream).st_mode):  # a closed terminal, to which printing would raise
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


# --- what training starts from


def starting_model(a: argparse.Namespace, dtype: torch.dtype) -> tuple[LLaVA, Path, Path]:
    """The model, and the paths of its LLaMA and its ViT.

    Frozen parts are held in the compute dtype, and what trains in float32 (for fsdp as stored: sharding casts it).
    """
    llama_dtype: torch.dtype | None = dtype
    if a.stage == 2:
        llama_dtype = None if a.parallel == "fsdp" else torch.float32
    if a.init_from:
        model, _, config = checkpoint.load_run(a.init_from, llama_dtype)
        model.vision.to(dtype)
        llama, vision = checkpoint.llama_path(a.init_from, config), checkpoint.vision_path(a.init_from)
    else:
        llama, vision = Path(a.llama), Path(a.vision)
        projector = checkpoint.load_projector(a.projector) if a.projector else None
        model = checkpoint.build(checkpoint.load_llama(llama, llama_dtype),
                                 checkpoint.load_vision(vision, FEATURE_LAYER, dtype), projector, a.seed)  # fmt: skip
    model.set_trainable(a.stage)
    model.llama.checkpoint_activations = a.checkpoint_activations
    if a.compile:
        for layer in model.llama.layers:
            layer.compile(dynamic=True)
    return model, llama, vision


def open_examples(a: argparse.Namespace) -> tuple[Examples, Pictures | None]:
    examples = Examples(a.data, a.seed, absent="text" if a.missing_pictures_as_text else "refuse")
    if any(isinstance(part, ScienceQA) != (a.name == "scienceqa") for part in examples.parts):
        raise UserError(f"--data holds {shorten(part.kind for part in examples.parts)}; --stage 2 --task scienceqa "
                        "takes a ScienceQA folder and nothing else, other runs take none")  # fmt: skip
    images = a.images or (a.data[0] if a.name == "scienceqa" else None)
    if not images and any(examples[int(first)].image for first in examples.starts[:-1]):
        raise UserError("--images missing: the samples have pictures; give their folder or zip")
    return examples, Pictures(images) if images else None


def run_config(a: argparse.Namespace, model: LLaVA, llama: Path, vision: Path, n_samples: int) -> dict:
    """config.json: every flag, and what evaluation and chat must agree with."""
    settings = {name: value for name, value in vars(a).items() if name not in ("resume", "out", "name")}
    for name in ("llama", "vision", "projector", "init_from", "images"):
        settings[name] = settings[name] and checkpoint.portable(settings[name], a.out)
    settings |= {"data": [checkpoint.portable(path, a.out) for path in a.data], "samples": n_samples}
    return dict(settings=settings, stage=a.stage, template=TEMPLATE, prompt=SCIENCEQA_PROMPT, precision=a.precision,
                feature_layer=model.vision.feature_layer, preprocessing=PREPROCESSING, torch=torch.__version__,
                llama=checkpoint.portable(llama, a.out), vision=checkpoint.portable(vision, a.out))  # fmt: skip


def count(model: LLaVA) -> str:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    return f"model: {trained:,} parameters train, {frozen:,} are frozen"


# --- the loop


def loaded(steps: Steps, order: range, workers: int) -> Iterator[Step]:
    """Computes steps[t] for each t of `order`. Worker i of n computes every n-th step, ahead of the training.

    If a worker dies or is stuck, the last Step holds the failure, so that the run can be saved before it ends.
    """
    if workers == 0:
        yield from (steps[t] for t in order)
        return
    readers, processes = [], []
    try:
        for i in range(workers):
            # Each worker alone holds the writing end of its pipe, so the reader notices the worker's death.
            reader, writer = multiprocessing.Pipe(duplex=False)
            readers.append(reader)
            arguments = steps, order[i::workers], writer, list(readers)
            processes.append(multiprocessing.Process(target=work, args=arguments, daemon=True))
            processes[-1].start()
            writer.close()
        for i in range(len(order)):
            reader = readers[i % workers]
            try:
                step = reader.recv() if reader.poll(WORKER_TIMEOUT) else "is stuck"
            except (EOFError, OSError):
                step = "died, perhaps out of memory"
            if isinstance(step, str):
                yield Step(failure=f"a data worker (--workers) {step}; the same command continues from here")
                return
            yield step
    finally:
        for process in processes:
            process.kill()  # a stuck worker reacts to nothing else
            process.join(5)  # seconds; a dead network disk may hold it longer


def work(steps: Steps, order: range, writer: Connection, readers: list[Connection]):
    """A data worker: sends its steps as numpy arrays through its pipe. It ends when the training process does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the training process, which may have to save first, ends its workers
    for reader in readers:
        reader.close()  # the pipe breaks when the training process, its only other holder, ends
    with contextlib.suppress(BrokenPipeError):
        for t in order:
            writer.send(steps[t])


def fault_in(step: Step, green: int, bad: int, failed: int, allowed: int) -> str | None:
    """Why this step cannot be taken, the same in all processes, or None.

    green, bad, failed: green tokens, bad samples and failed loaders of all processes. allowed: bad samples to skip,
    whose errors are printed.
    """
    if failed:
        return gathered([step.failure] if step.failure else [])[0]
    errors = gathered(step.errors) if bad else []
    if bad > allowed:
        more = f"; and {bad - 3} more" if bad > 3 else ""
        return (f"{'; '.join(errors[:3])}{more}; correct them (is --images right?) "
                "and start the same command again, or let --max-bad-samples skip some")  # fmt: skip
    if not green:
        why = "no picture of its samples can be read" if bad else "every answer lies beyond --max-length; raise it"
        return f"its batch has no green token (samples {shorten(gathered(step.ids))}): {why}"
    if os.environ.get("RANK", "0") == "0":
        for error in errors:
            tqdm.write(f"skipped: {error}")
    return None


def train(a: argparse.Namespace, rank: int, world: int, device: torch.device):
    say = print if rank == 0 else lambda *_: None
    settings_in(a.out)  # refuses a wrong directory before anything is read
    a.precision = a.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = torch.bfloat16 if a.precision == "bf16" else torch.float32

    # The data, and the model of which the stage trains a part.
    examples, pictures = open_examples(a)
    say("\n".join(examples.describe(a.sampling)))
    model, llama, vision = starting_model(a, dtype)
    say(f"{count(model)}; {a.precision} on {world} x {device.type}")

    # steps[t]: the share of this process in global batch t.
    sp = checkpoint.open_tokenizer(llama / "tokenizer.model", model.llama.config)
    encode = Encoder(sp, model.vision.config.n_patches, model.vision.config.image_size, pictures, a.max_length)
    steps = Steps(examples, encode, a.batch_size, a.seed, rank, world, a.micro_batch_tokens, a.sampling)
    total = min(a.epochs * steps.per_epoch, a.max_steps or math.inf)

    # The run directory, new or continued.
    config = run_config(a, model, llama, vision, len(examples))
    state = enter_run(a, config)

    # The model on the devices, and the optimizer of what trains.
    net = distribute(model, a.parallel, device, dtype)
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=a.lr, weight_decay=0.0, fused=True)
    t = start = resume(a.out, state, net, optimizer) if state else 0  # t: steps taken
    say(f"{a.out}: continues after step {start} of {total}" if state else f"{a.out}: {total} steps")

    def save(for_use: bool):
        """Saves the state after step t and, for use by evaluation and chat, the parameters that train."""
        full = full_state(net, optimizer)
        by_process_0(lambda: checkpoint.save_state(a.out, full, t))
        if for_use:
            by_process_0(lambda: checkpoint.save_run(a.out, model.llama.config, full["model"], config | {"step": t},
                                                     vision, llama / "tokenizer.model"))  # fmt: skip

    interrupt, failure, bad_samples, cut_samples, began = Interrupt(), None, 0, 0, time.time()
    bar = tqdm(total=total, initial=start, unit="step", desc=f"stage {a.stage}", disable=rank != 0, smoothing=0.1)
    for step in loaded(steps, range(start, total), a.workers):
        # One exchange tells all processes what they must agree on.
        everyone = exchanged([step.green, step.tokens, step.cut, len(step.errors), bool(step.failure),
                              interrupt.received, len(step.batches)], device)  # (world, 7)  # fmt: skip
        green, tokens, cut, bad, failed, signals, _ = (int(n) for n in everyone.sum(0))
        n_batches = int(everyone[:, -1].max())
        failure = fault_in(step, green, bad, failed, a.max_bad_samples - bad_samples)
        if signals or failure:
            break
        bad_samples, cut_samples = bad_samples + bad, cut_samples + cut

        lr = learning_rate(t, total, a.lr, a.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr

        nll_sum = torch.zeros((), device=device)
        empty = [encode.stream([])] * (n_batches - len(step.batches))  # for a process with fewer micro-batches
        for i, batch in enumerate(step.batches + empty):
            net.require_backward_grad_sync = i + 1 == n_batches  # DDP averages gradients after the last one only
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                nll = net(*batch.to(device))
            (nll * world / green).backward()  # Eq. 3, a mean over the global batch; times world because DDP averages
            nll_sum += nll.detach()
        loss = float(exchanged([nll_sum.item()], device).sum()) / green
        grad_norm = clip_gradients(parameters, MAX_GRAD_NORM)
        if not math.isfinite(loss + grad_norm):
            failure = (f"loss {loss}, gradient norm {grad_norm} (samples {shorten(gathered(step.ids))}); lower --lr, "
                       "or are the weights damaged?")  # fmt: skip
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        t += 1
        seconds, began = time.time() - began, time.time()
        bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{tokens / seconds:,.0f}", refresh=False)
        bar.update()
        if rank == 0 and (t % a.log_every == 0 or t == total):
            append_metrics(a.out / "metrics.jsonl", step=t, loss=loss, lr=lr, grad_norm=grad_norm, green_tokens=green,
                           tokens=tokens, seconds=round(seconds, 4))  # fmt: skip
        if a.save_every and t % a.save_every == 0 and t < total:
            save(for_use=False)
    bar.close()
    if t and not by_process_0(lambda: is_saved(a.out, a.stage, t)):
        save(for_use=True)
    say(f"{a.out}: {t} of {total} steps done; {bad_samples} samples skipped, {cut_samples} cut to --max-length")
    if failure:
        raise UserError(f"step {t + 1}: {failure}")
    if t < total:
        say("stopped; the same command continues from here")
        raise SystemExit(128 + (interrupt.received or signal.SIGTERM))


# --- the command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    def paper(name: str) -> str:
        return "default: " + ", ".join(f"{run} {settings[name]}" for run, settings in PAPER.items()) + "; demo: its own"

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("what trains").add_argument
    add("--stage", type=int, choices=(1, 2), required=True, help="1: W trains; 2: W and the LLaMA train")
    add("--task", choices=("chat", "scienceqa"), help="of stage 2: a chatbot or ScienceQA (default: chat)")
    add = parser.add_argument_group("inputs (without any: the demo)").add_argument
    add("--llama", metavar="DIR", help="LLaMA or Vicuna: Meta's raw folder, a Hugging Face folder, or a run of stage 2")
    add("--vision", metavar="PATH", help="CLIP: OpenAI's ViT-L-14.pt or a Hugging Face folder")
    add("--projector", metavar="FILE", help="the W to start from: projector.pth or mm_projector.bin (default: noise)")
    add("--init-from", metavar="RUN", help="take the LLaMA, ViT and W of this run; `none`: W starts as noise, the "
        "paper's ablation (default in stage 2 of the demo: runs/stage1)")  # fmt: skip
    add("--data", nargs="+", metavar="PATH", help="LLaVA JSON (chat.json of CC3M-595K, llava_instruct_150k.json or its "
        "three parts), captions, or a ScienceQA folder")  # fmt: skip
    add("--images", metavar="PATH", help="folder or zip that holds the data's pictures")
    add("--missing-pictures-as-text", action="store_true", help="use ScienceQA problems without their absent pictures")
    add = parser.add_argument_group("the run").add_argument
    add("--out", metavar="DIR", help="run directory (default: runs/stage1, runs/chat or runs/scienceqa)")
    add("--epochs", type=int, help=f"passes over the data ({paper('epochs')})")
    add("--batch-size", type=int, help=f"samples of a step, over all processes ({paper('batch_size')})")
    add("--micro-batch-tokens", type=int, default=16384, help="positions that a process computes at once")
    add("--lr", type=float, help=f"peak learning rate ({paper('lr')})")
    add("--warmup-ratio", type=float, default=0.03, help="share of the steps in which the learning rate rises, 0 to 1")
    add("--max-length", type=int, default=2048, help="positions of a sample; longer ones lose their end")
    add("--max-steps", type=int, help="stop after this many steps (default: after --epochs)")
    add("--seed", type=int, default=0, help="seeds W's noise, the order of samples, and the requests for captions")
    add("--sampling", choices=("uniform", "proportional"), help="draw each file of --data equally often, or each "
        f"sample once an epoch ({paper('sampling')})")  # fmt: skip
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="each process holds the whole model (ddp) or a "
        "share of its parameters, gradients and optimizer state (fsdp)")  # fmt: skip
    add("--precision", choices=("bf16", "fp32"), help="of matrix products (default: bf16 on GPUs, fp32 on CPUs)")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="continue the run in --out")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the LLaMA's blocks")
    add("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
        help="recompute each block in the backward pass: less memory, more time")  # fmt: skip
    add("--save-every", type=int, default=500, help="steps between saved states; 0 = at the end only")
    add("--max-bad-samples", type=int, default=0, help="how many samples to skip whose picture cannot be read")
    add("--log-every", type=int, default=1, help="steps between lines of metrics.jsonl")
    add("--workers", type=int, default=2, help="processes that read pictures; 0 = the training process does")
    a = parser.parse_args(argv)

    if a.stage == 1 and a.task:
        raise UserError(f"--task {a.task}: belongs to stage 2; stage 1 trains on captions")
    a.name = "stage1" if a.stage == 1 else a.task or "chat"
    a.task = None if a.stage == 1 else a.name
    a.out = Path(a.out or f"runs/{a.name}")
    check_inputs(a)
    for name in ("epochs", "batch_size", "micro_batch_tokens", "max_length", "max_steps", "log_every"):
        if getattr(a, name) is not None and getattr(a, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: must be 1 or more")
    for name in ("save_every", "workers", "lr", "seed", "max_bad_samples"):
        if getattr(a, name) is not None and not 0 <= getattr(a, name) < 2**63:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: must be a number from 0 to 2**63")
    if not 0 <= a.warmup_ratio <= 1:
        raise UserError(f"--warmup-ratio {a.warmup_ratio}: must be a number from 0 to 1")
    if a.parallel == "fsdp" and "RANK" not in os.environ:
        raise UserError("--parallel fsdp: shares the model between processes; start it with torchrun")
    return a


def check_inputs(a: argparse.Namespace):
    a.demo = not (a.llama or a.vision or a.data)
    if a.demo:
        if a.images or a.projector:
            raise UserError("--images and --projector go with --llama, --vision and --data; without these: the demo")
        return
    if a.init_from == "none":
        a.init_from = None
    needed = ("data",) if a.init_from else ("llama", "vision", "data")
    if missing := [f"--{name}" for name in needed if not getattr(a, name)]:
        raise UserError(f"{' and '.join(missing)} missing: give --llama, --vision and --data, or --init-from and "
                        "--data, or none of them for the demo")  # fmt: skip
    if a.init_from and (a.llama or a.vision or a.projector):
        raise UserError("--init-from brings the LLaMA, the ViT and W of its run; leave out --llama, --vision and "
                        "--projector")  # fmt: skip


def run(a: argparse.Namespace, rank: int, world: int, device: torch.device):
    """Trains; a run of the demo gets its data and settings before it, and is examined after it."""
    if a.demo:
        from demo.world import begin

        begin(a)
    for name, value in PAPER[a.name].items():
        if getattr(a, name) is None:
            setattr(a, name, value)
    try:
        train(a, rank, world, device)
    finally:
        with contextlib.suppress(Exception):  # a failure to draw is no failure of the run
            from tools.plots import loss_curves

            if rank == 0:
                loss_curves(a.out)
    if a.demo:
        from demo.exam import finish

        finish(a)


def main():
    a = parse_arguments()
    with processes() as (rank, world, device):
        run(a, rank, world, device)


if __name__ == "__main__":
    run_command(main)
