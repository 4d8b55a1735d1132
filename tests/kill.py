"""Kills training runs at random moments, starts them again with the same command, and counts what was lost.

    python tests/kill.py --kills 30

Both stages, one process and two, ddp and fsdp, uniform sampling; a state is saved at every step, so that many kills
fall into a save. Each run goes on until it ends by itself; then its weights are compared bit for bit with those of a
run that was let alone, and its metrics line for line (all but the seconds). Exit status 1 if anything differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_train import chat, flags, inputs, metrics, stage_2, start

FIXTURES = [fixture.__wrapped__ for fixture in (inputs, chat)]


class Folders:
    """What pytest's tmp_path_factory is to the fixtures."""

    def __init__(self, root: Path):
        self.root = root

    def mktemp(self, name):
        (self.root / name).mkdir()
        return self.root / name


def tree(pid: int) -> list[int]:
    """A process and all below it, the lowest first."""
    below = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below += [p for child in path.read_text().split() for p in tree(int(child))]
        except OSError:
            pass
    return [*below, pid]


def result(out: Path):
    weights = [torch.load(path) for path in (out / "projector.pth", out / "consolidated.00.pth") if path.is_file()]
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in metrics(out)]
    return {k: v for part in weights for k, v in part.items()}, lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    dice, kills, runs, lost, root = random.Random(a.seed), 0, 0, 0, Path(tempfile.mkdtemp())
    given = FIXTURES[0](Folders(root))
    talk = FIXTURES[1](given, Folders(root))
    kinds = []
    for name, stage in (("stage 1", flags(given, root)), ("stage 2", stage_2(given, talk, root, epochs=8, max_steps=None))):
        for processes, parallel in ((0, "ddp"), (2, "ddp"), (2, "fsdp")):
            more = ["--epochs", "8", "--sampling", "uniform", "--save-every", "1", "--workers", "1", "--parallel", parallel]
            kinds.append((name, processes, parallel, [*stage, *more]))
    whole = {}
    while kills < a.kills:
        name, processes, parallel, arguments = kind = kinds[dice.randrange(len(kinds))]
        key, where = kind[:3], arguments.index(str(root))
        if key not in whole:
            began, arguments[where] = time.time(), str(root / f"whole-{len(whole)}")
            process = start(arguments, processes)
            error = process.communicate()[1]
            assert process.returncode == 0, error
            whole[key] = (*result(Path(arguments[where])), time.time() - began)
            arguments[where] = str(root)
        weights, lines, seconds = whole[key]
        out, before, runs = root / f"killed-{runs}", kills, runs + 1
        arguments = [*arguments[:where], str(out), *arguments[where + 1 :]]
        while True:
            process = start(arguments, processes)
            try:
                error = process.communicate(timeout=seconds * dice.uniform(0.3, 1.1))[1]
                assert process.returncode == 0, error
                break
            except subprocess.TimeoutExpired:
                for pid in tree(process.pid):
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        pass
                process.communicate()
                kills += 1
        again, said = result(out)
        same = weights.keys() == again.keys() and all(torch.equal(weights[k], again[k]) for k in weights)
        lost += not same or said != lines
        print(f"{name}, {processes or 1} process(es), {parallel}: {kills - before} kills; weights "
              f"{'equal' if same else 'DIFFER'}, {len(said)} lines {'equal' if said == lines else 'DIFFER'}", flush=True)  # fmt: skip
    print(f"{kills} kills in {runs} runs, {lost} of which differ")
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
