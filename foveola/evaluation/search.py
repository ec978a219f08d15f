"""Exact search for the nearest rows of a large reference set, in bounded memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from foveola.evaluation.metrics import unit_rows

Distance = Literal["cosine", "l2"]

QUERY_BLOCK = 16384  # queries that share one pass over the references
REFERENCE_CHUNK = 32768  # reference rows on the device at a time
# Similarities in memory at a time, and references that they are of: on a CPU a tile should stay in its cache.
TILE, TILE_COLUMNS = 2**21, 2048
TILE_GPU = 2**24
COLUMN_GROUP = 8  # columns of which only the largest number is compared first
SLAB = 1024  # candidates of a row that are merged at once, or 4 k of them


@torch.no_grad()
def nearest_rows(
    queries: Float[Tensor, "m D"],
    references: Float[Tensor, "N D"],
    k: int,
    *,
    distance: Distance | Literal["product"] = "cosine",
    query_groups: Int64[Tensor, "m"] | None = None,
    reference_groups: Int64[Tensor, "N"] | None = None,
    device: torch.device | str = "cpu",
    reference_chunk: int = REFERENCE_CHUNK,
    tile: int | None = None,
) -> tuple[Float32[Tensor, "m k"], Int64[Tensor, "m k"]]:
    """Return the k nearest reference rows of each query, nearest first: (similarities, indices), on the CPU.

    Naively: `(unit_rows(queries) @ unit_rows(references).T).topk(k)`. Here the matrix of similarities exists
    only in tiles of `tile` entries, and the references go to `device` in chunks. Products are float32 (no
    TF32, no autocast).

    "l2" ranks by q.f - |f|^2 / 2, which falls with the distance, of features moved to the references' mean: a
    common offset would cost the digits that tell neighbours apart. These are its similarities. "product"
    takes rows as they are: of unit rows it is their cosine.

    Args:
        query_groups, reference_groups: a reference of a query's own group is no neighbour of it (an
            image is not its own neighbour). Where fewer than k rows are left, similarities end with -inf.
        reference_chunk, tile: memory against speed; they change nothing in the result, but for ties.
    """
    k, device_type = min(k, len(references)), torch.device(device).type
    similarities = torch.empty(len(queries), k)
    indices = torch.zeros(len(queries), k, dtype=torch.int64)
    wide = min(
        TILE_COLUMNS if device_type == "cpu" else reference_chunk, reference_chunk, max(1, len(references))
    )
    rows = max(1, (tile or (TILE if device_type == "cpu" else TILE_GPU)) // wide)
    ready = _preparation(references, distance, device, reference_chunk)
    with exact_products(device_type):
        for start in range(0, len(queries), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            pieces = ready(queries[block]).split(rows)
            own = None if query_groups is None else query_groups[block].to(device).split(rows)
            best = [Best(len(piece), k, device) for piece in pieces]
            for first in range(0, len(references), reference_chunk):
                part = ready(references[first : first + reference_chunk])
                half = part.square().sum(dim=1) / 2 if distance == "l2" else None
                groups = reference_groups
                if groups is not None:
                    groups = groups[first : first + reference_chunk].to(device)
                for i, piece in enumerate(pieces):
                    for column in range(0, len(part), wide):
                        some = slice(column, column + wide)
                        s = piece @ part[some].T
                        if half is not None:
                            s -= half[some]
                        if own is not None and groups is not None:
                            s.masked_fill_(own[i][:, None] == groups[some], -torch.inf)
                        best[i].offer(s, first + column)
            found = [one.result() for one in best]
            if found:
                similarities[block] = torch.cat([values for values, _ in found]).cpu()
                indices[block] = torch.cat([columns for _, columns in found]).cpu()
    return similarities, indices


def _preparation(
    references: Tensor, distance: str, device: torch.device | str, chunk: int
) -> Callable[[Tensor], Tensor]:
    """What is done to rows on their way to the device."""
    if distance == "cosine":
        return lambda rows: unit_rows(rows.to(device))
    if distance == "product":
        return lambda rows: rows.to(device).float()
    centre = sum(part.double().sum(dim=0) for part in references.split(chunk)) / max(1, len(references))
    moved = torch.as_tensor(centre).float().to(device)
    return lambda rows: rows.to(device).float() - moved


class Best:
    """The k largest numbers of each of n rows, and their columns, of tiles of columns seen one by one.

    Naively: all tiles side by side, then `topk(k)`. Once k columns were seen, a number matters only if it is
    above the k-th largest so far, which few are: so a tile is read once for the maxima of groups of columns,
    and only the groups whose maximum is above are looked at. What is found waits until it is worth a merge.
    """

    def __init__(self, rows: int, k: int, device: torch.device | str) -> None:
        self.k, self.seen, self.count = k, 0, 0
        self.values = torch.zeros(rows, 0, device=device)  # in no order
        self.columns = torch.zeros(rows, 0, dtype=torch.int64, device=device)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # (row, column, value) of single numbers

    def offer(self, s: Float[Tensor, "n W"], first: int) -> None:
        """Offer the columns from `first` on."""
        if self.seen < self.k or not self._filter(s, first):
            values, columns = top(s, self.k, ordered=False)
            self._merge(values, columns + first)
        self.seen += s.shape[1]
        if self.count > 2 * len(s) * self.k:
            self._settle()

    def _filter(self, s: Tensor, first: int) -> bool:
        """Let what is above the k-th largest wait; False, and nothing done, where that is most of it."""
        floor, whole = self.floor, s.shape[1] // COLUMN_GROUP * COLUMN_GROUP
        groups = s[:, :whole].unflatten(1, (COLUMN_GROUP, -1)) if whole else s[:, None, :0]
        row, group = (groups.amax(dim=1) > floor).nonzero(as_tuple=True)
        if 2 * len(row) > len(s) * groups.shape[2]:
            return False
        near = groups[row, :, group]
        hit, index = (near > floor[row]).nonzero(as_tuple=True)
        self._wait(row[hit], group[hit] + index * groups.shape[2] + first, near[hit, index])
        row, column = (s[:, whole:] > floor).nonzero(as_tuple=True)
        self._wait(row, column + whole + first, s[row, column + whole])
        return True

    def result(self) -> tuple[Float[Tensor, "n r"], Int64[Tensor, "n r"]]:
        """Return (values, columns), largest first, of all that was offered."""
        self._settle()
        values, order = self.values.sort(dim=1, descending=True)
        return values, self.columns.gather(1, order)

    def _settle(self) -> None:
        """Merge the values that wait into the k largest of each row."""
        if not self.count:
            return
        row, column, value = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting, self.count = [], 0
        row, order = row.sort(stable=True)
        counts = row.bincount(minlength=len(self.values))
        index = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        step, most = (
            max(4 * self.k, SLAB),
            int(counts.max()),
        )  # a row of very many must not make all rows wide
        for begin in range(0, most, step):
            mine = (index >= begin) & (index < begin + step) if most > step else slice(None)
            where = row[mine], index[mine] - begin
            shape = len(self.values), min(step, most - begin)
            values = torch.full(shape, -torch.inf, device=row.device)
            columns = torch.zeros(shape, dtype=torch.int64, device=row.device)
            values[where], columns[where] = value[order[mine]], column[order[mine]]
            self._merge(values, columns)

    def _wait(self, row: Tensor, column: Tensor, value: Tensor) -> None:
        if len(row):
            self.waiting.append((row, column, value))
            self.count += len(row)

    def _merge(self, values: Tensor, columns: Tensor) -> None:
        if self.seen:
            values = torch.cat((self.values, values), dim=1)
            columns = torch.cat((self.columns, columns), dim=1)
            values, index = values.topk(min(self.k, values.shape[1]), dim=1, sorted=False)
            columns = columns.gather(1, index)
        self.values, self.columns = values, columns
        self.floor = values.amin(dim=1, keepdim=True)  # what is not above is not among the k largest


def top(
    x: Float[Tensor, "n W"], k: int, ordered: bool = True
) -> tuple[Float[Tensor, "n r"], Int64[Tensor, "n r"]]:
    """Return `x.topk(min(k, W), sorted=ordered)` along rows, several times faster for wide rows.

    Columns are dealt into groups; the k groups of the highest maxima hold the k highest entries. So the
    selection, which is slow, sees W / g maxima and k g candidates, and only the maximum, which is fast, sees
    all of x.
    """
    n, width = x.shape
    g = int((width / max(k, 1)) ** 0.5)
    if g < 4:
        return x.topk(min(k, width), dim=1, sorted=ordered)
    wide = width // g
    grouped = x[:, : wide * g].unflatten(1, (g, wide))
    groups = grouped.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = grouped.gather(2, groups[:, None].expand(-1, g, -1)).flatten(1)
    columns = (groups[:, None] + wide * torch.arange(g, device=x.device)[:, None]).flatten(1)
    rest = torch.arange(wide * g, width, device=x.device).expand(n, -1)
    values, index = torch.cat((candidates, x[:, wide * g :]), dim=1).topk(k, dim=1, sorted=ordered)
    return values, torch.cat((columns, rest), dim=1).gather(1, index)


@contextmanager
def exact_products(device: str) -> Iterator[None]:
    """Compute float32 products in full precision within this block: TF32 or bf16 reorders neighbours that are
    nearly alike.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
