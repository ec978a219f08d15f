"""Frozen evaluation: what an encoder knows, measured without changing it.

`protocol` lists the protocols and runs them; `result`, `stored`, `paired` and `compare` are about what was
found. The rooms below hold the protocols, by what they measure, and `features`, from which all of them read.
Nothing here trains an encoder, and nothing draws.
"""
