"""Keeps real Petals on this machine: imported before petals by what the tests run in the Petals environment.

hivemind starts its daemon with port mapping and AutoNAT unless told otherwise, and petals does not let one tell it.
"""

from hivemind.p2p.p2p_daemon import P2P

_create = P2P.create.__func__


async def _create_locally(cls, *args, **options):
    return await _create(cls, *args, **({"nat_port_map": False, "auto_nat": False} | options))


P2P.create = classmethod(_create_locally)
