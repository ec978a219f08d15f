"""Starting weights of a run: what they say of its recipe, and what its method gets of them."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from foveola import distributed
from foveola.config import ConfigError, UserError, build, read_yaml, renewed, to_dict
from foveola.failures import explained
from foveola.files import EncoderFolder, RunFolder
from foveola.methods import find_method
from foveola.model_names import run_model
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.starting import SIDES, StartingWeights
from foveola.models.vit import ViTConfig
from foveola.training import checkpoint
from foveola.views.batch import ViewsConfig
from foveola.zoo.load import load
from foveola.zoo.training_heads import parts_in
from foveola.zoo.transfer import FREE, SHAPE_KEYS, USUAL_CHANNELS, has_fixed_table, transfer
from foveola.zoo.weights import read_config

Tree = dict[str, Any]
FIELD = ("positions", "field_size", "field_interpolation", "field_alignment")


def under(lower: Tree, overrides: Tree) -> tuple[Tree, ViTConfig | None]:
    """Return the layers of a recipe below the one that names `init`, as the weights change them.

    The shape of the network comes from the weights, and so do mean and deviation of pixels; sizes of views
    become the nearest ones of whole patches. What the recipe needs of a network that they lack, and that can
    be added, stays: the class token of its method, and its position field. `overrides` are the layers above,
    which say what they want.

    Also returns the shape of the weights; None where `overrides` says all of the network, as a run's own
    configuration does: then nothing is read here. Raises UserError for weights that cannot be read.
    """
    model, lowest = _group(overrides, "model"), _group(lower, "model")
    if model.keys() >= set(SHAPE_KEYS):
        return lower, None
    earlier = _of_run(str(overrides["init"]), overrides.get("out"))
    found, encoder = earlier or _settings(str(overrides["init"]))
    have = found.model
    shape: Tree = {name: value for name, value in to_dict(have).items() if name not in FREE}
    shape |= {name: lowest[name] for name in FREE if name in lowest}
    patch = model.get("patch_size", have.patch_size)
    if earlier is None:
        shape |= _kept_positions(overrides, lowest, have, encoder)
        shape["class_token"] = have.class_token or _needs_class_token(lower, overrides)
        if isinstance(patch, int):
            shape["image_size"] = have.grid[0] * patch  # the table stays as it is
    lower = _with_views(lower | {"model": shape}, overrides, patch)
    return _with_pixels(lower, overrides, found.transform), None if earlier else have


def _kept_positions(overrides: Tree, lowest: Tree, have: ViTConfig, encoder: Encoder | None) -> Tree:
    """Keys of positions that stay as the recipe has them, since positions of the weights can be made so."""
    usual = lowest.get("positions")
    table = usual == "sincos" and have.positions == "learned"
    if table and has_fixed_table((encoder or _loaded(str(overrides["init"]))).backbone):
        return {"positions": "sincos", "position_antialias": False, "position_offset": 0.0}
    field: Tree = {}
    if usual == "field" and have.positions in ("learned", "sincos"):
        field = {name: lowest[name] for name in FIELD if name in lowest}
    positions = _group(overrides, "model").get("positions", field.get("positions", have.positions))
    if positions == "field" != have.positions:
        field["field_size"] = list(have.grid)  # nodes that give the table back
    return field


def _of_run(init: str, out: Any) -> tuple[EncoderConfig, None] | None:
    """What the run in `out` says of weights that it began with: their file may be gone."""
    saved = None if out is None else RunFolder(Path(str(out)).expanduser()).config
    if saved is None or not saved.is_file():
        return None
    with suppress(UserError, KeyError, TypeError):
        tree = renewed(read_yaml(saved))
        if tree.get("init") == init:
            color = tree["views"]["color"]
            transform = TransformConfig(mean=tuple(color["mean"]), std=tuple(color["std"]))
            return EncoderConfig(build(ViTConfig, tree["model"]), transform, pool="average"), None
    return None


def _settings(init: str) -> tuple[EncoderConfig, Encoder | None]:
    """What starting weights are; the encoder where all of it had to be read for that."""
    path = Path(init)
    for folder in (RunFolder(path).encoder, EncoderFolder(path)):
        if folder.is_whole():
            settings = read_config(folder.config)
            if "model" in settings:  # of ours
                return build(EncoderConfig, settings, where=str(folder.config)), None
    encoder = _loaded(init)
    return encoder.config, encoder


def _loaded(init: str) -> Encoder:
    """The encoder behind `init`. A UserError names the run that began with it, and goes on without."""
    try:
        encoder = load(init)
        encoder.check_inside("training from it")
        return encoder
    except UserError as error:
        began = [path for path in Path("runs").glob("*/config.yaml") if read_yaml(path).get("init") == init]
        more = f"; {began[0].parent} began with it, and goes on without it: " if began else ""
        more += f"foveola pretrain {began[0]} out={began[0].parent}" if began else ""
        raise UserError(f"init={init}: {error}{more}") from error


def _group(tree: Tree, name: str) -> Tree:
    group = tree.get(name)
    return group if isinstance(group, dict) else {}


def _needs_class_token(lower: Tree, overrides: Tree) -> bool:
    names = (_group(overrides, "method").get("name"), _group(lower, "method").get("name"), "distillation")
    with suppress(UserError):  # an unknown name is refused where the configuration is built
        return find_method(str(next(name for name in names if name))).Config.needs_class_token
    return False


def _with_views(lower: Tree, overrides: Tree, patch: int) -> Tree:
    """The layers below with views of whole patches, where their sizes are not those that are given."""
    views, asked = _group(lower, "views"), _group(overrides, "views")
    usual = ViewsConfig()
    both = views | asked
    names = ["global_size", *(["local_size"] if both.get("local_count", usual.local_count) else [])]
    sizes = {name: views.get(name, getattr(usual, name)) for name in names if name not in asked}
    fitting = {name: _whole(size, patch) for name, size in sizes.items()}
    transform = _group(lower, "transform")
    if "crop" in transform and "crop" not in _group(overrides, "transform"):
        crop = _whole(transform["crop"], patch)
        resize = round(transform.get("resize", transform["crop"]) * crop / transform["crop"])
        lower = lower | {"transform": transform | {"resize": resize, "crop": crop}}
    for name, size in sizes.items():
        if fitting[name] != size:
            warnings.warn(
                f"views.{name}={fitting[name]} instead of the recipe's {size}: whole patches of {patch}",
                stacklevel=2,
            )
    return lower | {"views": views | fitting}


def _whole(size: int, patch: int) -> int:
    """The nearest multiple of the patch size, the larger of two."""
    return max(int(size / patch + 0.5), 1) * patch


def _with_pixels(lower: Tree, overrides: Tree, transform: TransformConfig) -> Tree:
    """The layers below with mean and deviation of the pixels that the weights know."""
    views = _group(lower, "views")
    known = {"mean": list(transform.mean), "std": list(transform.std)}
    lower = lower | {"views": views | {"color": _group(views, "color") | known}}
    if lower.get("transform") or overrides.get("transform"):
        chosen = _group(_group(overrides, "views"), "color")
        known |= {name: chosen[name] for name in known if name in chosen}
        lower = lower | {"transform": _group(lower, "transform") | known}
    return lower


class Start:
    """The starting weights of a run, which are read before anything is written.

    A run that goes on from a checkpoint needs them no longer: `failure` is why they could not be read, and
    `insist` raises it where they are needed.
    """

    def __init__(
        self, init: str | None, model: ViTConfig, out: str | None = None, channels: str = USUAL_CHANNELS
    ) -> None:
        self.init = init
        self.weights: StartingWeights | None = None
        self.failure: UserError | None = None
        if init is None or (out is not None and checkpoint.newest(Path(out).expanduser())):
            return
        try:
            self.weights = read_start(init, model, channels)
        except UserError as error:
            self.failure = error
            if channels != USUAL_CHANNELS and isinstance(error, ConfigError):
                raise

    def insist(self, folder: Path | None = None) -> None:
        """Raise UserError where a run in this folder has neither a checkpoint nor starting weights."""
        if self.init is None or self.weights is not None:
            return
        if folder is None or checkpoint.newest(folder) is None:
            raise self.failure or UserError(f"{folder} has lost its checkpoints: try again")

    def keep(self, folder: Path, encoder: Encoder, note: Callable[..., None]) -> None:
        """Say what a run starts from, and keep that encoder, with which what it becomes is compared."""
        assert self.weights is not None
        account = self.weights.close()
        note(f"starting weights {self.weights.name}: {account.line()}")
        for text in account.lines():
            note(f"starting weights, {text}", show=False)
        path = RunFolder(folder).saved_encoder(0).path
        if distributed.is_main():
            with explained(f"the starting encoder cannot be saved as {path}"):
                encoder.save(path)
        self.weights = None  # a copy of a network, which nothing reads again


def read_start(name: str, model: ViTConfig, channels: str = USUAL_CHANNELS) -> StartingWeights:
    """Return the weights that a run starts from, for its network, with what else of training is there.

    Raises UserError, in one line, for what cannot be read, and ConfigError for what does not fit.
    """
    encoder = _loaded(name)
    state, account = transfer(encoder, model, name, channels)
    account.unused = list(encoder.beside)
    parts: dict[str, Tensor] = {}
    names: dict[str, tuple[str, ...]] = {}
    if run := _run_of(name):
        step = encoder.config.step
        if step is not None or Path(name) in (run.path, run.encoder.path):  # earlier versions did not say it
            parts = _parts_of_run(run, step)
    else:
        parts, names = parts_in(name)
    inner = tuple(f"{side}.predictor." for side in SIDES)
    if encoder.predictor is not None and not any(part.startswith(inner) for part in parts):
        for key, value in encoder.predictor.state_dict().items():  # its first block, which pools
            parts[inner[0] + key], names[inner[0] + key] = value, (f"predictor.{key}",)
    head = encoder.head
    if head is not None:  # the same as in a checkpoint, which need not be there
        parts |= {f"student.task_head.{key}": value for key, value in head.state_dict().items()}
    classes = () if head is None else head.classes
    return StartingWeights(name, state, parts, names, account, classes)


def _run_of(name: str) -> RunFolder | None:
    """The run of an encoder that has one: named by its folder, one of its encoders, or `RUN?step=N`."""
    if named := run_model(name):
        return named.run
    path = Path(name)
    for folder in (path, path.parent, path.parent.parent) if path.is_dir() else ():
        if RunFolder(folder).is_run():
            return RunFolder(folder)
    return None


def _parts_of_run(run: RunFolder, step: int | None) -> dict[str, Tensor]:
    """Heads and the like in the checkpoint of a run from which an encoder is, if it is still there."""
    found = checkpoint.newest(run.path) if step is None else run.checkpoint(step)
    if found is None or not found.is_dir():
        return {}
    state = checkpoint.read_checkpoint(found)["trainer"]["method"]
    parts = {
        name if name.startswith(("student.", "teacher.")) else f"student.{name}": value
        for name, value in state.items()
        if hasattr(value, "shape") and not name.startswith("start.")  # what the run itself began with
    }
    networks = ("student.backbone.", "teacher.backbone.")
    inner = {key.removeprefix(networks[0]) for key in parts if key.startswith(networks[0])}
    return {
        name: value
        for name, value in parts.items()
        if not name.startswith(networks[1])
        and (not name.startswith(networks[0]) or name.endswith(".pos_mask_token"))
        and name.removeprefix("teacher.") not in inner
    }
