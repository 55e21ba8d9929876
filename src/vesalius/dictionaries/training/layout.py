"""Layout: which sites of a source are read and which are reconstructed, by which sets of latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vesalius.data import Source
from vesalius.dictionaries.config import TrainConfig
from vesalius.errors import InputError
from vesalius.site import Site, select


@dataclass(frozen=True)
class BlockLayout:
    """One set of latents: the columns it reads of all inputs side by side, and those it writes of all outputs."""

    reads: slice
    writes: slice
    in_widths: tuple[int, ...]
    out_widths: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Sites read and reconstructed, their numbers among the sites of the source, and the sets of latents (blocks).

    There is one block, but for a cross-layer transcoder, which has one per layer.
    """

    coder: str
    in_sites: tuple[Site, ...]
    out_sites: tuple[Site, ...]
    in_numbers: tuple[int, ...]
    out_numbers: tuple[int, ...]
    in_widths: tuple[int, ...]
    out_widths: tuple[int, ...]
    blocks: tuple[BlockLayout, ...]
    apply_b_dec_to_input: bool
    """Whether the decoder's bias is subtracted from the input."""

    @property
    def d_in(self) -> int:
        """Width of all inputs side by side."""
        return sum(self.in_widths)

    @property
    def d_out(self) -> int:
        """Width of all outputs side by side."""
        return sum(self.out_widths)


def layout_of(source: Source, config: TrainConfig, paired: bool = False) -> Layout:
    """The layout that a config implies for a source. paired: the source is a plain (x, y).

    Raises InputError when the sites leave open what is meant or don't fit the coder, UnknownNameError for sites that
    the source does not have.
    """
    ins, outs = _named(config.in_sites, source), _named(config.out_sites, source)
    coder = config.coder if config.coder != "auto" else _guess(ins, outs, source.sites, paired)
    ins, outs = _defaults(coder, ins, outs, source.sites)
    _check(coder, ins, outs, config)
    in_numbers, out_numbers = (tuple(source.sites.index(site) for site in sites) for sites in (ins, outs))
    in_widths, out_widths = (tuple(source.widths[n] for n in numbers) for numbers in (in_numbers, out_numbers))
    same = ins == outs
    if config.apply_b_dec_to_input and not same:
        raise InputError("TrainConfig.apply_b_dec_to_input is for coders that reconstruct what they read")
    subtracts = same if config.apply_b_dec_to_input is None else config.apply_b_dec_to_input
    everything = _block(in_widths, out_widths, range(len(ins)), range(len(outs)))
    blocks = _layers(in_widths, out_widths) if coder == "cross_layer" else (everything,)
    return Layout(coder, ins, outs, in_numbers, out_numbers, in_widths, out_widths, blocks, subtracts)


def _named(patterns: Sequence[str], source: Source) -> tuple[Site, ...]:
    found = tuple(site for pattern in patterns for site in select(pattern, source.sites))
    missing = [str(site) for site in found if site not in source.sites]
    if missing:
        raise InputError(
            f"the activations have no {', '.join(missing)} of its own; they have {', '.join(map(str, source.sites))}. "
            "Harvest it by that name"
        )
    return found


def _guess(ins: tuple[Site, ...], outs: tuple[Site, ...], sites: tuple[Site, ...], paired: bool) -> str:
    if paired and len(sites) == 2:
        return "transcoder"
    if len(ins or sites) == 1 and outs in (ins, ()):
        return "sae"
    if len(ins) == len(outs) == 1:
        return "transcoder"
    if ins and ins == outs:
        return "crosscoder"
    raise InputError(
        f"the source has {len(sites)} sites ({', '.join(map(str, sites))}), so it has to be said what is trained: "
        "TrainConfig(coder=...) sae, transcoder, crosscoder or cross_layer, with in_sites and out_sites"
    )


def _defaults(
    coder: str, ins: tuple[Site, ...], outs: tuple[Site, ...], sites: tuple[Site, ...]
) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """What is not named: the same sites for a sae or crosscoder, else the first half and the second."""
    if coder in ("sae", "crosscoder"):
        return ins or outs or sites, outs or ins or sites
    half = len(sites) // 2
    rest = tuple(site for site in sites if site not in ins + outs)
    return ins or (rest if outs else sites[:half]), outs or (rest if ins else sites[half:])


def _check(coder: str, ins: tuple[Site, ...], outs: tuple[Site, ...], config: TrainConfig) -> None:
    given = f"got {', '.join(map(str, ins)) or 'none'} -> {', '.join(map(str, outs)) or 'none'}"
    wanted = {
        "sae": (len(ins) == 1 and ins == outs, "one site, which it reads and reconstructs"),
        "transcoder": (len(ins) == len(outs) == 1 and ins != outs, "one site to read and another to reconstruct"),
        "crosscoder": (len(ins) + len(outs) > 2, "several sites"),
        "cross_layer": (len(ins) == len(outs) > 1, "as many sites to read as to reconstruct, in the order of layers"),
    }
    fits, words = wanted[coder]
    if not fits:
        raise InputError(f"a {coder.replace('_', '-')} coder needs {words}; {given}. Name them: in_sites=, out_sites=")
    if config.skip and coder != "transcoder":
        raise InputError(f"TrainConfig.skip is for transcoders; this is a {coder.replace('_', '-')} coder")


def _block(ins: tuple[int, ...], outs: tuple[int, ...], reads: range, writes: range) -> BlockLayout:
    """A set of latents that reads and writes neighbouring sites, by their numbers."""
    return BlockLayout(
        _columns(ins, reads), _columns(outs, writes), tuple(ins[n] for n in reads), tuple(outs[n] for n in writes)
    )


def _columns(widths: tuple[int, ...], numbers: range) -> slice:
    return slice(sum(widths[: numbers.start]), sum(widths[: numbers.stop]))


def _layers(ins: tuple[int, ...], outs: tuple[int, ...]) -> tuple[BlockLayout, ...]:
    """One set of latents per layer, which writes at its own layer and all later ones."""
    return tuple(_block(ins, outs, range(n, n + 1), range(n, len(outs))) for n in range(len(ins)))
