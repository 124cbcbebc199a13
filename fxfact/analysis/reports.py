"""Reports: both networks captured, verified, timed and drawn."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfact.analysis.block_diagram import build_block_diagram, chain_labels
from fxfact.analysis.html import render_page
from fxfact.analysis.inspection import capture_for_display
from fxfact.analysis.reference import copy_as_module, stages_of
from fxfact.analysis.report_data import ConvReport, ReportData, Spectrum
from fxfact.analysis.verification import SiteErrors, verify
from fxfact.capture import Captured, ExampleInputs, copy_arguments
from fxfact.conv import ConvSite, write_chain, write_conv
from fxfact.errors import ArgumentError
from fxfact.factorizations import Tucker
from fxfact.passes import capture_as_planned, last_plan
from fxfact.planning import Decision, Plan, format_call
from fxfact.utils import (
    Progress,
    as_json,
    peak_bytes,
    seeded_randn,
    side_by_side,
    to_eval,
    with_progress,
    write_by_suffix,
)


class Report(ReportData):
    """The result of ``report``: costs, times, memory and errors of two networks.

    ``print`` shows it as a table, ``to_html`` draws it, ``to_json`` returns it as plain data, and ``save`` writes it to
    a file. The attributes are those of ``fxfact.analysis.report_data.ReportData``.
    """

    def to_html(self) -> str:
        """Render the report as one HTML page.

        Returns:
            The page. It loads no scripts, styles or pictures from elsewhere.
        """
        return render_page(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report to a file.

        Args:
            path: ``NAME.html`` for the page, or ``NAME.json`` for the data. In JSON, infinities and NaN are null.

        Raises:
            ArgumentError: ``path`` has another ending.
            ArgumentTypeError: ``path`` is not a path.
            FileError: The file cannot be written.
        """
        data = {".html": self.to_html, ".json": lambda: f"{as_json(self.to_json(), indent=1)}\n"}
        write_by_suffix(path, "report", data)


@torch.no_grad()
def report(
    original: nn.Module | ExportedProgram,
    factorized: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None = None,
    *,
    progress: Progress = None,
) -> Report:
    """Report what a factorization saves and costs, for every convolution and for the whole network.

    Copies of both networks run in evaluation mode, taking turns while they are timed. Every convolution is also timed
    against its chain. Neither network is changed.

    Args:
        original: The network that was factorized.
        factorized: A network that fxfact made of ``original``.
        example_inputs: One call of both networks: a tensor, a tuple of positional arguments, or a mapping of keyword
            arguments. If ``original`` is an ExportedProgram, its own example inputs are the default.
        progress: Whether to show progress, or a function to show it with, as for ``factorize``.

    Returns:
        Parameters, MACs, milliseconds, activation memory, errors, spectra and block diagrams.

    Raises:
        ArgumentError: There are no example inputs.
        ArgumentTypeError: A network is neither a module nor an ExportedProgram.
        CaptureError: A network cannot be captured, or fails on these inputs.
        PlanError: ``factorized`` was not made by a plan, was changed since, or was made of another model.
        TimingError: A network fails while it is timed.
    """
    plan = last_plan(factorized)
    captured = capture_as_planned(original, plan, example_inputs)
    if example_inputs is None and (example_inputs := captured.example_inputs) is None:
        raise ArgumentError("a report compares outputs and times: pass example_inputs, one call of the two networks")
    verified = verify(original, factorized, example_inputs)
    errors = {site.path: site for site in verified.sites}
    networks = [to_eval(copy_as_module(network)) for network in (original, factorized)]
    plan = _with_input_sizes(plan, captured)
    sites = {site.path: site for site in captured.sites}
    convolutions = tuple(
        _conv_report(decision, sites.get(decision.path), networks[1], errors.get(decision.path))
        for decision in with_progress(plan, len(plan), "reporting", progress)
    )
    args, kwargs = copy_arguments(example_inputs)
    calls = [partial(network, *args, **kwargs) for network in networks]
    ms, peaks = side_by_side(calls), [peak_bytes(call) for call in calls]
    displayed = capture_for_display(factorized, example_inputs)
    diagrams = build_block_diagram(captured, {}), build_block_diagram(displayed, chain_labels(factorized), captured)
    return Report(
        model=plan.model, capture=plan.capture, refused=plan.refused, before=plan.network, after=plan.after,
        milliseconds=(ms[0], ms[1]), activation_bytes=(peaks[0], peaks[1]), threads=torch.get_num_threads(),
        graph_error=verified.graph, end_to_end_error=verified.end_to_end, tolerance=verified.tolerance,
        changed=verified.changed, overflow=verified.overflow, loss_increase=verified.loss_increase, ok=verified.ok,
        convolutions=convolutions, diagrams=diagrams, predicted_loss_increase=plan.predicted_loss_increase,
        measured_loss_increase=plan.measured_loss_increase,
        pareto_front=plan.pareto_front if plan.pareto_points else None, call=format_call(plan.call),
        versions=plan.versions, created=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    )  # fmt: skip


def _with_input_sizes(plan: Plan, captured: Captured) -> Plan:
    """Return the plan with the input sizes and MACs of the captured network."""
    sizes = {site.path: site.input_sizes(captured.samples) for site in captured.sites}
    decisions = tuple(replace(decision, input_sizes=sizes.get(decision.path)) for decision in plan)
    return replace(plan, network=replace(plan.network, macs=captured.macs), decisions=decisions)


def _conv_report(
    decision: Decision, site: ConvSite | None, factorized: nn.Module, errors: SiteErrors | None
) -> ConvReport:
    method, note = decision.factorization, "" if decision.reason else decision.remark
    conv = ConvReport(
        path=decision.path, convolution=str(decision.spec or ""), before=decision.before, after=decision.after,
        reason=decision.reason, note=note, predicted_loss_increase=decision.predicted_loss_increase,
    )  # fmt: skip
    if method is None or decision.rank is None or site is None:
        return conv
    return replace(
        conv,
        factorization=method.name,
        rank=decision.rank,
        stages=tuple(map(str, decision.stages)),
        **_measure_time_and_memory(decision, site, factorized),
        kernel_error=errors.weight if errors else None,
        output_error=errors.output if errors else None,
        spectra=_kernel_spectra(decision, site),
    )


def _measure_time_and_memory(decision: Decision, site: ConvSite, factorized: nn.Module) -> dict[str, Any]:
    """Run a convolution and its chain on random numbers of the shapes of all its calls."""
    if site.input_shapes is None:
        return {}
    stages: list[Any] = stages_of(factorized, decision)
    bias: Tensor | None = getattr(stages[-1], "bias", None)
    layer, weights = site.layer, [stage.weight for stage in stages]
    chain = nn.Sequential(*write_chain(decision.stages, weights, bias, like=site.weight))
    dense = nn.Sequential(*write_conv(site.spec, layer.weight, layer.bias))
    input_of_shape = {shape: seeded_randn(shape).to(site.weight) for shape in site.input_shapes}
    inputs = [input_of_shape[shape] for shape in site.input_shapes]

    def run(network: nn.Module) -> None:
        for x in inputs:
            network(x)

    calls = [partial(run, network) for network in (dense, chain)]
    return {"milliseconds": tuple(side_by_side(calls)), "activation_bytes": tuple(map(peak_bytes, calls))}


def _kernel_spectra(decision: Decision, site: ConvSite) -> tuple[Spectrum, ...]:
    """Return the singular values of the unfoldings whose ranks the factorization chooses.

    A factorization with one rank that belongs to no unfolding, such as CP, gets those along the two channel axes: its
    rank bounds theirs.
    """
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
    spectra = []
    for matrices, kept in zip(zip(*groups, strict=True), rank, strict=True):
        values = torch.stack([torch.linalg.svdvals(matrix) for matrix in matrices]).square().mean(0).sqrt()
        name = "×".join(map(str, matrices[0].shape))
        spectra.append(Spectrum(name=name, values=tuple((values / values[0].clamp_min(1e-30)).tolist()), rank=kept))
    return tuple(spectra)
