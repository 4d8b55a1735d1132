"""plots.py: that the attention shown is the attention computed, at the position that predicts each word; the curves."""

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
import plots
from conversation import IMAGE, IMAGE_ID, UserError, tokenize
from model import positions
from vision import normalize

LINE = dict(step=1, loss=2.0, lr=1e-3, grad_norm=0.5, green_tokens=10, tokens=100, seconds=0.5)


def one_sample():
    ids, green = sample(17, 3, seed=5)
    dice = torch.Generator().manual_seed(5)
    return ids, torch.randint(0, 256, (1, 3, 42, 42), dtype=torch.uint8, generator=dice)


# --- attention


@pytest.mark.parametrize("n_kv_heads", [2, 4])
def test_weights_are_those_of_transformers(n_kv_heads):
    llava = tiny_llava(n_kv_heads)
    ids, pixels = one_sample()
    twin = llava_twin(llava)
    twin.set_attn_implementation("eager")  # the one that returns them
    theirs_ids = torch.where(ids == IMAGE_ID, twin.config.image_token_id, ids)[None]
    with torch.no_grad():
        theirs = twin(input_ids=theirs_ids, pixel_values=normalize(pixels), output_attentions=True).attentions
    rows = torch.tensor([2, 11, 18, len(ids) - 1])  # before, in and after the picture, and the last
    ours = plots.attention_weights(llava, ids, pixels, rows)
    assert ours.shape == (2, 4, 4, len(ids))  # layers, heads, rows, positions
    for layer in range(2):
        assert error(ours[layer], theirs[layer][0, :, rows]) < 1e-5


@pytest.mark.parametrize("bf16", [False, True])
def test_weights_sum_to_1_and_nothing_ahead_is_seen(bf16):
    ids, pixels = one_sample()
    rows = torch.arange(len(ids))
    llava = tiny_llava().bfloat16() if bf16 else tiny_llava()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        weights = plots.attention_weights(llava, ids, pixels, rows)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, len(ids)))
    assert (weights.triu(1) == 0).all() and (weights >= 0).all()


def test_words_are_pieces_joined(tiny_tokenizer):
    text = "A cat on an odd mat. ## Grüße"
    said = tiny_tokenizer.encode(text)
    words = plots.words_of(tiny_tokenizer, said)
    assert [word for word, _ in words] == text.split()
    assert words[0][1] == 0 and len(said) > len(words)
    for _, first in words:
        assert tiny_tokenizer.id_to_piece(said[first]).startswith("\u2581")


def test_a_word_looks_from_the_position_that_predicts_it(run, monkeypatch):  # noqa: F811
    """The logits at each row asked for have the word's first piece on top, and the weights are on the patches."""
    model, sp, _ = checkpoint.load_run(run)
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    seen, weights_of = [], plots.attention_weights

    def spy(model, ids, pixels, rows):
        seen.append((ids, rows, weights_of(model, ids, pixels, rows)))
        return seen[0][2]

    def of_two_pieces(sp, said):
        return [(str(said[i]), i) for i in range(0, len(said), 2)]

    monkeypatch.setattr(plots, "attention_weights", spy)
    monkeypatch.setattr(plots, "words_of", of_two_pieces)  # a random model says none
    words = plots.look(model, sp, pixels, "Which thing?", max_new_tokens=12)
    [(ids, rows, weights)] = seen
    prompt = tokenize(sp, [f"{IMAGE}\nWhich thing?"], 16)[0]
    said = ids[len(prompt) :].tolist()
    assert ids[: len(prompt)].tolist() == prompt.tolist() and len(said) == 12
    borders = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        attend = plots.flat_attention(2, borders)
        predicted = model.llama.logits(model.llama(model.embed(ids, pixels), positions(borders), attend)).argmax(-1)
    expected = of_two_pieces(sp, said)
    assert [word for word, _ in words] == [word for word, _ in expected] and len(words) == len(rows) == 6
    at = int((ids == IMAGE_ID).nonzero()[0])
    for i, ((_, on_patches), (_, first), row) in enumerate(zip(words, expected, rows.tolist())):
        assert predicted[row] == said[first]
        torch.testing.assert_close(on_patches, weights[:, :, i, at : at + 16].mean(1))
        assert on_patches.shape == (2, 16) and (on_patches.sum(1) < 1).all()


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["plots.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "plots.py"), run_name="__main__")


def test_the_attention_figure(run, tmp_path, monkeypatch, capsys):  # noqa: F811
    pytest.importorskip("matplotlib")
    Image.linear_gradient("L").resize((50, 40)).save(tmp_path / "a.png")
    ask = ("attention", "--model", run, "--image", tmp_path / "a.png", "--max-new-tokens", 9, "--prompt", "Is $\\none$?")
    for name, layer in (("all", ()), ("first", ("--layer", 1)), ("last", ("--layer", 2))):
        command(monkeypatch, *ask, "--out", tmp_path / f"{name}.png", *layer)
    drawn = [Image.open(tmp_path / f"{name}.png").tobytes() for name in ("all", "first", "last")]
    assert len(set(drawn)) == 3
    assert "all.png shows where each word looks" in capsys.readouterr().out
    (tmp_path / "b.png").write_text("no picture")
    for flags, message in ((("--layer", 3), "error: --layer 3: .* has layers 1 to 2"),
                           (("--layer", 0), "error: --layer 0: .* has layers 1 to 2"),
                           (("--image", tmp_path / "b.png"), "error: .*b.png: not a readable picture"),
                           (("--image", tmp_path / "none.png"), "error: .*none.png: No such file"),
                           (("--model", tmp_path), "error: .*no run is there"),
                           (("--max-new-tokens", 0), "error: --max-new-tokens 0: must be 1 or more")):  # fmt: skip
        with pytest.raises(SystemExit, match=message):
            command(monkeypatch, *ask, "--out", tmp_path / "x.png", *flags)
    assert not (tmp_path / "x.png").exists()


# --- curves


def test_curves_hold_what_the_lines_say(tmp_path, monkeypatch):
    """Every line that is one; a step without a number is a gap."""
    figure = pytest.importorskip("matplotlib.figure")
    lines = [LINE | dict(step=i, loss=None if i == 3 else 1 / i, seconds=0.5 * i) for i in range(1, 9)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(f'{text}[1]\nnull\n{{"step": 9}}\n{{"step": 10, "lo')
    drawn, savefig = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or savefig(self, *a, **k))
    assert plots.loss_curves(tmp_path) == tmp_path / "loss.png"
    assert min(Image.open(tmp_path / "loss.png").size) > 300
    curves = {axes.get_title(): [float(y) for y in axes.lines[0].get_ydata()] for axes in drawn[0].axes}
    assert list(curves) == ["loss", "learning rate", "gradient norm, before clipping", "tokens/s"]
    assert math.isnan(curves["loss"][2]) and curves["loss"][3] == 1 / 4 and len(curves["loss"]) == 8
    assert curves["tokens/s"] == pytest.approx([200 / i for i in range(1, 9)])
    assert drawn[0].axes[0].lines[0].get_xdata().tolist() == list(range(1, 9))


def test_nothing_to_draw_is_one_line(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl: No such file.*; name the directory of a run"):
        plots.loss_curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("no metrics\n")
    with pytest.raises(UserError, match="holds no step yet"):
        plots.loss_curves(tmp_path)


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch, run):  # noqa: F811
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for arguments in (("loss", tmp_path), ("attention", "--model", run, "--image", tmp_path)):
        with pytest.raises(SystemExit, match="^error: .*pip install matplotlib$"):
            command(monkeypatch, *arguments)


def test_no_global_state_and_no_display(tmp_path):
    """A figure is drawn by Agg whatever the user's backend is, and pyplot is never loaded."""
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    code = f"""if True:
        import sys, pathlib, plots
        plots.loss_curves(pathlib.Path({str(tmp_path)!r}))
        print("matplotlib.pyplot" in sys.modules)"""
    environment = {"MPLBACKEND": "tkagg", "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
