"""A run from its recipe to its encoder: assemble, train, log, checkpoint, resume, stop.

This is the only room that calls backward, an optimizer or torch.distributed (through `distributed`). Losses are
for `methods`.
"""
