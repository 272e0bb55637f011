"""Stage 3: the judges, small CLIP models (open_clip) that tell concepts, styles and backgrounds apart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from augment import choose, draw
from captions import Caption, Subject, caption
from compute import fast_forward
from convolution import speed_up
from memorized import SHARE, drawn
from pictures import Pictures
from settings import Settings, Tower
from stage import Budget, Loss, Stage, train
from torch import Generator, Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from open_clip import CLIP

_NOISE = 0.06
_BLUR_SHARE = 0.5
_MAX_LOGIT_SCALE = 4.6052  # log 100, CLIP's own limit


def build(tower: Tower) -> CLIP:
    """An untrained judge, the same for the same seed."""
    import open_clip

    torch.manual_seed(tower.seed)
    return speed_up(open_clip.CLIP(**tower.config())).to(memory_format=torch.channels_last)


def train_judge(name: str, pictures: Pictures, settings: Settings, tower: Tower, folder: Path, budget: Budget) -> CLIP:
    """The trained judge (moving average)."""
    loss = contrastive_loss(pictures, settings, tower)
    return train(Stage(name, build(tower), loss, tower.optimization, tower.seed), folder, budget)


def contrastive_loss(pictures: Pictures, settings: Settings, tower: Tower) -> Loss:
    """CLIP's loss over a batch, without the pairs that are true by chance.

    Many pictures of a batch are of one concept or colour. A caption of another picture that fits this one as well is no
    wrong answer, so it is left out of the softmax.
    """
    from open_clip import SimpleTokenizer

    context: int = tower.config()["text_cfg"]["context_length"]
    tokenize = SimpleTokenizer(context_length=context)
    scenes, scene_images = drawn(settings.scenes, pictures, settings.image_size)
    batch = tower.optimization.batch
    memorized = min(batch - 1, max(1, round(SHARE / 2 * batch))) if scenes else 0

    def loss(model: nn.Module, rng: Generator) -> Tensor:
        index = torch.randint(len(pictures), (batch - memorized,), generator=rng)
        choice = choose(index, rng)
        images = draw(pictures, choice, settings.image_size)
        subjects = choice.subjects(pictures)
        captions = [caption(subject, rng, empty_share=0.0) for subject in subjects]
        if memorized:
            which = torch.randint(len(scenes), (memorized,), generator=rng)
            texts = [scenes[one].caption for one in which.tolist()]
            images = torch.cat((images, scene_images[which]))
            subjects += [Subject(text, text, "", "") for text in texts]
            captions += [Caption(text, name=text) for text in texts]
        images = worsen(F.interpolate(images, tower.image_size, mode="area"), rng)
        tokens = tokenize([one.text for one in captions])
        with fast_forward():
            seen = model.encode_image((images * 2 - 1).to(memory_format=torch.channels_last))
            said = model.encode_text(tokens)
        seen, said = F.normalize(seen.float(), dim=-1), F.normalize(said.float(), dim=-1)
        logits = model.logit_scale.clamp(max=_MAX_LOGIT_SCALE).exp() * seen @ said.t()
        logits = logits.masked_fill(accidental(subjects, captions), float("-inf"))
        target = torch.arange(batch)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2

    return loss


def accidental(subjects: list[Subject], captions: list[Caption]) -> Tensor:
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
