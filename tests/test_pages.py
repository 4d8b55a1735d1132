"""tools/pages.py: pages hold every text as text, complete in one file; opened by a real browser where one is installed."""

import base64
import html
import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_quiz
from PIL import Image

import eval_scienceqa
from conversation import SYSTEM
from formats.records import read_scienceqa
from tools import pages

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = (
    '</script><img src="http://127.0.0.1:9/spy" onerror="document.title=1"><script>document.title=2</script>{{data}}{{title}}'
)


# --- samples as Table 2


@pytest.fixture
def command(tmp_path, tiny_tokenizer):
    """`python -m tools.pages` on two samples -> its process. It writes tmp_path/page.html."""
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer.serialized_model_proto())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    samples = [{"id": "text", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
               {"id": "picture", "image": "a.jpg", "conversations": turns}]  # fmt: skip
    (tmp_path / "chat.json").write_text(json.dumps(samples))

    def run(*flags, data="chat.json", out="page.html"):
        paths = ["--data", tmp_path / data, "--tokenizer", tmp_path / "tokenizer.model", "--out", tmp_path / out]
        words = [sys.executable, "-m", "tools.pages", *paths, "--patches", "4", *flags]
        return subprocess.run(words, cwd=ROOT, env={"PYTHONUTF8": "1"}, capture_output=True, text=True)

    return run


def printed(tmp_path, index):
    """The last line that conversation.py prints of a sample."""
    flags = ["--data", tmp_path / "chat.json", "--tokenizer", tmp_path / "tokenizer.model", "--patches", "4"]
    words = [sys.executable, "conversation.py", *flags, "--index", index]
    return subprocess.run(words, cwd=ROOT, env={"NO_COLOR": "1"}, capture_output=True, text=True).stdout.splitlines()[-1]


class Elements(html.parser.HTMLParser):
    """The elements of a page: (tag, attributes) in order, and (class or tag, text) of each text."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append((tag, dict(attributes).get("class", tag)))

    def handle_endtag(self, tag):
        while self.open.pop()[0] != tag:
            pass

    def handle_data(self, data):
        self.texts.append((self.open[-1][1] if self.open else "", data))


def test_samples_have_the_texts_of_table_2_and_the_picture_at_its_place(command, tmp_path):
    Image.linear_gradient("L").resize((800, 400)).save(tmp_path / "a.jpg")
    done = command("--index", "1", "0", "--images", tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "page.html is written" in done.stdout
    page = Elements((tmp_path / "page.html").read_text())
    titles = [text for kind, text in page.texts if kind == "h2"]
    assert titles == ["sample picture, picture a.jpg", "sample text, no picture"]
    assert [text for kind, text in page.texts if kind == "green"] == ["green", " A cat.\n###", " So.\n###"]
    parts = [(kind, text) for kind, text in page.texts if kind in ("read", "green", "figcaption")]
    assert parts[1] == ("read", f" {SYSTEM}\n\n### Human: ") and parts[2] == ("figcaption", "picture: 4 patches")
    assert parts[3] == ("read", " \nWhat?\n### Assistant:") and parts[4] == ("green", " A cat.\n###")
    assert [text for kind, text in page.texts if kind == "summary"] == [printed(tmp_path, i) for i in ("1", "0")]
    [link] = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    picture = Image.open(io.BytesIO(base64.b64decode(link.removeprefix("data:image/webp;base64,"))))
    assert picture.size == (320, 160)


def test_ranges_of_samples(command, tmp_path):
    for flags, ids in (((), ["text"]), (("--index", "0-1"), ["text", "picture"]),
                       (("--index", "1", "0-1"), ["picture", "text", "picture"])):  # fmt: skip
        assert command(*flags).returncode == 0
        page = Elements((tmp_path / "page.html").read_text())
        assert [text.split()[1].strip(",") for kind, text in page.texts if kind == "h2"] == ids


@pytest.mark.parametrize("content, reason", [(None, None), (b"", "absent"), (b"x", "not a readable")])
def test_samples_whose_picture_cannot_be_shown(content, reason, command, tmp_path):
    """Without --images, and with a picture that is absent or damaged."""
    folder = tmp_path / "images"
    folder.mkdir()
    if content:
        (folder / "a.jpg").write_bytes(content)
    flags = () if content is None else ("--images", folder)
    assert command("--index", "1", *flags).returncode == 0
    page = Elements((tmp_path / "page.html").read_text())
    assert "img" not in dict(page.tags) and ("figcaption", "picture: 4 patches") in page.texts
    [title] = [text for kind, text in page.texts if kind == "h2"]
    if content is None:
        assert title == "sample picture, picture a.jpg"
    else:
        assert title.startswith("sample picture, picture a.jpg (")
    assert reason != "not a readable" or reason in title


def test_samples_of_a_scienceqa_folder_show_its_pictures(command, quiz, tmp_path):
    shutil.copytree(quiz, tmp_path / "quiz")
    assert command("--split", "few", "--index", "0-1", data="quiz").returncode == 0
    page = Elements((tmp_path / "page.html").read_text())
    assert [tag for tag, _ in page.tags].count("img") == 1  # of question 100; question 101 has none


def test_samples_insert_the_data_as_text(command, tmp_path):
    hostile = '</span><script>alert(1)</script><img src="http://127.0.0.1/" onerror=x>&amp;"\'\033[31m\ud83d'
    turns = [{"from": "human", "value": f"<image>\n{hostile}"}, {"from": "gpt", "value": hostile}]
    sample = {"id": hostile, "image": f"{hostile}.png", "conversations": turns}
    (tmp_path / "hostile.json").write_text(json.dumps([sample]))
    done = command("--images", tmp_path, data="hostile.json")
    assert (done.returncode, done.stderr) == (0, "")
    page = Elements((tmp_path / "page.html").read_text())
    tags = "html meta title style h1 p span section h2 div figure figcaption"
    assert {tag for tag, _ in page.tags} <= set(tags.split())
    shown = hostile.replace("\033", "\ufffd").replace("\ud83d", "\ufffd")
    assert ("green", f" {shown}\n###") in page.texts and ("read", f" \n{shown}\n### Assistant:") in page.texts
    for tag, attributes in page.tags:
        assert not {"onerror", "src", "href"} & set(attributes)


@pytest.mark.parametrize("flags, error", [
    (("--index", "-1"), "--index -1: must be a number from 0"), (("--index", "5-3"), "--index 5-3: must be"),
    (("--index", "0", "x\n"), "--index x\ufffd: must be"),
    (("--index", "0-2"), "--index 2: the data has samples 0 to 1"),
    (("--index", "0-99999999999"), "--index 99999999999: the data has samples 0 to 1"),
    (("--out", "chat.json"), "--out chat.json: must name a file that ends in .html"),
    (("--images", "nowhere"), "nowhere: "),
    (("--data", "nothing.json"), "nothing.json"),
])  # fmt: skip
def test_mistakes_end_in_one_line(command, tmp_path, flags, error):
    done = command(*flags)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and error in done.stderr
    assert not (tmp_path / "page.html").exists()


# --- the page of an evaluation


@pytest.fixture(scope="module")
def quiz(tmp_path_factory):
    """26 problems of all categories, every third with a picture; question 101 is hostile."""

    def make_hostile(problems):
        problems["101"] |= dict(question=HOSTILE, choices=[HOSTILE, "<b>blue</b>"], hint=HOSTILE, lecture=HOSTILE)

    return write_quiz(tmp_path_factory.mktemp("quiz"), make_hostile, {"few": ["100", "101"]}, wide=[3])


@pytest.fixture(scope="module")
def scored(quiz, tmp_path_factory):
    """A page with right, wrong, unparsed, hostile and absent answers: its path, and the result of each question."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    problems, _ = read_scienceqa(quiz, "test")
    outputs = {str(100 + i): ["The answer is A.", "The answer is B.", HOSTILE][i % 3] for i in range(25)}
    result = eval_scienceqa.score(problems, outputs)
    about = f"answers of <b> & {HOSTILE}"
    path.write_text(pages.evaluation_page("ScienceQA, split test", about, quiz, problems, result))
    results = {}
    for problem in problems:
        chosen = result["results"][problem["id"]]
        results[problem["id"]] = "unparsed" if chosen < 0 else "right" if chosen == problem["answer"] else "wrong"
    assert set(results.values()) == {"right", "wrong", "unparsed"}
    return path, results


def data_of(page: str) -> str:
    """The JSON in an evaluation's page."""
    return re.search(r'<script type="application/json" id="data">(.*)</script>\n<script>', page)[1]


def test_evaluation_holds_every_question_and_loads_nothing(scored, quiz):
    page = scored[0].read_text()
    text = data_of(page)
    data = json.loads(text)
    problems = json.loads((quiz / "problems.json").read_text())
    assert [q["id"] for q in data["questions"]] == list(problems)
    assert data["questions"][1]["question"] == HOSTILE and data["questions"][1]["choices"] == problems["101"]["choices"]
    assert [q["id"] for q in data["questions"] if q["image"]] == [id for id, p in problems.items() if p["image"]]
    assert data["questions"][-1]["output"] is None and data["questions"][2]["output"] == HOSTILE
    assert data["questions"][0]["explanation"] == "Things have a colour.\n\nIt is so."
    rest = page.replace(text, "").replace(html.escape(HOSTILE), "")
    assert "<" not in text and not re.search(r"https?://|<link|src=[\"']|@import|url\(", rest)
    wide = next(q for q in data["questions"] if q["id"] == "103")["image"]
    assert Image.open(io.BytesIO(base64.b64decode(wide.split(",")[1]))).size == (320, 32)  # of 400 x 40


def test_evaluation_marks_pictures_that_are_missing_or_damaged(quiz, tmp_path):
    shutil.copytree(quiz, tmp_path / "quiz")
    (tmp_path / "quiz/images/test/100/image.png").write_bytes(b"x")
    (tmp_path / "quiz/images/test/103/image.png").unlink()
    problems, _ = read_scienceqa(tmp_path / "quiz", "test", "text")
    page = pages.evaluation_page("", "", tmp_path / "quiz", problems, eval_scienceqa.score(problems, {}))
    questions = json.loads(data_of(page))["questions"]
    assert [q["id"] for q in questions if q["missing"]] == ["100", "103"]
    assert not any(q["image"] for q in questions if q["missing"]) and sum(bool(q["image"]) for q in questions) == 7


def test_evaluation_has_the_scores_of_each_category(scored):
    data = json.loads(data_of(scored[0].read_text()))
    columns = {column["name"]: column for column in data["columns"]}
    assert list(columns) == list(eval_scienceqa.CATEGORIES) and columns["Avg"]["count"] == 26
    right = sum(result == "right" for result in scored[1].values())
    assert columns["Avg"]["score"] == pytest.approx(100 * right / 26)


def open_in_browser(address: str, home: Path) -> tuple[str, list[str]]:
    """The elements of a page after its scripts ran, and the URLs that it requested."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom",
         "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
         f"--user-data-dir={home}", f"--log-net-log={home}/net.json", address],
        capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The log also has requests of the browser itself. Those of a page name the page's origin.
    events = (home / "net.json").read_text(errors="replace").splitlines()  # one per line
    events = [event for event in events if '"network_isolation_key":"file:' in event]
    return done.stdout, [url for event in events for url in re.findall(r'"url":"(http[^"]*)"', event)]


@pytest.mark.skipif(not BROWSER, reason="no browser is installed")
@pytest.mark.parametrize("fragment", ["", "#category=IMG&result=wrong", "#result=unparsed&category=no+such", "#find=%3Cb%3EBLUE"])
def test_evaluation_in_a_browser(fragment, scored, quiz, tmp_path):
    path, results = scored
    dom, requests = open_in_browser(path.as_uri() + fragment, tmp_path)
    cards = {id: result for result, id in re.findall(r'<article class="card (\w+)" data-id="(\d+)"', dom)}
    problems = json.loads((quiz / "problems.json").read_text())
    expected = {
        "": results,
        "#category=IMG&result=wrong": {id: r for id, r in results.items() if r == "wrong" and problems[id]["image"]},
        "#result=unparsed&category=no+such": {id: r for id, r in results.items() if r == "unparsed"},
        "#find=%3Cb%3EBLUE": {"101": results["101"]},
    }[fragment]
    assert cards == expected and 0 < len(cards) and f">{len(cards)} of 26 questions<" in dom
    images = re.findall(r'<img[^>]* src="([^"]{20})', dom)
    assert images == ["data:image/webp;base"] * sum(bool(problems[id]["image"]) for id in cards)
    # The hostile texts are shown as they are; they made no element and ran nothing.
    assert "<title>ScienceQA, split test</title>" in dom and requests == []
    assert f'<p class="about">answers of &lt;b&gt; &amp; {html.escape(HOSTILE, quote=False)}</p>' in dom
    if "101" in cards:
        assert f'<p class="question">{html.escape(HOSTILE, quote=False)}</p>' in dom and "<b>" not in dom


@pytest.mark.skipif(not BROWSER, reason="no browser is installed")
def test_the_browser_would_have_reported_requests_and_scripts(tmp_path):
    (tmp_path / "page.html").write_text(f"<title>calm</title><script>0{HOSTILE}</script>")
    dom, requests = open_in_browser((tmp_path / "page.html").as_uri(), tmp_path)
    assert set(requests) == {"http://127.0.0.1:9/spy"} and "<title>calm</title>" not in dom
