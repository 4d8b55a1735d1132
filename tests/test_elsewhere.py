"""bench/elsewhere.py: its scenes, questions, pictures, files and table."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageColor

import eval_scienceqa
from bench import elsewhere
from bench.elsewhere import COLOURS, ELEMENTS, KINDS, SETS, Thing
from common import UserError
from conftest import ROOT
from data import Examples
from test_eval_scienceqa import tiny_run

MODULES = {"markers": "matplotlib", "glyphs": "matplotlib", "svg": "resvg_py"}
THINGS = [Thing("star", "red", "crimson", 0.2, 0.2, 0.2), Thing("star", "blue", "blue", 0.75, 0.25, 0.14),
          Thing("oval", "red", "red", 0.5, 0.8, 0.15)]  # fmt: skip
ANSWERS = {  # of all questions about THINGS but yes/no and those about a number of one colour
    "How many shapes are there?": "3", "What colour is the oval?": "red", "What is the blue shape?": "star",
    "Is the red star on the left or on the right?": "left", "Is the red star at the top or at the bottom?": "top",
    "Is the blue star on the left or on the right?": "right", "Is the blue star at the top or at the bottom?": "top",
    "Is the oval at the top or at the bottom?": "bottom",
    "Is the red star left or right of the blue star?": "left", "Is the red star left or right of the oval?": "left",
    "Is the blue star left or right of the red star?": "right", "Is the blue star left or right of the oval?": "right",
    "Is the oval left or right of the red star?": "right", "Is the oval left or right of the blue star?": "left",
    "Is the red star above or below the oval?": "above", "Is the blue star above or below the oval?": "above",
    "Is the oval above or below the red star?": "below", "Is the oval above or below the blue star?": "below",
    "Is the red star bigger or smaller than the blue star?": "bigger",
    "Is the blue star bigger or smaller than the red star?": "smaller",
}  # fmt: skip


def scenes(n: int, held_out: bool = False):
    rng = random.Random(0)
    return [elsewhere.draw_scene(list(elsewhere.MARKERS), rng, held_out) for _ in range(n)]


def test_things_do_not_touch_and_contrast_with_their_grounds():
    for things, grounds in scenes(100):
        assert len({t.full_name for t in things}) == len(things) > 0 < len(grounds)
        for i, t in enumerate(things):
            assert t.r <= min(t.x, t.y, 1 - t.x, 1 - t.y)
            assert all((t.x - u.x) ** 2 + (t.y - u.y) ** 2 > (t.r + u.r) ** 2 for u in things[:i])
            distance = np.subtract([ImageColor.getrgb(g) for g in grounds], ImageColor.getrgb(t.shade))
            assert (np.linalg.norm(distance, axis=1) >= elsewhere.CONTRAST).all()


def test_no_held_out_combination_is_in_the_training_pictures():
    training, held_out = ({frozenset(t.full_name for t in things) for things, _ in scenes(300, held_out)}
                          for held_out in (False, True))  # fmt: skip
    assert not training & held_out


def test_answers_about_a_scene():
    found = {}
    for seed in range(300):
        found |= {q: str(a) for _, q, a in elsewhere.all_questions(THINGS, list(ELEMENTS), "shape", random.Random(seed))}
    yes_no = {question: answer for question, answer in found.items() if answer in ("yes", "no")}
    of_colour = {f"How many shapes are {c}?": str({"red": 2, "blue": 1}.get(c, 0)) for c in COLOURS}
    assert {question: answer for question, answer in found.items() if question not in yes_no} == ANSWERS | of_colour
    present = {f"Is there a {t.full_name}?" for t in THINGS} | {"Is the oval red?"}
    assert {question for question, answer in yes_no.items() if answer == "yes"} == present
    assert {"Is there a blue oval?", "Is there an orange star?", "Is the oval blue?"} < yes_no.keys() - present


def test_yes_and_no_are_balanced_and_kinds_are_asked_once():
    rng, answers = random.Random(0), []
    for things, _ in scenes(400):
        chosen = elsewhere.questions(things, list(elsewhere.MARKERS), "marker", rng)
        kinds = [kind for kind, _, _ in chosen]
        assert len({question for _, question, _ in chosen}) == len(chosen)
        assert all(kinds.count(kind) <= 1 + (kind == "where") for kind in KINDS)
        answers += [answer for kind, _, answer in chosen if kind == "yes/no"]
    assert abs(answers.count("yes") / len(answers) - 0.5) < 0.1  # 4 deviations of 400 fair coins


@pytest.mark.parametrize("name", SETS)
def test_things_are_drawn_at_their_place_in_their_colour(name):
    pytest.importorskip(MODULES[name])
    marks, _, drawer = SETS[name]
    rng, draw = random.Random(0), drawer()
    for _ in range(30):
        things, grounds = elsewhere.draw_scene(list(marks), rng, False)
        image = np.asarray(draw(things, grounds, 96, rng), dtype=float)
        assert image.shape == (96, 96, 3)
        y, x = (np.mgrid[:96, :96] + 0.5) / 96
        outside = np.full((96, 96), True)
        for t in things:
            near = np.hypot(x - t.x, y - t.y) < t.r + 1.5 / 96  # the width of a smooth edge
            outside &= ~near
            in_shade = near & (abs(image - ImageColor.getrgb(t.shade)).max(-1) < 10)
            assert in_shade.sum() > 0.05 * near.sum(), t
            assert max(np.hypot(x - t.x, y - t.y)[in_shade]) > 0.5 * t.r, t
        ground = np.array([ImageColor.getrgb(ground) for ground in grounds])
        assert (image[outside] >= ground.min(0) - 1).all() and (image[outside] <= ground.max(0) + 1).all()


def test_files_of_a_set(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(elsewhere, "TRAINING", 6)
    monkeypatch.setattr(elsewhere, "HELD_OUT", 3)
    elsewhere.draw_set(tmp_path / "a", "markers")
    again = "from bench import elsewhere as e; e.TRAINING, e.HELD_OUT = 6, 3; e.draw_set(e.Path(sys.argv[1]), 'markers')"
    subprocess.run([sys.executable, "-c", f"import sys; {again}", str(tmp_path / "b")], check=True, cwd=ROOT, timeout=120)
    names = ("train.json", "heldout.jsonl", "swapped.jsonl", "images/0008.png")
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    examples = Examples([tmp_path / "a/train.json"])
    assert len(examples) == examples.n_pictures == 6
    assert all(Image.open(tmp_path / "a/images" / examples[i].image).mode == "RGB" for i in range(6))
    rows, swapped = ([json.loads(line) for line in open(tmp_path / "a" / name)] for name in names[1:3])
    assert {row["image"] for row in rows} == {"0006.png", "0007.png", "0008.png"}
    for row, other in zip(rows, swapped, strict=True):
        assert row.keys() == {"question_id", "image", "category", "text", "answer"}
        assert row["image"] != other["image"] and row | {"image": other["image"]} == other


def test_table_of_a_run(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(elsewhere, "TRAINING", 1)
    monkeypatch.setattr(elsewhere, "HELD_OUT", 2)
    monkeypatch.setattr(eval_scienceqa, "ask", lambda model, encoder, prompts, n: ["yes" for _ in prompts])
    elsewhere.draw_set(tmp_path / "markers", "markers")
    monkeypatch.setattr(sys, "argv", ["elsewhere", str(tmp_path), "--set", "markers", "--ask", str(tiny_run(tmp_path))])
    elsewhere.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == [*KINDS, "all"]


def test_table():
    rows = [dict(category="colour", text="What colour is the star?", answer="red"),
            dict(category="colour", text="What colour is the oval?", answer="red"),
            dict(category="yes/no", text="Is the star red?", answer="no")]  # fmt: skip
    assert elsewhere.commonest(rows) == ["red", "red", "no"]
    lines = elsewhere.table(rows, {"true pictures": ["red", "Red", "no"]}).splitlines()
    assert lines[1].split() == ["colour", "2", "50.0"] and lines[-1].split() == ["all", "3", "66.7"]


@pytest.mark.parametrize("name, package", [("markers", "matplotlib"), ("glyphs", "matplotlib"), ("svg", "resvg-py")])
def test_without_its_library_the_error_names_the_pip_command(monkeypatch, name, package):
    for module in ("matplotlib.figure", "matplotlib.backends.backend_agg", "resvg_py"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {package}$"):
        SETS[name][2]()
