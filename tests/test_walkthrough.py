"""docs/walkthrough.md shows the output of its code, walkthrough.ipynb is the same as a notebook, and the documents name
only functions and files that exist.

`python tests/test_walkthrough.py` writes the output blocks of the walkthrough anew, and the notebook.
"""

import contextlib
import importlib
import io
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common import read_json, write_json  # noqa: E402
from demo import world  # noqa: E402
from formats.pictures import open_picture  # noqa: E402

WALKTHROUGH = ROOT / "docs" / "walkthrough.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)  # code, and its output
FLOAT = re.compile(r"-?\d+\.\d+")
NOTEBOOK = WALKTHROUGH.with_suffix(".ipynb")
TO_THE_ROOT = """# This notebook is in docs/, the code that it imports one folder above.
import os
import sys

if not os.path.exists("model.py"):
    os.chdir("..")
sys.path.insert(0, os.getcwd())
"""


def run_blocks(text: str):
    """Runs the Python blocks of a document in one namespace; yields each match and its output."""
    names = {}
    for match in BLOCK.finditer(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(match[1], WALKTHROUGH.name, "exec"), names)
        yield match, "".join(f"{line.rstrip()}\n" for line in printed.getvalue().splitlines())


def renewed(text: str) -> str:
    for match, printed in reversed(list(run_blocks(text))):
        block = f"```python\n{match[1]}```\n" + (f"\n```text\n{printed}```\n" if printed else "")
        text = text[: match.start()] + block + text[match.end() :]
    return text


def notebook(text: str) -> dict:
    """A document with the output of its code as a Jupyter notebook, nbformat 4."""

    def cell(kind: str, source: str, **more) -> dict:
        return {"cell_type": kind, "metadata": {}, "source": source.strip("\n").splitlines(keepends=True), **more}

    def code_cell(source: str, printed: str | None = None) -> dict:
        stream = {"output_type": "stream", "name": "stdout", "text": (printed or "").splitlines(keepends=True)}
        return cell("code", source, execution_count=None, outputs=[stream] if printed else [])

    cells, end = [], 0
    for match in BLOCK.finditer(text):
        cells += [cell("markdown", text[end : match.start()]), code_cell(match[1], match[2])]
        end = match.end()
    cells += [cell("markdown", text[end:])]
    cells.insert(1, code_cell(TO_THE_ROOT))
    cells = [cell for cell in cells if cell["source"]]
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": python}, "nbformat": 4, "nbformat_minor": 4}


def test_the_notebook_is_the_walkthrough():
    written = read_json(NOTEBOOK, dict)
    assert written == notebook(WALKTHROUGH.read_text(encoding="utf-8")), "python tests/test_walkthrough.py writes it anew"


def test_the_notebook_holds_all_text_and_code_in_order():
    """Joined, its cells and their outputs are the document; its first cell of code finds the project from docs/."""
    text, cells = WALKTHROUGH.read_text(encoding="utf-8"), notebook(WALKTHROUGH.read_text(encoding="utf-8"))["cells"]
    first, *code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "".join(match[1] for match in BLOCK.finditer(text)).split() == "\n".join(code).split()
    printed = ["".join(output["text"]) for cell in cells for output in cell.get("outputs", ())]
    assert printed == [match[2] for match in BLOCK.finditer(text) if match[2]]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    assert prose.split() == BLOCK.sub("", text).split()
    code = f"{first}\nimport model, os\nprint(os.getcwd())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True)
    assert done.stdout == f"{ROOT}\n"


def test_walkthrough_shows_the_output_of_its_code():
    for match, printed in run_blocks(WALKTHROUGH.read_text(encoding="utf-8")):
        shown = match[2] or ""
        assert FLOAT.sub("#", printed) == FLOAT.sub("#", shown)
        # Machines add float32 numbers in different orders.
        expected = [pytest.approx(float(x), rel=1e-3, abs=2e-4) for x in FLOAT.findall(shown)]
        assert list(map(float, FLOAT.findall(printed))) == expected, match[1]


def test_walkthrough_starts_from_the_first_record_of_the_demo(tmp_path, monkeypatch):
    for name, value in dict(CAPTIONED=1, HELD_OUT=1, QUIZ=dict(train=1)).items():
        monkeypatch.setattr(world, name, value)
    world.prepare(tmp_path / "demo")
    (record,) = read_json(tmp_path / "demo" / "captions.json")
    assert f"{record}\n" in WALKTHROUGH.read_text(encoding="utf-8")
    rng = random.Random(f"data {world.SEED}")
    drawn = world.draw_picture(world.draw_scene(rng), rng)
    assert open_picture((tmp_path / "demo" / "images" / record["image"]).read_bytes()).tobytes() == drawn.tobytes()


@pytest.mark.parametrize("document", ["docs/walkthrough.md", "docs/paper.md"])
def test_documents_name_existing_functions(document):
    """Documents write `file.py` `name`, `another`."""
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+)\.py`((?:,?\s`(?![\w/]+\.py`)[\w.]+`)+)", text)
    named = [(file, name) for file, names in named for name in re.findall("`(.*?)`", names)]
    assert len(named) > 10
    for file, name in named:
        place = importlib.import_module(file.replace("/", "."))
        for part in name.split("."):
            assert hasattr(place, part), f"{document} names {file}.py {name}"
            place = getattr(place, part)


if __name__ == "__main__":
    torch.set_num_threads(1)
    text = renewed(WALKTHROUGH.read_text(encoding="utf-8"))
    WALKTHROUGH.write_text(text, encoding="utf-8")
    write_json(NOTEBOOK, notebook(text))
