"""What to do after reading a report, from what it found."""

import shlex
from collections.abc import Iterator

from foveola.reports import verdicts
from foveola.reports.findings import Findings

SHORT_RUN = 20.0  # below which a longer run comes first; published recipes train for 100 and more
PUBLISHED_IMAGES = 10_000  # images; methods without labels were published on a million and more
PUBLIC = "timm:vit_small_patch14_dinov2.lvd142m"


def next_steps(each: Findings, reference: str | None, seeds: bool) -> list[tuple[str, str]]:
    """Return (what to do and why, the command) for a run, the most useful first; the command may be empty.

    Args:
        reference: another encoder that was measured as well.
        seeds: whether other seeds of a run were.
    """
    return [*_mend(each), *_measure(each), *_train(each), *_compare(each, reference, seeds)]


def _mend(each: Findings) -> Iterator[tuple[str, str]]:
    if bad := [verdict.name for verdict in each.verdicts if verdict.state == "BAD"]:
        names = " ".join(bad)
        yield f"First look into what is BAD below, for it may explain everything else: {names}", ""


def _measure(each: Findings) -> Iterator[tuple[str, str]]:
    run, found = shlex.quote(str(each.record.folder)), verdicts.changes(each.progress)
    if each.data.labels is None:
        yield (
            "Nothing here knows what your images show. A few hundred images with labels, in a folder for "
            "each class and not used for training, tell whether features separate the classes:",
            f"foveola report {run} train=folder:/labelled/train test=folder:/labelled/test",
        )
    elif found and found[0].outcome == "open":
        yield (
            f"The main measurement cannot tell the two networks apart on {found[0].rows}. Measure on more of "
            "them, if there are more:",
            f"foveola report {run} limit=10000",
        )
    if each.data.overlap():
        yield (
            "The images that were measured are those that were trained on. Images that training has not seen "
            "tell more:",
            f"foveola report {run} train=folder:/labelled/train test=folder:/labelled/test",
        )


def _train(each: Findings) -> Iterator[tuple[str, str]]:
    record, run = each.record, shlex.quote(str(each.record.folder))
    epochs = (record.lines[-1].get("epoch") or 0.0) if record.lines else 0.0
    total = record.total_steps
    if total and record.step < total:
        yield (
            "The run is not finished. The same command goes on where it stopped:",
            f"foveola pretrain {run}/config.yaml out={run}",
        )
    elif record.lines and epochs < SHORT_RUN:
        yield (
            f"Each image was seen {epochs:.1f} times, which is too short to tell what the method can do: "
            "published recipes train for 100 epochs and more. A longer run starts anew:",
            f"foveola pretrain {run}/config.yaml duration='100 epochs' out=NEW_FOLDER",
        )


def _compare(each: Findings, reference: str | None, seeds: bool) -> Iterator[tuple[str, str]]:
    run = shlex.quote(str(each.record.folder))
    known = each.record.image_count
    few = f" on {known:,} images" if known and known < PUBLISHED_IMAGES else ""
    if reference is None:
        yield (
            f"See whether training your own network{few} is worth it: measure a public one in the same way. "
            "If that is better, use it, or train longer and on more images:",
            f"foveola report {run} reference={PUBLIC}",
        )
    if each.record.get("seed") is not None and not seeds:
        seed = int(each.record.get("seed")) + 1
        yield (
            "The intervals speak of the test images alone. Another seed tells how much is luck of the start:",
            f"foveola pretrain {run}/config.yaml seed={seed} out=NEW_FOLDER\nfoveola report {run} NEW_FOLDER",
        )
