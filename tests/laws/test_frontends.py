"""Every capture front end satisfies the laws. A new one gets a class here that says which it is."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.export import export

from tests.laws.frontend_laws import FrontendLaws, Layers


class TestTrace(FrontendLaws):
    frontend = "trace"


class TestModules(FrontendLaws):
    frontend = "modules"

    def make_model(self) -> nn.Module:
        class Branching(Layers):
            """Has control flow that torch.fx cannot trace."""

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x if x.device.type == "meta" or x.sum() < 1e9 else x + 1)

        return Branching()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
class TestExport(FrontendLaws):
    frontend = "export"
    runs_python = False
    keeps_modes = False  # a program has the mode that it was exported in

    def source(self, model: nn.Module, inputs: Tensor) -> Any:
        return export(model, (inputs,))

    def callable_of(self, result: Any) -> nn.Module:
        return result.module()
