"""Keys and values shared across neighbouring layers (cross-layer attention, Brandon et al. 2024, arXiv:2405.12981): a layer has none of its
own and reads those of one before it.

The paper trains such a model from the start. Here the reading layer's queries first learn the other layer's words: each of its heads takes
the head there that says most of what its own said, pair by pair times the complex factor that is nearest over a text; and its output
projection is then fitted to what the layer gave before."""

import shutil
from collections.abc import Mapping

import msgspec
import torch
from torch import Tensor

from hasten.base.errors import ConfigError, UnsupportedError
from hasten.compress.blocks import Live, Played, chunks_of, pieces, weights_for
from hasten.compress.convert.layerwise import fitted, weight_of
from hasten.compress.convert.mixers import (
    attention_of,
    cache_bytes,
    chosen_layers,
    converted,
    record,
    refuse_shared,
    require_own_weights,
    values_of,
    with_mixers,
)
from hasten.compress.convert.pairs import Pairs
from hasten.compress.convert.statistics import influence, statistics
from hasten.compress.data import Text
from hasten.compress.threads import one_torch_thread
from hasten.compress.walk import Run, cleared
from hasten.formats.weights import Weight
from hasten.model import Model
from hasten.spec import Attention, CrossLayerAttention, RelativeSinusoid, Rotary, Spec


class ShareKv(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``layers`` read the keys and values of the nearest layer before them that keeps its own (every second one unless given)."""

    layers: tuple[int, ...] | None = None

    def readers(self, model: Model) -> tuple[int, ...]:
        """The layers that are meant."""
        return chosen_layers(model, None)[1::2] if self.layers is None else chosen_layers(model, self.layers)


def check_share_kv(model: Model, settings: ShareKv) -> None:
    """Raise UserError, with the reason, for what cannot work on ``model``."""
    refuse_shared(model)
    readers = settings.readers(model)
    if not readers:
        raise ConfigError(f"{model.name} has one layer with keys and values, so there is no other to read")
    require_own_weights(model, readers)
    shared(model.spec, readers)


def shared(spec: Spec, readers: tuple[int, ...]) -> Spec:
    """``spec`` with ``readers`` reading the nearest layer before them that keeps keys and values."""
    made = {}
    for index in readers:
        mixer = attention_of(spec, index)
        if isinstance(mixer.position, RelativeSinusoid):
            raise UnsupportedError(
                f"layer {index} has relative sinusoids, which do not go with another layer's keys; leave it out of 'layers'"
            )
        become = msgspec.structs.replace(mixer, k_norm=None)
        sources = [n for n in range(index) if isinstance(spec.blocks[n].mixer, Attention) and n not in readers]
        read = CrossLayerAttention(attention=become, source=sources[-1] if sources else 0)
        if not sources or not read.reads(attention_of(spec, sources[-1])):
            raise ConfigError(
                f"layer {index} has no layer before it that keeps keys and values of its shape, position and visibility; leave it out of "
                f"'layers'"
            )
        made[index] = read
    return with_mixers(spec, made)


def share_kv(model: Model, settings: ShareKv, text: Text | None, run: Run) -> Model:
    """``model`` with layers that read another's keys and values. Killed, it begins anew. Raises ConfigError without text."""
    check_share_kv(model, settings)  # again: an earlier step may have changed it
    if text is None:
        raise ConfigError("share_kv looks at activations, so it needs text to calibrate on")
    readers, count = settings.readers(model), len(model.spec.blocks)
    spec = shared(model.spec, readers)
    made, errors = dict[str, Weight](), dict[str, list[float]]()
    chunks, old = chunks_of(text.windows), pieces(model.spec, text.longest)
    shutil.rmtree(run.work, ignore_errors=True)
    run.work.mkdir(parents=True)
    with one_torch_thread(), torch.no_grad():
        live = Played(old[0], Live({}), chunks, run.threads).carry_on(weights_for(old[0], model.weights), cleared(run.work / "0"))
        plain = {0: live}
        index = 0
        for piece in pieces(spec, text.longest)[1:]:
            within = range(index, index + len(piece.layers))
            own = {n: weights_for(old[n + 1], model.weights) for n in within}
            become = {name: tensor for weights in own.values() for name, tensor in weights.items() if name in piece.params}
            after = Played(piece, live, chunks, run.threads)
            for n in within:
                run.report(f"layer {n}", n, count)
                before = Played(old[n + 1], plain[n], chunks, run.threads)
                if isinstance(mixer := spec.blocks[n].mixer, CrossLayerAttention):
                    there = Played(old[mixer.source + 1], plain[mixer.source], chunks, run.threads)
                    new = _told((there, own[mixer.source], mixer.source), (before, own[n], n), attention_of(model.spec, n))
                    become |= new
                    o, shares = fitted((before, own[n]), (after, become), n)
                    become[f"blocks.{n}.mixer.o.weight"] = new[f"blocks.{n}.mixer.o.weight"] = o
                    errors[f"layer {n}"] = [round(share, 5) for share in shares]
                    made |= {name: weight_of(tensor) for name, tensor in new.items()}
                if n + 1 < count:
                    plain[n + 1] = before.carry_on(own[n], cleared(run.work / f"plain-{n + 1}"))
                if n in readers:
                    del plain[n]
                    cleared(run.work / f"plain-{n}")
            if within.stop < count:
                live = after.carry_on(become, cleared(run.work / f"live-{within.stop}"))
            for n in within:
                cleared(run.work / f"plain-{n}")
            cleared(run.work / (f"live-{index}" if index else "0"))
            index, plain = within.stop, {n: rows for n, rows in plain.items() if n == within.stop}
    shutil.rmtree(run.work, ignore_errors=True)
    run.report("done", count, count)
    evidence = {
        "layers": list(readers), "cache_bytes_per_token": [cache_bytes(model.spec), cache_bytes(spec)], "output_error": errors,
    }  # fmt: skip
    return converted(model, spec, made, record("share_kv", settings, evidence))


_At = tuple[Played, Mapping[str, Tensor], int]


def _told(there: _At, here: _At, mixer: Attention) -> dict[str, Tensor]:
    """Queries and output projection of a layer, ``here``, in the words of another's keys and values, ``there``."""
    path, pairs, heads = f"blocks.{here[2]}.mixer", Pairs.of(mixer), mixer.kv_heads
    weights, shared = here[1], mixer.heads // mixer.kv_heads
    if mixer.q_norm or mixer.k_norm or mixer.clip or mixer.gate or mixer.sinks or not isinstance(mixer.position, Rotary | None):
        return {f"{path}.o.weight": weights[f"{path}.o.weight"]}  # what heads say stays as it is, and in its order
    theirs, ours = values_of(there[0].piece, there[2]), values_of(here[0].piece, here[2])
    moments, of_values = (
        torch.zeros(2 * heads * size, 2 * heads * size, dtype=torch.float64) for size in (mixer.head_dim, mixer.value_dim)
    )
    for a, b in zip(there[0].outputs(there[1], [theirs.k, theirs.v]), here[0].outputs(weights, [ours.k, ours.v])):
        for total, x, y in ((moments, a[theirs.k], b[ours.k]), (of_values, a[theirs.v], b[ours.v])):
            both = torch.cat([x, y], 1)
            total += (both.T @ both).double()
    seen = statistics(here[0], weights, mixer, ours, path)
    of_keys, _ = influence(seen, mixer, weights[f"{path}.o.weight"])
    across, weight = pairs.moments(moments), pairs.energy(of_keys)  # [pairs, 2·heads, 2·heads], [pairs, heads]
    cross = across[:, heads:, :heads]  # ours by theirs
    size = across.diagonal(dim1=1, dim2=2).real[:, None, :heads].clamp_min(1e-12 * moments.trace() / len(moments))
    factors, held = cross / size, (cross.abs().square() / size * weight[:, :, None]).sum(0)
    free, maps = _nearest(moments, pairs.free, heads)
    order = _assigned(held + torch.einsum("hab,hgbc,hgac->hg", of_keys[:, pairs.free][:, :, pairs.free], maps, free))
    new: dict[str, Tensor] = {}
    for name in ("weight", "bias") if mixer.bias else ("weight",):
        q = weights[f"{path}.q.{name}"].double().reshape(heads, shared, mixer.head_dim, -1)
        rows = [
            pairs.real(factors[:, own, other].conj()[None, :, None] * pairs.complex(q[own]), maps[own, other].T @ q[own][:, pairs.free])
            for other, own in enumerate(order)
        ]
        new[f"{path}.q.{name}"] = torch.stack(rows).reshape(weights[f"{path}.q.{name}"].shape).float()
    _, meant = _nearest(of_values, torch.arange(mixer.value_dim), heads)
    o = weights[f"{path}.o.weight"]
    by_head = o.double().reshape(len(o), heads, shared, mixer.value_dim)
    columns = [by_head[:, own] @ meant[own, other] for other, own in enumerate(order)]
    new[f"{path}.o.weight"] = torch.stack(columns, 1).reshape(o.shape).float()
    return new


def _nearest(moments: Tensor, features: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Of ``features`` of each head: moments of ours by theirs [ours, theirs, n, n], and the maps from theirs that are nearest to ours."""
    by_head = moments.unflatten(0, (2 * heads, -1)).unflatten(2, (2 * heads, -1))[:, features][:, :, :, features]
    cross = by_head[heads:, :, :heads].permute(0, 2, 1, 3)
    own = torch.stack([by_head[head, :, head] for head in range(heads)])
    damped = own + 1e-9 * moments.trace() / len(moments) * torch.eye(len(features), dtype=torch.float64)
    return cross, cross @ torch.linalg.inv(damped)[None]


def _assigned(held: Tensor) -> list[int]:
    """For each of their heads one of ours, each once, the pairs that hold most first."""
    left, order = held.clone(), [0] * len(held)
    for _ in range(len(held)):
        own, other = divmod(int(left.argmax()), len(held))
        order[other] = own
        left[own], left[:, other] = -1.0, -1.0
    return order
