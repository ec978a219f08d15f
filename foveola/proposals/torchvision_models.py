"""torchvision's detectors, `torchvision:NAME`: Faster and Mask R-CNN, RetinaNet, FCOS, SSD."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foveola.config import ConfigError, UserError, nearest
from foveola.proposals.found import FoundInImage, ImagePixels, OpenedDetector, frozen, weights_identity
from foveola.zoo.files import options_of
from foveola.zoo.foreign import import_library, one_line
from foveola.zoo.weights import read_weights

WEIGHTS_INSIDE = ("model", "state_dict")  # of torchvision's own training script, and of others
BATCHES_COUNTED = "num_batches_tracked"  # of norms, which frozen ones lack, and which no answer depends on


def open_torchvision(text: str, names: tuple[str, ...] | None, device: torch.device) -> OpenedDetector:
    """Open `NAME`, `NAME?weights=COCO_V1` or `NAME?weights=/file.pth`.

    Without `weights` they are torchvision's newest. A file is one for the classes of those, or `names` are
    its classes, the background excluded. Raises UserError, in one line, for names and weights that there are
    not, for files that do not fit, and where weights cannot be fetched.
    """
    name, _, query = text.partition("?")
    where = f"torchvision:{name}"
    models = import_library("torchvision", "detection").models
    known = models.list_models(module=models.detection)
    if name not in known:
        near = nearest(name, known)
        raise UserError(
            f"{where}: " + (f"did you mean {near!r}?" if near else f"expected one of {', '.join(known)}")
        )
    options = options_of(where, query)
    if unknown := options.keys() - {"weights"}:
        raise UserError(f"{where}: unknown option {min(unknown)!r}; known: weights")
    weights = options.get("weights", "DEFAULT")
    official = models.get_model_weights(name)
    if weights not in official.__members__:
        return _of_file(models, name, Path(weights), names, device)
    if names is not None:
        raise ConfigError(f"names has no effect: weights={weights} of {where} have names of their own")
    entry = official[weights]
    try:
        model = models.get_model(name, weights=entry, weights_backbone=None)
    except OSError as error:  # of the network, or of the disk
        raise UserError(
            f"{where}: its weights cannot be fetched ({one_line(error)}); where there is no network, put "
            f"{entry.url} into {_cache()}"
        ) from error
    return of_module(model, tuple(entry.meta["categories"]), device)


def of_module(model: Any, names: tuple[str, ...], device: torch.device) -> OpenedDetector:
    """Open a module whose outputs are those of torchvision's detectors; `names` are those of its outputs."""
    model = frozen(model, device)
    thresholds = getattr(model, "roi_heads", model)

    def find(images: Sequence[ImagePixels], score: float) -> list[FoundInImage]:
        thresholds.score_thresh = score
        pixels = [torch.from_numpy(image.copy()).to(device).permute(2, 0, 1) / 255 for image in images]
        return [
            FoundInImage(
                each["boxes"],
                each["scores"],
                each["labels"],
                each["masks"][:, 0] > 0.5 if "masks" in each else None,
            )
            for each in model(pixels)
        ]

    return OpenedDetector(names, find, weights_identity(model.state_dict()), reads=frozenset({"names"}))


def _cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _of_file(
    models: Any, name: str, path: Path, names: tuple[str, ...] | None, device: torch.device
) -> OpenedDetector:
    """A model with the weights of a file."""
    where, official = f"torchvision:{name}", models.get_model_weights(name)
    if not path.is_file():
        raise UserError(
            f"{where}: weights={path}: expected a file, or one of {', '.join(official.__members__)}"
        )
    for member in official:
        if Path(member.url).name == path.name:  # whose norms torchvision may build in another way
            raise UserError(
                f"{path} is torchvision's own: put it into {_cache()} and load {where}?weights={member.name}"
            )
    usual = tuple(official.DEFAULT.meta["categories"])
    outputs = usual if names is None else ("__background__", *names)
    with torch.random.fork_rng(devices=[]):
        model = models.get_model(name, weights=None, weights_backbone=None, num_classes=len(outputs))
    state: Any = read_weights(path)
    while wrapper := next((each for each in WEIGHTS_INSIDE if isinstance(state.get(each), dict)), None):
        state = state[wrapper]
    state = {key.removeprefix("module."): value for key, value in state.items() if hasattr(value, "shape")}
    own = {key: value for key, value in model.state_dict().items() if not key.endswith(BATCHES_COUNTED)}
    state = {key: value for key, value in state.items() if not key.endswith(BATCHES_COUNTED)}
    for what, keys in (("lacks", own.keys() - state.keys()), ("has an unknown", state.keys() - own.keys())):
        if keys:
            raise UserError(f"{path} {what} {min(keys)} of {where} ({len(keys)} such tensors)")
    for key, value in own.items():
        if state[key].shape != value.shape:
            found, expected = tuple(state[key].shape), tuple(value.shape)
            hint = "names= lists its classes" if names is None else "names= lists other classes"
            raise UserError(
                f"{path}: {key} is {found}, expected {expected} for {len(outputs)} outputs, background "
                f"included; {hint}"
            )
    model.load_state_dict(state, strict=False)
    return of_module(model, outputs, device)
