"""Whether a run goes on with the images that it began with: what they are is kept with it, in data.json."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from foveola import distributed, files
from foveola.config import ConfigError, UserError
from foveola.data.identity import identity_of
from foveola.data.sources import Source
from foveola.failures import explain

READ = 10_000  # images whose contents are read; of more images so many, spread evenly

OF_BEFORE = (
    "this run was begun by an earlier version, which did not note its images (they are noted now) and "
    "squashed each into a square canvas: from here on images keep their aspect, so its views are others"
)


@dataclass(frozen=True)
class Images:
    """How many images there are, and a digest of their contents and annotations, in order."""

    count: int
    contents: str


def look(source: Source) -> Images:
    """What the images of a source are. Where they lie does not count."""
    count = len(source)
    chosen = None if count <= READ else np.unique(np.linspace(0, count - 1, READ).astype(np.int64))
    return Images(count, identity_of(source, chosen).digest)


def agreed(source: Source) -> Images:
    """`look`, on all processes. Raises UserError where one sees others: images are drawn by their index."""
    first = distributed.on_main(lambda: look(source))
    seen = distributed.gather_objects(first if distributed.is_main() else _attempt(source))
    for number, found in enumerate(seen):
        if isinstance(found, str):
            raise UserError(f"process {number} cannot read {source.name}: {found}")
        if found != first:
            raise UserError(
                f"process {number} finds {found.count:,} images in {source.name}, and process 0 "
                f"{first.count:,}"
                + (" of other contents or in another order" if found.count == first.count else "")
                + ": all processes must see the same data"
            )
    return first


def kept(folder: Path) -> Images | None:
    """What a run began with; None where that was not noted."""
    try:
        return Images(**json.loads((folder / "data.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def keep(folder: Path, images: Images) -> None:
    """Note what a run is on from here on."""
    files.write_text(folder / "data.json", json.dumps(asdict(images), indent=2) + "\n")


def change(folder: Path, images: Images, allowed: bool) -> str | None:
    """What is to be said before the run in `folder` goes on with these images; None: they are the same.

    Raises ConfigError where they are others, unless that is `allowed`.
    """
    before = kept(folder)
    if before is None:
        return OF_BEFORE
    if before == images:
        return None
    if before.count != images.count:
        what = f"its data had {before.count:,} images, and have {images.count:,} now"
    else:
        what = (
            f"its {images.count:,} images are not the same any more (contents, order or annotations; or some "
            "cannot be read)"
        )
    if not allowed:
        raise ConfigError(
            f"{folder}: {what}. For a run of their own, choose another out=; to go on with them, write "
            "data_changed=allow, and steps and epochs are counted by what is there now"
        )
    return f"data_changed=allow: {what}; steps and epochs are counted by what is there now"


def _attempt(source: Source) -> Images | str:
    try:
        return look(source)
    except Exception as error:
        return explain(error) or str(error)
