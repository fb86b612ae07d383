"""Orders and tiles that were measured on a device, as data: one JSON file a device. What no file says takes the defaults.

Tiles are looked up by the number of rows, the order of sums never: a weight has one, or a row's bits would depend on its batch."""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from hasten.backends.cuda.candidates import LINEAR
from hasten.backends.cuda.kernels.linear import Order, Tiles, default_order, default_tiles
from hasten.backends.cuda.kernels.pack import PackedWeight
from hasten.base.errors import ConfigError, one_line

SCHEMA_VERSION = 1
KERNELS = tuple(candidate.name for candidate in LINEAR)


@dataclasses.dataclass(frozen=True, slots=True)
class TunedLinear:
    """``order`` of a shape's sums; ``tiles`` by the largest number of rows that they are for. ``kernel`` is the one that was faster than
    Triton's over all of them with the same bits for a row whatever its batch; or Triton's. Raises ValueError for one there is not."""

    order: Order
    tiles: Mapping[int, Tiles] = dataclasses.field(default_factory=dict)
    kernel: str = "triton"

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"{one_line(self.kernel)} is no kernel of products; there are {', '.join(KERNELS)}")


class Tuned(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured on ``device``, by ``shape_name``."""

    device: str
    linear: dict[str, TunedLinear] = {}
    schema_version: int = SCHEMA_VERSION

    def having(self, shape: str, chosen: TunedLinear) -> "Tuned":
        """The same with what was chosen for a shape."""
        return msgspec.structs.replace(self, linear={**self.linear, shape: chosen})

    def order(self, shape: str, weight: PackedWeight) -> Order:
        """The order of a weight's sums."""
        known = self.linear.get(shape)
        return default_order(weight) if known is None else known.order

    def kernel(self, shape: str) -> str:
        """The kernel to prefer."""
        known = self.linear.get(shape)
        return "triton" if known is None else known.kernel

    def tiles(self, shape: str, weight: PackedWeight, rows: int) -> Tiles:
        """Tiles for a bucket of ``rows``: the measured bucket that is as large or next larger, else the default."""
        known = self.linear.get(shape)
        fitting = [most for most in known.tiles if most >= rows] if known else []
        return known.tiles[min(fitting)] if known and fitting else default_tiles(rows, self.order(shape, weight))


def shape_name(form: str, fed: str, out: int, size: int) -> str:
    """How a product is called in a file: "int4 × bf16 4096 × 14336", weights by channels and inputs."""
    return f"{form} × {fed} {out} × {size}"


def path_of(directory: Path, device: str) -> Path:
    """The file of a device of that name ("NVIDIA H200")."""
    return directory / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def read(directory: Path, device: str) -> Tuned:
    """What the device's file says; nothing where there is none. Raises ConfigError for a file that is not one: other tiles would be a
    guess, and another order of sums other tokens."""
    path = path_of(directory, device)
    try:
        tuned = msgspec.json.decode(path.read_bytes(), type=Tuned)
    except FileNotFoundError:
        return Tuned(device)
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(f"{path} does not say how kernels are cut: {one_line(error)}; remove it, and tune this device again") from error
    if tuned.schema_version != SCHEMA_VERSION or tuned.device != device:
        raise ConfigError(
            f"{path} is of schema {tuned.schema_version} for {one_line(tuned.device)}, not {SCHEMA_VERSION} for {device}; remove it"
        )
    return tuned


def write(directory: Path, tuned: Tuned) -> Path:
    """The device's file, whole or not at all; returns where it is."""
    directory.mkdir(parents=True, exist_ok=True)
    path = path_of(directory, tuned.device)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(tuned), indent=1) + b"\n")
    partial.replace(path)
    return path
