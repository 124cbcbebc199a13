from __future__ import annotations

import pytest

from fxfact.utils.pt2_safety import _is_arithmetic, _is_guard, _is_operator


@pytest.mark.parametrize(
    ("guard", "harmless"),
    [
        ("L['x'].size()[0] >= 2 and L['x'].size()[1] == 3", True),
        ("L['more']['a'].stride()[0] <= 2 * math.floor(L['x'].size()[2] / 4)", True),
        ("L['x'].tofile('name')", False),
        ("L.__class__", False),
        ("exec(L['x'])", False),
        ("L['x'].size()[0] == 1, '')\n  exec", False),
    ],
)
def test_guards_may_only_compare_sizes(guard: str, harmless: bool) -> None:
    assert _is_guard(guard) == harmless


@pytest.mark.parametrize(
    ("target", "harmless"),
    [
        ("torch.ops.aten.conv2d.default", True),
        ("torch.ops.higher_order.cond", True),
        ("torch.ops.unknown.operator.default", True),  # PyTorch refuses it
        ("_operator.add", True),
        ("math.trunc", True),
        ("torch.sym_not", True),
        ("torch.load", False),
        ("torch.ops.load_library", False),
        ("torch.ops.aten.conv2d.default.__init__", False),
        ("_operator.call", False),
        ("_operators.call", False),  # the reader looks at the beginning alone
        ("maths.__loader__.load_module", False),
        ("somebody.load", True),  # stays text, which PyTorch refuses
    ],
)
def test_targets_may_only_be_operators(target: str, harmless: bool) -> None:
    assert _is_operator(target) == harmless


@pytest.mark.parametrize(
    ("expression", "harmless"),
    [
        ("Symbol('s77', positive=True, integer=True)", True),
        ("Add(Mul(Integer(2), Symbol('u0', integer=True)), Integer(-1))", True),
        ("FloorDiv(s0, 2)", False),  # a bare symbol is not a name that the reader knows
        ("Max(Integer(1), FloorDiv(Symbol('s1'), Integer(2)))", True),
        ("eval(Symbol('s1'))", False),
        ("chr(95)", False),
        ("Symbol('__import__')", False),
        ("().__class__", False),
        ("Integer(1) if 1 else 2", False),
    ],
)
def test_sizes_may_only_be_arithmetic(expression: str, harmless: bool) -> None:
    assert _is_arithmetic(expression) == harmless
