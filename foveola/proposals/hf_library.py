"""Models of transformers with what is done to images for them, opened for this room."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pillow

from foveola.config import UserError
from foveola.proposals.found import ImagePixels, frozen
from foveola.zoo.files import options_of
from foveola.zoo.foreign import import_library, one_line

SPEAKS_OF_NOTHING = (
    "num_batches_tracked",
    "position_ids",
)  # ends of names of tensors that models can do without


@dataclass(frozen=True, eq=False)
class HubModel:
    """A name behind `hf:`, its configuration, and how all of it is fetched."""

    where: str  # as a user wrote it
    name: str
    config: Any
    options: dict[str, Any]  # of every `from_pretrained`; code that comes with a model is never run

    @classmethod
    def named(cls, text: str) -> "HubModel":
        """Read the configuration of `NAME`, `FOLDER` or `NAME?revision=R`.

        A folder is read without asking the hub. Raises UserError for what is not found.
        """
        name, _, query = text.partition("?")
        where = f"hf:{name}"
        options = options_of(where, query)
        if unknown := options.keys() - {"revision"}:
            raise UserError(f"{where}: unknown option {min(unknown)!r}; known: revision")
        if not name:
            raise UserError("hf: names no model: expected hf:NAME or hf:FOLDER")
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise UserError(f"{where}: no folder {name}")
        found = {**options, "trust_remote_code": False, "local_files_only": Path(name).is_dir()}
        transformers = import_library("transformers", "hf")
        try:
            config = transformers.AutoConfig.from_pretrained(name, **found)
        except Exception as error:  # of the library, of its hub, of the network: there is no list of them
            raise UserError(f"{where}: {one_line(error)}") from error
        return cls(where, name, config, found)

    @property
    def architecture(self) -> str:
        """The class whose weights these are, or the kind of model where none is named."""
        return (getattr(self.config, "architectures", None) or [self.config.model_type])[0]

    def model(self, auto: str, device: torch.device) -> Any:
        """Return the module that a class such as `AutoModelForObjectDetection` makes of it, in float32.

        Raises UserError where weights are missing, which the library would draw at random.
        """
        transformers = import_library("transformers", "hf")
        try:
            with quiet(transformers):
                model, report = getattr(transformers, auto).from_pretrained(
                    self.name, dtype=torch.float32, output_loading_info=True, **self.options
                )
        except Exception as error:
            raise UserError(f"{self.where}: {one_line(error)}") from error
        missing = [
            name for name in sorted(map(str, report["missing_keys"])) if not name.endswith(SPEAKS_OF_NOTHING)
        ]
        if missing:
            raise UserError(f"{self.where} lacks {missing[0]} ({len(missing)} missing tensors)")
        return frozen(model, device)

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the outputs. Raises UserError where they are not numbered from 0 on."""
        names = self.config.id2label or {}
        if not names or set(names) != set(range(len(names))):
            numbers = f"{min(names)} to {max(names)}" if names else "none"
            raise UserError(
                f"{self.where}: id2label in its config.json names {len(names)} classes, {numbers}; expected "
                "a name of each output from 0 on"
            )
        return tuple(names[label] for label in range(len(names)))

    def processor(self, auto: str) -> Any:
        """Return what is done to images (`AutoImageProcessor`) and words (`AutoProcessor`)."""
        transformers = import_library("transformers", "hf")
        try:
            with quiet(transformers):
                return getattr(transformers, auto).from_pretrained(self.name, **self.options)
        except Exception as error:
            raise UserError(f"{self.where}: {one_line(error)}") from error


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Keep the library silent while it loads: what matters is raised as an error."""
    speech = transformers.utils.logging
    loudness, bars = speech.get_verbosity(), speech.is_progress_bar_enabled()
    speech.set_verbosity_error()
    speech.disable_progress_bar()
    try:
        yield
    finally:
        speech.set_verbosity(loudness)
        if bars:
            speech.enable_progress_bar()


def pillows(images: Sequence[ImagePixels]) -> list[Any]:
    """Return images as processors take them without guessing which axis holds the channels."""
    return [Pillow.fromarray(image) for image in images]


def has_one_size(processor: Any) -> bool:
    """Return whether all images get the same size, whatever theirs is."""
    size = getattr(processor, "size", None) or {}
    height, width = (size.get(side) if hasattr(size, "get") else None for side in ("height", "width"))
    return bool(getattr(processor, "do_resize", False)) and None not in (height, width)
