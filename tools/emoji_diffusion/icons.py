"""Make the pictures: fetch open icon sets from npm, choose concepts that many sets draw, render them.

    python tools/emoji_diffusion/icons.py --out outputs/emoji/pictures

Needs `npm` and the packages of requirements.txt beside this file. Nothing of the packages is run: `npm pack` only
downloads their tarballs, and JSON is all that is read from them.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import MANIFEST, OTHERS, Concept, Pictures, load_pictures, save_pictures
from PIL import Image
from torch import Tensor

from concept_ablation.core.errors import AblationError

# npm package -> what captions call its style. Versions are pinned, so that everyone gets the same pictures.
SETS = {
    "@iconify-json/noto@1.2.9": "noto",
    "@iconify-json/noto-v1@1.2.5": "blob",
    "@iconify-json/twemoji@1.2.5": "twemoji",
    "@iconify-json/fluent-emoji@1.2.7": "fluent",
    "@iconify-json/fluent-emoji-flat@1.2.6": "flat",
    "@iconify-json/fxemoji@1.2.2": "firefox",
    "@iconify-json/emojione@1.2.3": "emojione",
    "@iconify-json/streamline-emojis@1.2.4": "streamline",
}
NAMES = "unicode-emoji-json@0.9.0"
TAXONOMY = "emojibase-data@17.0.0"
LICENCES = ("Apache-2.0", "MIT", "CC-BY-4.0")
# Iconify names the licence of this set's code; its LICENSE.md has another one for the drawings.
ART = {"Firefox OS Emoji": ("CC-BY-4.0", "https://github.com/mozilla/fxemoji")}
MINIMUM_SETS = 5
# Small enough that no placement in a 128 px picture enlarges it, large enough that none shrinks it to less than half.
SIZE = 128

# The whole subgroup of emojibase is taken, less the names in LEFT_OUT.
CATEGORIES = {
    "face-smiling": "smiley",
    "face-affection": "smiley",
    "face-tongue": "smiley",
    "face-glasses": "smiley",
    "face-hat": "smiley",
    "face-costume": "monster",
    "cat-face": "cat",
    "monkey-face": "monkey",
    "animal-mammal": "animal",
    "animal-bird": "bird",
    "animal-amphibian": "reptile",
    "animal-reptile": "reptile",
    "animal-marine": "sea animal",
    "animal-bug": "insect",
    "plant-flower": "flower",
    "plant-other": "plant",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "food",
    "food-sweet": "dessert",
    "musical-instrument": "musical instrument",
}
# Concepts that Unicode calls by the name of their category: "a cat" would be asked for in one caption and in the other.
RENAMED = {
    "cat": "standing cat",
    "dog": "standing dog",
    "monkey": "standing monkey",
    "bear": "brown bear",
    "bird": "songbird",
    "fish": "river fish",
}
# Of the other subgroups these few; and concepts whose nearest category is narrower than their subgroup's.
NAMED_CATEGORIES = {
    "fish": ("river fish", "tropical fish", "blowfish", "shark"),
    "cat": ("standing cat", "cat face"),
    "dog": ("standing dog", "dog face", "poodle"),
    "monkey": ("standing monkey", "monkey face", "gorilla"),
    "bear": ("brown bear", "panda", "koala"),
    "apple": ("red apple", "green apple"),
    "tree": ("evergreen tree", "deciduous tree", "palm tree"),
    "car": ("automobile", "taxi", "police car", "racing car", "sport utility vehicle"),
    "vehicle": ("bus", "ambulance", "fire engine", "tractor", "bicycle", "motorcycle", "locomotive"),
    "aircraft": ("airplane", "helicopter", "rocket"),
    "boat": ("sailboat", "ship", "speedboat"),
    "ball": ("soccer ball", "basketball", "baseball", "volleyball", "tennis"),
    "monster": ("ghost", "skull"),
}
# Hard to tell from a neighbour at 128 px, or no thing by themselves.
LEFT_OUT = {
    "grinning squinting face",
    "grinning face with sweat",
    "rolling on the floor laughing",
    "slightly smiling face",
    "upside-down face",
    "face savoring food",
    "winking face with tongue",
    "money-mouth face",
    "face with monocle",
    "tiger face",
    "horse face",
    "cow face",
    "pig face",
    "mouse face",
    "rabbit face",
    "ox",
    "ewe",
    "rat",
    "boar",
    "spouting whale",
    "herb",
    "four leaf clover",
    "baguette bread",
    "burrito",
    "meat on bone",
    "bacon",
    "green salad",
    "soft ice cream",
    "grinning face with big eyes",
    "grinning face with smiling eyes",
    "beaming face with smiling eyes",
    "smiling face with smiling eyes",
    "kissing face",
    "kissing face with smiling eyes",
    "kissing face with closed eyes",
    "squinting face with tongue",
    "grinning cat with smiling eyes",
    "kissing cat",
    "two-hump camel",
    "front-facing baby chick",
    "water buffalo",
    "paw prints",
    "pig nose",
    "spider web",
    "rosette",
    "white flower",
    "wilted flower",
    "leaf fluttering in wind",
    "fallen leaf",
    "pot of food",
    "shallow pan of food",
    "stuffed flatbread",
    "poultry leg",
    "custard",
    "alien monster",
}


# Whose other concepts the judges learn styles from. Of these only the name is said.
OTHER_GROUPS = {"smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects"}
OTHER_LEFT_OUT = {"time", "emotion"}
"""Subgroups of clock faces and of hearts and speech balloons: hard to tell apart, or without a style."""


@dataclass(frozen=True)
class IconSet:
    """One icon set in Iconify's format, with its licence."""

    style: str
    icons: Mapping[str, Any]
    credit: Mapping[str, str]


def slug(name: str) -> str:
    """Letters and digits alone: sets hyphenate one name differently."""
    return re.sub("[^a-z0-9]", "", name.lower())


def icon_set(style: str, icons: Mapping[str, Any], info: Mapping[str, Any]) -> IconSet:
    """An icon set with a licence that this project may use.

    Raises:
        AblationError: its licence is none of `LICENCES`.
    """
    named = info["license"].get("spdx", "unknown"), info["license"].get("url", "")
    licence, address = ART.get(info["name"], named)
    if licence not in LICENCES:
        raise AblationError(f"The icon set {info['name']} is under {licence}, not {', '.join(LICENCES)}: leave it out.")
    credit = {
        "style": style,
        "set": info["name"],
        "author": info["author"]["name"],
        "source": info["author"].get("url", ""),
        "licence": licence,
        "licence_url": address,
    }
    return IconSet(style, icons, credit)


def names_of(icons: Mapping[str, Any]) -> dict[str, str]:
    """Slug -> icon name, for the icons and those aliases that only rename one."""
    plain = {slug(name): body["parent"] for name, body in icons.get("aliases", {}).items() if set(body) == {"parent"}}
    return plain | {slug(name): name for name in icons["icons"]}


def svg(icons: Mapping[str, Any], name: str) -> str:
    """One icon as a stand-alone SVG document."""
    icon = icons["icons"][name]
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )


def render(document: str, size: int = SIZE) -> Tensor:
    """An SVG document as straight RGBA, uint8 [4, size, size]."""
    # Only this function needs the renderer, which is not among the package's requirements.
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=document, width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def choose_concepts(
    names: Mapping[str, Mapping[str, Any]], taxonomy: Mapping[str, tuple[str, str]], sets: Sequence[IconSet]
) -> list[Concept]:
    """The concepts of the chosen categories, in the order of Unicode.

    Args:
        names: emoji -> what unicode-emoji-json says of it (`name`).
        taxonomy: emoji without variation selectors -> emojibase's (group, subgroup).
    """
    named = {name: category for category, members in NAMED_CATEGORIES.items() for name in members}
    return [
        Concept(name, category, group)
        for name, group, subgroup in widely_drawn(names, taxonomy, sets)
        if name not in LEFT_OUT and (category := named.get(name) or CATEGORIES.get(subgroup))
    ]


def other_concepts(
    names: Mapping[str, Mapping[str, Any]],
    taxonomy: Mapping[str, tuple[str, str]],
    sets: Sequence[IconSet],
    chosen: Sequence[Concept],
) -> list[Concept]:
    """The things beside the `chosen` ones that the sets draw as well; arguments as in `choose_concepts`."""
    known = {one.name for one in chosen}
    return [
        Concept(name, name, group)
        for name, group, subgroup in widely_drawn(names, taxonomy, sets)
        if name not in known and group in OTHER_GROUPS and subgroup not in OTHER_LEFT_OUT
    ]


def widely_drawn(
    names: Mapping[str, Mapping[str, Any]], taxonomy: Mapping[str, tuple[str, str]], sets: Sequence[IconSet]
) -> Iterator[tuple[str, str, str]]:
    """Our name, group and subgroup of every emoji that at least `MINIMUM_SETS` sets draw."""
    known = [names_of(one.icons) for one in sets]
    for emoji, entry in names.items():
        name = entry["name"].lower()
        if sum(slug(name) in icons for icons in known) >= min(MINIMUM_SETS, len(sets)):
            yield RENAMED.get(name, name), *taxonomy.get(emoji.replace("\ufe0f", ""), ("", ""))


def render_all(concepts: Sequence[Concept], sets: Sequence[IconSet], size: int = SIZE) -> Pictures:
    """Every chosen concept in every set that has it."""
    unicode_names = {ours: name for name, ours in RENAMED.items()}
    rgba, concept, style = [], [], []
    for which, one in enumerate(sets):
        names = names_of(one.icons)
        for index, wanted in enumerate(concepts):
            if (name := names.get(slug(unicode_names.get(wanted.name, wanted.name)))) is not None:
                rgba.append(render(svg(one.icons, name), size))
                concept.append(index)
                style.append(which)
    return Pictures(
        torch.stack(rgba),
        torch.tensor(concept),
        torch.tensor(style),
        tuple(concepts),
        tuple(one.style for one in sets),
        tuple(dict(one.credit) for one in sets),
    )


def prepare(folder: Path, others: Path, cache: Path) -> Pictures:
    """The pictures in `folder`, made from the packages in `cache` (downloaded if they are not there) the first time.

    Args:
        folder: for what the model learns to draw.
        others: for the other concepts, from which the judges learn what a style is.
        cache: for the npm tarballs.

    Raises:
        AblationError: npm is missing or a package cannot be fetched.
    """
    if all((one / MANIFEST).is_file() for one in (folder, others)):
        return load_pictures(folder)
    sets = []
    for package, style in SETS.items():
        archive = fetch(package, cache)
        sets.append(icon_set(style, read_json(archive, "icons.json"), read_json(archive, "info.json")))
    names = read_json(fetch(NAMES, cache), "data-by-emoji.json")
    archive = fetch(TAXONOMY, cache)
    taxonomy = read_taxonomy(read_json(archive, "en/data.json"), read_json(archive, "meta/groups.json"))
    chosen = choose_concepts(names, taxonomy, sets)
    save_pictures(others, render_all(other_concepts(names, taxonomy, sets, chosen), sets))
    pictures = render_all(chosen, sets)
    save_pictures(folder, pictures)
    return pictures


def read_taxonomy(emoji: Sequence[Mapping[str, Any]], groups: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Emoji without variation selectors -> (group, subgroup), from emojibase's two files."""
    return {
        one["emoji"].replace("\ufe0f", ""): (
            groups["groups"][str(one["group"])],
            groups["subgroups"][str(one["subgroup"])],
        )
        for one in emoji
        if "subgroup" in one
    }


def fetch(package: str, cache: Path) -> Path:
    """The tarball of an npm package `name@version`, downloaded once."""
    archive = cache / (package.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if archive.is_file():
        return archive
    npm = shutil.which("npm")
    if npm is None:
        raise AblationError("The icon sets come from npm, which is not installed: install Node.js or copy a cache.")
    cache.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", "--ignore-scripts", "--silent", "--pack-destination", str(cache), package]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if result.returncode or not archive.is_file():
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise AblationError(f"npm could not fetch {package} ({reason}): check the network.")
    return archive


def read_json(archive: Path, name: str) -> Any:
    """A JSON file of an npm tarball."""
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile(f"package/{name}")
            assert member is not None
            return json.load(member)
    except (KeyError, tarfile.TarError, EOFError) as error:
        # cut short, where the download was interrupted
        raise AblationError(f"{archive} has no {name}: delete it, so that it is fetched again.") from error


def main() -> None:
    """Command line: make the pictures and say how many there are."""
    parser = argparse.ArgumentParser(description="Render the pictures that Emoji Diffusion learns from.")
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures.safetensors and manifest.json")
    parser.add_argument("--cache", type=Path, help="folder for the npm tarballs (default: npm/ beside --out)")
    options = parser.parse_args()
    beside = options.out.parent
    pictures = prepare(options.out, beside / OTHERS, options.cache or beside / "npm")
    print(f"{len(pictures)} pictures of {len(pictures.concepts)} concepts in {len(pictures.styles)} styles")


if __name__ == "__main__":
    main()
