"""`train.py --plan`: what each GPU would hold, counted from the shapes. The LLaMA's weights are not read, nothing runs.

Counted in bytes are the weights, the gradients, AdamW's two moments, what is whole or copied while a block computes,
and what the backward pass needs of each position of a micro-batch. Not counted: what lives for a moment only (a ViT's
own activations, before the LLaMA has any), and CUDA's own share, for which RESERVE is left free.
"""

from model import LLaMAConfig
from vision import FEATURE_LAYER, VisionConfig

GIB = 2**30
RESERVE = 2 * GIB  # CUDA's context, NCCL's buffers, and the gaps that an allocator leaves
GREEN = {1: 1 / 8, 2: 1 / 2}  # the share of the positions whose logits exist, by stage: rather more than there are
VIT_L = VisionConfig(image_size=224, patch_size=14, width=1024, layers=24)


def sizes(c: LLaMAConfig, v: VisionConfig) -> tuple[int, int, int, int]:
    """Parameters of one block of the LLaMA, of its word embeddings (the output has as many), of W, of the ViT."""
    block = c.dim * (2 * c.dim + 2 * c.n_kv_heads * c.head_dim + 3 * c.ffn_dim + 2)
    D, blocks = v.width, v.layers + 1 + FEATURE_LAYER
    vit = D * (3 * v.patch_size**2 + v.n_patches + 4 + blocks * (12 * D + 13))
    return block, c.vocab_size * c.dim, c.dim * D, vit


def kept(c: LLaMAConfig, stage: int, bf16: bool) -> int:
    """Bytes per position that a block keeps for its backward pass."""
    dim, kv, ffn = c.dim, c.n_kv_heads * c.head_dim, c.ffn_dim
    width = 2 if bf16 else 4  # of what the matrices read and write
    attention = width * (2 * dim + 2 * kv)  # q, its result; k, v
    if stage == 1:  # the matrices are constant: their inputs are not needed
        return 2 * 4 * dim + attention + width * 3 * ffn
    norms = 2 * 2 * 4 * dim  # of each: its input, and that divided by its length
    inputs = width * dim * (6 if bf16 else 3)  # autocast casts the same input for wq, wk and wv, and for w1 and w3
    return norms + inputs + attention + width * 4 * ffn


def plan(c: LLaMAConfig, v: VisionConfig, stage: int, parallel: str, gpus: int, precision: str, tokens: int,
         checkpoint_activations: bool) -> dict[str, float]:  # fmt: skip
    """Bytes on each GPU, by what they are for. tokens: positions of a micro-batch."""
    block, words, W, vit = sizes(c, v)
    llama, bf16, share = c.n_layers * block + 2 * words + c.dim, precision == "bf16", gpus if parallel == "fsdp" else 1
    compute = 2 if bf16 else 4
    trains = W + llama * (stage == 2)
    found = {
        "weights": (4 * trains + compute * llama * (stage == 1)) / share + compute * vit,
        "gradients": 4 * trains / share,
        "AdamW": 8 * trains / share,
    }
    if parallel == "fsdp":  # two blocks at a time, words and output; and the gradients of one block, words and output
        found["gathered"] = compute * (2 * block + words) + (4 if stage == 2 else compute) * words
        found["gathered"] += (compute + 4) * (block + words) + 4 * words if stage == 2 else 0
    else:  # autocast's copies of what trains
        found["gathered"] = 2 * (llama - words) if bf16 and stage == 2 else 0
    stream = 2 if bf16 and stage == 1 else 4
    blocks = c.n_layers * stream * c.dim + kept(c, stage, bf16) if checkpoint_activations else (
        c.n_layers * kept(c, stage, bf16))  # fmt: skip
    logits = c.vocab_size * (16 if bf16 else 12)  # with their logarithms and gradients, in fp32
    found["activations"] = tokens * (blocks + GREEN[stage] * logits)
    return found


def table(c: LLaMAConfig, v: VisionConfig, stages: list[int], gpus: int, memory: int, precision: str,
          tokens: int) -> str:  # fmt: skip
    """memory: of a GPU, in GiB; the last column: the largest micro-batch (a power of two) that fits."""
    block, words, W, vit = sizes(c, v)
    lines = [
        f"LLaMA of {(c.n_layers * block + 2 * words + c.dim) / 1e9:.2f} G parameters, ViT of {vit / 1e9:.2f} G, W of "
        f"{W / 1e6:.1f} M; {precision}, {gpus} GPUs of {memory} GiB ({RESERVE // GIB} GiB of each left to CUDA)",
        f"GiB on each GPU, with micro-batches of {tokens:,} positions (--micro-batch-tokens):", "",
        f"{'':39}weights gradients   AdamW gathered activations   total   fits  largest micro-batch",
    ]  # fmt: skip
    for stage in stages:
        for parallel in ("ddp", "fsdp"):
            for again in (False, True):
                found = plan(c, v, stage, parallel, gpus, precision, tokens, again)
                total, fixed = sum(found.values()), sum(found.values()) - found["activations"]
                room = (memory * GIB - RESERVE - fixed) / (found["activations"] / tokens)
                largest = f"{2 ** (int(room).bit_length() - 1):,}" if room >= 512 else "none"
                name = f"stage {stage} {parallel}{' --checkpoint-activations' * again}"
                columns = zip((*found.values(), total), (7, 10, 8, 9, 12, 8))
                lines.append(f"{name:39}" + "".join(f"{n / GIB:{width}.1f}" for n, width in columns)
                             + f"{'yes' if room >= tokens else 'no':>7}{largest:>21}")  # fmt: skip
    return "\n".join(lines)
