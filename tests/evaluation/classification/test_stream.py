"""Crops streamed through the encoder train the same probes as stored ones, and nothing of them is kept."""

import json

import numpy as np
import pytest

from foveola.config import UserError
from foveola.data.sample import Sample
from foveola.evaluation.classification.stream import CropSchedule, Stream
from foveola.evaluation.classification.training import Order
from foveola.evaluation.evaluate import evaluate
from foveola.evaluation.features.cache import Feed
from foveola.evaluation.features.need import FeedConfig, need

QUIET = {"progress": False, "workers": 0}
SHORT = {
    "linear dinov2": {"epochs": 2, "batch": 20, "lr": (1e-2, 0.1)},
    "linear dino": {"style": "dino", "epochs": 2, "batch": 20, "lr": (1e-2,), "masks": True, "workers": 2},
    "linear mae": {"style": "mae", "epochs": 2, "batch": 20, "lr": (10.0,)},
    "attentive capi": {"epochs": 2, "batch": 20, "lr": (1e-3, 1e-2), "weight_decay": (1e-3,)},
    "abmilp": {"epochs": 2, "batch": 20, "lr": (0.1, 1.0), "warmup": 1},
    "probes": {"run": ("linear", "aggregations", "attentive", "cae"), "epochs": 2, "batch": 20},
}


@pytest.mark.parametrize("case", SHORT)
def test_streamed_crops_train_the_probes_that_stored_ones_train(case, encoder, shades, monkeypatch) -> None:
    """A store of two crops holds what two epochs draw: the grids agree on the hold-out and on test."""
    settings = QUIET | SHORT[case]
    sets = {"train": shades(0, 46), "test": shades(900, 24)}
    stored = evaluate(encoder, case.split()[0], views=2, **sets, **settings)
    opened, plain = [], Feed.open
    monkeypatch.setattr(Feed, "open", lambda self, *a: opened.append((len(a[0]), a[3])) or plain(self, *a))
    streamed = evaluate(encoder, case.split()[0], views="stream", **sets, **settings)
    assert {count for count, _ in opened} <= {24, 4}  # test, and the hold-out; training images are not
    assert not any(views for _, views in opened)
    assert streamed.metrics == pytest.approx(stored.metrics, rel=1e-5)
    assert streamed.chosen == stored.chosen
    assert streamed.grid == stored.grid
    train = streamed.data["train"]
    assert train["views"] == "stream"
    assert train["computed"] == 2 * 40 if "holdout_linear" in stored.metrics else 2 * 40
    assert train["fingerprint"] == stored.data["train"]["fingerprint"]
    assert streamed.data["split"] == stored.data["split"]
    assert not any("random crops" in note or "crops of each image" in note for note in streamed.notes)
    assert "pass over train" in streamed.table()


def test_a_schedule_is_the_order_of_stored_batches_in_whole_parcels() -> None:
    """21 rows in batches of 10: two steps an epoch, each in parcels of 8 and 2; crop 1 + epoch."""
    images = np.arange(21) * 7
    schedule, order = CropSchedule(images, Order(21, 10, 5), 5), Order(21, 10, 5)
    assert len(schedule) == 5 * 2 * 8
    for step in (4, 0, 1, 3, 2):  # workers ask in any order
        epoch, rows = order(step)
        assert epoch == step // 2
        permutation = np.random.default_rng([5, epoch]).permutation(21)
        place = step % 2
        np.testing.assert_array_equal(rows, np.sort(permutation[10 * place : 10 * place + 10]))
        parts = [schedule[8 * parcel : 8 * parcel + 8] for parcel in (2 * step, 2 * step + 1)]
        assert [len(part) for part in parts] == [8, 2]
        np.testing.assert_array_equal(np.concatenate(parts)[:, 0], images[rows])
        assert (np.concatenate(parts)[:, 1] == 1 + epoch).all()


def test_an_image_that_cannot_be_read_is_left_out_of_its_batch(encoder, list_source, make_sample) -> None:
    samples = [make_sample(i, label=i % 2) for i in range(200)]
    samples[11] = Sample(b"nonsense", "broken", None, 1)
    source, config = list_source(samples), FeedConfig(workers=0, batch_size=8)
    stream = Stream(encoder, source, np.arange(200), config)
    drawn = list(stream.drawn(need("average"), 10, 40, 0))
    assert sorted(len(y) for _, y in drawn) == [9, 9, *[10] * 38]
    assert all(len(x["average"]) == len(y) for x, y in drawn)
    assert stream.facts["unreadable_names"] == ["broken"]
    assert stream.facts["computed"] == 398
    few = Stream(encoder, list_source(samples[:20]), np.arange(20), config)
    with pytest.raises(UserError, match="1 of 20 images cannot be read"):
        list(few.drawn(need("average"), 10, 2, 0))


RANKS = """
import json, numpy as np, torch
from foveola import distributed
from foveola.data.sources import open_source
from foveola.evaluation.features.need import FeedConfig
from foveola.evaluation.features.need import need
from foveola.evaluation.classification.stream import Stream
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig

def work():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTConfig(width=32, depth=2, heads=2, patch_size=8, image_size=32)
        encoder = Encoder(EncoderConfig(model=model, transform=TransformConfig(resize=40, crop=32)))
    source = open_source("scenes:?size=48&count=12")
    stream = Stream(encoder, source, np.arange(12), FeedConfig(workers=0, batch_size=3))
    drawn = stream.drawn(need("token"), 5, 4, 0)
    return [[x["token"].double().sum().item(), len(x["token"]), y.tolist()] for x, y in drawn], stream.encoded

if __name__ == "__main__":
    distributed.start("cpu")
    print(json.dumps(work()))
    distributed.stop()
"""


def test_every_rank_encodes_its_part_and_gets_all_of_a_batch(run_ranks) -> None:
    code: dict = {"__name__": "alone"}
    exec(RANKS, code)
    alone, encoded = code["work"]()
    first, second = map(json.loads, run_ranks(RANKS))
    assert first == second
    assert encoded == first[1] == 20
    for (total, count, labels), (other, same, names) in zip(first[0], alone, strict=True):
        assert (count, labels) == (same, names)
        assert count == 5
        assert total == pytest.approx(other, rel=1e-5)
