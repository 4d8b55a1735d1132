"""docs/walkthrough.md shows the output of its code, and the documents name only functions and files that exist.

`python tests/test_walkthrough.py` writes the output blocks of the walkthrough anew.
"""

import contextlib
import importlib
import io
import random
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common import read_json  # noqa: E402
from demo import world  # noqa: E402
from formats.pictures import open_picture  # noqa: E402

WALKTHROUGH = ROOT / "docs" / "walkthrough.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)  # code, and its output
FLOAT = re.compile(r"-?\d+\.\d+")


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
    WALKTHROUGH.write_text(renewed(WALKTHROUGH.read_text(encoding="utf-8")), encoding="utf-8")
