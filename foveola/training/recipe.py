"""Recipes: the configuration of a whole run, its YAML files, and what may be laid over them."""

import dataclasses
import re
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal

from foveola.config import (
    ConfigError,
    build,
    dump_yaml,
    key,
    merge,
    parse_overrides,
    refuse_unread,
)
from foveola.data.loader import LoaderConfig
from foveola.evaluation.classification.knn import KnnConfig
from foveola.methods import DOOR as METHOD_DOOR
from foveola.methods import config_class
from foveola.methods.capi import CapiConfig
from foveola.methods.distillation import DistillationConfig
from foveola.methods.ijepa import IJepaConfig
from foveola.methods.mae import MaeConfig
from foveola.methods.method import MethodConfig
from foveola.methods.terms import DOOR as TERM_DOOR
from foveola.models.encoder import EncoderConfig, TransformConfig
from foveola.models.lora import LoraConfig
from foveola.models.shape import SIZES, ViTConfig
from foveola.models.transform import PixelsConfig
from foveola.outside import name_of
from foveola.proposals.discover import DiscoverConfig
from foveola.proposals.filter import FilterConfig
from foveola.training import start
from foveola.training.freezing import ALL
from foveola.training.loop import Precision
from foveola.training.optimizer import OptimizerConfig
from foveola.training.planned import EvaluationConfig, check_choices
from foveola.training.sharding import Parallel, ShardingConfig, check_sharding
from foveola.training.shipped import layers_of, shipped
from foveola.views.batch import ViewsConfig
from foveola.zoo import transfer

LIKELY = {  # words that other libraries use, and what to write here
    "budget": "only `foveola pretrain auto` plans by a budget; write duration=",
    "epochs": "write duration='{} epochs'",
    "steps": "write duration='{} steps'",
    "max_steps": "write duration='{} steps'",
    "lr": "write optimizer.lr.value={}",
    "learning_rate": "write optimizer.lr.value={}",
    "weight_decay": "write optimizer.weight_decay.value={}",
    "warmup": "write optimizer.lr.warmup='{}', for example '5 %'",
    "num_workers": "write loader.workers={}",
    "workers": "write loader.workers={}",
    "image_size": "write views.global_size={0} model.image_size={0}",
    "patch_size": "write model.patch_size={}",
    "gpus": "it is for the command line, which then starts processes: foveola pretrain RECIPE gpus={} ...",
    "processes": "it is for the command line, which starts them: foveola pretrain RECIPE processes={} ...",
    "devices": "write gpus={}, on the command line",
    "resume": "the same command on the same out= goes on where it stopped",
    **dict.fromkeys(
        ("weights", "pretrained", "checkpoint", "teacher"), "write init={}, to start from weights"
    ),
}


@dataclass(frozen=True)
class About:
    """What `foveola recipes` says of a recipe."""

    method: str = key("", "name of the method")
    task: str = key("", "task that it fine-tunes for; empty = pretraining")
    model: str = key("", "name of the model")
    data: str = key("", "data it is made for")
    aim: str = key("", "published result it aims at")
    budget: str = key("", "time for which `pretrain auto` made it")
    init: str = key("", "weights that it is made to start from; a recipe without them starts fresh")


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run. `foveola pretrain RECIPE key=value` changes any of it."""

    recipe: str = key("", "name of the recipe")
    about: About = key(factory=About, help="what the recipe is for")
    data: str | None = key(
        None, "images to train on, as a data string: folder:/path, coco:/images?annotations=/f.json"
    )
    data_changed: Literal["refuse", "allow"] = key(
        "refuse", "whether a run goes on where its images are not those that it began with"
    )
    out: str | None = key(
        None, "run folder; null = runs/<recipe>-<time>, or the unfinished run of the same settings there"
    )
    init: str | None = key(
        None,
        "weights to start from: anything that foveola.load reads, whose shape `model` then has; null = fresh",
    )
    init_channels: str = key("mean", "weights for other channels: mean, repeat, or which are theirs: 3,2,1")
    seed: int = key(0, "seed of everything that is random", at_least=0, at_most=2**64 - 1)
    duration: str = key("100 epochs", "length of training: epochs, steps or samples")
    batch_size: int = key(1024, "images of a step, over all processes", at_least=1, at_most=2**24)
    accumulate: int = key(
        1, "number of parts in which each process computes its images of a step", at_least=1, at_most=2**24
    )
    parallel: Parallel = key(
        "ddp", "several processes: each has all weights (ddp), a part of them (fsdp), or of a copy (hsdp)"
    )
    sharding: ShardingConfig = key(factory=ShardingConfig, help="how parallel=fsdp and hsdp cut weights")
    precision: Precision = key("fp32", "arithmetic of the networks; losses and averages are always fp32")
    compile: bool = key(False, "torch.compile the networks")
    checkpoint_activations: bool = key(False, "recompute activations in backward: less memory, more time")
    device: str = key("auto", "cpu, cuda, cuda:N; auto = a GPU if there is one")
    model: ViTConfig = key(factory=partial(ViTConfig, channels=0), help="the network")
    # One of foveola's own, or of a method from outside.
    method: DistillationConfig | CapiConfig | MaeConfig | IJepaConfig | MethodConfig = key(
        factory=DistillationConfig, help="what is learned", among=config_class
    )
    views: ViewsConfig = key(factory=ViewsConfig, help="what is cut out of each image")
    loader: LoaderConfig = key(factory=LoaderConfig, help="how images are read")
    optimizer: OptimizerConfig = key(factory=OptimizerConfig, help="how weights move")
    freeze: dict[str, str] = key(
        factory=dict,
        help="parts that rest at first, by their names in --dry-run: {encoder: 1 epochs}, or {encoder: all}",
    )
    train_blocks: int | None = key(
        None, "so many last blocks of the encoder learn, and its final norm; null = all of it", at_least=1
    )
    lora: LoraConfig | None = key(
        None, "the encoder learns by updates of low rank, which are merged when it is written"
    )
    pixels: PixelsConfig = key(factory=PixelsConfig, help="what was found in the data; data= says it")
    transform: TransformConfig | None = key(
        None, "images at evaluation; null = shorter side to 8/7 of views.global_size, centre crop"
    )
    log_every: int = key(50, "steps between lines in metrics.jsonl", at_least=1)
    checkpoint_every: str = key("1 epochs", "time between checkpoints")
    keep: int = key(2, "newest checkpoints to keep", at_least=1)
    keep_every: str | None = key(
        None, "period after which a checkpoint stays for good, with its encoder in encoders/"
    )
    evaluate_every: str | None = key(None, "time between k-NN evaluations; null = none")
    evaluate_train: str | None = key(None, "labelled reference set of k-NN, as a data string; null = data")
    evaluate_test: str | None = key(
        None, "labelled data of the k-NN queries; null = the test split of evaluate_train"
    )
    evaluate: KnnConfig = key(factory=KnnConfig, help="settings of these evaluations")
    evaluations: dict[str, EvaluationConfig] = key(
        factory=dict, help="further evaluations while it trains, by names of yours (docs/adapt.md)"
    )
    best: str | None = key(
        None, "EVALUATION/METRIC, such as knn/top1, whose best encoder encoders/best is to keep"
    )
    stop_when_worse: bool = key(False, "end the run when an evaluation is worse beyond its paired interval")

    def __repr__(self) -> str:  # a dataclass keeps one that is there; its own is a line of 4,000 letters
        return f"RunConfig:\n{dump_yaml(self)}"

    def __post_init__(self) -> None:
        self.views.check(self.model.patch_size, self.method.annotations)
        self.method.check(self.views, self.model)
        check_choices(self)
        check_sharding(self)
        if self.lora is not None and self.train_blocks is not None:
            raise ValueError(
                "lora and train_blocks both say what learns: write lora.blocks, train_blocks=null"
            )
        if self.views.dropping is not None or self.views.blocks is not None:
            whole = "needs all patches, but views.dropping or views.blocks drop some: set it to"
            if self.model.window is not None:
                raise ValueError(f"model.window {whole} null")
            if self.model.relative_bias:
                raise ValueError(f"model.relative_bias {whole} false")
            if self.model.positions == "none":
                raise ValueError("model.positions=none: what is dropped is predicted by its position")
        if not self.method.knows_field:
            field = self.model.positions == "field"
            if field or self.views.placement is not None or self.views.position_masking is not None:
                raise ValueError(
                    f"method.name={self.method.name} knows no position field: use another model.positions, "
                    "views.placement=null, views.position_masking=null"
                )
        if self.transform is not None and self.transform.crop % self.model.patch_size:
            raise ValueError(
                f"transform.crop={self.transform.crop} is not a multiple of "
                f"the patch size {self.model.patch_size}"
            )

    def refuse_fresh(self) -> None:
        """Raise ConfigError where a run has no starting weights, and cannot be meant to have none."""
        if self.init is not None:
            return
        example = f"it needs init=..., for example init={self.about.init or 'hf:facebook/dinov2-small'}"
        if held := [f"method.{name}" for name in self.method.holding]:
            does = "keeps" if len(held) == 1 else "keep"
            instead = " ".join(f"{name}=null" for name in held)
            raise ConfigError(
                f"recipe {self.recipe!r}: {', '.join(held)} {does} what starting weights knew: {example}; "
                f"or {instead}"
            )
        if self.about.init and not self.about.task:  # whose head is fresh in any case
            raise ConfigError(f"recipe {self.recipe!r} goes on from trained weights: {example}")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        idle = {"init_channels": "there are no starting weights (init=null)"}
        if self.init is not None:
            idle = {"model.position_init": "positions come from the starting weights (init)"}
        if self.parallel == "ddp":
            idle["sharding"] = "parallel=ddp: each process has all weights"
        elif self.parallel == "fsdp":
            idle["sharding.replicas"] = "parallel=fsdp keeps one copy of the weights"
        if self.evaluate_every is None and not self.evaluations:
            idle["stop_when_worse"] = "nothing is measured (evaluate_every=null, no evaluations)"
        if self.views.objects is None:
            drawn = ("loader.objects_per_image", "loader.choose", "loader.objects_noise")
            drawn += ("loader.mask_canvas",) * (self.method.annotations != "instances")
            idle |= dict.fromkeys(drawn, "objects are not used (views.objects=null)")
        if self.loader.objects_per_image == 1:
            idle["method.token.weight_by"] = "one object of an image is drawn (loader.objects_per_image=1)"
        if ALL in map(self.freeze.get, ("encoder", "backbone")):
            idle |= dict.fromkeys(("lora", "train_blocks"), "freeze.encoder=all: nothing of it learns")
        return idle

    def encoder(self) -> EncoderConfig:
        """Return the encoder that this run makes."""
        size, color = self.views.global_size, self.views.color
        transform = self.transform or TransformConfig(round(size * 8 / 7), size, color.mean, color.std)
        transform = dataclasses.replace(transform, **vars(self.pixels))
        model = dataclasses.replace(self.model, drop_path=0.0, channels=self.model.seen_channels)
        return EncoderConfig(model, transform, self.recipe, self.method.pool, self.method.saved_predictor)


@dataclass(frozen=True, repr=False)
class BootstrapConfig(RunConfig):
    """A loop: objects from features, training on them, objects from better features. Each round is a run.

    Any recipe with object-aware views becomes one by the key `rounds`.
    """

    rounds: int = key(2, "rounds: find objects by features, and train on them", at_least=1, at_most=100)
    first_duration: str | None = key(
        None, "length of the round without objects that comes first where there is no init; null = duration"
    )
    restart: bool = key(
        False, "each round begins from what the loop began with, not with the encoder of the round before"
    )
    discover: DiscoverConfig = key(factory=DiscoverConfig, help="how objects are cut out of features")
    filter: FilterConfig = key(factory=FilterConfig, help="which of the objects that are found are kept")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.views.objects is None:
            raise ValueError("rounds: a round trains on the objects that were found: set views.objects={}")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        idle = super().unread()
        if self.init is not None:
            idle["first_duration"] = "init gives features: no round without objects comes first"
        return idle


def run_config(tree: dict[str, Any]) -> RunConfig:
    """Return the configuration of a tree: that of a loop where it has `rounds`."""
    return build(BootstrapConfig if "rounds" in tree else RunConfig, tree)


def recipes() -> dict[str, About]:
    """Return the recipes that come with the package."""
    return {
        name: build(About, reduce(lay, layers_of(name), {}).get("about", {}), "about") for name in shipped()
    }


def installed() -> list[str]:
    """Return how a recipe asks for each method and term that installed packages announce, a line each."""
    found = [f"installed: method.name={name}" for name in METHOD_DOOR.others()]
    return found + [f"installed: method.{name}={{}} (for distillation)" for name in TERM_DOOR.others()]


def resolve(recipe: str | Path, overrides: list[str] | dict[str, Any] | None = None) -> RunConfig:
    """Return a recipe by name or YAML path, with `key=value` strings or a (nested or dotted) dict over it."""
    changes = nested(overrides) if isinstance(overrides, dict) else parse_overrides(overrides or [])
    return _asked_for(layers_of(str(recipe)), changes)


def with_changes(tree: dict[str, Any], changes: dict[str, Any]) -> RunConfig:
    """Return a configuration as a tree, with what a user asks for laid over it.

    Raises ConfigError for what cannot be, and for likely words that mean something else here.
    """
    return _asked_for([tree], changes)


def _asked_for(layers: list[dict[str, Any]], changes: dict[str, Any]) -> RunConfig:
    for name in changes.keys() & LIKELY.keys():
        raise ConfigError(f"unknown key {name!r}; {LIKELY[name].format(changes[name])}")
    if isinstance(changes.get("model"), str) and changes["model"] not in SIZES:
        raise ConfigError(f"model={changes['model']!r}; write init={changes['model']}, to start from weights")
    if re.fullmatch(r"\d+", duration := str(changes.get("duration")).strip()):
        raise ConfigError(f"duration={duration} has no unit: write '{duration} epochs' or '{duration} steps'")
    tree, shape = _laid([*layers, changes])
    config = run_config(tree)
    if shape is not None:
        transfer.check(shape, config.model, str(config.init))
    refuse_unread(config, changes)
    return config


def _laid(layers: list[dict[str, Any]]) -> tuple[dict[str, Any], ViTConfig | None]:
    """The layers as one tree, and the shape of its starting weights, if it has to be that of the network.

    What the weights say stands over the layers below the one that names them, and below those above it.
    """
    tree = reduce(lay, layers, {})
    if tree.get("init") is None:
        return tree, None
    named = max(i for i, layer in enumerate(layers) if layer.get("init") is not None)
    lower, given = reduce(lay, layers[:named], {}), reduce(lay, layers[named:], {})
    lower, shape = start.under(lower, given)
    return lay(lower, given), shape


def lay(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`merge`, but for what a layer says as a whole.

    A `model.size` wins over the width, depth and heads of the layer below: who asks a small recipe for
    size=base means all of it. `model.width`, ... in the same layer still count. Another `method.name` begins
    with that method's defaults. A term from outside that is null is not there: without it there is no key.
    """
    model, new = tree.get("model"), changes.get("model")
    if isinstance(model, dict) and isinstance(new, dict) and new.get("size") is not None:
        tree = tree | {"model": {k: v for k, v in model.items() if k not in ("width", "depth", "heads")}}
    method, new = tree.get("method") or {}, changes.get("method")
    if not isinstance(method, dict) or not isinstance(new, dict):
        return merge(tree, changes)
    usual = method.get("name", DistillationConfig.name)
    if new.get("name", usual) != usual:
        about = {k: v for k, v in (tree.get("about") or {}).items() if k not in ("method", "aim")}
        return merge(tree | {"method": {}, "about": about}, changes)
    own = {k for k, v in method.items() if isinstance(v, dict) and "name" in v}
    off = {k for k in own if new.get(k, own) is None}
    settings = {"method": {k: v for k, v in method.items() if k not in off}}
    return merge(tree | settings, changes | {"method": {k: v for k, v in new.items() if k not in off}})


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    """Turn `{"model.size": "base"}` into `{"model": {"size": "base"}}`; a class becomes its name."""
    tree: dict[str, Any] = {}
    for name, value in changes.items():
        branch: Any = name_of(value) if isinstance(value, type) else value
        branch = nested(branch) if isinstance(branch, dict) else branch
        for part in reversed(name.split(".")):
            branch = {part: branch}
        tree = merge(tree, branch)
    return tree
