"""docs/walkthrough.md prints what it says it prints, and what the documents name is there.

python tests/test_walkthrough.py writes the printed blocks of the walkthrough anew.
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

import checkpoint  # noqa: E402
import demo  # noqa: E402
from vision import open_picture  # noqa: E402

WALKTHROUGH = ROOT / "docs" / "walkthrough.md"
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)  # code, and what it prints
FLOAT = re.compile(r"-?\d+\.\d+")


def run_blocks(text: str):
    """Runs the Python blocks of a document in one namespace -> (match, what it printed) of each, one by one."""
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


def test_the_walkthrough_prints_what_it_says():
    for match, printed in run_blocks(WALKTHROUGH.read_text(encoding="utf-8")):
        said = match[2] or ""
        assert FLOAT.sub("#", printed) == FLOAT.sub("#", said)
        # in fp32 the order of a sum differs between machines
        expected = [pytest.approx(float(x), rel=1e-3, abs=2e-4) for x in FLOAT.findall(said)]
        assert list(map(float, FLOAT.findall(printed))) == expected, match[1]


def test_its_record_is_the_first_of_the_demo(tmp_path, monkeypatch):
    for name, value in dict(CAPTIONED=1, HELD_OUT=1, QUIZ=dict(train=1)).items():
        monkeypatch.setattr(demo, name, value)
    demo.prepare(tmp_path / "demo", progress=False)
    (record,) = checkpoint.read_json(tmp_path / "demo" / "captions.json")
    assert f"{record}\n" in WALKTHROUGH.read_text(encoding="utf-8")
    dice = random.Random(f"data {demo.SEED}")
    drawn = demo.draw_picture(demo.draw_scene(dice), dice)
    assert open_picture((tmp_path / "demo" / "images" / record["image"]).read_bytes()).tobytes() == drawn.tobytes()


@pytest.mark.parametrize("document", ["docs/walkthrough.md", "README.md"])
def test_each_function_that_a_document_names_is_there(document):
    """It is named as `file.py` `name`, `another`."""
    named = re.findall(r"`(\w+)\.py`((?:,?\s`(?!\w+\.py`)[\w.]+`)+)", (ROOT / document).read_text(encoding="utf-8"))
    named = [(file, name) for file, names in named for name in re.findall("`(.*?)`", names)]
    assert len(named) > 10
    for file, name in named:
        place = importlib.import_module(file)
        for part in name.split("."):
            assert hasattr(place, part), f"{document} names {file}.py {name}"
            place = getattr(place, part)


def test_the_tree_of_the_readme_has_every_file():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is where")[1].split("```")[1]
    assert {path.name for path in ROOT.glob("*.py")} == set(re.findall(r"^(\w+\.py) ", tree, re.MULTILINE))


if __name__ == "__main__":
    torch.set_num_threads(1)
    WALKTHROUGH.write_text(renewed(WALKTHROUGH.read_text(encoding="utf-8")), encoding="utf-8")
