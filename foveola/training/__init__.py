"""A run from its recipe to its encoder: assemble, train, log, checkpoint, resume, stop.

This is the only room that calls backward or an optimizer, and with `distributed` the only one that knows
torch.distributed. Losses are for `methods`.
"""
