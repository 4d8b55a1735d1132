"""demo/build.py: the recipe still fits the backbones that it made, and they can do what their lessons taught."""

import collections
import dataclasses
import random

import numpy as np
from functools import partial

import pytest
import torch

import checkpoint
import data
from common import UserError
from conversation import IMAGE_ID, answer_text, has_ended, load_tokenizer, system_ids
from formats.pictures import open_picture
from formats.tensors import load_weights
from demo import build, wide, world
from demo.exam import mean_caption_score
from eval_scienceqa import ask, letter
from model import LLaMA, StreamAttention, position_ids

N_PATCHES = wide.PATCHES_ACROSS**2


@pytest.fixture(scope="module")
def sp():
    return load_tokenizer(world.LLAMA / "tokenizer.model")


@pytest.fixture(scope="module")
def untrained():
    """The backbones, joined by a random W."""
    return checkpoint.build(checkpoint.load_llama(world.LLAMA), checkpoint.load_vision(world.VISION))


def test_the_llama_looks_things_up_in_a_scene_described_in_words(sp, untrained):
    """It was trained on text alone, and its answers depend on their context."""
    rng, encoder = random.Random(3), data.Encoder(sp, N_PATCHES, world.PIXELS)
    scenes = [world.draw_scene(rng, held_out=True) for _ in range(40)]
    samples = []
    for scene in scenes:
        text = build.encode_text(sp, [f"<image>\n{data.REQUESTS[0]}"], build.describe_in_words(scene, rng))
        after_system = slice(len(encoder.system), None)
        samples.append(data.Sample(text.ids[after_system, 0], text.green[after_system]))
    ids, _, borders, pixels = encoder.stream(samples).to(torch.device("cpu"))
    *_, answers = untrained.generate(ids, borders, pixels, partial(has_ended, sp), max_new_tokens=48)
    captions = [answer_text(sp, answer) for answer in answers]
    assert mean_caption_score(captions, scenes)["all"] > 0.9
    assert mean_caption_score(captions, scenes[1:] + scenes[:1])["all"] < 0.5


def test_the_llama_knows_letters_and_facts(sp, untrained):
    """It solves the problems of the quiz that come with a text."""
    rng, problems = random.Random(4), []
    for i in range(60):
        problem = world.text_problems(world.SUBJECTS[i % 3], rng)[0]
        problems.append(problem | dict(id=str(i), image_path=None))
    prompts = [data.Example(p["id"], [data.scienceqa_question(p)]) for p in problems]
    answers = ask(untrained, data.Encoder(sp, N_PATCHES, world.PIXELS), prompts, 64)
    right = [p["solution"] in answer and letter(answer, len(p["choices"])) == p["answer"] for p, answer in zip(problems, answers)]
    assert sum(right) > 54


def test_single_patches_of_the_vit_tell_what_they_show():
    shares = build.probe(world.VISION, n=150)
    least = {"size": 0.98, "colour": 0.98, "shape": 0.98, "place": 0.9, "any size": 0.75, "any colour": 0.9, "any shape": 0.5,
             "any style": 0.85}  # fmt: skip
    assert all(shares[attribute] > share for attribute, share in least.items()), shares


def test_the_recipe_gives_the_tokenizer_beside_it(tmp_path):
    """It depends on every text of the world and the drills: if one changes, the backbones have to be built again."""
    path = tmp_path / "new" / "tokenizer.model"
    build.train_tokenizer(path)
    assert path.read_bytes() == (world.LLAMA / "tokenizer.model").read_bytes()


def test_lessons_ask_for_what_their_text_decides(sp):
    rng, system = random.Random(5), system_ids(sp)
    for lesson in build.LESSONS:
        for progress in (0.0, 0.5, 0.9) * 20:
            text = lesson.draw(sp, rng, progress)
            ids, green = text.ids[:, 0].tolist(), np.flatnonzero(text.green)
            assert text.ids.shape == text.weights.shape == (len(ids), build.MAX_WORDS)
            start = len(system) if lesson.system else 0
            assert ids[:start] == system[:start] and len(green) and green[0] > start
            if lesson.name == "repeat":  # the pair of the piece before and this one stands earlier in the text
                assert all(ids.index(ids[i]) == ids.index(ids[i - 1]) + 1 for i in green)
            if "facts" in lesson.name:  # the word stands earlier in the text
                assert all(ids.count(ids[i]) == 2 for i in green)


def test_the_lesson_about_scenes_practises_the_ones_before(sp):
    """Half of the practice texts ask for letters, the other half for facts. In the others, sentences answer questions."""
    rng, system, counts = random.Random(10), system_ids(sp), collections.Counter()
    for _ in range(400):
        text = build.find_things(sp, rng, 0.5)
        ids, green = text.ids[:, 0].tolist(), text.green
        if ids[: len(system)] == system:
            counts["letters"] += 1
        elif text.weights[:, 1].any():  # a position of several words belongs to a scene
            counts["scenes"] += 1
            borders = np.flatnonzero(np.diff(green, prepend=False, append=False)).tolist()
            for start, end in zip(borders[::2], borders[1::2]):
                assert sp.decode(ids[:start]).endswith("?") and sp.decode(ids[start:end]).endswith(".")
        else:
            counts["facts"] += 1
    assert 25 < counts["letters"] < 80 and 25 < counts["facts"] < 80 and counts["scenes"] > 250


def test_descriptions_name_every_thing_and_take_the_patches_positions(sp):
    rng = random.Random(6)
    for describe in (build.describe_in_words, build.describe_in_mixtures, build.describe_in_sums):
        for draw_scene in (world.draw_scene, wide.draw_scene) * 25:
            scene = draw_scene(rng)
            description = describe(scene, rng)
            words = {word for position in description for word, _ in position}
            assert words >= {t.place for t in scene} and (describe is build.describe_in_mixtures or words >= {t.shape for t in scene})
            text = build.encode_text(sp, ["<image>\nWhat?", "This."], description)
            assert IMAGE_ID not in text.ids
            first = len(system_ids(sp)) + 1  # after a space
            for ids, weights, position in zip(text.ids[first:], text.weights[first:], description):
                assert [(sp.id_to_piece(int(id))[1:], weight) for id, weight in zip(ids, weights)][: len(position)] == [
                    (word, pytest.approx(weight)) for word, weight in position]  # fmt: skip
                assert not weights[len(position) :].any()


@pytest.mark.parametrize("borders", [[0, 4, 5, 17], [6, 9, 21, 22, 30], [3, 8]])
def test_padded_attention_equals_stream_attention(borders):
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(borders[-1], 4, 8, generator=rng, requires_grad=True) for _ in range(3))
    outs, gradients = [], []
    for attention in (StreamAttention, build.PaddedAttention):
        out = attention(borders)(q, k, v, 0)
        outs.append(out)
        gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*gradients)


def test_the_loss_of_texts_is_that_of_each_text_alone(sp):
    """Also with the system message only once in the stream."""
    torch.manual_seed(0)
    llama = LLaMA(dataclasses.replace(build.LLAMA_CONFIG, n_layers=2))
    rng = random.Random(7)
    texts = [build.read_everything(sp, rng, 0.5) for _ in range(4)]
    word_weights = torch.rand(build.VOCAB)
    loss, right = build.loss_of_texts(llama, texts, len(system_ids(sp)), word_weights)
    total, importance = 0.0, 0.0
    for text in texts:
        ids, weights = torch.from_numpy(text.ids), torch.from_numpy(text.weights)
        x = (llama.tok_embeddings(ids) * weights[..., None]).sum(1)
        borders = [0, len(ids)]
        logits = llama.logits(llama(x, position_ids(borders), StreamAttention(borders)))
        target = torch.from_numpy(text.green).nonzero().squeeze(1)
        nll = torch.nn.functional.cross_entropy(logits[target - 1], ids[target, 0], reduction="none")
        total += (nll * word_weights[ids[target, 0]]).sum().item()
        importance += word_weights[ids[target, 0]].sum().item()
    assert loss.item() == pytest.approx(total / importance, rel=0.01) and 0 <= right <= 1  # computed in bf16


def test_lessons_and_the_vit_train(monkeypatch):
    """Two steps change every weight of the LLaMA; the ViT's weights have the names of the file beside the recipe."""
    lesson = dataclasses.replace(build.LESSONS[0], steps=2, batch_size=8)
    monkeypatch.setattr(build, "LESSONS", [lesson])
    before = build.new_llama().state_dict()
    tokenizer = world.LLAMA / "tokenizer.model"
    after = build.train_llama(tokenizer).state_dict()
    assert before.keys() == after.keys() == checkpoint.load_llama(world.LLAMA).state_dict().keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    monkeypatch.setattr(build, "VIT_STEPS", 2)
    monkeypatch.setattr(build, "VIT_BATCH", 16)
    monkeypatch.setattr(build, "WIDE_BATCH", 8)
    weights = build.train_vit(tokenizer)
    assert weights.keys() == load_weights(world.VISION).keys()
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_neighbours_differ_in_one_attribute_of_one_thing():
    rng = random.Random(8)
    for _ in range(40):
        scene = world.draw_scene(rng)
        family = build.neighbours(scene, build.FAMILY, rng)
        assert family[0] == scene and len(set(family)) == build.FAMILY
        for other in family[1:]:
            assert world.is_scene(other) and not world.is_held_out(other) and len(other) == len(scene)
            changed = set(scene) - set(other), set(other) - set(scene)
            ((old,), (new,)) = changed
            assert sum(vars(old)[name] != vars(new)[name] for name in world.ATTRIBUTES) == 1


def test_the_patch_loss_compares_a_patch_with_its_own_thing():
    """The loss of six pictures is the mean of their own losses: over patches of things, and over all for the pixels."""
    torch.manual_seed(0)
    rng, model = random.Random(9), build.Contrast()
    pictures, shown = zip(*(wide.draw_picture(wide.draw_scene(rng), rng) for _ in range(6)))
    pixels = build.to_pixels(pictures)
    patches = torch.randn(6, N_PATCHES, build.VISION_CONFIG.width)
    by_pixels = (model.pixel_head(patches) - build.coarse_patches(pixels)).square().mean(dim=(1, 2))
    total, n_patches = 0, 0
    for i, (s, of_pixels) in enumerate(zip(shown, by_pixels)):
        one = slice(i, i + 1)
        of_thing = model.patch_loss(patches[one], pixels[one], shown[one]) - of_pixels
        total += of_thing * (s.thing >= 0).sum()
        n_patches += (s.thing >= 0).sum()
    torch.testing.assert_close(model.patch_loss(patches, pixels, shown), total / n_patches + by_pixels.mean())


def test_coarse_patches_are_in_the_order_of_the_vits():
    pixels = torch.zeros(1, 3, world.PIXELS, world.PIXELS, dtype=torch.uint8)
    pixels[0, 1, 8:16, 16:24] = 255  # green, in the second row and third column of patches
    brighter = build.coarse_patches(pixels)[0].unflatten(1, (3, -1)) > 0
    assert brighter.nonzero()[:, :2].unique(dim=0).tolist() == [[wide.PATCHES_ACROSS + 2, 1]]


def test_build_writes_folders_that_load(sp, monkeypatch, tmp_path):
    """With the training replaced by its start: the files, their names and their precision."""
    monkeypatch.setattr(build, "train_both", lambda tokenizer: (build.new_llama(), load_weights(world.VISION)))
    monkeypatch.setattr(build, "probe", lambda path: {"size": 1.0})
    build.build(tmp_path)
    llama, vision = tmp_path / world.LLAMA.name, tmp_path / world.VISION.name
    assert checkpoint.load_llama(llama, None).config == build.LLAMA_CONFIG
    assert {p.dtype for p in checkpoint.load_llama(llama, None).parameters()} == {torch.float16}
    assert checkpoint.load_vision(vision).config == build.VISION_CONFIG
    checkpoint.open_tokenizer(llama / "tokenizer.model", build.LLAMA_CONFIG)


def test_a_finished_chatbot_is_copied_in_half_the_bits(sp, untrained, tmp_path):
    """The copy answers like the run, and its size is that of the LLaMA in fp16."""
    weights = {name: p.detach() for name, p in untrained.named_parameters() if not name.startswith("vision.")}
    config = dict(stage=2, template="vicuna_v0", precision="fp32", feature_layer=-2, settings={"task": "chat"})
    save = (untrained.llama.config, weights, config, world.VISION, world.LLAMA / "tokenizer.model")
    checkpoint.save_run(tmp_path / "run", *save)
    with pytest.raises(UserError, match="not a run of the demo"):
        build.keep_chat(tmp_path / "run", tmp_path)
    config["settings"]["demo"] = True
    checkpoint.save_run(tmp_path / "run", *save)
    build.keep_chat(tmp_path / "run", tmp_path)
    copy, _, copied = checkpoint.load_run(tmp_path / "chat")
    assert copied == config and sum(path.stat().st_size for path in (tmp_path / "chat").iterdir()) < 2.5e6
    for name, p in copy.named_parameters():
        assert name.startswith("vision.") or torch.equal(p, weights[name].half().float()), name
    assert open_picture((tmp_path / "scene.png").read_bytes()).size == (world.PIXELS, world.PIXELS)
