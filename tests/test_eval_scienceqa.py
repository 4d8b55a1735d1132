"""eval_scienceqa.py: the parse rule, the table, answering (batched, shared, interrupted), the page, bad input.

The model is a tiny random one in a run directory of its own; the answers scored are also the published ones.
"""

import base64
import html
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import torch
from PIL import Image

import checkpoint
import eval_scienceqa
from conversation import TEMPLATE, UserError, stop_ids, surface
from data import SCIENCEQA_PROMPT, Encoder, Example, Pictures, ask, scienceqa_question
from model import LLaMA, LLaMAConfig
from vision import VisionConfig, VisionTransformer

ROOT = Path(__file__).parent.parent
PUBLISHED = ROOT.parent / "shared" / "data" / "scienceqa"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = (
    '</script><img src="http://127.0.0.1:9/spy" onerror="document.title=1"><script>document.title=2</script>{{data}}{{title}}'
)


def tiny_run(folder: Path, stage: int = 2, **changes) -> Path:
    """A run directory of a tiny random model with a tokenizer of 400 pieces, bytes among them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    words = "Which thing is at the left? Context: N/A Options: (A) red (B) blue ### Human: ### Assistant: The answer is B."
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([words, "# ##"] * 20), model_prefix=str(folder / "tokenizer"), vocab_size=330, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).vocab_size()
    llama = LLaMA(LLaMAConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=48, vocab_size=vocab_size))
    vision = VisionTransformer(VisionConfig(image_size=32, patch_size=8, width=64, layers=2), feature_layer=-2)
    for p in [*llama.parameters(), *vision.parameters()]:
        torch.nn.init.normal_(p, std=0.4 if p.dim() > 1 else 1.0)
    full = VisionTransformer(VisionConfig(image_size=32, patch_size=8, width=64, layers=2), feature_layer=-1)
    torch.save({f"visual.{n}": t for n, t in (full.state_dict() | vision.state_dict()).items()}, folder / "vit.pt")
    config = dict(vision=str(folder / "vit.pt"), template=TEMPLATE, prompt=SCIENCEQA_PROMPT, precision="fp32",
                  settings={"task": "scienceqa", "max_length": 2048}, **changes)  # fmt: skip
    if stage == 1:
        checkpoint.save_llama(llama, folder / "llama")
        shutil.copy(folder / "tokenizer.model", folder / "llama")
        config["llama"] = str(folder / "llama")
    checkpoint.save_run(folder / "run", checkpoint.build(llama, vision), config, folder / "tokenizer.model", stage)
    return folder / "run"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def quiz(tmp_path_factory):
    """26 problems of all categories and many lengths, every third with a picture; one of them is hostile."""
    folder = tmp_path_factory.mktemp("quiz")
    problems = {}
    for i in range(26):
        id = str(100 + i)
        problems[id] = dict(
            question=f"Which thing is {'far ' * (7 * i % 11)}at the left?", hint="blue is red" if i % 2 else "",
            choices=["red", "blue", "it lives here"][: 2 + i % 2], answer=i % 2,
            image="image.png" if i % 3 == 0 else None, split="test", grade=f"grade{i % 12 + 1}",
            subject=["natural science", "social science", "language science"][i % 3],
            lecture="Things have a colour.", solution="It is so.")  # fmt: skip
        if i % 3 == 0:
            (folder / f"images/test/{id}").mkdir(parents=True)
            picture = Image.linear_gradient("L").rotate(14 * i).resize((400 if i == 3 else 40, 40))
            picture.save(folder / f"images/test/{id}/image.png")
    problems["101"] |= dict(question=HOSTILE, choices=[HOSTILE, "<b>blue</b>"], hint=HOSTILE, lecture=HOSTILE)
    (folder / "problems.json").write_text(json.dumps(problems))
    splits = {"test": list(problems), "few": ["100", "101"], "none": [], "lost": ["7"]}
    (folder / "pid_splits.json").write_text(json.dumps(splits))
    return folder


def evaluate(*arguments):
    """eval_scienceqa.main() with these arguments, without its signal handler left behind."""
    handler, argv = signal.getsignal(signal.SIGTERM), sys.argv
    sys.argv = ["eval_scienceqa.py", *map(str, arguments)]
    try:
        eval_scienceqa.main()
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)


def refused(*arguments) -> str:
    with pytest.raises(UserError) as error:
        evaluate(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def command(*arguments, processes=0):
    """eval_scienceqa.py as a user starts it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    return [sys.executable, *launcher, "eval_scienceqa.py", *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def alone(run, quiz, tmp_path_factory):
    """What one process writes, eight questions at a time."""
    out = tmp_path_factory.mktemp("alone") / "answers.json"
    evaluate("--model", run, "--data", quiz, "--batch-size", 8, "--max-new-tokens", 12, "--out", out)
    return out


# --- the parse rule and the score


@pytest.mark.parametrize("text, index", [
    ("B", 1), (" B\n", 1), ("B. Blue", 1), ("It is so. The answer is C.", 2), ("Assistant: SOLUTION: so\n The answer is A.", 0),
    ("", -1), ("b", -1), ("B.", -1), ("Blue", -1), ("The answer is B", -1), ("the answer is B.", -1), ("AB", -1), ("(B)", -1),
    ("The answer is Blue.", -1), ("The answer is A. The answer is B.", -1), ("The answer is A. The answer is A.", -1),
    ("D", -1), ("D. Dogs", -1), ("The answer is D.", -1), ("Z. The answer is B.", -1), ("É", -1), ("1", -1),
])  # fmt: skip
def test_letter(text, index):
    assert eval_scienceqa.letter(text, 3) == index


def test_published_answers_score_as_an_independent_reckoning(tmp_path):
    if not PUBLISHED.is_dir():
        pytest.skip("the published answers are not here")
    out = tmp_path / "scored.json"
    evaluate("--predictions", PUBLISHED / "llava_13b_v0_outputs.json", "--data", PUBLISHED, "--out", out)
    result = json.loads(out.read_text())
    outputs = json.loads((PUBLISHED / "llava_13b_v0_outputs.json").read_text())
    problems = json.loads((PUBLISHED / "problems.json").read_text())
    # All 60 end in their letter; so the last sentence tells the choice.
    chosen = {id: "ABCDE".index(text[-2]) for id, text in outputs.items() if text[-16:-2] == "The answer is "}
    assert len(chosen) == 60 and result["results"] == chosen and result["unparsed"] == 0 and result["count"] == 60

    def percent(condition):
        hits = [chosen[id] == problems[id]["answer"] for id in chosen if condition(problems[id])]
        return pytest.approx(100 * sum(hits) / len(hits))

    expected = dict(zip(("NAT", "SOC", "LAN"), (percent(lambda p: p["subject"].startswith(s)) for s in ("nat", "soc", "lan"))))
    expected |= {"TXT": percent(lambda p: p["hint"] != ""), "IMG": percent(lambda p: p["image"] is not None),
                 "NO": percent(lambda p: p["hint"] == "" and p["image"] is None),
                 "G1-6": percent(lambda p: p["grade"] in [f"grade{i}" for i in range(1, 7)]),
                 "G7-12": percent(lambda p: p["grade"] in [f"grade{i}" for i in range(7, 13)]),
                 "Avg": percent(lambda p: True)}  # fmt: skip
    assert result["scores"] == expected and result["acc"] == expected["Avg"] and result["outputs"] == outputs


def test_missing_answers_and_strangers_are_counted(quiz, tmp_path, capsys):
    problems = json.loads((quiz / "problems.json").read_text())
    said = {id: f"So. The answer is {'ABC'[p['answer']]}." for id, p in problems.items()}
    said |= {"100": "who knows", "101": HOSTILE, "7": "A", "8": "B"}
    for id in ("102", "103"):
        del said[id]
    (tmp_path / "said.json").write_text(json.dumps(said))
    evaluate("--predictions", tmp_path / "said.json", "--data", quiz)
    table = capsys.readouterr().out
    assert "22 of 26 right; 4 unparsed" in table and "2 of the questions have no answer" in table
    assert "2 of the answers are not to questions of split test" in table
    result = json.loads((tmp_path / "said_scored.json").read_text())
    assert [result[k] for k in ("correct", "count", "unparsed")] == [22, 26, 4] and result["acc"] == pytest.approx(2200 / 26)
    assert [result["results"][id] for id in ("100", "101", "102", "104")] == [-1, -1, -1, 0] and "102" not in result["outputs"]
    # Scored again in the form that it wrote: the same.
    evaluate("--predictions", tmp_path / "said_scored.json", "--data", quiz, "--out", tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == result


def test_empty_categories_are_dashes(quiz, tmp_path, capsys):
    (tmp_path / "said.json").write_text(json.dumps({"100": "A", "101": "A"}))  # of natural and social science, grades 1, 2
    evaluate("--predictions", tmp_path / "said.json", "--data", quiz, "--split", "few")
    names, percents = (re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[2:4])
    assert names == ["NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "Avg"]
    assert percents[1:] == ["100.00", "0.00", "-", "0.00", "100.00", "-", "50.00", "-", "50.00"]
    assert json.loads((tmp_path / "said_scored.json").read_text())["scores"]["LAN"] is None


# --- answering


def test_every_question_is_answered_in_the_splits_order(alone, quiz):
    result, ids = json.loads(alone.read_text()), json.loads((quiz / "pid_splits.json").read_text())["test"]
    assert list(result["outputs"]) == list(result["results"]) == ids and result["count"] == len(ids)
    assert len(set(result["outputs"].values())) > 13  # the answers do depend on the questions
    assert sorted(p.name for p in alone.parent.iterdir()) == ["answers.html", "answers.json"]


def test_batched_is_as_one_at_a_time(alone, run, quiz, tmp_path):
    evaluate("--model", run, "--data", quiz, "--batch-size", 1, "--max-new-tokens", 12, "--out", tmp_path / "answers.json")
    assert json.loads((tmp_path / "answers.json").read_text()) == json.loads(alone.read_text())


def test_an_answer_is_that_of_the_whole_prompt_and_what_takes_most_comes_first(alone, run, quiz, tmp_path, monkeypatch):
    """System message, question, picture, in full and without a cache; the batches get shorter."""
    problems = eval_scienceqa.ScienceQA(quiz, "test").records
    model, sp, _ = checkpoint.load_run(run)
    encode = Encoder(sp, 16, 32, Pictures(quiz), 10**6)
    said = json.loads(alone.read_text())["outputs"]
    for p in problems[2:4]:
        batch = encode.flatten([encode(Example(p["id"], [scienceqa_question(p)], p["image_path"]))])
        [answer] = model.answers(batch.ids, batch.cu_seqlens, batch.pixels, stop_ids(sp), 12)
        assert surface(sp, answer).strip() == said[p["id"]] != ""
    asked, ask = [], eval_scienceqa.ask
    monkeypatch.setattr(eval_scienceqa, "ask", lambda model, encode, prompts, *a: asked.append(prompts) or ask(model, encode, prompts, *a))
    evaluate("--model", run, "--data", quiz, "--batch-size", 8, "--max-new-tokens", 1, "--out", tmp_path / "answers.json")
    lengths = [[len(encode(prompt)[0]) for prompt in prompts] for prompts in asked]
    assert [len(batch) for batch in asked] == [8, 8, 8, 2] and sum(lengths, []) == sorted(sum(lengths, []), reverse=True)


def test_stop_ends_an_answer_in_whatever_pieces_it_is_said(run, quiz):
    """Tokens are compared while an answer is made, but `###` may also come as `##` and `#`."""
    model, sp, _ = checkpoint.load_run(run)
    encode = Encoder(sp, 16, 32, Pictures(quiz), 10**6)
    spelled = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in b"red\n###x"]
    model.answers = lambda *a, **k: [spelled]
    assert ask(model, encode, [Example("1", ["Which?"])]) == ["red"]


def test_pictures_reach_the_model(alone, run, quiz, tmp_path):
    shutil.copytree(quiz, tmp_path / "quiz")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "quiz/images/test/100/image.png")
    evaluate("--model", run, "--data", tmp_path / "quiz", "--split", "few", "--max-new-tokens", 12, "--out", tmp_path / "out.json")
    before, after = (json.loads(path.read_text())["outputs"] for path in (alone, tmp_path / "out.json"))
    assert after["100"] != before["100"] and after["101"] == before["101"]


def test_swapped_pictures_are_those_of_the_next_problem(alone, run, quiz, tmp_path):
    with_picture = [id for id, p in json.loads((quiz / "problems.json").read_text()).items() if p["image"]]
    shutil.copytree(quiz, tmp_path / "moved")
    for id, other in zip(with_picture, with_picture[1:] + with_picture[:1]):
        shutil.copy(quiz / f"images/test/{other}/image.png", tmp_path / f"moved/images/test/{id}/image.png")
    outs = tmp_path / "swapped.json", tmp_path / "moved.json"
    for out, *flags in ((outs[0], "--data", quiz, "--swap-pictures"), (outs[1], "--data", tmp_path / "moved")):
        evaluate("--model", run, *flags, "--batch-size", 8, "--max-new-tokens", 12, "--out", out)
    swapped, moved, true = (json.loads(path.read_text())["outputs"] for path in (*outs, alone))
    assert swapped == moved and {id for id in true if swapped[id] != true[id]} - set(with_picture) == set()
    assert sum(swapped[id] != true[id] for id in with_picture) > 4
    assert "leave one out" in refused("--predictions", alone, "--data", quiz, "--swap-pictures")


def test_two_processes_write_the_same(alone, run, quiz, tmp_path):
    out = tmp_path / "answers.json"
    flags = ("--model", run, "--data", quiz, "--batch-size", 8, "--max-new-tokens", 12, "--out", out)
    done = subprocess.run(command(*flags, processes=2), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == alone.read_bytes() and out.with_suffix(".html").is_file()
    assert done.stdout.count("% right") == 1 and not list(tmp_path.glob("*.jsonl"))


def test_stopped_and_continued_writes_the_same(alone, run, quiz, tmp_path, capsys, monkeypatch):
    out = tmp_path / "answers.json"
    flags = ("--model", run, "--data", quiz, "--batch-size", 8, "--max-new-tokens", 12, "--out", out)
    for number in (signal.SIGINT, signal.SIGTERM):  # each time in the second batch from where it stands
        calls = []

        def interrupted(*arguments):
            calls.append(os.kill(os.getpid(), number) if calls else 0)
            return ask(*arguments)

        ask = eval_scienceqa.ask
        monkeypatch.setattr(eval_scienceqa, "ask", interrupted)
        with pytest.raises(SystemExit) as end:
            evaluate(*flags)
        assert end.value.code == 130 and "the same command goes on from there" in capsys.readouterr().out and not out.exists()
        monkeypatch.setattr(eval_scienceqa, "ask", ask)
    evaluate(*flags)
    assert "16 of 26 questions were answered before" in capsys.readouterr().out
    assert out.read_bytes() == alone.read_bytes() and not list(tmp_path.glob("*.jsonl"))


def test_killed_and_continued_writes_the_same(alone, run, quiz, tmp_path, capsys):
    out = tmp_path / "answers.json"
    flags = ("--model", run, "--data", quiz, "--batch-size", 8, "--max-new-tokens", 12, "--out", out)
    # A process that pauses after each batch, so that it is certain to be met in the middle.
    slow = "import time, eval_scienceqa as e; ask = e.ask; e.ask = lambda *a: (time.sleep(1.5), ask(*a))[1]; e.main()"
    process = subprocess.Popen([sys.executable, "-c", slow, *map(str, flags)], cwd=ROOT, env=ENVIRONMENT)
    deadline = time.time() + 100
    while time.time() < deadline and not any("[" in p.read_text() for p in tmp_path.glob("*.jsonl")):
        time.sleep(0.05)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL and not out.exists()
    [part] = tmp_path.glob("*.jsonl")
    first = [json.loads(line) for line in part.read_text().splitlines() if line]
    assert len(first) in (8, 16)
    # What was answered is used: one of the answers is changed by hand here, and comes back.
    part.write_text(part.read_text().replace(json.dumps(first[0]), json.dumps([first[0][0], "A"])) + '["12')  # half a line
    part.with_name("answers.0123456789abcdef.part0.jsonl").write_text('["125", "of another model"]\n')
    evaluate(*flags)
    assert f"{len(first)} of 26 questions were answered before" in capsys.readouterr().out
    assert json.loads(out.read_text())["outputs"] == json.loads(alone.read_text())["outputs"] | {first[0][0]: "A"}
    assert not list(tmp_path.glob("*.jsonl"))


def test_what_processes_left_is_gone_on_from_by_another_number_of_them(alone, run, quiz, tmp_path):
    """Two processes under torchrun, all killed in the middle; then one goes on."""
    out = tmp_path / "answers.json"
    flags = ("--model", run, "--data", quiz, "--batch-size", 4, "--max-new-tokens", 12, "--out", out)
    (tmp_path / "slow.py").write_text(
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import eval_scienceqa as e; ask = e.ask\n"
        "e.ask = lambda *a: (time.sleep(1), ask(*a))[1]; e.main()")  # fmt: skip
    launch = [word if word != "eval_scienceqa.py" else str(tmp_path / "slow.py") for word in command(*flags, processes=2)]
    process = subprocess.Popen(launch, cwd=ROOT, env=ENVIRONMENT)
    deadline = time.time() + 100
    while time.time() < deadline and sum("[" in p.read_text() for p in tmp_path.glob("*.jsonl")) < 2:
        time.sleep(0.05)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    for pid in (process.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)
    process.wait(timeout=60)
    assert len(list(tmp_path.glob("*.jsonl"))) == 2 and not out.exists()
    evaluate(*flags)
    assert json.loads(out.read_text())["outputs"] == json.loads(alone.read_text())["outputs"]
    assert not list(tmp_path.glob("*.jsonl"))


def test_answers_of_another_model_or_data_are_not_reused(run, quiz, tmp_path):
    class A:
        model, data, max_new_tokens = tmp_path / "run", tmp_path / "quiz", 12

    shutil.copytree(run, A.model)
    shutil.copytree(quiz, A.data)
    problems = eval_scienceqa.ScienceQA(A.data, "test").records
    seen = {eval_scienceqa.fingerprint(A, problems)}
    assert eval_scienceqa.fingerprint(A, problems) in seen

    def differs():
        key = eval_scienceqa.fingerprint(A, problems)
        assert key not in seen
        seen.add(key)

    A.max_new_tokens = 13
    differs()
    weights = torch.load(A.model / "consolidated.00.pth")
    weights["norm.weight"][0] += 1
    torch.save(weights, A.model / "consolidated.00.pth")
    differs()
    Image.new("RGB", (40, 40), "red").save(A.data / "images/test/100/image.png")
    differs()
    problems[0]["choices"][0] = "green"
    differs()


# --- the page


def test_page_holds_every_question_and_is_whole_in_itself(alone, quiz):
    page = alone.with_suffix(".html").read_text()
    text = re.search(r'<script type="application/json" id="data">(.*)</script>\n<script>', page)[1]
    data = json.loads(text)
    problems = json.loads((quiz / "problems.json").read_text())
    assert [q["id"] for q in data["questions"]] == list(problems)
    assert data["questions"][1]["question"] == HOSTILE and data["questions"][1]["choices"] == problems["101"]["choices"]
    assert [q["id"] for q in data["questions"] if q["image"]] == [id for id, p in problems.items() if p["image"]]
    assert "<" not in text and not re.search(r"https?://|<link|src=[\"']|@import|url\(", page.replace(text, ""))
    wide = next(q for q in data["questions"] if q["id"] == "103")["image"]
    assert Image.open(io.BytesIO(base64.b64decode(wide.split(",")[1]))).size == (320, 32)  # of 400 x 40


@pytest.fixture(scope="module")
def scored(quiz, tmp_path_factory):
    """A page with right, wrong, unparsed and hostile answers -> its path, and the result of each question."""
    folder = tmp_path_factory.mktemp("page & <b>")
    said = {str(100 + i): ["The answer is A.", "The answer is B.", HOSTILE][i % 3] for i in range(25)}
    (folder / "said.json").write_text(json.dumps(said))
    evaluate("--predictions", folder / "said.json", "--data", quiz)
    problems = json.loads((quiz / "problems.json").read_text())
    results = json.loads((folder / "said_scored.json").read_text())["results"]
    kinds = {id: "unparsed" if i < 0 else "right" if i == problems[id]["answer"] else "wrong" for id, i in results.items()}
    return folder / "said_scored.html", kinds


def opened(address: str, home: Path) -> tuple[str, list[str]]:
    """A page as a real browser has it after its scripts ran -> its elements, and what it asked the network for."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom",
         "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={home}", f"--log-net-log={home}/net.json", address],
        capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The log has the browser's own errands too; a page's requests are marked with the page's origin.
    events = (home / "net.json").read_text(errors="replace").splitlines()  # one a line
    events = [event for event in events if '"network_isolation_key":"file:' in event]
    return done.stdout, [url for event in events for url in re.findall(r'"url":"(http[^"]*)"', event)]


@pytest.mark.skipif(not BROWSER, reason="no browser is installed")
@pytest.mark.parametrize("fragment", ["", "#category=IMG&result=wrong", "#result=unparsed&category=no+such", "#find=%3Cb%3EBLUE"])
def test_page_in_a_browser(fragment, scored, quiz, tmp_path):
    path, kinds = scored
    dom, requests = opened(path.as_uri() + fragment, tmp_path)
    cards = {id: kind for kind, id in re.findall(r'<article class="card (\w+)" data-id="(\d+)"', dom)}
    problems = json.loads((quiz / "problems.json").read_text())
    expected = {
        "": kinds,
        "#category=IMG&result=wrong": {id: k for id, k in kinds.items() if k == "wrong" and problems[id]["image"]},
        "#result=unparsed&category=no+such": {id: k for id, k in kinds.items() if k == "unparsed"},
        "#find=%3Cb%3EBLUE": {"101": kinds["101"]},
    }[fragment]
    assert cards == expected and 0 < len(cards) and f">{len(cards)} of 26 questions<" in dom
    images = re.findall(r'<img[^>]* src="([^"]{20})', dom)
    assert images == ["data:image/webp;base"] * sum(bool(problems[id]["image"]) for id in cards)
    # The hostile question stands there letter by letter, made no element and ran nothing.
    assert "<title>ScienceQA, split test</title>" in dom and requests == []
    assert re.search(r'<p class="about">answers of [^<]*page &amp; &lt;b&gt;', dom)
    if "101" in cards:
        assert f'<p class="question">{html.escape(HOSTILE, quote=False)}</p>' in dom and "<b>" not in dom


@pytest.mark.skipif(not BROWSER, reason="no browser is installed")
def test_the_browser_would_have_told_of_requests_and_scripts(tmp_path):
    (tmp_path / "page.html").write_text(f"<title>calm</title><script>0{HOSTILE}</script>")
    dom, requests = opened((tmp_path / "page.html").as_uri(), tmp_path)
    assert set(requests) == {"http://127.0.0.1:9/spy"} and "<title>calm</title>" not in dom


# --- bad input


def test_refusals(run, quiz, tmp_path):
    few = ("--data", quiz, "--split", "few", "--out", tmp_path / "out.json")

    def told(said):
        (tmp_path / "said.json").write_text(said)
        return refused("--predictions", tmp_path / "said.json", *few)

    assert "answer to '100' is 3" in told('{"100": 3}') and "answer to '101' is null" in told('{"outputs": {"101": null}}')
    assert "JSON list" in told('["A"]') and "not JSON at line 1" in told('{"100": "A"')
    (tmp_path / "said.json").write_text('{"100": "A"}')
    same = ("--predictions", tmp_path / "said.json", "--out", tmp_path / "said.json")
    assert "is the file of --predictions" in refused(*same, "--data", quiz)
    assert "cannot be read" in refused("--predictions", tmp_path / "none.json", *few)
    assert "no split 'dev'; it has test, few, none, lost" in refused("--data", quiz, "--split", "dev")
    assert "names problem '7'" in refused("--data", quiz, "--split", "lost")
    assert "is empty" in refused("--data", quiz, "--split", "none")
    assert "no such folder" in refused("--data", tmp_path / "nowhere")
    blocked = refused("--model", run, "--data", quiz, "--out", quiz / "problems.json" / "out.json")
    assert re.search("problems.json/.*part0.jsonl: cannot be written .*; give another --out", blocked)
    assert "must be 1 or more" in refused("--batch-size", 0)
    (tmp_path / "mine.json").write_text('{"a": 1}')
    (tmp_path / "page.html").write_text("mine")
    for out, named in (("mine.json", "mine.json"), ("page.json", "page.html")):
        assert f"{named}: is there already and is no earlier evaluation" in refused("--model", run, *few[:-1], tmp_path / out)
    assert (tmp_path / "mine.json").read_text() == '{"a": 1}' and (tmp_path / "page.html").read_text() == "mine"
    missing = refused("--model", tmp_path / "nowhere", *few)
    assert "no run is there; first train it: torchrun train.py --stage 2 --task scienceqa --out" in missing
    assert not (tmp_path / "nowhere").exists() and not (tmp_path / "out.json").exists()


def test_unfit_runs_are_refused(run, quiz, tmp_path):
    few = ("--data", quiz, "--split", "few", "--out", tmp_path / "out.json")
    shutil.copytree(run, tmp_path / "half")
    (tmp_path / "half/projector.pth").unlink()
    assert "no finished run" in refused("--model", tmp_path / "half", *few)
    config = json.loads((run / "config.json").read_text())
    for change, reason in (({"stage": 1}, "trained with stage 1, here it must be 2; take a run of: torchrun"),
                           ({"template": "vicuna_v1"}, "template 'vicuna_v1', here it must be 'vicuna_v0'"),
                           ({"prompt": "QCM-ALE"}, "prompt 'QCM-ALE', here it must be 'QCM-LEA'")):  # fmt: skip
        shutil.copytree(run, tmp_path / "unfit", dirs_exist_ok=True)
        (tmp_path / "unfit/config.json").write_text(json.dumps(config | change))
        assert reason in refused("--model", tmp_path / "unfit", *few)
    assert not list(tmp_path.glob("*.jsonl"))


def test_absent_and_broken_pictures(run, quiz, tmp_path, capsys):
    shutil.copytree(quiz, tmp_path / "quiz")
    flags = ("--model", run, "--data", tmp_path / "quiz", "--max-new-tokens", 2, "--out", tmp_path / "out.json")
    picture = tmp_path / "quiz/images/test/100/image.png"
    picture.write_bytes(picture.read_bytes()[:60])
    assert re.search(r"1 pictures cannot be read; problem 100: images/test/100/image.png: not a readable", refused(*flags))
    picture.unlink()
    assert "pictures of 1 of 26 problems are absent" in refused(*flags)
    evaluate(*flags, "--missing-pictures-as-text")
    assert "1 pictures are absent; those problems are asked without one" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["count"] == 26


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval_scienceqa.py", "--predictions", str(tmp_path / "none.json"), "--data", str(tmp_path)])
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:  # with a text, Python prints it to stderr and exits with 1
        runpy.run_path(str(ROOT / "eval_scienceqa.py"), run_name="__main__")
    signal.signal(signal.SIGTERM, handler)
    assert end.value.code.startswith("error: ") and "\n" not in end.value.code and capsys.readouterr().out == ""


def test_a_grade_of_endless_digits_is_no_grade():  # Python refuses to read such a number
    problem = {"hint": "", "image": None, "subject": "natural science"}
    assert eval_scienceqa.categories(problem | {"grade": "grade" + "1" * 5000}) == ["NAT", "NO", "Avg"]
    assert eval_scienceqa.categories(problem | {"grade": "grade12"}) == ["NAT", "NO", "G7-12", "Avg"]
