"""Attaching and undoing it: other precisions, wrappers, models that share a configuration, threads, exceptions."""

from __future__ import annotations

import threading
from copy import deepcopy
from typing import Any

import pytest
import torch
from tests.inference import proof, zoo
from tests.inference.batches import Batch, generate, mixed, run, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from regard.inference.plan import Plan
from regard.inference.seam import attach

torch.set_num_threads(1)


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@torch.no_grad()
def _bfloat16_errors(model: PreTrainedModel) -> tuple[float, float]:
    """Root mean squares over real tokens of what eager and we differ by, in bfloat16, from eager in float32."""
    model = model.bfloat16()
    batch, more = mixed("left"), tokens(3, 3, seed=2)
    whole = batch.then(more)
    exact = run(deepcopy(model).float(), whole)[0]

    def stepwise() -> float:
        prompt, past = run(model, batch)
        logits = torch.cat([prompt, run(model, whole, (1, 1, 1), past)[0]], 1)
        assert logits.dtype == torch.bfloat16
        return _rms((logits - exact)[whole.is_real])

    eager = stepwise()
    with attach(model, "full"):
        return eager, stepwise()


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_bfloat16_is_as_near_to_float32_as_eager_is(name: str) -> None:
    eager, ours = _bfloat16_errors(zoo.build(name))
    assert ours <= 1.1 * eager


@pytest.mark.gpu
@pytest.mark.parametrize("name", zoo.TWELVE)
def test_on_the_gpu(name: str) -> None:
    model = zoo.build(name).cuda()
    checks = [*proof.full_plan(model, ["greedy"]), *proof.compressed(model, proof.plans(model, 8)["snapkv"])]
    assert not [check for check in checks if not check.ok]
    eager, ours = _bfloat16_errors(model)
    assert ours <= 1.25 * eager


def test_a_lora_model_is_served_as_it_is() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(zoo.build("llama"), config).eval()
    plain = run(zoo.build("llama"), mixed("left"))[0]
    assert proof.relative_error(run(model, mixed("left"))[0], plain) > 1e-3, "the adapter does nothing"
    assert not [check for check in proof.full_plan(model) if not check.ok]
    assert not [check for check in proof.compressed(model, proof.plans(model, 8)["snapkv"]) if not check.ok]


def _state(model: nn.Module) -> list[Any]:
    """What an attachment might leave behind, module by module."""
    found: list[Any] = []
    for name, module in model.named_modules():
        config = module.__dict__.get("config")
        found.append((name, id(module), id(config), getattr(config, "_attn_implementation", None), module.training))
        found.append([list(hooks) for key, hooks in module.__dict__.items() if key.endswith("_hooks")])
        found.append(sorted(key for key in module.__dict__))
    return found


class Stop(Exception):
    """Raised by the tests."""


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_h1"])
def test_undone_after_an_exception(name: str) -> None:
    model = zoo.build(name)
    batch = mixed("left")
    want, config, state = run(model, batch)[0], model.config.to_json_string(), _state(model)
    with pytest.raises(Stop), attach(model, "streaming(budget=8)"):
        generate(model, batch, 2)
        raise Stop
    assert _state(model) == state and model.config.to_json_string() == config

    def fail(*_: object) -> None:
        raise Stop

    with pytest.raises(Stop), attach(model, "full"):
        hook = next(m for m in model.modules() if "Attention" in type(m).__name__).register_forward_hook(fail)
        try:
            run(model, batch)
        finally:
            hook.remove()
    assert _state(model) == state and torch.equal(run(model, batch)[0], want)
    with attach(model, "full"):
        assert proof.relative_error(run(model, batch)[0], want, batch.is_real) <= proof.ALLOWED


def _pair() -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models over one configuration object."""
    first, second = zoo.build("llama"), zoo.build("llama", seed=1)
    for module in second.modules():
        if "config" in module.__dict__:
            module.config = first.config
    assert first.config is second.config
    return first, second


def _alone(model: PreTrainedModel, plan: Plan) -> Tensor:
    with attach(model, plan):
        return generate(model, mixed("left"), proof.NEW)[1]


def test_two_models_of_one_configuration_in_turn() -> None:
    first, second = _pair()
    plans = proof.plans(first, 8)
    want = [_alone(first, plans["full"]), _alone(second, plans["keydiff"])]
    with attach(first, plans["full"]), attach(second, plans["keydiff"]):
        for _ in range(2):
            assert torch.equal(generate(first, mixed("left"), proof.NEW)[1], want[0])
            assert torch.equal(generate(second, mixed("left"), proof.NEW)[1], want[1])
    assert first.config._attn_implementation == "eager" and first.config is second.config


def test_two_models_in_two_threads() -> None:
    first, second = _pair()
    plans = proof.plans(first, 8)
    pairs = [(first, plans["full"]), (second, plans["keydiff"])]
    want = [_alone(*pair) for pair in pairs]
    got: list[list[Tensor]] = [[], []]
    ready = threading.Barrier(2)

    def work(i: int) -> None:
        ready.wait()
        for _ in range(3):
            got[i].append(generate(pairs[i][0], mixed("left"), proof.NEW)[1])

    with attach(*pairs[0]), attach(*pairs[1]):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for results, expected in zip(got, want, strict=True):
        assert len(results) == 3 and all(torch.equal(result, expected) for result in results)


@torch.no_grad()
def test_one_model_in_two_threads() -> None:
    model = zoo.build("llama")
    batches = [Batch(tokens(2, 12, seed=s)) for s in (1, 2)]
    got: list[Any] = [None, None]
    with attach(model, "full"):
        want = [generate(model, batch, proof.NEW)[0] for batch in batches]

        def work(i: int) -> None:
            got[i] = [generate(model, batches[i], proof.NEW)[0] for _ in range(3)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for results, expected in zip(got, want, strict=True):
        assert results is not None and all(torch.equal(result, expected) for result in results)
