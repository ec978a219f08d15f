"""The model card of an exported encoder: what its run and its results say of it, and nothing else."""

import html
import json
import re
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any

import foveola
from foveola.config import ConfigError, UserError
from foveola.evaluation.result import Result
from foveola.exporting.usage import how_to_load
from foveola.files import RunFolder, results_in
from foveola.model_names import home_of, run_model
from foveola.models.encoder import Encoder
from foveola.reports.record import Record, read_runs

HUB_LICENCES = {  # identifiers of the Hub that people name most; others become `other` with their own name
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "agpl-3.0", "lgpl-3.0", "openrail"),
}
LIBRARY_NAMES = {"timm": "timm", "hf": "transformers", "onnx": "onnx"}  # as the Hub calls them
PIPELINES = {
    "classification": "image-classification",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
}
OWN_METHODS = {"distillation", "capi", "mae", "ijepa"}  # of which it is known that they read no classes
NOT_KNOWN = "not known"
MOST_CLASSES, MOST_TEXT = 50, 300
FOLDERS = re.compile(r"(?<![\w.])(?:~|\.{0,2}/|[A-Za-z]:[\\/])[^?&=,]*[\\/](?=[^/\\?&=,]+)")
SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|~$@<>-])")


def check_licence(licence: str | None) -> None:
    """Raise UserError for a licence that is no name of one."""
    if licence is not None and (not licence.strip() or len(licence) > 100 or not licence.isprintable()):
        raise UserError(f"licence={licence!r}: expected the name of one, such as apache-2.0 or cc-by-nc-4.0")


def plain_text(value: Any) -> str:
    """Return a text of others as one line of Markdown that shows it as it is: names may hold anything."""
    text = "".join(" " if unicodedata.category(c)[0] in "CZ" else c for c in str(value))
    text = " ".join(text.split())
    text = text[:MOST_TEXT] + "..." if len(text) > MOST_TEXT else text
    return SPECIAL.sub(r"\\\1", html.escape(text, quote=False).replace("&lt;", "<").replace("&gt;", ">"))


def without_folders(name: str) -> str:
    """Return a data string or path without the folders above: they tell of a machine, not of the data."""
    return FOLDERS.sub("", name)


def model_card(
    encoder: Encoder,
    name: str | None,
    *,
    format: str,
    about: dict[str, Any],
    licence: str | None = None,
) -> str:
    """Return a model card in Markdown, with the front matter that Hugging Face's Hub reads.

    Args:
        name: what the encoder was loaded by: a run, whose recipe, data and results are then told; None where
            it was made in Python.
        format: that it is exported to; `about` is what its file says of itself.
        licence: of the weights, from whoever exports them. Starting weights have licences of their own.

    What is not known is said to be so. Only results of this very encoder are told, by its fingerprint.
    """
    record, results = _record(name), _results(encoder, name)
    title = plain_text(without_folders(encoder.config.origin or name or "encoder"))
    parts = [
        _front(encoder, record, results, format, licence),
        f"# {title}",
        _architecture(encoder),
        "## How to use it\n\n```python\n" + how_to_load(format, "PATH", encoder, about) + "\n```\n\n"
        "`PATH` is "
        + ("this folder." if format in ("timm", "hf", "safetensors") else "the file in this folder."),
        "## Training data\n\n" + _data(encoder, record),
        "## Training\n\n" + _training(encoder, record),
        "## Measured\n\n" + _measured(results),
        "## Intended use and limits\n\n" + _limits(encoder, record, results),
        "## Licence\n\n" + _licence(record, licence),
        f"Written by foveola {foveola.__version__}. Fingerprint of the encoder: `{encoder.fingerprint()}`.",
    ]
    return "\n\n".join(parts) + "\n"


def _record(name: str | None) -> Record | None:
    """The run that the encoder is of, where it is of one that can be read."""
    if name is None:
        return None
    named = run_model(name)
    folder = named.run if named else RunFolder(Path(name))
    if not folder.is_run():
        return None
    try:
        return read_runs([folder.path])[0]
    except (UserError, ConfigError) as error:
        print(f"model card: {error}", file=sys.stderr, flush=True)
        return None


def _results(encoder: Encoder, name: str | None) -> list[Result]:
    home = None if name is None else home_of(name)
    if home is None:
        return []
    own, found = encoder.fingerprint(), []
    for path in sorted(results_in(home).glob("*.json")):
        try:
            result = Result.read(path)
        except UserError:
            continue  # what is no result of an evaluation
        if result.encoder == own:
            found.append(result)
    return found


def _front(
    encoder: Encoder, record: Record | None, results: list[Result], format: str, licence: str | None
) -> str:
    """YAML between two lines: every text is quoted as JSON, which YAML contains."""
    head = encoder.head.config.name if encoder.head is not None else ""
    lines = {
        "library_name": LIBRARY_NAMES.get(format, "foveola"),
        "pipeline_tag": PIPELINES.get(head, "image-feature-extraction"),
        "tags": ["foveola", "vision-transformer", *([record.method] if record else [])],
    }
    if licence is not None:
        known = licence.strip().lower()
        lines |= (
            {"license": known} if known in HUB_LICENCES else {"license": "other", "license_name": licence}
        )
    if found := _evaluated(results):
        lines["model-index"] = [{"name": encoder.config.origin or "encoder", "results": found}]
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in lines.items()), "---"])


def _evaluated(results: list[Result]) -> list[dict[str, Any]]:
    """Results as the Hub has them."""
    found = []
    for result in results:
        test = _test_set(result)
        metrics = [
            {"type": f"{result.protocol}/{name}", "name": name, "value": round(result.metrics[name], 4)}
            for name in _told(result)
        ]
        set_name = without_folders(str(test.get("name", NOT_KNOWN)))
        task = {"type": "image-feature-extraction", "name": result.protocol}
        found.append({"task": task, "dataset": {"type": "own", "name": set_name}, "metrics": metrics})
    return found


def _architecture(encoder: Encoder) -> str:
    model, transform = encoder.config.model, encoder.config.transform
    width, depth, heads = model.shape
    count = sum(value.numel() for value in encoder.backbone.state_dict().values())
    positions = f"{model.rope} rotary" if model.positions == "rope" else model.positions
    tokens = "a class token" if model.class_token else "no class token"
    pool = {
        "token": "its class token",
        "average": "the mean of its patches",
        "predictor": "the mean prediction",
    }
    task = ""
    if encoder.head is not None:
        task = f" On it stands a head for {encoder.head.config.name} of {len(encoder.head.classes)} classes."
    return (
        f"A Vision Transformer of {count / 1e6:.1f} million numbers: width {width}, depth {depth}, {heads} "
        f"heads, patches of {model.patch_size} pixels, {positions} positions, {tokens}, {model.registers} "
        "registers. "
        f"What stands for an image is {pool[encoder.config.pool]}: {encoder.width} numbers. "
        f"Images are resized to {transform.resize} pixels ({transform.interpolation}"
        f"{', squashed' if transform.squash else ', the shorter side'}) and cut to the central "
        f"{transform.crop} x {transform.crop}; mean {_numbers(transform.mean)}, deviation "
        f"{_numbers(transform.std)} of values in 0 to 1.{task}"
    )


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _data(encoder: Encoder, record: Record | None) -> str:
    if record is None:
        return f"{NOT_KNOWN.capitalize()}: the encoder was not exported from the folder of a run."
    facts = {}
    with suppress(OSError, ValueError):  # of earlier versions, which kept none
        facts = json.loads(RunFolder(record.folder).data.read_text(encoding="utf-8"))
    facts = facts if isinstance(facts, dict) else {}
    count = facts.get("count") or record.image_count
    lines = [
        f"- data: {plain_text(without_folders(str(record.get('data') or NOT_KNOWN)))}",
        f"- images: {count if isinstance(count, int) else NOT_KNOWN}",
        f"- identity, a hash of their contents: {plain_text(facts.get('contents') or NOT_KNOWN)}",
    ]
    if encoder.head is not None:
        names = [plain_text(name) for name in encoder.head.classes[:MOST_CLASSES]]
        more = f" and {len(encoder.head.classes) - MOST_CLASSES} more" * (
            len(encoder.head.classes) > MOST_CLASSES
        )
        lines.append(f"- classes: {len(encoder.head.classes)}: {', '.join(names)}{more}")
    elif record.get("method.name") in OWN_METHODS:
        lines.append("- classes: none were read in training")
    else:
        lines.append(f"- classes: {NOT_KNOWN}")
    return "\n".join(lines)


def _training(encoder: Encoder, record: Record | None) -> str:
    origin = plain_text(without_folders(encoder.config.origin or NOT_KNOWN))
    if record is None:
        return f"{NOT_KNOWN.capitalize()}, but for where the weights are from: {origin}."
    step, batch = encoder.config.step, record.get("batch_size")
    seen = f"{step * batch:,}" if isinstance(step, int) and isinstance(batch, int) else NOT_KNOWN
    init = str(record.get("init") or "")
    start = plain_text(without_folders(init)) or "none, it was trained from fresh ones"
    seed, precision = (plain_text(record.get(name, NOT_KNOWN)) for name in ("seed", "precision"))
    lines = [
        f"- method: {plain_text(record.method)}; recipe: {plain_text(record.get('recipe', NOT_KNOWN))}",
        f"- steps: {step if step is not None else NOT_KNOWN} of {record.total_steps or NOT_KNOWN}, of "
        f"{batch if batch is not None else NOT_KNOWN} images each: {seen} images seen",
        f"- seed: {seed}; precision: {precision}",
        f"- starting weights: {start}",
    ]
    return "\n".join(lines)


def _test_set(result: Result) -> dict[str, Any]:
    """The facts of the data that the numbers are of."""
    sets = {name: facts for name, facts in result.data.items() if isinstance(facts, dict) and "name" in facts}
    return sets.get("test") or next(iter(sets.values()), {})


def _told(result: Result) -> list[str]:
    """Numbers that have an interval; of a protocol that has none all of them."""
    names = result.names()
    return [name for name in names if result.interval(name)] or names


def _measured(results: list[Result]) -> str:
    if not results:
        return "No results of this very encoder lie beside it: nothing is known of how good it is."
    lines = ["| protocol | measured on | number | value | 95 % interval |", "|---|---|---|---|---|"]
    for result in results:
        test = _test_set(result)
        where = plain_text(without_folders(str(test.get("name", NOT_KNOWN))))
        if isinstance(count := test.get("images"), int):
            where += f", {count} images"
        if contents := test.get("fingerprint"):
            where += f" ({plain_text(contents)})"
        for name in _told(result):
            about, ends = result.metric(name), result.interval(name)
            between = f"{ends[0]:.{about.digits}f} to {ends[1]:.{about.digits}f}" if ends else "none"
            value = f"{result.metrics[name]:.{about.digits}f} {plain_text(about.unit)}".rstrip()
            lines.append(
                f"| {plain_text(result.protocol)} | {where} | {plain_text(name)} | {value} | {between} |"
            )
    lines.append("\nBy frozen protocols of foveola: the encoder did not learn from these images in them.")
    return "\n".join(lines)


def _limits(encoder: Encoder, record: Record | None, results: list[Result]) -> str:
    use = (
        "answers for the task above"
        if encoder.head is not None
        else "features of images and of their patches"
    )
    lines = [
        f"- It gives {use}, for images like those that it was trained on.",
        "- What it does on other kinds of images was not measured here."
        if results
        else "- Nothing was measured.",
        "- Whether its training data are balanced, or hold people or private content, foveola does not know.",
    ]
    if record is not None and isinstance(count := record.image_count, int) and count < 1000:
        lines.append(f"- It was trained on {count} images, which are few.")
    return "\n".join(lines)


def _licence(record: Record | None, licence: str | None) -> str:
    own = (
        f"Of the weights: {plain_text(licence)}."
        if licence
        else "Of the weights: not stated by who exported them."
    )
    init = record.get("init") if record is not None else None
    if init:
        found = _licence_of(str(init))
        name = plain_text(without_folders(str(init)))
        own += f" Training began with {name}, "
        own += (
            f"whose licence timm gives as {plain_text(found)}."
            if found
            else "whose licence foveola does not know."
        )
    elif record is None:
        own += " What they were made of, and its licence, are not known."
    return own


def _licence_of(init: str) -> str | None:
    """The licence that timm states of its weights."""
    if not init.startswith("timm:"):
        return None
    try:
        import timm

        known = timm.get_pretrained_cfg(init.removeprefix("timm:").partition("?")[0])
        return None if known is None else known.license
    except Exception:  # timm is not there, or does not know: nothing is then said
        return None
