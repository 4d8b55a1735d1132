"""The recipe of the demo's two backbones: a LLaMA with its tokenizer, and a ViT.

The LLaMA learns from text alone. In the place of a picture its texts describe the scene in words, so that it learns to
look things up there. The ViT learns from the demo's pictures and captions by contrast, as CLIP does, and predicts what
each patch of other pictures shows. Both see more than the demo's scenes (wide.py), so that they suit other pictures and
words, too. They train separately, in two processes with one thread each: only stage 1 connects them, by W.

    python -m demo.build                     # replaces the backbones in demo/
    python -m demo.build --out DIR
    python -m demo.build --chat runs/chat    # builds nothing: copies a finished chatbot, and draws a scene to show it
"""

import functools
import io
import math
import multiprocessing
import random
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python demo/build.py`

from checkpoint import load_run, load_vision, save_llama, save_run
from common import ArgumentParser, UserError, progress_bar, replacing, run_command
from conversation import IMAGE_ID, load_tokenizer, render, system_ids, tokenize
from data import from_caption, from_scienceqa, options_line
from demo import wide, world
from demo.wide import Shown
from demo.world import ABSENT, ATTRIBUTES, PLACES, Scene, Thing, draw_scene, empty_places
from formats.records import LETTERS
from model import LLaMA, LLaMAConfig, causal_attention, position_ids
from vision import VisionConfig, VisionTransformer, normalize

VOCAB, N_BYTES = 1152, 3 + 256  # the first pieces are <unk>, <s>, </s> and the bytes
LLAMA_CONFIG = LLaMAConfig(dim=128, n_layers=4, n_heads=8, n_kv_heads=8, ffn_dim=352, vocab_size=VOCAB, norm_eps=1e-5)
VISION_CONFIG = VisionConfig(image_size=world.PIXELS, patch_size=world.PATCH, width=128, layers=5)
TEXT_LAYERS = 2  # layers of the text encoder that trains the ViT
VIT_STEPS, VIT_LR, VIT_MUON_LR = 3600, 1.5e-3, 1.5e-2
VIT_BATCH, WIDE_BATCH = 32, 128  # pictures of a step: the demo's, and wide.py's
FAMILY = 8  # the demo's pictures of a step are families, whose scenes differ in one attribute
PATCHES_OF_A_THING = 4  # a place covers 2 x 2 patches
COARSE = 4  # pixels across a patch that the patch loss predicts
MAX_WORDS = len(wide.ATTRIBUTES) + 1  # the most words at one position of a description

# The words that a question can ask for.
CANDIDATES = (*world.COLOURS, *world.SHAPES, *PLACES, *world.HABITATS, *world.NAMES, *world.GOODS, *world.TEXTS,
              *world.SIZES)  # fmt: skip
OTHER_ANSWERS = ("above", "below", "bigger", "smaller", "none")
SCENE_WORDS = tuple(dict.fromkeys((*(word for values in wide.ATTRIBUTES.values() for word in values), *ABSENT)))
SPELLINGS = ("gray", "center", "Gray", "Center",
             *(word.capitalize() for word in (*wide.COLOURS, *wide.OUTLINES, *PLACES)))  # fmt: skip
SINGLE_PIECES = tuple(dict.fromkeys((*SCENE_WORDS, *CANDIDATES, *SPELLINGS, *OTHER_ANSWERS, "blank")))
# Words that make an answer right.
DECISIVE = (*CANDIDATES, *SCENE_WORDS, *SPELLINGS, *OTHER_ANSWERS, *wide.NUMBER_WORDS,
            *(word.capitalize() for word in wide.NUMBER_WORDS), *"01234", *LETTERS[:4], "Yes", "No", "Nothing", "I",
            "yes", "no", "nothing")  # fmt: skip
# Frequencies of texts: of all kinds, and mostly of chats.
MIX = dict(caption=3, conversation=4, detail=2, reasoning=2, quiz=5, drill=6, wide=8)
CHAT_MIX = dict(caption=1, conversation=10, detail=1, reasoning=1, quiz=4, drill=4, wide=5)

Description = list[list[tuple[str, float]]]  # of a scene: for each position, words and their weights


# --- texts


def drill_letters(rng: random.Random, most: int, questions: int = 1) -> list[str]:
    """Questions for the letter of one of 2 to `most` options."""
    words = rng.sample(CANDIDATES, rng.randint(2, most))
    asked = rng.choices(range(len(words)), k=questions)
    turns = [(f"Which option is {words[i]}?", f"{words[i]}. The answer is {LETTERS[i]}.") for i in asked]
    return with_text(options_line(words), turns)


def drill_facts(rng: random.Random, questions: int = 1) -> list[str]:
    """A text of the quiz, and questions that it answers."""
    problems = world.text_problems(rng.choice(world.SUBJECTS), rng)
    return with_text(problems[0]["hint"], [(p["question"], p["solution"]) for p in problems[:questions]])


def with_text(text: str, turns: list[tuple[str, str]]) -> list[str]:
    """Flattens (question, answer) pairs, with the text before the first question."""
    messages = [message for turn in turns for message in turn]
    return [f"{text}\n{messages[0]}", *messages[1:]]


def draw_conversation(rng: random.Random, frequencies: dict[str, int]) -> tuple[list[str], Scene | None]:
    """A conversation about the world, and its scene; `<image>` marks where the scene's description goes.

    frequencies: of its kinds.
    """
    kind = rng.choices(list(frequencies), list(frequencies.values()))[0]
    if kind == "drill":
        return (drill_letters(rng, 4, 3) if rng.random() < 0.6 else drill_facts(rng, 3)), None
    if kind == "quiz":
        problem, scene = world.quiz_problem(rng)
        record = problem | dict(id="", image_path=problem["image"])
        return from_scienceqa(record, rng).turns, scene
    if kind == "wide":
        wide_scene = wide.draw_scene(rng, nouns=0.3)
        if rng.random() < 0.2:
            record = {"image": "picture.png", "caption": world.caption(wide_scene, rng)}
            return from_caption(record, rng).turns, wide_scene
        return world.with_picture(wide.conversation(wide_scene, rng), rng), wide_scene
    scene = draw_scene(rng)
    if kind == "caption":
        return from_caption({"image": "picture.png", "caption": world.caption(scene, rng)}, rng).turns, scene
    turns = world.conversation(scene, world.draw_kinds(kind, rng), rng)
    return world.with_picture(world.messages_of(turns), rng), scene


# --- descriptions of a scene in words, in the place of a picture


def words_of(thing: Thing) -> list[str]:
    return list(vars(thing).values())


def describe_in_words(scene: Scene, rng: random.Random) -> Description:
    """Puts one word at each position: things in random order, each starting with its place, repetitions, blanks.

    The words form no sentence, as the patches of a picture, projected by W, form none.
    """
    words = []
    for t in rng.sample(scene, len(scene)):
        words += ["blank"] * rng.choice((0, 0, 1, 2, 4))
        others = [word for word in words_of(t) if word != t.place]
        rng.shuffle(others)
        others += rng.choices(words_of(t), k=rng.randint(0, 4))
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
            words = [word for word in words_of(t) if rng.random() < 0.85] or [t.place]
            mixtures.append([(word, rng.uniform(0.4, 1.2)) for word in words])
    for mixture in mixtures:
        if rng.random() < 0.3:
            other = rng.choice(scene)
            mixture.append((rng.choice(words_of(other)), rng.uniform(0, 0.3)))
    return rng.sample(mixtures, len(mixtures))


def describe_in_sums(scene: Scene, rng: random.Random) -> Description:
    """Puts the sum of a thing's words at one position."""
    return [[(word, 1.0) for word in words_of(t)] for t in rng.sample(scene, len(scene))]


class Text(NamedTuple):
    """A training text. The embedding at a position is the weighted sum of the embeddings of its ids."""

    ids: np.ndarray  # (T, MAX_WORDS) int64; the columns after the first hold words of descriptions only
    weights: np.ndarray  # (T, MAX_WORDS) float32, 0 where there is no word
    green: np.ndarray  # (T,) bool


def encode_text(sp: SentencePieceProcessor, turns: list[str], description: Description) -> Text:
    """A conversation with the system message; the description takes the positions of the picture's patches."""
    ids, green = tokenize(sp, turns, len(description))
    return Text(*mix(sp, ids, description), green)


def encode_pieces(sp: SentencePieceProcessor, pieces: list[tuple[int, bool]], description: Description) -> Text:
    """(id, green) pairs after a description, as a text that is no conversation and has no system message."""
    ids, green = zip(*([(IMAGE_ID, False)] * len(description) + pieces))
    return Text(*mix(sp, np.array(ids), description), np.array(green))


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
# start. It forms within a few minutes in a lesson of its own, so each lesson teaches one kind of look-up and builds on
# those before. A lesson draws texts; `progress` is the share of its steps that are done, in [0, 1].


def repeat_pieces(sp: SentencePieceProcessor, rng: random.Random, progress: float) -> Text:
    """Random pieces, repeated from a random one on. Green: the pieces whose predecessor occurred before."""
    drawn = rng.sample(range(N_BYTES, VOCAB), rng.randint(4, 10))
    first = rng.randrange(len(drawn))
    again = drawn[first:] + drawn[:first]
    pieces = [(piece, False) for piece in drawn]
    pieces += [(piece, i > 0 and piece != drawn[0]) for i, piece in enumerate(again)]
    return encode_pieces(sp, pieces, [])


def retell_facts(sp: SentencePieceProcessor, rng: random.Random, progress: float, n: int) -> Text:
    """n facts, then the same facts in another order; those of social science are reworded.

    Green: the last word of each repetition.
    """
    problems = world.text_problems(rng.choice(world.SUBJECTS), rng, n)
    pieces = [(piece, False) for piece in sp.encode(problems[0]["hint"])]
    for problem in problems:
        solution = sp.encode(problem["solution"])
        pieces += [(piece, i == len(solution) - 2) for i, piece in enumerate(solution)]  # a full stop follows
    return encode_pieces(sp, pieces, [])


def find_letters(sp: SentencePieceProcessor, rng: random.Random, progress: float) -> Text:
    """The letter of an option; and facts, which the lesson before taught."""
    most = 2 if progress < 0.4 else 3 if progress < 0.7 else 4
    turns = drill_letters(rng, most) if rng.random() < 0.7 else drill_facts(rng)
    return encode_text(sp, turns, [])


def find_things(sp: SentencePieceProcessor, rng: random.Random, progress: float) -> Text:
    """Questions for attributes of two or three things, without the marks of a conversation. Green: the answers.

    Of three things, two have the same colour or the same shape. Some texts practise the lessons before.
    """
    if rng.random() < 0.25:
        return find_letters(sp, rng, 1) if rng.random() < 0.5 else retell_facts(sp, rng, 1, n=3)
    n = 2 if progress < 0.3 else 3
    is_wide = rng.random() < 0.5
    while True:
        scene = wide.draw_scene(rng, (n,), nouns=0.3) if is_wide else draw_scene(rng, counts=(n,))
        if len({t.colour for t in scene}) + len({t.shape for t in scene}) < 6:
            break
    pieces, asked = [(sp.bos_id(), False)], set()
    while len(asked) < 6:
        if is_wide:
            asks = rng.choice((wide.ask_attribute, wide.ask_choice))
            question, _, answer = asks(scene, rng)  # type: ignore[arg-type]
        else:
            question, answer, _ = world.short_question(scene, rng)
        if question not in asked and answer.startswith(("It is", "A ", "The ")):  # names an attribute or a relation
            asked.add(question)
            pieces += [(piece, False) for piece in sp.encode(question)]
            pieces += [(piece, True) for piece in sp.encode(answer)]
    return encode_pieces(sp, pieces, describe_in_sums(scene, rng))


def read_everything(sp: SentencePieceProcessor, rng: random.Random, progress: float) -> Text:
    """A text of any kind; in the second half of the lesson, mostly of chats."""
    turns, scene = draw_conversation(rng, MIX if progress < 0.5 else CHAT_MIX)
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
    muon_lr: float = 1e-2  # Muon's peak
    system: bool = True  # all of its texts start with the system message
    other_words: float = 0.0  # weight in the loss of the green words that are not DECISIVE
    decays: bool = True  # lowers the learning rate to its end; otherwise it stays constant after a warm-up


LESSONS = (
    Lesson("repeat", repeat_pieces, steps=600, batch_size=64, lr=4e-3, system=False, other_words=1.0, decays=False),
    Lesson("facts", functools.partial(retell_facts, n=2), steps=900, batch_size=64, lr=4e-3, muon_lr=5e-3,
           system=False, decays=False),
    Lesson("more facts", functools.partial(retell_facts, n=3), steps=500, batch_size=64, lr=4e-3, muon_lr=5e-3,
           system=False, decays=False),
    Lesson("letters", find_letters, steps=500, batch_size=64, lr=2e-3, muon_lr=5e-3, decays=False),
    Lesson("scenes", find_things, steps=800, batch_size=32, lr=4e-3, system=False),
    Lesson("all", read_everything, steps=2400, batch_size=32, lr=1e-3, muon_lr=5e-3, other_words=0.1),
)  # fmt: skip


# --- the tokenizer and the LLaMA


def train_tokenizer(path: Path):
    """Writes a SentencePiece BPE model with LLaMA's settings, trained on the text of 8,000 conversations."""
    rng = random.Random(f"tokenizer {world.SEED}")
    lines = []
    for _ in range(8000):
        turns, scene = draw_conversation(rng, MIX)
        text = "".join(render(turns, scene is not None)[:2])
        lines += text.split("\n")  # no piece contains a newline: the tokenizer spells it as a byte
        if scene:
            lines.append(" ".join(word for [(word, _)] in describe_in_words(scene, rng)))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=VOCAB, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True, remove_extra_whitespaces=False,
        split_digits=True, user_defined_symbols=["###", *("\u2581" + word for word in SINGLE_PIECES)],
        required_chars="".join(map(chr, range(33, 127))), minloglevel=2,
    )  # fmt: skip
    with replacing(path) as file:
        file.write(model.getvalue())
    sp = load_tokenizer(path)
    for word in SINGLE_PIECES:
        assert sp.encode(word) == [sp.piece_to_id("\u2581" + word)] != [sp.unk_id()], f"{word} is not one piece"


class PaddedAttention:
    """Computes the same as StreamAttention, by padding groups of neighbouring samples to rectangles.

    It is faster for many short samples on a CPU, most of all if neighbours have similar lengths. It needs as many
    key/value heads as query heads.
    """

    ROWS = 8  # samples of a rectangle

    def __init__(self, borders: list[int]):
        self.shared = borders[0]
        self.rectangles = []  # for each: its slice of the stream; row and column of each token; the mask
        for first in range(0, len(borders) - 1, self.ROWS):
            ends = borders[first : first + self.ROWS + 1]
            lengths = torch.tensor(ends).diff()  # (B,)
            S, T = self.shared, int(lengths.max())
            places = (torch.arange(T) < lengths[:, None]).nonzero(as_tuple=True)
            # Added to the scores: large and negative where a key comes after the query. Padding is at the end of a row.
            mask = torch.full((T, S + T), -1e4).triu(S + 1)
            self.rectangles.append((slice(ends[0], ends[-1]), len(lengths), places, mask))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """q, k, v (N, H, hd) -> (N, H, hd)."""
        S, outs = self.shared, []
        if S:
            outs.append(causal_attention(q[:S], k[:S], v[:S]))
        for part, B, places, mask in self.rectangles:
            T = len(mask)
            k_shared, v_shared = (t[:S].transpose(0, 1).expand(B, -1, -1, -1) for t in (k, v))  # (B, H, S, hd) each
            rows_q, rows_k, rows_v = (  # (B, H, T, hd) each, zeros after the end of each sample
                t.new_zeros(B, T, *t.shape[1:]).index_put(places, t[part]).transpose(1, 2) for t in (q, k, v)
            )
            rows_k, rows_v = torch.cat([k_shared, rows_k], 2), torch.cat([v_shared, rows_v], 2)  # (B, H, S+T, hd) each
            scores = (rows_q / q.shape[-1] ** 0.5) @ rows_k.transpose(2, 3) + mask.to(q.dtype)  # (B, H, T, S+T)
            outs.append((scores.softmax(-1, dtype=q.dtype) @ rows_v).transpose(1, 2)[places])
        return torch.cat(outs)  # (N, H, hd)


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


def train_llama(tokenizer: Path) -> LLaMA:
    """A LLaMA that starts from noise and minimises the loss of green tokens, on text alone."""
    llama, sp = new_llama(), load_tokenizer(tokenizer)
    for lesson in LESSONS:
        train_lesson(llama, sp, lesson)
    return llama


def make_optimizers(model: nn.Module, blocks: tuple[str, ...],
                    weight_decay: float) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:  # fmt: skip
    """Returns Muon for the matrices whose names start with one of `blocks`, and AdamW for everything else.

    weight_decay: of AdamW.
    """
    in_blocks = {p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith(blocks)}
    others = [p for p in model.parameters() if p not in in_blocks]
    matrices = [p for p in model.parameters() if p in in_blocks]
    muon = torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.05)
    return muon, torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=weight_decay)


def train_lesson(llama: LLaMA, sp: SentencePieceProcessor, lesson: Lesson):
    muon, adamw = make_optimizers(llama, ("layers.",), weight_decay=0.0)
    word_weights = torch.full((VOCAB,), lesson.other_words)
    word_weights[[sp.encode(word)[-1] for word in DECISIVE]] = 1.0
    shared = len(system_ids(sp)) if lesson.system else 0
    rng = random.Random(f"{lesson.name} {world.SEED}")
    accuracy = 0.0  # mean over about 20 steps
    bar = progress_bar(range(lesson.steps), f"LLaMA, {lesson.name}")
    for step in bar:
        texts = [lesson.draw(sp, rng, step / lesson.steps) for _ in range(lesson.batch_size)]
        loss, right = loss_of_texts(llama, texts, shared, word_weights)
        factor = warm_up_and_decay(step, lesson.steps) if lesson.decays else min(1, (step + 1) / 40)
        for optimizer, peak in ((muon, lesson.muon_lr), (adamw, lesson.lr)):
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
    texts = sorted(texts, key=lambda text: len(text.ids))  # for PaddedAttention
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
    """The ViT, and what only its training needs: a text encoder and the heads of three losses.

    The first loss is CLIP's, between the class token and the caption. It does not make a patch represent what it
    shows. The second one does, after FILIP: between the patches of layer -2 and the caption's phrases. The similarity
    of a phrase and a picture is the mean over the patches that are most similar, as many as a thing covers.

    Both teach what the demo's captions name. The third one makes a patch represent any thing: linear maps predict, from
    each patch of layer -2 that shows a thing, the thing's words, form, box and colour, and from every patch its pixels.
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
        self.form_head = nn.Linear(width, wide.FORM**2 + 6)
        self.word_heads = nn.ModuleDict({name: nn.Linear(width, len(wide.ATTRIBUTES[name])) for name in wide.READ})
        self.pixel_head = nn.Linear(width, 3 * COARSE**2)
        self.log_scales = nn.Parameter(torch.tensor([2.3, 2.3]))  # of the two contrastive losses
        self.outputs = []  # of the last two blocks, (B, P+1, D) each
        for block in list(self.vit.transformer.get_submodule("resblocks").children())[-2:]:
            block.register_forward_hook(lambda block, args, output: self.outputs.append(output))

    def forward(self, pixels: torch.Tensor, captions: list[list[int]], phrase_ends: torch.Tensor,
                shown: list[Shown]) -> tuple[list[torch.Tensor], torch.Tensor]:  # fmt: skip
        """The similarities of the two contrastive losses, float32, (B, B) each: a row for each picture, a column for
        each caption; and the third loss.

        pixels (B + O, 3, size, size) uint8; captions, of the first B pictures: lists of ids; phrase_ends (N,) bool over
        all their tokens; shown: what the patches of the O other pictures show.
        """
        B = len(captions)
        self.outputs.clear()
        self.vit(normalize(pixels))
        patches, last = self.outputs[0][:, 1:], self.outputs[1][:B, 0]  # (B + O, P, D), (B, D)
        borders = list(accumulate((len(ids) for ids in captions), initial=0))
        x = self.text.tok_embeddings(torch.tensor([id for ids in captions for id in ids]))  # (N, D)
        x = self.text.norm(self.text(x, position_ids(borders), PaddedAttention(borders)))  # (N, D)
        pictures = F.normalize(self.vit.ln_post(last) @ self.vit.proj, dim=-1)  # type: ignore[operator]  # (B, D)
        texts = F.normalize(x[torch.tensor(borders[1:]) - 1], dim=-1)  # (B, D), at each caption's last token
        by_picture = pictures @ texts.T  # (B, B)
        patch_loss = self.patch_loss(patches[B:], pixels[B:], shown)
        patches = F.normalize(self.patch_head(patches[:B]), dim=-1).flatten(0, 1)  # (B*P, D)
        phrases = F.normalize(self.phrase_head(x[phrase_ends]), dim=-1)  # (phrases, D)
        nearest = (phrases @ patches.T).unflatten(1, (B, -1)).topk(PATCHES_OF_A_THING).values
        nearest = nearest.mean(-1).float()  # (phrases, B)
        n_phrases = [int(phrase_ends[start:end].sum()) for start, end in pairwise(borders)]
        by_phrase = torch.stack([rows.mean(0) for rows in nearest.split(n_phrases)], dim=1)  # (B, B)
        return [by_picture.float(), by_phrase], patch_loss

    def patch_loss(self, patches: torch.Tensor, pixels: torch.Tensor, shown: list[Shown]) -> torch.Tensor:
        """The third loss, of patches (O, P, D): the sum of the words' cross-entropies, one mean squared error over
        form, colour and box, and one over the pixels.
        """
        things = torch.from_numpy(np.stack([s.thing for s in shown]))  # (O, P)
        pictures, places = (things >= 0).nonzero(as_tuple=True)  # (n,) each, of the patches that show a thing
        first = torch.tensor(list(accumulate((len(s.forms) for s in shown), initial=0)))[pictures]
        chosen = first + things[pictures, places]
        forms, boxes, fills, words = (  # (n, ...) each
            torch.from_numpy(np.concatenate(arrays))[chosen] for arrays in list(zip(*shown))[1:]
        )
        at = torch.stack([places % wide.PATCHES_ACROSS, places // wide.PATCHES_ACROSS], 1)
        middles = VISION_CONFIG.patch_size * (at + 0.5)  # (n, 2)
        offsets = (boxes[:, :2] - middles) / boxes[:, 2:]  # (n, 2), of the thing's centre, in radii
        truth = torch.cat([2 * forms - 1, 2 * fills - 1, offsets, (boxes[:, 2:] / 6).log()], 1)  # (n, FORM² + 6)
        shown_patches = patches[pictures, places]  # (n, D)
        loss = F.mse_loss(self.form_head(shown_patches).float(), truth)
        loss = loss + F.mse_loss(self.pixel_head(patches).float(), coarse_patches(pixels))
        for head, word in zip(self.word_heads.values(), words.unbind(1)):
            loss = loss + F.cross_entropy(head(shown_patches).float(), word)
        return loss


def coarse_patches(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, size, size) uint8 -> (B, P, 3 * COARSE²), the patches with fewer pixels, of variance about 1."""
    fewer = F.avg_pool2d(pixels / 64.0 - 2, VISION_CONFIG.patch_size // COARSE)
    return F.unfold(fewer, COARSE, stride=COARSE).transpose(1, 2)


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


def to_pixels(pictures: Iterable[Image.Image]) -> torch.Tensor:
    """(B, 3, size, size) uint8."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def train_vit(tokenizer: Path) -> dict[str, torch.Tensor]:
    """A ViT that starts from noise; its state dict has OpenAI's names and includes ln_post and proj."""
    torch.manual_seed(world.SEED)
    rng = random.Random(f"vit {world.SEED}")
    model, sp = Contrast(), load_tokenizer(tokenizer)
    muon, adamw = make_optimizers(model, ("vit.transformer.", "text.layers."), weight_decay=0.05)
    after_phrase = [sp.encode("top" + mark)[1] for mark in (",", " and", ".")]  # the token that follows a phrase
    mean_loss = None
    bar = progress_bar(range(VIT_STEPS), "ViT")
    for step in bar:
        counts = (1,) if step < 0.1 * VIT_STEPS else (1, 2, 2, 3, 3)
        families = [neighbours(draw_scene(rng, counts=counts), FAMILY, rng) for _ in range(VIT_BATCH // FAMILY)]
        scenes = [scene for family in families for scene in family]
        texts = [f"{world.caption(s, rng)[:-1]} and nothing at the {rng.choice(empty_places(s))}." for s in scenes]
        others = [wide.draw_picture(wide.draw_scene(rng, counts=counts), rng) for _ in range(WIDE_BATCH)]
        pixels = to_pixels([*(world.draw_picture(scene, rng) for scene in scenes), *(picture for picture, _ in others)])
        shown = [patches for _, patches in others]
        captions = [sp.encode(text) for text in texts]
        phrase_ends = torch.tensor([following in after_phrase for ids in captions for following in [*ids[1:], 0]])
        # For few tokens, the backward pass of PyTorch's fused attention is slow on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            similarities, patch_loss = model(pixels, captions, phrase_ends, shown)
        loss, pairs = patch_loss, torch.arange(len(scenes))  # picture i belongs to caption i
        for similarity, scale in zip(similarities, model.log_scales.exp().clamp(max=100)):
            rows, columns = scale * similarity, scale * similarity.T
            loss = loss + (F.cross_entropy(rows, pairs) + F.cross_entropy(columns, pairs)) / 4
        for optimizer, peak in ((muon, VIT_MUON_LR), (adamw, VIT_LR)):
            optimizer.param_groups[0]["lr"] = peak * warm_up_and_decay(step, VIT_STEPS)
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adamw.step()
        accuracy = [f"{(similarity.argmax(1) == pairs).float().mean():.0%}" for similarity in similarities]
        mean_loss = loss.item() if mean_loss is None else 0.95 * mean_loss + 0.05 * loss.item()
        bar.set_postfix(loss=f"{mean_loss:.3f}", patches=f"{patch_loss.item():.3f}", accuracy="/".join(accuracy),
                        refresh=False)  # fmt: skip
    return {f"visual.{name}": p.detach() for name, p in model.vit.state_dict().items()}


def patches_of_scenes(wide_scenes: bool, held_out: bool, n: int,
                      rng: random.Random) -> tuple[torch.Tensor, list[Thing | None]]:  # fmt: skip
    """n pictures, (n, 3, size, size) uint8, and the thing or None that each of their n * P patches shows.

    held_out: of the demo's scenes; no wide scene is held out.
    """
    pictures, things = [], []
    for _ in range(n):
        if wide_scenes:
            scene = wide.draw_scene(rng)
            picture, shown = wide.draw_picture(scene, rng)
            things += [scene[i] if i >= 0 else None for i in shown.thing]
        else:
            scene = draw_scene(rng, held_out)
            picture, at_place = world.draw_picture(scene, rng), {t.place: t for t in scene}
            for row, column in np.ndindex(wide.PATCHES_ACROSS, wide.PATCHES_ACROSS):  # two for each place
                things.append(at_place.get(PLACES[row // 2 * 3 + column // 2]))
        pictures.append(picture)
    return to_pixels(pictures), things


def probe(path: Path, n: int = 600) -> dict[str, float]:
    """How well a linear map reads a thing from one patch of layer -2: the share right by attribute, in held-out scenes
    of the demo, and ("any size" and so on) in the ViT's other pictures.

    Fits least squares on the patches of n pictures that show a thing, and tests on those of n others.
    """
    vit, rng = load_vision(path), random.Random("probe")
    right = {}
    for prefix, wide_scenes, attributes in (("", False, ATTRIBUTES), ("any ", True, wide.ATTRIBUTES)):
        features, things = [], []  # of the training scenes, then of the held-out ones
        for held_out in (False, True):
            pixels, found = patches_of_scenes(wide_scenes, held_out, n, rng)
            with torch.no_grad():
                Z_v = vit(normalize(pixels)).flatten(0, 1)  # (n*P, D)
            Z_v = Z_v[torch.tensor([thing is not None for thing in found])]
            features.append(torch.cat([Z_v, torch.ones(len(Z_v), 1)], dim=1))  # (patches of things, D+1), 1 for a bias
            things.append([thing for thing in found if thing])
        for attribute, values in attributes.items():
            targets, truth = (torch.tensor([values.index(getattr(t, attribute)) for t in part]) for part in things)
            weights = torch.linalg.lstsq(features[0], torch.eye(len(values))[targets]).solution
            right[prefix + attribute] = ((features[1] @ weights).argmax(1) == truth).float().mean().item()
    return right


def train_both(tokenizer: Path) -> tuple[LLaMA, dict[str, torch.Tensor]]:
    """The LLaMA, and the state dict of the ViT, each from a process of its own with one thread.

    Two threads would hardly speed one of these small models up.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        llama = pool.submit(train_llama, tokenizer)
        vit = pool.submit(train_vit, tokenizer)
        return llama.result(), vit.result()


def build(folder: Path):
    """Trains both backbones from nothing and writes them into `folder`, in the published formats."""
    tokenizer = folder / world.LLAMA.name / "tokenizer.model"
    train_tokenizer(tokenizer)
    llama, vit = train_both(tokenizer)
    save_llama(LLAMA_CONFIG, {name: p.detach().half() for name, p in llama.named_parameters()}, tokenizer.parent)
    with replacing(folder / world.VISION.name) as file:
        torch.save({name: p.half() for name, p in vit.items()}, file)
    shares = probe(folder / world.VISION.name)
    print("linear probe of single patches, layer -2:", ", ".join(f"{k} {100 * v:.1f} %" for k, v in shares.items()))


def keep_chat(run: Path, folder: Path):
    """Copies a finished chatbot of the demo to `folder`/chat, with fp16 weights, and draws `folder`/scene.png."""
    model, _, config = load_run(run, torch.float16, trained_by="torchrun train.py --stage 2", stage=2)
    if not config["settings"].get("demo"):
        raise UserError(f"{run}: not a run of the demo; train one with: torchrun train.py --stage 2")
    trained = {name: p.detach().half() for name, p in model.named_parameters() if not name.startswith("vision.")}
    save_run(folder / world.CHAT.name, model.llama.config, trained, config, world.VISION, run / "tokenizer.model")
    rng = random.Random("scene 1093")  # three things without a common colour or shape
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
