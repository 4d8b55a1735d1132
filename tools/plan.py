"""Estimates the memory that each GPU needs for training, from the shapes of the model alone. No weights are needed.

    python -m tools.plan --llama vicuna-13b-v0 --gpus 8 --gpu-memory 80

The estimate counts the weights, the gradients, AdamW's two moments, the copies that exist while a block computes, and
the activations that the backward pass needs. It does not count the activations of the ViT, which are freed before the
LLaMA runs. On one H200 (`python -m bench.gpu`) the total was within 1 % of what PyTorch allocated, for steps of several
micro-batches. A step of one micro-batch needs less, because its gradients replace its activations one by one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python tools/plan.py`

import checkpoint
from common import ArgumentParser, number, run_command
from demo.world import LLAMA, VISION
from model import LLaMAConfig
from vision import FEATURE_LAYER, VisionConfig

GIB = 2**30
RESERVE = 4 * GIB  # the CUDA context, NCCL's buffers, and what the allocator holds between its tensors
SMALLEST_MICRO_BATCH = 512  # positions: about one sample with a picture of 256 patches
GREEN_SHARE = {1: 1 / 8, 2: 1 / 2}  # share of the positions that have logits, by stage; an upper estimate
ADAMW_STATE = 12  # bytes per trained parameter: the weight and two moments in fp32


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters."""

    block: int  # one block of the LLaMA
    embeddings: int  # the word embeddings; the output matrix has the same size
    llama: int  # the complete LLaMA
    projector: int  # W
    vision: int  # the ViT up to the feature layer


def count_parameters(llama: LLaMAConfig, vision: VisionConfig) -> Counts:
    kv_dim = llama.n_kv_heads * llama.head_dim
    block = llama.dim * (2 * llama.dim + 2 * kv_dim + 3 * llama.ffn_dim + 2)
    embeddings = llama.vocab_size * llama.dim
    width = vision.width
    vit_blocks = vision.layers + 1 + FEATURE_LAYER
    vit = width * (3 * vision.patch_size**2 + vision.n_patches + 4 + vit_blocks * (12 * width + 13))
    return Counts(
        block=block,
        embeddings=embeddings,
        llama=llama.n_layers * block + 2 * embeddings + llama.dim,
        projector=llama.dim * width,
        vision=vit,
    )


# --- bytes


def saved_by_block(llama: LLaMAConfig, stage: int, bf16: bool) -> int:
    """Bytes per position that autograd saves in one block of the LLaMA."""
    dim = llama.dim
    kv_dim = llama.n_kv_heads * llama.head_dim
    width = 2 if bf16 else 4  # bytes of an element in the matrix products
    attention = width * (2 * dim + 2 * kv_dim)  # q, k, v and the attention's output
    if stage == 1:  # a frozen matrix needs no input to compute the gradient of its input
        return 2 * 4 * dim + attention + width * 3 * llama.ffn_dim
    norms = 2 * 2 * 4 * dim  # two norms; each saves its input and the normalized input in fp32
    inputs = width * dim * (6 if bf16 else 3)  # autocast makes one copy each for wq, wk and wv, and for w1 and w3
    return norms + inputs + attention + width * 4 * llama.ffn_dim


def activations(llama: LLaMAConfig, stage: int, bf16: bool, checkpoint_activations: bool) -> float:
    """Bytes per position that the backward pass needs."""
    if checkpoint_activations:  # the input of each block, and everything in the one block that is being recomputed
        stream = 2 if bf16 and stage == 1 else 4
        blocks = llama.n_layers * stream * llama.dim + saved_by_block(llama, stage, bf16)
    else:
        blocks = llama.n_layers * saved_by_block(llama, stage, bf16)
    logits = llama.vocab_size * (16 if bf16 else 12)  # with their log-softmax and their gradients, in fp32
    return blocks + GREEN_SHARE[stage] * logits


def gathered(n: Counts, stage: int, parallel: str, bf16: bool) -> int:
    """Bytes of the unsharded or cast copies that exist while a block computes."""
    compute = 2 if bf16 else 4
    if parallel == "ddp":  # autocast's bf16 copies of the trained matrices
        return 2 * (n.llama - n.embeddings) if bf16 and stage == 2 else 0
    weights = compute * (2 * n.block + n.embeddings)  # FSDP prefetches one block; the output matrix
    if stage == 1:
        return weights + compute * n.embeddings
    gradients = (compute + 4) * (n.block + n.embeddings) + 4 * n.embeddings
    return weights + 4 * n.embeddings + gradients


def gpu_bytes(llama: LLaMAConfig, vision: VisionConfig, stage: int, parallel: str, gpus: int, precision: str,
              tokens: int, checkpoint_activations: bool) -> dict[str, float]:  # fmt: skip
    """Bytes on each GPU, by purpose. tokens: positions of a micro-batch."""
    n = count_parameters(llama, vision)
    bf16 = precision == "bf16"
    compute = 2 if bf16 else 4
    trained = n.projector + (n.llama if stage == 2 else 0)
    frozen_llama = n.llama if stage == 1 else 0
    shards = gpus if parallel == "fsdp" else 1
    return {
        "weights": (4 * trained + compute * frozen_llama) / shards + compute * n.vision,
        "gradients": 4 * trained / shards,
        "AdamW": 8 * trained / shards,
        "gathered": gathered(n, stage, parallel, bf16),
        "activations": tokens * activations(llama, stage, bf16, checkpoint_activations),
    }


# --- the table


def row(name: str, found: dict[str, float], gpu_memory: int, tokens: int) -> str:
    """One line of the table. The last column is the largest micro-batch that fits, rounded down to a power of two."""
    total = sum(found.values())
    free = gpu_memory * GIB - RESERVE - (total - found["activations"])
    positions = free / (found["activations"] / tokens)
    fits = "yes" if positions >= tokens else "no"
    largest = f"{2 ** (int(positions).bit_length() - 1):,}" if positions >= SMALLEST_MICRO_BATCH else "none"
    columns = zip((*found.values(), total), (7, 10, 8, 9, 12, 8))
    cells = "".join(f"{size / GIB:{width}.1f}" for size, width in columns)
    return f"{name:39}{cells}{fits:>7}{largest:>21}"


def table(llama: LLaMAConfig, vision: VisionConfig, stages: list[int], gpus: int, gpu_memory: int, precision: str,
          tokens: int) -> str:  # fmt: skip
    """The plan as text. gpu_memory: GiB of one GPU. tokens: positions of a micro-batch."""
    n = count_parameters(llama, vision)
    lines = [
        f"LLaMA of {n.llama / 1e9:.2f} G parameters, ViT of {n.vision / 1e9:.2f} G, W of {n.projector / 1e6:.1f} M; "
        f"{precision}, {gpus} GPUs of {gpu_memory} GiB ({RESERVE // GIB} GiB of each left to CUDA)",
        f"GiB on each GPU, with micro-batches of {tokens:,} positions (--micro-batch-tokens):",
        "",
        f"{'':39}weights gradients   AdamW gathered activations   total   fits  largest micro-batch",
    ]
    for stage in stages:
        for parallel in ("ddp", "fsdp"):
            for flag in ("", " --checkpoint-activations"):
                found = gpu_bytes(llama, vision, stage, parallel, gpus, precision, tokens, bool(flag))
                lines.append(row(f"stage {stage} {parallel}{flag}", found, gpu_memory, tokens))
    if 2 in stages:
        host = ADAMW_STATE * (n.llama + n.projector)
        lines += ["", f"stage 2 fsdp: process 0 also needs {host / GIB:.1f} GiB of host memory to save the training "
                  f"state ({ADAMW_STATE} bytes per trained parameter)"]  # fmt: skip
    return "\n".join(lines)


def main():
    parser = ArgumentParser(__doc__, prog="python -m tools.plan")
    add = parser.add_argument
    add("--llama", type=Path, metavar="DIR", help="has params.json or config.json (default: the demo's LLaMA)")
    add("--vision", type=Path, metavar="PATH", help="a CLIP ViT (default: ViT-L/14 at 224 pixels; without --llama the "
        "demo's)")  # fmt: skip
    add("--stage", type=int, choices=(1, 2), help="plan this stage only (default: both)")
    add("--gpus", type=number(1), default=8, help="number of GPUs")
    add("--gpu-memory", type=number(1), default=80, metavar="GIB", help="memory of one GPU")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of the matrix products")
    add("--micro-batch-tokens", type=number(1), default=4096, help="positions of a micro-batch")
    args = parser.parse_args()
    vision_path = args.vision
    if vision_path is None and args.llama is None:
        vision_path = VISION
    folder = args.llama or LLAMA
    llama = checkpoint.llama_config(folder)
    vision = checkpoint.load_vision(vision_path).config if vision_path else VisionConfig()
    stages = [args.stage] if args.stage else [1, 2]
    print(table(llama, vision, stages, args.gpus, args.gpu_memory, args.precision, args.micro_batch_tokens))


if __name__ == "__main__":
    run_command(main)
