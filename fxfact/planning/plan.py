"""A plan: what becomes of every convolution of a network. A value to print, edit, save and apply."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fxfact.calibration import OutputPart
from fxfact.conv import ConvSpec, Cost, Skip, as_tuples
from fxfact.errors import ArgumentTypeError, PlanError, error_context, first_differences
from fxfact.factorizations import (
    FACTORIZATIONS,
    Factorization,
    RankSpec,
    parse_factorization,
    parse_rank_spec,
    resolve_rank,
)
from fxfact.planning.call import installed_versions
from fxfact.planning.decision import Decision, decision_from_json, decision_to_json, fields_to_json, unreached_cost
from fxfact.planning.joint_sets import check_shared
from fxfact.planning.pareto import MeasuredPoint, ParetoFront, describe_metric, point_from_json, point_to_json
from fxfact.planning.plan_file import plan_text
from fxfact.planning.plan_table import decision_table, format_decisions, format_unreached
from fxfact.planning.strategy import ParetoPoint, significant
from fxfact.utils import PrintsTable, atomic_write, wrap_lines

_FORMAT = {"format": "fxfact plan", "version": 7}
_POINTS: Mapping[str, type[ParetoPoint | MeasuredPoint]] = {
    "measured_points": MeasuredPoint,
    "pareto_points": ParetoPoint,
}
_LAST = ("decisions", *_POINTS)  # in a file
_WITHOUT_DATA = "made without calibration data: how far the accuracy drops is unknown, and it is often far"
_SLOWER = "SLOWER than the original: for speed, make a plan with a budget of milliseconds (fxfact.Latency)"
_WAYS = {
    "trace": "as one graph ('trace')",
    "modules": "by its modules, which keep the model's own Python ('modules')",
    "export": "as an exported program ('export')",
}


@dataclass(frozen=True, kw_only=True)
class Plan(PrintsTable):
    """The decisions for all convolutions of one model, in the order of its graph. ``print(plan)`` shows a table.

    Attributes:
        model: the class name of the model.
        network: the cost of the whole dense network for one sample.
        decisions: one for every convolution.
        capture: how the model was captured: 'trace', 'modules' or 'export'.
        compared: whether the captured network was compared with the model on example inputs.
        fold_weights: whether computed weights were made parameters.
        leaf_modules: globs of modules that tracing kept whole.
        refused: why other ways to capture the model were not taken.
        uses_statistics: whether the chains are to be fitted in the Fisher metric of calibration statistics.
        pareto_points: networks for other budgets, cheapest first. Empty without a budget.
        measured_points: networks that were measured while the plan was searched, in the order of their measurement.
        measured_loss_increase: the increase of the loss in nats for one sample on batches of data, if measured.
        measured_on_held_out: whether these are other batches than those that the plan was made from.
        inference_passes: names of exact passes that follow, so that the network runs fast (see
            ``fxfact.for_inference``).
        measured_ms: milliseconds of the dense network and of the result, measured in turns, if measured. For a budget
            of milliseconds, the dense network is measured in its fastest exact variant.
        samples: the number of samples that it was learnt from which errors the loss can bear, if there were data.
        outputs: the outputs of the network and what they mean, if the plan was made with data.
        call: the arguments of ``fxfact.plan`` that are not the defaults, among them the budget, as plain data. Plans
            made by different calls can be equal.
        versions: the versions of fxfact and PyTorch that made the plan.
    """

    model: str
    network: Cost
    decisions: tuple[Decision, ...]
    capture: str = "trace"
    compared: bool = False
    fold_weights: bool = False
    leaf_modules: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    uses_statistics: bool = False
    pareto_points: tuple[ParetoPoint, ...] = ()
    measured_points: tuple[MeasuredPoint, ...] = ()
    measured_loss_increase: float | None = None
    measured_on_held_out: bool = False
    inference_passes: tuple[str, ...] = ()
    measured_ms: tuple[float, float] | None = field(default=None, compare=False)
    samples: int | None = None
    outputs: tuple[OutputPart, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict, compare=False)
    versions: Mapping[str, str] = field(default_factory=installed_versions, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "measured_loss_increase", significant(self.measured_loss_increase))
        check_shared(self.decisions)

    @property
    def predicted_loss_increase(self) -> float | None:
        """The expected increase of the loss in nats for one sample. None without data."""
        known = [decision.predicted_loss_increase for decision in self.rewrites if decision.tied_to is None]
        return sum(nats for nats in known if nats is not None) if self.uses_statistics and None not in known else None

    @property
    def pareto_front(self) -> ParetoFront:
        """The networks that other budgets would have given. Raises PlanError for a plan without a budget."""
        if not self.pareto_points:
            raise PlanError("the plan was made without a budget, so it knows no other. Pass budget=fxfact.Macs(0.5).")
        return ParetoFront(
            network=self.network,
            points=self.pareto_points,
            uses_statistics=self.uses_statistics,
            chosen=MeasuredPoint(
                self.after,
                self.predicted_loss_increase,
                self.measured_loss_increase,
                milliseconds=self.measured_ms and self.measured_ms[1],
            ),
            measured=self.measured_points,
        )

    @property
    def unreached(self) -> Cost:
        """The cost of what no factorization can reach: everything but the layers that could be read.

        That is what recurrent layers, embeddings, norms and the products of attention cost, and layers that have to
        stay as they are.
        """
        return unreached_cost(self.network, self.decisions)

    @cached_property
    def rewrites(self) -> tuple[Decision, ...]:
        """The decisions that change something."""
        return tuple(decision for decision in self.decisions if decision.factorization is not None)

    @property
    def after(self) -> Cost:
        """The cost of the whole network after the plan is applied."""
        cost = self.network
        for decision in self.rewrites:
            cost = cost + decision.after - decision.before
        return cost

    def __getitem__(self, path: str) -> Decision:
        """Return the decision for a path. Raises PlanError if the plan has none."""
        for decision in self.decisions:
            if decision.path == path:
                return decision
        raise PlanError(f"the plan has no layer at {path!r}. It has: {', '.join(d.path for d in self.decisions)}.")

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def edited(
        self,
        path: str,
        *,
        rank: RankSpec | None = None,
        factorization: str | Factorization | None = None,
        skip: str | None = None,
    ) -> Plan:
        """Return the plan with another decision for one convolution and those that share its weight or stages.

        The layers of a joint set share stages of the new rank too, if the factorization has stages to share.

        Args:
            path: the path of the convolution.
            rank: another rank, as for ``fxfact.plan``.
            factorization: another factorization, as for ``fxfact.plan``.
            skip: the reason to leave the convolution dense.

        Returns:
            A new plan. What was measured for the old one is dropped.

        Raises:
            PlanError: if the plan has no such convolution, or there is nothing to edit.
            RankError, RefusedError: if the rank or the factorization does not suit the convolution.
        """
        old = self[path]
        if skip is not None and not isinstance(skip, str):
            raise ArgumentTypeError(f"skip is the reason, a string, got {skip!r}")
        if skip is not None:
            new: dict[str, Any] = {"factorization": None, "rank": None, "reason": skip}
        else:
            with error_context(path):
                new = {**_edited_choice(old, rank, factorization), "reason": ""}
        new |= {"note": "", "predicted_loss_increase": None, "latencies_ms": None}
        together = {path, old.tied_to or path} if old.shares_with is None else {old.shares_with}
        changed = [_edited(d, new) if together & {d.path, d.tied_to, d.shares_with} else d for d in self.decisions]
        return replace(
            self, decisions=tuple(changed), measured_loss_increase=None, measured_on_held_out=False, measured_ms=None
        )

    def check_fits(
        self, convolutions: Mapping[str, tuple[ConvSpec, str | None]], skipped: Mapping[str, str] | None = None
    ) -> None:
        """Check that the plan was made for these convolutions.

        Layers that stay as they are may be of a kind that cannot be rewritten, in one of the two models or in both.

        Args:
            convolutions: by path, the spec, and the path of the convolution that holds the same weight or None.
            skipped: by path, why other convolutions cannot be rewritten, for the message.

        Raises:
            PlanError: if they differ; the message names the first differences.
        """
        left = {decision.path for decision in self.decisions if decision.spec is None}
        left |= {decision.path for decision in self.decisions if not decision.rank} & {*(skipped or ())}
        planned = {d.path: (d.spec, d.tied_to) for d in self.decisions if d.spec and d.path not in left}
        found = {path: convolution for path, convolution in convolutions.items() if path not in left}
        if planned == found:
            return
        theirs, ours = ({path: _describe(value) for path, value in each.items()} for each in (planned, found))
        ours |= {
            path: f"one that cannot be rewritten ({reason})"
            for path, reason in (skipped or {}).items()
            if path in theirs and path not in ours
        }
        different = first_differences("the plan", theirs, "the model", ours)
        raise PlanError(f"the plan was made for another model ({self.model}). {different}. Make a new one.")

    def _table(self, width: int | None) -> str:
        """The decisions as a table, and notes below it."""
        predicted = self.predicted_loss_increase
        table = decision_table(self.decisions, self.model, self.network, self.after, predicted)
        text = format_decisions(table, self.decisions, width)
        return "\n".join([text, *(wrap_lines(note, width) for note in self._notes())])

    def _notes(self) -> Iterator[str]:
        """Yield what is to say about the whole plan."""
        compared = f", {'compared' if self.compared else 'not compared'} with the model on example inputs"
        yield f"captured {_WAYS[self.capture]}{'' if self.capture == 'export' else compared}"
        yield from (f"  not {reason}" for reason in self.refused)
        if out_of_reach := format_unreached(self.unreached, self.network):
            yield out_of_reach
        if self.inference_passes:
            yield f"for inference: {', '.join(self.inference_passes)}"
        if self.outputs:
            learnt = "" if self.samples is None else f", learnt from {self.samples:,} samples"
            yield f"outputs: {'; '.join(map(str, self.outputs))}{learnt}"
        if self.measured_loss_increase is not None:
            where = "held-out data" if self.measured_on_held_out else "a part of the data"
            predicted = self.predicted_loss_increase
            expected = "" if predicted is None else f"predicted {predicted:.3g} nats, "
            yield f"loss increase: {expected}measured {self.measured_loss_increase:.3g} nats on {where}"
        if self.call.get("joint") and self.pareto_points and not any(d.shares_with for d in self.decisions):
            yield "joint: no set shares stages, because chains of their own lose less within this budget"
        yield from describe_metric(self.measured_points, self.after)
        if self.measured_ms is not None:
            before, after = self.measured_ms
            yield f"measured in turns: {before:.3g} → {after:.3g} ms{f', {_SLOWER}' if after > before else ''}"
        if self.rewrites and not self.uses_statistics:
            yield _WITHOUT_DATA

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file, with two lines for each convolution. Equal calls give equal files.

        Args:
            path: the file. It is written whole or not at all.

        Raises:
            PlanError: if the file cannot be written.
        """
        text = plan_text(self.to_json())
        try:
            with atomic_write(path) as file:
                file.write(text.encode())
        except (OSError, TypeError) as error:
            raise PlanError(f"{path}: the plan cannot be written there: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, factorizations: Sequence[type[Factorization]] = ()) -> Plan:
        """Read a plan that ``save`` wrote.

        Args:
            path: the file.
            factorizations: your own factorization classes that the plan names.

        Returns:
            The plan.

        Raises:
            PlanError: if the file cannot be read, is damaged, or is of another version.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, TypeError, ValueError, RecursionError) as error:
            raise PlanError(f"{path}: not a plan that can be read: {error}") from error
        with error_context(str(path)):
            return cls.from_json(data, factorizations=factorizations)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data: numbers, strings, lists and dicts, without fields that have their default.

        ``measured_ms`` is only in it if the budget was one of milliseconds, so that equal calls give equal files.

        Returns:
            What ``from_json`` takes.
        """
        data = {"versions": dict(self.versions), "call": dict(self.call), **fields_to_json(self)}
        data["network"] = fields_to_json(self.network)
        if self.network.ms is None:
            data.pop("measured_ms", None)
        if self.outputs:
            data["outputs"] = [part.to_json() for part in self.outputs]
        data["decisions"] = [decision_to_json(decision) for decision in self.decisions]
        data |= {name: [point_to_json(point) for point in getattr(self, name)] for name in _POINTS if name in data}
        return {**_FORMAT, **{key: data[key] for key in data if key not in _LAST}, **_last(data)}

    @classmethod
    def from_json(cls, data: Any, *, factorizations: Sequence[type[Factorization]] = ()) -> Plan:
        """Return the plan from what ``to_json`` gave.

        Args:
            data: plain data.
            factorizations: your own factorization classes that the plan names.

        Returns:
            The plan.

        Raises:
            PlanError: if the data is damaged or of another version.
        """
        _check_format(data)
        known = {kind.name: kind for kind in (*FACTORIZATIONS, *factorizations)}
        try:
            values = {key: as_tuples(value) for key, value in data.items() if key not in _FORMAT}
            values |= {key: dict(data[key]) for key in ("call", "versions")}
            values["network"] = Cost(**data["network"])
            values["decisions"] = tuple(decision_from_json(entry, known) for entry in data["decisions"])
            values["outputs"] = tuple(map(OutputPart.from_json, data.get("outputs", ())))
            for name, kind in _POINTS.items():
                values[name] = tuple(point_from_json(kind, point) for point in data.get(name, ()))
            plan = cls(**values)
            str(plan)  # computes every layout
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"the plan is damaged: {type(error).__name__}: {error}") from error
        return plan


def _check_format(data: Any) -> None:
    """Raise PlanError unless the data is of a plan in the format of this version."""
    found = data.get("format") if isinstance(data, dict) else type(data).__name__
    if found != _FORMAT["format"]:
        raise PlanError(
            f"expected {_FORMAT['format']!r} as the format, found {found!r}. Pass a file that Plan.save wrote."
        )
    if data.get("version") != _FORMAT["version"]:
        raise PlanError(
            f"the plan has version {data.get('version')} of the format, and this fxfact reads version "
            f"{_FORMAT['version']} only. Make the plan again (fxfact.plan, or fxfact plan in the shell), or load it "
            "with the fxfact that wrote it."
        )


def _last(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: data[key] for key in _LAST if key in data}


def _edited(decision: Decision, changes: Mapping[str, Any]) -> Decision:
    """Return the changed decision, without a joint set if it has no stages to share."""
    alone = replace(decision, shares_with=None, **changes)
    if decision.shares_with is None or alone.spec is None or alone.factorization is None or alone.rank is None:
        return alone
    shared = alone.factorization.shared_stages(alone.spec, alone.rank)
    return replace(alone, shares_with=decision.shares_with) if shared else alone


def _edited_choice(
    old: Decision, request: RankSpec | None, factorization: str | Factorization | None
) -> dict[str, Any]:
    method = old.factorization if factorization is None else parse_factorization(factorization)
    asked: object = old.rank if request is None else request
    if old.spec is None or method is None or asked is None:
        raise PlanError(
            f"there is nothing to edit: {old.reason}. Pass a factorization and a rank to a layer that was read."
        )
    rank = resolve_rank(method, old.spec, parse_rank_spec(asked), clip=False)
    if isinstance(rank, Skip):
        raise PlanError(rank.reason)
    method.layout(old.spec, rank)
    return {"factorization": method, "rank": rank}


def _describe(convolution: tuple[ConvSpec, str | None]) -> str:
    spec, tied_to = convolution
    return f"{spec} {'with' if spec.bias else 'without'} bias" + (f" and the weight of {tied_to}" if tied_to else "")
