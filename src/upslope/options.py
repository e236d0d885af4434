"""Settings from the command line, by tyro over the dataclasses that hold them: no second set of names or defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from upslope.errors import UsageError

if TYPE_CHECKING:
    from upslope.train import Run

_Settings = TypeVar("_Settings")


def configure(run: Run, settings: Sequence[str], *, program: str) -> Run:
    """A configuration with some settings changed, as `--algorithm.clip 0.1 --steps 1e6`.

    The options are the fields of the configuration and of the very classes in it, an algorithm of the user's own
    included; what is not given stays as it is in `run`.

    Raises:
        SystemExit: after `--help` (code 0) or a setting that cannot be read (code 2).
    """
    kind = dataclasses.make_dataclass(
        type(run).__name__,
        [("algorithm", type(run.algorithm), dataclasses.field(kw_only=True))],
        bases=(type(run),),
        frozen=True,
    )
    values = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    changed = tyro.cli(
        kind,
        prog=program,
        description="Every setting of this recipe, what it is and what it is set to.",
        default=kind(**values),
        args=settings,
        config=(tyro.conf.AvoidSubcommands,),
        registry=_registry(),
        use_underscores=True,
    )
    return type(run)(**{name: getattr(changed, name) for name in values})


def as_recorded(config: Any, tree: Mapping[str, Any], where: str = "run") -> Any:
    """A configuration with the values of a tree that the same classes made, the user's own classes included.

    Raises:
        UsageError: the tree was made by another class, or by one with other settings.
    """
    names = {field.name for field in dataclasses.fields(config)}
    if tree.get("class") != type(config).__name__:
        raise UsageError(
            f"{where} is a {type(config).__name__} in the recipe and a {tree.get('class')} in the run directory: give "
            "the recipe that made the run"
        )
    if set(tree) != {"class", *names}:
        other = ", ".join(sorted(set(tree) ^ {"class", *names}))
        raise UsageError(
            f"{where} has other settings in the recipe than in the run directory ({other}): give the recipe as it was "
            "when it made the run"
        )
    values: dict[str, Any] = {}
    for name in names:
        present, recorded = getattr(config, name), tree[name]
        if dataclasses.is_dataclass(present):
            values[name] = as_recorded(present, recorded, f"{where}.{name}")
        elif isinstance(present, Path):
            values[name] = Path(recorded)
        else:
            values[name] = tuple(recorded) if isinstance(recorded, list) else recorded
    return type(config)(**values)


def parse(kind: type[_Settings], arguments: Sequence[str], *, program: str) -> _Settings:
    """A dataclass from arguments; leaves as `configure` does."""
    return tyro.cli(kind, prog=program, args=arguments, registry=_registry(), use_underscores=True)


def parse_known(kind: type[_Settings], arguments: Sequence[str], *, program: str) -> tuple[_Settings, list[str]]:
    """A dataclass from arguments, and the arguments that are not its; leaves as `configure` does."""
    return tyro.cli(
        kind, prog=program, args=arguments, registry=_registry(), use_underscores=True, return_unknown_args=True
    )


def parse_over(settings: _Settings, arguments: Sequence[str], *, program: str, description: str) -> _Settings:
    """A dataclass with some fields changed, as `--psi td_residual`; leaves as `configure` does."""
    return tyro.cli(
        type(settings),
        prog=program,
        description=description,
        default=settings,
        args=arguments,
        registry=_registry(),
        use_underscores=True,
    )


def _registry() -> ConstructorRegistry:
    """Whole numbers may be written as `1e6`."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def _whole_number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[int] | None:
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="INT",
            instance_from_str=lambda words: whole_number(words[0]),
            is_instance=lambda value: type(value) is int,
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def whole_number(text: str) -> int:
    """`128`, `1_000_000`, `1e6` or `2.5e5`.

    Raises:
        ValueError: it is no whole number.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value.is_integer():
        raise UsageError(f"{text!r} is not a whole number; write it as 250000 or 2.5e5")
    return int(value)
