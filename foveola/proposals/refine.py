"""From masks over patches to masks of pixels."""

import numpy as np
from jaxtyping import Bool


def enlarged(masks: Bool[np.ndarray, "K h w"], size: tuple[int, int]) -> Bool[np.ndarray, "K H W"]:
    """Return masks over patches at the pixels of an image: each pixel has the value of the patch at its
    centre.
    """
    rows, columns = (
        ((np.arange(large) + 0.5) * small / large).astype(np.int64)
        for large, small in zip(size, masks.shape[1:], strict=True)
    )
    return masks[:, rows[:, None], columns]
