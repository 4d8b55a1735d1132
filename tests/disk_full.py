"""Fills the disk under training runs at random moments, and counts what is lost.

    python tests/disk_full.py --trials 12        # as root, on Linux: it mounts a small tmpfs

Stage 1, stage 2 by ddp and by fsdp (two processes), a state saved at every step. A ballast fills the disk but for a few
bytes; the run must end within a minute with our one line (no traceback) and a status that is not 0, its last state
unharmed; so must the same command while the disk is still full. Then the ballast goes, the same command goes on, and
its weights and metrics lines must be those of a run that was let alone. Exit status 1 if anything differs.
"""

import argparse
import os
import random
import re
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from kill import FIXTURES, Folders, result, start, tree
from test_train import flags, metrics, stage_2

from conversation import UserError
from parallel import PARALLEL

PATIENCE = 60  # seconds that a run may take to end on a full disk
SIZE = 6 * 2**20


def fill(ballast: Path, leave: int):
    """All the room there is but `leave` bytes."""
    room = os.statvfs(ballast.parent)
    with open(ballast, "ab", buffering=0) as file:
        try:
            for _ in range(max(0, room.f_bavail * room.f_frsize - leave) // 4096):
                file.write(bytes(4096))
        except OSError:
            pass  # full


def step_saved(out: Path) -> int | str:
    try:
        return max(state["step"] for state in [{"step": 0}, *(way.saved(out) for way in PARALLEL.values())] if state)
    except UserError as error:
        return f"DAMAGED: {error}"


def ended(process, processes: int) -> list[str]:
    """What is wrong with how a run ended on a full disk."""
    try:
        error = process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        for pid in tree(process.pid):
            os.kill(pid, 9)
        return [f"HUNG for {PATIENCE} s: {process.communicate()[1][-300:]}"]
    if process.returncode == 0:
        return []
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    wrong = [] if lines and re.search("No space left|could not be written", "".join(lines)) else ["NO CLEAR LINE"]
    wrong += ["A TRACEBACK"] * ('train.py", line' in error)  # torchrun's own report has one of itself
    wrong += ["SEVERAL LINES"] * (len(lines) > max(1, processes))
    return wrong and [*wrong, f"\n{error[:3000]}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="TEXT", default="", help="the kinds of run that have it in their name")
    a = parser.parse_args()
    dice, root = random.Random(a.seed), Path(tempfile.mkdtemp())
    disk = root / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        return print(f"skipped: no small disk can be mounted here ({mounted.stderr.strip()})")
    try:
        lost, full = trials(a.trials, a.only, dice, root, disk)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    print(f"{full} runs met a full disk, {lost} of which lost something or were unclear")
    raise SystemExit(bool(lost))


def trials(n: int, only: str, dice, root: Path, disk: Path) -> tuple[int, int]:
    given = FIXTURES[0](Folders(root))
    talk = FIXTURES[1](given, Folders(root))
    more = ["--epochs", "8", "--save-every", "1", "--workers", "0", "--out"]
    chat = stage_2(given, talk, None, epochs=8, max_steps=None)
    stage_1 = flags(given, None)
    kinds = [("stage 1", 0, stage_1 + more), ("stage 2, ddp", 2, [*chat, "--sampling", "uniform", *more]),
             ("stage 2, fsdp", 2, [*chat, "--parallel", "fsdp", "--sampling", "uniform", *more]),
             ("stage 1, metrics", 0, stage_1 + ["--epochs", "20", "--save-every", "0", "--out"])]  # fmt: skip
    kinds = [kind for kind in kinds if only in kind[0]]
    whole, lost, full = {}, 0, 0
    for _ in range(3 * n):
        if full == n:
            break
        name, processes, arguments = kinds[full % len(kinds)]
        if name not in whole:
            out = root / f"whole-{len(whole)}"
            process = start([*arguments, str(out)], processes)
            error = process.communicate()[1]
            assert process.returncode == 0, error
            whole[name] = (*result(out), sum(line["seconds"] for line in metrics(out)))
        weights, lines, seconds = whole[name]
        out, ballast, wrong = disk / "run", disk / "ballast", []
        subprocess.run(["rm", "-rf", out, ballast], check=True)
        process = start([*arguments, str(out)], processes)
        log = out / "metrics.jsonl"
        while process.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 0.7 * seconds))
        before, room = step_saved(out), 0 if "metrics" in name else dice.choice([0, 4096, 40_000, 200_000])
        fill(ballast, room)
        wrong += ended(process, processes)
        first = process.returncode
        after = step_saved(out)
        if first and (isinstance(after, str) or isinstance(before, str) or after < before):
            wrong.append(f"THE STATE of step {before} is now {after}")
        fill(ballast, room)
        again = start([*arguments, str(out)], processes)  # still full
        wrong += ended(again, processes)
        ballast.unlink()
        if first == 0 and not wrong:
            continue  # it was already done
        full += 1
        process = start([*arguments, str(out)], processes)
        error = process.communicate()[1]
        if process.returncode:
            wrong.append(f"DID NOT GO ON: {error[:3000]}")
        else:
            then, said = result(out)
            if weights.keys() != then.keys() or not all(torch.equal(weights[k], then[k]) for k in weights):
                wrong.append("WEIGHTS DIFFER")
            if said != lines:
                wrong.append(f"METRICS DIFFER: {len(said)} lines, not {len(lines)}")
        lost += bool(wrong)
        print(f"{name}: full after step {before}, {room} bytes left, status {first}, then {again.returncode}; "
              f"{' '.join(wrong) or 'went on to the same weights and lines'}", flush=True)  # fmt: skip
    return lost, full


if __name__ == "__main__":
    main()
