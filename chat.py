"""Talk to a trained model about a picture, or about nothing to be seen.

    python chat.py --image PICTURE                             # runs/chat, in the terminal
    python chat.py --image PICTURE --prompt "What is this?"    # one answer, and nothing else, on stdout
    python chat.py --web                                       # a page in the browser of this machine

Each question is asked with the whole conversation before it, in the template that the run was trained with.
"""

import argparse
import contextlib
import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import checkpoint
from conversation import (
    IMAGE,
    STOP,
    TEMPLATE,
    HelpForm,
    UserError,
    readable,
    run_command,
    stop_ids,
    surface,
    system_ids,
    tokenize,
)
from data import read_pixels
from vision import open_picture

TRAINED_BY = "torchrun train.py --stage 2"
HELP = """\
/image FILE   begin anew, about this picture (without FILE: about none)
/reset        begin anew, about the same picture
/save FILE    write the conversation as LLaVA's JSON
/help         this
/quit         end (also Ctrl-D); Ctrl-C stops an answer"""


class Chat:
    """A conversation with a model: turns human, assistant, human, ...; `<image>` in the first if there is a picture."""

    def __init__(self, run: Path, device: torch.device, **settings):
        """settings: max_new_tokens, temperature, top_p and seed of `LLaVA.generate`."""
        self.device, self.settings = device, settings
        opened = checkpoint.open_run(run, device, TRAINED_BY, template=TEMPLATE)
        self.config, self.model, self.sp, self.autocast = opened
        ids = system_ids(self.sp)
        with self.autocast, torch.inference_mode():
            self.prefix, self.n_prefix = self.model.read_prefix(torch.tensor(ids, device=device)), len(ids)
        self.look(None)

    def look(self, path: Path | None):
        """Begins anew, about this picture. Raises UserError if it is none; then nothing has changed."""
        size = self.model.vision.config.image_size
        pixels = read_pixels(path, size) if path else torch.zeros(0, 3, size, size, dtype=torch.uint8)
        self.path, self.pixels, self.turns, self.written = path, pixels.to(self.device), [], set()

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer piece by piece. Left early (Ctrl-C), what was said by then is the answer."""
        if self.path and not self.turns:
            question = f"{IMAGE}\n{question}"
        turns, said, answer, shown = [*self.turns, question], [], "", ""
        n_patches = self.model.vision.config.n_patches if self.path else 0
        ids = torch.from_numpy(tokenize(self.sp, turns, n_patches)[0])[self.n_prefix :].to(self.device)
        room = self.config.get("settings", {}).get("max_length", 2048)
        if self.n_prefix + len(ids) >= room:
            note(f"this conversation is beyond the {room} positions that the model was trained on; /reset begins anew")
        borders = torch.tensor([0, len(ids)], dtype=torch.int32, device=self.device)
        tokens = self.model.generate(ids, borders, self.pixels, stop_ids(self.sp), prefix=self.prefix, **self.settings)
        try:
            while True:
                with self.autocast:  # is a thread's own, and who asks may go on in another one
                    step = next(tokens, None)
                if step is None:
                    break
                said.append(step[0])
                answer, stop, _ = readable(surface(self.sp, said)).lstrip().partition(STOP)
                new = answer.rstrip("# \n\t\ufffd")[len(shown) :]  # not yet: half a character, half of <STOP>
                shown += new
                if new:
                    yield new
                if stop:
                    break
        finally:
            if answer.strip():
                self.turns = [*turns, answer.strip()]
        yield answer.rstrip()[len(shown) :]

    def save(self, path: Path):
        """Writes the conversation as train.py and the original read it. Raises UserError if it cannot be written."""
        if not self.turns:
            raise UserError("nothing has been said yet")
        if path.exists() and path not in self.written:
            raise UserError(f"{path}: is there already; name another")
        messages = [{"from": who, "value": text} for who, text in zip(("human", "gpt") * len(self.turns), self.turns)]
        image = {"image": self.path.name} if self.path else {}
        checkpoint.write_json(path, [{"id": path.stem, **image, "conversations": messages}])
        self.written.add(path)
        note(f"{path} is written" + (f"; its picture is in {self.path.resolve().parent}" if self.path else ""))


def note(text: str):
    print(text, file=sys.stderr, flush=True)  # stdout is for answers


def say(chat: Chat, question: str):
    question = question.encode("utf-8", "replace").decode()  # bytes that were no text
    try:
        for piece in chat.ask(question):
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


def obey(chat: Chat, line: str):
    """Does what a line `/command [FILE]` says."""
    command, _, rest = line.partition(" ")
    path = Path(rest.strip().strip("'\"")).expanduser() if rest.strip() else None
    if command == "/save" and path:
        chat.save(path)
    elif command in ("/image", "/reset"):
        chat.look(path if command == "/image" else chat.path)
        note(f"begun anew, about {chat.path or 'no picture'}")
    else:
        note(HELP if command == "/help" else f"{line}: no such command, or its FILE is missing\n{HELP}")


def talk(chat: Chat):
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its editing and history)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line == "/quit":
                break
            if line.startswith("/"):
                obey(chat, line)
            elif line:
                say(chat, line)
        except EOFError:
            break
        except KeyboardInterrupt:
            note("stopped (/quit or Ctrl-D ends)")
        except UserError as error:
            note(f"error: {error}")


def open_gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with contextlib.suppress(ImportError):
        import gradio

        if int(gradio.__version__.partition(".")[0]) >= 6:
            return gradio
    raise UserError('--web: the page is made by gradio 6 or later, which is missing: pip install "gradio>=6"')


def serve(chat: Chat, gradio):
    """A page for browsers of this machine alone. Each has a conversation of its own; one is answered at a time."""

    def begin(picture: str | None) -> Chat:
        talker, path = copy.copy(chat), Path(picture) if picture else None  # of the same model
        try:
            talker.look(path)
        except UserError as error:
            text = str(error).removeprefix(f"{path and path.parent}/")
            raise gradio.Error(text, print_exception=False) from None
        return talker

    def look(picture):
        begin(picture)
        return picture and open_picture(Path(picture).read_bytes()), [], []

    def answer(question, turns, picture):
        talker, said = begin(picture), ""
        talker.turns = turns
        if not question.strip():
            yield gradio.skip()
            return
        for piece in talker.ask(question):
            said += piece
            shown = [text.removeprefix(f"{IMAGE}\n") for text in (*turns, question, said)]
            roles = ("user", "assistant") * len(shown)
            yield "", talker.turns, [{"role": role, "content": text} for role, text in zip(roles, shown)]

    with gradio.Blocks(title="LLaVA from scratch", analytics_enabled=False) as page:
        turns = gradio.State([])
        with gradio.Row():
            with gradio.Column(scale=1):
                picture = gradio.File(chat.path and str(chat.path), label="Picture", file_types=["image"])
                seen = gradio.Image(show_label=False, interactive=False, buttons=["fullscreen"])
            with gradio.Column(scale=2):
                talk = gradio.Chatbot(show_label=False, render_markdown=False, buttons=["copy_all"])
                box = gradio.Textbox(show_label=False, placeholder="A question", submit_btn=True)
        asked = box.submit(answer, [box, turns, picture], [box, turns, talk], concurrency_limit=1)
        page.load(look, picture, [seen, turns, talk])
        picture.change(look, picture, [seen, turns, talk], cancels=asked)
        talk.clear(list, None, turns, cancels=asked)
    try:
        page.launch(server_name="127.0.0.1", share=False)
    except Exception as error:  # gradio's and httpx's are of many kinds
        raise UserError(f"--web: the page could not be opened ({checkpoint.reason(error)}); if a proxy is set, set "
                        "NO_PROXY=127.0.0.1,localhost too") from None  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpForm)
    add = parser.add_argument
    add("--model", type=Path, metavar="RUN", default=Path("runs/chat"), help="a run directory of stage 2")
    add("--image", type=Path, metavar="FILE", help="what to talk about (default: text alone)")
    add("--prompt", metavar="TEXT", help="ask this, print the answer, end (default: talk in the terminal)")
    add("--web", action="store_true", help="talk in this machine's browser (pip install 'gradio>=6')")
    add("--temperature", type=float, default=0.0, help="0 = always the likeliest token; 1 = drawn as the model has it")
    add("--top-p", type=float, default=1.0, help="draw among the likeliest tokens of this probability; 1 = all")
    add("--max-new-tokens", type=int, default=512, help="an answer is cut after so many")
    add("--seed", type=int, default=0, help="of the draws, if --temperature is not 0")
    a = parser.parse_args()
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # no byte that is typed or said ends the chat
    if not 0 <= a.temperature < float("inf") or not 0 < a.top_p <= 1 or a.max_new_tokens < 1 or a.seed < 0:
        raise UserError("--temperature and --seed: 0 or more; --top-p: over 0, up to 1; --max-new-tokens: 1 or more")
    if a.web and a.prompt is not None:
        raise UserError("--prompt asks from a script, --web in the browser; leave one out")
    gradio = open_gradio() if a.web else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chat = Chat(a.model, device, temperature=a.temperature, top_p=a.top_p, max_new_tokens=a.max_new_tokens, seed=a.seed)
    if chat.config.get("stage") == 1:
        note(f"{a.model} is a run of stage 1: it captions pictures, but has not learned to talk ({TRAINED_BY})")
    chat.look(a.image)
    if a.prompt is not None:
        return say(chat, a.prompt)
    if a.web:
        return serve(chat, gradio)
    note(f"{a.model}, about {a.image or 'no picture'}; /help lists the commands")
    talk(chat)


if __name__ == "__main__":
    run_command(main)
