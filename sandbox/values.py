"""Dataclasses that cost little to make: `dataclass`, `field`, `replace` and `asdict` as of the module `dataclasses`.

That one writes the text of five methods for each class and has it compiled, half a millisecond each time. A supervisor
that serves one command has thirty such classes, and they were a fifth of what it loads. Here all classes share their
methods. What there is not: order, inherited fields, `__post_init__`, slots (the word is accepted). To everyone else a
class of ours is a dataclass: `dataclasses.fields`, `replace` and `asdict` take it.
"""

from __future__ import annotations

# Not from typing, which takes its time to load.
TYPE_CHECKING = False

if TYPE_CHECKING:
    # The type checker knows what they are.
    from dataclasses import asdict, dataclass, field, replace
else:
    _MISSING = object()

    class _Field:
        """The default of one field: a value, or what makes one."""

        __slots__ = ("compare", "default", "factory", "repr")

        def __init__(self, *, default=_MISSING, default_factory=None, repr=True, compare=True):
            self.default = default
            self.factory = default_factory
            self.repr = repr
            self.compare = compare

    class _Shape:
        """The fields of one class. Takes their defaults off it where `dataclasses` would."""

        __slots__ = ("compared", "defaults", "factories", "known", "names", "shown")

        def __init__(self, cls):
            self.names = tuple(cls.__annotations__)
            self.known = frozenset(self.names)
            self.defaults = {name: cls.__dict__[name] for name in self.names if name in cls.__dict__}
            fields = {name: value for name, value in self.defaults.items() if isinstance(value, _Field)}
            for name, value in fields.items():
                if value.default is _MISSING:
                    del self.defaults[name]
                    delattr(cls, name)
                else:
                    self.defaults[name] = value.default
                    setattr(cls, name, value.default)
            self.factories = {name: value.factory for name, value in fields.items() if value.factory is not None}
            self.shown = tuple(name for name in self.names if name not in fields or fields[name].repr)
            self.compared = tuple(name for name in self.names if name not in fields or fields[name].compare)

    class _Fields:
        """What the module `dataclasses` wants of a class, made when somebody asks for it."""

        def __get__(self, instance, cls):
            import dataclasses

            shape = cls.__shape__
            body = {"__annotations__": dict(cls.__annotations__), **shape.defaults}
            for name, factory in shape.factories.items():
                body[name] = dataclasses.field(default_factory=factory)
            twin = dataclasses.dataclass(type(cls.__name__, (), body))
            cls.__dataclass_fields__ = twin.__dataclass_fields__
            return twin.__dataclass_fields__

    def _init(self, *args, **given):
        shape = self.__shape__
        values = {**shape.defaults, **dict(zip(shape.names, args, strict=False)), **given}
        for name, factory in shape.factories.items():
            if name not in values:
                values[name] = factory()
        if values.keys() != shape.known or len(args) > len(shape.names) or (args and _twice(shape, args, given)):
            raise TypeError(_complaint(type(self), args, given))
        self.__dict__.update(values)

    def _twice(shape, args, given):
        return bool(given) and not given.keys().isdisjoint(shape.names[: len(args)])

    def _complaint(cls, args, given):
        shape = cls.__shape__
        places = shape.names[: len(args)]
        problems = {
            "unknown": given.keys() - shape.known,
            "given twice": given.keys() & set(places),
            "missing": shape.known - set(places) - given.keys() - shape.defaults.keys() - shape.factories.keys(),
        }
        told = [f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
        extra = [f"{len(args)} values for {len(shape.names)} fields"] if len(args) > len(shape.names) else []
        return f"{cls.__qualname__}(): {'; '.join(extra + told)}"

    def _repr(self):
        parts = (f"{name}={getattr(self, name)!r}" for name in self.__shape__.shown)
        return f"{type(self).__qualname__}({', '.join(parts)})"

    def _key(self):
        values = self.__dict__
        return tuple([values[name] for name in self.__shape__.compared])

    def _eq(self, other):
        if other.__class__ is not self.__class__:
            return NotImplemented
        return _key(self) == _key(other)

    def _hash(self):
        return hash(_key(self))

    def _refuse_set(_self, name, _value):
        raise AttributeError(f"cannot assign to field {name!r}")

    def _refuse_delete(_self, name):
        raise AttributeError(f"cannot delete field {name!r}")

    def dataclass(cls=None, /, *, frozen=False, slots=False):  # noqa: ARG001 - instances are few
        """As `dataclasses.dataclass`."""

        def made(cls):
            cls.__shape__ = _Shape(cls)
            cls.__dataclass_fields__ = _Fields()
            cls.__match_args__ = cls.__shape__.names
            methods = {"__init__": _init, "__repr__": _repr, "__eq__": _eq, "__hash__": _hash if frozen else None}
            if frozen:
                methods |= {"__setattr__": _refuse_set, "__delattr__": _refuse_delete}
            own = cls.__dict__
            for name, method in methods.items():
                # As there: what the class says itself stays, but for its making, and a class always has some hash.
                if name not in own or (name == "__hash__" and own[name] is None):
                    setattr(cls, name, method)
            return cls

        return made if cls is None else made(cls)

    def field(**settings):
        """As `dataclasses.field`: `default`, `default_factory`, `repr`, `compare`."""
        return _Field(**settings)

    def replace(value, /, **changes):
        """As `dataclasses.replace`."""
        shape, old = value.__shape__, value.__dict__
        if not changes.keys() <= shape.known:
            raise TypeError(_complaint(type(value), (), changes))
        new = object.__new__(type(value))
        # Not all of the old one's dictionary: a cached property's answer is of the old fields.
        new.__dict__.update([(name, old[name]) for name in shape.names])
        new.__dict__.update(changes)
        return new

    def asdict(value):
        """As `dataclasses.asdict`: a copy of everything, with dictionaries in place of instances."""
        return {name: _plain(getattr(value, name)) for name in value.__shape__.names}

    def _plain(value):
        kind = type(value)
        if kind in _ATOMS:
            return value
        if hasattr(kind, "__shape__"):
            return asdict(value)
        if isinstance(value, dict):
            return {_plain(key): _plain(item) for key, item in value.items()}
        if hasattr(kind, "_fields") and isinstance(value, tuple):
            return kind(*map(_plain, value))
        if isinstance(value, (list, tuple)):
            return kind(map(_plain, value))
        from copy import deepcopy

        return deepcopy(value)

    _ATOMS = frozenset({str, int, float, bool, bytes, type(None)})


__all__ = ["asdict", "dataclass", "field", "replace"]
