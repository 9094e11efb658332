"""The first Lightning Attention and LRPE-d: what the cards of TransNormerLLM and TNL ask to be shown."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from regard.errors import ArgumentError
from regard.recurrence import LightningAttention2, LightningInputs, tnl_log_decay
from regard.recurrence.diagonal import recurrent
from regard.recurrence.lightning_attention import lrpe, lrpe_angles, tiled

N, H = 75, 3
DECAY = torch.tensor([math.log(0.5), 0.0, -torch.inf], dtype=torch.float64)


def make(n: int = N, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(2, H, n, d, dtype=torch.float64).to(dtype) for d in (4, 4, 5)]


def dense(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    """((Q Kᵀ) ⊙ M) V with M written out, 0⁰ = 1."""
    t = torch.arange(q.shape[2], dtype=torch.float64)
    m = (log_decay.exp()[:, None, None] ** (t[:, None] - t).clamp(min=0)).tril()
    return ((q @ k.mT) * m) @ v


@pytest.mark.parametrize("block", [4, 16, 64, 200])
def test_tiles_are_the_dense_masked_product_forward_and_backward(block: int) -> None:
    results = []
    for form in (lambda *a: tiled(*a, block=block), dense):
        leaves = [x.requires_grad_() for x in (torch.manual_seed(3), *make())[1:]]
        out = form(*leaves, DECAY)
        out.sin().sum().backward()
        results.append([out, *(x.grad for x in leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_version_one_is_version_two_is_the_recurrence() -> None:
    q, k, v = make()
    want, _ = recurrent(q, k, v, DECAY)
    torch.testing.assert_close(tiled(q, k, v, DECAY), want, rtol=0, atol=1e-10)
    two, _ = LightningAttention2(tuple(DECAY.tolist())).scan(LightningInputs(q, k, v))
    torch.testing.assert_close(two, want, rtol=0, atol=1e-10)
    single = tiled(*(x.float() for x in (q, k, v)), DECAY.float())
    torch.testing.assert_close(single.double(), want, rtol=1e-5, atol=1e-4)


def test_nothing_of_n_by_n_is_held_forward_or_backward() -> None:
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor))
            return result

    n = 256
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
    with Watch():
        tiled(q, k, v, torch.tensor([-0.1]), block=32).sum().backward()
    assert max(sizes) <= n * 8


def test_robust_inference_where_the_factored_form_overflows() -> None:
    """o_t = λ^t qᵀ Σ_s λ^{−s} k_s v_sᵀ is equal on paper, and not finite from a few hundred tokens on."""
    n = 600
    q, k, v = (torch.randn(1, 1, n, 4) for _ in range(3))
    log_decay = torch.tensor([0.5]).log()
    t = torch.arange(n)[:, None]
    summed = ((k * (-t * log_decay).exp())[..., :, None] * v[..., None, :]).cumsum(2)
    naive = ((q * (t * log_decay).exp())[..., None, :] @ summed)[..., 0, :]
    robust, _ = LightningAttention2(tuple(log_decay.tolist())).scan(LightningInputs(q, k, v))
    exact = tiled(*(x.double() for x in (q, k, v)), log_decay.double())
    torch.testing.assert_close(robust.double(), exact, rtol=0, atol=1e-4)
    torch.testing.assert_close(naive[:, :, :50], robust[:, :, :50], rtol=0, atol=1e-3)
    assert not naive.isfinite().all()


def test_slopes_of_eight_heads_and_the_last_layers_memory() -> None:
    eight = -tnl_log_decay(8, layer=0, layers=12) / (1 + 1e-5)
    assert eight.tolist() == pytest.approx([2.0**-h for h in range(1, 9)])
    assert tnl_log_decay(8, layer=11, layers=12).exp().min() >= 1 - 1e-5


def test_rotated_scores_depend_on_the_distance_only() -> None:
    q, k, v = make()
    theta = lrpe_angles(H, 4).double() * torch.rand(H, 1, 4, dtype=torch.float64)
    where = torch.arange(N)[None].expand(2, N)
    first, later = (tiled(lrpe(q, w, theta), lrpe(k, w, theta), v, DECAY) for w in (where, where + 123456))
    torch.testing.assert_close(later, first, rtol=0, atol=1e-8)
    turned = (theta * torch.arange(N)[:, None]).cos()[0, 5]  # five tokens apart, in the first head
    score = (lrpe(q, where, theta)[:, :, 9] * lrpe(k, where, theta)[:, :, 4]).sum(-1)[:, 0]
    torch.testing.assert_close(score, (q[:, 0, 9] * k[:, 0, 4] * turned).sum(-1), rtol=0, atol=1e-12)


def test_angles_go_down_over_all_channels_of_all_heads() -> None:
    theta = lrpe_angles(2, 4).flatten()
    assert theta.tolist() == pytest.approx([10000 ** (-2 * i / 8) for i in range(8)])


def test_bad_input_is_named() -> None:
    q, k, v = make(5)
    for argument, call in (
        ("q", lambda: tiled(q[0], k, v, DECAY)),
        ("k", lambda: tiled(q, k[..., :1], v, DECAY)),
        ("v", lambda: tiled(q, k, v[:, :, :1], DECAY)),
        ("log_decay", lambda: tiled(q, k, v, DECAY[:1])),
        ("block", lambda: tiled(q, k, v, DECAY, block=0)),
    ):
        with pytest.raises(ArgumentError, match=f"^{argument}: got"):
            call()
