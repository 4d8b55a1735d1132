"""convert.py: what it writes, as `transformers` reads it, against the run that it came from."""

import json
import random

import pytest
import torch
import transformers
from conftest import SHARED, VIT, randomize, tiny_llama, tiny_vit
from PIL import Image

import checkpoint
import convert
import demo
from conversation import IMAGE, IMAGE_ID, UserError, stop_ids, surface, system_ids, tokenize
from data import scienceqa_question
from model import LLaMA, LLaVA, Projection, flat_attention, positions
from vision import normalize, open_picture, preprocess

pytest.importorskip("tokenizers")
pytest.importorskip("google.protobuf")


def picture(seed: int = 0) -> Image.Image:
    return Image.frombytes("RGB", (61, 50), random.Random(seed).randbytes(61 * 50 * 3))


def make_run(root, sp, stage=2, bias=False, dtype=torch.float32, template="vicuna_v0", spare=0):
    """A run directory of tiny random parts -> its path. spare: rows of the LLaMA that no piece has."""
    torch.save({f"visual.{name}": p.detach() for name, p in tiny_vit(-1).named_parameters()}, root / "vit.pt")
    config = checkpoint.dataclasses.replace(tiny_llama().config, vocab_size=sp.vocab_size() + spare)
    llama = randomize(LLaMA(config), 0).to(dtype)
    llava = LLaVA(llama, tiny_vit(), randomize(Projection(VIT.width, config.dim, bias), 2))
    (root / "tokenizer.model").write_bytes(sp.serialized_model_proto())
    checkpoint.save_llama(llama, root)  # of stage 1, this is where the LLaMA is
    settings = {"vision": str(root / "vit.pt"), "llama": str(root), "template": template}
    checkpoint.save_run(root / "run", llava, settings, root / "tokenizer.model", stage)
    return root / "run"


def opened(folder):
    """The model, the processor. Nothing may be missing or left over."""
    model, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("stage, bias, spare", [(1, False, 0), (2, True, 0), (2, False, 3)])
def test_logits_and_answers_are_the_runs(tmp_path, tiny_tokenizer, stage, bias, spare):
    run = make_run(tmp_path, tiny_tokenizer, stage, bias, spare=spare)
    convert.export(run, tmp_path / "hf")
    theirs, processor = opened(tmp_path / "hf")
    ours, sp, _ = checkpoint.load_run(run)
    size, rows = VIT.image_size, sp.vocab_size()
    pixels = preprocess(picture(), size)[None]
    for turns in (["<image>\nWhat is it?"], ["What is it?\n<image>", "A cat.", "A mat?"]):
        ids = torch.from_numpy(tokenize(sp, turns, VIT.n_patches)[0])
        borders = torch.tensor([0, len(ids)], dtype=torch.int32)
        inputs = dict(input_ids=torch.where(ids == IMAGE_ID, rows, ids)[None], pixel_values=normalize(pixels))
        assert theirs.config.image_token_id == rows == processor.image_token_id
        with torch.no_grad():
            x = ours.llama(ours.embed(ids, pixels), positions(borders), flat_attention(2, borders))
            wanted, got = ours.llama.logits(x), theirs(**inputs).logits[0]
        assert got.shape[1] == rows + max(1, spare)
        assert (got[:, : rows + spare] - wanted).abs().max() < 1e-4
        if not spare:
            assert (got[:, rows] == got[:, 0]).all()  # `<image>` is no likelier than <unk>
        answer = ours.answers(ids, borders, pixels, (), 12)[0]
        assert rows not in answer  # by its weights it may be said; suppress_tokens forbids it there
        said = theirs.generate(**inputs, max_new_tokens=12, eos_token_id=-1, stop_strings=None)
        assert said[0, len(ids) :].tolist() == answer

        messages = [dict(role=role, content=[dict(type="text", text=text)])
                    for role, text in zip(("user", "assistant") * 2, turns)]  # fmt: skip
        text, first = {"type": "text", "text": turns[0].replace(IMAGE, "").strip()}, turns[0].startswith(IMAGE)
        messages[0]["content"] = [{"type": "image"}, text] if first else [text, {"type": "image"}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        given = processor(images=picture(), text=prompt, return_tensors="pt")
        assert torch.equal(given["input_ids"], inputs["input_ids"]), prompt
        assert (given["pixel_values"] - inputs["pixel_values"]).abs().max() < 0.05  # a level of 256 is 0.015


def test_the_demos_answers_end_with_stop(tmp_path, capsys):
    """Of the demo's own backbones, whose LLaMA knows the template: through the processor, the whole way."""
    llama = checkpoint.load_llama(demo.LLAMA)
    llava = checkpoint.build(llama, checkpoint.load_vision(demo.VISION), seed=0)
    settings = {"vision": str(demo.VISION), "llama": str(demo.LLAMA), "template": "vicuna_v0"}
    checkpoint.save_run(tmp_path / "run", llava, settings, demo.LLAMA / "tokenizer.model", 1)
    convert.export(tmp_path / "run", tmp_path / "hf")
    theirs, processor = opened(tmp_path / "hf")
    ours, sp, _ = checkpoint.load_run(tmp_path / "run")
    n, size = ours.vision.config.n_patches, ours.vision.config.image_size
    picture(1).save(tmp_path / "picture.png")
    pixels = preprocess(open_picture((tmp_path / "picture.png").read_bytes()), size)[None]
    question = "Describe this picture in short."
    ids = torch.from_numpy(tokenize(sp, [f"<image>\n{question}"], n)[0])
    answer = ours.answers(ids, torch.tensor([0, len(ids)], dtype=torch.int32), pixels, stop_ids(sp), 64)[0]
    assert 2 < len(answer) < 60  # it has ended by itself
    messages = [dict(role="user", content=[{"type": "image"}, {"type": "text", "text": question}])]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=Image.open(tmp_path / "picture.png"), text=prompt, return_tensors="pt")
    said = theirs.generate(**inputs, tokenizer=processor.tokenizer)[0, inputs["input_ids"].shape[1] :]
    assert said.tolist() == answer + stop_ids(sp)
    text = processor.decode(said, skip_special_tokens=True)
    assert text.removesuffix("\n###").strip() == surface(sp, answer).strip()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [10**9, 50_000])
def test_what_is_exported_is_read_back_bit_for_bit(tmp_path, tiny_tokenizer, dtype, shard, monkeypatch, capsys):
    monkeypatch.setattr(convert, "SHARD", shard)
    run = make_run(tmp_path, tiny_tokenizer, bias=True, dtype=dtype)
    convert.export(run, tmp_path / "hf")
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard == 50_000)
    convert.import_llava(tmp_path / "hf", tmp_path / "again")
    before, after = (checkpoint.load_run(path, None)[0] for path in (run, tmp_path / "again"))
    for name, p in before.named_parameters():
        q = after.get_parameter(name)
        if name in ("llama.tok_embeddings.weight", "llama.output.weight"):
            q = q[:-1]  # that of `<image>`
        assert q.dtype == p.dtype and torch.equal(q, p), name
    assert after.vision.feature_layer == before.vision.feature_layer
    convert.export(tmp_path / "again", tmp_path / "hf2")  # now with a row to spare: nothing grows any more
    convert.import_llava(tmp_path / "hf2", tmp_path / "third")
    for name in ("consolidated.00.pth", "projector.pth", "vision.pth"):
        assert (tmp_path / "third" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_the_tokenizer_of_llama(llama_tokenizer):
    """On real problems, and on texts of random characters of many scripts."""
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_str(json.dumps(convert.for_tokenizers(llama_tokenizer, 32000)))
    texts, dice = [], random.Random(0)
    if (path := SHARED / "scienceqa/problems.json").is_file():
        problems = list(json.loads(path.read_text()).values())[:300]
        texts += [scienceqa_question(problem | {"image_path": None}) for problem in problems]
    ranges = [(32, 127)] * 6 + [(10, 11), (160, 600), (900, 1200), (0x4E00, 0x4F00), (0x1F600, 0x1F640)]
    texts += ["".join(chr(dice.randrange(*dice.choice(ranges))) for _ in range(60)) for _ in range(300)]
    for text in texts:
        assert theirs.encode(text, add_special_tokens=False).ids == llama_tokenizer.encode(text), text
        assert theirs.decode(llama_tokenizer.encode(text)) == text
    start = f"{convert.SYSTEM}\n\n### Human: {IMAGE}\nWhy?"
    assert theirs.encode(start).ids[: len(system_ids(llama_tokenizer))] == system_ids(llama_tokenizer)


def test_the_chat_template_is_the_conversations(tmp_path, tiny_tokenizer):
    from conversation import render

    jinja = transformers.utils.chat_template_utils.render_jinja_template
    turns = ["a ### b", "c", "d\ne" + "".join(f" {'#' * n} x{'#' * n}" for n in range(1, 12))]
    messages = [dict(role=role, content=text) for role, text in zip(("user", "assistant", "user"), turns)]
    text = jinja([messages], chat_template=convert.chat_template(), add_generation_prompt=True)[0][0]
    assert text == render(turns)[0][0]
    messages = [dict(role="system", content="Be kind."), *messages, dict(role="assistant", content="f")]
    text = jinja([messages], chat_template=convert.chat_template())[0][0]
    assert text == render([*turns, "f"], system="Be kind.")[0][0]


def test_what_cannot_be_exported(tmp_path, tiny_tokenizer, monkeypatch):
    run = make_run(tmp_path, tiny_tokenizer, template="vicuna_v1")
    with pytest.raises(UserError, match="vicuna_v1"):
        convert.export(run, tmp_path / "hf")
    with pytest.raises(UserError, match="is there already"):
        convert.export(run, run)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors tokenizers protobuf"):
        convert.export(run, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_an_export_that_fails_leaves_nothing(tmp_path, tiny_tokenizer, monkeypatch):
    run = make_run(tmp_path, tiny_tokenizer)
    real = checkpoint.write_json

    def full(path, data):
        if path.name == "generation_config.json":
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(checkpoint, "write_json", full)
    with pytest.raises(UserError, match="No space left on device"):
        convert.export(run, tmp_path / "hf")
    assert not [path for path in tmp_path.iterdir() if "hf" in path.name]
    monkeypatch.undo()
    convert.export(run, tmp_path / "hf")
    assert all(path.stat().st_mode & 0o044 for path in (tmp_path / "hf").iterdir())
