"""README, CONTRIBUTING and docs/: their length, the files, links and flags that they name, and the errors that they quote.

`python tests/test_documents.py` writes the README's line counts anew.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from common import UserError  # noqa: E402

README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_WORDS = 1300  # of the README
READING_ORDER = ["conversation", "vision", "model", "data", "train", "eval_scienceqa", "chat", "checkpoint",
                 "distributed", "common"]  # fmt: skip
ROW = re.compile(r"^\| `(\w+)\.py` \| (\d+) \|", re.MULTILINE)  # of the README's reading order: file, lines
FLAGS_OF = {  # files that define the flags of a command, where it is not its own file alone
    "conversation.py": ["conversation.py", "tools/pages.py"],
    "tools/web_chat.py": ["chat.py"],
}


def named(documents):
    return pytest.mark.parametrize("document", documents, ids=lambda path: path.name)


def lines_of(file: str) -> int:
    return len((ROOT / f"{file}.py").read_text(encoding="utf-8").splitlines())


# --- the README


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").split()) <= MOST_WORDS


def test_readme_gives_the_reading_order_with_line_counts():
    rows = ROW.findall(README.read_text(encoding="utf-8"))
    assert [file for file, _ in rows] == READING_ORDER
    for file, lines in rows:
        assert abs(int(lines) - lines_of(file)) <= 10, f"python {Path(__file__).name} writes the line counts anew"


# --- the files, links and flags that the documents name


@named(DOCUMENTS)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r'\]\((?!http)([^)]+)\)|src="([^"]+)"', text):
        path, _, anchor = (link[0] or link[1]).partition("#")
        target = document.parent / path if path else document
        assert target.is_file(), f"{document.name} links to {path}"
        if anchor:
            titles = re.findall(r"^#+ (.+)", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{document.name} links to #{anchor} in {target.name}"


@named(DOCUMENTS)
def test_files_exist(document):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:formats|demo|tools|bench|docs|tests)/[\w./-]+|\w+\.py)`", text):
        assert (ROOT / name).exists(), f"{document.name} names {name}"


def commands(text: str):
    """(file of the project, its flags) of each command that a document shows."""
    text = text.replace("\\\n", " ")
    for line in re.findall(r"(?:python|torchrun)\b[^`\n]*", text):
        words = line.partition("#")[0].partition("&&")[0].split()
        for i, word in enumerate(words):
            module = words[i - 1] == "-m" and re.fullmatch(r"(tools|demo|bench)\.[a-z]\w*", word)
            if module or re.fullmatch(r"[\w/]+\.py", word):
                file = word.replace(".", "/") + ".py" if module else word
                yield file, [flag for flag in words[i + 1 :] if re.fullmatch(r"--[\w-]+", flag)]
                break


@named(DOCUMENTS)
def test_commands_have_their_flags(document):
    for file, flags in commands(document.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), f"{document.name} shows a command of {file}"
        code = "".join((ROOT / source).read_text(encoding="utf-8") for source in FLAGS_OF.get(file, [file]))
        for flag in flags:
            plain = f"--{flag.removeprefix('--no-')}" if flag.startswith("--no-") else flag
            assert f'"{plain}"' in code or f'"{flag}"' in code, f"{document.name}: {file} has no {flag}"


def test_the_documents_show_commands_of_every_program():
    shown = {file for document in DOCUMENTS for file, _ in commands(document.read_text(encoding="utf-8"))}
    programs = {path.name for path in ROOT.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    programs |= {f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")
                 if "__main__" in path.read_text(encoding="utf-8")}  # fmt: skip
    assert programs <= shown


# --- your-own-data.md


def test_your_own_data_quotes_the_errors_of_its_commands(tmp_path, monkeypatch):
    """Runs the page in a new folder: its first Python block, then each faulty record and the command below it."""
    text = (ROOT / "docs" / "your-own-data.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    first = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert first == json.loads(Path("mine/train.json").read_text(encoding="utf-8"))[0]
    blocks = re.findall(r"```(json|console)\n(.*?)```", text, re.DOTALL)
    n_errors = 0
    for kind, block in blocks:
        command, _, output = block.partition("\n")
        if kind == "json":
            Path("mine/faulty.json").write_text(block, encoding="utf-8")
        elif output.startswith("error: "):
            n_errors += 1
            words = shlex.split(command.removeprefix("$ python train.py"))
            with pytest.raises(UserError) as caught:
                train.open_examples(train.parse_arguments(words))
            assert f"error: {caught.value}\n" == output
    assert n_errors > 10


if __name__ == "__main__":
    readme = README.read_text(encoding="utf-8")
    readme = ROW.sub(lambda row: f"| `{row[1]}.py` | {round(lines_of(row[1]), -1)} |", readme)
    README.write_text(readme, encoding="utf-8")
