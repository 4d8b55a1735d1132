"""tools/answer.py: files of questions through `chat.py --questions`, with the tiny random run of the quiz's tests."""

import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT
from PIL import Image
from test_eval_scienceqa import ENVIRONMENT, PATIENCE, run  # noqa: F401  (run is a fixture)

import chat
import eval_scienceqa
from common import UserError, printable

QUESTIONS = [  # of several lengths; the original's benchmarks use an id twice
    {"question_id": 7, "image": "a.png", "text": "Which thing is red?"},
    {"question_id": 7, "image": "b.png", "text": "<image>\nWhich thing is at the left?", "category": "place"},
    {"question_id": "no picture", "text": "Which is blue?"},
    {"question_id": 9, "image": None, "text": "A or B?"},
    {"question_id": 10, "image": "a.png", "text": "Which thing is at the left, and which is far at the left of it?"},
]


@pytest.fixture
def files(tmp_path):
    """A folder with questions.jsonl, and pictures in images/ and images.zip."""
    (tmp_path / "images").mkdir()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for i, name in enumerate(("a.png", "b.png")):
            Image.linear_gradient("L").rotate(90 * i).resize((40, 40)).save(tmp_path / "images" / name)
            archive.write(tmp_path / "images" / name, name)
    write_lines(tmp_path / "questions.jsonl", QUESTIONS)
    return tmp_path


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags(run, files, out="answers.jsonl", images="images"):  # noqa: F811
    return list(map(str, ["--model", run, "--questions", files / "questions.jsonl", "--images", files / images,
                          "--answers", files / out, "--max-new-tokens", 12, "--batch-size", 2]))  # fmt: skip


def answer(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, arguments)])
    chat.main()


def refused(monkeypatch, *arguments) -> str:
    with pytest.raises(UserError) as error:
        answer(monkeypatch, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_each_question_gets_the_answer_of_a_chat(run, files, monkeypatch, capsys):  # noqa: F811
    answer(monkeypatch, *flags(run, files))
    answers = read_lines(files / "answers.jsonl")
    assert [(a["question_id"], a["prompt"]) for a in answers] == [
        (q["question_id"], q["text"].removeprefix("<image>\n")) for q in QUESTIONS]  # fmt: skip
    talker = chat.Chat(run, 12)
    for question, line in zip(QUESTIONS, answers):
        assert list(line) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
        assert line["model_id"] == "run" and line["metadata"]["max_new_tokens"] == 12
        talker.look(question.get("image") and files / "images" / question["image"])
        assert printable(line["text"], keep="\n\t") == talker.ask(line["prompt"]) != ""
    assert len({line["answer_id"] for line in answers}) == len({line["text"] for line in answers}) == len(QUESTIONS)
    assert capsys.readouterr().out.endswith(f"answers.jsonl: 5 answers of {run}\n")
    answer(monkeypatch, *flags(run, files, "zipped.jsonl", "images.zip"))
    assert (files / "zipped.jsonl").read_bytes() == (files / "answers.jsonl").read_bytes()


def test_answers_that_equal_those_of_the_questions_are_counted(run, files, monkeypatch, capsys):  # noqa: F811
    answer(monkeypatch, *flags(run, files))
    texts = [line["text"] for line in read_lines(files / "answers.jsonl")]
    own = [texts[0], f" {texts[1].upper()}. \n", texts[2] + "!", None, texts[4] + "."]
    write_lines(files / "questions.jsonl", [q | ({} if a is None else {"answer": a}) for q, a in zip(QUESTIONS, own)])
    capsys.readouterr()
    answer(monkeypatch, *flags(run, files))  # all were answered before
    assert "\n3 of 4 answers (75.00 %) equal the question's own" in capsys.readouterr().out


def test_sampling_depends_on_the_flags(run, files, monkeypatch):  # noqa: F811
    for name, more in (("cold", ()), ("warm", ("--temperature", 1, "--seed", 3)), ("again", ("--temperature", 1, "--seed", 3))):
        answer(monkeypatch, *flags(run, files, name), *more)
    cold, warm, again = (read_lines(files / name) for name in ("cold", "warm", "again"))
    assert warm == again and [a["text"] for a in warm] != [a["text"] for a in cold]


def test_an_interrupted_command_continues(run, files, monkeypatch, capsys):  # noqa: F811
    """Complete answers are kept as they are, and a line that a kill cut off is dropped."""
    answer(monkeypatch, *flags(run, files, "whole.jsonl"))
    calls, ask = [], eval_scienceqa.ask

    def ask_once(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return ask(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(eval_scienceqa, "ask", ask_once)
        answer(monkeypatch, *flags(run, files))
    kept = read_lines(files / "answers.jsonl")
    assert len(kept) == 2 and kept[0]["prompt"] == QUESTIONS[4]["text"]  # the longest comes first
    kept[0]["text"] = "changed"
    (files / "answers.jsonl").write_text("\n".join(map(json.dumps, kept)) + '\n{"question_id": 9, "pro')
    capsys.readouterr()
    answer(monkeypatch, *flags(run, files))
    assert "2 of 5 questions were answered before" in capsys.readouterr().out
    whole = read_lines(files / "whole.jsonl")
    whole[4]["text"] = "changed"
    assert read_lines(files / "answers.jsonl") == whole


def test_two_processes_write_the_same_file(run, files, monkeypatch):  # noqa: F811
    answer(monkeypatch, *flags(run, files, "one.jsonl"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "chat.py"]
    done = subprocess.run([*torchrun, *flags(run, files, "two.jsonl")], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (files / "two.jsonl").read_bytes() == (files / "one.jsonl").read_bytes()
    assert done.stdout.count("5 answers") == 1 and os.listdir(files).count(".two.jsonl.tmp") == 0


def test_refusals(run, files, monkeypatch, tmp_path):  # noqa: F811
    questions, out = files / "questions.jsonl", files / "answers.jsonl"
    ask = ("--model", run, "--questions", questions)
    assert refused(monkeypatch, *ask).startswith("--answers missing")
    assert refused(monkeypatch, *ask, "--answers", out).startswith("--images missing")
    for flag in ("--images", "--answers"):
        assert "go with --questions" in refused(monkeypatch, "--model", run, flag, files / "images")
    assert "--image goes with one" in refused(monkeypatch, *flags(run, files), "--image", "a.png")
    assert "not allowed with argument" in refused(monkeypatch, *flags(run, files), "--prompt", "Hi")
    (files / "images/b.png").unlink()
    assert "picture b.png: cannot be read from" in refused(monkeypatch, *flags(run, files))
    for record in ({"question_id": 1}, {"text": "What?"}, {"question_id": 1, "text": " "}, {"question_id": [1], "text": "a"}):
        write_lines(questions, [QUESTIONS[0], record])
        assert "questions.jsonl: question 1 is {" in refused(monkeypatch, *flags(run, files))
    for image in ("../a.png", 3, ""):
        write_lines(questions, [QUESTIONS[0] | {"image": image}])
        assert "question 0: its image" in refused(monkeypatch, *flags(run, files))
    questions.write_text("no JSON")
    assert "cannot be read as JSON" in refused(monkeypatch, *flags(run, files))


def test_a_file_of_anything_else_is_not_replaced(run, files, monkeypatch):  # noqa: F811
    write_lines(files / "questions.jsonl", QUESTIONS[2:4])
    answer(monkeypatch, *flags(run, files))
    [line, _] = (files / "answers.jsonl").read_text().splitlines(keepends=True)
    other = line.replace('"A or B?"', '"Which?"').replace('"Which is blue?"', '"Which?"')
    for content, more, message in (
        ("my notes\n", (), "is not a file of answers"), ('{"a": 1}\n', (), "is not a file of answers"),
        (other, (), "which is not among those of --questions"), (line, ("--temperature", 1), "is asked with {'max_new"),
    ):  # fmt: skip
        (files / "answers.jsonl").write_text(content)
        assert message in refused(monkeypatch, *flags(run, files), *more)
        assert (files / "answers.jsonl").read_text() == content
    shutil.copytree(run, files / "other")
    shutil.copy(run.parent / "vit.pt", files)
    (files / "answers.jsonl").write_text(line)
    assert "holds answers of run with" in refused(monkeypatch, *flags(files / "other", files))


def test_errors_are_one_line(files, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["chat.py", "--questions", str(files / "questions.jsonl")])
    with pytest.raises(SystemExit, match="^error: --answers missing.*$"):
        runpy.run_path(str(ROOT / "chat.py"), run_name="__main__")
