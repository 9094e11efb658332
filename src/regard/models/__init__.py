"""Small causal models from any registered mixers; pretrained models by name are in `regard.models.pretrained`."""

from regard.models.causal_lm import CausalLM, LMOutput, LMState, Sampler, greedy, held_bytes
from regard.models.config import CausalLMConfig
from regard.models.saving import load_model, save_model
from regard.models.stack import Mixer, full_attention, full_positions, hybrid, placed

__all__ = [
    "CausalLM",
    "CausalLMConfig",
    "LMOutput",
    "LMState",
    "Mixer",
    "Sampler",
    "full_attention",
    "full_positions",
    "greedy",
    "held_bytes",
    "hybrid",
    "load_model",
    "placed",
    "save_model",
]
