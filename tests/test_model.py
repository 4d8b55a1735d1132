"""model.py against `transformers` with the same weights, and against itself cut up, cached and batched otherwise."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from conftest import (VOCAB, error, flat, in_transformers, llama_twin, llava_twin, sample, samples, tiny_llama,
                      tiny_llava)  # fmt: skip

import model
from conversation import IMAGE_ID
from model import RMSNorm, choose, flat_attention, positions, rope_angles, rotate
from vision import normalize

TOLERANCE = 1e-4  # relative: what the project asks for (fp32 gives some 1e-6)
GQA = pytest.mark.parametrize("n_kv_heads", [4, 2, 1])


def hidden(llama, ids, cu_seqlens):
    attend = flat_attention(llama.config.n_layers, cu_seqlens)
    return llama(llama.tok_embeddings(ids), positions(cu_seqlens), attend)


def gradients(llava, *batches, **settings):
    """Loss and gradients of all that trains, of batches whose sums are divided once by the count over all."""
    llava.zero_grad()
    sums, counts = zip(*[llava(**batch, **settings) for batch in batches])
    loss = sum(sums) / sum(counts)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in llava.named_parameters() if p.requires_grad}


def assert_equal_gradients(a: dict, b: dict, tolerance: float = 1e-5):
    assert a.keys() == b.keys()
    assert {name: error(a[name], b[name]) for name in a if not error(a[name], b[name]) <= tolerance} == {}


# --- LLaMA


@GQA
def test_llama_is_that_of_transformers(n_kv_heads):
    """Logits, and the gradients of all weights."""
    llama = tiny_llama(n_kv_heads)
    twin = llama_twin(llama)
    ids = torch.randint(2, VOCAB, (40,), generator=torch.Generator().manual_seed(0))
    logits = llama.logits(hidden(llama, ids, torch.tensor([0, 40])))
    F.cross_entropy(logits[:-1], ids[1:]).backward()
    out = twin(ids[None])
    F.cross_entropy(out.logits[0, :-1], ids[1:]).backward()
    assert error(logits, out.logits[0]) <= TOLERANCE
    theirs = {name.removeprefix("model."): p.grad for name, p in twin.named_parameters()}
    ours = in_transformers(llama, lambda p: p.grad)
    assert_equal_gradients(ours, theirs, TOLERANCE)


def test_positions_far_along_are_those_of_transformers():
    """600 positions: beyond 256, an angle or a position held in bf16 is wrong."""
    llama = tiny_llama()
    ids = torch.randint(2, VOCAB, (600,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = llama.logits(hidden(llama, ids, torch.tensor([0, 600])))
        assert error(logits[-100:], llama_twin(llama)(ids[None]).logits[0, -100:]) <= TOLERANCE


def test_rope_turns_bf16_as_exactly_as_bf16_can_say():
    """Against complex numbers in fp64: no more than the one rounding to bf16, up to the last position."""
    x = torch.randn(2048, 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    t, i = torch.arange(2048.0, dtype=torch.float64), torch.arange(0, 64, 2, dtype=torch.float64)
    turn = torch.polar(torch.ones(2048, 1, 32).double(), (t[:, None] / 10000.0 ** (i / 64))[:, None])
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    exact = torch.view_as_real(pairs * turn).flatten(-2)
    with torch.autocast("cpu", torch.bfloat16):
        ours = rotate(x, *rope_angles(torch.arange(2048), 64, 10000.0))
    assert ours.dtype == torch.bfloat16
    length = pairs.abs().repeat_interleave(2, -1)  # of each pair: the scale of what fp32's angles are off by
    assert ((ours.double() - exact).abs() <= exact.abs() * 2**-8 + length * 5e-4).all()


@GQA
def test_a_flat_batch_is_its_samples_one_by_one(n_kv_heads):
    llama = tiny_llama(n_kv_heads)
    ids = torch.randint(2, VOCAB, (30,), generator=torch.Generator().manual_seed(0))
    borders = torch.tensor([0, 7, 8, 20, 30])
    together = hidden(llama, ids, borders)
    alone = [hidden(llama, ids[a:b], torch.tensor([0, b - a])) for a, b in pairwise(borders.tolist())]
    assert error(together, torch.cat(alone)) <= 1e-6


def test_positions():
    assert positions(torch.tensor([0, 3, 5], dtype=torch.int32)).tolist() == [0, 1, 2, 0, 1]
    assert positions(torch.tensor([0, 1, 4]), start=6).tolist() == [6, 6, 7, 8]


def test_rmsnorm_computes_in_fp32():
    """In fp16 the square of 300 is infinite, in bf16 the mean of many squares is coarse."""
    norm = RMSNorm(4096, 1e-6)
    assert norm(torch.full((1, 4096), 300.0, dtype=torch.float16)).tolist() == torch.ones(1, 4096).tolist()
    x = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    assert ((norm(x).double() - exact).abs() <= exact.abs() * 2**-8 + 1e-30).all(), "more than the one rounding to bf16"


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU, to walk the branch for those on a CPU."""

    is_cuda = True


def varlen_reference(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size, enable_gqa):
    """What the kernel is documented to do, in explicit softmax, the last rows lined up."""
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
@pytest.mark.parametrize("S", [0, 5])
def test_the_gpu_branch_asks_its_kernel_for_the_same_attention(n_kv_heads, S, monkeypatch):
    """The arguments only; the kernel itself needs a GPU. (float64, because the branch is not taken in float32.)"""
    dice = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(20, heads, 8, dtype=torch.float64, generator=dice) for heads in (4, n_kv_heads, n_kv_heads))
    prefix = [tuple(torch.randn(S, n_kv_heads, 8, dtype=torch.float64, generator=dice) for _ in "kv")] if S else None
    attend = flat_attention(1, torch.tensor([0, 6, 7, 20], dtype=torch.int32), prefix)[0]
    on_cpu = attend(q, k, v)
    calls = []
    monkeypatch.setattr(model, "varlen_attn", lambda *a, **s: calls.append(a) or varlen_reference(*a, **s))
    on_gpu = attend(*(t.as_subclass(OnGPU) for t in (q, k, v)))
    assert len(calls) == 1
    assert S or [t.data_ptr() for t in calls[0][:3]] == [t.data_ptr() for t in (q, k, v)], "nothing is copied"
    assert error(on_cpu, on_gpu.as_subclass(torch.Tensor)) <= 1e-12
    if S:  # and where the prefix stands in the stream
        before = torch.randn(S, 4, 8, dtype=torch.float64, generator=dice)
        q, k, v = (torch.cat([t, one]) for t, one in zip((before, *prefix[0]), (q, k, v)))
        in_stream = flat_attention(1, torch.tensor([0, 6, 7, 20], dtype=torch.int32), S)[0]
        alone = flat_attention(1, torch.tensor([0, S], dtype=torch.int32))[0](*(t[:S] for t in (q, k, v)))
        for wrap in (torch.Tensor, OnGPU):
            out = in_stream(*(t.as_subclass(wrap) for t in (q, k, v))).as_subclass(torch.Tensor)
            assert error(out, torch.cat([alone, on_cpu])) <= 1e-12


# --- LLaVA: the splice and the loss


def padded(batch: list) -> dict:
    """The samples as transformers takes them: a rectangle, a mask, labels -100 off green."""
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
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_are_those_of_transformers(n_kv_heads, seed):
    """Of W and of every weight of the LLM, on samples of mixed lengths, one of them without a picture."""
    llava = tiny_llava(n_kv_heads, seed)
    batch = samples(5)
    loss, ours = gradients(llava, flat(batch))
    twin = llava_twin(llava)
    theirs = twin(**padded(batch)).loss
    theirs.backward()
    named = {"W": twin.model.multi_modal_projector.weight.grad, "lm_head.weight": twin.lm_head.weight.grad}
    named |= {name: p.grad for name, p in twin.model.language_model.named_parameters()}
    ours = {"W": ours["projector.weight"]} | in_transformers(llava.llama, lambda p: p.grad)
    assert abs(loss - theirs) <= TOLERANCE * theirs
    assert_equal_gradients(ours, named, TOLERANCE)


def test_each_picture_goes_where_its_sample_has_it():
    llava = tiny_llava()
    batch = samples(4)
    x = llava.embed(**{key: flat(batch)[key] for key in ("ids", "pixels")})
    alone = [llava.embed(ids, pixels) for ids, _, pixels in batch]
    assert error(x, torch.cat(alone)) <= 1e-6
    ids, _, pixels = batch[0]
    W = llava.projector.weight
    H_v = torch.stack([W @ z for z in llava.vision(normalize(pixels))[0]])  # Eq. 1, a patch at a time
    assert error(alone[0][ids == IMAGE_ID], H_v) <= 1e-6
    assert torch.equal(alone[0][ids != IMAGE_ID], llava.llama.tok_embeddings.weight[ids[ids != IMAGE_ID]])


@pytest.mark.parametrize("change", ["a picture too many", "a picture too few", "a patch too few"])
def test_patches_and_features_must_be_as_many(change):
    batch = flat(samples(4))
    if change == "a picture too many":
        batch["pixels"] = torch.cat([batch["pixels"], batch["pixels"][:1]])
    elif change == "a picture too few":
        batch["pixels"] = batch["pixels"][1:]
    else:
        batch["ids"][(batch["ids"] == IMAGE_ID).nonzero()[0]] = 5
    with pytest.raises(AssertionError, match="as many"):
        tiny_llava()(**batch)


def test_logits_exist_at_green_positions_only():
    llava = tiny_llava()
    rows = []
    llava.llama.output.register_forward_hook(lambda module, args, out: rows.append(out.shape))
    batch = flat(samples(4))
    nll, count = llava(**batch)
    assert rows == [(int(batch["green"].sum()), VOCAB)]
    assert count == batch["green"].sum()


def test_the_loss_is_that_of_each_green_token_given_all_before_it():
    """Eq. 3 word for word: one sample, one green token at a time."""
    llava = tiny_llava()
    ids, green, pixels = samples(1)[0]
    log_p = []
    for t in green.nonzero().squeeze(1).tolist():
        x = llava.llama(llava.embed(ids[:t], pixels), torch.arange(t), flat_attention(2, torch.tensor([0, t])))
        log_p.append(llava.llama.logits(x)[-1].log_softmax(-1)[ids[t]])
    assert error(llava(**flat(samples(1)))[0], -sum(log_p)) <= 1e-5


def test_without_a_picture_W_has_a_gradient_and_it_is_zero():
    """So that in a distributed run a rank whose batch is all text still takes part."""
    llava = tiny_llava(stage=1)
    _, grads = gradients(llava, flat(samples(4)[2:3]))
    assert grads["projector.weight"].count_nonzero() == 0


def test_a_batch_without_green_is_a_zero_loss_with_gradients():
    llava = tiny_llava(stage=1)
    batch = flat(samples(4))
    nll, count = llava(**batch | {"green": torch.zeros_like(batch["green"])})
    nll.backward()
    assert (nll, count) == (0, 0) and llava.projector.weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_global_batch_may_be_cut_in_any_way(stage):
    """Micro-batches hold different numbers of green tokens: a mean of means would differ."""
    llava = tiny_llava(stage=stage)
    batch = samples(8)
    batch[1][1][:-1] = False
    batch[5][1][3:] = True
    batch[5][1][batch[5][0] == IMAGE_ID] = False
    loss, whole = gradients(llava, flat(batch))
    for size in (1, 2, 3, 4):
        cut_loss, cut = gradients(llava, *[flat(batch[i : i + size]) for i in range(0, 8, size)])
        assert abs(cut_loss - loss) <= 1e-5 * loss
        assert_equal_gradients(cut, whole)


PREFIX = torch.tensor([1, 20, 30, 40, 50, 60])


def with_prefix(batch: list) -> list:
    """The samples whole: the shared first ids written out before each."""
    off = torch.zeros(len(PREFIX), dtype=torch.bool)
    return [(torch.cat([PREFIX, ids]), torch.cat([off, green]), pixels) for ids, green, pixels in batch]


def test_a_prefix_read_once_changes_neither_loss_nor_gradient_of_W():
    llava = tiny_llava(stage=1)
    loss, whole = gradients(llava, flat(with_prefix(samples(5))))
    read = llava.read_prefix(PREFIX)
    assert not any(t.requires_grad for kv in read for t in kv)
    cut_loss, cut = gradients(llava, flat(samples(5)), prefix=read)
    assert abs(cut_loss - loss) <= 1e-5 * loss
    assert_equal_gradients(cut, whole)


def test_a_prefix_read_in_the_batch_has_its_gradient():
    llava = tiny_llava(stage=2)
    loss, whole = gradients(llava, flat(with_prefix(samples(5))))
    cut_loss, cut = gradients(llava, flat(samples(5)), prefix=PREFIX)
    assert abs(cut_loss - loss) <= 1e-5 * loss
    assert_equal_gradients(cut, whole)


@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_checkpointed_activations_give_the_same_gradients(prefix):
    llava = tiny_llava(stage=2)
    runs = []
    llava.llama.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    _, plain = gradients(llava, flat(samples(5)), prefix=prefix)
    once = len(runs)
    llava.llama.checkpoint_activations = True
    _, checkpointed = gradients(llava, flat(samples(5)), prefix=prefix)
    assert len(runs) == 3 * once, "each layer must run again in the backward pass"
    assert_equal_gradients(checkpointed, plain, 1e-6)


def test_bf16_autocast_is_as_near_to_fp32_as_that_of_transformers():
    llava, batch = tiny_llava(stage=1), samples(5)
    W, twin = llava.projector.weight, llava_twin(llava)
    twin_W = twin.model.multi_modal_projector.weight
    exact, _ = gradients(llava, flat(batch))
    exact_W = W.grad.clone()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = gradients(llava, flat(batch))
        theirs = twin(**padded(batch)).loss
    theirs.backward()
    assert loss.dtype == torch.float32 and 0 < abs(loss - exact) <= 0.01 * exact
    assert error(W.grad, exact_W) <= 2 * error(twin_W.grad, exact_W) <= 0.2


def test_frozen_weights_held_in_bf16_train_W_and_answer():
    """How stage 1 runs on a GPU: the ViT and the LLM in bf16, W in fp32, under autocast."""
    llava, batch = tiny_llava(stage=1), flat(samples(5))
    _, exact = gradients(llava, batch)
    llava.vision.bfloat16()
    llava.llama.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, near = gradients(llava, batch)
        answers = llava.answers(**prompt_batch(prompts()), stop=[-7], max_new_tokens=NEW)
    assert loss.dtype == near["projector.weight"].dtype == torch.float32
    assert error(near["projector.weight"], exact["projector.weight"]) <= 0.2
    assert [len(answer) for answer in answers] == [NEW] * 4


def test_a_llama_held_in_bf16_still_has_its_loss_in_fp32():
    llava, batch = tiny_llava(), flat(samples(5))
    exact, _ = llava(**batch)
    llava.llama.bfloat16()
    loss, _ = llava(**batch)
    assert loss.dtype == torch.float32 and abs(loss - exact) <= 0.02 * exact


# --- what trains


@pytest.mark.parametrize("stage, trains", [(1, {"projector"}), (2, {"projector", "llama"})])
def test_what_trains(stage, trains):
    """The truth table, bit for bit after two steps; the optimiser is given more than it should use."""
    llava = tiny_llava(stage=2)
    parameters = llava.set_trainable(stage)
    named = dict(llava.named_parameters())
    ours = {name for name in named if name.split(".")[0] in trains}
    assert {name for name, p in named.items() if p.requires_grad} == ours
    assert {id(p) for p in parameters} == {id(named[name]) for name in ours} and len(parameters) == len(ours)
    before = {name: p.detach().clone() for name, p in named.items()}
    optimiser = torch.optim.AdamW(llava.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        gradients(llava, flat(samples(4)))
        optimiser.step()
    assert {name for name, p in named.items() if not torch.equal(p, before[name])} == ours


def test_the_vit_never_gets_a_gradient():
    """Not even one left unfrozen by mistake."""
    llava = tiny_llava(stage=2)
    llava.vision.requires_grad_(True)
    nll, _ = llava(**flat(samples(4)))
    nll.backward()
    assert all(p.grad is None for p in llava.vision.parameters())


# --- generation

NEW = 12  # tokens an answer


def prompts() -> list:
    """Four prompts of different lengths, three with a picture."""
    return [sample(length, where, 10 + i) + (pixels,) for i, (length, where, (_, _, pixels)) in
            enumerate(zip((11, 19, 14, 10), (3, 9, None, 1), samples(4)))]  # fmt: skip


def prompt_batch(prompts: list) -> dict:
    batch = flat(prompts)
    return {key: batch[key] for key in ("ids", "cu_seqlens", "pixels")}


def recomputed(llava, ids, pixels, n: int) -> list[int]:
    """Greedy, everything computed again for every token."""
    said = []
    for _ in range(n):
        so_far = torch.cat([ids, torch.tensor(said, dtype=torch.long)])
        with torch.no_grad():
            attend = flat_attention(2, torch.tensor([0, len(so_far)]))
            x = llava.llama(llava.embed(so_far, pixels), torch.arange(len(so_far)), attend)
        said.append(int(llava.llama.logits(x[-1:]).argmax()))
    return said


def until(said: list[int], stop: list[int]) -> list[int]:
    ends = [i for i in range(len(said)) if said[i : i + len(stop)] == stop]
    return said[: ends[0]] if ends else said


@GQA
def test_greedy_answers_are_those_of_transformers(n_kv_heads, monkeypatch):
    """Token for token, batched here, one at a time there and without a cache; the cache grows on the way."""
    monkeypatch.setattr(model.KVCache, "ROOM", 5)
    llava = tiny_llava(n_kv_heads)
    twin = llava_twin(llava)
    answers = llava.answers(**prompt_batch(prompts()), stop=[-7], max_new_tokens=NEW)
    assert [len(answer) for answer in answers] == [NEW] * 4 and len({tuple(answer) for answer in answers}) == 4
    for (ids, _, pixels), answer in zip(prompts(), answers):
        given = dict(input_ids=ids.where(ids != IMAGE_ID, VOCAB - 1)[None], attention_mask=torch.ones(1, len(ids)))
        given |= dict(pixel_values=normalize(pixels)) if len(pixels) else {}
        theirs = twin.generate(**given, max_new_tokens=NEW, do_sample=False)
        assert answer == theirs[0, len(ids) :].tolist()
        assert answer == recomputed(llava, ids, pixels, NEW)
        assert [answer] == llava.answers(**prompt_batch([(ids, _, pixels)]), stop=[-7], max_new_tokens=NEW)


@pytest.mark.parametrize("length", [1, 2])
def test_each_answer_ends_at_its_own_stop(length):
    """Stops of one and two tokens, taken from what is said: some prompts end, at different steps, some never."""
    llava = tiny_llava()
    whole = [recomputed(llava, ids, pixels, NEW) for ids, _, pixels in prompts()]
    seen = set()
    for stop in {tuple(said[i : i + length]) for said in whole for i in range(NEW - length + 1)}:
        expected = [until(said, list(stop)) for said in whole]
        assert llava.answers(**prompt_batch(prompts()), stop=list(stop), max_new_tokens=NEW) == expected
        seen.add(tuple(len(answer) for answer in expected))
    assert any(len(set(lengths) - {NEW}) == 2 for lengths in seen) or length == 2, "two that end at different steps"
    assert any(set(lengths) > {NEW} for lengths in seen)


def test_steps_yield_the_tokens_of_stop_too_and_only_who_still_speaks():
    llava = tiny_llava()
    whole = [recomputed(llava, ids, pixels, NEW) for ids, _, pixels in prompts()]
    stop = whole[1][3:5]
    steps = list(llava.generate(**prompt_batch(prompts()), stop=stop, max_new_tokens=NEW))
    for i, said in enumerate(whole):
        heard = until(said, stop)
        heard = said[: len(heard) + len(stop)]
        assert [step[i] for step in steps if i in step] == heard
        assert all(i in step for step in steps[: len(heard)])


def test_answers_after_a_prefix_are_those_of_the_whole_prompt():
    llava = tiny_llava()
    with torch.no_grad():
        prefix = llava.read_prefix(PREFIX)
    expected = llava.answers(**prompt_batch(with_prefix(prompts())), stop=[-7], max_new_tokens=NEW)
    assert llava.answers(**prompt_batch(prompts()), stop=[-7], max_new_tokens=NEW, prefix=prefix) == expected
    stop = expected[2][4:6]
    expected = [until(answer, stop) for answer in expected]
    assert llava.answers(**prompt_batch(prompts()), stop=stop, max_new_tokens=NEW, prefix=prefix) == expected


def test_sampled_answers_are_seeded_and_do_not_depend_on_their_neighbours():
    llava = tiny_llava()
    settings = dict(stop=[-7], max_new_tokens=NEW, temperature=1.5, top_p=0.9)
    answers = llava.answers(**prompt_batch(prompts()), seed=3, **settings)
    assert answers == llava.answers(**prompt_batch(prompts()), seed=3, **settings)
    assert answers != llava.answers(**prompt_batch(prompts()), seed=30, **settings)
    assert answers[:2] == llava.answers(**prompt_batch(prompts()[:2]), seed=3, **settings)
    stop = answers[0][2:3]  # the first falls silent early: the others must keep their own dice
    expected = [until(answer, stop) for answer in answers]
    assert llava.answers(**prompt_batch(prompts()), seed=3, **settings | {"stop": stop}) == expected


def test_equal_prompts_draw_differently_whoever_stands_beside_them():
    llava, (first, second, *_) = tiny_llava(), prompts()
    settings = dict(stop=[-7], max_new_tokens=NEW, temperature=1.0, seed=3)
    answers = llava.answers(**prompt_batch([first] * 3), **settings)
    assert len({tuple(answer) for answer in answers}) == 3
    beside = llava.answers(**prompt_batch([second, first]), **settings)
    assert beside[1] == answers[1] and beside[0] != answers[0]


def test_a_step_asks_the_device_for_the_longest_row_once(monkeypatch):
    """Each `int` of a tensor on a GPU waits for it: one for the patches, then one for the cache and one a step."""
    asked, number = [], torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda t: asked.append(t) or number(t), raising=False)
    counts = []
    for steps in (5, 9):
        asked.clear()
        tiny_llava().answers(**prompt_batch(prompts()), stop=[-7], max_new_tokens=steps)
        counts.append(len(asked))
    assert counts[1] - counts[0] == 4


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_likely_as_they_are(temperature):
    """Chi-square of 20,000 draws among 5 tokens, 4 degrees of freedom: over 33.38 with probability 1e-6."""
    logits = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0])
    n = 20_000
    drawn = choose(logits.expand(n, 5), temperature, 1.0, [torch.Generator().manual_seed(0)] * n)
    expected = n * (logits / temperature).softmax(-1)
    counts = torch.tensor(drawn).bincount(minlength=5)
    assert ((counts - expected) ** 2 / expected).sum() < 33.38


@pytest.mark.parametrize("top_p, kept", [(0.01, [3]), (0.49, [3]), (0.51, [3, 0]), (0.79, [3, 0]), (0.81, [3, 0, 2]),
                                         (0.99, [3, 0, 2, 1]), (1.0, [3, 0, 2, 1])])  # fmt: skip
def test_top_p_keeps_the_fewest_tokens_that_hold_it(top_p, kept):
    """2,000 draws: the likelihood that a kept token (at least 1 in 20) is not among them is under 1e-44."""
    p = torch.tensor([0.3, 0.05, 0.15, 0.5])
    drawn = choose(p.log().expand(2000, 4), 1.0, top_p, [torch.Generator().manual_seed(0)] * 2000)
    assert set(drawn) == set(kept)


def test_top_p_keeps_the_ratios():
    """1e-6: of 20,000 draws between 5/8 and 3/8, 12,500 +- 335 (4.9 standard deviations)."""
    p = torch.tensor([0.3, 0.05, 0.15, 0.5])
    drawn = choose(p.log().expand(20_000, 4), 1.0, 0.6, [torch.Generator().manual_seed(0)] * 20_000)
    assert abs(drawn.count(3) - 12_500) <= 335


def test_temperature_zero_takes_the_likeliest():
    logits, dice = torch.tensor([[0.0, 3, 1], [5, 3, 1]]), [torch.Generator(), torch.Generator()]
    assert choose(logits, 0.0, 0.5, []) == [1, 0]
    for temperature in (1e-5, 1e-38, 1e-39, 1e-300):  # fp32 has no 3 / 1e-39, nor 1e-300
        assert choose(logits, temperature, 1.0, dice) == [1, 0]
