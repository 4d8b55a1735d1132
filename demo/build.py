"""The recipe of the demo's two backbones: a LLaMA with its tokenizer, and a ViT.

The LLaMA learns from text alone. In the place of a picture its texts describe the scene in words, so that it learns to
look things up there. The ViT learns from pictures and captions by contrast, as CLIP does. They train separately: only
stage 1 connects them, by W.

    python -m demo.build                     # replaces the backbones beside this file
    python -m demo.build --out DIR
    python -m demo.build --chat runs/chat    # builds nothing: copies a finished chatbot, and draws a scene to show it
"""

import functools
import io
import math
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python demo/build.py`

from checkpoint import load_run, load_vision, save_llama, save_run
from common import ArgumentParser, UserError, progress_bar, replacing, run_command
from conversation import IMAGE_ID, load_tokenizer, render, system_ids, tokenize
from data import from_caption, from_scienceqa, options_line
from demo import world
from demo.world import ATTRIBUTES, PLACES, Scene, draw_scene, empty_places
from formats.records import LETTERS
from model import LLaMA, LLaMAConfig, causal_attention, position_ids
from vision import VisionConfig, VisionTransformer, normalize

VOCAB, N_BYTES = 1024, 3 + 256  # the first pieces are <unk>, <s>, </s> and the bytes
LLAMA_CONFIG = LLaMAConfig(dim=128, n_layers=4, n_heads=8, n_kv_heads=8, ffn_dim=352, vocab_size=VOCAB, norm_eps=1e-5)
VISION_CONFIG = VisionConfig(image_size=world.PIXELS, patch_size=8, width=128, layers=4)
PATCHES_ACROSS = world.PIXELS // VISION_CONFIG.patch_size  # a row has 6 patches, two for each place
TEXT_LAYERS = 2  # layers of the text encoder that trains the ViT
MUON_LR = 5e-3  # peak learning rate of the matrices in the LLaMA's blocks
VIT_STEPS, VIT_BATCH, VIT_LR = 1000, 128, 1.5e-3
FAMILY = 8  # a ViT batch consists of families, whose scenes differ in one attribute
PATCHES_OF_A_THING = 4  # a place covers 2 x 2 patches
MAX_WORDS = len(ATTRIBUTES) + 1  # the most words at one position of a description

# The words that a question of the world can ask for.
CANDIDATES = (*world.COLOURS, *world.SHAPES, *PLACES, *world.HABITATS, *world.NAMES, *world.GOODS, *world.TEXTS,
              *world.SIZES)  # fmt: skip
DECISIVE = (*CANDIDATES, *world.NUMBERS, "Yes", "No", "Nothing", *LETTERS[:5])  # words that make an answer right
MIX = dict(caption=3, conversation=5, detail=1, reasoning=2, quiz=5, drill=6)  # frequencies of the LLaMA's texts

Description = list[list[tuple[str, float]]]  # of a scene: for each position, words and their weights


# --- texts


def drill_letters(rng: random.Random, most: int, questions: int = 1) -> list[str]:
    """Questions for the letter of one of 2 to `most` options."""
    words = rng.sample(CANDIDATES, rng.randint(2, most))
    asked = rng.choices(range(len(words)), k=questions)
    turns = [(f"Which is {words[i]}?", f"{words[i]}. The answer is {LETTERS[i]}.") for i in asked]
    return with_text(options_line(words), turns)


def drill_facts(rng: random.Random, questions: int = 1) -> list[str]:
    """A text of the quiz, and questions that it answers."""
    problems = world.text_problems(rng.choice(world.SUBJECTS), rng)
    return with_text(problems[0]["hint"], [(p["question"], p["solution"]) for p in problems[:questions]])


def with_text(text: str, turns: list[tuple[str, str]]) -> list[str]:
    """Flattens (question, answer) pairs, with the text before the first question."""
    messages = [message for turn in turns for message in turn]
    return [f"{text}\n{messages[0]}", *messages[1:]]


def draw_conversation(rng: random.Random) -> tuple[list[str], Scene | None]:
    """A conversation about the world, and its scene; `<image>` marks where the scene's description goes."""
    kind = rng.choices(list(MIX), list(MIX.values()))[0]
    if kind == "drill":
        return (drill_letters(rng, 4, 3) if rng.random() < 0.6 else drill_facts(rng, 3)), None
    if kind == "quiz":
        problem, scene = world.quiz_problem(rng)
        record = problem | dict(id="", image_path=problem["image"])
        return from_scienceqa(record, rng).turns, scene
    scene = draw_scene(rng)
    if kind == "caption":
        return from_caption({"image": "picture.png", "caption": world.caption(scene, rng)}, rng).turns, scene
    converse = dict(conversation=world.conversation, detail=world.detail, reasoning=world.reasoning)[kind]
    return world.with_picture(converse(scene, rng), rng), scene


# --- descriptions of a scene in words, in the place of a picture


def describe_in_words(scene: Scene, rng: random.Random) -> Description:
    """Puts one word at each position: things in random order, each starting with its place, repetitions, blanks.

    The words form no sentence, as the patches of a picture, projected by W, form none.
    """
    words = []
    for t in rng.sample(scene, len(scene)):
        words += ["blank"] * rng.choice((0, 0, 1, 2, 4))
        others = [t.size, t.colour, t.shape]
        rng.shuffle(others)
        others += rng.choices([t.size, t.colour, t.shape, t.place], k=rng.randint(0, 4))
        words.append(t.place)
        for word in others:
            if rng.random() < 0.1:
                words.append("blank")
            words.append(word)
    words += ["blank"] * rng.choice((0, 0, 1, 2, 4))
    return [[(word, 1.0)] for word in words]


def describe_in_mixtures(scene: Scene, rng: random.Random) -> Description:
    """Puts a weighted mixture of words at each position, and shuffles the positions of things and of empty places.

    The LLaMA has to understand each position by itself, like a patch. Some mixtures contain a faint word of another
    thing.
    """
    places = rng.choices(empty_places(scene), k=rng.randint(6, 24))
    mixtures = [[("blank", rng.uniform(0.4, 1.2)), (place, rng.uniform(0, 1.2))] for place in places]
    for t in scene:
        for _ in range(rng.randint(3, 6)):
            words = [word for word in vars(t).values() if rng.random() < 0.85] or [t.place]
            mixtures.append([(word, rng.uniform(0.4, 1.2)) for word in words])
    for mixture in mixtures:
        if rng.random() < 0.3:
            other = rng.choice(scene)
            mixture.append((rng.choice(list(vars(other).values())), rng.uniform(0, 0.3)))
    return rng.sample(mixtures, len(mixtures))


def describe_in_sums(scene: Scene, rng: random.Random) -> Description:
    """Puts the sum of a thing's four words at one position."""
    return [[(word, 1.0) for word in vars(t).values()] for t in rng.sample(scene, len(scene))]


class Text(NamedTuple):
    """A training text. The embedding at a position is the weighted sum of the embeddings of its ids."""

    ids: np.ndarray  # (T, MAX_WORDS) int64; the columns after the first hold words of descriptions only
    weights: np.ndarray  # (T, MAX_WORDS) float32, 0 where there is no word
    green: np.ndarray  # (T,) bool


def encode_text(sp: SentencePieceProcessor, turns: list[str], description: Description) -> Text:
    """A conversation with the system message; the description takes the positions of the picture's patches."""
    ids, green = tokenize(sp, turns, len(description))
    return Text(*mix(sp, ids, description), green)


def encode_pieces(sp: SentencePieceProcessor, pieces: list[tuple[int, bool]]) -> Text:
    """(id, green) pairs as a text that is no conversation and has no system message."""
    ids, green = zip(*pieces)
    return Text(*mix(sp, np.array(ids), []), np.array(green))


def mix(sp: SentencePieceProcessor, ids: np.ndarray, description: Description) -> tuple[np.ndarray, np.ndarray]:
    """ids (T,) -> ids and weights (T, MAX_WORDS), with the description at the positions of IMAGE_ID."""
    mixed = np.zeros((len(ids), MAX_WORDS), np.int64)
    weights = np.zeros((len(ids), MAX_WORDS), np.float32)
    mixed[:, 0], weights[:, 0] = ids, 1
    for position, words in zip(np.flatnonzero(ids == IMAGE_ID), description):
        for i, (word, weight) in enumerate(words):
            mixed[position, i] = sp.piece_to_id("\u2581" + word)
            weights[position, i] = weight
    return mixed, weights


# --- the LLaMA's lessons
#
# An attention that looks words up does not form within thousands of steps if the LLaMA trains on all texts from the
# start. It forms within one or two minutes in a lesson of its own, so each lesson teaches one kind of look-up and
# builds on those before. A lesson draws texts; `progress` is the share of its steps that are done, in [0, 1).


def repeat_pieces(sp: SentencePieceProcessor, rng: random.Random, progress: float) -> Text:
    """Random pieces, repeated from a random one on. Green: the pieces whose predecessor occurred before."""
    drawn = rng.sample(range(N_BYTES, VOCAB), rng.randint(4, 10))
    first = rng.randrange(len(drawn))
    again = drawn[first:] + drawn[:first]
    pieces = [(piece, False) for piece in drawn]
    pieces += [(piece, i > 0 and piece != drawn[0]) for i, piece in enumerate(again)]
    return encode_pieces(sp, pieces)


def retell_facts(sp: SentencePieceProcessor, rng: random.Random, progress: float, n: int) -> Text:
    """n facts, then the same in another order and other words. Green: the last word of each repetition."""
    problems = world.text_problems(rng.choice(world.SUBJECTS), rng, n)
    pieces = [(piece, False) for piece in sp.encode(problems[0]["hint"])]
    for problem in problems:
        solution = sp.encode(problem["solution"])
        pieces += [(piece, i == len(solution) - 2) for i, piece in enumerate(solution)]  # a full stop follows
    return encode_pieces(sp, pieces)


def find_letters(sp: SentencePieceProcessor, rng: random.Random, progress: float) -> Text:
    """The letter of an option; and facts, which the lesson before taught."""
    most = 2 if progress < 0.4 else 3 if progress < 0.7 else 5
    turns = drill_letters(rng, most) if rng.random() < 0.7 else drill_facts(rng)
    return encode_text(sp, turns, [])


def find_things(sp: SentencePieceProcessor, rng: random.Random, progress: float) -> Text:
    """The thing with a certain attribute; and letters and facts, which the lessons before taught."""
    draw = rng.random()
    if draw > 0.7:
        return encode_text(sp, drill_letters(rng, 5) if draw < 0.8 else drill_facts(rng), [])
    scene = draw_scene(rng, counts=(2,))
    while True:
        turns = world.with_picture(list(world.question_and_answer(scene, rng)), rng)
        if turns[1].startswith(("It is", "A ")):  # names an attribute
            return encode_text(sp, turns, describe_in_sums(scene, rng))


def read_everything(sp: SentencePieceProcessor, rng: random.Random, progress: float) -> Text:
    turns, scene = draw_conversation(rng)
    if scene is None:
        return encode_text(sp, turns, [])
    describe = describe_in_mixtures if rng.random() < 0.85 else describe_in_words
    return encode_text(sp, turns, describe(scene, rng))


@dataclass(frozen=True)
class Lesson:
    name: str  # seeds its texts
    draw: Callable[[SentencePieceProcessor, random.Random, float], Text]
    steps: int
    batch_size: int
    lr: float  # AdamW's peak
    system: bool = True  # its texts start with the system message
    other_words: float = 0.0  # weight in the loss of the green words that are not DECISIVE
    cosine: bool = False  # lowers the learning rate to its end; the default is a warm-up only


LESSONS = (
    Lesson("repeat", repeat_pieces, steps=600, batch_size=64, lr=4e-3, system=False, other_words=1.0),
    Lesson("facts", functools.partial(retell_facts, n=2), steps=300, batch_size=64, lr=4e-3, system=False),
    Lesson("facts", functools.partial(retell_facts, n=3), steps=250, batch_size=64, lr=4e-3, system=False),
    Lesson("letters", find_letters, steps=400, batch_size=64, lr=2e-3),
    Lesson("scenes", find_things, steps=450, batch_size=64, lr=4e-3),
    Lesson("all", read_everything, steps=3600, batch_size=32, lr=1e-3, other_words=0.1, cosine=True),
)


# --- the tokenizer and the LLaMA


def train_tokenizer(path: Path) -> SentencePieceProcessor:
    """SentencePiece BPE with LLaMA's settings, on the text of 8,000 conversations."""
    rng = random.Random(f"tokenizer {world.SEED}")
    lines = []
    for _ in range(8000):
        turns, scene = draw_conversation(rng)
        text = "".join(render(turns, scene is not None)[:2])
        lines += text.split("\n")  # no piece contains a newline: the tokenizer spells it as a byte
        if scene:
            lines.append(" ".join(word for [(word, _)] in describe_in_words(scene, rng)))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=VOCAB, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
        split_digits=True, user_defined_symbols=["###"] + ["\u2581" + p for p in PLACES if "-" in p],
        required_chars="".join(map(chr, range(33, 127))), minloglevel=2,
    )  # fmt: skip
    with replacing(path) as file:
        file.write(model.getvalue())
    sp = load_tokenizer(path)
    for word in [word for values in ATTRIBUTES.values() for word in values] + ["blank"]:
        assert sp.encode(word) == [sp.piece_to_id("\u2581" + word)] != [sp.unk_id()], f"{word} is not one piece"
    return sp


class PaddedAttention:
    """Computes the same as StreamAttention, by padding the samples to a rectangle of B rows.

    It is faster for many short samples on a CPU. It needs as many key/value heads as query heads.
    """

    def __init__(self, borders: list[int]):
        self.shared = borders[0]
        self.lengths = torch.tensor(borders).diff()  # (B,)
        S, T = self.shared, int(self.lengths.max())
        self.places = (torch.arange(T) < self.lengths[:, None]).nonzero(as_tuple=True)  # row, column of each token
        # Added to the scores: large and negative where a key comes after the query. Padding is at the end of a row.
        self.mask = torch.full((T, S + T), -1e4).triu(S + 1)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """q, k, v (N, H, hd) -> (N, H, hd)."""
        S, B = self.shared, len(self.lengths)
        k_shared, v_shared = (t[:S].transpose(0, 1).expand(B, -1, -1, -1) for t in (k, v))  # (B, H, S, hd) each
        rows_q, rows_k, rows_v = (self.pad(t[S:]) for t in (q, k, v))  # (B, H, T, hd) each
        rows_k, rows_v = torch.cat([k_shared, rows_k], 2), torch.cat([v_shared, rows_v], 2)  # (B, H, S+T, hd) each
        scores = (rows_q / q.shape[-1] ** 0.5) @ rows_k.transpose(2, 3) + self.mask.to(q.dtype)  # (B, H, T, S+T)
        out = (scores.softmax(-1, dtype=q.dtype) @ rows_v).transpose(1, 2)[self.places]  # (N - S, H, hd)
        if S:
            out = torch.cat([causal_attention(q[:S], k[:S], v[:S]), out])  # (N, H, hd)
        return out

    def pad(self, t: torch.Tensor) -> torch.Tensor:
        """(N - S, H, hd) -> (B, H, T, hd), zeros after the end of each sample."""
        rows = t.new_zeros(len(self.lengths), int(self.lengths.max()), *t.shape[1:])
        return rows.index_put(self.places, t).transpose(1, 2)


def new_llama() -> LLaMA:
    torch.manual_seed(world.SEED)
    llama = LLaMA(LLAMA_CONFIG)
    for name, p in llama.named_parameters():
        if "embeddings" in name:
            nn.init.normal_(p, std=0.3)
        elif p.dim() == 2:
            into_residual = name.endswith(("wo.weight", "w2.weight"))
            nn.init.normal_(p, std=p.shape[1] ** -0.5 * (0.35 if into_residual else 1))
    return llama


def warm_up_and_decay(step: int, steps: int) -> float:
    """The factor of the peak learning rate: warm-up over the first 5 % of the steps, half a cosine down to 2 %."""
    warm_up = min(1, (step + 1) / (0.05 * steps))
    return warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train_llama(sp: SentencePieceProcessor) -> LLaMA:
    """A LLaMA that starts from noise and minimises the loss of green tokens, on text alone."""
    llama = new_llama()
    for lesson in LESSONS:
        train_lesson(llama, sp, lesson)
    return llama


def train_lesson(llama: LLaMA, sp: SentencePieceProcessor, lesson: Lesson):
    """Muon trains the matrices of the blocks, AdamW everything else."""
    matrices = [p for p in llama.layers.parameters() if p.dim() == 2]
    others = [p for name, p in llama.named_parameters() if p.dim() != 2 or not name.startswith("layers.")]
    muon = torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.05)
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    word_weights = torch.full((VOCAB,), lesson.other_words)
    word_weights[[sp.piece_to_id("\u2581" + word) for word in DECISIVE]] = 1.0
    shared = len(system_ids(sp)) if lesson.system else 0
    rng = random.Random(f"{lesson.name} {world.SEED}")
    accuracy = 0.0  # mean over about 20 steps
    bar = progress_bar(range(lesson.steps), f"LLaMA, {lesson.name}")
    for step in bar:
        texts = [lesson.draw(sp, rng, step / lesson.steps) for _ in range(lesson.batch_size)]
        loss, right = loss_of_texts(llama, texts, shared, word_weights)
        factor = warm_up_and_decay(step, lesson.steps) if lesson.cosine else min(1, (step + 1) / 40)
        for optimizer, peak in ((muon, MUON_LR), (adamw, lesson.lr)):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.zero_grad()
        loss.backward()
        muon.step()
        adamw.step()
        accuracy += (right - accuracy) / min(step + 1, 20)
        bar.set_postfix(accuracy=f"{accuracy:.3f}", refresh=False)


def loss_of_texts(llama: LLaMA, texts: list[Text], shared: int,
                  word_weights: torch.Tensor) -> tuple[torch.Tensor, float]:  # fmt: skip
    """The weighted mean loss of the green tokens, and the weighted share of them that the LLaMA predicts.

    shared: length of the system message, which starts every text and stands in the stream once.
    """
    parts = [Text(*(array[:shared] for array in texts[0]))]
    parts += [Text(*(array[shared:] for array in text)) for text in texts]
    # (N, MAX_WORDS), (N, MAX_WORDS), (N,)
    ids, weights, green = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts))
    borders = list(accumulate(len(part.ids) for part in parts))
    target = green.nonzero().squeeze(1)  # (M,)
    targets = ids[target, 0]
    with torch.autocast("cpu", torch.bfloat16):
        x = (llama.tok_embeddings(ids) * weights[..., None]).sum(1)  # (N, dim)
        x = llama(x, position_ids(borders), PaddedAttention(borders), wanted=target - 1)  # (M, dim)
        logits = llama.logits(x).float()  # (M, VOCAB)
    importance = word_weights[targets]
    loss = (F.cross_entropy(logits, targets, reduction="none") * importance).sum() / importance.sum()
    right = ((logits.argmax(-1) == targets) * importance).sum() / importance.sum()
    return loss, right.item()


# --- the ViT


class Contrast(nn.Module):
    """The ViT, and what only its training needs: a text encoder and the heads of two contrastive losses.

    The first loss is CLIP's, between the class token and the caption. It does not make a patch represent what it
    shows. The second one does, after FILIP: between the patches of layer -2 and the caption's phrases. The similarity
    of a phrase and a picture is the mean over the patches that are most similar, as many as a thing covers.
    """

    def __init__(self):
        super().__init__()
        width = VISION_CONFIG.width
        self.vit = VisionTransformer(VISION_CONFIG, feature_layer=-1)
        self.vit.ln_post = nn.LayerNorm(width)
        self.vit.proj = nn.Parameter(torch.randn(width, width) / width**0.5)
        for name, p in self.vit.named_parameters():
            if "embedding" in name:
                nn.init.normal_(p, std=0.5)
            elif p.dim() >= 2 and name != "proj":
                nn.init.normal_(p, std=p[0].numel() ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        self.text = LLaMA(replace(LLAMA_CONFIG, n_layers=TEXT_LAYERS))
        nn.init.normal_(self.text.tok_embeddings.weight, std=0.3)
        self.patch_head = nn.Linear(width, width, bias=False)
        self.phrase_head = nn.Linear(width, width, bias=False)
        self.log_scales = nn.Parameter(torch.tensor([2.3, 2.3]))  # of the two losses
        self.outputs = []  # of the last two blocks, (B, P+1, D) each
        for block in list(self.vit.transformer.get_submodule("resblocks").children())[-2:]:
            block.register_forward_hook(lambda block, args, output: self.outputs.append(output))

    def forward(self, pixels: torch.Tensor, captions: list[list[int]],
                phrase_ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The similarities of the two losses, float32, (B, B) each: a row for each picture, a column for each caption.

        pixels (B, 3, size, size) uint8; captions: B lists of ids; phrase_ends (N,) bool over all their tokens.
        """
        self.outputs.clear()
        self.vit(normalize(pixels))
        patches, last = self.outputs[0][:, 1:], self.outputs[1][:, 0]  # (B, P, D), (B, D)
        borders = list(accumulate((len(ids) for ids in captions), initial=0))
        x = self.text.tok_embeddings(torch.tensor([id for ids in captions for id in ids]))  # (N, D)
        x = self.text.norm(self.text(x, position_ids(borders), PaddedAttention(borders)))  # (N, D)
        pictures = F.normalize(self.vit.ln_post(last) @ self.vit.proj, dim=-1)  # type: ignore[operator]  # (B, D)
        texts = F.normalize(x[torch.tensor(borders[1:]) - 1], dim=-1)  # (B, D), at each caption's last token
        by_picture = pictures @ texts.T  # (B, B)
        patches = F.normalize(self.patch_head(patches), dim=-1).flatten(0, 1)  # (B*P, D)
        phrases = F.normalize(self.phrase_head(x[phrase_ends]), dim=-1)  # (phrases, D)
        nearest = (phrases @ patches.T).unflatten(1, (len(captions), -1)).topk(PATCHES_OF_A_THING).values
        nearest = nearest.mean(-1).float()  # (phrases, B)
        n_phrases = [int(phrase_ends[start:end].sum()) for start, end in pairwise(borders)]
        by_phrase = torch.stack([rows.mean(0) for rows in nearest.split(n_phrases)], dim=1)  # (B, B)
        return by_picture.float(), by_phrase


def neighbours(scene: Scene, n: int, rng: random.Random) -> list[Scene]:
    """n scenes, the given one first; the others differ from it in one attribute of one thing."""
    family = [scene]
    while len(family) < n:
        i = rng.randrange(len(scene))
        attribute = rng.choices(list(ATTRIBUTES), (2, 2, 4, 1))[0]  # shapes are the hardest to see
        changed = replace(scene[i], **{attribute: rng.choice(ATTRIBUTES[attribute])})
        other = world.in_order([*scene[:i], changed, *scene[i + 1 :]])
        if world.is_scene(other) and not world.is_held_out(other) and other not in family:
            family.append(other)
    return family


def pixels_of(scenes: Iterable[Scene], rng: random.Random) -> torch.Tensor:
    """(B, 3, size, size) uint8."""
    pictures = np.stack([np.asarray(world.draw_picture(scene, rng)) for scene in scenes])  # (B, size, size, 3)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def train_vit(sp: SentencePieceProcessor) -> dict[str, torch.Tensor]:
    """A ViT that starts from noise; its state dict has OpenAI's names and includes ln_post and proj."""
    torch.manual_seed(world.SEED)
    rng = random.Random(f"vit {world.SEED}")
    model = Contrast()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    after_phrase = [sp.encode("top" + mark)[1] for mark in (",", " and", ".")]  # the token that follows a phrase
    mean_loss = None
    bar = progress_bar(range(VIT_STEPS), "ViT")
    for step in bar:
        counts = (1,) if step < 0.1 * VIT_STEPS else (1, 2, 2, 3, 3)
        families = [neighbours(draw_scene(rng, counts=counts), FAMILY, rng) for _ in range(VIT_BATCH // FAMILY)]
        scenes = [scene for family in families for scene in family]
        pixels = pixels_of(scenes, rng)
        texts = [f"{world.caption(s, rng)[:-1]} and nothing at the {rng.choice(empty_places(s))}." for s in scenes]
        captions = [sp.encode(text) for text in texts]
        phrase_ends = torch.tensor([following in after_phrase for ids in captions for following in [*ids[1:], 0]])
        with torch.autocast("cpu", torch.bfloat16):
            similarities = model(pixels, captions, phrase_ends)
        loss, pairs = torch.zeros(()), torch.arange(len(scenes))  # picture i belongs to caption i
        for similarity, scale in zip(similarities, model.log_scales.exp().clamp(max=100)):
            rows, columns = scale * similarity, scale * similarity.T
            loss = loss + (F.cross_entropy(rows, pairs) + F.cross_entropy(columns, pairs)) / 4
        lr = VIT_LR * warm_up_and_decay(step, VIT_STEPS)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        accuracy = [f"{(similarity.argmax(1) == pairs).float().mean():.0%}" for similarity in similarities]
        mean_loss = loss.item() if mean_loss is None else 0.95 * mean_loss + 0.05 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.3f}", accuracy="/".join(accuracy), lr=f"{lr:.1e}", refresh=False)
    return {f"visual.{name}": p.detach() for name, p in model.vit.state_dict().items()}


def probe(path: Path, n: int = 600) -> dict[str, float]:
    """How well a linear map reads a thing from one patch of layer -2: the share right on held-out scenes, by attribute.

    Fits least squares on the patches of n pictures that a thing covers, and tests on those of n others.
    """
    vit, rng = load_vision(path), random.Random("probe")
    places = [PLACES[row // 2 * 3 + column // 2] for row, column in np.ndindex(PATCHES_ACROSS, PATCHES_ACROSS)]
    features, things = [], []  # of the training scenes, then of the held-out ones
    for held_out in (False, True):
        scenes = [draw_scene(rng, held_out) for _ in range(n)]
        with torch.no_grad():
            Z_v = vit(normalize(pixels_of(scenes, rng))).flatten(0, 1)  # (n*P, D)
        shown = [next((t for t in scene if t.place == place), None) for scene in scenes for place in places]
        Z_v = Z_v[torch.tensor([thing is not None for thing in shown])]
        features.append(torch.cat([Z_v, torch.ones(len(Z_v), 1)], dim=1))  # (patches of things, D+1), 1 for a bias
        things.append([thing for thing in shown if thing])
    right = {}
    for attribute, values in ATTRIBUTES.items():
        targets, truth = (torch.tensor([values.index(getattr(thing, attribute)) for thing in part]) for part in things)
        weights = torch.linalg.lstsq(features[0], torch.eye(len(values))[targets]).solution
        right[attribute] = ((features[1] @ weights).argmax(1) == truth).float().mean().item()
    return right


def build(folder: Path):
    """Trains both backbones from nothing and writes them into `folder`, in the published formats."""
    sp = train_tokenizer(folder / world.LLAMA.name / "tokenizer.model")
    weights = {name: p.detach().half() for name, p in train_llama(sp).named_parameters()}
    save_llama(LLAMA_CONFIG, weights, folder / world.LLAMA.name)
    with replacing(folder / world.VISION.name) as file:
        torch.save({name: p.half() for name, p in train_vit(sp).items()}, file)
    shares = probe(folder / world.VISION.name)
    print("linear probe of single patches, layer -2:", ", ".join(f"{k} {100 * v:.1f} %" for k, v in shares.items()))


def keep_chat(run: Path, folder: Path):
    """Copies a finished chatbot of the demo to `folder`/chat, with fp16 weights, and draws `folder`/scene.png."""
    model, _, config = load_run(run, torch.float16, trained_by="torchrun train.py --stage 2", stage=2)
    if not config["settings"].get("demo"):
        raise UserError(f"{run}: not a run of the demo; train one with: torchrun train.py --stage 2")
    trained = {name: p.detach().half() for name, p in model.named_parameters() if not name.startswith("vision.")}
    save_run(folder / world.CHAT.name, model.llama.config, trained, config, world.VISION, run / "tokenizer.model")
    rng = random.Random("scene 3685")  # three things without a common colour or shape
    with replacing(folder / world.SCENE.name) as file:
        world.draw_picture(draw_scene(rng, held_out=True, counts=(3,)), rng).save(file, "PNG")


def main():
    parser = ArgumentParser(__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR", help="where to write them")
    parser.add_argument("--chat", type=Path, metavar="RUN", help="a finished chatbot to copy; then nothing is built")
    args = parser.parse_args()
    if args.chat:
        keep_chat(args.chat, args.out)
    else:
        build(args.out)


if __name__ == "__main__":
    run_command(main)
