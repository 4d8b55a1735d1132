"""data.py: what the data sets become, in which order, and how bad input is refused."""

import argparse
import io
import json
import random
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
