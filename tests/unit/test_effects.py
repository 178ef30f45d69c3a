"""Each kind of effect is what the workflow world says of the function of its name."""

from __future__ import annotations

import msgspec
import pytest

from mvmci.engines.embedded.effects import KINDS, request_of, show
from mvmci.engines.embedded.effects.context import Effect
from mvmci.engines.embedded.effects.http import Http
from mvmci.jobs.journal import Intent
from mvmci.sandbox import slot, wit


def dashed(names: tuple[str, ...]) -> list[str]:
    return [name.replace("_", "-") for name in names]


def test_every_function_of_the_world_is_a_kind_or_the_slots_own() -> None:
    kinds = [kind.__struct_config__.tag for kind in KINDS]
    assert sorted([*kinds, *slot.OWN]) == sorted(wit.functions())


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_has_the_fields_of_its_function_and_absent_ones_are_zero(kind: type[Effect]) -> None:
    fields = wit.functions()[str(kind.__struct_config__.tag)].fields
    assert dashed(kind.__struct_fields__) == [name for name, _ in fields]
    assert not any(default for default in kind.__struct_defaults__ if default is not msgspec.NODEFAULT)


def test_a_recorded_request_is_shown_in_a_line_and_one_that_is_not_known_by_its_kind() -> None:
    intent = Intent(
        at=1, index=0, kind="http", digest="", request=Http(method="GET", url="http://x").fields()
    )
    assert show(intent) == "http GET http://x"
    assert show(msgspec.structs.replace(intent, request=None)) == "http"
    assert show(msgspec.structs.replace(intent, kind="later", request={"kind": "later"})) == "later"


@pytest.mark.parametrize(
    "fields", [{}, {"kind": "shell", "argv": "x"}, {"kind": "sleep"}, {"kind": "sleep", "ms": "1"}]
)
def test_what_is_no_request_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(msgspec.ValidationError):
        request_of(fields)
