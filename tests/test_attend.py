"""`attend` as a user meets it: what comes back, and every bad input with its name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.naive_attention import naive, qkv

from regard import patterns as P
from regard.attend import attend
from regard.errors import ArgumentError, NotFiniteError
from regard.kernels.block_sparse import with_sinks

ONE = torch.ones(1, dtype=torch.bool)


def test_scale_is_one_over_the_root_of_the_width_and_keys_serve_their_group() -> None:
    q, k, v = qkv(heads=6, kv_heads=2)
    torch.testing.assert_close(attend(q, k, v), naive(q, k, v, ONE, scale=8**-0.5)[0], rtol=0, atol=1e-12)
    repeated = attend(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), scale=0.2)
    torch.testing.assert_close(attend(q, k, v, scale=0.2), repeated, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_results(dtype: torch.dtype) -> None:
    out, lse = attend(*qkv(dtype=dtype), return_lse=True)
    assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert attend(*qkv(dtype=dtype)).dtype == dtype


def test_rows_do_not_influence_one_another() -> None:
    q, k, v = qkv(n=30)
    together = attend(q, k, v, pattern=P.causal())
    k[0], v[0] = torch.nan, torch.inf
    assert torch.equal(attend(q, k, v, pattern=P.causal())[1], together[1])


def test_no_queries_or_no_keys() -> None:
    q, k, v = qkv()
    out, lse = attend(q, k[:, :, :0], v[:, :, :0], return_lse=True)
    assert (out == 0).all() and out.shape == (2, 4, 9, 12) and (lse == -torch.inf).all()
    _, lse = attend(q, k[:, :, :0], v[:, :, :0], return_lse=True, sinks=torch.arange(4.0))
    assert lse[1, 3, 8] == 3
    assert attend(q[:, :, :0], k, v, pattern=P.causal()).shape == (2, 4, 0, 12)
    assert attend(q[:0], k[:0], v[:0]).shape == (0, 4, 9, 12)


def test_views_and_expanded_inputs() -> None:
    q, k, v = qkv(kv_heads=4)
    expected = naive(q, k[:, :1].expand(-1, 4, -1, -1), v, ONE)[0]
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    for backend in ("reference", "sdpa", "flex"):
        out = attend(turned, k[:, :1].expand(-1, 4, -1, -1), v, backend=backend)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def bad(**changes: object) -> dict[str, object]:
    q, k, v = qkv()
    return {"q": q, "k": k, "v": v, **changes}


T = torch.zeros
LONG = torch.long
BAD_INPUT = {
    "heads": (bad(k=T(2, 3, 9, 8).double(), v=T(2, 3, 9, 12).double()), "q: got 4 query heads", "multiple of the 3"),
    "width": (bad(k=T(2, 2, 9, 7).double()), "k: got shape", "head width of q, 8"),
    "dims": (bad(q=T(4, 9, 8).double()), "q: got shape (4, 9, 8)", "four dimensions"),
    "list": (bad(q=[1.0]), "q: got list", "a tensor"),
    "batch": (bad(k=T(1, 2, 9, 8).double()), "k: got shape", "batch size of q, 2"),
    "values": (bad(v=T(2, 2, 8, 12).double()), "v: got shape", "heads and length of k"),
    "dtype": (bad(v=T(2, 2, 9, 12)), "v: got torch.float32", "dtype of q, torch.float64"),
    "integers": (bad(q=T(2, 4, 9, 8, dtype=LONG)), "q: got torch.int64", "floating-point"),
    "device": (bad(k=T(2, 2, 9, 8, device="meta").double()), "k: got meta", "device of q, cpu"),
    "softcap": (bad(softcap=0.0), "softcap: got 0.0", "> 0"),
    "scale": (bad(scale=float("nan")), "scale: got nan", "finite"),
    "normalizer": (bad(normalizer="sparsemax"), "normalizer: got 'sparsemax'", "softmax"),
    "sinks": (bad(sinks=T(3)), "sinks: got shape (3,)", "(4,)"),
    "padding shape": (bad(key_padding=T(2, 8) == 0), "key_padding: got shape (2, 8)", "(2, 9)"),
    "padding dtype": (bad(key_padding=T(2, 9)), "key_padding: got torch.float32", "bool"),
    "q_positions shape": (bad(q_positions=T(9, dtype=LONG)), "q_positions: got shape (9,)", "(2, 9)"),
    "q_positions dtype": (bad(q_positions=T(2, 9)), "q_positions: got torch.float32", "int"),
    "q_positions below": (bad(q_positions=T(2, 9, dtype=LONG) - 1), "q_positions: got -1", "at least 0"),
    "kv_positions shape": (bad(kv_positions=T(2, 4, 9, dtype=LONG)), "kv_positions: got shape", "(2, 9) or (2, 2, 9)"),
    "kv_positions below": (bad(kv_positions=T(2, 9, dtype=LONG) - 3), "kv_positions: got -3", "at least 0"),
    "kv_lengths shape": (bad(kv_lengths=T(2, dtype=LONG)), "kv_lengths: got shape (2,)", "(2, 2)"),
    "kv_lengths above": (bad(kv_lengths=T(2, 2, dtype=LONG) + 10), "kv_lengths: got 10", "0 to 9"),
    "kv_lengths below": (bad(kv_lengths=T(2, 2, dtype=LONG) - 1), "kv_lengths: got -1", "0 to 9"),
    "pattern heads": (bad(pattern=P.per_head([P.causal()] * 3)), "pattern: got one for 3 heads", "the 4 heads"),
    "pattern rows": (bad(pattern=P.documents(T(3, 9, dtype=LONG))), "pattern: got one for 3 rows", "the 2 rows"),
    "pattern extent": (bad(pattern=P.segments([4, 4])), "pattern: got one with ids for 8", "with ids for 9"),
    "beyond the ids": (
        bad(pattern=P.segments([9]), q_positions=T(2, 9, dtype=LONG) + 9), "q_positions: got 9", "0 to 8",
    ),
    "more queries than keys": (
        bad(q=T(2, 4, 10, 8).double(), pattern=P.causal()),
        "q_positions: got None with more queries (10) than keys (9)", "(2, 10) integers",
    ),
    "lengths alone": (
        bad(pattern=P.causal(), kv_lengths=T(2, 2, dtype=LONG) + 1),
        "q_positions: got None with kv_lengths", "integers",
    ),
    "positions per head alone": (
        bad(pattern=P.causal(), kv_positions=T(2, 2, 9, dtype=LONG)),
        "q_positions: got None with positions per key head", "integers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_named(name: str) -> None:
    given, came, allowed = BAD_INPUT[name]
    with pytest.raises(ArgumentError) as caught:
        attend(**given)
    assert came in str(caught.value) and allowed in str(caught.value)


def test_missing_slots_may_hold_any_position() -> None:
    q, k, v = qkv(n=2, m=5)
    positions = torch.tensor([[3, 4, -1, -1, -1], [0, 1, 2, 3, -1]])
    lengths = torch.tensor([[2, 2], [4, 4]])
    out = attend(
        q,
        k,
        v,
        pattern=P.causal(),
        q_positions=torch.tensor([[3, 4], [2, 3]]),
        kv_positions=positions,
        kv_lengths=lengths,
    )
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(("value", "word"), [(torch.nan, "NaN"), (torch.inf, "infinity")])
def test_validate_names_what_is_not_finite(name: str, value: float, word: str) -> None:
    given = bad()
    given[name][1, 0, 3, 2] = value
    with pytest.raises(NotFiniteError, match=rf"{name}: got {word} at .*\(1, 0, 3\)"):
        attend(**given, validate=True)
    if name != "q":
        attend(**given, validate=True, kv_lengths=torch.full((2, 2), 3))


def test_lengths_beside_a_pattern_that_knows_an_end() -> None:
    """Positions shared by all rows, slots that exist in some of them: each row is answered for itself."""
    q, k, v = (torch.randn(2, 2, 4, 8) for _ in range(3))
    ids, lengths = torch.zeros(4, dtype=torch.long), torch.tensor([[3, 3], [2, 2]])
    out = attend(q, k, v, pattern=P.documents(ids), kv_lengths=lengths, q_positions=torch.arange(4).expand(2, 4))
    for row, length in enumerate((3, 2)):
        alone = attend(q[row : row + 1], k[row : row + 1, :, :length], v[row : row + 1, :, :length])
        assert torch.allclose(out[row : row + 1], alone, atol=1e-6)


def test_what_is_no_pattern_is_named() -> None:
    q = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ArgumentError, match=r"pattern: got 'causal'"):
        attend(q, q, q, pattern="causal")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"pattern: got <class"):
        attend(q, q, q, pattern=type(P.causal()))  # type: ignore[arg-type]


def test_a_sink_of_nothing_beside_a_query_that_sees_nothing() -> None:
    out, lse = torch.zeros(1, 2, 1, 4, requires_grad=True), torch.tensor([[[1.0], [-torch.inf]]], requires_grad=True)
    both, total = with_sinks(out, lse, torch.tensor([-torch.inf, -torch.inf]))
    assert bool(both.eq(0).all()) and total.flatten().tolist() == [1.0, -torch.inf]
    assert all(x.isfinite().all() for x in torch.autograd.grad(both.sum() + total[0, 0, 0], (out, lse)))


def test_numbers_of_numpy_are_numbers() -> None:
    q, k, v = qkv(n=4, m=4)
    torch.testing.assert_close(attend(q, k, v, scale=np.float32(0.25)), attend(q, k, v, scale=0.25))
    assert P.causal().for_head(np.int64(1)) == P.causal()
