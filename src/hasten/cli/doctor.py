"""`hasten doctor`: what this machine can do."""

import dataclasses
import importlib.util
import json
from typing import Annotated, Any

import typer

from hasten.cli.options import JsonOption


def doctor(
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Measure memory bandwidth and arithmetic peaks (some seconds).")
    ] = True,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads to measure with; all cores granted unless given.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Processor, memory, backends, the kernel each op gets and why no better one, and how fast all of it can be at most."""
    from rich.console import Console

    from hasten.backends.cpu.levels import kernels
    from hasten.base import hardware

    machine, (device, products) = hardware.detect(), _cuda()
    facts: dict[str, Any] = {
        "cpu": {**dataclasses.asdict(machine.cpu), "features": sorted(machine.cpu.features), "cores": machine.cpu.cores},
        "memory": dataclasses.asdict(machine.memory),
        "backends": _backends() | {"cuda": device},
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels()],
        "cuda_kernels": products,
    }
    if measure:
        with Console(stderr=True).status("measuring memory bandwidth and arithmetic peaks …"):
            facts["roofline"] = dataclasses.asdict(hardware.measure_roofline(threads))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    for line in _lines(facts):
        typer.echo(line)


def _backends() -> dict[str, str]:
    """For each registered backend, what it runs on or why it cannot."""
    from importlib import metadata

    states = {}
    for entry in metadata.entry_points(group="hasten.backends"):
        if entry.name == "reference":
            found = importlib.util.find_spec("torch") is not None
            states[entry.name] = f"torch {metadata.version('torch')}" if found else "needs torch: pip install 'hasten[torch]'"
        elif entry.name == "cpu":
            states[entry.name] = f"native, kernels at level {native_level()}"
        else:
            states[entry.name] = entry.value
    return states


def _cuda() -> tuple[str, dict[str, str]]:
    """The GPU, or what is missing for one; and what products go through there."""
    from hasten.base.errors import UserError
    from hasten.model import load_backend

    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {' and '.join(missing)}: pip install 'hasten[cuda]'", {}
    try:
        backend = load_backend("cuda")
        return backend.described(), backend.kernels()
    except UserError as error:
        return str(error), {}


def native_level() -> str:
    """The instruction-set level the native kernels run at."""
    from hasten import _native

    return _native.isa_level()


def _lines(facts: dict[str, Any]) -> list[str]:
    cpu, memory = facts["cpu"], facts["memory"]
    limit = "" if memory["limit"] is None else f", {_gib(memory['limit'])} GiB allowed"
    pages = memory["huge_pages"] or "unknown"
    lines = [
        f"cpu       {cpu['brand']}, {cpu['cores']} cores granted",
        f"isa       {' '.join(cpu['features']) or 'generic'}",
        f"amx       {'granted by the kernel' if cpu['amx_granted'] else 'not available'}",
        f"memory    {_gib(memory['total'])} GiB, {_gib(memory['available'])} available{limit}; huge pages: {pages}",
        *(f"backend   {name}: {state}" for name, state in facts["backends"].items()),
        *_kernel_lines(facts["kernels"]),
        *(f"cuda      {product}: {kernel}" for product, kernel in facts["cuda_kernels"].items()),
    ]
    if (roofline := facts.get("roofline")) is not None:
        lines += [
            f"read      {roofline['read_gb_per_s']:.1f} GB/s ({roofline['read_isa']}, {roofline['threads']} threads)",
            f"bf16      {roofline['bf16_tflops']:.2f} TFLOP/s ({roofline['bf16_isa']})",
            f"int8      {roofline['int8_tops']:.2f} TOP/s ({roofline['int8_isa']})",
            f"f32       {roofline['f32_tflops']:.3f} TFLOP/s ({roofline['f32_isa']})",
        ]
    return lines


def _kernel_lines(kernels: list[dict[str, Any]]) -> list[str]:
    """A line for all ops that got the same level and were refused the same ones, each with its formats."""
    alike: dict[str, dict[str, list[str]]] = {}
    for kernel in kernels:
        ops = alike.setdefault(f"{kernel['level']}{_refused(kernel['refused'])}", {})
        ops.setdefault(kernel["op"], []).append(kernel["format"])
    return [f"kernel    {level}: " + ", ".join(f"{op} {'|'.join(formats)}" for op, formats in ops.items()) for level, ops in alike.items()]


def _refused(reasons: dict[str, str]) -> str:
    """Why not the better levels, in brackets; nothing where there is none."""
    return f" ({'; '.join(f'{level}: {reason}' for level, reason in reasons.items())})" if reasons else ""


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / 2**30:.1f}"
