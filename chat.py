"""Talk to a trained model about a picture, or without one, in the terminal.

    python chat.py --image PICTURE                             # runs/chat; if it is absent, the demo's chatbot
    python chat.py --image PICTURE --prompt "What is this?"    # prints one answer on stdout
    python chat.py --questions questions.jsonl --images images.zip --answers answers.jsonl

From Python:

    chat = Chat("runs/chat")
    chat.look("picture.png")
    print(chat.ask("What is this?"))

Each question is asked with the whole conversation before it, in the template that the run was trained with.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import checkpoint
from common import ArgumentParser, UserError, number, printable, run_command, write_json
from conversation import IMAGE, TEMPLATE, answer_text, has_ended, tokenize
from vision import load_pixels

TRAINED_BY = "torchrun train.py --stage 2"
HELP = """\
/image FILE   start again, about this picture (without FILE: about none)
/reset        start again, about the same picture
/save FILE    write the conversation as LLaVA's JSON
/help         print this
/quit         end (also exit, quit and Ctrl-D); Ctrl-C stops an answer"""


class Chat:
    """A conversation: turns human, assistant, human, ...; the first holds `<image>` if it is about a picture."""

    def __init__(self, run: str | Path, max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0,
                 seed: int = 0):  # fmt: skip
        """run: a run directory of train.py. The other arguments are those of `LLaVA.generate`. Raises UserError."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sampling = max_new_tokens, temperature, top_p, seed
        opened = checkpoint.open_run(run, self.device, TRAINED_BY, template=TEMPLATE)
        self.model, self.sp, config, self.autocast = opened
        self.settings = config.get("settings", {})
        self.max_length = self.settings.get("max_length", 2048)
        self.task = "captions (stage 1)" if config["stage"] == 1 else self.settings.get("task", "an unknown task")
        if self.task != "chat":
            inform(f"{run} was trained for {self.task}, not for conversations; train one with: {TRAINED_BY}")
        self.look(None)

    def topics(self) -> str:
        """What the model can be asked, in a line or two."""
        if self.settings.get("demo"):
            from demo.world import TOPICS

            return TOPICS[self.settings["task"]]
        data = [Path(path).name for path in self.settings.get("data", ["unknown data"])]
        return f"The model was trained for {self.task} on {', '.join(data)}; ask questions like those."

    def look(self, path: str | Path | None):
        """Starts again, about this picture. Raises UserError if it cannot be read; then nothing changes."""
        size, path = self.model.vision.config.image_size, Path(path) if path else None
        pixels = load_pixels(path, size) if path else torch.empty(0, 3, size, size, dtype=torch.uint8)
        self.path, self.pixels, self.turns = path, pixels, []

    def ask(self, question: str) -> str:
        """The answer. Question and answer join the conversation."""
        return "".join(self.stream(question))

    def stream(self, question: str) -> Iterator[str]:
        """Yields the answer piece by piece. If the caller stops early, the answer so far joins the conversation."""
        turns = [*self.turns, question]
        if self.path and not self.turns:
            turns = [f"{IMAGE}\n{question}"]
        ids = torch.from_numpy(tokenize(self.sp, turns, self.model.vision.config.n_patches if self.path else 0)[0])
        if len(ids) >= self.max_length:
            inform("the conversation is longer than those that the model was trained on; /reset starts again")
        steps = self.model.generate(ids.to(self.device), [0, len(ids)], self.pixels.to(self.device),
                                    partial(has_ended, self.sp), *self.sampling)  # fmt: skip
        answer, shown = "", ""  # shown: the part of the answer that was yielded
        try:
            while True:
                with self.autocast:  # per step: the caller may take the next piece in another thread
                    answers = next(steps, None)
                if answers is None:
                    break
                answer = printable(answer_text(self.sp, answers[0]), keep="\n\t")
                # Half a character or half of <STOP> at the end waits for the next token.
                if piece := answer.rstrip("#\ufffd").rstrip()[len(shown) :]:
                    shown += piece
                    yield piece
        finally:
            if answer:
                self.turns = [*turns, answer]
        yield answer[len(shown) :]

    def save(self, path: Path):
        """Writes the conversation in the format that train.py and the original read."""
        if not self.turns:
            raise UserError("the conversation has no turn yet")
        if path.exists() or not path.parent.is_dir():
            raise UserError(f"{path}: {'exists' if path.exists() else 'its folder does not exist'}; name another file")
        messages = [{"from": who, "value": text} for who, text in zip(("human", "gpt") * len(self.turns), self.turns)]
        image = {"image": self.path.name} if self.path else {}
        write_json(path, [{"id": path.stem, **image, "conversations": messages}])
        inform(f"{path} is written")


def inform(text: str):
    print(text, file=sys.stderr, flush=True)  # stdout is for answers


def print_answer(chat: Chat, question: str):
    for piece in chat.stream(question):
        print(piece, end="", flush=True)
    print(flush=True)


def obey(chat: Chat, line: str):
    """Carries out a line `/command [FILE]`."""
    command, _, name = line.partition(" ")
    path = Path(os.path.expanduser(name.strip().strip("'\""))) if name.strip() else None
    if command == "/save":
        if path is None:
            raise UserError("/save FILE: name the file to write, such as /save chat.json")
        chat.save(path)
    elif command in ("/image", "/reset"):
        chat.look(path if command == "/image" else chat.path)
        inform(f"started again, about {chat.path or 'no picture'}")
    else:
        inform(HELP if command == "/help" else f"{line}: unknown command\n{HELP}")


def talk(chat: Chat):
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing and history)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            if line in ("/quit", "exit", "quit"):
                break
            if line.startswith("/"):
                obey(chat, line)
            elif line:
                print_answer(chat, line)
        except EOFError:
            break
        except KeyboardInterrupt:
            inform("\nstopped (/quit or Ctrl-D ends the chat)")
        except UserError as error:
            inform(f"error: {error}")


def add_arguments(parser: argparse.ArgumentParser):
    """The flags that `open_chat` reads."""
    add = parser.add_argument
    add("--model", type=Path, metavar="RUN", help="a run directory (default: runs/chat; if it is absent, the chatbot "
        "in demo/)")  # fmt: skip
    add("--image", type=Path, metavar="FILE", help="the picture to talk about (default: none; a scene for the demo's "
        "models)")  # fmt: skip
    add("--temperature", type=number(0.0, 100.0), default=0.0, help="0 = always the most likely token; 1 = the "
        "model's distribution")  # fmt: skip
    add("--top-p", type=number(1e-9, 1.0), default=1.0, help="sample from the top tokens of this total probability; "
        "1 = all")  # fmt: skip
    add("--max-new-tokens", type=number(1), default=512, help="most tokens of an answer")
    add("--seed", type=number(0), default=0, help="seed of the sampling, if --temperature is not 0")


def open_chat(args: argparse.Namespace) -> Chat:
    """Loads the run, and the picture: without --image, a scene if the run is the demo's."""
    from demo.world import SCENE

    inform(f"loading {args.model}")
    chat = Chat(args.model, args.max_new_tokens, args.temperature, args.top_p, args.seed)
    chat.look(args.image or (os.path.relpath(SCENE) if chat.settings.get("demo") else None))
    inform(f"picture: {chat.path or 'none'} (--image FILE shows another)")
    return chat


def main():
    from demo.world import default_run

    parser = ArgumentParser(__doc__)
    add_arguments(parser)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--prompt", metavar="TEXT", help="print the answer to this question and end (default: a chat)")
    add("--questions", type=Path, metavar="FILE", help='answer all {"question_id", "image", "text"} of this file')
    add = parser.add_argument_group("with --questions").add_argument
    add("--answers", type=Path, metavar="FILE", help="the file of answers to write, or to complete")
    add("--images", type=Path, metavar="PATH", help="folder or zip that holds the questions' pictures")
    add("--batch-size", type=number(1), default=32, help="questions that a process answers at once")
    args = parser.parse_args()
    args.model = args.model or default_run()
    if args.questions or args.answers or args.images:
        from tools.answer import answer_questions

        return answer_questions(args)
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # no byte typed or printed ends the chat
    chat = open_chat(args)
    if args.prompt is None:
        inform(f"{chat.topics()}\n/help lists the commands")
        talk(chat)
    else:
        print_answer(chat, args.prompt)


if __name__ == "__main__":
    run_command(main)
