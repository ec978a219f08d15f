"""Pixels and tags: overlays, sheets of tiles, charts, pieces of a web page.

Nothing here knows an encoder, a run or a result: that is for `figures` and `reports`.
"""
