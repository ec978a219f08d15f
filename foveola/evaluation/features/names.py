"""Kinds of features: what one pass of an encoder can say about the images of a batch."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Shaped
from torch import Tensor
from torch.nn.functional import interpolate

from foveola.config import UserError
from foveola.models.encoder import Encoder, gives_attention
from foveola.zoo.load import load

ATTENTION = ("attention", "lowest_entropy", "centre")
FEATURE_NAMES = ("token", "masked", "average", "patches", "predictor", *ATTENTION)
EXTERNAL = "external:"  # external:MODEL, patches averaged by the attention of another encoder


@dataclass(frozen=True)
class Need:
    """What a protocol reads of an image.

    Kinds: `token` and `masked` (class token, and object token that reads its object, of the last `layers`
    blocks), `average` (of the patches), `patches` (all), `predictor` (mean of CAPI's predictions),
    and the patches averaged by attention of the last block: `attention` (of the class token, mean over the
    heads), `lowest_entropy` (of its head of lowest entropy, for each image), `centre` (of the central
    patch, mean over the heads), `external:MODEL` (of the class token of another encoder).

    `crops` is how random crops of training images are resized; None = as the encoder resizes images.

    `size` is how many pixels a side the crop of an image has; None = as the encoder has it. `block` is the
    index of the block whose output is read in place of the last one's (and the `layers` before it), through
    the final norm as well; None = the last.

    With `side`, images are not resized and cropped as the encoder has it, but squashed whole to so many
    pixels a side; then there are `maps` too, their label maps squashed alike.
    """

    kinds: frozenset[str]
    layers: int = 1
    side: int | None = None
    crops: Literal["bicubic", "bilinear"] | None = None
    size: int | None = None
    block: int | None = None

    def __or__(self, other: "Need") -> "Need":
        if (self.side, self.size, self.block) != (other.side, other.size, other.block):
            raise ValueError("one pass over images of two sizes, or to two blocks")
        layers, crops = max(self.layers, other.layers), self.crops or other.crops
        return replace(self, kinds=self.kinds | other.kinds, layers=layers, crops=crops)

    def at(self, encoder: Encoder, size: int | None = None, block: int = -1) -> "Need":
        """Return the same of images of another size, or of another block. Raises UserError for what there is
        not.
        """
        size = None if size == encoder.config.transform.crop else size
        if size is not None:
            encoder.check_side(size, "image_size")
        index: int | None = encoder.block_index(block)
        if index == encoder.config.model.shape[1] - 1:
            index = None
        elif "predictor" in self.kinds:
            raise UserError(f"block={block}: predictor reads the last block")
        elif index is not None and index + 1 < self.layers:
            raise UserError(
                f"block={block}: features of the {self.layers} blocks up to it: there are {index + 1}"
            )
        return replace(self, size=size, block=index)


def need(*kinds: str, layers: int = 1) -> Need:
    """Return the `Need` of the kinds given. Raises UserError for one that does not exist."""
    for kind in kinds:
        if kind not in FEATURE_NAMES and not (kind.startswith(EXTERNAL) and len(kind) > len(EXTERNAL)):
            raise UserError(f"unknown features {kind!r}; known: {', '.join(FEATURE_NAMES)}, {EXTERNAL}MODEL")
    return Need(frozenset(kinds), layers)


def check_kinds(encoder: Encoder, kinds: Iterable[str], layers: int) -> None:
    """Raise UserError where the encoder cannot give one of the kinds."""
    depth = encoder.config.model.shape[1]
    if layers > 1:
        encoder.check_inside(f"features of the last {layers} blocks")
    if not 1 <= layers <= depth:
        raise UserError(f"features of the last {layers} blocks: this encoder has {depth}")
    for kind in kinds:
        if kind in ("masked", *ATTENTION):
            if kind == "masked":
                encoder.check_inside("a token that reads an object alone")
            if not gives_attention(encoder.backbone):
                encoder.check_inside(f"features={kind}")
        if (
            kind in ("token", "masked", "attention", "lowest_entropy")
            and not encoder.config.model.class_token
        ):
            raise UserError(f"features={kind}: this encoder has no class token; use average or centre")
        if kind == "predictor" and encoder.predictor is None:
            raise UserError(f"features=predictor: this encoder has {', '.join(encoder.config.pools)}")


def shape_of(encoder: Encoder, kind: str, wanted: Need) -> tuple[int, ...]:
    """Return the shape of a kind of feature of one image."""
    width, side = encoder.config.model.shape[0], wanted.side or wanted.size or encoder.config.transform.crop
    patches = (side // encoder.patch_size) ** 2
    if kind in ("token", "masked"):
        return wanted.layers, width
    if kind == "maps":
        return side, side
    if kind == "predictor" and encoder.predictor is not None:
        return (encoder.predictor.width,)
    return (patches, width) if kind == "patches" else (width,)


class FeatureReader:
    """Computes kinds of features of images; keeps the other encoders of `external:` kinds.

    Features are put on `device`; by default on the CPU.
    """

    def __init__(self, encoder: Encoder, precision: str, device: torch.device | str = "cpu") -> None:
        self.encoder, self.precision, self.device = encoder, precision, device
        self.others: dict[str, Encoder] = {}

    def other(self, kind: str) -> Encoder:
        """Return the encoder of an `external:` kind. Raises UserError where it has no class token or grid."""
        if kind not in self.others:
            encoder = load(kind.removeprefix(EXTERNAL), self.encoder.device)
            check_kinds(encoder, ("attention",), 1)
            self.others[kind] = encoder
        return self.others[kind]

    @torch.inference_mode()
    def __call__(
        self, images: Shaped[Tensor, "b ch S S"], masks: Bool[Tensor, "b N"], wanted: Need
    ) -> dict[str, Float32[Tensor, "b ..."]]:
        """Features of each wanted kind, float32; all but `masked` without regard to masks."""
        encoder, kinds = self.encoder.eval(), wanted.kinds
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            moved = images.to(encoder.device)
            pixels = encoder.normalise(moved)
            found: dict[str, Tensor] = {}
            later = 0 if wanted.block is None else encoder.config.model.shape[1] - 1 - wanted.block
            block = -1 if wanted.block is None else wanted.block
            attention = bool(kinds & set(ATTENTION))
            plain = encoder.capture(pixels, wanted.layers + later, attention=attention, block=block)
            layers = plain.layers[: wanted.layers]
            last = layers[-1]
            tokens = [layer.objects[:, 0] for layer in layers if layer.objects.shape[1]]
            if "masked" in kinds:
                plain_tokens = torch.stack(tokens, dim=1).float()
                found["masked"] = self._masked(pixels, masks, plain_tokens, wanted.layers, later)
            if "token" in kinds:
                found["token"] = torch.stack(tokens, dim=1)
            patches = last.patches.float()
            found |= {"average": encoder.backbone.fc_norm(patches.mean(dim=1)), "patches": patches}
            if "predictor" in kinds:
                found["predictor"] = encoder.predictions(last).float().mean(dim=1)
            count = patches.shape[1]
            if plain.attention is not None:
                if kinds & set(ATTENTION[:2]):
                    rows = plain.attention.objects()[:, :, 0, -count:]
                    found["attention"] = weigh(rows.mean(dim=1), patches)
                    found["lowest_entropy"] = weigh(lowest_entropy(rows), patches)
                found["centre"] = weigh(plain.attention.centre()[:, :, -count:].mean(dim=1), patches)
            for kind in (kind for kind in kinds if kind.startswith(EXTERNAL)):
                found[kind] = weigh(self._foreign(kind, moved, last.grid), patches)
        return {kind: found[kind].float().to(self.device) for kind in kinds}

    def _masked(self, pixels: Tensor, masks: Tensor, plain: Tensor, layers: int, later: int) -> Tensor:
        """Object tokens; one that reads everything is the class token, and not computed again."""
        new = ~masks.all(dim=1)
        tokens = plain.clone()
        if new.any():
            objects = masks[new][:, None].to(pixels.device)
            outputs = self.encoder.layers(pixels[new.to(pixels.device)], layers + later, objects)[:layers]
            tokens[new.to(tokens.device)] = torch.stack([o.objects[:, 0] for o in outputs], dim=1).float()
        return tokens

    def _foreign(self, kind: str, images: Tensor, grid: tuple[int, int]) -> Float[Tensor, "b N"]:
        other = self.other(kind).eval()
        other.check_side(images.shape[-1], "images", kind)
        seen = other.attention(other.normalise(images))
        rows, columns = seen.grid
        maps = seen.objects()[:, :, 0, seen.special :].mean(dim=1).view(-1, 1, rows, columns)
        if (rows, columns) != grid:
            maps = interpolate(maps, grid, mode="bilinear", antialias=True).clamp_(min=0)
        return maps.flatten(1)


def weigh(weights: Float[Tensor, "b N"], patches: Float[Tensor, "b N D"]) -> Float[Tensor, "b D"]:
    """Return patches averaged with the weights, which need not sum to one."""
    return torch.einsum("bn,bnd->bd", weights / weights.sum(dim=1, keepdim=True), patches)


def lowest_entropy(rows: Float[Tensor, "b heads N"]) -> Float[Tensor, "b N"]:
    """Return, of each image, the row of the head whose distribution over the patches has the lowest
    entropy.
    """
    shares = rows / rows.sum(dim=2, keepdim=True)
    best = torch.special.entr(shares).sum(dim=2).argmin(dim=1)
    return shares[torch.arange(len(shares), device=shares.device), best]
