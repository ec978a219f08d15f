"""`foveola masks`: its help, its mistakes, and that it does what `foveola.propose` does."""

import json
from pathlib import Path

import pytest
import torch

import foveola
from foveola import cli
from foveola.command_keys import MASKS
from foveola.config import describe
from foveola.models.encoder import Encoder, EncoderConfig, TransformConfig
from foveola.models.shape import ViTConfig
from foveola.proposals.run import DOOR, ProposeConfig, config_of_kind, find_kind

DATA = "scenes:?size=32&count=6"


def test_help_lists_every_kind_and_every_key(capsys):
    assert cli.main(["masks", "--help"]) == 0
    kinds = capsys.readouterr().out
    assert all(f"  {name}" in kinds for name in DOOR.names())
    for name in DOOR.names():
        config = config_of_kind(find_kind(name))()
        assert cli.main(["masks", name, "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        keys = [info.path for info in [*MASKS, *describe(config), *describe(ProposeConfig())]]
        assert [line.split()[0] for line in lines[4:]] == keys
        assert len(set(keys)) == len(keys)  # none is of the kind and of the run
    assert cli.main(["--help"]) == 0
    assert "masks KIND data=... model=... out=..." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "which kind (discover, detect, segment, check)? usage: foveola masks KIND"),
        ("discovr", "unknown kind of proposals 'discovr'; did you mean 'discover'?"),
        ("discover data=x out=y", "masks discover needs model=; usage: foveola masks KIND"),
        ("discover data=x model=y", "masks discover needs out="),
        ("discover model=y out=z", "masks discover needs data="),
        ("discover data=x model=y out=z min_scor=1", "unknown key 'min_scor'; did you mean 'min_score'?"),
        ("discover data=x model=y out=z batch=1", "unknown key 'batch'; "),
        ("discover data=x model=y out=z max_objects=0", "max_objects: must be >= 1, got 0"),
        ("discover data=x model=y out=z prefer=area", "prefer has no effect: without max_objects all"),
        ("discover data=x model=y out=z method=lost tau=0.1", "tau has no effect: it is for method="),
        ("discover data=folder:/nowhere model=y out=z", "folder: no folder /nowhere"),
        ("discover extra data=x model=y out=z", "expected key=value, got 'extra'"),
    ],
)
def test_mistakes(capsys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["masks", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_python_writes_and_data_strings_read_it(capsys, tmp_path: Path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = ViTConfig(width=16, depth=1, heads=2, patch_size=4, image_size=32)
        encoder = Encoder(EncoderConfig(shape, TransformConfig(32, 32)))
    model = str(tmp_path / "encoder")
    encoder.save(model)
    words = [f"data={DATA}", f"model={model}", f"out={tmp_path / 'a'}", "device=cpu", "max_objects=1"]
    assert cli.main(["masks", "discover", *words]) == 0
    printed = capsys.readouterr().out
    found = foveola.propose(
        "discover", DATA, model, out=tmp_path / "b", device="cpu", progress=False, max_objects=1
    )
    assert (tmp_path / "a" / "objects.json").read_bytes() == found.file.read_bytes()
    assert printed.strip() == found.table().replace(str(tmp_path / "b"), str(tmp_path / "a"))
    tree = json.loads(found.file.read_text())
    source = foveola.open_source(f"{DATA}&annotations={found.file}")
    counts = [0 if source[k].objects is None else len(source[k].objects) for k in range(len(source))]
    assert counts == found.summary.counts
    assert sum(counts) == len(tree["annotations"]) > 0
    assert max(counts) == 1
