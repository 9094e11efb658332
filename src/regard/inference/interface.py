"""The seam: one attention function and one mask function, registered with transformers' own interfaces.

A model that is attached (`regard.inference.seam`) has these two named in its configuration. The mask function draws
nothing: it wraps transformers' mask function in a `MaskRecipe`, which travels in the mask's place. The attention
function
makes one `AttentionCall` of each layer's call and has it executed. Nothing of transformers is patched.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from regard.errors import AttachError, UnsupportedError
from regard.inference.cache import Given, KVLayer
from regard.inference.call import AttentionCall, MaskRecipe
from regard.inference.observed import Logits
from regard.inference.run import run_call

if TYPE_CHECKING:
    from regard.inference.seam import Attached
    from regard.inference.store import KVStore

NAME = "regard"
"""What the configuration of an attached model calls its attention."""

HARMLESS = frozenset(
    "position_ids use_cache cache_position output_hidden_states output_router_logits sliding_window is_causal "
    "position_embeddings past_key_values past_key_value return_dict logits_to_keep num_items_in_batch layer_idx "
    "cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k seq_idx attention_mask deterministic input_ids labels "
    "token_type_ids mm_token_type_ids output_attentions shared_kv_states inputs_embeds per_layer_inputs".split()
)
"""Arguments that transformers passes along to attention and that do not change what it computes here."""


@dataclass
class Pass:
    """One forward of an attached model: its store, if it has one, and what has been seen of its layers."""

    store: KVStore | None
    batch: int
    n: int
    padding: Tensor | None
    reached: int = 0
    """Calls of the attention function so far."""
    handed: list[tuple[KVLayer, bool, MaskRecipe]] = field(default_factory=list)
    """The caching layers among them, with whether k and v came as the store had handed them out, and their mask."""


class Passes(threading.local):
    """The forward under way in this thread."""

    current: Pass | None = None


OWNERS: WeakKeyDictionary[nn.Module, Attached] = WeakKeyDictionary()
"""Every module of every attached model, with what it is attached to."""


def mask(
    *,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    use_vmap: bool = False,
    **_: Any,
) -> MaskRecipe:
    """In place of transformers' mask: what it would have drawn, not drawn. Sizes and dtypes are of no interest here."""
    return MaskRecipe(
        mask_function,
        by_element=use_vmap,
        padding=attention_mask,
        q_offset=int(q_offset),
        k_offset=int(kv_offset),
        causal=mask_function is causal_mask_function,
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskRecipe | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """In place of transformers' attention. query (B, Hq, N, D), key and value (B, Hkv, M, D); returns (B, N, Hq, Dv),
    None."""
    owner = OWNERS.get(module)
    now = None if owner is None else owner.passes.current
    if owner is not None and now is None and getattr(module, "is_causal", True) is False:
        now = Pass(None, query.shape[0], query.shape[2], None)  # generate() has an image's tower run ahead
    if owner is None or now is None:
        raise AttachError(f"{type(module).__name__} was called past the attached model: call that model itself")
    if dropout and module.training:
        raise UnsupportedError(
            f"attention dropout {dropout}: an attached model computes without; call model.eval() first"
        )
    if others:
        _check(module, others)
    drawn = attention_mask
    recipe = drawn if isinstance(drawn, MaskRecipe) else _unmasked(module, drawn, others)
    logits = Logits(recipe, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    layer, given = (None, None) if now.store is None else _source(now.store, key)
    now.reached += 1
    if layer is None or given is None:
        out = run_call(_loose(owner, now, query, key, value, logits))
        return out.transpose(1, 2).contiguous(), None
    now.handed.append((layer, given.has(key, value), recipe))
    if now.n == 1 and given.stand_in:
        out = layer.decode(query, logits)
        if layer.limits is not None:
            layer.step(layer.store.plan.cache, query, None)
        return out, None
    out = _prompt(owner, now, layer, given, query, key, value, logits)
    return out.transpose(1, 2).contiguous(), None


def _prompt(
    owner: Attached, now: Pass, layer: KVLayer, given: Given, q: Tensor, k: Tensor, v: Tensor, logits: Logits
) -> Tensor:
    """Several tokens at once, or keys that the model has changed since `update`."""
    store = layer.store
    forward = store.forward
    if given.stand_in and not given.has(k, v):
        raise AttachError("this layer changed the keys it was handed, which it did not do when the model was attached")
    k_columns, k_real = forward.q_columns, None if forward.real is None else forward.real.to(k.device)
    q_real = k_real
    if not given.fresh:
        stored_k, stored_v, k_columns, k_real = layer.gathered()
        if given.stand_in:
            k, v = stored_k, stored_v
        elif k_columns.ndim == 3 and k.shape[1] != k_columns.shape[1]:
            k_columns = k_columns.repeat_interleave(k.shape[1] // k_columns.shape[1], 1)
            k_real = None if k_real is None else k_real.repeat_interleave(k.shape[1] // k_real.shape[1], 1)
    call = AttentionCall(
        q=q,
        k=k,
        v=v,
        q_columns=forward.q_columns,
        k_columns=k_columns,
        recipe=logits.recipe,
        scale=logits.scale,
        layer=layer.number,
        k_real=k_real,
        q_real=q_real,
        softcap=logits.softcap,
        sinks=logits.sinks,
        pattern=None if store.sealed else store.plan.prefill.pattern(layer.number),
        position_of=store.position_of(q.device),
        fresh=given.fresh,
    )
    out = run_call(call)
    for listener in owner.listeners:
        listener(call)
    needs = store.needs(layer.number)
    if layer.limits is not None and now.n == 1:
        layer.step(store.plan.cache, q, call)
    elif needs.any:
        layer.watch(call, needs)
    return out


def _source(store: KVStore, key: Tensor) -> tuple[KVLayer | None, Given | None]:
    """Which layer's cache this key comes from: the one that handed it out, or the one just updated, if not yet used."""
    given = store.forward.given
    for layer, one in reversed(given):
        if one.k() is key:
            return layer, one
    if given and not given[-1][1].stand_in:
        return given[-1]
    return None, None


def _loose(owner: Attached, now: Pass, q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> AttentionCall:
    """Attention over keys that no store of ours holds: no cache asked for, a model's own cache, cross-attention."""
    n, m = q.shape[2], k.shape[2]
    recipe = logits.recipe
    sees_all = recipe.mask_function is bidirectional_mask_function  # an image tower, an encoder: no prompt
    q_columns = torch.arange(recipe.q_offset, recipe.q_offset + n, device=q.device)
    k_columns = torch.arange(recipe.k_offset, recipe.k_offset + m, device=q.device)
    real = q_real = None
    if recipe.padding is not None:
        padding = torch.nn.functional.pad(
            recipe.padding.bool(), (0, max(0, recipe.k_offset + m - recipe.padding.shape[1]))
        )
        real = padding[:, recipe.k_offset : recipe.k_offset + m]
        real = None if bool(real.all()) else real
    fresh = n == m and recipe.q_offset == recipe.k_offset
    if fresh:
        q_real = real
    return AttentionCall(
        q=q,
        k=k,
        v=v,
        q_columns=q_columns,
        k_columns=k_columns,
        recipe=recipe,
        scale=logits.scale,
        layer=-1,
        k_real=real,
        q_real=q_real,
        softcap=logits.softcap,
        sinks=logits.sinks,
        pattern=owner.plan.prefill.pattern(now.reached - 1) if fresh and n > 1 and not sees_all else None,
        position_of=None if real is None or not fresh else (real.cumsum(1) - 1).clamp_min(0),
        fresh=fresh,
    )


def _unmasked(module: nn.Module, drawn: Tensor | None, others: dict[str, Any]) -> MaskRecipe:
    """The recipe where the model passes no mask of ours."""
    if drawn is not None:
        raise AttachError(f"{type(module).__name__} draws a mask of its own, {tuple(drawn.shape)}: it cannot be routed")
    causal = others.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal:  # a tower of images: tokens' padding and offset are none of its own
        return MaskRecipe(bidirectional_mask_function, causal=False)
    owner = OWNERS[module]
    now = owner.passes.current
    assert now is not None
    offset = 0 if now.store is None else now.store.forward.offset
    return MaskRecipe(causal_mask_function, padding=now.padding, q_offset=offset, causal=True)


def _check(module: nn.Module, others: dict[str, Any]) -> None:
    if others.get("output_attentions"):
        raise UnsupportedError("output_attentions=True: attention maps are never materialised while attached")
    for name, value in others.items():
        if name in HARMLESS or value is None or value is False:
            continue
        if name in ("position_bias", "head_mask", "cache", "attention_bias"):
            raise AttachError(f"{type(module).__name__} passes `{name}` to attention, which the seam does not take")
        warnings.warn(f"regard: {type(module).__name__} passes `{name}` to attention; it is ignored", stacklevel=3)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
