"""The contract of protocols, what their numbers are, and the list of those that foveola has.

A protocol measures a frozen encoder. It says what it reads of the training and test data (`needs`), and gives
numbers (`measure`), each of which it declares (`Metric`). `evaluate` runs protocols and knows none by name.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, ClassVar, Literal, get_args

from foveola.config import UserError
from foveola.data.sources import Source
from foveola.evaluation.features.cache import Feed
from foveola.evaluation.features.need import Need
from foveola.evaluation.features.store import Store
from foveola.models.encoder import Encoder
from foveola.outside import Door, is_importable

# By importable name, in the order in which they count: where several were measured, the first one answers
# whether training helped. Labels of people come before what needs none, what is not trained before what is.
PROTOCOLS = {
    "classify": "foveola.evaluation.classification.classify:Classify",
    "segment": "foveola.evaluation.segmentation.segment:Segment",
    "knn": "foveola.evaluation.classification.knn:Knn",
    "logistic": "foveola.evaluation.classification.logistic:Logistic",
    "linear": "foveola.evaluation.classification.linear:Linear",
    "attentive": "foveola.evaluation.classification.attentive:Attentive",
    "abmilp": "foveola.evaluation.classification.abmilp:Abmilp",
    "probes": "foveola.evaluation.classification.probes:Probes",
    "knn_segmentation": "foveola.evaluation.segmentation.patches:KnnSegmentation",
    "logistic_segmentation": "foveola.evaluation.segmentation.patches:LogisticSegmentation",
    "linear_segmentation": "foveola.evaluation.segmentation.linear:LinearSegmentation",
    "dense_retrieval": "foveola.evaluation.segmentation.retrieval:DenseRetrieval",
    "detect": "foveola.evaluation.detection.detect:Detect",
    "localisation": "foveola.evaluation.localisation.localisation:Localisation",
    "discovery": "foveola.evaluation.detection.discovery:Discovery",
    "retrieval": "foveola.evaluation.views.retrieval:Retrieval",
    "label_free": "foveola.evaluation.views.label_free:LabelFree",
}
DOOR = Door("protocol", "foveola.protocols", PROTOCOLS, "my_module:MyProtocol")


# -- numbers -------------------------------------------------------------------------------------------------

WORDS = {"masks": "object masks", "plain": "whole image"}  # how a token reads, in names of metrics
INTERVAL_ENDS = ("_low", "_high")  # of the interval of a metric, which are no metrics themselves


Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Metric:
    """What one number of a protocol is, or what all numbers are whose names fit a pattern.

    Every result keeps the declarations of its protocol, so that tables, comparisons and reports need no
    lists.

    Attributes:
        name: a name, or a pattern in which each `*` stands for any text: `top1_*`. Of several that fit, the
            one with most letters of its own counts.
        label: the number for people; each {} becomes what a `*` stands for, in words.
        better: "higher" or "lower": encoders are compared by it. "neither": it describes features, without a
            better direction. None: it is no measure of the encoder, such as a chosen setting.
        unit: "%", "nats", ..., or "" for a plain number. Scores of rows, in [0, 1], are compared in percent.
        chance: what guessing gives: the name of a metric, with {} as in `label`, or a number of guesses among
            the classes of the test data.
        main: whether the protocol stands for this number first of all.
        digits: how many digits after the point are printed.
        column: its heading in a table that has a row for what the last `*` stands for.
    """

    name: str
    label: str = ""
    better: Better | None = None
    unit: str = "%"
    chance: str | int | None = None
    main: bool = False
    digits: int = 2
    column: str = ""

    @property
    def compared(self) -> bool:
        """Whether one encoder can be better than another by this number."""
        return self.better in ("higher", "lower")

    def stars(self, name: str) -> tuple[str, ...] | None:
        """Return what each `*` stands for in this name; None for a name that does not fit."""
        pattern = "(.+?)".join(map(re.escape, self.name.split("*")))
        match = re.fullmatch(pattern, name)
        return None if match is None else match.groups()

    def title(self, name: str, masks: bool = True) -> str:
        """Return the number of this name for people; without `masks` it goes without saying that none was
        used.
        """
        words = []
        for star in self.stars(name) or ():
            parts = [WORDS.get(part, part) for part in star.split("_") if masks or part != "plain"]
            words.append(" ".join(parts))
        text = self.label.format(*words).replace(" ()", "").rstrip()
        return text + f", {self.unit}" * (self.better == "neither" and bool(self.unit))


def declared(metrics: Sequence[Metric], protocol: str, name: str) -> Metric:
    """Return the declaration of a number; for one that a protocol does not declare, one that says nothing of
    it.
    """
    fitting = [metric for metric in metrics if metric.stars(name) is not None]
    label = f"{protocol.replace('_', ' ')}: {name.replace('_', ' ')}"
    letters = max((len(metric.name.replace("*", "")) for metric in fitting), default=0)
    best = [metric for metric in fitting if len(metric.name.replace("*", "")) == letters]
    return best[0] if best else Metric(name, label.replace("{", "{{").replace("}", "}}"), unit="")


# -- the contract --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """One way in which a protocol reads images: which features, and of which views.

    `views` counts the random crops of each training image that are stored beside its evaluation view. Who
    reads everything `once`, from the first image to the last, can do without stored features: `At.feed` is
    then None, unless somebody else reads the same, or the features are kept for later.
    """

    need: Need
    views: int = 0
    once: bool = False


@dataclass(frozen=True)
class Needs:
    """What a protocol reads from the shared pass over the training and the test images.

    Empty is what it reads in a way of its own, with the encoder.
    """

    train: tuple[Reading, ...] = ()
    test: tuple[Reading, ...] = ()


@dataclass(frozen=True, eq=False)
class At:
    """The encoder, the data and the stored features with which a protocol measures."""

    encoder: Encoder
    train: Any  # a Source; None where there is none
    test: Any  # a Source
    feed: Feed | None = None
    progress: bool = True

    def open(self, source: Source, config: Any, need: Need, views: int = 0) -> Store:
        """Return stored features of a source, which `needs` announced; computed now where they are
        missing.
        """
        if self.feed is None:
            raise ValueError(
                "stored features are opened that `needs` does not announce, or announces as once"
            )
        return self.feed.open(source, config, need, views)


@dataclass(frozen=True)
class Outcome:
    """What a protocol measured: numbers, facts of the data behind them, and notes for the reader."""

    metrics: dict[str, float]
    data: dict[str, Any]
    notes: tuple[str, ...] = field(default=())
    chosen: dict[str, Any] = field(default_factory=dict)  # settings that were chosen from a grid
    grid: dict[str, Any] = field(default_factory=dict)  # every entry of the grid with its numbers
    scores: dict[str, Any] = field(default_factory=dict)  # of a metric that of each row, by `paired.packed`
    beside: dict[str, Any] = field(
        default_factory=dict
    )  # what is kept in a folder beside the result, by file
    # name: trees that become JSON, or objects with a method `save(path)`
    settings: dict[str, Any] | None = None  # those that count, where they are not those that were asked for


class Protocol(ABC):
    """A way to measure a frozen encoder. docs/extend.md shows one of about 40 lines.

    Attributes:
        name: how it is asked for; its results are `results/<name>.json`.
        title: its name for people; `name` with spaces, unless it has another one.
        help: one line on what it measures.
        Config: a frozen dataclass of its keys (`foveola.config.key`), each with a default.
        train: what becomes of training data: they are "needed", "optional" (where they are given and have
            labels), or "unused".
        metrics: what its numbers are.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    help: ClassVar[str]
    Config: ClassVar[type]
    train: ClassVar[Literal["needed", "optional", "unused"]] = "unused"
    metrics: ClassVar[tuple[Metric, ...]] = ()

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls) and "title" not in vars(cls):
            cls.title = cls.name.replace("_", " ")

    def needs(self, config: Any, encoder: Encoder) -> Needs:
        """Return what is read from the shared pass; nothing, unless a protocol says so.

        Raises UserError for settings that this encoder cannot serve.
        """
        return Needs()

    def train_for(self, config: Any) -> Literal["needed", "optional", "unused"]:
        """Return what becomes of training data with these settings; as `train` says, if nothing else."""
        return self.train

    @abstractmethod
    def measure(self, at: At, config: Any) -> Outcome:
        """Return the numbers. All ranks call it, and the numbers of the first count.

        Raises UserError for data that lack what it needs.
        """

    def measure_all(self, every: Sequence[At], config: Any) -> list[Outcome]:
        """Return the numbers of several test sets, which `every` differs in; a protocol that trains something
        trains it once.
        """
        return [self.measure(at, config) for at in every]


# -- finding one ---------------------------------------------------------------------------------------------


def find_protocol(protocol: "str | Protocol | type[Protocol]") -> Protocol:
    """Return a protocol by its name, by an importable name (`my_package.my_module:MyProtocol`), or as it is.

    Names are those of `PROTOCOLS`, then those that packages announce in the group `foveola.protocols`. Raises
    UserError for a name that nothing has, and for what is no protocol.
    """
    if not isinstance(protocol, str):
        return _checked(protocol, getattr(protocol, "__name__", type(protocol).__name__))
    found = _checked(DOOR.find(protocol), protocol)
    if found.name != protocol and not is_importable(protocol):
        raise UserError(f"protocol {protocol!r} of an installed package calls itself {found.name!r}")
    return found


def every() -> Iterator[Protocol]:
    """Yield all protocols that can be asked for by name."""
    yield from map(find_protocol, DOOR.names())


def _checked(found: Any, label: str) -> Protocol:
    """An instance that keeps the contract. Raises UserError for anything else."""
    found = found() if isinstance(found, type) and issubclass(found, Protocol) else found
    if not isinstance(found, Protocol):
        raise UserError(f"{label} is no protocol: a class with the base foveola.Protocol is needed")
    lacking = [name for name in ("name", "help", "Config") if not hasattr(found, name)]
    if lacking or not is_dataclass(found.Config):
        raise UserError(f"{label}: a protocol needs {lacking[0] if lacking else 'a dataclass as Config'}")
    if not re.fullmatch(r"[A-Za-z]\w*", found.name, re.ASCII):
        raise UserError(
            f"{label}: the name {found.name!r} is needed in letters, digits and _, for its results"
        )
    metrics = found.metrics
    if not (isinstance(metrics, tuple | list) and all(isinstance(each, Metric) for each in metrics)):
        raise UserError(f"{label}: metrics needs a tuple of foveola.Metric, such as (Metric('top1', ...),)")
    wrong = next((each for each in metrics if each.better not in (*get_args(Better), None)), None)
    if wrong is not None:
        valid = ", ".join(get_args(Better))
        raise UserError(f"{label}: better={wrong.better!r} of {wrong.name}: valid are {valid}, or None")
    own = PROTOCOLS.get(found.name)
    if own is not None and own != f"{type(found).__module__}:{type(found).__name__}":
        raise UserError(f"{label}: {found.name!r} is a protocol of foveola; another one needs another name")
    return found
