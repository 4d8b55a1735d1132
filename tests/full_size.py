"""Measures start-up, memory and speed on made-up inputs of full size, and removes them. Linux only.

    python tests/full_size.py data                        # 60K and 600K samples with a zip: 2 GB of disk, 10 minutes
    python tests/full_size.py captions                    # prepare_cc3m on 100K, 300K and 1M captions: 2 minutes
    python tests/full_size.py checkpoints                 # a 7B and a 13B: up to 30 GB of disk and of memory
    python tests/full_size.py data --samples 1000 5000    # a quick trial

Resident memory (RSS) counts shared pages in full in each process; PSS divides them among the processes. "imports" is
the memory of a process that has imported the module and done nothing else; PyTorch takes most of it.
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
BATCH_SIZE = 128  # the paper's of stage 1
READS = 20_000  # random pictures that are read for the speed of a single process
WORDS = "a young woman with dog in the street at night , view of person wearing olive oil on healthy food".split()
REQUESTS = ("<image>\nGive a brief description of the image.", "Render a clear and concise summary.\n<image>")
SIZES = {
    "7B": dict(dim=4096, n_layers=32, n_heads=32, ffn_dim=11008),
    "13B": dict(dim=5120, n_layers=40, n_heads=40, ffn_dim=13824),
}
VOCAB_SIZE = 32_000
SHARDED_ALONG_1 = ("wo", "w2", "tok_embeddings")  # other matrices are sharded along dim 0, and norms not at all
MAP_SHARED = 1  # of mmap: writes reach the file
RESERVE = 2 * 2**30  # bytes of memory and of disk that are left to other processes


# --- measuring


def memory(pid: str = "self") -> dict[str, int]:
    """MiB of a process: resident, its proportional share of that, and the part that is not mapped from a file."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.findall(r"^(Rss|Pss|Anonymous):\s+(\d+)", text, re.MULTILINE)
    return {key: int(value) // 1024 for key, value in found}


def children() -> list[str]:
    return [pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()]


def available() -> int:
    """Bytes of memory that can be used without swapping."""
    return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])


def measured(function, *arguments) -> dict:
    """Runs a function of this file in a process of its own -> the dict that it returned, and its peaks in bytes."""
    command = [sys.executable, __file__, "run", function.__name__, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peaks = dict(RssAnon=0, RssFile=0, VmHWM=0)
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # the process has just ended
            break
        for key, value in re.findall(r"(RssAnon|RssFile|VmHWM):\s+(\d+)", text):
            peaks[key] = max(peaks[key], 1024 * int(value))
        if available() < RESERVE / 2:
            process.kill()
            raise SystemExit(f"{function.__name__}: stopped, because the memory of the machine is nearly full")
        time.sleep(0.01)
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return json.loads(output.splitlines()[-1]) | peaks


# --- data


def make_data(folder: Path, n: str):
    """Writes folder/chat.json and folder/images.zip with n samples."""
    from PIL import Image

    rng, pictures = random.Random(0), []
    for i in range(50):
        file = io.BytesIO()
        Image.effect_noise((48, 40), 30 + i).convert("RGB").save(file, "JPEG", quality=60)
        pictures.append(file.getvalue())
    with open(folder / "chat.json", "w") as file, zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for i in range(int(n)):
            id, caption = f"GCC_train_{i:09}", " ".join(rng.choices(WORDS, k=rng.randint(8, 30)))
            turns = [{"from": "human", "value": rng.choice(REQUESTS)}, {"from": "gpt", "value": caption}]
            record = {"id": id, "image": f"{id}.jpg", "conversations": turns}
            file.write(("[" if i == 0 else ", ") + json.dumps(record))
            archive.writestr(f"{id}.jpg", pictures[i % len(pictures)])
        file.write("]")


class PictureReader:
    """Replaces data.Encoder: reads the file of a sample's picture, without decoding or tokenizing anything."""

    def __init__(self, pictures):
        self.pictures = pictures

    def encode(self, example):
        import data

        assert len(self.pictures.read(example.image)) > 500
        return data.Sample(np.zeros(1, np.int64), np.zeros(1, bool))

    def stream(self, samples):
        return None


def read_data(folder: Path, workers: str, epochs: str) -> dict:
    """Starts up, reads pictures in random order, then reads some epochs ahead in threads."""
    import data
    from formats.pictures import Pictures

    result, began = dict(imports=memory(), memory={}), time.time()
    examples = data.Examples([folder / "chat.json"])
    result["records_s"], began = time.time() - began, time.time()
    pictures = Pictures(folder / "images.zip")
    result["zip_s"] = time.time() - began

    chosen = np.random.default_rng(0).integers(len(examples), size=READS)
    names, began = [examples[int(i)].image for i in chosen], time.time()
    for name in names:
        pictures.read(name)
    result["pictures_per_s"], result["started"] = len(names) / (time.time() - began), memory()

    steps = data.Shares(examples, PictureReader(pictures), batch_size=BATCH_SIZE, seed=0)
    total, began = int(epochs) * steps.per_epoch, time.time()
    loader = data.prefetched(steps, range(total), int(workers))
    measure_after = (steps.per_epoch, total - 2 * int(workers))  # after the first epoch, and before the workers end
    for t, step in enumerate(loader, 1):
        assert not step.errors
        if t in measure_after:
            result["memory"][t] = [memory(pid) for pid in (str(os.getpid()), *children())]
    result["samples_per_s"] = int(epochs) * len(examples) / (time.time() - began)
    return result


def report_data(root: Path, samples: list[int]):
    print("samples  chat.json MB  zip MB   start s  of it zip s  its peak MiB  MiB above imports  pictures/s")
    for n in samples:
        folder = root / str(n)
        folder.mkdir()
        measured(make_data, folder, n)
        r = measured(read_data, folder, 0, 0)
        chat, archive = ((folder / name).stat().st_size // 10**6 for name in ("chat.json", "images.zip"))
        print(f"{n:7,} {chat:13} {archive:7} {r['records_s'] + r['zip_s']:9.2f} {r['zip_s']:12.2f} "
              f"{r['VmHWM'] / 2**20:13,.0f} {r['started']['Rss'] - r['imports']['Rss']:18} "
              f"{r['pictures_per_s']:11,.0f}", flush=True)  # fmt: skip
    print("\nsamples  workers  epochs  RSS MiB: imports  main  largest worker  PSS: largest  all together  samples/s")
    for n in samples:
        for workers in (0, 2, 4):
            result = measured(read_data, root / str(n), workers, EPOCHS)
            for epochs, (main, *others) in zip((1, EPOCHS), result["memory"].values()):
                worker, shares = max([m["Rss"] for m in others], default=0), [m["Pss"] for m in (main, *others)]
                print(f"{n:7,} {workers:8} {epochs:7} {result['imports']['Rss']:17} {main['Rss']:5} {worker:15} "
                      f"{max(shares):13} {sum(shares):13} {result['samples_per_s']:10,.0f}", flush=True)  # fmt: skip


# --- captions


def make_captions(folder: Path, n: str):
    """Writes folder/cc3m.tsv: n captions of two to four things, whose frequencies fall as 1 / rank (Zipf's law)."""
    n, rng = int(n), np.random.default_rng(0)
    syllables = [a + b for a in "b c d f g h k l m n p r s t v".split() for b in "a e i o u an el or".split()]
    made_up = ["".join(rng.choice(syllables, 3)) for _ in range(5000)]
    things = "person dog woman background city man tree car beach team actor water flower house street boat".split()
    kinds = "young white black red beautiful old small green blue happy wooden traditional".split()
    joints = np.array(", in on with at near during and of wearing against".split())

    def draw(words, size):
        cumulative = np.cumsum(1 / np.arange(3, len(words) + 3))
        return np.array(words)[np.searchsorted(cumulative, rng.random(size) * cumulative[-1])]

    with open(folder / "cc3m.tsv", "w") as file:
        for start in range(0, n, 10_000):
            nouns, adjectives = draw(things + made_up, (10_000, 4)), draw(kinds + made_up[:300], (10_000, 4))
            between, counts = rng.choice(joints, (10_000, 4)), rng.integers(2, 5, 10_000)
            articles = rng.choice(["", "a ", "the "], (10_000, 4))
            has_adjective = rng.random((10_000, 4)) >= 0.6
            for i in range(min(10_000, n - start)):
                parts = [f"{articles[i, k]}{adjectives[i, k] + ' ' if has_adjective[i, k] else ''}{nouns[i, k]}"
                         f" {between[i, k]} " for k in range(counts[i])]  # fmt: skip
                file.write("".join(parts).rsplit(" ", 2)[0] + f"\thttp://example.org/{start + i}.jpg\n")


def prepare_captions(folder: Path, phrases: str) -> dict:
    from tools import prepare_cc3m

    result, began = dict(imports=memory()), time.time()
    flags = ["--data", folder / "cc3m.tsv", "--out", folder / phrases, "--phrases", phrases]
    with contextlib.redirect_stdout(sys.stderr):
        prepare_cc3m.prepare(prepare_cc3m.parse_arguments(list(map(str, flags))))
    report = json.loads((folder / phrases / "report.json").read_text())
    return result | dict(seconds=time.time() - began, captions=report["captions"], phrases=report["phrases"])


def report_captions(root: Path, samples: list[int], phrases: str):
    print("captions  selected  phrases before     after   seconds  captions/s   peak MiB  of it imports")
    for n in samples:
        folder = root / str(n)
        folder.mkdir()
        measured(make_captions, folder, n)
        r = measured(prepare_captions, folder, phrases)
        print(f"{n:8,}{r['captions']['after']:10,}{r['phrases']['before']:16,}{r['phrases']['after']:10,}"
              f"{r['seconds']:10.1f}{n / r['seconds']:12,.0f}{r['VmHWM'] / 2**20:11,.0f}{r['imports']['Rss']:15,}",
              flush=True)  # fmt: skip


# --- checkpoints


def checkpoint_bytes(dim: int, n_layers: int, n_heads: int, ffn_dim: int) -> int:
    """The size of a LLaMA in fp16."""
    return 2 * (n_layers * (4 * dim * dim + 3 * dim * ffn_dim + 2 * dim) + 2 * VOCAB_SIZE * dim + dim)


def make_checkpoint(folder: Path, *sizes: str):
    """Writes a raw LLaMA folder with random fp16 weights. sizes: dim, n_layers, n_heads, ffn_dim, number of files.

    The memory never holds the weights: torch.save leaves holes in the files, which are filled in place.
    """
    from common import write_json
    from model import LLaMA, LLaMAConfig

    dim, n_layers, n_heads, ffn_dim, shards = map(int, sizes)
    params = dict(dim=dim, n_layers=n_layers, n_heads=n_heads, multiple_of=256, norm_eps=1e-6, vocab_size=-1)
    write_json(folder / "params.json", params)
    with torch.device("meta"):
        llama = LLaMA(LLaMAConfig(dim, n_layers, n_heads, n_heads, ffn_dim, VOCAB_SIZE))
    torch.serialization.set_default_mmap_options(MAP_SHARED)
    for i in range(shards):
        weights, path = {}, folder / f"consolidated.{i:02}.pth"
        for name, p in llama.named_parameters():
            shape = list(p.shape)
            if p.dim() == 2:
                shape[1 if any(part in name for part in SHARDED_ALONG_1) else 0] //= shards
            weights[name] = torch.empty(shape, dtype=torch.float16)  # takes no memory until it is written to
        with torch.serialization.skip_data():
            torch.save(weights, path)
        del weights
        for tensor in torch.load(path, mmap=True, weights_only=True).values():
            if tensor.dim() == 1:
                tensor.fill_(1)
            else:
                tensor.view(torch.int16).random_(0, 0x3C00)  # the bits of fp16 numbers from 0 to 1
        os.sync()


def load_checkpoint(folder: Path, dtype: str) -> dict:
    import checkpoint

    result, began = dict(imports=memory()), time.time()
    llama = checkpoint.load_llama(folder, getattr(torch, dtype))
    result["seconds"] = time.time() - began
    for p in llama.parameters():
        p.view(torch.int16).amax()  # reads every page
    return result | dict(nbytes=sum(p.nbytes for p in llama.parameters()))


def report_checkpoints(root: Path, layers: int | None):
    print("model  layers  files  to dtype     GB   load s   peak above imports, GB: anonymous    all   all / size")
    for name, shards in (("7B", 1), ("13B", 2)):
        size, room = SIZES[name], min(available(), shutil.disk_usage(root).free) - RESERVE
        without_layers, one_layer = (checkpoint_bytes(**size | dict(n_layers=n)) for n in (0, 1))
        fitting = int((room / 1.05 - without_layers) / (one_layer - without_layers))
        n_layers = min(layers or size["n_layers"], fitting)
        folder = root / name
        folder.mkdir()
        measured(make_checkpoint, folder, *(size | dict(n_layers=n_layers)).values(), shards)
        for dtype in ("float16", "bfloat16"):
            r = measured(load_checkpoint, folder, dtype)
            anonymous = r["RssAnon"] - 2**20 * r["imports"]["Anonymous"]
            resident = r["VmHWM"] - 2**20 * r["imports"]["Rss"]
            print(f"{name:5} {n_layers:7} {shards:6}  {dtype:8} {r['nbytes'] / 1e9:6.2f} {r['seconds']:8.1f} "
                  f"{anonymous / 1e9:35.2f} {resident / 1e9:6.2f} {resident / r['nbytes']:12.3f}", flush=True)  # fmt: skip
        shutil.rmtree(folder)


def main():
    if sys.argv[1:2] == ["run"]:  # the process of `measured`
        name, folder, *arguments = sys.argv[2:]
        print(json.dumps(globals()[name](Path(folder), *arguments) or {}))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("data", "captions", "checkpoints"))
    parser.add_argument("--samples", type=int, nargs="+", help="(default: 60K 600K; of captions 100K 300K 1M)")
    parser.add_argument("--phrases", default="simple", help="of captions: --phrases of tools.prepare_cc3m")
    parser.add_argument("--layers", type=int, help="of the checkpoints (default: as many as the memory can hold)")
    parser.add_argument("--folder", help="on a disk with enough space (default: the folder of temporary files)")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        root = Path(folder)
        if a.what == "data":
            report_data(root, a.samples or [60_000, 600_000])
        elif a.what == "captions":
            report_captions(root, a.samples or [100_000, 300_000, 1_000_000], a.phrases)
        else:
            report_checkpoints(root, a.layers)


if __name__ == "__main__":
    main()
