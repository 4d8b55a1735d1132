"""Measures start-up, memory and speed on made-up inputs of full size, which are removed again. Linux only.

    python tests/full_size.py data                        # 60K and 600K samples and their zip: 2 GB of disk, 10 minutes
    python tests/full_size.py checkpoints                 # a 7B and a 13B: up to 30 GB of disk, as much of it in memory
    python tests/full_size.py captions                    # prepare_cc3m.py on 100K, 300K and 1M captions: 2 minutes
    python tests/full_size.py data --samples 1000 5000    # to try it

Resident memory (RSS) counts what processes share in each of them; PSS divides it among them. "imports" is what a
process has after `import data` alone: PyTorch, mostly.
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
EPOCHS = 3
WORDS = "a young woman with dog in the street at night , view of person wearing olive oil on healthy food".split()
REQUESTS = ("<image>\nGive a brief description of the image.", "Render a clear and concise summary.\n<image>")
SIZES = {
    "7B": dict(dim=4096, n_layers=32, n_heads=32, ffn_dim=11008),
    "13B": dict(dim=5120, n_layers=40, n_heads=40, ffn_dim=13824),
}
SPARE = 2 * 2**30  # bytes of memory and of disk that are left to others


# --- measuring


def memory(pid="self") -> dict[str, int]:
    """MiB: resident, its proportional share of that, and what of it is no page of a file."""
    found = re.findall(r"^(Rss|Pss|Anonymous):\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    return {key: int(value) // 1024 for key, value in found}


def children() -> list[str]:
    return [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


def available() -> int:
    """Bytes of memory that may be used without swapping."""
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


def measured(*arguments) -> dict:
    """Runs a function of this file in a process of its own -> what it returned, and its peaks in bytes."""
    command = [sys.executable, __file__, "run", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peaks = dict(RssAnon=0, RssFile=0, VmHWM=0)
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for key, value in re.findall(r"(RssAnon|RssFile|VmHWM):\s+(\d+)", text):
            peaks[key] = max(peaks[key], 1024 * int(value))
        if available() < SPARE / 2:
            process.kill()
            raise SystemExit(f"{arguments[0]}: stopped, for memory runs out")
        time.sleep(0.01)
    said = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return json.loads(said.splitlines()[-1]) | peaks


# --- data


def make_data(folder: Path, n: int):
    """folder/chat.json and folder/images.zip of n samples."""
    n, dice, pictures = int(n), random.Random(0), []
    from PIL import Image

    for i in range(50):
        Image.effect_noise((48, 40), 30 + i).convert("RGB").save(file := io.BytesIO(), "JPEG", quality=60)
        pictures.append(file.getvalue())
    with open(folder / "chat.json", "w") as file, zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(n):
            id, caption = f"GCC_train_{i:09}", " ".join(dice.choices(WORDS, k=dice.randint(8, 30)))
            turns = [{"from": "human", "value": dice.choice(REQUESTS)}, {"from": "gpt", "value": caption}]
            record = {"id": id, "image": f"{id}.jpg", "conversations": turns}
            file.write(("[" if i == 0 else ", ") + json.dumps(record))
            archive.writestr(f"{id}.jpg", pictures[i % len(pictures)])
        file.write("]")


class Light:
    """In the place of data.Encoder: reads a sample's picture, and neither decodes it nor tokenizes."""

    def __init__(self, pictures):
        self.pictures = pictures

    def __call__(self, example):
        assert len(self.pictures.read(example.image)) > 500
        return np.zeros(1, np.int64), np.zeros(1, bool), None, False

    def flatten(self, samples):
        return None


def read_data(folder: Path, workers: int, epochs: int):
    """Starts up, reads pictures at random, and then whole epochs through the DataLoader."""
    import data

    result, began = dict(imports=memory()), time.time()
    examples = data.Examples([folder / "chat.json"])
    result["index_s"], began = time.time() - began, time.time()
    pictures = data.Pictures(folder / "images.zip")
    result["zip_s"] = time.time() - began
    chosen = np.random.default_rng(0).integers(len(examples), size=20_000)
    names, began = [examples[int(i)].image for i in chosen], time.time()
    for name in names:
        pictures.read(name)
    result["pictures_per_s"], result["started"], result["after"] = len(names) / (time.time() - began), memory(), {}
    steps = data.Steps(examples, Light(pictures), batch_size=128, seed=0)
    total, began = int(epochs) * steps.per_epoch, time.time()
    loader = torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(total), num_workers=int(workers))
    for t, step in enumerate(loader, 1):
        assert not step.errors
        if t in (steps.per_epoch, total - 2 * int(workers)):  # while the workers still live
            result["after"][t] = [memory(pid) for pid in (os.getpid(), *children())]
    result["samples_per_s"] = int(epochs) * len(examples) / (time.time() - began)
    return result


def report_data(root: Path, samples: list[int]):
    print("samples  chat.json MB  zip MB   first start s  its peak MiB  later start s  of it zip s  MiB above imports  "
          "pictures/s")  # fmt: skip
    for n in samples:
        folder = root / str(n)
        folder.mkdir()
        measured("make_data", folder, n)
        first, later = (measured("read_data", folder, 0, 0) for _ in range(2))
        chat, archive = ((folder / name).stat().st_size // 10**6 for name in ("chat.json", "images.zip"))
        print(f"{n:7,} {chat:13} {archive:7} {first['index_s'] + first['zip_s']:15.2f} {first['VmHWM'] / 2**20:13,.0f} "
              f"{later['index_s'] + later['zip_s']:14.2f} {later['zip_s']:12.2f} "
              f"{later['started']['Rss'] - later['imports']['Rss']:18} {later['pictures_per_s']:11,.0f}",
              flush=True)  # fmt: skip
    print("\nsamples  workers  epochs  RSS MiB: imports  main  largest worker  PSS: largest  all together  samples/s")
    for n in samples:
        for workers in (0, 2, 4):
            result = measured("read_data", root / str(n), workers, EPOCHS)
            for epochs, (main, *others) in zip((1, EPOCHS), result["after"].values()):
                worker, share = max([m["Rss"] for m in others], default=0), max(m["Pss"] for m in (main, *others))
                print(f"{n:7,} {workers:8} {epochs:7} {result['imports']['Rss']:17} {main['Rss']:5} {worker:15} "
                      f"{share:13} {sum(m['Pss'] for m in (main, *others)):13} {result['samples_per_s']:10,.0f}",
                      flush=True)  # fmt: skip


# --- captions


def make_captions(folder: Path, n: int):
    """folder/cc3m.tsv: of n captions, two to four things each, whose frequencies fall as 1 / rank (Zipf's law)."""
    n, dice = int(n), np.random.default_rng(0)
    syllables = [a + b for a in "b c d f g h k l m n p r s t v".split() for b in "a e i o u an el or".split()]
    made_up = ["".join(dice.choice(syllables, 3)) for _ in range(5000)]
    things = "person dog woman background city man tree car beach team actor water flower house street boat".split()
    kinds = "young white black red beautiful old small green blue happy wooden traditional".split()
    joints = np.array(", in on with at near during and of wearing against".split())

    def draw(words, size):
        cumulative = np.cumsum(1 / np.arange(3, len(words) + 3))
        return np.array(words)[np.searchsorted(cumulative, dice.random(size) * cumulative[-1])]

    with open(folder / "cc3m.tsv", "w") as file:
        for start in range(0, n, 10_000):
            nouns, adjectives = draw(things + made_up, (10_000, 4)), draw(kinds + made_up[:300], (10_000, 4))
            between, counts = dice.choice(joints, (10_000, 4)), dice.integers(2, 5, 10_000)
            articles = dice.choice(["", "a ", "the "], (10_000, 4))
            plain = dice.random((10_000, 4)) < 0.6
            for i in range(min(10_000, n - start)):
                parts = [f"{articles[i, k]}{'' if plain[i, k] else adjectives[i, k] + ' '}{nouns[i, k]}"
                         f" {between[i, k]} " for k in range(counts[i])]  # fmt: skip
                file.write("".join(parts).rsplit(" ", 2)[0] + f"\thttp://example.org/{start + i}.jpg\n")


def prepare_captions(folder: Path, phrases: str):
    import prepare_cc3m

    result, began = dict(imports=memory()), time.time()
    flags = ["--data", folder / "cc3m.tsv", "--out", folder / phrases, "--phrases", phrases]
    with contextlib.redirect_stdout(sys.stderr):
        prepare_cc3m.prepare(prepare_cc3m.parse_arguments(list(map(str, flags))))
    report = json.loads((folder / phrases / "report.json").read_text())
    return result | dict(seconds=time.time() - began, captions=report["captions"], phrases=report["phrases"])


def report_captions(root: Path, samples: list[int], phrases: str):
    print("captions   taken   phrases before   after   seconds   captions/s   peak MiB   of it imports")
    for n in samples:
        folder = root / str(n)
        folder.mkdir()
        measured("make_captions", folder, n)
        r = measured("prepare_captions", folder, phrases)
        print(f"{n:9,}{r['captions']['after']:10,}{r['phrases']['before']:16,}{r['phrases']['after']:10,}"
              f"{r['seconds']:10.1f}{n / r['seconds']:12,.0f}{r['VmHWM'] / 2**20:11,.0f}{r['imports']['Rss']:15,}",
              flush=True)  # fmt: skip


# --- checkpoints


def nbytes(dim, n_layers, n_heads, ffn_dim, vocab=32_000) -> int:
    """Of the model in fp16."""
    return 2 * (n_layers * (4 * dim * dim + 3 * dim * ffn_dim + 2 * dim) + 2 * vocab * dim + dim)


def make_checkpoint(folder: Path, dim, n_layers, n_heads, ffn_dim, shards):
    """A raw LLaMA folder in fp16, random. What is written is first a hole in the file, then filled in place."""
    import checkpoint
    from model import LLaMA, LLaMAConfig

    dim, n_layers, n_heads, ffn_dim, shards = map(int, (dim, n_layers, n_heads, ffn_dim, shards))
    params = dict(dim=dim, n_layers=n_layers, n_heads=n_heads, multiple_of=256, norm_eps=1e-6, vocab_size=-1)
    checkpoint.write_json(folder / "params.json", params)
    with torch.device("meta"):
        llama = LLaMA(LLaMAConfig(dim, n_layers, n_heads, n_heads, ffn_dim, 32_000))
    torch.serialization.set_default_mmap_options(1)  # MAP_SHARED: what is written into a tensor is in the file
    for i in range(shards):
        weights, path = {}, folder / f"consolidated.{i:02}.pth"
        for name, p in llama.named_parameters():
            along, shape = checkpoint.parts_dim(name), list(p.shape)
            if along is not None:
                shape[along] //= shards
            weights[name] = torch.empty(shape, dtype=torch.float16)  # no memory, while nothing is written into it
        with torch.serialization.skip_data():
            torch.save(weights, path)
        del weights
        for name, tensor in torch.load(path, mmap=True).items():
            if checkpoint.parts_dim(name) is None:
                tensor.fill_(1)
            else:
                tensor.view(torch.int16).random_(0, 0x3C00)  # fp16 between 0 and 1
            checkpoint.forget_pages(tensor)
        os.sync()


def load_checkpoint(folder: Path, dtype: str):
    import checkpoint

    result, began = dict(imports=memory()), time.time()
    llama = checkpoint.load_llama(folder, getattr(torch, dtype))
    result["seconds"], result["loaded"] = time.time() - began, memory()
    for p in llama.parameters():
        p.view(torch.int16).amax()  # every page is touched
    return result | dict(touched=memory(), nbytes=sum(p.nbytes for p in llama.parameters()))


def report_checkpoints(root: Path, layers: int | None):
    print("model  layers  files  to dtype     GB   load s   peak above imports, GB: anonymous    all   all / size")
    for name, shards in (("7B", 1), ("13B", 2)):
        size, room = SIZES[name], min(available(), shutil.disk_usage(root).free) - SPARE
        none, one = (nbytes(**size | dict(n_layers=n)) for n in (0, 1))
        n_layers = min(layers or size["n_layers"], int((room / 1.05 - none) / (one - none)))
        folder = root / name
        folder.mkdir()
        measured("make_checkpoint", folder, *(size | dict(n_layers=n_layers)).values(), shards)
        for dtype in ("float16", "bfloat16"):
            r = measured("load_checkpoint", folder, dtype)
            anonymous = r["RssAnon"] - 2**20 * r["imports"]["Anonymous"]
            whole = r["VmHWM"] - 2**20 * r["imports"]["Rss"]
            print(f"{name:5} {n_layers:7} {shards:6}  {dtype:8} {r['nbytes'] / 1e9:6.2f} {r['seconds']:8.1f} "
                  f"{anonymous / 1e9:35.2f} {whole / 1e9:6.2f} {whole / r['nbytes']:12.3f}", flush=True)  # fmt: skip
        shutil.rmtree(folder)


def main():
    if sys.argv[1:2] == ["run"]:
        name, folder, *arguments = sys.argv[2:]
        print(json.dumps(globals()[name](Path(folder), *arguments) or {}))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("data", "captions", "checkpoints"))
    parser.add_argument("--samples", type=int, nargs="+", help="(default: 60K 600K; of captions 100K 300K 1M)")
    parser.add_argument("--phrases", default="simple", help="of captions: as prepare_cc3m.py takes it")
    parser.add_argument("--layers", type=int, help="of the checkpoints (default: as many as there is memory for)")
    parser.add_argument("--folder", help="a disk with room (default: where temporary files go)")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as root:
        if a.what == "data":
            report_data(Path(root), a.samples or [60_000, 600_000])
        elif a.what == "captions":
            report_captions(Path(root), a.samples or [100_000, 300_000, 1_000_000], a.phrases)
        else:
            report_checkpoints(Path(root), a.layers)


if __name__ == "__main__":
    main()
