"""Recipes: the configuration of a whole run, its YAML files, and what may be laid over them."""

import dataclasses
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from foveola.config import ConfigError, build, key, merge, nearest, parse_overrides, read_yaml
from foveola.data.loader import LoaderConfig
from foveola.evaluation.knn import KnnConfig
from foveola.methods.distillation import DistillationConfig
from foveola.models.encoder import EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.training.loop import Precision
from foveola.training.optimizer import OptimizerConfig
from foveola.views.batch import ViewsConfig


@dataclass(frozen=True)
class About:
    """What `foveola recipes` says of a recipe."""

    method: str = key("", "name of the method")
    model: str = key("", "name of the model")
    data: str = key("", "data it is made for")
    aim: str = key("", "published result it aims at")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run. `foveola pretrain RECIPE key=value` changes any of it."""

    recipe: str = key("", "name of the recipe")
    about: About = key(factory=About, help="what the recipe is for")
    data: str | None = key(None, "pictures to train on, as a data string: folder:/path, coco:/images?annotations=/f.json")
    out: str | None = key(None, "run folder; null = runs/<recipe>-<time>, or the unfinished run of the same settings there")
    seed: int = key(0, "of everything that is random", at_least=0)
    duration: str = key("100 epochs", "length of training: epochs, steps or samples")
    batch_size: int = key(1024, "pictures a step, over all processes", at_least=1)
    accumulate: int = key(1, "parts in which each process goes through its share of a step", at_least=1)
    precision: Precision = key("fp32", "arithmetic of the networks; losses and averages are always fp32")
    compile: bool = key(False, "torch.compile the networks")
    checkpoint_activations: bool = key(False, "recompute activations in backward: less memory, more time")
    device: str = key("auto", "cpu, cuda, cuda:N; auto = a GPU if there is one")
    model: ViTConfig = key(factory=ViTConfig, help="the network")
    method: DistillationConfig = key(factory=DistillationConfig, help="what is learned")
    views: ViewsConfig = key(factory=ViewsConfig, help="what is cut out of each picture")
    loader: LoaderConfig = key(factory=LoaderConfig, help="how pictures are read")
    optimizer: OptimizerConfig = key(factory=OptimizerConfig, help="how weights move")
    transform: TransformConfig | None = key(None, "pictures at evaluation; null = shorter side to 8/7 of views.global_size, centre crop")
    log_every: int = key(50, "steps between lines in metrics.jsonl", at_least=1)
    checkpoint_every: str = key("1 epochs", "time between checkpoints")
    keep: int = key(2, "newest checkpoints to keep", at_least=1)
    keep_every: str | None = key(None, "also keep one checkpoint of each such period for good")
    evaluate_every: str | None = key(None, "time between k-NN evaluations; null = none")
    evaluate_train: str | None = key(None, "labelled data of the k-NN bank; null = data")
    evaluate_test: str | None = key(None, "labelled data of the k-NN queries; null = the test split of evaluate_train")
    evaluate: KnnConfig = key(factory=KnnConfig, help="settings of these evaluations")

    def __post_init__(self) -> None:
        self.views.check(self.model.patch_size)
        self.method.check(self.views)
        if self.transform is not None and self.transform.crop % self.model.patch_size:
            raise ValueError(
                f"transform.crop={self.transform.crop} is not a multiple of the patch size {self.model.patch_size}"
            )

    def encoder(self) -> EncoderConfig:
        """The encoder that this run makes."""
        size, color = self.views.global_size, self.views.color
        transform = self.transform or TransformConfig(round(size * 8 / 7), size, color.mean, color.std)
        return EncoderConfig(dataclasses.replace(self.model, drop_path=0.0), transform, self.recipe)


def recipes() -> dict[str, About]:
    """The recipes that come with the package."""
    folder = resources.files("foveola") / "recipes"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): build(About, (yaml.safe_load(f.read_text()) or {}).get("about", {})) for f in files}


def resolve(recipe: str | Path, overrides: list[str] | dict[str, Any] | None = None) -> RunConfig:
    """A recipe by name or YAML path, with `key=value` strings or a (nested or dotted) dict laid over it."""
    tree = _read_recipe(str(recipe))
    changes = nested(overrides) if isinstance(overrides, dict) else parse_overrides(overrides or [])
    return build(RunConfig, merge(tree, changes))


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    """`{"model.size": "base"}` to `{"model": {"size": "base"}}`; nested dicts stay."""
    tree: dict[str, Any] = {}
    for name, value in changes.items():
        for part in reversed(name.split(".")):
            value = {part: value}
        tree = merge(tree, value)
    return tree


def _read_recipe(recipe: str) -> dict[str, Any]:
    if recipe.endswith((".yaml", ".yml")):
        tree = read_yaml(Path(recipe))
        tree.setdefault("recipe", Path(recipe).stem)
    else:
        known = recipes()
        if recipe not in known:
            near = nearest(recipe, known)
            hint = f"did you mean {near!r}?" if near else "`foveola recipes` lists them; a path must end in .yaml"
            raise ConfigError(f"unknown recipe {recipe!r}; {hint}")
        with resources.as_file(resources.files("foveola") / "recipes" / f"{recipe}.yaml") as path:
            tree = read_yaml(path)
        tree.setdefault("recipe", recipe)
    if base := tree.pop("base", None):  # a recipe may name another one that it changes
        tree = merge(_read_recipe(base), tree)
    return tree
