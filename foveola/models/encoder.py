"""What users keep: an encoder folder (`model.safetensors` + `config.json`), and the `Encoder` made of it."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Shaped
from torch import Tensor, nn

from foveola import files
from foveola.config import ConfigError, UserError, key, kind_of, to_dict
from foveola.data.decode import pixels_of
from foveola.geometry import patch_mask
from foveola.models.capture import AttentionRows, Capture, attention_of, block_index, capture, visit
from foveola.models.predictor import Predictor, PredictorConfig
from foveola.models.settings import telling_settings
from foveola.models.transform import TransformConfig, evaluation_view
from foveola.models.vectors import vectors_of
from foveola.models.vit import Features, VisionTransformer, ViTConfig
from foveola.models.wrapped import Wrapped, gives_attention

__all__ = [
    "AttentionRows",
    "Capture",
    "Encoder",
    "EncoderConfig",
    "Features",
    "TransformConfig",
    "gives_attention",
    "patch_mask",
]

TOGETHER = 8  # objects that are encoded at once, or more where there are more images


@dataclass(frozen=True)
class EncoderConfig:
    model: ViTConfig = key(factory=ViTConfig, help="shape of the network")
    transform: TransformConfig = key(factory=TransformConfig, help="what is done to images")
    origin: str = key("", "where the weights come from")
    pool: Literal["token", "average", "predictor"] = key(
        "token", "what stands for an image or object: its token, the mean of its patches, or of predictions"
    )
    predictor: PredictorConfig | None = key(None, "the predictor whose first block pools (CAPI)")
    step: int | None = key(None, "steps that the run had taken; null = not known", at_least=0)

    def __post_init__(self) -> None:
        if self.pool not in self.pools:
            raise ValueError(f"pool={self.pool}: this network has {', '.join(self.pools)}")
        if self.predictor is not None:
            self.predictor.network(self.model)  # raises where there is none

    @property
    def pools(self) -> tuple[str, ...]:
        """What can stand for an image."""
        has = {"token": self.model.class_token, "average": True, "predictor": self.predictor is not None}
        return tuple(name for name, there in has.items() if there)


class Encoder(nn.Module):
    """A ViT, frozen unless asked to learn, with its transform: images (and object masks) to `Features`."""

    def __init__(
        self,
        config: EncoderConfig,
        backbone: VisionTransformer | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        super().__init__()
        if config.transform.crop % config.model.patch_size:
            raise ConfigError(
                f"transform.crop={config.transform.crop} is not a multiple of "
                f"the patch size {config.model.patch_size}"
            )
        if len(config.transform.mean) != (count := config.model.channels):
            raise ConfigError(
                f"transform.mean has {len(config.transform.mean)} values, model.channels={count}"
            )
        self.config = config
        self.backbone = VisionTransformer(config.model) if backbone is None else backbone
        self.predictor = predictor
        self.head: Any = None  # a `tasks.TaskHead`, of an encoder that was fine-tuned
        self.beside: tuple[str, ...] = ()  # names of what else is in the file that it was loaded from
        if predictor is None and config.predictor is not None:
            self.predictor = Predictor(dataclasses.replace(config.predictor, depth=1), config.model)
        self.requires_grad_(False).eval()

    @property
    def patch_size(self) -> int:
        return self.config.model.patch_size

    @property
    def width(self) -> int:
        """Numbers that stand for an image or an object."""
        if self.config.pool == "predictor" and self.predictor is not None:
            return self.predictor.width
        return self.config.model.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches of a transformed image."""
        side = self.config.transform.crop // self.patch_size
        return side, side

    def check_side(self, side: int, key: str, name: str = "this encoder") -> None:
        """Raise UserError unless squares of `side` pixels, which `key` asks for, are whole patches."""
        if side % self.patch_size:
            raise UserError(f"{key}={side} is not a multiple of the patch size {self.patch_size} of {name}")

    @property
    def device(self) -> torch.device:
        return next(itertools.chain(self.parameters(), self.buffers())).device

    @property
    def wrapped(self) -> bool:
        """Whether the network is somebody else's module, of which features alone are known."""
        return isinstance(self.backbone, Wrapped)

    def check_inside(self, what: str) -> None:
        """Raise UserError where `what` needs the inside of a ViT, and the network is a wrapped one."""
        if isinstance(self.backbone, Wrapped):
            self.backbone.config.refuse(what)

    def forward(
        self,
        images: Float[Tensor, "B ch H W"],
        objects: Bool[Tensor, "B M N"] | None = None,
        independent: bool = True,
    ) -> Features:
        """Encode normalised images of any size in whole patches.

        Args:
            objects: for each of M objects the patches that its token may read, row-major (from `patch_mask`);
                None = one token that reads all. An object without patches reads everything. Any ViT can
                be asked, also one trained without objects ("iBOT + masks" of the ODIS paper).
            independent: every object is asked for alone, as in the evaluations, so its token does not depend
                on the others; this costs a pass for each object besides that of the patches. False = all in
                one pass, as in training: patches then read all object tokens, so tokens and patches depend
                on what else is asked for. Means of patches are independent in any case.

        Returns features whose `objects` are what `config.pool` says: object tokens; or the mean over the
        object's (without `objects`, all) patches, of the patches themselves or of what the predictor's first
        block expects there (CAPI, Table 5). With `independent`, registers and patches are those of the
        image without regard to objects.

        The encoder is frozen, so results carry no gradient, but heads can learn on them; after
        `requires_grad_(True)`, or from `load(..., trainable=True)`, gradients reach the weights.
        """
        if self.config.pool != "token":
            features = self.backbone(images)
            return dataclasses.replace(features, objects=self.means(features, objects))
        if objects is None or not independent:
            return self.backbone(images, objects)
        return dataclasses.replace(self.backbone(images), objects=self._alone(images, objects))

    def tokens(
        self, images: Float[Tensor, "B ch H W"], objects: Bool[Tensor, "B M N"] | None = None
    ) -> Float[Tensor, "B M C"]:
        """Return what stands for each object (without `objects`, each image) alone: `forward(...).objects`.

        All protocols that read objects ask here. A subclass need only have its own `forward`.
        """
        if objects is None or self.config.pool != "token" or type(self).forward is not Encoder.forward:
            return self(images, objects).objects
        return self._alone(images, objects)

    def _alone(
        self, images: Float[Tensor, "B ch H W"], objects: Bool[Tensor, "B M N"]
    ) -> Float[Tensor, "B M C"]:
        """Object tokens, each from a pass of its own, as the patches of a pass read its token.

        Passes are made of as many images as were given, 8 at least, which bounds the memory.
        """
        image_of = torch.arange(objects.shape[0], device=images.device).repeat_interleave(objects.shape[1])
        alone = objects.flatten(0, 1)[:, None]
        blocks = torch.arange(len(alone), device=images.device).split(max(len(images), TOGETHER))
        parts = [self.backbone(images[image_of[rows]], alone[rows]).objects for rows in blocks]
        return torch.cat(parts).view(*objects.shape[:2], self.width)

    def means(self, features: Features, objects: Bool[Tensor, "B M N"] | None) -> Float[Tensor, "B M C"]:
        """Return means of patches or predictions over each object's patches; over all where it has none."""
        average = self.config.pool == "average"
        pooled = features.patches if average else self.predictions(features)
        if objects is None:
            means = pooled.mean(dim=1, keepdim=True)
        else:
            read = (objects | ~objects.any(dim=2, keepdim=True)).to(pooled.dtype)
            means = (read @ pooled) / read.sum(dim=2, keepdim=True)
        return self.backbone.fc_norm(means) if average else means

    def capture(
        self,
        images: Float[Tensor, "B ch H W"],
        n: int = 1,
        objects: Bool[Tensor, "B M N"] | None = None,
        attention: bool = False,
        block: int = -1,
    ) -> Capture:
        """Return `layers`, and on request who reads what in a block, from one pass."""
        if objects is not None and objects.shape[1] != 1:
            raise ValueError(f"{objects.shape[1]} objects of each image in a pass: expected one")
        return capture(self.backbone, images, n, objects, attention, block)

    def attention(
        self,
        images: Float[Tensor, "B ch H W"],
        objects: Bool[Tensor, "B M N"] | None = None,
        block: int = -1,
    ) -> AttentionRows:
        """Return who reads what in a block; the pass ends there. UserError for a block that is not there."""
        return attention_of(self.backbone, images, objects, block)

    def block_index(self, block: int) -> int:
        """Return the index of a block; negative numbers count from the last. UserError where none is."""
        return block_index(self.backbone, block)

    def visit(
        self,
        images: Float[Tensor, "B ch H W"],
        attention: Callable[[int, slice, slice, Tensor], None],
        output: Callable[[int, Tensor], None] | None = None,
    ) -> Features:
        """Return a pass that hands out the attention of every block bit by bit: `capture.visit`."""
        return visit(self.backbone, images, attention, output)

    def predictions(self, features: Features) -> Float[Tensor, "B N C"]:
        """Return what the predictor's first block expects at every position. Raises UserError without one."""
        if self.predictor is None:
            raise UserError(f"pool=predictor: this encoder has {', '.join(self.config.pools)}")
        return self.predictor(features)

    def layers(
        self, images: Float[Tensor, "B ch H W"], n: int = 1, objects: Bool[Tensor, "B M N"] | None = None
    ) -> tuple[Features, ...]:
        """Return the outputs of the last n blocks, the last one last, each through the final norm (DINO,
        iBOT).

        One object for each image, since patches read its token: repeat the images for more. `objects` of
        each are object tokens, whatever `config.pool` says: M = 0 without class token. Raises ValueError
        unless the network has n blocks and there is one object.
        """
        return self.capture(images, n, objects).layers

    def pooled(self, pool: str | None) -> "Encoder":
        """Return the same networks with another `config.pool`; None: this one. Raises UserError for one it
        lacks.
        """
        if pool is None or pool == self.config.pool:
            return self
        if pool not in self.config.pools:
            raise UserError(f"pool={pool}: this encoder has {', '.join(self.config.pools)}")
        other = Encoder(dataclasses.replace(self.config, pool=pool), self.backbone, self.predictor)
        other.head = self.head
        return other

    def sized(self, side: int, key: str) -> "Encoder":
        """Return the same networks for squares of `side` pixels, which `key` asks for."""
        self.check_side(side, key)
        config = dataclasses.replace(self.config, transform=self.config.transform.sized(side))
        return Encoder(config, self.backbone, self.predictor)

    def normalise(self, images: Shaped[Tensor, "B ch H W"]) -> Float[Tensor, "B C H W"]:
        """Return pixels, uint8 or uint16, as fractions of their range, less the mean, over the deviation."""
        transform = self.config.transform
        mean = torch.tensor(transform.mean, device=images.device)[:, None, None]
        std = torch.tensor(transform.std, device=images.device)[:, None, None]
        return (images.float() / torch.iinfo(images.dtype).max - mean) / std

    def transform(self, image: Any, range: str | None = None) -> Float[Tensor, "ch crop crop"]:
        """Turn an image into the normalised square that is encoded: decode, resize, cut the centre,
        normalise.

        Args:
            image: a path (text, too), the bytes of a file, a PIL image, or an array [H, W, C] of values as
                files have them. They are read as for training and evaluations: EXIF orientation is applied,
                all kinds become RGB, 16 bits are scaled to 8, transparent parts are laid on white; or they
                get the range and channels of this encoder. What `read` returned has them already.
            range: the values that become black and white, as in a data string: "0-4095", or "container" for
                all 16 bits. It applies to images of more than 8 bits, and must be that of the training.

        The square has the pixels that an evaluation has, bit for bit. Warns of an image of 16 bits that uses
        half of them at most, if there is no `range`. Raises UserError, with the reason, for what cannot be
        read.
        """
        pixels = evaluation_view(self.read(image, range), self.config.transform).pixels
        return self.normalise(pixels[None].to(self.device))[0]

    def read(self, image: Any, range: str | None = None) -> Shaped[np.ndarray, "H W C"]:
        """Return the pixels of an image (see `transform`) in the range and channels of this encoder.

        Raises UserError for what cannot be read, and for other channels.
        """
        pixels, channels = pixels_of(image, range, self.config.transform.decoding), self.config.model.channels
        if pixels.shape[2] != channels:
            raise UserError(
                f"{kind_of(image)}: {pixels.shape[2]} channel(s), but this encoder sees {channels}"
            )
        return pixels

    def embed(self, images: Any, batch_size: int = 64) -> Float32[np.ndarray, "n D"]:
        """Return what stands for each of n images, as evaluations and `foveola.embed` have it.

        Args:
            images: what `transform` takes (a path, a PIL image, ...), one or in a list; or tensors
                [n, 3, H, W]: uint8 that are cut already, or floats that are normalised, too; or a DataLoader
                of such tensors, of which the first of each batch is taken where it gives several.
            batch_size: images encoded at once, but for those of a DataLoader.
        """
        return vectors_of(self, images, batch_size)

    def predict(self, images: Any) -> Any:
        """Return what the head says of an image, or of each in a list or tuple.

        An image is a path, the bytes of a file, a PIL image, or an array [H, W, 3] of uint8, of 8 pixels a
        side or more. The answer is a `foveola.tasks` `Classes`, `LabelMap` or `Detections`, in its pixels.
        Raises UserError for an encoder without a head, and with the reason for what cannot be read.
        """
        if self.head is None:
            raise UserError("this encoder has no head that answers for a task: `foveola finetune` trains one")
        several = isinstance(images, list | tuple)
        found = self.head.predict(self, [self.read(image) for image in (images if several else [images])])
        return found if several else found[0]

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with any weight or setting, those of a head included."""
        digest = hashlib.sha256(json.dumps(telling_settings(self.config), sort_keys=True).encode())
        head: dict[str, Tensor] = {}
        if self.head is not None:
            digest.update(json.dumps(to_dict(self.head.config), sort_keys=True).encode())
            head = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        for name, value in sorted({**self.weights(), **head}.items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def weights(self) -> dict[str, Tensor]:
        """Return all tensors as they are saved: the backbone's by timm's names, others behind
        `predictor.`.
        """
        state = dict(self.backbone.state_dict())
        if self.predictor is not None:
            state |= {f"predictor.{name}": value for name, value in self.predictor.state_dict().items()}
        return state

    def fill(self, state: dict[str, Tensor], where: Path) -> None:
        """Take over tensors by the names of `weights`. Raises UserError where they are not the same."""
        own = self.check(state, where)
        for name, value in state.items():
            own[name].copy_(value)

    def check(self, state: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
        """Return `weights`, whose names and shapes `state` must have. Raises UserError where it has not."""
        own = self.weights()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unknown:
            what = f"lacks {missing[0]}" if missing else f"has an unknown {unknown[0]}"
            raise UserError(f"{where} {what} ({len(missing)} missing, {len(unknown)} unknown tensors)")
        for name, value in state.items():
            if value.shape != own[name].shape:
                raise UserError(f"{where}: {name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}")
        return own

    def save(self, folder: str | Path) -> Path:
        """Write `model.safetensors` and `config.json`, and of a head `head.safetensors` and `head.json`.

        Each file is replaced whole. Raises UserError for a wrapped network, which its own library keeps.
        """
        self.check_inside("an encoder folder")
        from safetensors.torch import save_file

        folder = Path(folder)
        where = files.EncoderFolder(folder)
        if self.head is not None:  # first: an encoder that is there has its head
            head = {name: value.detach().cpu().contiguous() for name, value in self.head.state_dict().items()}
            with files.whole(where.head_weights) as part:
                save_file(head, part)
            files.write_text(where.head_config, json.dumps(to_dict(self.head.config), indent=2) + "\n")
        state = {k: v.detach().cpu().float().contiguous() for k, v in self.weights().items()}
        with files.whole(where.weights) as part:
            save_file(state, part)
        files.write_text(where.config, json.dumps(to_dict(self.config), indent=2) + "\n")
        return folder


def filled(config: EncoderConfig, weights: dict[str, Tensor], where: Path) -> Encoder:
    """Return an encoder with these weights. Raises UserError, before memory is taken, where they do not
    fit.
    """
    with torch.device("meta"):  # a damaged configuration may ask for any amount
        Encoder(config).check(weights, where)
    encoder = Encoder(config)
    encoder.fill(weights, where)
    return encoder
