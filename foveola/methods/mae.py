"""MAE: reconstruct the pixels of the patches that the encoder never got; SimMIM: of those that it got masked.

The encoder sees a quarter of the patches. A light decoder puts mask tokens where the others were, and tells
their pixels. There is one network, one view and no teacher.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.init import xavier_uniform_

from foveola.config import key
from foveola.data.shown import drawn_rgb
from foveola.losses import pixel_loss, pixel_targets
from foveola.methods.method import Method, MethodConfig, Output, check_single_view
from foveola.models.attention import PackedLinear
from foveola.models.blocks import initialise
from foveola.models.embedding import patchify, unpatchify
from foveola.models.positions import take_rows
from foveola.models.predictor import Predictor, PredictorConfig
from foveola.models.starting import StartingWeights
from foveola.models.vit import Features, Inputs, VisionTransformer, ViTConfig
from foveola.schedules import Progress
from foveola.views.batch import Batch, ViewsConfig

IMAGES_KEPT = 8  # images of a step that are kept to be looked at
EASY = 0.5  # fraction of hidden patches below which their neighbours tell most of them


@dataclass(frozen=True)
class MaeConfig(MethodConfig):
    """Settings of MAE. The defaults are those of its paper."""

    fixed_targets = True

    name: Literal["mae"] = key("mae", "which method this is")
    decoder: PredictorConfig | None = key(
        factory=lambda: PredictorConfig(kind="self", width=512, depth=8, heads=16, drop_path=0.0),
        help="from kept to missing patches; null = mask tokens in the encoder (SimMIM)",
    )
    normalise: bool = key(True, "pixels of each patch less their mean, over their deviation")
    loss: Literal["squared", "absolute"] = key("squared", "error of the pixels; SimMIM: absolute")

    def check(self, views: ViewsConfig, model: ViTConfig) -> None:
        """Raise ValueError where the views or the network cannot serve the method."""
        if self.decoder is not None:
            self.decoder.network(model)
        if views.dropping is None:
            raise ValueError("method.name=mae needs dropped patches: set views.dropping")
        check_single_view(self.name, views)

    @property
    def pool(self) -> Literal["average"]:
        """The mean patch: no loss reads the class token."""
        return "average"


class Autoencoder(nn.Module):
    """Encoder, decoder, and the linear map to pixels."""

    def __init__(self, config: MaeConfig, model: ViTConfig) -> None:
        super().__init__()
        self.backbone = VisionTransformer(model)
        width = model.shape[0]
        if config.decoder is not None:
            self.decoder = Predictor(config.decoder, model)
            width = self.decoder.width
            # Never used: data-parallel training would wait for its gradient.
            self.backbone.mask_token.requires_grad_(False)
        self.fused = config.decoder is None
        self.head = nn.Linear(width, model.seen_channels * model.patch_size**2)
        initialise(self.head, model.init)
        if model.init == "xavier":  # the official code draws queries, keys and values as one matrix
            for module in self.modules():
                if isinstance(module, PackedLinear):
                    xavier_uniform_(module.weight)

    def forward(
        self, images: Float[Tensor, "B ch H W"], keep: Int64[Tensor, "B K"], wanted: Int64[Tensor, "B Q"]
    ) -> tuple[Float[Tensor, "B Q CPP"], Float[Tensor, "B K D"]]:
        """Return pixels of the wanted patches, in the order of `patchify`, and the encoder's kept patches."""
        if not self.fused:
            features: Features = self.backbone(images, Inputs(kept=keep))
            return self.head(self.decoder(features, wanted, keep)), features.patches
        side = self.backbone.config.patch_size
        count = (images.shape[2] // side) * (images.shape[3] // side)
        masked = torch.ones(len(keep), count, dtype=torch.bool, device=keep.device).scatter_(1, keep, False)
        patches = self.backbone(images, Inputs(masked=masked)).patches
        return self.head(take_rows(patches, wanted)), take_rows(patches, keep)


def _with_rows(x: Tensor, indices: Int64[Tensor, "B K"], rows: Tensor) -> Float[Tensor, "B N CPP"]:
    return x.scatter(1, indices[..., None].expand(-1, -1, x.shape[2]), rows)


class Mae(Method):
    """One autoencoder; the target is the image itself."""

    Config = MaeConfig

    def __init__(self, config: MaeConfig, model: ViTConfig, views: ViewsConfig) -> None:
        super().__init__()
        self.config = config
        self.student = Autoencoder(config, model)
        self.patch_size = model.patch_size
        self.colors = views.color.mean, views.color.std
        self.hidden = None if views.dropping is None else views.dropping.ratio
        self.shown: tuple[Tensor, ...] | None = None

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, keep, wanted = batch.large.selected()
        predictions, patches = self.student(images, keep, wanted)
        targets = pixel_targets(take_rows(patchify(images, self.patch_size), wanted), self.config.normalise)
        self.shown = tuple(t[:IMAGES_KEPT].detach().clone() for t in (images, keep, wanted, predictions))
        loss = pixel_loss(predictions, targets, self.config.loss)
        return Output({"reconstruction": loss}, batch.facts, patches.mean(dim=1))

    @torch.no_grad()
    def figures(self) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
        """Return views of the last step in columns: as they are, as the encoder got them, and
        reconstructed.

        Where targets are normalised, a reconstructed patch has the true mean and deviation, which the method
        does not learn; its kept patches are the true ones.
        """
        if self.shown is None:
            return {}
        images, keep, wanted, predictions = self.shown
        patches = patchify(images, self.patch_size)
        predictions = predictions.float()
        if self.config.normalise:
            variance, mean = torch.var_mean(take_rows(patches, wanted), dim=-1, keepdim=True)
            predictions = predictions * (variance + 1e-6).sqrt() + mean
        # Zero is the mean colour.
        hidden = _with_rows(torch.zeros_like(patches), keep, take_rows(patches, keep))
        filled = _with_rows(hidden, wanted, predictions)
        grid = images.shape[2] // self.patch_size, images.shape[3] // self.patch_size
        rows = torch.stack([unpatchify(x, self.patch_size, grid) for x in (patches, hidden, filled)])
        mean, std = (torch.tensor(c, device=rows.device)[:, None, None] for c in self.colors)
        tiles = drawn_rgb(rows * std + mean)  # [3, images, 3, H, W]
        sheet = pad(tiles, (1, 1, 1, 1), value=255).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        return {"reconstruction": sheet.cpu().numpy()}

    def advice(self, batch_size: int, images: int | None = None, objects: int = 1) -> list[str]:
        if self.hidden is None or self.hidden >= EASY:
            return []
        return [
            f"views.dropping.ratio={self.hidden} hides less than {EASY:.0%} of the patches, and what is "
            "hidden can be told from its neighbours; MAE hides 75 %, and its linear probe falls below that"
        ]

    @property
    def backbone(self) -> VisionTransformer:
        return self.student.backbone

    def trained(self) -> Iterable[VisionTransformer]:
        return (self.student.backbone,)

    def start_from(self, start: StartingWeights) -> None:
        super().start_from(start)
        if not self.student.fused:
            start.move("decoder", self.student.decoder)
        start.move("head", self.student.head)

    def networks(self) -> dict[str, nn.Module]:
        decoder = {} if self.student.fused else {"decoder": self.student.decoder}
        return {"encoder": self.student.backbone, **decoder, "head": self.student.head}
