"""Who runs what, and what is said when nobody or somebody else does."""

from __future__ import annotations

import pytest
import torch
from tests.naive_attention import qkv

from regard import patterns as P
from regard.attend import attend
from regard.errors import UnknownNameError, UnsupportedError
from regard.kernels import dispatch as d


def test_auto_says_who_ran_and_why_the_others_did_not() -> None:
    q, k, v = qkv()
    out, why = attend(q, k, v, pattern=P.causal(), explain=True)
    assert why.executor == "sdpa" and not why.refused and out.shape == (2, 4, 9, 12)
    _, lse, why = attend(q, k, v, softcap=5.0, return_lse=True, explain=True)
    assert why.executor == "reference" and dict(why.refused) == {"sdpa": "scaled_dot_product_attention has no softcap"}
    assert lse.shape == (2, 4, 9) and "not sdpa" in str(why)
    _, why = attend(q, k, v, backend="reference", explain=True)
    assert why.reason == "asked for by name"


@pytest.mark.parametrize(
    ("backend", "given", "reason", "serves"),
    [
        ("sdpa", {"softcap": 1.0}, "no softcap", "reference, flex"),
        ("sdpa", {"sinks": torch.zeros(4)}, "no sinks", "reference, flex"),
        ("sdpa", {"return_lse": True}, "log-sum-exp", "reference, flex"),
        ("sdpa", {"score": lambda s, b, h, i, j: s}, "no score", "reference, flex"),
        ("sdpa", {"normalizer": lambda s, seen: s}, "no normalizer", "reference"),
        ("flex", {"normalizer": lambda s, seen: s}, "no normalizer", "reference"),
        ("auto", {"normalizer": lambda s, seen: s, "return_lse": True}, "no log-sum-exp", "no executor"),
        ("auto", {"normalizer": lambda s, seen: s, "sinks": torch.zeros(4)}, "bring its own", "no executor"),
    ],
)
def test_refusals_name_the_reason_and_who_would_serve(backend: str, given: dict, reason: str, serves: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        attend(*qkv(), backend=backend, **given)
    assert reason in str(caught.value) and serves in str(caught.value)


def test_flex_has_no_backward_off_the_gpu() -> None:
    q, k, v = qkv()
    q.requires_grad_()
    with pytest.raises(UnsupportedError, match="no backward off the GPU"):
        attend(q, k, v, backend="flex")
    with torch.no_grad():
        attend(q, k, v, backend="flex")


def test_unknown_backend_has_its_nearest_name() -> None:
    with pytest.raises(UnknownNameError, match="did you mean flex"):
        attend(*qkv(), backend="flx")


def test_plain_causal_and_full_need_no_mask() -> None:
    q, k, v = qkv()
    seen = []
    for given in (
        {},
        {"pattern": P.full()},
        {"pattern": P.causal()},
        {"pattern": P.causal(), "key_padding": torch.ones(2, 9, dtype=torch.bool)},
        {"pattern": P.causal(), "q_positions": torch.arange(9).expand(2, 9)},
        {"pattern": P.causal() & P.sliding_window(3)},
        {"kv_lengths": torch.full((2, 2), 3)},
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(d, "EXECUTORS", {"sdpa": _Watched(seen)})
            attend(q, k, v, backend="sdpa", **given)
    assert seen == [True, True, True, True, False, False, False]


class _Watched:
    def __init__(self, seen: list[bool]) -> None:
        self.seen = seen

    def refuses(self, request: d.Request) -> None:
        return None

    def run(self, request: d.Request) -> tuple[torch.Tensor, None]:
        self.seen.append(d.sdpa.fused(request))
        return request.q, None


def test_the_reference_on_a_gpu_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True
        shape = (1, 1, 1 << 13, 8)

    class Large:
        q = k = OnGpu()

    monkeypatch.setattr(d, "_announced", set())
    with pytest.warns(UserWarning, match=r"reference on a GPU .*flex: no float64"):
        d._announce_expensive(Large(), "reference", [("flex", "no float64")])
    d._announce_expensive(Large(), "reference", [("flex", "no float64")])  # a second warning would be an error here
    d._announce_expensive(Large(), "sdpa", [("flex", "other")])


@pytest.mark.parametrize(
    ("n", "m", "fused", "causal", "compiling", "first"),
    [
        (8192, 8192, False, True, False, "hopper"),
        (8192, 8192, False, True, True, "flex"),
        (512, 512, False, True, False, "hopper"),
        (200, 200, False, True, False, "sdpa"),  # tiny
        (1, 1 << 20, False, True, False, "sdpa"),  # decoding: each length would need its own list of tiles
        (8192, 8192, True, True, False, "sdpa"),
        (512, 8192, True, True, False, "sdpa"),
        (8192, 65536, True, True, False, "hopper"),  # torch has FlashAttention-2 alone for the last queries of more
        (8192, 65536, True, False, False, "sdpa"),  # everything visible: no such alignment
        (8192, 65536, True, True, True, "sdpa"),
        (1, 1 << 26, True, True, False, "sdpa"),
    ],
)
def test_who_is_asked_first_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, n: int, m: int, fused: bool, causal: bool, compiling: bool, first: str
) -> None:
    class OnGpu:
        is_cuda = True

        def __init__(self, length: int) -> None:
            self.shape = (1, 1, length, 64)

    class Given:
        q, k, pattern = OnGpu(n), OnGpu(m), object() if causal else None

    monkeypatch.setattr(d.sdpa, "fused", lambda request: fused)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    order = d.preference(Given())[0]
    assert order[0] == first and set(order) == set(d.EXECUTORS)
    assert not compiling or order.index("flex") < order.index("hopper")
