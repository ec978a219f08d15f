"""Whether a run goes on with the images that it began with: what they are is kept with it.

data.json has what tells that they are others, data.npz what tells which of them are.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from foveola import distributed, files
from foveola.config import ConfigError, UserError
from foveola.data.identity import identity_of
from foveola.data.inventory import (
    ImageDifference,
    Inventory,
    compare_inventories,
    first_names,
    inventory_of,
    load_inventory,
)
from foveola.data.sources import Source
from foveola.failures import explain
from foveola.files import RunFolder

READ = 10_000  # images whose contents are read; of more images so many, spread evenly

OF_BEFORE = (
    "this run was begun by an earlier version, which did not note its images (they are noted now) and "
    "squashed each into a square canvas: from here on images keep their aspect, so its views are others"
)


@dataclass(frozen=True)
class RunImages:
    """How many images there are, and what tells them from others, in order."""

    count: int
    contents: str  # digest of contents and annotations
    sizes: str | None = None  # digest of the sizes of all files; None: no files, or of an earlier version
    inventory: Inventory | None = field(default=None, repr=False, compare=False)

    @property
    def without_inventory(self) -> "RunImages":
        """The same facts without the inventory, which may be large."""
        return replace(self, inventory=None)

    def agrees(self, other: "RunImages") -> bool:
        """Return whether both are the same images, as far as both are known."""
        sizes = None in (self.sizes, other.sizes) or self.sizes == other.sizes
        return sizes and (self.count, self.contents) == (other.count, other.contents)


def images_of_run(source: Source) -> RunImages:
    """Return what the images of a source are. Where they lie does not count."""
    count = len(source)
    read = np.arange(count)
    if count > READ:
        read = np.unique(np.linspace(0, count - 1, READ).astype(np.int64))
    found = identity_of(source, read)
    inventory = inventory_of(source, read, found.contents)
    sizes = hashlib.sha256(inventory.sizes.tobytes()).hexdigest()[:24] if inventory.names else None
    return RunImages(count, found.digest, sizes, inventory)


def agreed(source: Source) -> RunImages:
    """Look as `look` does, on all processes; the inventory on the main one alone.

    Raises UserError where a process sees others: images are drawn by their index.
    """
    own: list[RunImages] = []

    def on_main() -> RunImages:
        own.append(images_of_run(source))
        return own[0].without_inventory

    first = distributed.on_main(on_main)
    mine = first if distributed.is_main() else _attempt(source)
    seen = distributed.gather_objects(mine)
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
    return own[0] if own else first


def load_run_images(folder: Path) -> RunImages | None:
    """Return what a run began with; None where that was not noted."""
    try:
        tree = json.loads(RunFolder(folder).data.read_text(encoding="utf-8"))
        return RunImages(**tree, inventory=load_inventory(RunFolder(folder).inventory))
    except (OSError, ValueError, TypeError):
        return None


def are_of(folder: Path, images: RunImages) -> bool:
    """Return whether these images are those that the run in `folder` is on."""
    before = load_run_images(folder)
    return before is not None and before.agrees(images)


def save_run_images(folder: Path, images: RunImages) -> None:
    """Note what a run is on from here on."""
    tree = {"count": images.count, "contents": images.contents, "sizes": images.sizes}
    files.write_text(RunFolder(folder).data, json.dumps(tree, indent=2) + "\n")
    if images.inventory is not None:
        images.inventory.save(RunFolder(folder).inventory)


@dataclass(frozen=True)
class DataChange:
    """What became of the images of a run, in words; empty where nothing did."""

    what: str = ""
    perhaps: str = ""


def changed(before: RunImages, now: RunImages) -> DataChange:
    """Return lines about images that were noted before: how they differ, and what cannot be known."""
    if before.agrees(now) and now.count <= READ:  # all contents have been compared
        return DataChange()
    found = None
    if before.inventory is not None and now.inventory is not None:
        found = compare_inventories(before.inventory, now.inventory, READ)
    which = str(found or "")
    if before.agrees(now) and not (found and (found.replaced or found.unreadable)):  # names do not count
        return DataChange(perhaps=_perhaps(found, now.count))
    if before.count != now.count:
        what = f"its data had {before.count:,} images, and have {now.count:,} now"
    else:
        what = f"its {now.count:,} images are not the same any more"
    if not which and before.count == now.count:
        which = "contents, order or annotations; or some cannot be read"
        if found is not None:
            which = "not the images, but their order, labels or annotations"
    return DataChange(f"{what} ({which})" if which else what)


def changed_since(folder: Path, images: RunImages) -> str:
    """Return how these images differ from those of the run in `folder`; empty where nothing tells that they
    do.
    """
    before = load_run_images(folder)
    return "" if before is None else changed(before, images).what


def note_change(folder: Path, images: RunImages, allowed: bool) -> str | None:
    """Note the images of the run in `folder`, which goes on; returns lines about them.

    Raises ConfigError where they are others than before, unless that is `allowed`.
    """
    before = load_run_images(folder)
    if before is None:
        save_run_images(folder, images)
        return OF_BEFORE
    found = changed(before, images)
    if found.what and not allowed:
        raise ConfigError(
            f"{folder}: {found.what}. For a run of their own, choose another out=; to go on with them, write "
            "data_changed=allow, and steps and epochs are counted by what is there now"
        )
    if found != DataChange() or before.inventory is None:
        save_run_images(folder, images)
    if found.what:
        return f"data_changed=allow: {found.what}; steps and epochs are counted by what is there now"
    return found.perhaps or None


def _perhaps(found: ImageDifference | None, count: int) -> str:
    untold = [] if found is None else [*found.untold, *found.added]
    if not untold:
        return ""
    return (
        f"{len(untold):,} of {count:,} images have other times or names than when the run began, and the "
        "same sizes; their contents were not noted, so whether they were replaced is not known "
        f"({first_names(untold)})"
    )


def _attempt(source: Source) -> RunImages | str:
    try:
        return images_of_run(source).without_inventory
    except Exception as error:
        return explain(error) or str(error)
