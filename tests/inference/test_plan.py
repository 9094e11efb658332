"""Plans and their text and JSON forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard import registry
from regard.errors import ArgumentError, UnknownNameError
from regard.inference.budget import Budget
from regard.inference.compose import Composed, Scope, Scoped
from regard.inference.head_table import HeadTable
from regard.inference.plan import Plan
from regard.inference.plan_text import Call, read, write
from regard.inference.policies.duoattention import DuoAttention
from regard.inference.policies.full import Full
from regard.inference.policies.h2o import H2O
from regard.inference.policies.keydiff import KeyDiff
from regard.inference.policies.knorm import KeyNorm
from regard.inference.policies.random import Random
from regard.inference.policies.snapkv import SnapKV
from regard.inference.policies.streaming import Streaming
from regard.inference.policies.tova import Tova
from regard.inference.policy import CachePolicy
from regard.inference.prefill import FullPrefill, StreamingPrefill
from regard.registry import register

# ---- random plans

budgets = st.none() | st.integers(64, 10**9) | st.floats(1e-9, 1.0) | st.sampled_from(["64MiB", "1.5 GB", "3 B"])
table_rows = st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=3).map(tuple)
policies = st.one_of(
    st.just(Full()),
    st.builds(Streaming, budgets, sinks=st.integers(0, 63)),
    st.builds(
        SnapKV,
        budgets,
        window=st.integers(1, 64),
        kernel=st.sampled_from([1, 7]),
        pooling=st.sampled_from(["max", "average"]),
    ),
    *(st.builds(make, budgets) for make in (H2O, Tova, KeyNorm, KeyDiff)),
    st.builds(Random, budgets, seed=st.integers(0, 10**20)),
    st.builds(DuoAttention, table_rows, budget=budgets, sinks=st.integers(0, 9), recent=st.integers(1, 9)),
    st.builds(DuoAttention, table_rows, sparsity=st.floats(0, 1)),
)
span = st.tuples(st.integers(0, 99), st.none() | st.integers(0, 99)).map(
    lambda pair: (pair[0], None if pair[1] is None else pair[0] + pair[1])
)
ranges = st.lists(span, min_size=1, max_size=3).map(tuple)
scoped = st.builds(Scoped, policies, st.builds(Scope, ranges, st.none() | ranges))
chains = st.lists(policies | scoped, min_size=1, max_size=3).map(lambda p: p[0] if len(p) == 1 else Composed(tuple(p)))
prefills = st.just(FullPrefill()) | st.builds(StreamingPrefill, st.integers(0, 9), st.integers(1, 9))
plans = st.builds(Plan, prefill=prefills, cache=chains)


@given(plans)
@settings(max_examples=80, deadline=None)
def test_a_plan_survives_its_text_and_its_json(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan
    assert Plan.parse(plan.label) == plan
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)


@given(st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True), values, max_size=3))
@settings(max_examples=60, deadline=None)
def test_every_value_survives_its_text(given_settings: dict[str, object]) -> None:
    (call,) = read(write(Call("name", given_settings)))[""]
    assert repr(call.settings) == repr(given_settings), "by repr: 1, 1.0 and True differ"


@given(st.text(st.characters(codec="utf-8"), max_size=30) | st.text("snapkv(budget=8)@0-.+;[]'\" ", max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_other_text_is_an_argument_error(text: str) -> None:
    try:
        Plan.parse(text)
    except ArgumentError:
        pass


# ---- what the text means


def test_bare_names_parts_and_defaults() -> None:
    assert Plan.parse("full") == Plan() and str(Plan()) == "full"
    assert Plan.parse("snapkv(budget=512)") == Plan(cache=SnapKV(512))
    assert Plan.parse(" decode = full ; cache = h2o ( budget = 0.5 , ) ") == Plan(cache=H2O(0.5))
    assert Plan.parse("prefill=streaming(window=8)") == Plan(prefill=StreamingPrefill(window=8))
    assert str(Plan(cache=H2O(0.5))) == "cache=h2o(budget=0.5)" and Plan(cache=H2O(0.5)).label == "h2o(budget=0.5)"
    assert Plan.parse("knorm(budget='64MiB')") == Plan.parse("knorm(budget=64MiB)") == Plan(cache=KeyNorm("64MiB"))
    assert Plan.parse(Plan(cache=H2O(9))) == Plan(cache=H2O(9))


def test_scopes_and_compositions() -> None:
    plan = Plan.parse("full@0-1+snapkv(budget=256)@2-.0,3-+knorm(budget=9)")
    assert plan.cache == Composed(
        (
            Scoped(Full(), Scope(((0, 1),))),
            Scoped(SnapKV(256), Scope(((2, None),), ((0, 0), (3, None)))),
            KeyNorm(9),
        )
    )
    assert str(plan) == "cache=full@0-1+snapkv(budget=256)@2-.0,3-+knorm(budget=9)"
    assert Composed((Composed((Full(), H2O(2))), Tova(1))) == Composed((Full(), H2O(2), Tova(1)))


def test_a_preset_is_a_plan_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))

    @register("test-preset", kind="preset")
    def test_preset(window: int = 9) -> Plan:
        return Plan(StreamingPrefill(window=window), Streaming(64))

    assert Plan.parse("test-preset(window=7)") == Plan(StreamingPrefill(window=7), Streaming(64))
    with pytest.raises(UnknownNameError, match="setting of test-preset: got 'windw'; allowed: did you mean window"):
        Plan.parse("test-preset(windw=7)")
    with pytest.raises(ArgumentError, match="a preset that stands alone"):
        Plan.parse("test-preset+full")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapk", "plan: got 'snapk'; allowed: did you mean snapkv"),
        ("cache=h20(budget=3)", "cache: got 'h20'; allowed: did you mean h2o"),
        ("prefill=h2o", "prefill: got 'h2o'; allowed: known: full, .*streaming"),
        ("decode=fast", "decode: got 'fast'; allowed: known: full"),
        ("snapkv(windw=3)", "setting of snapkv: got 'windw'; allowed: did you mean window"),
        ("full(budget=3)", "setting of full: got 'budget'"),
        ("snapkv(budget=0)", "budget: got 0; allowed"),
        ("snapkv(budget=12 parsecs)", "character 18, instead of 'p': ',' or '\\)'"),
        ("snapkv(budget=[1])", r"budget: got \(1,\); allowed"),
        ("snapkv(window=wide)", r"SnapKV\.window: got 'wide'; allowed: an int ≥ 1"),
        ("snapkv(window=[])", r"SnapKV\.window: got \(\)"),
        ("snapkv(pooling=3)", r"SnapKV\.pooling: got 3; allowed: 'max' or 'average'"),
        ("prefill=streaming(window=0)", r"StreamingPrefill\.window: got 0"),
        ("duoattention(table=3)", "head table scores: got 3"),
        ("duoattention(table=[[a]])", r"head table scores of layer 0: got \('a',\)"),
        ("snapkv(budget=", "character 15, instead of the end: a value"),
        ("snapkv(budget=3,budget=4)", "character 17, instead of 'b': each setting at most once"),
        ("snapkv(3)", "character 8, instead of '3': a setting's name"),
        ("snapkv(budget=__import__('os'))", r"character 25, instead of '\(': ',' or '\)'"),
        ("snapkv(budget=1+1)", "budget: got '1\\+1'; allowed"),
        ("snapkv(budget='3", "a closed quotation"),
        ('snapkv(budget="\\x")', "with the escapes of JSON"),
        (f"knorm(budget={'[' * 50})", "lists at most 8 deep"),
        ("", "character 1, instead of the end: a name"),
        ("full)", r"character 5, instead of '\)'"),
        ("full@", "instead of the end: layers such as"),
        ("full@3-1", "character 6, instead of '3': layers such as"),
        ("cache=full;cash=full", "character 12, instead of 'c': one of prefill, cache, decode"),
        ("cache=full;cache=full", "each at most once; got 'cache'"),
        ("cache=full decode=full", "character 12, instead of 'd': ';', '\\+', or the end"),
        ("prefill=full+streaming", r"plan\.prefill: got full\+streaming; allowed: one part"),
        ("prefill=streaming@0-1", r"plan\.prefill: got streaming@0-1; allowed: no @scope"),
    ],
)
def test_mistakes_are_named_and_placed(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Plan.parse(text)


def test_parts_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"plan\.cache: got 'h2o'; allowed: a CachePolicy"):
        Plan(cache="h2o")  # type: ignore[arg-type]

    class Mine(CachePolicy):
        budget = None

    with pytest.raises(ArgumentError, match=r"plan\.cache: .* a registered cache part"):
        str(Plan(cache=Scoped(Mine(), Scope.parse("0"))))


# ---- budgets filled in


def test_with_budget_fills_in_only_what_has_none() -> None:
    plan = Plan.parse("full@0+snapkv@1-+knorm(budget=9)+duoattention(table=[[1]],sparsity=0.5)").with_budget("0.5")
    assert plan == Plan.parse("full@0+snapkv(budget=0.5)@1-+knorm(budget=9)+duoattention(table=[[1]],sparsity=0.5)")
    assert Plan.parse("h2o").with_budget(7).cache == H2O(7)
    assert Plan().with_budget(7) == Plan()
    with pytest.raises(ArgumentError, match=r"SnapKV\.window: got 16; allowed: at most the budget of 8"):
        Plan.parse("snapkv").with_budget(8)


def test_check_refuses_a_policy_without_its_budget() -> None:
    for text in ("snapkv", "full+snapkv@0-", "duoattention(table=[[1]])"):
        with pytest.raises(ArgumentError, match=r"budget: got None; allowed: an int ≥ 1 .*\(budget=512\)"):
            Plan.parse(text).check()
    for text in ("full", "snapkv(budget=64)", "duoattention(table=[[1]],sparsity=1)"):
        assert Plan.parse(text).check() == Plan.parse(text)
    assert SnapKV(64).budget == Budget(64)


# ---- files


def test_a_plan_is_saved_and_loaded(tmp_path: Path) -> None:
    plan = Plan.parse("prefill=streaming;cache=full@0-1+snapkv(budget=0.25)@2-.1")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[1, 2]",
        b'{"regard_head_table": 1}',
        b'{"regard_plan": 2}',
        b'{"regard_plan": 1, "cash": []}',
        b'{"regard_plan": 1, "cache": []}',
        b'{"regard_plan": 1, "cache": {"name": "full"}}',
        b'{"regard_plan": 1, "cache": [{"name": "fulll"}]}',
        b'{"regard_plan": 1, "cache": [{"name": "h2o", "settings": [3]}]}',
        b'{"regard_plan": 1, "cache": [{"name": "h2o", "settings": {"budget": {}}}]}',
        b'{"regard_plan": 1, "cache": [{"name": "h2o", "settings": {"bugdet": 3}}]}',
        b'{"regard_plan": 1, "cache": [{"name": "h2o", "scope": 3}]}',
        b'{"regard_plan": 1, "cache": [{"name": "h2o", "scope": "-3"}]}',
        b'{"regard_plan": 1, "decode": "full"}',
    ],
)
def test_a_corrupted_or_foreign_plan_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(
        ArgumentError, match=r"^plan file: got .*plan\.json; allowed: a JSON file that Plan\.save wrote"
    ):
        Plan.load(path)


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"plan file: got .*none\.json"):
        Plan.load(tmp_path / "none.json")


def test_head_tables_are_saved_and_loaded(tmp_path: Path) -> None:
    table = HeadTable(((0.5, 1.0), (2.0, -1.0)), model="tiny", made_by="hand")
    table.save(tmp_path / "table.json")
    (tmp_path / "table.tsv").write_text("0.5\t1\n2\t-1\n")
    assert HeadTable.load(tmp_path / "table.json") == table
    assert HeadTable.load(tmp_path / "table.tsv").scores == table.scores
    assert table.shape == (2, 2) and table.ranked == [(1, 0), (0, 1), (0, 0), (1, 1)]
    plan = Plan.parse(f"duoattention(table='{tmp_path / 'table.json'}',sparsity=0.5)")
    assert Plan.parse(str(plan)) == plan and plan.cache.heads == table  # type: ignore[attr-defined]
    assert DuoAttention(table=table, sparsity=0.5) == DuoAttention(table=table.scores, sparsity=0.5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", '{"regard_plan": 1}'),
        ("t.json", '{"regard_head_table": 1, "scores": [[1], [1, 2]]}'),
        ("t.json", '{"regard_head_table": 1, "scores": [[NaN]]}'),
        ("t.json", '{"regard_head_table": 1, "scores": []}'),
        ("t.json", "{"),
        ("t.tsv", "1 2\n3 x"),
        ("t.tsv", ""),
        ("t.txt", "1 2"),
    ],
)
def test_a_corrupted_or_foreign_head_table_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ArgumentError, match=rf"^head table: got .*{name}'; allowed: a \.json or \.tsv file"):
        HeadTable.load(tmp_path / name)


# ---- prefill


def test_streaming_prefill_is_the_lambda_pattern() -> None:
    n, pattern = 12, StreamingPrefill(sinks=2, window=3).pattern(0)
    assert pattern is not None
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    zero = torch.zeros(1, 1, dtype=torch.long)
    seen = pattern.rule(zero, zero, i, j)
    assert seen.tolist() == [[b <= a and (b < 2 or b > a - 3) for b in range(n)] for a in range(n)]
    assert FullPrefill().pattern(0) is None
