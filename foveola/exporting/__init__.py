"""Encoders of ours for others: programs, ONNX, folders of timm and Hugging Face, and their card.

Nothing here trains, measures, or reads what was exported: that is `zoo.exported`.
"""
