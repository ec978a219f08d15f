"""What the page is about: the data, one or two sides, their rows; and all that can be asked of them."""

import secrets
from base64 import b64encode
from threading import Lock
from typing import Any

import numpy as np

from foveola.config import UserError
from foveola.data.shown import showing, shown_channels
from foveola.data.sources import Source
from foveola.embedding.rows import encoded_box
from foveola.explorer.layers import LAYERS, heads_of, layer
from foveola.explorer.layout import MAP_METHODS, Layouts, has_umap
from foveola.explorer.listing import listing
from foveola.explorer.questions import Question, answer, sample_at
from foveola.explorer.rows import ShownRows, shown_rows
from foveola.explorer.sides import Side
from foveola.explorer.thumbnails import LARGE, Thumbnails, jpeg, png


class Session:
    """Answers of one page, as plain values and bytes. Threads may share it: encoders work one at a time.

    Methods raise UserError for what cannot be answered, with the reason, and LookupError for an index that
    there is not.
    """

    def __init__(self, sides: list[Side], source: Source, layout: str = "auto") -> None:
        self.sides, self.source = sides, source
        self.rows = shown_rows(sides)
        self.method = layout if layout != "auto" else "umap" if has_umap() else "pca"
        self.version = secrets.token_hex(4)  # so that no browser shows images of an earlier page
        self.thumbnails, self.layouts, self.lock = Thumbnails(source), Layouts(), Lock()

    def close(self) -> None:
        """End what is still at work."""
        self.layouts.close()

    def state(self) -> dict[str, Any]:
        """Return what the page can show and do, and reasons for what it cannot."""
        sides = [
            {
                "name": side.name,
                "why": side.why,
                "kinds": list(side.indices),
                "lacking": side.lacking,
                "features": {kind: index.about["features"] for kind, index in side.indices.items()},
                "heads": heads_of(side.encoder) if side.encoder is not None else 0,
            }
            for side in self.sides
        ]
        return {
            "data": self.source.name,
            "version": self.version,
            "sides": sides,
            "rows": {kind: len(rows) for kind, rows in self.rows.items()},
            "objects": self.source.has_objects,
            "map": self.method,
            "methods": [method for method in MAP_METHODS if method != "umap" or has_umap()],
        }

    def shown(self, kind: str) -> ShownRows:
        """Return the rows of a kind."""
        return self.rows[kind]

    def map(self, kind: str, side: int, method: str) -> bytes | None:
        """Return points of all rows, float32 [n, 2]; None while they are made."""
        rows = self.shown(kind)
        index = rows.indices[side]
        if index is None:
            raise UserError(f"{self.sides[side].name} has no features of these {kind}")
        found = self.layouts.get((kind, side), method, lambda: rows.vectors(side), index.path)
        return None if found is None else np.ascontiguousarray(found).tobytes()

    def image(self, image: int) -> bytes:
        """Return an image as a JPEG of 1024 pixels at most."""
        self._check(image)
        return jpeg(sample_at(self.source, image)[1], LARGE, shown_channels(self.source))

    def thumbnail(self, image: int, number: int = -1) -> bytes:
        """Return an image or an object of it, small."""
        self._check(image)
        return self.thumbnails.get(image, number)

    def about(self, image: int) -> dict[str, Any]:
        """Return the facts of an image: its name, class, size, objects, and the box that each side sees."""
        self._check(image)
        sample, pixels = sample_at(self.source, image)
        height, width = pixels.shape[:2]
        objects = []
        if sample.objects is not None:
            labels = sample.objects.labels
            objects = [
                {"box": box.tolist(), "label": self._class(None if labels is None else int(labels[number]))}
                for number, box in enumerate(sample.objects.boxes)
            ]
        seen = []
        for side in self.sides:
            encoder = side.encoder
            if encoder is not None and "patches" in side.indices:
                encoder = side.sized("patches")
            seen.append(None if encoder is None else encoded_box(height, width, encoder.config.transform))
        grids = [
            side.indices["patches"].grid
            if "patches" in side.indices
            else (None if side.encoder is None else side.encoder.grid)
            for side in self.sides
        ]
        label = self._class(sample.label)
        facts = {"image": image, "name": sample.name, "label": label, "width": width, "height": height}
        return {**facts, "objects": objects, "seen": seen, "grids": grids}

    def ask(self, values: Any) -> list[dict[str, Any]]:
        """Return the answer of each side to a question, or the reason why it has none."""
        question, answers = Question.of(values, len(self.source)), []
        for side in self.sides:
            try:
                with self.lock:
                    found = answer(side, self.source, question)
                answers.append({"hits": found.hits, "asked": found.query_box})
            except UserError as error:
                answers.append({"error": str(error)})
        return answers

    def layer(
        self, side: int, image: int, what: str, point: tuple[float, float], head: int
    ) -> dict[str, str]:
        """Return a layer of an image as a data address of a PNG, and how to read it."""
        self._check(image)
        if what not in LAYERS:
            raise LookupError(what)
        encoder, pixels = self.sides[side].need(), sample_at(self.source, image)[1]
        with self.lock, showing(shown_channels(self.source)):
            made = layer(encoder, pixels, what, point, head)
        return {"image": f"data:image/png;base64,{b64encode(png(made.pixels)).decode()}", "note": made.note}

    def selection(self, values: Any) -> dict[str, Any]:
        """Return a list of images, `{"images": [...]}`, as text, with the data string that reads it."""
        images = values.get("images") if isinstance(values, dict) else None
        if not isinstance(images, list) or any(type(image) is not int for image in images):
            raise UserError("expected images, a list of whole numbers")
        for image in images:
            self._check(image)
        made = listing(self.source, images)
        return {"text": made.text, "data": made.data, "why": made.why}

    def _check(self, image: int) -> None:
        if not 0 <= image < len(self.source):
            raise LookupError(f"there is no image {image}")

    def _class(self, label: int | None) -> str:
        if label is None or label < 0:
            return ""
        classes = self.source.classes
        return str(label) if classes is None else classes[label]
