"""Table 2 of the paper: the turns of a conversation -> token ids and the green mask.

The text has the format of Vicuna-v0, the one that LLaVA was first trained with:

    <s>{system}

    ### Human: {x1}
    ### Assistant: {a1}
    ### Human: {x2}
    ### Assistant: {a2}
    ###

The model learns to write the green tokens only: each answer, the line break and the <STOP> (`###`) after it. The same
`###` starts the next line of the template. The mask needs no counting of tokens: SentencePiece reports which characters
each piece covers, and a piece that covers a green character is green.

    python conversation.py                                   # one sample of the demo, its green tokens in green
    python conversation.py --data chat.json --index 7        # one sample of any data set that train.py reads
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from common import ArgumentParser, UserError, printable, reason, run_command

TEMPLATE = "vicuna_v0"  # recorded with every run; evaluation and chat refuse a run of another template
SYSTEM = (  # Vicuna-v0 was trained with exactly these words
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
STOP = "###"
IMAGE = "<image>"  # marks the picture's place in the data sets: the start or the end of the first human message
IMAGE_ID = -1  # in `ids` at each patch position; no tokenizer uses -1, so the vocabulary needs no new token


def load_tokenizer(path: str | Path) -> SentencePieceProcessor:
    """Reads a SentencePiece `tokenizer.model`. Raises UserError if it is missing, damaged or has no BOS token."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; a LLaMA folder needs its SentencePiece `tokenizer.model`")
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a LLaMA's SentencePiece model ({reason(error)}); is the path right?") from None
    if sp.bos_id() < 0:
        raise UserError(f"{path}: has no <s> (BOS), which starts every conversation; use a LLaMA's tokenizer")
    return sp


# --- turns -> text -> ids


def escape(message: str) -> str:
    """Keeps a message from forging the template's marks.

    `###` would end a turn, so a run of three or more is spaced out: `###` -> `# # #`. `<s>`, `</s>` and `<image>`
    stay: SentencePiece never reads control symbols from text, and `render` alone places the picture.
    A lone surrogate, which JSON can spell, becomes U+FFFD.
    """
    message = message.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub(r"#{3,}", lambda match: " ".join(match[0]), message)


def render(turns: list[str], picture: bool = False, system: str = SYSTEM) -> tuple[str, str, list[tuple[int, int]]]:
    """Writes a conversation in the template.

    turns: human, assistant, human, ...; if the last one is a human's, the text ends with `### Assistant:`, a prompt.
    picture: the first human message starts or ends with `<image>` (Eq. 2 draws one of the two).

    Returns the text before the picture, or "" without one; the text after it; the spans of its green characters.

    >>> render(["<image>\\nWhat?", "A cat."], picture=True, system="S")
    ('S\\n\\n### Human: ', '\\nWhat?\\n### Assistant: A cat.\\n###', [(21, 32)])
    """
    before, text, spans = "", f"{system}\n\n{STOP}", []
    for i, message in enumerate(turns):
        if i % 2 == 0:
            text += " Human: "
            if i == 0 and picture:
                start, message = split_at_picture(message)
                before, text = text + escape(start), ""
            text += f"{escape(message)}\n{STOP}"
        else:
            text += " Assistant:"
            # The space is green too: SentencePiece spells it with the answer's first word (`▁Yes`) or as a piece of
            # its own, and the model has to generate either.
            answer = f" {escape(message)}\n{STOP}"
            spans.append((len(text), len(text) + len(answer)))
            text += answer
    if len(turns) % 2 == 1:
        text += " Assistant:"
    return before, text, spans


def split_at_picture(message: str) -> tuple[str, str]:
    """The text before and after `<image>`. Raises ValueError unless one of the two is empty or white space."""
    before, mark, after = message.partition(IMAGE)
    if before.strip():
        before, mark, after = message.rpartition(IMAGE)
    if not mark or (before.strip() and after.strip()):
        raise ValueError(f"its first message must start or end with {IMAGE}, the place of its picture: {message!r:.60}")
    return before, after


def tokenize(sp: SentencePieceProcessor, turns: list[str], n_patches: int = 0,
             system: str = SYSTEM) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Token ids and green mask of a conversation.

    n_patches: how many positions the picture takes; 0 if the conversation has none.
    Returns ids (T,) int64, with IMAGE_ID at the patches, and green (T,) bool. The first id is BOS, which is not green.
    """
    before, text, spans = render(turns, n_patches > 0, system)
    ids = [sp.bos_id(), *sp.encode(before), *[IMAGE_ID] * n_patches]  # `encode` puts a space before each text
    # SentencePiece assigns a character spelled in several byte pieces to the last of them; the others have width 0 at
    # its start. The comparison still finds them, because a green span starts with a space.
    pieces = sp.encode(text, return_type="offset_mapping")
    in_text = [any(first < end and last > start for start, end in spans) for first, last in pieces["offsets"]]
    green = [False] * len(ids) + in_text
    return np.array(ids + pieces["ids"], dtype=np.int64), np.array(green, dtype=bool)


def system_ids(sp: SentencePieceProcessor, system: str = SYSTEM) -> list[int]:
    """The ids that start every conversation: `<s>{system}\\n\\n### Human:`. The next piece starts with a space."""
    return [sp.bos_id()] + sp.encode(f"{system}\n\n{STOP} Human:")


# --- ids -> text


def surface(sp: SentencePieceProcessor, ids: Iterable[int]) -> str:
    """The exact characters of ids; skips patches, control symbols, and ids of the vocabulary's spare rows.

    sp.decode drops the space at the start of a text, so a `#` stands before the ids while it decodes them.
    """
    known = [int(id) for id in ids if 0 <= id < sp.vocab_size()]
    return sp.decode([*sp.encode("#"), *known]).removeprefix("#")


def has_ended(sp: SentencePieceProcessor, ids: list[int]) -> bool:
    """True if these ids of an answer end with <STOP>, or with `</s>`, as models of later templates do."""
    return ids[-1] == sp.eos_id() or STOP in surface(sp, ids[-len(STOP) :])  # <STOP> has 3 pieces at most


def answer_text(sp: SentencePieceProcessor, ids: list[int]) -> str:
    return surface(sp, ids).partition(STOP)[0].strip()


def stretches(sp: SentencePieceProcessor, ids: np.ndarray, green: np.ndarray) -> Iterator[tuple[str, int, str]]:
    """Decodes a sample into stretches (kind, number of positions, text).

    kind is "green", "picture", or "read" for the rest, which the model only reads.
    """
    kinds = np.where(ids == IMAGE_ID, "picture", np.where(green, "green", "read"))
    for kind, pairs in groupby(zip(kinds, ids), key=lambda pair: pair[0]):
        stretch = [id for _, id in pairs]
        yield str(kind), len(stretch), printable(surface(sp, stretch), keep="\n\t")


def summary(ids: np.ndarray, green: np.ndarray) -> str:
    patches = int((ids == IMAGE_ID).sum())
    return f"{len(ids)} positions: {patches} patches, {len(ids) - patches} text, {int(green.sum())} green"


def show(sp: SentencePieceProcessor, ids: np.ndarray, green: np.ndarray, colour: bool = True) -> str:
    """A sample as Table 2 prints it. Without colour, ⟦brackets⟧ mark the green tokens."""
    marks = {"read": "{text}", "green": "\033[1;32m{text}\033[0m" if colour else "⟦{text}⟧",
             "picture": "\033[7m[picture: {n} patches]\033[0m" if colour else "[picture: {n} patches]"}  # fmt: skip
    parts = [marks[kind].format(n=n, text=text) for kind, n, text in stretches(sp, ids, green)]
    return f"<s>{''.join(parts)}\n\n{summary(ids, green)}"


def main():
    from tools.pages import open_samples  # which imports this file

    parser = ArgumentParser(__doc__)
    parser.add_argument("--index", type=int, default=0, metavar="I", help="number of the sample, from 0")
    args, sp, examples = open_samples(parser)
    if not 0 <= args.index < len(examples):
        raise UserError(f"--index {args.index}: the data has samples 0 to {len(examples) - 1}")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # for terminals without UTF-8
    example = examples[args.index]
    picture = f"picture {example.image}" if example.image else "no picture"
    print(printable(f"sample {example.id}, {picture}") + "\n")
    ids, green = tokenize(sp, example.turns, args.patches if example.image else 0)
    print(show(sp, ids, green, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))


if __name__ == "__main__":
    run_command(main)
