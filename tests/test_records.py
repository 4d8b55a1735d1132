"""formats/records.py: the layouts of JSON files, ScienceQA's folder, and their refusals."""

import json

import pytest
from conftest import SCIENCEQA, write

from common import UserError
from formats.records import read_records, read_scienceqa


def test_every_json_layout_gives_the_same_records(tmp_path):
    texts = ("é", "😀 [,]}{", 'a "quote" \\', "日本語", "a\u2028b")
    records = [{"image": f"{i}.jpg", "caption": text} for i, text in enumerate(texts)]
    in_lines = [json.dumps(record, ensure_ascii=False) for record in records]
    layouts = (
        json.dumps(records),
        json.dumps(records, indent=3, ensure_ascii=False),
        "\ufeff" + json.dumps(records, ensure_ascii=False),
        "\n" + json.dumps(records),
        "\n".join(in_lines),
        "\r\n".join(in_lines) + "\r\n",
    )
    for layout in layouts:
        assert read_records(write(tmp_path / "c.json", layout)) == records


GOOD = '{"image": "a.png", "caption": "A cat."}'


@pytest.mark.parametrize("text, message", [
    ("", "expected a list of JSON objects"),
    ("[]", "expected a list of JSON objects"),
    ("[" + GOOD, "line 1 column"),
    (f"[{GOOD}\n {GOOD}]", "line 2 column 2"),
    ('[\n\n  {"image": "a.png", "caption": }]', "line 3 column 33"),
    (f"{GOOD}\n{GOOD}\n\n{{", "line 4 column 2"),
    (f"[{GOOD}] {GOOD}", "expected a list of JSON objects, or one object a line"),
    ("[[" * 100_000, "JSON"),
    ('{"a":' * 100_000, "JSON"),
    ('[{"image": "a.png", "caption": ' + "9" * 5000 + "}]", "JSON"),  # more digits than Python converts
    ("[3]", "expected a list of JSON objects"),
    ("[null]", "expected a list of JSON objects"),
    ('["conversations"]', "expected a list of JSON objects"),
], ids=lambda value: value[:50])  # fmt: skip
def test_faulty_json_is_refused_in_one_line_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_records(write(tmp_path / "bad.json", text))
    assert str(tmp_path / "bad.json") in str(error.value)
    assert str(error.value).isprintable()


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "x.json").write_bytes(b"[\xff]")
    with pytest.raises(UserError, match="x.json: .*utf-8.*position 1|x.json: .*byte 1"):
        read_records(tmp_path / "x.json")
    with pytest.raises(UserError, match="absent.json: .*No such file"):
        read_records(tmp_path / "absent.json")


# --- ScienceQA


def test_problems_in_the_order_of_their_split(scienceqa):
    two, one = read_scienceqa(scienceqa, "test")[0]
    assert one == SCIENCEQA["1"] | {"id": "1", "image_path": "images/test/1/image.png"}
    assert two == SCIENCEQA["2"] | {"id": "2", "image": "", "image_path": None}


def test_absent_pictures(scienceqa):
    path = "images/test/1/image.png"
    (scienceqa / path).unlink()
    with pytest.raises(UserError, match=f"1 pictures are absent .{path}.; .*--missing-pictures-as-text"):
        read_scienceqa(scienceqa, "test")
    for absent, shown in (("text", None), ("keep", path)):
        problems, absent_pictures = read_scienceqa(scienceqa, "test", absent)
        assert [problem["image_path"] for problem in problems] == [None, shown]
        assert absent_pictures == [path]


def changed(id, **values):
    return {**SCIENCEQA, id: {**SCIENCEQA[id], **values}}


@pytest.mark.parametrize("change, message", [
    (dict(problems={"1": SCIENCEQA["1"]}), "problem '2' of split 'test': its entry in problems.json is None"),
    (dict(problems=changed("2", answer=2)), "problem '2' of split 'test': `answer` is 2; expected an index into its choices"),
    (dict(problems=changed("2", answer=True)), "problem '2' of split 'test': `answer` is True"),
    (dict(problems=changed("2", choices="ab")), "problem '2' of split 'test': .* and each of its choices must be strings"),
    (dict(problems=changed("2", choices=["a", 3])), "problem '2' of split 'test': .* each of its choices must be strings"),
    (dict(problems=changed("2", choices=["a"] * 27)), "problem '2' of split 'test': `answer` is 0; expected .*at most 26"),
    (dict(problems=changed("2", hint=["x"])), "problem '2' of split 'test': its question, .*hint.* must be strings"),
    (dict(problems={**SCIENCEQA, "2": 3}), "problem '2' .*: its entry in problems.json is 3"),
    (dict(problems=changed("1", split="../..")), "is not a path inside the picture folder"),
    (dict(problems=changed("1", image="x.png")), "images/test/1/x.png.*--missing-pictures-as-text"),
    (dict(problems=changed("1", image="x" * 999)), "--missing-pictures-as-text"),
    (dict(splits={"train": []}), "no problems in split 'test'; it has train"),
    (dict(splits={"\n" + "x" * 999: []}), r"it has \ufffdx+$"),
    (dict(splits={"test": []}), "no problems in split 'test'"),
    (dict(splits={"test": [["2"]]}), "its entry in problems.json is None"),
    (dict(problems="{"), "line 1 column 2"),
    (dict(problems="[]"), "problems.json: .* list"),
    (dict(splits=None), "pid_splits.json: .*No such file"),
    (dict(problems=None), "problems.json: .*No such file"),
], ids=lambda value: str(value)[:60])  # fmt: skip
def test_faulty_scienceqa_folders_are_refused(scienceqa, change, message):
    for name, value in change.items():
        path = scienceqa / {"problems": "problems.json", "splits": "pid_splits.json"}[name]
        path.unlink()
        if value is not None:
            write(path, value)
    with pytest.raises(UserError, match=message) as error:
        read_scienceqa(scienceqa, "test")
    assert str(scienceqa) in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600
