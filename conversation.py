"""Table 2 of the paper: the turns of a conversation -> token ids and the green mask.

The text is Vicuna-v0's, the wire format that LLaVA was first trained with:

    <s>{system}

    ### Human: {x1}
    ### Assistant: {a1}
    ### Human: {x2}
    ### Assistant: {a2}
    ###

Green is what the model learns to say: each answer and the <STOP> (`\\n###`) after it. Nothing is counted to find
it: SentencePiece reports which characters each piece covers, and a piece is green if it covers a green character.

    python conversation.py                                   # a sample of the demo, green in green
    python conversation.py --data chat.json --index 7        # any sample of any data set that train.py reads
    python conversation.py --html page.html --index 0-9      # ten of them as a page, with their pictures
"""

import argparse
import html
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

TEMPLATE = "vicuna_v0"  # recorded with every run, so that nothing is ever asked in another template
SYSTEM = (  # a protocol literal: Vicuna-v0's weights expect exactly these words
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
STOP = "###"
IMAGE = "<image>"  # where the data sets put the picture, in the first human message on a line of its own
IMAGE_ID = -1  # stands in `ids` at each patch position: no new vocabulary, no clash with any tokenizer


class UserError(Exception):
    """What came, what was expected, and the remedy, in one line; `main()` prints it without a traceback."""


def run_command(main: Callable):
    """Runs the `main` of a command line: a UserError ends it with its line, Ctrl-C without a word."""
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # 128 + SIGINT


def visible(text: str) -> str:
    """What comes from a file, in a message: no sign of it acts on the terminal or ends the line."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


class HelpForm(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds a flag's default to its help, unless that is None (then the help says what happens without it) or "off".

    The description, a module's docstring, keeps its lines.
    """

    def _get_help_string(self, action):
        return action.help if action.default is None or action.const else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        return {int: "N", float: "X"}.get(action.type) or super()._get_default_metavar_for_optional(action)


def load_tokenizer(path: str | Path) -> SentencePieceProcessor:
    """Reads a SentencePiece `tokenizer.model`. Raises UserError if it is missing, something else or without BOS."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; a LLaMA folder needs its SentencePiece `tokenizer.model`")
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a SentencePiece model ({visible(str(error).splitlines()[0])[:100]})") from None
    if sp.bos_id() < 0:
        raise UserError(f"{path}: has no <s> (BOS), which every conversation starts with; take a LLaMA's tokenizer")
    return sp


def plain(message: str) -> str:
    """A message as text that cannot act as the template's own marks.

    `###` would end a turn or forge one, so a run of three or more is spaced out: `###` -> `# # #`. `<s>` and `</s>`
    need nothing: to SentencePiece control symbols are not spelled by any text. `<image>` needs nothing either: the
    picture is placed by `render` and never looked for in text, so anywhere else the seven characters stay text.
    Half a character (a lone surrogate, which JSON can spell) becomes U+FFFD.
    """
    message = message.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub(r"#{3,}", lambda run: " ".join(run[0]), message)


def render(turns: list[str], picture: bool = False, system: str = SYSTEM) -> list[tuple[str, list[tuple[int, int]]]]:
    """Writes a conversation in the template.

    turns: human, assistant, human, ...; ending with a human's, it becomes a prompt that stops after `### Assistant:`.
    picture: the first human message starts or ends with `<image>` on a line of its own (Eq. 2's random order).

    Returns segments (text, green character spans): one, or with a picture two, between which it stands.

    >>> render(["<image>\\nWhat?", "A cat."], picture=True, system="S")
    [('S\\n\\n### Human: ', []), ('\\nWhat?\\n### Assistant: A cat.\\n###', [(21, 32)])]
    """
    segments, text, spans = [], f"{system}\n\n{STOP}", []
    for i, message in enumerate(turns):
        if i % 2 == 0:
            text += " Human: "
            if i == 0 and picture:
                before, message = split_at_picture(message)
                segments, text = [(text + plain(before), [])], ""
            text += plain(message) + "\n" + STOP
        else:
            text += " Assistant:"
            # The space is green with the answer: SentencePiece spells it as the start of the answer's first word
            # (`▁Yes`) or, before a word it has no such piece for, as a piece of its own. Both must be generated.
            start = len(text)
            text += " " + plain(message) + "\n" + STOP
            spans.append((start, len(text)))
    if len(turns) % 2 == 1:
        text += " Assistant:"
    return segments + [(text, spans)]


def split_at_picture(message: str) -> tuple[str, str]:
    """The text before and after `<image>`, which is the message's first or last line; ValueError if neither."""
    if message == IMAGE or message.startswith(IMAGE + "\n"):
        return "", message[len(IMAGE) :]
    if message.endswith("\n" + IMAGE):
        return message[: -len(IMAGE)], ""
    raise ValueError(f"it has a picture, so its first human message must start or end with a line {IMAGE}")


def tokenize(sp: SentencePieceProcessor, turns: list[str], n_patches: int = 0,
             system: str = SYSTEM) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Token ids and green mask of a conversation, final before any model sees them.

    sp: SentencePieceProcessor (0.2.2 or later, for its offsets).
    n_patches: positions that the picture takes; 0 = the conversation has no picture.

    Each text between pictures is tokenised as one string, so no piece is split where messages meet.
    Returns ids (T,) int64, IMAGE_ID at the patches, and green (T,) bool. The first id is BOS, never green.
    """
    ids, green = [sp.bos_id()], [False]
    for i, (text, spans) in enumerate(render(turns, n_patches > 0, system)):
        if i > 0:
            ids += [IMAGE_ID] * n_patches
            green += [False] * n_patches
        pieces = sp.encode(text, return_type="offset_mapping")
        ids += pieces["ids"]
        # A character spelled in bytes has its width at the last of them; the others stand at its start, which is
        # enough, since a green span begins with a space and so never at such a character.
        green += [any(begin < stop and end > start for start, stop in spans) for begin, end in pieces["offsets"]]
    return np.array(ids, dtype=np.int64), np.array(green, dtype=bool)


def stop_ids(sp: SentencePieceProcessor) -> list[int]:
    """The ids of <STOP> as an answer ends with it: those of `###` at the start of a line."""
    line = sp.encode("\n" + STOP, return_type="offset_mapping")
    return [id for id, (begin, _) in zip(line["ids"], line["offsets"]) if begin >= 1]


def system_ids(sp: SentencePieceProcessor, system: str = SYSTEM) -> list[int]:
    """The ids that every conversation starts with: `<s>{system}\\n\\n### Human:` (what follows opens with a space)."""
    return [sp.bos_id()] + sp.encode(f"{system}\n\n{STOP} Human:")


def surface(sp: SentencePieceProcessor, ids: Iterable[int]) -> str:
    """The exact characters that ids stand for (sp.decode drops a leading space); patches are left out."""
    spelled = b""
    for id in map(int, ids):
        if id == IMAGE_ID or sp.is_control(id):
            continue
        piece = sp.id_to_piece(id)
        spelled += bytes([int(piece[3:5], 16)]) if sp.is_byte(id) else piece.replace("\u2581", " ").encode()
    return spelled.decode("utf-8", errors="replace")


def readable(text: str) -> str:
    """No control character of a text from a model or from data acts on the terminal: each becomes U+FFFD."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)  # all but \t and \n


def stretches(sp: SentencePieceProcessor, ids: np.ndarray, green: np.ndarray) -> Iterator[tuple[str, int, str]]:
    """A sample read back from its ids -> (kind, positions, text) of each stretch; a picture's text is empty."""
    kinds = np.where(ids == IMAGE_ID, 2, green)
    starts = np.flatnonzero(np.diff(kinds, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(ids)]):
        yield ("read", "green", "picture")[kinds[start]], stop - start, readable(surface(sp, ids[start:stop]))


def counts(ids: np.ndarray, green: np.ndarray) -> str:
    patches = int((ids == IMAGE_ID).sum())
    return f"{len(ids)} positions: {patches} patches, {len(ids) - patches} text, {int(green.sum())} green"


def show(sp: SentencePieceProcessor, ids: np.ndarray, green: np.ndarray, colour: bool = True) -> str:
    """A sample as Table 2: green in green (without colour, in ⟦brackets⟧)."""
    text = "<s>"
    for kind, n, words in stretches(sp, ids, green):
        if kind == "picture":
            mark = f"[picture: {n} patches]"
            text += f"\033[7m{mark}\033[0m" if colour else mark
        elif kind == "green":
            text += f"\033[1;32m{words}\033[0m" if colour else f"⟦{words}⟧"
        else:
            text += words
    return f"{text}\n\n{counts(ids, green)}"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Table 2</title>
<style>
:root { color-scheme: light dark; --ground: #f5f6f8; --card: #fff; --ink: #1c2430; --soft: #5f6b7a; --line: #dfe3e8;
        --green: #13693d; --pale: #e3f4ea; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181d; --card: #1d232a; --ink: #e3e8ee; --soft: #98a4b3;
        --line: #333c46; --green: #6fdca5; --pale: #173526; } }
body { margin: 0 auto; max-width: 50rem; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--ink);
       font: 16px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0; }
h2 { font-size: 1rem; margin: 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 1rem 0; padding: 1rem; }
.sample { color: var(--soft); white-space: pre-wrap; margin: .6rem 0; }
.green { color: var(--green); background: var(--pale); font-weight: 600; border-radius: 3px; }
figure { display: inline-block; vertical-align: middle; margin: .3rem 0; padding: .4rem; border: 1px solid var(--line);
         border-radius: 6px; font-size: .85rem; white-space: normal; }
img { display: block; min-width: 8rem; max-width: 100%; border-radius: 4px; }
.about, .counts { margin: 0; color: var(--soft); font-size: .9rem; }
</style>
<h1>Table 2</h1>
<p class="about"><span class="green">Green</span> is what the model learns to say; the rest it only reads.</p>
"""


def as_html(sp: SentencePieceProcessor, ids: np.ndarray, green: np.ndarray, title: str, link: str | None) -> str:
    """A sample as Table 2, for a page that starts with PAGE. link: to its picture, if that is to be seen."""
    text = "&lt;s&gt;"
    for kind, n, words in stretches(sp, ids, green):
        if kind == "picture":
            picture = f'<img alt="" src="{link}">' if link else ""
            text += f"<figure>{picture}<figcaption>picture: {n} patches</figcaption></figure>"
        else:
            text += f'<span class="{kind}">{html.escape(words)}</span>'
    return (f'<section>\n<h2>{html.escape(title)}</h2>\n<div class="sample">{text}</div>\n'
            f'<p class="counts">{counts(ids, green)}</p>\n</section>\n')  # fmt: skip


def numbers(text: str) -> range:
    """`7` -> 7; `3-5` -> 3, 4, 5"""
    first, dash, last = text.partition("-")
    try:
        found = range(int(first), int(last if dash else first) + 1)
    except ValueError:
        found = range(0)
    if not found:
        raise UserError(f"--index {visible(text)[:50]}: must be a number from 0, or a range of them such as 3-5")
    return found


def main():
    import checkpoint  # these import this file
    import data
    from vision import as_link, open_picture

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpForm)
    data.add_data_arguments(parser)
    parser.add_argument("--index", type=numbers, nargs="+", metavar="I",
        help="which samples, from 0: numbers, and ranges such as 3-5 (default: 0)")  # fmt: skip
    parser.add_argument("--html", type=Path, metavar="FILE", help="write them as a page instead, with their pictures")
    arguments = parser.parse_args()
    arguments.index = arguments.index or [range(1)]
    if arguments.html and arguments.html.suffix not in (".html", ".htm"):
        raise UserError(f"--html {arguments.html}: must name a file that ends in .html")
    if arguments.images and not arguments.html:
        raise UserError("--images: a terminal shows no pictures; add --html FILE")
    sp, examples, n_patches = data.open_for_display(arguments)
    pictures = data.pictures_for_display(arguments, examples) if arguments.html else None
    for wanted in arguments.index:
        if wanted[-1] >= len(examples):
            raise UserError(f"--index {wanted[-1]}: the data has samples 0 to {len(examples) - 1}")
    page = PAGE
    # A character that the terminal cannot show does not end it.
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, as any Unix command, without a word
    for i, example in enumerate(examples[i] for wanted in arguments.index for i in wanted):
        ids, green = tokenize(sp, example.turns, n_patches if example.image else 0)
        title = readable(f"sample {example.id}, " + (f"picture {example.image}" if example.image else "no picture"))
        if not arguments.html:
            print("\n\n" * (i > 0) + title + "\n")
            print(show(sp, ids, green, colour="NO_COLOR" not in os.environ))
            continue
        link = None
        if example.image and pictures:
            try:
                link = as_link(open_picture(pictures.read(example.image)))
            except ValueError as error:
                title += f" ({readable(str(error))})"
        page += as_html(sp, ids, green, title, link)
    if arguments.html:
        with checkpoint.replacing(arguments.html) as file:
            file.write(page.encode(errors="replace"))  # half a character, which JSON can spell
        print(f"{arguments.html} is written")


if __name__ == "__main__":
    from conversation import UserError, main  # data.py raises that module's error, which is not `__main__`'s

    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
