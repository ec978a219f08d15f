"""One protocol of an evaluation: with which settings, what it measures, and what it reads of that."""

from dataclasses import dataclass, field
from typing import Any

from foveola.data.sources import Source
from foveola.evaluation.protocol import Needs, Protocol, Reading


@dataclass(frozen=True, eq=False)
class Job:
    """One protocol of an evaluation, with what it measures and what it reads of that."""

    protocol: Protocol
    config: Any
    train: Any  # a Source, or None
    test: Any
    needs: Needs
    notes: tuple[str, ...] = ()
    plain: tuple[Any, Any] | None = None  # train and test as they were before objects were found in them
    masks: dict[str, Any] = field(default_factory=dict)  # who found them, and in how many images

    @property
    def learns(self) -> bool:
        """Whether it learns from the training data, so that test data must be others."""
        train = self.protocol.train_for(self.config)
        optional = train == "optional" and len(getattr(self.train, "classes", None) or ()) > 1
        return train == "needed" or (optional and bool(self.needs.train))

    def readings(self) -> list[tuple[Source, Reading, int]]:
        """Return what is read from the shared pass: sources, features, and random crops beside."""
        train = self.needs.train if self.learns else ()
        read = [(self.train, reading, reading.views) for reading in train]
        return read + [(self.test, reading, 0) for reading in self.needs.test]
