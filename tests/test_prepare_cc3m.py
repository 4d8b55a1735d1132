"""tools/prepare_cc3m.py: the inputs it recognises, the captions it selects, the files it writes and what it refuses."""

import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import data
from common import UserError
from conversation import system_ids, tokenize
from formats.pictures import Pictures
from tools import prepare_cc3m

CAPTIONS = [f"a {colour} {thing} in the {place}" for place in ("garden", "street") for colour in ("red", "blue")
            for thing in ("dog", "cat", "tree", "boat")] * 3 + ["a lonely unicorn"]  # fmt: skip


def prepare(source, out, *flags):
    prepare_cc3m.prepare(prepare_cc3m.parse_arguments(
        ["--data", str(source), "--out", str(out), "--phrases", "simple", *map(str, flags)]
    ))  # fmt: skip
    return json.loads((out / "chat.json").read_text()), json.loads((out / "report.json").read_text())


def picture(i):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (5 * i % 256, 9, 90)).save(file, "PNG")
    return file.getvalue()


def tsv(path, captions=CAPTIONS):
    path.write_text("".join(f"{caption}\thttp://x.org/{i}.jpg\n" for i, caption in enumerate(captions)))
    return path


def files(folder, captions=CAPTIONS, per_shard=20):
    """Writes what img2dataset writes with output_format=files."""
    for i, caption in enumerate(captions):
        shard = folder / f"{i // per_shard:05}"
        shard.mkdir(parents=True, exist_ok=True)
        key = f"{i // per_shard:05}{i % per_shard:04}"
        (shard / f"{key}.jpg").write_bytes(picture(i))
        (shard / f"{key}.txt").write_text(caption)
        (shard / f"{key}.json").write_text(json.dumps(dict(caption=caption, key=key, status="success")))
    (folder / "00000_stats.json").write_text('{"count": 20}')
    return folder


def tars(folder, captions=CAPTIONS):
    """Writes what img2dataset writes with output_format=webdataset."""
    source = files(folder / "source", captions)
    for shard in sorted(p for p in source.iterdir() if p.is_dir()):
        with tarfile.open(folder / f"{shard.name}.tar", "w") as tar:
            for path in sorted(shard.iterdir()):
                tar.add(path, path.name)
    source.rename(folder.with_name("unpacked"))
    return folder


# --- phrases and the subset


def test_simple_phrases():
    _, find_phrases = prepare_cc3m.simple_phrases(1)
    texts = ["A man wearing the Red Hat of his father 's friend", "dogs, cats and t-shirts", "it is there .", ""]
    assert list(find_phrases(texts)) == [["man", "red hat", "father", "friend"], ["dogs", "cats", "t-shirts"], [], []]


def random_captions(n=4000, phrases=300, seed=0) -> list[set[int]]:
    """The phrases, as numbers, of each caption. The first phrases are in nearly all captions, and many others in one."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, phrases + 1) ** 1.5
    return [set(rng.choice(phrases, rng.integers(0, 4), p=weights / weights.sum()).tolist()) for _ in range(n)]


def digest(phrase: int) -> int:
    """Distinct for the phrases used here, and in another order than they."""
    return phrase * 7919 % 1009


def group(captions: list[set[int]]) -> tuple[prepare_cc3m.Concepts, list[int]]:
    """Their Concepts, and the phrase that each of its rows stands for."""
    digests = np.array([digest(phrase) for phrases in captions for phrase in phrases], dtype="<u8")
    concepts = prepare_cc3m.group_by_phrase(digests, np.array([len(phrases) for phrases in captions]))
    phrase_of = {digest(phrase): phrase for phrases in captions for phrase in phrases}
    return concepts, [phrase_of[row] for row in concepts.digests.tolist()]


def test_the_captions_of_each_phrase():
    captions = random_captions()
    concepts, phrases = group(captions)
    assert sorted(phrases) == sorted(set().union(*captions))
    for p, phrase in enumerate(phrases):
        holders = concepts.captions[concepts.starts[p] : concepts.starts[p + 1]].tolist()
        assert holders == [i for i, caption in enumerate(captions) if phrase in caption]


def test_the_subset_is_balanced():
    captions = random_captions()
    concepts, _ = group(captions)
    counts = Counter(phrase for caption in captions for phrase in caption)
    assert min(counts.values()) < 3 and max(counts.values()) > 1000
    selected = prepare_cc3m.select_balanced(concepts, 3, 100, 0)
    after = Counter(phrase for caption, is_selected in zip(captions, selected) if is_selected for phrase in caption)
    for phrase, count in counts.items():
        if 3 <= count <= 100:
            assert after[phrase] == count  # all captions of a rare concept
        elif count > 100:
            assert after[phrase] >= 100
    rare = [i for i, caption in enumerate(captions) if not any(counts[phrase] >= 3 for phrase in caption)]
    assert rare and not selected[rare].any()
    # The captions that hold only the most frequent phrase are selected in proportion to their number. The bound of five
    # standard deviations fails by chance for less than one seed in a million; the seed here is fixed.
    most = counts.most_common(1)[0][0]
    alike = [i for i, caption in enumerate(captions) if caption == {most}]
    expected = len(alike) * 100 / counts[most]
    assert abs(selected[alike].sum() - expected) < 5 * expected**0.5
    assert not (selected == prepare_cc3m.select_balanced(concepts, 3, 100, 1)).all()


# --- inputs and outputs


def test_all_inputs_give_the_same_conversations(tmp_path):
    (tmp_path / "list.json").write_text(json.dumps(
        [dict(image=f"{i}.jpg", caption=caption) for i, caption in enumerate(CAPTIONS)], indent=1
    ))  # fmt: skip
    (tmp_path / "lines.json").write_text("".join(
        json.dumps(dict(image=f"{i}.jpg", caption=caption)) + "\n" for i, caption in enumerate(CAPTIONS)
    ))  # fmt: skip
    sources = dict(
        tsv=(tsv(tmp_path / "cc3m.tsv"), "Google's TSV", "GCC_train_000000003.jpg"),
        list=(tmp_path / "list.json", "captions in JSON", "3.jpg"),
        lines=(tmp_path / "lines.json", "captions in JSON", "3.jpg"),
        files=(files(tmp_path / "files"), "img2dataset's files", "00000/000000003.jpg"),
        tars=(tars(tmp_path / "tars"), "img2dataset's tars", "000000003.jpg"),
    )
    conversations = []
    for name, (source, kind, image) in sources.items():
        chat, report = prepare(source, tmp_path / "out" / name)
        assert report["kind"] == kind and report["captions"] == dict(before=49, after=48)
        assert chat[3]["image"] == image and chat[3]["id"] == image.split("/")[-1].removesuffix(".jpg") + (
            ".jpg" if "captions" in kind else "")  # fmt: skip
        conversations.append([sample["conversations"] for sample in chat])
    assert all(turns == conversations[0] for turns in conversations)
    humans = [turns[0]["value"] for turns in conversations[0]]
    assert {tuple(turn["from"] for turn in turns) for turns in conversations[0]} == {("human", "gpt")}
    assert [turns[1]["value"] for turns in conversations[0]] == CAPTIONS[:-1]
    assert len(set(humans)) > 10  # of 8 requests and 2 places of the picture
    assert all(human.replace("<image>", "").strip() in data.REQUESTS for human in humans)
    assert 10 < sum(human.startswith("<image>\n") for human in humans) < 38


@pytest.mark.parametrize("kind", ["files", "tars"])
def test_training_reads_the_output(tmp_path, kind, tiny_tokenizer):
    source = files(tmp_path / "files") if kind == "files" else tars(tmp_path / "tars")
    prepare(source, tmp_path / "out")
    examples = data.Examples([tmp_path / "out" / "chat.json"])
    assert examples.kinds == ["LLaVA conversations"] and len(examples) == 48
    pictures = Pictures(source if kind == "files" else tmp_path / "out" / "images.zip")
    encoder = data.Encoder(tiny_tokenizer, 4, 28, pictures, 512)
    for i in (0, 47):
        sample = encoder.encode(examples[i])
        assert sample.pixels.shape == (3, 28, 28) and sample.green.any()
        assert pictures.read(examples[i].image) == picture(i)
        assert system_ids(tiny_tokenizer) + sample.ids.tolist() == tokenize(tiny_tokenizer, examples[i].turns, 4)[0].tolist()
    assert (tmp_path / "out" / "images.zip").exists() == (kind == "tars")


def test_the_report(tmp_path, capsys):
    dogs = ["a dog"] * 150 + [f"a dog near the {thing}" for thing in ("lake", "lake", "lake", "sea", "sea")]
    _, report = prepare(tsv(tmp_path / "cc3m.tsv", dogs + ["", "it is there"]), tmp_path / "out")
    assert report["skipped"] == {"without a caption": 1}
    assert report["captions"]["before"] == 156 and 100 <= report["captions"]["after"] <= 103
    assert report["phrases"]["before"] == 3
    rows = {row["captions"]: (row["before"], row["after"]) for row in report["histogram"]}
    assert rows["3 to 9"] == (1, 1) and rows["100 to 999"] == (1, 1) and rows["1 to 2"][0] == 1
    dog, lake, sea = report["most_frequent"]
    assert (dog["phrase"], dog["before"], dog["after"]) == ("dog", 155, report["captions"]["after"])
    assert (lake["phrase"], lake["before"], lake["after"], sea["phrase"]) == ("lake", 3, 3, "sea")
    printed = capsys.readouterr().out
    assert '"dog"' in printed and "3 to 9 captions" in printed and "skipped, without a caption: 1" in printed


def test_the_plot(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    source, out = tsv(tmp_path / "cc3m.tsv"), tmp_path / "out"
    prepare(source, out)
    assert Image.open(out / "report.png").size == (720, 480)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    prepare(source, out)
    assert not (out / "report.png").exists()  # the plot of the first run would be out of date
    assert "pip install matplotlib" in capsys.readouterr().out


def test_the_result_depends_on_the_seed_and_not_on_the_hash_seed(tmp_path):
    source = tsv(tmp_path / "cc3m.tsv", CAPTIONS * 20)
    for run, seed in enumerate([0, 0, 5]):
        prepare(source, tmp_path / str(run), "--seed", seed)
    flags = ["--data", source, "--out", tmp_path / "3", "--phrases", "simple"]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-m", "tools.prepare_cc3m", *map(str, flags)], check=True, cwd=ROOT,
                   env=environment, capture_output=True)  # fmt: skip
    first, second, other_seed, other_hash_seed = ((tmp_path / str(i) / "chat.json").read_bytes() for i in range(4))
    assert first == second == other_hash_seed != other_seed
    assert len(json.loads(first)) < len(CAPTIONS) * 20 - 20


def test_memory_does_not_hold_the_captions(tmp_path, monkeypatch):
    """The captions have 430 bytes and 4 phrases; the peak grows by about 100 bytes a caption."""
    monkeypatch.setattr(prepare_cc3m, "draw", lambda *arguments: None)
    rng, peaks = random.Random(0), []
    things = [f"thing{i}" for i in range(500)]
    for n in (1000, 4000):
        source = tsv(tmp_path / f"{n}.tsv", [" of ".join(rng.choices(things, k=4)) + " and" * 100 for _ in range(n)])
        flags = ["--data", str(source), "--out", str(tmp_path / str(n)), "--phrases", "simple"]
        tracemalloc.start()
        prepare_cc3m.prepare(prepare_cc3m.parse_arguments(flags))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 3000 < 200


# --- inputs that are skipped or refused


def test_lines_of_the_tsv(tmp_path):
    source = tmp_path / "cc3m.tsv"
    tsv(source, ["caption", "", "[a dog", "  ", *["a dog"] * 3])
    source.write_text("caption\turl\n" + source.read_text().replace("http://x.org/5.jpg\n", "http://x.org/5.jpg\r\n"))
    chat, report = prepare(source, tmp_path / "out")
    assert report["skipped"] == {"without a caption": 2} and report["captions"]["before"] == 5
    assert [sample["id"] for sample in chat] == [f"GCC_train_{i:09}" for i in (2, 4, 5, 6)]  # the heading has no number
    for bad in (b"a dog without a url\n", b"\xff\xfe\thttp://x.org\n"):
        source.write_bytes(b"a cat\thttp://x.org\n" * 3 + bad)
        with pytest.raises(UserError, match="line 4 is not caption<TAB>url"):
            prepare(source, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_samples_of_img2dataset_without_a_picture_or_caption(tmp_path):
    folder = files(tmp_path / "files", ["a dog"] * 8)
    shard = folder / "00000"
    (shard / "000000001.json").write_text(json.dumps(dict(caption="a dog", status="failed_to_download")))
    (shard / "000000002.jpg").unlink()
    (shard / "000000003.json").write_text(json.dumps(dict(caption="  ", status="success")))
    (shard / "000000004.json").unlink()  # its .txt remains
    (shard / "000000005.json").write_text(json.dumps(dict(caption="a dog", key="../../etc/x")))
    chat, report = prepare(folder, tmp_path / "out")
    assert report["skipped"] == {"not downloaded": 1, "without a picture": 1, "without a caption": 1}
    assert [sample["image"] for sample in chat] == [f"00000/00000000{i}.jpg" for i in (0, 4, 5, 6, 7)]
    for bad in ('{"caption": "a do', "[1]", "3"):
        (shard / "000000006.json").write_text(bad)
        with pytest.raises(UserError, match="files: 00000/000000006: its .json or .txt is damaged"):
            prepare(folder, tmp_path / "out")


def test_tars_that_are_damaged_or_name_a_picture_twice(tmp_path):
    folder = tars(tmp_path / "tars")
    intact = (folder / "00001.tar").read_bytes()
    with tarfile.open(folder / "00001.tar") as tar:
        third = tar.getmembers()[2].offset
    size, checksum = slice(third + 124, third + 136), slice(third + 148, third + 156)  # fields of the third header
    bad_checksum, negative_size = bytearray(intact), bytearray(intact)
    bad_checksum[checksum] = b"0000000\0"
    negative_size[size] = b"\xff" * 8 + (-(2**20)).to_bytes(4, "big", signed=True)
    negative_size[checksum] = b" " * 8  # how tar counts the field itself
    negative_size[checksum] = b"%06o\0 " % sum(negative_size[third : third + 512])
    compressed = b"\x1f\x8b" + intact
    for damaged in (b"", intact[:3000], intact[:third], bad_checksum, negative_size, compressed, b"x" * 5000):
        (folder / "00001.tar").write_bytes(damaged)
        with pytest.raises(UserError, match="00001.tar: damaged, or not an uncompressed tar"):
            prepare(folder, tmp_path / "out")
    (folder / "00001.tar").write_bytes((folder / "00000.tar").read_bytes())
    with pytest.raises(UserError, match="two pictures are named 000000000.jpg"):
        prepare(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    with tarfile.open(folder / "00001.tar", "w") as tar:
        for _ in range(3):
            for name, content in (("a/../...jpg", b"x"), ("a/../...txt", b"a red dog"),
                                  ("../x/../.jpg", b"x"), ("../x/../.txt", b"a red dog")):  # fmt: skip
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    chat, _ = prepare(folder, tmp_path / "out")  # names without a stem
    assert all("/" not in sample["image"] and ".." not in sample["image"] for sample in chat)


def test_inputs_without_usable_captions(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.tsv").write_bytes(b"")
    (tmp_path / "words.tsv").write_text("it is there\thttp://x.org\n")
    (tmp_path / "blank.tsv").write_text("\thttp://x.org\n" * 3)
    (tmp_path / "rare.tsv").write_text("a dog\thttp://x.org\n")
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]
    (tmp_path / "chat.json").write_text(json.dumps([dict(conversations=turns)]))
    (tmp_path / "out.json").write_text('[{"image": "../x.jpg", "caption": "a dog"}]')
    for name, message in {"nothing": "cannot be read", "empty": "expected the output of img2dataset",
                          "empty.tsv": "no noun phrase in its 0 captions", "words.tsv": "no noun phrase in its 1",
                          "blank.tsv": "in its 0 captions; 3 records skipped: without a caption",
                          "rare.tsv": "lower --at-least", "chat.json": "holds LLaVA conversations",
                          "out.json": "not a path inside the picture folder"}.items():  # fmt: skip
        with pytest.raises(UserError, match=message):
            prepare(tmp_path / name, tmp_path / "new")
    with pytest.raises(UserError, match="--at-most: 0: expected a whole number of 1 or more"):
        prepare(tmp_path / "rare.tsv", tmp_path / "new", "--at-most", 0)
    with pytest.raises(UserError, match="--seed: -1: expected a whole number of 0 or more"):
        prepare(tmp_path / "rare.tsv", tmp_path / "new", "--seed", -1)
    assert not (tmp_path / "new").exists()


def test_only_its_own_output_is_overwritten(tmp_path):
    source, out = tars(tmp_path / "tars"), tmp_path / "out"
    prepare(source, out)
    assert (out / "images.zip").exists()
    prepare(tsv(tmp_path / "cc3m.tsv"), out)
    assert not (out / "images.zip").exists()  # the pictures of the first run
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".chat.json.tmp").write_text("left by a killed run")
    prepare(source, tmp_path / "other")
    for name, content in (("notes.txt", ""), ("chat.json", "[]"), ("report.json", "{}")):
        (tmp_path / name[0]).mkdir()
        (tmp_path / name[0] / name).write_text(content)
        with pytest.raises(UserError, match="already exists and was not written by tools.prepare_cc3m"):
            prepare(source, tmp_path / name[0])
        assert (tmp_path / name[0] / name).read_text() == content
    with pytest.raises(UserError, match="already exists and was not written by tools.prepare_cc3m"):
        prepare(source, source)


def test_an_input_that_changes_between_the_passes(tmp_path, monkeypatch):
    source, select = tsv(tmp_path / "cc3m.tsv"), prepare_cc3m.select_balanced

    def select_and_change(*arguments):
        tsv(source, CAPTIONS[:9])
        return select(*arguments)

    monkeypatch.setattr(prepare_cc3m, "select_balanced", select_and_change)
    with pytest.raises(UserError, match="held 49 captions in the first pass and 9 in the second"):
        prepare(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


# --- spaCy


def test_the_error_without_spacy_names_the_remedy(tmp_path, monkeypatch):
    source = tsv(tmp_path / "cc3m.tsv")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match="pip install spacy.*python -m spacy download en_core_web_sm.*--phrases simple"):
        prepare(source, tmp_path / "out", "--phrases", "spacy")

    def load(name, exclude):
        raise OSError("[E050] Can't find model")

    monkeypatch.setitem(sys.modules, "spacy", SimpleNamespace(load=load))
    with pytest.raises(UserError, match="python -m spacy download en_core_web_sm"):
        prepare(source, tmp_path / "out", "--phrases", "spacy")


def test_noun_chunks_of_spacy_become_phrases(tmp_path, monkeypatch):
    class Pipeline:
        meta = dict(version="3.8.0")

        def pipe(self, texts, n_process, batch_size):
            assert n_process == 2
            for text in texts:
                yield SimpleNamespace(noun_chunks=[SimpleNamespace(text=part) for part in text.split(" near ")])

    stub = SimpleNamespace(load=lambda name, exclude: Pipeline(), __version__="3.8.7")
    monkeypatch.setitem(sys.modules, "spacy", stub)
    source = tsv(tmp_path / "cc3m.tsv", ["The red Dog near it", "a red dog near all - those Trees", "Red dog near him"])
    _, report = prepare(source, tmp_path / "out", "--phrases", "spacy", "--processes", 2)
    assert report["phrases_by"] == "spaCy 3.8.7, en_core_web_sm 3.8.0"
    assert [(row["phrase"], row["before"]) for row in report["most_frequent"]] == [("red dog", 3), ("trees", 1)]


def test_spacy_with_one_and_two_processes(tmp_path):
    spacy = pytest.importorskip("spacy")
    if not spacy.util.is_package("en_core_web_sm"):
        pytest.skip("needs spaCy's model en_core_web_sm")
    source, outputs = tsv(tmp_path / "cc3m.tsv", CAPTIONS * 20), []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        _, report = prepare(source, out, "--phrases", "spacy", "--processes", processes)
        outputs.append((out / "chat.json").read_bytes())
        assert {"garden", "street", "red dog"} <= {row["phrase"] for row in report["most_frequent"]}
    assert outputs[0] == outputs[1]
