"""Pictures and their objects: what a sample is, where samples come from, how batches are made."""
