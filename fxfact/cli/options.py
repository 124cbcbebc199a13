"""The options of the commands."""

from __future__ import annotations

import argparse

from fxfact.cli.values import (
    import_package,
    parse_names,
    parse_rank,
    parse_size,
    parse_time,
    positive_int,
    random_input,
)

Arguments = argparse.Namespace
_MODEL_HELP = "a .pt2 file of torch.export.save, or package.module:callable, which must return a torch.nn.Module"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the argument for one network."""
    group = parser.add_argument_group("model")
    group.add_argument("model", metavar="MODEL", help=_MODEL_HELP)
    group.add_argument(
        "--weights", metavar="FILE", help="a state dict, or what compress wrote, to load into package.module:callable"
    )
    add_input(group)
    add_json(parser)


def add_two_models(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for an original and a factorized network."""
    group = parser.add_argument_group("models")
    group.add_argument("model", metavar="A", help=f"the original: {_MODEL_HELP}")
    group.add_argument("other", metavar="B", help="the network to compare with it, in one of the same two forms")
    group.add_argument("--weights", metavar="FILE", help="a state dict, or what compress wrote, to load into A")
    group.add_argument("--other-weights", metavar="FILE", help="a state dict, or what compress wrote, to load into B")
    add_input(group)
    add_json(parser)


def add_input(group: argparse._ArgumentGroup) -> None:
    """Add the option for example inputs."""
    group.add_argument(
        "--input",
        type=random_input,
        action="append",
        metavar="SIZES",
        help="the shape of an input, such as 1,3,224,224; repeat it for every input. The input is filled with random "
        "normal numbers. 1,77:int64 is an integer input, filled with zeros",
    )
    group.add_argument(
        "--import",
        dest="imported",
        type=import_package,
        action="append",
        metavar="PACKAGE",
        help="a package to import before a .pt2 file is read, for example transformers.modeling_outputs, if the "
        "program returns objects of that package",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the option for JSON output."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_scope(parser: argparse.ArgumentParser) -> None:
    """Add the options for which convolutions to factorize, and how."""
    group = parser.add_argument_group("convolutions and linear layers")
    group.add_argument(
        "--factorization",
        type=parse_names,
        metavar="NAMES",
        help="a name, or several separated by commas (default: tucker, or all of them under a budget)",
    )
    group.add_argument("--include", action="append", metavar="GLOB", help="only the layers at these paths; repeatable")
    group.add_argument("--exclude", action="append", metavar="GLOB", help="no layers at these paths; repeatable")
    group.add_argument(
        "--joint",
        action="append",
        metavar="GLOB",
        help="the layers of equal shape at these paths may share parameters; one set for each GLOB, repeatable",
    )
    group.add_argument("--kinds", type=parse_names, metavar="KINDS", help="conv or linear, if not both")
    group.add_argument(
        "--multiple-of",
        type=positive_int,
        metavar="N",
        help="round ranks to multiples of N (default: 1; with --latency 32, 16 or 8)",
    )
    group.add_argument(
        "--fold-weights",
        action="store_true",
        default=None,
        help="turn weights that are computed (weight_norm, parametrizations) into plain parameters",
    )


def add_budget(parser: argparse.ArgumentParser) -> None:
    """Add the options for a budget or a rank."""
    group = parser.add_argument_group("what the network may cost (pass one)")
    group.add_argument(
        "--macs",
        type=parse_size,
        metavar="SIZE",
        help="multiply-accumulates for one sample: a share of the network's, such as 0.5 or 50%%, or a number, such as "
        "20M",
    )
    group.add_argument(
        "--params", type=parse_size, metavar="SIZE", help="parameters: a share, such as 0.5, or a number, such as 900k"
    )
    group.add_argument(
        "--latency",
        type=parse_time,
        metavar="TIME",
        help="time of one call on this machine: a share, such as 0.5, or milliseconds, such as 12ms. The share is of a "
        "module in its fastest form, or of a .pt2 program as it is",
    )
    group.add_argument(
        "--loss",
        type=float,
        metavar="NATS",
        help="the cheapest network whose outputs change by at most this KL divergence for one sample, as measured on "
        "every fourth batch",
    )
    group.add_argument(
        "--metric",
        metavar="NAME",
        help="the cheapest network that --at-most-drop allows, as measured by a function of yours, "
        "package.module:callable. It takes a network and returns a number, or a tensor with one score for each sample",
    )
    group.add_argument(
        "--rank",
        type=parse_rank,
        help="no budget, but the same rule for every layer: a fraction of its parameters, an integer, or 'same'",
    )


def add_metric(parser: argparse.ArgumentParser) -> None:
    """Add the options for a metric of the user."""
    group = parser.add_argument_group("with --metric")
    group.add_argument(
        "--at-most-drop", type=float, metavar="N", help="by how much it may drop, in its own unit, such as 0.5"
    )
    group.add_argument(
        "--lower-is-better", action="store_true", default=None, help="it is an error, which may rise by so much"
    )
    group.add_argument(
        "--minimise",
        choices=["macs", "params", "latency"],
        help="what to make as small as possible (default: macs)",
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add the options for calibration data."""
    group = parser.add_argument_group("data (no labels needed)")
    group.add_argument(
        "--calibration",
        metavar="DATA",
        help="samples to learn from: a .npy file with samples along the first axis, a .npz file with an array for each "
        "argument of the model, or a folder of them. With --statistics they are used to measure the plan",
    )
    group.add_argument(
        "--batch", type=positive_int, default=64, metavar="N", help="samples in a batch (default: %(default)s)"
    )
    group.add_argument(
        "--max-samples", type=positive_int, metavar="N", help="take only the first N samples (default: 1024)"
    )
    group.add_argument(
        "--likelihood",
        choices=["categorical", "bernoulli", "gaussian"],
        help="what all outputs are: classes, independent probabilities, or numbers (default: read from the data)",
    )
    group.add_argument("--statistics", metavar="FILE", help="statistics that an earlier plan --keep-statistics wrote")
    group.add_argument(
        "--error-curves",
        metavar="FILE",
        help="a cache of the error curves of a budget. The file is read if it exists, and then updated. Further plans "
        "from the same statistics take seconds",
    )


def add_computation(parser: argparse.ArgumentParser) -> None:
    """Add the options for how the work is done."""
    group = parser.add_argument_group("computation")
    group.add_argument(
        "--workers",
        type=positive_int,
        default=1,
        metavar="N",
        help="number of worker processes, each with one thread (default: the command works alone)",
    )
    add_progress(group)


def add_progress(group: argparse._ActionsContainer) -> None:
    """Add the option for progress bars."""
    group.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show progress bars on stderr (default: if it is a terminal)",
    )


def add_plan_output(parser: argparse.ArgumentParser) -> None:
    """Add the options for what ``plan`` writes."""
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FILE", help="write the plan to this file")
    add_plot(group)
    group.add_argument(
        "--keep-statistics",
        metavar="FILE",
        help="write the statistics of the data to this file, for other plans and for compress --plan (default: beside "
        "the plan, as NAME.statistics.npz)",
    )


def add_compress_output(parser: argparse.ArgumentParser) -> None:
    """Add the options for what ``compress`` writes."""
    group = parser.add_argument_group("output")
    group.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="NAME.pt2 (a program), NAME.onnx, or NAME.pt (weights for fxfact.load)",
    )
    add_plot(group)
    group.add_argument(
        "--plan",
        metavar="FILE",
        help="apply the plan in this file instead of making one, with the statistics beside it if there are any",
    )
    group.add_argument(
        "--dynamic-batch", action="store_true", help="export a module to a file that takes any batch size"
    )


def add_plot(group: argparse._ActionsContainer) -> None:
    """Add the option for a picture of the Pareto front."""
    group.add_argument(
        "--plot",
        metavar="FILE",
        help="draw what every other budget would cost the accuracy: NAME.png, NAME.svg or NAME.pdf (needs matplotlib)",
    )


def add_report_output(parser: argparse.ArgumentParser) -> None:
    """Add the options for what ``report`` writes."""
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output", metavar="FILE", help="NAME.html (a page with pictures) or NAME.json")
    add_threads(group)
    add_progress(group)


def add_tolerance(parser: argparse.ArgumentParser) -> None:
    """Add the option for the tolerance of ``verify``."""
    parser.add_argument(
        "--tolerance", type=float, help="fail if the relative difference of the outputs is larger than this"
    )


def add_timing(parser: argparse.ArgumentParser) -> None:
    """Add the options for how ``bench`` measures."""
    group = parser.add_argument_group("timing")
    add_threads(group)
    group.add_argument("--repeats", type=positive_int, default=15, help="number of turns (default: %(default)s)")
    group.add_argument("--number", type=positive_int, default=5, help="calls in a turn (default: %(default)s)")


def add_threads(group: argparse._ActionsContainer) -> None:
    """Add the option for the number of threads."""
    group.add_argument("--threads", type=positive_int, metavar="N", help="number of threads (default: that of PyTorch)")


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``demo``."""
    parser.add_argument(
        "--factorization",
        type=parse_names,
        metavar="NAMES",
        help="a name, or several separated by commas (default: for each layer the best)",
    )
    parser.add_argument(
        "--rank",
        type=parse_rank,
        help="a fraction of each layer's parameters, an integer, or 'same' (default: chosen within half of the time)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training (default: %(default)s)")
    parser.add_argument("--epochs", type=positive_int, default=10, help="epochs of training (default: %(default)s)")
