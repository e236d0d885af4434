"""Settings from the command line, by tyro over the dataclasses that hold them: no second set of names or defaults."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from upslope.errors import UsageError

if TYPE_CHECKING:
    from upslope.train.session import AnyRun

_Settings = TypeVar("_Settings")
_RunKind = TypeVar("_RunKind", bound="AnyRun")
_CHOSEN = ("task", "experience", "rollout", "algorithm")
"""Settings of a run that may be of several classes: a recipe has chosen one, whose settings are the options."""


def configure(run: _RunKind, settings: Sequence[str], *, program: str) -> _RunKind:
    """A configuration with some settings changed, as `--algorithm.clip 0.1 --steps 1e6`.

    The options are the fields of the configuration and of the very classes in it, an algorithm of the user's own
    included; what is not given stays as it is in `run`. A part that may be left out, such as `model.lora`, is there
    once one of its settings is named, and `--model.lora None` leaves it out.

    Raises:
        SystemExit: after `--help` (code 0) or a setting that cannot be read (code 2).
    """
    run, settings = _switched(run, tuple(settings))
    values = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    kind = dataclasses.make_dataclass(
        type(run).__name__,
        [(name, type(values[name]), dataclasses.field(kw_only=True)) for name in _CHOSEN if name in values],
        bases=(type(run),),
        frozen=True,
    )
    changed = tyro.cli(
        kind,
        prog=program,
        description="Every setting of this recipe, what it is and what it is set to." + _left_out(run),
        default=kind(**values),
        args=settings,
        config=(tyro.conf.AvoidSubcommands,),
        registry=_registry(),
        use_underscores=True,
    )
    return type(run)(**{name: getattr(changed, name) for name in values})


def _switched(config: Any, settings: tuple[str, ...], prefix: str = "--") -> tuple[Any, tuple[str, ...]]:
    """The configuration with parts put in that settings name, and left out where they say None; the other settings."""
    for name, kind in _parts(config):
        value, option = getattr(config, name), f"{prefix}{name}"
        words = [word.replace("-", "_").replace("__", "--", 1) for word in settings]
        changed = value
        if kind is not None and option in words and settings[words.index(option) + 1 :][:1] == ("None",):
            place = words.index(option)
            changed, settings = None, settings[:place] + settings[place + 2 :]
        elif kind is not None and value is None and any(word.startswith(f"{option}.") for word in words):
            changed = kind()
        if dataclasses.is_dataclass(changed):
            changed, settings = _switched(changed, settings, f"{option}.")
        if changed is not value:
            config = dataclasses.replace(config, **{name: changed})
    return config, settings


def _left_out(config: Any) -> str:
    """Which parts are not there, and which settings would put them in."""
    lines = [
        f"--{name}.{{{', '.join(field.name for field in dataclasses.fields(kind))}}}" for name, kind in _absent(config)
    ]
    return f" Left out, and put in by naming one of their settings: {'; '.join(lines)}." if lines else ""


def _absent(config: Any, prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    for name, kind in _parts(config):
        value = getattr(config, name)
        if value is None and kind is not None:
            yield f"{prefix}{name}", kind
        elif value is not None:
            yield from _absent(value, f"{prefix}{name}.")


def _parts(config: Any) -> Iterator[tuple[str, type[Any] | None]]:
    """Fields that hold settings of their own, or might, and the class of those that may be left out."""
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        kinds = get_args(hints[field.name])
        present = [kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
        optional = present if NoneType in kinds else []
        if optional or dataclasses.is_dataclass(getattr(config, field.name)):
            yield field.name, optional[0] if len(optional) == 1 else None


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
