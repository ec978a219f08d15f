"""What published training checkpoints hold besides an encoder, by the names of our methods.

DINO, iBOT and DINOv2 have projection heads, MAE a decoder, I-JEPA and CAPI a predictor. Names of parts begin
with "student." or "teacher."; heads are named by the term that reads them: "student.head_of.token.".
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from foveola.models.starting import SIDES
from foveola.zoo.contents import tensors_in
from foveola.zoo.files import split_options
from foveola.zoo.weights import SETTINGS, read_weights

BEFORE = ("module", "_orig_mod", "state_dict", "model", "backbone", "student_ema")
PROJECTION = re.compile(r"(head|dino_head|ibot_head)\.((?:mlp|last_layer2?)\..+)")
PROTOTYPES = (  # a weight-normalised layer, as torch names it today and before
    (r"^last_layer\.(?:weight_g|parametrizations\.weight\.original0)$", "last_layer.g"),
    (r"^last_layer\.(?:weight_v|parametrizations\.weight\.original1)$", "last_layer.v"),
)
OF_MAE = (
    (r"^mask_token$", "decoder.mask_token"),
    (r"^decoder_embed\.", "decoder.embed."),
    (r"^decoder_blocks\.", "decoder.blocks."),
    (r"^decoder_norm\.", "decoder.norm."),
    (r"^decoder_pred\.", "head."),
)
OF_IJEPA = (
    (r"^mask_token$", "predictor.mask_token"),
    (r"^predictor_embed\.", "predictor.embed."),
    (r"^predictor_blocks\.", "predictor.blocks."),
    (r"^predictor_norm\.", "predictor.norm."),
    (r"^predictor_proj\.", "head."),
)
OF_CAPI = (
    (r"^mask_token$", "predictor.mask_token"),
    (r"^decoder\.blocks\.(\d+)\.residual([12])\.norm\.", r"predictor.blocks.\1.norm\2."),
    (r"^decoder\.blocks\.(\d+)\.residual1\.fn\.proj\.", r"predictor.blocks.\1.attn.proj."),
    (r"^decoder\.blocks\.(\d+)\.residual1\.fn\.q_proj\.", r"predictor.blocks.\1.attn.q."),
    (r"^decoder\.blocks\.(\d+)\.residual1\.fn\.([kv])_proj\.", r"predictor.blocks.\1.attn.\2."),
    (r"^decoder\.blocks\.(\d+)\.residual2\.fn\.(fc[12])\.", r"predictor.blocks.\1.mlp.\2."),
)
Parts = dict[str, Tensor]
Names = dict[str, tuple[str, ...]]  # of the tensors that a part is made of


def parts_in(name: str) -> tuple[Parts, Names]:
    """Return heads, decoder or predictor in a file of weights, and which of its tensors each is made of.

    Nothing for what is no such file. Raises UserError for files that cannot be read.
    """
    path, _ = split_options(name)
    if not path.is_file():
        return {}, {}
    state = read_weights(path)
    return ({}, {}) if isinstance(state.get(SETTINGS), str) else training_parts(state)


def training_parts(state: dict[str, Any]) -> tuple[Parts, Names]:
    """Return what `parts_in` does, from the nested tensors of a file."""
    sides: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for raw, value in tensors_in(state):
        side, name = _plain(raw)
        sides.setdefault(side, {})[name] = raw, value
    parts: Parts = {}
    names: Names = {}
    for side, found in sides.items():
        for make in (_heads, _decoder, _predictor, _capi):
            for part, (raws, value) in make(found).items():
                parts[f"{side}.{part}"], names[f"{side}.{part}"] = value, raws
    return parts, names


Found = Mapping[str, tuple[str, Tensor]]  # by bare names: the name in the file, and the tensor
Made = dict[str, tuple[tuple[str, ...], Tensor]]


def _plain(raw: str) -> tuple[str, str]:
    """Which network a tensor is of, and its name without what wrappers put before it."""
    words, side = raw.split("."), SIDES[0]
    while len(words) > 1 and words[0] in (*BEFORE, *SIDES):
        side = words[0] if words[0] in SIDES else side
        words = words[1:]
    if words[0] == "predictor" and len(words) > 1:  # I-JEPA's dict of its predictor
        return side, ".".join(word for word in words if word not in BEFORE)
    return side, ".".join(words)


def _renamed(
    found: Found, names: tuple[tuple[str, str], ...], change: Callable[[str, Tensor], Tensor] | None = None
) -> Made:
    made: Made = {}
    for name, (raw, value) in found.items():
        for pattern, ours in names:
            if re.search(pattern, name):
                part = re.sub(pattern, ours, name)
                made[part] = (raw,), value if change is None else change(part, value)
    return made


def _heads(found: Found) -> Made:
    """Projection heads; iBOT's second prototypes share the MLP of the first."""
    made: Made = {}
    for name, (raw, value) in found.items():
        if not (match := PROJECTION.fullmatch(name)):
            continue
        kind, rest = match.groups()
        terms = ["patch"] if kind == "ibot_head" else ["token"]
        second = rest.startswith("last_layer2.")
        rest = rest.replace("last_layer2.", "last_layer.", 1)
        if kind == "head":
            terms = ["patch"] if second else terms
            if rest.startswith("mlp.") and any(other.startswith("head.last_layer2.") for other in found):
                terms = ["token", "patch"]
        for pattern, ours in PROTOTYPES:
            rest = re.sub(pattern, ours, rest)
        for term in terms:
            made[f"head_of.{term}.{rest}"] = (raw,), value
    return made


def _decoder(found: Found) -> Made:
    """MAE's: its pixels of a patch come row by row with their channels together, ours channel by channel."""
    if "decoder_embed.weight" not in found:
        return {}

    def change(name: str, value: Tensor) -> Tensor:
        side = round((len(value) / 3) ** 0.5)
        if not name.startswith("head.") or 3 * side * side != len(value):
            return value
        return value.unflatten(0, (side, side, 3)).movedim(2, 0).flatten(0, 2)

    return _renamed(found, OF_MAE, change)


def _predictor(found: Found) -> Made:
    """Return the predictor of I-JEPA by our names."""
    bare = {
        name.removeprefix("predictor."): value
        for name, value in found.items()
        if name.startswith(("predictor.", "predictor_"))
    }
    return _renamed(bare, OF_IJEPA) if "predictor_embed.weight" in bare else {}


def _capi(found: Found) -> Made:
    """CAPI's decoder, with keys and values in one matrix."""
    if "decoder.blocks.0.residual1.fn.q_proj.weight" not in found:
        return {}
    made = _renamed(found, OF_CAPI)
    for name in [name for name in made if name.endswith(".attn.k.weight")]:
        (raws, keys), both = made.pop(name), name.replace(".attn.k.", ".attn.v.")
        if both in made:
            more, values = made.pop(both)
            made[name.replace(".attn.k.", ".attn.kv.")] = (*raws, *more), torch.cat((keys, values))
    return made
