"""formats/meta.py: consolidated.NN.pth, their slices merged, and params.json to LLaMAConfig and back."""

import json

import pytest
import torch
from test_checkpoint import NORM, WQ, check_llama, refused, tiny_llama, write_changed, write_raw

from checkpoint import llama_config, load_llama, save_llama
from model import LLaMAConfig

# --- files and slices


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("n_shards", [1, 2, 4])
def test_merged_slices_give_the_logits_of_transformers(tmp_path, n_kv_heads, n_shards):
    llama = tiny_llama(n_kv_heads)
    check_llama(write_raw(llama, tmp_path / "raw", n_shards), llama)


def test_a_gap_between_the_files_is_refused(tmp_path):
    folder = write_raw(tiny_llama(), tmp_path / "raw", 2)
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")
    with refused(folder, "consolidated.02.pth"):
        load_llama(folder)
    (folder / "consolidated.02.pth").unlink()
    with refused(folder, "incomplete"):  # the number of files is recorded nowhere
        load_llama(folder)
    (folder / "consolidated.00.pth").unlink()
    with refused(folder, "consolidated.00.pth", "none"):
        load_llama(folder)


FAULTS = {  # name of a fault -> the change of two model-parallel files, and the words to expect
    "missing in the first": (lambda a, b: a.pop(WQ), [WQ]),
    "missing in the second": (lambda a, b: b.pop(WQ), [WQ]),
    "extra in the first": (lambda a, b: a.update({"layers.0.attention.wz.weight": torch.ones(1)}), ["wz"]),
    "extra in the second": (lambda a, b: b.update({"layers.0.attention.wz.weight": torch.ones(1)}), ["wz"]),
    "another shape": (lambda a, b: a.update({WQ: torch.ones(16, 31)}), [WQ]),
    "transposed": (lambda a, b: a.update({WQ: torch.ones(32, 16)}), [WQ]),
    "unequal norms": (lambda a, b: b.update({NORM: torch.zeros(32)}), [NORM, "differs"]),
    "integers": (lambda a, b: a.update({WQ: torch.ones(16, 32, dtype=torch.int8)}), [WQ]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_must_have_slices_of_the_same_tensors(tmp_path, fault):
    change, words = FAULTS[fault]
    folder = write_changed(tmp_path / "raw", change)
    with refused(folder, "differs between the files", *words):
        load_llama(folder)


def test_one_file_with_a_nan_in_a_norm_is_loaded(tmp_path):
    """The comparison of norms between files does not apply: a NaN would differ from itself."""
    folder = write_raw(tiny_llama(), tmp_path / "raw")
    weights = torch.load(folder / "consolidated.00.pth")
    weights["norm.weight"][3] = float("nan")
    torch.save(weights, folder / "consolidated.00.pth")
    assert load_llama(folder).norm.weight.isnan().sum() == 1


# --- params.json


@pytest.mark.parametrize("dim, ffn_dim", [
    (4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (8192, 28672), (64, 172), (32, 56), (64, 49), (64, 7),
])  # fmt: skip
def test_params_json_gives_ffn_dim_by_the_published_formula(tmp_path, dim, ffn_dim):
    config = LLaMAConfig(dim=dim, n_layers=1, n_heads=2, n_kv_heads=1, ffn_dim=ffn_dim, vocab_size=3)
    save_llama(config, {}, tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    hidden_dim = 4 * dim  # this and the next lines are those of Meta's model.py
    hidden_dim = int(2 * hidden_dim / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden_dim = int(params["ffn_dim_multiplier"] * hidden_dim)
    hidden_dim = params["multiple_of"] * ((hidden_dim + params["multiple_of"] - 1) // params["multiple_of"])
    assert hidden_dim == ffn_dim
    assert llama_config(tmp_path) == config
    if ffn_dim in (11008, 13824, 17920, 22016):  # of the 7B to 65B models; the published files have no multiplier
        assert params["multiple_of"] == 256
        assert "ffn_dim_multiplier" not in params
    published = "dim n_layers n_heads n_kv_heads multiple_of ffn_dim_multiplier norm_eps vocab_size rope_theta"
    assert params.keys() <= set(published.split())


def test_a_vocab_size_of_minus_1_is_that_of_llama_1_and_2(tmp_path):
    assert llama_config(write_raw(tiny_llama(), tmp_path / "raw", vocab_size=-1)).vocab_size == 32000


def test_settings_that_may_be_there_or_not(tmp_path):
    llama = tiny_llama()
    folder = write_raw(llama, tmp_path / "raw", max_seq_len=2048, max_batch_size=1, model_parallel_size=2,
                       use_scaled_rope=False)  # fmt: skip
    check_llama(folder, llama)
    params = json.loads((folder / "params.json").read_text())
    assert params.pop("norm_eps") == 1e-5
    (folder / "params.json").write_text(json.dumps(params))
    check_llama(folder, llama)
    del params["multiple_of"]
    (folder / "params.json").write_text(json.dumps(params))
    assert llama_config(folder).ffn_dim == 256


@pytest.mark.parametrize("changes, word", [
    ({"use_scaled_rope": True}, "use_scaled_rope"),
    ({"dim": -64}, "dim"),
    ({"dim": True}, "dim"),
    ({"dim": 64}, "[32, 32]) from checkpoint, the shape in current model is torch.Size([64, 64])"),
    ({"multiple_of": 256}, "the shape in current model is torch.Size([256, 32])"),
    ({"multiple_of": 0}, "multiple_of"),
    ({"n_heads": 3, "n_kv_heads": 3}, "3 heads"),
    ({"n_heads": 10**9}, "n_heads"),
    ({"n_layers": 1}, "layers"),
    ({"n_layers": 3}, "layers"),
    ({"n_kv_heads": 1}, "wk.weight"),
    ({"n_kv_heads": 3}, "3 groups"),
    ({"norm_eps": "small"}, "norm_eps"),
    ({"vocab_size": 97}, "[97, 32]"),
    ({"ffn_dim_multiplier": 0}, "ffn_dim_multiplier"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_params_of_another_model_are_refused(tmp_path, changes, word):
    folder = write_raw(tiny_llama(), tmp_path / "raw", **changes)
    with refused(folder, word):
        load_llama(folder)


def test_faults_of_params_json_have_their_position(tmp_path):
    path = write_raw(tiny_llama(), tmp_path / "raw") / "params.json"
    for content, words in ((b'{"dim": 64,\n "n_layers": }', ["line 2 column 14"]), (b"[1, 2]", ["JSON list"]),
                           (b'{"dim": "\xff"}', ["JSON"]), (b'{"dim": ' + b"9" * 5000 + b"}", ["JSON"])):  # fmt: skip
        path.write_bytes(content)
        with refused(path, *words):
            load_llama(path.parent)
