"""Measures what each process of a training holds, and sets it beside what `train.py --plan` counts.

    python tests/memory.py          # exit status 1 if more than 8/7 or less than 3/4 of the plan is held

Stage 2 of two sizes, on the CPU in fp32, ddp and fsdp with two processes. Measured is the peak of a process's own
memory (RssAnon: without files that are mapped), less that of the same training of a tiny model: Python and PyTorch.
"""

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from kill import FIXTURES, Folders, tree
from test_train import flags, metrics, start

import checkpoint
from model import LLaMA, LLaMAConfig
from plan import GIB, plan

SIZES = (LLaMAConfig(dim=768, n_layers=8, n_heads=12, n_kv_heads=12, ffn_dim=2048, vocab_size=1024),
         LLaMAConfig(dim=1280, n_layers=10, n_heads=20, n_kv_heads=20, ffn_dim=3456, vocab_size=1024))  # fmt: skip
STEPS, SAMPLES = 3, 16


def measure(root: Path, inputs: Path, llama: Path, parallel: str, processes: int) -> tuple[float, float]:
    """A short training -> bytes of the process that holds most until the last step, positions of a micro-batch."""
    out, most = root / f"{llama.name}-{parallel}-{processes}", 0
    process = start(flags(inputs, out, stage=2, llama=llama, max_steps=STEPS, batch_size=SAMPLES, lr=1e-4, epochs=9,
                          save_every=0, parallel=parallel), processes)  # fmt: skip
    while process.poll() is None:
        steps = (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").is_file() else 0
        for pid in tree(process.pid) if steps < STEPS else ():
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            except OSError:
                continue  # it has just ended
            most = max([most] + [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")])
        time.sleep(0.01)
    assert process.returncode == 0, process.communicate()
    return most, max(line["tokens"] for line in metrics(out)) / processes


def main():
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        inputs = FIXTURES[0](Folders(root))
        vision = checkpoint.load_vision(inputs / "vit.pt").config
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what a process frees goes back at once, and is not measured
        print(f"{'GiB in each process':32}{'measured':>10}{'planned':>10}")
        wrong = 0
        for c in SIZES:
            llama = root / f"llama-{c.dim}"
            checkpoint.save_llama(LLaMA(c), llama, torch.float16)
            (llama / "tokenizer.model").write_bytes((inputs / "llama/tokenizer.model").read_bytes())
            for parallel, processes in (("ddp", 1), ("ddp", 2), ("fsdp", 2)):
                nothing, _ = measure(root, inputs, inputs / "llama", parallel, processes)
                held, tokens = measure(root, inputs, llama, parallel, processes)
                shutil.rmtree(root / f"llama-{parallel}-{processes}")  # for the next size
                found = plan(c, vision, 2, parallel, processes, "fp32", int(tokens), False)
                wrong += not 3 / 4 < (held - nothing) / sum(found.values()) < 8 / 7
                print(f"{f'{c.dim} x {c.n_layers}, {parallel}, processes: {processes}':32}"
                      f"{(held - nothing) / GIB:10.2f}{sum(found.values()) / GIB:10.2f}   "
                      + ", ".join(f"{k} {v / GIB:.2f}" for k, v in found.items()), flush=True)  # fmt: skip
        raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
