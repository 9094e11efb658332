"""transformers' own plain PyTorch layers with our weights: Qwen3-Next's Gated DeltaNet, and Mamba-2. In float32."""

from __future__ import annotations

from inspect import unwrap

import pytest
import torch
from torch import Tensor

from regard.layers.gated_deltanet import GatedDeltaNet
from regard.layers.mamba_2 import Mamba2

why = "transformers without this model"
qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next", reason=why, exc_type=ImportError)
mamba = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason=why, exc_type=ImportError)


@pytest.fixture(autouse=True)
def in_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers calls an installed fla or mamba-ssm instead of its own functions, and those need a GPU."""
    for module in (qwen, mamba):
        for name, value in list(vars(module).items()):
            if callable(value) and hasattr(value, "__wrapped__") and ("delta_rule" in name or "mamba2" in name):
                monkeypatch.setattr(module, name, unwrap(value))


def tokens(n: int) -> Tensor:
    return torch.randn(2, n, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", [1, 37, 130])
def test_gated_deltanet(n: int) -> None:
    torch.manual_seed(0)
    ours = GatedDeltaNet(16, 2, key_dim=4, value_dim=8)
    config = qwen.Qwen3NextConfig(
        hidden_size=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=4,
        linear_value_head_dim=8,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-5,
    )
    theirs = qwen.Qwen3NextGatedDeltaNet(config, 0)
    # Theirs are projected together, head by head: q, k, v, z and b, a.
    qkvz = [p.weight.unflatten(0, (2, -1)) for p in (ours.q_proj, ours.k_proj, ours.v_proj, ours.g_proj)]
    ba = [p.weight.unflatten(0, (2, -1)) for p in (ours.b_proj, ours.a_proj)]
    theirs.load_state_dict(
        {
            "in_proj_qkvz.weight": torch.cat(qkvz, 1).flatten(0, 1),
            "in_proj_ba.weight": torch.cat(ba, 1).flatten(0, 1),
            "conv1d.weight": ours.convolution.weight[:, None],
            "dt_bias": ours.decay.dt_bias,
            "A_log": ours.decay.a_log,
            "norm.weight": ours.norm.weight,
            "out_proj.weight": ours.o_proj.weight,
        }
    )
    x = tokens(n)
    torch.testing.assert_close(ours(x).out, theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n", [1, 37, 130])
def test_mamba_2(n: int) -> None:
    torch.manual_seed(0)
    ours = Mamba2(16, 4, key_dim=6, groups=2)
    ours.skip.data.normal_()
    config = mamba.Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, state_size=6, n_groups=2, expand=2, chunk_size=16, num_hidden_layers=1,
        layer_norm_epsilon=1e-5,
    )  # fmt: skip
    theirs = mamba.Mamba2Mixer(config, 0)
    theirs.load_state_dict(
        {
            "in_proj.weight": torch.cat([p.weight for p in (ours.z_proj, ours.xbc_proj, ours.dt_proj)]),
            "conv1d.weight": ours.convolution.weight[:, None],
            "conv1d.bias": ours.convolution.bias,
            "dt_bias": ours.decay.dt_bias,
            "A_log": ours.decay.a_log,
            "D": ours.skip,
            "norm.weight": ours.norm_weight,
            "out_proj.weight": ours.o_proj.weight,
        }
    )
    x = tokens(n)
    torch.testing.assert_close(ours(x).out, theirs(x), rtol=1e-4, atol=1e-5)
