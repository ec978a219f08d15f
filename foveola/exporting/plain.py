"""What both libraries lack of our networks, and our tensors as theirs have them: tables, zero biases."""

import torch
from torch import Tensor

from foveola.config import UserError
from foveola.models.encoder import Encoder

LIBRARY_OF = {"timm": "timm", "hf": "transformers"}
ROTARY = {  # what sets these apart from DINOv3's, the only ones in both libraries
    "axial": "turn by (row, column) in 0 to 1, by 7 to 0.0007 turns, and place registers at the border",
    "capi": "turn no pair of channels by one angle (CAPI's code), and place registers at the border",
}


def check_plain(encoder: Encoder, format: str) -> None:
    """Raise UserError for what no network of a library has, by its name."""
    model, library = encoder.config.model, LIBRARY_OF[format]
    rotary = model.positions == "rope"
    for wrong, what in (
        (
            rotary and model.rope != "dinov3",
            f"rotary positions that {ROTARY.get(model.rope, '')}: {library} has DINOv3's alone",
        ),
        (rotary and not model.class_token, f"no class token, which {library}'s DINOv3 has"),
        (model.relative_bias, f"biases by relative position, which {library}'s plain ViTs lack"),
        (model.positions == "none", f"no positions, which {library}'s plain ViTs have"),
        (model.patch_norm, f"a norm of embedded patches, which {library}'s plain ViTs lack"),
        (model.window is not None, f"windows of patches, which {library}'s plain ViTs lack"),
        (model.final_norm != "tokens", f"final_norm={model.final_norm}, which this command does not write"),
        (model.norm != "layer", f"norm={model.norm}, which {library}'s ViTs lack"),
        (encoder.config.pool == "predictor", f"pool=predictor, which {library} has not"),
    ):
        if wrong:
            raise UserError(
                f"format={format}: this encoder has {what}; format=safetensors, onnx and program take any"
            )


@torch.inference_mode()
def plain_weights(encoder: Encoder) -> dict[str, Tensor]:
    """Return tensors by our names on the CPU, with biases of zero where there are none.

    A last norm without weights has ones. `pos_embed` fits the images: class token's row first, if any; rotary
    networks have none.
    """
    network = encoder.backbone
    state = {name: value.detach().float().cpu().clone() for name, value in network.state_dict().items()}
    state = {name: value for name, value in state.items() if not name.startswith(("pos_field.", "pos_mask"))}
    state |= _neutral(encoder)
    table = network.positions(encoder.grid)
    if table is None:
        return state
    rows = [table.float().cpu()]
    if "cls_token" in state:
        rows.insert(0, state["pos_embed"][:, :1])
    return state | {"pos_embed": torch.cat(rows, dim=1)}


def _neutral(encoder: Encoder) -> dict[str, Tensor]:
    """Tensors that change nothing, where our network has none."""
    found: dict[str, Tensor] = {}
    for name, module in encoder.backbone.named_modules():
        if isinstance(module, torch.nn.Linear) and module.bias is None:
            found[f"{name}.bias"] = torch.zeros(module.out_features)
    if not encoder.config.model.final_norm_affine:
        width = encoder.config.model.shape[0]
        found |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return found
