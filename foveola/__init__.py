"""Pretrain vision transformers without labels, and measure what they learned.

Importing does no work: a public name loads its module when first used, so `import foveola` is free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveola.data.sample import Objects, Sample
    from foveola.data.shards.pack import pack
    from foveola.data.sources import Source, open_source
    from foveola.embedding.embed import embed
    from foveola.embedding.index import Index
    from foveola.embedding.search import search
    from foveola.evaluation.attention.analysis import analyze_attention
    from foveola.evaluation.attention.result import AttentionAnalysis
    from foveola.evaluation.compare import Comparison, compare
    from foveola.evaluation.detection.check import check_masks
    from foveola.evaluation.evaluate import evaluate, evaluate_all
    from foveola.evaluation.protocol import Metric, Needs, Outcome, Protocol, Reading
    from foveola.evaluation.result import Result
    from foveola.explorer.explore import Explorer, explore
    from foveola.exporting.export import export
    from foveola.figures.visualize import Figure, visualize
    from foveola.methods.method import Method, MethodConfig, Output
    from foveola.methods.terms.term import Term
    from foveola.models.encoder import Encoder, Features, TransformConfig
    from foveola.models.wrapped import ImageTokens
    from foveola.proposals.proposal import Proposals, Proposer
    from foveola.proposals.run import Proposed, propose
    from foveola.reports.data_page import check_data
    from foveola.reports.report import report
    from foveola.tasks.task import Classes, Detections, LabelMap
    from foveola.training.auto.plan import Plan
    from foveola.training.auto.request import make_plan
    from foveola.training.finetune import finetune
    from foveola.training.recipe import recipes
    from foveola.training.run import Run, pretrain
    from foveola.zoo.load import load
    from foveola.zoo.wrap import wrap

__version__ = "0.1.0"
__all__ = [
    "AttentionAnalysis",
    "Classes",
    "Comparison",
    "Detections",
    "Encoder",
    "Explorer",
    "Features",
    "Figure",
    "ImageTokens",
    "Index",
    "LabelMap",
    "Method",
    "MethodConfig",
    "Metric",
    "Needs",
    "Objects",
    "Outcome",
    "Output",
    "Plan",
    "Proposals",
    "Proposed",
    "Proposer",
    "Protocol",
    "Reading",
    "Result",
    "Run",
    "Sample",
    "Source",
    "Term",
    "TransformConfig",
    "__version__",
    "analyze_attention",
    "check_data",
    "check_masks",
    "compare",
    "embed",
    "evaluate",
    "evaluate_all",
    "explore",
    "export",
    "finetune",
    "load",
    "make_plan",
    "open_source",
    "pack",
    "pretrain",
    "propose",
    "recipes",
    "report",
    "search",
    "visualize",
    "wrap",
]

_HOMES = {
    "check_data": "foveola.reports.data_page",
    "check_masks": "foveola.evaluation.detection.check",
    "pretrain": "foveola.training.run",
    "Run": "foveola.training.run",
    "finetune": "foveola.training.finetune",
    "Classes": "foveola.tasks.task",
    "Detections": "foveola.tasks.task",
    "LabelMap": "foveola.tasks.task",
    "make_plan": "foveola.training.auto.request",
    "Plan": "foveola.training.auto.plan",
    "recipes": "foveola.training.recipe",
    "open_source": "foveola.data.sources",
    "pack": "foveola.data.shards.pack",
    "Source": "foveola.data.sources",
    "Sample": "foveola.data.sample",
    "Objects": "foveola.data.sample",
    "evaluate": "foveola.evaluation.evaluate",
    "evaluate_all": "foveola.evaluation.evaluate",
    "compare": "foveola.evaluation.compare",
    "Comparison": "foveola.evaluation.compare",
    "export": "foveola.exporting.export",
    "embed": "foveola.embedding.embed",
    "Index": "foveola.embedding.index",
    "search": "foveola.embedding.search",
    "explore": "foveola.explorer.explore",
    "Explorer": "foveola.explorer.explore",
    "analyze_attention": "foveola.evaluation.attention.analysis",
    "AttentionAnalysis": "foveola.evaluation.attention.result",
    "Result": "foveola.evaluation.result",
    "Protocol": "foveola.evaluation.protocol",
    "Needs": "foveola.evaluation.protocol",
    "Reading": "foveola.evaluation.protocol",
    "Metric": "foveola.evaluation.protocol",
    "Outcome": "foveola.evaluation.protocol",
    "Method": "foveola.methods.method",
    "MethodConfig": "foveola.methods.method",
    "Output": "foveola.methods.method",
    "Term": "foveola.methods.terms.term",
    "propose": "foveola.proposals.run",
    "Proposals": "foveola.proposals.proposal",
    "Proposer": "foveola.proposals.proposal",
    "Proposed": "foveola.proposals.run",
    "report": "foveola.reports.report",
    "visualize": "foveola.figures.visualize",
    "Figure": "foveola.figures.visualize",
    "load": "foveola.zoo.load",
    "Encoder": "foveola.models.encoder",
    "wrap": "foveola.zoo.wrap",
    "ImageTokens": "foveola.models.wrapped",
    "TransformConfig": "foveola.models.encoder",
    "Features": "foveola.models.encoder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
