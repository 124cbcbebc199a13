"""The docstrings of what fxfact exports have Args, Returns and Raises sections that agree with the signatures."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.fx.passes.infra.pass_base import PassBase

import fxfact
from fxfact import errors

SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples|Note):$", flags=re.MULTILINE)


def exported() -> Iterator[tuple[str, Any]]:
    """Every function, class and public method that users see: of fxfact, its layers, factorizations and passes."""
    modules = [fxfact, *(getattr(fxfact, name) for name in ("factorizations", "nn", "passes"))]
    seen = set()
    for module in modules:
        for name in module.__all__:
            item = getattr(module, name)
            is_public = inspect.isfunction(item) or inspect.isclass(item)
            if module is fxfact.passes:  # its functions and records serve other rooms
                is_public = inspect.isclass(item) and issubclass(item, PassBase)
            if not is_public or id(item) in seen:
                continue
            seen.add(id(item))
            yield f"{module.__name__}.{name}", item
            if inspect.isclass(item):
                yield from (
                    (f"{module.__name__}.{name}.{method}", function) for method, function in public_methods(item)
                )


def public_methods(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public methods that a class adds. A method that overrides another one keeps its contract."""
    for name, member in vars(cls).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        is_new = not any(hasattr(base, name) for base in cls.__bases__)
        if is_new and not name.startswith("_") and inspect.isfunction(function):
            yield name, function


EXPORTED = dict(exported())
FUNCTIONS = {name: item for name, item in EXPORTED.items() if not inspect.isclass(item)}
CLASSES = {name: item for name, item in EXPORTED.items() if inspect.isclass(item)}


def sections(docstring: str) -> dict[str, str]:
    """The text of each section of a docstring in Google style."""
    parts = SECTION.split(inspect.cleandoc(docstring))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def names_in(section: str) -> list[str]:
    """The names that a section describes: those before a colon, at the first level of indentation."""
    found = re.findall(r"^ {4}(\S[^:\n]*):", section, flags=re.MULTILINE)
    return [re.sub(r"\s*\(.*?\)", "", name).lstrip("*").strip("`") for entry in found for name in entry.split(", ")]


def parameters_of(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_args_name_the_parameters(name: str) -> None:
    function = FUNCTIONS[name]
    found = names_in(sections(function.__doc__ or "").get("Args", ""))
    assert found == parameters_of(function)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_returns_section_describes_a_result(name: str) -> None:
    function = FUNCTIONS[name]
    annotation = inspect.signature(function).return_annotation
    returns = {"Returns", "Yields"} & set(sections(function.__doc__ or ""))
    assert bool(returns) == (annotation not in (None, "None", "NoReturn"))


@pytest.mark.parametrize("name", EXPORTED)
def test_raises_section_names_exceptions(name: str) -> None:
    item = EXPORTED[name]
    raises = sections(item.__doc__ or "").get("Raises")
    if inspect.isfunction(item) and re.search(r"^ +raise \w", inspect.getsource(item), flags=re.MULTILINE):
        assert raises is not None
    for exception in names_in(raises or ""):
        found = getattr(errors, exception, None) or getattr(builtins, exception, None)
        assert isinstance(found, type), exception
        assert issubclass(found, BaseException), exception


@pytest.mark.parametrize("name", CLASSES)
def test_class_docstring_names_its_parameters(name: str) -> None:
    cls = CLASSES[name]
    described = [sections(base.__doc__ or "") for base in cls.__mro__ if base.__module__.startswith("fxfact")]
    found = {name for each in described for key in ("Args", "Attributes") for name in names_in(each.get(key, ""))}
    if dataclasses.is_dataclass(cls) and cls.__dataclass_params__.init:
        expected = [field.name for field in dataclasses.fields(cls) if field.init and not field.name.startswith("_")]
    elif "__init__" in vars(cls):
        expected = parameters_of(cls)
    else:
        expected = []
    assert set(expected) <= found
