"""model.py against `transformers` with the same weights, and against itself: streams, batches and caches."""

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import (VIT, VOCAB, error, generated, in_transformers, llama_twin, llava_twin, randomize, sample, samples, stream,
                      tiny_llama, tiny_llava)  # fmt: skip

import model
from conversation import IMAGE_ID
from model import KVCache, LLaMA, LLaVA, Projection, RMSNorm, StreamAttention, choose, position_ids, rope_phases, rotate
from vision import normalize

TOLERANCE = 1e-4  # of relative errors against transformers; float32 gives about 1e-6
SYSTEM = [1, 20, 30, 40, 50, 60]  # ids of a system message
GQA = pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
SYSTEMS = pytest.mark.parametrize("system", [[], SYSTEM], ids=["no system message", "system message"])


def hidden(llama: LLaMA, ids: torch.Tensor, borders: list[int]) -> torch.Tensor:
    """The hidden states (N, dim) of a stream of text."""
    return llama(llama.tok_embeddings(ids), position_ids(borders), StreamAttention(borders))


def random_ids(n: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(llava: LLaVA, *streams: tuple) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss over the green tokens of all streams, and its gradient for each trainable parameter."""
    llava.zero_grad()
    nll = sum(llava(*one) for one in streams)
    loss = nll / sum(len(target) for _, target, _, _ in streams)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in llava.named_parameters() if p.requires_grad}


def assert_equal_gradients(a: dict, b: dict, tolerance: float = 1e-5):
    assert a.keys() == b.keys()
    errors = {name: error(a[name], b[name]) for name in a}
    assert {name: value for name, value in errors.items() if not value <= tolerance} == {}


def written_out(batch: list) -> list:
    """The samples with the ids of SYSTEM at the start of each."""
    message, not_green = torch.tensor(SYSTEM), torch.zeros(len(SYSTEM), dtype=torch.bool)
    return [(torch.cat([message, ids]), torch.cat([not_green, green]), pixels) for ids, green, pixels in batch]


# --- LLaMA


@GQA
def test_llama_logits_and_gradients_equal_transformers(n_kv_heads):
    llama = tiny_llama(n_kv_heads)
    twin = llama_twin(llama)
    ids = random_ids(40)
    logits = llama.logits(hidden(llama, ids, [0, 40]))
    F.cross_entropy(logits[:-1], ids[1:]).backward()
    expected = twin(ids[None]).logits[0]
    F.cross_entropy(expected[:-1], ids[1:]).backward()
    assert error(logits, expected) <= TOLERANCE
    theirs = {name.removeprefix("model."): p.grad for name, p in twin.named_parameters()}
    assert_equal_gradients(in_transformers(llama, lambda p: p.grad), theirs, TOLERANCE)


def test_logits_at_late_positions_equal_transformers():
    """600 positions: bf16 has too few digits for angles and positions beyond 256."""
    llama = tiny_llama()
    ids = random_ids(600)
    with torch.no_grad():
        logits = llama.logits(hidden(llama, ids, [0, 600]))
        assert error(logits[-100:], llama_twin(llama)(ids[None]).logits[0, -100:]) <= TOLERANCE


def test_rope_rounds_bf16_once():
    """Compares with complex numbers in float64 at 2048 positions: the only error is the final rounding to bf16."""
    x = torch.randn(2048, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    t, i = torch.arange(2048.0, dtype=torch.float64), torch.arange(0, 64, 2, dtype=torch.float64)
    turn = torch.polar(torch.ones(2048, 1, 32).double(), (t[:, None] / 10000.0 ** (i / 64))[:, None])
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    exact = torch.view_as_real(pairs * turn).flatten(-2)
    with torch.autocast("cpu", torch.bfloat16):
        ours = rotate(x, rope_phases(torch.arange(2048), 64, 10000.0))
    assert ours.dtype == torch.bfloat16
    length = pairs.abs().repeat_interleave(2, -1)  # of the pair; the error of a float32 angle is a share of it
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + length * 5e-4).all()


def test_rmsnorm_computes_in_float32():
    """In fp16 the square of 300 is infinite. In bf16 a mean of many squares loses digits."""
    norm = RMSNorm(4096, 1e-6)
    assert norm(torch.full((1, 4096), 300.0, dtype=torch.float16)).tolist() == torch.ones(1, 4096).tolist()
    x = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    assert ((norm(x).double() - exact).abs() <= exact.abs() * 2**-8 + 1e-30).all(), "rounds to bf16 more than once"


# --- one stream


@pytest.mark.parametrize("borders, expected", [
    ([0, 3, 5], [0, 1, 2, 0, 1]), ([2, 5, 7], [0, 1, 2, 3, 4, 2, 3]), ([6, 7, 10], [0, 1, 2, 3, 4, 5, 6, 6, 7, 8]),
])  # fmt: skip
def test_positions_continue_the_system_message(borders, expected):
    assert position_ids(borders).tolist() == expected


@GQA
@pytest.mark.parametrize("borders", [[0, 7, 8, 20, 30], [6, 7, 14, 15, 30]], ids=str)
def test_a_stream_equals_each_sample_alone_behind_the_message(n_kv_heads, borders):
    llama, ids = tiny_llama(n_kv_heads), random_ids(30)
    states = hidden(llama, ids, borders)
    S = borders[0]
    message = hidden(llama, ids[:S], [0, S]) if S else states[:0]
    assert error(states[: borders[1]], torch.cat([message, states[S : borders[1]]])) <= 1e-6
    for start, end in pairwise(borders):
        alone = hidden(llama, torch.cat([ids[:S], ids[start:end]]), [0, S + end - start])
        assert error(states[start:end], alone[S:]) <= 1e-6


@pytest.mark.parametrize("stage", [1, 2])
def test_loss_and_gradients_of_a_stream_equal_those_of_each_sample_alone(stage):
    """The stream has the system message once at its head. Alone, each sample has the message written out."""
    llava, batch = tiny_llava(stage=stage), samples(5)
    loss, gradients = loss_and_gradients(llava, stream(batch, SYSTEM))
    alone_loss, alone = loss_and_gradients(llava, *[stream([one]) for one in written_out(batch)])
    assert abs(loss - alone_loss) <= 1e-5 * alone_loss
    assert_equal_gradients(gradients, alone)
    together_loss, together = loss_and_gradients(llava, stream(written_out(batch)))
    assert abs(together_loss - alone_loss) <= 1e-5 * alone_loss
    assert_equal_gradients(together, alone)


class OnGPU(torch.Tensor):
    """A CPU tensor that takes the branches for GPU tensors."""

    is_cuda = True


def varlen_reference(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size, enable_gqa=False):
    """The documented result of PyTorch's varlen_attn, by an explicit softmax: aligns the last rows of q and k."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and window_size == (-1, 0)
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(q), len(k)) and len(k) == len(v)
    assert enable_gqa == (q.shape[1] != k.shape[1])
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    outs = []
    for (a, b), (c, d) in zip(pairwise(cu_seq_q.tolist()), pairwise(cu_seq_k.tolist())):
        groups = q.shape[1] // k.shape[1]
        ki, vi = (t[c:d].repeat_interleave(groups, dim=1).transpose(0, 1) for t in (k, v))
        scores = q[a:b].transpose(0, 1) @ ki.transpose(1, 2) / q.shape[-1] ** 0.5
        ahead = torch.arange(d - c) > torch.arange(b - a)[:, None] + (d - c) - (b - a)
        outs.append((scores.masked_fill(ahead, -math.inf).softmax(-1) @ vi).transpose(0, 1))
    return torch.cat(outs)


@GQA
@pytest.mark.parametrize("borders", [[0, 6, 7, 20], [5, 11, 12, 20], [5, 6, 20], [0, 20]], ids=str)
def test_the_gpu_branch_asks_its_kernel_for_the_same_attention(n_kv_heads, borders, monkeypatch):
    """Checks the kernel's arguments; the kernel needs a GPU. Computes in float64: float32 does not take the branch."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, heads, 8, dtype=torch.float64, generator=rng) for heads in (4, n_kv_heads, n_kv_heads))
    attend = StreamAttention(borders)
    on_cpu = attend(q, k, v)
    calls = []

    def kernel(*arguments, **settings):
        calls.append(arguments)
        return varlen_reference(*arguments, **settings)

    monkeypatch.setattr(model, "varlen_attn", kernel)
    on_gpu = attend(*(t.as_subclass(OnGPU) for t in (q, k, v)))
    assert error(on_gpu.as_subclass(torch.Tensor), on_cpu) <= 1e-12
    [arguments] = calls
    assert arguments[0].data_ptr() == q.data_ptr(), "the queries are copied"


# --- LLaVA: the splice and the loss


def padded(batch: list) -> dict:
    """The samples in the form of transformers: a padded rectangle, a mask, labels of -100 where not green."""
    longest = max(len(ids) for ids, _, _ in batch)
    input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for i, (ids, green, _) in enumerate(batch):
        input_ids[i, : len(ids)] = ids.where(ids != IMAGE_ID, VOCAB - 1)
        mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = ids.where(green, -100)
    pixels = torch.cat([pixels for _, _, pixels in batch])
    return dict(input_ids=input_ids, attention_mask=mask, labels=labels, pixel_values=normalize(pixels))


@GQA
@SYSTEMS
@pytest.mark.parametrize("seed", range(2))
def test_loss_and_gradients_equal_transformers(n_kv_heads, system, seed):
    """The gradients of W and of every LLaMA weight, for samples of mixed lengths, one of them without a picture."""
    llava, batch = tiny_llava(n_kv_heads, seed), samples(5)
    loss, gradients = loss_and_gradients(llava, stream(batch, system))
    twin = llava_twin(llava)
    twin_loss = twin(**padded(written_out(batch) if system else batch)).loss
    twin_loss.backward()
    theirs = {"W": twin.model.multi_modal_projector.weight.grad, "lm_head.weight": twin.lm_head.weight.grad}
    theirs |= {name: p.grad for name, p in twin.model.language_model.named_parameters()}
    ours = {"W": gradients["projector.weight"]} | in_transformers(llava.llama, lambda p: p.grad)
    assert abs(loss - twin_loss) <= TOLERANCE * twin_loss
    assert_equal_gradients(ours, theirs, TOLERANCE)


@pytest.mark.parametrize("bias", [False, True])
def test_embed_writes_each_picture_to_the_patches_of_its_sample(bias):
    llava, batch = tiny_llava(), samples(4)
    llava.projector = randomize(Projection(VIT.width, 32, bias), 0)
    ids, _, _, pixels = stream(batch, SYSTEM)
    x = llava.embed(ids, pixels)[len(SYSTEM) :]
    alone = [llava.embed(ids, pixels) for ids, _, pixels in batch]
    assert error(x, torch.cat(alone)) <= 1e-6
    ids, _, pixels = batch[0]
    W, b = llava.projector.weight, llava.projector.bias if bias else 0
    H_v = torch.stack([W @ z + b for z in llava.vision(normalize(pixels))[0]])  # Eq. 1, one patch at a time
    assert error(alone[0][ids == IMAGE_ID], H_v) <= 1e-6
    assert torch.equal(alone[0][ids != IMAGE_ID], llava.llama.tok_embeddings.weight[ids[ids != IMAGE_ID]])


@pytest.mark.parametrize("change", ["an extra picture", "a missing picture", "a missing patch"])
def test_the_numbers_of_patches_and_features_must_agree(change):
    ids, target, borders, pixels = stream(samples(4))
    if change == "an extra picture":
        pixels = torch.cat([pixels, pixels[:1]])
    elif change == "a missing picture":
        pixels = pixels[1:]
    else:
        ids[(ids == IMAGE_ID).nonzero()[0]] = 5
    with pytest.raises(AssertionError, match="each patch position needs one feature"):
        tiny_llava()(ids, target, borders, pixels)


def count_rows(modules: Iterable[torch.nn.Module]) -> list[int]:
    """A list that gets the number of rows of each later output of these modules."""
    rows = []
    for module in modules:
        module.register_forward_hook(lambda module, arguments, out: rows.append(len(out)))
    return rows


def test_logits_exist_at_green_positions_only():
    llava, batch = tiny_llava(), stream(samples(4), SYSTEM)
    rows = count_rows([llava.llama.output])
    llava(*batch)
    assert rows == [len(batch[1])]


def test_the_last_feed_forward_computes_the_wanted_rows_only():
    """In training the positions that predict a green token, in generation the last one of each prompt."""
    llava, batch = tiny_llava(), stream(samples(4), SYSTEM)
    rows = count_rows(layer.feed_forward for layer in llava.llama.layers)
    llava(*batch)
    assert rows == [len(batch[0]), len(batch[1])]
    rows.clear()
    ids, borders, pixels = prompt_stream(prompts(), SYSTEM)
    generated(llava, ids, borders, pixels, stop=[], max_new_tokens=1)
    assert rows == [len(ids), 4]


@SYSTEMS
def test_the_loss_sums_over_the_green_tokens_given_all_tokens_before(system):
    """Eq. 3 word by word: recomputes the sample for each green token."""
    llava = tiny_llava()
    ids, green, pixels = (written_out(samples(1)) if system else samples(1))[0]
    log_p = []
    for t in green.nonzero().squeeze(1).tolist():
        x = llava.llama(llava.embed(ids[:t], pixels), torch.arange(t), StreamAttention([0, t]))
        log_p.append(llava.llama.logits(x)[-1].log_softmax(-1)[ids[t]])
    nll = llava(*stream(samples(1), system))
    assert nll.shape == () and error(nll, -sum(log_p)) <= 1e-5


def test_without_a_picture_the_gradient_of_W_is_zero():
    """DDP requires a gradient of W from a process whose batch has no picture."""
    llava = tiny_llava(stage=1)
    _, gradients = loss_and_gradients(llava, stream(samples(4)[2:3]))
    assert gradients["projector.weight"].count_nonzero() == 0


def test_without_green_tokens_the_loss_and_the_gradient_of_W_are_zero():
    llava = tiny_llava(stage=1)
    ids, target, borders, pixels = stream(samples(4), SYSTEM)
    nll = llava(ids, target[:0], borders, pixels)
    nll.backward()
    assert nll == 0 and llava.projector.weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_the_gradient_does_not_depend_on_the_micro_batches(stage):
    """The micro-batches hold different numbers of green tokens, so a mean of their means differs."""
    llava, batch = tiny_llava(stage=stage), samples(8)
    batch[1][1][:-1] = False
    batch[5][1][3:] = True
    batch[5][1][batch[5][0] == IMAGE_ID] = False
    loss, gradients = loss_and_gradients(llava, stream(batch, SYSTEM))
    for size in (1, 2, 3, 4):
        micro_batches = [stream(batch[i : i + size], SYSTEM) for i in range(0, 8, size)]
        cut_loss, cut_gradients = loss_and_gradients(llava, *micro_batches)
        assert abs(cut_loss - loss) <= 1e-5 * loss
        assert_equal_gradients(cut_gradients, gradients)


@SYSTEMS
def test_activation_checkpointing_keeps_the_gradients(system):
    llava, batch = tiny_llava(stage=2), stream(samples(5), system)
    runs = []
    for layer in llava.llama.layers:
        layer.register_forward_pre_hook(lambda *_: runs.append(1))
    _, expected = loss_and_gradients(llava, batch)
    assert len(runs) == 2
    llava.llama.checkpoint_activations = True
    _, gradients = loss_and_gradients(llava, batch)
    assert len(runs) == 2 + 4, "each layer must run again in the backward pass"
    assert_equal_gradients(gradients, expected, 1e-6)


def test_bf16_autocast_is_as_accurate_as_that_of_transformers():
    llava, batch = tiny_llava(stage=1), samples(5)
    twin = llava_twin(llava)
    exact_loss, exact = loss_and_gradients(llava, stream(batch))
    with torch.autocast("cpu", torch.bfloat16):
        loss, rounded = loss_and_gradients(llava, stream(batch))
        twin_loss = twin(**padded(batch)).loss
    twin_loss.backward()
    W, twin_W = "projector.weight", twin.model.multi_modal_projector.weight
    assert loss.dtype == torch.float32 and 0 < abs(loss - exact_loss) <= 0.01 * exact_loss
    assert error(rounded[W], exact[W]) <= 2 * error(twin_W.grad, exact[W]) <= 0.2


def test_a_frozen_llama_in_bf16_trains_W_and_answers():
    """The form of stage 1 on a GPU: the ViT and the LLaMA in bf16, W in float32, under autocast."""
    llava, batch = tiny_llava(stage=1), stream(samples(5), SYSTEM)
    _, exact = loss_and_gradients(llava, batch)
    llava.vision.bfloat16()
    llava.llama.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(llava, batch)
        answers = generated(llava, *prompt_stream(prompts(), SYSTEM), stop=[], max_new_tokens=NEW)
    W = "projector.weight"
    assert loss.dtype == gradients[W].dtype == torch.float32
    assert error(gradients[W], exact[W]) <= 0.2
    assert [len(answer) for answer in answers] == [NEW] * 4


def test_the_loss_of_a_bf16_llama_is_float32():
    llava, batch = tiny_llava(), stream(samples(5), SYSTEM)
    exact = llava(*batch)
    llava.llama.bfloat16()
    nll = llava(*batch)
    assert nll.dtype == torch.float32 and abs(nll - exact) <= 0.02 * exact


# --- trainable parameters


@pytest.mark.parametrize("stage, trainable", [(1, {"projector"}), (2, {"projector", "llama"})])
def test_only_the_parameters_of_the_stage_train(stage, trainable):
    """Compares all parameters bit by bit after two steps. The optimizer gets the frozen ones too."""
    llava = tiny_llava(stage=3 - stage)
    llava.set_trainable(stage)
    named = dict(llava.named_parameters())
    expected = {name for name in named if name.split(".")[0] in trainable}
    assert {name for name, p in named.items() if p.requires_grad} == expected
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = torch.optim.AdamW(llava.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        loss_and_gradients(llava, stream(samples(4), SYSTEM))
        optimizer.step()
    assert {name for name, p in named.items() if not torch.equal(p, before[name])} == expected


def test_the_vit_gets_no_gradient_even_if_it_requires_one():
    llava = tiny_llava(stage=2)
    llava.vision.requires_grad_(True)
    llava(*stream(samples(4))).backward()
    assert all(p.grad is None for p in llava.vision.parameters())


# --- generation

NEW = 12  # tokens of an answer


def prompts() -> list:
    """Four prompts of different lengths, three of them with a picture."""
    lengths, places = (11, 19, 14, 10), (3, 9, None, 1)
    return [sample(length, picture_at, 10 + i) + (pixels,)
            for i, (length, picture_at, (_, _, pixels)) in enumerate(zip(lengths, places, samples(4)))]  # fmt: skip


def prompt_stream(prompts: list, system: Sequence[int] = ()) -> tuple[torch.Tensor, list[int], torch.Tensor]:
    """The first arguments of `LLaVA.generate`."""
    ids, _, borders, pixels = stream(prompts, system)
    return ids, borders, pixels


def recompute(llava: LLaVA, ids: torch.Tensor, pixels: torch.Tensor, n: int) -> list[int]:
    """The greedy answer (n tokens) without a cache."""
    answer = []
    for _ in range(n):
        so_far = torch.cat([ids, torch.tensor(answer, dtype=torch.long)])
        with torch.no_grad():
            x = llava.llama(llava.embed(so_far, pixels), torch.arange(len(so_far)), StreamAttention([0, len(so_far)]))
            answer.append(int(llava.llama.logits(x[-1:]).argmax()))
    return answer


def recompute_all(llava: LLaVA, prompts: list) -> list[list[int]]:
    return [recompute(llava, ids, pixels, NEW) for ids, _, pixels in prompts]


def before_stop(answer: list[int], stop: list[int]) -> list[int]:
    ends = [i for i in range(len(answer)) if answer[i : i + len(stop)] == stop]
    return answer[: ends[0]] if ends else answer


@GQA
@SYSTEMS
@torch.no_grad()
def test_cached_steps_equal_one_pass(n_kv_heads, system, monkeypatch):
    """Feeds the last 6 tokens of three texts one at a time. The rows grow on the way, and two of them end."""
    monkeypatch.setattr(KVCache, "ROOM", 2)
    llama, S, steps = tiny_llama(n_kv_heads), len(system), 6
    texts = random_ids(44).split([15, 18, 11])
    expected = []  # for each text, the hidden states behind the message
    for text in texts:
        ids = torch.cat([torch.tensor(system, dtype=torch.long), text])
        expected.append(hidden(llama, ids, [0, len(ids)])[S:])
    prompts = [(text[:-steps], torch.zeros(len(text) - steps, dtype=torch.bool), torch.zeros(0)) for text in texts]
    ids, _, borders, _ = stream(prompts, system)
    cache, rows = KVCache(borders), [0, 1, 2]
    states = llama(llama.tok_embeddings(ids), position_ids(borders), cache.prefill)
    for state, (start, end) in zip(expected, pairwise(borders)):
        assert error(states[start:end], state[:-steps]) <= 1e-6
    for step in range(steps):
        if step in (2, 4):
            del rows[1]
            cache.select(torch.tensor([0, 2]) if step == 2 else torch.tensor([0]))
        at = [len(texts[i]) - steps + step for i in rows]
        assert cache.lengths.tolist() == [S + place for place in at]
        tokens = torch.stack([texts[i][place] for i, place in zip(rows, at)])
        states = llama(llama.tok_embeddings(tokens), cache.lengths, cache.step)
        cache.advance()
        assert error(states, torch.stack([expected[i][place] for i, place in zip(rows, at)])) <= 1e-6


@GQA
def test_greedy_answers_equal_transformers(n_kv_heads, monkeypatch):
    """Token for token: in a batch here, one at a time and without a cache there. The cache grows on the way."""
    monkeypatch.setattr(KVCache, "ROOM", 5)
    llava = tiny_llava(n_kv_heads)
    twin = llava_twin(llava)
    answers = generated(llava, *prompt_stream(prompts()), stop=[], max_new_tokens=NEW)
    assert [len(answer) for answer in answers] == [NEW] * 4 and len({tuple(answer) for answer in answers}) == 4
    for (ids, green, pixels), answer in zip(prompts(), answers):
        given = dict(input_ids=ids.where(ids != IMAGE_ID, VOCAB - 1)[None], attention_mask=torch.ones(1, len(ids)))
        if len(pixels):
            given["pixel_values"] = normalize(pixels)
        assert answer == twin.generate(**given, max_new_tokens=NEW, do_sample=False)[0, len(ids) :].tolist()
        assert answer == recompute(llava, ids, pixels, NEW)
        assert [answer] == generated(llava, *prompt_stream([(ids, green, pixels)]), stop=[], max_new_tokens=NEW)


def test_answers_behind_a_system_message_equal_those_with_the_message_written_out(monkeypatch):
    monkeypatch.setattr(KVCache, "ROOM", 5)
    llava = tiny_llava()
    expected = recompute_all(llava, written_out(prompts()))
    assert expected != recompute_all(llava, prompts())
    batch = prompt_stream(prompts(), SYSTEM)
    assert generated(llava, *batch, stop=[], max_new_tokens=NEW) == expected
    stop = expected[2][4:6]
    expected = [before_stop(answer, stop) for answer in expected]
    assert generated(llava, *batch, stop=[stop], max_new_tokens=NEW) == expected
    for prompt, answer in zip(prompts(), expected):
        assert generated(llava, *prompt_stream([prompt], SYSTEM), stop=[stop], max_new_tokens=NEW) == [answer]


@pytest.mark.parametrize("length", [1, 2])
def test_each_answer_ends_at_its_own_stop(length):
    """Takes each sequence of one or two answered tokens as the stop: answers end at different steps or not at all."""
    llava = tiny_llava()
    answers = recompute_all(llava, prompts())
    seen = set()
    for stop in {tuple(answer[i : i + length]) for answer in answers for i in range(NEW - length + 1)}:
        expected = [before_stop(answer, list(stop)) for answer in answers]
        assert generated(llava, *prompt_stream(prompts()), stop=[list(stop)], max_new_tokens=NEW) == expected
        seen.add(tuple(len(answer) for answer in expected))
    assert any(len(set(lengths) - {NEW}) == 2 for lengths in seen) or length == 2, "two must end at different steps"
    assert any(set(lengths) > {NEW} for lengths in seen), "some must end before others"


def test_any_of_several_sequences_ends_an_answer():
    llava = tiny_llava()
    answers = recompute_all(llava, prompts())
    stop = [answers[0][2:4], answers[1][4:5], [-1]]
    expected = [min((before_stop(answer, tokens) for tokens in stop), key=len) for answer in answers]
    assert [len(answer) for answer in expected[:2]] != [NEW, NEW]
    assert generated(llava, *prompt_stream(prompts()), stop=stop, max_new_tokens=NEW) == expected


def test_steps_yield_all_answers_and_lengthen_those_that_have_not_ended():
    llava = tiny_llava()
    whole = recompute_all(llava, prompts())
    stop = whole[1][3:5]
    ends = [whole_length(answer, stop) for answer in whole]
    assert len(set(ends)) > 1
    for step, answers in enumerate(llava.generate(*prompt_stream(prompts()), lambda ids: ids[-2:] == stop, NEW)):
        assert answers == [answer[: min(step + 1, end)] for answer, end in zip(whole, ends)]


def whole_length(answer, stop) -> int:
    """The length of an answer with the stop at which it ends; NEW if it has none."""
    return min(NEW, len(before_stop(answer, stop)) + len(stop))


def test_sampled_answers_depend_on_the_seed_and_not_on_the_neighbours():
    llava = tiny_llava()
    settings = dict(stop=[], max_new_tokens=NEW, temperature=1.5, top_p=0.9)
    answers = generated(llava, *prompt_stream(prompts()), seed=3, **settings)
    assert answers == generated(llava, *prompt_stream(prompts()), seed=3, **settings)
    assert answers != generated(llava, *prompt_stream(prompts()), seed=30, **settings)
    assert answers[:2] == generated(llava, *prompt_stream(prompts()[:2]), seed=3, **settings)
    settings["stop"] = [answers[0][2:3]]  # ends the first answer early: the others keep their own generators
    expected = [before_stop(answer, settings["stop"][0]) for answer in answers]
    assert generated(llava, *prompt_stream(prompts()), seed=3, **settings) == expected


def test_equal_prompts_have_generators_of_their_own():
    llava, (first, second, *_) = tiny_llava(), prompts()
    settings = dict(stop=[], max_new_tokens=NEW, temperature=1.0, seed=3)
    answers = generated(llava, *prompt_stream([first] * 3), **settings)
    assert len({tuple(answer) for answer in answers}) == 3
    beside = generated(llava, *prompt_stream([second, first]), **settings)
    assert beside[1] == answers[1] and beside[0] != answers[0]


# --- the choice of a token


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_their_probabilities(temperature):
    """Chi-square of 20,000 draws among 5 tokens, 4 degrees of freedom: exceeds 33.38 with probability 1e-6."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0])
    n = 20_000
    drawn = choose(logits.expand(n, 5), temperature, 1.0, [torch.Generator().manual_seed(0)] * n)
    expected = n * (logits / temperature).softmax(-1)
    counts = torch.tensor(drawn).bincount(minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 33.38


@pytest.mark.parametrize("top_p, expected", [
    (0.01, [3]), (0.49, [3]), (0.51, [3, 0]), (0.79, [3, 0]), (0.81, [3, 0, 2]), (0.99, [3, 0, 2, 1]),
    (1.0, [3, 0, 2, 1]),
])  # fmt: skip
def test_top_p_samples_among_the_fewest_tokens_that_hold_it(top_p, expected):
    """2,000 draws miss a token of probability 0.05 with probability under 1e-44."""
    p = torch.tensor([0.3, 0.05, 0.15, 0.5])
    drawn = choose(p.log().expand(2000, 4), 1.0, top_p, [torch.Generator().manual_seed(0)] * 2000)
    assert set(drawn) == set(expected)


def test_top_p_keeps_the_ratios_of_the_probabilities():
    """20,000 draws between 5/8 and 3/8: 12,500 +- 335 of the first (4.9 deviations, probability 1e-6)."""
    p = torch.tensor([0.3, 0.05, 0.15, 0.5])
    drawn = choose(p.log().expand(20_000, 4), 1.0, 0.6, [torch.Generator().manual_seed(0)] * 20_000)
    assert abs(drawn.count(3) - 12_500) <= 335


def test_a_temperature_of_zero_takes_the_most_likely_token():
    logits, rngs = torch.tensor([[0.0, 3, 1], [5, 3, 1]]), [torch.Generator(), torch.Generator()]
    assert choose(logits, 0.0, 0.5, []) == [1, 0]
    for temperature in (1e-5, 1e-38, 1e-39, 1e-300):  # 3 / 1e-39 and 1e-300 have no float32 value
        assert choose(logits, temperature, 1.0, rngs) == [1, 0]
