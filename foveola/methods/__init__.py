"""Ways of pretraining, by name."""

from foveola.methods.distillation import Distillation

METHODS = {"distillation": Distillation}
