"""Copy scores: a head built to copy gets the highest score, and the table fits the model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from regard.errors import ArgumentError
from regard.heads.copy_score import copy_scores
from regard.inference.seam import attach


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


def test_scores_are_the_weights_on_what_should_be_copied(model: LlamaForCausalLM) -> None:
    """Against transformers' own eager maps, on the same prompt."""
    text = torch.randint(0, 64, (40,))
    prompts: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: prompts.append(kw["input_ids"]), with_kwargs=True)
    table = copy_scores(model, text, length=40, passage=6, plantings=1, seed=3)
    hook.remove()
    prompt = prompts[-1]
    eager = LlamaForCausalLM(model.config).eval()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    maps = eager(prompt, output_attentions=True).attentions
    for layer, weights in enumerate(maps):
        on_target = torch.stack([weights[0, :, 34 + i, 1 + i + 1] for i in range(5)]).mean(0)
        want = on_target.view(2, 2).amax(1)
        assert torch.allclose(torch.tensor(table.scores[layer]), want, atol=2e-6)


def test_the_table_serves_the_model(model: LlamaForCausalLM) -> None:
    from regard.inference.plan import Plan
    from regard.inference.policies.duoattention import DuoAttention

    table = copy_scores(model, torch.randint(0, 64, (60,)), length=48, passage=4, plantings=2)
    with attach(model, Plan(cache=DuoAttention(table=table, sparsity=0.5, sinks=2, recent=4))) as attached:
        store = attached.new_store()
        model(torch.randint(0, 64, (1, 20)), past_key_values=store)
        store.seal()
        lengths = torch.stack(store.entries)[:, 0]
    assert sorted(set(lengths.flatten().tolist())) == [6, 20]
    assert int((lengths == 20).sum()) == 2


def test_a_short_haystack_is_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ArgumentError, match="haystack"):
        copy_scores(model, torch.randint(0, 64, (30,)), length=48, passage=4)


def test_the_packaged_table_fits_its_model() -> None:
    """30 layers of 3 KV heads, a few of which stand out: that is what makes a table worth having."""
    from regard.inference.head_table import HeadTable

    table = HeadTable.load("smollm2")
    scores = torch.tensor(table.scores)
    assert table.shape == (30, 3) and table.model == "smollm2" and "copy_scores" in table.made_by
    assert 3 <= int((scores > 0.1).sum()) <= 30
