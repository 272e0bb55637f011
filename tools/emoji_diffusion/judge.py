"""Stage 3: the judges, small CLIP models (open_clip) that tell concepts, styles and backgrounds apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from augment import choose, draw
from captions import STYLE_PHRASES, TEMPLATES, Caption, Dice, Subject, caption, join
from compute import fast_forward
from convolution import speed_up
from memorized import SHARE, drawn
from pictures import Pictures, joined, of_concepts
from settings import Settings, Tower
from stage import Budget, Loss, Stage, train
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from concept_ablation.core.prompts import fill

if TYPE_CHECKING:
    from open_clip import CLIP

_OTHERS_SHARE = 0.4
"""Of a batch: pictures of other concepts."""

_STYLED_SHARE = 0.06
"""Of a batch: pictures that are asked for their style by name; each takes a text for every style."""

_ANYTHING = ("emoji", "an emoji", "a picture")

_UNSEEN_EVERY = 8
_NOISE = 0.06
_BLUR_SHARE = 0.5
_MAX_LOGIT_SCALE = 4.6052  # log 100, CLIP's own limit


def build(tower: Tower) -> CLIP:
    """An untrained judge, the same for the same seed."""
    import open_clip

    torch.manual_seed(tower.seed)
    return speed_up(open_clip.CLIP(**tower.config())).to(memory_format=torch.channels_last)


def train_judge(
    name: str, pictures: Pictures, others: Pictures, settings: Settings, tower: Tower, folder: Path, budget: Budget
) -> CLIP:
    """The trained judge (moving average)."""
    loss = judge_loss(pictures, others, settings, tower)
    return train(Stage(name, build(tower), loss, tower.optimization, tower.seed), folder, budget)


def seen_and_unseen(others: Pictures) -> tuple[Pictures, Pictures]:
    """The other concepts that judges learn styles from, and every eighth, on which it is measured whether they have."""
    numbers = range(len(others.concepts))
    unseen = numbers[_UNSEEN_EVERY - 1 :: _UNSEEN_EVERY]
    return of_concepts(others, sorted(set(numbers) - set(unseen))), of_concepts(others, unseen)


def judge_loss(pictures: Pictures, others: Pictures, settings: Settings, tower: Tower) -> Loss:
    """CLIP's loss over a batch, and what judges are asked for later: which of all names a picture has, and which style.

    A batch alone teaches neither well: it rarely holds two birds that must be told apart, and never all the styles of
    one thing. And the model's own pictures are too few to learn what a style is: whoever sees them often enough knows
    each by heart. So part of every batch are other concepts of the same icon sets.
    """
    from open_clip import SimpleTokenizer

    context: int = tower.config()["text_cfg"]["context_length"]
    tokenize = SimpleTokenizer(context_length=context)
    scenes, scene_images = drawn(settings.scenes, pictures, settings.image_size)
    batch = tower.optimization.batch
    memorized = min(batch - 1, max(1, round(SHARE / 2 * batch))) if scenes else 0
    strangers = round(_OTHERS_SHARE * (batch - memorized)) if len(others) else 0
    styled = max(1, round(_STYLED_SHARE * batch))
    everything = joined(pictures, others)
    kinds = sorted({one.category for one in pictures.concepts})
    names = [one.name for one in pictures.concepts] + kinds
    category = torch.tensor([len(pictures.concepts) + kinds.index(one.category) for one in pictures.concepts])

    def loss(model: nn.Module, rng: Generator) -> Tensor:
        own = torch.randint(len(pictures), (batch - memorized - strangers,), generator=rng)
        other = len(pictures) + torch.randint(max(1, len(others)), (strangers,), generator=rng)
        # shuffled, so that the first ones, whose styles are asked for by name, are of both
        index = torch.cat((own, other))[torch.randperm(batch - memorized, generator=rng)]
        choice = choose(index, rng)
        images = draw(everything, choice, settings.image_size)
        subjects = choice.subjects(everything)
        captions = [caption(subject, rng, empty_share=0.0) for subject in subjects]
        if memorized:
            which = torch.randint(len(scenes), (memorized,), generator=rng)
            said = [scenes[one].caption for one in which.tolist()]
            images = torch.cat((images, scene_images[which]))
            subjects += [Subject(text, text, "", "") for text in said]
            captions += [Caption(text, name=text) for text in said]
        texts = (
            [one.text for one in captions],
            name_texts(names, rng),
            any_style_texts(everything.styles, rng),
            style_texts(subjects[: min(styled, len(index))], everything.styles, rng),
        )
        images = worsen(F.interpolate(images, tower.image_size, mode="area"), rng)
        with fast_forward():
            seen = model.encode_image((images * 2 - 1).to(memory_format=torch.channels_last))
            # apart, because some are shorter
            told = [encode_texts(model, tokenize(part)) for part in texts]
        of_captions, of_names, of_styles, of_named_styles = (F.normalize(part.float(), dim=-1) for part in told)
        seen = F.normalize(seen.float(), dim=-1) * model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp()

        concepts, styles = everything.concept[choice.picture], everything.style[choice.picture]
        known = concepts < len(pictures.concepts)
        parts = [contrast(seen @ of_captions.t(), subjects, captions)]
        if known.any():
            parts += naming(seen[: len(index)][known] @ of_names.t(), concepts[known], category[concepts[known]])
        parts.append(F.cross_entropy(seen[: len(index)] @ of_styles.t(), styles))
        of_named_styles = of_named_styles.view(-1, len(everything.styles), seen.shape[1])
        by_style = torch.einsum("bd,bsd->bs", seen[: len(of_named_styles)], of_named_styles)
        parts.append(F.cross_entropy(by_style, styles[: len(by_style)]))
        return torch.stack(parts).sum()

    return loss


def encode_texts(model: nn.Module, tokens: Tensor) -> Tensor:
    """What `CLIP.encode_text` makes of tokens [N, context], [N, D], without the positions behind the longest text.

    Attention is causal and the text's embedding is read at its end token, so nothing there has a say; with short
    captions they are half of the work.
    """
    tokens = tokens[:, : int(tokens.ne(0).sum(1).max())]
    length = tokens.shape[1]
    hidden = model.token_embedding(tokens) + model.positional_embedding[:length]
    hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))
    # the end token is the last of the vocabulary
    return hidden[torch.arange(len(tokens)), tokens.argmax(1)] @ model.text_projection


def style_texts(subjects: Sequence[Subject], styles: Sequence[str], rng: Generator) -> list[str]:
    """For each subject its name in every one of `styles`, said in the same random way."""
    dice = Dice(rng)
    texts = []
    for subject in subjects:
        plain, phrase = fill(dice.choose(TEMPLATES), subject.name), dice.choose(STYLE_PHRASES)
        texts += [join(plain, phrase.format(style)) for style in styles]
    return texts


def naming(logits: Tensor, name: Tensor, category: Tensor) -> list[Tensor]:
    """Two losses of pictures by all names and all categories, [B, N + C]: the own name is the best answer, and the own
    category the best of the others. So "a fish" is right for every fish, and for a tropical one less so than its name.

    Args:
        logits: similarities times the scale.
        name, category: columns of each picture's own, int64 [B].
    """
    others = logits.scatter(1, name[:, None], float("-inf"))
    return [F.cross_entropy(logits, name), F.cross_entropy(others, category)]


def name_texts(names: Sequence[str], rng: Generator) -> list[str]:
    """Every name, said in the same random way."""
    template = Dice(rng).choose(TEMPLATES)
    return [fill(template, name) for name in names]


def any_style_texts(styles: Sequence[str], rng: Generator) -> list[str]:
    """Every style, said in the same random way, of nothing in particular."""
    dice = Dice(rng)
    plain, phrase = dice.choose(_ANYTHING), dice.choose(STYLE_PHRASES)
    return [join(plain, phrase.format(style)) for style in styles]


def contrast(logits: Tensor, subjects: Sequence[Subject], captions: Sequence[Caption]) -> Tensor:
    """CLIP's loss of a matrix [B, B] of pictures by captions, without the pairs that are true by chance.

    Many pictures of a batch are of one concept or colour. The caption of another that fits this one is no wrong answer,
    unless it says less than its own: of a tropical fish "a fish" is true, and yet the worse answer. For a caption every
    other picture that it fits would be right as well.
    """
    fits = accidental(subjects, captions)
    detail = torch.tensor([one.detail for one in captions])
    target = torch.arange(len(logits))
    pictures = logits.masked_fill(fits & (detail[None, :] >= detail[:, None]), float("-inf"))
    texts = logits.masked_fill(fits, float("-inf")).t()
    return (F.cross_entropy(pictures, target) + F.cross_entropy(texts, target)) / 2


def accidental(subjects: Sequence[Subject], captions: Sequence[Caption]) -> Tensor:
    """Whether caption j is true of picture i without being its own, bool [B, B]."""
    fits = torch.tensor([[one.fits(subject) for one in captions] for subject in subjects])
    return fits.fill_diagonal_(False)


def worsen(images: Tensor, rng: Generator) -> Tensor:
    """Blur some pictures [B, 3, h, w] and add noise to all: what a denoiser and a decoder leave behind."""
    small = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    blurred = torch.rand(len(images), 1, 1, 1, generator=rng) < _BLUR_SHARE
    strength = _NOISE * torch.rand(len(images), 1, 1, 1, generator=rng)
    noise = torch.randn(images.shape, generator=rng)
    return (torch.where(blurred, small, images) + strength * noise).clamp(0, 1)
