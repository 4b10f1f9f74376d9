"""Tests the settings from a spec file, the environment and flags, and the errors in them."""

from __future__ import annotations

import json
from operator import attrgetter
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from inferctl.bench.plan import plan
from inferctl.cli import run
from inferctl.cli.init import _rendered
from inferctl.config import settings, spec
from inferctl.core.errors import SpecError, UsageError
from inferctl.facts import catalog
from inferctl.models import model

VOCABULARY = {"hardware": ["t4", "l4"], "image.base": ["cuda12.8", "cpu"]}
GOOD = "name: m\nmodel:\n  source: org/m\n"
BAD_NAMES, BOOLEANS = ("a..b", "a.-b", "-a", "a-", "A", "a_b"), ("yes", "true", "off")


def resolved(text: str | None = GOOD, environment: dict[str, str] | None = None, **flags: object) -> settings.Resolved:
    given = {name.replace("__", "."): value for name, value in flags.items()}
    return settings.resolve(None if text is None else settings.parse(text), environment or {}, given, VOCABULARY)


def problems(
    text: str, environment: dict[str, str] | None = None, **flags: object
) -> list[tuple[int | None, str, str | None]]:
    with pytest.raises(SpecError) as caught:
        resolved(text, environment, **flags)
    return [(p.line, p.message, p.hint) for p in caught.value.problems]


def test_all_errors_are_reported_at_once_with_their_lines() -> None:
    text = (
        "name: MiniLM\nmodel:\n  source: org/m\n  revison: abc\nserve:\n  precision: bf61\n  port: 99999\n"
        "hardware:\n  - l4\n  - t5\n"
    )
    found = problems(text)
    assert [line for line, _, _ in found] == [1, 4, 6, 7, 10]
    assert found[1][1:] == ("unknown key 'revison' in model", "did you mean revision?")
    assert found[2][2] == "did you mean bf16?"
    assert found[4][1:] == ("hardware: 't5' not found", "did you mean t4?")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("name: [a\n", 2, "not valid YAML"),
        ("", None, "the file is empty"),
        ("# only a comment\n", None, "the file is empty"),
        ("- a\n- b\n", 1, "expected `key: value` lines"),
        ("name: a\n\tmodel: x\n", 2, "not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_mapping_is_an_error(text: str, line: int | None, words: str) -> None:
    with pytest.raises(SpecError) as caught:
        settings.parse(text)
    (problem,) = caught.value.problems
    assert problem.line == line
    assert words in problem.message


@pytest.mark.parametrize(
    ("text", "line", "words", "hint"),
    [
        ("name: m\n", None, "model is missing", "--model"),
        ("name: m\nmodel:\n  source: ./here\n  weights: download\n", 2, "requires a hub id (org/name), not", ""),
        (f"{GOOD}  task: chat\n", 4, "'chat' is not one of auto, embed, rerank, classify, generate", ""),
        (
            f"{GOOD}models: [{{name: a, model: {{source: org/a}}}}]\n",
            2,
            "must not be set together with `models`",
            "remove one",
        ),
        ("name: m\nmodels: [{name: a, model: {source: org/a, sauce: 1}}]\n", 2, "'sauce'", "source"),
        *(
            (f"name: m\nmodels:\n- {{name: a, model: {{source: org/a}}}}\n- {more}\n", None, "named a", "")
            for more in (
                "{name: a, model: {source: org/b}}",
                "{name: b, model: {source: org/b}, serve: {aliases: [a]}}",
                "{name: b, model: {source: org/b, adapters: [{name: a, source: org/c}]}}",
            )
        ),
        ("name: m\nmodels: [{name: a, model: {source: b}}, {name: b, model: {source: c}}]", None, "source of a", ""),
        (f"{GOOD}access: {{budgets: {{team:a: 5 EUR/year}}}}", 4, "'5 EUR/year' is not a budget", "team:NAME"),
        (f"{GOOD}access: {{budgets: {{model:a: 5 EUR/day Mars/X}}}}", 4, "'Mars/X' is not a time zone", "team:NAME"),
        (f"{GOOD}access: {{budgets: {{group:a: 5 EUR/day}}}}", 4, "'group:a' is not a valid key", "team:NAME"),
        (f"{GOOD}slo: 5\n", 4, "slo: expected `key: value` lines, got 5", "known in slo: p99_ms, ttft_ms, itl_ms"),
        *((f"name: {name}\nmodel: {{source: org/m}}\n", 1, "not a valid name", "") for name in BAD_NAMES),
        (f"{GOOD}image: {{repository: Team/MiniLM}}", 4, "not a valid repository", ""),
        (f"{GOOD}image: {{repository: 'host/team/m:v1'}}", 4, "not a valid repository", ""),
        (f"{GOOD}image: {{tag: 1.0}}", 4, "expected text, got the number 1.0", ""),
        (f"{GOOD}cache: {{size: six}}", 4, "not a valid size", ""),
        (f"{GOOD}serve: {{drain_seconds: .inf}}", 4, "must be a finite number", ""),
        (f"{GOOD}serve: &a [*a]", 4, "serve.0 contains itself", ""),
        *((f"{GOOD}serve: {{port: {port}}}", 4, "must be a valid integer", "") for port in ("1:30", "0x10", "0b11")),
        *((f"{GOOD}serve: {{port: {word}}}", 4, "serve.port: must be a number", "") for word in BOOLEANS),
        *((f"{GOOD}serve: {{max_batch_tokens: {word}}}", 4, "tokens: must be a number", "") for word in BOOLEANS),
        *(
            (f"{GOOD}serve: {{api_processes: {written}}}", 4, "must be a number from 1 to 64, or `auto`", "e")
            for written in ("0", "65", "bad", "1.5", "yes", "[1]")
        ),
    ],
)
def test_an_invalid_value_is_one_error_with_its_line(text: str, line: int | None, words: str, hint: str) -> None:
    ((found_line, message, found_hint),) = problems(text)
    assert (found_line, words in message, hint in (found_hint or "")) == (line, True, True), (message, found_hint)


def test_flags_override_environment_file_and_defaults() -> None:
    environment = {"INFERCTL_SERVE_PORT": "2", "INFERCTL_SERVE_PRECISION": "fp16"}
    text = GOOD + "serve:\n  port: 1\n  precision: fp32\n  host: file\n"
    found = resolved(text, environment, serve__port=3, serve__host=None)
    serve = found.spec.serve
    assert (serve.port, serve.precision, serve.host, serve.drain_seconds) == (3, "fp16", "file", 25.0)
    origins = [found.origins[f"serve.{name}"] for name in ("port", "precision", "host", "drain_seconds")]
    assert origins == ["flag --port", "env INFERCTL_SERVE_PRECISION", "inferctl.yaml:7", "default"]


def test_an_error_in_a_flag_or_variable_names_it_instead_of_a_line() -> None:
    assert problems(GOOD, {"INFERCTL_SERVE_PORT": "x"})[0][:2] == (
        None,
        "serve.port (from INFERCTL_SERVE_PORT): must be a valid integer, unable to parse string as an integer, got 'x'",
    )
    assert problems(GOOD, serve__precision="b16")[0] == (
        None,
        "serve.precision (from --precision): 'b16' is not one of auto, fp32, fp16, bf16, int8, fp8",
        "did you mean bf16?",
    )
    text = GOOD + "serve: {aliases: [a]}\n"
    assert problems(text, serve__aliases="a b")[0][:2] == (
        None,
        "serve.aliases.0 (from --aliases): 'a b' is not a valid item of aliases",
    )


def test_each_model_has_its_own_settings_and_else_those_of_the_server(tmp_path: Path) -> None:
    text = """
name: search
models:
  - {name: a, model: {source: ./a, adapters: [{name: c, source: ./c}]}, serve: {precision: fp32, aliases: [x]}}
  - {name: b, model: {source: org/b}, slo: {p99_ms: 50}}
serve: {precision: bf16, port: 1}
slo: {p99_ms: 100}
"""
    found = settings.resolve(settings.parse(text, str(tmp_path / "inferctl.yaml")), {}, {}).spec
    first, second = found.each()
    assert (first.names, second.names) == (["a", "x", "c"], ["b"])
    seen = [(one.model.source, one.serve.precision, one.serve.port, one.slo.p99_ms) for one in (first, second)]
    assert seen == [(f"{tmp_path}/a", "fp32", 1, 100), ("org/b", "bf16", 1, 50)]
    assert first.model.adapters[0].source == f"{tmp_path}/c"
    again = spec.Spec.model_validate(found.model_dump(mode="json", exclude_unset=True))
    assert [one.model_dump() for one in again.each()] == [one.model_dump() for one in found.each()]
    assert found.digest() == settings.resolve(settings.parse(text), {}, {}).spec.digest()


@pytest.mark.parametrize("variable", ["INFERCTL_ACCESS_KEY", "INFERCTL_ACCESS_OIDC_ISSUER"])
def test_an_unknown_variable_of_access_is_an_error(variable: str) -> None:
    """With a warning, the server would be open to everyone."""
    with pytest.raises(UsageError, match=f"{variable} is not a setting") as caught:
        settings.resolve(settings.parse(GOOD), {variable: "keys.json"}, {})
    assert caught.value.hint


def test_an_unknown_variable_is_a_warning_with_the_closest_name() -> None:
    found = resolved(environment={"INFERCTL_SERVE_PRECISON": "bf16", "INFERCTL_REQUIRE": "x"})
    assert found.warnings == ["INFERCTL_SERVE_PRECISON is not a setting; did you mean INFERCTL_SERVE_PRECISION?"]


def test_only_equal_specs_have_equal_digests() -> None:
    one, same = resolved().spec, resolved("model:\n  source: org/m\nname: m\nserve: {port: 8080}\n").spec
    other = resolved(GOOD + "serve: {port: 8081}\n").spec
    assert one.digest() == same.digest() != other.digest()


def test_the_json_schema_and_the_reader_accept_the_same_specs() -> None:
    validator = jsonschema.Draft202012Validator(spec.json_schema())
    validator.check_schema(spec.json_schema())
    assert not list(validator.iter_errors(yaml.safe_load(GOOD + "serve: {precision: bf16}\n")))
    assert len(list(validator.iter_errors(yaml.safe_load(GOOD + "serve: {precision: bf61, prot: 1}\n")))) == 2


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(
    VALUES.map(lambda value: json.dumps({"name": "m", "model": {"source": "x"}, "serve": value, "hardware": value}))
    | st.text(max_size=60)
)
def test_no_text_crashes_the_reader(text: str) -> None:
    try:
        resolved(text)
    except SpecError as error:
        assert error.problems


# A spec, variables, flags, and what one setting is then.
WRITTEN: list[tuple[str | None, dict[str, str], dict[str, object], str, object]] = [
    (GOOD, {"INFERCTL_HARDWARE": "t4, l4"}, {}, "hardware", ["t4", "l4"]),
    (GOOD, {"INFERCTL_SERVE_ALIASES": "a, b/c"}, {}, "serve.aliases", ["a", "b/c"]),
    (GOOD, {"INFERCTL_ACCESS_BUDGETS": '{"team:a": "5 EUR/day"}'}, {}, "access.budgets", {"team:a": "5 EUR/day"}),
    (GOOD, {}, {"serve__aliases": "a,b/c"}, "serve.aliases", ["a", "b/c"]),
    (None, {}, {"model__source": "sentence-transformers/all-MiniLM-L6-v2"}, "name", "all-minilm-l6-v2"),
    (None, {}, {"model__source": "org/M"}, "repository", "inferctl/m"),
    # Unless the machine decides, the number of API processes is known.
    (GOOD + "serve: {api_processes: 4}", {}, {}, "serve.least_api_processes", 4),
    (GOOD + "serve: {api_processes: '4'}", {}, {}, "serve.least_api_processes", 4),
    (GOOD + "serve: {api_processes: auto}", {}, {}, "serve.least_api_processes", 1),
    (GOOD + "serve:\nimage:\nslo:\n", {}, {}, "serve.port", 8080),
    # Text stays text, also in variables.
    *(
        (GOOD, {"INFERCTL_IMAGE_TAG": text}, {}, "image.tag", text)
        for text in ("20250101", "1.10", "2024-02-30", "true", "null")
    ),
    (GOOD + "image: {tag: 2024-02-30}", {}, {}, "image.tag", "2024-02-30"),
    # YAML 1.1 reads 010 as 8, `--port 010` is 10.
    *(
        (GOOD + f"serve: {{port: {written}}}", {}, {}, "serve.port", port)
        for written, port in {"8080": 8080, "08": 8, "010": 10, "'010'": 10, "0": 0}.items()
    ),
    (GOOD + "image: {tag: 010}", {}, {}, "image.tag", "010"),
    (GOOD, {"INFERCTL_SERVE_PORT": "010"}, {}, "serve.port", 10),
    ("model: {source: ~/m}", {}, {}, "model.source", f"{Path.home()}/m"),
    (GOOD + "image: {wheels: ~/w}", {}, {}, "image.wheels", f"{Path.home()}/w"),
    # Aliases and merges of a normal size.
    (GOOD + "serve: {port: &p 1}\nslo: {p99_ms: *p}\ncache: &b {size: 1GB}\n", {}, {}, "slo.p99_ms", 1),
]


@pytest.mark.parametrize(("text", "environment", "flags", "path", "value"), WRITTEN)
def test_a_setting_is_what_was_written(
    text: str | None, environment: dict[str, str], flags: dict[str, object], path: str, value: object
) -> None:
    assert attrgetter(path)(resolved(text, environment, **flags).spec) == value


@pytest.mark.parametrize("wrong", ["a b", "-x", "a\x1b", "a" * 201, ",".join(["a"] * 33)])
def test_aliases_that_are_no_words_are_an_error(wrong: str) -> None:
    with pytest.raises(SpecError, match=r"serve\.aliases"):
        resolved(environment={"INFERCTL_SERVE_ALIASES": wrong})


ALIAS_BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)
MERGE_BOMB = "a: &a {k: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 10)}]}}\n"
    for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ALIAS_BOMB, "more than 100,000 values with aliases expanded"),
        (MERGE_BOMB, "more than 100,000 values with aliases expanded"),
        ("name: " + "[" * 10_000, "nest"),
        ("name: " + "{a: " * 10_000, "nest"),
        ("".join(f"{' ' * depth}a:\n" for depth in range(500)), "nest"),
        ("name: m\n" + "#" * 1_000_000, "larger than 1,000,000 bytes"),
    ],
    ids=["aliases", "merges", "lists", "mappings", "blocks", "bytes"],
)
@pytest.mark.parametrize("reader", ["spec", "hardware", "base", "plan"])
def test_all_yaml_files_have_size_limits(tmp_path: Path, text: str, words: str, reader: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    read = {
        "spec": lambda: settings.read(file),
        "hardware": lambda: catalog.hardware(str(file)),
        "base": lambda: catalog.base(str(file)),
        "plan": lambda: plan.read_plan(str(file)),
    }[reader]
    with pytest.raises(UsageError, match=words):
        read()


ELSEWHERE = """model: {source: models/minilm}
image: {base: base.yaml, wheels: w, locks: ./l}
hardware: [t4, gpu.yaml]
metering: {mode: "on", prices: p.yaml}
serve: {batches: {folder: b}}
"""


def test_paths_in_a_spec_are_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "service"
    (folder / "models" / "minilm").mkdir(parents=True)
    (folder / "inferctl.yaml").write_text(ELSEWHERE)
    found = {}
    for name, here, file in (
        ("beside", folder, "inferctl.yaml"),
        ("above", tmp_path, "service/inferctl.yaml"),
        ("absolute", tmp_path, str(folder / "inferctl.yaml")),
    ):
        monkeypatch.chdir(here)
        found[name] = settings.resolve(settings.read(Path(file)), {}, {}).spec
        one = found[name]
        image = one.image
        paths = [one.model.source, image.wheels, image.locks, one.hardware[1], image.base]
        paths += [one.metering.prices, one.serve.batches.folder]
        expected = ["models/minilm", "w", "l", "gpu.yaml", "base.yaml", "p.yaml", "b"]
        assert [Path(path or "").absolute() for path in paths] == [folder / path for path in expected]
        assert not model.is_hub_id(one.model.source)
        assert (one.hardware[0], one.name) == ("t4", "minilm")
    assert found["beside"].model.source == "models/minilm", "as it is written"
    assert len({one.digest() for one in found.values()}) == 1, "equal specs have equal names"


def test_hub_ids_names_flags_and_variables_are_not_relative_to_the_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "service").mkdir()
    monkeypatch.chdir(tmp_path)
    text = "model: {source: org/m}\nimage: {base: cpu}\nhardware: [t4]\n"
    document = settings.parse(text, "service/inferctl.yaml")
    one = settings.resolve(document, {}, {}).spec
    assert (one.model.source, one.image.base, one.hardware) == ("org/m", "cpu", ["t4"])
    other = settings.resolve(document, {"INFERCTL_IMAGE_LOCKS": "l"}, {"model.source": "./m"}).spec
    assert (other.model.source, other.image.locks) == ("./m", "l")
    # A folder missing next to the spec is not read as the hub model service/m.
    lost = settings.resolve(settings.parse("model: {source: ./m}\n", "service/inferctl.yaml"), {}, {}).spec
    assert not model.is_hub_id(lost.model.source)


SERVICE_LINKS = {
    f"INFERCTL{service}_{name}": value
    for service in ("", "_SERVE", "_IMAGE")
    for name, value in {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "80",
        "SERVICE_PORT_HTTP": "80",
        "PORT": "tcp://10.0.0.1:80",
        "PORT_80_TCP": "tcp://10.0.0.1:80",
        "PORT_80_TCP_PROTO": "tcp",
        "PORT_80_TCP_PORT": "80",
        "PORT_80_TCP_ADDR": "10.0.0.1",
        "PORT_53_UDP": "udp://[fd00::1]:53",
    }.items()
}


def test_variables_of_kubernetes_services_are_not_settings() -> None:
    found = resolved(environment=SERVICE_LINKS)
    assert (found.warnings, found.spec) == ([], resolved().spec)


@pytest.mark.parametrize("text", ["tcp://", "10.0.0.1:80", "http://10.0.0.1:80", "x"])
def test_an_invalid_port_is_still_an_error(text: str) -> None:
    assert problems(GOOD, {"INFERCTL_SERVE_PORT": text})
    with pytest.raises(UsageError, match="is not a port"):
        settings.listening_port({"INFERCTL_SERVE_PORT": text})


def test_a_kubernetes_service_does_not_set_the_port_of_an_image() -> None:
    assert settings.listening_port({"INFERCTL_SERVE_PORT": "9000"}) == 9000
    assert settings.listening_port(SERVICE_LINKS) == settings.listening_port({}) == 8080


# Text that is valid on a command line and in a spec: no line breaks, no surrogates.
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1)


@given(TEXTS | st.sampled_from(["./my #1", "no", "1e3", "a: b", "- x", "*a", "&a", "!x", "'", "2024-01-01"]))
def test_a_spec_from_init_has_the_given_values(text: str) -> None:
    values = {
        "name": "1e3",
        "source": text,
        "revision": None,
        "base": text,
        "hardware": [text, "t4"],
        "generation": False,
    }
    data = settings.parse(_rendered("inferctl.yaml.j2", values)).data
    found = (data["name"], data["model"]["source"], data["image"]["base"], data["hardware"])
    assert found == ("1e3", text, text, [text, "t4"])


def test_init_in_another_directory_writes_a_relative_model_path(
    tmp_path: Path, minilm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my #1").symlink_to(minilm)
    monkeypatch.chdir(tmp_path)
    assert run(["init", "services/a", "--model", "./my #1", "--name", "m"]) == 0
    assert settings.read(Path("services/a/inferctl.yaml")).data["model"]["source"] == "../../my #1"
    source = settings.resolve(settings.read(Path("services/a/inferctl.yaml")), {}, {}).spec.model.source
    assert Path(source).resolve() == minilm.resolve()
    assert run(["init", "--model", "./my #1", "--name", "m"]) == 0
    assert settings.read(Path("inferctl.yaml")).data["model"]["source"] == "./my #1"
