"""A ViT with a position field as an ordinary one: the field read once, into a table of positions."""

import dataclasses

import torch

from foveola.models.encoder import Encoder
from foveola.models.vit import VisionTransformer


@torch.no_grad()
def as_plain(encoder: Encoder, image_size: int | None = None) -> Encoder:
    """Return the same encoder with a learned table of positions (`pos_embed`) in place of its position field.

    Its outputs are the same for images of `image_size` pixels a side, the transform's by default; at other
    sizes the table is resized where the field would be read anew. Its tensors are timm's, by name and shape,
    so that it can be saved or exported as any other ViT. An encoder without a field is returned as it is.
    Raises ValueError where `image_size` is not whole patches.
    """
    config, field = encoder.config.model, encoder.backbone.pos_field
    if field is None:
        return encoder
    size = image_size or encoder.config.transform.crop
    plain = dataclasses.replace(config, positions="learned", image_size=size)
    table = field(plain.grid)
    token = encoder.backbone.pos_embed
    if token is not None:  # the class token's
        table = torch.cat((token, table), dim=1)
    state = {
        n: v
        for n, v in encoder.backbone.state_dict().items()
        if n not in ("pos_field.values", "pos_mask_token")
    }
    backbone = VisionTransformer(plain).to(encoder.device)
    backbone.load_state_dict(state | {"pos_embed": table})
    settings = dataclasses.replace(encoder.config, model=plain)
    return Encoder(settings, backbone, encoder.predictor)
