"""CAE's attentive probe, which Selective Aggregation compares with: one query that reads all tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.init import trunc_normal_
from torch.utils.checkpoint import checkpoint

from foveola.evaluation.classification.linear import BatchNorm, norm_tensors
from foveola.evaluation.classification.training import Sgd, add_gradients

CAE_SCORES_AT_ONCE = 2**26  # attention scores, or what was read, of all probes in memory at a time: 256 MiB
NORM_EPS = 1e-6  # of the LayerNorms


class CaeGrid:
    """G probes that differ in their learning rate (CAE; "AP" of Selective Aggregation).

    A probe: LayerNorms of their own on the query and on the tokens as keys and as values; maps d -> d of all
    three, with bias on queries and values; softmax of q_h . k / sqrt(size of a head) over all tokens, the
    class token included; the weighted values side by side through an output map with bias; BatchNorm without
    parameters; a linear classifier. No residual, no MLP. The query starts at zero, so that the first step
    reads all tokens alike. 4 d^2 + 10 d parameters before the classifier, whatever the number of heads.

    Computed folded behind the LayerNorms, whose affine part is linear: all probes share the normalised tokens
    z, key and query meet as (g * W_k^h^T q_h) . z, and the values' maps come after the average of z. What
    would add the same to all scores of a head (the bias of the keys' norm) changes nothing, gets no gradient
    and stays 0.
    """

    kind = "cae"

    def __init__(
        self,
        rates: Float[Tensor, "G"],
        width: int,
        classes: int,
        *,
        heads: int,
        norm_batch: int = 2048,
        group: str = "cae",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        generator, count = torch.Generator().manual_seed(seed), len(rates)
        device = torch.device(device)

        def drawn(rows: int, spread: float) -> Tensor:
            first = trunc_normal_(torch.empty(rows, width), std=spread, generator=generator)
            return first.to(device).repeat(count, 1, 1)

        def filled(value: float, size: int = width) -> Tensor:
            return torch.full((count, size), value, device=device)

        self.heads, self.group, self.norm_batch = heads, group, norm_batch
        self.trained = {
            "query": filled(0.0),
            "query_norm": filled(1.0),
            "query_shift": filled(0.0),
            "key_norm": filled(1.0),
            "value_norm": filled(1.0),
            "value_shift": filled(0.0),
            **{name: drawn(width, 0.02) for name in ("query_map", "key_map", "value_map", "out_map")},
            **{name: filled(0.0) for name in ("query_bias", "value_bias", "out_bias")},
            "head": drawn(classes, 0.01),
            "bias": filled(0.0, classes),
        }
        self.key_shift = filled(0.0)
        self.norm = BatchNorm(count, width, device, eps=1e-5)  # CAE's, of torch
        self.optimizer = Sgd(list(self.trained.values()), rates.to(device))
        self.settings: list[dict[str, Any]] = [{"lr": lr, "heads": heads} for lr in rates.tolist()]
        everything = [*self.trained.values(), self.key_shift]
        self.parameters_each = sum(p[0].numel() for p in everything)
        self.shape: dict[str, Any] = {"heads": heads}

    def step(self, x: Mapping[str, Tensor], y: Int64[Tensor, "b"], factor: float) -> None:
        """Take one step on each probe's mean cross-entropy, in parts of `norm_batch` images."""
        total = [torch.zeros_like(p) for p in self.trained.values()]
        parts = zip(tokens_of(x).split(self.norm_batch), y.split(self.norm_batch), strict=True)
        with torch.enable_grad():
            for tokens, labels in parts:
                leaves = [p.detach().requires_grad_() for p in self.trained.values()]
                # What heads read of all images at once would be large: it is computed again for gradients.
                read = [
                    checkpoint(self._read, block, leaves, use_reentrant=False)
                    for block in self._split(tokens)
                ]
                logits = self._classify(self.norm.train(torch.cat(read, dim=1)), leaves)
                add_gradients(total, logits, labels, len(y), leaves)
        self.optimizer.step(total, factor)

    @torch.no_grad()
    def logits(self, x: Mapping[str, Tensor]) -> Float[Tensor, "G b C"]:
        """Return the scores of each probe, as at test time."""
        leaves = list(self.trained.values())
        read = torch.cat([self._read(block, leaves) for block in self._split(tokens_of(x))], dim=1)
        return self._classify(self.norm.test(read), leaves)

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and biases, and the statistics of BatchNorm."""
        return self.trained | norm_tensors(self.norm)

    def weights(self, x: Mapping[str, Tensor]) -> Float[Tensor, "G h b T"]:
        """Return how much each head reads of each token (the class token first); rows sum to one."""
        scores = self._attend(normalised(tokens_of(x)), dict(self.trained))
        return scores.transpose(0, 1).unflatten(0, (-1, self.heads))

    def _split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        probes, width = self.trained["query"].shape
        return tokens.split(max(1, CAE_SCORES_AT_ONCE // (probes * self.heads * max(tokens.shape[1], width))))

    def _attend(self, z: Float[Tensor, "b T D"], p: Mapping[str, Tensor]) -> Float[Tensor, "b Gh T"]:
        g, width = p["query"].shape
        size = width // self.heads
        query = normalised(p["query"]) * p["query_norm"] + p["query_shift"]
        query = torch.einsum("gcd,gd->gc", p["query_map"], query) + p["query_bias"]
        maps = p["key_map"].view(g, self.heads, size, width)
        folded = torch.einsum("ghc,ghcd->ghd", query.view(g, self.heads, size), maps)
        folded = (folded * p["key_norm"][:, None]).flatten(0, 1) / size**0.5
        return (folded @ z.transpose(1, 2)).softmax(dim=2)

    def _read(self, tokens: Float[Tensor, "b T D"], leaves: Sequence[Tensor]) -> Float[Tensor, "G b D"]:
        """What comes out of the output map."""
        p = dict(zip(self.trained, leaves, strict=True))
        g, width = p["query"].shape
        z = normalised(tokens)
        read = (self._attend(z, p) @ z).transpose(0, 1).unflatten(0, (g, self.heads))  # [g, h, b, D]
        read = read * p["value_norm"][:, None, None] + p["value_shift"][:, None, None]
        maps = p["value_map"].view(g, self.heads, width // self.heads, width)
        heads = read @ maps.transpose(2, 3)  # [g, h, b, size]
        joined = heads.transpose(1, 2).flatten(2) + p["value_bias"][:, None]
        return torch.baddbmm(p["out_bias"][:, None], joined, p["out_map"].transpose(1, 2))

    def _classify(self, read: Float[Tensor, "G b D"], leaves: Sequence[Tensor]) -> Float[Tensor, "G b C"]:
        p = dict(zip(self.trained, leaves, strict=True))
        return torch.baddbmm(p["bias"][:, None], read, p["head"].transpose(1, 2))


def tokens_of(x: Mapping[str, Tensor]) -> Float[Tensor, "b T D"]:
    """Return the class token of the last block, where there is one, and the patches."""
    return torch.cat((x["token"][:, -1:], x["patches"]), dim=1) if "token" in x else x["patches"]


def normalised(x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """Return LayerNorm without its affine part."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
