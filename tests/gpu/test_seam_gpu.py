"""The seam on CUDA: the model's own eager in float32, and bfloat16 within bfloat16's own error."""

from __future__ import annotations

import pytest
import torch
from tests.inference import zoo
from tests.inference.struck_out import eager_copy

from regard.inference.seam import attach

pytestmark = pytest.mark.gpu
NAMES = ("llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_full_plan_is_eager(name: str) -> None:
    model = zoo.build(name).cuda()
    eager = eager_copy(model)
    tokens = torch.randint(1, 60, (2, 24), device="cuda")
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    want = eager(tokens, attention_mask=mask).logits[mask.bool()]
    with attach(model, "full"):
        got = model(tokens, attention_mask=mask).logits[mask.bool()]
        new = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(
        new, eager.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    )


@pytest.mark.parametrize("name", ("llama", "gemma2"))
@torch.no_grad()
def test_bfloat16_errs_as_eager_does(name: str) -> None:
    exact = zoo.build(name).cuda()
    rough = zoo.build(name).cuda().bfloat16()
    eager = eager_copy(rough)
    tokens = torch.randint(1, 60, (2, 40), device="cuda")
    want = eager_copy(exact)(tokens).logits
    with attach(rough, "full"):
        ours = (rough(tokens).logits.float() - want).norm()
    assert ours <= 1.5 * (eager(tokens).logits.float() - want).norm()


@pytest.mark.parametrize(
    "plan", ("snapkv(budget=16,window=4)", "streaming(budget=16)", "h2o(budget=16)", "tova(budget=16)")
)
@torch.no_grad()
def test_plans_choose_on_cuda_what_they_choose_on_the_cpu(plan: str) -> None:
    model = zoo.build("llama")
    tokens = torch.randint(1, 60, (2, 40))
    kept = []
    for device in ("cpu", "cuda"):
        with attach(model.to(device), plan) as attached:
            store = attached.new_store()
            model(tokens.to(device), past_key_values=store)
            store.seal()
            for t in range(3):
                model(tokens[:, t : t + 1].to(device), past_key_values=store)
            kept.append([[lane.tolist() for row in store.kept(layer) for lane in row] for layer in range(2)])
    assert kept[0] == kept[1]
