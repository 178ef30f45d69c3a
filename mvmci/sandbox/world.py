"""The types of a workflow's world, and where a component differs from them.

The engine binds host functions without looking at their types, so a component that was built by hand is
told apart here. Which names a module may import and must export is for `mvmci.jobs.module` to judge. Types
are compared as text. This module handles the engine's type objects and does not load the engine.
"""

from __future__ import annotations

from typing import Any

from mvmci.jobs.module import HOST
from mvmci.sandbox import wit

CLI_RUN = "wasi:cli/run@0.2."
TYPE_DEPTH_MAX = 16

RUN = "(string)->result<string,string>"


def mismatch(component: Any, engine: object) -> str | None:
    """Where the types of `component`, which `inspect_module` calls a workflow, differ; None if nowhere."""
    for item in component.type.imports(engine).values():
        for function, extern in item.ty.exports(engine).items():
            wrong = _mismatch_of_function(function, extern.ty)
            if wrong:
                return wrong
    found = _signature(component.type.exports(engine)["run"].ty)
    return None if found == RUN else f"the component's `run` is {found}, and {RUN} is needed"


def _mismatch_of_function(name: str, type_: Any) -> str | None:
    if type(type_).__name__ != "FuncType":
        return None  # a type that the functions use
    wanted = wit.functions().get(name)
    if wanted is None:
        return f"the component imports `{HOST}#{name}`, which is not offered"
    found = _signature(type_)
    if found != str(wanted):
        return f"the component imports `{name}` as {found}, and it is {wanted}"
    return None


def _signature(type_: Any) -> str:
    if type(type_).__name__ != "FuncType":
        return "not a function"
    parameters = ",".join(_text(parameter, 0) for _, parameter in type_.params)
    return f"({parameters})->{'' if type_.result is None else _text(type_.result, 0)}"


def _text(type_: Any, depth: int) -> str:
    if depth > TYPE_DEPTH_MAX:
        return "…"
    down = depth + 1
    match type(type_).__name__:
        case "ListType":
            return f"list<{_text(type_.element, down)}>"
        case "RecordType":
            return "record{" + ",".join(f"{name}:{_text(field, down)}" for name, field in type_.fields) + "}"
        case "VariantType":
            cases = (one if part is None else f"{one}({_text(part, down)})" for one, part in type_.cases)
            return "variant{" + ",".join(cases) + "}"
        case "EnumType":
            return "enum{" + ",".join(type_.names) + "}"
        case "ResultType":
            arms = ("_" if arm is None else _text(arm, down) for arm in (type_.ok, type_.err))
            return f"result<{','.join(arms)}>"
        case name:
            return name.removesuffix("Type").lower()
