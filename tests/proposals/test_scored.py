"""Weights of patches from a probe that an evaluation has kept, against the probe itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from foveola.config import UserError
from foveola.evaluation.classification.abmilp import AbmilpGrid
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.vit import ViTConfig
from foveola.proposals.cuts import brightest, centred
from foveola.proposals.discover import DiscoverConfig, discoverer
from foveola.proposals.scored import probe_maps


def vit() -> Encoder:
    torch.manual_seed(0)
    shape = ViTConfig(width=24, depth=2, heads=2, patch_size=8, image_size=32)
    return Encoder(EncoderConfig(shape, TransformConfig(resize=32, crop=32)))


def kept(path: Path, encoder: Encoder, **shape: object) -> AbmilpGrid:
    """A probe in a file, as `SavedProbe.save` writes it."""
    grid = AbmilpGrid(torch.ones(1), 24, 5, group="own", **shape)  # type: ignore[arg-type]
    for tensor in grid.trained:
        tensor.mul_(5)
    about = {
        "format": 1,
        "protocol": "abmilp",
        "encoder": encoder.fingerprint(),
        "groups": {"own": {"kind": grid.kind, "shape": grid.shape, "settings": {}}},
    }
    tensors = {f"own.{name}": tensor[0].contiguous() for name, tensor in grid.tensors().items()}
    save_file(tensors, path, {"foveola_probe": json.dumps(about)})
    return grid


@pytest.mark.parametrize("shape", [{}, {"heads": 3}, {"depth": 3, "activation": "gelu"}], ids=str)
def test_weights_are_the_probes(shape, tmp_path):
    encoder, path = vit(), tmp_path / "probe.safetensors"
    grid = kept(path, encoder, **shape)
    patches = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(probe_maps(str(path), encoder)(patches), grid.weights(patches)[0])


def test_objects_are_where_the_weights_are(tmp_path):
    encoder, path = vit(), tmp_path / "probe.safetensors"
    grid = kept(path, encoder)
    image = torch.randint(0, 256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    patches = encoder(encoder.normalise(image.permute(2, 0, 1)[None])).patches
    expected = brightest(grid.weights(patches)[0], centred(patches), (8, 8)).masks[0, 0].view(8, 8)
    settings = {"method": "abmilp", "probe": str(path), "image_size": 64}
    proposer = discoverer(encoder, DiscoverConfig(**settings))
    (found,) = proposer.propose([image.numpy()])
    assert found.masks is not None
    assert (torch.from_numpy(found.masks[0])[4::8, 4::8] == expected).all()
    before = proposer.describe()
    kept(path, encoder, heads=2)
    assert discoverer(encoder, DiscoverConfig(**settings)).describe() != before


def test_what_is_no_probe_of_this_encoder_is_refused(tmp_path):
    encoder, path = vit(), tmp_path / "probe.safetensors"

    def refused(message: str, model: Encoder = encoder, **changes: object) -> None:
        config = DiscoverConfig(**({"method": "abmilp", "probe": str(path)} | changes))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=message):
            discoverer(model, config)

    refused("needs probe=", probe=None)
    refused("there is no such file; .foveola evaluate abmilp")
    path.write_bytes(b"nothing")
    refused("cannot be read")
    save_file({"x": torch.zeros(1)}, path)
    refused("is no trained probe")
    kept(path, encoder, attention=True)
    refused("attention=false")
    kept(path, encoder)
    refused("leave out features= and block=", features="keys")
    refused("leave out features= and block=", block=0)
    other = vit()
    other.backbone.norm.weight.data.add_(1)
    refused("was trained on another encoder", other)
    about = {"encoder": encoder.fingerprint(), "groups": {}}
    save_file(load_file(path), path, {"foveola_probe": json.dumps(about)})
    refused("has no AbMILP probe")
