"""How a chunked form walks over the tokens."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CACHED = (
    1 << 19
)  # elements of the largest intermediate, on a CPU: 2 MiB in float32, about one core's second-level cache


def spans(q: Tensor, v: Tensor, chunk_size: int) -> Iterator[tuple[slice, int]]:
    """(span of tokens, size of the chunks in it), in order; every span is whole chunks of its size.

    What does not fill a chunk is one more chunk, of its own size. On a CPU a span holds as many chunks as stay in the
    cache together, which keeps the time linear in N; elsewhere all whole chunks are one span, to fill the device."""
    batch, heads, n, dim = q.shape
    whole = n - n % chunk_size
    span = whole
    if q.device.type == "cpu":
        per_chunk = batch * heads * chunk_size * max(chunk_size, dim + v.shape[3])
        span = chunk_size * max(CACHED // max(per_chunk, 1), 1)
    for start in range(0, whole, max(span, 1)):
        yield slice(start, min(start + span, whole)), chunk_size
    if whole < n:
        yield slice(whole, n), n - whole
