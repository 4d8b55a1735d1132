"""LLaMA, and LLaVA on top of it: H_v = W Z_v (Eq. 1), the splice (Eq. 2), the loss over green tokens (Eq. 3).

A batch is flat: its B samples stand end to end in one stream of N positions, and `cu_seqlens` (B+1) says where each
starts and ends. Every linear layer runs over (N, dim); only attention looks at the borders. There is no padding and
no attention mask, and a batch without a picture is the case of no pictures, not another path.

Parameters carry the names of LLaMA's release, so its checkpoints load as they are.

Shapes: B samples, N positions of the flat batch, dim model width, H query heads, K key/value heads, hd = dim / H,
S positions of a shared prefix, P patches a picture of size² pixels, D width of the ViT, T length of one sample.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from conversation import IMAGE_ID
from cpu import Linear
from vision import VisionTransformer, normalize

varlen_attn: Callable | None = None  # one kernel for the whole flat batch, on GPUs
if torch.cuda.is_available():  # it brings 70 MB of modules, which no CPU needs
    with suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn


@dataclass(frozen=True)
class LLaMAConfig:
    """The architecture, as in params.json; the defaults are LLaMA-7B."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32  # fewer than n_heads: grouped-query attention
    ffn_dim: int = 11008
    vocab_size: int = 32000
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


Attend = Callable[..., torch.Tensor]  # of one layer: q, k, v -> (N, H, hd)
Prefix = list[tuple[torch.Tensor, torch.Tensor]]  # per layer k and v (S, K, hd)


# --- LLaMA


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, dim)
        y = x.float()  # the mean of squares overflows fp16 and is coarse in bf16
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def rope_angles(positions: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """positions (...) int -> cos and sin (..., 1, hd/2) float32; the 1 is for the heads."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions.float()[..., None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE. x (..., heads, hd): each adjacent pair (2i, 2i+1) turns by its angle, as LLaMA's weights expect."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (..., heads, hd/2) each
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c: LLaMAConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.wq = Linear(c.dim, c.n_heads * c.head_dim, bias=False)
        self.wk = Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wv = Linear(c.dim, c.n_kv_heads * c.head_dim, bias=False)
        self.wo = Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x: torch.Tensor, rope, attend, wanted) -> torch.Tensor:  # (N, dim)
        q = rotate(self.wq(x).unflatten(-1, (-1, self.head_dim)), *rope)  # (N, H, hd)
        k = rotate(self.wk(x).unflatten(-1, (-1, self.head_dim)), *rope)  # (N, K, hd)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (N, K, hd)
        return self.wo(attend(q, k, v).flatten(-2)[wanted])  # (N or M, dim)


class FeedForward(nn.Module):
    """SwiGLU. w1 is the gate, w3 the value it gates ("up"), w2 the way back ("down")."""

    def __init__(self, c: LLaMAConfig):
        super().__init__()
        self.w1 = Linear(c.dim, c.ffn_dim, bias=False)
        self.w2 = Linear(c.ffn_dim, c.dim, bias=False)
        self.w3 = Linear(c.dim, c.ffn_dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, dim)
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # (N, dim), by way of (N, ffn_dim)


class Block(nn.Module):
    def __init__(self, c: LLaMAConfig):
        super().__init__()
        self.attention = Attention(c)
        self.feed_forward = FeedForward(c)
        self.attention_norm = RMSNorm(c.dim, c.norm_eps)
        self.ffn_norm = RMSNorm(c.dim, c.norm_eps)

    def forward(self, x: torch.Tensor, rope, attend, wanted=slice(None)) -> torch.Tensor:  # (N, dim)
        x = x[wanted] + self.attention(self.attention_norm(x), rope, attend, wanted)
        return x + self.feed_forward(self.ffn_norm(x))


class LLaMA(nn.Module):
    def __init__(self, config: LLaMAConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = Linear(config.dim, config.vocab_size, bias=False)
        self.checkpoint_activations = False

    def forward(self, x: torch.Tensor, positions: torch.Tensor, attend: list[Attend],
                wanted: torch.Tensor | slice = slice(None)) -> torch.Tensor:  # fmt: skip
        """Embeddings x (N, dim) at `positions` (N,) of their samples -> hidden states (M, dim) before the last norm.

        wanted: (M,) int64, the positions whose hidden states are asked for (all: M = N). After the last attention no
        other is computed.
        attend[layer](q, k, v) is the attention of one layer over q (N, H, hd) and k, v (N, K, hd): `flat_attention`
        or a `KVCache`'s. It alone knows which positions belong together.
        """
        rope = rope_angles(positions, self.config.head_dim, self.config.rope_theta)
        for i, (layer, attend_layer) in enumerate(zip(self.layers, attend, strict=True)):
            rows = wanted if i + 1 == len(self.layers) else slice(None)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, attend_layer, rows, use_reentrant=False)
            else:
                x = layer(x, rope, attend_layer, rows)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states (M, dim) of the positions asked for -> (M, vocab), in the compute dtype."""
        return self.output(self.norm(x))


# --- attention over the flat batch, and over a cache


def flat_attention(n_layers: int, cu_seqlens: torch.Tensor, prefix: Prefix | int | None = None,
                   keep: Prefix | None = None) -> list[Attend]:  # fmt: skip
    """Causal attention within each sample of a flat batch, for each of the LLaMA's n_layers: see `LLaMA.forward`.

    cu_seqlens: (B+1,) int32, the borders of the samples.
    prefix: what comes before every sample: per layer its k and v (S, K, hd), from `LLaVA.read_prefix`; or S, if it
    stands in the stream itself, once, before all samples (and before the 0 of cu_seqlens).
    keep: a list that gets each layer's (k, v), for a cache.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    S = prefix if isinstance(prefix, int) else len(prefix[0][0]) if prefix else 0

    def attend(layer, q, k, v):  # (N, H, hd), (N, K, hd), (N, K, hd)
        if keep is not None:
            keep.append((k, v))
        outs = []
        if isinstance(prefix, int):
            before, k, v = (k[:S], v[:S]), k[S:], v[S:]
            outs, q = [causal(q[:S], *before)], q[S:]
        elif prefix:
            before = tuple(t.to(k.dtype) for t in prefix[layer])
        ks, vs = k.split(lengths), v.split(lengths)  # (T, K, hd) each
        if S:
            ks, vs = ([torch.cat([t, one]) for one in ones] for t, ones in zip(before, (ks, vs)))  # (S+T, K, hd) each
        if q.is_cuda and varlen_attn is not None and q.dtype != torch.float32:
            cu_seqlens_k = cu_seqlens + S * torch.arange(len(cu_seqlens), device=q.device, dtype=cu_seqlens.dtype)
            longest, window = max(lengths), (-1, 0)  # any distance back, none ahead; the last rows line up
            if S:
                k, v = torch.cat(ks), torch.cat(vs)  # (N + B S, K, hd)
            outs.append(varlen_attn(q, k, v, cu_seqlens, cu_seqlens_k, longest, longest + S, window_size=window,
                                    enable_gqa=q.shape[1] != k.shape[1]))  # fmt: skip
        else:
            outs += map(causal, q.split(lengths), ks, vs)
        return torch.cat(outs)

    return [lambda q, k, v, layer=layer: attend(layer, q, k, v) for layer in range(n_layers)]


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of q (T, H, hd), the last T of the S + T positions of k and v (S+T, K, hd) -> (T, H, hd)."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))  # (1, heads, T or S+T, hd)
    S = k.shape[2] - q.shape[2]
    if S:  # the first S have no queries: zeros, whose outputs are dropped, line up the causal triangle
        q = F.pad(q, (0, 0, S, 0))  # (1, H, S+T, hd)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out[0, :, S:].transpose(0, 1)


class KVCache:
    """Keys and values of B growing samples. lengths (B,) int64: how many positions of each row are filled."""

    ROOM = 64  # positions by which the rows grow whenever the longest is full

    def __init__(self, kept: Prefix, cu_seqlens: torch.Tensor, prefix: Prefix | None):
        """kept: per layer k and v (N, K, hd) of the prompts, from `flat_attention`; prefix: its own, (S, K, hd)."""
        S = 0 if prefix is None else len(prefix[0][0])
        self.lengths = (S + cu_seqlens[1:] - cu_seqlens[:-1]).long()
        B, longest = len(self.lengths), int(self.lengths.max()) + self.ROOM
        borders = cu_seqlens.tolist()
        self.layers = []
        for layer, flat in enumerate(kept):
            rows = []
            for t, before in zip(flat, prefix[layer] if prefix else (None, None)):
                # (B, K, longest, hd): what a head reads at every step lies side by side, which is faster
                row = t.new_zeros(B, t.shape[1], longest, t.shape[2])
                for i, (a, b) in enumerate(zip(borders, borders[1:])):
                    if before is not None:
                        row[i, :, :S] = before.transpose(0, 1)
                    row[i, :, S : S + b - a] = t[a:b].transpose(0, 1)
                rows.append(row)
            self.layers.append(rows)

    def attention(self) -> list[Attend]:
        """For every layer, the attention of one new position per sample, first written at each row's length."""
        longest = int(self.lengths.max()) + 1  # waits for the GPU: here, once for all layers
        here = torch.arange(len(self.lengths), device=self.lengths.device)  # (B,)
        seen = torch.arange(longest, device=self.lengths.device) <= self.lengths[:, None]  # (B, longest)

        def attend(layer, q, k, v):  # (B, H, hd), (B, K, hd), (B, K, hd)
            if longest > self.layers[layer][0].shape[2]:
                self.layers[layer] = [F.pad(rows, (0, 0, 0, self.ROOM)) for rows in self.layers[layer]]
            rows_k, rows_v = self.layers[layer]
            rows_k[here, :, self.lengths], rows_v[here, :, self.lengths] = k, v
            k, v = rows_k[:, :, :longest], rows_v[:, :, :longest]  # (B, K, longest, hd)
            gqa = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q[:, :, None], k, v, seen[:, None, None], enable_gqa=gqa)
            return out[:, :, 0]  # (B, H, hd)

        return [lambda q, k, v, layer=layer: attend(layer, q, k, v) for layer in range(len(self.layers))]

    def select(self, rows: torch.Tensor):
        """Keeps only these rows: samples that have ended cost nothing more."""
        self.lengths = self.lengths[rows]
        self.layers = [[t[rows] for t in kv] for kv in self.layers]


# --- LLaVA


class Projection(nn.Module):
    """W of Eq. 1, the one new parameter; a bias only where a published projector has one."""

    def __init__(self, vision_dim: int, dim: int, bias: bool = False):
        super().__init__()
        # Entries of variance 1 / D keep each picture token about as long as the features it comes from.
        self.weight = nn.Parameter(torch.randn(dim, vision_dim) / vision_dim**0.5)
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, Z_v: torch.Tensor) -> torch.Tensor:  # (..., D)
        H_v = Z_v @ self.weight.T.to(Z_v.dtype)  # Eq. 1: H_v = W Z_v (features are rows here)
        return H_v if self.bias is None else H_v + self.bias.to(Z_v.dtype)  # (..., dim)


class LLaVA(nn.Module):
    def __init__(self, llama: LLaMA, vision: VisionTransformer, projector: Projection):
        super().__init__()
        self.llama, self.vision, self.projector = llama, vision, projector

    def set_trainable(self, stage: int) -> list[nn.Parameter]:
        """What trains (section 4.2); returns it, for the optimiser.

            stage   ViT      W        LLaMA
            1       frozen   trains   frozen
            2       frozen   trains   trains
        """
        assert stage in (1, 2)
        self.vision.requires_grad_(False)
        self.projector.requires_grad_(True)
        self.llama.requires_grad_(stage == 2)
        return [p for p in self.parameters() if p.requires_grad]

    def embed(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """The input of the language model (Eq. 2): words looked up, H_v written where `ids` holds IMAGE_ID.

        ids (N,) int64; pixels (pictures, 3, size, size) uint8, in the order of their places in ids. Returns (N, dim).
        """
        with torch.no_grad():  # the ViT is always frozen
            Z_v = self.vision(normalize(pixels))  # (pictures, P, D)
        H_v = self.projector(Z_v)  # (pictures, P, dim)
        at_patch = ids == IMAGE_ID
        x = self.llama.tok_embeddings(ids.clamp(min=0))  # (N, dim)
        assert int(at_patch.sum()) == H_v.shape[0] * H_v.shape[1], "patch positions and features must be as many"
        # masked_scatter, not a write in place: with no picture it is the identity and W still gets its (zero) gradient.
        return x.masked_scatter(at_patch[:, None], H_v.to(x.dtype).flatten(0, 1))

    def read_prefix(self, ids: torch.Tensor) -> Prefix:
        """Keys and values (S, K, hd) per layer of the text ids (S,) that every sample starts with.

        They are as constant as the LLaMA is: in stage 1 and in use they are computed once, in stage 2 once a batch.
        """
        keep: Prefix = []
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32, device=ids.device)
        attend = flat_attention(len(self.llama.layers), cu_seqlens, keep=keep)
        self.llama(self.llama.tok_embeddings(ids), positions(cu_seqlens), attend)
        return keep

    def forward(self, ids: torch.Tensor, green: torch.Tensor, cu_seqlens: torch.Tensor, pixels: torch.Tensor,
                prefix: Prefix | torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Eq. 3: the loss of the green tokens, as (sum of their negative log likelihoods, their count).

        ids (N,) int64 and green (N,) bool of the flat batch, cu_seqlens (B+1,) int32, pixels as in `embed`.
        prefix: what `read_prefix` returned for the ids that have been left off every sample; or those ids themselves,
        (S,) int64, to be read here so that the gradient of the LLaMA reaches them.

        The two travel apart: the sum over micro-batches and ranks is divided once, by the count over all of them,
        so that the gradient does not depend on how a global batch is cut up.
        """
        if isinstance(prefix, torch.Tensor):  # it goes into the stream, once, before the samples
            S = len(prefix)
            ids, green = torch.cat([prefix, ids]), torch.cat([green.new_zeros(S), green])  # (S+N,) each, N from here on
            at = torch.cat([torch.arange(S, device=ids.device), positions(cu_seqlens, S)])
            attend = flat_attention(len(self.llama.layers), cu_seqlens, S)
        else:
            at = positions(cu_seqlens, len(prefix[0][0]) if prefix else 0)
            attend = flat_attention(len(self.llama.layers), cu_seqlens, prefix)
        # The position before a green token predicts it. A sample never starts green, so both are of one sample.
        is_target = green.nonzero().squeeze(1)  # (M,)
        x = self.llama(self.embed(ids, pixels), at, attend, wanted=is_target - 1)  # (M, dim)
        logits = self.llama.logits(x)  # (M, vocab): nowhere else do logits exist
        nll = F.cross_entropy(logits.float(), ids[is_target], reduction="sum")
        return nll, torch.tensor(len(is_target), device=ids.device)

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, cu_seqlens: torch.Tensor, pixels: torch.Tensor, stop: Sequence[int],
                 max_new_tokens: int, prefix: Prefix | None = None, temperature: float = 0.0, top_p: float = 1.0,
                 seed: int = 0) -> Iterator[dict[int, int]]:  # fmt: skip
        """Answers B prompts at once, of any lengths, each until it says `stop`.

        ids, cu_seqlens, pixels: a flat batch of prompts, as for `forward`; prefix: from `read_prefix`.
        stop: ids of <STOP>; it is not part of the answer that it ends.
        temperature: 0 = the likeliest token, always. top_p: sample among the fewest tokens that hold this probability.
        seed: each prompt draws from a generator of its own, so an answer does not depend on its neighbours.

        Yields {prompt index: its new token} step by step; the tokens of `stop` come too. See `answers`.
        """
        S = 0 if prefix is None else len(prefix[0][0])
        keep = []
        attend = flat_attention(len(self.llama.layers), cu_seqlens, prefix, keep)
        last = cu_seqlens[1:].long() - 1  # of each prompt
        x = self.llama(self.embed(ids, pixels), positions(cu_seqlens, S), attend, wanted=last)  # (B, dim)
        cache = KVCache(keep, cu_seqlens, prefix)
        rows = list(range(len(cu_seqlens) - 1))  # the prompts still being answered
        said = [[] for _ in rows]
        dice = [torch.Generator().manual_seed(seed + i) for i in rows]
        for step in range(max_new_tokens):
            tokens = choose(self.llama.logits(x).float().cpu(), temperature, top_p, [dice[i] for i in rows])
            for i, token in zip(rows, tokens):
                said[i].append(token)
            yield dict(zip(rows, tokens))
            going = [j for j, i in enumerate(rows) if said[i][-len(stop) :] != list(stop)]
            if not going or step + 1 == max_new_tokens:
                return
            if len(going) < len(rows):
                cache.select(torch.tensor(going, device=ids.device))
                rows, tokens = [rows[j] for j in going], [tokens[j] for j in going]
            x = self.llama.tok_embeddings(torch.tensor(tokens, device=ids.device))  # (B still going, dim)
            x = self.llama(x, cache.lengths, cache.attention())
            cache.lengths = cache.lengths + 1

    def answers(self, ids: torch.Tensor, cu_seqlens: torch.Tensor, pixels: torch.Tensor, stop: Sequence[int],
                max_new_tokens: int, **settings) -> list[list[int]]:  # fmt: skip
        """All of `generate`: the new ids of each prompt, without <STOP>."""
        said = [[] for _ in range(len(cu_seqlens) - 1)]
        for step in self.generate(ids, cu_seqlens, pixels, stop, max_new_tokens, **settings):
            for i, token in step.items():
                said[i].append(token)
        return [a[: -len(stop)] if a[-len(stop) :] == list(stop) else a for a in said]


def positions(cu_seqlens: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Positions (N,) within their samples, the first being `start`: [0, 3, 5] -> 0 1 2 0 1."""
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    total = int(cu_seqlens[-1])
    return start + torch.arange(total, device=cu_seqlens.device) - cu_seqlens[:-1].repeat_interleave(lengths)


def choose(logits: torch.Tensor, temperature: float, top_p: float, dice: list[torch.Generator]) -> list[int]:
    """The next token of each row of logits (B, vocab)."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    temperature = max(temperature, 1e-30)  # 1 / 1e-39 is infinite in fp32
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p[:, 1:] = p[:, 1:].masked_fill((p.cumsum(-1) - p)[:, 1:] >= top_p, 0)  # drop what lies wholly beyond top_p
    drawn = [torch.multinomial(row, 1, generator=die) for row, die in zip(p, dice)]
    return order.gather(-1, torch.stack(drawn)).squeeze(-1).tolist()
