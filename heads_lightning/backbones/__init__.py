"""Tokens to hidden states: `backbone(batch)` gives [B, S, D]. One file for each option of `backbone=`; what they share:

    base.py     the contract: who sees whom (Attention), caches, what is sharded, recomputed and kept exact
    layers.py   norms, rotary positions, attention and feed-forward parts          masks.py    segments, prefixes, windows
    ssm.py      state-space models of BiGS in real arithmetic                      fourier.py  their convolution; gelu.py its gates
    t5_attention.py   relative positions of T5

A backbone knows neither objective nor head. It sees only its own segment of a packed row, and positions of padding are nobody's.
"""
