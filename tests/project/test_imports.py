"""Checks which modules may import which, and the start-up time of the command line."""

from __future__ import annotations

import ast
import graphlib
import json
from functools import cache
from pathlib import Path

import pytest

from inferctl import cli
from tests.processes import python

PACKAGE = Path(__file__).resolve().parents[2] / "inferctl"
# Room -> the rooms that it may import. `cli` may import all.
ALLOWED = {
    "core": set(),
    "facts": {"core"},
    "config": {"core"},
    "batching": {"core"},
    "receipts": {"core"},
    "gateway": {"core"},
    "models": {"core", "facts", "config"},
    "manifests": {"core", "facts"},
    "reading": {"core", "config", "models"},
    "tenancy": {"core", "config"},
    "image": {"core", "facts", "config", "models", "reading"},
    "serve": {"core", "facts", "config", "models", "batching", "tenancy", "reading"},
    "estimate": {"core", "facts", "models", "batching"},
    "bench": {"core", "facts", "config", "models", "reading", "receipts"},
    "embed": {"core", "config", "models", "reading", "receipts", "batching", "serve", "bench"},
    "deploy": {"core", "facts", "config", "models", "receipts", "manifests", "image"},
}
# The packages of `bench` in the order of the data flow. Each imports from itself and from earlier ones.
BENCH_ORDER = ["", "loadgen", "plan", "load", "judge", "measure", "report"]
# Third-party package -> the only modules that may import it.
ONLY_IN = {
    "torch": ("serve/engines/", "serve/reference.py", "models/conversion.py"),
    "transformers": ("serve/engines/", "serve/reference.py", "models/conversion.py"),
    "sentence_transformers": ("serve/reference.py",),
    "peft": (),  # what inferctl computes of adapters is compared with it, so nothing may use it
    "docker": ("image/docker.py",),
    "huggingface_hub": ("models/hub.py",),
    "yaml": ("deploy/manifest.py", "core/document.py", "image/pin.py", "image/render.py"),
    "sqlalchemy": (
        "tenancy/database.py",
        "tenancy/metering/ledger.py",
        "tenancy/metering/migrations/",
        "tenancy/fleet/",
    ),
    "alembic": ("tenancy/database.py", "tenancy/metering/migrations/", "tenancy/fleet/migrations/"),
    "psycopg": (),
    "nats": ("tenancy/broker.py", "tenancy/metering/broker.py"),
    "nanotoken": ("serve/text/word_piece.py",),
    "moka_py": ("serve/cache/store.py",),
    "ray": ("embed/ray_pipeline.py",),
    "locust": ("bench/loadgen/",),
    "gevent": ("bench/loadgen/",),
    "plotly": (),
    "pyarrow": ("embed/",),
    "pytrec_eval": ("bench/measure/retrieval.py",),
    "scipy": ("bench/measure/retrieval.py",),
}
HEAVY = [
    "torch",
    "transformers",
    "docker",
    "jinja2",
    "numpy",
    "rich",
    "yaml",
    "pydantic",
    "starlette",
    "uvicorn",
    "locust",
    "plotly",
    "huggingface_hub",
    "sqlalchemy",
    "nats",
]


@cache
def imports(file: Path, *, at_run_time_only: bool = False) -> set[str]:
    """Return the dotted names that `file` imports, with `at_run_time_only` without those under TYPE_CHECKING."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if at_run_time_only and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(inner for statement in node.body for inner in ast.walk(statement))
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = sorted(file for file in PACKAGE.rglob("*.py") if "_assets" not in file.parts)


def test_each_room_imports_only_allowed_rooms() -> None:
    for file in FILES:
        room = room_of(file)
        for name in imports(file):
            if room in ALLOWED and name.startswith("inferctl.") and name != "inferctl.__version__":
                assert name.split(".")[1] in ALLOWED[room] | {room}, f"{file} imports {name}"


def test_each_room_and_package_has_a_sentence_at_its_door() -> None:
    assert {room_of(file) for file in FILES} - {"__main__", "__init__"} == {*ALLOWED, "cli"}
    for door in (file for file in FILES if file.name == "__init__.py" and "migrations" not in file.parts):
        assert ast.get_docstring(ast.parse(door.read_text())), door
    graphlib.TopologicalSorter(ALLOWED).prepare()  # raises CycleError


def test_data_flows_one_way_through_the_benchmark() -> None:
    for file in (PACKAGE / "bench").rglob("*.py"):
        folder = file.parent.relative_to(PACKAGE / "bench").as_posix().replace(".", "")
        later = tuple(f"inferctl.bench.{package}." for package in BENCH_ORDER[BENCH_ORDER.index(folder) + 1 :])
        for name in imports(file):
            assert not name.startswith(later), f"{file} imports {name}"


def test_no_modules_import_each_other() -> None:
    """Imports for type annotations count too: they show that two modules are not separate."""
    modules = {".".join(("inferctl", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in FILES}
    files = {module.removesuffix(".__init__"): file for module, file in modules.items()}

    def module_of(name: str) -> str:
        return name if name in files or not name else module_of(name.rpartition(".")[0])

    graph = {module: {module_of(name) for name in imports(file)} - {module, ""} for module, file in files.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the modules of a cycle


# Package -> the packages beside it that it may not import.
BOUNDARIES = {
    "serve/edge": ("api", "backend", "processes", "cache", "scheduling", "engine_process", "engines", "text"),
    "serve/text": ("api", "edge", "backend", "processes", "cache", "scheduling", "engine_process", "engines"),
    "serve/backend": ("api", "edge", "processes", "engines", "text"),
    "serve/scheduling": ("api", "edge", "backend", "engines"),
    "serve/engine_process": ("api", "edge", "scheduling"),
    "serve/engines": ("api", "edge", "scheduling"),
    "serve/cache": ("api", "edge", "backend", "engines"),
    "manifests/kubernetes": ("lint", "preview"),
    "manifests/lint": ("preview",),
    "manifests/preview": ("lint",),
}


def test_the_packages_of_a_room_know_only_those_behind_them() -> None:
    for package, others in BOUNDARIES.items():
        unwanted = tuple(f"inferctl.{package.partition('/')[0]}.{other}." for other in others)
        for file in (PACKAGE / package).glob("*.py"):
            for name in imports(file):
                assert not f"{name}.".startswith(unwanted), f"{file.name} imports {name}"


def test_only_edge_endpoints_and_generation_know_http() -> None:
    serve = PACKAGE / "serve"
    for file in serve.rglob("*.py"):
        if file.relative_to(serve).parts[0] not in ("edge", "api", "generate"):
            found = {name for name in imports(file) if name.startswith("inferctl.serve.edge.errors")}
            assert not found, f"{file} imports {found}"


# The modules of `deploy` that know the objects which it writes. All others make the plan that these read.
BUILDERS = ("layout.py", "objects/", "observe/")


def test_the_plan_of_a_deployment_does_not_know_its_objects() -> None:
    deploy = PACKAGE / "deploy"
    for file in deploy.rglob("*.py"):
        if not file.relative_to(deploy).as_posix().startswith(BUILDERS):
            for name in imports(file):
                assert not name.startswith(("inferctl.deploy.objects", "inferctl.deploy.observe")), file.name


def test_heavy_libraries_are_imported_in_their_one_place() -> None:
    for file in FILES:
        where = file.relative_to(PACKAGE).as_posix()
        for name in imports(file, at_run_time_only=True):
            top = name.split(".")[0]
            assert top not in ONLY_IN or where.startswith(ONLY_IN[top]), f"{where} imports {top}"


def test_only_the_console_prints() -> None:
    for file in FILES:
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        printing = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not printing or file.name == "console.py", f"{file.name}:{printing}"


def test_every_command_has_its_help_without_extras() -> None:
    """Only then it can say which extra it needs."""
    absent = dict.fromkeys(
        ("numpy", "torch", "orjson", "pyarrow", "locust", "psutil", "sqlalchemy", "nats", "starlette")
    )
    build = "for name, command in cli.Root.table.items(): command.build(name)"
    python("-c", f"import sys\nsys.modules |= {absent}\nfrom inferctl import cli\n{build}", code=0)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["--help"], []),
        (["--version"], []),
        (["biuld"], []),
        (["doctor", "--help"], ["doctor"]),
        (["catalog", "--help"], ["catalog"]),
        (["schema"], ["settings"]),
    ],
    ids=" ".join,
)
def test_a_call_imports_only_the_command_that_it_runs_and_help_nothing_heavy(
    line: list[str], expected: list[str]
) -> None:
    modules = [*(HEAVY if line == ["--help"] else []), *{command.module for command in cli.Root.table.values()}]
    code = (
        "import sys, json, io, contextlib\n"
        "from inferctl import cli\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        f"    cli.run({line!r})\n"
        f"print(json.dumps([m for m in {modules!r} if m in sys.modules]))"
    )
    done = python("-c", code, code=0)
    assert json.loads(done.stdout) == [f"inferctl.cli.{name}" for name in expected]
