"""Networks: the ViT with object tokens, its attention, positions, heads, predictors, and what users keep.

Nothing here knows a loss, a checkpoint of somebody else (that is for `zoo`) or how views were cut.
"""
