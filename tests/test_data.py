"""data.py: what the data sets become, in which order, and how bad input is refused."""

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image

import data
from conversation import IMAGE_ID, UserError, system_ids, tokenize

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


@pytest.fixture(scope="module")
def sp(tmp_path_factory):
    """A SentencePiece model with byte fallback, as LLaMA's is, but tiny."""
    model = io.BytesIO()
    words = ["A chat between a curious human and an artificial intelligence assistant. ### Human: ### Assistant:",
             "What is it? A cat. A dog on a mat. Describe the picture in short."]  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20), model_writer=model, vocab_size=330, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture
def folder(tmp_path):
    """Three pictures, one of them broken, in a folder and the same in a zip; no sample knows which."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for i, name in enumerate(("a.png", "sub/b.png")):
        Image.new("RGB", (40, 32), (100 * i, 9, 9)).save(tmp_path / "images" / name)
    (tmp_path / "images" / "broken.png").write_bytes((tmp_path / "images" / "a.png").read_bytes()[:60])
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("a.png", "sub/b.png", "broken.png"):
            archive.write(tmp_path / "images" / name, name)
    return tmp_path


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def captions(n):
    return [{"image": "a.png", "caption": f"A cat. Number {i}."} for i in range(n)]


def steps(sp, folder, records, world=1, rank=0, batch_size=8, limit=10_000, max_length=200, n_patches=4, images="images"):
    examples = data.Examples([write(folder / "data.json", records)], seed=1)
    encode = data.Encoder(sp, n_patches, 16, data.Pictures(folder / images), max_length, system_ids(sp))
    return data.Steps(examples, encode, batch_size, 1, rank, world, limit)


# --- what is read


def test_kinds_are_recognised_by_content_and_joined(tmp_path):
    llava = write(tmp_path / "x.json", [{"id": 5, "image": "a.jpg", "conversations": TURNS}, {"conversations": TURNS}])
    lines = write(tmp_path / "y", "\n".join(json.dumps(r, ensure_ascii=False) for r in captions(3)) + "\n\n")
    examples = data.Examples([llava, lines])
    assert examples.describe() == "2 LLaVA conversations, 3 captions" and len(examples) == 5
    assert examples[0] == data.Example("5", ["<image>\nWhat is it?", "A cat."], "a.jpg")
    assert examples[1].image is None  # then <image> is three letters and two brackets
    assert examples[4].turns[1] == "A cat. Number 2."


def test_records_are_found_by_offset_whatever_their_layout_and_letters(tmp_path):
    records = [{"image": f"{i}.jpg", "caption": c} for i, c in enumerate(("é", "😀 [,]}{", 'a "quote" \\', "日本語", "a\u2028b"))]
    for text in (json.dumps(records), json.dumps(records, indent=3, ensure_ascii=False),
                 "\ufeff" + json.dumps(records, ensure_ascii=False),
                 "\r\n".join(json.dumps(r, ensure_ascii=False) for r in records)):  # fmt: skip
        examples = data.Examples([write(tmp_path / "c.json", text)])
        assert [e.turns[1] for e in examples] == [r["caption"].strip() for r in records]


def test_a_caption_is_expanded_at_random_but_reproducibly(tmp_path):
    path = write(tmp_path / "c.json", captions(400))
    one, two = data.Examples([path], seed=3), data.Examples([path], seed=3)
    first = [one.get(i, 0).turns[0] for i in range(400)]
    assert first == [two.get(i, 0).turns[0] for i in range(400)]
    assert first != [one.get(i, 1).turns[0] for i in range(400)] != [data.Examples([path], seed=4).get(i, 1).turns[0] for i in range(400)]
    before = sum(text.startswith("<image>\n") for text in first)
    assert 140 < before < 260  # half of 400; six standard deviations: false alarm under 1e-8
    assert {text.replace("<image>", "").strip() for text in first} == set(data.REQUESTS)


def test_a_picture_that_unpacks_to_gigabytes_or_is_damaged_in_its_zip_is_refused_unread(folder, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", 1000)
    (folder / "images/large.png").write_bytes(bytes(1001))
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("large.png", bytes(1001))
        archive.writestr("damaged.png", bytes(range(256)) * 3)
    raw = bytearray((folder / "bomb.zip").read_bytes())
    at = raw.index(b"damaged.png") + len("damaged.png")
    raw[at : at + 8] = b"\xff" * 8
    (folder / "bomb.zip").write_bytes(raw)
    for images, name, message in (("images", "large.png", "1001 bytes are over the limit"),
                                  ("bomb.zip", "large.png", "1001 bytes are over the limit"),
                                  ("bomb.zip", "damaged.png", "cannot be read from")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            data.Pictures(folder / images).read(name)


@pytest.mark.parametrize("method, message", [(zipfile.ZIP_DEFLATED, "CRC"), (zipfile.ZIP_BZIP2, "neither stored nor"),
                                             (zipfile.ZIP_LZMA, "neither stored nor")])  # fmt: skip
def test_a_picture_that_claims_to_be_small_takes_no_memory(tmp_path, method, message):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", method) as archive:
        archive.writestr("a.png", bytes(16 * 10**6))
    raw = (tmp_path / "bomb.zip").read_bytes()
    (tmp_path / "bomb.zip").write_bytes(raw.replace((16 * 10**6).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    tracemalloc.start()
    with pytest.raises(ValueError, match=message):
        data.Pictures(tmp_path / "bomb.zip").read("a.png")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20, peak


def test_names_from_a_file_cannot_act_on_the_terminal(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"id": "日本\n\x1b[2J" + "x" * 999, "conversations": []}], ensure_ascii=False))
    with pytest.raises(UserError, match=r"\(id 日本\\n\\x1b\[2Jx+\): it has no conversations; mend or remove it$") as error:
        data.Examples([tmp_path / "x.json"])
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("images", ["images", "images.zip"])
def test_pictures_come_from_a_folder_or_a_zip(folder, images):
    pictures = data.Pictures(folder / images)
    assert pictures.read("sub/b.png") == (folder / "images/sub/b.png").read_bytes()
    with pytest.raises(ValueError, match="not there"):
        pictures.read("none.png")


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


def test_scienceqa_is_read_as_published(scienceqa):
    two, one = data.Examples([scienceqa], split="test")
    assert two == data.Example("2", ["Q\nContext: H\nOptions: (A) a (B) b", "The answer is A."], None)
    assert one.turns == ["Which? Say.\nContext: N/A\nOptions: (A) no (B) yes\n<image>", "L1\\nL2 S. The answer is B."]
    assert data.Pictures(scienceqa).read(one.image)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(problems={"1": SCIENCEQA["1"]}), "names problem '2', which problems.json does not hold"),
        (dict(problems={**SCIENCEQA, "2": {**SCIENCEQA["2"], "answer": 2}}), "problem 2: answer 2 is beyond its 2 choices"),
        (dict(problems={**SCIENCEQA, "2": {**SCIENCEQA["2"], "choices": "ab"}}), "problem 2: `choices` is 'ab'"),
        (dict(problems={**SCIENCEQA, "2": 3}), "problem 2: expected a JSON object"),
        (dict(problems={**SCIENCEQA, "1": {**SCIENCEQA["1"], "split": "../.."}}), "leads out of the picture folder"),
        (dict(problems={**SCIENCEQA, "1": {**SCIENCEQA["1"], "image": "x.png"}}), "pictures of 1 of 2 problems are absent"),
        (dict(splits={"train": []}), "has no split 'test'; it has train"),
        (dict(splits={"\n" + "x" * 999: []}), r"it has \\nx+$"),
        (dict(problems={**SCIENCEQA, "1": {**SCIENCEQA["1"], "image": "x" * 999}}), "pictures of 1 of 2 problems are"),
        (dict(problems="{"), "not JSON at line 1, column 2"),
    ],
)
def test_a_bad_scienceqa_folder_is_refused(scienceqa, change, message):
    for name, value in change.items():
        write(scienceqa / {"problems": "problems.json", "splits": "pid_splits.json"}[name], value)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        data.Examples([scienceqa], split="test")


def test_a_missing_scienceqa_file_is_named(scienceqa):
    (scienceqa / "pid_splits.json").unlink()
    with pytest.raises(UserError, match="pid_splits.json: .*No such file"):
        data.Examples([scienceqa], split="test")


def test_what_is_shown_of_a_problem_has_its_picture_even_where_that_is_absent(scienceqa):
    (scienceqa / "images/test/1/image.png").unlink()
    given = argparse.Namespace(data=[scienceqa], split="test", tokenizer=None, patches=None)
    _, examples, n_patches = data.open_for_display(given)
    assert [e.image for e in examples] == [None, "images/test/1/image.png"] and examples[1].turns[0].endswith("\n<image>")
    assert n_patches == 36  # the demo's
    given.patches = 0
    with pytest.raises(UserError, match="--patches 0: a picture takes 1 to"):
        data.open_for_display(given)


def test_absent_pictures_become_text_only_when_told_to(scienceqa):
    (scienceqa / "images/test/1/image.png").unlink()
    examples = data.Examples([scienceqa], split="test", absent="text")
    assert examples[1].image is None and "<image>" not in examples[1].turns[0]


GOOD = json.dumps(captions(1)[0])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no samples"),
        ("[]", "holds no samples"),
        ("[" + GOOD, "line 1, column .*not closed|Expecting"),
        (f"[{GOOD}\n {GOOD}]", "line 2, column 2: Expecting ',' or ']'"),
        ('[\n\n  {"image": "a.png", "caption": }]', "line 3, column 33"),
        (f"[{GOOD}] {GOOD}", "line 1, column .*: Extra data"),
        ("[[" * 100_000, "sample 0|bad JSON"),
        ('{"a": 1, "b": 2}', "sample 0: its keys are 'a', 'b'; expected"),
        ("[3]", "sample 0: it is not a JSON object"),
        (f'[{GOOD}, {{"image": "a.png"}}]', r"sample 1 \(id a.png\): it is not"),
        ('[{"id": "x", "conversations": []}]', r"sample 0 \(id x\): it has no conversations"),
        (json.dumps([{"conversations": TURNS[:1]}]), "last message is the human's"),
        (json.dumps([{"conversations": TURNS[::-1]}]), "from 'gpt'; the roles must alternate"),
        (json.dumps([{"conversations": TURNS + TURNS[1:] + TURNS[:1]}]), "message 2 is from 'gpt'"),
        (json.dumps([{"conversations": [{"from": "human"}]}]), "message 0 is not"),
        (json.dumps([{"image": "a.png", "conversations": [{**TURNS[0], "value": "What?"}, TURNS[1]]}]), "line <image>"),
        (json.dumps([{"image": "../../etc/passwd", "caption": "x"}]), "leads out of the picture folder"),
        (json.dumps([{"image": "/etc/passwd", "caption": "x"}]), "leads out of the picture folder"),
        (json.dumps([{"image": "a\\..\\b", "caption": "x"}]), "leads out of the picture folder"),
        (json.dumps([{"image": "a\0b", "caption": "x"}]), "is not a path"),
        (json.dumps([{"image": 7, "caption": "x"}]), "it is not"),
        ('[{"image": "a.png", "caption": "\u00a0"}]', r"sample 0 \(id a.png\): it is not"),  # not two letters
        ('[{"image": "a.png", "caption": ' + "9" * 5000 + "}]", "sample 0|bad JSON"),
    ],
)
def test_bad_json_is_refused_in_one_line_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        data.Examples([write(tmp_path / "bad.json", text)])
    assert "bad.json" in str(error.value) and "\n" not in str(error.value)


def test_text_that_is_not_utf8_and_files_that_are_not_there_are_named(tmp_path):
    (tmp_path / "x.json").write_bytes(b"[\xff]")
    with pytest.raises(UserError, match=r"x.json: not UTF-8 text \(byte 1\)"):
        data.Examples([tmp_path / "x.json"])
    with pytest.raises(UserError, match="none.json: cannot be read"):
        data.Examples([tmp_path / "none.json"])
    for path in (tmp_path / "none", tmp_path / "x.json"):
        with pytest.raises(UserError, match="--images"):
            data.Pictures(path)


# --- full-size data: the kept index of a large file of records, a zip of many entries. (Sizes: full_size.py.)


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file of records that counts as large, and its index."""
    monkeypatch.setattr(data, "LARGE", 0)
    path = write(tmp_path / "c.json", captions(50))
    return path, tmp_path / ".c.json.index.npz"


def whole_readings(monkeypatch) -> list:
    """One entry for each time that a file is read as a whole."""
    made, make = [], data.Records.make_index
    monkeypatch.setattr(data.Records, "make_index", lambda records: made.append(records.path) or make(records))
    return made


def test_the_index_of_a_large_file_is_kept_and_says_the_same(large, monkeypatch):
    (path, index), made = large, whole_readings(monkeypatch)
    first, again = data.Examples([path]), data.Examples([path])
    assert made == [path] and sorted(os.listdir(path.parent)) == [index.name, path.name]
    assert list(first) == list(again) and first.describe() == again.describe() and len(first) == 50
    np.testing.assert_array_equal(first.types(), again.types())
    monkeypatch.setattr(data, "LARGE", path.stat().st_size + 1)
    index.unlink()
    data.Examples([path])
    assert not index.exists()


def test_the_index_of_a_file_that_has_changed_is_made_anew(large, monkeypatch):
    (path, _), made = large, whole_readings(monkeypatch)
    data.Examples([path])
    before = path.stat()
    text = path.read_text()
    path.write_text(text.replace("A cat. Number 7.", "Two cats, seven."))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time, as `cp -p` makes it
    assert data.Examples([path])[7].turns[1] == "Two cats, seven." and len(made) == 2
    path.write_text(text + "]")
    with pytest.raises(UserError, match="c.json: bad JSON in line 1"):
        data.Examples([path])


def test_an_index_that_is_not_whole_or_not_ours_is_made_anew(large, monkeypatch):
    (path, index), made = large, whole_readings(monkeypatch)
    records = data.Examples([path]).parts[0]
    good, dice = index.read_bytes(), random.Random(0)
    with np.load(index) as arrays:
        version, kind = arrays["version"], arrays["kind"]

    def npz(**changes):
        np.savez(file := io.BytesIO(), **(dict(version=version, kind=kind, index=records.index) | changes))
        return file.getvalue()

    late, swapped = records.index.copy(), records.index[::-1]
    late[-1, 1] = path.stat().st_size + 1
    bad = [b"", b"PK", b"no index", good[:-1], good[: len(good) // 2], pickle.dumps([1]), npz(version=version + 1),
           npz(kind="photographs"), npz(index=late), npz(index=late - 9), npz(index=swapped), npz(index=late[:, :3]),
           npz(index=late[:0]), npz(index=records.index.astype(float)), npz(index=np.array([None])), npz(index=7),
           npz(version=3)]  # fmt: skip
    for at in dice.sample(range(len(good)), 100):  # damaged at any place: made anew, or what was damaged does not count
        bad.append(good[:at] + bytes([good[at] ^ 255]) + good[at + 1 :])
    for content in bad:
        index.write_bytes(content)
        again = data.Examples([path]).parts[0]
        assert again.kind == records.kind and (again.index == records.index).all(), content[:300]
    assert len(made) > 60 and index.read_bytes() == good


def test_an_index_that_cannot_be_kept_is_no_error(large, monkeypatch):
    path, index = large
    index.mkdir()  # even root cannot put a file there
    assert len(data.Examples([path])) == 50 and sorted(os.listdir(path.parent)) == [index.name, path.name]
    monkeypatch.setattr(np, "savez", lambda file, **_: file.write(b"half") and os.write(-1, b""))  # as a full disk does
    index.rmdir()
    assert len(data.Examples([path])) == 50 and os.listdir(path.parent) == [path.name]


def test_a_file_that_changes_while_it_is_in_use_is_named_with_the_step(sp, folder):
    all_steps = steps(sp, folder, captions(8))
    (folder / "data.json").write_text("[]" + " " * 100)
    assert all(e == f"{folder}/data.json: sample {i} is not where it was; the file has changed, start again" for e, i in
               zip(all_steps[0].errors, all_steps.order)) and len(all_steps[0].errors) == 8  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A zip of 70,000 entries, which takes zip64's end record."""
    path = tmp_path_factory.mktemp("zip") / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(70_000):
            archive.writestr(zipfile.ZipInfo(f"{i}.jpg"), b"%d" % i)
    return path


def test_a_zip_of_many_entries_takes_little_memory_and_travels_to_processes(many):
    pictures = pickle.loads(pickle.dumps(data.Pictures(many)))
    assert [pictures.read(f"{i}.jpg") for i in (0, 7, 69_999)] == [b"0", b"7", b"69999"]
    assert pictures.zip.hashes.nbytes + pictures.zip.places.nbytes == 20 * 70_000
    with pytest.raises(ValueError, match="it is not there"):
        pictures.read("70000.jpg")


def test_names_of_one_hash_are_told_apart(tmp_path):
    names = ["b83a3119.jpg", "4505775.jpg"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(name, name)
    pictures = data.Pictures(tmp_path / "x.zip")
    assert len(set(pictures.zip.hashes)) == 1 and [pictures.read(name).decode() for name in names] == names


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_says_what_zipfile_says(tmp_path, method):
    """Names of other letters, a name twice, a folder, zip64's sizes, comments, something before the zip."""
    names = ["a.jpg", "日本/é.jpg", "a.jpg", "x" * 300, "empty", "PK\5\6", "folder/"]  # "xxx" stands in no other
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        for i, name in enumerate(names):
            info = zipfile.ZipInfo(name)
            info.comment, info.extra = b"PK\5\6" * i, struct.pack("<HHL", 0x9999, 4, i)
            with pytest.warns(UserWarning, match="Duplicate") if i == 2 else contextlib.nullcontext():
                with archive.open(info, "w", force_zip64=i % 2 == 1) as file:
                    file.write(b"" if i == 4 else b"content" * 50 + bytes([i]))
        archive.comment = b"PK\6\6" * 30
    raw = (tmp_path / "x.zip").read_bytes().replace(b"xxx", b"xx\x82")  # a name of DOS's letters, which is not UTF-8
    names[3] = "xxé" * 100
    for before in (b"", b"#!/bin/sh\n" * 99):
        (tmp_path / "x.zip").write_bytes(before + raw)
        pictures = data.Pictures(tmp_path / "x.zip")
        with zipfile.ZipFile(tmp_path / "x.zip") as archive:
            for name in names:
                assert pictures.read(name) == archive.read(name)


def test_an_entry_beyond_4_gigabytes_is_found(tmp_path):
    """A sparse file: its hole takes no disk."""
    with open(tmp_path / "x.zip", "wb") as file:
        file.seek(5 * 2**30)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a.jpg", b"far")
    assert (tmp_path / "x.zip").stat().st_size > 2**32 and data.Pictures(tmp_path / "x.zip").read("a.jpg") == b"far"


def with_entry(folder, place, value, name=b"a.jpg"):
    """A zip of one entry, a number of whose directory record is `value`. place: its offset and struct's letter."""
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr(name.decode(), b"content")
        archive.writestr("good.jpg", b"good")
    raw = bytearray((folder / "x.zip").read_bytes())
    struct.pack_into("<" + place[1], raw, raw.index(b"PK\1\2") + place[0], value)
    (folder / "x.zip").write_bytes(raw)
    return data.Pictures(folder / "x.zip")


@pytest.mark.parametrize(
    "place, value, message",
    [
        ((8, "H"), 1, "encrypted, password required"),
        ((8, "H"), 64, "strong encryption"),
        ((10, "H"), 99, "neither stored nor deflated"),
        ((6, "H"), 99, "zip file version"),
        ((16, "L"), 7, "Bad CRC-32"),
        ((20, "L"), 2**27, "the file has"),
        ((20, "L"), 2**31, "over the limit"),
        ((20, "L"), 2**32 - 1, "over the limit"),  # promises zip64's numbers, and has none
        ((24, "L"), 2**31, "over the limit"),
        ((24, "L"), 3, "Bad CRC-32"),
        ((42, "L"), 2**31, "the file has"),
        ((42, "L"), 5, "Bad magic number|the file has|cannot"),
        ((42, "L"), 2**32 - 1, "the file has"),
    ],
)
def test_a_hostile_or_damaged_entry_is_refused_and_its_neighbour_read(tmp_path, place, value, message):
    pictures = with_entry(tmp_path, place, value)
    with pytest.raises(ValueError, match=f"cannot be read from .*x.zip: .*({message})"):
        pictures.read("a.jpg")
    assert pictures.read("good.jpg") == b"good"


def test_a_zip_damaged_anywhere_gives_the_clear_errors_and_no_wrong_picture(tmp_path):
    contents = {f"{i}.jpg": b"%d" % i * 30 for i in range(4)}
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    good, dice, refused = (tmp_path / "x.zip").read_bytes(), random.Random(0), 0
    for at in range(len(good)):
        raw = bytearray(good)
        raw[at] = dice.choice([0, 255, raw[at] ^ 1, raw[at] ^ 128])
        (tmp_path / "x.zip").write_bytes(raw if at % 2 else raw[:at] if at % 20 == 0 else raw)
        try:
            pictures = data.Pictures(tmp_path / "x.zip")
        except UserError as error:
            assert "\n" not in str(error) and "x.zip: " in str(error) and "--images" in str(error)
            refused += 1
            continue
        for name, content in contents.items():
            try:
                assert pictures.read(name) == content
            except ValueError as error:
                assert "cannot be read from" in str(error)
    assert refused > 20


def test_a_zip_whose_end_promises_what_is_not_there_is_refused(tmp_path, many):
    raw, path = bytearray(many.read_bytes()), tmp_path / "x.zip"
    zip64 = raw.rindex(b"PK\6\6")
    for place, value in ((40, 2**64 - 1), (40, 2**63), (40, len(raw)), (40, 1000), (48, 2**64 - 1), (48, 10**6)):
        damaged = raw.copy()
        struct.pack_into("<Q", damaged, zip64 + place, value)
        path.write_bytes(damaged)
        with pytest.raises((UserError, ValueError), match="directory is damaged.*--images|cannot be read from"):
            data.Pictures(path).read("5.jpg")
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(ValueError, match="it is not there"):
        data.Pictures(path).read("5.jpg")


# --- the flat batch


def test_a_flat_batch_is_its_samples_end_to_end_without_the_prefix(sp, folder):
    records = [{"id": i, "image": "a.png", "conversations": TURNS} for i in range(3)] + [
        {"id": 3, "conversations": [{"from": "human", "value": "A dog?"}, TURNS[1]]}
    ]
    all_steps = steps(sp, folder, records)
    (batch,), S = all_steps[0].batches, len(system_ids(sp))
    borders = batch.cu_seqlens.tolist()
    assert batch.pixels.shape == (3, 3, 16, 16) and borders[-1] == len(batch.ids) == len(batch.green)
    for a, b, i in zip(borders, borders[1:], all_steps[0].ids):
        example = all_steps.examples[int(i)]
        ids, green = tokenize(sp, example.turns, 4 if example.image else 0)
        np.testing.assert_array_equal(batch.ids[a:b], ids[S:])
        np.testing.assert_array_equal(batch.green[a:b], green[S:])


def test_the_global_batch_does_not_depend_on_processes_or_micro_batches(sp, folder):
    records = captions(21)
    whole = steps(sp, folder, records)
    assert whole.per_epoch == 3
    for t in range(4):
        expected = sorted(whole[t].batches[0].ids.tolist())
        shares = [steps(sp, folder, records, world=3, rank=rank, limit=100)[t] for rank in range(3)]
        assert all(len(share.batches) > 1 or len(share.ids) < 3 for share in shares)
        assert sorted(i for share in shares for batch in share.batches for i in batch.ids.tolist()) == expected
        assert max(len(batch.ids) for share in shares for batch in share.batches) <= 100


def test_an_epoch_is_a_seeded_permutation_that_can_be_entered_anywhere(sp, folder):
    numbered = [{**r, "id": i} for i, r in enumerate(captions(20))]
    epochs = steps(sp, folder, numbered)
    seen = [epochs[t].ids for t in range(6)]
    assert sorted(sum(seen[:3], []), key=int) == sorted(sum(seen[3:], []), key=int) == [str(i) for i in range(20)]
    assert seen[:3] != seen[3:]
    assert steps(sp, folder, numbered)[4].ids == seen[4]


def test_uniform_sampling_draws_the_types_alike_and_none_twice_before_all():
    types = np.array([0] * 3000 + [1] * 600 + [2] * 400)
    samples = data.order(types, epoch=0, seed=5, sampling="uniform")
    assert len(samples) == 4000 and (samples == data.order(types, 0, 5, "uniform")).all()
    assert (samples != data.order(types, 1, 5, "uniform")).any()
    for kind in range(3):
        mine = samples[types[samples] == kind]
        assert abs(len(mine) - 4000 / 3) < 180  # six standard deviations of a binomial: false alarm under 1e-8
        size = int((types == kind).sum())
        for start in range(0, len(mine), size):
            assert len(np.unique(mine[start : start + size])) == len(mine[start : start + size])
    assert sorted(data.order(types, 0, 5)) == list(range(4000))


def test_response_types_come_from_the_files_or_from_one_file_by_content(tmp_path):
    def sample(question, answers=1):
        return {"conversations": [{"from": "human", "value": question}, TURNS[1]] * answers}

    talk, detail = [sample(f"Q{i}?", 2) for i in range(5)], [sample("Describe it in detail.") for _ in range(4)]
    reason = [sample(f"Why {i}?") for i in range(3)]
    one = data.Examples([write(tmp_path / "all.json", detail + talk + reason)])
    assert one.types().tolist() == [1] * 4 + [0] * 5 + [2] * 3
    three = data.Examples([write(tmp_path / f"{i}.json", part) for i, part in enumerate((talk, detail, reason))])
    assert three.types().tolist() == [0] * 5 + [1] * 4 + [2] * 3


def test_a_process_without_a_sample_still_has_a_batch(sp, folder):
    step = steps(sp, folder, captions(1), world=2, rank=1)[0]
    (batch,) = step.batches
    assert not step.ids and len(batch.ids) == 1 and not batch.green.any() and len(batch.pixels) == 0


@pytest.mark.parametrize("last", [False, True])
def test_too_long_a_sample_is_cut_at_its_end_but_never_inside_its_picture(sp, folder, last):
    turns = [{"from": "human", "value": "What is it?\n<image>" if last else "<image>\nWhat is it?"}, TURNS[1]]
    ids, green = tokenize(sp, [t["value"] for t in turns], 4)
    for length in range(len(system_ids(sp)) + 1, len(ids) + 1):
        step = steps(sp, folder, [{"image": "a.png", "conversations": turns}], max_length=length)[0]
        (batch,) = step.batches
        patches = int((batch.ids == IMAGE_ID).sum())
        assert (patches, len(batch.pixels)) in ((0, 0), (4, 1))
        assert step.cut == (length < len(ids))
        kept = len(batch.ids) + len(system_ids(sp))
        assert kept == length or (patches == 0 and (ids[kept : kept + 4] == IMAGE_ID).all())
        np.testing.assert_array_equal(batch.green, green[len(system_ids(sp)) : kept])


def test_a_bad_picture_is_named_with_its_sample_and_harms_no_other(sp, folder):
    records = [{"id": name, "image": name, "conversations": TURNS} for name in ("a.png", "broken.png", "none.png")]
    step = steps(sp, folder, records)[0]
    assert len(step.batches[0].pixels) == 1 and len(step.errors) == 2
    assert any("sample broken.png: picture broken.png: not a readable picture" in e for e in step.errors)
    assert any("sample none.png" in e and "not there" in e for e in step.errors)


def test_worker_processes_give_what_the_main_process_gives(sp, folder):
    from_zip = steps(sp, folder, captions(20), images="images.zip")
    loader = torch.utils.data.DataLoader(from_zip, batch_size=None, sampler=range(5), num_workers=2)
    for t, step in enumerate(loader):
        torch.testing.assert_close(step.batches[0].ids, from_zip[t].batches[0].ids)
        torch.testing.assert_close(step.batches[0].pixels, from_zip[t].batches[0].pixels)


def test_from_caption_leaves_the_callers_dice_reproducible():
    one = data.from_caption({"image": "a", "caption": "b"}, random.Random(5))
    assert one == data.from_caption({"image": "a", "caption": "b"}, random.Random(5))
