"""data.py: data sets, their refusals, the order of samples, streams and steps."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, SCIENCEQA, write
from PIL import Image

import data
from common import UserError
from conversation import IMAGE_ID, system_ids, tokenize
from formats.pictures import Pictures, open_picture
from vision import preprocess

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


def captions(n):
    return [{"id": i, "image": "a.png", "caption": f"A cat. Number {i}."} for i in range(n)]


def make_steps(sp, folder, records, world_size=1, rank=0, batch_size=8, limit=10_000, max_length=None, images="images"):
    examples = data.Examples([write(folder / "data.json", records)], seed=1)
    encoder = data.Encoder(sp, N_PATCHES, SIZE, Pictures(folder / images), max_length)
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


def test_scienceqa_in_its_published_layout(scienceqa):
    two, one = data.Examples([scienceqa], split="test")
    assert two == data.Example("2", ["Q\nContext: H\nOptions: (A) a (B) b", "The answer is A."], None)
    assert one.turns == ["Which? Say.\nContext: N/A\nOptions: (A) no (B) yes\n<image>", "L1\nL2 S. The answer is B."]
    assert Pictures(scienceqa).read(one.image) == (scienceqa / "images/test/1/image.png").read_bytes()


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


def test_absent_pictures_of_scienceqa(scienceqa):
    (scienceqa / "images/test/1/image.png").unlink()
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
    ('{"a": 1, "b": 2}', "sample 0.*its keys are 'a', 'b'; expected"),
    ("[{}]", "sample 0.*its keys are none; expected"),
    (f'[{GOOD}, {{"image": "a.png"}}]', r"sample 1 \(id a.png\): its keys are 'image'; expected"),
    ('[{"id": "x", "conversations": []}]', r"sample 0 \(id x\): it has no conversations"),
    ('[{"id": "x", "conversations": {"from": "human"}}]', r"sample 0 \(id x\): it has no conversations"),
    (json.dumps([{"conversations": TURNS[:1]}]), "last message is from the human"),
    (json.dumps([{"conversations": TURNS[::-1]}]), "message 0 is {'from': 'gpt', .*expected .*human"),
    (json.dumps([{"conversations": TURNS + TURNS[1:] + TURNS[:1]}]), "message 2 is {'from': 'gpt'"),
    (json.dumps([{"conversations": [{"from": "human"}]}]), "message 0 is .*expected"),
    (json.dumps([{"conversations": [{"from": "human", "value": 3}, TURNS[1]]}]), "message 0 is .*expected"),
    (json.dumps([chat("What?", "A cat.")]), "must start or end with <image>, the place of its picture"),
    (json.dumps([chat("Look.\n<image>\nWhat?", "A cat.")]), "must start or end with <image>, the place of its picture"),
    (json.dumps([chat("Hello.", "Hello.", "<image>\nWhat?", "A cat.")]), "must start or end with <image>, the place of its picture"),
    (json.dumps([chat("<image>\n<image>\nWhat?", "A cat.")]), "it has 2 marks <image>, but a sample has one picture"),
    (json.dumps([chat("<image>\nWhat?", "A cat.", "<image>", "A dog.")]), "it has 2 marks <image>, but a sample has one picture"),
    (json.dumps([chat("<image>\nWhat?", "A cat.", image=None)]), "its first message has <image>, but it has no 'image'; correct"),
    (json.dumps([chat("What?", "A cat.", image="")]), "its image '' is not a path inside"),
    (json.dumps([{"conversations": [{"from": "system", "value": "S"}, *TEXT_TURNS]}]), "message 0 is {'from': 'system', .*expected .*human"),
    *((json.dumps([chat("<image>\nWhat?", "A cat.", image=None, **{key: ["a.png"]})]), f"not under .{key}.")
      for key in ("images", "image_path", "Image")),
    (json.dumps([{"image": "../../etc/passwd", "caption": "x"}]), "is not a path inside the picture folder"),
    (json.dumps([{"image": 7, "conversations": TURNS}]), "is not a path inside"),
    (json.dumps([{"image": 7, "caption": "x"}]), "is not a path inside"),
    ('[{"image": "a.png", "caption": "\u00a0"}]', r"sample 0 \(id a.png\): its keys are"),  # only a no-break space
    (json.dumps([captions(1)[0], {"conversations": TURNS}]), "sample 1.*its keys are 'conversations'; expected"),  # two kinds in one file
], ids=lambda value: value[:50])  # fmt: skip
def test_a_faulty_record_is_refused_in_one_line_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        data.Examples([write(tmp_path / "bad.json", text)])
    assert str(tmp_path / "bad.json") in str(error.value)
    assert str(error.value).isprintable()


def test_names_of_records_cannot_act_on_the_terminal(tmp_path):
    records = [{"id": "日本\n\x1b[2J" + "x" * 999, "conversations": []}]
    with pytest.raises(UserError, match="日本\ufffd\ufffd\\[2Jx+.*: it has no conversations") as error:
        data.Examples([write(tmp_path / "x.json", records)])
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


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
    pictures, tokenized = [], []
    for i in step.ids:
        example = steps.examples[int(i)]
        tokenized.append((*tokenize(tiny_tokenizer, example.turns, N_PATCHES if example.image else 0), example))
    tokenized.sort(key=lambda one: len(one[0]))  # the stream holds the short samples first
    for start, end, (ids, green, example) in zip(batch.borders, batch.borders[1:], tokenized):
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
    ids, target, borders, pixels = batch.to(torch.device("cpu"))
    assert (ids.dtype, target.dtype, pixels.dtype) == (torch.int64, torch.int64, torch.uint8)
    assert target.tolist() == [i for i, green in enumerate(batch.green) if green]
    assert borders == batch.borders
    assert pixels.shape == (2, 3, SIZE, SIZE)


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "Is it a cat or a dog on a mat?\n<image>"])
def test_too_long_a_sample_loses_its_end_but_never_a_part_of_its_picture(tiny_tokenizer, folder, question):
    turns = [question, "A cat."]
    ids, green = tokenize(tiny_tokenizer, turns, N_PATCHES)
    system, pictures = system_ids(tiny_tokenizer), Pictures(folder / "images")
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
