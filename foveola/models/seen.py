"""Data as encoders were trained on them."""

from collections.abc import Sequence
from typing import Any

from foveola.config import UserError
from foveola.data.suited import suited
from foveola.models.encoder import Encoder


def seen_by(encoders: Sequence[Encoder], source: Any) -> Any:
    """Return a source that is read as these encoders read: in what its data string says nothing of, in the
    range, channels and pages of their training.

    Raises UserError for images of other channels, and for encoders that read in different ways.
    """
    found = [suited(source, each.config.transform.decoding, each.config.model.channels) for each in encoders]
    ways = {repr(getattr(each, "reading", None)) for each in found}
    if len(ways) > 1:
        raise UserError(
            f"{source.name}: these encoders were trained in different ranges or channels; range= and "
            "channels= in the data string say which are meant"
        )
    return found[0] if found else source
