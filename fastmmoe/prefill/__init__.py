"""What happens inside a forward, in the order in which it happens.

`installation.py`: which modules run ours (`patch.py`), under which `plan.py`, for whom (`block.py`). `entry.py`: where
a call comes in; `text.py`: what the forward is, from `masks.py` (which tokens are valid), `packing.py` (rows of several
samples; `unmasked.py`: where a captured batch needs no mask) and `cache.py` (what an earlier one left).
`sequence.py`: the tokens as each stretch of layers sees them. Then, in every layer: `layer.py`, `attention.py` (one row
of it is read at a prune layer), `stage.py` (tokens go), `routing.py` and `experts.py` (fewer experts).
"""
