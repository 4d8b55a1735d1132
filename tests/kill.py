"""Kills training runs at random moments, restarts each with the same command, and counts the runs that lost something.

    python tests/kill.py --kills 30

The runs cover both stages, one process and two, ddp and fsdp. Each saves its state at every step, so that many kills
happen during a save. A killed run is restarted until it ends by itself. Then its weights must equal, bit for bit, those
of a run that was not killed, and its metrics must equal line by line except for the seconds. The exit status is 1 if
anything differs. Linux only.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import test_train
from test_train import flags, metrics, stage_2, start

WEIGHTS = ("projector.pth", "consolidated.00.pth")  # of a run directory; stage 1 writes the first only


class Folders:
    """Stands in for pytest's tmp_path_factory."""

    def __init__(self, root: Path):
        self.root = root

    def mktemp(self, name):
        (self.root / name).mkdir()
        return self.root / name


def make_inputs(root: Path) -> Path:
    """Calls the fixture of test_train.py: tiny backbones and captioned pictures."""
    return test_train.inputs.__wrapped__(Folders(root))


def make_chat(inputs: Path, root: Path) -> Path:
    """Calls the fixture of test_train.py: a finished run of stage 1, and conversations."""
    return test_train.chat.__wrapped__(inputs, Folders(root))


def descendants(pid: int) -> list[int]:
    """A process and all processes below it, children before parents."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:  # the process has just ended
            continue
        for child in children:
            found += descendants(int(child))
    return [*found, pid]


def kill(process: subprocess.Popen):
    """Sends SIGKILL to a process and to all processes below it, and waits for its end."""
    for pid in descendants(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()


@dataclass
class Result:
    """What a run directory holds, in a form that two runs can be compared by."""

    weights: dict[str, torch.Tensor]
    lines: list[dict]  # of metrics.jsonl, without the seconds

    def differences(self, other: "Result") -> list[str]:
        found = []
        same_names = self.weights.keys() == other.weights.keys()
        if not same_names or not all(torch.equal(self.weights[name], other.weights[name]) for name in self.weights):
            found.append("WEIGHTS DIFFER")
        if self.lines != other.lines:
            found.append(f"METRICS DIFFER ({len(other.lines)} lines, expected {len(self.lines)})")
        return found


def result(out: Path) -> Result:
    weights = {}
    for path in [out / name for name in WEIGHTS if (out / name).is_file()]:
        weights |= torch.load(path, weights_only=True)
    return Result(weights, [{key: value for key, value in line.items() if key != "seconds"} for line in metrics(out)])


def run_to_end(arguments: list[str], processes: int):
    process = start(arguments, processes)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr


@dataclass
class Kind:
    """One kind of training run. The last three fields are of a run that was not disturbed."""

    name: str
    processes: int  # of torchrun; 0 = without torchrun
    arguments: list[str]  # for train.py, without --out
    expected: Result | None = None
    seconds: float = 0.0  # from the start of the command to its end
    step_seconds: float = 0.0  # of all steps

    def measure(self, out: Path):
        """Runs it undisturbed."""
        began = time.time()
        run_to_end([*self.arguments, "--out", str(out)], self.processes)
        self.seconds, self.step_seconds = time.time() - began, sum(line["seconds"] for line in metrics(out))
        self.expected = result(out)


def make_kinds(root: Path) -> list[Kind]:
    inputs = make_inputs(root)
    chat = make_chat(inputs, root)
    stages = {"stage 1": flags(inputs, None), "stage 2": stage_2(inputs, chat, None, max_steps=None)}
    common = ["--epochs", "8", "--sampling", "uniform", "--save-every", "1", "--workers", "1"]
    return [
        Kind(f"{stage}, {max(1, processes)} process(es), {parallel}", processes,
             [*arguments, *common, "--parallel", parallel])
        for stage, arguments in stages.items()
        for processes, parallel in ((0, "ddp"), (2, "ddp"), (2, "fsdp"))
    ]  # fmt: skip


def run_with_kills(kind: Kind, out: Path, rng: random.Random) -> int:
    """Restarts a run until it ends by itself -> how many times it was killed."""
    kills = 0
    while True:
        process = start([*kind.arguments, "--out", str(out)], kind.processes)
        try:
            _, stderr = process.communicate(timeout=kind.seconds * rng.uniform(0.3, 1.1))
            assert process.returncode == 0, stderr
            return kills
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    rng, kills, runs, lost = random.Random(a.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        kinds = make_kinds(root)
        while kills < a.kills:
            kind = rng.choice(kinds)
            if kind.expected is None:
                kind.measure(root / f"expected-{runs}")
            out = root / f"killed-{runs}"
            n = run_with_kills(kind, out, rng)
            differences = kind.expected.differences(result(out))
            kills, runs, lost = kills + n, runs + 1, lost + bool(differences)
            print(f"{kind.name}: {n} kills; {', '.join(differences) or 'same weights and metrics'}", flush=True)
    print(f"{kills} kills in {runs} runs, {lost} of which differ")
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
