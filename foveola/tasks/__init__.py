"""Downstream tasks: methods whose targets are annotations, with the heads that answer for them.

They train on the same loop, loader, views, checkpoints and logs as pretraining. Nothing here measures a
trained head: that is for `evaluation`, and so are frozen probes, which are trained on stored features.
"""
