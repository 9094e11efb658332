"""A tokenizer trained in milliseconds, a text for it and a decoder of two layers: a whole language model without
files."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from regard.tasks.needle import ANSWER, INTRODUCTION, PLACES, QUESTION, SENTENCE
from regard.tasks.text import Text

_NOUNS = (
    "river stone cloud horse winter table window silver thunder shoulder morning candle voice mountain paper".split()
)
_VERBS = "carries follows hides remembers opens breaks paints hears crosses forgets".split()
TEXT = Text(
    "a toy text",
    "".join(
        f"The {_NOUNS[i % 15]} {_VERBS[(i * 7) % 10]} the {_NOUNS[(i * 11 + i // 15) % 15]}"
        + (f" and no {_NOUNS[(i * 3 + 2) % 15]} {_VERBS[i // 10 % 10]} it" if i % 3 else "")
        + (".\n" if i % 2 else ". ")
        for i in range(400)
    ),
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def toy_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most 500 tokens in which every digit stands alone."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompts = [INTRODUCTION, QUESTION, ANSWER, SENTENCE, " ".join(PLACES)] * 20
    core.train_from_iterator([TEXT.body, *prompts], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", bos_token="<|im_start|>")
    made.chat_template = CHAT if chat else None
    return made


@cache
def toy_model(seed: int = 0, max_positions: int = 512) -> LlamaForCausalLM:
    """Two layers, four query heads on two KV heads; weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(toy_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()
