"""Sites that a dictionary's file names in words that stand for no Site, or does not name at all."""

from __future__ import annotations

from vesalius.errors import InputError
from vesalius.site import Site

_MARK = "?"


def unknown_site(name: str | None) -> Site:
    """A Site that no model has and that keeps the name."""
    return Site("module", module=_MARK + (name or "").replace("|", "/"))


def is_unknown(site: Site) -> bool:
    """Whether a Site is one of these."""
    return site.kind == "module" and site.module.startswith(_MARK)


def name_of(site: Site) -> str:
    """The name that the file gave to an unknown site; empty when it gave none."""
    return site.module.removeprefix(_MARK)


def known_site(site: Site) -> Site:
    """The same site. Raises InputError saying what to do when it is unknown."""
    if not is_unknown(site):
        return site
    said = f"named its site {name_of(site)!r}, which stands for no site here" if name_of(site) else "named no site"
    raise InputError(
        f"the file of this dictionary {said}. Load it with site= (and out_site= for what it writes), such as "
        "site='layers.3.resid_post'"
    )
