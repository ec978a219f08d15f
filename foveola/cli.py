"""The command line: parse words, call the Python API, print what it returns."""

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import foveola
from foveola import commands
from foveola.command_keys import (
    ANALYZE,
    AUTO_KEYS,
    DEMO,
    EVALUATE_KEYS,
    FINETUNE_KEYS,
    TRAIN,
    VISUALIZE,
)
from foveola.config import UserError, describe, nearest, parse_overrides
from foveola.console import (
    Ended,
    as_command,
    named_by_key,
    only,
    placed,
    print_keys,
    print_table,
    refuse,
    split,
)
from foveola.failures import explain
from foveola.launchers import STOPPED, split_processes, start_processes
from foveola.model_names import is_there

if TYPE_CHECKING:
    from foveola.training.recipe import RunConfig

PARALLEL = ("pretrain", "finetune", "evaluate", "analyze", "masks", "embed")  # take gpus= and processes=
OWN_PROCESSES = ("demo", "pack")  # start processes themselves, for a part of their work
USAGE = """\
usage: foveola COMMAND ...

  pretrain auto data=... [budget='2 hours'] [init=...] [key=value ...]
                                      plan a run for these images and this machine, say why, and train
  pretrain RECIPE [key=value ...]     train as a recipe says; on an existing run folder, go on with it
      --dry-run                       build everything, run two steps, print sizes and speed
      --help                          every key of the recipe with its type, value and meaning
  finetune RECIPE data=... [init=...] [test=...] [key=value ...]
                                      train an encoder and a head for a task: classes, label maps, objects
  evaluate PROTOCOL[,PROTOCOL ...] model=... train=... test=... [key=value ...]
      --help                          every key of the protocol
  analyze attention model=A[,B ...] data=... out=... [key=value ...]
                                      what each block and head of encoders reads: numbers and charts
      --help                          every key of the analysis
  visualize KIND model=A[,B ...] data=... [out=figures] [key=value ...]
                                      what encoders make of images: colours, attention, neighbours ...
      --help                          every kind; after a kind, every key of it
  report RUN [RUN ...] [data=...] [out=FILE] [key=value ...]
                                      what runs learned and whether it helped, on one page: RUN/report.html
      --help                          every key of the report
{commands}  demo [out=runs/demo] [seeds=1] [key=value ...]
                                      pretrain on built-in images, measure, draw; keys of the recipe `demo`
  recipes                             the recipes that come with foveola, and what each aims at
  --version

RECIPE is a name from `foveola recipes` or the path of a YAML file. Values are YAML:
batch_size=256  views.local_scale='[0.05, 0.3]'  compile=true  data='folder:/my/images'
On several GPUs: foveola pretrain RECIPE gpus=8 ... (or under srun, mpirun or torchrun: docs/scale.md)
FOVEOLA_DEBUG=1 shows the traceback behind an error message.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0: done; 2: a mistake in what was asked, or a fault of the machine; 130: interrupted; 128 + n: ended by
    signal n.
    """
    try:
        words = sys.argv[1:] if arguments is None else arguments
        with as_command():
            return _dispatch(*split_processes(words))
    except UserError as error:
        if os.environ.get("FOVEOLA_DEBUG") == "1":
            raise
        return refuse(str(error))
    except KeyboardInterrupt:
        print("foveola: interrupted", file=sys.stderr)
        return 130
    except Ended as told:
        print(f"foveola: ended by {signal.Signals(told.args[0]).name}", file=sys.stderr)
        return 128 + told.args[0]
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        reason = explain(error)
        if reason is None or os.environ.get("FOVEOLA_DEBUG") == "1":
            raise
        return refuse(reason)


def usage_text() -> str:
    """Return what `foveola --help` prints: every command, those with a file of their own among them."""
    return USAGE.replace("{commands}", "".join(commands.command(name).USAGE for name in commands.names()))


def _dispatch(arguments: list[str], processes: str | None) -> int:
    own: dict[str, Callable[[list[str]], None]] = {
        "pretrain": _pretrain,
        "finetune": _finetune,
        "evaluate": _evaluate,
        "analyze": _analyze,
        "visualize": _visualize,
        "report": _report,
        "recipes": _recipes,
        "demo": _demo,
    }
    others = commands.names()
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(usage_text(), end="")
        return 0 if arguments else 2
    command, *rest = arguments
    asks = bool({"--help", "-h"} & {*rest})
    if command in OWN_PROCESSES and processes is not None and processes.startswith("processes="):
        rest, processes = [*rest, processes], None  # a key of theirs
    if processes is not None and not asks and command in {*own, *others}:
        if command not in PARALLEL:
            if command == "slurm":
                raise UserError(f"{processes}: slurm.gpus= says how many processes a machine of a job has")
            several = ", ".join(PARALLEL)
            raise UserError(
                f"{command} runs in one process: leave out {processes}; several are for {several}"
            )
        return start_processes(arguments, processes)
    if asks and command in PARALLEL:
        print("with gpus=8 (or all): in a process for each GPU; with processes=2 device=cpu: in two on CPUs")
    if command == "--version":
        print(f"foveola {foveola.__version__}")
    elif command in own:
        own[command](rest)
    elif command in others:
        commands.command(command).main(rest)
    else:
        known = [*own, *others]
        near = nearest(command, known)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"unknown command {command!r}; {hint}")
    return 0


def _pretrain(arguments: list[str]) -> None:
    names, overrides, flags = split(arguments, ("--dry-run",))
    if "--help" in flags and not names:
        print(usage_text(), end="")
        return
    usage = "foveola pretrain RECIPE [key=value ...]; `foveola recipes` lists them"
    names, overrides = named_by_key(names, overrides, "recipe", usage)
    recipe = only(names, "recipe", usage)
    from foveola.training.auto.plan import AUTO, TRAINED
    from foveola.training.auto.request import request
    from foveola.training.recipe import installed, resolve

    if "--help" in flags:
        about, own, shown = "its value in this recipe", [], recipe
        if recipe == AUTO:
            about, own, shown = "its value before it is planned", AUTO_KEYS, TRAINED["ibot"]
        print(f"foveola pretrain {recipe} [key=value ...]: every key, {about}, its meaning\n")
        taken = {info.path for info in own}
        print_keys([*own, *(i for i in describe(resolve(shown, overrides)) if i.path not in taken)])
        for line in installed():
            print(line)
        return
    config = request(overrides) if recipe == AUTO else resolve(recipe, overrides)
    _train(config, flags)


def _train(config: "RunConfig", flags: set[str]) -> None:
    from foveola import distributed
    from foveola.training import dryrun, run

    if "--dry-run" in flags:
        with distributed.joined(config.device):
            report = dryrun.dry_run(config)
            if distributed.is_main():
                print(report)
    else:
        stopped, code = run.pretrain(config).interrupted, os.environ.get(STOPPED)
        if stopped and code and os.environ.get("RANK", "0") == "0":  # the last to write
            sys.exit(int(code))


def _finetune(arguments: list[str]) -> None:
    names, overrides, flags = split(arguments, ("--dry-run",))
    from foveola.training.finetune import with_test
    from foveola.training.recipe import recipes, resolve

    usage = "foveola finetune RECIPE data=... [init=...] [test=...] [key=value ...]"
    if "--help" in flags and not names:
        print(f"usage: {usage}\n\n`foveola finetune RECIPE --help` lists the keys of a recipe:")
        print_table([(f"  {name}", each.task, each.aim) for name, each in recipes().items() if each.task])
        return
    names, overrides = named_by_key(names, overrides, "recipe", usage)
    recipe = only(names, "recipe", f"{usage}; `foveola finetune --help` lists recipes")
    settings = parse_overrides(overrides)
    test = settings.pop("test", None)
    config = resolve(recipe, with_test(recipe, settings, test))
    if "--help" in flags:
        print(
            f"foveola finetune {recipe} [key=value ...]: every key, its value in this recipe, its meaning\n"
        )
        print_keys([*FINETUNE_KEYS, *describe(config)])
        return
    _train(config, flags)


def _evaluate(arguments: list[str]) -> None:
    names, overrides, flags = split(arguments, ())
    from foveola.evaluation.evaluate import evaluate_all, protocol_configs
    from foveola.evaluation.protocol import PROTOCOLS, every, find_protocol
    from foveola.evaluation.result import Result

    usage = "foveola evaluate PROTOCOL[,PROTOCOL ...] model=... train=... test=A[,B ...] [key=value ...]"
    if "--help" in flags and not names:
        print(f"usage: {usage}\n\n`foveola evaluate PROTOCOL --help` lists the keys of a protocol:")
        print_table([(f"  {protocol.name}", protocol.help) for protocol in every()])
        print("\nSeveral protocols share one pass over the images; PROTOCOL.key=value is for one of them.")
        return
    known = f"protocol ({', '.join(PROTOCOLS)})"
    names, overrides = named_by_key(names, overrides, "protocol", usage)
    chosen = [name.strip() for name in only(names[:1], known, usage).split(",")]
    if "--help" in flags:
        for protocol in map(find_protocol, chosen):
            print(f"foveola evaluate {protocol.name} [key=value ...]: {protocol.help}\n")
            print_keys([*EVALUATE_KEYS, *describe(protocol.Config())])
        return
    settings = parse_overrides(placed(names[1:], overrides, ("model",), usage))
    options = {info.path: settings.pop(info.path, None) for info in EVALUATE_KEYS}
    options = {path: None if value is None else str(value) for path, value in options.items()}
    model = options.pop("model")
    options["overlap"] = options["overlap"] or "refuse"
    protocol_configs(chosen, settings)  # mistakes first, before anything is loaded
    if model is None:
        raise UserError(f"evaluate {chosen[0]} needs model=: a run folder, an encoder folder, or weights")
    from foveola import distributed

    with distributed.joined(options.pop("device") or "auto") as device:
        shown: list[str] = []

        def show(result: Result) -> None:
            if distributed.is_main():
                print("\n" * bool(shown) + result.table(), flush=True)
            shown.append(result.protocol)

        results = evaluate_all(model, chosen, device=device, show=show, **options, **settings)
        if distributed.is_main() and not any(result.written for result in results.values()):
            print("not written to a file: out=FOLDER keeps the results, for foveola compare")


def _analyze(arguments: list[str]) -> None:
    names, overrides, flags = split(arguments, ())
    from foveola.evaluation.attention.analysis import AnalysisConfig, analyze_attention

    usage = "foveola analyze attention model=A[,B ...] data=... out=... [key=value ...]"
    if "--help" in flags:
        print(
            f"usage: {usage}\n\n"
            "What each block and head reads, averaged over images: numbers and charts (docs/analysis.md).\n"
        )
        print_keys([*ANALYZE, *describe(AnalysisConfig())])
        return
    if (what := only(names[:1], "analysis (attention)", usage)) != "attention":
        raise UserError(f"unknown analysis {what!r}; known: attention")
    settings = parse_overrides(placed(names[1:], overrides, ("model",), usage))
    options = {info.path: settings.pop(info.path, None) for info in ANALYZE}
    for name in ("model", "data", "out"):
        if options[name] is None:
            raise UserError(f"analyze attention needs {name}=; usage: {usage}")
    model, data, out = options["model"], str(options["data"]), str(options["out"])
    if not isinstance(model, list):  # a path may have a comma in it
        model = [model] if is_there(str(model)) else str(model).split(",")
    models = [str(word).strip() for word in model if str(word).strip()]
    from foveola import distributed
    from foveola.figures.attention_plots import save_attention_plots

    with distributed.joined(str(options["device"] or "auto")) as device:
        analysis = analyze_attention(models, data, out=out, device=device, **settings)
        if distributed.is_main():
            print(analysis.table())
            print(*save_attention_plots(analysis, out), sep="\n")


def _visualize(arguments: list[str]) -> None:
    names, overrides, flags = split(arguments, ())
    from foveola.figures.visualize import DOOR, FIGURES, configure, find_figure, visualize

    usage = "foveola visualize KIND model=A[,B ...] data=... [out=figures] [key=value ...]"
    if "--help" in flags and not names:
        print(f"usage: {usage}\n\n`foveola visualize KIND --help` lists the keys of a kind:")
        print_table([(f"  {figure.name}", figure.help) for figure in map(find_figure, DOOR.names())])
        return
    names, overrides = named_by_key(names, overrides, "kind", usage)
    kind = only(names[:1], f"kind ({', '.join(FIGURES)})", usage)
    figure = find_figure(kind)
    options = [*VISUALIZE, TRAIN] if figure.train else VISUALIZE
    if "--help" in flags:
        print(f"foveola visualize {kind} [key=value ...]: {figure.help}\n")
        print_keys([*options, *describe(figure.config())])
        return
    settings = parse_overrides(placed(names[1:], overrides, ("model",), usage))
    given = {info.path: settings.pop(info.path) for info in options if info.path in settings}
    configure(kind, settings)  # mistakes first, before anything is loaded
    if "model" not in given:
        raise UserError(f"visualize {kind} needs model=: a run folder, an encoder folder, or weights")
    model = given.pop("model")
    model = model if isinstance(model, list) else str(model)
    given = {path: None if value is None else str(value) for path, value in given.items()}
    print(*visualize(kind, model, **given, **settings), sep="\n")


def _report(arguments: list[str]) -> None:
    names, overrides, flags = split(arguments, ())
    from foveola.reports.report import report
    from foveola.reports.request import ReportConfig

    usage = "foveola report RUN [RUN ...] [data=...] [out=FILE] [key=value ...]"
    if "--help" in flags:
        print(
            f"usage: {usage}\n\n"
            "Writes one web page that opens anywhere: whether training helped, whether the run is healthy,\n"
            "curves, figures and the exact configuration (docs/report.md). Further keys are settings of\n"
            "the protocols: objects=200, knn.k=[20].\n"
        )
        print_keys(describe(ReportConfig()))
        return
    names, overrides = named_by_key(names, overrides, "model", usage, several=True)
    if not names:
        raise UserError(f"which run? usage: {usage}")
    print(report(names, **parse_overrides(overrides)))


def _recipes(arguments: list[str]) -> None:
    names, overrides, flags = split(arguments, ())
    if names or overrides:
        raise UserError(f"recipes takes no {(names + overrides)[0]!r}; usage: foveola recipes")
    if "--help" in flags:
        print("usage: foveola recipes\n\nEach recipe, its method, model and data, and the result it aims at.")
        return
    from foveola.training.recipe import recipes

    rows = [(name, about.method, about.model, about.data, about.aim) for name, about in recipes().items()]
    print_table([("name", "method", "model", "data", "aim"), *rows])


def _demo(arguments: list[str]) -> None:
    names, overrides, flags = split(arguments, ())
    usage = "foveola demo [out=runs/demo] [seeds=1] [key=value ...]"
    if names:
        raise UserError(f"expected key=value, got {names[0]!r}; usage: {usage}")
    if "--help" in flags:
        from foveola.training.recipe import resolve

        print(
            f"usage: {usage}\n\n"
            "Pretrains the recipe `demo` on built-in images, compares the encoders\n"
            "with untrained ones on objects never seen in training, and draws what they learned to\n"
            "out/demo.png and out/report.html.\n"
            "Interrupted, the same command goes on.\n"
        )
        print_keys([*DEMO, *(info for info in describe(resolve("demo")) if info.path not in ("out", "seed"))])
        return
    settings = parse_overrides(overrides)
    out, seeds, processes = (settings.pop(key.path, key.value) for key in DEMO)
    for name, value in (("seeds", seeds), ("processes", 1 if processes is None else processes)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name}: expected a number of at least 1, got {value!r}")
    from foveola.demo import demo

    demo(str(out), seeds, settings, processes)


if __name__ == "__main__":
    sys.exit(main())
