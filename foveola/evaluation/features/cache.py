"""One feature pass for several protocols: which of them share a store, and where stores are.

A `Feed` belongs to one encoder. Protocols say what they need of a source (`want`), and the first `open`
computes all of it from one reading of the images, or finds it on the disk. No number depends on who shares
what.
"""

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from foveola import distributed
from foveola.data.sources import Source
from foveola.evaluation.features.encoding import FeatureReader
from foveola.evaluation.features.need import EXTERNAL, FeedConfig, Need, check_features
from foveola.evaluation.features.store import Pass, Store
from foveola.evaluation.images import identity_for
from foveola.models.encoder import Encoder

Where = tuple[str, FeedConfig, int, int | None, str | None, int | None, int | None]


class Feed:
    """Stores of one encoder's features. Every rank makes the same calls. Close it, or use it in `with`.

    Args:
        folder: where stores are kept, a subfolder for each (encoder, data, settings); None: a temporary
            folder that ends with the feed. Several machines need one that all of them reach.
    """

    def __init__(self, encoder: Encoder, folder: str | Path | None = None, *, progress: bool = True) -> None:
        self.encoder, self.progress = encoder, progress
        self.temporary = folder is None
        if folder is None:
            folder = distributed.on_main(_temporary)
        self.folder = Path(str(folder)).expanduser()
        self.fingerprint = encoder.fingerprint()
        self.wanted: dict[Where, Need] = {}
        self.stores: dict[Where, Store] = {}

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove a temporary folder."""
        self.stores.clear()
        if self.temporary and distributed.is_main():
            shutil.rmtree(self.folder, ignore_errors=True)

    def want(self, source: Source, config: Any, need: Need, views: int = 0) -> None:
        """Say before the first `open` what will be read, so that one pass gives all of it."""
        check_features(self.encoder, need.features, need.layers)
        where = where_of(source, config, need, views)
        self.wanted[where] = self.wanted[where] | need if where in self.wanted else need

    def open(self, source: Source, config: Any, need: Need, views: int = 0) -> Store:
        """Return the store with what is needed (and wanted so far), computed where it is missing.

        Raises UserError for features that the encoder has not, too little disk, unreadable images (more
        than 1 %), features that are not finite, and a damaged folder.
        """
        self.want(source, config, need, views)
        where = where_of(source, config, need, views)
        need = self.wanted[where]
        store = self.stores.get(where)
        names = self._names(need, config.precision)
        if store is None or not set(names.values()) <= set(store.names.values()):
            parts = (need, names, views, self.folder)
            config, progress = feeding(config), self.progress
            passing = Pass(self.encoder, self.fingerprint, source, config, *parts, progress=progress)
            facts = passing.run()
            store = self.stores[where] = Store(passing.folder, passing.chosen, names, facts)
        return store

    def _names(self, need: Need, precision: str) -> dict[str, str]:
        reader, names = FeatureReader(self.encoder, precision), {}
        for feature in sorted(need.features):
            if feature.startswith(EXTERNAL):
                names[feature] = "external-" + reader.other(feature).fingerprint()
            else:
                names[feature] = f"{feature}-{need.layers}" if feature in ("token", "masked") else feature
        return names


def _temporary() -> str:
    """A new temporary folder; those of processes of this machine that were killed are removed."""
    stem = f"foveola-features-{platform.node()}-"
    for left in Path(tempfile.gettempdir()).glob(f"{stem}*"):
        process = left.name.removeprefix(stem).partition("-")[0]
        if process.isdecimal() and not _is_alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{stem}{os.getpid()}-")


def _is_alive(process: int) -> bool:
    if sys.platform == "win32":
        return True  # asking there would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def where_of(source: Source, config: Any, need: Need, views: int = 0) -> Where:
    """Return what two protocols must have in common to read one store: data, settings, crops, and
    geometry.
    """
    return (
        identity_for(source, config).digest,
        replace(feeding(config), batch_size=1, workers=0),
        views,
        need.side,
        need.crops if views else None,
        need.size,
        need.block,
    )


def feeding(config: Any) -> FeedConfig:
    """Return the part of a protocol's settings that says how features are made; not how fast."""
    names = [field.name for field in fields(FeedConfig) if hasattr(config, field.name)]
    return FeedConfig(**{name: getattr(config, name) for name in names})
