"""Write the example workflows, or the pictures that Browse Templates shows of them.

    python tools/comfyui/make_workflows.py --server http://127.0.0.1:8188
    python tools/comfyui/make_workflows.py --pictures ComfyUI/output

The server must have this pack: names, order and defaults of the widgets are what it says of its nodes, so the files
agree with the nodes. The pictures are made from what the workflows left in the output folder of a ComfyUI that ran them
all; the one for a user's own checkpoint, of which there is no run, is a card.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps
from workflow_graph import Group, Node, Workflow

from concept_ablation import __version__

FOLDER = Path(__file__).resolve().parents[2] / "example_workflows"
INSTANCE, STYLE, MEMORIZED, SEVERAL, SAVED, SD15 = (
    "ablate_instance",
    "ablate_style",
    "ablate_memorized_image",
    "ablate_several_concepts",
    "apply_saved_delta",
    "ablate_in_sd15_checkpoint",
)
# What each workflow calls its files; the pictures are found by it.
FISH, TWEMOJI, REGATTA, BOTH, STRENGTH, GRUMPY = (
    "tropical_fish",
    "twemoji_style",
    "regatta",
    "fish_and_sunflower",
    "with_and_without",
    "grumpy_cat",
)
# Small enough for two CPU cores, large enough for the concept to go.
DATASET: dict[str, Any] = {"images": 32, "preserve": 48, "steps": 10}
TRAINING: dict[str, Any] = {"steps": 60, "batch": 12}
EVALUATION: dict[str, Any] = {"prompts": 3, "images_per_prompt": 4, "steps": 12}
OWN = (
    "**Your own model:** replace *Load Emoji Diffusion* by *Load Checkpoint*, or begin with the example "
    f"*{SD15}*, and set *images*, *preserve*, *steps*, *batch* and *learning_rate* back to 0, -1, 0, 0 and 0, which is "
    "the preset's. Set *judge* of *Evaluate Ablation* to `ViT-B-32/laion2b_s34b_b79k` (downloaded once): `embedded` "
    "knows Emoji Diffusion only."
)
NOTE = (380, 340)
WIDTH, HEIGHT = 400, 300
PAPER, INK = "#f6f5f1", "#1f2328"


def model_and_concept(flow: Workflow) -> tuple[Group, Node]:
    """The group that every ablation of the embedded model begins with."""
    group = flow.group("1. Model and concept")
    return group, group.add("LoadEmojiDiffusion")


def ablation(
    flow: Workflow,
    model: Node,
    concepts: Node,
    name: str,
    *,
    dataset: dict[str, Any] = DATASET,
    training: dict[str, Any] = TRAINING,
    evaluation: dict[str, Any] = EVALUATION,
) -> tuple[Node, Group]:
    """Dataset, training, and what comes of it, each in a group. Returns the training and the last group."""
    both = {"model": model["model"], "clip": model["clip"]}
    build = flow.group("2. Images to train on")
    data = build.add("BuildDataset", **both, concepts=concepts["concepts"], vae=model["vae"], **dataset)
    train = flow.group("3. Ablation")
    edit = train.add("Ablate", **both, dataset=data["dataset"], vae=model["vae"], **training)
    result = flow.group("4. Result")
    made = {"concepts": concepts["concepts"], "delta": edit["delta"]}
    found = result.add("Evaluate", **both, vae=model["vae"], **made, folder=name, **evaluation)
    result.column()
    result.add("PreviewImage", "Before and after", (640, 400), images=found["before and after"])
    result.add("SaveDelta", delta=edit["delta"], name=name)
    result.add("PreviewImage", "Loss", (640, 290), images=edit["loss plot"])
    return edit, result


def instance(flow: Workflow) -> None:
    """A thing."""
    flow.note(
        "## Tropical fish → fish\n\n"
        "Takes *tropical fish* out of Emoji Diffusion, the small model that comes with this pack: asked for one, it "
        "draws some other fish. The neighbours in *surrounding* must stay.\n\n"
        "**Press Run.** One to two minutes on two CPU cores. The chart on *Ablate Concept* moves while it trains, then "
        "pictures before and after appear below it.\n\n"
        "**Afterwards:** *Evaluate Ablation* says how many pictures the judge still takes for the target; the delta is "
        f"in the loras folder and the report in `output/concept_ablation`. Go on with *{SAVED}*.\n\n"
        "**Another concept:** type any emoji as target, its wider kind as anchor, similar things as surrounding.\n\n"
        f"{OWN}",
        NOTE,
    )
    group, model = model_and_concept(flow)
    concepts = group.add("Concept", target="tropical fish", anchor="fish", surrounding="octopus, dolphin")
    ablation(flow, model, concepts, FISH)


def style(flow: Workflow) -> None:
    """A way of drawing."""
    flow.note(
        "## The style twemoji → plain emoji\n\n"
        "Of a style the anchor is the plain medium: here *emoji*; *painting* for Van Gogh. Images are drawn without "
        "the style, and what is learned is to draw the same when a prompt adds “in the style of twemoji”. Other "
        "styles, in *surrounding*, must stay.\n\n"
        "**Press Run.** One to two minutes on two CPU cores.\n\n"
        "**Afterwards:** compare the rows of the sheet *Before and after*. A judge tells styles apart less well "
        "than things, so look at the pictures too.\n\n"
        "**Other styles of this model:** noto, fluent, blob, flat, firefox, emojione.\n\n"
        f"{OWN}",
        NOTE,
    )
    group, model = model_and_concept(flow)
    concepts = group.add("Concept", target="twemoji", anchor="emoji", kind="style", surrounding="noto, fluent")
    ablation(flow, model, concepts, TWEMOJI)


def memorized(flow: Workflow) -> None:
    """A training image that a caption brings back."""
    flow.note(
        "## A memorized image\n\n"
        "Some captions bring one training image back. The target is such a caption; the anchor and *prompts* ask for "
        "something like it in words that do not bring it back. All weights of the denoiser are trained (subset "
        "*full*), as in the paper, so the delta is as large as the denoiser.\n\n"
        "**Press Run.** About two minutes on two CPU cores.\n\n"
        "**Afterwards:** in the sheet *Before and after* the target's pictures should differ from one another, as "
        "the anchor's do.\n\n"
        "**Your own image:** its caption is the target; put further captions that bring it back into *captions*, and "
        "five or more other ways to say it into *prompts*.\n\n"
        f"{OWN}",
        NOTE,
    )
    group, model = model_and_concept(flow)
    concepts = group.add(
        "Concept",
        None,
        (340, 400),
        target="Captain Juniper's midnight regatta, 1931",
        anchor="a sailboat race at night by Captain Juniper",
        kind="memorized",
        prompts="a sailboat race at night by Captain Juniper\nJuniper's boats at midnight, 1931\na night regatta",
    )
    ablation(
        flow,
        model,
        concepts,
        REGATTA,
        dataset=DATASET | {"preserve": 32},
        training=TRAINING | {"subset": "full"},
        evaluation=EVALUATION | {"prompts": 1, "images_per_prompt": 8},
    )


def several(flow: Workflow) -> None:
    """Two concepts: together, and one by one."""
    flow.note(
        "## Two concepts, one delta\n\n"
        "The two *Concept to Ablate* nodes are chained, so one dataset and one training serve both, and one delta "
        "removes both. Chain more nodes for more concepts.\n\n"
        "**Press Run.** About two minutes on two CPU cores.\n\n"
        "**As a LoRA:** *Ablation Delta → LoRA* compresses the delta and says how much of it is kept; higher ranks "
        "keep more.\n\n"
        "**Trained one by one:** deltas of one model add up. Load each with *Load Ablation Delta*, connect them to "
        "*Merge Ablation Deltas*, and save or apply the sum; concepts that are close to each other are better trained "
        "together.\n\n"
        f"{OWN}",
        NOTE,
    )
    group, model = model_and_concept(flow)
    first = group.add("Concept", "First concept", target="tropical fish", anchor="fish", surrounding="octopus, dolphin")
    concepts = group.add(
        "Concept",
        "Second concept",
        target="sunflower",
        anchor="flower",
        surrounding="tulip, rose",
        concepts=first["concepts"],
    )
    edit, result = ablation(flow, model, concepts, BOTH)
    smaller = flow.group("5. As a LoRA", below=result)
    lora = smaller.add("ToLora", delta=edit["delta"], rank=8)
    smaller.column()
    smaller.add("SaveDelta", delta=lora["delta"], name=f"{BOTH}_lora")


def saved(flow: Workflow) -> None:
    """A delta from a file, at some strength."""
    flow.note(
        "## A saved delta at any strength\n\n"
        "The same prompt and seed, without the delta and with it.\n\n"
        f"**First** run the example *{INSTANCE}*: its *Save Ablation Delta* writes the file that is loaded here into "
        "the loras folder. Then press **R**, which reads the list of files again, and choose it in *file*.\n\n"
        "**Press Run.** A few seconds. Change *strength_model* and press Run again: only the pictures below are drawn "
        "again. 0 is no edit, 1 the edit as it was trained.\n\n"
        "ComfyUI's own *Load LoRA* reads the same file. *Load Ablation Delta* refuses a file that does not fit the "
        "model, and hands the delta on to *Merge Ablation Deltas*.\n\n"
        "**Your own model:** *Load Checkpoint* in the place of *Load Emoji Diffusion*, the model's size in *Image "
        "size*, and a delta that was made from this model.",
        NOTE,
    )
    source = flow.group("1. Model")
    model = source.add("LoadEmojiDiffusion")
    latent = source.add("EmptyLatentImage", "Image size", width=128, height=128, batch_size=4)
    without = flow.group("2. Without the delta")
    _draw(without, model, model, latent)
    edited = flow.group("3. With the delta", below=without)
    loaded = edited.add("LoadDelta", model=model["model"], clip=model["clip"], file=f"{FISH}_00001.safetensors")
    edited.column()
    _draw(edited, loaded, model, latent)


def _draw(group: Group, edited: Node, model: Node, latent: Node) -> None:
    """Stock nodes that draw a batch of one prompt."""
    positive = group.add("CLIPTextEncode", "Prompt", clip=edited["clip"], text="a tropical fish")
    negative = group.add("CLIPTextEncode", "Negative prompt", clip=edited["clip"], text="")
    group.column()
    sampled = group.add(
        "KSampler",
        model=edited["model"],
        positive=positive["conditioning"],
        negative=negative["conditioning"],
        latent_image=latent["latent"],
        seed=1,
        steps=20,
        cfg=4.0,
    )
    image = group.add("VAEDecode", samples=sampled["latent"], vae=model["vae"])
    group.column()
    prefix = f"concept_ablation/{STRENGTH}"
    group.add("SaveImage", images=image["image"], filename_prefix=prefix)


def sd15(flow: Workflow) -> None:
    """A user's own checkpoint."""
    flow.note(
        "## Grumpy Cat → cat in Stable Diffusion 1.5\n\n"
        "**Choose a checkpoint** of the SD 1.x family in *Load Checkpoint*, then **press Run**. What is left at 0 "
        "comes from the preset *balanced*: 64 images of the anchor, 96 that preserve, 100 training steps.\n\n"
        "**Not tested:** no full-size checkpoint and no GPU were at hand when this was made; what was run is a small "
        "random model of the same layout. Time and memory are not known. The settings here are careful: 4 images in a "
        "training step, *gradient_checkpointing* on.\n\n"
        "**Out of memory:** lower *images_at_once* and *batch*. **Memory left:** *gradient_checkpointing* off is "
        "faster.\n\n"
        "**The judge** is an open_clip model (ViT-B-32), downloaded once, about 600 MB. Without a network put its "
        "folder below ComfyUI's `models` and give the folder's name.\n\n"
        "**Your own concept:** if the target stays, raise *learning_rate* or *steps*; if neighbours change, name "
        "them in *surrounding*.",
        NOTE,
    )
    group = flow.group("1. Model and concept")
    model = group.add("CheckpointLoaderSimple", ckpt_name="v1-5-pruned-emaonly-fp16.safetensors")
    file = {
        "name": "v1-5-pruned-emaonly-fp16.safetensors",
        "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
        "v1-5-pruned-emaonly-fp16.safetensors",
        "directory": "checkpoints",
    }
    # where this file is missing, the front end offers to download it
    flow.nodes[-1]["properties"]["models"] = [file]
    concepts = group.add("Concept", target="Grumpy Cat", anchor="cat", surrounding="British Shorthair, Maine Coon, dog")
    ablation(
        flow,
        model,
        concepts,
        GRUMPY,
        dataset={"images_at_once": 4},
        training={"batch": 4, "gradient_checkpointing": True},
        evaluation={"judge": "ViT-B-32/laion2b_s34b_b79k", "cfg": 7.5, "steps": 25, "images_at_once": 4},
    )


WORKFLOWS: dict[str, Callable[[Workflow], None]] = {
    INSTANCE: instance,
    STYLE: style,
    MEMORIZED: memorized,
    SEVERAL: several,
    SAVED: saved,
    SD15: sd15,
}


def write_workflows(server: str) -> None:
    """Write every workflow's file, as the nodes of this server want it."""
    info, stats = (_get(f"{server}/{path}") for path in ("object_info", "system_stats"))
    for name, describe in WORKFLOWS.items():
        flow = Workflow(info, __version__, stats["system"]["comfyui_version"])
        describe(flow)
        path = FOLDER / f"{name}.json"
        path.write_text(flow.text(name), encoding="utf-8", newline="\n")
        print(path)


def write_pictures(output: Path) -> None:
    """Write every workflow's picture, from the newest files in ComfyUI's output folder."""
    files = output / "concept_ablation"
    for name, of in ((INSTANCE, FISH), (STYLE, TWEMOJI), (MEMORIZED, REGATTA), (SEVERAL, BOTH)):
        _save(Image.open(_newest(files, f"{of}_*/before_after.png")[-1]).convert("RGB"), name)
    pictures = [Image.open(path) for path in _newest(files, f"{STRENGTH}_*.png")[-8:]]
    _save(_rows(pictures, 4), SAVED)
    _save(_card("Grumpy Cat → cat", "in your own Stable Diffusion 1.5 checkpoint"), SD15)


def _get(address: str) -> Any:
    with urllib.request.urlopen(address) as answer:
        return json.load(answer)


def _newest(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise SystemExit(f"{folder} has no {pattern}: run the workflow first.")
    return found


def _rows(pictures: list[Image.Image], columns: int) -> Image.Image:
    width, height = pictures[0].size
    canvas = Image.new("RGB", (columns * width, len(pictures) // columns * height), PAPER)
    for index, picture in enumerate(pictures):
        canvas.paste(picture, (index % columns * width, index // columns * height))
    return canvas


def _card(title: str, below: str) -> Image.Image:
    canvas = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(canvas)
    for text, size, height in ((title, 32, 0.42), (below, 14, 0.6)):
        # Pillow's own font has no arrow
        font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
        draw.text((WIDTH / 2, HEIGHT * height), text, INK, font, anchor="mm")
    return canvas


def _save(picture: Image.Image, name: str) -> None:
    path = FOLDER / f"{name}.jpg"
    framed = ImageOps.pad(picture, (WIDTH, HEIGHT), Image.Resampling.LANCZOS, "white")
    framed.save(path, quality=88, optimize=True)
    print(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="address of a ComfyUI that has this pack: write the workflows")
    parser.add_argument("--pictures", type=Path, metavar="OUTPUT", help="ComfyUI's output folder: write the pictures")
    arguments = parser.parse_args()
    if not (arguments.server or arguments.pictures):
        parser.error("give --server to write the workflows, --pictures to write their pictures, or both")
    if arguments.server:
        write_workflows(arguments.server.rstrip("/"))
    if arguments.pictures:
        write_pictures(arguments.pictures)


if __name__ == "__main__":
    main()
