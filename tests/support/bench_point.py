"""What the tests of the benchmark measure: little, on some CPU devices."""

from jax_ep.bench.traffic import Point

RANKS = 4
POINT = Point(
    tokens=6,
    hidden=64,
    top_k=3,
    routing="zipf",
    capacity="tight",
    dtype="bfloat16",
    fp8="none",
    num_sms=None,
)
