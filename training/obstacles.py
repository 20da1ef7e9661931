"""Why a model can be cut in few places only, in words for whoever wrote it."""

from __future__ import annotations

import numpy as np

from optc.training.capture import source_line
from optc.training.linearize import Layout, gradients_crossing, writing_spans

_LARGE = 0.5  # of all places to cut


def obstacles(layout: Layout) -> list[str]:
    """What keeps at least half of all places from being cut; a sentence each, with the lines of the source."""
    places, found = len(layout.units) - 1, []
    for low, high in writing_spans(layout):
        if high - low + 1 >= _LARGE * places:
            first, last = source_line(layout.units[max(low - 1, 0)]), source_line(layout.units[high])
            found.append(
                f"memory is filled bit by bit from {first} to {last}, and cannot be cut in between "
                f"({high - low + 1} of {places} places): collect the parts in a list and torch.stack them"
            )
    trained = np.flatnonzero(gradients_crossing(layout)[1:-1])
    untrained = int(trained[0]) if len(trained) else places
    if untrained and untrained >= _LARGE * places:
        found.append(
            f"nothing is trained before {source_line(layout.units[untrained])} "
            f"({untrained} of {places} places): stages there would have nothing to learn"
        )
    return found
