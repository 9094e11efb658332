"""Models that see images: their towers attend through the same interface, and know nothing of tokens or plans."""

from __future__ import annotations

import pytest
import torch
from tests.inference.batches import mixed
from tests.inference.proof import ALLOWED, relative_error
from tests.inference.tiny import llama
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from regard.errors import ArgumentError
from regard.inference.seam import attach

IMAGE = 95


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**small, image_size=8, patch_size=4, initializer_range=0.3),
        text_config=LlamaConfig(**small, vocab_size=96, initializer_range=0.1),
        image_token_index=IMAGE,
    )
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("plan", ["full", "h2o(budget=64)"])
@torch.no_grad()
def test_images_beside_padded_text(plan: str) -> None:
    model = llava()
    batch = mixed("left")
    ids = batch.ids.clamp(max=IMAGE - 1)
    ids[:, -8:-4] = IMAGE  # four patches an image
    given = {"input_ids": ids, "attention_mask": batch.real.long(), "pixel_values": torch.randn(len(ids), 3, 8, 8)}
    greedy = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want, said = model(**given).logits, model.generate(**given, **greedy)
    with attach(model, plan):
        assert relative_error(model(**given).logits, want, batch.is_real) <= ALLOWED
        assert torch.equal(model.generate(**given, **greedy), said)


def test_what_is_no_model_or_no_plan_is_named() -> None:
    for model in ("smollm2", None):
        with pytest.raises(ArgumentError, match=r"model: got .*not its name"):
            attach(model)  # type: ignore[arg-type]
    for plan in (3, None):
        with pytest.raises(ArgumentError, match="plan: got"):
            attach(llama(), plan)  # type: ignore[arg-type]
