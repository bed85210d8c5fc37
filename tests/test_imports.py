"""The arrows between the modules, read from the source: who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"igpt_ds.errors", "igpt_ds.atomic"} | {
    f"igpt_ds.dataset.{name}" for name in ("storage", "blocks", "manifest", "palette", "shards")
}
# Pure arithmetic and records: none of them may load torch, not even through another.
WITHOUT_TORCH = LEAVES | {
    f"igpt_ds.{name}"
    for name in (
        "hashing",
        "loading.order",
        "config.schema",
        "config.deepspeed",
        "config.size",
        "train.schedule",
        "train.signals",
        "distributed.ranks",
    )
}
# What a job will need is told in a moment, on any machine.
WITHOUT_TORCH |= {"igpt_ds.commands.plan"} | {
    f"igpt_ds.planner.{name}"
    for name in ("devices", "layout", "gathering", "memory", "communication", "step_time", "advice", "report", "text")
}
# What shows recorded figures never loads a model.
FROM_RECORDS = {"igpt_ds.run.records", "igpt_ds.text"} | {
    f"igpt_ds.results.{name}" for name in ("figures", "report", "tables", "paper_tables", "paper_figures")
}
# Embedders made of neural networks load torch when the first image is embedded, and never by being imported.
NETWORKS = {f"data_prep.selection.embedders.{name}" for name in ("_network", "timm", "open_clip")}
MAY_EXIT = {"igpt_ds.cli", "data_prep.cli"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for package in ("igpt_ds", "data_prep") for path in (ROOT / package).rglob("*.py")}


def imported(nodes: Iterator[ast.AST], importer: str) -> set[str]:
    """Modules that the statements import; `from package import module` counts as the module."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = importer.split(".")[: -node.level or None]
                base = ".".join([*package, base]).rstrip(".")
            submodules = {f"{base}.{alias.name}" for alias in node.names} & set(SOURCES)
            found |= submodules or {base}
    return found


TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in SOURCES.items()}
EVERYWHERE = {name: imported(ast.walk(tree), name) for name, tree in TREES.items()}


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Statements that run when the module is imported: not in functions, not under TYPE_CHECKING."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        pending += ast.iter_child_nodes(node)


AT_IMPORT = {name: imported(at_import(tree), name) for name, tree in TREES.items()}


def loaded_with(name: str) -> set[str]:
    """All modules that importing `name` loads, ours followed through."""
    found: set[str] = set()
    pending = [name]
    while pending:
        module = pending.pop()
        if module not in found:
            found.add(module)
            pending += AT_IMPORT.get(module, set())
    return found


def top(module: str) -> str:
    return module.partition(".")[0]


def test_the_sources_were_found() -> None:
    assert set(SOURCES) >= LEAVES | {"igpt_ds.model.transformer", "igpt_ds.distributed.engine", "data_prep.cli"}
    assert "torch" in EVERYWHERE["igpt_ds.model.transformer"]
    assert "igpt_ds.distributed.engine" in EVERYWHERE["igpt_ds.train.trainer"]  # nested in a function
    assert "igpt_ds.distributed.engine" not in AT_IMPORT["igpt_ds.train.trainer"]


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if top(n) == "data_prep"))
def test_data_prep_meets_igpt_ds_in_the_format_alone(name: str) -> None:
    assert {module for module in EVERYWHERE[name] if top(module) == "igpt_ds"} <= LEAVES | {
        "igpt_ds",
        "igpt_ds.dataset",
    }
    assert "torch" not in {top(module) for module in (AT_IMPORT if name in NETWORKS else EVERYWHERE)[name]}


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if top(n) == "igpt_ds"))
def test_nothing_flows_back(name: str) -> None:
    outside = {top(module) for module in EVERYWHERE[name]}
    assert "data_prep" not in outside
    assert ("deepspeed" in outside) == (name in {"igpt_ds.distributed.engine", "igpt_ds.distributed.zero_state"})
    assert ("igpt_ds.distributed.zero_state" in EVERYWHERE[name]) == (name == "igpt_ds.distributed.engine")


@pytest.mark.parametrize("name", sorted(LEAVES))
def test_the_format_needs_numpy_and_the_standard_library_only(name: str) -> None:
    allowed = LEAVES | {"numpy"}
    for module in EVERYWHERE[name]:
        assert module in allowed or top(module) in {*sys.stdlib_module_names, "numpy"}, module


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_pure_modules_do_not_load_torch(name: str) -> None:
    assert "torch" not in {top(module) for module in loaded_with(name)}


@pytest.mark.parametrize("name", sorted(FROM_RECORDS & set(SOURCES)))
def test_figures_come_from_records(name: str) -> None:
    assert not {"igpt_ds.model.transformer", "igpt_ds.distributed.engine"} & (EVERYWHERE[name] | loaded_with(name))


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if n.startswith("igpt_ds.weights.formats")))
def test_formats_know_weights_alone(name: str) -> None:
    above = ("commands", "evals", "train", "distributed", "weights.convert")
    assert not any(module.startswith(f"igpt_ds.{room}") for room in above for module in EVERYWHERE[name])


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_what_need_not_be_installed_is_imported_when_it_is_used(name: str) -> None:
    assert not {"transformers", "tensorflow"} & {top(module) for module in AT_IMPORT[name]}


def test_the_model_knows_its_configuration_only() -> None:
    ours = {module for module in EVERYWHERE["igpt_ds.model.transformer"] if top(module) == "igpt_ds"}
    assert ours <= {"igpt_ds.config.schema", "igpt_ds.hashing"}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_only_the_command_lines_end_the_process(name: str) -> None:
    calls = [ast.unparse(n.func) for n in ast.walk(TREES[name]) if isinstance(n, ast.Call)]
    exits = {call for call in calls if call in {"sys.exit", "exit", "quit"}}
    assert not exits or name in MAY_EXIT


HEAVY = {"torch", "deepspeed", "sklearn", "scipy", "matplotlib", "transformers", "tensorboard", "PIL", "webdataset"}


@pytest.mark.parametrize(
    "command",
    [
        ["igpt_ds.cli", "--help"],
        ["igpt_ds.cli", "pretrain", "--help"],
        ["igpt_ds.cli", "convert", "--help"],
        ["igpt_ds.cli", "plan", "xl", "--nodes", "8", "--json"],
        ["igpt_ds.cli", "--version"],
        ["data_prep.cli", "--help"],
        ["data_prep.cli", "shards", "--help"],
        ["data_prep.cli", "inspect", "--help"],
    ],
    ids=" ".join,
)
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    module, *arguments = command
    script = (
        "import sys\n"
        f"sys.argv = {[module, *arguments]!r}\n"
        f"from {module} import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        f"print('LOADED', sorted(loaded & {HEAVY!r}), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.splitlines() == ["LOADED []"]
    assert done.stdout.strip()
