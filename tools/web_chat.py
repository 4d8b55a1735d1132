"""Serves a page for talking to a trained model. Only this machine can open it. Needs gradio 6 or later.

    python -m tools.web_chat                                      # runs/chat; if it is absent, the demo's chatbot
    python -m tools.web_chat --model runs/chat --image PICTURE    # about this picture at first
"""

import copy
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python tools/web_chat.py`

from chat import Chat, add_arguments, open_chat
from common import ArgumentParser, UserError, reason, run_command
from conversation import IMAGE
from demo import world
from formats.pictures import open_picture

ADDRESS = "127.0.0.1"  # other machines cannot reach the page
SHOWN_SIZE = 480  # pixels; a smaller picture is enlarged by a whole factor, up to about this size
N_EXAMPLES = 6  # scenes to choose from, if the model is the demo's


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
        """-> the picture to show or None, a note about it, no turns, no messages."""
        self.start(picture)
        if not picture:
            return None, "", [], []
        image = open_picture(Path(picture).read_bytes())
        return enlarged(image), crop_note(*image.size), [], []

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


def enlarged(image: Image.Image) -> Image.Image:
    factor = max(1, SHOWN_SIZE // max(image.size))
    return image.resize((factor * image.width, factor * image.height))


def crop_note(width: int, height: int) -> str:
    """What the model does not see of a picture of this size, "" if it sees all of it. CLIP's preprocessing crops."""
    if width == height:
        return ""
    side, cut = min(width, height), "left and right" if width > height else "top and bottom"
    return f"**The model does not see all of it**, only the square of {side} pixels at its centre: {cut} are cut off."


def draw_examples(folder: Path) -> list[Path]:
    """Held-out scenes of the demo, as files in `folder`."""
    rng, paths = random.Random("examples"), [folder / f"scene{i}.png" for i in range(1, N_EXAMPLES + 1)]
    for path in paths:
        world.draw_picture(world.draw_scene(rng, held_out=True), rng).save(path)
    return paths


def as_messages(turns: list[str]) -> list[dict[str, str]]:
    """["<image>\\nWhat?", "A cat."] -> [{"role": "user", "content": "What?"}, {"role": "assistant", ...}]"""
    roles = ("user", "assistant") * len(turns)
    return [{"role": role, "content": text.removeprefix(f"{IMAGE}\n")} for role, text in zip(roles, turns)]


def serve(chat: Chat, gradio, name: str, examples: list[Path]):
    """Opens the page, which answers one question at a time, and returns when the user stops it.

    name: of the model. examples: pictures to choose from.
    """
    handlers = Page(chat, gradio)
    topics = chat.topics().replace("\n", "<br>")
    with gradio.Blocks(title="LLaVA from scratch", analytics_enabled=False) as page:
        gradio.Markdown(f"# LLaVA from scratch\n**{name}**: {topics}")
        turns = gradio.State([])
        with gradio.Row():
            with gradio.Column(scale=1):
                shown = gradio.Image(show_label=False, interactive=False, buttons=["fullscreen"])
                note = gradio.Markdown()
                picture = gradio.File(chat.path and str(chat.path), label="Picture", file_types=["image"], height=120)
                if examples:
                    pictures = gradio.Dataset(label="Examples", components=[gradio.Image(visible=False)], type="index",
                                              samples=[[str(path)] for path in examples])  # fmt: skip
            with gradio.Column(scale=2):
                messages = gradio.Chatbot(show_label=False, render_markdown=False, buttons=["copy_all"], height=600)
                box = gradio.Textbox(show_label=False, placeholder="Ask a question", submit_btn=True)
        answering = box.submit(handlers.answer, [box, turns, picture], [box, turns, messages], concurrency_limit=1)
        page.load(handlers.look, picture, [shown, note, turns, messages])
        picture.change(handlers.look, picture, [shown, note, turns, messages], cancels=answering)
        if examples:
            pictures.click(lambda i: str(examples[i]), pictures, picture)
        messages.clear(list, None, turns, cancels=answering)
    try:
        _, address, _ = page.launch(server_name=ADDRESS, share=False, quiet=True, footer_links=[],
                                    prevent_thread_lock=True)  # fmt: skip
    except Exception as error:  # gradio and httpx raise many types
        raise UserError(f"the page could not be opened ({reason(error)}); if a proxy is set, also set "
                        f"NO_PROXY={ADDRESS},localhost") from None  # fmt: skip
    print(f"open {address} in a browser of this machine; Ctrl-C ends it")
    page.block_thread()


def main():
    parser = ArgumentParser(__doc__, prog="python -m tools.web_chat")
    add_arguments(parser)
    args = parser.parse_args()
    print("loading gradio")
    gradio = import_gradio()  # first, because a model takes long to load
    args.model = args.model or world.default_run()
    chat = open_chat(args)
    with tempfile.TemporaryDirectory() as folder:
        serve(chat, gradio, str(args.model), draw_examples(Path(folder)) if chat.settings.get("demo") else [])


if __name__ == "__main__":
    run_command(main)
