from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from inferctl.bench.load import target
from inferctl.bench.plan import plan, sections, shape, workload
from inferctl.config.spec_types import Section
from inferctl.core.errors import SpecError, UsageError


def write_plan(folder: Path, text: str) -> str:
    file = folder / "mine.yaml"
    file.write_text(text)
    return str(file)


ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
PLANS = sorted(file.stem for file in (ROOT / "benchmarks" / "plans").glob("*.yaml"))


@pytest.mark.parametrize("name", PLANS)
def test_every_shipped_plan_is_in_the_table_of_plans(name: str) -> None:
    table = GUIDE.partition("\n## Plans\n")[2].partition("\n## ")[0]
    assert f"\n| `{name}` |" in table


NAMED = [each for module in (plan, shape, sections) for each in vars(module).values()]
# In a fixed order: each process of the tests must find the same ones.
SECTIONS = dict.fromkeys(each for each in NAMED if isinstance(each, type) and issubclass(each, Section))


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_of_a_plan_is_described(section: type[Section]) -> None:
    """The reference lists the keys with their descriptions."""
    assert [name for name, info in section.model_fields.items() if not info.description] == []


@pytest.mark.parametrize("name", PLANS)
def test_shipped_plans_load_and_their_corpora_exist(name: str) -> None:
    shipped = plan.read_plan(name)
    assert shipped.name == name
    assert workload.draw(shipped.load, shipped.corpus, shipped.seed).groups
    assert shipped.quality is not None
    assert len(workload.read_corpus(shipped.quality.corpus)[0]) >= shipped.quality.texts


def test_repeats_alternate_in_direction() -> None:
    names = [run.name for run in plan.read_plan("precision").with_overrides(["fp32", "int8"], repeats=3).runs()]
    assert names == ["fp32-1", "int8-1", "int8-2", "fp32-2", "fp32-3", "int8-3"]


def test_configurations_differ_in_batches_corpus_and_load(tmp_path: Path) -> None:
    text = """name: m
configurations:
  - {name: light, precision: bf16, corpus: short, load: {users: 2}}
  - {name: steady, precision: bf16, max_batch_tokens: 4096, load: {rate: 30}}
load: {users: 8, duration_s: 3}
repeats: 2
"""
    loaded = plan.read_plan(write_plan(tmp_path, text))
    light, steady = (loaded.load_with(one.load) for one in loaded.configurations)
    assert (light.mode, light.users, light.duration_s) == ("closed", 2, 3)
    assert (steady.mode, steady.rate, steady.duration_s) == ("open", 30, 3)
    assert [run.configuration for run in loaded.runs()] == ["light", "steady", "steady", "light"]
    assert plan.Plan.model_validate(json.loads(loaded.model_dump_json())) == loaded


def test_the_command_line_multiplies_configurations() -> None:
    loaded = plan.read_plan("quick").with_overrides(["bf16"], batch_tokens=[4096, 8192], corpora=["short", "mixed"])
    assert [one.name for one in loaded.configurations] == [
        "bf16-4096-short",
        "bf16-4096-mixed",
        "bf16-8192-short",
        "bf16-8192-mixed",
    ]
    one = plan.read_plan("quick").with_overrides(["bf16"], batch_tokens=[4096]).configurations
    assert [(c.name, c.max_batch_tokens) for c in one] == [("bf16", 4096)]


@pytest.mark.parametrize(
    ("text", "messages", "lines"),
    [
        ("configurations: [{name: a, precision: fp32, batch: 1}]", ("unknown key 'batch'",), [2]),
        ("configurations: [{name: a, precision: fp32, load: {user: 2}}]", ("the load of a: user: ",), None),
        ("configurations: [{name: a, precision: fp32, load: {rate: -2}}]", ("the load of a: rate: ",), None),
        ("search: {}\nrepeats: 2", ("a search measures each configuration once",), None),
        ("configurations: [{name: a}, {name: a}]\nload: {mode: open}", ("", ""), None),
        (
            "configurations:\n  - {name: a, precision: fp4}\nload:\n  user: 3\n  duration_s: nine",
            ("fp4", "user", "nine"),
            [3, 5, 6],
        ),
    ],
)
def test_every_error_in_a_plan_is_reported_with_its_line(
    tmp_path: Path, text: str, messages: tuple[str, ...], lines: list[int] | None
) -> None:
    with pytest.raises(SpecError) as caught:
        plan.read_plan(write_plan(tmp_path, f"name: m\n{text}\n"))
    problems = caught.value.problems
    assert len(problems) == len(messages)
    assert all(said in f"{each.message} {each.hint}" for said, each in zip(messages, problems, strict=True))
    assert lines is None or [problem.line for problem in problems] == lines


def test_a_search_can_be_requested_for_any_plan() -> None:
    loaded = plan.read_plan("precision").with_overrides(search={"slo_p99_ms": 50})
    assert loaded.search is not None
    assert (loaded.search.slo_p99_ms, loaded.repeats) == (50, 1)
    own = plan.read_plan("search").with_overrides(slo_p99_ms=70)
    assert own.search is not None
    assert (own.search.slo_p99_ms, own.search.probe_s) == (70, 8)


def test_a_rate_makes_the_loop_open() -> None:
    changed = plan.read_plan("quick").with_overrides(rate=50, users=2, duration_s=3)
    assert (changed.load.mode, changed.load.rate, changed.load.users, changed.load.duration_s) == ("open", 50, 2, 3)


def test_equal_seeds_draw_equal_work() -> None:
    load = shape.Load.model_validate({"mode": "open", "rate": 100, "duration_s": 5})
    one, same, other = (workload.draw(load, "short", seed) for seed in (1, 1, 2))
    assert one.digest == same.digest
    assert one.digest != other.digest
    assert (one.schedule_ns == same.schedule_ns).all()


def test_poisson_arrivals_have_the_requested_rate_and_exponential_gaps() -> None:
    load, stages = shape.Load.model_validate({"mode": "open", "rate": 200}), [shape.Stage(duration_s=100, rate=200)]
    times = workload.arrivals(load, stages, np.random.default_rng(1)).astype(np.float64) / 1e9
    gaps = np.diff(times)
    assert len(times) == pytest.approx(20_000, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert times[-1] < 100


def test_constant_arrivals_are_evenly_spaced() -> None:
    load = shape.Load.model_validate({"mode": "open", "rate": 4, "duration_s": 1, "arrivals": "constant"})
    times = workload.arrivals(load, load.timeline[:1], np.random.default_rng(1))
    assert times.tolist() == [n * 250_000_000 for n in range(4)]


def test_bodies_are_one_line_each_and_mark_the_place_of_the_prefix() -> None:
    load = shape.Load.model_validate({"inputs_per_request": 3})
    bodies = workload.draw(load, "mixed", 1).bodies(target.ServerConnection("http://test", "m").body)
    first = json.loads(bodies[0])
    assert len(first["input"]) == 3
    assert first["input"][0].startswith("@SERIAL@ ")
    assert not any(b"\n" in body for body in bodies)
    plain = workload.draw(load.model_copy(update={"inputs": "as-is"}), "mixed", 1).bodies(
        target.ServerConnection("http://test", "m").body
    )
    assert not any(b"@SERIAL@" in body for body in plain)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_queries_is_exact_and_in_the_digest(share: float) -> None:
    load = shape.Load.model_validate({"query_share": share})
    drawn, without = (workload.draw(each, "mixed", 1) for each in (load, shape.Load.model_validate({})))
    bodies = [json.loads(body) for body in drawn.bodies(target.ServerConnection("http://test", "m").body)]
    queries = [body["input_type"] == "query" for body in bodies]
    assert sum(queries) == int(len(bodies) * share)
    assert {body["input_type"] for body in bodies} <= {"query", "document"}
    assert drawn.digest != without.digest
    assert drawn.groups == without.groups


def test_the_prompt_of_a_load_is_one_that_the_server_reports() -> None:
    load = shape.Load.model_validate({"prompt_name": "query"})
    body = workload.draw(load, "mixed", 1).bodies(target.ServerConnection("http://test", "m").body)[0]
    assert json.loads(body)["prompt_name"] == "query"
    known = target.ServerConnection("http://test", "m", {"model": {"prompts": {"names": ["query"], "default": None}}})
    known.check_prompts("query", None)
    known.check_prompts(None, 0.5)
    with pytest.raises(UsageError, match="no prompt 'passage'"):
        known.check_prompts("passage", None)
    foreign = target.ServerConnection("http://test", "m")
    foreign.check_prompts(None, None)
    with pytest.raises(UsageError, match="reports no prompts"):
        foreign.check_prompts(None, 0.5)
    with pytest.raises(ValueError, match="cannot be combined"):
        shape.Load.model_validate({"prompt_name": "query", "query_share": 0.5})
    with pytest.raises(UsageError, match=r"`load\.query_share` is for embeddings"):
        plan.Plan.model_validate({"name": "p", "load": {"query_share": 1}}).for_task("rerank")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("own.txt", b"one\n\ntwo\n", ["one", "two"]),
        ("own.txt", "one\u2028two\r\nthree\r\n".encode(), ["one\u2028two", "three"]),
        (
            "own.jsonl",
            '{"text": "one\u2028two"}\r\n{"text": "three\x85four"}\n'.encode(),
            ["one\u2028two", "three\x85four"],
        ),
        ("own.jsonl", b'{"text": "fine"}\n{"txt": "not"}\n', r"own\.jsonl:2"),
        ("own.txt", "fine\ncaf\xe9\n".encode("latin-1"), r"own\.txt:2: not UTF-8"),
    ],
)
def test_custom_corpora_are_accepted_and_invalid_lines_reported(
    tmp_path: Path, name: str, content: bytes, texts: list[str] | str
) -> None:
    (tmp_path / name).write_bytes(content)
    if isinstance(texts, list):
        assert workload.read_corpus(str(tmp_path / name))[0] == texts
        return
    with pytest.raises(UsageError, match=texts):
        workload.read_corpus(str(tmp_path / name))


def test_the_warm_ups_schedule_outlasts_the_warm_up() -> None:
    load = shape.Load.model_validate({"mode": "open", "rate": 20, "arrivals": "constant", "warmup_s": 4, "window_s": 3})
    assert workload.draw(load, "short", 1).warmup_schedule_ns[-1] > (4 + 3) * 1e9
    cold = load.model_copy(update={"warmup_s": 0.0})
    assert len(workload.draw(cold, "short", 1).warmup_schedule_ns) == 0
