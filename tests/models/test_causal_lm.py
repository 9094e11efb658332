"""The causal language model: what its states carry, what is generated, what is saved, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

import regard
from regard.errors import ArgumentError, CheckpointError, RegardError, UnknownNameError, UnsupportedError
from regard.layers import Layer, Output
from regard.layers.forget_gate import ForgetGate, share_lower_bounds
from regard.models.causal_lm import CausalLM, LMState, Sampler, greedy, held_bytes
from regard.models.config import CausalLMConfig
from regard.models.saving import load_model, save_model
from regard.models.stack import Mixer, full_attention, full_positions, hybrid, placed
from regard.patterns import causal, sliding_window
from regard.registry import entries

LINEAR = Mixer("lightning-attention-2", 2)


def made(mixers: tuple[Mixer, ...] | None = None, **settings: object) -> CausalLM:
    """A model of width 16 over 11 tokens, in float64."""
    mixers = hybrid(LINEAR, "1:1", 2) if mixers is None else mixers
    return CausalLM(CausalLMConfig(11, 16, mixers, **settings)).double().eval()  # type: ignore[arg-type]


def tokens(*shape: int) -> Tensor:
    return torch.randint(11, shape)


def within(patterns: Any) -> Mixer:
    return Mixer("multi-head-attention", 2, {"rotary": True}, patterns)


def with_lower_bounds(width: int = 16) -> CausalLM:
    """Three blocks of HGRN that share one learned Γ."""
    model = made((Mixer("hgrn", 2),) * 3)
    share_lower_bounds([block.mixer.forget_gate for block in model.blocks], width)
    return model.double()


@pytest.mark.parametrize(
    ("ratio", "layers", "at"),
    [
        ("3:1", 8, (3, 7)),
        ("3:1", 10, (3, 7)),
        ("3:1", 3, (1,)),
        ("1:1", 4, (1, 3)),
        ("7:1", 8, (7,)),
        ("24:1", 24, (12,)),
        ("24:1", 50, (24, 49)),
        ("0:1", 3, (0, 1, 2)),
        ("1:0", 3, ()),
    ],
)
def test_positions_of_a_ratio(ratio: str, layers: int, at: tuple[int, ...]) -> None:
    assert full_positions(ratio, layers) == at
    keys = [mixer.key for mixer in hybrid(LINEAR, ratio, layers)]
    assert [i for i, key in enumerate(keys) if key == "multi-head-attention"] == list(at) and len(keys) == layers


def test_positions_given_as_in_based() -> None:
    window, other = full_attention(2), Mixer("moh", 4)
    stack = placed(LINEAR, 27, (window, (2, 7, 12, 17, 22)), (other, (1, 6, 11, 16, 21)))
    assert [i for i, mixer in enumerate(stack) if mixer is window] == [2, 7, 12, 17, 22]
    assert [stack.count(mixer) for mixer in (LINEAR, window, other)] == [17, 5, 5]


def test_mixers_are_told_their_depth() -> None:
    model = made(hybrid(LINEAR, "1:0", 3))
    rates = [block.mixer.mixer.log_decay for block in model.blocks]
    alone = [regard.create("lightning-attention-2", dim=16, heads=2, layer=i, layers=3) for i in range(3)]
    assert rates == [layer.mixer.log_decay for layer in alone] and len(set(rates)) == 3


@pytest.mark.parametrize("tied", [True, False])
def test_one_block_by_hand(tied: bool) -> None:
    model = made((full_attention(2),), tied=tied)
    x, (block,) = tokens(2, 7), model.blocks
    at = 4 * model.embedding(x)
    at = at + block.mixer(rms_norm(at, (16,), block.mixer_norm.weight, 1e-5), pattern=causal()).out
    gate, up = linear(rms_norm(at, (16,), block.mlp_norm.weight, 1e-5), block.mlp.gate_up.weight).split(48, -1)
    at = rms_norm(at + linear(silu(gate) * up, block.mlp.down.weight), (16,), model.norm.weight, 1e-5)
    wanted = at @ (model.embedding.weight if tied else model.head.weight).T
    torch.testing.assert_close(model(x).logits, wanted, atol=1e-12, rtol=0)
    assert ("head.weight" in model.state_dict()) is not tied


def test_without_an_mlp() -> None:
    assert not any("mlp" in name for name in made(mlp_width=0).state_dict())


STEPPING = sorted(e.key for e in entries("layer") if e.settings.get("causal") and e.settings.get("steps"))


STREAMS = {"selective-attention-hybrid": {"threshold": 0.5}}
"""What lets a mixer step in evaluation, where its defaults refuse to."""


def model_of(key: str) -> CausalLM:
    """Two layers of a mixer around full attention, with the settings that its own conformance tests use."""
    entry = next(e for e in entries("layer") if e.key == key)
    about = entry.example() if entry.example else None
    heads, settings = (about.heads, about.settings) if about else (4, {})
    dim = about.dim if about else 16
    settings = {**settings, **STREAMS.get(key, {})}
    mixers = hybrid(Mixer(key, heads, settings), "3:1", 3, full_attention(2))
    return CausalLM(CausalLMConfig(11, dim, mixers)).double().eval()


@pytest.mark.parametrize("key", STEPPING)
def test_every_stepping_mixer_goes_on_where_it_stopped(key: str) -> None:
    model, x = model_of(key), tokens(2, 9)
    whole = model(x).logits
    first = model(x[:, :5])
    rest, state = [first.logits], first.state
    for i in range(5, 9):
        out = model(x[:, i : i + 1], state)
        rest.append(out.logits)
        state = out.state
    torch.testing.assert_close(torch.cat(rest, 1), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("key", STEPPING)
def test_every_stepping_mixer_is_saved_and_loaded(key: str, tmp_path: Path) -> None:
    model, x = model_of(key), tokens(1, 6)
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.config == model.config and not again.training
    assert torch.equal(again(x).logits, model(x).logits)


def test_generation_equals_the_full_forward_each_time() -> None:
    model, x = made(), tokens(3, 5)
    said = model.generate(x, 6)
    slow = x
    for _ in range(6):
        slow = torch.cat([slow, greedy(model(slow).logits[:, -1])[:, None]], 1)
    assert torch.equal(said, slow[:, 5:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_generates_what_its_rows_do(side: str) -> None:
    model, rows = made(), [tokens(1, n) for n in (3, 7, 5)]
    padded, real = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(7 - row.shape[1], 7) if side == "left" else slice(row.shape[1])
        padded[i, at], real[i, at] = row[0], True
    alone = torch.cat([model.generate(row, 5) for row in rows])
    assert torch.equal(model.generate(padded, 5, key_padding=real), alone)


def test_sampling() -> None:
    model, x = made(), tokens(2, 5)

    def drawn(seed: int) -> Tensor:
        return model.generate(x, 20, Sampler(2.0, generator=torch.Generator().manual_seed(seed)))

    assert torch.equal(drawn(0), drawn(0)) and not torch.equal(drawn(0), drawn(1))
    assert torch.equal(model.generate(x, 8, Sampler(top_k=1)), model.generate(x, 8))
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, -1)
    share = torch.bincount(Sampler(2.0, 3)(logits), minlength=4) / 20_000
    wanted = torch.tensor([0.0, 0.5, 1.0]).exp()
    torch.testing.assert_close(share, torch.cat([wanted / wanted.sum(), torch.zeros(1)]), atol=0.02, rtol=0)


def test_top_k_is_k_tokens_where_they_tie() -> None:
    for k in (1, 2):
        assert len(Sampler(top_k=k)(torch.zeros(500, 6)).unique()) == k


@pytest.mark.parametrize("temperature", [1e-38, 1e-300, 1e300])
def test_any_temperature_above_zero_draws(temperature: float) -> None:
    drawn = Sampler(temperature)(torch.tensor([[5.0, 1e4, -1e4]]).expand(50, -1))
    assert bool((drawn == 1).all()) == (temperature < 1)


@pytest.mark.parametrize("ratio", ["1:0", "7:1", "3:1", "1:1", "0:1"])
def test_bytes_follow_the_formula(ratio: str) -> None:
    """For each full block a cache of 2·N·C elements a row; for each recurrent one H·D² and a count of 8 bytes."""
    model = CausalLM(CausalLMConfig(11, 16, hybrid(LINEAR, ratio, 8)))
    full = len(full_positions(ratio, 8))
    for n in (3, 20):
        wanted = 2 * (full * 4 * 2 * n * 16 + (8 - full) * (4 * 2 * 8 * 8 + 8))
        assert held_bytes(model(tokens(2, n)).state) == wanted


def test_a_mixer_within_a_window() -> None:
    """Based's third mixer: the pattern is both, steps follow it, and a file keeps it."""
    window = within({"sliding-window": {"size": 3}})
    assert window.pattern == sliding_window(3) & causal()
    model, other, x = made((window,)), made((full_attention(2),)), tokens(1, 8)
    other.load_state_dict(model.state_dict())
    whole, full, state = model(x).logits, other(x).logits, None
    torch.testing.assert_close(whole[:, :3], full[:, :3], atol=1e-12, rtol=0)
    assert not torch.isclose(whole[:, 3:], full[:, 3:]).all(-1).any()
    for i in range(8):
        logits, state, _ = model(x[:, i : i + 1], state)
        torch.testing.assert_close(logits, whole[:, i : i + 1], atol=1e-12, rtol=0)
    again = CausalLMConfig.from_json(model.config.to_json())
    assert again == model.config and again.mixers[0].pattern == window.pattern
    assert "within" not in other.config.to_json()
    with pytest.raises(UnsupportedError, match="takes no patterns"):
        Mixer("retnet", 2, within={"sliding-window": {"size": 3}})


def test_a_configuration_takes_a_list_and_whole_numbers() -> None:
    given, same = CausalLMConfig(11, 16, [LINEAR], eps=1), CausalLMConfig(11, 16, (LINEAR,), eps=1.0)  # type: ignore[arg-type]
    assert given == same and given.mixers == (LINEAR,) and given.fingerprint == same.fingerprint


def test_all_full_is_the_transformer() -> None:
    assert CausalLMConfig(11, 16, hybrid(LINEAR, "0:1", 3)) == CausalLMConfig(11, 16, (full_attention(2),) * 3)


def test_aux_of_every_layer_comes_out() -> None:
    aux = made(placed(Mixer("moh", 4), 2, (full_attention(2), (0,))))(tokens(1, 4)).aux
    assert aux[0] is None and aux[1].load_balance.ndim == 0


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: Mixer("gated-deltanets", 2), "mixer: got 'gated-deltanets'"),
        (lambda: Mixer("lightning-atention-2", 2), "did you mean lightning-attention-2"),
        (lambda: Mixer("moh", 4, {"topk": 2}), "did you mean top_k"),
        (lambda: Mixer("moh", 0), "heads: got 0"),
        (lambda: hybrid(LINEAR, "3", 4), "ratio: got '3'"),
        (lambda: hybrid(LINEAR, "3:2", 4), "R:1"),
        (lambda: hybrid(LINEAR, "0:0", 4), "ratio"),
        (lambda: hybrid(LINEAR, "3:1", 0), "layers: got 0"),
        (lambda: placed(LINEAR, 3, (full_attention(2), (1, 3))), "positions: got 3; allowed: ints from 0 to 2"),
        (lambda: placed(LINEAR, 3, (full_attention(2), (-1,))), "positions: got -1"),
        (lambda: placed(LINEAR, 3, (full_attention(2), (1,)), (LINEAR, (1,))), "each layer once"),
        (lambda: CausalLMConfig(0, 16, (LINEAR,)), "vocab: got 0"),
        (lambda: CausalLMConfig(11, 16, ()), "mixers"),
        (lambda: CausalLMConfig(11, 16, (LINEAR,), mlp_width=-1), "mlp_width"),
        (lambda: CausalLM(CausalLMConfig(11, 15, (LINEAR,))), "divisor of dim=15"),
        (lambda: made()(tokens(4)), "tokens"),
        (lambda: made()(torch.zeros(1, 4)), "tokens"),
        (lambda: made()(tokens(1, 4), state=3), "state: got int"),
        (lambda: made().generate(tokens(1, 3), 0), "new_tokens: got 0"),
        (lambda: made().generate(tokens(1, 3), 1, key_padding=torch.zeros(1, 3, dtype=torch.bool)), "key_padding"),
        (lambda: made()([[1, 2]]), "tokens: got list"),
        (lambda: made()(torch.tensor([[1, 11]])), "tokens: got 11; allowed: 0 to 10"),
        (lambda: made()(torch.tensor([[-1, 3]])), "tokens: got -1"),
        (lambda: Sampler(0.0), "temperature"),
        (lambda: Sampler("1"), "temperature: got '1'"),
        (lambda: Sampler(None), "temperature: got None"),
        (lambda: Sampler(top_k=0), "top_k"),
        (lambda: Sampler(top_k=1.5), "top_k: got 1.5"),
        (lambda: Sampler(generator=3), "generator: got 3"),
        (lambda: regard.create(None, dim=16, heads=2), "layer: got None"),
        (lambda: regard.create(["x"], dim=16, heads=2), r"layer: got \['x'\]"),
        (lambda: Mixer(None, 2), "mixer: got None"),
        (lambda: Mixer("moh", 4, ["rotary"]), r"settings: got \['rotary'\]"),
        (lambda: Mixer("moh", 4, None), "settings: got None"),
        (lambda: within({"sliding-windows": {"size": 3}}), "did you mean sliding-window"),
        (lambda: within({"sliding-window": {"width": 3}}), "argument of sliding-window: got 'width'"),
        (lambda: within({"sliding-window": {}}), "within: got .*missing"),
        (lambda: within({"sliding-window": {"size": 0}}), "size: got 0"),
        (lambda: within({"sliding-window": 3}), "within: got 3"),
        (lambda: within(["sliding-window"]), "within"),
        (lambda: hybrid("retnet", "3:1", 4), "mixer: got 'retnet'"),
        (lambda: hybrid(LINEAR, None, 4), "ratio: got None"),
        (lambda: hybrid(LINEAR, 3, 4), "ratio: got 3"),
        (lambda: hybrid(LINEAR, "3:1", 4, "multi-head-attention"), "full: got 'multi-head-attention'"),
        (lambda: placed(LINEAR, 4, (LINEAR, 1)), "positions: got .* such as"),
        (lambda: placed(LINEAR, 4, LINEAR), "positions: got Mixer"),
        (lambda: placed("retnet", 4), "others: got 'retnet'"),
        (lambda: placed(LINEAR, 4, ("retnet", (1,))), "positions: got 'retnet'"),
        (lambda: CausalLMConfig(11, 16, LINEAR), "mixers: got .*allowed: a tuple"),
        (lambda: CausalLMConfig(11, 16, (LINEAR,), eps="1"), "eps: got '1'"),
        (lambda: CausalLMConfig(11, 16, (LINEAR,), eps=float("inf")), "eps: got inf"),
        (lambda: share_lower_bounds([], 16), "gates: got none"),
        (lambda: share_lower_bounds([LINEAR], 16), "gates: got Mixer"),
        (lambda: share_lower_bounds([ForgetGate(0, 1, None)], 0), "width: got 0"),
        (lambda: with_lower_bounds(8)(tokens(1, 3)), "width: got 8.*16"),
        (lambda: load_model("nowhere", device="gpu"), "device: got 'gpu'"),
        (lambda: load_model("nowhere", device="meta"), "device: got 'meta'"),
        (lambda: load_model("nowhere", device="cuda:99"), "device: got 'cuda:99'"),
        (lambda: load_model("nowhere", device=None), "device: got 'None'"),
    ],
)
def test_what_is_refused(ask: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ask()  # type: ignore[operator]


def test_unknown_mixers_are_named_with_those_that_can() -> None:
    with pytest.raises(UnknownNameError, match="lightning-attention-2") as told:
        Mixer("nothing-like-it", 2)
    unable = {e.key for e in entries("layer") if not e.settings.get("causal")}
    assert not any(f" {key}," in str(told.value) for key in unable)


@pytest.mark.parametrize("key", sorted(e.key for e in entries("layer") if not e.settings.get("causal")))
def test_a_mixer_without_causality_is_refused(key: str) -> None:
    with pytest.raises(UnsupportedError, match="causal"):
        Mixer(key, 2)


def test_state_of_another_model_is_refused() -> None:
    model, other, x = made(), made(hybrid(LINEAR, "1:1", 3)), tokens(1, 3)
    with pytest.raises(ArgumentError, match="state: got that of model"):
        model(x, other(x).state)
    cut = LMState(model(x).state.layers[:1], model.fingerprint)
    with pytest.raises(ArgumentError, match="state"):
        model(x, cut)


def test_what_cannot_step_cannot_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    monkeypatch.setattr(Mixer, "steps", False)
    with pytest.raises(UnsupportedError, match="lightning-attention-2"):
        model.generate(tokens(1, 3), 2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(made(), tmp_path)
    return tmp_path


def edit(folder: Path, **change: object) -> None:
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**told, **change}))


def test_saving_leaves_two_files_and_keeps_the_dtype(saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert load_model(saved).embedding.weight.dtype == torch.float64
    save_model(made().to(torch.bfloat16), saved)
    assert load_model(saved).norm.weight.dtype == torch.bfloat16


def test_a_model_of_mixed_dtypes_is_loaded_as_it_was(tmp_path: Path) -> None:
    model = made().to(torch.bfloat16)
    model.norm.double()
    save_model(model, tmp_path)
    again = load_model(tmp_path).state_dict()
    for name, held in model.state_dict().items():
        assert again[name].dtype == held.dtype and torch.equal(again[name], held)


def test_shared_lower_bounds_are_saved_once_and_shared_again(tmp_path: Path) -> None:
    model, x = with_lower_bounds(), tokens(1, 5)
    with torch.no_grad():
        model.blocks[0].mixer.forget_gate.gamma.normal_()
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again(x).logits, model(x).logits)
    assert len({id(block.mixer.forget_gate.gamma) for block in again.blocks}) == 1
    assert len(list(again.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "not the configuration of a regard"),
        (lambda f: (f / "config.json").write_text("[1]"), "not the configuration of a regard"),
        (lambda f: edit(f, regard_causal_lm=2), "version 2"),
        (lambda f: edit(f, mixers=[{"key": "no-such", "heads": 2, "settings": {}}] * 2), "no-such"),
        (lambda f: edit(f, mixers=[3]), "config.json"),
        (lambda f: edit(f, mixers=4), "config.json"),
        (lambda f: edit(f, width=4), "width"),
        (lambda f: edit(f, vocab="many"), "vocab"),
        (lambda f: edit(f, vocab=12), "not written with this"),
        (lambda f: (f / "model.safetensors").write_bytes(b"nonsense"), "not a safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-5]), "a part of one"),
    ],
)
def test_a_spoilt_file_is_refused(saved: Path, spoil: object, message: str) -> None:
    spoil(saved)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        load_model(saved)


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="folder"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="can be written"):
        save_model(made(), tmp_path / "file" / "below")


def test_settings_that_json_does_not_hold(tmp_path: Path) -> None:
    with pytest.raises(RegardError, match="settings"):
        CausalLM(CausalLMConfig(11, 16, (Mixer("multi-head-attention", 2, {"head_dim": (8,)}),)))


def test_a_layer_is_what_the_blocks_expect() -> None:
    assert all(isinstance(block.mixer, Layer) for block in made().blocks)
    assert isinstance(made().hidden(tokens(1, 2)), Output)


def test_a_module_at_two_places_is_not_saved(tmp_path: Path) -> None:
    model = CausalLM(CausalLMConfig(11, 16, (Mixer("hgrn", 2),) * 2))
    model.blocks[1] = model.blocks[0]  # its lower bound would come back as that of its own layer
    with pytest.raises(ArgumentError, match=r"^model: got one module at two places"):
        save_model(model, tmp_path)


def test_a_pattern_for_other_heads_is_no_mixers() -> None:
    with pytest.raises(ArgumentError, match=r"^within: got a pattern for 4 heads"):
        Mixer("multi-head-attention", 2, within={"s2-attention": {"heads": 4}})
