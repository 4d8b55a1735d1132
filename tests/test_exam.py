"""demo/exam.py: captions are scored right, and a run is examined before and after its training."""

import argparse
import json
import random
import re

import pytest
import torch

import checkpoint
import eval_scienceqa
import train
from common import UserError
from conversation import TEMPLATE
from demo import exam, world
from vision import FEATURE_LAYER

SMALL = dict(CAPTIONED=300, HELD_OUT=30, QUIZ=dict(train=20, val=5, test=200))


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exam") / "data"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(SMALL, FOLDER=folder).items():
            patch.setattr(world, name, value)
        world.prepare()
        yield folder


@pytest.fixture(scope="module")
def held_out(folder):
    return exam.read_held_out(folder)


def test_held_out_scenes_are_in_no_training_data(folder, held_out):
    scenes = {h.scene for h in held_out}
    assert len(scenes) == SMALL["HELD_OUT"] and all(map(world.is_held_out, scenes))
    captions = json.loads((folder / "captions.json").read_text())
    shown = {frozenset(exam.read_caption(record["caption"])) for record in captions}
    assert len(captions) == SMALL["CAPTIONED"] and len(shown) > 200
    assert not shown & {frozenset((t.size, t.colour, t.shape, t.place) for t in scene) for scene in scenes}


def test_a_true_caption_scores_1_and_each_error_costs():
    rng = random.Random(0)
    for scene in [world.draw_scene(rng) for _ in range(200)]:
        truth = world.caption(scene, rng)
        assert set(exam.caption_score(truth, scene).values()) == {1}
        other = {"red": "green"}.get(scene[0].colour, "red")
        wrong = truth.replace(f"{scene[0].size} {scene[0].colour}", f"{scene[0].size} {other}", 1)
        score = exam.caption_score(wrong, scene)
        assert score["colour"] == pytest.approx(1 - 1 / len(scene)) or wrong.count(other) > 1
        assert exam.caption_score(truth + " a big red circle at the top.", scene)["size"] < 1
        assert set(exam.caption_score("nothing", scene).values()) == {0}


def test_a_caption_that_does_not_end_is_scored_in_time():
    scene = (world.Thing("big", "red", "circle", "top"),)
    score = exam.caption_score("a big red circle at the top and " * 40, scene)
    assert set(score.values()) == {1 / 40}


def test_captions_are_compared_in_the_pairing_with_the_most_hits():
    scene = (world.Thing("big", "red", "circle", "top"), world.Thing("small", "blue", "cross", "left"))
    score = exam.caption_score("at the left a small blue cross and a big red square at the top.", scene)
    assert score == {"size": 1, "colour": 1, "shape": 0.5, "place": 1}


def test_conversations_show_the_scene_or_another_one(held_out):
    for name, count in (("stage1", 1), ("chat", world.QUESTIONS)):
        true, swapped = exam.conversations(name, held_out), exam.conversations(name, held_out, shift=1)
        assert len(true) == len(held_out) and {len(questions) for _, questions in true} == {count}
        assert [questions for _, questions in true] == [questions for _, questions in swapped]
        assert all(a != b for (a, _), (b, _) in zip(true, swapped))
        assert true[0][0] == held_out[0].image.name


def test_a_question_follows_the_models_own_answers(monkeypatch):
    asked = []

    def ask(model, encoder, prompts, max_new_tokens):
        asked.append([(prompt.image, list(prompt.turns)) for prompt in prompts])
        return [f"{prompt.image} {len(prompt.turns)}" for prompt in prompts]

    monkeypatch.setattr(exam, "ask", ask)
    monkeypatch.setattr(exam, "BATCH_SIZE", 2)
    counted = []
    answers = exam.answer(None, None, [(name, ["One?", "Two?"]) for name in "abc"], counted.append)
    assert answers == ["a 1", "a 3", "b 1", "b 3", "c 1", "c 3"] and counted == [2, 1, 2, 1]
    assert asked[0] == [("a", ["<image>\nOne?"]), ("b", ["<image>\nOne?"])]
    assert asked[3] == [("c", ["<image>\nOne?", "c 1", "Two?"])]


def test_the_caption_report_counts_what_is_right(held_out):
    captions = [h.caption for h in held_out]
    text = exam.caption_report(captions[1:] + captions[:1], captions, [""] * len(captions), held_out)
    assert re.search(r"\n  W trained +100.0 +100.0 +100.0 +100.0 +100.0\n", text)
    assert re.search(r"\n  W trained, another scene's picture +0.0 +0.0 +0.0 +0.0 +0.0\n", text)
    untrained = re.search(r"\n  W untrained +([\d. ]+)\n", text)[1].split()
    scores = exam.mean_caption_score(captions[1:] + captions[:1], [h.scene for h in held_out])
    assert untrained == [f"{100 * value:.1f}" for value in scores.values()]
    assert text.startswith(f"test-00000.png\n  truth   {captions[0]}\n  before  {captions[1][:100]}\n  after   {captions[0]}\n")
    assert "\n\n% named right, 30 held-out scenes               size  colour  shape  place    all\n" in text


def test_the_chat_report_counts_what_is_right(held_out):
    truths = [answer for h in held_out for _, answer in h.questions]
    after = ["" if i % world.QUESTIONS == 1 else truth for i, truth in enumerate(truths)]  # each second answer is wrong
    text = exam.chat_report([""] * len(truths), after, truths[1:] + truths[:1], held_out)
    assert re.search(r"\n\n% of 90 questions about held-out scenes right\n  before stage 2 +0.0\n  after +66.7\n", text)
    assert 0 < float(re.search(r"chance: other scenes' true answers +([\d.]+)\n", text)[1]) < 100
    assert re.findall(r"after, question (\d) +([\d.]+)", text) == [("1", "100.0"), ("2", "0.0"), ("3", "100.0")]
    assert text.startswith(f"test-00000.png  {held_out[0].questions[0][0]}\n  truth {truths[0]}  after {truths[0]}\n")


def write_run(run, settings, **files):
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"settings": settings}))
    for name, content in files.items():
        (run / f"{name}.json").write_text(json.dumps(content))


def test_the_command_prints_the_tables_of_all_runs_of_the_demo(folder, held_out, tmp_path, monkeypatch, capsys):
    """Those of stage 1 and the chat come from exam.json, that of the quiz from what eval_scienceqa.py wrote."""
    captions = [h.caption for h in held_out]
    answers = dict(name="stage1", before=[""] * 30, after=captions, swapped=captions[1:] + captions[:1])
    problems = json.loads((folder / "scienceqa/problems.json").read_text())
    problems = {id: p | {"id": id} for id, p in problems.items() if p["split"] == "test"}
    scored = eval_scienceqa.score(list(problems.values()), dict.fromkeys(problems, "A"))
    write_run(tmp_path / "runs/stage1", {"demo": True}, exam=answers)
    write_run(tmp_path / "runs/quiz", {"demo": True}, answers_test=scored)
    write_run(tmp_path / "runs/unfinished", {"demo": True})
    write_run(tmp_path / "runs/real", {"demo": False}, answers_test=scored)
    write_run(tmp_path / "runs/imported", None, answers_test=scored)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["exam"])
    exam.main()
    printed = capsys.readouterr().out
    assert re.findall("^--- (.*)$", printed, re.MULTILINE) == ["runs/quiz", "runs/stage1"]
    assert re.search(r"W trained +100.0", printed)
    header, row, chance = re.search(r"--- runs/quiz\n(.*)\n(.*)\n(.*)\n\n", printed).groups()
    assert header.split()[-1] == "Avg" and row.split()[0] == "answers_test.json"
    assert row.split()[-1] == f"{100 * sum(p['answer'] == 0 for p in problems.values()) / len(problems):.1f}"
    assert chance.split()[-1] == f"{100 * sum(1 / len(p['choices']) for p in problems.values()) / len(problems):.1f}"
    monkeypatch.setattr("sys.argv", ["exam", "runs/unfinished"])
    with pytest.raises(UserError, match="holds no answers"):
        exam.main()


def test_the_command_without_runs_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["exam"])
    with pytest.raises(UserError, match="train.py --stage 1"):
        exam.main()


# --- after training


def finished_run(run, stage, precision):
    """A run directory of the demo with a W that is zero."""
    model = checkpoint.build(checkpoint.load_llama(world.LLAMA), checkpoint.load_vision(world.VISION))
    torch.nn.init.zeros_(model.projector.weight)
    model.set_trainable(stage)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    config = dict(stage=stage, llama=str(world.LLAMA), precision=precision, template=TEMPLATE, feature_layer=FEATURE_LAYER,
                  settings={"demo": True})  # fmt: skip
    checkpoint.save_run(run, model.llama.config, trained, config, world.VISION, world.LLAMA / "tokenizer.model")


@pytest.fixture
def asked(monkeypatch, held_out):
    """The models that finish() asks, as (W, dtype of the LLaMA, autocast) of each call; three scenes are enough."""
    calls = []

    def spy(model, encoder, prompts, max_new_tokens):
        dtype = model.llama.output.weight.dtype
        calls.append((model.projector.weight.detach().clone(), dtype, torch.is_autocast_enabled("cpu")))
        return eval_scienceqa.ask(model, encoder, prompts, max_new_tokens)

    monkeypatch.setattr(exam, "ask", spy)
    monkeypatch.setattr(exam, "read_held_out", lambda folder: held_out[:3])
    return calls


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stage_1_is_examined_before_and_after(precision, asked, tmp_path, capsys):
    finished_run(tmp_path / "run", 1, precision)
    exam.finish(argparse.Namespace(name="stage1", out=tmp_path / "run", init_from=None, seed=7, max_length=2048))
    answers = json.loads((tmp_path / "run" / "exam.json").read_text())
    assert list(answers) == ["name", "before", "after", "swapped"] and answers["name"] == "stage1"
    assert [len(answers[key]) for key in ("before", "after", "swapped")] == [3] * 3
    assert answers["before"] != answers["after"]
    llama = checkpoint.load_llama(world.LLAMA)
    untrained = checkpoint.build(llama, checkpoint.load_vision(world.VISION), seed=7).projector.weight
    assert torch.equal(asked[0][0], untrained) and not asked[1][0].any() and not asked[2][0].any()
    bf16 = precision == "bf16"
    assert {call[1:] for call in asked} == {(torch.bfloat16 if bf16 else torch.float32, bf16)}
    printed = capsys.readouterr()
    assert exam.report(tmp_path / "run") in printed.out and "9/9" in printed.err


def test_a_chat_is_compared_with_the_run_that_it_started_from(asked, tmp_path, capsys):
    finished_run(tmp_path / "chat", 2, "fp32")
    model = checkpoint.build(checkpoint.load_llama(world.LLAMA), checkpoint.load_vision(world.VISION), seed=3)
    finished_run(tmp_path / "stage1", 1, "fp32")
    torch.save({"weight": model.projector.weight.detach()}, tmp_path / "stage1" / "projector.pth")
    for init_from, seed in ((tmp_path / "stage1", 0), (None, 3)):  # both start from the same W
        asked.clear()
        args = argparse.Namespace(name="chat", out=tmp_path / "chat", init_from=init_from, seed=seed, max_length=2048)
        exam.finish(args)
        assert torch.equal(asked[0][0], model.projector.weight) and not asked[world.QUESTIONS][0].any()  # a call for each question
        answers = json.loads((tmp_path / "chat" / "exam.json").read_text())
        assert [len(answers[key]) for key in ("before", "after", "swapped")] == [9] * 3
    assert "after, another scene's picture" in capsys.readouterr().out


def test_train_examines_a_run_of_the_demo(asked, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)  # pytest keeps its own
    flags = ["--max-steps", "1", "--batch-size", "4", "--workers", "0", "--out"]
    for stage, more, answers in (("1", [], 3), ("2", ["--init-from", str(tmp_path / "1")], 9)):
        monkeypatch.setattr("sys.argv", ["train.py", "--stage", stage, *more, *flags, str(tmp_path / stage)])
        train.main()
        exam_json = json.loads((tmp_path / stage / "exam.json").read_text())
        assert [len(exam_json[key]) for key in ("before", "after", "swapped")] == [answers] * 3
        printed = capsys.readouterr().out
        assert "\ndemo: --epochs" in "\n" + printed and "another scene's picture" in printed
        announced = world.EXAM["stage1" if stage == "1" else "chat"]
        assert f"demo: after the last step, {announced}\n" in printed and f"the exam: {announced}\n" in printed
        following = "torchrun train.py --stage 2 --init-from" if stage == "1" else "python chat.py --model"
        assert printed.endswith(f"next: {following} {tmp_path / stage}\n")
        assert exam.is_examined(tmp_path / stage)
    assert torch.equal(asked[1][0], asked[3][0])  # the chat starts from the W of stage 1


def test_the_quiz_has_its_own_program(tmp_path, capsys):
    exam.finish(argparse.Namespace(name="scienceqa", out=tmp_path / "quiz"))
    assert capsys.readouterr().out == ""


def test_only_process_0_is_examined(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    for name in ("stage1", "chat", "scienceqa"):
        exam.finish(argparse.Namespace(name=name, out=tmp_path / "absent"))
    assert capsys.readouterr().out == ""
