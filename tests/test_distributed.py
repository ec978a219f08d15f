import json

import pytest
import torch

from foveola import distributed
from foveola.config import UserError

RANKS = """
import json, torch
from foveola import distributed as d
assert d.start("cpu") == torch.device("cpu")
r = d.rank()
x = torch.tensor([[1.0, -2.0], [3.0, 4.0]]).T * (r + 1)          # not contiguous
x.requires_grad_()
before = x.detach().clone()
total, high, mean = d.all_reduce_sum(x), d.all_reduce_max(x), d.all_reduce_mean(x)
assert torch.equal(x, before) and not total.requires_grad
rows = d.gather_rows(torch.arange(3 * r * 2).reshape(3 * r, 2) + 10 * r)   # 0 rows, then 3, ...
flags = d.gather_rows(torch.tensor([True, False][: r + 1]))
d.barrier()
word = d.broadcast_object({"from": r})
print(json.dumps([r, d.world_size(), d.is_main(), total.tolist(), high.tolist(), mean.tolist(), rows.tolist(),
                  flags.tolist(), word]))
d.stop()
assert d.world_size() == 1
"""


def test_two_processes_agree_with_arithmetic(run_ranks):
    first, second = map(json.loads, run_ranks(RANKS))
    assert first[:3] == [0, 2, True]
    assert second[:3] == [1, 2, False]
    assert first[3:] == second[3:]
    total, high, mean, rows, flags, word = first[3:]
    assert total == [[3.0, 9.0], [-6.0, 12.0]]
    assert high == [[2.0, 6.0], [-2.0, 8.0]]
    assert mean == [[1.5, 4.5], [-3.0, 6.0]]
    assert rows == [[10, 11], [12, 13], [14, 15]]
    assert flags == [True, True, False]
    assert word == {"from": 0}


def test_one_process_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    for function in (
        distributed.all_reduce_sum,
        distributed.all_reduce_max,
        distributed.all_reduce_mean,
        distributed.gather_rows,
    ):
        assert torch.equal(function(x), x)
        assert not function(x).requires_grad
    distributed.barrier()
    assert distributed.broadcast_object("x") == "x"
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.start("cpu") == torch.device("cpu")
    distributed.stop()


def test_impossible_devices_are_named(monkeypatch):
    with pytest.raises(UserError, match="no such device: 'gpu'"):
        distributed.start("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="no GPU with index 0"):
        distributed.start("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK, MASTER_ADDR, MASTER_PORT not set; start with torchrun"):
        distributed.start("cpu")


FAILING = """
from foveola import distributed as d
from foveola.config import UserError
d.start("cpu")
def work():
    open("/nowhere/at/all", "w")
try:
    d.on_main(work)
except UserError as error:
    print(error)
d.stop()
"""


def test_a_full_disk_of_the_first_process_is_an_error_of_all(run_ranks):
    first, second = run_ranks(FAILING)
    assert first == second == "/nowhere/at/all: No such file or directory\n"


@pytest.mark.parametrize("device", ["mps", "xpu:1", "meta"])
def test_devices_that_foveola_does_not_compute_on_are_one_line(device):
    with pytest.raises(UserError, match=f"device='{device}' is not supported: .* write device=cpu"):
        distributed.find_device(device)


def test_on_gpus_what_is_on_a_cpu_is_summed_there(monkeypatch):
    """Else a process would wait for its GPU at each step, to agree with the others on going on."""
    asked: list[str] = []
    where = {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: asked.append(backend))
    assert distributed.start("cuda") == torch.device("cuda:0")
    devices = dict(part.split(":") for part in asked[0].split(","))
    assert devices == {"cpu": "gloo", "cuda": "nccl"}
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: asked[0])
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    summed: list[torch.device] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, _: summed.append(tensor.device))
    assert distributed.all_reduce_sum(torch.ones(2)).device.type == "cpu"
    assert [device.type for device in summed] == ["cpu"]
