"""demo/world.py: the world is consistent, its data is reproducible, and train.py can read it."""

import argparse
import hashlib
import json
import random
import re

import numpy as np
import pytest

import data
from common import UserError
from conversation import load_tokenizer
from demo import world
from formats.pictures import Pictures, open_picture
from formats.records import read_scienceqa

SMALL = dict(CAPTIONED=300, HELD_OUT=20, QUIZ=dict(train=300, val=10, test=200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "data"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(world, name, value)
        world.prepare(folder)
    return folder


@pytest.fixture
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(world, name, value)


def scenes(n, held_out=False, seed=0):
    rng = random.Random(seed)
    return [world.draw_scene(rng, held_out) for _ in range(n)]


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_demo_answers_the_questions_that_chat_suggests():
    rng, asked = random.Random(0), set()
    for _ in range(3000):
        scene = world.draw_scene(rng)
        asked |= {ask(scene, rng).question for ask in (world.short_question, world.detail, world.reasoning)}
    suggested = world.TOPICS["chat"].partition("Ask: ")[2]
    questions = [q.strip() for q in re.split(r"(?<=[?.]) ", suggested)]
    assert len(questions) == 4 and set(questions) <= asked
    words = (*world.SIZES, *world.COLOURS, *world.SHAPES)
    assert all(re.search(rf"\b{word}(s|es)?\b", world.KNOWN) for word in words)
    assert all(len(line) <= 120 and len(text.split("\n")) <= 2 for text in world.TOPICS.values() for line in text.split("\n"))


def test_a_picture_shows_its_scene():
    """The middle of a thing's place has its colour, a big thing covers more pixels, and the other places are pale."""
    rng = random.Random(1)
    for scene in scenes(60):
        image = np.asarray(world.draw_picture(scene, rng), dtype=int)
        assert image.shape == (world.PIXELS, world.PIXELS, 3)
        for row, column in np.ndindex(3, 3):
            cell = image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            things = [t for t in scene if world.PLACES.index(t.place) == 3 * row + column]
            pale = cell.min(axis=2) > 190
            if not things:
                assert pale.mean() > 0.9  # the edge of a neighbour may reach in
                continue
            assert abs(cell[7:9, 7:9].mean(axis=(0, 1)) - world.RGB[things[0].colour]).max() < 40
            assert (~pale).sum() > (60 if things[0].size == "big" else 20)


def test_shapes_cover_different_areas():
    """Of the same size: a triangle less than a cross, a cross less than a circle and a square."""
    areas = {}
    for shape in world.SHAPES:
        image = np.asarray(world.draw_picture((world.Thing("big", "black", shape, "centre"),), random.Random(2)))
        areas[shape] = int((image.max(axis=2) < 120).sum())
    assert 50 < areas["triangle"] < areas["cross"] < min(areas["circle"], areas["square"])


def test_a_question_has_one_answer_in_each_scene():
    rng = random.Random(2)
    for scene in scenes(200):
        answers = {}
        for _ in range(40):
            for turn in (world.short_question(scene, rng), world.reasoning(scene, rng)):
                assert answers.setdefault(turn.question, turn) == turn
        for thing in scene:
            turns = [world.follow_up(thing, rng) for _ in range(20)]
            assert len({turn.question.removeprefix("And ").lower() for turn in turns}) == len(
                {(turn.question.removeprefix("And ").lower(), turn.answer) for turn in turns})  # fmt: skip


def test_it_is_the_thing_that_the_answer_is_about():
    scene = (world.Thing("big", "red", "circle", "top"), world.Thing("small", "blue", "cross", "left"))
    rng = random.Random(4)
    turns = {turn.question: turn for turn in (world.short_question(scene, rng) for _ in range(3000))}
    for question, answer, it in (
        ("What is at the left?", "A small blue cross.", 1), ("What is at the right?", "Nothing is there.", None),
        ("What colour is the circle?", "It is red.", 0), ("What shape is the blue thing?", "It is a cross.", 1),
        ("How big is the red circle?", "It is big.", 0), ("How many things are there?", "There are two.", None),
        ("Is there a blue cross?", "Yes, there is a blue cross.", 1), ("Is there a dog?", "No, I see no dog.", None),
        ("Is there a red cross?", "No, I see no red cross.", None), ("Where is the dog?", "I see no dog.", None),
    ):  # fmt: skip
        assert turns[question] == (question, answer, None if it is None else scene[it])
    follow_ups = {turn.question: turn.answer for turn in (world.follow_up(scene[1], rng) for _ in range(500))}
    assert follow_ups["Where is it?"] == follow_ups["And where is it?"] == "It is at the left."
    assert follow_ups["Is it blue?"] == "Yes, it is blue." and follow_ups["Is it red?"] == "No, it is blue."


def test_conversations_mix_kinds_in_any_order():
    """And a follow-up comes only after a turn about one thing."""
    rng, orders, referring = random.Random(5), set(), 0
    requests = {world.detail(scene, rng).question for scene in scenes(50)}
    for scene in scenes(400):
        for kind in world.KINDS:
            kinds = world.draw_kinds(kind, rng)
            turns = world.conversation(scene, kinds, rng)
            assert kind in kinds and len(set(turns)) == len(turns)
            orders |= {(a.question in requests, b.question in requests) for a, b in zip(turns, turns[1:])}
            for before, turn in zip((world.Turn("", ""), *turns), turns):
                if "it" in turn.question.rstrip("?").lower().split():
                    referring += 1
                    assert before.it is not None and turn.it == before.it
    assert len(orders) >= 3 and referring > 200


def test_reasoning_concludes_what_the_scene_shows():
    scene = (world.Thing("big", "red", "circle", "top"), world.Thing("small", "blue", "cross", "left"))
    rng, answers = random.Random(3), {}
    for _ in range(100):
        turn = world.reasoning(scene, rng)
        answers[turn.question] = turn.answer
    assert len(answers) == 2 + 2 + 4 * 2
    facts = "The red circle is at the top and the blue cross is at the left. "
    assert answers["Which thing is nearest to the left edge, and why?"] == f"{facts}So the blue cross is nearest to the left edge."
    assert answers["Which thing is nearest to the top edge, and why?"] == f"{facts}So the red circle is nearest to the top edge."
    assert answers["Which thing is the biggest, and why?"] == "The red circle is big and the blue cross is small. So it is the red circle."
    assert answers["Are more things big or small, and why?"] == "Big: one. Small: one. So there are as many of each."


def test_the_data_is_what_train_reads(folder):
    examples = data.Examples([folder / f"{name}.json" for name in ("conversation", "detail", "reasoning")])
    assert len(examples) == 3 * SMALL["CAPTIONED"] and set(examples.types()) == {0, 1, 2}
    assert max(len(example.turns) for example in examples) > 2
    captions = data.Examples([folder / "captions.json"])
    assert len(captions) == SMALL["CAPTIONED"]
    first = {example.turns[0].startswith("<image>") for example in examples}
    assert first == {True, False}  # Eq. 2
    pictures = Pictures(folder / "images")
    for example in (*examples, *captions):
        assert open_picture(pictures.read(example.image)).size == (world.PIXELS, world.PIXELS)


def test_the_data_is_the_same_each_time(folder, small, tmp_path):
    world.prepare(tmp_path / "again")
    assert content(tmp_path / "again") == content(folder)


def test_the_texts_of_a_recipe_never_change(folder):
    """The backbones were trained on this world. A deliberate change needs a new RECIPE, and then this digest."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.json")):
        digest.update(path.read_bytes())
    assert (world.RECIPE, digest.hexdigest()[:16]) == ("scenes6", "74fb6d9f744965d0")


def test_complete_data_is_not_drawn_again(folder, small):
    before = (folder / "recipe.json").stat().st_mtime_ns
    world.prepare(folder)
    assert (folder / "recipe.json").stat().st_mtime_ns == before


def test_data_of_another_recipe_is_replaced(small, monkeypatch, tmp_path):
    monkeypatch.setattr(world, "QUIZ", dict(train=2))
    world.prepare(tmp_path / "data")
    monkeypatch.setattr(world, "CAPTIONED", 3)
    (tmp_path / "data.partial" / "images").mkdir(parents=True)  # a process that was killed left this
    (tmp_path / "data.partial" / "images" / "old.png").touch()
    world.prepare(tmp_path / "data")
    assert len(json.loads((tmp_path / "data" / "captions.json").read_text())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["data"] and not (tmp_path / "data/images/old.png").exists()


def test_folders_and_files_of_others_are_refused(small, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UserError, match="holds no data of the demo"):
            world.prepare(path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_written_ends_in_one_line(small, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written"):
        world.prepare(tmp_path / "file" / "data")


def test_the_quiz_is_scienceqa_in_all_its_categories(folder):
    for split, count in SMALL["QUIZ"].items():
        problems = read_scienceqa(folder / "scienceqa", split)[0]
        assert len(problems) == count
        if count < 100:
            continue
        assert {p["subject"] for p in problems} == set(world.SUBJECTS)
        assert {bool(p["image"]) for p in problems} == {bool(p["hint"]) for p in problems} == {True, False}
        assert any(not p["image"] and not p["hint"] for p in problems)
        assert {int(p["grade"][5:]) for p in problems} == set(range(1, 13))
        assert all(len(set(p["choices"])) == len(p["choices"]) >= 2 for p in problems)
        right = np.bincount([p["answer"] for p in problems])
        assert right[0] < 0.6 * count  # no letter is a good guess


def test_the_backbones_are_small_and_named_by_recipe_and_seed():
    files = [path for path in world.LLAMA.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    for path in (world.LLAMA, world.VISION):
        assert path.exists() and world.RECIPE in path.name and f"seed{world.SEED}" in path.name
    params = json.loads((world.LLAMA / "params.json").read_text())
    assert params["vocab_size"] == load_tokenizer(world.LLAMA / "tokenizer.model").vocab_size()


@pytest.mark.parametrize("name, init_from, starts_from", [
    ("stage1", None, None), ("stage1", "runs/other", "runs/other"), ("chat", None, "runs/stage1"), ("chat", "none", None),
    ("chat", "runs/other", "runs/other"), ("scienceqa", None, "runs/stage1"),
])  # fmt: skip
def test_begin_completes_the_arguments(name, init_from, starts_from, small, folder, monkeypatch, capsys):
    monkeypatch.setattr(world, "FOLDER", folder)
    given = dict(llama=None, vision=None, data=None, images=None, epochs=None, batch_size=None, lr=0.5)
    a = argparse.Namespace(name=name, stage=1 if name == "stage1" else 2, init_from=init_from, **given)
    world.begin(a)
    assert a.init_from == starts_from
    assert (a.llama, a.vision) == ((None, None) if starts_from else (world.LLAMA, world.VISION))
    assert (a.epochs, a.lr) == (world.SETTINGS[name]["epochs"], 0.5)
    assert a.images.is_dir() and len(data.Examples(a.data)) > 0
    flags, *examined = capsys.readouterr().out.splitlines()
    assert flags.startswith("demo: ") and f"--epochs {a.epochs}" in flags and "--lr" not in flags
    assert examined == ([f"demo: after the last step, {world.EXAM[name]}"] if name in world.EXAM else [])


def test_begin_prints_on_process_0_only(small, folder, monkeypatch, capsys):
    monkeypatch.setattr(world, "FOLDER", folder)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("distributed.by_process_0", lambda function: None)
    given = dict(init_from=None, epochs=None, batch_size=None, lr=None)
    world.begin(argparse.Namespace(name="stage1", stage=1, **given))
    assert capsys.readouterr().out == ""
