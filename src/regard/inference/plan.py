"""What an attached model does, in three independent parts: prefill, cache, decode."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from inspect import signature
from pathlib import Path
from typing import Any, cast

import regard.inference.policies  # noqa: F401  — registers the cache policies
from regard.errors import ArgumentError, UnknownNameError, require
from regard.inference.budget import ALLOWED, Budget
from regard.inference.compose import Composed, Scope, Scoped, parts_of
from regard.inference.decode import Decode, FullDecode
from regard.inference.plan_text import PARTS, Call, read, write
from regard.inference.policies.full import Full
from regard.inference.policy import CachePolicy
from regard.inference.prefill import FullPrefill, Prefill
from regard.registry import Kind, entries, lookup

FORMAT = 1
_BARE: tuple[Kind, ...] = ("preset", "cache")  # what a bare name may be


@dataclass(frozen=True)
class Plan:
    """How the prompt attends (`prefill`), what is kept (`cache`), how a new token attends to it (`decode`).

    Text form: `prefill=NAME(key=v);cache=NAME(…)@LAYERS.HEADS+NAME(…);decode=NAME`. A part left out is `full`; a bare
    `NAME(key=v)` is a preset of that name or a cache policy: `snapkv(budget=512)`. `Plan.parse(str(plan)) == plan`.
    The grammar stands in `plan_text`.
    """

    prefill: Prefill = field(default_factory=FullPrefill)
    cache: CachePolicy = field(default_factory=Full)
    decode: Decode = field(default_factory=FullDecode)

    def __post_init__(self) -> None:
        for name, kind in (("prefill", Prefill), ("cache", CachePolicy), ("decode", Decode)):
            part = getattr(self, name)
            require(isinstance(part, kind), f"plan.{name}", repr(part), f"a {kind.__name__}; text is for Plan.parse")

    @classmethod
    def parse(cls, text: str | Plan) -> Plan:
        """From its text form; a plan comes back as it is. Raises ArgumentError, naming the nearest names."""
        if isinstance(text, Plan):
            return text
        parts = read(text)
        if "" not in parts:
            return _assemble(parts)
        chain = parts[""]
        first = chain[0]
        if any(entry.key == first.name for entry in entries("preset")):
            require(len(chain) == 1 and first.scope is None, "plan", repr(text), "a preset that stands alone, unscoped")
            return cast(Plan, _make("preset", first))
        if len(chain) == 1:
            known = {entry.key for kind in _BARE for entry in entries(kind)}
            if first.name not in known:
                raise UnknownNameError("plan", first.name, known)
        return _assemble({"cache": chain})

    def __str__(self) -> str:
        said = {"prefill": [_call("prefill", self.prefill)], "cache": _calls(self.cache)}
        said["decode"] = [_call("decode", self.decode)]
        parts = [f"{name}={'+'.join(map(write, calls))}" for name, calls in said.items() if calls != [Call("full")]]
        return ";".join(parts) or "full"

    @property
    def label(self) -> str:
        """A short name for tables: the cache part alone where the other parts are full."""
        text = str(self)
        bare = text.removeprefix("cache=") if ";" not in text else text
        preset = any(bare.split("(")[0] == entry.key for entry in entries("preset"))
        return text if preset else bare

    def with_budget(self, budget: Budget | int | float | str) -> Plan:
        """The same plan, its cache policies that have no budget yet given this one."""
        parts = [_with_budget(part, Budget.parse(budget)) for part in parts_of(self.cache)]
        return replace(self, cache=parts[0] if len(parts) == 1 else Composed(tuple(parts)))

    def check(self) -> Plan:
        """The plan itself; ArgumentError when a cache policy still lacks its budget."""
        for part in parts_of(self.cache):
            inner = part.policy if isinstance(part, Scoped) else part
            if inner.lacks_budget:
                example = f"{_name('cache', inner)}(budget=512)"
                raise ArgumentError(f"{_name('cache', inner)}.budget", None, f"{ALLOWED}; e.g. {example}")
        return self

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` gives the plan back."""
        return {
            "regard_plan": FORMAT,
            "prefill": _to_json(_call("prefill", self.prefill)),
            "cache": [_to_json(call) for call in _calls(self.cache)],
            "decode": _to_json(_call("decode", self.decode)),
        }

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """From what `to_json` gave. Raises ArgumentError when it is not a plan."""
        form = data.get("regard_plan") if isinstance(data, dict) else None
        require(form == FORMAT, "plan", _short(data), f"a JSON object with regard_plan = {FORMAT}")
        strange = set(data) - {"regard_plan", *PARTS}
        require(not strange, "plan", sorted(map(str, strange)), f"only the keys regard_plan, {', '.join(PARTS)}")
        parts: dict[str, list[Call]] = {}
        for name in PARTS:
            if name in data:
                items = data[name] if name == "cache" else [data[name]]
                require(isinstance(items, list) and bool(items), f"plan.{name}", _short(items), "a list of policies")
                parts[name] = [_from_json(f"plan.{name}", item) for item in items]
        return _assemble(parts)

    def save(self, path: str | Path) -> None:
        """Write the JSON form."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote. Raises ArgumentError naming the file when it is missing, corrupted or foreign."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ArgumentError("plan file", path, f"a JSON file that Plan.save wrote ({error})") from error
        try:
            return cls.from_json(data)
        except ArgumentError as error:
            raise ArgumentError("plan file", path, f"a JSON file that Plan.save wrote ({error})") from error


def _assemble(parts: Mapping[str, Sequence[Call]]) -> Plan:
    made: dict[str, Any] = {}
    for name, calls in parts.items():
        if name == "cache":
            chain = [_scoped(call) for call in calls]
            made[name] = chain[0] if len(chain) == 1 else Composed(tuple(chain))
            continue
        require(len(calls) == 1, f"plan.{name}", "+".join(map(write, calls)), "one part; only cache parts compose")
        require(calls[0].scope is None, f"plan.{name}", write(calls[0]), "no @scope; only cache parts have one")
        made[name] = _make(cast(Kind, name), calls[0])
    return Plan(**made)


def _scoped(call: Call) -> CachePolicy:
    policy = cast(CachePolicy, _make("cache", call))
    return policy if call.scope is None else Scoped(policy, call.scope)


def _make(kind: Kind, call: Call) -> Any:
    factory = lookup(kind, call.name).factory
    known = list(signature(factory).parameters)
    for key in call.settings:
        if key not in known:
            raise UnknownNameError(f"setting of {call.name}", key, known)
    try:
        return factory(**call.settings)
    except TypeError as error:  # a value of a type that the factory cannot read
        raise ArgumentError(call.name, dict(call.settings), f"values that its settings take ({error})") from error


def _name(kind: Kind, part: object) -> str:
    for entry in entries(kind):
        if entry.factory is type(part):
            return entry.key
    raise ArgumentError(f"plan.{kind}", repr(part), f"an instance of a registered {kind} part")


def _call(kind: Kind, part: Any, scope: Scope | None = None) -> Call:
    name, settings = _name(kind, part), {}
    for each in fields(part):
        value = getattr(part, each.name)
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if value != default or type(value) is not type(default):
            settings[each.name] = value.value if isinstance(value, Budget) else value
    return Call(name, settings, scope)


def _calls(cache: CachePolicy) -> list[Call]:
    return [
        _call("cache", part.policy, part.scope) if isinstance(part, Scoped) else _call("cache", part)
        for part in parts_of(cache)
    ]


def _with_budget(part: CachePolicy, budget: Budget | None) -> CachePolicy:
    if isinstance(part, Scoped):
        return replace(part, policy=_with_budget(part.policy, budget))
    return replace(cast(Any, part), budget=budget) if part.lacks_budget else part


def _to_json(call: Call) -> dict[str, Any]:
    out: dict[str, Any] = {"name": call.name}
    if call.settings:
        out["settings"] = dict(call.settings)
    if call.scope is not None:
        out["scope"] = str(call.scope)
    return out


def _from_json(where: str, item: Any) -> Call:
    known = isinstance(item, dict) and set(item) <= {"name", "settings", "scope"} and isinstance(item.get("name"), str)
    require(known, where, _short(item), 'an object with "name" and optionally "settings" and "scope"')
    settings, scope = item.get("settings", {}), item.get("scope")
    require(isinstance(settings, dict), f"{where}.settings", _short(settings), "an object")
    require(scope is None or isinstance(scope, str), f"{where}.scope", _short(scope), "text such as 0-3")
    values = {key: _tuples(value) for key, value in settings.items()}
    return Call(item["name"], values, None if scope is None else Scope.parse(scope))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
