"""A report made: both networks looked at, verified and timed."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfact.analysis.block_diagram import build_block_diagram, chains_of
from fxfact.analysis.html import page
from fxfact.analysis.inspection import looked_at
from fxfact.analysis.report_data import ConvReport, ReportData, Spectrum
from fxfact.analysis.verification import SiteErrors, plain_copy, stages_of, verify
from fxfact.capture import Captured, ExampleInputs, copy_arguments
from fxfact.conv import ConvSite, write_chain, write_conv
from fxfact.errors import ArgumentError, FileError
from fxfact.factorizations import Tucker
from fxfact.passes import capture_as_planned, last_plan
from fxfact.planning import Decision, Plan
from fxfact.utils import (
    Progress,
    as_json,
    atomic_write,
    check_path,
    peak_bytes,
    random_numbers,
    side_by_side,
    to_eval,
    with_progress,
)


class Report(ReportData):
    """``print`` it, ``to_json``, ``to_html``, or ``save`` it."""

    def to_html(self) -> str:
        """One page that needs nothing else: no network, no scripts or styles from elsewhere."""
        return page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page to a file NAME.html, or JSON to NAME.json. Raises ArgumentError, ArgumentTypeError,
        FileError.
        """
        check_path(path)
        name = os.fspath(path)
        if not name.endswith((".html", ".json")):
            raise ArgumentError(f"a report is written to NAME.html or NAME.json, got {name}")
        text = self.to_html() if name.endswith(".html") else as_json(self.to_json(), indent=1) + "\n"
        try:
            with atomic_write(path) as file:
                file.write(text.encode())
        except OSError as error:
            raise FileError(f"{name}: the report cannot be written there: {error}") from error


@torch.no_grad()
def report(
    original: nn.Module | ExportedProgram,
    factorized: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    *,
    progress: Progress = False,
) -> Report:
    """What was done to ``original``, what it saves and what it costs, by convolution and in the whole.

    Both are run and timed on ``example_inputs`` (of an ExportedProgram by default its own), taking turns, in evaluation
    mode, on copies; every convolution and its chain also alone. ``progress`` is that of ``factorize``. Raises
    ArgumentError, CaptureError, PlanError where ``factorized`` was not made of ``original`` by a plan.
    """
    plan = last_plan(factorized)
    captured = capture_as_planned(original, plan, example_inputs)
    if example_inputs is None and (example_inputs := captured.example_inputs) is None:
        raise ArgumentError("a report compares and times on inputs: pass example_inputs")
    verified = verify(original, factorized, example_inputs)
    errors = {site.path: site for site in verified.sites}
    networks = [to_eval(plain_copy(network)) for network in (original, factorized)]
    plan = _with_sizes(plan, captured)
    sites = {site.path: site for site in captured.sites}
    convolutions = tuple(
        _convolution(decision, sites.get(decision.path), networks[1], errors.get(decision.path))
        for decision in with_progress(plan, len(plan), "reporting", progress)
    )
    args, kwargs = copy_arguments(example_inputs)
    calls = [partial(network, *args, **kwargs) for network in networks]
    ms, peaks = side_by_side(calls), [peak_bytes(call) for call in calls]
    return Report(
        model=plan.model, capture=plan.capture, refused=plan.refused, before=plan.network, after=plan.after,
        milliseconds=(ms[0], ms[1]), activation_bytes=(peaks[0], peaks[1]), threads=torch.get_num_threads(),
        graph_error=verified.graph, end_to_end_error=verified.end_to_end, ok=verified.ok,
        convolutions=convolutions,
        flows=(build_block_diagram(captured, {}), build_block_diagram(looked_at(factorized, example_inputs), chains_of(factorized), captured)),
    )  # fmt: skip


def _with_sizes(plan: Plan, captured: Captured) -> Plan:
    """The plan, knowing the sizes of the inputs that were captured."""
    sizes = {site.path: site.input_sizes(captured.samples) for site in captured.sites}
    decisions = tuple(replace(decision, input_sizes=sizes.get(decision.path)) for decision in plan)
    return replace(plan, network=replace(plan.network, macs=captured.macs), decisions=decisions)


def _convolution(
    decision: Decision, site: ConvSite | None, factorized: nn.Module, errors: SiteErrors | None
) -> ConvReport:
    method = decision.factorization
    known = ConvReport(
        path=decision.path, convolution=str(decision.spec or ""), before=decision.before, after=decision.after,
        reason=decision.reason, note=decision.note, predicted_loss_increase=decision.predicted_loss_increase,
    )  # fmt: skip
    if method is None or decision.rank is None or site is None:
        return known
    return replace(
        known,
        factorization=method.name,
        rank=decision.rank,
        stages=tuple(map(str, decision.stages)),
        **_measured(decision, site, factorized),
        kernel_error=errors.weight if errors else None,
        output_error=errors.output if errors else None,
        spectra=_spectra(decision, site),
    )


def _measured(decision: Decision, site: ConvSite, factorized: nn.Module) -> dict[str, Any]:
    """Milliseconds and bytes of the convolution and its chain, on numbers of the shapes at all its calls."""
    if site.input_shapes is None:
        return {}
    stages: list[Any] = stages_of(factorized, decision)
    bias: Tensor | None = getattr(stages[-1], "bias", None)
    layer, weights = site.layer, [stage.weight for stage in stages]
    chain = nn.Sequential(*write_chain(decision.stages, weights, bias, like=site.weight))
    dense = nn.Sequential(*write_conv(site.spec, layer.weight, layer.bias))
    known = {shape: random_numbers(shape).to(site.weight) for shape in site.input_shapes}
    inputs = [known[shape] for shape in site.input_shapes]

    def run(network: nn.Module) -> None:
        for x in inputs:
            network(x)

    calls = [partial(run, network) for network in (dense, chain)]
    return {"milliseconds": tuple(side_by_side(calls)), "activation_bytes": tuple(map(peak_bytes, calls))}


def _spectra(decision: Decision, site: ConvSite) -> tuple[Spectrum, ...]:
    """Of the unfoldings whose ranks are chosen; where these are none, along channels, whose ranks R bounds as well."""
    method, rank = decision.factorization, decision.rank
    assert method is not None
    assert rank is not None
    layer = replace(site.layer, weight=site.layer.weight.double())
    groups = method.unfoldings(layer)
    if not groups[0]:
        if len(rank) > 1:
            return ()
        groups = Tucker().unfoldings(layer)
        rank = rank * len(groups[0])
    found = []
    for matrices, kept in zip(zip(*groups, strict=True), rank, strict=True):
        values = torch.stack([torch.linalg.svdvals(matrix) for matrix in matrices]).square().mean(0).sqrt()
        name = "×".join(map(str, matrices[0].shape))
        found.append(Spectrum(name=name, values=tuple((values / values[0].clamp_min(1e-30)).tolist()), rank=kept))
    return tuple(found)
