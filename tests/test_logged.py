"""Numbers to log, of all parts of a step on all processes."""

import json
import math

import pytest
import torch

from foveola.logged import Averages, added, of_all_processes, root_of_variance

CPU = torch.device("cpu")


def test_parts_count_by_their_rows():
    generator = torch.Generator().manual_seed(0)
    parts = [5 + torch.randn(rows, 4, 3, generator=generator) for rows in (2, 7, 1)]
    logs: dict[str, Averages] = {}
    for part in parts:
        mean = Averages((part.sum(),), part.numel())
        logs = added(logs, {"mean": mean, "root": root_of_variance(part), "part": part.mean()})
    whole = torch.cat(parts).double()
    found = of_all_processes(logs, CPU)
    assert found["mean"] == pytest.approx(whole.mean().item(), rel=1e-6)
    assert found["root"] == pytest.approx(whole.var(dim=0, correction=0).mean().sqrt().item(), rel=1e-6)
    assert found["part"] == pytest.approx(sum(part.mean().item() for part in parts) / 3, rel=1e-6)
    assert float(logs["root"]) == pytest.approx(found["root"], rel=1e-6)


def test_what_has_no_rows_has_no_number():
    nothing = Averages((torch.zeros(()),), 0)
    assert math.isnan(float(nothing))
    assert of_all_processes({"nothing": nothing}, CPU) == {}
    assert of_all_processes({}, CPU) == {}
    logs = added({"nothing": nothing}, {"nothing": Averages((torch.tensor(6.0),), 2)})
    assert of_all_processes(logs, CPU) == {"nothing": 3.0}


RANKS = """
import json
import torch
from foveola import distributed
from foveola.logged import Averages, added, of_all_processes

distributed.start("cpu")
rank = distributed.rank()
logs = added({}, {"both": torch.tensor(float(rank)), "rows": Averages((torch.tensor(3.0),), 1 + 2 * rank)})
logs = added(logs, {"first": torch.tensor(5.0)} if rank == 0 else {"second": torch.tensor(7.0)})
print(json.dumps(of_all_processes(logs, torch.device("cpu"))))
distributed.stop()
"""


def test_processes_need_not_log_the_same(run_ranks):
    """What is logged is what the first one logs."""
    first, second = map(json.loads, run_ranks(RANKS))
    assert first == {"both": 0.5, "rows": 1.5, "first": 5.0}
    assert second == {"both": 0.5, "rows": 1.5}


ODD = """
import json
import torch
from foveola import Output, distributed
from foveola.config import UserError
from foveola.logged import added, of_all_processes
from foveola.training.loop import _checked

distributed.start("cpu")
rank = distributed.rank()
logs = {}
for part in range(2):
    more = {"int": 3 * rank, "bool": True, "float": 0.1, "NaN": float("nan")}
    more["tensor of bool"] = torch.tensor(rank == 0)
    logs = added(logs, more | ({} if rank else {"a/b c=é": torch.tensor(5)}))
print(json.dumps(of_all_processes(logs, torch.device("cpu"))))

def said(work):
    try:
        work()
    except UserError as error:
        print(json.dumps(str(error)))

vector = torch.ones(3)
for value in (None, "x", vector, torch.tensor(1j), [1.0]):
    said(lambda: added({}, {"mine": value}))
for name in (3, "", "step", "loss"):
    said(lambda: added({}, {name: torch.tensor(1.0)}))
for output in (vector, Output({}), *(Output({"mine": loss}) for loss in (0.3, vector, torch.tensor(1)))):
    said(lambda: _checked(output))
distributed.stop()
"""


def test_a_method_may_log_any_number_and_is_told_what_is_none(run_ranks):
    first, second = ([json.loads(line) for line in text.splitlines()] for text in run_ranks(ODD))
    expected = {"int": 1.5, "bool": 1.0, "tensor of bool": 0.5, "float": 0.1, "NaN": math.nan}
    assert first[0] == pytest.approx(expected | {"a/b c=é": 5.0}, rel=1e-12, nan_ok=True)
    assert second[0] == pytest.approx(expected, rel=1e-12, nan_ok=True)
    assert first[1:] == second[1:]
    parts = iter(first[1:])
    for what in ("None", "a str", "a Tensor of shape [3]", "a Tensor of shape []", "a list"):
        assert next(parts).startswith(f"what a method logs as 'mine' is {what}: expected a real number")
    for name in ("3", "''", "'step'", "'loss'"):
        assert next(parts).startswith(f"a method logs a number as {name}: expected text, but none of step,")
    for what in ("a Tensor", "no loss"):
        assert next(parts).startswith(f"the forward of a method gives {what}: expected foveola.Output")
    for what in ("a float", "a Tensor of torch.float32 [3]", "a Tensor of torch.int64 []"):
        assert next(parts).startswith(f"the loss 'mine' of a method is {what}: expected a tensor of floats")
    assert next(parts, None) is None
