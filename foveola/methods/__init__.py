"""Ways of pretraining, by name."""

from foveola.methods.capi import Capi
from foveola.methods.distillation import Distillation

METHODS = {"distillation": Distillation, "capi": Capi}
