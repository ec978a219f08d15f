"""Images and their objects: what a sample is, where samples come from, how batches are made.

Nothing here crops or augments: that is for `views`. Nothing here knows a network.
"""
