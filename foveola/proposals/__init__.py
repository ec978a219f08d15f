"""Objects for images that have none: found by features, by detectors or by segmenters of others.

A `Proposer` looks at images and returns `Proposals`; what it found is filtered and written to one file, which
every data string reads as `annotations=`. Nothing here trains, measures an encoder or draws charts: what
found objects are worth is for `evaluation`.
"""
