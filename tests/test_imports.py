"""The arrows between the rooms and their modules, read from the source: who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room imports from the floors below its own, and from no other room: so there is no circle, nothing flows back.
FLOORS: dict[str, list[set[str]]] = {
    "igpt_ds": [
        # The leaves: one file each, which may know one another.
        {"errors", "atomic", "cores", "hashing", "hub", "lock", "memory", "options", "plots", "reading", "text"},
        {"checkpoint", "dataset", "images", "objectives"},
        {"config"},
        {"loading", "model", "planner", "run"},
        {"weights"},
        {"distributed"},
        {"features"},
        {"evals", "samples"},
        {"results"},
        {"train"},
        {"api", "doctor", "rehearse"},
        {"commands"},
        {"cli"},
        {"__main__"},
    ],
    "data_prep": [
        {"files"},
        {"sources"},
        {"images"},
        {"workers"},
        {"check", "palette", "selection"},
        {"shards"},
        {"commands"},
        {"cli"},
        {"__main__"},
    ],
}
# Where the two packages meet: the format of a dataset directory, and the leaves.
MEETING = {
    f"igpt_ds.{each}" for each in ("dataset", "images", "errors", "atomic", "hashing", "hub", "lock", "reading", "text")
}
OPTIONS = {"igpt_ds.options"}  # of both command lines, which need click
# Pure arithmetic and records, and what tells in a moment, on any machine, what a job will need: none of these may load
# torch, not even through another.
WITHOUT_TORCH = {
    *("errors", "atomic", "cores", "hashing", "hub", "lock", "reading", "text"),
    *("objectives", "config", "dataset", "images", "planner", "commands.plan"),
    *("loading.order", "train.machine", "train.schedule", "train.signals", "distributed.ranks"),
}
# What shows recorded figures never loads a model.
FROM_RECORDS = {"results"}
# Embedders made of neural networks load torch when the first image is embedded, and never by being imported.
NETWORKS = {f"data_prep.selection.embedders.{name}" for name in ("_network", "timm", "open_clip")}
DEEPSPEED = {"igpt_ds.distributed.engine", "igpt_ds.distributed.zero_state"}
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


def room(module: str) -> tuple[str, int] | None:
    """A module's room and its floor; None for the package itself."""
    package, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    for number, floor in enumerate(FLOORS[package]):
        if name in floor:
            return f"{package}.{name}", number
    assert not name, f"{module} is in no room: add it to FLOORS and to docs/architecture.md"
    return None


def within(module: str, places: set[str]) -> bool:
    """Whether the module is one of these, or lies in one."""
    return any(module == place or module.startswith(f"{place}.") for place in places)


def ours(names: set[str]) -> list[str]:
    return sorted(name for name in SOURCES if within(name, {f"igpt_ds.{place}" for place in names}))


def test_the_sources_were_found() -> None:
    assert {room(name) and room(name)[0].partition(".")[2] for name in SOURCES} - {None} == {  # type: ignore[index]
        name for floors in FLOORS.values() for floor in floors for name in floor
    }
    assert "torch" in EVERYWHERE["igpt_ds.model.transformer"]
    assert "igpt_ds.distributed.engine" in EVERYWHERE["igpt_ds.train.trainer"]  # nested in a function
    assert "igpt_ds.distributed.engine" not in AT_IMPORT["igpt_ds.train.trainer"]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_rooms_import_from_the_floors_below(name: str) -> None:
    mine = room(name)
    for module in EVERYWHERE[name] & set(SOURCES):
        theirs = room(module)
        if top(module) != top(name) or not mine or not theirs or mine[0] == theirs[0]:
            continue
        assert theirs[1] < mine[1] or mine[1] == theirs[1] == 0, f"{mine[0]} imports {theirs[0]}"


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if top(n) == "data_prep"))
def test_data_prep_meets_igpt_ds_in_the_format_alone(name: str) -> None:
    assert all(within(m, MEETING | OPTIONS) or m == "igpt_ds" for m in EVERYWHERE[name] if top(m) == "igpt_ds")
    assert "torch" not in {top(module) for module in (AT_IMPORT if name in NETWORKS else EVERYWHERE)[name]}


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if top(n) == "igpt_ds"))
def test_nothing_flows_back_and_one_room_knows_deepspeed(name: str) -> None:
    outside = {top(module) for module in EVERYWHERE[name]}
    assert "data_prep" not in outside
    assert ("deepspeed" in outside) == (name in DEEPSPEED)
    assert ("igpt_ds.distributed.zero_state" in EVERYWHERE[name]) == (name == "igpt_ds.distributed.engine")


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if within(n, MEETING)))
def test_where_the_packages_meet_little_is_needed(name: str) -> None:
    libraries = {"numpy", *{"igpt_ds.images": ["PIL"], "igpt_ds.hub": ["huggingface_hub"]}.get(room(name)[0], [])}
    for module in EVERYWHERE[name]:
        assert within(module, MEETING) or top(module) in {*sys.stdlib_module_names, *libraries}, module


@pytest.mark.parametrize("name", ours(WITHOUT_TORCH))
def test_pure_modules_do_not_load_torch(name: str) -> None:
    assert "torch" not in {top(module) for module in loaded_with(name)}


@pytest.mark.parametrize("name", ours(FROM_RECORDS))
def test_figures_come_from_records(name: str) -> None:
    known = EVERYWHERE[name] | loaded_with(name)
    assert not {"torch", "igpt_ds.model.transformer", "igpt_ds.distributed.engine"} & {*known, *map(top, known)}


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if n.startswith("igpt_ds.weights.formats")))
def test_formats_know_weights_alone(name: str) -> None:
    above = ("commands", "evals", "train", "distributed", "weights.convert")
    assert not any(within(module, {f"igpt_ds.{place}" for place in above}) for module in EVERYWHERE[name])


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_what_need_not_be_installed_is_imported_when_it_is_used(name: str) -> None:
    assert not {"transformers", "tensorflow"} & {top(module) for module in AT_IMPORT[name]}


def test_the_model_knows_its_configuration_only() -> None:
    known = {module for module in EVERYWHERE["igpt_ds.model.transformer"] if top(module) == "igpt_ds"}
    assert known <= {"igpt_ds.config.schema", "igpt_ds.hashing", "igpt_ds.model.attention"}


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
