"""Losses and views are whole graphs to torch's compiler: nothing in them makes it fall back to Python."""

import json

WHOLE = """
import json
import torch
from foveola.clustering import cluster
from foveola.geometry import sample
from foveola.losses import cosine_distance, gram_loss, koleo_loss, sinkhorn
from foveola.views.objects import object_patches

torch.manual_seed(0)
flips = torch.tensor([[True, False]] * 2)
boxes = torch.tensor([[[0.1, 0.1, 0.6, 0.7], [0.0, 0.0, 1.0, 1.0]]] * 2)
blur, extents, wanted = torch.ones(2, 2), torch.tensor([[30, 32]] * 2), torch.randint(0, 6, (2, 4))
temperatures = {"temperature": 0.06, "student_temperature": 0.12}
cases = {
    "sinkhorn": (lambda x: sinkhorn(x, 0.1), torch.randn(16, 64)),
    "koleo": (koleo_loss, torch.randn(8, 4)),
    "gram": (lambda x: gram_loss(x, x.flip(1)), torch.randn(2, 8, 4)),
    "cosine": (lambda x: cosine_distance(x, x.flip(0)), torch.randn(8, 4)),
    "cluster": (lambda x: cluster(torch.nn.functional.normalize(x, dim=-1), torch.eye(8), None, wanted,
                                  **temperatures).targets, torch.randn(6, 4, 8)),
    "sample": (lambda x: sample(x, boxes, flips, 16, "bicubic", blur, extents), torch.rand(2, 3, 32, 32)),
    "objects": (lambda x: object_patches(x, boxes, flips, (4, 4), 1 / 256), torch.rand(2, 1, 8, 8)),
}
found = {}
for name, (work, x) in cases.items():
    whole = torch.compile(work, backend="eager", fullgraph=True, dynamic=False)(x)
    found[name] = float((whole.float() - work(x).float()).abs().max())
print(json.dumps(found))
"""


def test_losses_and_views_are_whole_graphs(run_ranks):
    """In a process without the checks of shapes, which the compiler cannot read."""
    (found,) = map(json.loads, run_ranks(WHOLE, ranks=1, timeout=280))
    assert len(found) == 7
    assert max(found.values()) < 1e-6
