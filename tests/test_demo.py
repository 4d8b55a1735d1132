"""demo.py: the little world is consistent, its data reproducible, and what is shipped is small and does its part."""

import json
import random
import re

import numpy as np
import pytest
import torch
from test_train import in_process

import checkpoint
import data
import demo
import eval_scienceqa
from conversation import UserError, load_tokenizer, stop_ids, surface, system_ids
from vision import open_picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    demo.prepare(folder, progress=False)
    return folder


def scenes(n, held_out=False, seed=0):
    dice = random.Random(seed)
    return [demo.draw_scene(dice, held_out) for _ in range(n)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_is_examined_before_and_after(folder, tmp_path, monkeypatch, capsys, precision):
    few = demo.heldout(folder)[:3]
    monkeypatch.setattr(demo, "FOLDER", folder)
    monkeypatch.setattr(demo, "heldout", lambda _: few)
    flags = ["--precision", precision, "--max-steps", "1", "--batch-size", "4", "--workers", "0", "--out"]
    for stage, more, answers in (("1", [], 3), ("2", ["--init-from", str(tmp_path / "1")], 6)):
        in_process(["--stage", stage, *more, *flags, str(tmp_path / stage)])
        kept = json.loads((tmp_path / stage / "exam.json").read_text())
        assert [len(kept[name]) for name in ("before", "after", "swapped")] == [answers] * 3
        assert "another scene's picture" in capsys.readouterr().out


def test_held_out_scenes_are_in_no_training_data(folder):
    held_out = {h.scene for h in demo.heldout(folder)}
    assert len(held_out) == demo.HELD_OUT and all(map(demo.is_held_out, held_out))
    captions = json.loads((folder / "captions.json").read_text())
    shown = {frozenset(demo.read_caption(record["caption"])) for record in captions}
    assert len(captions) == demo.CAPTIONED
    assert not shown & {frozenset((t.size, t.colour, t.shape, t.place) for t in scene) for scene in held_out}


def test_a_true_caption_scores_1_and_each_error_costs():
    dice = random.Random(0)
    for scene in scenes(200):
        truth = demo.caption(scene, dice)
        assert set(demo.caption_score(truth, scene).values()) == {1}
        other = {"red": "green"}.get(scene[0].colour, "red")
        wrong = truth.replace(f"{scene[0].size} {scene[0].colour}", f"{scene[0].size} {other}", 1)
        score = demo.caption_score(wrong, scene)
        assert score["colour"] == pytest.approx(1 - 1 / len(scene)) or wrong.count(other) > 1
        assert demo.caption_score(truth + " a big red circle at the top.", scene)["size"] < 1
        assert set(demo.caption_score("nothing", scene).values()) == {0}


def test_the_picture_shows_what_the_scene_says():
    """At each thing's place the middle has its colour, a big thing covers more, and the other places are pale."""
    dice = random.Random(1)
    for scene in scenes(60):
        image = np.asarray(demo.draw_picture(scene, dice), dtype=int)
        assert image.shape == (demo.PIXELS, demo.PIXELS, 3)
        for row, column in np.ndindex(3, 3):
            cell = image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            things = [t for t in scene if demo.PLACES.index(t.place) == 3 * row + column]
            pale = cell.min(axis=2) > 190
            if not things:
                assert pale.mean() > 0.9  # a little of a neighbour may reach in
                continue
            assert abs(cell[7:9, 7:9].mean(axis=(0, 1)) - demo.RGB[things[0].colour]).max() < 40
            assert (~pale).sum() > (60 if things[0].size == "big" else 20)


def test_the_data_is_what_train_reads_and_the_same_each_time(folder, tmp_path):
    names = ("captions.json", "conversation.json", "detail.json", "reasoning.json")
    examples = data.Examples([folder / name for name in names[1:]])
    assert examples.describe().count("LLaVA conversations") == 3 and set(examples.types()) == {0, 1, 2}
    assert max(len(e.turns) for e in examples) > 2
    pictures = data.Pictures(folder / "images")
    assert open_picture(pictures.read(examples[0].image)).size == (demo.PIXELS, demo.PIXELS)
    demo.prepare(tmp_path / "again", progress=False)
    for name in (*names, "heldout.json", "scienceqa/problems.json", "images/train-00000.png", "images/test-00003.png"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_complete_folder_is_left_alone_and_a_strangers_refused(folder, tmp_path):
    before = (folder / "recipe.json").stat().st_mtime_ns
    demo.prepare(folder, progress=False)
    assert (folder / "recipe.json").stat().st_mtime_ns == before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="no data of the demo"):
        demo.prepare(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_quiz_is_scienceqa_over_all_its_categories(folder):
    for split, count in demo.QUIZ.items():
        problems = data.ScienceQA(folder / "scienceqa", split).records
        assert len(problems) == count
        assert {p["subject"] for p in problems} == {"natural science", "social science", "language science"}
        assert {bool(p["image"]) for p in problems} == {bool(p["hint"]) for p in problems} == {True, False}
        assert any(not p["image"] and not p["hint"] for p in problems)
        assert {int(p["grade"][5:]) for p in problems} == set(range(1, 13))
        right = np.bincount([p["answer"] for p in problems])
        assert right[0] < 0.6 * count  # no letter is a good guess


def test_what_is_shipped_is_small_and_named_by_recipe_and_seed():
    files = [path for path in demo.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    for path in (demo.LLAMA, demo.VISION):
        assert path.exists() and demo.RECIPE in path.name and f"seed{demo.SEED}" in path.name
    params = json.loads((demo.LLAMA / "params.json").read_text())
    assert params["vocab_size"] == load_tokenizer(demo.LLAMA / "tokenizer.model").vocab_size()


def test_the_shipped_llama_looks_things_up_in_a_scene_told_in_words():
    """It has read only text; and what it says follows from its context."""
    sp, dice = load_tokenizer(demo.LLAMA / "tokenizer.model"), random.Random(3)
    vision, skip = checkpoint.load_vision(demo.VISION), len(system_ids(sp))
    model = checkpoint.build(checkpoint.load_llama(demo.LLAMA), vision)
    told, samples = scenes(40, held_out=True), []
    for scene in told:
        ids, _, green = demo.spell(sp, [f"<image>\n{data.REQUESTS[0]}"], demo.in_words(scene, dice))
        samples.append((ids[skip:, 0].copy(), green[skip:], None))
    batch = data.Encoder(sp, 36, demo.PIXELS, None, 2048).flatten(samples)
    prefix = model.read_prefix(torch.tensor(system_ids(sp)))
    answers = model.answers(batch.ids, batch.cu_seqlens, batch.pixels, stop_ids(sp), 48, prefix=prefix)
    assert demo.caption_scores([surface(sp, answer).strip() for answer in answers], told)["all"] > 0.9


def test_the_shipped_llama_knows_the_letter_and_who_does_what():
    """What its lessons were for: it solves the quiz's problems that come with a text."""
    sp, dice = load_tokenizer(demo.LLAMA / "tokenizer.model"), random.Random(4)
    model = checkpoint.build(checkpoint.load_llama(demo.LLAMA), checkpoint.load_vision(demo.VISION))
    problems = []
    for i in range(60):
        problem = demo.quiz_text(demo.SUBJECTS[i % 3], dice)[0]
        problems.append(problem | dict(id=str(i), image_path=None))
    prompts = [data.Example(p["id"], [data.scienceqa_question(p)]) for p in problems]
    answers = data.ask(model, data.Encoder(sp, 36, demo.PIXELS, None, 2048), prompts)
    right = [p["solution"] in said and eval_scienceqa.letter(said, len(p["choices"])) == p["answer"]
             for p, said in zip(problems, answers)]  # fmt: skip
    assert sum(right) > 54


def test_lessons_ask_for_what_their_text_decides():
    sp, dice = load_tokenizer(demo.LLAMA / "tokenizer.model"), random.Random(5)
    system = system_ids(sp)
    for name, how in demo.LLAMA_TRAINING:
        for share in (0.0, 0.5, 0.9) * 20:
            chords, loudness, green = how["text"](sp, dice, share)
            ids, sought = chords[:, 0].tolist(), np.flatnonzero(green)
            start = 0 if how.get("bare") else len(system)
            assert chords.shape == loudness.shape == (len(ids), 5) and ids[:start] == system[:start]
            assert len(sought) and sought[0] > start
            if name == "repeat":  # the piece before was there once, and this one came after it
                assert all(ids.index(ids[i]) == ids.index(ids[i - 1]) + 1 for i in sought)
            if name == "facts":  # the words of the text, each told once more
                assert all(ids.count(ids[i]) == 2 for i in sought)


def test_reports_count_what_is_right(folder, monkeypatch):
    monkeypatch.setattr(demo, "FOLDER", folder)
    held_out = demo.heldout(folder)
    captions = [h.caption for h in held_out]
    text = demo.caption_report(captions[1:] + captions[:1], captions, [""] * len(captions), held_out)
    assert re.search(r"W trained +100.0 +100.0 +100.0 +100.0 +100.0", text)
    truths = [answer for h in held_out for _, answer in h.questions[: demo.ASKED]]
    assert len(demo.exam("chat")) == len(truths)
    text = demo.chat_report([""] * len(truths), truths, truths[1:] + truths[:1], held_out)
    assert re.search(r"before stage 2 +0.0\n  after +100.0\n", text)
    true, swapped = demo.exam("stage1"), demo.exam("stage1", 1)
    assert [a for a, _ in true] == [a for a, _ in swapped] and all(a != b for (_, a), (_, b) in zip(true, swapped))


def test_report_reads_a_run_again(folder, tmp_path, monkeypatch, capsys):
    """Stage 1 and chat from what train.py kept, the quiz from what eval_scienceqa.py wrote."""
    monkeypatch.setattr(demo, "FOLDER", folder)
    captions = [h.caption for h in demo.heldout(folder)]
    kept = dict(name="stage1", before=[""] * len(captions), after=captions, swapped=captions[1:] + captions[:1])
    for name in ("stage1", "quiz", "none"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text('{"settings": {"demo": true}}')
    (tmp_path / "runs/stage1/exam.json").write_text(json.dumps(kept))
    problems = {id: p for id, p in json.loads((folder / "scienceqa/problems.json").read_text()).items() if p["split"] == "test"}
    records = [data.check_problem(id, p, folder) for id, p in problems.items()]
    first = eval_scienceqa.score(records, dict.fromkeys(problems, "A"))
    (tmp_path / "runs/quiz/answers_test.json").write_text(json.dumps(first))
    (tmp_path / "runs/real").mkdir()
    (tmp_path / "runs/real/config.json").write_text('{"settings": {"demo": false}}')
    (tmp_path / "runs/real/answers_test.json").write_text(json.dumps(first))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo.py", "report"])
    demo.main()
    said = capsys.readouterr().out
    assert re.search(r"--- runs/quiz\n.*Avg\n", said) and re.search(r"W trained +100.0", said) and "none" not in said and "real" not in said
    row = re.search(r"answers_test.json +(.*)", said)[1].split()
    assert row[-1] == f"{100 * sum(p['answer'] == 0 for p in records) / len(records):.1f}"
    chance = re.search(r"at random +(.*)", said)[1].split()
    assert chance[-1] == f"{100 * sum(1 / len(p['choices']) for p in records) / len(records):.1f}"
    with pytest.raises(UserError, match="holds no answers"):
        demo.report(tmp_path / "runs/none")
