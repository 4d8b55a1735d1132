"""chat.py: streaming, turns, commands, one shot from a script, a terminal, a page, bad input; on a tiny random run."""

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
import time
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from test_eval_scienceqa import ENVIRONMENT, ROOT, run, tiny_run  # noqa: F401  (run is a fixture)

import chat
from conversation import UserError, stop_ids, tokenize
from data import Examples
from vision import open_picture, preprocess


@pytest.fixture
def talker(run):  # noqa: F811
    return chat.Chat(run, torch.device("cpu"), max_new_tokens=20, temperature=0.0, top_p=1.0, seed=0)


@pytest.fixture
def picture(tmp_path):
    Image.linear_gradient("L").resize((50, 40)).save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


def scripted(talker, *tokens, then=None):
    """Makes the model say these tokens, and then raise `then`."""

    def generate(*_, **__):
        for token in tokens:
            yield {0: token}
        if then:
            raise then

    talker.model.generate = generate


def asked_plainly(talker, turns, pixels=None):
    """The answer to a conversation, asked without a cached prefix and without streaming."""
    n_patches = talker.model.vision.config.n_patches if pixels is not None else 0
    ids = torch.from_numpy(tokenize(talker.sp, turns, n_patches)[0])
    pixels = pixels if pixels is not None else torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    [answer] = talker.model.answers(ids, torch.tensor([0, len(ids)], dtype=torch.int32), pixels, stop_ids(talker.sp), 20)
    return chat.readable(chat.surface(talker.sp, answer)).strip()


def main(monkeypatch, *arguments, stdin=b""):
    """chat.py of these arguments, as `python chat.py` runs it."""
    monkeypatch.setattr(sys, "argv", ["chat.py", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    runpy.run_path(str(ROOT / "chat.py"), run_name="__main__")


def refused(monkeypatch, *arguments) -> str:
    with pytest.raises(SystemExit) as end:
        main(monkeypatch, *arguments)
    assert str(end.value.code).startswith("error: ") and "\n" not in end.value.code
    return end.value.code


# --- streaming


def test_pieces_are_whole_characters_and_never_stop(talker):
    text = " Grüße, 日本 🙂 # two ## C# ok"
    tokens = talker.sp.encode(text + "\n###")
    assert any(talker.sp.is_byte(t) for t in tokens)
    scripted(talker, *tokens)
    pieces = list(talker.ask("Hi"))
    assert "".join(pieces) == text.strip() == talker.turns[1] and len(pieces) > 10
    assert not any("\ufffd" in piece or "###" in piece for piece in pieces)


@pytest.mark.parametrize("end", [("#", "##"), ("##", "#"), ("#", "#", "#")])
def test_stop_is_not_shown_however_it_is_spelled(talker, end):
    ids = [talker.sp.piece_to_id(e) for e in end]
    assert talker.sp.unk_id() not in ids
    scripted(talker, *talker.sp.encode(" A cat.\n"), *ids, *talker.sp.encode(" Human: more"))
    assert "".join(talker.ask("Hi")) == "A cat." == talker.turns[1]


def test_an_answer_cut_short_is_shown_whole(talker):
    scripted(talker, *talker.sp.encode(" it is C##"))  # the last two marks were held back; no <STOP> comes
    assert "".join(talker.ask("Hi")) == "it is C##" == talker.turns[1]


def test_control_characters_do_not_reach_the_terminal(talker):
    scripted(talker, *talker.sp.encode(" a\x1b[31m\x07\tb\nc"))
    assert "".join(talker.ask("Hi")) == "a\ufffd[31m\ufffd\tb\nc"


def test_interrupted_answers_stay_in_the_conversation(talker):
    scripted(talker, *talker.sp.encode(" The answer is"), then=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        list(talker.ask("Hi"))
    assert talker.turns == ["Hi", "The answer is"]
    scripted(talker, then=KeyboardInterrupt)  # before the first word: as if not asked
    with pytest.raises(KeyboardInterrupt):
        list(talker.ask("And?"))
    assert talker.turns == ["Hi", "The answer is"]
    scripted(talker, *talker.sp.encode(" red blue red blue"))
    for _ in talker.ask("So?"):  # whoever prints is interrupted
        break
    assert talker.turns[2] == "So?" and len(talker.turns) == 4


def test_an_answer_may_go_on_in_another_thread(talker):
    """As a page's server does: autocast is on for every token, and stays on in no thread."""
    on, tokens = [], talker.sp.encode(" red blue red blue")
    talker.autocast = torch.autocast("cpu", torch.bfloat16)

    def generate(*_, **__):
        for token in tokens:
            on.append(torch.is_autocast_enabled("cpu"))
            yield {0: token}

    talker.model.generate = generate
    answer, pieces = talker.ask("Hi"), []

    def one():
        pieces.append(next(answer, None))
        on.append(not torch.is_autocast_enabled("cpu"))

    while not pieces or pieces[-1] is not None:
        thread = threading.Thread(target=one)
        thread.start()
        thread.join()
    assert "".join(pieces[:-1]) == "red blue red blue" and all(on) and len(pieces) > 5


# --- what is asked


def test_each_question_is_asked_with_the_conversation_before_it(talker, picture):
    pixels = preprocess(open_picture(picture.read_bytes()), 32)[None]
    for path, mark in ((picture, "<image>\n"), (None, "")):
        talker.look(path)
        turns = []
        for question in ("Which thing is red?", "Where <image> is it? ### Human:", "Which one?"):
            turns.append(question if turns else mark + question)
            answer = asked_plainly(talker, turns, pixels if path else None)
            assert "".join(talker.ask(question)) == answer != ""
            turns.append(answer)
            assert talker.turns == turns


def test_the_picture_and_the_seed_change_the_answer(talker, picture, run):  # noqa: F811
    blind = "".join(talker.ask("Which thing is red?"))
    talker.look(picture)
    assert talker.turns == [] and "".join(talker.ask("Which thing is red?")) != blind

    def drawn(seed):
        dicing = chat.Chat(run, torch.device("cpu"), max_new_tokens=20, temperature=1.0, top_p=0.9, seed=seed)
        return "".join(dicing.ask("Which thing is red?"))

    assert drawn(1) == drawn(1) != drawn(2)


# --- commands


def test_saved_conversations_are_llavas(talker, picture, tmp_path, capsys):
    for path, name in ((picture, "seen.json"), (None, "blind.json")):
        talker.look(path)
        with pytest.raises(UserError, match="nothing has been said"):
            chat.obey(talker, f"/save {tmp_path / name}")
        list(talker.ask("Which thing is red?"))
        chat.obey(talker, f"/save {tmp_path / name}")
        list(talker.ask("And blue?"))
        chat.obey(talker, f"/save {tmp_path / name}")  # its own file it may write again
        [example] = [*Examples([tmp_path / name])]
        assert example.turns == talker.turns and len(example.turns) == 4 and example.image == (path and path.name)
        assert (f"its picture is in {picture.parent}" in capsys.readouterr().err) == bool(path)
    chat.obey(talker, "/reset")
    list(talker.ask("Another conversation"))
    with pytest.raises(UserError, match="is there already"):  # no longer its own
        chat.obey(talker, f"/save {tmp_path / 'blind.json'}")
    before = picture.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        chat.obey(talker, f"/save '{picture}'")
    with pytest.raises(UserError, match="written"):
        chat.obey(talker, f"/save {picture}/x.json")
    assert picture.read_bytes() == before


def test_image_and_reset_begin_anew(talker, picture, capsys):
    list(talker.ask("Hi"))
    (picture.parent / "text.png").write_text("no picture")
    for bad, reason in (("text.png", "not a readable picture"), ("none.png", "No such file"), (".", "Is a directory")):
        with pytest.raises(UserError, match=reason):
            chat.obey(talker, f"/image {picture.parent / bad}")
        assert talker.turns and talker.path is None  # the conversation goes on as it was
    chat.obey(talker, f'/image "{picture}"')
    assert talker.path == picture and talker.turns == [] and talker.pixels.shape == (1, 3, 32, 32)
    list(talker.ask("Hi"))
    chat.obey(talker, "/reset")
    assert talker.path == picture and talker.turns == []
    chat.obey(talker, "/image")
    assert talker.path is None and len(talker.pixels) == 0
    capsys.readouterr()
    for line in ("/help", "/wrong", "/save"):
        chat.obey(talker, line)
        said = capsys.readouterr().err.strip()
        assert said.endswith(chat.HELP) and said.startswith(f"{line}: no such command") == (line != "/help")


# --- from scripts, and in a terminal


def test_one_shot_prints_the_answer_alone(monkeypatch, capsys, run, picture, talker):  # noqa: F811
    main(monkeypatch, "--model", run, "--image", picture, "--prompt", "Which thing?", "--max-new-tokens", 20)
    captured = capsys.readouterr()
    talker.look(picture)
    assert captured.out == "".join(talker.ask("Which thing?")) + "\n" and captured.err == ""
    settings = dict(max_new_tokens=20, temperature=1.5, top_p=0.9, seed=3)
    main(monkeypatch, "--model", run, "--prompt", "Which?", *(f"--{k.replace('_', '-')}={v}" for k, v in settings.items()))
    assert capsys.readouterr().out == "".join(chat.Chat(run, torch.device("cpu"), **settings).ask("Which?")) + "\n"


def test_piped_questions(run, picture, tmp_path, talker):  # noqa: F811
    lines = ["Which thing?", "", "And \udcff?", "/image none.png", f"/save {tmp_path / 'x.json'}"]
    lines += [f"/image {picture}", "Hi", "/quit", "not this"]
    done = subprocess.run(
        [sys.executable, "chat.py", "--model", run, "--max-new-tokens", "20"], cwd=ROOT, capture_output=True, timeout=100,
        env=ENVIRONMENT, input="\n".join(lines).encode("utf-8", "surrogateescape"))  # fmt: skip
    notes, answers = done.stderr.decode(), ["".join(talker.ask(q)) for q in ("Which thing?", "And \ufffd?")]
    talker.look(picture)
    answers.append("".join(talker.ask("Hi")))
    assert done.returncode == 0 and done.stdout.decode() == "".join(answer + "\n" for answer in answers)
    assert "error: none.png: No such file or directory\n" in notes and "Traceback" not in notes
    assert len(json.loads((tmp_path / "x.json").read_text())[0]["conversations"]) == 4


def test_in_a_terminal(run):  # noqa: F811
    """Ctrl-C stops an answer and not the chat, the arrow key brings a question back, Ctrl-D ends."""
    terminal, inner = pty.openpty()
    # As a shell would: a session of its own, whose terminal this is. (pty.fork is not safe here: torch has threads.)
    begin = "import fcntl, os, runpy, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    begin += "runpy.run_path('chat.py', run_name='__main__')"
    process = subprocess.Popen([sys.executable, "-c", begin, "--model", str(run), "--max-new-tokens", "20000"], cwd=ROOT,
                               stdin=inner, stdout=inner, stderr=inner, env={**ENVIRONMENT, "TERM": "dumb"})  # fmt: skip
    os.close(inner)
    seen = ""

    def shows(pattern, seconds=2.0):
        """Whether it is shown by then; what came before it is forgotten."""
        nonlocal seen
        deadline = time.time() + seconds
        while not (found := re.search(pattern, seen)) and time.time() < deadline and process.poll() is None:
            if select.select([terminal], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):  # the chat has ended
                    seen += os.read(terminal, 4096).decode("utf-8", "replace")
        seen = seen[found.end() :] if found else seen
        return bool(found)

    def until(pattern):
        assert shows(pattern, 60), f"{pattern} did not come: {seen[-500:]!r}"

    def press(key, pattern):
        """Again until the pattern shows, as a user would: a key pressed between two prompts can get lost."""
        for _ in range(30):
            os.write(terminal, key)
            if shows(pattern) or process.poll() is not None:
                return
        raise AssertionError(f"{key} did nothing: {seen[-500:]!r}")

    try:
        until("> ")
        os.write(terminal, b"Which thing is red?\n")
        until(r"red\?\r\n.{60}")  # an answer without end is under way
        press(b"\x03", r"stopped[^>]*> ")
        os.write(terminal, b"/reset\n")
        until(r"begun anew[^>]*> ")
        os.write(terminal, b"\x1b[A\x1b[A")  # up, up
        until(r"Which thing is red\?")
        press(b"\x03", r"stopped[^>]*> ")
        press(b"\x04", "no such thing shows: it ends")
        assert process.wait() == 0
    finally:
        process.kill()
        os.close(terminal)


# --- in a browser


class PageError(Exception):
    """Stands in for gradio.Error, which is shown on the page."""

    def __init__(self, message, print_exception):
        super().__init__(message)


@pytest.fixture
def page(talker):
    """The page, made with a stand-in for gradio that keeps what it is given -> that, and its functions look, answer."""
    gradio = MagicMock(Error=PageError)
    chat.serve(talker, gradio)
    look, answer = gradio.File().change.call_args.args[0], gradio.Textbox().submit.call_args.args[0]
    return gradio, look, answer


def messages(turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def test_the_page_is_for_this_machine_and_tells_nobody(page):
    gradio, _, answer = page
    assert gradio.Blocks.call_args.kwargs["analytics_enabled"] is False
    gradio.Blocks().__enter__().launch.assert_called_once_with(server_name="127.0.0.1", share=False)
    assert gradio.Textbox().submit.call_args.kwargs["concurrency_limit"] == 1  # the model answers one at a time


def test_each_browser_has_its_own_turns_and_its_answers_stream(page, talker, picture):
    gradio, look, answer = page
    seen, turns, talk = look(str(picture))
    assert seen.size == (50, 40) and turns == talk == []
    for path in (picture, None):
        talker.look(path)
        expected = [*talker.ask("Which thing is red?")], [*talker.ask("And blue?")]
        talker.look(None)  # whatever else is said meanwhile
        mine, other = [], []
        for question, pieces in zip(("Which thing is red?", "And blue?"), expected):
            begun = [text.removeprefix("<image>\n") for text in mine]
            said = ""
            for (box, turns, talk), piece in zip(answer(question, mine, path and str(path)), pieces, strict=True):
                said += piece
                assert box == "" and talk == messages([*begun, question, said])
                *_, (_, other, _) = answer("Something else", other, None)
            mine = turns
            assert mine[-1] == said.strip() and mine[0].startswith("<image>\n") == bool(path)
        assert len(mine) == 4 and talker.turns == []
    assert look(None) == (None, [], []) and [*answer("  ", mine, None)] == [gradio.skip()]


def test_a_bad_picture_is_told_on_the_page(page, tmp_path):
    _, look, answer = page
    (tmp_path / "text.png").write_text("no picture")
    for use in (look, lambda path: next(answer("Hi", [], path))):
        with pytest.raises(PageError, match="^text.png: not a readable picture"):
            use(str(tmp_path / "text.png"))


def test_a_page_without_gradio_is_refused_before_the_model_is_read(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refused(monkeypatch, "--model", tmp_path / "nowhere", "--web").endswith('pip install "gradio>=6"')
    assert "leave one out" in refused(monkeypatch, "--web", "--prompt", "Hi")


# --- bad input


def test_refusals(monkeypatch, run, picture, tmp_path):  # noqa: F811
    (tmp_path / "text.png").write_text("no picture")
    ask = ("--prompt", "Hi", "--max-new-tokens", 3)
    assert "text.png: not a readable picture" in refused(monkeypatch, "--model", run, "--image", tmp_path / "text.png", *ask)
    assert "none.png: No such file" in refused(monkeypatch, "--model", run, "--image", tmp_path / "none.png", *ask)
    missing = refused(monkeypatch, "--model", tmp_path / "nowhere", *ask)
    assert f"first train it: torchrun train.py --stage 2 --out {tmp_path / 'nowhere'}" in missing
    shutil.copytree(run, tmp_path / "half")
    (tmp_path / "half/projector.pth").unlink()
    assert "no finished run" in refused(monkeypatch, "--model", tmp_path / "half", *ask)
    for flags in (("--temperature", -1), ("--temperature", "nan"), ("--top-p", 0), ("--top-p", 1.5),
                  ("--max-new-tokens", 0), ("--seed", -1)):  # fmt: skip
        assert "--temperature and --seed: 0 or more" in refused(monkeypatch, "--model", run, "--prompt", "Hi", *flags)


def test_stage_1_answers_with_a_note(monkeypatch, capsys, tmp_path):
    main(monkeypatch, "--model", tiny_run(tmp_path, stage=1), "--prompt", "Hi", "--max-new-tokens", 3)
    captured = capsys.readouterr()
    assert "is a run of stage 1" in captured.err and captured.out.endswith("\n")
