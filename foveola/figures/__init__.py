"""`foveola visualize`: what encoders make of images, computed here and drawn by `drawing`.

Nothing here judges or measures: numbers are for `evaluation`, a verdict about a run is for `reports`.
"""
