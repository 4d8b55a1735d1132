"""demo/wide.py: pictures show their scenes, and every question has its true answer."""

import itertools
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
    """The box and the form of a filled thing alone on its ground give its place and its area."""
    rng = random.Random(1)
    for shape in wide.SHAPES[:-1]:  # strokes may cover no patch
        for size in ("big", "huge"):
            scene = (wide.WideThing(size, "blue", shape, "centre", "filled"),)
            image, shown = wide.draw_picture(scene, rng)
            assert image.size == (world.PIXELS, world.PIXELS) and set(shown.thing) == {-1, 0}
            x, y, r = shown.boxes[0]
            assert abs(x - 24) <= 8 and abs(y - 24) <= 8 and wide.RADIUS[size][0] <= r <= wide.RADIUS[size][1]
            blue = is_filled(image, shown).sum()
            box = (2 * r) ** 2
            assert 0.1 * box < blue < 1.05 * box
            assert blue == pytest.approx(shown.forms[0].mean() * box, rel=0.35)


def is_filled(image, shown):
    """(PIXELS, PIXELS) bool: which pixels have the fill of the first thing."""
    return abs(np.asarray(image) - 255 * shown.fills[0]).max(axis=2) < 60


def test_patches_are_in_the_order_of_the_vits():
    rng = random.Random(8)
    for place in ("top-right", "bottom", "left"):
        image, shown = wide.draw_picture((wide.WideThing("big", "blue", "square", place, "filled"),), rng)
        blue = is_filled(image, shown).reshape(wide.PATCHES_ACROSS, wide.PATCH, wide.PATCHES_ACROSS, wide.PATCH)
        shares = blue.mean(axis=(1, 3)).ravel()  # (P,)
        assert all(shown.thing[shares > 0.4] == 0) and all(shown.thing[shares < 0.1] == -1)


def test_a_thing_without_a_patch_hides_no_other():
    """The strokes of some signs lie outside the picture."""
    rng, unseen = random.Random(0), 0
    for _ in range(3000):
        _, shown = wide.draw_picture((wide.WideThing("tiny", "red", "sign", "top-left", "filled"),), rng)
        unseen += not (shown.thing == 0).any()
        assert (shown.thing == 0).sum() < 12
    assert unseen > 0


def test_forms_of_shapes_differ():
    """Each shape's mean form differs clearly from every other one's."""
    rng, forms = random.Random(2), {}
    for shape in wide.OUTLINES:
        scene = (wide.WideThing("big", "red", shape, "centre", "filled"),)
        forms[shape] = np.mean([wide.draw_picture(scene, rng)[1].forms[0] for _ in range(20)], axis=0)
    for shape, other in itertools.combinations(forms, 2):
        assert abs(forms[shape] - forms[other]).max() > 0.1, (shape, other)
    assert abs(forms["ring"] - forms["circle"]).max() > 0.5  # the hole


def test_styles_cover_less_than_the_filled_form():
    areas = {}
    for style in wide.STYLES:
        rng = random.Random(3)
        areas[style] = is_filled(*wide.draw_picture((wide.WideThing("huge", "red", "square", "centre", style),), rng)).sum()
    outlined, striped = areas["outlined"], areas["striped"]
    assert 0.1 * areas["filled"] < min(outlined, striped) and max(outlined, striped) < 0.8 * areas["filled"]


def test_a_smaller_thing_is_in_front():
    """Both things have the same cell, and the smaller one's patches show it."""
    rng = random.Random(4)
    huge, small = (wide.WideThing(size, colour, "square", "centre", "filled") for size, colour in (("huge", "red"), ("small", "blue")))
    for scene, front in (((huge, small), 1), ((small, huge), 0)):
        for _ in range(20):
            _, shown = wide.draw_picture(scene, rng)
            assert front in shown.thing


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
    all_asked = {asked.question: asked for asked in (wide.draw_question(scene, rng) for _ in range(6000))}
    answers = {question: asked.word for question, asked in all_asked.items()}
    for question, answer in {
        "What colour is the star?": "red", "What shape is the grey thing?": "moon", "Where is the star?": "top-left",
        "How many red things are there?": "two", "How many moons are there?": "two", "How many things are there?": "three",
        "Is the star to the left of the grey moon?": "yes", "Is the star below the grey moon?": "no",
        "What is above the grey moon?": "red star", "Is the star bigger than the grey moon?": "yes",
        "Is the star bigger than the red moon?": "no", "Do the star and the red moon have the same colour?": "yes",
        "Are there more red things than grey things?": "yes", "What is at the right?": "grey moon",
        "Is there a star?": "yes", "Is there anything grey?": "yes", "What is at the top?": "nothing",
        "Is the grey moon filled, outlined or striped?": "striped", "How big is the grey moon?": "tiny",
        "Is the star to the left or to the right of the grey moon?": "left", "How many things are red?": "two",
        "Is the red moon above or below the star?": "below", "Is the grey moon bigger or smaller than the star?": "smaller",
        "Is the star in the left half or in the right half?": "left",
        "Is the red moon in the top half or in the bottom half?": "bottom",
    }.items():  # fmt: skip
        assert answers[question] == answer, question
    for asked in all_asked.values():  # a sentence gives the answer of the word
        if asked.word in ("yes", "no", "nothing"):
            assert asked.sentence.startswith(asked.word.capitalize())
        else:
            assert "none" in asked.sentence if asked.word == "zero" else asked.word in asked.sentence.lower()
    choices = [answer for question, answer in answers.items() if re.fullmatch(r"Is the star \w+ or \w+\?", question)]
    assert len(choices) > 5 and set(choices) == {"red"}
    assert all(answer == "no" for question, answer in answers.items() if re.match("(Is there|Do you see) an? (dog|cat|tree)", question))


def test_steps_between_two_places():
    thing, other = (wide.WideThing("big", "red", "star", place, "filled") for place in ("top-left", "right"))
    assert wide.steps_between(thing, other) == (1, 2) and wide.steps_between(other, thing) == (-1, -2)


def test_a_conversation_keeps_its_style_and_spelling():
    rng, seen = random.Random(7), set()
    for scene in scenes(1500):
        messages = wide.conversation(scene, rng)
        assert len(messages) % 2 == 0 and messages
        questions, answers = messages[::2], messages[1::2]
        assert len(set(questions)) == len(questions)
        text = " ".join(messages).lower()
        british, american = re.search(r"colour|grey|centre", text), re.search(r"color\b|gray|center", text)
        hyphens, spaces = (re.search(rf"(top|bottom){mark}(left|right)", text) for mark in "- ")
        assert not (british and american) and not (hyphens and spaces), text
        assert len({answer.endswith(".") for answer in answers}) == 1
        found = dict(british=british, american=american, hyphens=hyphens, spaces=spaces, digits=re.search(r"\d", text))
        seen |= {name for name, match in found.items() if match}
    assert seen == {"british", "american", "hyphens", "spaces", "digits"}
