"""`deit train`, `deit finetune`, `deit fixres`: their flags are the settings of Options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict, TypeVar

from deit import settings
from deit.commands import flags
from deit.recipes import RECIPES, Recipe
from deit.training.options import Distillation, Options, Shape

T = TypeVar("T")

RecipeName = Literal["deit", "deit3", "finetune", "fashion-mnist", "folder", "fixres"]

# How the help shows a value that may be left out, and one that may be None.
LEFT_OUT = {str | None: "NAME", int | None: "INT", float | None: "FLOAT"}
OR_NONE = {str | None: "NAME|None", float | None: "FLOAT|None"}


def _of_recipe(line: Field[Any], kind: Any) -> Any:
    """A recipe's setting as a flag; its help shows the value in each recipe."""
    values = {name: _shown(getattr(recipe, line.name)) for name, recipe in RECIPES.items()}
    usual = values.pop("deit")
    others = ", ".join(f"{name} {value}" for name, value in values.items() if value != usual)
    hint = f"({usual}; {others})" if others else f"({usual})"
    metavar = OR_NONE.get(kind)
    note = flags.arg(help=line.metadata["help"], help_behavior_hint=hint, metavar=metavar)
    return Annotated[kind, note]


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _of_options(line: Field[Any], kind: Any) -> Any:
    """A setting of Options as a flag; where it may be left out, its help says what happens then."""
    how: dict[str, Any] = {"help": line.metadata["help"]}
    if kind in LEFT_OUT:
        how["metavar"] = LEFT_OUT[kind]
    if kind in LEFT_OUT or line.default == ():
        how["help_behavior_hint"] = ""
    return Annotated[kind, flags.arg(**how)]


if TYPE_CHECKING:
    Changes = Mapping[str, Any]
else:  # Recipe's settings as flags that may all be left out: only what is given is in the mapping
    Changes = TypedDict(
        "Changes",
        {line.name: _of_recipe(line, kind) for _, line, kind in settings.lines(Recipe)},
        total=False,
    )


def _flags() -> dict[str, tuple[Any, Any]]:
    """Types and fields of the flags by name, in the order of the help."""
    help = "Where the settings that no flag changes come from."
    recipe = Annotated[RecipeName, flags.arg(help=help)]
    found: dict[str, tuple[Any, Any]] = {}
    for group, line, kind in settings.lines(Options):
        if group == "recipe":
            found["recipe"] = recipe, field(default="deit", metadata={"help": help})
        else:
            found[settings.flag(line)] = _of_options(line, kind), line
    order = list(found)
    for flag, (_, line) in found.items():
        if before := line.metadata.get("before"):
            order.remove(flag)
            order.insert(order.index(before), flag)
    return {flag: found[flag] for flag in order}


def _with_flags(**defaults: Any) -> Callable[[type[T]], type[T]]:
    """Makes a class a dataclass whose first fields are the flags, some with other defaults."""

    def made(kind: type[T]) -> type[T]:
        own = dict(kind.__annotations__)
        kind.__annotations__ = {name: hint for name, (hint, _) in FLAGS.items()} | own
        for name, (_, line) in FLAGS.items():
            default = defaults.get(name, line.default)
            setattr(kind, name, field(default=default, metadata=line.metadata))
        return dataclass(frozen=True)(kind)

    return made


FLAGS = _flags()


@_with_flags()
class Train:
    """Train a network, with or without a teacher.

    A run that was stopped goes on when the same command is given again.
    """

    changes: Annotated[Changes, flags.arg(name="recipe's")] = field(default_factory=dict)
    """Each replaces one line of the recipe. In brackets: its value in the recipe `deit`, then in
    the recipes that have another."""

    def options(self) -> Options:
        """What the flags say, as the trainer takes it."""
        given = vars(self)
        groups: dict[str, dict[str, Any]] = {"": {}, "shape": {}, "distillation": {}}
        for group, line, _ in settings.lines(Options):
            if group != "recipe":
                groups[group][line.name] = given[settings.flag(line)]
        return Options(
            recipe=replace(RECIPES[given["recipe"]], **self.changes),
            distillation=Distillation(**groups["distillation"]),
            shape=Shape(**groups["shape"]),
            **groups[""],
        )

    def run(self) -> int:
        """Train; 0 at the end, and after a signal with a checkpoint written."""
        from deit.training.trainer import train

        train(self.options())
        return 0


@_with_flags(recipe="finetune", img_size=384)
class Finetune(Train):
    """Train on from weights, as a rule at a higher resolution: both labels stay in the loss.

    The teacher should be brought to the same resolution first: `deit fixres`.
    """


@_with_flags(recipe="fixres", img_size=384, train_only="classifier")
class Fixres(Train):
    """Adapt a trained network's classifier and batch norms to another resolution (FixRes)."""
