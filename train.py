"""Trains LLaVA: what trains in which stage, the schedule, and the one loop (section 4.2 of the paper).

    torchrun train.py --stage 1                       # W alone, on captioned pictures; no paths: the demo
    torchrun train.py --stage 2                       # W and the LLaMA, on conversations; starts from runs/stage1
    torchrun --nproc_per_node 8 train.py --stage 1 \\
        --llama vicuna-13b-v0 --vision ViT-L-14.pt --data chat.json --images images.zip
    python train.py --plan --llama vicuna-13b-v0      # what fits on which GPUs

One process without torchrun works as well. The loss of a global batch is the sum of the green tokens' negative log
likelihoods over their count, over all micro-batches and processes (Eq. 3): how the batch is cut up changes nothing.
"""

import argparse
import json
import math
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import demo
import plan
import plots
from conversation import TEMPLATE, HelpForm, UserError, run_command, system_ids
from data import SCIENCEQA_PROMPT, Encoder, Example, Examples, Pictures, ScienceQA, Steps, ask
from model import LLaVA, Prefix
from parallel import PARALLEL, by_process_0, from_outside, gathered, leave, start_processes, summed
from vision import PREPROCESSING

PAPER = {  # section 4.2: what each run of the paper uses
    "stage1": dict(epochs=1, batch_size=128, lr=2e-3, sampling="proportional"),
    "chat": dict(epochs=3, batch_size=32, lr=2e-5, sampling="uniform"),
    "scienceqa": dict(epochs=12, batch_size=32, lr=2e-5, sampling="proportional"),
}
MAX_GRAD_NORM = 1.0
MAY_CHANGE = {"workers", "log_every", "save_every", "micro_batch_tokens", "images", "max_length", "max_bad_samples",
              "max_bad_steps", "tensorboard"}  # on resuming  # fmt: skip


def learning_rate(step: int, steps: int, peak: float, warmup_ratio: float) -> float:
    """Cosine schedule: from near 0 up to `peak` over the warm-up's steps, then down along a half cosine to near 0."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    def paper(name):
        return "default: " + ", ".join(f"{run} {how[name]}" for run, how in PAPER.items()) + "; in the demo its own"

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpForm)
    add = parser.add_argument_group("what is trained").add_argument
    add("--stage", type=int, choices=(1, 2), help="1: W alone trains; 2: W and the LLaMA; the ViT never does")
    add("--task", choices=("chat", "scienceqa"), help="of stage 2: a chatbot, or ScienceQA (default: chat)")
    add = parser.add_argument_group("inputs (none of them: the demo)").add_argument
    add("--llama", metavar="DIR", help="LLaMA or Vicuna: Meta's raw folder, a Hugging Face folder, a run of stage 2; "
        "or a finished LLaVA, whose W is started from")  # fmt: skip
    add("--llama-base", metavar="DIR", help="the LLaMA that --llama holds deltas over, as Vicuna v0 was released")
    add("--vision", metavar="PATH", help="CLIP: OpenAI's ViT-L-14.pt or a Hugging Face folder (default: that of a "
        "LLaVA of transformers)")  # fmt: skip
    add("--projector", metavar="FILE", help="a W to start from: projector.pth or mm_projector.bin (default: a LLaVA's "
        "own, else noise)")  # fmt: skip
    add("--init-from", metavar="RUN", help="start from this run's LLaMA, ViT and W instead of --llama, --vision and "
        "--projector (the demo's stage 2: runs/stage1; `none`: W from noise, the paper's ablation)")  # fmt: skip
    add("--data", nargs="+", metavar="PATH", help="LLaVA JSON (stage 1: chat.json of CC3M-595K; stage 2: "
        "llava_instruct_150k.json or its three parts), captions, or a ScienceQA folder")  # fmt: skip
    add("--images", metavar="PATH", help="folder or zip that the data's picture paths are relative to")
    add("--missing-pictures-as-text", action="store_true", help="ask ScienceQA problems without absent pictures")
    add = parser.add_argument_group("the run").add_argument
    add("--out", metavar="DIR", help="run directory (default runs/stage1, runs/chat or runs/scienceqa)")
    add("--epochs", type=int, help=f"passes over the data ({paper('epochs')})")
    add("--batch-size", type=int, help=f"samples of a step over all processes ({paper('batch_size')})")
    add("--micro-batch-tokens", type=int, default=16384, help="positions that a process computes on at once")
    add("--lr", type=float, help=f"peak learning rate ({paper('lr')})")
    add("--warmup-ratio", type=float, default=0.03, help="share of the steps in which the learning rate rises")
    add("--max-length", type=int, default=2048, help="positions of a sample; longer ones are cut, never in a picture")
    add("--max-steps", type=int, help="stop after so many steps (default: epochs decide)")
    add("--seed", type=int, default=0, help="of W's noise, the samples' order and what is drawn for a caption")
    add("--sampling", choices=("uniform", "proportional"),
        help="uniform: each response type as often (the paper's, default for chat); proportional: each sample once an "
        "epoch")  # fmt: skip
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="ddp: each process holds the whole model; fsdp: its "
        "share of each block, of its gradients and of the optimiser's state")  # fmt: skip
    add("--precision", choices=("bf16", "fp32"), help="of the matrix products (default: bf16 on GPUs, else fp32)")
    add("--resume", action=argparse.BooleanOptionalAction, default=True, help="go on where --out was left")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the LLaMA's blocks")
    add("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
        help="recompute each block in the backward pass: less memory, more time")  # fmt: skip
    add("--save-every", type=int, default=500, help="steps between training states; 0 = only at the end")
    add("--max-bad-samples", type=int, default=0, help="so many times a sample that cannot be read is left out")
    add("--max-bad-steps", type=int, default=0, help="so many steps whose loss is no number are left out")
    add("--log-every", type=int, default=1, help="steps between lines of metrics.jsonl")
    add("--tensorboard", action="store_true", help="these lines also as RUN/tensorboard (pip install tensorboard)")
    add("--workers", type=int, default=2, help="processes that decode pictures; 0 = the main process does")
    add = parser.add_argument_group("nothing run, but counted").add_argument
    add("--plan", action="store_true", help="print what each GPU would hold of --llama (and --vision; default: "
        "ViT-L/14) in each stage, or in --stage, and whether it fits")  # fmt: skip
    add("--gpus", type=int, default=8, help="of the plan")
    add("--gpu-memory", type=int, default=80, metavar="GIB", help="of each of them")
    a = parser.parse_args(argv)

    if a.plan:
        return a
    if a.llama and not a.vision and (Path(a.llama) / "config.json").is_file():
        a.vision = a.llama if checkpoint.kind_of(a.llama) == checkpoint.HF_LLAVA else None  # its own
    if a.stage is None:
        raise UserError("--stage missing: 1 trains W alone, 2 W and the LLaMA")
    if a.stage == 1 and a.task:
        raise UserError(f"--task {a.task}: is of stage 2; stage 1 has one task, captions")
    a.name = "stage1" if a.stage == 1 else a.task or "chat"
    a.task = None if a.stage == 1 else a.name
    a.out = Path(a.out or f"runs/{a.name}")
    a.demo = not (a.llama or a.vision or a.data)
    if a.demo and (a.images or a.projector or a.llama_base):
        raise UserError("--images, --projector and --llama-base go with --llama, --vision and --data; without any of "
                        "them: the demo")  # fmt: skip
    if a.demo and a.stage == 2:
        a.init_from = a.init_from or "runs/stage1"
    if a.demo and a.init_from in (None, "none"):
        a.llama, a.vision, a.init_from = demo.LLAMA, demo.VISION, None
    needed = ("init_from", "data") if a.init_from else ("llama", "vision", "data")
    missing = [f"--{name.replace('_', '-')}" for name in needed if not getattr(a, name)]
    if missing and not a.demo:
        raise UserError(f"{' and '.join(missing)} missing: give --llama, --vision and --data, or --init-from and "
                        "--data, or none of them for the demo")  # fmt: skip
    if a.init_from and (a.llama or a.vision or a.projector or a.llama_base):
        raise UserError("--init-from brings the LLaMA, the ViT and W of its run; leave out --llama, --llama-base, "
                        "--vision and --projector")  # fmt: skip
    defaults = PAPER[a.name] | (demo.SETTINGS[a.name] if a.demo else {})
    for name, value in defaults.items():
        if getattr(a, name, None) is None:
            setattr(a, name, value)
    for name in ("epochs", "batch_size", "micro_batch_tokens", "max_length", "log_every"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: must be 1 or more")
    for name in ("save_every", "workers", "lr", "seed", "max_bad_samples", "max_bad_steps"):
        if not 0 <= getattr(a, name) < 2**63:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: must be a number, 0 or more, below 2**63")
    if a.max_steps is not None and a.max_steps < 1:
        raise UserError(f"--max-steps {a.max_steps}: must be 1 or more")
    if a.parallel == "fsdp" and "RANK" not in os.environ:
        raise UserError("--parallel fsdp: shares the model between processes; start it by torchrun")
    if not 0 <= a.warmup_ratio <= 1:
        raise UserError(f"--warmup-ratio {a.warmup_ratio}: must lie in 0..1")
    if a.tensorboard:
        try:
            from torch.utils import tensorboard  # noqa: F401
        except ImportError:
            raise UserError("--tensorboard: needs a package that is missing: pip install tensorboard") from None
    return a


class Interrupt:
    """Ctrl-C and SIGTERM ask for an end after the current step, so that the run directory is left whole."""

    asked = 0

    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C: at once
        self.asked = number


def leave_signals_to_parent(worker: int):
    """In a process that decodes pictures: it ends when the process that trains does, which may have to save first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# --- the run


def settings_of(a: argparse.Namespace) -> dict:
    """Every flag as JSON keeps it; paths are absolute, so that another way to write one is no other setting."""
    settings = {k: v for k, v in vars(a).items() if k not in ("resume", "out", "plan", "gpus", "gpu_memory")}
    for name in ("llama", "llama_base", "vision", "projector", "init_from", "images"):
        settings[name] = settings[name] and str(Path(settings[name]).resolve())
    return settings | {"data": [str(Path(path).resolve()) for path in a.data]}


def settings_begun(out: Path) -> dict | None:
    """The settings that the run in this directory was begun with; None if none was. It may hold nothing else."""
    path, begun = out / "config.json", None
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, and no run directory; give another --out")
    if out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        begun = checkpoint.read_json(path, dict).get("settings") if path.is_file() else None
        if not isinstance(begun, dict):
            raise UserError(f"{out}: is there already and is no run of train.py; give another --out")
    return begun


def lock(out: Path):
    """Keeps a run directory for this process, as long as what is returned lives. Raises UserError if another has it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")
    except OSError as error:
        raise UserError(f"{out}: cannot be made a run directory ({error.strerror}); give another --out") from None
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: its lock lives on in forked workers
    except (BlockingIOError, PermissionError):
        raise UserError(f"{out}: another train.py is at work in it; wait for its end, or give another --out") from None
    except (ImportError, OSError):
        pass  # a system or a disk without locks
    return file


def enter_run(a: argparse.Namespace, config: dict, rank: int) -> dict | None:
    """Begins the run directory, or re-enters it: then returns the state to go on from.

    A directory begun with other settings is refused, so that no run goes on as something that it is not; and so is a
    finished run that would be lost.
    """
    begun = settings_begun(a.out)  # again: before the lock, another run may have begun
    if a.resume and begun is not None:
        state = next(filter(None, (way.saved(a.out) for way in PARALLEL.values())), None)  # another way is refused
        for name, now in config["settings"].items():
            if state and name not in MAY_CHANGE and begun.get(name, now) != now:
                raise UserError(
                    f"{a.out}: was begun with --{name.replace('_', '-')} {begun.get(name)}, now it is {now}; "
                    "go on with the same settings, or give another --out, or --no-resume to begin anew"
                )
        if state:
            return state
        if (a.out / "projector.pth").is_file():
            raise UserError(f"{a.out}: holds a trained W but no state/ to go on from; give another --out, or "
                            "--no-resume to train it anew")  # fmt: skip
    if rank == 0:
        try:
            shutil.rmtree(a.out / "state", ignore_errors=True)
            # The run is not usable until it has its own.
            for name in ("projector.pth", "exam.json", "bad_steps.jsonl", "loss.png"):
                (a.out / name).unlink(missing_ok=True)
            checkpoint.write_json(a.out / "config.json", config)
            (a.out / "metrics.jsonl").write_text("")
        except OSError as error:
            raise UserError(f"{a.out}: cannot be made a run directory ({error.strerror}); give another --out") from None
    return None


def keep_metrics(path: Path, step: int):
    """Drops the lines of steps that are not in the state that the run goes on from, and what is no line of metrics."""
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True) if path.is_file() else []:
        with suppress(ValueError, KeyError, TypeError):
            kept += [line] * (line.endswith("\n") and json.loads(line)["step"] <= step)
    with checkpoint.replacing(path) as file:
        file.write("".join(kept).encode())


def open_board(folder: Path, step: int):
    """A writer of TensorBoard's files, which hides what older ones hold of later steps than this."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(folder, purge_step=step + 1)
    except OSError as error:
        raise checkpoint.unwritten(folder, error) from None


def note(path: Path, board=None, **line):
    """Adds a line of JSON, and its numbers to TensorBoard's files if there is a board."""
    try:
        with open(path, "a") as file:
            print(json.dumps(line), file=file)
        if board:
            for name in line.keys() - {"step"}:
                if line[name] is not None:
                    board.add_scalar(name, line[name], line["step"])
            board.flush()
    except OSError as error:
        raise checkpoint.unwritten(path, error) from None


def sit_exam(name: str, model: LLaVA, encode: Encoder, prefix: Prefix | None, shift: int = 0) -> list[str]:
    """The model's answers to what the demo asks about its held-out scenes."""
    prompts = [Example(image, [text], image) for text, image in demo.exam(name, shift)]
    return ask(model, encode, prompts, prefix, max_new_tokens=64)


def start_model(a: argparse.Namespace, dtype: torch.dtype) -> tuple[LLaVA, Path, dict[str, str]]:
    """The model that training starts from, its tokenizer.model, and where its LLaMA and ViT came from.

    What is frozen is held in the compute dtype, what trains in fp32 (fsdp: where it is shared; until then as it is).
    """
    llama_dtype = dtype if a.stage == 1 else None if a.parallel == "fsdp" else torch.float32
    if a.init_from:
        model, _, begun = checkpoint.load_run(a.init_from, llama_dtype)
        model.vision.to(dtype)
        model.projector.float()
        llama, vision = checkpoint.llama_of(a.init_from, begun), begun["vision"]
        base = begun.get("llama_base") if begun["stage"] == 1 else None
    else:
        llama, vision, base = a.llama, a.vision, a.llama_base
        finished = checkpoint.kind_of(llama) in (checkpoint.FIRST_LLAVA, checkpoint.HF_LLAVA)
        projector = a.projector or (llama if finished else None)
        model = checkpoint.build(checkpoint.load_llama(llama, llama_dtype, base),
                                 checkpoint.load_vision(vision, checkpoint.feature_layer_of(llama), dtype),
                                 projector and checkpoint.load_projector(projector), a.seed)  # fmt: skip
    origin = dict(llama=llama, vision=vision) | (dict(llama_base=base) if base else {})
    return model, Path(llama) / "tokenizer.model", {name: str(Path(path).resolve()) for name, path in origin.items()}


def train(a: argparse.Namespace, rank: int, world: int, device: torch.device):
    say = print if rank == 0 else (lambda *_: None)
    settings_begun(a.out)  # a wrong --out is told before anything is read
    if a.demo:
        by_process_0(lambda: demo.prepare(demo.FOLDER), rank)
        a.data, a.images = demo.data_of(a.name)
    examples = Examples(a.data, a.seed, absent="text" if a.missing_pictures_as_text else "refuse")
    is_scienceqa = [isinstance(part, ScienceQA) for part in examples.parts]
    if any(is_scienceqa) != (a.name == "scienceqa") or len(set(is_scienceqa)) > 1:
        raise UserError(f"--data holds {examples.describe()}; a ScienceQA folder, and nothing else, goes with "
                        "--stage 2 --task scienceqa")  # fmt: skip
    if a.name == "scienceqa" and not a.images:
        a.images = a.data[0]
    if not a.images and any(examples[int(first)].image for first in examples.starts[:-1]):
        raise UserError("--images missing: the samples have pictures; give their folder or zip")
    say(f"data: {examples.describe()}")
    if absent := sum(len(part.missing) for part in examples.parts if isinstance(part, ScienceQA)):
        say(f"{absent} pictures are absent; those problems are asked without one")

    pictures = a.images and Pictures(a.images)
    precision = a.precision = a.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model, tokenizer, origin = start_model(a, dtype)
    if a.llama and not a.demo:
        say(f"{a.llama}: {checkpoint.describe(a.llama)}" + (f", deltas over {a.llama_base}" if a.llama_base else ""))
    model.llama.checkpoint_activations = a.checkpoint_activations
    if a.parallel == "ddp":
        model.to(device)
    if a.compile:
        for layer in model.llama.layers:
            layer.compile(dynamic=True)
    trains = sum(p.numel() for p in model.set_trainable(a.stage))
    frozen = sum(p.numel() for p in model.parameters()) - trains
    say(f"model: {trains:,} parameters train, {frozen:,} are frozen; {precision} on {world} x {device.type}")

    # Every sample starts with the system message: it is read once for all. In stage 1 the LLaMA is constant, and so
    # is what it makes of it; in stage 2 it is read with each batch, as ids, so that the gradient reaches it.
    sp = checkpoint.open_tokenizer(tokenizer, model.llama)
    prefix_ids = torch.tensor(system_ids(sp))

    def autocast(on: torch.device):
        return torch.autocast(on.type, torch.bfloat16, enabled=precision == "bf16")

    def read_prefix():
        ids = prefix_ids.to(model.projector.weight.device)
        with autocast(ids.device), torch.no_grad():
            return model.read_prefix(ids)

    if a.stage == 1:
        prefix = [(k.to(device), v.to(device)) for k, v in read_prefix()]
    else:
        prefix = prefix_ids.to(device)
    n_patches, size = model.vision.config.n_patches, model.vision.config.image_size
    if a.max_length < len(prefix_ids) + n_patches + 2:
        raise UserError(f"--max-length {a.max_length}: a picture and the system message alone take "
                        f"{len(prefix_ids) + n_patches}")  # fmt: skip
    encode = Encoder(sp, n_patches, size, pictures, a.max_length, prefix_ids.tolist())
    steps = Steps(examples, encode, a.batch_size, a.seed, rank, world, a.micro_batch_tokens, a.sampling)
    total = min(a.epochs * steps.per_epoch, a.max_steps or math.inf)

    config = dict(settings=settings_of(a) | {"samples": len(examples)}, stage=a.stage, template=TEMPLATE,
                  prompt=SCIENCEQA_PROMPT, precision=precision, feature_layer=model.vision.feature_layer,
                  preprocessing=PREPROCESSING, torch=torch.__version__)  # fmt: skip
    config |= origin
    held = []
    by_process_0(lambda: held.append(lock(a.out)), rank)
    state = enter_run(a, config, rank)
    examined = a.demo and rank == 0 and a.name != "scienceqa"  # which eval_scienceqa.py does
    if examined:
        with autocast(model.projector.weight.device):
            before = sit_exam(a.name, model, encode, read_prefix())

    trainer = PARALLEL[a.parallel](model, device, precision)
    optimizer = torch.optim.AdamW(trainer.trained.values(), lr=a.lr, weight_decay=0.0, fused=True)
    start = 0
    if state:
        start = state["step"]
        try:
            trainer.load(a.out, state, optimizer)
        except Exception as error:  # of what is damaged, nearly anything
            if from_outside(error):
                raise
            raise UserError(f"{a.out}/state: is of another model or damaged ({checkpoint.reason(error)}); give back "
                            "what the run was begun with, or --no-resume to begin anew") from None  # fmt: skip
        say(f"{a.out}: goes on after step {start} of {total}")
    if rank == 0:
        keep_metrics(a.out / "metrics.jsonl", start)
    board = open_board(a.out / "tensorboard", start) if a.tensorboard and rank == 0 else None

    def save(step, for_use=True):
        """The state to go on from, and unless training just goes on, what evaluation and chat use."""
        trainer.save(a.out, step, optimizer)
        if for_use and (whole := trainer.whole()):
            checkpoint.save_run(a.out, whole, config | {"step": step}, tokenizer, a.stage)
        if dist.is_initialized():
            dist.barrier()  # no process ends while another still writes

    loader = DataLoader(steps, batch_size=None, sampler=range(start, total), num_workers=a.workers,
                        worker_init_fn=leave_signals_to_parent)  # fmt: skip
    interrupt, cut_samples, bad_samples, bad_steps, began = Interrupt(), 0, 0, 0, time.time()
    bar = tqdm(total=total, initial=start, unit="step", desc=f"stage {a.stage}", disable=rank != 0, smoothing=0.1)

    t, none = start, encode.flatten([])  # steps done; a micro-batch of no sample
    for step in loader:
        green = sum(int(batch.green.sum()) for batch in step.batches)
        tokens = sum(len(batch.ids) for batch in step.batches) if step.ids else 0  # no sample: one empty position
        counts = green, tokens, step.cut, len(step.errors), interrupt.asked
        green, tokens, cut, bad, asked = summed(*counts, device=device)
        if asked:
            break
        bad_samples += int(bad)
        errors = gathered(step.errors) if bad else []
        if (bad_samples > a.max_bad_samples or not green) and t > start:
            save(t)  # what has been learnt is not lost
        if bad_samples > a.max_bad_samples:
            more = f"; and {len(errors) - 3} more" if len(errors) > 3 else ""
            raise UserError(f"step {t + 1}: {'; '.join(errors[:3])}{more}; mend that (is --images right?) and start "
                            "the same again, or leave some out by --max-bad-samples")  # fmt: skip
        if rank == 0:
            for error in errors:
                bar.write(f"step {t + 1}: left out: {error}")
        if not green:
            why = "none of them could be read" if bad else "every answer lies beyond --max-length; raise it"
            raise UserError(f"step {t + 1}: no green token in its batch (samples {', '.join(gathered(step.ids)[:8])}): "
                            f"{why}")  # fmt: skip
        lr = learning_rate(t, total, a.lr, a.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        nll_sum = 0.0
        for batch in trainer.in_turn(step.batches, none):
            with autocast(device):
                nll, _ = trainer.run(batch.ids, batch.green, batch.cu_seqlens, batch.pixels, prefix)
            (nll * world / green).backward()  # Eq. 3; times world because processes' gradients are averaged
            nll_sum += nll.item()
        grad_norm = trainer.clip(MAX_GRAD_NORM)
        loss = summed(nll_sum, device=device)[0] / green
        finite = math.isfinite(loss + grad_norm)
        if finite:
            optimizer.step()
        else:  # the step is not taken
            bad_steps, samples = bad_steps + 1, gathered(step.ids)
            if rank == 0:
                note(a.out / "bad_steps.jsonl", step=t + 1, loss=str(loss), grad_norm=str(grad_norm), ids=samples)
            if bad_steps > a.max_bad_steps:
                if t > start:
                    save(t)
                raise UserError(f"step {t + 1}: loss {loss}, gradient norm {grad_norm} (samples "
                                f"{', '.join(samples[:8])}, ...; all in {a.out / 'bad_steps.jsonl'}); lower --lr, or "
                                "are the weights damaged?")  # fmt: skip
        optimizer.zero_grad(set_to_none=True)

        t, cut_samples = t + 1, cut_samples + int(cut)
        now = time.time()
        bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{tokens / (now - began):,.0f}", refresh=False)
        bar.update()
        if rank == 0 and (t % a.log_every == 0 or t == total):
            note(a.out / "metrics.jsonl", board, step=t, loss=loss if finite else None, lr=lr,
                 grad_norm=grad_norm if finite else None, green_tokens=int(green), tokens=int(tokens),
                 seconds=round(now - began, 4))  # fmt: skip
        began = now
        if a.save_every and t % a.save_every == 0 and t < total:
            save(t, for_use=False)
    bar.close()
    if bad_samples or bad_steps:
        say(f"left out: pictures that could not be read: {bad_samples}; steps that were not taken: {bad_steps}")
    if cut_samples:
        say(f"{cut_samples} samples were longer than --max-length {a.max_length} and were cut")
    saved = checkpoint.read_json(a.out / "config.json", dict).get("step")
    unsaved = t and (saved != t or checkpoint.lacks(a.out, a.stage))  # else nothing has been learnt since
    if summed(rank == 0 and bool(unsaved), device=device)[0]:
        save(t)
    if rank == 0:
        with suppress(Exception):  # no picture is a reason to fail
            plots.loss_curves(a.out)
    if t < total:
        say(f"stopped after step {t} of {total}; the same command goes on from there ({a.out})")
        raise SystemExit(128 + (interrupt.asked or signal.SIGTERM))
    say(f"{a.out}: stage {a.stage} is done, {total} steps")
    if examined:
        model = checkpoint.load_run(a.out, dtype)[0].to(device)
        with autocast(device):
            after, swapped = (sit_exam(a.name, model, encode, read_prefix(), shift) for shift in (0, 1))
        checkpoint.write_json(a.out / "exam.json", dict(name=a.name, before=before, after=after, swapped=swapped))
        say("\n" + demo.report(a.out))
    if dist.is_initialized():
        dist.barrier()  # the processes end together: none takes down connections that another still uses


def print_plan(a: argparse.Namespace):
    for name in ("gpus", "gpu_memory", "micro_batch_tokens"):
        if getattr(a, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(a, name)}: must be 1 or more")
    if a.init_from:
        a.llama = checkpoint.llama_of(a.init_from, checkpoint.read_json(Path(a.init_from) / "config.json", dict))
    llama = checkpoint.llama_config(a.llama or demo.LLAMA)
    vision = a.vision or (None if a.llama else demo.VISION)
    vision = checkpoint.load_vision(vision).config if vision else plan.VIT_L
    stages = [a.stage] if a.stage else [1, 2]
    print(plan.table(llama, vision, stages, a.gpus, a.gpu_memory, a.precision or "bf16", a.micro_batch_tokens))


def main():
    a = parse_arguments()
    if a.plan:
        return print_plan(a)
    rank, world, device = start_processes(sparing=a.parallel == "fsdp")
    try:
        train(a, rank, world, device)
    except Exception as error:
        leave(error, rank, world)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
