r"""How fast each head forgets, chosen on calibration text.

The decay lambda of a head is the one from a grid with which the spiking result explains most of the softmax attention that
it replaces. With y the decoded result of a head (normalised, before the output neuron and the gain) and o the attention:

    explained(lambda) = sum_c <y_c, o_c>**2 / <y_c, y_c>         one gain per channel
    explained(lambda) = (sum_c <y_c, o_c>)**2 / sum_c <y_c, y_c>       one gain per head

which is the power of o that the least-squares gain leaves over from its error. The grid, ``1 - 2**-k``, has memories of 2 to 256
tokens (RetNet, arXiv 2307.08621, sets its heads to such a row; here every head chooses).

With a decay for each key channel d the result is a sum over channels, ``y = sum_d z_{d, lambda_d}``, so with
``c = <z, o>`` and the Gram matrix ``G = <z, z>`` of all (channel, decay) pairs any choice is judged without another run:
starting from the head's lambda, one channel after the other takes its best decay until none changes.

Both are decided on whole windows, evenly spread over the calibration text, of ``LEAK_TOKENS`` and ``CHANNEL_LEAK_TOKENS``
tokens together: every decay of the grid is a run of spiking attention of its own, and few tokens tell decays apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ntc.ops.attention import split_heads
from ntc.pipeline import Calibration
from ntc.program import Program, interpret
from ntc_passes.replace_attention.site import Site

__all__ = ["CHANNEL_LEAK_TOKENS", "LEAKS", "LEAK_TOKENS", "choose_leaks", "spread_windows"]

LEAKS = tuple(1.0 - 2.0**-k for k in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
"""The decays that are tried."""

LEAK_TOKENS = 2048
"""Most calibration tokens on which the decay of a head is chosen (one window at least)."""

CHANNEL_LEAK_TOKENS = 512
"""Most calibration tokens on which the decays of key channels are chosen (one window at least)."""

_STRIP = 16
"""Tokens whose products by channel and decay are held at once."""


def choose_leaks(program: Program, sites: dict[Node, Site], calibration: Calibration, progress: Callable[[int, int], None]) -> None:
    """Set the leak of every site whose normaliser has one; ``progress`` is called with (windows done, windows)."""
    leaky = {node: site for node, site in sites.items() if site.options.leaky}
    if not leaky:
        return
    by_head = {node: _HeadLeaks(site) for node, site in leaky.items()}
    _watch(program, by_head, spread_windows(calibration, LEAK_TOKENS), progress)
    for chooser in by_head.values():
        chooser.choose()
    by_channel = {node: _ChannelLeaks(site) for node, site in leaky.items() if site.options.normalizer == "channel-leak"}
    if by_channel:
        _watch(program, by_channel, spread_windows(calibration, CHANNEL_LEAK_TOKENS), progress)
        for channels in by_channel.values():
            channels.choose()


def spread_windows(calibration: Calibration, tokens: int) -> list[Tensor]:
    """Whole windows ``[1, L]``, evenly spread over the text, of at most so many tokens together; one at least."""
    windows = [row.unsqueeze(0) for batch in calibration.batches for row in batch]
    count = max(1, tokens * len(windows) // max(1, sum(w.numel() for w in windows)))
    if count >= len(windows):
        return windows
    return [windows[i] for i in torch.linspace(0, len(windows) - 1, count).round().long().tolist()]


def _watch(
    program: Program, choosers: dict[Node, Any], windows: list[Tensor], progress: Callable[[int, int], None]
) -> None:
    def visit(node: Node, args: tuple[Any, ...], value: Any) -> None:
        if node in choosers:
            choosers[node].see(args[:3], value)

    with torch.no_grad():
        for number, window in enumerate(windows):
            progress(number, len(windows))
            interpret(program, window, visit, last=list(choosers)[-1])


class _HeadLeaks:
    """Sums of the least-squares fit for every decay of the grid."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.cross = torch.zeros(len(LEAKS), 0)
        self.power = torch.zeros(len(LEAKS), 0)

    def see(self, given: tuple[Tensor, Tensor, Tensor], attended: Tensor) -> None:
        trains = self.site.trains(*given)
        o = attended.flatten(0, -2).double()
        sums = []
        for leak in LEAKS:
            y = self.site.current(trains, o.new_full((1,), leak, dtype=attended.dtype)).mean(0).flatten(0, -2).double()
            sums.append(((y * o).sum(0), (y * y).sum(0)))
        cross, power = (torch.stack(parts) for parts in zip(*sums, strict=True))
        self.cross = cross if not self.cross.numel() else self.cross + cross
        self.power = power if not self.power.numel() else self.power + power

    def choose(self) -> None:
        # Per key head: the query heads that share it are neighbours, and so are their channels.
        cross, power = (x.view(len(LEAKS), self.site.kv_heads, -1) for x in (self.cross, self.power))
        if self.site.options.gain == "head":
            groups = self.site.heads // self.site.kv_heads
            cross, power = (x.view(len(LEAKS), self.site.kv_heads, groups, -1).sum(-1) for x in (cross, power))
        explained = (cross.square() / power.clamp(min=1e-30)).sum(-1)  # [decays, Hk]
        theta = self.site.thresholds[1]
        self.site.leak = theta.new_tensor(LEAKS)[explained.argmax(0)]


class _ChannelLeaks:
    """Gram matrix of all (decay, key channel) pairs, per key head."""

    def __init__(self, site: Site) -> None:
        self.site = site
        pairs = len(LEAKS) * (site.thresholds[1].shape[0] // site.kv_heads)
        self.cross = torch.zeros(site.kv_heads, pairs, dtype=torch.float64)
        self.gram = torch.zeros(site.kv_heads, pairs, pairs, dtype=torch.float64)

    def see(self, given: tuple[Tensor, Tensor, Tensor], attended: Tensor) -> None:
        site = self.site
        q, k, v = (split_heads(x, n) for x, n in zip(site.trains(*given), (site.heads, site.kv_heads, site.kv_heads), strict=True))
        o = split_heads(attended, site.heads)  # [B, H, L, Dv]; trains [T, B, H or Hk, L, D or Dv]
        for b in range(o.shape[0]):
            for head in range(site.heads):
                kv = head // (site.heads // site.kv_heads)
                for z, seen in products_by_decay(q[:, b, head], k[:, b, kv], v[:, b, kv], o[b, head]):
                    self.cross[kv] += (z @ seen).double()
                    self.gram[kv] += (z @ z.T).double()

    def choose(self) -> None:
        assert self.site.leak is not None
        grid = self.site.leak.new_tensor(LEAKS)
        starts = (self.site.leak[:, None] == grid).int().argmax(-1).tolist()
        chosen = [best_decays(c, g, len(LEAKS), start) for c, g, start in zip(self.cross, self.gram, starts, strict=True)]
        self.site.leak = grid[torch.cat(chosen)]


def products_by_decay(query: Tensor, key: Tensor, value: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """``z_{l, d}`` of one head: what channel d alone gives with the l-th decay of the grid, ``_STRIP`` tokens at a time.

    ``z_{l, d, i} = 1/T sum_t Q(t)_id sum_{j <= i} LEAKS[l]**(i - j) K(t)_jd V(t)_j``. Of a strip it is one product over its keys
    of all steps, and one with the state before it.

    Args:
        query: ``[T, L, D]``.
        key: ``[T, L, D]``.
        value: ``[T, L, Dv]``.
        target: The attention that the sum over d is to explain, ``[L, Dv]``.

    Yields:
        ``z [decays D, tokens Dv]``, decay-major, and the target of these tokens ``[tokens Dv]``.
    """
    steps, length, size = key.shape
    decays, grid = len(LEAKS), key.new_tensor(LEAKS)
    state = key.new_zeros(steps, decays * size, value.shape[-1])
    for start in range(0, length, _STRIP):
        v = value[:, start : start + _STRIP]
        q, k = (x[:, start : start + _STRIP].permute(2, 1, 0).contiguous() for x in (query, key))  # [D, tokens, T]
        tokens = torch.arange(v.shape[1])
        lag = tokens[:, None] - tokens
        within = torch.where(lag >= 0, grid[:, None, None] ** lag.clamp(min=0), 0.0)  # [decay, i, j]
        into, out = grid[:, None] ** (tokens + 1), grid[:, None] ** (len(tokens) - 1 - tokens)  # [decay, i], [decay, j]
        pairs = q[:, :, None] * k[:, None]  # Q_id K_jd at each step, [D, i, j, T]
        weights = within[:, None, :, :, None] * pairs
        z = weights.view(-1, len(tokens) * steps) @ v.transpose(0, 1).reshape(len(tokens) * steps, -1)
        before = (into[:, None, :, None] * q).view(decays * size, len(tokens), steps)
        z = z.view(decays * size, len(tokens), -1).baddbmm_(before, state.transpose(0, 1))
        written = (out[:, None] * k.permute(2, 0, 1)[:, None]).reshape(steps, decays * size, len(tokens)) @ v
        state = (grid ** len(tokens)).repeat_interleave(size)[:, None] * state + written
        yield z.view(decays * size, -1) / steps, target[start : start + _STRIP].flatten()


def best_decays(cross: Tensor, gram: Tensor, decays: int, start: int, sweeps: int = 20) -> Tensor:
    """Coordinate ascent on ``(sum_d c_d)**2 / sum_{d, d'} G_dd'`` over the decay of each channel.

    Args:
        cross: ``<z, o>`` of (decay, channel) pairs, decay-major, ``[decays D]``, float64.
        gram: ``<z, z>``, ``[decays D, decays D]``.
        decays: Size of the grid.
        start: Index of the decay with which every channel starts.
        sweeps: Most rounds over the channels; it usually ends by itself before.

    Returns:
        Index of the decay of each channel, ``[D]``; never worse than the start.
    """
    size = len(cross) // decays
    chosen = torch.full((size,), start)
    pairs = chosen * size + torch.arange(size)
    reach = gram[:, pairs].sum(1)  # <z, y>
    total, power = cross[pairs].sum(), reach[pairs].sum()
    for _ in range(sweeps):
        changed = False
        for d in range(size):
            old, options = int(pairs[d]), torch.arange(decays) * size + d
            totals = total - cross[old] + cross[options]
            diagonal = gram[options, options]
            powers = power - 2 * reach[old] + gram[old, old] + 2 * (reach[options] - gram[options, old]) + diagonal
            gains = totals.square() / powers.clamp(min=1e-30)
            best = int(gains.argmax())
            if best == chosen[d] or gains[best] <= gains[chosen[d]] * (1 + 1e-12):
                continue
            new = int(options[best])
            reach = reach + gram[:, new] - gram[:, old]
            total, power = totals[best], powers[best]
            chosen[d], pairs[d], changed = best, new, True
        if not changed:
            break
    return chosen
