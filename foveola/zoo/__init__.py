"""Models of others, and ours for others: `foveola.load`, files of public weights, timm, Hugging Face, export.

Nothing here trains or measures.
"""
