"""tools/plots.py: the attention that it shows is the one computed at the position that predicts each word; the curves."""

import json
import math
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, error, llava_twin, sample, tiny_llava
from PIL import Image
from test_eval_scienceqa import run  # noqa: F401  (a fixture)

import checkpoint
from common import UserError
from conversation import IMAGE, IMAGE_ID, tokenize
from model import StreamAttention, position_ids
from tools import plots
from vision import normalize

LINE = dict(step=1, loss=2.0, lr=1e-3, grad_norm=0.5, green_tokens=10, tokens=100, seconds=0.5)


def one_sample():
    ids, green = sample(17, 3, seed=5)
    rng = torch.Generator().manual_seed(5)
    return ids, torch.randint(0, 256, (1, 3, 42, 42), dtype=torch.uint8, generator=rng)


def write_metrics(run_directory, lines, more=""):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run_directory / "metrics.jsonl").write_text(text + more)


# --- attention


@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_weights_equal_those_of_transformers(n_kv_heads):
    llava = tiny_llava(n_kv_heads)
    ids, pixels = one_sample()
    twin = llava_twin(llava)
    twin.set_attn_implementation("eager")  # the implementation that returns attention weights
    twin_ids = torch.where(ids == IMAGE_ID, twin.config.image_token_id, ids)[None]
    with torch.no_grad():
        expected = twin(input_ids=twin_ids, pixel_values=normalize(pixels), output_attentions=True).attentions
    rows = torch.tensor([2, 11, 18, len(ids) - 1])  # before, in and after the picture, and the last position
    weights = plots.attention_weights(llava, ids, pixels, rows)
    assert weights.shape == (2, 4, 4, len(ids))  # layers, heads, rows, positions
    for layer in range(2):
        assert error(weights[layer], expected[layer][0, :, rows]) < 1e-5


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_sum_to_1_and_are_0_at_later_positions(bf16):
    ids, pixels = one_sample()
    rows = torch.arange(len(ids))
    llava = tiny_llava().bfloat16() if bf16 else tiny_llava()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        weights = plots.attention_weights(llava, ids, pixels, rows)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, len(ids)))
    assert (weights.triu(1) == 0).all() and (weights >= 0).all()


def test_watching_does_not_change_the_attention():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, heads, 8, generator=rng) for heads in (4, 2, 2))
    watched = plots.WatchedAttention(9, torch.tensor([3]))
    assert torch.equal(watched(q, k, v, 0), StreamAttention([0, 9])(q, k, v, 0))
    assert [weights.shape for weights in watched.weights] == [(4, 1, 9)]


def test_words_are_joined_pieces(tiny_tokenizer):
    text = "A cat on an odd mat. ## Grüße"
    ids = tiny_tokenizer.encode(text)
    words = plots.split_words(tiny_tokenizer, ids)
    assert [word for word, _ in words] == text.split()
    assert words[0][1] == 0 and len(ids) > len(words)
    for _, first in words:
        assert tiny_tokenizer.id_to_piece(ids[first]).startswith("\u2581")


def test_a_word_looks_from_the_position_that_predicts_it(run, monkeypatch):  # noqa: F811
    """At each row, the word's first piece has the largest logit; the weights are those at the patches."""
    model, sp, _ = checkpoint.load_run(run)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    calls, attention_weights = [], plots.attention_weights

    def spy(model, ids, pixels, rows):
        calls.append((ids, rows, attention_weights(model, ids, pixels, rows)))
        return calls[0][2]

    def words_of_two_pieces(sp, ids):
        return [(str(ids[i]), i) for i in range(0, len(ids), 2)]

    monkeypatch.setattr(plots, "attention_weights", spy)
    monkeypatch.setattr(plots, "split_words", words_of_two_pieces)  # a random model may write no word at all
    words = plots.look(model, sp, pixels, "Which thing?", max_new_tokens=12)
    [(ids, rows, weights)] = calls
    prompt = tokenize(sp, [f"{IMAGE}\nWhich thing?"], 16)[0]
    answer = ids[len(prompt) :].tolist()
    assert ids[: len(prompt)].tolist() == prompt.tolist() and len(answer) == 12
    borders = [0, len(ids)]
    with torch.no_grad():
        hidden = model.llama(model.embed(ids, pixels), position_ids(borders), StreamAttention(borders))
        predicted = model.llama.logits(hidden).argmax(-1)
    expected = words_of_two_pieces(sp, answer)
    assert [word for word, _ in words] == [word for word, _ in expected] and len(words) == len(rows) == 6
    at = int((ids == IMAGE_ID).nonzero()[0])
    for i, ((_, on_patches), (_, first), row) in enumerate(zip(words, expected, rows.tolist())):
        assert predicted[row] == answer[first]
        torch.testing.assert_close(on_patches, weights[:, :, i, at : at + 16].mean(1))
        assert on_patches.shape == (2, 16) and (on_patches.sum(1) < 1).all()


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plots.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "tools/plots.py"), run_name="__main__")


def test_attention_figure(run, tmp_path, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("matplotlib")
    Image.linear_gradient("L").resize((50, 40)).save(tmp_path / "a.png")
    ask = ("attention", "--model", run, "--image", tmp_path / "a.png", "--max-new-tokens", 9, "--prompt", "Is $\\none$?")
    for name, layer in (("all", ()), ("first", ("--layer", 1)), ("last", ("--layer", 2))):
        command(monkeypatch, *ask, "--out", tmp_path / f"{name}.png", *layer)
    figures = [Image.open(tmp_path / f"{name}.png").tobytes() for name in ("all", "first", "last")]
    assert len(set(figures)) == 3
    assert "all.png shows where each word looks" in capsys.readouterr().out
    (tmp_path / "b.png").write_text("no picture")
    for flags, message in ((("--layer", 3), "error: --layer 3: .* has layers 1 to 2"),
                           (("--layer", 0), "--layer: 0: expected a whole number of 1 or more"),
                           (("--image", tmp_path / "b.png"), "error: .*b.png: not a readable picture"),
                           (("--image", tmp_path / "none.png"), "error: .*none.png: No such file"),
                           (("--model", tmp_path), "error: .*no run directory"),
                           (("--out", tmp_path / "x.jpg"), "error: --out .*x.jpg: must name a file that ends in .png"),
                           (("--max-new-tokens", 0), "--max-new-tokens: 0: expected a whole number of 1 or more")):  # fmt: skip
        with pytest.raises(SystemExit, match=message):
            command(monkeypatch, *ask, "--out", tmp_path / "x.png", *flags)
    assert not (tmp_path / "x.png").exists()


def test_all_words_are_drawn_on_one_scale_with_a_legend():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    words = [("red", torch.full((16,), 0.01)), ("cross", torch.full((16,), 0.05)), ("at", torch.zeros(16))]
    plots.draw_attention(figure, "Which?", torch.zeros(1, 3, 32, 32, dtype=torch.uint8), words)
    picture, *panels, legend = figure.axes
    scales = [axes.images[1].get_clim() for axes in panels]
    assert scales == [(0, pytest.approx(0.05))] * 3 and legend.get_ylabel() == "attention of a word to one patch"
    assert [axes.get_title() for axes in panels] == ["red  16%", "cross  80%", "at  0%"]
    plots.draw_attention(pytest.importorskip("matplotlib.figure").Figure(), "No answer", torch.zeros(1, 3, 8, 8), [])


# --- curves


def test_curves_show_every_complete_line_of_the_metrics(tmp_path, monkeypatch):
    """A null is a gap in its curve."""
    figure = pytest.importorskip("matplotlib.figure")
    lines = [LINE | dict(step=i, loss=None if i == 3 else 1 / i, seconds=0.5 * i) for i in range(1, 9)]
    write_metrics(tmp_path, lines, '[1]\nnull\n{"step": 9}\n{"step": 10, "lo')
    figures, savefig = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k))
    assert plots.loss_curves(tmp_path) == tmp_path / "loss.png"
    assert min(Image.open(tmp_path / "loss.png").size) > 300
    curves = {axes.get_title(): [float(y) for y in axes.lines[0].get_ydata()] for axes in figures[0].axes}
    assert list(curves) == ["loss", "learning rate", "gradient norm before clipping", "tokens/s"]
    assert math.isnan(curves["loss"][2]) and curves["loss"][3] == 1 / 4 and len(curves["loss"]) == 8
    assert curves["tokens/s"] == pytest.approx([200 / i for i in range(1, 9)])
    assert list(figures[0].axes[0].lines[0].get_xdata()) == list(range(1, 9))


def test_the_dark_curve_is_the_mean_around_each_step(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    write_metrics(tmp_path, [LINE | dict(step=i, loss=float(i * i)) for i in range(1, 251)])
    figures, savefig = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k))
    plots.loss_curves(tmp_path)
    mean = figures[0].axes[0].lines[1]
    assert list(mean.get_xdata()) == list(range(3, 249))  # of 5 steps
    assert list(mean.get_ydata()) == pytest.approx([i * i + 2 for i in range(3, 249)])


def test_without_metrics_the_error_is_one_line(tmp_path):
    for draw in (plots.loss_curves, plots.read_metrics):
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        with pytest.raises(UserError, match="metrics.jsonl: No such file.*; give the run directory of a training"):
            draw(tmp_path)
        (tmp_path / "metrics.jsonl").write_text("no metrics\n")
        with pytest.raises(UserError, match="has no complete line"):
            draw(tmp_path)


def test_without_matplotlib_the_error_names_the_pip_command(tmp_path, monkeypatch, run):  # noqa: F811
    write_metrics(tmp_path, [LINE])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for arguments in (("loss", tmp_path), ("attention", "--model", run, "--image", tmp_path)):
        with pytest.raises(SystemExit, match="^error: .*pip install matplotlib$"):
            command(monkeypatch, *arguments)


def test_no_global_state_and_no_display(tmp_path):
    """matplotlib's Agg backend draws the figure whatever MPLBACKEND says, and pyplot is never imported."""
    pytest.importorskip("matplotlib")
    write_metrics(tmp_path, [LINE])
    code = f"""if True:
        import sys, pathlib
        from tools import plots
        plots.loss_curves(pathlib.Path({str(tmp_path)!r}))
        print("matplotlib.pyplot" in sys.modules)"""
    environment = {"MPLBACKEND": "tkagg", "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


# --- TensorBoard


def test_tensorboard_has_the_metrics_of_each_step_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard/notes.txt").write_text("mine")
    for last in (8, 5):  # a shorter run replaces the events of the longer one
        lines = [LINE | dict(step=i, loss=None if i == 3 else 1 / i) for i in range(1, last + 1)]
        write_metrics(tmp_path, lines, '{"step": 10, "lo')
        command(monkeypatch, "tensorboard", tmp_path)
        board = EventAccumulator(str(tmp_path / "tensorboard"))
        board.Reload()
        assert sorted(board.Tags()["scalars"]) == sorted([*(LINE.keys() - {"step"}), "speed"])
        for name in LINE.keys() - {"step"}:
            events = [(event.step, event.value) for event in board.Scalars(name)]
            expected = [(line["step"], line[name]) for line in lines if line[name] is not None]
            assert events == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected], name
        assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert (tmp_path / "tensorboard/notes.txt").read_text() == "mine"


def test_without_tensorboard_the_error_names_the_pip_command(tmp_path, monkeypatch):
    write_metrics(tmp_path, [LINE])
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    with pytest.raises(SystemExit, match="^error: tensorboard .*pip install tensorboard$"):
        command(monkeypatch, "tensorboard", tmp_path)
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_of_a_wrong_directory_writes_nothing(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    with pytest.raises(SystemExit, match="^error: .*metrics.jsonl: No such file"):
        command(monkeypatch, "tensorboard", tmp_path)
    write_metrics(tmp_path, [LINE])
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(SystemExit, match="^error: .*tensorboard: could not be written"):
        command(monkeypatch, "tensorboard", tmp_path)
    assert (tmp_path / "tensorboard").read_text() == "a file"
