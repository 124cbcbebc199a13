"""A pass manager whose errors say why a pass failed."""

from __future__ import annotations

from typing import final

from torch import nn
from torch.fx.passes.infra import pass_manager
from torch.fx.passes.infra.pass_base import PassResult

from fxfact.errors import FxfactError


@final
class PassManager(pass_manager.PassManager):
    """``torch.fx.passes.infra.pass_manager.PassManager``, with the errors of fxfact's passes.

    If a pass fails, PyTorch's manager raises an ``Exception`` that names the pass, and has the reason only as its
    ``__cause__``. For a pass of fxfact, this one raises the error of the pass, with the reason in its message.
    """

    def __call__(self, module: nn.Module) -> PassResult:
        """Run the passes.

        Args:
            module: the graph module.

        Returns:
            The result of the last pass. ``modified`` says whether any of them changed anything.

        Raises:
            FxfactError: what a pass of fxfact raises.
        """
        try:
            return super().__call__(module)
        except Exception as error:
            reason = error.__cause__
            if not isinstance(reason, FxfactError):
                raise
            raise type(reason)(f"{error}: {reason}") from reason
