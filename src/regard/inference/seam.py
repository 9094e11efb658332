"""`attach`: put the seam into a pretrained model, and take it out again without a trace."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from regard.errors import ArgumentError, AttachError, RegardError, StoreError, UnsupportedError
from regard.inference import persist
from regard.inference.cache import KVLayer
from regard.inference.call import AttentionCall, MaskRecipe
from regard.inference.compose import Scoped, parts_of
from regard.inference.hybrid import HybridKVLayer
from regard.inference.interface import NAME, OWNERS, Pass, Passes
from regard.inference.plan import Plan
from regard.inference.policy import Needs
from regard.inference.store import KVStore

PLAIN_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer")
HYBRID_LAYERS = ("LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer")


def attach(model: nn.Module, plan: Plan | str = "full", *, observe: Sequence[Plan | str] = ()) -> Attached:
    """Serve `model` under `plan` until the context ends or `detach()` is called.

    model: a transformers decoder, or a wrapper of one (PEFT). plan: see `regard.Plan`. observe: further plans that a
    store
    may be forked to after a prompt under this one. While attached, `model(...)` and `model.generate(...)` work as
    always
    and keep the past in a `KVStore`.

    Raises AttachError for a model whose attention does not go through transformers' AttentionInterface, for one already
    attached, and for a plan that the model cannot serve; the model is then as it was.

        with regard.attach(model, "snapkv(budget=512)"):
            model.generate(**inputs, max_new_tokens=64)
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", repr(model), "a transformers model, or a wrapper of one; not its name")
    return Attached(model, _plan(plan), [_plan(p) for p in observe])


class Attached:
    """A model under a plan; a context manager. Made by `attach`."""

    def __init__(self, model: nn.Module, plan: Plan, observe: Sequence[Plan] = ()) -> None:
        self.model, self.plan = model, plan
        self.observe = (plan, *observe)
        self.passes = Passes()
        self.listeners: list[Callable[[AttentionCall], None]] = []
        """Called with every AttentionCall of several tokens, after it was executed: what probes are built on."""
        self._root = _decoder(model)
        self._names = inspect.signature(self._root.forward)
        self._hooks: list[Any] = []
        self._configs: list[tuple[nn.Module, PreTrainedConfig]] = []
        self._stores: WeakKeyDictionary[Cache, KVStore] = WeakKeyDictionary()
        self._direct: list[bool] = []
        self._own_cache = False
        for module in self._root.modules():
            if module in OWNERS:
                raise AttachError(
                    f"{type(self._root).__name__} is attached already, to {OWNERS[module].plan}; detach it first"
                )
        try:
            self._put_in()
            self._probe()
        except BaseException:
            self.detach()
            raise

    # ---- in and out

    def _put_in(self) -> None:
        """Each module's configuration is exchanged for a copy that names our attention; two hooks frame each
        forward."""
        copies: dict[int, Any] = {}
        for module in self.model.modules():
            config = module.__dict__.get("config")
            if isinstance(config, PreTrainedConfig):
                self._configs.append((module, config))
                module.config = copy.deepcopy(config, copies)
        for module, _ in self._configs:
            for config in _with_parts(module.config):
                config._attn_implementation_internal = NAME
        for module in self._root.modules():
            OWNERS[module] = self
        self._hooks = [
            self._root.register_forward_pre_hook(self._before, with_kwargs=True),
            self._root.register_forward_hook(self._after, always_call=True),
        ]

    def detach(self) -> None:
        """Undo everything. Stores made meanwhile keep their content but can be filled no more."""
        for hook in self._hooks:
            hook.remove()
        for module, config in self._configs:
            module.config = config
        for module in self._root.modules():
            if OWNERS.get(module) is self:
                del OWNERS[module]
        self._hooks, self._configs = [], []
        self.passes.current = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Reached through the hooks of a model that is copied or pickled."""
        raise AttachError(f"{type(self._root).__name__} is attached to {self.plan}: detach it before copying it")

    def __enter__(self) -> Attached:
        if not self._hooks:
            raise AttachError("this attachment was detached: attach the model again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # ---- stores

    def new_store(self) -> KVStore:
        """An empty store for a prompt of this model."""
        if self._own_cache:
            raise AttachError(
                f"{type(self._root).__name__} insists on a cache class of its own: only prefill parts apply"
            )
        return KVStore(self)

    def load_store(self, path: str | Path) -> KVStore:
        """A store saved by `store.save(path)` under the same model and plan. StoreError when it does not fit."""
        return persist.load(self, path)

    @property
    def device(self) -> torch.device:
        """Where tokens go in."""
        return self._root.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self._root.dtype

    @property
    def fingerprint(self) -> str:
        """Names the model in saved stores: its class and a digest of its configuration."""
        config = self._root.config.to_dict()
        for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "_attn_implementation"):
            config.pop(name, None)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return f"{type(self._root).__name__}-{digest}"

    def needs(self, layer: int) -> Needs:
        """What must be observed of a prompt in that layer, for the plan and for those it may fork to."""
        total = Needs()
        for plan in self.observe:
            total = total | plan.cache.needs_at(layer)
        return total

    def make_layers(self, store: KVStore) -> list[Any]:
        """Our layers where transformers' cache for this model has attention layers, its own layers elsewhere."""
        template = DynamicCache(config=self._root.config.get_text_config(decoder=True))
        layers: list[Any] = []
        number = 0
        for layer in template.layers:
            kind = type(layer).__name__
            if kind in PLAIN_LAYERS or kind in HYBRID_LAYERS:
                direct = self._direct[number] if number < len(self._direct) else False
                window = getattr(layer, "sliding_window", None)
                if kind in PLAIN_LAYERS:
                    layers.append(KVLayer(store, number, direct, window))
                else:
                    states = getattr(layer, "number_of_states", 1)
                    layers.append(HybridKVLayer(store, number, direct, window, states))
                number += 1
            elif isinstance(layer, CacheLayerMixin):
                raise AttachError(f"{type(self._root).__name__} caches in a {kind}, which the seam does not replace")
            else:
                layers.append(layer)
        return layers

    # ---- a forward

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Put our store where the model, or generate(), would put its own."""
        if self.passes.current is not None:
            raise AttachError("this model is already inside a forward in this thread")
        given, positional = kwargs, list(self._names.parameters)[: len(args)]
        if args:
            given = {**self._names.bind_partial(*args, **kwargs).arguments, **kwargs}
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if tokens is None:
            raise ArgumentError("input_ids", None, "token ids (B, N) or inputs_embeds (B, N, C)")
        if self._root.training and torch.is_grad_enabled() and self._root.is_gradient_checkpointing:
            raise UnsupportedError(
                "gradient checkpointing: layers are run again after the forward, where no attachment serves them; call "
                "model.gradient_checkpointing_disable() first"
            )
        if given.get("output_attentions"):
            raise ArgumentError(
                "output_attentions", True, "False: attention maps are never materialised while attached"
            )
        mask = given.get("attention_mask")
        if isinstance(mask, MaskRecipe):
            mask.contiguous()  # drawn ahead by generate(), for a static cache: refused
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ArgumentError("attention_mask", _kind(mask), "a (B, columns) mask of real tokens, or None")
        if torch.is_autocast_enabled(tokens.device.type):
            raise UnsupportedError("torch.autocast: keys and values come in different dtypes; cast the model itself")
        batch, n = tokens.shape[:2]
        if n == 0 or batch == 0:
            raise ArgumentError("input_ids", f"shape {tuple(tokens.shape)}", "at least one row and one token")
        store = self._store(given, tokens)
        if store is None:
            padding = None if mask is None else mask.bool()
        else:
            forward = store.begin(batch, n, mask, tokens.device)
            padding = None if mask is None or (forward.real is None and store.real is None) else mask.bool()
            kwargs = {**kwargs, "past_key_values": store}
            if "past_key_values" in positional:  # positional ones from it on go by name
                at = positional.index("past_key_values")
                kwargs |= dict(zip(positional[at + 1 :], args[at + 1 :], strict=True))
                args = args[:at]
        self.passes.current = Pass(store, batch, n, padding)
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        now, self.passes.current = self.passes.current, None
        if now is not None and now.store is not None:
            now.store.end(failed=output is None)

    def _store(self, given: dict[str, Any], tokens: Tensor) -> KVStore | None:
        cache = given.get("past_key_values")
        use = given.get("use_cache")
        if self._own_cache:
            return None
        if isinstance(cache, KVStore):
            if cache.caching_layers != len(self._direct) or cache.attached is not self:
                raise StoreError("past_key_values: this store was made for another attachment")
            return cache
        if cache is None:
            wanted = getattr(self._root.config, "use_cache", True) if use is None else use
            return self.new_store() if wanted else None
        if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
            raise ArgumentError(
                "past_key_values", type(cache).__name__, "None, a DynamicCache in memory, or a store of ours"
            )
        if cache in self._stores:
            return self._stores[cache]
        if cache.get_seq_length() > 0:
            raise ArgumentError(
                "past_key_values", "a DynamicCache that was filled elsewhere", "an empty one, or a store of ours"
            )
        self._stores[cache] = self.new_store()
        if any(getattr(layer, "record_past", False) for layer in cache.layers):
            self._stores[cache].activate_past_recording()
        return self._stores[cache]

    # ---- is it reached?

    def _probe(self) -> None:
        """Two tokens through the model: does its attention reach us, does it take keys as the store hands them out?"""
        name = type(self._root).__name__
        refusal: Exception | None = None
        try:
            now = self._try()
        except RegardError:
            raise
        except Exception as first:
            refusal = first
            self._own_cache = True  # perhaps it insists on a cache class of its own
            try:
                now = self._try()
            except Exception:
                raise AttachError(
                    f"{name} does not run on transformers' attention interface: with it set, a forward raises "
                    f"{type(first).__name__}: {first}"
                ) from first
        if not now.reached:
            raise AttachError(
                f"{name}: its attention never asks transformers' AttentionInterface, "
                "so setting it would silently change nothing"
            )
        if now.store is not None:
            self._read_probe(now.store, now)
        elif any(plan.cache != Plan().cache or plan.decode != Plan().decode for plan in self.observe):
            raise AttachError(
                f"{name} insists on a cache class of its own: only prefill parts apply, not {self.plan}"
            ) from refusal
        if self._own_cache:
            warnings.warn(
                f"regard: {name} does not run on our store ({type(refusal).__name__}: {refusal}); it keeps a cache of "
                "its own, and only the plan's prefill part applies",
                stacklevel=4,
            )

    def _try(self) -> Pass:
        """One forward in eval mode, without gradients or a trace in random generators; what it met."""
        root = self._root
        device = root.get_input_embeddings().weight.device
        tokens = torch.ones(1, 2, dtype=torch.long, device=device)
        modes = [(module, module.training) for module in root.modules()]
        passes: list[Pass | None] = []
        hook = root.register_forward_hook(lambda *_: passes.append(self.passes.current), prepend=True)
        root.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                root(input_ids=tokens, use_cache=True)
        finally:
            hook.remove()
            for module, mode in modes:
                module.training = mode
        assert passes[-1] is not None
        return passes[-1]

    def _read_probe(self, store: KVStore, now: Pass) -> None:
        name = type(self._root).__name__
        updated = {layer.number for layer in store.kv_layers if layer.storage is not None}
        silent = updated - {layer.number for layer, _, _ in now.handed}
        if silent:
            raise AttachError(
                f"{name}: {len(silent)} of {len(updated)} layers with a cache do not reach the attention function"
            )
        direct = dict.fromkeys(range(store.caching_layers), True)
        for layer, as_handed, recipe in now.handed:
            direct[layer.number] = direct[layer.number] and as_handed
            if layer.sliding_window is not None and recipe.causal:
                raise AttachError(
                    f"{name}: its window of {layer.sliding_window} exists only in the cache it makes, not in its mask, "
                    "and would be lost"
                )
        self._direct = [direct[i] for i in range(store.caching_layers)]
        for layer in store.kv_layers:
            layer.direct = self._direct[layer.number]
        self._check_plans(store)

    def _check_plans(self, store: KVStore) -> None:
        """Refuse what this model cannot serve: heads apart where the cache has none, tables of another shape."""
        layers = store.kv_layers
        heads = [0 if layer.storage is None else layer.storage.heads for layer in layers]
        for plan in self.observe:
            plan.check()
            for part in parts_of(plan.cache):
                policy, scope = (part.policy, part.scope) if isinstance(part, Scoped) else (part, None)
                apart = policy.per_head or (scope is not None and scope.heads is not None)
                latent = [layer.number for layer in layers if not layer.direct and heads[layer.number] == 1]
                if apart and latent:
                    raise AttachError(
                        f"{plan}: layers {latent} cache one latent for all heads, "
                        "so heads cannot keep different entries"
                    )
                part.check_model(heads)


def _plan(plan: Plan | str) -> Plan:
    return plan if isinstance(plan, Plan) else Plan.parse(plan)


def _decoder(model: nn.Module) -> PreTrainedModel:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            if module.config.is_encoder_decoder:
                raise AttachError(f"{type(module).__name__} is an encoder-decoder: the seam serves decoders")
            return module
    raise ArgumentError("model", type(model).__name__, "a transformers model, or a wrapper of one")


def _with_parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    parts = [config]
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            parts.extend(_with_parts(value))
    return parts


def _kind(value: Any) -> str:
    return (
        f"{type(value).__name__} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    )
