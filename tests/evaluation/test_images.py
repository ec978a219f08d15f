"""One reader: what a cut makes arrives in order, in batches; what cannot be read is counted."""

import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch

from foveola.data.sample import BadImage, DataError
from foveola.evaluation.attention.analysis import SquaresCut
from foveola.evaluation.features.encoding import CropsCut
from foveola.evaluation.features.table import ExtractConfig, RowsCut
from foveola.evaluation.images import Batches, Images, Part, ReadingConfig
from foveola.evaluation.localisation.boxed import BoxedCut
from foveola.evaluation.views.retrieval import CanvasCut
from foveola.models.transform import TransformConfig


class Made(NamedTuple):
    indices: torch.Tensor
    names: tuple[str, ...]
    sizes: dict[str, torch.Tensor]


class Cut:
    """As many rows as the last digit of an index; odd behaviour where it says so."""

    def __init__(self, bad=(), bare=(), useless=()) -> None:
        self.bad, self.bare, self.useless = bad, bare, useless

    def __call__(self, sample, index, number=0):
        if index in self.bad:
            raise BadImage("damaged")
        if index in self.useless:
            raise DataError(f"image {index} has the map of another")
        if index in self.bare:
            return None
        count = 1 + index % 3
        rows = torch.full((count,), index)
        return Made(
            rows, (sample.name,) * count, {"number": rows + number, "large": rows.expand(2**16, -1).T}
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_joined_in_order_and_bad_ones_counted(list_source, make_sample, workers) -> None:
    source = list_source([make_sample(i) for i in range(40)])
    chosen = np.arange(40)[::-1]
    cut = Cut(bad=(5, 6, 38, *range(8)), bare=(20, 39))
    batches = Batches(Images(source, chosen, cut), ReadingConfig(batch_size=20, workers=workers), "", False)
    found = list(batches)
    read = [i for i in chosen.tolist() if i > 7 and i not in (20, 38, 39)]
    expected = [i for i in read for _ in range(1 + i % 3)]
    assert torch.cat([batch.indices for batch in found]).tolist() == expected
    assert [name for batch in found for name in batch.names] == [source[i].name for i in expected]
    assert torch.cat([batch.sizes["large"] for batch in found])[:, -1].tolist() == expected
    assert all(len(batch.indices) >= 20 for batch in found[:-1])
    assert batches.bad == [38, 7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_no_use_keep_their_message(list_source, make_sample, workers) -> None:
    source = list_source([make_sample(i) for i in range(4)])
    images = Images(source, np.arange(4), Cut(useless=(2,)))
    with pytest.raises(DataError, match="image 2 has the map of another"):
        list(Batches(images, ReadingConfig(workers=workers), "", False))


def test_a_cut_gets_the_numbers_beside_the_index(list_source, make_sample) -> None:
    source = list_source([make_sample(i) for i in range(4)])
    made = Images(source, np.array([[3, 100], [0, 7]]), Cut(), parcel=2)[0].made
    assert made.indices.tolist() == [3, 0]
    assert made.sizes["number"].tolist() == [103, 7]


def test_cuts_go_to_workers(list_source, make_sample) -> None:
    """A worker that starts from nothing gets a pickled copy, which makes the same."""
    source = list_source([make_sample(0, [(10, 10, 40, 40)], label=0)])
    transform = TransformConfig(resize=40, crop=32)
    for cut, numbers in (
        (RowsCut(transform, 8, ExtractConfig()), ()),
        (CropsCut(transform, 8, ExtractConfig(), 2), ()),
        (BoxedCut(transform.squashed(32)), ()),
        (SquaresCut(((40, 32, "bicubic", False),)), ()),
        (CanvasCut(64, 32, transform, plain=True), (0,)),
    ):
        there, here = (each(source[0], 0, *numbers)[0] for each in (pickle.loads(pickle.dumps(cut)), cut))
        assert torch.equal(there, here)


def test_a_part_of_a_source_has_its_images_and_reads_them_alike(list_source, make_sample) -> None:
    source = list_source([make_sample(i) for i in range(6)], classes=("a", "b"))
    source.channels, source.depth = 4, 16
    part = Part(source, np.array([4, 1]))
    assert [part[i].name for i in range(len(part))] == [source[4].name, source[1].name]
    assert (part.name, part.classes, part.channels, part.depth) == (source.name, ("a", "b"), 4, 16)
    assert Part(source, np.array([4]), classes=False).classes is None
