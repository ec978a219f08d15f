"""Ways of pretraining, by name: each a module that turns a batch into named losses.

Nothing here calls backward, opens a file or knows another process.
"""

from foveola.methods.capi import Capi
from foveola.methods.distillation import Distillation
from foveola.methods.ijepa import IJepa
from foveola.methods.mae import Mae

METHODS = {"distillation": Distillation, "capi": Capi, "mae": Mae, "ijepa": IJepa}
