"""Networks whose inside is not known: images to tokens, for everything that needs features alone."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveola.config import UserError, key
from foveola.models.shape import ViTConfig
from foveola.models.tokens import Features, Inputs
from foveola.models.vit import VisionTransformer

INSIDE = (  # parts of a ViT that others look at
    *("blocks", "patch_embed", "cls_token", "reg_token", "mask_token", "pos_embed", "pos_field"),
    *("pos_mask_token", "rope", "norm", "patch_norm"),
)


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """What a module says about B images: the contract of modules that `wrap` takes.

    Attributes:
        tokens: the last h x w of T are patches, row-major; those before them are special ones.
        grid: (h, w), rows and columns of patches.
        pooled: what stands for an image, as wide as tokens; None: the mean of its patches does.
        attention: how much each token (row) reads of each, of each head of the last block: rows of sum 1.
            Where there is a pooled vector, the first special token is taken as the one that looks for it.
            None: nobody can ask for attention.
    """

    tokens: Float[Tensor, "B T D"]
    grid: tuple[int, int]
    pooled: Float[Tensor, "B P"] | None = None  # P = D
    attention: Float[Tensor, "B heads T T"] | None = None


@dataclass(frozen=True)
class WrappedConfig(ViTConfig):
    """What is known of a wrapped network: `width`, `patch_size` and `class_token` (it gives a pooled vector);
    where it gives attention, `heads` and `registers`, too.

    The other keys of a ViT say nothing of it.
    """

    name: str = key("", "what it is")
    why: str = key("", "why it is no ViT of ours")
    attention: bool = key(False, "whether it gives the attention of its last block")

    def __post_init__(self) -> None:
        """Accept everything: these keys are what was seen, and not what to build."""

    def refuse(self, what: str) -> NoReturn:
        """Raise UserError: this needs what a wrapped network does not show."""
        why = f" ({self.why})" if self.why else ""
        raise UserError(
            f"{what} needs the inside of a ViT, and {self.name} is wrapped{why}: it gives features of images "
            f"and patches{', and attention of its last block,' if self.attention else ''} alone"
        )


class Wrapped(VisionTransformer):
    """A frozen module of any kind where a ViT of ours stands. Whoever asks for its inside is refused.

    Its tensors are those of the module, behind `module.`.
    """

    config: WrappedConfig
    here: Tensor

    def __init__(self, config: WrappedConfig, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.config, self.module = config, module
        self.checkpoint_activations = False
        self.fc_norm = nn.Identity()
        self.register_buffer("here", torch.zeros(0), persistent=False)  # a module may have no tensors

    def __getattr__(self, name: str) -> Any:
        if name in INSIDE:
            self.__dict__["config"].refuse(f"network.{name}")
        return super().__getattr__(name)

    def forward(self, images: Float[Tensor, "B ch H W"], inputs: Inputs | Tensor | None = None) -> Features:
        """Encode images. Raises UserError for objects, and for a grid that is not of whole patches."""
        return self.with_tokens(images, inputs)[0]

    def with_tokens(
        self, images: Float[Tensor, "B ch H W"], inputs: Inputs | Tensor | None = None
    ) -> tuple[Features, ImageTokens]:
        """Return `forward`, and what the module itself gave."""
        if inputs is not None:
            self.config.refuse("a token that reads an object alone (pool=average takes means)")
        height, width = images.shape[-2:]
        patch = self.config.patch_size
        found = image_tokens(self.module(images), self.config.name)
        if found.grid != (height // patch, width // patch):
            raise UserError(
                f"{self.config.name} gives {found.grid[0]} x {found.grid[1]} patches of images of {height} x "
                f"{width} pixels, where its patches have {patch} pixels a side: it does not take such images"
            )
        rows, columns = found.grid
        special, patches = found.tokens.split((found.tokens.shape[1] - rows * columns, rows * columns), dim=1)
        pooled = found.pooled if self.config.class_token else None
        objects = special[:, :0] if pooled is None else pooled[:, None]
        registers = special[:, special.shape[1] - self.config.registers :]
        return Features(objects, registers, patches, found.grid), found

    def prepare(self, images: Tensor, inputs: Inputs | Tensor | None = None) -> NoReturn:
        """Refuse: nobody knows the blocks."""
        self.config.refuse("attention")

    def layers(self) -> NoReturn:
        """Refuse: nobody knows the blocks."""
        self.config.refuse("training")


def gives_attention(network: VisionTransformer) -> bool:
    """Return whether a network can say who reads what in its last block."""
    return not isinstance(network, Wrapped) or network.config.attention


def image_tokens(found: Any, name: str) -> ImageTokens:
    """Return what a module gave as `ImageTokens`, also a map [B, D, h, w]. UserError for all else."""
    if isinstance(found, Tensor) and found.ndim == 4:
        return ImageTokens(found.flatten(2).mT, (found.shape[2], found.shape[3]))
    if not isinstance(found, ImageTokens):
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise UserError(
            f"{name} gives a {type(found).__name__}{shape}: expected a map [B, D, h, w] or "
            "foveola.ImageTokens(tokens=[B, T, D], grid=(h, w), pooled=[B, D] or None)"
        )
    x, (rows, columns), pooled = found.tokens, found.grid, found.pooled
    if x.ndim != 3 or rows * columns < 1 or x.shape[1] < rows * columns:
        raise UserError(f"{name} gives tokens {tuple(x.shape)} with a grid of {rows} x {columns} patches")
    if pooled is not None and pooled.shape != (x.shape[0], x.shape[2]):
        raise UserError(
            f"{name} gives pooled vectors {tuple(pooled.shape)} beside tokens {tuple(x.shape)}: expected the "
            "same width; vectors of another width can be the tokens of a grid of (1, 1)"
        )
    shape = (*x.shape[:2], x.shape[1])
    if found.attention is not None and (
        found.attention.ndim != 4 or (found.attention.shape[0], *found.attention.shape[2:]) != shape
    ):
        raise UserError(
            f"{name} gives attention {tuple(found.attention.shape)} beside tokens {tuple(x.shape)}: expected "
            "[B, heads, T, T]"
        )
    return found


def looked_at(module: nn.Module, side: int, name: str, why: str = "", channels: int = 3) -> WrappedConfig:
    """Return what one image of noise shows of a module, for images of `side` pixels and so many channels.

    Raises UserError where it fails, where its patches are not squares that fill the image, and for features
    that are not finite.
    """
    where = next((p.device for p in module.parameters()), torch.device("cpu"))
    images = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0)).to(where)
    with torch.enable_grad():
        found = image_tokens(_tried(module, images.requires_grad_(), name), name)
    rows, columns = found.grid
    if rows != columns or side % rows or _beyond(found.tokens, images):
        raise UserError(
            f"{name} gives {rows} x {columns} patches of an image of {side} x {side} pixels, which do not "
            "fill it with squares: say image_size= in multiples of its patches"
        )
    parts = (found.tokens, found.pooled, found.attention)
    if not all(part is None or bool(part.isfinite().all()) for part in parts):
        raise UserError(f"{name} gives numbers that are not finite")
    special, weights = found.tokens.shape[1] - rows * columns, found.attention
    registers = 0
    if weights is not None:
        if bool((weights < 0).any()) or not torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-3):
            raise UserError(
                f"{name} gives attention whose rows are not fractions of 1: it is that after softmax"
            )
        registers = special - int(found.pooled is not None)
        if registers < 0:
            raise UserError(
                f"{name} gives a pooled vector and attention, but no special token before the patches that "
                "looks for it: leave one of them out"
            )
    return WrappedConfig(
        width=found.tokens.shape[2],
        depth=1,
        heads=1 if weights is None else weights.shape[1],
        registers=registers,
        attention=weights is not None,
        patch_size=side // rows,
        image_size=side,
        channels=channels,
        class_token=found.pooled is not None,
        positions="none",
        drop_path=0.0,
        name=name,
        why=why,
    )


def _beyond(tokens: Tensor, images: Tensor) -> bool:
    """Whether the last pixels of an image reach no token: patches are then smaller than the grid says."""
    if not tokens.requires_grad:
        return False
    (slope,) = torch.autograd.grad(tokens.square().sum(), images)
    return not (slope[..., -1].any() and slope[..., -1, :].any())


def _tried(module: Callable[[Tensor], Any], images: Tensor, name: str) -> Any:
    try:
        return module(images)
    except UserError:
        raise
    except Exception as error:  # of somebody else's code: there is no list of them
        lines = str(error).strip().splitlines() or [type(error).__name__]
        size = " x ".join(map(str, images.shape[-2:]))
        raise UserError(f"{name} fails on an image of {size} pixels: {lines[0][:200]}") from error
