"""Talk to a trained model about a picture, or without one, in the terminal.

    python chat.py --image PICTURE                             # asks runs/chat
    python chat.py --image PICTURE --prompt "What is this?"    # prints one answer on stdout

Each question is asked with the whole conversation before it, in the template that the run was trained with.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import checkpoint
from common import HelpFormatter, UserError, printable, run_command, write_json
from conversation import IMAGE, STOP, TEMPLATE, stop_ids, surface, tokenize
from data import Encoder, Sample, read_pixels

TRAINED_BY = "torchrun train.py --stage 2"
HELP = """\
/image FILE   start again, about this picture (without FILE: about none)
/reset        start again, about the same picture
/save FILE    write the conversation as LLaVA's JSON
/help         print this
/quit         end (also Ctrl-D); Ctrl-C stops an answer"""


class Chat:
    """A conversation: turns human, assistant, human, ...; the first holds `<image>` if it is about a picture."""

    def __init__(self, run: Path, device: torch.device, **settings):
        """settings: max_new_tokens, temperature, top_p and seed of `LLaVA.generate`."""
        self.device, self.settings = device, settings
        self.config, self.model, sp, self.autocast = checkpoint.open_run(run, device, TRAINED_BY, template=TEMPLATE)
        self.encode = Encoder(sp, self.model.vision.config.n_patches, self.model.vision.config.image_size)
        self.written = set()  # by /save, which may replace these files
        self.look(None)

    def look(self, path: Path | None):
        """Starts again, about this picture. Raises UserError if it cannot be read; then nothing changes."""
        pixels = read_pixels(path, self.encode.image_size)[0].numpy() if path else None  # (3, size, size)
        self.path, self.pixels, self.turns = path, pixels, []

    def ask(self, question: str) -> Iterator[str]:
        """Yields the answer piece by piece. If the caller stops early, the answer so far joins the conversation."""
        if self.path and not self.turns:
            question = f"{IMAGE}\n{question}"
        turns, sp = [*self.turns, question], self.encode.sp
        new_ids, answer, shown = [], "", ""  # shown: the part of the answer that was yielded
        ids, green = tokenize(sp, turns, self.encode.n_patches if self.path else 0)
        if len(ids) >= self.config.get("settings", {}).get("max_length", 2048):
            inform("the conversation is longer than those that the model was trained on; /reset starts again")
        start = len(self.encode.system)
        batch = self.encode.stream([Sample(ids[start:], green[start:], self.pixels)])
        ids, _, borders, pixels = batch.to(self.device)
        tokens = self.model.generate(ids, borders, pixels, stop_ids(sp), **self.settings)
        try:
            while True:
                with self.autocast:  # per step: the caller may take the next piece in another thread
                    step = next(tokens, None)
                if step is None:
                    break
                new_ids.append(step[0])
                answer, stop, _ = printable(surface(sp, new_ids), keep="\n\t").lstrip().partition(STOP)
                # Half a character or half of <STOP> at the end waits for the next token.
                piece = answer.rstrip("# \n\t\ufffd")[len(shown) :]
                shown += piece
                if piece:
                    yield piece
                if stop:
                    break
        finally:
            if answer.strip():
                self.turns = [*turns, answer.strip()]
        yield answer.rstrip()[len(shown) :]

    def save(self, path: Path):
        """Writes the conversation in the format that train.py and the original read."""
        if not self.turns:
            raise UserError("the conversation has no turn yet")
        if path.exists() and path not in self.written:
            raise UserError(f"{path}: exists; name another file")
        messages = [{"from": who, "value": text} for who, text in zip(("human", "gpt") * len(self.turns), self.turns)]
        image = {"image": self.path.name} if self.path else {}
        write_json(path, [{"id": path.stem, **image, "conversations": messages}])
        self.written.add(path)
        inform(f"{path} is written" + (f"; its picture is in {self.path.resolve().parent}" if self.path else ""))


def inform(text: str):
    print(text, file=sys.stderr, flush=True)  # stdout is for answers


def print_answer(chat: Chat, question: str):
    question = question.encode("utf-8", "replace").decode()  # the terminal may send invalid UTF-8
    try:
        for piece in chat.ask(question):
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


def obey(chat: Chat, line: str):
    """Carries out a line `/command [FILE]`."""
    command, _, rest = line.partition(" ")
    path = Path(rest.strip().strip("'\"")).expanduser() if rest.strip() else None
    if command == "/save" and path:
        chat.save(path)
    elif command in ("/image", "/reset"):
        chat.look(path if command == "/image" else chat.path)
        inform(f"started again, about {chat.path or 'no picture'}")
    else:
        inform(HELP if command == "/help" else f"{line}: unknown command, or its FILE is missing\n{HELP}")


def talk(chat: Chat):
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing and history)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line == "/quit":
                break
            if line.startswith("/"):
                obey(chat, line)
            elif line:
                print_answer(chat, line)
        except EOFError:
            break
        except KeyboardInterrupt:
            inform("stopped (/quit or Ctrl-D ends the chat)")
        except UserError as error:
            inform(f"error: {error}")


def add_sampling_arguments(parser: argparse.ArgumentParser):
    add = parser.add_argument
    add("--model", type=Path, metavar="RUN", default=Path("runs/chat"), help="a run directory of stage 2")
    add("--image", type=Path, metavar="FILE", help="the picture to talk about (default: none)")
    add("--temperature", type=float, default=0.0, help="0 = always the most likely token; 1 = the model's distribution")
    add("--top-p", type=float, default=1.0, help="sample among the most likely tokens of this probability; 1 = all")
    add("--max-new-tokens", type=int, default=512, help="tokens after which an answer is cut")
    add("--seed", type=int, default=0, help="of the sampling, if --temperature is not 0")


def open_chat(a: argparse.Namespace) -> Chat:
    """The chat that the arguments describe, about their picture."""
    if not 0 <= a.temperature < float("inf") or not 0 < a.top_p <= 1 or a.max_new_tokens < 1 or a.seed < 0:
        raise UserError("--temperature and --seed: 0 or more; --top-p: over 0, up to 1; --max-new-tokens: 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chat = Chat(a.model, device, temperature=a.temperature, top_p=a.top_p, max_new_tokens=a.max_new_tokens, seed=a.seed)
    if chat.config.get("stage") == 1:
        inform(f"{a.model} is a run of stage 1: it captions pictures, but has not learned to talk ({TRAINED_BY})")
    chat.look(a.image)
    return chat


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_sampling_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="print the answer to this and end (default: talk)")
    a = parser.parse_args()
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # no byte typed or printed ends the chat
    chat = open_chat(a)
    if a.prompt is not None:
        return print_answer(chat, a.prompt)
    inform(f"{a.model}, about {a.image or 'no picture'}; /help lists the commands")
    talk(chat)


if __name__ == "__main__":
    run_command(main)
