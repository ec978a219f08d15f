"""Models of other libraries by name or folder, `timm:NAME` and `hf:NAME`, with their options."""

from pathlib import Path
from typing import Any

import torch

from foveola.config import ConfigError, UserError, build, nearest
from foveola.models.encoder import Encoder
from foveola.models.vit import ViTConfig
from foveola.zoo.files import LARGEST, options_of
from foveola.zoo.foreign import taken
from foveola.zoo.hf_models import from_hf
from foveola.zoo.preprocess import check_kind
from foveola.zoo.timm_models import from_timm
from foveola.zoo.weights import read_config

SIZE_KEYS = {  # of ViTConfig, and how timm and transformers call them
    "width": ("embed_dim", "hidden_size"),
    "depth": ("depth", "num_hidden_layers"),
    "image_size": ("img_size", "image_size"),
    "patch_size": ("patch_size",),
    "registers": ("reg_tokens", "num_register_tokens"),
}
OPTIONS = {
    "timm": ("pretrained", "preprocess", "image_size"),
    "hf": ("preprocess", "image_size", "revision"),
}


def load_library(name: str) -> Encoder:
    """Load `timm:NAME`, `timm:FOLDER`, `hf:NAME` or `hf:FOLDER`, with options behind a `?`, joined by `&`.

    `timm:NAME` takes timm's own weights, `?pretrained=FILE` those of a file, `?pretrained=false` random ones
    (seed 0). `hf:` takes `?revision=`. Of both, `?preprocess=` says how images are made (`zoo.preprocess`)
    and `?image_size=` how large they are.

    Where our ViT computes the same function, the model is converted, otherwise wrapped (`zoo.wrap`). Raises
    UserError, in one line, where the library is missing, and where the model is not found.
    """
    library, _, rest = name.partition(":")
    model, _, query = rest.partition("?")
    options = options_of(name, query)
    if not model:
        raise UserError(f"{name!r} names no model: expected {library}:NAME or {library}:FOLDER")
    for option in options:
        if option not in OPTIONS[library]:
            near = nearest(option, OPTIONS[library])
            known = f"did you mean {near!r}?" if near else f"known: {', '.join(OPTIONS[library])}"
            raise UserError(f"{name}: unknown option {option!r}; {known}")
    check_kind(library, model, options.get("preprocess"))
    size = None
    if "image_size" in options:
        if not options["image_size"].isdecimal() or not 0 < int(options["image_size"]) <= LARGEST:
            raise UserError(f"{name}: image_size must be pixels of a side, 1 to {LARGEST}, such as 224")
        size = int(options["image_size"])
    if Path(model).is_file():
        hint = f", or timm:NAME?pretrained={model} for weights of timm's NAME" if library == "timm" else ""
        raise UserError(f"{name}: a file says nothing of its architecture; load it as {model}{hint}")
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise UserError(f"{name}: no folder {model}")
    if Path(model).is_dir():
        check_folder(Path(model), name)
    with torch.random.fork_rng(devices=[]):  # networks draw weights before they get others
        torch.default_generator.manual_seed(0)
        if library == "timm":
            opened = from_timm(model, options.get("pretrained", "true"), options.get("preprocess"), size)
        else:
            opened = from_hf(model, options.get("revision"), options.get("preprocess"), size)
        return taken(opened, name)


def check_folder(folder: Path, name: str) -> None:
    """Raise UserError where `config.json` is damaged, or of a network beyond any machine: libraries try."""
    if not (folder / "config.json").is_file():
        return  # they say what they miss
    settings = read_config(folder / "config.json")
    found = settings | (inner if isinstance(inner := settings.get("model_args"), dict) else {})
    sizes: dict[str, Any] = {"heads": 1, "image_size": 1, "patch_size": 1, "depth": 1}
    for ours, theirs in SIZE_KEYS.items():
        if isinstance(value := next((found[word] for word in theirs if word in found), None), int):
            sizes[ours] = value
    side = sizes["patch_size"] = max(sizes["patch_size"], 1)
    sizes["image_size"] = max(sizes["image_size"] // side, 1) * side
    if isinstance(hidden := found.get("intermediate_size"), int) and sizes.get("width"):
        sizes["mlp_ratio"] = hidden / sizes["width"]
    try:
        build(ViTConfig, sizes)
    except ConfigError as error:
        raise UserError(f"{name}: config.json: {error}") from error
