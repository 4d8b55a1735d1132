"""Writes pages for a browser, each complete in one HTML file: samples as Table 2, and the page of an evaluation.

    python -m tools.pages --index 0-9 --out page.html                               # ten samples of the demo
    python -m tools.pages --data chat.json --images images.zip --out page.html      # a sample of other data

eval_scienceqa.py calls `evaluation_page` for the page that it writes beside its JSON.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sentencepiece import SentencePieceProcessor

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python tools/pages.py`

import data
from common import ArgumentParser, UserError, printable, replacing, run_command
from conversation import load_tokenizer, stretches, summary, tokenize
from demo import world
from formats.pictures import Pictures, open_picture

PICTURE_SIZE = 320  # pixels of the longer side of a picture on a page, at most
LOSSLESS_BELOW = 100  # pixels of the longer side; such a picture is small enough to be stored without loss
EVALUATION_TEMPLATE = Path(__file__).parent / "report.html"
SAMPLES_HEAD = """<!doctype html>
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
.about, .summary { margin: 0; color: var(--soft); font-size: .9rem; }
</style>
<h1>Table 2</h1>
<p class="about">The model learns to write the <span class="green">green</span> tokens; it only reads the others.</p>
"""


def as_link(image: Image.Image) -> str:
    """Encodes a picture, shrunk to PICTURE_SIZE, as a data: URL, which needs no file beside the page."""
    image.thumbnail((PICTURE_SIZE, PICTURE_SIZE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80, lossless=max(image.size) < LOSSLESS_BELOW)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


# --- the page of an evaluation


def picture_link(path: Path) -> str | None:
    """A picture as a data: URL, or None if it cannot be read."""
    try:
        return as_link(open_picture(path.read_bytes()))
    except (OSError, ValueError):
        return None


def evaluation_page(title: str, about: str, folder: Path, problems: list[dict], result: dict) -> str:
    """The page of an evaluation: the table of scores, and every question with its picture and the model's answer.

    folder: ScienceQA's, which holds the pictures. problems: as `read_scienceqa` returns them. result: as
    `eval_scienceqa.score` returns it.

    The page holds all text as JSON, which its script inserts as text, never as HTML.
    """
    from eval_scienceqa import CATEGORIES, categories  # which imports this file

    questions = []
    for problem in problems:
        question = {name: problem[name] for name in ("id", "question", "hint", "choices", "answer")}
        image = picture_link(folder / problem["image_path"]) if problem["image_path"] else None
        question["image"] = image
        question["missing"] = bool(problem["image"]) and image is None
        question["categories"] = categories(problem)
        question["chosen"] = result["results"][problem["id"]]
        question["output"] = result["outputs"].get(problem["id"])
        question["explanation"] = f"{problem['lecture']}\n\n{problem['solution']}".strip()
        questions.append(question)
    columns = []
    for name, meaning in CATEGORIES.items():
        count = sum(name in question["categories"] for question in questions)
        columns.append({"name": name, "meaning": meaning, "score": result["scores"][name], "count": count})
    return fill_template(title, about, {"columns": columns, "questions": questions})


def fill_template(title: str, about: str, content: dict) -> str:
    """Writes the title, the line below it and the JSON of `content` into report.html."""
    template = EVALUATION_TEMPLATE.read_text(encoding="utf-8")
    script = template.partition("<script>")[2].partition("</script>")[0]
    fields = {
        "title": html.escape(title),
        "about": html.escape(about),
        "script": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),  # browsers run no other script
        "data": json.dumps(content).replace("<", "\\u003c"),  # so that no text closes the <script> element around it
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda mark: fields[mark[1]], template)


# --- samples as Table 2


def sample_section(sp: SentencePieceProcessor, ids: np.ndarray, green: np.ndarray, title: str, link: str | None) -> str:
    """A sample as HTML, for a page that starts with SAMPLES_HEAD. link: the data: URL of its picture, if it has one."""
    text = "&lt;s&gt;"
    for kind, n, words in stretches(sp, ids, green):
        if kind == "picture":
            picture = f'<img alt="" src="{link}">' if link else ""
            text += f"<figure>{picture}<figcaption>picture: {n} patches</figcaption></figure>"
        else:
            text += f'<span class="{kind}">{html.escape(words)}</span>'
    return (f'<section>\n<h2>{html.escape(title)}</h2>\n<div class="sample">{text}</div>\n'
            f'<p class="summary">{summary(ids, green)}</p>\n</section>\n')  # fmt: skip


def samples_page(sp: SentencePieceProcessor, examples: list[data.Example], n_patches: int,
                 pictures: Pictures | None) -> str:  # fmt: skip
    """A page of samples. Without `pictures`, or if a picture cannot be read, the page shows the number of patches."""
    page = SAMPLES_HEAD
    for example in examples:
        title = f"sample {example.id}, " + (f"picture {example.image}" if example.image else "no picture")
        link = None
        if example.image and pictures:
            try:
                link = as_link(open_picture(pictures.read(example.image)))
            except ValueError as error:
                title += f" ({error})"
        ids, green = tokenize(sp, example.turns, n_patches if example.image else 0)
        page += sample_section(sp, ids, green, printable(title), link)
    return page


def open_pictures(args: argparse.Namespace) -> Pictures | None:
    """The pictures of --data: those of --images, the demo's or a ScienceQA folder's; None if no flag names them."""
    if args.images:
        return Pictures(args.images)
    if not args.data:
        return Pictures(world.FOLDER / "images")
    if Path(args.data[0]).is_dir():
        return Pictures(args.data[0])
    return None


def open_samples(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, SentencePieceProcessor, data.Examples]:
    """Adds the flags that name the data and the tokenizer, parses the command line, and opens both."""
    add = parser.add_argument
    add("--data", nargs="+", metavar="PATH", help="LLaVA JSON, captions, or a ScienceQA folder (default: the demo's "
        "captions)")  # fmt: skip
    add("--split", default="train", help="a split of a ScienceQA folder, as its pid_splits.json names it")
    add("--tokenizer", metavar="FILE", help="tokenizer.model of a LLaMA (default: the demo's)")
    add("--patches", type=int, help="positions that a picture takes (default: the demo's; 256 with --tokenizer)")
    args = parser.parse_args()
    if args.patches is None:
        args.patches = 256 if args.tokenizer else world.N_PATCHES
    if not 1 <= args.patches <= 10_000:
        raise UserError(f"--patches {args.patches}: a picture takes 1 to 10000 positions")
    sp = load_tokenizer(args.tokenizer or world.LLAMA / "tokenizer.model")
    if not args.data:
        world.prepare()
    return args, sp, data.Examples(args.data or [world.FOLDER / "captions.json"], split=args.split, absent="keep")


def index_range(text: str) -> range:
    """Reads a value of --index: "7" -> range(7, 8), "3-5" -> range(3, 6). Raises UserError for others."""
    first, dash, last = text.partition("-")
    try:
        indices = range(int(first), int(last if dash else first) + 1)
    except ValueError:
        indices = range(0)
    if not indices:
        raise UserError(f"--index {printable(text)[:50]}: must be a number from 0, or a range of them such as 3-5")
    return indices


def main():
    parser = ArgumentParser(__doc__, prog="python -m tools.pages")
    add = parser.add_argument
    add("--images", metavar="PATH", help="folder or zip that the data's picture paths are relative to")
    add("--index", type=index_range, nargs="+", metavar="I", help="samples, from 0: numbers, and ranges such as "
        "3-5 (default: 0)")  # fmt: skip
    add("--out", type=Path, metavar="FILE", required=True, help="the HTML file to write")
    args, sp, examples = open_samples(parser)
    if args.out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {args.out}: must name a file that ends in .html")
    ranges = args.index or [range(1)]
    last = max(part[-1] for part in ranges)
    if last >= len(examples):
        raise UserError(f"--index {last}: the data has samples 0 to {len(examples) - 1}")
    chosen = [examples[i] for part in ranges for i in part]
    page = samples_page(sp, chosen, args.patches, open_pictures(args))
    with replacing(args.out) as file:
        file.write(page.encode(errors="replace"))  # JSON can spell a lone surrogate, which UTF-8 cannot
    print(f"{args.out} is written")


if __name__ == "__main__":
    run_command(main)
