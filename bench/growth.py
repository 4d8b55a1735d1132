"""Measures how training speed depends on the length of a sample, the size of a batch and the size of the LLaMA.

    python bench/growth.py        # prints the speeds; writes bench/growth.json and, with matplotlib, bench/growth.png

The speed is the number of positions that a training step computes per second. This project and `transformers` take
turns, in fp32 and in bf16 (see run.py). Then train.py runs on the demo, in one process on all cores and in one process
on each core.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from run import ROOT, SIZES, in_turn, make_model, make_work, sides_in

from common import run_command, write_json

HERE = Path(__file__).parent
SIDES = {f"{name}, {precision}": side for precision in ("fp32", "bf16")
         for name, side in sides_in(precision, before=None).items()}  # fmt: skip
STYLES = {"ours, fp32": "C0o--", "theirs, fp32": "C1s--", "ours, bf16": "C0o-", "theirs, bf16": "C1s-"}


def positions_per_second(size: str, kind: str, n: int, length: int = 0, rounds: int = 2) -> dict[str, float]:
    """The speed of each side. The system message and the picture of each sample count, even where a side skips them."""
    row = in_turn(SIDES, size, kind, n, rounds, length=length)
    samples, _ = make_work(kind, n, length)
    positions = sum(len(ids) for ids, _ in samples)
    return {name: positions / statistics.median(row[name]) for name in SIDES}


def measure_curve(title: str, label: str, points: list[tuple[int, tuple]]) -> dict:
    """points: each x with the arguments of `positions_per_second`. label: the unit of x."""
    curve: dict = dict(title=title, label=label, x=[], **{name: [] for name in SIDES})
    for x, arguments in points:
        speeds = positions_per_second(*arguments)
        curve["x"].append(x)
        for name, speed in speeds.items():
            curve[name].append(speed)
        listed = ", ".join(f"{name} {speed:8,.0f} positions/s" for name, speed in speeds.items())
        print(f"{title:36} {label} {x:>12,}: {listed}", flush=True)
    return curve


def measure_curves() -> list[dict]:
    sizes = list(SIZES)[:3]
    parameters = [sum(p.numel() for p in make_model(SIZES[size][0]).llama.parameters()) for size in sizes]
    return [
        measure_curve("stage 2, middle, one sample", "tokens of text",
                      [(n, ("middle", "stage 2", 1, n)) for n in (64, 128, 256, 512, 1024, 2048)]),
        measure_curve("stage 1, middle", "samples of a batch",
                      [(n, ("middle", "stage 1", n)) for n in (1, 2, 4, 8, 16, 32)]),
        measure_curve("stage 1, 4 samples", "parameters of the LLaMA",
                      [(n, (size, "stage 1", 4)) for size, n in zip(sizes, parameters)]),
    ]  # fmt: skip


def measure_processes(steps: int = 60, rounds: int = 3) -> dict[int, list[float]]:
    """Median seconds of a step of the demo's stage 1 in each round, by the number of processes."""
    cores = len(os.sched_getaffinity(0))
    found: dict[int, list[float]] = {}
    for _ in range(rounds):
        for n in (1, cores):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(n), "train.py",
                           "--stage", "1", "--max-steps", str(steps), "--out", f"{folder}/run"]  # fmt: skip
                env = os.environ | {"OMP_NUM_THREADS": str(cores // n)}
                subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, env=env)
                lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
            found.setdefault(n, []).append(statistics.median(json.loads(line)["seconds"] for line in lines))
    return found


def plot(curves: list[dict], path: Path):
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"{path} was not drawn: pip install matplotlib")
        return
    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.4), constrained_layout=True)
    for axis, curve in zip(axes, curves):
        for name, style in STYLES.items():
            axis.plot(curve["x"], curve[name], style, label=name, markersize=4)
        axis.set(xscale="log", ylim=(0, None), title=curve["title"], xlabel=curve["label"])
        axis.set_xticks(curve["x"], [f"{x / 1e6:.0f} M" if x > 1e5 else str(x) for x in curve["x"]])
        axis.minorticks_off()
    axes[0].set_ylabel("positions/s")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main():
    curves, processes = measure_curves(), measure_processes()
    for n, seconds in processes.items():
        print(f"stage 1 of the demo, processes: {n}, seconds of a step: " + ", ".join(f"{s:.3f}" for s in seconds))
    write_json(HERE / "growth.json", dict(curves=curves, processes=processes))
    plot(curves, HERE / "growth.png")


if __name__ == "__main__":
    run_command(main)
