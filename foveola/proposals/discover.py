"""Objects from the features of any encoder: TokenCut, MaskCut, LOST, attention, and weights of AbMILP."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Shaped
from torch import Tensor

from foveola.config import UserError, key, to_dict
from foveola.data.shown import rgb_of
from foveola.models.encoder import Encoder, gives_attention
from foveola.models.seen import seen_by
from foveola.models.transform import fit_to_patches
from foveola.proposals.cuts import CutObjects, brightest, centred, lost, maskcut, tokencut
from foveola.proposals.proposal import Proposals
from foveola.proposals.refine import Refine, enlarged, grabcut, opencv
from foveola.proposals.scored import probe_maps
from foveola.zoo.load import load

TAU = {"tokencut": 0.2, "maskcut": 0.15}  # as published
PATCHES = 4096  # of an image: its graph has as many squared edges, 64 MiB


@dataclass(frozen=True)
class DiscoverConfig:
    """How objects are cut out of features."""

    method: Literal["maskcut", "tokencut", "lost", "attention", "abmilp"] = key(
        "maskcut",
        "normalised cuts, for several objects (maskcut) or one (tokencut); one around the patch that is like "
        "the fewest others (lost), or where the class token (attention) or a probe (abmilp) looks",
    )
    image_size: int | None = key(
        None,
        "pixels of an image's longer side when it is encoded, in whole patches; null = the encoder's crop",
        at_least=1,
        at_most=2**13,
    )
    features: Literal["patches", "keys"] = key(
        "patches", "features of patches: a block's output, or the keys of its attention, as published"
    )
    centre: bool = key(
        True, "take the mean over the image's patches off the features; false = as published, for DINO's keys"
    )
    block: int = key(-1, "block whose keys, patches or attention are read; negative ones count from the last")
    tau: float | None = key(
        None,
        "cosine similarity above which patches are alike; null = 0.2 of tokencut, 0.15 of maskcut",
        at_least=-1,
        at_most=1,
    )
    objects: int = key(3, "maskcut: largest number of objects of an image", at_least=1, at_most=100)
    k: int = key(100, "lost: patches that may vote, of those that are alike to the fewest", at_least=1)
    share: float = key(
        0.6, "attention, abmilp: fraction of it that the brightest patches have together", above=0, below=1
    )
    probe: str | None = key(None, "abmilp: probe.safetensors, as `foveola evaluate abmilp` writes it")
    refine: Refine = key(
        "none", "edges of masks: those of patches (none), or where colours change, by OpenCV (grabcut)"
    )
    batch_size: int = key(16, "images encoded at once", at_least=1)
    precision: Literal["fp32", "bf16"] = key("fp32", "arithmetic of the encoder; cuts are exact in any case")

    def unread(self) -> dict[str, str]:
        """Return keys that nothing reads with these settings, and why."""
        readers = {
            "tau": ("tokencut", "maskcut"),
            "objects": ("maskcut",),
            "k": ("lost",),
            "share": ("attention", "abmilp"),
            "probe": ("abmilp",),
        }
        return {
            name: f"it is for method={' and '.join(methods)}, and this is {self.method}"
            for name, methods in readers.items()
            if self.method not in methods
        }


def discoverer(
    model: str | Encoder, config: DiscoverConfig | None = None, device: str | torch.device = "cpu"
) -> "Discoverer":
    """Return who finds objects in images by the features of an encoder, or of what `foveola.load` reads.

    Raises UserError for what the encoder lacks: keys, attention or a block of a network whose inside is not
    known, attention of a class token where there is none; and for images of more than 4,096 patches.
    """
    encoder = load(model) if isinstance(model, str) else model
    return Discoverer(encoder.to(device).eval(), config or DiscoverConfig())


class Discoverer:
    """A `Proposer`: images to the objects that their own patches show."""

    classes = ("object",)

    def __init__(self, encoder: Encoder, config: DiscoverConfig) -> None:
        self.encoder, self.config = encoder, config
        self.batch_size = config.batch_size
        self.size = config.image_size or encoder.config.transform.crop
        self.block = encoder.block_index(config.block)
        if config.refine == "grabcut":
            opencv()
        if config.features == "keys":
            encoder.check_inside("features=keys")
        self.weights = probe_maps(self._probe(), encoder) if config.method == "abmilp" else None
        if config.method == "attention":
            if not gives_attention(encoder.backbone):
                encoder.check_inside("method=attention")
            if not encoder.config.model.class_token:
                raise UserError("method=attention: this encoder has no class token that looks at patches")
        side = round(self.size / encoder.patch_size)
        if not side:
            raise UserError(
                f"image_size={self.size}: a patch of this encoder has {encoder.patch_size} pixels a side"
            )
        if side**2 > PATCHES:
            largest = int(PATCHES**0.5) * encoder.patch_size
            raise UserError(
                f"image_size={self.size} makes {side} x {side} patches, and {PATCHES:,} can be compared: "
                f"write image_size={largest} or less"
            )

    def sees(self, source: Any) -> Any:
        """Return a source in the range, channels and pages of the encoder. Raises UserError for images of
        other channels.
        """
        return seen_by([self.encoder], source)

    def _probe(self) -> str:
        """The file of the probe, which was trained on the last patches."""
        if self.config.probe is None:
            raise UserError("method=abmilp needs probe=, a file that `foveola evaluate abmilp` has kept")
        if self.config.features != "patches" or self.block != self.encoder.block_index(-1):
            raise UserError("method=abmilp reads the last block's patches: leave out features= and block=")
        return self.config.probe

    def describe(self) -> dict[str, Any]:
        """Return the settings, as they are read, and the fingerprint of the encoder."""
        idle = self.config.unread()
        settings = {name: value for name, value in to_dict(self.config).items() if name not in idle}
        settings |= {"image_size": self.size, "block": self.block}
        if "tau" in settings:
            settings["tau"] = self.tau
        if self.weights is not None:
            settings["probe"] = hashlib.sha256(Path(self._probe()).expanduser().read_bytes()).hexdigest()[:16]
        settings.pop("batch_size")  # which changes nothing of what is found
        about = {"encoder": self.encoder.fingerprint(), "origin": self.encoder.config.origin}
        return {"kind": "discover", **settings, **about}

    @property
    def tau(self) -> float:
        """The similarity above which patches are alike."""
        return TAU[self.config.method] if self.config.tau is None else self.config.tau

    @torch.inference_mode()
    def propose(self, images: Sequence[Shaped[np.ndarray, "_ _ ch"]], /) -> list[Proposals]:
        """Return the objects of each image, surest first; none of an image of one colour.

        Scores are in [0, 1]: how much more alike the patches of an object are to each other than to the rest,
        and how much of the image's border it leaves free (`cuts.objectness`).
        """
        small = [self._small(image) for image in images]
        together: dict[tuple[int, int], list[int]] = defaultdict(list)  # those of the same size
        for index, pixels in enumerate(small):
            together[pixels.shape[1], pixels.shape[2]].append(index)
        found = [none_of(image) for image in images]
        for indices in together.values():
            for start in range(0, len(indices), self.batch_size):
                block = [i for i in indices[start : start + self.batch_size] if not _plain(images[i])]
                if block:
                    masks, scores, grid = self._cut(torch.stack([small[i] for i in block]))
                    for at, i in enumerate(block):
                        found[i] = self._proposals(images[i], small[i], masks[at], scores[at], grid)
        return found

    def _proposals(
        self,
        image: Shaped[np.ndarray, "H W ch"],
        small: Shaped[Tensor, "ch h w"],
        masks: Bool[np.ndarray, "K N"],
        scores: Float32[np.ndarray, "K"],
        grid: tuple[int, int],
    ) -> Proposals:
        """Masks over patches as objects in the pixels of their image, surest first.

        One that has no pixel, in an image smaller than the grid, is left out.
        """
        there = masks.any(axis=1)
        fields, scores = masks[there].reshape(-1, *grid), scores[there]
        if self.config.refine == "grabcut":
            colours = rgb_of(small.permute(1, 2, 0).numpy(), self.encoder.config.transform.decoding.shown)
            large = grabcut(fields, np.ascontiguousarray(colours), image.shape[:2])
        else:
            large = enlarged(fields, image.shape[:2])
        there = np.flatnonzero(large.any(axis=(1, 2)))
        order = there[np.argsort(-scores[there], kind="stable")]
        if not len(order):
            return none_of(image)
        boxes = np.stack([_box(large[index]) for index in order])
        return Proposals(boxes, scores[order], np.zeros(len(order), np.int64), large[order])

    def _small(self, image: Shaped[np.ndarray, "H W ch"]) -> Shaped[Tensor, "ch h w"]:
        return fit_to_patches(image, self.encoder.config.transform, self.encoder.patch_size, self.size)

    def _cut(
        self, images: Shaped[Tensor, "B ch h w"]
    ) -> tuple[Bool[np.ndarray, "B K N"], Float32[np.ndarray, "B K"], tuple[int, int]]:
        """Masks over the patches of images of the same size, their scores, and the grid."""
        grid = (images.shape[2] // self.encoder.patch_size, images.shape[3] // self.encoder.patch_size)
        features, maps = self._seen(images)
        if not features.isfinite().all():
            raise UserError("features are not finite: the weights of this encoder are of no use")
        found = self._found(centred(features) if self.config.centre else features, maps, grid)
        return found.masks.cpu().numpy(), found.scores.cpu().numpy(), grid

    def _found(
        self, features: Float[Tensor, "B N D"], maps: Float[Tensor, "B N"] | None, grid: tuple[int, int]
    ) -> CutObjects:
        if self.config.method == "tokencut":
            return tokencut(features, grid, self.tau)
        if self.config.method == "maskcut":
            return maskcut(features, grid, self.tau, self.config.objects)
        if self.config.method == "lost":
            return lost(features, grid, self.config.k)
        assert maps is not None
        return brightest(maps, features, grid, self.config.share)

    def _seen(
        self, images: Shaped[Tensor, "B ch h w"]
    ) -> tuple[Float32[Tensor, "B N D"], Float32[Tensor, "B N"] | None]:
        """Features of patches, and what the class token reads of each, where that is asked for."""
        encoder, looks = self.encoder, self.config.method == "attention"
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            pixels = encoder.normalise(images.to(encoder.device))
            if self.config.features == "keys":
                seen = encoder.attention(pixels, block=self.block)
                features = seen.keys()
            else:
                last = 1 if encoder.wrapped else encoder.config.model.shape[1] - self.block
                captured = encoder.capture(pixels, last, attention=looks, block=self.block)
                features, seen = captured.layers[0].patches.float(), captured.attention
            if not looks:
                return features, None if self.weights is None else self.weights(features)
            assert seen is not None
            return features, seen.objects()[:, :, 0, seen.special :].mean(dim=1)


def none_of(image: Shaped[np.ndarray, "H W ch"]) -> Proposals:
    """Return no objects of an image."""
    masks = np.zeros((0, *image.shape[:2]), bool)
    return Proposals(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), masks)


def _box(mask: Bool[np.ndarray, "H W"]) -> Float32[np.ndarray, "4"]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _plain(image: Shaped[np.ndarray, "H W ch"]) -> bool:
    """Whether all pixels are the same."""
    return bool((image == image[:1, :1]).all())
