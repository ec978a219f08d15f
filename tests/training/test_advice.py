"""What is foreseen of a run and what is said of its health on the way, against arithmetic and naive loops."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from foveola.config import ConfigError
from foveola.data.sources import open_source
from foveola.health import Facts
from foveola.losses import entropy, sinkhorn
from foveola.schedules import Progress
from foveola.training.advice import advice, objects_line
from foveola.training.assemble import assemble
from foveola.training.recipe import resolve
from foveola.training.watch import EARLIEST, Watch

CPU = torch.device("cpu")
LONG = Progress(0, 10_000, 100, 16)


def told(config, progress=LONG, images=100_000):
    return advice(config, assemble(config, progress, CPU).method, progress, images)


def test_a_run_of_usual_length_needs_no_advice(tiny):
    assert told(tiny(**{"optimizer.freeze_last_layer": "1 epochs"})) == []


def test_a_slow_teacher_keeps_its_first_weights(tiny):
    """0.99 ** 100 = 36.6 % of them; the value that is proposed leaves less than 5 %."""
    short = Progress(0, 600, 10, 16)
    momentum = {"value": 0.999, "end": None, "shape": "constant"}
    (line,) = told(tiny(**{"method.momentum": momentum}), short)
    assert f"still has {0.999**600:.0%} of its first weights" in line
    proposed = float(line.rpartition("method.momentum.value=")[2])
    assert proposed**600 < 0.05
    assert told(tiny(**{"method.momentum": momentum | {"value": proposed}}), short) == []


def test_a_part_that_never_learns_is_named_unless_it_is_meant(tiny):
    (line,) = told(tiny(freeze={"encoder": "200 epochs"}))
    assert line.startswith("freeze.encoder='200 epochs' is the whole run: it never learns")
    assert told(tiny(freeze={"encoder": "all"})) == told(tiny(freeze={"encoder": "99 %"})) == []


def test_starting_weights_may_stay_for_a_part_but_not_for_the_most(tiny):
    """0.999 ** 1000 = 37 % of fresh weights is told; of starting weights it takes 55 % of 0.999 ** 600."""
    momentum = {"value": 0.999, "end": None, "shape": "constant"}
    for total, init, lines in ((1000, None, 1), (1000, "w", 0), (600, "w", 1)):
        config = tiny(**{"method.momentum": momentum})
        method = assemble(config, LONG, CPU).method
        config = dataclasses.replace(config, init=init)
        assert len(advice(config, method, Progress(0, total, 10, 16), 100_000)) == lines


def test_sinkhorn_with_fewer_rows_than_prototypes_has_flat_targets(tiny):
    sinkhorn_kind = {"method.token.target.kind": "sinkhorn", "method.heads.main.prototypes": 256}
    (line,) = told(tiny(**sinkhorn_kind))
    assert "256 prototypes among about 32 rows" in line  # 16 images x 2 global views
    assert f"below about {math.log(8):.2f} of {math.log(256):.2f} nats" in line
    assert line.endswith("method.heads.main.prototypes=32 or less")
    logits = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    for temperature in (1.0, 0.05, 0.01):
        assert entropy(sinkhorn(logits, temperature)).mean() > math.log(8) - 0.05


def test_rows_of_a_term_are_those_that_views_have(tiny):
    from foveola.data.loader import Loader
    from foveola.views.batch import Streams, make_views

    config = tiny(**{"views.masking.shape": "random", "views.global_size": 64})
    method = assemble(config, LONG, CPU).method
    batches = iter(Loader(open_source("scenes:?size=32&count=64"), 16, 0, config.loader, with_objects=True))
    found = []
    for step in range(12):
        batch = make_views(next(batches), config.views, 8, Streams(0, step))
        found.append(len(batch.large.hidden_contents.indices) / 16)
    assert method.terms["patch"].rows(1) == pytest.approx(np.mean(found), rel=0.1)
    assert method.terms["token"].rows(3) == 2 * 3


def test_more_prototypes_than_images(tiny):
    (line, *rest) = told(tiny(**{"method.heads.main.prototypes": 4096}), images=1500)
    assert "4,096 prototypes are more than the 1,500 images" in line
    assert line.endswith("method.heads.main.prototypes=128")
    assert len(rest) == 1  # the patch term shares the head


def test_frozen_for_the_whole_run(tiny):
    found = told(tiny(**{"optimizer.freeze_last_layer": "7 epochs"}), Progress(0, 700, 100, 16))
    assert any("freeze_last_layer='7 epochs' is the whole run" in line for line in found)


def test_masks_of_a_batch_that_is_too_small_to_be_dealt_any(tiny):
    masking = {"views.masking": {"stratified": True, "probability": 0.4}, "method.spread": None}
    with pytest.raises(ConfigError, match="never sees a masked patch with 1 images at once"):
        assemble(tiny(batch_size=1, **masking), LONG, CPU)
    assert assemble(tiny(batch_size=2, **masking), LONG, CPU)


def test_images_with_objects_are_counted(tmp_path):
    from PIL import Image

    (tmp_path / "images").mkdir()
    for name in "abcd":
        Image.new("RGB", (20, 10)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "boxes.csv").write_text("a.png,0,0,5,5\na.png,5,5,9,9\nc.png,1,1,4,4\n")
    some = open_source(f"folder:{tmp_path}/images?boxes={tmp_path}/boxes.csv")
    assert objects_line(some) == "2 of 4 images have any; each of the others counts as one object"
    none = open_source(f"folder:{tmp_path}/images")
    assert objects_line(none).startswith("none: folder:")


# -- on the way ----------------------------------------------------------------------------------------------


def lines(share: float) -> dict[str, float]:
    return {"loss": 1.0, "epoch": 1.0, "token/target_entropy": share * math.log(64), "feature_spread": 0.9}


def test_a_verdict_is_said_once_when_it_turns_and_again_at_the_end():
    watch = Watch(Facts(prototypes={"token": 64}, total_steps=2000), [], warmup=300)
    said = {}
    for step in range(10, 2010, 10):
        flat = step <= 1000
        if texts := watch.add(step, lines(0.999 if flat else 0.5)):
            said[step] = texts
    first, second = said.items()
    assert first[0] == 300  # not in the warm-up, when every method has flat targets
    assert first[1][0].startswith("health: BAD: Do the targets of token say something? Mean entropy 4.15 of")
    assert second[0] > 1000
    assert second[1][0].startswith("health: no longer BAD: Do the targets of token")
    flat = Watch(watch.facts, [{"step": s, **lines(0.999)} for s in range(10, 1000, 10)], 300)
    assert flat.add(1000, lines(0.999)) == []  # a run that goes on has said it before
    assert any("BAD: Do the targets of token" in text for text in flat.summary())


def test_nothing_is_said_of_the_first_steps():
    watch = Watch(Facts(prototypes={"token": 64}), [], warmup=0)
    assert not any(watch.add(step, lines(1.0)) for step in range(1, EARLIEST))
    assert watch.add(EARLIEST, lines(1.0))


def test_a_short_run_says_that_it_is_too_short(whole):
    text = (whole / "log.txt").read_text()
    assert "64 images are few" in text
    assert "objects: annotated in scenes:" in text
    assert "health: LOOK: Is it long enough to tell? 8 steps on 64 images: too short to tell" in text
    assert text.index("health: LOOK") < text.index("finished; encoder:")


# -- what is said is true ------------------------------------------------------------------------------------


def test_rows_are_those_of_a_part_of_a_step(tiny):
    """Sinkhorn-Knopp goes through each part by itself: 16 images in 4 parts are 8 rows, not 32."""
    sinkhorn_kind = {"method.token.target.kind": "sinkhorn", "method.heads.main.prototypes": 256}
    (line,) = told(tiny(accumulate=4, **sinkhorn_kind))
    assert "256 prototypes among about 8 rows at once" in line
    assert f"below about {math.log(256 / 8):.2f} of" in line


def test_a_run_of_some_steps_is_not_advised_to_have_no_teacher(tiny):
    found = told(tiny(), Progress(0, 8, 4, 16))
    (line,) = [line for line in found if "the teacher is slow for 8 steps" in line]
    assert line.endswith("; a longer duration, or a lower method.momentum.value")


def test_masked_models_advise_of_what_makes_their_task_too_easy():
    data, no_warmup = "scenes:?size=32&count=64", {"duration": "2000 steps", "batch_size": 16}
    easy = resolve("mae-tiny-tinyimagenet", {"data": data, **no_warmup, "views.dropping.ratio": 0.3})
    assert any("views.dropping.ratio=0.3 hides less than 50%" in line for line in told(easy))
    usual = resolve("mae-tiny-tinyimagenet", {"data": data, **no_warmup})
    assert not any("views.dropping" in line for line in told(usual))
    fast = resolve("ijepa-tiny-tinyimagenet", {"data": data, **no_warmup, "method.momentum.value": 0.5})
    assert any("momentum.value=0.5: nothing but a slow teacher" in line for line in told(fast))
    usual = resolve("ijepa-tiny-tinyimagenet", {"data": data, **no_warmup})
    assert not any("collapsing" in line for line in told(usual))
