"""That a backend still works after an error."""

import numpy as np
import routings
from backends import BACKENDS, JaxBackend
from routings import Case, assert_same_bits


def check_usable(backend: JaxBackend) -> None:
    """All three verbs, bitwise."""
    case = Case(2, 4, 2, 6, hidden=8, capacity=8, expert_alignment=2)
    ids = routings.topk_ids(np.random.default_rng(40), case, "uniform")
    oracle_backend = BACKENDS["reference"]
    rng = np.random.default_rng(41)
    oracle, layout = oracle_backend.make_layout(case, ids), backend.make_layout(case, ids)
    assert_same_bits(layout.send_row, oracle.send_row)
    x = routings.random_rows(rng, (2, 4, 8), np.float32)
    weights = routings.random_weights(rng, case)
    tokens, received, _ = backend.dispatch(x, layout, weights)
    assert_same_bits(tokens, oracle_backend.dispatch(x, oracle).tokens)
    out = backend.combine(tokens, layout, received)
    assert_same_bits(out, oracle_backend.combine(tokens, oracle, received))
