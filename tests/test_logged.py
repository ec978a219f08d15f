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
