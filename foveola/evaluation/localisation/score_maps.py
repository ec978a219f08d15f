"""Maps over the patches that say where something is: attention, AbMILP's weights, a component."""

from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from foveola.config import UserError
from foveola.data.sources import Source
from foveola.evaluation.classification.abmilp import AbmilpConfig, AbmilpGrid
from foveola.evaluation.classification.task import HOLDOUT, held_out, length_of
from foveola.evaluation.classification.trained import judge
from foveola.evaluation.classification.training import Columns, ProbePlan, batches, train_plans, warm_cosine
from foveola.evaluation.features.cache import Feed
from foveola.evaluation.features.encoding import lowest_entropy
from foveola.evaluation.features.need import FeedConfig, need
from foveola.evaluation.metrics import GroundTruth, Judged
from foveola.models.encoder import Encoder

OF_TOKEN = ("attention", "lowest_entropy", "heads")  # what the class token reads
SCORE_MAPS = (*OF_TOKEN, "centre", "abmilp", "pca")
HEAD = "head"


class Weights(Protocol):
    """How much each patch goes into an image's vector."""

    def __call__(self, patches: Float[Tensor, "b N D"], /) -> Float[Tensor, "b N"]: ...


class Scores(NamedTuple):
    """AbMILP's weights as trained, and what is to be known about them."""

    weights: Weights
    facts: dict[str, Any]  # of the images that trained it
    chosen: dict[str, float]
    metrics: dict[str, float]


def is_map(name: str) -> bool:
    """Return whether a map of this name can exist: one of `MAPS`, or `head0`, `head1`, ..."""
    return name in SCORE_MAPS or (name.startswith(HEAD) and name.removeprefix(HEAD).isdecimal())


def choose_maps(encoder: Encoder, names: tuple[str, ...] | None, train: bool) -> tuple[str, ...]:
    """Return the maps asked for, `heads` written out; None: attention if the encoder has it, and AbMILP's.

    Raises UserError for what the encoder lacks, and for AbMILP without `train`ing data.
    """
    token, heads = encoder.config.model.class_token, encoder.config.model.shape[2]
    if names is None:
        names = (*(OF_TOKEN[:2] if token else ()), "centre", *(("abmilp",) if train else ()))
    every = [f"{HEAD}{i}" for i in range(heads)]
    chosen = [one for name in names for one in (every if name == "heads" else [name])]
    for name in chosen:
        of_head = name.startswith(HEAD)
        if not token and (name in OF_TOKEN or of_head):
            raise UserError(f"maps: {name} is of a class token, which this encoder lacks; use centre, abmilp")
        if of_head and int(name.removeprefix(HEAD)) >= heads:
            raise UserError(f"maps: there is no {name}; this encoder has head0 to head{heads - 1}")
        if name == "abmilp" and not train:
            raise UserError("maps: abmilp learns from images of two or more classes; give train=")
    return tuple(dict.fromkeys(chosen))


class MapReader:
    """Computes maps of images from one pass of the encoder."""

    weights: Weights | None = None  # AbMILP's, to be set where `names` has it

    def __init__(self, encoder: Encoder, names: tuple[str, ...], block: int, precision: str) -> None:
        self.encoder, self.names, self.precision = encoder.eval(), names, precision
        self.block = encoder.block_index(block)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Float32[Tensor, "b M h w"]:
        """Maps of uint8 images [b, 3, H, W] in whole patches, on the CPU, not normalised in any way."""
        encoder = self.encoder
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            pixels = encoder.normalise(images.to(encoder.device))
            seen = encoder.capture(pixels, attention=True, block=self.block)
        assert seen.attention is not None
        rows = torch.cat((seen.attention.objects(), seen.attention.centre()[:, :, None]), dim=2)
        rows, grid = rows[..., seen.attention.special :], seen.attention.grid
        patches = seen.layers[-1].patches.float()
        maps = [self._map(name, rows, patches, grid).cpu() for name in self.names]
        return torch.stack(maps, dim=1).unflatten(2, grid)

    def _map(
        self,
        name: str,
        rows: Float[Tensor, "b heads R N"],
        patches: Float[Tensor, "b N D"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "b N"]:
        if name == "attention":
            return rows[:, :, 0].mean(dim=1)
        if name == "lowest_entropy":
            return lowest_entropy(rows[:, :, 0])
        if name == "centre":
            return rows[:, :, -1].mean(dim=1)
        if name == "pca":
            return first_component(patches, grid)
        if name == "abmilp":
            assert self.weights is not None
            return self.weights(patches)
        return rows[:, int(name.removeprefix(HEAD)), 0]


def first_component(patches: Float[Tensor, "b N D"], grid: tuple[int, int]) -> Float[Tensor, "b N"]:
    """Return where each image's patches lie on the first principal component of their own.

    No sign is right by itself: the one is taken by which the outermost patches of the grid are below the
    mean, as what an image is of is seldom on its border. All zero where all patches are the same.
    """
    if not patches.isfinite().all():  # of which there are no components; whoever reads the maps says so
        return torch.full(patches.shape[:2], torch.nan, device=patches.device)
    x = patches.double()
    noise = 1e-6 * torch.linalg.vector_norm(x, dim=(1, 2))[:, None]  # what rounding leaves of a constant
    x = x - x.mean(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(x @ x.mT)
    length = values[:, -1:].clamp(min=0).sqrt()
    first = torch.where(length > noise, vectors[..., -1] * length, 0.0)
    edge = torch.ones(grid, dtype=torch.bool, device=patches.device)
    edge[1:-1, 1:-1] = False
    border = first[:, edge.flatten()].mean(dim=1, keepdim=True)
    return torch.where(border > 0, -first, first).float()


def learn_weights(
    feed: Feed,
    train: Source,
    config: FeedConfig,
    device: torch.device,
    *,
    lr: tuple[float, ...],
    epochs: int,
    progress: bool,
) -> Scores:
    """Train AbMILP (Selective Aggregation) trained to classify `train`; a tenth of it chooses among several
    `lr`.

    Other settings are those of the protocol `abmilp`. Raises UserError for fewer than two classes.
    """
    wanted = need("patches")
    store = feed.open(train, config, wanted)
    labels = store.column("labels")
    rows = torch.nonzero(labels >= 0).flatten()
    if len(torch.unique(labels[rows])) < 2:
        raise UserError(f"{train.name}: abmilp learns from images of two or more classes")
    fit, hold = held_out(rows, HOLDOUT * (len(lr) > 1), config.seed, labels[rows])
    settings = AbmilpConfig(epochs=epochs, lr=lr).sized(len(fit))
    batch, each, steps = length_of(len(fit), settings.batch or 1, epochs, None)
    grid = AbmilpGrid(
        torch.tensor(lr) * (batch / 256),
        store.take("patches", slice(1)).shape[2],
        max(int(labels.max()) + 1, len(train.classes or ())),
        optimizer=settings.optimizer or "lars",
        norm_batch=settings.norm_batch,
        seed=config.seed,
        device=device,
    )
    columns = Columns(store, fit, wanted, device)
    drawn = batches(columns, labels[fit], batch, steps, config.seed, 0)
    factor = warm_cosine(steps, min(settings.warmup * each, steps // 2))
    train_plans([ProbePlan([grid], factor, batch, steps)], drawn, progress)
    best, found = 0, {}
    if len(hold):
        order = _held(grid, store, hold, labels, device).order()
        best = max(range(len(lr)), key=order.__getitem__)
        found = {"holdout_abmilp": order[best][0]}

    def weights(patches: Float[Tensor, "b N D"]) -> Float[Tensor, "b N"]:
        return grid.weights(patches.to(device))[best]

    facts = {**store.facts, "fit": len(fit), "holdout": len(hold)}
    return Scores(weights, facts, {"lr": lr[best]}, found)


def _held(
    grid: AbmilpGrid, store: Any, hold: Int64[Tensor, "h"], labels: Int64[Tensor, "n"], device: torch.device
) -> Judged:
    """What the hold-out says of each probe."""
    return judge(
        grid,
        Columns(store, hold, need("patches"), device),
        GroundTruth(labels[hold], store.image_indices[hold]),
    )
