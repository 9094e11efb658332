"""DeltaNet and Gated DeltaNet: what they erase, how strongly, and the one as the other without decay."""

from __future__ import annotations

import torch

from regard.layers.deltanet import DeltaNet, unit
from regard.layers.gated_deltanet import GatedDeltaNet
from regard.recurrence import DeltaInputs, DeltaRule


def test_orthonormal_keys_at_full_strength_are_stored_and_overwritten_exactly() -> None:
    keys = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    order = [0, 1, 2, 0, 3, 1, 0]
    k = keys[order][None, None]
    v = torch.randn(1, 1, 7, 3, dtype=torch.float64)
    _, state = DeltaRule(chunk_size=4).scan(DeltaInputs(k, k, v, torch.ones(1, 1, 7, dtype=torch.float64)))
    last = {key: t for t, key in enumerate(order)}
    for key, t in last.items():
        torch.testing.assert_close(state.s[0, 0].mT @ keys[key], v[0, 0, t], rtol=0, atol=1e-12)


def test_a_step_never_lengthens_the_state_and_the_option_doubles_its_strength() -> None:
    torch.manual_seed(0)
    plain, negative = DeltaNet(8, 2), DeltaNet(8, 2, negative_eigenvalues=True)
    negative.load_state_dict(plain.state_dict())
    x = 3 * torch.randn(2, 12, 8)
    beta = negative.read(x, None, None).inputs.beta
    torch.testing.assert_close(beta, 2 * plain.read(x, None, None).inputs.beta)
    k = negative.read(x, None, None).inputs.k
    assert beta.max() > 1 and (k.norm(dim=-1) <= 1).all()
    erase = torch.eye(4) - beta[..., None, None] * k[..., None] * k[..., None, :]
    assert torch.linalg.matrix_norm(erase, 2).max() <= 1 + 1e-6
    assert (torch.linalg.eigvalsh(erase) < 0).any()


def test_gated_deltanet_without_decay_is_deltanet() -> None:
    gated = GatedDeltaNet(8, 2, key_dim=4, value_dim=3, chunk_size=4).double()
    plain = DeltaNet(8, 2, key_dim=4, value_dim=3, chunk_size=4).double()
    left = plain.load_state_dict({k: v for k, v in gated.state_dict().items() if k in plain.state_dict()})
    assert not left.missing_keys
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    decayed, _ = gated.mixer.scan(gated.read(x, None, None).inputs)
    gated.decay.a_log.data.fill_(-torch.inf)  # A = 0
    out, _ = gated.mixer.scan(gated.read(x, None, None).inputs)
    want, _ = plain.mixer.scan(plain.read(x, None, None).inputs)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    assert (decayed - want).abs().max() > 1e-3


def test_the_paper_s_sizes_and_states() -> None:
    for dim, heads in ((1024, 3), (2048, 6)):
        with torch.device("meta"):
            layer = GatedDeltaNet(dim, heads)
        # 3/4 of the width is what all keys have together, where the heads divide it.
        assert (layer.key_dim, layer.value_dim) == (256, 512)
    x = torch.randn(1, 3, 16)
    state = GatedDeltaNet(16, 2)(x).state
    assert state.inner.s.numel() == 3 * 16 * 6 // 2 and state.windows[0].shape == (1, 3, 2 * (6 + 6 + 12))
    assert DeltaNet(16, 2)(x).state.inner.s.numel() == 16**2 // 2


def test_the_decay_begins_as_the_paper_has_it() -> None:
    torch.manual_seed(0)
    gate = GatedDeltaNet(64, 512, key_dim=1).decay
    rate, dt = gate.a_log.exp(), torch.nn.functional.softplus(gate.dt_bias)
    assert 0 < rate.min() < 1 and 15 < rate.max() < 16
    assert 0.999e-3 < dt.min() < 2e-3 and 0.08 < dt.max() < 0.1001


def test_a_vector_of_zeros_has_no_direction_and_a_finite_gradient() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    unit(x).sum().backward()
    assert (unit(x) == 0).all() and x.grad is not None and x.grad.isfinite().all()
