"""What reports keep beside a run: files named by the images that they are of."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from foveola import files
from foveola.config import UserError
from foveola.data.identity import identity_of
from foveola.data.sources import Source


def home(run: Path) -> Path:
    """Return where what is measured of a run is kept: in it, or in the user's cache."""
    own = files.RunFolder(run).measured
    try:
        files.check_writable(own, "")
    except UserError:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "foveola" / "report" / key_of(str(run.resolve()))
    return own


def identity(source: Source) -> str:
    """Return changes with images, labels and annotations."""
    return identity_of(source).digest


def key_of(about: Any) -> str:
    """Return a short name of anything that JSON can hold: part of a path."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path) -> str | None:
    """Return the text of a kept file; None for one that is missing, empty or unreadable: it is made anew."""
    try:
        return path.read_text(encoding="utf-8") or None
    except (OSError, ValueError):
        return None


def read_tree(path: Path) -> dict[str, Any]:
    """Return the JSON object in a kept file; empty for one that is missing or torn."""
    try:
        tree = json.loads(read(path) or "{}")
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}
