"""tools/export.py: what transformers computes from an exported folder, against the run."""

import dataclasses
import json
import random

from functools import partial

import pytest
import torch
import transformers
from conftest import SHARED, VIT, generated as greedy, randomize, tiny_llama, tiny_vit
from PIL import Image

import checkpoint
from common import UserError
from conversation import IMAGE, IMAGE_ID, answer_text, has_ended, render, system_ids, tokenize
from data import scienceqa_question
from demo.world import LLAMA, VISION
from formats.pictures import open_picture
from model import LLaMA, Projection, StreamAttention, position_ids
from tools import export
from vision import normalize, preprocess

pytest.importorskip("tokenizers")
pytest.importorskip("google.protobuf")


def picture(seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", (61, 50), random.Random(seed).randbytes(61 * 50 * 3))


def make_run(root, sp, stage=2, bias=False, dtype=torch.float32, template="vicuna_v0", spare_rows=0):
    """Writes a run directory of tiny random parts and returns its path. spare_rows: rows of the LLaMA without a piece."""
    torch.save({f"visual.{name}": p.detach() for name, p in tiny_vit(-1).named_parameters()}, root / "vit.pt")
    c = dataclasses.replace(tiny_llama().config, vocab_size=sp.vocab_size() + spare_rows)
    llama = {name: p.detach() for name, p in randomize(LLaMA(c), 0).to(dtype).named_parameters()}
    W = {name: p.detach() for name, p in randomize(Projection(VIT.width, c.dim, bias), 2).named_parameters()}
    (root / "tokenizer.model").write_bytes(sp.serialized_model_proto())
    checkpoint.save_llama(c, llama, root)  # the frozen LLaMA of a stage-1 run
    trained = {f"projector.{name}": p for name, p in W.items()}
    if stage == 2:
        trained |= {f"llama.{name}": p for name, p in llama.items()}
    config = {"stage": stage, "llama": str(root), "template": template, "feature_layer": -2}
    checkpoint.save_run(root / "run", c, trained, config, root / "vit.pt", root / "tokenizer.model")
    return root / "run"


def open_export(folder):
    """The model, in which no weight is missing or left over, and the processor."""
    model, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder)


@pytest.fixture(params=[(1, False, 0), (2, True, 0), (2, False, 3)], ids=["stage 1", "bias", "spare rows"])
def exported(request, tmp_path, tiny_tokenizer):
    """run, its model, its tokenizer, the model in transformers, the processor."""
    stage, bias, spare_rows = request.param
    run = make_run(tmp_path, tiny_tokenizer, stage, bias, spare_rows=spare_rows)
    export.export(run, tmp_path / "hf")
    model, sp, _ = checkpoint.load_run(run)
    return model, sp, *open_export(tmp_path / "hf")


PROMPTS = [["<image>\nWhat is it?"], ["What is it?\n<image>", "A cat.", "A mat?"]]


@pytest.mark.parametrize("turns", PROMPTS, ids=["first", "last"])
def test_logits_and_greedy_answers_are_the_runs(exported, turns):
    model, sp, theirs, processor = exported
    image_id, rows = sp.vocab_size(), model.llama.config.vocab_size
    pixels = torch.from_numpy(preprocess(picture(), VIT.image_size))[None]
    ids = torch.from_numpy(tokenize(sp, turns, VIT.n_patches)[0])
    borders = [0, len(ids)]
    inputs = {"input_ids": torch.where(ids == IMAGE_ID, image_id, ids)[None], "pixel_values": normalize(pixels)}
    assert theirs.config.image_token_id == image_id == processor.image_token_id
    with torch.no_grad():
        x = model.llama(model.embed(ids, pixels), position_ids(borders), StreamAttention(borders))
        expected, logits = model.llama.logits(x), theirs(**inputs).logits[0]
    assert logits.shape[1] == max(rows, image_id + 1)
    assert (logits[:, :rows] - expected).abs().max() < 1e-4
    if rows == image_id:
        assert (logits[:, image_id] == logits[:, sp.unk_id()]).all()  # <image> is never the most likely token
    [answer] = greedy(model, ids, borders, pixels, max_new_tokens=12)
    assert theirs.generation_config.suppress_tokens == [image_id]
    generated = theirs.generate(**inputs, max_new_tokens=12, eos_token_id=-1, stop_strings=None)
    assert generated[0, len(ids) :].tolist() == answer


@pytest.mark.parametrize("turns", PROMPTS, ids=["first", "last"])
def test_the_processor_makes_the_prompts_of_this_program(exported, turns):
    _, sp, _, processor = exported
    image_id = sp.vocab_size()
    ids = torch.from_numpy(tokenize(sp, turns, VIT.n_patches)[0])
    messages = [{"role": role, "content": [{"type": "text", "text": text}]}
                for role, text in zip(("user", "assistant") * 2, turns)]  # fmt: skip
    text = {"type": "text", "text": turns[0].replace(IMAGE, "").strip()}
    image = {"type": "image"}
    messages[0]["content"] = [image, text] if turns[0].startswith(IMAGE) else [text, image]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    given = processor(images=picture(), text=prompt, return_tensors="pt")
    assert torch.equal(given["input_ids"], torch.where(ids == IMAGE_ID, image_id, ids)[None]), prompt
    pixels = normalize(torch.from_numpy(preprocess(picture(), VIT.image_size))[None])
    assert (given["pixel_values"] - pixels).abs().max() < 0.05  # one of 256 levels is 0.015


def test_the_demos_answers_end_at_stop(tmp_path):
    """The demo's LLaMA knows the template, so its answers end. Everything goes through the processor."""
    llama = checkpoint.load_llama(LLAMA)
    W = checkpoint.build(llama, checkpoint.load_vision(VISION), seed=0).projector.weight.detach()
    config = {"stage": 1, "llama": str(LLAMA), "template": "vicuna_v0", "feature_layer": -2}
    checkpoint.save_run(tmp_path / "run", llama.config, {"projector.weight": W}, config, VISION, LLAMA / "tokenizer.model")
    export.export(tmp_path / "run", tmp_path / "hf")
    theirs, processor = open_export(tmp_path / "hf")
    model, sp, _ = checkpoint.load_run(tmp_path / "run")
    picture(1).save(tmp_path / "picture.png")
    image = open_picture((tmp_path / "picture.png").read_bytes())
    pixels = torch.from_numpy(preprocess(image, model.vision.config.image_size))[None]
    question = "Describe this picture in short."
    ids = torch.from_numpy(tokenize(sp, [f"<image>\n{question}"], model.vision.config.n_patches)[0])
    *_, [answer] = model.generate(ids, [0, len(ids)], pixels, partial(has_ended, sp), 64)
    assert 2 < len(answer) < 60
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=Image.open(tmp_path / "picture.png"), text=prompt, return_tensors="pt")
    generated = theirs.generate(**inputs, tokenizer=processor.tokenizer)[0, inputs["input_ids"].shape[1] :]
    assert generated.tolist() == answer
    text = processor.decode(generated, skip_special_tokens=True)
    assert text.removesuffix("\n###").strip() == answer_text(sp, answer)


def test_the_tokenizer_of_llama(llama_tokenizer):
    """On real problems, and on random characters of several scripts."""
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(json.dumps(export.tokenizer_json(llama_tokenizer, 32000)))
    texts, rng = [], random.Random(0)
    if (path := SHARED / "scienceqa/problems.json").is_file():
        problems = list(json.loads(path.read_text()).values())[:300]
        texts += [scienceqa_question(problem | {"image_path": None}) for problem in problems]
    ranges = [(32, 127)] * 6 + [(10, 11), (160, 600), (900, 1200), (0x4E00, 0x4F00), (0x1F600, 0x1F640)]
    texts += ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(60)) for _ in range(300)]
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False).ids == llama_tokenizer.encode(text), text
        assert theirs.decode(llama_tokenizer.encode(text)) == text
    prompt = f"{export.SYSTEM}\n\n### Human: {IMAGE}\nWhy?"
    assert theirs.encode(prompt).ids[: len(system_ids(llama_tokenizer))] == system_ids(llama_tokenizer)


def test_the_chat_template_writes_what_render_writes():
    jinja = transformers.utils.chat_template_utils.render_jinja_template
    turns = ["a ### b", "c", "d\ne" + "".join(f" {'#' * n} x{'#' * n}" for n in range(1, 12))]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), turns)]
    text = jinja([messages], chat_template=export.chat_template(), add_generation_prompt=True)[0][0]
    assert text == render(turns)[1]
    messages = [{"role": "system", "content": "Be kind."}, *messages, {"role": "assistant", "content": "f"}]
    text = jinja([messages], chat_template=export.chat_template())[0][0]
    assert text == render([*turns, "f"], system="Be kind.")[1]


def test_runs_that_cannot_be_exported_are_refused(tmp_path, tiny_tokenizer, monkeypatch):
    run = make_run(tmp_path, tiny_tokenizer, template="vicuna_v1")
    with pytest.raises(UserError, match="vicuna_v1"):
        export.export(run, tmp_path / "hf")
    with pytest.raises(UserError, match="exists already"):
        export.export(run, run)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors tokenizers protobuf"):
        export.export(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_export_that_fails_leaves_nothing(tmp_path, tiny_tokenizer, monkeypatch):
    run = make_run(tmp_path, tiny_tokenizer)

    def write_json(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_json", write_json)
    with pytest.raises(UserError, match="hf: could not be written .No space left on device"):
        export.export(run, tmp_path / "hf")
    assert not [path for path in tmp_path.iterdir() if "hf" in path.name]
    monkeypatch.undo()
    export.export(run, tmp_path / "hf")
    assert all(path.stat().st_mode & 0o044 for path in (tmp_path / "hf").iterdir())
