"""data.py: data sets, their refusals, pictures in folders and zips, the order of samples, streams and steps."""

import dataclasses
import json
import os
import random
import struct
import subprocess
import sys
import tracemalloc
import unicodedata
import zipfile
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import data
from common import UserError
from conversation import IMAGE_ID, system_ids, tokenize
from vision import open_picture, preprocess

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
TEXT_TURNS = [{"from": "human", "value": "A dog?"}, {"from": "gpt", "value": "A cat."}]
N_PATCHES, SIZE = 4, 16
CASES = ROOT.parent / "shared/cases"


@pytest.fixture
def folder(tmp_path):
    """Pictures a.png, sub/b.png and the damaged broken.png in the folder `images`, and the same in `images.zip`."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "sub/b.png")):
        Image.new("RGB", (40, 32), (100 * i, 9, 9)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.png").write_bytes((tmp_path / "images" / "a.png").read_bytes()[:60])
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("a.png", "sub/b.png", "broken.png"):
            archive.write(tmp_path / "images" / name, name)
    return tmp_path


def write(path, value):
    """Writes text, or any other value as JSON."""
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def captions(n):
    return [{"id": i, "image": "a.png", "caption": f"A cat. Number {i}."} for i in range(n)]


def make_steps(sp, folder, records, world_size=1, rank=0, batch_size=8, limit=10_000, max_length=None, images="images"):
    examples = data.Examples([write(folder / "data.json", records)], seed=1)
    encoder = data.Encoder(sp, N_PATCHES, SIZE, data.Pictures(folder / images), max_length)
    return data.Shares(examples, encoder, batch_size, 1, rank, world_size, limit)


def samples_of(batch: data.Batch) -> list[list[int]]:
    """The ids of each sample of a stream, without the system message."""
    return [batch.ids[start:end].tolist() for start, end in zip(batch.borders, batch.borders[1:])]


# --- data sets


def test_data_sets_are_recognised_by_content_and_joined(tmp_path):
    llava = write(tmp_path / "x.json", [{"id": 5, "image": "a.jpg", "conversations": TURNS}, {"conversations": TEXT_TURNS}])
    lines = write(tmp_path / "y", "\n".join(json.dumps(record) for record in captions(3)) + "\n\n")
    examples = data.Examples([llava, lines])
    assert examples.kinds == ["LLaVA conversations", "captions"]
    assert examples.starts.tolist() == [0, 2, 5]
    assert (len(examples), examples.n_pictures) == (5, 4)
    assert examples[0] == data.Example("5", ["<image>\nWhat is it?", "A cat."], "a.jpg")
    assert examples[1].image is None
    assert examples[4].turns[1] == "A cat. Number 2."


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
        examples = data.Examples([write(tmp_path / "c.json", layout)])
        assert [example.turns[1] for example in examples] == list(texts)


def test_each_epoch_draws_the_requests_for_captions_anew(tmp_path):
    path = write(tmp_path / "c.json", captions(400))

    def requests(seed, epoch):
        examples = data.Examples([path], seed=seed)
        return [examples.get(i, epoch).turns[0] for i in range(400)]

    first = requests(3, 0)
    assert first == requests(3, 0)
    assert first != requests(3, 1)
    assert first != requests(4, 0)
    n_before = sum(text.startswith("<image>\n") for text in first)
    assert 140 < n_before < 260  # half of 400 within six standard deviations: a false alarm has probability 2e-9
    assert {text.replace("<image>", "").strip() for text in first} == set(data.REQUESTS)


def test_from_caption_depends_on_its_record_and_rng_alone():
    one, two = (data.from_caption({"image": "a", "caption": " b\n"}, random.Random(5)) for _ in range(2))
    assert one == two
    assert one.turns[1] == "b"
    assert one.image == "a"


SCIENCEQA = {
    "1": dict(question="Which?  Say.", choices=["no", "yes"], answer=1, hint="", image="image.png", split="test",
              lecture="L1\nL2", solution="S."),
    "2": dict(question="Q", choices=["a", "b"], answer=0, hint="H", image=None, split="test", lecture="", solution=""),
}  # fmt: skip


@pytest.fixture
def scienceqa(tmp_path):
    write(tmp_path / "problems.json", SCIENCEQA)
    write(tmp_path / "pid_splits.json", {"test": ["2", "1"], "train": []})
    (tmp_path / "images/test/1").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "images/test/1/image.png")
    return tmp_path


def test_scienceqa_in_its_published_layout(scienceqa):
    two, one = data.Examples([scienceqa], split="test")
    assert two == data.Example("2", ["Q\nContext: H\nOptions: (A) a (B) b", "The answer is A."], None)
    assert one.turns == ["Which? Say.\nContext: N/A\nOptions: (A) no (B) yes\n<image>", "L1\nL2 S. The answer is B."]
    assert data.Pictures(scienceqa).read(one.image) == (scienceqa / "images/test/1/image.png").read_bytes()


def test_scienceqa_keeps_line_breaks_as_the_original_does(tmp_path):
    """Two line breaks, and the double space that an empty solution leaves."""
    texts = dict(lecture="First line.\nSecond line.", solution="Because.\nSo b.")
    write(tmp_path / "problems.json", {"1": SCIENCEQA["1"] | texts, "2": SCIENCEQA["2"] | texts | dict(solution="")})
    write(tmp_path / "pid_splits.json", {"train": ["1", "2"]})
    one, two = data.Examples([tmp_path], absent="text")
    assert one.turns[1] == "First line.\nSecond line. Because.\nSo b. The answer is B."
    assert two.turns[1] == "First line.\nSecond line. The answer is A."


@pytest.mark.skipif(not CASES.is_dir(), reason="the cases of the original are absent")
def test_a_problem_is_the_conversation_that_the_original_makes(llama_tokenizer):
    """The same text, and the same ids."""
    [theirs] = data.Examples([CASES / "scienceqa/newline/llava_train_QCM-LEA.json"])
    [ours] = data.Examples([CASES / "scienceqa/newline"])
    assert ours == theirs
    for one, other in zip(tokenize(llama_tokenizer, ours.turns), tokenize(llama_tokenizer, theirs.turns)):
        np.testing.assert_array_equal(one, other)


def changed(id, **values):
    return {**SCIENCEQA, id: {**SCIENCEQA[id], **values}}


@pytest.mark.parametrize("change, message", [
    (dict(problems={"1": SCIENCEQA["1"]}), "problem '2' of split 'test': expected a JSON object, not None"),
    (dict(problems=changed("2", answer=2)), "problem '2' of split 'test': `answer` is 2; expected an index into its choices"),
    (dict(problems=changed("2", answer=True)), "problem '2' of split 'test': `answer` is True"),
    (dict(problems=changed("2", choices="ab")), "problem '2' of split 'test': .* and each of its choices must be texts"),
    (dict(problems=changed("2", choices=["a", 3])), "problem '2' of split 'test': .* each of its choices must be texts"),
    (dict(problems=changed("2", choices=["a"] * 27)), "problem '2' of split 'test': `answer` is 0; expected .*26 at most"),
    (dict(problems=changed("2", hint=["x"])), "problem '2' of split 'test': its question, .*hint.* must be texts"),
    (dict(problems={**SCIENCEQA, "2": 3}), "problem '2' .*: expected a JSON object, not 3"),
    (dict(problems=changed("1", split="../..")), "is not a path inside the picture folder"),
    (dict(problems=changed("1", image="x.png")), "images/test/1/x.png.*--missing-pictures-as-text"),
    (dict(problems=changed("1", image="x" * 999)), "--missing-pictures-as-text"),
    (dict(splits={"train": []}), "no problems in split 'test'; it has train"),
    (dict(splits={"\n" + "x" * 999: []}), r"it has \ufffdx+$"),
    (dict(splits={"test": []}), "no problems in split 'test'"),
    (dict(splits={"test": [["2"]]}), "expected a JSON object, not None"),
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
        data.Examples([scienceqa], split="test")
    assert str(scienceqa) in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


def test_absent_pictures_of_scienceqa(scienceqa):
    (scienceqa / "images/test/1/image.png").unlink()
    with pytest.raises(UserError, match="--missing-pictures-as-text"):
        data.Examples([scienceqa], split="test")
    text_only = data.Examples([scienceqa], split="test", absent="text")
    assert text_only[1].image is None
    assert "<image>" not in text_only[1].turns[0]
    assert text_only.absent_pictures == ["images/test/1/image.png"]
    assert text_only.n_pictures == 0
    kept = data.Examples([scienceqa], split="test", absent="keep")
    assert kept[1].image == "images/test/1/image.png"
    assert kept[1].turns[0].endswith("\n<image>")


def chat(*turns, **fields):
    """A record of LLaVA JSON. Its picture is a.png unless `fields` say otherwise."""
    messages = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    record = {"id": "x", "image": "a.png", **fields, "conversations": messages}
    return {key: value for key, value in record.items() if value is not None}


@pytest.mark.parametrize("first", ["<image>\r\nWhat?", "\n<image>\nWhat?", "<image> What?", "What? <image>", "What?<image>",
                                   "<image>What?", "<image> \nWhat?", "What?\n<image>\n"])  # fmt: skip
def test_the_picture_is_at_the_start_or_the_end_whatever_the_white_space(tmp_path, first):
    path = write(tmp_path / "x.json", [chat(first, "A cat.\r\nYes.", "Sure?", "Yes.")])
    assert data.Examples([path])[0] == data.Example("x", [first.replace("\r\n", "\n"), "A cat.\nYes.", "Sure?", "Yes."], "a.png")


def test_a_sample_without_a_picture_may_mention_the_mark_later(tmp_path):
    path = write(tmp_path / "x.json", [chat("What is a tag?", "<image> is one.", image=None)])
    assert data.Examples([path])[0].image is None


# --- refusals


GOOD = json.dumps(captions(1)[0])


@pytest.mark.parametrize("text, message", [
    ("", "holds no samples"),
    ("[]", "holds no samples"),
    ("[" + GOOD, "line 1 column"),
    (f"[{GOOD}\n {GOOD}]", "line 2 column 2"),
    ('[\n\n  {"image": "a.png", "caption": }]', "line 3 column 33"),
    (f"{GOOD}\n{GOOD}\n\n{{", "line 4 column 2"),
    (f"[{GOOD}] {GOOD}", "expected a list of JSON objects, or one object a line"),
    ("[[" * 100_000, "JSON"),
    ('{"a":' * 100_000, "JSON"),
    ('[{"image": "a.png", "caption": ' + "9" * 5000 + "}]", "JSON"),  # more digits than Python converts
    ('{"a": 1, "b": 2}', "sample 0.*its keys are 'a', 'b'; expected"),
    ("[{}]", "sample 0.*its keys are none; expected"),
    ("[3]", "expected a list of JSON objects"),
    ("[null]", "expected a list of JSON objects"),
    ('["conversations"]', "expected a list of JSON objects"),
    (f'[{GOOD}, {{"image": "a.png"}}]', r"sample 1 \(id a.png\): its keys are 'image'; expected"),
    ('[{"id": "x", "conversations": []}]', r"sample 0 \(id x\): it has no conversations"),
    ('[{"id": "x", "conversations": {"from": "human"}}]', r"sample 0 \(id x\): it has no conversations"),
    (json.dumps([{"conversations": TURNS[:1]}]), "last message is the human's"),
    (json.dumps([{"conversations": TURNS[::-1]}]), "message 0 is {'from': 'gpt', .*expected .*human"),
    (json.dumps([{"conversations": TURNS + TURNS[1:] + TURNS[:1]}]), "message 2 is {'from': 'gpt'"),
    (json.dumps([{"conversations": [{"from": "human"}]}]), "message 0 is .*expected"),
    (json.dumps([{"conversations": [{"from": "human", "value": 3}, TURNS[1]]}]), "message 0 is .*expected"),
    (json.dumps([chat("What?", "A cat.")]), "must start or end with <image>, its picture.s place"),
    (json.dumps([chat("Look.\n<image>\nWhat?", "A cat.")]), "must start or end with <image>, its picture.s place"),
    (json.dumps([chat("Hello.", "Hello.", "<image>\nWhat?", "A cat.")]), "must start or end with <image>, its picture.s place"),
    (json.dumps([chat("<image>\n<image>\nWhat?", "A cat.")]), "it has 2 marks <image>; a sample has one picture"),
    (json.dumps([chat("<image>\nWhat?", "A cat.", "<image>", "A dog.")]), "it has 2 marks <image>; a sample has one picture"),
    (json.dumps([chat("<image>\nWhat?", "A cat.", image=None)]), "its first message has <image>, but it has no 'image'; correct"),
    (json.dumps([chat("What?", "A cat.", image="")]), "its image '' is not a path inside"),
    (json.dumps([{"conversations": [{"from": "system", "value": "S"}, *TEXT_TURNS]}]), "message 0 is {'from': 'system', .*expected .*human"),
    *((json.dumps([chat("<image>\nWhat?", "A cat.", image=None, **{key: ["a.png"]})]), f"under the key '{key}': rename it to 'image'")
      for key in ("images", "image_path", "Image")),
    (json.dumps([{"image": "../../etc/passwd", "caption": "x"}]), "is not a path inside the picture folder"),
    (json.dumps([{"image": "/etc/passwd", "caption": "x"}]), "is not a path inside the picture folder"),
    (json.dumps([{"image": "a\\..\\b", "caption": "x"}]), "is not a path inside the picture folder"),
    (json.dumps([{"image": "a\0b", "caption": "x"}]), "is not a path inside"),
    (json.dumps([{"image": "", "conversations": TURNS}]), "is not a path inside"),
    (json.dumps([{"image": 7, "conversations": TURNS}]), "is not a path inside"),
    (json.dumps([{"image": 7, "caption": "x"}]), "is not a path inside"),
    ('[{"image": "a.png", "caption": "\u00a0"}]', r"sample 0 \(id a.png\): its keys are"),  # only a no-break space
    (json.dumps([captions(1)[0], {"conversations": TURNS}]), "sample 1.*its keys are 'conversations'; expected"),  # two kinds in one file
], ids=lambda value: value[:50])  # fmt: skip
def test_faulty_json_is_refused_in_one_line_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        data.Examples([write(tmp_path / "bad.json", text)])
    assert str(tmp_path / "bad.json") in str(error.value)
    assert str(error.value).isprintable()


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "x.json").write_bytes(b"[\xff]")
    with pytest.raises(UserError, match="x.json: .*utf-8.*position 1|x.json: .*byte 1"):
        data.Examples([tmp_path / "x.json"])
    with pytest.raises(UserError, match="absent.json: .*No such file"):
        data.Examples([tmp_path / "absent.json"])
    for path in (tmp_path / "absent", tmp_path / "x.json"):
        with pytest.raises(UserError, match="--images"):
            data.Pictures(path)


def test_names_of_records_cannot_act_on_the_terminal(tmp_path):
    records = [{"id": "日本\n\x1b[2J" + "x" * 999, "conversations": []}]
    with pytest.raises(UserError, match="日本\ufffd\ufffd\\[2Jx+.*: it has no conversations") as error:
        data.Examples([write(tmp_path / "x.json", records)])
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


# --- pictures in folders and zips


@pytest.mark.parametrize("images", ["images", "images.zip"])
def test_pictures_of_a_folder_and_of_a_zip(folder, images):
    pictures = data.Pictures(folder / images)
    assert pictures.read("sub/b.png") == (folder / "images/sub/b.png").read_bytes()
    with pytest.raises(ValueError, match=f"cannot be read from .*{images}: .*[Nn]o .*(file|item)"):
        pictures.read("absent.png")
    with pytest.raises(ValueError, match="is not a path inside the picture folder"):
        pictures.read("../images/a.png")


@pytest.mark.parametrize("top", ["", "imgs/", "a/b/"])
@pytest.mark.parametrize("flag", [True, False])
def test_a_zip_finds_names_that_are_spelled_otherwise(tmp_path, top, flag):
    """Outside ASCII with and without the UTF-8 flag, decomposed as on macOS, below a folder, after `./`."""
    names = {"plain.png": "plain.png", "köln.png": "ko\u0308ln.png", "图片1.png": "图片1.png"}  # asked for: in the zip
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names.values():
            archive.writestr(top + name, name)
            archive.writestr(f"__MACOSX/{top}._{name}", "no picture")
    raw = (tmp_path / "x.zip").read_bytes()
    if not flag:  # bit 11, in the header of each entry and in the directory
        raw = raw.replace(b"PK\3\4\x14\0\0\x08", b"PK\3\4\x14\0\0\0").replace(b"PK\1\2\x14\3\x14\0\0\x08", b"PK\1\2\x14\3\x14\0\0\0")
    (tmp_path / "x.zip").write_bytes(raw)
    flags = [entry.flag_bits & 0x800 for entry in zipfile.ZipFile(tmp_path / "x.zip").infolist()]
    assert any(flags) == flag
    pictures = data.Pictures(tmp_path / "x.zip")
    for asked, name in names.items():
        for spelling in (asked, f"./{asked}", top + asked, unicodedata.normalize("NFD", asked)):
            assert pictures.read(spelling).decode() == name
    with pytest.raises(ValueError, match="No such file in the zip"):
        pictures.read("._plain.png")


def test_a_zip_keeps_names_of_code_page_437(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("k_ln.png", "content")
    (tmp_path / "x.zip").write_bytes((tmp_path / "x.zip").read_bytes().replace(b"k_ln", "köln".encode("cp437")))
    assert data.Pictures(tmp_path / "x.zip").read("köln.png") == b"content"


def test_a_folder_in_the_place_of_a_picture_is_refused(folder):
    with pytest.raises(ValueError, match="cannot be read from .*Is a directory"):
        data.Pictures(folder / "images").read("sub")


def test_threads_read_one_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for i in range(20):
            archive.writestr(str(i), random.Random(i).randbytes(200_000))
    pictures = data.Pictures(tmp_path / "x.zip")
    with ThreadPool(4) as pool:
        contents = pool.map(pictures.read, [str(i % 20) for i in range(200)])
    assert all(content == random.Random(i % 20).randbytes(200_000) for i, content in enumerate(contents))


def with_entry(folder, place: tuple[int, str], value: int):
    """A zip of two entries. place: offset and struct's letter of a number in the first directory record."""
    path = folder / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jpg", b"content")
        archive.writestr("good.jpg", b"good")
    raw = bytearray(path.read_bytes())
    struct.pack_into("<" + place[1], raw, raw.index(b"PK\1\2") + place[0], value)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("place, value, message", [
    ((8, "H"), 1, "encrypted"),
    ((8, "H"), 64, "strong encryption"),
    ((10, "H"), 99, "neither stored nor deflated"),
    ((16, "L"), 7, "Bad CRC-32"),
    ((24, "L"), 3, "Bad CRC-32"),
    ((42, "L"), 2**31, "Truncated"),
    ((42, "L"), 5, "Bad magic number"),
])  # fmt: skip
def test_a_faulty_entry_is_refused_and_its_neighbour_is_read(tmp_path, place, value, message):
    pictures = data.Pictures(with_entry(tmp_path, place, value))
    with pytest.raises(ValueError, match=f"cannot be read from .*x.zip: .*{message}"):
        pictures.read("a.jpg")
    assert pictures.read("good.jpg") == b"good"


def test_a_zip_of_a_later_version_is_refused(tmp_path):
    with pytest.raises(UserError, match="x.zip: .*version 9.9.*--images"):
        data.Pictures(with_entry(tmp_path, (6, "H"), 99))


@pytest.mark.parametrize("images", ["images", "bomb.zip"])
def test_an_encoded_picture_over_the_limit_is_refused(folder, images, monkeypatch):
    (folder / "images/large.png").write_bytes(bytes(1001))
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "images/large.png", "large.png")
    monkeypatch.setattr(data, "MAX_BYTES", 1001)
    assert data.Pictures(folder / images).read("large.png") == bytes(1001)
    monkeypatch.setattr(data, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="cannot be read from .*more than 1000 bytes"):
        data.Pictures(folder / images).read("large.png")


@pytest.mark.parametrize("method, claimed, message", [
    (zipfile.ZIP_DEFLATED, 16 * 10**6, "more than 1000 bytes"),
    (zipfile.ZIP_DEFLATED, 900, "CRC"),
    (zipfile.ZIP_BZIP2, 900, "neither stored nor deflated"),
    (zipfile.ZIP_LZMA, 900, "neither stored nor deflated"),
])  # fmt: skip
def test_a_bomb_takes_no_more_memory_than_the_limit(tmp_path, method, claimed, message, monkeypatch):
    """16 MB of zeros, whatever size the directory claims."""
    monkeypatch.setattr(data, "MAX_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", method) as archive:
        archive.writestr("a.png", bytes(16 * 10**6))
    raw = (tmp_path / "bomb.zip").read_bytes()
    (tmp_path / "bomb.zip").write_bytes(raw.replace(struct.pack("<L", 16 * 10**6), struct.pack("<L", claimed)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        data.Pictures(tmp_path / "bomb.zip").read("a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20, peak


def test_a_zip_damaged_anywhere_gives_one_line_and_never_a_wrong_picture(tmp_path):
    contents, path = {f"{i}.jpg": b"%d" % i * 30 for i in range(4)}, tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    good, rng, n_refused = path.read_bytes(), random.Random(0), 0
    for at in range(len(good)):
        raw = bytearray(good)
        raw[at] = rng.choice([0, 255, raw[at] ^ 1, raw[at] ^ 128])
        path.write_bytes(raw[:at] if at % 20 == 0 else raw)
        try:
            pictures = data.Pictures(path)
        except UserError as error:
            assert str(error).isprintable()
            assert "x.zip: " in str(error)
            assert "--images" in str(error)
            n_refused += 1
            continue
        for name, content in contents.items():
            try:
                assert pictures.read(name) == content
            except ValueError as error:
                assert "cannot be read from" in str(error)
    assert n_refused > 20


def test_read_pixels(folder):
    pixels = data.read_pixels(folder / "images/a.png", SIZE)
    assert pixels.dtype == torch.uint8
    np.testing.assert_array_equal(pixels[0], preprocess(Image.open(folder / "images/a.png"), SIZE))
    for name, message in (("broken.png", "not a readable picture"), ("absent.png", "No such file")):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            data.read_pixels(folder / "images" / name, SIZE)


# --- the order of samples


def test_the_order_is_a_pure_function():
    types = np.repeat([0, 1], [300, 100])
    for sampling in ("proportional", "uniform"):
        first = data.epoch_order(types, 0, 5, sampling)
        np.random.seed(9)
        np.testing.assert_array_equal(first, data.epoch_order(types, 0, 5, sampling))
        assert (first != data.epoch_order(types, 1, 5, sampling)).any()
        assert (first != data.epoch_order(types, 0, 6, sampling)).any()


def test_another_process_draws_the_same(tmp_path):
    """A resumed run repeats the order of samples and the requests for captions."""
    path = write(tmp_path / "c.json", captions(40))
    script = ("import data, json, sys; examples = data.Examples([sys.argv[1]], seed=3);"
              "print(json.dumps([data.epoch_order(examples.types(), 1, 3).tolist(),"
              "[examples.get(i, 1).turns[0] for i in range(40)]]))")  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    result = subprocess.run([sys.executable, "-c", script, path], env=env, check=True, capture_output=True, text=True)
    examples = data.Examples([path], seed=3)
    order = data.epoch_order(examples.types(), 1, 3).tolist()
    assert json.loads(result.stdout) == [order, [examples.get(i, 1).turns[0] for i in range(40)]]


def test_proportional_sampling_shows_each_sample_once():
    assert sorted(data.epoch_order(np.repeat([0, 1], [3000, 1000]), 0, 5)) == list(range(4000))


def test_uniform_sampling_draws_files_alike_and_repeats_no_sample_before_all_were_drawn():
    types = np.repeat([0, 1, 2], [3000, 600, 400])
    samples = data.epoch_order(types, epoch=0, seed=5, sampling="uniform")
    assert len(samples) == 4000
    for kind in range(3):
        drawn = samples[types[samples] == kind]
        assert abs(len(drawn) - 4000 / 3) < 180  # six standard deviations: a false alarm has probability 2e-9
        size = int((types == kind).sum())
        for start in range(0, len(drawn), size):
            assert len(np.unique(drawn[start : start + size])) == len(drawn[start : start + size])


def test_types_are_files_whatever_their_content(tmp_path):
    several_turns = {"conversations": TEXT_TURNS * 3}
    detail = {"conversations": [{"from": "human", "value": "Describe it in detail."}, TEXT_TURNS[1]]}
    mixed = write(tmp_path / "all.json", [several_turns, detail] * 3)
    single = data.Examples([mixed])
    assert len(set(single.types())) == 1
    assert sorted(data.epoch_order(single.types(), 0, 1, "uniform")) == list(range(6))  # each sample once
    part = write(tmp_path / "part.json", [detail] * 2)
    assert data.Examples([mixed, part, mixed]).types().tolist() == [0] * 6 + [1] * 2 + [2] * 6


def test_describe_gives_the_shares_that_are_drawn(tmp_path):
    paths = [write(tmp_path / f"{i}.json", captions(n)) for i, n in enumerate((3000, 600, 400))]
    examples = data.Examples(paths)
    for sampling, shares in (("proportional", [75, 15, 10]), ("uniform", [100 / 3] * 3)):
        lines = examples.describe(sampling)
        drawn = np.bincount(examples.types()[data.epoch_order(examples.types(), 0, 0, sampling)]) / 40
        assert np.abs(drawn - shares).max() < 4.5  # percent; six standard deviations
        for line, path, n, share in zip(lines, paths, (3000, 600, 400), shares, strict=True):
            assert str(path) in line
            assert f"{n:,} captions" in line
            assert f"{share:.1f} %" in line


# --- streams


def test_a_stream_holds_the_system_message_once_and_then_the_samples(tiny_tokenizer, folder):
    names = ["a.png", "sub/b.png", "a.png"]
    records = [{"id": i, "image": name, "conversations": TURNS} for i, name in enumerate(names)]
    steps = make_steps(tiny_tokenizer, folder, [*records, {"id": 3, "conversations": TEXT_TURNS}])
    step = steps[0]
    (batch,) = step.micro_batches
    system = system_ids(tiny_tokenizer)
    assert batch.borders[0] == len(system)
    assert batch.ids[: len(system)].tolist() == system
    assert not batch.green[: len(system)].any()
    assert len(batch.borders) == 5
    assert batch.borders[-1] == len(batch.ids) == len(batch.green)
    pictures = []
    for start, end, i in zip(batch.borders, batch.borders[1:], step.ids):
        example = steps.examples[int(i)]
        ids, green = tokenize(tiny_tokenizer, example.turns, N_PATCHES if example.image else 0)
        np.testing.assert_array_equal(batch.ids[start:end], ids[len(system) :])
        np.testing.assert_array_equal(batch.green[start:end], green[len(system) :])
        if example.image:
            pictures.append(preprocess(open_picture((folder / "images" / example.image).read_bytes()), SIZE))
    np.testing.assert_array_equal(batch.pixels, np.stack(pictures))
    assert (step.green, step.tokens) == (batch.green.sum(), len(batch.ids) - len(system))


def test_a_stream_without_samples_predicts_nothing(tiny_tokenizer):
    encoder = data.Encoder(tiny_tokenizer, N_PATCHES, SIZE)
    batch = encoder.stream([])
    assert batch.borders == [len(encoder.system), len(encoder.system) + 1]
    assert not batch.green.any()
    assert batch.ids.min() >= 0
    assert batch.pixels.shape == (0, 3, SIZE, SIZE)


def test_the_arguments_of_the_model(tiny_tokenizer, folder):
    (batch,) = make_steps(tiny_tokenizer, folder, captions(2))[0].micro_batches
    ids, green, borders, pixels = batch.to(torch.device("cpu"))
    assert (ids.dtype, green.dtype, pixels.dtype) == (torch.int64, torch.bool, torch.uint8)
    assert borders == batch.borders
    assert pixels.shape == (2, 3, SIZE, SIZE)


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "Is it a cat or a dog on a mat?\n<image>"])
def test_too_long_a_sample_loses_its_end_but_never_a_part_of_its_picture(tiny_tokenizer, folder, question):
    turns = [question, "A cat."]
    ids, green = tokenize(tiny_tokenizer, turns, N_PATCHES)
    system, pictures = system_ids(tiny_tokenizer), data.Pictures(folder / "images")
    n_without_picture = 0
    for length in range(len(system) + N_PATCHES + 2, len(ids) + 2):
        encoder = data.Encoder(tiny_tokenizer, N_PATCHES, SIZE, pictures, max_length=length)
        sample = encoder.encode(data.Example("0", turns, "a.png"))
        end = len(system) + len(sample.ids)
        np.testing.assert_array_equal(sample.ids, ids[len(system) : end])
        np.testing.assert_array_equal(sample.green, green[len(system) : end])
        assert sample.cut == (length < len(ids))
        n_patches = int((sample.ids == IMAGE_ID).sum())
        assert n_patches == (0 if sample.pixels is None else N_PATCHES)
        n_without_picture += sample.pixels is None
        cut_before_picture = (ids[end : end + N_PATCHES] == IMAGE_ID).sum() == N_PATCHES
        assert end == min(length, len(ids)) or (cut_before_picture and length < end + N_PATCHES)
        assert len(encoder.stream([sample]).pixels) == n_patches / N_PATCHES
    assert n_without_picture >= (0 if question.startswith("<image>") else N_PATCHES)


def test_a_maximum_length_without_room_for_a_picture_is_refused(tiny_tokenizer):
    shortest = len(system_ids(tiny_tokenizer)) + N_PATCHES
    with pytest.raises(UserError, match=f"--max-length {shortest}: .* {shortest}"):
        data.Encoder(tiny_tokenizer, N_PATCHES, SIZE, max_length=shortest)


# --- steps


def test_the_global_batch_does_not_depend_on_processes_or_micro_batches(tiny_tokenizer, folder):
    records = captions(21)
    alone = make_steps(tiny_tokenizer, folder, records)
    assert alone.per_epoch == 3
    several = [make_steps(tiny_tokenizer, folder, records, world_size=3, rank=rank, limit=100) for rank in range(3)]
    n_micro_batches = 0
    for t in range(4):
        expected, shares = alone[t], [steps[t] for steps in several]
        micro_batches = [batch for share in shares for batch in share.micro_batches]
        n_micro_batches += len(micro_batches)
        assert sorted(sum((share.ids for share in shares), [])) == sorted(expected.ids)
        assert sorted(sum(map(samples_of, micro_batches), [])) == sorted(samples_of(expected.micro_batches[0]))
        for total in ("green", "tokens", "cut"):
            assert sum(getattr(share, total) for share in shares) == getattr(expected, total)
        assert all(batch.borders[-1] - batch.borders[0] <= 100 or len(batch.borders) == 2 for batch in micro_batches)
    assert n_micro_batches > 12  # more than one for a share


def test_a_sample_over_the_limit_of_a_micro_batch_is_alone_in_its_batch(tiny_tokenizer, folder):
    batches = make_steps(tiny_tokenizer, folder, captions(3), limit=1)[0].micro_batches
    assert [len(batch.borders) for batch in batches] == [2, 2, 2]


def test_micro_batches_are_filled_up_to_the_limit(tiny_tokenizer, folder):
    same = [{"id": i, "conversations": TEXT_TURNS} for i in range(7)]
    length = make_steps(tiny_tokenizer, folder, same)[0].tokens // 7
    for limit, sizes in ((3 * length, [3, 3, 1]), (4 * length - 1, [3, 3, 1]), (4 * length, [4, 3])):
        batches = make_steps(tiny_tokenizer, folder, same, limit=limit)[0].micro_batches
        assert [len(batch.borders) - 1 for batch in batches] == sizes


def test_an_epoch_is_a_seeded_permutation_that_can_be_entered_anywhere(tiny_tokenizer, folder):
    steps = make_steps(tiny_tokenizer, folder, captions(20))
    ids = [steps[t].ids for t in range(6)]
    assert [len(batch) for batch in ids] == [8, 8, 4, 8, 8, 4]
    for epoch in (ids[:3], ids[3:]):
        assert sorted(sum(epoch, []), key=int) == [str(i) for i in range(20)]
    assert ids[:3] != ids[3:]
    entered = make_steps(tiny_tokenizer, folder, captions(20))
    for t in (4, 0, 5):
        assert entered[t].ids == ids[t]


def test_the_requests_for_captions_differ_between_the_epochs_of_steps(tiny_tokenizer, folder):
    steps = make_steps(tiny_tokenizer, folder, captions(8))
    first, second = (sorted(samples_of(steps[t].micro_batches[0])) for t in range(2))
    assert first != second


def test_a_process_without_a_sample_has_an_empty_step(tiny_tokenizer, folder):
    assert make_steps(tiny_tokenizer, folder, captions(1), world_size=2, rank=1)[0] == data.Share()


def test_a_bad_picture_is_named_with_its_sample_and_the_others_remain(tiny_tokenizer, folder):
    names = ("a.png", "broken.png", "absent.png")
    records = [{"id": f"id of {name}", "image": name, "conversations": TURNS} for name in names]
    step = make_steps(tiny_tokenizer, folder, records)[0]
    (batch,) = step.micro_batches
    assert len(batch.pixels) == len(batch.borders) - 1 == 1
    broken, absent = sorted(step.errors, reverse=True)
    assert "sample id of broken.png: picture broken.png: not a readable picture" in broken
    assert "sample id of absent.png: picture absent.png: cannot be read" in absent
    assert sorted(step.ids) == [f"id of {name}" for name in sorted(names)]


def values_in(value):
    """All values in a nested dataclass or list, down to arrays and plain values."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from values_in(getattr(value, field.name))
    elif isinstance(value, list):
        for item in value:
            yield from values_in(item)
    else:
        yield value


@pytest.mark.parametrize("images", ["images", "images.zip"])
def test_workers_compute_what_the_main_thread_does(tiny_tokenizer, folder, images):
    names = ["a.png", "sub/b.png", "broken.png"] * 7
    records = [{"id": i, "image": name, "conversations": TURNS} for i, name in enumerate(names)]
    length = len(system_ids(tiny_tokenizer)) + 20
    shares = make_steps(tiny_tokenizer, folder, records, limit=100, max_length=length, images=images)
    for t, share in enumerate(data.prefetched(shares, range(4), workers=2)):
        for value, expected in zip(values_in(share), values_in(shares[t]), strict=True):
            np.testing.assert_array_equal(value, expected)
