"""chat.py: streaming, turns, commands, one question from a script, a terminal, wrong input; on a tiny random run."""

import contextlib
import io
import json
import os
import pty
import re
import runpy
import select
import shutil
import subprocess
import sys
import threading
from functools import partial
import time

import pytest
import torch
from conftest import ROOT, open_chat
from test_eval_scienceqa import ENVIRONMENT, run, tiny_run  # noqa: F401  (run is a fixture)

import chat
from common import UserError, printable
from conversation import answer_text, has_ended, tokenize
from data import Examples
from demo import world
from formats.pictures import open_picture
from vision import preprocess


def script(talker, text, *tokens, then=None):
    """Makes the model generate this text, then these tokens, and then raise `then`."""
    tokens = [*talker.sp.encode(text), *tokens]

    def generate(*_, **__):
        for i in range(len(tokens)):
            yield [tokens[: i + 1]]
        if then:
            raise then

    talker.model.generate = generate


def whole_answer(talker, turns, pixels=None) -> str:
    """The answer to a conversation as one sequence, without a shared system message and without streaming."""
    sp = talker.sp
    ids = torch.from_numpy(tokenize(sp, turns, 16 if pixels is not None else 0)[0])
    pixels = torch.zeros(0, 3, 32, 32, dtype=torch.uint8) if pixels is None else torch.from_numpy(pixels[None])
    *_, [answer] = talker.model.generate(ids, [0, len(ids)], pixels, partial(has_ended, sp), 20)
    return printable(answer_text(sp, answer), keep="\n\t")


def main(monkeypatch, *arguments, stdin=b""):
    """Runs chat.py with these arguments, as `python chat.py` does."""
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    runpy.run_path(str(ROOT / "chat.py"), run_name="__main__")


def refused(monkeypatch, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, *arguments)
    assert str(end.value.code).startswith("error: ") and "\n" not in end.value.code
    return end.value.code


# --- streaming


def test_pieces_are_complete_characters_and_never_stop(talker):
    text = " Grüße, 日本 🙂 # two ## C# ok"
    assert any(talker.sp.is_byte(token) for token in talker.sp.encode(text))
    script(talker, text + "\n###")
    pieces = list(talker.stream("Hi"))
    assert "".join(pieces) == text.strip() == talker.turns[1] and len(pieces) > 10
    assert not any("\ufffd" in piece or "###" in piece for piece in pieces)


@pytest.mark.parametrize("end", [("#", "##"), ("##", "#"), ("#", "#", "#")])
def test_stop_is_not_shown_however_it_is_spelled(talker, end):
    sp = talker.sp
    ids = [sp.piece_to_id(piece) for piece in end]
    assert sp.unk_id() not in ids
    script(talker, " A cat.\n", *ids, *sp.encode(" Human: more"))
    assert talker.ask("Hi") == "A cat." == talker.turns[1]


def test_eos_ends_an_answer(talker, monkeypatch):
    """So do models end that were trained with the template of Vicuna 1.1."""
    tokens = iter([*talker.sp.encode(" A cat."), talker.sp.eos_id(), *talker.sp.encode(" USER: more")])
    monkeypatch.setattr("model.choose", lambda *_: [next(tokens)])
    assert talker.ask("Hi") == "A cat." == talker.turns[1]


def test_an_answer_that_is_cut_is_shown_to_its_end(talker):
    script(talker, " it is C##")  # `##` could have been the start of <STOP>, so it was held back
    assert talker.ask("Hi") == "it is C##" == talker.turns[1]


def test_control_characters_do_not_reach_the_terminal(talker):
    script(talker, " a\x1b[31m\x07\tb\nc")
    assert talker.ask("Hi") == "a\ufffd[31m\ufffd\tb\nc"


def test_interrupted_answers_join_the_conversation(talker):
    script(talker, " The answer is", then=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        talker.ask("Hi")
    assert talker.turns == ["Hi", "The answer is"]
    script(talker, "", then=KeyboardInterrupt)  # before the first word: the question is dropped
    with pytest.raises(KeyboardInterrupt):
        talker.ask("And?")
    assert talker.turns == ["Hi", "The answer is"]
    script(talker, " red blue red blue")
    for _ in talker.stream("So?"):  # the caller stops
        break
    assert talker.turns[2] == "So?" and len(talker.turns) == 4


def test_an_answer_may_continue_in_another_thread(talker):
    """As in the server of a page: autocast is on for every token, and stays on in no thread."""
    states, tokens = [], talker.sp.encode(" red blue red blue")
    talker.autocast = torch.autocast("cpu", torch.bfloat16)

    def generate(*_, **__):
        for i in range(len(tokens)):
            states.append(torch.is_autocast_enabled("cpu"))
            yield [tokens[: i + 1]]

    talker.model.generate = generate
    answer, pieces = talker.stream("Hi"), []

    def take_one():
        pieces.append(next(answer, None))
        states.append(not torch.is_autocast_enabled("cpu"))

    while not pieces or pieces[-1] is not None:
        thread = threading.Thread(target=take_one)
        thread.start()
        thread.join()
    assert "".join(pieces[:-1]) == "red blue red blue" and all(states) and len(pieces) > 5


# --- questions


def test_each_question_is_asked_with_the_conversation_before_it(talker, picture):
    pixels = preprocess(open_picture(picture.read_bytes()), 32)
    for path, mark in ((picture, "<image>\n"), (None, "")):
        talker.look(path)
        turns = []
        for question in ("Which thing is red?", "Where <image> is it? ### Human:", "Which one?"):
            turns.append(question if turns else mark + question)
            answer = whole_answer(talker, turns, pixels if path else None)
            assert talker.ask(question) == answer != ""
            turns.append(answer)
            assert talker.turns == turns


def test_the_picture_and_the_seed_change_the_answer(talker, picture, run):  # noqa: F811
    without = talker.ask("Which thing is red?")
    talker.look(picture)
    assert talker.turns == [] and talker.ask("Which thing is red?") != without

    def sampled(seed):
        chat = open_chat(run, "--temperature", "1", "--top-p", "0.9", "--seed", str(seed))
        return chat.ask("Which thing is red?")

    assert sampled(1) == sampled(1) != sampled(2)


def test_a_conversation_over_the_trained_length_is_announced(talker, capsys):
    talker.ask("Hi")
    assert capsys.readouterr().err == ""
    talker.max_length = 20
    talker.ask("Hi")
    assert "longer than those that the model was trained on" in capsys.readouterr().err


# --- commands


def test_saved_conversations_have_the_format_of_llava(talker, picture, tmp_path):
    for path, name in ((picture, "with.json"), (None, "without.json")):
        talker.look(path)
        with pytest.raises(UserError, match="no turn"):
            chat.obey(talker, f"/save {tmp_path / name}")
        talker.ask("Which thing is red?")
        talker.ask("And blue?")
        chat.obey(talker, f"/save {tmp_path / name}")
        [example] = [*Examples([tmp_path / name])]
        assert example.turns == talker.turns and len(example.turns) == 4 and example.image == (path and path.name)


def test_save_replaces_no_file_of_anything_else(talker, picture, tmp_path):
    talker.ask("Hi")
    (tmp_path / "mine.json").write_text("mine")
    for path in (tmp_path / "mine.json", picture):
        before = path.read_bytes()
        with pytest.raises(UserError, match="exists"):
            chat.obey(talker, f"/save '{path}'")
        assert path.read_bytes() == before
    for folder in (picture, tmp_path / "absent"):  # it makes no folders
        with pytest.raises(UserError, match="x.json: its folder does not exist"):
            chat.obey(talker, f"/save {folder}/x.json")
    assert not (tmp_path / "absent").exists()


def test_image_and_reset_start_again(talker, picture, capsys):
    talker.ask("Hi")
    (picture.parent / "text.png").write_text("no picture")
    for bad, reason in (
        ("text.png", "not a readable picture"),
        ("absent.png", "No such file"),
        (".", "Is a directory"),
    ):
        with pytest.raises(UserError, match=reason):
            chat.obey(talker, f"/image {picture.parent / bad}")
        assert talker.turns and talker.path is None  # the conversation continues
    chat.obey(talker, f'/image "{picture}"')
    assert talker.path == picture and talker.turns == [] and talker.pixels.shape == (1, 3, 32, 32)
    talker.ask("Hi")
    chat.obey(talker, "/reset")
    assert talker.path == picture and talker.turns == []
    chat.obey(talker, "/image")
    assert talker.path is None and len(talker.pixels) == 0
    capsys.readouterr()
    for line in ("/help", "/wrong"):
        chat.obey(talker, line)
        printed = capsys.readouterr().err.strip()
        assert printed.endswith(chat.HELP) and printed.startswith(f"{line}: unknown command") == (line != "/help")
    with pytest.raises(UserError, match="^/save FILE: name the file"):
        chat.obey(talker, "/save")


# --- from scripts, and in a terminal


def test_one_shot_prints_the_answer_alone(monkeypatch, capsys, run, picture, talker):  # noqa: F811
    main(monkeypatch, "--model", run, "--image", picture, "--prompt", "Which thing?", "--max-new-tokens", 20)
    captured = capsys.readouterr()
    talker.look(picture)
    assert captured.out == talker.ask("Which thing?") + "\n"
    flags = ("--max-new-tokens", "20", "--temperature", "1.5", "--top-p", "0.9", "--seed", "3")
    main(monkeypatch, "--model", run, "--prompt", "Which?", *flags)
    assert capsys.readouterr().out == open_chat(run, *flags).ask("Which?") + "\n"


@pytest.mark.parametrize("leaves", ["/quit", "quit", "exit"])
def test_piped_questions(run, picture, tmp_path, talker, leaves):  # noqa: F811
    lines = ["Which thing?", "", "And \udcff?", "/image absent.png", f"/save {tmp_path / 'x.json'}"]
    lines += [f"/image {picture}", "Hi", leaves, "not this"]
    done = subprocess.run(
        [sys.executable, "chat.py", "--model", run, "--max-new-tokens", "20"], cwd=ROOT, capture_output=True,
        timeout=100, env=ENVIRONMENT, input="\n".join(lines).encode("utf-8", "surrogateescape"))  # fmt: skip
    informed, answers = done.stderr.decode(), [talker.ask(q) for q in ("Which thing?", "And \ufffd?")]
    talker.look(picture)
    answers.append(talker.ask("Hi"))
    assert done.returncode == 0 and done.stdout.decode() == "".join(answer + "\n" for answer in answers)
    assert "error: absent.png: No such file or directory\n" in informed and "Traceback" not in informed
    assert len(json.loads((tmp_path / "x.json").read_text())[0]["conversations"]) == 4


class Terminal:
    """A process in a terminal of its own, as a shell starts it."""

    def __init__(self, *arguments):
        self.end, inner = pty.openpty()
        # pty.fork would fork this process, in which torch has threads.
        code = ("import fcntl, os, runpy, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
                "runpy.run_path('chat.py', run_name='__main__')")  # fmt: skip
        command = [sys.executable, "-c", code, *map(str, arguments)]
        self.process = subprocess.Popen(command, cwd=ROOT, env={**ENVIRONMENT, "TERM": "dumb"}, stdin=inner,
                                        stdout=inner, stderr=inner)  # fmt: skip
        os.close(inner)
        self.shown = ""

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.end)

    def shows(self, pattern, seconds=2.0) -> bool:
        """Whether the pattern appears in time. Drops what was shown up to its end."""
        deadline = time.time() + seconds
        found = re.search(pattern, self.shown)
        while not found and time.time() < deadline and self.process.poll() is None:
            if select.select([self.end], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the process has ended
                    self.shown += os.read(self.end, 4096).decode("utf-8", "replace")
            found = re.search(pattern, self.shown)
        if found:
            self.shown = self.shown[found.end() :]
        return bool(found)

    def expect(self, pattern):
        assert self.shows(pattern, seconds=60), f"{pattern} was not shown: {self.shown[-500:]!r}"

    def type(self, keys):
        os.write(self.end, keys)

    def press(self, key, pattern):
        """Presses a key until the pattern appears, as a user would: a key between two prompts can get lost."""
        for _ in range(30):
            self.type(key)
            if self.shows(pattern) or self.process.poll() is not None:
                return
        raise AssertionError(f"{key} did nothing: {self.shown[-500:]!r}")


def test_keys_in_a_terminal(run):  # noqa: F811
    """Ctrl-C stops an answer but not the chat, the arrow key brings a question back, Ctrl-D ends the chat."""
    terminal = Terminal("--model", run, "--max-new-tokens", 20000)
    try:
        terminal.expect("> ")
        terminal.type(b"Which thing is red?\n")
        terminal.expect(r"red\?\r\n.{60}")  # the start of a very long answer
        terminal.press(b"\x03", r"stopped[^>]*> ")
        terminal.type(b"/reset\n")
        terminal.expect(r"started again[^>]*> ")
        terminal.type(b"\x1b[A\x1b[A")  # up, up
        terminal.expect(r"Which thing is red\?")
        terminal.press(b"\x03", r"stopped[^>]*> ")
        terminal.press(b"\x04", "a pattern that is never shown")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.close()


# --- without flags, and from Python


@pytest.fixture
def clone(run, picture, tmp_path, monkeypatch):  # noqa: F811
    """A folder in which nothing is trained. demo/ has a chatbot and a scene."""
    shipped = tmp_path / "demo/chat"
    shutil.copytree(run, shipped)
    shutil.copy(run.parent / "vit.pt", tmp_path / "demo")
    config = json.loads((run / "config.json").read_text())
    (shipped / "config.json").write_text(json.dumps(config | {"settings": {"task": "chat", "demo": True}}))
    monkeypatch.setattr(world, "CHAT", shipped)
    monkeypatch.setattr(world, "SCENE", picture)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_fresh_clone_has_a_chatbot_and_a_scene(monkeypatch, capsys, clone, picture):
    main(monkeypatch, "--max-new-tokens", 20, stdin=b"Which thing is red?\n")
    captured = capsys.readouterr()
    talker = chat.Chat(clone / "demo/chat", 20)
    talker.look(picture)
    assert captured.out == talker.ask("Which thing is red?") + "\n"
    assert "runs/chat is absent; this is demo/chat" in captured.err and f"picture: {picture.name} (" in captured.err
    assert world.TOPICS["chat"] in captured.err
    main(monkeypatch, "--prompt", "Hi", "--max-new-tokens", 3, "--image", picture)
    assert f"picture: {picture} (" in capsys.readouterr().err
    (clone / "runs/chat").mkdir(parents=True)  # such as that of a training that goes on
    assert "runs/chat: no run directory" in refused(monkeypatch, "--prompt", "Hi")
    shutil.rmtree(clone / "runs")
    shutil.rmtree(clone / "demo")
    assert "runs/chat: no run directory; train it first" in refused(monkeypatch, "--prompt", "Hi")


def test_what_a_model_can_be_asked(talker, tmp_path):
    talker.settings = {"task": "chat", "data": ["../detail_23k.json", "/data/own.json"]}
    talker.task = "chat"
    assert "for chat on detail_23k.json, own.json" in talker.topics()
    for task, text in world.TOPICS.items():
        talker.settings = {"task": task, "demo": True}
        assert talker.topics() == text


def test_the_readmes_snippets_run(clone, picture, capsys):
    """Those that use chat.py or checkpoint.py, with a picture and a run of the names that they give."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    blocks = [block for block in blocks if "from chat" in block or "from checkpoint" in block]
    assert blocks
    for name in ("picture.png", "demo/scene.png"):
        shutil.copy(picture, name)
    shutil.copytree("demo", "runs")
    for block in blocks:
        exec(block, {})
        assert len(capsys.readouterr().out) > 1


# --- wrong input


def test_refusals(monkeypatch, run, picture, tmp_path):  # noqa: F811
    (tmp_path / "text.png").write_text("no picture")
    ask = ("--prompt", "Hi", "--max-new-tokens", 3)
    assert "text.png: not a readable picture" in refused(
        monkeypatch, "--model", run, "--image", tmp_path / "text.png", *ask
    )
    assert "absent.png: No such file" in refused(monkeypatch, "--model", run, "--image", tmp_path / "absent.png", *ask)
    missing = refused(monkeypatch, "--model", tmp_path / "nowhere", *ask)
    assert f"train it first: torchrun train.py --stage 2 --out {tmp_path / 'nowhere'}" in missing
    shutil.copytree(run, tmp_path / "half")
    (tmp_path / "half/projector.pth").unlink()
    assert "unfinished" in refused(monkeypatch, "--model", tmp_path / "half", *ask)
    for flags in (("--temperature", -1), ("--temperature", "nan"), ("--top-p", 0), ("--top-p", 1.5),
                  ("--max-new-tokens", 0), ("--seed", -1)):  # fmt: skip
        assert f"argument {flags[0]}: {flags[1]}: expected a" in refused(monkeypatch, "--model", run, "--prompt", "Hi", *flags)


def test_a_run_of_another_template_is_refused(monkeypatch, run, tmp_path):  # noqa: F811
    shutil.copytree(run, tmp_path / "other")
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps(config | {"template": "vicuna_v1"}))
    assert "template 'vicuna_v1', expected 'vicuna_v0'" in refused(
        monkeypatch, "--model", tmp_path / "other", "--prompt", "Hi"
    )


def test_a_run_of_another_task_answers_with_a_warning(monkeypatch, capsys, tmp_path, run):  # noqa: F811
    chatbot = shutil.copytree(run, run.parent / "chat", dirs_exist_ok=True)
    config = json.loads((run / "config.json").read_text())
    (chatbot / "config.json").write_text(json.dumps(config | {"settings": {"task": "chat"}}))
    for path, task in ((tiny_run(tmp_path / "1", stage=1), "captions"), (run, "scienceqa"), (chatbot, None)):
        main(monkeypatch, "--model", path, "--prompt", "Hi", "--max-new-tokens", 3)
        captured = capsys.readouterr()
        assert ("was trained for" in captured.err) == bool(task) and (not task or task in captured.err) and captured.out.endswith("\n")
