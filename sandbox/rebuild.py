"""Gives a decoded result the types that the function's return annotation names.

The annotation is the contract: what came from the jail is checked against it, and dataclasses, enums, named tuples
and pydantic models are built from it by their own constructors, which validate. No class is ever chosen by a name
from the jail, except among those that the annotation itself offers. Without an annotation (or with Any) plain data
passes as it is.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sandbox.reply import Encoded

_SIMPLE = (str, int, float, bool, bytes, type(None))
# What typing (PEP 484) lets stand for a wider number.
_PROMOTED: dict[type, tuple[type, ...]] = {float: (int,), complex: (int, float)}
_BUILTINS = (str, int, float, bytes, bytearray, list, tuple, dict, set, frozenset)
# numpy scalars stand for Python's: functions declared `-> int` return numpy's integers all the time.
_NUMPY_KINDS = {int: "iu", float: "iuf", bool: "b", complex: "iufc", bytes: "S", str: "U"}
_STEPS_MAX = 4_000_000


class Mismatch(ValueError):
    """The result is not what the annotation says; `where` is the path to the part that differs."""

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = ""
        # Whether another member of a union is not worth trying.
        self.final = final

    def __str__(self) -> str:
        return f"{self.reason} (at result{self.where})"


@dataclass(frozen=True, slots=True)
class Unresolved:
    """A return annotation that cannot be evaluated: its text, and why."""

    text: str
    reason: str


def return_annotation(func: Callable[..., Any]) -> Any:
    """Return what `func` is declared to return, evaluated; Any when it says nothing, `Unresolved` when it cannot be.

    Only the return annotation is evaluated: a parameter's that cannot be must not stand in the way.
    """
    try:
        annotation = func.__annotations__.get("return", Any)
    except NameError as error:  # annotations are evaluated on access since Python 3.14
        return Unresolved("its return annotation", str(error))
    if annotation is Any:
        return Any
    if annotation is None:
        return type(None)
    holder = types.SimpleNamespace(__annotations__={"return": annotation})
    while hasattr(func, "__wrapped__"):
        # functools.wraps copies the annotations, but their names belong to the module of what is wrapped.
        func = func.__wrapped__
    cells = zip(func.__code__.co_freevars, func.__closure__ or (), strict=False)
    try:
        # Names of an enclosing function are visible only if the body uses them too: that is all Python keeps.
        local = {name: cell.cell_contents for name, cell in cells}
        hints = typing.get_type_hints(holder, func.__globals__, local, include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError, ValueError) as error:
        return Unresolved(str(annotation), f"{type(error).__name__}: {error}")
    return hints["return"]


def rebuild(value: Any, annotation: Any, *, has_objects: bool = True) -> Any:
    """Return `value` as `annotation` declares it. Raises Mismatch. `has_objects`: it has `Encoded` somewhere."""
    return _Rebuilder(has_objects).build(value, annotation)


class _Rebuilder:
    """One rebuild. Counts its steps: a union of overlapping containers could otherwise be tried for ever."""

    def __init__(self, has_objects: bool) -> None:
        self._has_objects = has_objects
        self._steps_left = _STEPS_MAX
        self._hints: dict[type, dict[str, Any]] = {}
        self._simple: dict[int, tuple[Any, frozenset[type]]] = {}

    def build(self, value: Any, annotation: Any) -> Any:
        self._steps_left -= 1
        if self._steps_left < 0:
            raise Mismatch("the result is too large to be checked against its annotation", final=True)
        if annotation is Any or annotation is object or isinstance(annotation, Unresolved):
            return self._untyped(value, annotation)
        if annotation is None:
            annotation = type(None)
        if type(value) is annotation and annotation in _SIMPLE:
            return value
        if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
            return self._of_class(value, annotation)
        return self._special(value, annotation)

    def _untyped(self, value: Any, annotation: Any) -> Any:
        if not self._has_objects:
            return value
        if isinstance(value, Encoded):
            if isinstance(annotation, Unresolved):
                raise Mismatch(f"its annotation {annotation.text!r} cannot be evaluated ({annotation.reason})")
            raise Mismatch(f"to have this {value.label} rebuilt, name its class in the return annotation")
        if type(value) in (list, tuple, set, frozenset):
            return self._each(value, annotation)
        if type(value) is dict:
            return self._entries(value, annotation, annotation)
        return value

    def _special(self, value: Any, annotation: Any) -> Any:
        """Everything that is not a plain class: unions, literals, aliases, parametrised containers."""
        origin = typing.get_origin(annotation)
        args = typing.get_args(annotation)
        if origin is typing.Annotated:
            return self.build(value, args[0])
        if _is_union(annotation):
            return self._union(value, args)
        if origin is typing.Literal:
            return self._literal(value, args)
        if origin is not None and hasattr(origin, "__value__"):
            return self.build(value, origin.__value__)
        if isinstance(origin, type):
            return self._container(value, origin, args)
        for name in ("__supertype__", "__value__", "__bound__"):  # NewType, `type X = ...`, TypeVar
            if getattr(annotation, name, None) is not None:
                return self.build(value, getattr(annotation, name))
        if annotation is typing.LiteralString:
            return self.build(value, str)
        return self._untyped(value, Any)

    def _union(self, value: Any, options: tuple[Any, ...]) -> Any:
        if isinstance(value, Encoded):
            options = tuple(sorted(options, key=lambda option: _label(option) != value.label))
        reasons = []
        for option in options:
            try:
                return self.build(value, option)
            except Mismatch as mismatch:
                if mismatch.final:
                    raise
                reasons.append(mismatch)
        deepest = max(reasons, key=lambda mismatch: len(mismatch.where))
        if deepest.where:
            raise deepest
        raise Mismatch(f"{_what(value)} is none of {', '.join(map(_name, options))}")

    def _literal(self, value: Any, options: tuple[Any, ...]) -> Any:
        for option in options:
            if isinstance(option, enum.Enum) and isinstance(value, Encoded):
                member = self._of_class(value, type(option))
                if member is option:
                    return option
            elif type(option) is type(value) and option == value:
                return value
        raise Mismatch(f"{_what(value)} is not one of {', '.join(map(repr, options))}")

    def _container(self, value: Any, origin: type, args: tuple[Any, ...]) -> Any:
        if isinstance(value, Encoded) or hasattr(origin, "__dataclass_fields__"):
            return self._of_class(value, origin)
        if not isinstance(value, origin) and not (issubclass(origin, _BUILTINS) and _is_base(value, origin)):
            raise Mismatch(f"{_what(value)} is not a {_name(origin)}")
        if type(value) is tuple and origin is tuple:
            return self._tuple(value, args)
        if type(value) in (list, tuple, set, frozenset) and len(args) == 1:
            return self._each(value, args[0])
        if type(value) is dict and len(args) == 2:
            return self._entries(value, *args)
        return self._untyped(value, Any)

    def _tuple(self, value: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(self._each(value, args[0]))
        if len(args) != len(value):
            raise Mismatch(f"a tuple of {len(value)} where the annotation has {len(args)}")
        return tuple(self._at(item, arg, f"[{i}]") for i, (item, arg) in enumerate(zip(value, args, strict=True)))

    def _each(self, values: Any, annotation: Any) -> Any:
        if self._are_simple(values, annotation):
            return values
        built = [self._at(item, annotation, f"[{i}]") for i, item in enumerate(values)]
        return built if type(values) is list else type(values)(built)

    def _are_simple(self, values: Iterable[Any], annotation: Any) -> bool:
        """Whether all of them are of simple classes that the annotation names.

        Most large results are such; comparing classes takes one pass in C, and building each value takes longer.
        """
        # Kept with the annotation itself, so that its id is not given to another one meanwhile.
        _, simple = self._simple.get(id(annotation), (None, None))
        if simple is None:
            options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
            named = {type(None) if option is None else option for option in options}
            simple = frozenset(_SIMPLE if annotation in (Any, object) else named & set(_SIMPLE))
            self._simple[id(annotation)] = annotation, simple
        return bool(simple) and simple.issuperset(map(type, values))

    def _entries(self, values: dict[Any, Any], key_annotation: Any, annotation: Any) -> dict[Any, Any]:
        if self._are_simple(values, key_annotation) and self._are_simple(values.values(), annotation):
            return values
        built = {}
        for key, item in values.items():
            built[self._at(key, key_annotation, ".keys()")] = self._at(item, annotation, f"[{_short(key)}]")
        return built

    def _at(self, value: Any, annotation: Any, step: str) -> Any:
        try:
            return self.build(value, annotation)
        except Mismatch as mismatch:
            mismatch.where = step + mismatch.where
            raise

    def _of_class(self, value: Any, cls: type) -> Any:
        if hasattr(cls, "__required_keys__") and hasattr(cls, "__total__"):  # a TypedDict, of any library
            return self._typed_dict(value, cls)
        if isinstance(value, Encoded):
            return self._object(value, cls)
        if cls in _BUILTINS and type(value) is cls:
            return self._untyped(value, Any)
        if _is_instance(value, cls) or isinstance(value, _PROMOTED.get(cls, ())):
            return self._untyped(value, Any)
        kind = getattr(getattr(value, "dtype", None), "kind", "")
        if kind and kind in _NUMPY_KINDS.get(cls, "") and getattr(value, "shape", None) == ():
            return value
        if _is_base(value, cls):
            return self._untyped(value, Any)
        raise Mismatch(f"{_what(value)} is not a {_name(cls)}")

    def _typed_dict(self, value: Any, cls: Any) -> dict[str, Any]:
        if type(value) is not dict:
            raise Mismatch(f"{_what(value)} is not a {_name(cls)}")
        hints = self._hints_of(cls)
        missing = sorted(key for key in _required(cls) if key not in value)
        unknown = sorted(map(repr, set(value) - set(hints))) if hints else []
        if missing or unknown:
            raise Mismatch(f"a {_name(cls)} with {'missing' if missing else 'unknown'} keys {missing or unknown}")
        return {key: self._at(item, hints.get(key, Any), f"[{key!r}]") for key, item in value.items()}

    def _hints_of(self, cls: type) -> dict[str, Any]:
        if cls not in self._hints:
            try:
                self._hints[cls] = typing.get_type_hints(cls)
            except (NameError, AttributeError, TypeError, SyntaxError, ValueError):
                # A class whose annotations cannot be evaluated here is checked by its constructor alone.
                self._hints[cls] = {}
        return self._hints[cls]

    def _object(self, value: Encoded, cls: Any) -> Any:
        """Build `cls` from the fields, by the constructor that fits what it is."""
        fields = dict(value.fields)
        try:
            if value.kind == "enum" and issubclass(cls, enum.Enum):
                return _member(cls, fields)
            if value.kind == "model" and hasattr(cls, "model_validate"):
                return _model(cls, fields)
            if value.kind == "url" and cls.__module__.partition(".")[0] in ("pydantic", "pydantic_core"):
                return cls(fields["url"])
            named = value.kind == "namedtuple" and issubclass(cls, tuple) and hasattr(cls, "_fields")
            if named or (value.kind == "dataclass" and hasattr(cls, "__dataclass_fields__")):
                hints = self._hints_of(cls)
                return cls(**{n: self._at(item, hints.get(n, Any), f".{n}") for n, item in value.fields})
        except Mismatch:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise Mismatch(f"{_name(cls)} does not accept it: {type(error).__name__}: {error}"[:2000]) from error
        raise Mismatch(f"a {value.label} is not a {_name(cls)}")


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _required(cls: Any) -> set[str]:
    """The keys a TypedDict must have. `__required_keys__` overlooks Required[] under postponed annotations."""
    required = set(cls.__required_keys__)
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except (NameError, AttributeError, TypeError, SyntaxError, ValueError):
        return set()
    for name, hint in hints.items():
        if typing.get_origin(hint) is typing.NotRequired:
            required.discard(name)
        elif typing.get_origin(hint) is typing.Required:
            required.add(name)
    return required


def _member(cls: Any, fields: dict[str, Any]) -> Any:
    member = cls.__members__.get(fields["name"]) if isinstance(fields["name"], str) else None
    return member if member is not None else cls(fields["value"])


def _model(cls: Any, fields: dict[str, Any]) -> Any:
    import pydantic

    plain = {name: _plain(item) for name, item in fields.items()}
    if issubclass(cls, pydantic.RootModel):
        return cls.model_validate(plain["root"])
    if tuple(map(int, pydantic.VERSION.split(".")[:2])) >= (2, 11):
        return cls.model_validate(plain, by_alias=False, by_name=True)
    aliases = {name: info.validation_alias or name for name, info in cls.model_fields.items()}
    return cls.model_validate({aliases.get(name, name): item for name, item in plain.items()})


def _plain(value: Any) -> Any:
    """Objects as dictionaries and bare values: pydantic builds the parts of a model from its own schema."""
    if isinstance(value, Encoded):
        fields = dict(value.fields)
        if value.kind in ("enum", "url"):
            return _plain(fields["value" if value.kind == "enum" else "url"])
        if set(fields) == {"root"} and value.kind == "model":
            return _plain(fields["root"])
        return {name: _plain(item) for name, item in fields.items()}
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(_plain, value))
    if type(value) is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value


def _is_instance(value: Any, cls: type) -> bool:
    try:
        return isinstance(value, cls)
    except TypeError:
        # A protocol that is not runtime_checkable says nothing that could be checked.
        return True


def _is_base(value: Any, cls: type) -> bool:
    """Whether `value` is the builtin that `cls` extends: a subclass of a builtin leaves the jail as the builtin."""
    return type(value) in _BUILTINS and cls is not bool and issubclass(cls, type(value)) and not hasattr(cls, "_fields")


def _label(annotation: Any) -> str:
    cls = typing.get_origin(annotation) or annotation
    module = getattr(cls, "__module__", "")
    name = getattr(cls, "__qualname__", "?")
    return name if module == "builtins" else f"{module}.{name}"


def _name(annotation: Any) -> str:
    return "None" if annotation is type(None) else getattr(annotation, "__qualname__", None) or str(annotation)


def _what(value: Any) -> str:
    if isinstance(value, Encoded):
        return f"a {value.label}"
    if value is None:
        return "None"
    text = _short(value)
    return f"a {type(value).__qualname__}" if text == "..." else f"{type(value).__qualname__} {text}"


def _short(value: Any) -> str:
    """A simple value's repr if it is short; asking a large int for one raises ValueError (over 4300 digits)."""
    if type(value) not in _SIMPLE or (type(value) is int and value.bit_length() > 128):
        return "..."
    text = repr(value[:60] if isinstance(value, str | bytes) else value)
    return text if len(text) < 60 else "..."
