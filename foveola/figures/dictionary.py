"""Dictionaries of patch features: a few directions of which each patch is a sparse sum (CAPI's images)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64

from foveola.config import UserError
from foveola.figures.pca import FLAT_VARIANCE, Basis

ROUNDS = 30  # of codes and atoms in turn; fewer where nothing changes any more
SWEEPS = 200  # over the atoms for the codes of a round, at most
STILL = 1e-8  # a change that is none, as a fraction of the objective or of a code of 1
RGBCMY = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 0))


@dataclass(frozen=True, eq=False)
class Dictionary:
    """k unit vectors (atoms); a feature is about mean + scale * codes @ atoms, with few codes that are not 0.

    `scale` is the root mean square of the centred features: what remains has a squared length of D on
    average, as features after a LayerNorm, so that `alpha` means the same for every encoder.
    """

    mean: Float64[np.ndarray, "D"]
    scale: float
    atoms: Float64[np.ndarray, "k D"]
    alpha: float

    @classmethod
    def fit(
        cls, features: Float[np.ndarray, "*S D"], components: int = 6, alpha: float = 1.0
    ) -> "Dictionary":
        """Minimise sum_i |x_i - c_i A|^2 / 2 + alpha |c_i|_1 over codes c and unit atoms A, in turn.

        Starts from the first principal components, so the result is a function of the features alone. Codes
        by coordinate descent, atoms one by one, each at its optimum given the others (Mairal et al. 2010);
        one that nothing uses becomes the worst explained feature. Raises UserError for more atoms than
        numbers, or than features.
        """
        rows = features.reshape(-1, features.shape[-1]).astype(np.float64)
        if not 1 <= components <= min(rows.shape):
            raise UserError(f"{components} components of {rows.shape[0]} features of {rows.shape[1]} numbers")
        mean, square = rows.mean(axis=0), float((rows**2).mean())
        scale = float(np.sqrt(((rows - mean) ** 2).mean()))
        start = Basis.fit(rows, components).components
        if scale**2 <= FLAT_VARIANCE * square:  # nothing to explain
            return cls(mean, 1.0, start, alpha)
        rows = (rows - mean) / scale
        atoms, last = _unit(start, rows), np.inf
        codes = np.zeros((len(rows), components))
        for _ in range(ROUNDS):
            codes = sparse_codes(rows, atoms, alpha, codes)
            now = objective(rows, codes, atoms, alpha)
            if last - now <= STILL * now:
                break
            atoms, last = _better_atoms(rows, codes, atoms), now
        return cls(mean, scale, atoms, alpha)

    def codes(self, features: Float[np.ndarray, "*S D"]) -> Float64[np.ndarray, "*S k"]:
        """Return the sparse codes of features."""
        rows = (features.reshape(-1, features.shape[-1]).astype(np.float64) - self.mean) / self.scale
        return sparse_codes(rows, self.atoms, self.alpha).reshape(*features.shape[:-1], len(self.atoms))


def sparse_codes(
    rows: Float64[np.ndarray, "N D"],
    atoms: Float64[np.ndarray, "k D"],
    alpha: float,
    start: Float64[np.ndarray, "N k"] | None = None,
) -> Float64[np.ndarray, "N k"]:
    """Return the minimum of |x - c A|^2 / 2 + alpha |c|_1 over c for each row x, by cyclic coordinate
    descent.
    """
    gram, match = atoms @ atoms.T, rows @ atoms.T
    codes = np.zeros_like(match) if start is None else start.copy()
    for _ in range(SWEEPS):
        change = 0.0
        for j in range(len(atoms)):
            if gram[j, j] == 0:
                continue
            rest = match[:, j] - codes @ gram[:, j] + codes[:, j] * gram[j, j]
            new = np.sign(rest) * np.maximum(np.abs(rest) - alpha, 0) / gram[j, j]
            change = max(change, float(np.abs(new - codes[:, j]).max()))
            codes[:, j] = new
        if change <= STILL * max(1.0, float(np.abs(codes).max())):
            break
    return codes


def objective(
    rows: Float64[np.ndarray, "N D"],
    codes: Float64[np.ndarray, "N k"],
    atoms: Float64[np.ndarray, "k D"],
    alpha: float,
) -> float:
    """Return what `fit` minimises."""
    return float(((rows - codes @ atoms) ** 2).sum() / 2 + alpha * np.abs(codes).sum())


def _better_atoms(
    rows: Float64[np.ndarray, "N D"], codes: Float64[np.ndarray, "N k"], atoms: Float64[np.ndarray, "k D"]
) -> Float64[np.ndarray, "k D"]:
    """Each atom in turn where it explains best what the others leave, of length one."""
    atoms, used, match = atoms.copy(), codes.T @ codes, codes.T @ rows
    for j in range(len(atoms)):
        if used[j, j] == 0:
            left = ((rows - codes @ atoms) ** 2).sum(axis=1)
            atoms[j] = rows[left.argmax()]
        else:
            atoms[j] = match[j] - used[j] @ atoms + used[j, j] * atoms[j]
        length = np.linalg.norm(atoms[j])
        atoms[j] = atoms[j] / length if length > 0 else 0.0
    return atoms


def _unit(atoms: Float64[np.ndarray, "k D"], rows: Float64[np.ndarray, "N D"]) -> Float64[np.ndarray, "k D"]:
    """Atoms of length one; one that is zero (there are fewer directions than atoms) becomes a feature."""
    atoms = atoms.copy()
    for j in np.flatnonzero(~atoms.any(axis=1)):
        atoms[j] = rows[j] / max(float(np.linalg.norm(rows[j])), FLAT_VARIANCE)
    return atoms


def dictionary_rgb(
    codes: Float64[np.ndarray, "*S k"], largest: float | None = None
) -> Float32[np.ndarray, "*S 3"]:
    """Return colours in [0, 1]: each atom has one, and shows by the size of its code (CAPI's code).

    clip(|codes| / largest @ palette, 0, 1) with red, green, blue, then cyan, magenta, yellow, or ten colours
    of matplotlib (tab10) for more than six. `largest` is that of these codes where None. Raises UserError for
    more than ten.
    """
    count = codes.shape[-1]
    if count > 10:
        raise UserError(f"{count} components: there are colours for 10")
    palette = np.array(RGBCMY, dtype=np.float64)
    if count > 6:
        import matplotlib

        palette = np.array(matplotlib.colormaps["tab10"].colors)  # type: ignore[attr-defined]
    largest = float(np.abs(codes).max(initial=0)) if largest is None else largest
    return (np.abs(codes) / max(largest, FLAT_VARIANCE) @ palette[:count]).clip(0, 1).astype(np.float32)
