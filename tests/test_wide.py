"""demo/wide.py: pictures show their scenes, and every question has its true answer."""

import random
import re

import numpy as np
import pytest

from demo import wide, world


def scenes(n, **settings):
    rng = random.Random(0)
    return [wide.draw_scene(rng, **settings) for _ in range(n)]


def test_scenes_use_every_word():
    things = [t for scene in scenes(600) for t in scene]
    for attribute, values in wide.ATTRIBUTES.items():
        assert {getattr(t, attribute) for t in things} == set(values)
    nouns = {t.shape for scene in scenes(300, nouns=1.0) for t in scene}
    assert nouns == set(world.ABSENT)
    assert len(wide.COLOURS) >= 12 and len(wide.OUTLINES) >= 8 and set(wide.COLOURS) >= set(world.COLOURS)


def test_a_patch_shows_its_thing():
    """In a filled thing alone on its ground, the patch that it covers most has its colour."""
    rng = random.Random(1)
    for shape in wide.SHAPES[:-1]:  # strokes may cover no patch
        for size in ("big", "huge"):
            scene = (wide.WideThing(size, "blue", shape, "centre", "filled"),)
            image, shown = wide.draw_picture(scene, rng)
            assert image.size == (world.PIXELS, world.PIXELS) and set(shown.thing) == {-1, 0}
            x, y, r = shown.boxes[0]
            assert abs(x - 24) <= 8 and abs(y - 24) <= 8 and wide.RADIUS[size][0] <= r <= wide.RADIUS[size][1]
            pixels = np.asarray(image, dtype=int)
            blue = (abs(pixels - 255 * shown.fills[0]).max(axis=2) < 60).sum()
            box = (2 * r) ** 2
            assert 0.1 * box < blue < 1.05 * box
            assert 0.1 < shown.forms[0].mean() < 0.95
            assert blue == pytest.approx(shown.forms[0].mean() * box, rel=0.35)


def test_forms_of_shapes_differ():
    rng, forms = random.Random(2), {}
    for shape in wide.OUTLINES:
        drawn = [wide.draw_picture((wide.WideThing("big", "red", shape, "centre", "filled"),), rng)[1].forms[0] for _ in range(8)]
        forms[shape] = drawn
    assert abs(np.mean(forms["ring"], 0) - np.mean(forms["circle"], 0)).max() > 0.5  # the hole


def test_styles_cover_less_than_the_filled_form():
    areas = {}
    for style in wide.STYLES:
        rng = random.Random(3)
        image, shown = wide.draw_picture((wide.WideThing("huge", "red", "square", "centre", style),), rng)
        areas[style] = (abs(np.asarray(image) - 255 * shown.fills[0]).max(axis=2) < 60).sum()
    assert max(areas["outlined"], areas["striped"]) < 0.8 * areas["filled"]


def test_a_smaller_thing_is_in_front():
    rng = random.Random(4)
    scene = (wide.WideThing("huge", "red", "square", "centre", "filled"),
             wide.WideThing("small", "blue", "circle", "right", "filled"))  # fmt: skip
    _, shown = wide.draw_picture(scene, rng)
    assert 1 in shown.thing and 0 in shown.thing


def test_questions_have_one_answer():
    """Whatever the style and the wording, one scene has one answer to a question."""
    rng = random.Random(5)
    for scene in scenes(150):
        answers = {}
        for _ in range(40):
            asked = wide.draw_question(scene, rng)
            assert answers.setdefault(asked.question, (asked.word, asked.sentence)) == (asked.word, asked.sentence)
            assert asked.word and asked.sentence[0].isupper() and asked.sentence.endswith(".")


def test_answers_are_true():
    scene = (wide.WideThing("big", "red", "star", "top-left", "filled"), wide.WideThing("tiny", "grey", "moon", "right", "striped"),
             wide.WideThing("big", "red", "moon", "bottom", "outlined"))  # fmt: skip
    rng = random.Random(6)
    answers = {asked.question: asked.word for asked in (wide.draw_question(scene, rng) for _ in range(6000))}
    for question, answer in {
        "What colour is the star?": "red", "What shape is the grey thing?": "moon", "Where is the star?": "top-left",
        "How many red things are there?": "two", "How many moons are there?": "two", "How many things are there?": "three",
        "Is the star to the left of the grey moon?": "yes", "Is the star below the grey moon?": "no",
        "What is above the grey moon?": "red star", "Is the star bigger than the grey moon?": "yes",
        "Is the star bigger than the red moon?": "no", "Do the star and the red moon have the same colour?": "yes",
        "Are there more red things than grey things?": "yes", "What is at the right?": "grey moon",
        "Is there a star?": "yes", "Is there anything grey?": "yes", "What is at the top?": "nothing",
        "Is the grey moon filled, outlined or striped?": "striped", "How big is the grey moon?": "tiny",
    }.items():  # fmt: skip
        assert answers[question] == answer, question
    assert all(answer == "no" for question, answer in answers.items() if re.match("(Is there|Do you see) an? (dog|cat|tree)", question))


def test_a_conversation_keeps_its_style_and_spelling():
    rng, seen = random.Random(7), set()
    for scene in scenes(400):
        messages = wide.conversation(scene, rng)
        assert len(messages) % 2 == 0 and messages
        questions, answers = messages[::2], messages[1::2]
        assert len(set(questions)) == len(questions)
        text = " ".join(messages)
        assert not ("colour" in text and "color " in text) and not ("grey" in text and "gray" in text)
        assert len({answer.endswith(".") for answer in answers}) == 1
        seen |= {"colour" in text, "digits" if re.search(r"\d", text) else "words"}
    assert seen == {True, False, "digits", "words"}
