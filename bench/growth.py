"""How the cost of a step grows with the length of a sample, the samples of a batch and the size of the LLaMA.

    python bench/growth.py                   # prints, writes bench/growth.json and bench/growth.png (matplotlib)

Positions a second of a step of training, by this project and by `transformers`, in turn: see run.py. Then train.py
itself on the demo, in one process with all cores and in as many processes as there are cores.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from run import ROOT, SIZES, in_turn, make, work

import checkpoint

HERE = Path(__file__).parent


def speeds(size: str, kind: str, n: int, length: int = 0, rounds: int = 3) -> dict:
    """Positions a second: of the samples, system message and picture included, whether a side computes them or not."""
    found = in_turn(size, kind, n, rounds, length=length)
    positions = sum(len(ids) for ids, _ in work(kind, n, length)[1])
    return {side: positions / statistics.median(found[side]) for side in ("ours", "theirs")}


def curves():
    """-> for each curve: its title, its x and the label of x, positions/s of either side."""
    found = []

    def add(title, label, points):
        found.append(dict(title=title, label=label, x=[], ours=[], theirs=[]))
        for x, arguments in points:
            result = speeds(*arguments)
            for name, value in dict(x=x, **result).items():
                found[-1][name].append(value)
            print(f"{title:36} {label} {x:>12,}: ours {result['ours']:8,.0f} positions/s, theirs "
                  f"{result['theirs']:8,.0f}", flush=True)  # fmt: skip

    add("stage 2, middle, one sample", "tokens of text",
        [(n, ("middle", "stage 2", 1, n)) for n in (64, 128, 256, 512, 1024, 2048)])  # fmt: skip
    add("stage 1, middle", "samples of a batch",
        [(n, ("middle", "stage 1", n)) for n in (1, 2, 4, 8, 16, 32)])  # fmt: skip
    of_llama = {size: sum(p.numel() for p in make(SIZES[size][0]).llama.parameters()) for size in list(SIZES)[:3]}
    add("stage 1, 4 samples", "parameters of the LLaMA",
        [(n, (size, "stage 1", 4)) for size, n in of_llama.items()])  # fmt: skip
    return found


def processes(steps: int = 60, rounds: int = 3) -> dict:
    """Seconds of a step of the demo's stage 1 by train.py, in one process and in as many as there are cores."""
    cores, found = len(os.sched_getaffinity(0)), {}
    for _ in range(rounds):
        for n in (1, cores):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "train.py",
                           "--stage", "1", "--max-steps", str(steps), "--out", folder + "/run"]  # fmt: skip
                subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": str(cores // n)})  # fmt: skip
                lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
            found.setdefault(n, []).append(statistics.median(json.loads(line)["seconds"] for line in lines))
    return found


def plot(found: list, path: Path):
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        return print("no plot: pip install matplotlib")
    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.4), constrained_layout=True)
    for axis, curve in zip(axes, found):
        for name, style in (("ours", "o-"), ("theirs", "s--")):
            label = "this project" if name == "ours" else "transformers"
            axis.plot(curve["x"], curve[name], style, label=label, markersize=4)
        axis.set(xscale="log", ylim=(0, None), title=curve["title"], xlabel=curve["label"])
        axis.set_xticks(curve["x"], [f"{x / 1e6:.0f} M" if x > 1e5 else str(x) for x in curve["x"]])
        axis.minorticks_off()
    axes[0].set_ylabel("positions a second")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main():
    found, shared = curves(), processes()
    for n, seconds in shared.items():
        print(f"stage 1 of the demo, processes: {n}, seconds a step: " + ", ".join(f"{s:.3f}" for s in seconds))
    checkpoint.write_json(HERE / "growth.json", dict(curves=found, processes=shared))
    plot(found, HERE / "growth.png")


if __name__ == "__main__":
    main()
