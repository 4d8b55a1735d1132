"""Measures the memory of each training process and compares it with the estimate of tools/plan.py. Linux only.

    python tests/memory.py

It trains LLaMAs of two sizes on the CPU, stage 2 in fp32, by ddp and by fsdp in two processes. The measure is the peak
of RssAnon, a process's memory without mapped files, minus the same peak for a tiny model, which Python and PyTorch take.
The exit status is 1 if a process takes more than 8/7 or less than 3/4 of the estimate.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from kill import descendants, make_inputs
from test_train import ENVIRONMENT, flags, metrics, start

import checkpoint
from model import LLaMA, LLaMAConfig
from tools.plan import GIB, gpu_bytes

SIZES = (LLaMAConfig(dim=768, n_layers=8, n_heads=12, n_kv_heads=12, ffn_dim=2048, vocab_size=1024),
         LLaMAConfig(dim=1280, n_layers=10, n_heads=20, n_kv_heads=20, ffn_dim=3456, vocab_size=1024))  # fmt: skip
STEPS, SAMPLES = 3, 16
BOUNDS = 3 / 4, 8 / 7  # of measured / estimated


def anonymous_memory(pid: int) -> int:
    """RssAnon of a process in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def steps_taken(out: Path) -> int:
    log = out / "metrics.jsonl"
    return log.read_text().count("\n") if log.is_file() else 0


def measure(root: Path, inputs: Path, llama: Path, parallel: str, processes: int) -> tuple[int, int]:
    """Trains for a few steps -> the peak bytes of the largest process before the run is saved, and the positions of the
    largest micro-batch of a process."""
    out, peak = root / f"{llama.name}-{parallel}-{processes}", 0
    arguments = flags(inputs, out, stage=2, llama=llama, max_steps=STEPS, batch_size=SAMPLES, lr=1e-4, epochs=9,
                      save_every=0, parallel=parallel)  # fmt: skip
    process = start(arguments, processes)
    while process.poll() is None:
        if steps_taken(out) < STEPS:
            peak = max([peak, *map(anonymous_memory, descendants(process.pid))])
        time.sleep(0.01)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return peak, max(line["tokens"] for line in metrics(out)) // processes


def write_llama(c: LLaMAConfig, folder: Path, tokenizer: Path):
    weights = {name: p.detach().half() for name, p in LLaMA(c).named_parameters()}
    checkpoint.save_llama(c, weights, folder)
    shutil.copy(tokenizer, folder / "tokenizer.model")


def main():
    ENVIRONMENT["MALLOC_MMAP_THRESHOLD_"] = "65536"  # returns freed memory at once, so that it is not measured
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inputs = make_inputs(root)
        vision = checkpoint.load_vision(inputs / "vit.pt").config
        print(f"{'GiB of each process':32}{'measured':>10}{'estimate':>10}")
        for c in SIZES:
            llama = root / f"llama-{c.dim}"
            write_llama(c, llama, inputs / "llama/tokenizer.model")
            for parallel, processes in (("ddp", 1), ("ddp", 2), ("fsdp", 2)):
                base, _ = measure(root, inputs, inputs / "llama", parallel, processes)
                total, tokens = measure(root, inputs, llama, parallel, processes)
                shutil.rmtree(root / f"llama-{parallel}-{processes}")  # the next size trains the tiny model again
                parts = gpu_bytes(c, vision, 2, parallel, processes, "fp32", tokens, False)
                measured, estimate = total - base, sum(parts.values())
                wrong |= not BOUNDS[0] < measured / estimate < BOUNDS[1]
                listed = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
                print(f"{f'{c.dim} x {c.n_layers}, {parallel}, processes: {processes}':32}{measured / GIB:10.2f}"
                      f"{estimate / GIB:10.2f}   {listed}", flush=True)  # fmt: skip
    raise SystemExit(wrong)


if __name__ == "__main__":
    main()
