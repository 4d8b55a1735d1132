"""eval_scienceqa.py: the letter of an answer, the table, answers (batched, shared, interrupted), wrong input.

The model is a tiny random one in a run directory of its own; the published answers are scored too.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import ROOT, SHARED, write_quiz
from PIL import Image

import checkpoint
import eval_scienceqa
from common import UserError
from conversation import TEMPLATE, answer_text, has_ended, tokenize
from data import SCIENCEQA_PROMPT, Encoder, Example, scienceqa_question
from eval_scienceqa import ask
from formats.pictures import Pictures
from formats.records import read_scienceqa
from model import LLaMA, LLaMAConfig, Projection
from vision import VisionConfig, VisionTransformer

PUBLISHED = SHARED / "scienceqa"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PATIENCE = 120  # seconds that a started process may take


def tiny_run(folder: Path, stage: int = 2) -> Path:
    """Writes a run directory of a tiny random model whose tokenizer has byte pieces, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    words = (
        "Which thing is at the left? Context: N/A Options: (A) red (B) blue ### Human: ### Assistant: The answer is B."
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words, "# ##"] * 20), model_prefix=str(folder / "tokenizer"), vocab_size=330,
        model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    llama = LLaMA(LLaMAConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=vocab_size))
    vision = VisionTransformer(VisionConfig(image_size=32, patch_size=8, width=64, layers=2), feature_layer=-1)
    for p in [*llama.parameters(), *vision.parameters()]:
        torch.nn.init.normal_(p, std=0.4 if p.dim() > 1 else 1.0)
    torch.save({f"visual.{name}": p for name, p in vision.state_dict().items()}, folder / "vit.pt")
    config = dict(stage=stage, template=TEMPLATE, prompt=SCIENCEQA_PROMPT, precision="fp32", feature_layer=-2,
                  settings={"task": "scienceqa", "max_length": 2048})  # fmt: skip
    trained = {"projector.weight": Projection(64, 32).weight.detach()}
    weights = {name: p.detach() for name, p in llama.named_parameters()}
    if stage == 1:
        checkpoint.save_llama(llama.config, weights, folder / "llama")
        shutil.copy(folder / "tokenizer.model", folder / "llama")
        config["llama"] = str(folder / "llama")
    else:
        trained |= {f"llama.{name}": p for name, p in weights.items()}
    checkpoint.save_run(folder / "run", llama.config, trained, config, folder / "vit.pt", folder / "tokenizer.model")
    return folder / "run"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def quiz(tmp_path_factory):
    """A ScienceQA folder of 26 problems of all categories and many lengths; every third has a picture."""

    def vary_lengths(problems):
        for i, problem in enumerate(problems.values()):
            problem["question"] = f"Which thing is {'far ' * (7 * i % 11)}at the left?"

    splits = {"two": ["100", "101"], "empty": [], "lost": ["7"]}
    return write_quiz(tmp_path_factory.mktemp("quiz"), vary_lengths, splits)


def evaluate(*arguments):
    """Calls eval_scienceqa.main() with these arguments."""
    argv = sys.argv
    sys.argv = ["eval_scienceqa.py", *map(str, arguments)]
    try:
        eval_scienceqa.main()
    finally:
        sys.argv = argv


def refused(*arguments) -> str:
    with pytest.raises(UserError) as error:
        evaluate(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.fixture(scope="session")
def alone(run, quiz, tmp_path_factory):
    """The file that one process writes, eight questions at a time."""
    out = tmp_path_factory.mktemp("alone") / "answers.json"
    evaluate("--model", run, "--data", quiz, "--batch-size", 8, "--max-new-tokens", 12, "--out", out)
    return out


# --- letters and scores


@pytest.mark.parametrize("text, index", [
    ("B", 1), ("B. Blue", 1), ("It is so. The answer is C.", 2), ("Assistant: SOLUTION: so\n The answer is A.", 0),
    ("The answer is B, it is", 1), ("The answer is Blue.", 1), ("The answer is A because of B.", 0),
    ("Z. The answer is B.", 1), ("B The answer is C.", 2), ("A. The answer is B.", 0),
    ("", -1), ("b", -1), ("B.", -1), ("Blue", -1), ("The answer is B", -1), ("the answer is B.", -1), ("AB", -1),
    ("(B)", -1), ("B\n", -1), (" B", -1), ("B.\nBlue", -1), ("The answer is B\n", -1),
    ("The answer is A. The answer is B.", -1), ("The answer is A. The answer is A.", -1),
    ("D", -1), ("D. The answer is B.", -1), ("The answer is D.", -1), ("É", -1), ("1", -1),
])  # fmt: skip
def test_letter(text, index):
    assert eval_scienceqa.letter(text, 3) == index


def test_scores_of_the_published_answers_equal_an_independent_count(tmp_path):
    if not PUBLISHED.is_dir():
        pytest.skip(f"{PUBLISHED} is absent")
    out = tmp_path / "scored.json"
    evaluate("--predictions", PUBLISHED / "llava_13b_v0_outputs.json", "--data", PUBLISHED, "--out", out)
    result, outputs, problems = (
        read(path) for path in (out, PUBLISHED / "llava_13b_v0_outputs.json", PUBLISHED / "problems.json")
    )
    # Each of the 60 answers ends with its letter.
    chosen = {id: "ABCDE".index(text[-2]) for id, text in outputs.items() if text[-16:-2] == "The answer is "}
    assert len(chosen) == 60 and result["results"] == chosen and result["unparsed"] == 0 and result["count"] == 60

    def percent(condition):
        hits = [chosen[id] == problems[id]["answer"] for id in chosen if condition(problems[id])]
        return pytest.approx(100 * sum(hits) / len(hits))

    expected = dict(
        zip(("NAT", "SOC", "LAN"), (percent(lambda p: p["subject"].startswith(s)) for s in ("nat", "soc", "lan")))
    )
    expected |= {"TXT": percent(lambda p: p["hint"] != ""), "IMG": percent(lambda p: p["image"] is not None),
                 "NO": percent(lambda p: p["hint"] == "" and p["image"] is None),
                 "G1-6": percent(lambda p: p["grade"] in [f"grade{i}" for i in range(1, 7)]),
                 "G7-12": percent(lambda p: p["grade"] in [f"grade{i}" for i in range(7, 13)]),
                 "Avg": percent(lambda p: True)}  # fmt: skip
    assert result["scores"] == expected and result["acc"] == expected["Avg"] and result["outputs"] == outputs


def test_missing_and_unknown_answers_are_counted(quiz, tmp_path, capsys):
    answers = {id: f"So. The answer is {'ABC'[p['answer']]}." for id, p in read(quiz / "problems.json").items()}
    answers |= {"100": "who knows", "101": "The answer is A. The answer is B.", "7": "A", "8": "B"}
    for id in ("102", "103"):
        del answers[id]
    (tmp_path / "given.json").write_text(json.dumps(answers))
    evaluate("--predictions", tmp_path / "given.json", "--data", quiz)
    printed = capsys.readouterr().out
    assert "22 of 26 right; 4 unparsed: 2 answers name no offered choice, 2 questions have no answer" in printed
    assert f"26 answers of {tmp_path / 'given.json'}" in printed
    result = read(tmp_path / "given_scored.json")
    assert [result[k] for k in ("correct", "count", "unparsed")] == [22, 26, 4] and result["acc"] == pytest.approx(
        2200 / 26
    )
    assert [result["results"][id] for id in ("100", "101", "102", "104")] == [-1, -1, -1, 0] and "102" not in result[
        "outputs"
    ]
    # The file that it wrote can be scored, with the same result.
    evaluate("--predictions", tmp_path / "given_scored.json", "--data", quiz, "--out", tmp_path / "again.json")
    assert read(tmp_path / "again.json") == result


def test_the_originals_answers_are_scored(quiz, tmp_path):
    """JSON lines, also with a BOM, as some editors write."""
    lines = [json.dumps({"question_id": id, "prompt": "...", "text": f"So. The answer is {letter}.", "answer_id": "x",
                         "model_id": "m", "metadata": {}}) for id, letter in (("100", "A"), ("101", "A"))]  # fmt: skip
    for i, bom in enumerate(("", "\ufeff")):
        (tmp_path / f"given{i}.jsonl").write_text(bom + "\n".join(lines) + "\n")
        (tmp_path / f"plain{i}.json").write_text(bom + '{"100": "A", "101": "A"}')
        for name in (f"given{i}.jsonl", f"plain{i}.json"):
            evaluate("--predictions", tmp_path / name, "--data", quiz, "--split", "two")
            result = read((tmp_path / name).with_name(f"{name[:6]}_scored.json"))
            assert result["results"] == {"100": 0, "101": 0} and result["correct"] == 1 and result["unparsed"] == 0
    assert result["outputs"]["100"] == "A"


def test_empty_categories_are_dashes(quiz, tmp_path, capsys):
    (tmp_path / "given.json").write_text(
        json.dumps({"100": "A", "101": "A"})
    )  # natural and social science, grades 1, 2
    evaluate("--predictions", tmp_path / "given.json", "--data", quiz, "--split", "two")
    names, percents = (re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[2:4])
    assert names == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]
    assert percents[1:] == ["100.00", "0.00", "-", "0.00", "100.00", "-", "50.00", "-", "50.00"]
    assert read(tmp_path / "given_scored.json")["scores"]["LAN"] is None


def test_a_grade_of_too_many_digits_is_ignored():  # Python refuses to convert such a number
    problem = {"hint": "", "image": None, "subject": "natural science"}
    assert eval_scienceqa.categories(problem | {"grade": "grade" + "1" * 5000}) == ["NAT", "NO", "Avg"]
    assert eval_scienceqa.categories(problem | {"grade": "grade12"}) == ["NAT", "NO", "G7-12", "Avg"]


# --- answers


def test_every_question_is_answered_in_the_order_of_the_split(alone, quiz):
    result, ids = read(alone), read(quiz / "pid_splits.json")["test"]
    assert list(result["outputs"]) == list(result["results"]) == ids and result["count"] == len(ids)
    assert len(set(result["outputs"].values())) > 13  # the answers depend on the questions
    assert sorted(p.name for p in alone.parent.iterdir()) == ["answers.html", "answers.json"]


def test_the_batch_size_changes_no_answer(alone, run, quiz, tmp_path):
    evaluate(
        "--model", run, "--data", quiz, "--batch-size", 1, "--max-new-tokens", 12, "--out", tmp_path / "answers.json"
    )
    assert read(tmp_path / "answers.json") == read(alone)


def test_an_answer_is_that_of_the_full_prompt_alone(alone, run, quiz):
    """System message, picture and question as one sequence, without a shared system message."""
    model, sp, _ = checkpoint.load_run(run)
    encoder, outputs = Encoder(sp, 16, 32, Pictures(quiz)), read(alone)["outputs"]
    for p in read_scienceqa(quiz, "test")[0][2:4]:  # without a picture, and with one
        ids, _ = tokenize(sp, [scienceqa_question(p)], 16 if p["image_path"] else 0)
        sample = encoder.encode(Example(p["id"], [scienceqa_question(p)], p["image_path"]))
        pixels = (
            torch.from_numpy(sample.pixels[None]) if p["image_path"] else torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
        )
        *_, [answer] = model.generate(torch.from_numpy(ids), [0, len(ids)], pixels, partial(has_ended, sp), 12)
        assert answer_text(sp, answer) == outputs[p["id"]] != ""


def test_the_longest_prompts_come_first(run, quiz, tmp_path, monkeypatch):
    """Then a lack of memory shows at once."""
    asked, original = [], eval_scienceqa.ask

    def record(model, encoder, prompts, *arguments):
        asked.append([len(encoder.encode(prompt).ids) for prompt in prompts])
        return original(model, encoder, prompts, *arguments)

    monkeypatch.setattr(eval_scienceqa, "ask", record)
    evaluate(
        "--model", run, "--data", quiz, "--batch-size", 8, "--max-new-tokens", 1, "--out", tmp_path / "answers.json"
    )
    lengths = sum(asked, [])
    assert [len(batch) for batch in asked] == [8, 8, 8, 2] and lengths == sorted(lengths, reverse=True)


def test_stop_ends_an_answer_in_whatever_pieces_it_is_spelled(run, monkeypatch):
    model, sp, _ = checkpoint.load_run(run)
    tokens = iter([sp.piece_to_id(f"<0x{byte:02X}>") for byte in b"red\n###x"])
    monkeypatch.setattr("model.choose", lambda logits, *_: [next(tokens)] * len(logits))
    assert ask(model, Encoder(sp, 16, 32), [Example("1", ["Which?"])], 99) == ["red"]
    assert len(list(tokens)) == 1


def test_eos_ends_an_answer(run, monkeypatch):
    """So do models end that were trained with the template of Vicuna 1.1."""
    model, sp, _ = checkpoint.load_run(run)
    tokens = iter([*sp.encode(" red"), sp.eos_id(), *sp.encode(" blue")])
    monkeypatch.setattr("model.choose", lambda logits, *_: [next(tokens)] * len(logits))
    assert ask(model, Encoder(sp, 16, 32), [Example("1", ["Which?"]), Example("2", ["What?"])], 99) == ["red"] * 2


def test_pictures_change_the_answers(alone, run, quiz, tmp_path):
    shutil.copytree(quiz, tmp_path / "quiz")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "quiz/images/test/100/image.png")
    evaluate(
        "--model",
        run,
        "--data",
        tmp_path / "quiz",
        "--split",
        "two",
        "--max-new-tokens",
        12,
        "--out",
        tmp_path / "out.json",
    )
    before, after = (read(path)["outputs"] for path in (alone, tmp_path / "out.json"))
    assert after["100"] != before["100"] and after["101"] == before["101"]


def test_swapped_pictures_are_those_of_the_next_problem(alone, run, quiz, tmp_path):
    with_picture = [id for id, p in read(quiz / "problems.json").items() if p["image"]]
    shutil.copytree(quiz, tmp_path / "moved")
    for id, other in zip(with_picture, with_picture[1:] + with_picture[:1]):
        shutil.copy(quiz / f"images/test/{other}/image.png", tmp_path / f"moved/images/test/{id}/image.png")
    outs = tmp_path / "swapped.json", tmp_path / "moved.json"
    for out, *flags in ((outs[0], "--data", quiz, "--swap-pictures"), (outs[1], "--data", tmp_path / "moved")):
        evaluate("--model", run, *flags, "--batch-size", 8, "--max-new-tokens", 12, "--out", out)
    swapped, moved, true = (read(path)["outputs"] for path in (*outs, alone))
    assert swapped == moved and {id for id in true if swapped[id] != true[id]} - set(with_picture) == set()
    assert sum(swapped[id] != true[id] for id in with_picture) > 4


# --- several processes, interruption


def interrupted(monkeypatch, flags, error):
    """Evaluates, and raises the error in place of the second batch."""
    calls, original = [], eval_scienceqa.ask

    def ask_once(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(eval_scienceqa, "ask", ask_once)
        with pytest.raises(type(error)):
            evaluate(*flags)


def test_an_interrupted_evaluation_continues_to_the_same_file(alone, run, quiz, tmp_path, capsys, monkeypatch):
    """A line that a kill cut off is dropped, and damages no other; lines of another fingerprint do not count."""
    out, partial = tmp_path / "answers.json", tmp_path / "answers.json.partial"
    flags = ("--model", run, "--data", quiz, "--batch-size", 8, "--max-new-tokens", 12, "--out", out)
    partial.write_text('["0123456789abcdef", {"125": "of another model"}]\n')
    interrupted(monkeypatch, flags, KeyboardInterrupt())
    key, first = json.loads(partial.read_text().splitlines()[-1])
    assert len(first) == 8 and not out.exists()
    changed = min(first)
    first[changed] = "A"
    partial.write_text(json.dumps([key, first]) + f'\n["{key}", {{"12')
    interrupted(monkeypatch, flags, KeyboardInterrupt())
    assert "8 of 26 questions were answered before" in capsys.readouterr().out
    evaluate(*flags)
    assert "16 of 26 questions were answered before" in capsys.readouterr().out
    assert read(out)["outputs"] == read(alone)["outputs"] | {changed: "A"} and not partial.exists()


# In each process: evaluates with the first --out. Then evaluates with the second, and is killed after its first batch,
# when the other has completed its own.
TWICE = f"""
import os, pathlib, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import eval_scienceqa
from distributed import processes

append_lines = eval_scienceqa.append_lines

def append_and_die(path, lines):
    append_lines(path, lines)
    if any(lines):
        while path.read_text().count("[") < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

outs, arguments = sys.argv[1:3], sys.argv[3:]
first = eval_scienceqa.parse_arguments([*arguments, "--batch-size", "8", "--out", outs[0]])
second = eval_scienceqa.parse_arguments([*arguments, "--batch-size", "4", "--out", outs[1]])
with processes() as joined:
    eval_scienceqa.evaluate(first, *joined)
    eval_scienceqa.append_lines = append_and_die
    eval_scienceqa.evaluate(second, *joined)
"""


def test_two_processes_write_the_same_and_one_continues_what_two_began(alone, run, quiz, tmp_path, capsys):
    out, killed = tmp_path / "answers.json", tmp_path / "killed/answers.json"
    (tmp_path / "twice.py").write_text(TWICE)
    flags = ("--model", run, "--data", quiz, "--max-new-tokens", 12)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(tmp_path / "twice.py"), out, killed, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode != 0 and out.is_file(), done.stderr
    assert out.read_bytes() == alone.read_bytes() and out.with_suffix(".html").is_file()
    assert done.stdout.count("% right") == 1 and not list(tmp_path.glob("*.partial"))

    assert len(list(killed.parent.iterdir())) == 1 and not killed.exists()
    evaluate(*flags, "--batch-size", 4, "--out", killed)
    assert "8 of 26 questions were answered before" in capsys.readouterr().out
    assert read(killed)["outputs"] == read(alone)["outputs"] and not list(killed.parent.glob("*.partial"))


def test_the_key_covers_model_questions_and_settings(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    args = argparse.Namespace(model=tmp_path / "run", max_new_tokens=12)
    prompts = [Example("1", ["<image>\nWhich?"], "a.png"), Example("2", ["What?"])]
    keys = {eval_scienceqa.partial_key(args, prompts)}
    assert eval_scienceqa.partial_key(args, list(prompts)) in keys

    def assert_new(prompts):
        key = eval_scienceqa.partial_key(args, prompts)
        assert key not in keys
        keys.add(key)

    assert_new([prompts[0], Example("2", ["Who?"])])
    assert_new([Example("1", ["<image>\nWhich?"], "b.png"), prompts[1]])
    args.max_new_tokens = 13
    assert_new(prompts)
    torch.save({"weight": torch.zeros(32, 64)}, args.model / "projector.pth")
    assert_new(prompts)


# --- wrong input


def test_refusals(run, quiz, tmp_path):
    two = ("--data", quiz, "--split", "two", "--out", tmp_path / "out.json")

    def with_predictions(text):
        (tmp_path / "given.json").write_text(text)
        return refused("--predictions", tmp_path / "given.json", *two)

    assert "answer to '100' is 3" in with_predictions('{"100": 3}')
    (tmp_path / "given.jsonl").write_text('{"question_id": "100", "text": "A"}\n{"question_id": "101"}\n')
    assert "answer to '101' is None" in refused("--predictions", tmp_path / "given.jsonl", *two)
    assert "answer to '101' is None" in with_predictions('{"outputs": {"101": null}}')
    assert "expected a list of JSON objects" in with_predictions('["A"]') and "line 1 column 12" in with_predictions('{"100": "A"')
    (tmp_path / "given.json").write_text('{"100": "A"}')
    same = ("--predictions", tmp_path / "given.json", "--out", tmp_path / "given.json")
    assert "must name an earlier evaluation" in refused(*same, "--data", quiz)
    assert "not allowed with argument --predictions" in refused(*same[:2], "--data", quiz, "--swap-pictures")
    assert "cannot be read" in refused("--predictions", tmp_path / "absent.json", *two)
    assert "split 'dev'; it has test, two, empty and 1 more" in refused("--data", quiz, "--split", "dev")
    assert "problem '7' of split 'lost'" in refused("--data", quiz, "--split", "lost")
    assert "split 'empty'" in refused("--data", quiz, "--split", "empty")
    assert "problems.json" in refused("--model", tmp_path, "--data", tmp_path / "nowhere")
    blocked = refused("--model", run, "--data", quiz, "--out", quiz / "problems.json" / "out.json")
    assert "problems.json/out.json.partial: could not be written" in blocked
    for flag in ("--batch-size", "--max-new-tokens"):
        assert f"{flag}: 0: expected a whole number of 1 or more" in refused(flag, 0)
    (tmp_path / "mine.json").write_text('{"a": 1}')
    (tmp_path / "page.html").write_text("mine")
    for out in ("mine.json", "new.html", "page.json"):
        assert "must name an earlier evaluation" in refused("--model", run, *two[:-1], tmp_path / out)
    (tmp_path / "list.json").write_text("[]")
    assert "list.json: holds a JSON list" in refused("--model", run, *two[:-1], tmp_path / "list.json")
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}'
    missing = refused("--model", tmp_path / "nowhere", *two)
    assert "train it first: torchrun train.py --stage 2 --task scienceqa --out" in missing
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "out.json").exists()


def test_unfit_runs_are_refused(run, quiz, tmp_path):
    two = ("--data", quiz, "--split", "two", "--out", tmp_path / "out.json")
    shutil.copytree(run, tmp_path / "half")
    (tmp_path / "half/projector.pth").unlink()
    assert "unfinished" in refused("--model", tmp_path / "half", *two)
    config = read(run / "config.json")
    for change, reason in (({"stage": 1}, "trained with stage 1, expected 2; use a run of: torchrun train.py --stage"),
                           ({"template": "vicuna_v1"}, "template 'vicuna_v1', expected 'vicuna_v0'"),
                           ({"prompt": "QCM-ALE"}, "prompt 'QCM-ALE', expected 'QCM-LEA'")):  # fmt: skip
        shutil.copytree(run, tmp_path / "unfit", dirs_exist_ok=True)
        (tmp_path / "unfit/config.json").write_text(json.dumps(config | change))
        assert reason in refused("--model", tmp_path / "unfit", *two)
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_of_another_task_is_announced(run, quiz, tmp_path, capsys):
    chatbot = shutil.copytree(run, run.parent / "chat", dirs_exist_ok=True)
    (chatbot / "config.json").write_text(json.dumps(read(run / "config.json") | {"settings": {"task": "chat"}}))
    for path in (chatbot, run):
        evaluate("--model", path, "--data", quiz, "--split", "two", "--max-new-tokens", 1, "--out", tmp_path / "out.json")
        _, first, *_ = capsys.readouterr().out.splitlines()  # after "loading ..."
        assert first.startswith(f"{chatbot} was trained for chat, not for ScienceQA") == (path == chatbot)


def test_absent_and_broken_pictures(run, quiz, tmp_path, capsys):
    shutil.copytree(quiz, tmp_path / "quiz")
    flags = ("--model", run, "--data", tmp_path / "quiz", "--max-new-tokens", 2, "--out", tmp_path / "out.json")
    picture = tmp_path / "quiz/images/test/100/image.png"
    picture.write_bytes(picture.read_bytes()[:60])
    assert "picture images/test/100/image.png: not a readable picture" in refused(*flags)
    picture.unlink()
    assert re.search("1 .*pictures are absent", refused(*flags))
    evaluate(*flags, "--missing-pictures-as-text")
    assert "1 pictures absent" in capsys.readouterr().out
    assert read(tmp_path / "out.json")["count"] == 26


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["eval_scienceqa.py", "--predictions", str(tmp_path / "absent.json"), "--data", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as end:  # Python prints a text to stderr and exits with 1
        runpy.run_path(str(ROOT / "eval_scienceqa.py"), run_name="__main__")
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code and capsys.readouterr().out == ""
