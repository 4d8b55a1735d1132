"""Serves a page for talking to a trained model. Only this machine can open it. Needs gradio 6 or later.

    python -m tools.web_chat                                      # runs/chat, without a picture
    python -m tools.web_chat --model runs/chat --image PICTURE    # about this picture at first
"""

import copy
import os
from collections.abc import Iterator
from pathlib import Path

from chat import Chat, add_arguments, open_chat
from common import ArgumentParser, UserError, reason, run_command
from conversation import IMAGE
from formats.pictures import open_picture

ADDRESS = "127.0.0.1"  # other machines cannot reach the page


def import_gradio():
    """The gradio module, with its telemetry off. Raises UserError if it is missing or older than 6."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio

        version = int(gradio.__version__.partition(".")[0])
    except ImportError:
        version = 0
    if version < 6:
        raise UserError('the page needs gradio 6 or later; install it with: pip install "gradio>=6"')
    return gradio


class Page:
    """The handlers of the page. Every browser sends its picture and its turns with each request."""

    def __init__(self, chat: Chat, gradio):
        self.chat, self.gradio = chat, gradio

    def start(self, picture: str | None) -> Chat:
        """A new conversation with the same model. Raises gradio.Error, which the page shows, if the picture is bad."""
        chat = copy.copy(self.chat)
        path = Path(picture) if picture else None
        try:
            chat.look(path)
        except UserError as error:
            message = str(error)
            if path:
                message = message.removeprefix(f"{path.parent}/")  # a temporary folder of gradio's
            raise self.gradio.Error(message, print_exception=False) from None
        return chat

    def look(self, picture: str | None) -> tuple:
        """-> the picture to show or None, no turns, no messages."""
        self.start(picture)
        image = open_picture(Path(picture).read_bytes()) if picture else None
        return image, [], []

    def answer(self, question: str, turns: list[str], picture: str | None) -> Iterator:
        """Yields (text of the empty box, turns, messages) for each piece of the answer."""
        chat = self.start(picture)
        chat.turns = turns
        if not question.strip():
            yield self.gradio.skip()
            return
        answer = ""
        for piece in chat.stream(question):
            answer += piece
            yield "", chat.turns, as_messages([*turns, question, answer])


def as_messages(turns: list[str]) -> list[dict[str, str]]:
    """["<image>\\nWhat?", "A cat."] -> [{"role": "user", "content": "What?"}, {"role": "assistant", ...}]"""
    roles = ("user", "assistant") * len(turns)
    return [{"role": role, "content": text.removeprefix(f"{IMAGE}\n")} for role, text in zip(roles, turns)]


def serve(chat: Chat, gradio):
    """Opens the page, which answers one question at a time, and returns when the user stops it."""
    handlers = Page(chat, gradio)
    with gradio.Blocks(title="LLaVA from scratch", analytics_enabled=False) as page:
        turns = gradio.State([])
        with gradio.Row():
            with gradio.Column(scale=1):
                picture = gradio.File(chat.path and str(chat.path), label="Picture", file_types=["image"])
                shown = gradio.Image(show_label=False, interactive=False, buttons=["fullscreen"])
            with gradio.Column(scale=2):
                messages = gradio.Chatbot(show_label=False, render_markdown=False, buttons=["copy_all"])
                box = gradio.Textbox(show_label=False, placeholder="Ask a question", submit_btn=True)
        answering = box.submit(handlers.answer, [box, turns, picture], [box, turns, messages], concurrency_limit=1)
        page.load(handlers.look, picture, [shown, turns, messages])
        picture.change(handlers.look, picture, [shown, turns, messages], cancels=answering)
        messages.clear(list, None, turns, cancels=answering)
    try:
        page.launch(server_name=ADDRESS, share=False)
    except Exception as error:  # gradio and httpx raise many types
        raise UserError(f"the page could not be opened ({reason(error)}); if a proxy is set, also set "
                        f"NO_PROXY={ADDRESS},localhost") from None  # fmt: skip


def main():
    parser = ArgumentParser(__doc__, prog="python -m tools.web_chat")
    add_arguments(parser)
    args = parser.parse_args()
    gradio = import_gradio()  # first, because a model takes long to load
    serve(open_chat(args), gradio)


if __name__ == "__main__":
    run_command(main)
