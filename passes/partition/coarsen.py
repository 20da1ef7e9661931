"""Fewer positions to cut at, for chains too long to split exactly in the time there is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from optc.passes.partition.chain import Chain

LIMIT = 2000


def coarsen(chain: Chain, limit: int = LIMIT) -> Chain:
    """Leave at most ``limit`` legal cuts: of neighbours with the same share of the work, the one that sends least.

    The slowest stage is then within two such shares (``2 / limit`` of the total time) of where it was, and the cuts
    themselves are no more expensive.
    """
    candidates = chain.positions()[1:-1]
    if len(candidates) <= limit:
        return chain
    total = np.concatenate([[0.0], np.cumsum(chain.seconds)])
    bucket = np.minimum((total[candidates] / total[-1] * limit).astype(np.int64), limit - 1)
    traffic = chain.sent[candidates] + chain.returned[candidates]
    order = np.lexsort((traffic, bucket))
    _, first = np.unique(bucket[order], return_index=True)
    legal = np.zeros_like(chain.legal)
    legal[candidates[order[first]]] = True
    return replace(chain, legal=legal)
