"""Fills the disk under training runs at random moments, and counts the runs that lost something.

    python tests/disk_full.py --trials 12        # Linux, as root: it mounts a small tmpfs

The runs are of stage 1, and of stage 2 with ddp and with fsdp in two processes; each saves its state at every step. A
file fills the disk except for a few bytes. The run must then end within a minute, with a status other than 0 and one
line instead of a traceback, and its last state must be intact. The same command must do so too while the disk is still
full. When the file is removed, the same command must continue the run to the weights and metrics of a run that was not
disturbed. The exit status is 1 if anything differs.
"""

import argparse
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from kill import Kind, kill, make_chat, make_inputs, result
from test_train import flags, stage_2, start

import checkpoint
from common import UserError

PATIENCE = 60  # seconds in which a run must end when the disk is full
SIZE = 6 * 2**20  # bytes of the disk
FREE = (0, 4096, 40_000, 200_000)  # bytes that may remain free: a state is larger, a line of metrics smaller


def make_kinds(root: Path) -> list[Kind]:
    inputs = make_inputs(root)
    chat = make_chat(inputs, root)
    states = ["--save-every", "1", "--workers", "0"]
    stage_1, two = flags(inputs, None, epochs=8), stage_2(inputs, chat, None, epochs=8, max_steps=None)
    return [
        Kind("stage 1", 0, [*stage_1, *states]),
        Kind("stage 2, ddp", 2, [*two, "--sampling", "uniform", *states]),
        Kind("stage 2, fsdp", 2, [*two, "--parallel", "fsdp", "--sampling", "uniform", *states]),
        # Writes no state before its end, so that the metrics meet the full disk.
        Kind("stage 1, metrics", 0, flags(inputs, None, epochs=20, save_every=0)),
    ]


def fill(ballast: Path, free: int):
    """Grows the file `ballast` until only `free` bytes of its disk remain."""
    disk = os.statvfs(ballast.parent)
    with open(ballast, "ab", buffering=0) as file:
        try:
            for _ in range(max(0, disk.f_bavail * disk.f_frsize - free) // 4096):
                file.write(bytes(4096))
        except OSError:
            pass  # the disk is full


def saved_step(out: Path) -> int | str:
    """The step of the saved state, 0 if there is none, or the fault of a damaged one."""
    try:
        state = checkpoint.load_state(out)
    except UserError as error:
        return f"DAMAGED: {error}"
    return state["step"] if state else 0


def faults_of_end(process: subprocess.Popen, processes: int) -> list[str]:
    """Waits for the end of a run on a full disk and lists what is wrong with it. A run that had finished is right."""
    try:
        _, stderr = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        kill(process)
        return [f"STUCK for {PATIENCE} s"]
    if process.returncode == 0:
        return []
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    faults = []
    if not re.search("No space left|could not be written|there is room for", "".join(lines)):
        faults.append("NO CLEAR LINE")
    if 'train.py", line' in stderr:  # torchrun's report contains a traceback of torchrun itself
        faults.append("A TRACEBACK")
    if len(lines) > max(1, processes):
        faults.append("SEVERAL LINES")
    if faults:
        faults.append(f"\n{stderr[:3000]}")
    return faults


def wait_for_first_step(process: subprocess.Popen, out: Path):
    log = out / "metrics.jsonl"
    while process.poll() is None and not (log.is_file() and log.stat().st_size):
        time.sleep(0.01)


def trial(kind: Kind, disk: Path, rng: random.Random) -> tuple[bool, str, list[str]]:
    """Runs one kind once -> whether it met the full disk, what happened, and the faults."""
    out, ballast = disk / "run", disk / "ballast"
    shutil.rmtree(out, ignore_errors=True)
    arguments = [*kind.arguments, "--out", str(out)]
    process = start(arguments, kind.processes)
    wait_for_first_step(process, out)
    time.sleep(rng.uniform(0, 0.7 * kind.step_seconds))
    before = saved_step(out)
    free = 0 if "metrics" in kind.name else rng.choice(FREE)
    fill(ballast, free)
    faults = faults_of_end(process, kind.processes)
    after = saved_step(out)
    if process.returncode and (isinstance(before, str) or isinstance(after, str) or after < before):
        faults.append(f"THE STATE of step {before} is now {after}")
    fill(ballast, free)
    again = start(arguments, kind.processes)
    faults += faults_of_end(again, kind.processes)
    ballast.unlink()
    if process.returncode == 0 and not faults:
        return False, "", []  # it had finished before the disk was full
    last = start(arguments, kind.processes)
    _, stderr = last.communicate()
    if last.returncode:
        faults.append(f"DID NOT CONTINUE: {stderr[:3000]}")
    else:
        faults += kind.expected.differences(result(out))
    return True, f"full after step {before}, {free} bytes free, status {process.returncode}, then {again.returncode}", faults


def run_trials(n: int, only: str, rng: random.Random, root: Path, disk: Path) -> tuple[int, int]:
    """-> how many runs lost something, how many met a full disk."""
    kinds = [kind for kind in make_kinds(root) if only in kind.name]
    lost, full = 0, 0
    for _ in range(3 * n):  # some runs finish before the disk is full
        if full == n:
            break
        kind = kinds[full % len(kinds)]
        if kind.expected is None:
            kind.measure(root / f"expected-{kinds.index(kind)}")
        met, what, faults = trial(kind, disk, rng)
        if met:
            full, lost = full + 1, lost + bool(faults)
            print(f"{kind.name}: {what}; {' '.join(faults) or 'continued to the same weights and metrics'}", flush=True)
    return lost, full


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TEXT", default="", help="the kinds of runs whose name contains it")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, disk = Path(folder), Path(folder) / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk]
        mounted = subprocess.run(mount, capture_output=True, text=True)
        if mounted.returncode:
            print(f"skipped: a small disk cannot be mounted here ({mounted.stderr.strip()})")
            return
        try:
            lost, full = run_trials(a.trials, a.only, random.Random(a.seed), root, disk)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
    print(f"{full} runs met a full disk, {lost} of which lost something or ended unclearly")
    raise SystemExit(bool(lost))


if __name__ == "__main__":
    main()
