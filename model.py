"""LLaMA, and LLaVA on top of it: H_v = W Z_v (Eq. 1) among the words (Eq. 2), the loss of green tokens (Eq. 3).

A batch is one stream of N tokens without padding. Every sample starts with the same system message, so the message
stands in the stream once, before the samples:

    | system message | sample 1 | sample 2 | ... | sample B |
    0            borders[0]  borders[1]  ...          borders[B] = N

Token i attends to token j if j <= i and (j < borders[0] or both are of one sample). Only the attention reads the
borders; every other layer treats each token by itself. Generation first reads a stream of prompts, then computes one
new token of each prompt per step.

Parameters have the names of LLaMA's release, so its checkpoints load without renaming.

Shapes: B samples, N positions of the stream, S of them the system message, T of one sample; dim model width, H query
heads, K key/value heads, hd = dim / H; P patches a picture, D width of the ViT; M positions whose logits are computed.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from conversation import IMAGE_ID
from vision import VisionTransformer, normalize

CPU = torch.device("cpu")
varlen_attn: Any = None  # PyTorch's kernel that attends within all samples of a stream at once
if torch.cuda.is_available():  # the import takes 70 MB, and CPUs have no such kernel
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn


@dataclass(frozen=True)
class LLaMAConfig:
    """The architecture, as in params.json. The defaults are LLaMA-7B."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32  # grouped-query attention if less than n_heads
    ffn_dim: int = 11008
    vocab_size: int = 32000
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


# --- LLaMA


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, dim)
        y = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)  # the mean of squares loses digits in bf16
        return y.to(x.dtype) * self.weight


def rope_phases(positions: torch.Tensor, head_dim: int, theta: float) -> torch.Tensor:
    """positions (...) int -> the phase e^(i angle) of each pair, (..., 1, hd/2) complex64; the 1 is for the heads."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[..., None, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """RoPE on x (..., heads, hd): multiplies each adjacent pair (2i, 2i+1) by its phase, as LLaMA's weights expect."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # (..., heads, hd/2)
    return torch.view_as_real(pairs * phases).flatten(-2).to(x.dtype)  # (..., heads, hd)


class Attention(nn.Module):
    """Projections and RoPE around `attend`, which LLaMA.forward describes."""

    def __init__(self, c: LLaMAConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = nn.Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.wk = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wv = nn.Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wo = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x: torch.Tensor, phases: torch.Tensor, attend, layer: int) -> torch.Tensor:  # (N, dim)
        q = rotate(self.wq(x).unflatten(-1, (-1, self.head_dim)), phases)  # (N, H, hd)
        k = rotate(self.wk(x).unflatten(-1, (-1, self.head_dim)), phases)  # (N, K, hd)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (N, K, hd)
        return self.wo(attend(q, k, v, layer).flatten(-2))  # (N, dim)


class FeedForward(nn.Module):
    """SwiGLU. w1 is the gate, w3 the "up" projection that it gates, w2 the "down" projection."""

    def __init__(self, c: LLaMAConfig):
        super().__init__()
        self.w1 = nn.Linear(c.dim, c.ffn_dim, bias=False)
        self.w2 = nn.Linear(c.ffn_dim, c.dim, bias=False)
        self.w3 = nn.Linear(c.dim, c.ffn_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, dim)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (N, dim), through (N, ffn_dim)


class Block(nn.Module):
    def __init__(self, c: LLaMAConfig):
        super().__init__()
        self.attention = Attention(c)
        self.feed_forward = FeedForward(c)
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)

    def forward(self, x: torch.Tensor, phases: torch.Tensor, attend, layer: int,
                wanted: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """x (N, dim) -> (N, dim), or (M, dim) if `wanted` (M,) lists the positions that the feed-forward computes."""
        x = x + self.attention(self.attention_norm(x), phases, attend, layer)
        if wanted is not None:
            x = x[wanted]  # (M, dim)
        return x + self.feed_forward(self.ffn_norm(x))


class LLaMA(nn.Module):
    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.checkpoint_activations = False

    def forward(self, x: torch.Tensor, positions: torch.Tensor, attend: Callable,
                wanted: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """Embeddings x (N, dim) at `positions` (N,) -> the hidden states (M, dim) that `logits` takes.

        attend(q, k, v, layer): q (N, H, hd), k and v (N, K, hd) -> (N, H, hd); a StreamAttention or a KVCache's method.
        wanted: (M,) int64, the positions to return; None = all. The last layer's feed-forward computes only these.
        """
        phases = rope_phases(positions, self.config.head_dim, self.config.rope_theta)  # (N, 1, hd/2)
        for i, layer in enumerate(self.layers):
            only = wanted if i + 1 == len(self.layers) else None
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, phases, attend, i, only, use_reentrant=False)
            else:
                x = layer(x, phases, attend, i, only)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (M, dim) -> (M, vocab_size), in the compute dtype."""
        return self.output(self.norm(x))


# --- attention within the samples of a stream, and over a cache


def to_device(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor of the CPU. A GPU copies from pinned memory without making the host wait for its work."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)


def position_ids(borders: list[int], device: torch.device = CPU) -> torch.Tensor:
    """The position (N,) of each token in its sample, which follows the system message: [2, 5, 7] -> 0 1 2 3 4 2 3."""
    S = borders[0]
    parts = [torch.arange(S)] + [torch.arange(S, S + end - start) for start, end in pairwise(borders)]
    return to_device(torch.cat(parts), device)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q kᵀ / √hd) v, each token over itself and earlier ones: (..., T, heads, hd) each -> (..., T, H, hd)."""
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))  # (..., heads, T, hd)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[-3] != k.shape[-3])
    return out.transpose(-3, -2)


class StreamAttention:
    """Causal attention within each sample of a stream, and to the system message before it.

    Each sample is computed behind its own copy of the message. The copies' outputs are equal; those of the first copy
    stay, and the others are dropped. Neighbours of equal length are computed together.
    """

    def __init__(self, borders: list[int]):
        self.S = borders[0]
        self.lengths = [end - start for start, end in pairwise(borders)]  # of the samples, without the message
        self.runs = [(length, len(list(run))) for length, run in groupby(self.lengths)]  # (T, samples)
        self.ends: list[torch.Tensor] = []  # the varlen kernel's borders of q and of k, the same in all layers

    def after_message(self, t: torch.Tensor) -> list[torch.Tensor]:
        """(N, heads, hd) -> a tensor (samples, S+T, heads, hd) for each run."""
        message, *runs = t.split([self.S, *(T * n for T, n in self.runs)])
        return [torch.cat([message.expand(n, *message.shape), run.unflatten(0, (n, T))], dim=1)
                for run, (T, n) in zip(runs, self.runs)]  # fmt: skip

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """q (N, H, hd), k and v (N, K, hd) -> (N, H, hd)."""
        if q.is_cuda and varlen_attn is not None and q.dtype != torch.float32:
            return self.by_varlen_kernel(q, k, v)
        outs = list(map(causal_attention, *(self.after_message(t) for t in (q, k, v))))  # (samples, S+T, H, hd) each
        return torch.cat([outs[0][0, : self.S], *(out[:, self.S :].flatten(0, 1) for out in outs)])

    def by_varlen_kernel(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The same in one launch. The kernel aligns the last query of a sample with its last key, so the queries need
        no copy of the message: the first sample's are those of the message and its own."""
        k, v = (torch.cat([run.flatten(0, 1) for run in self.after_message(t)]) for t in (k, v))  # (N + (B-1) S, K, hd)
        lengths_q, lengths_k = [self.S + self.lengths[0], *self.lengths[1:]], [self.S + T for T in self.lengths]
        if not self.ends:
            self.ends = [to_device(torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32), q.device)
                         for lengths in (lengths_q, lengths_k)]  # fmt: skip
        grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}  # PyTorch 2.11 does not know the flag
        return varlen_attn(q, k, v, *self.ends, max(lengths_q), max(lengths_k),
                           window_size=(-1, 0), **grouped)  # any distance to the left, none to the right


class KVCache:
    """Keys and values of B growing sequences, each with its own copy of the system message.

    layers: the keys and values of each layer, (B, K, room, hd), whose room for positions grows.
    lengths (B,) int64: how many positions of each row are filled. longest: their maximum, known without asking a GPU.
    """

    ROOM = 64  # positions by which the rows grow when the longest one is full

    def __init__(self, borders: list[int], device: torch.device = CPU):
        self.stream, self.layers = StreamAttention(borders), []
        lengths = [self.stream.S + length for length in self.stream.lengths]
        self.lengths, self.longest = to_device(torch.tensor(lengths), device), max(lengths)

    def prefill(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        """Attention within a stream of prompts (see StreamAttention); stores their keys and values."""
        assert layer == len(self.layers)
        self.layers.append([self.rows_of(k), self.rows_of(v)])
        return self.stream(q, k, v)

    def rows_of(self, t: torch.Tensor) -> torch.Tensor:
        """(N, K, hd) of the stream -> (B, K, room, hd), so that a step reads the positions of a head side by side."""
        rows = t.new_zeros(len(self.lengths), t.shape[1], self.longest + self.ROOM, t.shape[2])
        samples = [sample for run in self.stream.after_message(t) for sample in run]
        for row, sample in zip(rows, samples):
            row[:, : len(sample)] = sample.transpose(0, 1)
        return rows

    def step(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int) -> torch.Tensor:
        """Attention of one new token per row, (B, heads, hd), after storing its key and value at the row's length."""
        if self.longest == self.layers[layer][0].shape[2]:
            self.layers[layer] = [F.pad(rows, (0, 0, 0, self.ROOM)) for rows in self.layers[layer]]
        keys, values = self.layers[layer]
        longest = self.longest + 1  # with the new token
        if layer == 0:  # the other layers use the same
            self.rows = torch.arange(len(q), device=q.device)
            self.filled = torch.arange(longest, device=q.device) <= self.lengths[:, None]  # (B, longest)
        keys[self.rows, :, self.lengths], values[self.rows, :, self.lengths] = k, v
        keys, values = keys[:, :, :longest], values[:, :, :longest]  # (B, K, longest, hd)
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, self.filled[:, None, None],
                                             enable_gqa=q.shape[1] != k.shape[1])  # fmt: skip
        return out[:, :, 0]  # (B, H, hd)

    def advance(self):
        """Counts the position that a step has filled in all layers."""
        self.lengths, self.longest = self.lengths + 1, self.longest + 1

    def select(self, rows: torch.Tensor):
        """Keeps these rows only, so that a finished sequence costs nothing more."""
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())
        self.layers = [[t[rows] for t in pair] for pair in self.layers]


# --- LLaVA


class Projection(nn.Module):
    """W of Eq. 1, the only new parameter. It has a bias only if a published projector is loaded that has one."""

    def __init__(self, vision_dim: int, dim: int, bias: bool = False):
        super().__init__()
        # Entries of variance 1/D: a picture token starts with about the norm of the feature that it projects.
        self.weight = nn.Parameter(torch.randn(dim, vision_dim) / vision_dim**0.5)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, Z_v: torch.Tensor) -> torch.Tensor:  # (..., D)
        H_v = Z_v @ self.weight.T.to(Z_v.dtype)  # Eq. 1: H_v = W Z_v (features are rows here)
        return H_v if self.bias is None else H_v + self.bias.to(Z_v.dtype)  # (..., dim)


class LLaVA(nn.Module):
    def __init__(self, llama: LLaMA, vision: VisionTransformer, projector: Projection):
        super().__init__()
        self.llama, self.vision, self.projector = llama, vision, projector

    def set_trainable(self, stage: int):
        """Freezes what does not train (section 4.2).

        stage   ViT      W        LLaMA
        1       frozen   trains   frozen
        2       frozen   trains   trains
        """
        assert stage in (1, 2)
        self.vision.requires_grad_(False)
        self.projector.requires_grad_(True)
        self.llama.requires_grad_(stage == 2)

    def embed(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """The LLaMA's input: looks up the words and writes H_v where `ids` holds IMAGE_ID, the place that Eq. 2 drew.

        ids (N,) int64; pixels (pictures, 3, size, size) uint8, in the order of their places in ids. Returns (N, dim).
        """
        with torch.no_grad():  # the ViT is always frozen
            Z_v = self.vision(normalize(pixels))  # (pictures, P, D)
        H_v = self.projector(Z_v)  # (pictures, P, dim)
        x = self.llama.tok_embeddings(ids.clamp(min=0))  # (N, dim)
        H_v, at_patch = H_v.to(x.dtype).flatten(0, 1), ids == IMAGE_ID
        # Counting on a GPU would make the host wait: only CPUs check the number, and nonzero_static gets a `size`.
        assert ids.is_cuda or at_patch.sum() == len(H_v), "each patch position needs one feature"
        places = torch.nonzero_static(at_patch, size=len(H_v)).squeeze(1)  # (pictures * P,)
        # Without a picture this changes nothing, but W gets a gradient of zeros, which DDP needs.
        return x.index_copy(0, places, H_v)

    def forward(self, ids: torch.Tensor, target: torch.Tensor, borders: list[int],
                pixels: torch.Tensor) -> torch.Tensor:  # fmt: skip
        """Eq. 3: the negative log likelihood of the green tokens of a stream, summed: a scalar, float32.

        ids (N,) int64, pixels as in `embed`; target (M,) int64, the positions of the green tokens. A sum, not a mean:
        the training loop divides it once, by the number of green tokens of the global batch, so the gradient does not
        depend on how that batch is cut.
        """
        x = self.embed(ids, pixels)  # (N, dim)
        # The position before a green token predicts it. A sample never starts green, so both are of one sample.
        x = self.llama(x, position_ids(borders, ids.device), StreamAttention(borders), wanted=target - 1)  # (M, dim)
        logits = self.llama.logits(x)  # (M, vocab_size)
        return F.cross_entropy(logits.float(), ids[target], reduction="sum")

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, borders: list[int], pixels: torch.Tensor,
                 has_ended: Callable[[list[int]], bool], max_new_tokens: int, temperature: float = 0.0,
                 top_p: float = 1.0, seed: int = 0) -> Iterator[list[list[int]]]:  # fmt: skip
        """Answers the B prompts of a stream together; yields all answers so far after each step.

        ids (N,), pixels: as in `embed`. has_ended(answer): whether these ids end an answer.
        temperature: 0 = always the most likely token.
        top_p: samples among the fewest tokens that hold this probability.
        seed: each prompt has its own generator, so its answer does not depend on its neighbours.
        """
        cache = KVCache(borders, ids.device)
        last = to_device(torch.tensor(borders[1:]) - 1, ids.device)  # of each prompt
        x = self.embed(ids, pixels)  # (N, dim)
        x = self.llama(x, position_ids(borders, ids.device), cache.prefill, wanted=last)  # (B, dim)
        rows = list(range(len(last)))  # the prompts whose answers continue
        answers: list[list[int]] = [[] for _ in rows]
        rngs = [torch.Generator().manual_seed(seed + i) for i in rows]
        for step in range(max_new_tokens):
            tokens = choose(self.llama.logits(x).float().cpu(), temperature, top_p, [rngs[i] for i in rows])
            for i, token in zip(rows, tokens):
                answers[i].append(token)
            yield answers
            going = [j for j, i in enumerate(rows) if not has_ended(answers[i])]
            if not going or step + 1 == max_new_tokens:
                return
            if len(going) < len(rows):
                cache.select(to_device(torch.tensor(going), ids.device))
                rows, tokens = [rows[j] for j in going], [tokens[j] for j in going]
            x = self.llama.tok_embeddings(to_device(torch.tensor(tokens), ids.device))  # (rows, dim)
            x = self.llama(x, cache.lengths, cache.step)
            cache.advance()


def choose(logits: torch.Tensor, temperature: float, top_p: float, rngs: list[torch.Generator]) -> list[int]:
    """The next token of each row of logits (B, vocab_size)."""
    if temperature < 1e-30:  # 0, or so near to it that float32 would overflow
        return logits.argmax(-1).tolist()
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p[p.cumsum(-1) - p >= top_p] = 0  # the tokens beyond top_p; the first always stays
    drawn = [torch.multinomial(row, 1, generator=rng) for row, rng in zip(p, rngs)]
    return order.gather(-1, torch.stack(drawn)).squeeze(-1).tolist()
