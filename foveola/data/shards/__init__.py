"""Images in shards: tar files in the layout of WebDataset, and parquet files, here or behind a URL.

Nothing is unpacked to the disk. What lies where is found out once for each file and kept as arrays (index),
so that an image is read at random by its file, position and length: order, limits and resuming are those of
folders.
"""
