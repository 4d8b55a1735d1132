"""tools/web_chat.py: the handlers of the page, with a stand-in for gradio that records its calls; on a tiny random run."""

import runpy
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from PIL import Image
from conftest import ROOT
from test_eval_scienceqa import run  # noqa: F401  (a fixture)

from tools import web_chat


class PageError(Exception):
    """Replaces gradio.Error, which the page shows."""

    def __init__(self, message, print_exception):
        super().__init__(message)


@pytest.fixture
def page(talker):
    """The stand-in for gradio, and the handlers look and answer that `serve` gave to it."""
    gradio = MagicMock(Error=PageError)
    launch = gradio.Blocks().__enter__().launch
    launch.return_value = None, "http://127.0.0.1:7860/", None
    web_chat.serve(talker, gradio, "runs/chat", [Path("a.png"), Path("b.png")])
    look, answer = gradio.File().change.call_args.args[0], gradio.Textbox().submit.call_args.args[0]
    return gradio, look, answer


def messages(turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def command(monkeypatch, *arguments) -> str:
    """The error of `python -m tools.web_chat`."""
    monkeypatch.setattr(sys, "argv", ["web_chat.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools/web_chat.py"), run_name="__main__")
    assert str(end.value.code).startswith("error: ") and "\n" not in end.value.code
    return end.value.code


def test_only_this_machine_can_open_the_page_and_gradio_reports_nothing(page):
    gradio, _, answer = page
    assert gradio.Blocks.call_args.kwargs["analytics_enabled"] is False
    [launch] = gradio.Blocks().__enter__().launch.call_args_list
    assert launch.kwargs["server_name"] == "127.0.0.1" and launch.kwargs["share"] is False and launch.kwargs["quiet"]
    assert gradio.Textbox().submit.call_args.kwargs["concurrency_limit"] == 1  # the model answers one at a time


def test_the_page_names_the_model_what_it_can_be_asked_and_where_it_is(capsys, page, talker):
    gradio, _, _ = page
    heading = gradio.Markdown.call_args_list[0].args[0]
    assert heading.startswith("# ") and "runs/chat" in heading and talker.topics() in heading
    assert "open http://127.0.0.1:7860/" in capsys.readouterr().out and gradio.Blocks().__enter__().block_thread.called
    pick = gradio.Dataset().click.call_args.args[0]
    assert [pick(0), pick(1)] == ["a.png", "b.png"] == [path for [path] in gradio.Dataset.call_args_list[0].kwargs["samples"]]


@pytest.mark.parametrize("size, shown, note", [
    ((48, 48), (480, 480), ""), ((336, 336), (336, 336), ""), ((900, 600), (900, 600), "600 pixels at its centre: left and right"),
    ((30, 60), (240, 480), "30 pixels at its centre: top and bottom"),
])  # fmt: skip
def test_a_picture_has_a_readable_size_and_a_note_if_it_is_cropped(size, shown, note):
    assert web_chat.enlarged(Image.new("RGB", size)).size == shown
    assert (note in web_chat.crop_note(*size)) and bool(note) == bool(web_chat.crop_note(*size))


def test_examples_are_scenes_of_the_demo(tmp_path):
    paths = web_chat.draw_examples(tmp_path)
    assert len({path.read_bytes() for path in paths}) == len(paths) == web_chat.N_EXAMPLES
    assert all(Image.open(path).size == (48, 48) for path in paths)


def test_each_browser_has_its_own_turns_and_its_answers_stream(page, talker, picture):
    gradio, look, answer = page
    shown, note, turns, talk = look(str(picture))
    assert shown.size == (450, 360) and turns == talk == []
    assert "only the square of 40 pixels at its centre: left and right are cut off" in note
    for path in (picture, None):
        talker.look(path)
        expected = [*talker.stream("Which thing is red?")], [*talker.stream("And blue?")]
        talker.look(None)
        mine, other = [], []
        for question, pieces in zip(("Which thing is red?", "And blue?"), expected):
            before = [text.removeprefix("<image>\n") for text in mine]
            text = ""
            for (box, turns, talk), piece in zip(answer(question, mine, path and str(path)), pieces, strict=True):
                text += piece
                assert box == "" and talk == messages([*before, question, text])
                *_, (_, other, _) = answer("Something else", other, None)  # another browser asks in between
            mine = turns
            assert mine[-1] == text.strip() and mine[0].startswith("<image>\n") == bool(path)
        assert len(mine) == 4 and talker.turns == []
    assert look(None) == (None, "", [], []) and [*answer("  ", mine, None)] == [gradio.skip()]


def test_the_page_shows_the_error_of_a_bad_picture(page, tmp_path):
    _, look, answer = page
    (tmp_path / "text.png").write_text("no picture")
    for handler in (look, lambda path: next(answer("Hi", [], path))):
        with pytest.raises(PageError, match="^text.png: not a readable picture"):
            handler(str(tmp_path / "text.png"))


def test_a_page_that_cannot_be_opened_is_one_line(talker, monkeypatch):
    gradio = MagicMock(Error=PageError)
    gradio.Blocks().__enter__().launch.side_effect = ValueError("no\nproxy")
    with pytest.raises(web_chat.UserError, match="could not be opened .*ValueError: no.*NO_PROXY=127.0.0.1,localhost$"):
        web_chat.serve(talker, gradio, "runs/chat", [])


def test_without_gradio_6_the_error_names_the_pip_command_before_a_model_is_read(monkeypatch, tmp_path):
    for gradio in (None, types.SimpleNamespace(__version__="5.49.1")):
        monkeypatch.setitem(sys.modules, "gradio", gradio)
        assert command(monkeypatch, "--model", tmp_path / "nowhere").endswith('pip install "gradio>=6"')


def test_mistakes_end_in_one_line(monkeypatch, run, tmp_path):  # noqa: F811
    monkeypatch.setitem(sys.modules, "gradio", types.SimpleNamespace(__version__="6.1.0"))
    assert "train.py --stage 2" in command(monkeypatch, "--model", tmp_path / "nowhere")
    assert "none.png: No such file" in command(monkeypatch, "--model", run, "--image", tmp_path / "none.png")
    assert "--top-p" in command(monkeypatch, "--model", run, "--top-p", 0)
